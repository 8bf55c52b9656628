"""Marks of the tests that run TensorRT plans on a real GPU."""

from __future__ import annotations

import pytest
import torch

from ts_handlers.backends.tensorrt_library import installed_flavours

TENSORRT = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(not installed_flavours(), reason="no TensorRT"),
]
