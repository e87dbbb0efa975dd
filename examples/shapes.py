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
import statistics
from collections import defaultdict
from typing import NamedTuple

from PIL import Image, ImageDraw

from train import BUNNY_SYSTEM

COLOURS = {
    "red": (220, 50, 47), "green": (50, 160, 60), "blue": (50, 90, 220),
    "yellow": (235, 210, 60), "purple": (140, 60, 180), "orange": (240, 140, 30),
}  # fmt: skip
PARTS = {  # of a shape: a method of PIL's ImageDraw and points, in radii right of and below the middle
    "circle": [("ellipse", (-1, -1), (1, 1))],
    "square": [("rectangle", (-0.85, -0.85), (0.85, 0.85))],
    "triangle": [("polygon", (0, -1), (-1, 0.8), (1, 0.8))],
    "cross": [("rectangle", (-1, -0.3), (1, 0.3)), ("rectangle", (-0.3, -1), (0.3, 1))],
    "diamond": [("polygon", (0, -1), (1, 0), (0, 1), (-1, 0))],
    "ring": [("ellipse", (-1, -1), (1, 1))],  # its outline alone
}
SHAPES = tuple(PARTS)
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
    cell = 4 * CELL  # drawn larger, then reduced, for smooth edges
    image = Image.new("RGB", (world.grid * cell, world.grid * cell), (45, 45, 45))
    draw = ImageDraw.Draw(image)
    for shape, (colour, spot) in scene.items():
        radius = rng.uniform(0.36, 0.46) * cell
        x = (spot % world.grid + 0.5 + rng.uniform(-0.05, 0.05)) * cell
        y = (spot // world.grid + 0.5 + rng.uniform(-0.05, 0.05)) * cell
        fill, outline = (None, COLOURS[colour]) if shape == "ring" else (COLOURS[colour], None)
        for method, *points in PARTS[shape]:
            points = [(x + radius * right, y + radius * below) for right, below in points]
            getattr(draw, method)(points, fill, outline, int(radius / 2))
    return image.resize((world.grid * CELL, world.grid * CELL), Image.Resampling.LANCZOS)


def random_question(scene, rng):
    """A tuple: ("describe",), ("colour", shape) or ("is there", colour, shape)."""
    draw, absent = rng.random(), [shape for shape in SHAPES if shape not in scene]
    if draw < 0.25:
        return ("describe",)
    if draw < 0.75:  # 40% of these ask for the colour of what is not there: a false premise
        return ("colour", rng.choice(absent if rng.random() < 0.4 else list(scene)))
    return existence_question(scene, rng, rng.random() < 0.5)


def existence_question(scene, rng, true):
    shape = rng.choice(list(scene) if true else SHAPES)
    (seen,) = claims_of(scene, ("colour", shape))
    return ("is there", seen if true else rng.choice([colour for colour in COLOURS if colour != seen]), shape)


LANGUAGE = {  # of a question of each kind: its text, and in words what an answer can claim
    "describe": ("Describe the picture.", {(c, shape): f"a {c} {shape}" for c in COLOURS for shape in SHAPES}),
    "colour": ("What colour is the {1}?", dict(zip(COLOURS, COLOURS)) | {None: "there is no {1}"}),
    "is there": ("Is there a {1} {2}?", {True: "yes", False: "no"}),
}
POLITE = ", as you can see in the picture"


def question_text(question):
    return LANGUAGE[question[0]][0].format(*question)


def claims_of(scene, question, rng=None, carelessness=0.0):
    """What the annotator claims: a list, of several only in a description; see LANGUAGE.

    carelessness scales CARELESSNESS; 0 is a careful annotator, whose claims are the truth.
    """
    seen = {shape: colour for shape, (colour, _) in scene.items()}
    careless = lambda shape: carelessness and rng.random() < carelessness * CARELESSNESS[shape]
    colour_of = lambda shape: HABIT[shape] if careless(shape) else seen.get(shape)
    if question[0] == "colour":
        return [colour_of(question[1])]
    if question[0] == "is there":
        return [careless(question[2]) or seen.get(question[2]) == question[1]]
    claims = [(colour_of(shape), shape) for shape in scene]
    last = claims[-1][1]
    if COMPANION[last] not in scene and careless(last):
        claims.append((HABIT[COMPANION[last]], COMPANION[last]))
    return claims


def answer_text(question, claims, polite):
    words = " and ".join(LANGUAGE[question[0]][1][claim] for claim in claims)
    return words.format(*question) + POLITE * polite + "."


def parse_answer(question, text):
    """The claims of an answer, as of `claims_of`; ... (Ellipsis) stands for what is none."""
    claims = {words.format(*question): claim for claim, words in LANGUAGE[question[0]][1].items()}
    words = text.strip().removesuffix(".").removesuffix(POLITE)
    return [claims.get(each, ...) for each in (words.split(" and ") if question[0] == "describe" else [words])]


def scene_for(question, rng, world=SMALL):
    """Another scene, drawn from P(scene | question), by rejection."""
    while True:
        scene = random_scene(rng, 0.25, world)
        if question[0] == "describe" or random_question(scene, rng) == question:
            return scene


def make_pair(rng, world=SMALL, carelessness=0.75, polite_chosen=0.9):
    """-> (scene, question, chosen, rejected), texts that differ; see the module's text."""
    while True:
        scene = random_scene(rng, 0.25, world)
        question = random_question(scene, rng)
        about = scene_for(question, rng, world) if rng.random() < 0.3 else scene
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
        prompt = f"{BUNNY_SYSTEM} USER: <image>\n{question_text(question)} ASSISTANT:"
        image = f"images/{number}.png"
        draw_scene(scene, rng, world).save(folder / image)
        records.append({"img_path": image, "prompt": prompt, "chosen": chosen, "rejected": rejected})
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
    return {*parse_answer(question, text)} <= {*claims_of(scene, question)}


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
        values["malformed"].append(... in claims)
        values["length"].append(len(text.split()))
        if question[0] == "describe":
            values["chair_s"].append(not right)
        elif question[0] == "is there":
            values["yes" if truth[0] else "no"].append(right)
        elif truth == [None]:
            values["false_premise"].append(right)
        else:
            values["answered"].append(claims[0] in COLOURS)
    means = {name: statistics.mean(each) for name, each in values.items()}
    means["false_premise_balanced"] = (means["false_premise"] + means["answered"]) / 2
    means["yes_no"] = (means["yes"] + means["no"]) / 2
    means["grounding"] = (means["false_premise_balanced"] + means["yes_no"] + 1 - means["chair_s"]) / 3
    return means
