"""Tests of comparing models: `pytest tests/test_compare.py`. Each says what breaks if it fails.

They protect who said what: an answer, a number or a vote under another model's name is worse than none. The
page is tried in a headless Chromium where one is installed.
"""

import base64
import io
import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import peft
import pytest
import torch
from PIL import Image

import train
from data import BadInput, Example, open_image, read_examples, run_command, texts_of
from examples import answer, compare, evaluate, shapes
from test_mdpo import ROOT, write
from tests.test_benchmarks import drawn, form

BASE = str(ROOT / "examples" / "base")


def printed(capsys, script, *arguments):
    """What a command prints that succeeds."""
    assert run_command(script.run, [*map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, script, *arguments):
    """The one line of a command that ends in a user's mistake, and what it lists below."""
    assert run_command(script.run, [*map(str, arguments)]) == 2
    (error,) = capsys.readouterr().err.split("error: ")[1:]
    return error


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two random adapters of the base that examples/ ships, of different size."""
    folder = tmp_path_factory.mktemp("adapters")
    for rank in 2, 3:
        torch.manual_seed(rank)
        layers = r".*language_model.*(q_proj|v_proj|fc1)"
        config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=layers, init_lora_weights=False)
        peft.get_peft_model(train.load_model(BASE)[0], config).save_pretrained(folder / str(rank))
    return [str(folder / "2"), str(folder / "3")]


@pytest.fixture
def pairs(tmp_path):
    """A preference file of six questions about drawn scenes."""
    return str(shapes.write_pairs(tmp_path / "data", 6))


@pytest.fixture
def stub(monkeypatch):
    """No weights: answers say which model was on, the question, and the numbers of images and new tokens."""
    model = SimpleNamespace()

    def speaking_as(model, number):
        model.on = "base" if number is None else ("first", "second")[number]
        return nullcontext()

    def say(model, processor, questions, limit, *more, **options):
        asked = [
            (texts_of(text)[-1] if isinstance(text, list) else text, images) for images, text in questions
        ]
        return [f"{model.on}: {text} {len(images)} {limit}" for text, images in asked]

    monkeypatch.setattr(answer, "load_tuned", lambda *arguments: (model, None))
    monkeypatch.setattr(answer, "speaking_as", speaking_as)
    monkeypatch.setattr(answer, "generate_answers", say)
    return model


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be asked of a model."""
    for name in "load_model", "generate_answers":
        monkeypatch.setattr(answer, name, lambda *given: pytest.fail("a model is read or asked"))


def grey(path, level=100, size=(8, 8)):
    Image.new("RGB", size, (level, level, level)).save(path)
    return str(path)


def said_in(path):
    """The answers in a file of answers."""
    return [json.loads(line)["answer"] for line in Path(path).read_text().splitlines()[1:]]


# -------------------------------------------------------------------------------------- several adapters


@torch.no_grad()
def logits_of(model, processor):
    return model(**processor(text="What is it?", return_tensors="pt")).logits


def test_each_adapter_of_several_speaks_as_if_it_were_alone(adapters):
    """An answer under another adapter's name. Expected: each loaded by itself, into a model of its own."""
    base, processor = train.load_model(BASE)
    models = [base, *(answer.load_tuned(BASE, adapter, "cpu")[0] for adapter in adapters)]
    alone = [logits_of(model, processor) for model in models]
    assert min((one - other).abs().max() for one, other in combinations(alone, 2)) > 0.01
    model, _ = answer.load_tuned(BASE, adapters, "cpu")
    for number, expected in (1, alone[2]), (None, alone[0]), (0, alone[1]), (1, alone[2]):  # there and back
        with answer.speaking_as(model, number):
            torch.testing.assert_close(logits_of(model, processor), expected, atol=1e-4, rtol=0)


def test_answer_command_asks_each_model_each_question(stub, adapters, tmp_path, capsys):
    """The paper's Figure 3: a question, then the base's answer and each adapter's, about all images at
    once."""
    images = [grey(tmp_path / f"{name}.png") for name in "xy"]
    flags = "--image", *images, "--question", "Why?", "Where?", "--adapter", *adapters
    out = printed(capsys, answer, "--model", BASE, *flags, "--max-new-tokens", 9)
    speakers, expected = {"base": "base", adapters[0]: "first", adapters[1]: "second"}, []
    for text in "Why?", "Where?":
        expected += [[text], *([f"{name}:", f"{who}:", text, "2", "9"] for name, who in speakers.items())]
    assert [line.split() for line in out.splitlines()] == expected


@pytest.mark.parametrize("token", ["<image>", "\t" * 9])
def test_an_image_token_in_a_question_is_refused_before_the_weights(token, no_model, capsys):
    """It asks for an image that is not there: an internal error, after minutes of loading."""
    error = refused(capsys, answer, "--model", BASE, "--question", "Why?", f"What {token} is it?")
    assert "holds the image token" in error and repr(token) in error.replace("\\\\", "\\")


# -------------------------------------------------------------------------------------- files of answers

QUESTIONS = [Example(f"Why {i}?", "", "", (bytes([i]),)) for i in range(5)]
UPPER = [f"WHY {i}?" for i in range(5)]


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
    path, asked = tmp_path / "new" / "a.jsonl", []

    def ask(batch):
        asked.append([text for _, text in batch])
        if len(asked) == 2:
            assert said_in(path) == UPPER[:2]  # already there
            raise KeyboardInterrupt
        return upper(batch)

    with pytest.raises(KeyboardInterrupt):
        keep(ask)
    path.write_text(path.read_text() + '{"question": "Why 2?", "ans')
    assert keep(ask) == UPPER == said_in(path) == keep(pytest.fail)
    assert asked == [["Why 0?", "Why 1?"], ["Why 2?", "Why 3?"], ["Why 2?", "Why 3?"], ["Why 4?"]]


def test_a_file_of_answers_goes_on_only_with_what_it_belongs_to(keep, tmp_path):
    """Half of the answers another model's, or about other images: a table of numbers that nobody can tell."""
    files = {
        "model": tmp_path / "m" / "x.safetensors",
        "adapter": tmp_path / "a" / "adapter_model.safetensors",
    }
    for file in files.values():
        write(file, "as it was")
    ours = {name: file.parent for name, file in files.items()}
    keep(upper, **ours)

    def refuses(what, **change):
        with pytest.raises(BadInput, match=f"cannot go on: holds answers of other {what}: "):
            keep(pytest.fail, **ours | change)

    refuses("images", questions=[one._replace(images=(one.images[0] + b"!",)) for one in QUESTIONS])
    refuses("questions", questions=[one._replace(question=f"{one.question}?") for one in QUESTIONS])
    refuses("max new tokens", limit=5)
    refuses("model", model=tmp_path / "other")
    refuses("adapter", adapter=None)  # the base's
    for what, file in files.items():
        write(file, "trained again")
        refuses(what)
        write(file, "as it was")
    write(tmp_path / "a" / "args.json", "a run that goes on writes it anew")
    keep(pytest.fail, **ours)


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


@pytest.fixture
def evaluated(pairs, capsys):
    """A function: adapters and flags -> what evaluate.py prints: {title: {metric: (mean, low, high)}}."""

    def evaluated(*adapters, flags=()):
        found, current = {}, {}
        out = printed(capsys, evaluate, "--model", BASE, "--data", pairs, *flags, "--adapter", *adapters)
        for line in out.splitlines():
            if row := re.match(r"  (\S.*?) +(-?\d+\.\d+) +(-?\d+\.\d+) to +(-?\d+\.\d+)", line):
                current[row[1]] = tuple(map(float, row.groups()[1:]))
            elif not line.startswith("  "):
                current = found[line] = {}
        return found

    return evaluated


def test_differences_are_taken_example_by_example(stub, adapters, evaluated, tmp_path, monkeypatch):
    """Unpaired, the spread of the examples drowns a difference that each of them shows: here the second
    adapter's loss is 0.5 lower on each of six, which differ by 10: 0, 10, ..., 50. Its margin is half of the
    first's. And length is how a model that says less hallucinates less: of six answers, the first says three
    words once more than the base on three, refuses one; the second equals the first on four."""
    values, a, b = [10.0 * i for i in range(6)], str(tmp_path / "a"), adapters[1]
    write(shutil.copytree(adapters[0], tmp_path / "a") / "args.json", {"beta": 0.3, "no_conditional": True})
    said = {
        "base": ["red"] * 6,
        "first": ["red"] * 3 + ["it is all red"] * 2 + ["there is no ring"],
        "second": ["red"] * 3 + ["it is all red"] + ["there is no red", "blue"],
    }

    def score(*given, **options):
        return {"loss": [value - 0.5 * (stub.on == "second") for value in values]}

    def score_margins(*given):
        half = [value * (0.5 if stub.on == "second" else 1) for value in values]
        return {"image": half, "no_image": values, "other_image": []}

    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(evaluate, "score_margins", score_margins)
    monkeypatch.setattr(answer, "generate_answers", lambda *given: said[stub.on][: len(given[2])])
    assert [*evaluated(b).values()][-1]["loss"][0] == 25  # of one adapter, no difference
    found = evaluated(a, b, flags=("--answers", tmp_path / "said"))
    assert {title: [row[0] for row in rows.values()] for title, rows in found.items() if rows} == {
        "base": [1, 0],  # words, refusals
        a: [25, 25, 25, 2.5, 0.1667],  # loss, margins with the image and without, words, refusals
        b: [24.5, 12.5, 25, 2, 0.1667],
        f"{a} minus base": [1.5, 0.1667, 0.5],  # words, refusals, share of equal answers
        f"{b} minus base": [1, 0.1667, 0.5],
        f"{b} minus {a}": [-0.5, -12.5, 0, -0.5, 0, 0.6667],
    }
    assert f"{b}: trained with other beta, no_conditional; scored as {a} is" in found
    difference = found[f"{b} minus {a}"]
    _, low, high = difference["margin, image"]
    assert difference["loss"] == (-0.5, -0.5, -0.5)
    assert low < -17 < -8 < high < -3  # half of 0 ... 50, with its own spread
    assert sorted(map(said_in, (tmp_path / "said").iterdir())) == sorted(said.values())
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)
    assert evaluated(a, b, flags=("--answers", tmp_path / "said")) == found  # asks nothing again


def test_a_run_is_read_as_it_was_trained(tmp_path, capsys):
    """Scored with another beta, crop or anchor than trained. Where the run does not say, the user is told."""
    defaults = vars(evaluate.read_run(None))
    assert defaults["loss"] == "mdpo_loss" and defaults["beta"] == 0.1 and defaults["conditional"]
    began = {"beta": 0.3, "delta": -1e-05, "crop": [0.3, 0.6], "anchors": ["rejected"], "loss": "chip_loss"}
    began |= {"warmup": 0.0}
    write(tmp_path / "args.json", began)
    assert vars(evaluate.read_run(tmp_path)) == defaults | began
    assert capsys.readouterr().out == ""
    write(tmp_path / "args.json", {"beta": "big"})
    with pytest.raises(BadInput, match=f"{tmp_path}/args.json: argument --beta: invalid float value: 'big'"):
        evaluate.read_run(tmp_path)
    (tmp_path / "args.json").unlink()
    assert vars(evaluate.read_run(tmp_path)) == defaults
    assert f"{tmp_path}: has no args.json; train.py's defaults are taken" in capsys.readouterr().out


TWINS = {
    ("a", "a"): "different runs",
    ("a", "a/"): "different runs",
    ("a b", "a-b"): "one file",
    ("a", "base"): "one file",
}


@pytest.mark.parametrize("names", TWINS)
def test_runs_that_cannot_be_told_apart_are_refused(names, no_model, tmp_path, capsys):
    """A run minus itself is a table of zeros. Two runs in one file of answers: one would have the other's."""
    command = "--model", BASE, "--data", "x.json", "--answers", tmp_path / "said", "--adapter"
    assert TWINS[names] in refused(capsys, evaluate, *command, *names) and not [*tmp_path.iterdir()]


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


# -------------------------------------------------------------------------------------- the page's questions


def content_of(path):
    """What the page holds; the texts of the answers as `texts`, their pictures as `pictures`."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text())
    content = json.loads(data[1])
    for item in content["items"]:
        item["texts"] = [*map(joined, item["answers"])]
    pictures = [uri.partition("base64,")[2] for uri in content["images"]]
    return content | {"pictures": [Image.open(io.BytesIO(base64.b64decode(one))) for one in pictures]}


def joined(pieces):
    return "".join(text for text, _ in pieces)


def test_page_of_base_and_adapters(stub, adapters, pairs, tmp_path, monkeypatch, capsys):
    """Each answer under its own name, beside its own question and image."""
    page, other, sides = tmp_path / "page.html", tmp_path / "2.html", [adapters[1], "base", adapters[0]]
    command = "--model", BASE, "--data", pairs, "--max-new-tokens", 9, "--adapter", *sides
    assert f"{page}: 6 questions, 0 of them with equal" in printed(capsys, compare, *command, "--to", page)
    content = content_of(page)
    assert not content["blind"]
    for item, example in zip(content["items"], read_examples(pairs), strict=True):
        assert item["question"] == texts_of(example.question)[-1] and item["who"] == sides
        # As they stand in the command: the adapter that it names first is load_tuned's first.
        assert item["texts"] == [f"{who}: {item['question']} 1 9" for who in ("first", "base", "second")]
        (shown,), (path,) = item["images"], example.images
        assert content["pictures"][shown].convert("RGB").tobytes() == open_image(path).tobytes()
    assert "already exists" in refused(capsys, compare, *command, "--to", page)
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)  # each model has answered once
    printed(capsys, compare, *command, "--to", other, "--answers", tmp_path / "page-answers")
    assert other.read_text() == page.read_text()


def benchmark(name, folder):
    """Two questions of a benchmark about one picture, and their answers as its scorer reads them."""
    (folder / "1_o.png").write_bytes(drawn(10))
    return zip(*(form(name, 1, text, said) for text, said in (("Is it?", "Yes."), ("Why?", "No idea."))))


@pytest.mark.parametrize("name", ["amber", "pope", "mmhal", "objhal"])
def test_page_of_a_benchmark_and_files_of_answers(name, no_model, tmp_path, capsys):
    """Files of answers need no model. JSON or JSON lines, under each scorer's own field."""
    (questions, answers), page = benchmark(name, tmp_path), tmp_path / "page.html"
    data, one = write(tmp_path / "q.json", questions), write(tmp_path / "one.json", answers)
    two = write(tmp_path / "two.jsonl", "\n".join(map(json.dumps, answers)).replace("No idea.", "Yes."))
    command = "--benchmark", name, "--data", data, "--images", tmp_path, "--to", page, "--adapter", one, two
    assert "2 questions, 1 of them with equal answers" in printed(capsys, compare, *command)
    content = content_of(page)
    rows = [(item["question"], *item["texts"], item["equal"]) for item in content["items"]]
    assert rows == [("Is it?", "Yes.", "Yes.", True), ("Why?", "No idea.", "Yes.", False)]
    assert [image.partition(",")[0] for image in content["images"]] == ["data:image/png;base64"]


TWO = "good.json mute.json"
NOT_COMPARABLE = {  # what is said: (--data, --adapter, other flags)
    "are required: --adapter": ("q.json", "", ""),
    "--adapter takes two or more of": ("q.json", "good.json", ""),
    "all different": ("q.json", f"{TWO} good.json", ""),
    "--model is needed": ("q.json", "good.json base", ""),
    "short.json: cannot be compared: holds 1 answers to 2": ("q.json", "good.json short.json", ""),
    "answer 1 is one to another question": ("q.json", "good.json swapped.json", ""),
    "answer 1 has no text in a field answer or response": ("q.json", TWO, ""),
    "question 1 of pope: 'text' is null": ("null.json", TWO, ""),
    "question 1 of pope: 'image': no image": ("gone.json", TWO, ""),
    "question 1 of pope: has no 'image'": ("mmhal.json", TWO, ""),
    "holds the image token '<image>'": ("token.json", "good.json base", f"--model {BASE}"),
    "none: holds no adapter": ("q.json", "base none", f"--model {BASE}"),
}


@pytest.mark.parametrize("message", NOT_COMPARABLE)
def test_what_cannot_be_compared_is_refused(message, no_model, tmp_path, monkeypatch, capsys):
    """Answers beside the wrong questions, or an error after hours of answering."""
    monkeypatch.chdir(tmp_path)
    (first, second), answers = benchmark("pope", tmp_path)
    for name, content in {
        "q": [first, second], "mmhal": [form("mmhal", 1)[0]], "null": [first | {"text": None}],
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
    theirs, one, two = (
        write(tmp_path / "b.json", [{"answer": "red"}] * 6),
        tmp_path / "1.html",
        tmp_path / "2.html",
    )
    printed(capsys, compare, "--model", BASE, "--data", pairs, "--adapter", "base", theirs, "--to", one)
    command = "--to", two, "--adapter", theirs, tmp_path / "1-answers" / "base.jsonl", "--data"
    other = shapes.write_pairs(tmp_path / "other", 6, seed=1)
    assert "holds answers of other questions, images: " in refused(capsys, compare, *command, other)
    printed(capsys, compare, *command, pairs)
    for item in content_of(two)["items"]:
        assert item["texts"] == ["red", f"base: {item['question']} 1 256"]


def test_what_differs_is_marked():
    """By hand: the words that the other text lacks, and nothing else; both together are the text."""
    found = compare.marked("a red circle and a ring.", "a blue circle.")
    differs = [(text.strip(), mark) for text, mark in found if text.strip()]
    assert differs == [("a", False), ("red", True), ("circle", False), ("and a ring", True), (".", False)]
    assert compare.marked("same", "same") == [("same", False)] and compare.marked("", "x") == []
    text = "  two\n lines, <b>é</b> "
    assert joined(compare.marked(text, "other lines")) == text


NASTY = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\"> DATA &amp;"


def make(folder, texts, said, blind=False):
    """A page of questions, one about each of as many pictures, and {name: answers}."""
    images = [grey(folder / f"{i}.png", 10 * i) for i in range(len(texts))]
    questions = [
        Example(text, "", "", (image,), id=str(i)) for i, (text, image) in enumerate(zip(texts, images))
    ]
    (page := folder / "page.html").write_text(compare.make_page(questions, said, blind), "utf-8")
    return page


def test_no_text_can_end_the_script_that_holds_it(tmp_path):
    """A model that answers in HTML would write into the page. The id changes with each text: votes of one
    page must not show up in another."""
    page = make(tmp_path, [NASTY], {NASTY: [NASTY], "b": ["x"]})
    text, content = page.read_text(), content_of(page)
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<img" not in text
    assert not re.search(r"https?:|//", text.partition("<script type")[0]), "the page needs no network"
    (item,) = content["items"]
    assert item["question"] == item["texts"][0] == item["who"][0] == NASTY
    assert content_of(make(tmp_path, [NASTY], {NASTY: [NASTY], "b": ["y"]}))["id"] != content["id"]


def test_large_images_are_made_smaller_and_one_image_is_kept_once(tmp_path):
    """Photographs of 5 MB make a page that no phone opens; 14,000 questions about 1,000 images as well."""
    large, small = grey(tmp_path / "large.png", size=(3000, 1500)), grey(tmp_path / "small.png")
    questions = [Example("Why?", "", "", (large,)), Example("Where?", "", "", (large, small))]
    page = write(tmp_path / "page.html", compare.make_page(questions, {"a": ["x", "y"], "b": ["x", "y"]}))
    content = content_of(page)
    assert [item["images"] for item in content["items"]] == [[0], [0, 1]]
    shown = content["pictures"][0]
    assert shown.size == (512, 256) and shown.format == "JPEG"


def test_blind_pages_shuffle_and_hide_names(tmp_path):
    """A rater who sees the name, or who finds that the better one stands on the right, votes for it. Of 60
    questions 30 -+ 15 stand on either side (four standard deviations), and not in the order of the file.
    Three models meet in pairs."""
    said = {name: [f"{name[0]} says {i}" for i in range(60)] for name in ("tuned", "unchanged")}
    page, lefts = make(tmp_path, [f"Why {i}?" for i in range(60)], said, blind=True), []
    assert "tuned" not in page.read_text() and "unchanged" not in page.read_text()
    order = [int(item["id"]) for item in content_of(page)["items"]]
    assert order != sorted(order) == [*range(60)]
    for item in content_of(page)["items"]:
        models, left = json.loads(base64.b64decode(item["who"]))
        assert models == [*said] and item["question"] == f"Why {item['id']}?"
        right = models[models.index(left) - 1]
        assert item["texts"] == [said[name][int(item["id"])] for name in (left, right)]
        lefts.append(left)
    assert 15 <= lefts.count("tuned") <= 45
    three = content_of(make(tmp_path, ["Why?", "Who?"], dict.fromkeys("abc", "xy"), blind=True))
    met = [json.loads(base64.b64decode(item["who"]))[0] for item in three["items"]]
    assert sorted(met) == sorted(2 * [["a", "b"], ["a", "c"], ["b", "c"]])


# ------------------------------------------------------------------------------------------------ the votes


@pytest.fixture
def votes(tmp_path):
    """A function: page, rater, (item, name on the left, vote), the two models -> a file of votes."""

    def votes(page, rater, *cast, models="AB"):
        cast = [{"item": i, "models": [*models], "left": left, "vote": vote} for i, left, vote in cast]
        path = tmp_path / f"{len([*tmp_path.iterdir()])}.json"
        return write(path, {"page": page, "rater": rater, "votes": cast})

    return votes


def test_votes_are_counted_by_hand(votes, capsys):
    """Fig. 4 upside down, or the votes of many raters of one question taken for many questions. By hand, for
    A: question 0 is won by rater 1 and lost by rater 2, 1 and 2 are won, 3 is a tie, and question 0 of
    another page, which names the models in the other order, is lost. Win (.5 + 1 + 1) / 5, tie 1 / 5, lose
    1.5 / 5."""
    files = [
        votes("p", "1", (0, "A", "left"), (1, "B", "right"), (2, "A", "left"), (3, "B", "same")),
        votes("p", "2", (0, "A", "right")),
        votes("q", "1", (0, "B", "left"), models="BA"),
        votes("r", "1", (0, "A", "left"), models="AC"),
    ]
    title, *shares, other, _, _, _ = printed(capsys, compare, "--votes", *files).splitlines()
    assert title == "A against B: 5 questions, 6 votes" and other == "A against C: 1 questions, 1 votes"
    assert [row.split()[:2] for row in shares] == [["win", "50.0%"], ["tie", "20.0%"], ["lose", "30.0%"]]
    assert shares[0].endswith("17.0% to 83.0%")  # z^2 = 3.84: .5 -+ .5 sqrt(z^2 / (5 + z^2))


def test_wilsons_interval_by_hand():
    """Of no vote in ten the interval is not empty: 0 to z^2 / (n + z^2) = 3.8415 / 13.8415. In the middle it
    is .5 -+ .5 sqrt(z^2 / (n + z^2))."""
    for share, expected in (0, (0, 0.27753)), (1, (0.72247, 1)), (0.5, (0.23659, 0.76341)):
        assert evaluate.wilson(share, 10) == pytest.approx(expected, abs=1e-4)


def test_votes_that_cannot_be_counted_are_refused(votes, tmp_path, capsys):
    """A rater who downloads twice counts twice; and a file of something else counts as nothing."""
    first, again = votes("p", "1", (0, "A", "left")), votes("p", "1", (0, "A", "left"))
    for message, files in {
        f"{again}: cannot be counted: is of the rater and page of {first}": [first, again],
        "is not in a known form": [write(tmp_path / "x.json", [])],
        "has no 'up'": [votes("p", "1", (0, "A", "up"))],
        "has no 'C'": [votes("p", "1", (0, "C", "left"))],
        "No such file": [tmp_path / "none"],
        "--votes": [],
    }.items():
        assert message in refused(capsys, compare, "--votes", *files)


# ------------------------------------------------------------------------------------------------ a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RATER = """
const texts = selector => Array.from(document.querySelectorAll(selector), element => element.textContent);
const found = {counts: [], images: [], pressed: []};
const note = () => found.counts.push(texts("#count")[0]);
const press = (key, more) => document.dispatchEvent(new KeyboardEvent("keydown", {key, ...more}));
const better = () => texts("section p")[0].length > texts("section p")[1].length ? "left" : "right";
const arrow = side => ({left: "ArrowLeft", right: "ArrowRight"})[side];
URL.createObjectURL = blob => { found.file = blob.text(); return "blob:x"; };
HTMLAnchorElement.prototype.click = function () { found.name = this.download; };

async function rate() {
  Object.assign(found, {title: document.title, question: texts("h2")[0], heads: texts("h3")});
  found.shown = document.body.innerText;
  for (const image of document.images) await image.decode().then(() => found.images.push(image.naturalWidth));
  press("ArrowLeft", {repeat: true});
  for (const held of ["ctrlKey", "altKey", "metaKey"]) press("ArrowLeft", {[held]: true});
  note();  // 1/4, voted 0
  press(arrow(better() === "left" ? "right" : "left"));  // wrong, corrected below
  note();  // 2/4, voted 1
  document.querySelector(`[name=${better()}]`).click();
  const again = document.createElement("script");  // the page is left, and opened again
  again.textContent = `{${document.querySelectorAll("script")[1].textContent}}`;
  document.body.append(again);
  note();  // 3/4, voted 2
  press("s");
  note();  // 4/4, voted 3
  for (let i = 0; i < 3; i++) document.getElementById("back").click();
  found.pressed = texts("[aria-pressed=true]");
  press(arrow(better()));
  note();  // 4/4, voted 3
  document.querySelector(`[name=${better()}]`).click();
  note();  // 4/4, voted 4
  document.getElementById("next").click();
  note();  // 1/4, voted 4
  document.getElementById("download").click();
  found.file = await found.file;
  found.sent = performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5));
}
rate().catch(error => found.error = String(error)).then(() => {
  document.documentElement.dataset.found = encodeURIComponent(JSON.stringify(found));
});
"""


def in_browser(page, script):
    """What a script that runs at the end of the page puts into `found`, in a headless Chromium."""
    if not CHROMIUM:
        pytest.skip("the page was not tried in a browser: no Chromium here (apt-get install chromium)")
    page.write_text(page.read_text("utf-8").replace("</html>", f"<script>{script}</script></html>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=10000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    return json.loads(unquote(re.search('data-found="(.*?)"', shown)[1]))


def test_votes_are_cast_kept_downloaded_and_counted(tmp_path, capsys):
    """A rater's hour is lost, or counts for the other model. The rater here prefers the longer answer, which
    is always the tuned model's, calls the third the same, and corrects the first vote; by keys and buttons,
    with the page left and opened again in between. A key that is held down, or that is the browser's, is no
    vote."""
    said = {"tunéd": [f"{NASTY} and more {i}" for i in range(4)], "base": ["", "b", "c", "d"]}
    found = in_browser(make(tmp_path, [f"{i}: {NASTY}" for i in range(4)], said, blind=True), RATER)
    assert "error" not in found and found["title"] == "Answers side by side" and found["images"] == [8]
    assert found["heads"] == ["left", "right"]
    assert NASTY in found["question"] and not any(name in found["shown"] for name in said)
    assert found["counts"] == ["1/4, voted 0", "2/4, voted 1", "3/4, voted 2", "4/4, voted 3",
                               "4/4, voted 3", "4/4, voted 4", "1/4, voted 4"]  # fmt: skip
    assert len(found["pressed"]) == 1 and {*found["sent"]} <= {"data:", "blob:"}
    path = write(tmp_path / found["name"], found["file"])
    assert re.fullmatch(r"votes-\w+-[\w-]+\.json", found["name"])
    assert sorted(vote["id"] for vote in json.loads(found["file"])["votes"]) == ["0", "1", "2", "3"]
    out = printed(capsys, compare, "--votes", path)
    assert "tunéd against base: 4 questions, 4 votes" in out
    assert re.search(r"win +75.0%.*\n +tie +25.0%.*\n +lose +0.0%", out)
