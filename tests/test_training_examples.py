"""The examples about training: numbers under their right names, a benchmark that compares like with like,
losses worked out by hand, and a minimal program that trains exactly as train.py does."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
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
from test_mdpo import HUB_LLAVA_TEMPLATE, POLICY, REF, TEXTS, adapter, command, noise, pair, softplus, write
from tests.helpers import README, as_examples

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_families_print_their_table_alone(monkeypatch, capfd):
    """A table of 8 lines stood among 138 others. A run that fails says why."""
    monkeypatch.setattr(train, "best_device", lambda: pytest.fail("would take a GPU"))
    monkeypatch.setattr(families, "FAMILIES", {"gemma3": families.gemma3})
    assert run_command(families.run, []) == 0
    printed = capfd.readouterr()
    head, row = map(str.split, printed.out.splitlines())
    assert head[:2] == ["family", "rows"] and row[:2] == ["gemma3", "plain"] and printed.err == ""
    assert row[2] == "changed"
    parse_args = train.parse_args
    monkeypatch.setattr(families, "generate_answers", lambda *rest: "as it was")
    assert run_command(families.run, []) == 0 and capfd.readouterr().out.split()[-1] == "same"
    monkeypatch.setattr(train, "parse_args", lambda argv: parse_args([*argv, "--eval-size", "99"]))
    assert run_command(families.run, []) == 2
    assert capfd.readouterr().err == "error: gemma3: --eval-size 99 leaves none of 8 examples to train on\n"


def test_curves_show_every_metric_of_the_readme():
    """A metric without a curve is a metric that nobody looks at. Memory is one number, not a curve."""
    rows = re.findall(r"^\| (`.*?) \|", README.split("\n## Metrics\n")[1].split("\n## ")[0], re.MULTILINE)
    names = {*re.findall("`(.*?)`", " ".join(rows))}
    assert {*filter(curves.SHOWN.match, names)} == names - {"peak_memory_gib"}


def test_curves_are_drawn_of_a_run_in_progress_and_of_trl(tmp_path):
    """A line that is being written is no broken log; one before it is. TRL has other names."""
    path, records = tmp_path / "metrics.jsonl", [{"step": 0, "eval/loss": 2.0}, {"step": 1, "loss": 1.5}]
    whole = "".join(f"{json.dumps(record)}\n" for record in records)
    for text in (whole, whole[:-1], whole + '{"step": 2, "lo'):
        path.write_text(text)
        assert curves.read_log(tmp_path) == records
    path.write_text(whole.splitlines()[0])
    assert curves.read_log(tmp_path) == records[:1]  # a run that has just begun
    for text in ("", '{"st', '{"st\n{"step": 1}\n'):
        path.write_text(text)
        with pytest.raises(BadInput, match="metrics.jsonl: cannot be read"):
            curves.read_log(tmp_path)
    of_trl = tmp_path / "trainer_state.json"
    names = "loss eval_loss eval_rewards/margins learning_rate grad_norm rewards/chosen step".split()
    history = [dict.fromkeys(names, 0.5), {"train_loss": 1.5, "step": 1}]
    of_trl.write_text(json.dumps({"log_history": history}))
    first, _ = records = curves.read_log(tmp_path)
    ours = "loss eval/loss eval/rewards/margins lr grad_norm rewards/chosen step"
    assert first == dict.fromkeys(ours.split(), 0.5) and curves.points(records, "loss") == ([0.5], [0.5])
    for empty in "[]", '[{"step": 1, "train_loss": 1.5}]':
        of_trl.write_text(f'{{"log_history": {empty}}}')
        with pytest.raises(BadInput, match="trainer_state.json: cannot be read: holds no metric to draw yet"):
            curves.read_log(tmp_path)


def test_curves_have_a_colour_a_run_and_points_where_held_out(finished, tmp_path, capsys):
    """Curves under a wrong name are worse than none. Before training all accuracies are 0, which is no
    point."""
    pytest.importorskip("matplotlib")
    start, later = ({"step": 9 * m, "eval/margins": m, "eval/accuracies": 0} for m in (0, 1))
    assert curves.points([start, later], "eval/accuracies") == ([9], [0])
    assert curves.points([start, later], "eval/margins") == ([0, 9], [0, 1])
    step = {"step": 1, "epoch": 0.5, "loss": 1.5, "loss/joint": 0.5, "eval/loss": 1.0}
    other = {"step": 3, "loss": 0.5, "lr": 0.1, "eval/rewards/chosen": 0.7}
    figure = curves.draw({"a": [{"step": 0, "eval/loss": 2.0}, step], "b": [other]})
    say = lambda line: f"{line.get_color()} {line.get_marker()} {line.get_xydata().tolist()}"
    lines = {axis.get_title(): [line for line in axis.lines if len(line.get_xdata())] for axis in figure.axes}
    assert {title: [*map(say, drawn)] for title, drawn in lines.items()} == {
        "loss": ["C0 None [[1.0, 1.5]]", "C0 o [[0.0, 2.0], [1.0, 1.0]]", "C1 None [[3.0, 0.5]]"],
        "loss/joint": ["C0 None [[1.0, 0.5]]"],
        "rewards/chosen": ["C1 o [[3.0, 0.7]]"],
        "lr": ["C1 None [[3.0, 0.1]]"],
    }
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "held-out examples"]
    assert [line.get_color() for line in legend.legend_handles] == ["C0", "C1", "k"]
    assert run_command(curves.run, [str(finished), str(finished), "--to", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size[0] == 1620 and f"{tmp_path}/x.png: " in capsys.readouterr().out


TRAIN_ON = throughput.train_on


@pytest.fixture
def tiny(monkeypatch):
    """Sizes and texts at which a comparison takes a second -> the arguments of a comparison."""
    shape = throughput.phi(32, 64, 1, 2, 600), tiny_bunny.siglip(32, 64, 1, 2, 8, 32)
    monkeypatch.setitem(throughput.SHAPES, "tiny", shape)
    long = pair("there is a red", "circle and blue square " * 2, "here the", noise(1), noise(2))
    pairs = long, pair("picture of", "on in", "with small large near " * 3, noise(3), noise(4))
    numbered = lambda n: [pairs[i % 2]._replace(id=str(i)) for i in range(n)]
    monkeypatch.setattr(throughput, "make_pairs", numbered)
    return Namespace(shape="tiny", device="cpu", device_name="CPU", dtype=torch.float32, items=4, rounds=1,
                     micro_batch_size=2, trl=False)  # fmt: skip


@pytest.fixture
def timed(monkeypatch):
    """A function: seconds of the steps of each scheme -> a list that fills with (model, batches, losses)."""

    def timed(*seconds):
        given, left = [], iter(seconds)
        monkeypatch.setattr(throughput, "train_on", lambda *scheme: given.append(scheme) or iter(next(left)))
        return given

    return timed


FAST, SLOW = itertools.repeat(0.5), itertools.repeat(2.0)


OURS = {"LoRA": {train.LoraLinear}, "activation": "GELUTanh", "checkpointing": True, "images": 4}
OURS |= {"gradient": [False, True], "autocast": {False}, "masks": {"blocks"}}  # the reference has no gradient
AUTHORS = OURS | {"images": 12, "masks": {type(None)}}  # three images an example, encoded twice


def check_step(expected, peft_model, batch, losses):
    """One step, watched, has these settings, and not a pass, image, token or logit more."""
    model, did = peft_model.get_base_model(), defaultdict(list)
    decoder, head, tower = model.get_decoder(), model.lm_head, model.model.vision_tower
    layer = decoder.layers[0]

    def note(module, given, options):
        if module is decoder:
            did["tokens"].append(options["inputs_embeds"].shape[:2].numel())
            did["gradient"].append(torch.is_grad_enabled())
        elif module is layer:
            did["autocast"].append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            did["masks"].append("blocks" if "blocks" in options else type(options["attention_mask"]))
        elif module is head:
            did["logits"].append(given[0][..., 0].numel())
        else:
            did[module].append(len(given[0] if given else options["pixel_values"]))

    for module in (decoder, layer, layer.mlp, tower, head):
        module.register_forward_pre_hook(note, with_kwargs=True)
    [*TRAIN_ON(peft_model, [batch], losses)]
    assert all(p.isfinite().all() for p in model.parameters())  # nan, where two models share how they attend
    of_ours = "blocks" in expected["masks"]
    counts = (len(batch.take), batch.predictors.numel()) if of_ours else [batch.labels.numel()] * 2
    assert [did["tokens"], did["logits"]] == [[n] * 2 for n in counts]
    assert expected == {
        "LoRA": {type(module) for module in model.modules() if hasattr(module, "lora_A")},
        "activation": type(layer.mlp.activation_fn).__name__,
        "checkpointing": len(did[layer.mlp]) > len(did["tokens"]),
        "images": sum(did[tower]),
        "gradient": sorted(did["gradient"]),
        **{name: {*did[name]} for name in ("autocast", "masks")},
    }


def test_throughput_compares_like_with_like_at_identical_settings(tiny, timed, monkeypatch):
    """Settings called identical are the README's first claim. TRL's constructor would make the authors' rows
    go back through the frozen tower, too. 2 examples in half a second are 4 a second, 30,000 take 7500 s."""
    stood_on = []
    rival = lambda model, *rest: stood_on.append(model) or (make_batch, throughput.authors_step)
    monkeypatch.setattr(throughput, "trl_rival", rival)
    tiny.trl, given = True, timed(FAST, SLOW, SLOW)
    found = throughput.compare(tiny, True)
    assert found["identical"] and {*found["speedup"]} == {"authors", "trl"}
    assert found["examples_per_second"] == {"ours": 4, "authors": 1, "trl": 1}
    assert found["hours_for_10k_x_3"] == pytest.approx(7500 / 3600)
    models, batches, losses = zip(*given)
    assert stood_on == [models[2]] and len({*models}) == 3
    batches = [*map(next, batches)]
    for model, batch, of in zip(models, batches, losses):
        assert of(model, batch)[0].tolist() == pytest.approx([3 * math.log(2)] * 2)
    assert len(batches[1].labels) == 6
    [*map(check_step, (OURS, AUTHORS, AUTHORS), models, batches, losses)]


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, torch.bfloat16)])
def test_throughput_at_its_best_and_as_released(dtype, autocast, tiny, timed, monkeypatch):
    """Ours gains --no-checkpointing, theirs peft's layers, Phi's activation and, in bf16, autocast."""
    monkeypatch.setattr(throughput, "trl_rival", lambda *arguments: pytest.fail("TRL is run without --trl"))
    tiny.dtype, given = dtype, timed(FAST, SLOW)
    assert not throughput.compare(tiny, False)["identical"]
    ours, authors = [(model, next(batches), losses) for model, batches, losses in given]
    check_step(OURS | {"checkpointing": False}, *ours)
    released = {"LoRA": {peft.tuners.lora.Linear}, "activation": "NewGELUActivation", "autocast": {autocast}}
    check_step(AUTHORS | released, *authors)


@pytest.mark.parametrize("items, rounds, ours, theirs, found, rate", [
    (3, 2, (1, 2, 3, 4), (6, 6, 7, 7), (2, 3, 4), 0.8),  # 6 / 1.5, 7 / 3.5; 2 / 2.5: a turn is rounded up
    (2, 3, (1, 1, 1), (1, 2, 9), (1, 2, 9), 2),  # no mean
    (2, 3, (2, 1, 4), (6, 4, 16), (3, 4, 4), 1),  # each round's own
])  # fmt: skip
def test_throughput_ratio_is_of_the_same_round(items, rounds, ours, theirs, found, rate, tiny, timed):
    """Upside down, a README's "2 times as long" would be its opposite. Two steps before do not count. All see
    the same examples, none twice, as in training."""
    tiny.items, tiny.rounds, given = items, rounds, timed((100, 100, *ours), (100, 100, *theirs))
    measured = throughput.compare(tiny, True)
    assert measured["speedup"] == {"authors": dict(zip(("low", "median", "high"), found))}
    assert measured["examples_per_second"]["ours"] == rate
    for _, batches, _ in given:
        seen = [one for batch in batches for one in batch.ids]
        assert seen == [str(i) for i in range(2 * (2 + len(ours)))]


LLAVA = (
    transformers.LlamaConfig(**dict(zip(throughput.TEXT, (32, 64, 1, 2, 600)))),
    transformers.CLIPVisionConfig(**dict(zip(tiny_bunny.VISION, (32, 64, 2, 2, 8, 32)))),
)


@pytest.mark.parametrize("shape", ["tiny", "llava"])
def test_throughput_rivals_have_the_same_loss(shape, tiny, monkeypatch):
    """A rival that computes something else is none. A CLIP has a token of the whole image, left out."""
    monkeypatch.setitem(throughput.SHAPES, "llava", LLAVA)
    model, processor = throughput.make_model(shape, "cpu", torch.float32)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pairs = throughput.make_pairs(2)
    batch = make_batch(pairs, processor)
    assert (batch.inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [16] * 6
    expected = mdpo_step(model, throughput.packed_batch(pairs, processor))[0]
    assert (expected - 3 * math.log(2)).abs().max() > 1e-3
    torch.testing.assert_close(throughput.authors_step(model, batch)[0], expected, rtol=1e-5, atol=1e-5)
    released = throughput.as_released(model, throughput.authors_step)
    torch.testing.assert_close(released(model, batch)[0], expected, rtol=1e-5, atol=1e-5)


def test_throughput_rival_of_trl_is_dpo(tiny):
    """Of the same texts, uncut, at beta 0.1. Its reference is the adapter that it is given: none, as yet."""
    pytest.importorskip("trl")
    (given, processor), (plain, _) = (throughput.make_model("tiny", "cpu", torch.float32) for _ in "12")
    pairs = throughput.make_pairs(2)
    make, losses = throughput.trl_rival(given, processor, pairs)
    for model in (given, plain):
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch(pairs, processor, ("chosen", "rejected"))
    expected = mdpo_step(plain, batch, conditional=False, anchors=())[0].mean().item()
    found = losses(given, make(pairs, processor))[0].item()
    assert found == pytest.approx(expected, abs=1e-6) != math.log(2)


@pytest.mark.parametrize("field, off", [(0, 0.5), (1, -0.5), (2, 0.5)])
def test_throughput_stops_where_the_schemes_must_agree_and_do_not(field, off, tiny, timed, monkeypatch):
    """The README says that they are checked to give the same log-probabilities before anything is timed."""
    authors_logps, name = throughput.authors_logps, LogPs._fields[field]
    wrong = lambda *given: (logps := authors_logps(*given))._replace(**{name: logps[field] + off})
    monkeypatch.setattr(throughput, "authors_logps", wrong)
    given = timed(FAST, SLOW)
    with pytest.raises(AssertionError, match=name):
        throughput.compare(tiny, identical=True)
    assert not given


class OnGPU(torch.nn.Parameter):
    is_cuda = True


@pytest.mark.parametrize("on_gpu", [False, True])
def test_stepper_times_the_whole_of_a_training_step(on_gpu, monkeypatch):
    """Losses take 2 s, the backward pass 5, the optimizer 13; a batch is made before, in 11. A GPU works
    later. AdamW moves the weight by 0.0001 where the gradient does not change: norms 1, 3 and 2 are cut."""
    clock, waiting = [0], []
    work = lambda seconds: (waiting if on_gpu else clock).append(seconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.extend(waiting) or waiting.clear())
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight = (OnGPU if on_gpu else torch.nn.Parameter)(torch.zeros(1, 1))

    def losses(model, slope):
        work(2)
        loss = model.weight[0] * slope
        loss.register_hook(lambda gradient: work(5))
        return [loss]

    batches = (work(11) or slope for slope in (1.0, 3.0, 2.0))
    after = register_optimizer_step_post_hook(lambda *given: work(13))
    assert [*throughput.train_on(model, batches, losses)] == [20, 20, 20]
    after.remove()
    assert model.weight.item() == pytest.approx(-0.0003, abs=1e-7) and model.weight.grad is None


def test_texts_are_as_long_as_the_script_says(monkeypatch):
    """Questions of 40 words, answers of 110 and 90: lengths decide what padding and a shared prefix cost."""
    monkeypatch.setattr(Image, "effect_mandelbrot", lambda *given: Image.new("L", (1, 1), given[-1]))
    pairs = throughput.make_pairs(1500)
    assert sum(one.images != one.images_rejected for one in pairs) > 1400
    lengths = zip(*([len(text.split()) for text in one[:3]] for one in pairs))
    assert [*map(statistics.mean, lengths)] == pytest.approx([40, 110, 90], rel=0.06)


@pytest.mark.parametrize("shape, rank", [("tiny", 8), ("bunny-3b", 64)])
def test_model_of_throughput_has_no_dropout_and_the_papers_lora(shape, rank, tiny, monkeypatch):
    """Dropout would set the schemes apart; cuDNN's attention plans each shape anew. alpha: twice the rank."""
    text, vision = throughput.SHAPES["tiny"]
    dropping = transformers.PhiConfig(**text.to_dict() | {"resid_pdrop": 0.1, "attention_dropout": 0.1})
    monkeypatch.setitem(throughput.SHAPES, shape, (dropping, vision))
    torch.backends.cuda.enable_cudnn_sdp(True)
    model, _ = throughput.make_model(shape, "cpu", torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, train.LoraLinear)}
    assert len(adapted) == 6 and all("language_model" in name for name in adapted)
    assert {(m.scaling["default"], m.lora_A["default"].out_features) for m in adapted.values()} == {(2, rank)}


@pytest.mark.parametrize("name, items", [*zip(throughput.MEMORY, (3, 3, 1))])
def test_memory_is_measured_of_the_scheme_that_is_named(name, items, tiny, timed, monkeypatch):
    """What a user rents a GPU by. The second of two steps is on the longest texts; above the start."""
    texts = ["there is " * 9, "a red " * 9, "blue"], ["there is", "is a", "a"], ["there", "is", "a"]
    drawn = lambda n: [pair(*one, noise(3), noise(4)) for one in texts[:n]]
    monkeypatch.setattr(throughput, "make_pairs", drawn)
    tiny.micro_batch_size, tiny.items, tiny.dtype, given = 1, items, torch.bfloat16, timed([0, 0])
    monkeypatch.setattr(throughput, "memory_now", lambda device, peak=False: 4.0 if peak else 1.5)
    assert throughput.measure_memory(tiny, name) == {"memory_gib": {name: {"before": 1.5, "above": 2.5}}}
    ((model, batches, losses),) = given
    first, heaviest = batches
    n_first, n_heaviest = ((batch.labels >= 0).sum() for batch in (first, heaviest))
    assert n_heaviest > 2 * 18 > 18 > n_first > 6  # y_w of 18 words, twice
    expected = AUTHORS | {"images": 6} if name == "authors" else OURS | {"images": 2}
    check_step(expected | {"checkpointing": name != "ours, no checkpointing"}, model, heaviest, losses)


def test_memory_formula_counts_what_is_alive_at_once():
    """Of float32: 256 numbers are known, 256 + 256 are made, 256 freed, 512 made; a view makes none."""
    ones = lambda n: torch.ones(n, device="meta")
    there = ones(256)
    with throughput.Work() as work:
        there.mul_(2)
        made = there + ones(256)
        shown = made.view(2, 128)
        assert (work.alive, work.peak) == (1024, 2048)
        more = ones(512)
    assert (work.alive, work.peak) == (3072, 3072) and len(shown) == 2 and len(more) == 512


def test_memory_formula_predicts_the_peak_of_a_step(tiny, monkeypatch):
    """Weights in bf16; of the adapter weights, AdamW's two numbers and a gradient, in float32; and, of a
    large vocabulary, mostly logits in float32, their log-softmax and its gradient."""
    shape = throughput.phi(32, 64, 1, 2, 20_000), tiny_bunny.siglip(32, 64, 1, 2, 8, 32)
    monkeypatch.setitem(throughput.SHAPES, "tiny", shape)
    model, processor = throughput.make_model("tiny", "meta", torch.bfloat16, checkpointing=False)
    batch = throughput.packed_batch(throughput.make_pairs(1), processor)
    peak = throughput.count_work(model, batch).peak
    monkeypatch.setattr(throughput, "mdpo_step", lambda *given: torch.zeros(1, 1, requires_grad=True))
    always = throughput.count_work(model, batch).peak
    n_adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_frozen = sum(p.numel() for p in model.parameters()) - n_adapter
    assert always == pytest.approx(2 * n_frozen + 16 * n_adapter, abs=64)
    assert peak - always == pytest.approx(12 * 20_000 * batch.predictors.numel(), rel=0.15)


def test_throughput_command_measures_all_of_the_real_shape_on_a_gpu(tiny, monkeypatch, capsys):
    """Each measurement is a line; memory is of fresh processes. `tiny` tells nothing of a GPU."""
    commands, threads = [], []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command[2:]))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    given = "--device cpu --threads 3 --rounds 1 --items 2 --micro-batch-size 2".split()
    throughput.run(given)
    assert commands == [[*given, "--only", name] for name in throughput.MEMORY]
    records = [*map(json.loads, capsys.readouterr().out.splitlines())]
    shown = {(record["shape"], record["micro_batch_size"], record["device_name"]) for record in records}
    assert shown == {("tiny", 2, "CPU, 3 thread(s)")} and {*threads} == {3}
    assert [record["identical"] for record in records] == [True, False]
    measured = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    note = lambda args, name: (
        measured.append((args.shape, args.dtype, args.micro_batch_size)) or {"note": name}
    )
    monkeypatch.setattr(throughput, "measure_memory", note)
    for flags in "--device cuda", "--device cpu", "--device cuda --shape tiny":
        throughput.run([*flags.split(), "--only", "ours"])
    expected = ("bunny-3b", torch.bfloat16, 4), ("tiny", torch.float32, 4), ("tiny", torch.bfloat16, 4)
    assert measured == [*expected]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: 1 / 0)
    with pytest.raises(BadInput, match="--device cuda: "):
        throughput.run(["--device", "cuda"])
    monkeypatch.undo()
    monkeypatch.setattr(throughput, "__file__", f"{os.devnull}/none")
    with pytest.raises(BadInput, match="memory of ours"):  # whose own process said what was wrong
        throughput.run(given)


def test_memory_formula_prints_peaks_and_hours_of_the_slower_of_card_and_host(tiny, monkeypatch, capsys):
    """Before a GPU is rented. The heaviest of 30,000 examples has a longer y_l. By hand: 1 s of products
    at 0.48 of 990 TFLOP/s, 0.5 s of traffic at 0.8 of 4.8 TB/s; with checkpointing 3.8 s of launches."""
    n_drawn, long = itertools.count(1), {1: 21, 3 * 97: 44}  # a question, counted twice, and the 97th y_l
    monkeypatch.setattr(throughput, "draw_length", lambda rng, mean: long.get(next(n_drawn) % 90_000, 3))
    monkeypatch.setattr(throughput, "packed_batch", lambda pairs, _: len(pairs[0].rejected.split()))

    def count_work(model, longest):
        launches = 100_000 * model.get_base_model().is_gradient_checkpointing
        return SimpleNamespace(flops=475.2e12, traffic=1.92e12, launches=launches, peak=2**30 * longest)

    monkeypatch.setattr(throughput, "count_work", count_work)
    for shape in ("bunny-3b", "llava-7b"):
        monkeypatch.setitem(throughput.SHAPES, shape, throughput.SHAPES["tiny"])
    throughput.run(["--only", "memory-formula"])
    found = [*map(json.loads, capsys.readouterr().out.splitlines())]
    ways = itertools.product(("bunny-3b", "llava-7b"), (False, True), (1, 2, 4, 8, 16, 32))
    names = "shape", "checkpointing", "micro_batch_size", "peak_gib", "device_name", "dtype"
    assert [tuple(map(one.get, names)) for one in found] == [
        (*way, 44.0, "predicted", "bfloat16") for way in ways
    ]
    hours = [one["hours"]["H200"] for one in found]
    assert (hours[0], hours[1], hours[6]) == (12.5, 6.25, 31.67)  # two examples at once; waits for the host


ROWS = [[-100, 1, 2, 3, 0, -100], [-100, 1, 2, 0] + [-100] * 2, [-100, 1, 2, 3, 4, 0], [-100, 0] + [-100] * 4]
OF_4_TOKENS = {"batch": SimpleNamespace(labels=torch.tensor(ROWS))}  # y_w of 4 tokens and 3, y_l of 5 and 1
dpo = lambda beta: {"dpo": softplus(-3 * beta)}
more = lambda beta, delta: {"conditional": 0.2 * softplus(-2 * beta), "anchor": softplus(delta - beta)}


@pytest.mark.parametrize("beta", [{"beta": 0.5}, {}])
@pytest.mark.parametrize("loss, options, expected", [
    (variants.chip_loss, {}, lambda beta: {"joint": softplus(-5 * beta)}),
    (variants.opa_dpo_loss, {}, lambda beta: dpo(beta) | more(beta, 0)),
    (variants.opa_dpo_loss, {"delta": 0.25}, lambda beta: dpo(beta) | more(beta, 0.25)),
    (variants.rpo_loss, OF_4_TOKENS, lambda beta: dpo(beta) | {"sft": 10 / 4}),
    (variants.rpo_loss, OF_4_TOKENS | {"alpha": 2}, lambda beta: dpo(beta) | {"sft": 2 * 10 / 4}),
])  # fmt: skip
def test_losses_of_the_variants_by_hand(loss, options, expected, beta):
    """A wrong sign or weight is another paper's loss. Rewards are 1, -2 and -1 times beta; log pi(y_w | m_w,
    q) is -10, over 4 tokens. The second example is three times as far off: a mean would show."""
    far = LogPs(*(ref + 3 * (policy - ref) for policy, ref in zip(POLICY, REF)))
    policy = LogPs(*(torch.cat(pair).requires_grad_() for pair in zip(POLICY, far)))
    losses, metrics = loss(policy, LogPs(*(ref.repeat(2) for ref in REF)), **beta, **options)
    beta = beta.get("beta", 0.1)
    assert losses.shape == (2,) and losses.requires_grad
    assert losses[0].item() == pytest.approx(sum(expected(beta).values()), abs=1e-6)
    terms = {name[5:]: value[0].item() for name, value in metrics.items() if name.startswith("loss/")}
    assert terms == pytest.approx(expected(beta), abs=1e-6)
    assert metrics["rewards/margins"].tolist() == pytest.approx([3 * beta, 9 * beta])
    assert metrics["rewards/image_margins"].tolist() == pytest.approx([2 * beta, 6 * beta])
    assert not any(value.requires_grad for value in metrics.values())


def test_rpo_needs_no_rejected_image():
    """It is DPO and SFT. A tenth of a nat less is no float32, and must not become one."""
    policy, ref = ([logp.double() - 0.1 for logp in logps[:2]] for logps in (POLICY, REF))
    batch = SimpleNamespace(labels=torch.tensor([[-100, -100, 1, 0, -100], [-100, -100, 1, 2, 0]]))
    losses, metrics = variants.rpo_loss(policy, ref, 0.5, batch=batch)
    assert losses.item() == pytest.approx(softplus(-1.5) + 10.1 / 2, abs=1e-12)
    assert not any("image" in name for name in metrics)


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
    assert variants.mask_patches(image, rng).tobytes() != masked.tobytes()
    image = noise(2, (100, 75))  # no multiple of 24
    changed = ImageChops.difference(image, variants.mask_patches(image, rng)).convert("L").tobytes()
    assert 1 - changed.count(0) / (100 * 75) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("strategy", ["noise", "mask"])
def test_rejected_images_of_the_variants_are_functions_of_image_and_rng(strategy, tmp_path):
    """Resumed runs and workers see them again only then; another epoch and another example see others."""
    pairs, drawn = Pairs(as_examples(tmp_path, 2), strategy), []
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
    """Half a run of one loss and half of another is no run. Of one, the adapter comes out bit for bit."""
    whole, out, log = tmp_path / "whole", tmp_path / "out", train.log
    assert run_command(variants.run, [name, *command(bunny, small, whole)]) == 0
    with monkeypatch.context() as patched:
        stop = lambda *record: log(*record) or os.kill(os.getpid(), signal.SIGTERM)
        patched.setattr(train, "log", stop)
        assert run_command(variants.run, [name, *command(bunny, small, out)]) == 128 + signal.SIGTERM
    capsys.readouterr()
    for other in {*variants.VARIANTS} - {name}:
        assert run_command(variants.run, [other, "--resume", str(out)]) == 2
    assert train.main(["--resume", str(out)]) == 2
    assert capsys.readouterr().err.count("it began with other values of loss") == 3
    assert run_command(variants.run, [name, f"--resume={out}"]) == 0
    assert all(torch.equal(v, adapter(out)[k]) for k, v in adapter(whole).items())
    args, (first, *_) = json.loads((whole / "args.json").read_text()), curves.read_log(whole)
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
    assert run_command(variants.run, ["rpo", "--resume=RUN"]) == 7  # its flags are those that it began with
    begun = ["--reject", "noise", "--reject", "crop"], variants.chip_loss
    assert given == [*begun, ["--resume=RUN"], variants.rpo_loss]
    for flag in ("--no-image", "--no-conditional", "--anchors", "--anchors=none", "--delta", "--demo"):
        assert run_command(variants.run, ["opa-dpo", flag, "none"]) == 2
        assert f"{flag.partition('=')[0]}: opa-dpo has terms of its own" in capsys.readouterr().err
    assert run_command(variants.run, []) == 2
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
    """Images and answers of several sizes; the first image is turned by its EXIF data, the third is wide."""
    one, two = "There is a red circle.", "There is a blue square and a red circle."
    pairs = [
        ((48, 32), "Describe the picture.", one, two),
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


def shown_steps(text):
    """What minimal.py prints -> [[loss, gradient]]."""
    return [[*map(float, step)] for step in re.findall(r"loss ([\d.]+), gradient ([\d.]+)", text)]


def test_minimal_trains_as_train_py_does(base, pairs_file, tmp_path, monkeypatch, capsys):
    """Who retypes it must get mDPO: losses, gradients and adapter of a run show template, end-of-sequence,
    crop, padding, reference, order, schedule and clipping. The base asks for dropout."""
    args = train.parse_args(["--model", "m", "--data", "d"])
    settings = minimal.BETA, minimal.LR, minimal.EPOCHS, minimal.BATCH, minimal.SEED
    assert settings == (args.beta, args.lr, args.epochs, args.batch_size, args.seed)
    monkeypatch.setattr(minimal, "LR", 1e-3)
    monkeypatch.setattr(minimal, "BATCH", 2)
    minimal.main(base, pairs_file, str(tmp_path / "minimal"))
    shown = shown_steps(capsys.readouterr().out)
    flags = "--batch-size 2 --micro-batch-size 1 --lr 1e-3 --workers 0 --device cpu"
    assert train.main(f"{flags} --model {base} --data {pairs_file} --out {tmp_path}/train".split()) == 0
    expected = [[record["loss"], record["grad_norm"]] for record in curves.read_log(tmp_path / "train")]
    assert len(shown) == 9 and shown[-1][0] < 2
    torch.testing.assert_close(shown, expected, atol=2e-5, rtol=2e-4)
    ours = adapter(tmp_path / "minimal")
    torch.testing.assert_close(ours, adapter(tmp_path / "train"), atol=5e-6, rtol=0)
    assert 1e-4 < max(weight.abs().max() for name, weight in ours.items() if "lora_B" in name)
    settings = json.loads((tmp_path / "minimal" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (64, 128)
    transformers.AutoProcessor.from_pretrained(tmp_path / "minimal")


def test_minimal_on_a_gpu_checkpoints_in_bf16(llava, pairs_file, tmp_path, monkeypatch, capsys):
    """The CPU is called "cuda": weights are bf16, the adapter float32, dropout off, and each layer runs three
    times an example: for the reference, for the policy, and again in the backward pass."""
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
