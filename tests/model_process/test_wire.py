"""Messages between two ends of a socket pair."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from ts_handlers.model_process.wire import (
    Answer,
    Call,
    Connection,
    ConnectionLost,
    Hello,
    Message,
    ModelDescription,
    Refusal,
    Started,
    TensorSpec,
)
from ts_handlers.settings import Dimension, InputSpec

Pair = tuple[Connection, Connection]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = map(Connection, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    yield left, right
    left.close()
    right.close()


@pytest.mark.parametrize(
    "message",
    [
        Hello(7, worker=True),
        Call((TensorSpec("float16", (2, 3), 64),), retried=True),
        Started(),
        Answer((), {"kind": "constant", "value": None}, {"hit": 1.0}),
        Refusal("InputError", "größer", {}),
        ModelDescription({"a": [1, None]}, (InputSpec("x", "int64", ("n", 4)),), {"n": Dimension(1, 8)}, 3, (4,), {}),
    ],
)
def test_messages_arrive_as_they_were(pair: Pair, message: Message) -> None:
    pair[0].send(message)
    assert pair[1].receive() == (message, [])


def test_descriptors_travel_with_their_message(pair: Pair) -> None:
    read, write = os.pipe()
    pair[0].send(Hello(1, worker=True), (read, write))
    pair[0].send(Started())
    os.close(read)
    os.close(write)
    _, (theirs_read, theirs_write) = pair[1].receive()
    assert pair[1].receive() == (Started(), [])
    os.write(theirs_write, b"x")
    assert os.read(theirs_read, 1) == b"x"
    assert not os.get_inheritable(theirs_read)
    os.close(theirs_read)
    os.close(theirs_write)


def test_the_end_of_the_other_side_is_seen(pair: Pair) -> None:
    assert not pair[1].is_abandoned()
    pair[0].close()
    assert pair[1].is_abandoned()
    with pytest.raises(ConnectionLost):
        pair[1].receive()
    with pytest.raises(ConnectionLost):
        pair[1].send(Started())


def test_closing_wakes_a_thread_that_waits(pair: Pair) -> None:
    thread = threading.Thread(target=pair[1].wait_for_end)
    thread.start()
    pair[1].close()
    thread.join(10)
    assert not thread.is_alive()


def test_what_is_no_message_ends_the_connection() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read, write = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(left, [b"\xc1nonsense"], [read, write])
    with pytest.raises(ConnectionLost, match="makes no sense"):
        Connection(right).receive()
    assert len(os.listdir("/proc/self/fd")) == before
    for each in (left, right):
        each.close()
    os.close(read)
    os.close(write)


def test_a_message_that_is_too_large_is_refused_and_the_connection_stays(pair: Pair) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pair[0].send(Refusal("X", "x" * (32 << 20), {}))
    pair[0].send(Started())
    assert pair[1].receive() == (Started(), [])


def test_a_message_that_has_lost_its_descriptor_ends_the_connection(pair: Pair) -> None:
    """The kernel drops descriptors where this process may open no more files, and delivers the message."""
    read, write = os.pipe()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    pair[0].send(Started(), (read,))
    held = [read, write]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 32, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(read))
        with pytest.raises(ConnectionLost, match="lost its descriptors"):
            pair[1].receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
