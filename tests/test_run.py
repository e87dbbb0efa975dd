"""Protects a run, which may be stopped at any moment, and its files, which may hold anything."""

import contextlib
import functools
import gc
import io
import json
import locale
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import data
import mdpo
import train
from data import BadInput, make_batch, read_examples
from examples import shapes
from test_mdpo import MESSAGES, NO_PROMPT, PAIRS, ROOT, adapter, authors, command, fork, goes_on_exactly
from test_mdpo import log_of, write
from tests.helpers import PLAIN, TURNS, VLFEEDBACK, as_examples, counted, one_line_of, preceded

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(bunny, small, out):
    """`run(*flags)` trains on the small data into `out` -> exit status."""
    return lambda *flags, **options: train.main(command(bunny, small, out, *flags), **options)


@pytest.fixture
def stopped(run):
    """`stopped(step, *flags)` is `run` that gets a signal as it logs `step`, and gives its handler back."""

    def stopped(step, *flags, number=signal.SIGTERM, handler=signal.default_int_handler):
        def stop(out, records, record):
            if record["step"] == step:
                os.kill(os.getpid(), number)

        before = signal.signal(number, handler)
        with preceded("train.log", stop):
            status = run(*flags)
        assert signal.signal(number, before) == handler
        return status

    return stopped


STOPPED = 128 + signal.SIGTERM
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
UNREAD = Mock(side_effect=BrokenPipeError)  # a function of a stream that nobody reads any more
GONE = BadInput("image gone.png cannot be decoded")
PLAN = train.plan_steps(7, 4, 2, 2, seed=0)  # of `finished`
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def ended(function, *arguments):
    """The exit status of function(*arguments) in a child, which may hang."""
    process = fork(function, *arguments)
    process.join(timeout=300)  # on a busy machine
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers, where it led a group of its own
    return process.exitcode


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def mine(small, tmp_path):
    return shutil.copytree(Path(small).parent, tmp_path / "data") / Path(small).name


def resume(out, *flags):
    return train.main(["--resume", *map(str, (out, *flags))])


def steps_of(out):
    return [record["step"] for record in log_of(out)]


def checkpoint_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}  # no broken links


def goes_on_to(finished, out):
    """Resumed, a run ends as the one that was not stopped."""
    assert resume(out) == 0
    assert steps_of(out) == steps_of(finished)
    assert_equal(adapter(out), adapter(finished))


def test_a_stopped_run_can_be_looked_at(bunny, stopped, out):
    """Its folder alone must be enough to ask the model; peft drops keys that do not match in silence. Workers
    that are left keep Python from its exit for ever. Job scripts make the folder first."""
    out.mkdir()
    assert stopped(3, "--workers", 2) == STOPPED
    assert not multiprocessing.active_children()
    model, processor = train.load_model(str(bunny))
    tuned = peft.PeftModel.from_pretrained(model, out)
    assert_equal(peft.get_peft_model_state_dict(tuned), checkpoint_of(out)["adapter"])
    saved = transformers.AutoProcessor.from_pretrained(out)  # with torchvision, its images are another's
    saved.image_processor = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    assert_equal(make_batch(PAIRS, saved).inputs, make_batch(PAIRS, processor).inputs)


@pytest.mark.parametrize("step", [1, 2, 12])
@pytest.mark.parametrize("file", ["half", "checkpoint.pt", "adapter_model.safetensors"])
def test_resume_after_sigkill_inside_a_checkpoint_is_exact(six_epochs, out, file, step):
    """Some files are new, some old, some half there: `file` is not renamed yet in the checkpoint `step`."""
    seen = []

    def die_in_time(source, target):
        seen.append(Path(target).name)
        if seen.count(file) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(state, path):
        path.write_bytes(b"half")
        die_in_time(path, "half")

    with preceded("torch.save", save), preceded("os.replace", die_in_time):
        assert ended(train.main, six_epochs[0](out)) == -signal.SIGKILL
    goes_on_exactly(six_epochs, out)
    assert not [*out.glob("*.tmp")]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_saves_before_leaving(finished, stopped, tmp_path, monkeypatch, capsys, number):
    """Ctrl-C must not cost an epoch. Copied as it is said, a folder with a space would be two arguments."""
    out = tmp_path / "my run"
    assert stopped(3, "--out", out, number=number) == 128 + number
    assert f"python train.py --resume '{out}'" in capsys.readouterr().out
    assert steps_of(out) == [1, 2, 3] and checkpoint_of(out)["records"] == log_of(out)
    steps = counted(monkeypatch, train, "mdpo_step")
    goes_on_to(finished, out)
    assert len(steps) == 2  # the micro-batches of step 4 alone


def test_a_signal_under_nohup_or_in_the_last_step_stops_nothing(finished, stopped, out, capsys):
    """nohup asks for SIGHUP to be ignored, or the run ends with the ssh session. After the last step,
    "stopped" would send the user to a command that does nothing, and a scheduler would start it again."""
    assert stopped(2, number=signal.SIGHUP, handler=signal.SIG_IGN) == 0
    assert_equal(adapter(out), adapter(finished))
    assert stopped(4, "--out", out / "other") == 0
    printed = capsys.readouterr().out
    assert "to continue" not in printed and "adapter, log and arguments" in printed


def test_a_signal_between_saving_and_leaving_loses_nothing(run, out, monkeypatch):
    """A run that leaves for a signal which came after it could save loses the steps since its checkpoint."""

    class Late(list):  # a signal comes as soon as it was read
        def __iter__(self):
            yield from self[:]
            self.append(signal.SIGTERM)

    monkeypatch.setattr("train.stop_signals", lambda: contextlib.nullcontext(Late()))
    assert run() == STOPPED
    assert steps_of(out) == [1, 2] and checkpoint_of(out)["records"] == log_of(out)


def test_workers_hear_no_signal_and_a_second_one_to_the_whole_group_stops_at_once(finished, run, out):
    """Schedulers signal every process: a worker that dies takes the batches along that the step needs. Who
    presses Ctrl-C twice waits for nothing. What was saved at the end of the epoch is whole."""

    def stop(*args, **options):
        workers = multiprocessing.active_children()
        assert [os.kill(worker.pid, number) for worker in workers for number in NUMBERS]
        if (out / "checkpoint.pt").exists():  # so in step 3
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGINT)
            os._exit(1)  # not at once

    def run_alone():
        os.setpgrp()
        return run("--workers", 2)

    with preceded("train.mdpo_step", stop):
        assert ended(run_alone) == 130
    goes_on_to(finished, out)


def test_a_run_that_ended_changes_no_more(finished, copied, monkeypatch, capsys):
    """Resumed, it must neither train again, nor keep a broken log or half a file that a kill left behind."""
    began = (copied / "args.json").read_bytes()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    assert json.loads(began)["versions"] == versions and json.loads(began)["system"] == train.BUNNY_SYSTEM
    (copied / "metrics.jsonl").write_bytes(b"\xff\x00{")
    write(copied / "new.a1.tmp" / "adapter_model.safetensors", "half")
    write(copied / "x.tmp" / "mine", "")
    steps = counted(monkeypatch, train, "mdpo_step")
    assert resume(copied, "--workers", 1) == 0 and not steps and "4/4" in capsys.readouterr().err
    assert (copied / "args.json").read_bytes() == began
    assert_equal(adapter(copied), adapter(finished))
    assert log_of(copied) == log_of(finished) and [*copied.glob("*.tmp")] == [copied / "x.tmp"]


def test_a_run_goes_on_with_its_own_examples_only(stopped, mine, out, capsys):
    """With --skip-bad another record takes the place of one whose image is gone: half of the run, as well."""
    assert stopped(1, "--data", mine, "--skip-bad", "--limit", 6) == STOPPED
    (mine.parent / "images/0.png").unlink()  # it is among the six
    assert one_line_of(capsys, resume(out)).endswith("it began with other values of examples")


def test_a_run_goes_on_with_its_own_data_from_any_folder(
    bunny, small, finished, stopped, mine, out, tmp_path, monkeypatch, capsys
):
    """Contents of the data count, not where they lie. A model's name that hangs on the working folder would
    be asked of the hub. Training must neither see --eval-data nor change by them."""
    (tmp_path / "model").symlink_to(bunny)
    monkeypatch.chdir(tmp_path)
    flags = "--model model --data data/silkie.json --eval-data data/silkie.json --images data"
    assert stopped(2, *flags.split()) == STOPPED
    moved = out.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    other = write(mine.parent / "other.json", mine.read_text().replace("There is", "This is"))
    for flag in "--data", "--eval-data":
        line = one_line_of(capsys, resume("../moved", flag, other))
        assert line.endswith("it began with other values of data files")
    assert resume("../moved", "--data", small, "--micro-batch-size", 4) == 0
    torch.testing.assert_close(adapter(moved), adapter(finished), rtol=1e-5, atol=1e-5)
    assert steps_of(moved) == [0, 1, 2, 3, 4] and not out.exists()


# Each flag of train.py that decides the result, with a value that the run `finished` did not have.
DECIDING = (
    "--subset llava --limit 5 --eval-size 1 --skip-bad --no-image --max-pixels 999 --max-length 99 --seed 1 "
    "--reject moco --crop 0.2 0.5 --beta 0.2 --delta 0.1 --no-conditional --anchors none --epochs 4 --lr 1 "
    "--batch-size 2 --warmup 0.2 --betas 0.8 0.9 --weight-decay 0.1 --max-grad-norm 2 --lora-rank 8 "
    "--lora-alpha 4 --out x"
)


def test_every_flag_that_decides_the_result_is_the_runs_own(finished):
    """Changed in the middle, the result would be of neither value. All are named at once."""
    own = ["--resume", str(finished), "--model", "elsewhere"]
    names = ", ".join([*train.METHOD, "out"]).replace("-", " ")  # a new flag needs a value above
    with pytest.raises(BadInput, match=f"began with other values of {names}$"):
        train.parse_args([*own, *DECIDING.split()])
    same = "--betas 0.9 0.98 --crop 0.01 0.2 --anchors chosen"
    assert train.parse_args([*own, *same.split()]).model == "elsewhere"
    with pytest.raises(BadInput, match="other values of old flag"):  # which later code no longer has
        train.refuse_others({}, {"old_flag": 1})


def test_a_run_knows_its_base_weights(bunny):
    """With other numbers the second half would have another reference. The dtype does not matter."""
    model, _ = train.load_model(str(bunny))
    before = train.fingerprint(model)
    assert train.fingerprint(model.bfloat16()) == before
    model.lm_head.weight.data *= 1.1
    assert train.fingerprint(model) != before


def of_another_run(path):
    state = checkpoint_of(path.parent)
    torch.save(state | {"run": dict.fromkeys(state["run"], "other")}, path)


def of_another_model(path):
    torch.save(checkpoint_of(path.parent) | {"adapter": {"other": torch.ones(1)}}, path)


def changed(path):
    path.write_bytes(path.read_bytes().replace(b"loss", b"lost", 1))


def moved_away(path):
    """To a disk that is not there: the run would begin at step 0, over what there is."""
    (path.parent / "adapter_model.safetensors").unlink()
    path.unlink()
    path.symlink_to("not there")


DAMAGES = {  # what the line must say: a file of the run, and its bytes or what becomes of it
    "cannot be resumed: not valid JSON": ("args.json", b'{"model": '),
    "cannot be resumed: has no": ("args.json", b"{}"),
    "seed, data files, examples, system, base weights, loss": ("checkpoint.pt", of_another_run),
    "peft cannot load the adapters of this model": ("checkpoint.pt", of_another_model),
    "checkpoint.pt: cannot be resumed from: is damaged": ("checkpoint.pt", changed),
    "checkpoint.pt: cannot be resumed from: File is not": ("checkpoint.pt", b"half"),
    "cannot be resumed from: Weights only": ("checkpoint.pt", functools.partial(torch.save, os.system)),
    "checkpoint.pt: cannot be resumed from: [Errno 2] No such": ("checkpoint.pt", Path.unlink),
    "checkpoint.pt: cannot be resumed from: [Errno 2]": ("checkpoint.pt", moved_away),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_run_is_refused_and_left_as_it_is(copied, capsys, message):
    """Begun anew, it would replace its adapter. It can come from anybody: unpickled, it could do anything."""
    file, change = DAMAGES[message]
    if isinstance(change, bytes):
        (copied / file).write_bytes(change)
    else:
        change(copied / file)
    before = bytes_of(copied)
    line = one_line_of(capsys, resume(copied))
    assert message in line and str(copied) in line and bytes_of(copied) == before


@pytest.fixture
def lost(run, capsys):
    """`lost(key, lose, *flags)` is the line of a run in which lose() comes before the pair of this key."""

    def lost(key, lose, *flags):
        def get(self, other):
            if other == key:
                lose()

        with preceded("data.Pairs.__getitem__", get):
            line = one_line_of(capsys, run(*flags))
        gc.collect()  # torch ends the workers of a loader that is gone
        assert not multiprocessing.active_children()
        return line

    return lost


@pytest.mark.parametrize("ahead", [False, True])
def test_a_worker_that_dies_is_one_line(finished, lost, out, ahead):
    """Short of memory, the kernel kills it as the main process waits or, if it is ahead, in a step."""

    def die():
        while not ahead and not (out / "adapter_model.safetensors").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    line = lost(PLAN[2][0][0], die, "--workers", 1)
    assert "DataLoader worker" in line and "--workers 0" in line
    goes_on_to(finished, out)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_the_steps_before_an_image_that_vanishes_are_saved(finished, lost, out, workers, failing):
    """Storage that is gone for a moment must not cost an epoch, nor show a worker's page of traceback."""
    line = lost(PLAN[failing - 1][-1][-1], Mock(side_effect=GONE), "--workers", workers)
    said = "error: a process that loads data: image gone.png cannot be decoded"
    assert line.removesuffix("\\n") == said  # a traceback ends in a new line
    assert steps_of(out) == [*range(1, failing)]
    assert failing == 1 or checkpoint_of(out)["records"] == log_of(out)
    goes_on_to(finished, out)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_held_out_image_that_vanishes_loses_no_step_and_repeats_none(run, lost, out, tmp_path, epoch):
    """A checkpoint of moved weights and a log without their step would take that step twice."""
    in_time = Mock(side_effect=[None] * epoch + [GONE])  # the first time is before training
    assert "gone.png cannot be decoded" in lost(("held out", 0), in_time, "--eval-size", 2)
    assert run("--eval-size", 2, "--out", tmp_path / "whole") == 0
    goes_on_to(tmp_path / "whole", out)


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_nan_stops_the_run_and_saves_what_was_before_one_that_is_not_finite(run, out, capsys, wrong):
    """A NaN ruins the adapter in silence. A root's slope at 0 is infinite, its value is not."""
    seen = []

    def broken(policy_logps, *rest, batch, **options):
        seen.append(batch)
        losses, metrics = mdpo.mdpo_loss(policy_logps, *rest, **options)
        if len(seen) > 2:
            losses = losses + (math.inf if wrong == "loss" else (0 * policy_logps[0]).sqrt())
        return losses, metrics

    line = one_line_of(capsys, run(loss=functools.partial(broken)))  # an object, which has no name
    assert re.search("step 2: loss or gradient is not finite; examples: [1-7], [1-7], [1-7]$", line)
    assert len(checkpoint_of(out)["records"]) == 1


def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_stays_whole(finished, run, out, capsys):
    """The last checkpoint is all that is left of hours."""

    def fill(state, path):
        if len(state["records"]) == 3:
            path.write_bytes(b"half")
            raise RuntimeError("file write failed")  # as torch does

    with preceded("torch.save", fill):
        line = one_line_of(capsys, run("--save-every", 3))
    assert f"{out}: cannot be written to, as on a full disk" in line
    goes_on_to(finished, out)


def test_weights_that_became_infinite_are_not_saved(run, out, capsys):
    """The loss of the last step is finite; its update is looked at by nobody else."""
    overflow = lambda optimizer: optimizer.param_groups[0]["params"][-1].data[0, :1].fill_(math.inf)
    with preceded("torch.optim.AdamW.step", overflow):
        assert "made a weight infinite" in one_line_of(capsys, run("--epochs", 1, "--batch-size", 8))
    assert not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    (torch.OutOfMemoryError("CUDA"), "out of GPU memory; what saves some: --device cpu"),
    (MemoryError(), "MemoryError"),
])  # fmt: skip
def test_whose_fault_an_error_is_says_its_line(capsys, monkeypatch, error, said):
    """Whose disk or memory is full need not report it to us. Out of GPU memory, a run names its own flags."""
    broken = Mock(side_effect=error)
    assert data.run_command(broken, []) == 2 and capsys.readouterr().err == f"error: {said}\n"
    monkeypatch.setattr("train.parse_args", broken)
    assert train.main([]) == 2
    assert ("a lower --micro-batch-size" in capsys.readouterr().err) == ("GPU" in said)


def test_a_bug_is_shown_with_its_traceback(monkeypatch):
    """Who is told that the file is bad looks in the wrong place; to see the bug again may take hours."""
    monkeypatch.setattr("train.parse_args", lambda argv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([])


BAD_INPUTS = {  # flags, in which T/ is the test's folder: what the message must say
    "--model T/nowhere": "nowhere: cannot be loaded",
    "--model T/odd": "odd: cannot be loaded",
    "--model T/torn": "torn: cannot be loaded",
    "--model T/missing": "1 weights are missing, such as lm_head.weight",
    "--model T/surprise": "1 weights are unexpected, such as model.surprise",
    "--model T/sized": "weights are mismatched, such as ('model.language_model.layers.0",
    "--model T/blind": "holds no weights of a vision tower",
    "--data T/none.json": "none.json: no such file",
    "--subset llava": "no example is left with an id in 'llava'",
    "--images T/none": "no such image folder",
    "--eval-size 7": "leaves none of 7",
    "--max-length 20": "would drop 7 bad records",
    "--crop 0.5 0.2": "--crop: its minimum is above its maximum",
    "--crop 0.1 0.1 --reject moco": "--crop does nothing with another --reject",
    "--anchors none chosen": "--anchors none cannot be combined",
    "--anchors chosen none": "--anchors none cannot be combined",  # it would be taken back in silence
    "--anchors cropped": "invalid choice",
    "--no-image --anchors chosen image_rejected": "--no-image leaves no rejected image to anchor",
    "--epochs many": "invalid int value",
    "--resum x": "unrecognized arguments: --resum x",  # it would start another run, without a word
    "--device gpu": "cannot be loaded: Expected one of cpu, cuda",
    "--out T/empty.json/out": "cannot be written to",
    "--out T/\x1b[31mred": "--out: has control characters, or bytes that are no text",
    "--beta 0": "--beta: must be within 1e-12 to 1000000.0, got 0",
    "--lr inf": "must be within 1e-12 ",
    "--delta nan": "must be within -1000000.0 ",
    "--betas 0.9 1": "must be within 0 to 0.999999, ",
    "--epochs 0": "must be within 1 to 1000, ",
    "--batch-size 0": "must be within 1 to 1000000000, ",
    "--eval-size -1": "must be within 0 to 9223372036854775807, ",
} | dict.fromkeys(["--weight-decay=-1e-3", "--warmup 1.5", "--crop -1 0.2"], "must be within 0 to 1, ")


@pytest.fixture(scope="session")
def bad_files(bunny, tmp_path_factory):
    """A folder with the files that BAD_INPUTS names."""
    folder, shard = tmp_path_factory.mktemp("bad"), "model-00002-of-00002.safetensors"
    for name in "odd", "torn", "missing", "surprise", "sized", "blind":
        shutil.copytree(bunny, folder / name)
    os.truncate(folder / "torn" / shard, 1000)
    config, weights = json.loads((bunny / "config.json").read_text()), load_file(bunny / shard)
    write(folder / "odd/config.json", config | {"mm_vision_tower": "x-patch0-32"})
    write(folder / "sized/config.json", config | {"intermediate_size": 96})
    save_file(weights | {"model.surprise": torch.zeros(1)}, folder / "surprise" / shard)
    del weights["lm_head.weight"]
    save_file(weights, folder / "missing" / shard)
    for file in (folder / "blind").glob("*.safetensors"):
        save_file({k: weight for k, weight in load_file(file).items() if "vision_tower" not in k}, file)
    write(folder / "empty.json", [])
    return folder


@pytest.mark.parametrize("flags", BAD_INPUTS)
def test_bad_input_is_one_line_and_status_2(run, bad_files, out, capsys, flags):
    """A traceback tells nothing; what failed leaves nothing behind. Control characters set colours."""
    status = run(*flags.replace("T/", f"{bad_files}/").split(" "))
    assert BAD_INPUTS[flags] in one_line_of(capsys, status) and status == 2 and not out.exists()


def test_what_is_there_is_never_replaced(run, finished, copied, tmp_path, capsys):
    """Runs and files of the user stay. It is said before the data are read, which takes minutes."""
    file = Path(write(tmp_path / "mine" / ".env", "mine"))
    for taken in copied, file.parent, file:
        line = one_line_of(capsys, run("--data", tmp_path / "none.json", "--out", taken))
        assert line.endswith(f"already exists; choose another --out, or --resume {taken}")
    assert bytes_of(copied) == bytes_of(finished) and bytes_of(file.parent) == {".env": b"mine"}


HOSTILE = [
    *(None, -1, 10**400, math.nan, [], {}, [None], "", "\ud800", "\x1b[2J\n", "..", "a\0"),
    *("<image>", "a" * 5000, {"path": None}, {"role": "user", "content": 3}, [{"content": [{"text": "a"}]}]),
]


@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT, TURNS])
def test_no_record_is_a_traceback(folder, record):
    """None hides the good one; a long id would fill the terminal, and hide the reason."""
    good, long = authors(id="good"), authors(id="x" * 10**4, chosen="")
    hostile = HOSTILE + [record | {name: value} for name in record for value in HOSTILE]
    for some in train.split(hostile, 18):  # more are not named
        said = []
        records = read_examples(write(folder / "x.json", [good, long, *some]), skip_bad=True, log=said.append)
        lines = said[0].split("\n  ")
        assert all(line.isprintable() and len(line) < 3000 for line in lines)
        assert records[0].id == "good" and lines[1].endswith("'chosen': has no text")


def test_what_changes_speed_does_not_change_the_update(finished, run, out, monkeypatch):
    """Plain rows are the yardstick. Windows and macOS pickle what a worker is given. Groups of parameters are
    clipped as one, or some would take steps of any size."""

    def halve(self, parameters, *rest, **options):
        parameters[:] = [{"params": parameters[i::2]} for i in range(2)]

    def look(model, batch, **options):
        assert batch.take is None, "packed"

    spawning = functools.partial(train.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr("train.DataLoader", spawning)
    with preceded("torch.optim.AdamW.__init__", halve), preceded("train.mdpo_step", look):
        assert run("--layout", "plain", "--micro-batch-size", 1, "--workers", 1) == 0
    for name, tolerance in ("loss", 5e-5), ("grad_norm", 1e-3):
        ours, theirs = ([record[name] for record in log_of(of)] for of in (out, finished))
        assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.parametrize("flags, calls", [([], 2), (["--no-checkpointing"], 1)])
def test_activations_are_recomputed_unless_told_otherwise(run, flags, calls):
    """Without it a real model does not fit. A tower with batch norm differs in training mode, and a router
    adds noise: only a layer is in it, which would not be recomputed."""
    with_graph, in_training = [], []
    language = "transformers.models.phi.modeling_phi.PhiMLP.forward"
    vision = "transformers.models.siglip.modeling_siglip.SiglipMLP.forward"
    note_graph = preceded(language, lambda mlp, x: with_graph.append(torch.is_grad_enabled()))
    notes = [preceded(name, lambda mlp, x: in_training.append(mlp.training)) for name in (language, vision)]
    with note_graph, notes[0], notes[1]:
        assert run("--epochs", 1, "--eval-size", 2, *flags) == 0
    assert sum(with_graph) == 3 * 2 * calls  # micro-batches, layers; the 2 held out keep no graph
    assert in_training and not any(in_training)


def test_no_image_run_needs_no_images(run, mine, out):
    """Fig. 1's DPO (No Image). A margin of 0 between images that are not there reads as a blind model."""
    shutil.rmtree(mine.parent / "images")
    assert run("--no-image", "--eval-size", 1, "--data", mine) == 0
    held_out, first = log_of(out)[:2]
    assert first["loss"] == pytest.approx(math.log(2))
    assert "eval/rewards/margins" in held_out and not any("image" in name for name in held_out)


def test_workers_are_as_many_as_cores_send_arrays_and_start_no_gpu(tmp_path, bunny, monkeypatch):
    """Each takes a process's memory; a tensor takes shared memory, of which a container has 64 MB. --device
    cpu is what remains when the GPU is full: memory pinned for it would start it, and fail."""
    pairs, processor = data.Pairs(as_examples(tmp_path)), train.load_processor(str(bunny))
    args = train.parse_args("--model m --data d --layout plain --device cpu".split())
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for module in torch.cuda, torch.accelerator:
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(data.Batch, "pin_memory", lambda batch: pytest.fail("pinned"))
    for args.workers, n in (4, 2), (0, 0):
        batches = train.load_batches(pairs, [[(0, 0)], [(0, 1)]], mdpo.LogPs._fields, processor, args)
        next(batches)
        assert len(multiprocessing.active_children()) == n
        batches.close()
    sent = train.collate([pairs[0]], functools.partial(make_batch, processor=processor), "packed")
    assert not any(map(torch.is_tensor, [*vars(sent).values(), *sent.inputs.values()]))


def test_eval_data_are_held_out_as_well(bunny, small, out, tmp_path):
    """A file of one's own, with random images of its own, and of the others."""
    flags = "--eval-data", shapes.write_pairs(tmp_path / "more", 4, 1), "--reject", "random", "--skip-bad"
    next(tmp_path.rglob("more/**/*.png")).unlink()
    pairs = train.read_pairs(train.parse_args(command(bunny, small, out, *flags)), None)
    assert [(len(of), len(of.pool)) for of in pairs] == [(7, 7), (3, 7 + 3)]


def test_speed_is_in_examples_and_memory_in_gib(run, out, monkeypatch):
    """Counted in micro-batches, which take 2 seconds by this clock, the smallest would seem fastest."""
    micro_batches = counted(monkeypatch, train, "mdpo_step")
    monkeypatch.setattr("train.time", SimpleNamespace(perf_counter=lambda: 2.0 * len(micro_batches)))
    peaks = {None: 3 * 1024**3}  # of the CPU's device it would be an error, once CUDA has started
    monkeypatch.setattr("torch.cuda.max_memory_allocated", peaks.get)
    assert run("--epochs", 1) == 0
    speeds = [(record["examples_per_second"], record["peak_memory_gib"]) for record in log_of(out)]
    assert speeds == [(1, 3), (0.75, 3)]


def test_means_need_no_float64_of_the_device():
    """Apple's GPU has none: the first step ended in its error."""

    class OnApple(torch.Tensor):
        def double(self):
            raise TypeError("no float64")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    loss = torch.tensor([1.0, 2.0]).as_subclass(OnApple)
    assert train.means([{"loss": loss}]) == {"loss": 1.5}


def test_many_steps_are_planned_at_once():
    """Adding lists to a list anew took 12 seconds for 60,000 steps."""
    started = time.process_time()
    assert len(train.plan_steps(640_000, 32, 4, 3, 0)) == 60_000
    assert time.process_time() - started < 5  # CPU time; 1 second here


def test_help_shows_every_default(monkeypatch, capsys):
    """The README's memory and hours are of these. A 0 is a value as others are; what has none shows none."""
    monkeypatch.setenv("COLUMNS", "9999")
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    shown = capsys.readouterr().out
    ends = "the others (default: 0)", "config) (default: 2048)", "step (paper 4.1) (default: 32)"
    ends += "the result (default: 4)", "batches (default: 4)", "a cosine to 0 (paper 4.1) (default: 0.1)"
    assert not [end for end in ends if f"{end}\n" not in shown]
    assert not re.search(r"default: (None|False|\[\])", shown)


@pytest.mark.parametrize("output, status", [("| true", 141), (">&-", 0)])
def test_output_that_closes_is_no_traceback_and_one_that_nobody_reads_no_success(folder, output, status):
    """`| head -1` is how people look at a long report, and a script that goes on would take half of it for
    the whole; schedulers close the output of commands."""
    script = f"{sys.executable} {ROOT / 'data.py'} {write(folder / 'x.json', [authors()])} {output}"
    script = f"unset PYTHONUNBUFFERED; set -o pipefail; {script}"  # with it, nothing is left to be written
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == status and done.stderr == ""


@pytest.mark.parametrize("stderr", [SimpleNamespace(write=UNREAD, flush=UNREAD, isatty=bool), None])
def test_output_of_any_kind_ends_no_run(run, monkeypatch, stderr):
    """`| tee log`, and tee is gone; 2>&-; a notebook: steps would be lost for want of a progress bar."""
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run("--epochs", 1, "--limit", 1) == 0  # one example is enough


def test_a_log_file_takes_any_name_at_once_and_a_bar_every_ten_seconds(tmp_path):
    """In a bare container, where files are ASCII, a report on kätzchen.json was a traceback of codecs. A run
    at real size said nothing for 13 minutes. Ten bars a second would fill the file."""
    with open(tmp_path / "log", "w", encoding="ascii") as log, contextlib.redirect_stdout(log):
        said = data.run_command(lambda argv: print("kätzchen") or Path(log.name).read_text(), [])
    assert said == "k\\xe4tzchen\n"
    assert data.progress(range(3), "x", 3).mininterval == 10  # the tests' standard error is no terminal


def test_held_out_metrics_are_shown_after_each_epoch_and_kept_with_its_adapter(run, mine, out, capfd):
    """A run that goes wrong is seen in its first epoch, and the last is not always the best. The hub reads
    UTF-8 alone, a bare container writes ASCII. A server cannot read what is its writer's alone."""
    flags = "--eval-size 2 --beta 0.25 --no-conditional --anchors none --keep-epochs --save-every 1"

    def run_in_ascii():
        locale.setlocale(locale.LC_CTYPE, "C")
        return run(*flags.split(), "--data", mine.rename(mine.parent / "kätzchen.json"))

    assert ended(run_in_ascii) == 0
    first, *epochs = records = [record for record in log_of(out) if "eval/loss" in record]
    assert first["step"] == 0 and first["eval/loss"] == pytest.approx(math.log(2))
    assert "eval/rewards/image_margins" in first and "rewards/image_margins" not in epochs[0]
    before, *after = (f"{record['eval/loss']:.4f}" for record in records)
    printed = capfd.readouterr().out
    assert printed.startswith("reading and checking ")
    assert f"\ntraining on 5 examples, 2 held out, for 4 steps of 4 -> {out}\n" in printed
    shown = re.findall(r"epoch (.), held-out .*\n  loss +(\S+) +(\S+)\n", printed)
    assert shown == [("1", before, after[0]), ("2", before, after[1])]
    for folder, steps, now in (out / "epoch-1", 2, after[0]), (out, 4, after[1]):
        card = (folder / "README.md").read_text("utf-8")
        assert f"kätzchen.json: {steps} steps" in card and '"beta": 0.25' in card
        assert re.search(f"  loss +{before} +{now}\n", card)
    kept, latest = ({path.name for path in of.iterdir()} for of in (out / "epoch-2", out))
    # Half an epoch is none: 0.5 would be 0, and 1.5 be 2. The processor's files are kept: it can be asked.
    assert latest - kept == {"epoch-1", "epoch-2", "args.json", "metrics.jsonl", "checkpoint.pt"}
    assert_equal(adapter(out), adapter(out / "epoch-2"))
    with pytest.raises(AssertionError):
        assert_equal(adapter(out), adapter(out / "epoch-1"))
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~train.UMASK}


def test_the_model_card_is_yaml_whatever_the_names(bunny, tmp_path):
    """A quote in a name would end the value that the hub reads; paths of this machine tell names."""
    records = [{"step": 0, "eval/loss": 2}, {"step": 2, "eval/loss": 1}, {"step": 3, "loss": 0.7}]
    args = train.parse_args(["--model", 'a/b: "c"', "--data", str(tmp_path / "x.json")])
    _, front, text = train.model_card(args, records).split("---\n")
    assert front == 'base_model: "a/b: \\"c\\""\nlibrary_name: peft\ntags: [mdpo, lora]\n'
    assert re.search(r"\bloss +2.0000 +1.0000\n", text) and "x.json: 3 steps" in text
    args.model = str(bunny)
    local = train.model_card(args, records)
    assert str(tmp_path) not in local and str(bunny) not in local


def test_new_files_are_merged_with_those_beside_them(tmp_path, monkeypatch):
    """Processors save chat templates in a folder. Nothing can be renamed from the system's folder, which may
    be another disk. A copy that is cut off would leave neither file."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    write(tmp_path / "more" / "mine", "")
    target = Path(write(tmp_path / "more" / "template.jinja", "the old one"))
    with open(target) as reader:
        with train.replacing(tmp_path) as new:
            write(new / "more" / "template.jinja", "new")
        assert reader.read() == "the old one"
    assert bytes_of(tmp_path / "more") == {"template.jinja": b"new", "mine": b""}


def test_without_out_each_run_gets_its_own_folder(out):
    """Two runs in one folder could not be resumed."""
    assert [train.new_folder(out / "x") for _ in range(2)] == [f"{out}/x-1", f"{out}/x-2"]
