"""TorchServe's workers from a fork server: their script, what it imports, and their environment."""

from __future__ import annotations

import glob
import os
import re
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


def environment_of_workers(environment: Mapping[str, str], properties: Mapping[str, str]) -> dict[str, str]:
    """The environment that TorchServe, started with one and a configuration, gives its workers but for ``PYTHONPATH``.

    Examples
    --------
    >>> configuration = {"ipex_enable": "true", "blacklist_env_vars": ".*KEY.*"}
    >>> found = environment_of_workers({"A_KEY": "", "B": "1"}, configuration)
    >>> found["TS_IPEX_ENABLE"], sorted(found)[:2]
    ('true', ['B', 'TS_DECODE_INPUT_REQUEST'])
    """
    ours = {name: properties.get(key, default) for name, (key, default) in _PROPERTIES.items()}
    hidden = properties.get("blacklist_env_vars")
    try:
        pattern = re.compile(hidden) if hidden else None
    except re.error:  # Java's own form; its workers start without the fork server
        pattern = None
    merged = {**environment, **ours}
    return {name: value for name, value in merged.items() if pattern is None or not pattern.fullmatch(name)}
