"""`python train.py --demo`: the shapes world, a base model that answers from habit, 720 pairs."""

import json
from itertools import count
from pathlib import Path

import train
from data import BadInput, read_examples, run_command
from examples import shapes
from examples.answer import generate_answers, load_tuned, speaking_as

BASE = Path(__file__).parent / "base"  # made by `tiny_bunny.write_base`
FLAGS = "--lr 1e-3 --lora-rank 16 --lora-alpha 32 --micro-batch-size 32 --no-checkpointing --eval-size 80 "
FLAGS += "--workers 2 --device cpu"  # where it prints the README's digits
METRICS = {  # of `shapes.score`
    "hallucination_rate": "answers with a false claim; lower is better",
    "chair_s": "descriptions with a thing that is not there; lower",
    "false_premise": "questions about absent things that are refused; higher",
    "yes_no": "right answers to yes/no questions; higher",
    "malformed": "answers that are no sentence; lower",
    "length": "words",
}


def main(argv=None, loss=train.mdpo_loss):
    """`train.py --demo` and any of its flags but --model, --data and --out -> exit status."""
    return run_command(lambda argv: run(argv, loss), argv)


def run(argv, loss):
    flags = [*FLAGS.split(), *(flag for flag in argv if flag != "--demo")]
    args = train.parse_args(["--model", "", "--data", "", *flags])  # before anything is drawn
    if args.model or args.data or args.out:
        raise BadInput("--demo has a model, data and a folder of its own")
    folder = next(path for n in count(1) if not (path := Path("runs", f"demo-{n}")).exists())
    data, out = str(shapes.write_pairs(folder / "data", n=720, seed=0)), str(folder / "out")
    runs = {"after": (out, [])}
    if args.conditional and args.anchors == ["chosen"] and loss is train.mdpo_loss:  # mDPO, and DPO to compare
        runs = {"DPO": (str(folder / "dpo"), ["--no-conditional", "--anchors", "none"]), "mDPO": (out, [])}
    for name, (to, more) in runs.items():
        print(f"\n{name}: {to}" if len(runs) > 1 else "")
        status = train.main(["--model", str(BASE), "--data", data, "--out", to, *flags, *more], loss)
        if status:
            return status
    write_held_out(data, out)
    model, processor = load_tuned(BASE, [to for to, *_ in runs.values()], args.device)
    print(f"\n{report(model, processor, out, tuple(runs))}")
    return 0


def write_held_out(data, out):
    """The pairs that the run held out, as it drew them -> held_out.json beside the data."""
    run, records = json.loads(Path(out, "args.json").read_text()), json.loads(Path(data).read_text())
    sample = {name: run[name] for name in ("subset", "limit", "seed")}
    examples = read_examples(data, check=False, log=len, **sample)
    _, held = train.hold_out(examples, run["eval_size"], run["seed"])
    held_out = [records[int(example.id) - 1] for example in held]
    Path(data).with_name("held_out.json").write_text(json.dumps(held_out, indent=1))


def report(model, processor, folder, names=("after",), n_scenes=60, seed=0):
    """The base and each adapter answer held-out questions -> a text: metrics, three questions about one image.

    names: of the adapters of `answer.load_tuned`. The image is the first of those about which the last of them is
    right most often where the one before is wrong.
    """
    exam = shapes.make_exam(n_scenes, seed)
    asked, said = [(image, shapes.question_text(question)) for _, image, question in exam], {}
    for number, name in enumerate(("before", *names)):
        with speaking_as(model, number - 1 if number else None):
            answers = generate_answers(model, processor, asked, max_new_tokens=32, batch_size=100)
        said[name] = [(scene, question, answer) for (scene, _, question), answer in zip(exam, answers)]
    scores = [*map(shapes.score, said.values())]
    lines = [f"{len(exam)} held-out questions          " + "".join(f"{name:>10}" for name in said)]
    for name, meaning in METRICS.items():
        lines.append(f"  {name:28}" + "".join(f"{score[name]:10.3f}" for score in scores) + f"   {meaning}")
    shown, (before, last) = (0, 2, 4), [*said][-2:]  # of a picture's five questions
    right = lambda name, i: shapes.is_right(*said[name][i])
    gain = lambda at: sum(right(last, at + i) and not right(before, at + i) for i in shown)
    at = max(range(0, len(exam), 5), key=gain)
    scene, image, _ = exam[at]
    path = Path(folder) / "picture.png"
    image.resize((256, 256)).save(path)
    lines.append(f"\nthe first picture with the most answers that {last} has right and {before} wrong: {path},")
    lines.append(shapes.answer_text(("describe",), shapes.claims_of(scene, ("describe",)), polite=False))
    for i in (at + i for i in shown):
        lines += [f"  {asked[i][1] * (name == 'before'):34} {name + ':':8} {said[name][i][2]}" for name in said]
    return "\n".join(lines)
