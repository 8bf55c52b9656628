"""Workers that share a model's process, which is killed, stopped and attacked while they call it.

A trial is a call. Calls come in waves of some workers, each with inputs of its own, so that an answer tells whose it
is; a wave's disturbances happen while its calls run. Every call must end, once: with its own right answer, or, if it
is one that ends or blocks the process or that the model refuses, with its own error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from tests.soak.tally import Tally
from tests.support.models import eager_model, write_archive
from tests.support.workers import MODEL, Worker, is_alive, wait_until
from ts_handlers.model_process.folder import Folder
from ts_handlers.model_process.segments import Outbox
from ts_handlers.model_process.wire import Call, Connection, ConnectionLost, Describe, Hello, TensorSpec

LIMIT_SECONDS = 300.0
"""A wave that takes longer has lost a call."""
CONTEXTS = {"count": 4, "silent_seconds": 6, "wait_seconds": 600}
WORKERS = 3
EXITS, BLOCKS, FAILS, FORKS = 666.0, 444.0, 500.0, 888.0
EXPECTED_ERRORS = {
    EXITS: "ended with status 9",
    BLOCKS: "kept the interpreter's lock and gave no sign of life",
    FAILS: "RuntimeError: five hundred",
}
"""What the answer to such a call must say; `tests.support.workers.MODEL` says what the call does."""
CALLS = {EXITS: 0.3, BLOCKS: 0.1, FAILS: 2, FORKS: 0.1, -0.05: 4, -0.3: 6, 3.0: 10}
"""First values of the inputs, and how often they are sent."""
DISTURBANCES = {
    "nothing": 2,
    "kill": 3,
    "storm": 1,
    "stop": 0.7,
    "pause": 2,
    "shrink": 2,
    "never_read": 1,
    "leave_descriptors": 2,
    "talk_nonsense": 2,
    "many_connections": 1,
    "worker_dies": 0.5,
}
"""What happens to the process while it is called, and how often; each is a method of `Round`."""


@dataclasses.dataclass
class _Sent:
    """A call and its answers; `rows` begin with what it does, and its number."""

    rows: list[list[float]]
    answers: list[dict[str, Any]]


class _Client:
    """A worker, and a thread that reads what it says."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.sent: dict[int, _Sent] = {}
        self.died = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(Exception):  # it has ended, or was killed
            while True:
                answer = self.worker.line()
                if answer.get("number") in self.sent:
                    self.sent[answer["number"]].answers.append(answer)
        self.died = True

    def call(self, number: int, rows: list[list[float]]) -> None:
        """Send a call."""
        self.sent[number] = _Sent(rows, [])
        self.worker.send(number, rows)

    @property
    def waits(self) -> list[int]:
        """Calls without an answer."""
        return [number for number, sent in self.sent.items() if not sent.answers]


class Round:
    """A server's life: some workers, the process that they share, and what is done to it."""

    def __init__(self, tally: Tally, folder: Path, seed: int) -> None:
        self._tally, self._folder, self._rng = tally, folder, random.Random(seed)
        self._archive = write_archive(folder / "archive", MODEL)
        self._layer = eager_model(self._archive).layer
        self._clients: list[_Client] = []
        self._number = 0
        self._what = f"process seed {seed}"
        self.happened: list[str] = []

    def run(self, calls: int) -> None:
        """Waves of calls, at least so many calls."""
        try:
            for _ in range(WORKERS):
                self._join()
            sent = wave = 0
            while sent < calls:
                wave += 1
                sent += self._wave(wave)
        finally:
            for client in self._clients:
                client.worker.kill()
            if (process := self._process()) and is_alive(process):
                os.kill(process, signal.SIGKILL)

    def _join(self) -> None:
        log = self._folder / f"worker-{len(list(self._folder.glob('worker-*')))}.log"
        worker = Worker(self._archive, self._folder / "process-store", log, contexts=CONTEXTS)
        worker.ready()
        self._clients.append(_Client(worker))

    def _process(self) -> int:
        """The number of the process that serves or starts; 0 while there is none."""
        folder = self._shared()
        sign = folder.sign() if folder is not None else None
        return sign[0].pid if sign is not None and is_alive(sign[0].pid) else 0

    def _shared(self) -> Folder | None:
        for path in Path(os.environ["TMPDIR"]).glob("ts_handlers-*/*/lock"):
            return Folder(path.parent)
        return None

    def _wave(self, wave: int) -> int:
        """Calls of all workers and disturbances meanwhile; returns the number of calls."""
        chosen = self._rng.choices(list(DISTURBANCES), list(DISTURBANCES.values()), k=self._rng.choice([1, 1, 2]))
        numbers = [self._send() for _ in range(self._rng.randint(4, 9))]
        for name in chosen:
            time.sleep(self._rng.random() * 0.3)
            self.happened.append(f"wave {wave}: {name}")
            self._tally.note(name)
            getattr(self, f"_{name}")()
        done = wait_until(lambda: not any(client.waits for client in self._clients), LIMIT_SECONDS)
        for client in self._clients:
            for sent_number, sent in client.sent.items():
                self._judge(sent_number, sent)
            client.sent = {} if done else {number: client.sent[number] for number in client.waits}
        if not done:
            raise AssertionError(f"calls without an answer: {[client.waits for client in self._clients]}")
        return len(numbers)

    def _send(self) -> int:
        """A call of a random worker: mostly one that the model answers, fast or slowly."""
        self._number += 1
        (first,) = self._rng.choices(list(CALLS), list(CALLS.values()))
        rows = [[first, float(self._number), self._rng.random(), 1.0]]
        rows += [[5.0, float(self._number), 0.0, 0.0] for _ in range(self._rng.randrange(3))]
        self._rng.choice(self._clients).call(self._number, rows)
        return self._number

    def _judge(self, number: int, sent: _Sent) -> None:
        what = f"{self._what}, call {number} ({sent.rows[0][0]:g}): {sent.answers}; {self.happened[-6:]}"
        if not sent.answers:
            self._tally.trial("lost", what)
            return
        if len(sent.answers) > 1:
            self._tally.note("duplicate", what)
        answer = sent.answers[0]
        expected = EXPECTED_ERRORS.get(sent.rows[0][0])
        if expected is not None:
            told = answer.get("error") == "ModelProcessError" and expected in answer["message"]
            # One that was killed from outside again and again before it could be blamed is told to come later.
            right = told or (answer.get("error") == "BusyError" and sent.rows[0][0] != FAILS)
            self._tally.trial("refusal" if right else "wrong", what)
        elif "error" in answer:
            blamed = "has ended while it answered" in answer["message"]
            busy = answer["error"] == "BusyError"
            self._tally.trial("blamed" if blamed else "lost" if busy else "neighbour", what)
        else:
            self._tally.trial("served" if self._is_right(answer, sent.rows) else "wrong", what)

    def _is_right(self, answer: dict[str, Any], rows: list[list[float]]) -> bool:
        with torch.inference_mode():
            y = self._layer(torch.tensor(rows))
        same = torch.tensor(answer["y"]).shape == y.shape and torch.allclose(torch.tensor(answer["y"]), y, atol=1e-5)
        echo = torch.allclose(torch.tensor(answer["echo"]), torch.tensor(rows))
        return bool(same and echo and answer["rows"] == len(rows))

    def _nothing(self) -> None:
        """Only the calls."""

    def _kill(self) -> None:
        if process := self._process():
            self._tally.note("ended from outside")
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, self._rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))

    def _storm(self) -> None:
        """Kill one process after the other, most of them while a retried call runs alone."""
        for _ in range(self._rng.randint(2, 4)):
            wait_until(self._serves, 60)
            time.sleep(self._rng.random() * 0.4)
            self._kill()

    def _serves(self) -> bool:
        folder = self._shared()
        status = folder.read_status() if folder is not None else None
        return status is not None and status.phase == "serving" and status.pid == self._process()

    def _stop(self) -> None:
        """Stop it for good."""
        if process := self._process():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)

    def _pause(self) -> None:
        """Stop it for a moment, which is nobody's fault and no silence."""
        if process := self._process():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                time.sleep(self._rng.random() * 2)
                os.kill(process, signal.SIGCONT)

    def _worker_dies(self) -> None:
        """One worker is killed, and started again; its own calls go with it."""
        client = self._rng.choice(self._clients)
        client.worker.kill()
        self._clients.remove(client)
        for number, sent in client.sent.items():
            if sent.answers:
                self._judge(number, sent)
            else:
                self._tally.trial("killed")
        self._join()

    def _connect(self) -> Connection | None:
        folder = self._shared()
        channel = folder.connect() if folder is not None else None
        if channel is None:
            return None
        connection = Connection(channel)
        connection.limit(20)
        return connection

    @contextlib.contextmanager
    def _hostile(self) -> Any:
        """A connection of somebody who does what no worker does; it may be lost at any moment."""
        connection = self._connect()
        if connection is None:
            yield None
            return
        try:
            with contextlib.suppress(ConnectionLost):
                yield connection
        finally:
            connection.close()

    def _shrink(self) -> None:
        """Memory that gets smaller while it is in use, or is none."""
        spec = TensorSpec("float32", (1, 4), 0)
        with self._hostile() as connection:
            if connection is None:
                return
            memory = os.memfd_create("shrinks", os.MFD_ALLOW_SEALING if self._rng.random() < 0.5 else 0)
            try:
                os.ftruncate(memory, 1 << 20)
                connection.send(Hello(os.getpid()))
                connection.send(Call((spec,)), (memory,))
                os.ftruncate(memory, 0)
                connection.send(Call((TensorSpec("float32", (1, 4), self._rng.choice([0, 1, 1 << 40])),)))
                while True:
                    connection.receive()
            finally:
                os.close(memory)

    def _never_read(self) -> None:
        with self._hostile() as connection:
            if connection is None:
                return
            connection.send(Hello(os.getpid()))
            specs, descriptor = Outbox().write([torch.ones(1, 4)])
            assert descriptor is not None
            try:
                connection.send(Call(specs), (descriptor,))
            finally:
                os.close(descriptor)
            for _ in range(20_000):
                connection.send(Describe())
                connection.send(Call(specs, retried=self._rng.random() < 0.01))

    def _leave_descriptors(self) -> None:
        for _ in range(10):
            with self._hostile() as connection, open("/dev/zero", "rb") as file:
                if connection is None:
                    return
                message = self._rng.choice([Hello(os.getpid()), Describe(), Call(())])
                connection.send(message, (file.fileno(), file.fileno()))

    def _talk_nonsense(self) -> None:
        folder = self._shared()
        for _ in range(10):
            channel = folder.connect() if folder is not None else None
            if channel is None:
                return
            with channel, contextlib.suppress(OSError):
                channel.settimeout(5)
                if self._rng.random() < 0.5:
                    channel.send(b"\x92\xa5Hello\x01")
                channel.send(self._rng.randbytes(self._rng.choice([1, 40, 5000])))

    def _many_connections(self) -> None:
        """Connections that say nothing, and go."""
        opened = [connection for _ in range(60) if (connection := self._connect()) is not None]
        time.sleep(self._rng.random() * 0.3)
        for connection in opened:
            connection.close()


def run(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    """One round with so many calls."""
    life = Round(tally, folder, seed)
    try:
        life.run(trials)
    except Exception as error:
        logs = [path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("worker-*.log"))]
        tally.note("stuck", f"process seed {seed}: {type(error).__name__}: {error}; {life.happened[-6:]}; {logs}")
