"""How fast is a training step? This loop against the authors' scheme and TRL's DPO, on the same model and examples.

    python examples/throughput.py > FILE                    # bunny-3b on a GPU, tiny on a CPU; --trl: TRL's, too
    python examples/throughput.py --only memory-formula     # predicted memory and hours; needs no GPU

Weights are random: speed does not depend on them. Texts have lengths as in Silkie, log-normal around the means.

Ours and authors are first checked to give equal log-probabilities. They are timed in turns of --items examples, so
that a change in the machine's speed meets both: with identical settings, then ours without checkpointing against
theirs as released. Each measurement is a line of JSON.
"""

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
from examples.tiny_bunny import siglip, write_tokenizer
from mdpo import LogPs, mdpo_loss, mdpo_step, pack, response_logps, sequence_logps, to_device, unwrapped

MEANS = (40, 110, 90)  # tokens of a question, y_w and y_l
WORDS = "there is a red circle and blue square here the picture of on in with small large near left right".split()
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
GELU = "gelu_pytorch_tanh"  # faster than the activation that a Bunny's config names, and equal
phi = lambda *sizes, **options: transformers.PhiConfig(**dict(zip(TEXT, sizes)), hidden_act=GELU, **options)
SHAPES = {  # language model, vision tower
    "tiny": (phi(128, 512, 4, 4, 2560), siglip(48, 192, 4, 4, 8, 216)),
    "bunny-3b": (phi(2560, 10240, 32, 32, 51200, partial_rotary_factor=0.4), siglip(1152, 4304, 26, 16, 14, 384)),
    "llava-7b": (transformers.LlamaConfig(vocab_size=32064), transformers.LlavaConfig().vision_config),
}  # fmt: skip


def make_model(shape, device, dtype, checkpointing=True):
    """A Llava with random weights, LoRA on its language model -> (peft model, processor)."""
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training: it plans anew for each shape, and ours never repeat
    text, vision = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), [" ".join(WORDS)] * 3)
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


def authors_step(model, batch):
    """What their release does, over a batch of `make_batch`, three padded rows an example: passes share nothing."""
    batch = to_device(batch, model.device)
    with torch.no_grad(), model.disable_adapter():
        ref_logps = authors_logps(model, batch)
    return mdpo_loss(authors_logps(model, batch), ref_logps)


def authors_logps(model, batch):
    """The library's own call, with all logits. No mask is fastest: padding is on the right, where nothing looks."""
    inputs = dict(batch.inputs)
    del inputs["attention_mask"]
    return LogPs(*sequence_logps(model(**inputs, use_cache=False).logits, batch.labels).chunk(3))


SCHEMES = {"ours": (packed_batch, mdpo_step), "authors": (make_batch, authors_step)}  # -> a batch; losses, metrics


def trl_rival(model, processor, pairs):
    """A scheme: TRL's DPOTrainer, without rejected images. pairs: any micro-batch, which the trainer looks at."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def rows(pairs):  # in TRL's vision format
        say = lambda role, text: [{"role": role, "content": text}]
        return [{"prompt": say("user", pair.question), "chosen": say("assistant", pair.chosen),
                 "rejected": say("assistant", pair.rejected), "images": [*pair.images]} for pair in pairs]  # fmt: skip

    cuda = model.device.type == "cuda"
    config = DPOConfig(output_dir=tempfile.mkdtemp(), bf16=cuda, use_cpu=not cuda, gradient_checkpointing=True,
                       beta=0.1, max_length=None)  # fmt: skip
    trainer = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows(pairs)), processing_class=processor)
    make = lambda pairs, processor: trainer.data_collator(rows(pairs))
    return make, lambda model, batch: [trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))]


def as_released(model, step):
    """Give the model peft's own LoRA layers and the activation that a Bunny's config names -> step under autocast.

    The weights of these layers are float32: in a bf16 model they need autocast.
    """
    for module in model.modules():
        if isinstance(module, train.LoraLinear):
            module.__class__ = peft.tuners.lora.Linear
        if isinstance(module, transformers.models.phi.modeling_phi.PhiMLP):
            module.activation_fn = transformers.activations.ACT2FN["gelu_new"]
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)(step)


def train_on(model, batches, step):
    """A training step on each batch, none of which comes twice -> a generator of the seconds that each took.

    In training shapes never repeat, and what plans or allocates by shape would gain by it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_cuda = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=on_cuda)
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    for batch in batches:
        synchronize()
        started = time.perf_counter()
        step(model, batch)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        yield time.perf_counter() - started


MEMORY = {"ours": True, "authors": True, "ours, no checkpointing": False}  # whose peak is measured: checkpointing


def measure_memory(args, name):
    """GiB before the first step and, above that, at the peak of two, of which the second has the longest texts."""
    make, step = SCHEMES[name.partition(",")[0]]
    model, processor = make_model(args.shape, args.device, args.dtype, MEMORY[name])
    groups = train.split(make_pairs(max(args.items, 2 * args.micro_batch_size)), args.micro_batch_size)
    groups = sorted(groups, key=lambda group: sum(len(text) for pair in group for text in pair[:3]))[-2:]
    gc.collect()
    before = memory_now(args.device)
    for _ in train_on(model, (make(group, processor) for group in groups), step):
        above = memory_now(args.device, peak=True) - before
    return {"memory_gib": {name: {"before": before, "above": above}}}


def memory_now(device, peak=False):
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30
    line = "VmHWM:" if peak else "VmRSS:"  # not getrusage's peak, which a process inherits from its parent
    return int(Path("/proc/self/status").read_text().partition(line)[2].split()[0]) / 2**20


def compare(args, identical):
    """Time ours against the others: at identical settings, or ours at its best and theirs as released."""
    in_turn, steps = -(-args.items // args.micro_batch_size), {}
    pairs = make_pairs((2 + args.rounds * in_turn) * args.micro_batch_size)
    groups = train.split(pairs, args.micro_batch_size)
    for name in [*SCHEMES, "trl"] if args.trl else SCHEMES:  # a model each: TRL's constructor changes its own
        ours = name == "ours"
        model, processor = make_model(args.shape, args.device, args.dtype, identical or not ours)
        if ours:
            check_equal(model, processor, groups[0])
        make, step = SCHEMES.get(name) or trl_rival(model, processor, groups[0])
        step = step if identical or ours else as_released(model, step)
        steps[name] = train_on(model, map(make, groups, itertools.repeat(processor)), step)
    turn = lambda n: {name: sum(itertools.islice(each, n)) / n for name, each in steps.items()}
    turn(2)  # before the clock starts
    turns = [turn(in_turn) for _ in range(args.rounds)]
    rates = {name: args.micro_batch_size / statistics.median(each[name] for each in turns) for name in steps}
    ratios = {name: sorted(each[name] / each["ours"] for each in turns) for name in steps if name != "ours"}
    speedup = {name: {"median": statistics.median(r), "low": r[0], "high": r[-1]} for name, r in ratios.items()}
    hours = 30_000 / rates["ours"] / 3600
    return {"identical": identical, "speedup": speedup, "examples_per_second": rates, "hours_for_10k_x_3": hours}


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


class Work(TorchDispatchMode):
    """Counts FLOPs of products and attention, bytes that all other operations move, and operations: launches.

    An operation reads its inputs and writes its outputs once, as if no cache helped. peak: the most bytes that were
    alive at once: those of before, and what operations made, which is no storage of their inputs.
    """

    def __init__(self, before=0):
        super().__init__()
        self.flops = self.traffic = self.launches = 0
        self.alive = self.peak = before

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out, name = operation(*args, **(kwargs or {})), operation.__name__.partition(".")[0]
        storages = lambda values: {t.untyped_storage() for t in tree_leaves(values) if torch.is_tensor(t)}
        for storage in storages(out) - storages((args, kwargs)):  # none for a view
            self.hold(storage.nbytes())
            weakref.finalize(storage, self.hold, -storage.nbytes())
        if operation.is_view or name in ("_unsafe_view", "empty", "empty_like"):  # no kernel
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
    always = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())  # AdamW's state, the gradient
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention_on_gpu), Work(always) as work:
        mdpo_step(model, batch)[0].mean().backward()
    return work


def predicted_hours(work, card, n):
    """-> hours of 10K x 3 epochs, if `work` is that of n examples. The slower of card and host counts."""
    flops, bandwidth = (1e12 * rate for rate in CARDS[card])
    on_card = work.flops / (PRODUCTS * flops) + work.traffic / (TRAFFIC * bandwidth)
    return 30_000 / n * max(on_card, LAUNCH * work.launches) / 3600


def predictions(shape):
    """By checkpointing and micro-batch: the heaviest one's peak, what a mean one is made of, and the paper's hours."""
    rng, image = random.Random(0), (Image.new("RGB", (640, 480)),)
    drawn = [[draw_length(rng, mean) for mean in MEANS] for _ in range(30_000)]
    for checkpointing in (False, True):
        model, processor = make_model(shape, "meta", torch.bfloat16, checkpointing)
        for n in (1, 2, 4, 8, 16, 32):
            heaviest = max(train.split(drawn, n), key=lambda group: sum(2 * (q + y_w) + y_l for q, y_w, y_l in group))
            texts = [map(str.__mul__, (" red", " blue", " left"), lengths) for lengths in heaviest]  # a token each
            longest = packed_batch([Example(*each, image, image) for each in texts], processor)
            peak = count_work(model, longest).peak / 2**30
            work = count_work(model, packed_batch(make_pairs(n), processor))
            hours = {card: round(predicted_hours(work, card, n), 2) for card in CARDS}
            yield {"shape": shape, "device_name": "predicted", "dtype": "bfloat16", "checkpointing": checkpointing,
                   "micro_batch_size": n, "peak_gib": round(peak, 1), "tflop": round(work.flops / 1e12, 1),
                   "gb": round(work.traffic / 1e9), "launches": work.launches, "hours": hours}  # fmt: skip


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="(default: bunny-3b on a GPU, else tiny)")
    add("--device", choices=("cuda", "cpu"), default=train.best_device())
    add("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on a GPU, else float32)")
    add("--micro-batch-size", type=train.whole, default=4)
    add("--rounds", type=train.whole, default=5, help="turns that each scheme takes")
    add("--items", type=train.whole, default=16, help="examples in a turn")
    add("--threads", type=train.whole, default=1, help="on the CPU")
    add("--trl", action="store_true", help="also TRL's DPOTrainer")
    add("--only", choices=("memory-formula", *MEMORY), help="predictions for the real shapes, or one scheme's memory")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    with about(f"--device {args.device}"):
        args.device_name = torch.cuda.get_device_name() if cuda else f"CPU, {args.threads} thread(s)"
    args.shape = args.shape or ("bunny-3b" if cuda else "tiny")
    if args.only == "memory-formula":
        found = itertools.chain(*map(predictions, ("bunny-3b", "llava-7b")))
    elif args.only:
        found = [measure_memory(args, args.only)]
    else:
        for name in MEMORY:  # in a fresh process each, and while this one holds nothing on the GPU
            with about(f"memory of {name}"):
                subprocess.run([sys.executable, __file__, *argv, "--only", name],
                               env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, check=True)  # fmt: skip
        found = (compare(args, identical) for identical in (True, False))
    for measurement in found:
        print(json.dumps(vars(args) | measurement, default=str), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run, saves_memory="a lower --micro-batch-size"))
