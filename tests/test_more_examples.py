"""The examples, by their commands: what they print, write and leave on the disk is what they say."""

import json
import math
import os
import random
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data import run_command
from examples import answer, evaluate, miniature, shapes, throughput, tiny_bunny
from test_mdpo import TEXTS, log_of, noise, write

# ruff: noqa: F811 (fixtures)


@pytest.fixture
def changed(finished, tmp_path):
    """A function: the run `finished`, as if it had been trained with other arguments -> its folder."""

    def change(**arguments):
        folder = shutil.copytree(finished, tmp_path / "changed", dirs_exist_ok=True)
        began = json.loads((finished / "args.json").read_text())
        write(folder / "args.json", began | arguments)
        return folder

    return change


@pytest.fixture
def scored(bunny, small, capsys):
    """A function: a run and flags -> what evaluate.py prints, {metric: its mean}."""

    def scored(run, *flags):
        capsys.readouterr()
        argv = ["--model", str(bunny), "--adapter", str(run), "--data", str(small), *flags]
        assert run_command(evaluate.run, argv) == 0
        rows = re.findall(r"^  (\S.*?) {2,}(-?\d+\.\d+)", capsys.readouterr().out, re.MULTILINE)
        return {name: float(value) for name, value in rows}

    return scored


@pytest.fixture
def asks(tmp_path, capsys):
    """A function: a model and names of images -> what answer.py prints of it."""

    def asks(model, *names):
        for name in names:
            noise(ord(name)).save(tmp_path / f"{name}.png")
        argv = ["--model", str(model), "--image", *(str(tmp_path / f"{name}.png") for name in names)]
        assert run_command(answer.run, [*argv, "--question", "What?", "--max-new-tokens", "12"]) == 0
        return capsys.readouterr().out

    return asks


def test_an_answer_may_be_about_several_images(bunny, asks):
    """One placeholder for all of them: the model stops, or sees the first alone."""
    assert asks(bunny, "a", "b").startswith("base:")


def test_answers_are_greedy_whatever_the_models_own_settings(bunny, asks, tmp_path):
    """Some models ask to be sampled. Two commands would disagree, and benchmarks measure chance."""
    sampled = shutil.copytree(bunny, tmp_path / "sampled")
    write(sampled / "generation_config.json", {"do_sample": True, "temperature": 100.0, "top_k": 0})
    assert asks(bunny, "a") == asks(sampled, "a")


def test_evaluation_has_the_beta_of_the_run(changed, scored):
    """By another beta an adapter's margins would be other multiples of the same nats than its log's."""
    low, high = (scored(changed(beta=beta)) for beta in (0.1, 10.0))
    for name in "rewards/margins", "rewards/chosen", "margin, image":
        assert high[name] == pytest.approx(100 * low[name], abs=0.006) != 0
    for found in low, high:
        assert found["margin, image"] == pytest.approx(found["rewards/margins"], abs=2e-4)


def softplus(x):
    return math.log1p(math.exp(x))


def test_evaluation_without_images_keeps_the_anchors_that_need_none(changed, scored):
    """The loss would be another than the run's. Of one example, delta 0: softplus(-r_w) + softplus(r_l)."""
    run = changed(anchors=["chosen", "rejected", "image_rejected"], beta=10.0)
    found = scored(run, "--no-image", "--limit", "1")
    anchor = softplus(-found["rewards/chosen"]) + softplus(found["rewards/rejected"])
    assert found["loss/anchor"] == pytest.approx(anchor, abs=3e-4)
    assert found["loss"] == pytest.approx(anchor + softplus(-found["rewards/margins"]), abs=5e-4)
    assert abs(found["rewards/rejected"]) > 0.01


def test_a_margin_that_turns_has_a_negative_share():
    """A model that prefers the other answer without the image has looked at it: no half of it survived."""
    found = evaluate.diagnose({"image": [1.0, 3.0], "no_image": [-1.0, -1.0], "other_image": [4.0, 0.0]})
    assert (found["no_image_share"], found["other_image_share"]) == (-0.5, 1)
    found = evaluate.diagnose({"image": [-2.0], "no_image": [-1.0], "other_image": [1.0]})
    assert (found["no_image_share"], found["other_image_share"]) == (0.5, -0.5)


def test_a_study_that_was_stopped_goes_on(bunny, tmp_path, monkeypatch):
    """Its methods train for hours. Stopped after step 1 of 4, the second command trains the other 3."""
    seed, log, steps, threads = tmp_path / "seed-1", train.log, [], torch.get_num_threads()
    shutil.copytree(bunny, seed / "model")
    for name in "data", "held_out":
        shapes.write_pairs(seed / name, 8)
    flags = "--epochs 2 --batch-size 4 --micro-batch-size 4 --lora-rank 4 --lora-alpha 8 --workers 0"
    monkeypatch.setattr(miniature, "COMMON", flags)
    monkeypatch.setattr(miniature, "METHODS", {"mDPO": "--eval-size 1 --limit 8"})
    monkeypatch.setattr(miniature, "examine", lambda *args, **kwargs: {"yes_no_auc": 0.8})

    def stop(out, records, record):
        log(out, records, record)
        steps.append(record["step"])
        if steps == [0, 1]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "log", stop)
    with pytest.raises(ValueError, match="training ended early"):
        miniature.run_method(tmp_path, 1, "mDPO", 1)
    assert miniature.run_method(tmp_path, 1, "mDPO", 1)["yes_no_auc"] == 0.8
    torch.set_num_threads(threads)
    assert steps == [0, 1, 2, 3, 4] == [record["step"] for record in log_of(seed / "mDPO")]


def test_labels_of_the_base_lie_under_their_shapes(tmp_path, monkeypatch):
    """A base that learned from mirrored pictures does not look when asked, and all methods look alike. Under
    each label there is its colour, and where there is none the background, a grey of 45."""
    folder = tiny_bunny.write_bunny(tmp_path / "m", TEXTS, tower_hidden=64, vision_tower="x-patch8-32")
    pictures, labels, draw, loss = [], [], tiny_bunny.pixels, torch.nn.functional.cross_entropy
    note_labels = lambda logits, targets: labels.append(targets.view(8, 2, 2, 2, 2)) or loss(logits, targets)
    monkeypatch.setattr(tiny_bunny, "pixels", lambda *args: pictures.append(draw(*args)) or pictures[0])
    monkeypatch.setattr(tiny_bunny, "F", SimpleNamespace(cross_entropy=note_labels))
    model, _ = train.load_model(str(folder))
    tiny_bunny.learn_to_see(model, random.Random(0), shapes.SMALL, steps=1, batch_size=8)
    for label in labels:  # one for the 2 x 2 tokens of a cell
        assert (label == label[:, :, :1, :, :1]).all()
    shape, colour = (label[:, :, 0, :, 0] for label in labels)  # (8, 2, 2)
    assert torch.equal(shape > 0, colour > 0) and 0 < (shape > 0).sum() < shape.numel()
    rgb = torch.tensor([(45, 45, 45), *shapes.COLOURS.values()])[colour].permute(0, 3, 1, 2)  # (8, 3, 2, 2)
    levels = ((pictures[0] + 1) * 127.5).round().view(8, 3, 2, 16, 2, 16)
    distance = (levels - rgb[:, :, :, None, :, None]).abs().amax(1)  # (8, 2, 16, 2, 16)
    assert distance.amin((2, 4)).max() < 3
    assert distance.amax((2, 4))[colour == 0].max() < 60  # a neighbour's edge may shine in


def test_memory_of_throughput_is_in_gib(monkeypatch):
    """Off by a factor, a model is said to fit that does not. /proc counts pages; the device says 3 * 1024^3
    bytes now, and 5 at its peak."""
    pages, now = int(Path("/proc/self/statm").read_text().split()[1]), throughput.memory_now("cpu")
    assert now == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE") / 1024**3, rel=0.02)
    assert throughput.memory_now("cpu", peak=True) >= 0.98 * now
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *args, **kwargs: 3 * 1024**3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *args, **kwargs: 5 * 1024**3)
    assert (throughput.memory_now("cuda"), throughput.memory_now("cuda", peak=True)) == (3, 5)
