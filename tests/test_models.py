"""Protects what a model is given and what of it is trained: templates, rows, layouts, families, adapters."""

import json
import math
import os
import re
import shutil
from functools import partial
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
from mdpo import LogPs, attention_blocks, mdpo_loss, mdpo_step, pack, response_logps
from test_mdpo import ANCHOR, CONDITIONAL, DPO, HUB_LLAVA_TEMPLATE, LAYOUTS, PAIRS, POLICY, REF
from test_mdpo import command, full_text, laid_out, largest_error, message, move, noise, pair, prefix_length
from test_mdpo import with_lora, worked_example, write
from tests.helpers import CHAT, DPO_NAMES, PARTS, SIZES, TURNS, outputs_of, pixels_of, preceded

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOWER = "transformers.models.siglip.modeling_siglip.SiglipVisionModel.forward"


@pytest.fixture
def fresh(bunny):
    """(model, processor) of a Bunny that a test may change."""
    return train.load_model(str(bunny))


def test_each_image_of_a_step_is_encoded_once_by_the_inner_model(bunny, small, tmp_path, monkeypatch):
    """Vision towers are a third of a step: policy and reference share an encoding of an example's images.
    Some families' outer class, such as Janus's, has no way to do it."""
    monkeypatch.delattr(transformers.LlavaForConditionalGeneration, "get_image_features")
    sizes = []
    with preceded(TOWER, lambda tower, pixel_values, **options: sizes.append(len(pixel_values))):
        assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1)) == 0
    assert sizes[-4:] == [4, 4, 4, 2]  # micro-batches of 2, 2, 2 and 1 examples, after the check of the rows


# A step is one that the reference's type resolves at 3.
@pytest.mark.parametrize(
    "policy_dtype, ref_dtype, step",
    [(torch.bfloat16, torch.bfloat16, 2**-6), (torch.float16, torch.float32, 2**-13)],
)
def test_half_precision_is_raised_to_float32(policy_dtype, ref_dtype, step):
    """Steps are 4 nats wide at -1000 in bf16: -1000 + 3 + 1/64 is -996 there. A log-softmax is off by
    hundredths of a nat a token. float64 stays so."""
    policy = LogPs(*torch.tensor([[-1000], [-1004], [-1000]], dtype=policy_dtype))
    ref = LogPs(*torch.tensor([[-3 - step], [-3], [-3]], dtype=ref_dtype))
    losses, metrics = mdpo_loss(policy, ref, beta=1.0)
    assert {values.dtype for values in (losses, *metrics.values())} == {torch.float32}  # no booleans
    assert metrics["rewards/chosen"].item() == -997 + step and metrics["rewards/margins"].item() == 4 + step
    losses, _ = mdpo_loss([logp.double() for logp in POLICY], REF, beta=0.5)
    assert losses.item() == pytest.approx(DPO + CONDITIONAL + ANCHOR, abs=1e-15)
    logits = torch.randn(1, 8, 10, generator=torch.manual_seed(0)).to(policy_dtype)
    scored = lambda logits: response_logps(SimpleNamespace, pack(worked_example()), {"logits": logits})
    assert scored(logits) == scored(logits.float())


ODD_TEXTS = [  # (question, chosen, rejected)
    ("What is 🦄 doing?", "It is 🏃‍♀️ running, naïvely.", "Это 東京 🗼."),
    ("USER: Hi ASSISTANT: no", "No. USER: and now? ASSISTANT: Yes.", "ASSISTANT:"),  # as the template
    ("\n\nWhat is it?\n", "\nA red circle.\n\n", "\n\n"),
    ("What is it?", "A red circle.EOS It is red.", "A blue square.EOS"),
    ("What is it?", "A red", "A red circle"),  # one begins as the other
    ("What is \ue000 in \ue000 it?", "A \ue000 circle.", "\ue000"),  # private use
    ("What  is   it?", "  A  red    circle. ", " A  red    square. "),
]


@LAYOUTS
def test_odd_texts_are_scored_exactly(loaded, layout):
    """A boundary that is guessed, or a stand-in that the text holds, scores other tokens in silence."""
    eos = loaded[1].tokenizer.eos_token
    odd = [pair(*(text.replace("EOS", eos) for text in texts), noise(1), noise(2)) for texts in ODD_TEXTS]
    assert largest_error(*loaded, odd, layout) < 1e-5


def test_a_sequence_has_one_bos(llava):
    """Llama's tokenizer adds <s>, and some templates write it as well: no model knows it twice."""
    processor = with_template(llava, "{{ bos_token }}" + HUB_LLAVA_TEMPLATE)
    is_bos = make_batch(PAIRS, processor).inputs["input_ids"] == processor.tokenizer.bos_token_id
    assert is_bos[:, 0].all() and is_bos.sum() == 9


SEEN = """
    x..|..|..|.
    xx.|..|..|.
    xxx|..|..|.
    ...|x.|..|.
    ...|xx|..|.
    xx.|..|x.|.
    xx.|..|xx|.
    ...|x.|..|x
"""


def test_attention_of_a_packed_row_is_attention_under_its_mask():
    """Values and gradients against one dense mask, in which each line is what a token sees. No response sees
    another. Two heads share a key."""
    blocks = [(3, 0, 2), (2, 1, 1), (2, 0, 2), (1, 1, 1)]  # (tokens, whose prefix, its length)
    dense = torch.tensor([[mark == "x" for mark in line] for line in SEEN.replace("|", "").split()])
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 8, 8, requires_grad=True) for heads in (2, 1, 1)]
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    ours, _ = mdpo.packed_attention(module, *inputs, None, attention_blocks(blocks), scaling=0.3)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=dense, scale=0.3, enable_gqa=True)
    results = [[y, *torch.autograd.grad(y.square().sum(), inputs)] for y in (ours, theirs.transpose(1, 2))]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    plain, _ = mdpo.packed_attention(module, *inputs, dense, scaling=0.3)  # rows that are not packed
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-5)


def test_packed_rows_set_their_attention_which_is_sdpa_for_all_else(fresh):
    """Plain rows and generation must not know that it was ever replaced."""
    model, processor = fresh
    batch = make_batch(PAIRS, processor)
    texts = ["There is a red circle.", "There"]  # the second is padded, and must not see that
    inputs = processor(text=texts, return_tensors="pt", padding=True, padding_side="left")
    of_all_else = lambda: [torch.cat(response_logps(model, batch)), model(**inputs).logits[:, -1]]
    before = of_all_else()
    packed = torch.cat(response_logps(model, pack(batch)))
    torch.testing.assert_close([packed, *of_all_else()], [before[0], *before], rtol=0, atol=1e-5)


def written(processor, one):
    """The rows of y_w and y_l as text: "prefix|response" each, with EOS and IMAGE for these tokens."""
    batch, texts = make_batch([one], processor, DPO_NAMES), []
    for row, labels in enumerate(batch.labels):
        parts = batch.inputs["input_ids"][row, : prefix_length(batch, row)], labels[labels >= 0]
        text = "|".join(map(processor.tokenizer.decode, parts)).replace(processor.tokenizer.eos_token, "EOS")
        texts.append(text.replace(processor.image_token * 16, "IMAGE"))
    return texts


def with_template(folder, template):
    """The processor, with a chat template of ours, in which IMAGE stands for its image token."""
    processor = train.load_processor(str(folder))
    processor.chat_template = template.replace("IMAGE", processor.image_token)
    return processor


BARE = "{% for m in messages %}" + PARTS + "{% endfor %}"  # not a word of its own
PLACED = CHAT.replace("END", "{{ eos_token }}")
# An answer without a think block gets an empty one, and reasoning of earlier turns is dropped, as Qwen3 does.
THINKING = PLACED.replace(
    PARTS,
    "{% set text %}" + PARTS + "{% endset %}{% set thought, _, said = text.rpartition('</think>') %}"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ thought[7:] }}</think>{% endif %}{{ said }}",
)
ENDS_TURNS = CHAT.replace("END", "<end>\n")  # as Gemma, whose end-of-sequence is another token
PRINTS = PLACED.replace(PARTS, "{{ m.content }}")
JOINS = PLACED.replace(PARTS, "{{ m.content + '' }}")  # a list and a text: an error
ASKS = PLACED.replace(PARTS, "{{ m.content if m.content is string else raise_exception('text, please') }}")
# Text is taken as text, and parts are walked over, but those of an assistant are printed.
IS_TEXT = "{% if m.content is string or m.role == 'assistant' %}"
TEXT_OR_PARTS = PLACED.replace(PARTS, IS_TEXT + "{{ m.content }}{% else %}" + PARTS + "{% endif %}")
SYSTEM_LAST = (  # as Pixtral: the system text stands before the last message, if that is the user's
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' and messages[0].role == 'system' and loop.last %}"
    "{{ messages[0].content[0].text }} {% endif %}" + PLACED.partition("%}")[2]
)
THOUGHT = "<think>A ring?</think>Yes."
ASKED_AGAIN = [message("user", "Is it?"), message("assistant", THOUGHT), message("user", "Now?")]
CONVERSATION = [
    message("system", "Be brief."),
    message("user", " Hello. "),
    message("assistant", "Hi"),
    message("user", "IMAGE", "What is it? "),
]
PRINTED = "Is it {'type': 'text', 'text': 'x'}?"
OF_TEXT = "[user]Which?EOS[assistant]|No.EOS|Yes.EOS"
OF_IMAGE = "[user]IMAGEWhich?EOS[assistant]|No.EOS|Yes.EOS"
# The template; what both rows begin with|y_w|y_l: with IMAGE in it, the pair has images; what is asked and
# answered, if it is not Which?, No. and Yes.
WRITTEN = {
    "what opens the assistant's turn is the prompt's, generation prompt or not": (
        PLACED.replace("[{{ m.role }}]", "{{ m.role }}: ").partition("{% if add")[0],
        "user: Which?EOSassistant:| No.EOS| Yes.EOS"),
    "what follows the end is never generated": (
        CHAT.replace("END", "{{ eos_token }}\n"), "[user]Which?EOS\n[assistant]|No.EOS|Yes.EOS"),
    "trimmed answers": (PLACED.replace("p.text", "p.text | trim"), OF_TEXT, "Which?", " No.\n", "\nYes. "),
    "the end of a turn is scored once, and an end-of-sequence inside ends the response": (
        ENDS_TURNS, "[user]IMAGEWhich?<end>\n[assistant]|No.EOS|Yes.<end>", "Which?", "No.EOS Or yes."),
    "a plain answer gets an empty think block, reasoning of an earlier turn is dropped": (
        THINKING, "[user]Is it?EOS[assistant]Yes.EOS[user]Now?EOS[assistant]<think></think>|No.EOS|Yes.EOS",
        ASKED_AGAIN),
    "an answer keeps the think block that it brings": (
        THINKING, "[user]IMAGEWhich?EOS[assistant]<think>|A ring?</think>Yes.EOS|</think>No.EOS",
        "Which?", THOUGHT, "No."),
    "messages that are printed are given as text": (PRINTS, OF_TEXT),
    "messages that are joined are given as text": (JOINS, OF_TEXT, [message("user", "Whi", "ch?")]),
    "messages whose parts are refused are given as text": (ASKS, OF_TEXT),
    "messages with an image are given as parts": (TEXT_OR_PARTS, OF_IMAGE),
    "a text about a printed part is a text": (
        PLACED, f"[user]IMAGE{PRINTED}EOS[assistant]|{PRINTED}EOS|Yes.EOS", PRINTED, PRINTED),
    "where a system text would be refused, a question without it is good": (SYSTEM_LAST, OF_IMAGE),
    "earlier answers of Bunny end as the last one does": (
        train.BUNNY_TEMPLATE, "Be brief. USER:  Hello.  ASSISTANT: HiEOS"
        "USER: IMAGE\nWhat is it?  ASSISTANT:| No.EOS| Yes.EOS", CONVERSATION),
    # "answers" is one token: tokenised apart, the model would be scored on text that it never produces. The
    # boundary moves back to the last token that all three texts share.
    "tokens merge across the boundary": (BARE, "IMAGEa red| answersEOS| answxEOS", "a red answ", "ers", "x"),
    "tokens merge in the other answer": (BARE, "a red| answxEOS| answersEOS", "a red answ", "x", "ers"),
    "the boundary never moves past an image": (
        BARE, "a red answIMAGE|ersEOS|xEOS", [message("user", "a red answ", "IMAGE")], "ers", "x"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_what_a_template_writes_is_what_is_scored(bunny, case):
    """Trained on another text, a model would learn what it is never asked, or never to stop."""
    template, expected, *texts = WRITTEN[case]
    prefix, *responses = expected.split("|")
    processor = with_template(bunny, template)
    question, *answers = [*texts, *("Which?", "No.", "Yes.")[len(texts) :]]
    answers = [answer.replace("EOS", processor.tokenizer.eos_token) for answer in answers]
    images = (noise(1), noise(2)) if "IMAGE" in prefix else ()
    assert written(processor, pair(question, *answers, *images)) == [f"{prefix}|{y}" for y in responses]


IN_ANOTHER_WAY = "writes the question in another way when a response follows"
REFUSED = {  # (template, number of images, question, what the message says)
    "an image would be printed": (PRINTS, 1, "Which?", "the chat template does not take these messages"),
    "a system text is dropped": (SYSTEM_LAST, 1, CONVERSATION, IN_ANOTHER_WAY),
    "the text before the image changes": ("{{ messages | length }}" + PLACED, 1, "Which?", IN_ANOTHER_WAY),
    "the end depends on the answer": (
        CHAT.replace("END", "{{ m.content[0].text | length }}"), 0, "Which?", IN_ANOTHER_WAY),
    "a row has no prompt": (
        BARE.replace("messages", "messages if m.role == 'assistant'"), 0, "Which?", "no room for a response"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_trained_is_refused(bunny, case):
    """Its prompts would lose the system text, or hold "[{'type': 'text', ..."."""
    template, n_images, question, problem = REFUSED[case]
    images = [[noise(n)] * n_images for n in (1, 2)]
    with pytest.raises(BadInput, match=problem):
        make_batch([pair(question, "No.", "Yes.", *images)], with_template(bunny, template))


def adds(monkeypatch, processor, name, at=...):
    """The processor also says something of each token: 7, and 9 in padding."""
    call = type(processor).__call__

    def with_more(*args, **options):
        encoded = call(*args, **options)
        return {**encoded, name: (9 - 2 * encoded["attention_mask"])[at]}

    monkeypatch.setattr(type(processor), "__call__", with_more)


def test_token_types_go_on_as_text_in_the_responses(fresh, monkeypatch):
    """Gemma 3 and others let text see what only an image may if types are shifted or lost."""
    model, processor = fresh
    adds(monkeypatch, processor, "types")
    batch = laid_out(PAIRS, processor)
    expected = 7 * ((batch.labels >= 0).cumsum(1) == 0)  # 0 in a response, and in padding as well
    assert torch.equal(batch.inputs["types"], expected)
    taken = expected.flatten()[batch.take][None]
    assert torch.equal(mdpo.forward_inputs(model, batch)["types"], taken)


@pytest.mark.parametrize("name, at", [("types", (..., None)), ("labels", ...)])
def test_what_a_response_cannot_extend_is_refused(fresh, monkeypatch, name, at):
    """Masks as Mllama's would end with the prompt; PaliGemma's labels would make a loss."""
    adds(monkeypatch, fresh[1], name, at)
    with pytest.raises(BadInput, match=f"its processor returns {name}, which a response cannot extend"):
        make_batch(PAIRS, fresh[1])


def test_a_batch_is_what_its_docstring_says(loaded):
    """Who writes a loss of his own builds on it. Each row is what the processor gives for the whole text."""
    _, processor = loaded
    pairs = [one._replace(key=(2, i), id=str(i)) for i, one in enumerate(PAIRS[:2])]
    texts = [full_text(processor, *one[:3]) for one in pairs]  # prompt, y_w, y_l
    images = [one.images for one in pairs] * 2 + [one.images_rejected for one in pairs]
    encode = partial(processor, images=images, padding=True, padding_side="right", return_tensors="pt")
    ids, mask, pixels = encode(text=[of[0] + of[n] for n in (1, 2, 1) for of in texts]).values()
    starts = encode(text=[prompt for prompt, *_ in texts] * 3)["attention_mask"].sum(1, keepdim=True)
    labels = ids.where(mask.bool() & (torch.arange(ids.shape[1]) >= starts), -100)
    for share, owner in (False, [*range(6)]), (True, [0, 1, 0, 1, 4, 5]):
        batch = make_batch(pairs, processor, share=share)
        assert batch.names == LogPs._fields and batch.owner == owner
        assert batch.ids == ["0", "1"] and batch.keys == [(2, 0), (2, 1)]
        expected = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels[sorted({*owner})]}
        torch.testing.assert_close([batch.inputs, batch.labels], [expected, labels], rtol=0, atol=0)


@LAYOUTS
def test_all_inputs_of_the_model_are_on_its_device_and_as_its_layers_want_them(fresh, layout):
    """One that stays behind stops the first step on a GPU; another dtype stops some vision towers (Aria's).
    Rows of a mask begin at multiples of 16 numbers, or CUDA's kernels copy it in each layer."""
    batch, pixels = laid_out(PAIRS[:1], fresh[1], layout), []
    with preceded(TOWER, lambda tower, pixel_values, **options: pixels.append(pixel_values)):
        inputs = mdpo.forward_inputs(fresh[0].to("meta", torch.bfloat16), batch)
    assert ("attention_mask" in inputs) == (layout == "packed")  # plain rows need none
    masks = [mask for *_, mask in inputs.get("blocks", ()) if mask is not None]  # of y_l
    tensors = filter(torch.is_tensor, [*inputs.values(), *pixels, *masks])
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
    """CoPO would compare 3 tokens of y_w with 9 of it, where a rejected image takes more tokens."""
    _, _, processor = family
    full = make_batch(OTHER_SIZES, processor)
    assert prefix_length(full, 1) > prefix_length(full) + 9
    cut = make_batch(OTHER_SIZES, processor, max_length=(longest := prefix_length(full, 1)) + 3)
    lengths, uncut = ((batch.labels >= 0).sum(1).view(3, 3).tolist() for batch in (cut, full))
    (y_w, *_), (y_l, *_), _ = uncut
    assert min(y_w, y_l) > 3 and lengths == [[3, 3, y_w], [3, 3, y_l], [3, 3, y_w]]
    kept = cut.labels >= 0
    assert torch.equal(cut.labels[kept], full.labels[:, : kept.shape[1]][kept])
    with pytest.raises(BadInput, match=f"prompt of {longest} tokens, --max-length {longest}: no room"):
        make_batch(OTHER_SIZES, processor, max_length=longest)


@LAYOUTS
def test_a_forward_pass_keeps_no_cache_no_padding_no_logits_of_prompts_and_no_embeddings(bunny, layout):
    """All are memory: keys and values of every layer, a vocabulary for each token of an image. Embeddings
    that want a gradient cost a backward pass through nothing."""
    model, processor = with_lora(bunny)
    batch, embeddings = laid_out(PAIRS[:1], processor, layout), outputs_of(model.get_input_embeddings())
    output = model.eval()(**mdpo.forward_inputs(model, batch))  # checkpointing would keep no cache by itself
    shape = 3, batch.labels.shape[1] - prefix_length(batch) + 1  # the token before the first, too
    if layout == "packed":
        assert batch.inputs["attention_mask"].flatten()[batch.take].all()
        shape = 1, (batch.labels >= 0).sum()
    assert output.logits.shape[:2] == shape and output.past_key_values is None
    assert not embeddings[0].requires_grad


def test_all_tensors_of_a_batch_are_pinned(loaded, monkeypatch):
    """A copy from memory that is not pinned makes the GPU wait."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.double())
    pinned = laid_out(PAIRS, loaded[1]).pin_memory()
    tensors = [*pinned.inputs.values(), *filter(torch.is_tensor, vars(pinned).values())]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


def test_five_images_of_which_three_differ_stay_five_in_several_turns(folder, loaded):
    """Each is shown where the conversation shows it, and rejected by a draw of its own."""
    _, processor = loaded
    noise(3, (20, 50)).save(folder / "b.png")
    names = ["a.png", "b.png", "a.png", "merged_images/llava-1.jpg", "b.png"]
    turns = [*TURNS["prompt"][:-1], message("user", "And these:", *["IMAGE"] * 4)]
    path = write(folder / "x.json", [TURNS | {"images": names, "prompt": turns}])
    one = Pairs(read_examples(path, processor=processor))[0]
    for images, n in (one.images, 3), (one.images_rejected, 5):
        assert len({image.tobytes() for image in images}) == n
    (bare,) = read_examples(path, with_images=False)
    shown, text = (re.sub(r"\s", "", written(processor, of)[0]) for of in (one, bare))
    assert re.search(r"Bebrief\.(USER:)?IMAGEWhatisit\?ASSISTANT:Acat\..*(IMAGE){4}", shown)
    assert bare.images == () and text == shown.replace("IMAGE", "")


TWO_IMAGES = pair(*PAIRS[0][:3], [noise(1), noise(7, (50, 30))], [noise(2), noise(8, (50, 30))])
FAMILY_PAIRS = {
    "different sizes": OTHER_SIZES,  # tiles of m_w and m_l are padded apart
    "turns": [PAIRS[0]._replace(question=CONVERSATION), PAIRS[1]],
    "no image": [pair(*one[:3]) for one in PAIRS],
    "none, one and two images": [pair(*PAIRS[0][:3]), SIZES[1], TWO_IMAGES],
}


@pytest.mark.parametrize("pairs", FAMILY_PAIRS)
def test_each_family_trains_on_the_librarys_own_log_probabilities(family, pairs):
    """A forgotten processor key, position or kind of attention is silent, and wrong by nats. Gemma's image
    tokens attend both ways, and most of its layers see only so far: its packed rows are not exact."""
    folder, model, processor = family
    pairs = FAMILY_PAIRS[pairs]
    texts = [chat_text(processor, one) for one in pairs]
    layout = train.choose_layout(model, processor, pairs)
    assert layout == ("plain" if folder.name == "gemma3" else "packed")
    for layout in {layout, "plain"}:
        assert largest_error(model, processor, pairs, layout, texts) < 1e-5


def chat_text(processor, one):
    """(prompt, y_w, y_l). These families write an answer as it is, behind one space if the prompt ends in a
    colon, and end it by their end-of-sequence. OneVision's has a space behind the role, but for an answer."""
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
    """What a GPU runs, on the CPU: bf16 weights, a float32 adapter, no autocast. In bf16 itself a mistake of
    packing would be hidden by rounding, or rounding cost a run its packed rows and half its speed."""
    folder, *_ = family
    model, processor = train.load_model(str(folder), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model = train.add_lora(model, 8, 16)
    tolerance = train.TOLERANCE
    monkeypatch.setattr("train.TOLERANCE", tolerance / 5)
    layout = train.choose_layout(model, processor, SIZES)
    assert layout == ("plain" if folder.name == "gemma3" else "packed")
    if layout == "packed":
        monkeypatch.setattr("train.TOLERANCE", 20 * tolerance)
        monkeypatch.setattr("mdpo.attention_blocks", a_key_forgotten)
        with pytest.raises(BadInput, match="packed rows: log-probabilities are"):
            train.check_layout(model, processor, SIZES, "packed", 2048)
    monkeypatch.undo()
    train.enable_checkpointing(model.train())
    losses, _ = mdpo_step(model, laid_out(SIZES, processor, layout))
    losses.mean().backward()
    moved = {(p.dtype, bool(p.grad.any())) for name, p in model.named_parameters() if "lora_B" in name}
    assert moved == {(torch.float32, True)}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_each_family_trains_saves_reloads_and_answers(name, capsys):
    """A family that only loads is no use: after four steps by the command, an answer is another one."""
    assert families.run([name]) == 0
    layout, changed = capsys.readouterr().out.split()[-2:]
    assert layout == ("plain" if name == "gemma3" else "packed") and changed == "changed"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_positions_in_space_start_anew_in_each_row(family):
    """In float32 a shift is harmless; in bf16 rounding grows along the packed row."""
    _, model, processor = family
    batch = laid_out(SIZES, processor)
    positions = mdpo.forward_inputs(model, batch)["position_ids"][:, 0]  # (3, N)
    assert not torch.equal(*positions[1:])  # height and width: else this shows nothing
    parts = positions.split([n for n, *_ in batch.blocks], dim=1)
    for row, (part, (_, owner, _)) in enumerate(zip(parts, batch.blocks)):
        assert owner != row or part[:, 0].max() == 0


def chosen(loaded, *options):
    """The layout that training chooses, or what is said against it."""
    try:
        return train.choose_layout(*loaded, PAIRS[:2], *options)
    except BadInput as error:
        return str(error)


def test_nan_never_passes_the_check(fresh):
    """nan is not above a tolerance: packed rows would pass in a model that keeps attention of its own, where
    each token sees other images. Of a download that broke off few words may be nan: a run would stop late."""
    model, processor = fresh
    model.set_attn_implementation("eager")
    assert chosen(fresh) == "plain" and "packed rows: log-probabilities are nan" in chosen(fresh, "packed")
    assert model.get_decoder().config._attn_implementation == "eager"  # plain rows keep theirs, such as sinks
    *others, row = make_batch(PAIRS[:2], processor, DPO_NAMES).inputs["input_ids"].tolist()
    model.get_input_embeddings().weight.data[[*{*row}.difference(*others)]] = math.nan
    for layout in None, "packed", "plain":
        assert "rows: the log-probabilities are not finite" in chosen(fresh, layout)


@pytest.mark.parametrize("user", [{}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "y"}])
def test_the_allocator_grows_its_segments_unless_the_user_set_it(monkeypatch, user):
    """Shapes never repeat: freed blocks of other sizes would not be used again. torch reads it at its import,
    which comes after peft's."""
    monkeypatch.setattr(os, "environ", {**user})
    exec(Path(train.__file__).read_text().partition("import peft")[0], {})
    expected = user or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert os.environ == {"TOKENIZERS_PARALLELISM": "false"} | expected


def test_plain_rows_are_there_for_models_that_packed_rows_stop(fresh, monkeypatch):
    """--layout plain is the way out for a model whose layers are no attention, which no packed row fits."""
    monkeypatch.setattr("mdpo.packed_inputs", None)
    assert "cannot be trained in packed rows: is not in a known form" in chosen(fresh, "packed")
    assert chosen(fresh) == chosen(fresh, "plain") == "plain"


def policy_of(model, flags):
    """(arguments, model) as training makes them."""
    args = train.parse_args(f"--model {model} --data d --lora-rank 2 {flags}".split())
    return args, train.load_policy(args, train.load_processor(str(model)), PAIRS[:2])


@pytest.mark.parametrize(
    "window, flags",  # how far layers see
    [(2048, ""), (2047, ""), (400, "--max-length 400"), (2047, "--layout plain")],
)
def test_packed_rows_are_not_for_layers_that_see_less_far(llava, window, flags, capsys):
    """A packed row's attention knows no window. Who asked for plain rows need not be told their price."""
    shorten = lambda model, *rest: setattr(model.config.text_config, "sliding_window", window)
    with preceded("train.choose_layout", shorten):
        assert policy_of(llava, flags)[0].layout == ("plain" if window == 2047 else "packed")
    said = "window of 2047 tokens is shorter than --max-length 2048" in capsys.readouterr().out
    assert said == (window == 2047 and not flags)


@pytest.mark.parametrize("device", ["", "cuda:1", "cpu"])
def test_a_gpu_is_used_where_there_is_one(llava, monkeypatch, capsys, device):
    """Untold, a run would train on the CPU, for weeks. float16 overflows where the weights are of bf16."""

    def to(model, where):
        assert where == (device or "cuda") and capsys.readouterr().out == f"loading {llava}\n"
        return model

    monkeypatch.setattr("train.best_device", lambda: "cuda")
    monkeypatch.setattr(transformers.PreTrainedModel, "to", to)
    dtype = policy_of(llava, device and f"--device {device}")[1].get_base_model().dtype
    assert "loading" not in capsys.readouterr().out  # `to` was called, and has read it
    assert dtype == (torch.float32 if device == "cpu" else torch.bfloat16)


CONFIG, PROCESSOR, TEMPLATE = "config.json", "processor_config.json", "chat_template.jinja"
CANNOT_BE_TRAINED = {  # the reason: a model whose folder is copied, or none; a file; what is changed in it
    "cannot be loaded: Unrecognized processing class": (None, CONFIG, {"model_type": "llama"}),
    "is an encoder-decoder": (None, CONFIG, {"model_type": "florence2"}),
    "is an adapter: merge it first, by python examples/merge.py": (None, "adapter_config.json", {}),
    "needs code of its own, which is not run here": (None, CONFIG, {"model_type": "bunny-x", "auto_map": {}}),
    "has no token of nine tabs": ("bunny", CONFIG, {"vocab_size": 20}),
    "its processor has no patch_size": ("llava", PROCESSOR, {"patch_size": None}),
    "its processor has no image token": ("llava", PROCESSOR, {"processor_class": "GitProcessor"}),
    "does not have a chat template": ("llava", TEMPLATE, None),
    "does not take these messages: no": ("llava", TEMPLATE, "{{ raise_exception('no') }}"),
}


def changed_model(folder, to, file, values):
    """A copy of a model's folder with a file of other text, without it, or with other values in its JSON."""
    if folder:
        shutil.copytree(folder, to)
    if values is None:
        (to / file).unlink()
    elif isinstance(values, str):
        write(to / file, values)
    else:
        write(to / file, (json.loads((to / file).read_text()) if folder else {}) | values)
    return str(to)


@pytest.mark.parametrize("reason", CANNOT_BE_TRAINED)
def test_models_that_cannot_be_trained_are_refused_before_their_weights_are_read(tmp_path, request, reason):
    """The reason and what to do, in one line, and not after a download of gigabytes."""
    model, *change = CANNOT_BE_TRAINED[reason]
    changed = changed_model(model and request.getfixturevalue(model), tmp_path / "model", *change)
    with pytest.raises(BadInput, match=reason):
        train.load_processor(changed)


def test_code_of_a_model_that_the_library_knows_is_not_needed_and_not_run(llava, tmp_path):
    """Many folders of the hub still name the code that they came with."""
    names = {"AutoConfig": "own.C", "AutoModelForImageTextToText": "own.M", "AutoProcessor": "own.P"}
    folder = changed_model(llava, tmp_path / "model", CONFIG, {"auto_map": names})
    write(tmp_path / "model" / "own.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = P = None\n")
    assert train.load_model(folder) and not (tmp_path / "ran").exists()


def test_null_in_bunnys_config_is_no_value(bunny, tmp_path):
    """The library refuses it in the place of a rate, where a field that is not there has its default."""
    assert train.load_model(changed_model(bunny, tmp_path / "model", CONFIG, {"embd_pdrop": None}))


def test_numbers_of_bunnys_config_reach_the_language_model(bunny, fresh, tmp_path):
    """Phi-2 rotates 0.4 of a head, the library's default 0.5: each log-probability would be off."""
    batch = make_batch(PAIRS, fresh[1])
    for field, value in {"partial_rotary_factor": 0.25, "rope_theta": 2.0, "layer_norm_eps": 0.5}.items():
        model, _ = train.load_model(changed_model(bunny, tmp_path / field, CONFIG, {field: value}))
        with torch.no_grad():
            base, changed = (torch.cat(response_logps(of, batch)) for of in (fresh[0], model))
        assert (changed - base).abs().max() > 1e-4, field


def test_every_bunny_weight_lands_in_its_place(bunny, tmp_path):
    """A tensor left out would be random, and the run worthless. Small checkpoints have no index of shards."""
    renames = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
    }
    theirs = {name: of for file in bunny.glob("*.safetensors") for name, of in load_file(file).items()}
    folder = changed_model(bunny, tmp_path / "model", "model.safetensors.index.json", None)
    save_file(theirs, Path(folder, "model.safetensors"))
    ours = train.load_model(folder)[0].state_dict()
    for name, bunnys in renames.items():
        ours = {key.replace(name, bunnys): tensor for key, tensor in ours.items()}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, check_dtype=False)
    Path(folder, "model.safetensors").unlink()  # sizes of the tower are read from whichever shard has it
    shards = {name: f"{'vision_tower' in name}.safetensors" for name in theirs}
    for shard in {*shards.values()}:
        save_file({name: theirs[name] for name in shards if shards[name] == shard}, Path(folder, shard))
    write(Path(folder, "model.safetensors.index.json"), {"metadata": {}, "weight_map": shards})
    assert train.load_model(folder)


@pytest.mark.parametrize("size", [(48, 32), (20, 50)])
def test_bunnys_eye_by_hand(fresh, size):
    """A wrong eye would train in silence. Here: the image in a square of the mean colour, 0.5 * 255 = 127,
    and pixels from -1 to 1; SigLIP of 2 layers with 16 heads, without its last norm; Linear, GELU, Linear."""
    model, processor = fresh
    eye, projector = model.model.vision_tower, model.model.multi_modal_projector
    assert eye.config.num_attention_heads == 16
    torch.manual_seed(0)
    for parameter in (*eye.parameters(), *projector.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    square = Image.new("RGB", (max(size),) * 2, (127,) * 3)
    square.paste(noise(1, size), [(max(size) - side) // 2 for side in size])
    square = square.resize((32, 32), Image.Resampling.BICUBIC)
    pixels = torch.tensor([*square.tobytes()]).view(1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1
    features = eye.encoder(eye.embeddings(pixels)).last_hidden_state
    expected = projector.linear_2(F.gelu(projector.linear_1(features)))
    (seen,) = model.get_image_features(pixels_of(processor, noise(1, size))).pooler_output
    torch.testing.assert_close(seen, expected[0], rtol=1e-4, atol=1e-4)


def test_activation_of_bunny_is_its_own_in_one_kernel(fresh):
    """Bunny's gelu_new is eight kernels in the library. In float64 rounding hides no other function."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert torch.equal(fresh[0].get_decoder().layers[0].mlp.activation_fn(x), F.gelu(x, approximate="tanh"))


def test_every_rate_of_dropout_is_0_and_weights_are_frozen(loaded):
    """Weights that train drift; with dropout, policy and reference differ by chance: rewards are noise."""
    layer, dropout = torch.nn.Linear(1, 1), torch.nn.Dropout(0.1)
    layer.resid_pdrop = layer.attn_drop = layer.drop_prob = 0.1
    train.disable_dropout(torch.nn.Sequential(layer, dropout))
    assert (layer.resid_pdrop, layer.attn_drop, layer.drop_prob, dropout.p) == (0, 0, 0, 0)
    assert not any(parameter.requires_grad for parameter in loaded[0].parameters())


def test_pickled_weights_are_not_loaded(llava, tmp_path):
    """Unpickling runs whatever code the file holds."""
    folder = changed_model(llava, tmp_path / "model", "model.safetensors", None)
    torch.save(load_file(llava / "model.safetensors"), Path(folder, "pytorch_model.bin"))
    with pytest.raises(BadInput):
        train.load_model(folder)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lora_layers_compute_what_pefts_own_do(bunny, dtype, error):
    """The adapter is saved for peft to load: another forward pass would be another model there."""
    results = []
    for kind in train.LoraLinear, peft.tuners.lora.Linear:
        model = train.add_lora(train.load_model(str(bunny), dtype=dtype)[0], layer=kind)  # seeds torch
        move(model)
        layer = next(module for module in model.modules() if type(module) is kind)
        torch.nn.init.normal_(layer.base_layer.bias)  # Phi's begins at 0
        x = torch.randn(2, 5, layer.in_features, dtype=dtype, requires_grad=True)
        weights = [p for p in layer.parameters() if p.requires_grad]
        y = layer(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *weights])
        layer.merge()
        results.append([y, layer(x), *gradients])
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() < error * theirs.norm()
    assert (layer.r["default"], layer.lora_alpha["default"]) == (64, 128)  # the paper's


def test_one_wrong_row_of_six_is_enough(fresh, monkeypatch, capsys):
    """Mistakes of packing are of single rows, the library's of a row's place in a batch. Who asked for packed
    rows does not get others. The check takes one pass of each layout: each costs as much as an example."""
    both_off = False

    def one_off(model, batch):
        logps = response_logps(model, batch)
        if both_off or batch.take is not None:
            logps.image_rejected[-1] += 2 * train.TOLERANCE * (batch.labels[-1] >= 0).sum().sqrt()
        return logps

    passes = outputs_of(fresh[0])
    assert chosen(fresh) == "packed" and [len(output.logits) for output in passes] == [6, 1]
    monkeypatch.setattr("train.response_logps", one_off)
    assert chosen(fresh) == "plain"
    assert "plain rows take about twice as long" in capsys.readouterr().out
    assert "packed rows: log-probabilities are" in chosen(fresh, "packed")
    both_off = True
    assert "plain rows: log-probabilities are" in chosen(fresh) == chosen(fresh, "plain")


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
    assert train.choose_layout(*fresh, [long], max_length=500) == "packed"
    assert max(output.shape[:2].numel() for output in seen) == 3 * 500


def test_cudnn_attention_and_rounded_float32_are_off(bunny):
    """It plans anew for each shape; the layout's check would take rounded float32 for a mistake."""
    on_cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    on_cuda.enable_cudnn_sdp(True)
    cudnn.allow_tf32 = on_cuda.matmul.allow_tf32 = True
    train.load_model(str(bunny))
    assert not (on_cuda.cudnn_sdp_enabled() or cudnn.allow_tf32 or on_cuda.matmul.allow_tf32)
