"""mDPO in TRL's DPOTrainer (needs trl, written for 1.16): a collator with the rows of m_l, and the loss.

    python examples/trl_mdpo.py --model llava-hf/llava-1.5-7b-hf --data silkie.json --output_dir OUT
    accelerate launch --num_processes 8 examples/trl_mdpo.py ...      # many GPUs: DDP, FSDP or DeepSpeed

Flags beside --model, --data and --images are those of TRL's `DPOConfig`.
"""

import sys
from pathlib import Path

import datasets
import peft
import torch
import transformers
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import use_adapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Pairs, read_examples
from mdpo import LogPs, mdpo_loss
from train import add_lora, load_model


class MDPOCollator(DataCollatorForVisionPreference):
    """TRL's rows [m_w q y_w], [m_w q y_l] of B examples, followed by B rows [m_l q y_w]."""

    def torch_call(self, examples):
        other_images = [{**example, "images": example["rejected_images"]} for example in examples]
        batch = super().torch_call([dict(example) for example in examples])  # (2B, ...)
        other = super().torch_call(other_images)  # (m_l, y_w), (m_l, y_l): the second half is not needed
        return {name: torch.cat([rows, other[name].chunk(2)[0]]) for name, rows in batch.items()}  # (3B, ...)


class MDPOTrainer(DPOTrainer):
    def _compute_loss(self, model, inputs, return_outputs):
        mask = inputs.pop("completion_mask")
        inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
        score = lambda: LogPs(*model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum(1).chunk(3))
        policy_logps = score()
        with torch.no_grad(), use_adapter(self.accelerator.unwrap_model(model), adapter_name=None):
            ref_logps = score()
        losses, metrics = mdpo_loss(policy_logps, ref_logps, self.beta)
        for name, values in metrics.items():
            gathered = self.accelerator.gather(values)
            self._metrics["train" if model.training else "eval"][name].append(gathered.mean().item())
        return (losses.mean(), None) if return_outputs else losses.mean()


def trl_dataset(pairs):
    """Pairs -> a `datasets.Dataset` in TRL's vision format; a pair is asked for when its row is read."""
    say = lambda role, text: [{"role": role, "content": text}]

    def load(columns):
        rows = [pairs[i] for i in columns["index"]]
        prompt = lambda question: say("user", question) if isinstance(question, str) else question
        return {
            "prompt": [prompt(row.question) for row in rows],
            "chosen": [say("assistant", row.chosen) for row in rows],
            "rejected": [say("assistant", row.rejected) for row in rows],
            "images": [[*row.images] for row in rows],
            "rejected_images": [[*row.images_rejected] for row in rows],
        }

    return datasets.Dataset.from_dict({"index": range(len(pairs))}).with_transform(load)


class FirstEpoch(Pairs):
    """One rejected image an example for the whole run: TRL's data do not know the epoch."""

    def __getitem__(self, index):
        return super().__getitem__((0, index))


def make_trainer(model, processor, examples, config):
    config.remove_unused_columns = False
    return MDPOTrainer(
        model,
        args=config,
        train_dataset=trl_dataset(FirstEpoch(examples, seed=config.seed)),
        processing_class=processor,
        data_collator=MDPOCollator(processor),
    )


def main():
    parser = transformers.HfArgumentParser(DPOConfig)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images")
    config, args = parser.parse_args_into_dataclasses()
    model, processor = load_model(args.model, "cpu", torch.bfloat16 if config.bf16 else torch.float32)
    model = add_lora(model, layer=peft.tuners.lora.Linear)  # FSDP and ZeRO-3 gather the weights of peft's own layers
    trainer = make_trainer(model, processor, read_examples(args.data, args.images), config)
    trainer.train()
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main()
