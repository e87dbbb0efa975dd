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
from functools import partial
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
from data import BadInput, Example, Pairs, make_batch, read_examples
from examples import families
from mdpo import LogPs, attention_blocks, mdpo_loss, mdpo_step, pack, response_logps
from test_mdpo import ANCHOR, CONDITIONAL, DPO, HUB_LLAVA_TEMPLATE, LAYOUTS, PAIRS, POLICY, REF, ROOT
from test_mdpo import asked, authors, command, full_text, laid_out, largest_error, message, move, noise, pair
from test_mdpo import prefix_length, with_lora, worked_example, write
from tests.helpers import CHAT, DPO_NAMES, PARTS, SIZES, TURNS, outputs_of, pixels_of, preceded

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


TOWER = "transformers.models.siglip.modeling_siglip.SiglipVisionModel.forward"


@pytest.fixture
def fresh(bunny):
    """(model, processor) of a Bunny that a test may change."""
    return train.load_model(str(bunny))


def test_each_image_of_a_step_is_encoded_once(bunny, small, tmp_path):
    """Vision towers are a third of a step: policy and reference share an encoding, of the same two images an
    example."""
    sizes = []
    with preceded(TOWER, lambda tower, pixel_values, **options: sizes.append(len(pixel_values))):
        assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1)) == 0
    # Micro-batches of 2, 2, 2 and 1 examples. The check of the rows comes before them.
    assert sizes[-4:] == [4, 4, 4, 2]


STEPS = {torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.float32: 2**-13}


@pytest.mark.parametrize("policy_dtype", STEPS)
@pytest.mark.parametrize("ref_dtype", STEPS)
def test_half_precision_is_raised_to_float32(policy_dtype, ref_dtype):
    """Steps are 4 nats wide at -1000 in bf16: subtracted there, -1000 + 3 + 1/64 is -996. The step is one
    that `ref_dtype` resolves at 3, so that a type with fewer bits loses it. A policy in float64 stays so: the
    loss can be checked to the last bit."""
    step = STEPS[ref_dtype]
    policy = LogPs(*torch.tensor([[-1000], [-1004], [-1000]], dtype=policy_dtype))
    ref = LogPs(*torch.tensor([[-3 - step], [-3], [-3]], dtype=ref_dtype))
    losses, metrics = mdpo_loss(policy, ref, beta=1.0)
    assert {values.dtype for values in (losses, *metrics.values())} == {torch.float32}  # no booleans
    assert metrics["rewards/chosen"].item() == -997 + step and metrics["rewards/margins"].item() == 4 + step
    losses, _ = mdpo_loss([logp.double() for logp in POLICY], REF, beta=0.5)
    assert losses.item() == pytest.approx(DPO + CONDITIONAL + ANCHOR, abs=1e-15)


ODD_TEXTS = {  # (question, chosen, rejected)
    "emoji": ("What is 🦄 doing?", "It is 🏃‍♀️ running, naïvely.", "Это 東京 🗼."),
    "looks like the template": ("USER: Hi ASSISTANT: no", "No. USER: and now? ASSISTANT: Yes.", "ASSISTANT:"),
    "newlines at either end": ("\n\nWhat is it?\n", "\nA red circle.\n\n", "\n\n"),
    "end of sequence inside": ("What is it?", "A red circle.EOS It is red.", "A blue square.EOS"),
    "one character": ("?", "a", "b"),
    "one begins as the other": ("What is it?", "A red", "A red circle"),
    "private use": ("What is \ue000 in \ue000 it?", "A \ue000 circle.", "\ue000"),
    "spaces": ("What  is   it?", "  A  red    circle. ", " A  red    square. "),
}


@LAYOUTS
@pytest.mark.parametrize("texts", ODD_TEXTS)
def test_odd_texts_are_scored_exactly(loaded, texts, layout):
    """A boundary that is guessed instead of found, a stand-in that the text holds, or a second BOS: each of
    them scores other tokens than the model will produce, in silence."""
    eos = loaded[1].tokenizer.eos_token
    odd = pair(*(text.replace("EOS", eos) for text in ODD_TEXTS[texts]), noise(1), noise(2))
    assert largest_error(*loaded, [PAIRS[1], odd], layout) < 1e-5


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_a_sequence_has_one_bos(llava, bos):
    """Llama's tokenizer adds <s>, and some templates write it as well: twice, or not at all, is not what the
    model knows."""
    processor = with_template(llava, bos + HUB_LLAVA_TEMPLATE)
    for one in PAIRS[0], pair(*PAIRS[0][:3]):
        ids = make_batch([one], processor).inputs["input_ids"][0].tolist()
        assert ids[0] == processor.tokenizer.bos_token_id == 1 and ids.count(1) == 1


def test_logits_are_raised_to_float32():
    """A log-softmax in bf16 is off by hundredths of a nat a token. Held to a float64 one of the very same
    bf16 logits, for the tokens 1 2 0, 3 0 and 1 2 0 of the worked example."""
    logits = torch.randn(1, 8, 10, generator=torch.manual_seed(0)).bfloat16()
    model = lambda **inputs: SimpleNamespace(logits=logits)
    logps = response_logps(model, pack(worked_example()), {"input_ids": None})
    by_token = logits[0].double().log_softmax(-1)[range(8), [1, 2, 0, 3, 0, 1, 2, 0]]
    expected = [part.sum().item() for part in by_token.split([3, 2, 3])]
    assert [logp.item() for logp in logps] == pytest.approx(expected, abs=1e-5)


# Of each token, a line, which ones it sees. Rows 0 and 1 have prefixes of 3 and 1 tokens and responses of 2.
# Rows 2 and 3 are responses of 3 tokens and 1 to the prefix of row 0, row 4 is one of 4 to that of row 1.
SEEN = """
    x....|...|...|.|....
    xx...|...|...|.|....
    xxx..|...|...|.|....
    xxxx.|...|...|.|....
    xxxxx|...|...|.|....
    .....|x..|...|.|....
    .....|xx.|...|.|....
    .....|xxx|...|.|....
    xxx..|...|x..|.|....
    xxx..|...|xx.|.|....
    xxx..|...|xxx|.|....
    xxx..|...|...|x|....
    .....|x..|...|.|x...
    .....|x..|...|.|xx..
    .....|x..|...|.|xxx.
    .....|x..|...|.|xxxx
"""


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_attention_of_a_packed_row_is_attention_under_its_mask(kv_heads):
    """Values and gradients against one dense mask. No response sees another."""
    blocks = [(5, 0, 3), (3, 1, 1), (3, 0, 3), (1, 0, 3), (4, 1, 1)]  # (tokens, whose prefix, its length)
    dense = torch.tensor([[mark == "x" for mark in line] for line in SEEN.replace("|", "").split()])
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 16, 8, requires_grad=True) for heads in (2, kv_heads, kv_heads)]
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2 // kv_heads)
    ours, _ = mdpo.packed_attention(module, *inputs, None, attention_blocks(blocks), scaling=0.3)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=dense, scale=0.3, enable_gqa=True)
    results = [[y, *torch.autograd.grad(y.square().sum(), inputs)] for y in (ours, theirs.transpose(1, 2))]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_rows_set_their_attention_which_is_sdpa_for_all_else(fresh, tmp_path, implementation):
    """Plain rows, generation and a saved model must not know that it was ever replaced. Under any other, each
    token would see all before it, of other sequences and images: wrong by nats, and silent. So packed rows
    are nan where a user or a library sets it back later."""
    model, processor = fresh
    model.set_attn_implementation(implementation)
    batch = make_batch(PAIRS, processor)
    texts = ["There is a red circle.", "There"]  # the second is padded, and must not see that
    inputs = processor(text=texts, return_tensors="pt", padding=True, padding_side="left")

    def of_all_else():
        logps = torch.cat(response_logps(model, batch))
        return logps, model(**inputs).logits[:, -1], model.generate(**inputs, max_new_tokens=8)

    same = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    before = of_all_else()
    same(torch.cat(response_logps(model, pack(batch))), before[0])
    assert model.config.text_config._attn_implementation == "packed"
    same(of_all_else(), before)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation(implementation)
    assert not torch.cat(response_logps(model, pack(batch))).isfinite().any()
    same(of_all_else(), before)


def test_dpo_computes_no_row_of_the_rejected_image(loaded):
    """conditional=False, anchors=() must cost one image and one prefix an example, not two."""
    model, processor = loaded
    batch = laid_out(PAIRS, processor, names=DPO_NAMES)
    assert len(batch.inputs["pixel_values"]) == len(PAIRS)
    assert len(batch.take) == batch.inputs["attention_mask"][:3].sum() + (batch.labels[3:] >= 0).sum()
    assert response_logps(model, batch).image_rejected is None


def written(processor, one):
    """The rows of y_w and y_l as text: "prefix|response" each, with EOS and IMAGE for these tokens."""
    batch, texts = make_batch([one], processor, DPO_NAMES), []
    rows = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), batch.labels
    for ids, mask, labels in zip(*rows):
        scored = labels >= 0
        assert torch.equal(labels[scored], ids[scored])
        text = "|".join(map(processor.tokenizer.decode, (ids[mask & ~scored], ids[scored])))
        text = text.replace(processor.tokenizer.eos_token, "EOS")
        texts.append(text.replace(processor.image_token * 16, "IMAGE"))
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


PLACED = CHAT.replace("END", "{{ eos_token }}")
# An answer without a think block gets an empty one, and reasoning of earlier turns is dropped, as Qwen3 does.
THINKING = PLACED.replace(
    PARTS,
    "{% set text %}" + PARTS + "{% endset %}{% if m.role != 'assistant' %}{{ text }}{% else %}"
    "{% set parts = text.split('</think>') %}{% if loop.last %}"
    "<think>{{ parts[0].split('<think>')[1] if parts | length > 1 }}</think>{% endif %}"
    "{{ parts[-1] | trim }}{% endif %}",
)
ENDS_TURNS = CHAT.replace("END", "<end>\n")  # as Gemma, whose end-of-sequence is another token
PRINTS = PLACED.replace(PARTS, "{{ m.content }}")
JOINS = PRINTS.replace("{{ m.content }}", "{{ m.content + '' }}")  # a list and a text: an error
ASKS = "{% if m.content is not string %}{{ raise_exception('text, please') }}{% endif %}"
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
ASKED_AGAIN = [message("user", "Is it?"), message("assistant", THOUGHT), message("user", "And it?")]
CONVERSATION = [
    message("system", "Be brief."),
    message("user", " Hello. "),
    message("assistant", "Hi"),
    message("user", "IMAGE", "What is it? "),
]
PRINTED = "Is it {'type': 'text', 'text': 'x'}?"
THOUGHT_EARLIER = "[user]Is it?EOS[assistant]Yes.EOS[user]And it?EOS[assistant]<think></think>"
# (template, None for Bunny's own; what both rows begin with|y_w|y_l; what is asked and answered, if it is
# not ASKED). With IMAGE in it, the pair has images.
ASKED = ("Which?", "No.", "Yes.")
OF_TEXT = "[user]Which?EOS[assistant]|No.EOS|Yes.EOS"
OF_IMAGE = "[user]IMAGEWhich?EOS[assistant]|No.EOS|Yes.EOS"
WRITTEN = {
    "what opens the assistant's turn is the prompt's, generation prompt or not": (
        PLACED.replace("[{{ m.role }}]", "{{ m.role }}: ").partition("{% if add")[0],
        "user: Which?EOSassistant:| No.EOS| Yes.EOS"),
    "what follows the end is never generated": (
        PLACED.replace("]", "]\n").replace("eos_token }}", "eos_token }}\n"),
        "[user]\nWhich?EOS\n[assistant]\n|No.EOS|Yes.EOS", "Which?", "No.", "Yes.EOS Or no."),
    "answers are trimmed": (
        PLACED.replace("p.text", "p.text | trim"), OF_TEXT, "Which?", " No.\n", "\nYes. "),
    "the end of a turn is scored once, and no end-of-sequence, which is never reached": (
        ENDS_TURNS, "[user]IMAGEWhich?<end>\n[assistant]|No.<end>|Yes.<end>"),
    "the end of a turn is scored without a generation prompt, too": (
        ENDS_TURNS.partition("{% if add")[0], "[user]Which?<end>\n[assistant]|No.<end>|Yes.<end>"),
    "an end-of-sequence inside ends the response, and the turn": (
        ENDS_TURNS, "[user]Which?<end>\n[assistant]|No.EOS|Yes.<end>", "Which?", "No.EOS Or yes.", "Yes."),
    "a plain answer gets the template's empty think block": (
        THINKING, "[user]IMAGEWhich?EOS[assistant]<think></think>|No.EOS|Yes.EOS"),
    "an answer keeps the think block that it brings": (
        THINKING, "[user]IMAGEWhich?EOS[assistant]<think>|A ring?</think>Yes.EOS|</think>No.EOS",
        "Which?", THOUGHT, "No."),
    "an answer keeps its think block in the other row as well": (
        THINKING, "[user]Which?EOS[assistant]<think>|</think>No.EOS|A ring?</think>Yes.EOS",
        "Which?", "No.", THOUGHT),
    "reasoning of an earlier turn is dropped": (
        THINKING, f"{THOUGHT_EARLIER}|No.EOS|Yes.EOS", ASKED_AGAIN, "No.", "Yes."),
    "messages that are printed are given as text": (PRINTS, OF_TEXT),
    "messages that are joined are given as text": (JOINS, OF_TEXT),
    "messages whose parts are refused are given as text": (
        PLACED.replace(PARTS, ASKS + "{{ m.content }}"), OF_TEXT),
    "messages without an image are given as text": (TEXT_OR_PARTS, OF_TEXT),
    "messages with an image are given as parts": (TEXT_OR_PARTS, OF_IMAGE),
    "a question about a printed part is a question": (
        PLACED, f"[user]IMAGE{PRINTED}EOS[assistant]|A {{'type': 'text'}}.EOS|Yes.EOS",
        PRINTED, "A {'type': 'text'}.", "Yes."),
    "where a system text would be refused, a question without it is good": (
        SYSTEM_IF.replace("CONDITION", "loop.last"), OF_IMAGE),
    "earlier answers of Bunny end as the last one does": (
        None, "Be brief. USER:  Hello.  ASSISTANT: HiEOSUSER: IMAGE\nWhat is it?  ASSISTANT:| No.EOS| OK.EOS",
        CONVERSATION, "No.", "OK."),
    # "answers" is one token: tokenised apart, the model would be scored on text that it never produces. The
    # boundary moves back to the last token that all three texts share.
    "tokens merge across the boundary": (BARE, "a red| answersEOS| answxEOS", "a red answ", "ers", "x"),
    "tokens merge across the boundary in the other answer": (
        BARE, "a red| answxEOS| answersEOS", "a red answ", "x", "ers"),
    "tokens merge across the boundary behind an image": (
        BARE, "IMAGEa red| answersEOS| answxEOS", "a red answ", "ers", "x"),
    "the boundary never moves past an image": (
        BARE, "a red answIMAGE|ersEOS|xEOS", [message("user", "a red answ", "IMAGE")], "ers", "x"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_what_a_template_writes_is_what_is_scored(bunny, case):
    """Every template has ways of its own to open, end and fill a turn. Trained on a text that it does not
    write, the model would learn what it is never asked, or never to stop."""
    template, expected, *texts = WRITTEN[case]
    prefix, *responses = expected.split("|")
    processor = with_template(bunny, template)
    question, *answers = texts or ASKED
    answers = [answer.replace("EOS", processor.tokenizer.eos_token) for answer in answers]
    images = (noise(1), noise(2)) if "IMAGE" in prefix else ()
    assert written(processor, pair(question, *answers, *images)) == [f"{prefix}|{y}" for y in responses]


IN_ANOTHER_WAY = "writes the question in another way when a response follows"
SYSTEM_AND_QUESTION = [message("system", "Be brief."), message("user", "IMAGE", "Which?")]
REFUSED = {  # (template, number of images, question, what the message says)
    "an image would be printed": (PRINTS, 1, "Which?", "the chat template does not take these messages"),
    "an image would be joined": (JOINS, 1, "Which?", "the chat template does not take these messages"),
    "a system text moves": (
        SYSTEM_IF.replace("CONDITION", "loop.last"), 1, SYSTEM_AND_QUESTION, IN_ANOTHER_WAY),
    "a system text is dropped": (
        SYSTEM_IF.replace("CONDITION", "messages | length < 3"), 1, SYSTEM_AND_QUESTION, IN_ANOTHER_WAY),
    "the text before the image changes": (USER_OR_HUMAN, 1, "Which?", IN_ANOTHER_WAY),
    "the end depends on the answer": (
        CHAT.replace("END", "{{ m.content[0].text | length }}"), 0, "Which?", "in another way"),
    "a row has no prompt": (
        BARE.replace("messages", "messages if m.role == 'assistant'"), 0, "Which?", "no room for a response"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_trained_is_refused(bunny, case):
    """The model would be trained on a prompt that it is never given: without its system text, or with
    "[{'type': 'text', ..." in it."""
    template, n_images, question, problem = REFUSED[case]
    images = [[noise(n)] * n_images for n in (1, 2)]
    with pytest.raises(BadInput, match=problem):
        make_batch([pair(question, "No.", "Yes.", *images)], with_template(bunny, template))


@pytest.fixture
def adds(bunny, monkeypatch):
    """adds(name, shape) is a processor that also says something of each token: 7, and 9 in padding."""
    processor = with_template(bunny, BARE)
    call = type(processor).__call__

    def adding(name, shape=()):
        def with_more(*args, **options):
            encoded = call(*args, **options)
            more = 9 - 2 * encoded["attention_mask"]
            encoded[name] = more.reshape(more.shape + shape)
            return encoded

        monkeypatch.setattr(type(processor), "__call__", with_more)
        return processor

    return adding


@LAYOUTS
def test_token_types_go_on_as_text_in_the_responses(fresh, adds, layout):
    """Gemma 3 and others are told of each token whether it is the image's. Types that are shifted, or lost,
    let text see what only an image may. The boundary cuts them as it cuts the tokens, also where tokens merge
    across it."""
    batch = laid_out([pair("a red answ", "ers", "x", noise(1), noise(2)), PAIRS[1]], adds("types"), layout)
    expected = 7 * ((batch.labels >= 0).cumsum(1) == 0)  # 0 in a response, and in padding as well
    assert torch.equal(batch.inputs["types"], expected)
    if layout == "packed":
        expected = expected.flatten()[batch.take][None]
    assert torch.equal(mdpo.forward_inputs(fresh[0], batch)["types"], expected)


@pytest.mark.parametrize("name, shape", [("types", (1,)), ("labels", ())])
def test_what_a_response_cannot_extend_is_refused(adds, name, shape):
    """Masks as Mllama's would end with the prompt. Labels as PaliGemma's would reach the model, which would
    compute a loss of its own."""
    with pytest.raises(BadInput, match=f"its processor returns {name}, which a response cannot extend"):
        make_batch(PAIRS[:1], adds(name, shape))


def test_a_batch_is_what_its_docstring_says(loaded):
    """The whole batch, row by row: what whoever writes a loss of his own builds on. Each row is what the
    processor gives for the whole text: other tokens were never meant."""
    _, processor = loaded
    keyed = [one._replace(key=(2, i), id=str(i)) for i, one in enumerate(PAIRS)]
    texts = [full_text(processor, *one[:3]) for one in PAIRS]  # prompt, y_w, y_l
    images = [one.images for one in PAIRS] * 2 + [one.images_rejected for one in PAIRS]
    encode = partial(processor, images=images, padding=True, padding_side="right", return_tensors="pt")
    ids, mask, pixels = encode(text=[of[0] + of[n] for n in (1, 2, 1) for of in texts]).values()
    starts = encode(text=[prompt for prompt, *_ in texts] * 3)["attention_mask"].sum(1, keepdim=True)
    labels = ids.where(mask.bool() & (torch.arange(ids.shape[1]) >= starts), -100)
    for share, owner in (False, [*range(9)]), (True, [0, 1, 2, 0, 1, 2, 6, 7, 8]):
        batch = make_batch(keyed, processor, share=share)
        assert batch.names == ("chosen", "rejected", "image_rejected") and batch.owner == owner
        assert batch.ids == ["0", "1", "2"] and batch.keys == [(2, 0), (2, 1), (2, 2)]
        expected = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels[sorted({*owner})]}
        torch.testing.assert_close([batch.inputs, batch.labels], [expected, labels], rtol=0, atol=0)


@LAYOUTS
def test_all_inputs_of_the_model_are_on_its_device_and_as_its_layers_want_them(fresh, layout):
    """One that stays behind stops the first step on a GPU. In the model's dtype: else each layer converts the
    masks, and some vision towers (Aria's, Llama 4's) stop with an error at a processor's float32. Rows of a
    mask begin at multiples of 16 numbers, as CUDA's kernels want them, or each layer copies it."""
    batch, pixels = laid_out(PAIRS[:1], fresh[1], layout), []
    with preceded(TOWER, lambda tower, pixel_values, **options: pixels.append(pixel_values)):
        inputs = mdpo.forward_inputs(fresh[0].to("meta", torch.bfloat16), batch)
    assert ("attention_mask" in inputs) == (layout == "packed")  # plain rows need none
    masks = [mask for *_, mask in inputs.get("blocks", ()) if mask is not None]  # of y_l
    features = inputs["mm_encoder_outputs"]["image"].pooler_output
    tensors = filter(torch.is_tensor, [*inputs.values(), *features, *pixels, *masks])
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in (*pixels, *masks)} == {torch.bfloat16}
    assert not any(mask.stride(2) % 16 for mask in masks) and batch.labels.device.type == "cpu"


SMALL, LARGE = noise(1, (32, 32)), noise(2, (90, 60))
OTHER_SIZES = [  # rejected images of one's own, and the last as large as the image
    pair("Which?", "There is a red circle here.", "No, there is a blue square.", *images)
    for images in ((SMALL, LARGE), (LARGE, SMALL), (SMALL, SMALL))
]


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_a_response_is_cut_alike_for_all_images_of_its_pair(family):
    """A cut image leaves fewer tokens than features. A rejected image of one's own may take more tokens: CoPO
    would compare 3 tokens of y_w with 9 of it. The pair beside it has room, and is cut where its own longest
    prompt says."""
    _, _, processor = family
    full = make_batch(OTHER_SIZES, processor)
    short, long, *others = [prefix_length(full, row) for row in range(9)]
    assert others == [short, short, long, short, long, short, short] and long > short + 9
    cut = make_batch(OTHER_SIZES, processor, max_length=long + 3)
    lengths, uncut = ((batch.labels >= 0).sum(1).view(3, 3).tolist() for batch in (cut, full))
    (y_w, *_), (y_l, *_), _ = uncut
    assert min(y_w, y_l) > 3 and lengths == [[3, 3, y_w], [3, 3, y_l], [3, 3, y_w]]
    kept = cut.inputs["attention_mask"].bool()
    for ours, whole in (cut.labels, full.labels), (cut.inputs["input_ids"], full.inputs["input_ids"]):
        assert torch.equal(ours[kept], whole[:, : kept.shape[1]][kept])
    with pytest.raises(BadInput, match=f"prompt of {long} tokens, --max-length {long}: no room"):
        make_batch(OTHER_SIZES, processor, max_length=long)


@LAYOUTS
def test_a_forward_pass_keeps_no_cache_and_no_logits_of_prompts(loaded, layout):
    """Both are memory: keys and values of every layer, and a vocabulary for each token of an image."""
    model, processor = loaded
    batch = laid_out(PAIRS, processor, layout)
    output = model(**mdpo.forward_inputs(model, batch))
    n_rows, width = batch.labels.shape
    n_prompt = min(prefix_length(batch, row) for row in range(n_rows))
    plain = n_rows, width - n_prompt + 1  # the token before the first, too
    packed = 1, (batch.labels >= 0).sum()
    assert output.logits.shape[:2] == (plain if layout == "plain" else packed)
    assert output.past_key_values is None


def test_gradients_begin_at_the_adapter(bunny):
    """An embedding whose output wants a gradient costs a backward pass through nothing."""
    model, processor = with_lora(bunny)
    seen = outputs_of(model.get_input_embeddings())
    response_logps(model, make_batch(PAIRS, processor))
    assert seen and not any(output.requires_grad for output in seen)


def test_all_tensors_of_a_batch_are_pinned(loaded, monkeypatch):
    """A copy from memory that is not pinned makes the GPU wait."""
    batch = pack(make_batch(PAIRS, loaded[1], share=True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.double())
    pinned = batch.pin_memory()
    tensors = [*pinned.inputs.values(), pinned.labels, pinned.take, pinned.answers, pinned.predictors]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 5)])
def test_images_of_one_pixel_and_of_extreme_shape(bunny, folder, size):
    """Such files exist in scraped data and must not stop a run."""
    noise(0, size).save(folder / "b.png")
    records = [authors(img_path="b.png"), authors()]
    pairs = Pairs(read_examples(write(folder / "x.json", records)))
    assert all(pairs[epoch, 0].images_rejected[0].size == size for epoch in range(30))
    make_batch([pairs[0, 0]], train.load_processor(str(bunny)))


def test_five_images_of_which_three_differ_stay_five_in_several_turns(folder, loaded):
    """Each is shown where and as often as the conversation shows it, takes its own tokens, and is rejected by
    a draw of its own. Without images the texts stay."""
    _, processor = loaded
    noise(3, (20, 50)).save(folder / "b.png")
    names = ["a.png", "b.png", "a.png", "merged_images/llava-1.jpg", "b.png"]
    marks = authors(img_path=None, images=names, prompt="<image>\n" * 5 + "Which is odd?")
    assert read_examples(write(folder / "x.json", [marks]))[0].question == asked("Which is odd?", 5)
    turns = [*TURNS["prompt"][:-1], message("user", "And these:", *["IMAGE"] * 4)]
    path = write(folder / "x.json", [TURNS | {"images": names, "prompt": turns}])
    one = Pairs(read_examples(path, processor=processor))[0, 0]
    assert one.images[0].tobytes() == noise(1).tobytes()
    assert [image.size for image in one.images_rejected] == [image.size for image in one.images]
    for images, n in (one.images, 3), (one.images_rejected, 5):
        assert len({image.tobytes() for image in images}) == n
    batch = make_batch([one], processor)
    assert len(batch.inputs["pixel_values"]) == 3 * 5
    assert ((batch.inputs["input_ids"] == processor.image_token_id).sum(1) == 5 * 16).all()
    (bare,) = read_examples(path, with_images=False)
    shown, text = (re.sub(r"\s", "", written(processor, of)[0]) for of in (one, Pairs([bare])[0, 0]))
    assert re.search(r"Bebrief\.(USER:)?IMAGEWhatisit\?ASSISTANT:Acat\..*(IMAGE){4}", shown)
    assert bare.images == () and text == shown.replace("IMAGE", "")


TWO_IMAGES = [
    Example(*one[:3], (*one[3], noise(7, (50, 30))), (*one[4], noise(8, (50, 30)))) for one in PAIRS[:2]
]


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
    pairs = FAMILY_PAIRS[pairs]
    texts = [chat_text(processor, one) for one in pairs]
    layout = train.choose_layout(model, processor, pairs)
    assert layout == ("plain" if folder.name == "gemma3" else "packed")
    for layout in {layout, "plain"}:
        assert largest_error(model, processor, pairs, layout, texts) < 1e-5


def chat_text(processor, one):
    """(prompt, y_w, y_l). All of these families write an answer as it is, behind one space if the prompt ends
    in a colon, and end it by their end-of-sequence. OneVision's template has a space behind the role, but not
    where it asks for an answer."""
    messages = data.chat_messages(one.question, len(one.images))
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if isinstance(processor, transformers.LlavaOnevisionProcessor):
        prompt = prompt.removesuffix("\n") + " \n"
    space = " " * prompt.endswith(":")
    return prompt, *(space + answer + processor.tokenizer.eos_token for answer in one[1:3])


def a_key_forgotten(*args):
    """The middle one of each shared prefix."""
    blocks = attention_blocks(*args)
    for _, _, prefix, mask in blocks:
        if mask is not None:
            mask[..., prefix // 2] = -torch.inf
    return blocks


def test_each_family_trains_in_bf16_and_is_checked_in_float32(family, monkeypatch):
    """What a GPU runs, on the CPU: bf16 weights, a float32 adapter, and no autocast to hide a tensor of the
    wrong type. In bf16 itself a mistake of packing may be no larger than rounding: it would stay hidden, or
    rounding would cost a run its packed rows and half its speed. So the check raises the bf16 weights."""
    folder, *_ = family
    model, processor = train.load_model(str(folder), dtype=torch.bfloat16)
    model = train.add_lora(model, 8, 16)
    raised = copy.deepcopy(model).float()
    layout = train.choose_layout(model, processor, SIZES)
    assert layout == ("plain" if folder.name == "gemma3" else "packed")
    if layout == "packed":  # Gemma's packed rows are themselves the mistake
        assert train.packing_error(model, processor, SIZES) < train.TOLERANCE / 5
        monkeypatch.setattr("mdpo.attention_blocks", a_key_forgotten)
    off, expected = (train.packing_error(of, processor, SIZES) for of in (model, raised))
    assert off > 20 * train.TOLERANCE and off == pytest.approx(expected, rel=1e-3)
    monkeypatch.undo()
    train.enable_checkpointing(model.train())
    losses, _ = mdpo_step(model, laid_out(SIZES, processor, layout))
    assert losses.tolist() == pytest.approx([3 * math.log(2)] * 2, abs=1e-6)
    losses.mean().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14  # 2 layers of the language model: q, k, v, o, gate, up, down
    assert all(grad.dtype == torch.float32 and grad.any() for grad in gradients)
    assert model.get_base_model().dtype == torch.bfloat16


@pytest.mark.parametrize("name", families.FAMILIES)
def test_each_family_trains_saves_reloads_and_answers(name, capsys):
    """A family that only loads is no use: after four steps by the command, an answer is another one."""
    assert families.run([name]) == 0
    layout, changed = capsys.readouterr().out.split()[-2:]
    assert layout == ("plain" if name == "gemma3" else "packed") and changed == "changed"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_positions_in_space_start_anew_in_each_row(family):
    """They are relative, so a shift is harmless in float32; in bf16 its rounding grows along the packed
    row."""
    _, model, processor = family
    batch, rows = laid_out(SIZES, processor), make_batch(SIZES, processor).inputs
    positions = mdpo.forward_inputs(model, batch)["position_ids"][:, 0]  # (3, N)
    parts = positions.split([n for n, *_ in batch.blocks], dim=1)
    expected, _ = model.model.get_rope_index(
        rows["input_ids"], rows["mm_token_type_ids"], rows["image_grid_thw"], None, rows["attention_mask"]
    )
    for row, part in enumerate(parts):
        n = rows["attention_mask"][row].sum()
        assert torch.equal(part, expected[:, row, n - part.shape[1] : n])
        assert expected[:, row, 0].max() == 0
    assert not torch.equal(*expected[1:])  # height and width: else this shows nothing


def chosen(loaded, *options, pairs=PAIRS[:2]):
    """The layout that training chooses, or what is said against it."""
    try:
        return train.choose_layout(*loaded, pairs, *options)
    except BadInput as error:
        return str(error)


def test_nan_never_passes_the_check(fresh):
    """nan is neither above nor below a tolerance: packed rows that are not finite, as on purpose where a
    model keeps an attention of its own, would be taken for exact. A model whose plain rows are not finite
    would stop at its first step, with no reason given."""
    model, _ = fresh
    mdpo.use_packed_attention(model)
    model.set_attn_implementation("sdpa")
    assert chosen(fresh) == "plain" and "packed rows are not exact: nan" in chosen(fresh, "packed")
    model.get_decoder().layers[0].mlp.fc1.weight.data[0, 0] = math.nan
    for layout in None, "packed", "plain":
        assert "cannot be trained: its log-probabilities are not finite" in chosen(fresh, layout)


def test_one_row_that_is_not_finite_is_enough(fresh):
    """A download that broke off may leave most words whole: a run would stop hours in."""
    tokens = [{*row.tolist()} for row in make_batch(PAIRS, fresh[1]).inputs["input_ids"]]
    alone = next(token for row in tokens for token in row if sum(token in other for other in tokens) == 1)
    fresh[0].get_input_embeddings().weight.data[alone] = torch.nan
    assert "log-probabilities are not finite" in chosen(fresh, pairs=PAIRS)


SETTINGS = [  # the user's, and then ours
    ({}, [None, "expandable_segments:True"]),
    ({"PYTORCH_ALLOC_CONF": "x"}, ["x", None]),
    ({"PYTORCH_CUDA_ALLOC_CONF": "y"}, [None, "y"]),
]


@pytest.mark.parametrize("user, expected", SETTINGS)
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
    monkeypatch.setattr("mdpo.packed_inputs", None)
    assert "cannot be trained: is not in a known form: 'NoneType'" in chosen(fresh, "packed")
    assert chosen(fresh, "plain") == "plain"


WINDOWS = [
    (None, (), "packed"),
    (2048, (), "packed"),
    (2047, (), "plain"),
    (500, (None, 500), "packed"),
    (500, ("plain",), "plain"),
    (500, ("packed",), "packed rows are not exact: its attention window of 500 tokens is shorter than"),
]


@pytest.mark.parametrize("window, options, expected", WINDOWS)
def test_packed_rows_are_not_for_layers_that_see_less_far(fresh, window, options, expected, capsys):
    """A packed row's attention knows no window; the first examples may fit into it, and a later one not."""
    fresh[0].config.text_config.sliding_window = window
    assert expected in chosen(fresh, *options)
    said = "window of 2047 tokens is shorter than --max-length 2048" in capsys.readouterr().out
    assert said == (window == 2047)


def policy_of(model, *flags):
    """(arguments, model) as training makes them."""
    flags = f"--model {model} --data d --device cpu --lora-rank 2 {' '.join(flags)}".split()
    args = train.parse_args(flags)
    return args, train.load_policy(args, train.load_processor(str(model)), PAIRS[:2])


def test_the_layout_is_chosen_by_the_runs_own_arguments(llava, capsys):
    """Plain rows take twice as long: --max-length decides, not its default. --layout plain is the way out
    where packed rows are suspected; who took it need not be told to."""
    shorten = lambda model, *rest: setattr(model.config.text_config, "sliding_window", 500)
    for flags, layout in (
        ("--max-length 400", "packed"),
        ("--max-length 600", "plain"),
        ("--max-length 400 --layout plain", "plain"),
        ("--max-length 600 --layout plain", "plain"),
    ):
        with preceded("train.choose_layout", shorten):
            assert policy_of(llava, flags)[0].layout == layout
        assert ("not exact" in capsys.readouterr().out) == (flags == "--max-length 600")


def test_another_seed_is_another_adapter(bunny):
    """Runs of several seeds that all begin alike make the result look surer than it is."""
    models = [policy_of(bunny, f"--seed {seed}")[1] for seed in (0, 1, 1)]
    ours = [torch.cat([p.flatten() for p in of.parameters() if p.requires_grad]) for of in models]
    assert not ours[0].equal(ours[1]) and ours[1].equal(ours[2])


def test_an_adapters_defaults_are_the_papers_and_its_layers_those_asked_for(fresh):
    """Who takes add_lora alone trains with them; sharded weights are gathered for peft's own layers alone."""
    model = train.add_lora(fresh[0], layer=peft.tuners.lora.Linear)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (64, 128)
    assert not any(isinstance(module, train.LoraLinear) for module in model.modules())


class Reached(Exception):
    pass


def test_a_gpu_is_used_where_there_is_one(llava, monkeypatch, capsys):
    """A run that nobody told to would train on the CPU, for weeks. That it loads is said before it takes
    minutes. float16 overflows where the weights were trained in bf16."""

    def reach(name, device):
        raise Reached(device)

    monkeypatch.setattr("train.best_device", lambda: "cuda")
    for device, flags in ("cuda", []), ("cpu", ["--device", "cpu"]):
        args = train.parse_args(["--model", "m", "--data", "d", *flags])
        with preceded("train.load_model", reach), pytest.raises(Reached, match=device):
            train.load_policy(args, None, [])
        assert capsys.readouterr().out == "loading m\n"
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda model, device: model)
    assert train.load_model(str(llava), "cuda:0")[0].dtype == torch.bfloat16
    assert train.load_model(str(llava), "cuda:0", torch.float32)[0].dtype == torch.float32  # if one asks


CUSTOM = {"auto_map": {"AutoConfig": "conf.W"}}
CONFIG, PROCESSOR = "config.json", "processor_config.json"
CANNOT_BE_TRAINED = {  # the reason: a model whose folder is copied, or none; a file; what is changed in it
    "cannot be loaded: Unrecognized processing class": (None, CONFIG, {"model_type": "llama"}),
    "is an encoder-decoder": (None, CONFIG, {"model_type": "florence2"}),
    "is an adapter: merge it first, by python examples/merge.py": (None, "adapter_config.json", {}),
    "needs code of its own, which is not run here": (None, CONFIG, {"model_type": "weird"} | CUSTOM),
    "has no token of nine tabs": ("bunny", CONFIG, {"vocab_size": 20}),
    "its processor has no patch_size": ("llava", PROCESSOR, {"patch_size": None}),
    "its processor has no image token": ("llava", PROCESSOR, {"processor_class": "GitProcessor"}),
    "does not have a chat template": ("llava", "chat_template.jinja", None),
}


def changed_model(folder, to, file, values):
    """A copy of a model's folder with other values in one of its JSON files, or without the file."""
    if folder:
        shutil.copytree(folder, to)
    if values is None:
        (to / file).unlink()
    else:
        write(to / file, (json.loads((to / file).read_text()) if folder else {}) | values)
    return str(to)


@pytest.mark.parametrize("reason", CANNOT_BE_TRAINED)
def test_models_that_cannot_be_trained_are_refused_before_their_weights_are_read(tmp_path, request, reason):
    """The reason and what to do, in one line, and not after a download of gigabytes. The library speaks of
    missing keys, of an argument that does not exist here, or of NoneType."""
    model, *change = CANNOT_BE_TRAINED[reason]
    changed = changed_model(model and request.getfixturevalue(model), tmp_path / "model", *change)
    with pytest.raises(BadInput, match=reason):
        train.load_processor(changed)


def test_code_of_a_model_that_the_library_knows_is_not_needed_and_not_run(llava, tmp_path):
    """Many folders of the hub still name the code that they came with."""
    names = {"AutoConfig": "own.C", "AutoModelForImageTextToText": "own.M", "AutoProcessor": "own.P"}
    folder = changed_model(llava, tmp_path / "model", CONFIG, {"auto_map": names})
    write(tmp_path / "model" / "own.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = P = None\n")
    model, _ = train.load_model(folder)
    assert isinstance(model, transformers.LlavaForConditionalGeneration) and not (tmp_path / "ran").exists()


def test_null_in_bunnys_config_is_no_value(bunny, tmp_path):
    """The library refuses it in the place of a rate, where a field that is not there has its default."""
    assert train.load_model(changed_model(bunny, tmp_path / "model", CONFIG, {"embd_pdrop": None}))


BUNNYS_NAMES = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}


@pytest.mark.parametrize("in_one_file", [False, True])
def test_every_bunny_weight_lands_in_its_place(bunny, tmp_path, in_one_file):
    """A tensor left out would be random: the run would go on, and be worthless. Small checkpoints have no
    index of shards; the sizes of the vision tower are then read off the one file."""
    folder = bunny
    theirs = {name: of for file in bunny.glob("*.safetensors") for name, of in load_file(file).items()}
    if in_one_file:
        folder = shutil.copytree(bunny, tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = train.load_model(str(folder))
    ours = model.state_dict()
    for name, bunnys in BUNNYS_NAMES.items():
        ours = {key.replace(name, bunnys): tensor for key, tensor in ours.items()}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, check_dtype=False)
    assert model.config.vision_config.num_hidden_layers == 2 and model.config.image_seq_length == 16


@pytest.mark.parametrize("size", [(48, 32), (20, 50), (32, 32)])
def test_bunnys_eye_by_hand(fresh, size):
    """Features of another layer, CLIP's mean and deviation, a picture squeezed where it should be padded: a
    wrong model would train in silence, since packed and plain rows and the reference would all be wrong
    alike.

    Here: the image in the middle of a square of the mean colour, 0.5 * 255 = 127, and pixels from -1 to 1;
    SigLIP of 2 layers with 16 heads, without its last norm; then Linear, GELU, Linear.
    """
    model, processor = fresh
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    torch.manual_seed(0)
    for parameter in (*tower.parameters(), *projector.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16, image_size=32,
        patch_size=8, vision_use_head=False,
    )  # fmt: skip
    eye = transformers.SiglipVisionModel(config)
    eye.load_state_dict(tower.state_dict())
    square = Image.new("RGB", (max(size),) * 2, (127,) * 3)
    square.paste(noise(1, size), [(max(size) - side) // 2 for side in size])
    square = square.resize((32, 32), Image.Resampling.BICUBIC)
    pixels = torch.tensor([*square.tobytes()]).view(1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1
    features = eye.encoder(eye.embeddings(pixels)).last_hidden_state
    expected = projector.linear_2(F.gelu(projector.linear_1(features)))
    (seen,) = model.get_image_features(pixels_of(processor, noise(1, size))).pooler_output
    torch.testing.assert_close(seen, expected[0], rtol=1e-4, atol=1e-4)


def test_activation_of_bunny_is_its_own_in_one_kernel(fresh):
    """Bunny's config asks for gelu_new, eight kernels in the library; another function would be another
    model. In float64 rounding hides no difference."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    ours = fresh[0].get_decoder().layers[0].mlp.activation_fn(x)
    torch.testing.assert_close(ours, transformers.activations.ACT2FN["gelu_new"](x), rtol=0, atol=1e-12)
    assert torch.equal(ours, F.gelu(x, approximate="tanh"))  # the one kernel


def test_every_rate_of_dropout_is_0_and_weights_are_frozen(loaded):
    """Weights that train take optimizer memory for 3 billion parameters, or drift. Bunny asks for resid_pdrop
    0.1, this LLaVA for attention_dropout 0.1, and models call it as they like. Left on, policy and reference
    differ by chance: rewards are noise."""
    layer = torch.nn.Linear(1, 1)
    vars(layer).update(resid_pdrop=0.1, attn_drop=0.1, drop_prob=0.1, dropout=0.1)
    model = torch.nn.Sequential(layer, torch.nn.Dropout(0.1))
    train.disable_dropout(model)
    for model in model, loaded[0]:
        kept = [of for module in model.modules() for of in vars(module).items()]
        rates = [rate for name, rate in kept if "drop" in name or name == "p"]
        assert rates and not any(rates)
    assert not any(parameter.requires_grad for parameter in loaded[0].parameters())


def test_pickled_weights_are_not_loaded(llava, tmp_path):
    """Unpickling runs whatever code the file holds."""
    shutil.copytree(llava, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(llava / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(BadInput):
        train.load_model(str(tmp_path / "pickled"))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lora_layers_compute_what_pefts_own_do(bunny, dtype, error):
    """The adapter is saved for peft to load: were its forward pass another one, it would be another model
    there."""
    model = train.add_lora(train.load_model(str(bunny), dtype=dtype)[0], 4, 12)
    move(model)
    layer = next(module for module in model.modules() if isinstance(module, train.LoraLinear))
    x = torch.randn(2, 5, layer.in_features).to(dtype).requires_grad_()
    weights = [lora["default"].weight for lora in (layer.lora_A, layer.lora_B)]
    results = []
    for kind in train.LoraLinear, peft.tuners.lora.Linear:
        layer.__class__ = kind
        y = layer(x)
        with model.disable_adapter():
            base = layer(x)
        layer.merge()
        merged = layer(x)
        layer.unmerge()
        results.append([y, base, merged, *torch.autograd.grad(y.square().sum(), [x, *weights])])
        assert not torch.equal(y, base) and y.dtype == base.dtype == dtype
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() < error * theirs.norm()


def test_one_wrong_row_of_six_is_enough(fresh, monkeypatch, capsys):
    """Mistakes of packing are of single rows: an example's first row is always right. Two pairs have six
    rows; one log-probability is off by twice what is accepted, so that their mean is a third of it. What that
    costs is said, and who asked for packed rows does not get others. The check takes one pass of each layout:
    at real size on a CPU, each costs as much as a training example."""

    def one_off(model, batch):
        logps = response_logps(model, batch)
        if batch.take is not None:
            n_tokens = (batch.labels[-1] >= 0).sum()
            logps.image_rejected[-1] += 2 * train.TOLERANCE * n_tokens.sqrt()
        return logps

    passes = outputs_of(fresh[0])
    assert chosen(fresh) == "packed" and [len(output.logits) for output in passes] == [6, 1]
    monkeypatch.setattr("train.response_logps", one_off)
    assert chosen(fresh) == "plain"
    said = capsys.readouterr().out
    assert "packed rows are not exact" in said and "about twice as long" in said
    assert "cannot be trained: packed rows are not exact" in chosen(fresh, "packed")


def test_the_float32_mode_computes_in_float32_and_leaves_the_weights():
    """1 + 2 ** -10 is not in bf16. What is written into a tensor made inside must be there afterwards."""
    one, exact = torch.ones(1, dtype=torch.bfloat16), 1 + 2**-10
    with train.InFloat32():
        made = torch.zeros(1, dtype=torch.bfloat16)
        made[0] = exact
        total, by_name = one + 2**-10, torch.add(input=one, other=2**-10)
    assert made == total == by_name == exact and one.dtype == torch.bfloat16


def test_the_layout_check_of_long_answers_takes_no_longer_than_a_step(fresh):
    """It runs answers through the model, in float32 on a CPU; one of a book would take hours."""
    seen = outputs_of(fresh[0].get_input_embeddings())
    long = PAIRS[0]._replace(chosen="a red circle " * 300, rejected="no. " * 600)
    assert chosen(fresh, None, 500, pairs=[long]) == "packed"
    assert max(output.shape[:2].numel() for output in seen) == 3 * 500


def test_cudnn_attention_and_rounded_float32_are_off(bunny):
    """It plans anew for each shape, at tens of milliseconds, and shapes never repeat here. And float32 may be
    rounded on CUDA, in convolutions by default: the check of the layout would take that for a mistake."""
    on_cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    on_cuda.enable_cudnn_sdp(True)
    cudnn.allow_tf32 = on_cuda.matmul.allow_tf32 = True
    train.load_model(str(bunny))
    assert not (on_cuda.cudnn_sdp_enabled() or cudnn.allow_tf32 or on_cuda.matmul.allow_tf32)
