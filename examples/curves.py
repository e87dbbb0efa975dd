"""Draw the curves of one run or several, also while they run. Needs one more package: pip install matplotlib

    python examples/curves.py RUN [RUN ...] --to curves.png

A colour for each run. Lines are means over the examples of a step, points are of the held-out examples.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, about, run_command
from train import Parser, replacing

PANELS = {  # title: metrics
    "loss": ("loss", "loss/dpo", "loss/conditional", "loss/anchor"),
    "rewards": ("rewards/chosen", "rewards/rejected", "rewards/image_rejected"),
    "margins": ("rewards/margins", "rewards/image_margins"),
    "accuracies": ("rewards/accuracies", "rewards/image_accuracies"),
    "learning rate": ("lr",),
    "gradient norm before clipping": ("grad_norm",),
    "examples per second": ("examples_per_second",),
}


def read_log(run):
    """metrics.jsonl of a run -> its records, without a last line that is still being written."""
    path = Path(run, "metrics.jsonl")
    with about(f"{path}: cannot be read"):
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


def draw(logs):
    """{name of a run: records} -> a figure."""
    figure, axes = load_pyplot().subplots(2, 4, figsize=(18, 8), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items()):
        axis.set(title=title, xlabel="step")
        for name, style in zip(names, ("-", "--", ":", "-.")):
            axis.plot([], [], "k" + style, label=name)
            for number, records in enumerate(logs.values()):
                for key, marker in ((name, ""), (f"eval/{name}", "o")):
                    logged = [record for record in records if key in record]
                    steps, values = [record["step"] for record in logged], [record[key] for record in logged]
                    axis.plot(steps, values, style, color=f"C{number % 10}", marker=marker, linewidth=1)
        axis.legend()
    for number, run in enumerate(logs):
        axes[1, 3].plot([], [], color=f"C{number % 10}", label=run)
    axes[1, 3].plot([], [], "ko", label="held out")
    axes[1, 3].legend(loc="upper left")
    axes[1, 3].axis("off")
    return figure


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--to", required=True, metavar="FILE", help="a picture, .png or .svg; overwritten")
    args = parser.parse_args(argv)
    load_pyplot()
    figure, to = draw({run: read_log(run) for run in args.runs}), Path(args.to)
    with replacing(to.parent) as new:  # who looks at it meanwhile sees the old one
        figure.savefig(new / to.name, dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
