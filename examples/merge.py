"""Merge an adapter into its base model: a folder that `AutoModelForImageTextToText` and `AutoProcessor` load alone.

    python examples/merge.py --adapter runs/Bunny-v1_0-3B-silkie-1 --to merged

Merged in float32 (in bf16 the small change would round away) and saved in the base's dtype. The folder gets its name
only after it was loaded again and compared with base and adapter.

With torchvision, the library takes another image processor, whose pixels may be a grey level apart. The one of
training: processor.image_processor = AutoImageProcessor.from_pretrained("merged", backend="pil")
"""

import os
import signal
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, Example, make_batch, run_command
from examples.answer import generate_answers, load_tuned, read_adapter
from mdpo import response_logps
from train import STOPPING, UMASK, Parser, load_processor, read_config, replacing, save_processor

MOST_OFF = 0.01  # nats a response: in float32 the merge only adds in another order
QUESTIONS = ("Describe the picture.", "What is in the picture?", "What colour is it?", "Is there a person?")


@torch.no_grad()
def measure(model, processor):
    """-> log-probabilities of responses, and answers, about a picture."""
    images = (Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB"),)
    pairs = [Example(text, "I cannot tell from this picture.", "No.", images, images) for text in QUESTIONS]
    logps = torch.cat(response_logps(model, make_batch(pairs, processor)))
    return logps, generate_answers(model, processor, [(images, question) for question in QUESTIONS], 40)


def dtype_of(config):
    """The dtype of a base, or of its text model if its config.json has none."""
    config = (config.get("text_config") or {}) | {name: value for name, value in config.items() if value}
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def different_weights(merged, again):
    """Names of weights that are not bit for bit those of `merged`, at its precision."""
    weights, read = merged.state_dict(), again.state_dict()
    same = [n for n in weights.keys() & read.keys() if torch.equal(weights[n], read[n].to(weights[n].dtype))]
    return sorted({*weights, *read} - {*same})


def run(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True, metavar="RUN", help="a run's folder")
    parser.add_argument("--model", help="the base model (default: as the adapter names it)")
    parser.add_argument("--to", required=True, help="a new folder")
    args = parser.parse_args(argv)
    to = Path(args.to)
    if os.path.lexists(to):
        raise BadInput(f"{to}: already exists")
    if not (to.parent.is_dir() and os.access(to.parent, os.W_OK)):
        raise BadInput(f"{to.parent}: is no folder that can be written to")
    base = args.model or read_adapter(args.adapter).base_model_name_or_path
    if base is None:
        raise BadInput(f"{args.adapter}: names no base model, --model has to")
    model, processor = load_tuned(base, args.adapter, "cpu")
    expected, answers = measure(model, processor)
    merged, dtype = model.merge_and_unload(safe_merge=True), dtype_of(read_config(base))
    exact = measure(merged, processor)
    off = (exact[0] - expected).abs().max()
    if not off < MOST_OFF:
        raise BadInput(f"{args.adapter}: the merge is wrong, and not saved: {off:.1e} nats off base + adapter")
    with replacing(to.parent) as new:
        folder = new / to.name
        # Under its original names a Bunny could not be read again by the library.
        merged.to(dtype).save_pretrained(folder, save_original_format=False)
        save_processor(processor, folder)
        again = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        if wrong := different_weights(merged, again):
            raise BadInput(f"{to.name}: removed, {len(wrong)} weights are not read back, such as {wrong[0]}")
        saved = measure(again, load_processor(str(folder)))
        for file in filter(Path.is_file, folder.rglob("*")):
            file.chmod(0o666 & ~UMASK)  # safetensors writes for its user alone
        folder.rename(to)  # at once: half a folder is never there, nor one that is mixed with another's files
    print(f"{to}: merged, saved and loaded again; against base + adapter in float32")
    for name, (logps, given) in ("merged in float32", exact), (f"as saved, {dtype}", saved):
        same = sum(a == b for a, b in zip(answers, given))
        apart = f"within {(logps - expected).abs().max():.1e} nats"
        print(f"  {name + ':':28} log-probs {apart}, {same} of {len(answers)} answers the same")
    return 0


if __name__ == "__main__":
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)  # or it would leave its folder behind
    sys.exit(run_command(run))
