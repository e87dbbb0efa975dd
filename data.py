"""Preference data for mDPO: rejected images, batches, file formats.

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
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


class Example(NamedTuple):
    """One preference: `chosen` is better than `rejected` as an answer to `question` about the images."""

    question: list[dict] | str  # q: chat messages; text stands for one message that shows all images first
    chosen: str  # y_w
    rejected: str  # y_l
    images: tuple[str | Image.Image, ...]  # m_w: paths, or RGB images once `Pairs` has opened them
    images_rejected: tuple[str | Image.Image, ...] = ()  # m_l, one for each: the record's own, or of `Pairs`
    id: str = ""
    key: tuple = ()  # (epoch, index), set by `Pairs`


BUNNY_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# -------------------------------------------------------------------------------------------- rejected images

CROP = (0.01, 0.2)  # area that is kept: the paper says 0-20%, its code keeps 1-20%


def random_crop(image, rng, area=CROP, other=None):
    """a part of the image, resized to the whole's size"""
    # Area uniform in `area`, aspect log-uniform in 3/4..4/3, or as near to it as a long image allows.
    width, height = image.size
    n_pixels = max(1, rng.uniform(*area) * width * height)
    fits = lambda aspect: min(max(aspect, n_pixels / height**2), width**2 / n_pixels)  # box inside the image
    aspect = math.exp(rng.uniform(math.log(fits(3 / 4)), math.log(fits(4 / 3))))
    w, h = (max(1, round(math.sqrt(n))) for n in (n_pixels * aspect, n_pixels / aspect))
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


def another_image(image, rng, area, other):
    """another image of the data, centred and fitted"""
    return ImageOps.fit(other(), image.size)


def moco_augment(image, rng, area=None, other=None):
    """MoCo v2's augmentation (arXiv:2003.04297): crop of 20-100%, colour jitter, grey, blur, flip"""
    image = random_crop(image, rng, (0.2, 1.0))
    if rng.random() < 0.8:
        kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, shift_hue]
        rng.shuffle(kinds)
        for kind in kinds:
            if kind is shift_hue:
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


# How a rejected image is made (section 3.1, Table 3): functions of an image, a `random.Random`, the area of
# --crop and a function that opens another image of the data. They return an image of the same size.
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
            images_rejected = tuple(reject(image, rng, self.crop, other) for image in images)
        return example._replace(images=images, images_rejected=images_rejected, key=key)


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


@dataclass
class Batch:
    """B pairs as rows of tokens: a row is one conversation, as the library itself encodes it.

    A log-probability has B rows, one after the other; all are padded on the right to T tokens. One pair,
    whose images m_w and m_l are two image tokens 7 7 each, with q = 5 6, y_w = 1 2, y_l = 3 and end 0:

        row  name              input_ids            labels                           owner
        0    chosen            7 7 5 6 1 2 0        -100 -100 -100 -100 1 2    0     0
        1    rejected          7 7 5 6 3 0 pad      -100 -100 -100 -100 3 0 -100     0
        2    image_rejected    7 7 5 6 1 2 0        -100 -100 -100 -100 1 2    0     2

    `mdpo.sequence_logps(model(**batch.inputs()).logits, batch.labels)` are the R = 3B log-probabilities.
    """

    tokens: dict[str, torch.Tensor]  # (R, T): input_ids, attention_mask and, of some processors, token types
    labels: torch.Tensor  # (R, T): the response's input_ids, end-of-sequence included; -100 elsewhere
    images: dict[str, dict[int, torch.Tensor]]  # pixel_values, grids and so on: of each row that is an owner
    owner: list[int]  # for each row, the first one that shows the same images to the same question
    names: tuple[str, ...]  # of the log-probabilities
    keys: list[tuple]  # (epoch, index) of each pair
    ids: list[str]  # id of its record
    take: torch.Tensor | None = None  # this and the next: of `mdpo.pack`
    answers: torch.Tensor | None = None
    predictors: torch.Tensor | None = None
    blocks: list[tuple] | None = None

    def inputs(self):
        """The keyword arguments of a model's forward pass over all rows."""
        return self.tokens | {name: self.images_of(name, self.owner) for name in self.images}

    def images_of(self, name, rows):
        """`images[name]` of these rows, one after the other; with zeros where others have more tiles."""
        tensors = [self.images[name][row] for row in rows if row in self.images[name]]
        sizes = [max(of_dim) for of_dim in zip(*(tensor.shape[1:] for tensor in tensors))]
        for i, tensor in enumerate(tensors):
            missing = [most - size for most, size in zip(sizes, tensor.shape[1:])]
            if any(missing):
                tensors[i] = F.pad(tensor, [n for size in reversed(missing) for n in (0, size)])
        return torch.cat(tensors)

    def to(self, device):
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):  # called by a DataLoader that pins
        return self.map(lambda array: torch.as_tensor(array).pin_memory())

    def map(self, function):
        """The batch with `function(tensor)` in the place of each tensor."""

        def new(value):
            if isinstance(value, dict):
                return {name: new(part) for name, part in value.items()}
            return function(value) if hasattr(value, "shape") else value

        return Batch(*map(new, vars(self).values()))


def make_batch(pairs, processor, names=tuple(SCORED), max_length=2048):
    """Pairs, with their images open -> `Batch`.

    names: the fields of `LogPs` to compute. DPO needs only two.
    max_length: tokens of prompt and one response. A longer response is truncated on the right, alike for all
        images of its pair; the prompt never is.
    Raises BadInput if a prompt leaves no room for a response.
    """
    by_pair, n_pairs = [make_rows(pair, processor, names, max_length) for pair in pairs], len(pairs)
    rows = [of_pair[name] for name in names for of_pair in by_pair]
    fields = [SCORED[name][0] for name in names]
    owner = [fields.index(field) * n_pairs + i for field in fields for i in range(n_pairs)]
    padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100}
    tokens = {
        key: pad_sequence([row[key] for row, _ in rows], True, padding.get(key, 0)) for key in rows[0][0]
    }
    images = {}
    for i in sorted({*owner}):
        for key, values in rows[i][1].items():
            images.setdefault(key, {})[i] = values
    labels, keys, ids = tokens.pop("labels"), [pair.key for pair in pairs], [pair.id for pair in pairs]
    return Batch(tokens, labels, images, owner, names, keys, ids)


def make_rows(pair, processor, names, max_length):
    """A pair -> {name of a log-probability: (its values per token (T,), what is of its images)}.

    The library encodes y_w with m_w and with m_l. Its row of y_l is that of y_w up to the response.
    """
    texts, fields = tokenize(processor, pair), {SCORED[name][0] for name in names}
    whole = [texts.wholes["chosen"]]
    encoded = {field: encode_prompts(processor, whole, [getattr(pair, field)]) for field in fields}
    n_response = len(texts.responses["chosen"])
    longest = max(inputs["input_ids"].shape[1] for inputs in encoded.values()) - n_response
    if longest >= max_length:
        raise BadInput(f"prompt of {longest} tokens, --max-length {max_length}: no room for a response")
    rows = {}
    for name in names:
        field, answer = SCORED[name]
        ids = encoded[field]["input_ids"]  # (1, T), of y_w
        prompt, response = ids[0, :-n_response], torch.tensor(texts.responses[answer][: max_length - longest])
        added = {"input_ids": response, "attention_mask": torch.ones_like(response)}
        tokens, images = {"labels": torch.cat([torch.full_like(prompt, -100), response])}, {}
        for key, values in encoded[field].items():
            if values.shape[:2] != ids.shape:
                images[key] = values
            elif values.ndim > 2:  # such as Mllama's cross-attention mask
                raise BadInput(f"its processor returns {key}, which a response cannot extend")
            else:
                of_response = added.get(key, torch.zeros_like(response))  # 0: the type of text
                tokens[key] = torch.cat([values[0, : len(prompt)], of_response])
        rows[name] = tokens, images
    return rows


class Tokens(NamedTuple):
    """The texts of a pair as the chat template writes them, with one placeholder for an image."""

    prompt: str  # up to the response
    wholes: dict[str, str]  # "chosen", "rejected" -> the conversation with this response, up to its end
    responses: dict[str, list[int]]  # the last tokens of each, which are scored


def tokenize(processor, pair):
    """A pair -> `Tokens`. Prompt and response are tokenised together, since tokens may merge across them."""
    prompt, wholes = write_texts(processor, pair)
    prompt_ids, *whole_ids = (processor.tokenizer(text).input_ids for text in (prompt, *wholes.values()))
    n_shared = len(os.path.commonprefix([prompt_ids, *whole_ids]))  # of lists as well as of paths
    return Tokens(prompt, wholes, {name: ids[n_shared:] for name, ids in zip(wholes, whole_ids)})


STAND_IN = "\ue000"  # written in place of a response, it shows what a template puts before and after it


def write_texts(processor, pair):
    """The prompt and the wholes of `Tokens`.

    The template writes the response itself: some write reasoning in another place, or trim white space.
    Raises BadInput if the question is written in another way once a response follows.
    """
    write, eos = partial(render, processor), processor.tokenizer.eos_token
    messages = chat_messages(pair.question, len(pair.images))
    answered = lambda text: [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    asked = os.path.commonprefix([write(messages), write(messages, add_generation_prompt=True)])
    before, _, after = write(answered(STAND_IN)).rpartition(STAND_IN)  # the question may hold it, too
    wholes = {}
    for name in ("chosen", "rejected"):
        whole = write(answered(getattr(pair, name)))
        if not (whole.startswith(asked) and whole.endswith(after)):
            raise BadInput("the chat template writes the question in another way when a response follows")
        n_before = len(os.path.commonprefix([before, whole]))
        response = whole[n_before:].removesuffix(after) + (after.strip() or eos)
        response, end, _ = response.partition(eos)  # the first end-of-sequence ends the response
        wholes[name] = whole[:n_before] + response + end
    return before.rstrip(" "), wholes  # tabs are not stripped: they are Bunny's image token


def render(processor, messages, **options):
    """The chat template's text. Some templates take a message without images as text, not as parts."""
    is_text = lambda message: all(part["type"] == "text" for part in message["content"])
    plain = [m | {"content": "".join(texts_of([m]))} if is_text(m) else m for m in messages]
    for form in (messages, plain):
        try:
            text = processor.apply_chat_template(form, tokenize=False, **options)
        except Exception as error:  # the template refuses, or meets a list where it wants text
            problem = error
        else:
            printed = "{'type': 'text'"  # how Python prints a part
            if text.count(printed) == "".join(texts_of(messages)).count(printed):
                return text
            problem = "it prints the parts of a message"
    raise BadInput(f"the chat template does not take these messages: {problem}")


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
    image_tokens = {getattr(part, f"{kind}_token", None) for part in parts for kind in kinds} - {None}
    problems, found = {}, {}

    def attempt(number, id, function, *arguments):  # -> what it returns, or None after noting a problem
        try:
            with about(f"record {number}" + f" (id {id})" * (id != str(number))):
                return function(*arguments)
        except BadInput as error:
            problems[number] = str(error)

    for number, record in load_records(path):
        if isinstance(record, str):
            record = attempt(number, str(number), json.loads, record)
        fields = record if isinstance(record, dict) else {}
        id = str(number if fields.get("id") is None else fields["id"])
        if number not in problems and (fields is not record or id.startswith(subset or "")):
            found[number] = attempt(number, id, parse_record, record, id, roots, image_tokens | {"<image>"})
    n_unpaired = sum(found[number] is None for number in found if number not in problems)
    found = {number: example for number, example in found.items() if example}
    if limit is not None and limit < len(found):
        found = {number: found[number] for number in sorted(random.Random(seed).sample([*found], limit))}

    def check(example):  # as training will use it, so that whatever fails there fails here
        pair = Pairs([example])[0, 0]
        if processor:  # rejected images that are drawn are as large as the image: they need no check
            names = tuple(SCORED) if example.images_rejected else tuple(SCORED)[:2]
            make_batch([pair], processor, names, max_length)
        return example

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = pool.map(lambda number: attempt(number, found[number].id, check, found[number]), found)
        examples = [*filter(None, tqdm(checked, "checking data", len(found), leave=False, disable=None))]
    if problems:
        what = "dropped" if skip_bad else "--skip-bad would drop"
        lines = [problems[number] for number in sorted(problems)][:20]
        if len(problems) > 20:
            lines.append(f"... and {len(problems) - 20} more")
        report = "\n  ".join([f"{path}: {what} {len(problems)} bad records:", *lines])
        if not skip_bad:
            raise BadInput(report)
        log(report)
    if n_unpaired:
        log(f"{path}: left out {n_unpaired} records whose best and worst rating are equal or missing")
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
def about(what, kind=BadInput):
    """Convert any exception raised here, but for want of memory, to a `BadInput` that begins with `what`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = re.sub(r"(?s)^Caught .*\n\S+: ", "", str(error)) or type(error).__name__  # from a worker
        said = {KeyError: "has no ", json.JSONDecodeError: "not valid JSON: "}
        said |= dict.fromkeys((AttributeError, IndexError, TypeError), "is not in a known form: ")
        raise kind(f"{one_line(what, 300)}: {said.get(type(error), '')}{one_line(reason)}") from error


def run_command(command, argv=None, saves_memory="--device cpu"):
    """Run command(argv) -> its exit status. An error is one line; --debug raises it.

    Status 2 is a user's mistake, 1 a bug here. saves_memory: the command's flags for a GPU that is too small.
    """
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):  # neither closed nor a notebook's
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # a log file shows it at once
    if "--debug" not in argv:
        warnings.simplefilter("ignore")  # of libraries: about their renames, or an image's odd metadata
    with redirect_stderr(Unbreakable(sys.stderr or open(os.devnull, "w"))):
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
            message = str(error) or type(error).__name__
            ours = not isinstance(error, (BadInput, OSError, MemoryError))
            if isinstance(error, torch.OutOfMemoryError):
                message, ours = f"out of GPU memory; what saves some: {saves_memory}", False
            elif "DataLoader worker" in message:  # raised wherever the main process is
                message, ours = f"{message} The last checkpoint stands; --workers 0 needs no workers.", False
            elif ours:
                message = f"internal error, please report what --debug shows: {error!r}"
            print("error:", "\n  ".join(map(one_line, message.split("\n  "))), file=sys.stderr)
            return 1 if ours else 2


class Unbreakable:
    """A stream that may be closed, or that nobody reads any more: no run ends for it."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def one_line(text, limit=1000):
    """The text without line breaks and other control characters, and cut where nobody reads on."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])


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
