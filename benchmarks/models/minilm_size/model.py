"""A BERT of MiniLM's size (6 layers, hidden size 384), for the overhead of a request."""

import torch
from transformers import BertConfig, BertModel


class MiniLMSize(torch.nn.Module):
    """Token ids and attention mask, int64 (batch, sequence), to the last hidden state (batch, sequence, 384)."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.encoder = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
