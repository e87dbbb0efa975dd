"""Which words look at the image? log p(token | m_w) - log p(token | m_l) of each token of y_w and y_l.

    python examples/words.py --model M --adapter RUN --data FILE --to words.html
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
from PIL import ImageOps
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Pairs, about, make_batch, read_examples, run_command
from examples import miniature, shapes
from examples.answer import load_tuned, text_of
from examples.evaluate import load, make_parser
from mdpo import forward_inputs
from train import replacing

SCALE = 3  # nats, of the fullest colour
LEGEND = [(f"-{SCALE}: likelier with the rejected image ", -SCALE)]
LEGEND += [(f" {value:+} ", value) for value in range(1 - SCALE, SCALE)]
LEGEND += [(f" +{SCALE}: likelier with the image", SCALE)]
HEAD = """<!doctype html><meta charset="utf-8"><title>Words that look at the image</title>
<style>body {font: 16px/1.8 sans-serif; margin: 2em} span {padding: 2px 0; white-space: pre-wrap}
b {display: inline-block; min-width: 13em} figure {display: inline-block; margin: 0 1em 0 0}</style>
<h1>Words that look at the image</h1>
<p>log p(token | image) - log p(token | rejected image) in nats; before an answer, its sum. What training changed most
comes first.</p>"""


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


def as_page(shown):
    """[(id, pair, rows)] -> a page of HTML, without scripts; those that changed most come first."""
    parts = [HEAD, as_line("legend", LEGEND)]
    for name, pair, rows in sorted(shown, key=lambda example: -change(example[2])):
        question = text_of(pair).replace("\n", " / ")  # its turns in one line
        parts.append(f"<h2>{html.escape(f'{name} / {question}')}</h2>")
        images = [("image", image) for image in pair.images]
        images += [("rejected image", image) for image in pair.images_rejected]
        for caption, image in images:
            ImageOps.contain(image, (240, 180)).save(file := io.BytesIO(), "PNG")
            source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            parts.append(f'<figure><img src="{source}"><figcaption>{caption}</figcaption></figure>')
        parts += [as_line(*row) for row in rows]
    return "\n".join(parts)


def as_line(title, words):
    style = lambda value: f'style="background: rgb{colour(value)}" title="{value:+.2f}"'
    spans = [f"<span {style(value)}>{html.escape(text)}</span>" for text, value in words]
    return f"<div><b>{title}</b>{''.join(spans)}</div>"


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
    parser.add_argument("--to", required=True, type=Path, metavar="FILE", help="a new page, .html")
    args = parser.parse_args(argv)
    if os.path.lexists(args.to):
        raise BadInput(f"{args.to}: already exists")
    trained, examples, pairs, model, processor = load(args)
    drawn = [pairs["held out", i] for i in range(len(examples))]
    page = as_page([(pair.id, pair, rows_of(model, processor, pair, trained.max_length)) for pair in drawn])
    with replacing(args.to.parent) as new:
        (new / args.to.name).write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
