"""A backend for tests of the store and of processes: fast, and it counts its builds.

Registered with `use_file_backend`. Its artifact holds nothing of a linear model but its names, so that weights come
from the archive. Environment variables steer it in a child process:

- ``BUILD_LOG``: a file that gets one line for each build begun and each one finished
- ``BUILD_SECONDS``: how long a build sleeps
- ``BUILD_UNTIL``: a file that a build waits for
- ``BUILD_ERROR``: why a build fails
- ``KILL_AT``: the process sends itself SIGKILL at this phase (see `PHASES`)
- ``CRASH_AT``: a segmentation fault in ``build`` or ``load``, as soon as ``CRASHES`` processes (1) have come so far
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ts_handlers import register_backend
from ts_handlers.backends.base import Backend, Built, Description, Target, Workspace
from ts_handlers.errors import BuildError, LoadError
from ts_handlers.execution.base import Loaded
from ts_handlers.settings import Settings
from ts_handlers.store.local import store as local

PHASES = ("before staging", "during build", "after files", "before rename", "after rename")


class FileBackend:
    """Takes the place of ``aot_inductor``; the next loads raise `load_errors`, one each."""

    name = "aot_inductor"
    persistent = True
    needs_eager_module = False

    def __init__(self) -> None:
        self.load_errors: list[Exception] = []

    def bakes_weights(self, target: Target) -> bool:
        return False

    def options(self, target: Target) -> dict[str, str]:
        return {"threads": str(torch.get_num_threads())}

    def toolchain(self, target: Target) -> str:
        return "test"

    def build(self, target: Target, workspace: Workspace) -> Built:
        log_line("begin")
        with workspace.phase("compile"):
            directory = workspace.directory
            (directory / "part").mkdir()
            (directory / "part" / "first.json").write_text(json.dumps({"weight": "layer.weight"}))
            kill_at("during build")
            crash_at("build")
            time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
            while "BUILD_UNTIL" in os.environ and not os.path.exists(os.environ["BUILD_UNTIL"]):
                time.sleep(0.02)
            if "BUILD_ERROR" in os.environ:
                raise BuildError(os.environ["BUILD_ERROR"])
            (directory / "second.json").write_text(json.dumps({"bias": "layer.bias"}))
        log_line("end")
        kill_at("after files")
        return Built({"kind": "linear"})

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        if description != {"kind": "linear"}:
            raise LoadError("not an artifact of the test backend")
        crash_at("load")
        if self.load_errors:
            raise self.load_errors.pop(0)
        weights = {name.removeprefix("inner."): weight for name, weight in target.source.weights().items()}
        names = json.loads((directory / "part" / "first.json").read_text())
        names |= json.loads((directory / "second.json").read_text())
        weight, bias = weights[names["weight"]], weights[names["bias"]]
        return Loaded(lambda tensors: tensors[0] @ weight.t() + bias, target.require_signature())

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        return None


BACKEND = FileBackend()


def log_line(text: str) -> None:
    """Append one line to the log of builds; short appends are atomic."""
    if "BUILD_LOG" in os.environ:
        with open(os.environ["BUILD_LOG"], "a") as log:
            log.write(f"{text} {os.getpid()}\n")


def kill_at(phase: str) -> None:
    """Die here, as from the kernel's out-of-memory killer, when ``KILL_AT`` says so."""
    assert phase in PHASES
    if os.environ.get("KILL_AT") == phase:
        os.kill(os.getpid(), signal.SIGKILL)


def crash_at(step: str) -> None:
    """A segmentation fault, when ``CRASH_AT`` says so."""
    if os.environ.get("CRASH_AT") == step:
        log_line("crash")
        while Path(os.environ["BUILD_LOG"]).read_text().count("crash") < int(os.environ.get("CRASHES", "1")):
            time.sleep(0.01)
        ctypes.string_at(0)


def use_file_backend() -> None:
    """Make ``aot_inductor`` this backend, in this process, and arm the phases inside the store."""
    register_backend("aot_inductor", f"{__name__}:BACKEND")
    staging, rename = local.LocalStore.staging, os.rename

    @contextlib.contextmanager
    def armed_staging(store: Any, address: Any) -> Iterator[Path]:
        kill_at("before staging")
        with staging(store, address) as directory:
            yield directory

    def armed_rename(source: Any, target: Any) -> None:
        published = "entries" in Path(target).parts
        if published:
            kill_at("before rename")
        rename(source, target)
        if published:
            kill_at("after rename")

    local.LocalStore.staging = armed_staging  # type: ignore[method-assign,assignment]
    local.os.rename = armed_rename  # type: ignore[assignment]


START = """
    import json, logging, sys
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    import torch
    from tests.support.file_backend import use_file_backend
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model
    use_file_backend()
    archive, store = sys.argv[1:3]
    settings = settings_of(store=store, backends=["aot_inductor", "eager"], **json.loads((sys.argv[3:] or ["{}"])[0]))
    model = start_model(archive_source(archive), settings)
    if settings.remote is not None:
        model.store.write_back.wait()
    print(json.dumps({**model.describe(), "answer": model(torch.ones(2, 4)).tolist()}))
"""
"""A process that starts the archive's model on a store and prints what `describe` says, and an answer."""
