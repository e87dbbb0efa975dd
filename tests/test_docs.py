"""The READMEs: their numbers are those of the code, of the paper, or of a sum that anybody can do.

A number is found by the words around it. Who rewords a sentence rewords its pattern here.
"""

import math
import re

import pytest

import train
from test_mdpo import EXAMPLES_README, README


def found(pattern, text=README):
    """The groups of the only place where the pattern is."""
    (place,) = re.finditer(pattern, text)
    return place.groups()


def test_losses_at_the_start_are_logarithms():
    """A user sees at the first step whether policy and reference are the same: by these numbers."""
    (mdpo,), (term,) = found(r"3 ln 2 = (\d\.\d+)"), found(r"\bat ln 2 = (\d\.\d+)")
    assert (mdpo, term) == (f"{3 * math.log(2):.4f}", f"{math.log(2):.4f}")


PAPER = {  # arXiv:2406.11839, Table 1: MMHal-Bench score, HalRate; Object HalBench CHAIRs, CHAIRi;
    # AMBER CHAIRs, cover, HalRate, cog
    "Bunny-v1.0-3B": [
        ["2.11", ".58", "43.0", "8.9", "9.8", "75.6", "64.9", "6.0"],
        ["2.28", ".56", "44.3", "7.6", "7.9", "74.1", "58.9", "4.8"],  # + DPO
        ["2.96", ".42", "27.0", "4.6", "4.9", "67.4", "37.7", "2.4"],  # + mDPO
    ],
    "LLaVA-v1.5-7B": [
        ["2.19", ".57", "54.7", "15.9", "7.4", "51.8", "34.7", "4.1"],
        ["2.14", ".65", "49.0", "13.0", "6.5", "55.1", "34.5", "2.3"],
        ["2.39", ".54", "35.7", "9.8", "4.4", "52.4", "24.5", "2.4"],
    ],
}


@pytest.mark.parametrize("model", PAPER)
def test_numbers_to_aim_at_are_the_papers(model):
    """A reproduction is judged by them."""
    row = r"((?:\| *\d*\.\d+ *){8})\|\n"
    rows = found(rf"\| *{re.escape(model)} *{row}\| *\+ DPO *{row}\| *\+ mDPO *{row}")
    assert [re.findall(r"\d*\.\d+", values) for values in rows] == PAPER[model]


# Parameters of the model, which are bf16, and of the adapter of rank 64, which are float32. A linear
# layer of a inputs and b outputs has 64 (a + b) of these. Phi-2 has 32 layers, each of four of
# 2560 x 2560 and two of 2560 x 10240; Llama has 32, each of four of 4096 x 4096 and three of 4096 x 11008.
SIZES = {
    "Bunny": (3_186_888_224, 32 * 64 * (4 * (2560 + 2560) + 2 * (2560 + 10240))),
    "LLaVA": (7_063_427_072, 32 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
}


@pytest.mark.parametrize("model", SIZES)
def test_memory_before_the_first_step_is_weights_adapter_and_process(model):
    """A user rents a GPU by it. The process itself took 0.4 GiB, as the examples' README says."""
    (gib,) = found(rf"\b{model} takes (\d+\.\d) GiB")
    n_weights, n_adapter = SIZES[model]
    assert float(gib) == pytest.approx((2 * n_weights + 4 * n_adapter) / 1024**3 + 0.4, abs=0.05)
    assert gib in found(
        rf"\| `{model.lower()}-\db`, [14] \| (\d+\.\d) GiB \| \d\.\d GiB more", EXAMPLES_README
    )


def test_steps_of_the_papers_run_are_those_of_the_plan():
    """10,000 examples by 32 are 312 whole batches and a smaller one, which the authors drop; in 3 epochs."""
    theirs, ours = found(r"(\d+) steps, seed 42 \| (\d+) steps, seed 0")
    assert (int(theirs), int(ours)) == (3 * 312, 3 * 313)
    assert len(train.plan_steps(10_000, 32, 4, 3, 0)) == int(ours)


def test_the_largest_image_is_the_same_wherever_it_is_named():
    """The code refuses more than 100 million pixels (tests/test_data.py)."""
    assert {*re.findall(r"([\d,.]+) million pixels", README + EXAMPLES_README)} <= {"100"}
