"""What tells one module from another when neither was built from an archive: classes, attributes, hooks and sources.

The facts do not depend on the folder that the module was made from, nor on the process. Libraries write the folder into
their modules (transformers and diffusers as ``_name_or_path``), and TorchServe unpacks an archive into another one at
each start.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ts_handlers.errors import BuildError
from ts_handlers.key import fingerprint

_FOLDER = "<model folder>"


class ModuleFacts(NamedTuple):
    """What identifies a module.

    Attributes
    ----------
    lines:
        Equal for modules that compute the same with the same weights.
    left_out:
        Attributes, as ``Class.name``, that are no part of the lines because they differ between processes.
    """

    lines: list[str]
    left_out: tuple[str, ...]


def module_facts(module: torch.nn.Module, folder: str | Path | None = None) -> ModuleFacts:
    """The facts of a module.

    Parameters
    ----------
    folder:
        Where the files lie that the module was made from, if that is known.

    Raises
    ------
    BuildError
        The module holds something that cannot be compared between processes.
    """
    canonical = _Canonical(folder)
    files: dict[str, str] = {}
    facts = []
    packages: set[str] = set()
    for name, child in module.named_modules():
        kind = type(child)
        where = canonical.module_name(kind.__module__)
        facts.append(f"{name}:{where}.{kind.__qualname__}:{_attributes(child, canonical)}")
        package = kind.__module__.partition(".")[0]
        if package == "torch":
            continue
        file = inspect.getsourcefile(kind) if kind.__module__ != "__main__" else None
        if file is not None and fingerprint.distribution_version(package) is not None:
            packages.add(package)
        elif file is not None and file not in files:
            files[file] = fingerprint.digest_file(file)
        elif file is None:
            try:
                facts.append(fingerprint.digest_text(inspect.getsource(kind)))
            except (OSError, TypeError):
                raise BuildError(
                    f"the source of {kind.__qualname__} is not available, so its artifact cannot be told from another "
                    "class's; define it in a file"
                ) from None
    facts.extend(sorted(files.values()))
    facts.append(fingerprint.libraries(packages))
    facts.append(fingerprint.tensor_specification(dict(module.state_dict())))
    return ModuleFacts(facts, tuple(sorted(canonical.left_out)))


_INTERNAL = frozenset(torch.nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _attributes(module: torch.nn.Module, canonical: _Canonical) -> str:
    values = {key: value for key, value in vars(module).items() if key not in _INTERNAL}
    buffers = {key: value for key, value in module._buffers.items() if key in module._non_persistent_buffers_set}
    # Hooks change what a call computes; the handles' numbers by which they are stored differ between processes.
    hooks = [[name, *vars(module)[name].values()] for name in _HOOKS if vars(module).get(name)]
    try:
        return canonical.attributes(module, values) + canonical.text(buffers) + canonical.text(hooks)
    except RecursionError:
        raise BuildError(
            f"an attribute of {type(module).__qualname__} refers back to itself, so it cannot be compared between "
            "processes; build the model from an archive's model file instead"
        ) from None


class _Canonical:
    """Texts that are equal for equal values, and hold neither memory addresses nor the model's folder.

    Parameters
    ----------
    folder:
        The model's folder, None when there is none.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.left_out: set[str] = set()
        self._path: re.Pattern[str] | None = None
        self._name: str | None = None
        if folder is None or os.path.realpath(folder) == os.sep:
            return
        paths = {os.path.abspath(folder), os.path.realpath(folder)}
        one_of = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
        self._path = re.compile(rf"(?<![\w.-])(?:{one_of})(?![\w.-])")
        self._name = os.path.basename(os.path.abspath(folder))

    def module_name(self, name: str) -> str:
        """The name of a Python module; transformers makes one from the folder of a model that brings its own code."""
        if self._name is None or not name.startswith("transformers_modules."):
            return name
        return ".".join(_FOLDER if part.lstrip("_") == self._name else part for part in name.split("."))

    def attributes(self, owner: Any, values: dict[str, Any]) -> str:
        """Attributes by name, without those that differ between processes."""
        kept = {}
        for name, value in values.items():
            if _is_of_the_process(name, value):
                self.left_out.add(f"{type(owner).__qualname__}.{name}")
            else:
                kept[name] = value
        return self.text(kept)

    def text(self, value: Any) -> str:
        """The text of a value of any kind."""
        if value is None or isinstance(value, (bool, int, float, torch.dtype, torch.device, torch.Size)):
            return repr(value)
        if isinstance(value, (str, bytes)):
            return self._without_folder(repr(value))
        if isinstance(value, torch.Tensor):
            return fingerprint.digest_tensors({"": value})
        if isinstance(value, dict):
            return "{" + ",".join(sorted(f"{self.text(k)}:{self.text(v)}" for k, v in value.items())) + "}"
        if isinstance(value, (list, tuple)):
            return type(value).__name__ + "(" + ",".join(map(self.text, value)) + ")"
        if isinstance(value, (set, frozenset)):
            return "set(" + ",".join(sorted(map(self.text, value))) + ")"
        if isinstance(value, torch.nn.Module):
            return type(value).__qualname__
        if inspect.isroutine(value) or inspect.isclass(value):
            return self._routine(value)
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):  # its repr leaves out the middle
            digest = hashlib.sha256(value.tobytes()).hexdigest()
            return f"{type(value).__name__}:{value.dtype.str}:{value.shape}:{digest}"
        if isinstance(value, functools.partial):
            return f"partial({self.text(value.func)},{self.text(value.args)},{self.text(value.keywords)})"
        attributes = getattr(value, "__dict__", None)
        if attributes is not None:
            kept = {key: item for key, item in attributes.items() if not key.startswith("__")}
            return (
                f"{self.module_name(type(value).__module__)}.{type(value).__qualname__}{self.attributes(value, kept)}"
            )
        text = repr(value)
        if " at 0x" in text:
            raise BuildError(
                f"the model holds a {type(value).__qualname__}, which cannot be compared between processes; "
                "build the model from an archive's model file instead"
            )
        return self._without_folder(text)

    def _without_folder(self, text: str) -> str:
        return text if self._path is None else self._path.sub(_FOLDER, text)

    def _routine(self, value: Any) -> str:
        module = self.module_name(str(getattr(value, "__module__", "")))
        name = f"{module}.{getattr(value, '__qualname__', value)}"
        code = getattr(value, "__code__", None)
        if code is None:
            return name
        closure = [cell.cell_contents for cell in (getattr(value, "__closure__", None) or ())]
        defaults = [getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None)]
        return name + fingerprint.digest_text("|".join([self._code(code), self.text(defaults), self.text(closure)]))

    def _code(self, code: Any) -> str:
        """Bytecode, names and constants, those of nested functions and comprehensions included."""
        constants = [self._code(item) if inspect.iscode(item) else self.text(item) for item in code.co_consts]
        return "|".join([code.co_code.hex(), self.text(list(code.co_names)), *constants])


def _is_of_the_process(name: str, value: Any) -> bool:
    """Whether an attribute holds what `hash` said of something: it differs between processes and computes nothing.

    transformers keeps one in ``generation_config._original_object_hash``, to see whether somebody changed it. Numbers
    that shape a model (``_hash_size``) have other names and are smaller.
    """
    return name.startswith("_") and name.endswith("_hash") and type(value) is int and abs(value) >= 1 << 32
