"""Runs inferences of one or several engines on k slots: the execution-context pool at work.

Weights are on the device once, in the engines. A slot is a stream with one context for each optimization profile of
each engine; a call gets a slot for itself until its answers are complete on the device, so `contexts.count` is the
number of inferences that run at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ts_handlers.execution.contexts import ContextPool
from ts_handlers.execution.engine import Context, Device, Engine, Stream
from ts_handlers.execution.scratch import SharedScratch, SlotMemory, predict_memory
from ts_handlers.settings.sections import ContextSettings


class Slot:
    """A stream and its contexts, in the order of the engines and their profiles."""

    def __init__(self, stream: Stream, contexts: list[Context], shared: SharedScratch | None) -> None:
        self._stream = stream
        self._contexts = contexts
        self._shared = shared

    def run(self, index: int, inputs: Sequence[Any], caller: Stream) -> list[Any]:
        """One inference, complete on return, for use on the stream `caller`."""
        stream = self._stream
        stream.wait_stream(caller)
        try:
            with self._shared.use(stream) if self._shared is not None else contextlib.nullcontext():
                answers = self._contexts[index].enqueue(inputs)
        finally:
            # Work put on the stream before a failure still reads the inputs and writes the scratch memory.
            stream.synchronize()
        for answer in answers:
            answer.record_stream(caller)  # its memory belongs to the slot's stream
        return answers


class EngineRunner:
    """Engines on a device with their pool of slots.

    Parameters
    ----------
    engines:
        Each profile of each engine is one way to run; `run` takes its index in this order.
    settings:
        Number of slots, scratch setting and longest wait.
    device:
        Where memory and streams come from.

    Raises
    ------
    ContextMemoryError
        The contexts do not fit, with the figures; raised before anything is allocated.

    Attributes
    ----------
    pool:
        Hand it on as `Loaded.pool`.
    predicted:
        The memory that the slots were predicted to take.
    """

    def __init__(self, engines: Sequence[Engine], settings: ContextSettings, device: Device) -> None:
        self.predicted: SlotMemory = predict_memory(engines, settings.count, settings.scratch)
        self.predicted.require(device.free_bytes())
        self._engines = tuple(engines)
        self._device = device
        allocated, used = device.allocated_bytes(), device.used_bytes()
        shared = SharedScratch() if settings.scratch == "shared" and settings.count > 1 else None
        streams = [device.new_stream() for _ in range(settings.count)]
        buffers = [
            device.allocate(self.predicted.scratch_each, stream) for stream in (streams[:1] if shared else streams)
        ]
        slots = []
        for number, stream in enumerate(streams):
            scratch = buffers[0] if shared else buffers[number]
            contexts = [engine.new_context(p, stream) for engine in engines for p in range(engine.profiles)]
            for context in contexts:
                context.use_scratch(scratch.address, scratch.nbytes)
            slots.append(Slot(stream, contexts, shared))
        self._buffers = buffers
        self.pool: ContextPool[Slot] = ContextPool(slots, settings.wait_seconds)
        self._used = {
            "torch_bytes": device.allocated_bytes() - allocated,
            "device_bytes": device.used_bytes() - used,
        }

    def run(self, index: int, inputs: Sequence[Any]) -> list[Any]:
        """One inference with the profile `index`, on the next free slot.

        Safe to call from any number of threads. Inputs may still be in the making on the caller's current stream; the
        answers are complete and belong to the caller.

        Raises
        ------
        BusyError
            No slot came free in time.
        """
        with self.pool.lend() as slot:
            return slot.run(index, inputs, self._device.current_stream())

    def memory(self) -> dict[str, Any]:
        """What was predicted and what was used, in bytes, for `describe`.

        `torch_bytes` is what torch's allocator gave, `device_bytes` the change of the whole device, which includes what
        TensorRT allocates for each context by itself and what other processes did meanwhile.
        """
        return {"predicted": self.predicted.describe(), "used": dict(self._used)}

    def close(self, timeout: float | None = None) -> bool:
        """Refuse further calls and wait for those under way; False when they were not done in `timeout` seconds."""
        return self.pool.close(timeout)
