"""Tests of comparing models: `pytest tests/test_compare.py`. Each says what breaks if it fails.

They protect who said what: an answer, a number or a vote under another model's name is worse than none. The
page is tried in a headless Chromium where one is installed.
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
from data import BadInput, Example, run_command
from examples import answer, compare, evaluate, shapes

ROOT = Path(__file__).resolve().parent.parent
BASE = str(ROOT / "examples" / "base")


def printed(capsys, script, *arguments):
    """What a command prints that succeeds."""
    assert run_command(script.run, [*map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, script, *arguments):
    """The one line of a command that ends in a user's mistake, and what it lists below."""
    assert run_command(script.run, [*map(str, arguments)]) == 2
    before, *error = capsys.readouterr().err.partition("error: ")
    assert "error: " not in error[1]
    return "".join(error)


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

    on = "first"

    def set_adapter(self, name):
        self.on = {"adapter_0": "first", "adapter_1": "second"}[name]

    @contextlib.contextmanager
    def disable_adapter(self):
        before, self.on = self.on, "base"
        yield
        self.on = before


@pytest.fixture
def stub(monkeypatch):
    """`load_tuned` without weights, and answers that name the adapter that was on and the question."""
    model = Stub()

    def say(model, processor, questions, *limits, **options):
        return [f"{model.on}: {answer.text_of(text)} {len(images)}" for images, text in questions]

    monkeypatch.setattr(answer, "load_tuned", lambda *arguments: (model, train.load_processor(BASE)))
    monkeypatch.setattr(answer, "generate_answers", say)
    return model


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be asked of a model."""
    monkeypatch.setattr(answer, "load_model", lambda *given: pytest.fail("weights are read"))
    monkeypatch.setattr(answer, "generate_answers", lambda *given: pytest.fail("a model is asked"))


def grey(path, level=100, size=(8, 8)):
    Image.new("RGB", size, (level, level, level)).save(path)
    return str(path)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# -------------------------------------------------------------------------------------- several adapters


@torch.no_grad()
def logits_of(model, processor):
    return model(**processor(text="What is it?", return_tensors="pt")).logits


def test_each_adapter_of_several_speaks_as_if_it_were_alone(adapters):
    """An answer under another adapter's name. Expected: each loaded by itself, into a model of its own."""
    base, processor = train.load_model(BASE)
    expected = [logits_of(base, processor)]
    expected += [logits_of(answer.load_tuned(BASE, adapter, "cpu")[0], processor) for adapter in adapters]
    model, _ = answer.load_tuned(BASE, adapters, "cpu")
    for number in (1, None, 0, 1):  # also there and back again
        with answer.speaking_as(model, number):
            found = logits_of(model, processor)
        distances = [(found - logits).abs().max().item() for logits in expected]
        assert distances.index(min(distances)) == (0 if number is None else number + 1)
        assert min(distances) < 1e-4 and sorted(distances)[1] > 0.01


def test_answer_command_asks_each_model_each_question(stub, adapters, tmp_path, capsys):
    """The paper's Figure 3: a question, then the base's answer and each adapter's, about all images at
    once."""
    images = [grey(tmp_path / f"{name}.png") for name in "xy"]
    arguments = "--model", BASE, "--image", *images, "--question", "Why?", "Where?", "--adapter", *adapters
    rows = [re.split(r": +", row, maxsplit=1) for row in printed(capsys, answer, *arguments).splitlines()]
    speakers = dict(zip(["base", *adapters], ["base", "first", "second"]))
    expected = [[[text], *([name, f"{who}: {text} 2"] for name, who in speakers.items())]
                for text in ("Why?", "Where?")]  # fmt: skip
    assert rows == [row for of_one in expected for row in of_one]


@pytest.mark.parametrize("token", ["<image>", "\t" * 9])
def test_an_image_token_in_a_question_is_refused_before_the_weights(token, no_model, capsys):
    """It asks for an image that is not there: an internal error, after minutes of loading."""
    error = refused(capsys, answer, "--model", BASE, "--question", "Why?", f"What {token} is it?")
    assert "holds the image token" in error and repr(token) in error.replace("\\\\", "\\")


# -------------------------------------------------------------------------------------- files of answers

QUESTIONS = [((f"/x/{i}.png",), f"Why {i}?") for i in range(5)]
ELSEWHERE = [((f"/y/{i}.png",), f"Why {i}?") for i in range(5)]
REWORDED = [(images, text + "?") for images, text in QUESTIONS]


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """A function: who is asked, the questions and what the answers belong to -> answers, by a file."""
    monkeypatch.setattr(answer, "opened", lambda path: path)

    def keep(ask, questions=QUESTIONS, model="m", adapter=None, limit=4):
        belongs = answer.identity(questions, model, adapter, max_new_tokens=limit)
        return answer.answer_all(tmp_path / "new" / "a.jsonl", belongs, questions, ask, 2)

    return keep


def upper(batch):
    return [text.upper() for _, text in batch]


def test_answers_are_kept_as_they_come_and_gone_on_with(keep, tmp_path):
    """A kill after three hours must not cost three hours. Batches of two; the second ends in a kill. The file
    ends in half a line, as of a full disk."""
    path, asked, expected = tmp_path / "new" / "a.jsonl", [], [f"WHY {i}?" for i in range(5)]

    def ask(batch):
        asked.append([text for _, text in batch])
        if len(asked) == 2:
            assert [line["answer"] for line in lines_of(path)[1:]] == expected[:2]  # already there
            raise KeyboardInterrupt
        return upper(batch)

    with pytest.raises(KeyboardInterrupt):
        keep(ask)
    with path.open("a") as file:
        file.write('{"question": "Why 2?", "ans')
    assert keep(ask) == expected
    assert asked == [["Why 0?", "Why 1?"], ["Why 2?", "Why 3?"], ["Why 2?", "Why 3?"], ["Why 4?"]]
    assert [(line["question"].upper(), line["answer"]) for line in lines_of(path)[1:]] == [
        *zip(expected, expected)
    ]
    assert keep(pytest.fail) == expected


def test_a_file_of_answers_goes_on_only_with_what_it_belongs_to(keep, tmp_path):
    """Half of the answers another model's, or about other images: a table of numbers that nobody can tell."""
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    weights, trained = model / "model.safetensors", adapter / "adapter_model.safetensors"
    for file in (weights, trained, adapter / "args.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("as it was")
    keep(upper, model=model, adapter=adapter)
    for what, change in {
        "images": {"questions": ELSEWHERE},
        "questions": {"questions": REWORDED},
        "max new tokens": {"limit": 5},
        "model": {"model": tmp_path / "other"},
        "adapter": {"adapter": None},  # the base's
    }.items():
        with pytest.raises(BadInput, match=f"cannot go on: holds answers of other {what}: "):
            keep(pytest.fail, **{"model": model, "adapter": adapter} | change)
    for what, file in {"model": weights, "adapter": trained}.items():
        file.write_text("trained again")
        with pytest.raises(BadInput, match=f"cannot go on: holds answers of other {what}: "):
            keep(pytest.fail, model=model, adapter=adapter)
        file.write_text("as it was")
    (adapter / "args.json").write_text("a run that goes on writes it anew")
    keep(pytest.fail, model=model, adapter=adapter)


def test_a_file_that_others_wrote_into_is_refused_and_left_as_it_is(keep, tmp_path):
    """The user's own file of this name; or one of two commands at once, where each answer would stand at
    another's question."""
    keep(upper)
    lines = (path := tmp_path / "new" / "a.jsonl").read_text().splitlines(keepends=True)
    for content in "my notes", "my notes\nof today\n", '{"a": 1}\n', "".join([*lines[:2], *lines[1:3]]):
        path.write_text(content)
        with pytest.raises(BadInput, match="a.jsonl: cannot go on: "):
            keep(pytest.fail)
        assert path.read_text() == content


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


@pytest.fixture
def evaluated(pairs, capsys):
    """A function: adapters and flags -> what evaluate.py prints of them, and its sections."""

    def evaluated(*adapters, flags=()):
        out = printed(capsys, evaluate, "--model", BASE, "--data", pairs, *flags, "--adapter", *adapters)
        return out, sections(out)

    return evaluated


def test_differences_are_taken_example_by_example(stub, adapters, evaluated, monkeypatch):
    """Unpaired, the spread of the examples drowns a difference that each of them shows: here the second
    adapter's loss is 0.5 lower on each of six, which differ by 10: 0, 10, ..., 50. Its margin is half of the
    first's."""
    values, (a, b) = [10.0 * i for i in range(6)], adapters

    def score(*given, **options):
        return {"loss": [value - 0.5 * (stub.on == "second") for value in values]}

    def score_margins(*given):
        half = [value * (0.5 if stub.on == "second" else 1) for value in values]
        return {"image": half, "no_image": values, "other_image": []}

    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(evaluate, "score_margins", score_margins)
    _, found = evaluated(a, b)
    assert [*found][2:] == [a, b, f"{b} minus {a}"]
    assert found[a]["loss"][0] == 25 and found[b]["loss"][0] == 24.5
    assert found[f"{b} minus {a}"]["loss"] == (-0.5, -0.5, -0.5)
    mean, low, high = found[f"{b} minus {a}"]["margin, image"]
    assert mean == -12.5 and low < -17 < -8 < high < -3  # half of 0 ... 50, with its own spread
    assert "minus" not in evaluated(b)[0]


def test_each_adapter_is_scored_as_if_it_were_alone(adapters, evaluated):
    """Numbers under another adapter's name. Means of differences are differences of means."""
    limit, (a, b) = ("--limit", 3), adapters
    alone = {adapter: [*evaluated(adapter, flags=limit)[1].values()][-1] for adapter in adapters}
    _, found = evaluated(a, b, flags=limit)
    assert {adapter: found[adapter] for adapter in adapters} == alone and alone[a]["loss"] != alone[b]["loss"]
    difference = found[f"{b} minus {a}"]
    assert len(difference) == len(alone[a]) >= 13
    for name, (mean, _, _) in difference.items():
        assert mean == pytest.approx(alone[b][name][0] - alone[a][name][0], abs=2e-4)


def test_further_adapters_are_scored_as_the_first(adapters, evaluated, tmp_path):
    """Losses of two kinds, or margins of two betas, are no difference of two models; so it is said."""
    dpo, mdpo = (
        shutil.copytree(adapter, tmp_path / name) for adapter, name in zip(adapters, ("dpo", "mdpo"))
    )
    arguments = train.parse_args(["--model", "m", "--data", "d", "--no-conditional", "--beta", "0.3"])
    write(dpo / "args.json", vars(arguments))
    out, found = evaluated(dpo, mdpo, flags=("--limit", 2))
    said = [line for line in out.splitlines() if "trained with" in line]
    assert said == [f"{mdpo}: trained with other beta, no_conditional; scored as {dpo} is"]
    assert not any("loss/conditional" in section for section in found.values())
    assert "loss/conditional" in evaluated(mdpo, dpo, flags=("--limit", 2))[1][str(dpo)]


def test_a_run_is_read_as_train_reads_its_own_arguments(tmp_path):
    """Scored with another beta, crop or anchor than trained. A negative number in e-notation is no flag."""
    flags = "--beta 0.3 --delta=-1e-05 --crop 0.3 0.6 --seed 5 --anchors chosen rejected --max-length 75"
    trained = train.parse_args(f"--model m --data d --reject crop {flags} --max-pixels 784".split())
    write(tmp_path / "args.json", vars(trained) | {"loss": "chip_loss"})
    names = "beta delta crop seed anchors max_length max_pixels reject no_image conditional".split()
    found = evaluate.read_run(tmp_path)
    assert [getattr(found, name) for name in names] == [getattr(trained, name) for name in names]
    assert found.loss == "chip_loss"
    found = evaluate.read_run(None)
    assert found.beta == 0.1 and found.conditional and found.loss == "mdpo_loss"
    write(tmp_path / "args.json", {"no_image": True, "anchors": ["none"]})
    found = evaluate.read_run(tmp_path)
    assert found.no_image and not found.conditional


SAID = {  # an answer: is it a refusal?
    "There is no dog in the picture.": True,
    "I'm sorry, but I can't see that.": True,
    "The image does not show a cat.": True,
    "It cannot be red.": False,
    "A notable ring, therefore blue.": False,
    "": False,
}


def test_refusals_are_told_by_their_words():
    """The share of refusals is how a model that refuses all looks better than it is."""
    found = evaluate.measure([*SAID])
    assert found["answers, refusals"] == [*map(float, SAID.values())]
    assert found["answers, words"] == [7, 7, 7, 4, 5, 0]


def test_answers_of_base_and_adapters_are_compared(stub, adapters, evaluated, tmp_path, monkeypatch, capsys):
    """Length is how a model that says less hallucinates less. By hand, of six answers: the first adapter says
    three words once more than the base on three, refuses one; the second equals the first on four."""
    said = {
        "base": ["red"] * 6,
        "first": ["red"] * 3 + ["it is all red"] * 2 + ["there is no ring"],
        "second": ["red"] * 3 + ["it is all red"] + ["there is no red", "blue"],
    }
    a, b = (str(shutil.copytree(adapter, tmp_path / name)) for adapter, name in zip(adapters, "ab"))
    monkeypatch.setattr(answer, "generate_answers", lambda *given: said[stub.on][: len(given[2])])
    monkeypatch.setattr(evaluate, "score", lambda *given, **options: {"loss": [1.0] * 6})
    margins = {"image": [], "no_image": [], "other_image": []}
    monkeypatch.setattr(evaluate, "score_margins", lambda *given: margins)
    flags = "--answers", tmp_path / "said"
    _, found = evaluated(a, b, flags=flags)
    means = {title: [row[0] for row in rows.values()] for title, rows in found.items() if rows}
    assert means == {  # loss of adapters; words, refusals; of differences also the share of equal answers
        "base": [1, 0],
        a: [1, 2.5, 0.1667],
        b: [1, 2, 0.1667],
        f"{a} minus base": [1.5, 0.1667, 0.5],
        f"{b} minus base": [1, 0.1667, 0.5],
        f"{b} minus {a}": [0, -0.5, 0, 0.6667],
    }
    kept = [[line["answer"] for line in lines_of(file)[1:]] for file in (tmp_path / "said").iterdir()]
    assert sorted(kept) == sorted(said.values())
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)
    evaluated(a, b, flags=flags)  # goes on after the last answer
    write(tmp_path / "b" / "adapter_model.safetensors", "trained again in the same folder")
    command = "--model", BASE, "--data", tmp_path / "data" / "silkie.json", *flags, "--adapter", a, b
    assert "b.jsonl: cannot go on: holds answers of other adapter: " in refused(capsys, evaluate, *command)


# -------------------------------------------------------------------------------------- the page's questions


def content_of(path):
    """What the page holds."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text())
    return json.loads(data[1])


def text_of(pieces):
    return "".join(text for text, _ in pieces)


def answers_of(content):
    """For each question the texts of its answers."""
    return [[*map(text_of, item["answers"])] for item in content["items"]]


def picture_of(content, number):
    return Image.open(io.BytesIO(base64.b64decode(content["images"][number].partition("base64,")[2])))


def test_page_of_base_and_adapters(stub, adapters, pairs, tmp_path, monkeypatch, capsys):
    """Each answer under its own name, beside its own question and image."""
    page, records = tmp_path / "page.html", json.loads(Path(pairs).read_text())
    sides = [adapters[1], "base", adapters[0]]
    command = "--model", BASE, "--data", pairs, "--adapter", *sides
    assert f"{page}: 6 questions, 0 of them with equal" in printed(capsys, compare, *command, "--to", page)
    content = content_of(page)
    assert not content["blind"] and len(content["items"]) == 6
    for item, record, said in zip(content["items"], records, answers_of(content)):
        question = record["prompt"].partition("USER: <image>\n")[2].removesuffix(" ASSISTANT:")
        assert item["question"] == question and item["who"] == sides
        # As they stand in the command: adapter b is its first, which load_tuned switches on as "adapter_0".
        assert said == [f"{who}: {question} 1" for who in ("first", "base", "second")]
        shown = picture_of(content, *item["images"])
        original = Image.open(Path(pairs).parent / "images" / Path(record["img_path"]).name)
        assert shown.convert("RGB").tobytes() == original.convert("RGB").tobytes()
    assert "already exists" in refused(capsys, compare, *command, "--to", page)
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)  # each model has answered once
    printed(capsys, compare, *command, "--to", tmp_path / "2.html", "--answers", tmp_path / "page-answers")
    assert content_of(tmp_path / "2.html") == content


ASKED, GIVEN = ["Is it?", "Why?"], ["Yes.", "No idea."]


@pytest.fixture
def benchmark(tmp_path):
    """A function: a benchmark -> two questions of its schema, and their answers as its scorer reads them."""
    image, url = grey(tmp_path / "a.png"), "https://x.org/1/a.png"
    encoded = base64.b64encode(Path(image).read_bytes()).decode()
    forms = {
        "amber": ({"id": 1, "image": "a.png"}, "query", {"id": 1}, "response"),
        "pope": ({"image": "a.png", "label": "yes"}, "text", {}, "answer"),
        "mmhal": ({"image_src": url, "model_answer": ""}, "question", {"image_src": url}, "model_answer"),
        "objhal": ({"image": encoded, "image_id": 1}, "question", {"image_id": 1}, "text"),
    }

    def of(name):
        item, asked, record, said = forms[name]
        return [item | {asked: text} for text in ASKED], [record | {said: text} for text in GIVEN]

    return of


@pytest.mark.parametrize("name", ["amber", "pope", "mmhal", "objhal"])
def test_page_of_a_benchmark_and_files_of_answers(name, benchmark, no_model, tmp_path, capsys):
    """Files of answers need no model. JSON or JSON lines, under each scorer's own field."""
    (questions, answers), page = benchmark(name), tmp_path / "page.html"
    data = write(tmp_path / "q.json", "\n".join(map(json.dumps, questions)))
    one = write(tmp_path / "one.json", answers)
    two = write(tmp_path / "two.jsonl", "\n".join(map(json.dumps, answers)).replace("No idea.", "Yes."))
    command = "--benchmark", name, "--data", data, "--images", tmp_path, "--to", page, "--adapter", one, two
    assert "2 questions, 1 of them with equal answers" in printed(capsys, compare, *command)
    content = content_of(page)
    assert [item["question"] for item in content["items"]] == ASKED
    assert answers_of(content) == [["Yes.", "Yes."], ["No idea.", "Yes."]]
    assert [item["equal"] for item in content["items"]] == [True, False]
    assert len(content["images"]) == 1 and content["images"][0].startswith("data:image/png;base64,")


TWO = "good.json mute.json"
NOT_COMPARABLE = {  # what is said: (--data, --adapter, other flags)
    "are required: --adapter": ("q.json", "", ""),
    "--adapter takes two or more of": ("q.json", "good.json", ""),
    "all different": ("q.json", "good.json good.json", ""),
    "--model is needed": ("q.json", "good.json base", ""),
    "short.json: cannot be compared: holds 1 answers to 2": ("q.json", "good.json short.json", ""),
    "answer 1 is one to another question": ("q.json", "good.json swapped.json", ""),
    "answer 1 has no text in a field answer or response": ("q.json", TWO, ""),
    "question 1 of pope: 'question' is null": ("null.json", TWO, ""),
    "question 1 of pope: no image": ("gone.json", TWO, ""),
    "question 1 of pope: has no 'image'": ("mmhal.json", TWO, ""),
    "holds the image token '<image>'": ("token.json", "good.json base", f"--model {BASE}"),
    "none: holds no adapter": ("q.json", "base none", f"--model {BASE}"),
}


@pytest.mark.parametrize("message", NOT_COMPARABLE)
def test_what_cannot_be_compared_is_refused(message, benchmark, no_model, tmp_path, monkeypatch, capsys):
    """Answers beside the wrong questions, or an error after hours of answering."""
    monkeypatch.chdir(tmp_path)
    (first, second), answers = benchmark("pope")
    answers = [record | {"question": text} for record, text in zip(answers, ASKED)]
    for name, content in {
        "q": [first, second], "mmhal": benchmark("mmhal")[0], "null": [first | {"text": None}],
        "gone": [first | {"image": "b.png"}], "token": [first | {"text": "<image> What?"}],
        "good": answers, "short": answers[:1], "swapped": answers[::-1], "mute": [{"id": 1}] * 2,
    }.items():  # fmt: skip
        write(tmp_path / f"{name}.json", content)
    data, sides, more = NOT_COMPARABLE[message]
    command = f"--benchmark pope --data {data} --images . --to page.html {more}".split()
    assert message in refused(capsys, compare, *command, *["--adapter"][: len(sides)], *sides.split())
    assert not Path("page.html").exists()


def test_an_earlier_pages_answers_belong_to_their_questions(stub, pairs, tmp_path, capsys):
    """A file of answers as a side says itself which questions and images it is about."""
    theirs = write(tmp_path / "b.json", [{"answer": "red"}] * 6)
    ours = str(tmp_path / "one-answers" / "base.jsonl")
    command = "--model", BASE, "--data", pairs, "--adapter", "base", theirs, "--to", tmp_path / "one.html"
    printed(capsys, compare, *command)
    command = "--to", tmp_path / "two.html", "--adapter", theirs, ours, "--data"
    other = shapes.write_pairs(tmp_path / "other", 6, seed=1)
    assert "holds answers of other questions, images: " in refused(capsys, compare, *command, other)
    elsewhere = shutil.copytree(Path(pairs).parent, tmp_path / "copy") / Path(pairs).name
    assert "holds answers of other images: " in refused(capsys, compare, *command, elsewhere)
    printed(capsys, compare, *command, pairs)
    for first, second in answers_of(content_of(tmp_path / "two.html")):
        assert first == "red" and second.startswith("base: ")


def test_what_differs_is_marked():
    """By hand: the words that the other text lacks, and nothing else; both together are the text."""
    found = compare.marked("a red circle and a ring.", "a blue circle.")
    differs = [(text.strip(), mark) for text, mark in found if text.strip()]
    assert differs == [("a", False), ("red", True), ("circle", False), ("and a ring", True), (".", False)]
    assert compare.marked("same", "same") == [("same", False)] and compare.marked("", "x") == []
    text = "  two\n lines, <b>é</b> "
    assert text_of(compare.marked(text, "other lines")) == text


NASTY = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\"> DATA &amp;"


@pytest.fixture
def make(tmp_path):
    """A function: questions, one about each of as many pictures, and {name: answers} -> a page."""

    def make(texts, said, blind=False, name="page.html"):
        images = [grey(tmp_path / f"{i}.png", 10 * i) for i in range(len(texts))]
        questions = [Example(text, "", "", (images[i],), id=str(i)) for i, text in enumerate(texts)]
        (page := tmp_path / name).write_text(compare.make_page(questions, said, blind), "utf-8")
        return page

    return make


def test_no_text_can_end_the_script_that_holds_it(make):
    """A model that answers in HTML would write into the page. The id changes with each text: votes of one
    page must not show up in another."""
    page = make([NASTY], {NASTY: [NASTY], "b": ["x"]}).read_text()
    assert page.count("</script>") == 2 and page.count("<script") == 2 and "<img" not in page
    assert not re.search(r"https?:|//", page.partition("<script type")[0]), "the page needs no network"
    content = content_of(make([NASTY], {NASTY: [NASTY], "b": ["x"]}))
    (item,) = content["items"]
    assert item["question"] == text_of(item["answers"][0]) == item["who"][0] == NASTY
    assert content_of(make([NASTY], {NASTY: [NASTY], "b": ["y"]}))["id"] != content["id"]


def test_large_images_are_made_smaller_and_one_image_is_kept_once(tmp_path):
    """Photographs of 5 MB make a page that no phone opens; 14,000 questions about 1,000 images as well."""
    large, small = grey(tmp_path / "large.png", size=(3000, 1500)), grey(tmp_path / "small.png")
    questions = [Example("Why?", "", "", (large,)), Example("Where?", "", "", (large, small))]
    page = write(tmp_path / "page.html", compare.make_page(questions, {"a": ["x", "y"], "b": ["x", "y"]}))
    content = content_of(page)
    assert [item["images"] for item in content["items"]] == [[0], [0, 1]]
    shown = picture_of(content, 0)
    assert shown.size == (512, 256) and shown.format == "JPEG"


def pair_of(item):
    """The two models of a blind item, and the one on the left."""
    return json.loads(base64.b64decode(item["who"]))


def test_blind_pages_shuffle_and_hide_names(make):
    """A rater who sees the name, or who finds that the better one stands on the right, votes for it. Of 60
    questions 30 -+ 15 stand on either side (four standard deviations), and not in the order of the file.
    Three models meet in pairs."""
    said = {name: [f"{name[0]} says {i}" for i in range(60)] for name in ("the tuned", "our base")}
    page = make([f"Why {i}?" for i in range(60)], said, blind=True)
    assert "the tuned" not in page.read_text() and "our base" not in page.read_text()
    content, lefts = content_of(page), []
    for item, texts in zip(content["items"], answers_of(content)):
        models, left = pair_of(item)
        right = next(name for name in models if name != left)
        assert models == ["the tuned", "our base"] and item["question"] == f"Why {item['id']}?"
        assert texts == [f"{name[0]} says {item['id']}" for name in (left, right)]
        lefts.append(left)
    assert 15 <= lefts.count("our base") <= 45
    order = [int(item["id"]) for item in content["items"]]
    assert order != sorted(order) and sorted(order) == [*range(60)]
    three = content_of(make(["Why?", "Who?"], said | {"c": ["x", "y"]}, blind=True))
    pairs = [["the tuned", "our base"], ["the tuned", "c"], ["our base", "c"]]
    assert sorted(pair_of(item)[0] for item in three["items"]) == sorted(2 * pairs)


# ------------------------------------------------------------------------------------------------ the votes


@pytest.fixture
def votes(tmp_path):
    """A function: page, rater, (item, name on the left, vote), the two models -> a file of votes."""

    def votes(page, rater, cast, models=("A", "B")):
        cast = [{"item": i, "models": models, "left": left, "vote": vote} for i, left, vote in cast]
        path = tmp_path / f"{len([*tmp_path.glob('*.json')])}.json"
        return write(path, {"page": page, "rater": rater, "votes": cast})

    return votes


def test_votes_are_counted_by_hand(votes, capsys):
    """Fig. 4 upside down, or the votes of many raters of one question taken for many questions. By hand, for
    A: question 0 is won by rater 1 and lost by rater 2, 1 and 2 are won, 3 is a tie, and question 0 of
    another page, which names the models in the other order, is lost. Win (.5 + 1 + 1) / 5, tie 1 / 5, lose
    1.5 / 5."""
    files = [
        votes("p", "1", [(0, "A", "left"), (1, "B", "right"), (2, "A", "left"), (3, "B", "same")]),
        votes("p", "2", [(0, "A", "right")]),
        votes("q", "1", [(0, "B", "left")], ("B", "A")),
        votes("r", "1", [(0, "A", "left")], ("A", "C")),
    ]
    title, win, tie, lose, other, *_ = printed(capsys, compare, "--votes", *files).splitlines()
    assert title == "A against B: 5 questions, 6 votes" and other == "A against C: 1 questions, 1 votes"
    shares = [row.split()[:2] for row in (win, tie, lose)]
    assert shares == [["win", "50.0%"], ["tie", "20.0%"], ["lose", "30.0%"]]
    assert win.endswith("17.0% to 83.0%")  # z^2 = 3.84: .5 -+ .5 sqrt(z^2 / (5 + z^2))


def test_wilsons_interval_by_hand():
    """Of no vote in ten the interval is not empty: 0 to z^2 / (n + z^2) = 3.8415 / 13.8415. In the middle it
    is .5 -+ .5 sqrt(z^2 / (n + z^2))."""
    assert evaluate.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-4)
    assert evaluate.wilson(1, 10) == pytest.approx((0.72247, 1), abs=1e-4)
    assert evaluate.wilson(0.5, 10) == pytest.approx((0.5 - 0.26341, 0.5 + 0.26341), abs=1e-4)


def test_votes_that_cannot_be_counted_are_refused(votes, tmp_path, capsys):
    """A rater who downloads twice counts twice; and a file of something else counts as nothing."""
    first, again = votes("p", "1", [(0, "A", "left")]), votes("p", "1", [(0, "A", "left")])
    for message, files in {
        f"{again}: cannot be counted: is of the rater and page of {first}": [first, again],
        "is not in a known form": [write(tmp_path / "x.json", [])],
        "has no 'up'": [votes("p", "1", [(0, "A", "up")])],
        "has no 'C'": [votes("p", "1", [(0, "C", "left")])],
        "No such file": [tmp_path / "none"],
        "--votes": [],
    }.items():
        assert message in refused(capsys, compare, "--votes", *files)


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
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

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

    def open(self, path):
        loader = self.call("Page.navigate", url=Path(path).as_uri())["loaderId"]
        loaded = {"loaderId": loader, "name": "load"}  # of this page: that of the one before may come late
        while not any(loaded.items() <= event.get("params", {}).items() for event in self.events):
            self.events.append(self.receive())

    def value(self, code):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def texts(self, selector):
        return self.value(
            f"Array.from(document.querySelectorAll({json.dumps(selector)}), e => e.textContent)"
        )

    def click(self, selector):
        """A click of the mouse in the middle of what the selector finds, once no image will move it any
        more."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        code = f"""Promise.all(Array.from(document.images, image => image.decode()))
            .then(() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50))))
            .then(() => (box => ({{x: box.x + box.width / 2, y: box.y + box.height / 2}}))({box}))"""
        where = self.value(code)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def press(self, key, **more):
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

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
    """The votes that arrive in the folder. A browser first makes an empty file of this name."""
    for _ in range(400):
        if files := [path for path in folder.glob("votes-*.json") if path.stat().st_size]:
            return files
        time.sleep(0.05)
    pytest.fail("no download came")


def test_votes_are_cast_kept_downloaded_and_counted(browser, make, tmp_path, capsys):
    """A rater's hour is lost, or counts for the other model. The rater here prefers the longer answer, which
    is always the tuned model's, calls the third the same, and corrects the first vote; by keys and buttons,
    with the page left and opened again in between. A key that is held down, or that is the browser's, is no
    vote."""
    said = {"tunéd": [f"{NASTY} and more {i}" for i in range(4)], "base": ["", "b", "c", "d"]}
    browser.open(page := make([f"{i}: {NASTY}" for i in range(4)], said, blind=True))

    def prefers(left, right):
        first, second = map(len, browser.texts("section p"))
        return left if first > second else right

    def stands_at(text):
        for _ in range(200):  # a busy machine answers a key later
            if browser.texts("#count") == [text]:
                return True
            time.sleep(0.05)
        return False

    assert browser.value("document.title") == "Answers side by side" and NASTY in browser.texts("h2")[0]
    assert browser.value("Array.from(document.images, image => image.naturalWidth)") == [8]
    assert not any(name in browser.value("document.body.innerText") for name in said)
    browser.press("ArrowLeft", autoRepeat=True)
    browser.press("ArrowLeft", modifiers=1)
    assert stands_at("1/4, voted 0")
    browser.press(prefers("ArrowRight", "ArrowLeft"))  # wrong, corrected below
    assert stands_at("2/4, voted 1")
    browser.click(prefers("[name=left]", "[name=right]"))
    browser.open(page)
    assert stands_at("3/4, voted 2")
    browser.press("s")
    assert stands_at("4/4, voted 3")
    for _ in range(3):
        browser.click("#back")
    assert len(browser.texts("[aria-pressed=true]")) == 1
    browser.press(prefers("ArrowLeft", "ArrowRight"))
    assert stands_at("4/4, voted 3")
    browser.click(prefers("[name=left]", "[name=right]"))
    assert stands_at("4/4, voted 4")
    (folder := tmp_path / "downloads").mkdir()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.click("#download")
    (path,) = downloaded(folder)
    assert sorted(vote["id"] for vote in json.loads(path.read_text())["votes"]) == ["0", "1", "2", "3"]
    out = printed(capsys, compare, "--votes", path)
    assert "tunéd against base: 4 questions, 4 votes" in out
    assert re.search(r"win +75.0%.*\n +tie +25.0%.*\n +lose +0.0%", out)
    sent = [event["params"] for event in browser.events if "requestWillBeSent" in event["method"]]
    assert sent and all(one["request"]["url"].startswith(("file:", "data:", "blob:")) for one in sent)
