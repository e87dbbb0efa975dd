"""Convert published preference data to the plain form that `train.py` reads: OUT/data.jsonl and OUT/images/.

    python examples/convert.py IN OUT [--images DIR]

IN is JSON, JSON lines, parquet or a data set of the hub; the last two need `pip install datasets`.
"""

import base64
import hashlib
import io
import json
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import BadInput, about, first

# Who speaks, and names of fields in published data: the first that is not empty counts, and no other is looked at.
NAMES = [*map(str.split, ("user prompt question query instruction conversations messages",
         "assistant chosen chosen_response chosen_conversations chosen_messages response conversations messages",
         "assistant rejected reject rejected_response rejected_conversations rejected_messages"))]  # fmt: skip
IMAGE = ("images", "image", "img_path", "image_path", "image_url", "image_id", "bytes", "url", "path")
OF_OTHERS = r"<video>|<audio>|<\|im_start\|>|<\|im_end\|>|<\|start_header_id\|>|<start_of_turn>|\[/INST\]"
REFUSED = {name: f"{pattern}|{OF_OTHERS}" for name, pattern in data.forbidden(None).items()}


def open_records(source, split):
    """A file, or the name of a data set of the hub -> its records. Embedded images of parquet stay bytes."""
    if source.is_file() and source.open("rb").read(4) != b"PAR1":
        with suppress(ValueError):
            if isinstance(found := json.loads(source.read_text("utf-8-sig")), dict):
                return found.get("data") or found.get(split) or [found]
        return [record for _, record in data.load_records(source)]  # a list, lines, or it says what else this is
    from datasets import load_dataset

    name, file = ("parquet", str(source)) if source.is_file() else (str(source), None)
    records = load_dataset(name, data_files=file, split=split, streaming=True)
    return records.decode(False) if records.features else records


def rows(value):
    """The rows of a dict of lists, which `datasets` may make of a list of dicts, at any depth. Others stay."""
    columns = isinstance(value, dict) and all(isinstance(column, list | dict) for column in value.values())
    return [dict(zip(value, row)) for row in zip(*map(rows, value.values()), strict=True)] if columns else value


def turns(value, role):
    """Nothing, text, messages or pairs of texts, also as JSON in a text -> messages. Text is said by `role`."""
    if isinstance(value, str):
        with suppress(Exception):  # JSON that does not end in a message of `role` is an answer
            if (messages := turns(json.loads(value), ""))[-1]["role"] in (role, "assistant"):
                return messages
        return [{"role": role, "content": value}]
    if isinstance(value := rows(value or []), list):
        said = [zip(("user", role), part, strict=True) if isinstance(part, list) else [(role, part)] for part in value]
        return [message for pair in said for who, part in pair for message in turns(part, who)]
    role, content = (value["from"], value["value"]) if "from" in value else (value["role"], value["content"])
    if isinstance(content := rows(content), list):
        content = [{"type": "image", "image": part} if "image" in part["type"] else part for part in content]
    return [{"role": {"human": "user", "gpt": "assistant"}.get(role, role), "content": content}]


def find_images(value, folder, embedded):
    """Images as published -> paths. Bytes, also as base64 or numbers, are added to `embedded`. Raises BadInput."""
    if isinstance(value, dict):  # a record, too
        for image in filter(None, map(value.get, IMAGE)):
            with suppress(BadInput):
                return find_images(image, folder, embedded)
        value = [first(value, IMAGE)]
    if isinstance(value, list) and not isinstance((*value, None)[0], int):
        return [path for image in value if image for path in find_images(image, folder, embedded)]
    with suppress(BadInput, OSError):
        return [*data.find_images(value, [folder])]
    with suppress(OSError, TypeError, ValueError):
        content = base64.b64decode(value.split(",")[-1] + "==", "-_") if isinstance(value, str) else bytes(value[:])
        kind = Image.open(io.BytesIO(content)).format.lower().replace("jpeg", "jpg")
        embedded[path := f"images/{hashlib.sha256(content).hexdigest()[:32]}.{kind}"] = content
        return [path]
    raise BadInput(f"no such image in {folder} (--images names its folder), and no image itself: {value!r:.80}")


def convert(record, number, folder, embedded):
    """A published record -> a plain one. `embedded` gets {"images/HASH.KIND": bytes of an image}. Raises BadInput."""
    record = json.loads(record) if isinstance(record, str) else record  # a broken line: says what is wrong
    with suppress(Exception):  # RLHF-V
        record = json.loads(record["text"]) | record
    id = str(next((record[name] for name in ("id", "idx", "question_id") if record.get(name) is not None), number))
    if record.get("completions") and not record.get("chosen"):  # VLFeedback, whose id names images
        best, worst = data.best_and_worst(rows(record["completions"]))
        record |= {"chosen": best, "rejected": worst, "image_id": f"{id}.jpg"}
    if record.get("instruction") and record.get("input"):  # Alpaca
        record |= {"instruction": f"{record['instruction']}\n{record['input']}"}
    question, chosen, rejected = (about(f"'{names[0]}'")(turns)(first(record, names), role) for role, *names in NAMES)
    question = question[:-1] if question and question[-1]["role"] == "assistant" else question
    before = turns(record.get("system"), "system") + turns(record.get("history"), "assistant")
    question = before + max(chosen[:-1], question, key=len)  # the chosen conversation holds it, too
    if rejected[1:] and rejected[:-1] != chosen[:-1]:
        raise BadInput("two conversations that differ before their last turn, or HA-DPO's several answers")
    parts = [part for turn in question if isinstance(turn["content"], list) for part in turn["content"]]
    in_parts = [part.pop("image") for part in parts if "image" in part]
    shown = {"images": find_images(in_parts, folder, embedded) or find_images(record, folder, embedded)}
    own = find_images([first(record, ("rejected_images", "rejected_image"))], folder, embedded)
    shown |= {"rejected_images": own} if own not in ([], shown["images"]) else {}  # of ms-swift, often the same
    if not (question and chosen and rejected and shown["images"]):
        script = ", which OPA-DPO's own script makes," * ("standard_response" in record)
        raise BadInput(f"no image, or no question with two answers{script} in the fields {', '.join(record)}")
    prompt = question if parts or [turn["role"] for turn in question] != ["user"] else question[0]["content"]
    pair = {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}
    pair = json.loads(json.dumps(pair).replace("<image-placeholder>", "<image>").replace("<ImageHere>", "<image>"))
    written = {name: [__file__] * len(paths) for name, paths in shown.items()}  # as if they were there already
    answers = data.parse_record(pair | written, id, "", [Path()], REFUSED)
    return {"id": id} | shown | pair | {"chosen": answers.chosen, "rejected": answers.rejected}


def run(argv):
    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="IN", help="a file, or the name of a data set of the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, or that of this conversion, to go on")
    parser.add_argument("--images", metavar="DIR", help="where relative paths begin (default: IN's folder)")
    parser.add_argument("--split", default="train", help="of a data set of the hub (default: train)")
    args = parser.parse_args(argv)
    source, folder = Path(args.source), Path(args.images or Path(args.source).parent).absolute()
    what = [args.source, source.stat().st_mtime_ns if source.is_file() else None, str(folder), args.split]
    log = args.out / f"records-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.jsonl"
    read = about(f"{args.out}: is there already, and is not what this command makes")(log.read_text)
    *lines, _ = read("utf-8").split("\n") if args.out.exists() else [""]  # _: cut by a kill, or empty
    with about(args.source if source.is_file() else f"{source}: no such file, nor a data set of the hub"):
        bar = data.progress(islice(open_records(source, args.split), len(lines), None), "converting", None)
        (args.out / "images").mkdir(parents=True, exist_ok=True)
        with open(log, "w", buffering=1, encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)
            for number, record in enumerate(bar, len(lines) + 1):
                try:
                    result = about(f"record {number}")(convert)(record, number, folder, embedded := {})
                except BadInput as error:
                    result, embedded = str(error), {}
                for path, content in embedded.items():
                    (args.out / path).write_bytes(content)
                lines.append(json.dumps(result, ensure_ascii=False))
                file.write(lines[-1] + "\n")
    examples = [line for line in lines if line.startswith("{")]
    left_out = {}
    for reason in (json.loads(line) for line in lines if line.startswith('"')):
        left_out.setdefault(tuple(reason.split()[2:5]), []).append(reason)  # record N: three words
    report = [f"{args.out / 'data.jsonl'}: {len(examples)} examples of {len(lines)} records"]
    report += [f"left out {len(those)}: {those[0]}" for those in left_out.values()]
    if not examples:
        raise BadInput("\n  ".join([*report, f"to convert again, first remove {args.out}"]))
    (args.out / "data.jsonl").write_text("\n".join([*examples, ""]), "utf-8", "backslashreplace")
    print("\n  ".join([*report, f"complete: to convert again, first remove {args.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(data.run_command(run))
