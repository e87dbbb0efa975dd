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

One thing departs from the authors' code, and changes no equation: policy and reference see the same m_l,
which is made with the data.

To use the loss elsewhere, copy this file as far as `sequence_logps`. That part needs only torch. Neither this
file nor `data.py` imports anything of this repository: if you have a module `data` of your own, copy ours
under another name.
"""

from dataclasses import replace
from inspect import signature
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
    needed = LogPs._fields if conditional else ("chosen", "rejected")
    r = rewards(policy_logps, ref_logps, beta, needed, anchors)
    terms = {"dpo": -F.logsigmoid(r["chosen"] - r["rejected"])}  # eq. 5, DPO_m
    if conditional:
        terms["conditional"] = -F.logsigmoid(r["chosen"] - r["image_rejected"])  # eq. 6, CoPO
    if anchors:
        distance = lambda name: r[name] - delta if name == "chosen" else delta - r[name]  # below: Table 4
        terms["anchor"] = sum(-F.logsigmoid(distance(name)) for name in r if name in anchors)  # eq. 7, AncPO
    losses = sum(terms.values())  # eq. 8, mDPO

    metrics = {f"loss/{name}": term for name, term in terms.items()}
    metrics |= {f"rewards/{name}": reward for name, reward in r.items()}
    for worse in [*r][1:]:
        margin, kind = r["chosen"] - r[worse], worse.removesuffix("rejected")
        metrics |= {f"rewards/{kind}accuracies": (margin > 0).float(), f"rewards/{kind}margins": margin}
    return losses, {name: values.detach() for name, values in metrics.items()}


def rewards(policy_logps, ref_logps, beta, needed, anchors):
    """Check the arguments of `mdpo_loss` -> {name of a log-probability: its reward r (B,), at least float32}.

    The names in `needed` and `anchors` must be given; any other may be None in both, and is skipped.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
    if isinstance(anchors, str) or not set(anchors) <= set(LogPs._fields):
        raise ValueError(f"anchors must be a tuple or set of names among {LogPs._fields}, got {anchors!r}")
    if torch.is_tensor(policy_logps) or torch.is_tensor(ref_logps):
        raise ValueError("policy_logps and ref_logps must be a LogPs or a tuple of its tensors each")
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

    model: wrapped by peft, or any if ref_model is given; its vision tower and projector must be frozen.
    ref_model: by default `model` without its adapter. Then both passes share the features of the images.
    loss: `mdpo_loss`, or a function of (policy_logps, ref_logps, batch=batch, **options) -> losses, metrics.
    """
    if ref_model is None and not hasattr(model, "disable_adapter"):
        raise ValueError("mdpo_step needs a model with an adapter, or ref_model")
    inputs = forward_inputs(model, batch)
    with torch.no_grad():
        if ref_model is not None:
            ref_logps = response_logps(ref_model, batch)
        else:
            with model.disable_adapter():
                ref_logps = response_logps(model, batch, inputs)
    policy_logps = response_logps(model, batch, inputs)
    if loss is not mdpo_loss:
        options["batch"] = batch  # another loss may need more than log-probabilities, such as lengths
    losses, metrics = loss(policy_logps, ref_logps, **options)
    return losses, {"loss": losses.detach(), **metrics}


def response_logps(model, batch, inputs=None):
    """Log-probabilities of the responses in a batch of `data.make_batch` -> `LogPs` of (B,) float32 tensors.

    model: an image-text-to-text model of transformers, plain or wrapped by peft.
    inputs: `forward_inputs(model, batch)`, which two passes can share.
    """
    inputs = inputs or forward_inputs(model, batch)
    logits = model(**inputs).logits  # (R, n, V): the last n columns of the rows, or (1, K, V) if packed
    labels = batch.labels.to(logits.device, non_blocking=logits.is_cuda)  # (R, T)
    if batch.take is None:  # plain rows
        logps = sequence_logps(logits, labels[:, -logits.shape[1] :])  # (R,)
    else:  # packed: the logits are those of the K response tokens alone
        answers = batch.answers.to(logits.device, non_blocking=logits.is_cuda)  # (K,)
        tokens = -F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()[answers], reduction="none")
        rows = tokens.new_zeros(labels.numel()).index_put((answers,), tokens)  # back to where they stand
        logps = rows.view(labels.shape).sum(-1)  # (R,)
    return LogPs(**dict(zip(batch.names, logps.view(len(batch.names), -1))))


def forward_inputs(model, batch):
    """The keyword arguments of the model's forward pass, on its device, for both passes over a batch.

    Plain rows are padded on the right. Causal attention never looks at that padding, so no mask is needed,
    and attention is faster without one. Logits begin at the token before the first response.
    """
    model = unwrapped(model)
    if batch.take is None:
        first = (batch.labels >= 0).any(0).int().argmax().item()  # column of a response
        inputs = dict(to_device(batch, model.device).inputs)
        del inputs["attention_mask"]
        inputs["logits_to_keep"] = batch.labels.shape[1] - first + 1
    else:
        inputs = packed_inputs(model, batch)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)  # most vision towers do it themselves
        inputs["mm_encoder_outputs"] = {"image": encode_images(model, inputs)}
        del inputs["pixel_values"]
    return inputs | {"use_cache": False}


def encode_images(model, inputs):
    """The output of the model's own `get_image_features`, for both passes over a batch.

    Raises ValueError if vision tower or projector are trained: the reference would change with them.
    """
    features = call(model.base_model.get_image_features, inputs)
    if any(image.requires_grad for image in features.pooler_output):
        raise ValueError("vision tower and projector must be frozen: policy and reference share their output")
    return features


def call(function, inputs):
    """The function's result for those of the inputs that it takes."""
    return function(**{name: inputs[name] for name in signature(function).parameters if name in inputs})


def to_device(batch, device):
    """The batch on the device. Only CUDA copies without waiting: it keeps pinned memory until it is read."""
    return batch.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))


def unwrapped(model):
    """The library's model, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --------------------------------------------------------------------- Speed: the same numbers with less work
#
# 1. Policy and reference share the features of each image, since vision tower and projector are frozen.
# 2. Logits are computed only where they predict a response.
# 3. Most tokens are image tokens. y_w and y_l share one prefix: an example has two prefixes, not three.
# 4. All rows of a batch lie end to end in one, without padding. Attention runs block by block. One pair:
#
#        token     m_w m_w q   q   y_w y_w y_w | y_l y_l | m_l m_l q   q   y_w y_w y_w
#        position  0   1   2   3   4   5   6   | 4   5   | 0   1   2   3   4   5   6
#        block     causal                      | sees    | causal
#                                                m_w, q and itself


def pack(batch):
    """Turn the rows into one row that holds each shared prefix once -> the batch with these filled in.

    take (N,): where each token of the packed row stands in the flattened rows (R * T,)
    answers (K,): where each token of the responses stands there
    predictors (1, K): for each response token, the place in the packed row of the token before it
    blocks: for each row how many of its tokens are taken, its owner, and the length of its prefix

    `data.Batch` draws the rows of a pair and says what an owner is: its tokens are all taken, of other rows
    only the response.
    """
    is_answer, owner = batch.labels >= 0, torch.tensor(batch.owner)
    owns = owner == torch.arange(len(owner))
    taken = batch.inputs["attention_mask"].bool() & (is_answer | owns[:, None])  # (R, T)
    place = (taken.flatten().cumsum(0) - 1).view(taken.shape)  # of each token in the packed row
    place = torch.where(taken, place, place[owner])  # a prefix that is not taken lies where its owner's does
    blocks = zip(taken.sum(1).tolist(), batch.owner, is_answer.int().argmax(1).tolist())
    flat = lambda mask: mask.flatten().nonzero().squeeze(1)
    predictors = place[:, :-1][is_answer[:, 1:]][None]
    return replace(batch, take=flat(taken), answers=flat(is_answer), predictors=predictors, blocks=[*blocks])


def packed_inputs(model, batch):
    """The packed row, with logits at its predictors, for a model with SDPA attention."""
    use_packed_attention()
    positions = row_positions(model, batch)  # before the batch is moved: a Python loop in the library
    batch = to_device(batch, model.device)
    inputs = batch.inputs | {"position_ids": positions}  # (R, T), or (3, R, T) in space
    del inputs["attention_mask"]
    for name, values in inputs.items():
        if values.shape[-2:] == batch.labels.shape:  # the rest is of images
            inputs[name] = values.flatten(-2)[..., batch.take].unsqueeze(-2)
    inputs["logits_to_keep"] = batch.predictors
    inputs["blocks"] = attention_blocks(batch.blocks, model.device, model.dtype)
    # A 4-D mask stops the library from building one. Attention other than ours would turn into nan.
    nan = torch.full((), torch.nan, device=model.device, dtype=model.dtype)
    return inputs | {"attention_mask": nan.expand(1, 1, len(batch.take), len(batch.take))}


def row_positions(model, batch):
    """Position ids of the rows (R, T), or (3, R, T) for models with positions in space (Qwen-VL)."""
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None:
        return torch.arange(batch.labels.shape[1], device=model.device).expand(batch.labels.shape)
    owners, place = torch.tensor(batch.owner).unique(return_inverse=True)  # only these rows have images
    inputs = batch.inputs | {"attention_mask": torch.ones_like(batch.labels)}
    inputs = {name: v[owners] if v.shape == batch.labels.shape else v for name, v in inputs.items()}
    return call(rope_index, inputs)[0][:, place].to(model.device)  # the others take their owner's


def use_packed_attention():
    """Put `packed_attention` in the place of the library's SDPA, which it calls for all but packed rows."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", packed_attention)


def attention_blocks(blocks, device=None, dtype=torch.float32):
    """`blocks` of `pack` -> the same with a mask each: None, plain causal, for a row with its own prefix.

    Any other row has n tokens. They see its owner's prefix and, causally, each other. The mask
    (1, 1, n, prefix + n) is added to the scores. Its rows begin at multiples of 16 numbers, or CUDA's kernels
    would copy it in each layer.
    """
    masked = []
    for row, (n, owner, prefix) in enumerate(blocks):
        mask = None
        if owner != row:
            width = (prefix + n + 15) // 16 * 16
            mask = torch.full((1, 1, n, width), -torch.inf, device=device, dtype=dtype).triu(prefix + 1)
            mask = mask[..., : prefix + n]
        masked.append((n, owner, prefix, mask))
    return masked


def packed_attention(module, query, key, value, attention_mask, blocks=None, **options):
    """Attention of a packed row, block by block: (1, H, N, D) -> (1, N, H, D). For `AttentionInterface`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Split once: the backward of a split is one concatenation. That of each slice would make a row of zeros.
    queries, keys, values = (tensor.split([n for n, *_ in blocks], dim=2) for tensor in (query, key, value))
    outputs = []
    for q, k, v, (_, owner, prefix, mask) in zip(queries, keys, values, blocks):
        if mask is not None:
            k, v = (torch.cat([of[owner][:, :, :prefix], own], dim=2) for of, own in ((keys, k), (values, v)))
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, dim=1), None
