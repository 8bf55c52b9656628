"""PNG of a digit to its class and probabilities."""

import io

import numpy
import torch
from PIL import Image, UnidentifiedImageError

from ts_handlers import CompiledHandler, InputError


class Handler(CompiledHandler):
    """The body is an image file (`application/octet-stream`) of bright strokes on dark ground."""

    def preprocess(self, data):
        return torch.stack([read_image(self.request_body(row)) for row in data]).to(self.device)

    def postprocess(self, data):
        return [{"class": int(row.argmax()), "probabilities": row.tolist()} for row in data.float().cpu()]


def read_image(body):
    """An image file to a float tensor of shape (1, 8, 8) in [0, 1]."""
    if not isinstance(body, (bytes, bytearray)):
        raise InputError("expected an image file as application/octet-stream")
    try:
        with Image.open(io.BytesIO(body)) as image:
            grey = image.convert("L").resize((8, 8), Image.Resampling.BOX)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"not a readable image: {error}") from error
    return torch.from_numpy(numpy.asarray(grey, dtype=numpy.float32) / 255).unsqueeze(0)
