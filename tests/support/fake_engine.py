"""A fake GPU at the boundary of `ts_handlers.execution.engine`, whose every interleaving a test can choose.

Threads run one at a time, from one pause to the next; streams execute their queues one operation at a time. `Machine`
knows what could happen next (`choices`), and the test does one of it. Nothing here says anything about the speed or the
numbers of a real device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


class Machine:
    """Threads and streams under one scheduler."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self._threads: list[_Thread] = []
        self._local = threading.local()

    def start(self, function: Callable[[], Any]) -> _Thread:
        """A thread that stands still before `function`."""
        thread = _Thread(self, function)
        self._threads.append(thread)
        return thread

    def choices(self) -> list[Callable[[], None]]:
        """Every step that could be next: a thread that is not blocked, a stream whose next operation is due."""
        threads = [thread.resume for thread in self._threads if not thread.done and thread.ready()]
        return threads + [stream.execute for stream in self.streams if stream.due()]

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Called in a thread: another one may run, and this one goes on when `ready` and chosen."""
        thread = getattr(self._local, "thread", None)
        if thread is not None:  # the test's own thread is never interrupted
            thread.pause(ready)

    def finish(self, choose: Callable[[int], int] = lambda count: 0) -> None:
        """Take steps until everything is done."""
        while choices := self.choices():
            choices[choose(len(choices))]()
        assert all(thread.done for thread in self._threads), "deadlock"


class _Thread:
    def __init__(self, machine: Machine, function: Callable[[], Any]) -> None:
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.ready: Callable[[], bool] = lambda: True
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

        def run() -> None:
            machine._local.thread = self
            self._go.acquire()
            try:
                self.result = function()
            except BaseException as error:
                self.error = error
            self.done = True
            self._back.release()

        threading.Thread(target=run, daemon=True).start()

    def resume(self) -> None:
        self._go.release()
        assert self._back.acquire(timeout=60), "a thread blocks outside the scheduler"

    def pause(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self._back.release()
        self._go.acquire()


class FakeLock:
    """A lock that blocks only inside the scheduler."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._held = False

    def __enter__(self) -> None:
        self._machine.pause(lambda: not self._held)
        assert not self._held
        self._held = True

    def __exit__(self, *error: object) -> None:
        self._held = False


class FakeSignal:
    """What `threading.Event` is to a waiting call of the pool."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._set = False

    def set(self) -> None:
        self._set = True

    def wait(self, timeout: float | None = None) -> bool:
        self._machine.pause(lambda: self._set)
        return self._set


class FakeEvent:
    def __init__(self) -> None:
        self.done = False


class FakeStream:
    """A queue of operations, each with what it waits for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._queue: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        machine.streams.append(self)

    def put(self, action: Callable[[], None] = lambda: None, after: Callable[[], bool] = lambda: True) -> None:
        self._machine.pause()
        self._queue.append((after, action))

    def due(self) -> bool:
        return bool(self._queue) and self._queue[0][0]()

    def execute(self) -> None:
        self._queue.pop(0)[1]()

    def wait_event(self, event: FakeEvent) -> None:
        self.put(after=lambda: event.done)

    def wait_stream(self, stream: FakeStream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Any = None) -> FakeEvent:
        made = FakeEvent()
        self.put(lambda: setattr(made, "done", True))
        return made

    def synchronize(self) -> None:
        self._machine.pause(lambda: not self._queue)


class FakeBuffer:
    """Scratch memory that notices when two inferences use it at once."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.user: object = None
        self.content: Any = None


class FakeDevice:
    def __init__(self, machine: Machine, free: int = 2**30) -> None:
        self._machine = machine
        self._free = free
        self.allocated = 0
        self.buffers: dict[int, FakeBuffer] = {}

    def free_bytes(self) -> int:
        return self._free - self.allocated

    def allocated_bytes(self) -> int:
        return self.allocated

    def used_bytes(self) -> int:
        return self.allocated + 12345

    def new_stream(self) -> FakeStream:
        return FakeStream(self._machine)

    def current_stream(self) -> FakeStream:
        """Each thread's own, so that inputs may still be in the making."""
        local = self._machine._local
        if not hasattr(local, "stream"):
            local.stream = FakeStream(self._machine)
        stream: FakeStream = local.stream
        return stream

    def allocate(self, nbytes: int, stream: Any = None) -> FakeBuffer:
        buffer = FakeBuffer(4096 * (len(self.buffers) + 1), nbytes)
        self.buffers[buffer.address] = buffer
        self.allocated += -(-nbytes // 512) * 512
        return buffer


class FakeTensor:
    """An input or an answer; its value is None until the device has made it."""

    def __init__(self, value: Any = None) -> None:
        self.value = value
        self.streams: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream)


class FakeEngine:
    """Doubles its input, by way of the scratch memory."""

    def __init__(self, device: FakeDevice, name: str = "engine", needs: Sequence[tuple[int, int]] = ((1000, 100),)):
        self.name = name
        self.profiles = len(needs)
        self._needs = needs
        self._device = device

    def scratch_bytes(self, profile: int) -> int:
        return self._needs[profile][0]

    def buffer_bytes(self, profile: int) -> int:
        return self._needs[profile][1]

    def new_context(self, profile: int, stream: FakeStream) -> FakeContext:
        if self._needs[profile][1]:
            self._device.allocate(self._needs[profile][1])
        return FakeContext(self, profile, stream)


class FakeContext:
    def __init__(self, engine: FakeEngine, profile: int, stream: FakeStream) -> None:
        self._engine = engine
        self._profile = profile
        self._stream = stream
        self._scratch: FakeBuffer | None = None
        self._busy = False

    def use_scratch(self, address: int, nbytes: int) -> None:
        assert nbytes >= self._engine.scratch_bytes(self._profile)
        self._scratch = self._engine._device.buffers[address]

    def enqueue(self, inputs: Sequence[FakeTensor]) -> list[FakeTensor]:
        assert not self._busy, "one context in two threads"
        self._busy = True
        scratch, token, answer = self._scratch, object(), FakeTensor()
        assert scratch is not None

        def begin() -> None:
            assert scratch.user is None, "scratch memory used by two inferences at once"
            scratch.user = token
            scratch.content = inputs[0].value * 2

        def end() -> None:
            answer.value = scratch.content
            scratch.user = None

        self._stream.put(begin)
        if inputs[0].value == FAILING:
            self._stream.put(end)
            self._busy = False
            raise ValueError("enqueue failed after work was put on the stream")
        self._stream.put(end)
        self._busy = False
        return [answer]


FAILING = -1
