"""Clients of the model's process that do what no worker does: each hurts itself and nobody else."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
import torch

from tests.support.marks import needs_root
from tests.support.subprocesses import open_to_others
from tests.support.workers import ROWS, Start, check_answer, is_alive, wait_until
from ts_handlers.model_process.folder import Folder
from ts_handlers.model_process.segments import Outbox
from ts_handlers.model_process.wire import Call, Connection, ConnectionLost, Describe, Hello, TensorSpec

pytestmark = pytest.mark.processes


def connect(temporary: Path) -> Connection:
    (found,) = temporary.glob("ts_handlers-*/*/")
    channel = Folder(found).connect()
    assert channel is not None
    connection = Connection(channel)
    connection.limit(60)
    return connection


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def is_lost(connection: Connection) -> bool:
    with contextlib.suppress(ConnectionLost):
        while True:
            connection.receive()
    return True


def test_memory_that_a_client_makes_smaller_costs_that_client_alone(
    start: Start, archive: Path, temporary: Path
) -> None:
    worker = start()
    process = worker.ready()
    hostile = connect(temporary)
    hostile.send(Hello(os.getpid()))
    memory = os.memfd_create("shrinks")
    os.ftruncate(memory, 1 << 20)
    call = Call((TensorSpec("float32", (1, 4), 0),))
    with contextlib.suppress(ConnectionLost):
        hostile.send(call, (memory,))
        hostile.receive()  # mapped by now, if it was taken
        os.ftruncate(memory, 0)
        hostile.send(call)
    assert is_lost(hostile)
    check_answer(worker.call(ROWS), archive, ROWS)
    assert worker.describe()["facts"]["across_workers"]["pid"] == process
    assert is_alive(process)


def test_memory_that_is_none_costs_that_client_alone(start: Start, archive: Path, temporary: Path) -> None:
    worker = start()
    process = worker.ready()
    assert wait_until(lambda: worker.describe()["facts"]["contexts"]["in_use"] == 0)
    before = open_files(process)
    for path in ("/dev/zero", "/etc/hostname"):
        hostile = connect(temporary)
        hostile.send(Hello(os.getpid()))
        with open(path, "rb") as file, contextlib.suppress(ConnectionLost):
            hostile.send(Call((TensorSpec("float32", (1, 4), 0),)), (file.fileno(), file.fileno()))
        assert is_lost(hostile)
        hostile.close()
    assert wait_until(lambda: open_files(process) == before)
    check_answer(worker.call(ROWS), archive, ROWS)
    assert is_alive(process)


def test_descriptors_that_a_client_leaves_are_closed(start: Start, archive: Path, temporary: Path) -> None:
    worker = start()
    process = worker.ready()
    worker.describe()
    before = open_files(process)
    for _ in range(20):
        hostile = connect(temporary)
        hostile.send(Hello(os.getpid()), (0, 1))
        assert is_lost(hostile)
        hostile.close()
        hostile = connect(temporary)
        hostile.send(Describe(), (0, 1))
        assert is_lost(hostile)
        hostile.close()
    assert wait_until(lambda: open_files(process) == before)
    check_answer(worker.call(ROWS), archive, ROWS)


def test_a_client_that_never_reads_costs_itself_alone(start: Start, archive: Path, temporary: Path) -> None:
    """Calls, so that they pass the gate; a retried call of another client then needs it empty."""
    worker = start(contexts={"count": 2})
    process = worker.ready()
    hostile = connect(temporary)
    hostile.send(Hello(os.getpid()))
    specs, descriptor = Outbox().write([torch.ones(1, 4)])
    assert descriptor is not None
    hostile.send(Call(specs), (descriptor,))
    os.close(descriptor)
    with contextlib.suppress(ConnectionLost):
        for _ in range(100_000):
            hostile.send(Describe())
            hostile.send(Call(specs))
    other = connect(temporary)
    other.send(Hello(os.getpid()))
    specs, descriptor = Outbox().write([torch.ones(1, 4)])
    assert descriptor is not None
    other.send(Call(specs, retried=True), (descriptor,))
    os.close(descriptor)
    assert [type(other.receive()[0]).__name__ for _ in range(2)] == ["Started", "Answer"]
    check_answer(worker.call(ROWS), archive, ROWS)
    assert worker.describe()["facts"]["across_workers"]["pid"] == process


@needs_root
def test_another_user_who_reaches_the_socket_gets_no_answer(start: Start, archive: Path, temporary: Path) -> None:
    """The folder's mode keeps others away; here somebody has opened it, and every folder above."""
    worker = start()
    process = worker.ready()
    (folder,) = temporary.glob("ts_handlers-*/*/")
    open_to_others(folder)
    (folder / "socket").chmod(0o777)

    def greet(user: int) -> int:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = 9
        try:
            os.chdir(folder)
            os.setgid(user)
            os.setuid(user)
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channel.connect("socket")
            connection = Connection(channel)
            connection.limit(60)
            status = 1
            connection.send(Hello(os.getpid(), worker=True))
            connection.receive()
            status = 0
        finally:
            os._exit(status)

    assert (greet(0), greet(54321)) == (0, 1)
    check_answer(worker.call(ROWS), archive, ROWS)
    assert worker.describe()["facts"]["across_workers"]["pid"] == process
