"""Protects `examples/convert.py`: published data become what their authors meant, and nothing is lost.

A mistake here trains on the wrong image, question or answer without a sound.
"""

import base64
import gzip
import hashlib
import io
import json
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import train
from data import read_examples, run_command
from examples import convert

Q, GOOD, BAD = "What colour is the circle?", "It is red.", "It is blue."
IMG = "<image>"


def picture(colour, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, kind)
    return file.getvalue()


RED, BLUE = picture("red"), picture("blue", "JPEG")
RED_PATH = f"images/{hashlib.sha256(RED).hexdigest()[:32]}.png"
BLUE_PATH = f"images/{hashlib.sha256(BLUE).hexdigest()[:32]}.jpg"
BASE64 = base64.b64encode(RED).decode()
URI = f"data:image/png;base64,{BASE64}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the pictures that the records name."""
    monkeypatch.chdir(tmp_path)
    for name in ("img/0.png", "img/1.png", "img/7.jpg", "data/coco/7.jpg", "merged_images/llava-7.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(BLUE if name == "img/1.png" else RED)
    return tmp_path


def write_json(published, path="in.jsonl"):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in published))


def run(*argv):
    return run_command(convert.run, [*map(str, argv)])


def converted(out="out"):
    return [json.loads(line) for line in Path(out, "data.jsonl").read_text().splitlines()]


def says(role, text):
    return {"from": role, "value": text} if role in ("human", "gpt") else {"role": role, "content": text}


human, gpt, user, assistant = (partial(says, role) for role in ("human", "gpt", "user", "assistant"))


def parts(*parts):
    return [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]


SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [user("<image>Is it round?"), assistant("Yes."), user(Q)]  # an earlier turn
SHOWN = [user(parts({"type": "image"}, Q))]
NO_TEXT = {"type": "image", "text": None}  # as parquet has it
PAIR = {"chosen": GOOD, "rejected": BAD}
GPT_PAIR = {"chosen": gpt(GOOD), "rejected": gpt(BAD)}
ENDINGS = {"chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q), assistant(BAD)]}
SWIFT = {"messages": [user(IMG + Q), assistant(GOOD)], "images": ["img/0.png"]}
FILE, FILES = {"image": "img/0.png"}, {"images": ["img/0.png"]}
POVID = {
    "conversations": [human(f"{IMG}\n{Q}"), gpt(GOOD)],
    "rejected_conversations": [human(f"{IMG}\n{Q}"), gpt(BAD)],
}
IN_TEXT = {"text": json.dumps({"question": Q} | PAIR), "origin_split": '{"model": "muffin"}'}

SHOWN_COLUMNS = {"type": ["image", "text"], "text": [None, Q], "image": ["img/0.png", None]}
UNUSED = {
    "meta": {"from": "coco"},
    "thumbnail": {"bytes": "AAAA"},
    "note": '{"question": ',
    "hash": "/9j/" + "A" * 100,
    "messages": [{"from": "coco"}],
    "completions": [1],
    "text": "[" * 100_000,
}
BUNNY = f"{train.BUNNY_SYSTEM} USER: {IMG}\n{Q} ASSISTANT:"

# name: a record as it was published, and what it has to become beside id 1, image img/0.png and the answers
PUBLISHED = {
    "prompt": (FILE | {"prompt": Q} | PAIR, {"prompt": Q}),
    "the authors'": ({"img_path": "img/0.png", "prompt": BUNNY} | PAIR, {"prompt": BUNNY}),
    "MMPR": ({"id": 7, "image": ["img/0.png"], "question": Q} | PAIR, {"id": "7", "prompt": Q}),
    "SeVa": (
        {"image_id": "img/0.png", "question": Q, "chosen": GOOD, "reject": BAD},
        {"prompt": Q},
    ),
    "POVID": ({"id": "c7", "image": "./img/0.png"} | POVID, {"id": "c7", "prompt": f"{IMG}\n{Q}"}),
    "JSON in strings": (
        FILE | {name: json.dumps(turns) for name, turns in POVID.items()},
        {"prompt": f"{IMG}\n{Q}"},
    ),
    "RLHF-V": ({"idx": 0, "image_path": "img/0.png"} | IN_TEXT, {"id": "0", "prompt": Q}),
    "LLaMA-Factory": (FILES | {"conversations": [human(IMG + Q)]} | GPT_PAIR, {"prompt": IMG + Q}),
    "LLaMA-Factory, turns": (
        FILES | {"messages": CHAT, "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        {"prompt": CHAT},
    ),
    "LLaMA-Factory, system": (
        FILES | {"conversations": [human(Q)], "system": "Be brief."} | GPT_PAIR,
        {"prompt": [SYSTEM, user(Q)]},
    ),
    "Alpaca, input": (FILES | {"instruction": "Say.", "input": Q} | PAIR, {"prompt": f"Say.\n{Q}"}),
    "Alpaca, history": (
        FILES | {"instruction": Q, "history": [["<image>Is it round?", "Yes."]]} | PAIR,
        {"prompt": CHAT},
    ),
    "history of messages": (
        FILE | {"question": Q, "history": [human("<image>Is it round?"), gpt("Yes.")]} | PAIR,
        {"prompt": CHAT},
    ),
    "ms-swift": (SWIFT | {"rejected_response": BAD}, {"prompt": IMG + Q}),
    "ms-swift, turns": (
        {"images": "img/0.png", "messages": [SYSTEM, *CHAT, assistant(GOOD)], "rejected_response": BAD},
        {"prompt": [SYSTEM, *CHAT]},
    ),
    "ms-swift, rejected messages and image": (
        SWIFT | {"rejected_messages": [user(IMG + Q), assistant(BAD)], "rejected_images": ["img/1.png"]},
        {"prompt": IMG + Q, "rejected_images": ["img/1.png"]},
    ),
    "ms-swift's documentation, whose rejected image is the image": (
        SWIFT | {"rejected_messages": [user(IMG + Q), assistant(BAD)], "rejected_images": ["img/0.png"]},
        {"prompt": IMG + Q},
    ),
    "own rejected image": (
        FILE | {"rejected_image": "img/1.png", "question": Q} | PAIR,
        {"prompt": Q, "rejected_images": ["img/1.png"]},
    ),
    "STIC": (FILE | ENDINGS, {"prompt": Q}),
    "a prompt longer than the conversations": (FILE | {"prompt": CHAT} | ENDINGS, {"prompt": CHAT}),
    "TRL": (
        FILES
        | {"prompt": [user(parts(NO_TEXT, Q))]}
        | {"chosen": [assistant(parts(GOOD))], "rejected": [assistant(parts(BAD))]},
        {"prompt": SHOWN},
    ),
    "a path in a part": (
        {"prompt": [user(parts({"type": "image", "image": "img/0.png"}, Q))]} | PAIR,
        {"prompt": SHOWN},
    ),
    "a data URI in a part": (
        {"prompt": [user(parts({"type": "image_url", "image_url": {"url": URI}}, Q))]} | PAIR,
        {"prompt": SHOWN, "images": [RED_PATH]},
    ),
    "base64": ({"image": BASE64, "question": Q} | PAIR, {"prompt": Q, "images": [RED_PATH]}),
    "base64 in a list": (
        {"images": [{"bytes": BASE64, "path": "x.png"}], "question": Q} | PAIR,
        {"prompt": Q, "images": [RED_PATH]},
    ),
    "RLAIF-V, bytes cut short beside a path": (
        {"image": {"bytes": "/9j/4AAQ", "path": None}, "image_path": "img/0.png", "question": Q} | PAIR,
        {"prompt": Q},
    ),
    "a question beside a longer conversation": (
        FILE | {"question": Q, "conversations": [human("And?"), gpt("Yes."), human("So?")]} | PAIR,
        {"prompt": Q},
    ),
    "unused fields of any form": (FILE | {"question": Q} | PAIR | UNUSED, {"prompt": Q}),
    "conversations as columns": (
        FILE | {"conversations": {"from": ["human", "gpt"], "value": [Q, GOOD]}, "rejected": BAD},
        {"prompt": Q},
    ),
    "messages and their parts as columns": (
        {"messages": {"role": ["user"], "content": [SHOWN_COLUMNS]}} | PAIR,
        {"prompt": SHOWN},
    ),
    "images of nothing": (
        {"images": [{"bytes": BASE64}, None], "rejected_images": [None], "question": Q} | PAIR,
        {"prompt": Q, "images": [RED_PATH]},
    ),
    "a rejected image of nothing": (FILE | {"rejected_images": [""], "question": Q} | PAIR, {"prompt": Q}),
    "RLHF-V, whose text begins with an id": (
        FILE | {"text": json.dumps({"id": 5, "question": Q} | PAIR)},
        {"id": "5", "prompt": Q},
    ),
    "a prompt without the image that the conversation has": (
        {"prompt": Q, "chosen": [user(parts({"type": "image", "image": "img/0.png"}, Q)), assistant(GOOD)]}
        | {"rejected": BAD},
        {"prompt": SHOWN},
    ),
    "MIA-DPO": (FILE | {"prompt": f"<image-placeholder>\n{Q}"} | PAIR, {"prompt": f"{IMG}\n{Q}"}),
}


def expected(folder, changes):
    """The record in the plain form; files by absolute paths."""
    record = {"id": "1", "images": ["img/0.png"]} | PAIR | changes
    for name in {"images", "rejected_images"} & {*record}:
        record[name] = [path if path == RED_PATH else str(folder / path) for path in record[name]]
    return record


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_record(folder, name):
    """Names are read as their authors meant them, and the project reads what is written."""
    published, changes = PUBLISHED[name]
    write_json([published])
    assert run("in.jsonl", "out") == 0
    assert converted() == [expected(folder, changes)]
    (example,) = read_examples("out/data.jsonl")
    assert (example.chosen, example.rejected) == (GOOD, BAD)
    assert example.question[-1]["content"][-1]["text"].endswith(Q)
    assert [Path(path).read_bytes() for path in example.images] == [RED]
    assert [*example.images_rejected] == [str(folder / "img/1.png")] * ("rejected_images" in changes)


@pytest.mark.parametrize("mark", [IMG, "<image-placeholder>"])
def test_marks_stay_where_they_are(folder, mark):
    """MMPR and MIA-DPO name their images in the text: moved marks would show the wrong one first."""
    text, images = "Image-1: {0}\nImage-2: {0}\nWhich is red?", ["img/1.png", "img/0.png"]
    write_json([{"image": images, "question": text.format(mark)} | PAIR])
    assert run("in.jsonl", "out") == 0
    assert converted()[0]["prompt"] == text.format(IMG)
    (example,) = read_examples("out/data.jsonl")
    assert example.images == tuple(str(folder / image) for image in images)
    said = [part.get("text", "") for part in example.question[0]["content"]]
    assert said == ["Image-1: ", "", "\nImage-2: ", "", "\nWhich is red?"]


RATED = [
    {"model": model, "response": text, "annotations": {"Helpfulness": {"Rating": rating, "Rationale": ""}}}
    for model, text, rating in (("a", GOOD, "5"), ("b", BAD, "1"))
]
COLUMNS = {
    "response": [GOOD, BAD],
    "annotations": {"Helpfulness": {"Rating": ["5", "1"]}},
}  # as `datasets` may


@pytest.mark.parametrize("completions", [RATED, COLUMNS], ids=["rows", "columns"])
def test_vlfeedbacks_ratings_choose_the_pair_and_its_ids_name_the_images(folder, completions):
    """The worse answer would be trained as the better one, or about another image."""
    write_json([{"id": "llava-7", "prompt": Q, "models": ["a", "b"], "completions": completions}])
    assert run("in.jsonl", "out", "--images", "merged_images") == 0
    image = str(folder / "merged_images/llava-7.jpg")
    assert converted() == [{"id": "llava-7", "images": [image], "prompt": Q} | PAIR]


ASKED = FILE | {"question": Q}
LEFT_OUT = {  # what is left out, and a part of the reason
    "HA-DPO": (ASKED | {"chosen": [GOOD, "Red."], "rejected": [BAD, "Blue."]}, "several answers"),
    "OPA-DPO": (
        {"queries": Q, "standard_response": GOOD},
        "which OPA-DPO's own script makes, in the fields queries, standard_response",
    ),
    "no rejected answer": (SWIFT | {"image": URI}, "no question with two answers in the fields mess"),
    "no chosen answer": (
        FILE | {"messages": [user(Q)], "rejected": BAD},
        "'chosen' must end in an assistant",
    ),
    "no question": (FILE | PAIR, "no question"),
    "only a system text": (FILE | {"messages": [SYSTEM]} | PAIR, "user last"),
    "equal answers": (ASKED | {"chosen": GOOD, "rejected": f" {GOOD}"}, "equal"),
    "an empty answer": (ASKED | {"chosen": " ", "rejected": BAD}, "has no text"),
    "other turns before": (
        ENDINGS | FILE | {"rejected": [user("Why?"), assistant(BAD)]},
        "before their last turn",
    ),
    "no image": ({"question": Q} | PAIR, "no image"),
    "one of two missing": ({"images": ["img/0.png", "img/9.png"], "question": Q} | PAIR, "img/9.png"),
    "outside the folder": ({"image": "../secret.png", "question": Q} | PAIR, "secret.png"),
    "bytes of no image": (
        ASKED | {"image": f"data:image/png;base64,{'QUJD' * 2000}"} | PAIR,
        "no image itself",
    ),
    "a video": (ASKED | {"chosen": [assistant(parts({"type": "video"}))], "rejected": BAD}, "'text'"),
    "a prompt out of a template": (
        FILE | {"prompt": f"<|im_start|>user\n{Q}"} | PAIR,
        "holds '<|im_start|>'",
    ),
    "an answer out of a template": (ASKED | {"chosen": GOOD, "rejected": f"{BAD}[/INST]"}, "holds '[/INST]'"),
    "an earlier turn out of a template": (
        ASKED | {"history": [[f"[INST] {Q} [/INST]", "Yes."]]} | PAIR,
        "holds '[/INST]'",
    ),
    "a part out of a template": (
        FILE | {"prompt": [user(parts(f"<start_of_turn>user {Q}"))]} | PAIR,
        "holds '<start_of_turn>'",
    ),
    "several answers, the first alike": (ASKED | {"chosen": [GOOD, "a"], "rejected": [GOOD, "b"]}, "roles"),
    "an answer by the user": (ASKED | {"chosen": human(GOOD), "rejected": BAD}, "must end in an assistant"),
    "a rejected conversation that ends in a question": (
        ASKED | {"chosen": ENDINGS["chosen"], "rejected": [user(Q), user(BAD)]},
        "must end in an assistant",
    ),
    "two images, one rejected": (
        FILES | {"images": ["img/0.png"] * 2, "rejected_image": "img/1.png", "question": Q} | PAIR,
        "2 images and 1 rejected images",
    ),
    "a prompt of white space": (ASKED | {"prompt": "  "} | PAIR, "no text"),
    "a mark with a number": (FILE | {"question": f"<image 1>{Q}"} | PAIR, "holds '<image 1>'"),
    "an answer with an image": (ASKED | {"chosen": f"<ImageHere>{GOOD}", "rejected": BAD}, "an assistant"),
    "ms-swift's video": (
        {"messages": [user(f"{IMG}<video>{Q}"), assistant(GOOD)], "videos": ["v.mp4"]}
        | {"rejected_response": BAD, "images": ["img/0.png"]},
        "holds '<video>'",
    ),
    "a message without text": (
        ASKED | {"chosen": {"from": "gpt"}, "rejected": BAD},
        "'chosen': has no 'value'",
    ),
    "a lone surrogate": (
        FILE | {"question": "\ud800" + 5000 * Q} | PAIR,
        "character '\\ud800' in position 0",
    ),
    "control characters": ({"\033[31m": Q}, "fields \\x1b[31m"),
    "not an object": (7, "not in a known form"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out_with_the_reason(folder, capsys, name):
    """Among good records, a bad one is counted and named by number, never trained."""
    (folder.parent / "secret.png").write_bytes(RED)
    bad, reason = LEFT_OUT[name]
    good = FILE | {"question": Q} | PAIR
    write_json([good, bad, good, bad])
    assert run("in.jsonl", "out") == 0
    assert [example["id"] for example in converted()] == ["1", "3"]
    out = capsys.readouterr().out
    assert not Path("out/images").exists()  # a data set without rejected answers would fill the disk first
    assert "2 examples of 4 records" in out and "left out 2: record 2: " in out and reason in out
    assert max(map(len, out.splitlines())) < 400


ANSWERS = {  # as published, and what is trained
    "a conversation as an answer": ('[{"role": "user", "content": "Hi"}]',) * 2,
    "an object": ('{"question": "What?", "answer": "cat"}',) * 2,
    "a list": ('["a circle", "red"]',) * 2,
    "a table": ('[["a circle", "red"]]',) * 2,
    "a text in quotes": ('"It is red."',) * 2,
    "a number": ("42",) * 2,
    "a message": (json.dumps(gpt(GOOD)), GOOD),
    "a conversation": (json.dumps([user(Q), assistant(GOOD)]), GOOD),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_json_in_an_answer(folder, name):
    """Data sets hold messages as JSON, but the answer to a question may be JSON, too."""
    published, trained = ANSWERS[name]
    write_json([FILE | {"question": Q, "chosen": published, "rejected": BAD}])
    assert run("in.jsonl", "out") == 0
    assert converted()[0]["chosen"] == trained and converted()[0]["prompt"] == Q


def encoded(kind):
    return base64.b64encode(picture("red", kind)).decode()


EMBEDDED = {  # an image's format, and how it is published
    "BMP": ("BMP", encoded("BMP")),
    "TIFF": ("TIFF", encoded("TIFF")),
    "the alphabet of addresses": ("JPEG", encoded("JPEG").replace("+", "-").replace("/", "_").rstrip("=")),
    "an address without a type": ("PNG", "data:;base64," + encoded("PNG")),
    "an address of any type": ("GIF", "data:application/octet-stream;base64," + encoded("GIF")),
    "numbers": ("WEBP", {"bytes": [*picture("red", "WEBP")], "path": None}),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_image(folder, name):
    """Whatever its format and its encoding, the bytes of the image are written as they were."""
    kind, image = EMBEDDED[name]
    write_json([{"image": image, "question": Q} | PAIR])
    assert run("in.jsonl", "out") == 0
    (path,) = converted()[0]["images"]
    assert Path("out", path).read_bytes() == picture("red", kind)
    assert path.endswith(kind.lower().replace("jpeg", "jpg"))


def test_nothing_left_is_an_error(folder, capsys):
    """A command that forgot --images says so, and may be given again with it."""
    write_json([{"image": "0.png", "question": Q} | PAIR])
    assert run("in.jsonl", "out") == 2
    assert "--images" in capsys.readouterr().err and not Path("out/data.jsonl").exists()
    assert run("in.jsonl", "out", "--images", "img") == 0
    assert converted() == [expected(folder, {"prompt": Q})]


RECORD = {"image": "img/0.png", "question": Q} | PAIR
LAYOUTS = {
    "JSON lines": json.dumps(RECORD) + "\r\n\n" + json.dumps(RECORD),
    "an indented list": json.dumps([RECORD, RECORD], indent=1),
    "a list as data": json.dumps({"data": [RECORD, RECORD]}, indent=1),
    "a list beside other fields": json.dumps({"version": 1, "data": [RECORD, RECORD]}),
    "a list under the split's name": json.dumps({"test": [{}], "train": [RECORD, RECORD]}),
    "a byte order mark": "\ufeff" + json.dumps([RECORD, RECORD]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_json(folder, name):
    """Published files differ in it: none of their records may be lost."""
    Path("in.json").write_text(LAYOUTS[name])
    assert run("in.json", "out") == 0
    assert [example["id"] for example in converted()] == ["1", "2"]


def test_broken_lines_are_left_out(folder, capsys):
    """A damaged line takes no other line with it."""
    line, cut = json.dumps(RECORD), json.dumps(RECORD)[:40]
    bad = [cut, "{]", cut, f'{{"id": {"1" * 5000}}}', '{"id": ' + "[" * 100_000]
    Path("in.jsonl").write_text("\n".join([f"{line}\n{one}" for one in bad]))
    assert run("in.jsonl", "out") == 0
    assert [example["id"] for example in converted()] == ["1", "3", "5", "7", "9"]
    out = capsys.readouterr().out
    assert "left out 3: record 2: not valid JSON: Unterminated string starting at: line 1 column 36" in out
    assert "left out 1: record 8: " in out and "left out 1: record 10: " in out


OTHER_FILES = {
    "csv": (b"question,chosen\n1,2\n", 'begins with "question,chosen'),
    "gzip": (gzip.compress(b"{}"), "a gzip file: unpack it"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "utf-16": ("[{}]".encode("utf-16"), "UTF-16"),
    "two lists": (b"[{}, {}]\n[{}]", "not valid JSON: Extra data: line 2 column 1"),
    "a broken list": (b'[{"id": 1}, {"id": }]', "not valid JSON: Expecting value: line 1 column 20"),
    "latin-1": (b'{"question": "' + 5000 * b"x" + b'\xe9"}', "byte 0xe9 in position 5014"),
    "empty": (b"", 'begins with ""'),
    "damaged parquet": (b"PAR1" + bytes(100) + b"PAR1", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_named_in_one_line(folder, capsys, name):
    """Thousands of bad lines would not say what is wrong."""
    content, says = OTHER_FILES[name]
    if "parquet" in name:
        pytest.importorskip("datasets")
    Path("in.x").write_bytes(content)
    assert run("in.x", "out") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: in.x: ")]
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("name", ["silkie.json", "data/silkie.json"])
def test_a_file_that_is_not_there(folder, monkeypatch, capsys, name):
    """A slip of the pen is called that, also where it looks like a name of the hub."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(name, "out") == 2
    assert f"error: {name}: no such file" in capsys.readouterr().err and not Path("out").exists()


def test_without_datasets(folder, monkeypatch, capsys):
    """JSON needs no more than the project; parquet says what to install."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    write_json([RECORD])
    Path("in.parquet").write_bytes(b"PAR1")
    assert run("in.jsonl", "out") == 0 and run("in.parquet", "other") == 2
    assert "pip install datasets" in capsys.readouterr().err


RED_FILE, BLUE_FILE = {"bytes": RED, "path": "red.png"}, {"bytes": BLUE, "path": None}
IN_CHAT = {"chosen": [assistant(parts(GOOD))], "rejected": [assistant(parts(BAD))]}
TWO_SHOWN = [
    NO_TEXT | {"image": RED_FILE},
    NO_TEXT | {"image": BLUE_FILE},
    {"type": "text", "text": Q, "image": None},
]
HUB = {  # as the hub has them: a record, its images and its id
    "RLAIF-V": (
        {"image": RED_FILE, "question": Q, "image_path": "red.jpg", "idx": 40} | PAIR,
        [RED_PATH],
        "40",
    ),
    "RLHF-V": (IN_TEXT | {"image": RED_FILE, "idx": 40}, [RED_PATH], "40"),
    "TRL's": ({"images": [RED_FILE], "prompt": [user(parts(NO_TEXT, Q))]} | IN_CHAT, [RED_PATH], "1"),
    "SPA-VL": ({"question": Q, "image": BLUE_FILE} | PAIR, [BLUE_PATH], "1"),
    "VLFeedback": ({"id": "l-7", "prompt": Q, "completions": RATED, "image": RED_FILE}, [RED_PATH], "l-7"),
    "messages with images": ({"prompt": [user(TWO_SHOWN)]} | IN_CHAT, [RED_PATH, BLUE_PATH], "1"),
}


def write_parquet(path, record, n=1):
    datasets = pytest.importorskip("datasets")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list([record] * n)
    for name, kind in ("image", datasets.Image()), ("images", [datasets.Image()]):
        table = table.cast_column(name, kind) if name in record else table
    table.to_parquet(str(path))


@pytest.mark.parametrize("name", HUB)
def test_parquet(folder, name):
    """Embedded images are written untouched, wherever they stand, and go with their own question."""
    record, images, id = HUB[name]
    write_parquet("in.parquet", record)
    assert run("in.parquet", "out") == 0
    (written,), (example,) = converted(), read_examples("out/data.jsonl")
    content = {path: (RED if path == RED_PATH else BLUE) for path in images}
    assert written["images"] == images
    assert {f"images/{path.name}": path.read_bytes() for path in Path("out/images").iterdir()} == content
    assert (example.id, example.chosen, example.rejected) == (id, GOOD, BAD)
    shown = [{"type": "image"}] * len(images)
    assert example.question == [user([*shown, {"type": "text", "text": Q}])]


def test_a_name_of_the_hub(folder):
    """The library takes a folder laid out as on the hub in the place of a name."""
    for shard in range(2):
        write_parquet(f"owner/name/data/train-0000{shard}-of-00002.parquet", HUB["SPA-VL"][0])
    assert run("owner/name", "out") == 0
    assert [example["images"] for example in converted()] == [[BLUE_PATH]] * 2
    assert run("owner/name", "other", "--split", "test") == 2


@pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("stop", [1, 4])
def test_continues_where_it_was_stopped(folder, monkeypatch, source, stop):
    """Stopped at any record, even within a line, it writes what it writes in one go, and nothing twice. A
    result that was removed is made again."""
    if source == "in.parquet":
        write_parquet(source, HUB["SPA-VL"][0], n=5)
    else:
        write_json([RECORD, RECORD | {"rejected": None}, RECORD | {"image": URI}, RECORD, RECORD])
    assert run(source, "whole") == 0
    seen, real = [], convert.convert

    def stopping(record, number, *others):
        seen.append(number)
        if number == stop == len(seen):
            raise KeyboardInterrupt
        return real(record, number, *others)

    monkeypatch.setattr(convert, "convert", stopping)
    assert run(source, "out") == 130 and not Path("out/data.jsonl").exists()
    (log,) = Path("out").glob("records-*.jsonl")
    with log.open("a") as file:
        file.write('{"id": "cut sho')
    assert run(source, "out") == 0
    assert seen == [*range(1, stop + 1), *range(stop, 6)]
    Path("out/data.jsonl").unlink()
    assert run(source, "out") == run(source, "out") == 0 and len(seen) == 6  # all is there
    for name in ("data.jsonl", log.name):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_no_folder_of_others_is_touched(folder, capsys):
    """Neither a user's folder, nor the conversion of another file, of other flags, or of a changed file."""
    write_json([RECORD])
    write_json([RECORD], "other.jsonl")
    Path("mine").mkdir()
    Path("mine/data.jsonl").write_text("precious")
    assert run("in.jsonl", "out") == 0
    assert "complete: to convert again, first remove out" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in [*Path("out").iterdir(), *Path("mine").iterdir()]}
    for argv in (["in.jsonl", "mine"], ["other.jsonl", "out"], ["in.jsonl", "out", "--images", "img"]):
        assert run(*argv) == 2
        assert f"{argv[1]}: is there already" in capsys.readouterr().err
    write_json([RECORD | {"rejected": BAD[::-1]}])  # as long as before
    assert run("in.jsonl", "out") == 2
    assert before == {path: path.read_bytes() for path in [*Path("out").iterdir(), *Path("mine").iterdir()]}
