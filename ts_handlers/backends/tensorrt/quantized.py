"""Models that are quantised already: int8 and fp8 by quantize and dequantize operators in the exported graph.

Torch-TensorRT converts the operator of NVIDIA's modelopt (``tensorrt::quantize_op``). Here are converters for torch's
own (``quantized_decomposed``), which torchao's PT2E quantisation puts into a graph. TensorRT is symmetric: zero points
must be 0. Imported on a build only.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from ts_handlers.backends.tensorrt.dtypes import tensorrt_dtype
from ts_handlers.backends.tensorrt.library import builder_flavour, import_tensorrt
from ts_handlers.errors import BuildError
from ts_handlers.settings import SECTION
from ts_handlers.system.patching import replaced_attribute

NAMESPACE = "quantized_decomposed"
_NAMES = ("quantize_per_tensor", "dequantize_per_tensor", "quantize_per_channel", "dequantize_per_channel")
_KEPT_BY_TORCH_TENSORRT = ("tensorrt.quantize_op.default", "tensorrt.dynamic_block_quantize_op.default")  # modelopt's
_QUANTIZED = (torch.int8, torch.float8_e4m3fn)
_PRECISIONS = {"INT8": "int8", "FP8": "fp8"}  # by the name of TensorRT's type, as the setting `precision` calls it


def prepare(program: Any) -> None:
    """Register the converters if an exported program has operators for them."""
    if any(getattr(node.target, "namespace", None) == NAMESPACE for node in program.graph.nodes):
        _register_converters()


@functools.cache
def _register_converters() -> None:
    from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter

    for operator in _operators():
        dynamo_tensorrt_converter(operator, supports_dynamic_shapes=True)(_convert)


def _operators() -> tuple[Any, ...]:
    """torch's own operators, so far as somebody has registered them."""
    library = getattr(torch.ops, NAMESPACE)
    return tuple(getattr(library, name).default for name in _NAMES if hasattr(library, name))


def _convert(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """``(input, scale, zero_point[, axis], low, high, dtype, out_dtype=...)`` as a layer of TensorRT."""
    from torch_tensorrt import dtype
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

    types = import_tensorrt(builder_flavour()).DataType
    operator = target.__name__.partition(".")[0]
    per_channel = operator.endswith("per_channel")
    quantized = args[6 if per_channel else 5]
    if quantized not in _QUANTIZED:
        raise BuildError(f"{operator} with {quantized}: TensorRT takes int8 and float8_e4m3fn")
    if bool((torch.as_tensor(args[2]) != 0).any()):
        raise BuildError(f"{operator} with a zero point: TensorRT is symmetric; quantise with zero points of 0")
    scale = torch.as_tensor(args[1], dtype=torch.float32)
    scale = get_trt_tensor(ctx, scale if per_channel else scale.reshape(()), f"{name}_scale")
    tensor = get_trt_tensor(ctx, args[0], f"{name}_input")
    if operator.startswith("dequantize"):
        out = dtype._from(kwargs.get("out_dtype") or torch.float32).to(types)
        layer = ctx.net.add_dequantize(tensor, scale, out)
    else:
        layer = ctx.net.add_quantize(tensor, scale, tensorrt_dtype(types, quantized))
    if layer is None:
        raise BuildError(f"TensorRT does not take {operator} here; its log says why")
    if per_channel:
        layer.axis = int(args[3])
    layer.name = name
    return layer.get_output(0)


@contextlib.contextmanager
def kept_from_folding() -> Iterator[None]:
    """Keep Torch-TensorRT from folding a quantised weight and its dequantisation into an ordinary weight."""
    from torch_tensorrt.dynamo.lowering.passes import constant_folding

    folder = constant_folding._TorchTensorRTConstantFolder
    original = folder.is_impure
    operators = _operators()
    with replaced_attribute(folder, "is_impure", lambda self, node: node.target in operators or original(self, node)):
        yield


def is_kept_from_folding(target: Any) -> bool:
    """Whether an operator of a graph becomes a layer even where all that it takes are weights."""
    return target in _operators() or str(target) in _KEPT_BY_TORCH_TENSORRT


def quantized_layers(definition: Any) -> dict[str, int]:
    """How many tensors a network takes from int8 and fp8, by ``int8`` and ``fp8``."""
    found: Counter[str] = Counter()
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        if layer.type.name == "DEQUANTIZE":
            kind = layer.get_input(0).dtype.name
            found[_PRECISIONS.get(kind, kind.lower())] += 1
    return dict(found)


def require_precision(precision: str, found: dict[str, int]) -> None:
    """Refuse a network that is not quantised as the setting `precision` declares.

    Raises
    ------
    BuildError
        With the remedy.
    """
    if precision in _PRECISIONS.values() and not found.get(precision):
        holds = ", ".join(f"{count} of {name}" for name, count in found.items()) or "none"
        raise BuildError(
            f"{SECTION}.tensorrt.precision: {precision} declares a quantised model, its graph has no {precision} "
            f"dequantisation (found: {holds}). Quantise it with torchao (PT2E, symmetric) or modelopt before it is "
            "archived; TensorRT plans are not quantised here"
        )
