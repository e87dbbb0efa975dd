"""Protects who said what: an answer, a number or a vote under another model's name is worse than none.

The page is tried in a headless Chromium where one is installed."""

import base64
import io
import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch
from urllib.parse import unquote

import peft
import pytest
import torch
from PIL import Image

import train
from data import BadInput, Example, open_image, read_examples, texts_of
from examples import answer, compare, evaluate, shapes
from test_mdpo import ROOT, write
from tests.helpers import drawn
from tests.test_benchmarks import form

BASE = ROOT / "examples" / "base"


NO_MODEL = patch.multiple(answer, load_model=None, generate_answers=None)  # nothing may be asked of a model


@pytest.fixture(autouse=True)
def picture(run):
    """Each test is in a folder of its own, which has this picture."""
    write(Path("1.png"), drawn(10))


@pytest.fixture
def stub(monkeypatch):
    """No weights: an answer says what was asked of which adapter. `load`: in the place of load_tuned."""
    model = SimpleNamespace()
    model.load = Mock(return_value=(model, None))

    def speaking_as(model, number):
        model.on = number
        return nullcontext()

    def say(model, processor, questions, limit, batch_size=8, system=""):
        how = f"{limit} {batch_size} {system}"
        return [f"{model.on}: {text} {len(images)} {how}" for images, text in questions]

    monkeypatch.setattr(answer, "load_tuned", model.load)
    monkeypatch.setattr(answer, "read_adapter", Mock())
    monkeypatch.setattr(answer, "speaking_as", speaking_as)
    monkeypatch.setattr(answer, "generate_answers", say)
    return model


@torch.no_grad()
def logits_of(model, processor):
    return model(**processor(text="What is it?", return_tensors="pt")).logits


def test_each_adapter_of_several_speaks_as_if_it_were_alone(bunny):
    """An answer under another adapter's name. Expected: each loaded by itself, into a model of its own."""
    alone = {None: logits_of(*train.load_model(bunny))}
    for number in 0, 1:
        torch.manual_seed(number)
        config = peft.LoraConfig(r=2 + number, target_modules=["v_proj"], init_lora_weights=False)
        peft.get_peft_model(train.load_model(bunny)[0], config).save_pretrained(str(number))
        alone[number] = logits_of(*answer.load_tuned(bunny, str(number), "cpu"))
    assert torch.pdist(torch.stack([*alone.values()]).flatten(1)).min() > 0.1
    model, processor = answer.load_tuned(bunny, ["0", "1"], "cpu")
    for number in 1, None, 0, 1:  # there and back
        with answer.speaking_as(model, number):
            torch.testing.assert_close(logits_of(model, processor), alone[number], atol=1e-4, rtol=0)


def test_answer_command_asks_each_model_each_question(stub, run):
    """The paper's Figure 3. All answer by the system text of the first run's training."""
    for name in "a", "bcd":
        write(Path(name, "args.json"), {"system": f"You are {name}."})
    line = f"--model {BASE} --image 1.png 1.png --question Why? Where? --max-new-tokens 9 --device cpu"
    how = "{0} 2 9 1 You are a."
    expected = f"{{0}}\nbase: None: {how}\na:    0: {how}\nbcd:  1: {how}\n"
    assert run(answer, f"{line} --adapter a bcd") == expected.format("Why?") + expected.format("Where?")
    assert stub.load.call_args.args == (str(BASE), ["a", "bcd"], "cpu")
    assert run(answer, f"--model {BASE} --question Why?") == "Why?\nbase: None: Why? 0 256 1 \n"


def test_files_of_answers_are_named_after_their_runs():
    """A name that no disk takes, a file outside of the folder, or one file for two runs."""
    found = answer.files_in("said", [None, "runs/é", "runs-é", "../v1.5", "x" + "y" * 299])
    names = "base", "runs%2F%C3%A9", "runs-%C3%A9", "..%2Fv1.5", "y" * 200
    assert [*found.values()] == [Path("said", f"{name}.jsonl") for name in names]
    with pytest.raises(BadInput, match="two of the names base have one file of answers"):
        answer.files_in("said", [None, "base"])


def test_no_question_holds_a_token_of_an_image(stub, run):
    """It would be one image too many. Gemma 3's tokenizer has another such token than its processor."""
    tokenizer = SimpleNamespace(image_token="<soft>", video_token="<film>")
    processor = SimpleNamespace(image_token="<i>", video_token="<v>", tokenizer=tokenizer)
    for token in "<image>", "<i>", "<v>", "<soft>", "<film>":
        with pytest.raises(BadInput, match=f"holds the image token '{token}'"):
            answer.refuse_image_tokens(processor, f"Is {token} red?")
    answer.refuse_image_tokens(processor, "What is <it>?")
    assert "'<image>'" in run(answer, f"--model {BASE} --question Why? Is<image>red?", 2)
    assert not stub.load.called


UPPER = [f"WHY {i}?" for i in range(5)]


def keep(ask, model="m"):
    """Answers by a file: five questions in batches of two."""
    asked = {None: "new/folder/a.jsonl"}, model, [Example(f"Why {i}?", "", "", ()) for i in range(5)], 9, 2
    with patch.object(answer, "generate_answers", lambda model, processor, batch, *more: ask(batch)):
        return answer.answer_as(*asked, loaded=(None, None))[None]


def said_in(path):
    return [json.loads(line)["answer"] for line in Path(path).read_text().splitlines()[1:]]


def test_answers_are_kept_as_they_come_and_gone_on_with():
    """A kill must not cost three hours: before anything is written, in the second batch, in half a line. The
    user's own file stays, and that of two commands at once: answers would stand at others' questions."""
    asked, path = [], Path("new/folder/a.jsonl")

    def ask(batch):
        asked.append([text.upper() for _, text in batch])
        if len(asked) == 2:
            assert said_in(path) == UPPER[:2]  # already there
            raise KeyboardInterrupt
        return asked[-1]

    write(path, "")
    with pytest.raises(KeyboardInterrupt):
        keep(ask)
    path.write_text(path.read_text() + '{"question": "Why 2?", "ans')
    assert keep(ask) == UPPER == said_in(path) == keep(pytest.fail)
    assert asked == [UPPER[:2], UPPER[2:4], UPPER[2:4], UPPER[4:]]
    with pytest.raises(BadInput, match="other values of model"):
        keep(pytest.fail, "another/of-the-hub")
    first, *lines = path.read_text().splitlines(keepends=True)
    for content in "my notes", "my notes\nof today\n", '{"a": 1}\n', "".join([first, *lines[:1], *lines[:2]]):
        path.write_text(content)
        with pytest.raises(BadInput, match="a.jsonl: cannot go on, "):
            keep(pytest.fail)
        assert path.read_text() == content
    path.unlink()
    with pytest.raises(ValueError):
        keep(lambda batch: ["one of two"])


BETTER = """
6 examples: means, and bootstrap intervals of level 95%
base; answers, words 1.0000; answers, refusals 0.0000
a; loss 25.0000; rewards/margins 25.0000; margin, image 25.0000; answers, words 2.5000; \
answers, refusals 0.1667
b, scored as a; loss 24.5000; rewards/margins 12.5000; margin, image 12.5000; answers, words 2.0000; \
answers, refusals 0.1667
a minus base; answers, words 1.5000; answers, refusals 0.1667; answers, equal 0.5000
b minus base; answers, words 1.0000; answers, refusals 0.1667; answers, equal 0.5000
b minus a; loss -0.5000; rewards/margins -12.5000; margin, image -12.5000; answers, words -0.5000; \
answers, refusals 0.0000; answers, equal 0.6667
"""


def test_differences_are_taken_example_by_example(stub, run, monkeypatch):
    """Unpaired, the spread of the examples drowns a difference that each shows: the second adapter's losses
    are 0.5 lower, its margins half of the first's. Answers are counted by hand."""
    write(Path("a/args.json"), {"beta": 0.3, "no_conditional": True})
    said = {
        None: ["red"] * 6,
        0: "red, red, red, it is all red, it is all red, there is no ring".split(", "),
        1: "red, red, red, it is all red, there is no red, blue".split(", "),
    }

    def score(*given, **options):
        losses = [10.0 * i - 0.5 * stub.on for i in range(6)]
        return {"loss": losses, "rewards/margins": [10.0 * i / (1 + stub.on) for i in range(6)]}

    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(answer, "generate_answers", lambda *given: said[stub.on])
    moved = Path(shapes.write_pairs(Path("data"), 6)).rename("moved.json")
    line = f"--model {BASE} --data {moved} --images data --device cpu --adapter"
    out = run(evaluate, f"{line} b")
    assert "b: has no args.json; train.py's defaults are taken" in out and "minus" not in out
    assert answer.read_run("a/epoch-2")["beta"] == 0.3 and answer.read_run("a/epoch-x") == {}  # --keep-epochs
    write(Path("a/epoch-7/args.json"), {"beta": 9})
    assert answer.read_run("a/epoch-7") == {"beta": 9}  # a run of its own
    out = run(evaluate, f"{line} a b --answers said")
    assert stub.load.call_args.args == (str(BASE), ["a", "b"], "cpu")
    shown = re.sub("\n  margin, (no|other).*", "", out)
    assert "no args.json" not in out and BETTER in re.sub(r"\n  (.*?)  +(\S+).*", r"; \1 \2", shown)
    assert re.search(r"loss +-0.5000 +-0.5000 to -0.5000", out)
    assert sorted(map(said_in, Path("said").iterdir())) == sorted(said.values())
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)
    assert run(evaluate, f"{line} a b --answers said") == out  # asks nothing again
    alone = run(evaluate, f"{line} a --answers said")
    assert "\nbase\n" in alone and "\na\n  loss" in alone and "\na minus base\n" in alone
    assert "of max new tokens" in run(evaluate, f"{line} a b --answers said --max-new-tokens 9", 2)
    assert "--adapter takes different runs" in run(evaluate, f"{line} a b ./a", 2)
    monkeypatch.setattr(evaluate, "score_margins", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # not the fault of the run's loss
        run(evaluate, f"{line} a")


TOLD = {  # refusals, and what is none
    1: "There is no dog. THERE ARE NO dogs. There is not one. There isn't one. There aren't any. Sorry. "
    "It is not visible. They are not shown. It is not depicted. It is not present. A dog, not in the image. "
    "None, not in the picture. None, not in the photo. It does not show it. They do not contain it. "
    "It doesn't depict it. They don't include it. I do not see it. I cannot tell. I can not determine it. "
    "I can't identify it. I am unable to answer. I can't see it.",
    0: "It cannot be red. There is now one. An axis not shown. I am unable. Not in the car. It can see.",
}


@pytest.mark.parametrize("refused", TOLD)
def test_refusals_are_told_by_their_words(refused):
    """The share of refusals is how a model that refuses all looks better than it is."""
    for text in TOLD[refused].split(". "):
        found = evaluate.measure([f"{text} \n"])
        assert found == {"answers, words": [text.count(" ") + 1], "answers, refusals": [refused]}, text
    assert evaluate.measure([""])["answers, words"] == [0]


def content_of(path):
    """What the page holds; the answers' texts as `texts`, the pictures as `pictures`, its HTML as `page`."""
    page = Path(path).read_text()
    content = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    for item in content["items"]:
        if content["blind"]:  # the two models, and the one on the left
            item["models"], item["left"] = json.loads(base64.b64decode(item["who"]))
        item["texts"] = ["".join(text for text, _ in pieces) for pieces in item["answers"]]
    files = [io.BytesIO(base64.b64decode(uri.partition("base64,")[2])) for uri in content["images"]]
    return content | {"pictures": [*map(Image.open, files)], "page": page}


def test_page_of_base_and_adapters_and_of_an_earlier_pages_answers(stub, run, monkeypatch):
    """Each answer under its own name, in the order of the command, beside its own question and image."""
    pairs, other = (shapes.write_pairs(Path(f"data{seed}"), 6, seed=seed) for seed in (0, 1))
    for name in "a", "b":
        write(Path(name, "args.json"), {"system": f"You are {name}."})
    flags = f"--model {BASE} --max-new-tokens 9 --batch-size 4 --device cpu --data"
    line = f"{flags} {Path(pairs).rename('moved.json')} --images data0 --adapter"
    assert "1.html: 6 questions, 0 of them with equal" in run(compare, f"{line} b base a --to to/1.html")
    assert stub.load.call_args.args == (str(BASE), ["b", "a"], "cpu")
    assert "2.html: 2 questions" in run(compare, f"{line} b base a --to 2.html --limit 2 --no-image --blind")
    assert len(content_of("2.html")["items"]) == 2 * 3 and not content_of("2.html")["images"]
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)  # each model has answered once
    Path("link").symlink_to("nowhere")
    assert "link: already exists" in run(compare, f"{line} b base a --to link", 2)
    theirs = write(Path("theirs.json"), [{"answer": "red"}] * 6)
    sides = f"b {theirs} to/1-answers/base.jsonl"
    error = run(compare, f"{flags} {other} --adapter {sides} --to 3.html", 2)
    assert "cannot be compared: it began with other values of questions, images" in error
    run(compare, f"{line} {sides} --answers to/1-answers --to 3.html")
    content, later = content_of("to/1.html"), content_of("3.html")
    examples = read_examples("moved.json", "data0")
    for item, item_later, example in zip(content["items"], later["items"], examples, strict=True):
        # The adapter that the command names first is load_tuned's first, and its system text is all's.
        texts = [f"{on}: {example.question} 1 9 4 You are b." for on in (0, None, 1)]
        assert (item["question"], item["who"]) == (texts_of(example.question)[1], ["b", "base", "a"])
        assert item["texts"] == texts and item_later["texts"] == [texts[0], "red", texts[1]]
        assert item_later["who"] == sides.split()
        (shown,), (path,) = item["images"], example.images
        assert content["pictures"][shown].convert("RGB").tobytes() == open_image(path).tobytes()
    Path(path).unlink()  # its question is left out
    assert "holds 6 answers to 5 questions" in run(compare, f"{line} {theirs} b --to 4.html", 2)


def benchmark(name):
    """Write two questions of a benchmark into q.json -> their answers, as its scorer reads them."""
    questions, answers = zip(form(name, 1, text="Is it?", said="Yes."), form(name, 1, text="Why?"))
    write(Path("q.json"), questions)
    return answers


@NO_MODEL
@pytest.mark.parametrize("name", ["amber", "pope", "mmhal", "objhal"])
def test_page_of_a_benchmark_and_files_of_answers(name, run):
    """Files of answers, of each scorer's own form, need no model; one answer is empty."""
    write(Path("one.json"), answers := benchmark(name))
    write(Path("two.jsonl"), "\n".join(map(json.dumps, answers)).replace('""', '" Yes. "'))
    Path("images").mkdir()
    Path("1.png").rename("images/1.png")
    files = "one.json ./one.json two.jsonl"
    line = f"--benchmark {name} --data q.json --images images --to page.html --adapter {files}"
    write(Path("last.json"), answers[1:])  # of a sample of one, which seed 0 draws
    error = run(compare, f"{line} --limit 1".replace("one.", "last."), 2)
    assert "two.jsonl: cannot be compared: holds 2 answers to 1 questions" in error
    assert "2 questions, 1 of them with equal answers" in run(compare, line)
    content = content_of("page.html")
    rows = [(item["question"], *item["texts"], item["equal"]) for item in content["items"]]
    assert rows == [("Is it?", *["Yes."] * 3, True), ("Why?", "", "", "Yes.", False)]
    assert content["items"][1]["id"] == ("1001" if name == "amber" else "2")  # the benchmark's, or its place
    assert content["pictures"][0].format == "PNG"


REFUSED = {  # what is said: what is compared
    "--adapter takes two or more of": "good.json",
    "all different": "good.json mute.json good.json",
    "--model is needed": "good.json base",
    "none.json: cannot be compared: holds 0 answers": "good.json none.json",
    "answer 1 is one to another question": "good.json swapped",
    "answer 2 is one to another question": "good.json prompted",
    "answer 1 has no text in a field answer or": "good.json mute.json",
    "none: holds no adapter": f"base none --model {BASE}",
    "--no-image is for pairs": "good.json mute.json --no-image",
}


@NO_MODEL
@pytest.mark.parametrize("message", REFUSED)
def test_wrong_commands_are_refused_before_a_model_is_read(message, run):
    """Answers stand beside wrong questions."""
    answers = benchmark("pope")
    for name, content in {
        "good.json": answers, "swapped": answers[::-1], "mute.json": [{"id": 1}] * 2, "none.json": [],
        "prompted": [answers[0], {"prompt": "Who?", "text": "I."}],
    }.items():  # fmt: skip
        write(Path(name), content)
    line = f"--benchmark pope --images . --to page.html --data q.json --adapter {REFUSED[message]}"
    assert message in run(compare, line, 2)
    assert not [*Path().glob("page*")]


def bracketed(pieces):
    return "".join(f"[{text}]" * differs or text for text, differs in pieces)


def test_what_differs_is_marked():
    """By hand: what the other text lacks, the first one's being the second, and the others' the first."""
    found = compare.marked("a red circle and a ring.", "a blue circle.")
    assert bracketed(found) == "a [red] circle[ and a ring]." and compare.marked("", "x") == []
    text, long = "  two\n lines, <b>é</b> ", "a ring " * 200
    assert "".join(piece for piece, _ in compare.marked(text, "other lines")) == text
    assert compare.marked(text, text) == [(text, False)]
    assert compare.marked(f"red {long}", long) == [("red ", True), (long, False)]
    (item,) = make(["Why?"], {"a": ["red"], "b": ["blue"], "c": ["red"]})["items"]
    assert [*map(bracketed, item["answers"])] == ["[red]", "[blue]", "red"]


NASTY = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\"> DATA &amp;"


def make(texts, said, blind=False, images=("1.png",)):
    """What a page of questions about the same images and of {name: answers} holds."""
    questions = [Example(text, "", "", images, id=str(i)) for i, text in enumerate(texts)]
    return content_of(write(Path("page.html"), compare.make_page(questions, said, blind)))


def test_no_text_can_end_the_script_that_holds_it():
    """A model that answers in HTML would write into the page; votes of one page would show up in another."""
    content = make([NASTY], {NASTY: [NASTY], "b": ["x"]})
    text = content["page"]
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<img" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//", text.partition("<script type")[0]), "the page needs no network"
    (item,) = content["items"]
    assert item["question"] == item["texts"][0] == item["who"][0] == NASTY
    assert make([NASTY], {NASTY: [NASTY], "b": ["y"]})["id"] != content["id"]


def test_large_images_are_made_smaller_and_one_image_is_kept_once():
    """Photographs of 5 MB make a page that no phone opens; 14,000 questions about 1,000 images as well."""
    Image.new("RGB", (3000, 1500)).save("large.png")
    content = make(["Why?", "Who?"], dict.fromkeys("ab", "xy"), images=("large.png", "1.png"))
    assert [item["images"] for item in content["items"]] == [[0, 1]] * 2
    shown, _ = content["pictures"]
    assert shown.size == (512, 256) and shown.format == "JPEG"


def test_blind_pages_shuffle_and_hide_names():
    """A rater who sees the name, or finds the better one on the right, votes for it. Of 60 questions 30 -+ 15
    stand on either side (four standard deviations). Three models meet in pairs."""
    said = {"tuned": [f"t says {i}" for i in range(60)], "unchanged": [f"u says {i}" for i in range(60)]}
    content = make(questions := [f"Why {i}?" for i in range(60)], said, blind=True)
    assert not re.search("tuned|unchanged", content["page"])
    assert make(questions, said, blind=True)["page"] == content["page"]  # the same answers give the same page
    items = content["items"]
    order = [int(item["id"]) for item in items]
    assert order != sorted(order) == [*range(60)]
    for i, item in zip(order, items):
        assert item["models"] == [*said] and item["question"] == f"Why {i}?"
        assert sorted(item["texts"]) == [f"t says {i}", f"u says {i}"]
        assert item["texts"][0][0] == item["left"][0]
    assert 15 <= [item["left"] for item in items].count("tuned") <= 45
    three = make(["Why?", "Who?"], dict.fromkeys("abc", "xy"), blind=True)
    assert sorted("".join(item["models"]) for item in three["items"]) == ["ab", "ab", "ac", "ac", "bc", "bc"]


def votes(file, page, rater, cast, models="AB"):
    """Write a file of votes. cast: the item, the name on the left and the vote of each."""
    cast = [dict(zip(("item", "left", "vote"), one.split()), models=[*models]) for one in cast.split(", ")]
    write(Path(file), {"page": page, "rater": rater, "votes": cast})


COUNTED = """A against B: 5 questions, 6 votes
 win 50.0% 17.0% to 83.0%
 tie 20.0% 3.6% to 62.4%
 lose 30.0% 7.3% to 70.1%
A against C: 1 questions, 1 votes
 win 100.0% 20.7% to 100.0%
 tie 0.0% 0.0% to 79.3%
 lose 0.0% 0.0% to 79.3%
"""


def test_votes_are_counted_by_hand(run):
    """Fig. 4 upside down, or votes of one question taken for many questions. By hand, for A: question 0 is
    won by rater 1 and lost by rater 2, 1 and 2 are won, 3 is a tie, and question 0 of another page is lost.
    Win (.5 + 1 + 1) / 5, tie 1 / 5, lose 1.5 / 5. The intervals are the roots p of (share - p)^2 = 3.8415
    p (1 - p) / n. Two downloads of a rater that say the same count once; of others, one has to be chosen."""
    votes("1", "p", "1", "0 A left, 1 B right, 2 A left, 3 B same")
    votes("2", "p", "2", "0 A right")
    votes("3", "q", "1", "0 B left", models="BA")
    votes("4", "r", "1", "0 A left", models="AC")
    shutil.copy("1", "5")
    votes("6", "p", "1", "0 A right")
    assert re.sub(" +", " ", run(compare, "--votes 1 2 3 4 5")) == COUNTED
    write(Path("q.json"), [])
    votes("up", "p", "1", "0 A up")
    for files, message in {
        "1 2 6": "6: cannot be counted: is of the rater and page of 1: give the last alone",
        "q.json": "is not in a known form", "up": "has no 'up'", "none": "No such file", "": "--votes",
    }.items():  # fmt: skip
        assert message in run(compare, f"--votes {files}", 2)


RATER = """
const keys = {left: "ArrowLeft", right: "ArrowRight", same: "s"}, other = {left: "right", right: "left"};
const press = (to, more) => document.dispatchEvent(new KeyboardEvent("keydown", {key: keys[to], ...more}));
const better = () => texts("section p")[0].length > texts("section p")[1].length ? "left" : "right";
URL.createObjectURL = blob => { found.file = blob.text(); return "blob:x"; };
HTMLAnchorElement.prototype.click = function () { found.name = this.download; };
function reopen() {
  const again = document.createElement("script");
  again.textContent = `{${document.querySelectorAll("script")[1].textContent}}`;
  document.body.append(again);
}
Object.assign(found, {title: document.title, question: texts("h2")[0], heads: texts("h3"), counts: []});
found.shown = document.body.innerText;
for (const image of document.images) await image.decode();
await new Promise(resolve => setTimeout(resolve));  // onload comes first
found.images = Array.from(document.images, image => `${image.naturalWidth} ${image.className}`);
for (const step of [
  () => [{repeat: true}, {ctrlKey: true}, {altKey: true}, {metaKey: true}].map(held => press("left", held)),
  () => press(other[better()]),  // wrong, corrected below
  () => [click(`[name=${better()}]`), reopen()],
  () => press("same"),
  () => [1, 2, 3].map(() => click("#back")),
  () => [found.pressed = texts("[aria-pressed=true]"), press(better())],
  () => click(`[name=${better()}]`),
  () => click("#next"),
  () => click("#download"),
  () => { Storage.prototype.setItem = () => { throw Error("full"); }; press("same"); },
]) step(), found.counts.push(texts("#count")[0]);
Object.assign(found, {file: await found.file, kept: Object.keys(localStorage)});
found.sent = performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5));
"""
LOOK = """<script>
const texts = selector => Array.from(document.querySelectorAll(selector), element => element.textContent);
const click = selector => document.querySelector(selector).click(), found = {};
(async () => {SCRIPT})().catch(error => found.error = String(error)).then(() => {
  document.documentElement.dataset.found = encodeURIComponent(JSON.stringify(found));
});
</script></html>"""


def look(script):
    """What the script finds on the page, in a browser."""
    chromium = [*filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))]
    if not chromium:
        pytest.skip("not tried in a browser: apt-get install chromium")
    page = Path("page.html").resolve()
    write(page, page.read_text().replace("</html>", LOOK.replace("SCRIPT", script)))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --virtual-time-budget=10000 --dump-dom"
    for profile in "abcde":  # its clock runs ahead of decoding: on a busy machine it may stop too early
        command = [chromium[0], *flags.split(), f"--user-data-dir={page.parent / profile}", page.as_uri()]
        shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
        if shown := re.search('data-found="(.*?)"', shown):
            break
    found = json.loads(unquote(shown[1]))
    assert "error" not in found
    return found


SIDES = """
const shown = () => Array.from(document.querySelectorAll("article"), one => one.offsetHeight > 0);
Object.assign(found, {heads: texts("h3"), said: texts("section p"), marks: texts("mark"), all: shown()});
click("#filter");
Object.assign(found, {choice: texts("#choice"), differ: shown()});
found.hidden = document.querySelector("#voting").hidden;
"""


def test_an_open_page_says_who_said_what_and_where_they_differ():
    """An answer under another's name. A reader of 1,000 questions looks for the ones whose answers differ."""
    make(["Why?", "Who?", "How?"], {"<b>": ["red", "a ring", "so"], "base": ["red", "", "so"]})
    assert look(SIDES) == {
        "heads": ["<b>", "base"] * 3, "said": ["red", "red", "a ring", "(no answer)", "so", "so"],
        "marks": ["a ring"], "choice": [" only where answers differ: 1 of 3"], "hidden": True,
        "all": [True, True, True], "differ": [False, True, False],
    }  # fmt: skip


def test_votes_are_cast_kept_downloaded_and_counted(run):
    """A rater's hour is lost, or counts for the other model. This one prefers the longer answer, the tuned
    model's, calls the third the same, and corrects the first. A key held down, or the browser's, is none."""
    said = {"tunéd": [f"{NASTY} and more {i}" for i in range(4)], "base": ["", "b", "c", "d"]}
    content = make([f"{i}: {NASTY}" for i in range(4)], said, blind=True)
    found = look(RATER)
    assert found["title"] == "Answers side by side" and found["images"] == ["8 small"]
    assert found["heads"] == ["left", "right"] and NASTY in found["question"]
    assert not re.search("tunéd|base", found["shown"])
    assert found["counts"] == [
        "1/4, voted 0", "2/4, voted 1", "3/4, voted 2", "4/4, voted 3", "1/4, voted 3", "4/4, voted 3",
        "4/4, voted 4", "1/4, voted 4", "1/4, voted 4",
        "1/4, voted 4; this browser keeps no votes: download them before you leave",
    ]  # fmt: skip
    assert found["kept"] == [f"votes {content['id']}"]
    assert len(found["pressed"]) == 1 and {*found["sent"]} <= {"data:", "blob:"}
    assert re.fullmatch(r"votes-\w+-[\w-]+\.json", found["name"])
    assert sorted(vote["id"] for vote in json.loads(found["file"])["votes"]) == [*"0123"]
    write(Path("votes.json"), found["file"])
    counted = "tunéd against base: 4 questions, 4 votes win 75.0% 30.1% to 95.4% tie 25.0% 4.6% to 69.9% lose"
    assert " ".join(run(compare, "--votes votes.json").split()).startswith(counted)
