"""Protects a run and its files.

It may be stopped at any moment, on machines unlike ours; its files may hold anything, and be opened by
anyone.
"""

import builtins
import contextlib
import functools
import gc
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
    write,
)
from tests.helpers import (
    ARGUMENTS,
    PLAIN,
    TURNS,
    VLFEEDBACK,
    check_file,
    completion,
    counted,
    killed,
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


@pytest.fixture
def stopped(run, monkeypatch):
    """`stopped(step, *flags)` is `run` that gets a signal once it has logged `step`."""

    def stopped(step, *flags, number=signal.SIGTERM, **options):
        def stop(record):
            if record["step"] == step:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patched:
            once_logged(patched, stop)
            return run(*flags, **options)

    return stopped


STOPPED = 128 + signal.SIGTERM


def once_logged(monkeypatch, then):
    """Let train.log call then(record) behind all else that it does."""
    log = train.log

    def log_and_more(out, records, record):
        log(out, records, record)
        then(record)

    monkeypatch.setattr(train, "log", log_and_more)


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


def assert_same_adapter(ours, theirs):
    for name, weight in adapter(theirs).items():
        assert torch.equal(adapter(ours)[name], weight), name


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_adapter_reloads_with_plain_peft(finished, bunny):
    """Users load it with PeftModel.from_pretrained; a key that does not match would be left out in
    silence."""
    model, processor = train.load_model(str(bunny))
    before = response_logps(model, make_batch(PAIRS, processor)).chosen
    tuned = peft.PeftModel.from_pretrained(model, finished)
    after = response_logps(tuned, make_batch(PAIRS, processor)).chosen
    assert (after - before).abs().min() > 1e-4
    by_hand = train.add_lora(train.load_model(str(bunny))[0], rank=4, alpha=8)
    peft.set_peft_model_state_dict(by_hand, checkpoint_of(finished)["adapter"])
    torch.testing.assert_close(after, response_logps(by_hand, make_batch(PAIRS, processor)).chosen)


def test_saved_processor_reloads(finished, bunny):
    """The folder alone must be enough to ask the tuned model a question. With torchvision the library takes
    another image processor unless it is told not to."""
    saved, original = transformers.AutoProcessor.from_pretrained(finished), train.load_processor(str(bunny))
    saved.image_processor = transformers.AutoImageProcessor.from_pretrained(finished, backend="pil")
    ours, theirs = (make_batch(PAIRS, processor).inputs for processor in (saved, original))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    "flag, value", [("micro_batch_size", 1), ("micro_batch_size", 4), ("layout", "plain")]
)
def test_micro_batch_size_and_plain_layout_do_not_change_the_update(finished, run, out, flag, value):
    """The gradient is the mean over the batch, the last partial one too (3 of 4: micro-batches of 2 and 1),
    not a mean of micro-batch means, which would weigh the single example twice. --layout plain is the
    yardstick a user can switch to."""
    assert run(f"--{flag.replace('_', '-')}", value) == 0
    assert json.loads((out / "args.json").read_text())[flag] == value
    for ours, theirs in zip(log_of(out), log_of(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("number", [1, 2, 12])
def test_resume_after_sigkill_inside_the_writing_of_a_checkpoint_is_exact(
    six_epochs, out, monkeypatch, number
):
    """The worst moment: the file is half there. --save-every is 1, so that checkpoint 1 is step 1's."""
    calls = []

    def die_at(save):
        def save_half(state, path):
            calls.append(path)
            save(state, path)
            if len(calls) == number:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return save_half

    killed(monkeypatch, six_epochs[0](out), torch, "save", die_at)
    assert steps_of(out) == list(range(number + 1))
    goes_on_exactly(six_epochs, out)


@pytest.mark.parametrize("step", [0, 1, 2, 12])
@pytest.mark.parametrize(
    "file", ["checkpoint.pt", "adapter_model.safetensors", "adapter_config.json", "README.md"]
)
def test_resume_after_sigkill_between_two_renames_is_exact(six_epochs, out, monkeypatch, file, step):
    """Of a checkpoint's files some are new then, and some are old or not there. The kill comes before the
    rename of `file` in the checkpoint of `step`; 0 is the same in the first one, but after the rename."""
    calls = []

    def die_at(rename):
        def rename_or_die(source, target):
            calls.append(Path(target).name)
            if step == 0 and calls[-1] == file:
                rename(source, target)
            if calls.count(file) == max(step, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        return rename_or_die

    killed(monkeypatch, six_epochs[0](out), os, "replace", die_at)
    goes_on_exactly(six_epochs, out)
    assert not [*out.glob("*.tmp")]


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0(six_epochs, out, monkeypatch):
    """Its arguments are all that it needs. The log holds steps by then, which come again."""

    def die_at(save):
        def die(*args, **options):
            os.kill(os.getpid(), signal.SIGKILL)

        return die

    killed(monkeypatch, six_epochs[0](out), train, "save_checkpoint", die_at)
    assert steps_of(out) == [0, 1] and not (out / "checkpoint.pt").exists()
    goes_on_exactly(six_epochs, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_before_leaving(finished, stopped, out, monkeypatch, capsys, number):
    """Ctrl-C, a cluster's preemption or a terminal that closes must not cost an epoch. What a kill left of a
    line in the log is not read."""

    def unheard(number, frame):
        raise AssertionError("the run does not listen")

    before = signal.signal(number, unheard)
    try:
        assert stopped(3, number=number) == 128 + number
        assert signal.getsignal(number) == unheard
    finally:
        signal.signal(number, before)
    assert f"python train.py --resume {out}" in capsys.readouterr().out
    assert steps_of(out) == [1, 2, 3] and checkpoint_of(out)["records"] == log_of(out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    steps = counted(monkeypatch, train, "mdpo_step")
    assert resume(out) == 0
    assert len(steps) == 2  # the micro-batches of step 4 alone
    assert steps_of(out) == [1, 2, 3, 4]
    assert_same_adapter(out, finished)


def test_a_signal_between_saving_and_leaving_loses_nothing(run, out, monkeypatch):
    """It may come at any time: a run that leaves at once, for a signal that it had not seen when it could
    have saved, loses all steps since the last checkpoint, and says that it saved them."""

    class Late(list):  # a signal comes as soon as it was read
        def __iter__(self):
            seen = self[:]
            self.append(signal.SIGTERM)
            return iter(seen)

    def stop_late():
        return contextlib.nullcontext(Late())

    monkeypatch.setattr(train, "stop_signals", stop_late)
    assert run() == STOPPED
    assert steps_of(out) == [1, 2] and checkpoint_of(out)["records"] == log_of(out)


def test_a_second_signal_to_the_whole_group_stops_at_once(finished, run, out, tmp_path, monkeypatch):
    """Who presses Ctrl-C twice does not wait for a step, nor for workers that are deaf to it. What was saved
    before is whole."""
    step = train.mdpo_step

    def stop(*args, **options):
        if (out / "checkpoint.pt").exists():  # so in step 3
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGINT)
            (tmp_path / "not at once").touch()
        return step(*args, **options)

    def run_alone():
        os.setpgrp()
        return run("--workers", 2)

    with monkeypatch.context() as patched:
        patched.setattr(train, "mdpo_step", stop)
        process = fork(run_alone)
        process.join(timeout=60)
    assert process.exitcode == 130 and not (tmp_path / "not at once").exists()
    assert resume(out) == 0
    assert_same_adapter(out, finished)


def test_under_nohup_a_terminal_that_closes_stops_nothing(finished, stopped, out):
    """nohup asks for SIGHUP to be ignored: a run that listens to it all the same ends with the ssh
    session."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stopped(2, number=signal.SIGHUP) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same_adapter(out, finished)


def test_help_shows_every_default(capsys):
    """A 0 is a value as others are; what has none is left without."""
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    parts = [" ".join(part.split()) for part in re.split(r"\n  --", capsys.readouterr().out)]
    for name, (default, kind, _) in ARGUMENTS.items():
        (part,) = [part for part in parts if part.startswith(f"{name} ")]
        shown = kind is not bool and default not in (None, [])
        assert (f"(default: {default})" in part) == shown, name


def test_each_epoch_ends_in_a_checkpoint(run, out, monkeypatch):
    """Without --save-every a power cut costs an epoch at most."""

    def power_cut(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    once_logged(monkeypatch, power_cut)
    assert run() == 130
    assert [record["step"] for record in checkpoint_of(out)["records"]] == [1, 2]


def test_a_run_that_ended_changes_no_more(finished, copied, monkeypatch):
    """Resumed, it must not train again. The log is read by people and by curves: a broken one is written
    anew. Half a file that a kill left in a folder of its own would destroy the good one, and left for ever,
    take the room of an optimizer's state."""
    (copied / "metrics.jsonl").write_bytes(b"\xff\x00{")
    (copied / "new.a1.tmp").mkdir()
    (copied / "new.a1.tmp" / "adapter_model.safetensors").write_bytes(b"half")
    steps = counted(monkeypatch, train, "mdpo_step")
    assert resume(copied) == 0 and not steps
    assert_same_adapter(copied, finished)
    assert log_of(copied) == log_of(finished) and not [*copied.glob("*.tmp")]


def another_text(path):
    records = json.loads(path.read_text())
    write(path, [records[0] | {"chosen": "Something else."}, *records[1:]])


def an_image_less(path):
    next((path.parent / "images").iterdir()).unlink()


def an_image_of_the_sample_less(path):
    first = min(random.Random(0).sample(range(7), 6))
    (path.parent / json.loads(path.read_text())[first]["img_path"]).unlink()


def an_own_image_less(path):
    (path.parent / "own.png").unlink()


OTHER_DATA = {  # flags, what changes, and what the line must say
    "another text": ([], another_text, "data files"),
    "fewer examples": (["--skip-bad"], an_image_less, "examples"),
    "as many, but others": (["--skip-bad", "--limit", 6], an_image_of_the_sample_less, "examples"),
    "another example's own rejected image": (["--skip-bad", "--limit", 6], an_own_image_less, "examples"),
}


@pytest.mark.parametrize("case", OTHER_DATA)
def test_a_run_goes_on_with_its_own_data_only(stopped, mine, out, capsys, case):
    """Half of the steps on other data is a run that nobody asked for. With --skip-bad an image that is gone
    drops its record, and with --limit another one takes its place. Seed 0 draws 6 of the 7 records, among
    them the second, which has a rejected image of its own."""
    flags, change, named = OTHER_DATA[case]
    records = json.loads(mine.read_text())
    Image.effect_noise((32, 32), 9).save(mine.parent / "own.png")
    write(mine, [records[0], records[1] | {"rejected_image": "own.png"}, *records[2:]])
    assert stopped(1, *flags, data=mine) == STOPPED
    assert "1 examples have their own rejected images" in capsys.readouterr().out
    change(mine)
    assert one_line_of(capsys, resume(out)).endswith(f"the run began with other values of {named}")


def test_a_run_goes_on_with_its_own_arguments(finished, bunny, stopped, out, tmp_path, capsys):
    """Everything comes from the run's folder. What would train something else is refused, all of it at once,
    so that nobody mends one flag and waits for the next; what changes only speed is taken."""
    assert stopped(2) == STOPPED
    before = bytes_of(out)
    line = one_line_of(capsys, resume(out, *"--lr 1 --seed 1 --anchors none --out x --workers 1".split()))
    assert line.endswith("the run began with other values of anchors, lr, seed, out")
    assert bytes_of(out) == before
    moved = out.rename(tmp_path / "moved")
    faster = "--micro-batch-size 4 --workers 1 --save-every 2".split()
    defaults = "--betas 0.9 0.98 --crop 0.01 0.2 --anchors chosen".split()  # said aloud
    assert resume(moved, "--model", bunny, *faster, *defaults) == 0
    assert all(torch.allclose(v, adapter(finished)[k], atol=1e-5) for k, v in adapter(moved).items())
    assert not out.exists()


def test_a_run_goes_on_from_any_folder(bunny, stopped, mine, out, tmp_path, monkeypatch):
    """Its files were named from where it began. Looked for elsewhere, a model would be asked of the hub."""
    shutil.copytree(bunny, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "model", "--eval-data", "data/silkie.json"]
    assert stopped(1, *flags, data="data/silkie.json") == STOPPED
    monkeypatch.chdir(out)
    assert resume("../out") == 0


def test_a_checkpoint_runs_no_code(copied, tmp_path, capsys):
    """A run's folder can come from anybody. Unpickled, it could do anything."""

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save(checkpoint_of(copied) | {"code": Code()}, copied / "checkpoint.pt")
    assert str(copied) in one_line_of(capsys, resume(copied))
    assert not (tmp_path / "ran").exists()


def test_all_groups_of_parameters_are_clipped_as_one():
    """Half of the parameters would take steps of any size, unnoticed.

    The loss is 3 a + 4 b, so that the gradient is (3, 4), of norm 5; clipped to 1 it is (0.6, 0.8), which
    plain gradient descent with a rate of 1 subtracts from (0, 0).
    """
    a, b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    def objective(batch):
        losses = (3 * a + 4 * b)[None]
        return losses, {"loss": losses.detach()}

    args = SimpleNamespace(epochs=1, max_grad_norm=1.0)
    batches = iter([SimpleNamespace(ids=["1"])])
    (record,) = train.train(objective, [[[(0, 0)]]], batches, optimizer, schedule, args)
    assert record["grad_norm"] == pytest.approx(5)
    assert (a.item(), b.item()) == pytest.approx((-0.6, -0.8), rel=1e-5)


def test_standard_error_that_breaks_off_ends_no_run(run, tmp_path, monkeypatch):
    """`2>&1 | tee log`, and tee is gone: the steps would be lost for want of a progress bar."""
    said = []

    def gone(*text):
        said.append(text)
        raise BrokenPipeError

    def yes():
        return True

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=gone, flush=gone, isatty=yes))
    assert run("--epochs", 1) == 0 and said
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it under 2>&-
    assert run("--epochs", 1, out=tmp_path / "closed") == 0


FAULTS = [  # what is raised, the exit status and what is said
    (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
    (torch.OutOfMemoryError("CUDA"), 2, "error: out of GPU memory; what saves some: --device cpu\n"),
    (
        RuntimeError("two\nlines \x1b[2J"),
        1,
        "error: internal error, please report what --debug shows: Runtime",
    ),
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


def test_data_that_moved_are_the_same(small, stopped, mine, out, capsys):
    """Their contents count, the held-out ones' as the others', and not where the file lies now."""
    assert stopped(2, "--eval-data", small) == STOPPED
    write(mine.parent / "one.json", json.loads(mine.read_text())[:1])
    line = one_line_of(capsys, resume(out, "--eval-data", mine.parent / "one.json", "--images", mine.parent))
    assert line.endswith("the run began with other values of data files")
    assert resume(out, "--eval-data", mine, "--data", mine) == 0


@pytest.mark.parametrize("flag, calls", [((), 2), (("--no-checkpointing",), 1)])
def test_activations_are_recomputed_unless_told_otherwise(run, monkeypatch, flag, calls):
    """Without checkpointing a real model does not fit; with it against the user's wish a run is a quarter
    slower. One epoch is 4 micro-batches of 2 layers: each runs for the policy, and to be recomputed. A frozen
    tower in training mode would take a batch's own statistics where it has batch norm: other features than in
    the check."""
    language, vision = [], []

    def note(mlp, seen):
        forward = mlp.forward

        def noted(self, x):
            seen.append((torch.is_grad_enabled(), self.training))
            return forward(self, x)

        monkeypatch.setattr(mlp, "forward", noted)

    note(transformers.models.phi.modeling_phi.PhiMLP, language)
    note(transformers.models.siglip.modeling_siglip.SiglipMLP, vision)
    assert run("--epochs", 1, *flag) == 0
    assert sum(grad for grad, _ in language) == 4 * 2 * calls
    assert vision and not any(training for _, training in vision)


def test_held_out_examples_are_never_trained_on_and_keep_their_image(run, out, monkeypatch):
    """Otherwise the before/after table measures memory, or luck of the crop. A DPO run reports the image
    metrics of the held-out examples, too."""
    seen, get = {}, Pairs.__getitem__

    def noted(self, key):
        one = get(self, key)
        if isinstance(key, tuple):  # else the layout is tried on it
            seen.setdefault((key, one.id), []).append(one)
        return one

    monkeypatch.setattr(Pairs, "__getitem__", noted)
    assert run("--eval-size", 2, "--no-conditional", "--anchors", "none") == 0
    held_out = {id for (epoch, _), id in seen if epoch == "held out"}
    trained = {id for (epoch, _), id in seen if epoch != "held out"}
    assert len(held_out) == 2 and len(trained) == 5 and not held_out & trained
    for (key, _), items in seen.items():
        if key[0] == "held out":
            assert len(items) == 3 and len({one.images_rejected[0].tobytes() for one in items}) == 1
    before, first, *_ = log_of(out)
    assert before["step"] == 0 and before["eval/loss"] == pytest.approx(math.log(2))
    assert "eval/rewards/image_margins" in before and "rewards/image_margins" not in first


def test_no_image_run_needs_no_images(run, out, tmp_path):
    """Fig. 1's DPO (No Image)."""
    records = [authors(img_path="nowhere.png", chosen=f"A cat {i}.") for i in range(5)]
    assert run("--no-image", "--eval-size", 1, data=write(tmp_path / "x.json", records)) == 0
    assert log_of(out)[1]["loss"] == pytest.approx(math.log(2))


def test_images_elsewhere_and_bad_records_on_the_command_line(run, small, out, tmp_path, capsys):
    """A flag that is parsed and not handed on: the images beside the file would be looked for, or the run
    would stop."""
    good = json.loads(Path(small).read_text())[:3]
    mine = write(tmp_path / "mine.json", [*good, good[0] | {"chosen": ""}])
    flags = ["--images", Path(small).parent, "--epochs", 1]
    assert run(*flags, data=mine) == 2
    assert "record 4" in capsys.readouterr().err
    assert run(*flags, "--skip-bad", data=mine) == 0
    assert "1 bad record" in capsys.readouterr().out and len(log_of(out)) == 1


def test_without_out_each_run_gets_its_own_folder(bunny, small, tmp_path, monkeypatch):
    """The user's own command must run twice, and lose nothing. Two runs at once would write into one folder,
    and neither could be resumed."""
    monkeypatch.chdir(tmp_path)
    arguments = command(bunny, small, "x", "--epochs", 1)
    assert train.main(arguments[:4] + arguments[6:]) == 0  # no --out
    assert Path("runs/bunny-silkie-1/adapter_model.safetensors").exists()
    assert [train.new_folder("runs/bunny-silkie") for _ in range(2)] == [
        "runs/bunny-silkie-2",
        "runs/bunny-silkie-3",
    ]


def test_what_is_there_is_never_replaced(run, copied, tmp_path, capsys):
    """Nothing that the user made is lost: a run, a file, and a folder with files of one's own are left as
    they are, to the byte, and before the data are read, which takes minutes. A file that is hidden is a file,
    too."""
    for name in ("poetry.lock", "mine.tmp", ".env"):
        write(tmp_path / name / name, "mine")
    for folder in (copied, *(tmp_path / name for name in ("poetry.lock", "mine.tmp", ".env"))):
        before = bytes_of(folder)
        line = one_line_of(capsys, run(data=tmp_path / "none.json", out=folder))
        assert line.endswith(f"already exists; choose another --out, or --resume {folder}")
        assert bytes_of(folder) == before
    file = tmp_path / ".env" / ".env"
    assert "already exists" in one_line_of(capsys, run(data=tmp_path / "none.json", out=file))
    assert file.read_text() == "mine"


def broken_model(bunny, folder, change):
    """A copy of a Bunny whose weights went through change(weights)."""
    file = shutil.copytree(bunny, folder) / "model-00002-of-00002.safetensors"
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
BAD_INPUTS = {  # what the message must say: flags, in which T/ is the test's folder
    "nowhere: cannot be loaded": "--model T/nowhere",
    "its processor has no image token": "--model T/text",
    "1 weights are missing, such as lm_head.weight": "--model T/missing",
    "1 weights are unexpected, such as model.surprise": "--model T/surprise",
    "none.json: no such file": "--data T/none.json",
    "no example is left": "--data T/empty.json",
    "no example is left with an id in 'llava'": "--subset llava",
    "not valid JSON": "--data T/broken.json",
    "is one JSON object with the fields a": "--data T/object.json",
    "cannot be read: 'utf-8' codec can't decode byte": "--data T/latin.json",
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
    "no room for a response": "--max-length 20",
    "cannot be written to": "--out T/empty.json/out",
    f"cannot be loaded: {NO_GPU}": "--device cuda",
}


@pytest.fixture(scope="session")
def bad_files(bunny, tmp_path_factory):
    """A folder with the files that BAD_INPUTS names."""

    def without_head(weights):
        del weights["lm_head.weight"]

    def with_surprise(weights):
        weights["model.surprise"] = torch.zeros(1)

    folder = tmp_path_factory.mktemp("bad")
    broken_model(bunny, folder / "missing", without_head)
    broken_model(bunny, folder / "surprise", with_surprise)
    text_model(bunny, folder / "text")
    write(folder / "empty.json", [])
    write(folder / "broken.json", "[{]")
    write(folder / "object.json", '{\n"a": 1}')
    (folder / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    return folder


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_one_line_and_status_2(run, bad_files, out, capsys, message):
    """A traceback tells a user nothing; and what failed must leave nothing behind."""
    if NO_GPU in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    flags = BAD_INPUTS[message].replace("T/", f"{bad_files}/").split()
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    lines = [line for line in error.splitlines() if line.strip() and "it/s]" not in line]  # bars
    assert lines[-1 if "bad record" not in error else 0].startswith("error: ") and "Traceback" not in error
    assert len(lines) == 1 or "bad record" in error
    assert not out.exists()
    with pytest.raises(BadInput):
        run(*flags, "--debug")


@pytest.mark.parametrize("wrong", ["the loss is nan", "the gradient is nan"])
def test_nan_stops_the_run_and_names_the_batch(run, capsys, wrong):
    """Training on after a NaN ruins the adapter in silence. The slope of a square root at 0 is infinite, its
    value is not."""

    def broken(policy_logps, *rest, batch, **options):
        losses, metrics = mdpo_loss(policy_logps, *rest, **options)
        more = math.nan if wrong == "the loss is nan" else (0 * policy_logps[0]).sqrt()
        return losses + more, metrics

    line = one_line_of(capsys, run(loss=broken))
    ids = re.search(r"step 1: .* not finite; examples: (.*)", line)[1].split(", ")
    assert len(ids) == 4 and set(ids) <= {str(i) for i in range(1, 8)}


def test_out_of_gpu_memory_names_the_flag(run, capsys, monkeypatch):
    """The first thing a user meets on a small GPU."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "mdpo_step", full)
    line = one_line_of(capsys, run())
    assert "out of GPU memory; what saves some: a lower --micro-batch-size" in line


def test_nothing_ever_asks_a_question(run, monkeypatch):
    """With standard input open, a library that asks whether to run remote code would wait for ever."""
    asked = counted(monkeypatch, builtins, "input")
    assert run("--epochs", 1) == 0 and not asked


HOSTILE = [None, True, 0, -1, 10**400, 1.5, math.nan, math.inf, [], [[]], {}, {"a": 1}, [None]]
HOSTILE += ["", " ", "x", "\ud800", "\x1b[2J\n\t", "..", "/", "<image>", "a\0", "a" * 5000, {"path": None}]
HOSTILE += [[{"role": "user"}], [{"role": "user", "content": 3}], [{"role": "system", "content": []}]]
HOSTILE += [{"type": "image"}]


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


def test_no_record_is_a_traceback(folder, capsys):
    """600 records of every format, each with a part of another type, missing, ragged or hostile: each is
    read, left out or named on one line; none hides the good one, and none takes long."""
    rng, said, started = random.Random(0), [], time.monotonic()
    for _ in range(100):
        kinds = [authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT, TURNS]
        records = [authors(id="good"), *(mutated(record, rng) for record in kinds)]
        examples = read_examples(write(folder / "x.json", records), skip_bad=True, log=said.append)
        assert "good" in [example.id for example in examples]
    assert all(line.isprintable() and len(line) < 3000 for text in said for line in text.split("\n  "))
    assert time.monotonic() - started < 30


def test_patterns_and_depths_that_explode_are_read_in_no_time(folder, capsys):
    """A citation that never ends, a template within templates, brackets within brackets: quadratic time or a
    deep stack."""
    started, path = time.monotonic(), folder / "x.json"
    unended = [completion("【†" * 100_000 + "x", "5"), completion("B", "1")]
    for record in (
        VLFEEDBACK | {"completions": unended},
        authors(prompt="USER: " * 100_000 + "x"),
        authors(prompt="<image>" * 50_000),
    ):
        check_file([write(path, [record])])
    capsys.readouterr()
    one_line_of(capsys, check_file([write(path, "[" * 100_000)]))
    assert time.monotonic() - started < 10


def test_the_mask_and_the_pixels_have_the_models_dtype(bunny):
    """Of another dtype, each layer would convert the mask, and CUDA's kernels refuse it. Processors give
    float32 pixels: some vision towers round them, others (Aria's, Llama 4's) stop with an error."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    seen = []

    def note(tower, args, options):
        seen.append([*args, *options.values()][0].dtype)

    model.model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)
    inputs = mdpo.forward_inputs(model, pack(make_batch(PAIRS[:1], processor, share=True)))
    assert seen == [torch.bfloat16] and inputs["blocks"][1][3].dtype == torch.bfloat16


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


def start(folder):
    """What a run does with a model before its first step."""
    model, processor = train.load_model(str(folder))
    with data.about("adapter"):
        model = train.add_lora(model, 2, 4)
    train.choose_layout(model, processor, PAIRS[:1])
    return 0


@pytest.mark.parametrize("seed", range(40))
def test_no_model_folder_is_a_traceback(bunny, llava, tmp_path, capsys, seed):
    """A field of one of its JSON files changed or gone, a template broken, a file cut short: an interrupted
    download, a hand-edited config. It loads all the same, or one line names the folder."""
    rng = random.Random(seed)
    folder = shutil.copytree(rng.choice([bunny, llava]), tmp_path / "model")
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    if path.suffix == ".json" and path.name != "tokenizer.json" and rng.random() < 0.8:
        write(path, mutated(json.loads(path.read_text()), rng))
    elif rng.random() < 0.3:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])

    def start_it(argv):
        return start(folder)

    started, status = time.monotonic(), data.run_command(start_it, [])
    if status:
        assert str(folder) in one_line_of(capsys, status)
    assert time.monotonic() - started < 10


TEMPLATES = ["", "{{", "{% for %}", "{{ messages.x.y }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"]
TEMPLATES += [
    "{{ messages[5].content }}",
    "{{ 'a' + 1 }}",
    "{% for m in messages %}{{ m.content.x() }}{% endfor %}",
]


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_a_broken_chat_template_is_the_models_fault_not_each_records(
    bunny, llava, small, out, tmp_path, capsys, template
):
    """Reported record by record, it would send the user through thousands of good ones. Bunny's processor is
    made here, of sizes in its config."""
    folder = shutil.copytree(bunny if template is None else llava, tmp_path / "model")
    if template is None:
        updated(folder / "config.json", mm_vision_tower="google/siglip-so400m-patch0-32")
    else:
        (folder / "chat_template.jinja").write_text(template)
    line = one_line_of(capsys, train.main(command(folder, small, out)))
    assert str(folder) in line and "record" not in line and not out.exists()


@pytest.mark.parametrize("seed", range(6))
def test_no_argument_is_a_traceback(capsys, seed):
    """Every flag with values that are no numbers, no choices, too many, too large: one line before anything
    is loaded."""
    rng = random.Random(seed)
    values = ["", "x", "-1", "nan", "inf", "-inf", "1e400", "9" * 30, "0x10", "1_0", "--", "é\x07", "0"]

    def parse(argv):
        train.parse_args(argv)
        return 0

    for _ in range(60):
        words = [f"--{rng.choice([*ARGUMENTS])}", *rng.choices(values, k=rng.choice([1, 1, 2, 3]))]
        status = data.run_command(parse, ["--model", "m", "--data", "d", *words])
        if status:
            one_line_of(capsys, status)
        capsys.readouterr()


def updated(path, **values):
    write(path, json.loads(path.read_text()) | values)


def without_lr(path):
    arguments = json.loads(path.read_text())
    del arguments["lr"]
    write(path, arguments)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, 1000)


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def a_folder(path):
    path.unlink()
    path.mkdir()


def damage(path, change):
    """Put bytes in a file's place, or give a run's arguments or its checkpoint other values, or call
    change(path)."""
    if isinstance(change, bytes):
        path.write_bytes(change)
    elif isinstance(change, dict) and path.name == "args.json":
        updated(path, **change)
    elif isinstance(change, dict):
        state = checkpoint_of(path.parent)
        torch.save(state | {"run": state["run"] | change}, path)
    else:
        change(path)


DAMAGES = {  # what the line must say: a file of the run, and what becomes of it
    "args.json": ("args.json", Path.unlink),
    "not valid JSON": ("args.json", b'{"model": '),
    "cannot be resumed: is not in a known form": ("args.json", b"[]"),
    "has no 'lr'": ("args.json", without_lr),
    "must be within 1e-12": ("args.json", {"lr": "nan"}),
    "other values of seed": ("args.json", {"seed": 7}),
    "other values of reject, lr, seed": ("args.json", {"reject": "moco", "lr": 1.0, "seed": 7}),
    "other values of lora rank": ("args.json", {"lora_rank": 1}),
    "other values of data files": ("checkpoint.pt", {"data_files": "0" * 64}),
    "other values of loss": ("checkpoint.pt", {"loss": "mine"}),
    "other values of base weights": ("checkpoint.pt", {"base_weights": "0" * 64}),
    "other values of examples": ("checkpoint.pt", {"examples": [8, 0]}),
    "other values of beta, epochs, loss": ("checkpoint.pt", {"beta": 0.2, "epochs": 1, "loss": "mine"}),
    "checkpoint.pt: cannot be resumed from: is damaged": ("checkpoint.pt", flipped),
    "checkpoint.pt: cannot be resumed from: File is not": ("checkpoint.pt", cut),
    "checkpoint.pt: cannot be resumed from: File is": ("checkpoint.pt", b""),
    "checkpoint.pt: cannot be resumed from: [Errno 2]": ("checkpoint.pt", dangling),
    "checkpoint.pt: cannot be resumed from: [Errno 2] No such": ("checkpoint.pt", Path.unlink),
    "checkpoint.pt: cannot be resumed from: [Errno 21]": ("checkpoint.pt", a_folder),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_run_is_refused_and_left_as_it_is(copied, capsys, message):
    """Half of a run on other arguments, data or weights is a result that nobody can explain. Begun anew for
    want of its checkpoint, it would replace the adapter that is there."""
    file, change = DAMAGES[message]
    damage(copied / file, change)
    before = bytes_of(copied)
    line = one_line_of(capsys, resume(copied))
    assert message in line and str(copied) in line and bytes_of(copied) == before


@pytest.mark.parametrize("ahead", [False, True])
def test_a_worker_that_dies_is_one_line(finished, run, out, tmp_path, capsys, monkeypatch, ahead):
    """The kernel kills the largest process when memory is short. The run says so and ends, and the steps that
    it had done are not lost: they are saved where the main process waits for the next batch, and have been
    saved by --save-every wherever else it is, such as in the middle of a step, if the worker is ahead."""
    item, done = Pairs.__getitem__, tmp_path / "step 2 is done"
    last = train.plan_steps(7, 4, 2, 2, seed=0)[2][0][0]  # of step 3

    def die(self, key):
        if key == last and len(self.examples) > 1:
            while not ahead and not done.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, key)

    def note(record):
        if record["step"] == 2:
            done.touch()

    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", die)
        once_logged(patched, note)
        started = time.monotonic()
        status = run("--workers", 1, *(["--save-every", 1] if ahead else []))
    line = one_line_of(capsys, status)
    assert "DataLoader worker" in line and "--workers 0" in line and time.monotonic() - started < 60
    no_child_is_left()
    if not ahead:
        assert [record["step"] for record in checkpoint_of(out)["records"]] == [1, 2]
    assert resume(out) == 0 and steps_of(out) == [1, 2, 3, 4]
    assert_same_adapter(out, finished)


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
    finished, run, out, capsys, monkeypatch, workers, failing
):
    """Storage that is gone for a moment must not cost an epoch: the steps done are whole, and once the image
    is back, the run goes on from there, to the same adapter. Step 2 is cut off in its second micro-batch. A
    worker's error is a page of traceback, of which the user needs the last line."""
    lost, item = train.plan_steps(7, 4, 2, 2, seed=0)[failing - 1][-1][-1], Pairs.__getitem__
    preview, choose = [1], train.choose_layout  # the first examples are also read to try the layout

    def get(self, key):
        if key == lost and len(self.examples) > 1 and not preview:
            raise BadInput("image gone.png cannot be decoded")
        return item(self, key)

    def layout_is_tried(*args):
        preview.clear()
        return choose(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", get)
        patched.setattr(train, "choose_layout", layout_is_tried)
        line = one_line_of(capsys, run("--workers", workers))
    said = "error: a process that loads data: image gone.png cannot be decoded"
    assert line.removesuffix("\\n") == said  # a traceback ends in a new line
    no_child_is_left()
    assert steps_of(out) == list(range(1, failing)) and (out / "checkpoint.pt").exists() == (failing > 1)
    steps = counted(monkeypatch, train, "mdpo_step")
    assert resume(out) == 0
    assert len(steps) == 2 * (5 - failing) and steps_of(out) == [1, 2, 3, 4]
    assert_same_adapter(out, finished)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_held_out_image_that_vanishes_loses_no_step_and_repeats_none(
    run, out, tmp_path, capsys, monkeypatch, epoch
):
    """It is missed at the end of an epoch, when the weights have moved and the step is not yet in the log. A
    checkpoint of moved weights and an old log would take that step twice."""
    whole = tmp_path / "whole"
    assert run("--eval-size", 2, out=whole) == 0
    item, asked = Pairs.__getitem__, []

    def get(self, key):
        asked.append(key)
        if asked.count(("held out", 0)) == epoch + 1:  # the first time is before training
            raise BadInput("image gone.png cannot be decoded")
        return item(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", get)
        assert "gone.png cannot be decoded" in one_line_of(capsys, run("--eval-size", 2))
    assert resume(out) == 0
    assert_same_adapter(out, whole)
    assert steps_of(out) == steps_of(whole) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what", ["the disk is full", "the folder vanishes", "the log is a folder"])
def test_a_disk_that_fails_is_one_line_and_the_checkpoint_stays_whole(run, out, capsys, monkeypatch, what):
    """The last checkpoint is all that is left of hours. RLIMIT_FSIZE stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def break_down(record):
        if record["step"] != 2:
            return
        if what == "the folder vanishes":
            shutil.rmtree(out)
        elif what == "the log is a folder":
            a_folder(out / "metrics.jsonl")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))

    with monkeypatch.context() as patched:
        once_logged(patched, break_down)
        try:
            status = run("--save-every", 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(out) in one_line_of(capsys, status)
    if what == "the disk is full":
        assert resume(out) == 0 and steps_of(out) == [1, 2, 3, 4]


def test_weights_that_became_infinite_are_not_saved(run, out, capsys, monkeypatch):
    """The loss of the last step is finite; its update is looked at by nobody else."""
    step = torch.optim.AdamW.step

    def overflow(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    assert "made a weight infinite" in one_line_of(capsys, run("--epochs", 1, "--batch-size", 8))
    assert not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("output", ["| true", ">&-"])
def test_output_that_closes_is_no_traceback(folder, output):
    """`python data.py FILE | head -1` is how people look at a long report. Schedulers start commands with
    their output closed."""
    script = f"{sys.executable} {ROOT / 'data.py'} {write(folder / 'x.json', [authors()])} {output}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_long_texts_are_cut_where_they_are_shown(folder):
    """An id of a megabyte would fill the terminal, and hide the reason."""
    with pytest.raises(BadInput) as raised:
        read_examples(write(folder / "x.json", [authors(id="x" * 10**6, chosen="")]))
    assert len(str(raised.value)) < 1000 and str(raised.value).endswith("'chosen': has no text")


def test_resume_notices_other_weights(copied, bunny, tmp_path, capsys):
    """The same names and shapes, but other numbers: the second half of the run would have another reference.
    The same numbers in another dtype are the same model."""

    def trained(weights):
        weights["lm_head.weight"].mul_(1.1)

    def same(weights):
        weights.update({name: weight.float() for name, weight in weights.items()})

    assert resume(copied, "--model", broken_model(bunny, tmp_path / "same", same)) == 0
    line = one_line_of(capsys, resume(copied, "--model", broken_model(bunny, tmp_path / "trained", trained)))
    assert line.endswith("the run began with other values of base weights")


def test_eval_data_are_held_out_as_well(bunny, tmp_path):
    """A file of one's own, with random images of its own: training must neither see it nor change by it."""
    data_file, more = shapes.write_pairs(tmp_path / "data", 8, 0), shapes.write_pairs(tmp_path / "more", 3, 1)
    with_it, without = tmp_path / "with", tmp_path / "without"
    flags = ["--epochs", 1, "--reject", "random"]
    argv = command(bunny, data_file, with_it, *flags, "--eval-data", more)
    training, held_out = train.read_pairs(train.parse_args(argv), train.load_processor(str(bunny)))
    assert (len(training), len(training.pool), len(held_out), len(held_out.pool)) == (8, 8, 3, 8 + 3)
    assert train.main(argv) == train.main(command(bunny, data_file, without, *flags)) == 0
    before = log_of(with_it)[0]
    assert before["step"] == 0 and "eval/rewards/image_margins" in before
    assert_same_adapter(with_it, without)


def test_a_stopped_run_can_be_looked_at(bunny, stopped, out):
    """The adapter of the last checkpoint is there, and is that checkpoint's. A worker that is left would keep
    Python from its exit for ever, deaf to signals. Job scripts make the folder of their output first."""
    out.mkdir()
    assert stopped(1, "--workers", 2) == STOPPED
    assert not multiprocessing.active_children()
    tuned = peft.PeftModel.from_pretrained(train.load_model(str(bunny))[0], out)
    assert tuned.peft_config["default"].r == 4 and not [*out.glob("*.tmp")]
    state = checkpoint_of(out)
    assert state["records"] == log_of(out)
    assert all(torch.equal(v, adapter(out)[k]) for k, v in state["adapter"].items())


def test_held_out_metrics_are_shown_after_each_epoch_at_the_end_and_in_the_model_card(run, out, capsys):
    """A run that goes wrong is seen in its first epoch. Before and after are what a user quotes: exchanged,
    or of training steps, they say something else. peft's blank card tells the finder of the folder
    nothing."""
    assert run("--eval-size", 2, "--beta", 0.25) == 0
    printed, card = capsys.readouterr().out, (out / "README.md").read_text()
    first, *_, last = records = [record for record in log_of(out) if "eval/loss" in record]
    assert [record["step"] for record in records] == [0, 2, 4]
    for epoch, record in enumerate(records[1:], 1):
        table = printed.partition(f"epoch {epoch}, held-out examples")[2]
        for name in ("loss", "rewards/accuracies"):
            before, now = re.search(rf"^  {name} +(\S+) +(\S+)$", table, re.MULTILINE).groups()
            assert [before, now] == [f"{r[f'eval/{name}']:.4f}" for r in (first, record)]
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


def test_phases_are_said_as_they_begin(bunny, small, out, tmp_path):
    """Written to a file, a run at real size said nothing for 13 minutes."""
    script = f"""
import os, train
train.load_model = lambda *args: os._exit(7)
train.main({command(bunny, small, out)!r})
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=log, env=environment)
    assert run.returncode == 7
    first, *counts, last = (tmp_path / "log").read_text().splitlines()
    assert (first, last) == (f"reading and checking {small}", f"loading {bunny}")
    assert counts[0].startswith(f"{small}: 7 examples with 7 different images")


def test_a_notebooks_output_will_do(folder, monkeypatch):
    """In one, standard output is no file, and has no encoding to set."""
    path = write(folder / "x.json", [authors()])

    def show(*text):
        pass

    output = SimpleNamespace(write=show, flush=show)
    monkeypatch.setattr(sys, "stdout", output)
    assert check_file([path]) == 0 and sys.stdout is output


def test_folders_of_new_files_are_merged(tmp_path):
    """Processors with several chat templates save them in a folder: a run that ended could not be resumed."""
    for text in ("old", "new"):
        with train.replacing(tmp_path) as new:
            (new / "more").mkdir()
            (new / "more" / "template.jinja").write_text(text)
        (tmp_path / "more" / "mine").touch()
    found = {path.name: path.read_text() for path in (tmp_path / "more").iterdir()}
    assert found == {"template.jinja": "new", "mine": ""}


def test_ones_own_empty_folder_stays(run, tmp_path, capsys):
    """Nothing that the user made is removed; what the run made and did not use is."""
    (mine := tmp_path / "mine").mkdir()
    for out in (mine, tmp_path / "new"):
        one_line_of(capsys, run(data=tmp_path / "none.json", out=out))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not [*mine.iterdir()]


def test_the_command_that_goes_on_is_quoted(stopped, tmp_path, capsys):
    """Copied from the terminal, a folder with a space would be two arguments."""
    assert stopped(1, "--out", tmp_path / "my run") == STOPPED
    assert f"--resume '{tmp_path / 'my run'}'" in capsys.readouterr().out


def test_the_layout_check_of_long_answers_takes_no_longer_than_a_step(bunny):
    """It runs answers through the model, in float32 on a CPU; one of a book would take hours."""
    model, processor = train.load_model(str(bunny))
    seen = outputs_of(model.get_input_embeddings())
    long = PAIRS[0]._replace(chosen="a red circle " * 5000, rejected="no. " * 5000)
    assert train.choose_layout(model, processor, [long, PAIRS[1]], max_length=500) == "packed"
    assert max(output.shape[:2].numel() for output in seen) == 6 * 500


def test_cudnn_attention_and_rounded_float32_are_off(bunny):
    """It plans anew for each shape, at tens of milliseconds, and shapes never repeat here. And float32 may be
    rounded on CUDA, in convolutions by default: the check of the layout would take that for a mistake."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    train.load_model(str(bunny))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_the_mask_is_laid_out_as_cudas_kernels_want_it():
    """Rows that begin at multiples of 16 numbers, in the model's dtype: else each layer converts and copies
    it. What a token may see is added as 0, all else as -inf."""
    rows = [(7, 0, 5), (3, 0, 5), (17, 0, 5)]
    first, (n, owner, prefix, mask), (*_, other) = mdpo.attention_blocks(rows, None, torch.bfloat16)
    assert first == (7, 0, 5, None)  # its own prefix: causal, without a mask
    assert (n, owner, prefix, mask.shape, mask.dtype) == (3, 0, 5, (1, 1, 3, 8), torch.bfloat16)
    assert mask.stride()[2] == 16 and other.stride()[2] == 32 and mask.stride()[3] == 1
    no = -math.inf
    assert mask[0, 0].tolist() == [[0] * 6 + [no, no], [0] * 7 + [no], [0] * 8]


def test_workers_that_are_spawned_train_the_same(run, finished, out, monkeypatch):
    """Windows and macOS start a worker anew: what it is given has to be pickled."""
    spawning = functools.partial(train.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(train, "DataLoader", spawning)
    assert run("--workers", 1) == 0
    assert [record["loss"] for record in log_of(out)] == [record["loss"] for record in log_of(finished)]


@pytest.mark.skipif(os.name != "posix", reason="modes are Unix's")
def test_each_epochs_adapter_is_kept_in_files_of_the_umask(run, out):
    """The last epoch is not always the best one. Weights for their writer alone cannot be read by the group's
    server."""
    assert run("--keep-epochs") == 0
    assert sorted(path.name for path in out.glob("epoch-*")) == ["epoch-1", "epoch-2"]
    assert_same_adapter(out, out / "epoch-2")
    first, last = adapter(out / "epoch-1"), adapter(out / "epoch-2")
    assert any((first[name] != values).any() for name, values in last.items())
    assert "2 steps." in (out / "epoch-1" / "README.md").read_text()
    for path in filter(Path.is_file, out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~train.UMASK, path


@pytest.mark.parametrize("name", ["out\n---\nlicense: mit", "\x1b[31mred", "\udcff"])
def test_odd_file_names_are_refused_first(run, tmp_path, capsys, name):
    """They would set a terminal's colours or a model card's fields; weights cannot be saved under bytes that
    are no text, and it trained before it found out."""
    line = one_line_of(capsys, run("--out", tmp_path / name))
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


def test_the_model_card_is_utf8_in_any_locale(run, mine, out):
    """The hub reads nothing else. In a bare container the locale's encoding is ASCII: names become codes."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        assert run("--epochs", 1, data=mine.rename(mine.parent / "kätzchen.json")) == 0
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert "kätzchen.json".encode() in (out / "README.md").read_bytes()


def test_what_is_only_evaluated_keeps_no_graph(run):
    """Its activations would take the memory of a training step, and more. Of 7 examples 2 are held out: one
    micro-batch before training and one after it. The 5 others are steps of 2 + 2 and 1."""
    graphs = []

    def loss(policy_logps, ref_logps, batch, **options):
        graphs.append(policy_logps[0].requires_grad)
        return mdpo_loss(policy_logps, ref_logps, **options)

    assert run("--epochs", 1, "--eval-size", 2, loss=loss) == 0
    assert graphs == [False, True, True, True, False]


def test_speed_is_in_examples_and_memory_in_gib(run, out, monkeypatch):
    """Counted in micro-batches, --micro-batch-size 1 would seem fastest. By this clock a micro-batch takes 2
    seconds: steps of 2 + 2 and 2 + 1 examples take 4. The device says that 3 * 1024^3 bytes were in use."""
    now = [0.0]

    def clock():
        return now[0]

    def loss(policy_logps, ref_logps, batch, **options):
        now[0] += 2
        return mdpo_loss(policy_logps, ref_logps, **options)

    def in_use(*args, **options):
        return 3 * 1024**3

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock, monotonic=clock, time=clock))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", in_use)
    assert run("--epochs", 1, loss=loss) == 0
    assert [record["examples_per_second"] for record in log_of(out)] == [4 / 4, 3 / 4]
    assert [record["peak_memory_gib"] for record in log_of(out)] == [3, 3]


def test_the_log_counts_parts_of_epochs(finished):
    """Rounded, curves would have steps in place of lines, and each step would end an epoch."""
    assert [record["epoch"] for record in log_of(finished)] == [0.5, 1, 1.5, 2]


# Each flag of train.py that decides the result, with a value that the run `finished` did not have.
DECIDING = [
    *("--subset llava", "--limit 5", "--eval-size 1", "--skip-bad", "--no-image", "--max-pixels 999"),
    *("--max-length 99", "--reject moco", "--crop 0.2 0.5", "--beta 0.2", "--delta 0.1", "--no-conditional"),
    *("--anchors none", "--epochs 4", "--batch-size 2", "--lr 1e-4", "--warmup 0.2", "--betas 0.8 0.9"),
    *("--weight-decay 0.1", "--max-grad-norm 2", "--lora-rank 8", "--lora-alpha 4", "--seed 1"),
]


def test_every_flag_that_decides_the_result_is_the_runs_own(finished):
    """Changed in the middle of a run, the result would be one of neither value."""
    names = [flag.split()[0].removeprefix("--") for flag in DECIDING]
    assert {*names} == {*train.METHOD}  # a new flag needs a line here
    for name, flag in zip(names, DECIDING):
        with pytest.raises(BadInput, match=f"began with other values of {name.replace('-', ' ')}$"):
            train.parse_args(["--resume", str(finished), *flag.split()])


def test_workers_hear_no_signal_to_stop(run, finished, out):
    """Schedulers signal every process of a run, each when they like. A worker that dies of it takes the
    batches along that the main process needs to end its step."""
    signalled = []

    def loss(policy_logps, ref_logps, batch, **options):
        for worker in multiprocessing.active_children():
            signalled.append(worker)
            for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
                os.kill(worker.pid, number)
        return mdpo_loss(policy_logps, ref_logps, **options)

    def run_and_signal():
        return run("--workers", 1, loss=loss) or not signalled

    process = fork(run_and_signal)  # which may hang
    process.join(timeout=60)
    process.kill()
    assert process.exitcode == 0
    assert_same_adapter(out, finished)


def test_signals_are_heard_as_before_once_training_ended(run):
    """Whoever calls `main` in a program of his own has handlers of his own."""

    def mine(number, frame):
        raise AssertionError("no signal was sent")

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, mine) for number in numbers}
    try:
        assert run("--epochs", 1) == 0
        assert {signal.getsignal(number) for number in numbers} == {mine}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_in_the_last_step_stops_nothing(stopped, capsys):
    """Nothing is left to go on with: "stopped" would send the user to a command that does nothing, and a
    scheduler would start the run once more."""
    assert stopped(4) == 0
    printed = capsys.readouterr().out
    assert "to continue" not in printed and "adapter, log and arguments" in printed
