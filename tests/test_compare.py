"""Tests of comparing models: `pytest tests/test_compare.py`. Each says what breaks if it fails.

They protect who said what: an answer, a number or a vote under another model's name is worse than none.
Answers belong to their questions, images, model and adapter. Two adapters' numbers are subtracted example by
example. The page of examples/compare.py shows texts as they are, hides names, and loses no vote: it is tried
in a headless Chromium where one is installed.
"""

import base64
import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image

import train
from data import Example, run_command
from examples import answer, compare, evaluate, shapes

ROOT = Path(__file__).resolve().parent.parent
BASE = str(ROOT / "examples" / "base")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two random adapters of the base that examples/ ships, of different size."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, rank in enumerate((2, 3)):
        torch.manual_seed(seed)
        layers = r".*language_model.*(q_proj|v_proj|fc1)"
        config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=layers, init_lora_weights=False)
        peft.get_peft_model(train.load_model(BASE)[0], config).save_pretrained(folder / "ab"[seed])
    return [str(folder / "a"), str(folder / "b")]


@pytest.fixture
def pairs(tmp_path):
    """A preference file of six questions about drawn scenes."""
    return str(shapes.write_pairs(tmp_path / "data", 6))


class Stub:
    """A model that only knows which of its adapters is on."""

    def __init__(self):
        self.on = "default"

    def set_adapter(self, name):
        self.on = name

    @contextlib.contextmanager
    def disable_adapter(self):
        before, self.on = self.on, "base"
        yield
        self.on = before


@pytest.fixture
def stub(monkeypatch):
    """`load_tuned` without weights, and answers that name the adapter that was on and the question."""
    model, names = Stub(), {"base": "base", "default": "first", "adapter_1": "second"}

    def say(model, processor, questions, *limits, **options):
        return [f"{names[model.on]}: {answer.text_of(text)} {len(images)}" for images, text in questions]

    monkeypatch.setattr(answer, "load_tuned", lambda *arguments: (model, train.load_processor(BASE)))
    monkeypatch.setattr(answer, "generate_answers", say)
    return model


def refused(capsys, script, arguments):
    """The one line of a command that ends in a user's mistake."""
    assert run_command(script.run, [*map(str, arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def grey(path, level=100, size=(8, 8)):
    Image.new("RGB", size, (level, level, level)).save(path)
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# -------------------------------------------------------------------------------------- several adapters


@torch.no_grad()
def logits_of(model, processor):
    inputs = processor(text="What is it?", return_tensors="pt")
    return model(**inputs).logits


def test_each_adapter_of_several_speaks_as_if_it_were_alone(adapters, monkeypatch):
    """An answer under the name of another adapter. Expected: each loaded by itself, into a model of its
    own."""
    base, processor = train.load_model(BASE)
    expected = [logits_of(base, processor)]
    expected += [logits_of(answer.load_tuned(BASE, adapter, "cpu")[0], processor) for adapter in adapters]
    loads, load_model = [], answer.load_model
    monkeypatch.setattr(answer, "load_model", lambda *given: loads.append(given) or load_model(*given))
    model, _ = answer.load_tuned(BASE, adapters, "cpu")
    for number in (1, None, 0, 1):  # also there and back again
        with answer.speaking_as(model, number):
            found = logits_of(model, processor)
        distances = [(found - logits).abs().max().item() for logits in expected]
        assert distances.index(min(distances)) == (0 if number is None else number + 1)
        assert min(distances) < 1e-4 and sorted(distances)[1] > 0.01
    assert len(loads) == 1  # a model of 7B takes minutes to read


def test_a_second_adapter_of_another_model_is_refused(adapters, tmp_path):
    """peft goes on without its weights, and the answers are the base's."""
    shutil.copytree(adapters[1], tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"].replace("fc1", "fc1|fc2")
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(answer.BadInput, match="is no adapter of .* weights are missing"):
        answer.load_tuned(BASE, [adapters[0], tmp_path / "b"], "cpu")


def test_answer_command_asks_each_model_each_question(stub, adapters, tmp_path, capsys):
    """The paper's Figure 3: a question, then the base's answer and each adapter's, about all images at
    once."""
    images = [grey(tmp_path / f"{name}.png") for name in "xy"]
    command = ["--model", BASE, "--image", *images, "--question", "Why?", "Where?", "--adapter", *adapters]
    assert run_command(answer.run, command) == 0
    names = ["base", *adapters]
    rows = [re.split(r": +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["Why?"] and rows[4] == ["Where?"] and len(rows) == 8
    assert [name for name, *_ in rows[1:4]] == [name for name, *_ in rows[5:]] == names
    said = ["base: Why? 2", "first: Why? 2", "second: Why? 2"]
    assert [text for _, text in rows[1:4]] == said
    assert [text for _, text in rows[5:]] == [text.replace("Why", "Where") for text in said]


@pytest.mark.parametrize("token", ["<image>", "\t" * 9])
def test_an_image_token_in_a_question_is_refused_before_the_weights(token, monkeypatch, capsys):
    """It asks for an image that is not there: an internal error, after minutes of loading."""
    monkeypatch.setattr(answer, "load_tuned", lambda *given: pytest.fail("weights are read"))
    error = refused(capsys, answer, ["--model", BASE, "--question", "Why?", f"What {token} is it?"])
    assert "holds the image token" in error and repr(token) in error.replace("\\\\", "\\")


# -------------------------------------------------------------------------------------- files of answers


QUESTIONS = [((f"/x/{i}.png",), f"Why {i}?") for i in range(5)]


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(answer, "open_image", lambda path: path)


def test_answers_are_kept_as_they_come_and_gone_on_with(tmp_path, opened):
    """A kill after three hours must not cost three hours. Batches of two; the second ends in a kill. The file
    ends in half a line, as of a full disk."""
    belongs, path, asked = answer.identity("m", QUESTIONS, 4), tmp_path / "new" / "a.jsonl", []

    def ask(batch):
        asked.append([text for _, text in batch])
        if len(asked) == 2:
            assert [line["answer"] for line in lines_of(path)[1:]] == ["WHY 0?", "WHY 1?"]  # already there
            raise KeyboardInterrupt
        return [text.upper() for _, text in batch]

    with pytest.raises(KeyboardInterrupt):
        answer.answer_all(path, belongs, QUESTIONS, ask, 2)
    with path.open("a") as file:
        file.write('{"question": "Why 2?", "ans')
    expected = [f"WHY {i}?" for i in range(5)]
    assert answer.answer_all(path, belongs, QUESTIONS, ask, 2) == expected
    assert asked == [["Why 0?", "Why 1?"], ["Why 2?", "Why 3?"], ["Why 2?", "Why 3?"], ["Why 4?"]]
    assert [(line["question"], line["answer"]) for line in lines_of(path)[1:]] == [
        (f"Why {i}?", f"WHY {i}?") for i in range(5)
    ]
    assert answer.answer_all(path, belongs, QUESTIONS, pytest.fail, 2) == expected


def test_a_file_of_answers_goes_on_only_with_what_it_belongs_to(tmp_path, opened):
    """Half of the answers another model's, or about other images, and a table of numbers that nobody can
    tell."""
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
    (model / "model.safetensors").write_text("weights")
    (adapter / "adapter_model.safetensors").write_text("weights")
    (adapter / "args.json").write_text("{}")

    def belongs(questions=QUESTIONS, n=4):
        whose = {"adapter": answer.digest(adapter, "adapter_*")}
        return answer.identity(str(model), questions, n) | whose

    path, ask = tmp_path / "a.jsonl", lambda batch: ["x"] * len(batch)
    answer.answer_all(path, first := belongs(), QUESTIONS, ask)
    kept = path.read_bytes()
    elsewhere = [((f"/y/{i}.png",), f"Why {i}?") for i in range(5)]
    reworded = [(images, text + "?") for images, text in QUESTIONS]
    cases = [
        ("images", belongs(elsewhere)),
        ("questions", belongs(reworded)),
        ("max new tokens", belongs(n=5)),
    ]
    (model / "model.safetensors").write_text("others")
    cases.append(("model", belongs()))
    (model / "model.safetensors").write_text("weights")
    (adapter / "adapter_model.safetensors").write_text("trained again")
    cases.append(("adapter", belongs()))
    cases.append(("adapter", first | {"adapter": None}))  # the base's
    for what, other in cases:
        with pytest.raises(answer.BadInput, match=f"cannot go on: holds answers of other {what}: "):
            answer.answer_all(path, other, QUESTIONS, pytest.fail)
    (adapter / "adapter_model.safetensors").write_text("weights")
    (adapter / "args.json").write_text("a run that goes on writes it anew")
    assert belongs() == first and path.read_bytes() == kept
    answer.answer_all(path, belongs(), QUESTIONS, pytest.fail)


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "my notes", '{"a": 1}\n', "my notes\nof today\n"])
def test_a_file_of_the_users_own_is_left_as_it_is(content, tmp_path):
    """It has the name of a file of answers."""
    (path := tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(answer.BadInput, match="a.jsonl: cannot go on: "):
        answer.answer_all(path, answer.identity("m", QUESTIONS, 4), QUESTIONS, pytest.fail)
    assert path.read_text() == content


def test_answers_that_two_commands_wrote_into_one_file_are_refused(tmp_path, opened):
    """Each answer would stand at another's question."""
    path, belongs = tmp_path / "a.jsonl", answer.identity("m", QUESTIONS, 4)
    answer.answer_all(path, belongs, QUESTIONS, lambda batch: ["x"] * len(batch), 2)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[1:3]]))
    with pytest.raises(answer.BadInput, match="two commands wrote into it"):
        answer.answer_all(path, belongs, QUESTIONS, pytest.fail)


# ---------------------------------------------------------------------------------- did it get better?


def sections(out):
    """{title: {name: (mean, low, high)}} of what evaluate.py printed of several models."""
    found, current = {}, {}
    for line in out.splitlines():
        if row := re.match(r"  (\S.*?) +(-?\d+\.\d+) +(-?\d+\.\d+) to +(-?\d+\.\d+)", line):
            current[row[1]] = tuple(map(float, row.groups()[1:]))
        elif not line.startswith("  "):
            current = found[line] = {}
    return found


def test_differences_are_taken_example_by_example(stub, adapters, pairs, monkeypatch, capsys):
    """Unpaired, the spread of the examples drowns a difference that each of them shows: here the second
    adapter's loss is 0.5 lower on each of six, which differ by 10. A metric's values by hand: 0, 10, ...,
    50."""
    values = [10.0 * i for i in range(6)]
    shift = {"default": 0, "adapter_1": -0.5}
    scores = lambda *given, **options: {"loss": [value + shift[stub.on] for value in values]}
    image = lambda: [value * (1 + shift[stub.on]) for value in values]
    margins = lambda *given: {"image": image(), "no_image": values, "other_image": []}
    monkeypatch.setattr(evaluate, "score", scores)
    monkeypatch.setattr(evaluate, "score_margins", margins)
    command = ["--model", BASE, "--data", pairs, "--adapter"]
    assert run_command(evaluate.run, [*command, *adapters]) == 0
    found, (a, b) = sections(capsys.readouterr().out), adapters
    assert [*found][2:] == [a, b, f"{b} minus {a}"]
    assert found[a]["loss"][0] == 25 and found[b]["loss"][0] == 24.5
    assert found[f"{b} minus {a}"]["loss"] == (-0.5, -0.5, -0.5)
    mean, low, high = found[f"{b} minus {a}"]["margin, image"]
    assert mean == -12.5 and low < -17 < -8 < high < -3  # half of 0 ... 50, with its own spread
    assert run_command(evaluate.run, [*command, b]) == 0
    assert "minus" not in capsys.readouterr().out


def test_each_adapter_is_scored_as_if_it_were_alone(adapters, pairs, capsys):
    """Numbers under another adapter's name. Means of differences are differences of means."""
    command = ["--model", BASE, "--data", pairs, "--limit", "3", "--adapter"]
    alone = []
    for adapter in adapters:
        assert run_command(evaluate.run, [*command, adapter]) == 0
        _, numbers = sections(capsys.readouterr().out).values()
        alone.append(numbers)
    assert run_command(evaluate.run, [*command, *adapters]) == 0
    found = sections(capsys.readouterr().out)
    assert [found[adapter] for adapter in adapters] == alone and alone[0]["loss"] != alone[1]["loss"]
    difference = found[f"{adapters[1]} minus {adapters[0]}"]
    assert len(difference) == len(alone[0]) >= 13
    for name, (mean, _, _) in difference.items():
        assert mean == pytest.approx(alone[1][name][0] - alone[0][name][0], abs=2e-4)


def test_further_adapters_are_scored_as_the_first(adapters, pairs, tmp_path, capsys):
    """Losses of two kinds, or margins of two betas, are no difference of two models; so it is said."""
    runs = [tmp_path / name for name in ("dpo", "mdpo")]
    for adapter, run in zip(adapters, runs):
        shutil.copytree(adapter, run)
    arguments = vars(train.parse_args(["--model", "m", "--data", "d", "--no-conditional", "--beta", "0.3"]))
    (runs[0] / "args.json").write_text(json.dumps(arguments))
    command = ["--model", BASE, "--data", pairs, "--limit", "2", "--adapter"]
    assert run_command(evaluate.run, [*command, *map(str, runs)]) == 0
    lines = (out := capsys.readouterr().out).splitlines()
    said = [line for line in lines if "trained with" in line]
    assert said == [f"{runs[1]}: trained with other beta, no-conditional; scored as {runs[0]} is"]
    assert all("loss/conditional" not in section for section in sections(out).values())
    assert run_command(evaluate.run, [*command, *map(str, runs[::-1])]) == 0
    assert "loss/conditional" in sections(capsys.readouterr().out)[str(runs[0])]


ODD = {  # args.json of a run: what the error says
    "{": "args.json: cannot be read: not valid JSON",
    "[]": "args.json: cannot be read: is not in a known form",
    '{"beta": "x"}': "args.json: cannot be read: argument --beta: invalid float value: 'x'",
    '{"beta": [1, 2]}': "args.json: cannot be read: ",
    '{"crop": 0.5}': "args.json: cannot be read: argument --crop: expected 2 arguments",
    '{"crop": [0.1, "y"]}': "args.json: cannot be read: argument --crop: ",
    '{"anchors": ["mine"]}': "args.json: cannot be read: argument --anchors: invalid choice: 'mine'",
    '{"reject": {}}': "args.json: cannot be read: argument --reject: invalid choice: '{}'",
    '{"seed": 1.5}': "args.json: cannot be read: argument --seed: invalid int value: '1.5'",
    '{"loss": ["mdpo_loss"]}': "the run's loss",
    '{"loss": "mine"}': "the run's loss, mine of mdpo.py or variants.py: has no 'mine'",
}


@pytest.mark.parametrize("content", ODD)
def test_an_odd_args_json_is_a_mistake_of_one_line(content, adapters, pairs, tmp_path, capsys):
    """Ended as an internal error, or scored by what the run was not trained with."""
    shutil.copytree(adapters[0], tmp_path / "run")
    (tmp_path / "run" / "args.json").write_text(content)
    command = ["--model", BASE, "--data", pairs, "--adapter", tmp_path / "run"]
    assert ODD[content] in refused(capsys, evaluate, command)


def test_a_run_is_read_as_train_reads_its_own_arguments(tmp_path):
    """Scored with another beta, crop or anchor than trained. A negative number in e-notation is no flag."""
    flags = "--beta 0.3 --delta=-1e-05 --crop 0.3 0.6 --seed 5 --anchors chosen rejected --max-length 75"
    flags += " --max-pixels 784"
    trained = train.parse_args(["--model", "m", "--data", "d", "--reject", "crop", *flags.split()])
    (tmp_path / "args.json").write_text(json.dumps(vars(trained) | {"loss": "chip_loss"}))
    found, expected = vars(evaluate.read_run(tmp_path)), vars(trained) | {"loss": "chip_loss"}
    names = ["beta", "delta", "crop", "seed", "anchors", "max_length", "max_pixels", "reject", "no_image"]
    names += ["conditional", "loss"]
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    defaults = vars(evaluate.read_run(None))
    assert defaults["beta"] == 0.1 and defaults["conditional"] and defaults["loss"] == "mdpo_loss"
    (tmp_path / "args.json").write_text(json.dumps({"no_image": True, "anchors": ["none"]}))
    found = evaluate.read_run(tmp_path)
    assert found.no_image and not found.conditional


SAID = {
    "There is no dog in the picture.": True,
    "there isn't a ring": True,
    "I'm sorry, but I can't see that.": True,
    "The image does not show a cat.": True,
    "A clock is not visible here.": True,
    "It cannot be red.": False,
    "The dog is not asleep.": False,
    "No.": False,
    "A notable ring, therefore blue.": False,
    "": False,
}


def test_refusals_are_told_by_their_words():
    """The share of refusals is how a model that refuses all looks better than it is."""
    found = evaluate.measure([*SAID])
    assert found["answers, refusals"] == [*map(float, SAID.values())]
    assert found["answers, words"] == [7, 4, 7, 7, 6, 4, 5, 1, 5, 0]


def test_answers_of_base_and_adapters_are_compared(stub, adapters, pairs, tmp_path, monkeypatch, capsys):
    """Length is how a model that says less hallucinates less. By hand, of six answers: the first adapter says
    three words once more than the base on three, refuses one; the second equals the first on four."""
    said = {
        "base": ["red"] * 6,
        "default": ["red"] * 3 + ["it is all red"] * 2 + ["there is no ring"],
        "adapter_1": ["red"] * 3 + ["it is all red"] + ["there is no red", "blue"],
    }
    adapters = [shutil.copytree(adapter, tmp_path / name) for adapter, name in zip(adapters, "ab")]
    adapters = [*map(str, adapters)]
    monkeypatch.setattr(answer, "generate_answers", lambda *given: said[stub.on][: len(given[2])])
    monkeypatch.setattr(evaluate, "score", lambda *given, **options: {"loss": [1.0] * 6})
    monkeypatch.setattr(evaluate, "score_margins", lambda *given: {})
    command = ["--model", BASE, "--data", pairs, "--answers", str(tmp_path / "said"), "--adapter", *adapters]
    assert run_command(evaluate.run, command) == 0
    found, (a, b) = sections(capsys.readouterr().out), adapters
    assert [*found][2:] == ["base", a, b, f"{a} minus base", f"{b} minus base", f"{b} minus {a}"]
    means = {title: {name: row[0] for name, row in rows.items()} for title, rows in found.items()}
    assert means["base"] == {"answers, words": 1, "answers, refusals": 0}
    assert means[a] == {"loss": 1, "answers, words": 2.5, "answers, refusals": 0.1667}
    assert means[f"{a} minus base"] == {
        "answers, words": 1.5,
        "answers, refusals": 0.1667,
        "answers, equal": 0.5,
    }
    words = {"loss": 0, "answers, words": -0.5, "answers, refusals": 0, "answers, equal": 0.6667}
    assert means[f"{b} minus {a}"] == words
    files = sorted((tmp_path / "said").iterdir())
    texts = {tuple(line["answer"] for line in lines_of(file)[1:]) for file in files}
    assert len(files) == 3 and texts == {*map(tuple, said.values())}
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)
    assert run_command(evaluate.run, command) == 0  # goes on after the last answer
    (tmp_path / "b" / "adapter_model.safetensors").write_text("trained again in the same folder")
    assert "b.jsonl: cannot go on: holds answers of other adapter: " in refused(capsys, evaluate, command)


# -------------------------------------------------------------------------------------- the page's questions


def page_data(path):
    """What the page holds."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text())[1]
    )


def text_of(pieces):
    return "".join(text for text, _ in pieces)


def test_page_of_base_and_adapters(stub, adapters, pairs, tmp_path, monkeypatch, capsys):
    """Each answer under its own name, beside its own question and image."""
    to, records = tmp_path / "page.html", json.loads(Path(pairs).read_text())
    sides = [adapters[1], "base", adapters[0]]
    command = ["--model", BASE, "--data", pairs, "--to", str(to), "--adapter", *sides]
    assert run_command(compare.run, command) == 0
    assert f"{to}: 6 questions, 0 of them with equal answers" in capsys.readouterr().out
    content = page_data(to)
    assert not content["blind"] and len(content["items"]) == 6
    for item, record in zip(content["items"], records):
        question = record["prompt"].partition("USER: <image>\n")[2].removesuffix(" ASSISTANT:")
        assert item["question"] == question and item["who"] == sides
        # As they stand in the command: adapter b is its first, which load_tuned switches on as "default".
        said = [f"{who}: {question} 1" for who in ("first", "base", "second")]
        assert [*map(text_of, item["answers"])] == said
        (number,) = item["images"]
        encoded = content["images"][number].partition("base64,")[2]
        shown = Image.open(io.BytesIO(base64.b64decode(encoded)))
        original = Image.open(Path(pairs).parent / "images" / Path(record["img_path"]).name)
        assert shown.convert("RGB").tobytes() == original.convert("RGB").tobytes()
    kept = {path.name for path in (tmp_path / "page-answers").iterdir()}
    assert len(kept) == 3 and "base.jsonl" in kept
    assert "already exists" in refused(capsys, compare, command)
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)  # each model has answered once
    command[command.index(str(to))] = str(tmp_path / "again.html")
    assert run_command(compare.run, [*command, "--answers", str(tmp_path / "page-answers")]) == 0
    assert page_data(tmp_path / "again.html") == content


def benchmark_files(folder):
    """Two questions of each benchmark's schema, with a file of answers as its scorer reads it."""
    image = grey(folder / "a.png")
    encoded, url = base64.b64encode(Path(image).read_bytes()).decode(), "https://x.org/1/a.png"
    asked = ["Is it?", "Why?"]
    said = ["Yes.", "No idea."]
    questions = {
        "amber": [{"id": i, "image": "a.png", "query": text} for i, text in enumerate(asked)],
        "pope": [{"image": "a.png", "text": text, "label": "yes"} for text in asked],
        "mmhal": [{"image_src": url, "question": text, "model_answer": ""} for text in asked],
        "objhal": [{"image": encoded, "image_id": 1, "question": text} for text in asked],
    }
    answers = {
        "amber": [{"id": i, "response": text} for i, text in enumerate(said)],
        "pope": [{"question": q, "answer": text} for q, text in zip(asked, said)],
        "mmhal": [item | {"model_answer": text} for item, text in zip(questions["mmhal"], said)],
        "objhal": [{"image_id": 1, "prompt": q, "text": text} for q, text in zip(asked, said)],
    }
    return questions, answers


@pytest.mark.parametrize("name", ["amber", "pope", "mmhal", "objhal"])
def test_page_of_a_benchmark_and_files_of_answers(name, tmp_path, capsys):
    """Files of answers need no model. JSON or JSON lines, under each scorer's own field."""
    questions, answers = benchmark_files(tmp_path)
    data, to = tmp_path / "q.json", tmp_path / "page.html"
    data.write_text("\n".join(map(json.dumps, questions[name])))
    (tmp_path / "one.json").write_text(json.dumps(answers[name]))
    lines = "\n".join(map(json.dumps, answers[name]))
    (tmp_path / "two.jsonl").write_text(lines.replace("No idea.", "Yes."))
    sides = [str(tmp_path / side) for side in ("one.json", "two.jsonl")]
    command = ["--benchmark", name, "--data", data, "--images", tmp_path, "--to", to, "--adapter", *sides]
    assert run_command(compare.run, [*map(str, command)]) == 0
    assert "2 questions, 1 of them with equal answers" in capsys.readouterr().out
    content = page_data(to)
    assert [item["question"] for item in content["items"]] == ["Is it?", "Why?"]
    assert [[*map(text_of, item["answers"])] for item in content["items"]] == [
        ["Yes."] * 2,
        ["No idea.", "Yes."],
    ]
    assert [item["equal"] for item in content["items"]] == [True, False]
    assert len(content["images"]) == 1 and content["images"][0].startswith("data:image/png;base64,")


def test_what_cannot_be_compared_is_one_line(adapters, pairs, tmp_path, monkeypatch, capsys):
    """Answers beside the wrong questions, or an error after hours of answering."""
    monkeypatch.setattr(answer, "load_model", lambda *given: pytest.fail("weights are read"))
    questions, answers = benchmark_files(tmp_path)
    write = lambda name, records: (tmp_path / name).write_text(json.dumps(records)) and str(tmp_path / name)
    data, mmhal = write("q.json", questions["pope"]), write("m.json", questions["mmhal"])
    good, short = write("good.json", answers["pope"]), write("short.json", answers["pope"][:1])
    swapped, mute = write("swapped.json", answers["pope"][::-1]), write("mute.json", [{"id": 1}] * 2)
    null = write("null.json", [questions["pope"][0] | {"text": None}])
    token = write("token.json", [questions["pope"][0] | {"text": "<image> What?"}])
    gone = write("gone.json", [questions["pope"][0] | {"image": "b.png"}])
    to = ["--to", str(tmp_path / "page.html")]
    pope = ["--benchmark", "pope", "--images", str(tmp_path), "--data"]
    cases = [
        (["--data", data, *to], "are required: --adapter"),
        (["--data", data, *to, "--adapter", good], "--adapter takes two or more of"),
        (["--data", data, *to, "--adapter", good, good], "all different"),
        ([*pope, data, *to, "--adapter", good, "base"], "--model is needed"),
        (
            [*pope, data, *to, "--adapter", good, short],
            "short.json: cannot be compared: holds 1 answers to 2",
        ),
        ([*pope, data, *to, "--adapter", good, swapped], "answer 1 is one to another question"),
        ([*pope, data, *to, "--adapter", good, mute], "answer 1 has no text in a field answer or response"),
        ([*pope, null, *to, "--adapter", good, mute], "question 1 of pope: has no text"),
        ([*pope, gone, *to, "--adapter", good, mute], "question 1 of pope: no image"),
        ([*pope, mmhal, *to, "--adapter", good, mute], "question 1 of pope: has no 'image'"),
        (
            ["--benchmark", "mmhal", "--data", mmhal, *to, "--adapter", good, mute],
            "is an address, https://x.org",
        ),
        ([*pope, token, *to, "--model", BASE, "--adapter", good, "base"], "holds the image token '<image>'"),
        ([*pope, data, *to, "--model", BASE, "--adapter", "base", "none"], "none: holds no adapter"),
    ]
    for arguments, message in cases:
        assert message in refused(capsys, compare, arguments)
    assert not (tmp_path / "page.html").exists()


def test_an_earlier_pages_answers_belong_to_their_questions(stub, pairs, tmp_path, capsys):
    """A file of answers as a side says itself which questions and images it is about."""
    (tmp_path / "b.json").write_text(json.dumps([{"answer": "red"}] * 6))
    theirs, ours = str(tmp_path / "b.json"), str(tmp_path / "one-answers" / "base.jsonl")
    command = ["--model", BASE, "--to", str(tmp_path / "one.html"), "--adapter", "base", theirs]
    assert run_command(compare.run, [*command, "--data", pairs]) == 0
    command = ["--to", str(tmp_path / "two.html"), "--adapter", theirs, ours, "--data"]
    other = shapes.write_pairs(tmp_path / "other", 6, seed=1)
    assert "holds answers of other questions, images: " in refused(capsys, compare, [*command, other])
    elsewhere = shutil.copytree(Path(pairs).parent, tmp_path / "copy") / Path(pairs).name
    assert "holds answers of other images: " in refused(capsys, compare, [*command, elsewhere])
    assert run_command(compare.run, [*command, pairs]) == 0
    found = [[*map(text_of, item["answers"])] for item in page_data(tmp_path / "two.html")["items"]]
    assert [first for first, _ in found] == ["red"] * 6
    assert all(second.startswith("base: ") for _, second in found)


def test_what_differs_is_marked():
    """By hand: the words that the other text lacks, and nothing else; of both together the text is
    unchanged."""
    found = compare.marked("a red circle and a ring.", "a blue circle.")
    differs = [(text.strip(), mark) for text, mark in found if text.strip()]
    assert differs == [("a", False), ("red", True), ("circle", False), ("and a ring", True), (".", False)]
    assert compare.marked("same", "same") == [("same", False)] and compare.marked("", "x") == []
    text = "  two\n lines, <b>é</b> "
    assert text_of(compare.marked(text, "other lines")) == text


NASTY = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\"> DATA &amp;"


def example_of(folder, number, question="Why?"):
    image = grey(folder / f"{number}.png", 10 * number)
    return Example(question, "", "", (image,), id=str(number))


def test_no_text_can_end_the_script_that_holds_it(tmp_path):
    """A model that answers in HTML would write into the page. The id changes with each text: votes of one
    page must not show up in another."""
    questions = [example_of(tmp_path, 1, NASTY)]
    page = compare.make_page(questions, said := {NASTY: [NASTY], "b": ["x"]})
    (tmp_path / "page.html").write_text(page)
    assert page.count("</script>") == 2 and page.count("<script") == 2 and "<img" not in page
    content = page_data(tmp_path / "page.html")
    (item,) = content["items"]
    assert item["question"] == text_of(item["answers"][0]) == item["who"][0] == NASTY
    (tmp_path / "page.html").write_text(compare.make_page(questions, said | {"b": ["y"]}))
    assert page_data(tmp_path / "page.html")["id"] != content["id"]
    assert not re.search(r"https?:|//", page.partition("<script type")[0]), "the page needs no network"


def test_large_images_are_made_smaller_and_one_image_is_kept_once(tmp_path):
    """300 photographs of 5 MB make a page that no phone opens; 14,000 questions about 1,000 images as
    well."""
    image = grey(tmp_path / "large.png", size=(3000, 1500))
    questions = [
        Example("Why?", "", "", (image,)),
        Example("Where?", "", "", (image, grey(tmp_path / "b.png"))),
    ]
    (tmp_path / "page.html").write_text(compare.make_page(questions, {"a": ["x", "y"], "b": ["x", "y"]}))
    content = page_data(tmp_path / "page.html")
    assert [item["images"] for item in content["items"]] == [[0], [0, 1]]
    shown = Image.open(io.BytesIO(base64.b64decode(content["images"][0].partition("base64,")[2])))
    assert shown.size == (512, 256) and shown.format == "JPEG"


def test_blind_pages_shuffle_and_hide_names(tmp_path):
    """A rater who sees the name, or who finds that the better one stands on the right, votes for it. Of 60
    questions 30 -+ 15 stand on either side (four standard deviations), and not in the order of the file.
    Three models meet in pairs."""
    questions = [example_of(tmp_path, i, f"Why {i}?") for i in range(60)]
    said = {name: [f"{name[0]} says {i}" for i in range(60)] for name in ("the tuned", "our base")}
    page = compare.make_page(questions, said, blind=True)
    (tmp_path / "page.html").write_text(page)
    assert "the tuned" not in page and "our base" not in page
    items, left = page_data(tmp_path / "page.html")["items"], []
    for item in items:
        models, on_the_left = json.loads(base64.b64decode(item["who"]))
        number = item["question"].removeprefix("Why ").removesuffix("?")
        assert models == ["the tuned", "our base"] and item["id"] == number
        other = next(name for name in models if name != on_the_left)
        texts = [f"{name[0]} says {number}" for name in (on_the_left, other)]
        assert [*map(text_of, item["answers"])] == texts
        left.append(on_the_left)
    assert 15 <= left.count("our base") <= 45
    order = [int(item["id"]) for item in items]
    assert order != sorted(order) and sorted(order) == [*range(60)]
    (tmp_path / "three.html").write_text(
        compare.make_page(questions[:2], said | {"c": ["x", "y"]}, blind=True)
    )
    found = [
        json.loads(base64.b64decode(item["who"]))[0] for item in page_data(tmp_path / "three.html")["items"]
    ]
    assert sorted(found) == sorted(2 * [["the tuned", "our base"], ["the tuned", "c"], ["our base", "c"]])


# ------------------------------------------------------------------------------------------------ the votes


def votes_file(path, page, rater, votes, models=("A", "B")):
    """votes: (item, name on the left, vote)."""
    votes = [{"item": i, "models": models, "left": left, "vote": vote} for i, left, vote in votes]
    path.write_text(json.dumps({"page": page, "rater": rater, "votes": votes}))
    return str(path)


def test_votes_are_counted_by_hand(tmp_path, capsys):
    """Fig. 4 upside down, or the votes of many raters of one question taken for many questions. By hand,
    for A: question 0 is won by rater 1 and lost by rater 2, 1 and 2 are won, 3 is a tie, and question 0 of
    another page, which names the models in the other order, is lost. Win (.5 + 1 + 1) / 5, tie 1 / 5, lose
    1.5 / 5."""
    first = [(0, "A", "left"), (1, "B", "right"), (2, "A", "left"), (3, "B", "same")]
    files = [
        votes_file(tmp_path / "1.json", "p", "1", first),
        votes_file(tmp_path / "2.json", "p", "2", [(0, "A", "right")]),
        votes_file(tmp_path / "3.json", "q", "1", [(0, "B", "left")], ("B", "A")),
    ]
    assert run_command(compare.run, ["--votes", *files]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == "A against B: 5 questions, 6 votes"
    found = {row.split()[0]: row.split()[1] for row in rows}
    assert found == {"win": "50.0%", "tie": "20.0%", "lose": "30.0%"}
    low, high = re.search(r"win +50.0% +(\S+)% to (\S+)%", rows[0]).groups()
    assert (float(low), float(high)) == pytest.approx(
        (17.0, 83.0), abs=0.1
    )  # z^2 = 3.84: .5 -+ .5 sqrt(z^2/(n+z^2))


def test_votes_for_three_models_are_counted_by_pair(tmp_path, capsys):
    files = [votes_file(tmp_path / f"{m[1]}.json", m[1], "1", [(0, m[0], "left")], m) for m in ("AB", "AC")]
    assert run_command(compare.run, ["--votes", *files]) == 0
    out = capsys.readouterr().out
    assert "A against B: 1 questions" in out and "A against C: 1 questions" in out


def test_wilsons_interval_by_hand():
    """Of no vote in ten the interval is not empty: 0 to z^2 / (n + z^2) = 3.8415 / 13.8415. In the middle
    it is .5 -+ .5 sqrt(z^2 / (n + z^2))."""
    assert evaluate.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-4)
    assert evaluate.wilson(1, 10) == pytest.approx((0.72247, 1), abs=1e-4)
    assert evaluate.wilson(0.5, 10) == pytest.approx((0.5 - 0.26341, 0.5 + 0.26341), abs=1e-4)


def test_votes_that_cannot_be_counted_are_refused(tmp_path, capsys):
    """A rater who downloads twice counts twice; and a file of something else counts as nothing."""
    files = [votes_file(tmp_path / f"{i}.json", "p", "1", [(0, "A", "left")]) for i in (1, 2)]
    (tmp_path / "x.json").write_text("[]")
    odd = votes_file(tmp_path / "odd.json", "p", "1", [(0, "A", "up")])
    strange = votes_file(tmp_path / "strange.json", "p", "1", [(0, "C", "left")])
    cases = [(files, f"2.json: cannot be counted: is of the rater and page of {files[0]}")]
    cases += [
        ([tmp_path / "x.json"], "is not in a known form"),
        ([odd], "has no 'up'"),
        ([strange], "has no 'C'"),
    ]
    cases += [([tmp_path / "none"], "No such file"), ([], "--votes")]
    for paths, message in cases:
        assert message in refused(capsys, compare, ["--votes", *paths])


# ------------------------------------------------------------------------------------------------ a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Headless Chromium, spoken to through two pipes in its DevTools protocol: JSON messages that end in
    0."""

    def __init__(self, profile):
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write))  # clear of 3 and 4
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        actions = [(os.POSIX_SPAWN_DUP2, read, 3), (os.POSIX_SPAWN_DUP2, write, 4)]
        actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
        self.process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions)
        for end in (read, write):
            os.close(end)
        self.number, self.rest, self.session, self.events = 0, b"", {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            self.rest += (new := os.read(self.read, 2**16))
            assert new, "the browser has left"
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1200, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=Path(path).as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def value(self, code):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector):
        """A click of the mouse in the middle of what the selector finds."""
        code = f"(box => [box.x + box.width / 2, box.y + box.height / 2])({self.box_of(selector)})"
        x, y = self.value(code)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    @staticmethod
    def box_of(selector):
        return f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"

    def press(self, key, **more):
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        self.session = {}
        self.call("Browser.close")
        os.waitpid(self.process, 0)
        for end in (self.read, self.write):
            os.close(end)


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        pytest.skip("the page was not tried in a browser: no Chromium here (apt-get install chromium)")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def downloaded(folder):
    """The votes that arrive in the folder; a browser writes a download under another name first."""
    for _ in range(200):
        if files := [*folder.glob("votes-*.json")]:
            return files
        time.sleep(0.05)
    pytest.fail("no download came")


def test_votes_are_cast_kept_downloaded_and_counted(browser, tmp_path, capsys):
    """A rater's hour is lost, or counts for the other model. The rater here prefers the longer answer,
    which is always the tuned model's, calls the third the same, and corrects the first vote; by keys and
    buttons, with the page left and opened again in between. A key that is held down, or that is the
    browser's, is no vote."""
    questions = [example_of(tmp_path, i, f"{i}: {NASTY}") for i in range(4)]
    said = {"tunéd": [f"{NASTY} and more {i}" for i in range(4)], "base": ["", "b", "c", "d"]}
    (tmp_path / "page.html").write_text(compare.make_page(questions, said, blind=True), "utf-8")
    browser.open(tmp_path / "page.html")
    texts = "Array.from(document.querySelectorAll('section p'), p => p.textContent)"
    count, left_is_long = (
        "document.querySelector('#count').textContent",
        f"{texts}[0].length > {texts}[1].length",
    )
    assert (
        browser.value("document.title") == "Answers side by side"
        and browser.value("document.images.length") == 1
    )
    assert browser.value("document.images[0].naturalWidth") == 8
    assert NASTY in browser.value("document.querySelector('h2').textContent")
    assert not any(name in browser.value("document.body.innerText") for name in said)
    assert browser.value(count) == "1/4, voted 0"
    browser.press("ArrowLeft", autoRepeat=True)
    browser.press("ArrowLeft", modifiers=1)
    assert browser.value(count) == "1/4, voted 0"
    browser.press("ArrowRight" if browser.value(left_is_long) else "ArrowLeft")  # wrong, corrected below
    assert browser.value(count) == "2/4, voted 1"
    browser.click("[name=left]" if browser.value(left_is_long) else "[name=right]")
    browser.open(tmp_path / "page.html")
    assert browser.value(count) == "3/4, voted 2"
    browser.press("s")
    assert browser.value(count) == "4/4, voted 3"
    for _ in range(3):
        browser.click("#back")
    assert browser.value("document.querySelectorAll('[aria-pressed=true]').length") == 1
    browser.press("ArrowLeft" if browser.value(left_is_long) else "ArrowRight")
    assert browser.value(count) == "4/4, voted 3"
    browser.click("[name=left]" if browser.value(left_is_long) else "[name=right]")
    assert browser.value(count) == "4/4, voted 4"
    (folder := tmp_path / "downloads").mkdir()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.click("#download")
    (path,) = downloaded(folder)
    record = json.loads(path.read_text())
    assert sorted(vote["id"] for vote in record["votes"]) == ["0", "1", "2", "3"]
    assert run_command(compare.run, ["--votes", str(path)]) == 0
    out = capsys.readouterr().out
    assert "tunéd against base: 4 questions, 4 votes" in out
    assert re.search(r"win +75.0%", out) and re.search(r"tie +25.0%", out) and re.search(r"lose +0.0%", out)
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if "requestWillBeSent" in event["method"]
    ]
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)


@pytest.mark.parametrize("width", [1200, 390])
def test_page_fits_wide_and_narrow_screens(width, browser, tmp_path):
    """On a phone nothing stands outside the screen, answers stand one below the other, and the buttons can be
    reached without scrolling under a long answer; on a wide screen answers stand side by side."""
    questions = [example_of(tmp_path, i, f"Why{'?' * 200}") for i in range(3)]
    said = {"a/" + "long" * 50: ["word " * 300, "x" * 300, "same"], "b": ["no", "yes", "same"]}
    (tmp_path / "page.html").write_text(compare.make_page(questions, said))
    (tmp_path / "blind.html").write_text(compare.make_page(questions, said, blind=True))
    tops = (
        "Array.from(document.querySelectorAll('section'), box => Math.round(box.getBoundingClientRect().top))"
    )
    for name in ("page.html", "blind.html"):
        browser.open(tmp_path / name, width)
        assert browser.value("document.documentElement.scrollWidth") <= width
        first, second, *_ = browser.value(tops)
        assert (first == second) == (width > 600)
    box = browser.value(f"JSON.stringify({browser.box_of('[name=right]')})")
    assert (
        json.loads(box)["bottom"] <= 900
        and json.loads(box)["right"] <= width
        and json.loads(box)["height"] > 40
    )
    browser.open(tmp_path / "page.html", width)
    visible = "Array.from(document.querySelectorAll('article')).filter(box => box.offsetHeight).length"
    assert browser.value(visible) == 3 and "2 of 3" in browser.value(
        "document.querySelector('label').innerText"
    )
    browser.click("#filter")
    assert browser.value(visible) == 2
