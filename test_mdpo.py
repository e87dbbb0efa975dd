"""Tests to read after mdpo.py: a lesson, rows and packing, a step, one run by hand, a resumed run.

`pytest` runs them and those of tests/, which a reader need not read. Tiny random models, no network. Each
test says what breaks if it fails. Expected values are derived by hand, or by another way than the code takes.
"""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

# Here and in child processes: another number of threads adds in another order.
os.environ["OMP_NUM_THREADS"] = "1"

import peft
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import data
import mdpo
import train
from data import Example, make_batch
from mdpo import LogPs, mdpo_loss, mdpo_step, pack, response_logps, sequence_logps

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ROOT = Path(__file__).parent
LAYOUTS = pytest.mark.parametrize("layout", ["packed", "plain"])

TEXTS = [
    train.BUNNY_SYSTEM
    + " USER: Describe the picture. ASSISTANT: There is a red circle and a blue square. answers"
] * 3

# As llava-hf/llava-1.5-7b-hf: no space after ASSISTANT:, one after the answer, no </s>.
HUB_LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role | upper }}: {% endif %}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def softplus(x):
    """-log sigmoid(-x), with nothing but math."""
    return math.log1p(math.exp(x))


# --------------------------------------------------------------------------------------------------- a lesson

# beta 0.5: r(m_w,q,y_w) = 0.5 * (-10 + 11) = 0.5, r(m_w,q,y_l) = 0.5 * (-14 + 12) = -1, r(m_l,q,y_w) = 0.5 *
# (-13 + 12) = -0.5; margins 0.5 + 1 = 1.5 and 0.5 + 0.5 = 1. Every value expected below follows from these.
POLICY = LogPs(torch.tensor([-10.0]), torch.tensor([-14.0]), torch.tensor([-13.0]))
REF = LogPs(torch.tensor([-11.0]), torch.tensor([-12.0]), torch.tensor([-12.0]))
DPO, CONDITIONAL, ANCHOR = softplus(-1.5), softplus(-1.0), softplus(-0.5)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, DPO + CONDITIONAL + ANCHOR),  # mDPO, eq. 8
        ({"conditional": False}, DPO + ANCHOR),  # Table 2, minus conditional
        ({"anchors": ()}, DPO + CONDITIONAL),  # Table 2, minus anchored
        ({"conditional": False, "anchors": ()}, DPO),  # minus both
        ({"delta": 0.25}, DPO + CONDITIONAL + softplus(0.25 - 0.5)),
        # Table 4: a rejected reward is anchored from above, delta - r.
        ({"anchors": ("chosen", "rejected")}, DPO + CONDITIONAL + ANCHOR + softplus(-1.0)),
        ({"anchors": ("chosen", "image_rejected")}, DPO + CONDITIONAL + ANCHOR + softplus(-0.5)),
        ({"anchors": ("rejected",), "delta": 0.25}, DPO + CONDITIONAL + softplus(-1.25)),
        ({"anchors": ["chosen", "chosen"]}, DPO + CONDITIONAL + ANCHOR),  # no request for twice the weight
    ],
)
def test_loss_is_the_papers(options, expected):
    """A wrong sign, term or anchor direction trains something that is not mDPO."""
    losses, metrics = mdpo_loss(POLICY, REF, beta=0.5, **options)
    terms = [values.item() for name, values in metrics.items() if name.startswith("loss/")]
    assert [losses.item(), sum(terms)] == pytest.approx([expected] * 2, abs=1e-6)


def test_gradients_push_each_logp_the_right_way():
    """At policy = reference each term's slope is sigmoid(0) = 1/2: chosen -3 beta/2 (up), the two rejected
    +beta/2. Who copies the loss and names nothing gets beta 0.1, delta 0 and the three terms of eq. 8."""
    logps = torch.full((3, 1), -5.0, requires_grad=True)
    losses, _ = mdpo_loss(logps.unbind(), logps.detach().unbind())
    losses.sum().backward()
    assert logps.grad.flatten().tolist() == pytest.approx([-0.15, 0.05, 0.05])


def test_sequence_logps_by_hand():
    """What everyone who copies the loss needs next. Two sequences of a vocabulary of three; logits are logs
    of weights, so that probabilities are shares: positions 0, 1, 2 predict tokens 1, 2, 3.

    First: the prompt is token 0; tokens 2, 0, 1 have weights 3 of 6, 2 of 8, 1 of 4. Second: only its token 2
    counts, of weight 5 of 10; the end is padding, and the last position predicts nothing.
    """
    weights = [[[1, 2, 3], [2, 5, 1], [2, 1, 1], [9, 9, 1]], [[1, 1, 8], [2, 5, 3], [7, 1, 1], [1, 1, 1]]]
    labels = torch.tensor([[-100, 2, 0, 1], [-100, -100, 1, -100]])
    logits = torch.tensor(weights).log()
    expected = [math.log(3 / 6 * 2 / 8 * 1 / 4), math.log(5 / 10)]
    assert sequence_logps(logits, labels).tolist() == pytest.approx(expected, abs=1e-6)
    assert sequence_logps(logits.bfloat16(), labels).dtype == torch.float32


@LAYOUTS
@pytest.mark.parametrize("family, n_layers", [("bunny", 2 * 6), ("llava", 2 * 7)])
def test_step_0_loss_is_3_ln_2_and_trains_the_language_model(family, n_layers, layout, request):
    """Policy and reference are the same network at step 0, so each of the three terms is ln 2: any difference
    of image, dropout or adapter between the two passes shows here. A layer without gradient (reentrant
    checkpointing does that) or an adapter in the vision tower is a silent bug."""
    model, processor = with_lora(request.getfixturevalue(family))
    losses, _ = mdpo_step(model, laid_out(PAIRS, processor, layout))
    assert losses.tolist() == pytest.approx([3 * math.log(2)] * 3, abs=1e-5)
    losses.mean().backward()
    named = dict(model.named_parameters())
    adapter = {name for name in named if ".language_model." in name and ".lora_" in name}
    assert {name for name, p in named.items() if p.requires_grad} == adapter
    assert {name for name, p in named.items() if p.grad is not None} == adapter
    assert sum(bool(p.grad.any()) for name, p in named.items() if "lora_B" in name) == n_layers  # A's is 0


def test_a_step_is_the_loss_of_policy_and_reference(llava):
    """With the adapter left on, every reward is 0 for ever; a reference of one's own is scored by itself, and
    sees with its own projector. A wrong name that is swallowed trains with the defaults. A metric that keeps
    its graph keeps the activations of every step that is logged."""
    (model, processor), (other, _) = with_lora(llava), with_lora(llava)
    move(other)
    other.get_base_model().model.multi_modal_projector.linear_1.weight.data *= 2
    batch = make_batch(PAIRS, processor)
    with torch.no_grad():
        base, others = (response_logps(of, batch) for of in (model, other))
    move(model)
    options = {"beta": 0.5, "delta": 0.2, "anchors": ("rejected",)}
    for ref, more in (base, {}), (others, {"ref_model": other}):
        losses, metrics = mdpo_step(model, batch, **more, **options)
        expected, of_loss = mdpo_loss(response_logps(model, batch), ref, **options)
        torch.testing.assert_close(losses, expected)
        assert metrics.keys() == {"loss", *of_loss} and metrics["rewards/image_rejected"].abs().min() > 1e-3
        assert losses.requires_grad and not any(value.requires_grad for value in metrics.values())
    with pytest.raises(TypeError, match="bta"):
        mdpo_step(model, batch, bta=0.5)
    # Policy and reference share the projector's output: it would get no gradient, or move the reference.
    model.get_base_model().model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match="must be frozen"):
        mdpo_step(model, batch)


@LAYOUTS
def test_logps_are_those_of_the_librarys_own_call(loaded, layout):
    """Any error of template, boundary, end-of-sequence, mask, positions or image order is off by nats."""
    assert largest_error(*loaded, PAIRS, layout) < 1e-5


# --------------------------------------------------------------------------------------------------- the loss


def test_losses_and_metrics_are_those_of_each_example():
    """A mean or a sum over the batch inside the loss would be hidden by a batch of one; swapped or scaled
    metrics mislead every reader of the log.

    In example 2 policy and reference change places, so each reward changes its sign. In example 3 they are
    the same, as before training: a tie, which is not accurate, or a run would begin at 100%.
    """
    policy, ref = (LogPs(*map(torch.cat, zip(*of))) for of in ((POLICY, REF, REF), (REF, POLICY, REF)))
    losses, metrics = mdpo_loss(policy, ref, beta=0.5)
    expected = [DPO + CONDITIONAL + ANCHOR, softplus(1.5) + softplus(1.0) + softplus(0.5), 3 * math.log(2)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert {name: values.tolist() for name, values in metrics.items() if "rewards/" in name} == {
        "rewards/chosen": [0.5, -0.5, 0],
        "rewards/rejected": [-1, 1, 0],
        "rewards/image_rejected": [-0.5, 0.5, 0],
        "rewards/margins": [1.5, -1.5, 0],
        "rewards/image_margins": [1, -1, 0],
        "rewards/accuracies": [1, 0, 0],
        "rewards/image_accuracies": [1, 0, 0],
    }


def test_dpo_needs_no_third_logp():
    """Plain DPO must not be charged for the pass over m_l."""
    losses, metrics = mdpo_loss(POLICY[:2], LogPs(*REF[:2]), beta=0.5, conditional=False, anchors=())
    assert losses.item() == pytest.approx(DPO, abs=1e-6) and not any("image" in name for name in metrics)


B2 = torch.zeros(2)
WITH_GRAD = B2.clone().requires_grad_()
TWO, THREE = (B2,) * 2, (B2,) * 3
OF_DPO = {"conditional": False, "anchors": ()}
WRONG_ARGUMENTS = [  # policy_logps, ref_logps, options, what the message must say
    ((B2, torch.zeros(2, 1), B2), THREE, {}, "policy_logps.rejected must be floats of shape (B,)"),
    ((torch.tensor(0.0), B2, B2), THREE, {}, "policy_logps.chosen must be floats of shape (B,)"),
    (THREE, (B2, B2, torch.zeros(1)), {}, "ref_logps.image_rejected must be floats of shape (B,)"),
    (THREE, (B2, torch.zeros(3), B2), {}, "ref_logps.rejected must be floats of shape (B,)"),
    (THREE, (B2.long(), B2, B2), {}, "ref_logps.chosen must be floats of shape (B,)"),
    (THREE, (WITH_GRAD, B2, B2), {}, "ref_logps.chosen requires grad, the reference does not"),
    ((WITH_GRAD,) * 3, (WITH_GRAD,) * 3, {}, "are the two swapped"),
    (THREE, TWO, OF_DPO, "ref_logps.image_rejected must be floats of shape (B,)"),
    (TWO, THREE, OF_DPO, "policy_logps.image_rejected must be floats of shape (B,)"),
    (TWO, TWO, {"anchors": ()}, "policy_logps.image_rejected must be floats"),
    (TWO, TWO, OF_DPO | {"anchors": ("image_rejected",)}, "policy_logps.image_rejected must be floats"),
    (torch.zeros(3, 2), THREE, {}, "must be a LogPs or a tuple of its tensors each"),
    (THREE, torch.zeros(3, 2), {}, "must be a LogPs or a tuple of its tensors each"),
    (THREE, THREE, {"anchors": ("cropped",)}, "anchors must be a tuple or set of names"),
    (THREE, THREE, {"anchors": ""}, "anchors must be a tuple or set of names"),
    (THREE, THREE, {"beta": 0}, "beta must be above 0 and finite, got 0"),
    (THREE, THREE, {"beta": math.inf}, "beta must be above 0 and finite, got inf"),
    (THREE, THREE, {"beta": math.nan}, "beta must be above 0 and finite, got nan"),
]


@pytest.mark.parametrize("policy, ref, options, message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(policy, ref, options, message):
    """(B,) against (B, 1) broadcasts to (B, B) and trains on nonsense if it is let through."""
    with pytest.raises(ValueError, match=re.escape(message)):
        mdpo_loss(policy, ref, **options)


def test_loss_copied_alone_works(monkeypatch):
    """The README has people copy it, down to `mdpo_step`, into a trainer that may have no other package."""
    for name in ("transformers", "peft", "PIL", "tqdm", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    scope = {"__name__": "elsewhere"}
    exec(Path(mdpo.__file__).read_text().partition("def mdpo_step")[0], scope)
    losses, _ = scope["mdpo_loss"](tuple(POLICY), tuple(REF), beta=0.5)
    assert losses.item() == pytest.approx(DPO + CONDITIONAL + ANCHOR, abs=1e-6)
    assert "sequence_logps" in scope


# ----------------------------------------------------------------------------------------- models and batches


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard():
    """Started in the background, or under nohup, the tests and their runs would ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def bunny(tmp_path_factory):
    """A folder in Bunny's file format; its config asks for dropout."""
    tiny_bunny = pytest.importorskip("examples.tiny_bunny", reason="examples/ is not here")
    folder = tmp_path_factory.mktemp("models") / "bunny"
    return tiny_bunny.write_bunny(folder, TEXTS, "x-patch8-32", hidden=32)


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A folder as llava-hf/llava-1.5-7b-hf: CLIP + Llama, sentencepiece-like tokenizer, its template."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = tokenizers.SentencePieceBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=400, special_tokens=special, show_progress=False)
    vocabulary = json.loads(bpe.to_str())["model"]
    tokenizer = transformers.LlamaTokenizer(
        vocab=vocabulary["vocab"],
        merges=[tuple(merge) for merge in vocabulary["merges"]],
        extra_special_tokens={"image_token": "<image>"},
        pad_token="<pad>",
        add_bos_token=True,
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=HUB_LLAVA_TEMPLATE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=32, patch_size=8)
    sizes |= {"vocab_size": len(tokenizer), "attention_dropout": 0.1}
    text = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=processor.image_token_id
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["bunny", "llava"])
def loaded(request):
    """(model, processor) of each family, with sharper weights than a random start has."""
    model, processor = train.load_model(str(request.getfixturevalue(request.param)))
    torch.manual_seed(1)
    for parameter in model.model.language_model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train(), processor


def noise(seed, size=(48, 32)):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def pair(question, chosen, rejected, *images):
    """An `Example` of no images, or of m_w and m_l: an image each, or a list of them."""
    lists = [image if isinstance(image, list) else [image] for image in images or ([], [])]
    return Example(question, chosen, rejected, *map(tuple, lists))


def message(role, *parts):
    """A chat message of texts, and of images where "IMAGE" stands."""
    parts = [{"type": "image"} if part == "IMAGE" else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": parts}


def asked(question, n_images=1):
    """A question as `read_examples` gives it."""
    return [message("user", *["IMAGE"] * n_images, question)]


def laid_out(pairs, processor, layout="packed", **options):
    """A batch of rows, or the same packed."""
    batch = make_batch(pairs, processor, share=layout == "packed", **options)
    return pack(batch) if layout == "packed" else batch


def prefix_length(batch, row=0):
    """Where the response of a row begins."""
    return (batch.labels[row] >= 0).int().argmax().item()


PAIRS = [  # lengths differ every way
    pair("Describe it.", "There is a red circle.", "A blue square and a red circle.", noise(1), noise(2)),
    pair("What is in it?", "A blue square, a red circle too.", "No.", noise(3, (32, 40)), noise(4, (32, 40))),
    pair("How many?", "One.", "There is a red square.", noise(5), noise(6)),
]


def largest_error(model, processor, pairs, layout, texts=None):
    """How far log-probabilities are from the library's own, in nats per square root of a response's tokens.

    texts: (prompt, y_w, y_l) of each pair, as its model was tuned on them; by default as `full_text` writes.
    """
    batch, errors = laid_out(pairs, processor, layout), []
    with torch.no_grad():
        logps = response_logps(model, batch)
    lengths = (batch.labels >= 0).sum(1).view(3, -1)
    for i, one in enumerate(pairs):
        of_pair = texts[i] if texts else full_text(processor, *one[:3])
        y_w, y_l = library_logps(model, processor, *of_pair, one.images)
        third, _ = library_logps(model, processor, *of_pair, one.images_rejected)
        for name, (n, expected) in enumerate((y_w, y_l, third)):
            assert lengths[name, i] == n
            errors.append(abs(logps[name][i].item() - expected) / n**0.5)
    return max(errors)


@torch.no_grad()
def library_logps(model, processor, prompt, y_w, y_l, images):
    """The yardstick: (tokens, log-probability) of two responses, by the library's own call on each sequence.

    They begin where prompt, prompt + y_w and prompt + y_l begin to differ, and end with their first
    end-of-sequence.
    """
    bos, eos = processor.tokenizer.bos_token, processor.tokenizer.eos_token_id
    options = {"images": [[*images]] if images else None, "return_tensors": "pt"}
    options["add_special_tokens"] = bos is None or not prompt.startswith(bos)
    encoded = [processor(text=[prompt + response], **options) for response in ("", y_w, y_l)]
    ids = [inputs["input_ids"][0].tolist() for inputs in encoded]
    start, found = len(os.path.commonprefix(ids)), []  # of lists, too
    for inputs, whole in zip(encoded[1:], ids[1:]):
        scored = whole[start : whole.index(eos, start) + 1]
        logps = model(**inputs).logits[0, start - 1 :].double().log_softmax(-1)
        found.append((len(scored), sum(row[token].item() for row, token in zip(logps, scored))))
    return found


def full_text(processor, question, *responses):
    """(prompt, each response) as the model was tuned on them, written out."""
    if processor.tokenizer.eos_token == "</s>":
        prompt = f"USER: <image>\n{question} ASSISTANT:"
    else:
        prompt = train.BUNNY_SYSTEM + " USER: " + "\t" * 9 + f"\n{question} ASSISTANT:"
    return prompt, *(f" {response}{processor.tokenizer.eos_token}" for response in responses)


def worked_example():
    """The batch in the docstring of `Batch`, read from its text: one pair, m_w = m_l = 7 7, q = 5 6."""
    rows = re.findall(r"^ +\d +(\w+) +([\d pad]+?)  +(-100.*?) +(\d)$", data.Batch.__doc__, re.MULTILINE)
    names, ids, labels, owner = zip(*rows)
    numbers = lambda texts: torch.tensor([[*map(int, text.replace("pad", "9").split())] for text in texts])
    ids, labels = numbers(ids), numbers(labels)
    tokens = {"input_ids": ids, "attention_mask": (ids != 9).long()}
    return data.Batch(tokens, labels, [*map(int, owner)], names, keys=[(0, 0)], ids=["1"])


def as_text(numbers):
    """A tensor as the docstring of `Batch` writes it."""
    return " ".join(map(str, numbers.flatten().tolist()))


def test_the_worked_example_is_packed_as_by_hand(llava):
    """Readers check their understanding on it, and an index that is off by one trains on other tokens.

    Three rows of 7 are 0-6, 7-13 and 14-20. Of the second, only the response is taken: 3 and 0, at 11 and 12.
    The packed row has places 0-6, 7-8 and 9-15; the token before y_w and that before y_l are both at 3.
    """
    batch = worked_example()
    packed = pack(batch)
    assert as_text(packed.take) == "0 1 2 3 4 5 6 11 12 14 15 16 17 18 19 20"
    assert as_text(packed.answers) == "4 5 6 11 12 18 19 20"
    assert as_text(packed.predictors) == "3 4 5 3 7 12 13 14"
    assert packed.blocks == [(7, 0, 4), (2, 0, 4), (7, 2, 4)]  # (tokens taken, whose prefix, its length)
    model, _ = train.load_model(str(llava))
    inputs = mdpo.forward_inputs(model, packed)
    assert as_text(inputs["input_ids"]) == "7 7 5 6 1 2 0 3 0 7 7 5 6 1 2 0"
    assert as_text(inputs["position_ids"]) == "0 1 2 3 4 5 6 4 5 0 1 2 3 4 5 6"
    [drawn] = re.findall(r"^# +position (.*)$", Path(mdpo.__file__).read_text(), re.MULTILINE)
    assert drawn.replace("|", " ").split() == as_text(inputs["position_ids"]).split()
    # As said there, the rows need nothing but `sequence_logps`.
    logps = sequence_logps(model(**batch.inputs).logits, batch.labels)
    torch.testing.assert_close(torch.cat(response_logps(model, packed)), logps, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- model loading


def with_lora(folder, checkpointing=True):
    model, processor = train.load_model(str(folder))
    model = train.add_lora(model, rank=4, alpha=8)
    if checkpointing:
        train.enable_checkpointing(model)
    return model.train(), processor


def move(model, std=0.1):
    """Make the policy another model than its reference: an adapter's B starts at 0."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def test_a_loss_of_ones_own_gets_the_batch(llava):
    """Length normalisation, or weights of one's own, need more than log-probabilities."""
    model, processor = with_lora(llava)
    batch = make_batch(PAIRS, processor)

    def weighted(policy, ref, batch, weight):
        return policy.chosen * weight * len(batch.ids), {"mine": ref.rejected}

    losses, metrics = mdpo_step(model, batch, weighted, weight=5)
    logps = response_logps(model, batch)  # of both, as the adapter is new
    torch.testing.assert_close(losses, logps.chosen * 5 * len(PAIRS))
    torch.testing.assert_close(metrics, {"loss": losses.detach(), "mine": logps.rejected.detach()})


# ------------------------------------------------------------------------------------------------------- data


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A data folder with images a.png and merged_images/llava-1.jpg."""
    noise(1).save(tmp_path / "a.png")
    (tmp_path / "merged_images").mkdir()
    noise(2).save(tmp_path / "merged_images" / "llava-1.jpg")
    return tmp_path


def authors(**changes):
    prompt = f"{train.BUNNY_SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    return {"img_path": "a.png", "prompt": prompt, "chosen": "A cat.", "rejected": "A dog."} | changes


MESSAGES = {
    "images": ["a.png"],
    "prompt": asked("What is it?"),
    "chosen": [message("assistant", " A cat.\n")],
    "rejected": [{"role": "assistant", "content": "A dog."}],
}

NO_PROMPT = {"image": "a.png"} | {  # TRL's implicit prompt: whole conversations, alike up to the last turn
    name: [*MESSAGES["prompt"], *MESSAGES[name]] for name in ("chosen", "rejected")
}


def gradient(width, height, step=2):
    """Red is `step` times the column, green `step` times the row: a part of it says where it was."""
    pixels = (value for y in range(height) for x in range(width) for value in (step * x, step * y, 77))
    return Image.frombytes("RGB", (width, height), bytes(pixels))


# ---------------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """7 examples: with batches of 4 and micro-batches of 2, an epoch is 2 + 2, then 2 + 1."""
    folder, records = tmp_path_factory.mktemp("data"), []
    (folder / "images").mkdir()
    for i, word in enumerate("red blue circle square picture describe curious".split()):
        noise(i, (48, 48)).save(folder / "images" / f"{i}.png")
        prompt = f"{train.BUNNY_SYSTEM} USER: <image>\nWhat is {word}? ASSISTANT:"
        record = {"img_path": f"images/{i}.png", "prompt": prompt, "chosen": f"There is a {word} circle."}
        records.append(record | {"rejected": "A blue square, and " * i + "a picture."})
    return write(folder / "silkie.json", records)


def command(bunny, small, out, *more):
    line = f"--model {bunny} --data {small} --out {out} --epochs 2 --batch-size 4 --micro-batch-size 2"
    line += " --lr 1e-3 --workers 0 --lora-rank 4 --lora-alpha 8 --device cpu"
    return [*line.split(), *map(str, more)]


def adapter(out):
    return load_file(Path(out) / "adapter_model.safetensors")


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(bunny, small, tmp_path_factory):
    """A whole run, nothing in its way."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main(command(bunny, small, out)) == 0
    return out


def test_run_writes_what_the_readme_promises(finished, bunny):
    """Adapter, processor, arguments, log: each is somebody's next step."""
    names = {path.name for path in finished.iterdir()}
    promised = "adapter_model.safetensors adapter_config.json tokenizer.json processor_config.json args.json"
    assert set(promised.split()) | {"metrics.jsonl", "checkpoint.pt"} <= names
    assert not [name for name in names if name.startswith("epoch-")]  # --keep-epochs asks for them
    assert json.loads((finished / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bunny)
    records = log_of(finished)
    assert [(record["step"], record["epoch"]) for record in records] == [(1, 0.5), (2, 1), (3, 1.5), (4, 2)]
    assert records[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5)


def crop_by_hand(image, rng, low, high):
    """An aspect is uniform in its logarithm, between two that are next to 3/4 and 4/3 in boxes which fit."""
    width, height = image.size
    n = max(1, width * height * (low + (high - low) * rng.random()))
    first, last = (min(max(aspect, n / height**2), width**2 / n) for aspect in (3 / 4, 4 / 3))
    aspect = first * (last / first) ** rng.random()
    w, h = max(1, round((n * aspect) ** 0.5)), max(1, round((n / aspect) ** 0.5))
    x, y = rng.randrange(width - w + 1), rng.randrange(height - h + 1)
    return image.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + w, y + h))


def run_by_hand(folder, data_file, a):
    """A whole run from its arguments `a` alone: one sequence at a time, peft's own layers, no packing, no
    checkpointing, AdamW, clipping and schedule written out. -> (a record for each step, the adapter)."""
    a = SimpleNamespace(**a)
    records = json.loads(Path(data_file).read_text())
    if a.limit:
        records = [records[i] for i in sorted(random.Random(a.seed).sample(range(len(records)), a.limit))]
    draw, held = random.Random(f"{a.seed} held out"), set()
    while len(held) < a.eval_size:
        held.add(draw.randrange(len(records)))
    training = [record for i, record in enumerate(records) if i not in held]
    held_out = [record for i, record in enumerate(records) if i in held]

    def open_(record):
        return Image.open(Path(data_file).parent / record["img_path"]).convert("RGB")

    def rejected_image(record, key):
        epoch, index = key
        rng = random.Random(f"{a.seed} {epoch} {index}")
        if a.reject == "crop":
            return crop_by_hand(open_(record), rng, *a.crop)
        pool = records if epoch == "held out" else training
        pool = sorted(pool, key=lambda record: record["img_path"])
        while (other := rng.choice(pool)) == record:
            pass
        return open_(other)

    model, processor = train.load_model(str(folder))
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n]
    torch.manual_seed(a.seed)
    config = peft.LoraConfig(r=a.lora_rank, lora_alpha=a.lora_alpha, lora_dropout=0, target_modules=names)
    model = peft.get_peft_model(model, config)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    states = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in weights.items()}

    def logp(prompt, response, image):
        if a.no_image:
            prompt, image = prompt.replace(processor.image_token + "\n", ""), None
        shown = {"images": [image] if image else None, "return_tensors": "pt"}
        asked, inputs = (processor(text=[text], **shown) for text in (prompt, prompt + response))
        start = asked["input_ids"].shape[1]
        ids = inputs["input_ids"][0, : a.max_length]
        rows = model(**inputs).logits[0, start - 1 :]
        return sum(rows[i].log_softmax(0)[id] for i, id in enumerate(ids[start:]))

    def losses_of(record, key):
        prompt = record["prompt"]  # LLaVA's own template writes the same
        y_w, y_l = (f" {record[name]}{processor.tokenizer.eos_token}" for name in ("chosen", "rejected"))
        m_w, m_l = open_(record), rejected_image(record, key)
        scored = (prompt, y_w, m_w), (prompt, y_l, m_w), (prompt, y_w, m_l)
        with torch.no_grad(), model.disable_adapter():
            reference = [logp(*texts_and_image) for texts_and_image in scored]
        policy = [logp(*texts_and_image) for texts_and_image in scored]
        r = {name: a.beta * (p - q) for name, p, q in zip(LogPs._fields, policy, reference)}
        terms = {"loss/dpo": r["chosen"] - r["rejected"]}
        if not a.no_conditional:
            terms["loss/conditional"] = r["chosen"] - r["image_rejected"]
        values = {name: -torch.sigmoid(margin).log() for name, margin in terms.items()}
        up = {"chosen": 1, "rejected": -1, "image_rejected": -1}
        anchored = [-torch.sigmoid(up[n] * (r[n] - a.delta)).log() for n in a.anchors if n in up]
        values |= {"loss/anchor": sum(anchored)} if anchored else {}
        values |= {"loss": sum(values.values())}
        values |= {f"rewards/{name}": reward for name, reward in r.items()}
        for name, other in (("accuracies", "rejected"), ("image_accuracies", "image_rejected")):
            margin = r["chosen"] - r[other]
            known = margin.abs() > 1e-5 or not any(r.values())  # else its sign is rounding's
            values[f"rewards/{name}"] = (margin > 0).float() if known else torch.tensor(math.nan)
        return values

    def mean(values):
        return {name: sum(value[name].item() for value in values) / len(values) for name in values[0]}

    steps_an_epoch = -(-len(training) // a.batch_size)
    n_steps, log = a.epochs * steps_an_epoch, []
    n_warmup = min(math.ceil(a.warmup * n_steps), n_steps - 1)  # a single step trains: a warm-up begins at 0
    for step in range(n_steps):
        epoch, at = divmod(step, steps_an_epoch)
        order = list(range(len(training)))
        random.Random(f"{a.seed} order {epoch}").shuffle(order)
        batch = order[at * a.batch_size : (at + 1) * a.batch_size]
        values = [losses_of(training[i], (epoch, i)) for i in batch]
        mean_loss = sum(value["loss"] for value in values) / len(batch)
        gradients = dict(zip(weights, torch.autograd.grad(mean_loss, weights.values())))
        norm = sum(g.square().sum() for g in gradients.values()).sqrt().item()
        if step < n_warmup:
            lr = a.lr * step / n_warmup
        else:
            lr = a.lr * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * min(1, a.max_grad_norm / norm)
                (m, v), (b1, b2) = states[name], a.betas
                m.mul_(b1).add_((1 - b1) * gradient)
                v.mul_(b2).add_((1 - b2) * gradient**2)
                m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
                weight -= lr * (a.weight_decay * weight + m_hat / (v_hat.sqrt() + 1e-8))
        log.append(mean(values) | {"lr": lr, "grad_norm": norm})
        if held_out and at == steps_an_epoch - 1:
            with torch.no_grad():
                values = [losses_of(record, ("held out", i)) for i, record in enumerate(held_out)]
            log[-1] |= {f"eval/{name}": value for name, value in mean(values).items()}
    return log, {name.replace(".default", ""): weight.detach() for name, weight in weights.items()}


PAPER = dict(  # Section 4.1, and the authors' released config
    epochs=3, batch_size=32, micro_batch_size=4, lr=1e-5, warmup=0.1, betas=(0.9, 0.98), weight_decay=0.05,
    max_grad_norm=1.0, beta=0.1, delta=0.0, no_conditional=False, anchors=("chosen",), reject="crop",
    crop=(0.01, 0.2), lora_rank=64, lora_alpha=128, seed=0, limit=None, eval_size=0, max_length=2048,
    no_image=False,
)  # fmt: skip
RUNS = {  # what is not the paper's: only that is given, so that the defaults are tested, too
    "the paper's settings": dict(epochs=2, batch_size=4, micro_batch_size=2),
    "every number changed": dict(
        batch_size=3, micro_batch_size=1, lr=0.02, warmup=0.4, betas=(0.8, 0.9), weight_decay=1.0,
        max_grad_norm=0.3, beta=0.5, delta=0.3, anchors=("chosen", "rejected", "image_rejected"),
        crop=(0.2, 0.5), lora_rank=2, lora_alpha=12, seed=3, limit=6, eval_size=2, max_length=90,
    ),
    "a random image": dict(
        epochs=2, batch_size=5, micro_batch_size=5, lr=0.03, warmup=0.0, weight_decay=0.0, max_grad_norm=100,
        no_conditional=True, anchors=("image_rejected",), delta=-0.2, reject="random", lora_rank=3,
        seed=1, eval_size=2,
    ),
    "DPO": dict(epochs=2, batch_size=4, lr=0.01, no_conditional=True, anchors=("none",), lora_rank=4, seed=2),
    "DPO without images": dict(
        epochs=1, batch_size=3, lr=0.01, no_conditional=True, anchors=("none",), no_image=True, seed=4
    ),
    "one step": dict(epochs=1, lr=0.01),
}  # fmt: skip


def flags(settings):
    """The words of a command line."""
    words = []
    for name, value in settings.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return words


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_its_arguments_say(llava, small, tmp_path, name):
    """An argument that is ignored, a gradient that is not clipped, a schedule that is a step late, a last
    batch divided by the full size, one rejected image for all epochs: each trains something else than the
    user asked for, in silence."""
    settings, out = PAPER | RUNS[name], tmp_path / "out"
    arguments = f"--model {llava} --data {small} --out {out} --workers 0 --device cpu".split()
    assert train.main(arguments + flags(RUNS[name])) == 0
    steps = [record for record in log_of(out) if record["step"] > 0]
    expected, weights = run_by_hand(llava, small, settings)
    for record, values in zip(steps, expected, strict=True):
        assert ("eval/loss" in record) == ("eval/loss" in values)
        for key, value in values.items():
            if key not in record:  # where no term asks for the rejected image
                assert "image" in key and settings["no_conditional"]
            elif not math.isnan(value):
                assert record[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (record["step"], key)
    saved = adapter(out)
    assert saved.keys() == weights.keys()
    start = run_by_hand(llava, small, settings | {"epochs": 0})[1]
    apart = sum((saved[k] - weights[k]).square().sum().item() for k in weights)
    moved = sum((start[k] - weights[k]).square().sum().item() for k in weights)
    assert apart < 1e-4 * moved


def fork(function, *arguments):
    """Start function(*arguments) in a copy of this process."""

    def run():
        torch.set_num_threads(1)  # makes torch's pool anew, before threads race to do so
        sys.exit(function(*arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.fixture(scope="session")
def six_epochs(llava, small, tmp_path_factory):
    """(arguments of 12 steps, the adapter of the run that was not stopped)."""
    arguments = lambda out: command(llava, small, out, *"--epochs 6 --save-every 1 --eval-size 1".split())
    whole = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(arguments(whole)) == 0
    return arguments, adapter(whole)


def goes_on_exactly(six_epochs, cut):
    """Resumed, the adapter comes out bit for bit, and the log holds each step once."""
    _, whole = six_epochs
    assert train.main(["--resume", str(cut)]) == 0
    assert [record["step"] for record in log_of(cut)] == list(range(13))
    ours = adapter(cut)
    assert ours.keys() == whole.keys() and all(torch.equal(ours[k], whole[k]) for k in ours)


@pytest.mark.parametrize("seed", range(3))
def test_resume_after_sigkill_is_exact(six_epochs, tmp_path, monkeypatch, seed):
    """Hours of training hang on it. The kill comes at any moment within 50 ms of a drawn step."""
    rng, cut, log = random.Random(seed), tmp_path / "cut", train.log
    last, delay = rng.randint(1, 6), rng.uniform(0, 0.05)

    def log_and_die_soon(out, records, record):
        log(out, records, record)
        if record["step"] == last:
            threading.Timer(delay, os.kill, [os.getpid(), signal.SIGKILL]).start()

    with monkeypatch.context() as patched:
        patched.setattr(train, "log", log_and_die_soon)
        process = fork(train.main, six_epochs[0](cut))
        process.join()
    assert process.exitcode == -signal.SIGKILL
    goes_on_exactly(six_epochs, cut)


def test_model_and_data_are_required(capsys):
    """Who starts the script without reading needs the two names: one of them says nothing of the other."""
    assert train.main(["--resume", str(ROOT / "nowhere")]) == 2
    assert "nowhere: cannot be resumed: [Errno 2]" in capsys.readouterr().err
    for given in ([], ["--model", "m"], ["--data", "d"]):
        assert train.main(given) == 2
        assert "error: --model and --data are required (--help lists" in capsys.readouterr().err
