"""Lets Torch-TensorRT be imported without a GPU; import this before it, in a process of its own.

What torch.cuda says of the device is stood in for, and Torch-TensorRT's own runtime, which needs the driver, is left
out. Its converters, its lowering and TensorRT's builder are the real ones.
"""

from __future__ import annotations

import os
import types
from typing import Any

import torch

_PROPERTIES = types.SimpleNamespace(name="none", major=9, minor=0, total_memory=1 << 37, multi_processor_count=132)
_is_file = os.path.isfile

_cuda: Any = torch.cuda
_c: Any = torch._C
_c._CudaDeviceProperties = object
_cuda.get_device_properties = lambda *_: _PROPERTIES
_cuda.get_device_capability = lambda *_: (9, 0)
_cuda.current_device = lambda: 0
_cuda.device_count = lambda: 1
_cuda.mem_get_info = lambda *_: (1 << 37, 1 << 37)
os.path.isfile = lambda path: "libtorchtrt" not in str(path) and _is_file(path)  # type: ignore[assignment]

from ts_handlers.backends.tensorrt import torch_tensorrt_import  # noqa: E402

torch_tensorrt_import.probe = lambda: None  # its child process has no substitutes
