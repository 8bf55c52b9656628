"""Structure: an output taken apart and put together is the same output, through JSON too."""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_handlers.errors import BuildError
from ts_handlers.model.structure import OutputMapping, flatten, unflatten

tensors = st.integers(0, 9).map(lambda value: torch.tensor([value]))
leaves = tensors | st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4) | st.floats(-1, 1)
outputs = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: Any = None


def round_trip(output: Any) -> Any:
    flat, description = flatten(output)
    return unflatten(flat, json.loads(json.dumps(description)))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@given(outputs)
def test_round_trip_of_nested_outputs(output: Any) -> None:
    assert same(output, round_trip(output))


def test_named_tuple_is_still_unpacked_by_position() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    pair = round_trip(Pair(one, {"deep": two}))
    first, second = pair
    assert first is pair.first is one
    assert second["deep"] is two


@pytest.mark.parametrize(
    ("output", "fields"),
    [
        (torch.tensor([[1.0, 3.0]]).max(dim=1), ["values", "indices"]),
        (torch.linalg.svd(torch.eye(2)), ["U", "S", "Vh"]),
        (torch.frexp(torch.ones(2)), ["mantissa", "exponent"]),
    ],
)
def test_torch_return_types_keep_their_field_names(output: Any, fields: list[str]) -> None:
    back = round_trip({"deep": [output]})["deep"][0]
    assert len(back) == len(output) == len(fields)
    for index, (item, name) in enumerate(zip(back, fields, strict=True)):
        assert item is back[index] is getattr(back, name) is getattr(output, name)


def test_dataclass_comes_back_with_its_fields() -> None:
    logits = torch.ones(1)
    out = round_trip(Result(logits, (logits, None)))
    assert type(out) is Result
    assert out.logits is logits
    assert out.hidden == (logits, None)


class NotImportedThere:
    """Stands for a class of a library that a warm process has not imported."""

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        loss: Any = None


@pytest.mark.parametrize("where", ["no_such_module:Output", f"{__name__}:NotImportedThere.Missing", f"{__name__}:json"])
def test_output_of_a_class_that_is_not_imported_has_its_fields(where: str) -> None:
    logits = torch.ones(1)
    flat, description = flatten(NotImportedThere.Output(logits))
    assert description["class"] == f"{__name__}:NotImportedThere.Output"
    out = unflatten(flat, {**description, "class": where})
    assert isinstance(out, OutputMapping)
    assert out.logits is out["logits"] is out[0] is logits
    assert out.loss is None


def test_output_of_an_entry_that_does_not_name_its_class_has_its_fields() -> None:
    out = unflatten([torch.ones(1)], {"kind": "mapping", "keys": ["logits"], "items": [{"kind": "tensor"}]})
    assert isinstance(out, OutputMapping)
    assert list(out) == ["logits"]


@pytest.mark.parametrize("kind", [Pair, collections.OrderedDict, NotImportedThere.Output])
def test_outputs_have_the_classes_of_the_eager_model(kind: Any) -> None:
    one, two = torch.ones(1), torch.zeros(1)
    made = kind({"b": one, "a": two}) if kind is collections.OrderedDict else kind(one, two)
    out = round_trip((made,))[0]
    assert type(out) is kind
    assert same(list(out.values()), [one, two]) if kind is collections.OrderedDict else out == made


def test_model_output_of_transformers_is_used_as_before() -> None:
    outputs_module = pytest.importorskip("transformers.modeling_outputs")
    state, layer = torch.ones(1), torch.zeros(1)
    original = outputs_module.BaseModelOutput(last_hidden_state=state, hidden_states=(layer, state))
    out = round_trip(original)
    assert type(out) is type(original)
    assert out.attentions is None
    assert list(out) == list(original)
    assert out.last_hidden_state is out["last_hidden_state"] is out[0] is state
    assert out.hidden_states[0] is out.to_tuple()[1][0] is layer
    assert out[:1] == (state,)
    assert len(out) == len(original)


def test_ordered_dict_keeps_order_and_values() -> None:
    out = round_trip(collections.OrderedDict(b=torch.ones(1), a=torch.zeros(1)))
    assert list(out) == ["b", "a"]
    assert float(out["a"]) == 0


def test_missing_field_is_an_attribute_error() -> None:
    out = OutputMapping({"logits": 1})
    with pytest.raises(AttributeError, match="no field 'loss'"):
        _ = out.loss
    assert not hasattr(out, "loss")
    with pytest.raises(KeyError):
        _ = out["loss"]


@pytest.mark.parametrize("output", [{1: torch.ones(1)}, object(), {torch.ones(1)}, [iter(())]])
def test_what_an_artifact_cannot_return_is_a_build_error(output: Any) -> None:
    with pytest.raises(BuildError, match="the model returned"):
        flatten(output)


def test_a_dynamic_cache_is_carried_as_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    cache = cache_utils.DynamicCache()
    for layer in range(2):
        cache.update(torch.full((1, 2, 3, 4), float(layer)), torch.ones(1, 2, 3, 4), layer)
    found = round_trip({"logits": torch.zeros(1), "cache": cache})["cache"]
    assert type(found) is cache_utils.DynamicCache
    assert found.get_seq_length() == 3
    for ours, theirs in zip(found.layers, cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    flat, structure = flatten(cache)
    monkeypatch.delitem(sys.modules, "transformers.cache_utils")  # as in a process that has not imported it
    pairs = unflatten(flat, structure)
    assert [len(pair) for pair in pairs] == [2, 2]
    assert pairs[1][0] is cache.layers[1].keys


def test_what_an_artifact_cannot_return_names_no_other_backend() -> None:
    with pytest.raises(BuildError, match=r"returned a object; expected tensors, .* or leave it out") as caught:
        flatten({"logits": torch.zeros(1), "cache": object()})
    assert "backend" not in str(caught.value)
