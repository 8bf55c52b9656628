"""TensorRT's element types and torch's dtypes."""

from __future__ import annotations

from typing import Any

import torch

from ts_handlers.errors import LoadError

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
    "FP8": torch.float8_e4m3fn,
}
"""By the name of TensorRT's ``DataType``, whose numbers change between versions."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def torch_dtype(kind: Any) -> torch.dtype:
    """The dtype of a member of ``DataType``.

    Raises
    ------
    LoadError
        torch has no such dtype.
    """
    if kind.name not in DTYPES:
        raise LoadError(f"the plan has a tensor of TensorRT's type {kind.name}, which torch does not have")
    return DTYPES[kind.name]


def tensorrt_dtype(types: Any, dtype: torch.dtype) -> Any:
    """The member of ``DataType``, which is `types`, for a dtype.

    Raises
    ------
    KeyError
        TensorRT has no such type.
    """
    return getattr(types, _NAMES[dtype])
