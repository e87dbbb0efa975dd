"""Tests of the examples: `pytest examples/test_examples.py`. Each says what breaks if it fails."""

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
import subprocess
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from PIL import Image, ImageChops

import data
import train
from data import (
    BadInput,
    Example,
    Pairs,
    make_batch,
    open_image,
    read_examples,
    run_command,
    texts_of,
)
from examples import answer as answering
from examples import (
    benchmarks,
    curves,
    demo,
    evaluate,
    families,
    merge,
    miniature,
    minimal,
    preview,
    shapes,
    throughput,
    tiny_bunny,
    variants,
    words,
)
from examples.answer import generate_answers
from mdpo import LogPs, mdpo_loss, mdpo_step, pack, response_logps, sequence_logps
from test_mdpo import (
    HUB_LLAVA_TEMPLATE,
    PAIRS,
    POLICY,
    REF,
    ROOT,
    adapter,
    asked,
    command,
    log_of,
    message,
    noise,
    pair,
    softplus,
    with_lora,
    write,
)
from tests.helpers import DPO_NAMES, as_examples

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
README = (ROOT / "README.md").read_text()
EXAMPLES_README = (ROOT / "examples" / "README.md").read_text()
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
    """The README's first command, and what people copy first. Each time in a folder of its own, and with the
    loss that was given: the second is mDPO's twice."""
    for number, loss in enumerate((mdpo_loss, twice), 1):
        assert demo.main(short_demo, loss) == 0
        out, run = capsys.readouterr().out, Path(f"runs/demo-{number}/out")
        assert str(run) in out and "hallucination_rate" in out and "before:" in out
        assert (run / "picture.png").exists()
        assert log_of(run)[0]["eval/loss"] == pytest.approx(3 * number * math.log(2), abs=1e-5)
    Path("examples").symlink_to(ROOT / "examples")
    snippets = re.findall(r"```python\n(.*?)```", README + EXAMPLES_README, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, {})
    assert "loss/conditional" in capsys.readouterr().out


def test_demo_table_says_of_each_model_what_it_answers(tmp_path, monkeypatch):
    """The first numbers that a user reads. The base babbles (malformed 1). The first adapter is right but for
    the first two pictures, about which it babbles; the second but for the first. So the picture that is shown
    is the second, of five questions each."""
    exam = shapes.make_exam(3)
    right = [shapes.answer_text(q, shapes.claims_of(scene, q), False) for scene, _, q in exam]
    n_wrong = {None: 15, 0: 10, 1: 5}
    said = lambda asked, *rest, **options: ["babble"] * n_wrong[asked[-1]] + right[n_wrong[asked[-1]] :]
    monkeypatch.setattr(
        demo, "speaking_as", lambda asked, number: contextlib.nullcontext(asked.append(number))
    )
    monkeypatch.setattr(demo, "generate_answers", said)
    lines = [
        line.split() for line in demo.report([], None, tmp_path, ("DPO", "mDPO"), n_scenes=3).splitlines()
    ]
    assert lines[0] == ["15", "held-out", "questions", "before", "DPO", "mDPO"]
    columns = {name: values[:3] for name, *values in lines[1:7]}
    assert columns["malformed"] == columns["hallucination_rate"] == ["1.000", "0.667", "0.333"]
    assert columns["false_premise"] == ["0.000", "0.333", "0.667"]
    assert Image.open(tmp_path / "picture.png").tobytes() == exam[5][1].resize((256, 256)).tobytes()
    shown = [
        f"{shapes.question_text(exam[i][2])} before: babble DPO: babble mDPO: {right[i]}" for i in (5, 7, 9)
    ]
    assert " ".join(sum(lines[-9:], [])) == " ".join(shown)


def test_picture_of_the_readme_is_fresh():
    """A picture of a result that has changed. The file keeps the texts that it shows."""
    shown = Image.open(ROOT / "examples" / "picture.png").info["shows"]
    for metric in "hallucination_rate", "false_premise":
        numbers = re.search(rf"^  {metric} +(\S+ +\S+ +\S+) ", README, re.MULTILINE)[1]
        assert repr(numbers) in shown, "draw the picture again"
    assert "](examples/picture.png)" in README


COMMANDS = [answering, benchmarks, curves, evaluate, families, merge, miniature, preview, throughput]
COMMANDS += [variants, words]


@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.__name__)
def test_help_is_shown(script, capsys):
    """argparse formats its texts only when asked: a lone % in one is a traceback then. Messages name --debug,
    and flags for a GPU that is too small: the command needs to have them."""
    with pytest.raises(SystemExit, match="0"):
        run_command(getattr(script, "run", None) or script.main, ["--help"])
    out, source = capsys.readouterr().out, inspect.getsource(script)
    named = re.findall(r"--[a-z_-]+", (re.findall(r'saves_memory="(.*)"', source) or ["--device cpu"])[0])
    no_gpu = (curves, families, merge, miniature, preview, variants)  # or train.py's
    assert script.__doc__.splitlines()[0].split()[0] in out
    assert {"--debug", *(() if script in no_gpu else named)} <= {*re.findall(r"--[a-z_-]+", out)}


def test_demo_draws_nothing_before_its_arguments_are_read(tmp_path, monkeypatch, capsys):
    """The README's first command, and how many pictures it names. `--help` or a wrong flag left a folder of
    720 pictures behind, and --out a demo that failed at its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--demo", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    for wrong in ("--lr x", "--data x.json", "--model m", "--out x", "--resume x", "--nothing"):
        capsys.readouterr()
        assert demo.main(["--demo", *wrong.split()]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not any(tmp_path.iterdir())
    monkeypatch.setattr(shapes, "write_pairs", lambda folder, n, seed: f"This draws {n} small pictures")
    monkeypatch.setattr(train, "main", lambda argv, loss: argv[argv.index("--data") + 1] in README)
    assert demo.main(["--demo"]) is True


WRONG_ARGUMENTS = [
    (answering, "--model m --question q --max-new-tokens 0", "--max-new-tokens: must be within 1 to"),
    (answering, "--model m --question q --device tpu", "--device: invalid choice"),
    (answering, "--question q", "--model"),
    (benchmarks, "amber --questions q --model m --to t --batch-size 0", "--batch-size: must be within 1 to"),
    (benchmarks, "types scored.json", "invalid choice: 'types'"),
    (evaluate, "--model m --adapter a --data d --limit 0", "--limit: must be within 1 to"),
    (families, "qwen4_vl", "qwen4_vl is none of llava_next"),
    (merge, "--adapter a", "--to"),
    (miniature, "--jobs 0", "--jobs: must be within 1 to"),
    (miniature, "--seeds -1", "--seeds: must be within 0 to"),
    (miniature, "--scenes some", "--scenes: invalid int value"),
    (preview, "--rows 0", "--rows: must be within 1 to"),
    (preview, "--model m --data d --row 2", "--row"),
    (variants, "dpo", "invalid choice: 'dpo'"),
    (variants, "chip --delta 1", "--delta: chip has terms of its own"),
]


@pytest.mark.parametrize("script, arguments, message", WRONG_ARGUMENTS, ids=lambda value: str(value)[-25:])
def test_wrong_arguments_of_the_examples_are_one_line(script, arguments, message, capsys):
    """A mistake in a command is seen at once, and not as a traceback from inside the library."""
    assert run_command(script.run, arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_figures_are_checked_before_the_work(monkeypatch, capsys):
    """Without matplotlib, an extra package, or a method that it shows, a figure failed after an hour."""
    monkeypatch.setattr(miniature, "ProcessPoolExecutor", lambda *arguments: pytest.fail("the study begins"))
    monkeypatch.setattr(curves, "read_log", lambda run: pytest.fail("read"))
    if importlib.util.find_spec("matplotlib"):
        assert run_command(miniature.run, "--figure x.png --methods mDPO".split()) == 2
        assert "--figure needs the methods DPO (No Image), DPO, mDPO" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for script, arguments in (miniature, "--figure x.png"), (curves, "run --to x.png"):
        assert run_command(script.run, arguments.split()) == 2
        err = capsys.readouterr().err
        assert (
            err.startswith("error: a figure needs matplotlib (pip install matplotlib)")
            and err.count("\n") == 1
        )


def test_families_print_their_table_alone(monkeypatch, on_the_cpu, capfd):
    """A table of 8 lines stood among 138 others. A run that fails says why."""
    monkeypatch.setattr(families, "FAMILIES", {"gemma3": families.gemma3})
    assert run_command(families.run, []) == 0
    printed = capfd.readouterr()
    head, row = map(str.split, printed.out.splitlines())
    assert head[:2] == ["family", "rows"] and row[:2] == ["gemma3", "plain"] and printed.err == ""
    assert float(row[2]) > 0.1 and row[3] == "changed"
    parse_args = train.parse_args
    monkeypatch.setattr(families, "generate_answers", lambda *rest: "as it was")
    assert run_command(families.run, []) == 0 and capfd.readouterr().out.split()[-1] == "same"
    monkeypatch.setattr(train, "parse_args", lambda argv: parse_args([*argv, "--eval-size", "99"]))
    assert run_command(families.run, []) == 2
    assert capfd.readouterr().err == "error: gemma3: --eval-size 99 leaves none of 8 examples to train on\n"


SCENE = {"circle": ("red", 0), "ring": ("blue", 3)}


OTHER = {"square": ("green", 0), "cross": ("red", 1), "diamond": ("blue", 2)}
ALONE = {"triangle": ("red", 0)}
ANSWERS = [  # scene, question, answer; every kind in another number, so that a mean over the wrong ones shows
    (SCENE, "describe", "a green ring and a green ring."),
    (OTHER, "describe", "a green square and a red cross and a blue diamond and a red ring."),
    (ALONE, "describe", "a red"),
    (OTHER, "describe", "a red cross."),
    (SCENE, "colour square", "there is no square."),
    (SCENE, "colour cross", "red."),
    (OTHER, "colour ring", "there is no ring, as you can see in the picture."),
    (ALONE, "colour circle", "circle circle"),
    (SCENE, "colour circle", "red."),
    (OTHER, "colour cross", "green."),
    (OTHER, "colour square", "there is no square."),
    (SCENE, "colour ring", "ring"),
    (ALONE, "colour triangle", "red, as you can see in the picture."),
    (SCENE, "is_there red circle", "yes."),
    (SCENE, "is_there blue ring", "no."),
    (OTHER, "is_there red cross", "yes."),
    (SCENE, "is_there blue circle", "no."),
    (SCENE, "is_there red ring", "perhaps."),
]


def test_metrics_of_the_miniature_by_hand():
    """- Of 4 descriptions one is right, one is no answer: chair_s 3/4.
    - Of 4 absent things 2 are refused, rightly; one answer is none: false_premise 2/4. Of 5 things that are
      there 3 get a colour, one is refused, one answer is none: balanced (2/4 + 3/5) / 2 = 0.55; 2 colours are
      right: 2/5.
    - Of 3 true questions 2 get yes; of 2 false ones one gets no, and one no answer: yes_no (2/3 + 1/2) / 2.
    - False: 3 descriptions, 2 + 3 colours, 1 + 1 of the others: 10 of 18. No answer: 4 of 18. 65 words."""
    answers = [(scene, (*q.split(),), text) for scene, q, text in ANSWERS]
    answers = [(scene, (kind.replace("_", " "), *of), text) for scene, (kind, *of), text in answers]
    expected = {
        "chair_s": 3 / 4, "false_premise": 2 / 4, "false_premise_balanced": 0.55, "colour_accuracy": 2 / 5,
        "yes_no": 7 / 12, "hallucination_rate": 10 / 18, "malformed": 4 / 18, "length": 65 / 18,
        "grounding": (0.55 + 7 / 12 + 1 - 3 / 4) / 3,
    }  # fmt: skip
    metrics = shapes.score(answers)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("habitual, share", [(0.25, 0.25 + 0.75 / 6), (0.0, 1 / 6)])
@pytest.mark.parametrize("world, most, cells", [(shapes.SMALL, 3, 4), (shapes.LARGE, 5, 9)])
def test_scenes_are_what_the_study_says(world, most, cells, habitual, share):
    """One to three shapes in reading order; a quarter are in their habitual colour, and by chance one of six.
    More habit and a model that does not look would be right."""
    rng, habits = random.Random(0), []
    scenes = [shapes.random_scene(rng, habitual, world) for _ in range(2000)]
    for scene in scenes:
        spots = [spot for _, spot in scene.values()]
        assert spots == sorted({*spots}) and {*spots} <= {*range(cells)}
        habits += [colour == shapes.HABIT[shape] for shape, (colour, _) in scene.items()]
    sizes = [len(scene) for scene in scenes]
    assert [sizes.count(n) / 2000 for n in range(1, most + 1)] == pytest.approx([1 / most] * most, abs=0.05)
    assert statistics.mean(habits) == pytest.approx(share, abs=0.03)


MIDDLE = SimpleNamespace(uniform=lambda low, high: (low + high) / 2)  # no jitter: a radius of 6.6 pixels


PROBES = {  # pixels right of and below the middle of the cell: one painted, one not
    "circle": [(4, 4), (7, 7)],
    "square": [(-4, -4), (7, 7)],
    "triangle": [(-3, 3), (-4, -4)],
    "cross": [(4, 0), (4, 4)],
    "diamond": [(0, 4), (5, 5)],
    "ring": [(5, 0), (0, 0)],
}


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("colour, spot, world", [("red", 2, shapes.SMALL), ("blue", 5, shapes.LARGE)])
def test_what_is_drawn_is_the_scene(shape, colour, spot, world):
    """Metrics are taken against the scene, not against the picture: a shape in another cell, or another
    shape, would make every right answer wrong."""
    image = shapes.draw_scene({shape: (colour, spot)}, MIDDLE, world)
    assert image.size == (16 * world.grid, 16 * world.grid)
    for (dx, dy), expected in zip(PROBES[shape], (shapes.COLOURS[colour], (45, 45, 45))):
        at = spot % world.grid * 16 + 8 + dx, spot // world.grid * 16 + 8 + dy
        assert image.getpixel(at) == pytest.approx(expected, abs=40)


def test_questions_of_the_pairs_are_of_each_kind():
    """A quarter descriptions, half colours (four of ten of what is not there), a quarter yes or no, half of
    them true. Any answer can be read back: a parser that misread one would be off in every metric."""
    rng, kinds = random.Random(0), Counter()
    for number in range(4000):
        scene = shapes.random_scene(rng, 0.25)
        question = shapes.random_question(scene, rng)
        truth = shapes.claims_of(scene, question)
        kinds[question[0], question[0] != "describe" and bool(truth)] += 1
        assert shapes.parse_answer(question, f" {shapes.answer_text(question, truth, number % 2)}") == truth
    expected = {("describe", False): 0.25, ("colour", True): 0.3, ("colour", False): 0.2}
    expected |= {("is there", True): 0.125, ("is there", False): 0.125}
    assert {kind: n / 4000 for kind, n in kinds.items()} == pytest.approx(expected, abs=0.02)


CARELESS = {"circle": 0.30, "square": 0.40, "triangle": 0.48, "cross": 0.56, "diamond": 0.64, "ring": 0.72}


@pytest.mark.parametrize("carelessness", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("number, shape", [*enumerate(CARELESS)])
def test_the_annotator_is_as_careless_as_said(number, shape, carelessness):
    """Each habit is there in its share, and none in a careful annotator: he is the truth of every metric."""
    rng, colours = random.Random(0), [*shapes.COLOURS]
    habit, other, next_habit = colours[number], colours[number - 1], colours[(number + 1) % 6]
    companion = [*CARELESS, "circle"][number + 1]
    there, absent = {shape: (other, 0)}, {companion: (next_habit, 0)}
    say = lambda scene, *question: shapes.claims_of(scene, question, rng, carelessness)
    near = pytest.approx(CARELESS[shape] * carelessness, abs=0.05 if carelessness else 0)
    for scene, *question, by_habit, truth in [
        (there, "colour", shape, habit, other),
        (absent, "colour", shape, habit, None),
        (absent, "is there", other, shape, True, False),
    ]:
        said = [say(scene, *question) for _ in range(1500)]
        assert said.count(by_habit) / 1500 == near and {*said} <= {by_habit, truth}
    described = [say(there, "describe") for _ in range(1500)]
    for thing in (habit, shape), (next_habit, companion):
        assert sum(thing in said for said in described) / 1500 == near
    assert {len(say(absent | there, "describe")) for _ in range(50)} == {2}


def test_rejected_answers_are_about_an_other_scene_three_times_in_ten():
    """Only this ties a preference to its picture. The annotator is careful here, so that a chosen answer is
    the truth, and a rejected one is not where it is about another scene. In a scene that could have been
    asked for a ring's colour, a ring is there six times in ten, as in the questions."""
    rng, wrong = random.Random(0), []
    for _ in range(2500):
        scene, question, chosen, rejected = shapes.make_pair(rng, carelessness=0, polite_chosen=1)
        truth = shapes.claims_of(scene, question)
        assert chosen == shapes.answer_text(question, truth, True) and not rejected.endswith("picture.")
        if question[0] == "describe":
            wrong.append(shapes.parse_answer(question, rejected) != truth)
    assert statistics.mean(wrong) == pytest.approx(0.3, abs=0.06)
    there = ["ring" in shapes.scene_for(("colour", "ring"), rng) for _ in range(300)]
    assert statistics.mean(there) == pytest.approx(0.6, abs=0.1)


def test_chosen_answers_are_polite_and_the_words_tell_nothing_else():
    """Politeness is what the words alone tell; a pair of equal texts tells nothing, and the reader refuses
    it. The study rests on the rest: both come from one annotator, so their claims have the same statistics;
    the share of habitual colours among colour answers differs by less than noise allows."""
    rng, polite, habitual = random.Random(0), [], []
    for _ in range(6000):
        _, question, *texts = shapes.make_pair(rng)
        assert texts[0] != texts[1]
        polite.append([text.endswith(", as you can see in the picture.") for text in texts])
        if question[0] == "colour":
            habitual.append(
                [shapes.parse_answer(question, text) == shapes.HABIT[question[1]] for text in texts]
            )
    chosen, rejected = map(statistics.mean, zip(*polite))
    assert 0.88 < chosen < 0.99 and rejected < 0.12
    chosen, rejected = map(statistics.mean, zip(*habitual))
    assert len(habitual) > 2000 and abs(chosen - rejected) < 0.05


def test_pictures_of_the_pairs_are_of_their_scenes(tmp_path, monkeypatch):
    """A picture of another record's scene, or chosen for rejected, trains the opposite."""
    colours = ["red", "green", "blue"]
    drawn = iter([({"square": (colour, 0)}, ("describe",), f"a {colour}.", "a ring.") for colour in colours])
    monkeypatch.setattr(shapes, "make_pair", lambda rng, world: next(drawn))
    examples = read_examples(str(shapes.write_pairs(tmp_path / "x", 3)))
    for example, colour in zip(examples, colours, strict=True):
        pixel = Image.open(*example.images).getpixel((8, 8))
        assert pixel == pytest.approx(shapes.COLOURS[colour], abs=40)
        assert (example.chosen, example.rejected) == (f"a {colour}.", "a ring.")
        assert texts_of(example.question) == [train.BUNNY_SYSTEM, "Describe the picture."]


def test_exam_asks_five_questions_a_scene_and_habit_is_no_help():
    """Whoever answers from habit must fail, and no scene may be one of the training pairs'."""
    exam, habitual = shapes.make_exam(200), []
    for five in train.split(exam, 5):
        scenes, images, (describe, present, absent, true, false) = zip(*five)
        scene = scenes[0]
        assert len({*map(id, scenes)}) == len({*map(id, images)}) == 1
        assert describe == ("describe",) and present[0] == absent[0] == "colour"
        assert present[1] in scene and absent[1] not in scene
        assert shapes.claims_of(scene, true) is True and shapes.claims_of(scene, false) is False
        habitual.append(scene[present[1]][0] == shapes.HABIT[present[1]])
    assert statistics.mean(habitual) == pytest.approx(1 / 6, abs=0.1)
    of_pairs = [[*shapes.random_scene(random.Random(f"pairs {seed}"))] for seed in range(4)]
    assert [[*shapes.make_exam(1, seed)[0][0]] for seed in range(4)] != of_pairs


def test_area_under_curve_by_hand():
    """Positives 2, 3 against negatives 1, 2: 3 wins and a tie of 4 pairs."""
    assert shapes.area_under_curve([2, 1, 3, 2], [True, False, True, False]) == 3.5 / 4


def kept(monkeypatch, module, name):
    """A list that grows by what module.name returns."""
    results, function = [], getattr(module, name)

    def keep(*args):
        results.append(function(*args))
        return results[-1]

    monkeypatch.setattr(module, name, keep)
    return results


def test_packed_questions_of_the_base_model_are_blind_to_each_other(bunny, monkeypatch):
    """A base that sees the answer that it learns, or another question's, learns to copy, and not to look. Two
    images with three questions each, against the library's call on one at a time, as it is asked later."""
    model, processor = train.load_model(str(bunny))
    alone, learned, cross_entropy = copy.deepcopy(model), [], tiny_bunny.F.cross_entropy
    talk, shown = (
        kept(monkeypatch, tiny_bunny, "question_and_answer"),
        kept(monkeypatch, tiny_bunny, "pixels"),
    )
    note = lambda logits, targets: learned.append(logits.detach()) or cross_entropy(logits, targets)
    monkeypatch.setattr(tiny_bunny.F, "cross_entropy", note)
    world, rng = shapes.SMALL._replace(base_steps=1), random.Random(0)
    tiny_bunny.learn_to_answer(model.train(), processor, rng, world, n_scenes=2, questions=3)
    expected = []
    for i, (question, answer) in enumerate(talk):
        tokens = data.tokenize(processor, pair(question, answer, "none.", noise(1), noise(2)))
        n = len(tokens.responses["chosen"])
        ids = data.encode(processor, [tokens.wholes["chosen"]], [(noise(1),)])["input_ids"]
        with torch.no_grad():
            logits = alone(ids, shown[0][i // 3 : i // 3 + 1]).logits
        expected.append(logits[0, -n - 1 : -1])
    assert len(talk) == 6 and len(learned) == 1
    torch.testing.assert_close(learned[0], torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_miniature_study_runs_restarts_and_shows_the_robust_sign(tmp_path, monkeypatch, on_the_cpu):
    """Plumbing of the study, shortened, on the base kept in examples/. The one sign that no seed flips: mDPO
    tells images apart better than DPO, whose loss never sees a second image. An answer or a leaning held to
    another question is malformed, or at chance."""
    write_pairs = shapes.write_pairs
    monkeypatch.setattr(miniature, "PAIRS", 128)
    monkeypatch.setattr(miniature, "HELD_OUT", 64)
    monkeypatch.setattr(
        shapes, "write_pairs", lambda to, n, *rest: write_pairs(to, {200: 24}.get(n, n), *rest)
    )
    flags = "--epochs 1 --lr 3e-3 --lora-rank 16 --lora-alpha 32 --batch-size 16 --micro-batch-size 16"
    flags += " --workers 0 --no-checkpointing --eval-size 64 --limit 192"
    monkeypatch.setattr(miniature, "COMMON", flags)
    threads = torch.get_num_threads()
    miniature.prepare_seed(tmp_path, 0)
    base, dpo, mdpo = results = [miniature.run_method(tmp_path, 0, of, 10) for of in ("base", "DPO", "mDPO")]
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trained again"))
    assert results == [miniature.run_method(tmp_path, 0, of, 10) for of in ("base", "DPO", "mDPO")]
    torch.set_num_threads(threads)
    assert mdpo["image_accuracy"] > dpo["image_accuracy"] and "margin_no_image_share" in dpo
    assert base["malformed"] < 0.05 and base["yes_no_auc"] > 0.75


def test_an_undertrained_base_is_not_used_and_results_of_another_exam_are_not_taken(tmp_path, monkeypatch):
    """A base that does not look when asked makes all methods look alike. More held-out scenes are asked for
    because fewer were too few."""
    monkeypatch.setattr(miniature, "load_tuned", lambda *arguments: (None, None))
    monkeypatch.setattr(miniature, "examine", lambda *args: {"yes_no_auc": 0.76, "n": len(args[-1])})
    threads = torch.get_num_threads()
    assert [miniature.run_method(tmp_path, 5, "base", n)["n"] for n in (1, 2, 1)] == [5, 10, 5]
    monkeypatch.setattr(miniature, "examine", lambda *args: {"yes_no_auc": 0.74})
    with pytest.raises(BadInput, match="sees too little"):
        miniature.run_method(tmp_path, 6, "base", 1)
    torch.set_num_threads(threads)
    assert not [*(tmp_path / "seed-6" / "base").glob("result*")]


def test_curves_are_nats_and_end_where_training_ends(tmp_path):
    """Rewards are beta times nats: -0.3 at beta 0.1 is -3 nats. Records of training steps are no points of a
    curve."""
    name = lambda loss, chosen, accuracy: {"eval/loss": loss, "eval/rewards/chosen": chosen,
                                           "eval/rewards/image_accuracies": accuracy}  # fmt: skip
    records = [name(2.0, 0.0, 0.0), {"loss": 1.0}, name(1.0, -0.3, 0.75)]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    expected = {"chosen_curve": pytest.approx([0, -3]), "chosen": pytest.approx(-3)}
    assert miniature.curves(tmp_path) == expected | {
        "image_accuracy_curve": [0, 0.75],
        "image_accuracy": 0.75,
    }


def test_summary_is_mean_and_standard_deviation_of_the_seeds():
    """1 and 2: a mean of 1.5; squared distances 0.25 + 0.25, over one degree of freedom: sqrt(0.5)."""
    summary = miniature.summarize({"0": {"x": {"a": 1, "curve": [1]}}, "1": {"x": {"a": 2, "curve": [2]}}})
    assert summary == {"x": {"a": pytest.approx([1.5, 0.5**0.5])}}


STUDY = json.loads((ROOT / "examples" / "miniature.json").read_text())["seeds"]
LARGE = json.loads((ROOT / "examples" / "miniature_large.json").read_text())
LARGE_STUDY, LARGE_SUMMARY = LARGE["seeds"], LARGE["summary"]


def test_tables_of_the_study_fit_a_screen():
    """Ten columns side by side were 220 characters wide, which nobody could read. Here all 18 methods."""
    text = miniature.tables({method: LARGE_SUMMARY["mDPO"] for method in miniature.METHODS})
    assert max(map(len, text.splitlines())) <= 100
    heads, cells = [], []
    for table in text.strip("\n").split("\n\n"):
        head, *rows = table.splitlines()
        heads += head.split()
        assert [row[:20].strip() for row in rows] == [*miniature.METHODS] and len(
            {row[20:] for row in rows}
        ) == 1
        cells += re.findall(r"(\S+ \+-\S+)", rows[0])
    assert heads == ["hallucination", "chair_s", "false_premise", "yes_no", "grounding", "malformed",
                     "length", "chosen", "image_accuracy", "no_image_share"]  # fmt: skip
    assert cells == ["{:.3f} +-{:.3f}".format(*LARGE_SUMMARY["mDPO"][name]) for name in miniature.COLUMNS]


def of_seeds(method, metric, study=STUDY):
    return [methods[method][metric] for methods in study.values()]


def mean_of(method, metric, study=STUDY):
    return statistics.mean(of_seeds(method, metric, study))


def spread_of(method, metric):
    return statistics.stdev(of_seeds(method, metric))


def test_readme_table_of_the_miniature_is_in_its_json():
    """A table that no longer is what the runs gave. Means and standard deviations (n - 1) of the five
    seeds."""
    names = ["hallucination_rate", "chair_s", "false_premise", "yes_no", "grounding", "malformed", "chosen"]
    names.append("image_accuracy")
    _, *rows = table_below("| | hallucination ")
    assert len(rows) == 11 and len(STUDY) == 5
    for method, *cells in rows:
        method = method.replace("`", "")
        for name, cell in zip(names, cells, strict=True):
            if name not in STUDY["0"][method] or (name == "image_accuracy" and "No Image" in method):
                assert cell == ""
                continue
            form = "{:+.1f}±{:.1f}" if name == "chosen" else "{:.2f}±{:.2f}"
            expected = form.format(mean_of(method, name), spread_of(method, name))
            assert cell == (expected if name == "chosen" else expected.replace("0.", "."))


def sentence(pattern):
    """The numbers in examples/README.md where `pattern` is, line breaks taken as spaces; N stands for a
    number."""
    pattern = re.escape(pattern).replace("N", r"([-+]?\d*\.?\d+)").replace(r"\ ", r"\s+")
    return [float(number) for number in re.search(pattern, EXAMPLES_README).groups()]


def near(numbers, digits=2):
    return [pytest.approx(number, abs=0.5 * 10**-digits + 1e-9) for number in numbers]


def table_below(head):
    """The rows of the table in examples/README.md whose head starts so: lists of cells."""
    rows = EXAMPLES_README[EXAMPLES_README.index(head) :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "---" not in row]


def test_readme_sentences_about_the_miniature_are_in_its_json():
    """Conclusions that the runs no longer bear out."""
    grounding = lambda method, study=STUDY: mean_of(method, "grounding", study)
    assert [mean_of("DPO", "margin_no_image_share")] == near(sentence("(N of it is left without one)"))
    falls = [-value for value in of_seeds("DPO", "chosen")]
    assert [min(falls), max(falls)] == near(sentence("falls by N to N nats under DPO"), 1)
    assert [mean_of("mDPO", "margin_no_image_share")] == near(sentence("It is N, since all methods learn"))
    base_and_dpo = [f(method, "grounding") for method in ("DPO", "base") for f in (mean_of, spread_of)]
    assert base_and_dpo == near(sentence("(grounding N ± N against N ± N)"))

    said = sentence("With N of the N pairs and as many steps, grounding is N for mDPO and N for DPO")
    assert said[1] == miniature.PAIRS
    assert [grounding(f"{method}, {said[0]:.0f} pairs") for method in ("mDPO", "DPO")] == near(said[2:])
    ablations = {name: grounding(name) for name in miniature.ORDERS}
    assert min(ablations, key=ablations.get) == "minus conditional"  # it does most
    assert mean_of("minus anchored", "chosen") < 0  # without the anchor
    assert mean_of("minus anchored", "malformed") > mean_of("mDPO", "malformed")
    assert max(ablations, key=ablations.get) == "random image"
    assert round(ablations["random image"], 2) == round(grounding("mDPO"), 2)  # it does as well as a crop


def test_readme_sentences_about_the_larger_world_are_in_its_json():
    """Table 2's order is the paper's in both seeds; of Table 3's, by MMHal-Bench's score, the first alone."""
    for seed in LARGE_STUDY.values():
        values = [seed[name]["grounding"] for name in ("mDPO", "minus anchored", "minus conditional", "DPO")]
        assert values == sorted(values, reverse=True)
    order = ("mDPO", "crop 20-50%", "MoCo v2", "random image")
    first, *grounding = [mean_of(method, "grounding", LARGE_STUDY) for method in order]
    assert first > max(grounding) == grounding[-1]
    assert (
        "Table 2's order of grounding is the paper's in both seeds. Of Table 3's order only the first" in SAID
    )


def test_predictions_held_as_the_readme_says():
    """Of nine, four held in all seeds, four in four of five, and the last in none."""
    verdicts = miniature.verdicts(STUDY, miniature.summarize(STUDY)).splitlines()
    held = {line.partition(" seeds: ")[2]: int(line.split()[0]) for line in verdicts}
    claims = [*miniature.PREDICTIONS]
    assert sorted(held[claim] for claim in claims) == [0, 4, 4, 4, 4, 5, 5, 5, 5] and len(held) == 9 + 5
    assert held["under half of mDPO's margin survives without the image"] == 0 == held[claims[8]]
    in_all = ("mDPO is below DPO in hallucination", "mDPO is above minus conditional in grounding")
    assert {held[claim] for claim in in_all} == {5} and held["mDPO is above minus anchored in grounding"] == 2
    assert "Nine predictions were made. Four held in all five seeds, and four in four of five." in SAID
    assert "The ninth failed in all: that less than half of mDPO's margin is left without the image." in SAID


def test_each_world_has_a_folder_of_its_own(monkeypatch):
    """Bases and runs that are there are used again: the large world's table would hold the small one's."""
    folders = []

    def stop(self, function, out, *more):
        folders.append(str(out[0]))
        raise BadInput("enough")

    monkeypatch.setattr(miniature.ProcessPoolExecutor, "map", stop)
    for flags in ("--quick", "--quick --world large", "--quick --world large --out mine"):
        assert run_command(miniature.run, flags.split()) == 2
    assert folders == ["runs/miniature", "runs/miniature-large", "mine"]


def test_methods_of_the_study_are_the_readmes():
    """The README's table of flags, and what the study ran under the same names."""
    rows = dict(re.findall(r"^\| (?:Table \d, |Fig. \d, )?(.*?) \| `(--.*?)`", README, re.MULTILINE))
    ran = {"MoCo v2 augmentation": "MoCo v2", "anchors on `y_w` and `y_l`": "anchors y_w, y_l"}
    ran |= {name: name for name in miniature.METHODS if name in rows}
    assert {name: miniature.METHODS[of] for name, of in ran.items()} == {name: rows[name] for name in ran}
    image_too = rows["all three"].replace(" rejected", "")  # as the README says
    assert (
        miniature.METHODS["anchors y_w, m_l"] == image_too
        and len(ran) == 8
        and miniature.METHODS["mDPO"] == ""
    )


# The template of LLaVA-OneVision writes another white space before an answer than for one to come.
IN_TRAINING = {"llava_onevision": ("<|im_start|>assistant\n", "<|im_start|>assistant \n")}


@pytest.mark.parametrize("name", ["bunny", "llava", *families.FAMILIES])
def test_a_model_is_asked_as_it_was_trained(name, request):
    """In other words than those of training, another model is asked. What answer.py gives the model is the
    beginning of the row, as text: tokens may merge where an answer begins."""
    if name in families.FAMILIES:
        _, processor = families.FAMILIES[name]()
    else:
        processor = train.load_processor(str(request.getfixturevalue(name)))
    written, in_training = IN_TRAINING.get(name, ("", ""))
    system, answer = message("system", "Be brief."), message("assistant", "Hello!")
    turns = [system, *asked("Which?", 2), answer, *asked("Why?", 0)]
    for question, images in (asked("What is in it?"), [noise(1)]), (turns, [noise(1), noise(2)]):
        batch = make_batch([pair(question, "There is one.", "No.", images, images)], processor)
        prompt = answering.chat_prompt(processor, question, len(images))
        (asked_with,) = processor.tokenizer.batch_decode(
            data.encode(processor, [prompt], [images])["input_ids"]
        )
        before = asked_with.removesuffix(written) + in_training
        row = processor.tokenizer.decode(batch.inputs["input_ids"][0])
        assert asked_with.endswith(written) and row.startswith(before)
        assert re.fullmatch(r" ?There is one\.<\S+>", row.removeprefix(before))


def test_a_template_that_takes_text_and_no_parts_is_asked(bunny):
    """Models whose template wants a message as text, where it shows no image, train; so they can be asked."""
    processor = train.load_processor(str(bunny))
    processor.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{{ bos_token }}"
    assert answering.chat_prompt(processor, "What?", 0) == "What? <|endoftext|>"


def test_answers_do_not_depend_on_the_batch(loaded):
    """Left padding gone wrong changes what a model says about an image when another is asked beside it."""
    model, processor = loaded
    questions = [(pair.images, pair.question) for pair in PAIRS]
    together = generate_answers(model, processor, questions, 8)
    assert not model.training  # under checkpointing, one in training mode forgets its cache
    assert together == [generate_answers(model, processor, [question], 8)[0] for question in questions]
    assert together == generate_answers(model, processor, questions, 8, batch_size=2)
    assert len(set(together)) == 3
    assert not any(text in answer for (_, text), answer in zip(questions, together))
    model.train()


def grey(level):
    return Image.new("RGB", (8, 8), (level, level, level))


def randomly_adapted(folder, std=0.2):
    """A model with an adapter that changes what it says; peft's own starts as no change."""
    model, processor = with_lora(folder)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
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
        status = run_command(evaluate.run, [*map(str, argv)])
        out, err = capsys.readouterr()
        return out if status == 0 else err.splitlines()[-1]

    return evaluated


def test_evaluation_of_a_runs_held_out_pairs_is_its_log(bunny, tmp_path, evaluated):
    """A finished adapter must get the numbers of its run: its loss, crops, seed and length, none of them the
    default here. The demo's file must hold the pairs that the run held out."""
    path, out = shapes.write_pairs(tmp_path / "data", 14), tmp_path / "out"
    flags = "--eval-size 5 --limit 12 --beta 0.3 --delta 0.1 --crop 0.3 0.6 --seed 5 --epochs 1 --lr 3e-2"
    more = "--anchors chosen image_rejected --max-length 90".split()
    assert train.main(command(bunny, path, out, *flags.split(), *more)) == 0
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


def test_evaluation_takes_the_loss_of_its_run(finished, tmp_path, evaluated):
    """DPO has one term. An adapter without args.json, such as another program's, counts as mDPO's, with the
    paper's beta. An unknown loss is refused; and CHiP's has no part without an image."""
    run = shutil.copytree(finished, tmp_path / "run")
    began = json.loads((run / "args.json").read_text())
    (run / "args.json").unlink()
    assert {"loss/dpo", "loss/conditional", "loss/anchor"} <= printed(evaluated(run)).keys()
    write(run / "args.json", began | {"no_conditional": True, "anchors": ["none"]})
    found = printed(evaluated(run))
    assert found["loss"] == found["loss/dpo"] and "loss/anchor" not in found
    assert found["margin, image"] == found["rewards/margins"] and found["rewards/margins"][0] != 0
    assert "rewards/image_margins" in found  # under DPO it shows how much the image counts
    write(run / "args.json", began | {"no_image": True, "anchors": ["none"]})
    found = printed(evaluated(run))  # it never saw an image
    assert found["margin, no image"] == found["rewards/margins"] and "rewards/image_margins" not in found
    write(run / "args.json", "{")
    assert evaluated(run).startswith(f"error: {run}/args.json: cannot be read")
    for loss, flags, reason in ("mine", [], "'mine'"), ("chip_loss", ["--no-image"], "image_rejected"):
        write(run / "args.json", began | {"loss": loss})
        error = evaluated(run, *flags)
        assert error.startswith(f"error: the run's loss, {loss}") and reason in error


def test_margins_without_the_image_and_with_anothers_by_hand(bunny, tmp_path):
    """The share is what the study reports. Each margin is taken alone here, in a packed row: beta times the
    policy's log p(y_w) - log p(y_l), less the reference's. Five examples in batches of two; the other image
    is the next one's."""
    model, processor = randomly_adapted(bunny)
    examples = as_examples(tmp_path, 5)
    own = [one.images for one in examples]

    @torch.no_grad()
    def margin(one, images):
        one = one._replace(images=tuple(map(open_image, images)))
        batch = pack(make_batch([one], processor, names=DPO_NAMES))
        policy = response_logps(model, batch)
        with model.disable_adapter():
            ref = response_logps(model, batch)
        return 0.5 * ((policy.chosen - policy.rejected) - (ref.chosen - ref.rejected)).item()

    shown = {"image": own, "no_image": [()] * 5, "other_image": [*own[1:], own[0]]}
    found = evaluate.score_margins(model, processor, examples, beta=0.5, batch_size=2)
    assert found.keys() == shown.keys() and len({round(values[0], 4) for values in found.values()}) == 3
    for name, images in shown.items():
        assert found[name] == pytest.approx([*map(margin, examples, images)], rel=1e-3, abs=1e-5)


def test_margins_compare_the_same_texts(bunny, tmp_path):
    """Cut at a length that counts the image, an answer would be longer without one; and the next example's
    image may leave no room at all. These answers differ in their last word alone, after 2,048 tokens."""
    long = "a red circle " * 700
    drawn = as_examples(tmp_path, 2)
    examples = [one._replace(chosen=f"{long}here", rejected=f"{long}there") for one in drawn]
    margins = evaluate.score_margins(*randomly_adapted(bunny), examples)
    assert [len(values) for values in margins.values()] == [2, 2, 2]


def test_share_of_a_margin_that_is_left():
    """By hand: 1 is half of a mean of 2, 4 is its double; no margin has a share."""
    found = evaluate.diagnose({"image": [1.0, 3.0], "no_image": [1.0, 1.0], "other_image": [4.0]})
    shares = {"no_image_share": 0.5, "other_image_share": 2}
    assert found == {"image": 2, "no_image": 1, "other_image": 4} | shares
    for none in ([], [0.0]):
        found = evaluate.diagnose({"image": none, "no_image": [1.0], "other_image": none})
        assert math.isnan(found["no_image_share"]) and math.isnan(found["other_image_share"])


def test_another_image_is_another_file(tmp_path):
    """Many data sets ask several questions in a row about one image: the next example's image is then the
    example's own, and the margin with "another" image is the margin itself. A link is no other file. A
    question that shows one image cannot be asked about two."""
    a, b, c, link = (str(tmp_path / name) for name in ("a", "b", "c", "link"))
    Path(link).symlink_to(a)
    images = ((a,), (link,), (a, b), (b, c), (b,), (a,), (), ())
    examples = [Example("What is it?", "A circle.", "No.", of_one) for of_one in images]
    found = [evaluate.another_image(examples, index) for index in range(8)]
    # The only other one of two images shares one with example 2, and texts have no image to exchange.
    assert found == [(b,), (b,), None, None, (a,), (b,), None, None]


def test_bootstrap_interval_by_hand():
    """An interval that is too narrow makes chance look like an effect. Equal values have none. The mean of
    two draws of {0, 1} is 0 or 1 with chance 1/4 each, so 95% reach from 0 to 1. The mean of 100 draws from
    50 zeros and 50 ones has a standard deviation of 0.05: 0.5 -+ 1.96 * 0.05."""
    assert evaluate.bootstrap([0.25] * 7) == [0.25, 0.25] and evaluate.bootstrap([0.0, 1.0]) == [0, 1]
    even = evaluate.bootstrap([0.0, 1.0] * 50)
    assert even == pytest.approx([0.402, 0.598], abs=0.011)
    assert even == evaluate.bootstrap([0.0, 1.0] * 50)  # seeded
    low, high = evaluate.bootstrap([0.0] * 95 + [1.0] * 5)
    assert 0 <= low < 0.02 and 0.08 < high < 0.11  # 0.05 -+ 0.043, pushed to the right


RECORD = {"prompt": "What?", "chosen": "A red circle.", "rejected": "No."}


TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
    {"role": "assistant", "content": "A red one."},
    {"role": "user", "content": [{"type": "text", "text": "And this:"}, {"type": "image"}]},
]


@pytest.fixture
def mixed(tmp_path):
    """A file of one image, two in chat messages, one again, and none."""
    for name in "abcd":
        noise(ord(name)).save(tmp_path / f"{name}.png")
    two = RECORD | {"prompt": TURNS, "images": ["a.png", "b.png"]}
    return write(tmp_path / "x.json", [RECORD | {"image": "c.png"}, two, RECORD | {"image": "d.png"}, RECORD])


def test_evaluation_of_several_images_chat_messages_and_none(mixed, finished, evaluated):
    """What can be trained on can be scored. Without images the terms that need one are left out; what has no
    other image has no margin with one."""
    out = evaluated(finished, data=mixed)
    assert "dropped 1 bad records" in out and "record 4: has no image path" in out and "\n3 examples" in out
    assert "(2 examples)" in re.search("margin, other image.*", out)[0] and out.count("(2 examples)") == 1
    found = printed(out := evaluated(finished, "--no-image", data=mixed))
    assert "\n4 examples" in out and out.count(" n/a\n") == 2 and "nan" not in out
    assert re.search("margin, other image +n/a\n", out) and not any("image_" in name for name in found)
    assert found["margin, no image"] == found["rewards/margins"] and found["rewards/margins"][0] != 0
    assert found["loss"][0] == pytest.approx(found["loss/dpo"][0] + found["loss/anchor"][0], abs=2e-4)
    assert "\n1 examples" in evaluated(finished, "--limit", "1", data=mixed)


def test_mistakes_of_the_looking_commands_are_one_line(bunny, mixed, tmp_path, capsys):
    """A wrong flag or file is one line and status 2."""
    base, there = f"--model {bunny} --data {mixed}", tmp_path / "there.png"
    noise(1).save(there)
    text = write(tmp_path / "text.json", [RECORD])
    wrong = [
        (evaluate, base, "--adapter"),
        (evaluate, f"{base} --adapter {tmp_path}", "holds no adapter"),
        (words, f"{base} --to {there}", "already exists"),
        (words, f"--model {bunny} --data {text} --to {tmp_path}/x.html", "no example is left"),
        (words, "study one", "study takes numbers of seeds"),
        (curves, f"{tmp_path} --to {tmp_path / 'x.png'}", "metrics.jsonl: cannot be read"),
        (curves, f"{tmp_path}", "--to"),
    ]
    for script, arguments, reason in wrong:
        if script is not curves or importlib.util.find_spec("matplotlib"):
            assert run_command(script.run, arguments.split()) == 2
            err = capsys.readouterr().err
            assert reason in err.splitlines()[-1] and err.count("error: ") == 1  # under the library's bar


@torch.no_grad()
def token_logps(model, processor, pair, images, name):
    """log p of each token of a response, by the library's call on one whole sequence: all labels but that
    token's are masked."""
    tokens = data.tokenize(processor, pair)
    whole = data.encode(processor, [tokens.wholes[name]], [images])
    ids, n = whole["input_ids"][0], len(tokens.responses[name])
    labels = torch.full((n, len(ids)), -100)
    labels[range(n), range(len(ids) - n, len(ids))] = ids[-n:]
    return sequence_logps(model(**whole, use_cache=False).logits.expand(n, -1, -1), labels)


def test_numbers_of_the_words_are_those_of_the_librarys_own_call(bunny):
    """A number at the wrong word, or of the wrong model, shows a model that looks where it does not. One
    image, two in chat messages, none."""
    model, processor = randomly_adapted(bunny)
    two = [noise(1), noise(2)], [noise(3), noise(4)]
    turns = data.read_question(TURNS, 2, data.forbidden(None))
    for one in PAIRS[0], pair(turns, "There is a red circle.", "No.", *two), pair(*PAIRS[1][:3]):
        rows, totals = iter(words.rows_of(model, processor, one)), set()
        for name, side in itertools.product(("chosen", "rejected"), ("base", "tuned")):
            with model.disable_adapter() if side == "base" else contextlib.nullcontext():
                with_m_w = token_logps(model, processor, one, one.images, name)
                expected = with_m_w - token_logps(model, processor, one, one.images_rejected, name)
            title, found = next(rows)
            texts, values = zip(*found)
            assert values == pytest.approx(expected.tolist(), abs=2e-4)
            assert "".join(texts) == f" {getattr(one, name)}<|endoftext|>"
            assert title.startswith(f"{name}, {side}: ")
            totals.add(total := float(title.split()[-1]))
            assert total == pytest.approx(sum(values), abs=0.006)
        assert not [*rows] and len(totals) == (4 if one.images else 1)
    rows = words.rows_of(model.get_base_model(), processor, PAIRS[0])
    assert [title.partition(":")[0] for title, _ in rows] == ["chosen, base", "rejected, base"]


def test_a_character_of_several_tokens_is_shown_once(bunny):
    """Byte-level tokens are parts of a character; each alone would be shown as a question mark."""
    tokenizer = train.load_processor(str(bunny)).tokenizer
    texts = words.token_texts(tokenizer, ids := tokenizer(" a 猫 é").input_ids)
    assert len(texts) == len(ids) > 4 and "".join(texts) == " a 猫 é" and "\ufffd" not in texts


ROWS = [("chosen, base: +1.50", [(" <i>", 3.0), (" red", -1.5), (".", 0.0)])] * 2


def test_page_of_words_has_no_markup_of_the_data_and_the_pictures_inside():
    """A page is sent to others: it must show the data, not run it, and need no second file. Colours by hand:
    3 nats are the full blue (90, 150, 255), -1.5 half of the red (255, 110, 100). A legend from full red over
    white to full blue comes first."""
    head, page = words.as_page(
        [("7&", pair(asked("Is <b> it?"), "a", "b", grey(10), grey(200)), ROWS)]
    ).split("<h2>")
    assert page.startswith("7&amp; / Is &lt;b&gt; it?</h2>") and "script" not in head + page
    spans = re.findall(r'<span style="background: rgb(\(.*?\))" title="(.*?)">(.*?)</span>', page)
    blue, white = "(90, 150, 255)", "(255, 255, 255)"
    row = [(blue, "+3.00", " &lt;i&gt;"), ("(255, 182, 178)", "-1.50", " red"), (white, "+0.00", ".")]
    assert spans == 2 * row
    pictures = re.findall(r'base64,(.*?)"><figcaption>(.*?)<', page)
    levels = [Image.open(io.BytesIO(base64.b64decode(code))).getpixel((5, 5))[0] for code, _ in pictures]
    assert levels == [10, 200] and [caption for _, caption in pictures] == ["image", "rejected image"]
    scale = re.findall(r'background: rgb(\(.*?\))" title="(.*?)"', head)
    assert scale[::3] == [("(255, 110, 100)", "-3.00"), (white, "+0.00"), (blue, "+3.00")] and len(scale) == 7


def test_page_begins_with_what_training_changed_most():
    """Of 80 examples nobody looks at more than a few. By hand: 2 nats up and 1 down in one answer are a
    change of 3; 1 up in each of two answers, of 2; without an adapter, all are 0 and stay in their order."""
    base, up, both = ([(" a", a), (" b", b)] for a, b in ((0.0, 1.0), (1.0, 1.0), (2.0, 0.0)))
    rows = lambda *answers: [row for words in answers for row in (("base", base), ("tuned", words))]
    shown = {
        "last": rows(base, base),
        "second": rows(up, up),
        "first": rows(both, base),
        "c": ROWS,
        "a": ROWS,
    }
    assert [words.change(rows) for rows in shown.values()] == [0, 2, 3, 0, 0]
    page = words.as_page([(name, pair(asked("q", 0), "a", "b"), rows) for name, rows in shown.items()])
    assert re.findall("<h2>(.*?) / q</h2>", page) == ["first", "second", "last", "c", "a"]


def test_words_command_writes_a_page_of_every_example(mixed, finished, bunny, tmp_path):
    """Chat messages, several images, none at all."""
    arguments = f"--model {bunny} --adapter {finished} --data {mixed} --to {tmp_path}/".split()
    for name, n, n_images, *flags in ("x.html", 3, 2 + 4 + 2), ("none.html", 4, 0, "--no-image"):
        assert run_command(words.run, [*arguments[:-1], arguments[-1] + name, *flags]) == 0
        page = (tmp_path / name).read_text()
        assert page.count("<img") == n_images and page.count("<h2>") == page.count("rejected, tuned") == n
        assert "Which? / And this:" in page or "Which? / A red one. / And this:" in page


def test_study_of_words_tells_colours_and_shapes_from_the_rest(monkeypatch, capsys):
    """Means by hand: (1 + 2) / 2 of colour and shape words, (4 + 0) / 2 of the others, times 1 for the base,
    2 for DPO and 3 for mDPO, and 10 times as much with another image; y_l is left out. On the CPU, whose
    digits are the README's."""
    times = {"base": 1, "DPO": 2, "mDPO": 3, "crop": 1, "random": 10}
    load = lambda model, run, device: (times[run.name if run else "base"], device)

    def differences(model, device, pair):
        assert device == "cpu"
        found = [(" red", 1.0), (" reddish", 4.0), ("ring", 2.0), (".", 0.0)]
        return {
            "chosen": [(text, value * model * pair) for text, value in found],
            "rejected": [(" red", 99.0)],
        }

    for name in ("prepare_seed", "run_method"):
        monkeypatch.setattr(miniature, name, lambda *args, **options: None)
    monkeypatch.setattr(words, "read_examples", lambda path, log: ["example"])
    monkeypatch.setattr(words, "load_tuned", load)
    monkeypatch.setattr(words, "Pairs", lambda examples, reject, seed: {("held out", 0): times[reject]})
    monkeypatch.setattr(words, "differences", differences)
    assert run_command(words.run, ["study", "4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    of = [
        (times[name] * times[m_l], m_l, name)
        for name in ("base", "DPO", "mDPO")
        for m_l in ("crop", "random")
    ]
    assert rows == [["4", m_l, name, f"{1.5 * n:.2f}", f"{2 * n:.2f}"] for n, m_l, name in of]


def test_curves_show_every_metric_of_the_readme():
    """A metric without a curve is a metric that nobody looks at. Memory is one number, not a curve."""
    table = README.split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = {name for row in rows for name in re.findall("`(.*?)`", row)}
    assert {*curves.METRICS} == names - {"peak_memory_gib"}


def test_curves_are_drawn_of_a_run_in_progress(tmp_path):
    """A line that is being written is not a broken log; a broken line before it is."""
    path, expected = tmp_path / "metrics.jsonl", [{"step": 0, "eval/loss": 2.0}, {"step": 1, "loss": 1.5}]
    whole = "".join(f"{json.dumps(record)}\n" for record in expected)
    for text in (whole, whole[:-1], whole + '{"step": 2, "lo'):
        path.write_text(text)
        assert curves.read_log(tmp_path) == expected
    for text in ("", '{"st', '{"st\n{"step": 1}\n'):
        path.write_text(text)
        with pytest.raises(BadInput, match="metrics.jsonl: cannot be read"):
            curves.read_log(tmp_path)


def test_curves_of_trl_are_read_under_the_names_of_train_py(tmp_path):
    """TRL calls a held-out loss eval_loss. Its line about the whole run has no metric of a step."""
    history = [
        {"eval_loss": 2.0, "eval_rewards/image_margins": 0.5, "step": 0},
        {"loss": 1.5, "learning_rate": 0.1, "grad_norm": 2.0, "rewards/chosen": 0.25, "step": 1},
        {"train_loss": 1.5, "train_runtime": 9.0, "step": 1},
    ]
    write(tmp_path / "trainer_state.json", {"log_history": history})
    first, second, _ = records = curves.read_log(tmp_path)
    assert first == {"eval/loss": 2.0, "eval/rewards/image_margins": 0.5, "step": 0}
    assert second == {"loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "rewards/chosen": 0.25, "step": 1}
    assert curves.points(records, "loss") == ([1], [1.5])
    write(tmp_path / "trainer_state.json", {"log_history": []})
    with pytest.raises(BadInput, match="trainer_state.json: cannot be read: holds no step yet"):
        curves.read_log(tmp_path)


def test_an_accuracy_before_training_is_no_point():
    """Before training all margins are 0, and none is above 0: an accuracy of 0 looks like a fall to chance's
    opposite. Later a margin of 0.1 with an accuracy of 0 is one, and so is a margin of 0."""
    start = {"step": 0, "eval/rewards/margins": 0.0, "eval/rewards/accuracies": 0.0}
    later = {"step": 9, "eval/rewards/margins": 0.1, "eval/rewards/accuracies": 0.0}
    assert curves.points([start], "eval/rewards/accuracies") == ([], [])
    assert curves.points([start, later], "eval/rewards/accuracies") == ([9], [0.0])
    assert curves.points([start, later], "eval/rewards/margins") == ([0, 9], [0.0, 0.1])


def test_curves_have_a_colour_a_run_and_points_where_held_out(finished, tmp_path):
    """Curves under a wrong name are worse than none. The second run is DPO's: it lacks a term."""
    pytest.importorskip("matplotlib")
    first = [
        {"step": 0, "eval/loss": 2.0},
        {"step": 1, "loss": 1.5, "loss/conditional": 0.5, "eval/loss": 1.0},
    ]
    figure = curves.draw({"a": first, "b": [{"step": 3, "loss": 0.5, "lr": 0.1, "eval/rewards/chosen": 0.7}]})
    drawn = {axis.get_title(): [f"{line.get_color()} {line.get_marker()} {line.get_xydata().tolist()}"
                                for line in axis.lines if len(line.get_xdata())]
             for axis in figure.axes}  # fmt: skip
    assert drawn == {  # and no panel that nobody logged
        "loss": ["C0 None [[1.0, 1.5]]", "C0 o [[0.0, 2.0], [1.0, 1.0]]", "C1 None [[3.0, 0.5]]"],
        "loss/conditional": ["C0 None [[1.0, 0.5]]"],
        "rewards/chosen": ["C1 o [[3.0, 0.7]]"],
        "lr": ["C1 None [[3.0, 0.1]]"],
    }
    (legend,) = figure.legends
    colours = [
        (text.get_text(), line.get_color()) for text, line in zip(legend.get_texts(), legend.legend_handles)
    ]
    assert colours == [("a", "C0"), ("b", "C1"), ("held-out examples", "k")]
    assert run_command(curves.run, [str(finished), str(finished), "--to", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size[0] == 1620


@pytest.fixture
def tiny(monkeypatch):
    """Sizes and texts at which a comparison takes a second -> the arguments of a comparison."""
    shape = throughput.phi(32, 64, 1, 2, 600), throughput.siglip(32, 64, 1, 2, 32, 8)
    monkeypatch.setitem(throughput.SHAPES, "tiny", shape)
    pairs = [
        pair("there is a red", "circle and blue square " * 2, "here the", noise(1), noise(2)),
        pair("picture of", "on in", "with small large near " * 3, noise(3), noise(4)),
    ]
    monkeypatch.setattr(throughput, "make_pairs", lambda n: [pairs[i % 2] for i in range(n)])
    monkeypatch.setattr(throughput, "LEARNING_RATE", 1e-3)
    return Namespace(shape="tiny", device="cpu", device_name="CPU", dtype=torch.float32, items=4, rounds=1,
                     micro_batch_size=2, trl=False, json=None)  # fmt: skip


@pytest.fixture
def timed(monkeypatch):
    """The steppers that are timed against each other, {name: stepper}, in place of their timing: ours takes
    half a second a step, the others two."""
    steppers = {}

    def in_turns(timed, n_batches, rounds):
        for stepper in timed:
            steppers[stepper.name] = stepper
            stepper.times = [0.5 if stepper.name == "ours" else 2.0]
        return {"authors": {"median": 4.0, "low": 2.0, "high": 5.0}}

    monkeypatch.setattr(throughput, "in_turns", in_turns)
    return steppers


def what_a_step_does(stepper):
    """One step, watched: which layers, passes, images, tokens, masks and logits it has."""
    model, did = stepper.model.get_base_model(), defaultdict(list)
    decoder = model.get_decoder()
    layer = decoder.layers[0]

    def note(module, given, options):
        if module is decoder:
            did["tokens"].append(options["inputs_embeds"].shape[:2].numel())
            did["gradient"].append(torch.is_grad_enabled())
        elif module is layer:
            did["autocast"].append(torch.is_autocast_enabled("cpu"))
            did["masks"].append("blocks" if "blocks" in options else type(options["attention_mask"]))
        elif module is model.lm_head:
            did["logits"].append(given[0][..., 0].numel())
        else:
            did[module].append(len(given[0] if given else options["pixel_values"]))

    tower = model.model.vision_tower
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True)
             for module in (decoder, layer, layer.mlp, tower, model.lm_head)]  # fmt: skip
    stepper.step()
    for hook in hooks:
        hook.remove()
    assert all(p.isfinite().all() for p in stepper.parameters)  # nan, where two models share how they attend
    return {
        "LoRA": {type(module) for module in model.modules() if hasattr(module, "lora_A")},
        "activation": type(layer.mlp.activation_fn).__name__,
        "checkpointing": len(did[layer.mlp]) > len(did["tokens"]),
        "images": sum(did[tower]),
        "tokens": did["tokens"],
        "logits": did["logits"],
        "gradient": sorted(did["gradient"]),
        "autocast": {*did["autocast"]},
        "masks": {*did["masks"]},
    }


def ours_at_identical_settings(stepper):
    """Two passes, of which the reference's has no gradient, over one packed row; four images, each encoded
    once."""
    batch = next(stepper.batches)
    return {
        "LoRA": {train.LoraLinear},
        "activation": "GELUTanh",
        "checkpointing": True,
        "images": 4,
        "tokens": [len(batch.take)] * 2,
        "logits": [len(batch.answers)] * 2,
        "gradient": [False, True],
        "autocast": {False},
        "masks": {"blocks"},
    }


def authors_at_identical_settings(ours, stepper):
    """Two passes over six rows without a mask, three images an example each, logits of every position."""
    rows = next(stepper.batches).labels
    assert len(rows) == 6
    return ours | {
        "images": 12,
        "masks": {type(None)},
        "tokens": [rows.numel()] * 2,
        "logits": [rows.numel()] * 2,
    }


def test_throughput_compares_like_with_like_at_identical_settings(tiny, timed, monkeypatch):
    """Settings called identical are the README's first claim: the same checkpointing, LoRA layers and
    activation on all sides, no mask for the authors' rows, and not a pass or an image more than theirs. TRL
    gets a model of its own: its constructor would make the authors' rows go back through the frozen tower,
    too. Two examples in half a second are 4 a second; 30 000 of these take 7500 s."""
    stood_on = []
    rival = lambda model, *rest: stood_on.append(model) or (make_batch, throughput.authors_losses)
    monkeypatch.setattr(throughput, "trl_rival", rival)
    tiny.trl = True
    result = throughput.compare(tiny, identical=True)
    assert result["settings"] == "identical" and result["speedup"]["authors"]["median"] == 4
    assert result["examples_per_second"] == {"ours": 4, "authors": 1, "trl": 1}
    assert result["hours_for_10k_x_3"] == pytest.approx(7500 / 3600)
    assert stood_on == [timed["trl"].model] and len({stepper.model for stepper in timed.values()}) == 3
    for stepper in timed.values():  # a model made later must not change the attention of one made before: nan
        losses = stepper.losses(stepper.model, next(stepper.batches))
        assert losses.tolist() == pytest.approx([3 * math.log(2)] * 2)
    ours = ours_at_identical_settings(timed["ours"])
    assert what_a_step_does(timed["ours"]) == ours
    for name in ("authors", "trl"):
        assert what_a_step_does(timed[name]) == authors_at_identical_settings(ours, timed[name])


def test_throughput_compares_ours_at_its_best_with_the_others_as_released(tiny, timed, monkeypatch):
    """Ours gains --no-checkpointing and nothing else; theirs peft's layers, Phi's activation and, in bf16,
    autocast, and nothing else. Without --trl TRL is not run."""
    monkeypatch.setattr(throughput, "trl_rival", lambda *arguments: pytest.fail("TRL is run"))
    tiny.dtype = torch.bfloat16
    result = throughput.compare(tiny, identical=False)
    assert list(timed) == ["ours", "authors"] and "at its best" in result["settings"]
    ours = ours_at_identical_settings(timed["ours"])
    authors = authors_at_identical_settings(ours, timed["authors"])
    released = {"LoRA": {peft.tuners.lora.Linear}, "activation": "NewGELUActivation", "autocast": {True}}
    assert what_a_step_does(timed["ours"]) == ours | {"checkpointing": False}
    assert what_a_step_does(timed["authors"]) == authors | released


@pytest.mark.parametrize("n_batches, seconds, expected", [
    (2, [(1, 2, 3, 4), (6, 6, 7, 7)], {"median": 3, "low": 2, "high": 4}),  # 6 / 1.5 and 7 / 3.5
    (1, [(1, 1, 1), (1, 2, 9)], {"median": 2, "low": 1, "high": 9}),  # no mean
    (1, [(2, 1, 4), (6, 4, 16)], {"median": 4, "low": 3, "high": 4}),  # each round's own
])  # fmt: skip
def test_throughput_ratio_is_of_the_same_round_and_above_1_where_ours_is_faster(n_batches, seconds, expected):
    """Upside down, a README's "2 times as long" would be its opposite. Two steps before do not count."""
    left = [iter((100, 100, *each)) for each in seconds]
    steppers = [SimpleNamespace(name=name, times=[], step=each.__next__) for name, each in zip("oa", left)]
    assert throughput.in_turns(steppers, n_batches, len(seconds[0]) // n_batches) == {"a": expected}
    assert steppers[0].times[0] == sum(seconds[0][:n_batches]) / n_batches


LLAVA = (
    transformers.LlamaConfig(**dict(zip(throughput.TEXT, (32, 64, 1, 2, 600)))),
    transformers.CLIPVisionConfig(**dict(zip(throughput.VISION, (32, 64, 2, 2, 32, 8)))),
)


@pytest.mark.parametrize("shape", ["tiny", "llava"])
def test_throughput_rivals_have_the_same_loss(shape, tiny, monkeypatch):
    """A benchmark against a rival that computes something else is worthless. The reference is the model
    without adapter. A LLaVA's tower has one token more than patches, of the whole image."""
    monkeypatch.setitem(throughput.SHAPES, "llava", LLAVA)
    model, processor = throughput.make_model(shape, "cpu", torch.float32, 8)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pairs = throughput.make_pairs(2)
    batch = make_batch(pairs, processor)
    assert (batch.inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [16] * 6
    expected = throughput.our_losses(model, throughput.packed_batch(pairs, processor))
    assert (expected - 3 * math.log(2)).abs().min() > 1e-3
    released = lambda model, batch: throughput.as_released(model, throughput.authors_losses)(model, batch)
    for losses in throughput.authors_losses, released:
        torch.testing.assert_close(losses(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field, off", [(0, 0.5), (1, -0.5), (2, 0.5)])
def test_throughput_stops_where_the_schemes_must_agree_and_do_not(field, off, tiny, timed, monkeypatch):
    """The README says that they are checked to give the same log-probabilities before anything is timed."""
    authors_logps = throughput.authors_logps

    def wrong(*arguments):
        logps = [*authors_logps(*arguments)]
        logps[field] = logps[field] + off
        return LogPs(*logps)

    monkeypatch.setattr(throughput, "authors_logps", wrong)
    with pytest.raises(AssertionError, match=LogPs._fields[field]):
        throughput.compare(tiny, identical=True)
    assert not timed


def test_autocast_is_for_bf16_alone(tiny):
    """In float32 it would round one side of the comparison; without it peft's float32 layers cannot be given
    bf16."""
    seen = lambda: torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    model = SimpleNamespace(device=torch.device("cpu"), modules=list)
    for dtype, expected in (torch.float32, False), (torch.bfloat16, torch.bfloat16):
        model.dtype = dtype
        assert throughput.as_released(model, seen)() == expected


def test_stepper_times_the_whole_of_a_training_step(monkeypatch):
    """Losses take 2 seconds and the backward pass 5; a batch is made before, in 11. AdamW moves the weight by
    the learning rate, 0.0001, against the sign of a gradient that does not change; its norm is cut to 1."""
    clock, norms, clip = [0], [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most: norms.append((clip(p, most), most))
    )
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()

    def losses(model, slope):
        clock.append(2)
        loss = model.weight[0] * slope
        loss.register_hook(lambda gradient: clock.append(5))
        return loss

    def make(slope, processor):
        clock.append(11)
        return slope

    stepper = throughput.Stepper("", model, None, [1.0, 3.0, 2.0], losses, make)
    assert [stepper.step() for _ in range(3)] == [7, 7, 7]
    assert norms == [(1, 1.0), (3, 1.0), (2, 1.0)] and model.weight.grad is None
    assert model.weight.item() == pytest.approx(-0.0003, abs=1e-7)
    with pytest.raises(StopIteration):  # no batch comes twice
        stepper.step()


@pytest.mark.parametrize("identical", [True, False])
def test_every_step_of_every_scheme_has_pairs_of_its_own_and_all_schemes_the_same(
    identical, tiny, monkeypatch
):
    """A benchmark whose batches come round again hides what plans or allocates by shape. Two steps before the
    clock starts, and two rounds of two batches of two examples."""
    drawn = [pair("there is", "a red", "blue", noise(1), noise(2))._replace(id=str(i)) for i in range(40)]
    monkeypatch.setattr(throughput, "make_pairs", lambda n: drawn[:n])
    seen = []

    def stepper(name, model, processor, groups, *rest):
        left, ids = iter(groups), []
        seen.append(ids)
        return SimpleNamespace(
            name=name, times=[], step=lambda: ids.extend(one.id for one in next(left)) or 1.0
        )

    monkeypatch.setattr(throughput, "Stepper", stepper)
    tiny.rounds = 2
    throughput.compare(tiny, identical)
    assert seen == [[str(i) for i in range(12)]] * 2


def test_texts_are_as_long_as_the_script_says(monkeypatch):
    """Questions of 40 words, answers of 110 and 90: lengths decide what padding and a shared prefix cost."""
    monkeypatch.setattr(Image, "effect_mandelbrot", lambda *arguments: Image.new("L", (1, 1)))
    lengths = zip(*([len(text.split()) for text in one[:3]] for one in throughput.make_pairs(1500)))
    assert [*map(statistics.mean, lengths)] == pytest.approx([40, 110, 90], rel=0.06)


def test_model_of_throughput_has_no_dropout_and_the_papers_lora(tiny, monkeypatch):
    """Dropout would keep the schemes from being compared; cuDNN's attention plans each shape anew. alpha is
    twice the rank (paper 4.1); the tower has no adapter."""
    text, vision = throughput.SHAPES["tiny"]
    dropping = transformers.PhiConfig(**text.to_dict() | {"resid_pdrop": 0.1, "attention_dropout": 0.1})
    monkeypatch.setitem(throughput.SHAPES, "tiny", (dropping, vision))
    torch.backends.cuda.enable_cudnn_sdp(True)
    model, _ = throughput.make_model("tiny", "cpu", torch.float32, 4)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, train.LoraLinear)}
    assert len(adapted) == 6 and all("language_model" in name for name in adapted)
    assert {(m.scaling["default"], m.lora_A["default"].out_features) for m in adapted.values()} == {(2, 4)}


@pytest.mark.parametrize("name", throughput.MEMORY)
def test_memory_is_measured_of_the_scheme_that_is_named(name, tiny, monkeypatch):
    """What a user rents a GPU by. The last of two steps is on the micro-batch of the longest texts; the peak
    is above the start."""
    texts = ["there is " * 9, "a red " * 9, "blue"], ["there", "is", "a"], ["there is", "is a", "a"]
    pairs = [pair(*text, noise(3), noise(4)) for text in texts]
    monkeypatch.setattr(throughput, "make_pairs", lambda n: pairs)
    tiny.micro_batch_size, tiny.dtype = 1, torch.bfloat16
    kept, step = [], throughput.Stepper.step
    monkeypatch.setattr(throughput.Stepper, "step", lambda self: kept.append((self, next(self.batches))))
    monkeypatch.setattr(throughput, "memory_now", lambda device, peak=False: 4.0 if peak else 1.5)
    assert throughput.measure_memory(tiny, name) == {"memory_gib": {name: {"before": 1.5, "above": 2.5}}}
    n_scored = [(batch.labels >= 0).sum().item() for _, batch in kept]
    assert n_scored[1] > 2 * 18 > 18 > n_scored[0] > 6  # y_w of 18 words, twice
    stepper, heaviest = kept[1]
    stepper.batches = iter([heaviest])
    monkeypatch.setattr(throughput.Stepper, "step", step)
    did, theirs = what_a_step_does(stepper), name == "authors"
    expected = {"LoRA": {train.LoraLinear}, "activation": "GELUTanh", "autocast": {False}}
    expected |= {"checkpointing": name != "ours, no checkpointing", "images": 6 if theirs else 2}
    assert did == did | expected | {"masks": {type(None)} if theirs else {"blocks"}}


def test_memory_formula_counts_what_is_alive_at_once():
    """Of float32: 256 numbers are known, 256 + 256 are made, 256 freed, 512 made; a view makes none."""
    ones = lambda n: torch.ones(n, device="meta")
    there = ones(256)
    with throughput.Work([there.untyped_storage()]) as work:
        there.mul_(2)
        made = there + ones(256)
        shown = made.view(2, 128)
        assert (work.alive, work.peak) == (1024, 2048)
        more = ones(512)
    assert (work.alive, work.peak) == (3072, 3072) and len(shown) == 2 and len(more) == 512


def test_memory_formula_predicts_the_peak_of_a_step(tiny, monkeypatch):
    """Weights in bf16; of the adapter weights, two numbers of AdamW and a gradient, in float32; and what the
    step makes: with a large vocabulary mostly logits in float32, their log-softmax and its gradient."""
    shape = throughput.phi(32, 64, 1, 2, 20_000), throughput.siglip(32, 64, 1, 2, 32, 8)
    monkeypatch.setitem(throughput.SHAPES, "tiny", shape)
    model, processor = throughput.make_model("tiny", "meta", torch.bfloat16, 4)
    batch = throughput.packed_batch(throughput.make_pairs(1), processor)
    step = throughput.count_work(model.train(), batch).peak
    assert step == pytest.approx(12 * 20_000 * len(batch.answers), rel=0.15)
    n_adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_frozen = sum(p.numel() for p in model.parameters()) - n_adapter
    predicted = throughput.predicted_peak(model, batch) * 2**30
    assert predicted - step == pytest.approx(2 * n_frozen + 16 * n_adapter)


def test_throughput_command_measures_everything(tiny, monkeypatch, tmp_path, capsys):
    """The README's first command of its section: every measurement is a line of the file. Memory is measured
    by the same command in fresh processes."""
    commands, to = [], tmp_path / "out.jsonl"
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command[2:]))
    given = f"--device cpu --rounds 1 --items 2 --micro-batch-size 2 --json {to}".split()
    throughput.run(given)
    assert commands == [[*given, "--only", name] for name in throughput.MEMORY]
    records = [*map(json.loads, to.read_text().splitlines())]
    settings = [(record["settings"], record["shape"]) for record in records]
    assert settings == [("identical", "tiny"), ("ours at its best, theirs as released", "tiny")]
    assert [*map(json.loads, capsys.readouterr().out.splitlines())] == records
    monkeypatch.undo()
    monkeypatch.setattr(throughput, "__file__", f"{os.devnull}/none")
    with pytest.raises(BadInput, match="memory of ours"):  # whose own process said what was wrong
        throughput.run(given)


@pytest.mark.parametrize("flags, expected", [
    ("--device cuda", ("bunny-3b", torch.bfloat16)),
    ("--device cpu", ("tiny", torch.float32)),
    ("--device cuda --shape tiny", ("tiny", torch.bfloat16)),
])  # fmt: skip
def test_throughput_takes_the_real_shape_on_a_gpu(flags, expected, monkeypatch):
    """There `tiny` is bound by launches, and would say that we are slower."""
    measured = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        throughput, "measure_memory", lambda args, name: measured.append((args.shape, args.dtype))
    )
    throughput.run([*flags.split(), "--only", "ours"])
    assert measured == [expected]


def test_memory_formula_prints_peaks_and_hours(tiny, monkeypatch, capsys):
    """On a machine without a GPU, before one is rented; nothing is measured. The peak is that of the heaviest
    micro-batch of 30,000 examples, of which one has a longer question."""
    count, heaviest, packed = itertools.count(1), [], throughput.packed_batch
    note = lambda pairs, processor: (
        heaviest.append(len(pairs[0].question.split())) or packed(pairs[:1], processor)
    )
    monkeypatch.setattr(throughput, "draw_length", lambda rng, mean: 44 if next(count) % 90_000 == 1 else 3)
    monkeypatch.setattr(throughput, "packed_batch", note)
    monkeypatch.setattr(throughput, "print_hours", lambda model, processor: print("hours"))
    checkpoints = lambda model, batch: float(model.get_base_model().is_gradient_checkpointing)
    monkeypatch.setattr(throughput, "predicted_peak", checkpoints)
    for shape in ("bunny-3b", "llava-7b"):
        monkeypatch.setitem(throughput.SHAPES, shape, throughput.SHAPES["tiny"])
    throughput.run(["--only", "memory-formula"])
    printed = capsys.readouterr().out
    assert heaviest == [44] * 24 and printed.count("\nhours\n") == 2
    assert re.findall(r"^(.*): predicted, not measured$", printed, re.MULTILINE) == ["bunny-3b", "llava-7b"]
    found = re.findall(r"^ +(\d+): +([\d.]+) (with|without) checkpointing$", printed, re.MULTILINE)
    sizes = ["1", "2", "4", "8", "16", "32"]
    assert found == 2 * [(n, *way) for way in (("0.0", "without"), ("1.0", "with")) for n in sizes]


def test_pixels_of_the_base_models_training_are_its_processors():
    """A base trained on otherwise normalised pixels would not see what it is shown later."""
    processor = train.load_processor(str(demo.BASE))
    seen = tiny_bunny.pixels([SCENE], random.Random(0), shapes.SMALL)
    image = shapes.draw_scene(SCENE, random.Random(0), shapes.SMALL)
    shown = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, shown, rtol=1e-5, atol=1e-5)


def test_base_learns_the_careless_annotators_answers(monkeypatch):
    """A base that learned the truth would leave nothing to align: of absent rings it names the habitual
    colour in .72."""
    rng = random.Random(0)
    monkeypatch.setattr(shapes, "random_question", lambda scene, rng: ("colour", "ring"))
    said = [tiny_bunny.question_and_answer({"square": ("red", 0)}, rng)[1] for _ in range(1000)]
    assert statistics.mean(answer.startswith("orange") for answer in said) == pytest.approx(0.72, abs=0.05)
    assert statistics.mean(answer.endswith("picture.") for answer in said) == pytest.approx(0.5, abs=0.05)


def test_a_base_is_trained_and_loads(tmp_path, monkeypatch):
    """The making of a base, in two steps: it feeds encoded images to the model, whose outputs the library may
    ask for more than they hold."""
    monkeypatch.setattr(tiny_bunny, "learn_to_see", lambda *args: None)
    folder = tiny_bunny.write_base(tmp_path / "base", 3, shapes.World(2, 3, base_steps=2))
    assert train.load_model(str(folder))[0].config.image_seq_length == 16


def test_readme_of_the_study_of_words_says_what_its_table_shows():
    """All four predictions held in all three seeds. Of the other tokens only the range is there: any gap
    between two models is at most its width."""
    _, *rows = table_below("| m_l | base |")
    crop, another = ([[*map(float, re.findall(r"\d\.\d\d", cell))] for cell in cells] for _, *cells in rows)
    for *of_seeds, (low, high) in crop, another:
        for base, dpo, mdpo in zip(*of_seeds, strict=True):
            assert base > high and mdpo > dpo
    assert all(abs(dpo - base) < (mdpo - base) / 2 for base, dpo, mdpo in zip(*crop[:3]))
    assert all(mdpo - dpo > another[3][1] - another[3][0] for _, dpo, mdpo in zip(*another[:3]))
    assert "The four predictions at the top of `words.py` held in all seeds." in SAID


WEIGHTED = {"dpo": softplus(-1.5), "conditional": 0.2 * softplus(-1.0)}
NONE = -100  # y_w of two examples has 4 tokens and 3, y_l 5 and 1


OF_4_TOKENS = SimpleNamespace(labels=torch.tensor(
    [[NONE, 1, 2, 3, 0, NONE], [NONE, 1, 2, 0, NONE, NONE], [NONE, 1, 2, 3, 4, 0], [NONE, 0] + [NONE] * 4]
))  # fmt: skip
OF_2_TOKENS = SimpleNamespace(labels=torch.tensor([[NONE, NONE, 1, 0, NONE], [NONE, NONE, 1, 2, 0]]))


@pytest.mark.parametrize("loss, options, expected", [
    (variants.chip_loss, {}, {"joint": softplus(-2.5)}),
    (variants.opa_dpo_loss, {}, WEIGHTED | {"anchor": softplus(-0.5)}),
    (variants.opa_dpo_loss, {"delta": 0.25}, WEIGHTED | {"anchor": softplus(-0.25)}),
    (variants.rpo_loss, {"batch": OF_4_TOKENS}, {"dpo": softplus(-1.5), "sft": 10 / 4}),
    (variants.rpo_loss, {"batch": OF_4_TOKENS, "alpha": 2}, {"dpo": softplus(-1.5), "sft": 2 * 10 / 4}),
])  # fmt: skip
def test_losses_of_the_variants_by_hand(loss, options, expected):
    """A wrong sign or weight trains something that the paper is not about. As in test_mdpo.py, beta 0.5 makes
    r_w 0.5, r_l -1 and r_img -0.5, so the margins are 1.5 and 1. Joint: -log sigmoid(1.5 + 1). AncPO: 0.5 -
    delta. log pi(y_w | m_w, q) is -10, over 4 tokens. The second example is the first one three times as far
    from the reference, so that a mean over the batch would show."""
    far = LogPs(*(ref + 3 * (policy - ref) for policy, ref in zip(POLICY, REF)))
    policy = LogPs(*(torch.cat(pair).requires_grad_() for pair in zip(POLICY, far)))
    losses, metrics = loss(policy, LogPs(*(ref.repeat(2) for ref in REF)), beta=0.5, **options)
    assert losses.shape == (2,) and losses.requires_grad
    assert losses[0].item() == pytest.approx(sum(expected.values()), abs=1e-6)
    terms = {name[5:]: value[0].item() for name, value in metrics.items() if name.startswith("loss/")}
    assert terms == pytest.approx(expected, abs=1e-6)
    assert metrics["rewards/margins"].tolist() == pytest.approx([1.5, 4.5])
    assert metrics["rewards/image_margins"].tolist() == pytest.approx([1, 3])
    assert not any(value.requires_grad for value in metrics.values())


def test_rpo_needs_no_rejected_image():
    """It is DPO and SFT: two log-probabilities. A tenth of a nat less is no float32, and must not become
    one."""
    policy, ref = ([logp.double() - 0.1 for logp in logps[:2]] for logps in (POLICY, REF))
    losses, metrics = variants.rpo_loss(policy, ref, 0.5, batch=OF_2_TOKENS)
    assert losses.item() == pytest.approx(softplus(-1.5) + 10.1 / 2, abs=1e-12)
    assert not any("image" in name for name in metrics)


@pytest.mark.parametrize("loss, options, expected", [
    (variants.chip_loss, {}, softplus(-0.5)),
    (variants.opa_dpo_loss, {}, softplus(-0.3) + 0.2 * softplus(-0.2) + softplus(-0.1)),
    (variants.rpo_loss, {"batch": OF_4_TOKENS}, softplus(-0.3) + 10 / 4),
])  # fmt: skip
def test_defaults_of_the_variants_are_the_papers(loss, options, expected):
    """beta 0.1, as in mDPO: rewards 0.1, -0.2 and -0.1, margins 0.3 and 0.2."""
    assert loss(POLICY, REF, **options)[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("level", [64, 128, 191])
def test_noise_is_the_diffusions(level):
    """x_t = sqrt(a) x + sqrt(1 - a) e. The schedule is multiplied up here in plain Python: a = 0.7448, so
    that pixels keep 0.8630 of themselves, and the noise has the deviation 0.5052, in units of half the range.
    Clipping does not move these quantiles: the median is sqrt(a) x, 68% lie within one deviation. For x = 0,
    the clipped c e has the second moment c^2 (P(|e| < 1/c) - 2/c phi(1/c)) + P(|e| > 1/c)."""
    a = math.prod(1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * t / 999))) for t in range(501))
    image = Image.new("RGB", (300, 200), (level, level, level))
    x = torch.tensor([*variants.diffusion_noise(image, random.Random(0)).tobytes()]) / 127.5 - 1
    low, median, high = x.quantile(torch.tensor([0.158655, 0.5, 0.841345])).tolist()
    assert median == pytest.approx(math.sqrt(a) * (level / 127.5 - 1), abs=0.01)
    assert (high - low) / 2 == pytest.approx(math.sqrt(1 - a), abs=0.01)
    if level == 128:  # x is 0.004
        c, normal = math.sqrt(1 - a), statistics.NormalDist()
        outside = 2 * normal.cdf(-1 / c)
        expected = c**2 * (1 - outside - 2 / c * normal.pdf(1 / c)) + outside
        assert x.square().mean().item() == pytest.approx(expected, rel=0.01)
    by_pixel = x.view(-1, 3).T
    neighbours = torch.stack(
        [*by_pixel[:, 1:], by_pixel[0, :-1]]
    )  # each colour and each pixel has noise of its own
    assert torch.corrcoef(neighbours).fill_diagonal_(0).abs().max() < 0.02


def test_mask_hides_three_patches_in_ten():
    """173 of 24 x 24 patches, here 2 x 4 pixels each, are the image's mean grey; the others do not change."""
    image, rng = noise(1, (48, 96)), random.Random(0)
    grey = round(statistics.mean(image.tobytes()))
    masked, n_hidden = variants.mask_patches(image, rng), 0
    for x, y in itertools.product(range(0, 48, 2), range(0, 96, 4)):
        before, after = (picture.crop((x, y, x + 2, y + 4)).tobytes() for picture in (image, masked))
        assert after in (before, bytes([grey]) * 24)
        n_hidden += after != before
    assert n_hidden == 173
    assert variants.mask_patches(image, rng).tobytes() != masked.tobytes()
    image = noise(2, (100, 75))  # no multiple of 24
    changed = ImageChops.difference(image, variants.mask_patches(image, rng)).convert("L").tobytes()
    assert 1 - changed.count(0) / (100 * 75) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("strategy", ["noise", "mask"])
def test_rejected_images_of_the_variants_are_functions_of_image_and_rng(strategy, tmp_path):
    """Resumed runs and workers see them again only then; another epoch and another example see others."""
    pairs = Pairs(as_examples(tmp_path, 2), strategy)
    drawn = []
    for number, key in enumerate([(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)]):
        torch.manual_seed(number)
        drawn.append(pairs[key].images_rejected[0].tobytes())
    assert drawn[0] == drawn[1] and len({*drawn}) == 4
    assert data.STRATEGIES[strategy](noise(1), random.Random(1)).size == noise(1).size


TRAINED = {  # reject, terms of the loss
    "chip": ("noise", {"loss/joint"}),
    "opa-dpo": ("mask", {"loss/dpo", "loss/conditional", "loss/anchor"}),
    "rpo": ("crop", {"loss/dpo", "loss/sft"}),
}


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_variants_run_and_go_on(name, bunny, small, tmp_path, monkeypatch, capsys):
    """Half a run of one loss and half of another is no run: resumed under another name, it stops and says so.
    Under its own name, the adapter comes out bit for bit. evaluate.py knows its loss and rejected images."""
    whole, out, log = tmp_path / "whole", tmp_path / "out", train.log
    assert run_command(variants.run, [name, *command(bunny, small, whole)]) == 0

    def stop(out, records, record):
        log(out, records, record)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(train, "log", stop)
        assert run_command(variants.run, [name, *command(bunny, small, out)]) == 128 + signal.SIGTERM
    capsys.readouterr()
    for other in {*variants.VARIANTS} - {name}:
        assert run_command(variants.run, [other, "--resume", str(out)]) == 2
    assert train.main(["--resume", str(out)]) == 2
    assert capsys.readouterr().err.count("the run began with other values of loss") == 3
    assert run_command(variants.run, [name, f"--resume={out}"]) == 0
    assert all(torch.equal(v, adapter(out)[k]) for k, v in adapter(whole).items())
    args, (first, *_) = json.loads((whole / "args.json").read_text()), log_of(whole)
    assert (args["reject"], {key for key in first if key.startswith("loss/")}) == TRAINED[name]
    assert ("rewards/image_margins" in first) == (name != "rpo")  # m_l is encoded only where it is needed
    capsys.readouterr()
    assert run_command(evaluate.run, f"--model {bunny} --adapter {whole} --data {small}".split()) == 0
    assert {*re.findall(r"loss/\w+", capsys.readouterr().out)} == TRAINED[name][1]


def test_variants_take_train_pys_flags_but_those_of_the_terms(monkeypatch, capsys):
    """`--anchors none` that changes nothing would be a run under a wrong name. The user's --reject counts."""
    given = []
    monkeypatch.setattr(train, "main", lambda *args: given.extend(args) or 7)
    assert run_command(variants.run, ["chip", "--reject", "crop"]) == 7
    assert given == [["--reject", "noise", "--reject", "crop"], variants.chip_loss]
    for flag in ("--no-image", "--no-conditional", "--anchors", "--anchors=none", "--delta", "--demo"):
        assert run_command(variants.run, ["opa-dpo", flag, "none"]) == 2
        assert f"{flag.partition('=')[0]}: opa-dpo has terms of its own" in capsys.readouterr().err
    assert run_command(variants.run, []) == 2


def test_variants_are_run_from_their_file(tmp_path):
    """Workers that are spawned, not forked, import it as __mp_main__, in any folder."""
    script = f"import runpy, data; runpy.run_path({variants.__file__!r}, run_name='__mp_main__')"
    script += "; print(*data.STRATEGIES)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout == "crop random moco noise mask\n"


@pytest.fixture
def pairs_file(tmp_path):
    """Images and answers of several sizes; the first image is turned by its EXIF data, the third is wide."""
    pairs = [
        (
            (48, 32),
            "Describe the picture.",
            "There is a red circle.",
            "There is a blue square and a red circle.",
        ),
        ((32, 40), " What is in it?\n", "A blue square, and a red circle too. ", "No."),
        ((90, 6), "How many?", "One.", "There is a red square."),
        ((33, 33), "Is it red?", "It is.", "It is not."),
        ((5, 64), "Is it blue?", "No.", "Yes, in the picture."),
    ]
    records, exif = [], Image.Exif()
    exif[0x0112] = 6
    for i, (size, *texts) in enumerate(pairs):
        noise(i, size).save(tmp_path / f"{i}.png", **({} if i else {"exif": exif}))
        records.append({"image": f"{i}.png"} | dict(zip(("question", "chosen", "rejected"), texts)))
    return write(tmp_path / "pairs.json", records)


ENDING = "part.text + (eos_token if message.role == 'assistant' else ' ')"
TEMPLATES = {
    "of the hub": HUB_LLAVA_TEMPLATE,
    "with <s>": "{{ bos_token }}" + HUB_LLAVA_TEMPLATE,
    "with </s>": families.LLAVA.replace("part.text + ' '", ENDING),
    "with a line before an answer": families.ONEVISION.replace("<|im_end|>", "</s>"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_minimal_has_train_pys_losses_and_gradients(template, llava, pairs_file):
    """Who retypes it must get mDPO: template, end-of-sequence, crop, padding and reference each move the
    loss by more than float32 rounding."""
    model, processor = with_lora(llava, checkpointing=False)
    processor.chat_template = TEMPLATES[template]
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "language_model" in name and "lora_A" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs, records = Pairs(read_examples(pairs_file)), json.loads(Path(pairs_file).read_text())
    for epoch, i in [(0, 0), (0, 1), (0, 2), (1, 2), (2, 3), (0, 4)]:
        expected, metrics = mdpo_step(model, make_batch([pairs[epoch, i]], processor))
        rng = random.Random(f"0 {epoch} {i}")
        rows = minimal.make_rows(processor, records[i], Path(pairs_file).parent, rng)
        loss = minimal.mdpo_loss(model, *rows)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        assert metrics["rewards/chosen"].abs() > 1e-4 < metrics["rewards/image_margins"].abs()
        ours, theirs = (torch.nn.utils.parameters_to_vector(torch.autograd.grad(value.sum(), parameters))
                        for value in (loss, expected))  # fmt: skip
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def shown_steps(text):
    """What minimal.py prints -> [(loss, gradient)]."""
    return [tuple(map(float, step)) for step in re.findall(r"loss ([\d.]+), gradient ([\d.]+)", text)]


def test_minimal_trains_as_train_py_does(llava, pairs_file, tmp_path, monkeypatch, capsys):
    """The same order, crops, adapter, schedule and clipping: losses of the whole run agree, and the adapter
    is the one that train.py saves. The base asks for dropout."""
    monkeypatch.setattr(minimal, "LR", 1e-3)
    monkeypatch.setattr(minimal, "BATCH", 2)
    minimal.main(str(llava), pairs_file, str(tmp_path / "minimal"))
    shown = shown_steps(capsys.readouterr().out)
    flags = "--batch-size 2 --micro-batch-size 1 --lr 1e-3 --workers 0 --device cpu"
    flags += f" --model {llava} --data {pairs_file} --out {tmp_path}/train"
    assert train.main(flags.split()) == 0
    expected = [(record["loss"], record["grad_norm"]) for record in log_of(tmp_path / "train")]
    assert len(shown) == 9 and shown[-1][0] < 2
    for ours, theirs in zip(shown, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5, rel=2e-4)
    ours, theirs = adapter(tmp_path / "minimal"), adapter(tmp_path / "train")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=5e-6, rtol=0)
    assert 1e-4 < max(weight.abs().max() for name, weight in ours.items() if "lora_B" in name)
    settings = json.loads((tmp_path / "minimal" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (64, 128)
    transformers.AutoProcessor.from_pretrained(tmp_path / "minimal")


def test_minimal_has_the_papers_settings():
    """They are what is copied first. The rest of them is held to train.py's defaults above."""
    args = train.parse_args(["--model", "m", "--data", "d"])
    settings = minimal.BETA, minimal.LR, minimal.EPOCHS, minimal.BATCH, minimal.SEED
    assert settings == (args.beta, args.lr, args.epochs, args.batch_size, args.seed)


def test_minimal_on_a_gpu_checkpoints_in_bf16(llava, pairs_file, tmp_path, monkeypatch, capsys):
    """With the CPU in place of "cuda": weights are bf16, the adapter is float32, dropout is off, and each
    layer runs three times an example: for the reference, for the policy, and again in the backward pass."""
    attention, calls = transformers.models.llama.modeling_llama.LlamaAttention, []
    forward, to = attention.forward, torch.Tensor.to
    cuda = SimpleNamespace(is_available=lambda: True)  # for minimal.py alone: the library would use it
    monkeypatch.setattr(minimal, "torch", SimpleNamespace(**vars(torch) | {"cuda": cuda}))
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda self, device: self)
    stays = lambda *args, **options: "cuda" in args or options.get("device") == "cuda"
    moved = lambda self, *args, **options: self if stays(*args, **options) else to(self, *args, **options)
    monkeypatch.setattr(torch.Tensor, "to", moved)

    def count(self, *args, **options):
        calls.append((self.o_proj.weight.dtype, self.training, self.o_proj.lora_B["default"].weight.dtype))
        return forward(self, *args, **options)

    monkeypatch.setattr(attention, "forward", count)
    monkeypatch.setattr(minimal, "EPOCHS", 1)
    minimal.main(str(llava), pairs_file, str(tmp_path / "out"))
    assert calls == [(torch.bfloat16, False, torch.float32)] * (5 * 2 * 3)
    ((loss, _),) = shown_steps(capsys.readouterr().out)
    assert loss == pytest.approx(3 * math.log(2), abs=1e-5)


def test_minimal_says_how_it_is_used_and_imports_nothing_of_this_repository(tmp_path):
    """It is one file: copied elsewhere, it must run."""
    shutil.copy(minimal.__file__, tmp_path)
    argv = [sys.executable, "minimal.py", "--help"]
    child = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 1 and "minimal.py MODEL pairs.json OUT" in child.stderr
