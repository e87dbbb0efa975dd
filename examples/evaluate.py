"""Score an adapter on a preference file: the README's metrics; margins without the image and with another's.

    python examples/evaluate.py --model M --adapter RUN --data FILE [--images DIR] [--limit N]

Loss, rejected images and seed are the run's, so that a run's held-out pairs get the numbers of its log.
The margin r(m,q,y_w) - r(m,q,y_l) is what DPO's loss sees. A preference that looks at the image should lose
its margin when the image is taken away; what is left was learned from the words alone.
Intervals are bootstrap intervals of the mean over the examples.
"""

import json
import math
import os
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import SCORED, Pairs, about, make_batch, open_image, read_examples, run_command
from examples import answer, variants
from mdpo import mdpo_loss, mdpo_step

LEVEL = 0.95  # of the intervals


@torch.no_grad()
def score(objective, processor, pair_of, indices, names, batch_size=8, max_length=2048):
    """-> {metric of the objective, a partial `mdpo_step`: a float for each index}.

    pair_of: index -> `Example` with its images. names: of `make_batch`.
    """
    metrics = defaultdict(list)
    for some in tqdm(train.split(indices, batch_size), leave=False, disable=None):
        batch = make_batch([pair_of(i) for i in some], processor, names, max_length)
        for name, values in objective(batch)[1].items():
            metrics[name] += values.tolist()
    return metrics


def score_margins(model, processor, examples, beta=0.1, batch_size=8):
    """-> {"image": reward margins, "no_image": ..., "other_image": ...}, of the examples with such images; no text is cut."""
    shown = {
        "image": [example.images or None for example in examples],
        "no_image": [()] * len(examples),
        "other_image": [another_image(examples, index) for index in range(len(examples))],
    }
    objective, margins = partial(mdpo_step, model, beta=beta, conditional=False, anchors=()), {}
    for name, paths in shown.items():
        pair_of = lambda i: examples[i]._replace(images=tuple(map(open_image, paths[i])), images_rejected=())
        indices = [i for i in range(len(examples)) if paths[i] is not None]
        options = ("chosen", "rejected"), batch_size, sys.maxsize
        margins[name] = score(objective, processor, pair_of, indices, *options)["rewards/margins"]
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
    draws = (torch.randint(len(values), values.shape, generator=generator) for _ in range(resamples))
    means = torch.stack([values[draw].mean() for draw in draws])
    return means.quantile(means.new_tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])).tolist()


def make_parser(doc, needs_adapter=True):
    """The arguments that this command and examples/words.py share."""
    parser = answer.make_parser(doc, needs_adapter)
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="pairs that were not trained on")
    add("--images", metavar="DIR", help="where relative image paths begin")
    add("--limit", type=train.whole, help="a sample of so many examples")
    add("--no-image", action="store_true", help="leave the images out; for data that have none")
    return parser


def load(args):
    """-> what the run was trained with (or train.py's defaults), examples, `Pairs`, model, processor."""
    trained, path = train.parse_args(["--model", "?", "--data", "?"]), Path(args.adapter or "", "args.json")
    if args.adapter and path.is_file():
        with about(f"{path}: cannot be read"):
            vars(trained).update(json.loads(path.read_text()))
    args.no_image |= trained.no_image
    options = {"limit": args.limit, "with_images": not args.no_image, "max_length": trained.max_length}
    options["max_pixels"] = trained.max_pixels
    processor = train.load_processor(args.model)
    examples = read_examples(args.data, args.images, processor=processor, skip_bad=True, **options)
    pairs = Pairs(examples, trained.reject, trained.crop, trained.seed, max_pixels=trained.max_pixels)
    return trained, examples, pairs, *answer.load_tuned(args.model, args.adapter, args.device)


def line(title, values, note=""):
    if not values:
        return f"  {title:26}        n/a"
    low, high = bootstrap(values)
    return f"  {title:26} {statistics.fmean(values):10.4f} {low:11.4f} to {high:7.4f}   {note}".rstrip()


def run(argv):
    args = make_parser(__doc__).parse_args(argv)
    trained, examples, pairs, model, processor = load(args)
    names, anchors, conditional = tuple(SCORED), set(trained.anchors) - {"none"}, trained.conditional
    if args.no_image:  # less the terms that need a rejected image
        names, anchors, conditional = names[:2], anchors - {"image_rejected"}, False
    options = {"beta": trained.beta, "delta": trained.delta, "conditional": conditional, "anchors": anchors}
    losses = {f.__qualname__: f for f, _ in [(mdpo_loss, ()), *variants.VARIANTS.values()]}
    pair_of, name = lambda i: pairs["held out", i], vars(trained).get("loss", "mdpo_loss")
    with about(f"the run's loss, {name} of mdpo.py or variants.py"):
        objective = partial(mdpo_step, model, loss=losses[name], **options)
        indices, max_length = range(len(pairs)), trained.max_length
        metrics = score(objective, processor, pair_of, indices, names, max_length=max_length)
    margins = score_margins(model, processor, examples, trained.beta)
    print(f"{len(examples)} examples: means, and bootstrap intervals of level {LEVEL:.0%}")
    print("\n".join(line(name, values) for name, values in metrics.items()))
    shares = diagnose(margins)
    for name, values in margins.items():
        share = shares.get(f"{name}_share", math.nan)
        note = "" if math.isnan(share) else f"{share:.1%} of the first"
        note += f" ({len(values)} examples)" * (len(values) < len(examples))
        print(line("margin, " + name.replace("_", " "), values, note))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
