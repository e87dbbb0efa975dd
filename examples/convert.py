"""Convert published preference data to the plain form that `train.py` reads: OUT/data.jsonl and OUT/images/.

`python examples/convert.py IN OUT [--images DIR]` reads JSON, JSON lines and, with `datasets`, parquet and the hub.
"""

import base64
import hashlib
import io
import json
import sys
from contextlib import suppress
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
        records = [record for _, record in data.load_records(source)]  # or it says what else this is
        only = records[0] if len(records) == 1 and isinstance(records[0], dict) else {}
        return next((only[name] for name in ("data", split) if isinstance(only.get(name), list)), records)
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
    if isinstance(value, str | int | float):  # `data` says of a number that it is no text
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


def find_images(value, folder, embedded, name=""):
    """Images as published -> paths, None for nothing. Bytes, base64 and numbers are added to `embedded`."""
    if isinstance(value, dict):  # a record, too: its first field that is not empty counts
        fields = (find_images(value.get(name), folder, embedded, name) for name in IMAGE)
        return next(filter(any, fields), [None])
    if isinstance(value, list) and not isinstance((*value, None)[0], int):
        return [path for image in value for path in find_images(image, folder, embedded)]
    with suppress(BadInput, OSError):
        return [*data.find_images(value, [folder])]
    with suppress(OSError, TypeError, ValueError):
        content = base64.b64decode(value.split(",")[-1] + "==", "-_") if isinstance(value, str) else bytes(value[:])
        kind = Image.open(io.BytesIO(content)).format.lower().replace("jpeg", "jpg")
        embedded[path := f"images/{hashlib.sha256(content).hexdigest()[:32]}.{kind}"] = content
        return [path]
    if not value or name == "bytes":  # which may be cut short beside a path
        return [None]
    raise BadInput(f"no such image {value!r:.80} in {folder} (--images names its folder), and no image itself")


def convert(record, number, folder, embedded):
    """A published record -> a plain one. `embedded` gets {"images/HASH.KIND": bytes of an image}. Raises BadInput."""
    record = record if isinstance(record, dict) else data.parse_record(record, "", "", [], REFUSED)  # says what it is
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
    question = max(chosen[:-1], question, key=len)  # the chosen conversation holds it, too
    question = [turn for turn in before if turn not in question[:-1]] + question
    if rejected[1:] and rejected[:-1] != chosen[:-1]:
        raise BadInput("two conversations that differ before their last turn, or HA-DPO's several answers")
    parts = [part for turn in question if isinstance(turn["content"], list) for part in turn["content"]]
    in_parts = [image for part in parts if (image := part.pop("image", None))]
    shown = {"images": find_images({"images": in_parts, "image": record}, folder, embedded)}
    own = find_images(first(record, ("rejected_images", "rejected_image")), folder, embedded)
    shown |= {"rejected_images": own} if any(own) and own != shown["images"] else {}  # of ms-swift, often the same
    if not (question and chosen and rejected and all(sum(shown.values(), []))):
        script = ", which OPA-DPO's own script makes," * ("standard_response" in record)
        raise BadInput(f"no or an empty image, question or answer{script} in the fields {', '.join(record)}")
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
    log, made, done = args.out / "converted.jsonl", args.out / "data.jsonl", {}
    with about(f"{args.out}: is there already, and holds no conversion"):
        for line in log.open("rb") if args.out.exists() and any(args.out.iterdir()) else []:
            with suppress(TypeError, ValueError):  # a kill or a full disk cut it: its record is converted again
                done |= json.loads(line)
    examples, left_out, number = [], {}, 0
    with about(args.source if source.is_file() else f"{source}: no such file, nor a data set of the hub"):
        bar = data.progress(open_records(source, args.split), "converting", None)
        (args.out / "images").resolve().mkdir(parents=True, exist_ok=True)
        with log.open("a", buffering=1) as file:
            for number, record in enumerate(bar, 1):
                key = hashlib.sha256(repr((record, number, folder)).encode()).hexdigest()
                try:
                    if key not in done:
                        done[key] = about(f"record {number}")(convert)(record, number, folder, embedded := {})
                        for path, content in embedded.items():
                            (args.out / path).write_bytes(content)
                        file.write("\n" + json.dumps({key: done[key]}))  # the last line may be cut
                    examples.append(json.dumps(done.pop(key), ensure_ascii=False))
                except BadInput as error:
                    left_out.setdefault(tuple(str(error).split()[2:5]), []).append(error)  # record N: three words
    report = [f"{made}: {len(examples)} examples of {number} records"]
    report += [f"left out {len(those)}: {those[0]}" for those in left_out.values()]
    if not examples:
        raise BadInput("\n  ".join(report))
    content = "\n".join([*examples, ""]).encode(errors="backslashreplace")
    if made.exists() and made.read_bytes() != content:
        raise BadInput(f"{made}: has other lines; it, IN or a flag has changed since: remove it, or take another OUT")
    (whole := args.out / "data.part").write_bytes(content)
    whole.replace(made)
    print("\n  ".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(data.run_command(run))
