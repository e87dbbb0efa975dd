"""Draw the curves of one run or several, also while they run. Needs one more package: pip install matplotlib

    python examples/curves.py RUN [RUN ...] --to curves.png

Each run has a colour. Lines are means over the examples of a step, points are held-out examples.
"""

import json
import sys
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    matplotlib = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, about, run_command
from train import Parser

PANELS = {  # title: metrics, drawn in the order of STYLES
    "loss": ("loss", "loss/dpo", "loss/conditional", "loss/anchor"),
    "rewards": ("rewards/chosen", "rewards/rejected", "rewards/image_rejected"),
    "margins": ("rewards/margins", "rewards/image_margins"),
    "accuracies": ("rewards/accuracies", "rewards/image_accuracies"),
    "learning rate": ("lr",),
    "gradient norm before clipping": ("grad_norm",),
    "examples per second": ("examples_per_second",),
}
STYLES = ("-", "--", ":", "-.")


def read_log(run):
    """metrics.jsonl of a run -> its records. A last line that is still being written is left out."""
    path = Path(run, "metrics.jsonl")
    with about(f"{path}: cannot be read"):
        lines = path.read_text().split("\n")
        if not lines[-1].endswith("}"):
            lines.pop()
        records = [json.loads(line) for line in lines]
        if not records:
            raise BadInput("holds no step yet")
    return records


def curve(records, name):
    """-> the steps at which a metric was logged, and its values."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [*zip(*points)] or [(), ()]


def draw(logs):
    """{name of a run: records} -> a figure."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(18, 8), layout="constrained")
    *axes, legend = axes.flat
    for axis, (title, names) in zip(axes, PANELS.items()):
        axis.set(title=title, xlabel="step")
        for name, style in zip(names, STYLES):
            if len(names) > 1:
                axis.plot([], [], "k" + style, label=name.rpartition("/")[2])
            for number, records in enumerate(logs.values()):
                colour = f"C{number % 10}"
                axis.plot(*curve(records, name), style, color=colour, linewidth=1)
                axis.plot(*curve(records, f"eval/{name}"), style, color=colour, marker="o", alpha=0.5)
        if len(names) > 1:
            axis.legend()
    for number, run in enumerate(logs):
        legend.plot([], [], color=f"C{number % 10}", label=run)
    legend.plot([], [], "ko", alpha=0.5, label="held out")
    legend.axis("off")
    legend.legend(loc="upper left")
    return figure


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--to", required=True, metavar="FILE", help="a picture (.png, .svg, .pdf); replaced")
    args = parser.parse_args(argv)
    if matplotlib is None:
        raise BadInput("curves.py needs one more package: pip install matplotlib")
    matplotlib.use("Agg")
    logs = {run: read_log(run) for run in args.runs}
    with about(f"{args.to}: cannot be drawn"):
        draw(logs).savefig(args.to, dpi=90)
    for run, records in logs.items():
        print(f"{run}: {records[-1]['step']} steps")
    return 0


def main(argv=None):
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
