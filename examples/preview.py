"""Draw a contact sheet of a preference file: each image, what every strategy makes of it, question and answers.

python examples/preview.py silkie.json preview.png [--images DIR] [--count 4] [--seed 0]
"""

import argparse
import random
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Pairs, read_examples

PANELS = {  # title -> arguments of Pairs
    "chosen image": None,
    "crop 1-20%": {"strategy": "crop"},
    "crop 20-50%": {"strategy": "crop", "crop": (0.2, 0.5)},
    "random": {"strategy": "random"},
    "moco": {"strategy": "moco"},
}
WIDTH, HEIGHT, GAP, TEXT_HEIGHT = 240, 180, 10, 120


def contact_sheet(examples, pool, seed):
    """Examples -> one image, a row each; `random` takes its images from `pool`."""
    font = ImageFont.load_default(14)
    row_height = 20 + HEIGHT + TEXT_HEIGHT
    sheet = Image.new("RGB", (len(PANELS) * (WIDTH + GAP) + GAP, len(examples) * row_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, example in enumerate(examples):
        top = i * row_height + GAP
        for column, (title, arguments) in enumerate(PANELS.items()):
            left = column * (WIDTH + GAP) + GAP
            draw.text((left, top), title, "black", font)
            try:
                item = Pairs(examples, seed=seed, pool=pool, **(arguments or {}))[0, i]
            except BadInput:
                draw.text((left, top + 40), "needs a second image", "grey", font)
                continue
            panel = ImageOps.contain(item[4] if arguments else item[3], (WIDTH, HEIGHT))
            sheet.paste(panel, (left, top + 20))
        texts = [f"q: {example.question}", f"chosen: {example.chosen}", f"rejected: {example.rejected}"]
        lines = [line for text in texts for line in textwrap.wrap(text, 165, max_lines=2, placeholder=" ...")]
        draw.multiline_text((GAP, top + 24 + HEIGHT), "\n".join(lines), "black", font)
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("out")
    parser.add_argument("--images", metavar="DIR", help="where relative image paths begin")
    parser.add_argument("--count", type=int, default=4, help="how many examples (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if Path(args.out).exists():
            raise BadInput(f"{args.out}: already exists")
        pool = read_examples(args.file, args.images, skip_bad=True)
        examples = random.Random(args.seed).sample(pool, min(args.count, len(pool)))
        contact_sheet(examples, pool, args.seed).save(args.out)
    except (BadInput, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(examples)} of {len(pool)} examples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
