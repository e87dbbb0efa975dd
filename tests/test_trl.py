"""Protects that examples/trl_mdpo.py trains in TRL what train.py trains. Needs trl."""

import json
import math
import re
import socket
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")

import train
from data import BadInput, make_batch, run_command
from examples import families, shapes, trl_mdpo
from mdpo import mdpo_step, pack
from test_mdpo import ROOT, adapter, log_of, message, move

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


def numbers(log):
    """{(step, name): value} of each loss, reward, learning rate and gradient norm, evaluations included."""
    named = [(record["step"], name, value) for record in log for name, value in record.items()]
    kept = "(eval/)?(loss|rewards/|lr|grad_norm)"
    return {(step, name): value for step, name, value in named if re.match(kept, name)}


def numbers_of(out):
    """Those of a run in TRL, by train.py's names."""
    text = (out / "trainer_state.json").read_text().replace("learning_rate", "lr").replace('"eval_', '"eval/')
    return numbers(json.loads(text)["log_history"])


def assert_train_pys_numbers(out, ours):
    expected = numbers(log_of(ours))
    assert len(expected) == 6 * 13 + 3 * 11  # steps and evaluations
    assert numbers_of(out) == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_one_process_gives_train_pys_numbers(runs):
    """The way to many GPUs must train what the README reports, from tokens to the mean over a short last
    batch."""
    _, ours, out = runs
    assert_train_pys_numbers(out, ours)
    assert not (out / "ref").exists()  # a second adapter of TRL's
    assert json.loads((out / "trainer_state.json").read_text())["total_flos"] > 0  # it counts tokens
    weights = adapter(out)
    torch.testing.assert_close(weights, adapter(ours), atol=1e-4, rtol=0)
    assert max(weight.abs().max() for name, weight in weights.items() if "lora_B" in name) > 1e-3  # trained


def test_dpo_in_trl_has_no_anchor(bunny, drawn, tmp_path):
    """The word none names no log-probability: Table 2's rows without the anchor would not begin."""
    argv = flags(bunny, drawn, tmp_path, *"--no-conditional --anchors none --num_train_epochs 1".split())
    assert run_command(trl_mdpo.run, argv) == 0
    assert numbers_of(tmp_path)[1, "loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_two_processes_equal_one(runs, drawn, tmp_path):
    """A last update of one example leaves a process without any: it must not count, be repeated or waited
    for."""
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
    assert_train_pys_numbers(tmp_path / "out", ours)


class Freed:
    """Notes its name where it is freed; does nothing that it is told."""

    args, names = SimpleNamespace(resume_from_checkpoint=None), []
    train = save_model = save_state = end = staticmethod(lambda **options: None)

    def __init__(self, name):
        weakref.finalize(self, self.names.append, name)


class Groups:
    WORLD = property(lambda self: Freed("group"))


def test_the_process_group_outlives_the_trainer(monkeypatch):
    """Else one run in four ends by hanging: DDP waits for threads that wait for its lock (pytorch issue
    56297)."""
    monkeypatch.setattr(torch.distributed, "group", Groups())
    monkeypatch.setattr(trl_mdpo, "MDPOTrainer", Freed)
    monkeypatch.setattr(trl_mdpo, "parse", lambda argv: ["trainer"])
    assert trl_mdpo.run([]) == 0 and Freed.names == ["trainer", "group"]


def test_a_resumed_run_is_the_same_to_the_last_bit(runs, drawn, tmp_path):
    """Resumed in the middle of an epoch, other batches or crops, or a new optimizer, would go unnoticed."""
    model, _, out = runs
    resumed = flags(model, drawn, tmp_path, "--resume_from_checkpoint", out / "checkpoint-4")
    assert run_command(trl_mdpo.run, resumed) == 0
    assert numbers_of(tmp_path) == numbers_of(out)
    assert not (tmp_path / "checkpoint-2").exists()  # it did not begin anew
    torch.testing.assert_close(adapter(tmp_path), adapter(out), atol=0, rtol=0)


def test_tokens_loss_and_gradients_are_train_pys(family, drawn, tmp_path):
    """TRL's own rows lose </s> or learn a newline on most families; `train.py`'s do not."""
    trainer = trl_mdpo.MDPOTrainer(*trl_mdpo.parse(flags(family[0], drawn, tmp_path)))
    model, processor, pairs = trainer.model, trainer.processing_class, trainer.pairs
    inputs = next(iter(trainer.get_train_dataloader()))
    layout = train.choose_layout(model, processor, [pairs[0, 0], pairs[0, 1]])
    first = [pairs[key] for key in train.plan_steps(9, 4, 2, 1, 1)[0][0]]
    given, batch = inputs["batch"].map(torch.as_tensor), make_batch(first, processor, share=layout == "packed")
    batch = pack(batch) if layout == "packed" else batch
    assert tuple(given.names) == batch.names and (given.take is None) == (layout == "plain")
    assert torch.equal(given.inputs["input_ids"], batch.inputs["input_ids"])
    assert torch.equal(given.labels, batch.labels)
    assert (given.labels == processor.tokenizer.eos_token_id).sum() == 6  # y_w, y_l, y_w again; two examples
    torch.manual_seed(1)
    move(model.train())
    for name, module in model.get_base_model().named_modules():
        assert not (module.training and re.search("tower|vision|visual", name))
    assert model.get_decoder().training and model.get_base_model().is_gradient_checkpointing
    ours, theirs = mdpo_step(model, batch)[0].mean(), trainer.compute_loss(model, inputs)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5) != 3 * math.log(2)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = (torch.autograd.grad(loss, weights) for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
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
    """A flag that is read and not used trains something else. At the start rewards are 0: DPO's term is ln 2,
    the anchor's softplus(delta) on y_w and softplus(-delta) on y_l."""
    more = "--delta 1 --no-conditional --anchors chosen rejected --crop 0.5 0.6 --beta 0.2 --max_length 90"
    more += " --dataloader_num_workers 1 --gradient_checkpointing False"
    argv = flags(bunny, drawn, tmp_path, *more.split(), "--limit", 8)
    trainer = trl_mdpo.MDPOTrainer(*trl_mdpo.parse(argv))
    inputs = next(iter(trainer.get_train_dataloader()))
    assert not trainer.model.get_base_model().is_gradient_checkpointing
    assert trainer.get_train_dataloader().num_workers == 1
    held_out, _ = trainer.get_eval_dataloader()  # 2 + 1; with more than such a loss needs: for its metrics
    assert [*held_out["batch"].names] == ["chosen", "rejected", "image_rejected"]
    assert [*inputs["batch"].names] == ["chosen", "rejected"] and trainer.loss.keywords["beta"] == 0.2
    assert (len(trainer.pairs), len(trainer.held_out)) == (5, 3)
    assert (trainer.pairs.strategy, tuple(trainer.pairs.crop)) == ("crop", (0.5, 0.6))
    assert inputs["batch"].inputs["attention_mask"].sum(1).max() <= 90
    expected = 0.693147 + 1.313262 + 0.313262  # ln 2, softplus(1), softplus(-1)
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, abs=1e-5)


def test_defaults_are_the_papers(bunny, drawn, tmp_path):
    """TRL's own are a tenth of the learning rate, linear, without warm-up, and 8 examples a process."""
    config, args = trl_mdpo.parse(f"--model {bunny} --data {drawn} --output_dir {tmp_path} --use_cpu".split())
    names = "learning_rate lr_scheduler_type num_train_epochs seed adam_beta1 adam_beta2 weight_decay beta"
    names += " max_grad_norm batch_size per_device_train_batch_size gradient_accumulation_steps max_length"
    expected = [1e-5, "cosine", 3, 0, 0.9, 0.98, 0.05, 0.1, 1, 32, 4, 8, 2048]
    assert [getattr(config, name) for name in names.split()] == expected
    of_train = [args.delta, args.conditional, args.anchors, args.lora_rank, args.lora_alpha]
    assert of_train == [0, True, ["chosen"], 64, 128]
    assert config.get_warmup_steps(939) == 94
    assert config.get_warmup_steps(1) == 0  # else the only step has rate 0


@pytest.mark.parametrize("n, micro, accumulation, expected", [
    (1, None, None, (32, 4, 8)),
    (8, None, None, (32, 4, 1)),
    (3, None, None, (32, 4, 3)),  # 8 micro-batches for 9 places
    (16, None, None, (32, 2, 1)),
    (64, None, None, (64, 1, 1)),
    (2, 8, None, (32, 8, 2)),
    (8, 8, None, (64, 8, 1)),
    (2, None, 3, (24, 4, 3)),
    (2, 5, 1, (10, 5, 1)),
])  # fmt: skip
def test_an_update_is_32_examples_on_any_number_of_processes(n, micro, accumulation, expected, monkeypatch):
    """With TRL's rule the batch grows with the GPUs, and the paper's learning rate no longer fits."""
    monkeypatch.setenv("WORLD_SIZE", str(n))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(trl_mdpo.MDPOConfig, "world_size", n)
    given = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    argv = [f"--{name}={value}" for name, value in given.items() if value]
    config, _ = trl_mdpo.parse([*argv, "--model", "m", "--data", "d"])
    assert (config.batch_size, *(getattr(config, name) for name in given)) == expected


@pytest.mark.parametrize("n, seed", [(1, 0), (2, 1), (3, 0), (8, 1)])
def test_processes_share_train_pys_plan(n, seed):
    """Each example once an epoch, in train.py's update; as many micro-batches a process, or one waits for
    ever."""
    plan = train.plan_steps(9, 4, 2, 2, seed)
    sizes = {"world_size": n, "batch_size": 4, "per_device_train_batch_size": 2, "seed": seed}
    processes = [trl_mdpo.Epochs(SimpleNamespace(process_index=i, **sizes), 9) for i in range(n)]
    for epoch in (1, 0):
        for process in processes:
            process.set_epoch(epoch)
        together = [micro for micros in zip(*processes, strict=True) for micro in micros if micro]
        assert together == sum(plan[3 * epoch : 3 * epoch + 3], [])


@pytest.mark.parametrize("argv, message", [
    ("--loss_type ipo --label_smoothing 0.1", "not used by mDPO in TRL: --loss_type --label_smoothing"),
    ("--padding_free True", "--padding_free"),
    ("--lr 1e-3 --no-image", "--lr --no-image"),
    *[(f"--{name} 1", name) for name in "precompute_ref_log_probs sync_ref_model use_weighting fp16".split()],
    *[(f"--{name} 1", name) for name in "auto_find_batch_size data_seed".split()],
    ("--learning_rate fast", "invalid float value"),
    ("--data /none.json", "/none.json: no such file"),
    ("--resume_from_checkpoint /none", "/none: holds no checkpoint"),
    ("--eval_strategy epoch --eval-size 0", "--eval_strategy needs --eval-size"),
    ("--eval-size 12", "--eval-size 12 leaves none of 12"),
])  # fmt: skip
def test_what_is_not_used_or_wrong_is_one_line(bunny, drawn, tmp_path, capsys, argv, message):
    """`--loss_type` used to be ignored in silence, and a missing file was a traceback."""
    assert run_command(trl_mdpo.run, [*flags(bunny, drawn, tmp_path / "out"), *argv.split()]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert message in printed[-1] and sum("error: " in line for line in printed) == 1


def test_processes_that_would_train_alone_are_refused(bunny, drawn, tmp_path, monkeypatch):
    """Under torchrun without a GPU each process was a world of its own, and trained the same run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(BadInput, match="each of 2 processes would train alone: .*, add --use_cpu"):
        trl_mdpo.parse([word for word in flags(bunny, drawn, tmp_path / "out") if word != "--use_cpu"])


def test_one_process_for_several_gpus_is_refused(bunny, drawn, tmp_path, monkeypatch):
    """The Trainer would split each packed row among them, in the middle of an image."""
    monkeypatch.setattr(trl_mdpo.MDPOConfig, "n_gpu", 2)
    with pytest.raises(BadInput, match="one process for 2 GPUs: start it by torchrun"):
        trl_mdpo.parse(flags(bunny, drawn, tmp_path / "out"))


def test_the_model_card_is_true(runs):
    """peft's and TRL's cards are blank or say that a text model was trained with DPO."""
    for folder in runs[2], runs[2] / "checkpoint-6":
        card = " ".join((folder / "README.md").read_text().split())
        assert "tags: [mdpo, dpo, trl, lora]" in card and "9 examples, 2 epochs, 4 examples an update" in card
        assert "learning rate 0.01" in card and "LoRA rank 4, alpha 8" in card and "base_model" not in card
