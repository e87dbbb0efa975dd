"""`python train.py --demo`: the shapes world, a base model that answers from habit, 720 pairs."""

import json
from itertools import count
from pathlib import Path

import train
from data import BadInput, read_examples, run_command
from examples import shapes
from examples.answer import generate_answers, load_tuned

BASE = Path(__file__).parent / "base"  # made by: python examples/tiny_bunny.py examples/base
FLAGS = "--lr 1e-3 --lora-rank 16 --lora-alpha 32 --micro-batch-size 32 --no-checkpointing --eval-size 80 "
FLAGS += "--workers 2 --device cpu"  # where it prints the README's digits


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
    status = train.main(["--model", str(BASE), "--data", data, "--out", out, *flags], loss)
    if status == 0:
        write_held_out(data, out)
        print(f"\n{report(*load_tuned(BASE, out, args.device), out)}")
    return status


def write_held_out(data, out):
    """The pairs that the run held out, as it drew them -> held_out.json beside the data."""
    run, records = json.loads(Path(out, "args.json").read_text()), json.loads(Path(data).read_text())
    sample = {name: run[name] for name in ("subset", "limit", "seed")}
    examples = read_examples(data, check=False, log=lambda text: None, **sample)
    _, held = train.hold_out(examples, run["eval_size"], run["seed"])
    held_out = [records[int(example.id) - 1] for example in held]
    Path(data).with_name("held_out.json").write_text(json.dumps(held_out, indent=1))


def report(model, processor, folder, n_scenes=60, seed=0):
    """Base and tuned model answer held-out questions -> a text: metrics, three questions about one image."""
    exam = shapes.make_exam(n_scenes, seed)
    asked = [(image, shapes.question_text(question)) for _, image, question in exam]
    tuned = generate_answers(model, processor, asked, max_new_tokens=32, batch_size=100)
    with model.disable_adapter():
        base = generate_answers(model, processor, asked, max_new_tokens=32, batch_size=100)
    before, after = (shapes.score([(s, q, a) for (s, _, q), a in zip(exam, answers)]) for answers in (base, tuned))
    lines = [f"{len(exam)} held-out questions           before     after"]
    for name in ("hallucination_rate", "chair_s", "false_premise", "yes_no", "malformed", "length"):
        lines.append(f"  {name:28} {before[name]:10.3f} {after[name]:9.3f}")

    shown = (0, 2, 4)  # of a picture's five questions
    claims = lambda i, answers: shapes.parse_answer(exam[i][2], answers[i])
    changed = lambda at: any(claims(at + i, base) != claims(at + i, tuned) for i in shown)
    at = next(filter(changed, range(0, len(exam), 5)), 0)
    path = Path(folder) / "picture.png"
    exam[at][1].resize((256, 256)).save(path)
    truth = shapes.answer_text(("describe",), shapes.claims_of(exam[at][0], ("describe",)), polite=False)
    lines.append(f"\nthe first picture about which an answer changed, {path}: {truth}")
    for i in (at + i for i in shown):
        lines.append(f"  {asked[i][1]:34} before: {base[i]}\n  {'':34} after:  {tuned[i]}")
    return "\n".join(lines)
