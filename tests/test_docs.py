"""The READMEs' numbers are those of code, paper or a sum. Who rewords a sentence rewords its pattern here."""

import inspect
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

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
def test_readme_is_short_its_links_lead_somewhere_and_its_contents_list_all(folder, text):
    """Nobody reads a long one, and a heading that was reworded breaks links without a word."""
    assert len(README.split()) <= 2500
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text)
    assert len(links) >= 12
    for path, anchor in links:
        target = folder / path if path else folder / "README.md"
        assert target.is_file(), path
        assert not anchor or anchor in anchors_of(target.read_text()), (path, anchor)
    contents = re.search(r"^## Contents\n(.*?)^(?:## |The )", text, re.MULTILINE | re.DOTALL)[1]
    sections = [(h, anchor) for anchor, h in anchors_of(text).items() if f"\n## {h}\n" in text]
    assert re.findall(r"\[(.*?)\]\(#(.*?)\)", contents) == [s for s in sections if s[0] != "Contents"]


@pytest.mark.parametrize("file, other", [("mdpo.py", "data"), ("data.py", "mdpo"), ("test_mdpo.py", "tests")])
def test_the_six_files_need_no_others(file, other, monkeypatch):
    """Who copies them has no examples/ and no tests/; who copies mdpo.py alone has no data.py."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("examples", "tests", other)]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    runpy.run_path(str(ROOT / file), run_name="copied")


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
    detailed = EXAMPLES_README.split("Hours of the paper's 10K x 3 epochs")[1]
    cards = r"^\| (?:H200|A100),.*? \| ([\d.]+) h \| \S+ h \(8\) \| ([\d.]+) h \| \S+ h \(\d\) \|$"
    expected = re.findall(cards, detailed, re.MULTILINE)
    assert len(rows) == 2 and rows == [*zip(*expected)]  # a row there is a card, here a model


def test_readme_loss_is_the_loss():
    """The first screen teaches the loss, and is what most readers copy."""
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], scope := {})
    for options in ({}, {"beta": 0.5, "delta": 0.25}):
        ours, _ = mdpo_loss(POLICY, REF, **options)
        assert torch.allclose(scope["mdpo_loss"](POLICY, REF, **options), ours)


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
        assert name == "py" or hasattr(sys.modules[module], name), f"{module}.{name}"


def test_readme_flags_exist():
    """Each row of the table of paper settings must be a command that runs; the text names real flags."""
    rows = re.findall(r"^\| (?:DPO|Fig|Table|4\.1).*\| `(--[^`]+)`", README, re.MULTILINE)
    assert len(rows) >= 12
    for flags in rows:
        train.parse_args(["--model", "m", "--data", "d", *flags.split()])
    assert {*re.findall(r"`--([\w-]+)[^`]*`", README)} <= {"help", *ARGUMENTS}


def test_readme_training_command_runs(bunny, tmp_path, monkeypatch):
    """The user's own command, to the letter, with a tiny model under Bunny's name."""
    monkeypatch.chdir(shapes.write_pairs(tmp_path / "data", 5).parent)
    Path("BAAI").mkdir()
    Path("BAAI/Bunny-v1_0-3B").symlink_to(bunny)
    (line,) = re.findall(r"^python train.py (.*Bunny-v1_0-3B --data silkie.json)$", README, re.MULTILINE)
    assert train.main(line.split()) == 0
    assert len(log_of("runs/Bunny-v1_0-3B-silkie-1")) == 3  # 3 epochs of one partial batch


# arXiv:2406.11839, Table 1, in the README's order
PAPER = """
Bunny-v1.0-3B 2.11 .58 43.0 8.9 9.8 75.6 64.9 6.0
+ DPO 2.28 .56 44.3 7.6 7.9 74.1 58.9 4.8
+ mDPO 2.96 .42 27.0 4.6 4.9 67.4 37.7 2.4
LLaVA-v1.5-7B 2.19 .57 54.7 15.9 7.4 51.8 34.7 4.1
+ DPO 2.14 .65 49.0 13.0 6.5 55.1 34.5 2.3
+ mDPO 2.39 .54 35.7 9.8 4.4 52.4 24.5 2.4
"""


def test_numbers_to_aim_at_are_the_papers():
    """A reproduction is judged by them."""
    assert " ".join(PAPER.split()) in " ".join(README.replace("|", " ").split())


# In GiB: weights in bf16; an adapter in float32, of 64 (a + b) for a linear layer of a inputs and b outputs;
# and the process's own 0.4. Phi-2 has 32 layers, each of four of 2560 x 2560 and two of 2560 x 10240; Llama
# has 32, each of four of 4096 x 4096 and three of 4096 x 11008. 10,000 examples by 32 are 312 whole batches
# and a smaller one, which the authors drop; in 3 epochs.
NUMBERS = {  # where each stands: what it is
    r"3 ln 2 = (\d\.\d+)": 3 * math.log(2),
    r"\bat ln 2 = (\d\.\d+)": math.log(2),
    r"\bBunny takes (\S+) GiB": (2 * 3_186_888_224 + 4 * 64 * 32 * (4 * 5120 + 2 * 12800)) / 2**30 + 0.4,
    r"\bLLaVA takes (\S+) GiB": (2 * 7_063_427_072 + 4 * 64 * 32 * (4 * 8192 + 3 * 15104)) / 2**30 + 0.4,
    r"(\d+) steps, seed 42": 3 * 312,
    r"(\d+) steps, seed 0": len(train.plan_steps(10_000, 32, 4, 3, 0)),
}


@pytest.mark.parametrize("pattern", NUMBERS)
def test_numbers_of_the_readme_are_those_of_a_sum(pattern):
    """By its first losses a user sees whether policy and reference are the same; by memory he rents a GPU."""
    (text,) = re.findall(pattern, README)
    assert float(text) == pytest.approx(NUMBERS[pattern], abs=0.5 / 10 ** len(text.partition(".")[2]))
