"""How many requests that arrive around a worker's death are never answered, with a fork server and without.

    python benchmarks/worker_death.py --kills 300 --table --json worker_death.json
    python benchmarks/worker_death.py --kills 5 --table    # tries the benchmark

One server of each kind, one worker each, in turn. For each kill: a request is sent 0 to 200 ms after SIGKILL, spread
evenly over the window, and may take `ANSWER_SECONDS`. A request that is answered with 200, by the next worker, counts
as answered; one that is refused (HTTP 500 or 503) as refused; one without an answer as lost. `--load` requests of other
clients go on meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import archives
import command_line
import environment
from measure import TIMEOUT_SECONDS, Host

from ts_handlers.testing import TorchServe

WINDOW_MS = 200
STEP_MS = 20
ANSWER_SECONDS = 20.0
KINDS: dict[str, tuple[str, ...] | None] = {"without": None, "fork_server": ()}
OUTCOMES = ("answered", "refused", "lost")


@contextlib.contextmanager
def load(server: TorchServe, model: str, body: Any, clients: int) -> Iterator[None]:
    """Requests of other clients inside the block, each of them without a pause."""
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            server.predict(model, body, timeout=ANSWER_SECONDS)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join(ANSWER_SECONDS)


def kill_once(server: TorchServe, model: str, body: Any, delay_ms: float) -> dict[str, Any]:
    """Kill the worker, send a request after a delay, and wait until the next worker is READY."""
    (pid,) = server.worker_pids(model)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(delay_ms / 1000)
    answer = server.predict(model, body, timeout=ANSWER_SECONDS)
    took = time.monotonic() - killed
    outcome = {200: "answered", 0: "lost"}.get(answer.status, "refused")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        workers = server.status(model)[0]["workers"]
        if any(each["status"] == "READY" and int(each["pid"]) != pid for each in workers):
            return {"delay_ms": round(delay_ms, 1), "outcome": outcome, "status": answer.status, "seconds": took}
        time.sleep(0.02)
    raise TimeoutError(f"no worker READY {TIMEOUT_SECONDS} s after a kill")


def summarise(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes by kind, over the window and in each step of it."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        mine = [kill for kill in kills if kill["kind"] == kind]
        found[kind] = {"kills": len(mine), **{name: _count(mine, name) for name in OUTCOMES}}
        found[kind]["lost_by_delay_ms"] = {
            str(start): [_count(part, "lost"), len(part)]
            for start in range(0, WINDOW_MS, STEP_MS)
            if (part := [kill for kill in mine if start <= kill["delay_ms"] < start + STEP_MS])
        }
    return found


def _count(kills: list[dict[str, Any]], outcome: str) -> int:
    return sum(kill["outcome"] == outcome for kill in kills)


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    steps = [str(start) for start in range(0, WINDOW_MS, STEP_MS)]
    lines = [f"Requests sent 0 to {WINDOW_MS} ms after SIGKILL of the only worker, {result['load']} other clients.", ""]
    lines += ["| | kills | answered | refused | lost | " + " | ".join(f"lost at {step} ms" for step in steps) + " |"]
    lines += ["|---" * (5 + len(steps)) + "|"]
    for kind, facts in result["kinds"].items():
        parts = ["/".join(map(str, facts["lost_by_delay_ms"].get(step, ["", ""]))) for step in steps]
        counts = [str(facts[name]) for name in ("kills", *OUTCOMES)]
        lines.append("| " + " | ".join([kind, *counts, *parts]) + " |")
    return "\n".join([*lines, "", f"Environment: {result['environment']}", ""])


def main() -> int:
    """Parse the command line, measure, and print or write."""
    parser = argparse.ArgumentParser(description="Requests that are lost around a worker's death.")
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="of each kind (default 300)")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="other clients that send requests meanwhile")
    parser.add_argument("--seed", type=int, default=0, help="of the delays within a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    arguments = parser.parse_args()
    drawn = random.Random(arguments.seed)
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="worker_death-") as folder, contextlib.ExitStack() as stack:
        directory = Path(folder)
        built = archives.build("tiny", "zip", {"aot"}, directory)
        host = Host(directory / "host").create()
        servers: dict[str, TorchServe] = {}
        for kind, serve in KINDS.items():
            models = {built.model: built.file("aot")}
            config = {"default_workers_per_model": "1"}
            server = TorchServe(built.model_store, models, config=config, env=host.env("store"), serve=serve)
            servers[kind] = stack.enter_context(server)
            server.wait_ready(built.model, timeout=TIMEOUT_SECONDS)
            stack.enter_context(load(server, built.model, built.body, arguments.load))
        for number in range(arguments.kills):
            delay = (number % (WINDOW_MS // STEP_MS) + drawn.random()) * STEP_MS
            for kind, server in servers.items():
                kills.append({"kind": kind, **kill_once(server, built.model, built.body, delay)})
            print(f"{number + 1}/{arguments.kills}: {[kill['outcome'] for kill in kills[-2:]]}", file=sys.stderr)
    result = {
        "benchmark": "worker_death",
        "load": arguments.load,
        "environment": environment.facts(),
        "kinds": summarise(kills),
        "kills": kills,
    }
    command_line.write(result, arguments, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
