"""ResNet-50 from its configuration. Imported on a build only."""

import json
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification


class ResNet50(torch.nn.Module):
    """Images (batch, 3, 224, 224) to logits (batch, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        config = json.loads(Path(__file__).with_name("config.json").read_text("utf-8"))
        self.resnet = ResNetForImageClassification(ResNetConfig.from_dict(config))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.resnet(pixel_values=pixel_values).logits
