"""AOTInductor artifacts as CUDA graphs: a call of declared size is one launch instead of one for each kernel.

A slot of the pool is a stream with a runner of its own for each library; all use the same weights. When graphs are
recorded, says `ts_handlers.execution.cuda_graphs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ts_handlers.backends.aot_inductor.container import Container
from ts_handlers.execution.contexts import ContextPool
from ts_handlers.execution.cuda_graphs import GraphRecorder
from ts_handlers.settings.sections import ContextSettings


@dataclasses.dataclass
class _Graph:
    """A recorded inference: where it reads its inputs and leaves its answers."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    answers: list[torch.Tensor]


class GraphSlot:
    """A stream, its runners and its graphs; for one call at a time.

    Parameters
    ----------
    libraries:
        Opened single-threaded, with their weights.
    device:
        A CUDA device.
    recorder:
        That of all slots.
    """

    def __init__(self, libraries: Sequence[Container], device: torch.device, recorder: GraphRecorder) -> None:
        self._libraries = libraries
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, tuple[torch.Size, ...]], _Graph] = {}
        self._recorder = recorder

    def run(self, index: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """One inference of the library `index`, complete on return, for use on the caller's current stream."""
        caller: Any = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                answers = self._answers(index, tensors)
        finally:
            self._stream.synchronize()
        for answer in answers:
            if answer is not None:
                answer.record_stream(caller)  # its memory belongs to the slot's stream
        return answers

    def _answers(self, index: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        key = (index, tuple(tensor.shape for tensor in tensors))
        graph = self._graphs.get(key)
        if graph is None and self._recorder.recording:
            graph = self._record(index, tensors)
            if graph is not None:
                self._graphs[key] = graph
        if graph is None:
            return self._libraries[index].run(tensors)
        for fixed, tensor in zip(graph.inputs, tensors, strict=True):
            fixed.copy_(tensor)
        graph.graph.replay()
        return [answer if answer is None else answer.clone() for answer in graph.answers]

    def _record(self, index: int, tensors: list[torch.Tensor]) -> _Graph | None:
        library = self._libraries[index]
        inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        recorded = self._recorder.record(lambda: library.run(inputs), self._stream, self._memory, inputs)
        return None if recorded is None else _Graph(recorded[0], inputs, recorded[1])


class GraphSlots:
    """The pool of slots of one artifact.

    Parameters
    ----------
    libraries:
        One list of single-threaded libraries for each slot.
    settings, device:
        See `ContextSettings` and `GraphSlot`.

    Attributes
    ----------
    stop_recording:
        See `GraphRecorder.stop_recording`.
    """

    def __init__(
        self, libraries: Sequence[Sequence[Container]], settings: ContextSettings, device: torch.device
    ) -> None:
        recorder = GraphRecorder(device)
        self._slots = [GraphSlot(each, device, recorder) for each in libraries]
        self.pool: ContextPool[GraphSlot] = ContextPool(self._slots, settings.wait_seconds)
        self.stop_recording = recorder.stop_recording

    def run(self, index: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """One inference on the next free slot.

        Raises
        ------
        BusyError
            No slot came free in time.
        """
        with self.pool.lend() as slot:
            return slot.run(index, tensors)
