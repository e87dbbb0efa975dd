"""Convert published preference data to the plain form that `train.py` reads: OUT/data.jsonl and OUT/images/.

    python examples/convert.py IN OUT [--images DIR]

IN is JSON, JSON lines, parquet or a data set of the hub; the last two need `pip install datasets`. Embedded images are
written untouched, named by their hash. Image files stay where they are, by absolute paths. OUT/records-*.jsonl notes
what became of each record, so that the same command goes on. `python data.py OUT/data.jsonl` checks the result.
"""

import base64
import hashlib
import io
import json
import os
import re
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import BadInput, about, first

NAMES = {  # of fields in published data; the first that is not empty counts
    "question": ("prompt", "question", "query", "instruction"),
    "dialogue": ("conversations", "messages"),
    "chosen": ("chosen", "chosen_response", "chosen_conversations", "chosen_messages", "response"),
    "rejected": ("rejected", "reject", "rejected_response", "rejected_conversations", "rejected_messages"),
    "image": ("images", "image", "image_url", "img_path", "image_path", "image_id"),
    "rejected image": ("rejected_images", "rejected_image"),
}
IDS = ("id", "idx", "question_id")
ROLES = {"human": "user", "gpt": "assistant"}
IMAGE = ("image", "image_url", "bytes", "url", "path")  # what holds an image; the first that does
MARKS = re.compile("<image-placeholder>|<ImageHere>")  # other projects' `<image>`
JSON = re.compile(r'\s*(\{\s*"(question|chosen|rejected)"|\[\s*\{\s*"(from|value|role|content)")')  # in text
BASE64 = re.compile(r"(?:data:image/[^,]*;base64,|(?=/9j/|iVBORw0KGgo|R0lGOD|UklGR))([\w+/\s]{40,}=*\s*)", re.ASCII)
TEMPLATES = {"<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<start_of_turn>", "[/INST]"}  # applied already
REFUSED = {name: tokens | TEMPLATES for name, tokens in data.special_tokens(None).items()}


def open_records(source, split):
    """A file, or the name of a data set of the hub -> its records. Embedded images of parquet stay bytes."""
    is_file = os.path.isfile(source)
    if is_file and Path(source).open("rb").read(4) != b"PAR1":
        with suppress(ValueError):
            found = json.loads(Path(source).read_bytes().decode("utf-8-sig"))
            return found if isinstance(found, list) else found.get("data", [found])
        return [record for _, record in data.load_records(source)]  # JSON lines, or it says what else this is
    with about("cannot be read as parquet" if is_file else "no such file, nor a data set of the hub"):
        with about("`pip install datasets`"):
            import datasets
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        what = {"path": "parquet", "data_files": source} if is_file else {"path": source}
        records = datasets.load_dataset(**what, split=split, streaming=True)
    return records.decode(False) if records.features else records


def plain(value, embedded):
    """The value with its messages in this project's form and a path for each embedded image, at any depth.

    embedded: {"images/HASH.KIND": bytes of an image}, added to. Raises BadInput if bytes are no image.
    """
    if isinstance(value, list):
        return [plain(part, embedded) for part in value]
    if isinstance(value, dict):
        value = {name: plain(part, embedded) for name, part in value.items()}
        if "from" in value:
            return {"role": ROLES.get(value["from"], value["from"]), "content": value["value"]}
        image = first(value, IMAGE)
        if value.get("type") in ("image", "image_url"):
            return {"type": "image", "image": image}
        return image if value and {*value} <= {*IMAGE} else value
    if isinstance(value, str) and JSON.match(value):
        return plain(json.loads(value), embedded)
    if isinstance(value, str) and (found := BASE64.fullmatch(value)):
        value = base64.b64decode(found[1])
    if isinstance(value, bytes):
        with about("embedded bytes are no image"):
            kind = Image.open(io.BytesIO(value)).format.lower().replace("jpeg", "jpg")
        embedded[path := f"images/{hashlib.sha256(value).hexdigest()[:32]}.{kind}"] = value
        return path
    return MARKS.sub("<image>", value) if isinstance(value, str) else value


def row(columns, i):
    """The i-th of rows that `datasets` exported as a dict of lists, at any depth."""
    return {k: row(v, i) for k, v in columns.items()} if isinstance(columns, dict) else columns[i]


def turns(value, role="user"):
    """Nothing, text, a message or messages -> messages."""
    values = value if isinstance(value, list) else [value] if value else []
    return [{"role": role, "content": value} if isinstance(value, str) else value for value in values]


def convert(record, number, folder, embedded):
    """A published record -> a plain one. `embedded` is as in `plain`. Raises BadInput: why it is left out."""
    if not isinstance(record, dict):
        raise BadInput(f"not an object: {record!r:.80}")
    record = {name: plain(value, embedded) for name, value in record.items()}
    record |= record["text"] if isinstance(record.get("text"), dict) else {}  # RLHF-V
    id = str(next((record[name] for name in IDS if record.get(name) is not None), number))
    if rated := record.get("completions"):  # VLFeedback: ratings choose the pair, and the id names the image
        rated = [row(rated, i) for i in range(len(rated["response"]))] if isinstance(rated, dict) else rated
        record["chosen"], record["rejected"] = data.best_and_worst(rated)
        record["image_id"] = f"{id}.jpg"
    asked, dialogue, chosen, rejected = (first(record, names) for names in [*NAMES.values()][:4])
    if asked == record.get("instruction") and record.get("input"):  # Alpaca
        asked = f"{asked}\n{record['input']}"
    dialogue, chosen, rejected = turns(dialogue), turns(chosen, "assistant"), turns(rejected, "assistant")
    if dialogue and dialogue[-1]["role"] == "assistant":
        dialogue, chosen = dialogue[:-1], chosen or dialogue
    question = max(turns(asked), dialogue, chosen[:-1], key=len)
    if not (question and chosen and rejected):
        raise BadInput(f"no question with two answers (OPA-DPO's own script makes them): {', '.join(record)}")
    if len(rejected) > 1 and rejected[:-1] != chosen[:-1]:  # also HA-DPO's several answers
        raise BadInput("two conversations that differ before their last turn, or several answers")
    for user, assistant in reversed(record.get("history") or []):
        question = turns(user) + turns(assistant, "assistant") + question
    if question[0]["role"] != "system":
        question = turns(record.get("system"), "system") + question

    parts = [part for turn in question for part in turn["content"] if isinstance(part, dict)]
    own = [path for part in parts if (path := part.pop("image", None))]
    example = {"id": id, "images": find_images({"images": own} if own else record, "image", folder, embedded)}
    example["prompt"] = question if parts or question[1:] else question[0]["content"]
    last = {"prompt": question, "chosen": chosen[-1:], "rejected": rejected[-1:]}
    pair = data.parse_record(last, id, "", None, REFUSED)
    example |= {"chosen": pair.chosen, "rejected": pair.rejected}
    if first(record, NAMES["rejected image"]):
        images = find_images(record, "rejected image", folder, embedded)
        example |= {"rejected_images": images} if images != example["images"] else {}  # of ms-swift, often the same
    return example


def find_images(record, kind, folder, embedded):
    """The images of the first field whose images are all there -> paths. Raises BadInput."""
    for value in filter(None, map(record.get, NAMES[kind])):
        names = value if isinstance(value, list) else [value]
        with suppress(BadInput):
            return [name if name in embedded else data.find_images(name, [Path(folder)])[0] for name in names]
    raise BadInput(f"no such image in {folder} (--images names its folder): {first(record, NAMES[kind])!r:.80}")


def convert_all(records, lines, log, folder):
    """Add a line for each record that has none yet, to the log, too: the example, or why it is left out."""
    bar = tqdm(islice(records, len(lines), None), "converting", initial=len(lines), unit=" records")
    with open(log, "a", encoding="utf-8") as file:
        for number, record in enumerate(bar, len(lines) + 1):
            embedded = {}
            try:
                result = convert(record, number, folder, embedded)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                result = str(error) if isinstance(error, BadInput) else f"not in a known form: {error!r}"
            else:
                for path in {*result["images"], *result.get("rejected_images", ())} & {*embedded}:
                    (log.parent / "images").mkdir(exist_ok=True)
                    (log.parent / path).write_bytes(embedded[path])
            lines.append(json.dumps(result, ensure_ascii=False).encode(errors="backslashreplace").decode())
            file.write(lines[-1] + "\n")
            file.flush()


def run(argv):
    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="IN", help="a file, or the name of a data set of the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, or that of this conversion, to go on")
    parser.add_argument("--images", metavar="DIR", help="where relative paths begin (default: IN's folder)")
    parser.add_argument("--split", default="train", help="of a data set of the hub (default: train)")
    args = parser.parse_args(argv)
    made, folder = args.out / "data.jsonl", os.path.abspath(args.images or os.path.dirname(args.source))
    size = os.path.getsize(args.source) if os.path.isfile(args.source) else 0
    what = json.dumps([args.source, size, folder, args.split]).encode()
    log = args.out / f"records-{hashlib.sha256(what).hexdigest()[:16]}.jsonl"
    if args.out.exists() and any(args.out.iterdir()) and not log.exists():
        raise BadInput(f"{args.out}: is there already, and is not what this command makes")
    *lines, _ = log.read_text("utf-8").split("\n") if log.exists() else [""]  # _: cut by a kill, or empty
    if not made.exists():
        with about(args.source):
            records = open_records(args.source, args.split)
            args.out.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(f"{line}\n" for line in lines), "utf-8")
            convert_all(records, lines, log, folder)
    left_out = {}
    examples = [line for line in lines if line.startswith("{")]
    for number, reason in enumerate(map(json.loads, lines), 1):
        if isinstance(reason, str):
            left_out.setdefault(reason.partition(":")[0], []).append(f"record {number}: {reason}")
    report = [f"{made}: {len(examples)} examples of {len(lines)} records"]
    report += [f"left out {len(those)}: {those[0]}" for those in left_out.values()]
    if not examples:
        log.unlink()
        raise BadInput("\n  ".join(report))
    Path(f"{made}.part").write_text("\n".join([*examples, ""]), "utf-8")
    os.replace(f"{made}.part", made)
    print("\n  ".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(data.run_command(run))
