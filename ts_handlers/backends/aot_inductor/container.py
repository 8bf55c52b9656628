"""An AOTInductor library behind its C interface, which leaves Python's interpreter lock alone while it computes.

torch's own runner (``torch._C._aoti.AOTIModelContainerRunnerCpu``, ``...Cuda``) keeps the lock for the whole call, so
that no other thread of a worker runs meanwhile. Every library that AOTInductor writes also exports the C interface of
``torch/csrc/inductor/aoti_runtime/interface.h``; `ctypes` gives the lock away while it calls one of its functions.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ts_handlers.errors import LoadError

_PREFIX = "AOTInductorModelContainer"
_REQUIRED = (
    "CreateWithDevice",
    "Delete",
    "GetNumConstants",
    "GetConstantName",
    "GetConstantOriginalFQN",
    "GetNumInputs",
    "GetNumOutputs",
    "Run",
    "RunSingleThreaded",
    "UpdateUserManagedConstantBufferPairs",
)


class _ConstantMapEntry(ctypes.Structure):
    """``AOTInductorConstantMapEntry``."""

    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


_to_capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
_to_tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def open_library(
    library: Path, device: torch.device, count: int = 1, single_threaded: bool = False
) -> Container | TorchRunner:
    """Load a library where it lies: nothing is unpacked into the temporary folder.

    Parameters
    ----------
    library:
        The shared library, with its device code beside it.
    device:
        A CPU or a CUDA device.
    count:
        Number of inferences that it can run at once; they share the weights.
    single_threaded:
        For one inference at a time, which may then be recorded in a CUDA graph. torch's runner cannot do this.

    Raises
    ------
    LoadError, RuntimeError
        It cannot be loaded, or there is no runner for such a device.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type not in ("cpu", "cuda"):
        raise LoadError(f"no AOTInductor runner for device {device.type!r}; use the backend 'inductor' or 'eager'")
    if library.with_suffix(".json").exists():  # operators that torch's runner calls for the library
        return TorchRunner(library, device, count)
    count = 1 if single_threaded else count
    try:
        interface = ctypes.CDLL(str(library))
    except OSError as error:
        raise LoadError(f"{library.name} cannot be loaded: {error}") from error
    if not all(hasattr(interface, _PREFIX + name) for name in _REQUIRED):  # another version of torch
        return TorchRunner(library, device, count)
    return Container(interface, library.parent, device, count, single_threaded)


class TorchRunner:
    """torch's own runner, which keeps the interpreter's lock, with the interface of `Container`."""

    def __init__(self, library: Path, device: torch.device, count: int) -> None:
        runners = torch._C._aoti
        self._runner: Any
        if device.type == "cpu":
            self._runner = runners.AOTIModelContainerRunnerCpu(str(library), count)
        else:
            self._runner = runners.AOTIModelContainerRunnerCuda(str(library), count, str(device), str(library.parent))
        self._borrowed: dict[str, torch.Tensor] = {}
        self.run = self._runner.run

    def constant_names(self) -> dict[str, str]:
        """The names of the constants in the library, and in the exported program."""
        return dict(self._runner.get_constant_names_to_original_fqns())

    def use_constants(self, constants: Mapping[str, torch.Tensor]) -> None:
        """Give it every constant by its name in the library; the tensors are used where they are, not copied."""
        self._borrowed = dict(constants)
        # (map, use_inactive, validate_full_updates, user_managed)
        self._runner.update_constant_buffer(self._borrowed, False, True, True)


class Container:
    """A loaded library with as many runners as inferences may run at once; they share the weights.

    Parameters
    ----------
    interface:
        The loaded library.
    folder:
        Where its device code lies.
    device:
        A CPU or a CUDA device with its index.
    count:
        Number of runners. A call that finds none free waits for one, without the interpreter's lock.
    single_threaded:
        See `open_library`; `count` is 1 then.

    Raises
    ------
    LoadError
        The library does not accept this.
    """

    def __init__(
        self, interface: Any, folder: Path, device: torch.device, count: int, single_threaded: bool = False
    ) -> None:
        self._interface = interface
        self._device = device
        container = ctypes.c_void_p()
        code = None if device.type == "cpu" else str(folder).encode()
        size = ctypes.c_size_t(count)
        self._call("CreateWithDevice", ctypes.byref(container), size, str(device).encode(), code)
        self._container = container
        self._borrowed: list[int] = []
        weakref.finalize(self, _delete, interface, container, self._borrowed).atexit = False  # the process ends anyway
        self._inputs, self._outputs = self._number("GetNumInputs"), self._number("GetNumOutputs")
        self._on_gpu = device.type == "cuda"
        self._input_array, self._output_array = ctypes.c_void_p * self._inputs, ctypes.c_void_p * self._outputs
        self._run = getattr(interface, _PREFIX + ("RunSingleThreaded" if single_threaded else "Run"))
        # In this order: container, inputs, their number, outputs, their number, stream, proxy executor.
        handles, number = ctypes.c_void_p, ctypes.c_size_t
        self._run.argtypes = (handles, handles, number, handles, number, handles, handles)

    def constant_names(self) -> dict[str, str]:
        """The names of the constants in the library, and in the exported program."""
        names = {}
        for index in range(self._number("GetNumConstants")):
            name, fqn = ctypes.c_char_p(), ctypes.c_char_p()
            position = ctypes.c_size_t(index)
            self._call("GetConstantName", self._container, position, ctypes.byref(name))
            self._call("GetConstantOriginalFQN", self._container, position, ctypes.byref(fqn))
            names[(name.value or b"").decode()] = (fqn.value or b"").decode()
        return names

    def use_constants(self, constants: Mapping[str, torch.Tensor]) -> None:
        """Give it every constant by its name in the library; the tensors are used where they are, not copied.

        torch keeps a reference to each for as long as the process lives (``MaybeOwningAtenTensorHandle``).
        """
        entries = (_ConstantMapEntry * len(constants))()
        handles = _handles(list(constants.values()))
        self._borrowed.extend(handles)
        for entry, name, handle in zip(entries, constants, handles, strict=True):
            entry.name, entry.handle = name.encode(), handle
        count = ctypes.c_size_t(len(constants))
        inactive, all_of_them = ctypes.c_bool(False), ctypes.c_bool(True)
        self._call("UpdateUserManagedConstantBufferPairs", self._container, entries, count, inactive, all_of_them)

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """One inference, on a GPU on the calling thread's current stream.

        Safe to call from any number of threads unless it is single-threaded.

        Raises
        ------
        RuntimeError
            The library reports a failure; what it says about it is on standard error.
        """
        if len(tensors) != self._inputs:  # the library would end the process
            raise RuntimeError(f"the compiled model takes {self._inputs} tensors, found {len(tensors)}")
        stream = torch._C._cuda_getCurrentRawStream(self._device.index) if self._on_gpu else None
        inputs = self._input_array(*_handles(tensors))
        outputs = self._output_array()
        if self._run(self._container, inputs, self._inputs, outputs, self._outputs, stream, None):
            raise RuntimeError("the compiled model failed; the reason is in the worker's log")
        return _take(outputs)

    def _number(self, name: str) -> int:
        number = ctypes.c_size_t()
        self._call(name, self._container, ctypes.byref(number))
        return number.value

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._interface, _PREFIX + name)(*arguments):
            raise LoadError(f"{_PREFIX}{name} failed; the reason is in the worker's log")


def _handles(tensors: list[torch.Tensor]) -> list[int]:
    """New ``AtenTensorHandle``s, for the callee to own."""
    return [_pointer_of(capsule, None) for capsule in _to_capsules(tensors)]


def _take(handles: Iterable[int | None]) -> list[torch.Tensor]:
    """The tensors behind handles, which are freed; None for a null handle, which is an output that is None."""
    capsules: list[Any] = [None if handle is None else _new_capsule(handle, None, None) for handle in handles]
    return _to_tensors(capsules)


def _delete(interface: Any, container: ctypes.c_void_p, borrowed: list[int]) -> None:
    getattr(interface, f"{_PREFIX}Delete")(container)
    _take(borrowed)
