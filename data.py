"""Preference data for mDPO: read it, make the rejected images, lay image pairs out as a batch.

`python data.py FILE [--images DIR]` checks a file without any model.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

CROP = (0.01, 0.2)  # the paper's "0-20%": what its code keeps of the area
STRATEGIES = ("crop", "random", "moco")  # Table 3
BUNNY_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class BadInput(ValueError):
    """Something that the user can mend: the message says what, where, and how."""


@dataclass(frozen=True)
class Example:
    """One preference: `chosen` is better than `rejected` as an answer to `question` about `image`."""

    id: str
    question: (
        str | list[dict]
    )  # text; or chat messages up to the question: a system text, earlier turns, images between
    chosen: str
    rejected: str
    image: str | list[str] | None  # a path, or several; None where the images are left out

    @property
    def images(self):
        return as_list(self.image)


def as_list(value):
    """None -> [], one thing -> [thing], a list -> itself: an example has no image, one, or several."""
    return [] if value is None else value if isinstance(value, list) else [value]


# ---------------------------------------------------------------------------------------------------------- reading


def read_examples(path, image_dir=None, *, subset=None, limit=None, seed=0, with_images=True, skip_bad=False,
                  processor=None, max_length=2048, log=print):  # fmt: skip
    """Read a preference file of any known format (README, "Data") -> list of `Example`, each checked.

    image_dir: where relative image paths begin (default: the file's folder); `merged_images/` in it is searched too.
    subset: keep the ids that begin so. limit: a sample of so many, drawn by `seed`.
    with_images: False leaves every image out, and needs none. skip_bad: drop bad records instead of raising.
    processor, max_length: if given, also checks that prompts leave room for an answer and do not hold the image token.
    Raises BadInput, listing every bad record and its reason, or if nothing is left.
    """
    examples, problems, unpaired = scan(path, image_dir, subset, limit, seed, with_images, processor, max_length)
    if problems and not skip_bad:
        raise BadInput(f"{path}: {report(problems)}\nMend them, or drop them with --skip-bad.")
    if problems:
        log(f"{path}: dropped {report(problems)}")
    if unpaired:
        log(f"{path}: left out {unpaired} records whose best and worst rating are equal or missing")
    if not examples:
        raise BadInput(f"{path}: no example is left to train on" + (f" (with ids in {subset!r})" if subset else ""))
    return examples


def report(problems, most=20):
    lines = [f"{len(problems)} bad record{'s' * (len(problems) > 1)}:"] + [f"  {p}" for p in problems[:most]]
    return "\n".join(lines + [f"  ... and {len(problems) - most} more"] * (len(problems) > most))


def scan(path, image_dir=None, subset=None, limit=None, seed=0, with_images=True, processor=None, max_length=2048):
    """-> (good examples, a line for each bad record, number of records without a preference)."""
    records, problems = load_records(path)
    roots = [Path(image_dir or Path(path).parent)]
    if not roots[0].is_dir():
        raise BadInput(f"{roots[0]}: no such image folder")
    roots.append(roots[0] / "merged_images")
    placeholders = {"<image>"} | {getattr(processor, name, None) for name in ("image_token", "boi_token")} - {None}

    examples, unpaired, wheres = [], 0, {}
    for number, record in records:
        id = record.get("id", number) if isinstance(record, dict) else number
        if subset and not str(id).startswith(subset):
            continue
        where = f"record {number}" + (f" (id {id})" if id != number else "")
        try:
            example = parse_record(record, str(id), roots, placeholders, with_images)
        except BadInput as error:
            problems.append(f"{where}: {error}")
            continue
        if example is None:
            unpaired += 1
        else:
            examples.append(example)
            wheres[len(examples) - 1] = where
    chosen = range(len(examples))
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(seed).sample(chosen, limit))

    checker = RoomChecker(processor, max_length) if processor is not None else None

    def check(index):
        try:
            sizes = [open_image(image).size for image in examples[index].images]
            if checker:
                checker(examples[index].question, sizes)
        except BadInput as error:
            return f"{wheres[index]}: {error}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(check, chosen), total=len(chosen), desc="checking data", disable=None, leave=False)
        found = list(bar)
    problems += [problem for problem in found if problem]
    return [examples[i] for i, problem in zip(chosen, found) if not problem], problems, unpaired


def load_records(path):
    """JSON list or JSON lines, told apart by the first character -> [(number, record)], problems; numbers from 1."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a text file in UTF-8 ({error})") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1)), []
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}: not valid JSON: {error}") from None
    records, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(f"record {number}: not valid JSON: {error}")
    if problems and not records:
        raise BadInput(f"{path}: neither a JSON list nor JSON lines ({problems[0]})")
    return records, problems


def parse_record(record, id, roots, placeholders, with_images):
    """One record of any known format -> Example, or None if it expresses no preference. Raises BadInput."""
    if not isinstance(record, dict):
        raise BadInput(f"is {kind(record)}, not an object")
    image = field(record, "img_path", "image", "images", "image_path", required=False)
    if "completions" in record:  # VLFeedback (Silkie)
        question, pair = field(record, "prompt"), best_and_worst(record["completions"])
        if pair is None:
            return None
        chosen, rejected = pair
        image = image or f"{id}.jpg"
    else:  # the authors' release, TRL's vision preferences and their like
        chosen, rejected = field(record, "chosen"), field(record, "rejected")
        question = field(record, "prompt", "question", required=False) or shared_turns(chosen, rejected)
        chosen, rejected = answer_of(chosen, "chosen"), answer_of(rejected, "rejected")
    images = find_images(image, roots) if with_images else []
    if isinstance(question, list):
        question = read_messages(question, len(images) if with_images else None)
    elif isinstance(question, str):
        shown = question.count("<image>")
        if with_images and shown not in (0, len(images)):
            raise BadInput(f"'prompt' shows {shown} images, the record has {len(images)}")
        question = bare_question(question)
    else:
        raise BadInput(f"'prompt' is {kind(question)}, neither text nor a list of chat messages")
    chosen, rejected = chosen.strip(), rejected.strip()

    texts = [("prompt", text) for text in texts_of(question)] + [("chosen", chosen), ("rejected", rejected)]
    for name, text in texts:
        if not text.strip():
            raise BadInput(f"'{name}' is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):  # of JSON, not of UTF-8
            raise BadInput(f"'{name}' holds half a character (a lone surrogate)")
        for placeholder in placeholders:
            if placeholder in text:
                raise BadInput(f"'{name}' holds the image token {placeholder!r} in its text")
    if chosen == rejected:
        raise BadInput("'chosen' and 'rejected' are equal")
    return Example(id, question, chosen, rejected, images[0] if len(images) == 1 else images or None)


def texts_of(question):
    """The texts of a question, or of chat messages: system text, earlier turns and question."""
    if isinstance(question, str):
        return [question]
    return [part["text"] for message in question for part in message["content"] if part["type"] == "text"]


def kind(value):
    return {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )


def field(record, *names, required=True):
    for name in names:
        if record.get(name) is not None:
            return record[name]
    if required:
        raise BadInput(f"has no field {' or '.join(map(repr, names))}")


def shared_turns(chosen, rejected):
    """The turns before the last of two conversations, where a record has them in place of a prompt."""
    if not (isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1):
        raise BadInput("has no field 'prompt' or 'question'")
    if chosen[:-1] != rejected[:-1]:
        raise BadInput("'chosen' and 'rejected' differ before their last turn")
    return chosen[:-1]


def answer_of(value, name):
    """A response: plain text, or the last one of chat messages."""
    if isinstance(value, str):
        return value
    message = read_message(value[-1] if isinstance(value, list) and value else value, name)
    if message["role"] != "assistant" or any(part["type"] == "image" for part in message["content"]):
        raise BadInput(f"'{name}' must end in an assistant message of text")
    return "\n".join(texts_of([message]))


def read_messages(messages, n_images):
    """Chat messages up to the question, checked -> the same with an image part where each image belongs.

    n_images: how many the record has; None for any number. Where no message shows an image, the first of the user's
    opens with all of them. A lone question after its images becomes plain text.
    """
    messages = [read_message(message, "prompt") for message in messages]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise BadInput(f"'prompt' has the roles {roles}: user and assistant must take turns, and the user ends")
    parts = [part for message in messages for part in message["content"]]
    shown = sum(part["type"] == "image" for part in parts)
    if shown == 0 and n_images:
        first = messages[roles.index("user")]
        first["content"] = [{"type": "image"}] * n_images + first["content"]
    elif n_images not in (None, shown):
        raise BadInput(f"'prompt' shows {shown} images, the record has {n_images}")
    content = messages[0]["content"]
    if roles == ["user"] and len(texts_of(messages)) == 1 and content[-1]["type"] == "text":
        return content[-1]["text"].strip()
    return messages


def read_message(message, name):
    """One chat message -> {"role", "content": parts of type "text" or "image"}. Raises BadInput."""
    if not isinstance(message, dict):
        raise BadInput(f"'{name}' is {kind(message)}, neither text nor a list of chat messages")
    if message.get("role") not in ("system", "user", "assistant"):
        raise BadInput(f"'{name}' holds a message whose role is not system, user or assistant")
    content, parts = message.get("content"), []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else as_list(content):
        if isinstance(part, dict) and part.get("type") == "image":
            parts.append({"type": "image"})
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise BadInput(f"'{name}' holds a message part that is neither text nor an image")
    if not any(part["type"] == "text" for part in parts):
        raise BadInput(f"'{name}' holds a message without text")
    return {"role": message["role"], "content": parts}


def bare_question(prompt):
    """The question alone, out of the authors' prompts, which hold Bunny's whole template, or of `<image>\\nquestion`."""
    template = re.fullmatch(r"(?P<system>.*?)\s*USER: (?P<question>.*) ASSISTANT:\s*", prompt, re.DOTALL)
    if template and template["system"] not in ("", BUNNY_SYSTEM):
        raise BadInput("'prompt' opens with a system text that is not Bunny's")
    question = (template["question"] if template else prompt).strip()
    return re.sub(r"^(<image>\s*)+|(\s*<image>)+$", "", question, count=1).strip()


def best_and_worst(completions):
    """VLFeedback's completions -> responses with the highest and lowest mean rating; None if tied or unrated."""
    rated = []
    try:
        if isinstance(completions, dict):  # exported through `datasets`: a dict of lists, at any depth
            completions = [row(completions, i) for i in range(len(completions.get("response", ())))]
        for completion in completions:
            ratings = [str(aspect["Rating"]).strip() for aspect in completion["annotations"].values()]
            response = re.sub(r"【[^】]*†[^】]*】", "", completion["response"])  # citation marks
            if ratings and all(re.fullmatch(r"\d{1,3}(\.\d+)?", rating) for rating in ratings):  # not "N/A"
                rated.append((statistics.mean(map(float, ratings)), response))
    except (LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"'completions' is not in VLFeedback's form ({error!r})") from None
    if not rated:
        return None
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    return None if best[0] == worst[0] else (best[1], worst[1])


def row(columns, i):
    return {k: row(v, i) for k, v in columns.items()} if isinstance(columns, dict) else columns[i]


def find_images(value, roots):
    """A path, or a list of them -> paths of files that are there. Raises BadInput."""
    images = [image.get("path") if isinstance(image, dict) else image for image in as_list(value)]
    if not images or not all(isinstance(image, str) and image for image in images):
        raise BadInput("has no image path ('img_path', 'image' or 'images')")
    return [find_image(image, roots) for image in images]


def find_image(image, roots):
    if os.path.isabs(image):
        roots = [Path("/")]
    elif Path(os.path.normpath(image)).parts[:1] == ("..",):
        raise BadInput(f"image path {image!r} climbs out of the image folder")
    for root in roots:
        if (root / image).is_file():
            return str(root / image)
    raise BadInput(f"no image {image!r} in {' or '.join(map(str, roots))}")


# ----------------------------------------------------------------------------------------------------------- images


def open_image(path):
    """Decode a whole image file -> RGB, turned as its EXIF orientation says. Raises BadInput."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value / 256).convert("L")
            return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except Exception as error:  # a broken file can make a decoder raise almost anything
        raise BadInput(f"image {path} cannot be decoded ({error})") from None


def reject_image(image, strategy="crop", rng=random, crop=CROP, other=None):
    """The rejected image m_l made from m_w (paper 3.1 and Table 3): PIL RGB -> PIL RGB of the same size.

    strategy: "crop" keeps a random part, its area uniform in `crop` (fractions), its aspect log-uniform in 3/4..4/3;
        "random" is the image `other`, centred and fitted; "moco" is MoCo v2's augmentation (arXiv:2003.04297).
    rng: a `random.Random`; the result is a pure function of the image and of its state.
    Raises ValueError for an unknown strategy, or "random" without `other`.
    """
    if strategy == "crop":
        return random_crop(image, rng, *crop)
    if strategy == "random":
        if other is None:
            raise ValueError("strategy 'random' needs the `other` image")
        return ImageOps.fit(other, image.size)
    if strategy == "moco":
        return moco_augment(image, rng)
    raise ValueError(f"unknown strategy {strategy!r}, choose from {STRATEGIES}")


def random_crop(image, rng, low, high):
    """A part of the image with `low` to `high` of its area, resized to the whole's size.

    The area is kept even where a long image has no room for the aspect: there the aspect gives way.
    """
    width, height = image.size
    area = rng.uniform(low, high) * width * height
    fits = lambda aspect: min(max(aspect, area / height**2), width**2 / area)  # box inside the image
    aspect = math.exp(rng.uniform(math.log(fits(3 / 4)), math.log(fits(4 / 3))))
    w = min(max(1, round(math.sqrt(area * aspect))), width)
    h = min(max(1, round(math.sqrt(area / aspect))), height)
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


def moco_augment(image, rng):
    """MoCo v2: crop 0.2-1, colour jitter, grey, blur, flip. Sigma is for 224 pixels, as there, and scales with size."""
    image = random_crop(image, rng, 0.2, 1.0)
    if rng.random() < 0.8:
        jitters = [
            lambda im: ImageEnhance.Brightness(im).enhance(rng.uniform(0.6, 1.4)),
            lambda im: ImageEnhance.Contrast(im).enhance(rng.uniform(0.6, 1.4)),
            lambda im: ImageEnhance.Color(im).enhance(rng.uniform(0.6, 1.4)),
            lambda im: shift_hue(im, rng.uniform(-0.1, 0.1)),
        ]
        rng.shuffle(jitters)
        for jitter in jitters:
            image = jitter(image)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * min(image.size) / 224))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def shift_hue(image, turn):
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + round(turn * 256)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class Pairs(torch.utils.data.Dataset):
    """Examples with their images: `pairs[epoch, index]` -> (question, chosen, rejected, image, rejected_image).

    The images are lists where an example has several: each is rejected on its own. A rejected image is a pure function
    of (seed, epoch, index): policy and reference share it, and a resumed run meets it again. "random" takes an image of
    `pool` (default: the examples' own) that is not among the example's. fixed: every epoch sees the first one's.
    """

    def __init__(self, examples, strategy="crop", crop=CROP, seed=0, pool=None, fixed=False):
        self.examples, self.strategy, self.crop, self.seed, self.fixed = examples, strategy, crop, seed, fixed
        self.pool = sorted({image for example in (pool or examples) for image in example.images})
        if strategy == "random" and any(example.images and set(self.pool) <= set(example.images) for example in examples):
            raise BadInput("rejected images of strategy 'random' need more different images in the data")

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        epoch, index = (0, key[1]) if self.fixed else key
        example = self.examples[index]
        rng = random.Random(f"{self.seed} {epoch} {index}")
        images, rejected_images = [], []
        for path in example.images:
            images.append(open_image(path))
            other = None
            if self.strategy == "random":
                while path in example.images:
                    path = rng.choice(self.pool)
                other = open_image(path)
            rejected_images.append(reject_image(images[-1], self.strategy, rng, self.crop, other))
        if not isinstance(example.image, list):
            images, rejected_images = (images or [None])[0], (rejected_images or [None])[0]
        return example.question, example.chosen, example.rejected, images, rejected_images


# ------------------------------------------------------------------------------------------------------------ batch

# Sequences of an example: (which image: 0 is m_w and 1 m_l, which responses: indices into LogPs).
LAYOUTS = {
    "packed": ((0, (0, 1)), (1, (2,))),  # [m_w | q | y_w | y_l], [m_l | q | y_w]
    "plain": ((0, (0,)), (0, (1,)), (1, (2,))),  # [m_w | q | y_w], [m_w | q | y_l], [m_l | q | y_w]
}


def make_batch(items, processor, layout="packed", image_rejected=True, max_length=2048):
    """Lay B examples out as sequences of tokens, for `mdpo.response_logps`.

    items: B tuples (question, chosen, rejected, image, rejected_image). The question is text, or chat messages as in
        `Example`; the images are PIL RGB, or lists of them, or None: no images.
    processor: an image-text-to-text processor with a chat template; its tokenizer has a pad token.
    layout: "packed": 2 sequences an example, all end to end in R = 1 row without padding; or "plain": 3, a row each.
    image_rejected: False leaves out the sequences with m_l.
    max_length: tokens of prompt and one response; a longer response is cut on the right, the prompt never is.
    Returns a dict; sequences are ordered by kind, then by example:
        input_ids (R, T)
        packed: position_ids (R, T), and lengths, the list of tokens in each sequence's prefix and each of its responses,
            see `mdpo.PackedMask`; plain: attention_mask (R, T)
        predictors, targets (R, K): positions whose logits predict a response token, and these tokens
        slots (R, K): the response that a token counts for, index into LogPs * B + example; -1 in padding
        processor_keys: names of what else the processor returned; each is in the dict, too, such as pixel_values with
            the images of all sequences in order, or token types, (R, T), which are 0 for the responses
        batch_size: B; has_image_rejected
    Raises BadInput where a prompt leaves no room for a response, or where the processor does what rows cannot follow.
    """
    tokenized = [tokenize(processor, *item[:3], len(as_list(item[3]))) for item in items]
    kinds = LAYOUTS[layout][: None if image_rejected else -1]
    sequences = [(i, image, fields) for image, fields in kinds for i in range(len(items))]
    prefixes, image_inputs = expand_prefixes(
        processor, [(tokenized[i], as_list(items[i][3 + image])) for i, image, _ in sequences]
    )
    rows, lengths = [], []
    for (i, _, fields), prefix in zip(sequences, prefixes):
        if layout == "plain" or not rows:
            rows.append({name: [] for name in ("position_ids", "predictors", "targets", "slots", *prefix)})
        row, start = rows[-1], len(prefix["input_ids"])
        room = room_for_response(start, max_length)
        for name, values in prefix.items():
            row[name] += values
        row["position_ids"] += range(start)
        lengths.append([start])
        last = len(row["input_ids"]) - 1
        for field_index in fields:
            response = tokenized[i].responses[field_index == 1][:room]  # y_l for field 1, else y_w
            end = len(row["input_ids"])
            # The prefix's last token predicts the first of each response, whose positions go on where the prefix ended.
            row["predictors"] += [last, *range(end, end + len(response) - 1)]
            row["position_ids"] += range(start, start + len(response))
            row["slots"] += [field_index * len(items) + i] * len(response)
            row["targets"] += response
            row["input_ids"] += response
            for name in prefix.keys() - {"input_ids"}:
                row[name] += [0] * len(response)
            lengths[-1].append(len(response))

    padding = {"input_ids": processor.tokenizer.pad_token_id, "slots": -1}
    as_rows = lambda name: pad_sequence([torch.tensor(row[name]) for row in rows], True, padding.get(name, 0))
    batch = {name: as_rows(name) for name in rows[0]} | image_inputs
    if layout == "packed":
        batch["lengths"] = lengths
    else:  # in a row of its own a sequence's positions are what the model takes them to be
        del batch["position_ids"]
        batch["attention_mask"] = pad_sequence([torch.ones(sum(sequence), dtype=torch.long) for sequence in lengths], True)
    keys = [*image_inputs, *(prefixes[0].keys() - {"input_ids"})]
    return batch | {"processor_keys": keys, "batch_size": len(items), "has_image_rejected": image_rejected}


def to_device(batch, device):
    """The batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def expand_prefixes(processor, rows):
    """[(Tokenized, images)] -> what all responses of each row share, and what the processor makes of all the images.

    The first is a dict a row: input_ids, with the tokens of the images in place, and what else the processor says of
    each token (its type). The second is a dict of tensors: pixel_values and, for some models, sizes or grids.
    """
    if not any(images for _, images in rows):
        return [{"input_ids": tokens.prompt_ids[: tokens.n_shared]} for tokens, _ in rows], {}
    encoded = encode_prompts(processor, [tokens.prompt for tokens, _ in rows], [images for _, images in rows])
    masks = encoded.pop("attention_mask").bool()
    per_token = {name: values for name, values in encoded.items() if values.shape[:2] == masks.shape}
    for name, values in per_token.items():
        if values.ndim > 2:
            raise BadInput(f"this model's processor returns {name} of shape {tuple(values.shape)}, which is not known "
                           "how to extend to the responses")  # fmt: skip
    prefixes = []
    for i, (tokens, _) in enumerate(rows):
        prefix = {name: values[i][masks[i]].tolist() for name, values in per_token.items()}
        # What follows the image is tokenised alike with one placeholder and with its hundreds of tokens.
        end = len(prefix["input_ids"]) - len(tokens.prompt_ids) + tokens.n_shared
        if prefix["input_ids"][end:] != tokens.prompt_ids[tokens.n_shared :]:
            raise BadInput("this model's chat template changes the text before the image once a response is there")
        prefixes.append({name: values[:end] for name, values in prefix.items()})
    return prefixes, {name: values for name, values in encoded.items() if name not in per_token}


class Tokenized(NamedTuple):
    prompt: str  # with one placeholder for each image
    wholes: tuple[str, str]  # prompt and y_w, prompt and y_l
    prompt_ids: list[int]
    n_shared: int  # tokens that prompt, prompt + y_w and prompt + y_l begin with; responses are what follows
    n_after: tuple[int, int]  # how many tokens of either whole follow them
    responses: tuple[list[int], list[int]]  # y_w, y_l, each with its end-of-sequence, the last of its tokens


def tokenize(processor, question, chosen, rejected, n_images):
    """Texts -> `Tokenized`. Prompt and response are tokenised whole, since tokens may merge across the boundary."""
    tokenizer = processor.tokenizer
    messages = chat_messages(question, n_images)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # A stand-in for the response shows what the template puts before it and after it.
    stand_in = "\ue000"
    assistant = {"role": "assistant", "content": [{"type": "text", "text": stand_in}]}
    # The last one: the question may hold the same character.
    before, _, after = processor.apply_chat_template([*messages, assistant], tokenize=False).rpartition(stand_in)
    ending = after.strip() or tokenizer.eos_token
    if prompt == processor.apply_chat_template(messages, tokenize=False) and before.startswith(prompt):
        # A template without a generation prompt: what opens the answer is not to be learned. Tabs may be an image.
        prompt = before.rstrip(" \n")
    wholes = before + chosen + ending, before + rejected + ending

    special = {"add_special_tokens": not starts_with_bos(processor, prompt)}
    prompt_ids, *whole_ids = (tokenizer(text, **special).input_ids for text in (prompt, *wholes))
    n_shared = 0
    for tokens in zip(prompt_ids, *whole_ids):
        if len(set(tokens)) > 1:
            break
        n_shared += 1
    responses = []
    for ids in whole_ids:
        response = ids[n_shared:]
        if tokenizer.eos_token_id in response:  # what follows the first end-of-sequence is never generated
            response = response[: response.index(tokenizer.eos_token_id) + 1]
        responses.append(response)
    n_after = tuple(len(ids) - n_shared for ids in whole_ids)
    return Tokenized(prompt, wholes, prompt_ids, n_shared, n_after, tuple(responses))


def chat_messages(question, n_images):
    """A question, or chat messages up to one -> chat messages; without images where n_images is 0."""
    if isinstance(question, str):
        return [{"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": question}]}]
    keep = lambda part: n_images or part["type"] != "image"
    return [{**message, "content": [*filter(keep, message["content"])]} for message in question]


def starts_with_bos(processor, text):
    bos = processor.tokenizer.bos_token
    return bos is not None and text.startswith(bos)


def encode_prompts(processor, prompts, images):
    """The processor's own call on prompts and a list of images for each: padded as for generation."""
    return processor(
        text=prompts,
        images=images if any(images) else None,
        add_special_tokens=not starts_with_bos(processor, prompts[0]),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


class RoomChecker:
    """Raises BadInput for a question whose prompt leaves no room for one response token within max_length."""

    def __init__(self, processor, max_length):
        self.processor, self.max_length, self.extra = processor, max_length, {(): 0}

    def __call__(self, question, image_sizes):
        tokenized, sizes = tokenize(self.processor, question, "a", "b", len(image_sizes)), tuple(image_sizes)
        if sizes not in self.extra:  # how many tokens images of these sizes add to their placeholders
            (prefix,), _ = expand_prefixes(self.processor, [(tokenized, [Image.new("RGB", size) for size in sizes])])
            self.extra[sizes] = len(prefix["input_ids"]) - tokenized.n_shared
        room_for_response(tokenized.n_shared + self.extra[sizes], self.max_length)


def room_for_response(prompt_length, max_length):
    if prompt_length >= max_length:
        raise BadInput(
            f"image and question take {prompt_length} tokens of --max-length {max_length}: no room to answer"
        )
    return max_length - prompt_length


# ----------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a preference file and its images, without any model.")
    parser.add_argument("file")
    parser.add_argument("--images", metavar="DIR", help="where relative image paths begin (default: the file's folder)")
    parser.add_argument("--subset", metavar="PREFIX", help="only ids that begin so, e.g. llava (paper 4.1)")
    args = parser.parse_args(argv)
    try:
        examples, problems, unpaired = scan(args.file, args.images, args.subset)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.file}: {len(examples)} good, {len(problems)} bad, {unpaired} without a preference")
    print(f"images: {len({image for example in examples for image in example.images})} different")
    for name in ("question", "chosen", "rejected"):
        lengths = [len(" ".join(texts_of(getattr(example, name))).split()) for example in examples] or [0]
        print(f"{name + ' words:':16} mean {statistics.mean(lengths):.1f}, median {statistics.median(lengths):g}, "
              f"longest {max(lengths)}")  # fmt: skip
    if problems:
        print(report(problems, most=len(problems)), file=sys.stderr)
    return 1 if problems or not examples else 0


if __name__ == "__main__":
    sys.exit(main())
