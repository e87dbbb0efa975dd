"""What is trained is what was meant: records that nobody can mean are refused, and the rest is shown and counted."""

import copy
import itertools
import json
import math
import re
import shutil
import struct
import zlib

import pytest
import tokenizers
import torch
from PIL import Image

import data
import mdpo
import train
from data import BadInput, Example, Pairs, make_batch, open_image, read_examples
from examples import families
from test_mdpo import TURNS, authors, command, noise, one_line_of, pair, wrapped, write

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_TWICE = CHATML.replace(
    "m.role + '\n' }}", "m.role + '\n' + (m.content[0].text if m.role == 'system' else '') }}"
)
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A processor of Qwen3-VL's kind, whose turns end in <|im_end|>."""
    folder = families.write_family("qwen3_vl", tmp_path_factory.mktemp("qwen"))
    processor = train.load_processor(str(folder))
    processor.chat_template = CHATML
    return processor


def read(folder, *records, **options):
    return read_examples(write(folder / "x.json", [*records]), **options)


def refusal(folder, record, **options):
    """Why a record is bad, as its line says."""
    with pytest.raises(BadInput, match="1 bad records") as error:
        read(folder, record, **options)
    return str(error.value).splitlines()[1]


def row_text(processor, question, images=1):
    """The row of y_w as text, image tokens as one."""
    image = [noise(1)] * images
    batch = make_batch([pair(question, "A cat.", "No.", image, image)], processor)
    text = processor.tokenizer.decode(batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0] > 0])
    return re.sub(f"({re.escape(processor.image_token)})+", "<image>", text)


# ------------------------------------------------------------------------------------------- texts and responses


def test_a_pair_that_is_equal_once_it_is_cut_is_bad(folder, bunny):
    """DPO's margin would be 0 for ever, and AdamW would scale its rounding noise."""
    processor, start = train.load_processor(str(bunny)), "There is a red circle and a blue square. " * 5
    record = authors(chosen=start + "Yes.", rejected=start + "No.")
    room = int(re.search("prompts: ([0-9]+)", counts(folder, record, processor=processor))[1]) + 20
    assert "equal in the tokens of --max-length" in refusal(
        folder, record, processor=processor, max_length=room
    )
    ends = authors(chosen="Yes.<|endoftext|> Or no.", rejected="Yes.<|endoftext|> Or so.")
    assert "are equal" in refusal(folder, ends, processor=processor)
    empty = authors(chosen="<|endoftext|>Yes.")
    assert "'chosen' is empty before its end-of-sequence" in refusal(folder, empty, processor=processor)


def counts(folder, *records, **options):
    """What reading says of good records."""
    said = []
    read(folder, *records, log=said.append, **options)
    return said[-1]


def test_responses_that_are_cut_are_counted(folder, bunny):
    """They lose their end-of-sequence: the model would learn never to stop, and nobody was told."""
    processor, long = train.load_processor(str(bunny)), "red circle " * 60
    records = [
        authors(),
        authors(chosen=long),
        authors(rejected=long),
        authors(chosen=long, rejected="x" + long),
    ]
    ended = authors(chosen="Yes.<|endoftext|> Or no.")
    said = counts(folder, *records, ended, processor=processor, max_length=100)
    assert "5 examples with 1 different images" in said and "4 responses are cut at --max-length 100" in said
    assert "1 responses end at an end-of-sequence inside" in said
    lengths = [
        len(ids) for e in records for ids in data.tokenize(processor, read_one(folder, e)).responses.values()
    ]
    assert f"the longest {max(lengths)}" in said


def test_a_response_that_just_fits_is_not_cut(folder, bunny):
    """Who is told of cut responses makes room for them, and has to see when it is enough."""
    record, processor = authors(rejected="No."), train.load_processor(str(bunny))
    said = counts(folder, record, processor=processor)
    room = sum(
        int(re.search(f"{name}: [0-9]+ tokens, the longest ([0-9]+)", said)[1])
        for name in ("prompts", "responses")
    )
    for max_length, n_cut in (room, 0), (room - 1, 1):
        said = counts(folder, record, processor=processor, max_length=max_length)
        assert f"{n_cut} responses are cut at" in said


def read_one(folder, record):
    return Pairs(read(folder, record, log=len))[0]


FOREIGN = [
    "<ImageHere>",
    "<image_0>",
    "<image-placeholder>",
    "<|image_1|>",
    "<|image|>",
    "<|image_pad|>",
    "<start_of_image>",
    "<IMAGE>",
    "[IMG]",
    "<img>a.jpg</img>",
    "<|im_start|>",
    "<|vision_start|>",
]


@pytest.mark.parametrize("mark", [*FOREIGN, "<image 1>"])
def test_marks_of_other_tools_in_a_question_are_bad(folder, mark):
    """They would be trained on as text, beside an image that stands elsewhere."""
    assert f"'prompt' holds {mark!r}" in refusal(folder, authors(prompt=f"{mark}\nWhat is it?"))


@pytest.mark.parametrize(
    "code", ["a<image_size>2", "vector<image_t> v;", "x <| f |> y", "<img src=a>", "[img]"]
)
def test_code_in_a_question_is_no_image_mark(folder, code):
    """Questions about code are data, too."""
    assert len(read(folder, authors(prompt=f"What does {code} do?", chosen="[IMG] <IMAGE>"))) == 1


def test_control_tokens_of_the_model_are_bad_but_think_tags_and_an_end_inside_a_response_are_not(
    folder, qwen, llava
):
    """A text that went through a chat template already would hold a turn inside the turn."""
    for name in "prompt", "chosen", "rejected":
        record = authors(**{name: "<|vision_start|>What?"})
        assert f"'{name}' holds '<|vision_start|>'" in refusal(folder, record, processor=qwen)
    ended = authors(prompt="What?</s>")  # which has no form of an image mark
    assert "'prompt' holds '</s>'" in refusal(folder, ended, processor=train.load_processor(str(llava)))
    thinking, eos = copy.deepcopy(qwen), qwen.tokenizer.eos_token
    tags = [tokenizers.AddedToken(tag, special=True) for tag in ("<think>", "</think>")]
    thinking.tokenizer.add_tokens(tags, special_tokens=True)
    good = authors(prompt="What <think>?", chosen=f"<think>\nA guess.</think> Yes.{eos}", rejected="No.")
    for processor in qwen, thinking:
        assert len(read(folder, good, processor=processor)) == 1


ODD = {
    "'chosen' is 3, not text": authors(chosen=3),
    "'chosen' is NaN, not text": authors(chosen=math.nan),
    "'prompt' is {\"a\": 1}, not text": authors(prompt={"a": 1}),
    "'rejected' is [\"No.\", \"Never.\"], not text": authors(rejected=["No.", "Never."]),
    "an image is {\"bytes\": \"/9j/4AAQ\", \"path\": null}, not a path": authors(
        img_path={"bytes": "/9j/4AAQ", "path": None}),
    "has the fields image_id, chosen, rejected; needed are": {"image_id": 1, "chosen": ["A"], "rejected": ["B", "C"]},
    "has the fields conversations, image; needed are image, prompt, chosen": {"conversations": [], "image": "a.png"},
}  # fmt: skip


@pytest.mark.parametrize("reason", ODD)
def test_what_is_no_text_is_named_with_what_it_holds(folder, reason):
    """A message about slices or strings that must be indexed by integers helps nobody to mend a file."""
    line = refusal(folder, ODD[reason])
    assert reason in line and len(line) < 400


def test_a_field_that_is_empty_gives_way_to_one_that_is_not(folder):
    """Exports write "" for an image that is named in another field."""
    (example,) = read(folder, authors(img_path=None, image="", image_path="a.png"))
    assert example.images == (str(folder / "a.png"),)


# --------------------------------------------------------------------------------------------------- system texts


def test_a_system_text_around_the_question_is_kept_where_the_model_was_tuned_with_one(
    folder, bunny, llava, qwen
):
    """LLaVA-1.5 was tuned with it, and its hub template does not add it. Elsewhere it would take the place of
    the model's own, and answers are asked for without it."""
    record, said = authors(), []
    for model in bunny, llava:
        processor = train.load_processor(str(model))
        (example,) = read(folder, record, processor=processor)
        assert example.question[0] == wrapped()
        text = row_text(processor, example.question)
        assert text.replace("<s>", "").lstrip().startswith(f"{train.BUNNY_SYSTEM} USER: ")
    # To Bunny, whose template writes it by itself, the same row.
    bunnys = train.load_processor(str(bunny))
    assert row_text(bunnys, example.question) == row_text(bunnys, example.question[1:])
    (example,) = read(folder, record, processor=qwen, log=said.append)
    assert [message["role"] for message in example.question] == ["user"]
    assert "left out 1 system texts around USER: ... ASSISTANT:" in said[0]
    other = authors(prompt="Be rude. USER: <image>\nWhat? ASSISTANT:")
    (example,) = read(folder, other, processor=train.load_processor(str(llava)))
    assert "Be rude. USER: <image>" in row_text(train.load_processor(str(llava)), example.question)


def test_a_system_message_is_written_once_or_the_record_is_bad(folder, qwen):
    """Some templates have no place for it, and drop it in silence."""
    noise(2).save(folder / "b.png")
    record = TURNS | {"images": ["a.png", "b.png"]}
    (example,) = read(folder, record, processor=qwen)
    assert row_text(qwen, example.question, 2).count("Be brief.") == 1
    for template in NO_SYSTEM, SYSTEM_TWICE:
        qwen.chat_template = template
        assert "no place for a system text" in refusal(folder, record, processor=qwen)
    qwen.chat_template = CHATML


def test_a_run_knows_the_system_text_of_its_data(folder, llava):
    """Answers are asked for with it: without, they would be to prompts that it never saw."""
    processor, model = train.load_processor(str(llava)), torch.nn.Linear(1, 1)
    args = train.parse_args(["--model", str(llava), "--data", str(folder / "x.json")])
    rude = authors(prompt="Be rude. USER: <image>\nWhat? ASSISTANT:")
    for records, system in (
        ([authors()] * 2, train.BUNNY_SYSTEM),
        ([authors(), rude], ""),
        ([authors(prompt="?")], ""),
    ):
        examples = read(folder, *records, processor=processor, log=len)
        assert train.identity(args, examples, model, mdpo.mdpo_loss)["system"] == system


# ---------------------------------------------------------------------------------------------------------- images


def test_what_is_transparent_is_white(tmp_path):
    """Black ink on transparency, as formulas and charts have it, would become all black."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 20, 20))
    for name, saved in {"a.png": image, "la.png": image.convert("LA"), "b.webp": image}.items():
        saved.save(tmp_path / name, **({"lossless": True} if name == "b.webp" else {}))
        opened = open_image(tmp_path / name)
        assert (opened.getpixel((0, 0)), opened.getpixel((15, 15))) == ((255,) * 3, (0,) * 3), name
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (255,) * 3


def test_images_of_12_and_16_bits_and_of_floats_are_scaled_by_their_range(tmp_path):
    """Cut off at 255, or divided by 65,536, scans and depth maps would be all white or all black."""
    half = {"a.tif": ("I;16", 2048), "b.png": ("I;16", 32768), "c.tif": ("F", 0.5), "d.tif": ("I;16B", 32768)}
    for name, (mode, level) in half.items():
        image = Image.new("F", (8, 8), 0.0) if mode == "F" else Image.new(mode, (8, 8))
        for x in range(8):
            image.putpixel((x, 0), 2 * level - 1 if mode != "F" else 1.0)
            image.putpixel((x, 1), level)
        image.save(tmp_path / name)
        levels = [open_image(tmp_path / name).getpixel((0, y))[0] for y in range(3)]
        assert levels == pytest.approx([255, 128, 0], abs=1), name
    depth = Image.new("F", (8, 8), -4.0)
    depth.putpixel((0, 0), 4.0)
    depth.putpixel((0, 1), 0.0)
    depth.save(tmp_path / "e.tif")
    levels = [open_image(tmp_path / "e.tif").getpixel((0, y))[0] for y in range(3)]
    assert levels == pytest.approx([255, 128, 0], abs=1)


def test_postscript_is_no_picture(tmp_path):
    """It is a program, and Pillow would start Ghostscript to run it."""
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(BadInput, match="x.png cannot be decoded: EPS is none of"):
        open_image(tmp_path / "x.png")


def test_max_pixels_scales_large_images_down_before_all_else(tmp_path, folder, bunny):
    """A phone's photograph takes 15,000 tokens on models that see each pixel."""
    noise(1, (400, 100)).save(tmp_path / "wide.png")
    image = open_image(tmp_path / "wide.png", 10_000)
    assert image.size == (200, 50) and open_image(tmp_path / "wide.png", 40_000).size == (400, 100)
    pairs = Pairs([Example("q", "a", "b", (str(tmp_path / "wide.png"),))], max_pixels=10_000)
    assert (pairs[0].images[0].size, pairs[0].images_rejected[0].size) == ((200, 50), (200, 50))
    assert (
        pairs[0].images_rejected[0].tobytes() == Pairs.__getitem__(pairs, (0, 0)).images_rejected[0].tobytes()
    )


def test_max_pixels_is_of_the_check_and_of_all_pairs(folder, qwen):
    """A prompt that fits would be refused, or images of another size than those that were checked be trained on."""
    for name in "ab":
        noise(ord(name), (320, 320)).save(folder / f"{name}.png")
    path = write(folder / "x.json", [authors(img_path="a.png"), authors(img_path="b.png")])
    argv = ["--model", "M", "--data", path, "--eval-size", "1", "--max-length", "30"]
    with pytest.raises(BadInput, match="no room for a response"):
        train.read_pairs(train.parse_args(argv), qwen)
    for pairs in train.read_pairs(train.parse_args([*argv, "--max-pixels", "784"]), qwen):
        assert pairs[0].images[0].size == pairs[0].images_rejected[0].size == (28, 28)


def test_the_longest_prompt_of_a_pair_may_be_the_rejected_images(folder, qwen):
    """The run would stop hours in, at the batch that holds it."""
    noise(3, (320, 320)).save(folder / "b.png")
    record = authors(rejected_image="b.png", chosen="Yes.", rejected="No.")
    pairs = Pairs(read(folder, record, processor=qwen, log=len))
    starts = (make_batch([pairs[0]], qwen).labels >= 0).int().argmax(1).tolist()
    assert starts[0] == starts[1] < starts[2]
    assert "no room" in refusal(folder, record, processor=qwen, max_length=starts[2])
    assert len(read(folder, record, processor=qwen, max_length=starts[2] + 4)) == 1


def test_the_check_processes_one_image_of_each_size(folder, bunny, monkeypatch):
    """Resizing pixels that nobody looks at took most of the check's time, minutes for 10,000 records."""
    processor, calls = train.load_processor(str(bunny)), []
    call = type(processor.image_processor).__call__
    spy = lambda self, *args, **options: calls.append(1) or call(self, *args, **options)
    monkeypatch.setattr(type(processor.image_processor), "__call__", spy)
    noise(3, (90, 20)).save(folder / "b.png")
    records = [authors(id=i, img_path=("a.png", "b.png")[i % 2], rejected_image="merged_images/llava-1.jpg")
               for i in range(20)]  # fmt: skip
    assert len(read(folder, *records, processor=processor)) == 20 and len(calls) <= 4


# ------------------------------------------------------------------------------------------------------- held out


def test_held_out_examples_share_no_image_with_training(folder):
    """Four questions about one image, one of them held out, measure memory. Images link examples, own rejected ones
    too: here 0-1-2 by a and b, 3-4 by the rejected image d, 5 alone."""
    images = {0: ("a",), 1: ("a", "b"), 2: ("b",), 3: ("c",), 4: ("e",), 5: ("f",)}
    own = {3: ("d",), 4: ("d",)}
    examples = [Example("q", "y", "n", images[i], own.get(i, ()), id=str(i)) for i in range(6)]
    groups = [{"0", "1", "2"}, {"3", "4"}, {"5"}]
    seen = set()
    for seed in range(30):
        for n in range(6):
            try:
                training, held_out = train.hold_out(examples, n, seed)
            except BadInput as error:
                assert "leaves none of 6" in str(error) and n > 2
                continue
            trained, held = ({example.id for example in some} for some in (training, held_out))
            assert trained | held == {*"012345"} and not trained & held and len(held) >= n
            assert all(group <= held or not group & held for group in groups)
            smallest = min(len(held - group) for group in groups if group <= held) if held else 0
            assert smallest < n or n == 0  # no group more than it takes
            seen.add((n, frozenset(held)))
    assert len({held for n, held in seen if n == 1}) == 3  # any group, by the seed


def test_random_rejected_images_of_training_are_none_of_the_held_out(bunny, folder):
    """Held-out images would be trained on."""
    for i in range(8):
        noise(i + 10).save(folder / f"{i}.png")
    path = write(folder / "x.json", [authors(img_path=f"{i}.png") for i in range(8)])
    args = train.parse_args(["--model", str(bunny), "--data", path, "--eval-size", "3", "--reject", "random"])
    pairs, held_out = train.read_pairs(args, train.load_processor(str(bunny)))
    assert not {*pairs.pool} & {image for example in held_out.examples for image in example.images}
    assert len(pairs.pool) == 5 and len(held_out.pool) == 8


# ------------------------------------------------------------------------------------------- one sentence each


def test_flags_that_do_nothing_are_refused(bunny, folder, capsys):
    """A user who gives one believes that it works."""
    noise(2).save(folder / "b.png")
    path = write(folder / "x.json", [authors(rejected_image="b.png")] * 3)
    status = train.main(command(bunny, path, folder / "out", "--reject", "moco"))
    assert "--reject moco does nothing: every record has rejected images" in one_line_of(capsys, status)
    path = write(folder / "x.json", [authors(rejected_image="b.png"), authors()])
    args = train.parse_args(["--model", str(bunny), "--data", path, "--reject", "moco"])
    assert len(train.read_pairs(args, train.load_processor(str(bunny)))[0]) == 2


def test_a_cpu_trains_a_large_model_only_if_it_is_asked_to(bunny, folder, capsys, monkeypatch):
    """Under an old driver torch sees no GPU: a 3B model would train for weeks, and say nothing."""
    argv = [word for word in command(bunny, write(folder / "x.json", [authors()] * 4), folder / "out")]
    at = argv.index("--device")
    monkeypatch.setattr(torch.nn.Module, "num_parameters", lambda self: 501_000_000, raising=False)
    monkeypatch.setattr(train.transformers.PreTrainedModel, "num_parameters", lambda self: 501_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in one_line_of(capsys, train.main(argv[:at] + argv[at + 2 :]))
    assert train.main([*argv, "--epochs", "1"]) == 0


def test_torchrun_of_train_py_is_refused(bunny, folder, capsys, monkeypatch):
    """Each process would train the same run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    status = train.main(command(bunny, write(folder / "x.json", [authors()]), folder / "out"))
    assert "torchrun examples/trl_mdpo.py" in one_line_of(capsys, status)


B2 = torch.zeros(2)
MISUSED = {
    "a list of pairs with open images": lambda p, e, m: make_batch(e, p),
    "a list of pairs with open images: ": lambda p, e, m: make_batch(Pairs(e)[0], p),
    "unknown layout 'padded'": lambda p, e, m: train.choose_layout(m, p, [Pairs(e)[0]], "padded"),
    "unknown strategy 'blur'": lambda p, e, m: Pairs(e, "blur"),
    "must be a LogPs or a tuple of its tensors": lambda p, e, m: mdpo.mdpo_loss(B2, (B2, B2, B2)),
    "needs a model with an adapter, or ref_model": lambda p, e, m: mdpo.mdpo_step(
        m, make_batch([Pairs(e)[0]], p)
    ),
}


@pytest.mark.parametrize("sentence", MISUSED)
def test_a_wrong_argument_is_one_sentence_that_says_what_is_wanted(bunny, folder, sentence):
    """A library's error from five calls below says nothing to who copies a function."""
    model, processor = train.load_model(str(bunny))
    with pytest.raises(ValueError, match=re.escape(sentence.rstrip(": "))):
        MISUSED[sentence](processor, read(folder, authors(), log=len), model)


def test_one_index_is_of_epoch_0(folder):
    pairs = Pairs(read(folder, authors(), authors(id="b"), log=len))
    assert pairs[1] == pairs[0, 1] and pairs[1].key == (0, 1)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_image_tokens_of_each_family_in_a_text_are_bad(name, folder, tmp_path):
    """They would be taken for an image, or for a video, and stop the run."""
    processor = train.load_processor(str(families.write_family(name, tmp_path / "model")))
    parts = itertools.product((processor, processor.tokenizer), ("image", "boi", "video"))
    tokens = {getattr(part, f"{kind}_token", None) for part, kind in parts} - {None}
    assert processor.image_token in tokens
    for token in tokens:
        for field in "prompt", "chosen":
            record = authors(prompt="What?") | {field: f"Is {token}{token} it?"}
            if field != "prompt" or token != "<image>":  # which stands for images there
                assert f"'{field}' holds" in refusal(folder, record, processor=processor)


# --------------------------------------------------------------------------------------------------------- models


def without_patch_size(folder, to):
    shutil.copytree(folder, to)
    config = json.loads((to / "processor_config.json").read_text())
    write(to / "processor_config.json", config | {"patch_size": None})
    return to


def text_file(folder, name, content):
    folder.mkdir()
    write(folder / name, content)
    return folder


MODELS = {  # what the line must say: a folder, given that of a LLaVA and a new one
    "is an adapter: merge it first, by python examples/merge.py": lambda m, t: text_file(
        t, "adapter_config.json", {"peft_type": "LORA"}),
    "needs code of its own, which is not run here": lambda m, t: text_file(
        t, "config.json", {"model_type": "weird_vl", "auto_map": {"AutoConfig": "conf.W"}}),
    "its processor has no patch_size": without_patch_size,
}  # fmt: skip


@pytest.mark.parametrize("reason", MODELS)
def test_models_that_cannot_be_used_are_named_with_what_to_do(reason, llava, tmp_path):
    """The library speaks of missing keys, of an argument that does not exist here, or of NoneType."""
    with pytest.raises(BadInput, match=reason):
        train.load_processor(str(MODELS[reason](llava, tmp_path / "model")))


def test_code_of_a_model_that_the_library_knows_is_not_needed(llava, tmp_path):
    """Many folders of the hub still name the code that they came with."""
    shutil.copytree(llava, tmp_path / "model")
    config = json.loads((llava / "config.json").read_text())
    write(tmp_path / "model" / "config.json", config | {"auto_map": {"AutoConfig": "conf.W"}})
    assert train.load_processor(str(tmp_path / "model")).image_token == "<image>"


class Labelling:
    """A processor that returns labels, as PaliGemma's does."""

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, **options):
        encoded = self.processor(**options)
        return encoded | {"labels": encoded["input_ids"]}


def test_a_processor_that_returns_labels_is_refused(llava):
    """They would reach the model, which would compute a loss of its own."""
    with pytest.raises(BadInput, match="its processor returns labels"):
        make_batch(
            [pair("Which?", "No.", "Yes.", noise(1), noise(2))], Labelling(train.load_processor(str(llava)))
        )


def test_a_tokenizer_that_adds_an_end_is_refused(llava):
    """Two ends would be scored, the second after the answer is over."""
    processor = train.load_processor(str(llava))
    processor.tokenizer.add_eos_token = True
    with pytest.raises(BadInput, match="adds an end-of-sequence"):
        make_batch([pair("Which?", "No.", "Yes.", noise(1), noise(2))], processor)


# ------------------------------------------------------------------------------------- odd, and yet records


def test_no_record_writes_to_the_terminal(folder, capsys):
    """ESC in a name clears the screen or moves what was said: an error that nobody sees."""
    record = authors(id="\x1b[2J", img_path="\x1b[31m\x07.png")
    path = write(folder / "x.json", [record])
    assert data.run_command(data.check_file, [path]) == 2
    said = "".join(capsys.readouterr())
    assert "x1b[2J" in said and "x1b[31m" in said
    assert "\x1b" not in said and "\x07" not in said


def test_an_id_of_0_is_an_id(folder):
    """The first record of a file that counts from 0 would have the name of the second."""
    examples = read(folder, authors(id=1), authors(id=0), authors())
    assert [example.id for example in examples] == ["1", "0", "3"]


def test_a_question_about_the_template_is_whole(folder):
    """Cut at the last USER:, most of it would become system text, which some models drop."""
    question = "Who speaks after USER: here?"
    (example,) = read(folder, authors(prompt=f"Be brief. USER: <image>\n{question} ASSISTANT:"))
    assert data.texts_of(example.question) == ["Be brief.", question]


def test_a_conversation_as_long_as_the_prompt_does_not_replace_it(folder):
    """The prompt is what is asked; only a longer conversation says more than it."""
    say = lambda role, text: {"role": role, "content": text}
    answers = {name: [say("user", "Hi."), say("assistant", name)] for name in ("chosen", "rejected")}
    (example,) = read(folder, authors(prompt=[say("user", "What is it?")]) | answers)
    assert data.texts_of(example.question) == ["What is it?"] and example.chosen == "chosen"


@pytest.mark.parametrize(
    "width, reason", [(10_000, "truncated|broken"), (10_001, "more than 100 million pixels")]
)
def test_images_of_more_than_100_million_pixels_are_bad(tmp_path, width, reason):
    """They would take minutes and gigabytes; but a limit that is off by ten drops a phone's photographs. The
    files say that they are 10,000 pixels high, and hold none."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, 10_000, 8, 0, 0, 0, 0), b"IDAT" + b"x\x9c"]
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(BadInput, match=reason):
        open_image(tmp_path / "x.png")
