"""Fixtures that several files share, and those of test_mdpo.py."""

# Before torch: it sets the number of threads.
from test_mdpo import (  # noqa: F401, I001
    bunny,
    family,
    finished,
    folder,
    llava,
    loaded,
    signals_are_heard,
    six_epochs,
    small,
    with_lora,
)

import pytest
import torch


@pytest.fixture(scope="session")
def adapted(bunny, tmp_path_factory):  # noqa: F811
    """An adapter of random weights, in a run's folder: it changes every answer's log-probability by more than
    a nat."""
    model, _ = with_lora(bunny)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out := tmp_path_factory.mktemp("runs") / "adapted")
    return out
