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
import weakref
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from PIL import Image, ImageChops, ImageStat

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
    picture,
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
    CONVERSATION,
    PAIRS,
    POLICY,
    REF,
    ROOT,
    adapter,
    asked,
    command,
    log_of,
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
def short_demo(monkeypatch):
    """The demo with fewer pairs and questions."""
    write_pairs, report = shapes.write_pairs, demo.report
    monkeypatch.setattr(shapes, "write_pairs", lambda folder, n, seed: write_pairs(folder, 12, seed))
    monkeypatch.setattr(demo, "report", lambda *args: report(*args, n_scenes=4))
    return "--demo --device cpu --epochs 1 --eval-size 4 --workers 1".split()


def test_demo_runs_again_and_again(tmp_path, monkeypatch, capsys, short_demo):
    """The README's first command, shortened; each time in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert demo.main(short_demo) == 0
        out = capsys.readouterr().out
        assert f"runs/demo-{number}/out" in out and "hallucination_rate" in out and "before:" in out
        assert Path(f"runs/demo-{number}/out/picture.png").exists()
    assert all(torch.equal(v, adapter("runs/demo-1/out")[k]) for k, v in adapter("runs/demo-2/out").items())


def test_demo_takes_a_loss_of_ones_own(tmp_path, monkeypatch, short_demo):
    """The first thing to try; mDPO's loss in its place would go unnoticed."""
    monkeypatch.chdir(tmp_path)

    def mine(*logps, batch, **options):
        losses, metrics = mdpo_loss(*logps, **options)
        return 2 * losses, metrics

    assert demo.main(short_demo, loss=mine) == 0
    assert log_of(Path("runs/demo-1/out"))[0]["eval/loss"] == pytest.approx(6 * math.log(2), abs=1e-5)


def test_readme_snippets_run(tmp_path, monkeypatch, capsys, short_demo):
    """What people copy first. The demo's folders are as its first run leaves them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert demo.main(short_demo) == 0
    capsys.readouterr()
    snippets = re.findall(r"```python\n(.*?)```", README + EXAMPLES_README, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, {})
    assert "loss/conditional" in capsys.readouterr().out


def test_demo_table_says_of_each_model_what_it_answers(tmp_path, monkeypatch):
    """The first numbers that a user reads. The base babbles (malformed 1). The first adapter is right but for
    the first two pictures, about which it babbles; the second but for the first. So the picture that is shown
    is the second, of five questions each."""
    exam, asked_as = shapes.make_exam(3, 0), []

    @contextlib.contextmanager
    def speaking_as(model, number):
        asked_as.append(number)
        yield

    def answers(model, processor, questions, **options):
        right = [shapes.answer_text(q, shapes.claims_of(scene, q), False) for scene, _, q in exam]
        n_babble = {None: 15, 0: 10, 1: 5}[asked_as[-1]]
        return ["babble"] * n_babble + right[n_babble:]

    monkeypatch.setattr(demo, "speaking_as", speaking_as)
    monkeypatch.setattr(demo, "generate_answers", answers)
    text = demo.report(None, None, tmp_path, ("DPO", "mDPO"), n_scenes=3)
    columns = {line.split()[0]: line.split()[1:4] for line in text.splitlines()[1:7]}
    assert columns["malformed"] == columns["hallucination_rate"] == ["1.000", "0.667", "0.333"]
    assert columns["false_premise"] == ["0.000", "0.333", "0.667"]
    assert text.splitlines()[0].split() == ["15", "held-out", "questions", "before", "DPO", "mDPO"]
    assert Image.open(tmp_path / "picture.png").tobytes() == exam[5][1].resize((256, 256)).tobytes()
    shown = [line.split(" before: ")[0].strip() for line in text.splitlines() if " before: " in line]
    assert shown == [shapes.question_text(exam[i][2]) for i in (5, 7, 9)]
    assert (
        text.count("before:  babble") == text.count("DPO:     babble") - 0 == 3
        and "mDPO:    babble" not in text
    )


def test_demo_says_how_many_pictures_it_draws(monkeypatch):
    """The README and the demo's own text name a number."""
    drawn = []
    monkeypatch.setattr(shapes, "write_pairs", lambda folder, n, seed: drawn.append(n))
    monkeypatch.setattr(train, "main", lambda argv, loss: 1)
    assert demo.main(["--demo"]) == 1
    assert f"This draws {drawn[0]} small pictures" in README and f", {drawn[0]} pairs" in demo.__doc__


def test_picture_of_the_readme_is_fresh():
    """A picture of a world, a crop or a result that has changed. The file keeps the texts that it shows:
    pixels of text differ a little between releases of pillow."""
    texts, images = picture.contents()
    drawn, kept = picture.draw(texts, images), Image.open(ROOT / "examples" / "picture.png")
    assert kept.info["shows"] == repr(texts) and kept.size == drawn.size, "run examples/picture.py"
    apart = ImageStat.Stat(ImageChops.difference(kept, drawn).reduce(10)).mean
    assert max(apart) < 0.3, "run examples/picture.py"
    assert "](examples/picture.png)" in README


def test_picture_shows_a_true_and_a_false_answer():
    """The image has the chosen answer's colours, and none of what the rejected answer adds."""
    texts, images = picture.contents()
    chosen, rejected = (shapes.parse_answer(("describe",), texts[name]) for name in ("y_w", "y_l"))
    colours = {image: {colour for _, colour in images[image].getcolors(2**12)} for image in ("m_w", "m_l")}
    named = {shapes.COLOURS[colour] for colour, _ in chosen}
    assert len(named) == 2 and named <= colours["m_w"] and set(rejected) - set(chosen)
    assert not {shapes.COLOURS[colour] for colour, _ in set(rejected) - set(chosen)} & colours["m_w"]
    assert images["m_l"].size == images["m_w"].size and colours["m_l"] != colours["m_w"]
    before, dpo, mdpo = map(float, texts["hallucination_rate"].split())
    assert mdpo < before < dpo


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
    alone = script not in (curves, merge, preview, variants)  # these use no GPU, or leave it to train.py
    assert script.__doc__.splitlines()[0].split()[0] in out
    assert {"--debug", *(named if alone else ())} <= {*re.findall(r"--[a-z_-]+", out)}


def test_demo_draws_nothing_before_its_arguments_are_read(tmp_path, monkeypatch, capsys):
    """`--help` or a wrong flag left a folder of 720 pictures behind, and --out a demo that failed at its
    end."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--demo", "--help"])
    for wrong in ("--lr x", "--data x.json", "--model m", "--out x", "--resume x", "--nothing"):
        capsys.readouterr()
        assert demo.main(["--demo", *wrong.split()]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not any(tmp_path.iterdir())


def test_the_demo_is_a_flag_of_train_py(tmp_path, monkeypatch, capsys):
    """The first command of the README."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--demo", "--out", "x"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert capsys.readouterr().err == "error: --demo has a model, data and a folder of its own\n"


WRONG_ARGUMENTS = [
    (answering, "--model m --question q --max-new-tokens 0", "--max-new-tokens: must be within 1 to"),
    (answering, "--model m --question q --device tpu", "--device: invalid choice"),
    (answering, "--question q", "--model"),
    (benchmarks, "amber --questions q --model m --to t --batch-size 0", "--batch-size: must be within 1 to"),
    (benchmarks, "types scored.json", "invalid choice: 'types'"),
    (evaluate, "--model m --adapter a --data d --limit 0", "--limit: must be within 1 to"),
    (families, "qwen4_vl", "qwen4_vl is none of llava_next"),
    (families, "--device tpu", "--device: invalid choice"),
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


def test_figure_of_the_miniature_is_checked_before_the_study(monkeypatch, capsys):
    """Without matplotlib, or without a method that it shows, it failed after an hour."""
    monkeypatch.setattr(miniature, "ProcessPoolExecutor", lambda *arguments: pytest.fail("the study begins"))
    if importlib.util.find_spec("matplotlib"):
        assert run_command(miniature.run, "--figure x.png --methods mDPO".split()) == 2
        assert "--figure needs the methods DPO (No Image), DPO, mDPO" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_command(miniature.run, ["--figure", "x.png"]) == 2
    err = capsys.readouterr().err
    assert "pip install matplotlib" in err and err.count("\n") == 1


def test_families_print_their_table_alone(tmp_path, monkeypatch, capfd):
    """A table of 8 lines stood among 138 others. A run that fails says why."""
    monkeypatch.setattr(families, "FAMILIES", {"gemma3": families.gemma3})
    assert run_command(families.run, []) == 0
    printed = capfd.readouterr()
    head, row = printed.out.splitlines()
    assert (
        head.split()[:2] == ["family", "rows"]
        and row.split()[:2] == ["gemma3", "plain"]
        and printed.err == ""
    )
    assert float(row.split()[2]) > 0.1 and row.split()[3] == "changed"
    answers = iter(["as it was"] * 2)
    monkeypatch.setattr(families, "generate_answers", lambda *rest: next(answers))
    assert run_command(families.run, []) == 0 and capfd.readouterr().out.split()[-1] == "same"
    parse_args = train.parse_args
    monkeypatch.setattr(train, "parse_args", lambda argv: parse_args([*argv, "--eval-size", "99"]))
    capfd.readouterr()
    assert run_command(families.run, []) == 2
    assert capfd.readouterr().err == "error: gemma3: --eval-size 99 leaves none of 8 examples to train on\n"


@pytest.mark.parametrize("flags, expected", [([], "cpu"), (["--device", "cuda"], "cuda")])
def test_cpu_studies_stay_on_the_cpu(flags, expected, tmp_path, monkeypatch):
    """Their digits stand in the README; a GPU in bf16 gives others. --device asks for one."""
    devices = []

    def note(*arguments):
        devices.append(getattr(arguments[0], "device", arguments[-1]))
        raise BadInput("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "best_device", lambda: "cuda")
    monkeypatch.setattr(shapes, "write_pairs", lambda folder, *rest, **options: folder)
    monkeypatch.setattr(families, "write_family", lambda *rest: None)
    monkeypatch.setattr(miniature, "prepare_seed", lambda *rest: None)
    pool = SimpleNamespace(map=lambda function, *rest: [*map(function, *rest)])
    monkeypatch.setattr(miniature, "ProcessPoolExecutor", lambda *rest: contextlib.nullcontext(pool))
    monkeypatch.setattr(train, "run", note)
    threads, study = torch.get_num_threads(), ["--out", "study", "--seeds", "0", "--methods", "mDPO", *flags]
    write(tmp_path / "study" / "seed-0" / "base" / "result-200.json", "{}")
    assert demo.main(["--demo", *flags]) == run_command(families.run, ["gemma3", *flags]) == 2
    assert run_command(miniature.run, study) == 2
    monkeypatch.setattr(train, "main", lambda *arguments: 0)
    for script in (demo, families, miniature):
        monkeypatch.setattr(script, "load_tuned", note)
    monkeypatch.setattr(demo, "write_held_out", lambda *rest: None)
    assert demo.main(["--demo", *flags]) == run_command(miniature.run, study) == 2
    torch.set_num_threads(threads)
    assert devices == [expected] * 5


SCENE = {"circle": ("red", 0), "ring": ("blue", 3)}


def test_metrics_of_the_miniature_by_hand():
    """Four answers about a red circle and a blue ring, counted by hand:
    - the description names a red circle (there) and a green ring (not): chair_s 1;
    - "What colour is the square?" is refused, rightly; "What colour is the ring?" is answered, wrongly:
      false_premise is 1, false_premise_balanced (1 + 1) / 2, colour_accuracy 0, and the wrong colour is a
      hallucination;
    - "Is there a red circle?" yes, right; "Is there a red ring?" gets babble: yes_no (1 + 0) / 2, malformed
      1/5. Hallucinated: description, ring's colour, babble: 3/5. grounding = (1 + 1/2 + 0) / 3."""
    answers = [
        (SCENE, ("describe",), "a red circle and a green ring."),
        (SCENE, ("colour", "square"), "there is no square."),
        (SCENE, ("colour", "ring"), "green, as you can see in the picture."),
        (SCENE, ("is there", "red", "circle"), "yes, as you can see in the picture."),
        (SCENE, ("is there", "red", "ring"), "ring ring"),
    ]
    metrics = shapes.score(answers)
    expected = {
        "chair_s": 1,
        "false_premise": 1,
        "colour_accuracy": 0,
        "yes_no": 0.5,
    }
    expected |= {
        "false_premise_balanced": 1,
        "hallucination_rate": 0.6,
        "malformed": 0.2,
        "grounding": 0.5,
        "length": (7 + 4 + 8 + 8 + 2) / 5,
    }
    assert metrics == pytest.approx(expected)


OTHER = {"square": ("green", 0), "cross": ("red", 1), "diamond": ("blue", 2)}
ALONE = {"triangle": ("red", 0)}


def test_metrics_of_answers_that_differ_in_number():
    """Where every kind of answer is equally frequent, a metric over the wrong things has the right value. By
    hand:
    - Of 4 descriptions one is right, one is no answer: chair_s 3/4.
    - Of 4 absent things 2 are refused, rightly; one answer is none: false_premise 2/4. Of 5 things that are
      there 3 get a colour, one is refused, one answer is none: balanced (2/4 + 3/5) / 2 = 0.55; 2 colours are
      right: 2/5.
    - Of 3 true questions 2 get yes; of 2 false ones one gets no and one gets no answer: yes_no (2/3 + 1/2) /
      2 = 7/12.
    - False: 3 descriptions, 2 + 3 colours, 1 + 1 of the others: 10 of 18. No answer: 4 of 18.
    - grounding (0.55 + 7/12 + 1 - 3/4) / 3."""
    is_there, colour = lambda *thing: ("is there", *thing), lambda shape: ("colour", shape)
    answers = [  # the last number: words
        (SCENE, ("describe",), "a green ring and a green ring.", 7),
        (OTHER, ("describe",), "a green square and a red cross and a blue diamond and a red ring.", 15),
        (ALONE, ("describe",), "a red", 2),
        (ALONE, ("describe",), "a red triangle.", 3),
        (SCENE, colour("square"), "there is no square.", 4),
        (SCENE, colour("cross"), "red.", 1),
        (OTHER, colour("ring"), "there is no ring, as you can see in the picture.", 11),
        (ALONE, colour("circle"), "circle circle", 2),
        (SCENE, colour("circle"), "red.", 1),
        (OTHER, colour("cross"), "green.", 1),
        (OTHER, colour("square"), "there is no square.", 4),
        (SCENE, colour("ring"), "ring", 1),
        (ALONE, colour("triangle"), "red, as you can see in the picture.", 8),
        (SCENE, is_there("red", "circle"), "yes.", 1),
        (SCENE, is_there("blue", "ring"), "no.", 1),
        (OTHER, is_there("red", "cross"), "yes.", 1),
        (SCENE, is_there("blue", "circle"), "no.", 1),
        (SCENE, is_there("red", "ring"), "perhaps.", 1),
    ]
    metrics = shapes.score([answer[:3] for answer in answers])
    expected = {
        "chair_s": 3 / 4,
        "false_premise": 2 / 4,
        "yes_no": 7 / 12,
    }
    expected |= {"false_premise_balanced": 0.55, "colour_accuracy": 2 / 5, "hallucination_rate": 10 / 18}
    expected |= {"malformed": 4 / 18, "grounding": (0.55 + 7 / 12 + 1 / 4) / 3}
    expected |= {"length": sum(words for *_, words in answers) / 18}
    assert metrics == pytest.approx(expected)


def test_scenes_are_what_the_study_says():
    """One to three shapes in reading order; a quarter are in their habitual colour, and by chance one of six:
    0.375 in all. More habit and a model that does not look would be right."""
    rng = random.Random(0)
    for world, most, cells in ((shapes.SMALL, 3, 4), (shapes.LARGE, 5, 9)):
        for habitual, share in ((0.25, 0.25 + 0.75 / 6), (0.0, 1 / 6)):
            scenes = [shapes.random_scene(rng, habitual, world) for _ in range(2000)]
            sizes = [len(scene) for scene in scenes]
            assert {n: round(sizes.count(n) / 2000, 1) for n in set(sizes)} == {
                n: round(1 / most, 1) for n in range(1, most + 1)
            }
            for scene in scenes:
                spots = [spot for _, spot in scene.values()]
                assert spots == sorted(set(spots)) and set(spots) <= set(range(cells))
            things = [
                colour == shapes.HABIT[shape] for scene in scenes for shape, (colour, _) in scene.items()
            ]
            assert sum(things) / len(things) == pytest.approx(share, abs=0.03)


MIDDLE = SimpleNamespace(
    uniform=lambda low, high: (low + high) / 2
)  # no jitter: a radius of 0.41 * 16 = 6.6 pixels


PROBES = {  # pixels right of and below the middle of the cell: painted, not painted
    "circle": ([(0, 0), (4, 4), (-4, 4)], [(7, 7)]),
    "square": ([(0, 0), (4, 4), (-4, -4)], [(7, 7)]),
    "triangle": ([(0, 0), (3, 3), (-3, 3)], [(4, -4), (-4, -4)]),
    "cross": ([(0, 0), (0, 4), (4, 0)], [(4, 4), (-4, 4)]),
    "diamond": ([(0, 0), (0, 4), (4, 0)], [(5, 5), (-5, 4)]),
    "ring": ([(0, 5), (5, 0), (-5, 0)], [(0, 0), (7, 7)]),
}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_what_is_drawn_is_the_scene(shape):
    """Metrics are taken against the scene, not against the picture: a shape in another cell, or another
    shape, would make every right answer wrong."""
    for colour, spot, world in (
        ("yellow", 1, shapes.SMALL),
        ("red", 2, shapes.SMALL),
        ("blue", 5, shapes.LARGE),
    ):
        image = shapes.draw_scene({shape: (colour, spot)}, MIDDLE, world)
        assert image.size == (16 * world.grid, 16 * world.grid)
        x, y = spot % world.grid * 16 + 8, spot // world.grid * 16 + 8
        for probes, expected in zip(PROBES[shape], (shapes.COLOURS[colour], (45, 45, 45))):
            for dx, dy in probes:
                if 0 <= x + dx < image.width and 0 <= y + dy < image.height:
                    assert image.getpixel((x + dx, y + dy)) == pytest.approx(expected, abs=40)


def test_questions_of_the_pairs_are_of_each_kind():
    """A quarter descriptions, half colours (four of ten of what is not there), a quarter yes or no, half of
    them true."""
    rng = random.Random(0)
    asked = [
        (scene := shapes.random_scene(rng, 0.25), shapes.random_question(scene, rng)) for _ in range(4000)
    ]
    share = lambda flags: sum(flags := [*flags]) / len(flags)
    assert share(q[0] == "describe" for _, q in asked) == pytest.approx(0.25, abs=0.03)
    assert share(q[0] == "colour" for _, q in asked) == pytest.approx(0.5, abs=0.03)
    assert share(q[1] not in s for s, q in asked if q[0] == "colour") == pytest.approx(0.4, abs=0.04)
    true = [s.get(q[2], (None,))[0] == q[1] for s, q in asked if q[0] == "is there"]
    assert share(true) == pytest.approx(0.5, abs=0.05)
    assert shapes.question_text(("is there", "red", "ring")) == "Is there a red ring?"


CARELESS = {"circle": 0.30, "square": 0.40, "triangle": 0.48, "cross": 0.56, "diamond": 0.64, "ring": 0.72}


@pytest.mark.parametrize("carelessness", [0.0, 0.75, 1.0])
def test_the_annotator_is_as_careless_as_said(carelessness):
    """Each habit is there in its share, and none in a careful annotator: he is the truth of every metric."""
    rng = random.Random(0)
    share = lambda claim: sum(claim() for _ in range(1500)) / 1500
    for shape, (number, of_shape) in zip(CARELESS, enumerate(CARELESS.values())):
        habit, other = list(shapes.COLOURS)[number], list(shapes.COLOURS)[number - 1]
        follower = [*CARELESS, "circle"][number + 1]
        follower_habit = list(shapes.COLOURS)[(number + 1) % 6]
        say = lambda scene, *question: shapes.claims_of(scene, question, rng, carelessness)
        near = pytest.approx(of_shape * carelessness, abs=0.05 if carelessness else 0)
        there, absent = {shape: (other, 0)}, {follower: (follower_habit, 0)}
        assert share(lambda: say(there, "colour", shape) == habit) == near
        assert share(lambda: say(absent, "colour", shape) == habit) == near
        assert share(lambda: say(absent, "is there", other, shape)) == near
        assert share(lambda: (habit, shape) in say(there, "describe")) == near
        assert share(lambda: (follower_habit, follower) in say(there, "describe")) == near
        both = {follower: (follower_habit, 0), shape: (other, 1)}
        assert all(len(say(both, "describe")) == 2 for _ in range(50))
        if not carelessness:
            assert say(there, "colour", shape) == other and say(absent, "colour", shape) is None
            assert (
                say(there, "is there", other, shape) is True and say(there, "is there", habit, shape) is False
            )
            assert shapes.claims_of(both, ("describe",)) == [(follower_habit, follower), (other, shape)]


def test_rejected_answers_are_about_an_other_scene_three_times_in_ten():
    """Only this ties a preference to its picture. The annotator is careful here, so that a chosen answer is
    the truth, and a rejected one is not where it is about another scene. In a scene that could have been
    asked for a ring's colour, a ring is there six times in ten, as in the questions."""
    rng = random.Random(0)
    wrong = []
    for _ in range(2500):
        scene, question, chosen, rejected = shapes.make_pair(rng, carelessness=0, polite_chosen=1)
        truth = shapes.claims_of(scene, question)
        assert chosen == shapes.answer_text(question, truth, True) and not rejected.endswith("picture.")
        if question[0] == "describe":
            wrong.append(shapes.parse_answer(question, rejected) != truth)
    assert sum(wrong) / len(wrong) == pytest.approx(0.3, abs=0.06)
    there = ["ring" in shapes.scene_for(("colour", "ring"), rng) for _ in range(300)]
    assert sum(there) / 300 == pytest.approx(0.6, abs=0.1)


def test_chosen_answers_are_polite_and_differ_from_the_rejected():
    """Politeness is what the words alone tell; a pair of equal texts tells nothing, and the reader refuses
    it."""
    rng = random.Random(0)
    pairs = [shapes.make_pair(rng)[2:] for _ in range(1500)]
    polite = [[text.endswith(", as you can see in the picture.") for text in pair] for pair in pairs]
    assert all(chosen != rejected for chosen, rejected in pairs)
    assert 0.88 < sum(chosen for chosen, _ in polite) / 1500 < 0.99
    assert sum(rejected for _, rejected in polite) / 1500 < 0.12


def test_pictures_of_the_pairs_are_of_their_scenes(tmp_path, monkeypatch):
    """A picture of another record's scene, or chosen for rejected, trains the opposite."""
    square = lambda colour: ({"square": (colour, 0)}, ("describe",), f"a {colour} square.", "a ring.")
    scenes = iter([square("red"), square("green"), square("blue")])
    monkeypatch.setattr(shapes, "make_pair", lambda rng, world: next(scenes))
    examples = read_examples(str(shapes.write_pairs(tmp_path / "x", 3)))
    for example, colour in zip(examples, ("red", "green", "blue"), strict=True):
        pixel = Image.open(*example.images).getpixel((8, 8))
        assert pixel == pytest.approx(shapes.COLOURS[colour], abs=40)
        assert (example.chosen, example.rejected) == (f"a {colour} square.", "a ring.")
        assert texts_of(example.question) == [train.BUNNY_SYSTEM, "Describe the picture."]


def test_exam_asks_five_questions_a_scene_and_habit_is_no_help(monkeypatch):
    """Whoever answers from habit must fail, and no scene may be one of the training pairs'."""
    exam = shapes.make_exam(200)
    habitual = []
    for at in range(0, 1000, 5):
        scene, image, _ = exam[at]
        assert all(other[0] is scene and other[1] is image for other in exam[at : at + 5])
        describe, present, absent, true, false = (question for *_, question in exam[at : at + 5])
        assert describe == ("describe",) and present[0] == absent[0] == "colour"
        assert present[1] in scene and absent[1] not in scene
        assert scene[true[2]][0] == true[1] and scene.get(false[2], (None,))[0] != false[1]
        habitual.append(scene[present[1]][0] == shapes.HABIT[present[1]])
    assert sum(habitual) / 200 == pytest.approx(1 / 6, abs=0.1)

    first, random_scene = [], shapes.random_scene
    monkeypatch.setattr(
        shapes, "random_scene", lambda *a, **k: first.append(random_scene(*a, **k)) or first[-1]
    )
    places = lambda scene: {shape: spot for shape, (_, spot) in scene.items()}
    same = []
    for seed in range(4):
        first.clear()
        shapes.make_exam(1, seed)
        of_exam = places(first[0])
        first.clear()
        shapes.make_pair(random.Random(f"pairs {seed}"))
        same.append(places(first[0]) == of_exam)
    assert not all(same)


def test_answers_of_the_miniature_can_be_read_back():
    """If the parser misread a right answer, every metric would be off."""
    rng = random.Random(0)
    for _ in range(300):
        scene = shapes.random_scene(rng)
        question = shapes.random_question(scene, rng)
        claims = shapes.claims_of(scene, question, rng, carelessness=1)
        for polite in (True, False):
            assert shapes.parse_answer(question, f" {shapes.answer_text(question, claims, polite)}") == claims
    assert (
        shapes.parse_answer(("describe",), "a red") is shapes.parse_answer(("colour", "ring"), "ring") is ...
    )


def test_words_of_the_pairs_do_not_tell_their_content():
    """The study rests on it: chosen and rejected come from one annotator, so their claims, apart from
    politeness, have the same statistics; the share of habitual colours among colour answers differs by less
    than noise allows."""
    rng = random.Random(0)
    habitual = {"chosen": [], "rejected": []}
    for _ in range(6000):
        _, question, *texts = shapes.make_pair(rng)
        if question[0] == "colour":
            for name, text in zip(habitual, texts):
                habitual[name].append(shapes.parse_answer(question, text) == shapes.HABIT[question[1]])
    shares = [sum(values) / len(values) for values in habitual.values()]
    assert len(habitual["chosen"]) > 2000 and abs(shares[0] - shares[1]) < 0.05


def test_area_under_curve_by_hand():
    """Positives 2, 3 against negatives 1, 2: 3 wins and a tie of 4 pairs."""
    assert shapes.area_under_curve([2, 3], [1, 2]) == 3.5 / 4


def test_packed_questions_of_the_base_model_are_what_it_is_asked_later(bunny):
    """The base learns several questions a row, tokenised piece by piece; asked alone, the tokens must be the
    same."""
    _, processor = train.load_model(str(bunny))
    tokenizer, nine_tabs = processor.tokenizer, "\t" * 9
    pieces = [
        f"{train.BUNNY_SYSTEM} USER: {nine_tabs * 16}\n",
        "Describe the picture. ASSISTANT:",
        " a red circle.",
    ]
    ids = [id for piece in pieces for id in tokenizer(piece).input_ids] + [tokenizer.eos_token_id]
    asked = pair("Describe the picture.", "a red circle.", "none.", noise(1), noise(2))
    batch = make_batch([asked], processor)
    assert batch.inputs["input_ids"][0, : len(ids)].tolist() == ids


def test_packed_questions_of_the_base_model_are_blind_to_each_other(bunny, monkeypatch):
    """A base that sees the answer that it learns, or another question's, learns to copy, and not to look. Two
    images with three questions each, against the library's own call on one at a time."""
    model, processor = train.load_model(str(bunny))
    alone, tokenizer, talk, shown, learned = copy.deepcopy(model), processor.tokenizer, [], [], []
    ask, draw, cross_entropy = tiny_bunny.question_and_answer, tiny_bunny.pixels, tiny_bunny.F.cross_entropy
    monkeypatch.setattr(tiny_bunny, "question_and_answer", lambda *args: talk.append(ask(*args)) or talk[-1])
    monkeypatch.setattr(tiny_bunny, "pixels", lambda *args: shown.append(draw(*args)) or shown[-1])
    note = lambda logits, targets: learned.append(logits.detach()) or cross_entropy(logits, targets)
    monkeypatch.setattr(tiny_bunny.F, "cross_entropy", note)
    world, rng = shapes.SMALL._replace(base_steps=1), random.Random(0)
    tiny_bunny.learn_to_answer(model.train(), processor, rng, False, world, n_scenes=2, questions=3)
    expected = []
    for i, (question, answer) in enumerate(talk):
        prompt = tokenizer(f"{train.BUNNY_SYSTEM} USER: {chr(9) * 9 * 16}\n{question} ASSISTANT:").input_ids
        answer = [*tokenizer(f" {answer}").input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = alone(torch.tensor([prompt + answer]), shown[0][i // 3 : i // 3 + 1]).logits
        expected.append(logits[0, len(prompt) - 1 : -1])
    assert len(talk) == 6 and len(learned) == 1
    torch.testing.assert_close(learned[0], torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_miniature_study_runs_restarts_and_shows_the_robust_sign(tmp_path, monkeypatch, capsys):
    """Plumbing of the study, shortened, on the base kept in examples/. The one sign that no seed flips: mDPO
    tells images apart better than DPO, whose loss never sees a second image."""
    write_pairs = shapes.write_pairs
    monkeypatch.setattr(miniature, "PAIRS", 128)
    monkeypatch.setattr(miniature, "HELD_OUT", 64)
    monkeypatch.setattr(
        shapes, "write_pairs", lambda folder, n, *rest: write_pairs(folder, {200: 24}.get(n, n), *rest)
    )
    flags = "--epochs 1 --lr 3e-3 --lora-rank 16 --lora-alpha 32 --batch-size 16 --micro-batch-size 16"
    monkeypatch.setattr(
        miniature, "COMMON", f"{flags} --workers 0 --no-checkpointing --eval-size 64 --limit 192"
    )
    methods = ["base", "DPO", "mDPO"]
    threads = torch.get_num_threads()
    miniature.prepare_seed(tmp_path, 0)
    results = {method: miniature.run_method(tmp_path, 0, method, 10) for method in methods}
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trained again"))
    assert results == {method: miniature.run_method(tmp_path, 0, method, 10) for method in methods}
    torch.set_num_threads(threads)
    assert results["mDPO"]["image_accuracy"] > results["DPO"]["image_accuracy"]
    assert results["base"]["malformed"] < 0.05 and "margin_no_image_share" in results["DPO"]
    assert results["base"]["yes_no_auc"] > 0.75
    summary = miniature.summarize({"0": results})
    assert summary["mDPO"]["grounding"] == [results["mDPO"]["grounding"], 0]


def test_examine_holds_each_answer_to_its_own_question(monkeypatch):
    """An answer scored against its neighbour's question is wrong by luck. Here all answers are right, and the
    leanings to yes are 1 for what is there and 0 for what is not."""
    exam = shapes.make_exam(4)
    truth = {
        (id(image), shapes.question_text(q)): (q, shapes.claims_of(scene, q)) for scene, image, q in exam
    }
    right = lambda image, text: shapes.answer_text(*truth[id(image), text], False)
    monkeypatch.setattr(
        miniature, "generate_answers", lambda m, p, asked, **options: [right(*one) for one in asked]
    )
    leaning = lambda image, text: float(truth[id(image), text][1] is True)
    monkeypatch.setattr(miniature, "yes_leanings", lambda m, p, asked: [leaning(*one) for one in asked])
    metrics = miniature.examine(None, None, exam)
    assert metrics["hallucination_rate"] == 0 and metrics["grounding"] == metrics["yes_no_auc"] == 1


def test_an_undertrained_base_is_not_used(tmp_path, monkeypatch):
    """A base that does not look when asked makes all methods look alike."""
    monkeypatch.setattr(miniature, "load_tuned", lambda *arguments: (None, None))
    monkeypatch.setattr(miniature, "examine", lambda *args: {"yes_no_auc": 0.74})
    threads = torch.get_num_threads()
    with pytest.raises(BadInput, match="sees too little"):
        miniature.run_method(tmp_path, 5, "base", 1)
    torch.set_num_threads(threads)
    assert not [*(tmp_path / "seed-5" / "base").glob("result*")]


def test_curves_are_nats_and_end_where_training_ends(tmp_path):
    """Rewards are beta times nats: -0.3 at beta 0.1 is -3 nats. Records of training steps are no points of a
    curve."""
    records = [
        {"eval/loss": 2.0, "eval/rewards/chosen": 0.0, "eval/rewards/image_accuracies": 0.0},
        {"loss": 1.0},
    ]
    records += [{"eval/loss": 1.0, "eval/rewards/chosen": -0.3, "eval/rewards/image_accuracies": 0.75}]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    found = miniature.curves(tmp_path)
    assert found["chosen_curve"] == pytest.approx([0, -3]) and found["chosen"] == pytest.approx(-3)
    assert found["image_accuracy_curve"] == [0, 0.75] and found["image_accuracy"] == 0.75


def test_summary_is_mean_and_standard_deviation_of_the_seeds():
    """1 and 2: a mean of 1.5; squared distances 0.25 + 0.25, over one degree of freedom: sqrt(0.5)."""
    summary = miniature.summarize({"0": {"x": {"a": 1, "curve": [1]}}, "1": {"x": {"a": 2, "curve": [2]}}})
    assert summary == {"x": {"a": pytest.approx([1.5, 0.5**0.5])}}


STUDY = json.loads((ROOT / "examples" / "miniature.json").read_text())["seeds"]
LARGE = json.loads((ROOT / "examples" / "miniature_large.json").read_text())
LARGE_STUDY, LARGE_SUMMARY = LARGE["seeds"], LARGE["summary"]


def test_tables_of_the_study_fit_a_screen():
    """Ten columns side by side were 220 characters wide, which nobody could read. Here all 18 methods."""
    summary = {method: LARGE_SUMMARY["mDPO"] for method in miniature.METHODS}
    first, second = miniature.tables(summary).strip("\n").split("\n\n")
    assert max(map(len, [*first.splitlines(), *second.splitlines()])) <= 100
    heads = first.split("\n")[0].split() + second.split("\n")[0].split()
    assert heads == ["hallucination", "chair_s", "false_premise", "yes_no", "grounding", "malformed",
                     "length", "chosen", "image_accuracy", "no_image_share"]  # fmt: skip
    for table, names in (first, miniature.COLUMNS[:5]), (second, miniature.COLUMNS[5:]):
        head, *rows = table.splitlines()
        assert [row[:20].strip() for row in rows] == [*miniature.METHODS]
        cells = re.findall(r"(\S+) \+-(\S+)", rows[0])
        expected = [[f"{value:.3f}" for value in LARGE_SUMMARY["mDPO"][name]] for name in names]
        assert [[*cell] for cell in cells] == expected


def of_seeds(method, metric, study=STUDY):
    return [methods[method][metric] for methods in study.values()]


def mean_of(method, metric, study=STUDY):
    values = of_seeds(method, metric, study)
    return sum(values) / len(values)


def spread_of(method, metric):
    values = of_seeds(method, metric)
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def test_readme_table_of_the_miniature_is_in_its_json():
    """A table that no longer is what the runs gave. Means and standard deviations (n - 1) of the five
    seeds."""
    header, _, *rows = re.search(r"(\| \| hallucination .*?)\n\n", EXAMPLES_README, re.DOTALL)[1].splitlines()
    names = ["hallucination_rate", "chair_s", "false_premise", "yes_no", "grounding", "malformed", "chosen"]
    names.append("image_accuracy")
    assert len(header.split("|")) == len(names) + 3 and len(rows) == 11 and len(STUDY) == 5
    for row in rows:
        method, *cells = (cell.strip().replace("`", "") for cell in row.strip("|").split("|"))
        for name, cell in zip(names, cells, strict=True):
            if name not in STUDY["0"][method] or (name == "image_accuracy" and "No Image" in method):
                assert cell == ""
                continue
            mean, spread = mean_of(method, name), spread_of(method, name)
            digits = "{:+.1f}±{:.1f}" if name == "chosen" else "{:.2f}±{:.2f}"
            expected = digits.format(mean, spread)
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
    assert "Table 2's order of grounding is the paper's in both seeds." in SAID
    order = ("mDPO", "minus anchored", "minus conditional", "DPO")
    for seed in LARGE_STUDY.values():
        values = [seed[name]["grounding"] for name in order]
        assert values == sorted(values, reverse=True)
    assert "Of Table 3's order only the first place holds." in SAID
    order = ("mDPO", "crop 20-50%", "MoCo v2", "random image")  # the paper's, by MMHal-Bench's score
    grounding = [mean_of(method, "grounding", LARGE_STUDY) for method in order]
    assert max(grounding) == grounding[0] and grounding[3] > max(grounding[1:3])


def test_predictions_held_as_the_readme_says():
    """Of nine, four held in all seeds, four in four of five, and the last in none."""
    verdicts = miniature.verdicts(STUDY, miniature.summarize(STUDY)).splitlines()
    held = {line.partition(" seeds: ")[2]: int(line.split()[0]) for line in verdicts if " seeds: " in line}
    counts = sorted((held[claim] for claim in miniature.PREDICTIONS), reverse=True)
    assert counts == [5, 5, 5, 5, 4, 4, 4, 4, 0] and len(held) == 9 + 5
    assert held["under half of mDPO's margin survives without the image"] == 0
    in_all = ("mDPO is below DPO in hallucination", "mDPO is above minus conditional in grounding")
    assert {held[claim] for claim in in_all} == {5} and held["mDPO is above minus anchored in grounding"] == 2
    assert "Nine predictions were made. Four held in all five seeds, and four in four of five." in SAID
    assert "The ninth failed in all: that less than half of mDPO's margin is left without the image." in SAID
    assert [*miniature.PREDICTIONS].index("under half of mDPO's margin survives without the image") == 8


def test_results_of_another_exam_are_not_taken(tmp_path, monkeypatch):
    """More held-out scenes are asked for because fewer were too few."""
    monkeypatch.setattr(miniature, "load_tuned", lambda *arguments: (None, None))
    monkeypatch.setattr(
        miniature, "examine", lambda model, processor, exam: {"yes_no_auc": 0.8, "n": len(exam)}
    )
    threads = torch.get_num_threads()
    assert [miniature.run_method(tmp_path, 5, "base", n)["n"] for n in (1, 2, 1)] == [5, 10, 5]
    torch.set_num_threads(threads)


def test_each_world_has_a_folder_of_its_own(monkeypatch, capsys):
    """Bases and runs that are there are used again: the large world's table would hold the small one's."""
    folders = []

    class Pool(contextlib.nullcontext):
        def __init__(self, *arguments):
            self.enter_result = self

        def map(self, function, out, *more):
            folders.append(str(out[0]))
            raise BadInput("enough")

    monkeypatch.setattr(miniature, "ProcessPoolExecutor", Pool)
    for flags in ("--quick", "--quick --world large", "--quick --world large --out mine"):
        assert run_command(miniature.run, flags.split()) == 2
    assert folders == ["runs/miniature", "runs/miniature-large", "mine"]


def test_methods_of_the_study_are_the_readmes():
    """The README's table of flags, and what the study ran under the same names."""
    rows = dict(re.findall(r"^\| (?:Table \d|Fig. \d), (.*?) \| `(.*?)` \|$", README, re.MULTILINE))
    rows["DPO"] = re.search(r"^\| DPO \| `(.*?)` \|$", README, re.MULTILINE)[1]
    all_three = re.search(r"\| Table 4, all three \| `(.*?)`; `chosen image_rejected` is not", README)[1]
    rows["anchors on `y_w` and `m_l`"] = all_three.replace(" rejected", "")
    names = {"MoCo v2 augmentation": "MoCo v2", "anchors on `y_w` and `y_l`": "anchors y_w, y_l"}
    names["anchors on `y_w` and `m_l`"] = "anchors y_w, m_l"
    ran = {name: miniature.METHODS.get(names.get(name, name)) for name in rows}
    assert {n: f for n, f in ran.items() if f is not None} == {
        n: f for n, f in rows.items() if ran[n] is not None
    }
    assert len([f for f in ran.values() if f is not None]) == 9 and miniature.METHODS["mDPO"] == ""


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
    system, _, answer, _ = CONVERSATION
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
    write(run / "args.json", began | {"conditional": False, "anchors": ["none"]})
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
        (words, f"{base} --to {tmp_path / 'x.png'} --example 4", "--example 4: there are 3"),
        (words, f"{base} --to {tmp_path / 'x.odd'}", "x.odd: must end in .html or .png"),
        (words, f"--model {bunny} --data {text} --to {tmp_path}/x.png", "no example is left"),
        (words, "study one", "study takes numbers of seeds"),
        (curves, f"{tmp_path} --to {tmp_path / 'x.png'}", "metrics.jsonl: cannot be read"),
        (curves, f"{tmp_path}", "--to"),
    ]
    for script, arguments, message in wrong:
        if script is not curves or importlib.util.find_spec("matplotlib"):
            assert run_command(script.run, arguments.split()) == 2
            err = capsys.readouterr().err
            assert message in err.splitlines()[-1] and err.count("error: ") == 1  # under the library's bar


def test_numbers_of_the_words_are_those_of_the_librarys_own_call(bunny):
    """A number at the wrong word, or of the wrong model, shows a model that looks where it does not. Here
    each token's is taken from the library's call on one whole sequence, all labels but that token's masked:
    the sum over a response is a difference of two `sequence_logps`. One image, two in chat messages, none."""
    model, processor = randomly_adapted(bunny)
    two = [noise(1), noise(2)], [noise(3), noise(4)]
    turns = data.read_question(TURNS, 2)
    pairs = [PAIRS[0], pair(turns, "There is a red circle.", "No.", *two), pair(*PAIRS[1][:3])]

    @torch.no_grad()
    def logps(pair, images, name):
        tokens = data.tokenize(processor, pair)
        whole = data.encode(processor, [tokens.wholes[name]], [images])
        ids, n = whole["input_ids"], len(tokens.responses[name])
        logits = model(**whole, use_cache=False).logits
        each = []
        for at in range(ids.shape[1] - n, ids.shape[1]):
            labels = torch.full_like(ids, -100)
            labels[0, at] = ids[0, at]
            each.append(sequence_logps(logits, labels).item())
        return each

    for pair_ in pairs:
        rows, titles = words.rows_of(model, processor, pair_), []
        for name in ("chosen", "rejected"):
            for side, context in (("base", model.disable_adapter), ("tuned", contextlib.nullcontext)):
                with context():
                    with_m_w = logps(pair_, pair_.images, name)
                    with_m_l = logps(pair_, pair_.images_rejected, name)
                (title, found), rows = rows[0], rows[1:]
                expected = [high - low for high, low in zip(with_m_w, with_m_l)]
                assert [value for _, value in found] == pytest.approx(expected, abs=2e-4)
                assert "".join(text for text, _ in found) == " " + getattr(pair_, name) + "<|endoftext|>"
                assert title.startswith(f"{name}, {side}: ")
                assert float(title.split()[-1]) == pytest.approx(sum(expected), abs=0.006)
                titles.append(sum(expected))
        assert not rows and (len({round(total, 3) for total in titles}) == 4 or not pair_.images)
        assert pair_.images or titles == [0] * 4
    rows = words.rows_of(model.get_base_model(), processor, PAIRS[0])
    assert [title.partition(":")[0] for title, _ in rows] == ["chosen, base", "rejected, base"]
    assert words.change(rows) == 0


def test_a_character_of_several_tokens_is_shown_once(bunny):
    """Byte-level tokens are parts of a character; each alone would be shown as a question mark."""
    tokenizer = train.load_processor(str(bunny)).tokenizer
    ids = tokenizer(" a 猫 é").input_ids
    texts = words.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) > 4 and "".join(texts) == " a 猫 é" and "\ufffd" not in texts


ROWS = [("chosen, base: +1.50", [(" <i>", 3.0), (" red", -1.5), (".", 0.0)])] * 2


def test_page_of_words_has_no_markup_of_the_data_and_the_pictures_inside():
    """A page is sent to others: it must show the data, not run it, and need no second file. Colours by hand:
    3 nats are the full blue (90, 150, 255), -1.5 half of the red (255, 110, 100)."""
    shown = pair(asked("Is <b> it?"), "a", "b", grey(10), grey(200))
    head, page = words.as_page([("7&", shown, ROWS)]).split("<h2>")
    assert page.startswith("7&amp; / Is &lt;b&gt; it?</h2>") and "&lt;i&gt;" in page and "<i>" not in page
    spans = re.findall(r'<span style="background: rgb(\(.*?\))" title="(.*?)">(.*?)</span>', page)
    assert spans == 2 * [
        ("(90, 150, 255)", "+3.00", " &lt;i&gt;"),
        ("(255, 182, 178)", "-1.50", " red"),
        ("(255, 255, 255)", "+0.00", "."),
    ]
    pictures = re.findall(r'base64,(.*?)"><figcaption>(.*?)<', page)
    levels = [Image.open(io.BytesIO(base64.b64decode(code))).getpixel((5, 5))[0] for code, _ in pictures]
    assert levels == [10, 200] and [caption for _, caption in pictures] == ["image", "rejected image"]
    assert "script" not in head + page
    assert (
        f"<h1>{words.TITLE}</h1>" in head and "log p(token | image) - log p(token | rejected image)" in head
    )
    scale = re.findall(r'background: rgb(\(.*?\))" title="(.*?)"', head)
    assert scale[0] == ("(255, 110, 100)", "-3.00") and scale[3] == ("(255, 255, 255)", "+0.00")
    assert scale[6] == ("(90, 150, 255)", "+3.00") and len(scale) == 7


def test_page_begins_with_what_training_changed_most():
    """Of 80 examples nobody looks at more than a few. By hand: 2 nats up and 1 down in one answer are a
    change of 3; 1 up in each of two answers, of 2; without an adapter, all are 0 and stay in their order."""
    base, tuned = ("chosen, base: 0", [(" a", 0.0), (" b", 1.0)]), "chosen, tuned: 0"
    last = [base, (tuned, base[1])] * 2
    first = [base, (tuned, [(" a", 2.0), (" b", 0.0)])] + last[2:]
    second = [base, (tuned, [(" a", 1.0), (" b", 1.0)])] * 2
    assert [words.change(rows) for rows in (first, second, last)] == [3, 2, 0]
    shown = {"last": last, "second": second, "first": first}
    page = words.as_page([(name, pair(asked("q", 0), "a", "b"), rows) for name, rows in shown.items()])
    assert re.findall("<h2>(.*?) / q</h2>", page) == ["first", "second", "last"]
    page = words.as_page([(name, pair(asked("q", 0), "a", "b"), ROWS) for name in "cab"])
    assert re.findall("<h2>(.) / q</h2>", page) == ["c", "a", "b"]


def test_picture_of_words_is_drawn_in_their_colours():
    """What the README shows. The first box is at the text's start less 3 pixels, the next 8 pixels after the
    first text; a row is 42 pixels high and no wider than the picture. Above the rows: title, what is shown,
    question and a legend from full red over white to full blue."""
    font, left = words.ImageFont.load_default(18), words.LEFT
    sheet, second = words.as_image(pair(asked("q", 0), "a", "b"), ROWS), left + font.getlength("<i>") + 8
    first_row = 70 + 42 + 42
    assert sheet.size == (1000, first_row + 2 * 42 + 4)
    at = lambda x: sheet.getpixel((x, first_row - 1))
    assert at(left - 2) == (90, 150, 255) and at(second - 2) == (255, 182, 178)
    legend = [sheet.getpixel((x, 70 + 42 - 1)) for x in range(left - 2, 1000)]
    drawn = [colour for colour, before in zip(legend, [None, *legend]) if colour != before]
    assert drawn[0] == (255, 110, 100) and (90, 150, 255) in drawn and len({*drawn}) == 7
    sheet = words.as_image(pair(asked("q"), "a", "b", grey(10), [grey(90), grey(200)]), ROWS)
    assert [sheet.getpixel((10 + 260 * i + 20, 200)) for i in range(3)] == [(n,) * 3 for n in (10, 90, 200)]
    long = words.as_image(pair(asked("q"), "a", "b"), [("chosen", [(" picture", 3.0)] * 30)])
    edge = {long.getpixel((x, y)) for x in range(994, 1000) for y in range(long.height)}
    assert long.height > first_row + 42 + 4 and edge == {(255, 255, 255)}


def test_words_command_writes_page_and_picture(mixed, finished, bunny, tmp_path, capsys):
    """Every example is on the page; the one that was asked for is in the picture."""
    arguments = f"--model {bunny} --adapter {finished} --data {mixed}".split()
    assert run_command(words.run, [*arguments, "--to", str(tmp_path / "x.html")]) == 0
    page = (tmp_path / "x.html").read_text()
    assert page.count("<h2>") == 3 and page.count("<img") == 2 + 4 + 2 and page.count("rejected, tuned") == 3
    assert "Which? / And this:" in page or "Which? / A red one. / And this:" in page
    assert run_command(words.run, [*arguments, "--to", str(tmp_path / "x.png"), "--example", "2"]) == 0
    assert Image.open(tmp_path / "x.png").getpixel((800, 110)) != (255, 255, 255)  # a fourth image
    assert run_command(words.run, [*arguments, "--to", str(tmp_path / "none.html"), "--no-image"]) == 0
    assert "<img" not in (tmp_path / "none.html").read_text()


def test_study_of_words_tells_colours_and_shapes_from_the_rest(monkeypatch, capsys):
    """Means by hand: (1 + 2) / 2 of colour and shape words, (4 + 0) / 2 of the others, times 1 for the base,
    2 for DPO and 3 for mDPO, and 10 times as much with another image; y_l is left out."""
    found = [(" red", 1.0), (" reddish", 4.0), ("ring", 2.0), (".", 0.0)]
    times = {None: 1, "DPO": 2, "mDPO": 3}
    monkeypatch.setattr(miniature, "prepare_seed", lambda *args: None)
    monkeypatch.setattr(miniature, "run_method", lambda *args, **options: None)
    monkeypatch.setattr(words, "read_examples", lambda path, log: ["example"])
    monkeypatch.setattr(words, "load_tuned", lambda model, run, device: (times[run and run.name], device))
    weight = {"crop": 1, "random": 10}
    pairs = lambda examples, reject, seed: {("held out", 0): weight[reject]}
    monkeypatch.setattr(words, "Pairs", pairs)
    scaled = lambda model, pair: [(text, value * model * pair) for text, value in found]
    devices = []  # the README's digits are a CPU's

    def both(model, device, pair):
        devices.append(device)
        return {"chosen": scaled(model, pair), "rejected": [(" red", 99.0)]}

    monkeypatch.setattr(words, "differences", both)
    assert run_command(words.run, ["study", "4"]) == 0 and {*devices} == {"cpu"}
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["4", reject, method, f"{1.5 * factor * scale:.2f}", f"{2 * factor * scale:.2f}"]
        for method, factor in (("base", 1), ("DPO", 2), ("mDPO", 3))
        for reject, scale in weight.items()
    ]


def test_curves_show_every_metric_of_the_readme():
    """A metric without a curve is a metric that nobody looks at. Memory is one number, not a curve."""
    table = README.split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = {name for row in rows for name in re.findall("`(.*?)`", row)}
    assert curves.METRICS.keys() == names - {"peak_memory_gib"}


def test_curves_are_drawn_of_a_run_in_progress(tmp_path):
    """A line that is being written is not a broken log; a broken line before it is."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "eval/loss": 2.0}\n{"step": 1, "loss": 1.5}\n'
    expected = [{"step": 0, "eval/loss": 2.0}, {"step": 1, "loss": 1.5}]
    for text in (whole, whole[:-1], whole + '{"step": 2, "lo'):
        path.write_text(text)
        assert curves.read_log(tmp_path) == expected
    for text in ("", '{"st', '{"st\n{"step": 1}\n'):
        path.write_text(text)
        with pytest.raises(BadInput, match="metrics.jsonl: cannot be read"):
            curves.read_log(tmp_path)


def test_curves_without_matplotlib_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    """It is an extra package: said before any work, with the command."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(curves, "read_log", lambda run: pytest.fail("read"))
    assert run_command(curves.run, [str(tmp_path), "--to", "x.png"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: a figure needs matplotlib (pip install matplotlib)") and err.count("\n") == 1
    )


def test_curves_of_trl_are_read_under_the_names_of_train_py(tmp_path):
    """TRL calls a held-out loss eval_loss. Its line about the whole run has no metric of a step."""
    history = [
        {"eval_loss": 2.0, "eval_rewards/image_margins": 0.5, "eval_runtime": 3.0, "step": 0},
        {"loss": 1.5, "learning_rate": 0.1, "grad_norm": 2.0, "rewards/chosen": 0.25, "step": 1},
        {"train_loss": 1.5, "train_runtime": 9.0, "step": 1},
    ]
    write(tmp_path / "trl" / "trainer_state.json", {"log_history": history})
    records = curves.read_log(tmp_path / "trl")
    assert records[0].items() >= {"eval/loss": 2.0, "eval/rewards/image_margins": 0.5, "step": 0}.items()
    assert records[1] == {"loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "rewards/chosen": 0.25, "step": 1}
    assert curves.points(records, "loss") == ([1], [1.5])
    write(tmp_path / "empty" / "trainer_state.json", {"log_history": []})
    with pytest.raises(BadInput, match="trainer_state.json: cannot be read: holds no step yet"):
        curves.read_log(tmp_path / "empty")


def test_an_accuracy_before_training_is_no_point():
    """Before training all margins are 0, and none is above 0: an accuracy of 0 looks like a fall to chance's
    opposite. Later a margin of 0.1 with an accuracy of 0 is one, and so is a margin of 0."""
    margins = {"eval/rewards/margins": 0.0, "eval/rewards/image_margins": 0.0}
    accuracies = {"eval/rewards/accuracies": 0.0, "eval/rewards/image_accuracies": 0.0}
    later = {"step": 9, "rewards/margins": 0.1, "rewards/accuracies": 0.0, "eval/rewards/image_margins": 0.1,
             "eval/rewards/image_accuracies": 0.25}  # fmt: skip
    records = [{"step": 0} | margins | accuracies, later]
    assert curves.points(records, "eval/rewards/accuracies") == ([], [])
    assert curves.points(records, "eval/rewards/image_accuracies") == ([9], [0.25])
    assert curves.points(records, "rewards/accuracies") == ([9], [0.0])
    assert curves.points(records, "eval/rewards/image_margins") == ([0, 9], [0.0, 0.1])


def test_curves_have_a_colour_a_run_and_points_where_held_out(finished, tmp_path):
    """Curves under a wrong name are worse than none. The second run is DPO's: it lacks a term."""
    pytest.importorskip("matplotlib")
    second = {"step": 1, "loss": 1.5, "loss/conditional": 0.5, "eval/loss": 1.0}
    first = [{"step": 0, "eval/loss": 2.0}, second]
    figure = curves.draw({"a": first, "b": [{"step": 3, "loss": 0.5, "lr": 0.1, "eval/rewards/chosen": 0.7}]})
    panels = {axis.get_title().split("\n")[0]: axis for axis in figure.axes}
    assert [*panels] == ["loss", "loss/conditional", "rewards/chosen", "lr"]  # and none that nobody logged
    drawn = lambda title: [
        (line.get_color(), line.get_marker(), line.get_linestyle(), *map(list, line.get_data()))
        for line in panels[title].lines
        if len(line.get_xdata())
    ]
    assert drawn("loss") == [
        ("C0", "None", "-", [1], [1.5]),
        ("C0", "o", "None", [0, 1], [2.0, 1.0]),
        ("C1", "None", "-", [3], [0.5]),
    ]
    assert drawn("loss/conditional") == [("C0", "None", "-", [1], [0.5])]
    assert drawn("rewards/chosen") == [("C1", "o", "None", [3], [0.7])]
    assert drawn("lr") == [("C1", "None", "-", [3], [0.1])]
    (legend,) = figure.legends
    named = dict(zip((text.get_text() for text in legend.get_texts()), legend.legend_handles))
    assert {name: line.get_color() for name, line in named.items()} == {
        "a": "C0",
        "b": "C1",
        "held-out examples": "k",
    }
    assert run_command(curves.run, [str(finished), str(finished), "--to", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size[0] == 1620


@pytest.fixture
def tiny(monkeypatch):
    """Sizes and texts at which a comparison takes a second -> the arguments of a comparison."""
    text, vision = throughput.phi(32, 64, 1, 2, 600), throughput.siglip(32, 64, 1, 2, 32, 8)
    monkeypatch.setitem(throughput.SHAPES, "tiny", (text, vision))
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
        steppers.update((stepper.name, stepper) for stepper in timed)
        for stepper in timed:
            stepper.times = [0.5 if stepper.name == "ours" else 2.0]
        return {stepper.name: {"median": 4.0, "low": 2.0, "high": 5.0} for stepper in timed[1:]}

    monkeypatch.setattr(throughput, "in_turns", in_turns)
    return steppers


def what_a_step_does(stepper):
    """One step, watched: which layers, passes, images, tokens, masks and logits it has."""
    model = stepper.model.get_base_model()
    decoder, images, tokens, logits, masks, cast = model.get_decoder(), [], [], [], set(), set()
    calls, without_gradient = [], []

    def in_layer(module, arguments, options):
        cast.add(torch.is_autocast_enabled("cpu"))
        masks.add("blocks" if "blocks" in options else type(options["attention_mask"]))

    def in_decoder(module, arguments, options):
        tokens.append(options["inputs_embeds"].shape[:2].numel())
        without_gradient.append(not torch.is_grad_enabled())

    def in_tower(module, arguments, options):
        images.append(len(arguments[0] if arguments else options["pixel_values"]))

    handles = [
        decoder.layers[0].register_forward_pre_hook(in_layer, with_kwargs=True),
        decoder.layers[0].mlp.register_forward_pre_hook(lambda module, arguments: calls.append(module)),
        decoder.register_forward_pre_hook(in_decoder, with_kwargs=True),
        model.model.vision_tower.register_forward_pre_hook(in_tower, with_kwargs=True),
        model.lm_head.register_forward_pre_hook(
            lambda module, arguments: logits.append(arguments[0][..., 0].numel())
        ),
    ]
    stepper.step()
    for handle in handles:
        handle.remove()
    assert all(p.isfinite().all() for p in stepper.parameters)  # nan, where two models share how they attend
    layers = {
        type(module).__name__ for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)
    }
    activation = type(decoder.layers[0].mlp.activation_fn).__name__
    return {
        "LoRA": (layers, {type(m) is train.LoraLinear for m in model.modules() if hasattr(m, "lora_A")}),
        "activation": activation,
        "checkpointing": len(calls) > len(tokens),
        "autocast": cast,
        "images": sum(images),
        "tokens": tokens,
        "logits": logits,
        "masks": masks,
        "without gradient": sorted(without_gradient),
    }


def batch_sizes(stepper):
    """Of its next batch, a packed one, and as of any: its tokens; those of responses."""
    batch = next(stepper.batches)
    return len(batch.take), len(batch.answers)


OURS_LAYERS, PEFTS_LAYERS = ({"LoraLinear"}, {True}), ({"Linear"}, {False})


def ours_at_identical_settings(n_tokens, n_targets):
    """Two passes, of which the reference's has no gradient, over one packed row; four images, each encoded
    once."""
    return {
        "LoRA": OURS_LAYERS,
        "activation": "GELUTanh",
        "checkpointing": True,
        "autocast": {False},
        "images": 4,
        "tokens": [n_tokens] * 2,
        "logits": [n_targets] * 2,
        "masks": {"blocks"},
        "without gradient": [False, True],
    }


def authors_at_identical_settings(n_tokens):
    """Two passes over six rows without a mask, three images an example each, logits of every position."""
    same = ours_at_identical_settings(n_tokens, n_tokens)
    return same | {"images": 12, "masks": {type(None)}}


def test_throughput_compares_like_with_like_at_identical_settings(tiny, timed, monkeypatch):
    """Settings called identical are the README's first claim: the same checkpointing, LoRA layers and
    activation on all sides, no mask for the authors' rows, and not a pass or an image more than theirs. TRL
    gets a model of its own: its constructor would make the authors' rows go back through the frozen tower,
    too."""
    stood_on = []

    def trl_rival(model, processor, pairs):
        stood_on.append(model)
        return make_batch, throughput.authors_losses

    monkeypatch.setattr(throughput, "trl_rival", trl_rival)
    tiny.trl = True
    result = throughput.compare(tiny, identical=True)
    assert list(timed) == ["ours", "authors", "trl"] and result["settings"] == "identical"
    assert stood_on == [timed["trl"].model]
    for stepper in timed.values():  # a model made later must not change the attention of one made before: nan
        losses = stepper.losses(stepper.model, next(stepper.batches))
        assert losses.tolist() == pytest.approx([3 * math.log(2)] * 2)
    assert len({stepper.model for stepper in timed.values()}) == 3
    assert what_a_step_does(timed["ours"]) == ours_at_identical_settings(*batch_sizes(timed["ours"]))
    rows = next(timed["authors"].batches).labels
    assert len(rows) == 6
    for name in ("authors", "trl"):
        assert what_a_step_does(timed[name]) == authors_at_identical_settings(rows.numel())


def test_throughput_compares_ours_at_its_best_with_the_others_as_released(tiny, timed, monkeypatch):
    """Ours gains --no-checkpointing and nothing else; theirs peft's layers, Phi's activation and, in bf16,
    autocast, and nothing else. Without --trl TRL is not run."""
    monkeypatch.setattr(throughput, "trl_rival", lambda *arguments: pytest.fail("TRL is run"))
    tiny.dtype = torch.bfloat16
    result = throughput.compare(tiny, identical=False)
    assert list(timed) == ["ours", "authors"] and "at its best" in result["settings"]
    ours = ours_at_identical_settings(*batch_sizes(timed["ours"])) | {"checkpointing": False}
    assert what_a_step_does(timed["ours"]) == ours
    released = {"LoRA": PEFTS_LAYERS, "activation": "NewGELUActivation", "autocast": {True}}
    authors = authors_at_identical_settings(next(timed["authors"].batches).labels.numel())
    assert what_a_step_does(timed["authors"]) == authors | released


def test_throughput_ratio_is_of_the_same_round_and_above_1_where_ours_is_faster():
    """Upside down, a README's "2 times as long" would be its opposite. Two steps a round, after two that
    do not count. Ours takes 1, 2, 3 and 4 seconds, so 1.5 and 3.5 a step; the other 6, 6, 7 and 7: 6 / 1.5 =
    4, 7 / 3.5 = 2; the third 1.5, 1.5, 10.5, 10.5: 1 and 3. In three rounds, medians are not means."""

    def stepper(name, *seconds):
        left = iter((100, 100, *seconds))
        return SimpleNamespace(name=name, times=[], step=lambda: next(left))

    steppers = [stepper("ours", 1, 2, 3, 4), stepper("a", 6, 6, 7, 7), stepper("b", 1.5, 1.5, 10.5, 10.5)]
    ratios = throughput.in_turns(steppers, 2, 2)
    assert ratios == {"a": {"median": 3, "low": 2, "high": 4}, "b": {"median": 2, "low": 1, "high": 3}}
    assert steppers[0].times == [1.5, 3.5]
    steppers = [stepper("ours", 2, 1, 4), stepper("a", 6, 4, 16)]
    assert throughput.in_turns(steppers, 1, 3)["a"] == {"median": 4, "low": 3, "high": 4}
    steppers = [stepper("ours", 1, 1, 1), stepper("a", 1, 2, 9)]
    assert throughput.in_turns(steppers, 1, 3)["a"] == {"median": 2, "low": 1, "high": 9}


def test_throughput_rates_are_of_examples(tiny, timed):
    """Two examples in half a second are 4 a second; 30 000 of these take 7500 s; the other's 2 s are one a
    second."""
    result = throughput.compare(tiny, identical=True)
    assert result["examples_per_second"] == {"ours": 4, "authors": 1}
    assert result["hours_for_10k_x_3"] == pytest.approx(7500 / 3600)
    assert result["speedup"] == {"authors": {"median": 4.0, "low": 2.0, "high": 5.0}}


def with_random_adapter(model):
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_throughput_rivals_have_the_same_loss(tiny):
    """A benchmark against a rival that computes something else is worthless. The reference is the model
    without adapter."""
    model, processor = throughput.make_model("tiny", "cpu", torch.float32, 8)
    with_random_adapter(model)
    pairs = throughput.make_pairs(2)
    expected = throughput.our_losses(model, throughput.packed_batch(pairs, processor))
    assert (expected - 3 * math.log(2)).abs().min() > 1e-3
    released = lambda model, batch: throughput.as_released(model, throughput.authors_losses)(model, batch)
    for losses in throughput.authors_losses, released:
        found = losses(model, make_batch(pairs, processor))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", range(3))
@pytest.mark.parametrize("off", [0.5, -0.5])
def test_throughput_stops_where_the_schemes_must_agree_and_do_not(field, off, tiny, timed, monkeypatch):
    """The README says that they are checked to give the same log-probabilities before anything is timed."""
    authors_logps = throughput.authors_logps

    def wrong(*arguments):
        logps = list(authors_logps(*arguments))
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


class Clock:
    """In place of the module `time`: it moves when it is told to."""

    now = 0.0

    def move(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now


def test_stepper_times_the_whole_of_a_training_step(tiny, monkeypatch):
    """Losses take 2 seconds and the backward pass 5. AdamW moves the weight by the
    learning rate against the sign of a gradient that does not change: to -0.001 and -0.002; it is cut to a
    norm of 1."""
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    norms, used = [], []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most: norms.append((clip(p, most).item(), most))
    )

    def losses(model, batch):
        clock.move(2)
        used.append(batch["slope"])
        loss = model.weight[0] * batch["slope"]
        loss.register_hook(lambda gradient: clock.move(5))
        return loss

    def make(pairs, processor):
        clock.move(11)  # before the clock starts
        return {"slope": pairs}

    stepper = throughput.Stepper("", model, None, [1.0, 3.0, 2.0], losses, make)
    assert [stepper.step() for _ in range(3)] == [7, 7, 7] and used == [1, 3, 2]
    assert norms == [(1, 1.0), (3, 1.0), (2, 1.0)] and model.weight.grad is None
    assert model.weight.item() == pytest.approx(-0.003, abs=1e-6)
    with pytest.raises(StopIteration):  # no batch comes twice
        stepper.step()


def test_every_step_of_every_scheme_has_pairs_of_its_own_and_all_schemes_the_same(tiny, monkeypatch):
    """A benchmark whose batches come round again hides what plans or allocates by shape. Two steps before the
    clock starts, and two rounds of two batches of two examples."""
    drawn = [pair("there is", "a red", "blue", noise(1), noise(2))._replace(id=str(i)) for i in range(40)]
    monkeypatch.setattr(throughput, "make_pairs", lambda n: drawn[:n])
    seen = {}

    class Step:
        def __init__(self, name, model, processor, groups, losses, make=None):
            self.name, self.times, self.groups = name, [], iter(groups)

        def step(self):
            seen.setdefault(self.name, []).extend(one.id for one in next(self.groups))
            return 1.0

    monkeypatch.setattr(throughput, "Stepper", Step)
    tiny.rounds = 2
    for measure in (lambda: throughput.compare(tiny, True), lambda: throughput.compare(tiny, False)):
        seen.clear()
        measure()
        assert len(seen) > 1 and all(ids == [str(i) for i in range(12)] for ids in seen.values())


def test_cudnns_attention_is_off_as_in_training(tiny):
    """It plans anew for each shape; throughput makes its models itself."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    throughput.make_model("tiny", "cpu", torch.float32, 4)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_texts_are_as_long_as_the_script_says(monkeypatch):
    """Questions of 40 words, answers of 110 and 90: lengths decide what padding and a shared prefix cost."""
    monkeypatch.setattr(Image, "effect_mandelbrot", lambda *arguments: Image.new("L", (1, 1)))
    pairs = throughput.make_pairs(1500)
    means = [sum(len(one[i].split()) for one in pairs) / 1500 for i in range(3)]
    assert means == [pytest.approx(mean, rel=0.06) for mean in (40, 110, 90)]


def test_model_of_throughput_has_no_dropout_and_the_papers_lora(tiny, monkeypatch):
    """Dropout would keep the schemes from being compared. alpha is twice the rank (paper 4.1); the tower has
    no adapter. A LLaVA's tower has one token more than patches, of the whole image."""
    text, vision = throughput.SHAPES["tiny"]
    dropping = transformers.PhiConfig(**text.to_dict() | {"resid_pdrop": 0.1, "attention_dropout": 0.1})
    monkeypatch.setitem(throughput.SHAPES, "tiny", (dropping, vision))
    model, _ = throughput.make_model("tiny", "cpu", torch.float32, 4)
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, train.LoraLinear)}
    assert len(adapted) == 6 and all("language_model" in name for name in adapted)
    assert {(m.scaling["default"], m.lora_A["default"].out_features) for m in adapted.values()} == {(2, 4)}

    llama = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=600
    )
    clip = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    monkeypatch.setitem(throughput.SHAPES, "tiny", (llama, clip))
    model, processor = throughput.make_model("tiny", "cpu", torch.float32, 4)
    pairs = throughput.make_pairs(2)
    ids = make_batch(pairs, processor).inputs["input_ids"]
    assert (ids == processor.image_token_id).sum(1).tolist() == [16] * 6
    throughput.check_equal(with_random_adapter(model), processor, pairs)


@pytest.mark.parametrize("name", throughput.MEMORY)
def test_memory_is_measured_of_the_scheme_that_is_named(name, tiny, monkeypatch):
    """What a user rents a GPU by. The last step is on the micro-batch of the longest texts; the peak is above
    the start."""
    pairs = [
        pair("there is " * 9, "a red " * 9, "blue", noise(3), noise(4)),
        pair("there", "is", "a", noise(1), noise(2)),
        pair("there is", "is a", "a", noise(1), noise(2)),
    ]
    monkeypatch.setattr(throughput, "make_pairs", lambda n: pairs)
    tiny.micro_batch_size, tiny.dtype = 1, torch.bfloat16
    kept, step = [], throughput.Stepper.step
    keep = lambda stepper: kept.append((stepper, next(stepper.batches)))
    monkeypatch.setattr(throughput.Stepper, "step", keep)
    monkeypatch.setattr(throughput, "memory_now", lambda device, peak=False: 4.0 if peak else 1.5)
    assert throughput.measure_memory(tiny, name) == {"memory_gib": {name: {"before": 1.5, "above": 2.5}}}
    (stepper, second), (same, heaviest) = kept
    n_answers = lambda batch: (batch.labels >= 0).sum().item()
    assert stepper is same and n_answers(heaviest) > 2 * 18  # y_w of 18 words, twice
    assert len(heaviest.labels) == 3 and 6 < n_answers(second) < 18
    stepper.batches = iter([heaviest])
    monkeypatch.setattr(throughput.Stepper, "step", step)
    did = what_a_step_does(stepper)
    assert did["LoRA"] == OURS_LAYERS and did["activation"] == "GELUTanh" and did["autocast"] == {False}
    assert did["checkpointing"] == (name != "ours, no checkpointing")
    assert did["images"] == (6 if name == "authors" else 2)
    assert did["masks"] == ({type(None)} if name == "authors" else {"blocks"})


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live."""

    def __init__(self, known):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet(known)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        out = operation(*arguments, **(options or {}))
        for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, n_bytes):
        self.now -= n_bytes


def set_shape(monkeypatch, kind, n_layers, vocab_size):
    sizes = (96, 384, n_layers, 4, vocab_size)
    if kind == "phi":
        text = throughput.phi(*sizes)
    else:
        text = transformers.LlamaConfig(**dict(zip(throughput.TEXT, sizes)))
    monkeypatch.setitem(throughput.SHAPES, "tiny", (text, throughput.siglip(16, 16, 1, 2, 128, 8)))


@pytest.mark.parametrize("kind", ["phi", "llama"])
def test_memory_formula_counts_what_autograd_saves_in_a_layer(kind, tiny, monkeypatch):
    """Two layers more, one token's bytes more. Checkpointing saves a layer's input only."""
    saved = {}
    for n_layers, checkpointing in itertools.product((1, 3), (False, True)):
        set_shape(monkeypatch, kind, n_layers, 600)
        model, processor = throughput.make_model("tiny", "cpu", torch.bfloat16, 4)
        if checkpointing:
            train.enable_checkpointing(model.train())
        batch = throughput.packed_batch(throughput.make_pairs(1), processor)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = throughput.our_losses(model, batch)
        n_bytes = sum(s.nbytes() for at, s in storages.items() if at not in weights)
        saved[n_layers, checkpointing] = n_bytes / len(batch.take)
        del losses
    terms = [throughput.memory_terms(model)[f"a token, {w} checkpointing"] for w in ("with", "without")]
    layer = (terms[1] - 6 * 96) / 3
    assert (saved[3, False] - saved[1, False]) / 2 == pytest.approx(layer, rel=0.03)
    assert (saved[3, True] - saved[1, True]) / 2 == pytest.approx(2 * 96) and terms[0] == (2 * 3 + 6) * 96


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("kind", "vocab_size"), [("phi", 600), ("llama", 600), ("phi", 20_000)])
def test_memory_formula_predicts_the_peak_of_a_step(kind, vocab_size, checkpointing, tiny, monkeypatch):
    """Of the tensors alive, on the CPU. The large vocabulary puts the peak where logits are."""
    set_shape(monkeypatch, kind, 3, vocab_size)
    tiny.dtype = torch.bfloat16
    model, processor = throughput.prepare(tiny, checkpointing)
    batch, there = throughput.packed_batch(throughput.make_pairs(1), processor), [*model.parameters()]
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.grad = torch.zeros_like(parameter)  # as in every micro-batch but a run's first
        there.append(parameter.grad)
    batch.map(there.append)
    there = [tensor.untyped_storage() for tensor in there]
    with Live(there) as live:
        throughput.our_losses(model, batch).mean().backward()
    terms = throughput.memory_terms(model)
    sizes = len(batch.take), len(batch.answers)
    predicted = throughput.predicted_peak(terms, *sizes, checkpointing) * 2**30
    before = sum([*terms.values()][:4])  # weights, adapter, AdamW's state, gradient
    assert predicted - before == pytest.approx(live.peak, rel=0.12)
    cast = 0 if checkpointing else terms["adapter in bf16, without checkpointing"]
    assert throughput.predicted_peak(terms, 0, 0, checkpointing) * 2**30 == pytest.approx(before + cast)


def test_throughput_command_measures_everything(tiny, monkeypatch, tmp_path, capsys):
    """The README's first command of its section: every measurement is a line of the file. Memory is measured
    by the same command in fresh processes."""
    commands = []
    run = lambda command, **options: commands.append((command[2:], options["check"]))
    monkeypatch.setattr(subprocess, "run", run)
    given = ["--device", "cpu", "--rounds", "1", "--items", "2", "--micro-batch-size", "2"]
    given += ["--json", str(tmp_path / "out.jsonl")]
    throughput.run(given)
    assert commands == [([*given, "--only", name], True) for name in throughput.MEMORY]
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    settings = [record["settings"] for record in records[:2]]
    assert settings == ["identical", "ours at its best, theirs as released"]
    assert len(records) == 2 and records[0]["shape"] == "tiny"
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records
    monkeypatch.setattr(subprocess, "run", lambda command, **options: 1 / 0)
    with pytest.raises(BadInput, match="memory of ours"):  # whose own process said what was wrong
        throughput.run(given)


def test_throughput_takes_the_real_shape_on_a_gpu(monkeypatch):
    """There `tiny` is bound by launches, and would say that we are slower."""
    measured = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    note = lambda args, name: measured.append((args.shape, args.dtype))
    monkeypatch.setattr(throughput, "measure_memory", note)
    for device in ("cuda", "cpu"):
        throughput.run(["--device", device, "--only", "ours"])
    throughput.run(["--device", "cuda", "--shape", "tiny", "--only", "ours"])
    in_bf16 = lambda shape: (shape, torch.bfloat16)
    assert measured == [in_bf16("bunny-3b"), ("tiny", torch.float32), in_bf16("tiny")]


def test_memory_formula_prints_terms_peaks_and_hours(tiny, monkeypatch, capsys):
    """For any shape: on a machine without a GPU, before one is rented. Nothing is measured."""
    terms = throughput.memory_terms
    monkeypatch.setattr(
        throughput, "memory_terms", lambda model: terms(model) | {"weights in bf16": 3 * 2**30}
    )
    throughput.print_formula("tiny")
    printed = capsys.readouterr().out
    assert "  3.00 GiB  weights in bf16\n" in printed
    assert "tiny: predicted, not measured" in printed and len(re.findall("GiB|kB ", printed)) == 10
    assert len(re.findall(r"^ +\d+: .* with checkpointing, .* without$", printed, re.MULTILINE)) == 6
    assert printed.count(" checkpointing: ") == 8 and printed.count(" ms: ") == 8 * len(throughput.CARDS)


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
    assert sum(answer.startswith("orange") for answer in said) / 1000 == pytest.approx(0.72, abs=0.05)
    assert sum(answer.endswith("picture.") for answer in said) / 1000 == pytest.approx(0.5, abs=0.05)


def test_a_base_is_trained_and_loads(tmp_path, monkeypatch):
    """The making of a base, in two steps: it feeds encoded images to the model, whose outputs the library may
    ask for more than they hold."""
    monkeypatch.setattr(tiny_bunny, "learn_to_see", lambda *args: None)
    folder = tiny_bunny.write_base(tmp_path / "base", 3, False, shapes.World(2, 3, base_steps=2))
    assert train.load_model(str(folder))[0].config.image_seq_length == 16


def test_readme_of_the_study_of_words_says_what_its_table_shows():
    """All four predictions held in all three seeds. Of the other tokens only the range is there: any gap
    between two models is at most its width."""
    _, *rows = table_below("| m_l | base |")
    crop, another = (
        {name: [*map(float, re.findall(r"\d\.\d\d", cell))] for name, cell in zip(names, cells)}
        for names, (_, *cells) in zip([("base", "DPO", "mDPO", "others")] * 2, rows, strict=True)
    )
    for row in (crop, another):
        assert min(row["base"]) > max(row["others"])
        assert all(mdpo > dpo for mdpo, dpo in zip(row["mDPO"], row["DPO"], strict=True))
    width = another["others"][1] - another["others"][0]
    assert min(mdpo - dpo for mdpo, dpo in zip(another["mDPO"], another["DPO"])) > width
    for base, dpo, mdpo in zip(crop["base"], crop["DPO"], crop["mDPO"]):
        assert abs(dpo - base) < (mdpo - base) / 2
    assert len(crop["base"]) == len(another["base"]) == 3
    assert "The four predictions at the top of `words.py` held in all seeds." in SAID


WEIGHTED = {"dpo": softplus(-1.5), "conditional": 0.2 * softplus(-1.0)}
NONE = -100  # y_w of two examples has 4 tokens and 3, y_l 5 and 1


OF_4_TOKENS = SimpleNamespace(labels=torch.tensor(
    [[NONE, 1, 2, 3, 0, NONE], [NONE, 1, 2, 0, NONE, NONE], [NONE, 1, 2, 3, 4, 0], [NONE, 0] + [NONE] * 4]
))  # fmt: skip


@pytest.mark.parametrize(
    "loss, options, expected",
    [
        (variants.chip_loss, {}, {"joint": softplus(-2.5)}),
        (variants.opa_dpo_loss, {}, WEIGHTED | {"anchor": softplus(-0.5)}),
        (variants.opa_dpo_loss, {"delta": 0.25}, WEIGHTED | {"anchor": softplus(-0.25)}),
        (variants.rpo_loss, {"batch": OF_4_TOKENS}, {"dpo": softplus(-1.5), "sft": 10 / 4}),
        (variants.rpo_loss, {"batch": OF_4_TOKENS, "alpha": 2}, {"dpo": softplus(-1.5), "sft": 2 * 10 / 4}),
    ],
)
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
    batch = SimpleNamespace(labels=torch.tensor([[NONE, NONE, 1, 0, NONE], [NONE, NONE, 1, 2, 0]]))
    losses, metrics = variants.rpo_loss(policy, ref, 0.5, batch=batch)
    assert losses.item() == pytest.approx(softplus(-1.5) + 10.1 / 2, abs=1e-12)
    assert not any("image" in name for name in metrics)


def test_defaults_of_the_variants_are_the_papers():
    """beta 0.1, as in mDPO: rewards 0.1, -0.2 and -0.1, margins 0.3 and 0.2."""
    loss = lambda function: function(POLICY, REF)[0].item()
    assert loss(variants.chip_loss) == pytest.approx(softplus(-0.5), abs=1e-6)
    opa_dpo = softplus(-0.3) + 0.2 * softplus(-0.2) + softplus(-0.1)
    assert loss(variants.opa_dpo_loss) == pytest.approx(opa_dpo, abs=1e-6)
    rpo = lambda *logps: variants.rpo_loss(*logps, batch=OF_4_TOKENS)
    assert loss(rpo) == pytest.approx(softplus(-0.3) + 10 / 4, abs=1e-6)


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
        assert x.mean().item() == pytest.approx(0.0034, abs=0.004)
        assert x.square().mean().item() == pytest.approx(expected, rel=0.01)
    by_pixel = x.view(-1, 3).T
    assert torch.corrcoef(by_pixel).fill_diagonal_(0).abs().max() < 0.02  # each colour has noise of its own,
    neighbours = torch.stack([by_pixel[0, 1:], by_pixel[0, :-1]])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.02  # and each pixel


def test_mask_hides_three_patches_in_ten():
    """173 of 24 x 24 patches, here 2 x 4 pixels each, are the image's mean grey; the others do not change."""
    image, rng = noise(1, (48, 96)), random.Random(0)
    grey = round(sum(image.tobytes()) / len(image.tobytes()))
    masked, n_hidden = variants.mask_patches(image, rng), 0
    for x, y in itertools.product(range(0, 48, 2), range(0, 96, 4)):
        before, after = (picture.crop((x, y, x + 2, y + 4)).tobytes() for picture in (image, masked))
        assert after in (before, bytes([grey]) * 24)
        n_hidden += after != before
    assert n_hidden == 173
    assert variants.mask_patches(image, rng).tobytes() != masked.tobytes()
    image = noise(2, (100, 75))  # no multiple of 24
    before, after = (picture.tobytes() for picture in (image, variants.mask_patches(image, rng)))
    changed = sum(before[at : at + 3] != after[at : at + 3] for at in range(0, len(before), 3))
    assert changed / (100 * 75) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("strategy", ["noise", "mask"])
def test_rejected_images_of_the_variants_are_functions_of_image_and_rng(strategy, tmp_path):
    """Resumed runs and workers see them again only then; another epoch and another example see others."""
    examples = as_examples(tmp_path, 2)
    draw = lambda epoch, index: Pairs(examples, strategy)[epoch, index].images_rejected[0].tobytes()
    torch.manual_seed(1)
    first = draw(0, 0)
    torch.manual_seed(2)
    assert draw(0, 0) == first != draw(1, 0) and draw(0, 1) != draw(1, 1)
    assert data.STRATEGIES[strategy](noise(1), random.Random(1)).size == noise(1).size


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
    for other in {*variants.VARIANTS} - {name}:
        assert run_command(variants.run, [other, "--resume", str(out)]) == 2
        assert "the run began with other values of loss" in capsys.readouterr().err
    assert train.main(["--resume", str(out)]) == 2
    assert "the run began with other values of loss" in capsys.readouterr().err
    assert run_command(variants.run, [name, f"--resume={out}"]) == 0
    assert all(torch.equal(v, adapter(out)[k]) for k, v in adapter(whole).items())
    args, (first, *_) = json.loads((whole / "args.json").read_text()), log_of(whole)
    expected = {  # reject, terms of the loss
        "chip": ("noise", {"loss/joint"}),
        "opa-dpo": ("mask", {"loss/dpo", "loss/conditional", "loss/anchor"}),
        "rpo": ("crop", {"loss/dpo", "loss/sft"}),
    }
    assert (args["reject"], {key for key in first if key.startswith("loss/")}) == expected[name]
    assert ("rewards/image_margins" in first) == (name != "rpo")  # m_l is encoded only where it is needed
    capsys.readouterr()
    assert run_command(evaluate.run, f"--model {bunny} --adapter {whole} --data {small}".split()) == 0
    assert {*re.findall(r"loss/\w+", capsys.readouterr().out)} == expected[name][1]


def test_variants_take_train_pys_flags_but_those_of_the_terms(monkeypatch, capsys):
    """`--anchors none` that changes nothing would be a run under a wrong name. The user's --reject counts."""
    given = []
    monkeypatch.setattr(train, "main", lambda argv, loss: given.append((argv, loss)) or 7)
    assert run_command(variants.run, ["chip", "--reject", "crop"]) == 7
    assert given == [(["--reject", "noise", "--reject", "crop"], variants.chip_loss)]
    for flag in ("--no-image", "--no-conditional", "--anchors", "--anchors=none", "--delta", "--demo"):
        assert run_command(variants.run, ["opa-dpo", flag, "none"]) == 2
        assert f"{flag.partition('=')[0]}: opa-dpo has terms of its own" in capsys.readouterr().err
    for argv in ([], ["simpo"]):
        assert run_command(variants.run, argv) == 2


def test_variants_are_run_from_their_file(tmp_path):
    """Users may be in another folder; workers that are spawned, not forked, import it as __mp_main__."""
    script = f"""
import runpy, sys
runpy.run_path({variants.__file__!r}, run_name="__mp_main__")
import data
print(*data.STRATEGIES, flush=True)
sys.argv[1:] = ["--help"]
runpy.run_path({variants.__file__!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("crop random moco noise mask\n")
    assert "CHiP" in done.stdout


@pytest.fixture
def pairs_file(tmp_path):
    """Images and answers of several sizes; the first image is turned by its EXIF data, the third is wide."""
    texts = [
        ("Describe the picture.", "There is a red circle.", "There is a blue square and a red circle."),
        (" What is in it?\n", "A blue square, and a red circle too. ", "No."),
        ("How many?", "One.", "There is a red square."),
        ("Is it red?", "It is.", "It is not."),
        ("Is it blue?", "No.", "Yes, in the picture."),
    ]
    records = []
    sizes = [(48, 32), (32, 40), (90, 6), (33, 33), (5, 64)]
    for i, (size, (question, chosen, rejected)) in enumerate(zip(sizes, texts)):
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 0 else 1
        noise(i, size).save(tmp_path / f"{i}.png", exif=exif)
        records.append({"image": f"{i}.png", "question": question, "chosen": chosen, "rejected": rejected})
    return write(tmp_path / "pairs.json", records)


@pytest.mark.parametrize("template", ["of the hub", "with <s>", "with </s>", "with a line before an answer"])
def test_minimal_has_train_pys_losses_and_gradients(template, llava, pairs_file):
    """Who retypes it must get mDPO: template, end-of-sequence, crop, padding and reference each move the
    loss by more than float32 rounding."""
    model, processor = with_lora(llava, checkpointing=False)
    if template == "with <s>":
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    if template == "with </s>":
        ending = "part.text + (eos_token if message.role == 'assistant' else ' ')"
        processor.chat_template = families.LLAVA.replace("part.text + ' '", ending)
        assert ending in processor.chat_template
    if template == "with a line before an answer":
        processor.chat_template = families.ONEVISION.replace("<|im_end|>", "</s>")
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
        ours, theirs = (torch.autograd.grad(value.sum(), parameters) for value in (loss, expected))
        distance = sum((a - b).square().sum() for a, b in zip(ours, theirs)).sqrt()
        assert distance < 1e-4 * sum(b.square().sum() for b in theirs).sqrt()


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
    flags = "--batch-size 2 --micro-batch-size 1 --lr 1e-3 --workers 0 --device cpu".split()
    flags += ["--model", str(llava), "--data", pairs_file, "--out", str(tmp_path / "train")]
    assert train.main(flags) == 0
    expected = [(record["loss"], record["grad_norm"]) for record in log_of(tmp_path / "train")]
    assert len(shown) == 9 and shown[-1][0] < 2
    for ours, theirs in zip(shown, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5, rel=2e-4)
    ours, theirs = adapter(tmp_path / "minimal"), adapter(tmp_path / "train")
    assert ours.keys() == theirs.keys()
    off = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert off < 5e-6 and 1e-4 < max(theirs[name].abs().max().item() for name in ours if "lora_B" in name)
    settings = json.loads((tmp_path / "minimal" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (64, 128)
    transformers.AutoProcessor.from_pretrained(tmp_path / "minimal")


def test_minimal_has_the_papers_settings():
    """They are what is copied first. The rest of them is held to train.py's defaults above."""
    names = {"BETA": "beta", "LR": "lr", "EPOCHS": "epochs", "BATCH": "batch_size", "SEED": "seed"}
    args = train.parse_args(["--model", "m", "--data", "d"])
    for name, flag in names.items():
        assert getattr(minimal, name) == vars(args)[flag], name


def test_minimal_on_a_gpu_checkpoints_in_bf16(llava, pairs_file, tmp_path, monkeypatch, capsys):
    """With the CPU in place of "cuda": weights are bf16, the adapter is float32, dropout is off, and each
    layer runs three times an example: for the reference, for the policy, and again in the backward pass."""
    attention, calls = transformers.models.llama.modeling_llama.LlamaAttention, []
    forward, to = attention.forward, torch.Tensor.to
    there_is_one = {
        "cuda": SimpleNamespace(is_available=lambda: True)
    }  # for minimal.py alone: the library would use it
    monkeypatch.setattr(minimal, "torch", SimpleNamespace(**vars(torch) | there_is_one))
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
    copy = tmp_path / "minimal.py"
    copy.write_text(Path(minimal.__file__).read_text())
    child = subprocess.run([sys.executable, copy, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 1 and "minimal.py MODEL pairs.json OUT" in child.stderr
