"""What serves now, as a number that grows: with each swap of the model, and with each change of an eager one's tensors.

A handler may change an eager model while it serves. Seen are changes in place (`load_state_dict`, an optimiser), by the
versions of the tensors; not seen is a module, a hook or a plain attribute that a handler puts in another's place.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from ts_handlers.compiled_model import ServedModel, eager_module


class Epoch(NamedTuple):
    """What serves at one moment.

    Attributes
    ----------
    number:
        Greater for what serves later.
    changed:
        Whether an eager model's tensors are not as they were when they were first looked at.
    """

    number: int
    changed: bool


class Epochs:
    """Tells the epochs of a model apart.

    Parameters
    ----------
    model:
        What is served.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._module: torch.nn.Module | None = None
        self._tensors: list[torch.Tensor] = []
        self._first = 0
        self._latest = -1, 0
        self._number = -1

    def at(self, serving: int) -> Epoch | None:
        """The epoch of `ts_handlers.compiled_model.serving_epoch`; None where that is no longer what serves."""
        with self._lock:
            now = serving, self._versions()
            if now < self._latest:
                return None
            if now > self._latest:
                self._latest = now
                self._number += 1
            return Epoch(self._number, now[1] != self._first)

    def _versions(self) -> int:
        module = eager_module(self._model) if self._model.outcome.backend == "eager" else None
        if module is not self._module:
            self._module = module
            self._tensors = [] if module is None else [*module.parameters(), *module.buffers()]
            self._first = self._sum()
        return self._sum()

    def _sum(self) -> int:
        return sum(0 if tensor.is_inference() else tensor._version for tensor in self._tensors)
