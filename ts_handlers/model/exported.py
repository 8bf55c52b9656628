"""An exported program as the source of a model: its file, its operators, and how it is called."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ts_handlers.errors import BuildError, ModelError
from ts_handlers.model.archive_files import Tensors
from ts_handlers.model.base import BaseSource
from ts_handlers.model.exported_program import exported_input_names
from ts_handlers.settings import Settings


class ExportedSource(BaseSource):
    """An exported program (``torch.export.save``, ``.pt2``). Weights are part of the artifact."""

    def __init__(self, name: str, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__({"kind": "exported", "name": name, "path": os.path.abspath(path)}, self.path)
        self.name = name
        self.weights_by_name = False
        if not self.path.is_file():
            raise ModelError(f"the archive has no exported program {self.path.name!r}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise ModelError(f"{self.path.name} is not an exported program: {error}") from error
        if any("/aotinductor/" in name for name in names):
            raise ModelError(
                f"{self.path.name} is a compiled AOTInductor package, which fits one machine only and does not check "
                "its inputs; archive the exported program (torch.export.save) instead"
            )

    def digest(self) -> str:
        """Digest of the whole file."""
        return self._hash_file()

    def weights(self) -> Tensors:
        """Nothing: the artifact holds the weights."""
        return {}

    def weights_digest(self) -> str:
        """Digest of the whole file."""
        return self._hash_file()

    @functools.cached_property
    def program(self) -> Any:
        """The loaded `torch.export.ExportedProgram`."""
        try:
            _register_operators(self.path)
            return torch.export.load(self.path)
        except Exception as error:
            raise ModelError(
                f"{self.path.name} cannot be loaded as an exported program: {type(error).__name__}: {error}; "
                "export it again with this torch version"
            ) from error

    def check_settings(self, settings: Settings) -> None:
        """Compare dtype, inputs and dimensions with the program's; inputs that cannot be described are left to it."""
        from ts_handlers.model.exported_declaration import compare_dtype, compare_inputs
        from ts_handlers.model.exported_program import program_inputs
        from ts_handlers.model.signature import Signature

        compare_dtype(self.program, settings.dtype)
        if settings.inputs:
            with contextlib.suppress(BuildError):
                compare_inputs(*program_inputs(self.program), Signature(settings.inputs, settings.dimensions))

    def _build(self) -> torch.nn.Module:
        return _ExportedModule(self.program)


# torch knows the operators of a quantised program once the module that defines them is imported.
_OPERATORS = {
    b"torch.ops.quantized_decomposed.": "torch.ao.quantization.fx._decomposed",
    b"torch.ops.tensorrt.": "modelopt.torch.quantization",
}


def _register_operators(path: Path) -> None:
    """Import what defines the operators of an exported program, where it is installed."""
    with zipfile.ZipFile(path) as archive:
        graphs = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    for prefix, module in _OPERATORS.items():
        if any(prefix in graph for graph in graphs) and importlib.util.find_spec(module.partition(".")[0]):
            importlib.import_module(module)


class _ExportedModule(torch.nn.Module):
    """An exported program that is called with its inputs in order or by name.

    The program itself insists on the very split into positions and keywords with which it was exported.
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.module = program.module()
        self._names, self._keywords = exported_input_names(program)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if len(args) > len(self._names) or set(values) != set(self._names):
            return self.module(*args, **kwargs)
        by_position = [values[name] for name in self._names if name not in self._keywords]
        return self.module(*by_position, **{name: values[name] for name in self._keywords})

    def train(self, mode: bool = True) -> _ExportedModule:
        """Does nothing: exported modules have no modes and refuse to change them."""
        return self
