"""What a model takes is found from calls: names, dtypes and ranks, and which dimensions vary."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from ts_handlers.errors import BuildError
from ts_handlers.model.declaration import Declaration, as_line, as_yaml, declare, why_none
from ts_handlers.model.observed_calls import KINDS, SHAPES, ObservedCalls, SeenKind, call_kind
from ts_handlers.settings import Dimension, InputSpec, Settings, parse_settings


class Encoder(torch.nn.Module):
    def forward(self, ids: Any, types: Any = None, mask: Any = None, flag: bool = True) -> Any:
        return ids


class Images(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def seen(module: torch.nn.Module, *calls: Any, times: int = 1) -> ObservedCalls:
    found = ObservedCalls()
    for call in calls:
        args, kwargs = call if isinstance(call, tuple) else ((), call)
        for _ in range(times):
            found.add(*call_kind(module, args, kwargs))
    return found


def texts(*shapes: tuple[int, int]) -> ObservedCalls:
    return seen(Encoder(), *({"mask": ids(*shape), "ids": ids(*shape)} for shape in shapes))


def test_names_and_order_are_those_of_forward() -> None:
    found = declare(texts((1, 5), (1, 9)))
    assert [spec.name for spec in found.inputs] == ["ids", "mask"]
    by_position = seen(Encoder(), *(((ids(1, n),), {"mask": ids(1, n)}) for n in (5, 9)))
    assert declare(by_position) == found
    assert found.inputs[0] == InputSpec("ids", "int64", (1, "length"))
    assert found.dimensions == {"length": Dimension(5, 9)}


def test_what_never_differed_stays_a_size_and_rows_get_room() -> None:
    found = declare(seen(Images(), ((torch.zeros(1, 3, 8, 8),), {}), ((torch.zeros(3, 3, 8, 8),), {})))
    assert found.inputs == (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    assert found.dimensions == {"batch": Dimension(1, 16)}
    assert declare(seen(Images(), ((torch.zeros(1, 3),), {}), ((torch.zeros(2, 3),), {})), rows=40).dimensions == {
        "batch": Dimension(1, 64)
    }


def test_dimensions_that_always_had_equal_sizes_are_one_and_others_are_not() -> None:
    square = declare(seen(Images(), *(((torch.zeros(1, 3, n, n),), {}) for n in (8, 16))))
    assert square.inputs[0].shape == (1, 3, "height", "height")
    apart = declare(seen(Images(), *(((torch.zeros(1, 3, n, m),), {}) for n, m in ((8, 8), (16, 8), (8, 16)))))
    assert apart.inputs[0].shape == (1, 3, "height", "width")
    assert apart.dimensions == {"height": Dimension(8, 16), "width": Dimension(8, 16)}


def test_the_most_frequent_kind_that_can_be_compiled_is_taken() -> None:
    calls = seen(Encoder(), {"ids": ids(1, 4)}, {"ids": ids(1, 6)}, times=2)
    calls.merge(seen(Encoder(), {"ids": ids(1, 4), "flag": False}, times=9))
    calls.merge(seen(Encoder(), {"ids": torch.zeros(1, 4)}))
    assert [(spec.name, spec.dtype) for spec in declare(calls).inputs] == [("ids", "int64")]


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ({"ids": ids(1, 4), "flag": False}, "flag: bool"),
        ({"ids": ids(1, 4), "mask": None}, "mask: NoneType"),
        ({"ids": [ids(1, 4)]}, "ids: list"),
        ({"ids": torch.zeros(2, dtype=torch.complex64)}, "ids: complex64 tensor"),
        ({"ids": torch.zeros(2, 2).to_sparse()}, "ids: sparse_coo tensor"),
        ({"ids": torch.zeros(0, 2)}, "ids: empty tensor"),
        ({"ids": 5}, "ids: int"),
    ],
)
def test_calls_that_an_artifact_does_not_take_say_why(call: dict[str, Any], what: str) -> None:
    with pytest.raises(BuildError, match=what):
        declare(seen(Encoder(), call))


def test_no_calls_tell_nothing() -> None:
    with pytest.raises(BuildError, match="no call of the model was seen"):
        declare(ObservedCalls())
    assert "no call" in why_none(ObservedCalls())


def test_frequent_sizes_are_warmed_up() -> None:
    calls = texts((1, 5), (1, 9), (1, 7), (1, 8))
    for _ in range(3):
        calls.merge(texts((1, 8)))
    calls.merge(texts((1, 7)))
    assert declare(calls).warmup[:2] == ({"length": 8}, {"length": 7})
    assert len(declare(calls).warmup) == 3


def test_a_declaration_is_widened_and_never_narrowed() -> None:
    before = declare(texts((1, 5), (1, 9)))
    wider = declare(texts((2, 7), (1, 12)), before=before)
    assert wider.dimensions == {"batch": Dimension(1, 16), "length": Dimension(5, 12)}
    assert declare(texts((1, 6)), before=before).is_same_as(before)
    other = declare(seen(Encoder(), {"ids": ids(1, 3)}), before=before)
    assert other.inputs == (InputSpec("ids", "int64", (1, 3)),)


def test_what_is_kept_is_bounded_and_ranges_are_those_of_all_calls() -> None:
    calls = texts(*((1, n) for n in range(1, 300)))
    (kept,) = calls.kinds()
    assert kept.count == 299
    assert len(kept.shapes) <= SHAPES
    assert declare(calls).dimensions == {"length": Dimension(1, 299)}
    many = ObservedCalls()
    for rank in range(1, 30):
        many.add(*call_kind(Images(), [torch.zeros([1] * rank)], {}))
    assert len(many.kinds()) == KINDS


def test_names_of_any_arguments_are_kept_short() -> None:
    class Any_(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args

    kind, _ = call_kind(Any_(), [ids(1)], {"n" * 500: ids(2), "a b": ids(3)})
    assert [name for name, _, _ in kind.inputs] == ["args_0", "n" * 64]
    assert kind.other == ("a b: tensor without a name",)


def test_seen_calls_travel_as_json() -> None:
    calls = texts((1, 5), (2, 9))
    data = msgspec.json.encode(calls.kinds())
    again = ObservedCalls(msgspec.json.decode(data, type=list[SeenKind]))
    assert declare(again) == declare(calls)


def test_a_declaration_takes_the_place_of_settings_and_lets_eager_answer_the_rest() -> None:
    found = declare(texts((1, 5), (2, 9)))
    settings = found.applied_to(Settings())
    assert (settings.inputs, settings.dimensions, settings.outside) == (found.inputs, found.dimensions, "eager")
    assert settings.warmup_sizes == found.warmup
    own = parse_settings({"handler": {"ts_handlers": {"warmup": "observed"}}})
    assert found.applied_to(own).warmup_sizes == found.warmup


def test_it_is_written_as_yaml_that_parses_to_the_same() -> None:
    import yaml

    found = declare(texts((1, 5), (2, 9)), values={"ids": (0, 50)})
    text = "handler:\n  ts_handlers:\n" + as_yaml(found)
    settings = parse_settings(yaml.safe_load(text))
    assert Declaration(settings.inputs, settings.dimensions, settings.warmup_sizes) == found
    line = yaml.safe_load("{" + as_line(found) + "}")
    assert parse_settings({"handler": {"ts_handlers": line}}).inputs == found.inputs
