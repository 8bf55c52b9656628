"""How a start ended, and the build that may go on beside the model that it has made ready."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol


class Background(Protocol):
    """The build that goes on beside an eager model; `ts_handlers.startup.background.build.BackgroundBuild` is one."""

    @property
    def left_module(self) -> bool:
        """Whether the eager module was to go with the swap and is still there."""

    def describe(self) -> dict[str, Any]:
        """State, phase, seconds and reason, JSON-compatible."""

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` after the swap or the failure."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the swap or the failure; False when that took longer than `timeout` seconds."""

    def wait_for_idle_window(self) -> None:
        """Return between two calls of the model."""

    def close(self) -> None:
        """Give up: never swap."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a start ended; the contents of `describe`.

    `result` is ``hit``, ``built`` (by this process), ``waited`` (built by another process of this host while this one
    waited), ``eager``, or with ``on_miss: background`` first ``background`` (served eagerly while a child process
    builds) and then ``swapped``. `missed` names the key parts that kept the nearest entry from being a hit.
    `independent_rows` tells whether the eager model was seen to answer rows alone as among others, None where that was
    not tried; see `ts_handlers.startup.rows`.
    """

    backend: str
    key: str | None
    result: str
    missed: tuple[str, ...] = ()
    fallbacks: tuple[dict[str, str], ...] = ()
    canary: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    independent_rows: bool | None = None
