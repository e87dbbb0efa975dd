"""Preference data for mDPO: rejected images, batches, file formats.

`python data.py FILE [--images DIR] [--subset PREFIX]` checks a file without any model.
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
from functools import cache, partial
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


# -------------------------------------------------------------------------------------------- rejected images

CROP = (0.01, 0.2)  # area that is kept: the paper says 0-20%, its code keeps 1-20%


def random_crop(image, rng, area=CROP, other=None):
    """a part of the image, resized to the full image size"""
    # Area uniform in `area`, aspect log-uniform in 3/4..4/3, or as near to it as a long image allows.
    width, height = image.size
    n_pixels = max(1, rng.uniform(*area) * width * height)
    fits = lambda aspect: min(max(aspect, n_pixels / height**2), width**2 / n_pixels)  # box inside the image
    low = math.log(fits(3 / 4))
    high = math.log(fits(4 / 3))
    aspect = math.exp(rng.uniform(low, high))
    w = round(math.sqrt(n_pixels * aspect))
    h = round(math.sqrt(n_pixels / aspect))
    x = rng.randint(0, width - w)
    y = rng.randint(0, height - h)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


def another_image(image, rng, area, other):
    """another image of the data, centred and fitted"""
    return ImageOps.fit(other(), image.size)


def moco_augment(image, rng, area, other):
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
    if rng.random() < 0.5:
        sigma = rng.uniform(0.1, 2.0) * min(image.size) / 224  # MoCo's images have 224 pixels
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def shift_hue(image, turn):
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda level: (level + round(turn * 256)) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


# How a rejected image is made (section 3.1, Table 3; --help shows the docstrings): functions of an image, a
# `random.Random`, the area of --crop and a function that opens another image of the data. They return images
# of the same size.
STRATEGIES = {"crop": random_crop, "random": another_image, "moco": moco_augment}


class Pairs:
    """Examples with their images: `pairs[epoch, index]` -> `Example`; `pairs[index]` is of epoch 0.

    Rejected images are a pure function of (seed, epoch, index): policy and reference share them, and resumed
    runs see them again. "random" takes an image of `pool` (default: the examples), but not of the example.
    An example's own rejected images take the place of the strategy. max_pixels: of `open_image`.
    """

    def __init__(self, examples, strategy="crop", crop=CROP, seed=0, pool=None, max_pixels=None):
        if strategy not in STRATEGIES:
            raise BadInput(f"unknown strategy {strategy!r}: choose from {', '.join(STRATEGIES)}")
        self.examples, self.strategy, self.crop, self.seed = examples, strategy, crop, seed
        self.open = partial(open_image, max_pixels=max_pixels)
        pool = {image for example in pool or examples for image in example.images}
        drawn = [{*example.images} for example in examples if not example.images_rejected]
        if strategy == "random" and any(images and pool <= images for images in drawn):
            raise BadInput("rejected images of strategy 'random' need more different images in the data")
        self.pool = sorted(pool)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        example, rng = self.examples[index], random.Random(f"{self.seed} {epoch} {index}")

        def other():
            while (path := rng.choice(self.pool)) in example.images:
                pass
            return self.open(path)

        images = tuple(map(self.open, example.images))
        own = tuple(map(self.open, example.images_rejected))
        reject = STRATEGIES[self.strategy]
        images_rejected = own or tuple(reject(image, rng, self.crop, other) for image in images)
        return example._replace(images=images, images_rejected=images_rejected, key=(epoch, index))


PICTURES = "AVIF BMP GIF JPEG JPEG2000 MPO PNG PPM TIFF WEBP".split()  # not PostScript, which is a program


def open_image(path, max_pixels=None):
    """Decode an image file -> RGB, turned as its EXIF orientation says, on white where it is transparent.

    max_pixels: a larger image is scaled down to so many pixels. Raises BadInput.
    """
    with about(f"image {path} cannot be decoded"), Image.open(path) as image:
        width, height = image.size
        if image.format not in PICTURES:
            raise BadInput(f"{image.format} is none of {', '.join(PICTURES)}")
        if max(image.size) > 50 * min(image.size) or width * height > 100e6:
            size = f"{width} x {height} pixels"
            raise BadInput(f"{size}: sides differ more than 50-fold, or more than 100 million pixels")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # 12 or 16 bits, or floats of any range
            low, high = (levels := image.convert("F")).getextrema()
            if not math.isfinite(high - low):
                raise BadInput("its levels are not finite")
            if image.mode[0] == "I" and high < 2**16:
                low, high = 0, 2**12 if high < 2**12 else 2**16
            scale = 256 / (high - low or 1)
            image = levels.point(lambda level: level * scale - low * scale).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if max_pixels:  # a thumbnail is never larger
            scale = math.sqrt(max_pixels / (width * height))
            image.thumbnail((image.width * scale, image.height * scale))
        return image


# ------------------------------------------------------------------------------------------------------ batch

# Each field of `LogPs` is the log-probability of a response given images: two fields of an `Example`.
SCORED = {
    "chosen": ("images", "chosen"),
    "rejected": ("images", "rejected"),
    "image_rejected": ("images_rejected", "chosen"),
}


@dataclass
class Batch:
    """B pairs as rows of tokens: a row is one conversation, as the library itself encodes it.

    The rows are B for the first log-probability, then B for the second, and so on, all padded on the right to
    T tokens. One pair, whose images m_w and m_l are two image tokens 7 7 each, with q = 5 6, y_w = 1 2,
    y_l = 3 and end 0:

        row  name              input_ids            labels                           owner
        0    chosen            7 7 5 6 1 2 0        -100 -100 -100 -100 1 2    0     0
        1    rejected          7 7 5 6 3 0 pad      -100 -100 -100 -100 3 0 -100     0
        2    image_rejected    7 7 5 6 1 2 0        -100 -100 -100 -100 1 2    0     2

    `mdpo.sequence_logps(model(**batch.inputs).logits, batch.labels)` are the R = 3B log-probabilities, if
    each row is its own owner. Otherwise it shares its owner's prefix, which `mdpo.pack` makes use of.
    """

    inputs: dict[str, torch.Tensor]  # of the processor: input_ids, attention_mask (R, T); the owners' images
    labels: torch.Tensor  # (R, T): the response's input_ids, end-of-sequence included; -100 elsewhere
    owner: list[int]  # for each row, the first one that shows the same images to the same question
    names: tuple[str, ...]  # of the log-probabilities
    keys: list[tuple]  # (epoch, index) of each pair
    ids: list[str]  # id of its record
    take: torch.Tensor | None = None  # this and the rest: of `mdpo.pack`
    answers: torch.Tensor | None = None
    predictors: torch.Tensor | None = None
    blocks: list[tuple] | None = None

    def pin_memory(self):  # called by a DataLoader that pins
        return self.map(lambda array: torch.as_tensor(array).pin_memory())

    def map(self, function):
        """The batch with `function(tensor)` in the place of each tensor."""
        new = lambda value: function(value) if hasattr(value, "shape") else value
        inputs, *rest = vars(self).values()
        return Batch({name: new(value) for name, value in inputs.items()}, *map(new, rest))


def make_batch(pairs, processor, names=tuple(SCORED), max_length=2048, share=False):
    """Pairs, with their images open -> `Batch`.

    names: the fields of `LogPs` to compute. DPO needs only two.
    max_length: tokens of prompt and one response. A longer response is truncated on the right, alike for all
        images of its pair; the prompt never is.
    share: encode m_w once for y_w and y_l, for `mdpo.pack`. Otherwise each row has its own images.
    Raises BadInput if a prompt leaves no room for a response, or if nothing is left to prefer.
    """
    if isinstance(pairs, Example) or isinstance((*pairs[0].images, None)[0], str):
        raise BadInput("make_batch takes a list of pairs with open images: [Pairs(examples)[epoch, i], ...]")
    texts = [tokenize(processor, pair) for pair in pairs]
    rows = [(i, *SCORED[name]) for name in names for i in range(len(pairs))]  # (pair, images, response)
    responses = [texts[i].responses[answer] for i, _, answer in rows]
    shows = [row[:2] for row in rows]
    owner = [shows.index(row) for row in shows] if share else [*range(len(rows))]
    owners, place = torch.tensor(owner).unique(return_inverse=True)
    encoded = [rows[n] for n in owners]
    wholes = [texts[i].wholes[answer] for i, _, answer in encoded]
    images = [getattr(pairs[i], field) for i, field, _ in encoded]
    inputs = dict(encode(processor, wholes, images, "right"))  # of which the prompts are kept

    lengths = inputs["attention_mask"].sum(1)[place].tolist()
    starts = [length - len(responses[n]) for length, n in zip(lengths, owner)]  # of each row's response
    rooms = [room_for(text, max(starts[i :: len(pairs)]), max_length)
             for i, text in enumerate(texts)] * len(names)  # fmt: skip
    labels = [F.pad(torch.tensor(response[:room]), (n, 0), value=-100)
              for n, response, room in zip(starts, responses, rooms)]  # fmt: skip
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    is_prompt = torch.arange(labels.shape[1]) < torch.tensor(starts)[:, None]
    shape = inputs["input_ids"].shape
    for name, values in inputs.items():
        if values.shape[:2] == shape:  # a value per token: the prompt's, and for a response 0, that of text
            if values.ndim > 2 or name == "labels":  # Mllama's cross-attention, PaliGemma's labels
                raise BadInput(f"its processor returns {name}, which a response cannot extend")
            values = F.pad(values, (0, labels.shape[1] - shape[1]))
            inputs[name] = values[place] * is_prompt
    of_response = labels.where(labels >= 0, processor.tokenizer.pad_token_id)
    inputs["input_ids"] = inputs["input_ids"].where(is_prompt, of_response)
    inputs["attention_mask"] = (is_prompt | (labels >= 0)).long()
    keys = [pair.key for pair in pairs]
    ids = [pair.id for pair in pairs]
    return Batch(inputs, labels, owner, names, keys, ids)


def room_for(text, n_prompt, max_length):
    """How many response tokens fit behind the longest prompt of a pair: `Tokens`. Raises BadInput."""
    if not 0 < n_prompt < max_length:
        raise BadInput(
            f"prompt of {n_prompt} tokens, --max-length {max_length}: no room for a response; "
            f"images add {n_prompt - text.n_prompt}, and fewer under --max-pixels"
        )
    chosen, rejected = (ids[: max_length - n_prompt] for ids in text.responses.values())
    if chosen == rejected:
        raise BadInput(f"'chosen' and 'rejected' are equal in the tokens of --max-length {max_length}")
    return max_length - n_prompt


class Tokens(NamedTuple):
    """The texts of a pair as the chat template writes them, with one placeholder for an image."""

    prompt: str  # up to the response
    n_prompt: int  # its tokens, with one for an image
    wholes: dict[str, str]  # "chosen", "rejected" -> the conversation with this response, up to its end
    responses: dict[str, list[int]]  # the last tokens of each, which are scored


STAND_IN = "\ue000"  # written in place of a response, it shows what a template puts before and after it


def tokenize(processor, pair):
    """A pair -> `Tokens`. Prompt and response are tokenised together, since tokens may merge across them.

    The template writes the response itself: some write reasoning in another place, or trim white space.
    Raises BadInput if it writes the question in another way once a response follows, or has no place for a
    system text.
    """
    write, eos = partial(render, processor), processor.tokenizer.eos_token
    messages = chat_messages(pair.question, len(pair.images))
    answered = lambda text: [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    asked = os.path.commonprefix([write(messages), write(messages, add_generation_prompt=True)])
    before, _, after = write(answered(STAND_IN)).rpartition(STAND_IN)  # the question may hold it, too
    if messages[0]["role"] == "system":
        marked = {"role": "system", "content": [{"type": "text", "text": STAND_IN}]}
        if write([marked, *messages[1:]]).count(STAND_IN) != 1:
            raise BadInput("the chat template has no place for a system text: put it into the question")
    wholes = {}
    for name in ("chosen", "rejected"):
        whole = write(answered(getattr(pair, name)))
        if not (whole.startswith(asked) and whole.endswith(after)):
            raise BadInput("the chat template writes the question in another way when a response follows")
        n_before = len(os.path.commonprefix([before, whole]))
        response = whole[n_before:].removesuffix(after) + (after.strip() or eos)
        response, end, _ = response.partition(eos)  # the first end-of-sequence ends the response
        if not response:
            raise BadInput(f"'{name}' is empty before its end-of-sequence")
        wholes[name] = whole[:n_before] + response + end
    prompt = before.rstrip(" ")  # tabs are not stripped: they are Bunny's image token
    prompt_ids, *whole_ids = processor.tokenizer([prompt, *wholes.values()]).input_ids
    for ids, whole in zip(whole_ids, wholes.values()):
        is_end = [id == processor.tokenizer.eos_token_id for id in ids[-2:]]
        if all(is_end) or is_end[-1] and not whole.endswith(eos):
            raise BadInput("the tokenizer adds an end-of-sequence: set its add_eos_token to false")
    n_shared = len(os.path.commonprefix([prompt_ids, *whole_ids]))  # of lists as well as of texts
    responses = {name: ids[n_shared:] for name, ids in zip(wholes, whole_ids)}
    return Tokens(prompt, n_shared, wholes, responses)


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
    return [message | {"content": [*filter(keep, message["content"])]} for message in question]


def encode(processor, texts, images, padding_side="left"):
    """The processor's own call on texts and a tuple of images for each; generation pads on the left."""
    bos = processor.tokenizer.bos_token
    return processor(
        text=texts,
        images=[[*of_text] for of_text in images] if any(images) else None,
        add_special_tokens=bos is None or not texts[0].startswith(bos),
        padding=len(texts) > 1,
        padding_side=padding_side,
        return_tensors="pt",
    )


# ---------------------------------------------------------------------------------------------------- reading


def read_examples(path, image_dir=None, *, subset=None, limit=None, seed=0, with_images=True, skip_bad=False,
                  processor=None, max_length=2048, max_pixels=None, check=True, log=print):  # fmt: skip
    """Read a preference file of a known format (README, "Your data") -> list of `Example`.

    image_dir: where relative image paths begin (default: the file's folder); also in its `merged_images/`.
    subset: keep ids with this prefix. limit: a random sample of N examples, drawn by `seed`.
    with_images: False leaves every image out, and needs none. skip_bad: drop bad records instead of raising.
    processor, max_length, max_pixels: as in training. Each example must give rows under them.
    check: open all images and make all rows. log: gets what is left out, and counts.
    Raises BadInput, listing bad records and their reasons, or if nothing is left.
    """
    folder = Path(image_dir or Path(path).parent)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such image folder")
    roots = [folder, folder / "merged_images"] if with_images else None
    marks, problems = forbidden(processor), {}

    records = load_records(path)
    names = {n: f" (id {r['id']})" if isinstance(r, dict) and "id" in r else "" for n, r in records}

    def attempt(number, function, *arguments):  # -> what it returns, or None after noting a problem
        try:
            with about(f"record {number}" + names[number]):
                return function(*arguments)
        except BadInput as error:
            problems[number] = str(error)

    parse = lambda n, record: attempt(n, parse_record, record, str(n), subset or "", roots, marks)
    found = {n: example for n, record in records if (example := parse(n, record))}
    n_left_out = len(records) - len(found) - len(problems)
    if limit is not None and limit < len(found):
        found = {n: found[n] for n in sorted(random.Random(seed).sample([*found], limit))}
    wrapped = [n for n, example in found.items() if "wrapped" in example.question[0]]
    if wrapped and processor and not speaks_vicuna(processor):
        log(
            f"{path}: left out {len(wrapped)} system texts around USER: ... ASSISTANT:, unknown to this model"
        )
        found |= {n: found[n]._replace(question=found[n].question[1:]) for n in wrapped}

    lengths = []
    if check:
        as_training = check_example, processor, max_length, max_pixels
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            checked = pool.map(lambda n: attempt(n, *as_training, found[n]), found)
            lengths = [*progress(checked, "checking data", len(found), leave=False, delay=1)]
    examples = [example for n, example in found.items() if n not in problems]
    if problems:
        what = "dropped" if skip_bad else "--skip-bad would drop"
        lines = [problems[n] for n in sorted(problems)][:20]
        if len(problems) > 20:
            lines.append(f"... and {len(problems) - 20} more")
        report = "\n  ".join([f"{path}: {what} {len(problems)} bad records:", *lines])
        if not skip_bad:
            raise BadInput(report)
        log(report)
    if n_left_out:
        log(f"{path}: left out {n_left_out} records of other ids, or whose ratings prefer nothing")
    if not examples:
        raise BadInput(f"{path}: no example is left" + (f" with an id in {subset!r}" if subset else ""))
    log(f"{path}: {describe(examples, [*filter(None, lengths)], max_length)}")
    return examples


def check_example(processor, max_length, max_pixels, example):
    """Use an example as training will, and fail if it would -> tokens of prompt and responses, ends."""
    opened = partial(open_image, max_pixels=max_pixels)
    images = [*map(opened, example.images)]
    images_rejected = [*map(opened, example.images_rejected)]
    pixels = lambda images: [*map(Image.Image.tobytes, images)]
    if images and pixels(images) == pixels(images_rejected):
        raise BadInput("the rejected image is the image")  # in another file format, too
    if processor is None:
        return None
    text = tokenize(processor, example)
    sizes = [tuple(image.size for image in of) for of in (images, images_rejected or images)]
    question = json.dumps(chat_messages(example.question, len(images)))
    form = re.sub(r'"text": "(\\.|[^"\\])*"', '"text": "?"', question)
    n_prompt = text.n_prompt + max(n_image_tokens(processor, of, form) for of in sizes)
    room_for(text, n_prompt, max_length)
    n_ended = sum(processor.tokenizer.eos_token in answer for answer in (example.chosen, example.rejected))
    return n_prompt, [*map(len, text.responses.values())], n_ended


@cache  # the processor's work depends on the sizes of images, and is most of the check
def n_image_tokens(processor, sizes, form='"?"'):
    """How many tokens images of these sizes add to a prompt with one placeholder for each.

    form: the question as JSON, with a "?" for each text: a template may lose an image of some messages.
    """
    images = tuple(Image.new("RGB", size) for size in sizes)
    pair = Example(json.loads(form), "Yes.", "No.", images)
    labels = make_batch([pair], processor, ("chosen",), sys.maxsize).labels
    return (labels >= 0).int().argmax().item() - tokenize(processor, pair).n_prompt


def speaks_vicuna(processor):
    """Do the model's prompts end in ASSISTANT:, as those of Bunny and LLaVA-1.5, which have a system text?"""
    return render(processor, chat_messages("?", 0), add_generation_prompt=True).endswith("ASSISTANT:")


def describe(examples, lengths, max_length):
    """Counts of examples and images and, if there are any, of tokens -> text."""
    images = {image for example in examples for image in example.images}
    n_own = sum(example.images_rejected != () for example in examples)
    lines = [f"{len(examples)} examples with {len(images)} different images; "
             f"{n_own} examples have their own rejected images"]  # fmt: skip
    if lengths:
        prompts, pairs, ended = zip(*lengths)
        responses = [n for pair in pairs for n in pair]
        n_cut = sum(prompt + n > max_length for prompt, pair in zip(prompts, pairs) for n in pair)
        for name, values in ("prompts", prompts), ("responses", responses):
            lines.append(f"{name}: median {statistics.median(values):.0f} tokens, longest {max(values)}")
        lines += [f"{n_cut} responses are cut at --max-length {max_length}",
                  f"{sum(ended)} responses end at an end-of-sequence inside"]  # fmt: skip
    return "\n  ".join(lines)


FILE_KINDS = {  # by their first bytes
    b"PAR1": "a parquet file: python examples/convert.py reads it",
    b"\x1f\x8b": "a gzip file: unpack it",
    b"PK": "a zip file: unpack it",
    b"version https://git-lfs": "a Git LFS pointer, not the file: run git lfs pull",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}


def load_records(path):
    """A JSON list, JSON lines or one object -> [(number from 1, record or a bad line)]."""
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such file; for a data set of the hub, run python examples/convert.py")
    with about(f"{path}: cannot be read"):
        content = Path(path).read_bytes()
        for start, kind in FILE_KINDS.items():
            if content.startswith(start):
                raise BadInput(f"is {kind}")
        text = content.decode("utf-8-sig")
        start = text.lstrip()[:1]
        if start == "[":
            return [*enumerate(json.loads(text), 1)]
        if start != "{":
            raise BadInput(f"begins with {shown(text[:20])}: neither a JSON list nor JSON lines")
        with suppress(ValueError, RecursionError):
            return [(1, json.loads(text))]
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                with suppress(ValueError, RecursionError):  # a bad line stays text, and one bad record
                    line = json.loads(line)
                records.append((number, line))
    return records


IMAGE_FIELDS = ("img_path", "image", "images", "image_path")
# How other tools write an image, or a chat, into a question. Code such as a<image_size>2 is none.
FOREIGN_MARKS = (
    r"(?s)<ImageHere>|<Image>|<IMAGE>|\[IMG\]|<start_of_image>|<img>.*?</img>|"
    r"<image([ _]?\d+|[-_]placeholder)>|<im_(start|patch|end)>|<\|[\w-]+\|>|"
    r"\[/?INST\]|<(start|end)_of_turn>|<end_of_utterance>|ASSISTANT:|(### ?|\n\n)(Human|Assistant):"
)


def forbidden(processor):
    """{part of a record: pattern of what its texts may not hold}: control and image tokens, no think tags."""
    tokens, eos = [], None
    if processor:
        added, eos = processor.tokenizer.added_tokens_decoder.values(), processor.tokenizer.eos_token
        tokens = [token.content for token in added if token.special and "think" not in token.content]
    in_prompt = "|".join([FOREIGN_MARKS, *map(re.escape, tokens)])
    # An end-of-sequence inside a response ends it. Nothing matches (?!).
    in_response = "|".join(["(?!)", *(re.escape(token) for token in tokens if token != eos)])
    return {"prompt": in_prompt, "chosen": in_response, "rejected": in_response}


def parse_record(record, number, subset, roots, marks):
    """A record of a known format -> `Example`; None if it is of another subset, or prefers nothing.

    roots: folders where relative image paths begin; None: no images. marks: of `forbidden`.
    Raises BadInput.
    """
    record = json.loads(record) if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise BadInput(f"is {shown(record)}, not an object with fields")
    id = str(number if record.get("id") is None else record["id"])
    if not id.startswith(subset):
        return None
    images, prompt = first(record, IMAGE_FIELDS), first(record, ("prompt", "question"))
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if record.get("completions") and None in (chosen, rejected):
        chosen, rejected = best_and_worst(record["completions"])
        if chosen is None:
            return None
        images = images or f"{id}.jpg"
    prompt, chosen, rejected = map(as_list, (prompt, chosen, rejected))
    if not (chosen and rejected and (prompt or chosen[1:])):
        raise BadInput(f"has the fields {', '.join(record)}; needed are image, prompt, chosen and rejected "
                       "(README, Your data); python examples/convert.py converts other formats")  # fmt: skip
    if first(record, ("history", "system", "input")):
        raise BadInput(
            "has 'history', 'system' or 'input' beside its prompt; python examples/convert.py takes them"
        )
    if chosen[:-1] != rejected[:-1]:
        raise BadInput(
            "'chosen' and 'rejected' differ before their last turn: each is one response, or a conversation"
        )
    images = find_images(images, roots)
    own = first(record, ("rejected_images", "rejected_image"))
    images_rejected = find_images(own, roots) if own else ()
    if own and len(images_rejected) != len(images):
        raise BadInput(f"has {len(images)} images and {len(images_rejected)} rejected images")
    n_images = len(images) if roots else None
    questions = [read_question(turns, n_images, marks) for turns in (prompt, chosen[:-1]) if turns]
    part, question = sorted((questions[0], questions[-1]), key=len)  # a response may hold the conversation
    if "\n".join(texts_of(part)) not in "\n".join(texts_of(question)):
        raise BadInput("'prompt' is not what 'chosen' and 'rejected' answer")
    chosen = read_response(chosen[-1], "chosen", marks)
    rejected = read_response(rejected[-1], "rejected", marks)
    if chosen == rejected:
        raise BadInput("'chosen' and 'rejected' are equal")
    return Example(question, chosen, rejected, images, images_rejected, id)


def best_and_worst(completions):
    """VLFeedback (Silkie): the responses of the highest and lowest mean rating; None, None if equal."""
    rated = {}
    for completion in completions:
        ratings = [str(aspect["Rating"]).strip() for aspect in completion["annotations"].values()]
        if ratings and all(re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?", rating) for rating in ratings):  # not "N/A"
            rated.setdefault(statistics.mean(map(float, ratings)), completion["response"])
    if len(rated) < 2:
        return None, None
    return [re.sub(r"【[^【】†]*†[^【】]*】", "", rated[best(rated)]) for best in (max, min)]  # no citations


def first(record, names):
    """The first of these fields that is there and says something, or None."""
    return next((record[name] for name in names if record.get(name)), None)


def shown(value):
    """A value of a record, for a message."""
    return one_line(json.dumps(value, default=str), 150)


def find_images(value, roots):
    """A path, or a list of them -> paths of files that are there. Raises BadInput."""
    if roots is None:
        return ()
    if not value:
        fields = " or ".join(map(repr, IMAGE_FIELDS))
        raise BadInput(f"has no image path ({fields}); examples/convert.py finds images elsewhere, too")
    paths = []
    for image in as_list(value):
        image = image["path"] if isinstance(image, dict) else image
        if not isinstance(image, str):
            raise BadInput(
                f"an image is {shown(value)}, not a path; examples/convert.py makes files of images"
            )
        # One name for a file, for --reject random. An absolute path is taken as it is.
        found = [*filter(os.path.isfile, (os.path.abspath(root / image) for root in roots))]
        if not found:
            where = " or ".join(map(str, roots))
            raise BadInput(
                f"no image {one_line(image, 150)!r} in {where} (convert.py makes files of embedded ones)"
            )
        paths.append(found[0])
    return tuple(paths)


def as_list(value):
    """A field's value as a list, of paths or of turns; None is an empty one."""
    return value if isinstance(value, list) else [value] * (value is not None)


def read_question(turns, n_images, marks):
    """The turns up to the question -> chat messages with a part for each image.

    n_images: how many the record has; None for any number. If no message shows an image, the user's first
    message opens with all of them.
    """
    if isinstance(turns[0], str):
        turns = [*without_template(turns[0]), *turns[1:]]
    messages = [read_message(turn, "prompt", marks) for turn in turns]
    roles = [message["role"] for message in messages]
    if not re.fullmatch("(system )?(user assistant )*user", " ".join(roles)):
        raise BadInput(f"'prompt' has the roles {roles}: user and assistant must take turns, user last")
    n_shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if n_images is not None and n_shown not in (0, n_images):
        raise BadInput(f"'prompt' shows {n_shown} images, the record has {n_images}")
    if n_shown == 0 and n_images:
        messages[roles.index("user")]["content"][:0] = [{"type": "image"}] * n_images
    return messages


def without_template(text):
    """A question in Bunny's template, as in the authors' data -> its system text, "wrapped", and the rest."""
    system, user, question = text.strip().partition("USER:")
    if not (user and question.endswith("ASSISTANT:")):
        return [text]
    system = system.removeprefix("<s>").strip()
    message = {"role": "system", "content": system, "wrapped": True}
    return [message] * (system != "") + [question.removesuffix("ASSISTANT:")]


def read_response(turn, name, marks):
    message = read_message(turn, name, marks)
    if message["role"] != "assistant" or {"type": "image"} in message["content"]:
        raise BadInput(f"'{name}' must end in an assistant message of text")
    return "".join(texts_of([message])).strip()


def read_message(turn, name, marks):
    """Text or a chat message -> {"role", "content": parts of type "text" or "image"}. Raises BadInput.

    `<image>` in a text becomes an image before the text, as in LLaVA's data. Several stay where they are.
    """
    written = {"role": "user" if name == "prompt" else "assistant", "content": turn}
    message = turn if isinstance(turn, dict) else written
    with about(f"'{name}'"):
        role, content, parts = message["role"], message["content"], []
        content = content.strip() if isinstance(content, str) else content
        if role not in ("system", "user", "assistant"):
            raise BadInput(f"role {shown(role)} is not system, user or assistant")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if part["type"] != "text" and [*filter(None, part.values())] != ["image"]:
                raise BadInput(f"holds the part {shown(part)}: parts are texts and bare images")
            text = "<image>" if part["type"] == "image" else part["text"]
            if not isinstance(text, str):
                raise BadInput(f"is {shown(text)}, not text")
            text.encode()  # raises for a lone surrogate, which JSON can hold and a tokenizer cannot
            *before, _ = pieces = text.split("<image>")
            if len(before) == 1 or before and not "".join(before).strip():
                pieces = [""] * len(before) + ["".join(pieces).strip()]
            for n, piece in enumerate(pieces):
                if held := re.search(marks[name], piece):
                    raise BadInput(f"holds {held[0]!r}, a control token or image mark, in its text")
                parts += [{"type": "image"}] * (n > 0)
                parts += [{"type": "text", "text": piece}] * (piece.strip() != "")
        if not texts_of([{"content": parts}]):
            raise BadInput("has no text")
    return message | {"content": parts}


def texts_of(messages):
    """The texts of chat messages: system text, earlier turns and question."""
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


# ----------------------------------------------------------------------------------------------------- errors


class BadInput(ValueError):
    """A user's mistake, shown without a traceback: what was wrong, where, and what to do."""


@contextmanager
def about(what):
    """Convert exceptions raised here, but no out-of-memory error, to a `BadInput` that begins with `what`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = re.sub(r"(?s)^Caught .*\n\S+: ", "", str(error)).strip()  # without a worker's traceback
        said = {KeyError: "has no ", json.JSONDecodeError: "not valid JSON: "}
        said |= dict.fromkeys((AttributeError, IndexError, TypeError), "is not in a known form: ")
        raise BadInput(
            f"{one_line(what, 300)}: {said.get(type(error), '')}{one_line(reason or type(error).__name__)}"
        ) from error


def run_command(command, argv=None, saves_memory="--device cpu"):
    """Run command(argv) -> its exit status: 2 after an error message. A bug here is raised.

    saves_memory: the command's flags for a GPU that is too small.
    """
    if hasattr(sys.stdout, "reconfigure"):  # neither closed nor a notebook's
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # a log file shows it at once
    warnings.simplefilter("ignore")  # of libraries: about their renames, or an image's odd metadata
    warnings.filterwarnings("default", ".*(CUDA|driver)")  # but not that a GPU cannot be used
    with redirect_stderr(Unbreakable(sys.stderr)):
        try:
            return command(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # as of `| head`
            sys.stdout = None
            return 141
        except Exception as error:
            message = str(error) or type(error).__name__
            if isinstance(error, torch.OutOfMemoryError):
                message = f"out of GPU memory; what saves some: {saves_memory}"
            elif "DataLoader worker" in message:  # raised wherever the main process is
                message = f"{message} The last checkpoint stands; --workers 0 needs no workers."
            elif not isinstance(error, (BadInput, OSError, MemoryError)):
                raise
            print("error:", "\n  ".join(map(one_line, message.split("\n  "))), file=sys.stderr)
            return 2


def progress(values, what, total, **options):
    """A progress bar; off a terminal, as in a log file, a line every ten seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 10
    return tqdm(values, what, total, mininterval=seconds, **options)


class Unbreakable:
    """A stream that may be closed, or that nobody reads any more: a run survives it."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def one_line(text, limit=1000):
    """The text without line breaks and other control characters, and cut at `limit`."""
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])
    return "".join(shown)


# ----------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, as for every other mistake
        raise BadInput(f"{message} (--help lists the arguments)")


def check_file(argv):
    parser = Parser(description="Check a preference file and its images, without any model.")
    parser.add_argument("file")
    parser.add_argument("--images", help="folder where relative image paths begin (default: the file's)")
    parser.add_argument("--subset", help="only ids with this prefix, e.g. llava (paper 4.1)")
    args = parser.parse_args(argv)
    read_examples(args.file, args.images, subset=args.subset)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(check_file))
