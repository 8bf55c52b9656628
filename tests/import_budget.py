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
    "torch_tensorrt",
)
FOR_BUILDS = (
    "ts_handlers.background",
    "ts_handlers.build_process",
    "ts_handlers.backends.aot_inductor_build",
    "ts_handlers.backends.aot_inductor_export",
    "ts_handlers.backends.aot_inductor_linears",
    "ts_handlers.backends.inductor",
    "ts_handlers.backends.tensorrt",
    "ts_handlers.store.eviction",
    "ts_handlers.store.failures",
    "ts_handlers.store.garbage",
    "ts_handlers.store.scan",
    "ts_handlers.store.space",
)
"""Our own modules that only builds, other backends and the command line need."""


def beyond_budget(modules: Iterable[str]) -> set[str]:
    """The modules that are named above or lie below one that is."""
    names = (*HEAVY, *FOR_BUILDS)
    return {module for module in modules if module in names or module.startswith(tuple(f"{name}." for name in names))}
