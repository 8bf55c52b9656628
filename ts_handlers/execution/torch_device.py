"""`ts_handlers.execution.engine.Device` on torch's CUDA allocator and streams."""

from __future__ import annotations

import contextlib
import ctypes
import threading

import torch


def begin_cuda(device: torch.device) -> None:
    """Create a CUDA device's primary context on a thread, while this one reads files; torch then finds it made.

    torch's own initialization holds the interpreter's lock. Says nothing of errors: torch meets them again.
    """

    def run() -> None:
        with contextlib.suppress(OSError):  # no driver
            driver = ctypes.CDLL("libcuda.so.1")
            ordinal, context = ctypes.c_int(), ctypes.c_void_p()
            if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(ordinal), device.index or 0) == 0:
                driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal)  # kept while the process lives

    if device.type == "cuda" and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        threading.Thread(target=run, daemon=True, name="ts_handlers-cuda").start()


class TensorBuffer:
    """Device memory held by a tensor of bytes; torch's allocator aligns it to 512 bytes."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._tensor = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=device)
        self.address: int = self._tensor.data_ptr()
        self.nbytes = nbytes


class TorchDevice:
    """One CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_bytes(self) -> int:
        """The driver's free memory and what torch's allocator holds unused."""
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(torch.cuda.mem_get_info(self._device)[0] + cached)

    def allocated_bytes(self) -> int:
        """What torch's allocator has handed out in this process."""
        return int(torch.cuda.memory_allocated(self._device))

    def used_bytes(self) -> int:
        """What is in use on the whole device."""
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)

    def new_stream(self) -> torch.cuda.Stream:
        """A stream of its own, from torch's pool of streams."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.cuda.Stream:
        """The calling thread's stream."""
        return torch.cuda.current_stream(self._device)

    def allocate(self, nbytes: int, stream: torch.cuda.Stream) -> TensorBuffer:
        """Memory that torch's allocator counts for `stream`."""
        with torch.cuda.stream(stream):
            return TensorBuffer(nbytes, self._device)
