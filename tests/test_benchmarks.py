"""A benchmark's answers stand at their questions, in its scorer's form, and belong to one model."""

import base64
import json
import re
import shutil
from pathlib import Path
from string import Template
from unittest.mock import MagicMock

import pytest

from examples import answer, benchmarks
from test_mdpo import write
from tests.helpers import drawn

FORMS = {  # a question about picture n in a benchmark's file -> the record that its scorer reads
    "amber": '{"id": 100$n, "image": "$n.png", "query": "$text"} -> {"id": 100$n, "response": "$said"}',
    "pope": '{"image": "$n.png", "text": "$text", "label": "$label"} -> '
    '{"question": "$text", "answer": "$said"}',
    "mmhal": '{"image_src": "https://x.org/9/$n.png", "question": "$text", "model_answer": "theirs"} -> '
    '{"image_src": "https://x.org/9/$n.png", "question": "$text", "model_answer": "$said"}',
    "objhal": '{"image_id": $n, "question": "$text", "image": "$png"} -> {"image_id": $n, "prompt": "$text", '
    '"text": "$said", "question_id": $place, "model_id": "mdpo"}',
}
FORMS["amber-discriminative"] = FORMS["amber"].replace("100", "110")


def form(name, n, **changes):
    """A question about picture n, and its record."""
    values = {"text": "What is it?", "said": "", "label": "yes", "place": 0, "n": n} | changes
    texts = Template(FORMS[name]).substitute(values, png=base64.b64encode(drawn(10 * n).encode()).decode())
    return [*map(json.loads, texts.split(" -> "))]


@pytest.fixture
def ask(bunny, run, monkeypatch):
    """A function: benchmark, items, flags -> what benchmarks.py prints in a folder of the pictures 0 to 7.

    The model says `ask.say` of a picture's level and a question; `ask.calls`: what was loaded and asked."""
    for n in range(8):
        write(Path(f"{n}.png"), drawn(10 * n))

    def load(name_or_path, adapters, device):
        ask.calls.append((name_or_path, adapters, device))
        return MagicMock(), None

    def generate(model, processor, questions, max_new_tokens=256, batch_size=8, system=""):
        ask.calls.append(([text for _, text in questions], max_new_tokens, batch_size, system))
        return [ask.say(image.getpixel((0, 0))[0], text) for (image,), text in questions]

    def ask(name, items, flags="", status=0, images="--images ."):
        ask.calls.clear()
        Path("to").unlink(missing_ok=True)
        write(Path("items"), items if isinstance(items, str) else "\n\n".join(map(json.dumps, items)))
        return run(benchmarks, f"{name} --model {bunny} --questions items --to to {images} {flags}", status)

    monkeypatch.setattr(answer, "load_tuned", load)
    monkeypatch.setattr(answer, "generate_answers", generate)
    ask.calls, ask.say = [], lambda level, text: "Yes."
    return ask


def written(name):
    text = Path("to").read_text()
    return [*map(json.loads, text.splitlines())] if name in ("pope", "objhal") else json.loads(text)


@pytest.mark.parametrize("name", ["amber", "mmhal", "objhal"])
def test_each_answer_stands_at_its_own_question(name, ask):
    """An answer at another's question is scored against another picture: a wrong number in a table, and no
    error. Ids are in no order, lengths differ, the third has no answer. Words are 3, 5, 0, 3 and 7."""
    ask.say = lambda level, text: f"Yes {level}: {text}" if level != 30 else ""
    asked = (4, "Who?"), (1, "What is it?"), (3, "Is it red?"), (0, "Why?"), (2, "Where is the red dog?")
    rows = [{"n": n, "text": text, "said": ask.say(10 * n, text)} for n, text in asked]
    items, records = zip(*(form(name, **row, place=place) for place, row in enumerate(rows)))
    assert "5 answers, 3.6 words on average, 1 empty" in ask(name, items, "--batch-size 2")
    assert written(name) == [*records] and not Path("to.partial").exists()
    Path("link").symlink_to("nowhere")
    assert "link: already exists" in ask(name, items, "--to link", 2) and not ask.calls


# Benchmark, what is wrong in an item between two good ones -> what is said. Truths are looked up when all
# answers are there: a crash would cost these.
WRONG = r"""
amber {"image": null} -> 2 of 3 questions can be asked | question 2 of amber: 'image' is null
mmhal {"question": " "} -> question 2 of mmhal: 'question' is " ", not text
pope {"text": ["Is it?"]} -> 'text' is ["Is it?"], not text
amber {"query": "What\t\t\t\t\t\t\t\t\t"} -> image token
pope {"text": "Is it?<|endoftext|>"} -> '<|endoftext|>'
amber {"id": "1"} -> 'id' is "1", not one of 1 to 1004
amber {"id": 1.0} -> 'id' is 1.0, not one of 1 to 1004
amber {"id": 1005} -> 'id' is 1005, not one of 1 to 1004
amber-discriminative {"id": 1004} -> 'id' is 1004, not one of 1005 to 15220
amber {"image": "b.png"} -> no image 'b.png'
amber {"image": "items"} -> question 2 of amber: 'image': image
objhal {"image": "AAAAA"} -> 'image': Invalid base64
objhal {"image": "file:///etc/hostname"} -> 'image': its image is an address, file:///
amber {"image": "https://x.org/a.png"} -> its image is an address, https://x.org/a.png: download
pope {"label": "MISSING"} -> items: no annotations for these questions: has no 'label'
pope {"label": "Yes"} -> "Yes" is neither "yes" nor "no"
amber-discriminative {"id": 1102} -> notes.json: no annotations for these questions: has no 1102
amber-discriminative {"id": 1103} -> ["sky"] is neither "yes" nor "no"
"""


@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_what_cannot_be_asked_or_scored_is_named_before_the_model_is_read(case, ask):
    """An internal error after an hour of answers, or an empty answer that counts as free of hallucination."""
    name, wrong, reason = re.fullmatch("(.+?) (.+) -> (.+)", case).groups()
    write(Path("notes.json"), [{"id": 1101, "truth": "yes"}, {"id": 1103, "truth": ["sky"]}])
    good, _ = form(name, 1)
    bad = {key: value for key, value in (good | json.loads(wrong)).items() if value != "MISSING"}
    flags = "--annotations notes.json" * (name == "amber-discriminative")
    message = ask(name, [good, bad, good], flags, 2)
    assert reason.replace(" | ", "\n  ") in message and message.count("\n") <= 2
    assert ask(name, [bad, good], flags, 2)
    assert not ask.calls and not Path("to.partial").exists()


def test_what_is_no_question_is_named_by_its_line(ask, llava):
    """One of 14,216 lines is broken: which one? Lines with nothing in them count as well. A text with a token
    of the model's own would be cut, or read as a turn."""
    for items, place in ('[{"id": 1}, 5]', 2), ('{"id": 1}\n\n{"id": ', 3), ('["x"]', 1):
        error = f"items: cannot be read: line or item {place} is no JSON object"
        assert error in ask("amber", items, status=2) and not ask.calls
    many = ask("amber", [{"id": 1}] * 25, status=2)
    assert "0 of 25 questions can be asked" in many and many.count("\n") == 21  # the first twenty are listed
    assert "items: 0 of 0 questions can be asked" in ask("amber", "[]", status=2) and not ask.calls
    ends = [form("amber", 1, text="Is it</s>?")[0]]
    assert "question 1 of amber: 'prompt'" in ask("amber", ends, f"--model {llava}", 2) and not ask.calls


@pytest.mark.parametrize("address", ["https://x.org/9/1.png", "file:///1.png"])
def test_nothing_is_fetched(address, ask, monkeypatch):
    """Questions are data from the net: they must not make a machine open addresses, or files of its own."""
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("a connection"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **options: pytest.fail("an address"))
    items = [form("mmhal", 1)[0] | {"image_src": address}]
    assert "no image '1.png' in other" in ask("mmhal", items, "--images other", 2)
    assert f"is an address, {address}: download all, and give --images" in ask("mmhal", items, "", 2, "")
    ask("mmhal", items)


# Of the pictures 0 to 7. The first three are written as Yes, No and No, the others as they were said.
SAID = [
    *("Yes, it is.", "no", ' "No," I think.', "there is, not, a dog", "I know. There is no dog"),
    *("Yesterday.", "I see. Yes.", "Nobody, no."),
]
TRUTHS = "yes no yes no yes no no no".split()
COUNTED = {
    # Positive is No: said twice, once rightly, of 5. Right are 2 of 8, one a Yes. F1 is 2 / (2 + 5).
    "amber-discriminative": "accuracy 25.0, precision 50.0, recall 20.0, F1 28.6, yes 12.5",
    # It is no where the first sentence has the word no or not, here four times, else yes, also for babble.
    # Yes is said four times, twice rightly, of 3; right are these and three no. F1 is 4 / (4 + 3).
    "pope": "accuracy 62.5, precision 50.0, recall 66.7, F1 57.1, yes 50.0",
}


@pytest.mark.parametrize("name", COUNTED)
def test_yes_and_no_are_written_and_counted_as_the_benchmarks_own_script_does(name, ask):
    """AMBER's inference.py compares with "Yes" and "No": a sentence counts as wrong, and nothing says so."""
    rows = [*enumerate(zip(["Yes", "No", "No", *SAID[3:]], TRUTHS))]
    items, records = zip(*(form(name, n, said=text, label=truth) for n, (text, truth) in rows))
    notes = [{"id": 1, "truth": ["sky"]}, *({"id": 1100 + n, "truth": truth} for n, (_, truth) in rows)]
    write(Path("notes.json"), notes)
    ask.say = lambda level, text: SAID[level // 10]
    printed = ask(name, items, "--annotations notes.json" * (name != "pope"))
    assert f"62.5% are neither Yes nor No\n{COUNTED[name]}\n" in printed
    assert written(name) == [*records]
    assert ("accuracy" in ask(name, items)) == (name == "pope")  # AMBER's truths are in another file


def test_flags_and_system_text_reach_the_model_and_the_partial_file(ask, adapted, bunny):
    """Answers of another length, without the system text or half of them another's count as this model's."""
    shutil.copytree(adapted, "run")
    shutil.copytree(bunny, "model")
    texts = ["model/chat_template.jinja", "model/merges.txt", "model/tokenizer.model"]
    for file in texts:
        write(Path(file), "")
    items, args = [form("amber", n, text=f"Who {n}?")[0] for n in (1, 2, 3)], Path("run/args.json")
    flags = "--model model --max-new-tokens 7 --batch-size 2 --device cpu"

    def refuses(what, more="--adapter run", items=items):
        error = ask("amber", items, f"{flags} {more}", 2)
        assert "to.partial: cannot go on, " in error and error.endswith(f"other values of {what}\n")
        assert not ask.calls

    ask.say = MagicMock(side_effect=["Yes.", "Yes.", OSError])
    ask("amber", items, f"{flags} --adapter run", 2)
    assert ask.calls == [("model", ["run"], "cpu"), (["Who 1?", "Who 2?"], 7, 2, ""), (["Who 3?"], 7, 2, "")]
    refuses("max new tokens", "--adapter run --max-new-tokens 8")
    refuses("adapter", "")  # the base
    refuses("questions", items=[item | {"query": "Where?"} for item in items])
    for file, what in {
        "3.png": "images", "model/config.json": "model", "model/model-00002-of-00002.safetensors": "model",
        "run/adapter_config.json": "adapter", "run/adapter_model.safetensors": "adapter",
        **dict.fromkeys(texts, "model"),
    }.items():  # fmt: skip
        content = Path(file).read_bytes()
        Path(file).write_bytes(content + b" ")  # under the same name
        refuses(what)
        Path(file).write_bytes(content)
    write(args, {"system": "Be brief."})
    refuses("system")
    ask.say = lambda level, text: "No."
    ask("amber", items, f"{flags} --adapter {adapted}")  # the same under another name
    assert ask.calls[1:] == [(["Who 3?"], 7, 2, "")]
    assert [record["response"] for record in written("amber")] == ["Yes.", "Yes.", "No."]
    ask("amber", items[:1], "--adapter run")
    assert ask.calls[1:] == [(["Who 1?"], 512, 8, "Be brief.")]
    write(args, "[]")
    assert "args.json: cannot be read" in ask("amber", items, "--adapter run", 2) and not ask.calls
