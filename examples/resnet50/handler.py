"""A `.npy` file, or JSON by the default methods, to the logits of each image."""

import io

import numpy
import torch

from ts_handlers import CompiledHandler

NPY_MAGIC = b"\x93NUMPY"


class Handler(CompiledHandler):
    """`.npy` (`application/octet-stream`): float32 of shape (3, 224, 224) or (batch, 3, 224, 224)."""

    def preprocess(self, data):
        return super().preprocess([{"body": read_array(self.request_body(row))} for row in data])


def read_array(body):
    """The nested list of a `.npy` body; any other body as it is."""
    if not isinstance(body, (bytes, bytearray)) or not body.startswith(NPY_MAGIC):
        return body
    array = torch.from_numpy(numpy.load(io.BytesIO(body), allow_pickle=False))
    return array.unsqueeze(0) if array.ndim == 3 else array
