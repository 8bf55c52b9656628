"""TorchServe's workers from a fork server: their script, what it imports, and their environment."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping

WORKER = "/ts/model_service_worker.py"
"""The end of the path of the script that every worker runs."""
_PROPERTIES = {
    "TS_DECODE_INPUT_REQUEST": ("decode_input_request", "true"),
    "TS_IPEX_ENABLE": ("ipex_enable", "false"),
    "TS_IPEX_GPU_ENABLE": ("ipex_gpu_enable", "false"),
}
"""Variables that TorchServe sets for its workers, with the property and its default value."""
_IMPORTED = (
    "torch",
    "torch.utils.serialization",
    "ts.arg_parser",
    "ts.async_service",
    "ts.metrics.metric_cache_yaml_impl",
    "ts.model_loader",
    "ts.protocol.otf_message_handler",
    "ts_handlers.start",
    "ts_handlers.model.archive",
    "ts_handlers.backends.aot_inductor.backend",
    "ts_handlers.backends.aot_inductor.load",
    "ts_handlers.backends.aot_inductor.static_sizes",
    "ts_handlers.backends.inductor.warm_compiler",
)
"""What a worker imports until a warm start has ended, without what initialises CUDA."""
_HANDLERS = ("ts_handlers.servers.torchserve.compiled_handler",)
"""The handlers. TorchServe's base handler asks for the GPU's capability while it is imported, if there is a GPU."""


def preloaded_modules(declared: list[str]) -> list[str]:
    """The modules that the fork server imports: a worker's, and what the user has declared that the handlers import."""
    handlers = () if glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/kfd") else _HANDLERS
    return list(dict.fromkeys([*_IMPORTED, *handlers, *declared]))


def variables_of_workers(properties: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that TorchServe sets for its workers, from its configuration.

    Examples
    --------
    >>> variables_of_workers({"ipex_enable": "true"})["TS_IPEX_ENABLE"]
    'true'
    """
    return {name: properties.get(key, default) for name, (key, default) in _PROPERTIES.items()}
