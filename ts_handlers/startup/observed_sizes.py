"""``warmup: observed``: the sizes that calls had most often are counted once, and warmed up from the next start on."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Any

import torch

from ts_handlers.backends.base import Target
from ts_handlers.errors import BuildError
from ts_handlers.execution.base import Run
from ts_handlers.model.declaration import WARMUPS, Declaration
from ts_handlers.model.observed_calls import SHAPES
from ts_handlers.settings.sections import ObserveSettings
from ts_handlers.startup.observation import calls_identity
from ts_handlers.store.base import Store

logger = logging.getLogger(__name__)


class ObservedSizes:
    """Counts the sizes of the calls that an artifact answers, until the store knows the most frequent ones.

    Parameters
    ----------
    target:
        A model with declared inputs.
    store:
        Keeps the result.
    limits:
        After how many calls or seconds.
    """

    def __init__(self, target: Target, store: Store, limits: ObserveSettings) -> None:
        self._signature = target.require_signature()
        self._name = target.source.name
        self._store = store
        self._limits = limits
        self._counts: Counter[tuple[torch.Size, ...]] = Counter()
        self._first: float | None = None
        self._over = False
        self._lock = threading.Lock()
        self._identity: str | None = None
        try:
            digest = target.model_digest
        except BuildError:
            self._over = True
        else:
            self._identity = calls_identity(self._name, "sizes", digest, self._signature.canonical())

    def known(self) -> tuple[dict[str, int], ...] | None:
        """The most frequent sizes, once they are known."""
        found = None if self._identity is None else self._store.read_declaration(self._identity)
        if found is None:
            return None
        self._over = True
        return found.warmup

    def around(self, run: Run) -> Run:
        """The same run, whose calls are counted."""

        def run_and_count(tensors: list[torch.Tensor]) -> Any:
            answer = run(tensors)
            if not self._over:
                self._count(tuple(tensor.shape for tensor in tensors))
            return answer

        return run if self._over else run_and_count

    def _count(self, shapes: tuple[torch.Size, ...]) -> None:
        with self._lock:
            if self._first is None:
                self._first = time.time()
            if shapes in self._counts or len(self._counts) < SHAPES:
                self._counts[shapes] += 1
            calls, seconds = self._limits.calls, self._limits.seconds
            enough = calls is not None and self._counts.total() >= calls
            if self._over or not (enough or (seconds is not None and time.time() - self._first >= seconds)):
                return
            self._over = True
        threading.Thread(target=self._keep, name="ts_handlers-sizes").start()

    def _keep(self) -> None:
        assert self._identity is not None
        sizes = tuple(self._sizes(shapes) for shapes, _ in self._counts.most_common(WARMUPS))
        declaration = Declaration(self._signature.inputs, self._signature.dimensions, sizes)
        if self._store.write_declaration(self._identity, declaration):
            logger.info("%s: the next start warms up %s", self._name, ", ".join(map(str, sizes)))

    def _sizes(self, shapes: tuple[torch.Size, ...]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for spec, shape in zip(self._signature.inputs, shapes, strict=True):
            named = zip(spec.shape, shape, strict=True)
            sizes.update({name: size for name, size in named if isinstance(name, str)})
        return sizes
