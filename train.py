"""Train a multimodal model with mDPO on one GPU (or a tiny one on the CPU).

    python train.py --model BAAI/Bunny-v1_0-3B --data silkie.json
    python train.py --resume runs/Bunny-v1_0-3B-silkie-1
    python train.py --demo

The policy is the model with a LoRA adapter; the reference is the same model with the adapter switched off, so there is
no second copy of the weights. Vision tower and projector are frozen, and dropout is off everywhere.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # DataLoader workers are forked after the tokenizer was used

import peft
import torch
import transformers
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import cached_file

from data import (
    BUNNY_SYSTEM,
    CROP,
    LAYOUTS,
    SCORED,
    STRATEGIES,
    BadInput,
    Pairs,
    about,
    encode_prompts,
    make_batch,
    read_examples,
    run_command,
    to_device,
    tokenize,
)
from mdpo import LogPs, mdpo_loss, mdpo_step, response_logps, sequence_logps, use_packed_attention


def main(argv=None):
    return run_command(lambda argv: run(parse_args(argv)), argv)


def run(args):
    """One run, from its arguments to the saved adapter -> exit status."""
    quiet_libraries()
    if args.demo:
        from examples import demo

        if not args.resume:
            demo.prepare(args)
    out = claim_folder(args)
    try:
        processor = load_processor(args.model)
        examples = read_examples(
            args.data, args.images, skip_bad=args.skip_bad, subset=args.subset, limit=args.limit, seed=args.seed,
            with_images=not args.no_image, processor=processor, max_length=args.max_length,
        )  # fmt: skip
        if args.eval_size >= len(examples):
            raise BadInput(f"--eval-size {args.eval_size} leaves nothing of {len(examples)} examples to train on")
        held = set(random.Random(f"{args.seed} held out").sample(range(len(examples)), args.eval_size))
        held_out = [example for i, example in enumerate(examples) if i in held]
        training = [example for i, example in enumerate(examples) if i not in held]

        cuda = args.device == "cuda"
        model, processor = load_model(args.model, args.device, torch.bfloat16 if cuda else torch.float32)
        model = add_lora(model, args.lora_rank, args.lora_alpha, args.seed, args.lora_targets)
        pairs, held_out_pairs = (Pairs(part, args.reject, args.crop, args.seed, examples) for part in (training, held_out))
        first = [pairs[0, i] for i in range(len(pairs))[:2]]
        args.layout = choose_layout(model, processor, first, args.layout, args.max_length)
        if args.checkpointing:
            enable_checkpointing(model)

        # The log-probabilities that the loss needs; held-out examples are measured by all that their images allow.
        all_names = [name for name, (images, _) in SCORED.items() if images == "images" or not args.no_image]
        needs = lambda name: name != "image_rejected" or args.conditional or name in args.anchors
        loader = partial(make_loader, processor=processor, layout=args.layout, max_length=args.max_length,
                         workers=args.workers, pin_memory=cuda)  # fmt: skip
        loss = partial(mdpo_loss, beta=args.beta, delta=args.delta, conditional=args.conditional, anchors=args.anchors)
        plan = plan_steps(len(training), args.batch_size, args.micro_batch_size, args.epochs, args.seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, args.lr, args.betas, weight_decay=args.weight_decay, fused=cuda)
        warmup_steps = min(math.ceil(args.warmup * len(plan)), len(plan) - 1)  # its first step has rate 0
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup_steps, len(plan))

        where = f"{torch.cuda.get_device_name()}, bf16" if cuda else "CPU, float32 (no CUDA device is used)"
        n_layers, n_parameters = (sum(f(p) for p in parameters) for f in (lambda p: 0.5, torch.numel))
        print(f"{where}; LoRA on {n_layers:.0f} linear layers of the language model, {n_parameters:,} parameters train")
        print(f"{len(training)} examples, {len(held_out)} held out; {len(plan)} steps of {args.batch_size} -> {out}")
        write_arguments(out, args, examples)
        done = load_checkpoint(out, model, optimizer, schedule) if args.resume else 0
        start_log(out, done)
        eval_batches = loader(held_out_pairs, split([("held out", i) for i in range(len(held_out))], args.micro_batch_size), all_names)
        evaluate_now = partial(evaluate, model, eval_batches, loss)
        if done == 0 and held_out:
            log(out, {"step": 0, **evaluate_now()})
        batches = loader(pairs, sum(plan[done:], []), [*filter(needs, all_names)])
        stopped_by = train(model, plan, batches, loss, optimizer, schedule, out, done=done, examples=training,
                           max_grad_norm=args.max_grad_norm, save_every=args.save_every, evaluate=evaluate_now)  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise BadInput(f"out of GPU memory at --micro-batch-size {args.micro_batch_size}: try a smaller one") from error
    finally:
        if not any(out.iterdir()):
            out.rmdir()
    if stopped_by:
        print(f"stopped and saved; this goes on: python train.py --resume {out}")
        return 128 + stopped_by
    model.save_pretrained(out, save_embedding_layers=False)
    processor.save_pretrained(out)
    print(f"\n{before_and_after(out)}\n")
    if args.demo:
        print(f"{demo.report(model, processor, out)}\n")
    print(f"adapter, log and arguments: {out}")
    return 0


# ---------------------------------------------------------------------------------------------------------- training


def train(model, plan, batches, loss, optimizer, schedule, out, examples, done=0, max_grad_norm=1.0, save_every=None,
          evaluate=dict):  # fmt: skip
    """The training loop: the steps of `plan` after the first `done`. Returns the signal that stopped it, or 0.

    plan: of `plan_steps`. batches: those of `make_batch` for each micro-batch of the steps to do. loss: as of `mdpo_step`.
    out: the run's folder. evaluate: a function -> metrics of held-out examples, called after each epoch.
    Raises BadInput that names the examples of a step whose loss or gradient is not finite.
    """
    batches, parameters = iter(batches), optimizer.param_groups[0]["params"]
    steps_per_epoch = sum(micro_batches[0][0][0] == 0 for micro_batches in plan)
    model.train()
    with stop_signals() as stop, tqdm(total=len(plan), initial=done, desc="mDPO", dynamic_ncols=True) as bar:
        for step, micro_batches in enumerate(plan[done:], done + 1):
            started, metrics, n_examples = time.perf_counter(), [], sum(map(len, micro_batches))
            for _ in micro_batches:  # gradient accumulation
                losses, values = mdpo_step(model, to_device(next(batches), model.device), loss)
                (losses.sum() / n_examples).backward()  # the mean of the whole batch, however large its micro-batches
                metrics.append({"loss": losses.detach(), **values})
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            record = {"step": step, "epoch": step / steps_per_epoch, **means(metrics)}  # waits for the device
            record |= {"lr": schedule.get_last_lr()[0], "grad_norm": grad_norm.item()}
            if not math.isfinite(record["loss"] + record["grad_norm"]):
                ids = ", ".join(examples[i].id for keys in micro_batches for _, i in keys)
                raise BadInput(f"step {step}: the loss or its gradient is not finite; examples of the batch: {ids}")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            record["examples_per_second"] = n_examples / (time.perf_counter() - started)
            record["peak_memory_gib"] = peak_memory_gib(model.device)
            end_of_epoch = step % steps_per_epoch == 0
            if end_of_epoch:
                record |= evaluate()
            log(out, record)
            show(bar, record)
            if end_of_epoch or stop or step % (save_every or len(plan)) == 0:
                save_checkpoint(out, step, model, optimizer, schedule)
            if stop and step < len(plan):
                return stop[0]
    return 0


@torch.no_grad()
def evaluate(model, batches, loss):
    metrics = []
    for batch in tqdm(batches, desc="held out", leave=False, disable=None):
        losses, values = mdpo_step(model, to_device(batch, model.device), loss)
        metrics.append({"loss": losses, **values})
    return {f"eval/{name}": value for name, value in means(metrics).items()}


def means(metrics):
    """[{name: (B,)}, ...] -> {name: mean over all examples}. Waits for the device, once."""
    names = metrics[0] if metrics else ()
    values = [torch.cat([batch[name] for batch in metrics]).double().mean() for name in names]
    return dict(zip(names, torch.stack(values).tolist())) if values else {}


def plan_steps(n_examples, batch_size, micro_batch_size, epochs, seed):
    """What each optimizer step sees: a list of its micro-batches, lists of (epoch, index).

    A last, smaller batch is used, not dropped. A pure function of its arguments, so that a run can be resumed exactly.
    """
    plan = []
    for epoch in range(epochs):
        order = [(epoch, i) for i in range(n_examples)]
        random.Random(f"{seed} order {epoch}").shuffle(order)
        plan += [split(batch, micro_batch_size) for batch in split(order, batch_size)]
    return plan


def split(values, size):
    return [values[at : at + size] for at in range(0, len(values), size)]


def make_loader(pairs, micro_batches, names, *, processor, layout, max_length, workers, pin_memory=False):
    """A DataLoader of `make_batch`'s results, one for each list of (epoch, index)."""
    return DataLoader(
        pairs,
        batch_sampler=micro_batches,
        collate_fn=partial(make_batch, processor=processor, layout=layout, names=names, max_length=max_length),
        num_workers=min(workers, len(micro_batches), os.cpu_count() or 1),
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupts,
    )


def ignore_interrupts(worker_id):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one stops the workers


@contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM are noted in the list that this yields, so that the step ends. A second one stops at once."""
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        tqdm.write("stopping after this step (again to stop at once)", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(bar, record):
    names = {"loss": "loss", "rewards/image_accuracies": "image_acc", "rewards/chosen": "chosen_reward",
             "examples_per_second": "ex/s", "peak_memory_gib": "GiB"}  # fmt: skip
    bar.set_postfix({short: f"{record[name]:.3f}" for name, short in names.items() if name in record})
    bar.update()


def peak_memory_gib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# -------------------------------------------------------------------------------------------------- the run's folder


def claim_folder(args):
    """The folder of this run, made; never one that holds something else. Raises BadInput."""
    if args.out is None:
        stem, number = f"{Path(args.model).name}-{Path(args.data).stem}", 1
        while Path("runs", f"{stem}-{number}").exists():
            number += 1
        args.out = str(Path("runs", f"{stem}-{number}"))
    out = Path(args.out)
    holds_run = (out / "args.json").is_file()
    if holds_run and not (args.resume or args.overwrite):
        raise BadInput(f"{out}: already holds a run; go on with it by --resume {out}, or replace it by --overwrite")
    if out.is_dir() and any(out.iterdir()) and not holds_run:
        raise BadInput(f"{out}: is not empty and holds no run; name a new folder with --out")
    with about(f"{out}: cannot be written to"):
        out.mkdir(parents=True, exist_ok=True)
    return out


def write_arguments(out, args, examples):
    """args.json: the run's arguments, versions and a hash of the data. A resumed run's data must have that hash."""
    data_sha256 = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    if args.resume:
        if json.loads((out / "args.json").read_text())["data_sha256"] != data_sha256:
            raise BadInput(f"{out}: the data of {args.data} are not those that the run began with")
        return
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "checkpoint.pt"):
        (out / name).unlink(missing_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    record = vars(args) | {"data_sha256": data_sha256, "versions": versions}
    write_atomically(out / "args.json", lambda path: path.write_text(json.dumps(record, indent=2)))


def write_atomically(path, write):
    """write(temporary path), then rename: the file is there whole, or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save_checkpoint(out, step, model, optimizer, schedule):
    """All that a resumed run needs: order, crops and random images are pure functions of the seed."""
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = {"step": step, "adapter": adapter, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    write_atomically(out / "checkpoint.pt", partial(torch.save, state))


def load_checkpoint(out, model, optimizer, schedule):
    """-> the number of steps done, 0 if the run was stopped before its first checkpoint."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


def log(out, record):
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(out):
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]  # every whole line ends in a newline


def start_log(out, done):
    """Drop what metrics.jsonl says of steps after `done`: they come again."""
    kept = [json.dumps(record) + "\n" for record in read_log(out) if record["step"] <= done and done > 0]
    write_atomically(out / "metrics.jsonl", lambda path: path.write_text("".join(kept)))


def before_and_after(out):
    """A table: held-out metrics before and after; with nothing held out, the first and the last tenth of the steps."""
    records = read_log(out)
    tenth = math.ceil(len(records) / 10)
    first, last, title, prefix = records[:tenth], records[-tenth:], f"training, first and last {tenth} steps", ""
    if held_out := [record for record in records if "eval/loss" in record]:
        first, last, title, prefix = held_out[:1], held_out[-1:], "held-out examples", "eval/"
    mean = lambda records, name: sum(record[name] for record in records) / len(records)
    lines = [f"{title:34} before     after"]
    for name in first[0]:
        if name.startswith((prefix + "loss", prefix + "rewards/")):
            lines.append(f"  {name.removeprefix(prefix):28} {mean(first, name):10.4f} {mean(last, name):9.4f}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, as for every other mistake
        raise BadInput(f"{message} (--help lists the arguments)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        has_value = action.default is not None and action.nargs != 0
        return super()._get_help_string(action) if has_value else action.help


def number(kind, allowed, description):
    """An argparse type: an int or a finite float that is `allowed`."""

    def convert(text):
        value = kind(text)
        if not (abs(value) < math.inf and allowed(value)):  # also False for nan
            raise argparse.ArgumentTypeError(f"must be {description}, got {text}")
        return value

    convert.__name__ = kind.__name__  # "invalid int value"
    return convert


positive, whole = (number(kind, lambda x: x > 0, "above 0") for kind in (float, int))
not_negative, count = (number(kind, lambda x: x >= 0, "0 or above") for kind in (float, int))
share = number(float, lambda x: 0 <= x <= 1, "within 0 to 1")
decay = number(float, lambda x: 0 <= x < 1, "0 or above and below 1")
finite = number(float, lambda x: True, "finite")
seed = number(int, lambda n: 0 <= n < 2**63, "0 or above and below 2**63")

# What may differ when a run goes on: where its files are, and what changes speed, but not what is trained.
MAY_DIFFER = {"model", "data", "images", "out", "resume", "overwrite", "debug", "workers", "save_every"}
MAY_DIFFER |= {"micro_batch_size", "device", "layout", "checkpointing"}  # the same but for rounding


# fmt: off
def make_parser():
    parser = Parser(description="Train a multimodal model with mDPO.", formatter_class=Help)
    parser._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")  # argparse takes -1e-3 for a flag
    add = parser.add_argument
    add("--model", help="folder or hub name: Bunny, or any image-text-to-text model of transformers")
    add("--data", help="preference file (README, Data)")
    add("--images", metavar="DIR", help="where relative image paths begin (default: the data file's folder)")
    add("--out", metavar="DIR", help="folder for adapter and log (default: a new one, runs/...-1, -2 and so on)")
    add("--demo", action="store_true", help="make a tiny model and drawn data, and train on them")
    add("--resume", metavar="RUN", help="go on with the run in this folder, exactly, with its own arguments")
    add = parser.add_argument_group("data").add_argument
    add("--subset", metavar="PREFIX", help="only ids that begin so; the paper's is llava (4.1)")
    add("--limit", type=whole, metavar="N", help="a sample of N examples; the paper's is 10000 (4.1)")
    add("--eval-size", type=count, default=0, metavar="N", help="examples held out, never trained on")
    add("--skip-bad", action="store_true", help="drop bad records instead of stopping")
    add("--max-length", type=whole, default=2048, metavar="N", help="tokens of prompt and one response (authors' config)")
    add("--reject", choices=STRATEGIES, default="crop", help="how the rejected image is made (Table 3): " + "; ".join(
        f"{name}, {function.__doc__}" for name, function in STRATEGIES.items()).replace("%", "%%"))
    add("--crop", type=share, nargs=2, default=CROP, metavar=("LO", "HI"), help="share of the area that a crop keeps (Table 3)")
    add("--no-image", action="store_true", help="the data without images, DPO (No Image) of Fig. 1: no conditional term, "
        "and no anchor unless --anchors asks for one")
    add = parser.add_argument_group("loss").add_argument
    add("--beta", type=positive, default=0.1, help="strength of the KL constraint (paper 4.1)")
    add("--delta", type=finite, default=0.0, help="the anchor, in units of reward (paper 4.1)")
    add("--no-conditional", dest="conditional", action="store_false", help="drop eq. 6 (Table 2, minus conditional)")
    add("--anchors", nargs="+", choices=(*LogPs._fields, "none"), metavar="NAME", help="anchored rewards: any of chosen "
        "(eq. 7), rejected, image_rejected (Table 4); none is Table 2, minus anchored (default: chosen)")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=whole, default=3, metavar="N", help="passes over the data (paper 4.1)")
    add("--batch-size", type=whole, default=32, metavar="N", help="examples an update (paper 4.1)")
    add("--micro-batch-size", type=whole, default=4, metavar="N", help="examples at a time: for memory, not for the result")
    add("--lr", type=positive, default=1e-5, help="peak learning rate (paper 4.1)")
    add("--warmup", type=share, default=0.1, help="share of the steps, rounded up, before a cosine to 0 (paper 4.1); a single "
        "step has none")
    add("--betas", type=decay, nargs=2, default=(0.9, 0.98), metavar=("B1", "B2"), help="of AdamW (B2: authors' config)")
    add("--weight-decay", type=not_negative, default=0.05, help="of AdamW (authors' config)")
    add("--max-grad-norm", type=positive, default=1.0, help="gradient clipping (the default of the authors' trainer)")
    add("--lora-rank", type=whole, default=64, metavar="R", help="(paper 4.1)")
    add("--lora-alpha", type=whole, default=128, metavar="A", help="(paper 4.1)")
    add("--lora-targets", nargs="+", metavar="NAME", help="only these linear layers of the language model, such as q_proj "
        "v_proj (default: all, as in the authors' config)")
    add("--seed", type=seed, default=0, help="of adapter, order, samples and rejected images")
    add = parser.add_argument_group("system").add_argument
    add("--device", choices=("cuda", "cpu"), help="(default: cuda if there is one)")
    add("--layout", choices=LAYOUTS, help="two packed sequences an example, or three plain rows (default: packed where the first "
        "examples show that it is exact for the model)")
    add("--no-checkpointing", dest="checkpointing", action="store_false", help="keep activations: faster, more memory")
    add("--workers", type=count, default=4, metavar="N", help="processes that decode images")
    add("--save-every", type=whole, metavar="N", help="a checkpoint every N steps, beside each epoch's")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser
# fmt: on


def parse_args(argv):
    """The command line -> a Namespace in which every argument has its final value. Raises BadInput."""
    parser, saved = make_parser(), {}
    args = parser.parse_args(argv)
    if args.resume:
        with about(f"{args.resume}: holds no run to resume"):
            saved = json.loads(Path(args.resume, "args.json").read_text())
    elif args.demo:
        from examples.demo import DEFAULTS as saved
    parser.set_defaults(**saved)
    args = resolve(parser.parse_args(argv))
    if args.resume:
        args.out = args.resume
        now = json.loads(json.dumps(vars(args)))
        changed = [name for name in now.keys() - MAY_DIFFER if now[name] != saved.get(name)]
        if changed:
            was = "; ".join(f"--{name.replace('_', '-')} was {saved.get(name)}" for name in sorted(changed))
            raise BadInput(f"{args.resume}: a run goes on as it began: {was}")
    return args


def resolve(args):
    """Fill in what depends on other arguments, and refuse what does not go together."""
    for name in ("model", "data"):
        if not getattr(args, name) and not args.demo:
            raise BadInput(f"--{name} is missing (or try --demo)")
    if args.batch_size % args.micro_batch_size:
        raise BadInput(f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size}")
    if not 0 < args.crop[0] <= args.crop[1]:
        raise BadInput(f"--crop needs 0 < LO <= HI <= 1, got {args.crop[0]} {args.crop[1]}")
    if args.no_image:
        args.conditional = False
    if args.anchors is None:
        args.anchors = [] if args.no_image else ["chosen"]
    elif "none" in args.anchors:
        if len(args.anchors) > 1:
            raise BadInput("--anchors none stands alone")
        args.anchors = []
    if args.no_image and "image_rejected" in args.anchors:
        raise BadInput("--no-image leaves no rejected image to anchor")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: no CUDA device was found")
    args.device = args.device or best_device()[0]
    return args


# ----------------------------------------------------------------------------------------------------------- models


def load_model(name_or_path, device="cpu", dtype=torch.float32):
    """Load Bunny, LLaVA or another image-text-to-text model, from a folder or the hub.

    Returns (model, processor): the model frozen, without dropout, in `dtype` on `device`, with `mdpo.packed_attention`.
    Raises BadInput if it cannot be read, is of another kind, or has weights that are missing or unexpected.
    """
    processor = load_processor(name_or_path)
    auto, options = transformers.AutoModelForImageTextToText, {"trust_remote_code": False}
    with cannot_load(name_or_path):
        config = read_config(name_or_path)
        if is_bunny(config):
            auto = transformers.LlavaForConditionalGeneration
            options = {"config": bunny_config(name_or_path, config, processor), "key_mapping": BUNNY_KEYS}
        model, loading = auto.from_pretrained(
            name_or_path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, loading[problem])):
                raise BadInput(f"{len(keys)} {problem.replace('_', ' ')} in the weights, such as {keys[0]}")
    disable_dropout(model)
    use_packed_attention(model)
    return model.requires_grad_(False).to(device), processor


def load_processor(name_or_path):
    """The model's processor, with a chat template, an image token and a pad token. Raises BadInput."""
    with cannot_load(name_or_path):
        if is_bunny(config := read_config(name_or_path)):
            return bunny_processor(name_or_path, config)
        config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise BadInput(f"is of type {config.model_type}, which in transformers {transformers.__version__} is no model "
                           "that takes images and text and writes text")  # fmt: skip
        if config.is_encoder_decoder:
            raise BadInput("is an encoder-decoder, in which a response does not follow its prompt in a row")
        processor = transformers.AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
        if getattr(processor, "image_token", None) is None or getattr(processor, "image_processor", None) is None:
            raise BadInput("has no image token; mDPO needs a model that takes images and text")
        if not processor.chat_template:
            raise BadInput("its processor has no chat template, so it is not known how to ask it a question")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def cannot_load(name_or_path):
    where = "the folder" if os.path.isdir(name_or_path) else "neither a folder here nor readable from the hub"
    return about(f"{name_or_path}: cannot be loaded ({where})")


def read_config(name_or_path):
    return transformers.PreTrainedConfig.get_config_dict(name_or_path)[0]


def best_device():
    """-> ("cuda", bfloat16) where there is a GPU, else ("cpu", float32): what `load_model` takes."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def quiet_libraries():
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' renames speak to us, not to who trains
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def disable_dropout(model):
    """Set every dropout to 0: modules, and rates that layers keep as numbers (Bunny's config asks for resid_pdrop 0.1)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def enable_checkpointing(model):
    """Recompute the language model's activations in the backward pass, layer by layer."""
    model.get_decoder().gradient_checkpointing_enable({"use_reentrant": False})
    model.get_decoder().disable_input_require_grads()  # a need of reentrant checkpointing alone


class LoraLinear(peft.tuners.lora.Linear):
    """peft's LoRA layer, y = W x + b + alpha / r * B A x, with the scaling and the sum left to the product with B.

    peft's own forward pass writes B A x, its scaled copy and the sum one after the other. The adapter may be float32
    where the model is bf16: A and B are rounded as they are used, without autocast.
    """

    def forward(self, x):
        *batch, _ = x.shape
        x = x.flatten(0, -2)  # (tokens, in)
        y = self.base_layer(x)  # (tokens, out)
        if not (self.disable_adapters or self.merged):
            (adapter,) = self.active_adapters
            A, B = (side[adapter].weight.to(y.dtype) for side in (self.lora_A, self.lora_B))  # (r, in), (out, r)
            y.addmm_(x.to(y.dtype) @ A.T, B.T, alpha=self.scaling[adapter])
        return y.view(*batch, -1)


def add_lora(model, rank=64, alpha=128, seed=0, targets=None, layer=LoraLinear):
    """Wrap `model` with LoRA on every linear layer of its language model, and on nothing else.

    Rank and alpha are the paper's (4.1), the choice of layers is the authors' config.

    targets: names of layers, such as "q_proj": only those. Raises BadInput if the language model has none of a name.
    layer: `LoraLinear`, or `peft.tuners.lora.Linear` for frameworks that shard weights and gather them module by module.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    layers = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    if unknown := sorted(set(targets or ()) - set(leaves)):
        raise BadInput(f"--lora-targets {unknown[0]}: the linear layers of the language model are {', '.join(leaves)}")
    pattern = rf"{re.escape(prefix)}\.(.*\.)?({'|'.join(targets or leaves)})"
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=pattern)
    model = peft.get_peft_model(model, config)
    for module in model.modules():
        if type(module) is peft.tuners.lora.Linear:
            module.__class__ = layer  # the same weights under the same names, with another forward pass
    return model


# ------------------------------------------------------------------------------------------------- layout, measured

# How far a response of n tokens may be off, in nats over the square root of n, as rounding errors add up.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.3}


def choose_layout(model, processor, pairs, layout=None, max_length=2048):
    """The layout to train in: packed rows where they are exact for this model, else plain ones. Raises BadInput.

    Decided by measuring on a few pairs, not by what the model is called. layout: only this one is tried.
    """
    text_config = model.config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    for candidate in [layout] if layout else LAYOUTS:
        if candidate == "packed" and text_config._attn_implementation != "packed":
            reason = "its attention cannot be replaced"
        elif candidate == "packed" and window and window < max_length:
            reason = f"its layers see {window} tokens back, fewer than --max-length {max_length}"
        else:
            error = layout_error(model, processor, pairs, candidate, max_length)
            if error <= TOLERANCE[model.dtype]:
                return candidate
            reason = f"{error:.2g} nats off the library's own call, where {TOLERANCE[model.dtype]} is rounding"
        if layout is None and candidate == "packed":
            print(f"packed rows are not exact for this model ({reason}): training on plain ones")
    raise BadInput(f"{model.name_or_path}: cannot be trained in {candidate} rows: {reason}")


@torch.no_grad()
def layout_error(model, processor, pairs, layout, max_length=2048):
    """How far a layout is from the library's own call on one sequence at a time: the worst response, as in TOLERANCE."""
    model.eval()
    names = [name for name, (images, _) in SCORED.items() if images == "images" or any(p.images_rejected for p in pairs)]
    ours = response_logps(model, to_device(make_batch(pairs, processor, layout, names, max_length), model.device))
    errors = []
    for i, pair in enumerate(pairs):
        for name in names:
            images, response = SCORED[name]
            tokens = tokenize(processor, pair)
            whole = encode_prompts(processor, [tokens.wholes[response]], [getattr(pair, images)]).to(model.device)
            labels = whole["input_ids"].clone()
            start = labels.shape[1] - len(tokens.after[response])
            end = min(start + len(tokens.responses[response]), max_length)
            labels[:, :start] = labels[:, end:] = -100
            theirs = sequence_logps(model(**whole, use_cache=False).logits, labels)
            errors.append((getattr(ours, name)[i] - theirs).abs() / math.sqrt(end - start))
    return torch.cat(errors).max().item()


# ---------------------------------------------------------------------------------------------- Bunny's file format
#
# BAAI/Bunny-v1_0-3B is a LLaVA (SigLIP tower -> Linear, GELU, Linear -> Phi-2) under names of its own. Its remote code
# is for transformers 4.36; with these renames the library's own Llava loads it.
BUNNY_KEYS = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|final_layernorm)": r"model.language_model.\1",
}
# Bunny's vocabulary has no image token and no spare row; a new row in lm_head would take probability from the others.
# A token that never occurs in chat text stands for the image instead: the run of nine tabs.
BUNNY_IMAGE_TOKEN = "\t" * 9
BUNNY_TEMPLATE = """
{%- if messages[0].role != 'system' -%} {{- "SYSTEM" -}} {%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%} {{- 'USER: ' if messages[loop.index0 - 1].role == 'assistant' and not loop.first else ' USER: ' -}}
    {%- elif message.role == 'assistant' -%} {{- ' ASSISTANT: ' -}} {%- endif -%}
    {%- for part in message.content -%} {{- "IMAGE\\n" if part.type == 'image' else part.text -}} {%- endfor -%}
    {%- if message.role == 'assistant' -%} {{- eos_token -}} {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- ' ASSISTANT:' -}} {%- endif -%}
""".replace("SYSTEM", BUNNY_SYSTEM).replace("IMAGE", BUNNY_IMAGE_TOKEN.replace("\t", "\\t"))


def is_bunny(config):
    return config.get("model_type") == "bunny-phi"


def bunny_config(name_or_path, config, processor):
    """Bunny's config.json -> LlavaConfig. What it does not say of the vision tower is read off the weights."""
    index = cached_file(name_or_path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index:
        file_of = json.loads(Path(index).read_text())["weight_map"]
    else:
        with safe_open(cached_file(name_or_path, "model.safetensors"), "pt") as weights:
            file_of = dict.fromkeys(weights.keys(), "model.safetensors")
    layer = "model.vision_tower.vision_tower.vision_model.encoder.layers.{}.mlp.fc1.weight"
    n_layers = 0  # the hub's checkpoint holds 26: Bunny drops the last of SigLIP's 27
    while layer.format(n_layers) in file_of:
        n_layers += 1
    if not n_layers:
        raise BadInput("holds no weights of a vision tower")
    with safe_open(cached_file(name_or_path, file_of[layer.format(0)]), "pt") as weights:
        intermediate_size, hidden_size = weights.get_slice(layer.format(0)).get_shape()
    patch_size, image_size = bunny_patch_and_image_size(config)
    text_config = {k: v for k, v in config.items() if k not in ("model_type", "auto_map") and v is not None}
    if text_config.get("hidden_act") == "gelu_new":
        text_config["hidden_act"] = "gelu_pytorch_tanh"  # the same function, in one kernel in place of eight
    return transformers.LlavaConfig(
        text_config=transformers.PhiConfig(**text_config),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=n_layers,
            num_attention_heads=16,
            image_size=image_size,
            patch_size=patch_size,
            vision_use_head=False,
        ),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=processor.image_token_id,
        image_seq_length=(image_size // patch_size) ** 2,
    )


def bunny_patch_and_image_size(config):
    """(14, 384) from `google/siglip-so400m-patch14-384`; no file of the checkpoint says it otherwise."""
    sizes = re.search(r"patch(\d+)-(\d+)$", config.get("mm_vision_tower", ""))
    if not sizes:
        raise BadInput("mm_vision_tower in config.json does not end in patch<P>-<pixels>")
    return int(sizes[1]), int(sizes[2])


def bunny_processor(name_or_path, config):
    patch_size, image_size = bunny_patch_and_image_size(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        name_or_path, trust_remote_code=False, extra_special_tokens={"image_token": BUNNY_IMAGE_TOKEN}
    )
    if tokenizer.image_token_id >= config["vocab_size"]:
        raise BadInput("its tokenizer has no token of nine tabs, which stands for the image")
    tokenizer.pad_token = tokenizer.eos_token
    image_processor = LlavaImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_pad=True,  # to a square, in the mean colour
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=BUNNY_TEMPLATE,
    )


# -------------------------------------------------------------------------------------------------- without torchvision

if not transformers.utils.is_torchvision_available():
    # The library's video processors need torchvision, and it refuses a whole processor for want of one. No video is
    # processed here: a processor is made of its other parts.
    every_part = transformers.ProcessorMixin.get_attributes.__func__
    transformers.ProcessorMixin.get_attributes = classmethod(
        lambda cls: [part for part in every_part(cls) if part != "video_processor"]
    )


if __name__ == "__main__":
    sys.exit(main())
