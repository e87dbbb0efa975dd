"""Tests of the examples: `pytest examples/test_examples.py`. Each says what breaks if it fails."""

import base64
import io
import json
import random
import re
from argparse import Namespace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from PIL import Image

import data
import train
from data import BadInput, Pairs, make_batch
from examples import demo, shapes
from mdpo import LogPs, response_logps
from test_mdpo import ARGS, ITEMS, ROOT, adapter, as_examples, command, noise, with_lora, write
from test_mdpo import bunny, finished, llava, loaded, small  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
README = (ROOT / "README.md").read_text()


@pytest.fixture
def short_demo(monkeypatch):
    """The demo with fewer pairs and questions."""
    write_pairs, report = shapes.write_pairs, demo.report
    monkeypatch.setattr(shapes, "write_pairs", lambda folder, n, seed: write_pairs(folder, 12, seed))
    monkeypatch.setattr(demo, "report", lambda *args: report(*args, n_scenes=4))
    return "--demo --device cpu --epochs 1 --eval-size 4 --workers 1".split()


def test_demo_runs_again_and_again(tmp_path, monkeypatch, capsys, short_demo):
    """The README's first command, shortened; each time in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert train.main(short_demo) == 0
        out = capsys.readouterr().out
        assert f"runs/demo-{number}/out" in out and "hallucination_rate" in out and "before:" in out
        assert Path(f"runs/demo-{number}/out/picture.png").exists()
    assert all(torch.equal(v, adapter("runs/demo-1/out")[k]) for k, v in adapter("runs/demo-2/out").items())


def test_readme_snippets_run(tmp_path, monkeypatch, capsys, short_demo):
    """What people copy first. The demo's folders are as its first run leaves them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert train.main(short_demo) == 0
    capsys.readouterr()
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    assert "loss/conditional" in capsys.readouterr().out


def test_preview_draws_every_strategy(tmp_path, capsys):
    """`examples/preview.py` is how a user sees what the rejected images look like; it must not overwrite a file."""
    from examples import preview

    path, out = shapes.write_pairs(tmp_path / "data", 3), tmp_path / "sheet.png"
    assert preview.main([str(path), str(out), "--count", "2"]) == 0
    assert Image.open(out).size == (5 * 250 + 10, 2 * 320 + 10)
    assert preview.main([str(path), str(out)]) == 2 and "already exists" in capsys.readouterr().err


SCENE = {"circle": ("red", 0), "ring": ("blue", 3)}


def test_metrics_of_the_miniature_by_hand():
    """Four answers about a red circle and a blue ring, counted by hand:
    - the description names a red circle (there) and a green ring (not): chair_s 1, chair_i 1/2, coverage 1/2;
    - "What colour is the square?" is refused, rightly; "What colour is the ring?" is answered, wrongly: false_premise is 1,
      false_premise_balanced (1 + 1) / 2, colour_accuracy 0, and the wrong colour is a hallucination;
    - "Is there a red circle?" yes, right; "Is there a red ring?" gets babble: yes_no (1 + 0) / 2, malformed 1/5.
    Hallucinated: description, ring's colour, babble: 3/5. grounding = (1 + 1/2 + 0) / 3."""
    answers = [
        (SCENE, ("describe",), "a red circle and a green ring."),
        (SCENE, ("colour", "square"), "there is no square."),
        (SCENE, ("colour", "ring"), "green, as you can see in the picture."),
        (SCENE, ("is there", "red", "circle"), "yes, as you can see in the picture."),
        (SCENE, ("is there", "red", "ring"), "ring ring"),
    ]
    metrics = shapes.score(answers)
    expected = {"chair_s": 1, "chair_i": 0.5, "coverage": 0.5, "false_premise": 1, "colour_accuracy": 0, "yes_no": 0.5}
    expected |= {
        "false_premise_balanced": 1,
        "hallucination_rate": 0.6,
        "malformed": 0.2,
        "grounding": 0.5,
        "length": (7 + 4 + 8 + 8 + 2) / 5,
    }
    assert metrics == pytest.approx(expected)


def test_answers_of_the_miniature_can_be_read_back():
    """If the parser misread a right answer, every metric would be off."""
    rng = random.Random(0)
    for _ in range(300):
        scene = shapes.random_scene(rng)
        question = shapes.random_question(scene, rng)
        claims = shapes.claims_of(scene, question, rng, carelessness=1)
        for polite in (True, False):
            assert shapes.parse_answer(question, f" {shapes.answer_text(question, claims, polite)}") == claims
    assert shapes.parse_answer(("describe",), "a red") is shapes.parse_answer(("colour", "ring"), "ring") is ...


def test_words_of_the_pairs_do_not_tell_their_content():
    """The study rests on it: chosen and rejected come from one annotator, so their claims, apart from politeness, have
    the same statistics; the share of habitual colours among colour answers differs by less than noise allows."""
    rng = random.Random(0)
    habitual = {"chosen": [], "rejected": []}
    for _ in range(6000):
        _, question, *texts = shapes.make_pair(rng)
        if question[0] == "colour":
            for name, text in zip(habitual, texts):
                habitual[name].append(shapes.parse_answer(question, text) == shapes.HABIT[question[1]])
    shares = [sum(values) / len(values) for values in habitual.values()]
    assert len(habitual["chosen"]) > 2000 and abs(shares[0] - shares[1]) < 0.05


def test_area_under_curve_by_hand():
    """Positives 2, 3 against negatives 1, 2: 3 wins and a tie of 4 pairs."""
    assert shapes.area_under_curve([2, 3], [1, 2]) == 3.5 / 4


def test_packed_questions_of_the_base_model_are_what_it_is_asked_later(bunny):
    """The base learns several questions a row, tokenised piece by piece; asked alone, the tokens must be the same."""
    _, processor = train.load_model(str(bunny))
    tokenizer, nine_tabs = processor.tokenizer, "\t" * 9
    pieces = [f"{data.BUNNY_SYSTEM} USER: {nine_tabs * 16}\n", "Describe the picture. ASSISTANT:", " a red circle."]
    ids = [id for piece in pieces for id in tokenizer(piece).input_ids] + [tokenizer.eos_token_id]
    batch = make_batch([("Describe the picture.", "a red circle.", "none.", noise(1), noise(2))], processor)
    assert batch["input_ids"][0, : len(ids)].tolist() == ids


def test_miniature_study_runs_restarts_and_shows_the_robust_sign(tmp_path, monkeypatch, capsys):
    """Plumbing of the study, shortened, on the base kept in examples/. The one sign that no seed flips: mDPO tells
    images apart better than DPO, whose loss never sees a second image."""
    from examples import miniature

    monkeypatch.setattr(miniature, "PAIRS", 192)
    monkeypatch.setattr(miniature, "HELD_OUT", 64)
    flags = miniature.COMMON.partition("--no-checkpointing")[0]
    monkeypatch.setattr(miniature, "COMMON", f"{flags} --no-checkpointing --eval-size 64 --limit 256 --lr 2e-3")
    methods = ["base", "DPO", "mDPO"]
    threads = torch.get_num_threads()
    miniature.prepare_seed(tmp_path, 0)
    results = {method: miniature.run_method(tmp_path, 0, method, 10) for method in methods}
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trained again"))
    assert results == {method: miniature.run_method(tmp_path, 0, method, 10) for method in methods}
    torch.set_num_threads(threads)
    assert results["mDPO"]["image_accuracy"] > results["DPO"]["image_accuracy"]
    assert results["base"]["malformed"] < 0.05 and "margin_no_image_share" in results["DPO"]
    summary = miniature.summarize({"0": results})
    assert summary["mDPO"]["grounding"] == [results["mDPO"]["grounding"], 0]
    assert "image_accuracy" in miniature.table(summary)


def test_answers_do_not_depend_on_the_batch(loaded):
    """Left padding gone wrong changes what a model says about an image when another is asked beside it."""
    from examples.answer import generate_answers

    model, processor = loaded
    questions = [(item[3], item[0]) for item in ITEMS]
    together = generate_answers(model, processor, questions, 8)
    assert together == [generate_answers(model, processor, [question], 8)[0] for question in questions]
    model.train()


def test_answer_command_shows_both_answers(finished, bunny, tmp_path, capsys):
    """The paper's Figure 3."""
    from examples import answer

    noise(1).save(tmp_path / "x.png")
    arguments = [
        "--model",
        str(bunny),
        "--image",
        str(tmp_path / "x.png"),
        "--question",
        "What?",
        "--max-new-tokens",
        "4",
    ]
    assert answer.main([*arguments, "--adapter", str(finished)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("base:") and "\ntuned:" in out
    assert answer.main([*arguments, "--adapter", str(tmp_path)]) == 2 and "no adapter" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bunny", "llava"])
def test_merged_model_loads_by_the_library_alone(family, small, tmp_path, request, capsys):
    """Deployment: no load_model, no adapter, no remote code; and the same log-probs, up to the base's own precision."""
    from examples import merge

    base = request.getfixturevalue(family)
    assert train.main(command(base, small, tmp_path / "out", "--epochs", 1)) == 0
    assert merge.main(["--adapter", str(tmp_path / "out"), "--to", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    in_float32, as_saved = (float(x) for x in re.findall(r"within (\S+) nats", out))
    assert in_float32 < 1e-3 and as_saved < 0.1 and "4 of 4 answers the same" in out

    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "merged")
    tuned = peft.PeftModel.from_pretrained(train.load_model(str(base))[0], tmp_path / "out")
    expected = response_logps(tuned, make_batch(ITEMS, train.load_processor(str(base)))).chosen
    torch.testing.assert_close(
        response_logps(merged, make_batch(ITEMS, processor)).chosen, expected, atol=0.05, rtol=1e-3
    )
    assert merge.main(["--adapter", str(tmp_path / "out"), "--to", str(tmp_path / "merged")]) == 2


def benchmark_files(folder):
    """A few items of each benchmark in its own schema, with the fields that its scorer reads."""
    image = io.BytesIO()
    noise(1).save(image, "PNG")
    for name in ("AMBER_1.jpg", "AMBER_2.jpg", "a_o.jpg"):
        noise(1).save(folder / name)
    amber = [{"id": i, "image": f"AMBER_{i}.jpg", "query": "Describe this image."} for i in (2, 1)]
    mmhal = [
        {"question_type": kind, "question_topic": "t", "image_id": "a", "image_src": "https://x.org/2/a_o.jpg",
         "image_content": ["cat"], "question": f"What is it, {kind}?", "gt_answer": "A cat.", "model_answer": ""}
        for kind in ("attribute", "adversarial", "attribute")
    ]  # fmt: skip
    encoded = base64.b64encode(image.getvalue()).decode()
    objhal = [{"question": "Describe it.", "image": encoded, "image_id": i} for i in (7, 5)]
    write(folder / "amber.json", amber)
    write(folder / "mmhal.json", mmhal)
    write(folder / "objhal.json", "\n".join(map(json.dumps, objhal)))
    return {"amber": amber, "mmhal": mmhal, "objhal": objhal}


@pytest.mark.parametrize("name", ["amber", "mmhal", "objhal"])
def test_benchmark_answers_are_in_the_scorers_format(name, bunny, tmp_path, capsys):
    """AMBER's inference.py reads id and response; MMHal's eval_gpt4.py the template's list with model_answer, by order;
    RLAIF-V's eval_gpt_obj_halbench.py image_id, prompt and text. A wrong field costs an evaluation's API bill."""
    from examples import benchmarks

    items, to = benchmark_files(tmp_path)[name], tmp_path / "answers"
    arguments = [name, "--questions", str(tmp_path / f"{name}.json"), "--images", str(tmp_path), "--model", str(bunny)]
    arguments += ["--to", str(to), "--max-new-tokens", "4", "--batch-size", "2"]
    assert benchmarks.main(arguments) == 0 and "empty" in capsys.readouterr().out
    if name == "objhal":
        answers = [json.loads(line) for line in to.read_text().splitlines()]
        assert [(a["question_id"], a["image_id"], a["prompt"]) for a in answers] == [
            (i, item["image_id"], item["question"]) for i, item in enumerate(items)
        ]
        assert all(set(a) == {"question_id", "image_id", "prompt", "text", "model_id"} for a in answers)
    else:
        answers, field = json.loads(to.read_text()), {"amber": "response", "mmhal": "model_answer"}[name]
        assert all(isinstance(a[field], str) for a in answers)
        if name == "amber":
            assert [a["id"] for a in answers] == [2, 1] and all(set(a) == {"id", "response"} for a in answers)
        else:
            assert [a | {"model_answer": ""} for a in answers] == items
    assert not (tmp_path / "answers.partial").exists()
    assert benchmarks.main(arguments) == 2 and "already exists" in capsys.readouterr().err
    if name == "mmhal":  # without --images, by URL
        urls = [item | {"image_src": (tmp_path / "a_o.jpg").as_uri()} for item in items]
        by_url = [
            "mmhal",
            "--questions",
            write(tmp_path / "urls.json", urls),
            "--model",
            str(bunny),
            "--max-new-tokens",
            "4",
        ]
        assert benchmarks.main([*by_url, "--to", str(tmp_path / "by_url")]) == 0
        given = [a["model_answer"] for a in json.loads((tmp_path / "by_url").read_text())]
        assert given == [a["model_answer"] for a in answers]
    if name != "objhal":
        (tmp_path / "AMBER_1.jpg").unlink()
        (tmp_path / "a_o.jpg").unlink()
        assert benchmarks.main([*arguments[:-6], "--to", str(tmp_path / "other")]) == 2
        assert "images are missing" in capsys.readouterr().err and not (tmp_path / "other.partial").exists()


def test_benchmark_goes_on_where_it_was_killed(tmp_path):
    """Each item once, in order, even if the last line was cut in two; and never on another model's answers."""
    from examples.benchmarks import answer_all

    image = base64.b64encode((lambda b: (noise(1).save(b, "PNG"), b.getvalue())[1])(io.BytesIO())).decode()
    questions = [(image, str(i)) for i in range(7)]
    asked = []

    def ask(batch, die_at=None):
        asked.extend(text for _, text in batch)
        if die_at in asked:
            raise KeyboardInterrupt
        return [f"answer {text}" for _, text in batch]

    partial = tmp_path / "x.partial"
    with pytest.raises(KeyboardInterrupt):
        answer_all(questions, lambda batch: ask(batch, die_at="4"), partial, {"model": "m"}, 2)
    with open(partial, "a") as file:
        file.write('"answ')  # a kill in the middle of a line
    assert asked == ["0", "1", "2", "3", "4", "5"]
    asked.clear()
    assert answer_all(questions, ask, partial, {"model": "m"}, 2) == [f"answer {i}" for i in range(7)]
    assert asked == ["4", "5", "6"]
    with pytest.raises(BadInput, match="another model"):
        answer_all(questions, ask, partial, {"model": "n"}, 2)


def test_mmhal_scores_by_type(tmp_path, capsys):
    """Table 5: attribute 4 and 1, so a mean of 2.5 and a hallucination rate of 1/2 (scores under 3)."""
    from examples import benchmarks

    items = [{"question_type": "attribute", "score": 4}, {"question_type": "other", "score": 6}]
    path = write(tmp_path / "s.json", [*items, {"question_type": "attribute", "score": 1}])
    assert benchmarks.by_type(path) == {"attribute": (2.5, 0.5), "other": (6, 0.0)}
    assert benchmarks.main(["types", path]) == 0 and "attribute" in capsys.readouterr().out


def test_unconditional_share_of_a_margin(bunny, tmp_path):
    """A model whose text alone decides keeps its whole margin without the image: here the image features are zeroed by
    a projector of zeros, so that another image changes nothing, and the share is exactly 1."""
    from examples.unconditional import diagnose

    examples = as_examples(tmp_path)
    model, processor = with_lora(bunny)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    seeing = diagnose(model, processor, examples)
    for parameter in model.get_base_model().model.multi_modal_projector.parameters():
        parameter.data.zero_()
    blind = diagnose(model, processor, examples)
    assert blind["other_image_share"] == pytest.approx(1, abs=1e-3) and blind["image"] != 0
    assert seeing["other_image"] != pytest.approx(seeing["image"], abs=1e-5)


def test_throughput_compares_like_with_like(monkeypatch, tmp_path, capsys):
    """A benchmark against a rival that computes something else is worthless: the script must notice; and its count of
    FLOPs must be the sum it says it is. Counted by hand for one example of 16 patches an image, hidden 32, one layer."""
    from examples import throughput

    text = transformers.PhiConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                  vocab_size=600, hidden_act="gelu_pytorch_tanh", attention_dropout=0.0,
                                  resid_pdrop=0.0)  # fmt: skip
    vision = throughput.siglip(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                               image_size=32, patch_size=8)  # fmt: skip
    monkeypatch.setitem(throughput.SHAPES, "tiny", (text, vision))
    monkeypatch.setattr(
        throughput, "peak_memory", lambda *args: {"before": 1.0, "above": 1.0}
    )  # starts a process for each
    small = ["--device", "cpu", "--rounds", "1", "--items", "4", "--micro-batch-size", "2"]
    throughput.main([*small, "--json", str(tmp_path / "out.jsonl")])
    assert "x authors" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    results = {name: value for record in records for name, value in record.items()}
    assert all(rate > 0 for rate in results["data_examples_per_second_by_workers"].values())
    first, last = results["loss_of_first_and_last_step"]
    assert last < first and results["packed_off_plain_by"] < 1e-5 * first

    model, processor = throughput.make_model("tiny", "cpu", torch.float32, 8)
    items = throughput.make_items(2)
    args = Namespace(device="cpu", dtype=torch.float32, beta=0.1, delta=0.0, conditional=True, anchors=("chosen",))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = throughput.our_losses(model, make_batch(items, processor), args)
    for losses, make in (
        (throughput.encoding_twice, make_batch),
        (throughput.all_logits, make_batch),
        (throughput.our_losses, throughput.unshared_batch),
        (throughput.our_losses, throughput.padded_batch),
        (throughput.authors_losses, throughput.plain_batch),
    ):
        torch.testing.assert_close(losses(model, make(items, processor), args), expected, rtol=1e-5, atol=1e-5)

    batch = make_batch(items[:1], processor)
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 32  # q, k, v, dense, fc1, fc2, layer norm
    head = 600 * 32  # without bias, as Bunny's
    tower = sum(p.numel() for p in model.get_base_model().model.vision_tower.parameters())
    (prefix, y_w, y_l), (same_prefix, same_y_w) = batch["lengths"]
    tokens, answers = prefix + y_w + y_l + same_prefix + same_y_w, y_w + y_l + same_y_w
    by_hand = 6 * (layer * tokens + head * answers) + 2 * tower * 2 * 16
    assert throughput.useful_flops(model, batch) == by_hand

    throughput.check_equal(model, processor, items, args)
    released = throughput.with_pefts_layers(throughput.with_phis_activation(model))
    kinds = {type(module) for module in released.modules()}
    assert transformers.activations.NewGELUActivation in kinds and train.LoraLinear not in kinds
    losses = throughput.autocast(throughput.our_losses)(released, make_batch(items, processor), args)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    authors_logps = throughput.authors_logps
    monkeypatch.setattr(throughput, "authors_logps", lambda *a: LogPs(*(p + 0.5 for p in authors_logps(*a))))
    with pytest.raises(AssertionError, match="chosen"):
        throughput.check_equal(model, processor, items, args)


def test_trl_trains_the_same(bunny, tmp_path):
    """`examples/trl_mdpo.py` is how a user goes to many GPUs: its loss and gradients must be this loop's."""
    pytest.importorskip("trl")
    from examples import trl_mdpo

    examples, gradients, losses = as_examples(tmp_path), [], []
    for trainer_of in ("this", "trl"):
        model, processor = with_lora(bunny, checkpointing=False)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if trainer_of == "this":
            pairs = Pairs(examples)
            loss = train.forward(model, make_batch([pairs[0, i] for i in range(4)], processor), ARGS)[0].mean()
        else:
            config = trl_mdpo.DPOConfig(
                output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
                gradient_checkpointing=False, learning_rate=1e-4, max_steps=1, seed=0, disable_tqdm=True,
            )  # fmt: skip
            trainer = trl_mdpo.make_trainer(model, processor, examples, config)
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
            loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    trainer.model.zero_grad()
    trainer.train()
    assert trainer.state.global_step == 1 and "rewards/image_margins" in trainer.state.log_history[-1]
