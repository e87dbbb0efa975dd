"""Ask a model about images, before and after training (the paper's Figure 3); greedy.

    python examples/answer.py --model M --adapter RUN [RUN ...] --image photo.jpg --question "What is this?"

--question takes several, each asked alone; --image takes several, shown together. The model is read once.
"""

import hashlib
import io
import json
import os
import re
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from urllib.parse import quote

import peft
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import BadInput, about, chat_messages, encode, first, load_records, open_image, render, run_command, texts_of
from train import Parser, best_device, load_model, load_processor, split, whole


def load_tuned(name_or_path, adapters=None, device=None):
    """Model and processor, with the adapter of a run's folder or of several, on the GPU if there is one.

    The first adapter is on; `speaking_as` chooses among them. Raises BadInput, also where peft would go on: if weights
    are missing or have no place in the model, or if a run was trained on another base.
    """
    adapters = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters or []
    configs = [*map(read_adapter, adapters)]  # before the model, which takes minutes
    model, processor = load_model(name_or_path, device or best_device())
    for number, (adapter, config) in enumerate(zip(adapters, configs)):
        with about(f"{adapter}: is no adapter of {name_or_path}"):
            if number == 0:
                fresh = train.add_lora(model, 1)  # a run took its base's fingerprint in this form
                weights = train.fingerprint(fresh)
                model = peft.PeftModel(fresh.unload(), config, "adapter_0")  # no bare number: other names hold some
            if read_run(adapter).get("base_weights") not in (None, weights):
                raise BadInput("it was trained on other weights")
            missing, unexpected = model.load_adapter(adapter, f"adapter_{number}", torch_device=str(model.device))
            if wrong := [*missing, *unexpected]:
                raise BadInput(f"{len(wrong)} weights are missing or unexpected, such as {min(wrong)}")
    return model, processor


def read_adapter(adapter):
    with about(f"{adapter}: holds no adapter"):
        for name in ("adapter_config.json", "adapter_model.safetensors"):  # peft would ask the hub for it
            if not Path(adapter, name).is_file():
                raise BadInput(f"no {name}")
        return peft.PeftConfig.from_pretrained(adapter)


def speaking_as(model, number):
    """-> a context: inside, the model has this adapter of `load_tuned`, counted from 0; None: it is the base."""
    if number is None:
        return getattr(model, "disable_adapter", nullcontext)()
    model.set_adapter(f"adapter_{number}")
    return nullcontext()


def read_run(adapter=None):
    """What args.json says of the run in this folder, or of which it is an epoch; {} if there is none."""
    folder = Path(adapter or "")
    is_epoch = re.fullmatch(r"epoch-\d+", folder.name) and not Path(folder, "args.json").exists()
    path = Path(folder.parent if is_epoch else folder, "args.json")
    with about(f"{path}: cannot be read"):
        return {**json.loads(path.read_text())} if adapter and path.is_file() else {}


def chat_prompt(processor, question, n_images=1, system=""):
    messages = chat_messages(question, n_images)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return render(processor, messages, add_generation_prompt=True)


def refuse_image_tokens(processor, text):
    """Raise BadInput if a question holds a token that stands for an image: it would be one too many."""
    parts, names = (processor, getattr(processor, "tokenizer", None)), ("image_token", "video_token")
    tokens = ["<image>", *(getattr(part, name, None) for part in parts for name in names)]
    if held := [token for token in tokens if token and token in text]:
        raise BadInput(f"the question {text!r} holds the image token {held[0]!r}: leave it out")


@torch.no_grad()
def generate_answers(model, processor, questions, max_new_tokens=256, batch_size=8, system=""):
    """[(PIL image or several, question)] -> greedy answers. system: a text for questions without a system message."""
    model.eval()  # under gradient checkpointing, a model in training mode forgets its cache and babbles
    answers = []
    for batch in split(questions, batch_size):
        images = [image if isinstance(image, (list, tuple)) else [image] for image, _ in batch]
        prompts = [chat_prompt(processor, text, len(of), system) for (_, text), of in zip(batch, images)]
        inputs = encode(processor, prompts, images).to(model.device, model.dtype)
        options = {"do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def text_of(example):
    """An example's question as text, its earlier turns included, without a system text."""
    return "\n".join(texts_of(one for one in chat_messages(example.question, 0) if one["role"] != "system"))


# A file of answers is JSON lines: what it belongs to, {what: its value}, then a {"question", "answer"} for each.
# Questions are `Example`s, whose images are paths, or the bytes of image files.


def opened(image):
    return open_image(io.BytesIO(image) if isinstance(image, bytes) else image)


def digest(content):
    """A hash of bytes, or of the file at a path."""
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(questions):
    """{what: a hash of all of them}, of texts and images."""
    of_image = cache(digest)  # many questions are about one image
    images = [[*map(of_image, one.images)] for one in questions]
    return {"questions": train.sha256([one.question for one in questions]), "images": train.sha256(images)}


def resume(path, belongs, questions):
    """The answers to the first questions, which a file holds; it is begun if it is not there.

    Raises BadInput if it belongs to anything but `belongs`: {what: its value}.
    """
    with about(f"{path}: cannot go on, move it away or name another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.stat().st_size:
            path.write_text(json.dumps(belongs) + "\n")
        *lines, cut = path.read_bytes().split(b"\n")  # cut: by a kill in the middle of a line, else empty
        found, *records = map(json.loads, lines)
        train.refuse_others(found, belongs)
        if [record["question"] for record in records] != [*map(text_of, questions[: len(records)])]:
            raise BadInput("two commands wrote into it")
        os.truncate(path, path.stat().st_size - len(cut))
        return [record["answer"] for record in records]


def answer_as(files, name_or_path, questions, max_new_tokens, batch_size=8, device=None, loaded=None):
    """-> {speaker: answers}. files: {a run's folder, or None for the base: where its answers are kept}.

    Each batch is written to the file as it comes. Answers that the file holds are not asked for again.
    loaded: model and processor of `load_tuned`; without, they are read if there is something to ask.
    """
    adapters, said = [name for name in files if name], {}
    for adapter in adapters:
        read_adapter(adapter)
    load = cache(lambda: loaded or load_tuned(name_or_path, adapters, device))
    system = read_run(*adapters[:1]).get("system", "")
    within = lambda folder, *kinds: [digest(path) for kind in kinds for path in sorted(Path(folder).glob(kind))]
    of_model = "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"  # weights, config, chat template, vocabulary
    for name, path in files.items():
        belongs = content_of(questions) | {"max_new_tokens": max_new_tokens, "system": system}
        belongs["model"] = within(name_or_path, *of_model) or name_or_path
        belongs["adapter"] = name and within(name, "adapter_*")
        said[name] = resume(Path(path), belongs, questions)
        to_come = split(questions[len(said[name]) :], batch_size)
        with open(path, "a") as file:
            for batch in tqdm(to_come, Path(path).name, leave=False, disable=None):
                model, processor = load()
                asked = [([*map(opened, one.images)], one.question) for one in batch]
                with speaking_as(model, adapters.index(name) if name else None):
                    answers = generate_answers(model, processor, asked, max_new_tokens, batch_size, system)
                for one, answer in zip(batch, answers, strict=True):
                    file.write(json.dumps({"question": text_of(one), "answer": answer}) + "\n")
                file.flush()
                said[name] += answers
    return said


def files_in(folder, names):
    """{a model, as in `answer_as`: the file of its answers in this folder}. Raises BadInput if two share one."""
    files = {name: Path(folder, quote(name or "base", safe="")[-200:] + ".jsonl") for name in names}
    if len({*files.values()}) < len(names):
        raise BadInput(f"two of the names {', '.join(filter(None, names))} have one file of answers: rename a folder")
    return files


def read_items(path):
    """A JSON list or JSON lines."""
    records = load_records(path)
    if wrong := [number for number, item in records if not isinstance(item, dict)]:
        raise BadInput(f"{path}: cannot be read: line or item {wrong[0]} is no JSON object")
    return [item for _, item in records]


def read_answers(path, questions):
    """The answers in a file of `answer_as`, or in one that a benchmark's scorer reads. Raises BadInput."""
    fields, answers, records = ("answer", "response", "model_answer", "text"), [], read_items(path)
    with about(f"{path}: cannot be compared"):
        if records and "max_new_tokens" in records[0]:
            train.refuse_others(records.pop(0), content_of(questions))
        if len(records) != len(questions):
            raise BadInput(f"holds {len(records)} answers to {len(questions)} questions")
        for number, (record, question) in enumerate(zip(records, questions), 1):
            answer = next((record[name] for name in fields if name in record), None)  # it may be empty
            if not isinstance(answer, str):
                raise BadInput(f"answer {number} has no text in a field {' or '.join(fields)}")
            if first(record, ("question", "prompt")) not in (None, text_of(question)):
                raise BadInput(f"answer {number} is one to another question")
            answers.append(answer.strip())
    return answers


def make_parser(doc, needs_adapter=False, needs_model=True, **adapter):
    """A parser with the arguments of all commands that load a model. adapter: options of --adapter."""
    parser = Parser(description=doc.splitlines()[0])
    parser.add_argument("--model", required=needs_model, help="folder or hub name")
    parser.add_argument("--adapter", required=needs_adapter, **{"metavar": "RUN", "help": "a run's folder"} | adapter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    return parser


def run(argv):
    parser = make_parser(__doc__, nargs="+", default=[])
    parser.add_argument("--image", nargs="+", default=[], help="an image or several; without: a text alone")
    parser.add_argument("--question", nargs="+", required=True)
    parser.add_argument("--max-new-tokens", type=whole, default=256)
    args = parser.parse_args(argv)
    images, processor = [*map(open_image, args.image)], load_processor(args.model)
    for question in args.question:
        refuse_image_tokens(processor, question)
    model, processor = load_tuned(args.model, args.adapter, args.device)
    names, system = ["base", *args.adapter], read_run(*args.adapter[:1]).get("system", "")
    for question in args.question:
        print(question)
        for number, name in enumerate(names):
            with speaking_as(model, number - 1 if number else None):
                (answer,) = generate_answers(model, processor, [(images, question)], args.max_new_tokens, 1, system)
            print(f"{name + ':':{max(map(len, names)) + 1}} {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
