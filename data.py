"""Preference data for mDPO: from an image pair and two responses to a batch of tokens; rejected images; file formats.

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
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


class Example(NamedTuple):
    """One preference: `chosen` is better than `rejected` as an answer to `question` about the images."""

    id: str
    question: str | list[dict]  # text; or chat messages up to the question: a system text, earlier turns, images between
    chosen: str
    rejected: str
    images: tuple[str, ...]  # paths; none where the images are left out


class Pair(NamedTuple):
    """An `Example` with its images decoded and rejected: what `Pairs` yields and `make_batch` takes."""

    question: str | list[dict]  # q
    chosen: str  # y_w
    rejected: str  # y_l
    images: tuple[Image.Image, ...]  # m_w, RGB
    images_rejected: tuple[Image.Image, ...]  # m_l, one for each of `images`


BUNNY_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# -------------------------------------------------------------------------------------------------- rejected images

CROP = (0.01, 0.2)  # the paper's "0-20%": what its code keeps of the area


def random_crop(image, rng, area=CROP, **_):
    """a part of the image, resized to the whole's size"""
    # Area uniform in `area`, aspect log-uniform in 3/4..4/3. Where a long image has no room for it, the aspect gives way.
    width, height = image.size
    n_pixels = rng.uniform(*area) * width * height
    fits = lambda aspect: min(max(aspect, n_pixels / height**2), width**2 / n_pixels)  # box inside the image
    aspect = math.exp(rng.uniform(math.log(fits(3 / 4)), math.log(fits(4 / 3))))
    w = min(max(1, round(math.sqrt(n_pixels * aspect))), width)
    h = min(max(1, round(math.sqrt(n_pixels / aspect))), height)
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


def another_image(image, rng, other, **_):
    """another image of the data, centred and fitted"""
    return ImageOps.fit(other(), image.size)


def moco_augment(image, rng, **_):
    """MoCo v2's augmentation (arXiv:2003.04297): crop of 20-100%, colour jitter, grey, blur, flip"""
    image = random_crop(image, rng, (0.2, 1.0))
    if rng.random() < 0.8:
        enhance = lambda kind: lambda im: kind(im).enhance(rng.uniform(0.6, 1.4))
        jitters = [*map(enhance, (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color))]
        jitters.append(lambda im: shift_hue(im, rng.uniform(-0.1, 0.1)))
        rng.shuffle(jitters)
        for jitter in jitters:
            image = jitter(image)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:  # sigma is for 224 pixels, as there, and scales with the image
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * min(image.size) / 224))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def shift_hue(image, turn):
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + round(turn * 256)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


# How a rejected image is made (section 3.1 and Table 3): a function of the image and a `random.Random` -> an image of the
# same size. It is called with more by name: area, the --crop; other, a function that opens another image of the data.
STRATEGIES = {"crop": random_crop, "random": another_image, "moco": moco_augment}


class Pairs(torch.utils.data.Dataset):
    """Examples with their images: `pairs[epoch, index]` -> `Pair`.

    Rejected images are a pure function of (seed, epoch, index): policy and reference share them, and a resumed run meets
    them again. "random" takes an image of `pool` (default: the examples') that is not among the example's.
    """

    def __init__(self, examples, strategy="crop", crop=CROP, seed=0, pool=None):
        self.examples, self.strategy, self.crop, self.seed = examples, strategy, crop, seed
        self.pool = sorted({image for example in pool or examples for image in example.images})
        if strategy == "random" and any(0 < len(self.pool) <= len({*example.images}) for example in examples):
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
        reject = STRATEGIES[self.strategy]
        images_rejected = tuple(reject(image, rng, area=self.crop, other=other) for image in images)
        return Pair(example.question, example.chosen, example.rejected, images, images_rejected)


def open_image(path):
    """Decode a whole image file -> RGB, turned as its EXIF orientation says. Raises BadInput."""
    with about(f"image {path} cannot be decoded"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = image.point(lambda value: value / 256).convert("L")
        return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")


# ------------------------------------------------------------------------------------------------------------ batch

# What each field of `LogPs` is the log-probability of: (images that are seen, response), by their names in `Pair`.
SCORED = {
    "chosen": ("images", "chosen"),
    "rejected": ("images", "rejected"),
    "image_rejected": ("images_rejected", "chosen"),
}
LAYOUTS = ("packed", "plain")


def make_batch(pairs, processor, layout="packed", names=tuple(SCORED), max_length=2048):
    """Lay B pairs out as sequences of tokens, for `mdpo.response_logps`.

    layout: "packed": the responses to the same images share a sequence, [m_w|q|y_w|y_l] and [m_l|q|y_w], and all
        sequences lie end to end in R = 1 row; "plain": every response has a sequence, and every sequence a row, padded.
    names: the fields of `LogPs` that are wanted. DPO needs no third.
    max_length: tokens of prompt and one response; a longer response is cut on the right, the prompt never is.
    Returns a dict. Example: one pair, m_w of two tokens (77), q = 5 6, y_w = 1 2 and y_l = 3, each with end-of-sequence 0:

        input_ids (R, T)      77 77  5  6 | 1  2  0 | 3  0 || 77 77  5  6 | 1  2  0
        position_ids (R, T)    0  1  2  3   4  5  6   4  5     0  1  2  3   4  5  6    packed only
        lengths               [[4, 3, 2], [4, 3]]: tokens of each sequence's prefix and responses; packed only
        predictors (R, K)      3  4  5 | 3  7 | 12 13 14: positions whose logits predict a response token
        targets (R, K)         1  2  0 | 3  0 |  1  2  0: these tokens, -100 in padding
        n_targets             [3, 2, 3]: how many belong to each response: all `names[0]`, one for each pair, then the next
        names                 as above
        processor_keys        names of what else the processor returned; each is in the dict too: pixel_values, with the
                              images of all sequences in order, and for some models grids, or token types (R, T)

    Raises BadInput where a prompt leaves no room for a response, or where the processor does what rows cannot follow.
    """
    groups = {}  # names that share a sequence
    for name in names:
        groups.setdefault(SCORED[name][0] if layout == "packed" else name, []).append(name)
    sequences = [(i, group) for group in groups.values() for i in range(len(pairs))]
    texts = [tokenize(processor, pair) for pair in pairs]
    seen = [getattr(pairs[i], SCORED[group[0]][0]) for i, group in sequences]
    prefixes, image_inputs = expand_prefixes(processor, [texts[i] for i, _ in sequences], seen)

    rows, lengths, predictors, targets = [], [], {}, {}
    for (i, group), prefix in zip(sequences, prefixes):
        room = room_for_response(len(prefix["input_ids"]), max_length)
        responses = [texts[i].responses[SCORED[name][1]][:room] for name in group]
        sequence, predict = lay_out(prefix, responses)
        if layout == "plain" or not rows:
            rows.append({name: [] for name in sequence})
        start = len(rows[-1]["input_ids"])
        for name, values in sequence.items():
            rows[-1][name] += values
        for name, response, positions in zip(group, responses, predict):
            targets[name, i], predictors[name, i] = response, [start + position for position in positions]
        lengths.append([len(prefix["input_ids"]), *map(len, responses)])

    order = [(name, i) for name in names for i in range(len(pairs))]
    predictors, targets = ([of[key] for key in order] for of in (predictors, targets))
    n_targets = [*map(len, targets)]
    as_rows = lambda rows, padding=0: pad_sequence([torch.tensor(row) for row in rows], True, padding)
    padding = {"input_ids": processor.tokenizer.pad_token_id}
    batch = {name: as_rows([row[name] for row in rows], padding.get(name, 0)) for name in rows[0]} | image_inputs
    if layout == "packed":
        batch["lengths"] = lengths
        predictors, targets = [sum(predictors, [])], [sum(targets, [])]
    else:  # in a row of its own a sequence's positions are what the model takes them to be
        del batch["position_ids"]
        n_targets = [max(n_targets)] * len(n_targets)
    keys = [*image_inputs, *(rows[0].keys() - {"input_ids", "position_ids"})]
    batch |= {"predictors": as_rows(predictors), "targets": as_rows(targets, -100), "n_targets": n_targets}
    return batch | {"names": names, "processor_keys": keys}


def lay_out(prefix, responses):
    """One sequence: prefix and responses -> a list of numbers a name, and the positions that predict each response.

    The prefix's last token predicts the first of each response, whose positions go on where the prefix ended.
    """
    n_prefix = len(prefix["input_ids"])
    ids, positions, predictors = [*prefix["input_ids"]], [*range(n_prefix)], []
    for response in responses:
        predictors.append([n_prefix - 1, *range(len(ids), len(ids) + len(response) - 1)])
        positions += range(n_prefix, n_prefix + len(response))
        ids += response
    no_image = [0] * (len(ids) - n_prefix)  # the type of a response's tokens
    return {name: values + no_image for name, values in prefix.items()} | {"input_ids": ids, "position_ids": positions}, predictors


def expand_prefixes(processor, texts, images):
    """B `Tokens` and their images -> what the responses of each share, and what the processor makes of all the images.

    The first is a dict for each: input_ids, with the tokens of the images in place, and what else the processor says of
    each token (its type). The second is a dict of tensors: pixel_values and, for some models, sizes or grids.
    """
    if not any(images):
        return [{"input_ids": tokens.prompt_ids[: tokens.n_shared]} for tokens in texts], {}
    encoded = encode_prompts(processor, [tokens.prompt for tokens in texts], images)
    masks = encoded.pop("attention_mask").bool()
    per_token = {name: values for name, values in encoded.items() if values.shape[:2] == masks.shape}
    for name, values in per_token.items():
        if values.ndim > 2:  # such as Mllama's cross-attention mask
            raise BadInput(f"the processor returns {name} of shape {tuple(values.shape)}, which rows cannot extend")
    prefixes = []
    for i, tokens in enumerate(texts):
        prefix = {name: values[i][masks[i]].tolist() for name, values in per_token.items()}
        # What follows the image is tokenised alike with one placeholder and with its hundreds of tokens.
        behind = len(tokens.prompt_ids) - tokens.n_shared  # prompt tokens that a response's first merged with
        end = len(prefix["input_ids"]) - behind
        if prefix["input_ids"][end:] != tokens.prompt_ids[tokens.n_shared :]:
            raise BadInput("this model's chat template changes the text before the image once a response is there")
        prefixes.append({name: values[:end] for name, values in prefix.items()})
    return prefixes, {name: values for name, values in encoded.items() if name not in per_token}


class Tokens(NamedTuple):
    """The texts of a pair as tokens, an image as one placeholder."""

    prompt: str
    prompt_ids: list[int]
    n_shared: int  # tokens that prompt, prompt + y_w and prompt + y_l begin with; responses are what follows
    wholes: dict[str, str]  # "chosen", "rejected" -> prompt and response
    after: dict[str, list[int]]  # the tokens of each whole behind the shared ones
    responses: dict[str, list[int]]  # these up to the first end-of-sequence


def tokenize(processor, pair):
    """A pair -> `Tokens`. Prompt and response are tokenised whole, since tokens may merge across the boundary."""
    tokenizer = processor.tokenizer
    messages = chat_messages(pair.question, len(pair.images))
    template = lambda messages, **options: processor.apply_chat_template(messages, tokenize=False, **options)
    prompt = template(messages, add_generation_prompt=True)
    stand_in = "\ue000"  # in place of the response, it shows what the template puts before it and after it
    assistant = {"role": "assistant", "content": [{"type": "text", "text": stand_in}]}
    before, _, after = template([*messages, assistant]).rpartition(stand_in)  # the last: the question may hold it too
    ending = after.strip() or tokenizer.eos_token
    if prompt == template(messages) and before.startswith(prompt):
        # A template without a generation prompt: what opens the answer is not to be learned. Tabs may be an image's token.
        prompt = before.rstrip(" \n")
    wholes = {name: before + getattr(pair, name) + ending for name in ("chosen", "rejected")}

    special = {"add_special_tokens": not starts_with_bos(processor, prompt)}
    prompt_ids, *whole_ids = (tokenizer(text, **special).input_ids for text in (prompt, *wholes.values()))
    n_shared = len(os.path.commonprefix([prompt_ids, *whole_ids]))  # of lists as well as of paths
    after = {name: ids[n_shared:] for name, ids in zip(wholes, whole_ids)}
    # What follows the first end-of-sequence, such as a template's newline, is never generated.
    end = lambda ids: ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
    responses = {name: ids[: end(ids)] for name, ids in after.items()}
    return Tokens(prompt, prompt_ids, n_shared, wholes, after, responses)


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
    """The processor's own call on prompts and a tuple of images for each: padded as for generation."""
    return processor(
        text=prompts,
        images=[[*of_prompt] for of_prompt in images] if any(images) else None,
        add_special_tokens=not starts_with_bos(processor, prompts[0]),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def room_for_response(prompt_length, max_length):
    if prompt_length >= max_length:
        raise BadInput(f"image and question take {prompt_length} tokens of --max-length {max_length}: no room to answer")
    return max_length - prompt_length


def to_device(batch, device):
    """The batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ---------------------------------------------------------------------------------------------------------- reading


def read_examples(path, image_dir=None, *, skip_bad=False, log=print, **options):
    """Read a preference file of any known format (README, "Data") -> list of `Example`, each checked.

    skip_bad: drop bad records instead of raising. Further arguments as of `scan`.
    Raises BadInput, listing every bad record and its reason, or if nothing is left.
    """
    examples, problems, n_unpaired = scan(path, image_dir, **options)
    if problems and not skip_bad:
        raise BadInput(f"{path}: {report(problems)}\nMend them, or drop them with --skip-bad.")
    if problems:
        log(f"{path}: dropped {report(problems)}")
    if n_unpaired:
        log(f"{path}: left out {n_unpaired} records whose best and worst rating are equal or missing")
    if not examples:
        subset = options.get("subset")
        raise BadInput(f"{path}: no example is left to train on" + f" (with ids in {subset!r})" * bool(subset))
    return examples


def report(problems, most=20):
    lines = [f"{len(problems)} bad record{'s' * (len(problems) > 1)}:"] + [f"  {p}" for p in problems[:most]]
    return "\n".join(lines + [f"  ... and {len(problems) - most} more"] * (len(problems) > most))


def scan(path, image_dir=None, subset=None, limit=None, seed=0, with_images=True, processor=None, max_length=2048):
    """-> (good examples, a line for each bad record, number of records without a preference).

    image_dir: where relative image paths begin (default: the file's folder); `merged_images/` in it is searched too.
    subset: keep the ids that begin so. limit: a sample of so many, drawn by `seed`.
    with_images: False leaves every image out, and needs none.
    processor, max_length: if given, also checks that prompts leave room for an answer and do not hold the image token.
    """
    folder = Path(image_dir or Path(path).parent)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such image folder")
    roots = [folder, folder / "merged_images"] if with_images else None
    placeholders = {"<image>"} | {getattr(processor, name, None) for name in ("image_token", "boi_token")} - {None}
    found, problems, n_unpaired = [], [], 0
    for number, record in load_records(path):
        where = f"record {number}"
        record, problem = attempt(where, parse_json, record)
        if isinstance(record, dict) and "id" in record:
            where += f" (id {record['id']})"
        id = str(record.get("id", number) if isinstance(record, dict) else number)
        if subset and not id.startswith(subset):
            continue
        if not problem:
            example, problem = attempt(where, parse_record, record, id, roots, placeholders)
        if problem:
            problems.append(problem)
        elif example is None:
            n_unpaired += 1
        else:
            found.append((where, example))
    if limit is not None and limit < len(found):
        found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]

    check = image_checker(processor, max_length)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = pool.map(lambda where_example: attempt(where_example[0], check, where_example[1])[1], found)
        checks = [*tqdm(checks, total=len(found), desc="checking data", disable=None, leave=False)]
    problems += filter(None, checks)
    return [example for (_, example), problem in zip(found, checks) if not problem], problems, n_unpaired


def attempt(where, function, *arguments):
    """-> (what the function returns, None), or (None, a line that says what is wrong with `where`)."""
    try:
        with about(where):
            return function(*arguments), None
    except BadInput as error:
        return None, str(error)


def image_checker(processor, max_length):
    """-> a function that raises BadInput for an example whose images do not decode, or leave no room for an answer."""

    @cache
    def n_image_tokens(sizes):  # that images of these sizes add to their placeholders
        pair = Pair("?", "a", "b", tuple(Image.new("RGB", size) for size in sizes), ())
        tokens = tokenize(processor, pair)
        (prefix,), _ = expand_prefixes(processor, [tokens], [pair.images])
        return len(prefix["input_ids"]) - tokens.n_shared

    def check(example):
        sizes = tuple(open_image(path).size for path in example.images)
        if processor is not None:
            n_shared = tokenize(processor, Pair(example.question, "a", "b", sizes, ())).n_shared
            room_for_response(n_shared + n_image_tokens(sizes), max_length)

    return check


def load_records(path):
    """A JSON list or JSON lines, told apart by the first character -> [(number from 1, record, or its line)]."""
    with about(f"{path}: cannot be read"):
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return [*enumerate(parse_json(text), 1)]
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def parse_json(record):
    with about("not valid JSON"):
        return json.loads(record) if isinstance(record, str) else record


def parse_record(record, id, roots, placeholders):
    """One record of any known format -> `Example`, or None if it expresses no preference. Raises BadInput.

    roots: the folders where relative image paths begin; None: images are left out. placeholders: what no text may hold.
    """
    if not isinstance(record, dict):
        raise BadInput("is not an object")
    field = next((field for field in FORMATS if record.get(field) is not None), None)
    if field is None:
        raise BadInput(f"has no field {' or '.join(map(repr, FORMATS))}")
    preference = FORMATS[field](record, id)
    if preference is None:
        return None
    question, chosen, rejected, images = preference
    images = find_images(images, roots) if roots else ()
    question = read_question(question, len(images) if roots else None)
    chosen, rejected = chosen.strip(), rejected.strip()
    texts = [("prompt", text) for text in texts_of(question)] + [("chosen", chosen), ("rejected", rejected)]
    for name, text in texts:
        if not text.strip():
            raise BadInput(f"'{name}' is empty")
        with about(f"'{name}'"):
            text.encode()  # raises for half a character, a surrogate, which JSON can hold and a tokenizer cannot
        for placeholder in placeholders:
            if placeholder in text:
                raise BadInput(f"'{name}' holds the image token {placeholder!r} in its text")
    if chosen == rejected:
        raise BadInput("'chosen' and 'rejected' are equal")
    return Example(id, question, chosen, rejected, images)


# ---------------------------------------------------------------------------------------------------------- formats
#
# A format is a function: record, id -> question, chosen response, rejected response, image path or paths; or None if the
# record expresses no preference. The question is text or chat messages. Whatever is raised is a problem of the record.


def from_vlfeedback(record, id):
    """VLFeedback (Silkie): of all completions the one with the highest mean rating against the one with the lowest."""
    completions = record["completions"]
    if isinstance(completions, dict):  # exported through `datasets`: a dict of lists, at any depth
        completions = [row(completions, i) for i in range(len(completions["response"]))]
    rated = []
    for completion in completions:
        ratings = [str(aspect["Rating"]).strip() for aspect in completion["annotations"].values()]
        if ratings and all(re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?", rating) for rating in ratings):  # not "N/A"
            rated.append((statistics.mean(map(float, ratings)), completion["response"]))
    ordered = sorted(rated, key=lambda pair: -pair[0])
    if not rated or ordered[0][0] == ordered[-1][0]:
        return None
    worst = next(response for rating, response in rated if rating == ordered[-1][0])
    chosen, rejected = (re.sub(r"【[^【】†]*†[^【】]*】", "", text) for text in (ordered[0][1], worst))  # citation marks
    return record["prompt"], chosen, rejected, first(record, *IMAGE_FIELDS) or f"{id}.jpg"


def from_preference(record, id):
    """The authors' release, TRL's vision preferences and their like."""
    chosen, rejected = record["chosen"], record["rejected"]
    question = first(record, "prompt", "question")
    if question is None:  # two conversations that differ in their last turn
        question = chosen[:-1]
        if not isinstance(question, list) or not question:
            raise BadInput("has no field 'prompt' or 'question'")
        if question != rejected[:-1]:
            raise BadInput("'chosen' and 'rejected' differ before their last turn")
    return question, answer_of(chosen, "chosen"), answer_of(rejected, "rejected"), first(record, *IMAGE_FIELDS)


FORMATS = {"completions": from_vlfeedback, "chosen": from_preference}  # by the field that tells a format
IMAGE_FIELDS = ("img_path", "image", "images", "image_path")


def row(columns, i):
    return {k: row(v, i) for k, v in columns.items()} if isinstance(columns, dict) else columns[i]


def first(record, *names):
    """The first of these fields that is there and not null, or None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def find_images(value, roots):
    """A path, or a list of them -> paths of files that are there. Raises BadInput."""
    images = [image.get("path") if isinstance(image, dict) else image for image in (value if isinstance(value, list) else [value])]
    if not images or not all(isinstance(image, str) and image for image in images):
        raise BadInput("has no image path ('img_path', 'image' or 'images')")
    return tuple(find_image(image, roots) for image in images)


def find_image(image, roots):
    if os.path.isabs(image):
        roots = [Path("/")]
    elif Path(os.path.normpath(image)).parts[:1] == ("..",):
        raise BadInput(f"image path {image!r} climbs out of the image folder")
    for root in roots:
        if (root / image).is_file():
            return str(root / image)
    raise BadInput(f"no image {image!r} in {' or '.join(map(str, roots))}")


def read_question(question, n_images):
    """Text or chat messages up to the question -> text, or messages with an image part where each image belongs.

    n_images: how many the record has; None for any number. Where no message shows an image, the first of the user's
    opens with all of them. A lone question after its images becomes text.
    """
    if isinstance(question, str):
        return bare_question(question, n_images)
    if not isinstance(question, list):
        raise BadInput("'prompt' is neither text nor a list of chat messages")
    messages = [read_message(message, "prompt") for message in question]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise BadInput(f"'prompt' has the roles {roles}: user and assistant must take turns, and the user ends")
    n_shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if n_shown == 0 and n_images:
        first = messages[roles.index("user")]
        first["content"] = [{"type": "image"}] * n_images + first["content"]
    elif n_images not in (None, n_shown):
        raise BadInput(f"'prompt' shows {n_shown} images, the record has {n_images}")
    content = messages[0]["content"]
    if roles == ["user"] and len(texts_of(messages)) == 1 and content[-1]["type"] == "text":
        return content[-1]["text"].strip()
    return messages


def bare_question(prompt, n_images):
    """The question alone, out of the authors' prompts, which hold Bunny's whole template, or of `<image>\\nquestion`."""
    n_shown = prompt.count("<image>")
    if n_images is not None and n_shown not in (0, n_images):
        raise BadInput(f"'prompt' shows {n_shown} images, the record has {n_images}")
    system, user, question = prompt.partition("USER: ")
    if user and question.rstrip().endswith(" ASSISTANT:"):
        if system.strip() not in ("", BUNNY_SYSTEM):
            raise BadInput("'prompt' opens with a system text that is not Bunny's")
        prompt = question.rstrip().removesuffix(" ASSISTANT:")
    around = [text for text in prompt.split("<image>") if text.strip()]
    return (around[0] if len(around) == 1 else prompt).strip()


def answer_of(value, name):
    """A response: text, or the last of chat messages."""
    if isinstance(value, str):
        return value
    message = read_message(value[-1] if isinstance(value, list) and value else value, name)
    if message["role"] != "assistant" or any(part["type"] == "image" for part in message["content"]):
        raise BadInput(f"'{name}' must end in an assistant message of text")
    return "\n".join(texts_of([message]))


def read_message(message, name):
    """One chat message -> {"role", "content": parts of type "text" or "image"}. Raises BadInput."""
    if not isinstance(message, dict):
        raise BadInput(f"'{name}' is neither text nor a list of chat messages")
    if message.get("role") not in ("system", "user", "assistant"):
        raise BadInput(f"'{name}' holds a message whose role is not system, user or assistant")
    content, parts = message.get("content"), []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
        if part.get("type") == "image":
            parts.append({"type": "image"})
        elif isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise BadInput(f"'{name}' holds a message part that is neither text nor an image")
    if not any(part["type"] == "text" for part in parts):
        raise BadInput(f"'{name}' holds a message without text")
    return {"role": message["role"], "content": parts}


def texts_of(question):
    """The texts of a question, or of chat messages: system text, earlier turns and question."""
    if isinstance(question, str):
        return [question]
    return [part["text"] for message in question for part in message["content"] if part["type"] == "text"]


# ----------------------------------------------------------------------------------------------------------- errors


class BadInput(ValueError):
    """A user's mistake, shown as one line: what was wrong, where, and what to do."""


@contextmanager
def about(what):
    """Whatever is raised inside becomes a `BadInput` that begins with what it was about."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from error
    except Exception as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
        raise BadInput(f"{what}: {reason.splitlines()[0]}") from error


def run_command(command, argv=None):
    """Run command(argv) -> its exit status: 2 for `BadInput`, which is printed as one line unless argv has --debug."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return command(argv)
    except KeyboardInterrupt:
        return 130
    except BadInput as error:
        if "--debug" in argv:
            raise
        message = str(error).strip()
        if message.startswith("Caught"):  # raised in a DataLoader worker: its traceback, then the message
            message = message.splitlines()[-1].partition(": ")[2]
        print(f"error: {message}", file=sys.stderr)
        return 2


# ----------------------------------------------------------------------------------------------------- command line


def check_file(argv):
    parser = argparse.ArgumentParser(description="Check a preference file and its images, without any model.")
    parser.add_argument("file")
    parser.add_argument("--images", metavar="DIR", help="where relative image paths begin (default: the file's folder)")
    parser.add_argument("--subset", metavar="PREFIX", help="only ids that begin so, e.g. llava (paper 4.1)")
    args = parser.parse_args(argv)
    examples, problems, n_unpaired = scan(args.file, args.images, args.subset)
    print(f"{args.file}: {len(examples)} good, {len(problems)} bad, {n_unpaired} without a preference")
    print(f"images: {len({image for example in examples for image in example.images})} different")
    for name in ("question", "chosen", "rejected"):
        lengths = [len(" ".join(texts_of(getattr(example, name))).split()) for example in examples] or [0]
        print(f"{name + ' words:':16} mean {statistics.mean(lengths):.1f}, median {statistics.median(lengths):g}, "
              f"longest {max(lengths)}")  # fmt: skip
    if problems:
        print(report(problems, most=len(problems)), file=sys.stderr)
    return 1 if problems or not examples else 0


def main(argv=None):
    return run_command(check_file, argv)


if __name__ == "__main__":
    sys.exit(main())
