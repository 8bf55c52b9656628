"""TODO: buffers.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


def size_in_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """What a tensor of this shape takes."""
    return math.prod(shape) * dtype.itemsize


def _view(buffer: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The beginning of a byte buffer as a tensor of this shape."""
    return buffer[: size_in_bytes(shape, dtype)].view(dtype).view(tuple(shape))
