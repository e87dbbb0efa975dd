"""Protects that what is trained is what was meant: records, their images, and the rejected ones."""

import copy
import itertools
import json
import math
import os
import random
import re
import struct
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy
import pytest
import tokenizers
import torch
from PIL import Image, ImageFilter, ImageStat, features

import data
import mdpo
import train
from data import BadInput, Example, Pairs, make_batch, open_image, read_examples
from examples import families
from test_mdpo import MESSAGES, NO_PROMPT, asked, authors, command, crop_by_hand, gradient, message
from test_mdpo import noise, pair, write
from tests.helpers import CHAT, DPO_NAMES, PLAIN, TURNS, VLFEEDBACK, check_file, completion, counted
from tests.helpers import one_line_of

MERGED = "merged_images/llava-1.jpg"
LONG = "red circle " * 60
RUDE = authors(prompt="Be rude. USER: <image>\nWhat? ASSISTANT:")
SYSTEM = message("system", "Be brief.")
TALK = [message("user", "What?"), message("assistant", "A ring."), message("user", "Which colour?")]


@pytest.fixture
def folder(folder):
    """With another image, too, a broken one, and a.png in another format."""
    noise(3, (50, 20)).save(folder / "b.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    Image.open(folder / "a.png").save(folder / "same.bmp")
    return folder


@pytest.fixture(scope="session")
def bunnys(bunny):
    return train.load_processor(str(bunny))


@pytest.fixture(scope="session")
def llavas(llava):
    return train.load_processor(str(llava))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A processor of Qwen3-VL's kind, whose turns end in <|im_end|>."""
    return train.load_processor(str(families.write_family("qwen3_vl", tmp_path_factory.mktemp("qwen"))))


def read(folder, *records, **options):
    return read_examples(write(folder / "x.json", records), **options)


def read_one(folder, record, **options):
    (example,) = read(folder, record, **options)
    return example


def refusal(folder, record, **options):
    """Why a record is bad, as its line says."""
    with pytest.raises(BadInput, match="1 bad records") as error:
        read(folder, record, **options)
    return str(error.value).splitlines()[1]


def said_of(folder, *records, **options):
    """What reading says of records."""
    said = []
    read(folder, *records, log=said.append, **options)
    return "\n".join(said)


def arguments(folder, records, *more, resume=None):
    """Those of a run on these records."""
    args = train.parse_args(["--model", "M", "--data", write(folder / "x.json", records), *more])
    args.resume = resume
    return args


@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT])
@pytest.mark.parametrize("name, form", [("x.json", "\n{}\n"), ("x.jsonl", "\n [{}]")])
def test_every_format_gives_the_same_example(folder, record, name, form):
    """Formats are told apart by the records, not by the file's name."""
    (example,) = read_examples(write(folder / name, form.replace("{}", json.dumps(record))))
    wrapped = [message("system", train.BUNNY_SYSTEM) | {"wrapped": True}] if "img_path" in record else []
    assert example[:3] == (wrapped + asked("What is it?"), "A cat.", "A dog.")
    assert Path(example.images[0]).name == ("llava-1.jpg" if "completions" in record else "a.png")


@pytest.mark.parametrize("first", ['{"id": ' + "9" * 5000 + "}", '{"id": ' + "[" * 100_000])
def test_lines_are_numbered_as_an_editor_does(folder, first):
    """A message that names another line sends the user to a good record. U+2028 is text in JSON; a BOM is
    not. A record that cannot be read has no id: it is of any subset, not lost in silence. 0 is an id."""
    good, path = authors(chosen="A\u2028cat."), folder / "x.jsonl"
    records = [json.dumps(record, ensure_ascii=False) for record in (good, good | {"id": 0})]
    path.write_bytes("\r\n".join(["\ufeff" + first, "", "  ", *records, "{", "5"]).encode())
    examples = read_examples(path, skip_bad=True, log=(said := []).append)
    assert [(e.id, e.chosen) for e in examples] == [("4", "A\u2028cat."), ("0", "A\u2028cat.")]
    reasons = "record 1: .*\n  record 6: not valid JSON.*\n  record 7: is 5, not an object"
    assert re.search(f"dropped 3 bad records:\n  {reasons}", said[0])
    with pytest.raises(BadInput, match=reasons):
        read_examples(path, subset="4")


@pytest.mark.parametrize("reason, content", {
    "x: no such file; for a data set of the hub, run python examples/convert.py": None,
    "x: cannot be read: is UTF-16: save it as UTF-8": b"\xff\xfe[",
    "x: cannot be read: is UTF-16: save it": b"\xfe\xff[",
    "x: cannot be read: not valid JSON: Expecting value: line 1 column 20": b'[{"id": 1}, {"id": }]',
    'x: cannot be read: begins with "a table\\\\nof text': b"a table\nof text\n",
    'x: cannot be read: begins with ""': b"",
    "x: cannot be read: is a parquet file: python examples/convert.py": b"PAR1\x15\x04",
    "x: cannot be read: is a gzip file: unpack it": b"\x1f\x8b\x08",
    "x: cannot be read: is a zip file: unpack it": b"PK\x03\x04",
    "x: cannot be read: is a Git LFS pointer.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\n",
    "x: cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 9": b'{"chose":\xe9"}',
    "record 1: has the fields data, split; needed are image": b'{\n"data": [],\n"split": 1}',
    "x: no example is left$": b"[]",
}.items())  # fmt: skip
def test_unreadable_files_are_named(folder, reason, content):
    """A wrong path or a wrong file is the first mistake of all."""
    if content is not None:
        (folder / "x").write_bytes(content)
    with pytest.raises(BadInput, match=reason):
        read_examples(folder / "x")


def test_a_sample_is_even_and_of_the_subset(folder):
    """The paper's data is a sample of 10K among ids that begin with llava. A sample of a file's first records
    is one of one source. Images of other records need not be there."""
    ids, records = "10 11 12 13 14 15".split(), [authors(id=id) for id in (*range(10, 16), 21, 211)]
    path = write(folder / "x.json", [*records, authors(id="2", img_path="none.png")])

    def sample(**options):
        return [e.id for e in read_examples(path, subset="1", check=False, **options)]

    assert sample() == sample(limit=9) == ids
    samples = [tuple(sample(limit=2, seed=seed)) for seed in range(200)]
    assert {*samples} == {*itertools.combinations(ids, 2)}  # in the file's order
    assert sample(limit=2, seed=7) == [*samples[7]]
    with pytest.raises(BadInput, match="no example is left with an id in '1'"):
        sample(limit=0)


def test_data_command_counts_every_kind_of_record(folder, capsys):
    """A user finds out by it before renting a GPU. A pair of equal ratings is noise. A file with one wrong
    field has as many bad records as lines: the report ends after 20."""
    tie = [completion("A", "3", "3", "3"), completion("B", "4", "3", "2")]
    left_out = [VLFEEDBACK | {"completions": some} for some in (tie, [completion("A", "N/A", "3")])]
    good = [authors(id="llava-0"), authors(id="llava-2"), authors(id="llava-3", img_path=MERGED)]
    good += [authors(id="svit-0"), *left_out]
    bad = [authors(id="llava-bad", img_path="broken.png"), *[authors(id="llava", chosen="")] * 26]
    path = write(folder / "elsewhere" / "x.json", good + bad)
    options = ["--images", str(folder), "--subset", "llava"]
    assert check_file([path, *options]) == 2
    out, err = capsys.readouterr()
    first, second, *lines, last = err.rstrip().split("\n")
    assert out == "" and first == f"error: {path}: --skip-bad would drop 27 bad records:"
    assert second.startswith("  record 7 (id llava-bad): ") and last == "  ... and 7 more"
    assert lines == [f"  record {n} (id llava): 'chosen': has no text" for n in range(8, 27)]
    assert check_file([write(folder / "x.json", good), *options]) == 0
    out, err = capsys.readouterr()
    assert "x.json: left out 3 records of other ids, or whose ratings" in out and err == ""
    assert "x.json: 3 examples with 2 different images; 0 examples have" in out


def spelled(question):
    """Chat messages in short: "u:#+What?" is the user's, an image and a text."""
    return [m["role"][0] + ":" + "+".join(part.get("text", "#") for part in m["content"]) for m in question]


@pytest.mark.parametrize("row", [  # a prompt, how many images its record has, how it is read
    ("Look <image> here.", 1, "u:#+Look  here."),
    ("<image>\n<image>\nWhich is it?", 2, "u:#+#+Which is it?"),
    ("<image> is to <image>", 2, "u:#+ is to +#"),
    ("Compare <image><image>\nor not.", 2, "u:Compare +#+#+\nor not."),
    ({"role": "user", "content": "What?\n"}, 1, "u:#+What?"),
    (message("user", "What?\n<image>"), 1, "u:#+What?"),
    (message("user", "What?", "IMAGE"), 1, "u:What?+#"),
    (message("user", "IMAGE", " What?\n", "Why?"), 1, "u:#+ What?\n+Why?"),
    ({"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "A"}]}, 1,
     "u:#+A"),
    # Code is no mark of an image.
    ("a<image_size>2, <image_t> v;, x <| f |> y, <img src=a>, [img]", 1,
     "u:#+a<image_size>2, <image_t> v;, x <| f |> y, <img src=a>, [img]"),
    # Where no message shows an image, the first of the user's opens with all of them.
    ([SYSTEM, message("user", "What?"), message("assistant", "A cat."), message("user", "And?")], 2,
     "s:Be brief.", "u:#+#+What?", "a:A cat.", "u:And?"),
    # The template of Bunny, which the authors' data is written in.
    ("USER: <image>\nWhat is it?\nASSISTANT:", 1, "u:#+What is it?"),
    ("What does USER: mean?", 1, "u:#+What does USER: mean?"),
    ("<s> USER:<image>What is it? ASSISTANT: ", 1, "u:#+What is it?"),
    ("<s>Be brief. USER: What?\nAnd why?\n<image> ASSISTANT:", 1, "s:Be brief.", "u:#+What?\nAnd why?"),
    ("Be brief. USER: Who speaks after USER: here? ASSISTANT:", 1, "s:Be brief.",
     "u:#+Who speaks after USER: here?"),
])  # fmt: skip
def test_messages_keep_their_parts_and_their_order(folder, row):
    """What is dropped, moved or left of a template changes what the model is trained on. `<image>` in a text
    is an image before it; several stay, as a text between two would say something else behind them."""
    prompt, n_images, *expected = row
    record = PLAIN | {"image": ["a.png", "b.png"][:n_images], "prompt": prompt, "chosen": "[IMG] <IMAGE>"}
    assert spelled(read_one(folder, record).question) == expected


def conversation(prompt, *turns):
    """A record whose answers, of two parts, hold the conversation: TRL's form."""
    answers = {name: [*turns, message("assistant", name, " sits.")] for name in ("chosen", "rejected")}
    return PLAIN | {"prompt": prompt} | answers


def test_turns_of_conversations_are_not_lost_beside_a_prompt(folder):
    """The prompt is in the conversation once more; taken alone, it would be answered by the last turn's
    answer. A line break that nobody wrote between an answer's parts would be learned."""
    turns = ["u:#+What?", "a:A ring.", "u:Which colour?"]
    for prompt, first in ("What?", []), ("Which colour?", []), ([SYSTEM, *TALK], ["s:Be brief."]):
        one = read_one(folder, conversation(prompt, *TALK))
        assert spelled(one.question) == first + turns and one.chosen == "chosen sits."


@pytest.mark.parametrize("fields, question", [
    ({"img_path": None, "image": "", "image_path": "a.png", "prompt": None}, "And this?"),
    ({"img_path": None, "image": "a.png", "images": None, "input": None, "history": None}, "What is it?"),
    ({"image": "b.png", "images": "c.png", "image_path": "d.png", "system": ""}, "What is it?"),
])  # fmt: skip
def test_a_field_of_null_or_nothing_is_not_there(folder, fields, question):
    """Exports write null or "" for what a record lacks, or names in another field."""
    example = read_one(folder, authors(question="And this?", **fields))
    assert example.images == (str(folder / "a.png"),) and example.question[-1:] == asked(question)


def ranked(folder, *completions, **changes):
    """(chosen, rejected) of one VLFeedback record with these completions."""
    return read_one(folder, VLFEEDBACK | {"completions": completions} | changes)[1:3]


def test_vlfeedback_pairs_the_highest_mean_rating_with_the_lowest(folder):
    """Medians, sums, ratings as text, or means of some aspects would take other responses, in silence.
    Citation marks are taken out, but brackets are text in Chinese."""
    rated = [
        completion("highest aspect, highest median", "5", "5", "1"),  # mean 3.67
        completion("highest sum", "4", "4", "4"),
        completion("lowest mean", "3", "3", "1"),
        completion("lowest median", "2", "2", "4"),  # mean 2.67
        completion("highest mean", " 4.5 "),
        completion("as high, but later", 4.5),
        completion("no aspect"),
    ]
    for rating in (math.nan, "N/A", "inf", "-1", "true", True, None, "1_0", "", "4 stars", "1e1"):
        rated += [completion(f"rated {rating}", *of) for of in ((rating, "5", "5"), ("0", "0", rating))]
    assert ranked(folder, *rated) == ("highest mean", "lowest mean")
    assert ranked(folder, *rated[::-1]) == ("as high, but later", "lowest mean")
    assert ranked(folder, *rated, image="a.png", chosen="Given", rejected="answers") == ("Given", "answers")
    marked = completion("A【6†source】 cat【7†a】 on 【a】 mat【8†b】.", "10")
    assert ranked(folder, marked, completion("【1†x】A dog", "9")) == ("A cat on 【a】 mat.", "A dog")


def test_an_image_is_looked_for_in_the_folder_then_in_merged_images(folder):
    """Another order takes another image of the same name, in silence."""

    def found(image_dir=None, **changes):
        return Path(read_one(folder, VLFEEDBACK | changes, image_dir=image_dir).images[0])

    here, merged = folder / "llava-1.jpg", folder / MERGED
    assert found() == found(image="llava-1.jpg") == found(image=str(merged)) == merged
    assert found(image="a.png") == folder / "a.png"  # the record's own comes before its id's
    noise(3).save(here)
    noise(5).save(folder.parent / "a.png")
    assert found() == here
    assert found(image={"path": "merged_images/../a.png"}).samefile(folder / "a.png")
    assert found(image="../a.png") == folder.parent / "a.png"
    (folder.parent / "sub").mkdir()
    (folder / "far").symlink_to(folder.parent / "sub")  # what lies beside the link's end is not meant
    assert found(image="far/../a.png") == folder / "a.png"
    (folder / "a.png").unlink()
    assert "no image 'far/../a.png'" in refusal(folder, PLAIN | {"image": "far/../a.png"})
    for image in (str(merged), "llava-1.jpg", None):
        assert found(image=image, image_dir=merged.parent) == merged
    (folder.parent / "sub" / "merged_images").symlink_to(merged.parent)
    assert found(image_dir=folder.parent / "sub") == folder.parent / "sub" / MERGED


def test_no_image_needs_no_images_and_no_pool(folder):
    """DPO (No Image) of Fig. 1 must run without the images, with any strategy and without `<image>`."""
    marked = authors(img_path="none.png", rejected_image="no.png", prompt="<image>\n<image>\nWhat is it?")
    examples = read(folder, authors(img_path=None), marked, NO_PROMPT, with_images=False)
    for strategy in data.STRATEGIES:
        pairs = [*Pairs(examples, strategy)]
        assert [one[1:6] for one in pairs] == [("A cat.", "A dog.", (), (), id) for id in "123"]
        assert all(data.chat_messages(one.question, 0)[-1:] == asked("What is it?", 0) for one in pairs)


def test_texts_that_explode_a_pattern_are_read_in_no_time(folder):
    """A citation that never ends, a template within templates, a mark after a mark: quadratic time."""
    started, unended = time.process_time(), [completion("【†" * 2_000 + "x", "5"), completion("B", "1")]
    prompts = "USER: " * 10_000 + "x", "<image>" * 5_000 + "x"
    records = [VLFEEDBACK | {"completions": unended}, *(authors(prompt=prompt) for prompt in prompts)]
    assert len(read(folder, *records, with_images=False)) == 3
    assert time.process_time() - started < 1


MARKS = (
    "<ImageHere>, <Image>, <IMAGE>, [IMG], <start_of_image>, <image_0>, <image 1>, <image1>, <im_patch>, "
    "<im_start>, <image-placeholder>, <|image_1|>, <|vision_start|>, [INST], [/INST], <start_of_turn>, "
    "<end_of_turn>, <end_of_utterance>, <img>a\n.jpg</img>, ### Human:, ###Assistant:, \n\nHuman:"
).split(", ")


@pytest.mark.parametrize("reason, record", [
    ("needed are image, prompt, chosen", authors(chosen=None)),
    ("has the fields id, chosen, rejected; needed are", {"id": 1, "chosen": ["A"], "rejected": ["B", "C"]}),
    ("is [1], not an object with fields", [1]),
    ("'chosen': is 3, not text", authors(chosen=3)),
    ("'rejected': has no text", authors(rejected=" \n")),
    ("'chosen': 'utf-8' codec can't encode character", authors(chosen="A \ud800 cat.")),
    ("'chosen' and 'rejected' are equal", authors(rejected="A cat. ")),
    ("'rejected' must end in an assistant message of text", authors(rejected="An <image>")),
    ("'chosen' must end in an assistant", MESSAGES | {"chosen": [message("user", "A cat.")]}),
    ("each is one response, or a conversation", NO_PROMPT | {"rejected": [SYSTEM, *MESSAGES["rejected"]]}),
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
        prompt={"role": "user", "content": [{"type": "image", "image": "b.png"}]})),
    ("shows 1 images, the record has 2", authors(img_path=["a.png", "a.png"])),
    ("shows 2 images, the record has 1", TURNS | {"images": ["a.png"]}),
    # Images.
    ("has no image path", authors(img_path=None)),
    ("no image 'merged_images'", authors(img_path="merged_images")),
    ("convert.py makes files of embedded ones", authors(img_path="iVBOR" * 200)),
    ('an image is {"bytes": "/9j/", "path": null}', authors(img_path={"bytes": "/9j/", "path": None})),
    ("broken.png cannot be decoded", authors(img_path="broken.png")),
    ("has 1 images and 2 rejected images", authors(rejected_images=["a.png", "a.png"])),
    ("has 2 images and 1 rejected images", authors(img_path=["a.png"] * 2, rejected_image="b.png")),
    ("no image 'no.png'", authors(rejected_image="no.png")),
    ("broken.png cannot be decoded", authors(rejected_image="broken.png")),
    # CoPO would compare a log-probability with itself: loss/conditional is ln 2 for ever.
    ("rejected image is the image", authors(rejected_image="same.bmp")),
    # Marks of other tools would be trained on as text, beside an image that stands elsewhere.
    *((f"'prompt': holds {mark!r}, a control token", authors(prompt=f"Hi.{mark}\nWhat?")) for mark in MARKS),
    ("'prompt': holds 'ASSISTANT:'", authors(prompt="USER: q1 ASSISTANT: a1 USER: q2 ASSISTANT:")),
    # ESC clears the screen or moves what was said: an error that nobody sees.
    (r"(id \x1b[2J): no image '\\x1b[31m\\x07.png'", authors(id="\x1b[2J", img_path="\x1b[31m\x07.png")),
])  # fmt: skip
def test_bad_records_are_all_reported_with_number_and_reason(folder, reason, record):
    """One of them stops the run before the model is loaded, and says which it is, in few words."""
    with pytest.raises(BadInput) as error:
        read(folder, authors(), record, record)
    lines = str(error.value).split("\n")[1:]
    assert [line[:10] for line in lines] == ["  record 2", "  record 3"]
    assert all(reason in line and len(line) < 400 and line.isprintable() for line in lines)


def test_control_tokens_of_the_model_are_bad_but_not_think_tags_or_an_end(folder, qwen, llavas, bunnys):
    """A text that went through a chat template already would hold a turn inside the turn."""
    started = authors(rejected="<|vision_start|>What?")
    assert "'rejected': holds '<|vision_start|>'" in refusal(folder, started, processor=qwen)
    ended = authors(prompt="What?</s>")  # which has no form of an image mark
    assert "'prompt': holds '</s>'" in refusal(folder, ended, processor=llavas)
    table = authors(chosen="a" + "\t" * 9 + "b")  # nine tabs are Bunny's image token
    assert r"'chosen': holds '\t\t\t\t\t\t\t\t\t', a control" in refusal(folder, table, processor=bunnys)
    thinking, eos = copy.deepcopy(qwen), qwen.tokenizer.eos_token
    tags = [tokenizers.AddedToken(tag, special=True) for tag in ("<think>", "</think>")]
    thinking.tokenizer.add_tokens(tags, special_tokens=True)
    thinking.tokenizer.add_tokens(["    "])  # as Phi's, of code
    good = authors(prompt="What <think>?", chosen=f"<think>\n    A guess.</think> Yes.{eos}", rejected="No.")
    assert read(folder, good, processor=thinking)


def test_image_tokens_of_each_family_in_a_text_are_bad(family, folder):
    """They would be taken for an image, or for a video, and stop the run."""
    *_, processor = family
    parts = itertools.product((processor, processor.tokenizer), ("image", "boi", "video"))
    tokens = {getattr(part, f"{kind}_token", None) for part, kind in parts} - {None}
    assert processor.image_token in tokens
    for token, field in itertools.product(tokens, ("prompt", "chosen", "rejected")):
        if (field, token) != ("prompt", "<image>"):  # which stands for images there
            record = authors(prompt="What?") | {field: f"Is {token}{token} it?"}
            assert f"'{field}'" in refusal(folder, record, processor=processor)


def row_text(processor, question, images=1):
    """The row of y_w as text, image tokens as one."""
    image = [noise(1)] * images
    batch = make_batch([pair(question, "A cat.", "No.", image, image)], processor)
    text = processor.tokenizer.decode(batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0])
    return re.sub(f"({re.escape(processor.image_token)})+", "<image>", text)


def test_a_system_text_around_a_question_is_kept_if_the_model_knows_it(folder, bunnys, llavas, qwen, capsys):
    """LLaVA-1.5 was tuned with it, and its hub template does not add it. Elsewhere it would take the place of
    the model's own, and answers are asked for without it."""
    for processor in bunnys, llavas:
        question = read_one(folder, authors(), processor=processor).question
        assert row_text(processor, question).count(f"{train.BUNNY_SYSTEM} USER: <image>") == 1
    # To Bunny, whose template writes it by itself, the same row.
    assert row_text(bunnys, question) == row_text(bunnys, question[1:])
    assert [len(one.question) for one in read(folder, PLAIN, authors(), processor=qwen)] == [1, 1]
    assert "left out 1 system texts around USER: ... ASSISTANT:" in capsys.readouterr().out
    assert "Be rude. USER: <image>" in row_text(llavas, read_one(folder, RUDE, processor=llavas).question)


def test_a_run_knows_the_system_text_of_its_data(folder, llavas):
    """Answers are asked for with it: without, they would be to prompts that it never saw."""
    cases = (([authors()] * 2, train.BUNNY_SYSTEM), ([authors(), RUDE], ""), ([authors(prompt="?")], ""))
    for records, system in cases:
        args, examples = arguments(folder, records), read(folder, *records, processor=llavas)
        known = train.identity(args, examples, torch.nn.Linear(1, 1), mdpo.mdpo_loss)
        assert known["system"] == system


def test_a_system_message_is_written_once_or_the_record_is_bad(folder, qwen):
    """Some templates have no place for it, and drop it in silence."""
    question, processor = read_one(folder, TURNS, processor=qwen).question, copy.copy(qwen)
    assert row_text(qwen, question, 2).count("Be brief.") == 1
    twice = "{% for message in [messages[0]] + messages %}"
    dropped = "{% for message in messages if message.role != 'system' %}"
    for loop in twice, dropped:
        processor.chat_template = families.QWEN.replace("{% for message in messages %}", loop)
        assert "no place for a system text" in refusal(folder, TURNS, processor=processor)


def test_a_pair_that_is_equal_once_it_is_cut_is_bad(folder, bunnys):
    """DPO's margin would be 0 for ever, and AdamW would scale its rounding noise."""
    for reason, chosen, rejected in (
        ("equal in the tokens of --max-length 100", LONG + "Yes.", LONG + "No."),
        ("equal in the tokens of --max-length 100", "Yes.<|endoftext|> Or no.", "Yes.<|endoftext|> Or so."),
        ("'chosen' is empty before its end-of-sequence", "<|endoftext|>Yes.", "No."),
    ):
        record = authors(chosen=chosen, rejected=rejected)
        assert reason in refusal(folder, record, processor=bunnys, max_length=100)


def test_responses_that_are_cut_are_counted_and_one_that_just_fits_is_not(folder, bunnys):
    """They lose their end: the model would learn never to stop. Who makes room sees when it is enough."""
    changes = {"chosen": LONG}, {"rejected": LONG}, {"chosen": LONG, "rejected": "x" + LONG}
    said = said_of(folder, *(authors(**of) for of in changes), processor=bunnys, max_length=100)
    assert "4 responses are cut at --max-length 100" in said
    record = authors(rejected="No.")
    prompt, response = map(int, re.findall("longest ([0-9]+)", said_of(folder, record, processor=bunnys)))
    for max_length, n_cut in (prompt + response, 0), (prompt + response - 1, 1):
        said = said_of(folder, record, processor=bunnys, max_length=max_length)
        assert f"{n_cut} responses are cut at" in said


def test_counts_are_of_what_they_say(folder, bunnys):
    """Medians, not means; bad records are not left out for their ids; both answers' ends count, each."""
    eos = bunnys.tokenizer.eos_token
    good = [authors(id=n, chosen="A" + " cat" * 8 * n + eos, rejected=f"A{eos} dog.") for n in (1, 10, 100)]
    others = authors(id="1 too", chosen=""), authors(id="other")
    said = said_of(folder, *good, *others, processor=bunnys, subset="1", skip_bad=True)
    assert "left out 1 records" in said and "at --max-length 2048\n  6 responses end at an end" in said
    batch = make_batch([*Pairs(read(folder, *good))], bunnys, DPO_NAMES)
    lengths = sorted((batch.labels >= 0).sum(1).tolist())
    assert f"responses: median {(lengths[2] + lengths[3]) / 2:.0f} tokens, longest {lengths[-1]}" in said


def test_a_template_that_loses_an_image_is_found_when_the_data_are_read(folder, llavas):
    """The run would stop hours in, at the batch that holds the conversation. Texts do not matter to it."""
    image, processor = "('<image>\n' if message == messages[0] else '')", copy.copy(llavas)
    processor.chat_template = families.template(image, "[{{ message.role }}]", "</s>", "[assistant]")
    first, answer = message("user", "IMAGE", 'Say: "text": "'), message("assistant", "\\")
    turns = [first, answer, message("user", "And", "IMAGE", "this?")]
    assert read(folder, authors(prompt=[first]), processor=processor)
    assert refusal(folder, authors(prompt=turns, img_path=["a.png", "a.png"]), processor=processor)


def test_the_check_of_the_room_counts_each_prompts_own_images(folder, bunnys, llavas, qwen):
    """The run would stop hours in, at the first batch with a long prompt, or with a large rejected image."""
    noise(4, (320, 320)).save(folder / "large.png")
    records = [authors(id=id, rejected="No.", prompt="What?", img_path=images.split())
               for id, images in (("one", "a.png"), ("two", "a.png b.png"), ("other", "b.png"))]  # fmt: skip
    records += [records[0] | {"id": "own", "rejected_image": "large.png"}]
    least = authors(id="least", rejected="No.", prompt="?")
    for processor in bunnys, llavas, qwen:
        needs = {}
        for one in Pairs(read(folder, *records)):
            labels = make_batch([one], processor).labels
            start = (labels >= 0).int().argmax(1).max().item()
            alike = os.path.commonprefix([ids[ids >= 0].tolist() for ids in labels[:2]])  # a space
            needs[one.id] = start + len(alike) + 1
        for max_length in {n + more for n in needs.values() for more in (-1, 0)}:
            kept = read(folder, least, *records, processor=processor, max_length=max_length, skip_bad=True)
            assert [e.id for e in kept] == ["least", *(id for id, n in needs.items() if n <= max_length)]


def test_max_pixels_is_of_the_check_and_of_all_pairs(folder, qwen):
    """A prompt that fits would be refused, or images be trained on that are larger than the checked ones."""
    for name in "abc":
        noise(ord(name), (320, 320)).save(folder / f"{name}.png")
    records = authors(), authors(img_path="b.png", rejected_image="c.png")
    flags = "--eval-size", "1", "--max-length", "30"
    with pytest.raises(BadInput, match="no room for a response; images add 8, "):  # 3 x 3, less a placeholder
        train.read_pairs(arguments(folder, records, *flags), qwen)
    for (one,) in train.read_pairs(arguments(folder, records, *flags, "--max-pixels", "784"), qwen):
        assert one.images[0].size == one.images_rejected[0].size == (28, 28)


def test_the_check_processes_one_image_of_each_size(folder, bunnys, monkeypatch):
    """Resizing pixels that nobody looks at took most of the check's time, minutes for 10,000 records."""
    data.n_image_tokens.cache_clear()  # of other tests
    calls = counted(monkeypatch, type(bunnys.image_processor), "__call__")
    records = [authors(id=i, img_path=("a.png", "b.png")[i % 2], rejected_image=MERGED) for i in range(20)]
    assert len(read(folder, *records, processor=bunnys)) == 20 and 0 < len(calls) <= 4


def test_a_tokenizer_that_adds_an_end_is_refused(llava):
    """Two ends would be scored, the second after the answer is over. A padding token of its own stays."""
    processor = train.load_processor(str(llava))
    assert processor.tokenizer.pad_token == "<pad>"
    processor.tokenizer.add_eos_token = True
    for template in processor.chat_template, CHAT.replace("IMAGE", "<image>").replace("END", "!"):
        processor.chat_template = template
        with pytest.raises(BadInput, match="adds an end-of-sequence"):
            make_batch([pair("Which?", "No.", "Yes.", noise(1), noise(2))], processor)


@pytest.mark.parametrize("n, expected", [
    (1, {"012", "34", "5"}), (2, {"012", "34", "0125", "345"}), (3, {"012", "0125", "01234", "345"}),
    (4, {"0125", "01234", "none left"}), (5, {"01234", "none left"}),
])  # fmt: skip
def test_held_out_examples_share_no_image_with_training(n, expected):
    """Four questions about one image, one of them held out, measure memory. Images link examples, own
    rejected ones too: here 0-1-2 by a and b, 3-4 by the rejected image d, 5 alone."""
    images, own = ("a", "ab", "b", "c", "e", "f"), ("", "", "", "d", "d", "")
    examples, seen = [Example("q", "y", "n", (*images[i],), (*own[i],), str(i)) for i in range(6)], set()
    for seed in range(60):
        try:  # whole groups, in any order, until there are n
            training, held_out = train.hold_out(examples, n, seed)
            assert training == [one for one in examples if one not in held_out]
            seen.add("".join(one.id for one in held_out))
        except BadInput as error:
            assert "leaves none of 6" in str(error)
            seen.add("none left")
    assert seen == expected


def test_random_rejected_images_of_training_are_none_of_the_held_out(folder):
    """Held-out images would be trained on."""
    records = [authors(img_path=name) for name in ("a.png", "b.png", "same.bmp", MERGED)]
    args = arguments(folder, records, "--eval-size", "1", "--reject", "random")
    pairs, held_out = train.read_pairs(args, None)
    assert {*pairs.pool} == {*held_out.pool} - {*held_out.examples[0].images}
    assert len(pairs.pool) == 3 and len(held_out.pool) == 4


def ids_of(args):
    """Those of training and of held-out examples."""
    return [[example.id for example in pairs.examples] for pairs in train.read_pairs(args, None)]


def test_a_resumed_run_drops_what_it_dropped_and_checks_nothing_else(folder):
    """With an example more, every later batch is another. Without --skip-bad nothing was bad."""
    records = [authors(id=1), authors(id=2, img_path="broken.png")]
    assert ids_of(arguments(folder, records, "--skip-bad", resume="r")) == [["1"], []]
    assert ids_of(arguments(folder, records, resume="r")) == [["1", "2"], []]
    with pytest.raises(BadInput, match="broken.png cannot be decoded"):
        ids_of(arguments(folder, records))


def test_samples_and_subsets_are_of_the_training_data_and_eval_data_come_beside(folder):
    """Five seeds on one sample would show less spread than there is. --eval-data is a file of its own, all of
    it; with --eval-size, one of the two sets would be lost in silence."""
    records = [authors(id=f"llava-{n}") for n in range(9)]
    drawn = [f"llava-{n}" for n in sorted(random.Random(1).sample(range(9), 3))]
    mine = ["--eval-data", write(folder / "eval.json", [authors(id=f"mine-{n}") for n in range(4)])]
    sample = arguments(folder, records, "--subset", "llava", "--limit", "3", "--seed", "1", *mine)
    assert ids_of(sample) == [drawn, [f"mine-{n}" for n in range(4)]]
    two = [authors(id="a"), authors(id="b", img_path=MERGED)]
    (trained,), held_out = ids_of(arguments(folder, two, "--eval-size", "1", *mine))
    assert {trained, held_out[0]} == {"a", "b"} and len(held_out) == 5


def test_flags_that_do_nothing_are_refused(folder):
    """A user who gives one believes that it works."""
    own, flags = authors(rejected_image="b.png"), ("--reject", "moco")
    with pytest.raises(BadInput, match="--reject moco does nothing: every record has rejected images"):
        ids_of(arguments(folder, [own] * 3, *flags))
    assert ids_of(arguments(folder, [own, authors()], *flags)) == [["1", "2"], []]


def test_a_cpu_trains_a_large_model_only_if_it_is_asked_to(bunny, folder, capsys, monkeypatch):
    """Under an old driver torch sees no GPU: a 3B model would train for weeks, and say nothing."""
    argv = command(bunny, write(folder / "x.json", [authors()] * 4), folder / "out", "--epochs", 1)
    n_parameters = 501_000_000
    for kind in torch.nn.Module, train.transformers.PreTrainedModel:
        monkeypatch.setattr(kind, "num_parameters", lambda self: n_parameters, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    undecided = [word for word in argv if word not in ("--device", "cpu")]
    assert "--device cpu" in one_line_of(capsys, train.main(undecided)) and train.main(argv) == 0
    n_parameters = 500_000_000
    assert train.main([*undecided, "--out", str(folder / "small")]) == 0


def test_torchrun_of_train_py_is_refused(monkeypatch):
    """Each process would train the same run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="torchrun examples/trl_mdpo.py"):
        train.load_policy(None, None, None)


def test_a_wrong_argument_is_one_sentence_that_says_what_is_wanted(bunny, folder):
    """A library's error from five calls below says nothing to who copies a function."""
    model, processor = train.load_model(str(bunny))
    examples = read(folder, authors())
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


@pytest.mark.parametrize(
    "kind", "AVIF-RGB BMP-1 GIF-P JPEG-CMYK JPEG2000-LA MPO-RGB PNG-RGBA PPM-L TIFF-CMYK WEBP-RGB".split()
)
def test_every_picture_format_and_mode_is_read_as_rgb(tmp_path, kind):
    """Of a format that is missing, all are bad records; a wrong channel count kills the run hours in."""
    format, mode = kind.split("-")
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    more = {"save_all": True, "append_images": [noise(2)]} if format == "MPO" else {}
    noise(1).convert(mode).save(tmp_path / "x", format, **more)
    image, opened = Image.open(tmp_path / "x"), open_image(tmp_path / "x")
    assert image.format == format and opened.mode == "RGB"
    assert opened.tobytes() == image.convert("RGB").tobytes()


def test_what_is_transparent_is_white(tmp_path):
    """Black ink on transparency, as formulas and charts have it, would become all black."""
    image = Image.new("RGBA", (2, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255)])
    for form in image, image.convert("LA"), image.quantize(2):
        form.save(tmp_path / "a.png")
        assert [*open_image(tmp_path / "a.png").tobytes()] == [255] * 3 + [0] * 3, form.mode


@pytest.mark.parametrize("name, mode, levels, shown", [
    ("x.tif", "I;16", (4095, 2048, 0), [255, 128, 0]),
    ("x.tif", "I;16", [4096], [16]),  # more than 12 bits, and a sixteenth of the way
    ("x.png", "I;16", (65535, 32768, 0), [255, 128, 0]),
    ("x.tif", "I;16B", (65535, 32768, 0), [255, 128, 0]),
    ("x.tif", "F", (1.0, 0.5, 0.0), [255, 128, 0]),
    ("x.tif", "F", (4.0, 0.0, -4.0), [255, 128, 0]),
    ("x.tif", "F", [0.5], [0]),
    ("x.tif", "I", (200_000_000, 100_000_000, 0), [255, 128, 0]),
])  # fmt: skip
def test_levels_of_12_and_16_bits_and_of_floats_are_scaled(tmp_path, name, mode, levels, shown):
    """Cut off at 255, or divided by 65,536, scans and depth maps would be all white or all black."""
    image = Image.new(mode, (1, len(levels)))
    image.putdata(levels)
    image.save(tmp_path / name)
    assert [*open_image(tmp_path / name).tobytes()[::3]] == shown


def empty(width, height):
    """A PGM file that says how large it is, and holds no pixels."""
    return f"P5 {width} {height} 255\n".encode()


@pytest.mark.parametrize("reason, content", [
    ("10001 x 10000 pixels: .*, or more than 100 million pixels", empty(10_001, 10_000)),
    ("1 x 51 pixels: sides differ", empty(1, 51)),
    ("5001 x 100 pixels: sides differ", empty(5001, 100)),
    ("truncated", empty(10_000, 10_000)),
    ("truncated", empty(50, 1)),
    # A depth map, as a PFM file: scaled by one level that is infinite, the rest would be black.
    *(("levels are not finite", b"Pf 2 1 -1.0\n" + struct.pack("<2f", level, 0.5))
      for level in (math.nan, math.inf, -math.inf)),
    # It is a program, and Pillow would start Ghostscript to run it.
    ("EPS is none of", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
])  # fmt: skip
def test_images_that_are_no_photographs_are_bad(folder, reason, content):
    """A bomb of a few bytes decodes to gigabytes. A limit that is off by ten drops a phone's photographs."""
    (folder / "a.png").write_bytes(content)
    assert re.search(f"a.png cannot be decoded: .*({reason})", refusal(folder, authors()))


def test_exif_rotation_is_applied(tmp_path):
    """A phone's picture lies on its side otherwise. It is scaled as it is shown."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    noise(1, (400, 100)).save(tmp_path / "x.jpg", exif=exif)
    sizes = [open_image(tmp_path / "x.jpg", max_pixels).size for max_pixels in (None, 90_000, 10_000)]
    assert sizes == [(100, 400), (100, 400), (50, 200)]


@pytest.mark.parametrize("error, reason", [
    (MemoryError, "^$"), (torch.OutOfMemoryError, "^$"), (ValueError, "a.png cannot be decoded: ValueError$")
])  # fmt: skip
def test_full_memory_is_no_bad_record_and_an_error_without_words_is_named(folder, monkeypatch, error, reason):
    """Dropped by --skip-bad, good records would be lost. "a.png cannot be decoded:" alone helps nobody."""
    monkeypatch.setattr(Image, "open", mock.Mock(side_effect=error))
    with pytest.raises(error, match=reason):
        read(folder, authors())


def test_a_gpu_that_cannot_be_used_is_said_and_other_warnings_are_not():
    """Under an old driver torch warns once, and then there is no GPU: the warning was swallowed."""

    def command(argv):
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        warnings.warn("a library was renamed", stacklevel=1)
        return 0

    with pytest.warns() as said:
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


@pytest.mark.parametrize("strategy, area", [
    ("crop", (0.01, 0.2)), ("crop", (0.3, 0.5)), ("crop", (1e-4, 1e-3)), ("moco", None)
])  # fmt: skip
@pytest.mark.parametrize("size", [(125, 100), (250, 12), (12, 250), (6, 6)])  # long: no room for all aspects
def test_crop_is_even_in_area_and_place_and_moco_is_its_recipe(tmp_path, size, strategy, area):
    """Table 3 rests on how much is kept and changed: another range, share or order is another method. That
    seed, epoch and index alone decide is what resumed runs and DataLoader workers rest on."""
    gradient(*size, step=1).save(tmp_path / "a.png")
    options = {"crop": area} if area and area[1] != 0.2 else {}
    image, examples = open_image(tmp_path / "a.png"), read(tmp_path, *[authors()] * 3)
    pairs = Pairs(examples, strategy, seed=5, **options)
    for key in itertools.product(range(20), range(3)):
        rng, drawn = random.Random("5 {} {}".format(*key)), pairs[key]
        expected = crop_by_hand(image, rng, *area) if area else moco_by_hand(image, rng)
        assert drawn == examples[key[1]]._replace(images=(image,), images_rejected=(expected,), key=key)
    assert pairs[1] == pairs[0, 1]


@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES])
def test_a_record_may_bring_its_own_rejected_image(folder, record, capsys):
    """It takes the place of the strategy, in every format."""
    # The worse context differs in the second image alone.
    assert read(folder, authors(img_path=["a.png"] * 2, prompt="?", rejected_images=["a.png", MERGED]))
    for field in ({"rejected_image": "b.png"}, {"rejected_images": ["b.png"]}):
        own = read(folder, record | field)
        assert "1 different images; 1 examples have their own rejected" in capsys.readouterr().out
        for strategy in data.STRATEGIES:
            assert Pairs(own, strategy)[3, 0].images_rejected == (open_image(folder / "b.png"),)


def coloured(folder, *examples):
    """Examples of images that are one grey each: "12" has two, of levels 20 and 40."""
    for name in "123456":
        Image.new("L", (8, 8), 20 * int(name)).save(folder / f"{name}.png")
    return read(folder, *(authors(img_path=[f"{n}.png" for n in names], prompt="?") for names in examples))


def rejected_of(pairs, index, n):
    """The names of the rejected images of n epochs."""
    drawn = [pairs[epoch, index].images_rejected for epoch in range(n)]
    return ["".join(str(image.getpixel((4, 4))[0] // 20) for image in images) for images in drawn]


def test_random_image_is_another_file_whatever_its_path(tmp_path, monkeypatch):
    """Training and held-out data may name one folder in two ways: the image would be its own rejected one.
    Python's own order of a set is another in each process: a resumed run would draw other images."""
    monkeypatch.chdir(tmp_path)
    pairs = Pairs(coloured(tmp_path, *"654321") + coloured(Path(), *"123"), "random")
    assert pairs.pool == [str(tmp_path / f"{name}.png") for name in "123456"]


def test_random_image_is_any_other_and_each_as_likely(tmp_path):
    """Table 3's row. A file that serves several questions is one image for all that, and never its own."""
    examples = coloured(tmp_path, *"1112222234")
    seen = rejected_of(Pairs(examples, "random"), 1, 600)
    assert {*seen} == {*"234"} and seen == rejected_of(Pairs(examples, "random"), 1, 600)
    assert all(165 < seen.count(name) < 235 for name in "234")  # 200, give or take 3 standard deviations
    two = coloured(tmp_path, "1", "2", "12")
    for too_few, pool in (examples[:3], None), (two, None), (two[2:], two[:1]):
        with pytest.raises(BadInput, match="more different images"):
            Pairs(too_few, "random", pool=pool)
    # An example's second image is no other. Held-out examples take their images from the training data.
    examples = coloured(tmp_path, "12", "3", "4", "5")
    each = {first + second for first in "345" for second in "345"}  # each is drawn for itself
    assert {*rejected_of(Pairs(examples, "random"), 0, 200)} == each
    pooled = Pairs(examples[1:2], "random", pool=coloured(tmp_path, "36", "4"))
    assert {*rejected_of(pooled, 0, 50)} == {*"46"}


def test_random_image_is_centred_and_fitted_not_squashed(folder):
    """A fifth at the left and at the right is red, the middle green: in a.png's size, all of it is green."""
    wide = Image.new("RGB", (200, 64), (255, 0, 0))
    wide.paste((0, 255, 0), (40, 0, 160, 64))
    wide.save(folder / "wide.png")
    (rejected,) = Pairs(read(folder, authors(), authors(img_path="wide.png")), "random")[0].images_rejected
    assert rejected.size == (48, 32) and rejected.getcolors() == [(48 * 32, (0, 255, 0))]
