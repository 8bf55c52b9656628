"""Which sizes the step ``static`` compiles, and when it waits for a backend that covers more."""

from __future__ import annotations

import math

from ts_handlers.model.signature import Sizes
from ts_handlers.settings import Settings

STATIC = "static"
MAX_STATIC_VARIANTS = 16
COVERS_ALL = "inductor"
"""The backend that answers every declared size from compiled code where the step ``static`` answers some of them."""


def static_sizes(settings: Settings) -> list[Sizes]:
    """The sizes of the step ``static``: the warm-up sizes that name every dimension, each once."""
    found: list[Sizes] = []
    for sizes in settings.warmup_sizes:
        if set(sizes) == set(settings.dimensions) and dict(sizes) not in found:
            found.append(dict(sizes))
    return found[:MAX_STATIC_VARIANTS]


def leaves_static_to_others(settings: Settings) -> bool:
    """Whether the step ``static`` waits until a backend has been tried that would cover every declared size.

    That is where the step would compile a part of the declared sizes, and that backend comes later in the fallback
    order. With `strict` no other backend is tried.
    """
    order = settings.backends
    later = order[order.index("aot_inductor") + 1 :] if "aot_inductor" in order else ()
    if settings.strict or COVERS_ALL not in later or settings.compile.dynamic is False:
        return False
    declared = math.prod(d.max - d.min + 1 for d in settings.dimensions.values())
    return 0 < len(static_sizes(settings)) < declared
