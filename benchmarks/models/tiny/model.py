"""A model that compiles in seconds, to try the benchmarks themselves."""

import torch


class Tiny(torch.nn.Module):
    """Rows (batch, 16) to class probabilities (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.second = torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()).softmax(dim=1)
