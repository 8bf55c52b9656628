"""What `accumulate_in_float32` does to a graph, in torch; TensorRT's network is in tests/rtx, answers in tests/gpu."""

from __future__ import annotations

from typing import Any

import torch

from ts_handlers.backends.tensorrt.accumulation import accumulate_in_float32


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv1d(4, 512, 3, padding=1)
        self.head = torch.nn.Linear(512, 8)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.head(torch.relu(self.conv(x)).transpose(1, 2))
        return torch.bmm(y, y.transpose(1, 2)), y[:, index]


def exact(model: Model, x: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
    """The same with float32 sums and the same roundings in between."""
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    y = torch.nn.functional.conv1d(x.float(), weights["conv.weight"], weights["conv.bias"], padding=1).to(x.dtype)
    y = torch.nn.functional.linear(torch.relu(y).transpose(1, 2).float(), weights["head.weight"], weights["head.bias"])
    y = y.to(x.dtype)
    return [torch.bmm(y.float(), y.float().transpose(1, 2)).to(x.dtype), y[:, index]]


def decomposed(model: Model, inputs: tuple[torch.Tensor, ...]) -> Any:
    """The graph with `linear` left whole, as Torch-TensorRT leaves it."""
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.linear.default)
    return torch.export.export(model, inputs, strict=False).run_decompositions(table).module()


def test_products_are_computed_in_float32_and_rounded_as_before() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = Model().to(dtype).eval()
        inputs = (torch.randn(2, 4, 8, dtype=dtype), torch.tensor([1, 5]))
        changed = decomposed(model, inputs)
        assert accumulate_in_float32(changed) == 3
        wanted = exact(model, *inputs)
        for found, expected in zip(changed(*inputs), wanted, strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, expected)


def test_float32_stays_as_it_is() -> None:
    module = decomposed(Model().eval(), (torch.randn(2, 4, 8), torch.tensor([0])))
    code = module.code
    assert accumulate_in_float32(module) == 0
    assert module.code == code
