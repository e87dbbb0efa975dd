"""A run on machines unlike ours, and its files: whoever opens them, and whatever they are called."""

import json
import locale
import multiprocessing
import os
import shutil
import signal
import stat

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data import BadInput
from mdpo import mdpo_loss
from test_mdpo import adapter, command, finished, log_of, one_line_of, small, stopped_at  # noqa: F401


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
    assert not (tmp_path / "without").exists()


def test_held_out_metrics_are_shown_after_each_epoch(bunny, small, tmp_path, capsys):  # noqa: F811
    """A run that goes wrong is seen in its first epoch, not at its end."""
    out = tmp_path / "out"
    assert train.main([*command(bunny, small, out), "--eval-size", "2"]) == 0
    printed = capsys.readouterr().out
    for epoch, record in enumerate([r for r in log_of(out) if "eval/loss" in r and r["step"]], 1):
        assert f"epoch {epoch}, held out: loss {record['eval/loss']:.4f}, rewards/accuracies" in printed


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
    assert line == "error: --out: control characters, or bytes that are no text, in a name"


def test_many_steps_are_planned_at_once():
    """Adding lists to a list anew took 12 seconds for 60,000 steps."""
    started = time.process_time()
    assert len(train.plan_steps(640_000, 32, 4, 3, 0)) == 60_000
    assert time.process_time() - started < 10  # CPU time; 1 second here


# --------------------------------------------------------------------------------------------- files of a run


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


# ---------------------------------------------------------------------------------------------- steps and log


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


# ---------------------------------------------------------------------------------------------- a run goes on

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


# ---------------------------------------------------------------------------------------------------- signals


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
