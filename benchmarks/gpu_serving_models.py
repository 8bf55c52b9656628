"""The models of gpu_serving.py: how a request's body becomes inputs, and outputs an answer.

Bodies and answers are small, so that the sides compete for the GPU and not for HTTP.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

BATCH = 8

BERT_CODEC = """
import numpy
import torch


def decode(bodies, device):
    rows = numpy.frombuffer(b"".join(bodies), dtype=numpy.int16).reshape(8 * len(bodies), 128)
    ids = torch.from_numpy(rows.astype(numpy.int64)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encode(outputs, requests):
    vectors = outputs[:, 0].cpu().numpy().reshape(requests, -1)
    return [each.tobytes() for each in vectors]
"""
RESNET_CODEC = """
import numpy
import torch


def decode(bodies, device):
    rows = numpy.frombuffer(b"".join(bodies), dtype=numpy.uint8).reshape(8 * len(bodies), 3, 32, 1, 32, 1)
    pixels = (torch.from_numpy(rows.copy()).to(device).half() - 128) / 64
    return {"pixel_values": pixels.expand(-1, -1, -1, 7, -1, 7).reshape(-1, 3, 224, 224)}


def encode(outputs, requests):
    scores = outputs.cpu().numpy().reshape(requests, -1)
    return [each.tobytes() for each in scores]
"""
HANDLER = """
import codec

from ts_handlers import CompiledHandler


class Handler(CompiledHandler):
    def preprocess(self, data):
        bodies = [self.request_body(row) for row in data]
        self.batch_state.requests = len(bodies)
        return codec.decode(bodies, self.device)

    def postprocess(self, data):
        return codec.encode(data, self.batch_state.requests)
"""


def _ids() -> bytes:
    ids = random.randbytes(BATCH * 256)
    return bytes(b if i % 2 == 0 else b % 100 for i, b in enumerate(ids))  # int16 inside the vocabulary


def _pixels() -> bytes:
    return random.randbytes(BATCH * 3 * 32 * 32)


@dataclasses.dataclass(frozen=True)
class Load:
    """What clients send, and what they get.

    Attributes
    ----------
    codec:
        Source of `decode` (bodies to inputs on a device) and `encode` (outputs to one answer for each request).
    body:
        Makes one request's body: `BATCH` sequences of 128 token ids, int16; or images of 3 x 32 x 32, uint8, which
        `decode` enlarges to 224 x 224 by repeating pixels.
    answer_bytes:
        Of one request's answer: float16 vectors of the first tokens, or scores.
    """

    codec: str
    body: Callable[[], bytes]
    answer_bytes: int


LOADS = {
    "bert_base": Load(BERT_CODEC, _ids, BATCH * 768 * 2),
    "resnet50": Load(RESNET_CODEC, _pixels, BATCH * 1000 * 2),
}
