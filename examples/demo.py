"""The built-in example: drawn scenes, preferences about them, and a tiny model in Bunny's file format.

`python train.py --demo` calls `write_demo`. The model has random weights: it shows that the whole path works and that
the loss does what it should, not that a model gets better at seeing.
"""

import json
import random
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, ByteLevelBPETokenizer

from data import BUNNY_SYSTEM

DEFAULTS = {"lr": 2e-3, "eval_size": 64, "workers": 2}  # what the demo changes of train.py's defaults
COLOURS = {"red": (214, 40, 40), "green": (42, 157, 72), "blue": (38, 84, 214), "yellow": (240, 200, 40)}
SHAPES = ("circle", "square", "triangle")


def write_demo(out=None, n_examples=448, seed=0):
    """Write model and data to a fresh folder runs/demo-N -> paths (model, data file, folder for the run)."""
    number = 1
    while Path("runs", f"demo-{number}").exists():
        number += 1
    folder = Path("runs", f"demo-{number}")
    data = write_data(folder / "data", n_examples, seed)
    texts = [record[key] for record in json.loads(data.read_text()) for key in ("prompt", "chosen", "rejected")]
    model = write_bunny(folder / "model", texts, seed=seed)
    return str(model), str(data), out or str(folder / "out")


def write_data(folder, n_examples, seed=0):
    """Draw scenes and write preferences about them in the authors' format -> path of the JSON file."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(n_examples):
        scene, other = random_scene(rng), random_scene(rng)
        while other == scene:
            other = random_scene(rng)
        draw_scene(scene, rng).save(folder / "images" / f"{number}.png")
        question = rng.choice(("Describe the picture.", "What is in the picture?"))
        records.append(
            {
                "img_path": f"images/{number}.png",
                "prompt": f"{BUNNY_SYSTEM} USER: <image>\n{question} ASSISTANT:",
                "chosen": describe(scene),
                "rejected": describe(other),
            }
        )
    path = folder / "silkie.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def random_scene(rng):
    return [(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(rng.randint(1, 3))]


def describe(scene):
    return "There is " + " and ".join(f"a {colour} {shape}" for colour, shape in scene) + "."


def draw_scene(scene, rng, size=(120, 80)):
    """Objects from left to right on grey, each with a place and size of its own."""
    image = Image.new("RGB", size, (60, 60, 60))
    draw, width = ImageDraw.Draw(image), size[0] / len(scene)
    for i, (colour, shape) in enumerate(scene):
        radius = rng.uniform(0.3, 0.45) * min(width, size[1])
        x, y = width * (i + 0.5), size[1] / 2 + rng.uniform(-0.1, 0.1) * size[1]
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, COLOURS[colour])
        else:
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], COLOURS[colour])
    return image


def write_bunny(folder, texts, hidden=64, layers=2, tower_hidden=32, tower_layers=2, vision_tower="siglip-patch8-64",
                seed=0):  # fmt: skip
    """Write a random Phi + SigLIP in the format of BAAI/Bunny-v1_0-3B: config, CodeGen tokenizer, sharded fp16 weights.

    texts: what the tokenizer is trained on. vision_tower: ends in patch<P>-<pixels>, as in the real config.
    """
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder, texts)
    config = {
        "architectures": ["BunnyPhiForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_bunny_phi.BunnyPhiForCausalLM"},
        "model_type": "bunny-phi",
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "hidden_act": "gelu_new",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 2048,
        "mm_hidden_size": tower_hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": vision_tower,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.5,
        "resid_pdrop": 0.1,  # as in the real config; training has to switch it off
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": len(tokenizer),
    }
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
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = transformers.CodeGenTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in runs])
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_weights(folder, model):
    """A Llava's weights under Bunny's names, as two shards of safetensors."""
    renames = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in renames.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        weights[name] = tensor.half().contiguous()
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for name, tensor in weights.items():
        late = name.startswith(("lm_head", "model.mm_projector"))
        shards[f"model-0000{1 + late}-of-00002.safetensors"][name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * 2 for t in weights.values())},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
