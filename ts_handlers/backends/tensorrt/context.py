"""One context of a TensorRT engine: its buffers, its CUDA graphs, and how an inference gets onto its stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ts_handlers.backends.tensorrt.buffers import size_in_bytes, tensor_in
from ts_handlers.execution.cuda_graphs import GraphRecorder


class _Engine(Protocol):
    """What a context asks of its engine; `ts_handlers.backends.tensorrt.runtime.TensorRTEngine` says what it is."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: torch.device
    dtypes: dict[Any, torch.dtype]
    recorder: GraphRecorder | None

    def create_context(self, profile: int, stream: int) -> Any:
        """A TensorRT execution context without scratch memory."""

    def input_buffers(self, profile: int) -> dict[str, int]:
        """Bytes of the preallocated buffer of each input."""

    def output_buffers(self, profile: int) -> dict[str, int]:
        """Bytes of the preallocated buffer of each output."""


@dataclasses.dataclass
class _Bound:
    """A TensorRT execution context, the shapes that it was told last, and where it then leaves its outputs."""

    context: Any
    shapes: tuple[torch.Size, ...] | None = None
    answers: list[torch.Tensor] = dataclasses.field(default_factory=list)


class TensorRTContext:
    """One execution context with its preallocated buffers; see `ts_handlers.execution.engine.Context`.

    Each CUDA graph has a TensorRT context of its own on the same memory, and its answers stay where they were when it
    was recorded: what is done to a context afterwards, for a run of another shape, may change what its graph does.
    """

    def __init__(self, engine: _Engine, profile: int, stream: torch.cuda.Stream) -> None:
        self._engine = engine
        self._profile = profile
        self._stream = stream
        self._scratch: tuple[int, int] | None = None
        self._plain = _Bound(engine.create_context(profile, stream.cuda_stream))
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, _Bound]] = {}
        self._memory = None if engine.recorder is None else torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            self._inputs = self._allocate(engine.input_buffers(profile))
            self._outputs = self._allocate(engine.output_buffers(profile))

    def _allocate(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        return {
            name: torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self._engine.device)
            for name, nbytes in sizes.items()
        }

    def use_scratch(self, address: int, nbytes: int) -> None:
        """Bind scratch memory."""
        self._scratch = address, nbytes
        self._plain.context.set_device_memory(address, nbytes)

    def enqueue(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Put one inference on the stream; the outputs are copies of the preallocated ones."""
        recorder = self._engine.recorder
        with torch.cuda.stream(self._stream):
            shapes = tuple(tensor.shape for tensor in inputs)
            found = self._graphs.get(shapes)
            if found is None and recorder is not None and recorder.recording:
                found = self._record(recorder, shapes, inputs)
            if found is not None:
                graph, bound = found
                self._fill(inputs)
                graph.replay()
            else:
                bound = self._plain
                held = [tensor.contiguous() for tensor in inputs]
                self._bind(bound, shapes, held)
                self._execute(bound)
            return [answer.clone() for answer in bound.answers]

    def _fill(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy inputs into the buffers from which graphs read."""
        fixed = [
            tensor_in(self._inputs[name], tensor.shape, tensor.dtype)
            for name, tensor in zip(self._engine.inputs, inputs, strict=True)
        ]
        for place, tensor in zip(fixed, inputs, strict=True):
            place.copy_(tensor)
        return fixed

    def _record(
        self, recorder: GraphRecorder, shapes: tuple[torch.Size, ...], inputs: Sequence[torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, _Bound] | None:
        bound = _Bound(self._engine.create_context(self._profile, self._stream.cuda_stream))
        if self._scratch is not None:
            bound.context.set_device_memory(*self._scratch)
        self._bind(bound, shapes, self._fill(inputs))
        recorded = recorder.record(lambda: self._execute(bound), self._stream, self._memory, inputs)
        if recorded is None:
            return None
        self._graphs[shapes] = recorded[0], bound
        return self._graphs[shapes]

    def _bind(self, bound: _Bound, shapes: tuple[torch.Size, ...], inputs: Sequence[torch.Tensor]) -> None:
        """Tell TensorRT the inputs' shapes and where they lie."""
        if shapes != bound.shapes:
            self._bind_shapes(bound, shapes)
        for name, tensor in zip(self._engine.inputs, inputs, strict=True):
            bound.context.set_tensor_address(name, tensor.data_ptr())

    def _bind_shapes(self, bound: _Bound, shapes: tuple[torch.Size, ...]) -> None:
        """Tell TensorRT the inputs' shapes, and lay the outputs into their buffers."""
        engine, context = self._engine, bound.context
        bound.shapes = None
        for name, shape in zip(engine.inputs, shapes, strict=True):
            if not context.set_input_shape(name, tuple(shape)):
                raise RuntimeError(f"the plan {engine.name!r} does not take {name} of shape {tuple(shape)}")
        answers = []
        for name in engine.outputs:
            found = tuple(context.get_tensor_shape(name))
            dtype = engine.dtypes[name]
            if size_in_bytes(found, dtype) > self._outputs[name].nbytes:  # an output that grows as its input shrinks
                # The smaller buffer lives on where a graph writes into it.
                self._outputs.update(self._allocate({name: size_in_bytes(found, dtype)}))
            answers.append(tensor_in(self._outputs[name], found, dtype))
            context.set_tensor_address(name, self._outputs[name].data_ptr())
        bound.answers, bound.shapes = answers, shapes

    def _execute(self, bound: _Bound) -> None:
        if not bound.context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError(f"TensorRT did not run the plan {self._engine.name!r}; its log says why")
