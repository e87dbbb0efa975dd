"""Train a multimodal model with mDPO on one GPU (or a tiny one on the CPU).

    python train.py --model BAAI/Bunny-v1_0-3B --data silkie.json
    python train.py --resume runs/Bunny-v1_0-3B-silkie-1
    python train.py --demo

The policy is the model with a LoRA adapter. The reference is the same model with the adapter disabled, so
there is no second copy of the weights. Vision tower and projector are frozen. Dropout is off everywhere.
"""

import argparse
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warn in each DataLoader worker
if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # shapes never repeat

import peft
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.modeling_utils import load_state_dict
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils.hub import cached_file, cached_files

from data import (
    BUNNY_SYSTEM,
    CROP,
    LAYOUTS,
    SCORED,
    STRATEGIES,
    BadInput,
    Example,
    Pairs,
    Parser,
    about,
    encode_prompts,
    make_batch,
    read_examples,
    run_command,
    tokenize,
)
from mdpo import LogPs, mdpo_loss, mdpo_step, response_logps, sequence_logps


def main(argv=None, loss=mdpo_loss):
    """The command line -> exit status. loss: any function with the arguments and results of `mdpo_loss`."""
    if "--demo" in (argv or sys.argv):
        from examples.demo import main

        return main(argv, loss)
    saves_memory = "a lower --micro-batch-size or --max-length, or --device cpu"
    return run_command(lambda argv: run(parse_args(argv), loss), argv, saves_memory)


def run(args, loss):
    """One run, from its arguments to the saved adapter -> exit status."""
    with run_folder(args) as out:
        print(f"reading and checking {args.data}")
        pairs, held_out = read_pairs(args)

        print(f"loading {args.model}")
        model, processor = load_model(args.model, args.device)
        print(f"{model.num_parameters():,} parameters in {model.dtype} on {args.device}; checking the layout")
        with about(f"{args.model}: no adapter can be added"):
            model = add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
        first = [pairs[0, i] for i in range(len(pairs))[:2]]
        args.layout = choose_layout(model, processor, first, args.layout, args.max_length)
        if not args.no_checkpointing:
            enable_checkpointing(model)
        write_arguments(out, args, pairs.examples + held_out.examples, model, loss)
        anchors = set(args.anchors) - {"none"}
        loss = partial(loss, beta=args.beta, delta=args.delta, conditional=args.conditional, anchors=anchors)
        # Training computes the log-probabilities that the loss needs, evaluation all that images allow.
        scored = [name for name in SCORED if name != "image_rejected" or not args.no_image]
        names = [name for name in scored if name != "image_rejected" or args.conditional or name in anchors]

        plan = plan_steps(len(pairs), args.batch_size, args.micro_batch_size, args.epochs, args.seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": parameters, "initial_lr": args.lr}]
        optimizer = torch.optim.AdamW(groups, args.lr, args.betas, weight_decay=args.weight_decay,
                                      fused=args.device == "cuda")  # fmt: skip
        records = load_checkpoint(out, args, model, optimizer) if args.resume else []
        write_log(out, records, "w")  # without the steps after the checkpoint, which come again
        done = records[-1]["step"] if records else 0
        warmup_steps = min(math.ceil(args.warmup * len(plan)), len(plan) - 1)  # a single step trains, too
        schedule = transformers.get_cosine_schedule_with_warmup(
            optimizer, warmup_steps, len(plan), last_epoch=done - 1
        )

        collate = partial(make_batch, processor=processor, layout=args.layout, max_length=args.max_length)
        batches = load_batches(pairs, sum(plan[done:], []), partial(collate, names=names), args.workers)
        keys = split([("held out", i) for i in range(len(held_out))], args.micro_batch_size)
        load_held_out = partial(load_batches, held_out, keys, partial(collate, names=scored), args.workers)
        evaluate_now = partial(evaluate, model, load_held_out, loss) if held_out else dict
        save = partial(save_checkpoint, out, args, records, model, optimizer)
        print(f"training {sum(map(torch.numel, parameters)):,} parameters on {len(pairs)} examples, "
              f"{len(held_out)} held out, for {len(plan)} steps of {args.batch_size} -> {out}")  # fmt: skip
        note = partial(log, out, records)
        if held_out and not records:
            note({"step": 0, **evaluate_now()})
        with closing(batches):
            stopped_by = train(model, plan, batches, loss, optimizer, schedule, note, save, evaluate_now,
                               args.max_grad_norm, args.save_every)  # fmt: skip
        if stopped_by:
            print(f"stopped and saved; to continue: python train.py --resume {shlex.quote(str(out))}")
            return 128 + stopped_by
        with replacing(out) as new:
            save_processor(processor, new)
        print(f"\n{held_out_table(records)}\nadapter, log and arguments: {out}")
    return 0


def read_pairs(args):
    """-> the `Pairs` to train on, and those held out. Raises BadInput."""
    read = partial(read_examples, image_dir=args.images, with_images=not args.no_image,
                   skip_bad=args.skip_bad, processor=load_processor(args.model),
                   max_length=args.max_length)  # fmt: skip
    examples = read(args.data, subset=args.subset, limit=args.limit, seed=args.seed)
    if args.eval_size >= len(examples):
        raise BadInput(f"--eval-size {args.eval_size} leaves none of {len(examples)} to train on")
    held = {*random.Random(f"{args.seed} held out").sample(range(len(examples)), args.eval_size)}
    training, held_out = ([e for i, e in enumerate(examples) if (i in held) == out] for out in (False, True))
    held_out += read(args.eval_data) if args.eval_data else []
    options = args.reject, args.crop, args.seed
    return Pairs(training, *options, examples), Pairs(held_out, *options, examples + held_out)


def held_out_table(records):
    """The held-out metrics before training and now, as text; empty if nothing was held out."""
    records = [record for record in records if "eval/loss" in record]
    lines = [f"{'held-out examples':34} before     after"] if records else []
    for name in records and [*records[0]][1:]:
        lines.append(f"  {name.removeprefix('eval/'):28} {records[0][name]:10.4f} {records[-1][name]:9.4f}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- training


def train(model, plan, batches, loss, optimizer, schedule, log, save, evaluate=dict, max_grad_norm=1.0,
          save_every=None):  # fmt: skip
    """The training loop, from the step where `schedule` stands -> the signal that stopped it, or 0.

    plan: of `plan_steps`. batches: an iterator over the micro-batches of these steps, made by `make_batch`.
    loss: as in `mdpo_step`. log: takes the record of a step. save: writes a checkpoint. evaluate: returns the
    metrics of held-out examples, called after each epoch.
    Raises BadInput that names the examples of a step whose loss or gradient is not finite.
    """
    parameters, done = optimizer.param_groups[0]["params"], schedule.last_epoch
    seconds = 0.1 if sys.stderr.isatty() else 10  # between two lines of the progress bar
    steps_per_epoch = sum(micro_batches[0][0][0] == 0 for micro_batches in plan)
    with stop_signals() as stop, tqdm(total=len(plan), initial=done, desc="mDPO", mininterval=seconds) as bar:
        for step, micro_batches in enumerate(plan[done:], done + 1):
            started, metrics, ids, n_examples = time.perf_counter(), [], [], sum(map(len, micro_batches))
            for _ in micro_batches:  # gradient accumulation
                batch = next(batches)
                losses, values = mdpo_step(model, batch, loss)
                (losses.sum() / n_examples).backward()  # the mean over the batch, not over micro-batches
                metrics.append(values)
                ids += batch["ids"]
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            record = {"step": step, "epoch": step / steps_per_epoch, "lr": schedule.get_last_lr()[0]}
            record |= means(metrics, grad_norm=grad_norm)  # the one place that waits for the device
            if not math.isfinite(record["loss"] + record["grad_norm"]):
                raise BadInput(f"step {step}: loss or gradient is not finite; examples: {', '.join(ids)}")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            record["examples_per_second"] = n_examples / (time.perf_counter() - started)
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            end_of_epoch = step % steps_per_epoch == 0
            if end_of_epoch:
                record |= evaluate()
            log(record)
            bar.set_postfix(loss=record["loss"], refresh=False)
            with suppress(OSError):
                bar.update()
            stopping = bool(stop) and step < len(plan)  # read once: a signal may come at any time
            if end_of_epoch or stopping or step % (save_every or len(plan)) == 0:
                save()
            if stopping:
                return stop[0]
    return 0


@torch.no_grad()
def evaluate(model, load, loss):
    metrics = [mdpo_step(model, batch, loss)[1] for batch in load()]
    return {f"eval/{name}": value for name, value in means(metrics).items()}


def means(metrics, **more):
    """[{name: (B,)}, ...] -> {name: mean over all examples}, and more tensors as numbers. Waits once."""
    values = {name: torch.cat([batch[name] for batch in metrics]).double().mean() for name in metrics[0]}
    values |= more
    return dict(zip(values, torch.stack([*values.values()]).tolist()))


def plan_steps(n_examples, batch_size, micro_batch_size, epochs, seed):
    """What each optimizer step sees: a list of its micro-batches, lists of (epoch, index).

    A last, smaller batch is kept. A pure function of its arguments, so that a run can be resumed exactly.
    """
    plan = []
    for epoch in range(epochs):
        order = [(epoch, i) for i in range(n_examples)]
        random.Random(f"{seed} order {epoch}").shuffle(order)
        plan += [split(batch, micro_batch_size) for batch in split(order, batch_size)]
    return plan


def split(values, size):
    return [values[at : at + size] for at in range(0, len(values), size)]


def load_batches(pairs, micro_batches, collate, workers):
    """Yield a batch for each list of (epoch, index), made ahead of time by so many processes."""
    loader = iter(DataLoader(
        pairs,
        batch_sampler=micro_batches,
        collate_fn=collate,
        num_workers=(workers := min(workers, os.cpu_count() or 1)),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_interrupts,
        timeout=300 if workers else 0,  # a worker without shared memory would hang
    ))  # fmt: skip
    try:
        with about("a process that loads data"):
            yield from loader
    finally:
        getattr(loader, "_shutdown_workers", int)()
        for worker in getattr(loader, "_workers", ()):
            worker.kill()  # one that hangs ignores other signals: the exit would wait for it


def ignore_interrupts(worker_id):
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the main process stops workers
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_signals():
    """Yield a list that collects SIGINT and SIGTERM, for the loop to end its step. A second stops at once."""
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        with suppress(OSError):  # `| tee` dies of the same Ctrl-C
            tqdm.write("stopping after this step (again to stop at once)", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- the run's folder


@contextmanager
def run_folder(args):
    """The folder of this run: a new one, or that of --resume. Raises BadInput if anything else is there.

    One process at a time holds it. It is removed again if the run ends before it wrote anything.
    """
    if args.out is None:
        stem = f"runs/{Path(args.model).name}-{Path(args.data).stem}"
        args.out = next(out for i in itertools.count(1) if not os.path.exists(out := f"{stem}-{i}"))
    out = Path(args.out)
    left_by_a_kill = lambda path: path.name == "run.lock" or path.match("new.*tmp")
    if not args.resume and (out.is_file() or not all(map(left_by_a_kill, out.glob("*")))):
        raise BadInput(f"{out}: already exists; choose another --out, or continue the run by --resume {out}")
    made = not out.exists()
    with about(f"{out}: cannot be written to"):
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "run.lock", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{out}: another process is training there") from None
    try:
        yield out
    finally:
        if [*out.glob("*")] == [out / "run.lock"]:
            (out / "run.lock").unlink()
            if made:
                out.rmdir()
        lock.close()


@contextmanager
def replacing(out):
    """A folder for new files, which replace those of `out` when all are complete. Raises BadInput."""
    with about(f"{out}: cannot be written to (existing files are unchanged)"):
        with tempfile.TemporaryDirectory(".tmp", "new.", out) as new:
            yield Path(new)
            for file in filter(Path.is_file, [*Path(new).rglob("*")]):
                target = out / file.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)


def write_arguments(out, args, examples, model, loss):
    """args.json: the run's arguments and versions, and what a resumed run must share. Raises BadInput."""
    # Images count by name, wherever the files are.
    contents = [(*e[:3], *map(os.path.basename, e.images + e.images_rejected), e.id) for e in examples]
    # The first numbers of each weight tell models apart; bf16 is what every device and dtype can hold.
    weights = [(name, *p.shape, p.flatten()[:8].bfloat16().tolist())
               for name, p in model.named_parameters() if not p.requires_grad]  # fmt: skip
    shared = {"data": digest(contents), "weights": digest(weights),
              "loss": getattr(loss, "__qualname__", type(loss).__qualname__)}  # fmt: skip
    with about(f"{out}: cannot be resumed"):
        if others := [name for name in shared if args.resume and args.shared[name] != shared[name]]:
            raise BadInput(f"the run began with other {' and '.join(others)}")
    args.shared = shared
    if not args.resume:
        versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
        with replacing(out) as new:
            (new / "args.json").write_text(json.dumps(vars(args) | {"versions": versions}, indent=2))


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def identity(args):
    """The arguments that decide a run's result, which a checkpoint shares with it."""
    return {k: v for k, v in sorted(vars(args).items()) if k not in MAY_DIFFER}


def seal(args, content):
    """SHA-256, appended to a checkpoint: it tells whether the file is complete, and of this run."""
    return hashlib.sha256(json.dumps(identity(args)).encode() + content).digest()


def save_checkpoint(out, args, records, model, optimizer):
    """The adapter, and what a resumed run needs; order and rejected images are pure functions of the seed."""
    adapter = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if not all(weight.isfinite().all() for weight in adapter.values()):
        raise BadInput(f"step {records[-1]['step']}: its update made a weight infinite; try a lower --lr")
    file, state = io.BytesIO(), optimizer.state_dict()["state"]
    torch.save({"records": records, "adapter": adapter, "optimizer": state}, file)
    content = file.getvalue()
    with replacing(out) as new:
        (new / "checkpoint.pt").write_bytes(content + seal(args, content))
        model.save_pretrained(new, save_embedding_layers=False)
        (new / "README.md").write_text(model_card(args, records), "utf-8", "backslashreplace")


def load_checkpoint(out, args, model, optimizer):
    """-> the log of the steps done, empty if the run was stopped before its first checkpoint."""
    path = out / "checkpoint.pt"
    if not os.path.lexists(path) and not (out / "adapter_model.safetensors").exists():
        return []
    with about(f"{path}: cannot be resumed from"):
        content = path.read_bytes()
        content, end = content[:-32], content[-32:]
        if end != seal(args, content):
            raise BadInput("is damaged, or belongs to a run with other arguments, data or weights")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        peft.set_peft_model_state_dict(model, state["adapter"])
        groups = optimizer.state_dict()["param_groups"]  # of this device, which may be another
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    return state["records"]


def model_card(args, records):
    """README.md of the run's folder: what was trained, on what, how, and how it does on held-out examples."""
    return f"""---
base_model: {args.model}
library_name: peft
tags: [mdpo, lora]
---

# {args.model} after mDPO

A LoRA adapter, trained with mDPO (arXiv:2406.11839) on {Path(args.data).name}: {records[-1]["step"]} steps.

```text
{held_out_table(records) or "No examples were held out."}
```

```json
{json.dumps(identity(args), indent=2)}
```
"""


def log(out, records, record):
    records.append(record)
    write_log(out, [record], "a")


def write_log(out, records, mode):
    with about(f"{out}/metrics.jsonl: cannot be written"), open(out / "metrics.jsonl", mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# ----------------------------------------------------------------------------------------------- command line


def number(kind, low, high):
    """An argparse type: an int or a float within `low` to `high`, so neither nan nor infinite."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be within {low} to {high}, got {text}")
        return value

    convert.__name__ = kind.__name__  # "invalid int value"
    return convert


positive, real, share = number(float, 1e-12, 1e6), number(float, -1e6, 1e6), number(float, 0, 1)
decay, whole, count = number(float, 0, 1 - 1e-6), number(int, 1, 10**7), number(int, 0, 2**63 - 1)

ARGUMENTS = {  # name: (default, type or choices, what it is and where it comes from)
    "model": (None, str, "folder or hub name: Bunny, or any image-text-to-text model of transformers"),
    "data": (None, str, "preference file (README, Data)"),
    "images": (None, str, "folder where relative image paths begin (default: the data file's)"),
    "out": (None, str, "folder for adapter and log (default: a new one, runs/...-1, -2 and so on)"),
    "resume": (None, str, "go on with the run in this folder, exactly, with its own arguments"),
    # data
    "subset": (None, str, "only ids with this prefix; the paper's is llava (4.1)"),
    "limit": (None, whole, "read a random sample of so many examples; 10000 in the paper (4.1)"),
    "eval-size": (0, count, "of these, examples held out; --reject random may show their images"),
    "eval-data": (None, str, "a second preference file, for evaluation only"),
    "max-length": (2048, whole, "tokens of prompt and one response (authors' config)"),
    "reject": ("crop", STRATEGIES, "how the rejected image is made (Table 3): " + "; ".join(
        f"{name}, {strategy.__doc__}" for name, strategy in STRATEGIES.items())),
    "crop": ([*CROP], share, "least and most of the area that a crop keeps (Table 3)"),
    # loss
    "beta": (0.1, positive, "strength of the KL constraint (paper 4.1)"),
    "delta": (0.0, real, "the anchor, in units of reward (paper 4.1)"),
    "anchors": ([], (*LogPs._fields, "none"), "anchored rewards: chosen is eq. 7 and the default, Table 4 "
        "has more; none is Table 2, minus anchored"),
    # optimization
    "epochs": (3, number(int, 1, 1000), "passes over the data (paper 4.1)"),
    "batch-size": (32, whole, "examples per optimizer step (paper 4.1)"),
    "micro-batch-size": (4, whole, "examples at a time: for memory, not for the result"),
    "lr": (1e-5, positive, "peak learning rate (paper 4.1)"),
    "warmup": (0.1, share, "share of the steps, rounded up, before a cosine to 0 (paper 4.1)"),
    "betas": ([0.9, 0.98], decay, "of AdamW (the second: authors' config)"),
    "weight-decay": (0.05, share, "of AdamW (authors' config)"),
    "max-grad-norm": (1.0, positive, "gradient clipping (the default of the authors' trainer)"),
    "lora-rank": (64, whole, "of the adapter (paper 4.1)"),
    "lora-alpha": (128, whole, "of the adapter (paper 4.1)"),
    "seed": (0, count, "of adapter, order, samples and rejected images"),
    # system
    "device": (None, ("cuda", "cpu"), "cuda in bf16 or cpu in float32 (default: cuda if there is one)"),
    "layout": (None, LAYOUTS, "two packed sequences an example, or three plain rows (default: packed if the "
        "first examples show that it is exact for the model)"),
    "workers": (4, count, "processes that decode images"),
    "save-every": (None, whole, "also save a checkpoint every so many steps"),
}  # fmt: skip
SWITCHES = {
    "skip-bad": "drop bad records instead of stopping",
    "no-image": "the data without images, DPO (No Image) of Fig. 1: no conditional term, and no anchor "
    "unless --anchors asks for one",
    "no-conditional": "drop eq. 6 (Table 2, minus conditional)",
    "no-checkpointing": "keep activations: faster, more memory",
}
# What may differ when a run goes on: where its files are, and what changes speed, but not what is trained.
MAY_DIFFER = (
    "resume argv out model data eval_data images workers save_every debug "
    "micro_batch_size device layout no_checkpointing"  # the same but for rounding
).split()


def parse_args(argv):
    """The command line -> a Namespace in which every argument has its final value. Raises BadInput."""
    parser = Parser(
        description="Train a multimodal model with mDPO. --demo: a tiny one, on drawn data.",
        allow_abbrev=False,
    )
    parser._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")  # argparse takes -1e-3 for a flag
    for name, (default, kind, text) in ARGUMENTS.items():
        options = {"type": kind} if callable(kind) else {"choices": kind}
        if isinstance(default, list):
            options["nargs"] = len(default) or "+"
        text += f" (default: {default})" if default not in (None, []) else ""
        parser.add_argument(f"--{name}", default=default, help=text.replace("%", "%%"), **options)
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)

    args = parser.parse_args(argv)
    if args.resume is None:
        return resolve(args, argv)
    out = args.resume
    with about(f"{out}: cannot be resumed"):
        run = json.loads(Path(out, "args.json").read_text())
        began, args = (resolve(parser.parse_args([*run["argv"], *more]), run["argv"]) for more in ([], argv))
        if others := [name for name in (*identity(began), "out") if vars(args)[name] != vars(began)[name]]:
            raise BadInput(f"the run began with other values of {', '.join(others)}")
        args.out, args.shared = out, run["shared"]
        return args


def resolve(args, argv):
    """Fill in what depends on other arguments, and refuse what does not go together."""
    if None in (args.model, args.data):
        raise BadInput("--model and --data are required (--help lists the arguments)")
    args.argv = argv
    args.conditional = not (args.no_conditional or args.no_image)
    args.anchors = [*args.anchors] or ["none" if args.no_image else "chosen"]
    if "none" in args.anchors and len(args.anchors) > 1:
        raise BadInput("--anchors none cannot be combined with other anchors")
    if args.no_image and "image_rejected" in args.anchors:
        raise BadInput("--no-image leaves no rejected image to anchor")
    args.device = args.device or best_device()
    return args


# ----------------------------------------------------------------------------------------------------- models


def load_model(name_or_path, device="cpu", dtype=None):
    """Load Bunny, LLaVA or another image-text-to-text model, from a folder or the hub.

    dtype: default bf16 on "cuda", float32 on "cpu".
    Returns (model, processor): the model frozen and without dropout.
    Raises BadInput if it cannot be read, is of another kind, or has weights that are missing or unexpected.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and ours never repeat
    # Float32 stays float32: cuDNN rounds it to TF32 by default, matrix products do so in some containers.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    processor = load_processor(name_or_path)
    auto, options = transformers.AutoModelForImageTextToText, {"trust_remote_code": False}
    with about(f"{name_or_path}: cannot be loaded"):
        config = read_config(name_or_path)
        if is_bunny(config):
            auto = transformers.LlavaForConditionalGeneration
            options = {"config": bunny_config(name_or_path, config, processor), "key_mapping": BUNNY_KEYS}
        model, loading = auto.from_pretrained(
            name_or_path,
            dtype=dtype or (torch.bfloat16 if device == "cuda" else torch.float32),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        for kind in ("missing", "unexpected", "mismatched"):
            if wrong := loading[f"{kind}_keys"]:
                raise BadInput(f"{len(wrong)} weights are {kind}, such as {min(wrong)}")
        disable_dropout(model)
        return model.requires_grad_(False).to(device), processor


def load_processor(name_or_path):
    """The model's processor, with a chat template, an image token and a pad token. Raises BadInput."""
    transformers.logging.set_verbosity_error()
    with about(f"{name_or_path}: cannot be loaded"):
        if is_bunny(config := read_config(name_or_path)):
            processor = bunny_processor(name_or_path, config)
        else:
            options = {"trust_remote_code": False}
            if transformers.AutoConfig.from_pretrained(name_or_path, **options).is_encoder_decoder:
                raise BadInput("is an encoder-decoder: there a response does not follow its prompt in a row")
            processor = transformers.AutoProcessor.from_pretrained(name_or_path, **options)
            if getattr(processor, "image_token", None) is None:
                raise BadInput("its processor has no image token: not a model of images and text")
            # By default the library takes another one if torchvision is there, and pixels would differ.
            processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
                name_or_path, backend="pil", **options
            )
            files = ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
            processor.files = cached_files(name_or_path, files, _raise_exceptions_for_missing_entries=False)
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        image = (Image.new("RGB", (336, 336)),)  # tokenizer, template or image processor may be broken
        make_batch([Example("Is it?", "Yes.", "No.", image, image)], processor)
    return processor


def save_processor(processor, folder):
    """Save it with the base's own files: they hold parts that cannot be loaded here (see the last lines)."""
    processor.save_pretrained(folder)
    for file in getattr(processor, "files", ()):  # Bunny's processor is made here
        shutil.copy(file, folder)


def read_config(name_or_path):
    return transformers.PreTrainedConfig.get_config_dict(name_or_path)[0]


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def disable_dropout(model):
    """Set every dropout to 0: modules, and rates that layers keep as numbers, such as Bunny's resid_pdrop."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)


def enable_checkpointing(model):
    """Recompute the language model's activations in the backward pass, layer by layer."""
    decoder = model.get_decoder().train()  # which makes layers recompute; the frozen rest stays in eval mode
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    decoder.disable_input_require_grads()  # a need of reentrant checkpointing alone


class LoraLinear(peft.tuners.lora.Linear):
    """peft's LoRA layer, y = W x + b + alpha / r * B A x, where the product with B also scales and adds.

    peft's own forward pass writes B A x, its scaled copy and the sum one after the other. The adapter may be
    float32 in a bf16 model: A and B are rounded as they are used, without autocast.
    """

    def forward(self, x):
        *batch, _ = x.shape
        x = x.flatten(0, -2)  # (tokens, in)
        y = self.base_layer(x)  # (tokens, out)
        if not (self.disable_adapters or self.merged):
            (adapter,) = self.active_adapters
            A, B = (lora[adapter].weight.to(y.dtype) for lora in (self.lora_A, self.lora_B))
            y.addmm_(x.to(y.dtype) @ A.T, B.T, alpha=self.scaling[adapter])
        return y.view(*batch, -1)


def add_lora(model, rank=64, alpha=128, seed=0, layer=LoraLinear):
    """Wrap `model` with LoRA on every linear layer of its language model but lm_head, and on nothing else.

    Rank and alpha are the paper's (4.1), the choice of layers is the authors' config.
    layer: `LoraLinear`, or `peft.tuners.lora.Linear` for frameworks that gather sharded weights by module.
    """
    linear = {module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)}
    names = [name for name, module in model.named_modules() if module in linear]
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    model = peft.get_peft_model(model, config)
    for module in model.modules():
        if type(module) is peft.tuners.lora.Linear:
            module.__class__ = layer  # the same weights under the same names, with another forward pass
    return model


# ------------------------------------------------------------------------------------------- layout, measured

# How far a response of n tokens may be off, in nats over the square root of n, as rounding errors add up.
# Computed in float32, packed and plain rows are off by at most 9e-6, and the library's own call is 4e-6 from
# float64 (random models: eight families, and Bunny-3B in full size). Planted mistakes there: one of 750 keys
# forgotten 3e-4, y_l sees a token of y_w 0.003, positions off by one 0.009, image swapped 0.1.
# In bf16 itself rounding reaches 0.01 and would hide most of them.
TOLERANCE = 5e-5


class InFloat32(torch.overrides.TorchFunctionMode):
    """Inside, functions of torch get their arguments in float32, weights too, as copies for one call."""

    def __torch_function__(self, function, types, args, kwargs=None):
        raised = lambda arg: arg.float() if torch.is_tensor(arg) and arg.is_floating_point() else arg
        kwargs = {name: raised(arg) for name, arg in (kwargs or {}).items()}
        return raised(function(*map(raised, args), **kwargs))


def choose_layout(model, processor, pairs, layout=None, max_length=2048):
    """The layout to train in: packed rows if they are exact for this model, else plain ones. Raises BadInput.

    It is measured on a few pairs, and does not depend on the model's name. layout: try only this one.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None) or max_length
    problem = f"its attention window of {window} tokens is shorter than --max-length {max_length}"
    # Packed rows know no window. The first examples may fit into a short one, but later ones may not.
    layouts = LAYOUTS if window >= max_length else ["plain"]
    layouts = [name for name in layouts if layout in (name, None)]
    # The library's call has logits of all tokens, so that a long response would take all time and memory.
    pairs = [pair._replace(chosen=pair.chosen[:1000], rejected=pair.rejected[:1000]) for pair in pairs]
    with about(f"{model.name_or_path}: cannot be trained in {' or '.join(layouts) or layout} rows"):
        for chosen, error in layout_errors(model, processor, pairs, layouts):
            if error <= TOLERANCE:
                if chosen != (layout or "packed"):
                    print(f"packed rows are not exact for this model ({problem}); "
                          "plain rows take about twice as long")  # fmt: skip
                return chosen
            problem = f"{error:.2g} off the library's own call, in nats / sqrt(tokens); rounding: {TOLERANCE}"
        raise BadInput(problem)


@torch.no_grad()
def layout_errors(model, processor, pairs, layouts=LAYOUTS):
    """Yield each layout with its worst distance from the library's call on one sequence, as in TOLERANCE."""
    model.eval()
    exact, n_tokens = [], []
    for images, response in SCORED.values():
        for pair in pairs:
            tokens = tokenize(processor, pair)
            whole = encode_prompts(
                processor, [tokens.wholes[response]], [getattr(pair, images)]
            ).to(model.device)
            labels = whole["input_ids"].clone()
            labels[:, : -len(tokens.responses[response])] = -100
            with InFloat32():
                exact.append(sequence_logps(model(**whole, use_cache=False).logits, labels))
            n_tokens.append((labels >= 0).sum())
    for layout in layouts:
        with InFloat32():
            logps = response_logps(model, make_batch(pairs, processor, layout, max_length=sys.maxsize))
        errors = (torch.cat(logps) - torch.cat(exact)).abs()
        yield layout, (errors / torch.stack(n_tokens).sqrt()).max().item()


# ---------------------------------------------------------------------------------------- Bunny's file format
#
# BAAI/Bunny-v1_0-3B is a LLaVA (SigLIP tower -> Linear, GELU, Linear -> Phi-2) under names of its own. Its
# remote code is for transformers 4.36. With these renames, the library's own Llava classes load it.
BUNNY_KEYS = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|final_layernorm)": r"model.language_model.\1",
}
# Bunny's vocabulary has no image token, and a new row in lm_head would take probability from the others. So a
# token that never occurs in chat text stands for the image: the run of nine tabs.
BUNNY_IMAGE_TOKEN = "\t" * 9
BUNNY_TEMPLATE = """
{%- if messages[0].role != 'system' -%} {{- "SYSTEM" -}} {%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'assistant' -%} {{- ' ' -}} {%- endif -%}
        {{- 'USER: ' -}}
    {%- elif message.role == 'assistant' -%} {{- ' ASSISTANT: ' -}} {%- endif -%}
    {%- for part in message.content -%}
        {{- "IMAGE\\n" if part.type == 'image' else part.text -}}
    {%- endfor -%}
    {%- if message.role == 'assistant' -%} {{- eos_token -}} {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- ' ASSISTANT:' -}} {%- endif -%}
""".replace("SYSTEM", BUNNY_SYSTEM).replace("IMAGE", BUNNY_IMAGE_TOKEN.replace("\t", "\\t"))


def is_bunny(config):
    return config.get("model_type") == "bunny-phi"


def bunny_config(name_or_path, config, processor):
    """Bunny's config.json -> LlavaConfig. Sizes of the vision tower that it lacks are the weights'."""
    index = "model.safetensors.index.json"
    index = cached_file(name_or_path, index, _raise_exceptions_for_missing_entries=False)
    files = json.loads(Path(index).read_text())["weight_map"].values() if index else ["model.safetensors"]
    weights = {}
    for file in {*files}:
        weights |= load_state_dict(cached_file(name_or_path, file), "meta")  # names and shapes alone
    # One a layer. The hub's checkpoint holds 26: Bunny drops the last of SigLIP's 27.
    layers = [name for name in weights if "vision_tower" in name and name.endswith("mlp.fc1.weight")]
    if not layers:
        raise BadInput("holds no weights of a vision tower")
    intermediate_size, hidden_size = weights[layers[0]].shape
    patch_size, image_size = bunny_patch_and_image_size(config)
    text_config = {k: v for k, v in config.items() if k not in ("model_type", "auto_map") and v is not None}
    if text_config.get("hidden_act") == "gelu_new":
        text_config["hidden_act"] = "gelu_pytorch_tanh"  # the same function, in one kernel in place of eight
    vision_config = transformers.SiglipVisionConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=len(layers),
        num_attention_heads=16, image_size=image_size, patch_size=patch_size, vision_use_head=False,
    )  # fmt: skip
    return transformers.LlavaConfig(
        text_config=transformers.PhiConfig(**text_config), vision_config=vision_config,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_token_index=processor.image_token_id, image_seq_length=(image_size // patch_size) ** 2,
    )  # fmt: skip


def bunny_patch_and_image_size(config):
    """(14, 384) from `google/siglip-so400m-patch14-384`: no other field gives these sizes."""
    return map(int, re.search(r"patch(\d+)-(\d+)$", config["mm_vision_tower"]).groups())


def bunny_processor(name_or_path, config):
    patch_size, image_size = bunny_patch_and_image_size(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        name_or_path, trust_remote_code=False, extra_special_tokens={"image_token": BUNNY_IMAGE_TOKEN}
    )
    if tokenizer.image_token_id >= config["vocab_size"]:
        raise BadInput("its tokenizer has no token of nine tabs, which stands for the image")
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


# ---------------------------------------------------------------------------------------- without torchvision

if not transformers.utils.is_torchvision_available():
    # The library refuses a whole processor if its video processor needs torchvision. No video is processed
    # here, so a processor is loaded without that part; `save_processor` keeps its file.
    every_part = transformers.ProcessorMixin.get_attributes.__func__
    transformers.ProcessorMixin.get_attributes = classmethod(
        lambda cls: [part for part in every_part(cls) if part != "video_processor"]
    )


if __name__ == "__main__":
    sys.exit(main())
