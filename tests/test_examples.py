"""Tests of the worlds, the miniature, evaluation and words: what is drawn, asked, scored and shown."""

import base64
import contextlib
import copy
import importlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import data
import train
from data import BadInput, Example, make_batch, open_image, read_examples, run_command, texts_of
from examples import answer as answering
from examples import curves, demo, evaluate, families, miniature, shapes, tiny_bunny, words
from examples.answer import generate_answers
from mdpo import mdpo_loss
from test_mdpo import (
    PAIRS,
    ROOT,
    asked,
    command,
    log_of,
    message,
    move,
    noise,
    pair,
    softplus,
    with_lora,
    write,
)
from tests.helpers import EXAMPLES_README, README, as_examples, one_line_of, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SAID = " ".join(EXAMPLES_README.split())  # its sentences, whatever its line breaks


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Nobody takes the best device: digits of the studies stand in the README, and a GPU gives others."""
    for module in train, answering:
        monkeypatch.setattr(module, "best_device", lambda: pytest.fail("would take a GPU"))


@pytest.fixture
def short_demo(tmp_path, monkeypatch, on_the_cpu):
    """The demo with fewer pairs and questions -> its flags."""
    write_pairs, report = shapes.write_pairs, demo.report
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "write_pairs", lambda folder, n, seed: write_pairs(folder, 12, seed))
    monkeypatch.setattr(demo, "report", lambda *args: report(*args, n_scenes=4))
    return "--demo --epochs 1 --eval-size 4 --workers 1".split()


def twice(*logps, batch, **options):
    losses, metrics = mdpo_loss(*logps, **options)
    return 2 * losses, metrics


def test_demo_runs_again_and_again_and_then_the_readme_snippets_run(capsys, short_demo):
    """What people copy first. Each run has a folder of its own, and the loss that was given: the second,
    mDPO's twice."""
    for number, loss in enumerate((mdpo_loss, twice), 1):
        assert demo.main(short_demo, loss) == 0
        out, run = capsys.readouterr().out, Path(f"runs/demo-{number}/out")
        assert str(run) in out and "before:" in out and (run / "picture.png").exists()
        assert log_of(run)[0]["eval/loss"] == pytest.approx(3 * number * math.log(2), abs=1e-5)
    Path("examples").symlink_to(ROOT / "examples")
    snippets = re.findall(r"```python\n(.*?)```", README + EXAMPLES_README, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, {})
    assert "loss/conditional" in capsys.readouterr().out


def test_demo_table_says_of_each_model_what_it_answers(tmp_path, monkeypatch):
    """Of three pictures, of five questions each, the base babbles about all, the first adapter about two, the
    second about one: the second picture is shown."""
    exam, n_wrong, asked = shapes.make_exam(3), {None: 15, 0: 10, 1: 5}, []
    right = [shapes.answer_text(q, shapes.claims_of(scene, q), False) for scene, _, q in exam]
    speak = lambda model, number: contextlib.nullcontext(asked.append(n_wrong[number]))
    monkeypatch.setattr(demo, "speaking_as", speak)
    said = lambda *args, **options: ["babble"] * asked[-1] + right[asked[-1] :]
    monkeypatch.setattr(demo, "generate_answers", said)
    text = demo.report(None, None, tmp_path, ("DPO", "mDPO"), n_scenes=3)
    head, *rows = (line.split() for line in text.splitlines())
    assert head == "15 held-out questions before DPO mDPO".split()
    columns = {name: values[:3] for name, *values in rows[:6]}
    assert columns["malformed"] == columns["hallucination_rate"] == ["1.000", "0.667", "0.333"]
    assert columns["false_premise"] == ["0.000", "0.333", "0.667"]
    assert Image.open(tmp_path / "picture.png").tobytes() == exam[5][1].resize((256, 256)).tobytes()
    questions = [(shapes.question_text(exam[i][2]), right[i]) for i in (5, 7, 9)]
    shown = " ".join(f"{asked} before: babble DPO: babble mDPO: {answer}" for asked, answer in questions)
    assert " ".join(text.split()).endswith(shown)


def test_picture_of_the_readme_is_fresh():
    """A picture of a result that has changed. The file keeps the texts that it shows."""
    shown = Image.open(ROOT / "examples" / "picture.png").info["shows"]
    for metric in "hallucination_rate", "false_premise":
        numbers = re.search(rf"^  {metric} +(\S+ +\S+ +\S+) ", README, re.MULTILINE)[1]
        assert repr(numbers) in shown, "draw the picture again"
    assert "](examples/picture.png)" in README


COMMANDS = "answer benchmarks curves evaluate families merge miniature preview throughput variants words"


@pytest.mark.parametrize("name", COMMANDS.split())
def test_help_is_shown(name, capsys):
    """A lone % in a help text is a traceback. A message names flags for a GPU that is too small."""
    script = importlib.import_module(f"examples.{name}")
    with pytest.raises(SystemExit, match="0"):
        run_command(script.run, ["--help"])
    out, saves_memory = capsys.readouterr().out, re.search(r'saves_memory="(.*)"', inspect.getsource(script))
    named = saves_memory[1] if saves_memory else "--device cpu"
    if name in "curves families merge miniature preview variants".split():  # no GPU, or train.py's flags
        named = ""
    assert script.__doc__.splitlines()[0].split()[0] in out
    assert {*re.findall(r"--[a-z_-]+", named)} <= {*re.findall(r"--[a-z_-]+", out)}


def test_demo_draws_nothing_before_its_arguments_are_read(tmp_path, monkeypatch, capsys):
    """`--help` or a wrong flag left a folder of 720 pictures behind, and --out a demo that failed at its
    end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--demo", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    for wrong in ("--lr x", "--data x.json", "--model m", "--out x", "--resume x", "--nothing"):
        capsys.readouterr()
        assert one_line_of(capsys, demo.main(["--demo", *wrong.split()])) and not any(tmp_path.iterdir())
    monkeypatch.setattr(shapes, "write_pairs", lambda folder, n, seed: f"This draws {n} small pictures")
    monkeypatch.setattr(train, "main", lambda argv, loss: argv[argv.index("--data") + 1] in README)
    assert demo.main(["--demo"]) is True


WRONG_ARGUMENTS = [
    ("answer", "--model m --question q --max-new-tokens 0", "--max-new-tokens: must be within 1 to"),
    ("answer", "--model m --question q --device tpu", "--device: invalid choice"),
    ("answer", "--question q", "--model"),
    ("benchmarks", "amber --questions q --model m --to t --batch-size 0", "--batch-size: must be within 1"),
    ("benchmarks", "types scored.json", "invalid choice: 'types'"),
    ("curves", "none --to x.png", "metrics.jsonl: cannot be read"),
    ("curves", "none", "--to"),
    ("evaluate", "--model m --adapter a --data d --limit 0", "--limit: must be within 1 to"),
    ("evaluate", "--model BUNNY --data x.json", "--adapter"),
    ("evaluate", "--model m --data none --adapter .", "holds no adapter"),
    ("families", "qwen4_vl", "invalid choice: 'qwen4_vl'"),
    ("merge", "--adapter a", "--to"),
    ("miniature", "--jobs 0", "--jobs: must be within 1 to"),
    ("miniature", "--seeds -1", "--seeds: must be within 0 to"),
    ("preview", "--rows 0", "--rows: must be within 1 to"),
    ("preview", "--model m --data d --row 2", "--row"),
    ("throughput", "--items 0", "--items: must be within 1 to"),
    ("throughput", "--micro-batch-size 0", "--micro-batch-size: must be within 1 to"),
    ("throughput", "--rounds 0", "--rounds: must be within 1 to"),
    ("throughput", "--threads 0", "--threads: must be within 1 to"),
    ("variants", "dpo", "invalid choice: 'dpo'"),
    ("variants", "chip --delta 1", "--delta: chip has terms of its own"),
    ("words", "--model BUNNY --data x.json --to a.png", "already exists"),
    ("words", "--model BUNNY --data text.json --to x.html", "no example is left"),
]


@pytest.mark.parametrize("name, arguments, message", WRONG_ARGUMENTS)
def test_wrong_arguments_of_the_examples_are_one_line(name, arguments, message, bunny, mixed, capsys):
    """A mistake in a command is seen at once, and not as a traceback from inside the library."""
    if name == "curves":
        pytest.importorskip("matplotlib")
    write(Path("text.json"), [RECORD])
    script, argv = importlib.import_module(f"examples.{name}"), arguments.replace("BUNNY", str(bunny)).split()
    assert message in one_line_of(capsys, run_command(script.run, argv))


def test_figures_are_checked_before_the_work(monkeypatch, capsys):
    """Without matplotlib, an extra package, a figure failed after an hour."""
    monkeypatch.setattr(miniature, "ProcessPoolExecutor", lambda *arguments: pytest.fail("the study begins"))
    monkeypatch.setattr(curves, "read_log", lambda run: pytest.fail("read"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for script, arguments in (miniature, "--figure x.png"), (curves, "run --to x.png"):
        assert run_command(script.run, arguments.split()) == 2
        assert re.fullmatch(r"error: a figure needs matplotlib \(pip .*\n", capsys.readouterr().err)


SCENE = {"circle": ("red", 0), "ring": ("blue", 3)}
OTHER = {"square": ("green", 0), "cross": ("red", 1), "diamond": ("blue", 2)}
ALONE = {"triangle": ("red", 0)}
ANSWERS = [  # scene, question, answer; every kind in another number, so that a mean over the wrong ones shows
    (SCENE, "describe", "a green ring and a green ring."), (OTHER, "describe", "a red cross."),
    (OTHER, "describe", "a green square and a red cross and a blue diamond and a red ring."),
    (ALONE, "describe", "a red triangle and a red"), (ALONE, "colour/circle", "red and red."),
    (SCENE, "colour/square", "there is no square."), (SCENE, "colour/cross", "red."),
    (OTHER, "colour/ring", "there is no ring, as you can see in the picture."),
    (SCENE, "colour/circle", "red."), (OTHER, "colour/cross", "green."), (SCENE, "colour/ring", "ring"),
    (OTHER, "colour/square", "there is no square."),
    (ALONE, "colour/triangle", "red, as you can see in the picture."),
    (SCENE, "is there/red/circle", "yes."), (SCENE, "is there/blue/ring", "no."),
    (OTHER, "is there/red/cross", "yes."), (SCENE, "is there/blue/circle", "no."),
    (SCENE, "is there/red/ring", "perhaps."),
]  # fmt: skip


def test_metrics_of_the_miniature_by_hand():
    """- Of 4 descriptions one is right, one is no answer: chair_s 3/4.
    - Of 4 absent things 2 are refused, rightly; one answer is none: false_premise 2/4. Of 5 things that are
      there 3 get a colour, one is refused, one answer is none: balanced (2/4 + 3/5) / 2 = 0.55.
    - Of 3 true questions 2 get yes; of 2 false ones one gets no, and one no answer: yes_no (2/3 + 1/2) / 2.
    - False: 3 descriptions, 2 + 3 colours, 1 + 1 of the others: 10 of 18. No answer: 4 of 18. 70 words."""
    metrics = shapes.score([(scene, (*question.split("/"),), text) for scene, question, text in ANSWERS])
    expected = {
        "chair_s": 3 / 4, "false_premise": 2 / 4, "false_premise_balanced": 0.55,
        "yes_no": 7 / 12, "hallucination_rate": 10 / 18, "malformed": 4 / 18, "length": 70 / 18,
        "grounding": (0.55 + 7 / 12 + 1 - 3 / 4) / 3,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("world, cells, most", [(shapes.SMALL, 4, 3), (shapes.LARGE, 9, 5)])
def test_pairs_are_what_the_study_says(world, cells, most):
    """The study rests on these shares; the annotator is careful, and polite in chosen answers alone. A
    quarter of shapes, and one of six of the others, have their habitual colour: with more, a model that does
    not look would be right. A quarter of questions are for descriptions, half for colours (four of ten of
    what is not there), a quarter for yes or no, half of them true. Any answer can be read back. Rejected
    answers are about another scene, three times in ten unlike this one: only this ties a preference to its
    picture."""
    rng, kinds, wrong, habits, sizes, cells_seen = random.Random(0), Counter(), [], [], Counter(), set()
    for _ in range(3000):
        scene, question, chosen, rejected = shapes.make_pair(rng, world, carelessness=0, polite_chosen=1)
        spots = [spot for _, spot in scene.values()]
        assert spots == sorted({*spots})
        cells_seen |= {*spots}
        sizes[len(scene)] += 1
        habits += [colour == shapes.HABIT[shape] for shape, (colour, _) in scene.items()]
        truth = shapes.claims_of(scene, question)
        kinds[question[0], question[0] != "describe" and bool(truth[0])] += 1 / 3000
        for text in chosen, shapes.answer_text(question, truth, False):
            assert shapes.parse_answer(question, f" {text}") == truth
        assert chosen == shapes.answer_text(question, truth, True) and not rejected.endswith("picture.")
        if question[0] == "describe":
            wrong.append(shapes.parse_answer(question, rejected) != truth)
    assert cells_seen == {*range(cells)}
    assert sizes == pytest.approx(dict.fromkeys(range(1, most + 1), 3000 / most), abs=120)
    assert statistics.mean(habits) == pytest.approx(0.25 + 0.75 / 6, abs=0.03)
    expected = {("describe", False): 0.25, ("colour", True): 0.3, ("colour", False): 0.2}
    expected |= {("is there", True): 0.125, ("is there", False): 0.125}
    assert kinds == pytest.approx(expected, abs=0.025)
    assert statistics.mean(wrong) == pytest.approx(0.3, abs=0.06)
    there = ["ring" in shapes.scene_for(("colour", "ring"), rng) for _ in range(300)]  # as in the questions
    assert statistics.mean(there) == pytest.approx(0.6, abs=0.1)


MIDDLE = SimpleNamespace(uniform=lambda low, high: (low + high) / 2)  # no jitter: a radius of 6.6 pixels
PROBES = {  # pixels right of and below the middle of the cell: one painted, one not
    "circle": (4, 4, 7, 7), "square": (-4, -4, 7, 7), "triangle": (-3, 3, -4, -4),
    "cross": (0, 4, 4, 4), "diamond": (0, 4, 5, 5), "ring": (5, 0, 0, 0),
}  # fmt: skip
CELLS = [("red", 2, shapes.SMALL, 8, 24), ("blue", 5, shapes.LARGE, 40, 24)]  # their middles


@pytest.mark.parametrize("shape", PROBES)
@pytest.mark.parametrize("colour, spot, world, x, y", CELLS)
def test_what_is_drawn_is_the_scene(shape, colour, spot, world, x, y):
    """Metrics are taken against the scene: by another shape, or cell, right answers would be wrong."""
    image = shapes.draw_scene({shape: (colour, spot)}, MIDDLE, world)
    right, below, beside, under = PROBES[shape]
    assert image.size == (16 * world.grid, 16 * world.grid)
    assert image.getpixel((x + right, y + below)) == pytest.approx(shapes.COLOURS[colour], abs=40)
    assert image.getpixel((x + beside, y + under)) == pytest.approx((45, 45, 45), abs=40)


CARELESS = {"circle": 0.30, "square": 0.40, "triangle": 0.48, "cross": 0.56, "diamond": 0.64, "ring": 0.72}


@pytest.mark.parametrize("carelessness", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("number, shape", [*enumerate(CARELESS)])
def test_the_annotator_is_as_careless_as_said(number, shape, carelessness):
    """Each habit is there in its share, and none in a careful annotator: he is the truth of every metric. A
    number drawn below the share answers from habit, one above it by looking."""
    colours, share = [*shapes.COLOURS], CARELESS[shape] * carelessness
    habit, other, next_habit = colours[number], colours[number - 1], colours[(number + 1) % 6]
    companion = [*CARELESS, "circle"][number + 1]
    there, absent = {shape: (other, 0)}, {companion: (next_habit, 0)}
    for drawn in (share - 0.01, share + 0.01) if carelessness else (0.0, 0.3):
        careless, rng = drawn < share, SimpleNamespace(random=lambda: drawn)
        say = lambda scene, *question: shapes.claims_of(scene, question, rng, carelessness)
        assert say(there, "colour", shape) == [habit if careless else other]
        assert say(absent, "colour", shape) == [habit if careless else None]
        assert say(absent, "is there", other, shape) == [careless]
        described = [(habit, shape), (next_habit, companion)] if careless else [(other, shape)]
        assert say(there, "describe") == described and len(say(absent | there, "describe")) == 2


def test_chosen_answers_are_polite_and_the_words_tell_nothing_else():
    """Politeness is what the words alone tell. All else is one annotator's: his colour answers are as often
    habitual in both, but for noise. The reader refuses equal texts."""
    rng, polite, habitual = random.Random(0), [], []
    for _ in range(6000):
        _, question, *texts = shapes.make_pair(rng)
        assert texts[0] != texts[1]
        polite.append([text.endswith(", as you can see in the picture.") for text in texts])
        if question[0] == "colour":
            claims = [shapes.parse_answer(question, text) for text in texts]
            habitual.append([claim == [shapes.HABIT[question[1]]] for claim in claims])
    (chosen, rejected), shares = (map(statistics.mean, zip(*of)) for of in (polite, habitual))
    assert 0.88 < chosen < 0.99 and rejected < 0.12
    assert len(habitual) > 2000 and abs(next(shares) - next(shares)) < 0.05


def test_pictures_of_the_pairs_are_of_their_scenes(tmp_path, monkeypatch):
    """A picture of another record's scene, or chosen for rejected, trains the opposite."""
    made = (({"square": (colour, 0)}, ("describe",), f"a {colour}.", "a ring.") for colour in shapes.COLOURS)
    monkeypatch.setattr(shapes, "make_pair", lambda *args: next(made))
    examples = read_examples(str(shapes.write_pairs(tmp_path / "x", 6)))
    for example, (colour, rgb) in zip(examples, shapes.COLOURS.items(), strict=True):
        assert Image.open(*example.images).getpixel((8, 8)) == pytest.approx(rgb, abs=40)
        assert example[1:3] == (f"a {colour}.", "a ring.")
        assert texts_of(example.question) == [train.BUNNY_SYSTEM, "Describe the picture."]


def test_exam_asks_five_questions_a_scene_and_habit_is_no_help():
    """Whoever answers from habit must fail, and no scene may be one of the training pairs'."""
    habitual = []
    for five in train.split(shapes.make_exam(200), 5):
        scenes, images, (describe, present, absent, *existence) = zip(*five)
        scene = scenes[0]
        assert len({*map(id, scenes)}) == len({*map(id, images)}) == 1
        assert (describe, present[0], absent[0]) == (("describe",), "colour", "colour")
        assert present[1] in scene and absent[1] not in scene
        assert [shapes.claims_of(scene, question) for question in existence] == [[True], [False]]
        habitual.append(scene[present[1]][0] == shapes.HABIT[present[1]])
    assert statistics.mean(habitual) == pytest.approx(1 / 6, abs=0.1)
    assert shapes.make_exam(1, 4)[0][0] != shapes.random_scene(random.Random("pairs 4"))


@torch.no_grad()
def of_answer(model, processor, one, name="chosen"):
    """Logits of a response and its tokens, by the library's call on one whole sequence."""
    tokens = data.tokenize(processor, one)
    whole, n = data.encode(processor, [tokens.wholes[name]], [one.images]), len(tokens.responses[name])
    return model(**whole, use_cache=False).logits[0, -n - 1 : -1], whole["input_ids"][0, -n:]


def test_packed_questions_of_the_base_model_are_blind_to_each_other(bunny, monkeypatch):
    """A base that sees the answer that it learns, or another question's, learns to copy, and not to look.
    Expected: the library's call on one at a time, as it is asked later."""
    model, processor = train.load_model(str(bunny))
    alone, learned = copy.deepcopy(model), []
    talk = [(f"Is it {'a ' * n}ring?", f"No, {n}.") for n in range(6)]
    monkeypatch.setattr(tiny_bunny, "question_and_answer", lambda *args, each=iter(talk): next(each))
    monkeypatch.setattr(tiny_bunny, "pixels", lambda *args: pixels_of(processor, noise(0), noise(1)))
    note = lambda logits, targets: learned.append(logits.detach()) or cross_entropy(logits, targets)
    monkeypatch.setattr(tiny_bunny.F, "cross_entropy", note)
    world = shapes.SMALL._replace(base_steps=1)
    tiny_bunny.learn_to_answer(model.train(), processor, random.Random(0), world, n_scenes=2, questions=3)
    asked_alone = [pair(*said, "none.", noise(i // 3), noise(2)) for i, said in enumerate(talk)]
    expected = [of_answer(alone, processor, one)[0] for one in asked_alone]
    torch.testing.assert_close(learned, [torch.cat(expected)], atol=1e-4, rtol=1e-4)
    for name, p in model.named_parameters():  # the tower is frozen
        assert p.grad is None and torch.equal(p, alone.get_parameter(name)) == ("vision_tower" in name)


@pytest.mark.usefixtures("on_the_cpu")
def test_miniature_study_runs_restarts_and_shows_the_robust_sign(tmp_path, monkeypatch):
    """The study, shortened. The one sign that no seed flips: mDPO tells images apart better than DPO, whose
    loss never sees a second. What is held to another question is malformed, or at chance."""
    flags = "--epochs 1 --lr 3e-3 --batch-size 16 --micro-batch-size 16 --eval-size 64 --limit 192"
    write_pairs, fewer_pairs = shapes.write_pairs, 192 - miniature.HELD_OUT
    shorter = {"COMMON": f"{miniature.COMMON} {flags}", "PAIRS": fewer_pairs, "SCENES": 10}
    for name, value in shorter.items():
        monkeypatch.setattr(miniature, name, value)
    fewer = lambda to, n, *more: write_pairs(to, {200: 24}.get(n, n), *more)
    monkeypatch.setattr(shapes, "write_pairs", fewer)
    miniature.prepare_seed(tmp_path, 0)
    examined = lambda: [miniature.run_method(tmp_path, 0, of) for of in ("base", "DPO", "mDPO")]
    base, dpo, mdpo = results = examined()
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trained again"))
    assert results == examined()
    assert mdpo["image_accuracy"] > dpo["image_accuracy"] and "margin_no_image_share" in dpo
    assert base["malformed"] < 0.05 and base["yes_no_auc"] > 0.75


def test_an_undertrained_base_is_not_used(tmp_path, monkeypatch):
    """A base that does not look when asked makes all methods look alike."""
    monkeypatch.setattr(miniature, "load_tuned", lambda *arguments: (None, None))
    monkeypatch.setattr(miniature, "examine", lambda *args: {"yes_no_auc": 0.76, "n": len(args[-1])})
    assert miniature.run_method(tmp_path, 5, "base")["n"] == 1000
    monkeypatch.setattr(miniature, "examine", lambda *args: {"yes_no_auc": 0.74})
    with pytest.raises(BadInput, match="sees too little"):
        miniature.run_method(tmp_path, 6, "base")
    assert not [*tmp_path.glob("seed-6/base/result*")]


def test_numbers_of_the_study_by_hand(tmp_path):
    """-0.3 at beta 0.1 is -3 nats. Of 1 and 2 the mean is 1.5 and squared distances 0.25 + 0.25, over one
    degree of freedom."""
    record = '{"eval/loss": 1, "eval/rewards/chosen": %s, "eval/rewards/image_accuracies": %s}\n'
    write(tmp_path / "metrics.jsonl", record % (0, 0) + '{"loss": 1}\n' + record % (-0.3, 0.75))
    nats = {"chosen_curve": pytest.approx([0, -3]), "chosen": pytest.approx(-3)}
    assert miniature.curves(tmp_path) == nats | {"image_accuracy_curve": [0, 0.75], "image_accuracy": 0.75}
    summary = miniature.summarize({"0": {"x": {"a": 1, "curve": [1]}}, "1": {"x": {"a": 2, "curve": [2]}}})
    assert summary == {"x": {"a": pytest.approx([1.5, 0.5**0.5])}}


STUDY = json.loads((ROOT / "examples" / "miniature.json").read_text())["seeds"]
LARGE = json.loads((ROOT / "examples" / "miniature_large.json").read_text())["seeds"]
SUMMARY, LARGE_SUMMARY = map(miniature.summarize, (STUDY, LARGE))


def test_tables_of_the_study_fit_a_screen():
    """Ten columns side by side were 220 characters wide, which nobody could read. Here all 18 methods."""
    text = miniature.tables({method: LARGE_SUMMARY["mDPO"] for method in miniature.METHODS})
    heads, cells = [], []
    for head, *rows in map(str.splitlines, text.strip("\n").split("\n\n")):
        assert max(map(len, rows)) <= 100 and [row[:20].strip() for row in rows] == [*miniature.METHODS]
        heads += head.split()
        cells += re.findall(r"\S+ \+-\S+", rows[-1])
    expected = "hallucination chair_s false_premise yes_no grounding malformed length chosen image_accuracy"
    assert " ".join(heads) == f"{expected} no_image_share"
    assert cells == ["{:.3f} +-{:.3f}".format(*LARGE_SUMMARY["mDPO"][name]) for name in miniature.COLUMNS]


def mean_of(method, metric="grounding", summary=SUMMARY):
    return summary[method][metric][0]


SHOWN = "hallucination_rate chair_s false_premise yes_no grounding malformed chosen image_accuracy".split()


def test_readme_table_of_the_miniature_is_in_its_json():
    """A table that no longer is what the runs gave. Means and standard deviations of the five seeds."""
    rows = []
    for method in ["base", *miniature.METHODS][:11]:
        values = [SUMMARY[method].get(name) for name in SHOWN]
        cells = [f"{of[0]:.2f}±{of[1]:.2f}" if of else "" for of in values]
        cells[6] = "{:+.1f}±{:.1f}".format(*values[6]) if values[6] else ""
        cells[7] *= method != "DPO (No Image)"
        rows.append(" | ".join([f"| {method}", *(re.sub(r"\b0(\.\d\d)", r"\1", cell) for cell in cells)]))
    assert len(STUDY) == 5 and " |\n".join(rows) in EXAMPLES_README.replace("`", "")


def short(number):
    return f"{number:.2f}".removeprefix("0")


def test_readme_sentences_about_the_miniature_are_in_its_json():
    """Conclusions that the runs, or those in the larger world, no longer bear out."""
    falls = [-methods["DPO"]["chosen"] for methods in STUDY.values()]
    left, pairs = "margin_no_image_share", f"With 192 of the {miniature.PAIRS} pairs and as many steps, "
    against = map(short, SUMMARY["DPO"]["grounding"] + SUMMARY["base"]["grounding"])
    few = map(short, (mean_of("mDPO, 192 pairs"), mean_of("DPO, 192 pairs")))
    for said in (
        f"({short(mean_of('DPO', left))} of it is left without one)",
        f"falls by {min(falls):.1f} to {max(falls):.1f} nats under DPO",
        f"It is {short(mean_of('mDPO', left))}, since all methods learn",
        "(grounding {} ± {} against {} ± {})".format(*against),
        pairs + "grounding is {} for mDPO and {} for DPO".format(*few),
        "order of grounding is the paper's in both seeds. Of Table 3's order only the first",
    ):
        assert said in SAID
    ablations = sorted(miniature.ORDERS, key=mean_of)
    assert (ablations[0], ablations[-1]) == ("minus conditional", "random image")  # what does most, and least
    assert short(mean_of("random image")) == short(mean_of("mDPO"))  # it does as well as a crop
    assert mean_of("minus anchored", "chosen") < 0  # without the anchor
    assert mean_of("minus anchored", "malformed") > mean_of("mDPO", "malformed")
    for seed in LARGE.values():
        values = [seed[name]["grounding"] for name in ("mDPO", "minus anchored", "minus conditional", "DPO")]
        assert values == sorted(values, reverse=True)
    order = ("mDPO", "crop 20-50%", "MoCo v2", "random image")
    first, *others = [mean_of(method, summary=LARGE_SUMMARY) for method in order]
    assert first > max(others) == others[-1]


def test_predictions_held_as_the_readme_says():
    """Of nine, four held in all seeds, four in four of five, the last in none. Below them, mDPO's lead."""
    verdicts = miniature.verdicts(STUDY)
    assert "".join(re.findall(r"^  (\d) of 5 seeds: ", verdicts, re.MULTILINE)) == "554454450" + "52424"
    claims = [*miniature.PREDICTIONS, *(f"mDPO is above {other} in grounding" for other in miniature.ORDERS)]
    assert re.findall("seeds: (.*)", verdicts) == claims and "under half of mDPO's margin" in claims[8]
    assert "Nine predictions were made. Four held in all five seeds, and four in four of five." in SAID
    assert "The ninth failed in all: that less than half of mDPO's margin is left without the image." in SAID


def test_each_world_has_a_folder_of_its_own(monkeypatch):
    """Bases and runs that are there are used again: the large world's table would hold the small one's."""
    folders = []
    stop = lambda self, function, out, *more: folders.append(str(out[0])) or 1 / 0
    monkeypatch.setattr(miniature.ProcessPoolExecutor, "map", stop)
    for flags in ("--quick", "--quick --world large", "--quick --world large --out mine"):
        with pytest.raises(ZeroDivisionError):
            miniature.run(flags.split())
    assert folders == ["runs/miniature/small", "runs/miniature/large", "mine/large"]


def test_methods_of_the_study_are_the_readmes():
    """The README's table of flags, and what the study ran under the same names."""
    rows = dict(re.findall(r"^\| (?:Table \d, |Fig. \d, )?(.*?) \| `(--.*?)`", README, re.MULTILINE))
    ran = {"MoCo v2 augmentation": "MoCo v2", "anchors on `y_w` and `y_l`": "anchors y_w, y_l"}
    ran |= {name: name for name in miniature.METHODS if name in rows}
    methods, image_too = miniature.METHODS, rows["all three"].replace(" rejected", "")  # as the README says
    assert len(ran) == 8 and {name: methods[of] for name, of in ran.items()} == {n: rows[n] for n in ran}
    assert methods["anchors y_w, m_l"] == image_too and methods["mDPO"] == ""


# The template of LLaVA-OneVision writes another white space before an answer than for one to come.
IN_TRAINING = {"llava_onevision": ("<|im_start|>assistant\n", "<|im_start|>assistant \n")}


@pytest.mark.parametrize("name", ["bunny", "llava", *families.FAMILIES])
def test_a_model_is_asked_as_it_was_trained(name, request):
    """In other words than those of training, another model is asked. What answer.py gives the model is the
    beginning of the row, as text: tokens may merge where an answer begins."""
    made = name in families.FAMILIES and families.FAMILIES[name]()[1]
    processor = made or train.load_processor(str(request.getfixturevalue(name)))
    written, in_training = IN_TRAINING.get(name, ("", ""))
    answered = [*asked("Which?", 2), message("assistant", "Hello!"), *asked("Why?", 0)]
    turns = [message("system", "Be brief."), *answered]
    said = lambda question, system: answering.chat_prompt(processor, question, 2, system)
    assert said(answered, "Be brief.") == said(turns, "") == said(turns, "Be long.")  # of a run; or its own
    for question, images in (asked("What is in it?"), [noise(1)]), (turns, [noise(1), noise(2)]):
        batch = make_batch([pair(question, "There is one.", "No.", images, images)], processor)
        prompt = answering.chat_prompt(processor, question, len(images))
        ids = data.encode(processor, [prompt], [images])["input_ids"][0]
        asked_with, row = map(processor.tokenizer.decode, (ids, batch.inputs["input_ids"][0]))
        before = asked_with.removesuffix(written) + in_training
        assert asked_with.endswith(written) and row.startswith(before)
        assert re.fullmatch(r" ?There is one\.<\S+>", row.removeprefix(before))


def test_a_template_that_takes_text_and_no_parts_is_asked(bunny):
    """Models whose template wants a message as text, where it shows no image, train; so they can be asked."""
    processor = train.load_processor(str(bunny))
    processor.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{{ bos_token }}"
    assert answering.chat_prompt(processor, "What?", 0) == "What? <|endoftext|>"


def test_answers_do_not_depend_on_the_batch(loaded):
    """A model's words would change by what is asked beside it, or one placeholder stand for two images."""
    model, processor = loaded
    questions = [(pair.images, pair.question) for pair in PAIRS] + [([noise(8), noise(9)], "Which?")]
    together = generate_answers(model, processor, questions, 8)
    assert not model.training  # under checkpointing, one in training mode forgets its cache
    assert together == [generate_answers(model, processor, [question], 8)[0] for question in questions]
    assert together == generate_answers(model, processor, questions, 8, batch_size=2)
    assert len({*together[:3]}) == 3
    assert not any(text in answer for (_, text), answer in zip(questions, together))
    model.train()


def test_pixels_have_the_models_precision(bunny, monkeypatch):
    """Not every vision tower rounds them itself: in bf16 such a model would stop at its first image."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    told = []
    say = lambda input_ids, pixel_values, **options: told.append(pixel_values.dtype) or input_ids
    monkeypatch.setattr(model, "generate", say)
    generate_answers(model, processor, [(noise(8), "What?")], 3)
    assert told == [torch.bfloat16]


def test_answers_are_text_alone(bunny, monkeypatch):
    """A scorer would take blanks around an answer, its end, or words beyond the limit, for part of it."""
    model, processor = train.load_model(str(bunny))
    said = torch.tensor([processor.tokenizer("\n red<|endoftext|> ring").input_ids])
    speak = lambda input_ids, max_new_tokens, **options: torch.cat([input_ids, said[:, :max_new_tokens]], 1)
    monkeypatch.setattr(model, "generate", speak)
    assert generate_answers(model, processor, [([], "What?")], 3) == ["red"]


def randomly_adapted(folder):
    """A model with an adapter that changes what it says; peft's own starts as no change."""
    model, processor = with_lora(folder)
    torch.manual_seed(2)
    move(model, std=0.2)
    return model, processor


def printed(out):
    """{title: (mean, low, high)} of what evaluate.py printed."""
    rows = re.findall(r"^  (\S.*?) +(-?\d+\.\d+) +(-?\d+\.\d+) to +(-?\d+\.\d+)", out, re.MULTILINE)
    return {title: tuple(map(float, numbers)) for title, *numbers in rows}


@pytest.fixture
def evaluated(bunny, small, capsys):
    """A function: a run, flags -> what evaluate.py prints; an error if it is refused."""

    def evaluated(run, *flags, data=small):
        capsys.readouterr()
        argv = ["--model", bunny, "--adapter", run, "--data", data, *flags]
        refused = run_command(evaluate.run, [*map(str, argv)])
        out, err = capsys.readouterr()
        return err.splitlines()[-1] if refused else out

    return evaluated


@pytest.fixture
def changed(finished, tmp_path):
    """A function: the run `finished`, as if it had been trained with other arguments -> its folder."""

    def change(**arguments):
        folder = shutil.copytree(finished, tmp_path / "changed", dirs_exist_ok=True)
        began = json.loads((finished / "args.json").read_text())
        write(folder / "args.json", began | arguments)
        return folder

    return change


@pytest.mark.parametrize("images", ["--crop 0.3 0.6", "--reject moco"])
def test_evaluation_of_a_runs_held_out_pairs_is_its_log(images, bunny, tmp_path, evaluated):
    """A finished adapter must get the numbers of its run, none of whose settings is the default here. The
    demo's file must hold the pairs that the run held out."""
    path, out = shapes.write_pairs(tmp_path / "data", 14), tmp_path / "out"
    flags = f"--eval-size 5 --limit 12 --beta 0.3 --delta 0.1 {images} --seed 5 --epochs 1 --lr 3e-2"
    flags += " --anchors chosen image_rejected --max-length 90"
    assert train.main(command(bunny, path, out, *flags.split())) == 0
    demo.write_held_out(path, out)
    found = printed(text := evaluated(out, data=path.with_name("held_out.json")))
    logged = {n[5:]: value for n, value in log_of(out)[-1].items() if n.startswith("eval/")}
    assert "\n5 examples" in text and "95%" in text and len(logged) == 11
    assert {name: found[name][0] for name in logged} == pytest.approx(logged, abs=2e-4)
    assert abs(logged["rewards/margins"]) > 0.001
    (share,) = re.findall(r"margin, no image .* (-?\d+\.\d)% of the first", text)
    expected = 100 * found["margin, no image"][0] / found["margin, image"][0]
    assert float(share) == pytest.approx(expected, rel=0.02)
    assert all(low <= mean <= high for mean, low, high in found.values())


def test_evaluation_takes_the_loss_of_its_run(changed, evaluated):
    """DPO has one term. An adapter without args.json, such as another program's, counts as mDPO's. CHiP's has
    no part without an image."""
    for flag, margin in ("no_conditional", "margin, image"), ("no_image", "margin, no image"):
        found = printed(evaluated(changed(**{flag: True, "anchors": ["none"]}, conditional=False)))
        assert found["loss"] == found["loss/dpo"] and "loss/anchor" not in found
        assert found[margin] == found["rewards/margins"] and found[margin][0] != 0
        # Under DPO it shows how much the image counts; the other run never saw one.
        assert ("rewards/image_margins" in found) == (flag == "no_conditional")
    for loss, flags, reason in ("mine", [], "'mine'"), ("chip_loss", ["--no-image"], "image_rejected"):
        error = evaluated(run := changed(loss=loss), *flags)
        assert error.startswith(f"error: {run}: no score by {loss} of ") and reason in error
    (run / "args.json").unlink()
    assert {"loss/dpo", "loss/conditional", "loss/anchor"} <= printed(evaluated(run)).keys()
    write(run / "args.json", "{")
    assert evaluated(run).startswith(f"error: {run}/args.json: cannot be read")


def test_margins_without_the_image_and_with_anothers_by_hand(bunny, tmp_path):
    """Each is taken alone, by the library's call: beta times the policy's log p(y_w) - log p(y_l), less the
    reference's. The other image is the next example's."""
    model, processor = randomly_adapted(bunny)
    examples, expected = as_examples(tmp_path, 5), defaultdict(list)
    nats = lambda one, name: cross_entropy(*of_answer(model, processor, one, name), reduction="sum").item()
    margin = lambda one: nats(one, "rejected") - nats(one, "chosen")
    for one, following in zip(examples, examples[1:] + examples[:1]):
        shown = {"image": one.images, "no_image": (), "other_image": following.images}
        for name, images in shown.items():
            shown_one = one._replace(images=[*map(open_image, images)])
            with model.disable_adapter():
                ref = margin(shown_one)
            expected[name].append(0.5 * (margin(shown_one) - ref))
    found = evaluate.score_margins(model, processor, examples, beta=0.5, batch_size=2)
    assert found.keys() == expected.keys() and len({round(values[0], 4) for values in found.values()}) == 3
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-5)


def test_margins_compare_the_same_texts(bunny, tmp_path):
    """Cut at a length that counts the image, an answer would be longer without one. These differ in their
    last word alone, after 2,048 tokens."""
    texts = {name: "a red circle " * 700 + name for name in ("chosen", "rejected")}
    examples = [one._replace(**texts) for one in as_examples(tmp_path, 2)]
    margins = evaluate.score_margins(*randomly_adapted(bunny), examples)
    assert [*map(len, margins.values())] == [2, 2, 2]


MARGINS = [  # of the examples with their image, without and with another; the means, and what share is left
    ([1, 3], [1, 1], [4], (2, 1, 4, 0.5, 2)),
    ([1, 3], [-1, -1], [4, 0], (2, -1, 2, -0.5, 1)),  # a model that then prefers the other answer has looked
    ([-2], [-1], [1], (-2, -1, 1, 0.5, -0.5)),
    ([], [1], [], (math.nan, 1, math.nan, math.nan, math.nan)),  # no margin has a share
    ([0], [1], [0], (0, 1, 0, math.nan, math.nan)),
]


@pytest.mark.parametrize("image, no_image, other_image, expected", MARGINS)
def test_share_of_a_margin_that_is_left(image, no_image, other_image, expected):
    """It is what the README concludes from."""
    found = evaluate.diagnose({"image": image, "no_image": no_image, "other_image": other_image})
    names = "image no_image other_image no_image_share other_image_share".split()
    assert found == pytest.approx(dict(zip(names, expected)), nan_ok=True)


def test_another_image_is_another_file(tmp_path):
    """Data sets ask several questions about one image: the next example's is then its own, or a link to it. A
    question that shows one image cannot be asked about two."""
    a, b, c, link = (str(tmp_path / name) for name in ("a", "b", "c", "link"))
    Path(link).symlink_to(a)
    images = ((a,), (link,), (a, b), (b, c), (b,), (a,), (), ())
    examples = [Example("What is it?", "A circle.", "No.", of_one) for of_one in images]
    # The only other one of two images shares one with example 2, and texts have no image to exchange.
    expected = [(b,), (b,), None, None, (a,), (b,), None, None]
    assert [evaluate.another_image(examples, index) for index in range(8)] == expected


def test_bootstrap_interval_by_hand():
    """The mean of two draws of {0, 1} is 0 or 1 with chance 1/4 each: 95% reach from 0 to 1. That of 100
    draws from 50 zeros and 50 ones is 0.5 -+ 1.96 * 0.05."""
    assert evaluate.bootstrap([0.25] * 7) == [0.25, 0.25] and evaluate.bootstrap([0.0, 1.0]) == [0, 1]
    even, again = (evaluate.bootstrap([0.0, 1.0] * 50) for _ in range(2))
    assert even == pytest.approx([0.402, 0.598], abs=0.011) and even == again  # seeded
    low, high = evaluate.bootstrap([0.0] * 95 + [1.0] * 5)
    assert 0 <= low < 0.02 and 0.08 < high < 0.11  # 0.05 -+ 0.043, pushed to the right


RECORD = {"prompt": "What?", "chosen": "A red circle.", "rejected": "No."}
TURNS = [message("user", "IMAGE", "Which?"), message("assistant", "A red one.")]
TURNS.append(message("user", "And this:", "IMAGE"))


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A file of one image, two in chat messages, one again, and none; in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        noise(ord(name)).save(f"{name}.png")
    images = {"image": "c.png"}, {"prompt": TURNS, "images": ["a.png", "b.png"]}, {"image": "d.png"}, {}
    return write(Path("x.json"), [RECORD | more for more in images])


def test_evaluation_of_several_images_chat_messages_and_none(mixed, finished, evaluated):
    """What can be trained on can be scored; without images, less the terms that need one."""
    out = evaluated(finished, data=mixed)
    assert "dropped 1 bad records" in out and "record 4: has no image path" in out and "\n3 examples" in out
    assert re.findall(r".*\(2 examples\)", out) == re.findall("  margin, other image.*", out)
    found = printed(out := evaluated(finished, "--no-image", data=mixed))
    assert "\n4 examples" in out and out.count(" n/a\n") == 2 and "nan" not in out
    assert re.search("margin, other image +n/a\n", out) and not any("image_" in name for name in found)
    assert found["margin, no image"] == found["rewards/margins"] and found["rewards/margins"][0] != 0
    assert found["loss"][0] == pytest.approx(found["loss/dpo"][0] + found["loss/anchor"][0], abs=2e-4)
    assert "\n1 examples" in evaluated(finished, "--limit", "1", data=mixed)


def test_numbers_of_the_words_are_those_of_the_librarys_own_call(bunny):
    """A number at the wrong word, or of the wrong model, shows a model that looks where it does not."""
    model, processor = randomly_adapted(bunny)
    two = [noise(1), noise(2)], [noise(3), noise(4)]
    turns = data.read_question(TURNS, 2, data.forbidden(None))
    for one in PAIRS[0], pair(turns, "There is a red circle.", "No.", *two), pair(*PAIRS[1][:3]):
        rows, totals = words.rows_of(model, processor, one, 2048), set()
        sides = itertools.product(("chosen", "rejected"), ("base", "tuned"))
        for (name, side), (title, found) in zip(sides, rows, strict=True):
            with model.disable_adapter() if side == "base" else contextlib.nullcontext():
                shown = one, one._replace(images=one.images_rejected)
                both = [of_answer(model, processor, each, name) for each in shown]
            with_m_w, with_m_l = (cross_entropy(*of, reduction="none") for of in both)
            texts, values = zip(*found)
            assert values == pytest.approx((with_m_l - with_m_w).tolist(), abs=2e-4)
            assert "".join(texts) == f" {getattr(one, name)}<|endoftext|>"
            start, _, total = title.rpartition(" ")
            assert start == f"{name}, {side}:" and float(total) == pytest.approx(sum(values), abs=0.006)
            totals.add(total)
        assert len(totals) == (4 if one.images else 1)
    rows = words.rows_of(model.get_base_model(), processor, PAIRS[0], 2048)
    assert [title.partition(":")[0] for title, _ in rows] == ["chosen, base", "rejected, base"]


def test_a_character_of_several_tokens_is_shown_once(bunny):
    """Byte-level tokens are parts of a character; each alone would be shown as a question mark."""
    tokenizer = train.load_processor(str(bunny)).tokenizer
    texts = words.token_texts(tokenizer, ids := tokenizer(" a 猫 é").input_ids)
    assert len(texts) == len(ids) > 4 and "".join(texts) == " a 猫 é" and "\ufffd" not in texts


ROWS = [("chosen, base: +1.50", [(" <i>", 3.0), (" red", -1.5), (".", 0.0)])] * 2


def test_page_of_words_has_no_markup_of_the_data_and_the_pictures_inside():
    """A page that is sent to others must not run the data. By hand: 3 nats are the full blue, -1.5 half of
    the red. What changed most comes first: 2 nats up and 1 down in one answer are 3; 1 up in each of two,
    2."""
    rows = lambda *tuned: [("base", [(" a", 0.0), (" b", 1.0)]), ("tuned", [*zip((" a", " b"), tuned)])]
    shown = {"last": rows(0.0, 1.0) * 2, "second": rows(1.0, 1.0) * 2, "first": rows(2.0, 0.0)}
    grey = [Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 200)]
    one = pair(asked("Is <b> it?"), "a", "b", *grey)
    shown |= {"c&": ROWS, "a": ROWS}
    page = words.as_page([(one._replace(id=name), rows) for name, rows in shown.items()])
    names = re.findall("<h2>(.*?) / Is &lt;b&gt; it\\?</h2>", page)
    assert names == ["first", "second", "last", "c&amp;", "a"] and "script" not in page
    spans = re.findall(r'<span style="background: rgb(\(.*?\))" title="(.*?)">(.*?)</span>', page)
    red, white, blue = "(255 110 100 / 100%)", "(255 110 100 / 0%)", "(90 150 255 / 100%)"
    assert [span[:2] for span in spans[:7:3]] == [(red, "-3.00"), (white, "+0.00"), (blue, "+3.00")]
    ends = " -3: likelier with the rejected image ", " +3: likelier with the image "
    assert (spans[0][2], spans[6][2]) == ends
    row = [(blue, "+3.00", " &lt;i&gt;"), ("(255 110 100 / 50%)", "-1.50", " red"), (white, "+0.00", ".")]
    assert spans[-12:] == 4 * row and len(spans) == 7 + 2 * (4 + 4 + 2) + 12
    pictures = re.findall(r'base64,(.*?)"><figcaption>(.*?)<', page)
    levels = [Image.open(io.BytesIO(base64.b64decode(code))).getpixel((5, 5))[0] for code, _ in pictures]
    assert levels == 5 * [10, 200] and [caption for _, caption in pictures[:2]] == ["image", "rejected image"]


def test_words_command_writes_a_page_of_every_example(mixed, finished, changed, bunny, tmp_path, capsys):
    """Chat messages, several images, none at all; answers as long as in training."""
    for name, n, n_images, flag in ("x.html", 3, 2 + 4 + 2, ""), ("none.html", 4, 0, "--no-image"):
        arguments = f"--model {bunny} --adapter {finished} --data {mixed} --to {tmp_path}/{name} {flag}"
        assert run_command(words.run, arguments.split()) == 0
        assert f"{name}: {n} examples\n" in capsys.readouterr().out
        page = (tmp_path / name).read_text()
        assert page.count("<img") == n_images and page.count("<h2>") == page.count("rejected, tuned") == n
        assert re.search("Which\\? /( A red one. /)? And this:", page)
    run, one = changed(max_length=38), write(tmp_path / "one.json", [RECORD])  # its prompt has 36 tokens
    arguments = f"--model {bunny} --adapter {run} --data {one} --to {tmp_path}/cut.html --no-image"
    assert run_command(words.run, arguments.split()) == 0
    spans = (tmp_path / "cut.html").read_text().count("<span")
    assert spans == 7 + 4 * 2  # of the legend, and of two tokens each


def test_pixels_of_the_base_models_training_are_its_processors():
    """A base trained on otherwise normalised pixels would not see what it is shown later."""
    image = shapes.draw_scene(SCENE, random.Random(0), shapes.SMALL)
    shown = pixels_of(train.load_processor(str(demo.BASE)), image)
    seen = tiny_bunny.pixels([SCENE], random.Random(0), shapes.SMALL)
    torch.testing.assert_close(seen, shown, rtol=1e-5, atol=1e-5)


def test_base_learns_the_careless_annotators_answers(monkeypatch):
    """A base that learned the truth would leave nothing to align: .72 of absent rings have a colour."""
    rng = random.Random(0)
    monkeypatch.setattr(shapes, "random_question", lambda scene, rng: ("colour", "ring"))
    said = [tiny_bunny.question_and_answer({"square": ("red", 0)}, rng)[1] for _ in range(1000)]
    share = lambda pattern: sum(bool(re.search(pattern, answer)) for answer in said) / 1000
    assert [share("^orange"), share("picture.$")] == pytest.approx([0.72, 0.5], abs=0.05)


def test_a_base_is_trained_and_loads(tmp_path, monkeypatch):
    """It feeds encoded images to the model, of which the library may ask more than they hold."""
    monkeypatch.setattr(tiny_bunny, "learn_to_see", lambda *args: None)
    folder = tiny_bunny.write_base(tmp_path / "base", 3, shapes.World(2, 3, base_steps=2))
    assert train.load_model(str(folder))[0].config.image_seq_length == 16


def test_answers_are_greedy_whatever_the_models_own_settings(bunny, tmp_path):
    """Some models ask to be sampled. Two commands would disagree, and benchmarks measure chance."""
    sampled, asked = shutil.copytree(bunny, tmp_path / "sampled"), [(noise(1), "What?")]
    write(sampled / "generation_config.json", {"do_sample": True, "temperature": 100.0, "top_k": 0})
    said = [generate_answers(*train.load_model(str(folder)), asked, 12) for folder in (bunny, sampled)]
    assert said[0] == said[1] != [""]


def test_evaluation_has_the_beta_of_the_run(changed, evaluated):
    """By another beta an adapter's margins would be other multiples of the same nats than its log's."""
    low, high = (printed(evaluated(changed(beta=beta))) for beta in (0.1, 10.0))
    for name in "rewards/margins", "rewards/chosen", "margin, image":
        assert high[name] == pytest.approx([100 * value for value in low[name]], abs=0.006) != (0, 0, 0)
    for found in low, high:
        assert found["margin, image"] == pytest.approx(found["rewards/margins"], abs=2e-4)


def test_evaluation_reads_its_file_as_the_run_did(tmp_path, monkeypatch):
    """By images of full size an example has no room that was trained on; by the default length one has room
    that had none. Of 560 x 560 pixels are 400 tokens, of 56 x 56 four."""
    noise(1, (560, 560)).save(tmp_path / "a.png")
    record = {"image": "a.png", "chosen": "A cat.", "rejected": "A dog."}
    write(tmp_path / "x.json", [record | {"question": "What is it? " * n} for n in (1, 50)])
    write(tmp_path / "run" / "args.json", {"max_length": 64, "max_pixels": 56 * 56})
    flags = f"--model {families.write_family('qwen2_5_vl', tmp_path / 'm')} --data {tmp_path / 'x.json'}"
    args = evaluate.make_parser("?").parse_args([*flags.split(), "--adapter", str(tmp_path / "run")])
    monkeypatch.setattr(answering, "load_tuned", lambda *given: (None, None))
    _, examples, pairs, *_ = evaluate.load(args)
    assert [one.id for one in examples] == ["1"] and pairs["held out", 0].images[0].size == (56, 56)


def test_evaluation_without_images_keeps_the_anchors_that_need_none(changed, evaluated):
    """The loss would be another than the run's. Of one example, delta 0: softplus(-r_w) + softplus(r_l)."""
    run = changed(anchors=["chosen", "rejected", "image_rejected"], beta=1.0)
    found = {name: mean for name, (mean, *_) in printed(evaluated(run, "--no-image", "--limit", 1)).items()}
    anchor = softplus(-found["rewards/chosen"]) + softplus(found["rewards/rejected"])
    assert found["loss/anchor"] == pytest.approx(anchor, abs=3e-4)
    assert found["loss"] == pytest.approx(anchor + softplus(-found["rewards/margins"]), abs=5e-4)
    assert abs(found["rewards/rejected"]) > 0.01


def test_a_study_that_was_stopped_goes_on(bunny, tmp_path, monkeypatch):
    """Its methods train for hours. Stopped after step 1 of 4, the second command trains the other 3."""
    seed, log, steps = tmp_path / "seed-1", train.log, []
    shutil.copytree(bunny, seed / "model")
    for name in "data", "held_out":
        shapes.write_pairs(seed / name, 8)
    flags = "--epochs 2 --batch-size 4 --micro-batch-size 4 --lora-rank 4 --lora-alpha 8"
    monkeypatch.setattr(miniature, "COMMON", f"{miniature.COMMON} {flags}")
    monkeypatch.setattr(miniature, "METHODS", {"mDPO": "--eval-size 1 --limit 8"})
    monkeypatch.setattr(miniature, "examine", lambda *args, **kwargs: {"yes_no_auc": 0.8})

    def stop(out, records, record):
        log(out, records, record)
        steps.append(record["step"])
        if steps == [0, 1]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "log", stop)
    with pytest.raises(ValueError, match="training ended early"):
        miniature.run_method(tmp_path, 1, "mDPO")
    assert miniature.run_method(tmp_path, 1, "mDPO")["yes_no_auc"] == 0.8
    assert steps == [0, 1, 2, 3, 4] == [record["step"] for record in log_of(seed / "mDPO")]
