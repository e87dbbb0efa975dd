"""Ask a model about an image, before and after training (the paper's Figure 3); greedy.

python examples/answer.py --model BAAI/Bunny-v1_0-3B --adapter runs/... --image photo.jpg --question "What is this?"
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import peft
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, about, chat_messages, encode, open_image, render, run_command
from train import Parser, best_device, load_model, whole


def load_tuned(name_or_path, adapter=None, device=None):
    """Model and processor, with the adapter of a run's folder, on the GPU if there is one.

    Raises BadInput, also where peft would go on: if weights are missing or have no place in the model.
    """
    config = read_adapter(adapter) if adapter else None
    model, processor = load_model(name_or_path, device or best_device())
    if config is None:
        return model, processor
    with about(f"{adapter}: is no adapter of {name_or_path}"):
        model = peft.PeftModel(model, config)
        missing, unexpected = model.load_adapter(adapter, "default")
        for kind, wrong in ("missing", missing), ("unexpected", unexpected):
            if wrong:
                raise BadInput(f"{len(wrong)} weights are {kind}, such as {min(wrong)}")
    return model, processor


def read_adapter(adapter):
    with about(f"{adapter}: holds no adapter"):
        for name in ("adapter_config.json", "adapter_model.safetensors"):  # peft would ask the hub for it
            if not Path(adapter, name).is_file():
                raise BadInput(f"no {name}")
        return peft.PeftConfig.from_pretrained(adapter)


def chat_prompt(processor, question, n_images=1):
    return render(processor, chat_messages(question, n_images), add_generation_prompt=True)


@torch.no_grad()
def generate_answers(model, processor, questions, max_new_tokens=256, batch_size=8):
    """[(PIL image or several, question)] -> the model's greedy answers, in order; it is left in eval mode."""
    model.eval()  # under gradient checkpointing, a model in training mode forgets its cache and babbles
    answers = []
    for at in range(0, len(questions), batch_size):
        batch = questions[at : at + batch_size]
        images = [image if isinstance(image, (list, tuple)) else [image] for image, _ in batch]
        texts = [text for _, text in batch]
        prompts = [chat_prompt(processor, text, len(of_text)) for text, of_text in zip(texts, images)]
        inputs = encode(processor, prompts, images).to(model.device, model.dtype)
        tokens = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
        )
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return answers


def make_parser(doc, needs_adapter=False):
    """A parser with the arguments of all commands that load a model."""
    parser = Parser(description=doc.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--adapter", required=needs_adapter, metavar="RUN", help="a run's folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    return parser


def run(argv):
    parser = make_parser(__doc__)
    parser.add_argument("--image", nargs="+", default=[], help="an image or several; without: a text alone")
    parser.add_argument("--question", required=True)
    parser.add_argument("--max-new-tokens", type=whole, default=256)
    args = parser.parse_args(argv)
    question = [([*map(open_image, args.image)], args.question)]
    model, processor = load_tuned(args.model, args.adapter, args.device)
    with model.disable_adapter() if args.adapter else nullcontext():
        print(f"base:  {generate_answers(model, processor, question, args.max_new_tokens)[0]}")
    if args.adapter:
        print(f"tuned: {generate_answers(model, processor, question, args.max_new_tokens)[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
