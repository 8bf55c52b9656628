"""Quantised models as torchao's PT2E leaves them: torch's own quantize and dequantize operators round each layer."""

from __future__ import annotations

QUANTIZED = """
import torch
import torch.ao.quantization.fx._decomposed

operators = torch.ops.quantized_decomposed
KIND, LARGEST = {kind}, {largest}


class Quantized(torch.nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        weight = torch.randn(outputs, inputs) / inputs**0.5
        self.bias = torch.nn.Parameter(torch.randn(outputs))
        self.per_channel = KIND == torch.int8
        scale = weight.abs().amax(1) / LARGEST if self.per_channel else weight.abs().amax() / LARGEST
        levels = weight / (scale.unsqueeze(1) if self.per_channel else scale)
        levels = levels.round().clamp(-LARGEST, LARGEST) if KIND == torch.int8 else levels
        self.register_buffer("weight", levels.to(KIND))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_points", torch.full((outputs,), {zero_point}))
        self.weight_scale = float(scale) if not self.per_channel else None

    def forward(self, x):
        bounds = (-LARGEST, LARGEST, KIND)
        if {activations}:
            x = operators.quantize_per_tensor(x, 4 / LARGEST, 0, *bounds)
            x = operators.dequantize_per_tensor(x, 4 / LARGEST, 0, *bounds, out_dtype=torch.float32)
        if self.per_channel:
            weight = operators.dequantize_per_channel(
                self.weight, self.scale, self.zero_points, 0, *bounds, out_dtype=torch.float32
            )
        else:
            weight = operators.dequantize_per_tensor(
                self.weight, self.weight_scale, 0, *bounds, out_dtype=torch.float32
            )
        return torch.nn.functional.linear(x, weight, self.bias)


class Model(torch.nn.Module):
    __model__ = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = Quantized(64, 128)
        self.second = Quantized(128, 16)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))
"""
KINDS = {
    "int8": {"kind": "torch.int8", "largest": "127"},
    "fp8": {"kind": "torch.float8_e4m3fn", "largest": "448"},
}


def quantized_code(precision: str, *, activations: bool = True, zero_point: int = 0) -> str:
    """The file of a model of two quantised linear layers, 64 inputs and 16 outputs; weights per channel for int8."""
    return QUANTIZED.format(**KINDS[precision], activations=activations, zero_point=zero_point)
