"""Protects the ways into one's own trainer: `MDPOTrainer` and README's lines; and what throughput.py
counts."""

import ast
import random
import re
from functools import partial

import peft
import pytest
import torch

import train
from data import BadInput, make_batch, random_crop
from examples import families, shapes, throughput, tiny_bunny
from mdpo import mdpo_loss, mdpo_step, pack
from test_mdpo import PAIRS, ROOT, message, move, noise
from tests.helpers import EXAMPLES_README, README

SECTION = README.split("## The loss in your own trainer")[1].split("\n## ")[0]
HOURS = EXAMPLES_README.split("Hours of the paper's 10K x 3 epochs")[1]
LN_8 = 2.0794  # three terms of ln 2 each: the policy is its reference
ROW = {"images": [noise(5)], "prompt": "What?", "chosen": "this", "rejected": "that"}
pytestmark = pytest.mark.filterwarnings("ignore")


def data_set(form="text", own=True):
    """PAIRS as a `Dataset` of texts, messages or parts. own: with rejected images; else with `image`."""

    def say(role, text):
        shown = [{"type": "image"}] if role == "user" else []  # a `Dataset` gives it "text": None
        parts = [*shown, {"type": "text", "text": text}]
        return text if form == "text" else [{"role": role, "content": parts if form == "parts" else text}]

    rows = []
    for one in PAIRS:
        row = {"prompt": say("user", one.question), "id": "a column that nothing needs"}
        row |= {"chosen": say("assistant", one.chosen), "rejected": say("assistant", one.rejected)}
        row |= {"images": [*one.images], "rejected_images": [*one.images_rejected]} if own else {}
        rows.append(row if own else row | {"image": one.images[0]})
    return pytest.importorskip("datasets").Dataset.from_list(rows)


@pytest.fixture
def trl_own():
    pytest.importorskip("trl")
    from examples import trl_own

    return trl_own


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def folder_of(request, tmp_path):
    if request.param == "llava":
        return request.getfixturevalue("llava")
    return families.write_family(request.param, tmp_path / "model")


@pytest.fixture
def in_trl(trl_own, tmp_path):
    """A function: model and processor -> a trainer, by default with the three examples in each update."""
    from trl import DPOConfig

    def in_trl(model, processor, rows=None, wrap=None, more=None, **arguments):
        fixed = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
        fixed |= {"per_device_train_batch_size": 3, "num_train_epochs": 1, "logging_steps": 1}
        fixed |= {"report_to": "none", "save_strategy": "no"}
        args = DPOConfig(str(tmp_path / "out"), **fixed | arguments)
        wrap = wrap and peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*_proj")
        return trl_own.MDPOTrainer(model, args=args, processing_class=processor, peft_config=wrap,
                                   train_dataset=rows or data_set(), **more or {})  # fmt: skip

    return in_trl


def first_step(trainer):
    """-> loss, {name: its mean} of all metrics"""
    loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    return loss, {name: value for name, (value,) in trainer._metrics["train"].items()} | {"loss": loss.item()}


@pytest.mark.parametrize("kind", ["adapter", "all weights of the language model"])
def test_each_step_is_mdpo_steps(kind, folder_of, in_trl):
    """Rows, reference, loss or metrics that differ train something else, with numbers that look well."""
    model, processor = train.load_model(str(folder_of))
    ref_model = None
    if kind == "adapter":
        trainer = in_trl(model, processor, data_set("parts"), wrap=True, beta=0.3)
    else:
        model.requires_grad_(False).get_decoder().requires_grad_(True)
        trainer, ref_model = in_trl(model, processor, beta=0.3), train.load_model(str(folder_of))[0]
    torch.manual_seed(0)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    for weight in weights:  # as after some steps: it is not its reference any more
        weight.data += 0.02 * torch.randn_like(weight)
    loss, found = first_step(trainer)
    batch = pack(make_batch(PAIRS, processor, share=True))
    losses, metrics = mdpo_step(trainer.model, batch, beta=0.3, ref_model=ref_model)
    theirs, ours = (torch.autograd.grad(one, weights) for one in (loss, losses.mean()))
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-3)
    expected = {name: values.mean().item() for name, values in metrics.items()}
    assert len(expected) == 11  # loss, three terms and rewards, two accuracies and margins
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert abs(losses.mean().item() - LN_8) > 0.01


def test_an_adapter_that_comes_with_the_model_is_the_reference(llava, in_trl):
    """TRL's rule: training starts from the model that is given, and is not held to its base."""
    model, processor = train.load_model(str(llava))
    model = train.add_lora(model, rank=4, alpha=8)
    torch.manual_seed(0)
    move(model, std=3.0)
    loss, _ = first_step(in_trl(model, processor))
    assert loss.item() == pytest.approx(LN_8, abs=1e-4)
    losses, _ = mdpo_step(model, make_batch(PAIRS, processor))  # against the base
    assert (losses - LN_8).abs().max() > 0.01


def test_logps_are_the_librarys_own_in_nats(folder_of, in_trl):
    """Averaged over tokens, or without the end-of-sequence token, they are another method's."""
    model, processor = train.load_model(str(folder_of))
    expected = {"logps/chosen": 0, "logps/rejected": 0, "logps/image_rejected": 0}
    for one in PAIRS:  # one row at a time, by the library's own loss: a mean over tokens
        rows = one, one._replace(chosen=one.rejected, rejected="x"), one._replace(images=one.images_rejected)
        for name, row in zip(expected, rows):
            batch = make_batch([row], processor, ("chosen",))
            loss = model(**batch.inputs, labels=batch.labels).loss.item()
            expected[name] -= loss * (batch.labels >= 0).sum().item() / 3
    _, found = first_step(in_trl(model, processor, wrap=True))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_crop_is_drawn_once_a_visit_for_policy_and_reference(llava, trl_own, in_trl):
    """Drawn in each forward pass, the margin would compare two images; drawn for ever, the model sees one."""
    random.seed(3)
    expected = random_crop(noise(5), random)  # keeps 1-20% of the area
    random.seed(3)
    first, second = trl_own.to_pair(ROW), trl_own.to_pair(ROW)
    assert first.images_rejected == (expected,) != second.images_rejected and first.images == second.images
    long = trl_own.collate([ROW | {"prompt": "word " * 200}], train.load_processor(str(llava)), None)
    assert long["input_ids"].shape[1] > 400  # None: uncut
    turns = [message("user", "What?"), message("assistant", "this")]  # the answer is the last one
    assert trl_own.to_pair(ROW | {"chosen": turns}).chosen == first.chosen
    assert trl_own.to_pair(ROW | {"images": noise(5).convert("L")}).images[0].mode == "RGB"
    loss, found = first_step(in_trl(*train.load_model(str(llava)), data_set(own=False), wrap=True))
    assert loss.item() == pytest.approx(LN_8, abs=1e-4)
    assert abs(found["logps/chosen"] - found["logps/image_rejected"]) > 1e-3


def test_accumulated_and_evaluated(llava, in_trl):
    """Two micro-batches an update, evaluation, a loss of one's own: metrics keep TRL's names there."""
    data = data_set("messages")
    more = {"eval_dataset": data, "loss": partial(mdpo_loss, anchors=(), delta=0.5)}
    options = {f"per_device_{name}_batch_size": 2 for name in ("train", "eval")}
    options |= {"gradient_accumulation_steps": 2, "eval_strategy": "epoch", "learning_rate": 1e-2}
    trainer = in_trl(*train.load_model(str(llava)), data, True, more, **options)
    trainer.train()
    record, evaluation, _ = trainer.state.log_history
    assert record["loss"] == pytest.approx(LN_8 * 2 / 3, abs=1e-4) and "loss/anchor" not in record
    names = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
    assert {*names.split()} <= {*record} and {f"eval_{name}" for name in names.split()} <= {*evaluation}
    assert evaluation["eval_loss"] < 1.3863
    inputs = next(iter(trainer.get_train_dataloader()))
    loss, _ = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert loss.item() == trainer.compute_loss(trainer.model, inputs).item()


@pytest.mark.parametrize("changes, message", [
    ({"images": []}, "has no image"),
    ({"prompt": "<image> a <image> b?"}, "'prompt' shows 2 images, the record has 1"),
    ({"chosen": 3}, "'chosen': is 3, not text"),
    ({"prompt": "word " * 200}, "no room for a response"),
])  # fmt: skip
def test_a_row_that_cannot_be_trained_on_is_named(changes, message, llava, trl_own):
    """Half a row would train on another task, or stop the run with a traceback of the library."""
    with pytest.raises(BadInput, match=f"a row of the data set: .*{message}"):
        trl_own.collate([ROW | changes], train.load_processor(str(llava)), 100)


@pytest.mark.parametrize("name, value", [
    ("loss_type", "ipo"), ("label_smoothing", 0.1), ("ld_alpha", 0.5), ("use_weighting", True),
    ("loss_weights", [2.0]), ("f_divergence_type", "js_divergence"),
])  # fmt: skip
def test_options_of_another_loss_are_refused(name, value, in_trl):
    """Taken in silence, the run would not be what its arguments say."""
    with pytest.raises(BadInput, match=f"not used by mDPO: {name}$"):
        in_trl(None, None, [], **{name: value})


def test_examples_readme_says_how_to_use_the_trainer(trl_own, tmp_path, monkeypatch):
    """The first thing that TRL's users copy: here with a tiny model, its own data, and on the CPU."""
    import trl

    (code,) = re.findall(r"```py\n(.*?)```", EXAMPLES_README, re.DOTALL)
    folder = families.write_family("qwen2_5_vl", tmp_path / "model")
    on_cpu = partial(trl.DPOConfig, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    monkeypatch.setattr("trl.DPOConfig", on_cpu)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: data_set("messages", own=False))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(folder)), {})
    weights = peft.utils.load_peft_weights(next((tmp_path / "OUT").glob("checkpoint-*")))
    assert any("mlp.down_proj" in n for n in weights) and not any("visual" in n for n in weights)


def test_readme_step_is_mdpo_steps(tmp_path, monkeypatch, capsys):
    """The lines that people copy into their own loop, gradients included."""
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    assert len(code.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shapes.write_pairs(tmp_path / "runs/demo-1/data", 4)

    def add_lora(model, **options):
        model = train.add_lora(model, **options)
        torch.manual_seed(0)
        move(model)  # else the adapter would do nothing yet, and the reference might have it
        return model

    scope = {"add_lora": add_lora}
    exec(code.replace("import add_lora, load_model", "import load_model"), scope)
    printed = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    model, processor = train.load_model("examples/base")
    model = add_lora(model, rank=16, alpha=32)
    batch = make_batch([scope["pairs"][0, i] for i in range(4)], processor, share=True)
    losses, metrics = mdpo_step(model, pack(batch))
    losses.mean().backward()
    for ours, theirs in zip(model.parameters(), scope["model"].parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, atol=1e-5, rtol=1e-3)
        assert torch.equal(ours, theirs) == (ours.grad is None)  # else it has stepped
    assert printed == pytest.approx({n: metrics[n].mean().item() for n in metrics if n != "loss"}, abs=6e-4)
    assert abs(losses.mean().item() - LN_8) > 0.01


def test_the_files_that_are_copied_stand_alone():
    """`data` and `train` are names of everyone's own modules: imported in mdpo.py, they would be those."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"examples", "tests"}
    for name in "mdpo.py", "data.py":
        imported = re.findall(r"(?m)^ *(?:import|from) (\w+)", (ROOT / name).read_text())
        assert imported and not {*imported} & ours
    part, speed = (ROOT / "mdpo.py").read_text().split("\ndef mdpo_step")
    later = {*re.findall(r"(?m)^(?:def|class) (\w+)", speed), "mdpo_step", "Batch"}
    assert not later & {*re.findall(r"\w+", part)}


def add_row(a, row):
    return a + row.expand_as(a)


QKV = [(1, 2, 8, 16)] * 3
ATTENTION = 2 * 2 * 2 * 8 * 8 * 16  # two products, of two heads: 8 x 16 x 8 and 8 x 8 x 16


@pytest.mark.parametrize("operation, shapes, counted", [
    (torch.matmul, [(4, 8), (8, 16)], (2 * 4 * 8 * 16, 0, 1)),
    (torch.Tensor.addmm_, [(4, 16), (4, 8), (8, 16)], (1024, 0, 1)),  # LoRA's, in place
    (torch.add, [(4, 8), (4, 8)], (0, 2 * 3 * 32, 1)),
    (add_row, [(4, 8), (1, 8)], (0, 2 * (32 + 8 + 32), 1)),
    (torch.t, [(4, 8)], (0, 0, 0)),  # a view
    (throughput.attention_on_gpu, QKV, (ATTENTION, 0, 1)),
    (partial(throughput.attention_on_gpu, is_causal=True), QKV, (ATTENTION / 2, 0, 1)),
    (throughput.attention_on_gpu, [*QKV, (1, 1, 8, 8)], (ATTENTION, 0, 1)),  # under a mask
])  # fmt: skip
def test_what_an_operation_counts(operation, shapes, counted):
    """All hours rest on FLOPs, bytes and launches, here of bf16."""
    with throughput.Work() as work:
        operation(*(torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes))
    assert (work.flops, work.traffic, work.launches) == counted


def test_checkpointing_computes_the_layer_once_more(monkeypatch):
    """By hand, of width 32 and an MLP of 64: the products of a layer, LoRA's A of six and B of all but the
    last (nothing after it is needed), and attention: causal in a row, whole where y_l's n tokens see a
    prefix."""
    shape = throughput.phi(32, 64, 1, 2, 600), tiny_bunny.siglip(32, 64, 1, 2, 8, 32)
    monkeypatch.setitem(throughput.SHAPES, "tiny", shape)
    model, processor = throughput.make_model("tiny", "meta", torch.bfloat16, checkpointing=False)
    batch = throughput.packed_batch(PAIRS[:1], processor)
    without = throughput.count_work(model, batch)
    assert throughput.count_work(model, batch).launches == without.launches  # nothing is left of the first
    train.enable_checkpointing(model)
    again = throughput.count_work(model.train(), batch)
    layer, lora = 4 * 32 * 32 + 2 * 32 * 64, 8 * (5 * 32 + 64) + 8 * (4 * 32 + 64)
    seen = [(n, n / 2 if owner == row else prefix + n) for row, (n, owner, prefix) in enumerate(batch.blocks)]
    attention = sum(4 * 32 * n * n_keys for n, n_keys in seen)
    assert again.flops - without.flops == 2 * len(batch.take) * (layer + lora) + attention
    assert again.traffic > without.traffic and again.launches > without.launches


def test_readme_hours_are_what_is_counted():
    """A table that rots: Bunny's hours on every card, with checkpointing."""
    model, processor = throughput.make_model("bunny-3b", "meta", torch.bfloat16)
    work = throughput.count_work(model, throughput.packed_batch(throughput.make_pairs(4), processor))
    rows = re.findall(r"^\| (.*), \d+ GB \| ([\d.]+), ([\d.]+) \| ([\d.]+) h ", HOURS, re.MULTILINE)
    assert {name: (float(flops), float(width)) for name, flops, width, _ in rows} == throughput.CARDS
    for name, *_, hours in rows:
        assert float(hours) == pytest.approx(throughput.predicted_hours(work, name, 4), abs=0.06)
