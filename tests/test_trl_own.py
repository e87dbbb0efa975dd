"""Protects the ways into one's own trainer, and the predicted hours. Each test says what breaks if it fails.

`MDPOTrainer` of examples/trl_own.py (where trl is missing, its tests are skipped), the lines of README's
section "The loss in your own trainer", and what examples/throughput.py counts.
"""

import ast
import functools
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy
import peft
import pytest
import torch
from PIL import Image

import train
from data import BadInput, Example, make_batch, random_crop
from examples import families, shapes, throughput
from mdpo import mdpo_loss, mdpo_step, pack, response_logps

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "README.md").read_text().split("## The loss in your own trainer")[1].split("\n## ")[0]
HOURS = (ROOT / "examples/README.md").read_text().split("Hours of the paper's 10K x 3 epochs")[1]
pytestmark = pytest.mark.filterwarnings("ignore")


def noise(seed, size=(40, 36)):
    levels = numpy.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=numpy.uint8)
    return Image.fromarray(levels)


PAIRS = [
    Example("What is this?", "a red square on white", "a cat", (noise(0),), (noise(10),)),
    Example("Where?", "left", "right of the large circle", (noise(1),), (noise(11),)),
    Example("Is there a circle?", "yes", "no", (noise(2),), (noise(12),)),
]


def parts(role, text):
    """A message of parts; a `Dataset` gives each part all keys: {"type": "image", "text": None}."""
    shown = [{"type": "image"}] if role == "user" else []
    return [{"role": role, "content": [*shown, {"type": "text", "text": text}]}]


COLUMNS = {  # the same pairs as TRL's users have them
    "parts": parts,
    "messages": lambda role, text: [{"role": role, "content": text}],
    "text": lambda role, text: text,
}


def data_set(say, own=True, one=False):
    """PAIRS as a `datasets.Dataset`. own: with their rejected images. one: a column `image`."""
    datasets = pytest.importorskip("datasets")
    rows = []
    for pair in PAIRS:
        row = {"image": pair.images[0]} if one else {"images": [*pair.images]}
        row |= {"prompt": say("user", pair.question), "chosen": say("assistant", pair.chosen)}
        row |= {"rejected": say("assistant", pair.rejected), "id": "a column that nothing needs"}
        rows.append(row | {"rejected_images": [*pair.images_rejected]} if own else row)
    return datasets.Dataset.from_list(rows)


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


def config(tmp_path, **options):
    """Three updates of three examples each; the mean does not depend on their order."""
    from trl import DPOConfig

    options = {"per_device_train_batch_size": 3, "num_train_epochs": 3, "learning_rate": 1e-2} | options
    return DPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", logging_steps=1,
                     max_grad_norm=0, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
                     **options)  # fmt: skip


def lora(model):
    linear = {module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)}
    names = [name for name, module in model.named_modules() if module in linear]
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)


def move_adapter(model, std=0.3):
    """As if it had been trained: at its start an adapter does nothing."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def watch(trainer):
    """Train -> the gradients of each optimizer step, and the log."""
    import transformers

    steps = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **options):
            steps.append(gradients_of(model))

    trainer.add_callback(Watch())
    trainer.train()
    return steps, [record for record in trainer.state.log_history if "grad_norm" in record]


def steps_of_mdpo_step(model, processor, n=3, lr=1e-2, **options):
    """The same steps by `mdpo_step` -> gradients of each, metrics of each."""
    batch = pack(make_batch(PAIRS, processor, share=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    steps, log = [], []
    for _ in range(n):
        losses, metrics = mdpo_step(model.train(), batch, **options)
        losses.mean().backward()
        steps.append(gradients_of(model))
        log.append({name: values.mean().item() for name, values in metrics.items()})
        optimizer.step()
        optimizer.zero_grad()
    return steps, log


@pytest.mark.parametrize("kind", ["adapter", "all weights of the language model"])
def test_each_step_is_mdpo_steps(kind, folder_of, trl_own, tmp_path):
    """Rows, reference, loss or metrics that differ train something else, with numbers that look well."""
    folder = str(folder_of)
    model, processor = train.load_model(folder)
    ours, _ = train.load_model(folder)
    options, wrap = {"beta": 0.3}, {"peft_config": lora(model)}
    if kind != "adapter":
        wrap, options["ref_model"] = {}, train.load_model(folder)[0].requires_grad_(False)
        for one in model, ours:
            one.requires_grad_(False).get_decoder().requires_grad_(True)
    say = COLUMNS["parts" if kind == "adapter" else "text"]
    trainer = trl_own.MDPOTrainer(model, args=config(tmp_path, beta=0.3), train_dataset=data_set(say),
                                  processing_class=processor, **wrap)  # fmt: skip
    if wrap:
        ours = peft.get_peft_model(ours, wrap["peft_config"])
        ours.load_state_dict(trainer.model.state_dict())
    train.disable_dropout(ours)
    expected, metrics = steps_of_mdpo_step(ours, processor, **options)
    steps, log = watch(trainer)
    assert len(steps) == len(log) == 3 and metrics[0]["loss"] == pytest.approx(2.0794, abs=1e-4)
    assert metrics[2]["loss"] < metrics[0]["loss"] - 0.01
    for ours_now, theirs in zip(expected, steps):
        assert ours_now.keys() == theirs.keys() and len(theirs) > 8
        for name, gradient in theirs.items():
            torch.testing.assert_close(gradient, ours_now[name], atol=2e-5, rtol=1e-3)
    for ours_now, theirs in zip(metrics, log):
        assert len(ours_now) == 11  # the loss, its three terms, three rewards, two accuracies and two margins
        assert {n: theirs[n] for n in ours_now} == pytest.approx(ours_now, abs=1e-4)


def test_weights_outside_the_language_model_train_as_well(llava, trl_own, tmp_path):
    """TRL trains whatever has gradients. If policy and reference shared features, the tower would stay."""
    model, processor = train.load_model(str(llava))
    options = {"train_dataset": data_set(COLUMNS["text"]), "processing_class": processor}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "linear_1"])
    trainer = trl_own.MDPOTrainer(
        model, args=config(tmp_path, num_train_epochs=2), peft_config=lora, **options
    )
    steps, log = watch(trainer)
    for part in "vision_tower", "multi_modal_projector", "language_model":
        found = [g for name, g in steps[1].items() if part in name]
        assert found and all(g.abs().max() > 0 for g in found), part
    assert log[0]["loss"] == pytest.approx(2.0794, abs=1e-4)  # 3 ln 2: the reference has no adapter anywhere


def test_an_adapter_that_comes_with_the_model_is_the_reference(llava, trl_own, tmp_path):
    """TRL's rule: training starts from the model that is given. Against the base, the policy would be held to
    another model than the user's, and the first loss would not be 3 ln 2."""
    torch.manual_seed(0)
    model, processor = train.load_model(str(llava))
    model = peft.get_peft_model(model, lora(model))
    move_adapter(model, std=3.0)
    options = {"train_dataset": data_set(COLUMNS["text"]), "processing_class": processor}
    trainer = trl_own.MDPOTrainer(model, args=config(tmp_path, num_train_epochs=1), **options)
    _, (record,) = watch(trainer)
    assert record["loss"] == pytest.approx(2.0794, abs=1e-4)
    with torch.no_grad(), model.disable_adapter():
        base = response_logps(model, make_batch(PAIRS, processor)).chosen.mean().item()
    assert abs(record["logps/chosen"] - base) > 0.1  # the adapter does something


def test_logps_are_the_librarys_own_in_nats(folder_of, trl_own, tmp_path):
    """Averaged over tokens, or without the end-of-sequence token, they are another method's."""
    model, processor = train.load_model(str(folder_of))
    options = {"train_dataset": data_set(COLUMNS["text"]), "processing_class": processor}
    args = config(tmp_path, num_train_epochs=1, beta=0.3)
    trainer = trl_own.MDPOTrainer(model, args=args, peft_config=lora(model), **options)
    _, (record,) = watch(trainer)
    expected = {"chosen": 0, "rejected": 0, "image_rejected": 0}
    for pair in PAIRS:  # one row at a time, by the library's own loss: a mean over tokens
        on_m_w = {"chosen": pair, "rejected": pair._replace(chosen=pair.rejected, rejected="other")}
        for name, row in (on_m_w | {"image_rejected": pair._replace(images=pair.images_rejected)}).items():
            one = make_batch([row], processor, ("chosen",))
            with torch.no_grad(), trainer.model.disable_adapter():
                loss = model(**one.inputs, labels=one.labels).loss.item()
            expected[name] -= loss * (one.labels >= 0).sum().item() / 3
    # The logged ones are those before the only step, when the adapter does nothing.
    assert {n: record[f"logps/{n}"] for n in expected} == pytest.approx(expected, rel=1e-4)


def test_the_crop_is_drawn_once_a_visit_for_policy_and_reference(llava, trl_own, tmp_path):
    """Drawn in each forward pass, the margin would compare two images; drawn for ever, the model sees one."""
    _, processor = train.load_model(str(llava))
    row = {"images": [noise(5)], "prompt": "What?", "chosen": "this", "rejected": "that"}
    random.seed(3)
    first, second = (trl_own.to_pair(row) for _ in range(2))
    random.seed(3)
    expected = random_crop(noise(5), random)  # keeps 1-20% of the area
    assert first.images_rejected[0].tobytes() == expected.tobytes()
    assert second.images_rejected[0].tobytes() != expected.tobytes() and first.images == second.images
    assert trl_own.to_pair(row | {"images": noise(5).convert("L")}).images[0].mode == "RGB"
    model, _ = train.load_model(str(llava))
    args = config(tmp_path, num_train_epochs=1)
    options = {"train_dataset": data_set(COLUMNS["text"], own=False, one=True), "processing_class": processor}
    _, (record,) = watch(trl_own.MDPOTrainer(model, args=args, peft_config=lora(model), **options))
    assert record["loss"] == pytest.approx(2.0794, abs=1e-4)
    assert abs(record["logps/chosen"] - record["logps/image_rejected"]) > 1e-3


@pytest.mark.parametrize("own", [True, False])
def test_accumulated_and_evaluated(own, llava, trl_own, tmp_path):
    """Two micro-batches an update, evaluation, a loss of one's own: metrics keep TRL's names there."""
    model, processor = train.load_model(str(llava))
    data = data_set(COLUMNS["messages"], own)
    args = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
                  eval_strategy="epoch", per_device_eval_batch_size=2)  # fmt: skip
    trainer = trl_own.MDPOTrainer(model, args=args, train_dataset=data, eval_dataset=data,
                                  processing_class=processor, peft_config=lora(model),
                                  loss=functools.partial(mdpo_loss, anchors=(), delta=0.5))  # fmt: skip
    _, (record,) = watch(trainer)
    (evaluation,) = [r for r in trainer.state.log_history if "eval_loss" in r]
    assert record["loss"] == pytest.approx(1.3863, abs=1e-4) and "loss/anchor" not in record  # 2 ln 2
    names = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
    for name in names.split():
        assert name in record and f"eval_{name}" in evaluation
    assert evaluation["eval_loss"] < 1.3863


ROWS = {
    "has no image": {"images": []},
    "'prompt' shows 2 images, the record has 1": {"prompt": "<image> a <image> b?"},
    "'chosen': is 3, not text": {"chosen": 3},
    "has no 'prompt'": {"prompt": None},
    "no room for a response": {"prompt": "word " * 200},
}


@pytest.mark.parametrize("message", ROWS)
def test_a_row_that_cannot_be_trained_on_is_named(message, llava, trl_own):
    """Half a row would train on another task, or stop the run with a traceback of the library."""
    _, processor = train.load_model(str(llava))
    row = {"images": [noise(5)], "prompt": "What?", "chosen": "this", "rejected": "that"} | ROWS[message]
    row = {name: value for name, value in row.items() if value is not None}
    with pytest.raises(BadInput, match=f"a row of the data set: .*{re.escape(message)}"):
        trl_own.collate([row], processor, 100)


UNUSED = ["loss_type='ipo'", "label_smoothing=0.1", "ld_alpha=0.5", "use_weighting=True"]


@pytest.mark.parametrize("option", UNUSED)
def test_options_of_another_loss_are_refused(option, llava, trl_own, tmp_path):
    """Taken in silence, the run would not be what its arguments say."""
    args = config(tmp_path, **eval(f"dict({option})"))
    with pytest.raises(BadInput, match=f"not used by mDPO: {option.partition('=')[0]}$"):
        trl_own.MDPOTrainer(None, args=args, processing_class=None, train_dataset=None)


def test_examples_readme_says_how_to_use_the_trainer(trl_own, tmp_path, monkeypatch):
    """The first thing that TRL's users copy: here with a tiny model, two pairs, and on the CPU."""
    import datasets
    import trl

    text = (ROOT / "examples/README.md").read_text()
    (code,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    folder = families.write_family("qwen2_5_vl", tmp_path / "model")
    data = data_set(COLUMNS["messages"], own=False)
    on_cpu = functools.partial(trl.DPOConfig, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    monkeypatch.setattr(trl, "DPOConfig", on_cpu)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(folder)), scope)
    assert (tmp_path / "OUT").is_dir() and scope["args"].beta == 0.1
    weights = peft.utils.load_peft_weights(next((tmp_path / "OUT").glob("checkpoint-*")))
    assert any("mlp.down_proj" in n for n in weights) and not any("visual" in n for n in weights)


def test_readme_step_is_mdpo_steps(tmp_path, monkeypatch, capsys):
    """The lines that people copy into their own loop, gradients included."""
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    assert len(code.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shapes.write_pairs(tmp_path / "runs/demo-1/data", 4)
    lora = "model = add_lora(model, rank=16, alpha=32)\n"
    keep = "gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]\noptimizer.step()"
    scope = {"move": move_adapter}  # else it would do nothing yet, and the reference might have it
    exec(code.replace(lora, f"{lora}move(model)\n").replace("optimizer.step()", keep), scope)
    printed = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    model, processor = train.load_model("examples/base")
    model = train.add_lora(model, rank=16, alpha=32)
    move_adapter(model)
    batch = pack(make_batch([scope["pairs"][0, i] for i in range(4)], processor, share=True))
    losses, metrics = mdpo_step(model, batch)
    losses.mean().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = scope["optimizer"].param_groups[0]["params"]
    for mine, theirs, weight in zip(parameters, scope["gradients"], trained, strict=True):
        torch.testing.assert_close(mine.grad, theirs, atol=1e-5, rtol=1e-3)
        assert not torch.equal(weight, mine)  # it made the step
    assert printed == pytest.approx({n: metrics[n].mean().item() for n in metrics if n != "loss"}, abs=6e-4)
    assert abs(losses.mean().item() - 2.0794) > 0.01


def test_the_files_that_are_copied_stand_alone():
    """`data` and `train` are names of everyone's own modules: imported in mdpo.py, they would be those."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"examples", "tests"}
    for name in "mdpo.py", "data.py":
        tree = ast.walk(ast.parse((ROOT / name).read_text()))
        imports = [node for node in tree if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
        assert not {module.split(".")[0] for module in modules} & ours
    part, speed = (ROOT / "mdpo.py").read_text().split("\ndef mdpo_step")
    later = set(re.findall(r"^def (\w+)", speed, re.MULTILINE)) | {
        "mdpo_step",
        "Speed",
        "below",
        "pack",
        "Batch",
    }
    assert {word for word in re.findall(r"\w+", part) if word in later} == set()


def add_row(a, row):
    return a + row.expand_as(a)


QKV = [(1, 2, 8, 16)] * 3
ATTENTION = 2 * 2 * 2 * 8 * 8 * 16  # two products, of two heads: 8 x 16 x 8 and 8 x 8 x 16
OPERATIONS = {  # shapes in bf16 -> FLOPs, bytes, launches
    "product": (torch.matmul, [(4, 8), (8, 16)], {}, (2 * 4 * 8 * 16, 0, 1)),
    "LoRA's, in place": (torch.Tensor.addmm_, [(4, 16), (4, 8), (8, 16)], {}, (1024, 0, 1)),
    "sum": (torch.add, [(4, 8), (4, 8)], {}, (0, 2 * 3 * 32, 1)),
    "sum with a row that is expanded": (add_row, [(4, 8), (1, 8)], {}, (0, 2 * (32 + 8 + 32), 1)),
    "view": (torch.t, [(4, 8)], {}, (0, 0, 0)),
    "attention": (throughput.attention_on_gpu, QKV, {}, (ATTENTION, 0, 1)),
    "causal": (throughput.attention_on_gpu, QKV, {"is_causal": True}, (ATTENTION / 2, 0, 1)),
    "attention under a mask": (throughput.attention_on_gpu, [*QKV, (1, 1, 8, 8)], {}, (ATTENTION, 0, 1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_an_operation_counts(name):
    """All hours rest on it."""
    operation, shapes_of_inputs, options, expected = OPERATIONS[name]
    inputs = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes_of_inputs]
    with throughput.Work() as work:
        operation(*inputs, **options)
    assert (work.flops, work.traffic, work.launches) == expected


PAIR = Example("there is a red", "circle and blue square", "here the", (noise(1),), (noise(2),))


@pytest.fixture
def tiny(monkeypatch):
    """One layer of width 32, MLP 64, images of 16 tokens -> (model on meta, batch of one pair, processor)."""
    text, vision = throughput.phi(32, 64, 1, 2, 600), throughput.siglip(32, 64, 1, 2, 32, 8)
    monkeypatch.setitem(throughput.SHAPES, "tiny", (text, vision))
    model, processor = throughput.make_model("tiny", "meta", torch.bfloat16, 8)
    return model.train(), throughput.packed_batch([PAIR], processor), processor


def test_checkpointing_computes_the_layer_once_more(tiny):
    """The difference by hand: the products of the layer, LoRA's A of six and B of all but the last (nothing
    after it is needed), and attention: causal in a row, whole where y_l's n tokens see a prefix."""
    model, batch, _ = tiny
    without = throughput.count_work(model, batch)
    assert throughput.count_work(model, batch).launches == without.launches  # nothing is left of the first
    train.enable_checkpointing(model)
    again = throughput.count_work(model.train(), batch)
    tokens = len(batch.take)
    layer, lora = 4 * 32 * 32 + 2 * 32 * 64, 8 * (5 * 32 + 64) + 8 * (4 * 32 + 64)
    attention = 0
    for row, (n, owner, prefix) in enumerate(batch.blocks):
        attention += 2 * n * n * 32 if owner == row else 4 * n * (prefix + n) * 32
    assert again.flops - without.flops == 2 * tokens * (layer + lora) + attention
    assert again.traffic > without.traffic and again.launches > without.launches


def test_hours_are_printed_with_checkpointing_and_without(tiny, monkeypatch, capsys):
    """Both columns of the table would be one."""
    monkeypatch.setattr(throughput, "make_pairs", lambda n: [PAIR] * n)
    throughput.print_hours(tiny[0], tiny[2])
    line = r"(\d) (with|without) checkpointing: .* ([\d,]+) launches"
    found = re.findall(line, capsys.readouterr().out)
    launches = {(int(n), way): int(count.replace(",", "")) for n, way, count in found}
    assert len(launches) == 8
    for n in (1, 2, 4, 8):
        assert launches[n, "with"] > launches[n, "without"]


def test_hours_are_those_of_the_slower_of_card_and_host(monkeypatch, capsys):
    """A GPU that waits for Python is not faster than Python. By hand: 1 s of products at 0.48 of 990 TFLOP/s,
    0.5 s of traffic at 0.8 of 4.8 TB/s; 100,000 launches of 38 us are 3.8 s; 30,000 examples."""
    batch = SimpleNamespace(take=[])
    works = iter([SimpleNamespace(flops=475.2e12, traffic=1.92e12, launches=n) for n in [100_000] + [1] * 7])
    monkeypatch.setattr(throughput, "packed_batch", lambda pairs, processor: batch)
    monkeypatch.setattr(throughput, "make_pairs", lambda n: None)
    monkeypatch.setattr(throughput, "count_work", lambda model, batch: next(works))
    monkeypatch.setattr(train, "enable_checkpointing", lambda model: None)
    throughput.print_hours(torch.nn.Linear(1, 1), None)
    lines = [line for line in capsys.readouterr().out.splitlines() if "H200: " in line]
    assert lines[0].endswith("H200:  1000 +  500 ms, host 3800 ms: 31.67 h, waits for the host")
    assert lines[1].endswith("H200:  1000 +  500 ms, host   0 ms:  6.25 h")  # two examples at once


def test_readme_hours_are_what_is_counted():
    """A table that rots: Bunny's hours on every card, with checkpointing."""
    model, processor = throughput.make_model("bunny-3b", "meta", torch.bfloat16, 64)
    train.enable_checkpointing(model)
    work = throughput.count_work(model.train(), throughput.packed_batch(throughput.make_pairs(4), processor))
    rows = re.findall(r"^\| (.*), \d+ GB \| ([\d.]+), ([\d.]+) \| ([\d.]+) h ", HOURS, re.MULTILINE)
    assert {name: (float(flops), float(width)) for name, flops, width, _ in rows} == throughput.CARDS
    for name, *_, hours in rows:
        products, traffic, host = throughput.predicted_seconds(work, name)
        assert float(hours) == pytest.approx(7500 * max(products + traffic, host) / 3600, abs=0.06)
