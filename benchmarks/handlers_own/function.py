"""A handler that is a function at module level, with the object that it calls."""

import torch
from others import HandleOnly

_service = HandleOnly()
_service.model = None


def handle(data, context):
    if _service.model is None:
        _service.initialize(context)
    if data is None:
        return None
    with torch.no_grad():
        return _service.handle(data, context)
