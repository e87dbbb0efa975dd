"""A small world in which mDPO's claims can be checked exactly: drawn scenes, questions, a careless annotator, metrics.

Scenes hold one to three shapes on a 2 x 2 grid. Each shape has a habitual colour and a habitual companion. The
annotator often answers from habit instead of looking: he names the habitual colour, accepts a false premise, says yes,
adds the absent companion. A model that learned from him can see, but is biased: it hallucinates as large models do.

Preference pairs are like Silkie's: chosen answers are mostly long and polite, rejected ones terse, which the words
alone betray. Both come from the annotator. What only the image can tell is that some rejected answers are about
*another scene in which the question could have been asked*: the words have the same statistics, the image differs.
"""

import json
import random
import re
import statistics
from collections import defaultdict
from typing import NamedTuple

from PIL import Image, ImageDraw

from train import BUNNY_SYSTEM

COLOURS = {
    "red": (220, 50, 47), "green": (50, 160, 60), "blue": (50, 90, 220),
    "yellow": (235, 210, 60), "purple": (140, 60, 180), "orange": (240, 140, 30),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
HABIT = dict(zip(SHAPES, COLOURS))  # circles are usually red, squares green, ...
COMPANION = dict(zip(SHAPES, SHAPES[1:] + SHAPES[:1]))
CARELESSNESS = dict(zip(SHAPES, (0.30, 0.40, 0.48, 0.56, 0.64, 0.72)))  # chance of an answer from habit


class World(NamedTuple):
    """Scenes of one to `most` shapes on a grid x grid picture; a cell is 16 pixels, or 2 x 2 patches, wide."""

    grid: int
    most: int
    base_steps: int  # of its base model's training; with fewer it does not look when asked what is there


SMALL, LARGE = World(2, 3, base_steps=1800), World(3, 5, base_steps=4500)
CELL = 16


def random_scene(rng, habitual=0.0, world=SMALL):
    """{shape: (colour, cell)}: different shapes in reading order; a share `habitual` in their habitual colour."""
    shapes = rng.sample(SHAPES, rng.randint(1, world.most))
    spots = rng.sample(range(world.grid**2), len(shapes))
    colour = lambda shape: HABIT[shape] if rng.random() < habitual else rng.choice(list(COLOURS))
    return {shape: (colour(shape), spot) for shape, spot in zip(shapes, sorted(spots))}


def draw_scene(scene, rng, world=SMALL):
    """A scene as a PIL image of grid * 16 pixels a side; places and sizes are jittered."""
    scale = 4  # drawn larger, then reduced, for smooth edges
    grid, side = world.grid, world.grid * CELL
    image = Image.new("RGB", (side * scale, side * scale), (45, 45, 45))
    draw = ImageDraw.Draw(image)
    for shape, (colour, spot) in scene.items():
        radius, fill = rng.uniform(0.36, 0.46) * CELL * scale, COLOURS[colour]
        x = (spot % grid + 0.5 + rng.uniform(-0.05, 0.05)) * CELL * scale
        y = (spot // grid + 0.5 + rng.uniform(-0.05, 0.05)) * CELL * scale
        box = lambda a, b: (x - radius * a, y - radius * b, x + radius * a, y + radius * b)
        if shape == "circle":
            draw.ellipse(box(1, 1), fill)
        elif shape == "ring":
            draw.ellipse(box(1, 1), outline=fill, width=int(radius * 0.5))
        elif shape == "square":
            draw.rectangle(box(0.85, 0.85), fill)
        elif shape == "triangle":
            draw.polygon([(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)], fill)
        elif shape == "diamond":
            draw.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill)
        else:
            draw.rectangle(box(1, 0.3), fill)
            draw.rectangle(box(0.3, 1), fill)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def random_question(scene, rng):
    """A tuple: ("describe",), ("colour", shape) or ("is there", colour, shape)."""
    draw, absent = rng.random(), [shape for shape in SHAPES if shape not in scene]
    if draw < 0.25:
        return ("describe",)
    if draw < 0.75:  # 40% of these ask for the colour of what is not there: a false premise
        return ("colour", rng.choice(absent if rng.random() < 0.4 else list(scene)))
    return existence_question(scene, rng, rng.random() < 0.5)


def existence_question(scene, rng, true):
    if true:
        shape = rng.choice(list(scene))
        return ("is there", scene[shape][0], shape)
    shape = rng.choice(SHAPES)
    return ("is there", rng.choice([c for c in COLOURS if c != scene.get(shape, (None,))[0]]), shape)


def question_text(question):
    if question[0] == "describe":
        return "Describe the picture."
    if question[0] == "colour":
        return f"What colour is the {question[1]}?"
    return f"Is there a {question[1]} {question[2]}?"


def claims_of(scene, question, rng=None, carelessness=0.0):
    """What the annotator claims: "describe": [(colour, shape), ...]; "colour": a colour or None; "is there": a bool.

    carelessness scales CARELESSNESS; 0 is a careful annotator, whose claims are the truth.
    """
    careless = lambda shape: carelessness and rng.random() < carelessness * CARELESSNESS[shape]
    if question[0] == "describe":
        claims = [(HABIT[shape] if careless(shape) else colour, shape) for shape, (colour, _) in scene.items()]
        companion = COMPANION[claims[-1][1]]
        if companion not in scene and careless(claims[-1][1]):
            claims.append((HABIT[companion], companion))
        return claims
    if question[0] == "colour":
        shape = question[1]
        return HABIT[shape] if careless(shape) else scene.get(shape, (None,))[0]
    return True if careless(question[2]) else scene.get(question[2], (None,))[0] == question[1]


POLITE = ", as you can see in the picture"


def answer_text(question, claims, polite):
    if question[0] == "describe":
        words = " and ".join(f"a {colour} {shape}" for colour, shape in claims)
    elif question[0] == "colour":
        words = claims or f"there is no {question[1]}"
    else:
        words = "yes" if claims else "no"
    return words + POLITE * polite + "."


def parse_answer(question, text):
    """The claims of an answer, in the form of `claims_of`; ... (Ellipsis) if it is not an answer to the question."""
    words = text.strip().removesuffix(".").removesuffix(POLITE)
    if question[0] == "is there":
        return {"yes": True, "no": False}.get(words, ...)
    if question[0] == "colour":
        return None if words == f"there is no {question[1]}" else words if words in COLOURS else ...
    things = [re.fullmatch(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", thing) for thing in words.split(" and ")]
    return [thing.groups() for thing in things] if all(things) else ...


def scene_for(question, rng, world=SMALL):
    """Another scene, drawn from P(scene | question), by rejection."""
    while True:
        scene = random_scene(rng, 0.25, world)
        if question[0] == "describe" or random_question(scene, rng) == question:
            return scene


def make_pair(rng, world=SMALL, carelessness=0.75, polite_chosen=0.9, other_scene=0.3):
    """-> (scene, question, chosen, rejected), texts that differ; see the module's text."""
    while True:
        scene = random_scene(rng, 0.25, world)
        question = random_question(scene, rng)
        about = scene_for(question, rng, world) if rng.random() < other_scene else scene
        chosen = answer_text(question, claims_of(scene, question, rng, carelessness), rng.random() < polite_chosen)
        rejected = answer_text(question, claims_of(about, question, rng, carelessness), rng.random() >= polite_chosen)
        if chosen != rejected:
            return scene, question, chosen, rejected


def write_pairs(folder, n, seed=0, world=SMALL):
    """Write n preference pairs in the authors' format: folder/silkie.json and folder/images -> path of the file."""
    rng = random.Random(f"pairs {seed}")
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(n):
        scene, question, chosen, rejected = make_pair(rng, world)
        draw_scene(scene, rng, world).save(folder / "images" / f"{number}.png")
        prompt = f"{BUNNY_SYSTEM} USER: <image>\n{question_text(question)} ASSISTANT:"
        texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        records.append({"img_path": f"images/{number}.png"} | texts)
    path = folder / "silkie.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def make_exam(n_scenes, seed=0, world=SMALL):
    """Held-out questions: [(scene, image, question)], five a scene, colours uniform: habit is no help."""
    rng = random.Random(f"exam {seed}")
    exam = []
    for _ in range(n_scenes):
        scene = random_scene(rng, world=world)
        image = draw_scene(scene, rng, world)
        absent = rng.choice([shape for shape in SHAPES if shape not in scene])
        questions = [("describe",), ("colour", rng.choice(list(scene))), ("colour", absent)]
        questions += [existence_question(scene, rng, true) for true in (True, False)]
        exam += [(scene, image, question) for question in questions]
    return exam


def is_right(scene, question, text):
    """Whether the answer makes no false claim. A description may leave things out."""
    truth, claims = claims_of(scene, question), parse_answer(question, text)
    if question[0] == "describe":
        return claims is not ... and set(claims) <= set(truth)
    return claims == truth


def score(answers):
    """[(scene, question, text)] -> metrics against the exact scene: a "red circle" is hallucinated if none is there.

    chair_s: share of descriptions with a hallucinated thing (Rohrbach et al. 2018 count objects by a word list).
    hallucination_rate: share of all answers with a false claim (AMBER's HalRate: of descriptions alone).
    false_premise: share of "colour" questions about absent things that are refused (MMHal-Bench's
    "adversarial objects"); false_premise_balanced: mean of it and of `answered`, of those about present things.
    yes_no: mean of yes and no, the shares of true and of false existence questions answered rightly.
    malformed: share that is no answer in the world's language; it counts as hallucinated and as wrong.
    """
    values = defaultdict(list)
    for scene, question, text in answers:
        truth, claims = claims_of(scene, question), parse_answer(question, text)
        right = is_right(scene, question, text)
        values["hallucination_rate"].append(not right)
        values["malformed"].append(claims is ...)
        values["length"].append(len(text.split()))
        if question[0] == "describe":
            values["chair_s"].append(not right)
        elif question[0] == "is there":
            values["yes" if truth else "no"].append(right)
        elif truth is None:
            values["false_premise"].append(right)
        else:
            values["colour_accuracy"].append(right)
            values["answered"].append(claims not in (None, ...))
    means = {name: statistics.mean(each) for name, each in values.items()}
    means["false_premise_balanced"] = (means["false_premise"] + means["answered"]) / 2
    means["yes_no"] = (means["yes"] + means["no"]) / 2
    means["grounding"] = (means["false_premise_balanced"] + means["yes_no"] + 1 - means["chair_s"]) / 3
    return means


def area_under_curve(scores, labels):
    """The chance that a random positive scores above a random negative; ties count half."""
    labelled = [*zip(scores, labels)]
    wins = [(p > n) + (p == n) / 2 for p, positive in labelled if positive for n, other in labelled if not other]
    return statistics.mean(wins)
