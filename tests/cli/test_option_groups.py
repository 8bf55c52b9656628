"""Groups of options in the place of a verb's parameters."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated

import typer

from ts_handlers.cli.option_groups import OptionGroup, expand

Count = Annotated[int, typer.Option("--count")]


@dataclasses.dataclass(frozen=True)
class Place(OptionGroup):
    url: Annotated[str, typer.Argument(metavar="URL")]
    folders: Annotated[list[str], typer.Option("--folder")] = dataclasses.field(default_factory=list)


def verb(place: Place, *, count: Count = 3) -> tuple[Place, int]:
    """Say where and how often."""
    return place, count


def test_options_of_a_group_stand_in_its_place() -> None:
    command = expand(verb)
    parameters = inspect.signature(command).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "url": inspect.Parameter.empty,
        "folders": [],
        "count": 3,
    }
    assert parameters["count"].annotation == Count
    assert (command.__doc__, command.__name__) == (verb.__doc__, "verb")
    assert command(url="here", folders=["a"], count=4) == (Place("here", ["a"]), 4)
