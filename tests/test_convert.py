"""Protects `examples/convert.py`: a mistake trains on the wrong image, question or answer without a sound."""

import base64
import hashlib
import io
import json
import re
import string
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
from data import read_examples, run_command
from examples import convert
from test_mdpo import asked


def picture(colour, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, kind)
    return file.getvalue()


RED, BLUE = picture("red"), picture("blue", "JPEG")
RED_PATH = f"images/{hashlib.sha256(RED).hexdigest()[:32]}.png"
BLUE_PATH = f"images/{hashlib.sha256(BLUE).hexdigest()[:32]}.jpg"
BASE64 = base64.b64encode(RED).decode()
RECORD = {"image": "img/0.png", "question": "Q", "chosen": "A", "rejected": "B"}
SHORT = {  # names that the tables below use: $PAIR is ...
    "IMG": '"image": "img/0.png"',
    "IMGS": '"images": ["img/0.png"]',
    "RED": '{"bytes": "RED", "path": "red.png"}',
    "PAIR": '"chosen": "A", "rejected": "B"',
    "ASKED": '"image": "img/0.png", "question": "Q"',
    "USER": '{"role": "user", "content": "Q"}',
    "A": '{"role": "assistant", "content": "A"}',
    "B": '{"role": "assistant", "content": "B"}',
    "HUMAN": '{"from": "human", "value": "Q"}',
    "GPT": '{"from": "gpt", "value": "A"}',
    "OTHER": '{"from": "gpt", "value": "B"}',
    "SYSTEM": '{"role": "system", "content": "Be brief."}',
    "TURNS": '{"role": "user", "content": "<image>Round?"}, {"role": "assistant", "content": "Yes."}',
    "TEXT": '{"type": "text", "text": "Q"}',
    "SHOWN": '{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}',
    "BUNNY": f"{train.BUNNY_SYSTEM} USER: <image>\\nQ ASSISTANT:",
    "BASE64": BASE64,
    "RED_PATH": RED_PATH,
    "BLUE_PATH": BLUE_PATH,
    "LONG": "QUJD" * 2000,
    "DEEP": "[" * 100_000,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the pictures that the records name."""
    monkeypatch.chdir(tmp_path)
    Path("img").mkdir()
    for name in ("img/0.png", "img/1.png", "llava-7.jpg"):
        Path(name).write_bytes(BLUE if name == "img/1.png" else RED)
    return tmp_path


def cases(text):
    """A table of `name: record -> what becomes of it` -> parameters of a test."""
    lines = re.sub(r"\n +", " ", string.Template(text).substitute(SHORT)).split("\n")[1:-1]
    found = [re.fullmatch("(.*?): (.*?) -> (.*)", line).groups() for line in lines]
    return [pytest.param(record, becomes, id=name) for name, record, becomes in found]


def write(*records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path("in.jsonl").write_text("\n".join(lines))


def run(*argv):
    return run_command(convert.run, [*argv])


def converted(*records):
    """The examples that a file of these records becomes."""
    write(*records)
    assert run("in.jsonl", "out") == 0
    return written()


def written():
    return [json.loads(line) for line in Path("out/data.jsonl").read_text().splitlines()]


# Records as published, and what they become: what differs from the plain RECORD with the id 1.
PUBLISHED = r"""
the authors': {"img_path": "img/0.png", "prompt": "$BUNNY", $PAIR} -> {"prompt": "$BUNNY"}
an id with half of a character: {"id": "\ud800", $ASKED, $PAIR} -> {"id": "\ud800"}
MIA-DPO: {"id": 7, "image": ["img/1.png", "img/0.png"], "question": "<image-placeholder> <image-placeholder>
    Q", $PAIR} -> {"id": "7", "images": ["img/1.png", "img/0.png"], "prompt": "<image> <image> Q"}
SeVa: {"question_id": 5, "image_id": "img/0.png", "question": "Q", "chosen": "A", "reject": "B"} -> {"id":
    "5"}
POVID, JSON in a string: {"id": "c7", "image": "./img/0.png", "conversations": "[{\"from\": \"human\",
    \"value\": \"<image>\\nQ\"}, {\"from\": \"gpt\", \"value\": \"A\"}]", "rejected_conversations": [{"from":
    "human", "value": "<image>\nQ"}, $OTHER]} -> {"id": "c7", "prompt": "<image>\nQ"}
RLHF-V: {"idx": 0, "image_path": "img/0.png", "origin_split": "{\"model\": \"muffin\"}", "text":
    "{\"chosen\": \"A\", \"question\": \"Q\", \"rejected\": \"B\"}"} -> {"id": "0"}
VLFeedback: {"id": "llava-7", "prompt": "Q", "completions": [{"response": "B", "annotations": {"Help":
    {"Rating": "1"}}}, {"response": "A", "annotations": {"Help": {"Rating": "5"}}}]} -> {"id": "llava-7",
    "images": ["llava-7.jpg"]}
VLFeedback as columns: {"id": "llava-7", "prompt": "Q", "completions": {"response": ["B", "A"], "annotations":
    {"Help": {"Rating": ["1", "5"]}}}} -> {"id": "llava-7", "images": ["llava-7.jpg"]}
LLaMA-Factory: {$IMGS, "conversations": [$HUMAN], "system": "Be brief.", "chosen": $GPT, "rejected": $OTHER}
    -> {"prompt": [$SYSTEM, $USER]}
Alpaca: {$IMGS, "instruction": "Say.", "input": "Q", "history": [["<image>Round?", "Yes."]], $PAIR} ->
    {"prompt": [$TURNS, {"role": "user", "content": "Say.\nQ"}]}
a history that the conversation holds, too: {$IMG, "system": "Be brief.", "history": [["<image>Round?",
    "Yes."]], "messages": [$TURNS, $USER, $A], "rejected_response": "B"} -> {"prompt": [$SYSTEM, $TURNS,
    $USER]}
a question that was asked before, a history of messages, ms-swift's response: {$IMG, "query": "Q", "history":
    [$HUMAN, $GPT], "response": "A", "rejected_response": "B"} -> {"prompt": [$USER, $A, $USER]}
ms-swift: {"images": "img/0.png", "messages": [$SYSTEM, $TURNS, $USER, $A], "rejected_messages": [$SYSTEM,
    $TURNS, $USER, $B], "rejected_images": ["img/1.png"]} -> {"prompt": [$SYSTEM, $TURNS, $USER],
    "rejected_images": ["img/1.png"]}
ms-swift's documentation, the image rejected: {$ASKED, "rejected_image": "img/0.png", $PAIR} -> {}
STIC: {$IMG, "chosen": [$USER, $A], "rejected": [$USER, $B]} -> {}
a prompt longer than the conversations: {$IMG, "prompt": [$TURNS, $USER], "chosen_conversations": [$USER, $A],
    "rejected": [$USER, $B]} -> {"prompt": [$TURNS, $USER]}
TRL: {$IMGS, "prompt": [{"role": "user", "content": [{"type": "image", "text": null}, $TEXT]}], "chosen":
    [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}], "rejected": [$B]} -> {"prompt":
    [$SHOWN]}
a data URI in a part: {"prompt": [{"role": "user", "content": [ {"type": "image_url", "image_url": {"url":
    "data:image/png;base64,$BASE64"}}, $TEXT]}], $PAIR} -> {"prompt": [$SHOWN], "images": ["$RED_PATH"]}
a prompt without the image that the turns have: {"prompt": "Q", "rejected": "B", "chosen_messages": [{"role":
    "user", "content": [{"type": "image", "image": "img/0.png"}, $TEXT]}, $A]} -> {"prompt": [$SHOWN]}
base64 in a list, and a list of nothing: {"images": [{"bytes": "$BASE64", "path": "x.png"}],
    "rejected_images": [null], "question": "Q", $PAIR} -> {"images": ["$RED_PATH"]}
empty fields and bytes cut short before an image: {"images": [], "image": {"bytes": "/9j/4AAQ", "path": null},
    "image_path": "img/0.png", "question": "Q", $PAIR} -> {}
a question beside a longer conversation: {$ASKED, "conversations": [$HUMAN, $GPT, {"from": "human", "value":
    "So?"}], $PAIR} -> {}
unused fields of any form: {$ASKED, $PAIR, "meta": {"from": "coco"}, "thumbnail": {"bytes": "AAAA"}, "note":
    "{\"question\": ", "hash": "/9j/$LONG", "messages": [{"from": "coco"}], "completions": [1], "text":
    "$DEEP", "data": "coco", "train": "yes"} -> {}
conversations as columns: {$IMG, "conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}, "rejected":
    "B"} -> {}
messages and their parts as columns: {"messages": {"role": ["user"], "content": [{"type": ["image", "text"],
    "text": [null, "Q"], "image": ["img/0.png", null]}]}, $PAIR} -> {"prompt": [$SHOWN]}
an answer that is a conversation of the user's: {$ASKED, "chosen": "[{\"role\": \"user\", \"content\":
    \"Hi\"}]", "rejected": "B"} -> {"chosen": "[{\"role\": \"user\", \"content\": \"Hi\"}]"}
an answer that is an object: {$ASKED, "chosen": "{\"question\": \"What?\"}", "rejected": "B"} -> {"chosen":
    "{\"question\": \"What?\"}"}
an answer that is a table: {$ASKED, "chosen": "[[\"red\", \"1\"]]", "rejected": "B"} -> {"chosen":
    "[[\"red\", \"1\"]]"}
an answer in quotes, and one that is a number: {$ASKED, "chosen": "\"It is red.\"", "rejected": "42"} ->
    {"chosen": "\"It is red.\"", "rejected": "42"}
a message as JSON: {$ASKED, "chosen_response": "{\"from\": \"gpt\", \"value\": \"A\"}", "rejected": "B"} -> {}
"""


@pytest.mark.parametrize("record, becomes", cases(PUBLISHED))
def test_published_record(folder, record, becomes):
    """The project reads what is written. JSON in a text may be messages, or the answer to a question."""
    plain = {"id": "1", "images": ["img/0.png"], "prompt": "Q", "chosen": "A", "rejected": "B"}
    plain |= json.loads(becomes)
    for name in {"images", "rejected_images"} & {*plain}:  # files by absolute paths
        plain[name] = [path if path == RED_PATH else str(folder / path) for path in plain[name]]
    assert converted(record) == [plain]
    assert [example.chosen for example in read_examples("out/data.jsonl")] == [plain["chosen"]]


LEFT_OUT = r"""
HA-DPO: {$ASKED, "chosen": ["A", "C"], "rejected": ["B", "D"]} -> several answers
several answers, the first alike: {$ASKED, "chosen": ["A", "C"], "rejected": ["A", "D"]} -> roles
OPA-DPO: {"queries": "Q", "standard_response": "A"} -> which OPA-DPO's own script makes, in the fields
    queries, standard_response
no rejected answer: {"messages": [$USER, $A], "image": "data:image/png;base64,$BASE64"} -> no or an empty
    image, question or answer in the fields mess
no chosen answer: {$IMG, "messages": [$USER], "rejected": "B"} -> 'chosen' must end in an assistant
no question: {$IMG, $PAIR} -> question or answer in the fields image, chosen, rejected
only a system text: {$IMG, "messages": [$SYSTEM], $PAIR} -> user last
a prompt of white space: {$ASKED, "prompt": "  ", $PAIR} -> no text
equal answers: {$ASKED, "chosen": "A", "rejected": " A"} -> equal
a rejected conversation that ends in a question: {$ASKED, "chosen": [$USER, $A], "rejected": [$USER, $USER]}
    -> must end in an assistant
an answer with an image: {$ASKED, "chosen": "<ImageHere>A", "rejected": "B"} -> an assistant
other turns before: {$IMG, "chosen": [$USER, $A], "rejected": [$SYSTEM, $B]} -> before their last turn
a message without text: {$ASKED, "chosen": {"from": "gpt"}, "rejected": "B"} -> 'chosen': has no 'value'
no image: {"question": "Q", $PAIR} -> an empty image
one of two missing beside another field: {"images": ["img/0.png", "img/9.png"], "image": "img/1.png",
    "question": "Q", $PAIR} -> no such image 'img/9.png'
an image of nothing among others: {"images": [null, "img/1.png"], "question": "Q", $PAIR} -> an empty image
a rejected image of nothing among others: {"images": ["img/0.png", "img/1.png"], "rejected_images":
    ["img/1.png", ""], "question": "Q", $PAIR} -> an empty image
bytes of no image: {"image": "data:image/png;base64,$LONG", "question": "Q", $PAIR} -> no image itself
two images, one rejected: {"images": ["img/0.png", "img/0.png"], "rejected_image": "img/1.png", "question":
    "Q", $PAIR} -> 2 images and 1 rejected images
ms-swift's video: {$IMGS, "messages": [{"role": "user", "content": "<image><video>Q"}, $A], "videos":
    ["v.mp4"], "rejected_response": "B"} -> holds '<video>'
a part out of a template: {$IMG, $PAIR, "prompt": [{"role": "user", "content": [{"type": "text", "text":
    "<|im_start|>Q"}]}]} -> holds '<|im_start|>'
an answer out of Gemma's: {$ASKED, "chosen": "A", "rejected": "B<start_of_turn>"} -> '<start_of_turn>'
an answer out of Llama's: {$ASKED, "chosen": "<|start_header_id|>A", "rejected": "B"} -> '<|start_header_id|>'
an answer out of a template: {$ASKED, "chosen": "A", "rejected": "B[/INST]"} -> holds '[/INST]'
an earlier turn out of a template: {$ASKED, "history": [["[INST] Q", "Yes."]], $PAIR} -> holds '[INST]'
a lone surrogate: {$IMG, "question": "\ud800$LONG", $PAIR} -> character '\ud800' in position 0
control characters: {"\u001b[31m": "Q"} -> fields \x1b[31m
not an object: 7 -> is 7, not an object
a number as answer: {$ASKED, "chosen": 5, "rejected": "B"} -> 'chosen': is 5, not text
a missing value of pandas as answer: {$ASKED, "chosen": "A", "rejected": NaN} -> 'rejected': is NaN, not text
"""


@pytest.mark.parametrize("record, reason", cases(LEFT_OUT))
def test_left_out_with_the_reason(folder, capsys, record, reason):
    """Among good records, a bad one is counted and named by number, never trained."""
    assert [example["id"] for example in converted(RECORD, record, RECORD, record)] == ["1", "3"]
    out = capsys.readouterr().out
    assert not [*Path("out/images").iterdir()]  # or a data set without rejected answers would fill the disk
    assert "2 examples of 4 records" in out and "left out 2: record 2: " in out and reason in out
    assert max(map(len, out.splitlines())) < 400


@pytest.mark.parametrize("kind, image", [
    ("JPEG", base64.urlsafe_b64encode(picture("red", "JPEG")).decode().rstrip("=")),
    ("TIFF", "data:;base64," + base64.b64encode(picture("red", "TIFF")).decode()),
    ("WEBP", {"bytes": [*picture("red", "WEBP")], "path": None}),
])  # fmt: skip
def test_embedded_image(folder, kind, image):
    """Whatever its format and its encoding, the bytes of the image are written as they were."""
    (path,) = converted(RECORD | {"image": image})[0]["images"]
    assert Path("out", path).read_bytes() == picture("red", kind)
    assert path.endswith(kind.lower().replace("jpeg", "jpg"))


@pytest.mark.parametrize("content", [
    "\ufeff" + json.dumps([RECORD, RECORD]),
    json.dumps({"version": 1, "data": [RECORD, RECORD]}, indent=1),
    json.dumps({"test": [{}], "train": [RECORD, RECORD]}),
])  # fmt: skip
def test_layouts_of_json(folder, content):
    """Published files differ in it: none of their records may be lost."""
    assert [example["id"] for example in converted(content)] == ["1", "2"]


def test_broken_lines_are_left_out(folder, capsys):
    """A damaged line takes no other line with it."""
    cut = json.dumps(RECORD)[:45]
    assert [example["id"] for example in converted(RECORD, cut, RECORD, "{]", cut, RECORD)] == ["1", "3", "6"]
    out = capsys.readouterr().out
    assert "left out 3: record 2: not valid JSON: Unterminated string starting at: line 1 column 41" in out


@pytest.mark.parametrize("content, says", [
    (b"\x1f\x8b\x08", "a gzip file: unpack it"),
    (b"[{}, {}]\n[{}]", "not valid JSON: Extra data: line 2 column 1"),
    (b"PAR1", "datasets"),
])  # fmt: skip
def test_other_files_are_named_in_one_line(folder, monkeypatch, capsys, content, says):
    """Thousands of bad lines would not say what is wrong. JSON does not need `datasets`, parquet does."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    Path("in.x").write_bytes(content)
    assert run("in.x", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: in.x: ") and error.count("\n") == 1 and says in error


@pytest.mark.parametrize("name", ["silkie.json", "data/silkie.json"])
def test_a_file_that_is_not_there(folder, monkeypatch, capsys, name):
    """A slip of the pen is called that, also where it looks like a name of the hub."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(name, "out") == 2
    assert f"error: {name}: no such file" in capsys.readouterr().err and not Path("out").exists()


HUB = r"""
RLAIF-V: {"image": $RED, "question": "Q", "image_path": "red.jpg", "idx": 40, $PAIR} -> {"id": "40"}
TRL's: {"images": [$RED], "chosen": [$A], "rejected": [$B], "prompt": [{"role": "user", "content":
    [{"type": "image", "text": null}, $TEXT]}]} -> {}
messages with images: {"chosen": [$A], "rejected": [$B], "prompt": [{"role": "user", "content": [ {"type":
    "image", "text": null, "image": $RED}, {"type": "image", "text": null, "image": {"bytes": "BLUE", "path":
    null}}, {"type": "text", "text": "Q", "image": null}]}]} -> {"images": ["$RED_PATH", "$BLUE_PATH"]}
"""


def embedded(value):
    """Bytes in the place of their names."""
    return value | {"bytes": {"RED": RED, "BLUE": BLUE}[value["bytes"]]} if "bytes" in value else value


def write_parquet(path, record):
    datasets = pytest.importorskip("datasets")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list([json.loads(record, object_hook=embedded)])
    for name, kind in ("image", datasets.Image()), ("images", [datasets.Image()]):
        table = table.cast_column(name, kind) if name in table.column_names else table
    table.to_parquet(path)


@pytest.mark.parametrize("record, becomes", cases(HUB))
def test_parquet(folder, record, becomes):
    """Embedded images are written untouched, wherever they stand, and go with their own question."""
    write_parquet("in.parquet", record)
    assert run("in.parquet", "out") == 0
    (made,), (example,) = written(), read_examples("out/data.jsonl")
    expected = {"id": "1", "images": [RED_PATH], "chosen": "A", "rejected": "B"} | json.loads(becomes)
    assert made == {"prompt": made["prompt"]} | expected
    for path in made["images"]:
        assert Path("out", path).read_bytes() == {RED_PATH: RED, BLUE_PATH: BLUE}[path]
    assert example.question == asked("Q", len(made["images"]))


def test_a_name_of_the_hub(folder):
    """The library takes a folder laid out as on the hub in the place of a name."""
    record = '{"question": "Q", "image": {"bytes": "BLUE", "path": null}, "chosen": "A", "rejected": "B"}'
    for shard in range(2):
        write_parquet(f"owner/name/data/train-0000{shard}-of-00002.parquet", record)
    assert run("owner/name", "out") == 0
    assert [example["images"] for example in written()] == [[BLUE_PATH]] * 2
    assert run("owner/name", "other", "--split", "test") == 2


@pytest.mark.parametrize("stop", [1, 4])
def test_continues_where_it_was_stopped(folder, monkeypatch, stop):
    """Stopped anywhere, even within a character, it writes what it writes in one go, and converts nothing
    twice. A result that was removed, or whose line was damaged, is made again."""
    write(RECORD, RECORD, RECORD | {"image": BASE64}, RECORD, RECORD)
    assert run("in.jsonl", "whole") == 0
    seen, kept, log, real = [], [], Path("out/converted.jsonl"), convert.convert

    def stopping(record, number, *others):
        seen.append(number)
        kept.append(log.read_bytes().count(b"\n"))  # records that a kill would leave
        if number == stop == len(seen):
            raise KeyboardInterrupt
        return real(record, number, *others)

    monkeypatch.setattr(convert, "convert", stopping)
    assert run("in.jsonl", "out") == 130 and not Path("out/data.jsonl").exists()
    assert kept == [*range(stop)]
    log.write_bytes(log.read_bytes() + '\n{"é'.encode()[:-1])
    assert run("in.jsonl", "out") == 0
    assert seen == [*range(1, stop + 1), *range(stop, 6)]
    Path("out/data.jsonl").unlink()
    log.write_bytes(log.read_bytes()[:-9] + bytes(9))
    assert run("in.jsonl", "out") == run("in.jsonl", "out") == 0 and seen[6:] == [5]  # all else is there
    assert Path("out/data.jsonl").read_bytes() == Path("whole/data.jsonl").read_bytes()


@pytest.mark.parametrize("image, embedded", [("img/0.png", []), (BASE64, [RED])])
def test_a_full_disk_leaves_no_half_result(folder, monkeypatch, image, embedded):
    """The user makes room, and the same command goes on."""
    write(RECORD | {"image": image})
    real = Path.write_bytes

    def full(path, content):
        real(path, content[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert run("in.jsonl", "out") == 2
    assert run("in.jsonl", "out") == 0 and len(written()) == 1
    assert [path.read_bytes() for path in Path("out/images").iterdir()] == embedded


def test_nothing_that_is_there_is_overwritten(folder, capsys):
    """Neither a user's folder, nor a result that a user has edited; nor is that of another input or of other
    flags taken for this one's. An empty folder is taken, and so is one that a link names."""
    Path("mine").mkdir()
    Path("mine/data.jsonl").write_text("precious")
    write(RECORD | {"image": "0.png"})
    assert run("in.jsonl", "mine", "--images", "img") == 2
    assert "error: mine: is there already" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["data.jsonl"]

    Path("empty").mkdir()
    Path("out").symlink_to("linked")
    assert run("in.jsonl", "empty") == 2 and not Path("empty/data.jsonl").exists()
    for out in ("empty", "out"):
        assert run("in.jsonl", out, "--images", "img") == 0
    assert written()[0]["images"] == [str(folder / "img/0.png")]

    (made := Path("out/data.jsonl")).write_text("edited")
    assert run("in.jsonl", "out", "--images", "img") == 2 and made.read_text() == "edited"
    assert f"{made}: has other lines; it, IN or a flag has changed since" in capsys.readouterr().err
    made.unlink()
    Path("0.png").write_bytes(RED)  # which came later
    assert run("in.jsonl", "out") == 0 and written()[0]["images"] == [str(folder / "0.png")]
    made.unlink()
    write(RECORD | {"chosen": "C"})
    assert run("in.jsonl", "out") == 0 and written()[0]["chosen"] == "C"
