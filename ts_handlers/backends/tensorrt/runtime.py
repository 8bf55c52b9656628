"""Runs TensorRT plans: the adapter between `ts_handlers.execution` and the TensorRT Python API, in either flavour.

Contexts are created without scratch memory (``USER_MANAGED``) and get theirs from torch's allocator. TensorRT for RTX
compiles its kernels when they first run and keeps them in a *runtime cache*, which is stored beside the plan.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.tensorrt.buffers import size_in_bytes
from ts_handlers.backends.tensorrt.context import TensorRTContext
from ts_handlers.backends.tensorrt.dtypes import tensorrt_dtype, torch_dtype
from ts_handlers.backends.tensorrt.library import import_tensorrt, trt_logger
from ts_handlers.errors import LoadError
from ts_handlers.execution.cuda_graphs import GraphRecorder
from ts_handlers.execution.scratch import ALIGNMENT

logger = logging.getLogger(__name__)


class TensorRTEngine:
    """A deserialised plan; see `ts_handlers.execution.engine.Engine`.

    Parameters
    ----------
    flavour, plan:
        The TensorRT flavour and the file with the serialised engine.
    name:
        Shown in messages.
    inputs, outputs:
        Names of its tensors in the order of the model.
    device:
        A CUDA device.
    weights:
        Weights to put into the plan before it runs, by the names under which it takes them: vectors on the CPU.
    runtime_cache:
        File with TensorRT for RTX's compiled kernels; None, or one that does not exist, starts without.
    cuda_graphs:
        Contexts record their launches for the shapes that run before the model serves, and replay them.
    output_bytes:
        For each profile the bytes of each output at its largest input shapes, as this class found them when the plan
        was built; None finds them.

    Raises
    ------
    LoadError
        TensorRT does not accept the plan (it is damaged, or another version's, flavour's or GPU's) or the weights.

    Attributes
    ----------
    recorder:
        That of all contexts; None without CUDA graphs.
    """

    def __init__(
        self,
        flavour: str,
        plan: Path,
        *,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: torch.device,
        weights: Mapping[str, torch.Tensor] | None = None,
        runtime_cache: Path | None = None,
        cuda_graphs: bool = False,
        output_bytes: Sequence[dict[str, int]] | None = None,
    ) -> None:
        self.trt = import_tensorrt(flavour)
        self.name = name
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.device = device
        self.recorder = GraphRecorder(device) if cuda_graphs else None
        self._runtime = self.trt.Runtime(trt_logger(flavour))
        self.engine: Any = None
        if plan.stat().st_size:  # an empty file cannot be mapped
            with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise LoadError(f"{flavour} does not accept the plan {name!r}; its log says why")
        if weights is not None:
            self._refit(weights, trt_logger(flavour))
        present = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        if present != {*self.inputs, *self.outputs}:
            raise LoadError(f"the plan has the tensors {sorted(present)}, expected {[*self.inputs, *self.outputs]}")
        self.profiles = max(int(self.engine.num_optimization_profiles), 1)
        self.dtypes = {tensor: torch_dtype(self.engine.get_tensor_dtype(tensor)) for tensor in present}
        self._config: Any = None
        self._cache: Any = None
        if hasattr(self.engine, "create_runtime_config") and hasattr(self.trt, "IRuntimeCache"):
            self._config, self._cache = self._runtime_config(runtime_cache)
        self.output_bytes = output_bytes or [self._largest_outputs(profile) for profile in range(self.profiles)]

    def _refit(self, weights: Mapping[str, torch.Tensor], trt_log: Any) -> None:
        refitter = self.trt.Refitter(self.engine, trt_log)
        types = self.trt.DataType
        for name, tensor in weights.items():
            values = self.trt.Weights(tensorrt_dtype(types, tensor.dtype), tensor.data_ptr(), tensor.numel())
            if not refitter.set_named_weights(name, values, self.trt.TensorLocation.HOST):
                raise LoadError(f"the plan {self.name!r} does not take the weight {name!r}; TensorRT's log says why")
        missing = refitter.get_missing_weights()
        if missing:
            raise LoadError(f"the plan {self.name!r} needs further weights: {', '.join(sorted(missing)[:5])}")
        if not refitter.refit_cuda_engine():
            raise LoadError(f"TensorRT does not refit the plan {self.name!r}; its log says why")

    def _runtime_config(self, path: Path | None) -> tuple[Any, Any]:
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        cache = config.create_runtime_cache()
        if path is not None and path.exists() and not cache.deserialize(path.read_bytes()):
            logger.warning("the runtime cache %s is not accepted; kernels are compiled again", path.name)
        config.set_runtime_cache(cache)
        return config, cache

    def runtime_cache(self) -> bytes | None:
        """The kernels compiled so far, for `runtime_cache` of a later engine; None where the flavour has no such."""
        return None if self._cache is None else bytes(memoryview(self._cache.serialize()))

    def create_context(self, profile: int, stream: int) -> Any:
        """A TensorRT execution context without scratch memory, for a CUDA stream's handle."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(self._config if self._config is not None else strategy)
        if context is None or (profile and not context.set_optimization_profile_async(profile, stream)):
            raise LoadError(f"TensorRT creates no execution context for the plan {self.name!r}; its log says why")
        return context

    def _largest_outputs(self, profile: int) -> dict[str, int]:
        """Bytes of each output at a profile's largest input shapes; costs a context."""
        stream = torch.cuda.current_stream(self.device)
        context = self.create_context(profile, stream.cuda_stream)
        stream.synchronize()  # the profile is switched on the stream
        for name in self.inputs:
            context.set_input_shape(name, self.largest_shape(name, profile))
        return {name: size_in_bytes(context.get_tensor_shape(name), self.dtypes[name]) for name in self.outputs}

    def largest_shape(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape of an input in a profile."""
        shape = tuple(self.engine.get_tensor_shape(name))
        return tuple(self.engine.get_tensor_profile_shape(name, profile)[2]) if -1 in shape else shape

    def output_buffers(self, profile: int) -> dict[str, int]:
        """Bytes of the preallocated buffer of each output."""
        return dict(self.output_bytes[profile])

    def input_buffers(self, profile: int) -> dict[str, int]:
        """Bytes of the preallocated buffer of each input, which CUDA graphs need."""
        if self.recorder is None:
            return {}
        return {name: size_in_bytes(self.largest_shape(name, profile), self.dtypes[name]) for name in self.inputs}

    def scratch_bytes(self, profile: int) -> int:
        """Scratch memory of a context."""
        return int(self.engine.get_device_memory_size_for_profile_v2(profile))

    def buffer_bytes(self, profile: int) -> int:
        """Preallocated outputs, and inputs where CUDA graphs are on."""
        sizes = [*self.output_buffers(profile).values(), *self.input_buffers(profile).values()]
        return sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in sizes)  # each is an allocation of its own

    def new_context(self, profile: int, stream: torch.cuda.Stream) -> TensorRTContext:
        """A context for use on `stream` only."""
        return TensorRTContext(self, profile, stream)
