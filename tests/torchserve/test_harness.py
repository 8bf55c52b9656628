"""The harness itself: it leaves no process behind, and its errors say what is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ts_handlers.testing import TorchServe, TorchServeError
from ts_handlers.testing.server import read_properties, resolve_models

# Starts a server without a model, says so, and waits to be killed. A job in the background of a shell inherits
# an ignored SIGINT, so the script asks for the usual one.
SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from ts_handlers.testing import TorchServe
server = TorchServe(sys.argv[1])
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


def session_members(session: int) -> list[int]:
    """Live processes of a session, zombies left out."""
    members = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in (b"Z", b"X"):
            members.append(int(name))
    return members


def wait_for_end(session: int) -> None:
    """Wait until a session is empty; the pytest run hangs rather than passes when it never is."""
    for _ in range(600):
        if not session_members(session):
            return
        time.sleep(0.1)
    pytest.fail(f"processes {session_members(session)} were left behind")


def test_stop_ends_every_process(tmp_path: Path) -> None:
    with TorchServe(tmp_path, directory=tmp_path / "server") as server:
        session = server.pid
        assert len(server.processes()) >= 2
    assert session_members(session) == []
    assert "Model server started." in server.log()
    server.stop()


def test_an_exception_ends_every_process(tmp_path: Path) -> None:
    sessions = []

    def fail_while_serving() -> None:
        with TorchServe(tmp_path) as server:
            sessions.append(server.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_serving()
    assert session_members(sessions[0]) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_the_death_of_the_caller_ends_every_process(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as caller:
        assert caller.stdout is not None
        session = int(caller.stdout.readline())
        assert session_members(session)
        caller.send_signal(number)
        assert caller.wait() != 0
    wait_for_end(session)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with TorchServe(tmp_path) as first:
        config = {"inference_address": first.url()}
        with pytest.raises(TorchServeError, match="is taken by another process"):
            TorchServe(tmp_path, config=config, keep_addresses=True).start()


def test_two_servers_run_at_once(tmp_path: Path) -> None:
    with TorchServe(tmp_path) as first, TorchServe(tmp_path) as second:
        assert first.url() != second.url()
        for server in (first, second):
            server.metrics()  # raises unless the metrics API answers


def test_an_absent_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.mar").touch()
    with pytest.raises(TorchServeError, match=r"no archive tiny\.mar .* it holds other\.mar"):
        TorchServe(tmp_path, ["tiny"])


def test_models_as_torchserve_takes_them(tmp_path: Path) -> None:
    (tmp_path / "a.mar").touch()
    (tmp_path / "b").mkdir()
    assert resolve_models(tmp_path, ["a", "a.mar", "b", "c=d.mar"]) == ["a=a.mar", "a=a.mar", "b=b", "c=d.mar"]
    assert resolve_models(tmp_path, {"c": "d.mar"}) == ["c=d.mar"]


def test_properties(tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_text("# comment\n\na=1\n b = http://127.0.0.1:80 \n", "utf-8")
    assert read_properties(path) == {"a": "1", "b": "http://127.0.0.1:80"}
