"""The boundary between the execution-context pool and an inference engine.

One side is `ts_handlers.execution.runner` with its pool, its memory and its scratch chain; the other side is an
adapter for TensorRT, or the fake of the tests. Names follow torch.cuda and TensorRT, so that ``torch.cuda.Stream`` and
``torch.cuda.Event`` fit as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Event(Protocol):
    """A point in a stream, as ``torch.cuda.Event``; only handed from one stream to another."""


class Stream(Protocol):
    """An ordered queue of work on the device, as ``torch.cuda.Stream``."""

    def wait_stream(self, stream: Any, /) -> None:
        """Later work here starts after everything that `stream` holds now."""

    def wait_event(self, event: Any, /) -> None:
        """Later work here starts after `event`."""

    def record_event(self, event: Any = None, /) -> Any:
        """An event after everything that this stream holds now."""

    def synchronize(self) -> None:
        """Block this thread, without the interpreter's lock, until the stream is empty."""


class Buffer(Protocol):
    """Device memory that lives as long as this object.

    `address` is a multiple of 256, as TensorRT demands of scratch memory; `nbytes` its length in bytes.
    """

    address: int
    nbytes: int


class Device(Protocol):
    """Memory and streams of one GPU."""

    def free_bytes(self) -> int:
        """What can still be allocated: the driver's free memory and what torch's allocator holds unused."""

    def allocated_bytes(self) -> int:
        """What torch's allocator has handed out in this process."""

    def used_bytes(self) -> int:
        """What is in use on the whole device, allocations past torch's allocator and of other processes included."""

    def new_stream(self) -> Stream:
        """A stream of its own."""

    def current_stream(self) -> Stream:
        """The stream on which the calling thread makes inputs and will use the answers."""

    def allocate(self, nbytes: int, stream: Stream) -> Buffer:
        """Memory from torch's allocator for use on `stream` (and on others only after an event)."""


class Context(Protocol):
    """One execution context: the activations of one inference at a time.

    It is used by one thread at a time, always with the stream that `Engine.new_context` got.
    """

    def use_scratch(self, address: int, nbytes: int) -> None:
        """Bind scratch memory; called once, before the first `enqueue`. The address never changes afterwards, so a
        CUDA graph recorded by `enqueue` stays valid."""

    def enqueue(self, inputs: Sequence[Any]) -> list[Any]:
        """Put one inference on the context's stream and return without waiting for it.

        Parameters
        ----------
        inputs:
            Device tensors in the engine's order with shapes inside the profile, made on any stream that the context's
            stream already waits for. They stay alive until the stream has been synchronised.

        Returns
        -------
        The outputs, as tensors that this call allocated on the context's stream and that no later call touches: either
        TensorRT wrote into them directly, or they are copies of the preallocated outputs made on the stream.

        Raises
        ------
        Exception
            Anything; work that was already put on the stream may still run, which the runner takes care of.
        """


class Engine(Protocol):
    """A deserialised plan: weights once on the device, and any number of contexts.

    `name` is shown in messages and in `describe` (such as ``batch=1..8``), `profiles` is the number of its optimization
    profiles.
    """

    name: str
    profiles: int

    def scratch_bytes(self, profile: int) -> int:
        """Scratch that a context of this profile needs (``engine.get_device_memory_size_for_profile_v2``)."""

    def buffer_bytes(self, profile: int) -> int:
        """What one context of this profile allocates at its creation for itself: preallocated outputs at the largest
        shape of the profile, and input buffers where CUDA graphs need them."""

    def new_context(self, profile: int, stream: Stream) -> Context:
        """A context without scratch (``USER_MANAGED``) with its buffers allocated, for use on `stream` only."""
