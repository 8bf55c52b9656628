"""Signature: a call is accepted exactly when it fits the declaration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_handlers.errors import InputError
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.signature import Signature

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
            shape[draw(st.integers(0, len(shape) - 1))] += draw(st.sampled_from([1, -1]))
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
    monkeypatch.setattr("ts_handlers.signature._REMEMBERED", 3)
    signature = Signature(SIGNATURE.inputs, SIGNATURE.dimensions)
    for _ in range(2):
        for length in range(2, 7):
            sizes = {"batch": 2, "length": length}
            assert signature.check(signature.generate(sizes)) == sizes
    assert len(signature._accepted) == 3
