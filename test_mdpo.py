"""Tests. The first are a lesson, to be read after mdpo.py. Run: `pytest`. Tiny random models, no network.

Each test says what breaks if it fails. Expected values are derived by hand, or by another way than the code takes.
"""

import colorsys
import contextlib
import copy
import gc
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # here and in child processes: another number of threads adds in another order

import peft
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import data
import mdpo
import train
from data import BadInput, Example, Pairs, make_batch, open_image, read_examples
from examples import families, shapes, tiny_bunny
from examples.answer import generate_answers
from mdpo import LogPs, mdpo_loss, mdpo_step, pack, response_logps, sequence_logps

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ROOT = Path(__file__).parent
LAYOUTS = pytest.mark.parametrize("layout", ["packed", "plain"])
TEXTS = [
    train.BUNNY_SYSTEM + " USER: Describe the picture. ASSISTANT: There is a red circle and a blue square. answers"
] * 3
HUB_LLAVA_TEMPLATE = (  # what llava-hf/llava-1.5-7b-hf does: no space after ASSISTANT:, one after the answer, no </s>
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def softplus(x):
    """-log sigmoid(-x), with nothing but math."""
    return math.log1p(math.exp(x))


# ------------------------------------------------------------------------------------------------------ a lesson
#
# Read this after mdpo.py: what each term does, and what one step computes. `bunny` and `loaded` are tiny models, `PAIRS` a
# few pairs, both defined below.

# beta 0.5: r(m_w,q,y_w) = 0.5 * (-10 + 11) = 0.5, r(m_w,q,y_l) = 0.5 * (-14 + 12) = -1, r(m_l,q,y_w) = 0.5 * (-13 + 12)
# = -0.5; margins 0.5 + 1 = 1.5 and 0.5 + 0.5 = 1. Every expected value below follows from these three rewards.
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
        ({"anchors": ("chosen", "rejected")}, DPO + CONDITIONAL + ANCHOR + softplus(-1.0)),  # Table 4: 0 - r_l = 1
        ({"anchors": ("chosen", "image_rejected")}, DPO + CONDITIONAL + ANCHOR + softplus(-0.5)),  # Table 4
        ({"anchors": ("rejected",), "delta": 0.25}, DPO + CONDITIONAL + softplus(-1.25)),  # delta - r_l = 1.25
    ],
)
def test_loss_is_the_papers(options, expected):
    """A wrong sign, term or anchor direction trains something that is not mDPO."""
    losses, metrics = mdpo_loss(POLICY, REF, beta=0.5, **options)
    assert losses.shape == (1,) and losses.item() == pytest.approx(expected, abs=1e-6)
    assert sum(v.item() for k, v in metrics.items() if k.startswith("loss/")) == pytest.approx(expected, abs=1e-6)


def test_gradients_push_each_logp_the_right_way():
    """At policy = reference each term's slope is sigmoid(0) = 1/2: chosen -3 beta/2 (up), the two rejected +beta/2."""
    policy = LogPs(*(torch.tensor([-5.0], requires_grad=True) for _ in range(3)))
    mdpo_loss(policy, LogPs(*(p.detach() for p in policy)), beta=0.1)[0].sum().backward()
    assert [p.grad.item() for p in policy] == pytest.approx([-0.15, 0.05, 0.05])


def test_anchor_is_what_stops_the_chosen_from_falling():
    """DPO and CoPO see only differences, so all three may fall together for free; AncPO charges for it."""
    fallen = LogPs(*(p - 30 for p in REF))
    without, _ = mdpo_loss(fallen, REF, anchors=())
    assert without.item() == pytest.approx(2 * math.log(2), abs=1e-5)  # as if nothing had happened
    assert mdpo_loss(fallen, REF)[0].item() == pytest.approx(2 * math.log(2) + softplus(3.0), abs=1e-5)


def test_sequence_logps_by_hand():
    """What everyone who copies the loss needs next. Two sequences of a vocabulary of three; logits are logs of weights, so
    that probabilities are shares: positions 0, 1, 2 predict tokens 1, 2, 3.

    First: the prompt is token 0; tokens 2, 0, 1 have weights 3 of 6, 2 of 8, 1 of 4. Second: only its token 2 counts, of
    weight 5 of 10; the end is padding, and the last position predicts nothing.
    """
    weights = [[[1, 2, 3], [2, 5, 1], [2, 1, 1], [9, 9, 1]], [[1, 1, 8], [2, 5, 3], [7, 1, 1], [1, 1, 1]]]
    labels = torch.tensor([[-100, 2, 0, 1], [-100, -100, 1, -100]])
    expected = [math.log(3 / 6 * 2 / 8 * 1 / 4), math.log(5 / 10)]
    logits = torch.tensor(weights, dtype=torch.float64).log()
    assert sequence_logps(logits, labels).tolist() == pytest.approx(expected, abs=1e-6)
    assert sequence_logps(logits.bfloat16(), labels).dtype == torch.float32
    logits.requires_grad_()
    sequence_logps(logits, labels).sum().backward()
    assert logits.grad[0, 3].abs().max() == logits.grad[1, 0].abs().max() == 0 < logits.grad[0, 0].abs().max()


@LAYOUTS
@pytest.mark.parametrize("family", ["bunny", "llava"])
def test_step_0_loss_is_3_ln_2(family, layout, request):
    """Policy and reference are the same network at step 0, so each of the three terms is ln 2: any difference of image,
    dropout or adapter between the two passes shows here."""
    model, processor = with_lora(request.getfixturevalue(family))
    losses, _ = mdpo_step(model, laid_out(PAIRS, processor, layout))
    assert losses.tolist() == pytest.approx([3 * math.log(2)] * 3, abs=1e-5)


def test_reference_is_the_base_model(bunny):
    """With the adapter left on, every reward is 0 for ever, and training pulls at nothing."""
    model, processor = with_lora(bunny)
    batch = make_batch(PAIRS, processor)
    base = response_logps(model, batch)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    moved = response_logps(model, batch)
    _, metrics = mdpo_step(model, batch)
    assert metrics["rewards/chosen"].abs().min() > 1e-3
    torch.testing.assert_close(metrics["rewards/chosen"], 0.1 * (moved.chosen - base.chosen).detach())


def test_each_image_of_a_step_is_encoded_once(bunny, small, tmp_path, monkeypatch):
    """Vision towers are a third of a step: policy and reference share an encoding, of the same two images an example."""
    tower = transformers.models.siglip.modeling_siglip.SiglipVisionModel
    forward, sizes = tower.forward, []
    count = lambda self, pixel_values, **options: sizes.append(len(pixel_values)) or forward(self, pixel_values, **options)
    monkeypatch.setattr(tower, "forward", count)
    assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1)) == 0
    assert sizes[-4:] == [4, 4, 4, 2]  # micro-batches of 2, 2, 2 and 1 examples; before them, the check of the rows


def test_rejected_response_does_not_see_the_chosen_one(loaded):
    """In a packed row y_l stands behind y_w; one leaked attention entry would let it copy."""
    model, processor = loaded
    logps = [
        response_logps(model, pack(make_batch([PAIRS[0]._replace(chosen=chosen)], processor))).rejected.item()
        for chosen in ("One.", "There is a blue square and a red circle, a red circle.")
    ]
    assert logps[0] == pytest.approx(logps[1], abs=1e-4)


@LAYOUTS
def test_logps_are_those_of_the_librarys_own_call(loaded, layout):
    """Any error of template, boundary, end-of-sequence, mask, positions or image order moves these by
    nats."""
    model, processor = loaded
    logps = response_logps(model, laid_out(PAIRS, processor, layout))
    for i, (question, chosen, rejected, (image,), (image_rejected,), *_) in enumerate(PAIRS):
        prompt, y_w = full_text(processor, question, chosen)
        _, y_l = full_text(processor, question, rejected)
        pairs = ((y_w, image), (y_l, image), (y_w, image_rejected))
        expected = [sequence_logp(model, processor, prompt, y, m) for y, m in pairs]
        assert [logps[field][i].item() for field in range(3)] == pytest.approx(expected, rel=1e-5, abs=1e-4)


# ------------------------------------------------------------------------------------------------------- the loss


def test_the_defaults_are_the_papers():
    """Who copies the loss and names nothing gets beta 0.1, delta 0, the conditional term and the anchor on y_w: rewards
    0.1, -0.2 and -0.1, so margins 0.3 and 0.2."""
    losses, _ = mdpo_loss(POLICY, REF)
    assert losses.item() == pytest.approx(softplus(-0.3) + softplus(-0.2) + softplus(-0.1), abs=1e-6)


def test_each_example_has_its_own_loss():
    """A mean or a sum over the batch inside the loss would be hidden by a batch of one. Example 2 is example 1 with policy
    and reference exchanged, so each reward changes its sign."""
    pair = lambda a, b: LogPs(*(torch.cat([x, y]) for x, y in zip(a, b)))
    losses, metrics = mdpo_loss(pair(POLICY, REF), pair(REF, POLICY), beta=0.5)
    assert losses.tolist() == pytest.approx([DPO + CONDITIONAL + ANCHOR, sum(map(softplus, (1.5, 1.0, 0.5)))], abs=1e-6)
    assert metrics["rewards/margins"].tolist() == [1.5, -1.5] and metrics["rewards/accuracies"].tolist() == [1, 0]


def test_an_anchor_named_twice_counts_once():
    """`--anchors chosen chosen` is no request for twice the weight."""
    losses, _ = mdpo_loss(POLICY, REF, beta=0.5, anchors=["chosen", "chosen"])
    assert losses.item() == pytest.approx(DPO + CONDITIONAL + ANCHOR, abs=1e-6)


def test_a_tie_is_not_accurate():
    """Before training every margin is 0: counted as accurate, a run would begin at 100%."""
    _, metrics = mdpo_loss(REF, REF)
    assert metrics["rewards/accuracies"].item() == metrics["rewards/image_accuracies"].item() == 0


def test_metrics_are_the_rewards_of_their_names():
    """Swapped or scaled metrics mislead every reader of the log; with a graph attached, a log of them keeps every
    activation of every step alive."""
    policy = LogPs(*(p.clone().requires_grad_() for p in POLICY))
    losses, metrics = mdpo_loss(policy, REF, beta=0.5)
    assert losses.requires_grad
    expected = {"chosen": 0.5, "rejected": -1, "image_rejected": -0.5, "margins": 1.5, "image_margins": 1}
    expected |= {"accuracies": 1, "image_accuracies": 1}
    assert {k.removeprefix("rewards/"): v.item() for k, v in metrics.items() if "rewards" in k} == expected
    assert not any(value.requires_grad for value in metrics.values())


def test_dpo_needs_no_third_logp():
    """Plain DPO must not be charged for the pass over m_l."""
    losses, metrics = mdpo_loss(POLICY[:2], LogPs(*REF[:2]), beta=0.5, conditional=False, anchors=())
    assert losses.item() == pytest.approx(DPO, abs=1e-6) and not any("image" in name for name in metrics)


@pytest.mark.parametrize("policy_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ref_dtype, step", [(torch.float16, 2**-9), (torch.bfloat16, 2**-6), (torch.float32, 2**-13)])
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


B2 = torch.zeros(2)
WRONG_ARGUMENTS = {
    "policy_logps.rejected must be floats of shape (B,)": lambda: mdpo_loss((B2, torch.zeros(2, 1), B2), (B2, B2, B2)),
    "policy_logps.chosen must be floats of shape (B,)": lambda: mdpo_loss((torch.tensor(0.0), B2, B2), (B2, B2, B2)),
    "ref_logps.image_rejected must be floats of shape (B,)": lambda: mdpo_loss((B2, B2, B2), (B2, B2, torch.zeros(3))),
    "ref_logps.chosen must be floats": lambda: mdpo_loss((B2, B2, B2), (B2.long(), B2, B2)),
    "policy_logps.image_rejected must be floats of": lambda: mdpo_loss((B2, B2), (B2, B2, B2)),
    "are the two swapped": lambda: mdpo_loss((B2, B2, B2), (B2.clone().requires_grad_(), B2, B2)),
    "ref_logps.image_rejected must be floats": lambda: mdpo_loss((B2, B2, B2), (B2, B2)),
    "policy_logps.image_rejected must be floats": lambda: mdpo_loss((B2, B2), (B2, B2), conditional=True, anchors=()),
    "policy_logps.image_rejected must be": lambda: mdpo_loss((B2,) * 2, (B2,) * 2, anchors=("image_rejected",), conditional=False),
    "beta must be above 0 and finite, got 0": lambda: mdpo_loss((B2, B2, B2), (B2, B2, B2), beta=0),
    "beta must be above 0 and finite, got inf": lambda: mdpo_loss((B2, B2, B2), (B2, B2, B2), beta=math.inf),
    "beta must be above 0 and finite, got nan": lambda: mdpo_loss((B2, B2, B2), (B2, B2, B2), beta=math.nan),
    "anchors must be a tuple": lambda: mdpo_loss((B2, B2, B2), (B2, B2, B2), anchors=("cropped",)),
    "anchors must be a tuple of": lambda: mdpo_loss((B2, B2, B2), (B2, B2, B2), anchors="chosen"),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    """(B,) against (B, 1) broadcasts to (B, B) and trains on nonsense if it is let through."""
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG_ARGUMENTS[message]()


def test_loss_copied_alone_works():
    """The README tells people to copy mdpo.py, down to `mdpo_step`, into their own trainer."""
    scope = {"__name__": "elsewhere"}
    exec(Path(mdpo.__file__).read_text().partition("def mdpo_step")[0], scope)
    losses, _ = scope["mdpo_loss"](tuple(POLICY), tuple(REF), beta=0.5)
    assert losses.item() == pytest.approx(DPO + CONDITIONAL + ANCHOR, abs=1e-6)
    assert scope["sequence_logps"](torch.zeros(1, 2, 4), torch.tensor([[-100, 3]])).item() == pytest.approx(-math.log(4))


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


# -------------------------------------------------------------------------------------------- models and batches


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard():
    """Whoever starts the tests in the background, or under nohup, has them ignored, and a run would do so, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def bunny(tmp_path_factory):
    """A folder in Bunny's file format; its config asks for dropout."""
    return tiny_bunny.write_bunny(
        tmp_path_factory.mktemp("models") / "bunny", TEXTS, hidden=32, vision_tower="x-patch8-32"
    )


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A folder as llava-hf/llava-1.5-7b-hf: CLIP + Llama, sentencepiece-like tokenizer, the hub's template."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(TEXTS, trainer)
    vocabulary = json.loads(bpe.to_str())["model"]
    tokenizer = transformers.LlamaTokenizer(
        vocab=vocabulary["vocab"],
        merges=[tuple(merge) for merge in vocabulary["merges"]],
        extra_special_tokens={"image_token": "<image>"},
        pad_token="<pad>",
        add_bos_token=True,
    )
    pixels = {"height": 32, "width": 32}
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=pixels)
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=HUB_LLAVA_TEMPLATE,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        attention_dropout=0.1,
    )
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=processor.image_token_id
    )
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


def pair(question, chosen, rejected, image=None, image_rejected=None):
    """A `Example` of no images, one, or a list of them."""
    several = lambda image: () if image is None else tuple(image) if isinstance(image, list) else (image,)
    return Example(question, chosen, rejected, several(image), several(image_rejected))


def wrapped(text=train.BUNNY_SYSTEM):
    """The system text of a USER: ... ASSISTANT: wrapper, as `read_examples` gives it."""
    return {"role": "system", "content": [{"type": "text", "text": text}], "wrapped": True}


def asked(question, n_images=1):
    """A question as `read_examples` gives it."""
    return [{"role": "user", "content": [*[{"type": "image"}] * n_images, {"type": "text", "text": question}]}]


def laid_out(pairs, processor, layout="packed", **options):
    """A batch of rows, or the same packed."""
    if layout == "plain":
        return make_batch(pairs, processor, **options)
    return pack(make_batch(pairs, processor, share=True, **options))


def prefix_length(batch, row=0):
    """Where the response of a row begins."""
    return (batch.labels[row] >= 0).int().argmax().item()


def check_file(argv):
    """`python data.py ...`, in this process."""
    return data.run_command(data.check_file, argv)


PAIRS = [  # lengths differ every way
    pair("Describe the picture.", "There is a red circle.", "There is a blue square and a red circle.", noise(1), noise(2)),
    pair("What is in it?", "A blue square, and a red circle too.", "No.", noise(3, (32, 40)), noise(4, (32, 40))),
    pair("How many?", "One.", "There is a red square.", noise(5), noise(6)),
]
DPO_NAMES = ("chosen", "rejected")  # no log-probability of m_l


def sequence_logp(model, processor, prompt, response, image):
    """The yardstick: the library's own call on one whole sequence; the response is what follows the prompt's tokens."""
    whole = processor(text=[prompt + response], images=[image], return_tensors="pt")
    start = processor(text=[prompt], images=[image], return_tensors="pt")["input_ids"].shape[1]
    with torch.no_grad():
        logps = model(**whole).logits.log_softmax(-1)[0, start - 1 : -1]
    return logps.gather(1, whole["input_ids"][0, start:, None]).sum().item()


def full_text(processor, question, response):
    """(prompt, response) as the model was tuned on them, written out."""
    if processor.tokenizer.eos_token == "</s>":
        return f"USER: <image>\n{question} ASSISTANT:", f" {response}</s>"
    nine_tabs = "\t" * 9
    return f"{train.BUNNY_SYSTEM} USER: {nine_tabs}\n{question} ASSISTANT:", f" {response}<|endoftext|>"


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
        inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"].double()
    logits = model(**inputs).logits[0, len(prefix) - 1 : -1]
    return sum((row[token] - row.logsumexp(0)).item() for row, token in zip(logits, ids[1]))


ODD_TEXTS = {  # (question, chosen, rejected)
    "emoji": ("What is 🦄 doing?", "It is 🏃‍♀️ running, naïvely.", "Это 東京 🗼."),
    "looks like the template": (" USER: Hi ASSISTANT: yes USER: no", "No. USER: and now? ASSISTANT: Yes.", "ASSISTANT:"),
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
    oracle = lambda response, other, image: response_in_float64(in_float64, processor, prompt, response, [image], other)
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
    pairs = [pair("Which?", "There is a red circle.", "No.", *images) for images in ((), two, (noise(1), noise(2)))]
    n_tokens = lambda images: len(processor.tokenizer(prompt.replace(token, token * images)).input_ids) + 15 * images
    max_length = n_tokens(images=2) + 3
    logps = response_logps(model, laid_out(pairs, processor, layout, max_length=max_length))
    for i, one in enumerate(pairs):
        images, images_rejected = one.images, one.images_rejected
        text, left = prompt.replace(token, token * len(images)), max_length - n_tokens(len(images))
        oracle = lambda y, other, shown: response_in_float64(in_float64, processor, text, y, shown, other, left)
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
    texts = ["There is a red circle.", "There"]  # the second is padded: without a mask it would see the padding
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
    whole = processor.tokenizer(prompt.replace(processor.image_token + "\n", "") + response, return_tensors="pt")
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
    assert (shared < len(ids(prompt))) != (image_is_last and with_image)  # merged, unless the image stands between
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


CHAT = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}END{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
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
    """"[{'type': 'text', 'text': ..." in the prompt is what nobody asked. A message without an image can be
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


def pixels_of(processor, *images):
    return processor.image_processor([*images], return_tensors="pt")["pixel_values"]


def worked_example():
    """The batch in the docstring of `Batch`, read from its text: one pair, m_w = m_l = 7 7, q = 5 6."""
    rows = re.findall(r"^ +\d +(\w+) +([\d pad]+?)  +(-100.*?) +(\d)$", data.Batch.__doc__, re.MULTILINE)
    numbers = lambda text: [int(word.replace("pad", "9")) for word in text.split()]
    names, ids, labels, owner = zip(*rows)
    ids, labels = (torch.tensor([*map(numbers, of_rows)]) for of_rows in (ids, labels))
    tokens = {"input_ids": ids, "attention_mask": (ids != 9).long()}
    return data.Batch(tokens, labels, [*map(int, owner)], names, keys=[(0, 0)], ids=["1"])


def test_the_worked_example_is_packed_as_by_hand(llava):
    """Readers check their understanding on it, and an index that is off by one trains on other tokens.

    Three rows of 7 are 0-6, 7-13 and 14-20. Of the second, only the response is taken: 3 and 0, at 11 and 12.
    The packed row has places 0-6, 7-8 and 9-15; the token before y_w and that before y_l are both at 3.
    """
    batch = worked_example()
    asked, prompt = [7, 7, 5, 6], [-100] * 4
    assert batch.inputs["input_ids"].tolist() == [[*asked, 1, 2, 0], [*asked, 3, 0, 9], [*asked, 1, 2, 0]]
    assert batch.labels.tolist() == [[*prompt, 1, 2, 0], [*prompt, 3, 0, -100], [*prompt, 1, 2, 0]]
    packed = pack(batch)
    assert packed.take.tolist() == [0, 1, 2, 3, 4, 5, 6, 11, 12, 14, 15, 16, 17, 18, 19, 20]
    assert packed.answers.tolist() == [4, 5, 6, 11, 12, 18, 19, 20]
    assert packed.predictors.tolist() == [[3, 4, 5, 3, 7, 12, 13, 14]]
    assert packed.blocks == [(7, 0, 4), (2, 0, 4), (7, 2, 4)]  # (tokens taken, whose prefix, its length)
    model, _ = train.load_model(str(llava))
    inputs = mdpo.forward_inputs(model, packed)
    assert inputs["input_ids"].tolist() == [[7, 7, 5, 6, 1, 2, 0, 3, 0, 7, 7, 5, 6, 1, 2, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 5, 6]]
    drawn = re.findall(r"^# +position (.*)$", Path(mdpo.__file__).read_text(), re.MULTILINE)
    assert [*map(int, drawn[0].replace("|", " ").split())] == inputs["position_ids"][0].tolist()
    # As said there, the rows need nothing but `sequence_logps`.
    logps = sequence_logps(model(**batch.inputs).logits, batch.labels)
    for ours in batch, packed:
        torch.testing.assert_close(torch.cat(response_logps(model, ours)), logps, rtol=1e-5, atol=1e-5)


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


def test_truncation_cuts_the_response_never_the_image(loaded):
    """A cut image leaves fewer tokens than features: the model raises, or worse, looks at half an image."""
    _, processor = loaded
    full = make_batch(PAIRS[1:2], processor)
    n = prefix_length(full)
    cut = make_batch(PAIRS[1:2], processor, max_length=n + 2)
    assert cut.labels.shape == (3, n + 2)
    for name in "input_ids", "attention_mask":
        assert torch.equal(cut.inputs[name], full.inputs[name][:, : n + 2])
    assert torch.equal(cut.labels, full.labels[:, : n + 2]) and (cut.labels[:, n:] >= 0).all()
    with pytest.raises(BadInput, match="no room"):
        make_batch(PAIRS[1:2], processor, max_length=n)


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
    assert len({image.tobytes() for image in images}) == 3 and len({image.tobytes() for image in images_rejected}) == 5
    batch = make_batch([one], processor)
    assert len(batch.inputs["pixel_values"]) == 3 * 5 and len(laid_out([one], processor).inputs["pixel_values"]) == 2 * 5
    assert ((batch.inputs["input_ids"] == processor.image_token_id).sum(1) == 5 * 16).all()
    # The check of the room knows it: a prompt of n tokens has room for two of an answer in n + 2, and none in n.
    n = prefix_length(batch)
    assert len(read_examples(path, processor=processor, max_length=n + 2)) == 1
    with pytest.raises(BadInput, match=f"prompt of {n} tokens, --max-length {n}: no room"):
        read_examples(path, processor=processor, max_length=n)


# ------------------------------------------------------------------------------------------------- other families


@pytest.fixture(scope="session", params=families.FAMILIES)
def family(request, tmp_path_factory):
    """(folder, model, processor) of a tiny random model of each family."""
    folder = families.write_family(request.param, tmp_path_factory.mktemp("families") / request.param)
    return folder, *train.load_model(str(folder))


SIZES = [  # images that differ in their number of tiles or tokens, within an example and between examples
    pair("Describe the picture.", "There is a red circle.", "No.", noise(1, (60, 30)), noise(2, (30, 90))),
    pair("How many?", "One.", "There is a red square, and a blue one.", noise(3, (40, 40)), noise(4, (90, 90))),
]
TWO_IMAGES = [Example(*one[:3], (*one[3], noise(7, (50, 30))), (*one[4], noise(8, (50, 30)))) for one in PAIRS[:2]]
CONVERSATION = [{"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in (("system", "Be brief."), ("user", " Hello. "), ("assistant", "Hello!"))]  # fmt: skip
CONVERSATION.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it? "}]})


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
    assert records[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5) and records[-1]["loss"] < records[0]["loss"]
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
    ask = lambda **user: eval(subprocess.check_output([sys.executable, "-c", script], env=clean | user, text=True))
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


def test_models_that_cannot_be_trained_are_refused_before_their_weights_are_read(tmp_path, bunny, llava, monkeypatch):
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
        patch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *args, **kwargs: SimpleNamespace())
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
    with monkeypatch.context() as patch:  # as Mllama's, whose layers of cross-attention need a mask of their own
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
    expected = "Be brief. USER: Hello.  ASSISTANT: Hello!<|endoftext|>USER: " + "[]" * 16 + "\nWhat is it?  ASSISTANT: A cat.<|endoftext|>"
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
    text = "".join("[]" if id == processor.image_token_id else processor.tokenizer.decode([id]) + "~" for id in prefix)
    text = re.sub(r"[\s~]", "", text)
    assert re.search(r"Bebrief\.(USER:)\[\]Whatisit\?ASSISTANT:Acat\.", text)
    assert text.count("[]") == 2 and text.find("[]", text.find("Acat.")) > 0
    (no_image,) = examples = read_examples(write(folder / "x.json", [TURNS]), with_images=False)
    batch = make_batch([Pairs(examples)[0, 0]], processor, names=DPO_NAMES)
    assert no_image.images == () and not (batch.inputs["input_ids"] == processor.image_token_id).any()


# -------------------------------------------------------------------------------------------------- model loading


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
    patches = x.view(4, 8, 4, 8, 3).permute(0, 2, 4, 1, 3).reshape(16, 3 * 8 * 8)  # by rows; in each: colour, y, x

    w = lambda name: weights["model.vision_tower.vision_tower.vision_model." + name].double()
    linear = lambda x, name: x @ w(name + ".weight").T + w(name + ".bias")

    def layer_norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * w(name + ".weight") + w(name + ".bias")

    patch = "embeddings.patch_embedding"
    h = patches @ w(patch + ".weight").flatten(1).T + w(patch + ".bias") + w("embeddings.position_embedding.weight")
    for layer in ("encoder.layers.0.", "encoder.layers.1."):
        y = layer_norm(h, layer + "layer_norm1")
        q, k, v = (linear(y, f"{layer}self_attn.{side}_proj").view(16, 16, 2).transpose(0, 1) for side in "qkv")
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
    for parameter in [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    weights = {}
    for name, tensor in model.state_dict().items():  # back to the checkpoint's names
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        weights[name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")] = tensor
    seen = []
    model.model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: seen.append(output))
    response_logps(model, laid_out([pair(*PAIRS[0][:3], noise(1, size), noise(2, size))], processor))
    expected = [eye_by_hand(weights, noise(seed, size)) for seed in (1, 2)]
    torch.testing.assert_close(torch.cat(seen).view(2, 16, 32).double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


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
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)  # in which rounding hides no difference
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
        value for m in model.modules() for k, value in vars(m).items() if "drop" in k and isinstance(value, float)
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


def with_lora(folder, checkpointing=True):
    model, processor = train.load_model(str(folder))
    model = train.add_lora(model, rank=4, alpha=8)
    if checkpointing:
        train.enable_checkpointing(model)
    return model.train(), processor


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


def test_a_loss_of_ones_own_gets_the_batch(bunny):
    """Length normalisation, or weights of one's own, need more than log-probabilities."""
    model, processor = with_lora(bunny)
    batch = make_batch(PAIRS, processor)

    def one_loss(policy, ref, batch, weight):
        lengths = (batch.labels >= 0).sum(1)[: len(batch.ids)]
        return weight * policy.chosen / lengths, {"mine": policy.rejected.detach()}

    losses, metrics = mdpo_step(model, batch, one_loss, weight=3)
    assert losses.requires_grad and set(metrics) == {"loss", "mine"}
    tokenizer = processor.tokenizer
    n = torch.tensor([len(tokenizer(full_text(processor, "", one.chosen)[1]).input_ids) for one in PAIRS])
    torch.testing.assert_close(metrics["loss"], 3 * response_logps(model, batch).chosen.detach() / n)


def test_a_reference_of_its_own(bunny):
    """A separate reference model is scored by itself: another adapter's model gives the rewards of one against the other."""
    (model, processor), (other, _) = with_lora(bunny), with_lora(bunny)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch(PAIRS, processor)
    _, metrics = mdpo_step(model, batch, ref_model=other)
    expected = 0.1 * (response_logps(model, batch).chosen - response_logps(other, batch).chosen)
    torch.testing.assert_close(metrics["rewards/chosen"], expected.detach())
    assert metrics["rewards/chosen"].abs().min() > 1e-3


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


# ----------------------------------------------------------------------------------------------------------- data


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


def completion(response, *ratings):
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    annotations = {a: {"Rating": r, "Rationale": "..."} for a, r in zip(aspects, ratings)}
    return {"model": "m", "response": response, "annotations": annotations}


VLFEEDBACK = {
    "id": "llava-1",
    "prompt": "What is it?",
    "models": ["m"] * 4,
    "completions": [  # means 4, 5, 2; the last is unrated
        completion("Middling.", "4", "4", "4"),
        completion("A cat【6†source】.", "5", "5", "5"),
        completion("A dog.", "1", "4", "1"),
        completion("Never.", "N/A", "5", "5"),
    ],
}
MESSAGES = {
    "images": ["a.png"],
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
    "rejected": [{"role": "assistant", "content": "A dog."}],
}
PLAIN = {"image": "a.png", "question": "<image>\nWhat is it?", "chosen": " A cat.\n", "rejected": "A dog."}
NO_PROMPT = {"image": "a.png"} | {  # TRL's implicit prompt: whole conversations, alike up to the last turn
    name: [*MESSAGES["prompt"], *MESSAGES[name]] for name in ("chosen", "rejected")
}
TURNS = {  # a system text, an earlier turn, two images
    "images": ["a.png", "merged_images/llava-1.jpg"],
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "And this:"}, {"type": "image"}]},
    ],
    "chosen": "A dog.",
    "rejected": "A cat.",
}


@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT])
@pytest.mark.parametrize(
    "name, form", [("x.json", "[{}]"), ("x.jsonl", "{}\n"), ("x.json", "\n{}\n"), ("x.jsonl", "\n [{}]")]
)
def test_every_format_gives_the_same_example(folder, record, name, form):
    """Formats are told apart by the records, not by the file's name."""
    (example,) = read_examples(write(folder / name, form.replace("{}", json.dumps(record))))
    question = [wrapped(), *asked("What is it?")] if "img_path" in record else asked("What is it?")
    assert example[:3] == (question, "A cat.", "A dog.")
    assert Path(example.images[0]).name == ("llava-1.jpg" if "completions" in record else "a.png")


def test_ties_and_unrated_records_are_left_out_and_counted(folder):
    """A pair of equal ratings says nothing; training on it is noise."""
    tie = VLFEEDBACK | {"completions": [completion("A", "3", "3", "3"), completion("B", "4", "3", "2")]}
    unrated = VLFEEDBACK | {"completions": [completion("A", "N/A", "3", "3")]}
    path = write(folder / "x.jsonl", "\n".join(map(json.dumps, [VLFEEDBACK, tie, unrated])))
    said = []
    assert len(read_examples(path, log=said.append)) == 1 and "left out 2" in said[0]


def pair_of(folder, *completions):
    """(chosen, rejected) of one VLFeedback record with these completions."""
    (example,) = read_examples(write(folder / "x.json", [VLFEEDBACK | {"completions": list(completions)}]))
    return example.chosen, example.rejected


def test_vlfeedback_pairs_the_highest_mean_rating_with_the_lowest(folder):
    """Medians, sums, single aspects or ratings compared as text would take other responses, in silence."""
    rated = [
        completion("highest aspect, highest median", "5", "5", "1"),  # mean 3.67
        completion("highest sum", "4", "4", "4"),
        completion("lowest mean", "3", "3", "1"),
        completion("lowest median", "2", "2", "4"),  # mean 2.67
        completion("highest mean", " 4.5 "),
        completion("as high, but later", 4.5),
    ]
    assert pair_of(folder, *rated) == ("highest mean", "lowest mean")
    assert pair_of(folder, *rated[::-1]) == ("as high, but later", "lowest mean")
    assert pair_of(folder, completion("nine", "9"), completion("ten", "10")) == ("ten", "nine")


@pytest.mark.parametrize(
    "rating",
    ["N/A", "nan", float("nan"), "inf", "-1", "true", "True", True, None, "1_0", "", "4 stars", "1e1"],
)
def test_vlfeedback_completion_with_one_aspect_unrated_is_left_out_whole(folder, rating):
    """Its mean over the other aspects would be compared with means over all. What float() takes is no rating
    yet."""
    unrated = [
        completion("X", rating, "5", "5"),
        completion("Y", "1", rating, "1"),
        completion("Z", "0", "0", rating),
    ]
    rated = [completion("best", "4", "4", "4"), completion("worst", "2", "2", "2"), completion("no aspect")]
    assert pair_of(folder, *unrated, *rated) == pair_of(folder, *rated, *unrated) == ("best", "worst")


def test_vlfeedback_citation_marks_alone_are_taken_out(folder):
    """The model would learn to write them; but brackets are text in Chinese."""
    marked = completion("A【6†source】 cat【7†a】 on 【a】 mat【8†b】.", "5")
    assert pair_of(folder, marked, completion("【1†x】A dog", "1")) == ("A cat on 【a】 mat.", "A dog")


def replaced(value, new):
    """Every copy of a JSON value in which one part, at any depth, is `new`."""
    yield new
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            for changed in replaced(value[key], new):
                changed_value = copy.copy(value)
                changed_value[key] = changed
                yield changed_value


@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES, NO_PROMPT, TURNS])
@pytest.mark.parametrize("odd", [None, 3, True, "", "a\0", [], {}, [[None]]], ids=repr)
def test_odd_json_is_bad_or_good_never_a_crash(folder, record, odd):
    """A crash names no record, and --skip-bad cannot drop what crashes."""
    records = [*replaced(record, odd)]
    path = write(folder / "x.json", [*records, authors(id="last")])
    assert read_examples(path, skip_bad=True, log=lambda text: None)[-1].id == "last"


def test_an_image_is_looked_for_in_the_folder_then_in_merged_images(folder):
    """Another order takes another image of the same name, in silence."""
    read = lambda image_dir=None, **changes: read_examples(
        write(folder / "x.json", [VLFEEDBACK | changes]), image_dir=image_dir
    )
    found = lambda **options: read(**options)[0].images[0]
    here, merged = folder / "llava-1.jpg", folder / "merged_images" / "llava-1.jpg"
    assert found() == found(image="llava-1.jpg") == str(merged)
    noise(3).save(here)
    assert found() == found(images=["llava-1.jpg"]) == str(here)
    assert found(img_path="a.png") == found(image={"path": "a.png"}) == str(folder / "a.png")
    for image in (str(merged), "llava-1.jpg", None):
        assert found(image=image, image_dir=folder / "merged_images") == str(merged)
    assert found(image=str(merged)) == str(merged)
    noise(4).save(folder / "..b.png")
    assert found(image="..b.png") == str(folder / "..b.png")
    assert Path(found(image="merged_images/../a.png")).samefile(folder / "a.png")
    for image in ("../a.png", "merged_images/../../a.png", "x/../../a.png"):
        noise(5).save(folder.parent / "a.png")
        with pytest.raises(BadInput, match="points outside the image folder"):
            read(image=image)
    with pytest.raises(BadInput, match="no image 'merged_images'"):
        read(image="merged_images")
    with pytest.raises(BadInput, match="none: no such image folder"):
        read(image_dir=folder / "none")


def test_a_field_of_null_is_not_there(folder):
    """Exports write null for what a record lacks; `prompt` comes before `question`, `img_path` before the
    others."""
    record = authors(img_path=None, image="a.png", question="And this?")
    (example,) = read_examples(write(folder / "x.json", [record | {"images": ["b.png"]} | {"images": None}]))
    assert example.question[1:] == asked("What is it?") and Path(example.images[0]).name == "a.png"
    record = authors(image="b.png", images="c.png", image_path="d.png", prompt=None, question="And this?")
    (example,) = read_examples(write(folder / "x.json", [record]))
    assert example.question == asked("And this?") and Path(example.images[0]).name == "a.png"


@pytest.mark.parametrize(
    "prompt",
    [
        "What?\nAnd why?",
        "<image>\nWhat?\nAnd why?",
        "What?\nAnd why? <image>",
        " USER: <image>\nWhat?\nAnd why? ASSISTANT:",
        f"{train.BUNNY_SYSTEM} USER: What?\nAnd why?\n<image> ASSISTANT: ",
    ],
)
def test_the_bare_question_is_taken_out_of_its_prompt(folder, prompt):
    """What is left of a template, or of an image mark, would stand in the text that the model is trained
    on."""
    (example,) = read_examples(write(folder / "x.json", [authors(prompt=prompt)]))
    system = [wrapped()] if prompt.startswith("A chat") else []
    assert example.question == [*system, *asked("What?\nAnd why?")]


def test_messages_keep_their_parts_and_their_order(folder):
    """What is dropped or moved changes the prompt. `<image>` in a text is an image part before it, as in a plain
    string; between two texts one is moved before them, as LLaVA's code does, and several stay."""
    image, text = {"type": "image"}, lambda text: {"type": "text", "text": text}
    read = lambda *messages, **changes: read_examples(
        write(folder / "x.json", [MESSAGES | {"prompt": list(messages)} | changes])
    )[0]
    user = lambda *content: {"role": "user", "content": list(content)}
    for content in ([image, text("What?")], [text("What?"), image], [image, text(" What?\n"), text("Why?")]):
        assert read(user(*content)).question == [user(*content)]
    for written in ([text("<image>\nWhat?")], [text("What? <image>")], [text("What?")], "<image> What?", "What?\n"):
        assert read({"role": "user", "content": written}).question == [user(image, text("What?"))]
    assert read(user(text("Is <image>it?"))).question == [user(image, text("Is it?"))]
    two = read(user(text("1: <image>\n2: <image>\nWhich?")), images=["a.png", "merged_images/llava-1.jpg"])
    assert two.question == [user(text("1: "), image, text("\n2: "), image, text("\nWhich?"))]
    # Where no message shows an image, the first of the user's opens with all of them.
    opening = [{"role": "system", "content": [text("Be brief.")]}, user(text("What?"))]
    more = [{"role": "assistant", "content": [text("A cat.")]}, user(text("And?"))]
    shown = read(*opening, *more, images=["a.png", "merged_images/llava-1.jpg"])
    assert shown.question == [opening[0], user(image, image, text("What?")), *more] and len(shown.images) == 2
    answer = [{"role": "assistant", "content": [text("One."), text("Two.")]}]
    assert read(user(text("What?")), chosen=answer).chosen == "One.\nTwo."


def test_no_image_needs_no_images_and_no_pool(folder):
    """DPO (No Image) of Fig. 1 must run without the images, with any strategy; `<image>` in the prompt is
    left out."""
    records = [
        authors(img_path=None),
        authors(img_path="none.png", prompt="<image>\n<image>\nWhat is it?"),
        NO_PROMPT,
    ]
    examples = read_examples(write(folder / "x.json", records), with_images=False)
    for strategy in data.STRATEGIES:
        pairs = [Pairs(examples, strategy)[0, index] for index in range(3)]
        assert [one[1:6] for one in pairs] == [("A cat.", "A dog.", (), (), id) for id in ("1", "2", "3")]
        assert all(data.chat_messages(one.question, 0)[-1:] == asked("What is it?", 0) for one in pairs)


def test_lines_are_numbered_as_an_editor_does(folder):
    """A message that names another line sends the user to a good record. U+2028 is text in JSON; a BOM is
    not."""
    good = authors(question="a\u2028b", chosen="A\u2028cat.")
    lines = [
        "\ufeff" + json.dumps(good, ensure_ascii=False),
        "",
        "  ",
        json.dumps(good),
        "{",
        json.dumps(authors(chosen="")),
    ]
    path = folder / "x.jsonl"
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    said = []
    examples = read_examples(path, skip_bad=True, log=said.append)
    assert [(e.id, e.chosen) for e in examples] == [("1", "A\u2028cat."), ("4", "A\u2028cat.")]
    assert "record 5: not valid JSON" in said[0] and "record 6: 'chosen' is empty" in said[0]


UNREADABLE = {
    "x: no such file; for a data set of the hub, run python examples/convert.py": None,
    "x: cannot be read: is UTF-16: save it as UTF-8": b"\xff\xfe[",
    "x: cannot be read: not valid JSON": b"[{},",
    "x: cannot be read: begins with \"a table\\\\nof text": b"a table\nof text\n",
    "x: cannot be read: begins with \"<!DOCTYPE html>": b"<!DOCTYPE html><html>",
    "x: cannot be read: is a parquet file: python examples/convert.py": b"PAR1\x15\x04",
    "x: cannot be read: is a gzip file: unpack it": b"\x1f\x8b\x08",
    "x: cannot be read: is a zip file: unpack it": b"PK\x03\x04",
    "x: cannot be read: is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "x: cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 9": b'{"chose":\xe9"}',
    "x: cannot be read: is one JSON object with the fields data, split, not a list": b'{\n"data": [{}],\n"split": 1}',
    "x: no example is left$": b"[]",
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_unreadable_files_are_named(folder, reason):
    """A wrong path or a wrong file is the first mistake of all."""
    if UNREADABLE[reason] is not None:
        (folder / "x").write_bytes(UNREADABLE[reason])
    with pytest.raises(BadInput, match=reason):
        read_examples(folder / "x")


def test_a_report_of_bad_records_ends_after_20_and_counts_the_rest(folder):
    """A file with one wrong field has as many bad records as lines."""
    with pytest.raises(BadInput, match="23 bad records:") as error:
        read_examples(write(folder / "x.json", [authors(chosen="")] * 23))
    lines = str(error.value).split("\n")
    assert [line.split(":")[0].strip() for line in lines[1:21]] == [f"record {n}" for n in range(1, 21)]
    assert lines[21].strip() == "... and 3 more" and "--skip-bad" in lines[0] and len(lines) == 22


def test_a_broken_line_is_bad_whatever_the_subset(folder):
    """A record that cannot be read has no id: dropped as if it were of another subset, it would be lost in silence."""
    path = write(folder / "x.jsonl", json.dumps(VLFEEDBACK) + '\n{"id": "llava-2", "prom\n5\n')
    with pytest.raises(BadInput, match="record 2: not valid JSON: .*\n  record 3: is 5, not an object"):
        read_examples(path, subset="llava")


def test_subset_and_limit(folder):
    """The paper's data is a sample of 10K among ids that begin with llava; the sample is the seed's alone."""
    records = [
        VLFEEDBACK | {"id": f"{kind}-{i}", "img_path": "a.png"}
        for i in range(20)
        for kind in ("llava", "svit-llava")
    ]
    path = write(folder / "x.json", records)
    ids = [e.id for e in read_examples(path, subset="llava", limit=5, seed=1)]
    assert len(set(ids)) == 5 and all(id.startswith("llava") for id in ids)
    assert ids == [e.id for e in read_examples(path, subset="llava", limit=5, seed=1)]
    assert ids != [e.id for e in read_examples(path, subset="llava", limit=5, seed=2)]
    assert len(read_examples(path, limit=100)) == len(read_examples(path, limit=40)) == 40
    with pytest.raises(BadInput, match="no example is left with an id in 'vqa'"):
        read_examples(path, subset="vqa")
    (folder / "broken.png").write_bytes(b"")
    numbers = [authors(id=id, img_path="a.png" if id in (1, 12) else "none.png") for id in (1, 2, 12, 21)]
    assert [e.id for e in read_examples(write(folder / "y.json", numbers), subset="1")] == ["1", "12"]


def test_a_sample_is_even_and_in_the_files_order(folder):
    """A sample of the file's first records is a sample of one source. 200 samples of 2 of 6: each record is
    in 67 of them, give or take 3 standard deviations of 6.7."""
    path = write(folder / "x.json", [PLAIN | {"id": id} for id in "abcdef"])
    samples = ["".join(e.id for e in read_examples(path, limit=2, seed=seed)) for seed in range(200)]
    assert all(len(sample) == 2 and sample[0] < sample[1] for sample in samples)
    assert all(47 <= sum(id in sample for sample in samples) <= 87 for id in "abcdef")
    with pytest.raises(BadInput, match="no example is left"):
        read_examples(path, limit=0)


def test_images_folder_can_be_elsewhere(folder):
    """--images; an absolute path is taken as it is."""
    path = write(folder / "deep" / "x.json", [authors(), authors(img_path=str(folder / "a.png"))])
    assert len(read_examples(path, image_dir=folder)) == 2


def test_turns_of_conversations_are_not_lost_beside_a_prompt(folder):
    """The prompt is in the conversation once more; taken alone, it would be answered by the last turn's answer."""
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    turns = [user | {"content": "What?"}, assistant | {"content": "A ring."}, user | {"content": "Which colour?"}]
    record = {"image": "a.png", "prompt": "What?"}
    record |= {name: [*turns, assistant | {"content": name}] for name in ("chosen", "rejected")}
    (one,) = read_examples(write(folder / "x.json", [record]))
    assert data.texts_of(one.question) == ["What?", "A ring.", "Which colour?"] and one.chosen == "chosen"
    system = [{"role": "system", "content": "Be brief."}]
    with_system = record | {"prompt": system + turns}  # says more than the conversation
    (one,) = read_examples(write(folder / "x.json", [with_system]))
    assert data.texts_of(one.question) == ["Be brief.", "What?", "A ring.", "Which colour?"]
    record |= {"prompt": turns[:1]} | {name: record[name][1:] for name in ("chosen", "rejected")}
    with pytest.raises(BadInput, match="user and assistant must take turns"):
        read_examples(write(folder / "x.json", [record]))


BAD_RECORDS = {
    "has the fields img_path, question, chosen, rejected; needed are image, prompt, chosen": {
        "img_path": "a.png", "question": "Q", "chosen": None, "rejected": "b"},
    "has the fields image, chosen, rejected; needed are image, prompt": {
        "image": "a.png", "chosen": "a", "rejected": "b"},
    "'chosen' is 3, not text": authors(chosen=3),
    "is [1], not an object with fields": [1],
    "'rejected' is empty": authors(rejected=" \n"),
    "'chosen': 'utf-8' codec can't encode character": authors(chosen="A \ud800 cat."),
    "'chosen' and 'rejected' are equal": authors(rejected="A cat. "),
    "no image 'b.png'": authors(img_path="b.png"),
    "cannot be decoded": authors(img_path="broken.png"),
    "has no image path": {"question": "Q", "chosen": "a", "rejected": "b"},
    "points outside the image folder": authors(img_path="../a.png"),
    "'chosen' holds '<image>', a control token": authors(chosen="An <image>"),
    "'prompt' holds '<image 1>', a control token": authors(prompt="Is <image 1> a picture?"),
    "shows 1 images, the record has 2": authors(img_path=None, images=["a.png", "a.png"]),
    "shows 2 images, the record has 1": TURNS | {"images": ["a.png"]},
    "must take turns": MESSAGES | {"prompt": [*MESSAGES["prompt"], *MESSAGES["prompt"]]},
    "'prompt': role \"tool\" is not system": MESSAGES | {"prompt": [{"role": "tool", "content": "S"}]},
    "'prompt': has no 'text'": MESSAGES | {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
    "'chosen' must end in an assistant message": MESSAGES
    | {"chosen": [{"role": "user", "content": "A cat."}]},
    "'rejected' must end in an assistant message": MESSAGES
    | {"rejected": [{"role": "assistant", "content": MESSAGES["prompt"][0]["content"]}]},
    "a message has no text": MESSAGES | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
    "differ before their last turn": {
        "image": "a.png",
        "chosen": [*MESSAGES["prompt"], *MESSAGES["chosen"]],
        "rejected": [{"role": "user", "content": "Who is it?"}, *MESSAGES["rejected"]],
    },
    "has no 'annotations'": VLFEEDBACK | {"completions": [{"response": "x"}]},
    "not valid JSON": None,
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_bad_records_are_all_reported_with_number_id_and_reason(folder, reason):
    """One bad record stops the run before the model is loaded, and says which; --skip-bad drops it and says how many."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    bad = json.dumps(BAD_RECORDS[reason]) if BAD_RECORDS[reason] else "{"
    path = write(folder / "x.jsonl", f"{json.dumps(authors(id='first'))}\n{bad}\n{bad}\n")
    with pytest.raises(BadInput, match="(?s)x.jsonl: --skip-bad would drop 2 bad.*record 2.*record 3") as error:
        read_examples(path)
    assert str(error.value).count(reason) == 2
    said = []
    assert [e.id for e in read_examples(path, skip_bad=True, log=said.append)] == ["first"]
    assert "dropped 2 bad records" in said[0]


def test_the_models_own_image_token_in_text_is_bad(folder, bunny):
    """Nine tabs are Bunny's image token: in a table of tabs they would be taken for an image."""
    path = write(folder / "x.json", [authors(chosen="a" + "\t" * 9 + "b")])
    with pytest.raises(BadInput, match=r"'chosen' holds '(\\t){9}', a control token"):
        read_examples(path, processor=train.load_processor(str(bunny)))


def test_the_check_of_the_room_counts_each_prompts_own_images(folder, loaded):
    """If it did not, the run would stop hours in, at the first batch with a long prompt. By the batch's own
    lengths."""
    _, processor = loaded
    noise(3, (20, 50)).save(folder / "b.png")
    two = authors(id="two", rejected="No.", img_path=None, images=["a.png", "b.png"], prompt="What?")
    path = write(
        folder / "x.json", [authors(id="one", rejected="No.", prompt="What?"), two, authors(id="other", rejected="No.", img_path="b.png")]
    )
    pairs = Pairs(read_examples(path))
    batches = [make_batch([pairs[i]], processor) for i in range(3)]
    prefixes = [prefix_length(batch) for batch in batches]
    alike = len(os.path.commonprefix([ids[prefixes[0] :].tolist() for ids in batches[0].labels[:2]]))  # a space
    needs = [prefix + alike + 1 for prefix in prefixes]
    assert len(set(needs)) == 3
    for max_length in {length + more for length in needs for more in (-1, 0)} - {min(needs) - 1}:
        options = {"processor": processor, "max_length": max_length, "skip_bad": True}
        good = [e.id for e in read_examples(path, **options, log=lambda text: None)]
        assert good == [id for id, n in zip(("one", "two", "other"), needs) if n <= max_length]
    with pytest.raises(BadInput, match="no example is left|prompt of|are equal in the tokens"):
        read_examples(path, processor=processor, max_length=min(needs) - 1)


MODES = {
    "palette": lambda im: im.convert("P"),
    "transparent palette": lambda im: im.convert("P"),
    "grey": lambda im: im.convert("L"),
    "grey alpha": lambda im: im.convert("LA"),
    "rgba": lambda im: im.convert("RGBA"),
    "one bit": lambda im: im.convert("1"),
    "cmyk": lambda im: im.convert("CMYK"),
    "16 bit": lambda im: Image.new("I;16", im.size, 40000),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    """Scraped images come in all of these; a wrong channel count kills the run hours in."""
    path = tmp_path / ("x.jpg" if mode == "cmyk" else "x.png")
    MODES[mode](noise(1)).save(path, **({"transparency": 0} if mode == "transparent palette" else {}))
    image = open_image(path)
    assert image.mode == "RGB" and image.size == (48, 32)
    is_grey = image.convert("L").convert("RGB").tobytes() == image.tobytes()
    assert is_grey == (mode in ("16 bit", "grey", "grey alpha", "one bit"))
    if mode == "16 bit":
        assert image.getpixel((0, 0)) == (156, 156, 156)  # 40000 / 256; clipped, it would be white


def test_exif_rotation_is_applied(tmp_path):
    """A phone's picture lies on its side otherwise."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    noise(1).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (32, 48)


def drawn(folder, image, strategy, n, **options):
    """n rejected images of one example, an epoch each, as tensors (n, 3, height, width)."""
    folder.mkdir(exist_ok=True)
    image.save(folder / "a.png")
    pairs = Pairs(read_examples(write(folder / "x.json", [authors()])), strategy, **options)
    rejected = [pairs[epoch, 0].images_rejected[0] for epoch in range(n)]
    assert all(r.size == image.size and r.mode == "RGB" for r in rejected)
    raw = torch.frombuffer(bytearray(b"".join(r.tobytes() for r in rejected)), dtype=torch.uint8)
    return raw.view(n, image.height, image.width, 3).permute(0, 3, 1, 2).double()


def gradient(width, height, step=2):
    """Red is `step` times the column, green `step` times the row: a part of it says where it was. Blue is
    77."""
    pixels = [(step * x, step * y, 77) for y in range(height) for x in range(width)]
    return Image.frombytes("RGB", (width, height), bytes(value for pixel in pixels for value in pixel))


def boxes_of(images, step=2):
    """The boxes (left, top, width, height) that parts of `gradient` were cut from; a width below 0 is a
    mirrored part.

    A line through red over the columns has the box's width over the whole's as its slope; its edges, which
    have no neighbour to be blended with, are left out."""
    found = []
    for line in (images[:, 0].mean(1), images[:, 1].mean(2)):
        n = line.shape[1]
        inside = torch.arange(n // 5, n - n // 5).double() + 0.5
        values = line[:, n // 5 : n - n // 5] / step + 0.5
        slope = ((inside - n / 2) * values).sum(1) / (inside - n / 2).square().sum()
        start = values.mean(1) - slope * n / 2
        found.append((torch.minimum(start, start + slope * n), slope * n))
    (left, width), (top, height) = found
    return left, top, width, height


def off_uniform(values, low=0.0, high=1.0):
    """Kolmogorov-Smirnov: how far values are from uniform in low..high, over sqrt(n). Below 1.63 in 99 of 100
    samples."""
    values = ((values.double() - low) / (high - low)).sort().values
    n = len(values)
    return (values - (torch.arange(n) + 0.5) / n).abs().max().item() * n**0.5


def is_share(flags, share):
    """Whether as many are true as a binomial has, give or take 3 standard deviations."""
    return abs(flags.double().sum() - len(flags) * share) < 3 * (len(flags) * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("low, high", [(None, None), (0.2, 0.5)])
def test_crop_is_uniform_in_area_and_place_and_log_uniform_in_aspect(tmp_path, low, high):
    """Table 3 rests on how much is kept, and the paper keeps up to 20%. 3/4 and 4/3 are as likely only in
    logarithms."""
    crops = drawn(tmp_path, gradient(125, 100), "crop", 1000, **({"crop": (low, high)} if low else {}))
    left, top, width, height = boxes_of(crops)
    low, high = low or 0.01, high or 0.2
    areas, aspects = width * height / 12500, width / height
    # A side is rounded to a whole pixel: of the smallest crop's 11, half a one is 4%.
    assert low * 0.9 < areas.min() < low * 1.1 and high * 0.98 < areas.max() < high * 1.02
    assert off_uniform(areas, low, high) < 1.63
    fine = areas > 0.05
    assert off_uniform(aspects[fine].log(), math.log(3 / 4), math.log(4 / 3)) < 1.63
    assert 0.65 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.5
    across, down = left / (125 - width), top / (100 - height)
    assert off_uniform(across) < 1.63 and off_uniform(down) < 1.63
    assert abs(torch.corrcoef(torch.stack([across, down]))[0, 1]) < 3 / 1000**0.5
    steps = crops[:, 0].diff(dim=2)[:, :, 30:-30]  # blended between pixels, a gradient has no steps of two
    assert (steps.amax((1, 2)) <= 1)[width < 50].all() and (crops[:, 2] == 77).all()


def test_crops_of_long_images_keep_the_area(tmp_path):
    """A panorama has no room for half its area at aspect 4/3: there the aspect gives way, not the area."""
    for size in ((250, 12), (12, 250)):
        crops = drawn(tmp_path, gradient(*size, step=1), "crop", 300, crop=(0.3, 0.5))
        left, top, width, height = boxes_of(crops, step=1)
        long = width if size[0] > size[1] else height
        assert 0.29 < long.min() / 250 < 0.31 and 0.49 < long.max() / 250 < 0.51
        assert off_uniform(long / 250, 0.3, 0.5) < 1.63


def test_a_crop_is_at_least_one_pixel(tmp_path):
    """A box without width is one colour, stretched: 1% of a thumbnail is less than a pixel."""
    crops = drawn(tmp_path, gradient(6, 6, step=40), "crop", 50, crop=(1e-4, 1e-3))
    spans = crops[:, :2].amax((2, 3)) - crops[:, :2].amin((2, 3))
    assert 10 < spans.min() and spans.max() <= 40  # from one pixel's middle towards the next


def as_examples(folder, n=4):
    return read_examples(str(shapes.write_pairs(folder / "drawn", n)))


@pytest.mark.parametrize("strategy", data.STRATEGIES)
def test_rejected_image_is_a_pure_function_of_seed_epoch_and_index(tmp_path, strategy):
    """Resuming and DataLoader workers rest on it; a new epoch, a new seed and another index draw anew."""
    for number in range(30):
        noise(number, (24, 24)).save(tmp_path / f"{number}.png")
    path = write(tmp_path / "x.json", [authors(img_path=f"{number}.png") for number in range(30)])
    one, *others = read_examples(path)
    examples = [one] * 30 + others  # the same image at the first 30 indices
    draw = lambda seed, epoch, index: Pairs(examples, strategy, seed=seed)[epoch, index].images_rejected[0].tobytes()
    keys = [(s, e, i) for s in (0, 1, 11) for e in (0, 1, 11) for i in (0, 1, 11)]
    drawn_once = {key: draw(*key) for key in keys}
    random.seed(1)
    assert all(draw(*key) == drawn_once[key] for key in reversed(keys))
    # "random" has 29 images to choose from: 27 draws meet some of them twice.
    assert len({*drawn_once.values()}) == 27 if strategy != "random" else len({*drawn_once.values()}) > 12
    for changes in (((s, 0, 0) for s in range(9)), ((0, e, 0) for e in range(9)), ((0, 0, i) for i in range(9))):
        assert len({draw(*key) for key in changes}) > 5
    *texts, (image,), (image_rejected,), _, key = Pairs(examples, strategy)[0, 0]
    assert key == (0, 0) and texts == [one.question, one.chosen, one.rejected]
    assert image.tobytes() == open_image(one.images[0]).tobytes() and image_rejected.size == image.size


@LAYOUTS
@pytest.mark.parametrize("record", [authors(), VLFEEDBACK, MESSAGES])
def test_a_record_may_bring_its_own_rejected_image(folder, bunny, record, layout):
    """It takes the place of the strategy, in every format, and reaches the model as log pi(y_w | m_l, q)."""
    noise(9, (50, 20)).save(folder / "edited.png")
    _, processor = train.load_model(str(bunny))
    for field in ({"rejected_image": "edited.png"}, {"rejected_images": ["edited.png"]}):
        (own,) = read_examples(write(folder / "x.json", [record | field]), processor=processor)
        for strategy in data.STRATEGIES:
            one = Pairs([own], strategy)[3, 0]
            assert one.images_rejected[0].tobytes() == noise(9, (50, 20)).tobytes()
    model, seen = train.load_model(str(bunny))[0], []
    features = model.get_image_features

    def spy(pixel_values):
        seen.append(pixel_values)
        return features(pixel_values)

    model.get_image_features = spy
    mdpo.forward_inputs(model, laid_out([one], processor, layout))
    assert len(seen) == 1 and torch.equal(seen[0][-1:], pixels_of(processor, noise(9, (50, 20))))
    assert Pairs(read_examples(write(folder / "x.json", [record])))[0, 0].images_rejected[0].size == one.images[0].size


def test_threads_that_check_do_not_share_the_tokenizers_padding(folder, bunny):
    """To pad two prompts sets it for all threads: good records were bad at random."""
    noise(2).save(folder / "b.png")
    records = [authors(rejected_image="b.png"), authors(chosen="A cat and a dog."), authors(chosen="Yes.")] * 40
    processor = train.load_processor(str(bunny))
    assert len(read_examples(write(folder / "x.json", records), processor=processor)) == 120


def test_a_rejected_image_that_is_the_image_is_bad(folder):
    """CoPO would compare a log-probability with itself: loss/conditional is ln 2 for ever."""
    shutil.copy(folder / "a.png", folder / "copy.png")
    for own in ("a.png", "copy.png"):
        with pytest.raises(BadInput, match="record 1: the rejected image is the image"):
            read_examples(write(folder / "x.json", [authors(rejected_image=own)]))


def test_own_rejected_images_are_checked_as_any_image(folder, bunny, capsys):
    """One that is missing, broken, too large for the prompt or one too few stops the run before it starts."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    wrong = {"no.png": "no image 'no.png'", "broken.png": "broken.png cannot be decoded", "../a.png": "points outside"}
    for path, message in wrong.items():
        with pytest.raises(BadInput, match=message):
            read_examples(write(folder / "x.json", [authors(rejected_image=path)]))
    with pytest.raises(BadInput, match="has 1 images and 2 rejected images"):
        read_examples(write(folder / "x.json", [authors(rejected_images=["a.png", "a.png"])]))
    noise(2).save(folder / "b.png")
    path = write(folder / "x.json", [authors(rejected_image="b.png"), authors()])
    assert check_file([path]) == 0 and "1 examples have their own rejected images" in capsys.readouterr().out
    (one, _) = read_examples(write(folder / "x.json", [authors(rejected_image="no.png"), authors()]), with_images=False)
    assert one.images_rejected == ()  # DPO (No Image) needs none


def test_rejected_images_are_the_same_in_another_process(tmp_path):
    """A resumed run is another process: what hangs on Python's own hash would differ in it."""
    examples = as_examples(tmp_path)
    script = (
        "import zlib; from data import *; examples = read_examples(r'%s', log=len)\n"
        "print(*(zlib.crc32(Pairs(examples, s)[3, 2].images_rejected[0].tobytes()) for s in ('crop', 'random', 'moco')))"
    ) % (tmp_path / "drawn" / "silkie.json")
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    here = [zlib.crc32(Pairs(examples, s)[3, 2].images_rejected[0].tobytes()) for s in ("crop", "random", "moco")]
    assert child.stdout.split() == [str(checksum) for checksum in here], child.stderr


def test_random_image_is_another_file_whatever_its_path(tmp_path, monkeypatch):
    """Training and held-out data may name one folder in two ways: the image itself would be the rejected one."""
    path = shapes.write_pairs(tmp_path / "drawn", 3)
    monkeypatch.chdir(tmp_path)
    both = read_examples("drawn/silkie.json") + read_examples(str(path))
    assert len({*Pairs(both, "random").pool}) == 3


def test_an_unknown_strategy_is_refused(tmp_path):
    """A misspelled one must not train on the image itself."""
    with pytest.raises(BadInput, match="unknown strategy 'crops': choose from crop, random, moco"):
        Pairs(as_examples(tmp_path), "crops")[0, 0]


COLOURS = {
    "a": (255, 0, 0),
    "b": (0, 255, 0),
    "c": (0, 0, 255),
    "d": (255, 255, 0),
    "e": (255, 0, 255),
    "f": (9, 9, 9),
}


def coloured(folder, *images):
    """Examples with these images: names in COLOURS, or several of them in one example."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    names = [[f"{name}.png" for name in image] for image in images]
    return read_examples(write(folder / "x.json", [authors(img_path=n, prompt="What?") for n in names]))


def test_random_image_is_any_other_and_each_as_likely(tmp_path):
    """Table 3's row. The same file may serve several questions: it is one image for all that, and never its
    own."""
    examples = coloured(tmp_path, "a", "a", "a", "b", "b", "b", "b", "b", "c", "d")
    pairs = Pairs(examples, "random")
    seen = [pairs[epoch, 1].images_rejected[0].getpixel((4, 4)) for epoch in range(600)]
    assert set(seen) == {COLOURS[name] for name in "bcd"}
    assert all(is_share(torch.tensor([s == colour for s in seen]), 1 / 3) for colour in set(seen))
    with pytest.raises(BadInput, match="more different images"):
        Pairs(examples[:3], "random")
    with pytest.raises(BadInput, match="more different images"):
        Pairs(coloured(tmp_path, "a", "b", "ab"), "random")


def test_random_image_is_none_of_the_examples_own_and_of_the_pool(tmp_path):
    """Held-out examples take their images from the training data; another image of the same example is no
    other image."""
    examples = coloured(tmp_path, "ab", "c", "d", "e")
    pairs = Pairs(examples, "random")
    seen = [tuple(image.getpixel((4, 4)) for image in pairs[epoch, 0].images_rejected) for epoch in range(200)]
    assert {s for both in seen for s in both} == {COLOURS[name] for name in "cde"}
    assert len(set(seen)) == 9  # each of the two is drawn for itself
    pooled = Pairs(examples[1:2], "random", pool=[*coloured(tmp_path, "cf", "d")])
    assert {pooled[epoch, 0].images_rejected[0].getpixel((4, 4)) for epoch in range(50)} == {COLOURS["f"], COLOURS["d"]}


def test_random_image_is_centred_and_fitted_not_squashed(tmp_path):
    """A fifth at the left and at the right is red, the middle green: fitted into a square, all of it is
    green."""
    wide = Image.new("RGB", (80, 40), (255, 0, 0))
    wide.paste((0, 255, 0), (16, 0, 64, 40))
    wide.save(tmp_path / "wide.png")
    noise(1, (20, 20)).save(tmp_path / "a.png")
    examples = read_examples(write(tmp_path / "x.json", [authors(), authors(img_path="wide.png")]))
    rejected = Pairs(examples, "random")[0, 0].images_rejected[0]
    assert rejected.size == (20, 20) and rejected.getcolors() == [(400, (0, 255, 0))]


def test_moco_keeps_a_fifth_to_all_of_the_area_and_mirrors_half(tmp_path):
    """Measured on the draws that keep their colours: a fifth is without jitter, four fifths of these are not
    grey."""
    images = drawn(tmp_path, gradient(125, 100), "moco", 1000)
    left, top, width, height = boxes_of(images)
    plain = (images[:, 2] == 77).all(2).all(1)
    assert is_share(plain, 0.2 * 0.8)
    areas = (width * height).abs()[plain] / 12500
    assert areas.min() > 0.19 and areas.max() > 0.97 and off_uniform(areas, 0.2, 1) < 1.63
    small = plain & ((width * height).abs() < 0.4 * 12500)  # these have room for the whole range of aspects
    aspects = (width / height).abs()[small]
    assert off_uniform(aspects.log(), math.log(3 / 4), math.log(4 / 3)) < 1.63
    assert (height > 0).all() and is_share(width[plain] < 0, 0.5)


def test_moco_jitters_four_in_five_and_greys_one_in_five(tmp_path):
    """On one grey, only brightness shows: 0.6 to 1.4. On one colour, only a turn of the hue changes the hue:
    +-0.1."""
    grey = drawn(tmp_path, Image.new("RGB", (16, 16), (100, 100, 100)), "moco", 1500)[:, :, 8, 8]
    assert (grey[:, :1] == grey).all()
    changed = grey[grey[:, 0] != 100, 0] + 0.5
    assert is_share(grey[:, 0] != 100, 0.8 * 79 / 80)  # one in 80 brightens by less than one level
    assert off_uniform(changed, 60, 140) < 1.63

    rgb = drawn(tmp_path, Image.new("RGB", (16, 16), (120, 40, 40)), "moco", 1500)[:, :, 8, 8]
    is_grey = rgb.amax(1) == rgb.amin(1)
    assert is_share(is_grey, 0.2)
    rgb = rgb[~is_grey]
    jittered = (rgb != torch.tensor([120, 40, 40])).any(1)
    assert is_share(jittered, 0.8)
    hues = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] for colour in (rgb[jittered] / 255).tolist()])
    assert off_uniform((hues + 0.5) % 1 - 0.5, -0.1, 0.1) < 1.63


def test_moco_jitters_contrast_and_colour_as_much_as_brightness(tmp_path):
    """Bands of two greys tell the contrast, and how far a colour is from its grey tells contrast times
    colour. Spreads are over the mean, so that brightness drops out of them."""
    bands = Image.new("RGB", (64, 64), (50, 50, 50))
    for x in range(0, 64, 16):
        bands.paste((150, 150, 150), (x, 0, x + 8, 64))
    images = drawn(tmp_path, bands, "moco", 1000)[:, 0, 20:44]
    low, high = images.amin((1, 2)), images.amax((1, 2))
    share = (images.mean((1, 2)) - low) / (high - low)  # of the bright bands
    contrast = (high - low) / images.mean((1, 2)) / (100 / (50 + 100 * share))
    contrast = contrast[(low != 50) | (high != 150)]
    assert off_uniform(contrast, 0.6, 1.4) < 1.63
    assert 0.57 < contrast.min() < 0.63 and 1.37 < contrast.max() < 1.45

    rgb = drawn(tmp_path, Image.new("RGB", (16, 16), (120, 80, 80)), "moco", 1500)[:, :, 8, 8]
    luminance = rgb @ torch.tensor([0.299, 0.587, 0.114]).double()
    spread = (rgb.amax(1) - rgb.amin(1)) / luminance
    kept = (spread > 0) & (rgb != torch.tensor([120, 80, 80])).any(1)
    factor = spread[kept] / (40 / (0.299 * 120 + 0.701 * 80))
    # Factors uniform in 0.6..1.4 have a mean of 1 and a variance of 0.16 / 3; two: (1 + 0.16 / 3)^2 - 1 = 0.109.
    assert factor.mean() == pytest.approx(1, abs=0.04) and factor.var() == pytest.approx(0.109, abs=0.017)


def test_moco_jitters_in_any_order(tmp_path):
    """A fixed order never clips where another one does: bright bands, both orders of brightness and contrast
    are seen."""
    bands = Image.new("RGB", (64, 64), (120, 120, 120))
    for x in range(0, 64, 16):
        bands.paste((250, 250, 250), (x, 0, x + 8, 64))
    images = drawn(tmp_path, bands, "moco", 400)[:, 0, 20:44]
    low, high = images.amin((1, 2)), images.amax((1, 2))
    # Brightness first: dark bands stay below 1.4 * 120 = 168 if white is reached at last. Contrast first: the
    # ratio of the two is that of contrast alone, at least 0.6 of 130 over bands of mean 185, unless white is reached.
    assert ((low > 180) & (high == 255)).any()
    assert ((high < 250) & ((high - low) / (high + low) < 0.85 * 0.6 * 130 / 370)).any()


def test_moco_blurs_half_by_a_sigma_that_scales_with_the_image(tmp_path):
    """0.1 to 2 pixels of 224, so 0.15 to 3 where the shorter side is 336: measured by how wide an edge
    between two greys is."""
    bands = Image.new("RGB", (512, 336), (60, 60, 60))
    for x in range(0, 512, 128):
        bands.paste((140, 140, 140), (x, 0, x + 64, 336))
    lines = drawn(tmp_path, bands, "moco", 200)[:, 0, 168]
    sigmas = []
    for line in lines:
        steps = line.diff().abs()
        steps[steps < 0.5] = 0
        n, edges = len(steps), []
        for i in (
            (steps > 0).nonzero()[:, 0].tolist()
        ):  # an edge is 64 pixels from the next, and its steps are close
            if edges and i - edges[-1][-1] < 20:
                edges[-1].append(i)
            else:
                edges.append([i])
        middles, variances = [], []
        for edge in edges:
            if edge[0] >= 25 and edge[-1] <= n - 25:  # none that the image's border cuts
                weights, places = steps[edge], torch.tensor(edge).double()
                middles.append((weights * places).sum() / weights.sum())
                variances.append((weights * (places - middles[-1]).square()).sum() / weights.sum())
        scale = (middles[-1] - middles[0]) / (len(middles) - 1) / 64 if len(middles) > 1 else 1.5
        # What enlarging by `scale` does to an edge, and what reading it pixel by pixel does, is taken off.
        sigmas.append((sum(variances) / len(variances) - (scale**2 + 1) / 12).clamp(min=0).sqrt())
    sigmas = torch.stack(sigmas)
    blurred = sigmas > 0.8
    assert is_share(blurred, 0.5 * (3 - 0.8) / (3 - 0.15))
    assert off_uniform(sigmas[blurred], 0.8, 3) < 1.63 and 2.8 < sigmas.max() < 3.2


def test_full_memory_is_no_bad_record(folder, monkeypatch):
    """Dropped by --skip-bad, good records would be lost for want of memory."""
    monkeypatch.setattr(Image, "open", lambda path: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_examples(write(folder / "x.json", [authors()]), skip_bad=True)
    with pytest.raises(torch.OutOfMemoryError), data.about("the layout"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_data_command_counts_every_kind_of_record(folder, capsys):
    """`python data.py FILE` is how a user finds out before renting a GPU: its counts and its exit status."""
    tie = VLFEEDBACK | {"id": "llava-tie", "completions": [completion("A", "3"), completion("B", "3")]}
    kinds = [
        authors(id="llava-0", chosen="A cat."),  # 2 words
        authors(id="llava-2", chosen="A cat on a mat, asleep in the sun."),  # 9 words
        authors(id="llava-3", chosen="A cat asleep.", img_path="merged_images/llava-1.jpg"),  # 3 words
        authors(id="svit-0", chosen="Cat."),
        tie,
        *[authors(id=f"llava-bad-{i}", chosen="") for i in range(25)],
        authors(id="llava-no", img_path="none.png"),
        authors(id="llava-broken", img_path="broken.png"),
    ]
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    path = write(folder / "elsewhere" / "x.json", kinds)
    assert check_file([path, "--images", str(folder), "--subset", "llava"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}: --skip-bad would drop 27 bad records:\n")
    assert "record 6 (id llava-bad-0): 'chosen' is empty" in err and "... and 7 more" in err
    write(path_of := folder / "good.json", kinds[:5])
    assert check_file([str(path_of), "--images", str(folder), "--subset", "llava"]) == 0
    out, err = capsys.readouterr()
    assert f"{path_of}: left out 2 records of other ids, or whose ratings" in out and err == ""
    assert f"{path_of}: 3 examples with 2 different images; 0 examples have" in out
    assert check_file([str(folder / "none.json")]) == check_file([path, "--images", str(folder / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 2 and "none.json: no such file" in err and "no such image folder" in err


# --------------------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """7 drawn examples: with batches of 4 and micro-batches of 2, an epoch is 2 + 2, then 2 + 1."""
    return str(shapes.write_pairs(tmp_path_factory.mktemp("data") / "small", 7))


ARGUMENTS = train.FILES | train.METHOD | train.SYSTEM


def command(bunny, small, out, *more):
    base = f"--model {bunny} --data {small} --out {out} --epochs 2 --batch-size 4 --micro-batch-size 2 --lr 1e-3"
    return [*base.split(), *"--workers 0 --lora-rank 4 --lora-alpha 8 --device cpu".split(), *map(str, more)]


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
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5)
    assert records[-1]["epoch"] == 2


def test_adapter_reloads_with_plain_peft(finished, bunny):
    """Users load it with PeftModel.from_pretrained; a key that does not match would be left out in silence."""
    model, processor = train.load_model(str(bunny))
    before = response_logps(model, make_batch(PAIRS, processor)).chosen
    tuned = peft.PeftModel.from_pretrained(model, finished)
    after = response_logps(tuned, make_batch(PAIRS, processor)).chosen
    assert (after - before).abs().min() > 1e-4
    by_hand = train.add_lora(train.load_model(str(bunny))[0], rank=4, alpha=8)
    saved = torch.load(finished / "checkpoint.pt", weights_only=True)["adapter"]
    peft.set_peft_model_state_dict(by_hand, saved)
    torch.testing.assert_close(after, response_logps(by_hand, make_batch(PAIRS, processor)).chosen)


def test_saved_processor_reloads(finished, bunny):
    """The folder alone must be enough to ask the tuned model a question. With torchvision the library takes another image
    processor unless it is told not to."""
    saved, original = transformers.AutoProcessor.from_pretrained(finished), train.load_processor(str(bunny))
    saved.image_processor = transformers.AutoImageProcessor.from_pretrained(finished, backend="pil")
    ours, theirs = (make_batch(PAIRS, processor).inputs for processor in (saved, original))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batch_size_does_not_change_the_update(finished, bunny, small, tmp_path, micro_batch_size):
    """The gradient is the mean over the batch, the last partial one too (3 of 4: micro-batches of 2 and 1), not a mean
    of micro-batch means, which would weigh the single example twice."""
    out = tmp_path / "out"
    assert train.main(command(bunny, small, out, "--micro-batch-size", micro_batch_size)) == 0
    for ours, theirs in zip(log_of(out), log_of(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_plain_layout_trains_the_same(finished, bunny, small, tmp_path):
    """--layout plain is the yardstick a user can switch to."""
    assert train.main(command(bunny, small, tmp_path / "out", "--layout", "plain")) == 0
    assert json.loads((tmp_path / "out" / "args.json").read_text())["layout"] == "plain"
    for ours, theirs in zip(log_of(tmp_path / "out"), log_of(finished), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


class Settings(NamedTuple):
    """The arguments of a run, with the paper's defaults (Section 4.1, and the authors' released config)."""

    epochs: int = 3
    batch_size: int = 32
    micro_batch_size: int = 4
    lr: float = 1e-5
    warmup: float = 0.1
    betas: tuple = (0.9, 0.98)
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    beta: float = 0.1
    delta: float = 0.0
    conditional: bool = True
    anchors: tuple = ("chosen",)
    reject: str = "crop"
    crop: tuple = (0.01, 0.2)
    lora_rank: int = 64
    lora_alpha: int = 128
    seed: int = 0
    limit: int | None = None
    eval_size: int = 0
    max_length: int = 2048
    no_image: bool = False

    def flags(self):
        """Only what is not a default, so that the defaults are tested, too."""
        changed = {k: v for k, v in self._asdict().items() if v != self._field_defaults[k]}
        words = []
        for name, value in changed.items():
            if name == "conditional":
                words.append("--no-conditional")
            elif value is True:
                words.append(f"--{name.replace('_', '-')}")
            else:
                words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
                words += ["none"] if value == () else []
        return words


def crop_by_hand(image, rng, low, high):
    """An area uniform in low..high, an aspect log-uniform in 3/4..4/3, or as far as the image has room for it; a place."""
    width, height = image.size
    area = width * height * (low + (high - low) * rng.random())
    widest, tallest = min(4 / 3, width * width / area), max(3 / 4, area / (height * height))
    aspect = math.exp(math.log(tallest) + (math.log(widest) - math.log(tallest)) * rng.random())
    w, h = max(1, round((area * aspect) ** 0.5)), max(1, round((area / aspect) ** 0.5))
    left, top = rng.randrange(width - w + 1), rng.randrange(height - h + 1)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))


def run_by_hand(folder, data_file, a):
    """A whole run from its arguments `a` alone: one sequence at a time, peft's own layers, no packing, no checkpointing, AdamW,
    clipping and schedule written out. -> (a record for each step, the adapter)."""
    records = list(enumerate(json.loads(Path(data_file).read_text())))
    if a.limit:
        records = [records[i] for i in sorted(random.Random(a.seed).sample(range(len(records)), a.limit))]
    draw, held = random.Random(f"{a.seed} held out"), set()
    while len(held) < a.eval_size:
        held.add(draw.randrange(len(records)))
    training = [record for i, record in enumerate(records) if i not in held]
    held_out = [record for i, record in enumerate(records) if i in held]
    open_ = lambda record: Image.open(Path(data_file).parent / record[1]["img_path"]).convert("RGB")
    by_path = lambda pool: sorted(pool, key=lambda record: str(Path(data_file).parent / record[1]["img_path"]))

    def rejected_image(record, key):
        rng = random.Random(f"{a.seed} {key[0]} {key[1]}")
        if a.reject == "crop":
            return crop_by_hand(open_(record), rng, *a.crop)
        pool = by_path(records if key[0] == "held out" else training)
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
        encode = lambda text: processor(text=[text], images=[image] if image else None, return_tensors="pt")
        start, inputs = encode(prompt)["input_ids"].shape[1], encode(prompt + response)
        ids = inputs["input_ids"][0, : a.max_length]
        rows = model(**inputs).logits[0, start - 1 :]
        return sum(rows[i].log_softmax(0)[id] for i, id in enumerate(ids[start:]))

    def losses_of(record, key):
        question = record["prompt"].partition("<image>\n")[2].removesuffix(" ASSISTANT:")
        (prompt, y_w), (_, y_l) = (full_text(processor, question, record[side]) for side in ("chosen", "rejected"))
        m_w, m_l = open_((0, record)), rejected_image((key[2], record), key)
        score = lambda: [logp(prompt, y_w, m_w), logp(prompt, y_l, m_w), logp(prompt, y_w, m_l)]
        with torch.no_grad(), model.disable_adapter():
            reference = score()
        r = dict(zip(LogPs._fields, (a.beta * (p - q) for p, q in zip(score(), reference))))
        terms = {"loss/dpo": r["chosen"] - r["rejected"]}
        if a.conditional:
            terms["loss/conditional"] = r["chosen"] - r["image_rejected"]
        values = {name: -torch.sigmoid(margin).log() for name, margin in terms.items()}
        anchored = [-torch.sigmoid((r[n] - a.delta) * (1 if n == "chosen" else -1)).log() for n in a.anchors]
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

    def held_out_metrics():
        with torch.no_grad():
            values = [losses_of(record, ("held out", i, n)) for i, (n, record) in enumerate(held_out)]
        return {f"eval/{name}": value for name, value in mean(values).items()} if values else {}

    steps_an_epoch = -(-len(training) // a.batch_size)
    n_steps, log = a.epochs * steps_an_epoch, []
    n_warmup = math.ceil(a.warmup * n_steps)
    for step in range(n_steps):
        epoch, at = divmod(step, steps_an_epoch)
        order = list(range(len(training)))
        random.Random(f"{a.seed} order {epoch}").shuffle(order)
        batch = [(epoch, i, training[i][0]) for i in order[at * a.batch_size : (at + 1) * a.batch_size]]
        values = [losses_of(training[i][1], (epoch, i, n)) for epoch, i, n in batch]
        mean_loss = sum(value["loss"] for value in values) / len(batch)
        gradients = dict(zip(weights, torch.autograd.grad(mean_loss, weights.values())))
        norm = sum(g.square().sum() for g in gradients.values()).sqrt().item()
        if step < n_warmup:
            lr = a.lr * step / n_warmup
        else:
            lr = a.lr * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))
        with torch.no_grad():
            for name, weight in weights.items():
                gradient, (m, v), (b1, b2) = gradients[name] * min(1, a.max_grad_norm / norm), states[name], a.betas
                m.mul_(b1).add_((1 - b1) * gradient)
                v.mul_(b2).add_((1 - b2) * gradient**2)
                m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
                weight -= lr * (a.weight_decay * weight + m_hat / (v_hat.sqrt() + 1e-8))
        record = mean(values) | {"lr": lr, "grad_norm": norm}
        log.append(record | (held_out_metrics() if at == steps_an_epoch - 1 else {}))
    return log, {name.replace(".default", ""): weight.detach() for name, weight in weights.items()}


RUNS = {
    "the paper's settings": Settings(epochs=2, batch_size=4, micro_batch_size=2),
    "every number changed": Settings(
        epochs=3, batch_size=3, micro_batch_size=1, lr=0.02, warmup=0.4, betas=(0.8, 0.9), weight_decay=0.7,
        max_grad_norm=0.3, beta=0.5, delta=0.3, anchors=("chosen", "rejected", "image_rejected"), crop=(0.2, 0.5),
        lora_rank=2, lora_alpha=12, seed=3, limit=6, eval_size=2, max_length=90,
    ),
    "a random image": Settings(
        epochs=2, batch_size=5, micro_batch_size=5, lr=0.03, warmup=0.0, weight_decay=0.0, max_grad_norm=100.0,
        conditional=False, anchors=("image_rejected",), delta=-0.2, reject="random", lora_rank=3,
        seed=1, eval_size=2,
    ),
    "DPO": Settings(epochs=2, batch_size=4, lr=0.01, conditional=False, anchors=(), lora_rank=4, lora_alpha=4, seed=2),
    "DPO without images": Settings(
        epochs=1, batch_size=3, micro_batch_size=3, lr=0.01, conditional=False, anchors=(), no_image=True, seed=4
    ),
    "one step": Settings(epochs=1, lr=0.01),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_its_arguments_say(bunny, small, tmp_path, name):
    """An argument that is ignored, a gradient that is not clipped, a schedule that is a step late, a last batch divided by the
    full size, one rejected image for all epochs: each trains something else than the user asked for, in silence."""
    settings, out = RUNS[name], tmp_path / "out"
    arguments = ["--model", bunny, "--data", small, "--out", out, "--workers", 0, "--device", "cpu", *settings.flags()]
    assert train.main([*map(str, arguments)]) == 0
    steps = [record for record in log_of(out) if record["step"] > 0]
    one_step = name == "one step"  # a single step is not warm-up, whose first step has rate 0
    expected, weights = run_by_hand(bunny, small, settings._replace(warmup=0.0) if one_step else settings)
    for record, values in zip(steps, expected, strict=True):
        assert ("eval/loss" in record) == ("eval/loss" in values)
        for key, value in values.items():
            if "accuracies" in key and math.isnan(value):
                continue
            if key in record:
                assert record[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (record["step"], key)
            else:  # where no term asks for the rejected image
                assert "image" in key and not settings.conditional and "image_rejected" not in settings.anchors
    saved = adapter(out)
    assert saved.keys() == weights.keys()
    start = run_by_hand(bunny, small, settings._replace(epochs=0))[1]
    apart = sum((saved[k] - weights[k]).square().sum().item() for k in weights)
    moved = sum((start[k] - weights[k]).square().sum().item() for k in weights)
    assert apart < 1e-4 * moved and moved > 0


def child(*arguments, **options):
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def fork(function, *arguments):
    """Start function(*arguments) in a copy of this process."""

    def run():
        torch.set_num_threads(1)  # makes torch's pool anew, before threads race to do so
        sys.exit(function(*arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.fixture(scope="session")
def six_epochs(bunny, small, tmp_path_factory):
    """(arguments of 12 steps, the adapter of the run that was not stopped)."""
    arguments = lambda out, *more: command(bunny, small, out, "--epochs", 6, "--save-every", 1, "--eval-size", 1, *more)
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


def killed(monkeypatch, arguments, module, name, die_at):
    """Run train.main in a child whose `module.name` is `die_at(the function)`, and which dies by SIGKILL."""
    with monkeypatch.context() as patched:
        patched.setattr(module, name, die_at(getattr(module, name)))
        process = fork(train.main, arguments)
        process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("number", [1, 2, 12])
def test_resume_after_sigkill_inside_the_writing_of_a_checkpoint_is_exact(
    six_epochs, tmp_path, monkeypatch, number
):
    """The worst moment: the file is half there. --save-every is 1, so that checkpoint 1 is step 1's."""
    cut, calls = tmp_path / "cut", []

    def die_at(save):
        def save_half(state, path):
            calls.append(path)
            save(state, path)
            if len(calls) == number:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return save_half

    killed(monkeypatch, six_epochs[0](cut), torch, "save", die_at)
    assert [record["step"] for record in log_of(cut)] == list(range(number + 1))
    goes_on_exactly(six_epochs, cut)


@pytest.mark.parametrize("step", [0, 1, 2, 12])
@pytest.mark.parametrize(
    "file", ["checkpoint.pt", "adapter_model.safetensors", "adapter_config.json", "README.md"]
)
def test_resume_after_sigkill_between_two_renames_is_exact(six_epochs, tmp_path, monkeypatch, file, step):
    """Of a checkpoint's files some are new then, and some are old or not there. The kill comes before the
    rename of `file` in the checkpoint of `step`; 0 is the same in the first one, but after the rename."""
    cut, calls = tmp_path / "cut", []

    def die_at(rename):
        def rename_or_die(source, target):
            calls.append(Path(target).name)
            if step == 0 and calls[-1] == file:
                rename(source, target)
            if calls.count(file) == max(step, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        return rename_or_die

    killed(monkeypatch, six_epochs[0](cut), os, "replace", die_at)
    goes_on_exactly(six_epochs, cut)
    assert not [*cut.glob("*.tmp")]


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0(six_epochs, tmp_path, monkeypatch):
    """Its arguments are all that it needs. The log holds steps by then, which come again."""
    cut = tmp_path / "cut"

    def die_at(save):
        return lambda *args: os.kill(os.getpid(), signal.SIGKILL)

    killed(monkeypatch, six_epochs[0](cut), train, "save_checkpoint", die_at)
    assert [record["step"] for record in log_of(cut)] == [0, 1] and not (cut / "checkpoint.pt").exists()
    goes_on_exactly(six_epochs, cut)


def counted(monkeypatch, module, name):
    """A list that grows by one at each call of module.name."""
    calls, function = [], getattr(module, name)

    def note(*args, **options):
        calls.append(1)
        return function(*args, **options)

    monkeypatch.setattr(module, name, note)
    return calls


def stopped_at(step, monkeypatch, arguments, number=signal.SIGTERM):
    """Run train.main and send it a signal once it has logged `step` -> exit status."""
    log = train.log

    def stop(out, records, record):
        log(out, records, record)
        if record["step"] == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(train, "log", stop)
        return train.main(arguments)


def test_a_run_killed_before_its_first_checkpoint_names_its_data(bunny, small, tmp_path, monkeypatch):
    """It begins anew, so other data would be as good; but its args.json must not name data that it never
    saw."""
    shutil.copytree(Path(small).parent, tmp_path / "data")
    mine, out = tmp_path / "data" / "silkie.json", tmp_path / "out"

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "save_checkpoint", die)
        assert train.main(command(bunny, mine, out)) == 130
    records = json.loads(mine.read_text())
    write(mine, [records[0] | {"chosen": "Something else."}, *records[1:]])
    status = train.main(["--resume", str(out)])
    sha256 = hashlib.sha256(mine.read_bytes()).hexdigest()
    assert status == 2 or json.loads((out / "args.json").read_text())["data_files"] == sha256


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@SIGNALS
def test_a_signal_saves_before_leaving(finished, bunny, small, tmp_path, monkeypatch, capsys, number):
    """Ctrl-C, a cluster's preemption or a terminal that closes must not cost an epoch. What a kill left of a
    line in the log is not read."""
    out, before = tmp_path / "out", signal.getsignal(number)
    assert stopped_at(3, monkeypatch, command(bunny, small, out), number) == 128 + number
    assert f"python train.py --resume {out}" in capsys.readouterr().out and signal.getsignal(number) == before
    assert [record["step"] for record in log_of(out)] == [1, 2, 3]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["records"] == log_of(out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    steps = counted(monkeypatch, train, "mdpo_step")
    assert train.main(["--resume", str(out)]) == 0
    assert len(steps) == 2  # the micro-batches of step 4 alone
    assert [record["step"] for record in log_of(out)] == [1, 2, 3, 4]
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def test_a_signal_between_saving_and_leaving_loses_nothing(bunny, small, tmp_path, monkeypatch):
    """It may come at any time: a run that leaves at once, for a signal that it had not seen when it could have
    saved, loses all steps since the last checkpoint, and says that it saved them."""

    class Late(list):  # a signal comes as soon as it was read
        def __iter__(self):
            seen = self[:]
            self.append(signal.SIGTERM)
            return iter(seen)

    monkeypatch.setattr(train, "stop_signals", lambda: contextlib.nullcontext(Late()))
    assert train.main(command(bunny, small, tmp_path / "out")) == 128 + signal.SIGTERM
    assert [record["step"] for record in log_of(tmp_path / "out")] == [1, 2]
    records = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["records"]
    assert records == log_of(tmp_path / "out")


@SIGNALS
def test_a_signal_to_the_whole_group_saves_too(finished, bunny, small, tmp_path, monkeypatch, number):
    """Terminals, schedulers and `timeout` signal every process of a run: workers must not die before the step
    is saved."""
    log, out = train.log, tmp_path / "out"

    def stop(out, records, record):
        log(out, records, record)
        if record["step"] == 2:
            os.killpg(0, number)

    def run():
        os.setpgrp()
        return train.main(command(bunny, small, out, "--workers", 2))

    with monkeypatch.context() as patched:
        patched.setattr(train, "log", stop)
        process = fork(run)
        process.join(timeout=60)
    assert process.exitcode == 128 + number and [record["step"] for record in log_of(out)] == [1, 2]
    assert train.main(["--resume", str(out)]) == 0
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def test_a_second_signal_stops_at_once(finished, bunny, small, tmp_path, monkeypatch):
    """Who presses Ctrl-C twice does not wait for a step, nor for workers that are deaf to it. What was saved
    before is whole."""
    step, out = train.mdpo_step, tmp_path / "out"

    def stop(*args, **options):
        if (out / "checkpoint.pt").exists():  # so in step 3
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGINT)
            (tmp_path / "not at once").touch()
        return step(*args, **options)

    def run():
        os.setpgrp()
        return train.main(command(bunny, small, out, "--workers", 2))

    with monkeypatch.context() as patched:
        patched.setattr(train, "mdpo_step", stop)
        process = fork(run)
        process.join(timeout=60)
    assert process.exitcode == 130 and not (tmp_path / "not at once").exists()
    assert train.main(["--resume", str(out)]) == 0
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def test_under_nohup_a_terminal_that_closes_stops_nothing(finished, bunny, small, tmp_path, monkeypatch):
    """nohup asks for SIGHUP to be ignored: a run that listens to it all the same ends with the ssh
    session."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stopped_at(2, monkeypatch, command(bunny, small, tmp_path / "out"), signal.SIGHUP) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(tmp_path / "out").items())


def test_help_shows_every_default(capsys):
    """A 0 is a value as others are; what has none is left without."""
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    parts = [" ".join(part.split()) for part in re.split(r"\n  --", capsys.readouterr().out)]
    for name, (default, kind, _) in ARGUMENTS.items():
        (part,) = [part for part in parts if part.startswith(f"{name} ")]
        shown = kind is not bool and default not in (None, [])
        assert (f"(default: {default})" in part) == shown, name


def test_arguments_cannot_be_abbreviated(bunny, small, capsys):
    """`--resum RUN` would start another run, or none, without a word."""
    assert train.main(["--resum", "x", "--model", str(bunny), "--data", small]) == 2
    assert "unrecognized arguments: --resum x" in capsys.readouterr().err


def test_each_epoch_ends_in_a_checkpoint(bunny, small, tmp_path, monkeypatch):
    """Without --save-every a power cut costs an epoch at most."""
    log, out = train.log, tmp_path / "out"

    def power_cut(out, records, record):
        if record["step"] == 3:
            raise KeyboardInterrupt
        log(out, records, record)

    monkeypatch.setattr(train, "log", power_cut)
    assert train.main(command(bunny, small, out)) == 130
    assert [r["step"] for r in torch.load(out / "checkpoint.pt", weights_only=True)["records"]] == [1, 2]


def test_a_run_that_ended_ends_in_a_checkpoint(finished, tmp_path, monkeypatch):
    """Resumed, it must neither train again nor change."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr(train, "mdpo_step", lambda *args, **options: pytest.fail("trained again"))
    assert train.main(["--resume", str(tmp_path / "copy")]) == 0
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(tmp_path / "copy").items())
    assert log_of(tmp_path / "copy") == log_of(finished)


def test_a_run_goes_on_with_its_own_data_only(bunny, small, tmp_path, monkeypatch, capsys):
    """Half of the steps on other data is a run that nobody asked for."""
    records = json.loads(Path(small).read_text())
    shutil.copytree(Path(small).parent, tmp_path / "data")
    mine, out = tmp_path / "data" / "silkie.json", tmp_path / "out"
    assert stopped_at(1, monkeypatch, command(bunny, mine, out)) == 128 + signal.SIGTERM
    write(mine, [records[0] | {"chosen": "Something else."}, *records[1:]])
    assert train.main(["--resume", str(out)]) == 2
    assert "the run began with other values of data files\n" in capsys.readouterr().err
    assert train.main(["--resume", str(out), "--data", small]) == 0  # the same data, elsewhere


def test_a_run_goes_on_with_its_own_arguments(finished, bunny, small, tmp_path, monkeypatch, capsys):
    """Everything comes from the run's folder. What would train something else is refused, all of it at once; what changes
    only speed is taken."""
    out = tmp_path / "out"
    assert stopped_at(2, monkeypatch, command(bunny, small, out)) == 128 + signal.SIGTERM
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert train.main(["--resume", str(out), "--lr", "1", "--seed", "1", "--anchors", "none"]) == 2
    assert "the run began with other values of anchors, lr, seed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    moved = out.rename(tmp_path / "moved")
    same = ["--betas", "0.9", "0.98", "--crop", "0.01", "0.2", "--anchors", "chosen"]  # the defaults, said aloud
    assert train.main(["--resume", str(moved), "--micro-batch-size", "4", "--model", str(bunny), *same]) == 0
    assert all(torch.allclose(v, adapter(finished)[k], atol=1e-5) for k, v in adapter(moved).items())
    assert not out.exists()


def test_a_run_goes_on_from_any_folder(bunny, small, tmp_path, monkeypatch):
    """Its files were named from where it began. Looked for elsewhere, a model would be asked of the hub."""
    (tmp_path / "here").mkdir()
    shutil.copytree(bunny, tmp_path / "here" / "model")
    shutil.copytree(Path(small).parent, tmp_path / "here" / "data")
    monkeypatch.chdir(tmp_path / "here")
    arguments = command("model", "data/silkie.json", tmp_path / "out", "--eval-data", "data/silkie.json")
    assert stopped_at(1, monkeypatch, arguments) == 128 + signal.SIGTERM
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", "out"]) == 0


def test_fewer_examples_are_another_run(bunny, small, tmp_path, monkeypatch, capsys):
    """With --skip-bad an image that is gone drops its record: every later step would see other examples."""
    shutil.copytree(Path(small).parent, tmp_path / "data")
    mine, out = tmp_path / "data" / "silkie.json", tmp_path / "out"
    assert stopped_at(1, monkeypatch, command(bunny, mine, out, "--skip-bad")) == 128 + signal.SIGTERM
    next((tmp_path / "data" / "images").iterdir()).unlink()
    assert train.main(["--resume", str(out)]) == 2
    assert "the run began with other values of examples" in capsys.readouterr().err


def test_a_checkpoint_runs_no_code(finished, tmp_path, capsys):
    """A run's folder can come from anybody. Unpickled, it could do anything."""

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    shutil.copytree(finished, copy := tmp_path / "copy")
    state = torch.load(copy / "checkpoint.pt", weights_only=True)
    torch.save(state | {"code": Code()}, copy / "checkpoint.pt")
    assert str(copy) in one_line_of(capsys, train.main(["--resume", str(copy)]))
    assert not (tmp_path / "ran").exists()


def test_all_groups_of_parameters_are_clipped_as_one():
    """Half of the parameters would take steps of any size, unnoticed.

    The loss is 3 a + 4 b, so that the gradient is (3, 4), of norm 5; clipped to 1 it is (0.6, 0.8), which
    plain gradient descent with a rate of 1 subtracts from (0, 0).
    """
    a, b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    losses = (3 * a + 4 * b)[None]
    objective = lambda batch: (losses, {"loss": losses.detach()})
    args = SimpleNamespace(epochs=1, max_grad_norm=1.0)
    batches = iter([SimpleNamespace(ids=["1"])])
    (record,) = train.train(objective, [[[(0, 0)]]], batches, optimizer, schedule, args)
    assert record["grad_norm"] == pytest.approx(5)
    assert (a.item(), b.item()) == pytest.approx((-0.6, -0.8), rel=1e-5)


def test_standard_error_that_breaks_off_ends_no_run(bunny, small, tmp_path, monkeypatch):
    """`2>&1 | tee log`, and tee is gone: the steps would be lost for want of a progress bar."""
    said = []

    def gone(*text):
        said.append(text)
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=gone, flush=gone, isatty=lambda: True))
    assert train.main(command(bunny, small, tmp_path / "out")) == 0
    assert said and (tmp_path / "out" / "processor_config.json").exists()
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it under 2>&-
    assert train.main(command(bunny, small, tmp_path / "closed")) == 0


def test_an_out_that_is_a_file_is_refused_before_the_data_are_read(bunny, tmp_path, capsys):
    """Checking data and loading weights takes minutes."""
    (tmp_path / "file").write_text("mine")
    line = one_line_of(capsys, train.main(command(bunny, tmp_path / "none.json", tmp_path / "file")))
    assert "already exists" in line and (tmp_path / "file").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_no_bug_here(capsys):
    """Whose disk is full need not report it to us."""

    def full(argv):
        raise OSError(28, "No space left on device")

    assert data.run_command(full, []) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_a_signal_with_workers_leaves_no_child(bunny, small, tmp_path, monkeypatch):
    """Workers are deaf to signals: one that is left would keep Python from its exit for ever."""
    arguments = command(bunny, small, tmp_path / "out", "--workers", 2)
    assert stopped_at(1, monkeypatch, arguments) == 128 + signal.SIGTERM
    assert not multiprocessing.active_children()


def test_held_out_data_that_moved_are_the_same(bunny, small, tmp_path, monkeypatch, capsys):
    """Their contents count, as the training data's do, and not where the file lies now."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(Path(small).parent, moved)
    assert stopped_at(2, monkeypatch, command(bunny, small, out, "--eval-data", small)) == 128 + signal.SIGTERM
    (moved / "one.json").write_text(json.dumps(json.loads(Path(small).read_text())[:1]))
    assert train.main(["--resume", str(out), "--eval-data", str(moved / "one.json"), "--images", str(moved)]) == 2
    assert "the run began with other values of data files" in capsys.readouterr().err
    flags = ["--eval-data", str(moved / Path(small).name), "--data", str(moved / Path(small).name)]
    assert train.main(["--resume", str(out), *flags]) == 0


def test_the_table_at_the_end_is_the_logs(bunny, small, tmp_path, capsys):
    """Before and after are what a user quotes: exchanged, or of training steps, they say something else."""
    assert train.main(command(bunny, small, tmp_path / "held", "--eval-size", 2)) == 0
    first, *_, last = [record for record in log_of(tmp_path / "held") if "eval/loss" in record]
    assert first["step"] == 0 and last["step"] == 4
    line = re.search(r"^  loss +(\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert line.groups() == (f"{first['eval/loss']:.4f}", f"{last['eval/loss']:.4f}")


@pytest.mark.parametrize("flag, calls", [((), 2), (("--no-checkpointing",), 1)])
def test_activations_are_recomputed_unless_told_otherwise(bunny, small, tmp_path, monkeypatch, flag, calls):
    """Without checkpointing a real model does not fit; with it against the user's wish a run is a quarter slower.
    One epoch is 4 micro-batches of 2 layers: each runs for the policy, and to be recomputed. A frozen tower in
    training mode would take a batch's own statistics where it has batch norm: other features than in the check."""
    mlps = transformers.models.phi.modeling_phi.PhiMLP, transformers.models.siglip.modeling_siglip.SiglipMLP
    seen = {mlp: [] for mlp in mlps}
    for mlp in mlps:
        note = lambda self, x, forward=mlp.forward: (
            seen[type(self)].append((torch.is_grad_enabled(), self.training)) or forward(self, x)
        )
        monkeypatch.setattr(mlp, "forward", note)
    assert train.main(command(bunny, small, tmp_path / "out", "--epochs", 1, *flag)) == 0
    language, vision = seen.values()
    assert sum(grad for grad, _ in language) == 4 * 2 * calls
    assert vision and not any(training for _, training in vision)


def test_held_out_examples_are_never_trained_on_and_keep_their_image(bunny, small, tmp_path, monkeypatch):
    """Otherwise the before/after table measures memory, or luck of the crop."""
    seen = {}
    get = Pairs.__getitem__

    def noted(self, key):
        one = get(self, key)
        if isinstance(key, tuple):  # else the layout is tried on it
            seen.setdefault((key, one.id), []).append(one)
        return one

    monkeypatch.setattr(Pairs, "__getitem__", noted)
    out = tmp_path / "out"
    assert train.main(command(bunny, small, out, "--eval-size", 2, "--no-conditional", "--anchors", "none")) == 0
    held_out = {id for (epoch, _), id in seen if epoch == "held out"}
    trained = {id for (epoch, _), id in seen if epoch != "held out"}
    assert len(held_out) == 2 and len(trained) == 5 and not held_out & trained
    for (key, _), items in seen.items():
        if key[0] == "held out":
            assert len(items) == 3 and len({one.images_rejected[0].tobytes() for one in items}) == 1
    before = log_of(out)[0]  # a DPO run reports the image metrics of the held-out examples too
    assert (
        before["step"] == 0
        and before["eval/loss"] == pytest.approx(math.log(2))
        and "eval/rewards/image_margins" in before
    )
    assert "rewards/image_margins" not in log_of(out)[1]


def test_no_image_run_needs_no_images(bunny, tmp_path):
    """Fig. 1's DPO (No Image)."""
    path = write(tmp_path / "x.json", [authors(img_path="nowhere.png", chosen=f"A cat {i}.") for i in range(5)])
    assert train.main(command(bunny, path, tmp_path / "out", "--no-image", "--eval-size", 1)) == 0
    assert log_of(tmp_path / "out")[1]["loss"] == pytest.approx(math.log(2))


def test_images_elsewhere_and_bad_records_on_the_command_line(bunny, small, tmp_path, capsys):
    """A flag that is parsed and not handed on: the images beside the file would be looked for, or the run would stop."""
    good = json.loads(Path(small).read_text())[:3]
    mine, images = write(tmp_path / "mine.json", [*good, good[0] | {"chosen": ""}]), Path(small).parent
    assert train.main(command(bunny, mine, tmp_path / "out", "--images", images)) == 2
    assert "record 4" in capsys.readouterr().err
    assert train.main(command(bunny, mine, tmp_path / "out", "--images", images, "--skip-bad", "--epochs", 1)) == 0
    assert "1 bad record" in capsys.readouterr().out and len(log_of(tmp_path / "out")) == 1


def test_without_out_each_run_gets_its_own_folder(bunny, small, tmp_path, monkeypatch):
    """The user's own command must run twice, and lose nothing."""
    monkeypatch.chdir(tmp_path)
    arguments = command(bunny, small, "x", "--epochs", 1)
    arguments = arguments[:4] + arguments[6:]  # no --out
    assert train.main(arguments) == train.main(arguments) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["bunny-silkie-1", "bunny-silkie-2"]


def test_a_run_is_never_replaced(bunny, small, tmp_path, capsys):
    """Nothing that the user made is lost: a folder that is there is left as it is, to the byte."""
    out = tmp_path / "out"
    assert train.main(command(bunny, small, out)) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert train.main(command(bunny, small, out, "--seed", 1)) == 2
    assert f"already exists; choose another --out, or --resume {out}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def broken_model(bunny, folder, change):
    folder.mkdir()
    for path in bunny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / "model-00002-of-00002.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def text_model(bunny, folder):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=500)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bunny, trust_remote_code=False).save_pretrained(folder)
    return folder


NO_GPU = "Found no NVIDIA driver" if torch.version.cuda else "Torch not compiled with CUDA"
BAD_INPUTS = {  # what the message must say: (arguments, given bunny and tmp_path)
    "nowhere: cannot be loaded": lambda b, t: ["--model", t / "nowhere"],
    "its processor has no image token": lambda b, t: ["--model", text_model(b, t / "text")],
    "1 weights are missing, such as lm_head.weight": lambda b, t: [
        "--model", broken_model(b, t / "m", lambda w: w.pop("lm_head.weight"))],
    "1 weights are unexpected, such as model.surprise": lambda b, t: [
        "--model", broken_model(b, t / "m", lambda w: w.update({"model.surprise": torch.zeros(1)}))],
    "none.json: no such file": lambda b, t: ["--data", t / "none.json"],
    "no example is left": lambda b, t: ["--data", write(t / "x.json", [])],
    "no example is left with an id in 'llava'": lambda b, t: ["--subset", "llava"],
    "not valid JSON": lambda b, t: ["--data", write(t / "x.json", "[{]")],
    "is one JSON object with the fields a": lambda b, t: ["--data", write(t / "x.json", '{\n"a": 1}')],
    "cannot be read: 'utf-8' codec can't decode byte": lambda b, t: ["--data", ROOT / Path(b) / "model-00001-of-00002.safetensors"],
    "no such image folder": lambda b, t: ["--images", t / "none"],
    "--beta: must be within 1e-12 to 1000000.0, got 0": lambda b, t: ["--beta", 0],
    "--beta: must be within 1e-12 to 1000000.0, got -0.1": lambda b, t: ["--beta", -0.1],
    "--beta: must be within 1e-12 to 1000000.0, got inf": lambda b, t: ["--beta", "inf"],
    "--lr: must be within 1e-12 to 1000000.0, got nan": lambda b, t: ["--lr", "nan"],
    "--delta: must be within -1000000.0 to 1000000.0, got -inf": lambda b, t: ["--delta=-inf"],
    "--delta: expected one argument": lambda b, t: ["--delta", "-1e-3"],
    "--weight-decay: must be within 0 to 1, got -1e-3": lambda b, t: ["--weight-decay=-1e-3"],
    "--warmup: must be within 0 to 1, got 1.5": lambda b, t: ["--warmup", 1.5],
    "--betas: must be within 0 to 0.999999, got 1": lambda b, t: ["--betas", 0.9, 1],
    "--epochs: must be within 1 to 1000, got 0": lambda b, t: ["--epochs", 0],
    "--eval-size: must be within 0 to 9223372036854775807, got -1": lambda b, t: ["--eval-size", -1],
    "--seed: must be within 0 to 9223372036854775807, got -1": lambda b, t: ["--seed", -1],
    "--crop: must be within 0 to 1, got -1": lambda b, t: ["--crop", -1, 0.2],
    "--crop: its minimum is above its maximum": lambda b, t: ["--crop", 0.5, 0.2],
    "--crop does nothing with another --reject": lambda b, t: ["--crop", 0.2, 0.5, "--reject", "moco"],
    "--anchors none cannot be combined": lambda b, t: ["--anchors", "none", "chosen"],
    "--no-image leaves": lambda b, t: ["--no-image", "--anchors", "image_rejected"],
    "invalid choice": lambda b, t: ["--anchors", "cropped"],
    "invalid int value": lambda b, t: ["--epochs", "many"],
    "unrecognized arguments: --bata": lambda b, t: ["--bata", 1],
    "leaves none of 7": lambda b, t: ["--eval-size", 7],
    "no room for a response": lambda b, t: ["--max-length", 20],
    "already exists; choose another --out": lambda b, t: ["--out", b],
    "cannot be written to": lambda b, t: ["--out", write(t / "file", "") + "/out"],
    f"cannot be loaded: {NO_GPU}": lambda b, t: ["--device", "cuda"],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_one_line_and_status_2(bunny, small, tmp_path, capsys, message):
    """A traceback tells a user nothing; and what failed must leave nothing behind."""
    if NO_GPU in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments = command(bunny, small, tmp_path / "out", *BAD_INPUTS[message](bunny, tmp_path))
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    lines = [line for line in error.splitlines() if line.strip() and "it/s]" not in line]  # bars
    assert lines[-1 if "bad record" not in error else 0].startswith("error: ") and "Traceback" not in error
    assert len(lines) == 1 or "bad record" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput):
        train.main([*arguments, "--debug"])


@pytest.mark.parametrize("wrong", ["the loss is nan", "the gradient is nan"])
def test_nan_stops_the_run_and_names_the_batch(bunny, small, tmp_path, capsys, monkeypatch, wrong):
    """Training on after a NaN ruins the adapter in silence. The slope of a square root at 0 is infinite, its value is not."""

    def broken(policy_logps, *rest, batch, **options):
        losses, metrics = mdpo_loss(policy_logps, *rest, **options)
        more = math.nan if wrong == "the loss is nan" else (0 * policy_logps[0]).sqrt()
        return losses + more, metrics

    assert train.main(command(bunny, small, tmp_path / "out"), loss=broken) == 2
    error = capsys.readouterr().err
    ids = re.search(r"not finite; examples: (.*)", error)[1].split(", ")
    assert "step 1" in error and len(ids) == 4 and set(ids) <= {str(i) for i in range(1, 8)}


def test_out_of_gpu_memory_names_the_flag(bunny, small, tmp_path, capsys, monkeypatch):
    """The first thing a user meets on a small GPU."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "mdpo_step", full)
    assert train.main(command(bunny, small, tmp_path / "out")) == 2
    assert "out of GPU memory; what saves some: a lower --micro-batch-size" in capsys.readouterr().err
    assert data.run_command(full, []) == 2  # another command: it has no micro-batches
    assert capsys.readouterr().err == "error: out of GPU memory; what saves some: --device cpu\n"


def test_model_and_data_are_required(capsys):
    """Who starts the script without reading needs the two names, and the demo's."""
    assert train.main(["--resume", str(ROOT / "nowhere")]) == 2
    assert "nowhere: cannot be resumed: [Errno 2]" in capsys.readouterr().err
    assert train.main([]) == 2
    assert "error: --model and --data are required (--help lists" in capsys.readouterr().err


def test_an_image_that_vanishes_is_named_from_a_worker(bunny, tmp_path, capsys, monkeypatch):
    """An error inside a DataLoader worker arrives as a page of traceback; the user needs its last line."""
    path = shapes.write_pairs(tmp_path / "data", 4)
    load = train.load_model
    monkeypatch.setattr(train, "load_model", lambda *a: (tmp_path / "data/images/2.png").unlink() or load(*a))
    assert train.main(command(bunny, path, tmp_path / "out", "--workers", 1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a process that loads data: image") and "2.png cannot be decoded" in error


def test_nothing_ever_asks_a_question(bunny, small, tmp_path):
    """With standard input open, a library that asks whether to run remote code would wait for ever."""
    process = child("train.py", *command(bunny, small, tmp_path / "out", "--epochs", 1), stdin=subprocess.PIPE)
    assert process.wait(timeout=120) == 0, process.stderr.read()


# ------------------------------------------------------------------------------- whatever a file or a disk does


def one_line_of(capsys, status):
    """What a command that failed said: one line on stderr beside progress bars, nothing else."""
    err = capsys.readouterr().err
    lines = [line for line in re.split("[\r\n]+", err) if line.strip() and "it/s]" not in line and "%|" not in line]
    lines = [line for line in lines if not line.startswith(("[transformers]", "stopping after", "  "))]
    assert status in (2, 130) and len(lines) == 1 and lines[0].startswith("error: "), err[-2000:]
    assert lines[0].isprintable() and len(lines[0]) < 3000 and "internal error" not in lines[0]
    return lines[0]


HOSTILE = [None, True, 0, -1, 10**400, 1.5, math.nan, math.inf, "", " ", "x", "\ud800", "\x1b[2J\n\t", "..", "/", "<image>",
           "a" * 5000, [], [[]], {}, {"a": 1}, [None], [{"role": "user"}], [{"role": "user", "content": 3}],
           [{"role": "system", "content": []}], {"path": None}, {"type": "image"}]  # fmt: skip


def mutated(value, rng):
    """The value with one of its parts, at any depth, replaced, left out, doubled or nested."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice([*copy] if isinstance(copy, dict) else range(len(copy)))
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = mutated(copy[key], rng)
        return copy
    return rng.choice([*HOSTILE, [value], [value, value], {"a": value}, str(value)[:-1]])


def test_no_record_is_a_traceback(folder, bunny, capsys):
    """600 records of every format, each with a part of another type, missing, ragged or hostile: each is read, left out
    or named on one line; none hides the good one, and none takes long."""
    rng, good, started = random.Random(0), authors(id="good"), time.monotonic()
    for _ in range(100):
        kinds = [authors(), VLFEEDBACK, MESSAGES, PLAIN, NO_PROMPT]
        records = [good, *(mutated(record, rng) for record in kinds)]
        path = write(folder / "x.json", records)
        said = []
        examples = read_examples(path, skip_bad=True, log=said.append)
        assert "good" in [example.id for example in examples]
        assert all(line.isprintable() and len(line) < 3000 for text in said for line in text.split("\n  "))
        capsys.readouterr()
    assert time.monotonic() - started < 30


def test_patterns_and_depths_that_explode_are_read_in_no_time(folder, capsys):
    """A citation that never ends, a template within templates, brackets within brackets: quadratic time or a deep stack."""
    started = time.monotonic()
    rating = lambda text: VLFEEDBACK | {"completions": [completion(text, "5"), completion("B", "1")]}
    for record in (rating("【†" * 100_000 + "x"), authors(prompt="USER: " * 100_000 + "x"), authors(prompt="<image>" * 50_000)):
        check_file([write(folder / "x.json", [record])])
    capsys.readouterr()
    (folder / "x.json").write_text("[" * 100_000)
    one_line_of(capsys, check_file([str(folder / "x.json")]))
    assert time.monotonic() - started < 10


def test_images_that_are_no_photographs_are_bad_records(folder, monkeypatch):
    """Padded to a square, 1 x 20000 pixels are 400 million; a bomb of a few bytes decodes to gigabytes."""
    for size in ((1, 51), (5001, 100), (10_001, 10_000)):
        Image.new("1", size).save(folder / "a.png")
        with pytest.raises(BadInput, match=f"{size[0]} x {size[1]} pixels: sides differ"):
            read_examples(write(folder / "x.json", [authors()]))
    Image.new("1", (50, 1)).save(folder / "a.png")
    assert len(read_examples(write(folder / "x.json", [authors()]))) == 1


def test_a_text_about_cuda_is_no_fault_of_the_machine(folder):
    """A file of that name that is missing would hide all other problems, and --skip-bad would not drop it."""
    path = write(folder / "x.json", [authors(), authors(img_path="CUDA.png"), authors(chosen="")])
    with pytest.raises(BadInput, match="would drop 2 bad records"):
        read_examples(path)


def test_the_mask_has_the_models_dtype(bunny, monkeypatch):
    """Of another one, each layer would convert it, and CUDA's kernels refuse it."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    seen, blocks = [], mdpo.attention_blocks
    monkeypatch.setattr(mdpo, "attention_blocks", lambda *args: seen.append(args) or blocks(*args))
    mdpo.forward_inputs(model, pack(make_batch(PAIRS[:1], processor)))
    assert seen[0][1:] == (torch.device("cpu"), torch.bfloat16)


def test_float32_pixels_reach_a_bf16_model_in_its_dtype(bunny):
    """Processors give float32. Some vision towers round them, others (Aria's, Llama 4's) stop with an error."""
    model, processor = train.load_model(str(bunny), dtype=torch.bfloat16)
    seen, features = [], model.get_image_features
    spy = lambda pixel_values: seen.append(pixel_values.dtype) or features(pixel_values)
    model.get_image_features = spy
    mdpo.forward_inputs(model, make_batch(PAIRS[:1], processor))
    assert seen == [torch.bfloat16]


def test_the_float32_mode_computes_in_float32_and_leaves_the_weights():
    """1 + 2 ** -10 is not in bf16. What is written into a tensor made inside must be there afterwards."""
    weight, near_1 = torch.ones(2, dtype=torch.bfloat16), 1 + 2**-10
    with train.InFloat32():
        total = weight + 2**-10
        made = torch.zeros(2, dtype=torch.bfloat16)
        made[0] = near_1
        by_name = F.layer_norm(torch.tensor([1.0, -1.0]), (2,), weight=weight, eps=0.0)
    assert total.tolist() == [near_1] * 2 and made.tolist() == [near_1, 0]
    assert by_name.tolist() == [1, -1] and weight.dtype == torch.bfloat16


def test_what_is_our_own_fault_says_so(capsys):
    """A user who is told that the file is bad looks for the mistake in the wrong place."""

    def broken(argv):
        raise RuntimeError("two\nlines \x1b[2J")

    assert data.run_command(broken, []) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: internal error, please report") and "\x1b" not in err
    with pytest.raises(RuntimeError):
        data.run_command(broken, ["--debug"])


def start(folder):
    """What a run does with a model before its first step."""
    model, processor = train.load_model(str(folder))
    with data.about("adapter"):
        model = train.add_lora(model, 2, 4)
    train.choose_layout(model, processor, PAIRS[:1])
    return 0


@pytest.mark.parametrize("seed", range(40))
def test_no_model_folder_is_a_traceback(bunny, llava, tmp_path, capsys, seed):
    """A field of one of its JSON files changed or gone, a template broken, a file cut short: an interrupted download, a
    hand-edited config. It loads all the same, or one line names the folder."""
    rng = random.Random(seed)
    folder = tmp_path / "model"
    shutil.copytree(rng.choice([bunny, llava]), folder)
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    if path.suffix == ".json" and path.name != "tokenizer.json" and rng.random() < 0.8:
        write(path, mutated(json.loads(path.read_text()), rng))
    elif rng.random() < 0.3:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    started, status = time.monotonic(), data.run_command(lambda argv: start(folder), [])
    if status:
        assert str(folder) in one_line_of(capsys, status)
    assert time.monotonic() - started < 10


TEMPLATES = ["{{", "{% for %}", "{{ messages.x.y }}", "{{ 1 / 0 }}", "{% for m in messages %}{{ m.content.x() }}{% endfor %}", "",
             "{{ raise_exception('no') }}", "{{ messages[5].content }}", "{{ 'a' + 1 }}"]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_broken_chat_template_is_the_models_fault_not_each_records(llava, small, tmp_path, capsys, template):
    """Reported record by record, it would send the user through thousands of good ones."""
    folder = tmp_path / "model"
    shutil.copytree(llava, folder)
    (folder / "chat_template.jinja").write_text(template)
    line = one_line_of(capsys, train.main(command(folder, small, tmp_path / "out")))
    assert str(folder) in line and "record" not in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(6))
def test_no_argument_is_a_traceback(capsys, seed):
    """Every flag with values that are no numbers, no choices, too many, too large: one line before anything is loaded."""
    rng, values = random.Random(seed), ["", "x", "-1", "nan", "inf", "-inf", "1e400", "9" * 30, "0x10", "1_0", "--", "é\x07", "0"]
    for _ in range(60):
        flag = rng.choice([*ARGUMENTS])
        words = [f"--{flag}", *rng.choices(values, k=rng.choice([1, 1, 2, 3]))]
        status = data.run_command(lambda argv: train.parse_args(argv) and 0, ["--model", "m", "--data", "d", *words])
        if status:
            one_line_of(capsys, status)
        capsys.readouterr()


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edited(path, change):
    record = json.loads(path.read_text())
    change(record)
    write(path, record)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def arguments_changed(**values):
    return lambda folder: edited(folder / "args.json", lambda args: args.update(values))


def checkpoint_changed(**values):
    def change(folder):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(state | {"run": state["run"] | values}, folder / "checkpoint.pt")

    return change


def checkpoint_is_a_folder(folder):
    (folder / "checkpoint.pt").unlink()
    (folder / "checkpoint.pt").mkdir()


DAMAGES = {  # what the line must say
    "args.json": lambda f: (f / "args.json").unlink(),
    "not valid JSON": lambda f: (f / "args.json").write_text('{"model": '),
    "cannot be resumed: is not in a known form": lambda f: (f / "args.json").write_text("[]"),
    "has no 'lr'": lambda f: edited(f / "args.json", lambda args: args.pop("lr")),
    "must be within 1e-12": arguments_changed(lr="nan"),
    "other values of seed": arguments_changed(seed=7),
    "other values of reject, lr, seed": arguments_changed(reject="moco", lr=1.0, seed=7),
    "other values of lora rank": arguments_changed(lora_rank=1),
    "other values of data files": checkpoint_changed(data_files="0" * 64),
    "other values of loss": checkpoint_changed(loss="mine"),
    "other values of base weights": checkpoint_changed(base_weights="0" * 64),
    "other values of examples": checkpoint_changed(examples=[8, 0]),
    "other values of beta, data files, loss": checkpoint_changed(data_files="0" * 64, loss="mine", beta=0.2),
    "checkpoint.pt: cannot be resumed from: is damaged": lambda f: flipped(f / "checkpoint.pt"),
    "checkpoint.pt: cannot be resumed from: File is not": lambda f: os.truncate(f / "checkpoint.pt", 1000),
    "checkpoint.pt: cannot be resumed from: File is": lambda f: (f / "checkpoint.pt").write_bytes(b""),
    "checkpoint.pt: cannot be resumed from: [Errno 2]": lambda f: dangling(f / "checkpoint.pt"),
    "checkpoint.pt: cannot be resumed from: [Errno 21]": checkpoint_is_a_folder,
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_run_is_refused_and_left_as_it_is(finished, tmp_path, capsys, message):
    """Half of a run on other arguments, data or weights is a result that nobody can explain."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    DAMAGES[message](copy)
    before = bytes_of(copy)
    line = one_line_of(capsys, train.main(["--resume", str(copy)]))
    assert message in line and str(copy) in line and bytes_of(copy) == before


def test_a_log_that_is_broken_is_written_again(finished, tmp_path):
    """It is read by people and by curves; a run that goes on must not stumble over it."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    (copy / "metrics.jsonl").write_bytes(b"\xff\x00{")
    assert train.main(["--resume", str(copy)]) == 0 and log_of(copy) == log_of(finished)


def test_a_checkpoint_of_another_run_is_refused(finished, bunny, small, tmp_path, capsys):
    """A run of another seed has the same shapes: its weights would be trained on in silence."""
    assert train.main(command(bunny, small, tmp_path / "out", "--seed", 1, "--epochs", 1)) == 0
    shutil.copytree(finished, copy := tmp_path / "copy")
    shutil.copy(tmp_path / "out" / "checkpoint.pt", copy)
    line = one_line_of(capsys, train.main(["--resume", str(copy)]))
    assert "the run began with other values of epochs, seed" in line


def test_resume_refuses_flags_that_would_change_the_result(finished, tmp_path, capsys):
    """All at once, so that nobody mends one and waits for the next."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    flags = "--seed 5 --lr 1 --out x --workers 1".split()
    line = one_line_of(capsys, train.main(["--resume", str(copy), *flags]))
    assert line.endswith("the run began with other values of lr, seed, out")
    assert train.main(["--resume", str(copy), "--workers", "1", "--save-every", "2"]) == 0


@pytest.mark.parametrize("when", ["the main process waits for it", "it is ahead"])
def test_a_worker_that_dies_is_one_line(finished, bunny, small, tmp_path, capsys, monkeypatch, when):
    """The kernel kills the largest process when memory is short. The run says so and ends, and the steps that
    it had done are not lost: they are saved where the main process waits for the next batch, and have been
    saved by --save-every wherever else it is, such as in the middle of a step."""
    item, log, out = Pairs.__getitem__, train.log, tmp_path / "out"
    last = train.plan_steps(7, 4, 2, 2, seed=0)[2][0][0]  # of step 3

    def die(self, key):
        if key == last and len(self.examples) > 1:
            while when != "it is ahead" and not (tmp_path / "step 2 is done").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, key)

    def note(folder, records, record):
        log(folder, records, record)
        if record["step"] == 2:
            (tmp_path / "step 2 is done").touch()

    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", die)
        patched.setattr(train, "log", note)
        started, more = time.monotonic(), ["--save-every", 1] if when == "it is ahead" else []
        status = train.main(command(bunny, small, out, "--workers", 1, *more))
    line = one_line_of(capsys, status)
    assert "DataLoader worker" in line and "--workers 0" in line and time.monotonic() - started < 60
    no_child_is_left()
    if when != "it is ahead":
        assert [r["step"] for r in torch.load(out / "checkpoint.pt", weights_only=True)["records"]] == [1, 2]
    assert train.main(["--resume", str(out)]) == 0 and [record["step"] for record in log_of(out)] == [1, 2, 3, 4]
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def no_child_is_left():
    """Python waits for its children at its exit; workers are deaf to the signals that it sends to them."""
    gc.collect()  # torch ends the workers of a loader that is gone
    children = multiprocessing.active_children()
    for process in children:
        process.kill()
    assert not children


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_the_steps_before_an_image_that_vanishes_are_saved(
    finished, bunny, small, tmp_path, capsys, monkeypatch, workers, failing
):
    """Storage that is gone for a moment must not cost an epoch: the steps done are whole, and once the image
    is back, the run goes on from there, to the same adapter. Step 2 is cut off in its second micro-batch."""
    plan = train.plan_steps(7, 4, 2, 2, seed=0)
    lost, out, item = plan[failing - 1][-1][-1], tmp_path / "out", Pairs.__getitem__

    def get(self, key):
        if key == lost and len(self.examples) > 1 and not preview:
            raise BadInput("image gone.png cannot be decoded")
        return item(self, key)

    def layout_is_tried(*args):
        preview.clear()
        return choose(*args)

    preview, choose = [1], train.choose_layout  # the first examples are also read to try the layout
    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", get)
        patched.setattr(train, "choose_layout", layout_is_tried)
        status = train.main(command(bunny, small, out, "--workers", workers))
    assert "gone.png cannot be decoded" in one_line_of(capsys, status)
    no_child_is_left()
    assert [record["step"] for record in log_of(out)] == list(range(1, failing))
    assert (out / "checkpoint.pt").exists() == (failing > 1)
    steps = counted(monkeypatch, train, "mdpo_step")
    assert train.main(["--resume", str(out)]) == 0
    assert len(steps) == 2 * (5 - failing) and [record["step"] for record in log_of(out)] == [1, 2, 3, 4]
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_held_out_image_that_vanishes_loses_no_step_and_repeats_none(
    bunny, small, tmp_path, capsys, monkeypatch, epoch
):
    """It is missed at the end of an epoch, when the weights have moved and the step is not yet in the log. A
    checkpoint of moved weights and an old log would take that step twice."""
    arguments = command(bunny, small, tmp_path / "out", "--eval-size", 2)
    assert train.main(command(bunny, small, tmp_path / "whole", "--eval-size", 2)) == 0
    item, asked = Pairs.__getitem__, []

    def get(self, key):
        asked.append(key)
        if asked.count(("held out", 0)) == epoch + 1:  # the first time is before training
            raise BadInput("image gone.png cannot be decoded")
        return item(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "__getitem__", get)
        assert "gone.png cannot be decoded" in one_line_of(capsys, train.main(arguments))
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    ours, whole = adapter(tmp_path / "out"), adapter(tmp_path / "whole")
    assert all(torch.equal(v, whole[k]) for k, v in ours.items())
    steps = [[record["step"] for record in log_of(tmp_path / name)] for name in ("out", "whole")]
    assert steps[0] == steps[1] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what", ["the disk is full", "the folder vanishes", "the log is a folder"])
def test_a_disk_that_fails_is_one_line_and_the_checkpoint_stays_whole(bunny, small, tmp_path, capsys, monkeypatch, what):
    """The last checkpoint is all that is left of hours. RLIMIT_FSIZE stands for a full disk."""
    log, out = train.log, tmp_path / "out"

    def break_down(folder, records, record):
        if record["step"] == 3 and what == "the folder vanishes":
            shutil.rmtree(folder)
        if record["step"] == 3 and what == "the log is a folder":
            (folder / "metrics.jsonl").unlink()
            (folder / "metrics.jsonl").mkdir()
        if record["step"] == 3 and what == "the disk is full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        log(folder, records, record)

    with monkeypatch.context() as patched:
        patched.setattr(train, "log", break_down)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            status = train.main(command(bunny, small, out, "--save-every", 1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(out) in one_line_of(capsys, status)
    if what == "the disk is full":
        assert train.main(["--resume", str(out)]) == 0 and [record["step"] for record in log_of(out)] == [1, 2, 3, 4]


def test_weights_that_became_infinite_are_not_saved(bunny, small, tmp_path, capsys, monkeypatch):
    """The loss of the last step is finite; its update is looked at by nobody else."""
    step, out = torch.optim.AdamW.step, tmp_path / "out"

    def overflow(self, *args):
        step(self, *args)
        self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    status = train.main(command(bunny, small, out, "--epochs", 1, "--batch-size", 8))
    assert "made a weight infinite" in one_line_of(capsys, status) and not (out / "adapter_model.safetensors").exists()


def test_a_pipe_that_closes_is_no_traceback(folder):
    """`python data.py FILE | head -1` is how people look at a long report."""
    script = f"{sys.executable} {ROOT / 'data.py'} {write(folder / 'x.json', [authors()])} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""


def test_long_texts_are_cut_where_they_are_shown(folder):
    """An id of a megabyte would fill the terminal, and hide the reason."""
    with pytest.raises(BadInput) as raised:
        read_examples(write(folder / "x.json", [authors(id="x" * 10**6, chosen="")]))
    assert len(str(raised.value)) < 1000 and str(raised.value).endswith("'chosen' is empty")


def test_resume_notices_other_weights(finished, bunny, tmp_path, capsys):
    """The same names and shapes, but other numbers: the second half of the run would have another reference. The same
    numbers in another dtype are the same model."""
    model = lambda change: str(broken_model(bunny, tmp_path / change.__name__, change))
    shutil.copytree(finished, copy := tmp_path / "copy")
    trained = lambda weights: weights["lm_head.weight"].mul_(1.1)
    same = lambda weights: weights.update({name: weight.float() for name, weight in weights.items()})
    trained.__name__, same.__name__ = "trained", "same"
    assert train.main(["--resume", str(copy), "--model", model(same)]) == 0
    line = one_line_of(capsys, train.main(["--resume", str(copy), "--model", model(trained)]))
    assert line.endswith("the run began with other values of base weights")


def test_an_image_that_vanishes_leaves_no_worker_behind(tmp_path):
    """Workers are deaf to the group's signals, and Python waits for them at its exit: the command would never end."""
    path = Path(shapes.write_pairs(tmp_path / "data", 4))
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import contextlib, os, pathlib, signal, torch, train
load, start, workers = train.load_model, torch.multiprocessing.Process.start, []
train.load_model = lambda *a: pathlib.Path({str(path.parent / "images/2.png")!r}).unlink() or load(*a)
torch.multiprocessing.Process.start = lambda worker: start(worker) or workers.append(worker.pid)
status = train.main("--model {ROOT}/examples/base --data {path} --out {tmp_path}/out --workers 1".split())
for pid in workers:  # gone, or dying because it was killed; one that was left behind dies of this signal
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
        status += os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_status == signal.SIGUSR1
assert workers
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "2.png cannot be decoded" in done.stderr.splitlines()[-1]


def test_eval_data_are_held_out_as_well(bunny, tmp_path, monkeypatch):
    """A file of one's own, with random images of its own: training must neither see it nor change by it."""
    data_file, more = shapes.write_pairs(tmp_path / "data", 8, 0), shapes.write_pairs(tmp_path / "more", 3, 1)
    arguments = lambda out: command(bunny, data_file, tmp_path / out, "--epochs", 1, "--reject", "random")
    seen, init = [], Pairs.__init__

    def noted(self, examples, *args, **options):
        init(self, examples, *args, **options)
        seen.append(self)

    monkeypatch.setattr(Pairs, "__init__", noted)
    assert train.main(arguments("with") + ["--eval-data", str(more)]) == 0
    held_out = [pairs for pairs in seen if len(pairs) == 3]
    assert len(held_out) == 1 and len(held_out[0].pool) == 8 + 3 and [len(p.pool) for p in seen if len(p) == 8] == [8]
    assert train.main(arguments("without")) == 0
    assert log_of(tmp_path / "with")[0]["step"] == 0 and "eval/rewards/image_margins" in log_of(tmp_path / "with")[0]
    assert all(torch.equal(v, adapter(tmp_path / "without")[k]) for k, v in adapter(tmp_path / "with").items())


def test_a_stopped_run_can_be_looked_at(bunny, small, tmp_path, monkeypatch):
    """The adapter of the last checkpoint is there, and is that checkpoint's."""
    out = tmp_path / "out"
    assert stopped_at(1, monkeypatch, command(bunny, small, out)) == 128 + signal.SIGTERM
    model, processor = train.load_model(str(bunny))
    tuned = peft.PeftModel.from_pretrained(model, out)
    assert not any(path.suffix == ".tmp" for path in out.iterdir())
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["records"] == log_of(out)
    assert all(torch.equal(v, adapter(out)[k]) for k, v in state["adapter"].items())
    assert tuned.peft_config["default"].r == 4


def test_the_model_card_says_what_was_trained_on_what_and_how(bunny, small, tmp_path):
    """peft's blank template tells the finder of the folder nothing."""
    out = tmp_path / "out"
    assert train.main(command(bunny, small, out, "--eval-size", 2, "--beta", 0.25)) == 0
    card, last = (out / "README.md").read_text(), log_of(out)[-1]
    front, text = card.split("---\n")[1:]
    assert front == "library_name: peft\ntags: [mdpo, lora]\n"  # a path of this machine is no model of the hub
    assert "silkie.json: 4 steps" in text and '"beta": 0.25' in text and f"{last['eval/loss']:.4f}" in text


def test_the_model_card_is_yaml_whatever_the_names():
    """A quote or a colon in a name would end the value that the hub reads."""
    args = train.parse_args(["--model", 'a/b: "c"', "--data", "x.json"])
    front = train.model_card(args, [{"step": 1, "epoch": 1.0}]).split("---\n")[1]
    assert front.splitlines()[0] == r'base_model: "a/b: \"c\""' and len(front.splitlines()) == 3


def test_phases_are_said_as_they_begin(bunny, small, tmp_path):
    """Written to a file, a run at real size said nothing for 13 minutes."""
    script = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
import train
train.load_model = lambda *args: os._exit(7)
train.main({[str(word) for word in command(bunny, small, tmp_path / "out")]!r})
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.run([sys.executable, "-c", script], stdout=log, stderr=subprocess.DEVNULL, env=environment)
    assert run.returncode == 7
    first, *counts, last = (tmp_path / "log").read_text().splitlines()
    assert (first, last) == (f"reading and checking {small}", f"loading {bunny}")
    assert counts[0].startswith(f"{small}: 7 examples with 7 different images")


def test_a_notebooks_output_will_do(folder, monkeypatch):
    """In one, standard output is no file, and has no encoding to set."""
    path = write(folder / "x.json", [authors()])
    monkeypatch.setattr(sys, "stdout", output := SimpleNamespace(write=lambda text: None, flush=lambda: None))
    assert check_file([path]) == 0 and sys.stdout is output


def test_a_folder_with_files_of_ones_own_is_refused(bunny, small, tmp_path, capsys):
    """They would stand among the run's, and some would be replaced. A file that is hidden is a file, too."""
    for name in ("poetry.lock", "mine.tmp", ".env"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        line = one_line_of(capsys, train.main(command(bunny, small, tmp_path / name)))
        assert "already exists" in line and bytes_of(tmp_path / name) == {name: b"mine"}


def test_closed_output_is_no_traceback(folder):
    """Schedulers start commands with their output closed."""
    script = f"{sys.executable} {ROOT / 'data.py'} {write(folder / 'x.json', [authors()])} >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_run_without_its_checkpoint_is_refused(finished, tmp_path, capsys):
    """It would begin anew, and replace the adapter that is there."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    (copy / "checkpoint.pt").unlink()
    before = bytes_of(copy)
    assert "checkpoint.pt: cannot be resumed from" in one_line_of(capsys, train.main(["--resume", str(copy)]))
    assert bytes_of(copy) == before


def test_folders_of_new_files_are_merged(tmp_path):
    """Processors with several chat templates save them in a folder: a run that ended could not be resumed."""
    for text in ("old", "new"):
        with train.replacing(tmp_path) as new:
            (new / "more").mkdir()
            (new / "more" / "template.jinja").write_text(text)
        (tmp_path / "more" / "mine").touch()
    found = {path.name: path.read_text() for path in (tmp_path / "more").iterdir()}
    assert found == {"template.jinja": "new", "mine": ""}


def test_half_a_file_of_a_kill_replaces_nothing(finished, tmp_path):
    """What was being written stays in a folder; moved over the good files at the next save, it would destroy
    them. Left for ever, it would take the room of an optimizer's state."""
    shutil.copytree(finished, copy := tmp_path / "copy")
    (copy / "new.a1.tmp").mkdir()
    (copy / "new.a1.tmp" / "adapter_model.safetensors").write_bytes(b"half")
    assert train.main(["--resume", str(copy)]) == 0 and not [*copy.glob("*.tmp")]
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(copy).items())


def test_an_empty_folder_is_taken(finished, bunny, small, tmp_path):
    """Job scripts make the folder of their output first."""
    (out := tmp_path / "out").mkdir()
    assert train.main(command(bunny, small, out)) == 0
    assert all(torch.equal(v, adapter(finished)[k]) for k, v in adapter(out).items())


def test_ones_own_empty_folder_stays(bunny, tmp_path, capsys):
    """Nothing that the user made is removed; what the run made and did not use is."""
    (mine := tmp_path / "mine").mkdir()
    for out in (mine, tmp_path / "new"):
        one_line_of(capsys, train.main(command(bunny, tmp_path / "none.json", out)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not [*mine.iterdir()]


def test_the_command_that_goes_on_is_quoted(bunny, small, tmp_path, monkeypatch, capsys):
    """Copied from the terminal, a folder with a space would be two arguments."""
    assert stopped_at(1, monkeypatch, [*command(bunny, small, "x")[:4], "--out", str(tmp_path / "my run"), "--workers", "0", "--lora-rank", "4"]) == 128 + signal.SIGTERM
    assert f"--resume '{tmp_path / 'my run'}'" in capsys.readouterr().out


def test_a_broken_bunny_is_the_models_fault(bunny, small, tmp_path, capsys):
    """Its processor is made here, of sizes in its config: reported record by record, good data would be searched."""
    shutil.copytree(bunny, folder := tmp_path / "model")
    edited(folder / "config.json", lambda config: config.update(mm_vision_tower="google/siglip-so400m-patch0-32"))
    line = one_line_of(capsys, train.main(command(folder, small, tmp_path / "out")))
    assert str(folder) in line and "record" not in line


def test_the_layout_check_of_long_answers_takes_no_longer(bunny):
    """It runs whole answers through the model, in float32 on a CPU; one of a book would take hours. Cut to a
    thousand letters, so to as many tokens at most, behind a prompt of less than a hundred."""
    model, processor = train.load_model(str(bunny))
    widths = []
    model.get_input_embeddings().register_forward_hook(lambda *args: widths.append(args[2].shape[:2].numel()))
    long = PAIRS[0]._replace(chosen="a red circle " * 5000, rejected="no. " * 5000)
    assert train.choose_layout(model, processor, [long, PAIRS[1]]) == "packed"
    assert widths and max(widths) <= 6 * 1100


def test_cudnn_attention_and_rounded_float32_are_off(bunny):
    """It plans anew for each shape, at tens of milliseconds, and shapes never repeat here. And float32 may be
    rounded on CUDA, in convolutions by default: the check of the layout would take that for a mistake."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    train.load_model(str(bunny))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_the_mask_is_laid_out_as_cudas_kernels_want_it():
    """Rows that begin at multiples of 16 numbers, in the model's dtype: else each layer converts and copies it. What a
    token may see is added as 0, all else as -inf."""
    rows = [(7, 0, 5), (3, 0, 5), (17, 0, 5)]
    first, (n, owner, prefix, mask), (*_, other) = mdpo.attention_blocks(rows, None, torch.bfloat16)
    assert first == (7, 0, 5, None)  # its own prefix: causal, without a mask
    assert (n, owner, prefix, mask.shape, mask.dtype) == (3, 0, 5, (1, 1, 3, 8), torch.bfloat16)
    assert mask.stride()[2] == 16 and other.stride()[2] == 32 and mask.stride()[3] == 1
    assert torch.equal(mask[0, 0] == 0, torch.tensor([[True] * (6 + i) + [False] * (2 - i) for i in range(3)]))
    assert (mask[mask != 0] == -math.inf).all()


# ------------------------------------------------------------------------------------------------------- the README


README = (ROOT / "README.md").read_text()
EXAMPLES_README = (ROOT / "examples" / "README.md").read_text()
READMES = pytest.mark.parametrize("folder, text", [(ROOT, README), (ROOT / "examples", EXAMPLES_README)])


def anchors_of(text):
    """{anchor: heading} as GitHub makes them; lines of code that begin with # are no headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): heading for heading in headings}


@READMES
def test_readme_links_lead_somewhere(folder, text):
    """A file that was renamed, or a heading that was reworded, breaks links without a word."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text)
    assert len(links) >= 12
    for path, anchor in links:
        target = folder / path if path else folder / "README.md"
        assert target.is_file(), path
        assert not anchor or anchor in anchors_of(target.read_text()), (path, anchor)


@READMES
def test_readme_contents_list_every_section(folder, text):
    """In the order of the text, and under the sections' own names."""
    contents = re.search(r"^## Contents\n(.*?)^(?:## |The )", text, re.MULTILINE | re.DOTALL)[1]
    sections = [(h, anchor) for anchor, h in anchors_of(text).items() if f"\n## {h}\n" in text]
    assert re.findall(r"\[(.*?)\]\(#(.*?)\)", contents) == [s for s in sections if s[0] != "Contents"]


def test_readme_is_short():
    assert len(README.split()) <= 2500


@READMES
def test_readme_commands_name_files_and_flags_that_exist(folder, text):
    """In shell blocks and in the text. Some scripts take train.py's flags as well."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    blocks += re.findall(r"`([^`\n]*python examples/[^`\n]*)`", text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [(m[1], m[2]) for line in lines if (m := re.search(r"\bpython (\S+\.py)(.*)", line))]
    assert len(commands) >= 5
    for script, flags in commands:
        source, options = (ROOT / script).read_text(), {*ARGUMENTS}
        if "make_parser" in source:  # shared
            source += "".join((ROOT / "examples" / name).read_text() for name in ("answer.py", "evaluate.py"))
        for flag in re.findall(r" --([\w-]+)", flags.partition("#")[0]):
            of_train = flag in options and "train.main" in source
            assert of_train or f'"{flag}"' in source or f'"--{flag}"' in source, (script, flag)


def test_readme_hours_are_those_of_the_examples():
    """Both texts quote one prediction; tests of the benchmark hold its formula."""
    rows = re.findall(r"^\| \S+ \| ([\d.]+) hours \| ([\d.]+) hours \|$", README, re.MULTILINE)
    detailed = (ROOT / "examples" / "README.md").read_text().split("Hours of the paper's 10K x 3 epochs")[1]
    cards = r"^\| (?:H200|A100),.*? \| ([\d.]+) h \| \S+ h \(8\) \| ([\d.]+) h \| \S+ h \(\d\) \|$"
    expected = re.findall(cards, detailed, re.MULTILINE)
    assert len(rows) == 2 and rows == [*zip(*expected)]  # a row there is a card, here a model


def test_readme_loss_is_the_loss():
    """The eight lines of the first screen, against `mdpo_loss`."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    scope = {}
    exec(code, scope)
    assert len(code.splitlines()) == 8
    for options in ({}, {"beta": 0.5, "delta": 0.25}):
        assert torch.allclose(scope["mdpo_loss"](POLICY, REF, **options), mdpo_loss(POLICY, REF, **options)[0])


def test_readme_table_points_at_code_that_is_there():
    """A table of equations that rots sends a student to the wrong line."""
    source = inspect.getsource(mdpo_loss)
    equations = re.findall(r"^\| eq\. (\d).*`(\S+)` in `mdpo.mdpo_loss`", README, re.MULTILINE)
    assert len(equations) == 4
    for equation, key in equations:
        assert re.search(rf"{re.escape(key)}.*# eq\. {equation}", source), (equation, key)
    named = re.findall(r"`(mdpo|data|train)\.(\w+)(?:\(.*?\))?`", README + EXAMPLES_README)
    assert len(named) >= 8
    for module, name in named:
        assert name == "py" or hasattr(globals()[module], name), f"{module}.{name}"


def test_readme_flags_exist():
    """Each row of the table of paper settings must be a command that runs; the text names real flags."""
    rows = re.findall(r"^\| (?:DPO|Fig|Table|4\.1).*\| `(--[^`]+)`", README, re.MULTILINE)
    assert len(rows) >= 12
    for flags in rows:
        train.parse_args(["--model", "m", "--data", "d", *flags.split()])
    for flag in re.findall(r"`--([\w-]+)[^`]*`", README):
        assert flag == "help" or flag in ARGUMENTS, flag


def test_readme_training_command_runs(bunny, tmp_path, monkeypatch):
    """The user's own command, to the letter, with a tiny model under Bunny's name and no flag but the README's."""
    monkeypatch.chdir(tmp_path)
    shapes.write_pairs(tmp_path / "data", 5)
    for path in (tmp_path / "data").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "BAAI").mkdir()
    (tmp_path / "BAAI" / "Bunny-v1_0-3B").symlink_to(bunny)
    (line,) = re.findall(r"^python train.py (--model BAAI/Bunny-v1_0-3B --data silkie.json)$", README, re.MULTILINE)
    assert train.main(line.split()) == 0
    assert len(log_of("runs/Bunny-v1_0-3B-silkie-1")) == 3  # 3 epochs of one partial batch


def test_each_epoch_sees_each_example_once_in_an_order_of_its_own():
    """An example left out, or one order for all epochs, is training on something else than the data."""
    plan = train.plan_steps(10, 4, 3, 2, seed=0)
    assert [[len(micro_batch) for micro_batch in step] for step in plan] == [[3, 1], [3, 1], [2]] * 2
    plan = [sum(step, []) for step in plan]
    assert [len(batch) for batch in plan] == [4, 4, 2] * 2
    orders = [[key for batch in plan[at : at + 3] for key in batch] for at in (0, 3)]
    assert [sorted(order) for order in orders] == [[(epoch, i) for i in range(10)] for epoch in (0, 1)]
    assert [i for _, i in orders[0]] != [i for _, i in orders[1]]
