"""The contract of this folder: an artifact that is loaded, and the function that runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ts_handlers.execution.contexts import ContextPool
from ts_handlers.model.signature import Signature, Sizes

Run = Callable[[list[torch.Tensor]], Any]
"""Takes the tensors in declared order, already checked, and returns the model's output."""


@dataclasses.dataclass(frozen=True)
class Held:
    """What an artifact holds of its model's values; names are the eager module's.

    Attributes
    ----------
    constants:
        Tensors beside the archive's weights, as `run` uses them: what is written into one is what `run` computes with.
    folded:
        Tensors, on the CPU, whose values the code holds.
    weights:
        Names of the archive's weights that `run` uses as they are.
    numbers:
        Reads the numbers among the module's attributes when it was built, as texts; empty where nobody knows.
    """

    constants: dict[str, torch.Tensor]
    folded: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    weights: tuple[str, ...] = ()
    numbers: Callable[[], dict[str, str]] = dict


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An artifact in this process.

    Attributes
    ----------
    run:
        Takes the tensors in declared order, already checked, and returns the model's output.
    signature:
        What `run` accepts; it may be narrower than what was declared, when the compiler could not do better.
    sizes:
        The sizes at which the canary runs; None takes the example sizes and the smallest ones.
    variants:
        How many artifacts `run` chooses from; with one, the smallest canary input tells all.
    adjusts_threads:
        Whether `torch.set_num_threads` may change after loading without compiling anything.
    frees_interpreter:
        Whether `run` is native code that leaves the GIL alone and works on processors of the host.
    warmed_up:
        Whether loading has already run the declared warm-up sizes.
    facts:
        What the backend wants to show in `describe`.
    end_warmup:
        Called once after warm-up: from then on no request may compile or record anything.
    pool:
        The pool from which `run` lends by itself; None when calls have to be lent a slot, as `contexts.count` says,
        before they reach `run` (see `ts_handlers.execution.slots`).
    reentrant:
        Whether several threads may be in `run` at once; if not, one call at a time whatever `contexts.count` says.
    held:
        What it holds of its model's values; None where `run` uses the eager module, or one set of weights only.
    """

    run: Run
    signature: Signature
    sizes: list[Sizes] | None = None
    variants: int = 1
    adjusts_threads: bool = False
    frees_interpreter: bool = False
    warmed_up: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    end_warmup: Callable[[], None] = lambda: None
    pool: ContextPool[Any] | None = None
    reentrant: bool = True
    held: Held | None = None
