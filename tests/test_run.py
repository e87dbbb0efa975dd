"""A run on machines unlike ours, and its files: whoever opens them, and whatever they are called."""

import contextlib
import gc
import hashlib
import json
import locale
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import data
import mdpo
import train
from data import BadInput, Pairs, make_batch, read_examples
from examples import shapes
from mdpo import mdpo_loss, pack, response_logps
from test_mdpo import (
    MESSAGES,
    NO_PROMPT,
    PAIRS,
    ROOT,
    adapter,
    authors,
    command,
    fork,
    goes_on_exactly,
    log_of,
    start,
    write,
)
from tests.helpers import (
    ARGUMENTS,
    PLAIN,
    VLFEEDBACK,
    check_file,
    child,
    completion,
    counted,
    killed,
    one_line_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_adapter_reloads_with_plain_peft(finished, bunny):
    """Users load it with PeftModel.from_pretrained; a key that does not match would be left out in silence."""
    model, processor = train.load_model(str(bunny))
    before = response_logps(model, make_batch(PAIRS, processor)).chosen
    tuned = peft.PeftModel.from_pretrained(model, finished)
    after = response_logps(tuned, make_batch(PAIRS, processor)).chosen
    assert (after - before).abs().min() > 1e-4
    by_hand = train.add_lora(train.load_model(str(bunny))[0], rank=4, alpha=8)
    saved = torch.load(finished / "checkpoint.pt", weights_only=True)["adapter"]
    peft.set_peft_model_state_dict(by_hand, saved)
    torch.testing.assert_close(after, response_logps(by_hand, make_batch(PAIRS, processor)).chosen)


def test_saved_processor_reloads(finished, bunny):
    """The folder alone must be enough to ask the tuned model a question. With torchvision the library takes another image
    processor unless it is told not to."""
    saved, original = transformers.AutoProcessor.from_pretrained(finished), train.load_processor(str(bunny))
    saved.image_processor = transformers.AutoImageProcessor.from_pretrained(finished, backend="pil")
    ours, theirs = (make_batch(PAIRS, processor).inputs for processor in (saved, original))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batch_size_does_not_change_the_update(finished, bunny, small, tmp_path, micro_batch_size):
    """The gradient is the mean over the batch, the last partial one too (3 of 4: micro-batches of 2 and 1), not a mean
    of micro-batch means, which would weigh the single example twice."""
    out = tmp_path / "out"
    assert train.main(command(bunny, small, out, "--micro-batch-size", micro_batch_size)) == 0
    for ours, theirs in zip(log_of(out), log_of(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_plain_layout_trains_the_same(finished, bunny, small, tmp_path):
    """--layout plain is the yardstick a user can switch to."""
    assert train.main(command(bunny, small, tmp_path / "out", "--layout", "plain")) == 0
    assert json.loads((tmp_path / "out" / "args.json").read_text())["layout"] == "plain"
    for ours, theirs in zip(log_of(tmp_path / "out"), log_of(finished), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("number", [1, 2, 12])
def test_resume_after_sigkill_inside_the_writing_of_a_checkpoint_is_exact(
    six_epochs, tmp_path, monkeypatch, number
):
    """The worst moment: the file is half there. --save-every is 1, so that checkpoint 1 is step 1's."""
    cut, calls = tmp_path / "cut", []

    def die_at(save):
        def save_half(state, path):
            calls.append(path)
            save(state, path)
            if len(calls) == number:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return save_half

    killed(monkeypatch, six_epochs[0](cut), torch, "save", die_at)
    assert [record["step"] for record in log_of(cut)] == list(range(number + 1))
    goes_on_exactly(six_epochs, cut)


@pytest.mark.parametrize("step", [0, 1, 2, 12])
@pytest.mark.parametrize(
    "file", ["checkpoint.pt", "adapter_model.safetensors", "adapter_config.json", "README.md"]
)
def test_resume_after_sigkill_between_two_renames_is_exact(six_epochs, tmp_path, monkeypatch, file, step):
    """Of a checkpoint's files some are new then, and some are old or not there. The kill comes before the
    rename of `file` in the checkpoint of `step`; 0 is the same in the first one, but after the rename."""
    cut, calls = tmp_path / "cut", []

    def die_at(rename):
        def rename_or_die(source, target):
            calls.append(Path(target).name)
            if step == 0 and calls[-1] == file:
                rename(source, target)
            if calls.count(file) == max(step, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        return rename_or_die

    killed(monkeypatch, six_epochs[0](cut), os, "replace", die_at)
    goes_on_exactly(six_epochs, cut)
    assert not [*cut.glob("*.tmp")]


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0(six_epochs, tmp_path, monkeypatch):
    """Its arguments are all that it needs. The log holds steps by then, which come again."""
    cut = tmp_path / "cut"

    def die_at(save):
        return lambda *args: os.kill(os.getpid(), signal.SIGKILL)

    killed(monkeypatch, six_epochs[0](cut), train, "save_checkpoint", die_at)
    assert [record["step"] for record in log_of(cut)] == [0, 1] and not (cut / "checkpoint.pt").exists()
    goes_on_exactly(six_epochs, cut)


def stopped_at(step, monkeypatch, arguments, number=signal.SIGTERM):
    """Run train.main and send it a signal once it has logged `step` -> exit status."""
    log = train.log

    def stop(out, records, record):
        log(out, records, record)
        if record["step"] == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(train, "log", stop)
        return train.main(arguments)


def test_a_run_killed_before_its_first_checkpoint_names_its_data(bunny, small, tmp_path, monkeypatch):
    """It begins anew, so other data would be as good; but its args.json must not name data that it never
    saw."""
    shutil.copytree(Path(small).parent, tmp_path / "data")
    mine, out = tmp_path / "data" / "silkie.json", tmp_path / "out"

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "save_checkpoint", die)
        assert train.main(command(bunny, mine, out)) == 130
    records = json.loads(mine.read_text())
    write(mine, [records[0] | {"chosen": "Something else."}, *records[1:]])
    status = train.main(["--resume", str(out)])
    sha256 = hashlib.sha256(mine.read_bytes()).hexdigest()
    assert status == 2 or json.loads((out / "args.json").read_text())["data_files"] == sha256


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@SIGNALS
def test_a_signal_saves_before_leaving(finished, bunny, small, tmp_path, monkeypatch, capsys, number):
    """Ctrl-C, a cluster's preemption or a terminal that closes must not cost an epoch. What a kill left of a
    line in the log is not read."""
    out, before = tmp_path / "out", signal.getsignal(number)
    assert stopped_at(3, monkeypatch, command(bunny, small, out), number) == 128 + number
    assert f"python train.py --resume {out}" in capsys.readouterr().out and signal.getsignal(number) == before
    assert [record["step"] for record in log_of(out)] == [1, 2, 3]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["records"] == log_of(out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    steps = counted(monkeypatch, train, "mdpo_step")
    assert train.main(["--resume", str(out)]) == 0
    assert len(steps) == 2  # the micro-batches of step 4 alone
    assert [record["step"] for record in log_of(out)] == [1, 2, 3, 4]
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def test_a_signal_between_saving_and_leaving_loses_nothing(bunny, small, tmp_path, monkeypatch):
    """It may come at any time: a run that leaves at once, for a signal that it had not seen when it could have
    saved, loses all steps since the last checkpoint, and says that it saved them."""

    class Late(list):  # a signal comes as soon as it was read
        def __iter__(self):
            seen = self[:]
            self.append(signal.SIGTERM)
            return iter(seen)

    monkeypatch.setattr(train, "stop_signals", lambda: contextlib.nullcontext(Late()))
    assert train.main(command(bunny, small, tmp_path / "out")) == 128 + signal.SIGTERM
    assert [record["step"] for record in log_of(tmp_path / "out")] == [1, 2]
    records = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["records"]
    assert records == log_of(tmp_path / "out")


@SIGNALS
def test_a_signal_to_the_whole_group_saves_too(finished, bunny, small, tmp_path, monkeypatch, number):
    """Terminals, schedulers and `timeout` signal every process of a run: workers must not die before the step
    is saved."""
    log, out = train.log, tmp_path / "out"

    def stop(out, records, record):
        log(out, records, record)
        if record["step"] == 2:
            os.killpg(0, number)

    def run():
        os.setpgrp()
        return train.main(command(bunny, small, out, "--workers", 2))

    with monkeypatch.context() as patched:
        patched.setattr(train, "log", stop)
        process = fork(run)
        process.join(timeout=60)
    assert process.exitcode == 128 + number and [record["step"] for record in log_of(out)] == [1, 2]
    assert train.main(["--resume", str(out)]) == 0
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def test_a_second_signal_stops_at_once(finished, bunny, small, tmp_path, monkeypatch):
    """Who presses Ctrl-C twice does not wait for a step, nor for workers that are deaf to it. What was saved
    before is whole."""
    step, out = train.mdpo_step, tmp_path / "out"

    def stop(*args, **options):
        if (out / "checkpoint.pt").exists():  # so in step 3
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGINT)
            (tmp_path / "not at once").touch()
        return step(*args, **options)

    def run():
        os.setpgrp()
        return train.main(command(bunny, small, out, "--workers", 2))

    with monkeypatch.context() as patched:
        patched.setattr(train, "mdpo_step", stop)
        process = fork(run)
        process.join(timeout=60)
    assert process.exitcode == 130 and not (tmp_path / "not at once").exists()
    assert train.main(["--resume", str(out)]) == 0
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def test_under_nohup_a_terminal_that_closes_stops_nothing(finished, bunny, small, tmp_path, monkeypatch):
    """nohup asks for SIGHUP to be ignored: a run that listens to it all the same ends with the ssh
    session."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stopped_at(2, monkeypatch, command(bunny, small, tmp_path / "out"), signal.SIGHUP) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(tmp_path / "out").items())


def test_help_shows_every_default(capsys):
    """A 0 is a value as others are; what has none is left without."""
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    parts = [" ".join(part.split()) for part in re.split(r"\n  --", capsys.readouterr().out)]
    for name, (default, kind, _) in ARGUMENTS.items():
        (part,) = [part for part in parts if part.startswith(f"{name} ")]
        shown = kind is not bool and default not in (None, [])
        assert (f"(default: {default})" in part) == shown, name


def test_arguments_cannot_be_abbreviated(bunny, small, capsys):
    """`--resum RUN` would start another run, or none, without a word."""
    assert train.main(["--resum", "x", "--model", str(bunny), "--data", small]) == 2
    assert "unrecognized arguments: --resum x" in capsys.readouterr().err


def test_each_epoch_ends_in_a_checkpoint(bunny, small, tmp_path, monkeypatch):
    """Without --save-every a power cut costs an epoch at most."""
    log, out = train.log, tmp_path / "out"

    def power_cut(out, records, record):
        if record["step"] == 3:
            raise KeyboardInterrupt
        log(out, records, record)

    monkeypatch.setattr(train, "log", power_cut)
    assert train.main(command(bunny, small, out)) == 130
    assert [r["step"] for r in torch.load(out / "checkpoint.pt", weights_only=True)["records"]] == [1, 2]


def test_a_run_that_ended_ends_in_a_checkpoint(finished, tmp_path, monkeypatch):
    """Resumed, it must neither train again nor change."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr(train, "mdpo_step", lambda *args, **options: pytest.fail("trained again"))
    assert train.main(["--resume", str(tmp_path / "copy")]) == 0
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(tmp_path / "copy").items())
    assert log_of(tmp_path / "copy") == log_of(finished)


def test_a_run_goes_on_with_its_own_data_only(bunny, small, tmp_path, monkeypatch, capsys):
    """Half of the steps on other data is a run that nobody asked for."""
    records = json.loads(Path(small).read_text())
    shutil.copytree(Path(small).parent, tmp_path / "data")
    mine, out = tmp_path / "data" / "silkie.json", tmp_path / "out"
    assert stopped_at(1, monkeypatch, command(bunny, mine, out)) == 128 + signal.SIGTERM
    write(mine, [records[0] | {"chosen": "Something else."}, *records[1:]])
    assert train.main(["--resume", str(out)]) == 2
    assert "the run began with other values of data files\n" in capsys.readouterr().err
    assert train.main(["--resume", str(out), "--data", small]) == 0  # the same data, elsewhere


def test_a_run_goes_on_with_its_own_arguments(finished, bunny, small, tmp_path, monkeypatch, capsys):
    """Everything comes from the run's folder. What would train something else is refused, all of it at once; what changes
    only speed is taken."""
    out = tmp_path / "out"
    assert stopped_at(2, monkeypatch, command(bunny, small, out)) == 128 + signal.SIGTERM
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert train.main(["--resume", str(out), "--lr", "1", "--seed", "1", "--anchors", "none"]) == 2
    assert "the run began with other values of anchors, lr, seed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    moved = out.rename(tmp_path / "moved")
    same = [
        "--betas",
        "0.9",
        "0.98",
        "--crop",
        "0.01",
        "0.2",
        "--anchors",
        "chosen",
    ]  # the defaults, said aloud
    assert train.main(["--resume", str(moved), "--micro-batch-size", "4", "--model", str(bunny), *same]) == 0
    assert all(torch.allclose(v, adapter(finished)[k], atol=1e-5) for k, v in adapter(moved).items())
    assert not out.exists()


def test_a_run_goes_on_from_any_folder(bunny, small, tmp_path, monkeypatch):
    """Its files were named from where it began. Looked for elsewhere, a model would be asked of the hub."""
    (tmp_path / "here").mkdir()
    shutil.copytree(bunny, tmp_path / "here" / "model")
    shutil.copytree(Path(small).parent, tmp_path / "here" / "data")
    monkeypatch.chdir(tmp_path / "here")
    arguments = command("model", "data/silkie.json", tmp_path / "out", "--eval-data", "data/silkie.json")
    assert stopped_at(1, monkeypatch, arguments) == 128 + signal.SIGTERM
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", "out"]) == 0


def test_fewer_examples_are_another_run(bunny, small, tmp_path, monkeypatch, capsys):
    """With --skip-bad an image that is gone drops its record: every later step would see other examples."""
    shutil.copytree(Path(small).parent, tmp_path / "data")
    mine, out = tmp_path / "data" / "silkie.json", tmp_path / "out"
    assert stopped_at(1, monkeypatch, command(bunny, mine, out, "--skip-bad")) == 128 + signal.SIGTERM
    next((tmp_path / "data" / "images").iterdir()).unlink()
    assert train.main(["--resume", str(out)]) == 2
    assert "the run began with other values of examples" in capsys.readouterr().err


def test_other_examples_of_the_same_number_are_another_run(bunny, small, tmp_path, monkeypatch, capsys):
    """With --limit, a record that --skip-bad drops makes room for another one in the sample."""
    shutil.copytree(Path(small).parent, tmp_path / "data")
    mine, out = tmp_path / "data" / "silkie.json", tmp_path / "out"
    arguments = command(bunny, mine, out, "--skip-bad", "--limit", 6)
    assert stopped_at(1, monkeypatch, arguments) == 128 + signal.SIGTERM
    drawn = sorted(random.Random(0).sample(range(7), 6))
    gone = json.loads(mine.read_text())[drawn[0]]["img_path"]
    (mine.parent / gone).unlink()
    assert train.main(["--resume", str(out)]) == 2
    assert "the run began with other values of examples" in capsys.readouterr().err


def test_a_checkpoint_runs_no_code(finished, tmp_path, capsys):
    """A run's folder can come from anybody. Unpickled, it could do anything."""

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    shutil.copytree(finished, copy := tmp_path / "copy")
    state = torch.load(copy / "checkpoint.pt", weights_only=True)
    torch.save(state | {"code": Code()}, copy / "checkpoint.pt")
    assert str(copy) in one_line_of(capsys, train.main(["--resume", str(copy)]))
    assert not (tmp_path / "ran").exists()


def test_all_groups_of_parameters_are_clipped_as_one():
    """Half of the parameters would take steps of any size, unnoticed.

    The loss is 3 a + 4 b, so that the gradient is (3, 4), of norm 5; clipped to 1 it is (0.6, 0.8), which
    plain gradient descent with a rate of 1 subtracts from (0, 0).
    """
    a, b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    losses = (3 * a + 4 * b)[None]
    objective = lambda batch: (losses, {"loss": losses.detach()})
    args = SimpleNamespace(epochs=1, max_grad_norm=1.0)
    batches = iter([SimpleNamespace(ids=["1"])])
    (record,) = train.train(objective, [[[(0, 0)]]], batches, optimizer, schedule, args)
    assert record["grad_norm"] == pytest.approx(5)
    assert (a.item(), b.item()) == pytest.approx((-0.6, -0.8), rel=1e-5)


def test_standard_error_that_breaks_off_ends_no_run(bunny, small, tmp_path, monkeypatch):
    """`2>&1 | tee log`, and tee is gone: the steps would be lost for want of a progress bar."""
    said = []

    def gone(*text):
        said.append(text)
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=gone, flush=gone, isatty=lambda: True))
    assert train.main(command(bunny, small, tmp_path / "out")) == 0
    assert said and (tmp_path / "out" / "processor_config.json").exists()
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it under 2>&-
    assert train.main(command(bunny, small, tmp_path / "closed")) == 0


def test_an_out_that_is_a_file_is_refused_before_the_data_are_read(bunny, tmp_path, capsys):
    """Checking data and loading weights takes minutes."""
    (tmp_path / "file").write_text("mine")
    line = one_line_of(capsys, train.main(command(bunny, tmp_path / "none.json", tmp_path / "file")))
    assert "already exists" in line and (tmp_path / "file").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_no_bug_here(capsys):
    """Whose disk is full need not report it to us."""

    def full(argv):
        raise OSError(28, "No space left on device")

    assert data.run_command(full, []) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_a_signal_with_workers_leaves_no_child(bunny, small, tmp_path, monkeypatch):
    """Workers are deaf to signals: one that is left would keep Python from its exit for ever."""
    arguments = command(bunny, small, tmp_path / "out", "--workers", 2)
    assert stopped_at(1, monkeypatch, arguments) == 128 + signal.SIGTERM
    assert not multiprocessing.active_children()


def test_held_out_data_that_moved_are_the_same(bunny, small, tmp_path, monkeypatch, capsys):
    """Their contents count, as the training data's do, and not where the file lies now."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(Path(small).parent, moved)
    assert (
        stopped_at(2, monkeypatch, command(bunny, small, out, "--eval-data", small)) == 128 + signal.SIGTERM
    )
    (moved / "one.json").write_text(json.dumps(json.loads(Path(small).read_text())[:1]))
    assert (
        train.main(["--resume", str(out), "--eval-data", str(moved / "one.json"), "--images", str(moved)])
        == 2
    )
    assert "the run began with other values of data files" in capsys.readouterr().err
    flags = ["--eval-data", str(moved / Path(small).name), "--data", str(moved / Path(small).name)]
    assert train.main(["--resume", str(out), *flags]) == 0


def test_the_table_at_the_end_is_the_logs(bunny, small, tmp_path, capsys):
    """Before and after are what a user quotes: exchanged, or of training steps, they say something else."""
    assert train.main(command(bunny, small, tmp_path / "held", "--eval-size", 2)) == 0
    first, *_, last = [record for record in log_of(tmp_path / "held") if "eval/loss" in record]
    assert first["step"] == 0 and last["step"] == 4
    *_, line = re.findall(r"^  loss +(\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert line == (f"{first['eval/loss']:.4f}", f"{last['eval/loss']:.4f}")


@pytest.mark.parametrize("flag, calls", [((), 2), (("--no-checkpointing",), 1)])
def test_activations_are_recomputed_unless_told_otherwise(bunny, small, tmp_path, monkeypatch, flag, calls):
    """Without checkpointing a real model does not fit; with it against the user's wish a run is a quarter slower.
    One epoch is 4 micro-batches of 2 layers: each runs for the policy, and to be recomputed. A frozen tower in
    training mode would take a batch's own statistics where it has batch norm: other features than in the check."""
    mlps = transformers.models.phi.modeling_phi.PhiMLP, transformers.models.siglip.modeling_siglip.SiglipMLP
    seen = {mlp: [] for mlp in mlps}
    for mlp in mlps:
        note = lambda self, x, forward=mlp.forward: (
            seen[type(self)].append((torch.is_grad_enabled(), self.training)) or forward(self, x)
        )
        monkeypatch.setattr(mlp, "forward", note)
    assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1, *flag)) == 0
    language, vision = seen.values()
    assert sum(grad for grad, _ in language) == 4 * 2 * calls
    assert vision and not any(training for _, training in vision)


def test_held_out_examples_are_never_trained_on_and_keep_their_image(bunny, small, tmp_path, monkeypatch):
    """Otherwise the before/after table measures memory, or luck of the crop."""
    seen = {}
    get = Pairs.__getitem__

    def noted(self, key):
        one = get(self, key)
        if isinstance(key, tuple):  # else the layout is tried on it
            seen.setdefault((key, one.id), []).append(one)
        return one

    monkeypatch.setattr(Pairs, "__getitem__", noted)
    out = tmp_path / "out"
    assert (
        train.main(command(bunny, small, out, "--eval-size", 2, "--no-conditional", "--anchors", "none")) == 0
    )
    held_out = {id for (epoch, _), id in seen if epoch == "held out"}
    trained = {id for (epoch, _), id in seen if epoch != "held out"}
    assert len(held_out) == 2 and len(trained) == 5 and not held_out & trained
    for (key, _), items in seen.items():
        if key[0] == "held out":
            assert len(items) == 3 and len({one.images_rejected[0].tobytes() for one in items}) == 1
    before = log_of(out)[0]  # a DPO run reports the image metrics of the held-out examples too
    assert (
        before["step"] == 0
        and before["eval/loss"] == pytest.approx(math.log(2))
        and "eval/rewards/image_margins" in before
    )
    assert "rewards/image_margins" not in log_of(out)[1]


def test_no_image_run_needs_no_images(bunny, tmp_path):
    """Fig. 1's DPO (No Image)."""
    path = write(
        tmp_path / "x.json", [authors(img_path="nowhere.png", chosen=f"A cat {i}.") for i in range(5)]
    )
    assert train.main(command(bunny, path, tmp_path / "out", "--no-image", "--eval-size", 1)) == 0
    assert log_of(tmp_path / "out")[1]["loss"] == pytest.approx(math.log(2))


def test_images_elsewhere_and_bad_records_on_the_command_line(bunny, small, tmp_path, capsys):
    """A flag that is parsed and not handed on: the images beside the file would be looked for, or the run would stop."""
    good = json.loads(Path(small).read_text())[:3]
    mine, images = write(tmp_path / "mine.json", [*good, good[0] | {"chosen": ""}]), Path(small).parent
    assert train.main(command(bunny, mine, tmp_path / "out", "--images", images)) == 2
    assert "record 4" in capsys.readouterr().err
    assert (
        train.main(command(bunny, mine, tmp_path / "out", "--images", images, "--skip-bad", "--epochs", 1))
        == 0
    )
    assert "1 bad record" in capsys.readouterr().out and len(log_of(tmp_path / "out")) == 1


def test_without_out_each_run_gets_its_own_folder(bunny, small, tmp_path, monkeypatch):
    """The user's own command must run twice, and lose nothing."""
    monkeypatch.chdir(tmp_path)
    arguments = command(bunny, small, "x", "--epochs", 1)
    arguments = arguments[:4] + arguments[6:]  # no --out
    assert train.main(arguments) == train.main(arguments) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["bunny-silkie-1", "bunny-silkie-2"]


def test_a_run_is_never_replaced(bunny, small, tmp_path, capsys):
    """Nothing that the user made is lost: a folder that is there is left as it is, to the byte."""
    out = tmp_path / "out"
    assert train.main(command(bunny, small, out)) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert train.main(command(bunny, small, out, "--seed", 1)) == 2
    assert f"already exists; choose another --out, or --resume {out}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def broken_model(bunny, folder, change):
    folder.mkdir()
    for path in bunny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / "model-00002-of-00002.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def text_model(bunny, folder):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=500)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bunny, trust_remote_code=False).save_pretrained(folder)
    return folder


NO_GPU = "Found no NVIDIA driver" if torch.version.cuda else "Torch not compiled with CUDA"
BAD_INPUTS = {  # what the message must say: (arguments, given bunny and tmp_path)
    "nowhere: cannot be loaded": lambda b, t: ["--model", t / "nowhere"],
    "its processor has no image token": lambda b, t: ["--model", text_model(b, t / "text")],
    "1 weights are missing, such as lm_head.weight": lambda b, t: [
        "--model", broken_model(b, t / "m", lambda w: w.pop("lm_head.weight"))],
    "1 weights are unexpected, such as model.surprise": lambda b, t: [
        "--model", broken_model(b, t / "m", lambda w: w.update({"model.surprise": torch.zeros(1)}))],
    "none.json: no such file": lambda b, t: ["--data", t / "none.json"],
    "no example is left": lambda b, t: ["--data", write(t / "x.json", [])],
    "no example is left with an id in 'llava'": lambda b, t: ["--subset", "llava"],
    "not valid JSON": lambda b, t: ["--data", write(t / "x.json", "[{]")],
    "is one JSON object with the fields a": lambda b, t: ["--data", write(t / "x.json", '{\n"a": 1}')],
    "cannot be read: 'utf-8' codec can't decode byte": lambda b, t: ["--data", ROOT / Path(b) / "model-00001-of-00002.safetensors"],
    "no such image folder": lambda b, t: ["--images", t / "none"],
    "--beta: must be within 1e-12 to 1000000.0, got 0": lambda b, t: ["--beta", 0],
    "--beta: must be within 1e-12 to 1000000.0, got -0.1": lambda b, t: ["--beta", -0.1],
    "--beta: must be within 1e-12 to 1000000.0, got inf": lambda b, t: ["--beta", "inf"],
    "--lr: must be within 1e-12 to 1000000.0, got nan": lambda b, t: ["--lr", "nan"],
    "--delta: must be within -1000000.0 to 1000000.0, got -inf": lambda b, t: ["--delta=-inf"],
    "--delta: expected one argument": lambda b, t: ["--delta", "-1e-3"],
    "--weight-decay: must be within 0 to 1, got -1e-3": lambda b, t: ["--weight-decay=-1e-3"],
    "--warmup: must be within 0 to 1, got 1.5": lambda b, t: ["--warmup", 1.5],
    "--betas: must be within 0 to 0.999999, got 1": lambda b, t: ["--betas", 0.9, 1],
    "--epochs: must be within 1 to 1000, got 0": lambda b, t: ["--epochs", 0],
    "--eval-size: must be within 0 to 9223372036854775807, got -1": lambda b, t: ["--eval-size", -1],
    "--seed: must be within 0 to 9223372036854775807, got -1": lambda b, t: ["--seed", -1],
    "--crop: must be within 0 to 1, got -1": lambda b, t: ["--crop", -1, 0.2],
    "--crop: its minimum is above its maximum": lambda b, t: ["--crop", 0.5, 0.2],
    "--crop does nothing with another --reject": lambda b, t: ["--crop", 0.2, 0.5, "--reject", "moco"],
    "--anchors none cannot be combined": lambda b, t: ["--anchors", "none", "chosen"],
    "--no-image leaves": lambda b, t: ["--no-image", "--anchors", "image_rejected"],
    "invalid choice": lambda b, t: ["--anchors", "cropped"],
    "invalid int value": lambda b, t: ["--epochs", "many"],
    "unrecognized arguments: --bata": lambda b, t: ["--bata", 1],
    "leaves none of 7": lambda b, t: ["--eval-size", 7],
    "no room for a response": lambda b, t: ["--max-length", 20],
    "already exists; choose another --out": lambda b, t: ["--out", b],
    "cannot be written to": lambda b, t: ["--out", write(t / "file", "") + "/out"],
    f"cannot be loaded: {NO_GPU}": lambda b, t: ["--device", "cuda"],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_one_line_and_status_2(bunny, small, tmp_path, capsys, message):
    """A traceback tells a user nothing; and what failed must leave nothing behind."""
    if NO_GPU in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments = command(bunny, small, tmp_path / "out", *BAD_INPUTS[message](bunny, tmp_path))
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    lines = [line for line in error.splitlines() if line.strip() and "it/s]" not in line]  # bars
    assert lines[-1 if "bad record" not in error else 0].startswith("error: ") and "Traceback" not in error
    assert len(lines) == 1 or "bad record" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput):
        train.main([*arguments, "--debug"])


@pytest.mark.parametrize("wrong", ["the loss is nan", "the gradient is nan"])
def test_nan_stops_the_run_and_names_the_batch(bunny, small, tmp_path, capsys, monkeypatch, wrong):
    """Training on after a NaN ruins the adapter in silence. The slope of a square root at 0 is infinite, its value is not."""

    def broken(policy_logps, *rest, batch, **options):
        losses, metrics = mdpo_loss(policy_logps, *rest, **options)
        more = math.nan if wrong == "the loss is nan" else (0 * policy_logps[0]).sqrt()
        return losses + more, metrics

    assert train.main(command(bunny, small, tmp_path / "out"), loss=broken) == 2
    error = capsys.readouterr().err
    ids = re.search(r"not finite; examples: (.*)", error)[1].split(", ")
    assert "step 1" in error and len(ids) == 4 and set(ids) <= {str(i) for i in range(1, 8)}


def test_out_of_gpu_memory_names_the_flag(bunny, small, tmp_path, capsys, monkeypatch):
    """The first thing a user meets on a small GPU."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "mdpo_step", full)
    assert train.main(command(bunny, small, tmp_path / "out")) == 2
    assert "out of GPU memory; what saves some: a lower --micro-batch-size" in capsys.readouterr().err
    assert data.run_command(full, []) == 2  # another command: it has no micro-batches
    assert capsys.readouterr().err == "error: out of GPU memory; what saves some: --device cpu\n"


def test_an_image_that_vanishes_is_named_from_a_worker(bunny, tmp_path, capsys, monkeypatch):
    """An error inside a DataLoader worker arrives as a page of traceback; the user needs its last line."""
    path = shapes.write_pairs(tmp_path / "data", 4)
    load = train.load_model
    monkeypatch.setattr(train, "load_model", lambda *a: (tmp_path / "data/images/2.png").unlink() or load(*a))
    assert train.main(command(bunny, path, tmp_path / "out", "--workers", 1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a process that loads data: image") and "2.png cannot be decoded" in error


def test_nothing_ever_asks_a_question(bunny, small, tmp_path):
    """With standard input open, a library that asks whether to run remote code would wait for ever."""
    process = child(
        "train.py", *command(bunny, small, tmp_path / "out", "--epochs", 1), stdin=subprocess.PIPE
    )
    assert process.wait(timeout=120) == 0, process.stderr.read()


HOSTILE = [None, True, 0, -1, 10**400, 1.5, math.nan, math.inf, "", " ", "x", "\ud800", "\x1b[2J\n\t", "..", "/", "<image>",
           "a" * 5000, [], [[]], {}, {"a": 1}, [None], [{"role": "user"}], [{"role": "user", "content": 3}],
           [{"role": "system", "content": []}], {"path": None}, {"type": "image"}]  # fmt: skip


def mutated(value, rng):
    """The value with one of its parts, at any depth, replaced, left out, doubled or nested."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice([*copy] if isinstance(copy, dict) else range(len(copy)))
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = mutated(copy[key], rng)
        return copy
    return rng.choice([*HOSTILE, [value], [value, value], {"a": value}, str(value)[:-1]])


def test_no_record_is_a_traceback(folder, bunny, capsys):
    """600 records of every format, each with a part of another type, missing, ragged or hostile: each is read, left out
    or named on one line; none hides the good one, and none takes long."""
    rng, good, started = random.Random(0), authors(id="good"), time.monotonic()
    for _ in range(100):
        kinds = [authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT]
        records = [good, *(mutated(record, rng) for record in kinds)]
        path = write(folder / "x.json", records)
        said = []
        examples = read_examples(path, skip_bad=True, log=said.append)
        assert "good" in [example.id for example in examples]
        assert all(line.isprintable() and len(line) < 3000 for text in said for line in text.split("\n  "))
        capsys.readouterr()
    assert time.monotonic() - started < 30


def test_patterns_and_depths_that_explode_are_read_in_no_time(folder, capsys):
    """A citation that never ends, a template within templates, brackets within brackets: quadratic time or a deep stack."""
    started = time.monotonic()
    rating = lambda text: VLFEEDBACK | {"completions": [completion(text, "5"), completion("B", "1")]}
    for record in (
        rating("【†" * 100_000 + "x"),
        authors(prompt="USER: " * 100_000 + "x"),
        authors(prompt="<image>" * 50_000),
    ):
        check_file([write(folder / "x.json", [record])])
    capsys.readouterr()
    (folder / "x.json").write_text("[" * 100_000)
    one_line_of(capsys, check_file([str(folder / "x.json")]))
    assert time.monotonic() - started < 10


def test_images_that_are_no_photographs_are_bad_records(folder, monkeypatch):
    """Padded to a square, 1 x 20000 pixels are 400 million; a bomb of a few bytes decodes to gigabytes."""
    for size in ((1, 51), (5001, 100), (10_001, 10_000)):
        Image.new("1", size).save(folder / "a.png")
        with pytest.raises(BadInput, match=f"{size[0]} x {size[1]} pixels: sides differ"):
            read_examples(write(folder / "x.json", [authors()]))
    Image.new("1", (50, 1)).save(folder / "a.png")
    assert len(read_examples(write(folder / "x.json", [authors()]))) == 1


def test_a_text_about_cuda_is_no_fault_of_the_machine(folder):
    """A file of that name that is missing would hide all other problems, and --skip-bad would not drop it."""
    path = write(folder / "x.json", [authors(), authors(img_path="CUDA.png"), authors(chosen="")])
    with pytest.raises(BadInput, match="would drop 2 bad records"):
        read_examples(path)


def test_the_mask_has_the_models_dtype(bunny, monkeypatch):
    """Of another one, each layer would convert it, and CUDA's kernels refuse it."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    seen, blocks = [], mdpo.attention_blocks
    monkeypatch.setattr(mdpo, "attention_blocks", lambda *args: seen.append(args) or blocks(*args))
    mdpo.forward_inputs(model, pack(make_batch(PAIRS[:1], processor)))
    assert seen[0][1:] == (torch.device("cpu"), torch.bfloat16)


def test_float32_pixels_reach_a_bf16_model_in_its_dtype(bunny):
    """Processors give float32. Some vision towers round them, others (Aria's, Llama 4's) stop with an error."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    seen, features = [], model.get_image_features
    spy = lambda pixel_values: seen.append(pixel_values.dtype) or features(pixel_values)
    model.get_image_features = spy
    mdpo.forward_inputs(model, make_batch(PAIRS[:1], processor))
    assert seen == [torch.bfloat16]


def test_the_float32_mode_computes_in_float32_and_leaves_the_weights():
    """1 + 2 ** -10 is not in bf16. What is written into a tensor made inside must be there afterwards."""
    weight, near_1 = torch.ones(2, dtype=torch.bfloat16), 1 + 2**-10
    with train.InFloat32():
        total = weight + 2**-10
        made = torch.zeros(2, dtype=torch.bfloat16)
        made[0] = near_1
        by_name = F.layer_norm(torch.tensor([1.0, -1.0]), (2,), weight=weight, eps=0.0)
    assert total.tolist() == [near_1] * 2 and made.tolist() == [near_1, 0]
    assert by_name.tolist() == [1, -1] and weight.dtype == torch.bfloat16


def test_what_is_our_own_fault_says_so(capsys):
    """A user who is told that the file is bad looks for the mistake in the wrong place."""

    def broken(argv):
        raise RuntimeError("two\nlines \x1b[2J")

    assert data.run_command(broken, []) == 1
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1 and err.startswith("error: internal error, please report") and "\x1b" not in err
    )
    with pytest.raises(RuntimeError):
        data.run_command(broken, ["--debug"])


@pytest.mark.parametrize("seed", range(40))
def test_no_model_folder_is_a_traceback(bunny, llava, tmp_path, capsys, seed):
    """A field of one of its JSON files changed or gone, a template broken, a file cut short: an interrupted download, a
    hand-edited config. It loads all the same, or one line names the folder."""
    rng = random.Random(seed)
    folder = tmp_path / "model"
    shutil.copytree(rng.choice([bunny, llava]), folder)
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    if path.suffix == ".json" and path.name != "tokenizer.json" and rng.random() < 0.8:
        write(path, mutated(json.loads(path.read_text()), rng))
    elif rng.random() < 0.3:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    started, status = time.monotonic(), data.run_command(lambda argv: start(folder), [])
    if status:
        assert str(folder) in one_line_of(capsys, status)
    assert time.monotonic() - started < 10


TEMPLATES = ["{{", "{% for %}", "{{ messages.x.y }}", "{{ 1 / 0 }}", "{% for m in messages %}{{ m.content.x() }}{% endfor %}", "",
             "{{ raise_exception('no') }}", "{{ messages[5].content }}", "{{ 'a' + 1 }}"]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_broken_chat_template_is_the_models_fault_not_each_records(
    llava, small, tmp_path, capsys, template
):
    """Reported record by record, it would send the user through thousands of good ones."""
    folder = tmp_path / "model"
    shutil.copytree(llava, folder)
    (folder / "chat_template.jinja").write_text(template)
    line = one_line_of(capsys, train.main(command(folder, small, tmp_path / "out")))
    assert str(folder) in line and "record" not in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(6))
def test_no_argument_is_a_traceback(capsys, seed):
    """Every flag with values that are no numbers, no choices, too many, too large: one line before anything is loaded."""
    rng, values = (
        random.Random(seed),
        ["", "x", "-1", "nan", "inf", "-inf", "1e400", "9" * 30, "0x10", "1_0", "--", "é\x07", "0"],
    )
    for _ in range(60):
        flag = rng.choice([*ARGUMENTS])
        words = [f"--{flag}", *rng.choices(values, k=rng.choice([1, 1, 2, 3]))]
        status = data.run_command(
            lambda argv: train.parse_args(argv) and 0, ["--model", "m", "--data", "d", *words]
        )
        if status:
            one_line_of(capsys, status)
        capsys.readouterr()


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edited(path, change):
    record = json.loads(path.read_text())
    change(record)
    write(path, record)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def arguments_changed(**values):
    return lambda folder: edited(folder / "args.json", lambda args: args.update(values))


def checkpoint_changed(**values):
    def change(folder):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(state | {"run": state["run"] | values}, folder / "checkpoint.pt")

    return change


def checkpoint_is_a_folder(folder):
    (folder / "checkpoint.pt").unlink()
    (folder / "checkpoint.pt").mkdir()


DAMAGES = {  # what the line must say
    "args.json": lambda f: (f / "args.json").unlink(),
    "not valid JSON": lambda f: (f / "args.json").write_text('{"model": '),
    "cannot be resumed: is not in a known form": lambda f: (f / "args.json").write_text("[]"),
    "has no 'lr'": lambda f: edited(f / "args.json", lambda args: args.pop("lr")),
    "must be within 1e-12": arguments_changed(lr="nan"),
    "other values of seed": arguments_changed(seed=7),
    "other values of reject, lr, seed": arguments_changed(reject="moco", lr=1.0, seed=7),
    "other values of lora rank": arguments_changed(lora_rank=1),
    "other values of data files": checkpoint_changed(data_files="0" * 64),
    "other values of loss": checkpoint_changed(loss="mine"),
    "other values of base weights": checkpoint_changed(base_weights="0" * 64),
    "other values of examples": checkpoint_changed(examples=[8, 0]),
    "other values of beta, data files, loss": checkpoint_changed(data_files="0" * 64, loss="mine", beta=0.2),
    "checkpoint.pt: cannot be resumed from: is damaged": lambda f: flipped(f / "checkpoint.pt"),
    "checkpoint.pt: cannot be resumed from: File is not": lambda f: os.truncate(f / "checkpoint.pt", 1000),
    "checkpoint.pt: cannot be resumed from: File is": lambda f: (f / "checkpoint.pt").write_bytes(b""),
    "checkpoint.pt: cannot be resumed from: [Errno 2]": lambda f: dangling(f / "checkpoint.pt"),
    "checkpoint.pt: cannot be resumed from: [Errno 21]": checkpoint_is_a_folder,
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_run_is_refused_and_left_as_it_is(finished, tmp_path, capsys, message):
    """Half of a run on other arguments, data or weights is a result that nobody can explain."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    DAMAGES[message](copy)
    before = bytes_of(copy)
    line = one_line_of(capsys, train.main(["--resume", str(copy)]))
    assert message in line and str(copy) in line and bytes_of(copy) == before


def test_a_log_that_is_broken_is_written_again(finished, tmp_path):
    """It is read by people and by curves; a run that goes on must not stumble over it."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    (copy / "metrics.jsonl").write_bytes(b"\xff\x00{")
    assert train.main(["--resume", str(copy)]) == 0 and log_of(copy) == log_of(finished)


def test_a_checkpoint_of_another_run_is_refused(finished, bunny, small, tmp_path, capsys):
    """A run of another seed has the same shapes: its weights would be trained on in silence."""
    assert train.main(command(bunny, small, tmp_path / "out", "--seed", 1, "--epochs", 1)) == 0
    shutil.copytree(finished, copy := tmp_path / "copy")
    shutil.copy(tmp_path / "out" / "checkpoint.pt", copy)
    line = one_line_of(capsys, train.main(["--resume", str(copy)]))
    assert "the run began with other values of epochs, seed" in line


def test_resume_refuses_flags_that_would_change_the_result(finished, tmp_path, capsys):
    """All at once, so that nobody mends one and waits for the next."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    flags = "--seed 5 --lr 1 --out x --workers 1".split()
    line = one_line_of(capsys, train.main(["--resume", str(copy), *flags]))
    assert line.endswith("the run began with other values of lr, seed, out")
    assert train.main(["--resume", str(copy), "--workers", "1", "--save-every", "2"]) == 0


@pytest.mark.parametrize("when", ["the main process waits for it", "it is ahead"])
def test_a_worker_that_dies_is_one_line(finished, bunny, small, tmp_path, capsys, monkeypatch, when):
    """The kernel kills the largest process when memory is short. The run says so and ends, and the steps that
    it had done are not lost: they are saved where the main process waits for the next batch, and have been
    saved by --save-every wherever else it is, such as in the middle of a step."""
    item, log, out = Pairs.__getitem__, train.log, tmp_path / "out"
    last = train.plan_steps(7, 4, 2, 2, seed=0)[2][0][0]  # of step 3

    def die(self, key):
        if key == last and len(self.examples) > 1:
            while when != "it is ahead" and not (tmp_path / "step 2 is done").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, key)

    def note(folder, records, record):
        log(folder, records, record)
        if record["step"] == 2:
            (tmp_path / "step 2 is done").touch()

    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", die)
        patched.setattr(train, "log", note)
        started, more = time.monotonic(), ["--save-every", 1] if when == "it is ahead" else []
        status = train.main(command(bunny, small, out, "--workers", 1, *more))
    line = one_line_of(capsys, status)
    assert "DataLoader worker" in line and "--workers 0" in line and time.monotonic() - started < 60
    no_child_is_left()
    if when != "it is ahead":
        assert [r["step"] for r in torch.load(out / "checkpoint.pt", weights_only=True)["records"]] == [1, 2]
    assert train.main(["--resume", str(out)]) == 0 and [record["step"] for record in log_of(out)] == [
        1,
        2,
        3,
        4,
    ]
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def no_child_is_left():
    """Python waits for its children at its exit; workers are deaf to the signals that it sends to them."""
    gc.collect()  # torch ends the workers of a loader that is gone
    children = multiprocessing.active_children()
    for process in children:
        process.kill()
    assert not children


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_the_steps_before_an_image_that_vanishes_are_saved(
    finished, bunny, small, tmp_path, capsys, monkeypatch, workers, failing
):
    """Storage that is gone for a moment must not cost an epoch: the steps done are whole, and once the image
    is back, the run goes on from there, to the same adapter. Step 2 is cut off in its second micro-batch."""
    plan = train.plan_steps(7, 4, 2, 2, seed=0)
    lost, out, item = plan[failing - 1][-1][-1], tmp_path / "out", Pairs.__getitem__

    def get(self, key):
        if key == lost and len(self.examples) > 1 and not preview:
            raise BadInput("image gone.png cannot be decoded")
        return item(self, key)

    def layout_is_tried(*args):
        preview.clear()
        return choose(*args)

    preview, choose = [1], train.choose_layout  # the first examples are also read to try the layout
    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", get)
        patched.setattr(train, "choose_layout", layout_is_tried)
        status = train.main(command(bunny, small, out, "--workers", workers))
    assert "gone.png cannot be decoded" in one_line_of(capsys, status)
    no_child_is_left()
    assert [record["step"] for record in log_of(out)] == list(range(1, failing))
    assert (out / "checkpoint.pt").exists() == (failing > 1)
    steps = counted(monkeypatch, train, "mdpo_step")
    assert train.main(["--resume", str(out)]) == 0
    assert len(steps) == 2 * (5 - failing) and [record["step"] for record in log_of(out)] == [1, 2, 3, 4]
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_held_out_image_that_vanishes_loses_no_step_and_repeats_none(
    bunny, small, tmp_path, capsys, monkeypatch, epoch
):
    """It is missed at the end of an epoch, when the weights have moved and the step is not yet in the log. A
    checkpoint of moved weights and an old log would take that step twice."""
    arguments = command(bunny, small, tmp_path / "out", "--eval-size", 2)
    assert train.main(command(bunny, small, tmp_path / "whole", "--eval-size", 2)) == 0
    item, asked = Pairs.__getitem__, []

    def get(self, key):
        asked.append(key)
        if asked.count(("held out", 0)) == epoch + 1:  # the first time is before training
            raise BadInput("image gone.png cannot be decoded")
        return item(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", get)
        assert "gone.png cannot be decoded" in one_line_of(capsys, train.main(arguments))
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    ours, whole = adapter(tmp_path / "out"), adapter(tmp_path / "whole")
    assert all(torch.equal(v, whole[k]) for k, v in ours.items())
    steps = [[record["step"] for record in log_of(tmp_path / name)] for name in ("out", "whole")]
    assert steps[0] == steps[1] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what", ["the disk is full", "the folder vanishes", "the log is a folder"])
def test_a_disk_that_fails_is_one_line_and_the_checkpoint_stays_whole(
    bunny, small, tmp_path, capsys, monkeypatch, what
):
    """The last checkpoint is all that is left of hours. RLIMIT_FSIZE stands for a full disk."""
    log, out = train.log, tmp_path / "out"

    def break_down(folder, records, record):
        if record["step"] == 3 and what == "the folder vanishes":
            shutil.rmtree(folder)
        if record["step"] == 3 and what == "the log is a folder":
            (folder / "metrics.jsonl").unlink()
            (folder / "metrics.jsonl").mkdir()
        if record["step"] == 3 and what == "the disk is full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        log(folder, records, record)

    with monkeypatch.context() as patched:
        patched.setattr(train, "log", break_down)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            status = train.main(command(bunny, small, out, "--save-every", 1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(out) in one_line_of(capsys, status)
    if what == "the disk is full":
        assert train.main(["--resume", str(out)]) == 0 and [record["step"] for record in log_of(out)] == [
            1,
            2,
            3,
            4,
        ]


def test_weights_that_became_infinite_are_not_saved(bunny, small, tmp_path, capsys, monkeypatch):
    """The loss of the last step is finite; its update is looked at by nobody else."""
    step, out = torch.optim.AdamW.step, tmp_path / "out"

    def overflow(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    status = train.main(command(bunny, small, out, "--epochs", 1, "--batch-size", 8))
    assert (
        "made a weight infinite" in one_line_of(capsys, status)
        and not (out / "adapter_model.safetensors").exists()
    )


def test_a_pipe_that_closes_is_no_traceback(folder):
    """`python data.py FILE | head -1` is how people look at a long report."""
    script = f"{sys.executable} {ROOT / 'data.py'} {write(folder / 'x.json', [authors()])} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""


def test_long_texts_are_cut_where_they_are_shown(folder):
    """An id of a megabyte would fill the terminal, and hide the reason."""
    with pytest.raises(BadInput) as raised:
        read_examples(write(folder / "x.json", [authors(id="x" * 10**6, chosen="")]))
    assert len(str(raised.value)) < 1000 and str(raised.value).endswith("'chosen' is empty")


def test_resume_notices_other_weights(finished, bunny, tmp_path, capsys):
    """The same names and shapes, but other numbers: the second half of the run would have another reference. The same
    numbers in another dtype are the same model."""
    model = lambda change: str(broken_model(bunny, tmp_path / change.__name__, change))
    shutil.copytree(finished, copy := tmp_path / "copy")
    trained = lambda weights: weights["lm_head.weight"].mul_(1.1)
    same = lambda weights: weights.update({name: weight.float() for name, weight in weights.items()})
    trained.__name__, same.__name__ = "trained", "same"
    assert train.main(["--resume", str(copy), "--model", model(same)]) == 0
    line = one_line_of(capsys, train.main(["--resume", str(copy), "--model", model(trained)]))
    assert line.endswith("the run began with other values of base weights")


def test_an_image_that_vanishes_leaves_no_worker_behind(tmp_path):
    """Workers are deaf to the group's signals, and Python waits for them at its exit: the command would never end."""
    path = Path(shapes.write_pairs(tmp_path / "data", 4))
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import contextlib, os, pathlib, signal, torch, train
load, start, workers = train.load_model, torch.multiprocessing.Process.start, []
train.load_model = lambda *a: pathlib.Path({str(path.parent / "images/2.png")!r}).unlink() or load(*a)
torch.multiprocessing.Process.start = lambda worker: start(worker) or workers.append(worker.pid)
status = train.main("--model {ROOT}/examples/base --data {path} --out {tmp_path}/out --workers 1".split())
for pid in workers:  # gone, or dying because it was killed; one that was left behind dies of this signal
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
        status += os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_status == signal.SIGUSR1
assert workers
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "2.png cannot be decoded" in done.stderr.splitlines()[-1]


def test_eval_data_are_held_out_as_well(bunny, tmp_path, monkeypatch):
    """A file of one's own, with random images of its own: training must neither see it nor change by it."""
    data_file, more = shapes.write_pairs(tmp_path / "data", 8, 0), shapes.write_pairs(tmp_path / "more", 3, 1)
    arguments = lambda out: command(bunny, data_file, tmp_path / out, "--epochs", 1, "--reject", "random")
    seen, init = [], Pairs.__init__

    def noted(self, examples, *args, **options):
        init(self, examples, *args, **options)
        seen.append(self)

    monkeypatch.setattr(Pairs, "__init__", noted)
    assert train.main(arguments("with") + ["--eval-data", str(more)]) == 0
    held_out = [pairs for pairs in seen if len(pairs) == 3]
    assert (
        len(held_out) == 1
        and len(held_out[0].pool) == 8 + 3
        and [len(p.pool) for p in seen if len(p) == 8] == [8]
    )
    assert train.main(arguments("without")) == 0
    assert (
        log_of(tmp_path / "with")[0]["step"] == 0
        and "eval/rewards/image_margins" in log_of(tmp_path / "with")[0]
    )
    assert all(
        torch.equal(v, adapter(tmp_path / "without")[k]) for k, v in adapter(tmp_path / "with").items()
    )


def test_a_stopped_run_can_be_looked_at(bunny, small, tmp_path, monkeypatch):
    """The adapter of the last checkpoint is there, and is that checkpoint's."""
    out = tmp_path / "out"
    assert stopped_at(1, monkeypatch, command(bunny, small, out)) == 128 + signal.SIGTERM
    model, processor = train.load_model(str(bunny))
    tuned = peft.PeftModel.from_pretrained(model, out)
    assert not any(path.suffix == ".tmp" for path in out.iterdir())
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["records"] == log_of(out)
    assert all(torch.equal(v, adapter(out)[k]) for k, v in state["adapter"].items())
    assert tuned.peft_config["default"].r == 4


def test_the_model_card_says_what_was_trained_on_what_and_how(bunny, small, tmp_path):
    """peft's blank template tells the finder of the folder nothing."""
    out = tmp_path / "out"
    assert train.main(command(bunny, small, out, "--eval-size", 2, "--beta", 0.25)) == 0
    card, last = (out / "README.md").read_text(), log_of(out)[-1]
    front, text = card.split("---\n")[1:]
    assert (
        front == "library_name: peft\ntags: [mdpo, lora]\n"
    )  # a path of this machine is no model of the hub
    assert "silkie.json: 4 steps" in text and '"beta": 0.25' in text and f"{last['eval/loss']:.4f}" in text


def test_the_model_card_is_yaml_whatever_the_names():
    """A quote or a colon in a name would end the value that the hub reads."""
    args = train.parse_args(["--model", 'a/b: "c"', "--data", "x.json"])
    front = train.model_card(args, [{"step": 1, "epoch": 1.0}]).split("---\n")[1]
    assert front.splitlines()[0] == r'base_model: "a/b: \"c\""' and len(front.splitlines()) == 3


def test_phases_are_said_as_they_begin(bunny, small, tmp_path):
    """Written to a file, a run at real size said nothing for 13 minutes."""
    script = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
import train
train.load_model = lambda *args: os._exit(7)
train.main({[str(word) for word in command(bunny, small, tmp_path / "out")]!r})
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.run(
            [sys.executable, "-c", script], stdout=log, stderr=subprocess.DEVNULL, env=environment
        )
    assert run.returncode == 7
    first, *counts, last = (tmp_path / "log").read_text().splitlines()
    assert (first, last) == (f"reading and checking {small}", f"loading {bunny}")
    assert counts[0].startswith(f"{small}: 7 examples with 7 different images")


def test_a_notebooks_output_will_do(folder, monkeypatch):
    """In one, standard output is no file, and has no encoding to set."""
    path = write(folder / "x.json", [authors()])
    monkeypatch.setattr(sys, "stdout", output := SimpleNamespace(write=lambda text: None, flush=lambda: None))
    assert check_file([path]) == 0 and sys.stdout is output


def test_a_folder_with_files_of_ones_own_is_refused(bunny, small, tmp_path, capsys):
    """They would stand among the run's, and some would be replaced. A file that is hidden is a file, too."""
    for name in ("poetry.lock", "mine.tmp", ".env"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        line = one_line_of(capsys, train.main(command(bunny, small, tmp_path / name)))
        assert "already exists" in line and bytes_of(tmp_path / name) == {name: b"mine"}


def test_closed_output_is_no_traceback(folder):
    """Schedulers start commands with their output closed."""
    script = f"{sys.executable} {ROOT / 'data.py'} {write(folder / 'x.json', [authors()])} >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_run_without_its_checkpoint_is_refused(finished, tmp_path, capsys):
    """It would begin anew, and replace the adapter that is there."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    (copy / "checkpoint.pt").unlink()
    before = bytes_of(copy)
    assert "checkpoint.pt: cannot be resumed from" in one_line_of(capsys, train.main(["--resume", str(copy)]))
    assert bytes_of(copy) == before


def test_folders_of_new_files_are_merged(tmp_path):
    """Processors with several chat templates save them in a folder: a run that ended could not be resumed."""
    for text in ("old", "new"):
        with train.replacing(tmp_path) as new:
            (new / "more").mkdir()
            (new / "more" / "template.jinja").write_text(text)
        (tmp_path / "more" / "mine").touch()
    found = {path.name: path.read_text() for path in (tmp_path / "more").iterdir()}
    assert found == {"template.jinja": "new", "mine": ""}


def test_half_a_file_of_a_kill_replaces_nothing(finished, tmp_path):
    """What was being written stays in a folder; moved over the good files at the next save, it would destroy
    them. Left for ever, it would take the room of an optimizer's state."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    (copy / "new.a1.tmp").mkdir()
    (copy / "new.a1.tmp" / "adapter_model.safetensors").write_bytes(b"half")
    assert train.main(["--resume", str(copy)]) == 0 and not [*copy.glob("*.tmp")]
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(copy).items())


def test_an_empty_folder_is_taken(finished, bunny, small, tmp_path):
    """Job scripts make the folder of their output first."""
    (out := tmp_path / "out").mkdir()
    assert train.main(command(bunny, small, out)) == 0
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def test_ones_own_empty_folder_stays(bunny, tmp_path, capsys):
    """Nothing that the user made is removed; what the run made and did not use is."""
    (mine := tmp_path / "mine").mkdir()
    for out in (mine, tmp_path / "new"):
        one_line_of(capsys, train.main(command(bunny, tmp_path / "none.json", out)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not [*mine.iterdir()]


def test_the_command_that_goes_on_is_quoted(bunny, small, tmp_path, monkeypatch, capsys):
    """Copied from the terminal, a folder with a space would be two arguments."""
    assert (
        stopped_at(
            1,
            monkeypatch,
            [
                *command(bunny, small, "x")[:4],
                "--out",
                str(tmp_path / "my run"),
                "--workers",
                "0",
                "--lora-rank",
                "4",
            ],
        )
        == 128 + signal.SIGTERM
    )
    assert f"--resume '{tmp_path / 'my run'}'" in capsys.readouterr().out


def test_a_broken_bunny_is_the_models_fault(bunny, small, tmp_path, capsys):
    """Its processor is made here, of sizes in its config: reported record by record, good data would be searched."""
    shutil.copytree(bunny, folder := tmp_path / "model")
    edited(
        folder / "config.json", lambda config: config.update(mm_vision_tower="google/siglip-so400m-patch0-32")
    )
    line = one_line_of(capsys, train.main(command(folder, small, tmp_path / "out")))
    assert str(folder) in line and "record" not in line


def test_the_layout_check_of_long_answers_takes_no_longer(bunny):
    """It runs whole answers through the model, in float32 on a CPU; one of a book would take hours. Cut to a
    thousand letters, so to as many tokens at most, behind a prompt of less than a hundred."""
    model, processor = train.load_model(str(bunny))
    widths = []
    model.get_input_embeddings().register_forward_hook(lambda *args: widths.append(args[2].shape[:2].numel()))
    long = PAIRS[0]._replace(chosen="a red circle " * 5000, rejected="no. " * 5000)
    assert train.choose_layout(model, processor, [long, PAIRS[1]]) == "packed"
    assert widths and max(widths) <= 6 * 1100


def test_cudnn_attention_and_rounded_float32_are_off(bunny):
    """It plans anew for each shape, at tens of milliseconds, and shapes never repeat here. And float32 may be
    rounded on CUDA, in convolutions by default: the check of the layout would take that for a mistake."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    train.load_model(str(bunny))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_the_mask_is_laid_out_as_cudas_kernels_want_it():
    """Rows that begin at multiples of 16 numbers, in the model's dtype: else each layer converts and copies it. What a
    token may see is added as 0, all else as -inf."""
    rows = [(7, 0, 5), (3, 0, 5), (17, 0, 5)]
    first, (n, owner, prefix, mask), (*_, other) = mdpo.attention_blocks(rows, None, torch.bfloat16)
    assert first == (7, 0, 5, None)  # its own prefix: causal, without a mask
    assert (n, owner, prefix, mask.shape, mask.dtype) == (3, 0, 5, (1, 1, 3, 8), torch.bfloat16)
    assert mask.stride()[2] == 16 and other.stride()[2] == 32 and mask.stride()[3] == 1
    assert torch.equal(
        mask[0, 0] == 0, torch.tensor([[True] * (6 + i) + [False] * (2 - i) for i in range(3)])
    )
    assert (mask[mask != 0] == -math.inf).all()


def test_workers_that_are_spawned_train_the_same(bunny, small, finished, tmp_path, monkeypatch):  # noqa: F811
    """Windows and macOS start a worker anew: what it is given has to be pickled."""
    loader = train.DataLoader
    spawned = lambda *args, **options: loader(*args, **options, multiprocessing_context="spawn")
    monkeypatch.setattr(train, "DataLoader", spawned)
    assert train.main([*command(bunny, small, tmp_path / "out"), "--workers", "1"]) == 0
    assert [r["loss"] for r in log_of(tmp_path / "out")] == [r["loss"] for r in log_of(finished)]


@pytest.mark.skipif(os.name != "posix", reason="modes are Unix's")
def test_files_have_the_modes_of_the_umask(bunny, small, tmp_path):  # noqa: F811
    """Weights for their writer alone cannot be read by the group's server."""
    out = tmp_path / "out"
    assert train.main([*command(bunny, small, out), "--epochs", "1", "--keep-epochs"]) == 0
    for path in [path for path in out.rglob("*") if path.is_file()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~train.UMASK, path


def test_each_epochs_adapter_is_kept(bunny, small, tmp_path):  # noqa: F811
    """The last epoch is not always the best one."""
    out = tmp_path / "out"
    assert train.main([*command(bunny, small, out), "--keep-epochs"]) == 0
    assert sorted(path.name for path in out.glob("epoch-*")) == ["epoch-1", "epoch-2"]
    first, last = adapter(out / "epoch-1"), adapter(out / "epoch-2")
    assert all((last[name] == values).all() for name, values in adapter(out).items())
    assert any((first[name] != values).any() for name, values in last.items())
    assert "2 steps." in (out / "epoch-1" / "README.md").read_text()


def test_held_out_metrics_are_shown_after_each_epoch(bunny, small, tmp_path, capsys):  # noqa: F811
    """A run that goes wrong is seen in its first epoch, not at its end."""
    out = tmp_path / "out"
    assert train.main([*command(bunny, small, out), "--eval-size", "2"]) == 0
    printed = capsys.readouterr().out
    for epoch, record in enumerate([r for r in log_of(out) if "eval/loss" in r and r["step"]], 1):
        shown = printed.partition(f"epoch {epoch}, held-out examples")[2]
        before, now = re.search(r"^  loss +(\S+) +(\S+)$", shown, re.M).groups()
        assert [before, now] == [f"{r['eval/loss']:.4f}" for r in (log_of(out)[0], record)]


def test_two_runs_at_once_take_two_folders(tmp_path, monkeypatch):
    """Both would write into one, and neither could be resumed."""
    monkeypatch.chdir(tmp_path)
    assert [train.new_folder("runs/x") for _ in range(3)] == ["runs/x-1", "runs/x-2", "runs/x-3"]


@pytest.mark.parametrize("name", ["out\n---\nlicense: mit", "\x1b[31mred", "\udcff"])
def test_odd_file_names_are_refused_first(bunny, small, tmp_path, capsys, name):  # noqa: F811
    """They would set a terminal's colours or a model card's fields; weights cannot be saved under bytes that are no
    text, and it trained before it found out."""
    argv = [*command(bunny, small, tmp_path / "out"), "--out", str(tmp_path / name)]
    line = one_line_of(capsys, train.main(argv))
    assert line.startswith("error: argument --out: has control characters, or bytes that are no text")


def test_many_steps_are_planned_at_once():
    """Adding lists to a list anew took 12 seconds for 60,000 steps."""
    started = time.process_time()
    assert len(train.plan_steps(640_000, 32, 4, 3, 0)) == 60_000
    assert time.process_time() - started < 10  # CPU time; 1 second here


def test_new_files_are_made_beside_those_they_replace(tmp_path, monkeypatch):
    """The system's folder may be full, or another disk, from which nothing can be renamed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    with train.replacing(tmp_path) as new:
        (new / "a").write_text("new")
    assert (tmp_path / "a").read_text() == "new"


def test_the_model_card_is_utf8_in_any_locale(bunny, small, tmp_path):  # noqa: F811
    """The hub reads nothing else. In a bare container the locale's encoding is ASCII: names become codes."""
    shutil.copytree(Path(small).parent, tmp_path / "data")
    data = Path(tmp_path / "data" / Path(small).name).rename(tmp_path / "data" / "kätzchen.json")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        assert train.main(command(bunny, data, tmp_path / "out", "--epochs", 1)) == 0
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert "kätzchen.json".encode() in (tmp_path / "out" / "README.md").read_bytes()


def test_what_is_only_evaluated_keeps_no_graph(bunny, small, tmp_path):  # noqa: F811
    """Its activations would take the memory of a training step, and more. Of 7 examples 2 are held out: one
    micro-batch before training and one after it. The 5 others are steps of 2 + 2 and 1."""
    graphs = []

    def loss(policy_logps, ref_logps, batch, **options):
        graphs.append(policy_logps[0].requires_grad)
        return mdpo_loss(policy_logps, ref_logps, **options)

    argv = command(bunny, small, tmp_path / "out", "--epochs", 1, "--eval-size", 2)
    assert train.main(argv, loss) == 0
    assert graphs == [False, True, True, True, False]


def test_speed_is_in_examples_and_memory_in_gib(bunny, small, tmp_path, monkeypatch):  # noqa: F811
    """Counted in micro-batches, --micro-batch-size 1 would seem fastest. By this clock a micro-batch takes 2
    seconds: steps of 2 + 2 and 2 + 1 examples take 4. The device says that 3 * 1024^3 bytes were in use."""
    now = [0.0]
    clock = lambda: now[0]

    def loss(policy_logps, ref_logps, batch, **options):
        now[0] += 2
        return mdpo_loss(policy_logps, ref_logps, **options)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock, monotonic=clock, time=clock))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *args, **kwargs: 3 * 1024**3)
    assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1), loss) == 0
    records = log_of(tmp_path / "out")
    assert [record["examples_per_second"] for record in records] == [4 / 4, 3 / 4]
    assert [record["peak_memory_gib"] for record in records] == [3, 3]


def test_the_log_counts_parts_of_epochs(finished):  # noqa: F811
    """Rounded, curves would have steps in place of lines, and each step would end an epoch."""
    assert [record["epoch"] for record in log_of(finished)] == [0.5, 1, 1.5, 2]


# Each flag of train.py that decides the result, with a value that the run `finished` did not have.
DECIDING = [
    *("--subset llava", "--limit 5", "--eval-size 1", "--skip-bad", "--no-image", "--max-pixels 999"),
    *("--max-length 99", "--reject moco", "--crop 0.2 0.5", "--beta 0.2", "--delta 0.1", "--no-conditional"),
    *("--anchors none", "--epochs 4", "--batch-size 2", "--lr 1e-4", "--warmup 0.2", "--betas 0.8 0.9"),
    *("--weight-decay 0.1", "--max-grad-norm 2", "--lora-rank 8", "--lora-alpha 4", "--seed 1"),
]


def test_every_flag_that_decides_the_result_is_the_runs_own(finished):  # noqa: F811
    """Changed in the middle of a run, the result would be one of neither value."""
    names = [flag.split()[0].removeprefix("--") for flag in DECIDING]
    assert {*names} == {*train.METHOD}  # a new flag needs a line here
    for name, flag in zip(names, DECIDING):
        with pytest.raises(BadInput, match=f"began with other values of {name.replace('-', ' ')}$"):
            train.parse_args(["--resume", str(finished), *flag.split()])


def test_a_run_has_its_own_rejected_images(bunny, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    """With --skip-bad a record goes when its rejected image is gone, and --limit puts another in its place:
    as many examples, but others. Seed 0 draws 6 of the 7 records, among them the second, which has one."""
    data, out = tmp_path / "data" / Path(small).name, tmp_path / "out"
    shutil.copytree(Path(small).parent, data.parent)
    records = json.loads(data.read_text())
    own = shutil.copy(next(data.parent.joinpath("images").iterdir()), data.parent / "own.png")
    data.write_text(json.dumps([records[0], records[1] | {"rejected_image": "own.png"}, *records[2:]]))
    argv = command(bunny, data, out, "--skip-bad", "--limit", 6)
    assert stopped_at(1, monkeypatch, argv) == 128 + signal.SIGTERM
    assert "1 examples have their own rejected images" in capsys.readouterr().out
    own.unlink()
    assert "began with other values of examples" in one_line_of(capsys, train.main(["--resume", str(out)]))


def test_workers_hear_no_signal_to_stop(bunny, small, finished, tmp_path):  # noqa: F811
    """Schedulers signal every process of a run, each when they like. A worker that dies of it takes the
    batches along that the main process needs to end its step."""
    signalled = []

    def loss(policy_logps, ref_logps, batch, **options):
        for worker in multiprocessing.active_children():
            signalled.append(worker)
            for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
                os.kill(worker.pid, number)
        return mdpo_loss(policy_logps, ref_logps, **options)

    assert train.main(command(bunny, small, tmp_path / "out", "--workers", 1), loss) == 0
    assert signalled
    assert all(
        (adapter(finished)[name] == weight).all() for name, weight in adapter(tmp_path / "out").items()
    )


def test_signals_are_heard_as_before_once_training_ended(bunny, small, tmp_path):  # noqa: F811
    """Whoever calls `main` in a program of his own has handlers of his own."""
    mine = lambda *args: None
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, mine) for number in numbers}
    try:
        assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1)) == 0
        assert {signal.getsignal(number) for number in numbers} == {mine}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_in_the_last_step_stops_nothing(bunny, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Nothing is left to go on with: "stopped" would send the user to a command that does nothing, and a
    scheduler would start the run once more."""
    assert stopped_at(4, monkeypatch, command(bunny, small, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "to continue" not in printed and "adapter, log and arguments" in printed
