"""Merge an adapter into its base model: a folder that `AutoModelForImageTextToText` and `AutoProcessor` load alone.

    python examples/merge.py --adapter runs/Bunny-v1_0-3B-silkie-1 --to merged

Merged in float32 (in bf16 the small change would round away) and saved in the base's dtype. The folder is made under a
name of its own, merged.*.tmp, beside its place. It gets its name only after it was loaded again and compared with base
and adapter. If anything stops the merge before that, it is removed.

The folder holds the base's own processor files. If torchvision is installed, the library takes another image
processor for them, whose pixels may be a grey level apart. The one of training:
processor.image_processor = AutoImageProcessor.from_pretrained("merged", backend="pil")
"""

import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Example, about, make_batch, run_command
from examples.answer import generate_answers, load_tuned, read_adapter
from mdpo import response_logps
from train import UMASK, Parser, load_processor, read_config, save_processor

MOST_OFF = 0.01  # nats a response: in float32 the merge only adds in another order
QUESTIONS = ("Describe the picture.", "What is in the picture?", "What colour is it?", "Is there a person?")


def merge_into(folder, adapter, base):
    """Merge, save, load again, compare -> a line for each model that was compared. Raises BadInput if one is wrong."""
    images = (Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB"),)
    pairs = [Example(text, "I cannot tell from this picture.", "No.", images, images) for text in QUESTIONS]

    def measure(model, processor):
        with torch.no_grad():
            logps = torch.cat(response_logps(model, make_batch(pairs, processor)))
        return logps, generate_answers(model, processor, [(images, question) for question in QUESTIONS], 40)

    model, processor = load_tuned(base, adapter, "cpu")
    config = ((whole := read_config(base)).get("text_config") or {}) | {k: v for k, v in whole.items() if v}
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    expected, answers = measure(model.eval(), processor)
    merged = model.merge_and_unload(safe_merge=True)
    exact, exact_answers = measure(merged, processor)
    off = (exact - expected).abs().max()
    if not off < MOST_OFF:
        raise BadInput(f"{adapter}: the merge is wrong, and not saved: {off:.1e} nats off base + adapter")
    with about(f"{folder.name}: cannot be written and loaded again"):
        # Under its original names a Bunny could not be read again by the library.
        merged.to(dtype).save_pretrained(folder, save_original_format=False)
        save_processor(processor, folder)
        for file in filter(Path.is_file, folder.rglob("*")):
            file.chmod(0o666 & ~UMASK)  # safetensors writes for its user alone
        again = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if wrong := different_weights(merged, again):
        raise BadInput(f"{folder.name}: removed, {len(wrong)} weights are not read back, such as {wrong[0]}")
    saved, saved_answers = measure(again, load_processor(str(folder)))

    lines = []
    results = ("merged in float32", exact, exact_answers), (f"as saved, {dtype}", saved, saved_answers)
    for name, logps, given in results:
        same = sum(a == b for a, b in zip(answers, given))
        apart = f"within {(logps - expected).abs().max():.1e} nats"
        lines.append(f"  {name + ':':28} log-probs {apart}, {same} of {len(answers)} answers the same")
    return lines


def different_weights(merged, again):
    """Names of weights that are not bit for bit those of `merged`, at its precision."""
    weights, read = merged.state_dict(), again.state_dict()
    same = lambda name: torch.equal(weights[name], read[name].to(weights[name].dtype))
    return sorted({*weights, *read} - {name for name in weights.keys() & read.keys() if same(name)})


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True, metavar="RUN", help="a run's folder")
    parser.add_argument("--model", help="the base model (default: as the adapter names it)")
    parser.add_argument("--to", required=True, help="a new folder")
    args = parser.parse_args(argv)
    to = Path(args.to)
    if os.path.lexists(to):
        raise BadInput(f"{to}: already exists")
    base = args.model or read_adapter(args.adapter).base_model_name_or_path
    if base is None:
        raise BadInput(f"{args.adapter}: names no base model, --model has to")
    with about(f"{to}: cannot be made"):
        own = TemporaryDirectory(".tmp", f"{to.name}.", to.parent)  # on the disk of `to`: renamed at the end
    with own as folder:
        lines = merge_into(Path(folder, to.name), args.adapter, base)
        with about(f"{to}: cannot be made"):
            Path(folder, to.name).rename(to)
    print(f"{to}: merged, saved and loaded again; against base + adapter in float32", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or it would leave its folder behind
    sys.exit(run_command(run))
