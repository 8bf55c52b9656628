"""Tensors in memory that two processes share: an outbox writes them, the inbox at the other side reads them.

The memory is a ``memfd`` without a name: it goes when both processes have closed it, however they ended. An outbox that
is too small for the next tensors makes a larger one, whose descriptor travels with the message that speaks of them.
Its size is sealed: memory that the other side has made smaller would end a process that reads it (SIGBUS).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_handlers.model_process.wire import TensorSpec

ALIGNMENT = 64
SMALLEST = 1 << 16
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_REMEMBERED = 64
"""Layouts of tensors whose views are kept, so that a call need not make them again."""

Layout = tuple[tuple[torch.dtype, torch.Size], ...]
OnMemory = Callable[[torch.Tensor], Callable[[], None]]
"""Called with new shared memory, as bytes; returns what undoes it."""


def _leave(memory: torch.Tensor) -> Callable[[], None]:
    return lambda: None


class Segment:
    """One piece of shared memory in this process.

    Parameters
    ----------
    descriptor:
        Of the memfd; closed by this.
    on_memory:
        Prepares the memory for a device.

    Raises
    ------
    ValueError
        Its size is not sealed, or it is empty.
    """

    def __init__(self, descriptor: int, on_memory: OnMemory = _leave) -> None:
        try:
            if not _is_sealed(descriptor):
                raise ValueError("the size of the shared memory is not sealed")
            self.nbytes = os.fstat(descriptor).st_size
            self.memory = torch.frombuffer(mmap.mmap(descriptor, self.nbytes), dtype=torch.uint8)
        finally:
            os.close(descriptor)
        self._undo = on_memory(self.memory)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset: int) -> torch.Tensor:
        """A view of the memory as a tensor."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        if offset < 0 or offset % ALIGNMENT or offset + nbytes > self.nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} do not lie in shared memory of {self.nbytes}")
        return self.memory[offset : offset + nbytes].view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Undo what was done for the device; the memory goes with the last view of it."""
        self._undo()


def _is_sealed(descriptor: int) -> bool:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # it is no memfd
        return False


class Outbox:
    """Writes tensors for the other side. What was written before is overwritten."""

    def __init__(self, on_memory: OnMemory = _leave) -> None:
        self._on_memory = on_memory
        self._segment: Segment | None = None
        self._views: dict[Layout, tuple[tuple[TensorSpec, ...], list[torch.Tensor]]] = {}

    def write(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[TensorSpec, ...], int | None]:
        """Copy tensors into shared memory; from a GPU the copies are enqueued on the current stream.

        Returns
        -------
        Where they are, and the descriptor of new memory, if any was needed, which is the caller's to close.
        """
        layout = tuple([(tensor.dtype, tensor.shape) for tensor in tensors])
        descriptor = None
        found = self._views.get(layout)
        if found is None:
            specs, nbytes = _lay_out(tensors)
            if self._segment is None or nbytes > self._segment.nbytes:
                descriptor = self._grow(nbytes)
            assert self._segment is not None
            views = [self._segment.tensor(t.dtype, t.shape, s.offset) for t, s in zip(tensors, specs, strict=True)]
            if len(self._views) >= _REMEMBERED:
                self._views.clear()
            found = self._views[layout] = specs, views
        for view, tensor in zip(found[1], tensors, strict=True):
            if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
                view.copy_(tensor, non_blocking=True)
            else:
                copy_bytes(view, tensor)
        return found[0], descriptor

    def _grow(self, nbytes: int) -> int:
        self.close()
        descriptor = os.memfd_create("ts_handlers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, max(SMALLEST, 1 << (nbytes - 1).bit_length()))
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            self._segment = Segment(os.dup(descriptor), self._on_memory)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        """Give the memory back."""
        self._views.clear()
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()


class Inbox:
    """Reads what the other side's outbox has written."""

    def __init__(self, on_memory: OnMemory = _leave) -> None:
        self._on_memory = on_memory
        self._segment: Segment | None = None
        self._views: dict[tuple[TensorSpec, ...], list[torch.Tensor]] = {}

    def replace(self, descriptor: int) -> None:
        """Take the other side's new memory; `descriptor` is closed. Raises `ValueError` as `Segment` does."""
        self.close()
        self._segment = Segment(descriptor, self._on_memory)

    def read(self, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
        """Views of the tensors, which the other side overwrites with its next message.

        Raises
        ------
        ValueError
            They do not lie in the memory.
        """
        views = self._views.get(specs)
        if views is None:
            if self._segment is None:
                raise ValueError("no shared memory has come")
            views = [self._segment.tensor(getattr(torch, spec.dtype), spec.shape, spec.offset) for spec in specs]
            if len(self._views) >= _REMEMBERED:
                self._views.clear()
            self._views[specs] = views
        return views

    def close(self) -> None:
        """Give the memory back."""
        self._views.clear()
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy between contiguous tensors of one size on the CPU, on this thread and without the interpreter's lock.

    torch's own copies take all processors and wait for each of them, which takes long where other processes use them.
    """
    ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)
    return target


def _lay_out(tensors: Sequence[torch.Tensor]) -> tuple[tuple[TensorSpec, ...], int]:
    specs: list[TensorSpec] = []
    end = 0
    for tensor in tensors:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        specs.append(TensorSpec(str(tensor.dtype)[6:], tuple(tensor.shape), offset))
        end = offset + tensor.numel() * tensor.element_size()
    return tuple(specs), max(end, 1)


def pin(memory: torch.Tensor) -> Callable[[], None]:
    """Register memory with CUDA, so that copies from and to the GPU overlap with other work; see `OnMemory`.

    Where the driver refuses (a limit on locked memory, say), copies work as they do from any memory.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) != 0:
        with contextlib.suppress(RuntimeError):  # the next launch reports that error as its own: one that nobody needs
            torch.ones(1, device="cuda")
        return lambda: None

    def undo() -> None:
        runtime.cudaHostUnregister(memory.data_ptr())

    return undo
