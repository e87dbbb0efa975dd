"""The READMEs: their numbers are those of the code, of the paper, or of a sum that anybody can do.

A number is found by the words around it. Who rewords a sentence rewords its pattern here.
"""

import inspect
import math
import re
import runpy
import sys

import pytest
import torch

import data  # noqa: F401 (looked up by name)
import mdpo  # noqa: F401
import train
from examples import shapes
from mdpo import mdpo_loss
from test_mdpo import POLICY, REF, ROOT, log_of
from tests.helpers import ARGUMENTS, EXAMPLES_README, README

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
READMES = pytest.mark.parametrize("folder, text", [(ROOT, README), (ROOT / "examples", EXAMPLES_README)])


def anchors_of(text):
    """{anchor: heading} as GitHub makes them; lines of code that begin with # are no headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): heading for heading in headings}


@READMES
def test_readme_links_lead_somewhere(folder, text):
    """A file that was renamed, or a heading that was reworded, breaks links without a word."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text)
    assert len(links) >= 12
    for path, anchor in links:
        target = folder / path if path else folder / "README.md"
        assert target.is_file(), path
        assert not anchor or anchor in anchors_of(target.read_text()), (path, anchor)


@READMES
def test_readme_contents_list_every_section(folder, text):
    """In the order of the text, and under the sections' own names."""
    contents = re.search(r"^## Contents\n(.*?)^(?:## |The )", text, re.MULTILINE | re.DOTALL)[1]
    sections = [(h, anchor) for anchor, h in anchors_of(text).items() if f"\n## {h}\n" in text]
    assert re.findall(r"\[(.*?)\]\(#(.*?)\)", contents) == [s for s in sections if s[0] != "Contents"]


@pytest.mark.parametrize("file", ["mdpo.py", "data.py", "test_mdpo.py"])
def test_the_six_files_need_no_others(file, monkeypatch):
    """Who copies them alone has no examples/ and no tests/."""
    for name in "examples", "examples.shapes", "examples.tiny_bunny", "tests":
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    runpy.run_path(str(ROOT / file), run_name="copied")


def test_readme_is_short():
    """Nobody reads a long one."""
    assert len(README.split()) <= 2500


@READMES
def test_readme_commands_name_files_and_flags_that_exist(folder, text):
    """In shell blocks and in the text. Some scripts take train.py's flags as well."""
    commands = re.findall(r"\bpython ((?:data|train|examples/\w+)\.py)([^`#\n]*)", text.replace("\\\n", " "))
    assert len(commands) >= 5
    for script, flags in commands:
        source = (ROOT / script).read_text()
        if "make_parser" in source:  # shared
            source += "".join((ROOT / "examples" / name).read_text() for name in ("answer.py", "evaluate.py"))
        known = {*re.findall(r'"(?:--)?([\w-]+)"', source)}
        if re.search(r"train\.main|parse_args", source):
            known |= {*ARGUMENTS}
        assert {*re.findall(r" --([\w-]+)", flags)} <= known, script


def test_readme_hours_are_those_of_the_examples():
    """Both texts quote one prediction; tests of the benchmark hold its formula."""
    rows = re.findall(r"^\| \S+ \| ([\d.]+) hours \| ([\d.]+) hours \|$", README, re.MULTILINE)
    detailed = (ROOT / "examples" / "README.md").read_text().split("Hours of the paper's 10K x 3 epochs")[1]
    cards = r"^\| (?:H200|A100),.*? \| ([\d.]+) h \| \S+ h \(8\) \| ([\d.]+) h \| \S+ h \(\d\) \|$"
    expected = re.findall(cards, detailed, re.MULTILINE)
    assert len(rows) == 2 and rows == [*zip(*expected)]  # a row there is a card, here a model


def test_readme_loss_is_the_loss():
    """The eight lines of the first screen, against `mdpo_loss`."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    scope = {}
    exec(code, scope)
    assert len(code.splitlines()) == 8
    for options in ({}, {"beta": 0.5, "delta": 0.25}):
        assert torch.allclose(
            scope["mdpo_loss"](POLICY, REF, **options), mdpo_loss(POLICY, REF, **options)[0]
        )


def test_readme_table_points_at_code_that_is_there():
    """A table of equations that rots sends a student to the wrong line."""
    source = inspect.getsource(mdpo_loss)
    equations = re.findall(r"^\| eq\. (\d).*`(\S+)` in `mdpo.mdpo_loss`", README, re.MULTILINE)
    assert len(equations) == 4
    for equation, key in equations:
        assert re.search(rf"{re.escape(key)}.*# eq\. {equation}", source), (equation, key)
    named = re.findall(r"`(mdpo|data|train)\.(\w+)(?:\(.*?\))?`", README + EXAMPLES_README)
    assert len(named) >= 8
    for module, name in named:
        assert name == "py" or hasattr(globals()[module], name), f"{module}.{name}"


def test_readme_flags_exist():
    """Each row of the table of paper settings must be a command that runs; the text names real flags."""
    rows = re.findall(r"^\| (?:DPO|Fig|Table|4\.1).*\| `(--[^`]+)`", README, re.MULTILINE)
    assert len(rows) >= 12
    for flags in rows:
        train.parse_args(["--model", "m", "--data", "d", *flags.split()])
    for flag in re.findall(r"`--([\w-]+)[^`]*`", README):
        assert flag == "help" or flag in ARGUMENTS, flag


def test_readme_training_command_runs(bunny, tmp_path, monkeypatch):
    """The user's own command, to the letter, with a tiny model under Bunny's name and no flag but the
    README's."""
    monkeypatch.chdir(tmp_path)
    shapes.write_pairs(tmp_path / "data", 5)
    for path in (tmp_path / "data").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "BAAI").mkdir()
    (tmp_path / "BAAI" / "Bunny-v1_0-3B").symlink_to(bunny)
    (line,) = re.findall(
        r"^python train.py (--model BAAI/Bunny-v1_0-3B --data silkie.json)$", README, re.MULTILINE
    )
    assert train.main(line.split()) == 0
    assert len(log_of("runs/Bunny-v1_0-3B-silkie-1")) == 3  # 3 epochs of one partial batch


def found(pattern, text=README):
    """The groups of the only place where the pattern is."""
    (place,) = re.finditer(pattern, text)
    return place.groups()


def test_losses_at_the_start_are_logarithms():
    """A user sees at the first step whether policy and reference are the same: by these numbers."""
    start, term = found(r"3 ln 2 = (\d\.\d+)"), found(r"\bat ln 2 = (\d\.\d+)")
    assert (*start, *term) == (f"{3 * math.log(2):.4f}", f"{math.log(2):.4f}")


PAPER = {  # arXiv:2406.11839, Table 1: MMHal-Bench score, HalRate; Object HalBench CHAIRs, CHAIRi;
    # AMBER CHAIRs, cover, HalRate, cog. Of the base, with DPO and with mDPO.
    "Bunny-v1.0-3B": """
        2.11 .58 43.0  8.9 9.8 75.6 64.9 6.0
        2.28 .56 44.3  7.6 7.9 74.1 58.9 4.8
        2.96 .42 27.0  4.6 4.9 67.4 37.7 2.4""",
    "LLaVA-v1.5-7B": """
        2.19 .57 54.7 15.9 7.4 51.8 34.7 4.1
        2.14 .65 49.0 13.0 6.5 55.1 34.5 2.3
        2.39 .54 35.7  9.8 4.4 52.4 24.5 2.4""",
}


@pytest.mark.parametrize("model", PAPER)
def test_numbers_to_aim_at_are_the_papers(model):
    """A reproduction is judged by them."""
    row = r"((?:\| *\d*\.\d+ *){8})\|\n"
    rows = found(rf"\| *{re.escape(model)} *{row}\| *\+ DPO *{row}\| *\+ mDPO *{row}")
    assert "".join(rows).replace("|", " ").split() == PAPER[model].split()


# Parameters of the model, which are bf16, and of the adapter of rank 64, which are float32. A linear
# layer of a inputs and b outputs has 64 (a + b) of these. Phi-2 has 32 layers, each of four of
# 2560 x 2560 and two of 2560 x 10240; Llama has 32, each of four of 4096 x 4096 and three of 4096 x 11008.
SIZES = {
    "Bunny": (3_186_888_224, 32 * 64 * (4 * (2560 + 2560) + 2 * (2560 + 10240))),
    "LLaVA": (7_063_427_072, 32 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
}


@pytest.mark.parametrize("model", SIZES)
def test_memory_before_the_first_step_is_weights_adapter_and_process(model):
    """A user rents a GPU by it. The process itself took 0.4 GiB."""
    (gib,) = found(rf"\b{model} takes (\d+\.\d) GiB")
    n_weights, n_adapter = SIZES[model]
    assert float(gib) == pytest.approx((2 * n_weights + 4 * n_adapter) / 1024**3 + 0.4, abs=0.05)


def test_steps_of_the_papers_run_are_those_of_the_plan():
    """10,000 examples by 32 are 312 whole batches and a smaller one, which the authors drop; in 3 epochs."""
    theirs, ours = found(r"(\d+) steps, seed 42 \| (\d+) steps, seed 0")
    assert (int(theirs), int(ours)) == (3 * 312, 3 * 313)
    assert len(train.plan_steps(10_000, 32, 4, 3, 0)) == int(ours)
