"""Tiny random models of today's families, each of its own config class and processor, put through training.

    python examples/families.py              # all of them, in temporary folders
    python examples/families.py qwen3_vl

For each it prints the layout that training chose, how far packed and plain rows are from the library's own
call on one conversation at a time, in nats / sqrt(tokens), and what the model answers before and after four
steps with an exaggerated learning rate.

In a model with many experts, rounding can exchange two experts that are almost equally good for a token. Then
training takes plain rows, although packed rows are exact. With another --seed it looks at other crops.
"""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import is_torchvision_available

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import SCORED, BadInput, Pairs, make_batch, read_examples, run_command, tokenize
from examples import shapes
from examples.answer import generate_answers, load_tuned
from mdpo import pack, response_logps, sequence_logps

# The templates write what the families' own do: order, markers and white space around images and turns.
CHATML = (  # Qwen, InternVL
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for part in message.content %}{{ IMAGE if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = (  # Qwen2.5-VL's, where the messages have none
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)
IMAGES_THEN_TEXT = (
    "{% for part in message.content if part.type == 'image' %}{{ IMAGE }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ TEXT }}{% endfor %}"
)
LLAVA = (  # LLaVA-1.5, and LLaVA-1.6 of Vicuna
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role | upper }}: {% endif %}"
    + IMAGES_THEN_TEXT.replace("IMAGE", "'<image>\n'").replace("TEXT", "part.text + ' '")
    + "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ONEVISION = (  # a space after the role, but not in the generation prompt, and no new line between turns
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}"
    + IMAGES_THEN_TEXT.replace("IMAGE", "'<image>'").replace("TEXT", "'\n' + part.text")
    + "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOL = (  # Idefics3, SmolVLM
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (  # a system text is part of the user's first turn
    "{{ bos_token }}{% set first = messages[0] %}"
    "{% set system = first.content[0].text + '\n\n' if first.role == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% if loop.index0 % 2 == (message.role == 'user') %}{{ raise_exception('no turns') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ system if loop.first else '' }}"
    "{% for part in message.content %}{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = VISION | {"num_key_value_heads": 2}
TILE = {"height": 32, "width": 32}
EDGES = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12}  # pixels of the smallest and largest image
VIDEO = {"LlavaOnevision": "LlavaOnevision", "Qwen2_5_VL": "Qwen2VL", "Qwen3VL": "Qwen3VL", "InternVL": "InternVL"}


def make_tokenizer(*special, **named):
    """A small byte-level BPE. `named`: eos_token, pad_token and so on; others go to extra_special_tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    known = {name: named.pop(name) for name in ("bos_token", "eos_token", "pad_token") if name in named}
    special = [*dict.fromkeys([*known.values(), *special, *named.values()])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=len(special) + 300, special_tokens=special,
                                             initial_alphabet=alphabet, show_progress=False)  # fmt: skip
    text = "I can see that there is a red circle and a blue square here. Describe the picture."
    bpe.train_from_iterator([text] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=named, **known)


def chatml_tokenizer(*special, **named):
    return make_tokenizer("<|im_start|>", *special, eos_token="<|im_end|>", pad_token="<|endoftext|>", **named)


def video_part(name):
    """A processor's part for videos. The library demands it where torchvision is installed, and can make it only there."""
    made = is_torchvision_available()
    return {"video_processor": getattr(transformers, f"{VIDEO[name]}VideoProcessor")()} if made else {}


def llava_next():
    """Several tiles an image, a new line's embedding after each row of patches."""
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>", image_token="<image>")
    grids = [[32, 64], [64, 32], [64, 64]]
    processor = transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=TILE, image_grid_pinpoints=grids),
        tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA,
    )  # fmt: skip
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_grid_pinpoints=grids, image_token_index=processor.image_token_id,
    ), processor  # fmt: skip


def llava_onevision():
    """Tiles, at any resolution; Qwen2 reads them."""
    tokenizer = chatml_tokenizer(image_token="<image>", video_token="<video>")
    grids = [[32, 64], [64, 32], [64, 64]]
    processor = transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=TILE, image_grid_pinpoints=grids),
        tokenizer, num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=ONEVISION, **video_part("LlavaOnevision"),
    )  # fmt: skip
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_grid_pinpoints=grids, image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id, vision_feature_select_strategy="full",
    ), processor  # fmt: skip


def qwen(name, patch_size, system, rope, vision, **text):
    tokenizer = chatml_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>",
                                 vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>")  # fmt: skip
    template = system + CHATML.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
    image_processor = Qwen2VLImageProcessorPil(size=EDGES, patch_size=patch_size)
    parts = {"image_processor": image_processor, "tokenizer": tokenizer} | video_part(name)
    processor = getattr(transformers, f"{name}Processor")(**parts, chat_template=template)
    vision |= {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 32}
    text |= TEXT | {"vocab_size": len(tokenizer), "rope_parameters": {"rope_type": "default"} | rope}
    return getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config=text,
        image_token_id=tokenizer.image_token_id, vision_start_token_id=tokenizer.vision_bos_token_id,
        video_token_id=tokenizer.video_token_id, vision_end_token_id=tokenizer.vision_eos_token_id,
    ), processor  # fmt: skip


def qwen2_5_vl():
    """Dynamic resolution; positions in time, height and width; windows of attention in the tower."""
    vision = {"fullatt_block_indexes": [1], "window_size": 56}
    return qwen("Qwen2_5_VL", 14, SYSTEM, {"mrope_section": [1, 1, 2]}, vision)


def qwen3_vl():
    """As Qwen2.5-VL, and features of the tower's lower layers are added in the first layers of the language model."""
    rope, vision = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}, {"deepstack_visual_indexes": [0]}
    return qwen("Qwen3VL", 16, "", rope, vision | {"num_position_embeddings": 64}, head_dim=8)


def idefics3(image_processor_class=Idefics3ImageProcessorPil, config_class=transformers.Idefics3Config,
             bos="<|begin_of_text|>"):  # fmt: skip
    """An image is split into parts, with text between that says which part it is."""
    parts = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = make_tokenizer("<global-img>", *parts, bos_token=bos, eos_token="<end_of_utterance>",
                               pad_token="<pad>", image_token="<image>",
                               fake_image_token="<fake_token_around_image>",
                               global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>")  # fmt: skip
    image_processor = image_processor_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=SMOL)
    return config_class(
        vision_config=VISION | {"image_size": 32, "patch_size": 8},
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        scale_factor=2, image_token_id=processor.image_token_id,
    ), processor  # fmt: skip


def smolvlm():
    """As Idefics3, and with Idefics3's processor: SmolVLM's needs torchvision and num2words, and does the same."""
    return idefics3(SmolVLMImageProcessorPil, transformers.SmolVLMConfig, "<|im_start|>")


def internvl():
    """Tiles, pixels shuffled into fewer tokens."""
    tokenizer = chatml_tokenizer(start_image_token="<img>", end_image_token="</img>", video_token="<video>",
                                 context_image_token="<IMG_CONTEXT>")  # fmt: skip
    image_processor = GotOcr2ImageProcessorPil(size=TILE, crop_to_patches=True, min_patches=1, max_patches=4)
    template = CHATML.replace("IMAGE", "'<IMG_CONTEXT>\\n'")
    processor = transformers.InternVLProcessor(
        image_processor, tokenizer, image_seq_length=4, chat_template=template, **video_part("InternVL")
    )
    return transformers.InternVLConfig(
        vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=processor.image_token_id, image_seq_length=4, downsample_ratio=0.5,
    ), processor  # fmt: skip


def gemma3():
    """The tokens of an image attend to each other both ways, and most layers only look back so far."""
    tokenizer = make_tokenizer("<start_of_turn>", bos_token="<bos>", eos_token="<end_of_turn>", pad_token="<pad>",
                               image_token="<image_soft_token>", boi_token="<start_of_image>",
                               eoi_token="<end_of_image>")  # fmt: skip
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=TILE), tokenizer, image_seq_length=4, chat_template=GEMMA
    )
    text = transformers.Gemma3TextConfig(**TEXT, vocab_size=len(tokenizer), head_dim=8, sliding_window=16,
                                         layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    return transformers.Gemma3Config(
        vision_config=VISION | {"image_size": 32, "patch_size": 8, "vision_use_head": False}, text_config=text,
        mm_tokens_per_image=4, image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
    ), processor  # fmt: skip


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
    if video := VIDEO.get(type(processor).__name__.removesuffix("Processor")):  # in a file of its own, torchvision or not
        parts = json.loads((folder / "processor_config.json").read_text())
        parts.pop("video_processor", None)
        (folder / "processor_config.json").write_text(json.dumps(parts))
        part = {"video_processor_type": f"{video}VideoProcessor", "num_frames": 6}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(part))
    return folder


def try_family(name, device):
    """Train the family's model in a temporary folder -> its line of the table. What is said there is muted."""
    with TemporaryDirectory() as path, open(f"{path}/log", "w", 1) as log, redirect_stdout(log), redirect_stderr(log):
        folder = Path(path)
        write_family(name, folder / "model")
        data = shapes.write_pairs(folder / "data", 8)
        flags = f"--model {folder}/model --data {data} --out {folder}/out --batch-size 2 --micro-batch-size 2"
        flags += f" --epochs 1 --lr 0.05 --workers 0 --lora-rank 8 --device {device}"
        if train.main(flags.split()):
            raise BadInput(f"{name}: {(folder / 'log').read_text().rpartition('error: ')[2].strip()}")
        examples = read_examples(data, log=len)
        pairs = [Pairs(examples)[0, i] for i in range(2)]
        packed, plain = distances(*train.load_model(str(folder / "model"), device), pairs)
        layout = json.loads((folder / "out" / "args.json").read_text())["layout"]
        model, processor = load_tuned(folder / "model", folder / "out", device)
        ask = [(pairs[0].images, pairs[0].question)]
        after = generate_answers(model, processor, ask, 6)
        with model.disable_adapter():
            answers = generate_answers(model, processor, ask, 6) + after
    return f"{name:16} {layout:8} {packed:14.1e} {plain:13.1e}   {ascii(answers)}"


@torch.no_grad()
def distances(model, processor, pairs):
    """How far packed and plain rows are from the library's own call, in float32, as in `train.TOLERANCE`."""
    exact, n_tokens, rows = [], [], make_batch(pairs, processor)
    packed = pack(make_batch(pairs, processor, share=True))
    with train.InFloat32():
        for field, response in SCORED.values():
            for pair in pairs:
                tokens, images = tokenize(processor, pair), [*getattr(pair, field)]
                whole = tokens.wholes[response]
                inputs = processor(text=[whole], images=[images], return_tensors="pt").to(model.device)
                labels = inputs["input_ids"].clone()
                labels[:, : -len(tokens.responses[response])] = -100
                exact.append(sequence_logps(model(**inputs, use_cache=False).logits, labels))
                n_tokens.append((labels >= 0).sum())
        errors = [torch.cat(response_logps(model, batch)) - torch.cat(exact) for batch in (packed, rows)]
    return [(error.abs() / torch.stack(n_tokens).sqrt()).max().item() for error in errors]


def run(argv):
    parser = train.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"(default: all) {', '.join(FAMILIES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in FAMILIES]:
        raise BadInput(f"{unknown[0]} is none of {', '.join(FAMILIES)}")
    print(f"{'family':16} {'rows':8} {'packed off by':>14} {'plain off by':>13}   answers before and after")
    for name in args.names or FAMILIES:
        print(try_family(name, args.device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
