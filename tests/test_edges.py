"""The rims of the core: smallest and largest values, second choices, defaults, what a resumed run leaves out.

The middle of each is tested elsewhere.
"""

import json
import multiprocessing
import os
import random
from functools import partial

import pytest
import torch
import transformers
from PIL import Image, features

import data
import train
from data import BadInput, Example, Pairs, make_batch, open_image, random_crop, read_examples
from mdpo import forward_inputs, mdpo_loss, mdpo_step, pack, response_logps
from test_mdpo import LAYOUTS, PAIRS, authors, gradient, laid_out, message, noise, pair, prefix_length
from test_mdpo import with_lora, write
from tests.helpers import CHAT, DPO_NAMES, PLAIN, VLFEEDBACK, outputs_of, preceded

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_a_third_logp_of_one_side_alone_is_refused():
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
    """White paper of a scan is white, and a picture of one level is a picture."""
    for number, (mode, level) in enumerate([("I;16", 65535), ("F", 0.5)]):
        Image.new(mode, (8, 8), level).save(tmp_path / f"{number}.tif")
    levels = [open_image(tmp_path / f"{number}.tif").getpixel((0, 0)) for number in range(2)]
    assert levels == [(255, 255, 255), (0, 0, 0)]


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
    """Medians, not means; bad records are not left out for their ids; both answers' ends count."""
    processor, said = train.load_processor(str(bunny)), []
    eos = processor.tokenizer.eos_token
    records = [authors(id=f"llava-{n}", chosen=f"A{' cat' * n}", rejected=f"A{eos} dog.") for n in (1, 2, 60)]
    records += [authors(id="llava-4", chosen=""), authors(id="other")]
    kept = read(folder, *records, processor=processor, subset="llava", skip_bad=True, log=said.append)
    said = "\n".join(said)
    assert "left out 1 records" in said and "3 responses end at an end-of-sequence inside" in said
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


def test_limits_are_of_the_training_data_alone(folder):
    """--eval-data is a file of its own, all of it."""
    training, evaluation = ([authors(id=f"{of}-{n}") for n in range(3)] for of in ("llava", "mine"))
    found = read_pairs(folder, training, "--subset", "llava", "--limit", 1, evaluation=evaluation)
    assert len(found[0]) == 1 and found[1] == ["mine-0", "mine-1", "mine-2"]


def test_workers_are_no_more_than_cores(folder, bunny, monkeypatch):
    """Each has a copy of the process; 4 on a machine of one core take memory for nothing."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    pairs = Pairs(read(folder, authors(), authors()))
    args = parsed("--workers", 4)
    args.layout = "plain"
    processor = train.load_processor(str(bunny))
    batches = train.load_batches(pairs, [[(0, 0)], [(0, 1)]], DPO_NAMES, processor, args)
    next(batches)
    assert len(multiprocessing.active_children()) == 1
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


def test_a_window_as_long_as_the_rows_is_no_reason_for_plain_ones(llava):
    """They take twice as long. --max-length decides, not its default."""
    shorten = lambda model, *rest: setattr(model.config.text_config, "sliding_window", 500)
    for max_length, layout in (400, "packed"), (600, "plain"):
        args = parsed("--model", llava, "--max-length", max_length, "--device", "cpu", "--lora-rank", 2)
        with preceded("train.choose_layout", shorten):
            train.load_policy(args, train.load_processor(str(llava)), PAIRS[:2])
        assert args.layout == layout
