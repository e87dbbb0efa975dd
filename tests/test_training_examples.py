"""The examples about training: families, curves, throughput with predicted memory, other losses, and
minimal.py.

They protect a benchmark that compares like with like, numbers under their right names, losses worked out by
hand, and a minimal program that trains exactly as train.py does."""

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

import data
import train
from data import BadInput, Pairs, make_batch, read_examples, run_command
from examples import curves, evaluate, families, minimal, throughput, variants
from mdpo import LogPs, mdpo_step
from test_mdpo import (
    HUB_LLAVA_TEMPLATE,
    POLICY,
    REF,
    ROOT,
    adapter,
    command,
    log_of,
    noise,
    pair,
    softplus,
    with_lora,
    write,
)
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
    assert float(row[2]) > 0.1 and row[3] == "changed"
    parse_args = train.parse_args
    monkeypatch.setattr(families, "generate_answers", lambda *rest: "as it was")
    assert run_command(families.run, []) == 0 and capfd.readouterr().out.split()[-1] == "same"
    monkeypatch.setattr(train, "parse_args", lambda argv: parse_args([*argv, "--eval-size", "99"]))
    assert run_command(families.run, []) == 2
    assert capfd.readouterr().err == "error: gemma3: --eval-size 99 leaves none of 8 examples to train on\n"


def test_curves_show_every_metric_of_the_readme():
    """A metric without a curve is a metric that nobody looks at. Memory is one number, not a curve."""
    table = README.split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = {name for row in rows for name in re.findall("`(.*?)`", row)}
    assert {*curves.METRICS} == names - {"peak_memory_gib"}


def test_curves_are_drawn_of_a_run_in_progress(tmp_path):
    """A line that is being written is not a broken log; a broken line before it is."""
    path, records = tmp_path / "metrics.jsonl", [{"step": 0, "eval/loss": 2.0}, {"step": 1, "loss": 1.5}]
    whole = "".join(f"{json.dumps(record)}\n" for record in records)
    for text in (whole, whole[:-1], whole + '{"step": 2, "lo'):
        path.write_text(text)
        assert curves.read_log(tmp_path) == records
    for text in ("", '{"st', '{"st\n{"step": 1}\n'):
        path.write_text(text)
        with pytest.raises(BadInput, match="metrics.jsonl: cannot be read"):
            curves.read_log(tmp_path)


def test_curves_of_trl_are_read_under_the_names_of_train_py(tmp_path):
    """TRL calls a held-out loss eval_loss. Its line about the whole run has no metric of a step."""
    names = {"eval_loss": "eval/loss", "eval_rewards/margins": "eval/rewards/margins", "loss": "loss"}
    names |= {
        "learning_rate": "lr",
        "grad_norm": "grad_norm",
        "rewards/chosen": "rewards/chosen",
        "step": "step",
    }
    history = [dict.fromkeys(names, 0.5), {"train_loss": 1.5, "step": 1}]
    write(tmp_path / "trainer_state.json", {"log_history": history})
    records = curves.read_log(tmp_path)
    assert records[0] == dict.fromkeys(names.values(), 0.5)
    assert curves.points(records, "loss") == ([0.5], [0.5])
    write(tmp_path / "trainer_state.json", {"log_history": []})
    with pytest.raises(BadInput, match="trainer_state.json: cannot be read: holds no step yet"):
        curves.read_log(tmp_path)


def test_an_accuracy_before_training_is_no_point():
    """Then no margin is above 0: it looks like a fall. Later an accuracy of 0 is one, and so is a margin of
    0."""
    start, later = ({"step": 9 * m, "eval/margins": m, "eval/accuracies": 0} for m in (0, 1))
    assert curves.points([start, later], "eval/accuracies") == ([9], [0])
    assert curves.points([start, later], "eval/margins") == ([0, 9], [0, 1])


def test_curves_have_a_colour_a_run_and_points_where_held_out(finished, tmp_path):
    """Curves under a wrong name are worse than none. Nobody logged another panel."""
    pytest.importorskip("matplotlib")
    start = {"step": 0, "eval/loss": 2.0}
    first = [start, {"step": 1, "loss": 1.5, "loss/conditional": 0.5, "eval/loss": 1.0}]
    figure = curves.draw({"a": first, "b": [{"step": 3, "loss": 0.5, "lr": 0.1, "eval/rewards/chosen": 0.7}]})
    say = lambda line: f"{line.get_color()} {line.get_marker()} {line.get_xydata().tolist()}"
    drawn = {
        axis.get_title(): [say(line) for line in axis.lines if len(line.get_xdata())] for axis in figure.axes
    }
    assert drawn == {
        "loss": ["C0 None [[1.0, 1.5]]", "C0 o [[0.0, 2.0], [1.0, 1.0]]", "C1 None [[3.0, 0.5]]"],
        "loss/conditional": ["C0 None [[1.0, 0.5]]"],
        "rewards/chosen": ["C1 o [[3.0, 0.7]]"],
        "lr": ["C1 None [[3.0, 0.1]]"],
    }
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "held-out examples"]
    assert [line.get_color() for line in legend.legend_handles] == ["C0", "C1", "k"]
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
    """{name: stepper} of those that are compared, without timing: ours takes half a second a step, others
    two."""
    steppers = {}

    def in_turns(timed, n_batches, rounds):
        steppers.update({stepper.name: stepper for stepper in timed})
        for name, stepper in steppers.items():
            stepper.times = [0.5 if name == "ours" else 2.0]
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


OURS = {"LoRA": {train.LoraLinear}, "activation": "GELUTanh", "checkpointing": True, "images": 4}
OURS |= {"gradient": [False, True], "autocast": {False}, "masks": {"blocks"}}  # the reference has no gradient
AUTHORS = OURS | {"images": 12, "masks": {type(None)}}  # three images an example, encoded twice


def check_step(stepper, **changed):
    """A step has the settings of OURS or AUTHORS but for those that are given, and not a pass or token
    more."""
    batch, ours = next(stepper.batches), stepper.name == "ours"
    n_tokens, n_logits = (len(batch.take), len(batch.answers)) if ours else [batch.labels.numel()] * 2
    expected = (OURS if ours else AUTHORS) | {"tokens": [n_tokens] * 2, "logits": [n_logits] * 2}
    assert ours or len(batch.labels) == 6
    assert what_a_step_does(stepper) == expected | changed


def test_throughput_compares_like_with_like_at_identical_settings(tiny, timed, monkeypatch):
    """Settings called identical are the README's first claim. TRL gets a model of its own: its constructor
    would make the authors' rows go back through the frozen tower, too. Two examples in half a second are 4 a
    second; 30 000 of these take 7500 s."""
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
    for stepper in timed.values():
        check_step(stepper)


def test_throughput_compares_ours_at_its_best_with_the_others_as_released(tiny, timed, monkeypatch):
    """Ours gains --no-checkpointing, theirs peft's layers, Phi's activation and, in bf16, autocast: no
    more."""
    monkeypatch.setattr(throughput, "trl_rival", lambda *arguments: pytest.fail("TRL is run without --trl"))
    tiny.dtype = torch.bfloat16
    result = throughput.compare(tiny, identical=False)
    assert list(timed) == ["ours", "authors"] and "at its best" in result["settings"]
    check_step(timed["ours"], checkpointing=False)
    released = {"LoRA": {peft.tuners.lora.Linear}, "activation": "NewGELUActivation", "autocast": {True}}
    check_step(timed["authors"], **released)


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
    note = lambda parameters, most: norms.append((clip(parameters, most), most))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()

    def losses(model, slope):
        clock.append(2)
        loss = model.weight[0] * slope
        loss.register_hook(lambda gradient: clock.append(5))
        return loss

    make = lambda slope, processor: clock.append(11) or slope
    stepper = throughput.Stepper("", model, None, [1.0, 3.0, 2.0], losses, make)
    assert [stepper.step() for _ in range(3)] == [7, 7, 7]
    assert norms == [(1, 1.0), (3, 1.0), (2, 1.0)] and model.weight.grad is None
    assert model.weight.item() == pytest.approx(-0.0003, abs=1e-7)
    with pytest.raises(StopIteration):  # no batch comes twice
        stepper.step()


@pytest.mark.parametrize("identical", [True, False])
def test_every_step_of_every_scheme_has_pairs_of_its_own(identical, tiny, monkeypatch):
    """Batches that come round again hide what plans or allocates by shape. All schemes see the same: two
    steps before the clock starts, and two rounds of two batches of two examples."""
    drawn = [pair("there is", "a red", "blue", noise(1), noise(2))._replace(id=str(i)) for i in range(40)]
    monkeypatch.setattr(throughput, "make_pairs", lambda n: drawn[:n])
    seen = {}

    def stepper(name, model, processor, groups, *rest):
        left, seen[name] = iter(groups), []
        step = lambda: seen[name].extend(one.id for one in next(left)) or 1.0
        return SimpleNamespace(name=name, times=[], step=step)

    monkeypatch.setattr(throughput, "Stepper", stepper)
    tiny.rounds = 2
    throughput.compare(tiny, identical)
    assert seen == dict.fromkeys(("ours", "authors"), [str(i) for i in range(12)])


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
    """Every measurement is a line of the file. Memory is measured by the same command in fresh processes."""
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


def test_throughput_takes_the_real_shape_on_a_gpu(monkeypatch):
    """There `tiny` is bound by launches, and would say that we are slower."""
    measured = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    note = lambda args, name: measured.append((args.shape, args.dtype))
    monkeypatch.setattr(throughput, "measure_memory", note)
    for flags in "--device cuda", "--device cpu", "--device cuda --shape tiny":
        throughput.run([*flags.split(), "--only", "ours"])
    assert measured == [("bunny-3b", torch.bfloat16), ("tiny", torch.float32), ("tiny", torch.bfloat16)]


def test_memory_formula_prints_peaks_and_hours(tiny, monkeypatch, capsys):
    """Before a GPU is rented. The peak is that of the heaviest of 30,000 examples: one has a longer
    question."""
    count, heaviest, packed = itertools.count(1), [], throughput.packed_batch
    note = lambda pairs, _: heaviest.append(len(pairs[0].question.split())) or packed(pairs[:1], _)
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
    ways = ("0.0", "without"), ("1.0", "with")
    assert found == 2 * [(str(n), *way) for way in ways for n in (1, 2, 4, 8, 16, 32)]


ROWS = [[-100, 1, 2, 3, 0, -100], [-100, 1, 2, 0] + [-100] * 2, [-100, 1, 2, 3, 4, 0], [-100, 0] + [-100] * 4]
OF_4_TOKENS = {
    "batch": SimpleNamespace(labels=torch.tensor(ROWS))
}  # y_w of two examples has 4 and 3, y_l 5 and 1
dpo = lambda beta: {"dpo": softplus(-3 * beta)}
opa = lambda beta, delta=0: (
    dpo(beta) | {"conditional": 0.2 * softplus(-2 * beta), "anchor": softplus(delta - beta)}
)


@pytest.mark.parametrize("beta", [{"beta": 0.5}, {}])
@pytest.mark.parametrize("loss, options, expected", [
    (variants.chip_loss, {}, lambda beta: {"joint": softplus(-5 * beta)}),
    (variants.opa_dpo_loss, {}, opa),
    (variants.opa_dpo_loss, {"delta": 0.25}, lambda beta: opa(beta, 0.25)),
    (variants.rpo_loss, OF_4_TOKENS, lambda beta: dpo(beta) | {"sft": 10 / 4}),
    (variants.rpo_loss, OF_4_TOKENS | {"alpha": 2}, lambda beta: dpo(beta) | {"sft": 2 * 10 / 4}),
])  # fmt: skip
def test_losses_of_the_variants_by_hand(loss, options, expected, beta):
    """A wrong sign or weight trains something that the paper is not about. Beta is mDPO's 0.1 by default.
    Rewards are 1, -2 and -1 times beta, the margins 3 and 2. log pi(y_w | m_w, q) is -10, over 4 tokens. The
    second example is three times as far from the reference, so that a mean over the batch would show."""
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
    """What minimal.py prints -> [[loss, gradient]]."""
    return [[*map(float, step)] for step in re.findall(r"loss ([\d.]+), gradient ([\d.]+)", text)]


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
    expected = [[record["loss"], record["grad_norm"]] for record in log_of(tmp_path / "train")]
    assert len(shown) == 9 and shown[-1][0] < 2
    torch.testing.assert_close(shown, expected, atol=2e-5, rtol=2e-4)
    ours = adapter(tmp_path / "minimal")
    torch.testing.assert_close(ours, adapter(tmp_path / "train"), atol=5e-6, rtol=0)
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
