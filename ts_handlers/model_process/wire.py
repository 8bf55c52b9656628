"""The messages between workers and the model process, and the connection that carries them: a Unix socket.

The socket keeps the boundaries of messages. A message is MessagePack, an array whose first element is the kind. File
descriptors go beside it: those of shared memory (`ts_handlers.model_process.segments`), and with a worker's `Hello`
where its log goes.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
from typing import Any

import msgspec

from ts_handlers.settings.model import Dimension, InputSpec

MOST_BYTES = 1 << 20
MOST_DESCRIPTORS = 2


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """A tensor in shared memory: torch's name of its dtype, its shape, and where it begins, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The first message of a connection.

    `worker` says that the connection stands for a worker: it stays open while the worker lives, and the descriptors of
    the worker's standard output and standard error come with it. Other connections carry calls.
    """

    pid: int
    worker: bool = False


class Call(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One call of the model; `retried` when an earlier process has ended while it was under way."""

    tensors: tuple[TensorSpec, ...]
    retried: bool = False


class Describe(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Asks for `ModelDescription`."""


class Started(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A retried call runs now, and nothing else does."""


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A call's outputs. `structure` is left out when it is that of the connection's last answer."""

    tensors: tuple[TensorSpec, ...]
    structure: dict[str, Any] | None
    counted: dict[str, float]


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A call's exception: the name of its class, and its message."""

    kind: str
    message: str
    counted: dict[str, float]


class ModelDescription(msgspec.Struct, frozen=True, array_like=True, tag="Description"):
    """What the model's `describe` says, what it accepts, and the process that holds it.

    `first` is true once: for the worker that reports how the process has started.
    """

    facts: dict[str, Any]
    inputs: tuple[InputSpec, ...]
    dimensions: dict[str, Dimension]
    pid: int
    workers: tuple[int, ...]
    counted: dict[str, float]
    first: bool = False


Message = Hello | Call | Describe | Started | Answer | Refusal | ModelDescription

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class ConnectionLost(Exception):
    """The other side is gone, or what it says makes no sense."""


class NoAnswer(ConnectionLost):
    """The other side has said nothing within the connection's limit."""


class Connection:
    """One side of a connection; for one thread at a time.

    Parameters
    ----------
    channel:
        The socket.
    waits:
        Whether a message waits until the other side has read those before it. If not, a side that leaves its messages
        unread loses the connection.
    """

    def __init__(self, channel: socket.socket, *, waits: bool = True) -> None:
        self._channel = channel
        self._flags = 0 if waits else socket.MSG_DONTWAIT
        self._buffer: Any = None  # made when the first message comes; a waiting worker needs none
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                channel.setsockopt(socket.SOL_SOCKET, option, 2 * MOST_BYTES)

    def peer(self) -> tuple[int, int]:
        """Process and user of the other side: who has connected, or who listened when this side connected."""
        pid, uid, _ = struct.unpack("3i", self._channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid

    def limit(self, seconds: float) -> None:
        """For how long `receive` and `send` wait before the connection counts as lost; 0 for ever."""
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._channel.setsockopt(socket.SOL_SOCKET, option, limit)

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message.

        Raises
        ------
        ConnectionLost
            Nobody reads it any more, or not in time.
        ValueError
            It is too large for one message.
        """
        data = _encoder.encode(message)
        try:
            if descriptors:
                rights = array.array("i", descriptors)
                self._channel.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], self._flags)
            else:
                self._channel.send(data, self._flags)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise ValueError(f"a message of {len(data)} bytes does not fit the socket") from error
            raise ConnectionLost(str(error)) from error

    def receive(self) -> tuple[Message, list[int]]:
        """Wait for a message; its descriptors are the caller's to close.

        Raises
        ------
        ConnectionLost
            The other side has ended, or this process may open no more files and the message has lost its descriptors.
        """
        if self._buffer is None:
            self._buffer = bytearray(MOST_BYTES)
        space = socket.CMSG_SPACE(4 * MOST_DESCRIPTORS)
        try:
            count, ancillary, flags, _ = self._channel.recvmsg_into([self._buffer], space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError as error:
            raise NoAnswer("no message has come in time") from error
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        try:
            if not count:
                raise ConnectionLost("the other side has ended")
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise ConnectionLost("a message has lost its descriptors; this process may open no more files")
            message = _decoder.decode(memoryview(self._buffer)[:count])
        except BaseException as error:
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, msgspec.DecodeError):
                raise ConnectionLost(f"a message that makes no sense: {error}") from error
            raise
        return message, list(descriptors)

    def wait_for_end(self) -> None:
        """Wait until the other side has ended; what it says until then is not listened to."""
        while not self.ends_within(None):
            pass

    def ends_within(self, seconds: float | None) -> bool:
        """Whether the other side ends in this time; a message that comes instead is not listened to."""
        try:
            if self.has_message(seconds):
                for descriptor in self.receive()[1]:
                    os.close(descriptor)
        except ConnectionLost:
            return True
        return False

    def has_message(self, seconds: float | None) -> bool:
        """Whether a message comes in this time, or the other side ends; None waits for ever."""
        poll = select.poll()
        try:
            poll.register(self._channel, select.POLLIN)
            return bool(poll.poll(None if seconds is None else seconds * 1000))
        except (OSError, ValueError) as error:  # it was closed meanwhile
            raise ConnectionLost(str(error)) from error

    def is_abandoned(self) -> bool:
        """Whether the other side has gone."""
        poll = select.poll()
        try:
            poll.register(self._channel, select.POLLRDHUP)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True

    def close_in_child(self) -> None:
        """Close the descriptor that a forked process has inherited; the connection itself goes on."""
        self._channel.close()

    def close(self) -> None:
        """Close it, and wake a thread of this process that waits for a message."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._channel.close()
