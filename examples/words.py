"""Which words look at the image? log p(token | m_w) - log p(token | m_l) of each token of y_w and y_l.

    python examples/words.py --model M --adapter RUN --data FILE --to words.html   # words.png: one example
    python examples/words.py study 0 1 2                                           # seeds of miniature.py

Blue: likelier with the image; red: likelier with the rejected one. Without --adapter: the base model alone. The page
begins with the examples that training changed most.

The study asks this in the world of `shapes.py`. For the base, DPO and mDPO of `miniature.py --quick`, it
takes the tokens of y_w of 200 held-out pairs: mean difference of colour and shape words, and of all other
tokens. m_l is a crop, as in training, or another image, which no training saw.

Predicted before any run of it, for each seed:
1. The base can see: its colour and shape words are above its other tokens, with either m_l.
2. mDPO's colour and shape words are above DPO's, with either m_l.
3. With another image as m_l, mDPO's gap (colour and shape words minus other tokens) is above DPO's. With a
   crop we predict nothing: the loss is of whole responses, and a crop of so small a picture is seen at a
   glance, so that any token may carry the difference.
4. DPO hardly changes where the words look: with a crop, its colour and shape words are off the base's by less
   than half as much as mDPO's.
"""

import base64
import html
import io
import os
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Pairs, about, chat_messages, make_batch, read_examples, run_command, texts_of
from examples import miniature, shapes
from examples.answer import load_tuned
from examples.evaluate import load, make_parser
from mdpo import forward_inputs
from train import replacing, whole

SCALE = 3  # nats, of the fullest colour
SIZE, WIDTH, LEFT, LINE = (240, 180), 1000, 230, 42  # of an image; of the drawing; where words begin; of a line
TITLE = "Words that look at the image"
LEGEND = (
    "log p(token | image) - log p(token | rejected image) in nats; before an answer, its sum",
    [
        (f"-{SCALE}: likelier with the rejected image ", -SCALE),
        *[(f" {value:+} ", value) for value in range(1 - SCALE, SCALE)],
        (f" +{SCALE}: likelier with the image", SCALE),
    ],
)


@torch.no_grad()
def differences(model, processor, pair, max_length=2048):
    """-> {"chosen": [(text of a token, log p(token | m_w) - log p(token | m_l))], "rejected": ...}"""
    names, logps = ("chosen", "rejected"), []
    for images in (pair.images, pair.images_rejected):
        batch = make_batch([pair._replace(images=images)], processor, names, max_length)
        logits = model(**forward_inputs(model, batch)).logits[:, :-1].float().cpu()  # (2, K, V)
        targets = batch.labels[:, -logits.shape[1] :]  # (2, K)
        logps.append(-F.cross_entropy(logits.mT, targets, reduction="none"))  # (2, K), 0 outside the response
    words = {}
    for name, values, of_row in zip(names, logps[0] - logps[1], targets):
        real = of_row >= 0
        words[name] = [*zip(token_texts(processor.tokenizer, of_row[real].tolist()), values[real].tolist())]
    return words


def token_texts(tokenizer, ids):
    """The text that each token adds. A character of several tokens is its last one's."""
    texts = [tokenizer.decode(ids[:n]).rstrip("\ufffd") for n in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:])]


def rows_of(model, processor, pair, max_length=2048):
    """-> [(title with the sum, words)]: the chosen answer, the base above the tuned model, then the rejected one."""
    rows, tuned = [], hasattr(model, "disable_adapter")
    sides = {"base": model.disable_adapter, "tuned": nullcontext} if tuned else {"base": nullcontext}
    for side, context in sides.items():
        with context():
            for name, words in differences(model, processor, pair, max_length).items():
                rows.append((f"{name}, {side}: {sum(value for _, value in words):+.2f}", words))
    return rows[::2] + rows[1::2]


def change(rows):
    """How far base and tuned model are apart, summed over all tokens of `rows_of`; 0 for a base alone."""
    pairs = zip(rows[::2], rows[1::2]) if "tuned" in rows[1][0] else []
    return sum(abs(a - b) for (_, before), (_, after) in pairs for (_, a), (_, b) in zip(before, after))


def colour(value):
    """White at 0, blue above, red below."""
    full = (90, 150, 255) if value > 0 else (255, 110, 100)
    return tuple(round(255 + (part - 255) * min(1, abs(value) / SCALE)) for part in full)


def captioned(pair):
    """-> [(caption, image)]"""
    sides = {"image": pair.images, "rejected image": pair.images_rejected}
    return [(caption, ImageOps.contain(image, SIZE)) for caption, images in sides.items() for image in images]


def question_of(pair):
    """Its turns in one line, without a system text."""
    messages = chat_messages(pair.question, 0)
    return " / ".join(texts_of([message for message in messages if message["role"] != "system"]))


STYLE = """<style>body {font: 16px/1.8 sans-serif; margin: 2em} span {padding: 2px 0; white-space: pre-wrap}
b {display: inline-block; min-width: 13em} figure {display: inline-block; margin: 0 1em 0 0}</style>"""


def as_page(shown):
    """[(id, pair, rows)] -> a page of HTML, without scripts; those that changed most come first."""
    head = f'<!doctype html><meta charset="utf-8"><title>{TITLE}</title>\n{STYLE}\n<h1>{TITLE}</h1>'
    parts = [head, f"<p>{LEGEND[0]}. What training changed most comes first.</p>", as_line("legend", LEGEND[1])]
    for name, pair, rows in sorted(shown, key=lambda example: -change(example[2])):
        parts.append(f"<h2>{html.escape(f'{name} / {question_of(pair)}')}</h2>")
        for caption, image in captioned(pair):
            image.save(file := io.BytesIO(), "PNG")
            source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            parts.append(f'<figure><img src="{source}"><figcaption>{caption}</figcaption></figure>')
        parts += [as_line(*row) for row in rows]
    return "\n".join(parts)


def as_line(title, words):
    style = lambda value: f'style="background: rgb{colour(value)}" title="{value:+.2f}"'
    spans = [f"<span {style(value)}>{html.escape(text)}</span>" for text, value in words]
    return f"<div><b>{title}</b>{''.join(spans)}</div>"


def as_image(pair, rows):
    """What `as_page` shows of an example, with each token's number under it."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(11)
    rows = [("legend", LEGEND[1]), *rows]
    sheet = Image.new("RGB", (WIDTH, 400 + LINE * sum(1 + len(words) for _, words in rows)), "white")
    draw, x, y = ImageDraw.Draw(sheet), 10, 70
    draw.text((10, 8), TITLE, "black", ImageFont.load_default(24))
    draw.text((10, 42), LEGEND[0], "black", font)
    for caption, image in captioned(pair):
        draw.text((x, 74), caption, "black", font)
        sheet.paste(image, (x, 100))
        x, y = x + SIZE[0] + 20, 110 + SIZE[1]
    draw.text((10, y), f"question: {question_of(pair)}", "black", font)
    for title, words in rows:
        x, y = LEFT, y + LINE
        draw.text((10, y), title, "black", font)
        for text, value in words:
            text, number = text.strip() or "\u00b7", f"{value:+z.1f}"
            n = max(font.getlength(text), small.getlength(number))
            if x + n > WIDTH - 10:
                x, y = LEFT, y + LINE
            draw.rectangle((x - 3, y - 2, x + n + 3, y + 23), colour(value))
            draw.text((x, y), text, "black", font)
            draw.text((x, y + 24), number, "black", small)
            x += n + 8
    return sheet.crop((0, 0, WIDTH, y + LINE + 4))


def study(seeds, out="runs/miniature"):
    """Print the means over tokens of y_w, for the bases and runs of `miniature.py`, made where missing."""
    things = {*shapes.COLOURS, *shapes.SHAPES}
    print("seed  m_l     model  colours and shapes  other tokens")
    for seed in seeds:
        miniature.prepare_seed(out, seed)
        folder = Path(out, f"seed-{seed}")
        examples = read_examples(folder / "held_out" / "silkie.json", log=len)
        for method in ("base", "DPO", "mDPO"):
            miniature.run_method(out, seed, method, n_scenes=200)
            model, processor = load_tuned(folder / "model", folder / method if method != "base" else None, "cpu")
            for reject in ("crop", "random"):
                pairs, values = Pairs(examples, reject, seed=seed), {True: [], False: []}
                for i in range(len(pairs)):
                    for text, value in differences(model, processor, pairs["held out", i])["chosen"]:
                        values[text.strip() in things].append(value)
                of_things, of_others = map(statistics.fmean, values.values())
                print(f"{seed:4}  {reject:6}  {method:5} {of_things:19.2f} {of_others:13.2f}", flush=True)
    return 0


def run(argv):
    if argv[:1] == ["study"]:
        with about("study takes numbers of seeds"):
            seeds = [int(word) for word in argv[1:] or [0]]
        return study(seeds)
    parser = make_parser(__doc__, needs_adapter=False)
    parser.add_argument("--to", required=True, metavar="FILE", help="a page, .html, or a picture, .png")
    parser.add_argument("--example", type=whole, default=1, help="the one in the picture (default: 1)")
    args = parser.parse_args(argv)
    to = Path(args.to)
    if os.path.lexists(to) or to.suffix not in (".html", ".png"):
        raise BadInput(f"{to}: " + ("already exists" if os.path.lexists(to) else "must end in .html or .png"))
    trained, examples, pairs, model, processor = load(args)
    if args.example > len(examples):
        raise BadInput(f"--example {args.example}: there are {len(examples)}")
    shown = lambda i: (pair := pairs["held out", i], rows_of(model, processor, pair, trained.max_length))
    if to.suffix == ".html":
        page = as_page([(example.id, *shown(i)) for i, example in enumerate(examples)])
        write = lambda file: file.write_text(page, "utf-8")
    else:
        write = as_image(*shown(args.example - 1)).save
    with replacing(to.parent) as new:
        write(new / to.name)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
