"""Show what a run trains on, before it does: its rows as text, and its rejected images. No weights are loaded.

    python examples/preview.py --model M --data FILE [--rows 3] [--to preview.png]
    python examples/preview.py --resume RUN     # what a run was trained on

It takes train.py's flags: these are the very rows of that run, in its order. What is scored stands in [brackets], on
a terminal in green. --to draws m_w, the run's m_l and what every strategy of Table 3 makes of m_w.
"""

import os
import re
import sys
import textwrap
from contextlib import suppress
from os.path import commonprefix
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from data import BadInput, Pairs, run_command, tokenize
from examples.answer import chat_prompt

TITLES = dict(zip(data.SCORED, ("y_w with m_w", "y_l with m_w", "y_w with m_l")))
PANELS = {"crop 1-20%": ("crop", data.CROP), "crop 20-50%": ("crop", (0.2, 0.5))}  # --reject and --crop
PANELS |= {name: (name, data.CROP) for name in ("random", "moco")}
WIDTH, HEIGHT = 250, 210  # of a panel, with its title and the space to the next


def show_rows(processor, pair, names, max_length, marks):
    """Yield the text of each row of a pair, its images open, under a title with counts."""
    batch, shown = data.make_batch([pair], processor, names, max_length), {}
    real = batch.inputs["attention_mask"].bool()
    for name, ids, labels, kept in zip(names, batch.inputs["input_ids"], batch.labels, real):
        ids, n_scored = ids[kept].tolist(), (labels >= 0).sum().item()
        whole, prompt = fold(processor, ids), fold(processor, ids[:-n_scored])  # decoding drops a first space
        row = visible(prompt) + marks[0] + visible(whole[len(prompt) :]) + marks[1]
        text = f"the text of {shown[row]}" if row in shown else row
        yield f"{TITLES[name]}: {len(ids)} tokens, {n_scored} scored\n{textwrap.indent(text, '  ')}"
        shown[row] = TITLES[name]


def fold(processor, ids):
    """Token ids -> their text, in which a run of image tokens is counted."""
    decode = lambda ids: processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    image = decode([getattr(processor.tokenizer, "image_token_id", None) or processor.image_token_id])
    count = lambda run: f"<image> x {len(run[0]) // len(image)}"
    return re.sub(f"(?:{re.escape(image)})+", count, decode(ids))


def visible(text):
    """The text with control characters but new lines written out: data may hold a terminal's commands."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def unlike_generation(processor, pair):
    """A line if a model that is asked has another text before its answer than these rows, or ""."""
    asked, tokens = chat_prompt(processor, pair.question, len(pair.images)).rstrip(" "), tokenize(processor, pair)
    trained = commonprefix([tokens.prompt, *tokens.wholes.values()]).rstrip(" ")
    start = max(0, len(commonprefix([asked, trained])) - 20)
    ends = f"a model that is asked has {asked[start:]!r}, these rows have {trained[start:]!r}"
    return f"note: before its answer {ends}" if asked != trained else ""


def contact_sheet(args, pairs, keys):
    """`Pairs` of a run and (epoch, index) of examples -> one image, a row each, of its first image if any."""
    bare = [example._replace(images_rejected=()) for example in pairs.examples]  # not the records' own
    made_by = {"m_l of this run": pairs}
    for title, (strategy, crop) in PANELS.items():
        with suppress(BadInput):  # there is no second image
            made_by[title] = Pairs(bare, strategy, crop, args.seed, max_pixels=args.max_pixels)
    sheet = Image.new("RGB", ((1 + len(made_by)) * WIDTH, len(keys) * HEIGHT), "lightgrey")
    draw = ImageDraw.Draw(sheet)
    for top, key in zip(range(5, sheet.height, HEIGHT), keys):
        panels = {"m_w": pairs[key].images} | {title: made[key].images_rejected for title, made in made_by.items()}
        for left, (title, images) in zip(range(5, sheet.width, WIDTH), panels.items()):
            for image in images[:1]:
                draw.text((left, top), title, "black", font_size=14)
                sheet.paste(ImageOps.contain(image, (WIDTH - 10, HEIGHT - 30)), (left, top + 20))
    return sheet


def run(argv):
    parser = data.Parser(description=__doc__.splitlines()[0], allow_abbrev=False,
                    epilog="All other arguments are those of train.py: python train.py --help")  # fmt: skip
    parser.add_argument("--rows", type=train.whole, default=3, help="how many examples (default: 3)")
    parser.add_argument("--to", type=Path, metavar="FILE", help="a new picture of the rejected images, .png")
    own, of_train = parser.parse_known_args(argv)
    args = train.parse_args(of_train)
    if own.to and os.path.lexists(own.to):
        raise BadInput(f"{own.to}: already exists")
    processor = train.load_processor(args.model)
    pairs = train.read_pairs(args, processor)[0]
    n_all, notes = len(pairs), {}
    keys = train.plan_steps(n_all, n_all, n_all, 1, args.seed)[0][0][: own.rows]  # all are one batch
    names = [*TITLES][: 3 if args.conditional or "image_rejected" in args.anchors else 2]  # as in training
    marks = ("\033[32m", "\033[0m") if sys.stdout.isatty() else "[]"  # green, or brackets
    for n, pair in enumerate(map(pairs.__getitem__, keys), 1):
        print(f"\n--- example {n} of {n_all}, in the order of training: record {visible(pair.id)}")
        print(*show_rows(processor, pair, names, args.max_length, marks), sep="\n")
        notes[unlike_generation(processor, pair)] = None
    strategy = f"--reject {args.reject}, {data.STRATEGIES[args.reject].__doc__}; or a record's own"
    print("", *filter(None, notes), f"m_l of this run: {strategy if len(names) == 3 else 'none'}", sep="\n")
    if own.to:
        with train.replacing(own.to.parent) as new:  # half a picture never stays
            contact_sheet(args, pairs, keys).save(new / own.to.name)
        print(f"{own.to}: {len(keys)} examples")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
