"""A run on machines unlike ours, and its files: whoever opens them, and whatever they are called."""

import json
import multiprocessing
import os
import stat
import time

import pytest

import train
from data import BadInput
from test_mdpo import adapter, command, finished, log_of, one_line_of, small  # noqa: F401


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
