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
    question: str
    chosen: str
    rejected: str
    image: str | None  # a path; None where the images are left out


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
    placeholders = {"<image>", getattr(processor, "image_token", None) or "<image>"}

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
            size = open_image(examples[index].image).size if with_images else None
            if checker:
                checker(examples[index].question, size)
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
        question = message_text(field(record, "prompt", "question"), "prompt", "user")
        chosen = message_text(field(record, "chosen"), "chosen", "assistant")
        rejected = message_text(field(record, "rejected"), "rejected", "assistant")
    if not isinstance(question, str):
        raise BadInput(f"'prompt' is {kind(question)}, not text")
    question, chosen, rejected = bare_question(question), chosen.strip(), rejected.strip()

    for name, text in (("prompt", question), ("chosen", chosen), ("rejected", rejected)):
        if not text:
            raise BadInput(f"'{name}' is empty")
        for placeholder in placeholders:
            if placeholder in text:
                raise BadInput(f"'{name}' holds the image token {placeholder!r} in its text")
    if chosen == rejected:
        raise BadInput("'chosen' and 'rejected' are equal")
    return Example(id, question, chosen, rejected, find_image(image, roots) if with_images else None)


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


def message_text(value, name, role):
    """Plain text, or chat messages whose last one is `role`'s: the text of that one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise BadInput(f"'{name}' is {kind(value)}, neither text nor a list of chat messages")
    if value[-1].get("role") != role or (role == "user" and len(value) > 1):
        raise BadInput(f"'{name}' must be one {role} message; system messages and earlier turns are not supported")
    content = value[-1].get("content")
    if isinstance(content, str):
        return content
    parts = [p.get("text", "") for p in content or [] if isinstance(p, dict) and p.get("type") == "text"]
    if not parts or not all(isinstance(p, str) for p in parts):
        raise BadInput(f"'{name}' holds a message without text")
    return "\n".join(parts)


def bare_question(prompt):
    """The question alone, out of the authors' prompts, which hold Bunny's whole template, or of `<image>\\nquestion`."""
    template = re.fullmatch(r"(?P<system>.*?)\s*USER: (?P<question>.*) ASSISTANT:\s*", prompt, re.DOTALL)
    if template and template["system"] not in ("", BUNNY_SYSTEM):
        raise BadInput("'prompt' opens with a system text that is not Bunny's")
    question = (template["question"] if template else prompt).strip()
    return re.sub(r"^<image>\s*|\s*<image>$", "", question, count=1).strip()


def best_and_worst(completions):
    """VLFeedback's completions -> responses with the highest and lowest mean rating; None if tied or unrated."""
    if isinstance(completions, dict):  # exported through `datasets`: a dict of lists, at any depth
        completions = [row(completions, i) for i in range(len(completions.get("response", ())))]
    rated = []
    for completion in completions:
        try:
            ratings = [float(aspect["Rating"]) for aspect in completion["annotations"].values()]
            rated.append((statistics.mean(ratings), completion["response"]))
        except ValueError:  # "N/A", or no ratings at all
            continue
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"'completions' is not in VLFeedback's form ({error!r})") from None
    if not rated:
        return None
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        return None
    return tuple(re.sub(r"【[^】]*†[^】]*】", "", response) for _, response in (best, worst))  # citation marks


def row(columns, i):
    return {k: row(v, i) for k, v in columns.items()} if isinstance(columns, dict) else columns[i]


def find_image(image, roots):
    if isinstance(image, list):
        if len(image) != 1:
            raise BadInput(f"has {len(image)} images; one is needed")
        image = image[0]
    if isinstance(image, dict):
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise BadInput("has no image path ('img_path', 'image' or 'images')")
    if os.path.isabs(image):
        roots = [Path("/")]
    elif os.path.normpath(image).startswith(".."):
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
    """The rejected image m_l made from m_w (paper 3.2 and Table 3): PIL RGB -> PIL RGB of the same size.

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

    The rejected image is a pure function of (seed, epoch, index): policy and reference share it, and a resumed run
    meets it again. "random" takes an image of `pool` (default: the examples' own) that is not the example's.
    """

    def __init__(self, examples, strategy="crop", crop=CROP, seed=0, pool=None):
        self.examples, self.strategy, self.crop, self.seed = examples, strategy, crop, seed
        self.pool = sorted({e.image for e in (pool or examples)} - {None})
        if strategy == "random" and len(self.pool) == 1:
            raise BadInput("rejected images of strategy 'random' need at least two different images in the data")

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        epoch, index = key
        example = self.examples[index]
        if example.image is None:
            return example.question, example.chosen, example.rejected, None, None
        rng = random.Random(f"{self.seed} {epoch} {index}")
        image, other = open_image(example.image), None
        if self.strategy == "random":
            path = example.image
            while path == example.image:
                path = rng.choice(self.pool)
            other = open_image(path)
        rejected_image = reject_image(image, self.strategy, rng, self.crop, other)
        return example.question, example.chosen, example.rejected, image, rejected_image


# ------------------------------------------------------------------------------------------------------------ batch

# Rows of an example: (which image: 0 is m_w and 1 m_l, which responses: indices into LogPs).
LAYOUTS = {
    "packed": ((0, (0, 1)), (1, (2,))),  # [m_w | q | y_w | y_l], [m_l | q | y_w]
    "plain": ((0, (0,)), (0, (1,)), (1, (2,))),  # [m_w | q | y_w], [m_w | q | y_l], [m_l | q | y_w]
}


def make_batch(items, processor, layout="packed", image_rejected=True, max_length=2048):
    """Lay B examples out as rows of tokens, for `mdpo.response_logps`.

    items: B tuples (question, chosen, rejected, image, rejected_image), the images PIL RGB, or None: no images.
    processor: an image-text-to-text processor with a chat template; its tokenizer has a pad token.
    layout: "packed" (2 rows an example) or "plain" (3). image_rejected: False leaves out the rows with m_l.
    max_length: tokens of prompt and one response; a longer response is cut on the right, the prompt never is.
    Returns a dict; its R rows are ordered by kind, then by example:
        input_ids (R, T)
        packed: segments, position_ids (R, T), see `mdpo.packed_attention_mask`; plain: attention_mask (R, T)
        predictors, targets (R, K): positions whose logits predict a response token, and these tokens
        target_field (R, K): the index into `LogPs` that a token counts for, -1 in padding
        pixel_values (2B, C, H, W): m_w of every example, then m_l; image_of_row: R indices into them
        batch_size: B; has_image_rejected
    Raises BadInput where a prompt leaves no room for a response, or where the processor asks for more than pixels.
    """
    has_image = items[0][3] is not None
    tokenized = [tokenize(processor, *item[:3], has_image) for item in items]
    prefixes = [[t.prompt_ids[: t.n_shared] for t in tokenized]]  # [which image][example] -> token ids
    columns = {name: [] for name in ("input_ids", "segments", "position_ids", "predictors", "targets", "target_field")}
    batch = {"batch_size": len(items), "has_image_rejected": image_rejected, "image_of_row": []}
    if has_image:
        images = [item[3] for item in items] + [item[4] for item in items if image_rejected]
        prompts = [t.prompt for t in tokenized] * (len(images) // len(items))
        encoded = encode_prompts(processor, prompts, images)
        masks = encoded.pop("attention_mask").bool()
        expanded = [ids[mask].tolist() for ids, mask in zip(encoded.pop("input_ids"), masks)]
        if set(encoded) != {"pixel_values"}:
            raise BadInput(f"this model's processor returns {sorted(encoded)}: only models of the Llava class, which "
                           "take pixel_values alone, can be trained")  # fmt: skip
        batch["pixel_values"] = encoded["pixel_values"]
        # What follows the image's tokens is tokenised alike with one placeholder and with its hundreds of tokens.
        cut = [len(t.prompt_ids) - t.n_shared for t in tokenized] * 2
        expanded = [ids[: len(ids) - n] for ids, n in zip(expanded, cut)]
        prefixes = [expanded[: len(items)], expanded[len(items) :]]

    for which_image, fields in LAYOUTS[layout][: None if image_rejected else -1]:
        for i, prefix in enumerate(prefixes[which_image]):
            start, room = len(prefix), room_for_response(len(prefix), max_length)
            row = {name: [] for name in columns}
            row |= {"input_ids": prefix[:], "segments": [1] * start, "position_ids": list(range(start))}
            for field_index in fields:
                response = tokenized[i].responses[field_index == 1][:room]  # y_l for field 1, else y_w
                end = len(row["input_ids"])
                # The prefix's last token predicts the first of each response, which goes on where the prefix ended.
                row["predictors"] += [start - 1, *range(end, end + len(response) - 1)]
                row["position_ids"] += range(start, start + len(response))
                row["segments"] += [2 + field_index] * len(response)
                row["target_field"] += [field_index] * len(response)
                row["targets"] += response
                row["input_ids"] += response
            for name, values in row.items():
                columns[name].append(torch.tensor(values))
            batch["image_of_row"].append(which_image * len(items) + i)

    padding = {"input_ids": processor.tokenizer.pad_token_id, "target_field": -1}
    batch |= {name: pad_sequence(rows, True, padding.get(name, 0)) for name, rows in columns.items()}
    if layout == "plain":
        batch["attention_mask"] = (batch.pop("segments") > 0).long()
        del batch["position_ids"]
    return batch


class Tokenized(NamedTuple):
    prompt: str  # with one placeholder for the image
    prompt_ids: list[int]
    n_shared: int  # tokens that prompt, prompt + y_w and prompt + y_l begin with; responses are what follows
    responses: tuple[list[int], list[int]]  # y_w, y_l, each with its end-of-sequence


def tokenize(processor, question, chosen, rejected, has_image):
    """Texts -> `Tokenized`. Prompt and response are tokenised whole, since tokens may merge across the boundary."""
    tokenizer = processor.tokenizer
    content = [{"type": "image"}] * has_image + [{"type": "text", "text": question}]
    user = {"role": "user", "content": content}
    prompt = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    # A stand-in for the response shows what the template puts before it and after it.
    stand_in = "\ue000"
    assistant = {"role": "assistant", "content": [{"type": "text", "text": stand_in}]}
    before, _, after = processor.apply_chat_template([user, assistant], tokenize=False).partition(stand_in)
    ending = after.strip() or tokenizer.eos_token

    special = {"add_special_tokens": not starts_with_bos(processor, prompt)}
    prompt_ids, *wholes = (
        tokenizer(text, **special).input_ids for text in (prompt, before + chosen + ending, before + rejected + ending)
    )
    n_shared = 0
    for tokens in zip(prompt_ids, *wholes):
        if len(set(tokens)) > 1:
            break
        n_shared += 1
    if has_image and tokenizer.convert_tokens_to_ids(processor.image_token) not in prompt_ids[:n_shared]:
        raise BadInput("this model's chat template changes the text before the image once a response is there")
    responses = []
    for whole in wholes:
        response = whole[n_shared:]
        if tokenizer.eos_token_id in response:  # what follows the first end-of-sequence is never generated
            response = response[: response.index(tokenizer.eos_token_id) + 1]
        responses.append(response)
    return Tokenized(prompt, prompt_ids, n_shared, tuple(responses))


def starts_with_bos(processor, text):
    bos = processor.tokenizer.bos_token
    return bos is not None and text.startswith(bos)


def encode_prompts(processor, prompts, images):
    """The processor's own call: prompts with their image tokens expanded, padded as for generation, and the images."""
    return processor(
        text=prompts,
        images=[[image] for image in images],
        add_special_tokens=not starts_with_bos(processor, prompts[0]),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


class RoomChecker:
    """Raises BadInput for a question whose prompt leaves no room for one response token within max_length."""

    def __init__(self, processor, max_length):
        self.processor, self.max_length, self.extra = processor, max_length, {None: 0}

    def __call__(self, question, image_size):
        tokenized = tokenize(self.processor, question, "a", "b", image_size is not None)
        if image_size not in self.extra:  # how many tokens an image of this size adds to its placeholder
            encoded = encode_prompts(self.processor, [tokenized.prompt], [Image.new("RGB", image_size)])
            self.extra[image_size] = encoded["input_ids"].shape[1] - len(tokenized.prompt_ids)
        room_for_response(tokenized.n_shared + self.extra[image_size], self.max_length)


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
    print(f"images: {len({e.image for e in examples})} different")
    for name in ("question", "chosen", "rejected"):
        lengths = [len(getattr(example, name).split()) for example in examples] or [0]
        print(f"{name + ' words:':16} mean {statistics.mean(lengths):.1f}, median {statistics.median(lengths):g}, "
              f"longest {max(lengths)}")  # fmt: skip
    if problems:
        print(report(problems, most=len(problems)), file=sys.stderr)
    return 1 if problems or not examples else 0


if __name__ == "__main__":
    sys.exit(main())
