import torch


class Tokens(torch.nn.Module):
    """As many words as make the compiled lookup run in several threads, where an error ends the process."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(30, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids).sum(1)
