"""Workers of a server: processes of one parent that share a model's process, driven line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import eager_model
from tests.support.subprocesses import start_python

MODEL = """
import ctypes
import os
import time

import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        first = float(x[0, 0])
        while first < 0 and os.path.exists(os.environ.get("HOLD", "")):
            time.sleep(0.01)
        if first == 666:
            os._exit(9)
        if first == 888 and os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        if first == 444:  # as native code does that does not release the interpreter's lock
            ctypes.PyDLL(None).sleep(600)
        if first == 333:
            time.sleep(600)
        if first == 500:
            raise RuntimeError("five hundred")
        if first == 777:  # out of range: on a GPU an assertion, after which the process's CUDA context is broken
            return {"y": self.layer(x)[torch.full((1,), 100, device=x.device)], "rows": 1, "both": (x, None)}
        if first < 0:
            time.sleep(-first)
        rows = {-0.001: True, -0.002: 1.0, -0.003: -0.0, -0.004: 0}.get(round(first, 3), x.shape[0])
        return {"y": self.layer(x), "rows": rows, "both": (x, None)}
"""
"""Some inputs do what goes wrong: 444 keeps the interpreter's lock and 333 does not, both for ten minutes, 666 ends the
process, 888 forks it, 500 raises, 777 breaks a GPU's context, negative ones take so many seconds, and last for as long
as there is the file that the environment's HOLD names."""

INPUTS = [{"name": "x", "dtype": "float32", "shape": ["batch", 4], "values": [1, 2]}]
"""What a start draws does nothing of that."""

WORKER = """
import json, sys, threading, logging
import torch
from tests.support import import_budget
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
from tests.support.models import archive_source, settings_of
from ts_handlers import start_model
from ts_handlers.model_process.folder import Folder

folder, settings, device = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
out, saying = sys.stdout, threading.Lock()

def say(**facts):
    with saying:
        print(json.dumps(facts), file=out, flush=True)

take_lock = Folder.take_lock

def say_and_take_lock(self):
    Folder.take_lock = take_lock
    say(looks=True)
    return take_lock(self)

Folder.take_lock = say_and_take_lock

def answer(model, number, rows):
    try:
        output = model(torch.tensor(rows))
        say(number=number, y=output["y"].tolist(), rows=output["rows"], echo=output["both"][0].tolist())
    except Exception as error:
        say(number=number, error=type(error).__name__, message=str(error))

try:
    model = start_model(archive_source(__import__("pathlib").Path(folder)), settings_of(**settings), device)
except Exception as error:
    say(failed=type(error).__name__, message=str(error))
    sys.exit(0)
say(joined=model.describe()["across_workers"]["pid"], counters=model.metrics.counters)
for line in sys.stdin:
    request = json.loads(line)
    if request == "describe":
        cuda, beyond_budget = torch.cuda.is_initialized(), sorted(import_budget.beyond_budget(sys.modules))
        say(facts=model.describe(), counters=model.metrics.counters, cuda=cuda, beyond_budget=beyond_budget)
    else:
        threading.Thread(target=answer, args=(model, request["number"], request["rows"])).start()
"""


class Worker:
    """One worker; its lines are read in the order in which they come."""

    def __init__(self, archive: Path, store: Path, log: Path, device: str = "cpu", **settings: Any) -> None:
        contexts = {"across_workers": True, **settings.pop("contexts", {})}
        section = {"store": str(store), "backends": ["eager"], "contexts": contexts, "inputs": INPUTS, **settings}
        self.log = log
        with log.open("ab") as stream:
            self._process = start_python(
                WORKER, archive, json.dumps(section), device, stdin=subprocess.PIPE, stderr=stream
            )
        self.started: dict[str, Any] = {}
        self.logged: list[str] = []
        """What the model process has written here, as far as it was read."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> int:
        """Wait until it has joined; the model process's id."""
        self.started = self.line()
        assert "joined" in self.started, self.started
        return int(self.started["joined"])

    def looks(self) -> None:
        """Wait until it has found no process that serves: it starts one now, or waits for one that starts."""
        assert self._line() == {"looks": True}

    def line(self) -> dict[str, Any]:
        while (facts := self._line()) == {"looks": True}:
            pass
        return facts

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            text = self._process.stdout.readline()
            assert text, f"the worker has ended:\n{self.log.read_text()}"
            if text.startswith("{"):
                return dict(json.loads(text))
            self.logged.append(text)

    def send(self, number: int, rows: list[list[float]]) -> None:
        self._write({"number": number, "rows": rows})

    def call(self, rows: list[list[float]]) -> dict[str, Any]:
        self.send(0, rows)
        return self.line()

    def describe(self) -> dict[str, Any]:
        self._write("describe")
        return self.line()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _write(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


Start = Callable[..., Worker]
Answers = list[dict[str, Any]]
ROWS = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


def slow_calls_beside(bad: float, workers: list[Worker]) -> tuple[Answers, Answers]:
    """Slow calls of all workers, and one of the first with the value `bad`, number 9: errors, and the other answers."""
    for number in range(1, 4):
        for worker in workers:
            worker.send(number, [[-0.3, float(number), 0.0, 0.0]])
    workers[0].send(9, [[bad, 0.0, 0.0, 0.0]])
    answers = [worker.line() for worker in workers for _ in range(3)] + [workers[0].line()]
    return [each for each in answers if "error" in each], [each for each in answers if each["number"] != 9]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    return _state(pid) not in (b"Z", b"X", b"")


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    return _state(pid) == b"T"


def _state(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return b""


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def kill(pid: int) -> None:
    """End a process at once, and wait until it has."""
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid))


def expected(archive: Path, rows: list[list[float]]) -> list[list[float]]:
    """What the eager model answers."""
    with torch.inference_mode():
        return eager_model(archive)(torch.tensor(rows))["y"].tolist()


def check_answer(answer: dict[str, object], archive: Path, rows: list[list[float]]) -> None:
    """A worker's answer is what the eager model answers."""
    assert "error" not in answer, answer
    assert answer["y"] == [pytest.approx(row, abs=1e-6) for row in expected(archive, rows)]
    assert answer["echo"] == [pytest.approx(row) for row in rows]
    assert answer["rows"] == len(rows)
