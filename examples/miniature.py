"""The paper in miniature: its comparisons, in the world of `shapes.py`, by the product's own training code.

    python examples/miniature.py --quick                # one seed, Figure 1 and Table 2
    python examples/miniature.py --figure curves.png    # five seeds, every comparison; the figure needs matplotlib

The folder of a world holds one for each seed and method, and results.json. What is there is not computed again.
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
PAIRS, HELD_OUT, SCENES = 1536, 96, 200  # 48 steps an epoch of 32; five questions about each scene
COMMON = "--epochs 3 --lr 3e-4 --lora-rank 16 --lora-alpha 32 --batch-size 32 --micro-batch-size 32 --workers 0 "
COMMON += f"--no-checkpointing --eval-size {HELD_OUT} --limit {PAIRS + HELD_OUT} --device cpu"

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


@torch.no_grad()
def examine(model, processor, exam):
    """The metrics of `shapes.score` for the model's answers, and the area under the curve of its leaning to yes."""
    asked = [(image, shapes.question_text(question)) for _, image, question in exam]
    answers = generate_answers(model, processor, asked, max_new_tokens=40, batch_size=250)
    metrics = shapes.score([(scene, question, answer) for (scene, _, question), answer in zip(exam, answers)])
    existence = asked[3::5] + asked[4::5]  # first those to be answered with yes
    prompts = [chat_prompt(processor, text) for _, text in existence]
    inputs = encode(processor, prompts, [(image,) for image, _ in existence]).to(model.device, model.dtype)
    logits = model(**inputs, logits_to_keep=1).logits[:, 0]  # of the first token of the answers
    yes, no = (processor.tokenizer(word).input_ids[0] for word in (" yes", " no"))
    of_true, of_false = (logits[:, yes] - logits[:, no]).chunk(2)
    order = (of_true[:, None] - of_false).sign()  # of each true question beside each false one; 0 in a tie
    return metrics | {"yes_no_auc": (1 + order.mean().item()) / 2}


@contextlib.contextmanager
def in_folder(out, seed):
    """The folder of a seed, in which what is said goes to log.txt."""
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
        is_demo = seed == 0 and world == shapes.SMALL
        makers = {
            "model": lambda to: shutil.copytree(demo.BASE, to) if is_demo else tiny_bunny.write_base(to, seed, world),
            "data": lambda to: shapes.write_pairs(to, PAIRS + HELD_OUT, seed, world),
            "held_out": lambda to: shapes.write_pairs(to, 200, f"held out {seed}", world),
        }
        for name, make in makers.items():
            if not (folder / name).exists():
                with tempfile.TemporaryDirectory(".tmp", "unfinished.", folder) as own:
                    make(Path(own, name))
                    Path(own, name).rename(folder / name)


def run_method(out, seed, method, world=shapes.SMALL):
    """Train and examine one method -> its metrics; taken from its file if that is there."""
    with in_folder(out, seed) as folder:
        run = folder / re.sub(r"\W+", "-", method).strip("-")
        if (file := run / "result.json").exists():
            return json.loads(file.read_text())
        run.mkdir(exist_ok=True)
        exam = shapes.make_exam(SCENES, seed, world)
        if method == "base":
            result = examine(*load_tuned(folder / "model", None, "cpu"), exam)
            if (auc := result["yes_no_auc"]) < MIN_BASE_AUC:
                raise BadInput(f"seed {seed}: its base model sees too little ({auc:.2f}); take another seed")
        else:
            flags = f"{COMMON} {METHODS[method]} --seed {seed}".split()
            flags += [f"--model={folder}/model", f"--data={folder}/data/silkie.json", f"--out={run}"]
            if train.main(["--resume", str(run)] if (run / "args.json").exists() else flags):
                raise BadInput(f"seed {seed}, {method}: training ended early, see {folder / 'log.txt'}")
            model, processor = load_tuned(folder / "model", run, "cpu")
            held_out = read_examples(str(folder / "held_out" / "silkie.json"), log=len)
            margins = diagnose(score_margins(model, processor, held_out, batch_size=40))
            result = {f"margin_{name}": value for name, value in margins.items()} | curves(run)
            result |= examine(model, processor, exam)
        write_json(file, result)
        return result


def curves(run, beta=0.1):
    """Change of log p(y_w) and image-conditional accuracy on held-out pairs, after each epoch; and the last."""
    records, result = read_log(run), {}
    for name, metric, unit in ("chosen", "rewards/chosen", beta), ("image_accuracy", "rewards/image_accuracies", 1):
        curve = [record[f"eval/{metric}"] / unit for record in records if f"eval/{metric}" in record]
        if curve:  # not without images
            result |= {f"{name}_curve": curve, name: curve[-1]}
    return result


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
        lines.append(" " * 20 + "".join(f"{name.removeprefix('margin_').removesuffix('_rate'):>16}" for name in names))
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


def verdicts(by_seed):
    """A line for each prediction about methods that were run: in how many seeds it held."""
    above = lambda other: lambda m: m["mDPO"]["grounding"] > m[other]["grounding"]
    claims, lines = PREDICTIONS | {f"mDPO is above {other} in grounding": above(other) for other in ORDERS}, []
    for claim, holds in claims.items():
        with contextlib.suppress(KeyError):  # a method that was not run
            lines.append(f"  {sum(map(holds, by_seed.values()))} of {len(by_seed)} seeds: {claim}")
    return "\n".join(lines)


def draw(by_seed, path):
    figure, (left, middle, right) = load_pyplot().subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colours = {"DPO": "tab:red", "mDPO": "tab:blue", "minus anchored": "tab:orange", "minus conditional": "tab:green"}
    of_seeds = lambda method, name: torch.tensor([methods[method][name] for methods in by_seed.values()])
    for axis, name, start, title in (
        (left, "chosen_curve", 0, "change of log p(y_w), held out (nats)"),
        (middle, "image_accuracy_curve", 1, "image-conditional accuracy, held out"),  # before training all are 0
    ):
        for method in ("DPO", "mDPO", "minus anchored"):
            values = of_seeds(method, name).T[start:]  # (epochs, seeds)
            epochs = range(start, start + len(values))
            axis.plot(epochs, values, color=colours[method], alpha=0.25, linewidth=1)
            axis.plot(epochs, values.mean(1), color=colours[method], label=method)
        axis.set(title=title, xlabel="epoch")
    left.axhline(0, color="grey", linewidth=0.5)
    left.legend()
    for method in ("base", *QUICK):
        values = of_seeds(method, "grounding")
        right.bar(method, values.mean(), color=colours.get(method, "lightgrey"), alpha=0.5)
        right.plot([method] * len(values), values, "k.", markersize=5)
    right.set_xticks(range(1 + len(QUICK)), ["base", *QUICK], rotation=30, ha="right")
    right.set(title="grounding, a dot per seed")
    with train.replacing(path.parent) as new:
        figure.savefig(new / path.name, dpi=110)


def run(argv):
    parser = train.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs", "miniature"), help="with a folder for each world")
    add("--quick", action="store_true", help="one seed, the methods of Figure 1 and Table 2")
    add("--seeds", type=train.natural, nargs="+", help="(default: 0 1 2 3 4; --quick: 0)")
    add("--world", choices=("small", "large"), default="small", help="large: up to five shapes, 48 pixels")
    add("--jobs", type=train.whole, default=2, help="processes; of one thread each, so that a rerun is the same")
    add("--figure", type=Path, help="draw a PNG here (needs matplotlib)")
    args = parser.parse_args(argv)
    seeds, methods = args.seeds or [*range(1 if args.quick else 5)], ["base", *(QUICK if args.quick else METHODS)]
    world, out = {"small": shapes.SMALL, "large": shapes.LARGE}[args.world], args.out / args.world
    if args.figure:
        load_pyplot()
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        list(pool.map(prepare_seed, *zip(*[(out, seed, world) for seed in seeds])))  # raises what a worker raised
        tasks = [(out, seed, method, world) for seed in seeds for method in methods]
        results = iter(list(tqdm(pool.map(run_method, *zip(*tasks)), "runs", len(tasks))))
    by_seed = {str(seed): {method: next(results) for method in methods} for seed in seeds}
    summary = summarize(by_seed)
    # By a shell: without git the results are written all the same.
    found = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True)
    record = {"commit": found.stdout.strip(), "world": args.world, "common": COMMON, "methods": METHODS}
    write_json(out / "results.json", record | {"summary": summary, "seeds": by_seed})
    print(f"{tables(summary)}\n{verdicts(by_seed)}\n\n{out / 'results.json'}")
    if args.figure:
        draw(by_seed, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
