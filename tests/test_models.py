"""Models: what training makes of them, and how packed rows are checked before they are trained on."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import data
import mdpo
import train
from data import BadInput, Pairs, make_batch, read_examples
from examples import families
from examples.answer import generate_answers
from mdpo import LogPs, mdpo_loss, mdpo_step, pack, response_logps
from test_mdpo import (
    ANCHOR,
    CONDITIONAL,
    CONVERSATION,
    DPO,
    HUB_LLAVA_TEMPLATE,
    LAYOUTS,
    PAIRS,
    POLICY,
    REF,
    ROOT,
    TWO_IMAGES,
    asked,
    authors,
    command,
    full_text,
    laid_out,
    log_of,
    noise,
    pair,
    prefix_length,
    sequence_logp,
    softplus,
    with_lora,
    write,
)
from tests.helpers import CHAT, DPO_NAMES, SIZES, TURNS, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_each_image_of_a_step_is_encoded_once(bunny, small, tmp_path, monkeypatch):
    """Vision towers are a third of a step: policy and reference share an encoding, of the same two images an example."""
    tower = transformers.models.siglip.modeling_siglip.SiglipVisionModel
    forward, sizes = tower.forward, []
    count = lambda self, pixel_values, **options: (
        sizes.append(len(pixel_values)) or forward(self, pixel_values, **options)
    )
    monkeypatch.setattr(tower, "forward", count)
    assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1)) == 0
    assert sizes[-4:] == [
        4,
        4,
        4,
        2,
    ]  # micro-batches of 2, 2, 2 and 1 examples; before them, the check of the rows


def test_an_anchor_named_twice_counts_once():
    """`--anchors chosen chosen` is no request for twice the weight."""
    losses, _ = mdpo_loss(POLICY, REF, beta=0.5, anchors=["chosen", "chosen"])
    assert losses.item() == pytest.approx(DPO + CONDITIONAL + ANCHOR, abs=1e-6)


def test_a_tie_is_not_accurate():
    """Before training every margin is 0: counted as accurate, a run would begin at 100%."""
    _, metrics = mdpo_loss(REF, REF)
    assert metrics["rewards/accuracies"].item() == metrics["rewards/image_accuracies"].item() == 0


@pytest.mark.parametrize("policy_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "ref_dtype, step", [(torch.float16, 2**-9), (torch.bfloat16, 2**-6), (torch.float32, 2**-13)]
)
def test_half_precision_is_raised_to_float32(policy_dtype, ref_dtype, step):
    """Steps are 4 nats wide at -1000 in bf16: subtracted there, -1000 + 3 + 1/64 is -996. `step` is one that `ref_dtype`
    resolves at 3, so that a type with fewer bits loses it. Rewards, beta 1: -997 + step, -1001 and -997; the anchor's
    term is minus the first."""
    numbers = lambda values, dtype: LogPs(*(torch.tensor([value], dtype=dtype) for value in values))
    policy, ref = numbers((-1000, -1004, -1000), policy_dtype), numbers((-3 - step, -3, -3), ref_dtype)
    losses, metrics = mdpo_loss(policy, ref, beta=1.0)
    assert losses.dtype == torch.float32
    assert metrics["rewards/chosen"].item() == -997 + step and metrics["rewards/margins"].item() == 4 + step
    assert losses.item() == pytest.approx(softplus(-4 - step) + softplus(-step) + 997 - step, abs=1e-4)


def test_float64_stays_float64():
    """Rounded to float32, the loss could not be checked to the last bit."""
    as_double = lambda logps: LogPs(*(p.double() for p in logps))
    losses, _ = mdpo_loss(as_double(POLICY), as_double(REF), beta=0.5)
    assert losses.item() == pytest.approx(DPO + CONDITIONAL + ANCHOR, abs=1e-15)


def test_mdpo_needs_torch_alone():
    """Who lifts the loss into another trainer has other packages, or other releases of them."""
    script = """
import sys
sys.modules.update(dict.fromkeys(("transformers", "peft", "PIL", "tqdm", "numpy")))  # None: importing it raises
import torch
from mdpo import mdpo_loss
print(mdpo_loss([torch.zeros(1)] * 3, [torch.zeros(1)] * 3)[0].item())
"""
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert float(child.stdout) == pytest.approx(3 * math.log(2)), child.stderr


def test_tokens_are_those_of_the_librarys_own_call(loaded):
    """Each row, and with its prefix each packed one, is what the processor gives for the whole text."""
    _, processor = loaded
    batch = make_batch(PAIRS, processor)
    rows, masks = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    taken = pack(make_batch(PAIRS, processor, share=True))
    blocks = rows.flatten()[taken.take].split([n for n, *_ in taken.blocks])
    for name, answer, image in (("chosen", 1, 3), ("rejected", 2, 3), ("image_rejected", 1, 4)):
        for i, one in enumerate(PAIRS):
            text = "".join(full_text(processor, one.question, one[answer]))
            ids = processor(text=[text], images=[*one[image]])["input_ids"][0]
            row = batch.names.index(name) * len(PAIRS) + i
            assert rows[row].tolist()[: len(ids)] == ids
            assert masks[row].tolist() == [1] * len(ids) + [0] * (rows.shape[1] - len(ids))
            _, owner, n_prefix = taken.blocks[row]
            packed_ids = blocks[row].tolist()
            assert (packed_ids if owner == row else blocks[owner].tolist()[:n_prefix] + packed_ids) == ids


@pytest.fixture(scope="session")
def in_float64(loaded):
    """A copy of the model of `loaded` in float64: `response_in_float64` asks it."""
    return copy.deepcopy(loaded[0]).double().eval()


@torch.no_grad()
def response_in_float64(model, processor, prompt, response, images, other_response, room=10**6):
    """log p(response | images, prompt), of one sequence by itself, so without any mask, padding or packing.

    Tokenised whole; the response begins where prompt, prompt + response and prompt + other_response begin to differ, and
    ends with its first end-of-sequence. At most `room` tokens of it count. An image takes 16 tokens, in both models.
    """
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    ids, *others = (tokenizer(prompt + more).input_ids for more in (response, "", other_response))
    start = len(os.path.commonprefix([ids, *others]))  # of lists, too
    end = ids.index(tokenizer.eos_token_id, start) + 1
    ids = [ids[:start], ids[start : min(end, start + room)]]
    prefix = [token for id in ids[0] for token in [id] * (16 if id == image_id else 1)]
    inputs = {"input_ids": torch.tensor([prefix + ids[1]])}
    if images:
        inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")[
            "pixel_values"
        ].double()
    logits = model(**inputs).logits[0, len(prefix) - 1 : -1]
    return sum((row[token] - row.logsumexp(0)).item() for row, token in zip(logits, ids[1]))


ODD_TEXTS = {  # (question, chosen, rejected)
    "emoji": ("What is 🦄 doing?", "It is 🏃‍♀️ running, naïvely.", "Это 東京 🗼."),
    "looks like the template": (
        " USER: Hi ASSISTANT: yes USER: no",
        "No. USER: and now? ASSISTANT: Yes.",
        "ASSISTANT:",
    ),
    "newlines at either end": ("\n\nWhat is it?\n", "\nA red circle.\n\n", "\n\n"),
    "end of sequence inside": ("What is it?", "A red circle.EOS It is red.", "A blue square.EOS"),
    "one character": ("?", "a", "b"),
    "one begins as the other": ("What is it?", "A red", "A red circle"),
    "private use": ("What is \ue000 in \ue000 it?", "A \ue000 circle.", "\ue000"),
    "spaces": ("What  is   it?", "  A  red    circle. ", " A  red    square. "),
}


@LAYOUTS
@pytest.mark.parametrize("texts", ODD_TEXTS)
def test_odd_texts_are_scored_exactly(loaded, in_float64, texts, layout):
    """A boundary that is guessed instead of found, a stand-in that the text holds, or a second BOS: each of them scores other
    tokens than the model will produce, in silence."""
    model, processor = loaded
    question, *answers = (text.replace("EOS", processor.tokenizer.eos_token) for text in ODD_TEXTS[texts])
    (prompt, y_w), (_, y_l) = (full_text(processor, question, answer) for answer in answers)
    pairs = [PAIRS[1], pair(question, *answers, noise(1), noise(2))]
    logps = response_logps(model, laid_out(pairs, processor, layout))
    oracle = lambda response, other, image: response_in_float64(
        in_float64, processor, prompt, response, [image], other
    )
    expected = [oracle(y_w, y_l, noise(1)), oracle(y_l, y_w, noise(1)), oracle(y_w, y_l, noise(2))]
    assert [p[1].item() for p in logps] == pytest.approx(expected, rel=2e-6, abs=1e-4)


@LAYOUTS
def test_several_images_cut_responses_and_no_image_are_scored_exactly(loaded, in_float64, layout):
    """Examples of other kinds in one batch: two images, a response that is cut, and a text without an image, first."""
    model, processor = loaded
    prompt, y_w = full_text(processor, "Which?", "There is a red circle.")
    _, y_l = full_text(processor, "Which?", "No.")
    token = processor.image_token + "\n"
    two = [noise(1), noise(3, (20, 50))], [noise(2), noise(4, (20, 50))]
    pairs = [
        pair("Which?", "There is a red circle.", "No.", *images) for images in ((), two, (noise(1), noise(2)))
    ]
    n_tokens = lambda images: (
        len(processor.tokenizer(prompt.replace(token, token * images)).input_ids) + 15 * images
    )
    max_length = n_tokens(images=2) + 3
    logps = response_logps(model, laid_out(pairs, processor, layout, max_length=max_length))
    for i, one in enumerate(pairs):
        images, images_rejected = one.images, one.images_rejected
        text, left = prompt.replace(token, token * len(images)), max_length - n_tokens(len(images))
        oracle = lambda y, other, shown: response_in_float64(
            in_float64, processor, text, y, shown, other, left
        )
        expected = [oracle(y_w, y_l, images), oracle(y_l, y_w, images), oracle(y_w, y_l, images_rejected)]
        assert [p[i].item() for p in logps] == pytest.approx(expected, rel=2e-6, abs=1e-4)


@pytest.mark.parametrize("template_has_bos", [False, True])
def test_a_sequence_has_one_bos(llava, template_has_bos):
    """Llama's tokenizer adds <s>, and some templates write it as well: twice, or not at all, is not what the model knows."""
    _, processor = train.load_model(str(llava))
    if template_has_bos:
        processor.chat_template = "{{ bos_token }}" + HUB_LLAVA_TEMPLATE
    for one in (PAIRS[0], pair(*PAIRS[0][:3])):
        ids = make_batch([one], processor, names=DPO_NAMES).inputs["input_ids"][0].tolist()
        assert ids[0] == processor.tokenizer.bos_token_id == 1 and ids.count(1) == 1


def test_logits_are_raised_to_float32(bunny):
    """A log-softmax in bf16 is off by hundredths of a nat a token. Held to a float64 one of the very same bf16 logits."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    logits = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output.double()))
    logps = response_logps(model, pack(make_batch(PAIRS[:1], processor)))
    tokenizer = processor.tokenizer
    y_w, y_l = (tokenizer(full_text(processor, "", answer)[1]).input_ids for answer in PAIRS[0][1:3])
    by_token = logits[0][0].log_softmax(-1).gather(1, torch.tensor(y_w + y_l + y_w)[:, None])[:, 0]
    expected = [part.sum().item() for part in by_token.split([len(y_w), len(y_l), len(y_w)])]
    assert [p.item() for p in logps] == pytest.approx(expected, abs=1e-4)


def test_packed_gradients_equal_plain(loaded):
    """Packing is a matter of speed: one training step must not depend on it."""
    model, processor = loaded
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight.requires_grad_()
    gradients = []
    for layout in ("packed", "plain"):
        logps = response_logps(model, laid_out(PAIRS, processor, layout))
        mdpo_loss(logps, LogPs(*(p.detach() - 1 for p in logps)))[0].mean().backward()
        gradients.append(weight.grad)
        weight.grad = None
    weight.requires_grad_(False)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@LAYOUTS
def test_padding_and_neighbours_do_not_change_an_example(loaded, layout):
    """If they did, the loss of an example would depend on which others share its batch."""
    model, processor = loaded
    together = response_logps(model, laid_out(PAIRS, processor, layout))
    for i, one in enumerate(PAIRS):
        alone = response_logps(model, laid_out([one], processor, layout))
        assert [p[i].item() for p in together] == pytest.approx([p.item() for p in alone], abs=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_attention_of_a_packed_row_is_attention_under_its_mask(kv_heads):
    """Values and gradients against one dense mask, written out entry by entry. Rows 0 and 1 have prefixes of
    3 and 1 tokens and responses of 2; rows 2 and 3 are responses of 3 tokens and 1 to the prefix of row 0,
    row 4 is one of 4 to that of row 1. No response sees another."""
    blocks = [(5, 0, 3), (3, 1, 1), (3, 0, 3), (1, 0, 3), (4, 1, 1)]  # (tokens, whose prefix, its length)
    tokens = [(row, i) for row, (n, *_) in enumerate(blocks) for i in range(n)]  # (row, place in it) of each

    def sees(q, k):
        (row, _), (other, place) = tokens[q], tokens[k]
        _, owner, prefix = blocks[row]
        return k <= q and other == row or other == owner and place < prefix and other != row

    n = len(tokens)
    dense = torch.tensor([[sees(q, k) for k in range(n)] for q in range(n)])
    torch.manual_seed(0)
    query, *key_value = (torch.randn(1, heads, n, 8, requires_grad=True) for heads in (2, kv_heads, kv_heads))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2 // kv_heads)
    masked = mdpo.attention_blocks(blocks)
    ours, _ = mdpo.packed_attention(module, query, *key_value, None, masked, scaling=0.3)
    repeated = [tensor.repeat_interleave(2 // kv_heads, dim=1) for tensor in key_value]
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=dense, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), [query, *key_value]) for y in (ours, expected)]
    for ours, expected in zip(*gradients):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_packed_attention_is_sdpa_for_all_else(bunny, tmp_path):
    """Plain rows, generation and a saved model must not know that it was ever replaced."""
    model, processor = train.load_model(str(bunny))
    texts = [
        "There is a red circle.",
        "There",
    ]  # the second is padded: without a mask it would see the padding
    inputs = processor(text=texts, return_tensors="pt", padding=True, padding_side="left")
    batch, results = make_batch(PAIRS, processor), []
    for implementation in "packed", "sdpa":
        if implementation == "packed":
            mdpo.use_packed_attention(model)
        else:
            model.set_attn_implementation("sdpa")
        assert model.config.text_config._attn_implementation == implementation
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
        results.append((response_logps(model, batch), model(**inputs).logits[:, -1], generated))
    (logps, logits, generated), expected = results
    assert all(map(torch.equal, logps, expected[0])) and torch.equal(logits, expected[1])
    assert generated == expected[2]
    mdpo.use_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_rows_set_the_attention_they_need(bunny, implementation):
    """Any other would let every token see all before it, of other sequences and images: wrong by nats, and silent."""
    model, processor = train.load_model(str(bunny))
    model.set_attn_implementation(implementation)
    plain = response_logps(model, make_batch(PAIRS, processor))
    packed = response_logps(model, pack(make_batch(PAIRS, processor)))
    assert model.config.text_config._attn_implementation == "packed"
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, packed))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_that_was_switched_off_after_packing_is_nan(bunny, implementation):
    """A user, or a library, that sets it back would train on tokens that see other rows: wrong, and
    silent."""
    model, processor = train.load_model(str(bunny))
    batch = make_batch(PAIRS, processor)
    packed = response_logps(model, pack(batch))
    model.set_attn_implementation(implementation)
    assert not any(logp.isfinite().any() for logp in response_logps(model, pack(batch)))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(response_logps(model, batch), packed))


def test_dpo_computes_no_row_of_the_rejected_image(loaded):
    """conditional=False, anchors=() must cost one image and one prefix an example, not two."""
    model, processor = loaded
    batch = laid_out(PAIRS, processor, names=DPO_NAMES)
    assert len(batch.inputs["pixel_values"]) == len(PAIRS)
    n_chosen, n_rejected = batch.inputs["attention_mask"][:3].sum(), (batch.labels[3:] >= 0).sum()
    assert len(batch.take) == n_chosen + n_rejected
    full = response_logps(model, pack(make_batch(PAIRS, processor)))
    part = response_logps(model, batch)
    assert part.image_rejected is None
    torch.testing.assert_close(part.rejected, full.rejected)


def test_no_image_leaves_the_placeholder_out(loaded):
    """DPO (No Image) of Fig. 1: the text alone, with no stray image token in it."""
    model, processor = loaded
    batch = make_batch([pair(*one[:3]) for one in PAIRS], processor, names=DPO_NAMES)
    inputs = batch.inputs
    assert "pixel_values" not in inputs and not (inputs["input_ids"] == processor.image_token_id).any()
    prompt, response = full_text(processor, *PAIRS[0][:2])
    whole = processor.tokenizer(
        prompt.replace(processor.image_token + "\n", "") + response, return_tensors="pt"
    )
    with torch.no_grad():
        logps = model(**whole).logits.log_softmax(-1)[0, :-1].gather(1, whole["input_ids"][0, 1:, None])
    n_response = (batch.labels[0] >= 0).sum()
    chosen = response_logps(model, batch).chosen[0].item()
    assert chosen == pytest.approx(logps[-n_response:].sum().item(), rel=1e-5)


def sequences_of(batch, processor):
    """The rows of a batch, each as (ids of its prefix, ids of its response), an image's tokens as one."""
    image_id, sequences = processor.image_token_id, []
    for row, ids in enumerate(batch.inputs["input_ids"].tolist()):
        start, n = prefix_length(batch, row), int(batch.inputs["attention_mask"][row].sum())
        prefix, response = ids[:start], ids[start:n]
        first = prefix.index(image_id) if image_id in prefix else 0
        prefix = [id for i, id in enumerate(prefix) if id != image_id or i % 16 == first % 16]
        assert batch.labels[row, start:n].tolist() == response and (batch.labels[row, n:] == -100).all()
        sequences.append((prefix, response))
    return sequences


def with_template(folder, template):
    """The processor, with a chat template of ours in which IMAGE stands for its image token."""
    _, processor = train.load_model(str(folder))
    processor.chat_template = template.replace("IMAGE", processor.image_token)
    return processor


@pytest.mark.parametrize("answers", [("ers", "x"), ("x", "ers")])
@pytest.mark.parametrize("image_is_last", [False, True])
@pytest.mark.parametrize("with_image", [False, True])
def test_boundary_where_tokens_merge_across_it(bunny, with_image, image_is_last, answers):
    """prompt 'answ' + response 'ers' is one token of the whole: tokenised apart, the model would be scored on
    text that it never produces. The boundary moves back to the last token that all three texts share; never
    past an image."""
    parts = "{% for p in m.content %}{{ p.text }}{% if p.type == 'image' %}IMAGE{% endif %}{% endfor %}"
    processor = with_template(bunny, "{% for m in messages %}" + parts + "{% endfor %}")
    tokenizer = processor.tokenizer
    ids = lambda text: tokenizer(text).input_ids
    assert ids(" answ")[-1] != ids(" answers")[-1]  # else this shows nothing
    image, token = (noise(1), processor.image_token) if with_image else (None, "")
    content = [{"type": "text", "text": "a red answ"}]
    content = [*content, {"type": "image"}] if image_is_last else [{"type": "image"}, *content]
    one = pair([{"role": "user", "content": content}], *answers, image, image)
    prompt = "a red answ" + token if image_is_last else token + "a red answ"
    wholes = [[*ids(prompt + answer), tokenizer.eos_token_id] for answer in answers]
    shared = len(os.path.commonprefix([ids(prompt), *wholes]))
    assert (shared < len(ids(prompt))) != (
        image_is_last and with_image
    )  # merged, unless the image stands between
    prefix, responses = wholes[0][:shared], [whole[shared:] for whole in wholes]
    expected = [(prefix, responses[0]), (prefix, responses[1]), (prefix, responses[0])]
    assert sequences_of(make_batch([one], processor), processor) == expected


def test_a_template_without_generation_prompt_still_ends_the_prompt_before_the_answer(bunny):
    """What opens the assistant's turn belongs to the prompt: scored as part of both answers, it would be trained on."""
    template = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    processor = with_template(bunny, template)
    batch = make_batch([pair("Which?", "No.", "Yes.")], processor, names=DPO_NAMES)
    eos, decode = processor.tokenizer.eos_token, processor.tokenizer.decode
    for (prefix, response), answer in zip(sequences_of(batch, processor), ("No.", "Yes."), strict=True):
        assert decode(prefix) == f"user: Which?{eos}assistant:" and decode(response) == f" {answer}{eos}"


def test_what_a_template_appends_after_the_end_is_dropped(bunny):
    """A newline after <|im_end|> is never generated; scoring it would reward a token nobody produces."""
    processor = with_template(
        bunny,
        "{% for m in messages %}[{{ m.role }}]\n{% for p in m.content %}{{ p.text }}{% endfor %}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}",
    )
    eos, decode = processor.tokenizer.eos_token, processor.tokenizer.decode
    batch = make_batch([pair("Which?", "No.", f"Yes.{eos} Or no.")], processor, names=DPO_NAMES)
    for (prefix, response), answer in zip(sequences_of(batch, processor), ("No.", "Yes."), strict=True):
        assert decode(prefix) == f"[user]\nWhich?{eos}\n[assistant]\n" and decode(response) == answer + eos


# An answer without a think block gets an empty one, and reasoning of earlier turns is dropped, as Qwen3 does.
THINKING = """
{%- for m in messages -%}
    [{{ m.role }}]
    {%- set ns = namespace(text='') -%}
    {%- for p in m.content -%}
        {%- if p.type == 'image' -%} {{- 'IMAGE' -}}
        {%- else -%} {%- set ns.text = ns.text + p.text -%}
        {%- endif -%}
    {%- endfor -%}
    {%- if m.role == 'assistant' -%}
        {%- set parts = ns.text.split('</think>') -%}
        {%- if loop.last -%}
            {{- '<think>' + (parts[0].split('<think>')[1] if parts | length > 1 else '') + '</think>' -}}
        {%- endif -%}
        {{- parts[-1].strip() -}}
    {%- else -%} {{- ns.text -}} {%- endif -%}
    {{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '[assistant]' -}} {%- endif -%}
"""


@pytest.mark.parametrize("with_image", [False, True])
def test_a_template_that_writes_a_think_block_writes_one(bunny, with_image):
    """A plain answer gets the template's own empty block, an answer that brings its block keeps that one: two
    blocks, or none, are texts that the model never writes."""
    processor = with_template(bunny, THINKING)
    eos, decode = processor.tokenizer.eos_token, processor.tokenizer.decode
    images = (noise(1), noise(2)) if with_image else ()
    shown = processor.image_token * with_image
    thought = "<think>A ring?</think>No."
    for answers in (thought, "Yes."), ("Yes.", thought), ("Yes.", "No."):
        batch = make_batch([pair("Which?", *answers, *images)], processor, names=DPO_NAMES)
        for (prefix, response), answer in zip(sequences_of(batch, processor), answers, strict=True):
            block = "" if answer.startswith("<think>") else "<think></think>"
            assert decode(prefix + response) == f"[user]{shown}Which?{eos}[assistant]{block}{answer}{eos}"
            assert decode(prefix).startswith(f"[user]{shown}Which?{eos}[assistant]")
            assert answer.removeprefix("<think>") in decode(response)  # of its own block all but the start
    assert "think" in decode(prefix) and "think" not in decode(response)  # of two plain answers: the prompt's


def test_a_think_block_of_an_earlier_turn_is_as_the_template_writes_it(bunny):
    """It drops reasoning once the conversation has gone on: the prompt is what the model will be given."""
    processor = with_template(bunny, THINKING)
    eos, text = processor.tokenizer.eos_token, "<think>A ring?</think>Yes."
    roles = [("user", "Is it?"), ("assistant", text), ("user", "And it?")]
    question = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in roles]
    batch = make_batch([pair(question, "No.", "Yes.")], processor, DPO_NAMES)
    prefix, response = sequences_of(batch, processor)[0]
    whole = f"[user]Is it?{eos}[assistant]Yes.{eos}[user]And it?{eos}[assistant]<think></think>No.{eos}"
    assert processor.tokenizer.decode(prefix + response) == whole


SYSTEM_AND_QUESTION = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
]


@pytest.mark.parametrize("condition", ["loop.last", "messages | length < 3"], ids=["moved", "dropped"])
def test_a_system_text_that_is_gone_once_an_answer_follows_is_refused(bunny, condition):
    """Pixtral writes it in front of the last message, if that is the user's: with an answer behind it, it is
    gone, and the model would be trained on a prompt without its system text. The other records are good."""
    template = (
        "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' and messages[0].role == 'system' and CONDITION %}"
        "{{ messages[0].content[0].text + ' ' }}{% endif %}[{{ m.role }}]"
        "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    processor = with_template(bunny, template.replace("CONDITION", condition))
    question = SYSTEM_AND_QUESTION
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    image, eos = processor.image_token, processor.tokenizer.eos_token
    assert prompt == f"Be brief. [user]{image}Which?{eos}[assistant]"
    one = pair(question, "No.", "Yes.", noise(1), noise(2))
    with pytest.raises(BadInput, match="writes the question in another way when a response follows"):
        make_batch([one], processor)
    prefix, _ = sequences_of(make_batch([one._replace(question=question[1:])], processor), processor)[0]
    assert processor.tokenizer.decode(prefix) == f"[user]{image}Which?{eos}[assistant]"


PRINTS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
PRINTS += "{% if add_generation_prompt %}[assistant]{% endif %}"
TEXT_OR_PARTS = (  # text is taken as text, parts are walked over, but those of an assistant are printed
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.content is string or m.role == 'assistant' %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


JOINS = PRINTS.replace("{{ m.content }}", "{{ m.content + '' }}")  # a list and a text: an error


@pytest.mark.parametrize("template", [PRINTS, TEXT_OR_PARTS, JOINS])
def test_a_template_that_takes_messages_as_text_is_given_text(bunny, template):
    """ "[{'type': 'text', 'text': ..." in the prompt is what nobody asked. A message without an image can be
    written as text; where there is an image that the template would print, it is refused."""
    processor = with_template(bunny, template)
    eos, decode = processor.tokenizer.eos_token, processor.tokenizer.decode
    batch = make_batch([pair("Which?", "No.", "Yes.")], processor, DPO_NAMES)
    prefix, response = sequences_of(batch, processor)[0]
    assert decode(prefix) == f"[user]Which?{eos}[assistant]" and decode(response) == f"No.{eos}"
    shown = pair("Which?", "No.", "Yes.", noise(1), noise(2))
    if template == TEXT_OR_PARTS:
        prefix, response = sequences_of(make_batch([shown], processor), processor)[2]
        image = processor.image_token
        assert decode(prefix) == f"[user]{image}Which?{eos}[assistant]" and decode(response) == f"No.{eos}"
    else:
        with pytest.raises(BadInput, match="the chat template does not take these messages"):
            make_batch([shown], processor)


def test_a_question_about_a_printed_part_is_a_question(bunny):
    """A text that looks like what such a template prints is no sign of one."""
    processor = with_template(bunny, CHAT.replace("END", "{{ eos_token }}"))
    one = pair("What is {'type': 'text', 'text': 'x'}?", "A {'type': 'text'}.", "Yes.", noise(1), noise(2))
    prefix, response = sequences_of(make_batch([one], processor), processor)[0]
    whole = processor.tokenizer.decode(prefix + response)
    assert f"{one.question}{processor.tokenizer.eos_token}[assistant]{one.chosen}" in whole


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_an_end_of_turn_that_is_not_the_end_of_sequence_is_scored_once(llava, generation_prompt):
    """Gemma ends a turn by <end_of_turn>, and its tokenizer's end-of-sequence is <eos>: the first is what the
    model writes and what stops it. Without it in the response it would not learn to end; <eos> behind it, a
    token that it never reaches, would be trained as well."""
    template = CHAT.replace("END", "<end>\n")
    if not generation_prompt:
        template = template.partition("{% if add_generation_prompt")[0]
    processor = with_template(llava, template)
    decode, eos = processor.tokenizer.decode, processor.tokenizer.eos_token
    for images in (), (noise(1), noise(2)):
        names = data.SCORED if images else DPO_NAMES
        batch = make_batch([pair("Which?", "No.", "Yes.", *images)], processor, names)
        for (prefix, response), answer in zip(sequences_of(batch, processor), ("No.", "Yes.", "No.")):
            assert decode(response) == answer + "<end>"
            assert decode(prefix).endswith("Which?<end>\n[assistant]")
            assert eos not in decode(prefix + response)


def test_an_end_of_sequence_inside_a_response_ends_it_and_the_turn(bunny):
    """Behind it the model stops: what follows, the template's own end of turn as well, would never be
    written."""
    processor = with_template(bunny, CHAT.replace("END", "<end>\n"))
    eos, decode = processor.tokenizer.eos_token, processor.tokenizer.decode
    batch = make_batch([pair("Which?", f"No.{eos} Or yes.", "Yes.")], processor, DPO_NAMES)
    assert [decode(response) for _, response in sequences_of(batch, processor)] == [f"No.{eos}", "Yes.<end>"]


def test_a_template_that_trims_answers_is_followed(bunny):
    """The response is what the template makes of it, in both rows."""
    template = CHAT.replace("END", "{{ eos_token }}").replace("p.text", "p.text | trim")
    processor = with_template(bunny, template)
    eos, decode = processor.tokenizer.eos_token, processor.tokenizer.decode
    batch = make_batch([pair("Which?", " No.\n", "\nYes. ")], processor, DPO_NAMES)
    assert [decode(response) for _, response in sequences_of(batch, processor)] == [f"No.{eos}", f"Yes.{eos}"]


def test_a_template_that_changes_the_text_before_the_image_is_refused(bunny):
    """Its prompt is not how the whole begins: image and answer would stand in a text that the model never sees."""
    shown = "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}"
    name = "{% if messages | length > 1 %}Human{% else %}User{% endif %}"
    template = name + "{% for m in messages %}{% for p in m.content %}" + shown + "{% endfor %}{% endfor %}"
    model, _ = train.load_model(str(bunny))
    with pytest.raises(BadInput, match="cannot be trained: the chat template writes the question in another"):
        train.choose_layout(model, with_template(bunny, template), PAIRS[:2])


class Typed:
    """A processor that also says of which type each token is: 7 for all that it returns, 9 in padding."""

    def __init__(self, processor, shape=()):
        self.processor, self.shape = processor, shape

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, **options):
        encoded = self.processor(**options)
        types = encoded["attention_mask"] * -2 + 9
        encoded["types"] = types.reshape(*types.shape, *self.shape)
        return encoded


@LAYOUTS
def test_token_types_go_on_as_text_in_the_responses(bunny, layout):
    """Gemma 3 and others are told of each token whether it is the image's. Types that are shifted, or lost,
    let text see what only an image may. The boundary cuts them as it cuts the tokens, also where tokens merge
    across it."""
    parts = "{% for p in m.content %}{{ p.text }}{% if p.type == 'image' %}IMAGE{% endif %}{% endfor %}"
    processor = with_template(bunny, "{% for m in messages %}" + parts + "{% endfor %}")
    texts = (("a red answ", "ers", "x"), ("Which of them?", "No.", "A red circle."))
    pairs = [pair(*text, noise(i), noise(i + 2)) for i, text in enumerate(texts)]
    batch, without = make_batch(pairs, Typed(processor)), make_batch(pairs, processor)
    assert {*batch.inputs} == {*without.inputs, "types"}
    assert torch.equal(batch.inputs["input_ids"], without.inputs["input_ids"])
    expected = [[7] * prefix_length(batch, row) for row in range(6)]  # and 0 behind it, in padding as well
    types = batch.inputs["types"].tolist()
    assert types == [row + [0] * (batch.labels.shape[1] - len(row)) for row in expected]
    if layout == "packed":
        batch, expected = laid_out(pairs, Typed(processor)), []
        for row, (n, owner, n_prefix) in enumerate(batch.blocks):
            expected += [7] * n_prefix + [0] * (n - n_prefix) if owner == row else [0] * n
        types = [expected]
    model, _ = train.load_model(str(bunny))
    assert mdpo.forward_inputs(model, batch)["types"].tolist() == types
    with pytest.raises(BadInput, match="returns types, which a response cannot extend"):
        make_batch(pairs, Typed(processor, (1,)))


def test_a_batch_is_what_its_docstring_says(llava):
    """The whole batch of two pairs by hand: what whoever writes a loss of his own builds on."""
    _, processor = train.load_model(str(llava))
    ids = lambda text: processor.tokenizer(text).input_ids
    keyed = [one._replace(key=(2, i), id=str(i)) for i, one in enumerate(PAIRS[:2])]
    batch, rows, labels = make_batch(keyed, processor, share=True), [], []
    plain = make_batch(keyed, processor)
    for answer in ("chosen", "rejected", "chosen"):
        for one in PAIRS[:2]:
            prompt, response = full_text(processor, one.question, getattr(one, answer))
            n_image = [16 if id == processor.image_token_id else 1 for id in ids(prompt)]
            prefix = [id for id, n in zip(ids(prompt), n_image) for _ in range(n)]
            response = ids(prompt + response)[len(n_image) :]
            rows.append(prefix + response)
            labels.append([-100] * len(prefix) + response)
    longest = max(map(len, rows))

    def filled(lists, value):
        return [values + [value] * (longest - len(values)) for values in lists]

    for made in batch, plain:
        assert made.inputs["input_ids"].tolist() == filled(rows, processor.tokenizer.pad_token_id)
        assert made.inputs["attention_mask"].tolist() == filled([[1] * len(row) for row in rows], 0)
        assert made.labels.tolist() == filled(labels, -100)
    assert batch.names == ("chosen", "rejected", "image_rejected") and batch.owner == [0, 1, 0, 1, 4, 5]
    assert batch.keys == [(2, 0), (2, 1)] and batch.ids == ["0", "1"] and batch.take is None
    m_w = [image for one in PAIRS[:2] for image in one.images]
    m_l = [image for one in PAIRS[:2] for image in one.images_rejected]
    assert torch.equal(batch.inputs["pixel_values"], pixels_of(processor, *m_w, *m_l))
    assert torch.equal(plain.inputs["pixel_values"], pixels_of(processor, *m_w, *m_w, *m_l))
    assert plain.owner == [*range(6)]


def test_packing_takes_each_prefix_once_and_each_token_of_a_response(loaded):
    """Of several pairs of all lengths, in order: what is taken, and which token predicts which."""
    _, processor = loaded
    batch = laid_out(PAIRS, processor)
    T = batch.labels.shape[1]
    assert batch.take.tolist() == sorted(set(batch.take.tolist()))
    rows = {row: [at % T for at in batch.take.tolist() if at // T == row] for row in range(9)}
    for row, (n, owner, n_prefix) in enumerate(batch.blocks):
        n_row = int(batch.inputs["attention_mask"][row].sum())
        begin = n_prefix if 3 <= row < 6 else 0
        assert rows[row] == [*range(begin, n_row)] and n == n_row - begin
        assert owner == (row - 3 if 3 <= row < 6 else row) and n_prefix == prefix_length(batch, row)
    assert batch.answers.tolist() == (batch.labels.flatten() >= 0).nonzero()[:, 0].tolist()
    ids, labels = batch.inputs["input_ids"].flatten(), batch.labels
    for at, predictor in zip(batch.answers.tolist(), batch.predictors[0].tolist(), strict=True):
        assert ids[batch.take[predictor]] == ids[at - 1]  # the token before it, here or in the shared prefix
        row, column = divmod(batch.take[predictor].item(), T)
        assert column == at % T - 1 and row in (at // T, batch.blocks[at // T][1])
        assert labels.flatten()[at] == ids[at]


def test_plain_rows_are_padded_on_the_right_and_padding_counts_for_nothing(llava):
    """A row's positions count from its first token; padding that counted would change some sum."""
    model, processor = train.load_model(str(llava))
    batch = make_batch(PAIRS, processor)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    pad = processor.tokenizer.pad_token_id
    assert len(ids) == 9 and pad != 0 and len({*mask.sum(1).tolist()}) > 1
    assert torch.equal(mask, mask.sort(1, descending=True).values)
    assert torch.equal(ids == pad, mask == 0) and (batch.labels[mask == 0] == -100).all()
    expected = response_logps(model, batch)
    batch.inputs["input_ids"][mask == 0] = 5
    assert all(map(torch.equal, response_logps(model, batch), expected))


def test_each_image_is_processed_once_a_pair(loaded, monkeypatch):
    """Resizing is what DataLoader workers spend their time on: m_w serves y_w and y_l."""
    _, processor = loaded
    image_processor, seen = type(processor.image_processor), []
    call = image_processor.__call__

    def note(self, images, *args, **options):
        nested = images if isinstance(images, (list, tuple)) else [images]
        flat = [image for part in nested for image in (part if isinstance(part, (list, tuple)) else [part])]
        seen.extend(image.tobytes() for image in flat)
        return call(self, images, *args, **options)

    monkeypatch.setattr(image_processor, "__call__", note)
    laid_out(PAIRS, processor)
    images = [image.tobytes() for one in PAIRS for image in (*one.images, *one.images_rejected)]
    assert sorted(seen) == sorted(images) and len({*images}) == 6


@LAYOUTS
def test_length_normalisation_is_a_division_by_the_labels(loaded, layout):
    """A loss of one's own over means needs the lengths, in either layout: they are the labels' alone."""
    model, processor = loaded
    batch = laid_out(PAIRS, processor, layout)
    lengths = (batch.labels >= 0).sum(1).view(len(batch.names), -1)  # (3, B), by name
    logps = torch.stack(response_logps(model, batch)) / lengths
    for i, one in enumerate(PAIRS):
        cases = zip(("chosen", "rejected", "chosen"), (one.images, one.images, one.images_rejected))
        for name, (answer, (image,)) in enumerate(cases):
            prompt, response = full_text(processor, one.question, getattr(one, answer))
            whole, start = (len(processor.tokenizer(text).input_ids) for text in (prompt + response, prompt))
            n = whole - start
            expected = sequence_logp(model, processor, prompt, response, image) / n
            assert logps[name, i].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


@LAYOUTS
def test_all_inputs_of_the_model_are_on_its_device(bunny, layout):
    """One that stays behind stops the first step on a GPU."""
    model, processor = train.load_model(str(bunny))
    batch = laid_out(PAIRS[:1], processor, layout)
    inputs = mdpo.forward_inputs(model.to("meta"), batch)
    inputs |= {"features": inputs.pop("mm_encoder_outputs")["image"].pooler_output[0]}
    inputs |= {"mask of y_l": inputs.pop("blocks")[1][3]} if layout == "packed" else {}
    assert {value.device.type for value in inputs.values() if torch.is_tensor(value)} == {"meta"}
    assert batch.labels.device.type == "cpu" and len(inputs) == {"packed": 7, "plain": 4}[layout]


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_a_response_is_cut_alike_for_all_images_of_its_pair(family):
    """A rejected image of one's own may take more tokens. CoPO would compare 3 tokens of y_w with 9 of it.
    The pair beside it has room, and is cut where its own longest prompt says."""
    _, _, processor = family
    small, large = noise(1, (32, 32)), noise(2, (90, 90))
    pairs = [pair("Which?", "There is a red circle here.", "No, there is a blue square.", *images)
             for images in ((small, large), (large, small), (small, small))]  # fmt: skip
    full = make_batch(pairs, processor)
    short, long = prefix_length(full, 0), prefix_length(full, 1)
    assert long > short + 9 and [prefix_length(full, row) for row in range(9)] == [
        short, long, short, short, long, short, long, short, short]  # fmt: skip
    cut = make_batch(pairs, processor, max_length=long + 3)
    lengths, uncut = ((batch.labels >= 0).sum(1).view(3, 3).tolist() for batch in (cut, full))
    (y_w, *_), (y_l, *_), _ = uncut
    assert min(y_w, y_l) > 3 and lengths == [[3, 3, y_w], [3, 3, y_l], [3, 3, y_w]]
    with pytest.raises(BadInput, match=f"prompt of {long} tokens, --max-length {long}: no room"):
        make_batch(pairs, processor, max_length=long)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 5)])
def test_images_of_one_pixel_and_of_extreme_shape(loaded, tmp_path, size):
    """Such files exist in scraped data and must not stop a run."""
    model, processor = loaded
    noise(0, size).save(tmp_path / "a.png")
    noise(1).save(tmp_path / "b.png")
    examples = read_examples(write(tmp_path / "x.json", [authors(), authors(img_path="b.png")]))
    for strategy in data.STRATEGIES:
        assert all(Pairs(examples, strategy)[epoch, 0].images_rejected[0].size == size for epoch in range(30))
        logps = response_logps(model, make_batch([Pairs(examples, strategy)[0, 0]], processor))
        assert all(math.isfinite(p.item()) for p in logps)


def test_five_images_of_which_three_differ_stay_five(folder, loaded):
    """Each is shown as often as the conversation shows it, takes its own tokens, and is rejected by a draw of
    its own."""
    model, processor = loaded
    noise(3, (20, 50)).save(folder / "b.png")
    names = ["a.png", "b.png", "a.png", "merged_images/llava-1.jpg", "b.png"]
    question = "<image>\n" * 5 + "Which is the odd one?"
    path = write(folder / "x.json", [authors(img_path=None, images=names, prompt=question, rejected="None.")])
    examples = read_examples(path)
    assert [Path(image).name for image in examples[0].images] == [Path(name).name for name in names]
    question, _, _, images, images_rejected, *_ = one = Pairs(examples)[0, 0]
    assert question == asked("Which is the odd one?", 5)
    assert [image.size for image in images_rejected] == [image.size for image in images]
    assert (
        len({image.tobytes() for image in images}) == 3
        and len({image.tobytes() for image in images_rejected}) == 5
    )
    batch = make_batch([one], processor)
    assert (
        len(batch.inputs["pixel_values"]) == 3 * 5
        and len(laid_out([one], processor).inputs["pixel_values"]) == 2 * 5
    )
    assert ((batch.inputs["input_ids"] == processor.image_token_id).sum(1) == 5 * 16).all()
    # The check of the room knows it: a prompt of n tokens has room for two of an answer in n + 2, and none in n.
    n = prefix_length(batch)
    assert len(read_examples(path, processor=processor, max_length=n + 2)) == 1
    with pytest.raises(BadInput, match=f"prompt of {n} tokens, --max-length {n}: no room"):
        read_examples(path, processor=processor, max_length=n)


@pytest.mark.parametrize(
    "pairs",
    [
        PAIRS[:2],
        SIZES,
        TWO_IMAGES,
        [PAIRS[0]._replace(question=CONVERSATION), PAIRS[1]],
        [pair(*one[:3]) for one in PAIRS],
        [pair(*PAIRS[0][:3]), SIZES[1], TWO_IMAGES[0]],
    ],
    ids=["one image", "different sizes", "two images", "turns", "no image", "none, one and two images"],
)
def test_each_family_trains_on_the_librarys_own_log_probabilities(family, pairs):
    """A forgotten processor key, position or kind of attention is silent, and wrong by nats: packed rows
    where they are exact, plain rows where they are not (Gemma's image tokens attend both ways, and most of
    its layers see only so far)."""
    folder, model, processor = family
    layout = train.choose_layout(model, processor, pairs)
    assert layout == ("plain" if folder.name == "gemma3" else "packed")
    for layout in {layout, "plain"}:
        assert error_of(model, processor, pairs, layout) < 1e-5


def error_of(model, processor, pairs, layout):
    """How far log-probabilities are from the library's own call on each conversation, as text: the largest
    error in nats per square root of a response's tokens."""
    batch, errors = laid_out(pairs, processor, layout), []
    lengths = (batch.labels >= 0).sum(1).view(3, -1)
    with torch.no_grad():
        logps = response_logps(model.eval(), batch)
    for i, one in enumerate(pairs):
        cases = zip(("chosen", "rejected", "chosen"), (one.images, one.images, one.images_rejected))
        for name, (answer, images) in enumerate(cases):
            n, expected = library_logp(model, processor, one.question, getattr(one, answer), images)
            assert n == lengths[name, i]
            errors.append(abs(logps[name][i].item() - expected) / n**0.5)
    return max(errors)


@torch.no_grad()
def library_logp(model, processor, question, answer, images):
    """(tokens of the response, its log-probability): one text, one call. All of these families write an
    answer as it is, behind one space if the prompt ends in a colon, and end it by their end-of-sequence.
    OneVision's template has a space behind the role, but not where it asks for an answer."""
    messages, bos = data.chat_messages(question, len(images)), processor.tokenizer.bos_token
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if isinstance(processor, transformers.LlavaOnevisionProcessor):
        prompt = prompt.removesuffix("\n") + " \n"
    whole = prompt + " " * prompt.endswith(":") + answer + processor.tokenizer.eos_token
    special = {"add_special_tokens": bos is None or not prompt.startswith(bos), "return_tensors": "pt"}
    shown = [[*images]] if images else None
    ids, inputs = (processor(text=[text], images=shown, **special) for text in (prompt, whole))
    start, targets = ids["input_ids"].shape[1], inputs["input_ids"][0]
    logps = model(**inputs).logits[0, start - 1 : -1].double().log_softmax(-1)
    return len(targets) - start, logps.gather(1, targets[start:, None]).sum().item()


def test_each_family_trains_in_bf16(family, tmp_path_factory):
    """What a GPU runs, on the CPU: bf16 weights, a float32 adapter, and no autocast to hide a tensor of the wrong type."""
    folder, *_ = family
    model, processor = train.load_model(str(folder), dtype=torch.bfloat16)
    layout = train.choose_layout(model, processor, SIZES)
    assert layout == ("plain" if folder.name == "gemma3" else "packed")
    model = train.add_lora(model, 8, 16).train()
    train.enable_checkpointing(model)
    losses, _ = mdpo_step(model, laid_out(SIZES, processor, layout))
    assert losses.tolist() == pytest.approx([3 * math.log(2)] * 2, abs=1e-6)
    losses.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in gradients.values())


def test_each_family_trains_saves_reloads_and_answers(family, small, tmp_path):
    """A family that only loads is no use: two steps by the command, then the adapter on a fresh model."""
    folder, *_ = family
    out = tmp_path / "out"
    assert train.main(command(folder, small, out, "--lr", "0.05")) == 0
    records = log_of(out)
    assert (
        records[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5)
        and records[-1]["loss"] < records[0]["loss"]
    )
    model, processor = train.load_model(str(folder))
    model = peft.PeftModel.from_pretrained(model, out).eval()
    decoder = model.get_base_model().get_decoder()
    linear = {id(m) for m in decoder.modules() if isinstance(m, peft.tuners.lora.Linear)}
    adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(adapted) == 14 and {id(m) for m in adapted} == linear  # 2 layers: q, k, v, o, gate, up, down
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in adapted)
    (answer,) = generate_answers(model, processor, [(PAIRS[0].images, PAIRS[0].question)], max_new_tokens=3)
    assert isinstance(answer, str)


def test_the_language_model_is_given_images_that_are_encoded(family):
    """Policy and reference share one encoding: given pixels, each pass would encode all images again."""
    _, model, processor = family
    for batch in (rows := make_batch(PAIRS[:2], processor)), pack(rows):
        assert "pixel_values" not in mdpo.forward_inputs(model, batch)


@pytest.mark.parametrize("family", ["llava_next", "idefics3", "qwen2_5_vl"], indirect=True)
@LAYOUTS
def test_own_rejected_images_of_another_size_work_in_one_batch(family, layout):
    """Tiles are padded to the largest image's, and m_l is processed apart from m_w: each must be as many as
    the model expects, also where only one of the two is large."""
    _, model, processor = family
    small, large = noise(1, (32, 32)), noise(2, (90, 60))
    texts = "Which?", "There is a red circle.", "No."
    pairs = [pair(*texts, small, large), pair(*texts, large, small), pair(*texts, small, small)]
    assert error_of(model, processor, pairs, layout) < 1e-5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_positions_in_space_start_anew_in_each_row(family):
    """They are relative, so a shift is harmless in float32; in bf16 its rounding grows along the packed
    row."""
    _, model, processor = family
    batch, grids = laid_out(SIZES, processor), make_batch(SIZES, processor).inputs["image_grid_thw"]
    positions = mdpo.forward_inputs(model, batch)["position_ids"]  # (3, 1, N)
    parts, in_a_line = positions[:, 0].split([n for n, *_ in batch.blocks], dim=1), []
    for row, (n, owner, prefix) in enumerate(batch.blocks):
        alone = batch.inputs["attention_mask"][row].bool()
        names = ("input_ids", "mm_token_type_ids")
        known = {name: batch.inputs[name][row : row + 1, alone] for name in names}
        expected, _ = model.model.get_rope_index(**known, image_grid_thw=grids[row : row + 1])
        assert torch.equal(parts[row], expected[:, 0, -n:]) and expected[:, 0, 0].max() == 0
        in_a_line.append(torch.equal(expected[0, 0], torch.arange(len(expected[0, 0]))))
    assert not all(in_a_line)  # else this shows nothing


def positions_plus_one(monkeypatch):
    positions = mdpo.row_positions
    plus_one = lambda model, batch: positions(model, batch) + (batch.labels >= 0).int()
    monkeypatch.setattr(mdpo, "row_positions", plus_one)


def other_masks(monkeypatch, change):
    blocks = mdpo.attention_blocks

    def changed(n, owner, prefix, mask):
        return (n, owner, prefix, mask) if mask is None else (n, owner, *change(prefix, mask.clone()))

    monkeypatch.setattr(mdpo, "attention_blocks", lambda *args: [changed(*block) for block in blocks(*args)])


def a_token_too_many(monkeypatch):
    other_masks(monkeypatch, lambda prefix, mask: (prefix + 1, F.pad(mask, (1, 0))))


def a_key_forgotten(monkeypatch):
    middle = lambda prefix: torch.tensor(prefix // 2)
    other_masks(monkeypatch, lambda prefix, mask: (prefix, mask.index_fill(-1, middle(prefix), -torch.inf)))


def images_swapped(monkeypatch):
    made = []

    def remembered(*args, **options):
        made.append((args, options))
        return make_batch(*args, **options)

    def swapped(batch):
        (pairs, *args), options = made.pop()
        pairs = [one._replace(images=one.images_rejected, images_rejected=one.images) for one in pairs]
        return pack(make_batch(pairs, *args, **options))

    monkeypatch.setattr(train, "make_batch", remembered)
    monkeypatch.setattr(train, "pack", swapped)


MISTAKES = (positions_plus_one, a_token_too_many, a_key_forgotten, images_swapped)


def test_mistakes_are_far_outside_what_the_check_allows_and_rounding_far_inside(family, monkeypatch):
    """In bf16 itself the smallest of these mistakes is no larger than rounding: it would stay hidden, or
    rounding would cost a run its packed rows and half its speed. So the check computes in float32, with the
    bf16 weights."""
    folder, *_ = family
    model, processor = train.load_model(str(folder), dtype=torch.bfloat16)
    model = train.add_lora(model, 4, 8)
    raised = copy.deepcopy(model).float()
    if folder.name == "gemma3":  # there packed rows are themselves the mistake
        off = train.packing_error(model, processor, SIZES)
        assert off > 20 * train.TOLERANCE
        assert off == pytest.approx(train.packing_error(raised, processor, SIZES), rel=1e-3)
        return
    assert train.packing_error(model, processor, SIZES) < train.TOLERANCE / 5
    for plant in MISTAKES:
        with monkeypatch.context() as patch:
            plant(patch)
            off = train.packing_error(model, processor, SIZES)
            assert off > 20 * train.TOLERANCE
            if plant is images_swapped:
                assert off == pytest.approx(train.packing_error(raised, processor, SIZES), rel=1e-3)
    assert model.get_base_model().dtype == torch.bfloat16


def test_the_check_costs_one_pass_of_each_layout(bunny):
    """At real size on a CPU each pass costs as much as a training example."""
    model, processor = train.load_model(str(bunny))
    widths = []
    model.register_forward_hook(lambda module, inputs, output: widths.append(output.logits.shape[:2]))
    assert train.choose_layout(model, processor, PAIRS[:2]) == "packed"
    assert [rows for rows, _ in widths] == [6, 1]


def test_nan_never_passes_the_check(bunny):
    """nan is neither above nor below a tolerance: packed rows that are not finite would be taken for exact,
    and a model whose plain rows are not finite would stop at its first step, with no reason given."""
    model, processor = train.load_model(str(bunny))
    attention = mdpo.packed_attention

    def nan_in_packed_rows(module, query, *args, blocks=None, **options):
        output, weights = attention(module, query, *args, blocks=blocks, **options)
        return output * (1.0 if blocks is None else math.nan), weights

    mdpo.use_packed_attention(model)
    transformers.AttentionInterface.register("packed", nan_in_packed_rows)
    try:
        assert math.isnan(train.packing_error(model, processor, PAIRS[:2]))
        assert train.choose_layout(model, processor, PAIRS[:2]) == "plain"
        with pytest.raises(BadInput, match="packed rows are not exact: nan"):
            train.choose_layout(model, processor, PAIRS[:2], "packed")
    finally:
        transformers.AttentionInterface.register("packed", attention)
    assert train.choose_layout(model, processor, PAIRS[:2]) == "packed"
    model.get_decoder().layers[0].mlp.fc1.weight.data[0, 0] = math.nan
    for layout in None, "packed", "plain":
        with pytest.raises(BadInput, match="cannot be trained: its log-probabilities are not finite"):
            train.choose_layout(model, processor, PAIRS[:2], layout)


def test_the_allocator_grows_its_segments_unless_the_user_set_it():
    """Shapes never repeat, and freed blocks of other sizes would not be used again. CUDA reads it when it starts."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    script = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['peft'] = None\n"
    script += f"try: import train\nexcept ImportError: print([os.environ.get(n) for n in {names}])"
    clean = {name: value for name, value in os.environ.items() if name not in names}
    ask = lambda **user: eval(
        subprocess.check_output([sys.executable, "-c", script], env=clean | user, text=True)
    )
    assert ask() == [None, "expandable_segments:True"]
    assert ask(PYTORCH_ALLOC_CONF="x") == ["x", None] and ask(PYTORCH_CUDA_ALLOC_CONF="y") == [None, "y"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_what_is_not_exact_is_noticed(family, monkeypatch, capsys):
    """The choice of layout must rest on a measurement that can fail: positions in a line instead of in space, a response
    that sees the other, and a forgotten key are each found out."""
    _, model, processor = family
    in_a_line = lambda model, batch: torch.arange(batch.labels.shape[1]).expand(3, *batch.labels.shape)
    with monkeypatch.context() as patch:
        patch.setattr(mdpo, "row_positions", in_a_line)
        assert train.packing_error(model, processor, PAIRS[:2]) > 1e-3
        assert train.choose_layout(model, processor, PAIRS[:2]) == "plain"
        said = capsys.readouterr().out
        assert "packed rows are not exact" in said and "about twice as long" in said
        with pytest.raises(BadInput, match="cannot be trained: packed rows are not exact"):
            train.choose_layout(model, processor, PAIRS[:2], "packed")
    blocks = mdpo.attention_blocks

    def leaking(of, *where):  # y_l sees all of the row whose prefix it shares, so y_w as well
        lengths, changed = [n for n, *_ in of], []
        for n, owner, prefix, mask in blocks(of, *where):
            more = lengths[owner] - prefix
            if mask is None:
                changed.append((n, owner, prefix, mask))
            else:
                changed.append((n, owner, prefix + more, F.pad(mask, (more, 0))))
        return changed

    def without_types(batch):
        batch = pack(batch)
        return replace(batch, inputs=batch.inputs | {"mm_token_type_ids": 0 * batch.labels})

    with monkeypatch.context() as patch:
        patch.setattr(mdpo, "attention_blocks", leaking)
        assert train.packing_error(model, processor, PAIRS[:2]) > 1e-3
    monkeypatch.setattr(train, "pack", without_types)
    with pytest.raises(BadInput, match="cannot be trained"):
        train.choose_layout(model, processor, PAIRS[:2], "packed")


def test_plain_rows_are_there_for_models_that_packed_rows_stop(llava, monkeypatch):
    """--layout plain is the way out for a model that cannot take a packed row at all, such as one whose
    layers are no attention: it must not be refused for what it was not asked to do."""
    model, processor = train.load_model(str(llava))

    def stopped(model, batch):
        raise RuntimeError("no such mask")

    monkeypatch.setattr(mdpo, "packed_inputs", stopped)
    with pytest.raises(BadInput, match="cannot be trained: .*no such mask"):
        train.choose_layout(model, processor, PAIRS[:2], "packed")
    assert train.choose_layout(model, processor, PAIRS[:2], "plain") == "plain"


def test_packed_rows_are_not_for_layers_that_see_less_far_than_a_row_may_be_long(llava, capsys):
    """A packed row's attention knows no window; the first examples may fit into it, and a later one not."""
    model, processor = train.load_model(str(llava))
    for window, layout in ((2048, "packed"), (2047, "plain"), (None, "packed")):
        model.config.text_config.sliding_window = window
        assert train.choose_layout(model, processor, PAIRS[:2]) == layout
    assert "window of 2047 tokens is shorter than --max-length 2048" in capsys.readouterr().out
    model.config.text_config.sliding_window = 500
    assert train.choose_layout(model, processor, PAIRS[:2], None, 500) == "packed"
    assert train.choose_layout(model, processor, PAIRS[:2], "plain") == "plain"
    with pytest.raises(BadInput, match="packed rows are not exact: its attention window of 500"):
        train.choose_layout(model, processor, PAIRS[:2], "packed")


def test_layers_with_a_window_are_trained_as_the_library_computes_them(tmp_path):
    """Where the first example is longer than the window, packed rows are off by nats; plain rows know it."""
    folder = families.write_family("gemma3", tmp_path / "gemma3")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["sliding_window"] == 16
    model, processor = train.load_model(str(folder))
    pairs = [pair(*one[:3]) for one in PAIRS]  # no image, so no attention both ways
    assert train.packing_error(model, processor, pairs) > train.TOLERANCE
    assert error_of(model, processor, pairs, "plain") < 1e-5


def test_models_that_cannot_be_trained_are_refused_before_their_weights_are_read(
    tmp_path, bunny, llava, monkeypatch
):
    """The reason, in one line, and not after a download of gigabytes."""
    for name, config, reason in (
        ("text", transformers.LlamaConfig(), "cannot be loaded: Unrecognized processing class"),
        ("florence", transformers.Florence2Config(), "is an encoder-decoder"),
    ):
        config.save_pretrained(tmp_path / name)
        with pytest.raises(BadInput, match=reason):
            train.load_processor(str(tmp_path / name))
    transformers.GitConfig().save_pretrained(tmp_path / "git")
    with monkeypatch.context() as patch:
        patch.setattr(
            transformers.AutoProcessor, "from_pretrained", lambda *args, **kwargs: SimpleNamespace()
        )
        with pytest.raises(BadInput, match="has no image token"):
            train.load_processor(str(tmp_path / "git"))
    shutil.copytree(llava, tmp_path / "silent", ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(BadInput, match="does not have a chat template"):
        train.load_processor(str(tmp_path / "silent"))
    shutil.copytree(bunny, tmp_path / "small")
    config = json.loads((bunny / "config.json").read_text())
    write(tmp_path / "small" / "config.json", config | {"vocab_size": 20})
    with pytest.raises(BadInput, match="has no token of nine tabs"):
        train.load_processor(str(tmp_path / "small"))
    _, processor = train.load_model(str(bunny))
    with (
        monkeypatch.context() as patch
    ):  # as Mllama's, whose layers of cross-attention need a mask of their own
        mask = lambda call: {"cross_attention_mask": call["input_ids"][:, :, None, None]}
        encode = data.encode
        patch.setattr(data, "encode", lambda *args: (lambda call: call.data | mask(call))(encode(*args)))
        with pytest.raises(BadInput, match="returns cross_attention_mask, which"):
            make_batch(PAIRS, processor)


def test_a_conversation_with_bunny_is_in_its_own_words(bunny):
    """Bunny was tuned on one template. Earlier answers end in the end-of-sequence token, as the last one does."""
    _, processor = train.load_model(str(bunny))
    batch = make_batch([pair(CONVERSATION, "A cat.", "A dog.", noise(1), noise(2))], processor)
    ids = batch.inputs["input_ids"][0].tolist()
    text = processor.decode(ids).replace("\t" * 9, "[]")
    expected = (
        "Be brief. USER: Hello.  ASSISTANT: Hello!<|endoftext|>USER: "
        + "[]" * 16
        + "\nWhat is it?  ASSISTANT: A cat.<|endoftext|>"
    )
    assert re.sub(" +", " ", text).startswith(re.sub(" +", " ", expected))


def test_turns_and_several_images_are_read_and_shown(folder, loaded):
    """Every image is shown where the conversation shows it, and each is rejected on its own."""
    _, processor = loaded
    (example,) = examples = read_examples(write(folder / "x.json", [TURNS]), processor=processor)
    assert [message["role"] for message in example.question] == ["system", "user", "assistant", "user"]
    assert [Path(image).name for image in example.images] == ["a.png", "llava-1.jpg"]
    one = Pairs(examples)[0, 0]
    images, images_rejected = one.images, one.images_rejected
    assert [i.size for i in images] == [i.size for i in images_rejected]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(images, images_rejected))
    (prefix, _), *_ = sequences_of(make_batch([one], processor), processor)
    text = "".join(
        "[]" if id == processor.image_token_id else processor.tokenizer.decode([id]) + "~" for id in prefix
    )
    text = re.sub(r"[\s~]", "", text)
    assert re.search(r"Bebrief\.(USER:)\[\]Whatisit\?ASSISTANT:Acat\.", text)
    assert text.count("[]") == 2 and text.find("[]", text.find("Acat.")) > 0
    (no_image,) = examples = read_examples(write(folder / "x.json", [TURNS]), with_images=False)
    batch = make_batch([Pairs(examples)[0, 0]], processor, names=DPO_NAMES)
    assert no_image.images == () and not (batch.inputs["input_ids"] == processor.image_token_id).any()


def test_every_bunny_weight_lands_in_its_place(bunny):
    """A tensor left out would be random: the run would go on, and be worthless."""
    model, _ = train.load_model(str(bunny))
    weights, state = weights_of(bunny), model.state_dict()
    assert len(state) == len(weights)
    for name, tensor in weights.items():
        ours = name.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
        ours = ours.replace("mm_projector.0", "multi_modal_projector.linear_1")
        ours = ours.replace("mm_projector.2", "multi_modal_projector.linear_2")
        if ours.split(".")[1] in ("embed_tokens", "layers", "final_layernorm"):
            ours = ours.replace("model.", "model.language_model.", 1)
        torch.testing.assert_close(state[ours], tensor.float(), rtol=0, atol=0)
    assert model.config.vision_config.num_hidden_layers == 2 and model.config.image_seq_length == 16


def eye_by_hand(weights, image):
    """What the language model is given of an image, by the arithmetic of SigLIP and Bunny's projector: (16, 32).

    Patches of 8 pixels, 2 layers 32 wide with 16 heads, then Linear, GELU, Linear. `weights` under the checkpoint's names.
    """
    side = max(image.size)  # to a square, on the mean colour 0.5 * 255 = 127, the image in the middle
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((32, 32), Image.Resampling.BICUBIC)
    x = torch.tensor(list(square.tobytes()), dtype=torch.float64).view(32, 32, 3) / 255
    x = (x - 0.5) / 0.5
    patches = (
        x.view(4, 8, 4, 8, 3).permute(0, 2, 4, 1, 3).reshape(16, 3 * 8 * 8)
    )  # by rows; in each: colour, y, x

    w = lambda name: weights["model.vision_tower.vision_tower.vision_model." + name].double()
    linear = lambda x, name: x @ w(name + ".weight").T + w(name + ".bias")

    def layer_norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * w(name + ".weight") + w(name + ".bias")

    patch = "embeddings.patch_embedding"
    h = (
        patches @ w(patch + ".weight").flatten(1).T
        + w(patch + ".bias")
        + w("embeddings.position_embedding.weight")
    )
    for layer in ("encoder.layers.0.", "encoder.layers.1."):
        y = layer_norm(h, layer + "layer_norm1")
        q, k, v = (
            linear(y, f"{layer}self_attn.{side}_proj").view(16, 16, 2).transpose(0, 1) for side in "qkv"
        )
        seen = ((q @ k.transpose(1, 2)) / math.sqrt(2)).softmax(-1) @ v  # (heads, patches, 2)
        h = h + linear(seen.transpose(0, 1).reshape(16, 32), layer + "self_attn.out_proj")
        y = linear(layer_norm(h, layer + "layer_norm2"), layer + "mlp.fc1")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        h = h + linear(y, layer + "mlp.fc2")
    w = lambda name: weights["model.mm_projector." + name].double()  # no norm behind the last layer
    y = linear(h, "0")
    return linear(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), "2")


def weights_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("size", [(48, 32), (20, 50), (32, 32)])
def test_bunnys_eye_by_hand(bunny, size):
    """Features of another layer, CLIP's mean and deviation, a picture squeezed where it should be padded: a wrong model would
    train in silence, since packed and plain rows and the reference would all be wrong alike."""
    model, processor = train.load_model(str(bunny))
    for parameter in [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
    ]:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    weights = {}
    for name, tensor in model.state_dict().items():  # back to the checkpoint's names
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        weights[name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")] = tensor
    seen = []
    model.model.multi_modal_projector.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    response_logps(model, laid_out([pair(*PAIRS[0][:3], noise(1, size), noise(2, size))], processor))
    expected = [eye_by_hand(weights, noise(seed, size)) for seed in (1, 2)]
    torch.testing.assert_close(
        torch.cat(seen).view(2, 16, 32).double(), torch.stack(expected), rtol=1e-4, atol=1e-4
    )


def test_a_bunny_in_one_file_is_the_same_model(bunny, tmp_path):
    """Small checkpoints have no index of shards; the sizes of the vision tower are then read off the one file."""
    folder = tmp_path / "bunny"
    shutil.copytree(bunny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights_of(bunny), folder / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = (train.load_model(str(path))[0].state_dict() for path in (folder, bunny))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_activation_of_bunny_is_its_own_in_one_kernel(bunny):
    """Bunny's config asks for gelu_new, eight kernels in the library; another function would be another model."""
    model, _ = train.load_model(str(bunny))
    assert json.loads((bunny / "config.json").read_text())["hidden_act"] == "gelu_new"
    x = torch.linspace(
        -6, 6, 1001, dtype=torch.float64, requires_grad=True
    )  # in which rounding hides no difference
    by_hand = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ours = model.get_decoder().layers[0].mlp.activation_fn(x)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, by_hand)]
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


def test_dropout_of_the_base_is_off(loaded):
    """Bunny asks for resid_pdrop 0.1, this LLaVA for attention_dropout 0.1: either makes the step-0 loss random."""
    model, _ = loaded
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates += [
        value
        for m in model.modules()
        for k, value in vars(m).items()
        if "drop" in k and isinstance(value, float)
    ]
    assert rates and not any(rates)


def test_pickled_weights_are_not_loaded(llava, tmp_path):
    """Unpickling runs whatever code the file holds."""
    shutil.copytree(llava, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(llava / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(BadInput):
        train.load_model(str(tmp_path / "pickled"))


def test_a_loaded_model_is_frozen(loaded):
    """Weights that are not frozen take optimizer memory for 3 billion parameters, or drift."""
    assert not any(parameter.requires_grad for parameter in loaded[0].parameters())


def test_options_of_the_loss_reach_it(bunny):
    """`mdpo_step(model, batch, beta=...)` is how who writes a loop of his own sets them."""
    model, processor = with_lora(bunny)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch(PAIRS, processor)
    with model.disable_adapter():
        ref = LogPs(*(logp.detach() for logp in response_logps(model, batch)))
    losses, _ = mdpo_step(model, batch, beta=0.5, delta=0.2, anchors=("rejected",))
    expected, _ = mdpo_loss(response_logps(model, batch), ref, 0.5, 0.2, True, ("rejected",))
    torch.testing.assert_close(losses, expected)


def test_a_projector_that_is_trained_is_refused(bunny):
    """Policy and reference share its output, so it would get no gradient, or move the reference."""
    model, processor = with_lora(bunny)
    for parameter in model.get_base_model().model.multi_modal_projector.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="must be frozen"):
        mdpo_step(model, make_batch(PAIRS, processor))


@pytest.mark.parametrize("family", ["bunny", "llava"])
def test_lora_is_on_every_linear_layer_of_the_language_model_and_trains(family, request):
    """A layer without gradient (reentrant checkpointing does that) or an adapter in the vision tower is a silent bug."""
    model, processor = with_lora(request.getfixturevalue(family))
    language_model = model.get_base_model().model.language_model
    linear = [n for n, m in language_model.named_modules() if n.endswith("base_layer")]
    assert len(linear) == len([n for n, m in language_model.named_modules() if n.endswith("lora_A")]) > 0
    plain = [n for n, m in language_model.named_modules() if type(m) is torch.nn.Linear and ".lora_" not in n]
    assert sorted(plain) == sorted(linear)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(linear)
    assert all(".language_model." in n and ".lora_" in n for n in trainable)
    for name, parameter in trainable.items():  # B starts at 0, which would leave A without a gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    mdpo_step(model, make_batch(PAIRS, processor))[0].mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_layers_compute_what_pefts_own_do(bunny, dtype):
    """The adapter is saved for peft to load: were its forward pass another one, it would be another model there."""
    model, processor = train.load_model(str(bunny), dtype=dtype)
    model = train.add_lora(model, 4, 12)
    layers = [module for module in model.modules() if isinstance(module, train.LoraLinear)]
    assert len(layers) == 12  # 2 layers: q, k, v, dense, fc1, fc2
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x = torch.randn(2, 5, layers[0].in_features).to(dtype).requires_grad_()
    results = []
    for kind in (train.LoraLinear, peft.tuners.lora.Linear):
        layers[0].__class__ = kind
        y = layers[0](x)
        weights = [layers[0].lora_A["default"].weight, layers[0].lora_B["default"].weight]
        with model.disable_adapter():
            base = layers[0](x)
        results.append([y, base, *torch.autograd.grad(y.square().sum(), [x, *weights])])
        assert not torch.equal(y, base) and y.dtype == base.dtype == dtype
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()
    layers[1].merge()
    merged = layers[1](x)
    layers[1].unmerge()
    assert (merged - layers[1](x)).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * merged.norm()


def test_checkpointing_does_not_change_gradients(bunny):
    """It trades time for memory and nothing else."""
    gradients = []
    for checkpointing in (True, False):
        model, processor = with_lora(bunny, checkpointing)
        mdpo_step(model, make_batch(PAIRS, processor))[0].mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("name", ["resid_pdrop", "attn_drop", "drop_prob", "attention_dropout", "dropout"])
def test_every_rate_of_dropout_is_0(name):
    """Models call it as they like. Left on, policy and reference differ by chance: rewards are noise."""
    layer = torch.nn.Linear(1, 1)
    setattr(layer, name, 0.1)
    model = torch.nn.Sequential(layer, torch.nn.Dropout(0.1))
    train.disable_dropout(model)
    assert getattr(layer, name) == 0 and model[1].p == 0


def test_rows_that_are_nan_are_not_exact(llava, monkeypatch):
    """Where a model keeps an attention of its own, packed rows are nan on purpose: above no
    tolerance."""
    model, processor = train.load_model(str(llava))
    monkeypatch.setattr(mdpo, "use_packed_attention", lambda *args, **kwargs: None)
    assert train.choose_layout(model, processor, PAIRS[:2]) == "plain"


def test_one_wrong_row_of_six_is_enough(llava, monkeypatch):
    """Mistakes of packing are of single rows: an example's first row is always right. Two pairs have six
    rows; one log-probability is off by twice what is accepted, so that their mean is a third of it."""
    model, processor = train.load_model(str(llava))
    response_logps = train.response_logps

    def one_off(model, batch, *args, **kwargs):
        logps = response_logps(model, batch, *args, **kwargs)
        if batch.take is not None:
            n_tokens = (batch.labels[-1] >= 0).sum()
            logps.image_rejected[-1] += 2 * train.TOLERANCE * n_tokens.sqrt()
        return logps

    assert train.choose_layout(model, processor, PAIRS[:2]) == "packed"
    monkeypatch.setattr(train, "response_logps", one_off)
    assert train.choose_layout(model, processor, PAIRS[:2]) == "plain"


def test_options_of_a_step_scale_its_rewards_or_are_refused(bunny):
    """Who writes a training loop sets them here. A wrong name that is swallowed trains with the defaults."""
    model, processor = with_lora(bunny)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch(PAIRS, processor)
    _, small = mdpo_step(model, batch, beta=0.1)
    _, large = mdpo_step(model, batch, beta=0.5)
    for name in "rewards/chosen", "rewards/rejected", "rewards/image_rejected":
        torch.testing.assert_close(large[name], 5 * small[name])
        assert small[name].abs().min() > 0
    with pytest.raises(TypeError, match="bta"):
        mdpo_step(model, batch, bta=0.5)


def test_no_metric_of_a_step_keeps_its_graph(bunny):
    """A log of them would hold the activations of every step in memory."""
    model, processor = with_lora(bunny)
    losses, metrics = mdpo_step(model, make_batch(PAIRS[:1], processor))
    assert losses.requires_grad and "loss" in metrics
    assert not [name for name, value in metrics.items() if value.requires_grad]
