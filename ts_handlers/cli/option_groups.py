"""Groups of options that several verbs share: a parameter of a verb that stands for several options.

A group is a frozen dataclass. Each of its fields is one option or argument of the command line, and its methods do what
the options are for. `expand` turns a verb with groups into the function with plain parameters that typer reads.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


class OptionGroup:
    """Base of the groups; subclasses are dataclasses whose fields are annotated as parameters of a verb are."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


def expand(command: Callable[..., T]) -> Callable[..., T]:
    """The same command with the options of each group in the group's place; all parameters are passed by name."""
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    hints = typing.get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and issubclass(hint, OptionGroup):
            groups[parameter.name] = hint
            parameters += _parameters_of(hint)
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> T:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            values_of_group = {field: values.pop(field) for field in fields}
            values[name] = group(**values_of_group)
        return command(**values)

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameters_of(group: type[OptionGroup]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
