"""Helpers that several files of this folder share."""

import contextlib
import pkgutil
import re
from unittest.mock import patch

import data
import train
from data import read_examples
from examples import shapes
from test_mdpo import ROOT, message, noise, pair


def check_file(argv):
    """`python data.py ...`, in this process."""
    return data.run_command(data.check_file, argv)


DPO_NAMES = ("chosen", "rejected")  # no log-probability of m_l

PARTS = "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}"
CHAT = (  # a chat template, once IMAGE and END stand for a model's own
    "{% for m in messages %}[{{ m.role }}]" + PARTS + "END{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def outputs_of(module):
    """A list that grows by the output of each call of a module."""
    seen = []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


def pixels_of(processor, *images):
    return processor.image_processor([*images], return_tensors="pt")["pixel_values"]


def drawn(level):
    """A plain picture of this level, as the text of a PGM file."""
    return "P2 8 8 255" + 8 * 8 * f" {level}"


SIZES = [  # images that differ in their number of tiles or tokens, within an example and between examples
    pair("Describe the picture.", "There is a red circle.", "No.", noise(1, (60, 30)), noise(2, (30, 90))),
    pair(
        "How many?", "One.", "There is a red square, and a blue one.", noise(3, (40, 40)), noise(4, (90, 90))
    ),
]


def completion(response, *ratings):
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    annotations = {a: {"Rating": r, "Rationale": "..."} for a, r in zip(aspects, ratings)}
    return {"model": "m", "response": response, "annotations": annotations}


VLFEEDBACK = {
    "id": "llava-1",
    "prompt": "What is it?",
    "models": ["m"] * 4,
    "completions": [  # means 4, 5, 2; the last is unrated
        completion("Middling.", "4", "4", "4"),
        completion("A cat【6†source】.", "5", "5", "5"),
        completion("A dog.", "1", "4", "1"),
        completion("Never.", "N/A", "5", "5"),
    ],
}
PLAIN = {"image": "a.png", "question": "<image>\nWhat is it?", "chosen": " A cat.\n", "rejected": "A dog."}
TURNS = {  # a system text, an earlier turn, two images
    "images": ["a.png", "merged_images/llava-1.jpg"],
    "prompt": [
        {"role": "system", "content": "Be brief."},
        message("user", "IMAGE", "What is it?"),
        {"role": "assistant", "content": "A cat."},
        message("user", "And this:", "IMAGE"),
    ],
    "chosen": "A dog.",
    "rejected": "A cat.",
}


def as_examples(folder, n=4):
    return read_examples(str(shapes.write_pairs(folder / "drawn", n)))


ARGUMENTS = train.FILES | train.METHOD | train.SYSTEM


@contextlib.contextmanager
def preceded(name, do):
    """Inside, the function of this name calls do(*its arguments) first."""
    function = pkgutil.resolve_name(name)

    def both(*args, **options):
        do(*args, **options)
        return function(*args, **options)

    with patch(name, both):
        yield


def counted(monkeypatch, module, name):
    """A list that grows by one at each call of module.name."""
    calls, function = [], getattr(module, name)

    def note(*args, **options):
        calls.append(1)
        return function(*args, **options)

    monkeypatch.setattr(module, name, note)
    return calls


def one_line_of(capsys, status):
    """What a command that failed said: one line on stderr beside progress bars, nothing else."""
    err = capsys.readouterr().err
    beside = re.compile(r"\s*$|.*(it/s\]|%\|)|\[transformers\]|stopping after|  ")
    lines = [line for line in re.split("[\r\n]+", err) if not beside.match(line)]
    assert status in (2, 130) and len(lines) == 1 and lines[0].startswith("error: "), err[-2000:]
    assert lines[0].isprintable() and len(lines[0]) < 3000
    return lines[0]


README = (ROOT / "README.md").read_text()
EXAMPLES_README = (ROOT / "examples" / "README.md").read_text()
