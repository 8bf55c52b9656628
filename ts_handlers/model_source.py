"""Where a model comes from: its identity, its weights by name and, only when needed, the eager module.

A warm start asks a source for `digest`, `weights` and `weights_digest` and never for `eager`: the archive's Python
files and the libraries behind them are then not imported at all.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ts_handlers import fingerprint
from ts_handlers.archive_files import Tensors, imported_modules, load_model_class, read_weights
from ts_handlers.digests import DigestFile, FileDigest
from ts_handlers.errors import ModelError
from ts_handlers.initialization import skip_random_initialization
from ts_handlers.module_identity import module_facts
from ts_handlers.settings import Settings

Recipe = Mapping[str, Any]
"""How another process makes the same source: JSON-compatible, read by `ts_handlers.recipes.make_source`."""

# Archive files that shape requests and answers, not the model.
IGNORED_FILES = (
    "MAR-INF/*",
    "model-config.yaml",
    "index_to_name.json",
    "requirements.txt",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "*.md",
    "LICENSE*",
    "*.pyc",
    "*.log",
    "core.[0-9]*",
    "__pycache__/*",
    "*/__pycache__/*",
)


def files_of_model(directory: Path, ignored: Sequence[str]) -> list[Path]:
    """The files below a folder, sorted, but for those whose path in it matches one of the patterns."""
    files = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if path.is_file() and not any(fnmatch.fnmatch(relative, pattern) for pattern in ignored):
            files.append(path)
    return files


class ModelSource(Protocol):
    """What the rest of the package needs to know of a model.

    `name` is the model's name in the store's paths. `weights_by_name` says that `weights` holds the parameters under
    the names of the eager module's state_dict, so that an artifact can take them without building the module.
    """

    name: str
    weights_by_name: bool

    def begin_digest(self, digest_file: DigestFile) -> None:
        """Digest the file of the weights on a thread; does nothing when that has begun or there is no file.

        `start_model` calls it with what remembers digests between starts. Without a call the file is hashed when a
        digest is asked for.
        """

    def digest(self) -> str:
        """Digest of the model's source and tensor specification, not of the weights' values."""

    def weights(self) -> Tensors:
        """Weights by name, on the CPU; empty when they are part of the artifact."""

    def weights_digest(self) -> str:
        """Digest of the weights' values."""

    def check_settings(self, settings: Settings) -> None:
        """Raise `SettingsError` where the settings contradict what the model says of itself.

        Loads the model where need be, so a warm start does not call it: the settings are in the key.
        """

    def prepare(self) -> None:
        """Import what `eager` needs; does nothing where that is not known.

        An exception that an import keeps also keeps its callers' frames with all that they hold, until the cycle
        collector runs. A caller that wants the module to be freed at once with `release` calls this first.
        """

    def eager(self) -> torch.nn.Module:
        """The eager module on the CPU in eval mode, built at the first call. Raises `ModelError`."""

    def release(self) -> None:
        """Forget the eager module."""

    def recipe(self) -> Recipe | None:
        """How another process makes this source; None when it cannot."""


class BaseSource:
    """What all sources have: a recipe, an eager module that is built at most once, and perhaps a file of weights."""

    def __init__(self, recipe: Recipe | None, file: Path | None = None) -> None:
        self._recipe = recipe
        self._file_digest = None if file is None else FileDigest(file)
        self._eager: torch.nn.Module | None = None
        self._lock = threading.Lock()

    def recipe(self) -> Recipe | None:
        """How another process makes this source; None when it cannot."""
        return self._recipe

    def check_settings(self, settings: Settings) -> None:
        """Does nothing: a module does not say what it takes."""

    def prepare(self) -> None:
        """Does nothing: how the module is built is not known here."""

    def eager(self) -> torch.nn.Module:
        """The eager module on the CPU in eval mode; raises `ModelError` when it cannot be built."""
        with self._lock:
            if self._eager is None:
                self._eager = self._build().eval()
            return self._eager

    def release(self) -> None:
        """Forget the eager module."""
        self._eager = None

    def begin_digest(self, digest_file: DigestFile) -> None:
        """Digest the file of the weights on a thread; does nothing when that has begun or there is no file."""
        if self._file_digest is not None:
            self._file_digest.begin(digest_file)

    def _hash_file(self) -> str:
        return "none" if self._file_digest is None else self._file_digest.result()

    def _build(self) -> torch.nn.Module:
        raise NotImplementedError


class ArchiveSource(BaseSource):
    """An archive with a model file (one `nn.Module` class without constructor arguments) and a state dict.

    Parameters
    ----------
    name:
        The model's name.
    directory:
        The unpacked archive.
    model_file, weights_file:
        Names inside `directory`; `weights_file` (``.pt``, ``.pth`` or ``.safetensors``) may be None for a model
        without weights.
    build:
        Builds the eager module with its weights loaded, when the handler brings its own way; None builds the class
        found in `model_file`.
    extra_source:
        Further source files that shape the model, such as a handler file that brings `build`.
    ignored_files:
        Glob patterns of further files that do not shape the model.
    mmap:
        Map the weights file (its pages are then shared between workers) instead of reading it.
    recipe:
        How another process makes this source; needed only when `build` is given, which no other process can call.
    """

    def __init__(
        self,
        name: str,
        directory: str | Path,
        model_file: str,
        weights_file: str | None,
        *,
        build: Callable[[], torch.nn.Module] | None = None,
        extra_source: Sequence[str] = (),
        ignored_files: Sequence[str] = (),
        mmap: bool = True,
        recipe: Recipe | None = None,
    ) -> None:
        if build is None:
            files = {"directory": os.path.abspath(directory), "model_file": model_file, "weights_file": weights_file}
            globs = {"extra_source": list(extra_source), "ignored_files": list(ignored_files)}
            recipe = {"kind": "archive", "name": name, **files, **globs, "mmap": mmap}
        self._directory = Path(directory)
        self._model_path = self._directory / model_file
        self._weights_path = None if weights_file is None else self._directory / weights_file
        super().__init__(recipe, self._weights_path)
        self.name = name
        self.weights_by_name = True
        self._build_hook = build
        self._extra_source = tuple(extra_source)
        self._ignored = (*IGNORED_FILES, *ignored_files)
        self._mmap = mmap
        self._model_class: type[torch.nn.Module] | None = None
        self._weights: Tensors | None = None
        if self._weights_path is not None and not self._weights_path.is_file():
            raise ModelError(
                f"the archive has no weights file {weights_file!r}; expected it beside {model_file!r}: "
                "name it with --serialized-file when the archive is built"
            )
        if not self._model_path.is_file():
            raise ModelError(
                f"the archive has no model file {model_file!r}; name it with --model-file when the archive is built"
            )

    def digest(self) -> str:
        """Digest over the archive's model-shaping files, the imported libraries' versions and the tensor names."""
        facts = []
        modules: set[str] = set()
        for path in self._source_files():
            relative = path.relative_to(self._directory).as_posix()
            facts.append(f"{relative}={fingerprint.digest_file(path)}")
            if path.suffix == ".py":
                modules |= imported_modules(path)
        facts.append(fingerprint.libraries(modules, search=self._directory))
        facts.append(fingerprint.tensor_specification(self.weights()))
        return fingerprint.digest_text("\n".join(facts))

    def _source_files(self) -> list[Path]:
        return [path for path in files_of_model(self._directory, self._ignored) if path != self._weights_path]

    def weights(self) -> Tensors:
        """The state dict's tensors by name, on the CPU."""
        if self._weights is None:
            self._weights = {} if self._weights_path is None else read_weights(self._weights_path, mmap=self._mmap)
        return self._weights

    def weights_digest(self) -> str:
        """SHA-256 of the weights file."""
        return self._hash_file()

    def prepare(self) -> None:
        """Import the model file; the next `eager` takes its class."""
        if self._build_hook is None:
            self._model_class = load_model_class(self._model_path)

    def _build(self) -> torch.nn.Module:
        if self._build_hook is not None:
            return self._build_hook()
        model_class, self._model_class = self._model_class or load_model_class(self._model_path), None
        if self._weights_path is not None:
            # A constructor may also fail because its weights were not drawn; it is then run in the ordinary way.
            size = sum(tensor.nbytes for tensor in self.weights().values())
            with _build_lock, contextlib.suppress(ModelError), skip_random_initialization(size) as skipped:
                module = _construct(model_class, self._model_path)
                self._load_state(module)
                if skipped.was_sound(module):
                    return module
        module = _construct(model_class, self._model_path)
        self._load_state(module)
        return module

    def _load_state(self, module: torch.nn.Module) -> None:
        if self._weights_path is None:
            return
        try:
            module.load_state_dict(self.weights())
        except RuntimeError as error:
            raise ModelError(
                f"the weights in {self._weights_path.name} do not fit the class in {self._model_path.name}: {error}; "
                "archive a state_dict saved from this class"
            ) from error


_build_lock = threading.Lock()


def _construct(model_class: type[torch.nn.Module], path: Path) -> torch.nn.Module:
    try:
        return model_class()
    except Exception as error:
        raise ModelError(
            f"{path.name}: {model_class.__name__}() raised {type(error).__name__}: {error}; "
            "the class must be constructible without arguments"
        ) from error


class ModuleSource(BaseSource):
    """A module that already exists in this process.

    Its identity is taken from the source files of every submodule's class, from each submodule's attributes that are
    not tensors, and from the tensor specification, since the arguments of its constructor are not known any more.
    A module that cannot be told from another one (`digest` then raises `BuildError`) is served eagerly.
    `recipe` tells another process how to make this source, when the caller knows.
    """

    def __init__(self, name: str, module: torch.nn.Module, *, recipe: Recipe | None = None) -> None:
        super().__init__(recipe)
        self.name = name
        self.weights_by_name = True
        self._module = module

    def digest(self) -> str:
        """Digest over classes, attributes, libraries and tensor names."""
        return fingerprint.digest_text("\n".join(module_facts(self._module)))

    def weights(self) -> Tensors:
        """The module's own state dict."""
        return {name: tensor.detach() for name, tensor in self._module.state_dict().items()}

    @functools.cached_property
    def _weights_digest(self) -> str:
        return fingerprint.digest_tensors(self.weights())

    def weights_digest(self) -> str:
        """Digest of the state dict's bytes."""
        return self._weights_digest

    def _build(self) -> torch.nn.Module:
        return self._module
