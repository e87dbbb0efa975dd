"""A merged model, or one with an adapter, is the one that was trained; and half a model never stays."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train
from data import make_batch
from examples import answer, families, merge
from mdpo import response_logps
from test_mdpo import PAIRS, ROOT, move, with_lora, write


@pytest.fixture
def merged(adapted, run):
    """A function: flags -> what merge.py says of a merge of `adapted`, which fails if `status` is 2."""

    def merged(flags="", adapter=adapted, status=2):
        return run(merge, f"--adapter {adapter} --to to {flags}", status)

    return merged


def measured(monkeypatch, *numbers, answers=("same",) * 3):
    """The log-probs of two responses that each model is said to have, and its answers."""
    given = iter(zip(map(torch.tensor, numbers), answers))

    def measure(model, processor):
        assert model.dtype == torch.float32 and not model.training
        return next(given)

    monkeypatch.setattr(merge, "measure", measure)


@pytest.mark.parametrize("family, dtype", [("bunny", torch.float16), ("llava", torch.float32)])
def test_merged_model_loads_by_the_library_alone(family, dtype, merged, request):
    """Deployment: no load_model, no adapter, no remote code; and the same log-probs, up to the base's own
    precision. Weights that only their writer may read cannot be loaded by a server."""
    model, processor = with_lora(request.getfixturevalue(family))
    move(model)
    model.save_pretrained("run")
    expected = response_logps(model, make_batch(PAIRS, processor)).chosen.detach()
    out = merged(adapter="run", status=0)
    in_float32, as_saved = map(float, re.findall(r"within (\S+) nats, 4 of 4 answers the same", out))
    assert in_float32 < 1e-3 and as_saved < 0.1
    assert "already exists" in merged(adapter="run")
    again = transformers.AutoModelForImageTextToText.from_pretrained("to", dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained("to")
    with torch.no_grad():
        found = response_logps(again, make_batch(PAIRS, processor)).chosen
    torch.testing.assert_close(found, expected, atol=0.05, rtol=1e-3)
    assert len(merge.measure(again, processor)[0]) == 12  # of four questions y_w, y_l, and y_w once more
    assert {weight.dtype for weight in load_file("to/model.safetensors").values()} == {dtype}
    assert {path.stat().st_mode & 0o777 for path in Path("to").iterdir()} == {0o666 & ~train.UMASK}


def test_a_part_that_needs_torchvision_is_carried_along(tmp_path):
    """Without torchvision a part for videos is neither loaded nor saved, and with it the library refuses a
    processor that has lost this part. The hub has it in any of three files."""
    base, out = families.write_family("qwen2_5_vl", tmp_path / "base"), tmp_path / "out"
    of_images = json.loads((base / "processor_config.json").read_text())["image_processor"]
    write(base / "preprocessor_config.json", of_images)
    train.save_processor(train.load_processor(str(base)), out)
    files = [*base.glob("*processor_config.json")]
    assert [(out / file.name).read_bytes() for file in files] == [file.read_bytes() for file in files]
    assert len(files) == 3


def test_the_image_processor_is_not_torchvisions(bunny, llava, family, monkeypatch):
    """The library takes torchvision's where it can: a grey level apart, and so are the digits of a run."""
    load = transformers.AutoProcessor.from_pretrained

    def by_default(*args, **options):
        processor = load(*args, **options)
        processor.image_processor = None  # whatever it is in this environment
        return processor

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", by_default)
    for base in bunny, llava, family[0]:
        assert type(train.load_processor(str(base)).image_processor).__name__.endswith("Pil")


@pytest.mark.parametrize("off", [1.0, -1.0, math.nan])
def test_a_wrong_merge_is_not_saved(off, merged, monkeypatch):
    """A nat off either way: likelier answers are no better merge."""
    measured(monkeypatch, [0.0, 0.0], [0.0, off])
    assert f"{abs(off):.1e} nats off" in merged() and not os.listdir()


def test_merge_says_how_far_each_model_is_from_the_adapter(merged, monkeypatch):
    """These numbers decide whether to deploy. One response is likelier, one less likely."""
    measured(monkeypatch, [0.0, 0.0], [0.001, -0.002], [0.25, -0.5], answers=("abcd", "abcd", "abxd"))
    in_text_alone = {"dtype": None, "text_config": {"dtype": "bfloat16"}}  # as some new families have it
    monkeypatch.setattr(merge, "read_config", lambda base: in_text_alone)
    _, exact, saved, *_ = merged(status=0).splitlines()
    assert "merged in float32" in exact and "within 2.0e-03 nats, 4 of 4 answers" in exact
    assert "as saved, torch.bfloat16" in saved and "within 5.0e-01 nats, 3 of 4 answers" in saved


FULL_DISK = Mock(side_effect=OSError(28, "No space left on device"))


def test_weights_that_are_not_read_back_are_noticed():
    """A weight under a name that the library does not read is drawn anew, with a warning that scrolls by."""
    merged, again = torch.nn.Linear(1, 1).half(), torch.nn.Linear(1, 1)
    again.load_state_dict(merged.state_dict())
    assert merge.different_weights(merged, again) == []
    again.weight.data += 0.01
    del again.bias
    for one, other in (merged, again), (again, merged):
        assert merge.different_weights(one, other) == ["bias", "weight"]


@pytest.mark.parametrize("function, instead, says", [
    ("examples.merge.save_processor", FULL_DISK, "No space left"),
    ("examples.merge.load_processor", FULL_DISK, "No space left"),
    ("transformers.AutoModelForImageTextToText.from_pretrained", FULL_DISK, "No space left"),
    ("examples.merge.different_weights", Mock(side_effect=KeyboardInterrupt), ""),
    ("examples.merge.different_weights", lambda *models: ["x"], "1 weights are not read back, such as x"),
    ("pathlib.Path.rename", FULL_DISK, "No space left"),  # for the name, which it gets as a whole
    ("peft.LoraModel.merge_and_unload", lambda model, **options: model.unload(), "wrong, and not saved"),
])  # fmt: skip
def test_half_a_model_never_stays(function, instead, says, merged, monkeypatch):
    """Half a model looks like a whole one, and so does one that is not the model that was trained. And
    `merge.py --to x` deleted the folder x.tmp of whoever had one."""
    write(notes := Path("to.tmp/notes.txt"), "mine")
    monkeypatch.setattr(function, instead)
    assert says in merged(status=2 if says else 130)
    assert [*Path().rglob("*")] == [notes.parent, notes]


def test_the_new_folder_is_looked_at_before_the_work_and_after(merged, monkeypatch):
    """A merge takes minutes: a slip in a path shows before, and nothing of another command is overwritten."""
    notes = Path("to/config.json")
    monkeypatch.setattr(merge, "different_weights", lambda *models: write(notes, "mine") and [])
    assert "not empty" in merged()
    assert notes.read_text() == "mine" and [*Path().rglob("*")] == [notes.parent, notes]
    monkeypatch.setattr(merge, "load_tuned", lambda *arguments: pytest.fail("the base is read"))
    assert "error: no: is no folder" in merged("--to no/to")


@pytest.mark.parametrize("old, new", [(signal.SIG_DFL, signal.default_int_handler), [signal.SIG_IGN] * 2])
def test_a_terminated_merge_ends_as_an_interrupted_one(old, new, monkeypatch):
    """SIGTERM of a batch system, or SIGHUP of a terminal without nohup, would leave half a model behind."""
    outside = {number: signal.signal(number, old) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(sys, "argv", ["merge.py", "--help"])
    try:
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / "examples" / "merge.py"), run_name="__main__")
        assert [*map(signal.getsignal, outside)] == [new] * 2
    finally:
        [*map(signal.signal, outside, outside.values())]


def test_merge_takes_the_base_from_elsewhere(adapted, bunny, merged):
    """An adapter that was trained from a relative path names a folder that is not here."""
    path = Path(shutil.copytree(adapted, "adapter"), "adapter_config.json")
    config = json.loads(path.read_text())
    for base, message in (None, "names no base model"), ("./not/here", "./not/here"):
        write(path, config | {"base_model_name_or_path": base})
        assert message in merged(adapter="adapter")
    assert "4 of 4 answers the same" in merged(f"--model {bunny}", "adapter", 0)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize("file, content, reason", [
    (WEIGHTS, lambda weights: dict(sorted(weights.items())[::2]), "weights are missing"),
    (WEIGHTS, lambda weights: weights | {"base_model.x": torch.ones(1)}, "unexpected, such as base_model.x"),
    (WEIGHTS, lambda weights: {name: weight[:1] for name, weight in weights.items()}, "size"),
    (WEIGHTS, None, f"holds no adapter: no {WEIGHTS}"),
    (CONFIG, None, f"holds no adapter: no {CONFIG}"),
    (CONFIG, "{", "not valid JSON"),
    (CONFIG, '{"peft_type": "LORA", "target_modules": ["x"]}', "not found"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(file, content, reason, adapted, bunny, merged, run):
    """peft loads what fits and leaves the rest: the base was merged or shown under the adapter's name."""
    path = Path(shutil.copytree(adapted, "adapter"), file)
    if callable(content):
        save_file(content(load_file(path)), path)
    elif content:
        write(path, content)
    else:
        path.unlink()
    *_, message = merged(f"--model {bunny}", "adapter").splitlines()
    assert message.startswith("error: adapter: ") and reason in message
    assert message in run(answer, f"--model {bunny} --adapter adapter --question What?", 2)
    assert os.listdir() == ["adapter"]


def test_an_adapter_of_another_base_is_refused(adapted, finished, bunny, llava, merged):
    """A slip of the history in a shell; or two models of the same shapes, as a base that was trained again:
    merged with it, the adapter is noise. A run knows its base, also beside another run."""
    assert f"error: {adapted}: is no adapter of {llava}: " in merged(f"--model {llava}")
    for file in Path(shutil.copytree(bunny, "other")).glob("*.safetensors"):
        save_file({name: weight * 1.1 for name, weight in load_file(file).items()}, file)
    message = f"error: {finished}: is no adapter of other: it was trained on other weights\n"
    assert message in merged("--model other", finished)
    model, _ = answer.load_tuned(bunny, [finished, finished], "cpu")
    found = {name.split(".")[-2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == {"adapter_0", "adapter_1"}  # and none that was there to look


def test_an_adapter_is_loaded_where_its_model_is(bunny, finished, monkeypatch):
    """peft takes a GPU for it if there is one: on the CPU beside a full GPU, answers end in its error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    answer.load_tuned(bunny, finished, "cpu")
