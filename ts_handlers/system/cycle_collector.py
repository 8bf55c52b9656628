"""Python's cycle collector in a worker that imports a compiler and then serves one model until it ends."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the collector inside the block, while an entry is loaded.

    Importing a compiler and tracing a model make objects that stay: each pass over them finds next to nothing, see
    docs/decisions/0020-warm-torch-compile.md for what the passes cost together. When the collector goes on they are not
    in the young generation, which it would walk at once.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if enabled:
            frozen = gc.get_freeze_count()
            gc.freeze()
            if not frozen:  # into the oldest generation
                gc.unfreeze()
    finally:
        if enabled:
            gc.enable()


def exempt_from_collection(collect: bool) -> None:
    """Exempt the objects made so far from the collector; with `collect` what a build left is freed before.

    A request should not wait for a collector that walks all objects of torch and its compiler; see
    docs/decisions/0020-warm-torch-compile.md.
    """
    if collect:
        gc.unfreeze()
        gc.collect()
    gc.freeze()
