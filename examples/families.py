"""Tiny random models of today's families, each of its own config class and processor, put through training.

    python examples/families.py              # all of them, in temporary folders
    python examples/families.py qwen3_vl

For each it prints the layout that training chose, and whether four steps at an exaggerated rate change an answer.

In a model with many experts, rounding can exchange two experts that are almost equally good for a token: training
takes plain rows, although packed rows are exact.
"""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import BadInput, Pairs, read_examples, run_command
from examples import shapes
from examples.answer import generate_answers, load_tuned, read_run


def template(image, start, end, asked, text="part.text", order=""):
    """A chat template that writes what a family's own does: order, markers and white space around images and turns.

    start, end: of a turn. asked: the generation prompt. image, text: expressions. order: a filter of a turn's parts.
    """
    part = f"{{{{ {image} if part.type == 'image' else {text} }}}}"
    parts = f"{{% for part in message.content{order} %}}{part}{{% endfor %}}"
    turns = f"{{% for message in messages %}}{start}{parts}{end}{{% endfor %}}"
    return turns + f"{{% if add_generation_prompt %}}{asked}{{% endif %}}"


IMAGES_FIRST = " | sort(attribute='type')"
CHATML = ("<|im_start|>{{ message.role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
QWEN = template("'<|vision_start|><|image_pad|><|vision_end|>'", *CHATML)
INTERNVL = template("'<IMG_CONTEXT>\n'", *CHATML)
SYSTEM = (  # Qwen2.5-VL's, where the messages have none
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
LLAVA = template(  # LLaVA-1.5, and LLaVA-1.6 of Vicuna
    "'<image>\n'", "{% if message.role != 'system' %}{{ message.role | upper }}: {% endif %}",
    "", "ASSISTANT:", "part.text + ' '", IMAGES_FIRST,
)  # fmt: skip
ONEVISION = template(  # a space after the role, but not in the generation prompt, and no new line between turns
    "'<image>'", "<|im_start|>{{ message.role }} ", "<|im_end|>", CHATML[2], "'\n' + part.text", IMAGES_FIRST,
)  # fmt: skip
SMOL = "{{ bos_token }}" + template(  # Idefics3, SmolVLM
    "'<image>'", "{{ message.role | capitalize }}:{{ '' if message.content[0].type == 'image' else ' ' }}",
    "<end_of_utterance>\n", "Assistant:",
)  # fmt: skip
GEMMA = (  # a system text is part of the user's first turn
    "{{ bos_token }}{% set first = messages[0] %}"
    "{% set system = first.content[0].text + '\n\n' if first.role == 'system' else '' %}"
    "{% set messages = messages[1:] if system else messages %}"
) + template(
    "'<start_of_image>'",
    "{% if loop.index0 % 2 == (message.role == 'user') %}{{ raise_exception('no turns') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ system if loop.first else '' }}",
    "<end_of_turn>\n", "<start_of_turn>model\n", "part.text | trim",
)  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = VISION | {"num_key_value_heads": 2}
PATCHES = {"image_size": 32, "patch_size": 8}
SIGLIP = PATCHES | {"vision_use_head": False}
TILE = {"height": 32, "width": 32}
GRIDS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
EDGES = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12}  # pixels of the smallest and largest image
NAMED = [f"{kind}_token" for kind in ("image", "video", "boi", "eoi", "vision_start", "vision_end")]  # in the config


def make_tokenizer(*special, **named):
    """A small byte-level BPE with these special tokens. named: eos_token, image_token and so on."""
    special = [*dict.fromkeys([*special, *named.values()])]
    text = "I can see that there is a red circle and a blue square here. Describe the picture."
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text] * 3, len(special) + 300, special_tokens=special, show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), **named)


chatml_tokenizer = partial(make_tokenizer, "<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build(name, image_processor, tokenizer, template, vision, text={}, config={}, processor_name=None, **options):
    """-> (config, processor) of the classes that begin with `name`.

    vision, text, config: what the config and its parts have beside VISION, TEXT and the ids of special tokens.
    options: the processor's own.
    """
    processor = getattr(transformers, f"{processor_name or name}Processor")
    options |= {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": template}
    if "video_processor" in processor.get_attributes():  # demanded of some, where there is torchvision
        options["video_processor"] = transformers.Qwen2VLVideoProcessor()
    parts = {"text_config": TEXT | {"vocab_size": len(tokenizer)} | text, "vision_config": VISION | vision}
    tokens = {f"{kind}_id": getattr(tokenizer, f"{kind}_id") for kind in NAMED if hasattr(tokenizer, kind)}
    return getattr(transformers, f"{name}Config")(**parts, **tokens, **config), processor(**options)


def llava_next():
    """Several tiles an image, a new line's embedding after each row of patches."""
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>", image_token="<image>")
    tiles = transformers.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=TILE, **GRIDS)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return build("LlavaNext", tiles, tokenizer, LLAVA, PATCHES, config=GRIDS, **options)


def llava_onevision():
    """Tiles, at any resolution; Qwen2 reads them."""
    tokenizer = chatml_tokenizer(image_token="<image>", video_token="<video>")
    tiles = transformers.LlavaOnevisionImageProcessorPil(size=TILE, **GRIDS)
    full = {"vision_feature_select_strategy": "full"}
    return build("LlavaOnevision", tiles, tokenizer, ONEVISION, SIGLIP, {}, GRIDS | full, num_image_tokens=16, **full)


def qwen(name, patch_size, system, rope, vision, **text):
    tokenizer = chatml_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>",
                                 vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>")  # fmt: skip
    image_processor = transformers.Qwen2VLImageProcessorPil(size=EDGES, patch_size=patch_size)
    text |= {"rope_parameters": {"rope_type": "default"} | rope}
    return build(name, image_processor, tokenizer, system + QWEN, vision | {"depth": 2, "out_hidden_size": 32}, text)


def qwen2_5_vl():
    """Dynamic resolution; positions in time, height and width; windows of attention in the tower."""
    vision = {"fullatt_block_indexes": [1], "window_size": 56}
    return qwen("Qwen2_5_VL", 14, SYSTEM, {"mrope_section": [1, 1, 2]}, vision)


def qwen3_vl():
    """As Qwen2.5-VL, and features of the tower's lower layers are added in the first layers of the language model."""
    rope, vision = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}, {"deepstack_visual_indexes": [0]}
    return qwen("Qwen3VL", 16, "", rope, vision | {"num_position_embeddings": 64}, head_dim=8)


def idefics3(name="Idefics3", tiles=transformers.Idefics3ImageProcessorPil, bos="<|begin_of_text|>"):
    """An image is split into parts, with text between that says which part it is."""
    parts = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = make_tokenizer("<global-img>", "<fake_token_around_image>", *parts, bos_token=bos,
                               eos_token="<end_of_utterance>", pad_token="<pad>", image_token="<image>")  # fmt: skip
    tiles = tiles(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    config = {"scale_factor": 2}
    return build(name, tiles, tokenizer, SMOL, PATCHES, config=config, processor_name="Idefics3", image_seq_len=4)


def smolvlm():
    """As Idefics3, and with Idefics3's processor: SmolVLM's needs torchvision and num2words, and does the same."""
    return idefics3("SmolVLM", transformers.SmolVLMImageProcessorPil, "<|im_start|>")


def internvl():
    """Tiles, pixels shuffled into fewer tokens."""
    tokenizer = chatml_tokenizer(start_image_token="<img>", end_image_token="</img>", video_token="<video>",
                                 image_token="<IMG_CONTEXT>", context_image_token="<IMG_CONTEXT>")  # fmt: skip
    tiles = transformers.GotOcr2ImageProcessorPil(size=TILE, crop_to_patches=True, min_patches=1, max_patches=4)
    vision = {"image_size": [32, 32], "patch_size": [8, 8]}
    config = {"image_seq_length": 4, "downsample_ratio": 0.5}
    return build("InternVL", tiles, tokenizer, INTERNVL, vision, config=config, image_seq_length=4)


def gemma3():
    """The tokens of an image attend to each other both ways, and most layers only look back so far."""
    tokenizer = make_tokenizer("<start_of_turn>", bos_token="<bos>", eos_token="<end_of_turn>", pad_token="<pad>",
                               image_token="<image_soft_token>", boi_token="<start_of_image>",
                               eoi_token="<end_of_image>")  # fmt: skip
    image_processor = transformers.Gemma3ImageProcessorPil(size=TILE)
    text = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = {"mm_tokens_per_image": 4}
    return build("Gemma3", image_processor, tokenizer, GEMMA, SIGLIP, text, config, image_seq_length=4)


EVERY = (llava_next, llava_onevision, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, internvl, gemma3)
FAMILIES = {make.__name__: make for make in EVERY}


def write_family(name, folder):
    """Write a family's tiny random model and processor to a new folder, as the hub has them -> the folder."""
    config, processor = FAMILIES[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():  # sharper than a random start, so that what is wrong shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "num_frames": 6}  # its own file, torchvision or not
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def try_family(name):
    """Train the family's model in a temporary folder -> its line of the table. What is said there is muted."""
    with TemporaryDirectory() as path, open(f"{path}/log", "w", 1) as log, redirect_stdout(log), redirect_stderr(log):
        folder = Path(path)
        write_family(name, folder / "model")
        data = shapes.write_pairs(folder / "data", 8)
        flags = f"--model {folder}/model --data {data} --out {folder}/out --batch-size 2 --micro-batch-size 2"
        flags += " --epochs 1 --lr 0.05 --workers 0 --lora-rank 8 --device cpu"
        if train.main(flags.split()):
            raise BadInput(f"{name}: {(folder / 'log').read_text().rpartition('error: ')[2].strip()}")
        layout = read_run(folder / "out")["layout"]
        first = Pairs(read_examples(data, log=len))[0]
        model, processor = load_tuned(folder / "model", folder / "out", "cpu")
        ask = lambda: generate_answers(model, processor, [(first.images, first.question)], 6)
        after = ask()
        with model.disable_adapter():
            before = ask()
    return f"{name:16} {layout:8} {'same' if before == after else 'changed'}"


def run(argv):
    parser = train.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=FAMILIES, help="of one family (default: all)")
    name = parser.parse_args(argv).name
    print(f"{'family':16} {'rows':8} answers before and after")
    for name in [name] if name else FAMILIES:
        print(try_family(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
