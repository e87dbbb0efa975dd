"""mDPO as a subclass of TRL's DPOTrainer (1.16), for a data set, model and processor of your own. Needs trl.

Purpose: mDPO in a TRL script that you have. For the exact runs of `train.py` on many GPUs, use `trl_mdpo.py`.
Use: `from examples.trl_own import MDPOTrainer`; its arguments are those of `DPOTrainer` (examples/README.md).
"""

import random
import sys
from functools import partial

import torch
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from data import BadInput, Example, about, as_list, forbidden, make_batch, random_crop, read_question, read_response
from mdpo import LogPs, mdpo_loss, sequence_logps

OF_TRLS_LOSS = {"loss_type": ["sigmoid"], "loss_weights": None, "ld_alpha": None, "label_smoothing": 0.0}
OF_TRLS_LOSS |= {"f_divergence_type": "reverse_kl", "use_weighting": False, "router_aux_loss_coef": None}


class MDPOTrainer(DPOTrainer):
    """`DPOTrainer` with mDPO's loss. The reference, beta and all that is not of the loss are TRL's.

    `rejected_images`, a column that TRL lacks, replaces the crop, which is drawn anew at each visit of a row.
    loss: a function of (policy_logps, ref_logps, beta), such as partial(mdpo_loss, anchors=()).
    Raises BadInput for options that only another loss uses, and for rows that cannot be trained on.
    """

    def __init__(self, model, *, args, processing_class, loss=mdpo_loss, **options):
        if unused := [name for name, value in OF_TRLS_LOSS.items() if getattr(args, name, value) != value]:
            raise BadInput(f"not used by mDPO: {', '.join(unused)}")
        self.loss, rows = loss, partial(collate, processor=processing_class, max_length=args.max_length)
        super().__init__(model, args=args, processing_class=processing_class, data_collator=rows, **options)
        self._signature_columns = ["images", "image", "rejected_images", "prompt", "chosen", "rejected"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        policy_logps = logps(model, **inputs)
        with torch.no_grad():
            if self.ref_model is not None:
                ref_logps = logps(self.ref_model, **inputs)
            else:  # as in TRL: without the adapter, or with TRL's copy of one that the model came with
                inner = self.accelerator.unwrap_model(self.model)
                with use_adapter(inner, "ref" if "ref" in inner.peft_config else None):
                    ref_logps = logps(self.model, **inputs)
        losses, metrics = self.loss(policy_logps, ref_logps, beta=self.beta)
        metrics |= {f"logps/{name}": logp.detach() for name, logp in policy_logps._asdict().items()}
        values = self.accelerator.gather_for_metrics(torch.stack([*metrics.values()], dim=1))  # (B, metrics)
        for name, mean in zip(metrics, values.mean(0).tolist()):
            self._metrics["train" if model.training else "eval"][name].append(mean)
        return (losses.mean(), {}) if return_outputs else losses.mean()


def logps(model, labels, **inputs):
    logits = model(**inputs, use_cache=False).logits  # (3B, n, V): the last n columns
    return LogPs(*sequence_logps(logits, labels[:, -logits.shape[1] :]).chunk(3))


def collate(rows, processor, max_length):
    """Rows of the data set -> three rows of tokens an example (`data.Batch`), as inputs, with `labels`."""
    with about("a row of the data set"):
        batch = make_batch([*map(to_pair, rows)], processor, max_length=max_length or sys.maxsize)
    start = (batch.labels >= 0).any(0).int().argmax().item()  # of the first response
    return {**batch.inputs, "labels": batch.labels, "logits_to_keep": batch.labels.shape[1] - start + 1}


def to_pair(row):
    """A row -> `Example` with open images. The crop m_l is made here: policy and reference share it."""
    images, own = to_rgb(row.get("images") or row.get("image")), to_rgb(row.get("rejected_images"))
    if not images:
        raise BadInput("has no image")
    crops = tuple(random_crop(image, random) for image in images)
    marks = forbidden(None)
    question = read_question(as_list(row["prompt"]), len(images), marks)
    chosen, rejected = (read_response(as_list(row[name])[-1], name, marks) for name in ("chosen", "rejected"))
    return Example(question, chosen, rejected, images, own or crops)


def to_rgb(images):
    images = images if isinstance(images, list) else [images]  # one, or None
    return tuple(image.convert("RGB") for image in images if image)
