"""The parts of the process's side that need no process: calls of one connection, and counts."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import settings_of
from tests.support.workers import (
    wait_until,
)
from ts_handlers import ModuleSource, start_model
from ts_handlers.model_process.gate import Gate
from ts_handlers.model_process.segments import Outbox
from ts_handlers.model_process.server import Counted, _Calls
from ts_handlers.model_process.wire import Call, Connection


def send_call(connection: Any) -> None:
    """As a worker does."""
    specs, descriptor = Outbox().write([torch.ones(1, 4)])
    assert descriptor is not None
    connection.send(Call(specs), (descriptor,))
    os.close(descriptor)


def test_a_call_whose_worker_has_ended_is_dropped_and_does_not_count_as_hanging_while_it_waits() -> None:

    called: list[int] = []

    class Model:
        device = torch.device("cpu")

        def __call__(self, x: torch.Tensor) -> None:
            called.append(1)

    gate = Gate(lambda running: None)
    ours, theirs = map(Connection, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    calls = _Calls(theirs, Model(), gate, None, None)  # type: ignore[arg-type]
    ended: list[Exception] = []

    def run() -> None:
        try:
            calls.run()
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with gate.alone():
        thread.start()
        send_call(ours)
        ours.close()
        assert not wait_until(lambda: calls.abandoned_for() > 0, 0.3)
    thread.join(10)
    assert [str(error) for error in ended] == ["the worker has ended"]
    assert not called


def test_each_count_is_told_once() -> None:

    model = start_model(ModuleSource("linear", torch.nn.Linear(4, 3)), settings_of(backends=["eager"]))
    counted = Counted(model)
    told: list[float] = []

    def work() -> None:
        for _ in range(1000):
            model.metrics.count("outside_eager")
            told.append(counted.take().get("outside_eager", 0))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sum(told) == model.metrics.counters["outside_eager"] == 8000


def test_a_call_that_hangs_does_not_keep_the_process_when_its_worker_has_ended(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of `ABANDONED_SECONDS`, with the parts at hand: a real connection and a call that does not end."""

    release = threading.Event()

    class Hangs:
        device = torch.device("cpu")

        def __call__(self, *tensors: torch.Tensor) -> None:
            release.wait(60)

    ours, theirs = map(Connection, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    calls = _Calls(theirs, Hangs(), Gate(lambda n: None), None, None)  # type: ignore[arg-type]

    def run() -> None:
        with contextlib.suppress(Exception):  # what comes after the hanging call is not there
            calls.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    send_call(ours)
    assert wait_until(lambda: calls._answering)
    assert calls.abandoned_for() == 0.0
    ours.close()
    assert wait_until(lambda: calls.abandoned_for() > 0.05)
    release.set()
    thread.join(10)
