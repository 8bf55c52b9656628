"""TODO: inputs.py."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class InputRange:
    """One input of a plan: its name in the graph, its dtype, and its shape at the ends and the middle of the range."""

    name: str
    dtype: torch.dtype
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
