#!/usr/bin/env bash
# Every check of the project. All of them run even if one fails; the exit code is 0 only if none did.

set -Eeuo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<EOF
usage: bash scripts/test.sh [all|quick] [pytest arguments]

Formatting, lint, types, shell scripts, tests. all: every test (those that need a GPU skip
themselves without one) [the default]; quick: without those marked slow or gpu.
EOF
}

FAILED=()

# check NAME COMMAND...: runs it and notes a failure.
check() {
    local name=$1
    shift
    log "$name"
    "$@" || FAILED+=("$name")
}

check_shell() {
    if ! command -v shellcheck >/dev/null; then
        log "shellcheck: not installed: skipped"
        return
    fi
    shopt -s nullglob
    check shellcheck shellcheck --external-sources --source-path=SCRIPTDIR scripts/*.sh scripts/*.slurm tests/slurm/*.sh .ci/run
}

main() {
    local mode=all python=$VENV/bin/python
    local selection=()
    case ${1:-all} in
        all | quick) mode=${1:-all} && shift $(($# > 0)) ;;
        -h | --help) usage && exit 0 ;;
        -*) ;; # the first of pytest's own arguments
        *) die $EX_USAGE "unknown mode '$1'; give all or quick, then pytest's arguments" ;;
    esac
    [[ $mode == all ]] || selection=(-m "not slow and not gpu")
    cd "$ROOT"
    ensure_venv

    # The tests must not depend on the network, nor on how many threads the caller's shell allows.
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    unset OMP_NUM_THREADS
    check "ruff format" "$python" -m ruff format --check
    check "ruff check" "$python" -m ruff check
    check mypy "$python" -m mypy
    check_shell
    # two at once: most tests are one thread that starts another program and waits for it
    check pytest "$python" -m pytest -n 2 ${selection[@]+"${selection[@]}"} "$@"

    ((${#FAILED[@]} == 0)) || die 1 "failed: ${FAILED[*]}"
    log "all checks passed ($mode)"
}

main "$@"
