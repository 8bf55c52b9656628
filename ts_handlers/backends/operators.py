"""Operators that an artifact calls and torch does not have by itself: which they are, and what registers them.

An operator of another library exists in a process once something has registered it: the import of that library, or of
the model's own file. A warm start imports neither, so an artifact that calls such operators says what to import. What
is said was tried, in a process that had imported nothing else.

Description of an artifact: ``"operators": {"module": NAME}`` for a module that is imported by its name, or
``{"module": null}`` for the model's own file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Description, Target
from ts_handlers.errors import BuildError, MissingDependencyError, one_line
from ts_handlers.model.base import Recipe

_REGISTRARS = {"quantized_decomposed": "torch.ao.quantization.fx._decomposed"}
"""Modules that register a namespace and do not have its name."""


def called_operators(libraries: Iterable[Path]) -> list[str]:
    """The operators that AOTInductor libraries call by name, which are listed beside each library."""
    names: set[str] = set()
    for library in libraries:
        path = library.with_suffix(".json")
        if path.exists():
            nodes = json.loads(path.read_text("utf-8")).get("nodes", [])
            names.update(str(node["node"]["target"]).removeprefix("torch.ops.") for node in nodes)
    return sorted(names)


def missing_operators(names: Iterable[str]) -> list[str]:
    """Those that nothing has registered in this process."""
    return [name for name in names if not _exists(name)]


def _exists(name: str) -> bool:
    namespace, _, rest = name.replace("::", ".", 1).partition(".")
    operator, _, _overload = rest.partition(".")
    return hasattr(getattr(torch.ops, namespace), operator)


def find_registrar(target: Target, names: list[str]) -> Description | None:
    """What a start imports so that these operators exist; None where torch has them.

    Raises
    ------
    BuildError
        That cannot be known; names an operator.
    """
    missing = _missing_after(None, None, names)
    if not missing:
        return None
    for module in _candidates(target, names):
        missing = _missing_after(module, target.source.recipe() if module is None else None, names)
        if not missing:
            return {"module": module}
    raise BuildError(
        f"the model calls the operator {missing[0]}, and importing the model's file alone does not register it, so an "
        "artifact could not be loaded without building the model; register it when the model's file is imported "
        "(torch.library.custom_op, torch.ops.load_library), or use the backend inductor"
    )


def _candidates(target: Target, names: list[str]) -> Iterator[str | None]:
    """Modules that may register the operators, those that cost least first; None for the model's file."""
    from torch._library.custom_ops import OPDEFS

    found = []
    for name in names:
        namespace, _, _ = name.partition("::")
        definition = OPDEFS.get(".".join(name.replace("::", ".", 1).split(".")[:2]).replace(".", "::", 1))
        init: Any = getattr(definition, "_init_fn", None)
        found += [_REGISTRARS.get(namespace, ""), getattr(init, "__module__", None) or "", namespace]
    for module in dict.fromkeys(found):
        package = module.partition(".")[0]
        if (
            package in sys.modules
            and not package.startswith(("ts_handlers_model_", "__main__"))
            and _is_installed(package)
        ):
            yield module
    if target.source.recipe() is not None:
        yield None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _missing_after(module: str | None, recipe: Recipe | None, names: list[str]) -> list[str]:
    """The operators that a new process lacks after it has imported a module, or the file of a recipe's model."""
    facts = {"module": module, "names": names, "recipe": None if recipe is None else dict(recipe)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _TRIAL, json.dumps(facts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return names
    missing: list[str] = json.loads(lines[-1])
    return missing


_TRIAL = """
import json, sys
from ts_handlers.backends import operators
facts = json.loads(sys.argv[1])
operators.register(facts["module"], facts["recipe"])
print(json.dumps(operators.missing_operators(facts["names"])))
"""


def register(module: str | None, recipe: Any) -> None:
    """Import what registers operators, in a process that does not have the model."""
    if module is not None:
        importlib.import_module(module)
    elif recipe is not None:
        from ts_handlers.model.recipes import make_source

        make_source(recipe).source.prepare()


def ensure_operators(target: Target, description: Description, libraries: Iterable[Path]) -> None:
    """Make the operators exist that an artifact calls.

    Raises
    ------
    MissingDependencyError
        What registers them is not there.
    """
    names = called_operators(libraries)
    if not missing_operators(names):
        return
    module = (description.get("operators") or {}).get("module")
    reason = ""
    try:
        if module is not None:
            importlib.import_module(module)
        else:  # entries of earlier versions say nothing
            target.source.prepare()
    except Exception as error:
        reason = f": {type(error).__name__}: {one_line(error, 200)}"
    missing = missing_operators(names)
    if missing:
        what = "the model's file" if module is None else f"the module {module}"
        raise MissingDependencyError(
            f"the artifact calls the operator {missing[0]}, which {what} does not register here{reason}; install what "
            "registers it, or import that in the model's file"
        )
