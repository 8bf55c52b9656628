"""What the backends that go through `torch.compile` share: the sizes to run before READY, and the calls after it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator

import torch

from ts_handlers.backends.base import Target
from ts_handlers.model.signature import Signature, Sizes


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor with the strides of the warm-up: along a size of 1 any stride counts as contiguous."""
    if tensor.is_inference():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(-1).view(tensor.shape) if 1 in tensor.shape else tensor


_stance_lock = threading.Lock()
_calls_under_way = 0


@contextlib.contextmanager
def compiles_nothing(after_warmup: bool = True) -> Iterator[None]:
    """After warm-up a shape that would compile runs eagerly instead: right, and no request waits for a compiler.

    Dynamo's stance is one for the whole process: the first of the calls under way sets it, the last one resets it.
    """
    global _calls_under_way
    if not after_warmup:
        yield
        return
    with _stance_lock:
        if _calls_under_way == 0:
            torch.compiler.set_stance("eager_on_recompile")
        _calls_under_way += 1
    try:
        yield
    finally:
        with _stance_lock:
            _calls_under_way -= 1
            if _calls_under_way == 0:
                torch.compiler.set_stance("default")


def warmup_sizes(target: Target) -> list[Sizes]:
    """Sizes to run: declared ones, and one for each combination of size 1 and a larger size.

    Sizes 1 are specialised by Dynamo, so they have graphs of their own.
    """
    signature: Signature = target.require_signature()
    declared = [{**target.example_sizes, **sizes} for sizes in target.settings.warmup_sizes]
    choices = []
    for name, dimension in signature.dimensions.items():
        sizes = [target.example_sizes[name]]
        if dimension.min == 1 and dimension.max > 1:
            sizes.append(1)
        choices.append(sizes)
    combinations = [dict(zip(signature.dimensions, sizes, strict=True)) for sizes in itertools.product(*choices)]
    result: list[Sizes] = []
    for sizes_by_name in _in_order(combinations, declared):
        if sizes_by_name not in result:
            result.append(sizes_by_name)
    return result


def _in_order(combinations: list[Sizes], declared: list[Sizes]) -> Iterator[Sizes]:
    """The general case first: with `dynamic` its graph serves most of the others."""
    yield from combinations
    yield from declared
