"""Draw the curves of one run or several, also while they run. Needs one more package: pip install matplotlib

    python examples/curves.py RUN [RUN ...] --to curves.png

A panel for each metric, a colour for each run. Lines are means over the examples of a step, points are of the held-out
examples. A run is a folder of train.py, or one with TRL's trainer_state.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, about, run_command
from train import Parser, replacing

METRICS = {  # name: what it is
    "loss": "the objective, in nats",
    "loss/dpo": "eq. 5, in nats",
    "loss/conditional": "eq. 6, in nats",
    "loss/anchor": "eq. 7, in nats",
    "rewards/chosen": "r(m_w, q, y_w), in nats",
    "rewards/rejected": "r(m_w, q, y_l), in nats",
    "rewards/image_rejected": "r(m_l, q, y_w), in nats",
    "rewards/margins": "chosen minus rejected, in nats",
    "rewards/image_margins": "chosen minus image_rejected, in nats",
    "rewards/accuracies": "share of margins above 0",
    "rewards/image_accuracies": "share of image margins above 0",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient before clipping",
    "examples_per_second": "speed of training",
}


def read_log(run):
    """The records of a run's log. A last line of metrics.jsonl that is still being written is left out."""
    path, of_trl = Path(run, "metrics.jsonl"), Path(run, "trainer_state.json")
    path = of_trl if of_trl.is_file() else path
    with about(f"{path}: cannot be read"):
        if path == of_trl:
            ours = lambda name: name.replace("learning_rate", "lr").replace("eval_", "eval/", 1)
            history = json.loads(path.read_text())["log_history"]
            records = [{ours(name): value for name, value in record.items()} for record in history]
        else:
            lines = path.read_text().split("\n")
            records = [json.loads(line) for line in (lines if lines[-1].endswith("}") else lines[:-1])]
        if not records:
            raise BadInput("holds no step yet")
    return records


def load_pyplot():
    with about("a figure needs matplotlib (pip install matplotlib)"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    return pyplot


def points(records, name):
    """-> steps, values. Accuracies are left out while all margins are 0, as before training."""
    is_point = lambda record: "accuracies" not in name or record.get(name.replace("accuracies", "margins")) != 0
    logged = [record for record in records if name in record and is_point(record)]
    return [record["step"] for record in logged], [record[name] for record in logged]


def draw(logs):
    """{name of a run: records} -> a figure with a panel for each metric that was logged."""
    logged = {name.removeprefix("eval/") for records in logs.values() for record in records for name in record}
    names = [name for name in METRICS if name in logged]
    n_rows = -(-len(names) // 4)
    size = {"figsize": (18, 3.5 * n_rows), "layout": "constrained", "squeeze": False}
    figure, axes = load_pyplot().subplots(n_rows, 4, **size)
    for axis, name in zip(axes.flat, names):
        axis.set(title=f"{name}\n{METRICS[name]}", xlabel="step")
        for number, records in enumerate(logs.values()):
            axis.plot(*points(records, name), color=f"C{number % 10}", linewidth=1)
            axis.plot(*points(records, f"eval/{name}"), "o", color=f"C{number % 10}")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    known = [axes[0, 0].plot([], [], color=f"C{number % 10}", label=run)[0] for number, run in enumerate(logs)]
    known += axes[0, 0].plot([], [], "ko", label="held-out examples")
    figure.legend(handles=known, loc="outside upper center", ncols=4)
    return figure


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, train.py's or TRL's")
    parser.add_argument("--to", required=True, metavar="FILE", help="a picture, .png or .svg; overwritten")
    args = parser.parse_args(argv)
    load_pyplot()
    figure, to = draw({run: read_log(run) for run in args.runs}), Path(args.to)
    with replacing(to.parent) as new:  # who looks at it meanwhile sees the old one
        figure.savefig(new / to.name, dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
