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
    """A table of records, each with `-> name: what becomes of it` below -> parameters of a test."""
    found = re.findall("((?:.|\n)*?)\n-> (.*?): (.*)\n", string.Template(text).substitute(SHORT))
    return [pytest.param(record.replace("\n", " "), becomes, id=name) for record, name, becomes in found]


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


# Records as published, and below each what it becomes: what differs from the plain RECORD with the id 1.
PUBLISHED = r"""
{"image": "img/0.png", "prompt": "Q", $PAIR}
-> prompt: {}
{"img_path": "img/0.png", "prompt": "$BUNNY", $PAIR}
-> the authors': {"prompt": "$BUNNY"}
{"id": 7, "image": ["img/0.png"], "question": "Q", $PAIR}
-> MMPR: {"id": "7"}
{"image": ["img/1.png", "img/0.png"], "question": "Image-1: <image>\nImage-2: <image>\nQ", $PAIR}
-> MMPR's marks: {"images": ["img/1.png", "img/0.png"], "prompt": "Image-1: <image>\nImage-2: <image>\nQ"}
{"image": ["img/1.png", "img/0.png"], "question": "1: <image-placeholder> 2: <image-placeholder> Q", $PAIR}
-> MIA-DPO: {"images": ["img/1.png", "img/0.png"], "prompt": "1: <image> 2: <image> Q"}
{"image_id": "img/0.png", "question": "Q", "chosen": "A", "reject": "B"}
-> SeVa: {}
{"id": "c7", "image": "./img/0.png", "conversations": [{"from": "human", "value": "<image>\nQ"}, $GPT],
"rejected_conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "B"}]}
-> POVID: {"id": "c7", "prompt": "<image>\nQ"}
{"image": "img/0.png",
"conversations": "[{\"from\": \"human\", \"value\": \"Q\"}, {\"from\": \"gpt\", \"value\": \"A\"}]",
"rejected_conversations": "[{\"from\": \"human\", \"value\": \"Q\"}, {\"from\": \"gpt\", \"value\": \"B\"}]"}
-> JSON in strings: {}
{"idx": 0, "image_path": "img/0.png", "origin_split": "{\"model\": \"muffin\"}",
"text": "{\"question\": \"Q\", \"chosen\": \"A\", \"rejected\": \"B\"}"}
-> RLHF-V: {"id": "0"}
{"image": "img/0.png", "text": "{\"id\": 5, \"question\": \"Q\", \"chosen\": \"A\", \"rejected\": \"B\"}"}
-> RLHF-V, whose text begins with an id: {"id": "5"}
{"id": "llava-7", "prompt": "Q", "models": ["a", "b"], "completions": [
{"response": "A", "annotations": {"Helpfulness": {"Rating": "5", "Rationale": ""}}},
{"response": "B", "annotations": {"Helpfulness": {"Rating": "1", "Rationale": ""}}}]}
-> VLFeedback: {"id": "llava-7", "images": ["llava-7.jpg"]}
{"id": "llava-7", "prompt": "Q",
"completions": {"response": ["B", "A"], "annotations": {"Helpfulness": {"Rating": ["1", "5"]}}}}
-> VLFeedback as columns: {"id": "llava-7", "images": ["llava-7.jpg"]}
{"images": ["img/0.png"], "conversations": [{"from": "human", "value": "<image>Q"}], "chosen": $GPT,
"rejected": {"from": "gpt", "value": "B"}}
-> LLaMA-Factory: {"prompt": "<image>Q"}
{"images": ["img/0.png"], "messages": [$TURNS, $USER], "chosen": $A, "rejected": $B}
-> LLaMA-Factory, turns: {"prompt": [$TURNS, $USER]}
{"images": ["img/0.png"], "conversations": [$HUMAN], "system": "Be brief.", $PAIR}
-> LLaMA-Factory, system: {"prompt": [$SYSTEM, $USER]}
{"images": ["img/0.png"], "instruction": "Say.", "input": "Q", $PAIR}
-> Alpaca, input: {"prompt": "Say.\nQ"}
{"images": ["img/0.png"], "instruction": "Q", "history": [["<image>Round?", "Yes."]], $PAIR}
-> Alpaca, history: {"prompt": [$TURNS, $USER]}
{$ASKED, "history": [{"from": "human", "value": "<image>Round?"}, {"from": "gpt", "value": "Yes."}], $PAIR}
-> history of messages: {"prompt": [$TURNS, $USER]}
{"image": "img/0.png", "system": "Be brief.", "history": [["<image>Round?", "Yes."]],
"messages": [$TURNS, $USER, $A], "rejected_response": "B"}
-> a history that the conversation holds, too: {"prompt": [$SYSTEM, $TURNS, $USER]}
{$ASKED, "history": [["Q", "Yes."]], $PAIR}
-> a question that was asked before: {"prompt": [$USER, {"role": "assistant", "content": "Yes."}, $USER]}
{"messages": [{"role": "user", "content": "<image>Q"}, $A], "images": ["img/0.png"], "rejected_response": "B"}
-> ms-swift: {"prompt": "<image>Q"}
{"images": "img/0.png", "messages": [$SYSTEM, $TURNS, $USER, $A], "rejected_response": "B"}
-> ms-swift, turns: {"prompt": [$SYSTEM, $TURNS, $USER]}
{"messages": [$USER, $A], "images": ["img/0.png"], "rejected_messages": [$USER, $B],
"rejected_images": ["img/1.png"]}
-> ms-swift, rejected messages and image: {"rejected_images": ["img/1.png"]}
{"messages": [$USER, $A], "images": ["img/0.png"], "rejected_messages": [$USER, $B],
"rejected_images": ["img/0.png"]}
-> ms-swift's documentation, whose rejected image is the image: {}
{$ASKED, "rejected_image": "img/1.png", $PAIR}
-> own rejected image: {"rejected_images": ["img/1.png"]}
{$ASKED, "rejected_images": [""], $PAIR}
-> a rejected image of nothing: {}
{"image": "img/0.png", "chosen": [$USER, $A], "rejected": [$USER, $B]}
-> STIC: {}
{"image": "img/0.png", "prompt": [$TURNS, $USER], "chosen": [$USER, $A], "rejected": [$USER, $B]}
-> a prompt longer than the conversations: {"prompt": [$TURNS, $USER]}
{"images": ["img/0.png"], "prompt": [{"role": "user", "content": [{"type": "image", "text": null}, $TEXT]}],
"chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}], "rejected": [$B]}
-> TRL: {"prompt": [$SHOWN]}
{"prompt": [{"role": "user", "content": [{"type": "image", "image": "img/0.png"}, $TEXT]}], $PAIR}
-> a path in a part: {"prompt": [$SHOWN]}
{"prompt": [{"role": "user", "content": [
{"type": "image_url", "image_url": {"url": "data:image/png;base64,$BASE64"}}, $TEXT]}], $PAIR}
-> a data URI in a part: {"prompt": [$SHOWN], "images": ["$RED_PATH"]}
{"prompt": "Q", "rejected": "B",
"chosen": [{"role": "user", "content": [{"type": "image", "image": "img/0.png"}, $TEXT]}, $A]}
-> a prompt without the image that the conversation has: {"prompt": [$SHOWN]}
{"image": "$BASE64", "question": "Q", $PAIR}
-> base64: {"images": ["$RED_PATH"]}
{"images": [{"bytes": "$BASE64", "path": "x.png"}], "rejected_images": [null], "question": "Q", $PAIR}
-> base64 in a list, and a list of nothing: {"images": ["$RED_PATH"]}
{"images": [], "image": {"bytes": null, "path": null}, "image_path": "img/0.png", "question": "Q", $PAIR}
-> empty fields before an image: {}
{"image": {"bytes": "/9j/4AAQ", "path": null}, "image_path": "img/0.png", "question": "Q", $PAIR}
-> RLAIF-V, bytes cut short beside a path: {}
{$ASKED, "conversations": [$HUMAN, $GPT, {"from": "human", "value": "So?"}], $PAIR}
-> a question beside a longer conversation: {}
{$ASKED, $PAIR, "data": "coco", "train": "yes"}
-> texts under the names of lists of records: {}
{$ASKED, $PAIR, "meta": {"from": "coco"}, "thumbnail": {"bytes": "AAAA"}, "note": "{\"question\": ",
"hash": "/9j/$LONG", "messages": [{"from": "coco"}], "completions": [1], "text": "$DEEP"}
-> unused fields of any form: {}
{"image": "img/0.png", "conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}, "rejected": "B"}
-> conversations as columns: {}
{"messages": {"role": ["user"], "content":
[{"type": ["image", "text"], "text": [null, "Q"], "image": ["img/0.png", null]}]}, $PAIR}
-> messages and their parts as columns: {"prompt": [$SHOWN]}
{$ASKED, "chosen": "[{\"role\": \"user\", \"content\": \"Hi\"}]", "rejected": "B"}
-> an answer that is a conversation of the user's: {"chosen": "[{\"role\": \"user\", \"content\": \"Hi\"}]"}
{$ASKED, "chosen": "{\"question\": \"What?\", \"answer\": \"cat\"}", "rejected": "B"}
-> an answer that is an object: {"chosen": "{\"question\": \"What?\", \"answer\": \"cat\"}"}
{$ASKED, "chosen": "[\"a circle\", \"red\"]", "rejected": "B"}
-> an answer that is a list: {"chosen": "[\"a circle\", \"red\"]"}
{$ASKED, "chosen": "[[\"a circle\", \"red\"]]", "rejected": "B"}
-> an answer that is a table: {"chosen": "[[\"a circle\", \"red\"]]"}
{$ASKED, "chosen": "\"It is red.\"", "rejected": "B"}
-> an answer in quotes: {"chosen": "\"It is red.\""}
{$ASKED, "chosen": "42", "rejected": "B"}
-> an answer that is a number: {"chosen": "42"}
{$ASKED, "chosen": "{\"from\": \"gpt\", \"value\": \"A\"}", "rejected": "B"}
-> a message as JSON: {}
{$ASKED, "rejected": "B",
"chosen": "[{\"role\": \"user\", \"content\": \"Q\"}, {\"role\": \"assistant\", \"content\": \"A\"}]"}
-> a conversation as JSON: {}
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
{$ASKED, "chosen": ["A", "C"], "rejected": ["B", "D"]}
-> HA-DPO: several answers
{$ASKED, "chosen": ["A", "C"], "rejected": ["A", "D"]}
-> several answers, the first alike: roles
{"queries": "Q", "standard_response": "A"}
-> OPA-DPO: which OPA-DPO's own script makes, in the fields queries, standard_response
{"messages": [$USER, $A], "image": "data:image/png;base64,$BASE64"}
-> no rejected answer: no or an empty image, question or answer in the fields mess
{"image": "img/0.png", "messages": [$USER], "rejected": "B"}
-> no chosen answer: 'chosen' must end in an assistant
{"image": "img/0.png", $PAIR}
-> no question: question or answer in the fields image, chosen, rejected
{"image": "img/0.png", "messages": [$SYSTEM], $PAIR}
-> only a system text: user last
{$ASKED, "prompt": "  ", $PAIR}
-> a prompt of white space: no text
{$ASKED, "chosen": "A", "rejected": " A"}
-> equal answers: equal
{$ASKED, "chosen": " ", "rejected": "B"}
-> an empty answer: has no text
{$ASKED, "chosen": $HUMAN, "rejected": "B"}
-> an answer by the user: must end in an assistant
{$ASKED, "chosen": [$USER, $A], "rejected": [$USER, {"role": "user", "content": "B"}]}
-> a rejected conversation that ends in a question: must end in an assistant
{$ASKED, "chosen": "<ImageHere>A", "rejected": "B"}
-> an answer with an image: an assistant
{"image": "img/0.png", "chosen": [$USER, $A], "rejected": [{"role": "user", "content": "Why?"}, $B]}
-> other turns before: before their last turn
{$ASKED, "chosen": {"from": "gpt"}, "rejected": "B"}
-> a message without text: 'chosen': has no 'value'
{"question": "Q", $PAIR}
-> no image: an empty image
{"images": ["img/0.png", "img/9.png"], "question": "Q", $PAIR}
-> one of two missing: img/9.png
{"image": "9.png", "path": "img/0.png", "question": "Q", $PAIR}
-> the first image field is missing: no such image '9.png'
{"images": ["img/0.png", "img/9.png"], "image": "img/1.png", "question": "Q", $PAIR}
-> one of two missing beside another field: no such image 'img/9.png'
{"images": [null, "img/1.png"], "question": "Q", $PAIR}
-> an image of nothing among others: an empty image
{"images": ["", "img/1.png"], "image": "img/0.png", "question": "Q", $PAIR}
-> an empty name among others: an empty image
{"images": ["img/0.png", "img/1.png"], "rejected_images": ["img/1.png", null], "question": "Q", $PAIR}
-> a rejected image of nothing among others: an empty image
{"image": "../secret.png", "question": "Q", $PAIR}
-> outside the folder: secret.png
{"image": "data:image/png;base64,$LONG", "question": "Q", $PAIR}
-> bytes of no image: no image itself
{"images": ["img/0.png", "img/0.png"], "rejected_image": "img/1.png", "question": "Q", $PAIR}
-> two images, one rejected: 2 images and 1 rejected images
{$ASKED, "chosen": [{"role": "assistant", "content": [{"type": "video"}]}], "rejected": "B"}
-> a video: "video"
{"messages": [{"role": "user", "content": "<image><video>Q"}, $A], "videos": ["v.mp4"],
"rejected_response": "B", "images": ["img/0.png"]}
-> ms-swift's video: holds '<video>'
{"image": "img/0.png", "question": "<image 1>Q", $PAIR}
-> a mark with a number: holds '<image 1>'
{"image": "img/0.png", "prompt": "<|im_start|>user\nQ", $PAIR}
-> a prompt out of a template: holds '<|im_start|>'
{$ASKED, "chosen": "A", "rejected": "B[/INST]"}
-> an answer out of a template: holds '[/INST]'
{$ASKED, "history": [["[INST] Q [/INST]", "Yes."]], $PAIR}
-> an earlier turn out of a template: holds '[INST]'
{"image": "img/0.png", $PAIR,
"prompt": [{"role": "user", "content": [{"type": "text", "text": "<start_of_turn>Q"}]}]}
-> a part out of a template: holds '<start_of_turn>'
{"image": "img/0.png", "question": "\ud800$LONG", $PAIR}
-> a lone surrogate: character '\ud800' in position 0
{"\u001b[31m": "Q"}
-> control characters: fields \x1b[31m
7
-> not an object: is 7, not an object
null
-> nothing: is null, not an object
{$ASKED, "chosen": 5, "rejected": "B"}
-> a number as answer: 'chosen': is 5, not text
{$ASKED, "chosen": "A", "rejected": NaN}
-> a missing value of pandas as answer: 'rejected': is NaN, not text
"""


@pytest.mark.parametrize("record, reason", cases(LEFT_OUT))
def test_left_out_with_the_reason(folder, capsys, record, reason):
    """Among good records, a bad one is counted and named by number, never trained."""
    (folder.parent / "secret.png").write_bytes(RED)
    assert [example["id"] for example in converted(RECORD, record, RECORD, record)] == ["1", "3"]
    out = capsys.readouterr().out
    assert not [
        *Path("out/images").iterdir()
    ]  # a data set without rejected answers would fill the disk first
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
    (gzip.compress(b"{}"), "a gzip file: unpack it"),
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
{"image": {"bytes": "RED", "path": "red.png"}, "question": "Q", "image_path": "red.jpg", "idx": 40, $PAIR}
-> RLAIF-V: {"id": "40"}
{"image": {"bytes": "RED", "path": "red.png"}, "idx": 40, "origin_split": "{\"model\": \"muffin\"}",
"text": "{\"question\": \"Q\", \"chosen\": \"A\", \"rejected\": \"B\"}"}
-> RLHF-V: {"id": "40"}
{"images": [{"bytes": "RED", "path": "red.png"}], "chosen": [$A], "rejected": [$B],
"prompt": [{"role": "user", "content": [{"type": "image", "text": null}, $TEXT]}]}
-> TRL's: {}
{"question": "Q", "image": {"bytes": "BLUE", "path": null}, $PAIR}
-> SPA-VL: {"images": ["$BLUE_PATH"]}
{"id": "l-7", "image": {"bytes": "RED", "path": "red.png"}, "prompt": "Q", "completions": [
{"response": "A", "annotations": {"Helpfulness": {"Rating": "5", "Rationale": ""}}},
{"response": "B", "annotations": {"Helpfulness": {"Rating": "1", "Rationale": ""}}}]}
-> VLFeedback: {"id": "l-7"}
{"chosen": [$A], "rejected": [$B], "prompt": [{"role": "user", "content": [
{"type": "image", "text": null, "image": {"bytes": "RED", "path": "red.png"}},
{"type": "image", "text": null, "image": {"bytes": "BLUE", "path": null}},
{"type": "text", "text": "Q", "image": null}]}]}
-> messages with images: {"images": ["$RED_PATH", "$BLUE_PATH"]}
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
    """Stopped at any record, even within a character, it writes what it writes in one go, and converts nothing
    twice. A result that was removed, or whose line was damaged, is made again."""
    if source == "in.parquet":
        write_parquet(source, SPA_VL, n=5)
    write(RECORD, RECORD, RECORD | {"image": BASE64}, RECORD, RECORD)
    assert run(source, "whole") == 0
    seen, real = [], convert.convert

    def stopping(record, number, *others):
        seen.append(number)
        if number == stop == len(seen):
            raise KeyboardInterrupt
        return real(record, number, *others)

    monkeypatch.setattr(convert, "convert", stopping)
    assert run(source, "out") == 130 and not Path("out/data.jsonl").exists()
    log = Path("out/converted.jsonl")
    log.write_bytes(log.read_bytes() + '\n{"é'.encode()[:-1])
    assert run(source, "out") == 0
    assert seen == [*range(1, stop + 1), *range(stop, 6)]
    Path("out/data.jsonl").unlink()
    log.write_bytes(log.read_bytes()[:-9] + bytes(9))
    assert run(source, "out") == run(source, "out") == 0 and seen[6:] == [5]  # all else is there
    assert Path("out/data.jsonl").read_bytes() == Path("whole/data.jsonl").read_bytes()


def test_a_full_disk_leaves_no_half_result(folder, monkeypatch):
    """The user makes room, and the same command goes on."""
    write(RECORD)
    real = Path.write_bytes

    def full(path, content):
        real(path, content[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert run("in.jsonl", "out") == 2
    assert run("in.jsonl", "out") == 0 and len(written()) == 1


def test_nothing_that_is_there_is_overwritten(folder, capsys):
    """Neither a user's folder, nor a result that a user has edited, nor that of an input or of flags that have
    changed since: records would be lost, or mixed. An empty folder is taken, and so is one that a link names."""
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


def test_a_folder_that_has_changed(folder):
    """Records of the old files are not mixed with those of the new ones."""
    write_parquet("in/train-0.parquet", SPA_VL)
    write_parquet("in/train-1.parquet", SPA_VL.replace("A", "C"), n=2)
    assert run("in", "out") == 0
    Path("in/train-0.parquet").unlink()
    Path("out/data.jsonl").unlink()
    assert run("in", "out") == 0
    assert [example["chosen"] for example in written()] == ["C", "C"]
