"""Slots for modules and compiled artifacts: `contexts.count` calls at once, on a GPU each on a stream of its own.

With one slot, calls are serialised and stay on the caller's stream, which is what a module expects that was never meant
for several threads. With more, the module or artifact runs in several threads at once on one set of weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
import torch

from ts_handlers.execution.base import Loaded
from ts_handlers.execution.contexts import ContextPool
from ts_handlers.settings.sections import ContextSettings

T = TypeVar("T")


class ModuleSlots:
    """The slots of one model whose backend has no contexts of its own.

    Attributes
    ----------
    pool:
        Its slots are CUDA streams, or None where calls stay on the caller's stream: on the CPU, and with one slot.

    Examples
    --------
    >>> slots = ModuleSlots(ContextSettings(count=2), torch.device("cpu"))
    >>> slots.call(max, 3, 4)
    4
    """

    def __init__(self, settings: ContextSettings, device: torch.device) -> None:
        streams: list[Any] = [None] * settings.count
        if device.type == "cuda" and settings.count > 1:
            streams = [torch.cuda.Stream(device) for _ in streams]  # type: ignore[no-untyped-call]
        self._settings, self._device = settings, device
        self.pool: ContextPool[Any] = ContextPool(streams, settings.wait_seconds)

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call `function` in a slot, for as long as the device works on it.

        Raises
        ------
        BusyError
            No slot came free in time.
        """
        with self.pool.lend() as stream:
            if stream is not None:
                return _call_on(stream, function, *args, **kwargs)
            if self._device.type != "cuda":
                return function(*args, **kwargs)
            with torch.cuda.device(self._device):  # CUDA's current device is one for each thread
                try:
                    return function(*args, **kwargs)
                finally:
                    stream = torch.cuda.current_stream(self._device)
                    if stream.cuda_stream:  # on the default stream, which is 0, calls follow one another by themselves
                        stream.synchronize()

    def wrap(self, loaded: Loaded) -> Loaded:
        """The same artifact with `run` in a slot; as it is when its backend has a pool of its own."""
        if loaded.pool is not None:
            return loaded
        slots = (
            self if loaded.reentrant else ModuleSlots(msgspec.structs.replace(self._settings, count=1), self._device)
        )
        run, call, take, give_back = loaded.run, slots.call, slots.pool.take, slots.pool.give_back

        def run_on_cpu(tensors: list[torch.Tensor]) -> Any:
            slot = take()
            try:
                return run(tensors)
            finally:
                give_back(slot)

        in_slot = run_on_cpu if self._device.type == "cpu" else lambda tensors: call(run, tensors)
        return dataclasses.replace(loaded, run=in_slot, pool=slots.pool)


def _call_on(stream: Any, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    caller = torch.cuda.current_stream(stream.device)
    stream.wait_stream(caller)
    try:
        with torch.cuda.stream(stream):
            answer = function(*args, **kwargs)
    finally:
        stream.synchronize()  # the slot is in use until then, and the inputs are
    _record_stream(answer, caller)
    return answer


def _record_stream(value: Any, stream: Any) -> None:
    """Keep the memory of every tensor in an output from being reused before `stream` is done with it."""
    if isinstance(value, torch.Tensor):
        value.record_stream(stream)
    elif isinstance(value, Mapping):
        for item in value.values():
            _record_stream(item, stream)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _record_stream(item, stream)
    elif dataclasses.is_dataclass(value):
        _record_stream(vars(value), stream)
