"""Protects that what is trained is what was meant.

Records that nobody can mean are refused, the rest is shown and counted. Images are opened as they look, and
rejected images are drawn as the paper says.
"""

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
import time
import warnings
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
    counted,
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


def read_one(folder, record, **options):
    (example,) = read(folder, record, **options)
    return example


def pair_of(folder, record):
    """The pair of one record, with its images open."""
    return Pairs([read_one(folder, record)])[0]


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


@pytest.fixture(scope="session")
def bunnys(bunny):
    """Bunny's processor."""
    return train.load_processor(str(bunny))


@pytest.fixture(scope="session")
def llavas(llava):
    return train.load_processor(str(llava))


def test_a_pair_that_is_equal_once_it_is_cut_is_bad(folder, bunnys):
    """DPO's margin would be 0 for ever, and AdamW would scale its rounding noise."""
    start = "There is a red circle and a blue square. " * 5
    record = authors(chosen=start + "Yes.", rejected=start + "No.")
    room = longest("prompts", counts(folder, record, processor=bunnys)) + 20
    line = refusal(folder, record, processor=bunnys, max_length=room)
    assert "equal in the tokens of --max-length" in line
    ends = authors(chosen="Yes.<|endoftext|> Or no.", rejected="Yes.<|endoftext|> Or so.")
    assert "are equal" in refusal(folder, ends, processor=bunnys)
    empty = authors(chosen="<|endoftext|>Yes.")
    assert "'chosen' is empty before its end-of-sequence" in refusal(folder, empty, processor=bunnys)


def counts(folder, *records, **options):
    """What reading says of good records."""
    said = []
    read(folder, *records, log=said.append, **options)
    return said[-1]


def longest(name, said):
    return int(re.search(f"{name}: [0-9]+ tokens, the longest ([0-9]+)", said)[1])


def test_responses_that_are_cut_are_counted(folder, bunnys):
    """They lose their end-of-sequence: the model would learn never to stop, and nobody was told."""
    long = "red circle " * 60
    records = [
        authors(),
        authors(chosen=long),
        authors(rejected=long),
        authors(chosen=long, rejected="x" + long),
    ]
    records.append(authors(chosen="Yes.<|endoftext|> Or no."))
    said = counts(folder, *records, processor=bunnys, max_length=100)
    assert "5 examples with 1 different images" in said and "4 responses are cut at --max-length 100" in said
    assert "1 responses end at an end-of-sequence inside" in said
    texts = [data.tokenize(bunnys, pair_of(folder, record)) for record in records]
    lengths = [len(ids) for text in texts for ids in text.responses.values()]
    assert longest("responses", said) == max(lengths)


def test_a_response_that_just_fits_is_not_cut(folder, bunnys):
    """Who is told of cut responses makes room for them, and has to see when it is enough."""
    record = authors(rejected="No.")
    said = counts(folder, record, processor=bunnys)
    room = longest("prompts", said) + longest("responses", said)
    for max_length, n_cut in (room, 0), (room - 1, 1):
        said = counts(folder, record, processor=bunnys, max_length=max_length)
        assert f"{n_cut} responses are cut at" in said


FOREIGN = (
    "<ImageHere> <image_0> <image-placeholder> <|image_1|> <|image|> <|image_pad|> <start_of_image>".split()
)
FOREIGN += ["<IMAGE>", "[IMG]", "<img>a.jpg</img>", "<|im_start|>", "<|vision_start|>", "<image 1>"]
FOREIGN += ["<image1>", "<img>a\n.jpg</img>", "<im_patch>", "[/INST]", "<start_of_turn>", "### Human:"]
FOREIGN += ["[INST]", "ASSISTANT:"]


@pytest.mark.parametrize(
    "code", ["a<image_size>2", "vector<image_t> v;", "x <| f |> y", "<img src=a>", "[img]"]
)
def test_code_in_a_question_is_no_image_mark(folder, code):
    """Questions about code are data, too."""
    assert len(read(folder, authors(prompt=f"What does {code} do?", chosen="[IMG] <IMAGE>"))) == 1


def test_control_tokens_of_the_model_are_bad_but_think_tags_and_an_end_inside_a_response_are_not(
    folder, qwen, llavas
):
    """A text that went through a chat template already would hold a turn inside the turn."""
    for name in "prompt", "chosen", "rejected":
        record = authors(**{name: "<|vision_start|>What?"})
        assert f"'{name}': holds '<|vision_start|>'" in refusal(folder, record, processor=qwen)
    ended = authors(prompt="What?</s>")  # which has no form of an image mark
    assert "'prompt': holds '</s>'" in refusal(folder, ended, processor=llavas)
    thinking, eos = copy.deepcopy(qwen), qwen.tokenizer.eos_token
    tags = [tokenizers.AddedToken(tag, special=True) for tag in ("<think>", "</think>")]
    thinking.tokenizer.add_tokens(tags, special_tokens=True)
    good = authors(prompt="What <think>?", chosen=f"<think>\nA guess.</think> Yes.{eos}", rejected="No.")
    for processor in qwen, thinking:
        assert len(read(folder, good, processor=processor)) == 1


def test_a_system_text_around_the_question_is_kept_where_the_model_was_tuned_with_one(
    folder, bunnys, llavas, qwen
):
    """LLaVA-1.5 was tuned with it, and its hub template does not add it. Elsewhere it would take the place of
    the model's own, and answers are asked for without it."""
    said = []
    for processor in bunnys, llavas:
        question = read_one(folder, authors(), processor=processor).question
        assert question[0] == wrapped()
        text = row_text(processor, question)
        assert text.replace("<s>", "").lstrip().startswith(f"{train.BUNNY_SYSTEM} USER: ")
    # To Bunny, whose template writes it by itself, the same row.
    assert row_text(bunnys, question) == row_text(bunnys, question[1:])
    question = read_one(folder, authors(), processor=qwen, log=said.append).question
    assert [message["role"] for message in question] == ["user"]
    assert "left out 1 system texts around USER: ... ASSISTANT:" in said[0]
    other = authors(prompt="Be rude. USER: <image>\nWhat? ASSISTANT:")
    assert "Be rude. USER: <image>" in row_text(llavas, read_one(folder, other, processor=llavas).question)


def test_a_system_message_is_written_once_or_the_record_is_bad(folder, qwen):
    """Some templates have no place for it, and drop it in silence."""
    question, processor = read_one(folder, TURNS, processor=qwen).question, copy.copy(qwen)
    assert row_text(qwen, question, 2).count("Be brief.") == 1
    for template in NO_SYSTEM, SYSTEM_TWICE:
        processor.chat_template = template
        assert "no place for a system text" in refusal(folder, TURNS, processor=processor)


def test_a_run_knows_the_system_text_of_its_data(folder, llavas):
    """Answers are asked for with it: without, they would be to prompts that it never saw."""
    args = train.parse_args(["--model", "M", "--data", str(folder / "x.json")])
    rude = authors(prompt="Be rude. USER: <image>\nWhat? ASSISTANT:")
    cases = (([authors()] * 2, train.BUNNY_SYSTEM), ([authors(), rude], ""), ([authors(prompt="?")], ""))
    for records, system in cases:
        examples = read(folder, *records, processor=llavas, log=len)
        known = train.identity(args, examples, torch.nn.Linear(1, 1), mdpo.mdpo_loss)
        assert known["system"] == system


def test_what_is_transparent_is_white(tmp_path):
    """Black ink on transparency, as formulas and charts have it, would become all black."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 20, 20))
    image.save(tmp_path / "a.png")
    image.convert("LA").save(tmp_path / "la.png")
    image.save(tmp_path / "b.webp", lossless=True)
    for name in ("a.png", "la.png", "b.webp"):
        opened = open_image(tmp_path / name)
        assert (opened.getpixel((0, 0)), opened.getpixel((15, 15))) == ((255,) * 3, (0,) * 3), name
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (255,) * 3


DEEP = {  # mode, and the levels of white, grey and black
    "a.tif": ("I;16", 4095, 2048, 0),
    "b.png": ("I;16", 65535, 32768, 0),
    "c.tif": ("I;16B", 65535, 32768, 0),
    "d.tif": ("F", 1.0, 0.5, 0.0),
    "e.tif": ("F", 4.0, 0.0, -4.0),
}


@pytest.mark.parametrize("name", DEEP)
def test_images_of_12_and_16_bits_and_of_floats_are_scaled_by_their_range(tmp_path, name):
    """Cut off at 255, or divided by 65,536, scans and depth maps would be all white or all black."""
    mode, white, grey, black = DEEP[name]
    image = Image.new(mode, (8, 8), black)
    for x in range(8):
        image.putpixel((x, 0), white)
        image.putpixel((x, 1), grey)
    image.save(tmp_path / name)
    levels = [open_image(tmp_path / name).getpixel((0, y))[0] for y in range(3)]
    assert levels == pytest.approx([255, 128, 0], abs=1)


def test_postscript_is_no_picture(tmp_path):
    """It is a program, and Pillow would start Ghostscript to run it."""
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(BadInput, match="x.png cannot be decoded: EPS is none of"):
        open_image(tmp_path / "x.png")


def test_max_pixels_scales_large_images_down_before_all_else(folder):
    """A phone's photograph takes 15,000 tokens on models that see each pixel."""
    noise(1, (400, 100)).save(folder / "a.png")
    sizes = [open_image(folder / "a.png", max_pixels).size for max_pixels in (10_000, 40_000)]
    assert sizes == [(200, 50), (400, 100)]
    one = Pairs(read(folder, authors()), max_pixels=10_000)[0]
    assert one.images[0].size == one.images_rejected[0].size == (200, 50)


def test_max_pixels_is_of_the_check_and_of_all_pairs(folder, qwen):
    """A prompt that fits would be refused, or images of another size than the checked ones be trained on."""
    for name in "ab":
        noise(ord(name), (320, 320)).save(folder / f"{name}.png")
    path = write(folder / "x.json", [authors(img_path="a.png"), authors(img_path="b.png")])
    argv = ["--model", "M", "--data", path, "--eval-size", "1", "--max-length", "30"]
    with pytest.raises(BadInput, match="no room for a response; images add 8, "):  # 3 x 3, less a placeholder
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


def test_the_check_processes_one_image_of_each_size(folder, bunnys, monkeypatch):
    """Resizing pixels that nobody looks at took most of the check's time, minutes for 10,000 records."""
    calls = counted(monkeypatch, type(bunnys.image_processor), "__call__")
    noise(3, (90, 20)).save(folder / "b.png")
    own = "merged_images/llava-1.jpg"
    records = [authors(id=i, img_path=("a.png", "b.png")[i % 2], rejected_image=own) for i in range(20)]
    assert len(read(folder, *records, processor=bunnys)) == 20 and 0 < len(calls) <= 4


def test_held_out_examples_share_no_image_with_training(folder):
    """Four questions about one image, one of them held out, measure memory. Images link examples, own
    rejected ones too: here 0-1-2 by a and b, 3-4 by the rejected image d, 5 alone."""
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


def test_random_rejected_images_of_training_are_none_of_the_held_out(bunnys, folder):
    """Held-out images would be trained on."""
    for i in range(8):
        noise(i + 10).save(folder / f"{i}.png")
    path = write(folder / "x.json", [authors(img_path=f"{i}.png") for i in range(8)])
    args = train.parse_args(["--model", "M", "--data", path, "--eval-size", "3", "--reject", "random"])
    pairs, held_out = train.read_pairs(args, bunnys)
    assert not {*pairs.pool} & {image for example in held_out.examples for image in example.images}
    assert len(pairs.pool) == 5 and len(held_out.pool) == 8


def test_flags_that_do_nothing_are_refused(bunny, bunnys, folder, capsys):
    """A user who gives one believes that it works."""
    noise(2).save(folder / "b.png")
    path = write(folder / "x.json", [authors(rejected_image="b.png")] * 3)
    status = train.main(command(bunny, path, folder / "out", "--reject", "moco"))
    assert "--reject moco does nothing: every record has rejected images" in one_line_of(capsys, status)
    write(folder / "x.json", [authors(rejected_image="b.png"), authors()])
    args = train.parse_args(["--model", "M", "--data", path, "--reject", "moco"])
    assert len(train.read_pairs(args, bunnys)[0]) == 2


def test_a_cpu_trains_a_large_model_only_if_it_is_asked_to(bunny, folder, capsys, monkeypatch):
    """Under an old driver torch sees no GPU: a 3B model would train for weeks, and say nothing."""
    argv = command(bunny, write(folder / "x.json", [authors()] * 4), folder / "out", "--epochs", 1)
    at = argv.index("--device")

    def many(self):
        return 501_000_000

    def no():
        return False

    monkeypatch.setattr(torch.nn.Module, "num_parameters", many, raising=False)
    monkeypatch.setattr(train.transformers.PreTrainedModel, "num_parameters", many)
    monkeypatch.setattr(torch.cuda, "is_available", no)
    assert "--device cpu" in one_line_of(capsys, train.main(argv[:at] + argv[at + 2 :]))
    assert train.main(argv) == 0


def test_torchrun_of_train_py_is_refused(bunny, folder, capsys, monkeypatch):
    """Each process would train the same run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    status = train.main(command(bunny, write(folder / "x.json", [authors()]), folder / "out"))
    assert "torchrun examples/trl_mdpo.py" in one_line_of(capsys, status)


B2 = torch.zeros(2)


def test_a_wrong_argument_is_one_sentence_that_says_what_is_wanted(bunny, folder):
    """A library's error from five calls below says nothing to who copies a function. A misspelled strategy
    must not train on the image itself."""
    model, processor = train.load_model(str(bunny))
    examples = read(folder, authors(), log=len)
    one = Pairs(examples)[0]
    for sentence, function, *arguments in (
        ("a list of pairs with open images", make_batch, examples, processor),
        ("a list of pairs with open images", make_batch, one, processor),
        ("unknown layout 'padded'", train.choose_layout, model, processor, [one], "padded"),
        ("unknown strategy 'crops': choose from crop, random, moco", Pairs, examples, "crops"),
        ("must be a LogPs or a tuple of its tensors", mdpo.mdpo_loss, B2, (B2, B2, B2)),
        ("needs a model with an adapter, or ref_model", mdpo.mdpo_step, model, make_batch([one], processor)),
    ):
        with pytest.raises(ValueError, match=sentence):
            function(*arguments)


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
                assert f"'{field}'" in refusal(folder, record, processor=processor)


def test_a_tokenizer_that_adds_an_end_is_refused(llava):
    """Two ends would be scored, the second after the answer is over."""
    processor = train.load_processor(str(llava))
    processor.tokenizer.add_eos_token = True
    with pytest.raises(BadInput, match="adds an end-of-sequence"):
        make_batch([pair("Which?", "No.", "Yes.", noise(1), noise(2))], processor)


@pytest.mark.parametrize(
    "changes", [{"id": "\x1b[2J", "img_path": "\x1b[31m\x07.png"}, {"id": "\x1b[2J", "chosen": ""}]
)
def test_no_record_writes_to_the_terminal(folder, capsys, changes):
    """ESC in a name clears the screen or moves what was said: an error that nobody sees."""
    assert check_file([write(folder / "x.json", [authors(**changes)])]) == 2
    said = "".join(capsys.readouterr())
    assert "x1b[2J" in said and ("x1b[31m" in said) == ("img_path" in changes)
    assert said.replace("\n", "").isprintable()


def test_an_id_of_0_is_an_id(folder):
    """The first record of a file that counts from 0 would have the name of the second."""
    examples = read(folder, authors(id=1), authors(id=0), authors())
    assert [example.id for example in examples] == ["1", "0", "3"]


def test_a_question_about_the_template_is_whole(folder):
    """Cut at the last USER:, most of it would become system text, which some models drop."""
    question = "Who speaks after USER: here?"
    example = read_one(folder, authors(prompt=f"Be brief. USER: <image>\n{question} ASSISTANT:"))
    assert data.texts_of(example.question) == ["Be brief.", question]


def say(role, *content):
    """A chat message of one text, or of parts."""
    return {"role": role, "content": content[0] if isinstance(content[0], str) else [*content]}


@pytest.mark.parametrize("prompt, turns", [
    ("Describe A", ["Describe B"]),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q1"}], ["q1", "a1", "q2"]),
    ("q2", ["q1"]),
])  # fmt: skip
def test_a_prompt_that_is_no_part_of_the_conversation_is_bad(folder, prompt, turns):
    """The answers of one question would be trained as those of another, or a system text be lost."""
    before = [say(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    answers = {name: [*before, say("assistant", name)] for name in ("chosen", "rejected")}
    other = authors(prompt=prompt) | answers
    assert "'prompt' is not what 'chosen' and 'rejected' answer" in refusal(folder, other)
    assert read_one(folder, authors(prompt=turns[-1]) | answers).chosen == "chosen"


def test_the_parts_of_an_answer_are_joined_as_a_template_joins_them(folder):
    """A line break that nobody wrote would be learned."""
    chosen = [say("assistant", text("The cat"), text(" sits."))]
    assert read_one(folder, MESSAGES | {"chosen": chosen}).chosen == "The cat sits."


@pytest.mark.parametrize(
    "width, height, reason",
    [
        (
            10_001,
            10_000,
            "10001 x 10000 pixels: sides differ more than 50-fold, or more than 100 million pixels",
        ),
        (1, 51, "1 x 51 pixels: sides differ"),
        (5001, 100, "5001 x 100 pixels: sides differ"),
        (10_000, 10_000, "truncated|broken"),
        (50, 1, "truncated|broken"),
    ],
)
def test_images_that_are_no_photographs_are_bad(folder, width, height, reason):
    """Padded to a square, 1 x 20000 pixels are 400 million; a bomb of a few bytes decodes to gigabytes. But a
    limit that is off by ten drops a phone's photographs. The files say how large they are, and hold no
    pixels."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + b"x\x9c"]
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert re.search(reason, refusal(folder, authors()))


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


def ranked(folder, *completions):
    """(chosen, rejected) of one VLFeedback record with these completions."""
    return read_one(folder, VLFEEDBACK | {"completions": [*completions]})[1:3]


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
    assert ranked(folder, *rated) == ("highest mean", "lowest mean")
    assert ranked(folder, *rated[::-1]) == ("as high, but later", "lowest mean")
    assert ranked(folder, completion("nine", "9"), completion("ten", "10")) == ("ten", "nine")


@pytest.mark.parametrize(
    "rating",
    ["N/A", "nan", float("nan"), "inf", "-1", "true", "True", True, None, "1_0", "", "4 stars", "1e1"],
)
def test_vlfeedback_completion_with_one_aspect_unrated_is_left_out_whole(folder, rating):
    """Its mean over the other aspects would be compared with means over all. What float() takes is no rating
    yet."""
    ratings = (rating, "5", "5"), ("1", rating, "1"), ("0", "0", rating)
    unrated = [completion("unrated", *of) for of in ratings]
    rated = [completion("best", "4", "4", "4"), completion("worst", "2", "2", "2"), completion("no aspect")]
    assert ranked(folder, *unrated, *rated) == ranked(folder, *rated, *unrated) == ("best", "worst")


def test_vlfeedback_citation_marks_alone_are_taken_out(folder):
    """The model would learn to write them; but brackets are text in Chinese."""
    marked = completion("A【6†source】 cat【7†a】 on 【a】 mat【8†b】.", "5")
    assert ranked(folder, marked, completion("【1†x】A dog", "1")) == ("A cat on 【a】 mat.", "A dog")


def test_an_image_is_looked_for_in_the_folder_then_in_merged_images(folder):
    """Another order takes another image of the same name, in silence. --images names another folder than the
    file's; an absolute path is taken as it is."""

    def found(image_dir=None, **changes):
        return read_one(folder, VLFEEDBACK | changes, image_dir=image_dir).images[0]

    here, merged = folder / "llava-1.jpg", folder / "merged_images" / "llava-1.jpg"
    assert found() == found(image="llava-1.jpg") == str(merged)
    noise(3).save(here)
    assert found() == found(images=["llava-1.jpg"]) == str(here)
    assert found(img_path="a.png") == found(image={"path": "a.png"}) == str(folder / "a.png")
    for image in (str(merged), "llava-1.jpg", None):
        assert found(image=image, image_dir=folder / "merged_images") == str(merged)
    assert found(image=str(merged)) == str(merged)
    elsewhere = write(folder / "deep" / "x.json", [authors(), authors(img_path=str(folder / "a.png"))])
    assert len(read_examples(elsewhere, image_dir=folder)) == 2
    noise(4).save(folder / "..b.png")
    assert found(image="..b.png") == str(folder / "..b.png")
    assert Path(found(image="merged_images/../a.png")).samefile(folder / "a.png")
    noise(5).save(folder.parent / "a.png")
    for image in ("../a.png", "merged_images/../../a.png", "x/../../a.png"):
        with pytest.raises(BadInput, match="points outside the image folder"):
            found(image=image)
    with pytest.raises(BadInput, match="no image 'merged_images'"):
        found(image="merged_images")
    with pytest.raises(BadInput, match="none: no such image folder"):
        found(image_dir=folder / "none")


@pytest.mark.parametrize(
    "fields, question",
    [
        ({"img_path": None, "image": "", "image_path": "a.png"}, "What is it?"),
        ({"img_path": None, "image": "a.png", "images": None, "question": "And this?"}, "What is it?"),
        ({"image": "b.png", "images": "c.png", "image_path": "d.png"}, "What is it?"),
        ({"prompt": None, "question": "And this?"}, "And this?"),
    ],
)
def test_a_field_of_null_or_nothing_is_not_there(folder, fields, question):
    """Exports write null or "" for what a record lacks, or names in another field; `prompt` comes before
    `question`, `img_path` before the others."""
    example = read_one(folder, authors(**fields))
    assert example.images == (str(folder / "a.png"),) and example.question[-1:] == asked(question)


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
    system = [wrapped()] if prompt.startswith("A chat") else []
    assert read_one(folder, authors(prompt=prompt)).question == [*system, *asked("What?\nAnd why?")]


def text(words):
    return {"type": "text", "text": words}


def test_messages_keep_their_parts_and_their_order(folder):
    """What is dropped or moved changes the prompt. `<image>` in a text is an image part before it, as in a
    plain string; between two texts one is moved before them, as LLaVA's code does, and several stay."""
    image, two = {"type": "image"}, {"images": ["a.png", "merged_images/llava-1.jpg"]}

    def question(*messages, **changes):
        return read_one(folder, MESSAGES | {"prompt": [*messages]} | changes).question

    for content in ([image, text("What?")], [text("What?"), image], [image, text(" What?\n"), text("Why?")]):
        assert question(say("user", *content)) == [say("user", *content)]
    for words in ("<image>\nWhat?", "What? <image>", "What?", "What?\n<image>"):
        assert question(say("user", text(words))) == [say("user", image, text("What?"))]
        assert question(say("user", words)) == [say("user", image, text("What?"))]
    assert question(say("user", "What?\n")) == [say("user", image, text("What?"))]
    assert question(say("user", text("Is <image>it?"))) == [say("user", image, text("Is it?"))]
    kept = [text("1: "), image, text("\n2: "), image, text("\nWhich?")]
    assert question(say("user", "1: <image>\n2: <image>\nWhich?"), **two) == [say("user", *kept)]
    # Where no message shows an image, the first of the user's opens with all of them.
    system, more = (
        say("system", text("Be brief.")),
        [say("assistant", text("A cat.")), say("user", text("And?"))],
    )
    opening = say("user", image, image, text("What?"))
    assert question(system, say("user", text("What?")), *more, **two) == [system, opening, *more]


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
    good, said = authors(question="a\u2028b", chosen="A\u2028cat."), []
    first = "\ufeff" + json.dumps(good, ensure_ascii=False)
    lines = [first, "", "  ", json.dumps(good), "{", json.dumps(authors(chosen=""))]
    path = folder / "x.jsonl"
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    examples = read_examples(path, skip_bad=True, log=said.append)
    assert [(e.id, e.chosen) for e in examples] == [("1", "A\u2028cat."), ("4", "A\u2028cat.")]
    assert "record 5: not valid JSON" in said[0] and "record 6: 'chosen': has no text" in said[0]


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
    "record 1: has the fields data, split; needed are image": b'{\n"data": [],\n"split": 1}',
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
    """A record that cannot be read has no id: dropped as if it were of another subset, it would be lost in
    silence."""
    path = write(folder / "x.jsonl", json.dumps(VLFEEDBACK) + '\n{"id": "llava-2", "prom\n5\n')
    with pytest.raises(BadInput, match="record 2: not valid JSON: .*\n  record 3: is 5, not an object"):
        read_examples(path, subset="llava")


def test_subset_and_limit(folder):
    """The paper's data is a sample of 10K among ids that begin with llava; the sample is the seed's alone.
    Images of other records need not be there."""
    kinds = [authors(id=f"{kind}-{i}") for i in range(20) for kind in ("llava", "svit-llava")]
    path = write(folder / "x.json", kinds)
    ids, again, others = (
        [e.id for e in read_examples(path, subset="llava", limit=5, seed=seed)] for seed in (1, 1, 2)
    )
    assert len(set(ids)) == 5 and all(id.startswith("llava") for id in ids)
    assert ids == again != others
    assert len(read_examples(path, limit=100)) == len(read_examples(path, limit=40)) == 40
    with pytest.raises(BadInput, match="no example is left with an id in 'vqa'"):
        read_examples(path, subset="vqa")
    numbers = [authors(id=id, img_path="a.png" if id in (1, 12) else "none.png") for id in (1, 2, 12, 21)]
    assert [e.id for e in read(folder, *numbers, subset="1")] == ["1", "12"]


def test_a_sample_is_even_and_in_the_files_order(folder):
    """A sample of the file's first records is a sample of one source. 200 samples of 2 of 6: each record is
    in 67 of them, give or take 3 standard deviations of 6.7."""
    path = write(folder / "x.json", [PLAIN | {"id": id} for id in "abcdef"])
    samples = ["".join(e.id for e in read_examples(path, limit=2, seed=seed)) for seed in range(200)]
    assert all(len(sample) == 2 and sample[0] < sample[1] for sample in samples)
    assert all(47 <= sum(id in sample for sample in samples) <= 87 for id in "abcdef")
    with pytest.raises(BadInput, match="no example is left"):
        read_examples(path, limit=0)


def test_turns_of_conversations_are_not_lost_beside_a_prompt(folder):
    """The prompt is in the conversation once more; taken alone, it would be answered by the last turn's
    answer."""
    turns = [say("user", "What?"), say("assistant", "A ring."), say("user", "Which colour?")]
    record = {"image": "a.png", "prompt": "What?"}
    record |= {name: [*turns, say("assistant", name)] for name in ("chosen", "rejected")}
    one = read_one(folder, record)
    assert data.texts_of(one.question) == ["What?", "A ring.", "Which colour?"] and one.chosen == "chosen"
    longer = record | {"prompt": [say("system", "Be brief."), *turns]}  # says more than the conversation
    texts = data.texts_of(read_one(folder, longer).question)
    assert texts == ["Be brief.", "What?", "A ring.", "Which colour?"]
    record |= {"prompt": turns[:1]} | {name: record[name][1:] for name in ("chosen", "rejected")}
    assert "user and assistant must take turns" in refusal(folder, record)


BAD_RECORDS = {
    "has the fields img_path, question, chosen, rejected; needed are image, prompt, chosen": {
        "img_path": "a.png", "question": "Q", "chosen": None, "rejected": "b"},
    "has the fields image, chosen, rejected; needed are image, prompt": {
        "image": "a.png", "chosen": "a", "rejected": "b"},
    "has the fields image_id, chosen, rejected; needed are": {
        "image_id": 1, "chosen": ["A"], "rejected": ["B", "C"]},
    "has the fields conversations, image; needed are image, prompt, chosen": {
        "conversations": [], "image": "a.png"},
    "'chosen': is 3, not text": authors(chosen=3),
    "'chosen': is NaN, not text": authors(chosen=math.nan),
    "'prompt': has no 'role'": authors(prompt={"a": 1}),
    "each is one response, or a conversation": authors(rejected=["No.", "Never."]),
    "an image is {\"bytes\": \"/9j/4AAQ\", \"path\": null}, not a path": authors(
        img_path={"bytes": "/9j/4AAQ", "path": None}),
    "is [1], not an object with fields": [1],
    "'prompt': holds 'ASSISTANT:'": authors(prompt="USER: q1 ASSISTANT: a1 USER: q2 ASSISTANT:"),
    r"'prompt': holds '\n\nHuman:'": authors(prompt="Hi.\n\nHuman: What?"),
    "'rejected': has no text": authors(rejected=" \n"),
    "'chosen': 'utf-8' codec can't encode character": authors(chosen="A \ud800 cat."),
    "'chosen' and 'rejected' are equal": authors(rejected="A cat. "),
    "no image 'b.png'": authors(img_path="b.png"),
    "cannot be decoded": authors(img_path="broken.png"),
    "has no image path": {"question": "Q", "chosen": "a", "rejected": "b"},
    "points outside the image folder": authors(img_path="../a.png"),
    "'chosen' must end in an assistant message of text": authors(chosen="An <image>"),
    "shows 1 images, the record has 2": authors(img_path=None, images=["a.png", "a.png"]),
    "shows 2 images, the record has 1": TURNS | {"images": ["a.png"]},
    "must take turns": MESSAGES | {"prompt": [*MESSAGES["prompt"], *MESSAGES["prompt"]]},
    "'prompt': role \"tool\" is not system": MESSAGES | {"prompt": [say("tool", "S")]},
    "'prompt': holds the part {\"type\": \"video\", \"text\": \"t\"}": MESSAGES | {
        "prompt": [say("user", {"type": "video", "text": "t"})]},
    "'prompt': holds the part {\"type\": \"image\", \"image\": \"b.png\"}": MESSAGES | {
        "prompt": [say("user", {"type": "image", "image": "b.png"}, text("What?"))]},
    "'chosen' must end in an assistant message": MESSAGES | {"chosen": [say("user", "A cat.")]},
    "'rejected' must end in an assistant message": MESSAGES | {
        "rejected": [say("assistant", *MESSAGES["prompt"][0]["content"])]},
    "'prompt': has no text": MESSAGES | {"prompt": [say("user", {"type": "image"})]},
    "differ before their last turn": NO_PROMPT | {
        "rejected": [say("user", "Who is it?"), *MESSAGES["rejected"]]},
    "has no 'annotations'": VLFEEDBACK | {"completions": [{"response": "x"}]},
    "not valid JSON": None,
}  # fmt: skip
BAD_RECORDS |= {  # marks of other tools would be trained on as text, beside an image that stands elsewhere
    f"'prompt': holds {mark!r}, a control token or image mark": authors(prompt=f"{mark}\nWhat?")
    for mark in FOREIGN
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_bad_records_are_all_reported_with_number_id_and_reason(folder, reason):
    """One bad record stops the run before the model is loaded, and says which, and what it holds in few
    words; --skip-bad drops it and says how many."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    bad, said = json.dumps(BAD_RECORDS[reason]) if BAD_RECORDS[reason] else "{", []
    path = write(folder / "x.jsonl", f"{json.dumps(authors(id='first'))}\n{bad}\n{bad}\n")
    with pytest.raises(BadInput) as error:
        read_examples(path)
    first, *lines = str(error.value).split("\n")
    assert first == f"{path}: --skip-bad would drop 2 bad records:"
    assert all(len(line) < 400 and reason in line for line in lines)
    assert [line.strip()[:8] for line in lines] == ["record 2", "record 3"]
    assert [e.id for e in read_examples(path, skip_bad=True, log=said.append)] == ["first"]
    assert "dropped 2 bad records" in said[0]


def test_the_models_own_image_token_in_text_is_bad(folder, bunnys):
    """Nine tabs are Bunny's image token: in a table of tabs they would be taken for an image."""
    record = authors(chosen="a" + "\t" * 9 + "b")
    assert re.search(
        r"'chosen': holds '(\\t){9}', a control token", refusal(folder, record, processor=bunnys)
    )


def test_the_check_of_the_room_counts_each_prompts_own_images(folder, loaded):
    """If it did not, the run would stop hours in, at the first batch with a long prompt. By the batch's own
    lengths."""
    _, processor = loaded
    noise(3, (20, 50)).save(folder / "b.png")
    one = authors(id="one", rejected="No.", prompt="What?")
    two = one | {"id": "two", "img_path": None, "images": ["a.png", "b.png"]}
    records = one, two, authors(id="other", rejected="No.", img_path="b.png")
    pairs = Pairs(read(folder, *records))
    batches = [make_batch([pairs[i]], processor) for i in range(3)]
    responses = [ids[prefix_length(batches[0]) :].tolist() for ids in batches[0].labels[:2]]
    alike = len(os.path.commonprefix(responses))  # a space
    needs = [prefix_length(batch) + alike + 1 for batch in batches]
    assert len(set(needs)) == 3
    for max_length in {length + more for length in needs for more in (-1, 0)} - {min(needs) - 1}:
        options = {"processor": processor, "max_length": max_length, "skip_bad": True}
        good = [e.id for e in read(folder, *records, **options)]
        assert good == [id for id, n in zip(("one", "two", "other"), needs) if n <= max_length]
    with pytest.raises(BadInput, match="no example is left|prompt of|are equal in the tokens"):
        read(folder, *records, processor=processor, max_length=min(needs) - 1)


MODES = {
    "palette": "P", "transparent palette": "P", "grey": "L", "grey alpha": "LA", "rgba": "RGBA",
    "one bit": "1", "cmyk": "CMYK", "16 bit": "I;16",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    """Scraped images come in all of these; a wrong channel count kills the run hours in."""
    path = tmp_path / ("x.jpg" if mode == "cmyk" else "x.png")
    image = Image.new("I;16", (48, 32), 40000) if mode == "16 bit" else noise(1).convert(MODES[mode])
    image.save(path, **({"transparency": 0} if mode == "transparent palette" else {}))
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
    """Resuming and DataLoader workers rest on it; a new epoch, a new seed and another index draw anew. One
    index is of epoch 0."""
    for number in range(30):
        noise(number, (24, 24)).save(tmp_path / f"{number}.png")
    one, *others = read(tmp_path, *(authors(img_path=f"{number}.png") for number in range(30)))
    examples = [one] * 30 + others  # the same image at the first 30 indices

    def draw(seed, epoch, index):
        return Pairs(examples, strategy, seed=seed)[epoch, index].images_rejected[0].tobytes()

    keys = [*itertools.product((0, 1, 11), repeat=3)]
    drawn_once = {key: draw(*key) for key in keys}
    random.seed(1)
    assert all(draw(*key) == drawn_once[key] for key in reversed(keys))
    # "random" has 29 images to choose from: 27 draws meet some of them twice.
    assert len({*drawn_once.values()}) == 27 if strategy != "random" else len({*drawn_once.values()}) > 12
    for at in range(3):
        varied = [tuple(value if i == at else 0 for i in range(3)) for value in range(9)]
        assert len({draw(*key) for key in varied}) > 5
    *texts, (image,), (image_rejected,), _, key = Pairs(examples, strategy)[0]
    assert key == (0, 0) and texts == [one.question, one.chosen, one.rejected]
    assert image.tobytes() == open_image(one.images[0]).tobytes() and image_rejected.size == image.size
    assert image_rejected.tobytes() == drawn_once[0, 0, 0]


@LAYOUTS
@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES])
def test_a_record_may_bring_its_own_rejected_image(folder, bunnys, record, layout):
    """It takes the place of the strategy, in every format, and reaches the model as log pi(y_w | m_l, q)."""
    edited = noise(9, (50, 20))
    edited.save(folder / "edited.png")
    for field in ({"rejected_image": "edited.png"}, {"rejected_images": ["edited.png"]}):
        own = read_one(folder, record | field, processor=bunnys)
        for strategy in data.STRATEGIES:
            one = Pairs([own], strategy)[3, 0]
            assert one.images_rejected[0].tobytes() == edited.tobytes()
    seen = laid_out([one], bunnys, layout).inputs["pixel_values"]
    assert torch.equal(seen[-1:], pixels_of(bunnys, edited))
    drawn = pair_of(folder, record)
    assert drawn.images_rejected[0].size == drawn.images[0].size


def test_a_rejected_image_that_is_the_image_is_bad(folder):
    """CoPO would compare a log-probability with itself: loss/conditional is ln 2 for ever."""
    shutil.copy(folder / "a.png", folder / "copy.png")
    for own in ("a.png", "copy.png"):
        assert "record 1: the rejected image is the image" in refusal(folder, authors(rejected_image=own))


def test_own_rejected_images_are_checked_as_any_image(folder, capsys):
    """One that is missing, broken, too large for the prompt or one too few stops the run before it starts."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    for own, message in {
        "no.png": "no image 'no.png'",
        "broken.png": "broken.png cannot be decoded",
        "../a.png": "points outside",
    }.items():
        assert message in refusal(folder, authors(rejected_image=own))
    two = authors(rejected_images=["a.png", "a.png"])
    assert "has 1 images and 2 rejected images" in refusal(folder, two)
    noise(2).save(folder / "b.png")
    path = write(folder / "x.json", [authors(rejected_image="b.png"), authors()])
    assert check_file([path]) == 0 and "1 examples have their own rejected images" in capsys.readouterr().out
    one = read_one(folder, authors(rejected_image="no.png"), with_images=False)
    assert one.images_rejected == ()  # DPO (No Image) needs none


OURS = ("crop", "random", "moco")  # examples may have added others


def test_rejected_images_are_the_same_in_another_process(tmp_path):
    """A resumed run is another process: what hangs on Python's own hash would differ in it."""
    examples = as_examples(tmp_path)
    script = f"""
import zlib
from data import *
examples = read_examples({str(tmp_path / "drawn" / "silkie.json")!r}, log=len)
print(*(zlib.crc32(Pairs(examples, strategy)[3, 2].images_rejected[0].tobytes()) for strategy in {OURS}))
"""
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    said = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, env=environment, text=True)
    rejected = [Pairs(examples, strategy)[3, 2].images_rejected[0] for strategy in OURS]
    assert said.split() == [str(zlib.crc32(image.tobytes())) for image in rejected]


def test_random_image_is_another_file_whatever_its_path(tmp_path, monkeypatch):
    """Training and held-out data may name one folder in two ways: the image itself would be the rejected
    one."""
    path = shapes.write_pairs(tmp_path / "drawn", 3)
    monkeypatch.chdir(tmp_path)
    both = read_examples("drawn/silkie.json") + read_examples(str(path))
    assert len({*Pairs(both, "random").pool}) == 3


COLOURS = dict(a=(255, 0, 0), b=(0, 255, 0), c=(0, 0, 255), d=(255, 255, 0), e=(255, 0, 255), f=(9, 9, 9))


def coloured(folder, *images):
    """Examples with these images: names in COLOURS, or several of them in one example."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    names = [[f"{name}.png" for name in image] for image in images]
    return read(folder, *(authors(img_path=of_example, prompt="What?") for of_example in names))


def names_of(images):
    """The names in COLOURS of images: "a" is all red."""
    names = {colour: name for name, colour in COLOURS.items()}
    return "".join(names[image.getpixel((4, 4))] for image in images)


def test_random_image_is_any_other_and_each_as_likely(tmp_path):
    """Table 3's row. The same file may serve several questions: it is one image for all that, and never its
    own."""
    examples = coloured(tmp_path, *"aaabbbbbcd")
    pairs = Pairs(examples, "random")
    seen = [names_of(pairs[epoch, 1].images_rejected) for epoch in range(600)]
    assert set(seen) == {*"bcd"}
    assert all(is_share(torch.tensor([name == one for one in seen]), 1 / 3) for name in "bcd")
    for too_few in examples[:3], coloured(tmp_path, "a", "b", "ab"):
        with pytest.raises(BadInput, match="more different images"):
            Pairs(too_few, "random")


def test_random_image_is_none_of_the_examples_own_and_of_the_pool(tmp_path):
    """Held-out examples take their images from the training data; another image of the same example is no
    other image."""
    examples = coloured(tmp_path, "ab", "c", "d", "e")
    pairs = Pairs(examples, "random")
    seen = {names_of(pairs[epoch, 0].images_rejected) for epoch in range(200)}
    assert seen == {first + second for first in "cde" for second in "cde"}  # each is drawn for itself
    pooled = Pairs(examples[1:2], "random", pool=coloured(tmp_path, "cf", "d"))
    assert {names_of(pooled[epoch, 0].images_rejected) for epoch in range(50)} == {*"fd"}


def test_random_image_is_centred_and_fitted_not_squashed(tmp_path):
    """A fifth at the left and at the right is red, the middle green: fitted into a square, all of it is
    green."""
    wide = Image.new("RGB", (80, 40), (255, 0, 0))
    wide.paste((0, 255, 0), (16, 0, 64, 40))
    wide.save(tmp_path / "wide.png")
    noise(1, (20, 20)).save(tmp_path / "a.png")
    (rejected,) = Pairs(read(tmp_path, authors(), authors(img_path="wide.png")), "random")[0].images_rejected
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
    # Factors uniform in 0.6..1.4 have a mean of 1 and a variance of 0.16 / 3; two: (1 + 0.16 / 3)^2 - 1 =
    # 0.109.
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
    # ratio of the two is that of contrast alone, at least 0.6 of 130 over bands of mean 185, unless white is
    # reached.
    assert ((low > 180) & (high == 255)).any()
    assert ((high < 250) & ((high - low) / (high + low) < 0.85 * 0.6 * 130 / 370)).any()


def edges_of(line):
    """(middle, variance) of each edge in a line of grey levels: edges are 64 pixels apart, and their steps
    are close."""
    steps = line.diff().abs()
    steps[steps < 0.5] = 0
    n, edges = len(steps), []
    for i in (steps > 0).nonzero()[:, 0].tolist():
        if edges and i - edges[-1][-1] < 20:
            edges[-1].append(i)
        else:
            edges.append([i])
    for edge in edges:
        if edge[0] >= 25 and edge[-1] <= n - 25:  # none that the image's border cuts
            weights, places = steps[edge], torch.tensor(edge).double()
            middle = (weights * places).sum() / weights.sum()
            yield middle, (weights * (places - middle).square()).sum() / weights.sum()


def test_moco_blurs_half_by_a_sigma_that_scales_with_the_image(tmp_path):
    """0.1 to 2 pixels of 224, so 0.15 to 3 where the shorter side is 336: measured by how wide an edge
    between two greys is."""
    bands = Image.new("RGB", (512, 336), (60, 60, 60))
    for x in range(0, 512, 128):
        bands.paste((140, 140, 140), (x, 0, x + 64, 336))
    sigmas = []
    for line in drawn(tmp_path, bands, "moco", 200)[:, 0, 168]:
        middles, variances = zip(*edges_of(line))
        scale = (middles[-1] - middles[0]) / (len(middles) - 1) / 64 if len(middles) > 1 else 1.5
        # What enlarging by `scale` does to an edge, and what reading it pixel by pixel does, is taken off.
        sigmas.append((sum(variances) / len(variances) - (scale**2 + 1) / 12).clamp(min=0).sqrt())
    sigmas = torch.stack(sigmas)
    blurred = sigmas > 0.8
    assert is_share(blurred, 0.5 * (3 - 0.8) / (3 - 0.15))
    assert off_uniform(sigmas[blurred], 0.8, 3) < 1.63 and 2.8 < sigmas.max() < 3.2


def test_full_memory_is_no_bad_record(folder, monkeypatch):
    """Dropped by --skip-bad, good records would be lost for want of memory."""

    def full(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        read(folder, authors(), skip_bad=True)
    with pytest.raises(torch.OutOfMemoryError), data.about("the layout"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_data_command_counts_every_kind_of_record(folder, capsys):
    """`python data.py FILE` is how a user finds out before renting a GPU: its counts and its exit status."""
    tie = VLFEEDBACK | {"id": "llava-tie", "completions": [completion("A", "3"), completion("B", "3")]}
    good = [
        authors(id="llava-0"),
        authors(id="llava-2"),
        authors(id="llava-3", img_path="merged_images/llava-1.jpg"),
        authors(id="svit-0"),
        tie,
    ]
    bad = [authors(id=f"llava-bad-{i}", chosen="") for i in range(25)]
    bad += [authors(id=f"llava-{name}", img_path=f"{name}.png") for name in ("none", "broken")]
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    path = write(folder / "elsewhere" / "x.json", good + bad)
    options = ["--images", str(folder), "--subset", "llava"]
    assert check_file([path, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}: --skip-bad would drop 27 bad records:\n")
    assert "record 6 (id llava-bad-0): 'chosen': has no text" in err and "... and 7 more" in err
    path = write(folder / "good.json", good)
    assert check_file([path, *options]) == 0
    out, err = capsys.readouterr()
    assert f"{path}: left out 2 records of other ids, or whose ratings" in out and err == ""
    assert f"{path}: 3 examples with 2 different images; 0 examples have" in out
    for argv, reason in (
        (["none.json"], "none.json: no such file"),
        ([path, "--images", "none"], "no such image"),
    ):
        assert check_file(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and reason in err


def test_a_gpu_that_cannot_be_used_is_said_and_other_warnings_are_not():
    """Under an old driver torch warns once, and then there is no GPU: the warning was swallowed."""

    def command(argv):
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        warnings.warn("a library was renamed", stacklevel=1)
        return 0

    with warnings.catch_warnings(record=True) as said:
        assert data.run_command(command, []) == 0
    assert ["driver on your system is too old" in str(warning.message) for warning in said] == [True]


def shape_of(question):
    """A question's parts: texts, and None for an image."""
    return [part.get("text") for message in question for part in message["content"]]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("Look <image> here.", [None, "Look  here."]),
        ("<image>\n<image>\nWhich is it?", [None, None, "Which is it?"]),
        ("<image> is to <image>", [None, " is to ", None]),
        ("Compare <image><image>", ["Compare ", None, None]),
        ("Is <image> in <image>?", ["Is ", None, " in ", None, "?"]),
    ],
)
def test_one_image_mark_goes_to_the_front_and_several_marks_stay(folder, text, parts):
    """A text between two images says something else behind them."""
    record = PLAIN | {"question": text}
    if parts.count(None) == 2:
        record = record | {"image": None, "images": ["a.png", "merged_images/llava-1.jpg"]}
    assert shape_of(read_one(folder, record).question) == parts


@pytest.mark.parametrize(
    "prompt", ["{}USER: <image>\nWhat is it?\nASSISTANT:", "<s>{}USER:<image>What is it? ASSISTANT: "]
)
@pytest.mark.parametrize("system", ["", "Be brief. "])
def test_prompts_written_with_line_breaks_or_a_start_token_are_unwrapped(folder, prompt, system):
    """USER: and ASSISTANT: would be written twice, and <s> would take the place of the system text."""
    question = read_one(folder, authors(prompt=prompt.format(system))).question
    assert shape_of(question) == [*filter(None, [system.strip()]), None, "What is it?"]


def test_given_answers_stand_beside_rated_ones(folder):
    """The best and the worst of all completions are another pair than the record's."""
    rated = [completion("X1", 5), completion("X2", 1)]
    example = read_one(folder, authors(id="llava-1", completions=rated))
    assert (example.chosen, example.rejected) == ("A cat.", "A dog.")


def test_the_same_picture_in_another_format_is_no_rejected_image(folder):
    """Every conditional term would be ln 2 for ever."""
    Image.open(folder / "a.png").save(folder / "same.bmp")
    Image.open(folder / "a.png").save(folder / "same.png", dpi=(72, 72))
    for name in ("same.bmp", "same.png"):
        assert "the rejected image is the image" in refusal(folder, authors(rejected_image=name))


def test_levels_that_are_no_number_are_bad(tmp_path):
    """A depth map that begins with nan was black."""
    Image.fromarray(torch.tensor([[math.nan, 1.0], [2.0, 3.0]]).numpy()).save(tmp_path / "depth.tiff")
    with pytest.raises(BadInput, match="levels are not finite"):
        open_image(tmp_path / "depth.tiff")


def test_32_bit_levels_are_scaled_by_their_range(tmp_path):
    """All levels above 16 bits were white."""
    levels = torch.tensor([[0, 100_000_000, 200_000_000]], dtype=torch.int32)
    Image.fromarray(levels.numpy()).save(tmp_path / "levels.tiff")
    assert [*open_image(tmp_path / "levels.tiff").convert("L").tobytes()] == [0, 128, 255]


@pytest.mark.parametrize("image", ["data:image/png;base64,iVBOR", "iVBOR" * 200])
def test_a_data_uri_is_no_path(folder, image):
    """It ended in the system's "File name too long"."""
    line = refusal(folder, authors(img_path=image))
    assert "convert.py makes files of embedded ones" in line and len(line) < 400


@pytest.mark.parametrize("line", ['{"id": ' + "9" * 5000 + "}", '{"id": ' + "[" * 100_000])
def test_a_first_line_that_python_cannot_read_is_one_bad_record(folder, line):
    """Python reads no number of 5,000 digits and no 100,000 brackets: the other lines are good."""
    (folder / "x.jsonl").write_text(line + "\n" + json.dumps(authors()) + "\n")
    said = []
    assert len(read_examples(folder / "x.jsonl", skip_bad=True, log=said.append)) == 1
    assert "dropped 1 bad records" in said[0]


@pytest.mark.parametrize(
    "field", [{"input": "Of it."}, {"system": "Be brief."}, {"history": [["Is it round?", "Yes."]]}]
)
def test_a_system_text_or_a_history_beside_the_prompt_is_not_left_out(folder, field):
    """The pair would be trained as the answer to another conversation."""
    assert "python examples/convert.py takes them" in refusal(folder, PLAIN | field)
    assert read_one(folder, PLAIN | dict.fromkeys(field)).chosen == "A cat."


def test_texts_that_explode_a_pattern_are_read_in_no_time(folder):
    """A citation that never ends, a template within templates, a mark after a mark: quadratic time."""
    started, unended = time.process_time(), [completion("【†" * 2_000 + "x", "5"), completion("B", "1")]
    prompts = "USER: " * 10_000 + "x", "<image>" * 5_000 + "x"
    records = [VLFEEDBACK | {"completions": unended}, *(authors(prompt=prompt) for prompt in prompts)]
    assert len(read(folder, *records, with_images=False, log=len)) == 3
    assert time.process_time() - started < 1
