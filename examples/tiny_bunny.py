"""Tiny checkpoints in the file format of BAAI/Bunny-v1_0-3B: random ones, and the base model of the shapes world.

The base is a Phi + SigLIP of 0.4 million parameters that learned from the careless annotator of `shapes.py`.
`examples/base` is `write_base` of seed 0 on one thread at commit 65c4989; other versions and machines round otherwise.
"""

import functools
import json
import random
import sys
from pathlib import Path

import numpy
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken, ByteLevelBPETokenizer
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples import shapes
from mdpo import attention_blocks, use_packed_attention
from train import BUNNY_IMAGE_TOKEN, BUNNY_SYSTEM, load_model


def write_bunny(folder, texts, hidden=64, layers=2, tower_hidden=32, tower_layers=2, vision_tower="siglip-patch8-64",
                seed=0):  # fmt: skip
    """Write a random Phi + SigLIP in the format of BAAI/Bunny-v1_0-3B: config, CodeGen tokenizer, fp16 shards.

    texts: what the tokenizer is trained on. vision_tower: ends in patch<P>-<pixels>, as in the real config.
    """
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder, texts)
    config = {
        "architectures": ["BunnyPhiForCausalLM"], "model_type": "bunny-phi",
        "auto_map": {"AutoModelForCausalLM": "modeling_bunny_phi.BunnyPhiForCausalLM"},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
        "hidden_act": "gelu_new", "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "max_position_embeddings": 2048, "mm_hidden_size": tower_hidden, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": vision_tower, "num_attention_heads": 4, "num_hidden_layers": layers,
        "num_key_value_heads": 4, "partial_rotary_factor": 0.5,
        "resid_pdrop": 0.1,  # as in the real config; training has to switch it off
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": len(tokenizer),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    patch_size, image_size = map(int, vision_tower.rpartition("patch")[2].split("-"))
    vision = transformers.SiglipVisionConfig(
        hidden_size=tower_hidden, intermediate_size=2 * tower_hidden, num_hidden_layers=tower_layers,
        num_attention_heads=16, image_size=image_size, patch_size=patch_size, vision_use_head=False,
    )  # fmt: skip
    text = transformers.PhiConfig(**{k: v for k, v in config.items() if k not in ("model_type", "auto_map")})
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1)
    )
    write_weights(folder, model)
    return folder


def write_tokenizer(folder, texts):
    """A small byte-level BPE with Phi-2's added tokens: runs of 2-31 spaces and of 2-9 tabs."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=460, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = transformers.CodeGenTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in runs])
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_weights(folder, model):
    """A Llava's weights under Bunny's names, in shards of safetensors."""
    renames = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        ours = next(filter(name.startswith, renames), "")
        weights[renames.get(ours, "") + name.removeprefix(ours)] = tensor.half().contiguous()
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    save_torch_state_dict(weights, folder, max_shard_size=2 * n_bytes // 3)  # two, and an index


def write_base(folder, seed=0, world=shapes.SMALL):
    """Make a model that sees but answers from habit, and write it as a Bunny checkpoint -> the folder.

    First the vision tower learns to name shape and colour under each patch: without it the language model would not
    look at the image at all. Then, the tower frozen, the model learns the careless annotator's answers.
    """
    rng = random.Random(f"base {seed}")
    talk = [question_and_answer(shapes.random_scene(rng, 0.25, world), rng) for _ in range(400)]
    texts = [f"{BUNNY_SYSTEM} USER: \\n{question} ASSISTANT: {answer}" for question, answer in talk]
    tower = f"shapes-patch8-{world.grid * shapes.CELL}"
    write_bunny(folder, texts, hidden=96, layers=3, tower_hidden=64, vision_tower=tower, seed=seed)
    model, processor = load_model(str(folder))
    learn_to_see(model, rng, world)
    learn_to_answer(model.train(), processor, rng, world)
    write_weights(folder, model)
    return folder


def pixels(scenes, rng, world):
    """Scenes -> (B, 3, H, W), normalised as Bunny's processor does."""
    images = [torch.from_numpy(numpy.asarray(shapes.draw_scene(scene, rng, world)).copy()) for scene in scenes]
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def tower_features(model, pixel_values):
    """What `get_image_features` gives the projector: (B, patches, 64)."""
    return model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]


def learn_to_see(model, rng, world, steps=400, batch_size=64):
    names = ([None, *shapes.SHAPES], [None, *shapes.COLOURS])
    heads = torch.nn.ModuleList(torch.nn.Linear(64, len(kinds)) for kinds in names)
    parameters = [*model.model.vision_tower.requires_grad_(True).parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    for _ in range(steps):
        scenes = [shapes.random_scene(rng, world=world) for _ in range(batch_size)]
        labels = torch.zeros(2, batch_size, world.grid, 2, world.grid, 2, dtype=torch.long)  # 2 x 2 patches a cell
        for b, scene in enumerate(scenes):
            for shape, (colour, spot) in scene.items():
                y, x = divmod(spot, world.grid)
                for label, kinds, kind in zip(labels, names, (shape, colour)):
                    label[b, y, :, x] = kinds.index(kind)
        features = tower_features(model, pixels(scenes, rng, world))
        logits = [head(features).flatten(0, 1) for head in heads]
        sum(F.cross_entropy(*pair) for pair in zip(logits, labels.flatten(1))).backward()
        optimizer.step()
        optimizer.zero_grad()


def question_and_answer(scene, rng):
    question = shapes.random_question(scene, rng)
    claims = shapes.claims_of(scene, question, rng, carelessness=1.0)
    return shapes.question_text(question), shapes.answer_text(question, claims, polite=rng.random() < 0.5)


def learn_to_answer(model, processor, rng, world, n_scenes=12, questions=8, lr=2e-3):
    """Supervised tuning. Questions about an image share it, blind to each other, as mDPO packs answers."""
    tokenizer = processor.tokenizer
    use_packed_attention(model)
    prefix = tokenizer(f"{BUNNY_SYSTEM} USER: {BUNNY_IMAGE_TOKEN * (2 * world.grid) ** 2}\n").input_ids
    tokens = functools.cache(lambda text: tokenizer(text).input_ids)
    parameters = [p for name, p in model.requires_grad_(True).named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, world.base_steps // 20, world.base_steps)
    for _ in range(world.base_steps):
        scenes = [shapes.random_scene(rng, 0.25, world) for _ in range(n_scenes)]
        row = {name: [] for name in ("input_ids", "position_ids", "predictors", "targets")}
        blocks = []  # as `mdpo.pack` has them: the scene's prefix is part of its first question's block
        for scene in scenes:
            owner, n_prefix = len(blocks), len(prefix)
            row["input_ids"] += prefix
            row["position_ids"] += range(n_prefix)
            for i in range(questions):
                question, answer = question_and_answer(scene, rng)
                asked = tokens(f"{question} ASSISTANT:")
                answered = [*tokens(f" {answer}"), tokenizer.eos_token_id]
                start, n = len(row["input_ids"]), len(asked) + len(answered)
                row["input_ids"] += asked + answered
                row["position_ids"] += range(n_prefix, n_prefix + n)
                row["predictors"] += range(start + len(asked) - 1, start + n - 1)
                row["targets"] += answered
                blocks.append((n if i else n_prefix + n, owner, n_prefix))
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        with torch.no_grad():
            seen = tower_features(model, pixels(scenes, rng, world))
        projected = list(model.model.multi_modal_projector(seen))
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=torch.ones((), dtype=torch.bool).expand(1, 1, *batch["input_ids"].shape[-1:] * 2),
            blocks=attention_blocks(blocks),
            position_ids=batch["position_ids"],
            logits_to_keep=batch["predictors"],
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=projected)},
            use_cache=False,
        ).logits
        F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
