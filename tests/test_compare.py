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
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import peft
import pytest
import torch
from PIL import Image

import train
from data import BadInput, Example, open_image, read_examples, run_command
from examples import answer, compare, evaluate, shapes
from test_mdpo import ROOT, write
from tests.test_benchmarks import drawn, form

BASE = ROOT / "examples" / "base"


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch, capsys):
    """A function: script, command line, exit status -> what it prints. All happens in the test's folder."""
    monkeypatch.chdir(tmp_path)
    Path("1.png").write_bytes(drawn(10))

    def run(script, line, status=0):
        assert run_command(script.run, line.split()) == status
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def stub(monkeypatch):
    """No weights: an answer says which adapter was on, the question, the numbers of images and new tokens."""
    model = SimpleNamespace()

    def speaking_as(model, number):
        model.on = number
        return nullcontext()

    def say(model, processor, questions, limit, *more, **options):
        return [f"{model.on}: {text} {len(images)} {limit}" for images, text in questions]

    monkeypatch.setattr(answer, "load_tuned", lambda *given: (model, None))
    monkeypatch.setattr(answer, "read_adapter", lambda adapter: None)
    monkeypatch.setattr(answer, "speaking_as", speaking_as)
    monkeypatch.setattr(answer, "generate_answers", say)
    return model


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be asked of a model."""
    for name in "load_model", "generate_answers":
        monkeypatch.setattr(answer, name, lambda *given: pytest.fail("a model is read or asked"))


@torch.no_grad()
def logits_of(model, processor):
    return model(**processor(text="What is it?", return_tensors="pt")).logits


def test_each_adapter_of_several_speaks_as_if_it_were_alone(bunny):
    """An answer under another adapter's name. Expected: each loaded by itself, into a model of its own."""
    bunny = str(bunny)
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
    """The paper's Figure 3: a question, then the base's answer and each adapter's, about all images."""
    line = f"--model {BASE} --image 1.png 1.png --question Why? Where? --adapter a bcd --max-new-tokens 9"
    expected = "{0}\nbase: None: {0} 2 9\na:    0: {0} 2 9\nbcd:  1: {0} 2 9\n"
    assert run(answer, line) == expected.format("Why?") + expected.format("Where?")


UPPER = [f"WHY {i}?" for i in range(5)]


def keep(ask):
    """Answers by a file: five questions in batches of two."""
    questions = [Example(f"Why {i}?", "", "", ()) for i in range(5)]
    return answer.answer_all("new/a.jsonl", {"model": "m"}, questions, ask, 2)


def said_in(path):
    return [json.loads(line)["answer"] for line in Path(path).read_text().splitlines()[1:]]


def test_answers_are_kept_as_they_come_and_gone_on_with():
    """A kill after three hours must not cost three hours. The second batch ends in a kill. The file ends in
    half a line, as of a full disk. A file is left as it is if it is the user's own, or if two commands wrote
    into it at once: each answer would stand at another's question."""
    asked, path = [], Path("new/a.jsonl")

    def ask(batch):
        asked.append([text.upper() for _, text in batch])
        if len(asked) == 2:
            assert said_in(path) == UPPER[:2]  # already there
            raise KeyboardInterrupt
        return asked[-1]

    with pytest.raises(KeyboardInterrupt):
        keep(ask)
    path.write_text(path.read_text() + '{"question": "Why 2?", "ans')
    assert keep(ask) == UPPER == said_in(path) == keep(pytest.fail)
    assert asked == [UPPER[:2], UPPER[2:4], UPPER[2:4], UPPER[4:]]
    first, *lines = path.read_text().splitlines(keepends=True)
    for content in "my notes", "my notes\nof today\n", '{"a": 1}\n', "".join([first, *lines[:1], *lines[:2]]):
        path.write_text(content)
        with pytest.raises(BadInput, match="a.jsonl: cannot go on: "):
            keep(pytest.fail)
        assert path.read_text() == content


BETTER = """
6 examples: means, and bootstrap intervals of level 95%
base; answers, words 1.0000; answers, refusals 0.0000
a; loss 25.0000; rewards/margins 25.0000; margin, image 25.0000; margin, no image 25.0000; \
margin, other image 25.0000; answers, words 2.5000; answers, refusals 0.1667
b, scored as a; loss 24.5000; rewards/margins 12.5000; margin, image 12.5000; margin, no image 12.5000; \
margin, other image 12.5000; answers, words 2.0000; answers, refusals 0.1667
a minus base; answers, words 1.5000; answers, refusals 0.1667; answers, equal 0.5000
b minus base; answers, words 1.0000; answers, refusals 0.1667; answers, equal 0.5000
b minus a; loss -0.5000; rewards/margins -12.5000; margin, image -12.5000; margin, no image -12.5000; \
margin, other image -12.5000; answers, words -0.5000; answers, refusals 0.0000; answers, equal 0.6667
"""


def test_differences_are_taken_example_by_example(stub, run, monkeypatch):
    """Unpaired, the spread of the examples drowns a difference that each of them shows: of losses 0, 10, ...,
    50 the second adapter's are 0.5 lower, and its margins half of the first's. Words, refusals and equal
    answers are counted by hand."""
    write(Path("a/args.json"), {"beta": 0.3, "no_conditional": True})
    said = {
        None: ["red"] * 6,
        0: ["red"] * 3 + ["it is all red"] * 2 + ["there is no ring"],
        1: ["red"] * 3 + ["it is all red"] + ["there is no red", "blue"],
    }

    def score(*given, **options):
        losses = [10.0 * i - 0.5 * stub.on for i in range(6)]
        return {"loss": losses, "rewards/margins": [10.0 * i / (1 + stub.on) for i in range(6)]}

    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(answer, "generate_answers", lambda *given: said[stub.on])
    line = f"--model {BASE} --data {shapes.write_pairs(Path('data'), 6)} --adapter"
    out = run(evaluate, f"{line} b")
    assert "b: has no args.json; train.py's defaults are taken" in out and "minus" not in out
    out = run(evaluate, f"{line} a b --answers said")
    assert BETTER in re.sub(r"\n  (.*?)  +(\S+).*", r"; \1 \2", out)
    assert re.search(r"loss +-0.5000 +-0.5000 to -0.5000", out)
    assert sorted(map(said_in, Path("said").iterdir())) == sorted(said.values())
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)
    assert run(evaluate, f"{line} a b --answers said") == out  # asks nothing again


def test_a_run_is_read_as_it_was_trained():
    """Scored with another beta, crop or anchor than trained."""
    defaults = vars(evaluate.read_run("a"))
    assert defaults["loss"] == "mdpo_loss" and defaults["beta"] == 0.1 and defaults["conditional"]
    began = {"beta": 0.3, "delta": -1e-05, "crop": [0.3, 0.6], "anchors": ["rejected"], "loss": "chip_loss"}
    began |= {"warmup": 0.0}
    write(Path("a/args.json"), began)
    assert vars(evaluate.read_run("a")) == defaults | began


def test_refusals_are_told_by_their_words():
    """The share of refusals is how a model that refuses all looks better than it is."""
    refusals = ["There is no dog in the picture.", "I'm sorry, but I can't see.", "It does not show a cat."]
    found = evaluate.measure([*refusals, "It cannot be red.", "A notable ring, therefore blue.", ""])
    assert found == {"answers, words": [7, 6, 6, 4, 5, 0], "answers, refusals": [1, 1, 1, 0, 0, 0]}


def content_of(path):
    """What the page holds; the texts of the answers as `texts`, their pictures as `pictures`."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text())
    content = json.loads(data[1])
    for item in content["items"]:
        item["texts"] = ["".join(text for text, _ in pieces) for pieces in item["answers"]]
    files = [io.BytesIO(base64.b64decode(uri.partition("base64,")[2])) for uri in content["images"]]
    return content | {"pictures": [*map(Image.open, files)]}


def test_page_of_base_and_adapters_and_of_an_earlier_pages_answers(stub, run, monkeypatch):
    """Each answer under its own name, beside its own question and image. A file of answers says itself which
    questions and images it is about."""
    sides = ["b", "base", "a"]
    pairs, other = (shapes.write_pairs(Path(f"data{seed}"), 6, seed=seed) for seed in (0, 1))
    line = f"--model {BASE} --max-new-tokens 9 --data {pairs} --adapter b base a --to"
    assert "1.html: 6 questions, 0 of them with equal" in run(compare, f"{line} 1.html")
    monkeypatch.setattr(answer, "generate_answers", pytest.fail)  # each model has answered once
    assert "already exists" in run(compare, f"{line} 1.html", 2)
    run(compare, f"{line} 2.html --answers 1-answers")
    assert Path("2.html").read_text() == Path("1.html").read_text()
    theirs = write(Path("theirs.json"), [{"answer": "red"}] * 6)
    line = f"--adapter {theirs} 1-answers/base.jsonl --to 3.html --data"
    assert "holds answers of other questions, images: " in run(compare, f"{line} {other}", 2)
    run(compare, f"{line} {pairs}")
    content, later = content_of("1.html"), content_of("3.html")
    assert not content["blind"]
    for item, item_later, example in zip(content["items"], later["items"], read_examples(pairs), strict=True):
        # As they stand in the command: the adapter that it names first is load_tuned's first.
        texts = [f"{on}: {example.question} 1 9" for on in (0, None, 1)]
        assert (item["question"], item["who"], item["texts"]) == (answer.text_of(example), sides, texts)
        assert item_later["texts"] == ["red", texts[1]]
        (shown,), (path,) = item["images"], example.images
        assert content["pictures"][shown].convert("RGB").tobytes() == open_image(path).tobytes()


def benchmark(name):
    """Two questions of a benchmark, and their answers as its scorer reads them."""
    return zip(form(name, 1, text="Is it?", said="Yes."), form(name, 1, text="Why?", said=""))


@pytest.mark.parametrize("name", ["amber", "pope", "mmhal", "objhal"])
def test_page_of_a_benchmark_and_files_of_answers(name, no_model, run):
    """Files of answers need no model. JSON or JSON lines, under each scorer's own field; one answer is
    empty."""
    questions, answers = benchmark(name)
    write(Path("q.json"), questions)
    write(Path("one.json"), answers)
    write(Path("two.jsonl"), "\n".join(map(json.dumps, answers)).replace('""', '"Yes."'))
    line = f"--benchmark {name} --data q.json --images . --to page.html --adapter one.json two.jsonl"
    assert "2 questions, 1 of them with equal answers" in run(compare, line)
    content = content_of("page.html")
    rows = [(item["question"], *item["texts"], item["equal"]) for item in content["items"]]
    assert rows == [("Is it?", "Yes.", "Yes.", True), ("Why?", "", "Yes.", False)]
    assert content["pictures"][0].format == "PNG"


OF = "--benchmark pope --images . --to page.html --data"
REFUSED = [  # script, command line, what is said
    (answer, f"--model {BASE} --question Why? What<image>is?", "holds the image token '<image>'"),
    (evaluate, f"--model {BASE} --data x --answers new --adapter a a/", "different runs"),
    (evaluate, f"--model {BASE} --data x --answers new --adapter a+b a-b", "one file"),
    (evaluate, f"--model {BASE} --data x --answers new --adapter a base", "one file"),
    (evaluate, f"--model {BASE} --data x --adapter big", "big/args.json: argument --beta: invalid float"),
    (compare, f"{OF} q.json --adapter good.json", "--adapter takes two or more of"),
    (compare, f"{OF} q.json --adapter good.json mute.json good.json", "all different"),
    (compare, f"{OF} q.json --adapter good.json base", "--model is needed"),
    (compare, f"{OF} q.json --adapter good.json short", "short: cannot be compared: holds 1 answers to 2"),
    (compare, f"{OF} q.json --adapter good.json swapped", "answer 1 is one to another question"),
    (compare, f"{OF} q.json --adapter good.json mute.json", "answer 1 has no text in a field answer or"),
    (compare, f"{OF} q.json --model {BASE} --adapter base none", "none: holds no adapter"),
    (compare, "--votes first again", "again: cannot be counted: is of the rater and page of first"),
    (compare, "--votes q.json", "is not in a known form"),
    (compare, "--votes up", "has no 'up'"),
    (compare, "--votes none", "none: cannot be counted: no such file"),
    (compare, "--votes", "--votes"),
]


@pytest.mark.parametrize("script, line, message", REFUSED)
def test_wrong_commands_are_refused_before_a_model_is_read(script, line, message, no_model, run):
    """A run minus itself is a table of zeros. Of two runs in one file of answers one would have the other's.
    Answers stand beside the wrong questions. A rater who downloads twice counts twice."""
    questions, answers = benchmark("pope")
    for name, content in {
        "q.json": questions, "good.json": answers, "short": answers[:1], "swapped": answers[::-1],
        "mute.json": [{"id": 1}] * 2, "big/args.json": {"beta": "big"},
    }.items():  # fmt: skip
        write(Path(name), content)
    for name, cast in ("first", "0 A left"), ("again", "0 A left"), ("up", "0 A up"):
        votes(name, "p", "1", cast)
    assert message in run(script, line, 2)
    assert not Path("page.html").exists() and not Path("new").exists()


def test_what_differs_is_marked():
    """By hand: the words that the other text lacks, and nothing else; all pieces together are the text."""
    found = compare.marked("a red circle and a ring.", "a blue circle.")
    assert "".join(f"[{text}]" * mark or text for text, mark in found) == "a [red] circle[ and a ring]."
    assert compare.marked("same", "same") == [("same", False)] and compare.marked("", "x") == []
    text = "  two\n lines, <b>é</b> "
    assert "".join(piece for piece, _ in compare.marked(text, "other lines")) == text


NASTY = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\"> DATA &amp;"


def make(texts, said, blind=False):
    """A page of questions about one picture, and {name: answers}."""
    questions = [Example(text, "", "", ("1.png",), id=str(i)) for i, text in enumerate(texts)]
    (page := Path("page.html").resolve()).write_text(compare.make_page(questions, said, blind), "utf-8")
    return page


def test_no_text_can_end_the_script_that_holds_it():
    """A model that answers in HTML would write into the page. The id changes with each text: votes of one
    page must not show up in another."""
    page = make([NASTY], {NASTY: [NASTY], "b": ["x"]})
    text, content = page.read_text(), content_of(page)
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<img" not in text
    assert not re.search(r"https?:|//", text.partition("<script type")[0]), "the page needs no network"
    (item,) = content["items"]
    assert item["question"] == item["texts"][0] == item["who"][0] == NASTY
    assert content_of(make([NASTY], {NASTY: [NASTY], "b": ["y"]}))["id"] != content["id"]


def test_large_images_are_made_smaller_and_one_image_is_kept_once():
    """Photographs of 5 MB make a page that no phone opens; 14,000 questions about 1,000 images as well."""
    Image.new("RGB", (3000, 1500)).save("large.png")
    questions = [Example("Why?", "", "", images) for images in (("large.png",), ("large.png", "1.png"))]
    page = write(Path("page.html"), compare.make_page(questions, {"a": ["x", "y"], "b": ["x", "y"]}))
    content = content_of(page)
    assert [item["images"] for item in content["items"]] == [[0], [0, 1]]
    shown, _ = content["pictures"]
    assert shown.size == (512, 256) and shown.format == "JPEG"


def who_of(item):
    """The two models, and the one on the left."""
    return json.loads(base64.b64decode(item["who"]))


def test_blind_pages_shuffle_and_hide_names():
    """A rater who sees the name, or who finds that the better one stands on the right, votes for it. Of 60
    questions 30 -+ 15 stand on either side (four standard deviations), and not in the order of the file.
    Three models meet in pairs."""
    said = {name: [f"{name[0]} says {i}" for i in range(60)] for name in ("tuned", "unchanged")}
    page, lefts = make([f"Why {i}?" for i in range(60)], said, blind=True), []
    assert not re.search("tuned|unchanged", page.read_text())
    items = content_of(page)["items"]
    order = [int(item["id"]) for item in items]
    assert order != sorted(order) == [*range(60)]
    for i, item in zip(order, items):
        models, left = who_of(item)
        right = models[models.index(left) - 1]
        assert models == [*said] and item["question"] == f"Why {i}?"
        assert item["texts"] == [said[left][i], said[right][i]]
        lefts.append(left)
    assert 15 <= lefts.count("tuned") <= 45
    three = content_of(make(["Why?", "Who?"], dict.fromkeys("abc", "xy"), blind=True))
    met = sorted(who_of(item)[0] for item in three["items"])
    assert met == [["a", "b"], ["a", "b"], ["a", "c"], ["a", "c"], ["b", "c"], ["b", "c"]]


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
    """Fig. 4 upside down, or the votes of many raters of one question taken for many questions. By hand, for
    A: question 0 is won by rater 1 and lost by rater 2, 1 and 2 are won, 3 is a tie, and question 0 of
    another page, which names the models in the other order, is lost. Win (.5 + 1 + 1) / 5, tie 1 / 5, lose
    1.5 / 5. The intervals are the roots p of (share - p)^2 = 3.8415 p (1 - p) / n."""
    votes("1", "p", "1", "0 A left, 1 B right, 2 A left, 3 B same")
    votes("2", "p", "2", "0 A right")
    votes("3", "q", "1", "0 B left", models="BA")
    votes("4", "r", "1", "0 A left", models="AC")
    assert re.sub(" +", " ", run(compare, "--votes 1 2 3 4")) == COUNTED


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RATER = """
const texts = selector => Array.from(document.querySelectorAll(selector), element => element.textContent);
const keys = {left: "ArrowLeft", right: "ArrowRight", same: "s"}, other = {left: "right", right: "left"};
const press = (to, more) => document.dispatchEvent(new KeyboardEvent("keydown", {key: keys[to], ...more}));
const click = selector => document.querySelector(selector).click();
const better = () => texts("section p")[0].length > texts("section p")[1].length ? "left" : "right";
const found = {counts: [], images: []};
URL.createObjectURL = blob => { found.file = blob.text(); return "blob:x"; };
HTMLAnchorElement.prototype.click = function () { found.name = this.download; };
function reopen() {
  const again = document.createElement("script");
  again.textContent = `{${document.querySelectorAll("script")[1].textContent}}`;
  document.body.append(again);
}
const steps = [
  () => [{repeat: true}, {ctrlKey: true}, {altKey: true}, {metaKey: true}].map(held => press("left", held)),
  () => press(other[better()]),  // wrong, corrected below
  () => [click(`[name=${better()}]`), reopen()],
  () => press("same"),
  () => [1, 2, 3].map(() => click("#back")),
  () => [found.pressed = texts("[aria-pressed=true]"), press(better())],
  () => click(`[name=${better()}]`),
  () => click("#next"),
  () => click("#download"),
];
async function rate() {
  Object.assign(found, {title: document.title, question: texts("h2")[0], heads: texts("h3")});
  found.shown = document.body.innerText;
  for (const image of document.images) await image.decode().then(() => found.images.push(image.naturalWidth));
  for (const step of steps) step(), found.counts.push(texts("#count")[0]);
  found.file = await found.file;
  found.sent = performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5));
}
rate().catch(error => found.error = String(error)).then(() => {
  document.documentElement.dataset.found = encodeURIComponent(JSON.stringify(found));
});
"""


@pytest.mark.skipif(not CHROMIUM, reason="the page was not tried in a browser: apt-get install chromium")
def test_votes_are_cast_kept_downloaded_and_counted(run):
    """A rater's hour is lost, or counts for the other model. The rater here prefers the longer answer, which
    is always the tuned model's, calls the third the same, and corrects the first vote; by keys and buttons,
    with the page opened again in between. A key that is held down, or that is the browser's, is no vote."""
    said = {"tunéd": [f"{NASTY} and more {i}" for i in range(4)], "base": ["", "b", "c", "d"]}
    page = make([f"{i}: {NASTY}" for i in range(4)], said, blind=True)
    page.write_text(page.read_text("utf-8").replace("</html>", f"<script>{RATER}</script></html>"), "utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --virtual-time-budget=10000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(unquote(re.search('data-found="(.*?)"', shown)[1]))
    assert "error" not in found and found["title"] == "Answers side by side" and found["images"] == [8]
    assert found["heads"] == ["left", "right"] and NASTY in found["question"]
    assert not re.search("tunéd|base", found["shown"])
    counts = "1/4, voted 0; 2/4, voted 1; 3/4, voted 2; 4/4, voted 3; 1/4, voted 3; 4/4, voted 3; "
    assert "; ".join(found["counts"]) == counts + "4/4, voted 4; 1/4, voted 4; 1/4, voted 4"
    assert len(found["pressed"]) == 1 and {*found["sent"]} <= {"data:", "blob:"}
    assert re.fullmatch(r"votes-\w+-[\w-]+\.json", found["name"])
    assert sorted(vote["id"] for vote in json.loads(found["file"])["votes"]) == ["0", "1", "2", "3"]
    write(Path("votes.json"), found["file"])
    counted = "tunéd against base: 4 questions, 4 votes win 75.0% 30.1% to 95.4% tie 25.0% 4.6% to 69.9% lose"
    assert " ".join(run(compare, "--votes votes.json").split()).startswith(counted)
