"""What is shown before training is what is trained; the user's files stay whole; no module needs Unix."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import data
import train
from data import CROP, read_examples, run_command
from examples import curves, families, miniature, minimal, preview, words
from mdpo import mdpo_loss
from test_mdpo import ROOT, authors, command, noise, write
from tests.helpers import one_line_of

SYSTEM = train.BUNNY_SYSTEM
RECORD = {"image": "a.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
BOTH_REASON = {
    "chosen": "<think>\nFur.\n</think>\n\nA cat.",
    "rejected": "<think>\nTail.\n</think>\n\nA dog.",
}
THINKING = (  # writes reasoning into a block of its own, as Qwen3.5's template does
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set text = m.content[0].text %}{% set why = '' %}{% if '</think>' in text %}"
    "{% set why = text.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<think>\n' + why + '\n</think>\n\n' + text }}{% else %}{% for p in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def models(bunny, llava, tmp_path_factory):
    """{name: a folder without weights}: nothing that is shown needs them."""
    top, found = tmp_path_factory.mktemp("without_weights"), {"bunny": bunny, "llava": llava}
    for name in ("qwen2_5_vl", "llava_onevision", "thinking"):
        found[name] = families.write_family({"thinking": "qwen3_vl"}.get(name, name), top / "whole" / name)
    (found["thinking"] / "chat_template.jinja").write_text(THINKING)
    for name, folder in found.items():
        found[name] = shutil.copytree(folder, top / name, ignore=shutil.ignore_patterns("*.safetensors"))
    return found


@pytest.fixture
def show(models, folder, capsys):
    """A function: name of a model, records, flags of train.py and of preview.py -> what is printed."""

    def shown(name, records, *flags):
        path = write(folder / "x.json", records)
        assert run_command(preview.run, ["--model", str(models[name]), "--data", path, *map(str, flags)]) == 0
        return capsys.readouterr().out

    return shown


# ------------------------------------------------------------------------------------------------------- rows

ROWS = {  # model, what the record has -> the row of y_w, by hand; y_l's has "dog" for "cat", "Tail" for "Fur"
    # 32 pixels in patches of 8: 4 x 4 image tokens. Bunny's template and the authors' prompt agree.
    ("bunny", "authors"): f"{SYSTEM} USER: <image> x 16\nWhat is it? ASSISTANT:[ A cat.<|endoftext|>]",
    ("llava", "plain"): "<s> USER: <image> x 16\nWhat is it? ASSISTANT:[ A cat.</s>]",
    # 48 x 32 pixels are scaled to 56 x 28, of which 28 x 28 are a token
    ("qwen2_5_vl", "plain"): "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><image> x 2<|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\n[A cat.<|im_end|>]",
    # the block is the template's own: each row has one, and where both answers reason it opens unscored
    ("thinking", "reasons"):
        "<|im_start|>user\n<|vision_start|><image> x 2<|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n[Fur.\n</think>\n\nA cat.<|im_end|>]",
}  # fmt: skip


@pytest.mark.parametrize("model, kind", ROWS)
def test_rows_are_shown_as_the_model_is_given_them(model, kind, show):
    """A wrong template, a second think block, a lost end or a scored prompt is seen here, or by nobody."""
    record = {"authors": authors(), "plain": RECORD, "reasons": RECORD | BOTH_REASON}[kind]
    printed = show(model, [record]).replace("\n  ", "\n")
    chosen = ROWS[model, kind]
    rejected = chosen.replace("cat", "dog").replace("Fur", "Tail")
    assert f"scored\n{chosen}\ny_l with m_w" in printed and f"scored\n{rejected}\ny_w with m_l" in printed
    assert "note:" not in printed and printed.count("[") == printed.count("]") == 2


def test_a_rejected_image_of_another_size_has_a_row_of_its_own(show, folder):
    """The third row is shown where it differs: its image has more tokens. 56 x 84 pixels are 2 x 3."""
    noise(3, (56, 84)).save(folder / "b.png")
    printed = show("qwen2_5_vl", [RECORD | {"rejected_images": ["b.png"]}])
    row = printed[printed.index("y_w with m_l") :]
    assert "<image> x 6<|vision_end|>What is it?" in row and "[A cat.<|im_end|>]" in row
    row = show("qwen2_5_vl", [RECORD])
    assert "the text of y_w with m_w" in row[row.index("y_w with m_l") :]


@pytest.mark.parametrize(
    "flags, third",
    [("--no-conditional --anchors none", False), ("--no-conditional --anchors image_rejected", True),
     ("--no-image", False), ("", True)],
)  # fmt: skip
def test_only_rows_that_are_trained_are_shown(flags, third, show):
    """DPO has no row of a rejected image. Someone who left a flag out sees it by this."""
    printed = show("bunny", [authors()], *flags.split())
    assert ("y_w with m_l" in printed, "m_l of this run: none" in printed) == (third, not third)
    assert ("<image> x 16" in printed) == (flags != "--no-image")


def test_a_row_that_is_cut_is_shown_cut(show):
    """Without its end-of-sequence the model learns never to stop."""
    record = authors(chosen="A cat on a mat. " * 9)
    whole = show("bunny", [record])
    n_tokens = int(whole.split("y_w with m_w: ")[1].split()[0])
    cut = show("bunny", [record], "--max-length", n_tokens - 1)
    assert (whole.count("<|endoftext|>]"), cut.count("<|endoftext|>]")) == (2, 1)
    assert f"y_w with m_w: {n_tokens - 1} tokens" in cut


NOTES = {  # what the model is asked with, and what the rows have there
    ("llava_onevision", "plain"): ("assistant\\n'", "assistant \\n'"),
    ("thinking", "plain"): ("<think>\\n'", "<think>\\n\\n</think>\\n\\n'"),
}


@pytest.mark.parametrize("model, kind", NOTES)
def test_a_prompt_unlike_the_templates_own_answers_is_said_once(model, kind, show):
    """What was trained is not what is asked for later, and every number is a little worse for no visible
    reason."""
    asked, trained = NOTES[model, kind]
    (note,) = [line for line in show(model, [RECORD] * 2).splitlines() if line.startswith("note:")]
    assert f"{asked}, these rows have" in note and note.endswith(trained)


def test_what_is_scored_is_green_on_a_terminal(show, monkeypatch):
    """Brackets would be lost among those of a text."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    printed = show("bunny", [authors(chosen="[A cat]")])
    assert "ASSISTANT:\033[32m [A cat]<|endoftext|>\033[0m" in printed


def test_data_do_not_command_the_terminal(show):
    """An escape sequence in a record could hide other rows, or clear the screen."""
    printed = show("bunny", [authors(chosen="A \x1b[2J\x9b2Jcat.\r\tx", id="\x1b]0;x")])
    assert not {*"\x1b\x9b\r\t"} & {*printed} and r"[ A \x1b[2J\x9b2Jcat.\r\tx<|endoftext|>]" in printed


def ids_shown(printed):
    return [line.split()[-1] for line in printed.splitlines() if line.startswith("---")]


def test_examples_are_the_runs_first_in_its_own_order(bunny, small, tmp_path, capsys):
    """Rows of other examples than the run's would say nothing about it. Here the run's loss notes what it
    sees: 5 of 7 examples, one of them held out."""
    seen, flags = [], ["--epochs", 1, "--seed", 3, "--limit", 5, "--eval-size", 1, "--batch-size", 2]

    def loss(*logps, batch, **options):
        if batch.keys[0][0] == 0:  # not held out
            seen.extend(batch.ids)
        return mdpo_loss(*logps, **options)

    argv = command(bunny, small, tmp_path / "out", *flags)
    assert run_command(preview.run, [*argv, "--rows", "3"]) == 0
    first = ids_shown(capsys.readouterr().out)
    assert train.main(argv, loss) == 0 and len(seen) == 4 and first == seen[:3]
    assert run_command(preview.run, ["--resume", str(tmp_path / "out"), "--rows", "99"]) == 0
    assert ids_shown(capsys.readouterr().out) == seen


NO_PREVIEW = {  # flags: what is said
    "--row 2": "--row",
    "--crop 0.5 0.2": "--crop: its minimum is above its maximum",
    "--data none.json": "no such file",
    "--to mine.png": "mine.png: already exists",
    "--to gone.png": "gone.png: already exists",
    "--to x.odd": "x.odd: must end in .png",
    "--to no/x.png": "cannot be written to",
}


@pytest.mark.parametrize("flags", NO_PREVIEW)
def test_a_preview_refuses_what_train_py_refuses_and_keeps_files(flags, models, folder, monkeypatch, capsys):
    """A mistyped flag must not show rows of other settings, nor a picture replace one of the user's."""
    monkeypatch.chdir(folder)
    Path("mine.png").write_text("mine")
    Path("gone.png").symlink_to("nowhere")
    base = ["--model", str(models["bunny"]), "--data", write(folder / "x.json", [authors()])]
    assert NO_PREVIEW[flags] in one_line_of(capsys, run_command(preview.run, [*base, *flags.split()]))
    assert Path("mine.png").read_text() == "mine" and not Path("nowhere").exists()


# ------------------------------------------------------------------------------------------------------ sheet


def plain(colour, path=None):
    image = Image.new("RGB", (64, 48), colour)
    return image.save(path) if path else image


def test_each_strategy_is_drawn_under_its_title(monkeypatch, tmp_path):
    """A user judges a strategy by its panel. Here every strategy makes a plain colour. An example's own
    rejected image is the run's, not the strategies'; `random` needs the images of the whole file."""
    seen = set()

    def making(colour):
        def make(image, rng, area, other):
            seen.add((image.size, rng.random()))
            return plain(colour if area == CROP else "blue")

        return make

    colours = {"crop": "lime", "random": "yellow", "moco": "purple"}
    monkeypatch.setattr(data, "STRATEGIES", {name: making(colour) for name, colour in colours.items()})
    for name, colour in ("a", "red"), ("b", "white"), ("own", "cyan"):
        plain(colour, tmp_path / f"{name}.png")
    record = RECORD | {"rejected_images": ["own.png"]}
    examples = read_examples(write(tmp_path / "x.json", [RECORD | {"image": "b.png"}, record]))
    run = data.Pairs(examples, seed=7, max_pixels=12)
    sheet = preview.contact_sheet(SimpleNamespace(seed=7, max_pixels=12), run, [(0, 1)])
    inside = range(70, sheet.width, 250)  # a pixel of each panel
    expected = ["red", "cyan", "lime", "blue", "yellow", "purple"]
    assert [sheet.getpixel((x, 100)) for x in inside] == [plain(name).getpixel((0, 0)) for name in expected]
    assert seen == {((4, 3), random.Random("7 0 1").random())}


# ----------------------------------------------------------------------------------------------- nothing lost


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(file, *rest, **options):
    Path(file).write_bytes(b"half")
    full_disk()


def draw_figure(argv):
    curve = {"chosen_curve": [0, 1], "image_accuracy_curve": [0, 1], "grounding": 1}
    miniature.draw({"0": dict.fromkeys(["base", *miniature.QUICK], curve)}, Path(argv[-1]))


FEW = "--device cpu --limit 2".split()
WRITERS = {"preview.png": (preview, []), "words.html": (words, FEW)}
FIGURES = {"curves.png": curves.run, "figure.png": draw_figure}  # by matplotlib, over the old ones


@pytest.fixture
def pyplot(monkeypatch):
    monkeypatch.setattr(curves, "read_log", lambda run: [{"step": 1, "loss": 1.5}])
    return pytest.importorskip("matplotlib.pyplot")


@pytest.mark.parametrize("name", WRITERS)
def test_half_a_page_never_stays(name, bunny, small, tmp_path, monkeypatch, capsys):
    """A disk that is full in the middle of a file: half a page, under a name that is then taken."""
    save = Image.Image.save

    def half_saved(image, file, *rest, **options):
        return (half_written if isinstance(file, Path) else partial(save, image))(file, *rest, **options)

    monkeypatch.setattr(Image.Image, "save", half_saved)
    monkeypatch.setattr(Path, "write_text", half_written)
    script, flags = WRITERS[name]
    argv = ["--model", str(bunny), "--data", small, *flags, "--to", str(tmp_path / name)]
    message = one_line_of(capsys, run_command(script.run, argv))
    assert "cannot be written to" in message and "No space left" in message and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_replaced_when_the_new_one_is_whole(name, pyplot, tmp_path, monkeypatch, capsys):
    """Curves are drawn again and again while a run goes on. A full disk must not cost the last good ones."""
    argv = ["a run", "--to", write(to := tmp_path / name, "the old one")]
    with monkeypatch.context() as patch:
        patch.setattr(pyplot.Figure, "savefig", lambda figure, file, **options: half_written(file))
        message = one_line_of(capsys, run_command(FIGURES[name], argv))
    assert "cannot be written to" in message and "No space left" in message
    assert to.read_text() == "the old one" and [*tmp_path.iterdir()] == [to]
    assert not run_command(FIGURES[name], argv) and Image.open(to).format == "PNG"
    assert [*tmp_path.iterdir()] == [to]


def test_a_study_needs_no_git_and_keeps_folders_that_are_not_its_own(tmp_path, monkeypatch):
    """Without git a study of hours ended before its results were written. A folder of the user's went."""
    monkeypatch.setattr(miniature.tiny_bunny, "write_base", lambda path, *rest, **options: path.mkdir())
    monkeypatch.setattr(miniature.shapes, "write_pairs", lambda path, *rest: write(path / "silkie.json", []))
    notes = write(tmp_path / "seed-7" / "unfinished" / "notes.txt", "mine")
    miniature.prepare_seed(tmp_path, 7)
    names = {path.name for path in (tmp_path / "seed-7").iterdir()}
    assert names == {"unfinished", "model", "data", "held_out", "log.txt"} and Path(notes).exists()
    pool = nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(miniature, "ProcessPoolExecutor", lambda *rest: pool)
    monkeypatch.setattr(miniature, "run_method", lambda *rest: {"grounding": 0.5})
    monkeypatch.setenv("PATH", "")
    assert run_command(miniature.run, ["--out", str(tmp_path), *"--seeds 7 --methods mDPO".split()]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["summary"]["mDPO"]["grounding"] == [0.5, 0.0]


def test_minimal_takes_a_new_folder_alone(tmp_path):
    """It would write its adapter over another run's, and its model card over a README."""
    write(tmp_path / "out" / "README.md", "mine")
    with pytest.raises(SystemExit, match="out: already exists"):
        minimal.main("no model", "no data", str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


# ----------------------------------------------------------------------------------------------- without Unix

IMPORT_ALL = """
import importlib, os, signal, sys
import peft, tqdm, torch, transformers  # what they need of a system is their own affair
try:
    import trl
except ImportError:
    pass
sys.modules |= dict.fromkeys(("fcntl", "grp", "posix", "pwd", "resource", "termios", "tty"))
for name in {*dir(signal)} - set(sys.argv[2].split(",")):
    if name.startswith("SIG") and name not in ("SIG_DFL", "SIG_IGN"):
        delattr(signal, name)
for name in ("fork", "getpgid", "killpg", "mkfifo", "setsid", "sched_getaffinity"):
    delattr(os, name)
for name in sys.argv[1].split(","):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "trl":  # which is one package more
            raise
"""
OF_WINDOWS = "SIGABRT,SIGBREAK,SIGFPE,SIGILL,SIGINT,SIGSEGV,SIGTERM"


@pytest.mark.skipif(os.name != "posix", reason="takes away what others have not")
def test_all_modules_import_without_what_only_unix_has():
    """On Windows a command that imports `fcntl` or names SIGHUP dies before its first line."""
    files = [
        file.relative_to(ROOT).with_suffix("") for file in [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]
    ]
    names = [".".join(file.parts) for file in files if not file.name.startswith(("test_", "__"))]
    if find_spec("trl") is None:  # which two of them need
        names = [name for name in names if not name.startswith("examples.trl_")]
    assert {"train", "examples.preview", "examples.throughput"} <= {*names}
    argv = [sys.executable, "-c", IMPORT_ALL, ",".join(names), OF_WINDOWS]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    child = subprocess.run(argv, check=False, cwd=ROOT, **options)
    assert child.returncode == 0, child.stderr
