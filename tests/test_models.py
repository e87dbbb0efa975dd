"""Models: what training makes of them, and how packed rows are checked before they are trained on."""

import pytest
import torch

import mdpo
import train
from data import make_batch
from mdpo import mdpo_step
from test_mdpo import PAIRS, with_lora

# ----------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("name", ["resid_pdrop", "attn_drop", "drop_prob", "attention_dropout", "dropout"])
def test_every_rate_of_dropout_is_0(name):
    """Models call it as they like. Left on, policy and reference differ by chance: rewards are noise."""
    layer = torch.nn.Linear(1, 1)
    setattr(layer, name, 0.1)
    model = torch.nn.Sequential(layer, torch.nn.Dropout(0.1))
    train.disable_dropout(model)
    assert getattr(layer, name) == 0 and model[1].p == 0


# ------------------------------------------------------------------------------------- the check of the rows


def test_rows_that_are_nan_are_not_exact(llava, monkeypatch):
    """Where a model keeps an attention of its own, packed rows are nan on purpose: above no
    tolerance."""
    model, processor = train.load_model(str(llava))
    monkeypatch.setattr(mdpo, "use_packed_attention", lambda *args, **kwargs: None)
    assert train.choose_layout(model, processor, PAIRS[:2]) == "plain"


def test_one_wrong_row_of_six_is_enough(llava, monkeypatch):
    """Mistakes of packing are of single rows: an example's first row is always right. Two pairs have six
    rows; one log-probability is off by twice what is accepted, so that their mean is a third of it."""
    model, processor = train.load_model(str(llava))
    response_logps = train.response_logps

    def one_off(model, batch, *args, **kwargs):
        logps = response_logps(model, batch, *args, **kwargs)
        if batch.take is not None:
            n_tokens = (batch.labels[-1] >= 0).sum()
            logps.image_rejected[-1] += 2 * train.TOLERANCE * n_tokens.sqrt()
        return logps

    assert train.choose_layout(model, processor, PAIRS[:2]) == "packed"
    monkeypatch.setattr(train, "response_logps", one_off)
    assert train.choose_layout(model, processor, PAIRS[:2]) == "plain"


# ------------------------------------------------------------------------------------------- a step by hand


def test_options_of_a_step_scale_its_rewards_or_are_refused(bunny):
    """Who writes a training loop sets them here. A wrong name that is swallowed trains with the defaults."""
    model, processor = with_lora(bunny)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch(PAIRS, processor)
    _, small = mdpo_step(model, batch, beta=0.1)
    _, large = mdpo_step(model, batch, beta=0.5)
    for name in "rewards/chosen", "rewards/rejected", "rewards/image_rejected":
        torch.testing.assert_close(large[name], 5 * small[name])
        assert small[name].abs().min() > 0
    with pytest.raises(TypeError, match="bta"):
        mdpo_step(model, batch, bta=0.5)


def test_no_metric_of_a_step_keeps_its_graph(bunny):
    """A log of them would hold the activations of every step in memory."""
    model, processor = with_lora(bunny)
    losses, metrics = mdpo_step(model, make_batch(PAIRS[:1], processor))
    assert losses.requires_grad and "loss" in metrics
    assert not [name for name, value in metrics.items() if value.requires_grad]
