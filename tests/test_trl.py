"""Protects that TRL trains what train.py trains: by trl_mdpo.py, and in one's own script by trl_own.py."""

import json
import math
import random
import re
import socket
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch

trl = pytest.importorskip("trl")

import datasets

import train
from data import BadInput, make_batch, random_crop, run_command
from examples import curves, families, shapes, trl_mdpo, trl_own
from mdpo import mdpo_loss, mdpo_step, pack, response_logps
from test_mdpo import PAIRS, ROOT, adapter, message, move, noise
from tests.helpers import EXAMPLES_README

ROW = {"images": [noise(5)], "prompt": "What?", "chosen": "this", "rejected": "that"}
LN_8 = 2.0794  # three terms of ln 2 each: the policy is its reference
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """12 examples, of which 3 are held out: with batches of 4 by 2, an epoch of 9 is 2 + 2, 2 + 2, then 1."""
    return shapes.write_pairs(tmp_path_factory.mktemp("data") / "drawn", 12)


def flags(model, data, out, *more, accumulation=2):
    argv = f"""--model {model} --data {data} --output_dir {out} --num_train_epochs 2 --learning_rate 1e-2
        --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --eval-size 3 --save_strategy steps
        --gradient_accumulation_steps {accumulation} --save_steps 2 --disable_tqdm True
        --dataloader_num_workers 0 --lora-rank 4 --lora-alpha 8 --use_cpu --seed 1"""
    return [*argv.split(), *map(str, more)]


@pytest.fixture(scope="session", params=["bunny", "llava"])
def runs(request, drawn, tmp_path_factory):
    """The same run by train.py and in TRL -> (model, its folder, its folder in TRL)."""
    model, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("runs")
    argv = f"""--model {model} --data {drawn} --out {out / "ours"} --epochs 2 --batch-size 4 --lr 1e-2
        --micro-batch-size 2 --workers 0 --eval-size 3 --lora-rank 4 --lora-alpha 8 --device cpu --seed 1"""
    assert train.main(argv.split()) == 0
    assert run_command(trl_mdpo.run, flags(model, drawn, out / "trl")) == 0
    return model, out / "ours", out / "trl"


def numbers(out):
    """{(step, name): value} of each loss, reward, learning rate and gradient norm, evaluations included."""
    named = [(record["step"], *item) for record in curves.read_log(out) for item in record.items()]
    kept = "(eval/)?(loss|rewards/|lr|grad_norm)"
    return {(step, name): value for step, name, value in named if re.match(kept, name)}


def test_one_process_gives_train_pys_numbers(runs):
    """The way to many GPUs must train what the README reports, down to the mean over a short last batch."""
    _, ours, out = runs
    expected = numbers(ours)
    assert len(expected) == 6 * 13 + 3 * 11  # steps and evaluations
    assert numbers(out) == pytest.approx(expected, abs=1e-4, rel=1e-4)
    assert not (out / "ref").exists()  # a second adapter of TRL's
    assert json.loads((out / "trainer_state.json").read_text())["total_flos"] > 0  # it counts tokens
    torch.testing.assert_close(adapter(out), adapter(ours), atol=1e-4, rtol=0)


def test_dpo_in_trl_has_no_anchor(bunny, drawn, tmp_path):
    """The word none names no log-probability: Table 2's rows without the anchor would not begin."""
    argv = flags(bunny, drawn, tmp_path, "--no-conditional", "--anchors", "none")
    assert run_command(trl_mdpo.run, argv) == 0
    assert numbers(tmp_path)[1, "loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_two_processes_equal_one(runs, drawn, tmp_path):
    """A last update of one example leaves a process without any: it must not count, nor be waited for."""
    model, ours, _ = runs
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        pytest.skip(f"processes cannot reach each other at 127.0.0.1: {error}")
    # With --local_addr, else torch asks for the machine's name, which may lead nowhere.
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 --local_addr 127.0.0.1"
    argv = flags(model, drawn, tmp_path / "out", "--ddp_backend", "gloo", accumulation=1)
    command = [sys.executable, *torchrun.split(), str(ROOT / "examples/trl_mdpo.py"), *argv]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        process.terminate()  # which ends the two processes as well
    assert process.returncode == 0, printed[-2000:]
    assert numbers(tmp_path / "out") == pytest.approx(numbers(ours), abs=1e-4, rel=1e-4)


class Freed:
    """Notes its name where it is freed; does nothing that it is told."""

    args, names = SimpleNamespace(resume_from_checkpoint=None), []
    train = save_model = save_state = end = staticmethod(lambda **options: None)

    def __init__(self, name):
        weakref.finalize(self, self.names.append, name)


def test_the_process_group_outlives_the_trainer(monkeypatch):
    """Else one run in four hangs: DDP waits for threads that wait for its lock (pytorch issue 56297)."""

    class Groups:
        WORLD = property(lambda self: Freed("group"))

    monkeypatch.setattr(torch.distributed, "group", Groups())
    monkeypatch.setattr(trl_mdpo, "MDPOTrainer", Freed)
    monkeypatch.setattr(trl_mdpo, "parse", lambda argv: ["trainer"])
    assert trl_mdpo.run([]) == 0 and Freed.names == ["trainer", "group"]


def test_a_resumed_run_is_the_same_to_the_last_bit(runs, drawn, tmp_path):
    """Resumed in the middle of an epoch, other batches or crops, or a new optimizer, would go unnoticed."""
    model, _, out = runs
    resumed = flags(model, drawn, tmp_path, "--resume_from_checkpoint", out / "checkpoint-4")
    assert run_command(trl_mdpo.run, resumed) == 0
    assert numbers(tmp_path) == numbers(out)
    assert not (tmp_path / "checkpoint-2").exists()  # it did not begin anew
    torch.testing.assert_close(adapter(tmp_path), adapter(out), atol=0, rtol=0)


def assert_same_gradients(model, *losses):
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = (torch.autograd.grad(loss, weights) for loss in losses)
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-3)


def test_tokens_loss_and_gradients_are_train_pys(family, drawn, tmp_path):
    """TRL's own rows lose </s> or learn a newline on most families; `train.py`'s do not."""
    trainer = trl_mdpo.MDPOTrainer(*trl_mdpo.parse(flags(family[0], drawn, tmp_path)))
    model, processor, pairs = trainer.model, trainer.processing_class, trainer.pairs
    inputs = next(iter(trainer.get_train_dataloader()))
    given, layout = inputs["batch"], train.choose_layout(model, processor, [pairs[0, 0], pairs[0, 1]])
    assert (given.take is None) == (layout == "plain")
    assert (given.labels == processor.tokenizer.eos_token_id).sum() == 6  # y_w, y_l, y_w again; two examples
    torch.manual_seed(1)
    move(model.train())
    decoder = {*model.get_decoder().modules()}
    for module in model.get_base_model().modules():
        assert module.training == (hasattr(module, "gradient_checkpointing") and module in decoder)
    first = [pairs[key] for key in train.plan_steps(9, 4, 2, 1, 1)[0][0]]
    losses, _ = mdpo_step(model, make_batch(first, processor))
    assert_same_gradients(model, trainer.compute_loss(model, inputs), losses.mean())
    trainer.save_model()
    for file in family[0].glob("*processor_config.json"):  # the base's own, with a part for videos
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "gemma3"])
def test_templates_of_the_families_write_what_the_hubs_write(name, system):
    """What trains with our templates must train with the families' own, of which TRL has copies."""
    template = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not template.exists():
        pytest.skip(f"this release of TRL has no {template.name}")
    _, processor = families.FAMILIES[name]()
    turns = [message("user", "IMAGE", " What? "), message("assistant", "A."), message("user", "Why?")]
    turns = [message("system", "Be brief.")] * system + turns
    for messages, asking in ((turns, True), ([*turns, message("assistant", "B.")], False)):
        write = partial(processor.apply_chat_template, messages, add_generation_prompt=asking)
        assert write() == write(chat_template=template.read_text())


def test_options_of_the_loss_and_the_data_reach_them(bunny, drawn, tmp_path):
    """A flag that is read and not used trains something else. At the start all rewards are 0."""
    more = "--delta 1 --no-conditional --anchors chosen rejected --crop 0.5 0.6 --beta 0.2 --max_length 90"
    more += " --dataloader_num_workers 1 --gradient_checkpointing False --limit 8 --layout plain"
    trainer = trl_mdpo.MDPOTrainer(*trl_mdpo.parse(flags(bunny, drawn, tmp_path, *more.split())))
    inputs = next(iter(trainer.get_train_dataloader()))
    assert not trainer.model.get_base_model().is_gradient_checkpointing
    assert trainer.get_train_dataloader().num_workers == 1
    held_out, _ = trainer.get_eval_dataloader()  # 2 + 1; with more than such a loss needs: for its metrics
    assert [*held_out["batch"].names] == ["chosen", "rejected", "image_rejected"]
    assert [*inputs["batch"].names] == ["chosen", "rejected"] and inputs["batch"].take is None
    assert trainer.loss.keywords["beta"] == 0.2
    assert (len(trainer.pairs), len(trainer.held_out)) == (5, 3)
    assert (trainer.pairs.strategy, tuple(trainer.pairs.crop)) == ("crop", (0.5, 0.6))
    assert inputs["batch"].inputs["attention_mask"].sum(1).max() <= 90
    assert not any(map(torch.is_tensor, inputs["batch"].inputs.values()))  # a worker's take shared memory
    expected = 0.693147 + 1.313262 + 0.313262  # DPO's ln 2; softplus(1) of y_w, softplus(-1) of y_l
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, abs=1e-5)


def test_defaults_are_the_papers():
    """TRL's own are a tenth of the learning rate, linear, without warm-up, and 8 examples a process."""
    config, _ = trl_mdpo.parse("--model m --data d --use_cpu".split())
    names = "learning_rate lr_scheduler_type num_train_epochs seed adam_beta1 adam_beta2 weight_decay beta"
    names += " max_grad_norm batch_size per_device_train_batch_size gradient_accumulation_steps max_length"
    expected = [1e-5, "cosine", 3, 0, 0.9, 0.98, 0.05, 0.1, 1, 32, 4, 8, 2048]
    assert [getattr(config, name) for name in names.split()] == expected
    assert config.get_warmup_steps(939) == 94
    assert config.get_warmup_steps(1) == 0  # else the only step has rate 0


@pytest.mark.parametrize("n, given, expected", [
    (3, "", (32, 4, 3)),  # 8 micro-batches for 9 places
    (16, "", (32, 2, 1)),
    (64, "", (64, 1, 1)),
    (8, "--per_device_train_batch_size 8", (64, 8, 1)),
    (2, "--gradient_accumulation_steps 3", (24, 4, 3)),
    (2, "--gradient_accumulation_steps 1", (8, 4, 1)),
])  # fmt: skip
def test_an_update_is_32_examples_on_any_number_of_processes(n, given, expected, monkeypatch):
    """With TRL's rule the batch grows with the GPUs, and the paper's learning rate no longer fits."""
    monkeypatch.setenv("WORLD_SIZE", str(n))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(trl_mdpo.MDPOConfig, "world_size", n)
    config, _ = trl_mdpo.parse(f"--model m --data d {given}".split())
    sizes = config.batch_size, config.per_device_train_batch_size, config.gradient_accumulation_steps
    assert sizes == expected


def test_processes_share_train_pys_plan():
    """Each example once an epoch, in train.py's update; a process with fewer micro-batches waits for ever."""
    plan = train.plan_steps(9, 4, 2, 2, seed=1)
    sizes = {"world_size": 3, "batch_size": 4, "per_device_train_batch_size": 2, "seed": 1}
    processes = [trl_mdpo.Epochs(SimpleNamespace(process_index=i, **sizes), 9) for i in range(3)]
    for epoch in (1, 0):
        for process in processes:
            process.set_epoch(epoch)
        together = [micro for micros in zip(*processes, strict=True) for micro in micros if micro]
        assert together == sum(plan[3 * epoch : 3 * epoch + 3], [])


@pytest.mark.parametrize("argv, message", [
    ("--loss_type ipo --label_smoothing 0.1", "not used by mDPO in TRL: --loss_type --label_smoothing"),
    ("--lr 1e-3 --no-image --auto_find_batch_size 1", "--auto_find_batch_size --lr --no-image"),
    *[(f"--{name} 1", name) for name in "sync_ref_model fp16 padding_free data_seed".split()],
    ("--learning_rate fast", "invalid float value"),
    ("--data /none.json", "/none.json: no such file"),
    ("--resume_from_checkpoint /", "/: holds no checkpoint"),
    ("--eval_strategy epoch --eval-size 0", "--eval_strategy needs --eval-size"),
    ("--eval-size 12", "--eval-size 12 leaves none of 12"),
])  # fmt: skip
def test_what_is_not_used_or_wrong_is_one_line(bunny, drawn, tmp_path, capsys, argv, message):
    """`--loss_type` used to be ignored in silence, and a missing file was a traceback."""
    assert run_command(trl_mdpo.run, [*flags(bunny, drawn, tmp_path / "out"), *argv.split()]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert message in printed[-1] and sum("error: " in line for line in printed) == 1


@pytest.mark.parametrize("n, n_gpus", [(2, 0), (1, 2)])
def test_processes_without_a_gpu_or_with_several_are_refused(n, n_gpus, monkeypatch):
    """Without one each was a world of its own, and trained the same run. Several would split each packed row
    among them, in the middle of an image."""
    monkeypatch.setenv("WORLD_SIZE", str(n))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(trl_mdpo.MDPOConfig, "n_gpu", n_gpus)
    with pytest.raises(BadInput, match=f"{n} processes, {n_gpus} GPUs each: use torchrun, .* --use_cpu"):
        trl_mdpo.parse(["--model", "m", "--data", "d"])


def test_the_model_card_is_true(runs):
    """peft's and TRL's cards are blank or say that a text model was trained with DPO."""
    for folder in runs[2], runs[2] / "checkpoint-6":
        card = " ".join((folder / "README.md").read_text().split())
        assert "tags: [mdpo, dpo, trl, lora]" in card and "9 examples, 2 epochs, 4 examples an update" in card
        assert "learning rate 0.01" in card and "LoRA rank 4, alpha 8" in card and "base_model" not in card


def data_set(form="texts", own=True):
    """PAIRS as a `Dataset` of texts or messages. own: with rejected images; else with `image`."""
    say = lambda role, *parts: [message(role, *parts)] if form == "messages" else parts[-1]
    rows = []
    for one in PAIRS:
        row = {"prompt": say("user", "IMAGE", one.question), "id": "a column that nothing needs"}
        row |= {name: say("assistant", getattr(one, name)) for name in ("chosen", "rejected")}
        shown = {"images": [*one.images], "rejected_images": [*one.images_rejected]}
        rows.append(row | (shown if own else {"image": one.images[0]}))
    return datasets.Dataset.from_list(rows)


def in_trl(out, model, processor, rows=None, wrap=False, more={}, **arguments):
    """A trainer, by default with the three examples in each update."""
    fixed = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
    args = trl.DPOConfig(str(out), report_to="none", save_strategy="no", num_train_epochs=1, logging_steps=1,
                         **fixed | {"per_device_train_batch_size": 3} | arguments)  # fmt: skip
    lora = peft.LoraConfig(target_modules=r".*language_model.*_proj") if wrap else None
    return trl_own.MDPOTrainer(model, args=args, processing_class=processor, peft_config=lora,
                               train_dataset=rows or data_set(), **more)  # fmt: skip


def first_step(trainer):
    """-> loss, {name: its mean} of all metrics"""
    loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    return loss, {name: value for name, (value,) in trainer._metrics["train"].items()} | {"loss": loss.item()}


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("wrap", [False, True])
def test_each_step_is_mdpo_steps(wrap, family, tmp_path):
    """Rows, reference, loss or metrics that differ train something else, with numbers that look well."""
    model, processor = train.load_model(str(family[0]))
    ref_model = None if wrap else train.load_model(str(family[0]))[0]
    model.requires_grad_(False).get_decoder().requires_grad_(not wrap)  # an adapter, or all weights
    trainer = in_trl(tmp_path, model, processor, data_set("messages"), wrap, beta=0.3)
    torch.manual_seed(0)
    for weight in trainer.model.parameters():  # as after some steps: it is not its reference any more
        weight.data += 0.02 * torch.randn_like(weight) * weight.requires_grad
    loss, found = first_step(trainer)
    batch = pack(make_batch(PAIRS, processor, share=True))
    losses, metrics = mdpo_step(trainer.model, batch, beta=0.3, ref_model=ref_model)
    assert_same_gradients(trainer.model, loss, losses.mean())
    assert len(metrics) == 11  # loss, three terms and rewards, two accuracies and margins
    logps = response_logps(trainer.model, batch)._asdict()
    metrics |= {f"logps/{name}": values for name, values in logps.items()}
    expected = {name: values.mean().item() for name, values in metrics.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_an_adapter_that_comes_with_the_model_is_the_reference(llava, tmp_path):
    """TRL's rule: training starts from the model that is given, and is not held to its base."""
    model, processor = train.load_model(str(llava))
    model = train.add_lora(model)
    move(model, std=3.0)
    loss, _ = first_step(in_trl(tmp_path, model, processor))
    assert loss.item() == pytest.approx(LN_8, abs=1e-4)


def test_the_crop_is_drawn_once_a_visit_for_policy_and_reference(llava, tmp_path):
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
    assert len(trl_own.to_pair(ROW | {"images": [noise(5)] * 2}).images) == 2
    loss, found = first_step(in_trl(tmp_path, *train.load_model(str(llava)), data_set(own=False), wrap=True))
    assert loss.item() == pytest.approx(LN_8, abs=1e-4)
    assert abs(found["logps/chosen"] - found["logps/image_rejected"]) > 1e-3


def test_accumulated_and_evaluated(llava, tmp_path):
    """Two micro-batches an update, evaluation, a loss of one's own: metrics keep TRL's names there."""
    more = {"eval_dataset": data_set(), "loss": partial(mdpo_loss, anchors=(), delta=0.5)}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "eval_strategy": "epoch"}
    trainer = in_trl(tmp_path, *train.load_model(str(llava)), None, True, more, learning_rate=1e-2, **options)
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
def test_a_row_that_cannot_be_trained_on_is_named(changes, message, llava):
    """Half a row would train on another task, or stop the run with a traceback of the library."""
    with pytest.raises(BadInput, match=f"a row of the data set: .*{message}"):
        trl_own.collate([ROW | changes], train.load_processor(str(llava)), 100)


def test_options_of_another_loss_are_refused(tmp_path):
    """Taken in silence, the run would not be what its arguments say."""
    others = {"loss_type": "ipo", "loss_weights": [2.0], "ld_alpha": 0.5, "label_smoothing": 0.1,
              "f_divergence_type": "js_divergence", "use_weighting": True}  # fmt: skip
    with pytest.raises(BadInput, match=f"not used by mDPO: {', '.join(others)}$"):
        in_trl(tmp_path, None, None, [], **others)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_examples_readme_says_how_to_use_the_trainer(family, tmp_path, monkeypatch):
    """The first thing that TRL's users copy: here with a tiny model, its own data, and on the CPU."""
    (code,) = re.findall(r"```py\n(.*?)```", EXAMPLES_README, re.DOTALL)
    on_cpu = partial(trl.DPOConfig, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    monkeypatch.setattr(trl, "DPOConfig", on_cpu)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data_set("messages", own=False))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(family[0])), {})
    weights = peft.utils.load_peft_weights(next((tmp_path / "OUT").glob("checkpoint-*")))
    assert any("mlp.down_proj" in n for n in weights) and not any("visual" in n for n in weights)
