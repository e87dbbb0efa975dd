"""mDPO on many GPUs: the numbers of train.py from TRL's DPOTrainer (needs trl, written for 1.16).

    torchrun --nproc_per_node 8 examples/trl_mdpo.py --model llava-hf/llava-1.5-7b-hf --data silkie.json \
        --output_dir OUT      # DDP; --fsdp full_shard or --deepspeed CONFIG shard the model

Model, batches, order, rejected images and loss are train.py's. Flags are `DPOConfig`'s, with the paper's
values as defaults, and train.py's for data, loss and adapter. One that would do nothing is refused by name.
"""

import os
import random
import re
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import datasets
import peft
import torch
import transformers
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import SCORED, BadInput, Pairs, about, make_batch, read_examples, run_command
from mdpo import forward_inputs, mdpo_loss, response_logps

DEFAULTS = {  # of TRL's flags: the paper's, as in train.py; for the two that are None see `share_out`
    "learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "num_train_epochs": 3,
    "adam_beta1": 0.9, "adam_beta2": 0.98, "weight_decay": 0.05, "max_grad_norm": 1.0, "beta": 0.1, "seed": 0,
    "max_length": 2048, "per_device_train_batch_size": None, "gradient_accumulation_steps": None,
    "per_device_eval_batch_size": 4, "dataloader_num_workers": 4, "logging_steps": 1,
    "save_strategy": "epoch", "ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False,
}  # fmt: skip
HONOURED = re.compile(  # TRL's flags that work as documented; any other must keep its default
    f"{'|'.join(DEFAULTS)}|output_dir|(log|logging|trackio|hub|save|ddp)_.*|report_to|run_name|project|bf16|"
    "disable_tqdm|push_to_hub|resume_from_checkpoint|restore_callback_states_from_checkpoint|max_steps|optim|"
    "eval_(strategy|steps|delay|on_start)|load_best_model_at_end|metric_for_best_model|greater_is_better|"
    "optim_args|adam_epsilon|lr_scheduler_kwargs|(gradient|activation)_checkpointing|fsdp|fsdp_config|debug|"
    "deepspeed|use_cpu|tf32|full_determinism|torch_empty_cache_steps|skip_memory_metrics|local_rank|"
    "include_num_input_tokens_seen"
)
OURS = "model data images subset limit skip-bad eval-size reject crop delta anchors no-conditional".split()
OURS += "lora-rank lora-alpha layout".split()
CARD = """---
library_name: peft
{base}tags: [mdpo, dpo, trl, lora]
---
A LoRA adapter for `{args.model}`, trained with mDPO (https://arxiv.org/abs/2406.11839): {n} examples,
{config.num_train_epochs:g} epochs, {config.batch_size} examples an update, learning rate
{config.learning_rate}, beta {config.beta}, {options}, rejected images: {args.reject},
LoRA rank {args.lora_rank}, alpha {args.lora_alpha}.
"""


class MDPOConfig(DPOConfig):
    def get_warmup_steps(self, n_steps):
        return min(super().get_warmup_steps(n_steps), n_steps - 1)  # as train.py: the first step has rate 0


class MDPOTrainer(DPOTrainer):
    """DPOTrainer with train.py's batches and loss. Metrics are means over examples, of all processes."""

    loss_is_scaled_for_ga = True
    _tag_names = ["mdpo", "dpo", "trl"]

    def __init__(self, model, config, processor, pairs, held_out, loss, collate):
        self.pairs, self.held_out, self.loss, self.collate = pairs, held_out, loss, collate
        marker = datasets.Dataset.from_dict({"images": [0]})  # in place of `pairs`: TRL looks for this column
        super().__init__(model, args=config, train_dataset=marker, processing_class=processor,
                         eval_dataset=marker if len(held_out) else None, data_collator=collate)  # fmt: skip
        model.delete_adapter("ref")  # TRL's copy of the adapter: the reference is the model without one

    def get_train_dataloader(self):
        batches = Epochs(self.args, len(self.pairs))
        loader = make_loader(self.pairs, batches, self.collate, self.args.dataloader_num_workers)
        loader.set_epoch = batches.set_epoch
        return loader

    def get_eval_dataloader(self, eval_dataset=None):
        keys = [("held out", i) for i in range(len(self.held_out))]
        keys = deal(train.split(keys, self.args.per_device_eval_batch_size), self.args)
        collate = partial(self.collate, names=tuple(SCORED))
        return make_loader(self.held_out, keys, collate, self.args.dataloader_num_workers)

    def _get_num_items_in_batch(self, batch_samples, device):  # of an update, on all processes
        n_examples = sum(batch["n_examples"] for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(n_examples, device=device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner, n_examples = self.accelerator.unwrap_model(model), inputs["n_examples"]
        if not hasattr(inner, "forward_inputs"):  # with FSDP2 the weights must be gathered to encode images
            inner.forward_inputs = partial(forward_inputs, inner)
            register_fsdp_forward_method(inner, "forward_inputs")
        shared = inner.forward_inputs(inputs)
        policy_logps = response_logps(model, inputs, shared)  # first: FSDP2 notes here which weights train
        with torch.no_grad(), inner.disable_adapter():
            ref_logps = response_logps(inner, inputs, shared)
        losses, metrics = self.loss(policy_logps, ref_logps)
        for name, values in {"loss": losses.detach(), **metrics}.items():
            self._metrics["train" if model.training else "eval"][name].append(values[:n_examples])
        # The mean over the update: processes average their gradients, so each multiplies by their number.
        n_in_update = len(losses) if num_items_in_batch is None else num_items_in_batch
        loss = losses[:n_examples].sum() * self.args.world_size / n_in_update
        return (loss, None) if return_outputs else loss

    def log(self, logs, start_time=None):
        metrics = self._metrics["train" if self.model.training else "eval"]
        if metrics:
            values = [torch.cat(micro_batches).double() for micro_batches in metrics.values()]
            sums = torch.stack([torch.ones_like(values[0]).sum(), *(v.sum() for v in values)])
            n_examples, *sums = self.accelerator.reduce(sums).tolist()
            metrics.update(zip([*metrics], ([total / n_examples] for total in sums)))
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.create_model_card(folder=output_dir)  # in place of peft's blank one

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, folder=None):
        if self.is_world_process_zero():
            Path(folder or self.args.output_dir, "README.md").write_text(self.args.card)


def make_loader(pairs, batches, collate, workers):
    return DataLoader(pairs, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      worker_init_fn=train.ignore_interrupts)  # fmt: skip


class Epochs(list):
    """A batch sampler: this process's micro-batches of an epoch, lists of (epoch, index)."""

    def __init__(self, config, n_examples):
        self.config, self.n_examples = config, n_examples
        self.set_epoch(0)

    def set_epoch(self, epoch):
        sizes = self.config.batch_size, self.config.per_device_train_batch_size
        plan = train.plan_steps(self.n_examples, *sizes, epoch + 1, self.config.seed)
        steps = plan[len(plan) // (epoch + 1) * epoch :]
        self[:] = sum((deal(step, self.config) for step in steps), [])


def deal(micro_batches, config):
    """This process's part. All have as many, so the last may be empty: it is computed, and counts 0."""
    n = config.world_size
    return (micro_batches + [[]] * (-len(micro_batches) % n))[config.process_index :: n]


def counted_batch(pairs, spare, **options):
    return make_batch(pairs or spare, **options) | {"n_examples": len(pairs)}


def parse(argv):
    """The command line -> TRL's arguments, with `batch_size`, and train.py's. Raises BadInput."""
    parser = transformers.HfArgumentParser(MDPOConfig, allow_abbrev=False, epilog=f"From train.py: {OURS}")
    parser.error = partial(train.Parser.error, parser)
    parser.set_defaults(**DEFAULTS)
    flags, rest = parser.parse_known_args(argv)
    given = [f.name for f in fields(DPOConfig) if getattr(flags, f.name) != parser.get_default(f.name)]
    unused = [f"--{name}" for name in given if not HONOURED.fullmatch(name)]
    unused += [word for word in rest if word[:2] == "--" and word[2:].partition("=")[0] not in OURS]
    if unused:
        raise BadInput(f"not used by mDPO in TRL: {' '.join(unused)} (--help lists the arguments)")
    args = train.parse_args(rest)
    if args.eval_size and flags.eval_strategy == "no":
        flags.eval_strategy, flags.eval_on_start = "epoch", not flags.resume_from_checkpoint
    if flags.eval_strategy != "no" and not args.eval_size:
        raise BadInput("--eval_strategy needs --eval-size")
    if (folder := flags.resume_from_checkpoint) and not Path(folder, "trainer_state.json").is_file():
        raise BadInput(f"{folder}: holds no checkpoint to resume from")
    batch_size, *sizes = share_out(int(os.environ.get("WORLD_SIZE", 1)), flags)
    flags.per_device_train_batch_size, flags.gradient_accumulation_steps = sizes
    if flags.bf16 is None:
        flags.bf16 = torch.cuda.is_available() and not flags.use_cpu
    with about("arguments"):
        config = MDPOConfig(**vars(flags))
    config.batch_size = batch_size
    return config, args


def share_out(n_processes, flags):
    """-> examples an update (32 if no flag says otherwise), examples at a time, micro-batches an update."""
    micro, accumulation = flags.per_device_train_batch_size, flags.gradient_accumulation_steps
    micro = micro or min(4, -(-32 // n_processes))
    at_once = n_processes * micro
    size = at_once * accumulation if accumulation else max(32, at_once)
    return size, micro, -(-size // at_once)


def make_trainer(config, args):
    processor = train.load_processor(args.model)
    options = {name: getattr(args, name) for name in ("skip_bad", "subset", "limit")}
    options |= {"seed": config.seed, "processor": processor, "max_length": config.max_length}
    examples = read_examples(args.data, args.images, **options)
    if args.eval_size >= len(examples):
        raise BadInput(f"--eval-size {args.eval_size} leaves none of {len(examples)} to train on")
    held = sorted(random.Random(f"{config.seed} held out").sample(range(len(examples)), args.eval_size))
    parts = [e for i, e in enumerate(examples) if i not in held], [examples[i] for i in held]
    pairs, held_out = (Pairs(part, args.reject, args.crop, config.seed, pool=examples) for part in parts)
    first = [pairs[0, i] for i in range(len(pairs))[:2]]

    sharded = config.fsdp or config.deepspeed_plugin or "ACCELERATE_USE_FSDP" in os.environ
    if sharded:  # every process reads all weights, and the Trainer shards them
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    else:
        config.mixed_precision = "no"  # as in train.py: no autocast, a bf16 model with an adapter of float32
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model, processor = train.load_model(args.model, "cpu" if sharded else config.device, dtype)
    layer = peft.tuners.lora.Linear if sharded else train.LoraLinear
    model = train.add_lora(model, args.lora_rank, args.lora_alpha, config.seed, layer)
    layout = train.choose_layout(model, processor, first, args.layout, config.max_length)
    if config.gradient_checkpointing:
        train.enable_checkpointing(model)
    config.gradient_checkpointing = config.activation_checkpointing = False  # not by the Trainer as well

    options = {"delta": args.delta, "conditional": args.conditional, "anchors": {*args.anchors} - {"none"}}
    names = [name for name in SCORED if name != "image_rejected" or args.conditional or name in args.anchors]
    rows = {"processor": processor, "layout": layout, "names": names, "max_length": config.max_length}
    base = "" if Path(args.model).is_dir() else f"base_model: {args.model}\n"
    config.card = CARD.format(args=args, config=config, n=len(pairs), options=options, base=base)
    loss = partial(mdpo_loss, beta=config.beta, **options)
    collate = partial(counted_batch, spare=first[:1], **rows)
    trainer = MDPOTrainer(model, config, processor, pairs, held_out, loss, collate)
    if sharded and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise BadInput("FSDP: accelerate shards on two or more GPUs only, and would train in DDP")
    return trainer


def run(argv):
    train.quiet_libraries()
    trainer = make_trainer(*parse(argv))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()  # trainer_state.json: the log
    trainer.end()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
