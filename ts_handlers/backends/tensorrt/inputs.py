"""The shapes of one input of a TensorRT plan over a range of sizes."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class InputRange:
    """One input of a plan.

    Attributes
    ----------
    name:
        Its name in the graph.
    dtype:
        Its dtype.
    min, opt, max:
        Its smallest and largest shape, and the shape to optimise for; all three are equal for a static shape.
    """

    name: str
    dtype: torch.dtype
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
