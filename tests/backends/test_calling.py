"""Declared inputs reach `forward` in the way that its signature allows, or are refused before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from ts_handlers.backends.calling import call_module, check_names, spreads, takes_names
from ts_handlers.errors import SettingsError

A, B = torch.ones(1), torch.full((1,), 2.0)


def module_of(forward: Callable[..., Any]) -> torch.nn.Module:
    return type("Model", (torch.nn.Module,), {"forward": forward})()


FITTING: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "by name": (lambda self, b, a: a - b, ("a", "b")),
    "by position": (lambda self, x, y: x - y, ("a", "b")),
    "by position before others": (lambda self, x, y, scale=1: x - y, ("a", "b")),
    "any names": (lambda self, **inputs: inputs["a"] - inputs["b"], ("a", "b")),
    "a name and any others": (lambda self, a, **others: a - others["b"], ("a", "b")),
    "anything": (lambda self, *args, **kwargs: args[0] - args[1], ("a", "b")),
    "by name only": (lambda self, *, a, b: a - b, ("a", "b")),
    "a dict without an annotation": (lambda self, batch: batch["a"] - batch["b"], ("a", "b")),
}


def annotated(kind: Any, get: Callable[[Any], Any]) -> Callable[..., Any]:
    def forward(self: Any, batch: Any, flag: bool = False) -> Any:
        return get(batch)

    forward.__annotations__["batch"] = kind
    return forward


for kind in (dict, "dict", "dict[str, torch.Tensor]", dict[str, torch.Tensor], Mapping[str, torch.Tensor], "Mapping"):
    FITTING[f"annotated {kind}"] = (annotated(kind, lambda batch: batch["a"] - batch["b"]), ("a", "b"))
for kind in (list, "list[Tensor]", tuple[torch.Tensor, torch.Tensor]):
    FITTING[f"annotated {kind}"] = (annotated(kind, lambda batch: batch[0] - batch[1]), ("a", "b"))


@pytest.mark.parametrize(("forward", "names"), FITTING.values(), ids=list(FITTING))
def test_inputs_reach_forward(forward: Callable[..., Any], names: tuple[str, ...]) -> None:
    module = module_of(forward)
    check_names(module, names)
    assert call_module(module, names, [A, B], takes_names(module, names)).item() == -1


def test_one_input_in_a_dict() -> None:
    module = module_of(annotated(dict[str, torch.Tensor], lambda batch: batch["a"]))
    assert call_module(module, ("a",), [A], takes_names(module, ("a",))) is A


MISFITS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "one is missing": (lambda self, input_ids, attention_mask: None, ("input_ids",)),
    "one too many": (lambda self, x, y: None, ("x", "y", "z")),
    "of another place": (lambda self, x, y: None, ("y", "z")),
    "by name only": (lambda self, *, x: None, ("y",)),
    "a tensor": (annotated(torch.Tensor, lambda batch: None), ("a", "b", "c")),
}


@pytest.mark.parametrize(("forward", "names"), MISFITS.values(), ids=list(MISFITS))
def test_what_fits_no_call_is_refused_with_the_parameters_of_forward(
    forward: Callable[..., Any], names: tuple[str, ...]
) -> None:
    with pytest.raises(SettingsError, match=r"handler\.ts_handlers\.inputs: forward of Model takes \(.*\)") as error:
        check_names(module_of(forward), names)
    for part in (*names, *forward.__code__.co_varnames[1 : forward.__code__.co_argcount]):
        assert part in str(error.value)


def test_what_preprocess_gives_where_nothing_is_declared() -> None:
    batch = module_of(lambda self, batch: batch)
    pair = module_of(lambda self, a, b=None: a)
    assert not spreads(batch, {"a": A, "b": B})
    assert spreads(batch, {"batch": A})
    assert spreads(pair, {"a": A, "b": B})
    assert spreads(module_of(lambda self, **inputs: inputs), {"a": A})
    assert not spreads(pair, [A, B])  # images of different sizes
    assert spreads(module_of(lambda self, a, b: a), [A, B])
    assert spreads(pair, (A, B))
    assert not spreads(batch, (A, B))
    assert not spreads(pair, A)
