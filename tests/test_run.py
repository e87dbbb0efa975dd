"""Protects a run and its files.

It may be stopped at any moment, on machines unlike ours; its files may hold anything, and be opened by
anyone.
"""

import contextlib
import functools
import gc
import io
import json
import locale
import math
import multiprocessing
import os
import random
import re
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
from safetensors.torch import load_file, save_file

import data
import mdpo
import train
from data import BadInput, Pairs, make_batch, read_examples
from examples import shapes
from mdpo import mdpo_loss, pack
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
    write,
)
from tests.helpers import (
    ARGUMENTS,
    PLAIN,
    TURNS,
    VLFEEDBACK,
    check_file,
    counted,
    one_line_of,
    outputs_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(bunny, small, out):
    """`run(*flags)` trains on the small data into `out` -> exit status."""

    def run(*flags, data=small, out=out, **options):
        return train.main(command(bunny, data, out, *flags), **options)

    return run


@contextlib.contextmanager
def preceded(owner, name, do):
    """Inside, owner.name calls do(*its arguments) first."""
    function = getattr(owner, name)

    def both(*args, **options):
        do(*args, **options)
        return function(*args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, both)
        yield


@pytest.fixture
def stopped(run):
    """`stopped(step, *flags)` is `run` that gets a signal as it logs `step`."""

    def stopped(step, *flags, number=signal.SIGTERM, **options):
        def stop(out, records, record):
            if record["step"] == step:
                os.kill(os.getpid(), number)

        with preceded(train, "log", stop):
            return run(*flags, **options)

    return stopped


STOPPED = 128 + signal.SIGTERM
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def ended(function, *arguments):
    """The exit status of function(*arguments) in a child, which may hang."""
    process = fork(function, *arguments)
    process.join(timeout=60)
    process.kill()
    return process.exitcode


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a run that ended."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def mine(small, tmp_path):
    """A copy of the small data."""
    shutil.copytree(Path(small).parent, tmp_path / "data")
    return tmp_path / "data" / Path(small).name


def resume(out, *flags):
    return train.main(["--resume", *map(str, (out, *flags))])


def steps_of(out):
    return [record["step"] for record in log_of(out)]


def checkpoint_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def assert_same_adapter(ours, theirs):
    assert_equal(adapter(ours), adapter(theirs))


def assert_same_steps(ours, theirs):
    """But for rounding."""
    for name, tolerance in ("loss", 5e-5), ("grad_norm", 1e-3):
        values, expected = ([record[name] for record in log_of(out)] for out in (ours, theirs))
        assert values == pytest.approx(expected, rel=tolerance)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def goes_on_to(finished, out):
    """Resumed, a run ends as the one that was not stopped."""
    assert resume(out) == 0
    assert steps_of(out) == steps_of(finished)
    assert_same_adapter(out, finished)


def test_a_stopped_run_can_be_looked_at(bunny, stopped, out):
    """Users load it with PeftModel.from_pretrained, which leaves out a key that does not match in silence.
    The folder alone must be enough to ask the model a question. With torchvision the library takes another
    image processor unless it is told not to. A worker that is left would keep Python from its exit for ever,
    deaf to signals. Job scripts make the folder of their output first."""
    out.mkdir()
    assert stopped(3, "--workers", 2) == STOPPED
    assert not multiprocessing.active_children() and not [*out.glob("*.tmp")]
    model, processor = train.load_model(str(bunny))
    tuned = peft.PeftModel.from_pretrained(model, out)
    assert tuned.peft_config["default"].lora_alpha == 8
    assert_equal(peft.get_peft_model_state_dict(tuned), checkpoint_of(out)["adapter"])
    saved = transformers.AutoProcessor.from_pretrained(out)
    saved.image_processor = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    assert_equal(make_batch(PAIRS, saved).inputs, make_batch(PAIRS, processor).inputs)


@pytest.mark.parametrize(
    "flag, value", [("micro_batch_size", 1), ("micro_batch_size", 4), ("layout", "plain")]
)
def test_micro_batch_size_and_plain_layout_do_not_change_the_update(finished, run, out, flag, value):
    """The gradient is the mean over the batch, the last partial one too (3 of 4: micro-batches of 2 and 1),
    not a mean of micro-batch means, which would weigh the single example twice. --layout plain is the
    yardstick a user can switch to."""
    assert run(f"--{flag.replace('_', '-')}", value) == 0
    assert json.loads((out / "args.json").read_text())[flag] == value
    assert_same_steps(out, finished)


@pytest.mark.parametrize("step", [1, 2, 12])
@pytest.mark.parametrize(
    "file", ["half", "checkpoint.pt", "adapter_model.safetensors", "adapter_config.json", "README.md"]
)
def test_resume_after_sigkill_inside_a_checkpoint_is_exact(six_epochs, out, file, step):
    """Of its files some are new then, some old, half there or not at all; the log is ahead. The kill comes
    before the rename of `file` in the checkpoint of `step`, or once half of checkpoint.pt is written."""
    seen = []

    def die_in_time(name):
        seen.append(name)
        if seen.count(file) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(state, path):
        path.write_bytes(b"half")
        die_in_time("half")

    def rename(source, target):
        die_in_time(Path(target).name)

    with preceded(torch, "save", save), preceded(os, "replace", rename):
        assert ended(train.main, six_epochs[0](out)) == -signal.SIGKILL
    goes_on_exactly(six_epochs, out)
    assert not [*out.glob("*.tmp")]


@contextlib.contextmanager
def kept(number, handler):
    """Inside, a signal has this handler; it must have it at the end."""
    before = signal.signal(number, handler)
    try:
        yield
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_saves_before_leaving(finished, stopped, tmp_path, monkeypatch, capsys, number):
    """Ctrl-C, a cluster's preemption or a terminal that closes must not cost an epoch. What a kill left of a
    line in the log is not read. Copied from the terminal, a folder with a space would be two arguments."""

    def unheard(number, frame):
        raise AssertionError("the run does not listen")

    out = tmp_path / "my run"
    with kept(number, unheard):
        assert stopped(3, "--out", out, number=number) == 128 + number
    assert f"python train.py --resume '{out}'" in capsys.readouterr().out
    assert steps_of(out) == [1, 2, 3] and checkpoint_of(out)["records"] == log_of(out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    steps = counted(monkeypatch, train, "mdpo_step")
    goes_on_to(finished, out)
    assert len(steps) == 2  # the micro-batches of step 4 alone


def test_under_nohup_a_terminal_that_closes_stops_nothing(finished, stopped, out):
    """nohup asks for SIGHUP to be ignored: a run that listens to it all the same ends with the ssh
    session."""
    with kept(signal.SIGHUP, signal.SIG_IGN):
        assert stopped(2, number=signal.SIGHUP) == 0
    assert_same_adapter(out, finished)


def test_a_signal_in_the_last_step_stops_nothing(stopped, capsys):
    """Nothing is left to go on with: "stopped" would send the user to a command that does nothing, and a
    scheduler would start the run once more."""
    assert stopped(4) == 0
    printed = capsys.readouterr().out
    assert "to continue" not in printed and "adapter, log and arguments" in printed


def test_a_signal_between_saving_and_leaving_loses_nothing(run, out, monkeypatch):
    """It may come at any time: a run that leaves at once, for a signal that it had not seen when it could
    have saved, loses all steps since the last checkpoint, and says that it saved them."""

    class Late(list):  # a signal comes as soon as it was read
        def __iter__(self):
            yield from self[:]
            self.append(signal.SIGTERM)

    monkeypatch.setattr(train, "stop_signals", functools.partial(contextlib.nullcontext, Late()))
    assert run() == STOPPED
    assert steps_of(out) == [1, 2] and checkpoint_of(out)["records"] == log_of(out)


def test_a_second_signal_to_the_whole_group_stops_at_once(finished, run, out):
    """Who presses Ctrl-C twice does not wait for a step, nor for workers that are deaf to it. What was saved
    before, without --save-every at the end of each epoch, is whole."""

    def stop(*args, **options):
        if (out / "checkpoint.pt").exists():  # so in step 3
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGINT)
            os._exit(1)  # not at once

    def run_alone():
        os.setpgrp()
        return run("--workers", 2)

    with preceded(train, "mdpo_step", stop):
        assert ended(run_alone) == 130
    goes_on_to(finished, out)


def test_workers_hear_no_signal_to_stop(run, finished, out):
    """Schedulers signal every process of a run, each when they like. A worker that dies of it takes the
    batches along that the main process needs to end its step."""
    signalled = []

    def signal_workers(*args, **options):
        for worker in multiprocessing.active_children():
            signalled.extend(os.kill(worker.pid, number) for number in NUMBERS)

    def run_and_signal():
        return run("--workers", 1) or not signalled

    with preceded(train, "mdpo_step", signal_workers):
        assert ended(run_and_signal) == 0
    assert_same_adapter(out, finished)


def test_help_shows_every_default(capsys):
    """A 0 is a value as others are; what has none is left without."""
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    parts = [part.split() for part in capsys.readouterr().out.split("\n  --")]
    shown = {name: " ".join(words) for name, *words in parts}
    for name, (default, kind, _) in ARGUMENTS.items():
        has_one = kind is not bool and default not in (None, [])
        assert (f"(default: {default})" in shown[name]) == has_one, name


def test_a_run_that_ended_changes_no_more(finished, copied, monkeypatch):
    """Resumed, it must not train again. The log is read by people and by curves: a broken one is written
    anew. Half a file that a kill left in a folder of its own would destroy the good one, and left for ever,
    take the room of an optimizer's state."""
    (copied / "metrics.jsonl").write_bytes(b"\xff\x00{")
    write(copied / "new.a1.tmp" / "adapter_model.safetensors", "half")
    steps = counted(monkeypatch, train, "mdpo_step")
    assert resume(copied) == 0 and not steps
    assert_same_adapter(copied, finished)
    assert log_of(copied) == log_of(finished) and not [*copied.glob("*.tmp")]


@pytest.mark.parametrize("flags", [["--skip-bad"], ["--skip-bad", "--limit", 6]])
def test_a_run_goes_on_with_its_own_examples_only(stopped, mine, out, capsys, flags):
    """Half of the steps on other data is a run that nobody asked for. With --skip-bad an image that is gone
    drops its record, and with --limit another one takes its place. Seed 0 draws 6 of the 7 records."""
    drawn = min(random.Random(0).sample(range(7), 6))
    assert stopped(1, *flags, data=mine) == STOPPED
    (mine.parent / json.loads(mine.read_text())[drawn]["img_path"]).unlink()
    assert one_line_of(capsys, resume(out)).endswith("the run began with other values of examples")


def test_a_run_goes_on_with_its_own_data_from_any_folder(
    bunny, small, stopped, mine, out, tmp_path, monkeypatch, capsys
):
    """The data's contents count, the held-out ones' as the others', and not where they lie. The run's files
    were named from where it began: looked for elsewhere, a model would be asked of the hub."""
    (tmp_path / "model").symlink_to(bunny)
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "model", "--eval-data", "data/silkie.json"]
    assert stopped(2, *flags, data="data/silkie.json") == STOPPED
    first, *rest = json.loads(mine.read_text())
    other = write(mine.parent / "other.json", [first | {"chosen": "Something else."}, *rest])
    for flag in "--data", "--eval-data":
        line = one_line_of(capsys, resume(out, flag, other))
        assert line.endswith("the run began with other values of data files")
    monkeypatch.chdir(out)
    assert resume("../out", "--data", small) == 0


def test_a_run_goes_on_with_its_own_arguments(finished, bunny, stopped, out, tmp_path, capsys):
    """Everything comes from the run's folder. What would train something else is refused, all of it at once,
    so that nobody mends one flag and waits for the next; what changes only speed is taken."""
    assert stopped(2) == STOPPED
    line = one_line_of(capsys, resume(out, *"--lr 1 --seed 1 --anchors none --out x --workers 1".split()))
    assert line.endswith("the run began with other values of anchors, lr, seed, out")
    moved = out.rename(tmp_path / "moved")
    faster = "--micro-batch-size 4 --workers 1 --save-every 2"
    defaults = "--betas 0.9 0.98 --crop 0.01 0.2 --anchors chosen"  # said aloud
    assert resume(moved, "--model", bunny, *faster.split(), *defaults.split()) == 0
    torch.testing.assert_close(adapter(moved), adapter(finished), rtol=1e-5, atol=1e-5)
    assert not out.exists()


# Each flag of train.py that decides the result, with a value that the run `finished` did not have.
DECIDING = (
    "subset llava, limit 5, eval-size 1, skip-bad, no-image, max-pixels 999, max-length 99, reject moco, "
    "crop 0.2 0.5, beta 0.2, delta 0.1, no-conditional, anchors none, epochs 4, batch-size 2, lr 1e-4, "
    "warmup 0.2, betas 0.8 0.9, weight-decay 0.1, max-grad-norm 2, lora-rank 8, lora-alpha 4, seed 1"
)


def test_every_flag_that_decides_the_result_is_the_runs_own(finished):
    """Changed in the middle of a run, the result would be one of neither value."""
    flags = {flag.split()[0]: flag.split() for flag in DECIDING.split(", ")}
    assert flags.keys() == train.METHOD.keys()  # a new flag needs a place there
    for name, (_, *values) in flags.items():
        with pytest.raises(BadInput, match=f"began with other values of {name.replace('-', ' ')}$"):
            train.parse_args(["--resume", str(finished), f"--{name}", *values])


def test_a_checkpoint_runs_no_code(copied, tmp_path, capsys):
    """A run's folder can come from anybody. Unpickled, it could do anything."""

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"code": Code()}, copied / "checkpoint.pt")
    assert str(copied) in one_line_of(capsys, resume(copied))
    assert not (tmp_path / "ran").exists()


def test_all_groups_of_parameters_are_clipped_as_one(finished, run, out):
    """Half of the parameters would take steps of any size, unnoticed."""

    def halve(self, groups, *rest, **options):
        groups[:] = [groups[0] | {"params": groups[0]["params"][i::2]} for i in range(2)]

    with preceded(torch.optim.AdamW, "__init__", halve):
        assert run() == 0
    assert_same_steps(out, finished)


def gone(*text):
    raise BrokenPipeError


@pytest.mark.parametrize("stderr", [SimpleNamespace(write=gone, flush=gone, isatty=bool), None])
def test_standard_error_that_breaks_off_ends_no_run(run, monkeypatch, stderr):
    """`2>&1 | tee log`, and tee is gone: the steps would be lost for want of a progress bar. It is None under
    2>&-."""
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run("--epochs", 1) == 0


FAULTS = [  # what is raised, the exit status and what is said
    (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
    (torch.OutOfMemoryError("CUDA"), 2, "error: out of GPU memory; what saves some: --device cpu\n"),
    (RuntimeError("a\n\x1b[2J"), 1, "error: internal error, please report what --debug shows: Runtime"),
]


@pytest.mark.parametrize("error, status, said", FAULTS)
def test_whose_fault_an_error_is_says_its_line(capsys, error, status, said):
    """Whose disk is full need not report it to us. Who is told that the file is bad, where we are at fault,
    looks for the mistake in the wrong place."""

    def broken(argv):
        raise error

    assert data.run_command(broken, []) == status
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1 and "\x1b" not in err
    with pytest.raises(type(error)):
        data.run_command(broken, ["--debug"])


@pytest.mark.parametrize("flags, calls", [([], 2), (["--no-checkpointing"], 1)])
def test_activations_are_recomputed_unless_told_otherwise(run, flags, calls):
    """Without checkpointing a real model does not fit; with it against the user's wish a run is a quarter
    slower. 5 examples are 3 micro-batches of 2 layers: each runs for the policy, and to be recomputed. The
    2 held out keep no graph, whose activations would take the memory of a training step, and more. A frozen
    tower in training mode would take a batch's own statistics where it has batch norm: other features than in
    the check."""
    with_graph, in_training = [], []

    def note_language(mlp, x):
        with_graph.append(torch.is_grad_enabled())

    def note_vision(mlp, x):
        in_training.append(mlp.training)

    language = transformers.models.phi.modeling_phi.PhiMLP
    vision = transformers.models.siglip.modeling_siglip.SiglipMLP
    with preceded(language, "forward", note_language), preceded(vision, "forward", note_vision):
        assert run("--epochs", 1, "--eval-size", 2, *flags) == 0
    assert sum(with_graph) == 3 * 2 * calls
    assert in_training and not any(in_training)


def test_no_image_run_needs_no_images(run, mine, out):
    """Fig. 1's DPO (No Image)."""
    shutil.rmtree(mine.parent / "images")
    assert run("--no-image", "--eval-size", 1, data=mine) == 0
    assert log_of(out)[1]["loss"] == pytest.approx(math.log(2))


def test_without_out_each_run_gets_its_own_folder(bunny, small, tmp_path, monkeypatch):
    """The user's own command must run twice, and lose nothing. Two runs at once would write into one folder,
    and neither could be resumed."""
    monkeypatch.chdir(tmp_path)
    arguments = command(bunny, small, "x", "--epochs", 1)
    assert train.main(arguments[:4] + arguments[6:]) == 0  # no --out
    assert Path("runs/bunny-silkie-1/adapter_model.safetensors").exists()
    assert train.new_folder("runs/bunny-silkie") == "runs/bunny-silkie-2"


def test_what_is_there_is_never_replaced(run, finished, copied, tmp_path, capsys):
    """Nothing that the user made is lost: a run, a folder with a file of one's own, if a hidden one, and a
    file are left as they are, to the byte, and before the data are read, which takes minutes."""
    file = Path(write(tmp_path / "mine" / ".env", "mine"))
    for taken in copied, file.parent, file:
        line = one_line_of(capsys, run(data=tmp_path / "none.json", out=taken))
        assert line.endswith(f"already exists; choose another --out, or --resume {taken}")
    assert bytes_of(copied) == bytes_of(finished) and bytes_of(file.parent) == {".env": b"mine"}


BAD_INPUTS = {  # what the message must say: flags, in which T/ is the test's folder
    "nowhere: cannot be loaded": "--model T/nowhere",
    "cut: cannot be loaded": "--model T/cut",
    "odd: cannot be loaded": "--model T/odd",
    "torn: cannot be loaded": "--model T/torn",
    "1 weights are missing, such as lm_head.weight": "--model T/missing",
    "1 weights are unexpected, such as model.surprise": "--model T/surprise",
    "none.json: no such file": "--data T/none.json",
    "no example is left": "--data T/empty.json",
    "no example is left with an id in 'llava'": "--subset llava",
    "no such image folder": "--images T/none",
    "--beta: must be within 1e-12 to 1000000.0, got 0": "--beta 0",
    "--beta: must be within 1e-12 to 1000000.0, got -0.1": "--beta -0.1",
    "--beta: must be within 1e-12 to 1000000.0, got inf": "--beta inf",
    "--lr: must be within 1e-12 to 1000000.0, got nan": "--lr nan",
    "--delta: must be within -1000000.0 to 1000000.0, got -inf": "--delta=-inf",
    "--delta: expected one argument": "--delta -1e-3",
    "--weight-decay: must be within 0 to 1, got -1e-3": "--weight-decay=-1e-3",
    "--warmup: must be within 0 to 1, got 1.5": "--warmup 1.5",
    "--betas: must be within 0 to 0.999999, got 1": "--betas 0.9 1",
    "--epochs: must be within 1 to 1000, got 0": "--epochs 0",
    "--eval-size: must be within 0 to 9223372036854775807, got -1": "--eval-size -1",
    "--seed: must be within 0 to 9223372036854775807, got -1": "--seed -1",
    "--crop: must be within 0 to 1, got -1": "--crop -1 0.2",
    "--crop: its minimum is above its maximum": "--crop 0.5 0.2",
    "--crop does nothing with another --reject": "--crop 0.2 0.5 --reject moco",
    "--anchors none cannot be combined": "--anchors none chosen",
    "--no-image leaves": "--no-image --anchors image_rejected",
    "invalid choice": "--anchors cropped",
    "invalid int value": "--epochs many",
    "unrecognized arguments: --bata": "--bata 1",
    "unrecognized arguments: --resum x": "--resum x",  # it would start another run, without a word
    "leaves none of 7": "--eval-size 7",
    "would drop 7 bad records": "--max-length 20",
    "cannot be written to": "--out T/empty.json/out",
    "--out: has control characters, or bytes that are no text": "--out T/\x1b[31mred",
    "cannot be loaded: Expected one of cpu, cuda": "--device gpu",
}


@pytest.fixture(scope="session")
def bad_files(bunny, tmp_path_factory):
    """A folder with the files that BAD_INPUTS names."""
    folder = tmp_path_factory.mktemp("bad")
    for name in "cut", "odd", "torn", "missing", "surprise":
        shutil.copytree(bunny, folder / name)
    os.truncate(folder / "cut/config.json", 100)
    updated(folder / "odd/config.json", mm_vision_tower="google/siglip-so400m-patch0-32")
    shard = "model-00002-of-00002.safetensors"
    os.truncate(folder / "torn" / shard, 1000)
    weights = load_file(bunny / shard)
    save_file(weights | {"model.surprise": torch.zeros(1)}, folder / "surprise" / shard, {"format": "pt"})
    del weights["lm_head.weight"]
    save_file(weights, folder / "missing" / shard, {"format": "pt"})
    write(folder / "empty.json", [])
    return folder


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_one_line_and_status_2(run, bad_files, out, capsys, message):
    """A traceback tells a user nothing; and what failed must leave nothing behind. Control characters in a
    name would set a terminal's colours or a model card's fields."""
    status = run(*BAD_INPUTS[message].replace("T/", f"{bad_files}/").split(" "))
    assert message in one_line_of(capsys, status) and status == 2 and not out.exists()


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_nan_stops_the_run_and_names_the_batch(run, capsys, wrong):
    """Training on after a NaN ruins the adapter in silence. The slope of a square root at 0 is infinite, its
    value is not."""

    def broken(policy_logps, *rest, batch, **options):
        losses, metrics = mdpo_loss(policy_logps, *rest, **options)
        return losses + (math.nan if wrong == "loss" else (0 * policy_logps[0]).sqrt()), metrics

    line = one_line_of(capsys, run(loss=broken))
    assert re.search(r"step 1: .* not finite; examples: [1-7], [1-7], [1-7], [1-7]$", line)


def test_the_step_before_one_that_is_not_finite_is_saved(run, out, capsys):
    """Hours would be lost to one bad batch."""
    seen = []

    def broken(policy_logps, *rest, batch, **options):
        seen.append(batch)
        losses, metrics = mdpo_loss(policy_logps, *rest, **options)
        return losses * (math.nan if len(seen) > 2 else 1), metrics

    assert "step 2: loss or gradient is not finite" in one_line_of(capsys, run(loss=broken))
    assert [record["step"] for record in checkpoint_of(out)["records"]] == [1]


def test_out_of_gpu_memory_names_the_flag(run, capsys):
    """The first thing a user meets on a small GPU."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    line = one_line_of(capsys, run(loss=full))
    assert "out of GPU memory; what saves some: a lower --micro-batch-size" in line


HOSTILE = [
    *(None, True, -1, 10**400, math.nan, [], {}, [None], "", " ", "\ud800", "\x1b[2J\n", "..", "a\0"),
    *("<image>", "a" * 5000, {"path": None}, {"role": "user", "content": 3}),
]


def mutated(value, rng):
    """The value with one of its parts, at any depth, left out, replaced or nested."""
    if not value or not isinstance(value, (dict, list)) or rng.random() < 0.2:
        return rng.choice([*HOSTILE, [value], {"a": value}])
    copy = value.copy()
    key = rng.choice([*copy] if isinstance(copy, dict) else range(len(copy)))
    copy[key] = mutated(copy[key], rng)
    if rng.random() < 0.1:
        del copy[key]
    return copy


def test_no_record_is_a_traceback(folder):
    """600 records of every format, each with a part of another type, missing or hostile: each is read, left
    out or named on one line, and none hides the good one."""
    rng = random.Random(0)

    def log(text):
        assert all(line.isprintable() and len(line) < 3000 for line in text.split("\n  "))

    for _ in range(100):
        kinds = authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT, TURNS
        records = [authors(id="good"), *(mutated(record, rng) for record in kinds)]
        examples = read_examples(write(folder / "x.json", records), skip_bad=True, log=log)
        assert "good" in [example.id for example in examples]


def test_the_masks_and_the_pixels_are_as_the_models_layers_want_them(bunny):
    """In the model's dtype: else each layer converts the masks, and some vision towers (Aria's, Llama 4's)
    stop with an error at a processor's float32. Rows of a mask begin at multiples of 16 numbers, as CUDA's
    kernels want them, or each layer copies it."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    dtypes = []

    def note(tower, pixel_values, **options):
        dtypes.append(pixel_values.dtype)

    with preceded(type(model.model.vision_tower), "forward", note):
        inputs = mdpo.forward_inputs(model, pack(make_batch(PAIRS[:1], processor, share=True)))
    mask = inputs["blocks"][1][3]  # of y_l, which begins behind y_w
    assert [*dtypes, mask.dtype] == [torch.bfloat16] * 2 and mask.stride(2) % 16 == 0


def test_the_float32_mode_computes_in_float32_and_leaves_the_weights():
    """1 + 2 ** -10 is not in bf16. What is written into a tensor made inside must be there afterwards."""
    one = torch.ones(1, dtype=torch.bfloat16)
    with train.InFloat32():
        total = one + 2**-10
        by_name = torch.add(input=one, other=2**-10)
        made = torch.zeros(1, dtype=torch.bfloat16)
        made[0] = 1 + 2**-10
    assert total == by_name == made == 1 + 2**-10 and one.dtype == torch.bfloat16


TEMPLATES = [
    *(
        "",
        "{{",
        "{% for %}",
        "{{ messages.x.y }}",
        "{{ messages[5].content }}",
        "{{ messages[0].content.x() }}",
    ),
    *("{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ raise_exception('no') }}"),
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_broken_chat_template_is_the_models_fault_not_each_records(
    llava, small, out, tmp_path, capsys, template
):
    """Reported record by record, it would send the user through thousands of good ones."""
    folder = shutil.copytree(llava, tmp_path / "model")
    write(folder / "chat_template.jinja", template)
    line = one_line_of(capsys, train.main(command(folder, small, out)))
    assert str(folder) in line and "record" not in line and not out.exists()


def updated(path, **values):
    write(path, json.loads(path.read_text()) | values)


def of_other_arguments(path):
    updated(path, reject="moco", lr=1.0, lora_rank=1, seed=7)


def of_another_run(path):
    state = checkpoint_of(path.parent)
    state["run"] |= {"beta": 0.2, "data_files": "0", "examples": "0", "base_weights": "0", "loss": "mine"}
    torch.save(state, path)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {  # what the line must say: a file of the run, and its bytes or what becomes of it
    "args.json": ("args.json", Path.unlink),
    "not valid JSON": ("args.json", b'{"model": '),
    "cannot be resumed: is not in a known form": ("args.json", b"[]"),
    "has no 'model'": ("args.json", b"{}"),
    "other values of reject, lr, lora rank, seed": ("args.json", of_other_arguments),
    "other values of beta, data files, examples, base weights, loss": ("checkpoint.pt", of_another_run),
    "checkpoint.pt: cannot be resumed from: is damaged": ("checkpoint.pt", flipped),
    "checkpoint.pt: cannot be resumed from: File is not": ("checkpoint.pt", b"half"),
    "checkpoint.pt: cannot be resumed from: [Errno 2] No such": ("checkpoint.pt", Path.unlink),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_run_is_refused_and_left_as_it_is(copied, capsys, message):
    """Half of a run on other arguments, data or weights is a result that nobody can explain. Begun anew for
    want of its checkpoint, it would replace the adapter that is there."""
    file, change = DAMAGES[message]
    if isinstance(change, bytes):
        (copied / file).write_bytes(change)
    else:
        change(copied / file)
    before = bytes_of(copied)
    line = one_line_of(capsys, resume(copied))
    assert message in line and str(copied) in line and bytes_of(copied) == before


def no_child_is_left():
    """Python waits for its children at its exit; workers are deaf to the signals that it sends to them."""
    gc.collect()  # torch ends the workers of a loader that is gone
    children = multiprocessing.active_children()
    for process in children:
        process.kill()
    assert not children


@pytest.mark.parametrize("ahead", [False, True])
def test_a_worker_that_dies_is_one_line(finished, run, out, capsys, ahead):
    """The kernel kills the largest process when memory is short, wherever the main process is: it waits for
    the next batch, or is in the middle of a step if the worker is ahead. The run says so and ends, and goes
    on from its last checkpoint."""
    lost = train.plan_steps(7, 4, 2, 2, seed=0)[2][0][0]  # of step 3

    def die(self, key):
        if key == lost:
            while not ahead and not (out / "adapter_model.safetensors").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    with preceded(Pairs, "__getitem__", die):
        line = one_line_of(capsys, run("--workers", 1))
    assert "DataLoader worker" in line and "--workers 0" in line
    no_child_is_left()
    goes_on_to(finished, out)


def vanish():
    raise BadInput("image gone.png cannot be decoded")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_the_steps_before_an_image_that_vanishes_are_saved(finished, run, out, capsys, workers, failing):
    """Storage that is gone for a moment must not cost an epoch: the steps done are whole, and once the image
    is back, the run goes on from there, to the same adapter. Step 2 is cut off in its second micro-batch. A
    worker's error is a page of traceback, of which the user needs the last line."""
    lost = train.plan_steps(7, 4, 2, 2, seed=0)[failing - 1][-1][-1]

    def get(self, key):
        if key == lost:
            vanish()

    with preceded(Pairs, "__getitem__", get):
        line = one_line_of(capsys, run("--workers", workers))
    said = "error: a process that loads data: image gone.png cannot be decoded"
    assert line.removesuffix("\\n") == said  # a traceback ends in a new line
    no_child_is_left()
    assert steps_of(out) == [*range(1, failing)]
    assert failing == 1 or checkpoint_of(out)["records"] == log_of(out)
    goes_on_to(finished, out)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_held_out_image_that_vanishes_loses_no_step_and_repeats_none(run, out, tmp_path, capsys, epoch):
    """It is missed at the end of an epoch, when the weights have moved and the step is not yet in the log. A
    checkpoint of moved weights and an old log would take that step twice."""
    whole, asked = tmp_path / "whole", []
    assert run("--eval-size", 2, out=whole) == 0

    def get(self, key):
        asked.append(key)
        if asked.count(("held out", 0)) == epoch + 1:  # the first time is before training
            vanish()

    with preceded(Pairs, "__getitem__", get):
        assert "gone.png cannot be decoded" in one_line_of(capsys, run("--eval-size", 2))
    goes_on_to(whole, out)


def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_stays_whole(run, out, capsys):
    """The last checkpoint is all that is left of hours."""

    def fill(state, path):
        if len(state["records"]) == 3:
            path.write_bytes(b"half")
            raise RuntimeError("file write failed")  # as torch does

    with preceded(torch, "save", fill):
        line = one_line_of(capsys, run("--save-every", 3))
    assert f"{out}: cannot be written to, as on a full disk" in line
    assert resume(out) == 0 and steps_of(out) == [1, 2, 3, 4]


def test_weights_that_became_infinite_are_not_saved(run, out, capsys):
    """The loss of the last step is finite; its update is looked at by nobody else."""

    def overflow(self, *args):
        self.param_groups[0]["params"][0].data.fill_(math.inf)

    with preceded(torch.optim.AdamW, "step", overflow):
        assert "made a weight infinite" in one_line_of(capsys, run("--epochs", 1, "--batch-size", 8))
    assert not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("output", ["| true", ">&-"])
def test_output_that_closes_is_no_traceback(folder, output):
    """`python data.py FILE | head -1` is how people look at a long report. Schedulers start commands with
    their output closed."""
    script = f"{sys.executable} {ROOT / 'data.py'} {write(folder / 'x.json', [authors()])} {output}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_notebooks_output_will_do(folder, monkeypatch):
    """In one, standard output is no file, and has no encoding to set."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert check_file([write(folder / "x.json", [authors()])]) == 0
    assert "1 examples" in sys.stdout.getvalue()


def test_phases_are_said_as_they_begin(bunny, small, out):
    """Written to a file, a run at real size said nothing for 13 minutes."""
    script = f"""
import os, train
train.load_model = lambda *args: os._exit(0)
train.main({command(bunny, small, out)!r})
"""
    python = ["env", "-u", "PYTHONUNBUFFERED", sys.executable, "-c", script]
    first, *_, last = subprocess.check_output(python, cwd=ROOT, text=True).splitlines()
    assert (first, last) == (f"reading and checking {small}", f"loading {bunny}")


def test_long_texts_are_cut_where_they_are_shown(folder):
    """An id of a megabyte would fill the terminal, and hide the reason."""
    with pytest.raises(BadInput, match="'chosen': has no text$") as raised:
        read_examples(write(folder / "x.json", [authors(id="x" * 10**6, chosen="")]))
    assert len(str(raised.value)) < 1000


def test_a_run_knows_its_base_weights(finished, bunny):
    """The same names and shapes, but other numbers: the second half of the run would have another reference.
    The same numbers in another dtype are the same model."""
    args, (model, _) = train.parse_args(["--resume", str(finished)]), train.load_model(str(bunny))

    def base_weights():
        return train.identity(args, [], model, mdpo_loss)["base_weights"]

    before = base_weights()
    model.bfloat16()
    assert base_weights() == before
    model.lm_head.weight.data *= 1.1
    assert base_weights() != before


def test_eval_data_are_held_out_as_well(bunny, small, finished, run, out, tmp_path):
    """A file of one's own, with random images of its own: training must neither see it nor change by it."""
    flags = ["--eval-data", shapes.write_pairs(tmp_path / "more", 3, 1)]
    args = train.parse_args(command(bunny, small, out, *flags, "--reject", "random"))
    pairs = train.read_pairs(args, train.load_processor(str(bunny)))
    assert [len(of.pool) for of in pairs] == [7, 7 + 3]
    assert run(*flags) == 0
    assert log_of(out)[0]["step"] == 0
    assert_same_adapter(out, finished)


def test_held_out_metrics_are_shown_after_each_epoch_at_the_end_and_in_the_model_card(run, out, capsys):
    """A run that goes wrong is seen in its first epoch. Before and after are what a user quotes: exchanged,
    or of training steps, they say something else. A DPO run reports the held-out examples' image metrics,
    too. peft's blank card tells the finder of the folder nothing, and a path of this machine is no model of
    the hub."""
    assert run("--eval-size", 2, "--beta", 0.25, "--no-conditional", "--anchors", "none") == 0
    printed, card = capsys.readouterr().out, (out / "README.md").read_text()
    first, *epochs = records = [record for record in log_of(out) if "eval/loss" in record]
    assert [record["step"] for record in records] == [0, 2, 4]
    assert first["eval/loss"] == pytest.approx(math.log(2))
    assert "eval/rewards/image_margins" in first and "rewards/image_margins" not in epochs[0]
    for epoch, record in enumerate(epochs, 1):
        table = printed.partition(f"epoch {epoch}, held-out examples")[2]
        before, now = re.search(r"^  loss +(\S+) +(\S+)$", table, re.MULTILINE).groups()
        assert [before, now] == [f"{one['eval/loss']:.4f}" for one in (first, record)]
    assert "silkie.json: 4 steps" in card and '"beta": 0.25' in card and "base_model" not in card
    assert f"{epochs[-1]['eval/loss']:.4f}" in card


def test_the_model_card_is_yaml_whatever_the_names():
    """A quote or a colon in a name would end the value that the hub reads."""
    args = train.parse_args(["--model", 'a/b: "c"', "--data", "x.json"])
    _, front, _ = train.model_card(args, [{"step": 1, "epoch": 1.0}]).split("---\n")
    assert front == 'base_model: "a/b: \\"c\\""\nlibrary_name: peft\ntags: [mdpo, lora]\n'


def test_the_model_card_is_utf8_in_any_locale(run, mine, out):
    """The hub reads nothing else. In a bare container the locale's encoding is ASCII: names become codes."""

    def run_in_ascii():
        locale.setlocale(locale.LC_CTYPE, "C")
        return run("--epochs", 1, data=mine.rename(mine.parent / "kätzchen.json"))

    assert ended(run_in_ascii) == 0
    assert "kätzchen.json".encode() in (out / "README.md").read_bytes()


def test_new_files_are_merged_with_those_beside_them(tmp_path, monkeypatch):
    """Processors with several chat templates save them in a folder: a run that ended could not be resumed.
    The system's folder may be full, or another disk, from which nothing can be renamed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    for text in "old", "new":
        with train.replacing(tmp_path) as new:
            write(new / "more" / "template.jinja", text)
        (tmp_path / "more" / "mine").touch()
    assert bytes_of(tmp_path / "more") == {"template.jinja": b"new", "mine": b""}


def test_each_epochs_adapter_is_kept_in_files_of_the_umask(run, out):
    """The last epoch is not always the best one. Weights for their writer alone cannot be read by the group's
    server."""
    assert run("--keep-epochs") == 0
    assert_same_adapter(out, out / "epoch-2")
    with pytest.raises(AssertionError):
        assert_same_adapter(out, out / "epoch-1")
    assert "2 steps." in (out / "epoch-1" / "README.md").read_text()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~train.UMASK}


def test_the_layout_check_of_long_answers_takes_no_longer_than_a_step(bunny):
    """It runs answers through the model, in float32 on a CPU; one of a book would take hours."""
    model, processor = train.load_model(str(bunny))
    seen = outputs_of(model.get_input_embeddings())
    long = PAIRS[0]._replace(chosen="a red circle " * 300, rejected="no. " * 600)
    assert train.choose_layout(model, processor, [long], max_length=500) == "packed"
    assert max(output.shape[:2].numel() for output in seen) == 3 * 500


def test_cudnn_attention_and_rounded_float32_are_off(bunny):
    """It plans anew for each shape, at tens of milliseconds, and shapes never repeat here. And float32 may be
    rounded on CUDA, in convolutions by default: the check of the layout would take that for a mistake."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    train.load_model(str(bunny))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)


def test_workers_that_are_spawned_train_the_same(run, finished, out, monkeypatch):
    """Windows and macOS start a worker anew: what it is given has to be pickled."""
    spawning = functools.partial(train.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(train, "DataLoader", spawning)
    assert run("--workers", 1) == 0
    assert_same_adapter(out, finished)


def test_speed_is_in_examples_and_memory_in_gib(run, out, monkeypatch):
    """Counted in micro-batches, --micro-batch-size 1 would seem fastest. By this clock a micro-batch takes 2
    seconds: steps of 2 + 2 and 2 + 1 examples take 4. The device says that 3 * 1024^3 bytes were in use."""
    micro_batches = counted(monkeypatch, train, "mdpo_step")
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: 2.0 * len(micro_batches)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 1024**3)
    assert run("--epochs", 1) == 0
    first, second = log_of(out)
    assert (first["examples_per_second"], second["examples_per_second"]) == (4 / 4, 3 / 4)
    assert first["peak_memory_gib"] == 3


def test_many_steps_are_planned_at_once():
    """Adding lists to a list anew took 12 seconds for 60,000 steps."""
    started = time.process_time()
    assert len(train.plan_steps(640_000, 32, 4, 3, 0)) == 60_000
    assert time.process_time() - started < 5  # CPU time; 1 second here


def test_ones_own_empty_folder_stays(run, tmp_path, capsys):
    """Nothing that the user made is removed; what the run made and did not use is. An empty one is taken."""
    (mine := tmp_path / "mine").mkdir()
    for out in (mine, tmp_path / "new"):
        one_line_of(capsys, run(data=tmp_path / "none.json", out=out))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not [*mine.iterdir()]
    assert run("--epochs", 1, out=mine) == 0
