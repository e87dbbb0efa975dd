"""mDPO on many GPUs: the numbers of train.py from TRL's DPOTrainer. Flags are TRL's (1.16) and train.py's.

    torchrun --nproc_per_node 8 examples/trl_mdpo.py --model M --data FILE --output_dir OUT

Not run on GPUs. For FSDP2, accelerate was told that two CPU processes are GPUs: on a CPU it would take DDP instead.
"""

import os
import re
import sys
from functools import partial
from pathlib import Path

import datasets
import peft
import torch
import transformers
from torch.distributed.fsdp import register_fsdp_forward_method
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import SCORED, BadInput, about, make_batch, run_command
from mdpo import forward_inputs, mdpo_loss, pack, response_logps

# The flags that are used, TRL's and then train.py's, with the paper's values as defaults. Others are refused.
FLAGS = """learning_rate=1e-5 lr_scheduler_type=cosine warmup_steps=0.1 num_train_epochs=3 adam_beta1=0.9
    adam_beta2=0.98 weight_decay=0.05 max_grad_norm=1 beta=0.1 seed=0 max_length=2048 dataloader_num_workers=4
    per_device_train_batch_size=0 gradient_accumulation_steps=0 per_device_eval_batch_size=4 logging_steps=1
    save_strategy=epoch ddp_find_unused_parameters=False ddp_broadcast_buffers=False output_dir max_steps fsdp
    optim adam_epsilon use_cpu fsdp_config deepspeed local_rank (log|logging|run|save|hub|ddp|trackio)_.*
    report_to push_to_hub disable_tqdm resume_from_checkpoint eval_(strategy|steps|delay|on_start) project
    include_num_input_tokens_seen gradient_checkpointing model data images subset limit skip-bad eval-size
    reject crop delta anchors no-conditional lora-rank lora-alpha layout""".split()
CARD = """---
library_name: peft
{base}tags: [mdpo, dpo, trl, lora]
---
A LoRA adapter for `{args.model}`, trained with mDPO (https://arxiv.org/abs/2406.11839): {n} examples,
{config.num_train_epochs:g} epochs, {config.batch_size} examples an update, {loss}, learning rate
{config.learning_rate}, rejected images: {args.reject}, LoRA rank {args.lora_rank}, alpha {args.lora_alpha}.
"""


class MDPOConfig(DPOConfig):
    def get_warmup_steps(self, n_steps):
        return min(super().get_warmup_steps(n_steps), n_steps - 1)  # as train.py: a single step trains, too


class MDPOTrainer(DPOTrainer):
    """DPOTrainer on train.py's batches. Loss and metrics are means over the examples of all processes."""

    loss_is_scaled_for_ga = True

    def __init__(self, config, args):
        args.seed, args.max_length = config.seed, config.max_length
        self.pairs, self.held_out = train.read_pairs(args, train.load_processor(args.model))
        sharded = config.deepspeed_plugin or "ACCELERATE_USE_FSDP" in os.environ  # --fsdp sets it, too
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # every process reads all weights
        device, layer = ("cpu", peft.tuners.lora.Linear) if sharded else (config.device, train.LoraLinear)
        dtype = torch.bfloat16 if config.device.type == "cuda" else torch.float32
        model, processor = train.load_model(args.model, device, dtype)
        model = train.add_lora(model, args.lora_rank, args.lora_alpha, config.seed, layer)
        first = [self.pairs[0, i] for i in range(len(self.pairs))[:2]]
        layout = train.choose_layout(model, processor, first, args.layout, config.max_length)
        if config.gradient_checkpointing:
            train.enable_checkpointing(model)
        model.get_base_model().train = lambda mode: None  # layers that recompute are in training mode, all else is not
        config.gradient_checkpointing = config.activation_checkpointing = False  # not by the Trainer as well
        self.loss = partial(mdpo_loss, beta=config.beta, delta=args.delta, conditional=args.conditional,
                            anchors={*args.anchors} - {"none"})  # fmt: skip
        names = [n for n in SCORED if n != "image_rejected" or args.conditional or n in args.anchors]
        collate = partial(counted_batch, spare=first[:1], processor=processor, layout=layout, names=names,
                          max_length=config.max_length)  # fmt: skip
        self.load = partial(torch.utils.data.DataLoader, num_workers=config.dataloader_num_workers)
        marker = datasets.Dataset.from_dict({"images": [0]})  # in place of `pairs`: TRL looks for this column
        super().__init__(model, args=config, train_dataset=marker, processing_class=processor,
                         eval_dataset=marker if self.held_out else None, data_collator=collate)  # fmt: skip
        model.delete_adapter("ref")  # TRL's copy of the adapter: the reference is the model without one
        base = "" if Path(args.model).is_dir() else f"base_model: {args.model}\n"
        card = CARD.format(args=args, config=config, n=len(self.pairs), loss=self.loss.keywords, base=base)
        model.create_or_update_model_card = lambda folder: Path(folder, "README.md").write_text(card)
        self.create_model_card = lambda **options: None  # not TRL's: the model's is saved with it

    def get_train_dataloader(self):
        batches = Epochs(self.args, len(self.pairs))
        loader = self.load(self.pairs, batch_sampler=batches, collate_fn=self.data_collator)
        loader.set_epoch = batches.set_epoch
        return loader

    def get_eval_dataloader(self, eval_dataset=None):
        keys = [("held out", i) for i in range(len(self.held_out))]
        keys = deal(train.split(keys, self.args.per_device_eval_batch_size), self.args)
        collate = partial(self.data_collator, names=tuple(SCORED))
        return self.load(self.held_out, batch_sampler=keys, collate_fn=collate)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner, batch = self.accelerator.unwrap_model(model), inputs["batch"].map(torch.as_tensor)
        n_examples = len(inputs["shift_labels"])
        inner.forward_inputs = partial(forward_inputs, inner)
        register_fsdp_forward_method(inner, "forward_inputs")  # FSDP2 gathers the weights that encode images
        shared = inner.forward_inputs(batch)
        policy_logps = response_logps(model, batch, shared)  # first: FSDP2 notes here which weights train
        with torch.no_grad(), inner.disable_adapter():
            ref_logps = response_logps(inner, batch, shared)
        losses, metrics = self.loss(policy_logps, ref_logps)
        rows = torch.stack([losses.detach(), *metrics.values()], dim=1)[:n_examples].tolist()
        rows = self.accelerator.gather_for_metrics(rows, use_gather_object=True)  # of all processes
        for name, values in zip(["loss", *metrics], zip(*rows)):
            self._metrics["train" if model.training else "eval"][name] += values
        # The mean over the update: processes average their gradients, so each multiplies by their number.
        return losses[:n_examples].sum() * self.args.world_size / (num_items_in_batch or len(losses))

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:  # TRL's copy of the processor may lack a part
            train.save_processor(self.processing_class, output_dir or self.args.output_dir)


class Epochs(list):
    """A batch sampler: this process's micro-batches of an epoch, lists of (epoch, index)."""

    def __init__(self, config, n_examples):
        self.config, self.n_examples = config, n_examples
        self.set_epoch(0)

    def set_epoch(self, epoch):  # called by the Trainer, of the loader or, where it skips batches, of its sampler
        sizes = self.config.batch_size, self.config.per_device_train_batch_size
        plan = train.plan_steps(self.n_examples, *sizes, epoch + 1, self.config.seed)
        self[:] = [micro for step in plan if step[0][0][0] == epoch for micro in deal(step, self.config)]


def deal(micro_batches, config):
    """This process's part. All have as many, so the last may be empty: it is computed, and counts 0."""
    n = config.world_size
    return (micro_batches + [[]] * (-len(micro_batches) % n))[config.process_index :: n]


def counted_batch(pairs, spare, layout, **options):
    """A `data.Batch`, with what the Trainer counts: tokens, and examples in the place of labels."""
    batch = make_batch(pairs or spare, share=layout == "packed", **options)
    tokens = batch.inputs["input_ids"].clone()  # a worker moves its tensors to shared memory, away from arrays on them
    arrays = (pack(batch) if layout == "packed" else batch).map(torch.Tensor.numpy)  # as in train.py
    return {"input_ids": tokens, "shift_labels": torch.zeros(len(pairs)), "labels": None, "batch": arrays}


def parse(argv):
    """The command line -> TRL's arguments, with `batch_size`, and train.py's. Raises BadInput."""
    parser = transformers.HfArgumentParser(MDPOConfig, allow_abbrev=False, epilog=f"Used: {FLAGS}")
    parser.error = partial(train.Parser.error, parser)
    parser.set_defaults(**dict(flag.split("=") for flag in FLAGS if "=" in flag))
    flags, rest = parser.parse_known_args(argv)
    given = [name for name, value in vars(flags).items() if value != parser.get_default(name)]
    given += [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    shards = torch.cuda.is_available()  # on a CPU, accelerate would take DDP for --fsdp
    used = "|".join(flag.partition("=")[0] for flag in FLAGS if shards or "fsdp" not in flag)
    if unused := [f"--{name}" for name in given if not re.fullmatch(used, name)]:
        raise BadInput(f"not used by mDPO in TRL: {' '.join(unused)} (--help lists the arguments)")
    args = train.parse_args(rest)
    if args.eval_size and flags.eval_strategy == "no":
        flags.eval_strategy, flags.eval_on_start = "epoch", not flags.resume_from_checkpoint
    if flags.eval_strategy != "no" and not args.eval_size:
        raise BadInput("--eval_strategy needs --eval-size")
    if (folder := flags.resume_from_checkpoint) and not Path(folder, "trainer_state.json").is_file():
        raise BadInput(f"{folder}: holds no checkpoint to resume from")
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    micro = flags.per_device_train_batch_size or min(4, -(-32 // n_processes))
    at_once = n_processes * micro
    batch_size = at_once * (flags.gradient_accumulation_steps or 0) or max(32, at_once)  # examples an update
    flags.per_device_train_batch_size, flags.gradient_accumulation_steps = micro, -(-batch_size // at_once)
    flags.bf16 = bool(flags.fsdp or flags.deepspeed) and torch.cuda.is_available()  # else no autocast
    config = about("arguments")(MDPOConfig)(**vars(flags))
    if config.world_size != n_processes or config.n_gpu > 1:  # each would train alone, or split packed rows
        raise BadInput(f"{n_processes} processes, {config.n_gpu} GPUs each: use torchrun, or without a GPU --use_cpu")
    config.batch_size = batch_size
    return config, args


def run(argv):
    trainer, group = MDPOTrainer(*parse(argv)), torch.distributed.group.WORLD
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()  # trainer_state.json: the log
    trainer.end()
    del trainer, group  # in this order: DDP would free the group's threads while it keeps Python from them
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run, saves_memory="a lower --per_device_train_batch_size or --max_length"))
