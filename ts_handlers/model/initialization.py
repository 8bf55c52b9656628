"""Build a model without drawing the random initial weights that the checkpoint replaces anyway.

Random numbers that `load_state_dict` overwrites are work for nothing (docs/decisions/0006-skipped-initialization.md).
Skipping them is only right when nobody can tell, so `skip_random_initialization` keeps a record and `was_sound` decides
afterwards; if it was not, the caller builds the model again in the ordinary way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ts_handlers.system.patching import replaced_attribute

# What torch.nn.init and transformers' own initialisation end in, and the parameter that is filled in instead. The mean
# and the lower bound are what the rejection sampling of trunc_normal_ accepts at once.
_METHODS = {"normal_": "mean", "uniform_": "from"}


class SkippedInitialization:
    """Record of what was skipped while `skip_random_initialization` was active."""

    def __init__(self, limit: int) -> None:
        self._skipped: list[torch.Tensor] = []
        self._state = torch.get_rng_state()
        self._fills = self._bytes = 0
        self._limit = limit
        self._seen: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        """Remember a tensor that was not drawn; the reference keeps its memory from being reused.

        Raises
        ------
        RuntimeError
            Far more was filled than the weights hold: a loop that draws until it likes the result would never end.
        """
        self._fills += 1
        self._skipped.append(tensor)
        if tensor.data_ptr() not in self._seen:
            self._seen.add(tensor.data_ptr())
            self._bytes += tensor.nbytes
        if self._bytes > 2 * self._limit + (1 << 20) or self._fills > 10_000 + self._limit // 256:
            raise RuntimeError("the constructor draws random numbers until they fit")

    def was_sound(self, module: torch.nn.Module) -> bool:
        """Whether `module`, whose state_dict has been loaded completely, equals one built in the ordinary way.

        Sound means: every skipped tensor is (part of) a loaded parameter or persistent buffer, and nothing else drew
        from the random generator, whose sequence the skipping has changed.
        """
        if not torch.equal(self._state, torch.get_rng_state()):
            return False
        dense = [tensor for tensor in module.state_dict().values() if tensor.layout == torch.strided]
        loaded = [_memory(tensor) for tensor in dense if tensor.is_contiguous()]
        starts: dict[int, int] = {}
        for start, end in loaded:
            starts[start] = max(end, starts.get(start, end))
        return all(_is_covered(_memory(tensor), starts, loaded) for tensor in self._skipped)


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the byte after its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _is_covered(memory: tuple[int, int], starts: dict[int, int], loaded: list[tuple[int, int]]) -> bool:
    start, end = memory
    if starts.get(start, -1) >= end:  # nearly always: a whole parameter
        return True
    return any(low <= start and end <= high for low, high in loaded)


@contextlib.contextmanager
def skip_random_initialization(limit: int = 1 << 30) -> Iterator[SkippedInitialization]:
    """Make the in-place random fills of this thread write a constant.

    Other threads keep the real methods. Not reentrant across threads: callers hold their own lock.

    Parameters
    ----------
    limit:
        Size of the weights in bytes; a constructor that fills much more than that is stopped by a RuntimeError.
    """
    record = SkippedInitialization(limit)
    owner = threading.get_ident()

    def skipping(original: Callable[..., Any], constant: str) -> Callable[..., Any]:
        def fill(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if threading.get_ident() != owner or self.device.type != "cpu" or kwargs.get("generator") is not None:
                return original(self, *args, **kwargs)  # type: ignore[no-any-return]
            record.add(self)
            return self.fill_(args[0] if args else kwargs.get(constant, 0.0))

        return fill

    with contextlib.ExitStack() as stack:
        for name, parameter in _METHODS.items():
            fill = skipping(getattr(torch.Tensor, name), parameter)
            stack.enter_context(replaced_attribute(torch.Tensor, name, fill))
        yield record
