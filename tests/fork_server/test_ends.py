"""Client, process and fork server end as what they stand for does, and leave nobody behind."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server.conftest import MakePlace, Place
from tests.support.workers import is_alive, wait_until
from ts_handlers.fork_server.client import send_request

WAITS = """
import os, signal, sys, time

def handle(number, frame):
    print("got", number, flush=True)
    sys.exit(5)

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, handle)
print(os.getpid(), "fork_server_mark" in sys.modules, flush=True)
time.sleep(600)
"""
HOLDS_THE_LOCK = """
import ctypes, os
print(os.getpid(), True, flush=True)
ctypes.PyDLL(None).sleep(600)
"""


def started(place: Place, code: str = WAITS) -> tuple[subprocess.Popen[str], int]:
    """A client, and the id of its process."""
    client = place.start(code)
    assert client.stdout is not None
    pid, forked = client.stdout.readline().split()
    assert forked == "True"
    assert int(pid) != client.pid
    return client, int(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_on(place: Place, number: int) -> None:
    client, pid = started(place)
    client.send_signal(number)
    out, err = client.communicate(timeout=60)
    assert (client.returncode, out, err) == (5, f"got {number:d}\n", "")
    assert not is_alive(pid)


@pytest.mark.parametrize("code", [WAITS, HOLDS_THE_LOCK], ids=["waits", "holds the lock"])
def test_a_process_dies_with_its_client(place: Place, code: str) -> None:
    client, pid = started(place, code)
    client.kill()
    client.wait(60)
    assert wait_until(lambda: not is_alive(pid))
    assert place.is_forked() == (True, "")


def test_a_client_ends_as_its_process_was_ended(place: Place) -> None:
    client, pid = started(place)
    os.kill(pid, signal.SIGKILL)
    assert client.wait(60) == -signal.SIGKILL


def test_processes_outlive_the_fork_server_and_die_with_their_clients(make: MakePlace) -> None:
    place = make()
    (first, one), (second, two), (third, three) = started(place), started(place), started(place)
    place.server.process.kill()
    place.server.process.wait(60)
    assert place.is_forked()[1].startswith(
        "ts_handlers: this process starts without the fork server: nobody listens at"
    )
    assert all(map(is_alive, (one, two, three)))
    first.kill()
    assert wait_until(lambda: not is_alive(one))
    second.terminate()
    assert (second.communicate(timeout=60)[0], second.returncode) == ("got 15\n", 5)
    assert not is_alive(two)
    os.kill(three, signal.SIGKILL)
    assert third.wait(60) == 128 + signal.SIGKILL  # nobody can tell any more what ended it
    first.wait(60)


def test_a_server_that_starts_anew_leaves_its_processes_alone(make: MakePlace) -> None:
    place = make("changing", changing="")
    client, pid = started(place)
    (place.modules / "changing.py").write_text("VALUE = 1")
    assert not place.is_forked()[0]
    assert place.is_forked() == (True, "")
    assert is_alive(pid)
    client.terminate()
    assert (client.communicate(timeout=60)[0], client.returncode) == ("got 15\n", 5)


@pytest.mark.parametrize("how", ["stopped", "nobody", "not one"])
def test_a_server_of_no_use_makes_an_ordinary_process(make: MakePlace, how: str, tmp_path: Path) -> None:
    place = make()
    if how == "stopped":
        place.server.process.send_signal(signal.SIGSTOP)
    elif how == "nobody":
        place.server.socket.unlink()
    else:
        place.server.socket.unlink()
        place.server.socket.mkdir()
    try:
        forked, said = place.is_forked()
    finally:
        place.server.process.send_signal(signal.SIGCONT)
        if how == "not one":
            place.server.socket.rmdir()
    assert not forked
    assert ("it has done nothing for" in said) == (how == "stopped")
    assert ("nobody listens at" in said) == (how != "stopped")


def test_clients_killed_at_any_moment_leave_nobody(make: MakePlace) -> None:
    place = make()
    drawn = random.Random(1)
    server = place.server.process.pid
    open_before = len(os.listdir(f"/proc/{server}/fd"))
    for _ in range(40):
        clients = [place.start(WAITS) for _ in range(drawn.choice([1, 3]))]
        time.sleep(drawn.random() * 0.06)
        for client in clients:
            client.kill()
            client.communicate()
    children = Path(f"/proc/{server}/task/{server}/children")
    assert wait_until(lambda: not children.read_text().split())
    assert wait_until(lambda: len(os.listdir(f"/proc/{server}/fd")) == open_before)
    assert place.is_forked() == (True, "")


def test_a_fork_that_answers_and_goes_before_its_client_continues_is_heard() -> None:
    ours, theirs = socket.socketpair()

    class Slow:
        """The client's end; the other one has read everything and closed when it continues."""

        def sendmsg(self, *arguments: Any) -> int:
            sent = ours.sendmsg(*arguments)
            assert len(theirs.recv(1 << 16)) == sent
            theirs.close()
            return sent

        sendall = ours.sendall

    send_request(Slow(), [b"run"], ours.fileno())  # type: ignore[arg-type]
    ours.close()
