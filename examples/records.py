"""Published records, one at a time: read from JSON, parquet or the hub, and put into this project's words.

Purpose: what `convert.py` takes. Parquet and the hub need `pip install datasets`.
"""

import base64
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, about

CHUNK = 1 << 18  # characters that are read at once
OTHER_KINDS = {  # of files, by their first bytes
    b"\x1f\x8b": "gzip (unpack it first)",
    b"PK\3\4": "a zip archive (unpack it first)",
    b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` fetches the file)",
    b"\xff\xfe": "UTF-16 (save it as UTF-8)",
    b"\xfe\xff": "UTF-16 (save it as UTF-8)",
}


def open_records(source, split):
    """A file, a folder of parquet or a name on the hub -> records: a generator, or a stream of `datasets`.

    A `BadInput` stands in the place of a record that is not valid JSON. Raises BadInput for other files.
    """
    start = b"PAR1"
    if os.path.isfile(source):
        with open(source, "rb") as file:
            start = file.read(80)
    if not start.startswith(b"PAR1"):
        kinds = [kind for begin, kind in OTHER_KINDS.items() if start.startswith(begin)]
        if kinds or start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"[", b"{"):
            found = kinds[0] if kinds else f"a file that begins with {start[:40]!r}"
            raise BadInput(f"is neither JSON nor parquet, but {found}")
        return read_json(source)
    what, files = ("parquet", {"data_files": source}) if os.path.isfile(source) else (source, {})
    if what == source and "/" not in source:
        raise BadInput("no such file; data sets of the hub are called OWNER/NAME")
    with about("parquet and the hub need `pip install datasets`"):
        import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told here, in one line
    with about("cannot be read as parquet" if files else "no such file, nor such a data set of the hub"):
        records = datasets.load_dataset(what, split=split, streaming=True, **files)
    return records.decode(False) if records.features else records  # images stay bytes


def read_json(path):
    """JSON lines, a list, an object with a list as its "data", or objects over several lines -> records."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        text, end = re.sub(r'^\s*(\{\s*"data"\s*:\s*)?\[', "", file.read(CHUNK)), 0
        while True:
            text = text[end:].lstrip(" \t\r\n,")
            try:
                record, end = decode(text)
            except ValueError as error:
                cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
                if cut and (more := file.read(max(CHUNK, len(text)))):
                    text, end = text + more, 0
                    continue
                if text[:1] in ("", "]"):
                    return
                record, end = BadInput(f"not valid JSON: {error}"), text.find("\n") + 1 or len(text)
            yield record


JSON = re.compile(r'\s*(\{\s*"(question|chosen|rejected)"|\[\s*\{\s*"(from|value|role|content)")')  # in text
BASE64 = re.compile(
    r"(?:data:image/[^,]*;base64,|(?=/9j/|iVBORw0KGgo|R0lGOD|UklGR))([\w+/\s]{40,}=*\s*)", re.ASCII
)
MARKS = re.compile("<image-placeholder>|<ImageHere>")  # other projects' `<image>`
RENDERED = re.compile(r"<\|im_start\|>|<\|im_end\|>|<\|start_header_id\|>|<start_of_turn>|\[/INST\]")
ROLES = {"human": "user", "gpt": "assistant"}
IMAGE = ("image", "image_url", "bytes", "url", "path")  # what holds an image; the first that does


def plain(value, embedded):
    """The value with its messages in this project's form and a path for each embedded image, at any depth.

    embedded: {"images/HASH.KIND": bytes of an image}, added to. Raises BadInput if bytes are no image.
    """
    if isinstance(value, list):
        return [plain(part, embedded) for part in value]
    if isinstance(value, dict):
        value = {name: plain(part, embedded) for name, part in value.items()}
        image = next((value[name] for name in IMAGE if value.get(name)), None)
        if isinstance(value.get("response"), list) and "annotations" in value:  # VLFeedback, as columns
            return [row(value, i) for i in range(len(value["response"]))]
        if "from" in value:
            return {"role": ROLES.get(value["from"], value["from"]), "content": value["value"]}
        if value.get("type") in ("image", "image_url"):
            return {"type": "image", "image": image}
        return image if value and {*value} <= {*IMAGE} else value
    if isinstance(value, str) and JSON.match(value):
        return plain(json.loads(value), embedded)
    if isinstance(value, str) and (found := BASE64.fullmatch(value)):
        value = base64.b64decode(found[1])
    if not isinstance(value, bytes):
        return MARKS.sub("<image>", value) if isinstance(value, str) else value
    with about("embedded bytes are no image"):
        kind = Image.open(io.BytesIO(value)).format.lower().replace("jpeg", "jpg")
    path = f"images/{hashlib.sha256(value).hexdigest()[:32]}.{kind}"
    embedded[path] = value
    return path


def row(columns, i):
    """The i-th of rows that `datasets` exported as a dict of lists, at any depth."""
    return {k: row(v, i) for k, v in columns.items()} if isinstance(columns, dict) else columns[i]


def turns(value, role):
    """Text, a message or messages -> messages."""
    values = value if isinstance(value, list) else [value] if value else []
    if len(values) > 1 and isinstance(values[0], str):
        raise BadInput("several texts where one is expected; HA-DPO's own script chooses among them")
    return [{"role": role, "content": value} if isinstance(value, str) else value for value in values]


def text_of(message):
    """Its text. Raises BadInput if that went through a chat template already, which would be applied twice."""
    content = message["content"]
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    if found := RENDERED.search(text):
        raise BadInput(f"written by a chat template already: {found[0]}")
    return text
