"""The paper in miniature: its comparisons, in the world of `shapes.py`, by the product's own training code.

    python examples/miniature.py --quick                # one seed, Figure 1 and Table 2
    python examples/miniature.py --figure curves.png    # five seeds, every comparison; the figure needs matplotlib

`--out` holds a folder for each seed and method, and results.json. What is there is not computed again.
"""

import contextlib
import json
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from data import BadInput, encode, read_examples, run_command
from examples import demo, shapes, tiny_bunny
from examples.answer import chat_prompt, generate_answers, load_tuned
from examples.curves import load_pyplot, read_log
from examples.evaluate import diagnose, score_margins

# Fixed on seeds 101 and 102, which are not reported, and not touched afterwards. Grounding there of DPO and mDPO was
# .52 and .57 at a learning rate of 1e-4, .49 and .66 at 3e-4, .57 and .66 at 1e-3; the middle one was taken for all.
PAIRS, HELD_OUT = 1536, 96  # 48 steps an epoch of 32
COMMON = "--epochs 3 --lr 3e-4 --lora-rank 16 --lora-alpha 32 --batch-size 32 --micro-batch-size 32 --workers 0 "
COMMON += f"--no-checkpointing --eval-size {HELD_OUT} --limit {PAIRS + HELD_OUT}"

QUICK = {  # Figure 1 and Table 2
    "DPO (No Image)": "--no-image",
    "DPO": "--no-conditional --anchors none",
    "mDPO": "",
    "minus conditional": "--no-conditional",
    "minus anchored": "--anchors none",
}
METHODS = QUICK | {
    "crop 20-50%": "--crop 0.2 0.5",  # Table 3
    "random image": "--reject random",
    "MoCo v2": "--reject moco",
    "anchors y_w, y_l": "--anchors chosen rejected",  # Table 4
    "anchors y_w, m_l": "--anchors chosen image_rejected",
    "DPO, lr 1e-3": "--no-conditional --anchors none --lr 1e-3",  # does the comparison rest on the learning rate?
    "mDPO, lr 1e-3": "--lr 1e-3",
}
MIN_BASE_AUC = 0.75  # a base that cannot tell what is there from what is not is undertrained: its seed is not used
for size, epochs in ((192, 24), (384, 12), (768, 6)):  # Figure 5, as many steps as the others
    for method in ("DPO", "mDPO"):
        METHODS[f"{method}, {size} pairs"] = f"{METHODS[method]} --limit {size} --epochs {epochs} --eval-size 0"


def examine(model, processor, exam):
    """The metrics of `shapes.score` for the model's answers, and the area under the curve of its leaning to yes."""
    asked = [(image, shapes.question_text(question)) for _, image, question in exam]
    answers = generate_answers(model, processor, asked, max_new_tokens=40, batch_size=250)
    metrics = shapes.score([(scene, question, answer) for (scene, _, question), answer in zip(exam, answers)])
    existence = [i for i, (_, _, question) in enumerate(exam) if question[0] == "is there"]
    truth = [shapes.claims_of(exam[i][0], exam[i][2]) for i in existence]
    leanings = yes_leanings(model, processor, [asked[i] for i in existence])
    return metrics | {"yes_no_auc": shapes.area_under_curve(leanings, truth)}


@torch.no_grad()
def yes_leanings(model, processor, questions):
    """log p(yes) - log p(no) of the first token of the answer to each (image, question)."""
    prompts = [chat_prompt(processor, text) for _, text in questions]
    inputs = encode(processor, prompts, [(image,) for image, _ in questions]).to(model.device, model.dtype)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
    output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    yes, no = (processor.tokenizer(word).input_ids[0] for word in (" yes", " no"))
    return (output.logits[0][:, yes] - output.logits[0][:, no]).tolist()


@contextlib.contextmanager
def in_folder(out, seed):
    """The folder of a seed, in which what is said goes to log.txt; one thread, so that a rerun is the same."""
    torch.set_num_threads(1)
    folder = Path(out) / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        yield folder


def write_json(path, value):
    with train.replacing(path.parent) as new:
        (new / path.name).write_text(json.dumps(value, indent=1))


def prepare_seed(out, seed, world=shapes.SMALL):
    """Base model, pairs and held-out pairs of a seed, made once: each is renamed into place when it is whole."""
    with in_folder(out, seed) as folder:
        makers = {
            "model": lambda path: tiny_bunny.write_base(path, seed, world),
            "data": lambda path: shapes.write_pairs(path, PAIRS + HELD_OUT, seed, world),
            "held_out": lambda path: shapes.write_pairs(path, 200, f"held out {seed}", world),
        }
        if seed == 0 and world == shapes.SMALL:
            makers["model"] = lambda path: shutil.copytree(demo.BASE, path)
        for name, make in makers.items():
            if not (folder / name).exists():
                with tempfile.TemporaryDirectory(".tmp", "unfinished.", folder) as own:
                    make(Path(own, name))
                    Path(own, name).rename(folder / name)


def run_method(out, seed, method, n_scenes, world=shapes.SMALL):
    """Train and examine one method -> its metrics; taken from its file if that is there."""
    with in_folder(out, seed) as folder:
        run = folder / re.sub(r"\W+", "-", method).strip("-")
        if (file := run / f"result-{n_scenes}.json").exists():
            return json.loads(file.read_text())
        run.mkdir(exist_ok=True)
        if method != "base":
            paths = {"model": folder / "model", "data": folder / "data" / "silkie.json", "out": run, "seed": seed}
            flags = [*(f"--{name}={value}" for name, value in paths.items()), *f"{COMMON} {METHODS[method]}".split()]
            flags = ["--resume", str(run)] if (run / "args.json").exists() else flags
            if train.main([*flags, "--device", "cpu"]):
                raise BadInput(f"seed {seed}, {method}: training ended early, see {folder / 'log.txt'}")
        model, processor = load_tuned(folder / "model", run if method != "base" else None, "cpu")
        result = examine(model, processor, shapes.make_exam(n_scenes, seed, world))
        if method == "base" and (auc := result["yes_no_auc"]) < MIN_BASE_AUC:
            raise BadInput(f"seed {seed}: its base model sees too little ({auc:.2f}); take another seed")
        if method != "base":
            held_out = read_examples(str(folder / "held_out" / "silkie.json"), log=len)
            margins = diagnose(score_margins(model, processor, held_out, batch_size=40))
            result |= {f"margin_{name}": value for name, value in margins.items()} | curves(run)
        write_json(file, result)
        return result


def curves(out, beta=0.1):
    """Change of log p(y_w) and image-conditional accuracy on held-out pairs, after each epoch; and the last."""
    records = [record for record in read_log(out) if "eval/loss" in record]
    result = {"chosen_curve": [record["eval/rewards/chosen"] / beta for record in records]}
    if records and "eval/rewards/image_accuracies" in records[0]:  # not without images
        result["image_accuracy_curve"] = [record["eval/rewards/image_accuracies"] for record in records]
    return result | {name.removesuffix("_curve"): values[-1] for name, values in result.items() if values}


COLUMNS = ("hallucination_rate", "chair_s", "false_premise", "yes_no", "grounding", "malformed", "length", "chosen",
           "image_accuracy", "margin_no_image_share")  # fmt: skip


def summarize(by_seed):
    """{seed: {method: metrics}} -> {method: {metric: [mean, standard deviation]}}."""
    summary, spread = {}, lambda v: statistics.stdev(v) if len(v) > 1 else 0.0
    for method, metrics in next(iter(by_seed.values())).items():
        names = [name for name, value in metrics.items() if not isinstance(value, list)]
        values = {name: [methods[method][name] for methods in by_seed.values()] for name in names}
        summary[method] = {name: [statistics.mean(v), spread(v)] for name, v in values.items()}
    return summary


def tables(summary):
    """The summary in two parts of at most 100 columns."""
    lines = []
    for names in (COLUMNS[:5], COLUMNS[5:]):
        heads = (name.removeprefix("margin_").removesuffix("_rate") for name in names)
        lines.append(f"{'':20}" + "".join(f"{head:>16}" for head in heads))
        for method, metrics in summary.items():
            cells = ("{:.3f} +-{:.3f}".format(*metrics[name]) if name in metrics else "" for name in names)
            lines.append(f"{method:20}" + "".join(f"{cell:>16}" for cell in cells).rstrip())
        lines.append("")
    return "\n".join(lines)


# Written down before the reported seeds were run; each looks at {method: metrics} of one seed.
PREDICTIONS = {
    "mDPO is above DPO in grounding": lambda m: m["mDPO"]["grounding"] > m["DPO"]["grounding"],
    "mDPO is below DPO in hallucination": lambda m: m["mDPO"]["hallucination_rate"] < m["DPO"]["hallucination_rate"],
    "false-premise accuracy: mDPO at least .75": lambda m: m["mDPO"]["false_premise"] >= 0.75,
    "false-premise accuracy: DPO at most .55": lambda m: m["DPO"]["false_premise"] <= 0.55,
    "log p(y_w) falls under DPO": lambda m: m["DPO"]["chosen"] < 0,
    "log p(y_w) falls under minus anchored": lambda m: m["minus anchored"]["chosen"] < 0,
    "log p(y_w) under mDPO rises, or falls by less than 0.3": lambda m: m["mDPO"]["chosen"] > -0.3,
    "over two thirds of DPO's margin survive without the image": lambda m: m["DPO"]["margin_no_image_share"] > 2 / 3,
    "under half of mDPO's margin survives without the image": lambda m: m["mDPO"]["margin_no_image_share"] < 1 / 2,
}

# The order of the paper's Tables 2 and 3, mDPO first. Table 3 was expected to hold in the large world alone: in the
# small one a crop is told from the whole at a glance. The large world's first bases, trained as long as the small
# world's, could not tell what is there (area under the curve .58 and .50) and were trained again for longer. Three
# methods had already run on one of them (grounding .41 DPO, .49 mDPO, .50 minus conditional).
ORDERS = ("minus conditional", "minus anchored", "crop 20-50%", "random image", "MoCo v2")


def verdicts(by_seed, summary):
    """A line for each prediction: in how many seeds it held."""
    claims = PREDICTIONS if QUICK.keys() <= summary.keys() else {}
    above = lambda other: lambda m: m["mDPO"]["grounding"] > m[other]["grounding"]
    others = [other for other in ORDERS if {"mDPO", other} <= summary.keys()]
    claims = claims | {f"mDPO is above {other} in grounding": above(other) for other in others}
    held = {claim: sum(map(holds, by_seed.values())) for claim, holds in claims.items()}
    return "\n".join(f"  {n} of {len(by_seed)} seeds: {claim}" for claim, n in held.items())


def draw(by_seed, path):
    pyplot = load_pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8))
    colours = {"DPO": "tab:red", "mDPO": "tab:blue", "minus anchored": "tab:orange", "minus conditional": "tab:green"}
    of_seeds = lambda method, name: [methods[method][name] for methods in by_seed.values()]
    for axis, name, start, title in (
        (left, "chosen_curve", 0, "change of log p(y_w), held out (nats)"),
        (middle, "image_accuracy_curve", 1, "image-conditional accuracy, held out"),  # before training all are 0
    ):
        for method in ("DPO", "mDPO", "minus anchored"):
            values = [curve[start:] for curve in of_seeds(method, name)]
            epochs = range(start, start + len(values[0]))
            axis.plot(epochs, [*zip(*values)], color=colours[method], alpha=0.25, linewidth=1)
            axis.plot(epochs, [*map(statistics.mean, zip(*values))], color=colours[method], label=method)
        axis.set(title=title, xlabel="epoch")
    left.axhline(0, color="grey", linewidth=0.5)
    left.legend()
    names = ["base", *QUICK]
    for x, method in enumerate(names):
        values = of_seeds(method, "grounding")
        right.bar(x, statistics.mean(values), color=colours.get(method, "lightgrey"), alpha=0.5)
        right.plot([x] * len(values), values, "k.", markersize=5)
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.set(title="grounding, a dot per seed")
    figure.tight_layout()
    with train.replacing(path.parent) as new:
        figure.savefig(new / path.name, dpi=110)


def run(argv):
    parser = train.Parser(description=__doc__.splitlines()[0])
    add, listed = parser.add_argument, ", ".join(METHODS).replace("%", "%%")
    add("--out", type=Path, help="(default: runs/miniature; of the large world: runs/miniature-large)")
    add("--quick", action="store_true", help="one seed, the methods of Figure 1 and Table 2")
    add("--seeds", type=train.natural, nargs="+", default=None, help="(default: 0 1 2 3 4; --quick: 0)")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"(default: all) {listed}")
    add("--world", choices=("small", "large"), default="small", help="large: up to five shapes, 48 pixels")
    add("--scenes", type=train.whole, default=200, help="held-out images, five questions each")
    add("--jobs", type=train.whole, default=2, help="processes, of one thread each")
    add("--figure", type=Path, help="draw a PNG here (needs matplotlib)")
    args = parser.parse_args(argv)
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2, 3, 4])
    methods = ["base", *(args.methods or (QUICK if args.quick else METHODS))]
    if args.figure and load_pyplot() and not QUICK.keys() <= {*methods}:
        raise BadInput(f"--figure needs the methods {', '.join(QUICK)}")
    world = {"small": shapes.SMALL, "large": shapes.LARGE}[args.world]
    args.out = args.out or Path("runs", "miniature" + "-large" * (args.world == "large"))
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(prepare_seed, *zip(*[(args.out, seed, world) for seed in seeds])))  # raises what a worker raised
        tasks = [(args.out, seed, method, args.scenes, world) for seed in seeds for method in methods]
        results = iter(list(tqdm(pool.map(run_method, *zip(*tasks)), "runs", len(tasks))))
    by_seed = {str(seed): {method: next(results) for method in methods} for seed in seeds}
    summary = summarize(by_seed)
    # By a shell: without git the results are written all the same.
    found = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True)
    arguments = {"seeds": seeds, "methods": methods, "scenes": args.scenes, "world": args.world}
    record = {"commit": found.stdout.strip(), "arguments": arguments, "common": COMMON, "methods": METHODS}
    write_json(args.out / "results.json", record | {"summary": summary, "seeds": by_seed})
    print(f"{tables(summary)}\n{verdicts(by_seed, summary)}\n\n{args.out / 'results.json'}")
    if args.figure:
        draw(by_seed, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
