"""Keys and stored values: equal inputs have equal keys, all others have others, and values come back as they were."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies

from ts_handlers.result_cache.keys import identity, request_key, row_keys, tensors_key
from ts_handlers.result_cache.replies import Reply, decode_reply, encode_reply

JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-(2**70), 2**70)
    | strategies.floats()
    | strategies.text(max_size=5)
    | strategies.binary(max_size=5),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=3), inner),
    max_leaves=8,
)


def test_two_images_whose_texts_are_equal_have_two_keys() -> None:
    """`hash(str(tensor))`, which a well-known example takes as the key, gives both one key."""
    one = torch.zeros(1, 3, 224, 224)
    other = one.clone()
    other[0, 1, 100, 100] = 1.0
    assert hash(str(one)) == hash(str(other))
    assert tensors_key(b"", ["x"], [one]) != tensors_key(b"", ["x"], [other])


def test_the_same_bytes_in_another_dtype_shape_or_input_are_another_key() -> None:
    zeros = torch.zeros(2, 4)
    different = [
        [("x", zeros)],
        [("x", zeros.reshape(4, 2))],
        [("x", torch.zeros(2, 4, dtype=torch.int32))],
        [("x", torch.zeros(1, 4, dtype=torch.float64))],
        [("y", zeros)],
        [("x", zeros[:1]), ("y", zeros[:1])],
        [("x", torch.zeros(2, 2, dtype=torch.bfloat16)), ("y", torch.zeros(2, 6, dtype=torch.bfloat16))],
    ]
    keys = {tensors_key(b"", [name for name, _ in each], [tensor for _, tensor in each]) for each in different}
    assert len(keys) == len(different)
    assert tensors_key(b"a", ["x"], [zeros]) != tensors_key(b"b", ["x"], [zeros])


def test_how_a_tensor_lies_in_memory_is_no_part_of_its_key() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    for same in (base.t().contiguous().t(), base.repeat(2, 1)[:3], base.clone().requires_grad_()):
        assert tensors_key(b"", ["x"], [same]) == tensors_key(b"", ["x"], [base])
    conjugate = torch.complex(base, base).conj()
    assert tensors_key(b"", ["x"], [conjugate]) == tensors_key(b"", ["x"], [conjugate.resolve_conj()])
    assert tensors_key(b"", ["x"], [conjugate]) != tensors_key(b"", ["x"], [conjugate.conj()])
    assert tensors_key(b"", ["x"], [torch.eye(3).to_sparse()]) is None


def test_the_key_of_a_row_is_that_of_a_call_with_this_row() -> None:
    ids, mask = torch.randint(0, 99, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    keys = row_keys(b"p", ["ids", "mask"], [ids, mask])
    assert keys == [tensors_key(b"p", ["ids", "mask"], [ids[row : row + 1], mask[row : row + 1]]) for row in range(3)]


@hypothesis.given(JSON, JSON)
def test_requests_have_one_key_exactly_if_they_are_the_same(one: Any, other: Any) -> None:
    def shown(value: Any) -> Any:
        """A value with its types and the order of its fields, which `==` leaves out."""
        if isinstance(value, dict):
            return [(name, shown(item)) for name, item in value.items()]
        if isinstance(value, list):
            return ("list", [shown(item) for item in value])
        return type(value).__name__, repr(value)

    same = request_key(b"", {"body": one}, []) == request_key(b"", {"body": other}, [])
    assert same == (shown(one) == shown(other))


def test_fields_and_headers_do_not_run_into_each_other() -> None:
    rows: list[Any] = [{"a": b"bc"}, {"ab": b"c"}, {"a": "bc"}, {"a": b"b", "c": b""}, b"bc", "bc", {"": b"bc"}, {}, []]
    headers = [[], [("a", "bc")], [("ab", "c")], [("a", "b"), ("c", "")]]
    keys = [request_key(b"", row, each) for row, each in itertools.product(rows, headers)]
    assert len(set(keys)) == len(keys)
    assert request_key(b"", {}, [("a", "1"), ("b", "2")]) == request_key(b"", {}, [("b", "2"), ("a", "1")])


@pytest.mark.parametrize("row", [{"body": object()}, {"body": torch.zeros(1)}, {"body": [object()]}, {1: b"a"}, (1,)])
def test_what_is_no_plain_data_has_no_key(row: Any) -> None:
    assert request_key(b"", row, []) is None


def test_endless_nesting_has_no_key() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    assert request_key(b"", {"body": nested}, []) is None


def test_each_fact_is_part_of_who_answers() -> None:
    facts = [("artifact", "a"), ("weights", "w")]
    assert identity(facts) == identity(list(facts))
    others = [[("artifact", "a")], [("artifact", "w"), ("weights", "a")], [("artifacta", ""), ("weights", "w")]]
    assert len({identity(each) for each in [facts, *others]}) == 4


@hypothesis.given(JSON)
def test_an_answer_comes_back_as_it_was_or_is_not_stored(answer: Any) -> None:
    stored = encode_reply(Reply(answer, phrase="Fine", headers={"a": "b"}))
    if stored is None:
        assert _has_large_number(answer) or "\\ud" in ascii(answer)
        return
    found = decode_reply(stored)
    assert found is not None
    assert (repr(found.answer), found.phrase, found.headers) == (repr(answer), "Fine", {"a": "b"})


def _has_large_number(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return any(map(_has_large_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**64


@pytest.mark.parametrize("answer", [object(), torch.zeros(2), [torch.zeros(1)], {1: "a"}, {"a": {2}}, "\ud800", 2**64])
def test_other_answers_are_not_stored(answer: Any) -> None:
    assert encode_reply(Reply(answer)) is None


def test_refusals_are_not_stored() -> None:
    assert encode_reply(Reply("no", status=503)) is None


@pytest.mark.parametrize("stored", [b"", b"\xc1", b"\x80", b"\x94\x02\xc0\x80\x01", b"\x94\x01\xc0\x81\x01\x02\x01"])
def test_other_bytes_are_no_answer(stored: bytes) -> None:
    assert decode_reply(stored) is None
