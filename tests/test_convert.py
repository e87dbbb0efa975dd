"""Protects `examples/convert.py`: published data become what their authors meant, and nothing is lost.

A mistake here trains on the wrong image, question or answer without a sound.
"""

import base64
import gzip
import hashlib
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

import train
from data import read_examples, run_command
from examples import convert, records

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


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


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
    "RLHF-V, an object": (FILE | {"text": {"question": Q} | PAIR}, {"prompt": Q}),
    "LLaMA-Factory": (FILES | {"conversations": [human(IMG + Q)]} | GPT_PAIR, {"prompt": IMG + Q}),
    "LLaMA-Factory, turns": (
        FILES | {"messages": CHAT, "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        {"prompt": CHAT},
    ),
    "LLaMA-Factory, system": (
        FILES | {"conversations": [human(Q)], "system": "Be brief."} | GPT_PAIR,
        {"prompt": [SYSTEM, user(Q)]},
    ),
    "a system message beats the column": (
        FILES | {"messages": [SYSTEM, user(Q)], "system": "Be long."} | GPT_PAIR,
        {"prompt": [SYSTEM, user(Q)]},
    ),
    "Alpaca": (FILES | {"instruction": IMG + Q, "input": ""} | PAIR, {"prompt": IMG + Q}),
    "Alpaca, input": (FILES | {"instruction": "Say.", "input": Q} | PAIR, {"prompt": f"Say.\n{Q}"}),
    "Alpaca, history": (
        FILES | {"instruction": Q, "history": [["<image>Is it round?", "Yes."]]} | PAIR,
        {"prompt": CHAT},
    ),
    "ms-swift": (SWIFT | {"rejected_response": BAD}, {"prompt": IMG + Q}),
    "ms-swift, turns": (
        {"images": "img/0.png", "messages": [SYSTEM, *CHAT, assistant(GOOD)], "rejected_response": BAD},
        {"prompt": [SYSTEM, *CHAT]},
    ),
    "ms-swift, query": (
        FILES | {"query": Q, "response": GOOD, "rejected_response": BAD},
        {"prompt": Q},
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
    "an answer beside the two": (
        FILE | {"conversations": [human(Q), gpt("It is a circle.")]} | PAIR,
        {"prompt": Q},
    ),
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
    "base64 in several lines": (
        {"image": BASE64[:60] + "\n" + BASE64[60:], "question": Q} | PAIR,
        {"prompt": Q, "images": [RED_PATH]},
    ),
    "base64 in a list": (
        {"images": [{"bytes": BASE64, "path": "x.png"}], "question": Q} | PAIR,
        {"prompt": Q, "images": [RED_PATH]},
    ),
    "RLAIF-V, bytes cut short beside a path": (
        {"image": {"bytes": "/9j/4AAQ", "path": None}, "image_path": "img/0.png", "question": Q} | PAIR,
        {"prompt": Q},
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


def test_marks_stay_where_they_are(folder):
    """MMPR and MIA-DPO name their images in the text: moved marks would show the wrong one first."""
    text = "Image-1: <image>\nImage-2: <image>\nWhich is red?"
    record = {"image": ["img/1.png", "img/0.png"]} | PAIR
    theirs = text.replace(IMG, "<image-placeholder>")
    write_json([record | {"question": text}, record | {"prompt": theirs}])
    assert run("in.jsonl", "out") == 0
    images = [str(folder / "img/1.png"), str(folder / "img/0.png")]
    assert [example["prompt"] for example in converted()] == [text, text]
    assert [example["images"] for example in converted()] == [images, images]
    for example in read_examples("out/data.jsonl"):
        assert [part.get("text", "") for part in example.question[0]["content"]] == [
            "Image-1: ", "", "\nImage-2: ", "", "\nWhich is red?"]  # fmt: skip


RATED = [
    {"model": model, "response": text, "annotations": {"Helpfulness": {"Rating": rating, "Rationale": ""}}}
    for model, text, rating in (("a", GOOD, "5"), ("b", BAD, "1"))
]


def test_vlfeedback_passes_unchanged_but_for_its_images(folder):
    """Its ratings choose the pair, later; its images lie beside the file or in merged_images/, by id."""
    record = {"id": "llava-7", "prompt": Q, "models": ["a", "b"], "completions": RATED}
    write_json([record])
    assert run("in.jsonl", "out", "--images", "merged_images") == 0
    assert converted() == [record | {"images": [str(folder / "merged_images/llava-7.jpg")]}]
    (example,) = read_examples("out/data.jsonl", subset="llava")
    assert (example.id, example.chosen, example.rejected) == ("llava-7", GOOD, BAD)


def test_vlfeedback_as_columns_becomes_rows(folder):
    """The export of `datasets` turns rows into columns, at any depth."""
    columns = {
        "model": ["a", "b"],
        "response": [GOOD, BAD],
        "annotations": {"Helpfulness": {"Rating": ["5", "1"]}},
    }
    write_json([{"id": "llava-7", "prompt": Q, "completions": columns}])
    assert run("in.jsonl", "out", "--images", "merged_images") == 0
    (example,) = read_examples("out/data.jsonl")
    assert (example.chosen, example.rejected) == (GOOD, BAD)


# what is left out, and a part of the reason
LEFT_OUT = {
    "HA-DPO": ({"image_id": 7, "chosen": [GOOD, "Red."], "rejected": [BAD, "Blue."]}, "HA-DPO's own script"),
    "several rejected": (
        FILE | {"question": Q, "chosen": GOOD, "rejected": [BAD, "Green."]},
        "several texts",
    ),
    "OPA-DPO": (
        {"queries": Q, "standard_response": GOOD},
        "OPA-DPO's own script makes them): queries, standard_response",
    ),
    "no rejected answer": (SWIFT, "): messages, images"),
    "no chosen answer": (FILE | {"messages": [user(Q)], "rejected": BAD}, "no question with two answers"),
    "no question": (FILE | PAIR, "no question"),
    "only a system text": (FILE | {"messages": [SYSTEM]} | PAIR, "no question"),
    "equal answers": (FILE | {"question": Q, "chosen": GOOD, "rejected": f" {GOOD}"}, "equal"),
    "an empty answer": (FILE | {"question": Q, "chosen": " ", "rejected": BAD}, "empty"),
    "other turns before": (
        FILE | {"chosen": [user(Q), assistant(GOOD)], "rejected": [user("Why?"), assistant(BAD)]},
        "differ before their last turn",
    ),
    "no image": ({"question": Q} | PAIR, "no such image"),
    "a missing image": ({"image": "img/9.png", "question": Q} | PAIR, "'img/9.png'"),
    "one of two missing": ({"images": ["img/0.png", "img/9.png"], "question": Q} | PAIR, "img/9.png"),
    "outside the folder": ({"image": "../secret.png", "question": Q} | PAIR, "secret.png"),
    "bytes of no image": (
        {"image": f"data:image/png;base64,{'QUJD' * 20}", "question": Q} | PAIR,
        "no image",
    ),
    "a video": (
        FILE | {"prompt": Q, "chosen": [assistant(parts({"type": "video"}))], "rejected": BAD},
        "'text'",
    ),
    "a prompt out of a template": (
        FILE | {"prompt": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"} | PAIR,
        "chat template already: <|im_start|>",
    ),
    "an answer out of a template": (
        FILE | {"prompt": Q, "chosen": GOOD, "rejected": f"{BAD}<|im_end|>"},
        "<|im_end|>",
    ),
    "not an object": (7, "not an object"),
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
    assert "2 examples of 4 records" in out and "left out 2: record 2: " in out and reason in out


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
    "a list": json.dumps([RECORD, RECORD]),
    "an indented list": json.dumps([RECORD, RECORD], indent=1),
    "a list as data": json.dumps({"data": [RECORD, RECORD]}, indent=1),
    "indented objects": 2 * json.dumps(RECORD, indent=1),
    "a byte order mark": "\ufeff" + json.dumps([RECORD, RECORD]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("chunk", [16, 1 << 18])
def test_layouts_of_json(folder, monkeypatch, name, chunk):
    """Records are whole wherever a chunk of the file ends."""
    monkeypatch.setattr(records, "CHUNK", chunk)
    Path("in.json").write_text(LAYOUTS[name])
    assert run("in.json", "out") == 0
    assert [example["id"] for example in converted()] == ["1", "2"]


def test_broken_lines_are_left_out(folder, capsys):
    """A damaged line takes no other line with it."""
    line, cut = json.dumps(RECORD), json.dumps(RECORD)[:40]
    Path("in.jsonl").write_text(f"{line}\n{cut}\n{line}\n{{]\n{line}\n{cut}")
    assert run("in.jsonl", "out") == 0
    assert [example["id"] for example in converted()] == ["1", "3", "5"]
    assert "left out 3: record 2: not valid JSON" in capsys.readouterr().out


def test_a_file_larger_than_memory(folder):
    """24 MiB of records pass through less than 4."""
    with open("in.json", "w") as file:
        file.write("[" + ",".join([json.dumps(RECORD | {"note": "x" * 200_000})] * 120) + "]")
    tracemalloc.start()
    assert run("in.json", "out") == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(converted()) == 120 and peak < 4 * 2**20


OTHER_FILES = {
    "csv": (b"question,chosen\n1,2\n", "begins with b'question,chosen"),
    "gzip": (gzip.compress(b"{}"), "gzip (unpack it first)"),
    "zip": (b"PK\3\4" + bytes(30), "zip archive"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "utf-16": ("[{}]".encode("utf-16"), "UTF-16"),
    "html": (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE"),
    "empty": (b"", "begins with b''"),
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


def embedded_parquet(path, name, n=1):
    """n records as the hub has them: image structs whose bytes are RED, and BLUE where there are two."""
    datasets = pytest.importorskip("datasets")
    text, image = datasets.Value("string"), datasets.Image()
    message = {"role": text, "content": [{"type": text, "text": text}]}
    with_image = {"role": text, "content": [{"type": text, "text": text, "image": image}]}
    red, blue = {"bytes": RED, "path": "red.png"}, {"bytes": BLUE, "path": None}
    chat = {"chosen": [assistant(parts(GOOD))], "rejected": [assistant(parts(BAD))]}
    part = {"type": "image", "text": None}
    features, record = {
        "RLAIF-V": (
            {"ds_name": text, "image": image, "question": text, "chosen": text, "rejected": text,
             "image_path": text, "idx": datasets.Value("int64")},
            {"ds_name": "x", "image": red, "question": Q, "image_path": "red.jpg", "idx": 40} | PAIR,
        ),
        "RLHF-V": (
            {"image": image, "text": text, "origin_split": text, "idx": datasets.Value("int64")},
            IN_TEXT | {"image": red, "idx": 40},
        ),
        "TRL's rlaif-v_formatted": (
            {"images": [image], "prompt": [message], "chosen": [message], "rejected": [message]},
            {"images": [red], "prompt": [user(parts(part, Q))]} | chat,
        ),
        "SPA-VL": (
            {"question": text, "chosen": text, "rejected": text, "image": image},
            {"question": Q, "image": blue} | PAIR,
        ),
        "VLFeedback": (
            {"id": text, "prompt": text, "models": [text], "image": image, "completions": [
                {"model": text, "response": text,
                 "annotations": {"Helpfulness": {"Rating": text, "Rationale": text}}}]},
            {"id": "llava-7", "prompt": Q, "models": ["a", "b"], "completions": RATED, "image": red},
        ),
        "messages with images": (
            {"prompt": [with_image], "chosen": [message], "rejected": [message]},
            {"prompt": [user(parts(part | {"image": red}, part | {"image": blue},
                                   {"type": "text", "text": Q, "image": None}))]} | chat,
        ),
    }[name]  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list([record] * n, features=datasets.Features(features))
    data.to_parquet(str(path))


# the images, and the id
PARQUET = {
    "RLAIF-V": ([RED_PATH], "40"),
    "RLHF-V": ([RED_PATH], "40"),
    "TRL's rlaif-v_formatted": ([RED_PATH], "1"),
    "SPA-VL": ([BLUE_PATH], "1"),
    "VLFeedback": ([RED_PATH], "llava-7"),
    "messages with images": ([RED_PATH, BLUE_PATH], "1"),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet(folder, name):
    """Embedded images are written untouched, wherever they stand, and go with their own question."""
    embedded_parquet("in.parquet", name)
    assert run("in.parquet", "out") == 0
    images, id = PARQUET[name]
    (record,), (example,) = converted(), read_examples("out/data.jsonl")
    assert record["images"] == images and {*Path("out/images").iterdir()} == {Path("out", i) for i in images}
    assert [Path("out", i).read_bytes() for i in images] == [
        {RED_PATH: RED, BLUE_PATH: BLUE}[i] for i in images
    ]
    assert (example.id, example.chosen, example.rejected) == (id, GOOD, BAD)
    shown = [{"type": "image"}] * len(images)
    assert example.question == [user([*shown, {"type": "text", "text": Q}])]


def test_a_name_of_the_hub(folder):
    """The library takes a folder laid out as on the hub in the place of a name."""
    for shard in range(2):
        embedded_parquet(f"owner/name/data/train-0000{shard}-of-00002.parquet", "SPA-VL")
    assert run("owner/name", "out") == 0
    assert [example["images"] for example in converted()] == [[BLUE_PATH]] * 2
    assert run("owner/name", "other", "--split", "test") == 2


def test_images_of_left_out_records_are_not_written(folder):
    """A data set without rejected answers would fill the disk first."""
    write_json([{"image": URI, "question": Q, "chosen": GOOD}, RECORD])
    assert run("in.jsonl", "out") == 0 and not Path("out/images").exists()


@pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_continues_where_it_was_stopped(folder, monkeypatch, source, stop):
    """Stopped at any record, even within a line, it writes what it writes in one go, and nothing twice."""
    if source == "in.parquet":
        embedded_parquet(source, "SPA-VL", n=5)
    else:
        write_json([RECORD, RECORD | {"rejected": None}, RECORD | {"image": URI}, RECORD, RECORD])
    assert run(source, "whole") == 0
    seen, real = [], convert.convert

    def stopping(record, number, *others):
        seen.append(number)
        if seen.count(stop) == 1 and number == stop:
            raise KeyboardInterrupt
        return real(record, number, *others)

    monkeypatch.setattr(convert, "convert", stopping)
    monkeypatch.setattr(convert, "SAVE_EVERY", 2)
    assert run(source, "out") == 130 and not Path("out/data.jsonl").exists()
    with open("out/unfinished.jsonl", "a") as file:
        file.write('{"id": "cut sho')
    assert run(source, "out") == 0
    saved = {1: 0, 4: 2, 5: 4}[stop]
    assert seen == [*range(1, stop + 1), *range(saved + 1, 6)]
    for name in ("data.jsonl", "convert.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    assert not Path("out/unfinished.jsonl").exists()
    assert run(source, "out") == 0 and len(seen) == stop + 5 - saved  # all is there


def test_no_folder_of_others_is_touched(folder, capsys):
    """Neither a user's folder, nor the conversion of another file, of other flags, or of a changed file."""
    write_json([RECORD])
    write_json([RECORD], "other.jsonl")
    Path("mine").mkdir()
    Path("mine/data.jsonl").write_text("precious")
    assert run("in.jsonl", "out") == 0
    before = Path("out/data.jsonl").read_bytes()
    for argv in (["in.jsonl", "mine"], ["other.jsonl", "out"], ["in.jsonl", "out", "--images", "img"]):
        assert run(*argv) == 2
        assert f"{argv[1]}: is there already" in capsys.readouterr().err
    write_json([RECORD, RECORD])
    assert run("in.jsonl", "out") == 2
    assert Path("mine/data.jsonl").read_text() == "precious" and [*Path("mine").iterdir()] == [
        Path("mine/data.jsonl")
    ]
    assert Path("out/data.jsonl").read_bytes() == before


def test_a_removed_result_is_not_filled_with_zeros(folder, capsys):
    """The state knows of more than is there."""
    write_json([RECORD])
    assert run("in.jsonl", "out") == 0
    Path("out/data.jsonl").unlink()
    assert run("in.jsonl", "out") == 2
    assert "data.jsonl is gone" in capsys.readouterr().err and not Path("out/data.jsonl").exists()


def test_shows_a_bar(folder, capsys):
    """Hours of silence look like a hang."""
    write_json([RECORD])
    assert run("in.jsonl", "out") == 0
    assert "converting: 1 records" in capsys.readouterr().err
