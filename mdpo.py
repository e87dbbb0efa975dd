"""mDPO: Conditional Preference Optimization for Multimodal Large Language Models (arXiv:2406.11839).

    m_w   image, as the question is about it      y_w   chosen response
    m_l   rejected image: by default a crop of    y_l   rejected response
          m_w that keeps 1-20% of its area        q     question (prompt)
    pi    policy: the model with its adapter      pi_ref  reference: the same model without it
    beta  strength of the KL constraint           delta   anchor, in units of reward

The reward of a response is implicit in its log-probability (section 2.1):

    r(m, q, y) = beta * (log pi(y | m, q) - log pi_ref(y | m, q))

    DPO_m   -log sigmoid(r(m_w, q, y_w) - r(m_w, q, y_l))      eq. 5   prefer the better response
    CoPO    -log sigmoid(r(m_w, q, y_w) - r(m_l, q, y_w))      eq. 6   prefer the image that supports it
    AncPO   -log sigmoid(r(m_w, q, y_w) - delta)               eq. 7   keep the chosen response likely
    mDPO    DPO_m + CoPO + AncPO                               eq. 8

The paper does not number its equations; 5 to 8 are counted. CoPO works for any modality: read m_w and m_l as the context
that supports y_w and a worse one.

Departures from the authors' code, which change no equation: policy and reference see the same m_l, made with the data;
an example is two packed sequences in place of three padded ones (see "Speed" below).

Only torch is imported here. To use the loss elsewhere, copy this file down to `mdpo_step`.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F


class LogPs(NamedTuple):
    """Log-probabilities of whole responses, in nats: float tensors of shape (B,), summed over the response's tokens."""

    chosen: torch.Tensor  # log pi(y_w | m_w, q)
    rejected: torch.Tensor  # log pi(y_l | m_w, q)
    image_rejected: torch.Tensor | None = None  # log pi(y_w | m_l, q); None where no term needs it


def mdpo_loss(policy_logps, ref_logps, beta=0.1, delta=0.0, conditional=True, anchors=("chosen",)):
    """mDPO (eq. 8) and its ablations: two `LogPs`, or plain tuples in that order, -> losses (B,) and metrics.

    beta > 0 and delta: paper 4.1 has 0.1 and 0. conditional=False: Table 2, minus conditional. anchors: names of the
    anchored rewards (Table 4); (): Table 2, minus anchored. With neither this is DPO. Half precision is raised to float32.
    Metrics are detached, (B,) each: losses, rewards and margins in nats, accuracies 0 or 1.
    Raises ValueError that names the argument with a wrong value, shape or type.
    """
    needed = {"chosen", "rejected", "image_rejected"} if conditional else {"chosen", "rejected"}
    r = rewards(policy_logps, ref_logps, beta, needed, anchors)
    terms = {"dpo": -F.logsigmoid(r["chosen"] - r["rejected"])}  # eq. 5, DPO_m
    if conditional:
        terms["conditional"] = -F.logsigmoid(r["chosen"] - r["image_rejected"])  # eq. 6, CoPO
    if anchors:
        distances = [r[name] - delta if name == "chosen" else delta - r[name] for name in r if name in anchors]
        terms["anchor"] = sum(-F.logsigmoid(distance) for distance in distances)  # eq. 7, AncPO; more anchors: Table 4
    losses = sum(terms.values())  # eq. 8, mDPO

    metrics = {f"loss/{name}": term for name, term in terms.items()}
    metrics |= {f"rewards/{name}": reward for name, reward in r.items()}
    margins = {"": r["chosen"] - r["rejected"]}
    if "image_rejected" in r:
        margins["image_"] = r["chosen"] - r["image_rejected"]
    for kind, margin in margins.items():
        metrics |= {f"rewards/{kind}accuracies": (margin > 0).float(), f"rewards/{kind}margins": margin}
    return losses, {name: values.detach() for name, values in metrics.items()}


def rewards(policy_logps, ref_logps, beta, needed, anchors):
    """Checks the arguments of `mdpo_loss` -> {name of a log-probability: its reward r, (B,), at least float32}.

    needed, with anchors: the names that must be there; others may be None on both sides, and are left out.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
    if isinstance(anchors, str) or not set(anchors) <= set(LogPs._fields):
        raise ValueError(f"anchors must be a tuple of names among {LogPs._fields}, got {anchors!r}")
    r = {}
    for name, policy, ref in zip(LogPs._fields, LogPs(*policy_logps), LogPs(*ref_logps)):
        if policy is None and ref is None and name not in {*needed, *anchors}:
            continue
        for side, logp in ("policy_logps", policy), ("ref_logps", ref):
            if not (torch.is_tensor(logp) and logp.is_floating_point()):
                raise ValueError(f"{side}.{name} must be a float tensor, got {getattr(logp, 'dtype', logp)}")
            if logp.ndim != 1 or len(logp) != len(policy_logps[0]):
                raise ValueError(f"{side}.{name} must have shape (B,) as policy_logps.chosen, got {tuple(logp.shape)}")
        if ref.requires_grad:
            raise ValueError(f"ref_logps.{name} requires grad, but the reference is frozen: are the two swapped?")
        dtype = torch.promote_types(policy.dtype, torch.float32)
        r[name] = beta * (policy.to(dtype) - ref.to(dtype))
    return r


def sequence_logps(logits, labels):
    """Log-probabilities of whole responses: logits (B, T, V), labels (B, T) -> (B,) float32, in nats.

    labels: the input ids, with -100 where nothing counts: prompt, image and padding. The end-of-sequence token counts.
    """
    logps, labels = logits[:, :-1].float().log_softmax(-1), labels[:, 1:]  # position t predicts token t + 1
    logps = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]  # (B, T - 1)
    return logps.masked_fill(labels == -100, 0).sum(-1)


def mdpo_step(model, batch, loss=mdpo_loss, ref_model=None, **options):
    """One forward pass of mDPO: a batch of `data.make_batch` -> losses (B,), with gradient, and metrics (B,).

    model: wrapped by peft. ref_model: the reference; by default `model` without its adapter.
    loss: any function of (policy_logps, ref_logps, **options) -> losses, metrics.
    """
    inputs = forward_inputs(model, batch)  # images are encoded once, for policy and reference
    with torch.no_grad():
        if ref_model is not None:
            ref_logps = response_logps(ref_model, batch)
        else:
            with model.disable_adapter():
                ref_logps = response_logps(model, batch, inputs)
    policy_logps = response_logps(model, batch, inputs)
    losses, metrics = loss(policy_logps, ref_logps, **options)
    return losses, {"loss": losses.detach(), **metrics}


def response_logps(model, batch, inputs=None):
    """Log-probabilities of the responses in a batch of `data.make_batch` -> `LogPs` of (B,) float32; gradients flow.

    model: an image-text-to-text model of transformers, plain or wrapped by peft.
    inputs: `forward_inputs(model, batch)`, so that two passes can share them.
    Raises ValueError for packed rows where the model's attention is not `packed_attention`.
    """
    inputs = forward_inputs(model, batch) if inputs is None else inputs
    logits = model(**inputs).logits.float()  # (R, K, V): only the positions that predict a response token
    logps = -F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")  # 0 for target -100
    sums = torch.stack([tokens.sum() for tokens in logps.split(batch["n_targets"])])
    return LogPs(**dict(zip(batch["names"], sums.view(len(batch["names"]), -1))))


# --------------------------------------------------------------------------- Speed: the same numbers with less work
#
# 1. Policy and reference share the encoding of each image, since vision tower and projector are frozen.
# 2. Most tokens are the image's. y_w and y_l share one prefix, so an example is two sequences in place of three.
# 3. All sequences of a batch lie end to end in one row, without padding. Its attention is a list of blocks:
#
#        token       m_w m_w q   q   y_w y_w y_w y_l y_l m_l m_l q   q   y_w y_w y_w  m_w ...
#        position    0   1   2   3   4   5   6   4   5   0   1   2   3   4   5   6    0  ...
#        block       |---- causal ------------|       |  |---- causal -------------|
#                                              |prefix + itself|
# 4. Logits are computed only where a response token is predicted.


def forward_inputs(model, batch):
    """What the model's forward pass is called with, for both passes over a batch."""
    inputs = {name: batch[name] for name in ("input_ids", *batch["processor_keys"])}
    inputs |= {"logits_to_keep": batch["predictors"], "use_cache": False}
    image_features = encode_images(model, batch)
    if image_features is not None:
        del inputs["pixel_values"]
        inputs["mm_encoder_outputs"] = {"image": image_features}
    if batch["lengths"] is None:  # plain rows, padded on the right, where no token of a response looks: no mask is needed
        return inputs
    implementation = unwrapped(model).config.get_text_config()._attn_implementation
    if implementation != "packed":
        raise ValueError(f"packed rows need `use_packed_attention(model)`; its attention is {implementation!r}")
    device, n_tokens = batch["input_ids"].device, batch["input_ids"].shape[1]
    return inputs | {
        "position_ids": packed_positions(model, batch),
        "blocks": attention_blocks(batch["lengths"], device),
        # The library builds no mask of its own where it is given one in four dimensions. This is one number, expanded.
        "attention_mask": torch.ones((), dtype=torch.bool, device=device).expand(1, 1, n_tokens, n_tokens),
    }


def encode_images(model, batch):
    """The output of the model's own `get_image_features` for all images of the batch.

    None if there are none, or if the model's forward pass does not accept precomputed features.
    Raises ValueError if vision tower or projector are trained: their output could not be shared with the reference.
    """
    model = unwrapped(model)
    if "pixel_values" not in batch or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return None
    features = model.get_image_features(**known_arguments(model.get_image_features, batch))
    pooled = features.pooler_output
    if any(tensor.requires_grad for tensor in (pooled if isinstance(pooled, (tuple, list)) else [pooled])):
        raise ValueError("vision tower and projector must be frozen: policy and reference share their output")
    return features


def known_arguments(function, batch):
    return {name: batch[name] for name in inspect.signature(function).parameters if name in batch}


def unwrapped(model):
    """The library's model, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_packed_attention(model):
    """Let the language model attend by `packed_attention`, which is SDPA for everything but packed rows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)  # plain rows and generation keep SDPA's masks
    model.set_attn_implementation({"text_config": "packed"})


def attention_blocks(lengths, device=None):
    """lengths of `data.make_batch` -> [(number of tokens, number of prefix tokens that they see too, mask)].

    A sequence's prefix and first response are one causal block, which needs no mask. Each further response is a block of
    its own: its tokens see the prefix and those of itself up to each, by a boolean mask (1, 1, n, prefix + n).
    """
    blocks = []
    for prefix, first, *others in lengths:
        blocks.append((prefix + first, 0, None))
        for n in others:
            blocks.append((n, prefix, torch.ones(1, 1, n, prefix + n, dtype=torch.bool, device=device).tril(prefix)))
    return blocks


def packed_attention(module, query, key, value, attention_mask, blocks=None, **options):
    """Attention of a packed row, block by block: (1, H, N, D) -> (1, N, H, D). A function of `AttentionInterface`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # One split a tensor: its backward pass is one concatenation, where a slice's would be as long as the row.
    queries, keys, values = (tensor.split([n for n, *_ in blocks], dim=2) for tensor in (query, key, value))
    outputs = []
    for i, (_, prefix, mask) in enumerate(blocks):
        if mask is None:
            start, k, v = i, keys[i], values[i]  # the block that holds the prefix of those that follow
        else:
            k, v = (torch.cat([side[start][:, :, :prefix], side[i]], dim=2) for side in (keys, values))
        outputs.append(sdpa_attention_forward(module, queries[i], k, v, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def packed_positions(model, batch):
    """Position ids of a packed row: (1, N), or (3, 1, N) for models that give image tokens positions in space (Qwen-VL).

    Their own `get_rope_index` takes the row for one sequence. A sequence by itself has the same positions less that of its
    first token. Where y_l is concerned: it stands as far behind the prefix as y_w does, whose positions it gets.
    """
    positions = batch["position_ids"]  # (1, N): counted from each sequence's start; y_l's from the prefix's end
    rope_index = getattr(unwrapped(model).base_model, "get_rope_index", None)
    if rope_index is None or "pixel_values" not in batch:
        return positions
    of_row, _ = rope_index(**known_arguments(rope_index, batch), attention_mask=torch.ones_like(positions))  # (3, 1, N)
    n_tokens = torch.tensor([sum(sequence) for sequence in batch["lengths"]], device=positions.device)
    starts = (n_tokens.cumsum(0) - n_tokens).repeat_interleave(n_tokens, output_size=positions.shape[1])  # (N,)
    read = lambda index: of_row.gather(-1, index.expand_as(of_row))
    return read(starts + positions) - read(starts)
