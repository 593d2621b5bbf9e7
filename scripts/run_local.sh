#!/usr/bin/env bash
# The whole pipeline on this machine: train, infer without and with the adapter, report.

set -Eeuo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly STARTED_IN=$PWD

# Every setting once: variable and flag (--base_model for BASE_MODEL), default here, meaning.
# Without a default here, that of lorabatch holds.
SETTINGS='
BASE_MODEL||base model: folder, .gguf file, name [distilgpt2, or smollm2-135m where it cannot be had]
TRAIN_PATH||training documents
VAL_PATH||validation documents (none: no evaluation)
PROMPTS||prompts to complete
SAVE_DIR||run folder of the training, adapter at its root [results/lora-MODEL]
OUTPUT_DIR||run folder of the inference with the adapter [results/infer-MODEL]
BASE_OUTPUT_DIR||run folder of the inference without it [results/infer-base-MODEL]
REPORT_DIR|report|folder of the report
MAX_STEPS|30|optimiser steps (none: all epochs in full)
EPOCHS||passes over the training documents
BATCH_SIZE||documents per optimiser step
MAX_VAL_DOCUMENTS|40|validation documents (none: all of them)
LR||peak learning rate
LORA_R||rank of the adapters
LORA_ALPHA||scale of the adapters, over the rank
INFER_BATCH_SIZE||requests that run at once
MAX_NEW_TOKENS|48|tokens generated per prompt at most
MIN_NEW_TOKENS|8|and at least: a chat model likes to end a plain text at once
ITERS||measured repetitions of the inference
NO_CUDA||true: stay on the CPU
'

# for_each_setting FUNCTION: calls it with variable, default and meaning of every setting.
for_each_setting() {
    local variable default meaning
    while IFS='|' read -r variable default meaning; do
        [[ -z $variable ]] || "$1" "$variable" "$default" "$meaning"
    done <<<"$SETTINGS"
}

lower() { tr '[:upper:]' '[:lower:]' <<<"$1"; }
upper() { tr '[:lower:]-' '[:upper:]_' <<<"$1"; }

print_setting() { printf '  --%-18s %s%s\n' "$(lower "$1")" "$3" "${2:+ [$2]}"; }
print_flag() { printf ' --%s' "$(lower "$1")"; }
use_default() { [[ -n ${!1:-} ]] || printf -v "$1" '%s' "$2"; }

usage() {
    cat <<EOF
usage: bash scripts/run_local.sh [flags]

Trains an adapter, completes the prompts without and with it, and writes the report. Each flag
is also a variable: --max_steps 100 is MAX_STEPS=100; the flag wins. Earlier results in the same
folders are replaced.

$(for_each_setting print_setting)

The defaults end within five minutes on two cores, which is too short for a good adapter. To
train on everything: --max_steps none --epochs 1 --max_val_documents none
EOF
}

is_setting() { [[ $SETTINGS == *$'\n'"$1|"* ]]; }

unknown() { die $EX_USAGE "$1; the flags are:$(for_each_setting print_flag) --help"; }

# Puts the value of every flag into its variable.
parse_flags() {
    local flag name value
    while (($#)); do
        flag=$1
        shift
        case $flag in
            -h | --help) usage && exit 0 ;;
            --?*) ;;
            *) unknown "unexpected argument '$flag'" ;;
        esac
        name=${flag%%=*}
        name=$(upper "${name#--}")
        is_setting "$name" || unknown "unknown flag ${flag%%=*}"
        if [[ $flag == *=* ]]; then
            value=${flag#*=}
        elif [[ $name == NO_CUDA && (-z ${1:-} || ${1:-} == --*) ]]; then
            value=true
        else
            [[ $# -gt 0 && $1 != --* ]] || die $EX_USAGE "$flag needs a value"
            value=$1
            shift
        fi
        printf -v "$name" '%s' "$value"
    done
}

# We work in the project's root; a path that the user gave counts from where the user stood.
keep_paths() {
    local name value
    for name in BASE_MODEL TRAIN_PATH VAL_PATH PROMPTS SAVE_DIR OUTPUT_DIR BASE_OUTPUT_DIR REPORT_DIR; do
        value=${!name:-}
        case $name:$value in
            *: | *:/* | *:none) continue ;;
            BASE_MODEL:*) [[ -e $STARTED_IN/$value ]] || continue ;; # a name, not a path
        esac
        printf -v "$name" '%s' "$STARTED_IN/$value"
    done
}

# flags VARIABLE[=FLAG]...: fills FLAGS with those that have a value.
flags() {
    local word name
    FLAGS=()
    for word in "$@"; do
        name=${word%%=*}
        [[ -z ${!name:-} ]] || FLAGS+=("--$(lower "${word##*=}")" "${!name}")
    done
}

# step TEXT COMMAND FLAGS...: one line, then the command; its exit code becomes ours.
step() {
    local code=0
    log "$1"
    shift
    lorabatch "$@" || code=$?
    [[ $code == 0 ]] || die "$code" "lorabatch $1 ended with exit code $code; the lines above say why"
}

main() {
    local name
    parse_flags "$@"
    [[ $STARTED_IN == "$ROOT" ]] || keep_paths
    cd "$ROOT"
    ensure_venv
    choose_model
    name=${BASE_MODEL%/} name=${name##*/} name=${name%.gguf}
    for_each_setting use_default
    SAVE_DIR=${SAVE_DIR:-results/lora-$name}
    OUTPUT_DIR=${OUTPUT_DIR:-results/infer-$name}
    BASE_OUTPUT_DIR=${BASE_OUTPUT_DIR:-results/infer-base-$name}

    flags BASE_MODEL TRAIN_PATH VAL_PATH SAVE_DIR MAX_STEPS EPOCHS BATCH_SIZE MAX_VAL_DOCUMENTS LR LORA_R LORA_ALPHA NO_CUDA
    step "1/4 training an adapter for $BASE_MODEL" train "${FLAGS[@]}" --overwrite
    flags BASE_MODEL PROMPTS INFER_BATCH_SIZE=batch_size MAX_NEW_TOKENS MIN_NEW_TOKENS ITERS NO_CUDA
    step "2/4 completing the prompts without the adapter" infer "${FLAGS[@]}" --output_dir "$BASE_OUTPUT_DIR" --overwrite
    step "3/4 completing the prompts with the adapter" infer "${FLAGS[@]}" --adapter_dir "$SAVE_DIR" --output_dir "$OUTPUT_DIR" --overwrite
    step "4/4 writing the report" report "$SAVE_DIR" "$BASE_OUTPUT_DIR" "$OUTPUT_DIR" --output_dir "$REPORT_DIR"

    log "done; everything lies here:"
    printf '  %-24s %s\n' "adapter and its training" "$SAVE_DIR" "without the adapter" "$BASE_OUTPUT_DIR" \
        "with the adapter" "$OUTPUT_DIR" "report" "$REPORT_DIR/RELATORIO.md, $REPORT_DIR/report.html"
}

main "$@"
