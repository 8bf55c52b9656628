"""Warm-up: the runs of declared sizes before READY, so that no request pays for the first run of its size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ts_handlers.backends.base import Target
from ts_handlers.backends.compare import copies
from ts_handlers.errors import InputError
from ts_handlers.execution.base import Loaded
from ts_handlers.model.signature import Sizes
from ts_handlers.system.processors import idle_processors


def declared_sizes(target: Target, loaded: Loaded) -> list[Sizes]:
    """The sizes of the setting `warmup`, each completed with example sizes of the dimensions that it leaves out."""
    example = loaded.signature.example_sizes()
    return [{**example, **sizes} for sizes in target.settings.warmup_sizes]


@contextlib.contextmanager
def few_threads(loaded: Loaded) -> Iterator[None]:
    """Run torch's own operators on as many threads as there are idle processors, where that compiles nothing again.

    Workers of a server start together, each with as many threads as there are processors, and OpenMP threads spin
    while they wait for a descheduled one: the canaries of two workers on two processors then take many times as long as
    one alone.
    """
    threads = torch.get_num_threads()
    few = min(threads, max(1, idle_processors()))
    if not loaded.adjusts_threads or few == threads:
        yield
        return
    torch.set_num_threads(few)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_warmup(target: Target, loaded: Loaded, done: Sequence[Sizes] = ()) -> int:
    """Run the declared warm-up sizes on each slot, except those in `done`, which ran on one; returns the runs."""
    if not target.settings.inputs or loaded.warmed_up:
        return 0
    wanted = declared_sizes(target, loaded)
    # A GPU's first run in each context allocates and may compile kernels. The pool lends one slot after the other.
    slots = loaded.pool.size if loaded.pool is not None and target.device.type == "cuda" else 1
    remaining = [sizes for sizes in wanted if slots > 1 or sizes not in done]
    runs = 0
    with few_threads(loaded):
        for sizes in remaining:
            drawn = loaded.signature.generate(sizes)
            with contextlib.suppress(InputError):  # a declared size that is not compiled is answered eagerly
                loaded.signature.check(drawn)
                for _ in range(slots):
                    loaded.run(copies(drawn, target.device))
                    runs += 1
    return runs
