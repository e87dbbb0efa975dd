"""How much of a preference is unconditional? The reward margin with the image, without it, and with another image.

    python examples/unconditional.py --model M --adapter OUT --data held_out.json [--images DIR] [--limit 200]

The margin r(m,q,y_w) - r(m,q,y_l) is what DPO's loss sees. A preference that looks at the image should lose its margin
when the image is taken away; what survives was learned from the words alone.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Pairs, make_batch, read_examples, run_command
from examples.answer import load_tuned
from mdpo import mdpo_loss, response_logps
from train import quiet_libraries


@torch.no_grad()
def reward_margins(model, processor, pairs, beta=0.1, batch_size=8):
    """Reward margins of a peft model over its base, a float for each pair; no image is rejected."""
    margins = []
    for at in tqdm(range(0, len(pairs), batch_size), leave=False, disable=None):
        batch = make_batch(pairs[at : at + batch_size], processor, "plain", ("chosen", "rejected"))
        policy_logps = response_logps(model, batch)
        with model.disable_adapter():
            ref_logps = response_logps(model, batch)
        _, metrics = mdpo_loss(policy_logps, ref_logps, beta, conditional=False, anchors=())
        margins += metrics["rewards/margins"].tolist()
    return margins


def diagnose(model, processor, examples, beta=0.1, batch_size=8):
    """-> {"image": mean margin, "no_image": ..., "other_image": ..., and what share of the first each of these is}.

    Margins are in units of reward. The other image is that of the next example whose image is another file:
    in many data sets several questions in a row are about one image. Without a margin there are no shares of
    it: they are nan. Raises BadInput if the data have but one image.
    """
    others = [another_example(examples, index) for index in range(len(examples))]
    pairs = [Pairs(examples)["unconditional", i] for i in range(len(examples))]
    variants = {
        "image": pairs,
        "no_image": [pair._replace(images=()) for pair in pairs],
        "other_image": [pair._replace(images=pairs[other].images) for pair, other in zip(pairs, others)],
    }
    means = {
        name: statistics.fmean(reward_margins(model, processor, of_variant, beta, batch_size))
        for name, of_variant in variants.items()
    }
    share = lambda name: means[name] / means["image"] if means["image"] else float("nan")
    return means | {f"{name}_share": share(name) for name in ("no_image", "other_image")}


def another_example(examples, index):
    """The next example, round and round, that shares no image with this one and has as many -> its index."""
    own = examples[index].images
    for step in range(1, len(examples)):
        other = (index + step) % len(examples)
        images = examples[other].images
        if len(images) == len(own) and not set(images) & set(own):
            return other
    name = examples[index].id
    raise BadInput(f"example {name}: no other example has another image, which the data need for this")


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True, help="a run's folder")
    parser.add_argument("--data", required=True, help="pairs that were not trained on")
    parser.add_argument("--images", metavar="DIR")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args(argv)
    quiet_libraries()
    examples = read_examples(args.data, args.images, limit=args.limit, skip_bad=True)
    model, processor = load_tuned(args.model, args.adapter)
    result = diagnose(model, processor, examples, args.beta)
    share = lambda name: "n/a" if math.isnan(result[name]) else f"{result[name]:.1%} of it"
    print(f"reward margin over {len(examples)} pairs")
    print(f"  with the image     {result['image']:8.4f}")
    print(f"  without an image   {result['no_image']:8.4f}   {share('no_image_share'):>13}")
    print(f"  with another image {result['other_image']:8.4f}   {share('other_image_share'):>13}")
    return 0


def main(argv=None):
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
