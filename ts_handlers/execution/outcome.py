"""How a start ended."""

from __future__ import annotations

import dataclasses
from typing import Any


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
