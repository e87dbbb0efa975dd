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
BENCHMARKS = {  # name: heading, questions, scorer, calls of the judge for one model
    "mmhal": ("MMHal", "MMHalBench, 96 questions", "its eval_gpt4.py", 96),
    "objhal": ("ObjHal", "Object HalBench, 300 questions", "RLAIF-V's eval_gpt_obj_halbench.py", 300),
    "amber": ("AMBER", "AMBER, 1,004 generative questions", "its inference.py", 0),
}
JUDGE = "gpt-4.1-2025-04-14"  # OpenAI serves it until 14 January 2027
JUDGES_NOTE = """\
MMHalBench and Object HalBench are judged by a model. The judges that their scorers name, gpt-4-0314 and
gpt-3.5-turbo-0613, are retired. Another judge's scores are not on the scale of the paper's: compare rows of one judge,
and have the base and DPO judged by the one that judges mDPO."""
TYPES = ["attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other"]
METRICS = {  # name: benchmark, heading, decimals
    "score": ("mmhal", "Score", 2), "halrate": ("mmhal", "HalRate", 2),
    "chair_s": ("objhal", "CHAIRs", 1), "chair_i": ("objhal", "CHAIRi", 1),
    "chair": ("amber", "CHAIRs", 1), "cover": ("amber", "Cover", 1),
    "hal": ("amber", "HalRate", 1), "cog": ("amber", "Cog", 1),
    **{kind: ("mmhal", kind, 2) for kind in TYPES}, "answers": ("mmhal", "answers", 0),
}  # fmt: skip
MAIN, ABLATION = [*METRICS][:8], [*METRICS][:4]
DPO = "--no-conditional --anchors none"
RUNS = {  # MODEL or MODEL-NAME: flags of train.py (None: the base), METRICS' values in arXiv:2406.11839v2
    "bunny": (None, "2.11 0.58 43.0 8.9 9.8 75.6 64.9 6.0 3.92 0.83 2.17 2.33 2.67 2.25 1.75 1.00"),
    "bunny-dpo": (DPO, "2.28 0.56 44.3 7.6 7.9 74.1 58.9 4.8 3.25 1.50 1.42 2.50 2.67 4.25 1.75 0.92"),
    "bunny-mdpo": ("", "2.96 0.42 27.0 4.6 4.9 67.4 37.7 2.4 3.08 4.17 2.00 3.50 3.25 4.08 2.17 1.42"),
    "llava": (None, "2.19 0.57 54.7 15.9 7.4 51.8 34.7 4.1"),
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
SIZES = (2500, 5000)
RUNS |= {f"bunny-dpo-{n}": (f"{DPO} --limit {n}", "") for n in SIZES}
RUNS |= {f"bunny-mdpo-{n}": (f"--limit {n}", "") for n in SIZES}


class Table(NamedTuple):
    title: str
    rows: dict  # label: run
    metrics: list
    note: str = ""


BUNNY = {"Bunny-v1.0-3B": "bunny", "+ DPO": "bunny-dpo", "+ mDPO": "bunny-mdpo"}
LLAVA = {"LLaVA-v1.5-7B": "llava", "LLaVA + DPO": "llava-dpo", "LLaVA + mDPO": "llava-mdpo"}
PAIR = {"DPO": "bunny-dpo", "mDPO": "bunny-mdpo"}
TABLES = {
    "table1": Table("Table 1, main results", BUNNY | LLAVA, MAIN),
    "table2": Table("Table 2, ablation of the loss", {"mDPO": "bunny-mdpo", "- conditional": "bunny-no-conditional",
        "- anchored": "bunny-no-anchor", "- both (DPO)": "bunny-dpo"}, ABLATION),
    "table3": Table("Table 3, rejected images", {"random image": "bunny-random-image",
        "crop 0-20% (mDPO)": "bunny-mdpo", "crop 20-50%": "bunny-crop-20-50", "MoCo v2": "bunny-moco"}, ABLATION),
    "table4": Table("Table 4, anchors", {"y_w (mDPO)": "bunny-mdpo", "y_w, y_l": "bunny-anchors-2",
        "y_w, y_l, m_l": "bunny-anchors-3"}, ABLATION),
    "table5": Table("Table 5, types of questions", BUNNY, ["score", *TYPES]),
    "figure1": Table("Figure 1, DPO without images", {"DPO (No Image)": "bunny-no-image"} | PAIR, ["score"],
        "The paper draws DPO (No Image) without a number, and calls it similar to DPO."),
    "figure2": Table("Figure 2, the method", {}, [], "A drawing: nothing to run."),
    "figure3": Table("Figure 3, answers", PAIR, ["answers"], "To be read, not scored."),
    "figure4": Table("Figure 4, human evaluation", PAIR, ["answers"],
        "People compare answers. The paper: mDPO's is better or as good in 89%, DPO's better in 11%."),
    "figure5": Table("Figure 5, number of pairs",
        {f"{label}, {n}": f"{run}-{n}" for n in SIZES for label, run in PAIR.items()} | PAIR, ["score", "halrate"],
        "The paper draws it without numbers: 2,500 and 5,000 are sizes of our choice."),
}  # fmt: skip


def script(names, work, judge, models):
    """The shell script that makes these tables in the folder `work`. Raises BadInput if nothing can run."""
    cells = [(*METRICS[metric][:2], run) for name in names for metric in TABLES[name].metrics
             for run in TABLES[name].rows.values()]  # fmt: skip
    answers = [*dict.fromkeys((benchmark, run) for benchmark, _, run in cells)]  # a dict keeps their order
    scores = [*dict.fromkeys((benchmark, run) for benchmark, heading, run in cells if heading != "answers")]
    if not answers:
        raise BadInput(f"{', '.join(names)}: nothing to run (--list says what there is)")
    model = {run: run.split("-")[0] for _, run in answers}
    trained = {run: RUNS[run][0] for run in model if RUNS[run][0] is not None}
    calls = sum(BENCHMARKS[name][-1] for name, _ in scores)
    gigabytes = sum(MODEL_GB[name] for name in {*model.values()}) + sum(RUN_GB[model[run]] for run in trained)
    gigabytes += PAIRS_GB * bool(trained)
    sizes = {run: int(flags.partition("--limit ")[2] or 10_000) for run, flags in trained.items()}
    hours = sum(HOURS[model[run]] * n_pairs / 10_000 for run, n_pairs in sizes.items())
    comments = [
        *(f"{TABLES[name].title}. {TABLES[name].note}".rstrip() for name in names),
        "Printed by examples/reproduce.py, whose authors had no hub, GPU or judge to run it with.",
        f"Disk: {gigabytes:.0f} GB for models, pairs and runs. Not known: benchmarks, the scorers' packages.",
        f"Training: {len(trained)} runs, {hours:.1f} hours on one H200 (predicted). Other times: not known.",
    ]
    comments += [f"Judge: {calls} calls of {judge}, key in OPENAI_API_KEY.", *JUDGES_NOTE.split("\n")] if calls else []
    steps = ["pairs"] * bool(trained) + [f"questions_{name}" for name in dict.fromkeys(name for name, _ in answers)]
    steps += ["scorers"] * bool(scores)
    quoted = {run: shlex.quote(models[name]) for run, name in model.items()}
    steps += [f"train {run} {quoted[run]} {flags}".rstrip() for run, flags in trained.items()]
    adapters = {run: f' --adapter "$W/runs/{run}"' for run in trained}
    steps += [f"answer {name} {run} {quoted[run]}{adapters.get(run, '')}" for name, run in answers]
    steps += [f"score_{name} {run}" for name, run in scores if name == "amber"] + ["key"] * bool(calls)
    steps += [f"score_{name} {run}" for name, run in scores if name != "amber"]
    lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in comments), "set -Eeuo pipefail"]
    lines += [f"ROOT={shlex.quote(str(ROOT))} W={shlex.quote(str(work))} JUDGE={judge}", ""]
    return "\n".join([*lines, Path(__file__).with_suffix(".sh").read_text(), *steps])


def read_amber(path, answers):
    """What AMBER's inference.py prints -> {metric: value}."""
    words = {"chair": "CHAIR", "cover": "Cover", "hal": "Hal", "cog": "Cog"}
    found = dict(re.findall(r"(?m)^(\w+):\s+([\d.]+)", path.read_text()))
    return {metric: float(found[word]) for metric, word in words.items()}


def read_mmhal(path, answers):
    """The replies that eval_gpt4.py saves. As there, a reply without a single rating counts 0."""
    replies, questions = json.loads(path.read_text()), json.loads(answers.read_text())
    texts = [reply["choices"][0]["message"]["content"].lower() for reply in replies]
    said = [[rating for rating in range(7) if f"rating: {rating}" in text] for text in texts]
    ratings = [one[0] if len(one) == 1 else 0 for one in said]
    found = {"score": mean(ratings), "halrate": mean(rating < 3 for rating in ratings)}
    pairs = [(item["question_type"], rating) for item, rating in zip(questions, ratings, strict=True)]
    found |= {kind: mean(rating for k, rating in pairs if k == kind) for kind, _ in pairs}
    unrated, judges = sum(len(one) != 1 for one in said), {reply["model"] for reply in replies}
    notes = [f"{path}: {unrated} replies without a single rating count 0"] if unrated else []
    notes += [f"{path}: judged by {', '.join(sorted(judges))}"] if judges != {path.parent.name} else []
    return found | {"notes": notes}


def read_objhal(path, answers):
    """The result that eval_gpt_obj_halbench.py saves, in percent.

    The paper's CHAIRs are multiples of 1/300, so they count all answers, as CHAIRs_refine does not.
    """
    found = json.loads(path.read_text())["overall_metrics"]
    return {"chair_s": 100 * found["CHAIRs"], "chair_i": 100 * found["CHAIRi"]}


def read_run(work, run, judge):
    """-> {metric: value} of the outputs that are there, and "notes". Raises BadInput if one cannot be read."""
    answers = work / f"answers/{run}.mmhal.json"
    found = {"answers": len(json.loads(answers.read_text()))} if answers.exists() else {}
    outputs = {f"amber/{run}.txt": read_amber, f"{judge}/{run}.mmhal.json": read_mmhal}
    for name, read in (outputs | {f"{judge}/{run}.objhal.json": read_objhal}).items():
        if (path := work / "scores" / name).exists():
            with about(f"{path}: is not what its scorer writes"):
                found |= read(path, answers)
    return found


def collect(name, work):
    """The paper's table as text. Below each of its rows: what was found, a row for each judge."""
    table, notes = TABLES[name], []
    judges = sorted({path.parent.name for path in work.glob("scores/*/*.json")})
    headings = [(BENCHMARKS[METRICS[metric][0]][0], METRICS[metric][1]) for metric in table.metrics]
    widths = [max(6, *map(len, words)) + 2 for words in headings]

    def row(label, cells):
        return (f"{label:24}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))).rstrip()

    lines = [table.title, *(row("", words) for words in zip(*headings))]
    for label, run in table.rows.items():
        paper = dict(zip(METRICS, RUNS[run][1].split()))
        lines.append(row(f"{label}: paper", [paper.get(metric, "") for metric in table.metrics]))
        for judge in judges or ["found"]:
            found = read_run(work, run, judge)
            cells = [f"{found[m]:.{METRICS[m][2]}f}" if m in found else "" for m in table.metrics]
            lines.append(row(f"  {judge}", cells))
            notes += found.get("notes", [])
    return "\n".join([*lines, *([table.note] if table.note else []), *dict.fromkeys(notes)])


def describe(name):
    """A table or figure as text: its runs, questions, scorers and cells."""
    table = TABLES[name]
    flags = {run: "the base" if RUNS[run][0] is None else RUNS[run][0] for run in table.rows.values()}
    lines = [f"{name}: {table.title}. {table.note}"]
    lines += [f"  {label:20}{run:22}{flags[run]}" for label, run in table.rows.items()]
    for benchmark in dict.fromkeys(METRICS[metric][0] for metric in table.metrics):
        cells = [METRICS[metric][1] for metric in table.metrics if METRICS[metric][0] == benchmark]
        scorer = "" if cells == ["answers"] else f", scored by {BENCHMARKS[benchmark][2]}"
        lines.append(f"  {BENCHMARKS[benchmark][1]}{scorer}: {', '.join(cells)}")
    return "\n".join(map(str.rstrip, lines))


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", choices=[*TABLES, "all"], default="all", metavar="NAME", help=f"{', '.join(TABLES)}; all")
    add("--list", action="store_true", help="print what there is")
    add("--collect", action="store_true", help="print the paper's values and what was found")
    add("--work", default=ROOT / "runs/paper", metavar="DIR", help="folder of data, runs, answers, scores")
    add("--judge", default=JUDGE, help="a model that is served at present (default: %(default)s)")
    add("--models", nargs=2, default=MODELS.values(), metavar=("BUNNY", "LLAVA"), help="folders or hub names")
    args = parser.parse_args(argv)
    names = [*TABLES] if "all" in args.names else list(dict.fromkeys(args.names))
    work = Path(args.work).resolve()
    if not re.fullmatch(r"(?!amber$)\w[\w.:-]*", args.judge):
        raise BadInput(f"--judge {args.judge}: has to do as a folder's name: letters, digits, . : - and _")
    if args.list:
        print("\n\n".join(map(describe, names)))
    elif args.collect:
        print("\n\n".join([*(collect(name, work) for name in names), JUDGES_NOTE]))
    else:
        paths = [str(Path(model).resolve()) if Path(model).exists() else model for model in args.models]
        print(script(names, work, args.judge, dict(zip(MODELS, paths))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
