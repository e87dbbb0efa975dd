"""The paper's tables and figures: a shell script that makes each, and its cells beside the paper's.

python examples/reproduce.py --list                 # runs, questions, scorers and cells
python examples/reproduce.py table2 > table2.sh
bash table2.sh                                      # again, to go on where it stopped
python examples/reproduce.py --collect table2       # the paper's values, and what was found
"""

import json
import re
import shlex
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import BadInput, Parser, about, run_command

MODELS = {"bunny": "BAAI/Bunny-v1_0-3B", "llava": "llava-hf/llava-1.5-7b-hf"}
HOURS = {"bunny": 1.0, "llava": 2.3}  # of 10,000 pairs and 3 epochs on one H200: predicted, not measured
MODEL_GB = {"bunny": 6.4, "llava": 14.1}  # in the hub's cache
RUN_GB = {"bunny": 1.5, "llava": 2.6}  # adapter and checkpoint: 16 bytes a parameter of the adapter
PAIRS_GB = 5.8  # VLFeedback's images, as a zip and unpacked
JUDGES_NOTE = """\
MMHalBench and Object HalBench are judged by a model. The judges that their scorers name, gpt-4-0314 and
gpt-3.5-turbo-0613, are retired. Another judge's scores are not on the scale of the paper's: compare rows of one judge,
and have the base and DPO judged by the one that judges mDPO."""
ABLATION = {"mmhal": ["Score", "HalRate"], "objhal": ["CHAIRs", "CHAIRi"]}  # benchmark: its cells
MAIN = ABLATION | {"amber": ["CHAIRs", "Cover", "HalRate", "Cog"]}
TYPES = ["attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other"]
COLUMNS = [(benchmark, cell) for benchmark, cells in [*MAIN.items(), ("mmhal", TYPES)] for cell in cells]
DPO = "--no-conditional --anchors none"
RUNS = {  # MODEL or MODEL-NAME: flags of train.py; values of COLUMNS in arXiv:2406.11839v2
    "bunny": ("base", "2.11 0.58 43.0 8.9 9.8 75.6 64.9 6.0 3.92 0.83 2.17 2.33 2.67 2.25 1.75 1.00"),
    "bunny-dpo": (DPO, "2.28 0.56 44.3 7.6 7.9 74.1 58.9 4.8 3.25 1.50 1.42 2.50 2.67 4.25 1.75 0.92"),
    "bunny-mdpo": ("", "2.96 0.42 27.0 4.6 4.9 67.4 37.7 2.4 3.08 4.17 2.00 3.50 3.25 4.08 2.17 1.42"),
    "llava": ("base", "2.19 0.57 54.7 15.9 7.4 51.8 34.7 4.1"),
    "llava-dpo": (DPO, "2.14 0.65 49.0 13.0 6.5 55.1 34.5 2.3"),
    "llava-mdpo": ("", "2.39 0.54 35.7 9.8 4.4 52.4 24.5 2.4"),
    "bunny-no-conditional": ("--no-conditional", "2.36 0.53 40.3 7.1"),
    "bunny-no-anchor": ("--anchors none", "2.50 0.48 34.3 5.7"),
    "bunny-random-image": ("--reject random", "2.81 0.46 40.7 6.6"),
    "bunny-crop-20-50": ("--crop 0.2 0.5", "2.92 0.42 33.7 5.4"),
    "bunny-moco": ("--reject moco", "2.82 0.44 32.3 5.9"),
    "bunny-anchors-2": ("--anchors chosen rejected", "2.98 0.39 29.3 5.0"),
    "bunny-anchors-3": ("--anchors chosen rejected image_rejected", "2.85 0.40 34.7 6.1"),
    "bunny-no-image": ("--no-image", ""),
}
BUNNY, LLAVA = ([name, f"{name}-dpo", f"{name}-mdpo"] for name in MODELS)
FEWER = {f"{run}-{n}": (f"{RUNS[run][0]} --limit {n}".strip(), "") for n in (2500, 5000) for run in BUNNY[1:]}
RUNS |= FEWER


class Table(NamedTuple):
    title: str
    runs: list
    cells: dict  # benchmark: what its scorer gives; nothing: answers to be read
    note: str = ""


TABLES = {
    "table1": Table("main results", BUNNY + LLAVA, MAIN),
    "table2": Table("the loss", ["bunny-mdpo", "bunny-no-conditional", "bunny-no-anchor", "bunny-dpo"], ABLATION),
    "table3": Table("rejected images", ["bunny-random-image", "bunny-mdpo", "bunny-crop-20-50", "bunny-moco"], ABLATION),
    "table4": Table("anchors", ["bunny-mdpo", "bunny-anchors-2", "bunny-anchors-3"], ABLATION),
    "table5": Table("types of questions", BUNNY, {"mmhal": ["Score", *TYPES]}),
    "figure1": Table("DPO without images", ["bunny-no-image", *BUNNY[1:]], {"mmhal": ["Score"]},
        "The paper draws DPO (No Image) without a number, and calls it similar to DPO."),
    "figure2": Table("the method", [], {}, "A drawing: nothing to run."),
    "figure3": Table("answers", BUNNY[1:], {"mmhal": []}, "To be read, not scored."),
    "figure4": Table("human evaluation", BUNNY[1:], {"mmhal": []},
        "People compare answers. The paper: mDPO's is better or as good in 89%, DPO's better in 11%."),
    "figure5": Table("number of pairs", [*FEWER, *BUNNY[1:]], {"mmhal": ["Score", "HalRate"]},
        "The paper draws it without numbers: 2,500 and 5,000 are sizes of our choice."),
}  # fmt: skip


def script(names, work, judge, models):
    """The shell script that makes these tables in the folder `work`. Raises BadInput if nothing can run."""
    tables = [TABLES[name] for name in names]
    answers = dict.fromkeys((name, run) for table in tables for name in table.cells for run in table.runs)
    scores = {(name, run) for table in tables for name, cells in table.cells.items() if cells for run in table.runs}
    if not answers:
        raise BadInput(f"{', '.join(names)}: nothing to run (--list says what there is)")
    model = {run: run.split("-")[0] for _, run in answers}
    trained = {run: RUNS[run][0] for run in model if run not in MODELS}
    calls = sum(BENCHMARKS[name][2] for name, _ in scores)
    gigabytes = sum(MODEL_GB[name] for name in {*model.values()}) + sum(RUN_GB[model[run]] for run in trained)
    sizes = {run: int(flags.partition("--limit ")[2] or 10_000) for run, flags in trained.items()}
    hours = sum(HOURS[model[run]] * n_pairs / 10_000 for run, n_pairs in sizes.items())
    comments = [
        *(f"{name}: {TABLES[name].title}. {TABLES[name].note}".rstrip() for name in names),
        "Printed by examples/reproduce.py, whose authors had no hub, GPU or judge to run it with.",
        f"Disk: {gigabytes + PAIRS_GB:.0f} GB for models, pairs and runs. Not known: benchmarks, the scorers' packages.",
        f"Training: {len(trained)} runs, {hours:.1f} hours on one H200 (predicted). Other times: not known.",
    ]
    comments += [f"Judge: {calls} calls of {judge}, key in OPENAI_API_KEY.", *JUDGES_NOTE.split("\n")] if calls else []
    adapters = {run: f' --adapter "$W/runs/{run}"' for run in trained}
    steps = ["pairs", *(f"questions_{name}" for name, _ in answers), *["scorers"] * bool(scores)]
    steps += [f"train {run} {models[model[run]]} {flags}".rstrip() for run, flags in trained.items()]
    steps += [f"answer {name} {run} {models[model[run]]}{adapters.get(run, '')}" for name, run in answers]
    steps += [f"score_{name} {run}" for name, run in sorted(scores)]  # AMBER's first: it needs no key
    lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in comments), "set -Eeuo pipefail"]
    lines += [f"ROOT={shlex.quote(str(ROOT))} W={shlex.quote(str(work))} JUDGE={judge}", ""]
    return "\n".join([*lines, Path(__file__).with_suffix(".sh").read_text(), *dict.fromkeys(steps)])


def read_amber(path):
    """What AMBER's inference.py prints -> {cell: its text}."""
    found = dict(re.findall(r"(?m)^(\w+):\s+([\d.]+)", path.read_text()))
    return {"CHAIRs": found["CHAIR"], "Cover": found["Cover"], "HalRate": found["Hal"], "Cog": found["Cog"]}


def read_mmhal(path):
    """The replies that eval_gpt4.py saves. As there, a reply without a single rating counts 0."""
    answers = path.parents[2] / "answers" / path.name
    replies, questions = json.loads(path.read_text()), json.loads(answers.read_text())
    texts = [reply["choices"][0]["message"]["content"].lower() for reply in replies]
    said = [[rating for rating in range(7) if f"rating: {rating}" in text] for text in texts]
    ratings = [one[0] if len(one) == 1 else 0 for one in said]
    pairs = [(item["question_type"], rating) for item, rating in zip(questions, ratings, strict=True)]
    found = {"Score": mean(ratings), "HalRate": mean(rating < 3 for rating in ratings)}
    found |= {kind: mean(rating for k, rating in pairs if k == kind) for kind, _ in pairs}
    unrated, judges = sum(len(one) != 1 for one in said), {reply["model"] for reply in replies}
    notes = [f"{path}: {unrated} replies without a single rating count 0"] if unrated else []
    notes += [f"{path}: judged by {', '.join(sorted(judges))}"] if judges != {path.parent.name} else []
    return {name: f"{value:.2f}" for name, value in found.items()} | {"notes": notes}


def read_objhal(path):
    """The result that eval_gpt_obj_halbench.py saves, in percent.

    The paper's CHAIRs are multiples of 1/300, so they count all answers, as CHAIRs_refine does not.
    """
    found = json.loads(path.read_text())["overall_metrics"]
    return {name: f"{100 * found[name]:.1f}" for name in ("CHAIRs", "CHAIRi")}


BENCHMARKS = {  # name: questions, scorer, the judge's calls for a model, the scorer's output for a run, its reader
    "mmhal": ("MMHalBench, 96 questions", "its eval_gpt4.py", 96, "{judge}/{run}.mmhal.json", read_mmhal),
    "objhal": ("Object HalBench, 300 questions", "RLAIF-V's eval_gpt_obj_halbench.py", 300,
        "{judge}/{run}.objhal.json", read_objhal),
    "amber": ("AMBER, 1,004 generative questions", "its inference.py", 0, "amber/{run}.txt", read_amber),
}  # fmt: skip


def collect(name, work):
    """The paper's table as text. Below each of its rows: what was found, a row for each judge."""
    table, notes = TABLES[name], []
    judges = sorted({path.parent.name for path in work.glob("scores/*/*.json")})
    columns = [(name, cell) for name, cell in COLUMNS if cell in table.cells.get(name, ())]
    rows = [["", *words] for words in zip(*columns)]
    for run in table.runs:
        paper = dict(zip(COLUMNS, RUNS[run][1].split()))
        rows.append([f"{run}: paper", *(paper.get(column, "") for column in columns)])
        for judge in judges or ["found"]:
            found = {benchmark: read_scores(work, benchmark, run, judge) for benchmark in table.cells}
            rows.append([f"  {judge}", *(found[benchmark].get(cell, "") for benchmark, cell in columns)])
            notes += [note for scores in found.values() for note in scores.get("notes", [])]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    lines = [f"{name}: {table.title}", *("".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
    return "\n".join([*lines, *([table.note] if table.note else []), *dict.fromkeys(notes)])


def read_scores(work, benchmark, run, judge):
    """A scorer's output -> {cell: its text}, and "notes"; {} if there is none. Raises BadInput if it is another's."""
    *_, output, read = BENCHMARKS[benchmark]
    path = work / "scores" / output.format(judge=judge, run=run)
    with about(f"{path}: is not what its scorer writes"):
        return read(path) if path.exists() else {}


def describe(name):
    """A table or figure as text: its runs, questions, scorers and cells."""
    table = TABLES[name]
    lines = [f"{name}: {table.title}. {table.note}", *(f"  {run:22}{RUNS[run][0]}" for run in table.runs)]
    for benchmark, cells in table.cells.items():
        questions, scorer, *_ = BENCHMARKS[benchmark]
        lines.append(f"  {questions}, scored by {scorer}: {', '.join(cells)}" if cells else f"  {questions}: answers")
    return "\n".join(map(str.rstrip, lines))


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    text = f"{', '.join(TABLES)}; all (default: all)"
    add("names", nargs="*", choices=[*TABLES, "all"], default="all", metavar="NAME", help=text)
    add("--list", action="store_true", help="print what there is")
    add("--collect", action="store_true", help="print the paper's values and what was found")
    add("--work", default=ROOT / "runs/paper", metavar="DIR", help="of data, runs and scores (default: %(default)s)")
    add("--judge", default="gpt-4.1-2025-04-14", help="a model (default: %(default)s, served until 14 January 2027)")
    text = f"folders or hub names (default: {' '.join(MODELS.values())})"
    add("--models", nargs=2, default=MODELS.values(), metavar=("BUNNY", "LLAVA"), help=text)
    args = parser.parse_args(argv)
    names = [*TABLES] if "all" in args.names else list(dict.fromkeys(args.names))
    work = Path(args.work).resolve()
    if not re.fullmatch(r"\w[\w.:-]*", args.judge):
        raise BadInput(f"--judge {args.judge}: has to do as a folder's name: letters, digits, . : - and _")
    if args.list:
        print("\n\n".join(map(describe, names)))
    elif args.collect:
        print("\n\n".join([*(collect(name, work) for name in names), JUDGES_NOTE]))
    else:
        paths = [str(Path(model).resolve()) if Path(model).exists() else model for model in args.models]
        print(script(names, work, args.judge, dict(zip(MODELS, map(shlex.quote, paths)))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
