"""What is shown before training is what is trained; the user's files stay whole; no module needs Unix."""

import json
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageColor

import data
import train
from data import CROP, run_command
from examples import benchmarks, compare, curves, families, miniature, minimal, preview, shapes, words
from mdpo import mdpo_loss
from test_mdpo import ROOT, authors, command, noise, write
from tests.helpers import one_line_of

RECORD = {"image": "a.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
REASONED = RECORD | {name: f"<think>\nFur.\n</think>\n\n{RECORD[name]}" for name in ("chosen", "rejected")}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SHOWN = "<|vision_start|><image> x 2<|vision_end|>"
ASK = f"<|im_start|>user\n{SHOWN}What is it?<|im_end|>\n<|im_start|>assistant"
THINKING = families.template(  # writes reasoning into a block of its own, as Qwen3.5's template does
    "'<|vision_start|><|image_pad|><|vision_end|>'", *families.CHATML[:2], "<|im_start|>assistant\n<think>\n",
    "('' if message.role == 'user' or '</think>' in part.text else '<think>\n\n</think>\n\n') + part.text",
)  # fmt: skip


@pytest.fixture
def show(folder, request, monkeypatch, capsys, run):
    """A function: a model's name, records, flags of train.py and of preview.py, status -> what is printed."""
    monkeypatch.setattr("train.load_model", None)  # nothing that is shown needs weights

    def shown(name, records, flags="", status=0):
        made = name in families.FAMILIES
        model = families.write_family(name, folder / name) if made else request.getfixturevalue(name)
        if name == "qwen3_vl":
            write(model / "chat_template.jinja", THINKING)
        capsys.readouterr()  # of writing it
        return run(preview, f"--model {model} --data {write(folder / 'x.json', records)} {flags}", status)

    return shown


@pytest.mark.parametrize("model, record, row, asked", [  # y_w's row by hand, what a model has that is asked
    # 32 pixels in patches of 8: 4 x 4 image tokens. Bunny's template and the authors' prompt agree.
    ("bunny", authors(), " USER: <image> x 16\nWhat is it? ASSISTANT:[ A cat.<|endoftext|>]", ""),
    ("llava", RECORD, "\n<s> USER: <image> x 16\nWhat is it? ASSISTANT:[ A cat.</s>]", ""),
    # 48 x 32 pixels are scaled to 56 x 28, of which 28 x 28 are a token
    ("qwen2_5_vl", RECORD, f"\n{SYSTEM}{ASK}\n[A cat.<|im_end|>]", ""),
    # the block is the template's own: each row has one, and where both answers reason it opens unscored
    ("qwen3_vl", REASONED, f"\n{ASK}\n<think>\n[Fur.\n</think>\n\nA cat.<|im_end|>]", ""),
    ("qwen3_vl", RECORD, f"\n{ASK}\n<think>\n\n</think>\n\n[A cat.<|im_end|>]",
     r"<think>\n', these rows have '|>assistant\n<think>\n\n</think>\n\n'"),
    ("llava_onevision", RECORD, "\nWhat is it?<|im_end|><|im_start|>assistant \n[A cat.<|im_end|>]",
     r"assistant\n', these rows have '|im_start|>assistant \n'"),
])  # fmt: skip
def test_rows_are_shown_as_the_model_is_given_them(model, record, row, asked, show):
    """A wrong template, a second think block, a lost end or a scored prompt is seen here, or by nobody."""
    printed = show(model, [record] * 2)
    texts = printed.replace("\n  ", "\n")
    assert (model == "bunny") == (f"\n{train.BUNNY_SYSTEM} USER" in texts)
    assert f"{row}\ny_l with m_w" in texts and f"{row.replace('cat', 'dog')}\ny_w with m_l" in texts
    assert printed.count("[") == printed.count("]") == 4 and "the text of y_w with m_w" in printed
    assert printed.count("note:") == printed.count(asked or "note:") == bool(asked)


def test_a_rejected_image_of_another_size_has_a_row_of_its_own(show):
    """The third row is shown where it differs: its image has more tokens. 56 x 84 pixels are 2 x 3."""
    noise(3, (56, 84)).save("b.png")
    row = show("qwen2_5_vl", [RECORD | {"rejected_images": ["b.png"]}]).split("y_w with m_l")[-1]
    assert "<image> x 6<|vision_end|>What is it?" in row and "[A cat.<|im_end|>]" in row


@pytest.mark.parametrize("flags, has_m_l", [
    ("", True), ("--no-conditional --anchors image_rejected", True),
    ("--no-image", False), ("--no-conditional", False),
])  # fmt: skip
def test_only_rows_that_are_trained_are_shown(flags, has_m_l, show):
    """DPO has no row of a rejected image. Someone who left a flag out sees it by this."""
    printed = show("bunny", [authors()], flags)
    assert ("y_w with m_l" in printed) == ("m_l of this run: none" not in printed) == has_m_l
    assert ("<image> x 16" in printed) == (flags != "--no-image")


def test_a_row_that_is_cut_is_shown_cut(show):
    """Without its end-of-sequence the model learns never to stop."""
    records = [authors(chosen="A cat on a mat. " * 9)]
    whole = show("bunny", records)
    n_tokens, n_scored = map(int, re.search(r"y_w with m_w: (\d+) tokens, (\d+) scored", whole).groups())
    cut = show("bunny", records, f"--max-length {n_tokens - 1}")
    assert (whole.count("<|endoftext|>]"), cut.count("<|endoftext|>]")) == (2, 1)
    assert f"y_w with m_w: {n_tokens - 1} tokens, {n_scored - 1} scored" in cut


def test_data_do_not_command_the_terminal_where_what_is_scored_is_green(show, monkeypatch):
    """An escape sequence in a record could hide other rows. Brackets would be lost among those of a text."""
    records = [authors(chosen="A [\x1b[2J\x9b2Jcat].\r\tx", id="\x1b]0;x")]
    printed, text = show("bunny", records), r" A [\x1b[2J\x9b2Jcat].\r\tx"
    assert not {*"\x1b\x9b\r\t"} & {*printed} and f"ASSISTANT:[{text}<|endoftext|>]" in printed
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert f"ASSISTANT:\033[32m{text}<|endoftext|>\033[0m" in show("bunny", records)


def test_examples_are_the_runs_first_in_its_own_order(bunny, small, tmp_path, run):
    """Other rows say nothing about the run, whose loss notes here what it sees of 5 examples but one."""
    argv = command(bunny, small, tmp_path / "out", *"--epochs 1 --seed 4 --limit 5 --eval-size 1".split())
    seen = []

    def loss(*logps, batch, **options):
        seen.extend(batch.ids * (batch.keys[0][0] == 0))  # not held out
        return mdpo_loss(*logps, **options)

    def shown(*argv):
        out = run(preview, " ".join(argv))
        assert "example 1 of 4," in out and ("x.png: 2 examples" in out) == ("--to" in argv)
        return [line.split()[-1] for line in out.splitlines() if line.startswith("---")]

    first, first_two = shown(*argv), shown(*argv, *"--rows 2 --to x.png".split())  # three are shown unasked
    assert train.main(argv, loss) == 0 and len(seen) == 4 and (first, first_two) == (seen[:3], seen[:2])
    assert shown("--resume", "out", "--rows", "99") == seen


@pytest.mark.parametrize("flags, message", [
    ("--row 2", "--row"),
    ("--crop 0.5 0.2", "--crop: its minimum is above its maximum"),
    ("--data none.json", "no such file"),
    ("--to mine.png", "mine.png: already exists"),
    ("--to gone.png", "gone.png: already exists"),
    ("--to x.odd", "unknown file extension: .odd"),
    ("--to no/x.png", "cannot be written to"),
])  # fmt: skip
def test_a_preview_refuses_what_train_py_refuses_and_keeps_files(flags, message, show):
    """A mistyped flag must not show rows of other settings, nor a picture replace one of the user's."""
    Path("mine.png").write_text("mine")
    Path("gone.png").symlink_to("nowhere")
    assert message in show("bunny", [authors()], flags, 2)
    assert Path("mine.png").read_text() == "mine" and not Path("nowhere").exists()


def test_each_strategy_is_drawn_under_its_title(monkeypatch, tmp_path):
    """A user judges a strategy by its panel. A record's own rejected image is the run's alone."""
    seen = set()

    def make(colour, image, rng, area, other):
        seen.add((image.size, rng.random()))
        return Image.new("RGB", (64, 48), {CROP: colour, (0.2, 0.5): "blue"}[area])

    monkeypatch.chdir(tmp_path)
    for strategy, colour in ("crop", "lime"), ("random", "yellow"), ("moco", "purple"):
        monkeypatch.setitem(data.STRATEGIES, strategy, partial(make, colour))
    for colour in "red", "white", "cyan":
        Image.new("RGB", (64, 48), colour).save(f"{colour}.png")
    images = ("red.png", "cyan.png"), ("cyan.png", "red.png")
    examples = [data.Example("", "", "", ("white.png",)), data.Example("", "", "", *images)]
    args = SimpleNamespace(seed=7, max_pixels=12)
    sheet = preview.contact_sheet(args, data.Pairs(examples, **vars(args)), [(0, 1)])
    colours = map(ImageColor.getrgb, ["red", "cyan", "lime", "blue", "yellow", "purple"])
    assert [sheet.getpixel((x, 100)) for x in range(70, sheet.width, 250)] == [*colours]  # one of each panel
    rng = random.Random("7 0 1")
    assert seen == {((4, 3), rng.random()) for _ in range(2)}


def draw_figure(argv):
    curve = {"chosen_curve": [0.0, 1.0], "image_accuracy_curve": [0.0, 1.0], "grounding": 1.0}
    names = ["base", *miniature.QUICK]
    miniature.draw({"0": dict.fromkeys(names, curve)}, Path(argv[-1]))
    labels = curves.load_pyplot().gcf().axes[2].get_xticklabels()  # none ends under another's bar
    assert [(label.get_text(), label.get_ha()) for label in labels] == [(name, "right") for name in names]
    return 0


@pytest.mark.parametrize("run, flags, name", [
    (preview.run, "--model {} --data {}", "preview.png"),
    (words.run, "--model {} --data {} --device cpu --limit 2", "words.html"),
    (curves.run, "run", "curves.png"),
    (draw_figure, "", "figure.png"),
    (benchmarks.run, "amber --images . --questions q.json --model {}", "amber.json"),
    (compare.run, "--benchmark amber --images . --data q.json --adapter 1.json 2.json", "page.html"),
])  # fmt: skip
def test_half_a_page_never_stays(run, flags, name, bunny, small, tmp_path, monkeypatch, capsys):
    """A full disk left half a page under a name that is then taken, or a figure in place of the good one."""
    limits = pytest.importorskip("resource")
    limit = limits.getrlimit(limits.RLIMIT_FSIZE)
    argv = [*flags.format(bunny, small).split(), "--to", name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.curves.read_log", lambda run: [{"step": 1, "loss": 1.5}])
    monkeypatch.setattr("os.remove", lambda path: None)  # as PIL does, but no killed program
    if run in (curves.run, draw_figure):
        pytest.importorskip("matplotlib")
        write(Path(name), "the old one")  # which these may replace
    for file in "q.json", "1.json", "2.json":
        write(Path(file), [{"id": 1, "image": "1.png", "query": "What is it?", "answer": "A cat."}])
    noise(1).save("1.png")
    say = lambda files, *more: dict.fromkeys(files, ["A cat." * 20])
    monkeypatch.setattr("examples.benchmarks.answer_as", say)
    files = lambda: {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = files()
    limits.setrlimit(limits.RLIMIT_FSIZE, (99, limit[1]))
    try:
        message = one_line_of(capsys, run_command(run, argv))
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, limit)
    assert "cannot be written to" in message and "File too large" in message and files() == before
    assert run_command(run, argv) == 0 and {*files()} == {*before, name} and files() != before


def test_a_study_needs_no_git_and_keeps_folders_that_are_not_its_own(run, monkeypatch):
    """Hours ended before results were written, a folder of the user's went, or worlds shared their runs."""
    made, pool = [], nullcontext(SimpleNamespace(map=map))
    make = lambda path, *rest: made.append(rest[-2:]) or path.mkdir()
    monkeypatch.setattr("examples.tiny_bunny.write_base", make)
    monkeypatch.setattr("examples.shapes.write_pairs", make)
    monkeypatch.setattr("examples.miniature.ProcessPoolExecutor", lambda *rest: pool)
    monkeypatch.setattr("examples.miniature.run_method", lambda *rest: {"grounding": 0.5})
    monkeypatch.setenv("PATH", "")
    for flags, out in ("", "runs/miniature/small"), ("--world large --out mine", "mine/large"):
        folder = Path(out, "seed-7")
        write(folder / "unfinished" / "notes.txt", "mine")
        run(miniature, f"--seeds 7 --quick {flags}")
        assert {*os.listdir(folder)} >= {"unfinished", "model", "data", "held_out", "log.txt"}
        assert os.listdir(folder / "unfinished") == ["notes.txt"]
        summary = json.loads(Path(out, "results.json").read_text())["summary"]
        assert summary["mDPO"]["grounding"] == [0.5, 0.0]
    assert made == [(seed, world) for world in (shapes.SMALL, shapes.LARGE) for seed in (7, 7, "held out 7")]


def test_minimal_takes_a_new_folder_alone(tmp_path):
    """It would write its adapter over another run's, and its model card over a README."""
    write(tmp_path / "out" / "README.md", "mine")
    with pytest.raises(SystemExit, match="out: already exists"):
        minimal.main("no model", "no data", str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


IMPORT_ALL = """
import contextlib, importlib, os, pathlib, signal, sys
import peft, tqdm, torch, transformers  # what they need of a system is their own affair
with contextlib.suppress(ImportError):
    import trl
sys.modules |= dict.fromkeys(("fcntl", "grp", "posix", "pwd", "resource", "termios", "tty"))
kept = "SIG_DFL SIG_IGN SIGABRT SIGBREAK SIGFPE SIGILL SIGINT SIGSEGV SIGTERM".split()  # Windows has these
for name in {name for name in dir(signal) if name.startswith("SIG")} - {*kept}:
    delattr(signal, name)
for name in ("fork", "getpgid", "killpg", "mkfifo", "setsid", "sched_getaffinity"):
    delattr(os, name)
for path in [*pathlib.Path().glob("*.py"), *pathlib.Path().glob("examples/*.py")]:
    if not path.name.startswith(("test_", "__")):
        try:
            importlib.import_module(".".join(path.with_suffix("").parts))
            print(path)
        except ModuleNotFoundError as error:
            if error.name not in ("datasets", "trl"):  # packages more
                raise
"""


@pytest.mark.skipif(os.name != "posix", reason="takes away what others have not")
def test_all_modules_import_without_what_only_unix_has():
    """On Windows a command that imports `fcntl` or names SIGHUP dies before its first line."""
    child = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert {"train.py", "examples/preview.py", "examples/throughput.py"} <= {*child.stdout.split()}
