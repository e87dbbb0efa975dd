"""Which words look at the image? log p(token | m_w) - log p(token | m_l) of each token of y_w and y_l.

    python examples/words.py --model M --adapter RUN --data FILE --to words.html

Blue: likelier with the image; red: likelier with the rejected one. Without --adapter: the base model alone.
"""

import base64
import html
import io
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import ImageOps
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, make_batch, run_command
from examples.answer import text_of
from examples.evaluate import load, make_parser
from mdpo import forward_inputs
from train import replacing

SCALE = 3  # nats, of the fullest colour
HEAD = """<!doctype html><meta charset="utf-8"><title>Words that look at the image</title>
<style>body {font: 16px/1.8 sans-serif; margin: 2em} span {padding: 2px 0; white-space: pre-wrap}
b {display: inline-block; min-width: 13em} figure {display: inline-block; margin: 0 1em 0 0}</style>
<h1>Words that look at the image</h1>
<p>log p(token | image) - log p(token | rejected image) in nats; before an answer, its sum. What training changed most
comes first.</p>"""


@torch.no_grad()
def differences(model, processor, pair, max_length):
    """-> {"chosen": [(text of a token, log p(token | m_w) - log p(token | m_l))], "rejected": ...}"""
    words, logps = {}, []
    for images in (pair.images, pair.images_rejected):
        batch = make_batch([pair._replace(images=images)], processor, ("chosen", "rejected"), max_length)
        logits = model(**forward_inputs(model, batch)).logits[:, :-1].float().cpu()  # (2, K, V)
        targets = batch.labels[:, -logits.shape[1] :]  # (2, K)
        logps.append(-F.cross_entropy(logits.mT, targets, reduction="none"))  # (2, K), 0 outside the response
    for name, values, of_row in zip(batch.names, logps[0] - logps[1], targets):
        real = of_row >= 0
        words[name] = [*zip(token_texts(processor.tokenizer, of_row[real].tolist()), values[real].tolist())]
    return words


def token_texts(tokenizer, ids):
    """The text that each token adds. A character of several tokens is its last one's."""
    texts = [tokenizer.decode(ids[:n]).rstrip("\ufffd") for n in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:])]


def rows_of(model, processor, pair, max_length):
    """-> [(title with the sum, words)]: the chosen answer, the base above the tuned model, then the rejected one."""
    rows, tuned = [], hasattr(model, "disable_adapter")
    sides = {"base": model.disable_adapter, "tuned": nullcontext} if tuned else {"base": nullcontext}
    for side, context in sides.items():
        with context():
            for name, words in differences(model, processor, pair, max_length).items():
                rows.append((f"{name}, {side}: {sum(value for _, value in words):+.2f}", words))
    return sorted(rows)


def change(rows):
    """How far base and tuned model are apart, summed over all tokens of `rows_of`; 0 for a base alone."""
    pairs = zip(rows[::2], rows[1::2]) if "tuned" in rows[1][0] else []
    return sum(abs(a - b) for (_, before), (_, after) in pairs for (_, a), (_, b) in zip(before, after))


def as_page(shown):
    """[(pair, rows)] -> a page of HTML, without scripts; those that changed most come first."""
    ends = {-SCALE: ": likelier with the rejected image", SCALE: ": likelier with the image"}
    legend = [(f" {value:+}{ends.get(value, '')} ", value) for value in range(-SCALE, SCALE + 1)]
    parts = [HEAD, as_line("legend", legend)]
    for pair, rows in sorted(shown, key=lambda example: -change(example[1])):
        question = text_of(pair).replace("\n", " / ")  # its turns in one line
        parts.append(f"<h2>{html.escape(f'{pair.id} / {question}')}</h2>")
        for caption, images in ("image", pair.images), ("rejected image", pair.images_rejected):
            for image in images:
                ImageOps.contain(image, (240, 180)).save(file := io.BytesIO(), "PNG")
                source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
                parts.append(f'<figure><img src="{source}"><figcaption>{caption}</figcaption></figure>')
        parts += [as_line(*row) for row in rows]
    return "\n".join(parts)


def as_line(title, words):
    span = '<span style="background: rgb({} / {:.0%})" title="{:+.2f}">{}</span>'.format
    blue, red = "90 150 255", "255 110 100"
    spans = [span(blue if value > 0 else red, abs(value) / SCALE, value, html.escape(text)) for text, value in words]
    return f"<div><b>{title}</b>{''.join(spans)}</div>"


def run(argv):
    parser = make_parser(__doc__, needs_adapter=False)
    parser.add_argument("--to", required=True, type=Path, metavar="FILE", help="a new page, .html")
    args = parser.parse_args(argv)
    if os.path.lexists(args.to):
        raise BadInput(f"{args.to}: already exists")
    trained, examples, pairs, model, processor = load(args)
    drawn = [pairs["held out", i] for i in range(len(examples))]
    page = as_page([(pair, rows_of(model, processor, pair, trained.max_length)) for pair in drawn])
    with replacing(args.to.parent) as new:
        (new / args.to.name).write_text(page, "utf-8")
    print(f"{args.to}: {len(drawn)} examples")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
