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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples import shapes
from mdpo import attention_blocks, use_packed_attention
from train import BUNNY_IMAGE_TOKEN, BUNNY_SYSTEM, bunny_patch_and_image_size, load_model

VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
siglip = lambda *sizes: transformers.SiglipVisionConfig(**dict(zip(VISION, sizes)), vision_use_head=False)


def write_bunny(folder, texts, vision_tower, hidden=64, layers=2, tower_hidden=32, seed=0):
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
    vision = siglip(tower_hidden, 2 * tower_hidden, 2, 16, *bunny_patch_and_image_size(config))
    text = transformers.PhiConfig(**{k: v for k, v in config.items() if k not in ("model_type", "auto_map")})
    torch.manual_seed(seed)
    llava = transformers.LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1)
    write_weights(folder, transformers.LlavaForConditionalGeneration(llava))
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
        weights[renames.get(ours, "") + name.removeprefix(ours)] = tensor.half()
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
    write_bunny(folder, texts, tower, hidden=96, layers=3, tower_hidden=64, seed=seed)
    model, processor = load_model(str(folder))
    learn_to_see(model, rng, world)
    learn_to_answer(model.train(), processor, rng, world)
    write_weights(folder, model)
    return folder


def pixels(scenes, rng, world):
    """Scenes -> (B, 3, H, W), normalised as Bunny's processor does."""
    images = [torch.from_numpy(numpy.array(shapes.draw_scene(scene, rng, world))) for scene in scenes]
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def learn_to_see(model, rng, world, steps=400, batch_size=64):
    names = ([None, *shapes.SHAPES], [None, *shapes.COLOURS])
    heads = torch.nn.ModuleList(torch.nn.Linear(64, len(kinds)) for kinds in names)
    parameters = [*model.model.vision_tower.requires_grad_(True).parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    for _ in range(steps):
        scenes = [shapes.random_scene(rng, world=world) for _ in range(batch_size)]
        kinds = torch.zeros(2, batch_size, world.grid**2, dtype=torch.long)  # shape and colour in each cell
        for b, scene in enumerate(scenes):
            for shape, (colour, spot) in scene.items():
                kinds[:, b, spot] = torch.tensor([names[0].index(shape), names[1].index(colour)])
        cells = kinds.view(2, batch_size, world.grid, world.grid)
        labels = torch.kron(cells, torch.ones(2, 2, dtype=torch.long))  # 2 x 2 patches a cell
        features = model.model.vision_tower(pixels(scenes, rng, world), output_hidden_states=True).hidden_states[-1]
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
    use_packed_attention()
    tokens = functools.cache(lambda text: tokenizer(text).input_ids)
    prefix = tokens(f"{BUNNY_SYSTEM} USER: {BUNNY_IMAGE_TOKEN * (2 * world.grid) ** 2}\n")
    model.requires_grad_(True).model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, world.base_steps // 20, world.base_steps)
    for _ in range(world.base_steps):
        scenes = [shapes.random_scene(rng, 0.25, world) for _ in range(n_scenes)]
        ids, positions, labels = [], [], []
        blocks = []  # as `mdpo.pack` has them: the scene's prefix is part of its first question's block
        for scene in scenes:
            owner = len(blocks)
            for i in range(questions):
                question, answer = question_and_answer(scene, rng)
                shown = [] if i else prefix
                asked = shown + tokens(f"{question} ASSISTANT:")
                answered = [*tokens(f" {answer}"), tokenizer.eos_token_id]
                start, n = len(prefix) - len(shown), len(asked) + len(answered)
                ids += asked + answered
                positions += range(start, start + n)
                labels += [-100] * len(asked) + answered
                blocks.append((n, owner, len(prefix)))
        labels = torch.tensor(labels)
        (answers,) = torch.where(labels >= 0)
        logits = model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones((), dtype=torch.bool).expand(1, 1, len(ids), len(ids)),
            blocks=attention_blocks(blocks),
            position_ids=torch.tensor([positions]),
            pixel_values=pixels(scenes, rng, world),
            logits_to_keep=answers - 1,  # a token is predicted at the one before
            use_cache=False,
        ).logits
        F.cross_entropy(logits.flatten(0, 1), labels[answers]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
