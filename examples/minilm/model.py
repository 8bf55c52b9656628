"""all-MiniLM-L6-v2 as one graph: encoder, masked mean and normalisation. Imported on a build only."""

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertModel


class SentenceEncoder(torch.nn.Module):
    """Token ids and attention mask, each int64 of shape (batch, sequence), to unit vectors (batch, 384)."""

    def __init__(self) -> None:
        super().__init__()
        config = json.loads(Path(__file__).with_name("config.json").read_text("utf-8"))
        self.encoder = BertModel(BertConfig.from_dict(config), add_pooling_layer=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)
