"""Protects that what is trained is what was meant.

Records that nobody can mean are refused, the rest is shown and counted. Images are opened as they look, and
rejected images are drawn as the paper says.
"""

import copy
import io
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

import numpy
import pytest
import tokenizers
import torch
from PIL import Image, ImageFilter, ImageStat, features

import data
import mdpo
import train
from data import BadInput, Example, Pairs, make_batch, open_image, random_crop, read_examples
from examples import families, shapes
from test_mdpo import LAYOUTS, MESSAGES, NO_PROMPT, ROOT, asked, authors, command, crop_by_hand, gradient
from test_mdpo import laid_out, message, noise, pair, prefix_length, write
from tests.helpers import CHAT, DPO_NAMES, PLAIN, TURNS, VLFEEDBACK, as_examples
from tests.helpers import check_file, completion, counted, one_line_of, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MERGED = "merged_images/llava-1.jpg"


@pytest.fixture
def folder(folder):
    """With another image, too, a broken one, and a.png in other files."""
    noise(3, (50, 20)).save(folder / "b.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    shutil.copy(folder / "a.png", folder / "copy.png")
    Image.open(folder / "a.png").save(folder / "same.bmp")
    return folder


@pytest.fixture(scope="session")
def bunnys(bunny):
    """Bunny's processor."""
    return train.load_processor(str(bunny))


@pytest.fixture(scope="session")
def llavas(llava):
    return train.load_processor(str(llava))


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A processor of Qwen3-VL's kind, whose turns end in <|im_end|>."""
    processor = train.load_processor(str(families.write_family("qwen3_vl", tmp_path_factory.mktemp("qwen"))))
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


def said_of(folder, *records, **options):
    """What reading says of good records."""
    said = []
    read(folder, *records, log=said.append, **options)
    return said[-1]


def arguments(path, *more):
    return train.parse_args(["--model", "M", "--data", str(path), *more])


@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT])
@pytest.mark.parametrize(
    "name, form", [("x.json", "[{}]"), ("x.jsonl", "{}\n"), ("x.json", "\n{}\n"), ("x.jsonl", "\n [{}]")]
)
def test_every_format_gives_the_same_example(folder, record, name, form):
    """Formats are told apart by the records, not by the file's name."""
    (example,) = read_examples(write(folder / name, form.replace("{}", json.dumps(record))))
    question = [*([WRAPPED] if "img_path" in record else []), *asked("What is it?")]
    assert example[:3] == (question, "A cat.", "A dog.")
    assert Path(example.images[0]).name == ("llava-1.jpg" if "completions" in record else "a.png")


def test_lines_are_numbered_as_an_editor_does(folder):
    """A message that names another line sends the user to a good record. U+2028 is text in JSON; a BOM is
    not. A record that cannot be read has no id: it is of any subset, not lost in silence."""
    good, said = authors(question="a\u2028b", chosen="A\u2028cat."), []
    lines = ["\ufeff" + json.dumps(good, ensure_ascii=False), "", "  ", json.dumps(good), "{", "5"]
    path = folder / "x.jsonl"
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    examples = read_examples(path, skip_bad=True, log=said.append)
    assert [(e.id, e.chosen) for e in examples] == [("1", "A\u2028cat."), ("4", "A\u2028cat.")]
    assert re.search("2 bad records:\n  record 5: not valid JSON.*\n  record 6: is 5, not an object", said[0])
    with pytest.raises(BadInput, match="record 5: not valid JSON"):
        read_examples(path, subset="1")


@pytest.mark.parametrize("line", ['{"id": ' + "9" * 5000 + "}", '{"id": ' + "[" * 100_000])
def test_a_first_line_that_python_cannot_read_is_one_bad_record(folder, line):
    """Python reads no number of 5,000 digits and no 100,000 brackets: the other lines are good."""
    said, path = [], write(folder / "x.jsonl", f"{line}\n{json.dumps(authors())}\n")
    assert len(read_examples(path, skip_bad=True, log=said.append)) == 1
    assert "dropped 1 bad records" in said[0]


UNREADABLE = {
    "x: no such file; for a data set of the hub, run python examples/convert.py": None,
    "x: cannot be read: is UTF-16: save it as UTF-8": b"\xff\xfe[",
    "x: cannot be read: is UTF-16: save it": b"\xfe\xff[",
    "x: cannot be read: not valid JSON": b"[{},",
    'x: cannot be read: begins with "a table\\\\nof text': b"a table\nof text\n",
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


def test_a_sample_is_even_and_of_the_subset(folder):
    """The paper's data is a sample of 10K among ids that begin with llava. A sample of a file's first records
    is one of one source. Images of other records need not be there."""
    kinds = [authors(id=f"{kind}{i}") for i in range(6) for kind in ("a", "ba")]
    path = write(folder / "x.json", [*kinds, authors(id="b", img_path="none.png")])

    def sample(**options):
        return [e.id for e in read_examples(path, log=len, check=False, **options)]

    assert sample(subset="a") == sample(subset="a", limit=9) == [f"a{i}" for i in range(6)]
    samples = [sample(subset="a", limit=2, seed=seed) for seed in range(200)]
    assert sample(subset="a", limit=2, seed=7) == samples[7]
    assert all(len(ids) == 2 and ids == sorted(ids) for ids in samples)  # in the file's order
    for i in range(6):  # each record is in 67 of 200, give or take 3 standard deviations of 6.7
        assert 47 <= sum(f"a{i}" in ids for ids in samples) <= 87
    with pytest.raises(BadInput, match="no example is left with an id in 'vqa'"):
        sample(subset="vqa")
    with pytest.raises(BadInput, match="no example is left"):
        sample(subset="a", limit=0)
    numbers = [authors(id=number) for number in (1, 12, 21)]
    assert [e.id for e in read(folder, *numbers, subset="1")] == ["1", "12"]


def test_an_id_of_0_is_an_id(folder):
    """The first record of a file that counts from 0 would have the name of the second. The run that stops at
    a batch names its examples by it, one without an id by its number."""
    assert [e.id for e in read(folder, authors(id=1), authors(id=0), authors())] == ["1", "0", "3"]


def test_data_command_counts_every_kind_of_record(folder, capsys):
    """`python data.py FILE` is how a user finds out before renting a GPU: its counts and its exit status. A
    pair of equal ratings is noise. A file with one wrong field has as many bad records as lines: the report
    ends after 20."""
    tie = [completion("A", "3", "3", "3"), completion("B", "4", "3", "2")]
    left_out = [VLFEEDBACK | {"completions": some} for some in (tie, [completion("A", "N/A", "3")])]
    good = [authors(id="llava-0"), authors(id="llava-2"), authors(id="llava-3", img_path=MERGED)]
    good += [authors(id="svit-0"), *left_out]
    bad = [authors(id=f"llava-bad-{i}", chosen="") for i in range(25)]
    bad += [authors(id=f"llava-{name}", img_path=f"{name}.png") for name in ("none", "broken")]
    path = write(folder / "elsewhere" / "x.json", good + bad)
    options = ["--images", str(folder), "--subset", "llava"]
    assert check_file([path, *options]) == 2
    out, err = capsys.readouterr()
    first, *lines, last = err.rstrip().split("\n")
    assert out == "" and first == f"error: {path}: --skip-bad would drop 27 bad records:"
    assert [line.split(" (")[0] for line in lines] == [f"  record {n}" for n in range(7, 27)]
    assert lines[0] == "  record 7 (id llava-bad-0): 'chosen': has no text" and last == "  ... and 7 more"
    path = write(folder / "good.json", good)
    assert check_file([path, *options]) == 0
    out, err = capsys.readouterr()
    assert f"{path}: left out 3 records of other ids, or whose ratings" in out and err == ""
    assert f"{path}: 3 examples with 2 different images; 0 examples have" in out
    for argv, reason in (["no"], "no: no such file"), ([path, "--images", "no"], "no: no such image folder"):
        status = check_file(argv)
        assert reason in one_line_of(capsys, status)


WRAPPED = message("system", train.BUNNY_SYSTEM) | {"wrapped": True}  # of a USER: ... ASSISTANT: wrapper


def spelled(question):
    """Chat messages in short: "u:#+What?" is the user's, an image and a text."""
    return [m["role"][0] + ":" + "+".join(part.get("text", "#") for part in m["content"]) for m in question]


USER = "What? <image>", "What?", "<image>\nWhat?", "What?\n<image>"
SYSTEM = message("system", "Be brief.")
QUESTIONS = [  # a prompt, how many images its record has, how it is read
    ("Look <image> here.", 1, "u:#+Look  here."),
    ("<image>\n<image>\nWhich is it?", 2, "u:#+#+Which is it?"),
    ("<image> is to <image>", 2, "u:#+ is to +#"),
    ("Compare <image><image>", 2, "u:Compare +#+#"),
    ("Is <image> in <image>?", 2, "u:Is +#+ in +#+?"),
    (message("user", "Is <image>it?"), 1, "u:#+Is it?"),
    ({"role": "user", "content": "1: <image>\n2: <image>\nWhich?"}, 2, "u:1: +#+\n2: +#+\nWhich?"),
    *((message("user", words), 1, "u:#+What?") for words in USER),
    ({"role": "user", "content": "What?\n"}, 1, "u:#+What?"),
    (message("user", "What?", "IMAGE"), 1, "u:What?+#"),
    (message("user", "IMAGE", " What?\n", "Why?"), 1, "u:#+ What?\n+Why?"),
    # Where no message shows an image, the first of the user's opens with all of them.
    ([SYSTEM, message("user", "What?"), message("assistant", "A cat."), message("user", "And?")], 2,
     "s:Be brief.", "u:#+#+What?", "a:A cat.", "u:And?"),
    # The template of Bunny, which the authors' data is written in.
    ("USER: <image>\nWhat is it?\nASSISTANT:", 1, "u:#+What is it?"),
    ("What does USER: mean?", 1, "u:#+What does USER: mean?"),
    ("<s>USER:<image>What is it? ASSISTANT: ", 1, "u:#+What is it?"),
    ("<s>Be brief. USER: What?\nAnd why?\n<image> ASSISTANT:", 1, "s:Be brief.", "u:#+What?\nAnd why?"),
    ("Be brief. USER: Who speaks after USER: here? ASSISTANT:", 1, "s:Be brief.",
     "u:#+Who speaks after USER: here?"),
]  # fmt: skip


@pytest.mark.parametrize("row", QUESTIONS)
def test_messages_keep_their_parts_and_their_order(folder, row):
    """What is dropped, moved or left of a template changes what the model is trained on. `<image>` in a text
    is an image before it; several stay, as a text between two would say something else behind them."""
    prompt, n_images, *expected = row
    record = PLAIN | {"image": ["a.png", "b.png"][:n_images], "prompt": prompt}
    assert spelled(read_one(folder, record).question) == expected


def conversation(prompt, *turns):
    """A record whose answers hold the conversation: TRL's form."""
    return PLAIN | {"prompt": prompt} | {
        name: [*turns, message("assistant", name)] for name in ("chosen", "rejected")
    }  # fmt: skip


TALK = [message("user", "What?"), message("assistant", "A ring."), message("user", "Which colour?")]


def test_turns_of_conversations_are_not_lost_beside_a_prompt(folder):
    """The prompt is in the conversation once more; taken alone, it would be answered by the last turn's
    answer."""
    turns = ["u:#+What?", "a:A ring.", "u:Which colour?"]
    for prompt, first in ("What?", []), ("Which colour?", []), ([SYSTEM, *TALK], ["s:Be brief."]):
        one = read_one(folder, conversation(prompt, *TALK))
        assert spelled(one.question) == first + turns and one.chosen == "chosen"


@pytest.mark.parametrize("fields, question", [
    ({"img_path": None, "image": "", "image_path": "a.png"}, "What is it?"),
    ({"img_path": None, "image": "a.png", "images": None, "question": "And this?"}, "What is it?"),
    ({"image": "b.png", "images": "c.png", "image_path": "d.png"}, "What is it?"),
    ({"prompt": None, "question": "And this?"}, "And this?"),
    (dict.fromkeys(("input", "system", "history")), "What is it?"),
])  # fmt: skip
def test_a_field_of_null_or_nothing_is_not_there(folder, fields, question):
    """Exports write null or "" for what a record lacks, or names in another field; `prompt` comes before
    `question`, `img_path` before the others."""
    example = read_one(folder, authors(**fields))
    assert example.images == (str(folder / "a.png"),) and example.question[-1:] == asked(question)


def test_the_parts_of_an_answer_are_joined_as_a_template_joins_them(folder):
    """A line break that nobody wrote would be learned."""
    chosen = [message("assistant", "The cat", " sits.")]
    assert read_one(folder, MESSAGES | {"chosen": chosen}).chosen == "The cat sits."


def ranked(folder, *completions, **changes):
    """(chosen, rejected) of one VLFeedback record with these completions."""
    return read_one(folder, VLFEEDBACK | {"completions": [*completions]} | changes)[1:3]


def test_vlfeedback_pairs_the_highest_mean_rating_with_the_lowest(folder):
    """Medians, sums, single aspects or ratings compared as text would take other responses, in silence.
    Citation marks are taken out, but brackets are text in Chinese."""
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
    assert ranked(folder, *rated, image="a.png", chosen="Given", rejected="answers") == ("Given", "answers")
    marked = completion("A【6†source】 cat【7†a】 on 【a】 mat【8†b】.", "10")
    assert ranked(folder, marked, completion("【1†x】A dog", "9")) == ("A cat on 【a】 mat.", "A dog")


@pytest.mark.parametrize(
    "rating", ["N/A", math.nan, "inf", "-1", "true", True, None, "1_0", "", "4 stars", "1e1"]
)
def test_vlfeedback_completion_with_one_aspect_unrated_is_left_out_whole(folder, rating):
    """Its mean over the other aspects would be compared with means over all. What float() takes is no rating
    yet."""
    ratings = (rating, "5", "5"), ("1", rating, "1"), ("0", "0", rating)
    unrated = [completion("unrated", *of) for of in ratings]
    rated = [completion("best", "4", "4", "4"), completion("worst", "2", "2", "2"), completion("no aspect")]
    assert ranked(folder, *unrated, *rated) == ranked(folder, *rated, *unrated) == ("best", "worst")


def test_an_image_is_looked_for_in_the_folder_then_in_merged_images(folder):
    """Another order takes another image of the same name, in silence. --images names another folder than the
    file's; an absolute path is taken as it is."""

    def found(image_dir=None, **changes):
        return Path(read_one(folder, VLFEEDBACK | changes, image_dir=image_dir).images[0])

    here, merged = folder / "llava-1.jpg", folder / MERGED
    assert found() == found(image="llava-1.jpg") == found(image=str(merged)) == merged
    assert found(image="a.png") == folder / "a.png"  # the record's own comes before its id's
    noise(3).save(here)
    noise(4).save(folder / "..b.png")
    noise(5).save(folder.parent / "a.png")
    assert found() == found(images=["llava-1.jpg"]) == here
    assert found(image={"path": "merged_images/../a.png"}).samefile(folder / "a.png")
    assert found(image="..b.png") == folder / "..b.png"
    assert found(image="../a.png") == folder.parent / "a.png"
    for image in (str(merged), "llava-1.jpg", None):
        assert found(image=image, image_dir=merged.parent) == merged
    elsewhere = write(folder / "deep" / "x.json", [authors(), authors(img_path=str(folder / "a.png"))])
    assert len(read_examples(elsewhere, image_dir=folder)) == 2


def test_no_image_needs_no_images_and_no_pool(folder):
    """DPO (No Image) of Fig. 1 must run without the images, with any strategy and without `<image>`."""
    marked = authors(img_path="none.png", rejected_image="no.png", prompt="<image>\n<image>\nWhat is it?")
    examples = read(folder, authors(img_path=None), marked, NO_PROMPT, with_images=False)
    for strategy in data.STRATEGIES:
        pairs = [Pairs(examples, strategy)[0, index] for index in range(3)]
        assert [one[1:6] for one in pairs] == [("A cat.", "A dog.", (), (), id) for id in ("1", "2", "3")]
        assert all(data.chat_messages(one.question, 0)[-1:] == asked("What is it?", 0) for one in pairs)


def test_texts_that_explode_a_pattern_are_read_in_no_time(folder):
    """A citation that never ends, a template within templates, a mark after a mark: quadratic time."""
    started, unended = time.process_time(), [completion("【†" * 2_000 + "x", "5"), completion("B", "1")]
    prompts = "USER: " * 10_000 + "x", "<image>" * 5_000 + "x"
    records = [VLFEEDBACK | {"completions": unended}, *(authors(prompt=prompt) for prompt in prompts)]
    assert len(read(folder, *records, with_images=False, log=len)) == 3
    assert time.process_time() - started < 1


MARKS = (
    "<ImageHere>, <Image>, <IMAGE>, [IMG], <start_of_image>, <image_0>, <image 1>, <image1>, <im_patch>, "
    "<image-placeholder>, <|image_1|>, <|vision_start|>, [INST], [/INST], <start_of_turn>, "
    "<end_of_utterance>, ASSISTANT:, <img>a\n.jpg</img>, ### Human:, \n\nHuman:"
).split(", ")
IMAGE_PART = {"type": "image", "image": "b.png"}
BAD = [
    ("needed are image, prompt, chosen", authors(chosen=None)),
    ("has the fields image, chosen, rejected; needed", {"image": "a.png", "chosen": "a", "rejected": "b"}),
    ("has the fields id, chosen, rejected; needed are", {"id": 1, "chosen": ["A"], "rejected": ["B", "C"]}),
    ("has the fields conversations, image; needed", {"conversations": [], "image": "a.png"}),
    ("not valid JSON", None),
    ("is [1], not an object with fields", [1]),
    ("'chosen': is 3, not text", authors(chosen=3)),
    ("'chosen': is NaN, not text", authors(chosen=math.nan)),
    ("'rejected': has no text", authors(rejected=" \n")),
    ("'chosen': 'utf-8' codec can't encode character", authors(chosen="A \ud800 cat.")),
    ("'chosen' and 'rejected' are equal", authors(rejected="A cat. ")),
    ("'chosen' must end in an assistant message of text", authors(chosen="An <image>")),
    ("'chosen' must end in an assistant", MESSAGES | {"chosen": [message("user", "A cat.")]}),
    ("'rejected' must end in an assistant", authors(rejected=message("assistant", "IMAGE", "No."))),
    ("each is one response, or a conversation", authors(rejected=["No.", "Never."])),
    ("differ before their last turn", NO_PROMPT | {"rejected": [SYSTEM, *MESSAGES["rejected"]]}),
    ("has no 'annotations'", VLFEEDBACK | {"completions": [{"response": "x"}]}),
    # Answers of another question, or of another conversation.
    ("'prompt' is not what 'chosen' and 'rejected' answer", conversation("A?", message("user", "B?"))),
    ("'prompt' is not what 'chosen' and", conversation([SYSTEM, message("user", "What?")], *TALK)),
    ("user and assistant must take turns", conversation(TALK[:1], *TALK[1:])),
    ("must take turns", authors(prompt=TALK[:1] * 2)),
    *((r"examples/convert.py takes them", authors(**{name: "x"})) for name in ("input", "system", "history")),
    ("'prompt': has no 'role'", authors(prompt={"a": 1})),
    ("'prompt': role \"tool\" is not system", authors(prompt=message("tool", "S"))),
    ("'prompt': has no text", authors(prompt=message("user", "IMAGE"))),
    ('holds the part {"type": "video"', authors(prompt={"role": "user", "content": [{"type": "video"}]})),
    ('holds the part {"type": "image", "image": "b.png"}', authors(
        prompt={"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "What?"}]})),
    ("shows 1 images, the record has 2", authors(img_path=["a.png", "a.png"])),
    ("shows 2 images, the record has 1", TURNS | {"images": ["a.png"]}),
    # Images.
    ("has no image path", authors(img_path=None)),
    ("no image 'c.png'", authors(img_path="c.png")),
    ("no image 'merged_images'", authors(img_path="merged_images")),
    ("convert.py makes files of embedded ones", authors(img_path="data:image/png;base64,iVBOR")),
    ("convert.py makes files of embedded ones", authors(img_path="iVBOR" * 200)),
    ('an image is {"bytes": "/9j/", "path": null}', authors(img_path={"bytes": "/9j/", "path": None})),
    ("broken.png cannot be decoded", authors(img_path="broken.png")),
    ("has 1 images and 2 rejected images", authors(rejected_images=["a.png", "a.png"])),
    ("no image 'no.png'", authors(rejected_image="no.png")),
    ("broken.png cannot be decoded", authors(rejected_image="broken.png")),
    # CoPO would compare a log-probability with itself: loss/conditional is ln 2 for ever.
    *(("rejected image is the image", authors(rejected_image=f)) for f in ("a.png", "copy.png", "same.bmp")),
    # Marks of other tools would be trained on as text, beside an image that stands elsewhere.
    *((f"'prompt': holds {mark!r}, a control token", authors(prompt=f"Hi.{mark}\nWhat?")) for mark in MARKS),
    ("'prompt': holds 'ASSISTANT:'", authors(prompt="USER: q1 ASSISTANT: a1 USER: q2 ASSISTANT:")),
]  # fmt: skip


@pytest.mark.parametrize("reason, record", BAD)
def test_bad_records_are_all_reported_with_number_id_and_reason(folder, reason, record):
    """One bad record stops the run before the model is loaded, and says which, and what it holds in few
    words; --skip-bad drops it and says how many."""
    bad, said = json.dumps(record) if record else "{", []
    path = write(folder / "x.jsonl", f"{json.dumps(authors(id='first'))}\n{bad}\n{bad}\n")
    with pytest.raises(BadInput) as error:
        read_examples(path)
    first, *lines = str(error.value).split("\n")
    assert first == f"{path}: --skip-bad would drop 2 bad records:"
    assert all(len(line) < 400 and reason in line for line in lines)
    assert [line.strip()[:8] for line in lines] == ["record 2", "record 3"]
    assert [e.id for e in read_examples(path, skip_bad=True, log=said.append)] == ["first"]
    assert "dropped 2 bad records" in said[0]


def test_no_record_writes_to_the_terminal(folder, capsys):
    """ESC in a name clears the screen or moves what was said: an error that nobody sees."""
    records = authors(id="\x1b[2J", img_path="\x1b[31m\x07.png"), authors(id="\x1b[3J", chosen="")
    assert check_file([write(folder / "x.json", records)]) == 2
    said = "".join(capsys.readouterr())
    assert all(f"x1b[{code}" in said for code in ("2J", "31m", "3J")) and said.replace("\n", "").isprintable()


@pytest.mark.parametrize("code", ["a<image_size>2", "<image_t> v;", "x <| f |> y", "<img src=a>", "[img]"])
def test_code_in_a_question_is_no_image_mark(folder, code):
    """Questions about code are data, too."""
    assert len(read(folder, authors(prompt=f"What does {code} do?", chosen="[IMG] <IMAGE>"))) == 1


def test_control_tokens_of_the_model_are_bad_but_think_tags_and_an_end_inside_a_response_are_not(
    folder, qwen, llavas, bunnys
):
    """A text that went through a chat template already would hold a turn inside the turn."""
    for name in "prompt", "chosen", "rejected":
        record = authors(**{name: "<|vision_start|>What?"})
        assert f"'{name}': holds '<|vision_start|>'" in refusal(folder, record, processor=qwen)
    ended = authors(prompt="What?</s>")  # which has no form of an image mark
    assert "'prompt': holds '</s>'" in refusal(folder, ended, processor=llavas)
    table = authors(chosen="a" + "\t" * 9 + "b")  # nine tabs are Bunny's image token
    assert r"'chosen': holds '\t\t\t\t\t\t\t\t\t', a control" in refusal(folder, table, processor=bunnys)
    thinking, eos = copy.deepcopy(qwen), qwen.tokenizer.eos_token
    tags = [tokenizers.AddedToken(tag, special=True) for tag in ("<think>", "</think>")]
    thinking.tokenizer.add_tokens(tags, special_tokens=True)
    good = authors(prompt="What <think>?", chosen=f"<think>\nA guess.</think> Yes.{eos}", rejected="No.")
    for processor in qwen, thinking:
        assert len(read(folder, good, processor=processor)) == 1


@pytest.mark.parametrize("name", families.FAMILIES)
def test_image_tokens_of_each_family_in_a_text_are_bad(name, folder, tmp_path):
    """They would be taken for an image, or for a video, and stop the run."""
    processor = train.load_processor(str(families.write_family(name, tmp_path / "model")))
    parts = itertools.product((processor, processor.tokenizer), ("image", "boi", "video"))
    tokens = {getattr(part, f"{kind}_token", None) for part, kind in parts} - {None}
    assert processor.image_token in tokens
    for token, field in itertools.product(tokens, ("prompt", "chosen")):
        if (field, token) != ("prompt", "<image>"):  # which stands for images there
            record = authors(prompt="What?") | {field: f"Is {token}{token} it?"}
            assert f"'{field}'" in refusal(folder, record, processor=processor)


def row_text(processor, question, images=1):
    """The row of y_w as text, image tokens as one."""
    image = [noise(1)] * images
    batch = make_batch([pair(question, "A cat.", "No.", image, image)], processor)
    text = processor.tokenizer.decode(batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0])
    return re.sub(f"({re.escape(processor.image_token)})+", "<image>", text)


def test_a_system_text_around_the_question_is_kept_where_the_model_was_tuned_with_one(
    folder, bunnys, llavas, qwen
):
    """LLaVA-1.5 was tuned with it, and its hub template does not add it. Elsewhere it would take the place of
    the model's own, and answers are asked for without it."""
    for processor in bunnys, llavas:
        question = read_one(folder, authors(), processor=processor).question
        assert question[0] == WRAPPED
        text = row_text(processor, question)
        assert text.replace("<s>", "").lstrip().startswith(f"{train.BUNNY_SYSTEM} USER: ")
    # To Bunny, whose template writes it by itself, the same row.
    assert row_text(bunnys, question) == row_text(bunnys, question[1:])
    said = []
    assert len(read_one(folder, authors(), processor=qwen, log=said.append).question) == 1
    assert "left out 1 system texts around USER: ... ASSISTANT:" in said[0]
    assert "Be rude. USER: <image>" in row_text(llavas, read_one(folder, RUDE, processor=llavas).question)


RUDE = authors(prompt="Be rude. USER: <image>\nWhat? ASSISTANT:")


def test_a_run_knows_the_system_text_of_its_data(folder, llavas):
    """Answers are asked for with it: without, they would be to prompts that it never saw."""
    cases = (([authors()] * 2, train.BUNNY_SYSTEM), ([authors(), RUDE], ""), ([authors(prompt="?")], ""))
    for records, system in cases:
        examples = read(folder, *records, processor=llavas, log=len)
        known = train.identity(arguments(folder / "x.json"), examples, torch.nn.Linear(1, 1), mdpo.mdpo_loss)
        assert known["system"] == system


def test_a_system_message_is_written_once_or_the_record_is_bad(folder, qwen):
    """Some templates have no place for it, and drop it in silence."""
    question, processor = read_one(folder, TURNS, processor=qwen).question, copy.copy(qwen)
    assert row_text(qwen, question, 2).count("Be brief.") == 1
    twice = "m.role + '\n' + (m.content[0].text if m.role == 'system' else '') }}"
    dropped = "{% for m in messages if m.role != 'system' %}"
    for old, new in ("m.role + '\n' }}", twice), ("{% for m in messages %}", dropped):
        processor.chat_template = CHATML.replace(old, new)
        assert "no place for a system text" in refusal(folder, TURNS, processor=processor)


def test_a_pair_that_is_equal_once_it_is_cut_is_bad(folder, bunnys):
    """DPO's margin would be 0 for ever, and AdamW would scale its rounding noise."""
    start = "There is a red circle and a blue square. " * 5
    record = authors(chosen=start + "Yes.", rejected=start + "No.")
    room = longest("prompts", said_of(folder, record, processor=bunnys)) + 20
    line = refusal(folder, record, processor=bunnys, max_length=room)
    assert "equal in the tokens of --max-length" in line
    ends = authors(chosen="Yes.<|endoftext|> Or no.", rejected="Yes.<|endoftext|> Or so.")
    assert "are equal" in refusal(folder, ends, processor=bunnys)
    empty = authors(chosen="<|endoftext|>Yes.")
    assert "'chosen' is empty before its end-of-sequence" in refusal(folder, empty, processor=bunnys)


def longest(name, said):
    return int(re.search(f"{name}: median [0-9]+ tokens, longest ([0-9]+)", said)[1])


def test_responses_that_are_cut_are_counted_and_one_that_just_fits_is_not(folder, bunnys):
    """They lose their end-of-sequence: the model would learn never to stop. Who is told of it makes room, and
    has to see when it is enough."""
    long = "red circle " * 60
    changes = {}, {"chosen": long}, {"rejected": long}, {"chosen": long, "rejected": "x" + long}
    records = [authors(**of) for of in (*changes, {"chosen": "Yes.<|endoftext|> Or no."})]
    said = said_of(folder, *records, processor=bunnys, max_length=100)
    assert "5 examples with 1 different images" in said and "4 responses are cut at --max-length 100" in said
    assert "1 responses end at an end-of-sequence inside" in said
    texts = [data.tokenize(bunnys, pair_of(folder, record)) for record in records]
    assert longest("responses", said) == max(len(ids) for text in texts for ids in text.responses.values())
    record = authors(rejected="No.")
    said = said_of(folder, record, processor=bunnys)
    room = longest("prompts", said) + longest("responses", said)
    for max_length, n_cut in (room, 0), (room - 1, 1):
        said = said_of(folder, record, processor=bunnys, max_length=max_length)
        assert f"{n_cut} responses are cut at" in said


def test_counts_are_of_what_they_say(folder, bunnys):
    """Medians, not means; bad records are not left out for their ids; both answers' ends count, each."""
    said, eos = [], bunnys.tokenizer.eos_token
    records = [
        authors(id=f"llava-{n}", chosen=f"A{' cat' * n}{eos}", rejected=f"A{eos} dog.") for n in (1, 2, 60)
    ]
    records += [authors(id="llava-4", chosen=""), authors(id="other")]
    kept = read(folder, *records, processor=bunnys, subset="llava", skip_bad=True, log=said.append)
    said = "\n".join(said)
    assert "left out 1 records" in said and "6 responses end at an end-of-sequence inside" in said
    batch = make_batch([*Pairs(kept)], bunnys, DPO_NAMES)
    lengths = sorted((batch.labels >= 0).sum(1).tolist())
    assert f"responses: median {(lengths[2] + lengths[3]) / 2:.0f} tokens, longest {lengths[-1]}" in said


def test_a_template_that_loses_an_image_is_found_when_the_data_are_read(folder, llava):
    """The run would stop hours in, at the batch that holds the conversation. Texts do not matter to it."""
    processor = train.load_processor(str(llava))
    of_first = "{% for m in messages %}{% set first = loop.first %}"
    template = CHAT.replace("{% for m in messages %}", of_first)
    template = template.replace("{% if p.type == 'image' %}", "{% if p.type == 'image' and first %}")
    template = template.replace("p.text", "p.text | default('')").replace("END", "</s>")
    processor.chat_template = template.replace("IMAGE", "<image>\n")
    first, answer = message("user", "IMAGE", 'Say: "text": "'), message("assistant", "\\")
    turns = [first, answer, message("user", "And", "IMAGE", "this?")]
    good, bad = authors(prompt=turns[:1]), authors(prompt=turns, img_path=["a.png", "a.png"])
    assert len(read(folder, good, processor=processor)) == 1
    with pytest.raises(BadInput, match="1 bad records:\n  record 2"):
        read(folder, good, bad, processor=processor)


def test_the_check_of_the_room_counts_each_prompts_own_images(folder, loaded):
    """If it did not, the run would stop hours in, at the first batch with a long prompt. By the batch's own
    lengths."""
    processor = loaded[1]
    records = [authors(id=id, rejected="No.", prompt="What?", img_path=images.split())
               for id, images in (("one", "a.png"), ("two", "a.png b.png"), ("other", "b.png"))]  # fmt: skip
    needs = {}
    for one in Pairs(read(folder, *records)):
        batch = make_batch([one], processor)
        start = prefix_length(batch)
        alike = os.path.commonprefix([ids[start:].tolist() for ids in batch.labels[:2]])  # a space
        needs[one.id] = start + len(alike) + 1
    for max_length in {n + more for n in needs.values() for more in (-1, 0)}:
        fit = [id for id, n in needs.items() if n <= max_length]
        options = {"processor": processor, "max_length": max_length, "skip_bad": True}
        if fit:
            assert [e.id for e in read(folder, *records, **options)] == fit
        else:
            with pytest.raises(BadInput, match="no example is left"):
                read(folder, *records, **options)


def test_the_longest_prompt_of_a_pair_may_be_the_rejected_images(folder, qwen):
    """The run would stop hours in, at the batch that holds it."""
    noise(3, (320, 320)).save(folder / "b.png")
    record = authors(rejected_image="b.png", chosen="Yes.", rejected="No.")
    one = Pairs(read(folder, record, processor=qwen))[0]
    starts = (make_batch([one], qwen).labels >= 0).int().argmax(1).tolist()
    assert starts[0] == starts[1] < starts[2]
    assert "no room" in refusal(folder, record, processor=qwen, max_length=starts[2])
    assert len(read(folder, record, processor=qwen, max_length=starts[2] + 4)) == 1


def test_max_pixels_is_of_the_check_and_of_all_pairs(folder, qwen):
    """A phone's photograph takes 15,000 tokens on models that see each pixel. A prompt that fits would be
    refused, or images of another size than the checked ones be trained on."""
    noise(1, (400, 100)).save(folder / "a.png")
    assert open_image(folder / "a.png", 40_000).size == (400, 100)
    noise(2, (400, 100)).save(folder / "b.png")
    for own in {}, {"rejected_image": "b.png"}:
        one = Pairs(read(folder, authors(**own)), max_pixels=10_000)[0]
        assert one.images[0].size == one.images_rejected[0].size == (200, 50)
    for name in "ab":
        noise(ord(name), (320, 320)).save(folder / f"{name}.png")
    path = write(folder / "x.json", [authors(), authors(img_path="b.png")])
    flags = "--eval-size", "1", "--max-length", "30"
    with pytest.raises(BadInput, match="no room for a response; images add 8, "):  # 3 x 3, less a placeholder
        train.read_pairs(arguments(path, *flags), qwen)
    for pairs in train.read_pairs(arguments(path, *flags, "--max-pixels", "784"), qwen):
        assert pairs[0].images[0].size == pairs[0].images_rejected[0].size == (28, 28)


def test_the_check_processes_one_image_of_each_size(folder, bunnys, monkeypatch):
    """Resizing pixels that nobody looks at took most of the check's time, minutes for 10,000 records."""
    data.n_image_tokens.cache_clear()  # of other tests
    calls = counted(monkeypatch, type(bunnys.image_processor), "__call__")
    records = [authors(id=i, img_path=("a.png", "b.png")[i % 2], rejected_image=MERGED) for i in range(20)]
    assert len(read(folder, *records, processor=bunnys)) == 20 and 0 < len(calls) <= 4


def test_a_tokenizer_that_adds_an_end_is_refused(llava):
    """Two ends would be scored, the second after the answer is over, or behind the template's own. A padding
    token of its own stays."""
    processor = train.load_processor(str(llava))
    assert processor.tokenizer.pad_token == "<pad>"
    processor.tokenizer.add_eos_token = True
    for template in processor.chat_template, CHAT.replace("IMAGE", "<image>").replace("END", "!"):
        processor.chat_template = template
        with pytest.raises(BadInput, match="adds an end-of-sequence"):
            make_batch([pair("Which?", "No.", "Yes.", noise(1), noise(2))], processor)


def test_held_out_examples_share_no_image_with_training(folder):
    """Four questions about one image, one of them held out, measure memory. Images link examples, own
    rejected ones too: here 0-1-2 by a and b, 3-4 by the rejected image d, 5 alone."""
    images, own = ("a", "ab", "b", "c", "e", "f"), {3: "d", 4: "d"}
    examples = [Example("q", "y", "n", (*images[i],), (*own.get(i, ""),), str(i)) for i in range(6)]
    groups, seen = [{*"012"}, {*"34"}, {*"5"}], set()
    for seed, n in itertools.product(range(30), range(6)):
        try:
            parts = train.hold_out(examples, n, seed)
        except BadInput as error:
            assert "leaves none of 6" in str(error) and n > 2
            continue
        trained, held = ({example.id for example in part} for part in parts)
        assert trained | held == {*"012345"} and not trained & held and len(held) >= n
        assert all(group <= held or not group & held for group in groups)
        assert not held or min(len(held - group) for group in groups if group <= held) < n  # none too many
        if n == 1:
            seen.add(frozenset(held))
    assert len(seen) == 3  # any group, by the seed


def test_random_rejected_images_of_training_are_none_of_the_held_out(bunnys, folder):
    """Held-out images would be trained on."""
    for i in range(8):
        noise(i + 10).save(folder / f"{i}.png")
    path = write(folder / "x.json", [authors(img_path=f"{i}.png") for i in range(8)])
    pairs, held_out = train.read_pairs(arguments(path, "--eval-size", "3", "--reject", "random"), bunnys)
    assert not {*pairs.pool} & {image for example in held_out.examples for image in example.images}
    assert len(pairs.pool) == 5 and len(held_out.pool) == 8


def read_pairs(folder, records, *flags, resume=None, evaluation=()):
    """train.read_pairs of these records -> ids of training and held-out examples."""
    more = ["--eval-data", write(folder / "eval.json", evaluation)] if evaluation else []
    args = arguments(write(folder / "x.json", records), *flags, *more)
    args.resume = resume
    return [[example.id for example in pairs.examples] for pairs in train.read_pairs(args, None)]


def test_a_resumed_run_drops_what_it_dropped_and_checks_nothing_else(folder):
    """With an example more, every later batch is another. Without --skip-bad nothing was bad."""
    records = [authors(id=1), authors(id=2, img_path="broken.png")]
    assert read_pairs(folder, records, "--skip-bad", resume="r") == [["1"], []]
    assert read_pairs(folder, records, resume="r") == [["1", "2"], []]
    with pytest.raises(BadInput, match="broken.png cannot be decoded"):
        read_pairs(folder, records)


def test_samples_and_subsets_are_of_the_training_data_and_eval_data_come_beside(folder):
    """Five seeds on one sample would show less spread than there is. --eval-data is a file of its own, all of
    it; with --eval-size, one of the two sets would be lost in silence."""
    records = [authors(id=f"llava-{n}") for n in range(9)]
    drawn = [f"llava-{n}" for n in sorted(random.Random(1).sample(range(9), 3))]
    mine = [authors(id=f"mine-{n}") for n in range(4)]
    sample = "--subset", "llava", "--limit", "3", "--seed", "1"
    assert read_pairs(folder, records, *sample, evaluation=mine) == [drawn, [f"mine-{n}" for n in range(4)]]
    two = [authors(id="a"), authors(id="b", img_path=MERGED)]
    training, held_out = read_pairs(folder, two, "--eval-size", "1", evaluation=mine[:1])
    assert len(training) == 1 and sorted(training + held_out) == ["a", "b", "mine-0"]


def test_flags_that_do_nothing_are_refused(bunny, bunnys, folder, capsys):
    """A user who gives one believes that it works."""
    own = authors(rejected_image="b.png")
    path = write(folder / "x.json", [own] * 3)
    status = train.main(command(bunny, path, folder / "out", "--reject", "moco"))
    assert "--reject moco does nothing: every record has rejected images" in one_line_of(capsys, status)
    write(folder / "x.json", [own, authors()])
    assert len(train.read_pairs(arguments(path, "--reject", "moco"), bunnys)[0]) == 2


def test_a_cpu_trains_a_large_model_only_if_it_is_asked_to(bunny, folder, capsys, monkeypatch):
    """Under an old driver torch sees no GPU: a 3B model would train for weeks, and say nothing."""
    argv = command(bunny, write(folder / "x.json", [authors()] * 4), folder / "out", "--epochs", 1)
    at = argv.index("--device")
    for kind in torch.nn.Module, train.transformers.PreTrainedModel:
        monkeypatch.setattr(kind, "num_parameters", lambda self: 501_000_000, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in one_line_of(capsys, train.main(argv[:at] + argv[at + 2 :]))
    assert train.main(argv) == 0


def test_torchrun_of_train_py_is_refused(bunny, folder, capsys, monkeypatch):
    """Each process would train the same run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    status = train.main(command(bunny, write(folder / "x.json", [authors()]), folder / "out"))
    assert "torchrun examples/trl_mdpo.py" in one_line_of(capsys, status)


def test_a_wrong_argument_is_one_sentence_that_says_what_is_wanted(bunny, folder):
    """A library's error from five calls below says nothing to who copies a function. A misspelled strategy
    must not train on the image itself."""
    model, processor = train.load_model(str(bunny))
    examples = read(folder, authors(), log=len)
    one, zeros = Pairs(examples)[0], torch.zeros(2)
    for sentence, function, *arguments in (
        ("a list of pairs with open images", make_batch, examples, processor),
        ("a list of pairs with open images", make_batch, one, processor),
        ("unknown layout 'padded'", train.choose_layout, model, processor, [one], "padded"),
        ("unknown strategy 'crops': choose from crop, random, moco", Pairs, examples, "crops"),
        ("must be a LogPs or a tuple of its tensors", mdpo.mdpo_loss, zeros, (zeros, zeros, zeros)),
        ("needs a model with an adapter, or ref_model", mdpo.mdpo_step, model, make_batch([one], processor)),
    ):
        with pytest.raises(ValueError, match=sentence):
            function(*arguments)


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "CMYK"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    """Scraped images come in all of these; a wrong channel count kills the run hours in."""
    image = noise(1).convert(mode)
    image.save(path := tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.tobytes() == image.convert("RGB").tobytes()


def test_what_is_transparent_is_white(tmp_path):
    """Black ink on transparency, as formulas and charts have it, would become all black."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 20, 20))
    for form in image, image.convert("LA"), image.quantize(2):
        form.save(tmp_path / "a.png")
        opened = open_image(tmp_path / "a.png")
        assert (opened.getpixel((0, 0)), opened.getpixel((15, 15))) == ((255,) * 3, (0,) * 3), form.mode


@pytest.mark.parametrize("format", "AVIF BMP GIF JPEG JPEG2000 MPO PNG PPM TIFF WEBP".split())
def test_every_picture_format_is_read(tmp_path, format):
    """One that is missing makes every such record a bad one."""
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    more = {"save_all": True, "append_images": [noise(2)]} if format == "MPO" else {}
    noise(1).save(tmp_path / "x", format, **more)
    assert Image.open(tmp_path / "x").format == format
    assert open_image(tmp_path / "x").size == (48, 32)


DEEP = [  # mode, and the levels of white, grey and black
    ("a.tif", "I;16", 4095, 2048, 0),
    ("b.png", "I;16", 65535, 32768, 0),
    ("c.tif", "I;16B", 65535, 32768, 0),
    ("d.tif", "F", 1.0, 0.5, 0.0),
    ("e.tif", "F", 4.0, 0.0, -4.0),
    ("f.tif", "I", 200_000_000, 100_000_000, 0),
]


@pytest.mark.parametrize("name, mode, white, grey, black", DEEP)
def test_images_of_12_and_16_bits_and_of_floats_are_scaled_by_their_range(
    tmp_path, name, mode, white, grey, black
):
    """Cut off at 255, or divided by 65,536, scans and depth maps would be all white or all black."""
    image = Image.new(mode, (1, 3))
    for y, level in enumerate((white, grey, black)):
        image.putpixel((0, y), level)
    image.save(tmp_path / name)
    levels = [open_image(tmp_path / name).getpixel((0, y))[0] for y in range(3)]
    assert levels == pytest.approx([255, 128, 0], abs=1)


def test_levels_of_16_bits_end_at_255(tmp_path):
    """White paper of a scan is white, and a picture of one level is a picture. 4096 takes more than 12 bits:
    it is a sixteenth of the way."""
    levels = []
    for mode, level in ("I;16", 65535), ("I;16", 4096), ("F", 0.5):
        Image.new(mode, (8, 8), level).save(tmp_path / "x.tif")
        levels.append(open_image(tmp_path / "x.tif").getpixel((0, 0))[0])
    assert levels == [255, 16, 0]


def empty_png(width, height):
    """It says how large it is, and holds no pixels."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + b"x\x9c"]
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def depths(first):
    """A depth map: scaled by one level that is infinite, the rest would be black."""
    image = Image.new("F", (2, 2), 0.5)
    image.putpixel((0, 0), first)
    image.save(file := io.BytesIO(), "TIFF")
    return file.getvalue()


NO_PHOTOGRAPHS = [
    ("10001 x 10000 pixels: .*, or more than 100 million pixels", empty_png(10_001, 10_000)),
    ("1 x 51 pixels: sides differ", empty_png(1, 51)),
    ("5001 x 100 pixels: sides differ", empty_png(5001, 100)),
    ("truncated|broken", empty_png(10_000, 10_000)),
    ("truncated|broken", empty_png(50, 1)),
    *(("levels are not finite", depths(level)) for level in (math.nan, math.inf)),
    # It is a program, and Pillow would start Ghostscript to run it.
    ("EPS is none of", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
]


@pytest.mark.parametrize("reason, content", NO_PHOTOGRAPHS)
def test_images_that_are_no_photographs_are_bad(folder, reason, content):
    """Padded to a square, 1 x 20000 pixels are 400 million; a bomb of a few bytes decodes to gigabytes. But a
    limit that is off by ten drops a phone's photographs."""
    (folder / "a.png").write_bytes(content)
    assert re.search(f"a.png cannot be decoded: .*({reason})", refusal(folder, authors()))


def test_exif_rotation_is_applied(tmp_path):
    """A phone's picture lies on its side otherwise. It is scaled as it is shown."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    noise(1, (400, 100)).save(tmp_path / "x.jpg", exif=exif)
    sizes = [open_image(tmp_path / "x.jpg", max_pixels).size for max_pixels in (None, 90_000, 10_000)]
    assert sizes == [(100, 400), (100, 400), (50, 200)]


def test_full_memory_is_no_bad_record(folder, monkeypatch):
    """Dropped by --skip-bad, good records would be lost for want of memory."""

    def full(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        read(folder, authors(), skip_bad=True)
    with pytest.raises(torch.OutOfMemoryError), data.about("the layout"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_error_without_words_is_named():
    """A line that ends in "x.png cannot be decoded:" helps nobody."""
    with pytest.raises(BadInput, match="^x: ValueError$"), data.about("x"):
        raise ValueError


def test_a_gpu_that_cannot_be_used_is_said_and_other_warnings_are_not():
    """Under an old driver torch warns once, and then there is no GPU: the warning was swallowed."""

    def command(argv):
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        warnings.warn("a library was renamed", stacklevel=1)
        return 0

    with warnings.catch_warnings(record=True) as said:
        assert data.run_command(command, []) == 0
    assert ["driver on your system is too old" in str(warning.message) for warning in said] == [True]


def moco_by_hand(image, rng):
    """MoCo v2's augmentation: jitter blends an image with black, with its mean grey or with its own grey."""
    image = crop_by_hand(image, rng, 0.2, 1.0)
    if rng.random() < 0.8:
        kinds = ["brightness", "contrast", "colour", "hue"]
        rng.shuffle(kinds)
        for kind in kinds:
            grey = image.convert("L")
            plain = {"brightness": 0, "contrast": round(ImageStat.Stat(grey).mean[0])}
            if kind == "hue":
                levels = numpy.array(image.convert("HSV"))
                levels[:, :, 0] += numpy.uint8(round(256 * rng.uniform(-0.1, 0.1)) % 256)  # a circle of 256
                image = Image.fromarray(levels, "HSV").convert("RGB")
            else:
                without = grey if kind == "colour" else Image.new("L", image.size, plain[kind])
                image = Image.blend(without.convert("RGB"), image, rng.uniform(0.6, 1.4))
    if rng.random() < 0.2:
        image = Image.merge("RGB", [image.convert("L")] * 3)
    if rng.random() < 0.5:
        sigma = rng.uniform(0.1, 2.0) / 224 * min(image.size)
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    return Image.fromarray(numpy.array(image)[:, ::-1]) if rng.random() < 0.5 else image


AREAS = [("crop", (0.01, 0.2)), ("crop", (0.3, 0.5)), ("crop", (1e-4, 1e-3)), ("moco", None)]


@pytest.mark.parametrize("strategy, area", AREAS)
@pytest.mark.parametrize("size", [(125, 100), (250, 12), (12, 250), (6, 6)])  # long: no room for all aspects
def test_crop_is_even_in_area_and_place_and_moco_is_its_recipe(tmp_path, size, strategy, area):
    """Table 3 rests on how much is kept and changed: another range, share or order is another method."""
    gradient(*size, step=1).save(tmp_path / "a.png")
    options = {"crop": area} if area and area[1] != 0.2 else {}
    pairs = Pairs(read(tmp_path, authors()), strategy, seed=5, **options)
    for epoch in range(60):
        rng, (image,), (rejected,) = random.Random(f"5 {epoch} 0"), *pairs[epoch, 0][3:5]
        expected = crop_by_hand(image, rng, *area) if area else moco_by_hand(image, rng)
        assert rejected.mode == "RGB" and rejected.size == size
        assert rejected.tobytes() == expected.tobytes()


def test_crops_reach_all_four_rims():
    """The last row and column of a picture are as likely as the first."""
    image = gradient(6, 6, step=40)
    crops = [random_crop(image, random.Random(seed)) for seed in range(400)]
    means = [crop.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for crop in crops]
    for levels in [*zip(*means)][:2]:
        assert min(levels) < 20 and max(levels) > 180  # a pixel of the first, and one of the last


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

    first = {key: draw(*key) for key in itertools.product((0, 1, 11), repeat=3)}
    random.seed(1)
    assert all(draw(*key) == first[key] for key in reversed(first))
    # "random" has 29 images to choose from: 27 draws meet some of them twice.
    assert len({*first.values()}) == 27 if strategy != "random" else len({*first.values()}) > 12
    for at in range(3):
        assert len({draw(*(value if i == at else 0 for i in range(3))) for value in range(9)}) > 5
    *texts, (image,), (image_rejected,), _, key = Pairs(examples, strategy)[0]
    assert key == (0, 0) and texts == [one.question, one.chosen, one.rejected]
    assert image.tobytes() == open_image(one.images[0]).tobytes() and image_rejected.size == image.size
    assert image_rejected.tobytes() == first[0, 0, 0]


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


@LAYOUTS
@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES])
def test_a_record_may_bring_its_own_rejected_image(folder, bunnys, record, layout, capsys):
    """It takes the place of the strategy, in every format, and reaches the model as log pi(y_w | m_l, q)."""
    second = {"img_path": ["a.png"] * 2, "prompt": "?", "rejected_images": ["a.png", "b.png"]}
    assert len(read(folder, authors(**second))) == 1  # the worse context differs in the second image alone
    for field in ({"rejected_image": "b.png"}, {"rejected_images": ["b.png"]}):
        own = read_one(folder, record | field, processor=bunnys)
        assert "1 examples have their own rejected images" in capsys.readouterr().out
        for strategy in data.STRATEGIES:
            one = Pairs([own], strategy)[3, 0]
            assert one.images_rejected == (open_image(folder / "b.png"),)
    seen = laid_out([one], bunnys, layout).inputs["pixel_values"]
    assert torch.equal(seen[-1:], pixels_of(bunnys, *one.images_rejected))


def test_random_image_is_another_file_whatever_its_path(tmp_path, monkeypatch):
    """Training and held-out data may name one folder in two ways: the image would be its own rejected one."""
    path = shapes.write_pairs(tmp_path / "drawn", 3)
    monkeypatch.chdir(tmp_path)
    both = read_examples("drawn/silkie.json") + read_examples(str(path))
    pool = Pairs(both[::-1], "random").pool
    assert len({*pool}) == 3 and pool == sorted(
        pool
    )  # Python's own order of a set is another in each process


def coloured(folder, *examples):
    """Examples of images that are one grey each: "12" has two, of levels 20 and 40."""
    for name in "123456":
        Image.new("RGB", (8, 8), (20 * int(name),) * 3).save(folder / f"{name}.png")
    return read(folder, *(authors(img_path=[f"{n}.png" for n in names], prompt="?") for names in examples))


def rejected_of(pairs, index, n):
    """The names of the rejected images of n epochs."""
    drawn = [pairs[epoch, index].images_rejected for epoch in range(n)]
    return ["".join(str(image.getpixel((4, 4))[0] // 20) for image in images) for images in drawn]


def test_random_image_is_any_other_and_each_as_likely(tmp_path):
    """Table 3's row. The same file may serve several questions: it is one image for all that, and never its
    own."""
    examples = coloured(tmp_path, *"1112222234")
    seen = rejected_of(Pairs(examples, "random"), 1, 600)
    assert {*seen} == {*"234"}
    assert all(165 < seen.count(name) < 235 for name in "234")  # 200, give or take 3 standard deviations
    for too_few in examples[:3], coloured(tmp_path, "1", "2", "12"):
        with pytest.raises(BadInput, match="more different images"):
            Pairs(too_few, "random")


def test_random_image_is_none_of_the_examples_own_and_of_the_pool(tmp_path):
    """Held-out examples take their images from the training data. An example's second image is no other."""
    examples = coloured(tmp_path, "12", "3", "4", "5")
    each = {first + second for first in "345" for second in "345"}  # each is drawn for itself
    assert {*rejected_of(Pairs(examples, "random"), 0, 200)} == each
    pooled = Pairs(examples[1:2], "random", pool=coloured(tmp_path, "36", "4"))
    assert {*rejected_of(pooled, 0, 50)} == {*"46"}


def test_random_image_is_centred_and_fitted_not_squashed(tmp_path):
    """A fifth at the left and at the right is red, the middle green: in a square, all of it is green."""
    wide = Image.new("RGB", (80, 40), (255, 0, 0))
    wide.paste((0, 255, 0), (16, 0, 64, 40))
    wide.save(tmp_path / "wide.png")
    noise(1, (20, 20)).save(tmp_path / "a.png")
    (rejected,) = Pairs(read(tmp_path, authors(), authors(img_path="wide.png")), "random")[0].images_rejected
    assert rejected.size == (20, 20) and rejected.getcolors() == [(400, (0, 255, 0))]
