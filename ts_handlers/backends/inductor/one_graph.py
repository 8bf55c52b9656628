"""One graph of `torch.compile` for all sizes of the declared dimensions.

Every graph is traced again at each warm start, which is most of what such a start costs. Two things would split one:

- Dynamo specialises sizes 0 and 1. `backed_size_oblivious`, with only the declared dimensions marked dynamic, stops it.
- Inductor asks for the memory format of each convolution's output. torch answers by walking the input's strides
  (`is_channels_last_strides_2d_s4` in c10/core/MemoryFormat.h), compares the batch size with 1 on the way, and that
  comparison becomes a guard, although the walk ends there and nothing depends on it. It is asked with a batch of 2.

Whether the graph is right at the smallest sizes is checked against eager when it is built.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from ts_handlers.model.signature import Signature
from ts_handlers.system.patching import replaced_attribute

_MEMORY_FORMAT = "_conv_determine_backend_memory_format"


@contextlib.contextmanager
def one_graph(enabled: bool) -> Iterator[None]:
    """Inside the block, a traced graph is not specialised for sizes 0 and 1 of dynamic dimensions."""
    import torch.fx.experimental._config

    symbolic_config: Any = torch.fx.experimental._config
    with symbolic_config.patch(backed_size_oblivious=enabled):
        original = getattr(torch._C, _MEMORY_FORMAT, None)
        if not enabled or original is None:
            yield
            return
        with replaced_attribute(torch._C, _MEMORY_FORMAT, _without_batch_guard(original)):
            yield


def _without_batch_guard(original: Any) -> Any:
    @functools.wraps(original)
    def memory_format(image: torch.Tensor, weight: torch.Tensor, backend: Any) -> Any:
        if isinstance(image.shape[0], torch.SymInt):
            image = image.new_empty_strided((2, *image.shape[1:]), image.stride())
        return original(image, weight, backend)

    return memory_format


def mark_dynamic(signature: Signature, tensors: list[torch.Tensor]) -> None:
    """Tell Dynamo which dimensions are dynamic: the declared ones, and only those."""
    import torch._dynamo

    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and signature.dimensions[size].min != signature.dimensions[size].max:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
