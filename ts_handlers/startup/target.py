"""What a start, or whoever computes the keys of one, works for."""

from __future__ import annotations

import torch

from ts_handlers.backends import get_backend
from ts_handlers.backends.base import Target
from ts_handlers.model.base import ModelSource
from ts_handlers.settings import Settings
from ts_handlers.store.opening import weights_digester


def new_target(source: ModelSource, settings: Settings, device: torch.device | str) -> Target:
    """The target of a start, whose weights are being digested on a thread if a backend's key needs that.

    A source alone would hash its weights at every start. Here it gets the digester of the settings' store, which
    remembers digests between processes. Whoever computes keys makes the target with this function.
    """
    if any(get_backend(name).persistent for name in settings.backends):
        source.begin_digest(weights_digester(settings))
    return Target(source, settings, torch.device(device))
