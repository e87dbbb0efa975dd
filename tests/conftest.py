"""Fixtures that several files share, and those of test_mdpo.py."""

# Before torch: it sets the number of threads.
from test_mdpo import bunny, finished, folder, llava, loaded, move  # noqa: F401, I001
from test_mdpo import signals_are_heard, six_epochs, small, with_lora  # noqa: F401

import shlex

import pytest
import torch

import train
from data import run_command
from examples import families


@pytest.fixture(autouse=True)
def threads():
    """A test that leaves another number of threads changes the last bits of runs behind it."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function: a script, its command line, its exit status -> what it prints. All in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def run(script, line, status=0):
        assert run_command(script.run, shlex.split(line)) == status
        return "".join(capsys.readouterr())

    return run


@pytest.fixture(scope="session", params=families.FAMILIES)
def family(request, tmp_path_factory):
    """(folder, model, processor) of a tiny random model of each family."""
    path = families.write_family(request.param, tmp_path_factory.mktemp("families") / request.param)
    return path, *train.load_model(str(path))


@pytest.fixture(scope="session")
def adapted(bunny, tmp_path_factory):  # noqa: F811
    """An adapter of random weights, in a run's folder: it moves every answer's log-probability by nats."""
    model, _ = with_lora(bunny)
    torch.manual_seed(3)
    move(model, std=0.2)
    model.save_pretrained(out := tmp_path_factory.mktemp("runs") / "adapted")
    return out
