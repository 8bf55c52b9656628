"""A method of a module as a model of its own: what an artifact of it takes, and which calls have that form.

Pipelines call parts of a model with more than tensors: flags, None, a method that is not ``forward``. Such arguments
are fixed when the part is compiled, and a call that has them is one of the tensors alone.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from ts_handlers.errors import one_line
from ts_handlers.key import fingerprint
from ts_handlers.model.base import Recipe
from ts_handlers.model.module import ModuleSource
from ts_handlers.model.module_identity import module_facts

Constant = bool | int | float | str | None


class MethodModule(torch.nn.Module):
    """A method of a module as the ``forward`` of one, which takes the declared inputs in their order or by name.

    It goes on calling the method of the class when the module's own one is replaced.

    Parameters
    ----------
    inner:
        The module.
    method:
        The name of the method.
    names:
        Names of the inputs.
    arguments:
        What the method gets beside the inputs.
    """

    def __init__(
        self, inner: torch.nn.Module, method: str, names: Sequence[str], arguments: Mapping[str, Constant]
    ) -> None:
        super().__init__()
        self.inner = inner
        self.method = method
        self.names = tuple(names)
        self.arguments = dict(arguments)
        self._function = getattr(type(inner), method)

    def forward(self, *_in_order: torch.Tensor, **_by_name: torch.Tensor) -> Any:
        inputs = {**dict(zip(self.names, _in_order, strict=False)), **_by_name}
        return self._function(self.inner, **inputs, **self.arguments)

    def lines(self) -> list[str]:
        """What identifies the method beside the module."""
        arguments = [f"argument {name}={value!r}" for name, value in sorted(self.arguments.items())]
        return [f"method={self.method}", *arguments]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the class with any arguments."""
        return self._function(self.inner, *args, **kwargs)


def reason_against_method(module: torch.nn.Module, method: str) -> str | None:
    """Why a method of a module cannot be replaced; None when it can."""
    function = inspect.getattr_static(type(module), method, None)
    if function is None:
        return f"{type(module).__name__} has no method {method}"
    if not inspect.isfunction(function):
        return f"{method} of {type(module).__name__} is no plain method"
    if method in vars(module):  # such as the hooks of accelerate, which move tensors between devices
        return f"{method} of this {type(module).__name__} is replaced already; expected that of its class"
    return None


class CallForm:
    """Which calls of a method the artifact can answer: those with the inputs, and nothing else that matters.

    An argument that has the method's default, or one of the fixed values, says nothing.

    Parameters
    ----------
    method:
        The bound method.
    names:
        Names of the inputs.
    arguments:
        The fixed values of other arguments.
    """

    def __init__(self, method: Any, names: Sequence[str], arguments: Mapping[str, Constant]) -> None:
        self.signature = inspect.signature(method)
        self._names = tuple(names)
        self._known = frozenset(names)
        parameters = self.signature.parameters.values()
        self._order = tuple(each.name for each in parameters if each.kind in _BY_POSITION)
        defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
        self._fixed = {**defaults, **arguments}
        # Without them the method would be called with another value.
        self._required = tuple(
            name for name, value in arguments.items() if name not in defaults or not _is_same(defaults[name], value)
        )

    def reason_against(self) -> str | None:
        """Why no call of the method can have these inputs and fixed arguments; None when one can."""
        try:
            self.signature.bind(**dict.fromkeys((*self._names, *self._required)))
        except TypeError as error:
            return f"{error}; the method takes {one_line(str(self.signature), 300)}"
        return None

    def prepare(self) -> None:
        """Called once the artifact answers calls."""

    def answer(self, answer: Any, kwargs: Mapping[str, Any]) -> Any:
        """What the method answers, from the artifact's answer."""
        return answer

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | str | None:
        """The inputs of a call by name, or in what the call differs from one that the artifact can answer.

        None is for a call that was never meant for the artifact.
        """
        if len(args) > len(self._order):
            return f"{len(args)} arguments by position"
        given = dict(zip(self._order, args, strict=False))
        if not given.keys().isdisjoint(kwargs):
            return "an argument is given twice"
        given.update(kwargs)
        found = {}
        for name in self._names:
            if name not in given:
                return f"without input {name!r}"
            found[name] = given.pop(name)
        for name in self._required:
            if name not in given:
                return f"argument {name!r} is not given, compiled is {self._fixed[name]!r}"
        for name, value in given.items():
            if name not in self._fixed or not _is_same(self._fixed[name], value):
                shown = repr(value) if isinstance(value, Constant) else f"a {type(value).__name__}"
                return one_line(f"argument {name!r} is {shown}", 200)
        return found


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Constant) and type(one) is type(other) and bool(one == other))


class Called(Protocol):
    """A module whose `forward` is compiled and calls that of another one; `MethodModule` is one."""

    @property
    def inner(self) -> torch.nn.Module:
        """The module whose method is called."""

    @property
    def method(self) -> str:
        """The name of the method."""

    def lines(self) -> list[str]:
        """What identifies the call beside the module."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the module's class with any arguments."""


class MethodSource(ModuleSource):
    """A method of a module that exists in this process.

    Its identity is that of the module, with the method and the fixed arguments. It is found once: later the module's
    attributes hold what has taken the method's place.
    """

    def __init__(
        self,
        name: str,
        called: Called,
        *,
        recipe: Recipe | None = None,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(name, cast(torch.nn.Module, called).eval(), recipe=recipe, folder=folder)
        self._called = called

    def digest(self) -> str:
        """Digest over the module's facts, the method and the fixed arguments."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        facts = module_facts(self._called.inner, self._folder)
        self.left_out = facts.left_out
        return fingerprint.digest_text("\n".join([*facts.lines, *self._called.lines()]))


class Weights:
    """The tensors of a module as they were, to see whether somebody has changed them since.

    Seen is what PyTorch counts: changes in place, other tensors in their place, casts and moves, and hooks. Not seen is
    what is written through ``.data``.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        children = list(module.modules())
        self._places = [
            (tensors, name)
            for child in children
            for tensors in (child._parameters, child._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        found: list[Any] = [tensors[name] for tensors, name in self._places]
        self._identities = list(map(id, found))
        self._counted = [tensor for tensor in found if not tensor.is_inference()]  # others have no version
        self._tensors = found
        self._addresses = list(map(_ADDRESS, found))
        self._versions = list(map(_VERSION, self._counted))
        hooks = [hooks for child in children[1:] for hooks in (child._forward_hooks, child._forward_pre_hooks)]
        self._without_hooks = [each for each in hooks if not each]

    def have_changed(self) -> bool:
        """Whether a tensor has another version, place or memory than before, or a hook was added below the module.

        Costs 0.2 to 0.4 microseconds for each tensor.
        """
        try:
            same_place = [id(tensors[name]) for tensors, name in self._places] == self._identities
        except KeyError:
            return True
        return not (
            same_place
            and list(map(_VERSION, self._counted)) == self._versions
            and list(map(_ADDRESS, self._tensors)) == self._addresses
            and not any(self._without_hooks)
        )


_VERSION = operator.attrgetter("_version")
_ADDRESS = torch.Tensor.data_ptr
