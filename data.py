"""Preference data for mDPO: rejected images, batches, file formats.

`python data.py FILE [--images DIR]` checks a file without any model.
"""

import argparse
import errno
import json
import math
import os
import random
import re
import statistics
import sys
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mdpo import known_arguments


class Example(NamedTuple):
    """One preference: `chosen` is better than `rejected` as an answer to `question` about the images."""

    question: list[dict] | str  # q: chat messages; text stands for one message that shows all images first
    chosen: str  # y_w
    rejected: str  # y_l
    images: tuple[str | Image.Image, ...]  # m_w: paths, or RGB images once `Pairs` has opened them
    images_rejected: tuple[str | Image.Image, ...] = ()  # m_l, one for each: the record's own, or of `Pairs`
    id: str = ""


BUNNY_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# -------------------------------------------------------------------------------------------- rejected images

CROP = (0.01, 0.2)  # area that is kept: the paper says 0-20%, its code keeps 1-20%


def random_crop(image, rng, area=CROP):
    """a part of the image, resized to the whole's size"""
    # Area uniform in `area`, aspect log-uniform in 3/4..4/3, or as near to it as a long image allows.
    width, height = image.size
    n_pixels = max(1, rng.uniform(*area) * width * height)
    fits = lambda aspect: min(max(aspect, n_pixels / height**2), width**2 / n_pixels)  # box inside the image
    aspect = math.exp(rng.uniform(math.log(fits(3 / 4)), math.log(fits(4 / 3))))
    w, h = (max(1, round(math.sqrt(n))) for n in (n_pixels * aspect, n_pixels / aspect))
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


def another_image(image, rng, other):
    """another image of the data, centred and fitted"""
    return ImageOps.fit(other(), image.size)


def moco_augment(image, rng):
    """MoCo v2's augmentation (arXiv:2003.04297): crop of 20-100%, colour jitter, grey, blur, flip"""
    image = random_crop(image, rng, (0.2, 1.0))
    if rng.random() < 0.8:
        kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, None]  # None: the hue
        rng.shuffle(kinds)
        for kind in kinds:
            if kind is None:
                image = shift_hue(image, rng.uniform(-0.1, 0.1))
            else:
                image = kind(image).enhance(rng.uniform(0.6, 1.4))
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:  # sigma is for 224 pixels, as there, and scales with the image
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * min(image.size) / 224))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def shift_hue(image, turn):
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda level: (level + round(turn * 256)) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


# How a rejected image is made (section 3.1, Table 3): functions of an image and a `random.Random` that return
# an image of the same size. They may take area (--crop), and other, which opens another image of the data.
STRATEGIES = {"crop": random_crop, "random": another_image, "moco": moco_augment}


class Pairs:
    """Examples with their images: `pairs[epoch, index]` -> `Example`.

    Rejected images are a pure function of (seed, epoch, index): policy and reference share them, and resumed
    runs see them again. "random" takes an image of `pool` (default: the examples), but not of the example.
    An example's own rejected images take the place of the strategy.
    """

    def __init__(self, examples, strategy="crop", crop=CROP, seed=0, pool=None):
        self.examples, self.strategy, self.crop, self.seed = examples, strategy, crop, seed
        self.pool = sorted({image for example in pool or examples for image in example.images})
        drawn = [example for example in examples if not example.images_rejected]
        if strategy == "random" and any(0 < len(self.pool) <= len({*example.images}) for example in drawn):
            raise BadInput("rejected images of strategy 'random' need more different images in the data")

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        epoch, index = key
        example, rng = self.examples[index], random.Random(f"{self.seed} {epoch} {index}")

        def other():
            while (path := rng.choice(self.pool)) in example.images:
                pass
            return open_image(path)

        images = tuple(map(open_image, example.images))
        images_rejected = tuple(map(open_image, example.images_rejected))
        if not images_rejected:
            reject = STRATEGIES[self.strategy]
            options = known_arguments(reject, {"area": self.crop, "other": other})
            images_rejected = tuple(reject(image, rng, **options) for image in images)
        return example._replace(images=images, images_rejected=images_rejected)


def open_image(path):
    """Decode a whole image file -> RGB, turned as its EXIF orientation says. Raises BadInput."""
    with about(f"image {path} cannot be decoded"), Image.open(path) as image:
        if max(image.size) > 50 * min(image.size) or image.width * image.height > 100e6:
            size = f"{image.width} x {image.height} pixels"
            raise BadInput(f"{size}: sides differ more than 50-fold, or more than 100 million pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------ batch

# Each field of `LogPs` is the log-probability of a response given images: (images, response) in `Example`.
SCORED = {
    "chosen": ("images", "chosen"),
    "rejected": ("images", "rejected"),
    "image_rejected": ("images_rejected", "chosen"),
}
LAYOUTS = ("packed", "plain")


def make_batch(pairs, processor, layout="packed", names=tuple(SCORED), max_length=2048):
    """Lay B pairs out as sequences of tokens, for `mdpo.response_logps`.

    layout: "packed": responses to the same images share a sequence, [m_w|q|y_w|y_l] and [m_l|q|y_w], and all
        sequences lie end to end in one row (R = 1). "plain": a sequence and a padded row for each response.
    names: the fields of `LogPs` to compute. DPO needs only two.
    max_length: tokens of prompt and one response. A longer response is cut on the right, alike for all images
        of its pair; the prompt never is.
    Returns a dict. For one pair, with m_w = 77 77, q = 5 6, y_w = 1 2, y_l = 3 and end-of-sequence 0, it is

        input_ids (R, T)      77 77  5  6 | 1  2  0 | 3  0 || 77 77  5  6 | 1  2  0
        position_ids (R, T)    0  1  2  3   4  5  6   4  5     0  1  2  3   4  5  6
        lengths               [[4, 3, 2], [4, 3]]: tokens of each sequence's prefix and of its responses
                              (None in plain rows)
        predictors (R, K)      3  4  5 | 3  7 | 12 13 14: the positions whose logits predict response tokens
        targets (R, K)         1  2  0 | 3  0 |  1  2  0: those tokens, -100 in padding
        n_targets             [3, 2, 3]: how many of each response: names[0] of each pair, then names[1], ...
        names, ids            as above, and the ids of the examples
        processor_keys        names of what else the processor returned. Each is in the dict: pixel_values
                              of all sequences in order and, for some models, grids, or token types (R, T)

    Raises BadInput if a prompt leaves no room for a response, or if rows cannot extend the processor output.
    """
    groups = {}  # names that share a sequence
    for name in names:
        groups.setdefault(SCORED[name][0] if layout == "packed" else name, []).append(name)
    sequences = [(i, group) for group in groups.values() for i in range(len(pairs))]
    texts = [tokenize(processor, pair) for pair in pairs]
    images = [getattr(pairs[i], SCORED[group[0]][0]) for i, group in sequences]
    prefixes, image_inputs = expand_prefixes(processor, [texts[i] for i, _ in sequences], images)

    rows, lengths, scored = [], [], {}
    for (i, group), prefix in zip(sequences, prefixes):
        longest = max(len(prefix["input_ids"]) for prefix in prefixes[i :: len(pairs)])  # of the pair's
        if longest >= max_length:
            raise BadInput(f"prompt of {longest} tokens, --max-length {max_length}: no room for a response")
        responses = [texts[i].responses[SCORED[name][1]][: max_length - longest] for name in group]
        sequence, predictors = lay_out(prefix, responses)
        if layout == "plain" or not rows:
            rows.append(defaultdict(list))
        start = len(rows[-1]["input_ids"])
        for name, values in sequence.items():
            rows[-1][name] += values
        for name, positions, response in zip(group, predictors, responses):
            scored[name, i] = [start + position for position in positions], response
        lengths.append([len(prefix["input_ids"]), *map(len, responses)])

    predictors, targets = zip(*(scored[name, i] for name in names for i in range(len(pairs))))
    n_targets = [*map(len, targets)]
    if layout == "packed":
        predictors, targets = [sum(predictors, [])], [sum(targets, [])]
    else:
        n_targets, lengths = [max(n_targets)] * len(n_targets), None
    as_rows = lambda rows, padding=0: pad_sequence([torch.tensor(row) for row in rows], True, padding)
    pad = processor.tokenizer.pad_token_id
    inputs = {
        name: as_rows([row[name] for row in rows], pad if name == "input_ids" else 0) for name in rows[0]
    } | image_inputs
    return inputs | {
        "predictors": as_rows(predictors),
        "targets": as_rows(targets, -100),
        "n_targets": n_targets,
        "lengths": lengths,
        "names": names,
        "ids": [pair.id for pair in pairs],
        "processor_keys": [name for name in inputs if name not in ("input_ids", "position_ids")],
    }


def lay_out(prefix, responses):
    """One sequence: prefix, responses -> {name: list of numbers}, the positions that predict each response.

    The prefix's last token predicts the first token of each response, whose positions continue the prefix's.
    """
    n_prefix = len(prefix["input_ids"])
    ids, positions, predictors = [*prefix["input_ids"]], [*range(n_prefix)], []
    for response in responses:
        predictors.append([n_prefix - 1, *range(len(ids), len(ids) + len(response) - 1)])
        positions += range(n_prefix, n_prefix + len(response))
        ids += response
    types = [0] * (len(ids) - n_prefix)  # of text
    sequence = {name: values + types for name, values in prefix.items()}
    return sequence | {"input_ids": ids, "position_ids": positions}, predictors


def expand_prefixes(processor, texts, images):
    """Run the processor on prompts and images -> the prefix of each sequence, and the tensors of all images.

    A prefix is a dict of lists: input_ids, with image tokens in place, and other values per token (its type).
    The tensors are a dict: pixel_values and, for some models, sizes or grids.
    """
    encoded = encode_prompts(processor, [tokens.prompt for tokens in texts], images)
    masks = encoded.pop("attention_mask").bool()
    per_token = {name: values for name, values in encoded.items() if values.shape[:2] == masks.shape}
    for name, values in per_token.items():
        if values.ndim > 2:  # such as Mllama's cross-attention mask
            raise BadInput(f"its processor returns {name}, which a response cannot extend")
    prefixes = []
    for i, (mask, tokens) in enumerate(zip(masks, texts)):
        n = mask.sum() - tokens.n_merged
        prefixes.append({name: values[i][mask][:n].tolist() for name, values in per_token.items()})
    return prefixes, {name: values for name, values in encoded.items() if name not in per_token}


class Tokens(NamedTuple):
    """The texts of a pair, tokenised, with one placeholder for an image."""

    prompt: str
    n_merged: int  # how many of the prompt's last tokens merge with a response: these are not shared
    wholes: dict[str, str]  # "chosen", "rejected" -> prompt and response, up to its first end-of-sequence
    responses: dict[str, list[int]]  # their tokens behind the common prefix


def tokenize(processor, pair):
    """A pair -> `Tokens`. Prompt and response are tokenised together, since tokens may merge across them."""
    tokenizer = processor.tokenizer
    messages = chat_messages(pair.question, len(pair.images))
    template = partial(processor.apply_chat_template, tokenize=False)
    prompt = template(messages, add_generation_prompt=True)
    stand_in = "\ue000"  # in place of the response, it shows what the template puts before it and after it
    assistant = {"role": "assistant", "content": [{"type": "text", "text": stand_in}]}
    before, _, after = template([*messages, assistant]).rpartition(stand_in)  # the question may hold it, too
    ending = after.strip() or tokenizer.eos_token
    if prompt == template(messages) and before.startswith(prompt):
        # A template without a generation prompt. Tabs are not stripped: they are Bunny's image token.
        prompt = before.rstrip(" \n")
    wholes = {}
    for name in ("chosen", "rejected"):
        answer, eos, _ = (getattr(pair, name) + ending).partition(tokenizer.eos_token)
        wholes[name] = before + answer + eos  # text after the end-of-sequence is dropped

    prompt_ids, *whole_ids = (tokenizer(text).input_ids for text in (prompt, *wholes.values()))
    n_shared = len(os.path.commonprefix([prompt_ids, *whole_ids]))  # of lists as well as of paths
    responses = {name: ids[n_shared:] for name, ids in zip(wholes, whole_ids)}
    return Tokens(prompt, len(prompt_ids) - n_shared, wholes, responses)


def chat_messages(question, n_images):
    """The question as chat messages; without images if n_images is 0."""
    if isinstance(question, str):
        text = {"type": "text", "text": question}
        question = [{"role": "user", "content": [{"type": "image"}] * n_images + [text]}]
    keep = lambda part: n_images or part["type"] != "image"
    return [{**message, "content": [*filter(keep, message["content"])]} for message in question]


def encode_prompts(processor, prompts, images):
    """The processor's own call on prompts and a tuple of images for each: padded as for generation."""
    bos = processor.tokenizer.bos_token
    return processor(
        text=prompts,
        images=[[*of_prompt] for of_prompt in images] if any(images) else None,
        add_special_tokens=bos is None or not prompts[0].startswith(bos),
        padding=len(prompts) > 1,
        padding_side="left",
        return_tensors="pt",
    )


# ---------------------------------------------------------------------------------------------------- reading


def read_examples(path, image_dir=None, *, subset=None, limit=None, seed=0, with_images=True, skip_bad=False,
                  processor=None, max_length=2048, log=print):  # fmt: skip
    """Read a preference file of any known format (README, "Data") -> list of `Example`, each checked.

    image_dir: where relative image paths begin (default: the file's folder); also in its `merged_images/`.
    subset: keep the ids that begin so. limit: a sample of so many, drawn by `seed`.
    with_images: False leaves every image out, and needs none. skip_bad: drop bad records instead of raising.
    processor, max_length: if given, prompts must leave room to answer, and texts hold no image token.
    Raises BadInput, listing bad records and their reasons, or if nothing is left.
    """
    folder = Path(image_dir or Path(path).parent)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such image folder")
    roots = [folder, folder / "merged_images"] if with_images else None
    parts, kinds = [processor, processor.tokenizer] if processor else [], ("image", "boi", "video")
    image_tokens = {getattr(part, f"{kind}_token", None) for part in parts for kind in kinds}
    placeholders = image_tokens - {None} | {"<image>"}
    found, problems, n_unpaired = [], {}, 0

    def attempt(number, id, function, *arguments):  # -> what it returns, or None after noting a problem
        try:
            with about(f"record {number}" + f" (id {id})" * (id != str(number))):
                return function(*arguments)
        except BadInput as error:
            cause = error.__cause__
            full = getattr(cause, "errno", None) == errno.ENOSPC or str(cause).startswith("CUDA")
            if full or isinstance(cause, MemoryError):  # no fault of the record
                raise
            problems[number] = str(error)

    for number, record in load_records(path):
        if isinstance(record, str):
            record = attempt(number, str(number), json.loads, record)
        fields = record if isinstance(record, dict) else {}
        id = str(number if fields.get("id") is None else fields["id"])
        if number in problems or subset and fields is record and not id.startswith(subset):
            continue
        example = attempt(number, id, parse_record, record, id, roots, placeholders)
        if example:
            found.append((number, example))
        n_unpaired += example is None and number not in problems
    if limit is not None and limit < len(found):
        found = sorted(random.Random(seed).sample(found, limit))

    def check(example):  # as training will use it, so that whatever fails there fails here
        pairs = [Pairs([example])[0, 0]]
        # One prompt at a time: to pad two is not safe among threads. A rejected image that will be drawn has
        # the size of its image: it needs no check.
        sequences = [("chosen", "rejected"), ("image_rejected",)][: 1 + bool(example.images_rejected)]
        for names in sequences if processor else ():
            make_batch(pairs, processor, names=names, max_length=max_length)
        return example

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = pool.map(lambda one: attempt(one[0], one[1].id, check, one[1]), found)
        checked = [*tqdm(checked, total=len(found), desc="checking data", disable=None, leave=False)]
    if problems:
        lines = [problems[number] for number in sorted(problems)]
        lines[20:] = [f"... and {len(lines) - 20} more"] * (len(lines) > 20)
        what = "dropped" if skip_bad else "--skip-bad would drop"
        report = "\n  ".join([f"{path}: {what} {len(problems)} bad records:", *lines])
        if not skip_bad:
            raise BadInput(report)
        log(report)
    if n_unpaired:
        log(f"{path}: left out {n_unpaired} records whose best and worst rating are equal or missing")
    examples = [*filter(None, checked)]
    if not examples:
        raise BadInput(f"{path}: no example is left" + (f" with an id in {subset!r}" if subset else ""))
    return examples


def load_records(path):
    """A JSON list or JSON lines, by the first character -> [(number from 1, record or its line)]."""
    with about(f"{path}: cannot be read"):
        text = Path(path).read_text("utf-8-sig", "surrogateescape")
        if text.lstrip().startswith("["):
            return [*enumerate(json.loads(text), 1)]
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def parse_record(record, id, roots, placeholders):
    """One record of any known format -> `Example`, or None if it expresses no preference. Raises BadInput.

    roots: folders where relative image paths begin; None: no images. placeholders: no text may hold them.
    """
    field = next((field for field in FORMATS if record.get(field) is not None), None)
    if field is None:
        raise BadInput(f"has no field {' or '.join(map(repr, FORMATS))}")
    preference = FORMATS[field](record, id)
    if preference is None:
        return None
    question, chosen, rejected, images = preference
    images = find_images(images, roots) if roots else ()
    own = first(record, "rejected_images", "rejected_image")
    images_rejected = find_images(own, roots) if roots and own else ()
    if images_rejected and len(images_rejected) != len(images):
        raise BadInput(f"has {len(images)} images and {len(images_rejected)} rejected images")
    question = read_question(question, len(images) if roots else None)
    chosen, rejected = chosen.strip(), rejected.strip()
    texts = [("prompt", text) for text in texts_of(question)] + [("chosen", chosen), ("rejected", rejected)]
    for name, text in texts:
        if not text.strip():
            raise BadInput(f"'{name}' is empty")
        with about(f"'{name}'"):
            text.encode()  # raises for a lone surrogate, which JSON can hold and a tokenizer cannot
        for placeholder in placeholders:
            if placeholder in text:
                raise BadInput(f"'{name}' holds the image token {placeholder!r} in its text")
    if chosen == rejected:
        raise BadInput("'chosen' and 'rejected' are equal")
    return Example(question, chosen, rejected, images, images_rejected, id)


# ---------------------------------------------------------------------------------------------------- formats
#
# A format is a function: record, id -> question, chosen, rejected, image path or paths; or None if the record
# expresses no preference. The question is text or chat messages. Any exception marks the record as bad.


def from_vlfeedback(record, id):
    """VLFeedback (Silkie): the completion with the highest mean rating against the one with the lowest."""
    completions = record["completions"]
    if isinstance(completions, dict):  # exported through `datasets`: a dict of lists, at any depth
        completions = [row(completions, i) for i in range(len(completions["response"]))]
    rated = []
    for completion in completions:
        ratings = [str(aspect["Rating"]).strip() for aspect in completion["annotations"].values()]
        if ratings and all(re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?", rating) for rating in ratings):  # not "N/A"
            rated.append((statistics.mean(map(float, ratings)), completion["response"]))
    if not rated:
        return None
    (high, chosen), (low, rejected) = (best(rated, key=lambda pair: pair[0]) for best in (max, min))
    if high == low:
        return None
    citation = r"【[^【】†]*†[^【】]*】"
    chosen, rejected = (re.sub(citation, "", text) for text in (chosen, rejected))
    return record["prompt"], chosen, rejected, first(record, *IMAGE_FIELDS) or f"{id}.jpg"


def from_preference(record, id):
    """The authors' release, TRL's vision preferences and their like."""
    chosen, rejected = record["chosen"], record["rejected"]
    question = first(record, "prompt", "question")
    n_turns = len(question) if isinstance(question, list) else 1
    if question is None or isinstance(chosen, list) and len(chosen) - 1 > n_turns:  # conversations
        question = chosen[:-1]
        if not isinstance(question, list) or not question:
            raise BadInput("has no field 'prompt' or 'question'")
        if question != rejected[:-1]:
            raise BadInput("'chosen' and 'rejected' differ before their last turn")
    chosen, rejected = answer_of(chosen, "chosen"), answer_of(rejected, "rejected")
    return question, chosen, rejected, first(record, *IMAGE_FIELDS)


FORMATS = {"completions": from_vlfeedback, "chosen": from_preference}  # by the field that identifies it
IMAGE_FIELDS = ("img_path", "image", "images", "image_path")


def row(columns, i):
    return {k: row(v, i) for k, v in columns.items()} if isinstance(columns, dict) else columns[i]


def first(record, *names):
    """The first of these fields that is there and not null, or None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def find_images(value, roots):
    """A path, or a list of them -> paths of files that are there. Raises BadInput."""
    if not value:
        raise BadInput(f"has no image path ({' or '.join(map(repr, IMAGE_FIELDS))})")
    paths = []
    for image in value if isinstance(value, list) else [value]:
        image = image["path"] if isinstance(image, dict) else image
        if Path(os.path.normpath(image)).parts[:1] == ("..",):
            raise BadInput(f"image path {image!r} points outside the image folder")
        # An absolute path is taken as it is: root / path is the path.
        found = [root / image for root in roots if (root / image).is_file()]
        if not found:
            raise BadInput(f"no image {image!r} in {' or '.join(map(str, roots))}")
        paths.append(os.path.abspath(found[0]))  # one name for a file, for --reject random
    return tuple(paths)


def read_question(question, n_images):
    """Text, or chat messages up to the question -> chat messages with a part for each image.

    n_images: how many the record has; None for any number. If no message shows an image, the user's first
    message opens with all of them.
    """
    if isinstance(question, str):
        question = [{"role": "user", "content": without_template(question)}]
    messages = [read_message(message, "prompt") for message in question]
    roles = [message["role"] for message in messages]
    if not re.fullmatch("(system )?(user assistant )*user", " ".join(roles)):
        raise BadInput(f"'prompt' has the roles {roles}: user and assistant must take turns, user last")
    n_shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if n_images is not None and n_shown not in (0, n_images):
        raise BadInput(f"'prompt' shows {n_shown} images, the record has {n_images}")
    if n_shown == 0 and n_images:
        messages[roles.index("user")]["content"][:0] = [{"type": "image"}] * n_images
    return messages


def without_template(prompt):
    """The question, taken out of Bunny's template, in which the authors' data have it."""
    system, user, question = prompt.partition("USER: ")
    if not user or not question.rstrip().endswith(" ASSISTANT:"):
        return prompt
    if system.strip() not in ("", BUNNY_SYSTEM):
        raise BadInput("'prompt' opens with a system text that is not Bunny's")
    return question.rstrip().removesuffix(" ASSISTANT:")


def answer_of(value, name):
    """A response: text, or the last of chat messages."""
    if isinstance(value, str):
        return value
    message = read_message(value[-1] if isinstance(value, list) else value, name)
    if message["role"] != "assistant" or {"type": "image"} in message["content"]:
        raise BadInput(f"'{name}' must end in an assistant message of text")
    return "\n".join(texts_of([message]))


def read_message(message, name):
    """One chat message -> {"role", "content": parts of type "text" or "image"}. Raises BadInput.

    `<image>` at either end of a text stands for an image before it, as in LLaVA's data.
    """
    with about(f"'{name}'"):
        role, content, parts = message["role"], message["content"], []
        if role not in ("system", "user", "assistant"):
            raise BadInput(f"role {role!r} is not system, user or assistant")
        for part in [{"type": "text", "text": content.strip()}] if isinstance(content, str) else content:
            text = "<image>" if part["type"] == "image" else part["text"]
            around = [piece.strip() for piece in text.split("<image>") if piece.strip()]
            if "<image>" in text and len(around) < 2:  # else left in the text, where it is refused
                parts += [{"type": "image"}] * text.count("<image>")
                text = "".join(around)
            parts += [{"type": "text", "text": text}] if text else []
        if not texts_of([{"content": parts}]):
            raise BadInput("a message has no text")
    return {"role": role, "content": parts}


def texts_of(messages):
    """The texts of chat messages: system text, earlier turns and question."""
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


# ----------------------------------------------------------------------------------------------------- errors


class BadInput(ValueError):
    """A user's mistake, shown without a traceback: what was wrong, where, and what to do."""


@contextmanager
def about(what):
    """Whatever is raised inside becomes a `BadInput` of one line, which begins with what it was about."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        reason = re.sub(r"(?s)^Caught .*\n\S+: ", "", reason)  # a DataLoader worker's traceback
        if isinstance(error, KeyError):
            reason = f"has no {reason}"
        elif isinstance(error, json.JSONDecodeError):
            reason = f"not valid JSON: {reason}"
        elif isinstance(error, (AttributeError, IndexError, TypeError)):
            reason = f"is not in a known form ({reason})"
        raise BadInput(f"{one_line(what, 300)}: {one_line(reason)}") from error.__cause__ or error


def one_line(text, limit=1000):
    """The text without line breaks and other control characters, and cut where nobody reads on."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])


def run_command(command, argv=None, saves_memory="--device cpu"):
    """Run command(argv) -> its exit status. An error is one line: status 2, or 1 for a fault of this program.

    --debug raises it. saves_memory: the command's flags for a GPU that is too small.
    """
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):  # neither closed nor a notebook's
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # a log file shows it at once
    if "--debug" not in argv:
        warnings.simplefilter("ignore")  # of libraries: about their renames, or an image's odd metadata
    try:
        return command(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `| head`
        sys.stdout = None
        return 141
    except Exception as error:
        if "--debug" in argv:
            raise
        message, status = str(error), 2
        if isinstance(error, torch.OutOfMemoryError):
            message = f"out of GPU memory; what saves some: {saves_memory}"
        elif message.startswith("DataLoader worker"):  # raised wherever the main process is
            message += " (--workers 0 needs none)"
        elif not isinstance(error, (BadInput, OSError, MemoryError)):
            message, status = f"internal error, please report what --debug shows: {error!r}", 1
        print("error:", "\n  ".join(map(one_line, message.split("\n  "))), file=sys.stderr)
        return status


# ----------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message):  # one line, as for every other mistake
        raise BadInput(f"{message} (--help lists the arguments)")


def check_file(argv):
    parser = Parser(description="Check a preference file and its images, without any model.")
    parser.add_argument("file")
    parser.add_argument("--images", help="folder where relative image paths begin (default: the file's)")
    parser.add_argument("--subset", help="only ids that begin so, e.g. llava (paper 4.1)")
    args = parser.parse_args(argv)
    examples = read_examples(args.file, args.images, subset=args.subset)
    n_images = len({image for example in examples for image in example.images})
    n_own = sum(example.images_rejected != () for example in examples)
    print(f"{args.file}: {len(examples)} examples with {n_images} different images, no problems found; "
          f"{n_own} examples have their own rejected images")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_command(check_file))
