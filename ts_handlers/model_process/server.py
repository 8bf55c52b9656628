"""The model process serves its workers: a thread for each connection reads calls, runs the model and answers.

A call runs in the thread of its connection, so as many are under way as the workers send, and the model's own pool of
execution contexts says how many run at once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from ts_handlers.compiled_model import ServedModel
from ts_handlers.errors import ModelError, bounded
from ts_handlers.model.structure import flatten
from ts_handlers.model_process.blame import HANGS_STATUS
from ts_handlers.model_process.folder import Folder
from ts_handlers.model_process.gate import Gate
from ts_handlers.model_process.segments import Inbox, Outbox, pin
from ts_handlers.model_process.wire import (
    Answer,
    Call,
    Connection,
    ConnectionLost,
    Describe,
    Hello,
    ModelDescription,
    Refusal,
    Started,
)
from ts_handlers.settings.sections import ContextSettings

logger = logging.getLogger(__name__)

LINGER_SECONDS = 10.0
"""How long the process waits for another worker when the last one has gone; one that TorchServe restarts takes less."""
POLL_SECONDS = 0.25
GREETING_SECONDS = 30.0
"""How long a connection may take to say what it is."""
MOST_CONNECTIONS = 1024
"""Of one process."""
MOST_MESSAGE = 2000
"""Characters of an exception's message that go to the worker."""
ABANDONED_SECONDS = 30.0
"""How long a call may run whose worker has ended, as TorchServe ends one that does not answer in time."""
DEVICE_LOST_STATUS = 70


class Counted:
    """The counts of the model that no worker has been told yet: each count is told once, to one worker.

    `refused` and `busy` are left out: the worker whose call was refused counts it.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()

    def take(self) -> dict[str, float]:
        """What is new, by name; waits for contexts as ``waited``, ``wait_seconds`` and ``context_refused``."""
        with self._lock:
            stats = self._model.context_stats()
            now: dict[str, float] = dict(self._model.metrics.counters)
            del now["refused"], now["busy"]
            now.update(waited=stats.waited, wait_seconds=stats.wait_seconds, context_refused=stats.refused)
            if now == self._told:
                return {}
            # A swap of the model begins a new pool's counts at zero.
            new = {name: value - self._told.get(name, 0) for name, value in now.items()}
            self._told = now
        return {name: value for name, value in new.items() if value > 0}


class Server:
    """Serves a model to workers until none is left.

    Parameters
    ----------
    model:
        What is served.
    folder:
        Where the workers look for it; its lock is held.
    wanted:
        Whether somebody waits for this process who has not connected yet.
    server_lives:
        Whether the process still lives whose workers are served.
    contexts:
        For how long a call may wait for a context, and how long it may take.
    """

    def __init__(
        self,
        model: ServedModel,
        folder: Folder,
        wanted: Callable[[], bool],
        server_lives: Callable[[], bool],
        contexts: ContextSettings,
    ) -> None:
        self._model = model
        self._folder = folder
        self._wanted = wanted
        self._server_lives = server_lives
        self._contexts = contexts
        self._counted = Counted(model)
        self._gate = Gate(self._set_answering)
        self._lock = threading.Lock()
        self._connections: dict[Connection, _Calls | None] = {}
        self._peers: dict[Connection, int] = {}
        self._workers: dict[Connection, tuple[int, list[int]]] = {}
        self._logs_to: Connection | None = None
        self._start_is_told = False

    def run(self) -> None:
        """Take connections until no worker is left."""
        listener = self._folder.listen()
        listener.settimeout(POLL_SECONDS)
        os.register_at_fork(after_in_child=functools.partial(self._leave_to_parent, listener))
        idle_since = time.monotonic()
        while True:
            try:
                channel, _ = listener.accept()
                self._take(channel)
            except TimeoutError:
                pass
            except OSError as error:  # no descriptor is left for another connection
                logger.warning("no further connection can be taken: %s", error)
                time.sleep(POLL_SECONDS)
            if self._connections or self._wanted():
                idle_since = time.monotonic()
                self._leave_if_it_hangs()
            elif not self._server_lives() or time.monotonic() - idle_since > LINGER_SECONDS:
                break
        self._folder.stop_listening()
        listener.close()

    def _leave_to_parent(self, listener: socket.socket) -> None:
        """In a process that the model's code forks: keep nothing open by which workers know that this one lives."""
        listener.close()
        for connection in self._connections:
            connection.close_in_child()

    def _set_answering(self, running: int) -> None:
        self._model.answering = running

    def _take(self, channel: socket.socket) -> None:
        connection = Connection(channel, waits=False)
        pid, uid = connection.peer()
        with self._lock:
            full = sum(each == pid for each in self._peers.values()) >= MOST_CONNECTIONS
        if full or uid != os.geteuid():  # the folder's mode rules the latter out
            connection.close()
            return
        with self._lock:
            self._connections[connection] = None
            self._peers[connection] = pid
        threading.Thread(target=self._converse, args=(connection,), daemon=True, name="ts_handlers-call").start()

    def _converse(self, connection: Connection) -> None:
        try:
            connection.limit(GREETING_SECONDS)
            hello, descriptors = connection.receive()
            connection.limit(0)
            if not isinstance(hello, Hello) or (descriptors and not hello.worker):
                _close(descriptors)
                raise ConnectionLost("expected a greeting")
            if hello.worker:
                self._add_worker(connection, hello.pid, descriptors)
                with self._lock:
                    first, self._start_is_told = not self._start_is_told, True
                connection.send(self._description(first))
                connection.wait_for_end()
            else:
                calls = _Calls(connection, self._model, self._gate, self._counted, self._description)
                with self._lock:
                    self._connections[connection] = calls
                calls.run()
        except ConnectionLost:
            pass
        finally:
            with self._lock:
                self._connections.pop(connection, None)
                self._peers.pop(connection, None)
            self._remove_worker(connection)
            connection.close()

    def _leave_if_it_hangs(self) -> None:
        """End a process in which a call goes on for which nobody waits, or for too long: it keeps its context for ever.

        A call that takes too long is told so. Of the others nobody knows anything bad: the next process answers them.
        """
        with self._lock:
            running = [calls for calls in self._connections.values() if calls is not None]
        seconds = ABANDONED_SECONDS + self._contexts.wait_seconds
        slow = [calls for calls in running if calls.running_for() > self._contexts.call_seconds]
        for calls in slow:
            calls.give_up(f"the call took longer than contexts.call_seconds, {self._contexts.call_seconds:g} s")
        if slow:
            logger.error(
                "a call has taken %g s (contexts.call_seconds); this process ends", self._contexts.call_seconds
            )
            os._exit(HANGS_STATUS)
        for calls in running:
            if calls.abandoned_for() > seconds:
                logger.error("a call goes on %g s after its worker has ended; this process ends", seconds)
                os._exit(HANGS_STATUS)

    def _description(self, first: bool = False) -> ModelDescription:
        signature = self._model.signature
        with self._lock:
            workers = tuple(pid for pid, _ in self._workers.values())
        accepts = signature.inputs, signature.dimensions
        return ModelDescription(self._model.describe(), *accepts, os.getpid(), workers, self._counted.take(), first)

    def _add_worker(self, connection: Connection, pid: int, descriptors: list[int]) -> None:
        with self._lock:
            self._workers[connection] = pid, descriptors
            self._choose_log()

    def _remove_worker(self, connection: Connection) -> None:
        with self._lock:
            _, descriptors = self._workers.pop(connection, (0, ()))
            if self._logs_to is connection:
                self._logs_to = None
                self._choose_log()
        _close(descriptors)

    def _choose_log(self) -> None:
        """Write to the log of some worker that lives: the pipe of one that has ended is read by nobody."""
        if self._logs_to is not None:
            return
        for connection, (_, descriptors) in self._workers.items():
            if len(descriptors) == 2:
                for ours, theirs in enumerate(descriptors, start=1):
                    os.dup2(theirs, ours)
                self._logs_to = connection
                return


class _Calls:
    """The calls of one connection."""

    def __init__(
        self,
        connection: Connection,
        model: ServedModel,
        gate: Gate,
        counted: Counted,
        description: Callable[[], ModelDescription],
    ) -> None:
        self._connection = connection
        self._model = model
        self._gate = gate
        self._counted = counted
        self._description = description
        self._on_gpu = model.device.type == "cuda"
        prepare = {"on_memory": pin} if self._on_gpu else {}
        self._inbox, self._outbox = Inbox(**prepare), Outbox(**prepare)
        self._structure: bytes | None = None
        self._answering = False
        self._abandoned: float | None = None
        self._began: float | None = None

    def running_for(self) -> float:
        """For how many seconds the call under way has been running."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def give_up(self, reason: str) -> None:
        """Answer the call under way, from another thread than that in which it hangs."""
        with contextlib.suppress(ConnectionLost):
            self._connection.send(Refusal("TimeoutError", reason, self._counted.take()))

    def abandoned_for(self) -> float:
        """For how many seconds a call has been going on whose worker has ended."""
        if not self._answering or not self._connection.is_abandoned():
            self._abandoned = None
            return 0.0
        if self._abandoned is None:
            self._abandoned = time.monotonic()
        return time.monotonic() - self._abandoned

    def run(self) -> None:
        """Answer until the other side ends."""
        if self._on_gpu:
            torch.cuda.set_device(self._model.device)
            # Copies from and to shared memory wait for nothing that other threads do.
            torch.cuda.set_stream(torch.cuda.Stream(self._model.device))  # type: ignore[no-untyped-call]
        try:
            while True:
                message, descriptors = self._connection.receive()
                self._take_memory(descriptors)
                if isinstance(message, Describe):
                    self._connection.send(self._description())
                elif isinstance(message, Call):
                    self._answer(message)
                else:
                    raise ConnectionLost(f"a call was expected, {type(message).__name__} found")
        finally:
            self._inbox.close()
            self._outbox.close()

    def _take_memory(self, descriptors: list[int]) -> None:
        left = list(descriptors)
        try:
            while left:
                self._inbox.replace(left.pop(0))
        except (OSError, ValueError) as error:
            raise ConnectionLost(f"the other side's shared memory cannot be used: {error}") from error
        finally:
            _close(left)

    def _answer(self, call: Call) -> None:
        if not call.retried:
            with self._gate.beside_others():
                self._run(call)
            return
        with self._gate.alone():  # until it is answered: what ends the process afterwards was another call
            self._connection.send(Started())
            self._run(call)

    def _run(self, call: Call) -> None:
        if self._connection.is_abandoned():  # while it waited at the gate
            raise ConnectionLost("the worker has ended")
        self._answering, self._began = True, time.monotonic()
        try:
            output = self._model(*self._inbox.read(call.tensors))
            leaves, structure = flatten(output)
            with torch.inference_mode():
                specs, descriptor = self._outbox.write(leaves)
            try:
                if self._on_gpu:
                    torch.cuda.current_stream(self._model.device).synchronize()
                # Encoded, since 1, 1.0 and True are equal.
                told, self._structure = self._structure, msgspec.msgpack.encode(structure)
                answer = Answer(specs, None if self._structure == told else structure, self._counted.take())
                self._connection.send(answer, () if descriptor is None else (descriptor,))
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        except ConnectionLost:
            raise
        except Exception as error:
            self._refuse(call, error)
        finally:
            self._answering, self._began = False, None

    def _refuse(self, call: Call, error: Exception) -> None:
        logger.debug("details", exc_info=error)
        lost = self._device_is_lost(error)
        if lost and not call.retried:
            os._exit(DEVICE_LOST_STATUS)  # without an answer: of the calls under way nobody knows which one it was
        self._structure = None  # the answer that was to bring it may not have gone
        self._outbox.close()  # the same for its memory
        self._connection.send(Refusal(type(error).__name__, bounded(error, MOST_MESSAGE), self._counted.take()))
        if lost:
            os._exit(DEVICE_LOST_STATUS)

    def _device_is_lost(self, error: Exception) -> bool:
        """Whether the CUDA context is broken: every call would fail in this process, and the workers start another."""
        if not self._on_gpu or not isinstance(error, RuntimeError):
            return False
        try:
            torch.cuda.synchronize(self._model.device)
        except RuntimeError as broken:
            logger.error("the GPU's context is lost, so the model's process ends: %s", broken)
            return True
        return False


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def refuse_without_inputs(model: ServedModel) -> None:
    """Raise when the model has no signature: only declared tensors travel between processes."""
    if not model.signature.inputs:
        raise ModelError(
            "contexts.across_workers needs the model's inputs, found none; declare them under "
            "handler.ts_handlers.inputs in model-config.yaml"
        )
