"""Protects what a model is given and what of it is trained.

Chat templates, rows and packed rows, the check of these, today's families, Bunny's format, and adapters.
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
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
    move,
    noise,
    pair,
    prefix_length,
    softplus,
    with_lora,
    write,
)
from tests.helpers import CHAT, DPO_NAMES, PARTS, SIZES, TURNS, ids_of, outputs_of, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def fresh(bunny):
    """(model, processor) of a Bunny that a test may change."""
    return train.load_model(str(bunny))


def test_each_image_of_a_step_is_encoded_once(bunny, small, tmp_path, monkeypatch):
    """Vision towers are a third of a step: policy and reference share an encoding, of the same two images an
    example."""
    tower = transformers.models.siglip.modeling_siglip.SiglipVisionModel
    forward, sizes = tower.forward, []

    def noted(self, pixel_values, **options):
        sizes.append(len(pixel_values))
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(tower, "forward", noted)
    assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1)) == 0
    # Micro-batches of 2, 2, 2 and 1 examples. The check of the rows comes before them.
    assert sizes[-4:] == [4, 4, 4, 2]


def test_a_tie_is_not_accurate():
    """Before training every margin is 0: counted as accurate, a run would begin at 100%."""
    _, metrics = mdpo_loss(REF, REF)
    assert metrics["rewards/accuracies"].item() == metrics["rewards/image_accuracies"].item() == 0


@pytest.mark.parametrize("policy_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "ref_dtype, step", [(torch.float16, 2**-9), (torch.bfloat16, 2**-6), (torch.float32, 2**-13)]
)
def test_half_precision_is_raised_to_float32(policy_dtype, ref_dtype, step):
    """Steps are 4 nats wide at -1000 in bf16: subtracted there, -1000 + 3 + 1/64 is -996. `step` is one that
    `ref_dtype` resolves at 3, so that a type with fewer bits loses it. Rewards, beta 1: -997 + step, -1001
    and -997; the anchor's term is minus the first. Float64 stays what it is: the loss can be checked to the
    last bit."""
    policy = LogPs(*torch.tensor([[-1000], [-1004], [-1000]], dtype=policy_dtype))
    ref = LogPs(*torch.tensor([[-3 - step], [-3], [-3]], dtype=ref_dtype))
    losses, metrics = mdpo_loss(policy, ref, beta=1.0)
    assert losses.dtype == torch.float32
    assert metrics["rewards/chosen"].item() == -997 + step and metrics["rewards/margins"].item() == 4 + step
    assert losses.item() == pytest.approx(softplus(-4 - step) + softplus(-step) + 997 - step, abs=1e-4)
    losses, _ = mdpo_loss(*([logp.double() for logp in logps] for logps in (POLICY, REF)), beta=0.5)
    assert losses.item() == pytest.approx(DPO + CONDITIONAL + ANCHOR, abs=1e-15)


@pytest.fixture(scope="session")
def in_float64(loaded):
    """A copy of the model of `loaded` in float64: `response_in_float64` asks it."""
    return copy.deepcopy(loaded[0]).double().eval()


@torch.no_grad()
def response_in_float64(model, processor, prompt, response, image, other_response):
    """log p(response | image, prompt), of one sequence by itself, so without any mask, padding or packing.

    Tokenised whole; the response begins where prompt, prompt + response and prompt + other_response begin to
    differ, and ends with its first end-of-sequence. An image takes 16 tokens, in both models.
    """
    ids, *others = (ids_of(processor, prompt + more) for more in (response, "", other_response))
    start = len(os.path.commonprefix([ids, *others]))  # of lists, too
    scored = ids[start : ids.index(processor.tokenizer.eos_token_id, start) + 1]
    prefix = [token for id in ids[:start] for token in [id] * (16 if id == processor.image_token_id else 1)]
    pixels = pixels_of(processor, image).double()
    logits = model(input_ids=torch.tensor([prefix + scored]), pixel_values=pixels).logits[
        0, len(prefix) - 1 : -1
    ]
    return sum((row[token] - row.logsumexp(0)).item() for row, token in zip(logits, scored))


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
    """A boundary that is guessed instead of found, a stand-in that the text holds, or a second BOS: each of
    them scores other tokens than the model will produce, in silence."""
    model, processor = loaded
    question, *answers = (text.replace("EOS", processor.tokenizer.eos_token) for text in ODD_TEXTS[texts])
    (prompt, y_w), (_, y_l) = (full_text(processor, question, answer) for answer in answers)
    logps = response_logps(
        model, laid_out([PAIRS[1], pair(question, *answers, noise(1), noise(2))], processor, layout)
    )
    cases = ((y_w, noise(1), y_l), (y_l, noise(1), y_w), (y_w, noise(2), y_l))
    expected = [response_in_float64(in_float64, processor, prompt, *case) for case in cases]
    assert [p[1].item() for p in logps] == pytest.approx(expected, rel=2e-6, abs=1e-4)


@pytest.mark.parametrize("template_has_bos", [False, True])
def test_a_sequence_has_one_bos(llava, template_has_bos):
    """Llama's tokenizer adds <s>, and some templates write it as well: twice, or not at all, is not what the
    model knows."""
    _, processor = train.load_model(str(llava))
    if template_has_bos:
        processor.chat_template = "{{ bos_token }}" + HUB_LLAVA_TEMPLATE
    for one in (PAIRS[0], pair(*PAIRS[0][:3])):
        ids = make_batch([one], processor, names=DPO_NAMES).inputs["input_ids"][0].tolist()
        assert ids[0] == processor.tokenizer.bos_token_id == 1 and ids.count(1) == 1


def test_logits_are_raised_to_float32(bunny):
    """A log-softmax in bf16 is off by hundredths of a nat a token. Held to a float64 one of the very same
    bf16 logits."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    seen = outputs_of(model.lm_head)
    logps = response_logps(model, pack(make_batch(PAIRS[:1], processor)))
    y_w, y_l = (ids_of(processor, full_text(processor, "", answer)[1]) for answer in PAIRS[0][1:3])
    tokens = torch.tensor(y_w + y_l + y_w)[:, None]
    by_token = seen[0][0].double().log_softmax(-1).gather(1, tokens)[:, 0]
    expected = [part.sum().item() for part in by_token.split([len(y_w), len(y_l), len(y_w)])]
    assert [p.item() for p in logps] == pytest.approx(expected, abs=1e-4)


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


def test_packed_attention_is_sdpa_for_all_else(fresh, tmp_path):
    """Plain rows, generation and a saved model must not know that it was ever replaced."""
    model, processor = fresh
    texts = [
        "There is a red circle.",
        "There",
    ]  # the second is padded: without a mask it would see the padding
    inputs = processor(text=texts, return_tensors="pt", padding=True, padding_side="left")
    results = []
    for implementation in "packed", "sdpa":
        if implementation == "packed":
            mdpo.use_packed_attention(model)
        else:
            model.set_attn_implementation("sdpa")
        assert model.config.text_config._attn_implementation == implementation
        logps = response_logps(model, make_batch(PAIRS, processor))
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        results.append((*logps, model(**inputs).logits[:, -1], generated))
    assert all(map(torch.equal, *results))
    mdpo.use_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_rows_set_the_attention_they_need_and_are_nan_under_another(fresh, implementation):
    """Any other would let every token see all before it, of other sequences and images: wrong by nats, and
    silent. A user or a library may set it back later."""
    model, processor = fresh
    model.set_attn_implementation(implementation)
    batch = make_batch(PAIRS, processor)
    plain, packed = (torch.cat(response_logps(model, rows)) for rows in (batch, pack(batch)))
    assert model.config.text_config._attn_implementation == "packed"
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    model.set_attn_implementation(implementation)
    assert not torch.cat(response_logps(model, pack(batch))).isfinite().any()
    torch.testing.assert_close(torch.cat(response_logps(model, batch)), plain, rtol=0, atol=1e-5)


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


def written(processor, one):
    """The rows of y_w and y_l as text: (prefix, response) each, with EOS and IMAGE for these tokens."""
    rows, tokenizer = sequences_of(make_batch([one], processor, DPO_NAMES), processor), processor.tokenizer
    names = {tokenizer.eos_token: "EOS", processor.image_token: "IMAGE"}
    texts = [tuple(map(tokenizer.decode, row)) for row in rows]
    for token, name in names.items():
        texts = [tuple(text.replace(token, name) for text in row) for row in texts]
    return texts


def with_template(folder, template):
    """The processor, with a chat template of ours, if any, in which IMAGE stands for its image token."""
    processor = train.load_processor(str(folder))
    if template:
        processor.chat_template = template.replace("IMAGE", processor.image_token)
    return processor


BARE = (  # parts one after the other, with no word of its own
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% if p.type == 'image' %}IMAGE{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("answers", [("ers", "x"), ("x", "ers")])
@pytest.mark.parametrize("image_is_last", [False, True])
@pytest.mark.parametrize("with_image", [False, True])
def test_boundary_where_tokens_merge_across_it(bunny, with_image, image_is_last, answers):
    """prompt 'answ' + response 'ers' is one token of the whole: tokenised apart, the model would be scored on
    text that it never produces. The boundary moves back to the last token that all three texts share; never
    past an image."""
    processor = with_template(bunny, BARE)
    assert ids_of(processor, " answ")[-1] != ids_of(processor, " answers")[-1]  # else this shows nothing
    image, token = (noise(1), processor.image_token) if with_image else (None, "")
    content, prompt = [{"type": "image"}, {"type": "text", "text": "a red answ"}], token + "a red answ"
    if image_is_last:
        content, prompt = content[::-1], "a red answ" + token
    one = pair([{"role": "user", "content": content}], *answers, image, image)
    wholes = [ids_of(processor, prompt + y) + [processor.tokenizer.eos_token_id] for y in answers]
    shared = len(os.path.commonprefix([ids_of(processor, prompt), *wholes]))
    stands_between = image_is_last and with_image
    assert (shared < len(ids_of(processor, prompt))) != stands_between
    expected = [(whole[:shared], whole[shared:]) for whole in (*wholes, wholes[0])]
    assert sequences_of(make_batch([one], processor), processor) == expected


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


PLACED = CHAT.replace("END", "{{ eos_token }}")
ENDS_TURNS = CHAT.replace("END", "<end>\n")  # as Gemma, whose end-of-sequence is another token
PRINTS = PLACED.replace(PARTS, "{{ m.content }}")
JOINS = PRINTS.replace("{{ m.content }}", "{{ m.content + '' }}")  # a list and a text: an error
# Text is taken as text, and parts are walked over, but those of an assistant are printed.
IS_TEXT = "{% if m.content is string or m.role == 'assistant' %}"
TEXT_OR_PARTS = PLACED.replace(PARTS, IS_TEXT + "{{ m.content }}{% else %}" + PARTS + "{% endif %}")
SYSTEM_IF = (  # as Pixtral: the system text stands before the last message, if that is the user's
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' and messages[0].role == 'system' and CONDITION %}"
    "{{ messages[0].content[0].text }} {% endif %}" + PLACED.partition("%}")[2]
)
USER_OR_HUMAN = "{% if messages | length > 1 %}Human{% else %}User{% endif %}" + PLACED
THOUGHT = "<think>A ring?</think>Yes."
DIALOGUE = (("user", "Is it?"), ("assistant", THOUGHT), ("user", "And it?"))
ASKED_AGAIN = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in DIALOGUE]
PRINTED_PART = "What is {'type': 'text', 'text': 'x'}?"
# (template, None for Bunny's own; question, y_w, y_l; what both rows begin with, and their responses). With
# IMAGE in it, the pair has images.
WRITTEN = {
    "what opens the assistant's turn is the prompt's, generation prompt or not": (
        PLACED.replace("[{{ m.role }}]", "{{ m.role }}: ").partition("{% if add")[0],
        "Which?", "No.", "Yes.", "user: Which?EOSassistant:", " No.EOS", " Yes.EOS"),
    "what follows the end is never generated": (
        PLACED.replace("]", "]\n").replace("eos_token }}", "eos_token }}\n"),
        "Which?", "No.", "Yes.EOS Or no.", "[user]\nWhich?EOS\n[assistant]\n", "No.EOS", "Yes.EOS"),
    "answers are trimmed": (
        PLACED.replace("p.text", "p.text | trim"),
        "Which?", " No.\n", "\nYes. ", "[user]Which?EOS[assistant]", "No.EOS", "Yes.EOS"),
    "the end of a turn is scored once, and no end-of-sequence, which is never reached": (
        ENDS_TURNS, "Which?", "No.", "Yes.", "[user]IMAGEWhich?<end>\n[assistant]", "No.<end>", "Yes.<end>"),
    "the end of a turn is scored without a generation prompt, too": (
        ENDS_TURNS.partition("{% if add")[0],
        "Which?", "No.", "Yes.", "[user]Which?<end>\n[assistant]", "No.<end>", "Yes.<end>"),
    "an end-of-sequence inside ends the response, and the turn": (
        ENDS_TURNS, "Which?", "No.EOS Or yes.", "Yes.",
        "[user]Which?<end>\n[assistant]", "No.EOS", "Yes.<end>"),
    "a plain answer gets the template's empty think block": (
        THINKING, "Which?", "Yes.", "No.",
        "[user]IMAGEWhich?EOS[assistant]<think></think>", "Yes.EOS", "No.EOS"),
    "an answer keeps the think block that it brings": (
        THINKING, "Which?", THOUGHT, "No.",
        "[user]IMAGEWhich?EOS[assistant]<think>", "A ring?</think>Yes.EOS", "</think>No.EOS"),
    "an answer keeps its think block in the other row as well": (
        THINKING, "Which?", "No.", THOUGHT,
        "[user]Which?EOS[assistant]<think>", "</think>No.EOS", "A ring?</think>Yes.EOS"),
    "reasoning of an earlier turn is dropped": (
        THINKING, ASKED_AGAIN, "No.", "Yes.",
        "[user]Is it?EOS[assistant]Yes.EOS[user]And it?EOS[assistant]<think></think>", "No.EOS", "Yes.EOS"),
    "messages that are printed are given as text": (
        PRINTS, "Which?", "No.", "Yes.", "[user]Which?EOS[assistant]", "No.EOS", "Yes.EOS"),
    "messages that are joined are given as text": (
        JOINS, "Which?", "No.", "Yes.", "[user]Which?EOS[assistant]", "No.EOS", "Yes.EOS"),
    "messages without an image are given as text": (
        TEXT_OR_PARTS, "Which?", "No.", "Yes.", "[user]Which?EOS[assistant]", "No.EOS", "Yes.EOS"),
    "messages with an image are given as parts": (
        TEXT_OR_PARTS, "Which?", "No.", "Yes.", "[user]IMAGEWhich?EOS[assistant]", "No.EOS", "Yes.EOS"),
    "a question about a printed part is a question": (
        PLACED, PRINTED_PART, "A {'type': 'text'}.", "Yes.",
        f"[user]IMAGE{PRINTED_PART}EOS[assistant]", "A {'type': 'text'}.EOS", "Yes.EOS"),
    "where a system text would be refused, a question without it is good": (
        SYSTEM_IF.replace("CONDITION", "loop.last"), "Which?", "No.", "Yes.",
        "[user]IMAGEWhich?EOS[assistant]", "No.EOS", "Yes.EOS"),
    "earlier answers of Bunny end as the last one does": (
        None, CONVERSATION, "A cat.", "A dog.",
        "Be brief. USER:  Hello.  ASSISTANT: Hello!EOSUSER: IMAGE\nWhat is it?  ASSISTANT:",
        " A cat.EOS", " A dog.EOS"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_what_a_template_writes_is_what_is_scored(bunny, case):
    """Every template has ways of its own to open, end and fill a turn. Trained on a text that it does not
    write, the model would learn what it is never asked, or never to stop."""
    template, question, y_w, y_l, prefix, *responses = WRITTEN[case]
    processor = with_template(bunny, template)
    y_w, y_l = (text.replace("EOS", processor.tokenizer.eos_token) for text in (y_w, y_l))
    images = (noise(1), noise(2)) if "IMAGE" in prefix else ()
    assert written(processor, pair(question, y_w, y_l, *images)) == [(prefix, y) for y in responses]


IN_ANOTHER_WAY = "writes the question in another way when a response follows"
SYSTEM_AND_QUESTION = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
]
REFUSED = {
    "an image would be printed": (PRINTS, "Which?", "the chat template does not take these messages"),
    "an image would be joined": (JOINS, "Which?", "the chat template does not take these messages"),
    "a system text moves": (SYSTEM_IF.replace("CONDITION", "loop.last"), SYSTEM_AND_QUESTION, IN_ANOTHER_WAY),
    "a system text is dropped": (
        SYSTEM_IF.replace("CONDITION", "messages | length < 3"), SYSTEM_AND_QUESTION, IN_ANOTHER_WAY),
    "the text before the image changes": (USER_OR_HUMAN, "Which?", IN_ANOTHER_WAY),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_trained_is_refused(bunny, case):
    """The model would be trained on a prompt that it is never given: without its system text, or with
    "[{'type': 'text', ..." in it."""
    template, question, problem = REFUSED[case]
    with pytest.raises(BadInput, match=problem):
        make_batch([pair(question, "No.", "Yes.", noise(1), noise(2))], with_template(bunny, template))


PRINTS += "{% if add_generation_prompt %}[assistant]{% endif %}"


class Adding:
    """A processor that also says something of each token: 7 for all that it returns, 9 in padding."""

    def __init__(self, processor, name, shape=()):
        self.processor, self.name, self.shape = processor, name, shape

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, **options):
        encoded = self.processor(**options)
        more = encoded["attention_mask"] * -2 + 9
        encoded[self.name] = more.reshape(*more.shape, *self.shape)
        return encoded


@LAYOUTS
def test_token_types_go_on_as_text_in_the_responses(fresh, bunny, layout):
    """Gemma 3 and others are told of each token whether it is the image's. Types that are shifted, or lost,
    let text see what only an image may. The boundary cuts them as it cuts the tokens, also where tokens merge
    across it."""
    processor = with_template(bunny, BARE)
    typed = Adding(processor, "types")
    texts = (("a red answ", "ers", "x"), ("Which of them?", "No.", "A red circle."))
    pairs = [pair(*text, noise(i), noise(i + 2)) for i, text in enumerate(texts)]
    batch, without = make_batch(pairs, typed), make_batch(pairs, processor)
    assert {*batch.inputs} == {*without.inputs, "types"}
    assert torch.equal(batch.inputs["input_ids"], without.inputs["input_ids"])
    expected = [[7] * prefix_length(batch, row) for row in range(6)]  # and 0 behind it, in padding as well
    expected = [row + [0] * (batch.labels.shape[1] - len(row)) for row in expected]
    assert batch.inputs["types"].tolist() == expected
    if layout == "packed":
        batch, row_of_types = laid_out(pairs, typed), []
        for row, (n, owner, n_prefix) in enumerate(batch.blocks):
            row_of_types += [7] * n_prefix + [0] * (n - n_prefix) if owner == row else [0] * n
        expected = [row_of_types]
    assert mdpo.forward_inputs(fresh[0], batch)["types"].tolist() == expected


@pytest.mark.parametrize("name, shape", [("types", (1,)), ("labels", ())])
def test_what_a_response_cannot_extend_is_refused(bunny, name, shape):
    """Masks as Mllama's would end with the prompt. Labels as PaliGemma's would reach the model, which would
    compute a loss of its own."""
    with pytest.raises(BadInput, match=f"its processor returns {name}, which a response cannot extend"):
        make_batch(PAIRS[:1], Adding(train.load_processor(str(bunny)), name, shape))


def test_a_batch_is_what_its_docstring_says(loaded):
    """The whole batch, row by row: what whoever writes a loss of his own builds on. Each row, and with its
    prefix each packed one, is what the processor gives for the whole text: other tokens were never meant."""
    _, processor = loaded
    keyed = [one._replace(key=(2, i), id=str(i)) for i, one in enumerate(PAIRS)]
    batch, plain = make_batch(keyed, processor, share=True), make_batch(keyed, processor)
    rows, labels, pad = [], [], processor.tokenizer.pad_token_id
    m_w, m_l = (
        [image for one in keyed for image in getattr(one, of)] for of in ("images", "images_rejected")
    )
    for answer, images in (("chosen", m_w), ("rejected", m_w), ("chosen", m_l)):
        for one, image in zip(keyed, images):
            prompt, response = full_text(processor, one.question, getattr(one, answer))
            whole = processor(text=[prompt + response], images=[image])["input_ids"][0]
            start = len(processor(text=[prompt], images=[image])["input_ids"][0])
            rows.append(whole)
            labels.append([-100] * start + whole[start:])
    n_padding = [max(map(len, rows)) - len(row) for row in rows]
    for made in batch, plain:
        assert made.inputs["input_ids"].tolist() == [row + [pad] * n for row, n in zip(rows, n_padding)]
        mask = [[1] * len(row) + [0] * n for row, n in zip(rows, n_padding)]
        assert made.inputs["attention_mask"].tolist() == mask
        assert made.labels.tolist() == [row + [-100] * n for row, n in zip(labels, n_padding)]
    assert batch.names == ("chosen", "rejected", "image_rejected") and batch.ids == ["0", "1", "2"]
    assert batch.keys == [(2, 0), (2, 1), (2, 2)] and batch.take is None
    assert batch.owner == [0, 1, 2, 0, 1, 2, 6, 7, 8] and plain.owner == [*range(9)]
    assert torch.equal(batch.inputs["pixel_values"], pixels_of(processor, *m_w, *m_l))
    assert torch.equal(plain.inputs["pixel_values"], pixels_of(processor, *m_w, *m_w, *m_l))
    packed = pack(batch)
    taken = batch.inputs["input_ids"].flatten()[packed.take].split([n for n, *_ in packed.blocks])
    for row, (_, owner, n_prefix) in enumerate(packed.blocks):
        prefix = [] if owner == row else taken[owner][:n_prefix].tolist()
        assert prefix + taken[row].tolist() == rows[row]


@LAYOUTS
def test_all_inputs_of_the_model_are_on_its_device(fresh, layout):
    """One that stays behind stops the first step on a GPU."""
    model, processor = fresh
    batch = laid_out(PAIRS[:1], processor, layout)
    inputs = mdpo.forward_inputs(model.to("meta"), batch)
    inputs |= {"features": inputs.pop("mm_encoder_outputs")["image"].pooler_output[0]}
    inputs |= {"mask of y_l": inputs.pop("blocks")[1][3]} if layout == "packed" else {}
    assert {value.device.type for value in inputs.values() if torch.is_tensor(value)} == {"meta"}
    assert batch.labels.device.type == "cpu" and len(inputs) == {"packed": 7, "plain": 4}[layout]


SMALL, LARGE = noise(1, (32, 32)), noise(2, (90, 60))
OTHER_SIZES = [  # rejected images of one's own, and the last as large as the image
    pair("Which?", "There is a red circle here.", "No, there is a blue square.", *images)
    for images in ((SMALL, LARGE), (LARGE, SMALL), (SMALL, SMALL))
]


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_a_response_is_cut_alike_for_all_images_of_its_pair(family):
    """A rejected image of one's own may take more tokens. CoPO would compare 3 tokens of y_w with 9 of it.
    The pair beside it has room, and is cut where its own longest prompt says."""
    _, _, processor = family
    full = make_batch(OTHER_SIZES, processor)
    short, long = prefix_length(full, 0), prefix_length(full, 1)
    assert long > short + 9 and [prefix_length(full, row) for row in range(9)] == [
        short, long, short, short, long, short, long, short, short]  # fmt: skip
    cut = make_batch(OTHER_SIZES, processor, max_length=long + 3)
    lengths, uncut = ((batch.labels >= 0).sum(1).view(3, 3).tolist() for batch in (cut, full))
    (y_w, *_), (y_l, *_), _ = uncut
    assert min(y_w, y_l) > 3 and lengths == [[3, 3, y_w], [3, 3, y_l], [3, 3, y_w]]
    with pytest.raises(BadInput, match=f"prompt of {long} tokens, --max-length {long}: no room"):
        make_batch(OTHER_SIZES, processor, max_length=long)


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
    _, processor = loaded
    noise(3, (20, 50)).save(folder / "b.png")
    names = ["a.png", "b.png", "a.png", "merged_images/llava-1.jpg", "b.png"]
    question = "<image>\n" * 5 + "Which is the odd one?"
    path = write(folder / "x.json", [authors(img_path=None, images=names, prompt=question, rejected="None.")])
    examples = read_examples(path)
    assert examples[0].images == tuple(str(folder / name) for name in names)
    one = Pairs(examples)[0, 0]
    assert one.question == asked("Which is the odd one?", 5)
    assert [image.size for image in one.images_rejected] == [image.size for image in one.images]
    different = [len({image.tobytes() for image in images}) for images in (one.images, one.images_rejected)]
    assert different == [3, 5]
    batch, shared = make_batch([one], processor), laid_out([one], processor)
    assert len(batch.inputs["pixel_values"]) == 3 * 5 and len(shared.inputs["pixel_values"]) == 2 * 5
    assert ((batch.inputs["input_ids"] == processor.image_token_id).sum(1) == 5 * 16).all()
    # The check of the room knows it: a prompt of n tokens has room for two of an answer in n + 2, and none in
    # n.
    n = prefix_length(batch)
    assert len(read_examples(path, processor=processor, max_length=n + 2)) == 1
    with pytest.raises(BadInput, match=f"prompt of {n} tokens, --max-length {n}: no room"):
        read_examples(path, processor=processor, max_length=n)


FAMILY_PAIRS = {
    "one image": PAIRS[:2],
    "different sizes": SIZES,
    "own rejected images of another size": OTHER_SIZES,  # tiles of m_w and m_l are padded apart
    "two images": TWO_IMAGES,
    "turns": [PAIRS[0]._replace(question=CONVERSATION), PAIRS[1]],
    "no image": [pair(*one[:3]) for one in PAIRS],
    "none, one and two images": [pair(*PAIRS[0][:3]), SIZES[1], TWO_IMAGES[0]],
}


@pytest.mark.parametrize("pairs", FAMILY_PAIRS)
def test_each_family_trains_on_the_librarys_own_log_probabilities(family, pairs):
    """A forgotten processor key, position or kind of attention is silent, and wrong by nats: packed rows
    where they are exact, plain rows where they are not (Gemma's image tokens attend both ways, and most of
    its layers see only so far)."""
    folder, model, processor = family
    layout = train.choose_layout(model, processor, FAMILY_PAIRS[pairs])
    assert layout == ("plain" if folder.name == "gemma3" else "packed")
    for layout in {layout, "plain"}:
        assert error_of(model, processor, FAMILY_PAIRS[pairs], layout) < 1e-5


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


def test_each_family_trains_in_bf16(family):
    """What a GPU runs, on the CPU: bf16 weights, a float32 adapter, and no autocast to hide a tensor of the
    wrong type."""
    folder, *_ = family
    model, processor = train.load_model(str(folder), dtype=torch.bfloat16)
    layout = train.choose_layout(model, processor, SIZES)
    assert layout == ("plain" if folder.name == "gemma3" else "packed")
    model = train.add_lora(model, 8, 16).train()
    train.enable_checkpointing(model)
    losses, _ = mdpo_step(model, laid_out(SIZES, processor, layout))
    assert losses.tolist() == pytest.approx([3 * math.log(2)] * 2, abs=1e-6)
    losses.mean().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in gradients)


def test_each_family_trains_saves_reloads_and_answers(family, small, tmp_path):
    """A family that only loads is no use: two steps by the command, then the adapter on a fresh model."""
    folder, *_ = family
    out = tmp_path / "out"
    assert train.main(command(folder, small, out, "--lr", "0.05")) == 0
    losses = [record["loss"] for record in log_of(out)]
    assert losses[0] == pytest.approx(3 * math.log(2), abs=1e-5) and losses[-1] < losses[0]
    model, processor = train.load_model(str(folder))
    model = peft.PeftModel.from_pretrained(model, out).eval()
    decoder = model.get_base_model().get_decoder()
    linear = {m for m in decoder.modules() if isinstance(m, peft.tuners.lora.Linear)}
    adapted = {m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert len(adapted) == 14 and adapted == linear  # 2 layers: q, k, v, o, gate, up, down
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in adapted)
    (answer,) = generate_answers(model, processor, [(PAIRS[0].images, PAIRS[0].question)], max_new_tokens=3)
    assert isinstance(answer, str)


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

    def plus_one(model, batch):
        return positions(model, batch) + (batch.labels >= 0).int()

    monkeypatch.setattr(mdpo, "row_positions", plus_one)


def other_masks(monkeypatch, change):
    blocks = mdpo.attention_blocks

    def changed(*args):
        return [
            (n, owner, prefix, mask) if mask is None else (n, owner, *change(prefix, mask.clone()))
            for n, owner, prefix, mask in blocks(*args)
        ]

    monkeypatch.setattr(mdpo, "attention_blocks", changed)


def a_token_too_many(monkeypatch):
    def one_more(prefix, mask):
        return prefix + 1, F.pad(mask, (1, 0))

    other_masks(monkeypatch, one_more)


def a_key_forgotten(monkeypatch):
    def without_the_middle(prefix, mask):
        return prefix, mask.index_fill(-1, torch.tensor(prefix // 2), -torch.inf)

    other_masks(monkeypatch, without_the_middle)


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


def test_the_check_costs_one_pass_of_each_layout(fresh):
    """At real size on a CPU each pass costs as much as a training example."""
    model, processor = fresh
    seen = outputs_of(model)
    assert train.choose_layout(model, processor, PAIRS[:2]) == "packed"
    assert [len(output.logits) for output in seen] == [6, 1]


def test_nan_never_passes_the_check(fresh):
    """nan is neither above nor below a tolerance: packed rows that are not finite, as on purpose where a
    model keeps an attention of its own, would be taken for exact. A model whose plain rows are not finite
    would stop at its first step, with no reason given."""
    model, processor = fresh
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


@pytest.mark.parametrize(
    "user, expected",
    [
        ({}, [None, "expandable_segments:True"]),
        ({"PYTORCH_ALLOC_CONF": "x"}, ["x", None]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "y"}, [None, "y"]),
    ],
)
def test_the_allocator_grows_its_segments_unless_the_user_set_it(user, expected):
    """Shapes never repeat, and freed blocks of other sizes would not be used again. CUDA reads it when it
    starts."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    script = "import os, sys; sys.modules['peft'] = None\n"  # imported first; torch is not reached
    script += f"try: import train\nexcept ImportError: print([os.environ.get(n) for n in {names}])"
    clean = {name: value for name, value in os.environ.items() if name not in names}
    said = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, env=clean | user, text=True)
    assert said.strip() == str(expected)


def test_plain_rows_are_there_for_models_that_packed_rows_stop(fresh, monkeypatch):
    """--layout plain is the way out for a model that cannot take a packed row at all, such as one whose
    layers are no attention: it must not be refused for what it was not asked to do."""
    model, processor = fresh

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


def changed_copy(folder, to, file="config.json", **values):
    """A copy of a model's folder with other values in one of its JSON files."""
    shutil.copytree(folder, to)
    write(to / file, json.loads((to / file).read_text()) | values)
    return to


def test_models_that_cannot_be_trained_are_refused_before_their_weights_are_read(
    tmp_path, bunny, llava, monkeypatch
):
    """The reason and what to do, in one line, and not after a download of gigabytes. The library speaks of
    missing keys, of an argument that does not exist here, or of NoneType."""
    folders = {name: tmp_path / name for name in ("text", "florence", "git", "silent", "adapter", "code")}
    transformers.LlamaConfig().save_pretrained(folders["text"])
    transformers.Florence2Config().save_pretrained(folders["florence"])
    transformers.GitConfig().save_pretrained(folders["git"])
    shutil.copytree(llava, folders["silent"], ignore=shutil.ignore_patterns("chat_template*"))
    write(folders["adapter"] / "adapter_config.json", {"peft_type": "LORA"})
    write(folders["code"] / "config.json", {"model_type": "weird_vl", "auto_map": {"AutoConfig": "conf.W"}})
    folders["small"] = changed_copy(bunny, tmp_path / "small", vocab_size=20)
    folders["patchless"] = changed_copy(
        llava, tmp_path / "patchless", "processor_config.json", patch_size=None
    )
    for name, reason in {
        "text": "cannot be loaded: Unrecognized processing class",
        "florence": "is an encoder-decoder",
        "silent": "does not have a chat template",
        "small": "has no token of nine tabs",
        "adapter": "is an adapter: merge it first, by python examples/merge.py",
        "code": "needs code of its own, which is not run here",
        "patchless": "its processor has no patch_size",
    }.items():
        with pytest.raises(BadInput, match=reason):
            train.load_processor(str(folders[name]))

    def without_image_token(*args, **options):
        return SimpleNamespace()

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", without_image_token)
    with pytest.raises(BadInput, match="has no image token"):
        train.load_processor(str(folders["git"]))


def test_code_of_a_model_that_the_library_knows_is_not_needed(llava, tmp_path):
    """Many folders of the hub still name the code that they came with."""
    copied = changed_copy(llava, tmp_path / "model", auto_map={"AutoConfig": "conf.W"})
    assert train.load_processor(str(copied)).image_token == "<image>"


def test_turns_and_several_images_are_read_and_shown(folder, loaded):
    """Every image is shown where the conversation shows it, and each is rejected on its own."""
    _, processor = loaded
    (example,) = examples = read_examples(write(folder / "x.json", [TURNS]), processor=processor)
    assert [message["role"] for message in example.question] == ["system", "user", "assistant", "user"]
    assert [Path(image).name for image in example.images] == ["a.png", "llava-1.jpg"]
    one = Pairs(examples)[0, 0]
    for image, rejected in zip(one.images, one.images_rejected, strict=True):
        assert image.size == rejected.size and image.tobytes() != rejected.tobytes()
    text = re.sub(r"\s", "", written(processor, one)[0][0])
    first, _, second = text.partition("ASSISTANT:Acat.")
    assert re.search(r"Bebrief\.(USER:)?IMAGEWhatisit\?$", first) and second.count("IMAGE") == 1
    (example,) = examples = read_examples(write(folder / "x.json", [TURNS]), with_images=False)
    assert example.images == () and "IMAGE" not in written(processor, Pairs(examples)[0, 0])[0][0]


BUNNYS_NAMES = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}


def under_bunnys_names(model):
    """The weights of a loaded model, under the checkpoint's names."""
    weights = {}
    for name, tensor in model.state_dict().items():
        ours = next((ours for ours in BUNNYS_NAMES if name.startswith(ours)), "")
        weights[BUNNYS_NAMES.get(ours, "") + name.removeprefix(ours)] = tensor
    return weights


def weights_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_every_bunny_weight_lands_in_its_place(bunny):
    """A tensor left out would be random: the run would go on, and be worthless."""
    model, _ = train.load_model(str(bunny))
    ours, theirs = under_bunnys_names(model), weights_of(bunny)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor.float()) for name, tensor in theirs.items())
    assert model.config.vision_config.num_hidden_layers == 2 and model.config.image_seq_length == 16


def eye_by_hand(weights, image):
    """What the language model is given of an image, by the arithmetic of SigLIP and Bunny's projector: (16,
    32).

    Patches of 8 pixels, 2 layers 32 wide with 16 heads, then Linear, GELU, Linear. `weights` under the
    checkpoint's names.
    """
    side = max(image.size)  # to a square, on the mean colour 0.5 * 255 = 127, the image in the middle
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((32, 32), Image.Resampling.BICUBIC)
    x = torch.tensor(list(square.tobytes()), dtype=torch.float64).view(32, 32, 3) / 255
    x = (x - 0.5) / 0.5
    # By rows of patches; in each by colour, y and x.
    patches = x.view(4, 8, 4, 8, 3).permute(0, 2, 4, 1, 3).reshape(16, 3 * 8 * 8)
    tower, projector = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."

    def linear(x, name):
        return x @ weights[name + ".weight"].flatten(1).T + weights[name + ".bias"]

    def layer_norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * weights[name + ".weight"] + weights[name + ".bias"]

    h = linear(patches, tower + "embeddings.patch_embedding")
    h = h + weights[tower + "embeddings.position_embedding.weight"]
    for layer in (tower + "encoder.layers.0.", tower + "encoder.layers.1."):
        y = layer_norm(h, layer + "layer_norm1")
        heads = (linear(y, f"{layer}self_attn.{name}_proj").view(16, 16, 2).transpose(0, 1) for name in "qkv")
        q, k, v = heads  # (heads, patches, 2)
        seen = ((q @ k.transpose(1, 2)) / math.sqrt(2)).softmax(-1) @ v
        h = h + linear(seen.transpose(0, 1).reshape(16, 32), layer + "self_attn.out_proj")
        y = linear(layer_norm(h, layer + "layer_norm2"), layer + "mlp.fc1")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        h = h + linear(y, layer + "mlp.fc2")
    y = linear(h, projector + "0")  # no norm behind the last layer
    return linear(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), projector + "2")


@pytest.mark.parametrize("size", [(48, 32), (20, 50), (32, 32)])
def test_bunnys_eye_by_hand(fresh, size):
    """Features of another layer, CLIP's mean and deviation, a picture squeezed where it should be padded: a
    wrong model would train in silence, since packed and plain rows and the reference would all be wrong
    alike."""
    model, processor = fresh
    torch.manual_seed(0)
    for parameter in [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
    ]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {name: tensor.double() for name, tensor in under_bunnys_names(model).items()}
    seen = outputs_of(model.model.multi_modal_projector)
    response_logps(model, laid_out([pair(*PAIRS[0][:3], noise(1, size), noise(2, size))], processor))
    expected = torch.stack([eye_by_hand(weights, noise(seed, size)) for seed in (1, 2)])
    torch.testing.assert_close(torch.cat(seen).view(2, 16, 32).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_bunny_in_one_file_is_the_same_model(bunny, tmp_path):
    """Small checkpoints have no index of shards; the sizes of the vision tower are then read off the one
    file."""
    folder = tmp_path / "bunny"
    shutil.copytree(bunny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights_of(bunny), folder / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = (train.load_model(str(path))[0].state_dict() for path in (folder, bunny))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_activation_of_bunny_is_its_own_in_one_kernel(fresh, bunny):
    """Bunny's config asks for gelu_new, eight kernels in the library; another function would be another
    model. In float64 rounding hides no difference."""
    assert json.loads((bunny / "config.json").read_text())["hidden_act"] == "gelu_new"
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
    by_hand = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ours = fresh[0].get_decoder().layers[0].mlp.activation_fn(x)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, by_hand)]
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


def test_every_rate_of_dropout_is_0(loaded):
    """Bunny asks for resid_pdrop 0.1, this LLaVA for attention_dropout 0.1, and models call it as they like.
    Left on, policy and reference differ by chance: rewards are noise."""
    layer = torch.nn.Linear(1, 1)
    for name in ("resid_pdrop", "attn_drop", "drop_prob", "attention_dropout", "dropout"):
        setattr(layer, name, 0.1)
    model = torch.nn.Sequential(layer, torch.nn.Dropout(0.1))
    train.disable_dropout(model)
    for model in model, loaded[0]:
        rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        kept = [vars(module).items() for module in model.modules()]
        rates += [rate for of in kept for name, rate in of if "drop" in name and isinstance(rate, float)]
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


def test_options_of_a_step_reach_the_loss_or_are_refused(bunny):
    """`mdpo_step(model, batch, beta=...)` is how who writes a loop of his own sets them. A wrong name that is
    swallowed trains with the defaults; a metric that keeps its graph keeps the activations of every step that
    is logged."""
    model, processor = with_lora(bunny)
    move(model)
    batch = make_batch(PAIRS, processor)
    with model.disable_adapter():
        ref = LogPs(*(logp.detach() for logp in response_logps(model, batch)))
    losses, metrics = mdpo_step(model, batch, beta=0.5, delta=0.2, anchors=("rejected",))
    expected, of_loss = mdpo_loss(response_logps(model, batch), ref, 0.5, 0.2, True, ("rejected",))
    torch.testing.assert_close(losses, expected)
    assert metrics.keys() == {"loss", *of_loss} and metrics["rewards/image_rejected"].abs().min() > 0
    assert losses.requires_grad and not any(value.requires_grad for value in metrics.values())
    with pytest.raises(TypeError, match="bta"):
        mdpo_step(model, batch, bta=0.5)


def test_a_projector_that_is_trained_is_refused(bunny):
    """Policy and reference share its output, so it would get no gradient, or move the reference."""
    model, processor = with_lora(bunny)
    for parameter in model.get_base_model().model.multi_modal_projector.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="must be frozen"):
        mdpo_step(model, make_batch(PAIRS, processor))


@pytest.mark.parametrize("family", ["bunny", "llava"])
def test_lora_is_on_every_linear_layer_of_the_language_model_and_trains(family, request):
    """A layer without gradient (reentrant checkpointing does that) or an adapter in the vision tower is a
    silent bug."""
    model, processor = with_lora(request.getfixturevalue(family))
    layers = dict(model.get_base_model().model.language_model.named_modules())
    linear = [n for n, m in layers.items() if type(m) is torch.nn.Linear and ".lora_" not in n]
    assert sorted(linear) == sorted(n for n in layers if n.endswith("base_layer"))
    assert len(linear) == len([n for n in layers if n.endswith("lora_A")]) > 0
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(linear)
    assert all(".language_model." in n and ".lora_" in n for n in trainable)
    move(model)  # B starts at 0, which would leave A without a gradient
    mdpo_step(model, make_batch(PAIRS, processor))[0].mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_layers_compute_what_pefts_own_do(bunny, dtype):
    """The adapter is saved for peft to load: were its forward pass another one, it would be another model
    there."""
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


def test_one_wrong_row_of_six_is_enough(fresh, monkeypatch, capsys):
    """Mistakes of packing are of single rows: an example's first row is always right. Two pairs have six
    rows; one log-probability is off by twice what is accepted, so that their mean is a third of it. What that
    costs is said, and who asked for packed rows does not get others."""
    model, processor = fresh
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
    said = capsys.readouterr().out
    assert "packed rows are not exact" in said and "about twice as long" in said
    with pytest.raises(BadInput, match="cannot be trained: packed rows are not exact"):
        train.choose_layout(model, processor, PAIRS[:2], "packed")


@LAYOUTS
def test_answers_that_agree_at_first_do_not_stop_the_check(bunny, layout):
    """The check of packed rows cuts long answers. Two that agree so far are good data all the same."""
    model, processor = train.load_model(bunny)
    model = train.add_lora(model, 4, 8)
    long = "There is a red circle. " * 60
    pairs = [pair("What is it?", long + "Yes.", long + "No.", noise(1), noise(2))]
    assert train.choose_layout(model, processor, pairs, layout) == layout
