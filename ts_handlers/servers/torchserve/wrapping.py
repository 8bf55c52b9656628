"""Find the handler in somebody's file as TorchServe would, and write a handler file with the two lines over it.

Nothing of the file is imported or run, so its packages need not be there. A file has one of

- a function ``handle``, or the one that ``file.py:function`` names: TorchServe calls it and looks at no class
- one class that is defined in the file; imported classes do not count
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import keyword
import os
import tokenize
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.errors import ModelError, one_line

MARK = "# Written by `ts-handlers wrap`; may be overwritten by it."
_MIXIN = "CompiledHandlerMixin"
_OURS = (_MIXIN, "CompiledHandler")
_SUITES = ("body", "orelse", "finalbody", "handlers")


@dataclasses.dataclass(frozen=True)
class Found:
    """What TorchServe would take from a handler file.

    Attributes
    ----------
    module:
        The name under which the file is imported.
    name:
        The class, or the function.
    kind:
        ``class`` or ``function``.
    file:
        The file, which the archive must hold beside the written one; None for a handler of TorchServe's own.
    """

    module: str
    name: str
    kind: str
    file: Path | None

    def text(self) -> str:
        """The handler file: the two lines over the class, or over `FunctionHandler` for a function."""
        return (
            _CLASS.format(found=self, theirs=self._theirs()) if self.kind == "class" else _FUNCTION.format(found=self)
        )

    def _theirs(self) -> str:
        return f"{self.name} as Their{self.name}" if self.name in ("Handler", _MIXIN) else self.name

    @property
    def base(self) -> str:
        """The name of their class in the written file."""
        return self._theirs().rpartition(" ")[2]


_CLASS = f"""{MARK}
from {{found.module}} import {{theirs}}
from ts_handlers import {_MIXIN}


class Handler({_MIXIN}, {{found.base}}):
    pass
"""
_FUNCTION = f"""{MARK}
import {{found.module}}
from ts_handlers import {_MIXIN}, FunctionHandler


class Handler({_MIXIN}, FunctionHandler):
    function = staticmethod({{found.module}}.{{found.name}})
"""


def find_handler(handler: str, class_name: str | None = None) -> Found:
    """What TorchServe would take from ``--handler HANDLER``.

    Parameters
    ----------
    handler:
        A Python file, ``file.py:function``, or the name of a handler of TorchServe's own, such as ``image_classifier``.
    class_name:
        The class to take where a file defines several, which TorchServe alone would refuse.

    Raises
    ------
    ModelError
        There is no such file, it is no Python, or it holds nothing that can be wrapped.
    """
    path, _, function = handler.partition(":")
    file = Path(path)
    stock = _stock_handler(path) if not function and not file.exists() else None
    module = file.stem if stock is None else f"ts.torch_handler.{path}"
    tree = _parse(stock or file)
    if function or (class_name is None and _defines(tree, "handle")):
        name = function or "handle"
        if not _defines(tree, name):
            raise ModelError(f"{path} defines no {name!r}; name a function that is defined or imported at module level")
        if _is_ours(tree):
            raise ModelError(f"{path} uses {_MIXIN} already; archive it as it is")
        return Found(_importable(module, path), name, "function", None if stock else file)
    return Found(_importable(module, path), _the_class(tree, path, class_name), "class", None if stock else file)


def write_handler(found: Found, target: Path, *, force: bool = False) -> None:
    """Write the handler file.

    Raises
    ------
    ModelError
        The file is theirs, has the name of a module that it imports, or is there and was not written by this function.
    """
    if found.file is not None and target.resolve() == found.file.resolve():
        raise ModelError(f"{target} is the file to wrap; write to another one")
    if target.suffix != ".py" or not _is_name(target.stem):
        raise ModelError(f"{target}: expected the name of a Python module, such as handler.py")
    if target.stem in (found.module.partition(".")[0], "ts_handlers"):
        raise ModelError(f"{target}: imports a module of the same name; write to another file")
    if target.exists() and not force and not target.read_text("utf-8", "replace").startswith(MARK):
        raise ModelError(
            f"{target} exists and was not written by `ts-handlers wrap`; name another file, or use --force"
        )
    target.write_text(found.text(), "utf-8")


def _stock_handler(name: str) -> Path | None:
    """The file of a handler of TorchServe's own, found without importing TorchServe."""
    if not _is_name(name):
        return None
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        return None
    file = Path(os.path.dirname(spec.origin), "torch_handler", f"{name}.py")
    return file if file.is_file() else None


def _parse(file: Path) -> ast.Module:
    try:
        with tokenize.open(file) as stream:  # in the encoding that the file declares
            return ast.parse(stream.read(), str(file))
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror}); name the file that torch-model-archiver's --handler has, or a "
            "handler of TorchServe's own such as image_classifier"
        ) from error
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is no Python source: {one_line(error)}") from error


def _importable(module: str, path: str) -> str:
    if not all(map(_is_name, module.split("."))):
        raise ModelError(f"{path}: {module!r} cannot stand in an import; rename the file, for example their_handler.py")
    return module


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, those inside ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for suite in _SUITES:
            for each in getattr(node, suite, []):
                yield from _statements(each.body if isinstance(each, ast.ExceptHandler) else [each])


def _defines(tree: ast.Module, name: str) -> bool:
    """Whether the module will have an attribute of this name, as TorchServe asks."""
    for node in _statements(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            return True
        if isinstance(node, (ast.Import, ast.ImportFrom)) and any((a.asname or a.name) == name for a in node.names):
            return True
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if target is not None and any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(target)):
                return True
    return False


def _is_ours(tree: ast.Module) -> bool:
    classes = [node for node in _statements(tree.body) if isinstance(node, ast.ClassDef)]
    return any(_name(base) in _OURS for each in classes for base in each.bases)


def _name(base: ast.expr) -> str:
    """The last part of a base class's name."""
    return ast.unparse(base).rpartition(".")[2]


def _the_class(tree: ast.Module, path: str, wanted: str | None) -> str:
    classes = {node.name: node for node in _statements(tree.body) if isinstance(node, ast.ClassDef)}
    names = ", ".join(classes) or "no class"
    if wanted is not None and wanted not in classes:
        raise ModelError(f"{path} defines no class {wanted!r}; it defines {names}")
    if not classes:
        raise ModelError(
            f"{path} defines neither a class nor a function handle, one of which TorchServe needs; "
            "imported classes do not count"
        )
    if wanted is None and len(classes) > 1:
        raise ModelError(f"{path} defines several classes ({names}), of which TorchServe takes none; name one: --class")
    name = wanted or next(iter(classes))
    chosen = classes[name]
    if any(_name(base) in _OURS for base in chosen.bases):
        raise ModelError(f"{path}: {name} uses {_MIXIN} already; archive it as it is")
    _check_methods(chosen, path)
    return name


def _check_methods(chosen: ast.ClassDef, path: str) -> None:
    """Refuse a class that TorchServe could not serve; one with base classes may inherit what it lacks."""
    if any(_name(base) not in ("object", "ABC") for base in chosen.bases):
        return
    methods = {
        node.name for node in _statements(chosen.body) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    instance = {n.attr for n in ast.walk(chosen) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    lacking = [name for name in ("initialize", "handle") if name not in methods | instance]
    if lacking:
        raise ModelError(
            f"{path}: the class {chosen.name} has no base class and no {' and no '.join(lacking)}, "
            "which TorchServe calls"
        )
