"""Ask a model about an image, before and after training (the paper's Figure 3); greedy.

python examples/answer.py --model BAAI/Bunny-v1_0-3B --adapter runs/... --image photo.jpg --question "What is this?"
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import peft
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BadInput, chat_messages, encode_prompts, open_image, run_command
from train import best_device, load_model, quiet_libraries


def load_tuned(name_or_path, adapter=None):
    """Model and processor, on the GPU if there is one, with the adapter of a run's folder. Raises BadInput."""
    if adapter and not (Path(adapter) / "adapter_config.json").is_file():
        raise BadInput(f"{adapter}: holds no adapter (no adapter_config.json)")
    model, processor = load_model(name_or_path, best_device())
    return peft.PeftModel.from_pretrained(model, adapter) if adapter else model, processor


def chat_prompt(processor, question, n_images=1):
    messages = chat_messages(question, n_images)
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


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
        inputs = encode_prompts(processor, prompts, images).to(model.device, model.dtype)
        tokens = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
        )
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return answers


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--adapter", help="a run's folder; its answer is printed under the base model's")
    parser.add_argument("--image", required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args(argv)
    quiet_libraries()
    question = [(open_image(args.image), args.question)]
    model, processor = load_tuned(args.model, args.adapter)
    with model.disable_adapter() if args.adapter else nullcontext():
        print(f"base:  {generate_answers(model, processor, question, args.max_new_tokens)[0]}")
    if args.adapter:
        print(f"tuned: {generate_answers(model, processor, question, args.max_new_tokens)[0]}")
    return 0


def main(argv=None):
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
