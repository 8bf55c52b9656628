"""Recording CUDA graphs: when that is done, and what a recording that fails leaves behind.

Graphs are recorded at the first run of each size while an artifact is checked and warmed up, on each context, and
never later: a request of another size runs without one, so that no request waits for a recording and memory does not
grow with the sizes that clients send.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ts_handlers.errors import one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")


class GraphRecorder:
    """Records the graphs of one artifact, on all of its contexts; for the thread that starts it.

    Parameters
    ----------
    device:
        A CUDA device.

    Attributes
    ----------
    recording:
        Whether a size that has no graph gets one.
    recorded:
        Number of graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.recording = True
        self.recorded = 0
        self._device = device
        self._broken: list[torch.cuda.CUDAGraph] = []
        self._memory: set[Any] = set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the block, which runs sizes that nobody has declared."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    def stop_recording(self, facts: dict[str, Any]) -> None:
        """Record nothing from now on, and say how many graphs there are and what they take.

        `gpu_memory` gets the bytes that torch's allocator holds in this process, and those of them that are the graphs'
        own: what runs in a graph leaves its intermediate values and its answers there.
        """
        self.recording = False
        facts["cuda_graphs"] = self.recorded
        with contextlib.suppress(RuntimeError):  # torch's allocator on cudaMallocAsync keeps no account
            facts["gpu_memory"] = self._bytes()

    def _bytes(self) -> dict[str, int]:
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        graphs = sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) in self._memory)
        return {"torch_bytes": torch.cuda.memory_reserved(self._device), "graph_bytes": graphs}

    def record(
        self, work: Callable[[], T], stream: Any, memory: Any, inputs: Sequence[torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, T] | None:
        """Run `work` once, and once more as a recording; None where it cannot be recorded, after which nothing is.

        Parameters
        ----------
        work:
            Puts work on `stream`, which is the current one, and returns its answers.
        memory:
            A handle of ``torch.cuda.graph_pool_handle``, of graphs that never run at the same time.
        inputs:
            Named in a warning by their shapes.

        Returns
        -------
        The graph, and where it leaves its answers when it is replayed.
        """
        self._memory.add(memory)
        work()  # loads and compiles kernels and allocates what a recording must not
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # an artifact that it frees would break the capture
        try:
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                answers = work()
            finally:
                graph.capture_end()
        except RuntimeError as error:  # an operator that synchronises, for example
            self._end_broken_capture(memory)
            logger.warning("no CUDA graph for inputs of %s: %s", [tuple(t.shape) for t in inputs], one_line(error))
            self.recording = False
            self._broken.append(graph)  # torch's allocators may still refer to it
            return None
        finally:
            if collecting:
                gc.enable()
        self.recorded += 1
        return graph, answers

    def _end_broken_capture(self, memory: Any) -> None:
        """Undo what `CUDAGraph.capture_end` leaves when CUDA reports that the capture failed.

        It raises before it takes the allocator and the random number generator out of the capture; after that no random
        numbers could be drawn in this process.
        """
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with contextlib.suppress(RuntimeError):  # the capture itself ended well, or did not begin
            torch._C._cuda_endAllocateToPool(index, memory)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
