"""Convert published preference data to the plain form that `train.py` reads: OUT/data.jsonl and OUT/images/.

Purpose: use data sets that embed their images, or that name their fields in another way.
Command: python examples/convert.py IN OUT [--images DIR]

IN is JSON, JSON lines, parquet or a data set of the hub; the last two need `pip install datasets`.
Embedded images are written untouched, named by their hash. Image files stay where they are, by absolute paths.
The same command continues a conversion that was stopped. `python data.py OUT/data.jsonl` checks the result.
"""

import json
import os
import sys
from itertools import islice
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Parser, about, run_command
from examples.records import open_records, plain, text_of, turns

NAMES = {  # of fields in published data; the first that is not empty counts
    "id": ("id", "idx", "question_id"),
    "question": ("prompt", "question", "query", "instruction"),
    "dialogue": ("conversations", "messages"),
    "chosen": ("chosen", "chosen_response", "chosen_conversations", "chosen_messages", "response"),
    "rejected": ("rejected", "reject", "rejected_response", "rejected_conversations", "rejected_messages"),
    "image": ("images", "image", "image_url", "img_path", "image_path", "image_id"),
    "rejected image": ("rejected_images", "rejected_image"),
}
SAVE_EVERY = 100  # records: replacing a file takes a millisecond


def get(record, kind):
    return next((record[name] for name in NAMES[kind] if record.get(name) not in (None, "", [])), None)


def convert(record, number, folder, embedded):
    """A published record -> a plain one. `embedded` is as in `plain`. Raises BadInput: why it is left out."""
    if not isinstance(record, dict):
        raise record if isinstance(record, BadInput) else BadInput("not an object")
    record = {name: plain(value, embedded) for name, value in record.items()}
    record |= record["text"] if isinstance(record.get("text"), dict) else {}  # RLHF-V
    id = str(number if get(record, "id") is None else get(record, "id"))
    if "'Rating'" in str(record.get("completions")):  # VLFeedback, which this project reads as it is
        images = find_images(record | {"image_id": f"{id}.jpg"}, "image", folder, embedded)
        return {name: record[name] for name in record if name not in NAMES["image"]} | {"images": images}
    asked, dialogue, chosen, rejected = map(get, [record] * 4, ("question", "dialogue", "chosen", "rejected"))
    if asked and asked == record.get("instruction") and record.get("input"):
        asked = f"{asked}\n{record['input']}"  # Alpaca
    dialogue, rejected = turns(dialogue, "user"), turns(rejected, "assistant")
    answered = dialogue != [] and dialogue[-1]["role"] == "assistant"
    chosen = turns(chosen, "assistant") or dialogue * answered
    question = max(turns(asked, "user"), dialogue[: len(dialogue) - answered], chosen[:-1], key=len)
    if not (question and question[-1]["role"] == "user" and chosen and rejected):
        raise BadInput(f"no question with two answers (OPA-DPO's own script makes them): {', '.join(record)}")
    if len(rejected) > 1 and rejected[:-1] != chosen[:-1]:
        raise BadInput("its two conversations differ before their last turn")
    for user, assistant in reversed(record.get("history") or []):
        question = turns(user, "user") + turns(assistant, "assistant") + question
    if question[0]["role"] != "system":
        question = turns(record.get("system"), "system") + question

    parts = [part for turn in question for part in turn["content"] if isinstance(part, dict)]
    own = [path for part in parts if (path := part.pop("image", None))]
    images = find_images({"images": own} if own else record, "image", folder, embedded)
    prompt = question if parts or question[1:] else text_of(question[0])
    example = {"id": id, "images": images, "prompt": prompt}
    example |= {"chosen": text_of(chosen[-1]), "rejected": text_of(rejected[-1])}
    if len({"", example["chosen"].strip(), example["rejected"].strip()}) < 3:
        raise BadInput("an answer is empty, or the two are equal")
    if get(record, "rejected image"):
        rejected = find_images(record, "rejected image", folder, embedded)
        example |= {"rejected_images": rejected} if rejected != images else {}  # of ms-swift, often the same
    return example


def find_images(record, kind, folder, embedded):
    """The images of the first field whose images are all there -> paths. Raises BadInput."""
    for value in filter(None, map(record.get, NAMES[kind])):
        names = [str(name) for name in (value if isinstance(value, list) else [value])]
        paths = [name if name in embedded else os.path.abspath(os.path.join(folder, name)) for name in names]
        there = [path in embedded or os.path.isfile(path) for path in paths]
        if all(there) and not any(".." in Path(name).parts for name in names):
            return paths
    raise BadInput(f"no such image in {folder} (--images names its folder): {get(record, kind)!r:.80}")


def write(path, data):
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.part").write_bytes(data)
    os.replace(f"{path}.part", path)


def convert_all(records, state, out, folder):
    """Write OUT, from where `state` stands; it is kept in OUT/convert.json."""
    write(out / "convert.json", json.dumps(state).encode())
    state_of = getattr(records, "state_dict", dict)
    if state.get("stream"):
        records.load_state_dict(state["stream"])
    else:
        records = islice(records, state["records"], None)
    with open(out / "unfinished.jsonl", "ab") as file:
        if file.tell() < state["bytes"]:
            raise BadInput(f"{out}: its data.jsonl is gone; remove the folder to convert anew")
        file.truncate(state["bytes"])  # drops a line that a kill cut short
        for record in tqdm(records, "converting", initial=state["records"], unit=" records"):
            embedded, number = {}, state["records"] + 1
            try:
                example = convert(record, number, folder, embedded)
                line = json.dumps(example, ensure_ascii=False).encode() + b"\n"
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                reason = str(error) if isinstance(error, BadInput) else f"not in a known form: {error!r}"
                first = [0, f"record {number}: {reason}"]
                state["left out"].setdefault(reason.partition(":")[0], first)[0] += 1
            else:
                for path in {*example["images"], *example.get("rejected_images", ())} & {*embedded}:
                    if not (out / path).exists():
                        write(out / path, embedded[path])
                file.write(line)
                file.flush()
                state |= {"taken": state["taken"] + 1, "bytes": state["bytes"] + len(line)}
            state |= {"records": number, "stream": state_of()}
            if number % SAVE_EVERY == 0:
                write(out / "convert.json", json.dumps(state).encode())
    write(out / "convert.json", json.dumps(state).encode())
    if state["taken"]:
        os.replace(out / "unfinished.jsonl", out / "data.jsonl")


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="IN", help="a file, or the name of a data set of the hub")
    parser.add_argument("out", metavar="OUT", help="a new folder, or that of this conversion, to continue it")
    parser.add_argument("--images", metavar="DIR", help="where relative paths begin (default: IN's folder)")
    parser.add_argument("--split", default="train", help="of a data set of the hub (default: train)")
    args = parser.parse_args(argv)
    source, out, saved = args.source, Path(args.out), Path(args.out, "convert.json")
    folder = os.path.abspath(args.images or os.path.dirname(source))
    here = (os.path.abspath(source), os.path.getsize(source)) if os.path.exists(source) else (source, 0)
    state = {"of": [*here, folder, args.split], "records": 0, "taken": 0, "bytes": 0, "left out": {}}
    kept = json.loads(saved.read_text()) if saved.exists() else {"of": None, "taken": out.exists()}
    if kept["taken"] and kept["of"] != state["of"]:
        raise BadInput(f"{out}: is there already, and is not what this command makes")
    state = kept if kept["of"] == state["of"] else state
    if not (out / "data.jsonl").exists():
        with about(source):
            convert_all(open_records(source, args.split), state, out, folder)
    report = [f"{out / 'data.jsonl'}: {state['taken']} examples of {state['records']} records"]
    report += [f"left out {count}: {first}" for count, first in state["left out"].values()]
    if not state["taken"]:
        raise BadInput("\n  ".join(report))
    print("\n  ".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
