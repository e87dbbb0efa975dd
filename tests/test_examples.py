"""Tests of the worlds, the miniature, evaluation and words: what is drawn, asked, scored and shown."""

import base64
import contextlib
import importlib
import io
import json
import math
import random
import re
import runpy
import shutil
import signal
import statistics
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import data
import train
from data import BadInput, Example, make_batch, open_image, read_examples, run_command, texts_of
from examples import answer as answering
from examples import demo, evaluate, families, miniature, shapes, tiny_bunny, words
from mdpo import mdpo_loss
from test_mdpo import PAIRS, ROOT, asked, command, log_of, message, noise, pair, softplus, write
from tests.helpers import EXAMPLES_README, README, TURNS, as_examples, one_line_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Nobody takes the best device: digits of the studies stand in the README, and a GPU gives others."""
    for module in train, answering:
        monkeypatch.setattr(module, "best_device", lambda: pytest.fail("would take a GPU"))


def test_demo_runs_again_and_then_the_readme_snippets_run(tmp_path, monkeypatch, capsys, on_the_cpu):
    """What people copy first. Each run has a folder of its own, and the loss that was given."""
    write_pairs = shapes.write_pairs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.shapes.write_pairs", lambda folder, n, seed: write_pairs(folder, 12, seed))
    monkeypatch.setattr("examples.demo.report", partial(demo.report, n_scenes=4))
    twice = lambda *logps, batch, **options: (2 * mdpo_loss(*logps, **options)[0], {})
    monkeypatch.setattr(demo, "load_tuned", load := Mock(wraps=demo.load_tuned))
    for number, (loss, log_2s) in enumerate({mdpo_loss: [1, 3], twice: [6]}.items(), 1):  # DPO, mDPO
        assert demo.main("--demo --epochs 1 --eval-size 4 --workers 1".split(), loss) == 0
        out, run = capsys.readouterr().out, Path(f"runs/demo-{number}/out")
        assert str(run) in out and (" mDPO: " in out) == (number == 1) and (run / "picture.png").exists()
        losses = [log_of(folder)[0]["eval/loss"] / math.log(2) for folder in load.call_args.args[1]]
        assert losses == pytest.approx(log_2s, abs=1e-5) and (run.parent / "data/held_out.json").exists()
    Path("examples").symlink_to(ROOT / "examples")
    snippets = re.findall(r"```python\n(.*?)```", README + EXAMPLES_README, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, {})
    assert "loss/conditional" in capsys.readouterr().out


def test_demo_table_says_of_each_model_what_it_answers(tmp_path, monkeypatch):
    """Of three pictures the base babbles about all, DPO about two, mDPO about one: the second is shown."""
    exam, n_wrong, asked = shapes.make_exam(3), {None: 15, 0: 10, 1: 5}, []
    right = [shapes.answer_text(q, shapes.claims_of(scene, q), False) for scene, _, q in exam]
    speak = lambda model, number: contextlib.nullcontext(asked.append(n_wrong[number]))
    monkeypatch.setattr("examples.demo.speaking_as", speak)
    said = lambda *args, **options: right[: 15 - asked[-1]] + ["babble"] * asked[-1]
    monkeypatch.setattr("examples.demo.generate_answers", said)
    text = " ".join(demo.report(None, None, tmp_path, ("DPO", "mDPO"), n_scenes=3).split())
    assert text.startswith("15 held-out questions before DPO mDPO")
    for row in "malformed 1.000 0.667 0.333", "hallucination_rate 1.000 0.667", "false_premise 0.000 0.333":
        assert row in text
    assert Image.open(tmp_path / "picture.png").tobytes() == exam[5][1].resize((256, 256)).tobytes()
    said = "{} before: babble DPO: babble mDPO: {}".format
    shown = (said(shapes.question_text(exam[i][2]), right[i]) for i in (5, 7, 9))
    assert text.endswith(" ".join(shown))


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
    out, source = capsys.readouterr().out, Path(script.__file__).read_text()
    assert script.__doc__.split()[0] in out
    named = re.findall(r"--[a-z_-]+", "".join(re.findall(r'saves_memory="(.*)"', source)))
    assert {*named} <= {*re.findall(r"--[a-z_-]+", out)}


def test_demo_draws_nothing_before_its_arguments_are_read(tmp_path, monkeypatch, capsys):
    """`--help` or a wrong flag left 720 pictures behind, and --out a demo that failed at its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--demo", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    for wrong in ("--lr x", "--data x.json", "--model m", "--out x", "--resume x", "--nothing"):
        assert one_line_of(capsys, demo.main(["--demo", *wrong.split()])) and not any(tmp_path.iterdir())
    monkeypatch.setattr("examples.shapes.write_pairs", lambda to, n, seed: f"This draws {n} small pictures")
    monkeypatch.setattr("train.main", lambda argv, loss: (argv[3] in README, argv[5]))
    for flags, name in ("", "dpo"), ("--no-conditional", "out"), ("--anchors none", "out"):
        assert demo.main(["--demo", *flags.split()]) == (True, f"runs/demo-1/{name}")
    flags = " ".join(re.findall(r'^F=".* (--lr.*|--micro.*)"', EXAMPLES_README, re.MULTILINE))
    assert demo.FLAGS.startswith(flags + " --workers")


WRONG_ARGUMENTS = """
answer --model m --question q --max-new-tokens 0 -> --max-new-tokens: must be within 1 to
answer --model m --question q --device tpu -> --device: invalid choice
answer --question q -> --model
benchmarks amber --questions q --model m --to t --batch-size 0 -> --batch-size: must be within 1
benchmarks types scored.json -> invalid choice: 'types'
compare --model m --adapter a --data d --to t --batch-size 0 -> --batch-size: must be within 1
curves none -> --to
curves run --to x.png -> a figure needs matplotlib (pip
evaluate --model m --adapter a --data d --limit 0 -> --limit: must be within 1 to
evaluate --model BUNNY --data x.json -> --adapter
evaluate --model m --data none --adapter . -> holds no adapter
families qwen4_vl -> invalid choice: 'qwen4_vl'
merge --adapter a -> --to
miniature --figure x.png -> a figure needs matplotlib (pip
miniature --jobs 0 -> --jobs: must be within 1 to
miniature --seeds -1 -> --seeds: must be within 0 to
preview --rows 0 -> --rows: must be within 1 to
throughput --items 0 -> --items: must be within 1 to
throughput --micro-batch-size 0 -> --micro-batch-size: must be within 1 to
throughput --rounds 0 -> --rounds: must be within 1 to
throughput --threads 0 -> --threads: must be within 1 to
variants dpo -> invalid choice: 'dpo'
variants chip --delta 1 -> --delta: chip has terms of its own
words --model BUNNY --data x.json --to a.png -> already exists
"""


@pytest.mark.parametrize("line", WRONG_ARGUMENTS.strip().splitlines())
def test_wrong_arguments_of_the_examples_are_one_line(line, bunny, mixed, monkeypatch, capsys):
    """A mistake in a command is seen at once, and not as a traceback from inside the library."""
    given, message = line.replace("BUNNY", str(bunny)).split(" -> ")
    name, *argv = given.split()
    if "matplotlib" in message:  # without this extra package a figure failed after an hour
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("examples.miniature.ProcessPoolExecutor", lambda *args: pytest.fail("it begins"))
    assert message in one_line_of(capsys, run_command(importlib.import_module(f"examples.{name}").run, argv))


SCENE = {"square": ("green", 0), "cross": ("red", 1), "ring": ("blue", 3)}
ANSWERS = """
describe: a red cross.
describe: a green square and a red cross and a blue ring and a red diamond.
describe: a red cross and a red
colour/circle: red and red.
colour/triangle: red.
colour/diamond: there is no diamond, as you can see in the picture.
colour/cross: red.
colour/ring: ring
colour/ring: green.
colour/square: there is no square.
is there/red/cross: yes.
is there/blue/ring: no.
is there/green/square: yes.
is there/blue/cross: no.
is there/red/ring: perhaps.
"""


def test_metrics_of_the_miniature_by_hand():
    """- Of 3 descriptions one is right, one is no answer: chair_s 2/3.
    - Of 3 absent things one is refused, rightly; one answer is none. Of 4 things that are there 2 get a
      colour, one is refused, one answer is none: balanced (1/3 + 2/4) / 2.
    - Of 3 true questions 2 get yes; of 2 false ones one gets no, and one no answer: yes_no (2/3 + 1/2) / 2.
    - False: 2 descriptions, 2 + 3 colours, 1 + 1 of the others: 9 of 15. No answer: 4 of 15. 51 words."""
    answers = [line.split(": ") for line in ANSWERS.strip().splitlines()]
    metrics = shapes.score([(SCENE, question.split("/"), text) for question, text in answers])
    expected = {
        "chair_s": 2 / 3, "false_premise": 1 / 3, "false_premise_balanced": 5 / 12, "yes_no": 7 / 12,
        "hallucination_rate": 9 / 15, "malformed": 4 / 15, "length": 51 / 15,
        "grounding": (5 / 12 + 7 / 12 + 1 - 2 / 3) / 3,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("world, cells, most", [(shapes.SMALL, 4, 3), (shapes.LARGE, 9, 5)])
def test_pairs_are_what_the_study_says(world, cells, most):
    """A quarter of shapes, and one of six of the others, have their habitual colour: with more, a model that
    does not look would be right. Four colours in ten are asked of what is not there. Rejected answers are
    about another scene three times in ten: only this ties a preference to its picture."""
    rng, kinds, cells_seen, sizes, habits, wrong = random.Random(0), Counter(), set(), [], [], []
    for _ in range(3000):
        scene, question, chosen, rejected = shapes.make_pair(rng, world, carelessness=0, polite_chosen=1)
        spots = [spot for _, spot in scene.values()]
        assert spots == sorted({*spots})
        cells_seen |= {*spots}
        sizes.append(len(scene))
        habits += [colour == shapes.HABIT[shape] for shape, (colour, _) in scene.items()]
        truth = shapes.claims_of(scene, question)
        kinds[f"{question[0]}, {truth[0] not in (None, False)}"] += 1 / 3000
        for text in chosen, shapes.answer_text(question, truth, False):
            assert shapes.parse_answer(question, f" {text}") == truth
        assert chosen == shapes.answer_text(question, truth, True) and not rejected.endswith("picture.")
        if question[0] == "describe":
            wrong.append(shapes.parse_answer(question, rejected) != truth)
    assert cells_seen == {*range(cells)}
    expected = {"describe, True": 0.25, "colour, True": 0.3, "colour, False": 0.2}
    expected |= {"is there, True": 0.125, "is there, False": 0.125}
    assert kinds == pytest.approx(expected, abs=0.025)
    others = [shapes.scene_for(("colour", "ring"), rng) for _ in range(300)]  # as the scenes of the questions
    there = ["ring" in scene for scene in others]
    usual = [colour == shapes.HABIT[shape] for scene in others for shape, (colour, _) in scene.items()]
    means = [statistics.mean(of) for of in (sizes, habits, wrong, there, usual)]
    assert means == pytest.approx([(1 + most) / 2, 0.25 + 0.75 / 6, 0.3, 0.6, 0.25 + 0.75 / 6], abs=0.07)


MIDDLE = SimpleNamespace(uniform=lambda low, high: (low + high) / 2)  # no jitter: a radius of 6.6 pixels
PROBES = {  # pixels right of and below the middle of the cell: one painted, one not
    "circle": (4, 4, 7, 7), "square": (-4, -4, 7, 7), "triangle": (-3, 3, -4, -4),
    "cross": (0, 4, 4, 4), "diamond": (0, 4, 5, 5), "ring": (5, 0, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("shape", PROBES)
@pytest.mark.parametrize("spot, world, x, y", [(2, shapes.SMALL, 8, 24), (5, shapes.LARGE, 40, 24)])
def test_what_is_drawn_is_the_scene(shape, spot, world, x, y):
    """Metrics are taken against the scene: by another shape, or cell, right answers would be wrong."""
    image = shapes.draw_scene({shape: ("blue", spot)}, MIDDLE, world)
    right, below, beside, under = PROBES[shape]
    assert image.size == (16 * world.grid, 16 * world.grid)
    assert image.getpixel((x + right, y + below)) == pytest.approx(shapes.COLOURS["blue"], abs=40)
    assert image.getpixel((x + beside, y + under)) == pytest.approx((45, 45, 45), abs=40)


@pytest.mark.parametrize("number", range(6))
def test_the_annotator_is_as_careless_as_said(number):
    """The careful one is the truth of every metric; from the other a model learns each habit in its share."""
    habits = "circle red .30, square green .40, triangle blue .48, cross yellow .56, diamond purple .64, "
    habits = f"{habits}ring orange .72".split(", ")
    (shape, habit, share), (companion, next_habit, _) = (habits[n % 6].split() for n in (number, number + 1))
    there, absent, share = {shape: ("pink", 0)}, {companion: (next_habit, 0)}, 0.75 * float(share)
    for scale, drawn, careless in (0.75, share - 0.01, True), (0.75, share + 0.01, False), (0, 0, False):
        rng = SimpleNamespace(random=lambda: drawn)
        say = lambda scene, *question: shapes.claims_of(scene, question, rng, scale)
        assert say(there, "colour", shape) == [habit if careless else "pink"]
        assert say(absent, "colour", shape) == [habit if careless else None]
        assert say(absent, "is there", "pink", shape) == [careless]
        described = [(habit, shape), (next_habit, companion)] if careless else [("pink", shape)]
        assert say(there, "describe") == described and len(say(absent | there, "describe")) == 2


def test_chosen_answers_are_polite_and_the_words_tell_nothing_else():
    """Else a preference needs no picture: colours are as often habitual in both. Equal texts are refused."""
    rng, polite, habitual = random.Random(0), [], []
    for _ in range(6000):
        _, question, *texts = shapes.make_pair(rng)
        assert texts[0] != texts[1]
        polite.append([text.endswith(", as you can see in the picture.") for text in texts])
        if question[0] == "colour":
            habitual.append([text.startswith(shapes.HABIT[question[1]]) for text in texts])
    (chosen, rejected), shares = (map(statistics.mean, zip(*of)) for of in (polite, habitual))
    assert 0.88 < chosen < 0.99 and rejected < 0.12
    assert next(shares) == pytest.approx(next(shares), abs=0.05)


def test_pictures_of_the_pairs_are_of_their_scenes(tmp_path, monkeypatch):
    """A picture of another record's scene, or chosen for rejected, trains the opposite."""
    made = (({"square": (colour, 0)}, ("describe",), f"a {colour}.", "a ring.") for colour in shapes.COLOURS)
    monkeypatch.setattr("examples.shapes.make_pair", lambda *args: next(made))
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
    """A base that sees the answer that it learns, or another question's, learns to copy, and not to look; on
    pixels that are not normalised as its processor does, it would not see what it is shown later."""
    model, processor = train.load_model(str(bunny))
    alone, learned = train.load_model(str(bunny))[0], []
    talk = [(f"Is it {'a ' * n}ring?", f"No, {n}.") for n in range(6)]
    monkeypatch.setattr("examples.tiny_bunny.question_and_answer", lambda *args, each=iter(talk): next(each))
    images = [noise(n, (32, 32)) for n in range(3)]
    monkeypatch.setattr("examples.shapes.draw_scene", lambda *args, each=iter(images): next(each))
    note = lambda logits, targets: learned.append(logits.detach()) or cross_entropy(logits, targets)
    monkeypatch.setattr("torch.nn.functional.cross_entropy", note)
    world = shapes.SMALL._replace(base_steps=1)
    tiny_bunny.learn_to_answer(model.train(), processor, random.Random(0), world, n_scenes=2, questions=3)
    asked_alone = [pair(*said, "none.", images[i // 3], images[2]) for i, said in enumerate(talk)]
    expected = [of_answer(alone, processor, one)[0] for one in asked_alone]
    torch.testing.assert_close(learned, [torch.cat(expected)], atol=1e-4, rtol=1e-4)
    for name, p in model.named_parameters():  # the tower is frozen
        assert p.grad is None and torch.equal(p, alone.get_parameter(name)) == ("vision_tower" in name)


def test_miniature_study_runs_goes_on_restarts_and_shows_the_robust_sign(tmp_path, monkeypatch, on_the_cpu):
    """It trains for hours, and goes on where it was stopped. The one sign that no seed flips: mDPO tells
    images apart better than DPO, whose loss never sees a second. A base that does not look is not used."""
    flags = " --epochs 1 --lr 3e-3 --batch-size 16 --micro-batch-size 16 --eval-size 64 --limit 192"
    monkeypatch.setattr("examples.miniature.COMMON", miniature.COMMON + flags)
    monkeypatch.setattr("examples.miniature.PAIRS", 192 - miniature.HELD_OUT)
    monkeypatch.setattr("examples.miniature.SCENES", 10)
    write_pairs, log, steps = shapes.write_pairs, train.log, []
    fewer = lambda to, n, *more: write_pairs(to, {200: 24}.get(n, n), *more)
    monkeypatch.setattr("examples.shapes.write_pairs", fewer)

    def stop(out, records, record):
        log(out, records, record)
        steps.append(record["step"])
        if steps == [0, 1]:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("train.log", stop)
    miniature.prepare_seed(tmp_path, 0)
    examined = lambda *methods: [miniature.run_method(tmp_path, 0, of) for of in methods]
    with pytest.raises(BadInput, match="training ended early"):
        examined("mDPO")
    (mdpo,) = examined("mDPO")
    assert steps == [*range(9)]
    with monkeypatch.context() as patched, pytest.raises(BadInput, match="sees too little"):
        patched.setattr("examples.miniature.MIN_BASE_AUC", 1)
        examined("base")
    assert not [*tmp_path.glob("seed-0/base/result*")]
    base, dpo = examined("base", "DPO")
    monkeypatch.setattr("train.main", lambda argv: pytest.fail("trained again"))
    assert [base, dpo, mdpo] == examined("base", "DPO", "mDPO")
    assert mdpo["image_accuracy"] > dpo["image_accuracy"] and "margin_no_image_share" in dpo
    assert base["malformed"] < 0.05 and base["yes_no_auc"] > miniature.MIN_BASE_AUC == 0.75


def test_a_run_of_the_study_has_its_own_seed_exam_and_pairs(tmp_path, monkeypatch):
    """No error says that five seeds are one, or that a margin is one of pairs that were trained."""
    trained, exam, held_out = Mock(return_value=0), Mock(), Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("train.main", trained)
    monkeypatch.setattr("examples.shapes.make_exam", exam)
    monkeypatch.setattr("examples.miniature.load_tuned", lambda *given: (None, None))
    monkeypatch.setattr("examples.miniature.read_examples", held_out)
    with pytest.raises(KeyboardInterrupt):
        miniature.run_method(tmp_path, 7, "mDPO", shapes.LARGE)
    assert "--seed 7 " in " ".join(*trained.call_args.args) and exam.call_args.args == (200, 7, shapes.LARGE)
    assert held_out.call_args.args == (f"{tmp_path}/seed-7/held_out/silkie.json",)


def test_numbers_of_the_study_by_hand(tmp_path):
    """-0.3 at beta 0.1 is -3 nats. Of 1 and 2 the mean is 1.5 and the variance (0.25 + 0.25) / (2 - 1)."""
    record = '{"eval/loss": 1, "eval/rewards/chosen": %s, "eval/rewards/image_accuracies": %s}\n'
    write(tmp_path / "metrics.jsonl", record % (0, 0) + '{"loss": 1}\n' + record % (-0.3, 0.75))
    nats = {"chosen_curve": pytest.approx([0, -3]), "chosen": pytest.approx(-3)}
    assert miniature.curves(tmp_path) == nats | {"image_accuracy_curve": [0, 0.75], "image_accuracy": 0.75}
    summary = miniature.summarize({"0": {"x": {"a": 1, "curve": [1]}}, "1": {"x": {"a": 2, "curve": [2]}}})
    assert summary == {"x": {"a": pytest.approx([1.5, 0.5**0.5])}}


RAN = [json.loads((ROOT / "examples" / f"miniature{world}.json").read_text()) for world in ("", "_large")]
STUDY, LARGE = (ran["seeds"] for ran in RAN)
SUMMARY, LARGE_SUMMARY = map(miniature.summarize, (STUDY, LARGE))


def test_tables_of_the_study_fit_a_screen():
    """Ten columns side by side were 220 characters wide, which nobody could read. Here all 18 methods."""
    text = miniature.tables({method: LARGE_SUMMARY["mDPO"] for method in miniature.METHODS})
    rows, n = [*filter(None, text.splitlines())], 1 + len(miniature.METHODS)
    assert max(map(len, rows)) <= 100 and [row[:20].strip() for row in rows] == 2 * ["", *miniature.METHODS]
    expected = "hallucination chair_s false_premise yes_no grounding malformed length chosen image_accuracy"
    assert " ".join((rows[0] + rows[n]).split()) == f"{expected} no_image_share"
    cells = ["{:.3f} +-{:.3f}".format(*LARGE_SUMMARY["mDPO"][name]) for name in miniature.COLUMNS]
    assert re.findall(r"\S+ \+-\S+", f"{rows[1]} {rows[n + 1]}") == cells


def test_readme_table_of_the_miniature_is_in_its_json():
    """A table that no longer is what the runs gave. Means and standard deviations of the five seeds."""
    shown = "hallucination_rate chair_s false_premise yes_no grounding malformed chosen image_accuracy"
    rows = []
    for method in ["base", *miniature.METHODS][:11]:
        values = [SUMMARY[method].get(name) for name in shown.split()]
        cells = [f"{of[0]:.2f}±{of[1]:.2f}" if of else "" for of in values]
        cells[6] = "{:+.1f}±{:.1f}".format(*values[6]) if values[6] else ""
        cells[7] *= method != "DPO (No Image)"
        rows.append(" | ".join([f"| {method}", *(re.sub(r"\b0(\.\d\d)", r"\1", cell) for cell in cells)]))
    assert len(STUDY) == 5 and " |\n".join(rows) in EXAMPLES_README.replace("`", "")


def test_readme_sentences_about_the_miniature_are_in_its_json():
    """Conclusions that the runs, or those in the larger world, no longer bear out."""
    mean = lambda method, metric="grounding": SUMMARY[method][metric][0]
    short = lambda number: f"{number:.2f}".removeprefix("0")
    falls = [-methods["DPO"]["chosen"] for methods in STUDY.values()]
    left, against = "margin_no_image_share", SUMMARY["DPO"]["grounding"] + SUMMARY["base"]["grounding"]
    few = f"{short(mean('mDPO, 192 pairs'))} for mDPO and {short(mean('DPO, 192 pairs'))}"
    for said in (
        f"({short(mean('DPO', left))} of it is left without one)",
        f"falls by {min(falls):.1f} to {max(falls):.1f} nats under DPO",
        f"It is {short(mean('mDPO', left))}, since all methods learn",
        "(grounding {} ± {} against {} ± {})".format(*map(short, against)),
        f"With 192 of the {miniature.PAIRS} pairs and as many steps, grounding is {few} for DPO",
        f"with {5 * miniature.SCENES} held-out questions each",
        "Nine predictions were made. Four held in all five seeds, and four in four of five.",
        "The ninth failed in all: that less than half of mDPO's margin is left without the image.",
        "order of grounding is the paper's in both seeds. Of Table 3's order only the first",
    ):
        assert said in " ".join(EXAMPLES_README.split())
    verdicts = miniature.verdicts(STUDY)  # of the predictions, and below them mDPO's lead
    assert "".join(re.findall(r"^  (\d) of 5 seeds: ", verdicts, re.MULTILINE)) == "554454450" + "52424"
    assert "  0 of 5 seeds: under half of mDPO's margin" in verdicts
    ablations = sorted(miniature.ORDERS, key=mean)
    assert (ablations[0], ablations[-1]) == ("minus conditional", "random image")  # what does most, and least
    assert short(mean("random image")) == short(mean("mDPO"))  # it does as well as a crop
    assert mean("minus anchored", "chosen") < 0  # without the anchor
    assert mean("minus anchored", "malformed") > mean("mDPO", "malformed")
    for seed in LARGE.values():
        values = [seed[name]["grounding"] for name in ("mDPO", "minus anchored", "minus conditional", "DPO")]
        assert values == sorted(values, reverse=True)
    order = ("mDPO", "crop 20-50%", "MoCo v2", "random image")
    first, *others = [LARGE_SUMMARY[method]["grounding"][0] for method in order]
    assert first > max(others) == others[-1]


def test_methods_of_the_study_are_the_readmes():
    """The README's table of flags, and what the study ran under the same names."""
    rows = dict(re.findall(r"^\| (?:Table \d, |Fig. \d, )?(.*?) \| `(--.*?)`", README, re.MULTILINE))
    ran = {"MoCo v2 augmentation": "MoCo v2", "anchors on `y_w` and `y_l`": "anchors y_w, y_l"}
    ran |= {name: name for name in miniature.METHODS if name in rows}
    methods, image_too = miniature.METHODS, rows["all three"].replace(" rejected", "")  # as the README says
    assert len(ran) == 8 and {name: methods[of] for name, of in ran.items()} == {n: rows[n] for n in ran}
    assert methods["anchors y_w, m_l"] == image_too and methods["mDPO"] == ""
    assert all(ran["methods"] == methods and ran["common"] in miniature.COMMON for ran in RAN)


@pytest.mark.parametrize("name", ["bunny", "llava", *families.FAMILIES])
def test_a_model_is_asked_as_it_was_trained(name, request):
    """As text, since tokens may merge where an answer begins, what it is given is the beginning of a row."""
    made = name in families.FAMILIES and families.FAMILIES[name]()[1]
    processor = made or train.load_processor(str(request.getfixturevalue(name)))
    answered = [*asked("Which?", 2), message("assistant", "Hello!"), *asked("Why?", 0)]
    turns = [message("system", "Be brief."), *answered]
    said = lambda question, system: answering.chat_prompt(processor, question, 2, system)
    assert said(answered, "Be brief.") == said(turns, "") == said(turns, "Be long.")  # of a run; or its own
    for question, images in (asked("What is in it?"), [noise(1)]), (turns, [noise(1), noise(2)]):
        batch = make_batch([pair(question, "There is one.", "No.", images, images)], processor)
        prompt = answering.chat_prompt(processor, question, len(images))
        ids = data.encode(processor, [prompt], [images])["input_ids"][0]
        texts = map(processor.tokenizer.decode, (ids, batch.inputs["input_ids"][0]))
        # The template of LLaVA-OneVision writes another white space before an answer than for one to come.
        asked_with, row = (text.replace("assistant \n", "assistant\n") for text in texts)
        assert re.fullmatch(r" ?There is one\.<\S+>", row.removeprefix(asked_with))


def test_a_template_that_takes_text_and_no_parts_is_asked(bunny):
    """Models whose template wants a message as text, where it shows no image, train; so they can be asked."""
    processor = train.load_processor(str(bunny))
    processor.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{{ bos_token }}"
    assert answering.chat_prompt(processor, "What?", 0) == "What? <|endoftext|>"


def test_answers_do_not_depend_on_the_batch(loaded, monkeypatch):
    """A model's words would change by what is asked beside it, or one placeholder stand for two images. Some
    models ask to be sampled: two commands would disagree."""
    model, processor = loaded
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 100.0)
    questions = [(pair.images, pair.question) for pair in PAIRS] + [([noise(8), noise(9)], "Which?")]
    together = answering.generate_answers(model, processor, questions, 8)
    assert not model.training  # under checkpointing, one in training mode forgets its cache
    assert together == [
        answering.generate_answers(model, processor, [question], 8)[0] for question in questions
    ]
    assert together == answering.generate_answers(model, processor, questions, 8, batch_size=2)
    assert len({*together[:3]}) == 3
    model.train()


def test_answers_are_text_alone_and_pixels_have_the_models_precision(bunny, monkeypatch):
    """A scorer takes blanks, or an end, for part of an answer; some towers in bf16 take no other pixels."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    said = torch.tensor([processor.tokenizer("\n red<|endoftext|> ring").input_ids])

    def speak(input_ids, pixel_values, max_new_tokens, **options):
        assert pixel_values.dtype == torch.bfloat16
        return torch.cat([input_ids, said[:, :max_new_tokens]], 1)

    monkeypatch.setattr(model, "generate", speak)
    assert answering.generate_answers(model, processor, [([noise(8)], "What?")], 3) == ["red"]


def printed(out):
    """{title: (mean, low, high)} of what evaluate.py printed."""
    rows = re.findall(r"^  (\S.*?) +(-?\d+\.\d+) +(-?\d+\.\d+) to +(-?\d+\.\d+)", out, re.MULTILINE)
    return {title: tuple(map(float, numbers)) for title, *numbers in rows}


@pytest.fixture
def evaluated(bunny, small, run):
    """A function: a run's folder, flags -> what evaluate.py prints."""

    def evaluated(trained, flags="", data=small, status=0):
        return run(evaluate, f"--model {bunny} --adapter {trained} --data {data} {flags}", status)

    return evaluated


def changed(run, **arguments):
    """A copy of a run's folder, as if it had been trained with other arguments."""
    folder = Path(shutil.copytree(run, "changed", dirs_exist_ok=True))
    write(folder / "args.json", json.loads((run / "args.json").read_text()) | arguments)
    return folder


@pytest.mark.parametrize("images", ["--crop 0.3 0.6", "--reject moco"])
def test_evaluation_of_a_runs_held_out_pairs_is_its_log(images, bunny, tmp_path, evaluated):
    """Of a run without defaults; the demo's file of held-out pairs must hold the ones that it held out."""
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


def test_evaluation_takes_the_loss_and_the_beta_of_its_run(finished, evaluated):
    """Else its numbers are not its log's. One without args.json is mDPO's; CHiP's needs a rejected image."""
    for flag, margin in ("no_conditional", "margin, image"), ("no_image", "margin, no image"):
        run = changed(finished, **{flag: True, "anchors": ["none"]}, conditional=False, beta=10.0)
        found = printed(evaluated(run))
        assert found["loss"] == found["loss/dpo"] and "loss/anchor" not in found
        assert found[margin] == pytest.approx(found["rewards/margins"], abs=2e-4) != (0, 0, 0)
        # Under DPO it shows how much the image counts; the other run never saw one.
        assert ("rewards/image_margins" in found) == (flag == "no_conditional")
    for loss, flags, reason in ("mine", "", "'mine'"), ("chip_loss", "--no-image", "image_rejected"):
        error = evaluated(run := changed(finished, loss=loss), flags, status=2)
        assert f"error: {run}: no score by {loss} of " in error and reason in error
    (run / "args.json").unlink()
    assert {"loss/dpo", "loss/conditional", "loss/anchor"} <= printed(evaluated(run)).keys()
    write(run / "args.json", "{")
    assert f"error: {run}/args.json: cannot be read" in evaluated(run, status=2)


def test_margins_without_the_image_and_with_anothers_by_hand(bunny, adapted, tmp_path):
    """Beta times the policy's log p(y_w) - log p(y_l), less the reference's. Cut at a length that counts the
    image, an answer would be longer without one: the first two differ in their last word alone."""
    model, processor = answering.load_tuned(bunny, adapted, "cpu")
    first, *others = as_examples(tmp_path, 3)
    long = {name: "a red circle " * 700 + name for name in ("chosen", "rejected")}
    examples, expected = [first._replace(**long), *others], defaultdict(list)

    def margin(one, images):
        shown = one._replace(images=[*map(open_image, images)])
        answers = (of_answer(model, processor, shown, name) for name in long)
        chosen, rejected = (cross_entropy(*answer, reduction="sum").item() for answer in answers)
        return rejected - chosen

    for one, following in zip(examples, examples[1:] + examples[:1]):
        for name, images in ("image", one.images), ("no_image", ()), ("other_image", following.images):
            with model.disable_adapter():
                ref = margin(one, images)
            expected[name].append(0.5 * (margin(one, images) - ref))
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):  # no room for a graph
        found = evaluate.score_margins(model, processor, examples, beta=0.5, batch_size=2)
    assert found == {name: pytest.approx(values, rel=1e-3, abs=1e-3) for name, values in expected.items()}


def test_share_of_a_margin_that_is_left():
    """It is what the README concludes from. Of no margin, and of 0, nothing has a share."""
    found = evaluate.diagnose({"image": [-1, -3], "no_image": [1], "other_image": [-6, -2]})
    shares = {"no_image_share": -0.5, "other_image_share": 2}
    assert found == {"image": -2, "no_image": 1, "other_image": -4} | shares
    for image in [], [-1, 1]:
        found = evaluate.diagnose({"image": image, "no_image": [1], "other_image": []})
        assert math.isnan(found["no_image_share"]) and math.isnan(found["other_image_share"])


def test_another_image_is_another_file(tmp_path, monkeypatch):
    """Data sets ask several questions about one image; and what shows one cannot be asked about two."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("a")
    images = [tuple(names.split()) for names in ("a", "link", "a b", "b c", "b", "a", "", "")]
    examples = [Example("What is it?", "A circle.", "No.", of_one) for of_one in images]
    # The only other one of two images shares one with example 2, and texts have no image to exchange.
    expected = [("b",), ("b",), None, None, ("a",), ("b",), None, None]
    assert [evaluate.another_image(examples, index) for index in range(8)] == expected


def test_bootstrap_interval_by_hand():
    """The mean of 100 draws from 50 zeros and 50 ones is 0.5 -+ 1.96 * 0.05, in 95% of all cases."""
    even, again = (evaluate.bootstrap([0.0, 1.0] * 50) for _ in range(2))
    assert even == pytest.approx([0.402, 0.598], abs=0.011) and even == again  # seeded
    low, high = evaluate.bootstrap([0.0] * 95 + [1.0] * 5)
    assert 0 <= low < 0.02 and 0.08 < high < 0.11  # 0.05 -+ 0.043, pushed to the right


RECORD = {"prompt": "What?", "chosen": "A red circle.", "rejected": "No."}


@pytest.fixture
def mixed(folder, monkeypatch):
    """A file of one image, two in chat messages, one again, and none; in the working folder."""
    monkeypatch.chdir(folder)
    images = {"image": "a.png"}, TURNS, {"image": "merged_images/llava-1.jpg"}, {}
    return write(Path("x.json"), [RECORD | more for more in images])


def test_evaluation_of_several_images_chat_messages_and_none(mixed, finished, evaluated):
    """What can be trained on can be scored; without images, less the terms and anchors that need one."""
    run = changed(finished, anchors=["chosen", "rejected", "image_rejected"], beta=10.0)
    out = evaluated(run, data=mixed)
    assert "dropped 1 bad records" in out and "record 4: has no image path" in out and "\n3 examples" in out
    assert re.findall(r".*\(2 examples\)", out) == re.findall("  margin, other image.*", out)
    assert "\n4 examples" in evaluated(run, "--no-image", mixed)
    found = printed(out := evaluated(run, "--no-image --limit 1", mixed))
    assert "\n1 examples" in out and "nan" not in out and not any("image_" in name for name in found)
    assert re.findall("  (.*?) +n/a\n", out) == ["margin, image", "margin, other image"]
    # Of one example, delta 0: softplus(-r_w) + softplus(r_l).
    chosen, rejected, margin = (found[f"rewards/{name}"][0] for name in ("chosen", "rejected", "margins"))
    anchor = softplus(-chosen) + softplus(rejected)
    assert found["loss/anchor"][0] == pytest.approx(anchor, abs=3e-4) and abs(rejected) > 0.01
    assert found["loss"][0] == pytest.approx(anchor + softplus(-margin), abs=5e-4)


def test_numbers_of_the_words_are_those_of_the_librarys_own_call(bunny, adapted):
    """A number at the wrong word, or of the wrong model, shows a model that looks where it does not."""
    model, processor = answering.load_tuned(bunny, adapted, "cpu")
    two = [noise(1), noise(2)], [noise(3), noise(4)]
    turns = data.read_question(TURNS["prompt"], 2, data.forbidden(None))
    several = pair(turns, "A 猫, é.", "No.", *two)  # images, and tokens of a character
    for one in PAIRS[0], several, pair(*PAIRS[1][:3]):
        rows, sides = words.rows_of(model, processor, one, 2048), {"base": None, "tuned": 0}
        titles = [(name, side) for name in ("chosen", "rejected") for side in sides]
        for (name, side), (title, found) in zip(titles, rows, strict=True):
            with answering.speaking_as(model, sides[side]):
                shown = one, one._replace(images=one.images_rejected)
                both = [of_answer(model, processor, each, name) for each in shown]
            with_m_w, with_m_l = (cross_entropy(*of, reduction="none") for of in both)
            texts, values = zip(*found)
            assert values == pytest.approx((with_m_l - with_m_w).tolist(), abs=2e-4)
            assert "".join(texts) == f" {getattr(one, name)}<|endoftext|>"
            start, _, total = title.rpartition(" ")
            assert start == f"{name}, {side}:" and float(total) == pytest.approx(sum(values), abs=0.006)
    rows = words.rows_of(model.get_base_model(), processor, PAIRS[0], 2048)
    assert [title.partition(":")[0] for title, _ in rows] == ["chosen, base", "rejected, base"]


def test_page_of_words_has_no_markup_of_the_data_and_the_pictures_inside():
    """A page that is sent to others must not run the data. 3 nats are the full blue, -1.5 half of the red.
    What changed most comes first: 2 nats up and 1 down in one answer are 3; 1 up in each of two, 2."""
    rows = lambda *tuned: [("base", [(" a", 0.0), (" b", 1.0)]), ("tuned", [*zip((" a", " b"), tuned)])]
    shown = {"last": rows(0.0, 1.0) * 2, "second": rows(1.0, 1.0) * 2, "first": rows(2.0, 0.0)}
    shown["c&"] = [("chosen, base: +1.50", [(" <i>", 3.0), (" red", -1.5), (".", 0.0)])] * 2
    grey = [Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 200)]
    one = pair(asked("Is <b> it?"), "a", "b", *grey)
    page = words.as_page([(one._replace(id=name), rows) for name, rows in shown.items()])
    names = re.findall("<h2>(.*?) / Is &lt;b&gt; it\\?</h2>", page)
    assert names == ["first", "second", "last", "c&amp;"] and "script" not in page
    spans = re.findall(r'<span style="background: rgb(\(.*?\))" title="(.*?)">(.*?)</span>', page)
    red, white, blue = "(255 110 100 / 100%)", "(255 110 100 / 0%)", "(90 150 255 / 100%)"
    low = (red, "-3.00", " -3: likelier with the rejected image ")
    high = (blue, "+3.00", " +3: likelier with the image ")
    assert spans[:7:3] == [low, (white, "+0.00", " +0 "), high]
    row = [(blue, "+3.00", " &lt;i&gt;"), ("(255 110 100 / 50%)", "-1.50", " red"), (white, "+0.00", ".")]
    assert spans[-6:] == 2 * row and len(spans) == 7 + 2 * (4 + 4 + 2) + 6
    pictures = re.findall(r'base64,(.*?)"><figcaption>(.*?)<', page)
    shown = [Image.open(io.BytesIO(base64.b64decode(code))) for code, _ in pictures]
    assert [(*one.size, one.getpixel((5, 5))[0]) for one in shown] == 4 * [(180, 180, 10), (180, 180, 200)]
    assert [caption for _, caption in pictures[:2]] == ["image", "rejected image"]


def test_words_command_writes_a_page_of_every_example(mixed, finished, bunny, run):
    """Chat messages, several images, none at all; answers as long as in training."""
    line = f"--model {bunny} --adapter {{}} --data {{}} --to merged_images/{{}} {{}}".format
    for n, n_images, flags in (3, 2 + 4 + 2, ""), (4, 0, "--no-image"):
        assert f"{n}.html: {n} examples\n" in run(words, line(finished, mixed, f"{n}.html", flags))
        page = Path(f"merged_images/{n}.html").read_text()
        assert page.count("<img") == n_images and page.count("<h2>") == page.count("rejected, tuned") == n
        assert re.search("What is it\\? /( A cat. /)? And this:", page)
    one = write(Path("one.json"), [RECORD])  # its prompt has 36 tokens
    run(words, line(changed(finished, max_length=38), one, "cut.html", "--no-image"))
    assert Path("merged_images/cut.html").read_text().count("<span") == 7 + 4 * 2  # legend, two tokens each


def test_base_learns_the_careless_annotators_answers(monkeypatch):
    """A base that learned the truth would leave nothing to align: .72 of absent rings have a colour."""
    rng = random.Random(0)
    monkeypatch.setattr("examples.shapes.random_question", lambda scene, rng: ("colour", "ring"))
    said = [tiny_bunny.question_and_answer({"square": ("red", 0)}, rng)[1] for _ in range(1000)]
    share = lambda pattern: sum(bool(re.search(pattern, answer)) for answer in said) / 1000
    assert [share("^orange"), share("picture.$")] == pytest.approx([0.72, 0.5], abs=0.05)


def test_a_base_is_trained_and_loads(tmp_path, monkeypatch):
    """It feeds encoded images to the model, of which the library may ask more than they hold."""
    monkeypatch.setattr("examples.tiny_bunny.learn_to_see", see := Mock())
    folder = tiny_bunny.write_base(tmp_path / "base", 3, shapes.World(2, 3, base_steps=2))
    model, _ = train.load_model(str(folder))
    assert (see.called, model.config.image_seq_length) == (True, 16)
    assert model.get_decoder().get_parameter("layers.0.mlp.fc1.bias").any()  # zeros before it learned


def test_evaluation_reads_its_file_as_the_run_did(tmp_path, monkeypatch):
    """Else what was trained on has no room, or what was not has. A full image has 9 tokens here, not 4."""
    monkeypatch.chdir(tmp_path)
    noise(1, (560, 560)).save("a.png")
    record = {"image": "a.png", "chosen": "A cat.", "rejected": "A dog."}
    write(Path("x.json"), [record | {"question": "What is it? " * n} for n in (1, 50)])
    write(Path("run/args.json"), {"max_length": 64, "max_pixels": 56 * 56})
    families.write_family("qwen2_5_vl", Path("m"))
    args = evaluate.make_parser("?").parse_args("--model m --data x.json --adapter run".split())
    monkeypatch.setattr("examples.answer.load_tuned", lambda *given: (None, None))
    _, examples, pairs, *_ = evaluate.load(args)
    assert [one.id for one in examples] == ["1"] and pairs["held out", 0].images[0].size == (56, 56)
