"""AOTInductor artifacts as CUDA graphs: a call of declared size is one launch instead of one for each kernel.

A slot of the pool is a stream with a runner of its own for each library; all use the same weights. Graphs are recorded
at the first run of each size while the artifact is checked and warmed up, on each slot, and never later: a request of
another size runs without one, so that no request waits for a recording and memory does not grow with the sizes that
clients send.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from ts_handlers.backends.aot_inductor_container import Container
from ts_handlers.errors import one_line
from ts_handlers.serving.contexts import ContextPool
from ts_handlers.settings.sections import ContextSettings

logger = logging.getLogger(__name__)


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
    sealed:
        Once set, nothing is recorded any more; a recording that fails sets it for all slots.
    """

    def __init__(self, libraries: Sequence[Container], device: torch.device, sealed: threading.Event) -> None:
        self._libraries = libraries
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, tuple[torch.Size, ...]], _Graph] = {}
        self._sealed = sealed
        self._broken: list[torch.cuda.CUDAGraph] = []

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

    @property
    def recorded(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    def _answers(self, index: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        key = (index, tuple(tensor.shape for tensor in tensors))
        graph = self._graphs.get(key)
        if graph is None and not self._sealed.is_set():
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
        library.run(inputs)  # loads kernels and allocates what a recording must not
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # an artifact that it frees would break the capture
        try:
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                answers = library.run(inputs)
            finally:
                graph.capture_end()
        except RuntimeError as error:  # an operator that synchronises, for example
            _end_broken_capture(self._device.index, self._memory)
            logger.warning("no CUDA graph for inputs of %s: %s", [tuple(t.shape) for t in tensors], one_line(error))
            self._sealed.set()
            self._broken.append(graph)  # torch's allocators may still refer to it
            return None
        finally:
            if collecting:
                gc.enable()
        return _Graph(graph, inputs, answers)


def _end_broken_capture(device: int, memory: Any) -> None:
    """Undo what `CUDAGraph.capture_end` leaves when CUDA reports that the capture failed.

    It raises before it takes the allocator and the random number generator out of the capture; after that no random
    numbers could be drawn in this process.
    """
    with contextlib.suppress(RuntimeError):  # the capture itself ended well, or did not begin
        torch._C._cuda_endAllocateToPool(device, memory)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


class GraphSlots:
    """The pool of slots of one artifact.

    Parameters
    ----------
    libraries:
        One list of single-threaded libraries for each slot.
    settings, device:
        See `ContextSettings` and `GraphSlot`.
    """

    def __init__(
        self, libraries: Sequence[Sequence[Container]], settings: ContextSettings, device: torch.device
    ) -> None:
        self._sealed = threading.Event()
        self._slots = [GraphSlot(each, device, self._sealed) for each in libraries]
        self.pool: ContextPool[GraphSlot] = ContextPool(self._slots, settings.wait_seconds)

    def run(self, index: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """One inference on the next free slot.

        Raises
        ------
        BusyError
            No slot came free in time.
        """
        with self.pool.lend() as slot:
            return slot.run(index, tensors)

    def seal(self, facts: dict[str, Any]) -> None:
        """Record nothing from now on, and say how many graphs there are."""
        self._sealed.set()
        facts["cuda_graphs"] = sum(slot.recorded for slot in self._slots)
