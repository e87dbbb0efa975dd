"""The examples about training: right names of numbers, like compared with like, losses worked out by hand."""

import ast
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from PIL import Image, ImageChops
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import train
from data import BadInput, Pairs, make_batch, run_command
from examples import curves, evaluate, families, minimal, shapes, throughput, tiny_bunny, variants
from mdpo import LogPs, mdpo_step
from test_mdpo import HUB_LLAVA_TEMPLATE, POLICY, REF, ROOT, adapter
from test_mdpo import command, move, noise, pair, softplus, write
from tests.helpers import EXAMPLES_README, README, as_examples, preceded

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_families_print_their_table_alone(monkeypatch, capfd):
    """A table of 8 lines stood among 138 others. A run that fails says why."""
    monkeypatch.setattr(train, "best_device", lambda: pytest.fail("would take a GPU"))
    monkeypatch.setattr(families, "FAMILIES", {"gemma3": families.gemma3})
    assert run_command(families.run, []) == 0
    printed, err = capfd.readouterr()
    assert printed.split() == "family rows answers before and after gemma3 plain changed".split() and not err
    monkeypatch.setattr(families, "generate_answers", lambda *rest: "as it was")
    assert run_command(families.run, []) == 0 and capfd.readouterr().out.endswith(" same\n")
    monkeypatch.setattr(families, "write_family", lambda *given: "no model")
    assert run_command(families.run, []) == 2
    assert re.match("error: gemma3: /.*/model: cannot be loaded: .", capfd.readouterr().err)


def test_curves_show_every_metric_of_the_readme():
    """A metric without a curve is a metric that nobody looks at. Memory is one number, not a curve."""
    rows = re.findall(r"^\| (`.*?) \|", README.split("\n## Metrics\n")[1].split("\n## ")[0], re.MULTILINE)
    names = {*re.findall("`(.*?)`", " ".join(rows))}
    assert {*filter(curves.SHOWN.match, names)} == names - {"peak_memory_gib"}


def test_curves_are_drawn_of_a_run_in_progress_and_of_trl(tmp_path):
    """A line that is being written is no broken log; one before it is. TRL has other names."""
    path, two = tmp_path / "metrics.jsonl", '{"step": 0, "eval/loss": 2.0}\n{"step": 1, "loss": 1.5}'
    for text in two.splitlines()[0], two, two + '\n{"step": 2, "lo':
        path.write_text(text)
        assert curves.read_log(tmp_path) == [*map(json.loads, text.splitlines()[:2])]
    for text in "", '{"st', '{"st\n{"step": 1}\n':
        path.write_text(text)
        with pytest.raises(BadInput, match="metrics.jsonl: cannot be read"):
            curves.read_log(tmp_path)
    path, last = tmp_path / "trainer_state.json", '{"train_loss": 1.5, "step": 1}'
    step = '{"loss": 1, "eval_loss": 2, "eval_rewards/margins": 3, "learning_rate": 4}'
    path.write_text(f'{{"log_history": [{step}, {last}]}}')
    assert curves.read_log(tmp_path)[0] == {"loss": 1, "eval/loss": 2, "eval/rewards/margins": 3, "lr": 4}
    path.write_text(f'{{"log_history": [{last}]}}')
    with pytest.raises(BadInput, match="trainer_state.json: cannot be read: holds no metric to draw yet"):
        curves.read_log(tmp_path)


def test_curves_have_a_colour_a_run_and_points_where_held_out(finished, tmp_path, capsys):
    """Curves under a wrong name are worse than none. Before training accuracies are 0, which is no point."""
    pytest.importorskip("matplotlib")
    before = {"step": 0, "eval/loss": 2.0, "eval/rewards/margins": 0, "eval/rewards/accuracies": 0}
    after = before | {"step": 1, "eval/rewards/margins": 3.0, "epoch": 0.5, "loss": 1.5}
    figure = curves.draw({"a": [before, after], "b": [{"step": 3, "loss": 0.5, "lr": 0.1}]})
    say = lambda line: f"{line.get_color()} {line.get_marker()} {line.get_xydata().tolist()}"
    lines = {axis.get_title(): [line for line in axis.lines if len(line.get_xdata())] for axis in figure.axes}
    assert {title: [*map(say, drawn)] for title, drawn in lines.items()} == {
        "loss": ["C0 None [[1.0, 1.5]]", "C0 o [[0.0, 2.0], [1.0, 2.0]]", "C1 None [[3.0, 0.5]]"],
        "rewards/margins": ["C0 o [[0.0, 0.0], [1.0, 3.0]]"],
        "rewards/accuracies": ["C0 o [[1.0, 0.0]]"],
        "lr": ["C1 None [[3.0, 0.1]]"],
    }
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "held-out examples"]
    assert [line.get_color() for line in legend.legend_handles] == ["C0", "C1", "k"]
    assert run_command(curves.run, [str(finished), str(finished), "--to", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size[0] == 1620 and f"{tmp_path}/x.png: " in capsys.readouterr().out
    assert run_command(curves.run, [*map(str, (finished, tmp_path, finished)), "--to", f"{tmp_path}/y"]) == 2


TRAIN_ON = throughput.train_on
FAST, SLOW = itertools.repeat(0.5), itertools.repeat(2.0)


@pytest.fixture
def tiny(monkeypatch):
    """Sizes and texts at which a comparison takes a second -> the arguments of a comparison."""
    shape = throughput.phi(32, 64, 1, 2, 20_000), tiny_bunny.siglip(32, 64, 1, 2, 8, 32)
    monkeypatch.setitem(throughput.SHAPES, "tiny", shape)
    long = pair("there is a red", "circle and blue square " * 2, "here the", noise(1), noise(2))
    pairs = long, pair("picture of", "on in", "with small large near " * 3, noise(3), noise(4))
    numbered = lambda n: [pairs[i % 2]._replace(id=str(i)) for i in range(n)]
    monkeypatch.setattr(throughput, "make_pairs", numbered)
    sizes = {"items": 4, "rounds": 1, "micro_batch_size": 2}
    return SimpleNamespace(shape="tiny", device="cpu", dtype=torch.float32, trl=False, **sizes)


def timed(monkeypatch, *seconds):
    """Steps of each scheme take these seconds -> a list that fills with (model, batches, losses)."""
    given, left = [], iter(seconds)
    monkeypatch.setattr(throughput, "train_on", lambda *scheme: given.append(scheme) or iter(next(left)))
    return given


# attention: whether in blocks, or its mask, and autocast; of the reference, the policy, and recomputed.
OURS = {"LoRA": {train.LoraLinear}, "activation": "GELUTanh", "images": [4], "gradient": [False, True],
        "attention": [(True, False)] * 3}  # fmt: skip
AUTHORS = OURS | {"images": [6, 6], "attention": [(None, False)] * 3}  # three images an example


def check_step(expected, peft_model, batch, losses):
    """One step, watched, has these settings, and not a pass, image, token or logit more."""
    model, did = peft_model.get_base_model(), defaultdict(list)
    decoder, layer = model.get_decoder(), model.get_decoder().layers[0]

    def watch(name, module, look):
        note = lambda module, given, options: did[name].append(look(*given, **options))
        module.register_forward_pre_hook(note, with_kwargs=True)

    autocast = lambda: torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    watch("gradient", decoder, lambda **options: torch.is_grad_enabled())
    watch("tokens", decoder, lambda inputs_embeds, **options: inputs_embeds[..., 0].numel())
    blocks_or_mask = lambda attention_mask, **options: "blocks" in options or attention_mask
    watch("attention", layer.self_attn, lambda **options: (blocks_or_mask(**options), autocast()))
    watch("logits", model.lm_head, lambda states: states[..., 0].numel())
    watch("images", model.model.vision_tower, lambda pixel_values, **options: len(pixel_values))
    [*TRAIN_ON(peft_model, [batch], losses)]
    assert all(p.isfinite().all() for p in model.parameters())  # nothing was trained to nan
    did["LoRA"] = {type(module) for module in model.modules() if hasattr(module, "lora_A")}
    did["activation"] = type(layer.mlp.activation_fn).__name__
    tokens, scored = (batch.labels,) * 2 if batch.take is None else (batch.take, batch.predictors)
    assert did == expected | {"tokens": [tokens.numel()] * 2, "logits": [scored.numel()] * 2}


def test_throughput_compares_like_with_like_at_identical_settings(tiny, monkeypatch):
    """The README's first claim. TRL's constructor changes the model that it is given, and so has its own."""
    stood_on = []
    rival = lambda model, *rest: stood_on.append(model) or (make_batch, throughput.authors_step)
    monkeypatch.setattr(throughput, "trl_rival", rival)
    tiny.trl, given = True, timed(monkeypatch, FAST, SLOW, SLOW)
    found = throughput.compare(tiny, True)
    assert found["identical"] and {*found["speedup"]} == {"authors", "trl"}
    assert found["examples_per_second"] == {"ours": 4, "authors": 1, "trl": 1}  # 2 in 0.5 s; in 2 s
    assert found["hours_for_10k_x_3"] == pytest.approx(30_000 / 4 / 3600)
    models, batches, losses = zip(*given)
    assert stood_on == [models[2]] and len({*models}) == 3
    [*map(check_step, (OURS, AUTHORS, AUTHORS), models, map(next, batches), losses)]


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, torch.bfloat16)])
def test_throughput_at_its_best_and_as_released(dtype, autocast, tiny, monkeypatch):
    """Ours gains --no-checkpointing, theirs peft's layers, Phi's activation and, in bf16, autocast."""
    tiny.dtype, given = dtype, timed(monkeypatch, FAST, SLOW)
    assert not throughput.compare(tiny, False)["identical"]
    ours, authors = [(model, next(batches), losses) for model, batches, losses in given]
    check_step(OURS | {"attention": [(True, False)] * 2}, *ours)
    released = {"LoRA": {peft.tuners.lora.Linear}, "activation": "NewGELUActivation"}
    check_step(AUTHORS | released | {"attention": [(None, autocast)] * 3}, *authors)


@pytest.mark.parametrize("items, rounds, ours, theirs, found, rate", [
    (3, 2, (1, 2, 3, 4), (6, 6, 7, 7), (2, 3, 4), 0.8),  # 6 / 1.5, 7 / 3.5; 2 / 2.5: a turn is rounded up
    (2, 3, (2, 1, 4), (6, 4, 40), (3, 4, 10), 1),  # each round's own, and no mean
])  # fmt: skip
def test_throughput_ratio_is_of_the_same_round(items, rounds, ours, theirs, found, rate, tiny, monkeypatch):
    """Upside down, "2 times as long" would be its opposite. As in training, all see examples but once."""
    tiny.items, tiny.rounds, given = items, rounds, timed(monkeypatch, (100, 100, *ours), (100, 100, *theirs))
    measured = throughput.compare(tiny, True)
    assert measured["speedup"] == {"authors": dict(zip(("low", "median", "high"), found))}
    assert measured["examples_per_second"]["ours"] == rate
    for _, batches, _ in given:
        seen = [one for batch in batches for one in batch.ids]
        assert seen == [str(i) for i in range(2 * (2 + len(ours)))]


def test_throughput_rivals_have_the_same_loss(tiny, monkeypatch):
    """A rival that computes something else is none. A CLIP has a token of the whole image, left out."""
    text = transformers.LlamaConfig(**dict(zip(throughput.TEXT, (32, 64, 1, 2, 600))))
    vision = transformers.CLIPVisionConfig(**dict(zip(tiny_bunny.VISION, (32, 64, 2, 2, 8, 32))))
    monkeypatch.setitem(throughput.SHAPES, "llava", (text, vision))
    model, processor = throughput.make_model("llava", "cpu", torch.float32)
    torch.manual_seed(4)
    move(model)
    pairs = throughput.make_pairs(2)
    batch = make_batch(pairs, processor)
    assert (batch.inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [16] * 6
    expected = mdpo_step(model, throughput.packed_batch(pairs, processor))[0]
    released = throughput.as_released(model, throughput.authors_step)
    torch.testing.assert_close(released(model, batch)[0], expected, rtol=1e-5, atol=1e-5)


def test_throughput_rival_of_trl_is_dpo(tiny):
    """Of the same texts, uncut, at beta 0.1. Its reference is the adapter that it is given: none, as yet."""
    pytest.importorskip("trl")
    (given, processor), (plain, _) = (throughput.make_model("tiny", "cpu", torch.float32) for _ in "12")
    pairs = throughput.make_pairs(2)
    make, losses = throughput.trl_rival(given, processor, pairs)
    move(plain)
    given.load_state_dict(plain.state_dict(), strict=False)  # TRL gave it another adapter
    batch = make_batch(pairs, processor, ("chosen", "rejected"))
    expected = mdpo_step(plain, batch, conditional=False, anchors=())[0].mean().item()
    found = losses(given, make(pairs, processor))[0].item()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LogPs._fields)
def test_throughput_stops_where_the_schemes_must_agree_and_do_not(name, tiny, monkeypatch):
    """The README says that they are checked to give the same log-probabilities before anything is timed."""
    right, given = throughput.authors_logps, timed(monkeypatch)
    wrong = lambda *batch: (found := right(*batch))._replace(**{name: 1.001 * getattr(found, name)})
    monkeypatch.setattr(throughput, "authors_logps", wrong)
    with pytest.raises(AssertionError, match=name):
        throughput.compare(tiny, identical=True)
    assert not given


def test_stepper_times_the_whole_of_a_training_step(monkeypatch):
    """Losses take 2 s, the backward pass 5, the optimizer 13; a batch is made before, in 11. A GPU works
    later. AdamW moves the weight by 0.0001 where the gradient does not change: norms 1, 3 and 2 are cut."""
    clock, waiting = [0], []
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.extend(waiting) or waiting.clear())
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()

    def losses(model, slope):
        waiting.append(2)
        loss = model.weight[0] * slope
        loss.register_hook(lambda gradient: waiting.append(5))
        return [loss]

    batches = (waiting.append(11) or slope for slope in (1.0, 3.0, 2.0))
    after = register_optimizer_step_post_hook(lambda *given: waiting.append(13))
    assert [*throughput.train_on(model, batches, losses)] == [20, 20, 20]
    after.remove()
    assert model.weight.item() == pytest.approx(-0.0003, abs=1e-7) and model.weight.grad is None


def test_texts_are_as_long_as_the_script_says(monkeypatch):
    """Questions of 40 words, answers of 110 and 90: lengths decide what padding and a shared prefix cost."""
    monkeypatch.setattr(Image, "effect_mandelbrot", lambda *given: Image.new("L", (1, 1), given[-1]))
    pairs = throughput.make_pairs(1500)
    assert sum(one.images != one.images_rejected for one in pairs) > 1400
    assert throughput.make_pairs(9) == pairs[:9]  # in a fresh process as well
    lengths = zip(*([len(text.split()) for text in one[:3]] for one in pairs))
    assert [*map(statistics.mean, lengths)] == pytest.approx([40, 110, 90], rel=0.06)


@pytest.mark.parametrize("shape, rank", [("tiny", 8), ("bunny-3b", 64)])
def test_model_of_throughput_has_no_dropout_and_the_papers_lora(shape, rank, tiny, monkeypatch):
    """Dropout would set the schemes apart; cuDNN's attention plans each shape anew. alpha: twice the rank."""
    text, vision = throughput.SHAPES["tiny"]
    dropping = transformers.PhiConfig(**text.to_dict() | {"resid_pdrop": 0.1})
    monkeypatch.setitem(throughput.SHAPES, shape, (dropping, vision))
    torch.backends.cuda.enable_cudnn_sdp(True)
    model, _ = throughput.make_model(shape, "cpu", torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    adapted = [m for m in model.modules() if isinstance(m, train.LoraLinear)]
    assert {(m.scaling["default"], m.lora_A["default"].out_features) for m in adapted} == {(2, rank)}


@pytest.mark.parametrize("name, items, expected", [
    ("ours", 3, OURS | {"images": [2]}),
    ("authors", 3, AUTHORS | {"images": [3, 3]}),
    ("ours, no checkpointing", 1, OURS | {"images": [2], "attention": [(True, False)] * 2}),
])  # fmt: skip
def test_memory_is_measured_of_the_scheme_that_is_named(name, items, expected, tiny, monkeypatch):
    """What a user rents a GPU by. The second of two steps is on the longest texts; above the start."""
    texts = ["there is " * 9, "a red " * 9, "blue"], ["there is", "is a", "a"], ["there", "is", "a"]
    drawn = lambda n: [pair(*one, noise(3), noise(4)) for one in texts[:n]]
    monkeypatch.setattr(throughput, "make_pairs", drawn)
    tiny.micro_batch_size, tiny.items, tiny.dtype = 1, items, torch.bfloat16
    given = timed(monkeypatch, [0, 0])
    monkeypatch.setattr(throughput, "memory_now", lambda device, peak=False: 4.0 if peak else 1.5)
    assert throughput.measure_memory(tiny, name) == {"memory_gib": {name: {"before": 1.5, "above": 2.5}}}
    ((model, batches, losses),) = given
    first, heaviest = batches
    n_first, n_heaviest = ((batch.labels >= 0).sum() for batch in (first, heaviest))
    assert n_heaviest > 2 * 18 > 18 > n_first > 6  # y_w of 18 words, twice
    check_step(expected, model, heaviest, losses)


QKV = [(1, 2, 8, 16)] * 3
ATTENTION = 2 * 2 * 2 * 8 * 8 * 16  # two products, of two heads: 8 x 16 x 8 and 8 x 8 x 16


@pytest.mark.parametrize("operation, shapes, counted", [
    (torch.Tensor.addmm_, [(4, 16), (4, 8), (8, 16)], (2 * 4 * 8 * 16, 0, 1)),  # LoRA's, in place
    (lambda a, row: a + row.expand_as(a), [(4, 8), (1, 8)], (0, 2 * (32 + 8 + 32), 1)),  # and a view
    (throughput.attention_on_gpu, QKV, (ATTENTION, 0, 1)),
    (partial(throughput.attention_on_gpu, is_causal=True), QKV, (ATTENTION / 2, 0, 1)),
    (throughput.attention_on_gpu, [*QKV, (1, 1, 8, 8)], (ATTENTION, 0, 1)),  # under a mask
])  # fmt: skip
def test_what_an_operation_counts(operation, shapes, counted):
    """All hours rest on FLOPs, bytes and launches, here of bf16."""
    with throughput.Work() as work:
        operation(*(torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes))
    assert (work.flops, work.traffic, work.launches) == counted


def test_memory_formula_and_checkpointing_count_what_a_step_does(tiny, monkeypatch):
    """Recomputed, of width 32 and an MLP of 64: a layer's products, LoRA's A of six and B of all but the
    last, which nothing needs, and attention: causal in a row, whole where y_l's n tokens see a prefix.

    The peak: weights in bf16; of the adapter, AdamW's two numbers and a gradient, too, in float32; and, of
    a large vocabulary, mostly logits in float32, their log-softmax and its gradient."""
    model, processor = throughput.make_model("tiny", "meta", torch.bfloat16, checkpointing=False)
    batch = throughput.packed_batch(throughput.make_pairs(1), processor)
    without = throughput.count_work(model, batch)
    assert throughput.count_work(model, batch).launches == without.launches  # nothing is left of the first
    train.enable_checkpointing(model)
    again = throughput.count_work(model.train(), batch)
    layer, lora = 4 * 32 * 32 + 2 * 32 * 64, 8 * (5 * 32 + 64) + 8 * (4 * 32 + 64)
    seen = [(n, n / 2 if owner == row else prefix + n) for row, (n, owner, prefix) in enumerate(batch.blocks)]
    attention = sum(4 * 32 * n * n_keys for n, n_keys in seen)
    assert again.flops - without.flops == 2 * len(batch.take) * (layer + lora) + attention
    monkeypatch.setattr(throughput, "mdpo_step", lambda *given: torch.zeros(1, 1, requires_grad=True))
    always = throughput.count_work(model, batch).peak
    of_weights = sum(p.numel() * (16 if p.requires_grad else 2) for p in model.parameters())
    assert always == pytest.approx(of_weights, abs=64)
    assert without.peak - always == pytest.approx(12 * 20_000 * batch.predictors.numel(), rel=0.15)


def test_readme_hours_are_what_is_counted():
    """A table that rots: Bunny's hours on every card, with checkpointing."""
    model, processor = throughput.make_model("bunny-3b", "meta", torch.bfloat16)
    work = throughput.count_work(model, throughput.packed_batch(throughput.make_pairs(4), processor))
    rows = re.findall(r"^\| (.*), \d+ GB \| ([\d.]+), ([\d.]+) \| ([\d.]+) h ", EXAMPLES_README, re.MULTILINE)
    assert {name: (float(flops), float(width)) for name, flops, width, _ in rows} == throughput.CARDS
    for name, *_, hours in rows:
        assert float(hours) == pytest.approx(throughput.predicted_hours(work, name, 4), abs=0.06)


def shown(capsys, *names):
    """The values of these names in each line of JSON that was printed."""
    records = map(json.loads, capsys.readouterr().out.splitlines())
    return [tuple(record[name] for name in names) for record in records]


def test_throughput_command_measures_all_of_the_real_shape_on_a_gpu(tiny, monkeypatch, capsys):
    """Each measurement is a line; memory is of fresh processes. `tiny` tells nothing of a GPU."""
    commands, threads = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(throughput, "__file__", f"{os.devnull}/none")
    given = "--device cpu --threads 3 --rounds 1 --items 2 --micro-batch-size 2".split()
    with pytest.raises(BadInput, match="memory of ours"):  # whose own process said what was wrong
        throughput.run(given)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command[2:]))
    throughput.run(given)
    assert commands == [[*given, "--only", name] for name in throughput.MEMORY] and {*threads} == {3}
    names = "shape", "micro_batch_size", "device_name", "identical"
    assert shown(capsys, *names) == [("tiny", 2, "CPU, 3 thread(s)", same) for same in (True, False)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(throughput, "measure_memory", lambda args, name: {})
    for flags in "--device cuda", "--device cpu", "--device cuda --shape tiny --dtype float32":
        throughput.run([*flags.split(), "--only", "ours"])
    names, in_bf16 = ("shape", "dtype", "micro_batch_size"), ("torch.bfloat16", 4)
    assert shown(capsys, *names) == [("bunny-3b", *in_bf16), *[("tiny", "torch.float32", 4)] * 2]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: 1 / 0)
    with pytest.raises(BadInput, match="--device cuda: "):
        throughput.run(["--device", "cuda"])


def test_memory_formula_prints_peaks_and_hours_of_the_slower_of_card_and_host(tiny, monkeypatch, capsys):
    """Before a GPU is rented. The heaviest of 30,000 examples has a longer y_l. By hand: 1 s of products
    at 0.48 of 990 TFLOP/s, 0.5 s of traffic at 0.8 of 4.8 TB/s; with checkpointing 3.8 s of launches."""
    n_drawn, long = itertools.count(1), {1: 21, 3 * 97: 44}  # a question, counted twice, and the 97th y_l
    monkeypatch.setattr(throughput, "draw_length", lambda rng, mean: long.get(next(n_drawn) % 90_000, 3))
    monkeypatch.setattr(throughput, "packed_batch", lambda pairs, _: len(pairs[0].rejected.split()))
    monkeypatch.setattr(throughput, "make_model", lambda *given: (given[-1], "a processor"))
    work = partial(SimpleNamespace, flops=475.2e12, traffic=1.92e12)
    count_work = lambda checkpointing, longest: work(launches=100_000 * checkpointing, peak=longest * 2**30)
    monkeypatch.setattr(throughput, "count_work", count_work)
    throughput.run(["--only", "memory-formula"])
    names = "shape", "checkpointing", "micro_batch_size", "peak_gib", "device_name", "dtype", "hours"
    *found, hours = zip(*shown(capsys, *names))
    ways = itertools.product(("bunny-3b", "llava-7b"), (False, True), (1, 2, 4, 8, 16, 32))
    assert [*zip(*found)] == [(*way, 44.0, "predicted", "bfloat16") for way in ways]
    # Of one example, of two at once, and where the card waits for the host.
    assert [hours[i]["H200"] for i in (0, 1, 6)] == [12.5, 6.25, 31.67]


N_TOKENS = torch.tensor([[4], [3], [5], [1]])  # of y_w in two examples, then of y_l
OF_4_TOKENS = {"batch": SimpleNamespace(labels=torch.where(torch.arange(5) < N_TOKENS, 0, -100))}
dpo = lambda beta: {"dpo": softplus(-3 * beta)}
more = lambda beta, delta: {"conditional": 0.2 * softplus(-2 * beta), "anchor": softplus(delta - beta)}


@pytest.mark.parametrize("beta", [{"beta": 0.5}, {}])
@pytest.mark.parametrize("loss, options, expected", [
    (variants.chip_loss, {}, lambda beta: {"joint": softplus(-5 * beta)}),
    (variants.opa_dpo_loss, {}, lambda beta: dpo(beta) | more(beta, 0)),
    (variants.opa_dpo_loss, {"delta": 0.25}, lambda beta: dpo(beta) | more(beta, 0.25)),
    (variants.rpo_loss, OF_4_TOKENS, lambda beta: dpo(beta) | {"sft": 10.1 / 4}),
    (variants.rpo_loss, OF_4_TOKENS | {"alpha": 2}, lambda beta: dpo(beta) | {"sft": 2 * 10.1 / 4}),
])  # fmt: skip
def test_losses_of_the_variants_by_hand(loss, options, expected, beta):
    """A wrong sign or weight is another paper's loss. Rewards are 1, -2 and -1 times beta; log pi(y_w | m_w,
    q) is -10.1, which is no float32, over 4 tokens. The second example's rewards are 0: a mean would show."""
    policy, ref = (LogPs(*(logp.double() - 0.1 for logp in logps)) for logps in (POLICY, REF))
    policy = LogPs(*(torch.cat(each).requires_grad_() for each in zip(policy, ref)))
    losses, metrics = loss(policy, LogPs(*(logp.repeat(2) for logp in ref)), **beta, **options)
    beta = beta.get("beta", 0.1)
    assert losses.shape == (2,) and losses.requires_grad
    assert losses[0].item() == pytest.approx(sum(expected(beta).values()), abs=1e-12)
    terms = {name[5:]: value[0].item() for name, value in metrics.items() if name.startswith("loss/")}
    assert terms == pytest.approx(expected(beta), abs=1e-12)
    assert metrics["rewards/image_margins"].tolist() == pytest.approx([2 * beta, 0])
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("level", [64, 128, 191])
def test_noise_is_the_diffusions(level):
    """x_t = sqrt(a) x + sqrt(1 - a) e. The schedule is multiplied up here in plain Python: a = 0.7448.
    Clipping does not move these quantiles: the median is sqrt(a) x, 68% lie within one deviation."""
    a = math.prod(1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * t / 999))) for t in range(501))
    image = Image.new("RGB", (300, 200), (level, level, level))
    x = torch.tensor([*variants.diffusion_noise(image, random.Random(0)).tobytes()]) / 127.5 - 1
    low, median, high = x.quantile(torch.tensor([0.158655, 0.5, 0.841345])).tolist()
    assert median == pytest.approx(math.sqrt(a) * (level / 127.5 - 1), abs=0.01)
    assert (high - low) / 2 == pytest.approx(math.sqrt(1 - a), abs=0.01)
    by_pixel = x.view(-1, 3).T  # each colour and each pixel has noise of its own
    neighbours = torch.stack([*by_pixel[:, 1:], by_pixel[0, :-1]])
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
    image = noise(2, (100, 75))  # no multiple of 24
    changed = ImageChops.difference(image, variants.mask_patches(image, rng)).convert("L").tobytes()
    assert 1 - changed.count(0) / (100 * 75) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("strategy", ["noise", "mask"])
def test_rejected_images_of_the_variants_are_functions_of_image_and_rng(strategy, tmp_path):
    """Resumed runs and workers see them again only then; another epoch and another example see others."""
    pairs, keys = Pairs(as_examples(tmp_path, 2), strategy), [(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)]
    drawn = [pairs[key].images_rejected[0].tobytes() for key in keys]
    assert drawn[0] == drawn[1] and len({*drawn}) == 4
    assert data.STRATEGIES[strategy](noise(1), random.Random(1)).size == noise(1).size


@pytest.mark.parametrize("name, reject, terms", [
    ("chip", "noise", {"loss/joint"}),
    ("opa-dpo", "mask", {"loss/dpo", "loss/conditional", "loss/anchor"}),
    ("rpo", "crop", {"loss/dpo", "loss/sft"}),
])  # fmt: skip
def test_variants_run_and_go_on(name, reject, terms, bunny, small, tmp_path, capsys):
    """Half a run of one loss and half of another is no run."""
    assert run_command(variants.run, [name, *command(bunny, small, tmp_path)]) == 0
    args, (first, *_) = json.loads((tmp_path / "args.json").read_text()), curves.read_log(tmp_path)
    assert (args["reject"], {key for key in first if key.startswith("loss/")}) == (reject, terms)
    assert ("rewards/image_margins" in first) == (name != "rpo")  # m_l is encoded only where it is needed
    for other in {*variants.VARIANTS} - {name}:
        assert run_command(variants.run, [other, "--resume", str(tmp_path)]) == 2
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("it began with other values of loss") == 3
    assert run_command(variants.run, [name, f"--resume={tmp_path}"]) == 0
    assert run_command(evaluate.run, f"--model {bunny} --adapter {tmp_path} --data {small}".split()) == 0
    assert {*re.findall(r"loss/\w+", capsys.readouterr().out)} == terms


def test_variants_take_train_pys_flags_but_those_of_the_terms(monkeypatch, capsys):
    """`--anchors none` that changes nothing would be a run under a wrong name. The user's --reject counts."""
    monkeypatch.setattr(train, "main", lambda *args: args)
    begun = ["--reject", "noise", "--reject", "crop"], variants.chip_loss
    assert variants.run(["chip", "--reject", "crop"]) == begun
    assert variants.run(["rpo", "--resume=RUN"]) == (["--resume=RUN"], variants.rpo_loss)  # as it began
    for flag in ("--no-image", "--no-conditional", "--anchors", "--anchors=none", "--delta", "--demo"):
        assert run_command(variants.run, ["opa-dpo", flag, "none"]) == 2
        assert f"{flag.partition('=')[0]}: opa-dpo has terms of its own" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        variants.run(["--help"])
    shown = capsys.readouterr().out
    assert variants.__doc__ in shown and "All other arguments are those of train.py" in shown


def test_variants_are_run_from_their_file(tmp_path):
    """Workers that are spawned, not forked, import it as __mp_main__, in any folder."""
    script = f"import runpy; runpy.run_path({variants.__file__!r}, run_name='__mp_main__'); import data"
    argv = [sys.executable, "-c", script + "; print(*data.STRATEGIES)"]
    assert subprocess.check_output(argv, cwd=tmp_path, text=True) == "crop random moco noise mask\n"


@pytest.fixture
def pairs_file(tmp_path):
    """Answers of several lengths; images that EXIF data turn, one of them tall and one wide."""
    pairs = [
        ((48, 32), "What?", "There is a red circle.", "There is a blue square and a red circle."),
        ((90, 6), " What is in it?\n", "A blue square, and a red circle too. ", "No."),
        ((5, 64), "Is it red?", "It is.", "It is not."),
    ]
    records, exif = [], Image.Exif()
    exif[0x0112] = 6
    for size, *texts in pairs:
        noise(1, size).save(tmp_path / f"{size}.png", exif=exif)
        records.append({"image": f"{size}.png"} | dict(zip(("question", "chosen", "rejected"), texts)))
    return write(tmp_path / "pairs.json", records)


ENDING = "part.text + (eos_token if message.role == 'assistant' else ' ')"
TEMPLATES = {
    "of the hub": HUB_LLAVA_TEMPLATE,
    "with <s>": "{{ bos_token }}" + HUB_LLAVA_TEMPLATE,
    "with </s>": families.LLAVA.replace("part.text + ' '", ENDING),
    "with a line before an answer": families.ONEVISION.replace("<|im_end|>", "</s>"),
}


@pytest.fixture(params=TEMPLATES)
def base(request, llava, tmp_path):
    """A LLaVA that does not find all tokens equally likely, with one of the templates."""
    model, processor = train.load_model(str(llava))
    processor.chat_template = TEMPLATES[request.param]
    torch.manual_seed(1)
    for parameter in model.get_decoder().parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_minimal_trains_as_train_py_does(base, pairs_file, tmp_path, monkeypatch, capsys):
    """Who retypes it must get mDPO, with its losses, gradients and adapter. The base asks for dropout."""
    args = train.parse_args(["--model", "m", "--data", "d"])
    settings = minimal.BETA, minimal.LR, minimal.EPOCHS, minimal.BATCH, minimal.SEED
    assert settings == (args.beta, args.lr, args.epochs, args.batch_size, args.seed)
    monkeypatch.setattr(minimal, "LR", 1e-3)
    monkeypatch.setattr(minimal, "BATCH", 2)
    minimal.main(base, pairs_file, str(tmp_path / "minimal"))
    shown = re.findall(r"loss ([\d.]+), gradient ([\d.]+)", capsys.readouterr().out)
    flags = "--batch-size 2 --micro-batch-size 1 --lr 1e-3 --workers 0 --device cpu"
    assert train.main(f"{flags} --model {base} --data {pairs_file} --out {tmp_path}/train".split()) == 0
    expected = [[record["loss"], record["grad_norm"]] for record in curves.read_log(tmp_path / "train")]
    torch.testing.assert_close([[*map(float, step)] for step in shown], expected, atol=2e-5, rtol=2e-4)
    weights = (adapter(tmp_path / name) for name in ("minimal", "train"))
    torch.testing.assert_close(*weights, atol=5e-6, rtol=0)
    transformers.AutoProcessor.from_pretrained(tmp_path / "minimal")


def test_minimal_on_a_gpu_checkpoints_in_bf16(llava, pairs_file, tmp_path, monkeypatch):
    """The CPU is called "cuda". A layer runs for reference, policy and gradient, in bf16, without dropout."""
    calls, to, cuda = [], torch.Tensor.to, SimpleNamespace(is_available=lambda: True)  # not for the library
    monkeypatch.setattr(minimal, "torch", SimpleNamespace(**vars(torch) | {"cuda": cuda}))

    def stay(self, *args, **options):
        return self if "cuda" in map(str, (*args, *options.values())) else to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", stay)

    def note(module, **options):
        weight, lora_B = module.o_proj.weight, module.o_proj.lora_B["default"].weight
        calls.append((weight.dtype, module.training, lora_B.dtype))

    monkeypatch.setattr(minimal, "EPOCHS", 1)
    with preceded("transformers.models.llama.modeling_llama.LlamaAttention.forward", note):
        minimal.main(str(llava), pairs_file, str(tmp_path / "out"))
    assert calls == [(torch.bfloat16, False, torch.float32)] * (3 * 2 * 3)


def test_minimal_says_how_it_is_used_and_imports_nothing_of_this_repository(tmp_path):
    """It is one file: copied elsewhere, it must run."""
    shutil.copy(minimal.__file__, tmp_path)
    argv = [sys.executable, "minimal.py", "--help"]
    child = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 1 and "minimal.py MODEL pairs.json OUT" in child.stderr


def test_labels_of_the_base_lie_under_their_shapes(monkeypatch):
    """A base that learned from mirrored pictures does not look. Here the second of two has a red square at
    the top right: of kind 2, in colour 1, on 2 x 2 of 4 x 4 patches."""
    tower = transformers.SiglipVisionModel(tiny_bunny.siglip(64, 64, 1, 2, 8, 32))
    scenes, labels = iter([{}, {"square": ("red", 1)}]), []
    monkeypatch.setattr(shapes, "random_scene", lambda *args, **options: next(scenes))
    note = lambda logits, targets: labels.append(targets) or logits.sum()
    monkeypatch.setattr(tiny_bunny, "F", SimpleNamespace(cross_entropy=note))
    model = SimpleNamespace(model=SimpleNamespace(vision_tower=tower))
    tiny_bunny.learn_to_see(model, random.Random(0), shapes.SMALL, steps=1, batch_size=2)
    for found, kind in zip(labels, (2, 1), strict=True):
        expected = torch.zeros(2, 4, 4)
        expected[1, :2, 2:] = kind
        assert torch.equal(found.view(2, 4, 4).float(), expected)
    (bias,) = (p for name, p in tower.named_parameters() if name.endswith("norm1.bias"))  # zeros before
    assert bias.any() and bias.grad is None


def test_memory_of_throughput_is_in_gib(monkeypatch):
    """Off by a factor, a model is said to fit that does not. /proc counts pages."""
    pages, now = int(Path("/proc/self/statm").read_text().split()[1]), throughput.memory_now("cpu")
    assert now == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE") / 1024**3, rel=0.02)
    assert throughput.memory_now("cpu", peak=True) >= 0.98 * now
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *args, **kwargs: 3 * 1024**3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *args, **kwargs: 5 * 1024**3)
    assert (throughput.memory_now("cuda"), throughput.memory_now("cuda", peak=True)) == (3, 5)


def test_readme_step_is_mdpo_steps(tmp_path, monkeypatch, capsys):
    """The lines that people copy into their own loop, gradients included."""
    (code,) = re.findall(r"```python\n(import torch\nfrom data .*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shapes.write_pairs(tmp_path / "runs/demo-1/data", 4)
    # Else the adapter would do nothing yet, and the reference might have it.
    monkeypatch.setattr(torch.nn.init, "zeros_", partial(torch.nn.init.normal_, std=0.1))
    exec(code, scope := {})
    printed = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    model = train.add_lora(train.load_model("examples/base")[0], rank=16, alpha=32)
    losses, metrics = mdpo_step(model, scope["batch"])
    assert abs(losses.mean().item() - 3 * math.log(2)) > 0.01
    losses.mean().backward()
    for ours, theirs in zip(model.parameters(), scope["model"].parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, atol=1e-5, rtol=1e-3)
        assert torch.equal(ours, theirs) == (ours.grad is None)  # else it has stepped
    assert printed == pytest.approx({n: metrics[n].mean().item() for n in metrics if n != "loss"}, abs=6e-4)


def test_the_files_that_are_copied_stand_alone():
    """`data` and `train` are names of everyone's own modules: imported in mdpo.py, they would be those."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"examples", "tests"}
    for name in "mdpo.py", "data.py":
        imported = re.findall(r"(?m)^ *(?:import|from) (\w+)", (ROOT / name).read_text())
        assert imported and not {*imported} & ours
    part, speed = (ROOT / "mdpo.py").read_text().split("\ndef mdpo_step")
    later = {*re.findall(r"(?m)^(?:def|class) (\w+)", speed), "mdpo_step", "Batch"}
    assert not later & {*re.findall(r"\w+", part)}
