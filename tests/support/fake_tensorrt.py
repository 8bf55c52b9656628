"""TensorRT's Python API and torch's CUDA graphs, stood in for on the CPU, as far as the runner of plans uses them.

A plan is JSON. Its engine reads and writes the addresses that its contexts were given, so that a wrong or a stale one
shows in the answers. A graph replays the addresses and shapes of its recording. Nothing here says anything about a real
engine's numbers or speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FLOAT_BYTES = 4


def floats(address: int, count: int) -> Any:
    return (ctypes.c_float * count).from_address(address)


class Driver:
    """What the device does, and a log of it.

    `fails_in_capture` makes every execution fail that is being recorded.
    """

    def __init__(self) -> None:
        self.capturing: list[Callable[[], None]] | None = None
        self.log: list[str] = []
        self.contexts = 0
        self.fails_in_capture = False

    def submit(self, work: Callable[[], None]) -> None:
        if self.capturing is not None:
            self.capturing.append(work)
            return
        self.log.append("run")
        work()


class Graph:
    """``torch.cuda.CUDAGraph``."""

    driver: Driver

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "") -> None:
        assert self.driver.capturing is None
        self.driver.capturing = self._work

    def capture_end(self) -> None:
        self.driver.capturing = None
        self.driver.log.append("record")

    def replay(self) -> None:
        self.driver.log.append("replay")
        for work in self._work:
            work()


class Stream:
    cuda_stream = 7

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class Context:
    """``IExecutionContext``; what was told to it is what its next execution uses.

    TensorRT leaves undefined what a graph does once its context has been told anything else, so that fails here.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.recorded = False
        engine.driver.contexts += 1

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        return True

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.scratch = address, nbytes

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.recorded
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._engine.output_shape(name, self._shapes)

    def set_tensor_address(self, name: str, address: int) -> None:
        assert not self.recorded
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        driver = self._engine.driver
        assert self.scratch is not None
        assert not self.recorded
        if driver.capturing is not None and driver.fails_in_capture:
            return False
        self.recorded = driver.capturing is not None
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        driver.submit(lambda: self._engine.compute(shapes, addresses))
        return True


class Engine:
    """``ICudaEngine``: of ``x`` (batch, n) it makes ``y`` (batch), the sums of its rows, and ``pad`` (64 / n)."""

    def __init__(self, driver: Driver, facts: dict[str, Any]) -> None:
        self.driver = driver
        self._outputs: list[str] = facts["outputs"]
        self._names = ["x", *self._outputs]
        self.num_io_tensors = len(self._names)
        self._profiles: list[list[list[int]]] = facts["profiles"]  # [smallest, optimal, largest] shape of x
        self.num_optimization_profiles = len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name="FLOAT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, -1)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self._profiles[profile]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1024

    def create_execution_context(self, strategy: Any) -> Context:
        return Context(self)

    def output_shape(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        rows, width = shapes["x"]
        return (rows,) if name == "y" else (64 // width,)

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        rows, width = shapes["x"]
        x = floats(addresses["x"], rows * width)
        for name in self._outputs:
            (count,) = self.output_shape(name, shapes)
            y = floats(addresses[name], count)
            for index in range(count):
                y[index] = sum(x[index * width : (index + 1) * width]) if name == "y" else float(width)


class Buffer:
    def __init__(self, nbytes: int) -> None:
        self.address, self.nbytes = 4096, nbytes


class Device:
    """A `ts_handlers.execution.engine.Device`."""

    def __init__(self, device: Any = None) -> None:
        self.allocated = 0

    def free_bytes(self) -> int:
        return 1 << 30

    def allocated_bytes(self) -> int:
        return 0

    def used_bytes(self) -> int:
        return 0

    def new_stream(self) -> Stream:
        return Stream()

    def current_stream(self) -> Stream:
        return Stream()

    def allocate(self, nbytes: int, stream: Any) -> Buffer:
        return Buffer(nbytes)


@contextlib.contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield


def use_fake_tensorrt(patch: pytest.MonkeyPatch) -> Driver:
    """Stand in for the flavour's module and for torch.cuda; returns what its engines run on."""
    from ts_handlers.backends.tensorrt import library as tensorrt_library
    from ts_handlers.backends.tensorrt import runtime as tensorrt_runtime
    from ts_handlers.execution import torch_device

    driver = Driver()

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, data: Any) -> Engine:
            return Engine(driver, json.loads(bytes(data)))

    strategy = types.SimpleNamespace(USER_MANAGED="user")
    module = types.SimpleNamespace(Runtime=Runtime, ExecutionContextAllocationStrategy=strategy)
    Graph.driver = driver
    patch.setattr(tensorrt_runtime, "import_tensorrt", lambda flavour: module)
    patch.setattr(tensorrt_runtime, "trt_logger", lambda flavour: None)
    patch.setattr(tensorrt_library, "version", lambda flavour: f"{flavour}-0")
    patch.setattr(torch_device, "TorchDevice", Device)
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    patch.setattr(
        torch.cuda, "memory_snapshot", lambda: [{"segment_pool_id": (0, part), "total_size": 64} for part in (0, 1)]
    )
    patch.setattr(torch.cuda, "memory_reserved", lambda device: 128)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    patch.setattr(torch.cuda, "stream", _on_stream)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return driver


def write_fake_plan(path: Path, outputs: list[str], profiles: list[list[list[int]]]) -> None:
    """A plan of these outputs, each profile as the smallest, the best and the largest shape of ``x``."""
    assert all(math.prod(shape) for profile in profiles for shape in profile)
    path.write_text(json.dumps({"outputs": outputs, "profiles": profiles}))
