"""The TensorRT wheels lie in a folder of their own, since TorchServe imports torch_tensorrt wherever it can."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tensorrt_folder() -> Path:
    """Where scripts/environment.sh put TensorRT for RTX and Torch-TensorRT."""
    folder = Path(os.environ.get("TS_HANDLERS_TENSORRT", Path(sys.prefix) / "tensorrt"))
    if not (folder / "tensorrt_rtx_bindings").is_dir():
        pytest.skip(
            f"TensorRT for RTX is not installed in {folder}; scripts/environment.sh installs it on x86-64 Linux"
        )
    return folder
