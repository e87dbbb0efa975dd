"""Answers of several models side by side on one page; blind votes, and who wins (the paper's Figure 4).

    python examples/compare.py --model M --adapter base RUN --data FILE --to page.html [--blind]
    python examples/compare.py --model M --adapter RUN ANSWERS --benchmark amber --data FILE --to page.html
    python examples/compare.py --votes votes.json ...

ANSWERS is a file of answers, of an earlier page or of a benchmark. FILE holds pairs as for training, or is the
benchmark's own. With --blind the page shows two models at a time, in random order; its source encodes their names.
"""

import base64
import io
import json
import os
import random
import re
import statistics
import sys
from collections import defaultdict
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, about, read_examples, run_command
from examples import answer, benchmarks, evaluate
from train import Parser, load_processor, replacing, sha256, whole


def marked(text, other):
    """-> [(piece of the text, whether the other text lacks it)]"""
    words, others = (re.findall(r"\w+|\s+|[^\w\s]", words) for words in (text, other))
    blocks = SequenceMatcher(None, words, others, autojunk=False).get_opcodes()
    return [("".join(words[a:b]), kind != "equal") for kind, a, b, _, _ in blocks if a < b]


def data_uri(image):
    """A path, or the bytes of an image file -> a data URI of the image; a large one is made smaller."""
    image = answer.opened(image)
    image.thumbnail((512, 512))
    kind = "PNG" if max(image.size) <= 256 else "JPEG"  # a drawing of few pixels stays sharp
    image.save(file := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def make_page(questions, said, blind=False):
    """`Example`s and {name: answers} -> the page's HTML. Blind: two names at a time, in random order."""
    images = [*dict.fromkeys(image for question in questions for image in question.images)]  # each once
    items, rng = [], random.Random(json.dumps(said))
    for number, question in enumerate(questions):
        of_one = [*map(images.index, question.images)]
        asked = {"id": question.id, "question": answer.text_of(question), "images": of_one}
        for names in combinations(said, 2) if blind else [tuple(said)]:
            shown = rng.sample(names, 2) if blind else names
            texts = [said[name][number] for name in shown]
            against = [texts[1], *[texts[0]] * (len(texts) - 1)]  # what each is marked against
            pieces = [marked(text, other) for text, other in zip(texts, against)]
            who = base64.b64encode(json.dumps([names, shown[0]]).encode()).decode() if blind else names
            items.append(asked | {"who": who, "answers": pieces, "equal": len({*texts}) == 1})
    if blind:
        rng.shuffle(items)  # a rater who stops early has seen a fair sample
    content = {"blind": blind, "images": [*map(data_uri, images)], "items": items}
    content["id"] = sha256(content)[:12]
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    return page.replace("DATA", json.dumps(content).replace("<", "\\u003c"))  # no text ends its script


def count_votes(paths):
    """Print win, tie and lose: means over questions of the share of votes, and Wilson's intervals of level 95%."""
    results = defaultdict(lambda: defaultdict(dict))  # [model, other][question][rater]: 1 if the model wins, 0 or -1
    files = {}  # [page, rater]: path and content
    for path in paths:
        with about(f"{path}: cannot be counted"):
            record = json.loads(Path(path).read_text("utf-8"))
            earlier, content = files.setdefault((record["page"], record["rater"]), (path, record))
            if content != record:
                raise BadInput(f"is of the rater and page of {earlier}: give the last alone")
            for vote in record["votes"]:
                model, other = vote["models"]
                won = {"left": 1, "same": 0, "right": -1}[vote["vote"]] * {model: 1, other: -1}[vote["left"]]
                pair, won = ((other, model), -won) if (other, model) in results else ((model, other), won)
                results[pair][record["page"], vote["item"]][record["rater"]] = won
    for (model, other), questions in results.items():
        votes = [[*of_one.values()] for of_one in questions.values()]
        print(f"{model} against {other}: {len(votes)} questions, {sum(map(len, votes))} votes")
        for title, won in ("win", 1), ("tie", 0), ("lose", -1):
            share = statistics.fmean(of_one.count(won) / len(of_one) for of_one in votes)
            low, high = evaluate.wilson(share, len(votes))  # raters of one question are not independent
            print(f"  {title:4} {share:7.1%} {low:7.1%} to {high:.1%}")


def run(argv):
    if argv[:1] == ["--votes"]:
        parser = Parser(description=__doc__.splitlines()[0])
        parser.add_argument("--votes", nargs="+", metavar="FILE", help="downloaded votes")
        count_votes(parser.parse_args(argv).votes)
        return 0
    text = "two or more of: base, a run's folder, a file of answers"
    parser = evaluate.make_parser(__doc__, needs_model=False, nargs="+", help=text)
    parser.epilog = "compare.py --votes FILE ... counts downloaded votes, and prints who wins."
    add = parser.add_argument
    add("--benchmark", choices=benchmarks.BENCHMARKS, help="whose questions FILE holds; without: pairs")
    add("--answers", metavar="DIR", help="where answers are kept as they come (default: PAGE-answers)")
    add("--max-new-tokens", type=whole, default=256, help="of an answer (default: 256)")
    add("--batch-size", type=whole, default=8, help="questions at a time (default: 8)")
    add("--blind", action="store_true", help="hide the names, and take votes")
    add("--to", required=True, type=Path, metavar="PAGE", help="a new page, .html")
    args = parser.parse_args(argv)
    names = [None if name == "base" else name for name in args.adapter]
    files = [name for name in names if name and Path(name).is_file()]
    models = [name for name in names if name not in files]
    if len({*names}) < max(2, len(names)):
        raise BadInput(f"--adapter takes {text}, all different")
    if models and not args.model:
        raise BadInput("--model is needed: whose answers?")
    if args.benchmark and args.no_image:
        raise BadInput("--no-image is for pairs: the questions of a benchmark are about images")
    if os.path.lexists(args.to):
        raise BadInput(f"{args.to}: already exists")
    processor = load_processor(args.model) if models else None
    if args.benchmark:
        _, questions = benchmarks.read_questions(args.benchmark, args.data, args.images, processor)
        n = min(args.limit or len(questions), len(questions))
        questions = [questions[i] for i in sorted(random.Random(0).sample(range(len(questions)), n))]
    else:
        options = {"with_images": not args.no_image, "processor": processor, "limit": args.limit}
        questions = read_examples(args.data, args.images, skip_bad=True, **options)
    said = {file: answer.read_answers(file, questions) for file in files}
    kept = answer.files_in(args.answers or args.to.with_name(f"{args.to.stem}-answers"), models)
    said |= answer.answer_as(kept, args.model, questions, args.max_new_tokens, args.batch_size, args.device)
    said = {name or "base": said[name] for name in names}  # in the order of the command
    with replacing(args.to.parent) as new:  # half a page never stays
        (new / args.to.name).write_text(make_page(questions, said, args.blind), "utf-8")
    n_equal = sum(len({*answers}) == 1 for answers in zip(*said.values()))
    print(f"{args.to}: {len(questions)} questions, {n_equal} of them with equal answers")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run, saves_memory="a lower --batch-size, or --device cpu"))
