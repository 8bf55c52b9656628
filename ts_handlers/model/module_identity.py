"""What tells one module from another when neither was built from an archive: classes, attributes, hooks and sources."""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any

import torch

from ts_handlers.errors import BuildError
from ts_handlers.key import fingerprint


def module_facts(module: torch.nn.Module) -> list[str]:
    """Lines that are equal for modules that compute the same with the same weights.

    Raises
    ------
    BuildError
        The module holds something that cannot be compared between processes.
    """
    files: dict[str, str] = {}
    facts = []
    packages: set[str] = set()
    for name, child in module.named_modules():
        kind = type(child)
        facts.append(f"{name}:{kind.__module__}.{kind.__qualname__}:{_attributes(child)}")
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
    return facts


_INTERNAL = frozenset(torch.nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _attributes(module: torch.nn.Module) -> str:
    values = {key: value for key, value in vars(module).items() if key not in _INTERNAL}
    buffers = {key: value for key, value in module._buffers.items() if key in module._non_persistent_buffers_set}
    # Hooks change what a call computes; the handles' numbers by which they are stored differ between processes.
    hooks = [[name, *vars(module)[name].values()] for name in _HOOKS if vars(module).get(name)]
    try:
        return _canonical(values) + _canonical(buffers) + _canonical(hooks)
    except RecursionError:
        raise BuildError(
            f"an attribute of {type(module).__qualname__} refers back to itself, so it cannot be compared between "
            "processes; build the model from an archive's model file instead"
        ) from None


def _canonical(value: Any) -> str:
    """A text that is equal for equal values and does not hold memory addresses."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return fingerprint.digest_tensors({"": value})
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{_canonical(k)}:{_canonical(v)}" for k, v in value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return type(value).__name__ + "(" + ",".join(map(_canonical, value)) + ")"
    if isinstance(value, (set, frozenset)):
        return "set(" + ",".join(sorted(map(_canonical, value))) + ")"
    if isinstance(value, torch.nn.Module):
        return type(value).__qualname__
    if inspect.isroutine(value) or inspect.isclass(value):
        return _canonical_routine(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):  # its repr leaves out the middle
        return f"{type(value).__name__}:{value.dtype.str}:{value.shape}:{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, functools.partial):
        return f"partial({_canonical(value.func)},{_canonical(value.args)},{_canonical(value.keywords)})"
    attributes = getattr(value, "__dict__", None)
    if attributes is not None:
        kept = {key: item for key, item in attributes.items() if not key.startswith("__")}
        return f"{type(value).__module__}.{type(value).__qualname__}{_canonical(kept)}"
    text = repr(value)
    if " at 0x" in text:
        raise BuildError(
            f"the model holds a {type(value).__qualname__}, which cannot be compared between processes; "
            "build the model from an archive's model file instead"
        )
    return text


def _canonical_routine(value: Any) -> str:
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
    code = getattr(value, "__code__", None)
    if code is None:
        return name
    closure = [cell.cell_contents for cell in (getattr(value, "__closure__", None) or ())]
    defaults = [getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None)]
    return name + fingerprint.digest_text("|".join([_canonical_code(code), _canonical(defaults), _canonical(closure)]))


def _canonical_code(code: Any) -> str:
    """Bytecode, names and constants, those of nested functions and comprehensions included."""
    constants = [_canonical_code(item) if inspect.iscode(item) else _canonical(item) for item in code.co_consts]
    return "|".join([code.co_code.hex(), _canonical(list(code.co_names)), *constants])
