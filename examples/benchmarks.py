"""A model's answers to AMBER, POPE, MMHal-Bench or Object HalBench, in the file that its own scorer reads.

    python examples/benchmarks.py amber --questions query_generative.json --images AMBER/image \
        --model M --adapter OUT --to amber.json

Greedy, with the system text that the adapter's run was trained with. Answers are kept in TO.partial as they come.
Questions are checked before the model is read: an empty answer to a missing image would count as no hallucination.
Nothing is fetched: download MMHal's images first. Of a yes-no question's answer, a Yes or No at its start is written.
"""

import base64
import json
import os
import re
import statistics
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Example, about, find_images, forbidden, parse_record, run_command, shown
from examples.answer import answer_as, make_parser, opened, read_items, refuse_image_tokens
from train import load_processor, replacing, whole

# What a benchmark's file calls its images and questions, and the record that its scorer reads: a function of the
# question's number, its item in the file and the answer.
AMBER = ("image", "query", lambda number, item, answer: {"id": item["id"], "response": answer})
BENCHMARKS = {
    # query_generative.json or query_discriminative*.json; AMBER's inference.py
    "amber": AMBER,
    "amber-discriminative": AMBER,
    # coco_pope_*.json, JSON lines with labels; POPE's evaluate.py reads the answers by order
    "pope": ("image", "text", lambda number, item, answer: {"question": item["text"], "answer": answer}),
    # response_template.json, whose images are URLs; MMHal's eval_gpt4.py
    "mmhal": ("image_src", "question", lambda number, item, answer: item | {"model_answer": answer}),
    # JSON lines, images in base64; RLAIF-V's eval_gpt_obj_halbench.py
    "objhal": ("image", "question", lambda number, item, answer: {
        "question_id": number, "image_id": item["image_id"], "prompt": item["question"], "text": answer,
        "model_id": "mdpo"}),
}  # fmt: skip
IDS = {"amber": range(1, 1005), "amber-discriminative": range(1005, 15_221)}
YES_NO, LINES = ("amber-discriminative", "pope"), ("objhal", "pope")  # answers are Yes or No; written as JSON lines


def yes_or_no(answer):
    word = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return word[1].capitalize() if word else answer


def report(answers, truths, positive):
    """Print how many answers are neither Yes nor No and, in percent, what POPE's and AMBER's scorers count.

    truths: "yes" or "no" for each; none: not scored. positive: "yes" in POPE, "no" in AMBER. AMBER's script rounds
    before it computes F1: its last digit may differ.
    """
    n_other = sum(answer not in ("Yes", "No") for answer in answers)
    print(f"{100 * n_other / len(answers):.1f}% are neither Yes nor No")
    if not truths:
        return
    said = [answer.lower() for answer in answers]
    if positive == "yes":
        words = [{*answer.partition(".")[0].replace(",", "").split(" ")} for answer in answers]
        said = ["no" if {"No", "no", "not"} & of_one else "yes" for of_one in words]
    hits = sum(truth == one == positive for truth, one in zip(truths, said))
    n_said, n_true = said.count(positive), truths.count(positive)
    values = {"accuracy": sum(map(str.__eq__, truths, said)) / len(said), "precision": hits / max(1, n_said),
              "recall": hits / max(1, n_true), "F1": 2 * hits / max(1, n_said + n_true),
              "yes": said.count("yes") / len(said)}  # fmt: skip
    print(", ".join(f"{name} {100 * value:.1f}" for name, value in values.items()))


def find_image(name, value, folder):
    """Base64 -> bytes; a name, or the last part of MMHal's URL -> the path of this file in the folder."""
    if "://" in value and not (name == "mmhal" and folder):
        raise BadInput(f"its image is an address, {value}: download all, and give --images")
    if name == "objhal":
        return base64.b64decode(value)
    return find_images(value.rpartition("/")[2] if name == "mmhal" else value, [Path(folder or ".")])[0]


def read_questions(name, path, folder, processor=None):
    """The items of a benchmark's file, and an `Example` for each. Raises BadInput that lists wrong questions."""
    items, questions, wrong, marks = read_items(path), [], [], forbidden(processor)
    of_image, of_text, make_record = BENCHMARKS[name]
    check_image = cache(lambda image: opened(image).size)
    for number, item in enumerate(items, 1):
        try:
            with about(f"question {number} of {name}"):
                for field in of_image, of_text:
                    if not (isinstance(item[field], str) and item[field].strip()):
                        raise BadInput(f"'{field}' is {shown(item[field])}, not text")
                image, text = item[of_image], item[of_text]
                make_record(number, item, "")
                parse_record({"prompt": text, "chosen": "Yes.", "rejected": "No."}, "", "", None, marks)
                refuse_image_tokens(processor, text)
                if name in IDS and not (type(item["id"]) is int and item["id"] in IDS[name]):
                    raise BadInput(f"'id' is {shown(item['id'])}, not one of {IDS[name][0]} to {IDS[name][-1]}")
                with about(f"'{of_image}'"):
                    check_image(image := find_image(name, image, folder))
                questions.append(Example(text, "", "", (image,), id=str(item.get("id", number))))
        except BadInput as error:
            wrong.append(str(error))
    if wrong or not items:
        raise BadInput("\n  ".join([f"{path}: {len(questions)} of {len(items)} questions can be asked", *wrong[:20]]))
    return items, questions


def read_truths(items, annotations):
    """Yes or no for each item: POPE's label, or AMBER's annotation by id; [] if none has one. Raises BadInput."""
    if annotations:
        truth_of = {note["id"]: note["truth"] for note in read_items(annotations)}
        truths = [truth_of[item["id"]] for item in items]
    else:
        truths = [item["label"] for item in items] if any("label" in item for item in items) else []
    if wrong := [truth for truth in truths if truth not in ("yes", "no")]:
        raise BadInput(f'{shown(wrong[0])} is neither "yes" nor "no"')
    return truths


def run(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS)
    add("--questions", required=True, help="the benchmark's own file")
    add("--images", metavar="DIR", help="the benchmark's images")
    add("--annotations", help="AMBER's annotations.json, to score its discriminative questions")
    add("--to", required=True, help="the file to write")
    add("--max-new-tokens", type=whole, default=512)
    add("--batch-size", type=whole, default=8)
    args = parser.parse_args(argv)
    to, name = Path(args.to), args.benchmark
    if os.path.lexists(to):
        raise BadInput(f"{to}: already exists")
    items, questions = read_questions(name, args.questions, args.images, load_processor(args.model))
    with about(f"{args.annotations or args.questions}: no annotations for these questions"):
        truths = read_truths(items, args.annotations) if name in YES_NO else []
    partial, limits = f"{to}.partial", (args.max_new_tokens, args.batch_size)
    answers = answer_as({args.adapter: partial}, args.model, questions, *limits, args.device)[args.adapter]
    given = [*map(yes_or_no, answers)] if name in YES_NO else answers
    records = [BENCHMARKS[name][2](*record) for record in zip(range(len(items)), items, given)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with replacing(to.parent) as new:
        (new / to.name).write_text(lines if name in LINES else json.dumps(records, indent=1))
    os.remove(partial)
    words = statistics.mean(len(answer.split()) for answer in answers)  # short answers hallucinate less
    print(f"{to}: {len(answers)} answers, {words:.1f} words on average, {answers.count('')} empty")
    if name in YES_NO:
        report(given, truths, "yes" if name == "pope" else "no")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run, saves_memory="a lower --batch-size, or --device cpu"))
