"""Layer 3: the runner on a fake device, in thousands of interleavings of threads and streams.

Nothing here says anything about a real engine's speed or numbers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.support.fake_engine import (
    FAILING,
    FakeDevice,
    FakeEngine,
    FakeLock,
    FakeSignal,
    FakeStream,
    FakeTensor,
    Machine,
)
from ts_handlers.errors import ContextMemoryError
from ts_handlers.execution.contexts import ContextPool, Ticket
from ts_handlers.execution.runner import EngineRunner
from ts_handlers.execution.scratch import ProfileMemory, SharedScratch, SlotMemory
from ts_handlers.settings.sections import ContextSettings

KiB = 1024
PHASES = (Phase.generate,)


class ScheduledPool(ContextPool[Any]):
    """Its calls wait inside the scheduler."""

    machine: Machine

    def request(self) -> Ticket[Any]:
        ticket = super().request()
        if not ticket.granted:
            ticket.settled = FakeSignal(self.machine)  # type: ignore[assignment]
        return ticket


def make_runner(machine: Machine, settings: ContextSettings, **engine: Any) -> EngineRunner:
    """A runner that blocks nowhere but in the scheduler."""
    device = FakeDevice(machine)
    runner = EngineRunner([FakeEngine(device, **engine)], settings, device)
    pool = ScheduledPool(tuple(runner.pool._free), settings.wait_seconds)
    pool.machine = machine
    runner.pool = pool
    for slot in pool._free:
        if slot._shared is not None:
            slot._shared._lock = FakeLock(machine)
    return runner


class RunnerMachine(RuleBasedStateMachine):
    """Calls from several threads; at every pause hypothesis chooses which thread or stream goes on."""

    scratch: Any = "shared"

    @initialize(count=st.integers(1, 3))
    def make(self, count: int) -> None:
        self.machine = Machine()
        settings = ContextSettings(count=count, scratch=self.scratch)
        self.runner = make_runner(self.machine, settings, needs=((1000, 100), (600, 0)))
        self.calls: list[tuple[int, Any]] = []

    @precondition(lambda self: len(self.calls) < 5)
    @rule(value=st.integers(-1, 5), profile=st.integers(0, 1))
    def call(self, value: int, profile: int) -> None:
        def run() -> Any:
            tensor = FakeTensor()
            # The input is made on the caller's own stream, some time later.
            self.runner._device.current_stream().put(lambda: setattr(tensor, "value", value))
            if value == FAILING:
                tensor.value = value  # the engine decides on the host
            (answer,) = self.runner.run(profile, [tensor])
            assert answer.streams == [self.runner._device.current_stream()]
            return answer.value  # complete: nothing else has to happen first

        self.calls.append((value, self.machine.start(run)))

    @rule(choice=st.integers(0, 2**16), steps=st.integers(1, 4))
    def step(self, choice: int, steps: int) -> None:
        for _ in range(steps):
            choices = self.machine.choices()
            if not choices:
                return
            choices[choice % len(choices)]()
            choice //= 3

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        turn = iter(range(10**6))
        self.machine.finish(lambda count: next(turn) % count)
        for value, thread in self.calls:
            if value == FAILING:
                assert isinstance(thread.error, ValueError)
            else:
                assert thread.error is None, thread.error
                assert thread.result == 2 * value
        stats = self.runner.pool.stats()
        assert (stats.lent, stats.in_use, stats.waiting) == (len(self.calls), 0, 0)


class PrivateRunnerMachine(RunnerMachine):
    scratch = "private"


TestSharedScratch = RunnerMachine.TestCase
TestSharedScratch.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)
TestPrivateScratch = PrivateRunnerMachine.TestCase
TestPrivateScratch.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def run_schedule(seed: int) -> None:
    """Four calls on two slots with one scratch buffer, every step chosen by a seed."""
    choose = random.Random(seed).randrange
    machine = Machine()
    runner = make_runner(machine, ContextSettings(count=2, scratch="shared"))
    threads = [machine.start(lambda value=value: runner.run(0, [FakeTensor(value)])) for value in range(4)]
    machine.finish(choose)
    assert [thread.result[0].value for thread in threads] == [0, 2, 4, 6]
    assert runner.pool.stats().high_water == 2


def test_thousands_of_schedules() -> None:
    for seed in range(2000):
        run_schedule(seed)


@contextlib.contextmanager
def without_wait(self: SharedScratch, stream: Any) -> Iterator[None]:
    with self._lock:
        yield
        self._last = stream.record_event()


@contextlib.contextmanager
def without_lock(self: SharedScratch, stream: Any) -> Iterator[None]:
    if self._last is not None:
        stream.wait_event(self._last)
    yield
    self._last = stream.record_event()


@contextlib.contextmanager
def recorded_too_early(self: SharedScratch, stream: Any) -> Iterator[None]:
    with self._lock:
        if self._last is not None:
            stream.wait_event(self._last)
        self._last = stream.record_event()
        yield


@pytest.mark.parametrize("mistake", [without_wait, without_lock, recorded_too_early])
def test_the_state_machine_finds_mistakes_in_the_chain(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedScratch, "use", mistake)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            RunnerMachine, settings=settings(TestSharedScratch.settings, report_multiple_bugs=False, phases=PHASES)
        )


def test_answers_are_not_overwritten_by_later_calls() -> None:
    machine = Machine()
    runner = make_runner(machine, ContextSettings(count=1))
    threads = [machine.start(lambda value=value: runner.run(0, [FakeTensor(value)])) for value in range(3)]
    machine.finish()
    assert [thread.result[0].value for thread in threads] == [0, 2, 4]


def test_an_event_that_cannot_be_recorded_stops_the_chain() -> None:
    class Broken(FakeStream):
        def record_event(self, event: Any = None) -> Any:
            raise RuntimeError("no event")

    machine = Machine()
    chain = SharedScratch()
    with pytest.raises(RuntimeError, match="no event"), chain.use(Broken(machine)):
        pass
    with pytest.raises(RuntimeError, match="cannot be used any more"), chain.use(FakeStream(machine)):
        pass


sizes = st.integers(0, 64 * KiB)


@given(
    needs=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
    count=st.integers(1, 5),
    scratch=st.sampled_from(["private", "shared"]),
)
def test_prediction_is_what_is_allocated(needs: list[tuple[int, int]], count: int, scratch: Any) -> None:
    device = FakeDevice(Machine())
    runner = EngineRunner([FakeEngine(device, needs=needs)], ContextSettings(count=count, scratch=scratch), device)
    memory = runner.memory()
    assert memory["predicted"]["total_bytes"] == memory["used"]["torch_bytes"] == device.allocated
    largest = runner.predicted.largest_count(device.allocated)
    assert largest >= count
    if device.allocated:
        assert SlotMemory(runner.predicted.profiles, largest, scratch).total <= device.allocated
        if largest < 2**31:  # otherwise a further slot costs nothing
            assert SlotMemory(runner.predicted.profiles, largest + 1, scratch).total > device.allocated
        small = FakeDevice(Machine(), free=device.allocated - 1)
        with pytest.raises(ContextMemoryError):
            EngineRunner([FakeEngine(small, needs=needs)], ContextSettings(count=count, scratch=scratch), small)
        assert small.allocated == 0


def test_refusal_names_every_figure() -> None:
    plan = SlotMemory((ProfileMemory("a", 10 * KiB, KiB), ProfileMemory("b", 20 * KiB, KiB)), 4, "private")
    assert (plan.scratch_each, plan.buffers_each, plan.total) == (20 * KiB, 2 * KiB, 88 * KiB)
    with pytest.raises(ContextMemoryError) as refusal:
        plan.require(30 * KiB)
    figures = (4, 88 * KiB, 80 * KiB, 2 * KiB, 30 * KiB)
    assert all(str(figure) in str(refusal.value) for figure in figures)
    assert "at most 1 contexts fit with private scratch, 5 with shared" in str(refusal.value)
    plan.require(88 * KiB)
