"""Draw the curves of one run or several, also while they run. Needs one more package: pip install matplotlib

    python examples/curves.py RUN [RUN ...] --to curves.png

A panel for each metric, a colour for each run. Lines are means over the examples of a step, points are of the held-out
examples. A run is a folder of train.py, or one with TRL's trainer_state.json.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, about, run_command
from train import Parser, replacing

SHOWN = re.compile("(eval/)?(loss|rewards/|lr$|grad_norm|examples_per_second)")  # the README says what each is


def read_log(run):
    """The records of a run's log. A last line of metrics.jsonl that is still being written is left out."""
    of_trl = Path(run, "trainer_state.json")
    path = of_trl if of_trl.is_file() else Path(run, "metrics.jsonl")
    with about(f"{path}: cannot be read"):
        text = path.read_text().replace('"learning_rate"', '"lr"').replace('"eval_', '"eval/')
        text = text[: text.rfind("}") + 1]
        records = json.loads(text)["log_history"] if path == of_trl else [*map(json.loads, text.splitlines())]
        if not any(SHOWN.match(name) for record in records for name in record):
            raise BadInput("holds no metric to draw yet")
    return records


def load_pyplot():
    with about("a figure needs matplotlib (pip install matplotlib)"):
        from matplotlib import pyplot
    pyplot.switch_backend("Agg")  # which needs no screen
    return pyplot


def points(records, name):
    """-> steps, values. Accuracies are left out while all margins are 0, as before training."""
    is_point = lambda record: "accuracies" not in name or record.get(name.replace("accuracies", "margins")) != 0
    logged = [record for record in records if name in record and is_point(record)]
    return [record["step"] for record in logged], [record[name] for record in logged]


def draw(logs):
    """{name of a run: records} -> a figure with a panel for each metric that was logged."""
    logged = [name.removeprefix("eval/") for records in logs.values() for record in records for name in record]
    names = [*dict.fromkeys(filter(SHOWN.match, logged))]
    n_rows = -(-len(names) // 4)
    figure = load_pyplot().figure(figsize=(18, 3.5 * n_rows), layout="constrained")
    for place, name in enumerate(names, 1):
        axis = figure.add_subplot(n_rows, 4, place, title=name, xlabel="step")
        for number, (run, records) in enumerate(logs.items()):
            axis.plot(*points(records, name), color=f"C{number % 10}", linewidth=1, label=run)
            axis.plot(*points(records, f"eval/{name}"), "o", color=f"C{number % 10}")
    axis.plot([], [], "ko", label="held-out examples")
    figure.legend(handles=axis.get_legend_handles_labels()[0], loc="outside upper center", ncols=4)
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
    print(f"{to}: {len(figure.axes)} metrics")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
