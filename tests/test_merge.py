"""A merged model, or one with an adapter, is the one that was trained; and half a model never stays."""

import errno
import json
import math
import os
import re
import runpy
import shutil
import signal
import stat
import sys
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers

import train
from data import make_batch, run_command
from examples import answer, families, merge
from mdpo import LogPs, response_logps
from test_mdpo import PAIRS, ROOT, move, with_lora, write
from tests.helpers import one_line_of


@pytest.fixture
def merged(adapted, tmp_path, capsys):
    """A function: flags -> (exit status, what merge.py prints, or its error) of a merge of `adapted`."""

    def merged(*flags, adapter=adapted):
        capsys.readouterr()
        status = run_command(merge.run, ["--adapter", str(adapter), "--to", str(tmp_path / "to"), *flags])
        return status, one_line_of(capsys, status) if status == 2 else capsys.readouterr().out

    return merged


@pytest.fixture
def measures(monkeypatch):
    """A function: for each model, log-probs of a chosen and of a rejected answer, 0 else, and its answers."""

    def measures(*numbers, answers=("same",) * 3):
        numbers, answers = iter(numbers), iter(answers)

        def logps(*arguments):
            values = torch.zeros(3, 4)
            values[0, 1], values[1, 2] = next(numbers)
            return LogPs(*values)

        monkeypatch.setattr(merge, "response_logps", logps)
        monkeypatch.setattr(merge, "generate_answers", lambda *arguments: [*next(answers)])

    return measures


@pytest.mark.parametrize("family, dtype", [("bunny", torch.float16), ("llava", torch.float32)])
def test_merged_model_loads_by_the_library_alone(family, dtype, merged, tmp_path, request):
    """Deployment: no load_model, no adapter, no remote code; and the same log-probs, up to the base's own
    precision. Weights that only their writer may read cannot be loaded by a server."""
    model, processor = with_lora(request.getfixturevalue(family))
    move(model)
    model.save_pretrained(tmp_path / "run")
    expected = response_logps(model, make_batch(PAIRS, processor)).chosen.detach()
    status, out = merged(adapter=tmp_path / "run")
    in_float32, as_saved = map(float, re.findall(r"within (\S+) nats, 4 of 4 answers the same", out))
    assert status == 0 and in_float32 < 1e-3 and as_saved < 0.1
    folder = tmp_path / "to"
    again = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = response_logps(again, make_batch(PAIRS, transformers.AutoProcessor.from_pretrained(folder)))
    torch.testing.assert_close(found.chosen, expected, atol=0.05, rtol=1e-3)
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {dtype}
    if os.name == "posix":
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~train.UMASK}
    assert "already exists" in merged(adapter=tmp_path / "run")[1]


@pytest.mark.parametrize("layout", ["a file of its own", "inside the processor's", "the image processor's"])
def test_a_part_that_needs_torchvision_is_carried_along(layout, tmp_path):
    """Without torchvision a part for videos is neither loaded nor saved, and with it the library refuses a
    processor that has lost this part. The hub has it in three ways."""
    base, out = families.write_family("qwen2_5_vl", tmp_path / "base"), tmp_path / "out"
    processor = json.loads((base / "processor_config.json").read_text())
    video = json.loads((base / "video_preprocessor_config.json").read_text())
    if layout != "a file of its own":
        (base / "video_preprocessor_config.json").unlink()
        write(base / "processor_config.json", processor | {"video_processor": video})
    if layout == "the image processor's":
        (base / "processor_config.json").unlink()
        named = {"processor_class": processor["processor_class"]}
        write(base / "preprocessor_config.json", processor["image_processor"] | named)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*processor_config.json"))
    train.save_processor(train.load_processor(str(base)), out)
    for file in base.glob("*processor_config.json"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    train.load_processor(str(out))


@pytest.mark.parametrize("family", ["bunny", "llava", *families.FAMILIES])
def test_the_image_processor_is_not_torchvisions(family, tmp_path, request, monkeypatch):
    """The library takes torchvision's where it is installed: a grey level apart, and so are the digits of a
    run."""
    ours = family in ("bunny", "llava")
    base = request.getfixturevalue(family) if ours else families.write_family(family, tmp_path / family)
    load = transformers.AutoProcessor.from_pretrained

    def by_default(*args, **options):
        processor = load(*args, **options)
        processor.image_processor = None  # whatever it is in this environment
        return processor

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", by_default)
    assert type(train.load_processor(str(base)).image_processor).__name__.endswith("Pil")


def test_an_adapter_that_stays_unmerged_is_noticed(merged, tmp_path, monkeypatch):
    """A deployed model that is not the one that was trained and evaluated, and nobody is told."""
    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", lambda model, **options: model.unload())
    status, message = merged()
    assert status == 2 and "the merge is wrong, and not saved" in message and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("off", [1.0, -1.0, math.nan])
def test_a_wrong_merge_is_not_saved(off, measures, merged, tmp_path):
    """A nat off either way: likelier answers are no better merge."""
    measures((0, 0), (0, off))
    status, message = merged()
    assert status == 2 and f"{abs(off):.1e} nats off" in message and not [*tmp_path.iterdir()]


def test_merge_says_how_far_each_model_is_from_the_adapter(measures, merged, monkeypatch):
    """These numbers decide whether to deploy. Log-probs are given here: of the adapter 0; merged -0.002 at
    one rejected answer and 0.001 at a chosen one; as saved -0.5 and 0.25. Answers: 4 of 4, and 3 of 4."""
    measures((0, 0), (0.001, -0.002), (0.25, -0.5), answers=("abcd", "abcd", "abxd"))
    in_text_alone = {"dtype": None, "text_config": {"dtype": "bfloat16"}}  # as some new families have it
    monkeypatch.setattr(merge, "read_config", lambda base: in_text_alone)
    _, exact, saved = merged()[1].splitlines()
    assert "merged in float32" in exact and "within 2.0e-03 nats, 4 of 4 answers" in exact
    assert "as saved, torch.bfloat16" in saved and "within 5.0e-01 nats, 3 of 4 answers" in saved


@pytest.mark.parametrize("change", ["off", "missing"])
def test_a_folder_that_is_not_read_back_as_merged_is_removed(change, measures, merged, tmp_path, monkeypatch):
    """A weight under a name that the library does not read is drawn anew, with a warning that scrolls by."""
    from_pretrained = transformers.AutoModelForImageTextToText.from_pretrained

    def read(*arguments, **options):
        model = from_pretrained(*arguments, **options)
        if change == "off":
            model.lm_head.weight.data[0, 0] += 1e-3
        else:
            del model.lm_head.weight
        return model

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", read)
    measures(*[(0, 0)] * 3)
    status, message = merged()
    assert status == 2 and "removed, 1 weights are not read back" in message and not [*tmp_path.iterdir()]


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def half_a_model(model, folder, **options):
    write(folder / "model.safetensors", "half")
    full_disk()


STOPS = {  # what stops a merge: where, by what, the exit status
    "half a model on a full disk": (transformers.PreTrainedModel, "save_pretrained", half_a_model, 2),
    "no room for the processor": (merge, "save_processor", full_disk, 2),
    "not read back": (transformers.AutoModelForImageTextToText, "from_pretrained", full_disk, 2),
    "Ctrl-C while it is compared": (merge, "different_weights", interrupted, 130),
    "no room for its name": (Path, "rename", full_disk, 2),  # which it gets as a whole
}


@pytest.mark.parametrize("stop", STOPS)
def test_half_a_model_never_stays_and_no_folder_of_the_users_goes(stop, merged, tmp_path, monkeypatch):
    """`merge.py --to x` deleted the folder x.tmp of whoever had one; half a model looks like a whole one."""
    *place, instead, expected = STOPS[stop]
    write(tmp_path / "to.tmp" / "notes.txt", "mine")
    monkeypatch.setattr(*place, instead)
    status, message = merged()
    assert status == expected and (status == 130 or "No space left" in message)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "to.tmp"]


def test_a_folder_that_appears_meanwhile_is_not_touched(merged, tmp_path, monkeypatch):
    """A merge takes minutes. Files of a folder that another command had made meanwhile were overwritten."""
    notes = tmp_path / "to" / "config.json"
    monkeypatch.setattr(merge, "different_weights", lambda *models: write(notes, "mine") and [])
    assert "another of this name has appeared" in merged()[1]
    assert notes.read_text() == "mine" and [*tmp_path.rglob("*")] == [notes.parent, notes]


def test_the_folder_of_the_merged_one_is_looked_for_before_the_work(merged, tmp_path, monkeypatch):
    """A slip in a path was found out when a large model had been read and merged."""
    monkeypatch.setattr(merge, "load_tuned", lambda *arguments: pytest.fail("the base is read"))
    assert f"{tmp_path / 'no'}: is no folder" in merged("--to", str(tmp_path / "no" / "to"))[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminated_merge_ends_as_an_interrupted_one(number, ignored, monkeypatch):
    """A batch system sends SIGTERM, and a terminal that closes SIGHUP, unless nohup has it ignored. They end
    Python where it stands: half a model would stay."""
    outside = {one: signal.getsignal(one) for one in train.STOPPING}
    monkeypatch.setattr(sys, "argv", ["merge.py", "--help"])
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / "examples" / "merge.py"), run_name="__main__")
        assert signal.getsignal(number) == (signal.SIG_IGN if ignored else signal.default_int_handler)
    finally:
        [*map(signal.signal, outside, outside.values())]


def test_merge_takes_the_base_from_elsewhere(adapted, bunny, merged, tmp_path):
    """An adapter that was trained from a relative path names a folder that is not here."""
    folder = shutil.copytree(adapted, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, message in (None, "names no base model"), ("./not/here", "./not/here"):
        write(folder / "adapter_config.json", config | {"base_model_name_or_path": base})
        assert message in merged(adapter=folder)[1]
    assert "4 of 4 answers the same" in merged("--model", str(bunny), adapter=folder)[1]


# -------------------------------------------------------------------------------- adapters that do not fit


def spoil(folder, mistake):
    """An adapter's weights with this mistake; or without this file; or with this configuration."""
    weights = safetensors.torch.load_file(file := folder / "adapter_model.safetensors")
    other = {name.replace("layers.", "blocks."): weight + 1 for name, weight in weights.items()}
    spoiled = {
        "other names": other,
        "half of them": {name: weights[name] for name in sorted(weights)[::2]},
        "names beside": weights | other,
        "none": {},
        "another rank": {n: torch.cat([v, v], int("lora_B" in n)) for n, v in weights.items()},
        "one row less": {n: v[:-1] if "lora_A" in n else v for n, v in weights.items()},
    }
    if mistake in spoiled:
        safetensors.torch.save_file(spoiled[mistake], file)
    elif mistake.startswith("adapter_"):
        (folder / mistake).unlink()
    elif mistake == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        write(folder / "adapter_config.json" if mistake[0] in "{[" else file, mistake)


MISFITS = {  # the mistake: the reason that is said
    "other names": "weights are missing, such as base_model",
    "half of them": "weights are missing",
    "names beside": "weights are unexpected, such as base_model",
    "none": "weights are missing",
    "another rank": "size",
    "one row less": "size",
    "truncated": "not fully covered",
    "<html>": "header",
    "adapter_model.safetensors": "holds no adapter: no adapter_model.safetensors",
    "adapter_config.json": "holds no adapter: no adapter_config.json",
    "{": "not valid JSON",
    '{"peft_type": "LOFA"}': "LOFA",
    "{}": "is no adapter of",
    "[]": "not in a known form",
    '{"peft_type": "LORA", "target_modules": ["x"]}': "not found",
}


@pytest.mark.parametrize("mistake", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused(mistake, adapted, bunny, merged, tmp_path, capsys):
    """peft loads what fits and leaves the rest as it was: the base model was merged, evaluated or shown under
    the adapter's name."""
    spoil(folder := shutil.copytree(adapted, tmp_path / "adapter"), mistake)
    status, message = merged("--model", str(bunny), adapter=folder)
    assert status == 2 and message.startswith(f"error: {folder}: ") and MISFITS[mistake] in message
    argv = ["--model", str(bunny), "--adapter", str(folder), "--question", "What?"]
    assert one_line_of(capsys, run_command(answer.run, argv)) == message
    assert [*tmp_path.iterdir()] == [folder]


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(finished, bunny, merged, tmp_path, capsys):
    """Two models of a kind, or a base that was trained again: merged with it, the adapter is noise. A run knows
    its base, also beside another run."""
    other = shutil.copytree(bunny, tmp_path / "other")
    for file in other.glob("*.safetensors"):
        weights = safetensors.torch.load_file(file)
        safetensors.torch.save_file({name: weight * 1.1 for name, weight in weights.items()}, file)
    message = merged("--model", str(other), adapter=finished)[1]
    assert message == f"error: {finished}: is no adapter of {other}: it was trained on other weights"
    argv = ["--model", str(other), "--adapter", str(finished), "--question", "What?"]
    assert one_line_of(capsys, run_command(answer.run, argv)) == message
    model, _ = answer.load_tuned(bunny, [finished, finished], "cpu")
    found = {name.split(".")[-2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == {"adapter_0", "adapter_1"}  # and none that was there to look


def test_an_adapter_of_another_model_is_refused(adapted, llava, merged):
    """The wrong --model is a slip of the history in a shell."""
    assert f"error: {adapted}: is no adapter of {llava}: " in merged("--model", str(llava))[1]
