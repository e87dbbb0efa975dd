"""How fast is a training step? This loop against the authors' scheme and TRL's DPO, on the same model and examples.

    python examples/throughput.py --shape tiny                       # CPU, one thread, minutes
    python examples/throughput.py --shape bunny-3b --json gpu.jsonl  # one GPU; also llava-7b
    python examples/throughput.py --shape tiny --trl                 # also TRL's DPOTrainer (needs trl)

Models have random weights and are made on the device: speed does not depend on the weights, and nothing is downloaded.
Texts have lengths as in Silkie: questions of about 40 tokens, answers of about 110 and 90, log-normal around these.

    ours         two packed rows an example, images encoded once, logits of response tokens only
    authors      what their release does, on the same model: three rows padded to the longest, policy and reference each
                 with their own encoding of three images an example, float32 logits of the whole sequence
    trl          TRL's DPOTrainer: plain DPO, so two rows and no rejected image (needs trl)

Before it times anything, ours and authors are checked to give equal log-probabilities. They are timed in turns, step by
step, so that a change in the machine's speed meets both. A line of JSON for each measurement, a table last.

Useful FLOPs are 2 x parameters x tokens for each of: the reference's forward pass, the policy's, and its backward pass,
which is as dear as a forward pass, as frozen weights need no gradient. Counted are the language model's layers over real
(unpadded) tokens, its head over response tokens, and the vision tower over patches. Recomputation and padding are not useful.
"""

import argparse
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import Pairs, make_batch, read_examples, to_device
from examples import tiny_bunny
from mdpo import LogPs, mdpo_loss, response_logps, unwrapped

WORDS = "there is a red circle and blue square here the picture of on in with small large near left right".split()


def siglip(**sizes):
    return transformers.SiglipVisionConfig(**sizes, vision_use_head=False)


SHAPES = {  # language model, vision tower, patches a side
    "tiny": (
        transformers.PhiConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                               vocab_size=2560, attention_dropout=0.0, resid_pdrop=0.0),
        siglip(hidden_size=48, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, image_size=216, patch_size=8),
    ),
    "bunny-3b": (
        transformers.PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
                               vocab_size=51200, partial_rotary_factor=0.4, attention_dropout=0.0, resid_pdrop=0.0),
        siglip(hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
               patch_size=14),
    ),
    "llava-7b": (
        transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                                 num_key_value_heads=32, vocab_size=32064),
        transformers.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                      image_size=336, patch_size=14),
    ),
}  # fmt: skip


def make_model(shape, device, dtype, rank):
    """A Llava with random weights, LoRA on its language model -> (peft model, processor)."""
    text, vision = SHAPES[shape]
    side = vision.image_size // vision.patch_size
    clip = isinstance(vision, transformers.CLIPVisionConfig)
    with tempfile.TemporaryDirectory() as folder:
        tiny_bunny.write_tokenizer(Path(folder), [" ".join(WORDS)] * 3)
        tower = f"patch{vision.patch_size}-{vision.image_size}"
        processor = train.bunny_processor(folder, {"mm_vision_tower": tower, "vocab_size": text.vocab_size})
    if clip:  # its first token stands for the whole image, and is left out
        processor.num_additional_image_tokens, processor.vision_feature_select_strategy = 1, "default"
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=processor.image_token_id,
        vision_feature_layer=-2 if clip else -1, vision_feature_select_strategy="default" if clip else "full",
        image_seq_length=side**2,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    train.disable_dropout(model)
    return train.add_lora(model.requires_grad_(False), rank, 2 * rank), processor


def make_items(n, seed=0):
    """n items for `make_batch`, of Silkie-like lengths."""
    rng = random.Random(seed)
    words = lambda mean: " ".join(rng.choices(WORDS, k=max(3, round(mean * math.exp(rng.gauss(0, 0.5) - 0.125)))))
    image = lambda: Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), rng.randint(10, 90)).convert("RGB")
    return [(words(40), words(110), words(90), image(), image()) for _ in range(n)]


# ----------------------------------------------------------------------------------------------------- three schemes


def our_losses(model, batch, args):
    return train.forward(model, batch, args)[0]


def reference_known(model, batch, args):
    return train.forward(model, batch, args, LogPs(*torch.zeros(3, batch["batch_size"], device=args.device)))[0]


def encoding_twice(model, batch, args):
    batch = to_device(batch, args.device)
    with train.precision(args.device):
        with torch.no_grad(), model.disable_adapter():
            ref_logps = response_logps(model, batch)
        return mdpo_loss(response_logps(model, batch), ref_logps, args.beta)[0]


def all_logits(model, batch, args):
    """Logits at every position, of which those that predict response tokens are picked afterwards."""
    everywhere = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    targets = torch.zeros_like(everywhere).scatter(1, batch["predictors"], batch["targets"])
    field = torch.full_like(everywhere, -1).scatter(1, batch["predictors"], batch["target_field"])
    return our_losses(model, batch | {"predictors": everywhere, "targets": targets, "target_field": field}, args)


def authors_losses(model, batch, args):
    batch = to_device(batch, args.device)
    with train.precision(args.device):
        with torch.no_grad(), model.disable_adapter():
            ref_logps = authors_logps(model, batch)
        policy_logps = authors_logps(model, batch)
    return mdpo_loss(policy_logps, ref_logps, args.beta)[0]


def authors_logps(model, batch):
    """The library's own call on three padded rows an example, and logits of every position."""
    names = ("input_ids", "attention_mask", "pixel_values")
    logits = model(**{name: batch[name] for name in names}, use_cache=False).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]  # (3B, T - 1)
    return LogPs(*(logps * batch["is_response"]).sum(1).chunk(3))


def plain_batch(items, processor):
    """Three rows an example, with a mask (3B, T - 1) of the positions that predict a response token."""
    batch = make_batch(items, processor, "plain")
    mask = torch.zeros(batch["input_ids"].shape[0], batch["input_ids"].shape[1] - 1)
    mask.scatter_add_(1, batch["predictors"], (batch["target_field"] >= 0).float())
    return batch | {"is_response": mask}


def trl_step(model, processor, items, checkpointing, args):
    """-> a function that takes a step of TRL's DPOTrainer up to the backward pass, on these items."""
    from trl import DPOConfig, DPOTrainer

    from examples.trl_mdpo import trl_dataset

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(items), beta=args.beta, report_to="none",
        bf16=args.device == "cuda", use_cpu=args.device == "cpu", gradient_checkpointing=checkpointing,
        remove_unused_columns=False, max_length=None,
    )  # fmt: skip
    rows = trl_dataset(items)
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=processor)
    batch = trainer.data_collator([rows[i] for i in range(len(rows))])
    return lambda: trainer.compute_loss(trainer.model, to_device(batch, args.device)).backward()


# ---------------------------------------------------------------------------------------------------------- measuring


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


class Stepper:
    """A scheme with its own optimizer: `step()` -> seconds. The batches come round and round."""

    def __init__(self, name, model, batches, losses, args):
        self.name, self.model, self.batches, self.losses, self.args = name, model, batches, losses, args
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-5, fused=args.device == "cuda")
        self.times, self.count = [], 0

    def step(self):
        synchronize(self.args.device)
        started = time.perf_counter()
        batch = self.batches[self.count % len(self.batches)]
        if self.losses:
            self.losses(self.model, batch, self.args).mean().backward()
        else:
            batch()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.args.device)
        self.count += 1
        return time.perf_counter() - started


def useful_flops(model, batch):
    """FLOPs of one example's three useful passes, averaged over a packed batch; see the module's text."""
    model = unwrapped(model)
    count = lambda module: sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)
    layers, head, tower = count(model.get_decoder().layers), count(model.lm_head), count(model.model.vision_tower)
    tokens, targets = (batch["segments"] > 0).sum().item(), (batch["target_field"] >= 0).sum().item()
    patches = len(batch["pixel_values"]) * model.config.image_seq_length
    return (3 * 2 * (layers * tokens + head * targets) + 2 * tower * patches) / batch["batch_size"]


def matmul_rate(device, dtype, size=8192, times=30):
    """FLOP/s that this device reaches on a large product of matrices."""
    size = size if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(5):
        a @ b
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        a @ b
    synchronize(device)
    return times * 2 * size**3 / (time.perf_counter() - started)


def peak_memory(args, scheme, checkpointing):
    """GiB before the first step (on a GPU: the weights) and, above that, at the worst moment of three steps.

    Measured in a fresh process.
    """
    command = [sys.executable, __file__, "--shape", args.shape, "--device", args.device, "--only", scheme,
               "--micro-batch-size", str(args.micro_batch_size), "--threads", str(args.threads)]  # fmt: skip
    command += ["--checkpointing"] * checkpointing
    exactly = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # what is freed goes back at once, and is not counted again
    before, above = subprocess.run(command, env=exactly, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return {"before": float(before), "above": float(above)}


def memory_now(device, peak=False):
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30
    line = "VmHWM:" if peak else "VmRSS:"  # not getrusage's peak, which a process inherits from the one that started it
    return int(Path("/proc/self/status").read_text().partition(line)[2].split()[0]) / 2**20


def prepare(args, checkpointing, grouped):
    """-> (peft model, processor, micro-batches of items, which `grouped` orders by length as training does)."""
    model, processor = make_model(args.shape, args.device, args.dtype, rank=64 if args.shape != "tiny" else 8)
    if checkpointing:
        train.enable_checkpointing(model)
    items = make_items(16)
    if grouped:
        items.sort(key=lambda item: sum(map(len, item[:3])))
    return model.train(), processor, train.micro_batches(items, args.micro_batch_size)


def measure_memory(args):
    model, processor, groups = prepare(args, args.checkpointing, True)
    batches = [make_batch(groups[-1], processor)] if args.only == "ours" else [plain_batch(groups[-1], processor)]
    stepper = Stepper(args.only, model, batches, our_losses if args.only == "ours" else authors_losses, args)
    gc.collect()
    before = memory_now(args.device)
    for _ in range(3):
        stepper.step()
    print(before, memory_now(args.device, peak=True) - before)


def in_turns(steppers, n_batches, rounds):
    """Time the first of the steppers against each other -> {name: {"median", "low", "high"}} of how many times as long."""
    for stepper in steppers:
        for _ in range(2):
            stepper.step()
    for _ in range(rounds):
        for stepper in steppers:
            stepper.times.append(sum(stepper.step() for _ in range(n_batches)) / n_batches)
    ours, *others = steppers
    ratios = {other.name: sorted(b / a for a, b in zip(ours.times, other.times)) for other in others}
    return {name: {"median": statistics.median(r), "low": r[0], "high": r[-1]} for name, r in ratios.items()}


def compare(args, ours_checkpointing, authors_checkpointing, grouped):
    """Time ours against the authors' scheme (and TRL's) -> a record."""
    model, processor, groups = prepare(args, ours_checkpointing, grouped)
    ours = Stepper("ours", model, [make_batch(group, processor) for group in groups], our_losses, args)
    model_of_authors, _, in_order = prepare(args, authors_checkpointing, False)
    model_of_authors.load_state_dict(model.state_dict())
    theirs = Stepper(
        "authors", model_of_authors, [plain_batch(group, processor) for group in in_order], authors_losses, args
    )
    check_equal(model, processor, in_order[0], args)
    rivals = [ours, theirs]
    if args.trl:
        step = trl_step(model_of_authors, processor, in_order[0], authors_checkpointing, args)
        rivals.append(Stepper("trl", model_of_authors, [step], None, args))
    speedup = in_turns(rivals, len(groups), args.rounds)
    seconds = statistics.median(ours.times)
    flops = sum(useful_flops(model, batch) for batch in ours.batches) / len(ours.batches)
    tokens = sum((batch["segments"] > 0).sum().item() for batch in ours.batches) / len(ours.batches)
    record = {
        "shape": args.shape, "device": args.device, "micro_batch_size": args.micro_batch_size, "grouped": grouped,
        "checkpointing": {"ours": ours_checkpointing, "authors": authors_checkpointing},
        "examples_per_second": {r.name: args.micro_batch_size / statistics.median(r.times) for r in rivals},
        "real_tokens_per_second": tokens / seconds, "speedup": speedup,
        "useful_share_of_matmul_rate": flops * args.micro_batch_size / seconds / args.matmul_rate,
        "hours_for_10k_x_3": 30_000 * seconds / args.micro_batch_size / 3600,
    }  # fmt: skip
    print(json.dumps(record), flush=True)
    return record


def one_by_one(args):
    """What each measure gains alone: the time of a step without it, over the time with all of them -> a record."""
    model, processor, groups = prepare(args, False, True)
    model_checkpointing, _, in_order = prepare(args, True, False)
    packed = [make_batch(group, processor) for group in groups]
    steppers = [
        Stepper("ours", model, packed, our_losses, args),
        Stepper("packed rows", model, [make_batch(g, processor, "plain") for g in groups], our_losses, args),
        Stepper("images encoded once for both passes", model, packed, encoding_twice, args),
        Stepper("logits of response tokens only", model, packed, all_logits, args),
        Stepper(
            "examples of like length side by side",
            model,
            [make_batch(g, processor) for g in in_order],
            our_losses,
            args,
        ),
        Stepper("activations kept (--no-checkpointing)", model_checkpointing, packed, our_losses, args),
        Stepper("reference kept after epoch 1 (--fixed-crops)", model, packed, reference_known, args),
    ]
    gains = in_turns(steppers, len(groups), args.rounds)
    kept = gains["reference kept after epoch 1 (--fixed-crops)"]  # here the stepper has the measure, ours has not
    kept.update({"median": 1 / kept["median"], "low": 1 / kept["high"], "high": 1 / kept["low"]})
    print(json.dumps({"gain_alone": gains}), flush=True)
    return gains


@torch.no_grad()
def check_equal(model, processor, items, args):
    """Both schemes on the same model and examples. Raises AssertionError if they do not compute the same."""
    with train.precision(args.device):
        ours = response_logps(model, to_device(make_batch(items, processor), args.device))
        theirs = authors_logps(model, to_device(plain_batch(items, processor), args.device))
    for name, a, b in zip(LogPs._fields, ours, theirs):
        difference = ((a - b).abs() / b.abs()).max().item()
        assert difference < (1e-5 if args.dtype == torch.float32 else 1e-2), f"{name}: {difference:.1e} apart"


def data_side(args, processor):
    """Examples a second that the loader decodes, crops and lays out, by number of workers."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        records = []
        for i, (question, chosen, rejected, image, _) in enumerate(make_items(64)):
            image.save(Path(folder) / f"{i}.jpg")
            records.append({"image": f"{i}.jpg", "question": question, "chosen": chosen, "rejected": rejected})
        (Path(folder) / "data.json").write_text(json.dumps(records))
        pairs = Pairs(read_examples(Path(folder) / "data.json"))
        keys = train.micro_batches([(epoch, i) for epoch in range(4) for i in range(len(pairs))], 4)
        for workers in [n for n in (0, 1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)]:
            loader_args = Namespace(layout="packed", max_length=2048, workers=workers, device=args.device)
            loader = iter(train.make_loader(pairs, keys, processor, loader_args, True))
            next(loader)  # the workers have started
            started, count = time.perf_counter(), sum(batch["batch_size"] for batch in loader)
            rates[workers] = count / (time.perf_counter() - started)
    print(json.dumps({"data_examples_per_second_by_workers": rates}), flush=True)
    return rates


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny")
    add("--device", choices=("cuda", "cpu"), default=train.best_device()[0])
    add("--micro-batch-size", type=int, default=4)
    add("--rounds", type=int, default=5, help="turns of 16 examples each")
    add("--threads", type=int, default=1, help="on the CPU")
    add("--trl", action="store_true", help="also TRL's DPOTrainer")
    add("--json", type=Path, help="write all measurements here")
    add("--only", choices=("ours", "authors"), help=argparse.SUPPRESS)  # measures memory, in a process of its own
    add("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    train.quiet_libraries()
    torch.set_num_threads(args.threads)
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.beta, args.delta, args.conditional, args.anchors = 0.1, 0.0, True, ["chosen"]
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    if args.only:
        return measure_memory(args)
    args.matmul_rate = matmul_rate(args.device, args.dtype)
    settings = {
        "identical settings": (True, True, False),
        "ours at its best, authors' defaults": (False, True, True),
    }
    records = {name: compare(args, *setting) for name, setting in settings.items()}
    gains = one_by_one(args)
    memory = {scheme: peak_memory(args, scheme, True) for scheme in ("ours", "authors")}
    memory["ours, no checkpointing"] = peak_memory(args, "ours", False)
    print(json.dumps({"memory_gib": memory}))
    rates = data_side(args, make_model("tiny", "cpu", torch.float32, 8)[1])
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread(s)"
    print(
        f"\n{args.shape}, {device}, micro-batch {args.micro_batch_size}, matmul {args.matmul_rate / 1e12:.3g} TFLOP/s"
    )
    for name, record in records.items():
        print(f"  {name}:")
        for rival, ratio in record["speedup"].items():
            print(f"    {ratio['median']:.2f}x {rival} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        rate, share = record["examples_per_second"]["ours"], record["useful_share_of_matmul_rate"]
        print(f"    {rate:.2f} examples/s, {record['real_tokens_per_second']:.0f} real tokens/s, {share:.0%} of the matmul rate, "
              f"{record['hours_for_10k_x_3']:.2f} h for 10K x 3 epochs")  # fmt: skip
    print("  a step without it takes, alone:")
    for name, gain in gains.items():
        print(f"    {gain['median']:.2f}x {name} ({gain['low']:.2f} to {gain['high']:.2f})")
    for name, gib in memory.items():
        print(f"  memory: {gib['before']:.2f} GiB, and {gib['above']:.2f} more at the peak of a step: {name}")
    print("  data, examples/s by workers: " + ", ".join(f"{n}: {rate:.0f}" for n, rate in rates.items()))
    if args.json:
        lines = [
            *records.values(),
            {"gain_alone": gains},
            {"memory_gib": memory},
            {"data_examples_per_second_by_workers": rates},
        ]
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
