"""The TensorRT Python API in either flavour, found and imported without Torch-TensorRT.

``tensorrt`` (libnvinfer) and ``tensorrt_rtx`` (TensorRT for RTX) have the same Python API, so one backend serves both.
A stored plan needs this module only; Torch-TensorRT, whose import takes seconds, is needed to build one.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ts_handlers.errors import BuildError, LoadError
from ts_handlers.key.fingerprint import distribution_version
from ts_handlers.system.patching import hidden_modules


@dataclasses.dataclass(frozen=True)
class Flavour:
    """How a flavour is packaged.

    Attributes
    ----------
    modules:
        The modules that can provide its Python API, best first: the meta package, then the bindings that it re-exports.
    library_package, library_pattern:
        The package in whose folder its shared libraries lie, and their file names.
    distributions:
        What it may be installed as.
    converter:
        The distribution of Torch-TensorRT that builds its plans.
    extra:
        What installs all of it.
    """

    modules: tuple[str, str]
    library_package: str
    library_pattern: str
    distributions: tuple[str, ...]
    converter: str
    extra: str


FLAVOURS = {
    "tensorrt": Flavour(
        modules=("tensorrt", "tensorrt_bindings"),
        library_package="tensorrt_libs",
        library_pattern="libnvinfer.so.*",
        distributions=("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
        converter="torch-tensorrt",
        extra="ts-handlers[tensorrt]",
    ),
    "tensorrt_rtx": Flavour(
        modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
        library_package="tensorrt_rtx_libs",
        library_pattern="libtensorrt_rtx.so.*",
        distributions=("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
        converter="torch-tensorrt-rtx",
        extra="ts-handlers[tensorrt-rtx]",
    ),
}
"""By the names that the setting `tensorrt.flavour` and descriptions use."""

logger = logging.getLogger("ts_handlers.tensorrt")


def installed_flavours() -> tuple[str, ...]:
    """The flavours whose Python packages are installed; imports nothing."""
    return tuple(flavour for flavour in FLAVOURS if _module_name(flavour) is not None)


def choose_flavour(wanted: str) -> str:
    """The flavour to use for the setting `tensorrt.flavour`.

    Raises
    ------
    LoadError
        The flavour, or with ``auto`` any, is not installed.
    """
    installed = installed_flavours()
    if wanted == "auto" and installed:
        return builder_flavour() if builder_flavour() in installed else installed[0]
    if wanted in installed:
        return wanted
    needed = " or ".join(each.extra for name, each in FLAVOURS.items() if wanted in ("auto", name))
    found = ", ".join(installed) or "none"
    raise LoadError(f"the TensorRT flavour {wanted!r} is not installed (found: {found}); install {needed}")


@functools.cache
def import_tensorrt(flavour: str) -> Any:
    """The module of a flavour (``Runtime``, ``Builder``, ``ICudaEngine``...), its library opened first.

    The library lies in a Python package that the loader does not search, so it is opened here, without
    ``LD_LIBRARY_PATH``.

    Raises
    ------
    LoadError
        It is not installed, or cannot be imported; the message says why.
    """
    name = _module_name(flavour)
    if name is None:
        raise LoadError(f"the TensorRT flavour {flavour!r} is not installed")
    try:
        for library in _libraries(flavour):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module(name)
    except Exception as error:  # broken installations raise anything
        raise LoadError(f"TensorRT ({name}) cannot be imported: {type(error).__name__}: {error}") from error


def builder_flavour() -> str:
    """The flavour for which the installed Torch-TensorRT builds plans."""
    return "tensorrt_rtx" if distribution_version(FLAVOURS["tensorrt_rtx"].converter) else "tensorrt"


def builder_flavour_for(wanted: str) -> str:
    """The flavour for the setting `tensorrt.flavour`, where Torch-TensorRT has to build.

    Raises
    ------
    LoadError
        It is not installed.
    BuildError
        The installed Torch-TensorRT builds for the other flavour.
    """
    flavour, builds = choose_flavour(wanted), builder_flavour()
    if flavour != builds:
        raise BuildError(
            f"the installed Torch-TensorRT builds plans for {builds}, not for {flavour}; "
            f"install the other one ({FLAVOURS[flavour].converter}), or change tensorrt.flavour"
        )
    return flavour


@contextlib.contextmanager
def ready_for_torch_tensorrt() -> Iterator[None]:
    """Open the library that Torch-TensorRT needs, and hide the flavour's plugins while it is imported.

    Torch-TensorRT looks for ``tensorrt.plugin`` and dies when that cannot be imported, as in TensorRT for RTX 1.4. A
    library that cannot be opened is left to Torch-TensorRT's own message.
    """
    with contextlib.suppress(LoadError):
        import_tensorrt(builder_flavour())
    with hidden_modules("tensorrt.plugin"):
        yield


def version(flavour: str) -> str:
    """The flavour's version, for example ``tensorrt_rtx-1.4.0.76``."""
    return f"{flavour}-{import_tensorrt(flavour).__version__}"


def _module_name(flavour: str) -> str | None:
    for name in FLAVOURS[flavour].modules:
        if name in sys.modules:
            # Torch-TensorRT puts a substitute for its own flavour there, under the name "tensorrt".
            module: Any = sys.modules[name]
            if module is not None and getattr(module, "_package_name", name) in (name, ""):
                return name
            continue
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:  # a mere folder of that name is no package
            return name
    return None


def _libraries(flavour: str) -> list[Path]:
    spec = importlib.util.find_spec(FLAVOURS[flavour].library_package)
    if spec is None:
        return []  # installed by the system, where the loader finds it
    pattern = FLAVOURS[flavour].library_pattern
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return [path for folder in folders for path in sorted(folder.glob(pattern))]


@functools.cache
def trt_logger(flavour: str) -> Any:
    """A TensorRT logger that writes to Python's ``ts_handlers.tensorrt``; one for each flavour and process."""
    trt = import_tensorrt(flavour)
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            logger.log(levels[level], message)

    return Logger()
