#!/usr/bin/env bash
# Where the time goes: a short training and a short inference under torch.profiler, and under
# the samplers that this machine has.

set -Eeuo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<EOF
usage: bash scripts/profile.sh [train|infer] [flags of lorabatch profile train or infer]

Without a word both are profiled. For each: summary.txt (what to change first), operators.txt,
trace.json.gz (open it in ui.perfetto.dev), memory.svg, profile.json in results/profile-train and
results/profile-infer. Where they are installed, nsys (with a GPU) adds a timeline and py-spy a
flame graph of the same run without torch.profiler.

BASE_MODEL: the base model [distilgpt2, or smollm2-135m where it cannot be had]
EOF
}

# wrapped TOOL KIND WORDS...: the plain command once more under another profiler. Its failure is
# said (many sites forbid ptrace or hold the GPU's counters) and does not end the script.
wrapped() {
    local tool=$1 kind=$2
    shift 2
    log "$kind under $tool"
    "$@" || log "$tool ended with exit code $?: no such profile for $kind"
}

# profile KIND FLAGS...
profile() {
    local kind=$1 out=results/profile-$1 code=0
    shift
    log "profiling $kind"
    lorabatch profile "$kind" --base_model "$BASE_MODEL" "$@" || code=$?
    [[ $code == 0 ]] || die "$code" "lorabatch profile $kind ended with exit code $code; the lines above say why"

    local plain=("$VENV/bin/python" -m lorabatch "$kind" --base_model "$BASE_MODEL" --overwrite)
    case $kind in
        train) plain+=(--max_steps 5 --max_val_documents 8 --save_dir "$out/plain") ;;
        infer) plain+=(--output_dir "$out/plain") ;;
    esac
    if command -v nsys >/dev/null && has_gpu; then
        wrapped nsys "$kind" nsys profile --force-overwrite true --trace cuda,nvtx,osrt --output "$out/nsys" "${plain[@]}"
    fi
    if command -v py-spy >/dev/null; then
        wrapped py-spy "$kind" py-spy record --output "$out/flame.svg" -- "${plain[@]}"
    fi
}

main() {
    local kinds=(train infer)
    case ${1:-} in
        train | infer) kinds=("$1") && shift ;;
        -h | --help) usage && exit 0 ;;
        '') ;;
        *) die $EX_USAGE "unknown word '$1'; give train or infer first, then its flags, or nothing" ;;
    esac
    cd "$ROOT"
    ensure_venv
    PATH=$VENV/bin:$PATH # a py-spy that was installed beside us counts as installed
    choose_model
    local kind
    for kind in "${kinds[@]}"; do
        profile "$kind" "$@"
    done
}

main "$@"
