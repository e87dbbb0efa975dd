"""Protects a reader who looks at examples/lesson.ipynb and runs nothing: what is saved is what the cells
print, the text names only numbers that stand above it, and its conclusions follow from them.

The cells run once, in order, in a fresh process without Jupyter; without matplotlib, nothing is drawn."""

import json
import math
import re
import subprocess
import sys

import pytest

from test_mdpo import ROOT
from tests.helpers import README

LESSON = ROOT / "examples" / "lesson.ipynb"
BOOK = json.loads(TEXT := LESSON.read_text("utf-8"))
CELLS = BOOK["cells"]
CODE = [i for i, cell in enumerate(CELLS) if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
PROGRAM = "\n".join(SOURCES[i] for i in CODE)
TRAINING = next(i for i in CODE if "METHODS = " in SOURCES[i])

WITHOUT_A_SCREEN = """
import os, sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock
os.environ["MPLBACKEND"] = "Agg"
try:
    import matplotlib
except ImportError:
    sys.modules["matplotlib"] = MagicMock(__spec__=ModuleSpec("matplotlib", None))
"""


@pytest.fixture(scope="module")
def printed():
    """{number of a cell: what it prints now}"""
    program = WITHOUT_A_SCREEN + "".join(f"print('NEXT CELL')\n{SOURCES[i]}\n" for i in CODE)
    command = [sys.executable, "-X", "utf8", "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=LESSON.parent, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CODE, done.stdout.split("NEXT CELL\n")[1:], strict=True))


# What each cell printed when the page was made.
SAVED = {i: "".join(line for output in CELLS[i]["outputs"] for line in output.get("text", ())) for i in CODE}
NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?"


def numbers(text):
    return [float(number) for number in re.findall(NUMBER, text)]


def lines_to_compare(text):
    """Words, and numbers, of all lines but times and what models say: these differ between processors."""
    lines = [line for line in text.splitlines() if "second" not in line and not line.startswith("    ")]
    return [" ".join(re.sub(NUMBER, "N", line).split()) for line in lines], [*map(numbers, lines)]


@pytest.mark.parametrize("i", CODE)
def test_a_cell_prints_what_is_saved(printed, i):
    """The page shows numbers that its code no longer gives. After training, processors differ a little."""
    within = 0.05 if i >= TRAINING else 0.0006
    (words, now), (saved_words, then) = lines_to_compare(printed[i]), lines_to_compare(SAVED[i])
    assert words == saved_words
    assert now == [pytest.approx(line, abs=within, rel=within / 2) for line in then]


def test_what_models_say_is_printed_of_each(printed):
    """An answer under another model's name, or a model left out."""
    (i,) = [i for i in CODE if "What colour is the triangle?" in SAVED[i]]
    for text in printed[i], SAVED[i]:
        assert re.findall(r"^    (\w+) +\S", text, re.MULTILINE) == ["base", "DPO", "mDPO"] * 3
    said = re.findall(r"^    \w+ +(.*)", SAVED[i], re.MULTILINE)
    assert said[0].endswith("a orange ring.") and "no triangle" in said[5] and said[8].startswith("no")


def test_every_number_in_bold_is_printed_by_the_cell_above_and_no_other_is_measured():
    """A number of an older run, or of none; or one that is not in bold, and so not looked at."""
    n_found = 0
    for i, text in enumerate(SOURCES):
        if i in CODE:
            above = re.findall(NUMBER + "%?", SAVED[i])
        elif i > CODE[0]:
            text = re.sub(r"\$[^$]*\$|`[^`]*`", "", text)  # without formulas and code
            bold = re.findall(rf"\*\*({NUMBER}%?)\*\*", text)
            assert {*bold} <= {*above, *(value.removeprefix("-") for value in above)}, i
            assert not re.findall(r"\d\.\d|\d%", re.sub(r"\*\*.*?\*\*", "", text)), i
            n_found += len(bold)
    assert n_found >= 25


def row(title):
    """The numbers of the saved line that begins so."""
    [line] = [line for text in SAVED.values() for line in text.splitlines() if line.startswith(title)]
    return numbers(line.removeprefix(title))


def test_the_conclusions_follow_from_the_numbers():
    """Outputs that are made anew, below sentences that no longer hold."""
    assert row("eq. 8")[0] == pytest.approx(3 * math.log(2), abs=1e-4)
    assert row("only y_w has the polite phrase: ")[0] > 80
    assert min(row("without the image is left: ")) > 200 / 3  # mDPO does not remove the shortcut, either
    for title in "m_w over m_l, a crop", "m_w over another image":
        dpo, mdpo, difference, error = row(title)
        assert mdpo - dpo == pytest.approx(difference, abs=0.0011) and difference > 2 * error, title
    dpo, mdpo, *_ = row("change of log pi(y_w | m_w, q)")
    assert dpo < -1 and abs(mdpo) < 0.3
    base, dpo, mdpo = row("false premises refused")
    assert dpo < base < mdpo
    base, dpo, mdpo = row("mean with true premises not refused")
    assert abs(dpo - 0.5) < 0.1 < mdpo - base
    base, dpo, mdpo = row("answers that are no sentence")
    assert base == 0 and dpo > 5 * mdpo
    base, dpo, mdpo = row("answers with a false claim")
    assert 0.25 < mdpo < 0.35 < min(base, dpo)
    assert row("largest difference of a log-probability: ")[0] < 1e-4


def test_the_sixty_steps_are_the_demos():
    """The lesson trains on other data, or otherwise, than the run whose table the README shows."""
    titles = {"false_premise": "false premises refused", "hallucination_rate": "answers with a false claim",
              "malformed": "answers that are no sentence", "length": "words of an answer"}  # fmt: skip
    for metric, title in titles.items():
        [line] = re.findall(rf"^  {metric} +([\d. ]+)", README, re.MULTILINE)
        assert numbers(line) == row(title), metric
    assert "at step 60:" in SAVED[TRAINING]


def test_it_is_a_small_notebook_whose_cells_ran_in_order():
    """It does not open, or slowly, was saved half-way, teaches private names, or shows somebody's path."""
    assert (BOOK["nbformat"], BOOK["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len(TEXT) < 600_000 and len({cell["id"] for cell in CELLS}) == len(CELLS) <= 25
    assert [CELLS[i]["execution_count"] for i in CODE] == [*range(1, len(CODE) + 1)]
    kinds = [output.get("name", "picture") for i in CODE for output in CELLS[i]["outputs"]]
    assert {*kinds} == {"stdout", "picture"} and kinds.count("picture") == 5  # no stderr
    assert max(map(len, PROGRAM.splitlines())) <= 110
    assert {*re.findall(r"\b_[a-z]\w*", PROGRAM)} == {"_replace", "_asdict"}  # public names of a NamedTuple
    assert not re.findall(r"/(?:home|tmp|root|Users|work)/", TEXT)


def test_each_exercise_changes_one_line_of_the_lesson():
    """An answer that changes no line that is there, or more than one."""
    [exercises] = [text for text in SOURCES if "## Exercises" in text]
    answers = re.findall(r"<summary>Answer</summary>\n\n`((\w+ = ).*)`", exercises)
    assert len(answers) == 3
    for answer, name in answers:
        [line] = re.findall(f"^{name}.*", PROGRAM, re.MULTILINE)
        assert line.partition("  #")[0] != answer
        compile(answer, "answer", "exec")


def set_up(folder, monkeypatch, address="", missing=()):
    """Run the first cell in a folder -> the commands that it starts."""
    commands, names = [], {}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name not in missing)
    monkeypatch.setattr("warnings.simplefilter", lambda action: None)
    exec(SOURCES[CODE[0]].replace('REPOSITORY = ""', f"REPOSITORY = {address!r}"), names)  # noqa: S102
    assert sys.path[0] == str(names["root"])
    return commands


def test_the_first_cell_clones_and_installs_only_what_is_missing(tmp_path, monkeypatch):
    """In a clone it may touch nothing; in Colab it has to bring everything, once. Git would not say why."""
    assert set_up(LESSON.parent, monkeypatch) == set_up(ROOT, monkeypatch) == []
    [install] = set_up(LESSON.parent, monkeypatch, missing=["peft"])
    assert install[1:4] == ["-m", "pip", "install"] and install[-1] == str(ROOT / "requirements.txt")
    with pytest.raises(SystemExit, match="Write the repository's address into REPOSITORY"):
        set_up(tmp_path, monkeypatch)
    address, to = "https://example.org/mdpo", tmp_path / "mdpo"
    clone, install = set_up(tmp_path, monkeypatch, address)
    assert clone[:2] == ["git", "clone"] and clone[-2:] == [address, str(to)]
    assert install[-1] == str(to / "requirements.txt") and "matplotlib" in install
    to.mkdir()
    (to / "mdpo.py").touch()
    assert set_up(tmp_path, monkeypatch, address) == []
