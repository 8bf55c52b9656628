"""Quantised models become networks of int8 and fp8 layers, by the real converters and without a GPU.

TensorRT for RTX builds plans for them on a GPU only; tests/gpu/test_quantized.py runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backends.tensorrt.rtx.test_builder import in_child

pytestmark = pytest.mark.compile

MODELS = """
from tests.support.quantized_models import quantized_code
from ts_handlers.backends.export import FlatModel
from ts_handlers.backends.tensorrt.quantized import quantized_layers, require_precision

def network(model, x):
    batch = torch.export.Dim("batch", min=1, max=16)
    flat = FlatModel(model, ("x",)).eval()
    program = torch.export.export(flat, (x,), dynamic_shapes=(({0: batch},),), strict=False)
    rest = x.shape[1:]
    whole = build.InputRange("x", x.dtype, (1, *rest), (4, *rest), (16, *rest))
    return build.Conversion(program, [whole], [[whole]], settings).network.definition

def model(*arguments, **options):
    names = {}
    exec(quantized_code(*arguments, **options), names)
    return names["Model"]().eval()

def reason(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def child(folder: Path, code: str) -> Any:
    return in_child(folder, MODELS + code)


def test_quantised_layers_are_converted_and_counted(tensorrt_folder: Path) -> None:
    found = child(
        tensorrt_folder,
        """
x = torch.randn(3, 64)
found["int8"] = quantized_layers(network(model("int8"), x))
found["weights"] = quantized_layers(network(model("int8", activations=False), x))
found["fp8"] = quantized_layers(network(model("fp8"), x))
found["none"] = quantized_layers(network(torch.nn.Linear(64, 4).eval(), x))
found["zero point"] = reason(network, model("int8", zero_point=1), x)
found["declared"] = [reason(require_precision, *case) for case in (
    ("int8", {"int8": 1}), ("fp8", {"int8": 1}), ("int8", {}), ("as_is", {}), ("autocast", {}),
)]
""",
    )
    assert found["int8"] == {"int8": 4}  # the weights are not folded back into float32
    assert found["weights"] == {"int8": 2}
    assert found["fp8"] == {"fp8": 4}
    assert found["none"] == {}
    assert "quantise with zero points of 0" in found["zero point"]
    fine, other, absent, *undeclared = found["declared"]
    assert fine is None
    assert undeclared == [None, None]
    assert "no fp8 dequantisation (found: 1 of int8)" in other
    assert "no int8 dequantisation (found: none)" in absent


def test_programs_of_torchao_are_converted(tensorrt_folder: Path, tmp_path: Path) -> None:
    """PT2E with symmetric specifications, saved as an exported program."""
    pytest.importorskip("torchao")
    in_child(
        tensorrt_folder,
        f"""
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

observers = [MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric),
             PerChannelMinMaxObserver.with_args(qscheme=torch.per_channel_symmetric)]
activation = QuantizationSpec(torch.int8, observers[0], -128, 127, torch.per_tensor_symmetric)
weight = QuantizationSpec(torch.int8, observers[1], -127, 127, torch.per_channel_symmetric, ch_axis=0)

class Symmetric(Quantizer):
    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target in (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default):
                wanted = {{node.args[0]: activation, node.args[1]: weight}}
                node.meta["quantization_annotation"] = QuantizationAnnotation(wanted, None, _annotated=True)
        return model
    def validate(self, model):
        pass

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)
).eval()
x = torch.randn(3, 3, 8, 8)
shapes = ({{0: torch.export.Dim("batch", min=1, max=16)}},)
prepared = prepare_pt2e(torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False).module(), Symmetric())
prepared(x)
program = torch.export.export(convert_pt2e(prepared), (x,), dynamic_shapes=shapes, strict=False)
torch.export.save(program, {str(tmp_path / "model.pt2")!r})
""",
    )
    found = child(
        tensorrt_folder,
        f"""
from ts_handlers.model.exported import ExportedSource
module = ExportedSource("m", {str(tmp_path / "model.pt2")!r}).eager()
found["counts"] = quantized_layers(network(module, torch.randn(3, 3, 8, 8)))
""",
    )
    assert found["counts"] == {"int8": 4}
