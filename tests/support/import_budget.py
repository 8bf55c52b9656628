"""What a process that serves a hit of ``aot_inductor`` does not import."""

from __future__ import annotations

from collections.abc import Iterable

HEAVY = (
    "sympy",
    "torch._inductor",
    "torch._dynamo",
    "transformers",
    "fsspec",
    "obstore",
    "s3fs",
    "redis",
    "cryptography",
    "rich",
    "typer",
    "prometheus_client",
    "opentelemetry",
    "torch_tensorrt",
)
FOR_BUILDS = (
    "ts_handlers.startup.background.build",
    "ts_handlers.startup.build_process",
    "ts_handlers.backends.aot_inductor.build",
    "ts_handlers.backends.aot_inductor.compile",
    "ts_handlers.backends.aot_inductor.linears",
    "ts_handlers.backends.inductor.backend",
    "ts_handlers.backends.tensorrt.backend",
    "ts_handlers.monitoring.exposition",
    "ts_handlers.monitoring.gathering",
    "ts_handlers.exporter",
    "ts_handlers.store.upkeep.eviction",
    "ts_handlers.guard.failures",
    "ts_handlers.store.upkeep.garbage",
    "ts_handlers.store.upkeep.scan",
    "ts_handlers.store.upkeep.space",
)
"""Our own modules that only builds, other backends and the command line need."""


def beyond_budget(modules: Iterable[str]) -> set[str]:
    """The modules that are named above or lie below one that is."""
    names = (*HEAVY, *FOR_BUILDS)
    return {module for module in modules if module in names or module.startswith(tuple(f"{name}." for name in names))}
