"""How fast is a training step? This loop against the authors' scheme and TRL's DPO, on the same model and examples.

    python examples/throughput.py --shape tiny                       # CPU, one thread, minutes
    python examples/throughput.py --shape bunny-3b --json gpu.jsonl  # one GPU; also llava-7b
    python examples/throughput.py --shape tiny --trl                 # also TRL's DPOTrainer (needs trl)

Models have random weights and are made on the device: speed does not depend on the weights, and nothing is downloaded.
Texts have lengths as in Silkie: questions of about 40 tokens, answers of about 110 and 90, log-normal around these.

    ours         two packed sequences an example, images encoded once, logits of response tokens only
    authors      what their release does, on the same model: three rows padded to the longest, policy and reference
                 each with their own encoding of three images an example, float32 logits of the whole sequence
    trl          TRL's DPOTrainer: plain DPO, so two rows and no rejected image, under TRL's own padding mask

Before it times anything, ours and authors are checked to give equal log-probabilities. They are timed in turns
of --items examples, so that a change in the machine's speed meets both: first with identical settings (the same
checkpointing, LoRA layers and activation function; the authors' rows are padded on the right, so that their
attention needs no mask), then ours without checkpointing against the authors' as released: with checkpointing,
peft's own LoRA layers and Phi's own activation, under autocast on a GPU. Each measurement is a line of JSON as
soon as it is there; a table comes last.

Useful FLOPs are 2 x parameters x tokens for each of: the reference's forward pass, the policy's, and its backward
pass, which is as dear as a forward pass, as frozen weights need no gradient. Counted are the language model's
layers over real (unpadded) tokens, its head over response tokens, and the vision tower over patches.
Recomputation, attention's products of queries and keys, LoRA and padding are not counted.
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
from functools import partial
from pathlib import Path
from unittest.mock import patch

import peft
import torch
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import SCORED, Example, Pairs, make_batch, read_examples
from examples import tiny_bunny
from mdpo import LogPs, mdpo_loss, mdpo_step, response_logps, sequence_logps, unwrapped

WORDS = "there is a red circle and blue square here the picture of on in with small large near left right".split()
LEARNING_RATE = 1e-4


def siglip(**sizes):
    return transformers.SiglipVisionConfig(**sizes, vision_use_head=False)


SHAPES = {  # language model, vision tower, patches a side
    "tiny": (
        transformers.PhiConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                               vocab_size=2560, hidden_act="gelu_pytorch_tanh", attention_dropout=0.0, resid_pdrop=0.0),
        siglip(hidden_size=48, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, image_size=216, patch_size=8),
    ),
    "bunny-3b": (
        transformers.PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
                               vocab_size=51200, partial_rotary_factor=0.4, hidden_act="gelu_pytorch_tanh",
                               attention_dropout=0.0, resid_pdrop=0.0),
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
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    train.disable_dropout(model)
    return train.add_lora(model.requires_grad_(False), rank, 2 * rank), processor


def make_pairs(n, seed=0):
    """n pairs of Silkie-like lengths."""
    rng = random.Random(seed)
    length = lambda mean: max(3, round(mean * math.exp(rng.gauss(0, 0.5) - 0.125)))
    words = lambda mean: " ".join(rng.choices(WORDS, k=length(mean)))
    drawn = lambda detail: Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), detail).convert("RGB")
    images = lambda: (drawn(rng.randint(10, 90)),)
    return [Example(words(40), words(110), words(90), images(), images()) for _ in range(n)]


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def n_pairs(batch):
    return len(batch["n_targets"]) // len(batch["names"])


# ----------------------------------------------------------------------------------------------------- three schemes
#
# A scheme is a function that makes a batch of pairs, and one of a model and a batch -> losses (B,).


def our_losses(model, batch):
    return mdpo_step(model, batch)[0]


def in_two_passes(logps):
    """The losses of a scheme whose passes share nothing. logps: a function of model and batch -> `LogPs`."""

    def losses(model, batch):
        with torch.no_grad(), model.disable_adapter():
            ref_logps = logps(model, batch)
        return mdpo_loss(logps(model, batch), ref_logps)[0]

    return losses


def authors_logps(model, batch):
    """The library's own call on three padded rows an example, and logits of every position.

    Rows are padded on the right, where no token of a response looks: without a mask, attention is fastest.
    """
    logits = model(batch["input_ids"], batch["pixel_values"], use_cache=False).logits
    return LogPs(*sequence_logps(logits, batch["labels"]).chunk(3))


def plain_batch(pairs, processor):
    """Three rows an example, with labels (3B, T)."""
    batch = make_batch(pairs, processor, "plain")
    labels = torch.full_like(batch["input_ids"], -100)
    return batch | {"labels": labels.scatter(1, batch["predictors"] + 1, batch["targets"])}


authors_losses = in_two_passes(authors_logps)


def trl_rival(model, processor, groups):
    """-> (batches, losses) of TRL's DPOTrainer on these micro-batches of pairs."""
    from trl import DPOConfig, DPOTrainer

    cuda = model.device.type == "cuda"
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(groups[0]), beta=0.1, report_to="none",
        bf16=cuda, use_cpu=not cuda, gradient_checkpointing=True, remove_unused_columns=False, max_length=None,
    )  # fmt: skip
    datasets = [trl_dataset(group) for group in groups]
    trainer = DPOTrainer(model, args=config, train_dataset=datasets[0], processing_class=processor)
    batches = [trainer.data_collator([*rows]) for rows in datasets]
    return batches, lambda model, batch: trainer.compute_loss(trainer.model, batch)


def trl_dataset(pairs):
    """Pairs -> a `datasets.Dataset` in TRL's vision format; a pair is asked for when its row is read."""
    from datasets import Dataset

    say = lambda role, text: [{"role": role, "content": text}]

    def load(columns):
        rows = [pairs[i] for i in columns["index"]]
        prompt = lambda question: say("user", question) if isinstance(question, str) else question
        return {
            "prompt": [prompt(row.question) for row in rows],
            "chosen": [say("assistant", row.chosen) for row in rows],
            "rejected": [say("assistant", row.rejected) for row in rows],
            "images": [[*row.images] for row in rows],
        }

    return Dataset.from_dict({"index": range(len(pairs))}).with_transform(load)


def with_pefts_layers(model):
    """The model with peft's own LoRA layers, in place of `train.LoraLinear`; they need `autocast`."""
    for module in model.modules():
        if isinstance(module, train.LoraLinear):
            module.__class__ = peft.tuners.lora.Linear
    return model


def with_phis_activation(model):
    """The model with the activation that a Bunny's config names, if its language model is a Phi."""
    for module in model.modules():
        if isinstance(module, transformers.models.phi.modeling_phi.PhiMLP):
            module.activation_fn = transformers.activations.ACT2FN["gelu_new"]
    return model


def autocast(losses):
    """bf16 for peft's own layers, whose weights are float32."""

    def under_autocast(model, batch):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            return losses(model, batch)

    return under_autocast


# ------------------------------------------------------------------------------ our step, less one measure at a time


def all_logits_batch(pairs, processor):
    """Logits at every position of a packed row; those that predict no response token count for nothing."""
    batch = make_batch(pairs, processor)
    others = sorted({*range(batch["input_ids"].shape[1])} - {*batch["predictors"][0].tolist()})
    append = lambda name, values: torch.cat([batch[name], torch.tensor([values])], 1)
    *n_targets, last = batch["n_targets"]
    return batch | {
        "predictors": append("predictors", others),
        "targets": append("targets", [-100] * len(others)),
        "n_targets": [*n_targets, last + len(others)],
    }


class Unshared(Example):
    images_again = property(lambda self: self.images)


def unshared_batch(pairs, processor):
    """Three sequences an example, end to end as ours are: y_w and y_l each have a prefix of their own."""
    with patch.dict(SCORED, rejected=("images_again", "rejected")):
        return make_batch([Unshared(*pair) for pair in pairs], processor)


def padded_batch(pairs, processor):
    """Our two sequences an example, as rows padded to the longest, under a boolean mask (2B, 1, T, T)."""
    batch, n = make_batch(pairs, processor), len(pairs)
    lengths, n_targets = batch["lengths"], batch["n_targets"]
    tokens = [sum(sequence) for sequence in lengths]
    starts = torch.tensor(tokens).cumsum(0) - torch.tensor(tokens)
    parts = [torch.tensor([*range(1, len(s) + 1)]).repeat_interleave(torch.tensor(s)) for s in lengths]
    part = pad_sequence(parts, True)  # (2B, T): 1 in the prefix, 2 and above in a response each, 0 in padding
    causal = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool).tril()
    same, prefix = part[:, :, None] == part[:, None, :], (part[:, None, :] == 1) & (part[:, :, None] > 0)
    in_rows = lambda name: pad_sequence(batch[name][0].split(tokens), True)

    def of_responses(name, padding):  # (2B, K): a row's y_w and y_l, then those of y_w on m_l
        each = batch[name][0].split(n_targets)
        return pad_sequence([*map(torch.cat, zip(each[:n], each[n : 2 * n])), *each[2 * n :]], True, padding)

    targets = of_responses("targets", -100)
    width = targets.shape[1]
    return batch | {
        "input_ids": in_rows("input_ids"),
        "position_ids": in_rows("position_ids"),
        "attention_mask": (causal & (same | prefix))[:, None],
        "predictors": (of_responses("predictors", 0) - starts[:, None]).clamp(0),
        "targets": targets,
        "n_targets": [count for y_w in n_targets[:n] for count in (y_w, width - y_w)] + [width] * n,
        "lengths": None,
        "processor_keys": [*batch["processor_keys"], "position_ids", "attention_mask"],
    }


def padded_losses(model, batch):
    """As ours, from the order of `padded_batch`: y_w and y_l of each example, then each y_w on m_l."""

    def by_name(logps):
        pairs, image_rejected = torch.cat(logps).tensor_split([2 * len(logps.chosen)])
        return LogPs(*pairs.view(-1, 2).T, image_rejected)

    return mdpo_step(model, batch, lambda policy, ref: mdpo_loss(by_name(policy), by_name(ref)))[0]


# ---------------------------------------------------------------------------------------------------------- measuring


def record(args, **measurement):
    """Print a measurement as a line of JSON, and add it to the file of --json -> the measurement."""
    line = json.dumps({"shape": args.shape, "device": args.device_name, "dtype": str(args.dtype),
                       "micro_batch_size": args.micro_batch_size, **measurement})  # fmt: skip
    print(line, flush=True)
    if args.json:
        with args.json.open("a") as file:
            file.write(line + "\n")
    return measurement


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class Stepper:
    """A scheme with its own optimizer: `step()` -> seconds. The batches come round and round."""

    def __init__(self, name, model, batches, losses):
        self.name, self.model, self.batches, self.losses = name, model, batches, losses
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, fused=self.device.type == "cuda")
        self.times, self.count = [], 0

    def step(self):
        synchronize(self.device)
        started = time.perf_counter()
        batch = to_device(self.batches[self.count % len(self.batches)], self.device)
        self.loss = self.losses(self.model, batch).mean()
        self.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        self.count += 1
        return time.perf_counter() - started


def useful_flops(model, batch):
    """FLOPs of one example's three useful passes, averaged over a packed batch; see the module's text."""
    model = unwrapped(model)
    count = lambda module: sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)
    layers, head, tower = count(model.get_decoder().layers), count(model.lm_head), count(model.model.vision_tower)
    tokens, targets = batch["input_ids"].numel(), batch["targets"].numel()
    patches = len(batch["pixel_values"]) * model.config.image_seq_length
    return (3 * 2 * (layers * tokens + head * targets) + 2 * tower * patches) / n_pairs(batch)


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


def prepare(args, checkpointing):
    """-> (peft model, processor, micro-batches of pairs)."""
    torch.manual_seed(0)
    model, processor = make_model(args.shape, args.device, args.dtype, rank=64 if args.shape != "tiny" else 8)
    if checkpointing:
        train.enable_checkpointing(model)
    return model.train(), processor, train.split(make_pairs(args.items), args.micro_batch_size)


MEMORY = {  # whose peak is measured: losses, how a batch is made, checkpointing, as released
    "ours": (our_losses, make_batch, True, False),
    "authors": (authors_losses, plain_batch, True, False),
    "ours, no checkpointing": (our_losses, make_batch, False, False),
    "authors, as released": (autocast(authors_losses), plain_batch, True, True),
}


def peak_memory(args, name):
    """GiB before the first step (on a GPU: the weights) and, above that, at the worst moment of two steps.

    Measured in a fresh process, on the micro-batch with the longest texts.
    """
    command = [sys.executable, __file__, "--shape", args.shape, "--device", args.device,
               "--dtype", args.dtype_name, "--micro-batch-size", str(args.micro_batch_size),
               "--threads", str(args.threads), "--only", name]  # fmt: skip
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once, and is not counted again
    done = subprocess.run(command, env=os.environ | at_once, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    before, above = map(float, done.stdout.split()[-2:])
    return {"before": before, "above": above}


def measure_memory(args):
    losses, make, checkpointing, released = MEMORY[args.only]
    model, processor, groups = prepare(args, checkpointing)
    model = with_pefts_layers(with_phis_activation(model)) if released else model
    heaviest = max(groups, key=lambda group: sum(len(text) for pair in group for text in pair[:3]))
    stepper = Stepper(args.only, model, [make(heaviest, processor)], losses)
    gc.collect()
    before = memory_now(args.device)
    for _ in range(2):
        stepper.step()
    print(before, memory_now(args.device, peak=True) - before)


def memory_now(device, peak=False):
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30
    line = "VmHWM:" if peak else "VmRSS:"  # not getrusage's peak, which a process inherits from its parent
    return int(Path("/proc/self/status").read_text().partition(line)[2].split()[0]) / 2**20


def in_turns(steppers, n_batches, rounds):
    """Time the first of the steppers against each other -> {name: {"median", "low", "high"}}: times as long."""
    for stepper in steppers:
        for _ in range(2):
            stepper.step()
    for _ in range(rounds):
        for stepper in steppers:
            stepper.times.append(sum(stepper.step() for _ in range(n_batches)) / n_batches)
    ours, *others = steppers
    ratios = {other.name: sorted(b / a for a, b in zip(ours.times, other.times)) for other in others}
    return {name: {"median": statistics.median(r), "low": r[0], "high": r[-1]} for name, r in ratios.items()}


def compare(args, identical):
    """Time ours against the others: at identical settings, or ours at its best and theirs as released."""
    model, processor, groups = prepare(args, identical)
    model_of_authors, *_ = prepare(args, True)
    model_of_authors.load_state_dict(model.state_dict())
    check_equal(model, processor, groups[0])
    ours = Stepper("ours", model, [make_batch(group, processor) for group in groups], our_losses)
    rivals = {"authors": ([plain_batch(group, processor) for group in groups], authors_losses)}
    if args.trl:
        rivals["trl"] = trl_rival(model_of_authors, processor, groups)
    if not identical:
        with_pefts_layers(with_phis_activation(model_of_authors))
        rivals = {name: (batches, autocast(losses)) for name, (batches, losses) in rivals.items()}
    steppers = [ours] + [Stepper(name, model_of_authors, *rival) for name, rival in rivals.items()]
    speedup = in_turns(steppers, len(groups), args.rounds)
    seconds = statistics.median(ours.times)
    mean = lambda values: sum(values) / len(groups)
    flops = mean(useful_flops(model, batch) for batch in ours.batches) * args.micro_batch_size
    return record(
        args,
        settings="identical" if identical else "ours at its best, theirs as released",
        speedup=speedup,
        examples_per_second={s.name: args.micro_batch_size / statistics.median(s.times) for s in steppers},
        real_tokens_per_second=mean(batch["input_ids"].numel() for batch in ours.batches) / seconds,
        useful_share_of_matmul_rate=flops / seconds / args.matmul_rate,
        hours_for_10k_x_3=30_000 * seconds / args.micro_batch_size / 3600,
    )


def one_by_one(args):
    """What each measure gains alone: the time of a step without it over the time with it, all else as by default."""
    model, processor, groups = prepare(args, True)
    another = lambda checkpointing=True: prepare(args, checkpointing)[0]
    batches = lambda make: [make(group, processor) for group in groups]
    packed = batches(make_batch)
    without = {
        "y_w and y_l behind one prefix": (model, batches(unshared_batch), our_losses),
        "sequences end to end in causal blocks, not padded under a mask":
            (model, batches(padded_batch), padded_losses),
        "each image encoded once for both passes": (model, packed, in_two_passes(response_logps)),
        "logits of response tokens only": (model, batches(all_logits_batch), our_losses),
        "LoRA added in its matrix product": (with_pefts_layers(another()), packed, autocast(our_losses)),
        "Bunny's activation in one kernel": (with_phis_activation(another()), packed, our_losses),
    }  # fmt: skip
    chosen = "activations kept (--no-checkpointing)"  # by the user: the step has the measure, ours has not
    without[chosen] = (another(checkpointing=False), packed, our_losses)
    steppers = [Stepper("ours", model, packed, our_losses)]
    steppers += [Stepper(name, *measure) for name, measure in without.items()]
    gains = in_turns(steppers, len(groups), args.rounds)
    median, low, high = gains[chosen].values()
    gains[chosen] = {"median": 1 / median, "low": 1 / high, "high": 1 / low}
    return record(args, gain_alone=gains)


def follow(args, steps=20):
    """The loss of some training steps, packed against plain rows -> how far apart at most, and what rounding does.

    For rounding, the plain rows' micro-batches are run with their examples in reverse order: the same mean.
    """
    model, processor, groups = prepare(args, True)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    curves = []
    for layout, order in (("plain", 1), ("packed", 1), ("plain", -1)):
        model.load_state_dict(start, strict=False)
        batches = [make_batch(group[::order], processor, layout) for group in groups]
        stepper = Stepper("", model, batches, our_losses)
        curves.append([])
        for _ in range(steps):
            stepper.step()
            curves[-1].append(stepper.loss.item())
    apart = lambda curve: max(abs(a - b) for a, b in zip(curves[0], curve))
    _, packed, reordered = curves
    return record(args, loss_of_first_and_last_step=[packed[0], packed[-1]], packed_off_plain_by=apart(packed),
                  plain_reordered_off_plain_by=apart(reordered))  # fmt: skip


@torch.no_grad()
def check_equal(model, processor, pairs):
    """Both schemes on the same model and examples. Raises AssertionError if they do not compute the same."""
    ours = response_logps(model, make_batch(pairs, processor))
    theirs = authors_logps(model, to_device(plain_batch(pairs, processor), model.device))
    for name, a, b in zip(LogPs._fields, ours, theirs):
        difference = ((a - b).abs() / b.abs()).max().item()
        assert difference < (1e-5 if model.dtype == torch.float32 else 1e-2), f"{name}: {difference:.1e} apart"


def data_side(args, processor):
    """Examples a second that the loader decodes, crops and lays out, by number of workers."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        records = []
        for i, (question, chosen, rejected, (image,), *_) in enumerate(make_pairs(4 * args.items)):
            image.save(Path(folder) / f"{i}.jpg")
            records.append({"image": f"{i}.jpg", "question": question, "chosen": chosen, "rejected": rejected})
        (Path(folder) / "data.json").write_text(json.dumps(records))
        pairs = Pairs(read_examples(Path(folder) / "data.json"))
        keys = train.split([(epoch, i) for epoch in range(4) for i in range(len(pairs))], 4)
        for workers in [n for n in (0, 1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)]:
            loader = train.load_batches(pairs, keys, partial(make_batch, processor=processor), workers)
            next(loader)  # the workers have started
            started, count = time.perf_counter(), sum(map(n_pairs, loader))
            rates[workers] = count / (time.perf_counter() - started)
    return record(args, data_examples_per_second_by_workers=rates)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny")
    add("--device", choices=("cuda", "cpu"), default=train.best_device())
    add("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on a GPU, else float32)")
    add("--micro-batch-size", type=int, default=4)
    add("--rounds", type=int, default=5, help="turns that each scheme takes")
    add("--items", type=int, default=16, help="examples in a turn")
    add("--threads", type=int, default=1, help="on the CPU")
    add("--trl", action="store_true", help="also TRL's DPOTrainer")
    add("--json", type=Path, help="add every measurement to this file")
    add("--only", choices=("speed", *MEMORY), help="the comparison at identical settings; or what memory a scheme "
        "takes: GiB before its first step, and above that")  # fmt: skip
    args = parser.parse_args(argv)
    train.quiet_libraries()
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    args.dtype_name = args.dtype or ("bfloat16" if cuda else "float32")
    args.dtype = getattr(torch, args.dtype_name)
    args.device_name = torch.cuda.get_device_name() if cuda else f"CPU, {args.threads} thread(s)"
    if args.only in MEMORY:
        return measure_memory(args)
    args.matmul_rate = matmul_rate(args.device, args.dtype)
    if args.only == "speed":
        return compare(args, identical=True)
    memory = {name: peak_memory(args, name) for name in MEMORY}  # while this process holds nothing on the GPU
    record(args, memory_gib=memory)
    records = [compare(args, identical=True), compare(args, identical=False)]
    gains = one_by_one(args)["gain_alone"]
    followed = follow(args)
    rates = data_side(args, make_model("tiny", "cpu", torch.float32, 8)[1])["data_examples_per_second_by_workers"]

    print(f"\n{args.shape}, {args.device_name}, {args.dtype_name}, micro-batch {args.micro_batch_size}, "
          f"matmul {args.matmul_rate / 1e12:.3g} TFLOP/s")  # fmt: skip
    for result in records:
        print(f"  {result['settings']}:")
        for rival, ratio in result["speedup"].items():
            print(f"    {ratio['median']:.2f}x {rival} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        rate, share = result["examples_per_second"]["ours"], result["useful_share_of_matmul_rate"]
        tokens, hours = result["real_tokens_per_second"], result["hours_for_10k_x_3"]
        print(f"    {rate:.2f} examples/s, {tokens:.0f} real tokens/s, {share:.0%} of the matmul rate, "
              f"{hours:.2f} h for 10K x 3 epochs")  # fmt: skip
    print("  a step without it takes, alone:")
    for name, gain in gains.items():
        print(f"    {gain['median']:.2f}x {name} ({gain['low']:.2f} to {gain['high']:.2f})")
    for name, gib in memory.items():
        print(f"  memory: {gib['before']:.2f} GiB, and {gib['above']:.2f} more at the peak of a step: {name}")
    print(f"  loss of 20 steps: packed at most {followed['packed_off_plain_by']:.1e} off plain rows, "
          f"plain rows in another order {followed['plain_reordered_off_plain_by']:.1e}")  # fmt: skip
    print("  data, examples/s by workers: " + ", ".join(f"{n}: {rate:.0f}" for n, rate in rates.items()))


if __name__ == "__main__":
    main()
