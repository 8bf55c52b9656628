"""Sizes of tensors in bytes, and tensors inside preallocated byte buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def size_in_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor.

    Examples
    --------
    >>> size_in_bytes((2, 3), torch.float16)
    12
    """
    return math.prod(shape) * dtype.itemsize


def tensor_in(buffer: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor in the first bytes of a buffer.

    Parameters
    ----------
    buffer:
        A vector of uint8, at least as long as the tensor, whose first byte is aligned for `dtype`.

    Examples
    --------
    >>> tensor_in(torch.zeros(16, dtype=torch.uint8), (2, 2), torch.float16)
    tensor([[0., 0.],
            [0., 0.]], dtype=torch.float16)
    """
    return buffer[: size_in_bytes(shape, dtype)].view(dtype).view(tuple(shape))
