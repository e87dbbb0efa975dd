"""Protects `examples/convert.py`: published data become what their authors meant, and nothing is lost.

A mistake here trains on the wrong image, question or answer without a sound.
"""

import base64
import gzip
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
MMPR: {"id": 7, "image": ["img/0.png"], "question": "Q", $PAIR} -> {"id": "7"}
MMPR's marks: {"image": ["img/1.png", "img/0.png"], "question": "Image-1: <image>\nImage-2: <image>\nQ",
    $PAIR} -> {"images": ["img/1.png", "img/0.png"], "prompt": "Image-1: <image>\nImage-2: <image>\nQ"}
MIA-DPO: {"image": ["img/1.png", "img/0.png"], "question": "1: <image-placeholder> 2: <image-placeholder> Q",
    $PAIR} -> {"images": ["img/1.png", "img/0.png"], "prompt": "1: <image> 2: <image> Q"}
SeVa: {"image_id": "img/0.png", "question": "Q", "chosen": "A", "reject": "B"} -> {}
POVID: {"id": "c7", "image": "./img/0.png", "conversations": [{"from": "human", "value": "<image>\nQ"}, $GPT],
    "rejected_conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "B"}]} ->
    {"id": "c7", "prompt": "<image>\nQ"}
JSON in strings: {$IMG, "conversations": "[{\"from\": \"human\", \"value\": \"Q\"}, {\"from\": \"gpt\",
    \"value\": \"A\"}]", "rejected_conversations": "[{\"from\": \"human\", \"value\": \"Q\"}, {\"from\":
    \"gpt\", \"value\": \"B\"}]"} -> {}
RLHF-V: {"idx": 0, "image_path": "img/0.png", "origin_split": "{\"model\": \"muffin\"}", "text":
    "{\"question\": \"Q\", \"chosen\": \"A\", \"rejected\": \"B\"}"} -> {"id": "0"}
RLHF-V, whose text begins with an id: {$IMG, "text": "{\"id\": 5, \"question\": \"Q\", \"chosen\": \"A\",
    \"rejected\": \"B\"}"} -> {"id": "5"}
VLFeedback: {"id": "llava-7", "prompt": "Q", "models": ["a", "b"], "completions": [ {"response": "A",
    "annotations": {"Helpfulness": {"Rating": "5", "Rationale": ""}}}, {"response": "B", "annotations":
    {"Helpfulness": {"Rating": "1", "Rationale": ""}}}]} -> {"id": "llava-7", "images": ["llava-7.jpg"]}
VLFeedback as columns: {"id": "llava-7", "prompt": "Q", "completions": {"response": ["B", "A"], "annotations":
    {"Helpfulness": {"Rating": ["1", "5"]}}}} -> {"id": "llava-7", "images": ["llava-7.jpg"]}
LLaMA-Factory: {$IMGS, "conversations": [{"from": "human", "value": "<image>Q"}], "chosen": $GPT, "rejected":
    {"from": "gpt", "value": "B"}} -> {"prompt": "<image>Q"}
LLaMA-Factory, turns: {$IMGS, "messages": [$TURNS, $USER], "chosen": $A, "rejected": $B} -> {"prompt":
    [$TURNS, $USER]}
LLaMA-Factory, system: {$IMGS, "conversations": [$HUMAN], "system": "Be brief.", $PAIR} -> {"prompt":
    [$SYSTEM, $USER]}
Alpaca, input: {$IMGS, "instruction": "Say.", "input": "Q", $PAIR} -> {"prompt": "Say.\nQ"}
Alpaca, history: {$IMGS, "instruction": "Q", "history": [["<image>Round?", "Yes."]], $PAIR} -> {"prompt":
    [$TURNS, $USER]}
history of messages: {$ASKED, "history": [{"from": "human", "value": "<image>Round?"}, {"from": "gpt",
    "value": "Yes."}], $PAIR} -> {"prompt": [$TURNS, $USER]}
a history that the conversation holds, too: {$IMG, "system": "Be brief.", "history": [["<image>Round?",
    "Yes."]], "messages": [$TURNS, $USER, $A], "rejected_response": "B"} -> {"prompt": [$SYSTEM, $TURNS,
    $USER]}
a question that was asked before: {$ASKED, "history": [["Q", "Yes."]], $PAIR} -> {"prompt": [$USER, {"role":
    "assistant", "content": "Yes."}, $USER]}
ms-swift, turns: {"images": "img/0.png", "messages": [$SYSTEM, $TURNS, $USER, $A], "rejected_response": "B"}
    -> {"prompt": [$SYSTEM, $TURNS, $USER]}
ms-swift, rejected messages and image: {"messages": [$USER, $A], "images": ["img/0.png"], "rejected_messages":
    [$USER, $B], "rejected_images": ["img/1.png"]} -> {"rejected_images": ["img/1.png"]}
ms-swift's documentation, whose rejected image is the image: {"messages": [$USER, $A], "images":
    ["img/0.png"], "rejected_messages": [$USER, $B], "rejected_images": ["img/0.png"]} -> {}
own rejected image: {$ASKED, "rejected_image": "img/1.png", $PAIR} -> {"rejected_images": ["img/1.png"]}
a rejected image of nothing: {$ASKED, "rejected_images": [""], $PAIR} -> {}
STIC: {$IMG, "chosen": [$USER, $A], "rejected": [$USER, $B]} -> {}
a prompt longer than the conversations: {$IMG, "prompt": [$TURNS, $USER], "chosen": [$USER, $A], "rejected":
    [$USER, $B]} -> {"prompt": [$TURNS, $USER]}
TRL: {$IMGS, "prompt": [{"role": "user", "content": [{"type": "image", "text": null}, $TEXT]}], "chosen":
    [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}], "rejected": [$B]} -> {"prompt":
    [$SHOWN]}
a path in a part: {"prompt": [{"role": "user", "content": [{"type": "image", "image": "img/0.png"}, $TEXT]}],
    $PAIR} -> {"prompt": [$SHOWN]}
a data URI in a part: {"prompt": [{"role": "user", "content": [ {"type": "image_url", "image_url": {"url":
    "data:image/png;base64,$BASE64"}}, $TEXT]}], $PAIR} -> {"prompt": [$SHOWN], "images": ["$RED_PATH"]}
a prompt without the image that the conversation has: {"prompt": "Q", "rejected": "B", "chosen": [{"role":
    "user", "content": [{"type": "image", "image": "img/0.png"}, $TEXT]}, $A]} -> {"prompt": [$SHOWN]}
base64: {"image": "$BASE64", "question": "Q", $PAIR} -> {"images": ["$RED_PATH"]}
base64 in a list, and a list of nothing: {"images": [{"bytes": "$BASE64", "path": "x.png"}],
    "rejected_images": [null], "question": "Q", $PAIR} -> {"images": ["$RED_PATH"]}
empty fields before an image: {"images": [], "image": {"bytes": null, "path": null}, "image_path":
    "img/0.png", "question": "Q", $PAIR} -> {}
RLAIF-V, bytes cut short beside a path: {"image": {"bytes": "/9j/4AAQ", "path": null}, "image_path":
    "img/0.png", "question": "Q", $PAIR} -> {}
a question beside a longer conversation: {$ASKED, "conversations": [$HUMAN, $GPT, {"from": "human", "value":
    "So?"}], $PAIR} -> {}
texts under the names of lists of records: {$ASKED, $PAIR, "data": "coco", "train": "yes"} -> {}
unused fields of any form: {$ASKED, $PAIR, "meta": {"from": "coco"}, "thumbnail": {"bytes": "AAAA"}, "note":
    "{\"question\": ", "hash": "/9j/$LONG", "messages": [{"from": "coco"}], "completions": [1], "text":
    "$DEEP"} -> {}
conversations as columns: {$IMG, "conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}, "rejected":
    "B"} -> {}
messages and their parts as columns: {"messages": {"role": ["user"], "content": [{"type": ["image", "text"],
    "text": [null, "Q"], "image": ["img/0.png", null]}]}, $PAIR} -> {"prompt": [$SHOWN]}
an answer that is a conversation of the user's: {$ASKED, "chosen": "[{\"role\": \"user\", \"content\":
    \"Hi\"}]", "rejected": "B"} -> {"chosen": "[{\"role\": \"user\", \"content\": \"Hi\"}]"}
an answer that is an object: {$ASKED, "chosen": "{\"question\": \"What?\", \"answer\": \"cat\"}", "rejected":
    "B"} -> {"chosen": "{\"question\": \"What?\", \"answer\": \"cat\"}"}
an answer that is a table: {$ASKED, "chosen": "[[\"a circle\", \"red\"]]", "rejected": "B"} -> {"chosen":
    "[[\"a circle\", \"red\"]]"}
an answer in quotes: {$ASKED, "chosen": "\"It is red.\"", "rejected": "B"} -> {"chosen": "\"It is red.\""}
an answer that is a number: {$ASKED, "chosen": "42", "rejected": "B"} -> {"chosen": "42"}
a message as JSON: {$ASKED, "chosen": "{\"from\": \"gpt\", \"value\": \"A\"}", "rejected": "B"} -> {}
"""


@pytest.mark.parametrize("record, becomes", cases(PUBLISHED))
def test_published_record(folder, record, becomes):
    """Names are read as their authors meant them, and the project reads what is written. Data sets hold
    messages as JSON in a text, but the answer to a question may be JSON, too."""
    plain = {"id": "1", "images": ["img/0.png"], "prompt": "Q", "chosen": "A", "rejected": "B"}
    plain |= json.loads(becomes)
    for name in {"images", "rejected_images"} & {*plain}:  # files by absolute paths
        plain[name] = [path if path == RED_PATH else str(folder / path) for path in plain[name]]
    assert converted(record) == [plain]
    (example,) = read_examples("out/data.jsonl")
    assert (example.chosen, example.question[-1]["content"][-1]["text"][-1]) == (plain["chosen"], "Q")
    assert [*map(Path, example.images)] == [folder / "out" / path for path in plain["images"]]
    assert [*example.images_rejected] == plain.get("rejected_images", [])


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
an empty answer: {$ASKED, "chosen": " ", "rejected": "B"} -> has no text
an answer by the user: {$ASKED, "chosen": $HUMAN, "rejected": "B"} -> must end in an assistant
a rejected conversation that ends in a question: {$ASKED, "chosen": [$USER, $A], "rejected": [$USER, {"role":
    "user", "content": "B"}]} -> must end in an assistant
an answer with an image: {$ASKED, "chosen": "<ImageHere>A", "rejected": "B"} -> an assistant
other turns before: {$IMG, "chosen": [$USER, $A], "rejected": [{"role": "user", "content": "Why?"}, $B]} ->
    before their last turn
a message without text: {$ASKED, "chosen": {"from": "gpt"}, "rejected": "B"} -> 'chosen': has no 'value'
no image: {"question": "Q", $PAIR} -> an empty image
one of two missing: {"images": ["img/0.png", "img/9.png"], "question": "Q", $PAIR} -> img/9.png
the first image field is missing: {"image": "9.png", "path": "img/0.png", "question": "Q", $PAIR} -> no such
    image '9.png'
one of two missing beside another field: {"images": ["img/0.png", "img/9.png"], "image": "img/1.png",
    "question": "Q", $PAIR} -> no such image 'img/9.png'
an image of nothing among others: {"images": [null, "img/1.png"], "question": "Q", $PAIR} -> an empty image
an empty name among others: {"images": ["", "img/1.png"], "image": "img/0.png", "question": "Q", $PAIR} -> an
    empty image
a rejected image of nothing among others: {"images": ["img/0.png", "img/1.png"], "rejected_images":
    ["img/1.png", null], "question": "Q", $PAIR} -> an empty image
outside the folder: {"image": "../secret.png", "question": "Q", $PAIR} -> secret.png
bytes of no image: {"image": "data:image/png;base64,$LONG", "question": "Q", $PAIR} -> no image itself
two images, one rejected: {"images": ["img/0.png", "img/0.png"], "rejected_image": "img/1.png", "question":
    "Q", $PAIR} -> 2 images and 1 rejected images
a video: {$ASKED, "chosen": [{"role": "assistant", "content": [{"type": "video"}]}], "rejected": "B"} ->
    "video"
ms-swift's video: {"messages": [{"role": "user", "content": "<image><video>Q"}, $A], "videos": ["v.mp4"],
    "rejected_response": "B", "images": ["img/0.png"]} -> holds '<video>'
a mark with a number: {$IMG, "question": "<image 1>Q", $PAIR} -> holds '<image 1>'
a prompt out of a template: {$IMG, "prompt": "<|im_start|>user\nQ", $PAIR} -> holds '<|im_start|>'
an answer out of a template: {$ASKED, "chosen": "A", "rejected": "B[/INST]"} -> holds '[/INST]'
an earlier turn out of a template: {$ASKED, "history": [["[INST] Q [/INST]", "Yes."]], $PAIR} -> holds
    '[INST]'
a part out of a template: {$IMG, $PAIR, "prompt": [{"role": "user", "content": [{"type": "text", "text":
    "<start_of_turn>Q"}]}]} -> holds '<start_of_turn>'
a lone surrogate: {$IMG, "question": "\ud800$LONG", $PAIR} -> character '\ud800' in position 0
control characters: {"\u001b[31m": "Q"} -> fields \x1b[31m
not an object: 7 -> is 7, not an object
nothing: null -> is null, not an object
a number as answer: {$ASKED, "chosen": 5, "rejected": "B"} -> 'chosen': is 5, not text
a missing value of pandas as answer: {$ASKED, "chosen": "A", "rejected": NaN} -> 'rejected': is NaN, not text
"""


@pytest.mark.parametrize("record, reason", cases(LEFT_OUT))
def test_left_out_with_the_reason(folder, capsys, record, reason):
    """Among good records, a bad one is counted and named by number, never trained."""
    (folder.parent / "secret.png").write_bytes(RED)
    assert [example["id"] for example in converted(RECORD, record, RECORD, record)] == ["1", "3"]
    out = capsys.readouterr().out
    assert not [*Path("out/images").iterdir()]  # or a data set without rejected answers would fill the disk
    assert "2 examples of 4 records" in out and "left out 2: record 2: " in out and reason in out
    assert max(map(len, out.splitlines())) < 400


def encoded(kind):
    return base64.b64encode(picture("red", kind)).decode()


@pytest.mark.parametrize("kind, image", {
    "BMP": encoded("BMP"),
    "TIFF": encoded("TIFF"),
    "JPEG": encoded("JPEG").replace("+", "-").replace("/", "_").rstrip("="),  # the alphabet of addresses
    "PNG": "data:;base64," + encoded("PNG"),
    "GIF": "data:application/octet-stream;base64," + encoded("GIF"),
    "WEBP": {"bytes": [*picture("red", "WEBP")], "path": None},
}.items())  # fmt: skip
def test_embedded_image(folder, kind, image):
    """Whatever its format and its encoding, the bytes of the image are written as they were."""
    (path,) = converted(RECORD | {"image": image})[0]["images"]
    assert Path("out", path).read_bytes() == picture("red", kind)
    assert path.endswith(kind.lower().replace("jpeg", "jpg"))


@pytest.mark.parametrize("content", {
    "JSON lines": json.dumps(RECORD) + "\r\n\n" + json.dumps(RECORD),
    "an indented list": json.dumps([RECORD, RECORD], indent=1),
    "a list as data": json.dumps({"data": [RECORD, RECORD]}, indent=1),
    "a list beside other fields": json.dumps({"version": 1, "data": [RECORD, RECORD]}),
    "a list under the split's name": json.dumps({"test": [{}], "train": [RECORD, RECORD]}),
    "a byte order mark": "\ufeff" + json.dumps([RECORD, RECORD]),
}.values())  # fmt: skip
def test_layouts_of_json(folder, content):
    """Published files differ in it: none of their records may be lost."""
    assert [example["id"] for example in converted(content)] == ["1", "2"]


def test_broken_lines_are_left_out(folder, capsys):
    """A damaged line takes no other line with it."""
    cut = json.dumps(RECORD)[:45]
    bad = [cut, "{]", cut, f'{{"id": {"1" * 5000}}}', '{"id": ' + "[" * 100_000]
    records = [record for one in bad for record in (RECORD, one)]
    assert [example["id"] for example in converted(*records)] == ["1", "3", "5", "7", "9"]
    out = capsys.readouterr().out
    assert "left out 3: record 2: not valid JSON: Unterminated string starting at: line 1 column 41" in out
    assert "left out 1: record 8: " in out and "left out 1: record 10: " in out


@pytest.mark.parametrize("content, says", [
    (b"question,chosen\n1,2\n", 'begins with "question,chosen'),
    (gzip.compress(b"{}", mtime=0), "a gzip file: unpack it"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ("[{}]".encode("utf-16"), "UTF-16"),
    (b"[{}, {}]\n[{}]", "not valid JSON: Extra data: line 2 column 1"),
    (b'[{"id": 1}, {"id": }]', "not valid JSON: Expecting value: line 1 column 20"),
    (b'{"question": "' + 5000 * b"x" + b'\xe9"}', "byte 0xe9 in position 5014"),
    (b"", 'begins with ""'),
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
RLHF-V: {"image": $RED, "idx": 40, "origin_split": "{\"model\": \"muffin\"}", "text": "{\"question\": \"Q\",
    \"chosen\": \"A\", \"rejected\": \"B\"}"} -> {"id": "40"}
TRL's: {"images": [{"bytes": "RED", "path": "red.png"}], "chosen": [$A], "rejected": [$B], "prompt": [{"role":
    "user", "content": [{"type": "image", "text": null}, $TEXT]}]} -> {}
SPA-VL: {"question": "Q", "image": {"bytes": "BLUE", "path": null}, $PAIR} -> {"images": ["$BLUE_PATH"]}
VLFeedback: {"id": "l-7", "image": $RED, "prompt": "Q", "completions": [ {"response": "A", "annotations":
    {"Helpfulness": {"Rating": "5", "Rationale": ""}}}, {"response": "B", "annotations": {"Helpfulness":
    {"Rating": "1", "Rationale": ""}}}]} -> {"id": "l-7"}
messages with images: {"chosen": [$A], "rejected": [$B], "prompt": [{"role": "user", "content": [ {"type":
    "image", "text": null, "image": $RED}, {"type": "image", "text": null, "image": {"bytes": "BLUE", "path":
    null}}, {"type": "text", "text": "Q", "image": null}]}]} -> {"images": ["$RED_PATH", "$BLUE_PATH"]}
"""


def embedded(value):
    """Bytes in the place of their names."""
    return value | {"bytes": {"RED": RED, "BLUE": BLUE}[value["bytes"]]} if "bytes" in value else value


def write_parquet(path, record, n=1):
    datasets = pytest.importorskip("datasets")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(record, object_hook=embedded)
    table = datasets.Dataset.from_list([record] * n)
    for name, kind in ("image", datasets.Image()), ("images", [datasets.Image()]):
        table = table.cast_column(name, kind) if name in record else table
    table.to_parquet(path)


@pytest.mark.parametrize("record, becomes", cases(HUB))
def test_parquet(folder, record, becomes):
    """Embedded images are written untouched, wherever they stand, and go with their own question."""
    write_parquet("in.parquet", record)
    assert run("in.parquet", "out") == 0
    (made,), (example,) = written(), read_examples("out/data.jsonl")
    expected = {"id": "1", "images": [RED_PATH]} | json.loads(becomes)
    assert {name: made[name] for name in expected} == expected
    for path in made["images"]:
        assert Path("out", path).read_bytes() == {RED_PATH: RED, BLUE_PATH: BLUE}[path]
    assert (example.chosen, example.rejected) == ("A", "B")
    shown = [{"type": "image"}] * len(made["images"])
    assert example.question == [{"role": "user", "content": [*shown, {"type": "text", "text": "Q"}]}]


SPA_VL = '{"question": "Q", "image": {"bytes": "BLUE", "path": null}, "chosen": "A", "rejected": "B"}'


def test_a_name_of_the_hub(folder):
    """The library takes a folder laid out as on the hub in the place of a name."""
    for shard in range(2):
        write_parquet(f"owner/name/data/train-0000{shard}-of-00002.parquet", SPA_VL)
    assert run("owner/name", "out") == 0
    assert [example["images"] for example in written()] == [[BLUE_PATH]] * 2
    assert run("owner/name", "other", "--split", "test") == 2


@pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("stop", [1, 4])
def test_continues_where_it_was_stopped(folder, monkeypatch, source, stop):
    """Stopped anywhere, even within a character, it writes what it writes in one go, and converts nothing
    twice. A result that was removed, or whose line was damaged, is made again."""
    if source == "in.parquet":
        write_parquet(source, SPA_VL, n=5)
    write(RECORD, RECORD, RECORD | {"image": BASE64}, RECORD, RECORD)
    assert run(source, "whole") == 0
    seen, kept, log, real = [], [], Path("out/converted.jsonl"), convert.convert

    def stopping(record, number, *others):
        seen.append(number)
        kept.append(log.read_bytes().count(b"\n"))  # records that a kill would leave
        if number == stop == len(seen):
            raise KeyboardInterrupt
        return real(record, number, *others)

    monkeypatch.setattr(convert, "convert", stopping)
    assert run(source, "out") == 130 and not Path("out/data.jsonl").exists()
    assert kept == [*range(stop)]
    log.write_bytes(log.read_bytes() + '\n{"é'.encode()[:-1])
    assert run(source, "out") == 0
    assert seen == [*range(1, stop + 1), *range(stop, 6)]
    Path("out/data.jsonl").unlink()
    log.write_bytes(log.read_bytes()[:-9] + bytes(9))
    assert run(source, "out") == run(source, "out") == 0 and seen[6:] == [5]  # all else is there
    assert Path("out/data.jsonl").read_bytes() == Path("whole/data.jsonl").read_bytes()


@pytest.mark.parametrize("image", [{}, {"image": BASE64}])
def test_a_full_disk_leaves_no_half_result(folder, monkeypatch, image):
    """The user makes room, and the same command goes on."""
    write(RECORD | image)
    images = lambda out: [path.read_bytes() for path in Path(out, "images").iterdir()]
    assert run("in.jsonl", "whole") == 0
    real = Path.write_bytes

    def full(path, content):
        real(path, content[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert run("in.jsonl", "out") == 2
    assert run("in.jsonl", "out") == 0 and len(written()) == 1
    assert images("out") == images("whole")


def test_nothing_that_is_there_is_overwritten(folder, capsys):
    """Neither a user's folder, nor a result that a user has edited, nor that of an input or of flags that
    have changed since: records would be lost, or mixed. An empty folder is taken, and so is one that a link
    names."""
    Path("mine").mkdir()
    Path("mine/data.jsonl").write_text("precious")
    write(RECORD | {"image": "0.png"})
    assert run("in.jsonl", "mine", "--images", "img") == 2
    assert "error: mine: is there already" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["data.jsonl"]

    Path("empty").mkdir()
    Path("out").symlink_to("linked")
    assert run("in.jsonl", "empty") == 2 and not Path("empty/data.jsonl").exists()
    assert "no such image '0.png'" in capsys.readouterr().err
    for out in ("empty", "out"):
        assert run("in.jsonl", out, "--images", "img") == 0
    assert written()[0]["images"] == [str(folder / "img/0.png")]

    def refused(*argv):
        before = Path("out/data.jsonl").read_bytes()
        assert run(*argv, "out") == 2
        error = capsys.readouterr().err
        assert "out/data.jsonl: has other lines; it, IN or a flag has changed since" in error
        assert Path("out/data.jsonl").read_bytes() == before

    write(RECORD, RECORD | {"image": "0.png"})
    refused("in.jsonl", "--images", "img")
    Path("out/data.jsonl").unlink()
    Path("0.png").write_bytes(RED)  # which came later
    assert run("in.jsonl", "out") == 0
    assert [one["images"] for one in written()] == [[str(folder / name)] for name in ("img/0.png", "0.png")]
    Path("out/data.jsonl").write_text("edited")
    refused("in.jsonl")
    Path("out/data.jsonl").unlink()
    write(RECORD | {"chosen": "C"})
    assert run("in.jsonl", "out") == 0 and written()[0]["chosen"] == "C"
