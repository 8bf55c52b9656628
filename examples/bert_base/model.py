"""BERT-base from its configuration. Imported on a build only."""

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertModel


class BertBase(torch.nn.Module):
    """Token ids and attention mask, int64 (batch, sequence), to the pooled output (batch, 768)."""

    def __init__(self) -> None:
        super().__init__()
        config = json.loads(Path(__file__).with_name("config.json").read_text("utf-8"))
        self.bert = BertModel(BertConfig.from_dict(config))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output
