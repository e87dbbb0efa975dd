"""mDPO: Conditional Preference Optimization for Multimodal Large Language Models (arXiv:2406.11839).

    m_w   image that the question is about        y_w   chosen response
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

The paper does not number its equations; 5 to 8 is their order of appearance (6 in section 3.1, 7 and 8 in
3.2). CoPO works for any modality: read m_w as the context that supports y_w, and m_l as a worse one.

Two departures from the authors' code, which change no equation: policy and reference see the same m_l, which
is made with the data; an example is two packed sequences instead of three padded ones (see "Speed" below).

To use the loss elsewhere, copy the part above `mdpo_step`: it needs only torch.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F


class LogPs(NamedTuple):
    """Log-probabilities of whole responses, summed over tokens, in nats: float tensors of shape (B,)."""

    chosen: torch.Tensor  # log pi(y_w | m_w, q)
    rejected: torch.Tensor  # log pi(y_l | m_w, q)
    image_rejected: torch.Tensor | None = None  # log pi(y_w | m_l, q); None where no term needs it


def mdpo_loss(policy_logps, ref_logps, beta=0.1, delta=0.0, conditional=True, anchors=("chosen",)):
    """mDPO (eq. 8) and its ablations: two `LogPs`, or plain tuples in that order -> losses (B,), metrics.

    beta, delta: 0.1 and 0 in the paper (4.1). conditional=False: Table 2, minus conditional.
    anchors: names of the anchored rewards (Table 4); (): Table 2, minus anchored. With neither, this is DPO.
    Half precision is raised to float32. Metrics are detached (B,) tensors, in nats; accuracies are 0 or 1.
    Raises ValueError that names the beta, anchor or log-probability that is wrong.
    """
    needed = {"chosen", "rejected", "image_rejected"} if conditional else {"chosen", "rejected"}
    r = rewards(policy_logps, ref_logps, beta, needed, anchors)
    terms = {"dpo": -F.logsigmoid(r["chosen"] - r["rejected"])}  # eq. 5, DPO_m
    if conditional:
        terms["conditional"] = -F.logsigmoid(r["chosen"] - r["image_rejected"])  # eq. 6, CoPO
    if anchors:
        distance = lambda name: r[name] - delta if name == "chosen" else delta - r[name]  # last: Table 4
        terms["anchor"] = sum(-F.logsigmoid(distance(name)) for name in r if name in anchors)  # eq. 7, AncPO
    losses = sum(terms.values())  # eq. 8, mDPO

    metrics = {f"loss/{name}": term for name, term in terms.items()}
    metrics |= {f"rewards/{name}": reward for name, reward in r.items()}
    for kind, worse in ("", "rejected"), ("image_", "image_rejected"):
        if worse in r:
            margin = r["chosen"] - r[worse]
            metrics |= {f"rewards/{kind}accuracies": (margin > 0).float(), f"rewards/{kind}margins": margin}
    return losses, {name: values.detach() for name, values in metrics.items()}


def rewards(policy_logps, ref_logps, beta, needed, anchors):
    """Check the arguments of `mdpo_loss` -> {name of a log-probability: its reward r (B,), at least float32}.

    The names in `needed` and `anchors` must be given; others may be None in both, and are skipped.
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
            if not (torch.is_tensor(logp) and logp.is_floating_point() and logp.ndim == 1
                    and len(logp) == len(policy_logps[0])):  # fmt: skip
                got = f"{logp.dtype} of shape {tuple(logp.shape)}" if torch.is_tensor(logp) else logp
                raise ValueError(f"{side}.{name} must be floats of shape (B,) as policy_logps[0], got {got}")
        if ref.requires_grad:
            raise ValueError(f"ref_logps.{name} requires grad, the reference does not: are the two swapped?")
        dtype = torch.promote_types(policy.dtype, torch.float32)
        r[name] = beta * (policy.to(dtype) - ref.to(dtype))
    return r


def sequence_logps(logits, labels):
    """Log-probabilities of whole responses: logits (B, T, V), labels (B, T) -> (B,) float32, in nats.

    labels: the input ids, with -100 in prompt, image and padding. The end-of-sequence token counts.
    """
    logits, targets = logits[:, :-1].float(), labels[:, 1:]  # position t predicts token t + 1
    logps = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # 0 for -100
    return logps.view(targets.shape).sum(-1)


def mdpo_step(model, batch, loss=mdpo_loss, ref_model=None, **options):
    """One step's forward pass: a batch of `data.make_batch` -> losses (B,), with gradient, and metrics (B,).

    model: wrapped by peft, or any if ref_model is given; its vision tower and projector are frozen.
    ref_model: by default `model` without its adapter, which shares the features of the images.
    loss: any function of (policy_logps, ref_logps, **options) -> losses, metrics; it may also take `batch`.
    """
    inputs = forward_inputs(model, batch)
    with torch.no_grad():
        if ref_model is not None:
            ref_logps = response_logps(ref_model, batch)
        else:
            with model.disable_adapter():
                ref_logps = response_logps(model, batch, inputs)
    policy_logps = response_logps(model, batch, inputs)
    losses, metrics = loss(policy_logps, ref_logps, **options, **known_arguments(loss, {"batch": batch}))
    return losses, {"loss": losses.detach(), **metrics}


def response_logps(model, batch, inputs=None):
    """Log-probabilities of the responses in a batch of `data.make_batch` -> `LogPs` of (B,) float32 tensors.

    model: an image-text-to-text model of transformers, plain or wrapped by peft.
    inputs: `forward_inputs(model, batch)`, which two passes can share.
    Packed rows switch the language model's attention to `packed_attention` for good.
    """
    inputs = inputs or forward_inputs(model, batch)
    logits = model(**inputs).logits.float()  # (R, K, V): only the positions that predict a response token
    targets = batch["targets"].flatten().to(logits.device, non_blocking=True)  # (R * K,), -100 in padding
    logps = -F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")  # (R * K,), 0 in padding
    sums = torch.stack([tokens.sum() for tokens in logps.split(batch["n_targets"])])
    return LogPs(**dict(zip(batch["names"], sums.view(len(batch["names"]), -1))))


# --------------------------------------------------------------------- Speed: the same numbers with less work
#
# 1. Policy and reference share the features of each image, since vision tower and projector are frozen.
# 2. Most tokens are image tokens. y_w and y_l share one prefix, so an example is two sequences, not three.
# 3. All sequences of a batch lie end to end in one row, without padding. Attention runs block by block:
#
#        token     m_w m_w q   q   y_w y_w y_w | y_l y_l | m_l m_l q   q   y_w y_w y_w
#        position  0   1   2   3   4   5   6   | 4   5   | 0   1   2   3   4   5   6
#        block     causal                      | sees    | causal
#                                                m_w, q and itself
#
# 4. Logits are computed only at the positions that predict a response token.


def forward_inputs(model, batch):
    """The keyword arguments of the model's forward pass, on its device, for both passes over a batch."""
    model = unwrapped(model)
    inputs = {name: batch[name] for name in ("input_ids", *batch["processor_keys"])}
    inputs["logits_to_keep"] = batch["predictors"]
    if batch["lengths"] is not None:
        inputs["position_ids"] = packed_positions(model, batch)  # before the batch is moved
    inputs = {name: values.to(model.device, non_blocking=True) for name, values in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)  # most vision towers do it themselves
    image_features = encode_images(model, inputs)
    if image_features is not None:
        del inputs["pixel_values"]
        inputs["mm_encoder_outputs"] = {"image": image_features}
    if batch["lengths"] is not None:  # plain rows are padded on the right: causal attention needs no mask
        if model.config.get_text_config()._attn_implementation != "packed":
            use_packed_attention(model)
        inputs["blocks"] = attention_blocks(batch["lengths"], model.device, model.dtype)
        # A 4-D mask stops the library from building one. `packed_attention` ignores it: one True, expanded.
        whole = torch.ones((), dtype=torch.bool, device=model.device)
        inputs["attention_mask"] = whole.expand(1, 1, *2 * batch["input_ids"].shape[1:])
    return inputs | {"use_cache": False}


def encode_images(model, inputs):
    """The output of the model's own `get_image_features` for all images in its inputs.

    None if there are none, or if the model's forward pass does not accept precomputed features.
    Raises ValueError if vision tower or projector are trained: the reference must not share their output.
    """
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" not in inputs or "mm_encoder_outputs" not in accepted:
        return None
    features = model.get_image_features(**known_arguments(model.get_image_features, inputs))
    if any(image.requires_grad for image in features.pooler_output):
        raise ValueError("vision tower and projector must be frozen: policy and reference share their output")
    return features


def known_arguments(function, options):
    """Those of the options that a function accepts: models differ in them."""
    return {name: options[name] for name in inspect.signature(function).parameters if name in options}


def unwrapped(model):
    """The library's model, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_packed_attention(model):
    """Set the language model's attention to `packed_attention`, which is SDPA for all but packed rows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)  # plain rows and generation keep SDPA's masks
    model.set_attn_implementation({"text_config": "packed"})


def attention_blocks(lengths, device=None, dtype=torch.float32):
    """`lengths` of `data.make_batch` -> [(tokens in the block, prefix tokens that they see as well, mask)].

    A sequence's prefix and first response are one causal block without a mask. Each further response is a
    block of n tokens that see the prefix and, causally, each other. Its mask (1, 1, n, prefix + n) is added
    to the scores. Rows of it begin at multiples of 16 numbers, or CUDA's kernels would copy it in each layer.
    """
    blocks = []
    for prefix, first, *others in lengths:
        blocks.append((prefix + first, 0, None))
        for n in others:
            width = (prefix + n + 15) // 16 * 16
            hidden = torch.full((1, 1, n, width), -torch.inf, device=device, dtype=dtype).triu(prefix + 1)
            blocks.append((n, prefix, hidden[..., : prefix + n]))
    return blocks


def packed_attention(module, query, key, value, attention_mask, blocks=None, **options):
    """Attention of a packed row, block by block: (1, H, N, D) -> (1, N, H, D). For `AttentionInterface`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # One split per tensor: its backward pass is one concatenation. Each slice's would write a whole row.
    queries, keys, values = (tensor.split([n for n, *_ in blocks], dim=2) for tensor in (query, key, value))
    outputs = []
    for i, (_, prefix, mask) in enumerate(blocks):
        if mask is None:
            shared, k, v = i, keys[i], values[i]  # the block with the prefix that the next blocks see as well
        else:
            k, v = (torch.cat([side[shared][:, :, :prefix], side[i]], dim=2) for side in (keys, values))
        outputs.append(sdpa_attention_forward(module, queries[i], k, v, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def packed_positions(model, batch):
    """Position ids of a packed row: (1, N), or (3, 1, N) for models with positions in space (Qwen-VL).

    Those models' `get_rope_index` treats the row as one sequence. A sequence by itself has the same positions
    minus that of its first token. Token j of y_l gets the position of the token j places after the prefix:
    only text follows the prefix, so positions there rise by one.
    """
    positions = batch["position_ids"]  # (1, N): counted from the start of each sequence; y_l's as y_w's
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None or "pixel_values" not in batch:
        return positions
    known = known_arguments(rope_index, batch)
    of_row, _ = rope_index(**known, attention_mask=torch.ones_like(positions))  # (3, 1, N)
    n_tokens = torch.tensor([sum(sequence) for sequence in batch["lengths"]], device=positions.device)
    starts = n_tokens.cumsum(0) - n_tokens  # where each sequence starts in the row
    starts = starts.repeat_interleave(n_tokens, output_size=positions.shape[1])  # (N,)
    at = lambda index: of_row.gather(-1, index.expand_as(of_row))
    return at(starts + positions) - at(starts)
