"""An archive as the source of a model: a Python file with one module class, beside a file with its weights."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ts_handlers.errors import ModelError
from ts_handlers.key import fingerprint
from ts_handlers.model.archive_files import Tensors, imported_modules, load_model_class, read_weights
from ts_handlers.model.base import BaseSource, Recipe
from ts_handlers.model.initialization import skip_random_initialization

logger = logging.getLogger(__name__)

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
        super().__init__(recipe, self._weights_path, self._directory)
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
        for path in self._source_files():
            relative = path.relative_to(self._directory).as_posix()
            facts.append(f"{relative}={fingerprint.digest_file(path)}")
        facts.append(fingerprint.libraries(self._imports(), search=self._directory))
        facts.append(fingerprint.tensor_specification(self.weights()))
        return fingerprint.digest_text("\n".join(facts))

    def _source_files(self) -> list[Path]:
        return [path for path in files_of_model(self._directory, self._ignored) if path != self._weights_path]

    def _python_files(self) -> list[Path]:
        return [path for path in self._source_files() if path.suffix == ".py"]

    def _imports(self) -> set[str]:
        """Top-level modules that the digest names."""
        return {name for path in self._python_files() for name in imported_modules(path)}

    def _recorded(self) -> contextlib.AbstractContextManager[None]:
        from ts_handlers.model.recording import recording  # which a warm start does not need

        return recording(self.surroundings, self._is_keyed, lambda: map(str, self._python_files()), self._imports)

    def _is_keyed(self, relative: str) -> bool:
        weights = self._weights_path is not None and self._directory / relative == self._weights_path
        return weights or not any(fnmatch.fnmatch(relative, pattern) for pattern in self._ignored)

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
            with self._recorded():
                self._model_class = load_model_class(self._model_path)

    def _build(self) -> torch.nn.Module:
        if self._build_hook is not None:
            return self._build_hook()
        model_class, self._model_class = self._model_class or load_model_class(self._model_path), None
        if self._weights_path is not None:
            # A constructor may also fail because its weights were not drawn; it is then run in the ordinary way.
            size = sum(part.nbytes for tensor in self.weights().values() for part in fingerprint.dense_parts(tensor))
            with _build_lock, contextlib.suppress(Exception), skip_random_initialization(size) as skipped:
                module = _construct(model_class, self._model_path)
                self._load_state(module)
                if skipped.was_sound(module):
                    return module
        generator = torch.get_rng_state()
        module = _construct(model_class, self._model_path)
        if self._weights_path is None and module.state_dict() and not torch.equal(generator, torch.get_rng_state()):
            self._say_that_weights_are_random()
        self._load_state(module)
        return module

    def _say_that_weights_are_random(self) -> None:
        note = (
            f"the archive has no weights and the class in {self._model_path.name} draws random numbers, so its answers "
            "may be random, and others in each worker; name its state dict with --serialized-file when the archive is "
            "built"
        )
        if note not in self.notes:
            self.notes.append(note)
            logger.warning("%s: %s", self.name, note)

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
