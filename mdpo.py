"""mDPO: Conditional Preference Optimization for Multimodal Large Language Models (arXiv:2406.11839).

An example is an image `m_w`, a question `q`, a chosen response `y_w`, a rejected response `y_l`, and a rejected image
`m_l` made from `m_w` (by default a crop that keeps 1-20% of it). With the implicit reward

    r(m, q, y) = beta * (log pi(y | m, q) - log pi_ref(y | m, q))

mDPO adds to DPO a preference between two *images* for the same words, and a floor under the chosen reward:

    mDPO (eq. 8) = DPO_m (eq. 5) + CoPO (eq. 6) + AncPO (eq. 7)

This file is the method and nothing else: `mdpo_loss`, made to be copied into other trainers, and the log-probabilities
it needs, `response_logps`, for a batch made by `data.make_batch`. Of packages it imports torch alone.

Where it departs from the authors' code (the README says why):
- one rejected image an example, made with the data, so that policy and reference see the same;
- two packed sequences an example instead of three, no padding, each image encoded once, logits of response tokens only:
  the same numbers.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F


class LogPs(NamedTuple):
    """Log-probabilities of whole responses, in nats: float tensors of shape (B,), summed over the tokens."""

    chosen: torch.Tensor  # log pi(y_w | m_w, q)
    rejected: torch.Tensor  # log pi(y_l | m_w, q)
    image_rejected: torch.Tensor | None = None  # log pi(y_w | m_l, q); None where no term asks for it


def mdpo_loss(policy_logps, ref_logps, beta=0.1, delta=0.0, conditional=True, anchors=("chosen",)):
    """The mDPO objective (eq. 8) and its ablations, one loss per example.

    policy_logps, ref_logps: two `LogPs` (or plain triples in that order) of (B,) float tensors, in nats.
        Half precision is raised to float32 first; the reference must not require grad.
    beta: strength of the KL constraint, > 0 (paper 4.1: 0.1). delta: the anchor, in units of reward (paper 4.1: 0).
    conditional: keep eq. 6 (False: Table 2, minus conditional). With `anchors=()` too, this is DPO.
    anchors: any of "chosen" (eq. 7), "rejected", "image_rejected" (Table 4); (): Table 2, minus anchored.
    Returns losses (B,), with gradient, and a dict of detached (B,) metrics: losses, rewards and margins in nats, accuracies 0
        or 1; without image_rejected (None is allowed where no term needs it) its metrics are left out. Raises ValueError naming the argument that is wrong.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
    if isinstance(anchors, str) or not set(anchors) <= set(LogPs._fields):
        raise ValueError(f"anchors must be a tuple of names among {LogPs._fields}, got {anchors!r}")
    r = {}  # the rewards, (B,) each
    for name, policy, ref in zip(LogPs._fields, LogPs(*policy_logps), LogPs(*ref_logps)):
        if name == "image_rejected" and policy is ref is None and not conditional and name not in anchors:
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

    margin = r["chosen"] - r["rejected"]
    metrics = {"loss/dpo": -F.logsigmoid(margin)}  # eq. 5, DPO_m
    if "image_rejected" in r:
        image_margin = r["chosen"] - r["image_rejected"]
    if conditional:
        metrics["loss/conditional"] = -F.logsigmoid(image_margin)  # eq. 6, CoPO
    if anchors:
        toward = {"chosen": 1, "rejected": -1, "image_rejected": -1}  # which side of delta the reward belongs on
        metrics["loss/anchor"] = sum(-F.logsigmoid(toward[a] * (r[a] - delta)) for a in r if a in anchors)  # eq. 7, Table 4
    losses = sum(metrics.values())  # eq. 8, mDPO

    metrics |= {f"rewards/{name}": reward for name, reward in r.items()}
    metrics |= {"rewards/accuracies": (margin > 0).float(), "rewards/margins": margin}
    if "image_rejected" in r:
        metrics |= {"rewards/image_accuracies": (image_margin > 0).float(), "rewards/image_margins": image_margin}
    return losses, {name: values.detach() for name, values in metrics.items()}


def encode_images(model, batch):
    """What the model makes of the batch's images: its own `get_image_features` output, for `response_logps`.

    The vision tower and the projector are frozen in mDPO training, so policy and reference can share one encoding.
    None for a batch without images, and for a model whose forward pass cannot be given them encoded.
    """
    model = unwrapped(model)
    if "pixel_values" not in batch or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return None
    accepted = inspect.signature(model.get_image_features).parameters
    with torch.no_grad():
        return model.get_image_features(**{name: batch[name] for name in batch["processor_keys"] if name in accepted})


def unwrapped(model):
    """The library's model, out of peft's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class PackedMask(torch.Tensor):
    """The attention mask of sequences that lie end to end in one row: a token sees the prefix and its own response.

    lengths: of each sequence, the number of tokens of its prefix (image and question) and of each of its responses.
    To a model it is a boolean mask (1, 1, N, N), one number expanded, which it hands on to SDPA as it is. There the call
    becomes one of `packed_attention`.
    """

    @staticmethod
    def __new__(cls, lengths, device=None):
        one, n_tokens = torch.ones((), dtype=torch.bool, device=device), sum(map(sum, lengths))
        mask = one.expand(1, 1, n_tokens, n_tokens).as_subclass(cls)
        mask.lengths = lengths
        # What each response but a sequence's first sees: the prefix, and its own tokens up to each.
        mask.sees = [[one.expand(n, prefix + n).tril(prefix) for n in others] for prefix, _, *others in lengths]
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return packed_attention(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs or {})


def packed_attention(query, key, value, attn_mask, **options):
    """SDPA under a `PackedMask`: (1, H, N, D) -> (1, H, N, D), every sequence by itself, so no N x N scores exist.

    A sequence's prefix and first response are one causal block, for which attention has its fastest kernels. Each further
    response is a small block of its own, of which the prefix is seen.
    """
    sizes = [n for prefix, first, *others in attn_mask.lengths for n in (prefix + first, *others)]
    # One split a tensor: its backward pass is one concatenation, where each slice's would be as long as the row.
    blocks = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)))
    outputs = []
    for (prefix, *_), masks in zip(attn_mask.lengths, attn_mask.sees):
        q, k, v = next(blocks)
        outputs.append(F.scaled_dot_product_attention(q, k, v, **options | {"is_causal": True}))
        for sees, (q, *own) in zip(masks, blocks):
            k, v = (torch.cat([seen[:, :, :prefix], mine], 2) for seen, mine in zip((k, v), own))
            outputs.append(F.scaled_dot_product_attention(q, k, v, sees, **options))
    return torch.cat([output.transpose(1, 2) for output in outputs], 1).transpose(1, 2)  # (1, N, H, D) in memory


def packed_positions(model, batch):
    """Position ids of packed rows: (1, N), or (3, 1, N) for a model that places an image's tokens in space (Qwen-VL)."""
    positions = batch["position_ids"]
    rope_index = getattr(unwrapped(model).base_model, "get_rope_index", None)
    if rope_index is None or "pixel_values" not in batch:
        return positions
    accepted = inspect.signature(rope_index).parameters
    known = {name: batch[name] for name in ("input_ids", *batch["processor_keys"]) if name in accepted}
    in_a_line, _ = rope_index(**known, attention_mask=torch.ones_like(positions))  # as if all followed one another
    lengths = torch.tensor([sum(sequence) for sequence in batch["lengths"]], device=positions.device)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=positions.shape[1])  # (N,)
    at = lambda index: in_a_line.gather(-1, index.expand_as(in_a_line))
    return at(starts + positions) - at(starts)


def token_logps(model, batch, image_features=None):
    """Log-probability of each token in batch["targets"]: (R, K) float32, in nats. Arguments as of `response_logps`."""
    inputs = {name: batch[name] for name in ("input_ids", *batch["processor_keys"])}
    inputs |= {"logits_to_keep": batch["predictors"], "use_cache": False}
    if "lengths" in batch:
        implementation = model.config.get_text_config()._attn_implementation
        if implementation != "sdpa":
            raise ValueError(f"packed rows need attn_implementation='sdpa', the model has {implementation!r}")
        inputs["attention_mask"] = PackedMask(batch["lengths"], batch["input_ids"].device)
        inputs["position_ids"] = packed_positions(model, batch)
    else:
        inputs["attention_mask"] = batch["attention_mask"]
    if image_features is None:
        image_features = encode_images(model, batch)
    if image_features is not None:
        del inputs["pixel_values"]
        inputs["mm_encoder_outputs"] = {"image": image_features}

    logits = model(**inputs).logits.float()  # (R, K, V): only the K positions that predict a response token
    logps = -F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")  # (R * K,)
    return logps.view_as(batch["targets"])


def response_logps(model, batch, image_features=None):
    """Summed log-probabilities of the responses in a batch of `data.make_batch`; gradients flow.

    model: an image-text-to-text model of transformers, plain or wrapped by peft.
    batch: one packed row of sequences, [m_w|q|y_w|y_l] and [m_l|q|y_w], or plain rows of one response each.
    image_features: of `encode_images(model, batch)`, so that two passes can share them; encoded here if None.
    Returns `LogPs` of (B,) float32 tensors in nats, end-of-sequence included.
    Raises ValueError for a packed row under an attention implementation other than SDPA, which its mask is made for.
    """
    logps = token_logps(model, batch, image_features)
    n_fields, n_examples = 3 if batch["has_image_rejected"] else 2, batch["batch_size"]
    slots = torch.arange(n_fields * n_examples, device=logps.device)[:, None]
    sums = torch.where(batch["slots"].flatten() == slots, logps.flatten(), 0).sum(1)  # (n_fields * B,)
    return LogPs(*sums.view(n_fields, n_examples))
