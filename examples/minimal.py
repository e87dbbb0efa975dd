"""mDPO (arXiv:2406.11839) in one file, for models like LLaVA: python minimal.py MODEL pairs.json OUT
pairs.json: [{"image": path from the file's folder, "question": ..., "chosen": ..., "rejected": ...}, ...]"""

import json
import math
import random
import sys
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps

BETA, LR, EPOCHS, BATCH, SEED = 0.1, 1e-5, 3, 32, 0
LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # all linear layers of Llama, Mistral and Qwen


def random_crop(image, rng):  # 1-20% of the area, aspect 3/4 to 4/3 if the image allows, resized back
    width, height = image.size
    n_pixels = max(1, rng.uniform(0.01, 0.2) * width * height)
    fits = lambda aspect: min(max(aspect, n_pixels / height**2), width**2 / n_pixels)
    aspect = math.exp(rng.uniform(math.log(fits(3 / 4)), math.log(fits(4 / 3))))
    w, h = (max(1, round(math.sqrt(n))) for n in (n_pixels * aspect, n_pixels / aspect))
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


def make_rows(processor, pair, folder, rng):  # [m_w q y_w], [m_w q y_l], [m_l q y_w]
    image = ImageOps.exif_transpose(Image.open(folder / pair["image"])).convert("RGB")
    bos, eos = processor.tokenizer.bos_token, processor.tokenizer.eos_token
    say = lambda role, text, *image: {"role": role, "content": [*image, {"type": "text", "text": text}]}
    user = say("user", pair["question"].strip(), {"type": "image"})
    chat = lambda text: processor.apply_chat_template([user, say("assistant", text)], tokenize=False)
    whole = lambda answer: chat(answer.strip()).rstrip().removesuffix(eos) + eos
    prompt = chat("\ue000").rpartition("\ue000")[0].rstrip(" ")  # what the template writes before an answer
    texts = [prompt, whole(pair["chosen"]), whole(pair["rejected"])]
    special = {"add_special_tokens": not texts[0].startswith(bos or eos)}  # no second <s>
    prompt, y_w, y_l = processor.tokenizer(texts, **special).input_ids  # an image is one token here
    n_shared = len(commonprefix([prompt, y_w, y_l]))  # tokens may merge where prompt and answer meet
    inputs = processor(images=[image, image, random_crop(image, rng)], text=[texts[1], texts[2], texts[1]],
                       padding=True, padding_side="right", return_tensors="pt", **special)  # fmt: skip
    labels = inputs["input_ids"].clone()  # (3, T), -100 outside the answer
    for row, end, ids in zip(labels, inputs["attention_mask"].sum(1), (y_w, y_l, y_w)):
        row[: end - (len(ids) - n_shared)] = row[end:] = -100
    return inputs, labels


def mdpo_loss(model, inputs, labels):
    logits = lambda: model(**inputs, use_cache=False).logits[:, :-1].float()  # at t, of token t + 1
    log_prob = lambda: -F.cross_entropy(logits().mT, labels[:, 1:], reduction="none").sum(1)  # (3,)
    with torch.no_grad(), model.disable_adapter():
        reference = log_prob()
    r_w, r_l, r_image = BETA * (log_prob() - reference)  # rewards
    return -F.logsigmoid(torch.stack([r_w - r_l, r_w - r_image, r_w])).sum()  # DPO, CoPO, AncPO


def main(name, data, out):
    if Path(out).exists():
        sys.exit(f"{out}: already exists")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(name)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")  # not torchvision
    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device).eval()  # no dropout
    torch.manual_seed(SEED)
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=128, target_modules=LAYERS))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # the adapter is float32: its products are fast in TF32
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # else the frozen vision tower gets a backward pass, too
        for module in model.modules():  # layers recompute in training mode; the dropout inside stays off
            module.training = hasattr(module, "gradient_checkpointing")
    pairs, steps = json.loads(Path(data).read_text("utf-8")), []
    for epoch in range(EPOCHS):
        order = [(epoch, i) for i in range(len(pairs))]
        random.Random(f"{SEED} order {epoch}").shuffle(order)
        steps += [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.98), weight_decay=0.05)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * len(steps)), len(steps))
    for step, batch in enumerate(steps, 1):
        losses = []
        for epoch, i in batch:  # gradient accumulation; a new crop in each epoch
            rows = make_rows(processor, pairs[i], Path(data).parent, random.Random(f"{SEED} {epoch} {i}"))
            losses.append(mdpo_loss(model, *(part.to(device) for part in rows)) / len(batch))
            losses[-1].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        print(f"step {step} of {len(steps)}: loss {sum(losses):.6f}, gradient {norm:.6f}", flush=True)
    model.save_pretrained(out), processor.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
