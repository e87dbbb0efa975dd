"""What is trained is what was meant: records that nobody can mean are refused, and the rest is shown and counted."""

import colorsys
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import tokenizers
import torch
from PIL import Image

import data
import mdpo
import train
from data import BadInput, Example, Pairs, make_batch, open_image, read_examples
from examples import families, shapes
from test_mdpo import (
    LAYOUTS,
    MESSAGES,
    NO_PROMPT,
    ROOT,
    asked,
    authors,
    command,
    drawn,
    gradient,
    laid_out,
    noise,
    pair,
    prefix_length,
    write,
)
from tests.helpers import (
    PLAIN,
    TURNS,
    VLFEEDBACK,
    as_examples,
    check_file,
    completion,
    one_line_of,
    pixels_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SYSTEM_TWICE = CHATML.replace(
    "m.role + '\n' }}", "m.role + '\n' + (m.content[0].text if m.role == 'system' else '') }}"
)


NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A processor of Qwen3-VL's kind, whose turns end in <|im_end|>."""
    folder = families.write_family("qwen3_vl", tmp_path_factory.mktemp("qwen"))
    processor = train.load_processor(str(folder))
    processor.chat_template = CHATML
    return processor


def read(folder, *records, **options):
    return read_examples(write(folder / "x.json", [*records]), **options)


def refusal(folder, record, **options):
    """Why a record is bad, as its line says."""
    with pytest.raises(BadInput, match="1 bad records") as error:
        read(folder, record, **options)
    return str(error.value).splitlines()[1]


def row_text(processor, question, images=1):
    """The row of y_w as text, image tokens as one."""
    image = [noise(1)] * images
    batch = make_batch([pair(question, "A cat.", "No.", image, image)], processor)
    text = processor.tokenizer.decode(batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0])
    return re.sub(f"({re.escape(processor.image_token)})+", "<image>", text)


def test_a_pair_that_is_equal_once_it_is_cut_is_bad(folder, bunny):
    """DPO's margin would be 0 for ever, and AdamW would scale its rounding noise."""
    processor, start = train.load_processor(str(bunny)), "There is a red circle and a blue square. " * 5
    record = authors(chosen=start + "Yes.", rejected=start + "No.")
    room = int(re.search("prompts: ([0-9]+)", counts(folder, record, processor=processor))[1]) + 20
    assert "equal in the tokens of --max-length" in refusal(
        folder, record, processor=processor, max_length=room
    )
    ends = authors(chosen="Yes.<|endoftext|> Or no.", rejected="Yes.<|endoftext|> Or so.")
    assert "are equal" in refusal(folder, ends, processor=processor)
    empty = authors(chosen="<|endoftext|>Yes.")
    assert "'chosen' is empty before its end-of-sequence" in refusal(folder, empty, processor=processor)


def counts(folder, *records, **options):
    """What reading says of good records."""
    said = []
    read(folder, *records, log=said.append, **options)
    return said[-1]


def test_responses_that_are_cut_are_counted(folder, bunny):
    """They lose their end-of-sequence: the model would learn never to stop, and nobody was told."""
    processor, long = train.load_processor(str(bunny)), "red circle " * 60
    records = [
        authors(),
        authors(chosen=long),
        authors(rejected=long),
        authors(chosen=long, rejected="x" + long),
    ]
    ended = authors(chosen="Yes.<|endoftext|> Or no.")
    said = counts(folder, *records, ended, processor=processor, max_length=100)
    assert "5 examples with 1 different images" in said and "4 responses are cut at --max-length 100" in said
    assert "1 responses end at an end-of-sequence inside" in said
    lengths = [
        len(ids) for e in records for ids in data.tokenize(processor, read_one(folder, e)).responses.values()
    ]
    assert f"the longest {max(lengths)}" in said


def test_a_response_that_just_fits_is_not_cut(folder, bunny):
    """Who is told of cut responses makes room for them, and has to see when it is enough."""
    record, processor = authors(rejected="No."), train.load_processor(str(bunny))
    said = counts(folder, record, processor=processor)
    room = sum(
        int(re.search(f"{name}: [0-9]+ tokens, the longest ([0-9]+)", said)[1])
        for name in ("prompts", "responses")
    )
    for max_length, n_cut in (room, 0), (room - 1, 1):
        said = counts(folder, record, processor=processor, max_length=max_length)
        assert f"{n_cut} responses are cut at" in said


def read_one(folder, record):
    return Pairs(read(folder, record, log=len))[0]


FOREIGN = [
    "<ImageHere>",
    "<image_0>",
    "<image-placeholder>",
    "<|image_1|>",
    "<|image|>",
    "<|image_pad|>",
    "<start_of_image>",
    "<IMAGE>",
    "[IMG]",
    "<img>a.jpg</img>",
    "<|im_start|>",
    "<|vision_start|>",
]


@pytest.mark.parametrize("mark", [*FOREIGN, "<image 1>"])
def test_marks_of_other_tools_in_a_question_are_bad(folder, mark):
    """They would be trained on as text, beside an image that stands elsewhere."""
    assert f"'prompt' holds {mark!r}" in refusal(folder, authors(prompt=f"{mark}\nWhat is it?"))


@pytest.mark.parametrize(
    "code", ["a<image_size>2", "vector<image_t> v;", "x <| f |> y", "<img src=a>", "[img]"]
)
def test_code_in_a_question_is_no_image_mark(folder, code):
    """Questions about code are data, too."""
    assert len(read(folder, authors(prompt=f"What does {code} do?", chosen="[IMG] <IMAGE>"))) == 1


def test_control_tokens_of_the_model_are_bad_but_think_tags_and_an_end_inside_a_response_are_not(
    folder, qwen, llava
):
    """A text that went through a chat template already would hold a turn inside the turn."""
    for name in "prompt", "chosen", "rejected":
        record = authors(**{name: "<|vision_start|>What?"})
        assert f"'{name}' holds '<|vision_start|>'" in refusal(folder, record, processor=qwen)
    ended = authors(prompt="What?</s>")  # which has no form of an image mark
    assert "'prompt' holds '</s>'" in refusal(folder, ended, processor=train.load_processor(str(llava)))
    thinking, eos = copy.deepcopy(qwen), qwen.tokenizer.eos_token
    tags = [tokenizers.AddedToken(tag, special=True) for tag in ("<think>", "</think>")]
    thinking.tokenizer.add_tokens(tags, special_tokens=True)
    good = authors(prompt="What <think>?", chosen=f"<think>\nA guess.</think> Yes.{eos}", rejected="No.")
    for processor in qwen, thinking:
        assert len(read(folder, good, processor=processor)) == 1


ODD = {
    "'chosen' is 3, not text": authors(chosen=3),
    "'chosen' is NaN, not text": authors(chosen=math.nan),
    "'prompt' is {\"a\": 1}, not text": authors(prompt={"a": 1}),
    "'rejected' is [\"No.\", \"Never.\"], not text": authors(rejected=["No.", "Never."]),
    "an image is {\"bytes\": \"/9j/4AAQ\", \"path\": null}, not a path": authors(
        img_path={"bytes": "/9j/4AAQ", "path": None}),
    "has the fields image_id, chosen, rejected; needed are": {"image_id": 1, "chosen": ["A"], "rejected": ["B", "C"]},
    "has the fields conversations, image; needed are image, prompt, chosen": {"conversations": [], "image": "a.png"},
}  # fmt: skip


@pytest.mark.parametrize("reason", ODD)
def test_what_is_no_text_is_named_with_what_it_holds(folder, reason):
    """A message about slices or strings that must be indexed by integers helps nobody to mend a file."""
    line = refusal(folder, ODD[reason])
    assert reason in line and len(line) < 400


def test_control_characters_of_a_file_do_not_reach_the_terminal(folder):
    """They could clear the screen, or hide the line."""
    for changes in {"id": "\x1b[2J", "chosen": ""}, {"img_path": "\x1b[2J.png"}:
        assert refusal(folder, authors(**changes)).isprintable()


def test_a_field_that_is_empty_gives_way_to_one_that_is_not(folder):
    """Exports write "" for an image that is named in another field."""
    (example,) = read(folder, authors(img_path=None, image="", image_path="a.png"))
    assert example.images == (str(folder / "a.png"),)


def test_a_system_text_around_the_question_is_kept_where_the_model_was_tuned_with_one(
    folder, bunny, llava, qwen
):
    """LLaVA-1.5 was tuned with it, and its hub template does not add it. Elsewhere it would take the place of
    the model's own, and answers are asked for without it."""
    record, said = authors(), []
    for model in bunny, llava:
        processor = train.load_processor(str(model))
        (example,) = read(folder, record, processor=processor)
        assert example.question[0] == wrapped()
        text = row_text(processor, example.question)
        assert text.replace("<s>", "").lstrip().startswith(f"{train.BUNNY_SYSTEM} USER: ")
    # To Bunny, whose template writes it by itself, the same row.
    bunnys = train.load_processor(str(bunny))
    assert row_text(bunnys, example.question) == row_text(bunnys, example.question[1:])
    (example,) = read(folder, record, processor=qwen, log=said.append)
    assert [message["role"] for message in example.question] == ["user"]
    assert "left out 1 system texts around USER: ... ASSISTANT:" in said[0]
    other = authors(prompt="Be rude. USER: <image>\nWhat? ASSISTANT:")
    (example,) = read(folder, other, processor=train.load_processor(str(llava)))
    assert "Be rude. USER: <image>" in row_text(train.load_processor(str(llava)), example.question)


def test_a_system_message_is_written_once_or_the_record_is_bad(folder, qwen):
    """Some templates have no place for it, and drop it in silence."""
    noise(2).save(folder / "b.png")
    record = TURNS | {"images": ["a.png", "b.png"]}
    (example,) = read(folder, record, processor=qwen)
    assert row_text(qwen, example.question, 2).count("Be brief.") == 1
    for template in NO_SYSTEM, SYSTEM_TWICE:
        qwen.chat_template = template
        assert "no place for a system text" in refusal(folder, record, processor=qwen)
    qwen.chat_template = CHATML


def test_a_run_knows_the_system_text_of_its_data(folder, llava):
    """Answers are asked for with it: without, they would be to prompts that it never saw."""
    processor, model = train.load_processor(str(llava)), torch.nn.Linear(1, 1)
    args = train.parse_args(["--model", str(llava), "--data", str(folder / "x.json")])
    rude = authors(prompt="Be rude. USER: <image>\nWhat? ASSISTANT:")
    for records, system in (
        ([authors()] * 2, train.BUNNY_SYSTEM),
        ([authors(), rude], ""),
        ([authors(prompt="?")], ""),
    ):
        examples = read(folder, *records, processor=processor, log=len)
        assert train.identity(args, examples, model, mdpo.mdpo_loss)["system"] == system


def test_what_is_transparent_is_white(tmp_path):
    """Black ink on transparency, as formulas and charts have it, would become all black."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 20, 20))
    for name, saved in {"a.png": image, "la.png": image.convert("LA"), "b.webp": image}.items():
        saved.save(tmp_path / name, **({"lossless": True} if name == "b.webp" else {}))
        opened = open_image(tmp_path / name)
        assert (opened.getpixel((0, 0)), opened.getpixel((15, 15))) == ((255,) * 3, (0,) * 3), name
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (255,) * 3


def test_images_of_12_and_16_bits_and_of_floats_are_scaled_by_their_range(tmp_path):
    """Cut off at 255, or divided by 65,536, scans and depth maps would be all white or all black."""
    half = {"a.tif": ("I;16", 2048), "b.png": ("I;16", 32768), "c.tif": ("F", 0.5), "d.tif": ("I;16B", 32768)}
    for name, (mode, level) in half.items():
        image = Image.new("F", (8, 8), 0.0) if mode == "F" else Image.new(mode, (8, 8))
        for x in range(8):
            image.putpixel((x, 0), 2 * level - 1 if mode != "F" else 1.0)
            image.putpixel((x, 1), level)
        image.save(tmp_path / name)
        levels = [open_image(tmp_path / name).getpixel((0, y))[0] for y in range(3)]
        assert levels == pytest.approx([255, 128, 0], abs=1), name
    depth = Image.new("F", (8, 8), -4.0)
    depth.putpixel((0, 0), 4.0)
    depth.putpixel((0, 1), 0.0)
    depth.save(tmp_path / "e.tif")
    levels = [open_image(tmp_path / "e.tif").getpixel((0, y))[0] for y in range(3)]
    assert levels == pytest.approx([255, 128, 0], abs=1)


def test_postscript_is_no_picture(tmp_path):
    """It is a program, and Pillow would start Ghostscript to run it."""
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(BadInput, match="x.png cannot be decoded: EPS is none of"):
        open_image(tmp_path / "x.png")


def test_max_pixels_scales_large_images_down_before_all_else(tmp_path, folder, bunny):
    """A phone's photograph takes 15,000 tokens on models that see each pixel."""
    noise(1, (400, 100)).save(tmp_path / "wide.png")
    image = open_image(tmp_path / "wide.png", 10_000)
    assert image.size == (200, 50) and open_image(tmp_path / "wide.png", 40_000).size == (400, 100)
    pairs = Pairs([Example("q", "a", "b", (str(tmp_path / "wide.png"),))], max_pixels=10_000)
    assert (pairs[0].images[0].size, pairs[0].images_rejected[0].size) == ((200, 50), (200, 50))
    assert (
        pairs[0].images_rejected[0].tobytes() == Pairs.__getitem__(pairs, (0, 0)).images_rejected[0].tobytes()
    )


def test_max_pixels_is_of_the_check_and_of_all_pairs(folder, qwen):
    """A prompt that fits would be refused, or images of another size than the checked ones be trained on."""
    for name in "ab":
        noise(ord(name), (320, 320)).save(folder / f"{name}.png")
    path = write(folder / "x.json", [authors(img_path="a.png"), authors(img_path="b.png")])
    argv = ["--model", "M", "--data", path, "--eval-size", "1", "--max-length", "30"]
    with pytest.raises(BadInput, match="no room for a response"):
        train.read_pairs(train.parse_args(argv), qwen)
    for pairs in train.read_pairs(train.parse_args([*argv, "--max-pixels", "784"]), qwen):
        assert pairs[0].images[0].size == pairs[0].images_rejected[0].size == (28, 28)


def test_the_longest_prompt_of_a_pair_may_be_the_rejected_images(folder, qwen):
    """The run would stop hours in, at the batch that holds it."""
    noise(3, (320, 320)).save(folder / "b.png")
    record = authors(rejected_image="b.png", chosen="Yes.", rejected="No.")
    pairs = Pairs(read(folder, record, processor=qwen, log=len))
    starts = (make_batch([pairs[0]], qwen).labels >= 0).int().argmax(1).tolist()
    assert starts[0] == starts[1] < starts[2]
    assert "no room" in refusal(folder, record, processor=qwen, max_length=starts[2])
    assert len(read(folder, record, processor=qwen, max_length=starts[2] + 4)) == 1


def test_the_check_processes_one_image_of_each_size(folder, bunny, monkeypatch):
    """Resizing pixels that nobody looks at took most of the check's time, minutes for 10,000 records."""
    processor, calls = train.load_processor(str(bunny)), []
    call = type(processor.image_processor).__call__
    spy = lambda self, *args, **options: calls.append(1) or call(self, *args, **options)
    monkeypatch.setattr(type(processor.image_processor), "__call__", spy)
    noise(3, (90, 20)).save(folder / "b.png")
    records = [authors(id=i, img_path=("a.png", "b.png")[i % 2], rejected_image="merged_images/llava-1.jpg")
               for i in range(20)]  # fmt: skip
    assert len(read(folder, *records, processor=processor)) == 20 and len(calls) <= 4


def test_held_out_examples_share_no_image_with_training(folder):
    """Four questions about one image, one of them held out, measure memory. Images link examples, own rejected ones
    too: here 0-1-2 by a and b, 3-4 by the rejected image d, 5 alone."""
    images = {0: ("a",), 1: ("a", "b"), 2: ("b",), 3: ("c",), 4: ("e",), 5: ("f",)}
    own = {3: ("d",), 4: ("d",)}
    examples = [Example("q", "y", "n", images[i], own.get(i, ()), id=str(i)) for i in range(6)]
    groups = [{"0", "1", "2"}, {"3", "4"}, {"5"}]
    seen = set()
    for seed in range(30):
        for n in range(6):
            try:
                training, held_out = train.hold_out(examples, n, seed)
            except BadInput as error:
                assert "leaves none of 6" in str(error) and n > 2
                continue
            trained, held = ({example.id for example in some} for some in (training, held_out))
            assert trained | held == {*"012345"} and not trained & held and len(held) >= n
            assert all(group <= held or not group & held for group in groups)
            smallest = min(len(held - group) for group in groups if group <= held) if held else 0
            assert smallest < n or n == 0  # no group more than it takes
            seen.add((n, frozenset(held)))
    assert len({held for n, held in seen if n == 1}) == 3  # any group, by the seed


def test_random_rejected_images_of_training_are_none_of_the_held_out(bunny, folder):
    """Held-out images would be trained on."""
    for i in range(8):
        noise(i + 10).save(folder / f"{i}.png")
    path = write(folder / "x.json", [authors(img_path=f"{i}.png") for i in range(8)])
    args = train.parse_args(["--model", str(bunny), "--data", path, "--eval-size", "3", "--reject", "random"])
    pairs, held_out = train.read_pairs(args, train.load_processor(str(bunny)))
    assert not {*pairs.pool} & {image for example in held_out.examples for image in example.images}
    assert len(pairs.pool) == 5 and len(held_out.pool) == 8


def test_flags_that_do_nothing_are_refused(bunny, folder, capsys):
    """A user who gives one believes that it works."""
    noise(2).save(folder / "b.png")
    path = write(folder / "x.json", [authors(rejected_image="b.png")] * 3)
    status = train.main(command(bunny, path, folder / "out", "--reject", "moco"))
    assert "--reject moco does nothing: every record has rejected images" in one_line_of(capsys, status)
    path = write(folder / "x.json", [authors(rejected_image="b.png"), authors()])
    args = train.parse_args(["--model", str(bunny), "--data", path, "--reject", "moco"])
    assert len(train.read_pairs(args, train.load_processor(str(bunny)))[0]) == 2


def test_a_cpu_trains_a_large_model_only_if_it_is_asked_to(bunny, folder, capsys, monkeypatch):
    """Under an old driver torch sees no GPU: a 3B model would train for weeks, and say nothing."""
    argv = [word for word in command(bunny, write(folder / "x.json", [authors()] * 4), folder / "out")]
    at = argv.index("--device")
    monkeypatch.setattr(torch.nn.Module, "num_parameters", lambda self: 501_000_000, raising=False)
    monkeypatch.setattr(train.transformers.PreTrainedModel, "num_parameters", lambda self: 501_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in one_line_of(capsys, train.main(argv[:at] + argv[at + 2 :]))
    assert train.main([*argv, "--epochs", "1"]) == 0


def test_torchrun_of_train_py_is_refused(bunny, folder, capsys, monkeypatch):
    """Each process would train the same run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    status = train.main(command(bunny, write(folder / "x.json", [authors()]), folder / "out"))
    assert "torchrun examples/trl_mdpo.py" in one_line_of(capsys, status)


B2 = torch.zeros(2)


MISUSED = {
    "a list of pairs with open images": lambda p, e, m: make_batch(e, p),
    "a list of pairs with open images: ": lambda p, e, m: make_batch(Pairs(e)[0], p),
    "unknown layout 'padded'": lambda p, e, m: train.choose_layout(m, p, [Pairs(e)[0]], "padded"),
    "unknown strategy 'blur'": lambda p, e, m: Pairs(e, "blur"),
    "must be a LogPs or a tuple of its tensors": lambda p, e, m: mdpo.mdpo_loss(B2, (B2, B2, B2)),
    "needs a model with an adapter, or ref_model": lambda p, e, m: mdpo.mdpo_step(
        m, make_batch([Pairs(e)[0]], p)
    ),
}


@pytest.mark.parametrize("sentence", MISUSED)
def test_a_wrong_argument_is_one_sentence_that_says_what_is_wanted(bunny, folder, sentence):
    """A library's error from five calls below says nothing to who copies a function."""
    model, processor = train.load_model(str(bunny))
    with pytest.raises(ValueError, match=re.escape(sentence.rstrip(": "))):
        MISUSED[sentence](processor, read(folder, authors(), log=len), model)


def test_one_index_is_of_epoch_0(folder):
    pairs = Pairs(read(folder, authors(), authors(id="b"), log=len))
    assert pairs[1] == pairs[0, 1] and pairs[1].key == (0, 1)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_image_tokens_of_each_family_in_a_text_are_bad(name, folder, tmp_path):
    """They would be taken for an image, or for a video, and stop the run."""
    processor = train.load_processor(str(families.write_family(name, tmp_path / "model")))
    parts = itertools.product((processor, processor.tokenizer), ("image", "boi", "video"))
    tokens = {getattr(part, f"{kind}_token", None) for part, kind in parts} - {None}
    assert processor.image_token in tokens
    for token in tokens:
        for field in "prompt", "chosen":
            record = authors(prompt="What?") | {field: f"Is {token}{token} it?"}
            if field != "prompt" or token != "<image>":  # which stands for images there
                assert f"'{field}' holds" in refusal(folder, record, processor=processor)


def without_patch_size(folder, to):
    shutil.copytree(folder, to)
    config = json.loads((to / "processor_config.json").read_text())
    write(to / "processor_config.json", config | {"patch_size": None})
    return to


def text_file(folder, name, content):
    folder.mkdir()
    write(folder / name, content)
    return folder


MODELS = {  # what the line must say: a folder, given that of a LLaVA and a new one
    "is an adapter: merge it first, by python examples/merge.py": lambda m, t: text_file(
        t, "adapter_config.json", {"peft_type": "LORA"}),
    "needs code of its own, which is not run here": lambda m, t: text_file(
        t, "config.json", {"model_type": "weird_vl", "auto_map": {"AutoConfig": "conf.W"}}),
    "its processor has no patch_size": without_patch_size,
}  # fmt: skip


@pytest.mark.parametrize("reason", MODELS)
def test_models_that_cannot_be_used_are_named_with_what_to_do(reason, llava, tmp_path):
    """The library speaks of missing keys, of an argument that does not exist here, or of NoneType."""
    with pytest.raises(BadInput, match=reason):
        train.load_processor(str(MODELS[reason](llava, tmp_path / "model")))


def test_code_of_a_model_that_the_library_knows_is_not_needed(llava, tmp_path):
    """Many folders of the hub still name the code that they came with."""
    shutil.copytree(llava, tmp_path / "model")
    config = json.loads((llava / "config.json").read_text())
    write(tmp_path / "model" / "config.json", config | {"auto_map": {"AutoConfig": "conf.W"}})
    assert train.load_processor(str(tmp_path / "model")).image_token == "<image>"


class Labelling:
    """A processor that returns labels, as PaliGemma's does."""

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, **options):
        encoded = self.processor(**options)
        return encoded | {"labels": encoded["input_ids"]}


def test_a_processor_that_returns_labels_is_refused(llava):
    """They would reach the model, which would compute a loss of its own."""
    with pytest.raises(BadInput, match="its processor returns labels"):
        make_batch(
            [pair("Which?", "No.", "Yes.", noise(1), noise(2))], Labelling(train.load_processor(str(llava)))
        )


def test_a_tokenizer_that_adds_an_end_is_refused(llava):
    """Two ends would be scored, the second after the answer is over."""
    processor = train.load_processor(str(llava))
    processor.tokenizer.add_eos_token = True
    with pytest.raises(BadInput, match="adds an end-of-sequence"):
        make_batch([pair("Which?", "No.", "Yes.", noise(1), noise(2))], processor)


def test_no_record_writes_to_the_terminal(folder, capsys):
    """ESC in a name clears the screen or moves what was said: an error that nobody sees."""
    record = authors(id="\x1b[2J", img_path="\x1b[31m\x07.png")
    path = write(folder / "x.json", [record])
    assert data.run_command(data.check_file, [path]) == 2
    said = "".join(capsys.readouterr())
    assert "x1b[2J" in said and "x1b[31m" in said
    assert "\x1b" not in said and "\x07" not in said


def test_an_id_of_0_is_an_id(folder):
    """The first record of a file that counts from 0 would have the name of the second."""
    examples = read(folder, authors(id=1), authors(id=0), authors())
    assert [example.id for example in examples] == ["1", "0", "3"]


def test_a_question_about_the_template_is_whole(folder):
    """Cut at the last USER:, most of it would become system text, which some models drop."""
    question = "Who speaks after USER: here?"
    (example,) = read(folder, authors(prompt=f"Be brief. USER: <image>\n{question} ASSISTANT:"))
    assert data.texts_of(example.question) == ["Be brief.", question]


def test_a_conversation_as_long_as_the_prompt_does_not_replace_it(folder):
    """The prompt is what is asked; only a longer conversation says more than it."""
    say = lambda role, text: {"role": role, "content": text}
    answers = {name: [say("user", "Hi."), say("assistant", name)] for name in ("chosen", "rejected")}
    (example,) = read(folder, authors(prompt=[say("user", "What is it?")]) | answers)
    assert data.texts_of(example.question) == ["What is it?"] and example.chosen == "chosen"


@pytest.mark.parametrize(
    "width, reason", [(10_000, "truncated|broken"), (10_001, "more than 100 million pixels")]
)
def test_images_of_more_than_100_million_pixels_are_bad(tmp_path, width, reason):
    """They would take minutes and gigabytes; but a limit that is off by ten drops a phone's photographs. The
    files say that they are 10,000 pixels high, and hold none."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, 10_000, 8, 0, 0, 0, 0), b"IDAT" + b"x\x9c"]
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(BadInput, match=reason):
        open_image(tmp_path / "x.png")


def wrapped(text=train.BUNNY_SYSTEM):
    """The system text of a USER: ... ASSISTANT: wrapper, as `read_examples` gives it."""
    return {"role": "system", "content": [{"type": "text", "text": text}], "wrapped": True}


@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT])
@pytest.mark.parametrize(
    "name, form", [("x.json", "[{}]"), ("x.jsonl", "{}\n"), ("x.json", "\n{}\n"), ("x.jsonl", "\n [{}]")]
)
def test_every_format_gives_the_same_example(folder, record, name, form):
    """Formats are told apart by the records, not by the file's name."""
    (example,) = read_examples(write(folder / name, form.replace("{}", json.dumps(record))))
    question = [wrapped(), *asked("What is it?")] if "img_path" in record else asked("What is it?")
    assert example[:3] == (question, "A cat.", "A dog.")
    assert Path(example.images[0]).name == ("llava-1.jpg" if "completions" in record else "a.png")


def test_ties_and_unrated_records_are_left_out_and_counted(folder):
    """A pair of equal ratings says nothing; training on it is noise."""
    tie = VLFEEDBACK | {"completions": [completion("A", "3", "3", "3"), completion("B", "4", "3", "2")]}
    unrated = VLFEEDBACK | {"completions": [completion("A", "N/A", "3", "3")]}
    path = write(folder / "x.jsonl", "\n".join(map(json.dumps, [VLFEEDBACK, tie, unrated])))
    said = []
    assert len(read_examples(path, log=said.append)) == 1 and "left out 2" in said[0]


def pair_of(folder, *completions):
    """(chosen, rejected) of one VLFeedback record with these completions."""
    (example,) = read_examples(write(folder / "x.json", [VLFEEDBACK | {"completions": list(completions)}]))
    return example.chosen, example.rejected


def test_vlfeedback_pairs_the_highest_mean_rating_with_the_lowest(folder):
    """Medians, sums, single aspects or ratings compared as text would take other responses, in silence."""
    rated = [
        completion("highest aspect, highest median", "5", "5", "1"),  # mean 3.67
        completion("highest sum", "4", "4", "4"),
        completion("lowest mean", "3", "3", "1"),
        completion("lowest median", "2", "2", "4"),  # mean 2.67
        completion("highest mean", " 4.5 "),
        completion("as high, but later", 4.5),
    ]
    assert pair_of(folder, *rated) == ("highest mean", "lowest mean")
    assert pair_of(folder, *rated[::-1]) == ("as high, but later", "lowest mean")
    assert pair_of(folder, completion("nine", "9"), completion("ten", "10")) == ("ten", "nine")


@pytest.mark.parametrize(
    "rating",
    ["N/A", "nan", float("nan"), "inf", "-1", "true", "True", True, None, "1_0", "", "4 stars", "1e1"],
)
def test_vlfeedback_completion_with_one_aspect_unrated_is_left_out_whole(folder, rating):
    """Its mean over the other aspects would be compared with means over all. What float() takes is no rating
    yet."""
    unrated = [
        completion("X", rating, "5", "5"),
        completion("Y", "1", rating, "1"),
        completion("Z", "0", "0", rating),
    ]
    rated = [completion("best", "4", "4", "4"), completion("worst", "2", "2", "2"), completion("no aspect")]
    assert pair_of(folder, *unrated, *rated) == pair_of(folder, *rated, *unrated) == ("best", "worst")


def test_vlfeedback_citation_marks_alone_are_taken_out(folder):
    """The model would learn to write them; but brackets are text in Chinese."""
    marked = completion("A【6†source】 cat【7†a】 on 【a】 mat【8†b】.", "5")
    assert pair_of(folder, marked, completion("【1†x】A dog", "1")) == ("A cat on 【a】 mat.", "A dog")


def replaced(value, new):
    """Every copy of a JSON value in which one part, at any depth, is `new`."""
    yield new
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            for changed in replaced(value[key], new):
                changed_value = copy.copy(value)
                changed_value[key] = changed
                yield changed_value


@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES, NO_PROMPT, TURNS])
@pytest.mark.parametrize("odd", [None, 3, True, "", "a\0", [], {}, [[None]]], ids=repr)
def test_odd_json_is_bad_or_good_never_a_crash(folder, record, odd):
    """A crash names no record, and --skip-bad cannot drop what crashes."""
    records = [*replaced(record, odd)]
    path = write(folder / "x.json", [*records, authors(id="last")])
    assert read_examples(path, skip_bad=True, log=lambda text: None)[-1].id == "last"


def test_an_image_is_looked_for_in_the_folder_then_in_merged_images(folder):
    """Another order takes another image of the same name, in silence."""
    read = lambda image_dir=None, **changes: read_examples(
        write(folder / "x.json", [VLFEEDBACK | changes]), image_dir=image_dir
    )
    found = lambda **options: read(**options)[0].images[0]
    here, merged = folder / "llava-1.jpg", folder / "merged_images" / "llava-1.jpg"
    assert found() == found(image="llava-1.jpg") == str(merged)
    noise(3).save(here)
    assert found() == found(images=["llava-1.jpg"]) == str(here)
    assert found(img_path="a.png") == found(image={"path": "a.png"}) == str(folder / "a.png")
    for image in (str(merged), "llava-1.jpg", None):
        assert found(image=image, image_dir=folder / "merged_images") == str(merged)
    assert found(image=str(merged)) == str(merged)
    noise(4).save(folder / "..b.png")
    assert found(image="..b.png") == str(folder / "..b.png")
    assert Path(found(image="merged_images/../a.png")).samefile(folder / "a.png")
    for image in ("../a.png", "merged_images/../../a.png", "x/../../a.png"):
        noise(5).save(folder.parent / "a.png")
        with pytest.raises(BadInput, match="points outside the image folder"):
            read(image=image)
    with pytest.raises(BadInput, match="no image 'merged_images'"):
        read(image="merged_images")
    with pytest.raises(BadInput, match="none: no such image folder"):
        read(image_dir=folder / "none")


def test_a_field_of_null_is_not_there(folder):
    """Exports write null for what a record lacks; `prompt` comes before `question`, `img_path` before the
    others."""
    record = authors(img_path=None, image="a.png", question="And this?")
    (example,) = read_examples(write(folder / "x.json", [record | {"images": ["b.png"]} | {"images": None}]))
    assert example.question[1:] == asked("What is it?") and Path(example.images[0]).name == "a.png"
    record = authors(image="b.png", images="c.png", image_path="d.png", prompt=None, question="And this?")
    (example,) = read_examples(write(folder / "x.json", [record]))
    assert example.question == asked("And this?") and Path(example.images[0]).name == "a.png"


@pytest.mark.parametrize(
    "prompt",
    [
        "What?\nAnd why?",
        "<image>\nWhat?\nAnd why?",
        "What?\nAnd why? <image>",
        " USER: <image>\nWhat?\nAnd why? ASSISTANT:",
        f"{train.BUNNY_SYSTEM} USER: What?\nAnd why?\n<image> ASSISTANT: ",
    ],
)
def test_the_bare_question_is_taken_out_of_its_prompt(folder, prompt):
    """What is left of a template, or of an image mark, would stand in the text that the model is trained
    on."""
    (example,) = read_examples(write(folder / "x.json", [authors(prompt=prompt)]))
    system = [wrapped()] if prompt.startswith("A chat") else []
    assert example.question == [*system, *asked("What?\nAnd why?")]


def test_messages_keep_their_parts_and_their_order(folder):
    """What is dropped or moved changes the prompt. `<image>` in a text is an image part before it, as in a plain
    string; between two texts one is moved before them, as LLaVA's code does, and several stay."""
    image, text = {"type": "image"}, lambda text: {"type": "text", "text": text}
    read = lambda *messages, **changes: read_examples(
        write(folder / "x.json", [MESSAGES | {"prompt": list(messages)} | changes])
    )[0]
    user = lambda *content: {"role": "user", "content": list(content)}
    for content in ([image, text("What?")], [text("What?"), image], [image, text(" What?\n"), text("Why?")]):
        assert read(user(*content)).question == [user(*content)]
    for written in (
        [text("<image>\nWhat?")],
        [text("What? <image>")],
        [text("What?")],
        "<image> What?",
        "What?\n",
    ):
        assert read({"role": "user", "content": written}).question == [user(image, text("What?"))]
    assert read(user(text("Is <image>it?"))).question == [user(image, text("Is it?"))]
    two = read(user(text("1: <image>\n2: <image>\nWhich?")), images=["a.png", "merged_images/llava-1.jpg"])
    assert two.question == [user(text("1: "), image, text("\n2: "), image, text("\nWhich?"))]
    # Where no message shows an image, the first of the user's opens with all of them.
    opening = [{"role": "system", "content": [text("Be brief.")]}, user(text("What?"))]
    more = [{"role": "assistant", "content": [text("A cat.")]}, user(text("And?"))]
    shown = read(*opening, *more, images=["a.png", "merged_images/llava-1.jpg"])
    assert shown.question == [opening[0], user(image, image, text("What?")), *more] and len(shown.images) == 2
    answer = [{"role": "assistant", "content": [text("One."), text("Two.")]}]
    assert read(user(text("What?")), chosen=answer).chosen == "One.\nTwo."


def test_no_image_needs_no_images_and_no_pool(folder):
    """DPO (No Image) of Fig. 1 must run without the images, with any strategy; `<image>` in the prompt is
    left out."""
    records = [
        authors(img_path=None),
        authors(img_path="none.png", prompt="<image>\n<image>\nWhat is it?"),
        NO_PROMPT,
    ]
    examples = read_examples(write(folder / "x.json", records), with_images=False)
    for strategy in data.STRATEGIES:
        pairs = [Pairs(examples, strategy)[0, index] for index in range(3)]
        assert [one[1:6] for one in pairs] == [("A cat.", "A dog.", (), (), id) for id in ("1", "2", "3")]
        assert all(data.chat_messages(one.question, 0)[-1:] == asked("What is it?", 0) for one in pairs)


def test_lines_are_numbered_as_an_editor_does(folder):
    """A message that names another line sends the user to a good record. U+2028 is text in JSON; a BOM is
    not."""
    good = authors(question="a\u2028b", chosen="A\u2028cat.")
    lines = [
        "\ufeff" + json.dumps(good, ensure_ascii=False),
        "",
        "  ",
        json.dumps(good),
        "{",
        json.dumps(authors(chosen="")),
    ]
    path = folder / "x.jsonl"
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    said = []
    examples = read_examples(path, skip_bad=True, log=said.append)
    assert [(e.id, e.chosen) for e in examples] == [("1", "A\u2028cat."), ("4", "A\u2028cat.")]
    assert "record 5: not valid JSON" in said[0] and "record 6: 'chosen' is empty" in said[0]


UNREADABLE = {
    "x: no such file; for a data set of the hub, run python examples/convert.py": None,
    "x: cannot be read: is UTF-16: save it as UTF-8": b"\xff\xfe[",
    "x: cannot be read: not valid JSON": b"[{},",
    'x: cannot be read: begins with "a table\\\\nof text': b"a table\nof text\n",
    'x: cannot be read: begins with "<!DOCTYPE html>': b"<!DOCTYPE html><html>",
    "x: cannot be read: is a parquet file: python examples/convert.py": b"PAR1\x15\x04",
    "x: cannot be read: is a gzip file: unpack it": b"\x1f\x8b\x08",
    "x: cannot be read: is a zip file: unpack it": b"PK\x03\x04",
    "x: cannot be read: is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "x: cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 9": b'{"chose":\xe9"}',
    "x: cannot be read: is one JSON object with the fields data, split, not a list": b'{\n"data": [{}],\n"split": 1}',
    "x: no example is left$": b"[]",
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_unreadable_files_are_named(folder, reason):
    """A wrong path or a wrong file is the first mistake of all."""
    if UNREADABLE[reason] is not None:
        (folder / "x").write_bytes(UNREADABLE[reason])
    with pytest.raises(BadInput, match=reason):
        read_examples(folder / "x")


def test_a_report_of_bad_records_ends_after_20_and_counts_the_rest(folder):
    """A file with one wrong field has as many bad records as lines."""
    with pytest.raises(BadInput, match="23 bad records:") as error:
        read_examples(write(folder / "x.json", [authors(chosen="")] * 23))
    lines = str(error.value).split("\n")
    assert [line.split(":")[0].strip() for line in lines[1:21]] == [f"record {n}" for n in range(1, 21)]
    assert lines[21].strip() == "... and 3 more" and "--skip-bad" in lines[0] and len(lines) == 22


def test_a_broken_line_is_bad_whatever_the_subset(folder):
    """A record that cannot be read has no id: dropped as if it were of another subset, it would be lost in silence."""
    path = write(folder / "x.jsonl", json.dumps(VLFEEDBACK) + '\n{"id": "llava-2", "prom\n5\n')
    with pytest.raises(BadInput, match="record 2: not valid JSON: .*\n  record 3: is 5, not an object"):
        read_examples(path, subset="llava")


def test_subset_and_limit(folder):
    """The paper's data is a sample of 10K among ids that begin with llava; the sample is the seed's alone."""
    records = [
        VLFEEDBACK | {"id": f"{kind}-{i}", "img_path": "a.png"}
        for i in range(20)
        for kind in ("llava", "svit-llava")
    ]
    path = write(folder / "x.json", records)
    ids = [e.id for e in read_examples(path, subset="llava", limit=5, seed=1)]
    assert len(set(ids)) == 5 and all(id.startswith("llava") for id in ids)
    assert ids == [e.id for e in read_examples(path, subset="llava", limit=5, seed=1)]
    assert ids != [e.id for e in read_examples(path, subset="llava", limit=5, seed=2)]
    assert len(read_examples(path, limit=100)) == len(read_examples(path, limit=40)) == 40
    with pytest.raises(BadInput, match="no example is left with an id in 'vqa'"):
        read_examples(path, subset="vqa")
    (folder / "broken.png").write_bytes(b"")
    numbers = [authors(id=id, img_path="a.png" if id in (1, 12) else "none.png") for id in (1, 2, 12, 21)]
    assert [e.id for e in read_examples(write(folder / "y.json", numbers), subset="1")] == ["1", "12"]


def test_a_sample_is_even_and_in_the_files_order(folder):
    """A sample of the file's first records is a sample of one source. 200 samples of 2 of 6: each record is
    in 67 of them, give or take 3 standard deviations of 6.7."""
    path = write(folder / "x.json", [PLAIN | {"id": id} for id in "abcdef"])
    samples = ["".join(e.id for e in read_examples(path, limit=2, seed=seed)) for seed in range(200)]
    assert all(len(sample) == 2 and sample[0] < sample[1] for sample in samples)
    assert all(47 <= sum(id in sample for sample in samples) <= 87 for id in "abcdef")
    with pytest.raises(BadInput, match="no example is left"):
        read_examples(path, limit=0)


def test_images_folder_can_be_elsewhere(folder):
    """--images; an absolute path is taken as it is."""
    path = write(folder / "deep" / "x.json", [authors(), authors(img_path=str(folder / "a.png"))])
    assert len(read_examples(path, image_dir=folder)) == 2


def test_turns_of_conversations_are_not_lost_beside_a_prompt(folder):
    """The prompt is in the conversation once more; taken alone, it would be answered by the last turn's answer."""
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    turns = [
        user | {"content": "What?"},
        assistant | {"content": "A ring."},
        user | {"content": "Which colour?"},
    ]
    record = {"image": "a.png", "prompt": "What?"}
    record |= {name: [*turns, assistant | {"content": name}] for name in ("chosen", "rejected")}
    (one,) = read_examples(write(folder / "x.json", [record]))
    assert data.texts_of(one.question) == ["What?", "A ring.", "Which colour?"] and one.chosen == "chosen"
    system = [{"role": "system", "content": "Be brief."}]
    with_system = record | {"prompt": system + turns}  # says more than the conversation
    (one,) = read_examples(write(folder / "x.json", [with_system]))
    assert data.texts_of(one.question) == ["Be brief.", "What?", "A ring.", "Which colour?"]
    record |= {"prompt": turns[:1]} | {name: record[name][1:] for name in ("chosen", "rejected")}
    with pytest.raises(BadInput, match="user and assistant must take turns"):
        read_examples(write(folder / "x.json", [record]))


BAD_RECORDS = {
    "has the fields img_path, question, chosen, rejected; needed are image, prompt, chosen": {
        "img_path": "a.png",
        "question": "Q",
        "chosen": None,
        "rejected": "b",
    },
    "has the fields image, chosen, rejected; needed are image, prompt": {
        "image": "a.png",
        "chosen": "a",
        "rejected": "b",
    },
    "'chosen' is 3, not text": authors(chosen=3),
    "is [1], not an object with fields": [1],
    "'rejected' is empty": authors(rejected=" \n"),
    "'chosen': 'utf-8' codec can't encode character": authors(chosen="A \ud800 cat."),
    "'chosen' and 'rejected' are equal": authors(rejected="A cat. "),
    "no image 'b.png'": authors(img_path="b.png"),
    "cannot be decoded": authors(img_path="broken.png"),
    "has no image path": {"question": "Q", "chosen": "a", "rejected": "b"},
    "points outside the image folder": authors(img_path="../a.png"),
    "'chosen' holds '<image>', a control token": authors(chosen="An <image>"),
    "'prompt' holds '<image 1>', a control token": authors(prompt="Is <image 1> a picture?"),
    "shows 1 images, the record has 2": authors(img_path=None, images=["a.png", "a.png"]),
    "shows 2 images, the record has 1": TURNS | {"images": ["a.png"]},
    "must take turns": MESSAGES | {"prompt": [*MESSAGES["prompt"], *MESSAGES["prompt"]]},
    "'prompt': role \"tool\" is not system": MESSAGES | {"prompt": [{"role": "tool", "content": "S"}]},
    "'prompt': has no 'text'": MESSAGES | {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
    "'chosen' must end in an assistant message": MESSAGES
    | {"chosen": [{"role": "user", "content": "A cat."}]},
    "'rejected' must end in an assistant message": MESSAGES
    | {"rejected": [{"role": "assistant", "content": MESSAGES["prompt"][0]["content"]}]},
    "a message has no text": MESSAGES | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
    "differ before their last turn": {
        "image": "a.png",
        "chosen": [*MESSAGES["prompt"], *MESSAGES["chosen"]],
        "rejected": [{"role": "user", "content": "Who is it?"}, *MESSAGES["rejected"]],
    },
    "has no 'annotations'": VLFEEDBACK | {"completions": [{"response": "x"}]},
    "not valid JSON": None,
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_bad_records_are_all_reported_with_number_id_and_reason(folder, reason):
    """One bad record stops the run before the model is loaded, and says which; --skip-bad drops it and says how many."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    bad = json.dumps(BAD_RECORDS[reason]) if BAD_RECORDS[reason] else "{"
    path = write(folder / "x.jsonl", f"{json.dumps(authors(id='first'))}\n{bad}\n{bad}\n")
    with pytest.raises(
        BadInput, match="(?s)x.jsonl: --skip-bad would drop 2 bad.*record 2.*record 3"
    ) as error:
        read_examples(path)
    assert str(error.value).count(reason) == 2
    said = []
    assert [e.id for e in read_examples(path, skip_bad=True, log=said.append)] == ["first"]
    assert "dropped 2 bad records" in said[0]


def test_the_models_own_image_token_in_text_is_bad(folder, bunny):
    """Nine tabs are Bunny's image token: in a table of tabs they would be taken for an image."""
    path = write(folder / "x.json", [authors(chosen="a" + "\t" * 9 + "b")])
    with pytest.raises(BadInput, match=r"'chosen' holds '(\\t){9}', a control token"):
        read_examples(path, processor=train.load_processor(str(bunny)))


def test_the_check_of_the_room_counts_each_prompts_own_images(folder, loaded):
    """If it did not, the run would stop hours in, at the first batch with a long prompt. By the batch's own
    lengths."""
    _, processor = loaded
    noise(3, (20, 50)).save(folder / "b.png")
    two = authors(id="two", rejected="No.", img_path=None, images=["a.png", "b.png"], prompt="What?")
    path = write(
        folder / "x.json",
        [
            authors(id="one", rejected="No.", prompt="What?"),
            two,
            authors(id="other", rejected="No.", img_path="b.png"),
        ],
    )
    pairs = Pairs(read_examples(path))
    batches = [make_batch([pairs[i]], processor) for i in range(3)]
    prefixes = [prefix_length(batch) for batch in batches]
    alike = len(
        os.path.commonprefix([ids[prefixes[0] :].tolist() for ids in batches[0].labels[:2]])
    )  # a space
    needs = [prefix + alike + 1 for prefix in prefixes]
    assert len(set(needs)) == 3
    for max_length in {length + more for length in needs for more in (-1, 0)} - {min(needs) - 1}:
        options = {"processor": processor, "max_length": max_length, "skip_bad": True}
        good = [e.id for e in read_examples(path, **options, log=lambda text: None)]
        assert good == [id for id, n in zip(("one", "two", "other"), needs) if n <= max_length]
    with pytest.raises(BadInput, match="no example is left|prompt of|are equal in the tokens"):
        read_examples(path, processor=processor, max_length=min(needs) - 1)


MODES = {
    "palette": lambda im: im.convert("P"),
    "transparent palette": lambda im: im.convert("P"),
    "grey": lambda im: im.convert("L"),
    "grey alpha": lambda im: im.convert("LA"),
    "rgba": lambda im: im.convert("RGBA"),
    "one bit": lambda im: im.convert("1"),
    "cmyk": lambda im: im.convert("CMYK"),
    "16 bit": lambda im: Image.new("I;16", im.size, 40000),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    """Scraped images come in all of these; a wrong channel count kills the run hours in."""
    path = tmp_path / ("x.jpg" if mode == "cmyk" else "x.png")
    MODES[mode](noise(1)).save(path, **({"transparency": 0} if mode == "transparent palette" else {}))
    image = open_image(path)
    assert image.mode == "RGB" and image.size == (48, 32)
    is_grey = image.convert("L").convert("RGB").tobytes() == image.tobytes()
    assert is_grey == (mode in ("16 bit", "grey", "grey alpha", "one bit"))
    if mode == "16 bit":
        assert image.getpixel((0, 0)) == (156, 156, 156)  # 40000 / 256; clipped, it would be white


def test_exif_rotation_is_applied(tmp_path):
    """A phone's picture lies on its side otherwise."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    noise(1).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (32, 48)


def boxes_of(images, step=2):
    """The boxes (left, top, width, height) that parts of `gradient` were cut from; a width below 0 is a
    mirrored part.

    A line through red over the columns has the box's width over the whole's as its slope; its edges, which
    have no neighbour to be blended with, are left out."""
    found = []
    for line in (images[:, 0].mean(1), images[:, 1].mean(2)):
        n = line.shape[1]
        inside = torch.arange(n // 5, n - n // 5).double() + 0.5
        values = line[:, n // 5 : n - n // 5] / step + 0.5
        slope = ((inside - n / 2) * values).sum(1) / (inside - n / 2).square().sum()
        start = values.mean(1) - slope * n / 2
        found.append((torch.minimum(start, start + slope * n), slope * n))
    (left, width), (top, height) = found
    return left, top, width, height


def off_uniform(values, low=0.0, high=1.0):
    """Kolmogorov-Smirnov: how far values are from uniform in low..high, over sqrt(n). Below 1.63 in 99 of 100
    samples."""
    values = ((values.double() - low) / (high - low)).sort().values
    n = len(values)
    return (values - (torch.arange(n) + 0.5) / n).abs().max().item() * n**0.5


def is_share(flags, share):
    """Whether as many are true as a binomial has, give or take 3 standard deviations."""
    return abs(flags.double().sum() - len(flags) * share) < 3 * (len(flags) * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("low, high", [(None, None), (0.2, 0.5)])
def test_crop_is_uniform_in_area_and_place_and_log_uniform_in_aspect(tmp_path, low, high):
    """Table 3 rests on how much is kept, and the paper keeps up to 20%. 3/4 and 4/3 are as likely only in
    logarithms."""
    crops = drawn(tmp_path, gradient(125, 100), "crop", 1000, **({"crop": (low, high)} if low else {}))
    left, top, width, height = boxes_of(crops)
    low, high = low or 0.01, high or 0.2
    areas, aspects = width * height / 12500, width / height
    # A side is rounded to a whole pixel: of the smallest crop's 11, half a one is 4%.
    assert low * 0.9 < areas.min() < low * 1.1 and high * 0.98 < areas.max() < high * 1.02
    assert off_uniform(areas, low, high) < 1.63
    fine = areas > 0.05
    assert off_uniform(aspects[fine].log(), math.log(3 / 4), math.log(4 / 3)) < 1.63
    assert 0.65 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.5
    across, down = left / (125 - width), top / (100 - height)
    assert off_uniform(across) < 1.63 and off_uniform(down) < 1.63
    assert abs(torch.corrcoef(torch.stack([across, down]))[0, 1]) < 3 / 1000**0.5
    steps = crops[:, 0].diff(dim=2)[:, :, 30:-30]  # blended between pixels, a gradient has no steps of two
    assert (steps.amax((1, 2)) <= 1)[width < 50].all() and (crops[:, 2] == 77).all()


def test_crops_of_long_images_keep_the_area(tmp_path):
    """A panorama has no room for half its area at aspect 4/3: there the aspect gives way, not the area."""
    for size in ((250, 12), (12, 250)):
        crops = drawn(tmp_path, gradient(*size, step=1), "crop", 300, crop=(0.3, 0.5))
        left, top, width, height = boxes_of(crops, step=1)
        long = width if size[0] > size[1] else height
        assert 0.29 < long.min() / 250 < 0.31 and 0.49 < long.max() / 250 < 0.51
        assert off_uniform(long / 250, 0.3, 0.5) < 1.63


def test_a_crop_is_at_least_one_pixel(tmp_path):
    """A box without width is one colour, stretched: 1% of a thumbnail is less than a pixel."""
    crops = drawn(tmp_path, gradient(6, 6, step=40), "crop", 50, crop=(1e-4, 1e-3))
    spans = crops[:, :2].amax((2, 3)) - crops[:, :2].amin((2, 3))
    assert 10 < spans.min() and spans.max() <= 40  # from one pixel's middle towards the next


@pytest.mark.parametrize("strategy", data.STRATEGIES)
def test_rejected_image_is_a_pure_function_of_seed_epoch_and_index(tmp_path, strategy):
    """Resuming and DataLoader workers rest on it; a new epoch, a new seed and another index draw anew."""
    for number in range(30):
        noise(number, (24, 24)).save(tmp_path / f"{number}.png")
    path = write(tmp_path / "x.json", [authors(img_path=f"{number}.png") for number in range(30)])
    one, *others = read_examples(path)
    examples = [one] * 30 + others  # the same image at the first 30 indices
    draw = lambda seed, epoch, index: (
        Pairs(examples, strategy, seed=seed)[epoch, index].images_rejected[0].tobytes()
    )
    keys = [(s, e, i) for s in (0, 1, 11) for e in (0, 1, 11) for i in (0, 1, 11)]
    drawn_once = {key: draw(*key) for key in keys}
    random.seed(1)
    assert all(draw(*key) == drawn_once[key] for key in reversed(keys))
    # "random" has 29 images to choose from: 27 draws meet some of them twice.
    assert len({*drawn_once.values()}) == 27 if strategy != "random" else len({*drawn_once.values()}) > 12
    for changes in (
        ((s, 0, 0) for s in range(9)),
        ((0, e, 0) for e in range(9)),
        ((0, 0, i) for i in range(9)),
    ):
        assert len({draw(*key) for key in changes}) > 5
    *texts, (image,), (image_rejected,), _, key = Pairs(examples, strategy)[0, 0]
    assert key == (0, 0) and texts == [one.question, one.chosen, one.rejected]
    assert image.tobytes() == open_image(one.images[0]).tobytes() and image_rejected.size == image.size


@LAYOUTS
@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES])
def test_a_record_may_bring_its_own_rejected_image(folder, bunny, record, layout):
    """It takes the place of the strategy, in every format, and reaches the model as log pi(y_w | m_l, q)."""
    noise(9, (50, 20)).save(folder / "edited.png")
    _, processor = train.load_model(str(bunny))
    for field in ({"rejected_image": "edited.png"}, {"rejected_images": ["edited.png"]}):
        (own,) = read_examples(write(folder / "x.json", [record | field]), processor=processor)
        for strategy in data.STRATEGIES:
            one = Pairs([own], strategy)[3, 0]
            assert one.images_rejected[0].tobytes() == noise(9, (50, 20)).tobytes()
    model, seen = train.load_model(str(bunny))[0], []
    features = model.get_image_features

    def spy(pixel_values):
        seen.append(pixel_values)
        return features(pixel_values)

    model.get_image_features = spy
    mdpo.forward_inputs(model, laid_out([one], processor, layout))
    assert len(seen) == 1 and torch.equal(seen[0][-1:], pixels_of(processor, noise(9, (50, 20))))
    assert (
        Pairs(read_examples(write(folder / "x.json", [record])))[0, 0].images_rejected[0].size
        == one.images[0].size
    )


def test_threads_that_check_do_not_share_the_tokenizers_padding(folder, bunny):
    """To pad two prompts sets it for all threads: good records were bad at random."""
    noise(2).save(folder / "b.png")
    records = [
        authors(rejected_image="b.png"),
        authors(chosen="A cat and a dog."),
        authors(chosen="Yes."),
    ] * 40
    processor = train.load_processor(str(bunny))
    assert len(read_examples(write(folder / "x.json", records), processor=processor)) == 120


def test_a_rejected_image_that_is_the_image_is_bad(folder):
    """CoPO would compare a log-probability with itself: loss/conditional is ln 2 for ever."""
    shutil.copy(folder / "a.png", folder / "copy.png")
    for own in ("a.png", "copy.png"):
        with pytest.raises(BadInput, match="record 1: the rejected image is the image"):
            read_examples(write(folder / "x.json", [authors(rejected_image=own)]))


def test_own_rejected_images_are_checked_as_any_image(folder, bunny, capsys):
    """One that is missing, broken, too large for the prompt or one too few stops the run before it starts."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    wrong = {
        "no.png": "no image 'no.png'",
        "broken.png": "broken.png cannot be decoded",
        "../a.png": "points outside",
    }
    for path, message in wrong.items():
        with pytest.raises(BadInput, match=message):
            read_examples(write(folder / "x.json", [authors(rejected_image=path)]))
    with pytest.raises(BadInput, match="has 1 images and 2 rejected images"):
        read_examples(write(folder / "x.json", [authors(rejected_images=["a.png", "a.png"])]))
    noise(2).save(folder / "b.png")
    path = write(folder / "x.json", [authors(rejected_image="b.png"), authors()])
    assert check_file([path]) == 0 and "1 examples have their own rejected images" in capsys.readouterr().out
    (one, _) = read_examples(
        write(folder / "x.json", [authors(rejected_image="no.png"), authors()]), with_images=False
    )
    assert one.images_rejected == ()  # DPO (No Image) needs none


def test_rejected_images_are_the_same_in_another_process(tmp_path):
    """A resumed run is another process: what hangs on Python's own hash would differ in it."""
    examples = as_examples(tmp_path)
    script = (
        "import zlib; from data import *; examples = read_examples(r'%s', log=len)\n"
        "print(*(zlib.crc32(Pairs(examples, s)[3, 2].images_rejected[0].tobytes()) for s in ('crop', 'random', 'moco')))"
    ) % (tmp_path / "drawn" / "silkie.json")
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    here = [
        zlib.crc32(Pairs(examples, s)[3, 2].images_rejected[0].tobytes()) for s in ("crop", "random", "moco")
    ]
    assert child.stdout.split() == [str(checksum) for checksum in here], child.stderr


def test_random_image_is_another_file_whatever_its_path(tmp_path, monkeypatch):
    """Training and held-out data may name one folder in two ways: the image itself would be the rejected one."""
    path = shapes.write_pairs(tmp_path / "drawn", 3)
    monkeypatch.chdir(tmp_path)
    both = read_examples("drawn/silkie.json") + read_examples(str(path))
    assert len({*Pairs(both, "random").pool}) == 3


def test_an_unknown_strategy_is_refused(tmp_path):
    """A misspelled one must not train on the image itself."""
    with pytest.raises(BadInput, match="unknown strategy 'crops': choose from crop, random, moco"):
        Pairs(as_examples(tmp_path), "crops")[0, 0]


COLOURS = {
    "a": (255, 0, 0),
    "b": (0, 255, 0),
    "c": (0, 0, 255),
    "d": (255, 255, 0),
    "e": (255, 0, 255),
    "f": (9, 9, 9),
}


def coloured(folder, *images):
    """Examples with these images: names in COLOURS, or several of them in one example."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    names = [[f"{name}.png" for name in image] for image in images]
    return read_examples(write(folder / "x.json", [authors(img_path=n, prompt="What?") for n in names]))


def test_random_image_is_any_other_and_each_as_likely(tmp_path):
    """Table 3's row. The same file may serve several questions: it is one image for all that, and never its
    own."""
    examples = coloured(tmp_path, "a", "a", "a", "b", "b", "b", "b", "b", "c", "d")
    pairs = Pairs(examples, "random")
    seen = [pairs[epoch, 1].images_rejected[0].getpixel((4, 4)) for epoch in range(600)]
    assert set(seen) == {COLOURS[name] for name in "bcd"}
    assert all(is_share(torch.tensor([s == colour for s in seen]), 1 / 3) for colour in set(seen))
    with pytest.raises(BadInput, match="more different images"):
        Pairs(examples[:3], "random")
    with pytest.raises(BadInput, match="more different images"):
        Pairs(coloured(tmp_path, "a", "b", "ab"), "random")


def test_random_image_is_none_of_the_examples_own_and_of_the_pool(tmp_path):
    """Held-out examples take their images from the training data; another image of the same example is no
    other image."""
    examples = coloured(tmp_path, "ab", "c", "d", "e")
    pairs = Pairs(examples, "random")
    seen = [
        tuple(image.getpixel((4, 4)) for image in pairs[epoch, 0].images_rejected) for epoch in range(200)
    ]
    assert {s for both in seen for s in both} == {COLOURS[name] for name in "cde"}
    assert len(set(seen)) == 9  # each of the two is drawn for itself
    pooled = Pairs(examples[1:2], "random", pool=[*coloured(tmp_path, "cf", "d")])
    assert {pooled[epoch, 0].images_rejected[0].getpixel((4, 4)) for epoch in range(50)} == {
        COLOURS["f"],
        COLOURS["d"],
    }


def test_random_image_is_centred_and_fitted_not_squashed(tmp_path):
    """A fifth at the left and at the right is red, the middle green: fitted into a square, all of it is
    green."""
    wide = Image.new("RGB", (80, 40), (255, 0, 0))
    wide.paste((0, 255, 0), (16, 0, 64, 40))
    wide.save(tmp_path / "wide.png")
    noise(1, (20, 20)).save(tmp_path / "a.png")
    examples = read_examples(write(tmp_path / "x.json", [authors(), authors(img_path="wide.png")]))
    rejected = Pairs(examples, "random")[0, 0].images_rejected[0]
    assert rejected.size == (20, 20) and rejected.getcolors() == [(400, (0, 255, 0))]


def test_moco_keeps_a_fifth_to_all_of_the_area_and_mirrors_half(tmp_path):
    """Measured on the draws that keep their colours: a fifth is without jitter, four fifths of these are not
    grey."""
    images = drawn(tmp_path, gradient(125, 100), "moco", 1000)
    left, top, width, height = boxes_of(images)
    plain = (images[:, 2] == 77).all(2).all(1)
    assert is_share(plain, 0.2 * 0.8)
    areas = (width * height).abs()[plain] / 12500
    assert areas.min() > 0.19 and areas.max() > 0.97 and off_uniform(areas, 0.2, 1) < 1.63
    small = plain & ((width * height).abs() < 0.4 * 12500)  # these have room for the whole range of aspects
    aspects = (width / height).abs()[small]
    assert off_uniform(aspects.log(), math.log(3 / 4), math.log(4 / 3)) < 1.63
    assert (height > 0).all() and is_share(width[plain] < 0, 0.5)


def test_moco_jitters_four_in_five_and_greys_one_in_five(tmp_path):
    """On one grey, only brightness shows: 0.6 to 1.4. On one colour, only a turn of the hue changes the hue:
    +-0.1."""
    grey = drawn(tmp_path, Image.new("RGB", (16, 16), (100, 100, 100)), "moco", 1500)[:, :, 8, 8]
    assert (grey[:, :1] == grey).all()
    changed = grey[grey[:, 0] != 100, 0] + 0.5
    assert is_share(grey[:, 0] != 100, 0.8 * 79 / 80)  # one in 80 brightens by less than one level
    assert off_uniform(changed, 60, 140) < 1.63

    rgb = drawn(tmp_path, Image.new("RGB", (16, 16), (120, 40, 40)), "moco", 1500)[:, :, 8, 8]
    is_grey = rgb.amax(1) == rgb.amin(1)
    assert is_share(is_grey, 0.2)
    rgb = rgb[~is_grey]
    jittered = (rgb != torch.tensor([120, 40, 40])).any(1)
    assert is_share(jittered, 0.8)
    hues = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] for colour in (rgb[jittered] / 255).tolist()])
    assert off_uniform((hues + 0.5) % 1 - 0.5, -0.1, 0.1) < 1.63


def test_moco_jitters_contrast_and_colour_as_much_as_brightness(tmp_path):
    """Bands of two greys tell the contrast, and how far a colour is from its grey tells contrast times
    colour. Spreads are over the mean, so that brightness drops out of them."""
    bands = Image.new("RGB", (64, 64), (50, 50, 50))
    for x in range(0, 64, 16):
        bands.paste((150, 150, 150), (x, 0, x + 8, 64))
    images = drawn(tmp_path, bands, "moco", 1000)[:, 0, 20:44]
    low, high = images.amin((1, 2)), images.amax((1, 2))
    share = (images.mean((1, 2)) - low) / (high - low)  # of the bright bands
    contrast = (high - low) / images.mean((1, 2)) / (100 / (50 + 100 * share))
    contrast = contrast[(low != 50) | (high != 150)]
    assert off_uniform(contrast, 0.6, 1.4) < 1.63
    assert 0.57 < contrast.min() < 0.63 and 1.37 < contrast.max() < 1.45

    rgb = drawn(tmp_path, Image.new("RGB", (16, 16), (120, 80, 80)), "moco", 1500)[:, :, 8, 8]
    luminance = rgb @ torch.tensor([0.299, 0.587, 0.114]).double()
    spread = (rgb.amax(1) - rgb.amin(1)) / luminance
    kept = (spread > 0) & (rgb != torch.tensor([120, 80, 80])).any(1)
    factor = spread[kept] / (40 / (0.299 * 120 + 0.701 * 80))
    # Factors uniform in 0.6..1.4 have a mean of 1 and a variance of 0.16 / 3; two: (1 + 0.16 / 3)^2 - 1 = 0.109.
    assert factor.mean() == pytest.approx(1, abs=0.04) and factor.var() == pytest.approx(0.109, abs=0.017)


def test_moco_jitters_in_any_order(tmp_path):
    """A fixed order never clips where another one does: bright bands, both orders of brightness and contrast
    are seen."""
    bands = Image.new("RGB", (64, 64), (120, 120, 120))
    for x in range(0, 64, 16):
        bands.paste((250, 250, 250), (x, 0, x + 8, 64))
    images = drawn(tmp_path, bands, "moco", 400)[:, 0, 20:44]
    low, high = images.amin((1, 2)), images.amax((1, 2))
    # Brightness first: dark bands stay below 1.4 * 120 = 168 if white is reached at last. Contrast first: the
    # ratio of the two is that of contrast alone, at least 0.6 of 130 over bands of mean 185, unless white is reached.
    assert ((low > 180) & (high == 255)).any()
    assert ((high < 250) & ((high - low) / (high + low) < 0.85 * 0.6 * 130 / 370)).any()


def test_moco_blurs_half_by_a_sigma_that_scales_with_the_image(tmp_path):
    """0.1 to 2 pixels of 224, so 0.15 to 3 where the shorter side is 336: measured by how wide an edge
    between two greys is."""
    bands = Image.new("RGB", (512, 336), (60, 60, 60))
    for x in range(0, 512, 128):
        bands.paste((140, 140, 140), (x, 0, x + 64, 336))
    lines = drawn(tmp_path, bands, "moco", 200)[:, 0, 168]
    sigmas = []
    for line in lines:
        steps = line.diff().abs()
        steps[steps < 0.5] = 0
        n, edges = len(steps), []
        for i in (
            (steps > 0).nonzero()[:, 0].tolist()
        ):  # an edge is 64 pixels from the next, and its steps are close
            if edges and i - edges[-1][-1] < 20:
                edges[-1].append(i)
            else:
                edges.append([i])
        middles, variances = [], []
        for edge in edges:
            if edge[0] >= 25 and edge[-1] <= n - 25:  # none that the image's border cuts
                weights, places = steps[edge], torch.tensor(edge).double()
                middles.append((weights * places).sum() / weights.sum())
                variances.append((weights * (places - middles[-1]).square()).sum() / weights.sum())
        scale = (middles[-1] - middles[0]) / (len(middles) - 1) / 64 if len(middles) > 1 else 1.5
        # What enlarging by `scale` does to an edge, and what reading it pixel by pixel does, is taken off.
        sigmas.append((sum(variances) / len(variances) - (scale**2 + 1) / 12).clamp(min=0).sqrt())
    sigmas = torch.stack(sigmas)
    blurred = sigmas > 0.8
    assert is_share(blurred, 0.5 * (3 - 0.8) / (3 - 0.15))
    assert off_uniform(sigmas[blurred], 0.8, 3) < 1.63 and 2.8 < sigmas.max() < 3.2


def test_full_memory_is_no_bad_record(folder, monkeypatch):
    """Dropped by --skip-bad, good records would be lost for want of memory."""
    monkeypatch.setattr(Image, "open", lambda path: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_examples(write(folder / "x.json", [authors()]), skip_bad=True)
    with pytest.raises(torch.OutOfMemoryError), data.about("the layout"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_data_command_counts_every_kind_of_record(folder, capsys):
    """`python data.py FILE` is how a user finds out before renting a GPU: its counts and its exit status."""
    tie = VLFEEDBACK | {"id": "llava-tie", "completions": [completion("A", "3"), completion("B", "3")]}
    kinds = [
        authors(id="llava-0", chosen="A cat."),  # 2 words
        authors(id="llava-2", chosen="A cat on a mat, asleep in the sun."),  # 9 words
        authors(id="llava-3", chosen="A cat asleep.", img_path="merged_images/llava-1.jpg"),  # 3 words
        authors(id="svit-0", chosen="Cat."),
        tie,
        *[authors(id=f"llava-bad-{i}", chosen="") for i in range(25)],
        authors(id="llava-no", img_path="none.png"),
        authors(id="llava-broken", img_path="broken.png"),
    ]
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    path = write(folder / "elsewhere" / "x.json", kinds)
    assert check_file([path, "--images", str(folder), "--subset", "llava"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}: --skip-bad would drop 27 bad records:\n")
    assert "record 6 (id llava-bad-0): 'chosen' is empty" in err and "... and 7 more" in err
    write(path_of := folder / "good.json", kinds[:5])
    assert check_file([str(path_of), "--images", str(folder), "--subset", "llava"]) == 0
    out, err = capsys.readouterr()
    assert f"{path_of}: left out 2 records of other ids, or whose ratings" in out and err == ""
    assert f"{path_of}: 3 examples with 2 different images; 0 examples have" in out
    assert (
        check_file([str(folder / "none.json")]) == check_file([path, "--images", str(folder / "none")]) == 2
    )
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("error: ") == 2
        and "none.json: no such file" in err
        and "no such image folder" in err
    )


def test_a_gpu_that_cannot_be_used_is_said_and_other_warnings_are_not():
    """Under an old driver torch warns once, and then there is no GPU: the warning was swallowed."""
    script = (
        "import warnings; from data import run_command\n"
        "def command(argv):\n"
        "    warnings.warn('CUDA initialization: The NVIDIA driver on your system is too old')\n"
        "    warnings.warn('a library was renamed')\n"
        "    return 0\n"
        "raise SystemExit(run_command(command, []))"
    )
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0 and "driver on your system is too old" in child.stderr
    assert "renamed" not in child.stderr
