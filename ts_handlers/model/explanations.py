"""Says that a thread explains answers: models that it calls then run as eager modules, with gradients and hooks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Explanations(threading.local):
    """Whether the running thread explains answers."""

    under_way = False


_explanations = _Explanations()


@contextlib.contextmanager
def explanations() -> Iterator[None]:
    """Inside the block, models that this thread calls run as eager modules, with gradients and hooks."""
    before, _explanations.under_way = _explanations.under_way, True
    try:
        yield
    finally:
        _explanations.under_way = before


def explanations_under_way() -> bool:
    """Whether this thread is inside a block of `explanations`."""
    return _explanations.under_way
