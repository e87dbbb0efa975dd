"""How fast is a training step? This loop against the authors' scheme and TRL's DPO, on the same model and examples.

    python examples/throughput.py --json FILE               # bunny-3b on a GPU, tiny on a CPU; --trl: TRL's, too
    python examples/throughput.py --only memory-formula     # predicted memory and hours; needs no GPU

Weights are random: speed does not depend on them. Texts have lengths as in Silkie, log-normal around the means.

Ours and authors are first checked to give equal log-probabilities. They are timed in turns of --items examples, so
that a change in the machine's speed meets both: with identical settings, then ours without checkpointing against
theirs as released. Each measurement is a line of JSON, printed and added to FILE.
"""

import copy
import gc
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import peft
import torch
import transformers
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import Example, Parser, about, make_batch, run_command
from examples import tiny_bunny
from mdpo import LogPs, mdpo_loss, mdpo_step, pack, response_logps, sequence_logps, to_device, unwrapped

MEANS = (40, 110, 90)  # tokens of a question, y_w and y_l
WORDS = "there is a red circle and blue square here the picture of on in with small large near left right".split()
LEARNING_RATE = 1e-4
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
VISION = (*TEXT[:4], "image_size", "patch_size")
GELU = "gelu_pytorch_tanh"  # faster than the activation that a Bunny's config names, and equal
phi = lambda *sizes, **options: transformers.PhiConfig(**dict(zip(TEXT, sizes)), hidden_act=GELU, **options)
siglip = lambda *sizes: transformers.SiglipVisionConfig(**dict(zip(VISION, sizes)), vision_use_head=False)
SHAPES = {  # language model, vision tower
    "tiny": (phi(128, 512, 4, 4, 2560), siglip(48, 192, 4, 4, 216, 8)),
    "bunny-3b": (phi(2560, 10240, 32, 32, 51200, partial_rotary_factor=0.4), siglip(1152, 4304, 26, 16, 384, 14)),
    "llava-7b": (transformers.LlamaConfig(**dict(zip(TEXT, (4096, 11008, 32, 32, 32064)))),
                 transformers.CLIPVisionConfig(**dict(zip(VISION, (1024, 4096, 24, 16, 336, 14))))),
}  # fmt: skip


def make_model(shape, device, dtype, checkpointing=True):
    """A Llava with random weights, LoRA on its language model -> (peft model, processor)."""
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training: it plans anew for each shape, and ours never repeat
    text, vision = copy.deepcopy(SHAPES[shape])  # a config holds its model's attention: another model would change it
    with tempfile.TemporaryDirectory() as folder:
        tiny_bunny.write_tokenizer(Path(folder), [" ".join(WORDS)] * 3)
        tower = f"patch{vision.patch_size}-{vision.image_size}"
        processor = train.bunny_processor(folder, {"mm_vision_tower": tower, "vocab_size": text.vocab_size})
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    is_clip = isinstance(vision, transformers.CLIPVisionConfig)  # its first token, of the whole image, is left out
    layer, strategy = (-2, "default") if is_clip else (-1, "full")
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = is_clip, strategy
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy, image_token_index=processor.image_token_id)  # fmt: skip
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    train.disable_dropout(model)
    rank = 8 if shape == "tiny" else 64
    model = train.add_lora(model.requires_grad_(False), rank, 2 * rank)
    if checkpointing:
        train.enable_checkpointing(model)
    return model.train(), processor


def draw_length(rng, mean):
    return max(3, round(mean * math.exp(rng.gauss(0, 0.5) - 0.125)))


def make_pairs(n):
    """n pairs of Silkie-like lengths."""
    rng = random.Random(0)
    words = lambda mean: " ".join(rng.choices(WORDS, k=draw_length(rng, mean)))
    image = lambda: Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), rng.randint(10, 90)).convert("RGB")
    return [Example(*map(words, MEANS), (image(),), (image(),)) for _ in range(n)]


def packed_batch(pairs, processor):
    """Two sequences an example, end to end in one row; images are encoded once, logits are of response tokens only."""
    return pack(make_batch(pairs, processor, share=True))


def our_losses(model, batch):
    return mdpo_step(model, batch)[0]


def authors_losses(model, batch):
    """What their release does, over a batch of `make_batch`, three padded rows an example: passes share nothing."""
    batch = to_device(batch, model.device)
    with torch.no_grad(), model.disable_adapter():
        ref_logps = authors_logps(model, batch)
    return mdpo_loss(authors_logps(model, batch), ref_logps)[0]


def authors_logps(model, batch):
    """The library's own call, with all logits. No mask is fastest: padding is on the right, where nothing looks."""
    inputs = dict(batch.inputs)
    del inputs["attention_mask"]
    return LogPs(*sequence_logps(model(**inputs, use_cache=False).logits, batch.labels).chunk(3))


SCHEMES = {"ours": (packed_batch, our_losses), "authors": (make_batch, authors_losses)}  # -> a batch, losses (B,)


def trl_rival(model, processor, pairs):
    """A scheme: TRL's DPOTrainer, without rejected images. pairs: any micro-batch, which the trainer looks at."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def rows(pairs):  # in TRL's vision format
        say = lambda role, text: [{"role": role, "content": text}]
        return [{"prompt": say("user", pair.question), "chosen": say("assistant", pair.chosen),
                 "rejected": say("assistant", pair.rejected), "images": [*pair.images]} for pair in pairs]  # fmt: skip

    cuda = model.device.type == "cuda"
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(pairs), beta=0.1, report_to="none",
        bf16=cuda, use_cpu=not cuda, gradient_checkpointing=True, remove_unused_columns=False, max_length=None,
    )  # fmt: skip
    dataset = Dataset.from_list(rows(pairs))
    trainer = DPOTrainer(model, args=config, train_dataset=dataset, processing_class=processor)
    make = lambda pairs, processor: trainer.data_collator(rows(pairs))
    return make, lambda model, batch: trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))


def as_released(model, losses):
    """Give the model peft's own LoRA layers and the activation that a Bunny's config names -> losses under autocast.

    The weights of these layers are float32: in a bf16 model they need autocast.
    """
    for module in model.modules():
        if isinstance(module, train.LoraLinear):
            module.__class__ = peft.tuners.lora.Linear
        if isinstance(module, transformers.models.phi.modeling_phi.PhiMLP):
            module.activation_fn = transformers.activations.ACT2FN["gelu_new"]
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)(losses)


def record(args, **measurement):
    """Print a measurement as a line of JSON, and add it to the file of --json."""
    line = json.dumps({"shape": args.shape, "device": args.device_name, "dtype": str(args.dtype),
                       "micro_batch_size": args.micro_batch_size, **measurement})  # fmt: skip
    print(line, flush=True)
    if args.json:
        with args.json.open("a") as file:
            file.write(line + "\n")


def train_on(model, batches, losses):
    """A training step on each batch, none of which comes twice -> a generator of the seconds that each took.

    In training shapes never repeat, and what plans or allocates by shape would gain by it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_cuda = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, fused=on_cuda)
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    for batch in batches:
        synchronize()
        started = time.perf_counter()
        losses(model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        yield time.perf_counter() - started


MEMORY = {"ours": True, "authors": True, "ours, no checkpointing": False}  # whose peak is measured: checkpointing


def measure_memory(args, name):
    """GiB before the first step and, above that, at the peak of two, of which the second has the longest texts."""
    make, losses = SCHEMES[name.partition(",")[0]]
    model, processor = make_model(args.shape, args.device, args.dtype, MEMORY[name])
    groups = train.split(make_pairs(max(args.items, 2 * args.micro_batch_size)), args.micro_batch_size)
    groups = sorted(groups, key=lambda group: sum(len(text) for pair in group for text in pair[:3]))[-2:]
    gc.collect()
    before = memory_now(args.device)
    for _ in train_on(model, (make(group, processor) for group in groups), losses):
        above = memory_now(args.device, peak=True) - before
    record(args, memory_gib={name: {"before": before, "above": above}})


def memory_now(device, peak=False):
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30
    line = "VmHWM:" if peak else "VmRSS:"  # not getrusage's peak, which a process inherits from its parent
    return int(Path("/proc/self/status").read_text().partition(line)[2].split()[0]) / 2**20


def compare(args, identical):
    """Time ours against the others: at identical settings, or ours at its best and theirs as released."""
    in_turn, steps = -(-args.items // args.micro_batch_size), {}
    pairs = make_pairs((2 + args.rounds * in_turn) * args.micro_batch_size)  # two steps come before the clock starts
    groups = train.split(pairs, args.micro_batch_size)
    for name in [*SCHEMES, "trl"] if args.trl else SCHEMES:  # a model each: TRL's constructor changes its own
        ours = name == "ours"
        model, processor = make_model(args.shape, args.device, args.dtype, identical or not ours)
        if ours:
            check_equal(model, processor, groups[0])
        make, losses = SCHEMES.get(name) or trl_rival(model, processor, groups[0])
        losses = losses if identical or ours else as_released(model, losses)
        steps[name] = train_on(model, map(make, groups, itertools.repeat(processor)), losses)
    times = {name: [next(each), next(each)][2:] for name, each in steps.items()}
    for _ in range(args.rounds):
        for name, each in steps.items():
            times[name].append(sum(next(each) for _ in range(in_turn)) / in_turn)
    rates = {name: args.micro_batch_size / statistics.median(each) for name, each in times.items()}
    ours = times.pop("ours")
    ratios = {name: sorted(b / a for a, b in zip(ours, each)) for name, each in times.items()}
    speedup = {name: {"median": statistics.median(r), "low": r[0], "high": r[-1]} for name, r in ratios.items()}
    settings = "identical" if identical else "ours at its best, theirs as released"
    record(args, settings=settings, speedup=speedup, examples_per_second=rates,
           hours_for_10k_x_3=30_000 / rates["ours"] / 3600)  # fmt: skip


@torch.no_grad()
def check_equal(model, processor, pairs):
    """Both schemes on the same model and examples. Raises AssertionError if they do not compute the same."""
    ours = response_logps(model, packed_batch(pairs, processor))
    theirs = authors_logps(model, to_device(make_batch(pairs, processor), model.device))
    rtol = 1e-5 if model.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours._asdict(), theirs._asdict(), rtol=rtol, atol=0)


# ----------------------------------------------------------------------------------- memory and hours, predicted

# Dense bf16 TFLOP/s and TB/s, by the vendor's data sheets.
CARDS = {"H200": (990, 4.8), "H100": (990, 3.35), "A100": (312, 2.04), "L40S": (362, 0.864), "RTX 4090": (165, 1.008)}
PRODUCTS = 0.48  # share of that rate: large products reach 0.8 of it, and the products of a step 0.6 of this
TRAFFIC = 0.8  # share of the bandwidth that elementwise operations reach
LAUNCH = 38e-6  # s of the host for an operation: a server's core took 405 ms for Bunny's micro-batch of 4
NO_KERNEL = ("_unsafe_view", "empty", "empty_like")


class Work(TorchDispatchMode):
    """Counts FLOPs of products and attention, bytes that all other operations move, and operations: launches.

    An operation reads its inputs and writes its outputs once, as if no cache helped. peak: the most bytes that were
    alive at once: those of before, of the storages `known`, and what operations made. What a view shows is not made.
    """

    flops = traffic = launches = 0

    def __init__(self, known=(), before=0):
        super().__init__()
        self.known, self.alive, self.peak = weakref.WeakSet(known), before, before

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out, name = operation(*args, **(kwargs or {})), operation.__name__.partition(".")[0]
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            if (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.hold(storage.nbytes())
                weakref.finalize(storage, self.hold, -storage.nbytes())
        if operation.is_view or name in NO_KERNEL:
            return out
        self.launches += 1
        if flops := flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"))):
            is_causal = "flash" in name and any(arg is True for arg in args)  # half of the products
            self.flops += flops(*args, **(kwargs or {}), out_val=out) / (1 + is_causal)
        else:
            for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs, out))):  # what is expanded is read once
                distinct = (n for n, stride in zip(tensor.shape, tensor.stride()) if stride)
                self.traffic += math.prod(distinct) * tensor.element_size()
        return out

    def hold(self, n_bytes):
        self.alive += n_bytes
        self.peak = max(self.peak, self.alive)


def attention_on_gpu(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """The one operation that CUDA runs for `scaled_dot_product_attention`; other devices run many."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    mask = attn_mask.expand(*query.shape[:2], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]


def count_work(model, batch):
    """`Work` of a micro-batch of ours, without the optimizer's step. model: on the meta device, without data."""
    inner = unwrapped(model).model  # it would ask of data where the images stand
    inner.get_placeholder_mask = lambda *ids, inputs_embeds, **images: inputs_embeds.detach().bool()
    model.zero_grad()
    weights = [*model.parameters()]
    adapter = sum(weight.nbytes for weight in weights if weight.requires_grad)
    always = sum(weight.nbytes for weight in weights) + 3 * adapter  # AdamW's state, the gradient
    known = [weight.untyped_storage() for weight in weights]
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention_on_gpu), Work(known, always) as work:
        our_losses(model, batch).mean().backward()
    return work


def predicted_seconds(work, card):
    """-> seconds of the products, of the other traffic, and of the host, which works beside the card."""
    flops, bandwidth = (1e12 * rate for rate in CARDS[card])
    return work.flops / (PRODUCTS * flops), work.traffic / (TRAFFIC * bandwidth), LAUNCH * work.launches


def print_predictions(shape):
    """By checkpointing and micro-batch: the peak, what a mean micro-batch is made of, and the paper's hours."""
    print(f"\n{shape}: predicted, not measured. Peaks are of the heaviest micro-batch of 30,000 examples.\n"
          f"  10K x 3 epochs, if products reach {PRODUCTS} of a card's peak and other traffic {TRAFFIC} of its\n"
          f"  bandwidth, one after the other, and the host {LAUNCH * 1e6:.0f} us a launch beside them:")  # fmt: skip
    rng, image = random.Random(0), (Image.new("RGB", (640, 480)),)
    drawn = [[draw_length(rng, mean) for mean in MEANS] for _ in range(30_000)]
    for checkpointing in (False, True):
        model, processor = make_model(shape, "meta", torch.bfloat16, checkpointing)
        for n in (1, 2, 4, 8, 16, 32):
            heaviest = max(train.split(drawn, n), key=lambda group: sum(2 * (q + y_w) + y_l for q, y_w, y_l in group))
            texts = [map(str.__mul__, (" red", " blue", " left"), lengths) for lengths in heaviest]  # a token each
            longest = packed_batch([Example(*each, image, image) for each in texts], processor)
            peak = count_work(model, longest).peak / 2**30
            batch = packed_batch(make_pairs(n), processor)
            work = count_work(model, batch)
            print(f"{n:8} {'with' if checkpointing else 'without'} checkpointing, peak {peak:5.1f} GiB: "
                  f"{len(batch.take):,} tokens, {work.flops / 1e12:.1f} TFLOP, {work.traffic / 1e9:.0f} GB, "
                  f"{work.launches:,} launches")  # fmt: skip
            for card in CARDS:
                products, traffic, host = predicted_seconds(work, card)
                hours = 30_000 / n * max(products + traffic, host) / 3600
                waits = ", waits for the host" if host > products + traffic else ""
                print(f"{card:>18}: {1e3 * products:5.0f} + {1e3 * traffic:4.0f} ms, host {1e3 * host:3.0f} ms: "
                      f"{hours:5.2f} h{waits}")  # fmt: skip


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="(default: bunny-3b on a GPU, else tiny)")
    add("--device", choices=("cuda", "cpu"), default=train.best_device())
    add("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on a GPU, else float32)")
    add("--micro-batch-size", type=int, default=4)
    add("--rounds", type=int, default=5, help="turns that each scheme takes")
    add("--items", type=int, default=16, help="examples in a turn")
    add("--threads", type=int, default=1, help="on the CPU")
    add("--trl", action="store_true", help="also TRL's DPOTrainer")
    add("--json", type=Path, help="add every measurement to this file")
    add("--only", choices=("speed", "memory-formula", *MEMORY), help="the comparison at identical settings, "
        "predictions for the real shapes, or the memory of one scheme")  # fmt: skip
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    args.device_name = torch.cuda.get_device_name() if cuda else f"CPU, {args.threads} thread(s)"
    args.shape = args.shape or ("bunny-3b" if cuda else "tiny")
    if args.only == "memory-formula":
        for shape in ("bunny-3b", "llava-7b"):
            print_predictions(shape)
    elif args.only in MEMORY:
        measure_memory(args, args.only)
    elif args.only == "speed":
        compare(args, identical=True)
    else:
        for name in MEMORY:  # in a fresh process each, and while this one holds nothing on the GPU
            with about(f"memory of {name}"):
                subprocess.run([sys.executable, __file__, *argv, "--only", name],
                               env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, check=True)  # fmt: skip
        compare(args, identical=True)
        compare(args, identical=False)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run, saves_memory="a lower --micro-batch-size"))
