"""Where the time of a handler's first requests goes: to what is compiled, to modules that are not, or to the rest."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ts_handlers.backends import get_backend
from ts_handlers.compiled_model import ServedModel, eager_module, measure_calls

REQUESTS = 16
"""Batches that are measured; afterwards nothing is."""
REST = "rest of the handler"
EAGER = "eager"
Measured = Callable[[], AbstractContextManager[None]]
"""Gives a context for each call of a model."""
_MOST_MODULES = 50
_MOST_LOOKED_AT = 1000
"""Attributes or elements of one object that are looked at."""
_MOST_SHOWN = 20


class Shares:
    """Shares of the time that the first batches take, each second counted once: for the innermost part under way.

    On a GPU each part waits for what it has launched, so the measured batches take a little longer.

    Parameters
    ----------
    requests:
        How many batches are measured.
    """

    def __init__(self, requests: int = REQUESTS) -> None:
        self._left = requests
        self._counted = 0
        self._seconds: dict[str, float] = {}
        self._compiled: set[str] = set()
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._ends: list[Callable[[], None]] = []
        self._waits_for: set[torch.device] = set()

    def measure_modules(self, handler: Any, compiled: Collection[int]) -> None:
        """Measure the modules that a handler holds, and that are not compiled, by hooks on them.

        Parameters
        ----------
        handler:
            Its attributes are looked at, and the attributes and elements of those.
        compiled:
            The ``id`` of each module that is compiled, of which a method is enough: what lies below it gets no hooks.
        """
        for name, module in _held_modules(handler).items():
            self._hook(name, module, compiled)

    def _hook(self, name: str, module: torch.nn.Module, compiled: Collection[int]) -> None:
        self._waits_for |= {tensor.device for tensor in module.parameters() if tensor.device.type == "cuda"}
        if id(module) in compiled or _is_compiled(module):
            return
        for child in (module, *module.children()):  # methods beside forward call the parts below a module
            if id(child) in compiled or _is_compiled(child):
                continue
            enter = child.register_forward_pre_hook(functools.partial(_enter, self, name))
            leave = child.register_forward_hook(functools.partial(_leave, self), always_call=True)
            self._ends += [enter.remove, leave.remove]

    def measure_model(self, name: str, model: ServedModel, measure: Callable[[Measured | None], None]) -> None:
        """Measure the calls of a model, which may be compiled.

        Parameters
        ----------
        measure:
            Called with what gives a context for each call of the model, and with None when no more is measured.
        """

        @contextlib.contextmanager
        def measured() -> Iterator[None]:
            compiled = model.outcome.backend != "eager"
            if compiled:
                self._compiled.add(name)
            self._enter(name if compiled else f"{name} ({EAGER})")
            try:
                yield
            finally:
                self._leave()

        measure(measured)
        self._ends.append(lambda: measure(None))

    def measure_served(self, handler: Any, model: ServedModel | None) -> None:
        """Measure a handler's ``self.model``, what goes past it to its eager module, and what else the handler holds.

        Parameters
        ----------
        model:
            ``self.model`` if it is a served one, else None.
        """
        if model is not None:
            self.measure_model("model", model, lambda measured: measure_calls(model, measured))
            module = eager_module(model)
            uses_it = get_backend(model.outcome.backend).needs_eager_module or model.background is not None
            if module is not None and not uses_it:  # else hooks on it would be part of what is compiled
                self._hook(f"model ({EAGER})", module, ())
        self.measure_modules(handler, ())

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Measure what is answered inside the block."""
        if self._left <= 0:
            yield
            return
        self._thread.stack = []
        self._enter(REST)
        try:
            yield
        finally:
            while self._thread.stack:
                self._leave()
            self._end_batch()

    def __reduce__(self) -> Any:
        """A copy of a module, or a pickle, holds one that measures nothing."""
        return Shares, (0,)

    def _enter(self, name: str) -> None:
        stack = getattr(self._thread, "stack", None)
        if stack is not None:
            self._count(stack)
            stack.append(name)

    def _leave(self) -> None:
        stack = getattr(self._thread, "stack", None)
        if stack:
            self._count(stack)
            stack.pop()

    def _count(self, stack: list[str]) -> None:
        for device in self._waits_for:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if stack:
            with self._lock:
                self._seconds[stack[-1]] = self._seconds.get(stack[-1], 0.0) + now - self._thread.since
        self._thread.since = now

    def _end_batch(self) -> None:
        with self._lock:
            self._counted += 1
            self._left -= 1
            ends, self._ends = (self._ends, []) if self._left <= 0 else ([], self._ends)
        for end in ends:
            end()

    def describe(self) -> dict[str, Any] | None:
        """Batches measured, and the share of each part between 0 and 1, the largest first; None before the first."""
        with self._lock:
            seconds, counted = dict(self._seconds), self._counted
        if not counted:
            return None
        whole = sum(seconds.values()) or 1.0
        largest = sorted(seconds.items(), key=lambda item: -item[1])[:_MOST_SHOWN]
        shares = {name: round(value / whole, 3) for name, value in largest}
        return {
            "batches": counted,
            "compiled": {name: share for name, share in shares.items() if name in self._compiled},
            "not_compiled": {name: share for name, share in shares.items() if name not in self._compiled},
        }


def _enter(shares: Shares, name: str, *call: Any) -> None:
    shares._enter(name)


def _leave(shares: Shares, *call: Any) -> None:
    shares._leave()


def _held_modules(handler: Any) -> dict[str, torch.nn.Module]:
    """The modules that a handler holds, by their path from it, those inside of others left out."""
    found: dict[str, torch.nn.Module] = {}
    seen: set[int] = set()
    places = [(name, value) for name, value in vars(handler).items() if not name.startswith("_CompiledHandlerMixin")]
    for name, value in places:
        below = {name: value} if _is_module(value) else _below(name, value)
        for path, module in below.items():
            if id(module) not in seen and len(found) < _MOST_MODULES:
                seen.add(id(module))
                found[path] = module
    return found


def _below(name: str, value: Any) -> dict[str, torch.nn.Module]:
    items: Any = {}
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        items = getattr(value, "__dict__", {}).items()
    return {f"{name}.{key}": item for key, item in itertools.islice(items, _MOST_LOOKED_AT) if _is_module(item)}


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile or TorchScript runs a module: hooks would be compiled with it."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return True
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _is_module(value: Any) -> bool:
    return issubclass(type(value), torch.nn.Module)  # a compiled model says that it is one
