"""Score adapters on a preference file: the README's metrics; margins without the image and with another's.

    python examples/evaluate.py --model M --adapter RUN [RUN ...] --data FILE [--answers DIR]

Several adapters are all scored by loss, rejected images and seed of the first, whose values are then subtracted,
example by example. With --answers, base and adapters also answer the questions, each into a file of DIR.
A margin, r(m,q,y_w) - r(m,q,y_l), should be lost when the image is taken away.
"""

import math
import os
import re
import statistics
import sys
from argparse import Namespace
from collections import defaultdict
from functools import partial
from operator import eq, sub
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import SCORED, BadInput, Pairs, about, make_batch, read_examples, run_command
from examples import answer, variants
from mdpo import mdpo_loss, mdpo_step

LEVEL = 0.95  # of the intervals
MARGINS = {"image": "margin, image", "no_image": "margin, no image", "other_image": "margin, other image"}
REFUSAL = re.compile(
    r"\b(there (is|are) (no|not)|there (isn't|aren't)|(is|are) not (visible|shown|depicted|present)|"
    r"not in the (image|picture|photo)|(do|does)(n't| not) (show|contain|depict|include|see)|"
    r"(can ?not|can't|unable to) (see|tell|determine|identify|answer)|sorry)\b",
    re.IGNORECASE,
)


@torch.no_grad()
def score(objective, processor, pairs, names, batch_size=8, max_length=2048):
    """-> {metric of the objective, a partial `mdpo_step`: a float for each of the `Pairs`}. names: of `make_batch`"""
    metrics = defaultdict(list)
    for some in tqdm(train.split(range(len(pairs)), batch_size), leave=False, disable=None):
        batch = make_batch([pairs["held out", i] for i in some], processor, names, max_length)
        for name, values in objective(batch)[1].items():
            metrics[name] += values.tolist()
    return metrics


def score_margins(model, processor, examples, beta=0.1, batch_size=8):
    """-> {name of MARGINS: those of the examples that have such images}. No text is cut."""
    shown = {
        "image": [example.images or None for example in examples],
        "no_image": [()] * len(examples),
        "other_image": [another_image(examples, index) for index in range(len(examples))],
    }
    objective, margins = partial(mdpo_step, model, beta=beta, conditional=False, anchors=()), {}
    for name, paths in shown.items():
        pairs = [one._replace(images=new, images_rejected=()) for one, new in zip(examples, paths) if new is not None]
        options = ("chosen", "rejected"), batch_size, sys.maxsize
        margins[name] = score(objective, processor, Pairs(pairs), *options)["rewards/margins"]
    return margins


def another_image(examples, index):
    """The images of the next example, round and round, that has as many, in other files -> paths, or None."""
    own, files = examples[index].images, lambda paths: set(map(os.path.realpath, paths))
    fits = lambda images: own and len(images) == len(own) and not files(images) & files(own)
    return next(filter(fits, (other.images for other in examples[index + 1 :] + examples[:index])), None)


def diagnose(margins):
    """The margins' means, and what share of "image" the others are; nan if there is none."""
    means = {name: statistics.fmean(values) if values else math.nan for name, values in margins.items()}
    share = lambda name: means[name] / means["image"] if means["image"] else math.nan
    return means | {f"{name}_share": share(name) for name in ("no_image", "other_image")}


def bootstrap(values, resamples=2000, seed=0):
    """Percentile interval of the mean, at LEVEL -> [low, high]."""
    generator, values = torch.Generator().manual_seed(seed), torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[draws].mean(1)
    return means.quantile(means.new_tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])).tolist()


def wilson(share, n):
    """Wilson's interval of a share among n, at LEVEL -> (low, high); also where the share is 0 or 1."""
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = share + z**2 / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return (middle - spread) / (1 + z**2 / n), (middle + spread) / (1 + z**2 / n)


def make_parser(doc, needs_adapter=True, **adapter):
    """The arguments that this command and examples/words.py share. adapter: options of --adapter."""
    parser = answer.make_parser(doc, needs_adapter, **adapter)
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="pairs that were not trained on")
    add("--images", metavar="DIR", help="where relative image paths begin")
    add("--limit", type=train.whole, help="a sample of so many examples")
    add("--no-image", action="store_true", help="leave the images out; for data that have none")
    return parser


def load(args):
    """-> what the first run was trained with, examples, `Pairs`, model with its adapters, processor."""
    first = args.adapter[0] if isinstance(args.adapter, list) else args.adapter
    began, defaults = answer.read_run(first), vars(train.parse_args(["--model", "?", "--data", "?"]))
    if first and not began:
        print(f"{first}: has no args.json; train.py's defaults are taken for its beta, crop, seed and so on")
    trained = Namespace(**{"loss": "mdpo_loss"} | defaults | began)
    args.no_image |= trained.no_image
    processor = train.load_processor(args.model)
    options = {"limit": args.limit, "with_images": not args.no_image, "processor": processor, "skip_bad": True}
    options |= {"max_length": trained.max_length, "max_pixels": trained.max_pixels}
    examples = read_examples(args.data, args.images, **options)
    pairs = Pairs(examples, trained.reject, trained.crop, trained.seed, max_pixels=trained.max_pixels)
    return trained, examples, pairs, *answer.load_tuned(args.model, args.adapter, args.device)


def print_metrics(heading, metrics, notes={}):
    """A heading, and a line for each metric. notes: what stands behind the intervals of some."""
    print(heading)
    n_examples = max(map(len, metrics.values()))
    for title, values in metrics.items():
        if not values:
            print(f"  {title:26}        n/a")
            continue
        low, high = bootstrap(values)
        note = notes.get(title, "") + f" ({len(values)} examples)" * (len(values) < n_examples)
        print(f"  {title:26} {statistics.fmean(values):10.4f} {low:11.4f} to {high:7.4f}   {note}".rstrip())


def measure(answers):
    """-> {metric of an answer: a number for each}"""
    words, refused = [len(text.split()) for text in answers], [bool(REFUSAL.search(text)) for text in answers]
    return {"answers, words": words, "answers, refusals": refused}


def run(argv):
    parser = make_parser(__doc__, nargs="+")
    parser.add_argument("--answers", metavar="DIR", help="also answer the questions, into this folder")
    parser.add_argument("--max-new-tokens", type=train.whole, default=256, help="of an answer (default: 256)")
    args = parser.parse_args(argv)
    if len({*map(os.path.realpath, args.adapter)}) < len(args.adapter):
        raise BadInput("--adapter takes different runs: each minus itself is 0")
    for name in args.adapter:
        answer.read_adapter(name)  # before the data, which take minutes
    files = answer.files_in(args.answers, [None, *args.adapter]) if args.answers else {}
    trained, examples, pairs, model, processor = load(args)
    names = [*SCORED][: 2 if args.no_image else 3]  # without images, less the terms that need a rejected one
    options = {"beta": trained.beta, "delta": trained.delta, "anchors": {*trained.anchors} & {*names}}
    options["conditional"] = trained.conditional and not args.no_image
    losses = {f.__qualname__: f for f, _ in [(mdpo_loss, ()), *variants.VARIANTS.values()]}
    said = answer.answer_as(files, args.model, examples, args.max_new_tokens, loaded=(model, processor))
    print(f"{len(examples)} examples: means, and bootstrap intervals of level {LEVEL:.0%}")
    metrics = {name: measure(answers) for name, answers in said.items()}
    if said:
        print_metrics("base", metrics[None])
    first, *others = args.adapter
    for number, name in enumerate(args.adapter):
        with answer.speaking_as(model, number):
            with about(f"{name}: no score by {trained.loss} of mdpo.py or variants.py"):
                objective = partial(mdpo_step, model, loss=losses[trained.loss], **options)
                scores = score(objective, processor, pairs, names, max_length=trained.max_length)
            margins = score_margins(model, processor, examples, trained.beta)
        metrics[name] = scores | {MARGINS[kind]: values for kind, values in margins.items()} | metrics.get(name, {})
        left = {MARGINS[kind]: diagnose(margins)[f"{kind}_share"] for kind in ("no_image", "other_image")}
        notes = {title: f"{share:.1%} of the first" for title, share in left.items() if not math.isnan(share)}
        print_metrics(f"{name}, scored as {first}" if number else name, metrics[name], notes)
    for name, other in [(name, None) for name in args.adapter if said] + [(name, first) for name in others]:
        differences = {title: [*map(sub, metrics[name][title], values)] for title, values in metrics[other].items()}
        if said:
            differences["answers, equal"] = [*map(eq, said[name], said[other])]
        print_metrics(f"{name} minus {other or 'base'}", differences, {"answers, equal": "of all, no difference"})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
