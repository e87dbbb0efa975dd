"""mDPO on many GPUs: the numbers of train.py from TRL's DPOTrainer (needs trl, written for 1.16).

    python examples/trl_mdpo.py --model llava-hf/llava-1.5-7b-hf --data silkie.json --output_dir OUT
    torchrun --nproc_per_node 8 examples/trl_mdpo.py ...            # DDP; with --fsdp or --deepspeed, sharded
    accelerate launch --config_file CONFIG examples/trl_mdpo.py ...

The model, the batches, their order, the rejected images and the loss are train.py's. TRL's Trainer adds
the processes, checkpoints, logging and the hub. Flags are `DPOConfig`'s, with the paper's values as defaults,
and train.py's own for data, loss and adapter. A flag that would have no effect here is refused by name.
"""

import math
import os
import re
import sys
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from random import Random

import datasets
import peft
import torch
import transformers
from huggingface_hub import ModelCardData
from torch.distributed.fsdp import register_fsdp_forward_method
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import SCORED, BadInput, Pairs, about, make_batch, read_examples, run_command
from mdpo import forward_inputs, mdpo_loss, response_logps
from train import ARGUMENTS, SWITCHES, LoraLinear, Parser, add_lora, choose_layout, enable_checkpointing
from train import load_model, load_processor, make_loader, plan_steps, quiet_libraries, resolve, split

PAPER = {name: default for name, (default, *_) in ARGUMENTS.items()}
OURS = "model data images subset limit eval-size reject crop delta anchors lora-rank lora-alpha layout".split()
OURS += "no-conditional skip-bad".split()
HONOURED = re.compile(
    "output_dir|run_name|project|report_to|disable_tqdm|(log|logging|trackio|hub|save|ddp|fsdp|per_device)_.*|"
    "enable_jit_checkpoint|push_to_hub|resume_from_checkpoint|restore_callback_states_from_checkpoint|"
    "eval_(strategy|steps|delay|on_start)|load_best_model_at_end|metric_for_best_model|greater_is_better|"
    "num_train_epochs|max_steps|learning_rate|lr_scheduler_.*|warmup_steps|optim|optim_args|weight_decay|adam_.*|"
    "max_grad_norm|gradient_accumulation_steps|(gradient|activation)_checkpointing|beta|max_length|seed|"
    "full_determinism|bf16|tf32|use_cpu|torch_empty_cache_steps|skip_memory_metrics|debug|local_rank|"
    "dataloader_num_workers|include_num_input_tokens_seen|fsdp|deepspeed"
)


@dataclass
class MDPOConfig(DPOConfig):
    """`DPOConfig` with the paper's values as defaults. Raises BadInput for fields that mDPO does not use."""

    learning_rate: float = PAPER["lr"]
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = PAPER["warmup"]  # below 1: a share of all steps
    adam_beta1: float = PAPER["betas"][0]
    adam_beta2: float = PAPER["betas"][1]
    weight_decay: float = PAPER["weight-decay"]
    max_grad_norm: float = PAPER["max-grad-norm"]
    num_train_epochs: float = PAPER["epochs"]
    max_length: int = PAPER["max-length"]
    beta: float = PAPER["beta"]
    seed: int = PAPER["seed"]
    per_device_train_batch_size: int | None = None  # these two: 32 examples an update, 4 or fewer at a time
    gradient_accumulation_steps: int | None = None
    per_device_eval_batch_size: int = PAPER["micro-batch-size"]
    dataloader_num_workers: int = PAPER["workers"]
    logging_steps: float = 1
    save_strategy: str = "epoch"
    ddp_find_unused_parameters: bool | None = False  # every weight of the adapter is used
    ddp_broadcast_buffers: bool | None = False

    def __post_init__(self):
        default = lambda field: field.default_factory() if field.default is MISSING else field.default
        given = [f.name for f in fields(DPOConfig) if getattr(self, f.name) != default(f)]
        if unused := [f"--{name}" for name in given if not HONOURED.fullmatch(name)]:
            raise BadInput(f"not used in mDPO: {', '.join(unused)}")
        processes, size = int(os.environ.get("WORLD_SIZE", 1)), PAPER["batch-size"]
        micro = self.per_device_train_batch_size or min(PAPER["micro-batch-size"], -(-size // processes))
        at_once = processes * micro
        accumulation = self.gradient_accumulation_steps or -(-size // at_once)
        self.batch_size = at_once * accumulation if self.gradient_accumulation_steps else max(size, at_once)
        self.per_device_train_batch_size, self.gradient_accumulation_steps = micro, accumulation
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.use_cpu
        super().__post_init__()

    def get_warmup_steps(self, num_training_steps):
        return min(super().get_warmup_steps(num_training_steps), num_training_steps - 1)


class MDPOTrainer(DPOTrainer):
    """DPOTrainer with the data, the batches and the loss of train.py. Metrics are means over examples."""

    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "mdpo"]

    def __init__(self, model, config, processor, pairs, held_out, loss, collate, card):
        self.pairs, self.held_out, self.loss, self.collate, self.card = pairs, held_out, loss, collate, card
        marker = datasets.Dataset.from_dict({"images": [0]})  # stands for `pairs`: TRL looks for this column
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
        keys = dealt(split(keys, self.args.per_device_eval_batch_size), self.args)
        collate = partial(self.collate, names=tuple(SCORED))
        return make_loader(self.held_out, keys, collate, self.args.dataloader_num_workers)

    def _get_num_items_in_batch(self, batch_samples, device):
        n_examples = sum(batch["n_examples"] for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(n_examples, device=device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the loss, times the number of processes, which average gradients."""
        inner, n_examples = self.accelerator.unwrap_model(model), inputs["n_examples"]
        if not hasattr(inner, "forward_inputs"):
            inner.forward_inputs = partial(forward_inputs, inner)
            register_fsdp_forward_method(inner, "forward_inputs")  # FSDP2 gathers the weights for it, too
        shared = inner.forward_inputs(inputs)
        policy_logps = response_logps(model, inputs, shared)  # first: FSDP2 notes here which weights train
        with torch.no_grad(), inner.disable_adapter():
            ref_logps = response_logps(inner, inputs, shared)
        losses, metrics = self.loss(policy_logps, ref_logps)
        for name, values in {"loss": losses.detach(), **metrics}.items():
            self._metrics["train" if model.training else "eval"][name].append(values[:n_examples])
        n_in_update = num_items_in_batch or len(losses)
        loss = losses[:n_examples].sum() * self.args.world_size / n_in_update
        return (loss, None) if return_outputs else loss

    def log(self, logs, start_time=None):
        metrics = self._metrics["train" if self.model.training else "eval"]
        if metrics:
            values = [torch.cat(micro_batches).double() for micro_batches in metrics.values()]
            sums = torch.stack([torch.tensor(len(values[0])).to(values[0]), *(v.sum() for v in values)])
            n_examples, *sums = self.accelerator.reduce(sums).tolist()
            metrics.update(zip([*metrics], ([total / n_examples] for total in sums)))
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.create_model_card(folder=output_dir)  # in place of peft's blank one

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, folder=None):
        if self.is_world_process_zero():
            Path(folder or self.args.output_dir, "README.md").write_text(self.card)


class Epochs:
    """A batch sampler: this process's micro-batches of an epoch, lists of (epoch, index)."""

    def __init__(self, config, n_examples):
        self.config, self.n_examples = config, n_examples
        self.set_epoch(0)

    def set_epoch(self, epoch):
        sizes = self.config.batch_size, self.config.per_device_train_batch_size
        plan = plan_steps(self.n_examples, *sizes, epoch + 1, self.config.seed)
        steps = plan[len(plan) // (epoch + 1) * epoch :]
        self.micro_batches = sum((dealt(step, self.config) for step in steps), [])

    def __len__(self):
        return len(self.micro_batches)

    def __iter__(self):
        return iter(self.micro_batches)


def dealt(micro_batches, config):
    """This process's part: every process gets as many, with empty ones at the end where they do not suffice."""
    n = config.world_size
    return (micro_batches + [[]] * (-len(micro_batches) % n))[config.process_index :: n]


def make_trainer(argv):
    """The command line -> the trainer. Raises BadInput."""
    parser = type("Flags", (Parser, transformers.HfArgumentParser), {})(MDPOConfig, allow_abbrev=False)
    for name in OURS:
        default, kind, text = ARGUMENTS.get(name, (False, None, SWITCHES.get(name)))
        options = {"type": kind} if callable(kind) else {"choices": kind} if kind else {"action": "store_true"}
        if isinstance(default, tuple):
            options["nargs"] = len(default) or "+"
        options |= {"default": default, "help": text.replace("%", "%%"), "required": name in ("model", "data")}
        parser.add_argument(*sorted({f"--{name}", f"--{name.replace('-', '_')}"}), **options)
    with about("arguments"):
        config, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    args.no_image, args.device = False, config.device.type
    resolve(args)
    if args.eval_size and config.eval_strategy == "no":
        config.eval_strategy, config.eval_on_start = "epoch", not config.resume_from_checkpoint
    if config.eval_strategy != "no" and not args.eval_size:
        raise BadInput("--eval_strategy needs --eval-size")
    if (folder := config.resume_from_checkpoint) and not Path(folder, "trainer_state.json").is_file():
        raise BadInput(f"--resume_from_checkpoint {folder}: holds no checkpoint")

    names = ("skip_bad", "subset", "limit")
    options = {name: getattr(args, name) for name in names} | {"seed": config.seed}
    processor = load_processor(args.model)
    examples = read_examples(args.data, args.images, processor=processor, max_length=config.max_length, **options)
    if args.eval_size >= len(examples):
        raise BadInput(f"--eval-size {args.eval_size} leaves none of {len(examples)} to train on")
    held = sorted(Random(f"{config.seed} held out").sample(range(len(examples)), args.eval_size))
    parts = [e for i, e in enumerate(examples) if i not in held], [examples[i] for i in held]
    pairs, held_out = (Pairs(part, args.reject, args.crop, config.seed, pool=examples) for part in parts)

    sharded = bool(config.fsdp or config.deepspeed_plugin or os.environ.get("ACCELERATE_USE_FSDP"))
    if sharded:  # each process reads all weights, which TRL's Trainer shards later
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    else:
        config.mixed_precision = "no"  # as in train.py: a model of bf16, an adapter of float32, no autocast
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model, processor = load_model(args.model, "cpu" if sharded else config.device, dtype)
    layer = peft.tuners.lora.Linear if sharded else LoraLinear
    model = add_lora(model, args.lora_rank, args.lora_alpha, config.seed, layer)
    first = [pairs[0, i] for i in range(len(pairs))[:2]]
    layout = choose_layout(model, processor, first, args.layout, config.max_length)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    config.gradient_checkpointing = config.activation_checkpointing = False  # done: not by the Trainer again

    anchors = {*args.anchors} - {"none"}
    loss = partial(mdpo_loss, beta=config.beta, delta=args.delta, conditional=args.conditional, anchors=anchors)
    names = [name for name in SCORED if name != "image_rejected" or args.conditional or name in anchors]

    def collate(batch, names=names):
        rows = make_batch(batch or first[:1], processor, layout, names, config.max_length)
        return rows | {"n_examples": len(batch)}

    return MDPOTrainer(model, config, processor, pairs, held_out, loss, collate, model_card(args, config, pairs))


def model_card(args, config, pairs):
    base = {} if Path(args.model).is_dir() else {"base_model": args.model}
    header = ModelCardData(library_name="peft", tags=["mdpo", "dpo", "trl", "lora"], **base).to_yaml()
    settings = vars(args) | config.to_dict()
    names = "reject crop delta anchors conditional lora_rank lora_alpha beta learning_rate lr_scheduler_type "
    names += "warmup_steps num_train_epochs max_length seed"
    lines = [f"- {name}: {settings[name]}" for name in names.split()]
    return "\n".join([
        f"---\n{header}\n---\n\n# {Path(config.output_dir).name}\n",
        f"A LoRA adapter for `{args.model}`, trained with mDPO (https://arxiv.org/abs/2406.11839) on "
        f"{len(pairs)} preferences of `{Path(args.data).name}`, {config.batch_size} an update:\n", *lines,
    ]) + "\n"  # fmt: skip


def run(argv):
    quiet_libraries()
    trainer = make_trainer(argv)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()
    return 0


def main(argv=None):
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
