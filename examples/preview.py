"""Draw a contact sheet of a preference file: each image, what every strategy makes of it, question and answers.

python examples/preview.py silkie.json preview.png [--images DIR] [--count 4] [--seed 0]
"""

import random
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Pairs, about, read_examples, run_command, texts_of
from train import Parser, natural, whole

PANELS = {"crop 1-20%": {"strategy": "crop"}, "crop 20-50%": {"strategy": "crop", "crop": (0.2, 0.5)}}
PANELS |= {name: {"strategy": name} for name in ("random", "moco")}  # title -> arguments of Pairs
WIDTH, HEIGHT, GAP, TEXT_HEIGHT = 240, 180, 10, 120


def contact_sheet(examples, pool, seed):
    """Examples -> one image, a row each, with the first image if any; `random` takes its from `pool`."""
    font, row_height = ImageFont.load_default(14), 20 + HEIGHT + TEXT_HEIGHT
    size = (1 + len(PANELS)) * (WIDTH + GAP) + GAP, len(examples) * row_height + GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    examples = [example._replace(images_rejected=()) for example in examples]  # the strategies', not the record's own
    for i, example in enumerate(examples):
        top, panels = i * row_height + GAP, {}
        for title, arguments in PANELS.items():
            try:
                pair = Pairs(examples, seed=seed, pool=pool, **arguments)[0, i]
                panels |= {"chosen image": pair.images[0], title: pair.images_rejected[0]} if pair.images else {}
            except BadInput:
                panels[title] = None
        for column, (title, panel) in enumerate(panels.items()):
            left = column * (WIDTH + GAP) + GAP
            draw.text((left, top), title, "black", font)
            if panel is None:
                draw.text((left, top + 40), "needs a second image", "grey", font)
            else:
                framed = ImageOps.expand(ImageOps.contain(panel, (WIDTH - 2, HEIGHT - 2)), 1, "grey")
                sheet.paste(framed, (left, top + 20))
        question = " / ".join(texts_of(example.question))
        texts = [f"q: {question}", f"chosen: {example.chosen}", f"rejected: {example.rejected}"]
        lines = [line for text in texts for line in textwrap.wrap(text, 165, max_lines=2, placeholder=" ...")]
        draw.multiline_text((GAP, top + 24 + HEIGHT), "\n".join(lines), "black", font)
    return sheet


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("out")
    parser.add_argument("--images", metavar="DIR", help="where relative image paths begin")
    parser.add_argument("--count", type=whole, default=4, help="how many examples (default: 4)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--no-image", action="store_true", help="the texts alone; for data without images")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise BadInput(f"{args.out}: already exists")
    pool = read_examples(args.file, args.images, skip_bad=True, with_images=not args.no_image)
    examples = random.Random(args.seed).sample(pool, min(args.count, len(pool)))
    with about(f"{args.out}: cannot be drawn"):
        contact_sheet(examples, pool, args.seed).save(args.out)
    print(f"{args.out}: {len(examples)} of {len(pool)} examples")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
