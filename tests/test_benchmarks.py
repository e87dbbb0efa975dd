"""A benchmark's answers stand at their questions, in its scorer's form, and belong to one model."""

import base64
import io
import json
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from PIL import Image

from data import run_command
from examples import answer, benchmarks
from test_mdpo import write
from tests.helpers import one_line_of


def drawn(level):
    """A plain picture of this level, as the bytes of a PNG file."""
    Image.new("RGB", (8, 8), (level, level, level)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def form(name, number, text="What is it?", said="", place=0):
    """A question about picture `number` in a benchmark's file, and the record that the scorer reads."""
    file, level = f"{number}_o.png", base64.b64encode(drawn(10 * number)).decode()
    amber, discriminative = ({"id": id, "image": file, "query": text} for id in (number, 1004 + number))
    mmhal = {
        "image_src": f"https://x.org/9/{file}",
        "question": text,
        "model_answer": "theirs",
        "image_id": 0,
    }
    objhal = {"image_id": number, "prompt": text, "text": said, "question_id": place, "model_id": "mdpo"}
    return {
        "amber": (amber, {"id": number, "response": said}),
        "amber-discriminative": (discriminative, {"id": 1004 + number, "response": said}),
        "pope": ({"image": file, "text": text, "label": "yes"}, {"question": text, "answer": said}),
        "mmhal": (mmhal, mmhal | {"model_answer": said}),
        "objhal": ({"question": text, "image": level, "image_id": number}, objhal),
    }[name]


@pytest.fixture
def ask(bunny, tmp_path, monkeypatch):
    """A function: benchmark, its items, flags -> exit status of benchmarks.py. Its model says `ask.say` of a
    picture's level and a question; `ask.calls` notes what is read and asked. Pictures 1 to 7 exist."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(1, 8):
        (images / f"{number}_o.png").write_bytes(drawn(10 * number))

    def load(*arguments):
        ask.calls.append(arguments)
        return MagicMock(), None

    def generate(model, processor, questions, *limits):
        ask.calls.append(([text for _, text in questions], *limits))
        return [ask.say(image.getpixel((0, 0))[0], text) for (image,), text in questions]

    def ask(name, items, *flags, images=images):
        ask.lines = name in ("pope", "objhal")
        lines = ask.lines and not isinstance(items, str)
        text = "\n\n".join(map(json.dumps, items)) if lines else items
        argv = [name, "--model", bunny, "--questions", write(tmp_path / "questions", text), "--to", ask.to]
        argv += ["--images", images] if images else []
        return run_command(benchmarks.run, [*map(str, argv), *map(str, flags)])

    monkeypatch.setattr(answer, "load_tuned", load)
    monkeypatch.setattr(answer, "generate_answers", generate)
    ask.calls, ask.to, ask.images, ask.say = [], tmp_path / "to", images, lambda level, text: "Yes."
    return ask


def written(ask):
    """The records of the file, which goes."""
    text = ask.to.read_text()
    ask.to.unlink()
    return [*map(json.loads, text.splitlines())] if ask.lines else json.loads(text)


@pytest.mark.parametrize("name", ["amber", "mmhal", "objhal"])
def test_each_answer_stands_at_its_own_question(name, ask, tmp_path, capsys):
    """An answer at another's question is scored against another picture: a wrong number in a table, and no
    error. A wrong field costs an evaluation's API bill. Five items in batches of two; ids are in no order,
    lengths differ, picture `id` is of level 10 id. The third has no answer. Words: "40: What?" 2, "10: What?
    What?" 3, none, "50: ..." 5, and "20: ..." 6: 16 / 5 = 3.2 on average."""
    ask.say = lambda level, text: f"{level}: {text}" if level != 30 else ""
    numbers, texts = (4, 1, 3, 5, 2), [" ".join(["What?"] * n) for n in range(1, 6)]
    said = [ask.say(10 * number, text) for number, text in zip(numbers, texts)]
    items, records = zip(*map(form, [name] * 5, numbers, texts, said, range(5)))
    assert ask(name, items, "--batch-size", 2) == 0
    assert "5 answers, 3.2 words on average, 1 empty" in capsys.readouterr().out
    assert ask(name, items) == 2 and "already exists" in capsys.readouterr().err
    assert written(ask) == [*records] and not (tmp_path / "to.partial").exists()


NINE_TABS = "\t" * 9
WRONG_QUESTIONS = [  # benchmark, what is wrong in an item between two good ones, reason
    ("amber", {"query": None}, "'query' is null, not text"),
    ("pope", {"text": ["Is it?"]}, "'text' is ["),
    ("mmhal", {"question": " "}, "'question' is \" \", not text"),
    ("amber", {"image": ""}, "'image' is \"\", not text"),
    ("amber", {"query": "What \ud800?"}, "surrogates not allowed"),
    ("amber", {"query": "What is <image>?"}, "'<image>'"),
    ("amber", {"query": f"What{NINE_TABS}"}, "image token"),
    ("pope", {"text": "Is it?<|endoftext|>"}, "'<|endoftext|>'"),
    ("pope", {"text": "<image 1> Is it?"}, "'<image 1>'"),
    ("amber", {"id": "1"}, "'id' is \"1\", not a number"),
    ("amber-discriminative", {"id": "1"}, "'id' is \"1\", not a number"),
    ("amber", {"id": 1005}, "question 1005 is discriminative: answer it by amber-discriminative"),
    ("amber", {"image": None}, "'image' is null, not text"),
    ("amber", {"image": "b.png"}, "no image 'b.png'"),
    ("mmhal", {"image_src": "https://x.org/1/b.png"}, "no image 'b.png'"),
    ("amber", {"image": "../a.png"}, "points outside the image folder"),
    ("amber", {"image": "x.png"}, "cannot be decoded"),
    ("objhal", {"image": "AAAA"}, "'image': image <"),
    ("objhal", {"image": "AAAAA"}, "'image': Invalid base64"),
    ("objhal", {"image": "file:///etc/hostname"}, "is an address, file:///"),
    ("amber", {"image": "https://x.org/a.png"}, "is an address, https://"),
]


@pytest.mark.parametrize("name, wrong, reason", WRONG_QUESTIONS)
def test_questions_that_cannot_be_asked_are_named_before_the_model_is_read(name, wrong, reason, ask, capsys):
    """An internal error after an hour of answers, or an empty answer that counts as free of hallucination."""
    write(ask.images / "x.png", "no picture")
    good, _ = form(name, 1)
    assert ask(name, [good, good | wrong, good]) == 2 and not ask.calls
    printed = capsys.readouterr().err
    assert "questions: 1 of 3 questions cannot be asked:\n" in printed and "internal" not in printed
    assert f"question 2 of {name}: " in printed and reason in printed and printed.count("\n") == 2
    assert not Path(f"{ask.to}.partial").exists()


@pytest.mark.parametrize("name, bad, place", [("amber", 5, 2), ("amber", "x", 2), ("pope", '{"text": ', 3)])
def test_what_is_no_question_is_named_by_its_line(name, bad, place, ask, capsys):
    """One of 14,216 lines is broken: which one? Lines with nothing in them count as well."""
    good, _ = form(name, 1)
    error = one_line_of(capsys, ask(name, [good, bad] if name == "amber" else f"{json.dumps(good)}\n\n{bad}"))
    assert f"questions: cannot be read: line or item {place} is no JSON object" in error and not ask.calls


@pytest.mark.parametrize("address", ["https://x.org/9/1_o.png", "file:///1_o.png"])
def test_nothing_is_fetched(address, ask, monkeypatch, capsys):
    """Questions are data from the net: they must not make a machine open addresses, or files of its own."""
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("a connection"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **options: pytest.fail("an address"))
    monkeypatch.chdir(ask.images)
    item = form("mmhal", 1)[0] | {"image_src": address}
    assert ask("mmhal", [item], images=None) == 2 and not ask.calls
    assert f"is an address, {address}: download all, and give --images" in capsys.readouterr().err
    assert ask("mmhal", [item]) == 0


POPE, AMBER = form("pope", 1)[0], form("amber-discriminative", 1)[0]
WRONG_TRUTHS = [  # benchmark, items, annotations, reason
    ("pope", [POPE, {"image": "1_o.png", "text": "Is it?"}], None, "has no 'label'"),
    ("pope", [POPE | {"label": "Yes"}], None, '"Yes" is neither "yes" nor "no"'),
    ("amber-discriminative", [AMBER], [{"id": 2, "truth": "yes"}], "has no 1005"),
    ("amber-discriminative", [AMBER], [{"id": 1005, "truth": ["sky"]}], '["sky"] is neither'),
    ("amber-discriminative", [AMBER], [None], "line or item 1 is no JSON object"),
]


@pytest.mark.parametrize("name, items, annotations, reason", WRONG_TRUTHS)
def test_truths_are_checked_before_the_model_is_read(name, items, annotations, reason, ask, tmp_path, capsys):
    """They are looked up when all answers are there: the crash would cost these."""
    flags = ["--annotations", write(tmp_path / "notes.json", annotations)] if annotations else []
    message = one_line_of(capsys, ask(name, items, *flags))
    assert "no annotations for these questions: " in message and reason in message and not ask.calls


def check_yes_no(ask, name, said, expected, truths, *flags):
    """The model answers so to questions of these truths: the file has the expected answers."""
    forms = [form(name, n, f"Is there {n}?", text) for n, text in enumerate(expected, 1)]
    items = [item | {"label": truth} if name == "pope" else item for (item, _), truth in zip(forms, truths)]
    answers = iter(said)
    ask.say = lambda level, text: next(answers)
    assert ask(name, items, *flags) == 0 and written(ask) == [record for _, record in forms]


def test_discriminative_questions_of_amber_are_answered_by_yes_or_no(ask, tmp_path, capsys):
    """AMBER's inference.py compares with "Yes" and "No": a sentence counts as wrong, and nothing says so. By
    hand: 3 of 7 are neither. Positive is No: said 3 times, twice rightly, of 4 that are true. Right are these
    2 and one Yes: 3 of 7. F1 is 2 * 2 / (3 + 4)."""
    said = ["Yes, it is.", "no", ' "No," I think.', "Nobody is.", "I see. Yes.", "Yesterday.", "No."]
    truths, expected = "yes no yes no yes no no".split(), ["Yes", "No", "No", *said[3:6], "No"]
    check_yes_no(ask, "amber-discriminative", said, expected, truths)
    assert "accuracy" not in capsys.readouterr().out  # its truth is in another file
    notes = [{"id": 1, "truth": ["sky"]}, *({"id": 1005 + n, "truth": t} for n, t in enumerate(truths))]
    flags = "--annotations", write(tmp_path / "notes.json", notes)
    check_yes_no(ask, "amber-discriminative", said, expected, truths, *flags)
    printed = capsys.readouterr().out
    assert "42.9% are neither Yes nor No" in printed
    assert "accuracy 42.9, precision 66.7, recall 50.0, F1 57.1, yes 14.3" in printed
    ask.say = lambda level, text: "Yes, a dog."
    assert ask("amber", [AMBER | {"id": 1004}]) == 0
    assert written(ask) == [{"id": 1004, "response": "Yes, a dog."}]


def test_pope_is_scored_as_its_own_script_does(ask, capsys):
    """POPE's evaluate.py: no, where the first sentence has the word no or not; else yes, also for babble. By
    hand: of "Yes", "No", "there is not a dog", "Perhaps", "I know. There is no dog" and "No" three are no;
    yes is said 3 times, twice rightly, of 4 that are true; right are these and one no: 3 of 6. F1 is 2 * 2 /
    (3 + 4)."""
    said = ["yes, there is.", "No.", "there is, not, a dog", "Perhaps", "I know. There is no dog", "no"]
    truths = "yes no yes yes no yes".split()
    check_yes_no(ask, "pope", said, ["Yes", "No", *said[2:5], "No"], truths)
    printed = capsys.readouterr().out
    assert "50.0% are neither Yes nor No" in printed
    assert "accuracy 50.0, precision 66.7, recall 50.0, F1 57.1, yes 50.0" in printed


def test_benchmark_flags_reach_the_model_and_the_partial_file(ask, adapted, bunny, tmp_path, capsys):
    """Answers cut at another length, or half of them another model's, are scored as this one's."""
    run, other = shutil.copytree(adapted, tmp_path / "run"), shutil.copytree(bunny, tmp_path / "other")
    items = [form("amber", number, f"Who {number}?")[0] for number in (1, 2, 3)]
    flags = ["--max-new-tokens", 7, "--batch-size", 2, "--device", "cpu", "--adapter", run]

    def killed(level, text):
        if level == 30:
            raise KeyboardInterrupt
        return "Yes."

    def refuses(belongs, *more):
        ask.calls.clear()
        assert ask("amber", items, *flags, *more) == 2 and not ask.calls
        assert f"holds answers of other {belongs}:" in capsys.readouterr().err

    ask.say = killed
    assert ask("amber", items, *flags) == 130
    loaded = (str(bunny), [str(run)], "cpu")
    assert ask.calls == [loaded, (["Who 1?", "Who 2?"], 7, 2, ""), (["Who 3?"], 7, 2, "")]
    write(other / "more.json", {})
    refuses("model", "--model", other)
    refuses("max new tokens", "--max-new-tokens", 8)
    (picture := ask.images / "3_o.png").write_bytes(drawn(31))  # the same name
    refuses("images")
    picture.write_bytes(drawn(30))
    write(run / "args.json", {"system": "Be brief."})
    refuses("system")
    write(run / "adapter_config.json", (run / "adapter_config.json").read_text() + " ")  # as of another alpha
    refuses("adapter, system")
    ask.say = lambda level, text: "No."
    assert ask("amber", items, *flags, "--adapter", adapted) == 0  # the same under another name
    assert ask.calls[1:] == [(["Who 3?"], 7, 2, "")]
    assert [record["response"] for record in written(ask)] == ["Yes.", "Yes.", "No."]


def test_questions_are_asked_with_the_system_text_of_the_run(ask, adapted, tmp_path, capsys):
    """A model that was trained with a system text is another one without. Odd files of a run are one line."""
    run, items = shutil.copytree(adapted, tmp_path / "run"), [form("objhal", 1)[0]]
    write(run / "args.json", {"system": "Be brief."})
    for flags, system in ([], ""), (["--adapter", run], "Be brief."), (["--adapter", adapted], ""):
        ask.calls.clear()
        assert ask("objhal", items, *flags) == 0 and ask.calls[1:] == [(["What is it?"], 512, 8, system)]
        ask.to.unlink()
    write(run / "args.json", "[")
    ask.calls.clear()
    assert "args.json: cannot be read" in one_line_of(capsys, ask("objhal", items, "--adapter", run))
    assert "holds no adapter" in one_line_of(capsys, ask("objhal", items, "--adapter", ask.images))
    assert not ask.calls and not Path(f"{ask.to}.partial").exists()
