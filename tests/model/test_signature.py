"""Signature: a call is accepted exactly when it fits the declaration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_handlers.errors import InputError, LoadError
from ts_handlers.model.signature import Signature
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.settings.values import values_to_draw

CPU = torch.device("cpu")
DTYPES = ("float32", "float16", "int64", "bool", "uint8")

ids = InputSpec(name="ids", dtype="int64", shape=("batch", "length"), values=(0, 9))
mask = InputSpec(name="mask", dtype="int64", shape=("batch", "length"))
scale = InputSpec(name="scale", dtype="float32", shape=("batch", 2))
SIGNATURE = Signature([ids, mask, scale], {"batch": Dimension(1, 4), "length": Dimension(2, 6)})


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    names = draw(st.lists(st.sampled_from(["batch", "length", "width"]), unique=True, max_size=3))
    dimensions = {}
    for name in names:
        low = draw(st.integers(1, 4))
        dimensions[name] = Dimension(low, low + draw(st.integers(0, 5)))
    sizes = st.integers(1, 4) | (st.sampled_from(names) if names else st.nothing())
    inputs = [
        InputSpec(
            name=f"input{index}",
            dtype=draw(st.sampled_from(DTYPES)),  # type: ignore[arg-type]
            shape=tuple(draw(st.lists(sizes, max_size=3))),
        )
        for index in range(draw(st.integers(1, 3)))
    ]
    used = {size for spec in inputs for size in spec.shape}
    return Signature(inputs, {name: value for name, value in dimensions.items() if name in used})


@st.composite
def calls(draw: st.DrawFn) -> tuple[Signature, list[torch.Tensor]]:
    """A signature and tensors that fit it often, and miss it by a little otherwise."""
    signature = draw(signatures())
    sizes = {name: draw(st.integers(d.min - 1, d.max + 1)) for name, d in signature.dimensions.items()}
    tensors = []
    for spec in signature.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        change = draw(st.sampled_from(["none", "none", "none", "size", "rank", "dtype"]))
        dtype = spec.dtype
        if change == "size" and shape:
            axis = draw(st.integers(0, len(shape) - 1))
            shape[axis] = max(0, shape[axis] + draw(st.sampled_from([1, -1])))
        elif change == "rank":
            shape.append(1)
        elif change == "dtype":
            dtype = draw(st.sampled_from(DTYPES))  # type: ignore[assignment]
        tensors.append(torch.zeros(shape, dtype=getattr(torch, dtype)))
    return signature, tensors


def fits(signature: Signature, tensors: list[torch.Tensor]) -> bool:
    """The declaration, said in another way than by the code under test."""
    seen: dict[str, set[int]] = {name: set() for name in signature.dimensions}
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        if tensor.dtype != getattr(torch, spec.dtype) or tensor.dim() != len(spec.shape):
            return False
        for expected, found in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(expected, int):
                if expected != found:
                    return False
            else:
                seen[expected].add(found)
    return all(
        len(found) == 1 and signature.dimensions[name].min <= next(iter(found)) <= signature.dimensions[name].max
        for name, found in seen.items()
    )


@given(calls())
def test_check_accepts_exactly_what_is_declared(call: tuple[Signature, list[torch.Tensor]]) -> None:
    signature, tensors = call
    if fits(signature, tensors):
        sizes = signature.check(tensors)
        assert set(sizes) == set(signature.dimensions)
        assert signature.sizes(tensors) == sizes
    else:
        with pytest.raises(InputError):
            signature.check(tensors)


@given(signatures(), st.data())
def test_bind_takes_every_split_into_positions_and_names(signature: Signature, data: st.DataObject) -> None:
    values = [torch.full((1,), index) for index in range(len(signature.names))]
    count = data.draw(st.integers(0, len(values)))
    named = list(zip(signature.names[count:], values[count:], strict=True))
    kwargs = dict(data.draw(st.permutations(named)))
    bound = signature.bind(values[:count], kwargs, CPU)
    assert [int(tensor) for tensor in bound] == list(range(len(values)))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (1, ["mask"], "'scale' is missing"),
        (4, [], "at most 3 inputs"),
        (2, ["mask", "scale"], "'mask' was given twice"),
        (3, ["other"], "unknown input 'other'"),
        (0, ["ids", "mask", "scale", "other"], "unknown input 'other'"),
        (0, [], "'ids' is missing"),
    ],
)
def test_bind_refuses_other_arguments(args: int, kwargs: list[str], text: str) -> None:
    one = torch.zeros(1)
    with pytest.raises(InputError, match=text):
        SIGNATURE.bind([one] * args, dict.fromkeys(kwargs, one), CPU)


@pytest.mark.parametrize("value", [None, 1.5, [1, 2], "text", {"a": 1}])
def test_bind_refuses_what_is_no_tensor(value: Any) -> None:
    with pytest.raises(InputError, match="'ids': expected a tensor"):
        SIGNATURE.bind([value, value, value], {}, CPU)


def test_bind_refuses_sparse_tensors() -> None:
    with pytest.raises(InputError, match="dense"):
        SIGNATURE.bind([torch.eye(2).to_sparse()] * 3, {}, CPU)


def test_bind_gives_contiguous_tensors() -> None:
    tensor = torch.arange(6).reshape(2, 3).t()
    bound = SIGNATURE.bind([tensor] * 3, {}, CPU)
    assert all(item.is_contiguous() and torch.equal(item, tensor) for item in bound)


def test_bind_carries_out_pending_negations() -> None:
    value = torch.tensor([1 + 2j]).conj().imag
    assert value.is_neg()
    bound = SIGNATURE.bind([value] * 3, {}, CPU)
    assert not bound[0].is_neg()
    assert bound[0].tolist() == [-2]


def test_messages_name_input_size_and_range() -> None:
    good = SIGNATURE.generate({"batch": 2, "length": 3})
    with pytest.raises(InputError, match=r"dimension 'length': size 7 .* 2\.\.6"):
        SIGNATURE.check(SIGNATURE.generate({"batch": 2, "length": 7}))
    with pytest.raises(InputError, match="'mask': dimension 'length' is 4, in another input 3"):
        SIGNATURE.check([good[0], torch.zeros(2, 4, dtype=torch.int64), good[2]])
    with pytest.raises(InputError, match="'scale': expected dtype float32, found float64"):
        SIGNATURE.check([*good[:2], good[2].double()])


@given(signatures(), st.integers(0, 3))
def test_generated_inputs_fit_and_repeat(signature: Signature, seed: int) -> None:
    for sizes in [signature.example_sizes(), *signature.corner_sizes()]:
        first, second = signature.generate(sizes, seed), signature.generate(sizes, seed)
        assert signature.check(first) == sizes
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_generated_values_lie_in_the_declared_range() -> None:
    drawn = SIGNATURE.generate({"batch": 4, "length": 6}, seed=3)[0]
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 9


@given(signatures())
def test_example_sizes_are_in_range_and_avoid_zero_and_one(signature: Signature) -> None:
    for name, size in signature.example_sizes().items():
        dimension = signature.dimensions[name]
        assert dimension.min <= size <= dimension.max
        assert size >= 2 or dimension.max == 1


@given(signatures(), signatures())
def test_canonical_lines_tell_signatures_apart(a: Signature, b: Signature) -> None:
    same = a.inputs == b.inputs and a.dimensions == b.dimensions
    assert (a.canonical() == b.canonical()) == same


def test_what_was_accepted_once_does_not_admit_anything_else() -> None:
    signature = Signature(SIGNATURE.inputs, SIGNATURE.dimensions)
    good = signature.generate({"batch": 2, "length": 5})
    for _ in range(2):
        assert signature.check(good) == {"batch": 2, "length": 5}
        for index in range(len(good)):
            with pytest.raises(InputError, match="dtype"):
                signature.check([*good[:index], good[index].to(torch.float64), *good[index + 1 :]])
            with pytest.raises(InputError, match=r"size|dimension"):
                signature.check([*good[:index], good[index][:, :-1], *good[index + 1 :]])


def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ts_handlers.model.signature._REMEMBERED", 3)
    signature = Signature(SIGNATURE.inputs, SIGNATURE.dimensions)
    for _ in range(2):
        for length in range(2, 7):
            sizes = {"batch": 2, "length": length}
            assert signature.check(signature.generate(sizes)) == sizes
    assert len(signature._accepted) == 3


numbers = st.integers(-20, 20) | st.floats(-20, 20)
bounds = st.tuples(st.none() | numbers, st.none() | numbers).filter(lambda pair: pair != (None, None))


def limited(dtype: Any, limits: Any, values: Any = None) -> Signature:
    return Signature([InputSpec("x", dtype, ("n",), values=values, limits=limits)], {"n": Dimension(1, 99)})


def inside(value: float, limits: tuple[Any, Any]) -> bool:
    """The limits, said in another way than by the code under test."""
    return value >= (-math.inf if limits[0] is None else limits[0]) and value < (
        math.inf if limits[1] is None else limits[1]
    )


@given(st.sampled_from([*DTYPES, "int8", "bfloat16", "float64"]), bounds, st.lists(numbers, min_size=1, max_size=5))
def test_limits_accept_exactly_what_lies_between_them(dtype: str, limits: Any, values: list[float]) -> None:
    tensor = torch.tensor(values).to(getattr(torch, dtype))
    signature = limited(dtype, limits)
    if all(inside(value, limits) for value in tensor.tolist()):
        assert signature.bind([tensor], {}, CPU)[0] is tensor
        return
    with pytest.raises(InputError, match="'x': expected values inside its limits"):
        signature.bind([tensor], {}, CPU)
    with pytest.raises(InputError, match="'x': expected values inside its limits"):
        signature.bind([], {"x": tensor}, CPU)


@pytest.mark.parametrize(
    ("dtype", "limits", "values", "text"),
    [
        ("int64", (0, 30522), [5, 30522, 7], r"\[0, 30522\), found 30522;"),
        ("int64", (0, 30522), [5, -1, 7], r"\[0, 30522\), found -1;"),
        ("int64", (None, 2**53), [2**53 + 1], r"\[null, 9007199254740992\), found 9007199254740993;"),
        ("float32", (0, None), [1.0, -0.5], r"\[0, null\), found -0.5;"),
        ("float32", (0, 1), [0.5, math.nan], "found nan;"),
        ("float16", (None, 1), [math.nan], "found nan;"),
        ("float32", (0, 1), [math.inf], "found inf;"),
    ],
)
def test_what_lies_outside_its_limits_is_named(dtype: str, limits: Any, values: list[float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        limited(dtype, limits).bind([torch.tensor(values, dtype=getattr(torch, dtype))], {}, CPU)


def test_limits_hold_whatever_the_dtype_of_the_tensor_is() -> None:
    """Another dtype is refused by `check`, after which `outside: eager` would still run it."""
    signature = limited("int64", (0, 9))
    for dtype in (torch.int32, torch.uint8, torch.float32):
        with pytest.raises(InputError, match="limits"):
            signature.bind([torch.tensor([9], dtype=dtype)], {}, CPU)
        with pytest.raises(InputError, match="dtype"):
            signature.check(signature.bind([torch.tensor([8], dtype=dtype)], {}, CPU))
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(InputError, match="'x': expected real numbers"):
            signature.bind([torch.zeros(1).to(dtype)], {}, CPU)


def test_an_empty_tensor_has_no_value_outside() -> None:
    signature = limited("int64", (0, 9))
    (empty,) = signature.bind([torch.zeros(0, dtype=torch.int64)], {}, CPU)
    with pytest.raises(InputError, match="size 0"):
        signature.check([empty])


def test_limits_are_looked_at_before_the_tensor_moves() -> None:
    """A tensor on the device `meta` has no values any more."""
    signature = limited("int64", (0, 9))
    with pytest.raises(InputError, match="found 9;"):
        signature.bind([torch.tensor([9])], {}, torch.device("meta"))
    (moved,) = signature.bind([torch.tensor([8])], {}, torch.device("meta"))
    assert moved.device.type == "meta"


@given(st.sampled_from([*DTYPES, "int8", "bfloat16", "float64"]), bounds, st.integers(0, 3))
def test_inputs_are_drawn_from_the_limits(dtype: str, limits: Any, seed: int) -> None:
    drawn_from = values_to_draw(InputSpec("x", dtype, ("n",), limits=limits))  # type: ignore[arg-type]
    assert drawn_from is not None
    if drawn_from[1] - drawn_from[0] < 0.5:  # settings refuse an empty range; 16 bits may have nothing in a small one
        return
    signature = limited(dtype, limits)
    (tensor,) = signature.generate({"n": 50}, seed)
    assert all(inside(value, limits) for value in tensor.tolist())
    assert signature.bind([tensor], {}, CPU)[0] is tensor


def test_values_are_drawn_rather_than_limits() -> None:
    (tensor,) = limited("int64", (0, 1000), values=(3, 5)).generate({"n": 99})
    assert set(tensor.tolist()) == {3, 4}


def test_limits_and_values_are_no_part_of_the_key() -> None:
    lines = {
        signature.canonical()
        for signature in (limited("int64", None), limited("int64", (0, 9)), limited("int64", None, values=(0, 3)))
    }
    assert len(lines) == 1


def test_limits_and_values_are_those_that_are_declared_now() -> None:
    built = Signature([ids, mask, scale], {"batch": Dimension(1, 2), "length": Dimension(2, 6)})
    declared = Signature([InputSpec("ids", "int64", ("batch", "length"), limits=(0, 5)), mask, scale], {})
    served = built.with_values_of(declared)
    assert served.canonical() == built.canonical()
    assert [spec.limits for spec in served.inputs] == [(0, 5), None, None]
    assert int(served.generate({"batch": 2, "length": 6}, seed=3)[0].max()) < 5 <= int(ids.values[1])  # type: ignore[index]
    again = served.narrowed({"length": (2, 3)}).with_values_of(built)
    assert (again.inputs, again.dimensions["length"]) == (built.inputs, Dimension(2, 3))
    with pytest.raises(LoadError, match="no input 'other', for which limits are declared"):
        built.with_values_of(Signature([InputSpec("other", "int64", (2,), limits=(0, 5))], {}))
