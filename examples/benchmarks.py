"""A model's answers to AMBER, POPE, MMHal-Bench or Object HalBench, in the very file that each official scorer reads.

    python examples/benchmarks.py amber --questions query_generative.json --images AMBER/image \
        --model M --adapter OUT --to amber.json
    python examples/benchmarks.py pope --questions coco_pope_random.json --images val2014 --model M --to FILE
    python examples/benchmarks.py mmhal --questions response_template.json --images mmhal/images --model M --to FILE
    python examples/benchmarks.py objhal --questions obj_halbench_300_with_image.jsonl --model M --to FILE

Greedy and batched. Answers are kept in TO.partial as they come; the same command goes on where a killed one was.
A missing image stops the run before the first answer: an empty answer would count as free of hallucination.
Where an answer's first word is yes or no, it becomes Yes or No for POPE and AMBER's discriminative questions. Any other
is written as it is: AMBER's scorer counts it as wrong, POPE's as yes, unless its first sentence has a no or a not.
"""

import base64
import hashlib
import io
import json
import os
import re
import statistics
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, about, load_records, open_image, run_command
from examples.answer import generate_answers, load_tuned, make_parser
from train import replacing, whole

# A benchmark is a function: number, item of its file, image folder, answer -> image, question, the scorer's record.


def amber(number, item, images, answer):
    """query_generative.json: AMBER's inference.py reads `id` and `response`."""
    if item["id"] > 1004:
        raise BadInput(f"question {item['id']} is discriminative: answer it by amber-discriminative")
    return Path(images or ".", item["image"]), item["query"], {"id": item["id"], "response": answer}


def amber_discriminative(number, item, images, answer):
    """query_discriminative*.json."""
    return Path(images or ".", item["image"]), item["query"], {"id": item["id"], "response": yes_or_no(answer)}


def pope(number, item, images, answer):
    """coco_pope_*.json, JSON lines with labels: POPE's evaluate.py reads the answers by order."""
    return Path(images or ".", item["image"]), item["text"], {"question": item["text"], "answer": yes_or_no(answer)}


def yes_or_no(answer):
    word = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return word[1].capitalize() if word else answer


def mmhal(number, item, images, answer):
    """response_template.json, which MMHal's eval_gpt4.py reads with `model_answer` filled. Its images are URLs: looked
    up in the folder of images by their last part, or fetched without one."""
    url = item["image_src"]
    image = Path(images, url.rpartition("/")[2]) if images else url
    return image, item["question"], item | {"model_answer": answer}


def objhal(number, item, images, answer):
    """JSON lines, with images in base64. RLAIF-V's eval_gpt_obj_halbench.py reads `image_id`, `prompt` and `text`."""
    record = {"question_id": number, "image_id": item["image_id"], "prompt": item["question"], "text": answer}
    return item["image"], item["question"], record | {"model_id": "mdpo"}


BENCHMARKS = {"amber": amber, "amber-discriminative": amber_discriminative, "pope": pope, "mmhal": mmhal, "objhal": objhal}


def report(items, records, truths):
    """Print how many answers are neither Yes nor No and, in percent, what the official scorers of POPE and AMBER count.

    truths: AMBER's, from its annotations; without them, its answers are not scored. POPE's are its labels.
    """
    answers = [record.get("answer", record.get("response")) for record in records]
    print(f"{100 * sum(answer not in ('Yes', 'No') for answer in answers) / len(answers):.1f}% are neither Yes nor No")
    if "label" in items[0]:
        words = [{*answer.partition(".")[0].replace(",", "").split(" ")} for answer in answers]
        said = ["no" if {"No", "no", "not"} & of_one else "yes" for of_one in words]
        positive, truths = "yes", [item["label"] for item in items]  # POPE's positive answer
    elif truths:
        said, positive = [answer.lower() for answer in answers], "no"
    else:
        return
    hits, n_said, n_true = sum(t == a == positive for t, a in zip(truths, said)), said.count(positive), truths.count(positive)
    values = {"accuracy": sum(map(str.__eq__, truths, said)) / len(said), "precision": hits / max(1, n_said),
              "recall": hits / max(1, n_true), "F1": 2 * hits / max(1, n_said + n_true),
              "yes": said.count("yes") / len(said)}  # fmt: skip
    print(", ".join(f"{name} {100 * value:.1f}" for name, value in values.items()))


def read_items(path):
    """A JSON list or JSON lines."""
    return [json.loads(item) if isinstance(item, str) else item for _, item in load_records(path)]


def load_image(image):
    """A path, a URL or base64 -> PIL RGB. Raises BadInput."""
    if isinstance(image, str) and "://" in image:
        with about(f"{image}: cannot be fetched (answers so far are kept)"):
            with urllib.request.urlopen(image, timeout=60) as reply:
                image = io.BytesIO(reply.read())
    return open_image(io.BytesIO(base64.b64decode(image)) if isinstance(image, str) else image)


def answer_all(questions, ask, partial, identity, batch_size):
    """Answers of `ask` to all questions, in order; those in the file `partial` are not asked again.

    identity: of model and questions; a partial file of another raises BadInput. A last line cut short is left out.
    """
    lines = partial.read_text().split("\n")[:-1] if partial.exists() else []
    with about(f"{partial}: cannot go on"):
        if lines and json.loads(lines[0]) != identity:
            raise BadInput("holds the answers of another model or to other questions; move it away")
        answers = [json.loads(line) for line in lines[1:]]
    if answers:
        print(f"{partial}: going on after {len(answers)} answers")
    kept = "".join(json.dumps(line) + "\n" for line in [identity, *answers])
    with replacing(partial.parent) as new:
        (new / partial.name).write_text(kept)
    with open(partial, "a", buffering=1) as file, tqdm(total=len(questions), initial=len(answers)) as bar:
        while len(answers) < len(questions):
            batch = [(load_image(image), text) for image, text in questions[len(answers) : len(answers) + batch_size]]
            for answer in ask(batch):
                file.write(json.dumps(answer) + "\n")
                answers.append(answer)
            bar.update(len(batch))
    return answers


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
    if (to := Path(args.to)).exists():
        raise BadInput(f"{to}: already exists")
    with about(f"--questions of {args.benchmark}"):
        apply, items = BENCHMARKS[args.benchmark], read_items(args.questions)
        questions = [apply(number, item, args.images, "")[:2] for number, item in enumerate(items)]
        if not questions:
            raise BadInput("holds no question")
    with about(f"{args.annotations}: no annotations for these questions"):
        annotations = {a["id"]: a["truth"] for a in read_items(args.annotations)} if args.annotations else {}
        truths = [annotations[item["id"]] for item in items if annotations]
    if missing := [str(image) for image, _ in questions if isinstance(image, Path) and not image.is_file()]:
        raise BadInput("\n  ".join([f"{len(missing)} of {len(questions)} images are missing (--images):", *missing[:20]]))
    identity = {name: vars(args)[name] for name in ("model", "adapter", "max_new_tokens")}
    weights = [*Path(args.model).glob("*.safetensors"), *Path(args.adapter or os.devnull).glob("adapter_model.*")]
    files = map(Path, (args.questions, *sorted(weights)))
    identity["contents"] = [hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in files]
    model, processor = load_tuned(args.model, args.adapter, args.device)
    ask = lambda batch: generate_answers(model, processor, batch, args.max_new_tokens, args.batch_size)
    partial = Path(f"{to}.partial")
    answers = answer_all(questions, ask, partial, identity, args.batch_size)
    records = [apply(i, item, args.images, answer)[2] for i, (item, answer) in enumerate(zip(items, answers))]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with replacing(to.parent) as new:
        (new / to.name).write_text(lines if apply in (objhal, pope) else json.dumps(records, indent=1))
    partial.unlink()
    words = statistics.mean(len(answer.split()) for answer in answers)  # short answers hallucinate less
    print(f"{to}: {len(answers)} answers, {words:.1f} words on average, {answers.count('')} empty")
    if apply in (pope, amber_discriminative):
        report(items, records, truths)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run, saves_memory="a lower --batch-size, or --device cpu"))
