"""The worker's side of a call to the model's process, and what happens when that process ends.

One thread waits on the connection that stands for this worker, and watches for signs of life. When the process is gone
it joins the next one, or starts it. Calls that were under way are sent again, marked as retried: retried calls run one
at a time. One that ran when its process ended again is answered with an error if it can have been the cause, see
`ts_handlers.model_process.blame`; if somebody has killed or stopped the process, it is sent again.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ts_handlers import errors
from ts_handlers.errors import BusyError, WarmStartError
from ts_handlers.model.structure import unflatten
from ts_handlers.model_process.blame import what_ended_it
from ts_handlers.model_process.folder import Holder
from ts_handlers.model_process.launch import Launcher
from ts_handlers.model_process.segments import Inbox, Outbox, copy_bytes
from ts_handlers.model_process.watch import LOOK_SECONDS
from ts_handlers.model_process.wire import (
    Answer,
    Call,
    Connection,
    ConnectionLost,
    Describe,
    ModelDescription,
    NoAnswer,
    Refusal,
    Started,
)
from ts_handlers.system.process_limits import oom_kills
from ts_handlers.system.processes import process_start

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
RETRY_SECONDS = 5.0
MOST_LOSSES, MOST_LOSSES_ALONE = 100, 10
"""How often a call may lose its process, and how often while it ran alone, before it is answered with HTTP 503."""

OnCounted = Callable[[Mapping[str, float]], None]


class ModelProcessError(WarmStartError, RuntimeError):
    """A call that the model's process failed with, or that ended it."""


class ModelProcess:
    """The process that holds a model, as one worker sees it.

    Parameters
    ----------
    launcher:
        Finds or starts it.
    wait_seconds:
        Longest wait of a call for a process that is being started again.
    on_counted:
        Called with what the process has counted, each of it told to one worker only.
    """

    def __init__(self, launcher: Launcher, wait_seconds: float, on_counted: OnCounted) -> None:
        self._launcher = launcher
        self._wait_seconds = wait_seconds
        self._on_counted = on_counted
        self._idle: collections.deque[_CallConnection] = collections.deque()
        self._failure: Exception | None = None
        self._connection: Connection | None = None
        self._closed = False
        self.joined = 0
        """How many processes this worker has joined."""

    def join(self) -> ModelDescription:
        """Find or start the process, and follow it from now on.

        Raises
        ------
        WarmStartError
            What its start failed with.
        """
        self._connection, description = self._launcher.join()
        self.joined += 1
        threading.Thread(target=self._follow, daemon=True, name="ts_handlers-model-process").start()
        return description

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Call the model with tensors on the CPU, in declared order.

        Returns
        -------
        The model's output with its tensors on the CPU, the caller's own.

        Raises
        ------
        InputError, BusyError
            What the model refuses; the latter also when no process could be started in time.
        RuntimeError
            What the model failed with, or that this call has ended its process twice.
        """
        return self._exchange(lambda connection, retried: connection.call(tensors, retried))

    def describe(self) -> ModelDescription:
        """What the process says of itself and its model; raises as `run` does."""
        description: ModelDescription = self._exchange(lambda connection, retried: connection.describe())
        self._on_counted(description.counted)
        return description

    def close(self) -> None:
        """Let the process go; calls that follow fail."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()
        self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _exchange(self, use: Callable[[_CallConnection, bool], Any]) -> Any:
        deadline = time.monotonic() + self._wait_seconds
        losses, losses_alone = 0, 0
        while True:
            if self._closed:
                raise BusyError("the model is being closed; send the request again")
            connection = self._borrow(deadline)
            killed = oom_kills() if losses else None
            try:
                answer = use(connection, losses > 0)
            except NoAnswer as error:  # it may still be running; the process ends it in time
                connection.close()
                raise BusyError("the model's process has not answered in time; send the request again later") from error
            except ConnectionLost as error:
                connection.close()
                if connection.alone:
                    losses_alone += 1
                    self._blame(connection, killed, error)
                losses += 1
                if losses >= MOST_LOSSES or losses_alone >= MOST_LOSSES_ALONE:
                    raise BusyError(
                        f"the connection to the model's process breaks again and again ({error}); send it again later"
                    ) from error
                deadline = time.monotonic() + self._wait_seconds  # of the time before, the request is not the cause
                time.sleep(POLL_SECONDS)
                continue
            except BaseException:
                # An interrupted exchange leaves an answer behind that belongs to nobody.
                connection.close() if connection.under_way else self._idle.append(connection)
                raise
            self._idle.append(connection)
            return answer

    def _blame(self, connection: _CallConnection, oom_kills_before: int | None, error: ConnectionLost) -> None:
        """Raise if the call that ran alone can have ended its process."""
        reason = what_ended_it(self._launcher.folder, connection.holder, oom_kills_before)
        if reason is not None:
            raise ModelProcessError(
                "the model's process has ended while it answered this request, and again while it answered nothing "
                f"else: it {reason}"
            ) from error

    def _borrow(self, deadline: float) -> _CallConnection:
        while True:
            with contextlib.suppress(IndexError):
                return self._idle.pop()
            with contextlib.suppress(ConnectionLost):
                return _CallConnection(self._launcher.connect(), self._on_counted)
            failure = self._failure
            if failure is not None:
                raise ModelProcessError(f"the model's process cannot be started: {failure}") from failure
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"the model's process is being started again, and was not ready within {self._wait_seconds:g} s; "
                    "send the request again later, or raise contexts.wait_seconds in model-config.yaml"
                )
            time.sleep(POLL_SECONDS)

    def _wait_for_end(self, connection: Connection) -> None:
        """Wait until the process has ended; end it if it gives no sign of life."""
        while not connection.ends_within(LOOK_SECONDS):
            if self._launcher.watch.is_silent():
                self._launcher.watch.end()
                return

    def _follow(self) -> None:
        """Wait for the end of the process, and join the next one, again and again."""
        while not self._closed:
            assert self._connection is not None
            self._wait_for_end(self._connection)
            self._connection.close()
            self._close_idle()
            if not self._closed:
                logger.warning("the model's process has ended; joining the next one")
            while not self._closed:
                try:
                    self._connection, description = self._launcher.join()
                except Exception as error:
                    logger.warning("the model's process cannot be started: %s", error)
                    self._failure = error
                    time.sleep(RETRY_SECONDS)
                else:
                    self._failure = None
                    self.joined += 1
                    self._on_counted(description.counted)
                    break


class _CallConnection:
    """A connection for one call at a time, with the memory for its tensors.

    Attributes
    ----------
    holder:
        The process at the other side.
    alone:
        Whether the call under way is a retried one that runs now, beside no other.
    under_way:
        Whether an answer is outstanding, or was not read to its end.
    """

    def __init__(self, connection: Connection, on_counted: OnCounted) -> None:
        self._connection = connection
        self._on_counted = on_counted
        self._outbox, self._inbox = Outbox(), Inbox()
        self._structure: dict[str, Any] = {}
        pid, _ = connection.peer()
        self.holder = Holder(pid, process_start(pid))
        self.alone = False
        self.under_way = False

    def call(self, tensors: Sequence[torch.Tensor], retried: bool) -> Any:
        specs, descriptor = self._outbox.write(tensors)
        try:
            self.under_way = True
            self._connection.send(Call(specs, retried), () if descriptor is None else (descriptor,))
        finally:
            if descriptor is not None:
                os.close(descriptor)
        answer = self._receive(Answer)
        if answer.structure is not None:
            self._structure = answer.structure
        views = self._inbox.read(answer.tensors)
        output = unflatten([copy_bytes(torch.empty_like(view), view) for view in views], self._structure)
        self.under_way = False
        return output

    def describe(self) -> ModelDescription:
        self.under_way = True
        self._connection.send(Describe())
        description: ModelDescription = self._receive(ModelDescription)
        self.under_way = False
        return description

    def close(self) -> None:
        self._connection.close()
        self._outbox.close()
        self._inbox.close()

    def _receive(self, kind: Any) -> Any:
        while True:
            message, descriptors = self._connection.receive()
            for descriptor in descriptors:
                self._inbox.replace(descriptor)
            if isinstance(message, Started):
                self.alone = True
                continue
            self.alone = False
            if isinstance(message, Refusal):
                self.under_way = False
                self._on_counted(message.counted)
                raise _error(message)
            if not isinstance(message, kind):
                raise ConnectionLost(f"{kind.__name__} was expected, {type(message).__name__} found")
            if isinstance(message, Answer) and message.counted:
                self._on_counted(message.counted)
            return message


def _error(refusal: Refusal) -> Exception:
    kind = getattr(errors, refusal.kind, None)
    if isinstance(kind, type) and issubclass(kind, WarmStartError):
        return kind(refusal.message)
    if refusal.kind == "MemoryError":
        return MemoryError(refusal.message)
    return ModelProcessError(f"{refusal.kind}: {refusal.message}")
