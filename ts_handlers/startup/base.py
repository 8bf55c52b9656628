"""The contract of this folder: what the steps of one start share, and what they hand on."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from ts_handlers.backends.base import Target
from ts_handlers.execution.base import Loaded
from ts_handlers.execution.slots import ModuleSlots
from ts_handlers.metrics import Metrics
from ts_handlers.startup.preparation import Around
from ts_handlers.store.base import Store


class IdleWindows(Protocol):
    """When native code may run while another model serves; `ts_handlers.startup.background` has the only one."""

    def before_run(self) -> None:
        """Return when a step of native code may begin: between two requests."""

    def around(self, frees_interpreter: bool) -> Around:
        """What wraps the runs of an artifact that is checked.

        Parameters
        ----------
        frees_interpreter:
            Whether the runs are native code that leaves the GIL alone.
        """


@dataclasses.dataclass(frozen=True)
class Start:
    """What the attempts of one start share.

    Attributes
    ----------
    target:
        The model, its settings and its device.
    metrics:
        Phases and counters.
    slots:
        Where a model runs whose backend has no execution contexts of its own.
    store:
        Where entries are looked up and published.
    notes:
        Gets what `describe` shall say.
    retry_since:
        See `ts_handlers.guard.guard.Guard`.
    windows:
        When the artifact's native code may run; None when no other model serves meanwhile.
    """

    target: Target
    metrics: Metrics
    slots: ModuleSlots
    store: Store
    notes: list[str]
    retry_since: float | None = None
    windows: IdleWindows | None = None


@dataclasses.dataclass(frozen=True)
class Served:
    """An artifact that has loaded and answered rightly; `result` is as of `ts_handlers.compiled_model.Outcome`.

    `eager_rows` is what the eager model itself was found to do, where that is what serves.
    """

    loaded: Loaded
    result: str
    canary: dict[str, object] | None
    eager_rows: bool | None = None

    @property
    def independent_rows(self) -> bool | None:
        """As of `ts_handlers.compiled_model.Outcome`."""
        rows = self.eager_rows if self.canary is None else self.canary.get("rows")
        return rows if isinstance(rows, bool) else None
