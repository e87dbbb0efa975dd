"""The examples, by their commands: what they print, write and leave on the disk is what they say."""

import math
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from examples import answer, evaluate, families, miniature, shapes, throughput, tiny_bunny
from test_mdpo import TEXTS, log_of, noise, write
from tests.test_examples import changed, evaluated, printed  # noqa: F401

# ruff: noqa: F811 (fixtures)


def test_answers_are_greedy_whatever_the_models_own_settings(bunny, tmp_path):
    """Some models ask to be sampled. Two commands would disagree, and benchmarks measure chance."""
    sampled, asked = shutil.copytree(bunny, tmp_path / "sampled"), [(noise(1), "What?")]
    write(sampled / "generation_config.json", {"do_sample": True, "temperature": 100.0, "top_k": 0})
    said = [answer.generate_answers(*train.load_model(str(folder)), asked, 12) for folder in (bunny, sampled)]
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
    monkeypatch.setattr(answer, "load_tuned", lambda *given: (None, None))
    _, examples, pairs, *_ = evaluate.load(args)
    assert [one.id for one in examples] == ["1"] and pairs["held out", 0].images[0].size == (56, 56)


def softplus(x):
    return math.log1p(math.exp(x))


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


def test_labels_of_the_base_lie_under_their_shapes(tmp_path, monkeypatch):
    """A base that learned from mirrored pictures does not look. Under each label there is its colour, and
    where there is none the background, a grey of 45."""
    folder = tiny_bunny.write_bunny(tmp_path / "m", TEXTS, "x-patch8-32", tower_hidden=64)
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
    """Off by a factor, a model is said to fit that does not. /proc counts pages."""
    pages, now = int(Path("/proc/self/statm").read_text().split()[1]), throughput.memory_now("cpu")
    assert now == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE") / 1024**3, rel=0.02)
    assert throughput.memory_now("cpu", peak=True) >= 0.98 * now
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *args, **kwargs: 3 * 1024**3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *args, **kwargs: 5 * 1024**3)
    assert (throughput.memory_now("cuda"), throughput.memory_now("cuda", peak=True)) == (3, 5)
