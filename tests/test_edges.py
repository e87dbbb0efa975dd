"""The rims of the core: smallest and largest values, second choices, defaults, what a resumed run leaves out.

The middle of each is tested elsewhere.
"""

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
from functools import partial

import peft
import pytest
import torch
import transformers
from PIL import Image, features
from safetensors.torch import load_file, save_file

import data
import train
from data import BadInput, Example, Pairs, make_batch, open_image, random_crop, read_examples
from mdpo import forward_inputs, mdpo_loss, mdpo_step, pack, response_logps
from test_mdpo import LAYOUTS, PAIRS, authors, command, gradient, laid_out, message, noise, pair
from test_mdpo import log_of, prefix_length, with_lora, write
from tests.helpers import CHAT, DPO_NAMES, PARTS, PLAIN, VLFEEDBACK, check_file, outputs_of, preceded

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_a_double_policy_stays_double():
    """Whoever checks the loss in float64 would be given float32's rounding."""
    one = torch.tensor([-1.0])
    losses, _ = mdpo_loss((one.double(),) * 3, (one,) * 3)
    assert losses.dtype == torch.float64


def test_accuracies_are_numbers():
    """torch has no mean of booleans: whoever logs `values.mean()` would stop at the first step."""
    _, metrics = mdpo_loss(*[(torch.tensor([-1.0]),) * 3] * 2)
    assert {values.dtype for values in metrics.values()} == {torch.float32}


def test_a_reference_with_a_graph_is_refused_beside_a_policy_with_one():
    """Who forgets no_grad trains the reference along, or keeps its activations."""
    logps = (torch.zeros(2, requires_grad=True),) * 3
    with pytest.raises(ValueError, match="the reference does not"):
        mdpo_loss(logps, logps)


@pytest.mark.parametrize("given", ["policy", "ref"])
def test_a_third_logp_of_one_side_alone_is_refused(given):
    """One was forgotten: without a word, its metrics would be missing from the log."""
    two, three = (torch.zeros(2),) * 2, (torch.zeros(2),) * 3
    for sides in (three, two), (two, three):
        with pytest.raises(ValueError, match="image_rejected must be floats"):
            mdpo_loss(*sides, conditional=False, anchors=())


def test_a_reference_of_another_base_sees_with_its_own_projector(llava):
    """With the policy's image features, its log-probabilities are those of no model."""
    (model, processor), (other, _) = with_lora(llava), with_lora(llava)
    other.get_base_model().model.multi_modal_projector.linear_1.weight.data *= 2
    batch = make_batch(PAIRS, processor)
    _, metrics = mdpo_step(model, batch, ref_model=other)
    with torch.no_grad():
        ours, theirs = (response_logps(of, batch) for of in (model, other))
    torch.testing.assert_close(metrics["rewards/chosen"], 0.1 * (ours.chosen - theirs.chosen))
    assert metrics["rewards/chosen"].abs().min() > 1e-5


@LAYOUTS
def test_a_forward_pass_keeps_no_cache_and_no_logits_of_prompts(loaded, layout):
    """Both are memory: keys and values of every layer, and a vocabulary for each token of an image."""
    model, processor = loaded
    batch = laid_out(PAIRS, processor, layout)
    output = model(**forward_inputs(model, batch))
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


def test_crops_reach_all_four_rims():
    """The last row and column of a picture are as likely as the first."""
    image = gradient(6, 6, step=40)
    crops = [random_crop(image, random.Random(seed)) for seed in range(400)]
    means = [crop.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for crop in crops]
    for levels in [*zip(*means)][:2]:
        assert min(levels) < 20 and max(levels) > 180  # a pixel of the first, and one of the last


def test_own_rejected_images_need_no_pool():
    """A file in which each record brings its own has nothing to draw, whatever --reject says."""
    assert len(Pairs([Example("q", "y", "n", ("a.png",), ("b.png",))], "random")) == 1


def test_an_unknown_strategy_is_named_at_once():
    """Not by a worker, at the first batch."""
    with pytest.raises(BadInput, match="unknown strategy 'crops': choose from crop, random, moco"):
        Pairs([], "crops")


def test_the_pool_has_one_order_in_every_process():
    """Sets of names are ordered by a hash that each process draws anew; a resumed run draws again."""
    names = [f"{letter}.png" for letter in "hgfedcba"]
    assert Pairs([Example("q", "y", "n", (name,)) for name in names], "random").pool == names[::-1]


def test_a_turned_image_is_scaled_as_it_is_shown(tmp_path):
    """A portrait that the camera stored as a landscape."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    noise(1, (400, 100)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg", max_pixels=10_000).size == (50, 200)
    assert open_image(tmp_path / "a.jpg", max_pixels=90_000).size == (100, 400)


@pytest.mark.parametrize("format", "AVIF BMP GIF JPEG JPEG2000 MPO PNG PPM TIFF WEBP".split())
def test_every_picture_format_is_read(tmp_path, format):
    """One that is missing makes every such record a bad one."""
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    more = {"save_all": True, "append_images": [noise(2)]} if format == "MPO" else {}
    noise(1).save(tmp_path / "x", format, **more)
    assert Image.open(tmp_path / "x").format == format
    assert open_image(tmp_path / "x").size == (48, 32)


def test_levels_of_16_bits_end_at_255(tmp_path):
    """White paper of a scan is white, and a picture of one level is a picture. 4096 takes more than 12 bits:
    it is a sixteenth of the way."""
    for number, (mode, level) in enumerate([("I;16", 65535), ("I;16", 4096), ("F", 0.5)]):
        Image.new(mode, (8, 8), level).save(tmp_path / f"{number}.tif")
    levels = [open_image(tmp_path / f"{number}.tif").getpixel((0, 0))[0] for number in range(3)]
    assert levels == [255, 16, 0]


def test_one_infinite_level_is_refused(tmp_path):
    """Scaled by it, the rest of the picture would be black."""
    image = Image.new("F", (8, 8), 0.5)
    image.putpixel((0, 0), float("inf"))
    image.save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match="levels are not finite"):
        open_image(tmp_path / "a.tif")


def test_a_template_that_loses_an_image_is_found_when_the_data_are_read(folder, llava):
    """The run would stop hours in, at the batch that holds the conversation. Texts do not matter to it."""
    processor = train.load_processor(str(llava))
    of_first = "{% for m in messages %}{% set first = loop.first %}"
    template = CHAT.replace("{% for m in messages %}", of_first)
    template = template.replace("{% if p.type == 'image' %}", "{% if p.type == 'image' and first %}")
    template = template.replace("p.text", "p.text | default('')").replace("END", "</s>")
    processor.chat_template = template.replace("IMAGE", "<image>\n")
    say = partial(message, "user")
    turns = [say("IMAGE", 'Say: "text": "'), message("assistant", "\\"), say("And", "IMAGE", "this?")]
    good, bad = authors(prompt=turns[:1]), authors(prompt=turns, img_path=["a.png", "a.png"])
    assert len(read(folder, good, processor=processor)) == 1
    with pytest.raises(BadInput, match="1 bad records:\n  record 2"):
        read(folder, good, bad, processor=processor)


def test_a_template_may_refuse_the_parts_of_a_text(bunny):
    """Some say in words of their own that they take text alone."""
    processor = train.load_processor(str(bunny))
    text_alone = "{% if m.content is not string %}{{ raise_exception('text, please') }}{% endif %}"
    processor.chat_template = CHAT.replace(PARTS, text_alone + "{{ m.content }}").replace("END", "")
    assert data.render(processor, data.chat_messages("What?", 0)) == "[user]What?"


def test_a_tokenizers_end_behind_the_templates_own_is_refused(llava):
    """It would be scored, and the model taught to end twice. A padding token of its own stays."""
    processor = train.load_processor(str(llava))
    assert processor.tokenizer.pad_token == "<pad>"
    processor.chat_template = CHAT.replace("IMAGE", "<image>").replace("END", "!")
    processor.tokenizer.add_eos_token = True
    with pytest.raises(BadInput, match="adds an end-of-sequence"):
        make_batch(PAIRS, processor)


def read(folder, *records, **options):
    return read_examples(write(folder / "x.json", [*records]), **options)


def test_counts_are_of_what_they_say(folder, bunny):
    """Medians, not means; bad records are not left out for their ids; both answers' ends count, each."""
    processor, said = train.load_processor(str(bunny)), []
    eos = processor.tokenizer.eos_token
    records = [
        authors(id=f"llava-{n}", chosen=f"A{' cat' * n}{eos}", rejected=f"A{eos} dog.") for n in (1, 2, 60)
    ]
    records += [authors(id="llava-4", chosen=""), authors(id="other")]
    kept = read(folder, *records, processor=processor, subset="llava", skip_bad=True, log=said.append)
    said = "\n".join(said)
    assert "left out 1 records" in said and "6 responses end at an end-of-sequence inside" in said
    batch = make_batch([pair("?", one.chosen, one.rejected) for one in kept], processor, DPO_NAMES)
    lengths = sorted((batch.labels >= 0).sum(1).tolist())
    assert f"responses: {(lengths[2] + lengths[3]) / 2:.0f} tokens, the longest {lengths[-1]}" in said


def test_records_of_odd_form_are_read(folder):
    """A line of blanks is none; VLFeedback's own image comes before its id's; USER: may be text."""
    path = write(folder / "x.jsonl", json.dumps(PLAIN) + "\n  \n" + json.dumps(PLAIN) + "\n")
    assert len(read_examples(path)) == 2
    (own,) = read(folder, VLFEEDBACK | {"image": "a.png"})
    assert own.images == (str(folder / "a.png"),)
    (asked,) = read(folder, PLAIN | {"question": "What does the label USER: mean?"})
    assert data.texts_of(asked.question) == ["What does the label USER: mean?"]


def test_a_record_without_id_has_its_number(folder):
    """The run that stops at a batch names its examples by it."""
    assert [example.id for example in read(folder, PLAIN, authors(id="x"), PLAIN)] == ["1", "x", "3"]


def test_a_bad_record_is_named_by_its_number_and_its_id(folder):
    """Who made the file looks for the id, who opens it for the number."""
    with pytest.raises(BadInput, match=r"record 2 \(id x7\): "):
        read(folder, PLAIN, authors(id="x7", chosen=""))


def test_own_rejected_images_are_scaled_down_as_well(folder):
    """m_w in fewer pixels than m_l would be told apart by that alone, and m_l may not fit."""
    examples = read(folder, authors(rejected_image="merged_images/llava-1.jpg"))
    for image in sum(data.Pairs(examples, max_pixels=100)[0][3:5], ()):
        assert image.width * image.height <= 100


def test_one_of_two_images_may_be_the_rejected_one(folder):
    """The worse context differs in the second image alone."""
    changed = {"images": ["a.png"] * 2, "rejected_images": ["a.png", "merged_images/llava-1.jpg"]}
    assert len(read(folder, authors(img_path=None, prompt="What differs?") | changed)) == 1


def test_an_error_without_words_is_named():
    """A line that ends in "x.png cannot be decoded:" helps nobody."""
    with pytest.raises(BadInput, match="^x: ValueError$"), data.about("x"):
        raise ValueError


MARKS = ["<Image>", "<end_of_utterance>", "<start_of_turn>", "<im_patch>", "<image 1>"]


@pytest.mark.parametrize("mark", MARKS)
def test_each_mark_of_other_tools_is_refused(folder, mark):
    """It would be trained as text beside the image."""
    with pytest.raises(BadInput, match="control token or image mark"):
        read(folder, PLAIN | {"question": f"{mark} What is it?"})


@pytest.mark.parametrize("start", [b"\xff\xfe", b"\xfe\xff"])
def test_utf_16_is_named_in_both_byte_orders(tmp_path, start):
    """Windows writes one, some tools the other."""
    (tmp_path / "x.json").write_bytes(start + b"[\0]\0")
    with pytest.raises(BadInput, match="is UTF-16: save it as UTF-8"):
        read_examples(tmp_path / "x.json")


def test_a_log_file_gets_a_line_every_ten_seconds():
    """Ten a second would fill it."""
    assert data.progress(range(3), "x", 3).mininterval == 10  # the tests' standard error is no terminal


def test_output_of_ascii_alone_takes_any_name(folder, monkeypatch):
    """In a bare container a report on kätzchen.json was a traceback of codecs."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert check_file([write(folder / "kätzchen.json", [authors()])]) == 0
    assert rb"k\xe4tzchen.json: 1 examples" in sys.stdout.buffer.getvalue()


def test_output_that_nobody_reads_is_no_success(capsys, monkeypatch):
    """As after `| head`: a script that goes on would take half a report for a whole one."""

    def broken(argv):
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert data.run_command(broken, []) == 141 and capsys.readouterr().err == ""


def parsed(*more):
    return train.parse_args(["--model", "m", "--data", "d", *map(str, more)])


def test_defaults_and_rims_of_numbers():
    """README's memory and hours are of micro-batches of 4, the authors' of 2,048 tokens. A batch of none
    divides by 0; a crop of one size is a crop."""
    args = parsed("--crop", 0.1, 0.1)
    assert (args.max_length, args.micro_batch_size, args.workers) == (2048, 4, 4) and args.crop == [0.1, 0.1]
    with pytest.raises(BadInput, match="must be within 1 to"):
        parsed("--batch-size", 0)


def read_pairs(folder, records, *more, resume=None, evaluation=()):
    """train.read_pairs of these records -> ids of training and held-out examples."""
    flags = ["--data", write(folder / "x.json", records)]
    flags += ["--eval-data", write(folder / "eval.json", evaluation)] if evaluation else []
    args = parsed(*flags, *more)
    args.resume = resume
    return [[example.id for example in pairs.examples] for pairs in train.read_pairs(args, None)]


def test_a_resumed_run_drops_what_it_dropped_and_checks_nothing_else(folder):
    """With an example more, every later batch is another. Without --skip-bad nothing was bad."""
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    records = [authors(id=1), authors(id=2, img_path="broken.png")]
    assert read_pairs(folder, records, "--skip-bad", resume="r") == [["1"], []]
    assert read_pairs(folder, records, resume="r") == [["1", "2"], []]
    with pytest.raises(BadInput, match="broken.png cannot be decoded"):
        read_pairs(folder, records)


def test_a_sample_is_drawn_by_the_runs_seed(folder):
    """Five seeds on one sample would show less spread than there is."""
    records = [authors(id=n) for n in range(9)]
    drawn = read_pairs(folder, records, "--limit", 3, "--seed", 1)[0]
    assert [*map(int, drawn)] == sorted(random.Random(1).sample(range(9), 3))


def test_limits_are_of_the_training_data_alone(folder):
    """--eval-data is a file of its own, all of it."""
    training, evaluation = ([authors(id=f"{of}-{n}") for n in range(3)] for of in ("llava", "mine"))
    found = read_pairs(folder, training, "--subset", "llava", "--limit", 1, evaluation=evaluation)
    assert len(found[0]) == 1 and found[1] == ["mine-0", "mine-1", "mine-2"]


def test_eval_data_come_beside_those_held_out(folder):
    """With both flags, one of the two sets would be lost in silence."""
    records = [authors(id="a"), authors(id="b", img_path="merged_images/llava-1.jpg")]
    training, held_out = read_pairs(folder, records, "--eval-size", 1, evaluation=[authors(id="mine")])
    assert len(training) == 1 and sorted(training + held_out) == ["a", "b", "mine"]


def test_none_is_no_anchor_wherever_it_stands():
    """It would be taken back in silence."""
    with pytest.raises(BadInput, match="none cannot be combined"):
        parsed("--anchors", "chosen", "none")


def test_no_rejected_image_is_anchored_without_images():
    """Nor beside another anchor: the run would stop at its first step."""
    with pytest.raises(BadInput, match="leaves no rejected image to anchor"):
        parsed("--no-image", "--anchors", "chosen", "image_rejected")


def test_every_held_out_example_counts_alike(folder, bunny):
    """Of 0, 1 and 2 the mean is 1: without the last micro-batch 0.5, of micro-batches' means 1.25."""
    pairs, processor = Pairs(read(folder, *[authors()] * 3)), train.load_processor(str(bunny))
    args = parsed("--micro-batch-size", 2, "--workers", 0)
    args.layout = "packed"
    index = lambda batch: (None, {"index": torch.tensor([float(i) for _, i in batch.keys])})
    assert train.evaluate(index, pairs, processor, args) == {"eval/index": 1.0}


def test_workers_send_arrays(folder, bunny):
    """A tensor goes through shared memory, of which a container has 64 MB."""
    pairs, processor = Pairs(read(folder, authors())), train.load_processor(str(bunny))
    sent = train.collate([pairs[0]], partial(make_batch, processor=processor), "packed")
    assert not [name for name, value in (vars(sent) | sent.inputs).items() if torch.is_tensor(value)]


@pytest.mark.parametrize("n_cores", [1, 2])
def test_workers_are_as_many_as_cores(folder, bunny, monkeypatch, n_cores):
    """Each has a copy of the process; 4 on a machine of one core take memory for nothing."""
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    pairs = Pairs(read(folder, authors(), authors()))
    args = parsed("--workers", 4)
    args.layout = "plain"
    processor = train.load_processor(str(bunny))
    batches = train.load_batches(pairs, [[(0, 0)], [(0, 1)]], DPO_NAMES, processor, args)
    next(batches)
    assert len(multiprocessing.active_children()) == n_cores
    batches.close()


def test_all_tensors_of_a_batch_are_pinned(loaded, monkeypatch):
    """A copy from memory that is not pinned makes the GPU wait."""
    batch = pack(make_batch(PAIRS, loaded[1], share=True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.double())
    pinned = batch.pin_memory()
    tensors = [*pinned.inputs.values(), pinned.labels, pinned.take, pinned.answers, pinned.predictors]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


class Reached(Exception):
    pass


def test_a_gpu_is_used_where_there_is_one(llava, monkeypatch, capsys):
    """A run that nobody told to would train on the CPU, for weeks. That it loads is said before it takes
    minutes. float16 overflows where the weights were trained in bf16."""

    def reach(name, device):
        raise Reached(device)

    monkeypatch.setattr("train.best_device", lambda: "cuda")
    for device, flags in ("cuda", []), ("cpu", ["--device", "cpu"]):
        with preceded("train.load_model", reach), pytest.raises(Reached, match=device):
            train.load_policy(parsed(*flags), None, [])
        assert capsys.readouterr().out == "loading m\n"
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda model, device: model)
    assert train.load_model(str(llava), "cuda:0")[0].dtype == torch.bfloat16
    assert train.load_model(str(llava), "cuda:0", torch.float32)[0].dtype == torch.float32  # if one asks


def test_a_window_as_long_as_the_rows_is_no_reason_for_plain_ones(llava):
    """They take twice as long. --max-length decides, not its default."""
    shorten = lambda model, *rest: setattr(model.config.text_config, "sliding_window", 500)
    for max_length, layout in (400, "packed"), (600, "plain"):
        args = parsed("--model", llava, "--max-length", max_length, "--device", "cpu", "--lora-rank", 2)
        with preceded("train.choose_layout", shorten):
            train.load_policy(args, train.load_processor(str(llava)), PAIRS[:2])
        assert args.layout == layout


def changed(model, tmp_path, **config):
    """A tiny model with other values in its config.json."""
    folder = shutil.copytree(model, tmp_path / "changed")
    values = json.loads((folder / "config.json").read_text())
    for name, value in config.items():
        (values["text_config"] if name == "sliding_window" else values)[name] = value
    write(folder / "config.json", values)
    return folder


def test_code_that_comes_with_a_model_is_not_run(llava, tmp_path):
    """A folder from the hub may bring some beside a type that the library knows."""
    names = {"AutoConfig": "own.C", "AutoModelForImageTextToText": "own.M", "AutoProcessor": "own.P"}
    folder = changed(llava, tmp_path, auto_map=names)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = P = None\n")
    model, _ = train.load_model(str(folder))
    assert isinstance(model, transformers.LlavaForConditionalGeneration) and not (tmp_path / "ran").exists()


def test_a_layout_that_is_asked_for_is_taken(llava, tmp_path, capsys):
    """--layout plain is the way out where packed rows are suspected. Who took it need not be told to."""
    model = changed(llava, tmp_path, sliding_window=500)
    args = parsed("--model", model, "--layout", "plain", "--device", "cpu", "--lora-rank", 2)
    for args.max_length in 400, 600:
        args.layout = "plain"
        train.load_policy(args, train.load_processor(str(model)), PAIRS[:2])
        assert args.layout == "plain" and "not exact" not in capsys.readouterr().out


def test_one_row_that_is_not_finite_is_enough(bunny):
    """A download that broke off may leave most words whole: a run would stop hours in."""
    model, processor = with_lora(bunny, checkpointing=False)
    tokens = [{*row.tolist()} for row in make_batch(PAIRS, processor).inputs["input_ids"]]
    alone = next(token for row in tokens for token in row if sum(token in other for other in tokens) == 1)
    model.get_input_embeddings().weight.data[alone] = torch.nan
    with pytest.raises(BadInput, match="log-probabilities are not finite"):
        train.choose_layout(model, processor, PAIRS)


def test_null_in_bunnys_config_is_no_value(bunny, tmp_path):
    """The library refuses it in the place of a rate, where a field that is not there has its default."""
    assert train.load_model(str(changed(bunny, tmp_path, embd_pdrop=None)))


def test_a_bunny_without_its_eye_is_named(bunny, tmp_path):
    """As a checkpoint of its language model alone: "list index out of range" tells nobody what is missing."""
    folder = changed(bunny, tmp_path)
    for file in folder.glob("*.safetensors"):
        weights = {name: weight for name, weight in load_file(file).items() if "vision_tower" not in name}
        save_file(weights, file)
    with pytest.raises(BadInput, match="holds no weights of a vision tower"):
        train.load_model(str(folder))


def test_weights_of_another_size_are_named(bunny, tmp_path):
    """The library's own words are "look at the above report!", and no report is above."""
    with pytest.raises(BadInput, match=r"weights are mismatched, such as \('model.language_model.layers.0"):
        train.load_model(str(changed(bunny, tmp_path, intermediate_size=96)))


def test_another_seed_is_another_adapter(bunny):
    """Runs of several seeds that all begin alike make the result look surer than it is."""
    adapters = []
    for seed in 0, 1, 1:
        args = parsed("--model", bunny, "--device", "cpu", "--lora-rank", 2, "--seed", seed)
        model = train.load_policy(args, train.load_processor(str(bunny)), PAIRS[:2])
        adapters.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert not adapters[0].equal(adapters[1]) and adapters[1].equal(adapters[2])


def test_an_adapters_defaults_are_the_papers_and_its_layers_those_asked_for(bunny):
    """Who takes add_lora alone trains with them; sharded weights are gathered for peft's own layers alone."""
    model = train.add_lora(train.load_model(str(bunny))[0], layer=peft.tuners.lora.Linear)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (64, 128)
    assert not any(isinstance(module, train.LoraLinear) for module in model.modules())


def test_one_infinite_number_is_enough(bunny, tmp_path):
    """A weight that overflowed in one place is as lost as one that did in all."""
    model, processor = with_lora(bunny)
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.inf
    with pytest.raises(BadInput, match="step 3: its update made a weight infinite"):
        train.save_checkpoint(tmp_path, parsed(), {}, [{"step": 3, "epoch": 1.0}], model, processor, None)
    assert not [*tmp_path.iterdir()]


def test_who_reads_a_file_reads_one_of_the_two(tmp_path):
    """A copy that is cut off, as by a kill, would leave neither the old checkpoint nor the new one."""
    write(tmp_path / "checkpoint.pt", "the old one")
    with open(tmp_path / "checkpoint.pt") as reader:
        with train.replacing(tmp_path) as new:
            write(new / "checkpoint.pt", "new")
        assert reader.read() == "the old one"
    assert (tmp_path / "checkpoint.pt").read_text() == "new"


def test_a_card_between_two_epochs_has_the_last_numbers_and_no_path_of_this_machine(llava, tmp_path):
    """A stopped run's last step has no held-out metrics. A card goes to the hub, where paths tell names."""
    args = parsed("--model", llava, "--data", tmp_path / "silkie.json")
    held_out = [{"step": step, "epoch": step / 2, "eval/loss": 2.0 - step / 2} for step in (0, 2)]
    card = train.model_card(args, [*held_out, {"step": 3, "epoch": 1.5, "loss": 0.7}])
    assert re.search(r"\bloss +2.0000 +1.0000\n", card) and "3 steps" in card
    assert str(tmp_path) not in card and str(llava) not in card


def test_each_kept_epoch_is_a_copy_of_the_runs_folder(bunny, small, tmp_path):
    """Either can be asked: a folder without the processor's files cannot be."""
    arguments = command(bunny, small, tmp_path / "out", "--epochs", 1, "--keep-epochs")
    assert train.main(arguments) == 0
    kept, latest = ({path.name for path in (tmp_path / "out" / of).iterdir()} for of in ("epoch-1", ""))
    assert latest - kept == {"epoch-1", "args.json", "metrics.jsonl", "checkpoint.pt"} and kept < latest


def test_without_images_nothing_is_compared_between_images(bunny, small, tmp_path):
    """A margin of 0 between images that are not there reads as a model that is blind."""
    flags = "--no-image --epochs 1 --eval-size 1".split()
    assert train.main(command(bunny, small, tmp_path / "out", *flags)) == 0
    names = log_of(tmp_path / "out")[0].keys()
    assert "eval/rewards/margins" in names and not any("image" in name for name in names)


def test_half_an_epoch_is_not_kept(bunny, small, tmp_path):
    """1.5 is rounded to 2: an adapter of half the steps would be taken for that epoch's."""
    arguments = command(bunny, small, tmp_path / "out", *"--epochs 1 --keep-epochs --save-every 1".split())
    assert train.main(arguments) == 0
    assert [path.name for path in (tmp_path / "out").glob("epoch-*")] == ["epoch-1"]


def test_a_loss_may_be_an_object(bunny, small, tmp_path):
    """As a partial of one's own with its options: it has no name."""
    own = lambda policy, ref, batch, scale, **options: mdpo_loss(policy, ref, **options)
    arguments = command(bunny, small, tmp_path / "out", "--epochs", 1)
    assert train.main(arguments, loss=partial(own, scale=1)) == 0


def test_what_no_longer_is_decides_no_less():
    """A run that began with a flag that later code lacks would go on without it."""
    with pytest.raises(BadInput, match="other values of old flag"):
        train.refuse_others({}, {"old_flag": 1})


def test_a_run_knows_the_arguments_and_releases_it_began_with(finished, tmp_path):
    """Resumed elsewhere, it would forget by which its numbers came about. Its answers are asked for with the
    system text of its data."""
    out = shutil.copytree(finished, tmp_path / "out")
    began = (out / "args.json").read_text()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    assert json.loads(began)["versions"] == versions and json.loads(began)["system"] == train.BUNNY_SYSTEM
    assert train.main(["--resume", str(out), "--workers", "1"]) == 0
    assert (out / "args.json").read_text() == began


def test_a_checkpoint_that_was_moved_away_is_missed(finished, tmp_path):
    """A link to a disk that is not there: the run would begin at step 0, over what there is."""
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "adapter_model.safetensors").unlink()
    (out / "checkpoint.pt").unlink()
    (out / "checkpoint.pt").symlink_to(tmp_path / "not there")
    assert train.main(["--resume", str(out)]) == 2
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_resumed_run_counts_from_where_it_stood_and_removes_only_its_own(finished, tmp_path, capsys):
    """The bar said 0 of 4 for a run that had ended; a folder x.tmp of the user's went, too."""
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "x.tmp").mkdir()
    (out / "new.1.tmp").mkdir()
    assert train.main(["--resume", str(out)]) == 0
    assert "4/4" in capsys.readouterr().err
    assert (out / "x.tmp").exists() and not (out / "new.1.tmp").exists()
