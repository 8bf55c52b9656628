"""The contract of a build that goes on beside an eager model that serves."""

from __future__ import annotations

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
