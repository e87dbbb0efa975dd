"""Draw the picture of the README: `python examples/picture.py` writes examples/picture.png.

It shows the first description of several shapes in the demo's data whose chosen answer is true and whose
rejected answer is false. The result is read from the demo's output in the README.
"""

import random
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import random_crop
from examples import shapes
from train import replacing

HERE, BLUE, RED, GREY = Path(__file__).resolve().parent, (20, 90, 190), (190, 40, 30), (110, 110, 110)
METRICS = {"hallucination_rate": "answers with a false claim", "false_premise": "false premises refused"}
COMPARED = {"eq. 5": ("m_w", "y_l", RED, "prefer the better answer")}  # with m_w, y_w
COMPARED |= {"eq. 6": ("m_l", "y_w", BLUE, "prefer the image that shows it")}
COMPARED |= {"eq. 7": ("blank", "delta = 0", "black", "keep the chosen answer likely")}


def contents():
    """-> {name: question, answer or result}, {name: image}."""
    rng, is_true = random.Random("pairs 0"), []  # as `shapes.write_pairs` draws the demo's
    while is_true != [True, False] or question != ("describe",) or len(scene) == 1:  # noqa: F821
        scene, question, *answers = shapes.make_pair(rng)
        image, truth = shapes.draw_scene(scene, rng), shapes.claims_of(scene, question)
        is_true = [shapes.parse_answer(question, text) == truth for text in answers]
    texts = {"q": shapes.question_text(question), "y_w": answers[0], "y_l": answers[1]}
    readme = (HERE.parent / "README.md").read_text("utf-8")
    texts |= {name: re.search(rf"^  {name} +(\S+ +\S+ +\S+) ", readme, re.MULTILINE)[1] for name in METRICS}
    crop, blank = random_crop(image, random.Random(0)), Image.new("RGB", image.size, "white")
    return texts, {"m_w": image, "m_l": crop, "blank": blank}


def draw(texts, images):
    sheet, font = Image.new("RGB", (1050, 520), "white"), ImageFont.load_default(19)
    pen = ImageDraw.Draw(sheet)
    write = lambda x, y, text, colour="black": pen.text((x, y), text, colour, font, anchor="lm")
    show = lambda x, y, name, side: sheet.paste(images[name].resize((side, side), 0), (x, y))  # 0: nearest
    for name, y, what in ("m_w", 12, "m_w: the image"), ("m_l", 250, "m_l: a crop of it"):
        show(16, y, name, 200)
        write(16, y + 215, what)
    for name, y, colour in ("q", 26, "black"), ("y_w", 58, BLUE), ("y_l", 90, RED):
        write(256, y, f"{name}:  {texts[name]}", colour)
    write(256, 138, "mDPO's loss compares rewards, r = beta (log pi - log pi_ref):", GREY)
    for y, (equation, (image, worse, colour, meaning)) in zip((192, 266, 340), COMPARED.items()):
        words = ((256, equation, GREY), (394, "y_w", BLUE), (462, ">", "black"), (572, worse, colour))
        for x, text, ink in (*words, (690, meaning, "black")):
            write(x, y, text, ink)
        show(322, y - 30, "m_w", 60)
        show(500, y - 30, image, 60)
    write(256, 402, "The demo on held-out questions: before (grey), DPO (red), mDPO (blue):", GREY)
    for y, (name, what) in zip((438, 486), METRICS.items()):
        shares = [*map(float, texts[name].split())]
        write(256, y, what)
        write(874, y, " / ".join(f"{share:.0%}" for share in shares))
        for n, (share, colour) in enumerate(zip(shares, (GREY, RED, BLUE))):
            pen.rectangle((500, y - 18 + 12 * n, 500 + 360 * share, y - 8 + 12 * n), colour)
    return sheet


if __name__ == "__main__":
    (texts, images), info = contents(), PngImagePlugin.PngInfo()
    info.add_text("shows", repr(texts))
    with replacing(HERE) as new:
        draw(texts, images).save(new / "picture.png", pnginfo=info, optimize=True)
