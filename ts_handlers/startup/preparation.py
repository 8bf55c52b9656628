"""Wrap what a backend has loaded for checks and for requests: the only place where `run` is wrapped.

The order, from the inside to the outside::

    backend's run --> in a slot (`contexts.count` at once) --> requests
                                                           --> under limits, or in an idle window --> canary, warm-up

A run under limits is never a request's: a limit ends the process, and a request is not to do that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ts_handlers.execution.base import Loaded, Run
from ts_handlers.execution.slots import ModuleSlots
from ts_handlers.model.signature import Signature

Around = Callable[[Run], Run]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An artifact in the two forms in which it runs.

    Attributes
    ----------
    served:
        For requests.
    checked:
        For the canary and the warm-up: the same slots, each run inside what `prepare` was given as `around`.
    """

    served: Loaded
    checked: Loaded


def prepare(
    loaded: Loaded,
    declared: Signature | None,
    slots: ModuleSlots,
    around: Around | None = None,
    *,
    yields: bool = False,
) -> Prepared:
    """Give an artifact its limits of values, its slots, and what surrounds its runs before READY.

    Parameters
    ----------
    loaded:
        What a backend's `load` or `build` has returned.
    declared:
        The signature of the settings: an entry knows no limits of values, and the values of whoever built it. None
        where nothing is declared.
    slots:
        Where its runs go when its backend has no pool of its own.
    around:
        Wraps the runs of the canary and the warm-up; None leaves them as they are.
    yields:
        Whether `around` lets requests of another model go first; torch's number of threads then stays as it is.
    """
    if declared is not None:
        loaded = dataclasses.replace(loaded, signature=loaded.signature.with_values_of(declared))
    served = slots.wrap(loaded)
    if around is None:
        return Prepared(served, served)
    adjusts_threads = served.adjusts_threads and not yields
    return Prepared(served, dataclasses.replace(served, run=around(served.run), adjusts_threads=adjusts_threads))
