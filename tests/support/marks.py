"""Marks that test modules share."""

from __future__ import annotations

import os

import pytest
import torch

from ts_handlers.backends.tensorrt.library import installed_flavours

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user or to mount")

TENSORRT = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(not installed_flavours(), reason="no TensorRT"),
]
"""Of tests that run TensorRT plans on a real GPU."""
