"""`ts-handlers serve`: TorchServe whose workers come from a fork server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.subprocesses import start_python
from tests.support.torchserve_archives import ROWS
from tests.support.torchserve_records import FirstStart, ServerFactory, published, starts
from tests.support.workers import is_alive, wait_until
from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.system.processes import parent_of
from ts_handlers.testing import TorchServe
from ts_handlers.testing.configuration import find_java_home


def fork_server_of(server: TorchServe) -> int:
    """The process from which the workers were forked: a child of the launcher that is no Java process."""
    (found,) = [
        pid
        for pid in server.processes()
        if parent_of(pid) == server.pid and b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def wait_for_other_workers(server: TorchServe, model: str, gone: list[int]) -> list[int]:
    """Wait until as many workers are READY, none of them of those that have gone; their process ids."""

    def are_there() -> bool:
        workers = server.status(model)[0]["workers"]
        ready = [worker for worker in workers if worker["status"] == "READY" and int(worker["pid"]) not in gone]
        return len(ready) == len(gone)

    assert wait_until(are_there)
    return server.worker_pids(model)


def test_workers_of_a_fork_server_serve_die_and_come_back(
    first_start: FirstStart, tiny: str, warm_store: Path, make_server: ServerFactory
) -> None:
    """The store was filled without a fork server."""
    with make_server(
        [tiny], warm_store, serve=["--fork-server", "on", "--preload", "colorsys"], model_api=True
    ) as server:
        server.wait_ready(tiny)
        server.scale(tiny, 2)
        assert "starts without the fork server" not in server.log()
        forker = fork_server_of(server)
        workers = server.worker_pids(tiny)
        assert [parent_of(pid) for pid in workers] == [forker, forker]
        description = server.describe(tiny)
        assert description["key"] == first_start.description["key"]
        assert [start["result"] for start in starts(server, tiny)] == ["hit", "hit"]
        assert [server.predict(tiny, ROWS).json() for _ in range(4)] == [first_start.answer] * 4

        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        again = wait_for_other_workers(server, tiny, workers)
        assert [parent_of(pid) for pid in again] == [forker, forker]
        assert server.predict(tiny, ROWS).json() == first_start.answer

        # The workers outlive the fork server, and the next ones start without.
        os.kill(forker, signal.SIGKILL)
        assert wait_until(lambda: "the fork server was killed by SIGKILL" in server.log())
        assert server.predict(tiny, ROWS).json() == first_start.answer
        assert sorted(server.worker_pids(tiny)) == sorted(again)
        os.kill(again[0], signal.SIGKILL)
        os.kill(again[1], signal.SIGKILL)
        ordinary = wait_for_other_workers(server, tiny, again)
        assert "starts without the fork server: nobody listens" in server.log()
        assert server.predict(tiny, ROWS).json() == first_start.answer
        results = [start["result"] for start in starts(server, tiny)]
        processes = server.processes()
        assert {*ordinary, server.pid} <= set(processes)
        os.kill(server.pid, signal.SIGTERM)  # as who stops a container does
        assert wait_until(lambda: not any(map(is_alive, processes)))
        assert not list((server.directory / "tmp").glob("ts_handlers-fork-*"))
    assert results == ["hit"] * 6
    assert len(published(warm_store)) == 1


@contextlib.contextmanager
def resident(socket: Path, variables: dict[str, str]) -> Iterator[dict[str, Any]]:
    """``ts-handlers fork-server``, until it has imported everything; gives what it says of itself."""
    command = [sys.executable, "-c", "from ts_handlers.cli.app import main; main()", "fork-server", str(socket)]
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        assert wait_until(socket.exists)
        facts = subprocess.run([*command, "--status", "--json"], capture_output=True, check=True).stdout
        yield json.loads(facts)
    finally:
        process.terminate()
        assert process.wait(60) == 0
        assert not socket.exists()


def test_a_resident_fork_server_is_found_by_a_server_and_outlives_it(
    first_start: FirstStart, tiny: str, warm_store: Path, make_server: ServerFactory
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # with a path that is short enough for sockets
        variables = {"TMPDIR": folder, "TEMP": folder, "JAVA_HOME": find_java_home() or ""}
        variables = {name: value for name, value in variables.items() if value}
        with resident(Path(folder) / "socket", variables) as facts:
            assert "ts_handlers.servers.torchserve.compiled_handler" in facts["modules"]
            assert facts["failed"] == {}
            variables["TS_HANDLERS_FORK_SERVER_SOCKET"] = f"{folder}/socket"
            with make_server([tiny], warm_store, serve=["--fork-server", "on"], env=variables) as server:
                server.wait_ready(tiny)
                (worker,) = server.worker_pids(tiny)
                assert parent_of(worker) == facts["pid"]
                assert server.predict(tiny, ROWS).json() == first_start.answer
                assert [start["result"] for start in starts(server, tiny)] == ["hit"]
            assert wait_until(lambda: not is_alive(worker))
            assert is_alive(facts["pid"])


def test_serve_ends_where_a_fork_server_is_asked_for_and_not_all_is_imported(tmp_path: Path) -> None:
    code = "from ts_handlers.cli.app import main; main()"
    arguments = ["serve", "--fork-server", "on", "--preload", "no_such_module", "--start", "--foreground"]
    process = start_python(code, *arguments, "--model-store", tmp_path, fresh=True, TMPDIR=str(tmp_path))
    _, said = process.communicate(timeout=120)
    assert process.returncode == ExitCode.FAILED
    assert "not all is preloaded: no_such_module: ModuleNotFoundError" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("ts_handlers-fork-*"))
