"""Protects `examples/reproduce.py`: the paper's values, the scripts that it prints, the tables it collects.

The hub, the scorers and their judge are stand-ins: programs of the same names, arguments and outputs."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from examples import benchmarks, reproduce
from test_mdpo import ROOT, write
from tests.helpers import drawn

# Rows as "flags: values". Flags are those of the README's table "flags to add to the first command", none for
# mDPO's, base for no training. Values are as the paper prints them, Table 5's with the overall score.
ROWS = {
    "table1": """base: 2.11 0.58 43.0 8.9 9.8 75.6 64.9 6.0 | DPO: 2.28 0.56 44.3 7.6 7.9 74.1 58.9 4.8 |
                 : 2.96 0.42 27.0 4.6 4.9 67.4 37.7 2.4 | base: 2.19 0.57 54.7 15.9 7.4 51.8 34.7 4.1 |
                 DPO: 2.14 0.65 49.0 13.0 6.5 55.1 34.5 2.3 | : 2.39 0.54 35.7 9.8 4.4 52.4 24.5 2.4""",
    "table2": """: 2.96 0.42 27.0 4.6 | --no-conditional: 2.36 0.53 40.3 7.1 |
                 --anchors none: 2.50 0.48 34.3 5.7 | DPO: 2.28 0.56 44.3 7.6""",
    "table3": """--reject random: 2.81 0.46 40.7 6.6 | : 2.96 0.42 27.0 4.6 |
                 --crop 0.2 0.5: 2.92 0.42 33.7 5.4 | --reject moco: 2.82 0.44 32.3 5.9""",
    "table4": """: 2.96 0.42 27.0 4.6 | --anchors chosen rejected: 2.98 0.39 29.3 5.0 |
                 --anchors chosen rejected image_rejected: 2.85 0.40 34.7 6.1""",
    "table5": """base: 2.11 3.92 0.83 2.17 2.33 2.67 2.25 1.75 1.00 |
                 DPO: 2.28 3.25 1.50 1.42 2.50 2.67 4.25 1.75 0.92 |
                 : 2.96 3.08 4.17 2.00 3.50 3.25 4.08 2.17 1.42""",
    "figure1": "--no-image: | DPO: 2.28 | : 2.96",
    "figure3": "DPO: | :",
    "figure4": "DPO: | :",
    "figure5": """DPO --limit 2500: | --limit 2500: | DPO --limit 5000: | --limit 5000: |
                  DPO: 2.28 0.56 | : 2.96 0.42""",
}


@pytest.mark.parametrize("name", ROWS)
def test_papers_values_and_readmes_flags_stand_in_their_own_rows(name, run):
    """A wrong digit sends someone after a difference that is not there, and so does a run with another row's
    flags. Nothing is found yet: empty cells. Bases are answered without an adapter."""
    rows = ROWS[name].replace("DPO", "--no-conditional --anchors none").split("|")
    text, lines = run(reproduce, f"--collect {name} --work ."), run(reproduce, name).split("\n")
    assert text.rstrip().count(reproduce.TABLES[name].note)
    cells = re.findall(r"(?m)^(\S+): paper(.*)\n  found(.*)$", text)
    for row, (title, paper, found) in zip(rows, cells, strict=True):
        flags, values = row.strip().split(":")
        assert (paper.split(), found) == (values.split(), "")
        model = "llava-hf/llava-1.5-7b-hf" if title.startswith("llava") else "BAAI/Bunny-v1_0-3B"
        trained = [line for line in lines if line.startswith(f"train {title} ")]
        answered = {line.split(" ", 3)[3] for line in lines if re.match(rf"answer \w+ {title} ", line)}
        if flags == "base":
            assert not trained and answered == {model}
        else:
            assert trained == [f"train {title} {model} {flags}".rstrip()]
            assert answered == {f'{model} --adapter "$W/runs/{title}"'}
            train.parse_args(["--model", model, "--data", "x", *flags.split()])


def test_list_has_every_table_and_figure_with_runs_questions_scorers_and_cells(run, capsys):
    """What is not listed is not known to be possible. The paper has five tables and five figures."""
    parts = dict(part.split(":", 1) for part in run(reproduce, "--list").split("\n\n"))
    assert [*parts] == [f"{kind}{i}" for kind in ("table", "figure") for i in range(1, 6)]
    assert re.search(r"\n  bunny-no-conditional +--no-conditional\n", parts["table2"])
    assert re.search(r"(?m)^  AMBER, .* inference.py: CHAIRs, Cover, HalRate, Cog$", parts["table1"])
    assert parts["figure3"].endswith("MMHalBench, 96 questions: answers")  # not scored
    assert run(reproduce, "--list table2 table2") == f"table2:{parts['table2']}\n"
    with pytest.raises(SystemExit):
        run(reproduce, "--help")
    text = capsys.readouterr().out
    assert "figure5; all" in text and text.count("(default:") == 4


def test_every_script_is_accepted_by_bash(run, tmp_path, monkeypatch):
    """The paths hold what a shell would take for its own. A model's folder is found from anywhere."""
    work = tmp_path / 'it\'s $(here) & "there"'
    model = work / "my model"
    model.mkdir(parents=True)
    monkeypatch.chdir(work)
    text = run(reproduce, "--work . --models 'my model' llava-hf/x")
    commands = map(shlex.split, re.findall("(?m)^(?:train|answer .*) (?:bunny|llava).*", text))
    assert {words[2 + (words[0] == "answer")] for words in commands} == {str(model), "llava-hf/x"}
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    (line,) = re.findall("^ROOT=.*$", text, re.MULTILINE)
    assert line.endswith(" JUDGE=gpt-4.1-2025-04-14")
    assert subprocess.check_output(["bash", "-c", f'{line}; printf %s "$W"'], text=True) == str(work)


@pytest.mark.parametrize("name, disk, training, calls", [
    # 6.4 Bunny + 14.1 LLaVA + 2 * 1.5 + 2 * 2.6 adapters + 5.8 pairs; 2 * 1.0 + 2 * 2.3; 6 * 396
    ("table1", "34 GB", "4 runs, 6.6 hours", "2376"),
    # 6.4 + 6 * 1.5 + 5.8; (2 * 0.25 + 2 * 0.5 + 2) * 1.0; 6 * 96
    ("figure5", "21 GB", "6 runs, 3.5 hours", "576"),
    ("figure3", "15 GB", "2 runs, 2.0 hours", None),
])  # fmt: skip
def test_script_begins_with_its_price(name, disk, training, calls, run):
    """Somebody rents a disk, a GPU and a judge by these lines, which are predictions and say so."""
    head, _, rest = run(reproduce, f"{name} --judge j-1").partition("set -E")
    assert f"# Disk: {disk}" in head and f"# Training: {training} on one H200 (predicted)" in head
    judged = calls is not None
    assert (f"# Judge: {calls} calls of j-1," in head) == ("rows of one judge" in head) == judged
    assert ("\nscore_mmhal bunny" in rest) == judged


@pytest.mark.parametrize("line, message", [
    ("figure2", "figure2: nothing to run"),
    ("table6", "invalid choice: 'table6'"),
    ("table1 --judge a/b", "--judge a/b: has to do as a folder's name"),
    ("table1 --judge $(x)", "has to do as a folder's name"),
    ("table1 --judge ..", "has to do as a folder's name"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_in_one_line(line, message, run):
    """A judge's name becomes a folder and a part of commands: any other text would run as such."""
    error = run(reproduce, line, 2)
    assert message in error and error.count("\n") == 1


JUDGE = "judge-2"
IMAGE = drawn(99)

# `hf`, `git` and `curl` note their call, and copy from a folder in which the hub's files lie.
STAND_IN = """#!/bin/bash
call="$(basename "$0") $*" to="${@: -1}"
echo "$call" >> "$HERE/log"
case $call in
    "hf download fwnlp/mDPO-preference-data "* | "hf download MMInstruction/VLFeedback "*) from=$3 ;;
    "hf download Shengcao1006/MMHal-Bench "*) from=mmhal/. ;;
    "git clone "*) cp -r "$HERE/store/$(basename "$3")" "$4"; exit ;;
    "curl "*) cp "$HERE/store/annotations_trainval2014.zip" "$3"; exit ;;
    *) exit ;;
esac
mkdir -p "$to"
cp -r "$HERE/store/$from" "$to"
"""
# The project's own programs run in the tests' process, which has imported torch: two pipes lead to it.
PYTHON = """#!/bin/bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip" | "-m spacy" | "-m nltk.downloader") echo "$0 $*" >> "$HERE/log" ;;
    train.py* | examples/benchmarks.py*)
        echo "$*" >> "$HERE/log"
        printf '%q ' "$@" > "$HERE/ask"
        exit "$(cat "$HERE/reply")" ;;
    *) exec "$REAL" "$@" ;;
esac
"""
# Scorers: the arguments and outputs of the official ones, which differ between the runs by the file's name.
ARGUMENTS = """
import json, os, pathlib, sys
given = [word for word in sys.argv[1:] if word != "--use_gpt"]
args = dict(zip(given[::2], given[1::2]))
"""
INFERENCE = """
path = pathlib.Path(args["--inference_data"])
assert args["--evaluation_type"] == "g" and os.path.exists("data/annotations.json")
assert [sorted(answer) for answer in json.loads(path.read_text())] == [["id", "response"]] * 3
n = ["bunny", "bunny-dpo", "bunny-mdpo"].index(path.name.split(".")[0])
for metric, value in ("CHAIR", 10.5), ("Cover", 50.0), ("Hal", 30.0), ("Cog", 2.0):
    print(f"{metric}:\\t\\t {value + n}")
"""
EVAL_GPT4 = """
records = json.load(open(args["--response"]))
assert len(records) == 3 and args["--api-key"] == "secret" and all("model_answer" in r for r in records)
said = [f"So.\\nRating: {n}, very" for n in ((6, 4, 2) if "mdpo" in args["--response"] else (1, 0, 3))]
replies = [{"model": args["--gpt-model"], "choices": [{"message": {"content": text}}]} for text in said]
json.dump(replies, open(args["--evaluation"], "w"))
"""
OBJHAL = """
def Chat(model, timeout_sec, openai_apikey):
    assert model == "judge-2", model
Chat(model="gpt-3.5-turbo-0613", timeout_sec=100, openai_apikey="")
assert "--use_gpt" in sys.argv
assert args["--openai_key"] == "secret" and os.path.exists("./eval/data/synonyms_refine.txt")
assert os.path.exists(args["--coco_path"] + "/captions_val2014.json")
path = pathlib.Path(args["--cap_file"])
records = [json.loads(line) for line in open(path)]
assert len(records) == 3 and all({"image_id", "prompt", "text"} <= set(r) for r in records)
metrics = {"CHAIRs": 1 / 3, "CHAIRs_refine": 0.5, "CHAIRi": 0.125}
result = open(path.parent / f"hall_{path.stem}_-1.json", "x")  # as there, no file is written over
json.dump({"sentences": [], "overall_metrics": metrics}, result)
"""
PAIR = '{"img_path": "0.jpg", "prompt": "What colour is it?", "chosen": "red.", "rejected": "blue."}'
QUERY = '{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}'
QUESTION = """{"question_type": "attribute", "image_content": [], "image_src": "https://x.org/0_o.jpg",
"question": "What colour?", "gt_answer": "Red.", "model_answer": ""}"""
PICTURE = f'{{"question": "Why?", "image": "{base64.b64encode(IMAGE.encode()).decode()}", "image_id": 1}}\n'
STORE = {  # the hub's and the repositories' files, each by its own name, with three records instead of many
    "vlfeedback_llava_10k.json": f"[{PAIR}, {PAIR}, {PAIR}]",
    "merged_images/0.jpg": IMAGE,
    "annotations/captions_val2014.json": "{}",
    "mmhal/response_template.json": f"[{QUESTION}, {QUESTION.replace('attribute', 'other')}, {QUESTION}]",
    "mmhal/eval_gpt4.py": ARGUMENTS + EVAL_GPT4,
    "mmhal/images/0_o.jpg": IMAGE,
    "AMBER/data/query/query_generative.json": f"[{QUERY}, {QUERY}, {QUERY}]",
    "AMBER/data/annotations.json": "[]",
    "AMBER/inference.py": ARGUMENTS + INFERENCE,
    "RLAIF-V/eval/data/obj_halbench_300_with_image.jsonl": 3 * PICTURE,
    "RLAIF-V/eval/data/synonyms_refine.txt": "person",
    "RLAIF-V/eval/eval_gpt_obj_halbench.py": ARGUMENTS + OBJHAL,
}
OURS = {"train.py": train.main, "examples/benchmarks.py": benchmarks.run}

# At its end it asks for nothing. If a program raises, nobody replies, and `timeout` ends the script.
RUN = """
export HERE="$PWD" PATH="$PWD/bin:$PATH" REAL="$1" OPENAI_API_KEY="$2"
export TRAIN_FLAGS="--epochs 1 --batch-size 2 --lora-rank 2 --workers 0 --device cpu"
export ANSWER_FLAGS="--max-new-tokens 2 --device cpu"
trap ': > ask' EXIT
timeout 600 bash script.sh > output 2>&1
"""


@pytest.fixture
def bash(tmp_path, monkeypatch):
    """A function that runs script.sh among stand-ins -> (exit status, its output, the calls that it made)."""
    monkeypatch.chdir(tmp_path)
    for path, content in STORE.items():
        write(Path("store", path), content)
    shutil.make_archive("store/merged_images", "zip", "store", "merged_images")
    shutil.make_archive("store/annotations_trainval2014", "zip", "store", "annotations")
    for name, text in {"hf": STAND_IN, "git": STAND_IN, "curl": STAND_IN, "python": PYTHON}.items():
        os.chmod(write(Path("bin", name), text), 0o755)
    os.mkfifo("ask")
    os.mkfifo("reply")

    def bash(key=""):
        Path("log").write_text("")
        process = subprocess.Popen(["bash", "-c", RUN, "bash", sys.executable, key])
        while argv := shlex.split(Path("ask").read_text()):
            Path("reply").write_text(str(OURS[argv[0]](argv[1:])))
        return process.wait(), Path("output").read_text(), Path("log").read_text()

    return bash


def test_table_from_nothing_to_its_cells(bash, run, monkeypatch):
    """The whole way. It stops where something has to be done by hand (AMBER's images) or a key is missing,
    goes on there, makes nothing twice, and resumes a run that has arguments but no mark of its end.

    By hand: mDPO's ratings 6, 4, 2 have mean 4, one of three is below 3, and attribute's, first and last,
    have mean 4. The others' 1, 0, 3 have mean 1.33, two are below 3. CHAIRs is that of all answers, 33.3."""
    table = reproduce.TABLES["table1"]
    monkeypatch.setitem(reproduce.TABLES, "table1", table._replace(runs=reproduce.BUNNY))
    base, work = ROOT / "examples" / "base", Path("my work").resolve()
    flags = f"--work 'my work' --judge {JUDGE} --models {base} {base}"
    write(Path("script.sh"), run(reproduce, f"table1 table5 {flags}"))

    status, output, calls = bash()
    assert status != 0 and output.count("error:") == 1 and "train.py" not in calls
    assert "AMBER/image/AMBER_1.jpg. Download AMBER's images from https://drive.google.com" in output
    assert [*map(calls.count, ("hf download", "git clone", "checkout", "curl "))] == [3, 2, 2, 1]

    write(work / "data/AMBER/image/AMBER_1.jpg", IMAGE)
    status, output, calls = bash()
    assert status != 0 and "OPENAI_API_KEY: is not set" in output
    commands = "hf ", "git ", "train.py", "benchmarks.py", "--adapter"
    assert [*map(calls.count, commands)] == [0, 0, 2, 9, 6]
    assert len([*work.glob("scores/amber/*.txt")]) == 3 and not [*work.glob(f"scores/{JUDGE}/*")]
    assert calls.count("scorers/bin/python -m spacy download en_core_web_") == 2

    write(work / "answers/hall_bunny.objhal_-1.json", "cut sh")  # left by a scorer that was killed
    (work / "runs/bunny-dpo.done").unlink()
    status, output, calls = bash("secret")
    assert status == 0 and output.count("making") == 7
    assert calls.startswith(f"train.py --resume {work}/runs/bunny-dpo --epochs 1") and calls.count("\n") == 1
    status, output, calls = bash("secret")
    assert status == 0 and calls == "" and "making" not in output

    began = json.loads((work / "runs/bunny-dpo/args.json").read_text())
    assert (began["conditional"], began["anchors"]) == (False, ["none"])
    text = run(reproduce, "--collect table1 table5 --work 'my work'")
    assert [" ".join(found.split()) for found in re.findall(rf"(?m)^  {JUDGE}(.*)", text)] == [
        "1.33 0.67 33.3 12.5 10.5 50.0 30.0 2.0",
        "1.33 0.67 33.3 12.5 11.5 51.0 31.0 3.0",
        "4.00 0.33 33.3 12.5 12.5 52.0 32.0 4.0",
        *("1.33 2.00 0.00", "1.33 2.00 0.00", "4.00 4.00 4.00"),
    ]
    assert "compare rows of one judge" in text

    # A scorer that names its judge in another way would use it under this judge's name.
    scorer = work / "data/RLAIF-V/eval/eval_gpt_obj_halbench.py"
    scorer.write_text(scorer.read_text().replace('Chat(model="', 'dict(model="'))
    (scores := work / f"scores/{JUDGE}/bunny.objhal.json").unlink()
    status, output, calls = bash("secret")
    assert status != 0 and "objhal" in output and not scores.exists()


def replies(*texts, model=JUDGE):
    return [{"model": model, "choices": [{"message": {"content": text}}]} for text in texts]


def collected(run, outputs, status=0):
    """What is collected where scorers wrote these files, {path: content}. Two answers are there, too."""
    write(Path("answers/bunny.mmhal.json"), [{"question_type": "other"}] * 2)
    for path, content in outputs.items():
        write(Path("scores", path), content)
    return run(reproduce, "--collect table1 --work .", status)


def test_each_judge_has_rows_of_its_own_and_is_read_as_by_the_official_scorer(run):
    """Two judges' scores in one row would be compared. What is missing stays empty, AMBER needs no judge. As
    eval_gpt4.py: "rating: N", once; a judge that writes otherwise makes every model bad, unseen. A server may
    answer by another model than it was asked for, which is named."""
    said = {"a": "Rating: 5, very", "b": "rating: 2", "c": "**Rating:** 5", "d": "Rating: 5 or Rating: 4"}
    outputs = {f"{judge}/bunny.mmhal.json": replies(text, text, model="a") for judge, text in said.items()}
    outputs["b/bunny.objhal.json"] = '{"overall_metrics": {"CHAIRs": 0.27, "CHAIRi": 0.046}}'
    outputs["amber/bunny.txt"] = "CHAIR:\t\t 4.9\nCover:\t\t 67.4\nHal:\t\t 37.7\nCog:\t\t 2.4 \n"
    text = collected(run, outputs)
    assert text.split("\n")[3:8] == [
        "bunny: paper       2.11   0.58     43.0    8.9     9.8     75.6   64.9     6.0",
        "  a                5.00   0.00                     4.9     67.4   37.7     2.4",
        "  b                2.00   1.00     27.0    4.6     4.9     67.4   37.7     2.4",
        "  c                0.00   1.00                     4.9     67.4   37.7     2.4",
        "  d                0.00   1.00                     4.9     67.4   37.7     2.4",
    ]
    assert re.findall(r"(\w)/bunny.mmhal.json: 2 replies without a single rating count 0", text) == [*"cd"]
    assert re.findall(r"(\w)/bunny.mmhal.json: judged by a\n", text) == [*"bcd"]


@pytest.mark.parametrize("path, content", [
    ("amber/bunny.txt", "Traceback"),
    ("judge-2/bunny.objhal.json", '{"sentences": []}'),
    ("judge-2/bunny.mmhal.json", replies("Rating: 3")),  # one reply to two answers
    ("judge-2/bunny.mmhal.json", '[{"error": "quota"}, {"error": "quota"}]'),
])  # fmt: skip
def test_output_that_is_not_its_scorers_is_refused_by_name(path, content, run):
    """An empty cell means that nothing was run, so a broken file must not look like one."""
    error = collected(run, {path: content}, status=2)
    assert f"{path}: is not what its scorer writes" in error and error.count("\n") == 1
