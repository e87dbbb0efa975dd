# A function makes one output, or nothing if the output is there. An output gets its name when it is complete: a script
# that was killed leaves none that is cut short.
# TRAIN_FLAGS='--micro-batch-size 8' and ANSWER_FLAGS='--batch-size 32' add flags to the commands.
# OPENAI_API_BASE may name a server that speaks OpenAI's protocol, with `temperature` and `max_tokens`.

PYTHON=${PYTHON:-python} SCORER="$W/scorers/bin/python"
cd "$ROOT"
mkdir -p "$W/data" "$W/runs" "$W/answers" "$W/scores/amber" "$W/scores/$JUDGE"

todo() { # todo OUTPUT [HELP]: is there no such output?
    output=$1 help=${2:-}
    if [ -e "$1" ]; then echo "there is $1"; return 1; fi
    echo "making $1"
}
trap 'echo "error: could not make $output. $help Run this script again to go on." >&2' ERR

unpack() { # unpack ZIP FOLDER OUTPUT: the zip's folder becomes the output, the zip goes
    rm -rf "$1.new"
    "$PYTHON" -m zipfile -e "$1" "$1.new"
    mv "$1.new/$2" "$3"
    rm -r "$1" "$1.new"
}

clone() { # clone OWNER/NAME COMMIT OUTPUT
    todo "$3" || return 0
    rm -rf "$3.new"
    git clone -q "https://github.com/$1" "$3.new"
    git -C "$3.new" checkout -q "$2"
    mv "$3.new" "$3"
}

pairs() {
    if todo "$W/data/vlfeedback_llava_10k.json"; then
        hf download fwnlp/mDPO-preference-data vlfeedback_llava_10k.json --repo-type dataset --local-dir "$W/data"
    fi
    todo "$W/data/merged_images" || return 0
    hf download MMInstruction/VLFeedback merged_images.zip --repo-type dataset --local-dir "$W/data"
    unpack "$W/data/merged_images.zip" merged_images "$W/data/merged_images"
}

questions_mmhal() { # 96 questions, their images and the scorer
    todo "$W/data/mmhal" || return 0
    hf download Shengcao1006/MMHal-Bench --repo-type dataset --exclude test_data.zip \
        --revision f5f49a938f45ed99e235b8519ba28f76832a2add --local-dir "$W/data/mmhal.new"
    mv "$W/data/mmhal.new" "$W/data/mmhal"
}

questions_objhal() { # 300 questions with their images, the scorer, and COCO's annotations for it
    clone RLHF-V/RLAIF-V 83d917b2e8118ca8e7877a796d72af9bb3e6b356 "$W/data/RLAIF-V"
    todo "$W/data/coco" || return 0
    curl -fL -o "$W/data/coco.zip" http://images.cocodataset.org/annotations/annotations_trainval2014.zip
    unpack "$W/data/coco.zip" annotations "$W/data/coco"
}

questions_amber() { # 1,004 questions, their images and the scorer
    clone junyangwang0410/AMBER 534babf6bbfcce2e735c26289dedfb21cef3c939 "$W/data/AMBER"
    local link=https://drive.google.com/file/d/1MaCHgtupcZUjf007anNl4_MV0o4DjXvl
    local by_hand="Download AMBER's images from $link (its README's link) and unpack them to this place."
    if todo "$W/data/AMBER/image/AMBER_1.jpg" "$by_hand"; then false; fi
}

scorers() { # an environment of their own: they need openai<1
    todo "$W/scorers/ready" || return 0
    "$PYTHON" -m venv "$W/scorers"
    "$SCORER" -m pip install -q "openai<1" spacy nltk jsonlines tqdm
    "$SCORER" -m spacy download en_core_web_lg
    "$SCORER" -m spacy download en_core_web_trf
    "$SCORER" -m nltk.downloader punkt punkt_tab wordnet averaged_perceptron_tagger averaged_perceptron_tagger_eng
    touch "$W/scorers/ready"
}

train() { # train RUN MODEL [FLAG...]
    todo "$W/runs/$1.done" || return 0
    local run="$W/runs/$1"
    if [ -e "$run/args.json" ]; then
        "$PYTHON" train.py --resume "$run" ${TRAIN_FLAGS:-}
    else
        "$PYTHON" train.py --data "$W/data/vlfeedback_llava_10k.json" --out "$run" --model "${@:2}" ${TRAIN_FLAGS:-}
    fi
    touch "$run.done"
}

answer() { # answer BENCHMARK RUN MODEL [--adapter FOLDER]
    local to="$W/answers/$2.$1.json" from
    case $1 in
        amber) from=("$W/data/AMBER/data/query/query_generative.json" --images "$W/data/AMBER/image") ;;
        mmhal) from=("$W/data/mmhal/response_template.json" --images "$W/data/mmhal/images") ;;
        objhal) from=("$W/data/RLAIF-V/eval/data/obj_halbench_300_with_image.jsonl") to="${to}l" ;;
    esac
    todo "$to" || return 0
    "$PYTHON" examples/benchmarks.py "$1" --questions "${from[@]}" --to "$to" --model "${@:3}" ${ANSWER_FLAGS:-}
}

score_amber() { # score_amber RUN
    todo "$W/scores/amber/$1.txt" || return 0
    env -C "$W/data/AMBER" "$SCORER" inference.py --inference_data "$W/answers/$1.amber.json" --evaluation_type g \
        > "$output.new"
    mv "$output.new" "$output"
}

score_mmhal() { # score_mmhal RUN
    todo "$W/scores/$JUDGE/$1.mmhal.json" || return 0
    "$SCORER" "$W/data/mmhal/eval_gpt4.py" --response "$W/answers/$1.mmhal.json" --evaluation "$output.new" \
        --api-key "${OPENAI_API_KEY:?is not set}" --gpt-model "$JUDGE"
    mv "$output.new" "$output"
}

score_objhal() { # score_objhal RUN: the scorer has its judge in its code, and writes beside the answers
    todo "$W/scores/$JUDGE/$1.objhal.json" || return 0
    local eval="$W/data/RLAIF-V/eval"
    sed "s/Chat(model=\"[^\"]*\"/Chat(model=\"$JUDGE\"/" "$eval/eval_gpt_obj_halbench.py" > "$eval/judged.py"
    grep -q "Chat(model=\"$JUDGE\"" "$eval/judged.py"
    rm -f "$W/answers/hall_$1.objhal_-1.json"
    env -C "$eval/.." "$SCORER" eval/judged.py --cap_file "$W/answers/$1.objhal.jsonl" --coco_path "$W/data/coco" \
        --use_gpt --openai_key "${OPENAI_API_KEY:?is not set}"
    mv "$W/answers/hall_$1.objhal_-1.json" "$output"
}

# The steps:
