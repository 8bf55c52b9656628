"""Where nobody has declared what a model takes: its calls are noted, and once enough are known it is built for them.

Noted are names, dtypes and shapes, never contents, and only of calls that the eager module has answered: all of them
while nothing is compiled, and later those that the artifact does not take. A thread writes them into the store. When a
number of calls or of seconds has passed, a child process builds (`ts_handlers.startup.background`), the worker swaps,
and the store gets a declaration that later starts take for the settings'. Calls outside it widen the next one.

One process of a host builds for a model at a time: it holds the lease ``<identity>.background``.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ts_handlers.backends.base import Target
from ts_handlers.compiled_model import CompiledModel
from ts_handlers.errors import BuildError, one_line
from ts_handlers.execution.background import Background
from ts_handlers.key.digests import digest_text
from ts_handlers.model.declaration import Declaration, as_line, declare
from ts_handlers.model.module_state import ModuleState
from ts_handlers.model.observed_calls import CallKind, ObservedCalls, Shapes, call_kind
from ts_handlers.settings.sections import ObserveSettings
from ts_handlers.store.base import Store
from ts_handlers.store.local.layout import BACKGROUND, LEASES
from ts_handlers.store.local.lease import hold_lease
from ts_handlers.system.memory import available_memory

logger = logging.getLogger(__name__)

_REMEMBERED = 1000
"""Forms of calls that are known without looking at `forward`."""
COPIES = 2
"""Copies of the weights beside the one that serves: the build's, and while the worker swaps the artifact's."""
BUILD_BYTES = 1 << 30
"""What importing torch and a compiler takes on the host."""
_PAUSE_SECONDS = 1.0
"""Between two writes of a record."""


def identity_of(target: Target) -> str | None:
    """Under which name the store keeps what is known of a model's calls; None where the model has no identity."""
    try:
        return calls_identity(target.source.name, target.model_digest)
    except BuildError:
        return None


def calls_identity(name: str, *facts: str) -> str:
    """A digest of a model's name and of what shapes its calls, 32 hexadecimal digits."""
    return digest_text("\n".join(("calls", name, *facts)))[:32]


def told_by_calls(target: Target, store: Store) -> Target:
    """The target as a start takes it where earlier calls have told the inputs; otherwise the same one."""
    settings, source = target.settings, target.source
    if settings.inputs or not source.weights_by_name or settings.observing is None:
        return target
    identity = identity_of(target)
    declaration = None if identity is None else store.read_declaration(identity)
    return target if declaration is None else Target(source, declaration.applied_to(settings), target.device)


class Build(Protocol):
    """Begins a build for a declaration beside the model that serves; `published` is called when the store has it."""

    def __call__(self, model: CompiledModel, declaration: Declaration, published: Callable[[], None]) -> Background:
        """Begin, and return what can be waited for."""


class Observation:
    """Notes calls of a model, and has it built.

    Parameters
    ----------
    model:
        Answers eagerly, or with an artifact that was built for `declared`.
    store, identity:
        Where the records lie.
    limits:
        When to build.
    declared:
        What the model serves already; None while nothing is compiled.
    build:
        Begins a build.
    asked:
        Whether samples have told the inputs, so that somebody wants an artifact: changes of the model are then refused,
        as of any compiled one. Otherwise the eager module serves again before it is changed.
    """

    refuses_changes = False

    def __init__(
        self,
        model: CompiledModel,
        store: Store,
        identity: str,
        limits: ObserveSettings,
        declared: Declaration | None,
        build: Build,
        asked: bool = False,
    ) -> None:
        self._asked = asked
        self._changed = False
        self._model = weakref.ref(model)
        self._name = model._target.source.name
        self._store = store
        self._identity = identity
        self._limits = limits
        self._declared = declared
        self._build = build
        self._state = "noting"
        self._reason: str | None = None
        self._new = ObservedCalls()  # not in the store yet
        self._here = ObservedCalls()  # of this process, since it has begun or built
        self._first: float | None = None
        self._known: dict[Any, tuple[CallKind, Shapes]] = {}
        record = store.read_calls(identity) if declared is None else None
        self._before = 0 if record is None else record.calls.count
        if record is not None and self._before:
            self._first = record.first
        # What a handler does to its model after the start would be lost with the swap.
        self._module = ModuleState(model._eager_module()) if declared is None else None
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        weakref.finalize(model, self.close)
        if self._first is not None:
            self._begin()

    def note(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note a call that was answered; never raises."""
        if self._closed.is_set():
            return
        try:
            form = (*map(_form, args), *((name, _form(value)) for name, value in kwargs.items()))
            found = self._known.get(form)
            if found is None:
                found = call_kind(self._served()._eager_module(), args, kwargs)
                if len(self._known) < _REMEMBERED:
                    self._known[form] = found
            with self._lock:
                news = self._here.add(*found)
                self._new.add(*found)
                if self._first is None:
                    self._first = time.time()
                    self._begin()
            if news or self._is_due():
                self._wake.set()
        except Exception as error:
            self._give_up(f"calls cannot be noted: {type(error).__name__}: {one_line(error)}")

    def give_way(self) -> torch.nn.Module | None:
        """Before a change of the module: have it serve again; None where samples have told the inputs."""
        if self._asked:
            return None
        self._changed = True
        model = self._served()
        model.return_to_eager("its handler changes the model, which no artifact follows")
        self._give_up("the handler changes the model, which no artifact follows")
        return model._eager_module()

    def describe(self) -> dict[str, Any]:
        """State, number of calls that were noted, and the reason why nothing is built; JSON-compatible."""
        return {"state": self._state, "calls": self._calls(), "reason": self._reason}

    def close(self) -> None:
        """Write what is known, and note nothing more."""
        if not self._closed.is_set():
            self._closed.set()
            self._wake.set()
            self._flush()

    def _calls(self) -> int:
        with self._lock:
            return self._before + self._here.count

    def _is_due(self) -> bool:
        if self._state != "noting" or self._first is None:
            return False
        calls, seconds = self._limits.calls, self._limits.seconds
        enough = calls is not None and self._calls() >= calls
        return enough or (seconds is not None and time.time() - self._first >= seconds)

    def _begin(self) -> None:
        if self._thread is None:
            atexit.register(self.close)
            self._thread = threading.Thread(target=self._run, daemon=True, name="ts_handlers-observe")
            self._thread.start()

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                if not self._is_due():
                    self._wake.wait(self._seconds_left())
                self._wake.clear()
                due = self._is_due()
                self._flush()
                if due:
                    self._build_now()
                self._closed.wait(_PAUSE_SECONDS)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {one_line(error)}")
            logger.debug("details", exc_info=error)

    def _seconds_left(self) -> float | None:
        seconds = self._limits.seconds
        if self._state != "noting" or seconds is None or self._first is None:
            return None
        return max(0.0, self._first + seconds - time.time())

    def _served(self) -> CompiledModel:
        model = self._model()
        assert model is not None, "the model is gone, and with it its calls"
        return model

    def _flush(self) -> None:
        with self._writing:
            with self._lock:
                new, self._new = self._new, ObservedCalls()
            if new.count:
                self._store.add_calls(self._identity, new)

    def _give_up(self, reason: str) -> None:
        self._state, self._reason = "off", reason
        self._closed.set()
        self._wake.set()
        logger.warning("%s: stays as it is: %s", self._name, reason)

    def _build_now(self) -> None:
        """Build for what is known, or take over what another process has built for meanwhile."""
        self._state = "building"
        with hold_lease(self._store.state_directory / LEASES, f"{self._identity}{BACKGROUND}", None):
            try:
                declaration = self._next_declaration()
            except BuildError as error:  # other calls may come
                self._reason = str(error)
                declaration = None
            if declaration is None:
                self._begin_again()
                return
            self.check_module()
            check_room(self._served())
            logger.info("%s: building for the calls that were seen: %s", self._name, as_line(declaration))
            build = self._build(self._served(), declaration, lambda: self._is_published(declaration))
            build.wait()
        facts = build.describe()
        if facts["state"] != "swapped":
            self._give_up(facts["reason"] or "it was not built")
            return
        self._declared, self._reason, self._module = declaration, None, None
        self._begin_again()

    def _begin_again(self) -> None:
        """Count again from the next call on."""
        with self._lock:
            self._here, self._first, self._before = ObservedCalls(), None, 0
            self._known.clear()
        self._state = "noting"

    def _next_declaration(self) -> Declaration | None:
        """What to build for; None when that is what serves. Raises `BuildError` where calls cannot be compiled."""
        stored, declared = self._store.read_declaration(self._identity), self._declared
        if stored is not None and (declared is None or not stored.is_same_as(declared)):
            return stored
        record = self._store.read_calls(self._identity)
        calls = ObservedCalls() if record is None else record.calls
        if declared is not None and self._here.count > self._served().pool.stats().lent - self._here.count:
            calls, declared = self._here, None  # most calls have another form than before
        elif declared is not None:
            calls = calls.like(declared.inputs)
        found = declare(calls, before=declared)
        return None if self._declared is not None and found.is_same_as(self._declared) else found

    def _is_published(self, declaration: Declaration) -> None:
        self.check_module()
        self._store.write_declaration(self._identity, declaration)

    def check_module(self) -> None:
        """Raise `BuildError` when the handler has changed its module, which what was built does not know."""
        changes = [] if self._module is None else self._module.changes()
        if self._changed and not changes:
            changes = ["by its handler"]
        if changes:
            raise BuildError(
                f"the model has changed since its start ({', '.join(changes[:5])[:300]}), which an artifact would not "
                "follow; change it in load_model of the handler, or declare inputs"
            )


def _form(value: Any) -> Any:
    return (value.dtype, value.shape, value.layout) if isinstance(value, torch.Tensor) else type(value)


def check_room(model: CompiledModel) -> None:
    """Raise `BuildError` where a second copy of the model could leave no memory to the requests.

    Nobody has asked for this build, so a machine that is full already is left alone.
    """
    module = model._eager_module()
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    needed = COPIES * size
    free: int | None
    if model.device.type == "cuda":
        free, where = torch.cuda.mem_get_info(model.device)[0], str(model.device)
    else:
        free, where, needed = available_memory(), "memory", needed + BUILD_BYTES
    if free is not None and free < needed:
        raise BuildError(
            f"a build beside the model may need {needed >> 20} MiB of {where}, {free >> 20} are free; build with "
            "`ts-handlers prewarm` where the model does not serve, or declare inputs"
        )
