"""Train a multimodal model with mDPO on one GPU (or a tiny one on the CPU).

    python train.py --model BAAI/Bunny-v1_0-3B --data silkie.json
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
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict
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
    STRATEGIES,
    BadInput,
    Pairs,
    as_list,
    encode_prompts,
    make_batch,
    read_examples,
    to_device,
    tokenize,
)
from mdpo import LogPs, encode_images, mdpo_loss, response_logps, token_logps

# ---------------------------------------------------------------------------------------------------------- loading

if not transformers.utils.is_torchvision_available():
    # The library's video processors need torchvision, and it refuses a whole processor for want of one. No video is
    # processed here: a processor is made of its other parts.
    every_part = transformers.ProcessorMixin.get_attributes.__func__
    transformers.ProcessorMixin.get_attributes = classmethod(
        lambda cls: [part for part in every_part(cls) if part != "video_processor"]
    )

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


def load_processor(name_or_path):
    """The model's processor, with a chat template, an image token and a pad token. Raises BadInput."""
    config = read_config(name_or_path)
    if is_bunny(config):
        return bunny_processor(name_or_path, config)
    with library_errors(name_or_path):
        config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise BadInput(f"{name_or_path}: is of type {config.model_type}, which in transformers {transformers.__version__} "
                       "is no model that takes images and text and writes text")  # fmt: skip
    if config.is_encoder_decoder:
        raise BadInput(
            f"{name_or_path}: is an encoder-decoder, in which a response does not follow its prompt in a row"
        )
    with library_errors(name_or_path):
        processor = transformers.AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    if getattr(processor, "image_token", None) is None or getattr(processor, "image_processor", None) is None:
        raise BadInput(f"{name_or_path}: has no image token; mDPO needs a model that takes images and text")
    if not processor.chat_template:
        raise BadInput(
            f"{name_or_path}: its processor has no chat template, so it is not known how to ask it a question"
        )
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_model(name_or_path, device="cpu", dtype=torch.float32):
    """Load Bunny, LLaVA or another image-text-to-text model, from a folder or the hub.

    Returns (model, processor): the model frozen, without dropout, in `dtype` on `device`.
    Raises BadInput if it cannot be read, is of another kind, or has weights that are missing or unexpected.
    """
    processor = load_processor(name_or_path)
    config = read_config(name_or_path)
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    with library_errors(name_or_path):
        if is_bunny(config):
            model, loading = transformers.LlavaForConditionalGeneration.from_pretrained(
                name_or_path, config=bunny_config(name_or_path, config, processor), key_mapping=BUNNY_KEYS, **options
            )
        else:
            model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
                name_or_path, trust_remote_code=False, **options
            )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, loading[problem])):
            raise BadInput(f"{name_or_path}: {len(keys)} {problem.replace('_', ' ')} in the weights, such as {keys[0]}")
    disable_dropout(model)
    return model.requires_grad_(False).to(device), processor


def best_device():
    """-> ("cuda", bfloat16) where there is a GPU, else ("cpu", float32): what `load_model` takes."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def quiet_libraries():
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' renames speak to us, not to who trains
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def read_config(name_or_path):
    with library_errors(name_or_path):
        return transformers.PreTrainedConfig.get_config_dict(name_or_path)[0]


@contextmanager
def library_errors(name_or_path):
    """What the library raises for a model that it cannot load, as one line that says which model."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        where = "the folder" if os.path.isdir(name_or_path) else "neither a folder here nor readable from the hub"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{name_or_path}: cannot be loaded ({where}): {reason}") from error


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
        raise BadInput(f"{name_or_path}: holds no weights of a vision tower")
    with safe_open(cached_file(name_or_path, file_of[layer.format(0)]), "pt") as weights:
        intermediate_size, hidden_size = weights.get_slice(layer.format(0)).get_shape()
    patch_size, image_size = bunny_patch_and_image_size(name_or_path, config)
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


def bunny_patch_and_image_size(name_or_path, config):
    """(14, 384) from `google/siglip-so400m-patch14-384`; no file of the checkpoint says it otherwise."""
    sizes = re.search(r"patch(\d+)-(\d+)$", config.get("mm_vision_tower", ""))
    if not sizes:
        raise BadInput(f"{name_or_path}: mm_vision_tower in config.json does not end in patch<P>-<pixels>")
    return int(sizes[1]), int(sizes[2])


def bunny_processor(name_or_path, config):
    patch_size, image_size = bunny_patch_and_image_size(name_or_path, config)
    with library_errors(name_or_path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=False, extra_special_tokens={"image_token": BUNNY_IMAGE_TOKEN}
        )
    if tokenizer.image_token_id >= config["vocab_size"]:
        raise BadInput(f"{name_or_path}: its tokenizer has no token of nine tabs, which stands for the image")
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


def disable_dropout(model):
    """Set every dropout to 0: modules, and rates that layers keep as numbers (Bunny's config asks for resid_pdrop 0.1)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
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
    leaves = targets or leaves
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=rf"{re.escape(prefix)}\.(.*\.)?({'|'.join(leaves)})",
        ),
    )
    for module in model.modules():
        if type(module) is peft.tuners.lora.Linear:
            module.__class__ = layer  # the same weights under the same names
    return model


# --------------------------------------------------------------------------------------------------------- training


def plan_steps(n_examples, batch_size, epochs, seed):
    """What each optimizer step sees: a list of lists of (epoch, index). A last, smaller batch is used, not dropped."""
    plan = []
    for epoch in range(epochs):
        order = list(range(n_examples))
        random.Random(f"{seed} order {epoch}").shuffle(order)
        plan += [[(epoch, i) for i in order[at : at + batch_size]] for at in range(0, n_examples, batch_size)]
    return plan


def micro_batches(keys, size):
    return [keys[at : at + size] for at in range(0, len(keys), size)]


def make_loader(pairs, batches, processor, args, image_rejected):
    return DataLoader(
        pairs,
        batch_sampler=batches,
        collate_fn=partial(
            make_batch,
            processor=processor,
            layout=args.layout,
            image_rejected=image_rejected,
            max_length=args.max_length,
        ),
        num_workers=min(args.workers, len(batches), os.cpu_count() or 1),
        pin_memory=args.device == "cuda",
        worker_init_fn=ignore_interrupts,
    )


def ignore_interrupts(worker_id):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one stops the workers


def forward(model, batch, args, ref_logps=None):
    """One batch -> losses (B,), metrics, and the reference's log-probabilities, computed here unless they are known."""
    batch = to_device(batch, args.device)
    image_features = encode_images(model, batch)
    if ref_logps is None:
        with torch.no_grad(), model.disable_adapter():
            ref_logps = response_logps(model, batch, image_features)
    policy_logps = response_logps(model, batch, image_features)
    return *mdpo_loss(policy_logps, ref_logps, args.beta, args.delta, args.conditional, args.anchors), ref_logps


# What the order of additions may change, in nats a token (root mean square over a response). In float32 anything wrong is
# far above it. In bf16 rounding alone can come near a tenth, so that packed rows are also held to what plain rows reach.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


def choose_layout(model, processor, items, args):
    """The layout to train in: packed rows where they are exact for this model, else plain ones. Raises BadInput.

    Decided by measuring on `items`, a few of the first batch, not by what the model is called; --layout is held to it, too.
    """
    errors, reasons = {}, {}
    for layout in LAYOUTS:
        try:
            errors[layout] = layout_error(model, processor, items, layout, args)
            reasons[layout] = f"{errors[layout]:.2g} nats a token off the library's own call"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may refuse a mask or a key in whatever way
            errors[layout] = math.inf
            reasons[layout] = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
    allowed = TOLERANCE[model.dtype]
    if args.layout != "plain" and errors["packed"] <= min(allowed, 1e-3 + 3 * errors["plain"]):
        return "packed"
    if args.layout != "packed" and errors["plain"] <= allowed:
        if args.layout is None:
            print(f"packed rows are not exact for this model ({reasons['packed']}): training on plain ones")
        return "plain"
    layout = args.layout or "plain"
    raise BadInput(f"{args.model}: cannot be trained in {layout} rows: {reasons[layout]}")


@torch.no_grad()
def layout_error(model, processor, items, layout, args):
    """How far a layout is from the library's own call on one sequence at a time: the worst response's root mean square
    over its tokens, in nats; inf if the tokens differ. Packed, also how much y_l feels it when y_w's tokens are changed.
    Raises BadInput where layers see less far back than a packed sequence may be long.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if layout == "packed" and window and window < args.max_length:
        raise BadInput(f"its layers see {window} tokens back, fewer than --max-length {args.max_length}")
    model.eval()
    root_mean_square = lambda difference: difference.square().mean().sqrt()
    image_rejected = items[0][4] is not None
    batch = to_device(make_batch(items, processor, layout, image_rejected, args.max_length), args.device)
    errors = []
    image_features = encode_images(model, batch)
    logps = token_logps(model, batch, image_features)  # (R, K)
    for i, item in enumerate(items):
        for field in range(3 if image_rejected else 2):
            mine = batch["slots"] == field * len(items) + i  # (R, K)
            n = mine.sum()  # a response that is too long is cut
            tokens, expected = library_logps(model, processor, item, field, args.device)
            if not tokens[:n].equal(batch["targets"][mine]):
                return math.inf
            errors.append(root_mean_square(logps[mine] - expected[:n]))
    if layout == "packed":
        y_l = (batch["slots"] >= len(items)) & (batch["slots"] < 2 * len(items))  # (1, K)
        ids, at = batch["input_ids"].clone(), 0
        for prefix, *responses in batch["lengths"]:
            if len(responses) == 2:
                ids[0, at + prefix : at + prefix + responses[0]] = ids[0, 0]
            at += prefix + sum(responses)
        changed = token_logps(model, batch | {"input_ids": ids}, image_features)
        errors.append(root_mean_square(logps[y_l] - changed[y_l]))
    return torch.stack(errors).max().item()


def library_logps(model, processor, item, field, device):
    """(tokens, log-probabilities) of one response: the library's own call on the whole text, unpadded, with every key."""
    question, chosen, rejected, image, rejected_image = item
    images = as_list(rejected_image if field == 2 else image)
    tokens = tokenize(processor, question, chosen, rejected, len(images))
    whole = encode_prompts(processor, [tokens.wholes[field == 1]], [images]).to(device)
    ids = whole["input_ids"][0, -tokens.n_after[field == 1] :]
    logits = model(**whole, use_cache=False).logits[0, -len(ids) - 1 : -1].float()
    return ids, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


class Mean:
    """Means over examples, of tensors (B,) that stay on their device until they are asked for."""

    def __init__(self):
        self.rows = defaultdict(list)

    def add(self, losses, metrics):
        for name, values in {"loss": losses.detach(), **metrics}.items():
            self.rows[name].append(values)

    def result(self):
        means = torch.stack([torch.cat(values).double().mean() for values in self.rows.values()]).tolist()
        return dict(zip(self.rows, means))


@torch.no_grad()
def evaluate(model, loader, args):
    mean = Mean()
    for batch in tqdm(loader, desc="held out", leave=False, disable=None):
        mean.add(*forward(model, batch, args)[:2])
    return {f"eval/{name}": value for name, value in mean.result().items()}


def train(model, processor, examples, held_out, args, out):
    """The training loop: every step of the plan that `out` has not seen yet. Returns the signal that stopped it, or 0."""
    pairs = Pairs(examples, args.reject, args.crop, args.seed, examples + held_out, args.fixed_crops)
    eval_keys = micro_batches([("held out", i) for i in range(len(held_out))], args.micro_batch_size)
    eval_pairs = Pairs(held_out, args.reject, args.crop, args.seed, pool=examples + held_out)
    evaluate_now = partial(
        evaluate, model, make_loader(eval_pairs, eval_keys, processor, args, not args.no_image), args
    )

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, args.lr, betas=args.betas, weight_decay=args.weight_decay, fused=args.device == "cuda"
    )
    plan = plan_steps(len(examples), args.batch_size, args.epochs, args.seed)
    warmup_steps = min(math.ceil(args.warmup * len(plan)), len(plan) - 1)  # the first is at rate 0: an only step is none
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup_steps, len(plan))
    # Where the images do not change between epochs, the reference is asked in the first only.
    needs_image_rejected = args.conditional or "image_rejected" in args.anchors
    reuse_ref = args.fixed_crops or not needs_image_rejected
    ref_cache = torch.zeros(len(examples), 3 if needs_image_rejected else 2, device=args.device)
    done = load_checkpoint(out, model, optimizer, schedule, ref_cache) if args.resume else 0
    start_log(out, done)
    if held_out and done == 0:
        append_log(out, {"step": 0, **evaluate_now()})

    todo = [micro for keys in plan[done:] for micro in micro_batches(keys, args.micro_batch_size)]
    batches = iter(make_loader(pairs, todo, processor, args, needs_image_rejected)) if todo else iter(())
    model.train()
    with StopSignals() as stop, tqdm(total=len(plan), initial=done, desc="mDPO", dynamic_ncols=True) as bar:
        for step, keys in enumerate(plan[done:], done + 1):
            started, mean = time.perf_counter(), Mean()
            for micro in micro_batches(keys, args.micro_batch_size):
                indices = [i for _, i in micro]
                known = LogPs(*ref_cache[indices].T) if reuse_ref and micro[0][0] > 0 else None
                losses, metrics, ref_logps = forward(model, next(batches), args, known)
                if reuse_ref and known is None:
                    ref_cache[indices] = torch.stack(ref_logps[: ref_cache.shape[1]], 1)
                (losses.sum() / len(keys)).backward()  # the mean of the whole batch, whatever the micro-batches
                mean.add(losses, metrics)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            record = {"step": step, "epoch": step * args.epochs / len(plan), **mean.result()}  # waits for the device
            record |= {"lr": schedule.get_last_lr()[0], "grad_norm": grad_norm.item()}
            if not math.isfinite(record["loss"] + record["grad_norm"]):
                ids = ", ".join(examples[i].id for _, i in keys)
                raise BadInput(f"step {step}: the loss or its gradient is not finite; examples of the batch: {ids}")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            record["examples_per_second"] = len(keys) / (time.perf_counter() - started)
            record["peak_memory_gib"] = peak_memory_gib(args.device)
            end_of_epoch = step == len(plan) or plan[step][0][0] != keys[0][0]
            if held_out and end_of_epoch:
                record |= evaluate_now()
            append_log(out, record)
            show(bar, record)
            if end_of_epoch or stop or (args.save_every and step % args.save_every == 0):
                save_checkpoint(out, step, model, optimizer, schedule, ref_cache)
            if stop and step < len(plan):
                return stop[0]
    model.save_pretrained(out, save_embedding_layers=False)
    processor.save_pretrained(out)
    return 0


def show(bar, record):
    names = {"loss": "loss", "rewards/image_accuracies": "image_acc", "rewards/chosen": "chosen_reward"}
    values = {short: f"{record[name]:.3f}" for name, short in names.items() if name in record}
    bar.set_postfix(
        values | {"ex/s": f"{record['examples_per_second']:.2f}", "GiB": f"{record['peak_memory_gib']:.1f}"}
    )
    bar.update()


def peak_memory_gib(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class StopSignals(list):
    """While open, Ctrl-C and SIGTERM are only noted here, so that the step ends and is saved. A second one stops at once."""

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if self:
            raise KeyboardInterrupt
        self.append(number)
        tqdm.write("stopping after this step (again to stop at once)", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- the run and its folder


def claim_folder(args):
    """The folder of this run, made and writable; never one that holds something else. Raises BadInput."""
    if args.out is None:
        stem, number = f"{Path(args.model).name}-{Path(args.data).stem}", 1
        while Path("runs", f"{stem}-{number}").exists():
            number += 1
        args.out = str(Path("runs", f"{stem}-{number}"))
    out = Path(args.out)
    holds_run = (out / "args.json").is_file()
    if args.resume and not holds_run:
        raise BadInput(f"{out}: holds no run to resume; leave out --resume to start one")
    if holds_run and not (args.resume or args.overwrite):
        raise BadInput(f"{out}: already holds a run; go on with it by --resume, or replace it by --overwrite")
    if out.is_dir() and any(out.iterdir()) and not holds_run:
        raise BadInput(f"{out}: is not empty and holds no run; name a new folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise BadInput(f"{out}: cannot be written to ({error.strerror})") from None
    return out


# What may differ when a run goes on: it changes speed, not what is trained.
MAY_DIFFER = {"out", "resume", "overwrite", "debug", "workers", "save_every"}
MAY_DIFFER |= {"micro_batch_size", "device", "layout", "checkpointing"}  # the same but for rounding


def start_or_check(out, args, examples, held_out):
    """Write the run's arguments to args.json; for --resume, compare with those there. Raises BadInput."""
    texts = json.dumps([asdict(example) for example in examples + held_out])
    mine = json.loads(json.dumps(vars(args))) | {"data_sha256": hashlib.sha256(texts.encode()).hexdigest()}
    if args.resume:
        theirs = json.loads((out / "args.json").read_text())
        for name in mine.keys() - MAY_DIFFER:
            if mine[name] != theirs.get(name):
                what = "the data" if name == "data_sha256" else f"--{name.replace('_', '-')}"
                raise BadInput(f"{out}: {what} is not as when the run began ({theirs.get(name)}, now {mine[name]})")
        return
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "checkpoint.pt"):
        (out / name).unlink(missing_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    write_whole(out / "args.json", json.dumps(mine | {"versions": versions}, indent=2))


def write_whole(path, text):
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_checkpoint(out, step, model, optimizer, schedule, ref_cache):
    """All that a resumed run needs: order, crops and random images are pure functions of the seed."""
    state = {
        "step": step,
        "adapter": {name: p for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "ref_cache": ref_cache,
    }
    torch.save(state, out / "checkpoint.pt.tmp")
    os.replace(out / "checkpoint.pt.tmp", out / "checkpoint.pt")


def load_checkpoint(out, model, optimizer, schedule, ref_cache):
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
    ref_cache.copy_(state["ref_cache"])
    return state["step"]


def read_log(out):
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # every whole line ends in a newline


def start_log(out, done):
    """Drop what metrics.jsonl says of steps after `done`: they come again."""
    kept = [record for record in read_log(out) if record["step"] <= done and done > 0]
    write_whole(out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))


def append_log(out, record):
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def before_and_after(out):
    """A table: held-out metrics before and after; with nothing held out, the first and the last tenth of the steps."""
    records = read_log(out)
    ends = [record for record in records if "eval/loss" in record]
    if ends:
        first, last, title = ends[:1], ends[-1:], "held-out examples"
    else:
        tenth = math.ceil(len(records) / 10)
        first, last, title = records[:tenth], records[-tenth:], f"training, first and last {tenth} steps"
    prefix = "eval/" if ends else ""
    names = [n for n in first[0] if n.startswith((prefix + "loss", prefix + "rewards/"))]
    mean = lambda records, name: sum(record[name] for record in records) / len(records)
    lines = [f"{title:34} before     after"]
    lines += [f"  {name.removeprefix(prefix):28} {mean(first, name):10.4f} {mean(last, name):9.4f}" for name in names]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")  # argparse takes -1e-3 for a flag

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


# fmt: off
def parse_args(argv):
    parser = Parser(description="Train a multimodal model with mDPO.", formatter_class=Help)
    add = parser.add_argument
    add("--model", help="folder or hub name: Bunny, or any image-text-to-text model of transformers")
    add("--data", help="preference file (README, Data)")
    add("--images", metavar="DIR", help="where relative image paths begin (default: the data file's folder)")
    add("--out", metavar="DIR", help="folder for adapter and log (default: a new one, runs/...-1, -2 and so on)")
    add("--demo", action="store_true", help="make a tiny model and drawn data, and train on them")
    add = parser.add_argument_group("data").add_argument
    add("--subset", metavar="PREFIX", help="only ids that begin so; the paper's is llava (4.1)")
    add("--limit", type=whole, metavar="N", help="a sample of N examples; the paper's is 10000 (4.1)")
    add("--eval-size", type=count, default=0, metavar="N", help="examples held out, never trained on")
    add("--skip-bad", action="store_true", help="drop bad records instead of stopping")
    add("--max-length", type=whole, default=2048, metavar="N", help="tokens of prompt and one response (authors' config)")
    add("--reject", choices=STRATEGIES, default="crop", help="how the rejected image is made (Table 3)")
    add("--crop", type=share, nargs=2, default=CROP, metavar=("LO", "HI"), help="share of the area that a crop keeps (Table 3)")
    add("--fixed-crops", action="store_true", help="one rejected image an example for the whole run, where the paper draws "
        "one each time; the reference is then asked in the first epoch only")
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
    add("--resume", action="store_true", help="go on with the run in --out, exactly")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--debug", action="store_true", help="show the traceback of an error")
    if "--demo" in argv:
        from examples.demo import DEFAULTS

        parser.set_defaults(**DEFAULTS)
    return parser.parse_args(argv)
# fmt: on


def check_args(args):
    """Everything that can be known to be wrong before reading a file. Fills in what depends on other arguments."""
    for name in ("model", "data"):
        if not getattr(args, name):
            raise BadInput(f"--{name} is missing (or try --demo)")
    if args.batch_size % args.micro_batch_size:
        raise BadInput(
            f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size}"
        )
    if not 0 < args.crop[0] <= args.crop[1] <= 1:
        raise BadInput(f"--crop needs 0 < LO <= HI <= 1, got {args.crop[0]} {args.crop[1]}")
    if args.resume and (args.overwrite or args.out is None):
        raise BadInput("--resume needs --out, the folder of the run, and excludes --overwrite")
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


def run(args):
    if args.demo:
        from examples.demo import demo_paths, report, write_demo

        if args.resume or args.model or args.data:
            raise BadInput("--demo has its own model and data, made afresh; leave out --model, --data and --resume")
        args.model, args.data, args.out = demo_paths(args.out)
    check_args(args)
    out = claim_folder(args)
    try:
        if args.demo:
            write_demo(args.data)
        processor = load_processor(args.model)
        examples = read_examples(args.data, args.images, subset=args.subset, limit=args.limit, seed=args.seed,
                                 with_images=not args.no_image, skip_bad=args.skip_bad, processor=processor,
                                 max_length=args.max_length)  # fmt: skip
        if args.eval_size >= len(examples):
            raise BadInput(f"--eval-size {args.eval_size} leaves nothing of {len(examples)} examples to train on")
        held = set(random.Random(f"{args.seed} held out").sample(range(len(examples)), args.eval_size))
        held_out = [example for i, example in enumerate(examples) if i in held]
        examples = [example for i, example in enumerate(examples) if i not in held]

        cuda = args.device == "cuda"
        model, processor = load_model(args.model, args.device, torch.bfloat16 if cuda else torch.float32)
        model = add_lora(model, args.lora_rank, args.lora_alpha, args.seed, args.lora_targets)
        if args.resume:
            args.layout = args.layout or json.loads((out / "args.json").read_text())["layout"]
        first = Pairs(examples, args.reject, args.crop, args.seed, pool=examples + held_out)
        args.layout = choose_layout(model, processor, [first[0, i] for i in range(len(examples))[:2]], args)
        if args.checkpointing:
            enable_checkpointing(model)
        trainable, _ = model.get_nb_trainable_parameters()
        layers = sum(name.endswith("lora_A") for name, _ in model.named_modules())
        where = f"{torch.cuda.get_device_name()}, bf16" if cuda else "CPU, float32 (no CUDA device is used)"
        print(f"{where}; LoRA on {layers} linear layers of the language model, {trainable:,} parameters train")
        steps = args.epochs * math.ceil(len(examples) / args.batch_size)
        print(f"{len(examples)} examples, {len(held_out)} held out; {steps} steps of {args.batch_size} -> {out}")

        start_or_check(out, args, examples, held_out)
        stopped_by = train(model, processor, examples, held_out, args, out)
    except torch.OutOfMemoryError as error:
        raise BadInput(f"out of GPU memory at --micro-batch-size {args.micro_batch_size}: try a smaller one") from error
    finally:
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    if stopped_by:
        print(f"stopped and saved in {out}" + "; the same command with --out and --resume goes on" * (not args.demo))
        return 128 + stopped_by
    print(f"\n{before_and_after(out)}\n")
    if args.demo:
        print(f"{report(model, processor, out)}\n")
    print(f"adapter, log and arguments: {out}")
    return 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    try:
        return run(parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except BadInput as error:
        if "--debug" in argv:
            raise
        message = str(error).strip()
        if message.startswith("Caught"):  # raised in a DataLoader worker: its traceback, then the message
            message = message.splitlines()[-1].partition(": ")[2]
        print(f"error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
