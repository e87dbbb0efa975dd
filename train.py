"""Train a multimodal model with mDPO on one GPU, or a tiny model on the CPU.

    python train.py --model BAAI/Bunny-v1_0-3B --data silkie.json
    python train.py --resume runs/Bunny-v1_0-3B-silkie-1
    python train.py --demo

The policy is the model with a LoRA adapter. The reference is the same model with the adapter disabled, so
there is no second copy of the weights. Vision tower and projector are frozen. Dropout is off everywhere.
"""

import argparse
import hashlib
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
import traceback
import zipfile
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import chain, count
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warn in each DataLoader worker
if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # shapes never repeat

import peft
import torch
import transformers
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.modeling_utils import load_state_dict
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils.hub import cached_file

from data import (
    CROP,
    SCORED,
    STRATEGIES,
    BadInput,
    Pairs,
    Parser,
    about,
    make_batch,
    n_image_tokens,
    one_line,
    progress,
    read_examples,
    run_command,
    texts_of,
)
from mdpo import LogPs, mdpo_loss, mdpo_step, pack, response_logps


def main(argv=None, loss=mdpo_loss):
    """The command line -> exit status. loss: `mdpo_loss`, or one of your own as `mdpo_step` takes it."""
    saves_memory = "a lower --micro-batch-size or --max-length, or --device cpu"
    return run_command(lambda argv: run(parse_args(argv), loss), argv, saves_memory)


def run(args, loss):
    """One run, from its arguments to the saved adapter -> exit status."""
    processor = load_processor(args.model)
    pairs, held_out = read_pairs(args, processor)
    model = load_policy(args, processor, [pairs[i] for i in range(len(pairs))[:2]])
    objective = partial(mdpo_step, model, loss=loss, beta=args.beta, delta=args.delta,
                        conditional=args.conditional, anchors={*args.anchors} - {"none"})  # fmt: skip
    plan = plan_steps(len(pairs), args.batch_size, args.micro_batch_size, args.epochs, args.seed)
    optimizer = make_optimizer(model, args)
    out, shared, records = open_run(args, pairs.examples, model, loss, optimizer)
    done = records[-1]["step"] if records else 0
    save = partial(save_checkpoint, out, args, shared, records, model, processor, optimizer)
    print(f"training on {len(pairs)} examples, {len(held_out)} held out, for {len(plan)} steps of "
          f"{args.batch_size} -> {out}")  # fmt: skip
    if held_out and not records:
        log(out, records, {"step": 0, **evaluate(objective, held_out, processor, args)})

    names = [name for name in SCORED if name != "image_rejected" or args.conditional or name in args.anchors]
    batches = load_batches(pairs, chain(*plan[done:]), names, processor, args)
    steps = train(objective, plan, batches, optimizer, done, args)
    record = None
    to_continue = f"to continue: python train.py --resume {shlex.quote(str(out))}"
    with closing(batches), stop_signals() as stop, progress(steps, "steps", len(plan), initial=done) as bar:
        try:
            for record in bar:
                if (end_of_epoch := record["epoch"].is_integer()) and held_out:
                    record |= evaluate(objective, held_out, processor, args)
                    bar.write(f"epoch {record['epoch']:.0f}, {held_out_table([*records, record])}")
                log(out, records, record)
                bar.set_postfix(loss=record["loss"], refresh=False)
                stopping = [*stop] if record["step"] < len(plan) else []  # read once: a signal may come later
                if end_of_epoch or stopping or record["step"] % (args.save_every or len(plan)) == 0:
                    save()
                if stopping:
                    print(f"stopped and saved; {to_continue}")
                    return 128 + stopping[0]
        except BadInput:  # a batch could not be made, or a step was not finite
            if record and record is records[-1]:
                save()
                print(f"the steps before are saved; {to_continue}")
            raise
    if done == len(plan):
        save()  # no step was left: after a kill between two files of the last checkpoint
    print(f"adapter, log and arguments: {out}")
    return 0


# --------------------------------------------------------------------------------------------------- training


def make_optimizer(model, args):
    """AdamW on the adapter alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f"training {sum(map(torch.numel, parameters)):,} parameters")
    fused = parameters[0].is_cuda
    return torch.optim.AdamW(parameters, args.lr, args.betas, weight_decay=args.weight_decay, fused=fused)


def learning_rate(done, n_steps, args):
    """The learning rate after so many steps: a linear warm-up from 0, then a cosine to 0."""
    n_warmup = min(math.ceil(args.warmup * n_steps), n_steps - 1)  # a single step trains, too
    if done < n_warmup:
        return args.lr * (done / n_warmup)
    progress = (done - n_warmup) / (n_steps - n_warmup)
    return args.lr * (1 + math.cos(math.pi * progress)) / 2


def train(objective, plan, batches, optimizer, done, args):
    """The training loop after the steps done: a generator of a record for each step.

    objective: a batch -> losses (B,) and metrics (B,), such as `mdpo_step` of a model. plan: of `plan_steps`.
    batches: an iterator over the micro-batches of the steps to come.
    Raises BadInput that names the examples of a step whose loss or gradient is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step, micro_batches in enumerate(plan[done:], done + 1):
        started = time.perf_counter()
        n_examples = sum(map(len, micro_batches))
        metrics = []
        ids = []
        for _ in micro_batches:  # gradient accumulation
            batch = next(batches)
            losses, values = objective(batch)
            (losses.sum() / n_examples).backward()  # the mean over the batch, not over micro-batches
            metrics.append(values)
            ids += batch.ids
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        lr = learning_rate(step - 1, len(plan), args)
        record = {"step": step, "epoch": step / (len(plan) // args.epochs), "lr": lr}
        # The one place that waits for the device:
        record |= means(metrics, grad_norm=grad_norm.expand(n_examples))
        if not math.isfinite(record["loss"] + record["grad_norm"]):
            raise BadInput(f"step {step}: loss or gradient is not finite; examples: {', '.join(ids)}")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        record["examples_per_second"] = n_examples / (time.perf_counter() - started)
        device = parameters[0].device if parameters[0].is_cuda else None  # torch takes no other
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        yield record


@torch.no_grad()
def evaluate(objective, held_out, processor, args):
    """The metrics of the held-out pairs: means under the names eval/..."""
    keys = [("held out", i) for i in range(len(held_out))]  # an epoch of its own
    names = [*SCORED][: 2 if args.no_image else 3]  # more than a loss like DPO's needs
    with closing(
        load_batches(held_out, split(keys, args.micro_batch_size), names, processor, args)
    ) as batches:
        metrics = [objective(batch)[1] for batch in batches]
    return {f"eval/{name}": value for name, value in means(metrics).items()}


def means(metrics, **more):
    """[{name: (B,)}, ...], and more values of all examples -> {name: mean over all}. Waits once."""
    values = {name: torch.cat([batch[name] for batch in metrics]) for name in metrics[0]} | more
    numbers = torch.stack([*values.values()]).cpu().double().mean(1)  # Apple's GPU has no float64
    return dict(zip(values, numbers.tolist()))


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


STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}  # Windows has no SIGHUP


@contextmanager
def stop_signals():
    """Yield a list that collects signals to stop: the running step ends first. A second one stops at once."""
    stop = []

    def note(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        tqdm.write("stopping after this step (again to stop at once)", file=sys.stderr)

    # Under nohup SIGHUP is ignored, and stays so.
    before = {n: signal.signal(n, note) for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_batches(pairs, micro_batches, names, processor, args):
    """Yield a `Batch` for each list of (epoch, index), prefetched by --workers processes.

    Workers send arrays through a pipe: tensors would need shared memory, of which containers have little.
    """
    make = partial(make_batch, processor=processor, names=names, max_length=args.max_length)
    loader = DataLoader(
        pairs,
        batch_sampler=micro_batches,
        collate_fn=partial(collate, make=make, layout=args.layout),
        num_workers=min(args.workers, os.cpu_count() or 1),
        pin_memory="cuda" in (args.device or best_device()),  # pinning memory starts CUDA
        worker_init_fn=ignore_signals,
    )
    try:
        with about("a process that loads data"):
            for batch in loader:
                yield batch.map(torch.as_tensor)
    except BadInput as error:  # its traceback holds the workers, which ignore signals: free them
        traceback.clear_frames(error.__cause__.__traceback__)
        raise


def collate(pairs, make, layout):
    batch = pack(make(pairs, share=True)) if layout == "packed" else make(pairs)
    return batch.map(torch.Tensor.numpy)


def ignore_signals(worker_id):
    for number in STOPPING:  # sent to the whole group: the main process ends the step, and needs its batches
        signal.signal(number, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------- data and model


def read_pairs(args, processor):
    """-> the `Pairs` to train on, and those held out, which share no image with them. Raises BadInput."""
    print(f"reading and checking {args.data}")
    read = partial(
        read_examples,
        image_dir=args.images,
        with_images=not args.no_image,
        skip_bad=args.skip_bad,
        processor=processor,
        max_length=args.max_length,
        max_pixels=args.max_pixels,
        check=args.skip_bad or not args.resume,  # the same data were checked when the run began
    )
    examples = read(args.data, subset=args.subset, limit=args.limit, seed=args.seed)
    training, held_out = hold_out(examples, args.eval_size, args.seed)
    if args.eval_data:
        held_out += read(args.eval_data)
    if args.reject != "crop" and all(example.images_rejected for example in training):
        raise BadInput(f"--reject {args.reject} does nothing: every record has rejected images of its own")
    options = args.reject, args.crop, args.seed
    return (Pairs(training, *options, training, args.max_pixels),
            Pairs(held_out, *options, examples + held_out, args.max_pixels))  # fmt: skip


def hold_out(examples, n, seed):
    """-> examples to train on, and at least n others: whole groups that share images, drawn by `seed`."""
    images = [{*example.images, *example.images_rejected} for example in examples]
    draw, held = random.Random(f"{seed} held out"), set()
    while len(held) < min(n, len(examples)):
        group = {draw.randrange(len(examples))}
        while group:  # and those that share an image with them, and so on
            held |= group
            shown = set().union(*(images[i] for i in group))
            group = {i for i, others in enumerate(images) if others & shown} - held
    if len(held) == len(examples):
        raise BadInput(f"--eval-size {n} leaves none of {len(examples)} examples to train on")
    training = [example for i, example in enumerate(examples) if i not in held]
    return training, [examples[i] for i in sorted(held)]


def load_policy(args, processor, first):
    """-> the model with its adapter. Sets args.layout, tried on the first pairs."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadInput("train.py is one process; for many GPUs: torchrun examples/trl_mdpo.py")
    print(f"loading {args.model}")
    model = load_model(args.model, args.device or best_device())[0]
    if not args.device and model.device.type == "cpu" and model.num_parameters() > 500e6:
        raise BadInput("no GPU was found, and a CPU would take weeks; --device cpu takes it all the same")
    print(f"{model.num_parameters():,} parameters in {model.dtype} on {model.device}; checking the layout")
    with about(f"{args.model}: no adapter can be added"):
        model = add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    args.layout = choose_layout(model, processor, first, args.layout, args.max_length)
    if not args.no_checkpointing:
        enable_checkpointing(model)
    return model


# ------------------------------------------------------------------------------------------- the run's folder
#
# args.json: the run's arguments. With them alone, it begins at step 0.
# checkpoint.pt: what decides the result (`identity`), the log, the adapter, the optimizer's state. Order and
# rejected images are pure functions of the seed: nothing else is needed to go on.
# The rest is for people and other programs, and written anew from these.


def open_run(args, examples, model, loss, optimizer):
    """-> the run's folder, its identity, and the log of the steps done, which a new run has none of."""
    shared = identity(args, examples, model, loss)
    records = load_checkpoint(Path(args.out), shared, model, optimizer) if args.resume else []
    with about(f"{args.out or 'runs'}: cannot be written to"):
        if args.out:
            os.makedirs(args.out, exist_ok=True)
        args.out = args.out or new_folder(f"runs/{Path(args.model).name}-{Path(args.data).stem}")
    for left_by_a_kill in Path(args.out).glob("new.*.tmp"):
        shutil.rmtree(left_by_a_kill)
    if not records:
        versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
        with replacing(args.out) as new:
            arguments = vars(args) | shared | {"versions": versions}
            (new / "args.json").write_text(json.dumps(arguments, indent=2))
    write_log(args.out, records, "w")  # without the steps after the checkpoint, which come again
    return Path(args.out), shared, records


def new_folder(stem):
    """Make the first of stem-1, stem-2 and so on that is not there: two runs at once take two."""
    for i in count(1):
        with suppress(FileExistsError):
            os.makedirs(f"{stem}-{i}")
            return f"{stem}-{i}"


UMASK = os.umask(0o077)
os.umask(UMASK)  # it can only be read by setting it


@contextmanager
def replacing(out):
    """A folder for new files, which replace those of `out` when all are complete. Raises BadInput."""
    with about(f"{out}: cannot be written to, as on a full disk (existing files are unchanged)"):
        with tempfile.TemporaryDirectory(".tmp", "new.", out) as new:
            yield Path(new)
            for file in filter(Path.is_file, [*Path(new).rglob("*")]):
                target = Path(out, file.relative_to(new))
                target.parent.mkdir(parents=True, exist_ok=True)
                file.chmod(0o666 & ~UMASK)  # safetensors writes for its user alone
                os.replace(file, target)


def identity(args, examples, model, loss):
    """What decides the result, and must not change when a run is resumed: {what: its value}."""
    files = [Path(path).read_bytes() for path in (args.data, args.eval_data) if path]
    systems = {"".join(texts_of(m for m in one.question if m["role"] == "system")) for one in examples}
    return {name: vars(args)[name] for name in DECISIVE} | {
        "data_files": hashlib.sha256(b"".join(files)).hexdigest(),
        "examples": sha256([example.id for example in examples]),  # --skip-bad may have left others
        "system": systems.pop() if len(systems) == 1 else "",  # answers are asked for with it, too
        "base_weights": fingerprint(model),
        "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
    }


def fingerprint(model):
    """A hash of the frozen weights' first numbers in bf16, which every device and dtype can hold."""
    return sha256([(name, *p.shape, p.flatten()[:8].bfloat16().tolist())
                   for name, p in model.named_parameters() if not p.requires_grad])  # fmt: skip


def sha256(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def refuse_others(now, began):
    """Raise BadInput that names every value that is not what it was when the run began."""
    others = [name.replace("_", " ") for name in began if now.get(name) != began[name]]
    if others:
        raise BadInput(f"it began with other values of {', '.join(others)}")


def save_checkpoint(out, args, shared, records, model, processor, optimizer):
    """checkpoint.pt; then the adapter in peft's format, its model card, and the processor's files."""
    adapter = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if not all(weight.isfinite().all() for weight in adapter.values()):
        raise BadInput(f"step {records[-1]['step']}: its update made a weight infinite; try a lower --lr")
    state = {"run": shared, "records": records, "adapter": adapter}
    with replacing(out) as new:
        torch.save(state | {"optimizer": optimizer.state_dict()["state"]}, new / "checkpoint.pt")
    with replacing(out) as new:
        folders, epoch = [new], records[-1]["epoch"]
        if args.keep_epochs and epoch.is_integer():
            folders.append(new / f"epoch-{epoch:.0f}")
        for folder in folders:
            model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").write_text(model_card(args, records), "utf-8", "backslashreplace")
            save_processor(processor, folder)


def load_checkpoint(out, shared, model, optimizer):
    """-> the log of the steps done, empty if the run was stopped before its first checkpoint."""
    path = out / "checkpoint.pt"
    if not os.path.lexists(path) and not (out / "adapter_model.safetensors").exists():
        return []
    with about(f"{path}: cannot be resumed from"):
        if zipfile.ZipFile(path).testzip():  # torch.load takes most changed bits
            raise BadInput("is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        refuse_others(shared, state["run"])
        if peft.set_peft_model_state_dict(model, state["adapter"]).unexpected_keys:
            raise BadInput("peft cannot load the adapters of this model")
        groups = optimizer.state_dict()["param_groups"]  # of this device, which may be another
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    return state["records"]


def model_card(args, records):
    """README.md of the run's folder: what was trained, on what, and how it does on held-out examples."""
    is_local = os.path.exists(args.model)
    data = one_line(Path(args.data).name)
    name = one_line(Path(args.model).name if is_local else args.model)
    of_hub = "" if is_local else f"base_model: {json.dumps(args.model)}\n"
    return f"""---
{of_hub}library_name: peft
tags: [mdpo, lora]
---

# {name} after mDPO

A LoRA adapter, trained with mDPO (arXiv:2406.11839) on {data}: {records[-1]["step"]} steps.

```text
{held_out_table(records) or "No examples were held out."}
```

```json
{json.dumps({name: vars(args)[name] for name in DECISIVE}, indent=2)}
```
"""


def held_out_table(records):
    """The held-out metrics before training and now, as text; empty if nothing was held out."""
    records = [record for record in records if "eval/loss" in record]
    lines = [f"{'held-out examples':30}   before       now"] if records else []
    for name in records and [*records[0]][1:]:
        lines.append(f"  {name.removeprefix('eval/'):28} {records[0][name]:8.4f} {records[-1][name]:9.4f}")
    return "\n".join(lines)


def log(out, records, record):
    records.append(record)
    write_log(out, [record], "a")


def write_log(out, records, mode):
    with about(f"{out}/metrics.jsonl: cannot be written"), open(Path(out, "metrics.jsonl"), mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# ----------------------------------------------------------------------------------------------- command line


def number(kind, low, high):
    """An argparse type: an int or a float within `low` to `high`, so neither nan nor infinite."""

    def convert(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be within {low} to {high}, got {text}")
        return kind(text)

    convert.__name__ = kind.__name__  # "invalid int value"
    return convert


def printable(text):
    """An argparse type: the name of a file or a model."""
    if not text.isprintable():
        raise argparse.ArgumentTypeError("has control characters, or bytes that are no text, in its name")
    return text


def lasting(text):
    """An argparse type: a path that exists is made absolute: a run may go on from another folder."""
    return os.path.abspath(text) if os.path.exists(printable(text)) else text


positive = number(float, 1e-12, 1e6)
share = number(float, 0, 1)
whole = number(int, 1, 10**9)
natural = number(int, 0, 2**63 - 1)

# name: (default, type or choices, what it is and where it comes from)
FILES = {
    "model": (None, lasting, "folder or hub name: Bunny, LLaVA or another decoder-only model"),
    "data": (None, lasting, "preference file (README, Your data)"),
    "images": (None, lasting, "folder where relative image paths begin (default: the data file's)"),
    "eval-data": (None, lasting, "a second preference file, for evaluation only"),
    "out": (None, printable, "folder for adapter and log (default: a new one, runs/...-1, -2 and so on)"),
    "resume": (None, printable, "resume this folder's run from its last checkpoint, with its own arguments"),
}
METHOD = {  # decide the result: a resumed run keeps its own
    # data
    "subset": (None, str, "only ids with this prefix; the paper's is llava (4.1)"),
    "limit": (None, whole, "read a random sample of N examples; 10000 in the paper (4.1)"),
    "eval-size": (0, natural, "hold out at least N of these examples, which share no image with the others"),
    "skip-bad": (False, bool, "drop bad records instead of stopping"),
    "no-image": (False, bool, "the data without images, DPO (No Image) of Fig. 1: no conditional term, and "
        "no anchor unless --anchors asks for one"),
    "max-pixels": (None, whole, "scale larger images down to N pixels (default: never)"),
    "max-length": (2048, whole, "tokens of prompt and one response (authors' config)"),
    "reject": ("crop", STRATEGIES, "how the rejected image is made (Table 3): " + "; ".join(
        f"{name}, {strategy.__doc__}" for name, strategy in STRATEGIES.items())),
    "crop": ([*CROP], share, "minimum and maximum share of the area that a crop keeps (Table 3)"),
    # loss
    "beta": (0.1, positive, "strength of the KL constraint (paper 4.1)"),
    "delta": (0.0, number(float, -1e6, 1e6), "of eq. 7, in units of reward (paper 4.1)"),
    "no-conditional": (False, bool, "drop eq. 6 (Table 2, minus conditional)"),
    "anchors": ([], (*LogPs._fields, "none"), "anchored rewards: chosen is eq. 7 and the default, Table 4 "
        "has more; none is Table 2, minus anchored"),
    # optimization
    "epochs": (3, number(int, 1, 1000), "passes over the data (paper 4.1)"),
    "batch-size": (32, whole, "examples per optimizer step (paper 4.1)"),
    "lr": (1e-5, positive, "peak learning rate (paper 4.1)"),
    "warmup": (0.1, share, "share of the steps, rounded up, before a cosine to 0 (paper 4.1)"),
    "betas": ([0.9, 0.98], number(float, 0, 1 - 1e-6), "of AdamW (AdamW's default, authors' config)"),
    "weight-decay": (0.05, share, "of AdamW (authors' config)"),
    "max-grad-norm": (1.0, positive, "gradient clipping (the default of the authors' trainer)"),
    "lora-rank": (64, whole, "of the adapter (paper 4.1)"),
    "lora-alpha": (128, whole, "of the adapter (paper 4.1)"),
    "seed": (0, natural, "of adapter, order, samples and rejected images"),
}  # fmt: skip
SYSTEM = {  # may differ when a run is resumed: the result is the same but for rounding
    "device": (None, str, "cuda in bf16 (Ampere or newer), or cpu, mps and so on in float32 (default: cuda "
        "if there is one)"),
    "micro-batch-size": (4, whole, "examples in one forward pass: changes memory and speed, not the result"),
    "no-checkpointing": (False, bool, "keep activations, recompute none: faster, more memory"),
    "layout": (None, ("packed", "plain"), "packed: two sequences an example, end to end; plain: three padded "
        "rows (default: packed if the first examples show that it is exact for the model)"),
    "workers": (4, natural, "processes that prepare batches"),
    "save-every": (None, whole, "also save a checkpoint every N steps"),
    "keep-epochs": (False, bool, "keep the adapter of each epoch in epoch-N"),
}  # fmt: skip
DECISIVE = [name.replace("-", "_") for name in METHOD]


def parse_args(argv):
    """The command line -> a Namespace in which every argument has its final value. Raises BadInput."""
    parser = Parser(
        description="Train a multimodal model with mDPO. --demo trains a tiny one on made-up pictures.",
        allow_abbrev=False,
    )
    for title, arguments in ("files", FILES), ("method", METHOD), ("system", SYSTEM):
        group = parser.add_argument_group(title)
        for name, (default, kind, text) in arguments.items():
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=text)
                continue
            options = {"type": kind} if callable(kind) else {"choices": kind}
            if isinstance(default, list):
                options["nargs"] = len(default) or "+"
            text += f" (default: {default})" if default not in (None, []) else ""
            group.add_argument(f"--{name}", default=default, help=text.replace("%", "%%"), **options)
    args = parser.parse_args(argv)
    if args.resume:
        with about(f"{args.resume}: cannot be resumed"):
            began = json.loads(Path(args.resume, "args.json").read_text())
            parser.set_defaults(**{name: began[name] for name in vars(args)})
            args = parser.parse_args(argv)
            refuse_others(vars(args), {name: began[name] for name in (*DECISIVE, "out")})
            args.out = args.resume
    args.anchors = args.anchors or ["none" if args.no_image else "chosen"]
    args.conditional = not (args.no_conditional or args.no_image)
    taken = args.out and not args.resume and (os.path.isfile(args.out) or [*Path(args.out).glob("*")])
    refused = {
        "--model and --data are required (--help lists the arguments)": None in (args.model, args.data),
        f"{args.out}: already exists; choose another --out, or --resume {args.out}": taken,
        "--anchors none cannot be combined with other anchors": "none" in args.anchors and args.anchors[1:],
        "--no-image leaves no rejected image to anchor": args.no_image and "image_rejected" in args.anchors,
        "--crop: its minimum is above its maximum": args.crop[0] > args.crop[1],
        "--crop does nothing with another --reject": args.crop != [*CROP] and args.reject != "crop",
    }
    for problem, holds in refused.items():
        if holds:
            raise BadInput(problem)
    return args


# ----------------------------------------------------------------------------------------------------- models


def load_model(name_or_path, device="cpu", dtype=None):
    """Load Bunny, LLaVA or another image-text-to-text model, from a folder or the hub.

    dtype: default bf16 on CUDA, float32 elsewhere.
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
            dtype=dtype or (torch.bfloat16 if "cuda" in str(device) else torch.float32),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are named below, as the others
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
            if getattr(processor, "patch_size", 0) is None:
                raise BadInput("its processor has no patch_size: write it into processor_config.json")
            # By default the library takes another one if torchvision is there, and pixels would differ.
            processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
                name_or_path, backend="pil", **options
            )
            files = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
            processor.files = [*filter(None, (file_of(name_or_path, file) for file in files))]
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        n_image_tokens(processor, ((336, 336),))  # tokenizer, template or image processor may be broken
    return processor


def file_of(name_or_path, file):
    """The path of a model's file, from its folder or the hub; None if it has none."""
    with suppress(OSError):
        return cached_file(name_or_path, file)


def save_processor(processor, folder):
    """Save it with the base's own files: they hold parts that cannot be loaded here (see this file's end)."""
    processor.save_pretrained(folder)
    for file in getattr(processor, "files", ()):  # Bunny's processor is made here
        shutil.copy(file, folder)


def read_config(name_or_path):
    if os.path.exists(Path(name_or_path, "adapter_config.json")):
        raise BadInput("is an adapter: merge it first, by python examples/merge.py")
    config = transformers.PreTrainedConfig.get_config_dict(name_or_path)[0]
    if "auto_map" in config and not (is_bunny(config) or config["model_type"] in transformers.CONFIG_MAPPING):
        raise BadInput(
            "needs code of its own, which is not run here: only models that transformers knows are"
        )
    return config


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
    decoder = model.get_decoder()
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    for module in decoder.modules():  # only a layer in training mode recomputes; a router would add noise
        module.training = hasattr(module, "gradient_checkpointing")
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
            A = self.lora_A[adapter].weight.to(y.dtype)
            B = self.lora_B[adapter].weight.to(y.dtype)
            y.addmm_(x.to(y.dtype) @ A.T, B.T, alpha=self.scaling[adapter])
        return y.view(*batch, -1)


def add_lora(model, rank=64, alpha=128, seed=0, layer=LoraLinear):
    """Wrap `model` with LoRA on every linear layer of its language model but lm_head, and on nothing else.

    Rank and alpha are the paper's (4.1), the choice of layers is the authors' config.
    layer: `LoraLinear`, or `peft.tuners.lora.Linear` for frameworks that gather sharded weights by module.
    """
    decoder = {*model.get_decoder().modules()}
    names = [name for name, m in model.named_modules() if m in decoder and isinstance(m, torch.nn.Linear)]
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    model = peft.get_peft_model(model, config)
    for module in model.modules():
        if type(module) is peft.tuners.lora.Linear:
            module.__class__ = layer  # the same weights under the same names, with another forward pass
    return model


# ------------------------------------------------------------------------------------------- layout, measured

# The largest accepted error of a log-probability, in nats per square root of its tokens, as rounding adds up.
# Packed and plain rows in float32 are at most 9e-6 apart (random models: 43 kinds, and Bunny-3B in full
# size). Planted mistakes: one of 750 keys forgotten 3e-4, y_l sees a token of y_w 0.003, positions off by one
# 0.009, image swapped 0.1. In bf16 itself rounding reaches 0.01 and would hide most of them.
TOLERANCE = 5e-5


class InFloat32(torch.overrides.TorchFunctionMode):
    """Inside, functions of torch get their arguments in float32, weights too, as copies for one call."""

    def __torch_function__(self, function, types, args, kwargs=None):
        raised = lambda arg: arg.float() if torch.is_tensor(arg) and arg.is_floating_point() else arg
        kwargs = {name: raised(arg) for name, arg in (kwargs or {}).items()}
        return raised(function(*map(raised, args), **kwargs))


def choose_layout(model, processor, pairs, layout=None, max_length=2048):
    """The layout to train in: "packed" if it passes `check_layout` on these pairs, else "plain".

    layout: the only one allowed. Raises BadInput if the model cannot be trained in it.
    """
    if layout not in (None, "packed", "plain"):
        raise BadInput(f"unknown layout {layout!r}: choose from packed, plain")
    if layout is None:
        try:
            check_layout(model, processor, pairs, "packed", max_length)
            return "packed"
        except BadInput as error:
            print(f"{error}; plain rows take about twice as long")
    check_layout(model, processor, pairs, layout or "plain", max_length)
    return layout or "plain"


@torch.no_grad()
def check_layout(model, processor, pairs, layout, max_length):
    """Compare plain rows with those of this layout in reverse order, in float32. Raises BadInput.

    In reverse, since a row's numbers must not depend on its place in the batch either.
    """
    make = partial(make_batch, processor=processor, max_length=max_length)
    with about(f"{model.name_or_path}: cannot be trained in {layout} rows"), InFloat32():
        window = getattr(model.config.get_text_config(), "sliding_window", None) or max_length
        if layout == "packed" and window < max_length:  # it may hold the first examples, but not later ones
            raise BadInput(
                f"the attention window of {window} tokens is shorter than --max-length {max_length}"
            )
        plain = make(pairs)
        other = pack(make(pairs[::-1], share=True)) if layout == "packed" else make(pairs[::-1])
        expected = torch.stack(response_logps(model, plain)).cpu()  # (3, B)
        found = torch.stack(response_logps(model, other)).cpu().flip(1)  # in the same order
        if not expected.isfinite().all():
            raise BadInput("the log-probabilities are not finite: the weights may be damaged")
        n_tokens = (plain.labels >= 0).sum(1).view(expected.shape)
        error = ((found - expected).abs() / n_tokens.sqrt()).max().item()
        if not error <= TOLERANCE:  # nan, too
            raise BadInput(
                f"log-probabilities are {error:.2g} nats / sqrt(tokens) off, rounding: {TOLERANCE}"
            )


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
BUNNY_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
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
    index = file_of(name_or_path, "model.safetensors.index.json")
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
    of_bunny = ("model_type", "auto_map")
    text_config = {k: v for k, v in config.items() if k not in of_bunny and v is not None}
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
    if "--demo" in sys.argv:
        from examples.demo import main
    sys.exit(main())
