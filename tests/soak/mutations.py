"""What the fuzzed targets share: changed bytes and changed JSON values, as hypothesis draws them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


class WrongError(AssertionError):
    """Something was accepted that must not be."""


Example = Callable[[st.DataObject], bool]
"""Does one example; returns whether it was refused."""


NAMES = ["", ".", "..", "../x", "/etc/passwd", "a\0b", "x" * 300, "code", "code/model.so/x", "manifest.json", "\ud800"]
NUMBERS = [0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, float("inf"), float("nan")]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(NAMES + NUMBERS)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def changed_json(data: st.DataObject, value: Any) -> Any:
    """A copy of a JSON value with a few of its parts replaced, removed, added or exchanged."""
    top = {"": json.loads(json.dumps(value))}
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(_places(top))
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        action = data.draw(st.sampled_from(["replace", "remove", "rename", "exchange", "wrap"]))
        if action == "remove" and container is not top:
            del container[key]
        elif action == "rename" and isinstance(container, dict) and container is not top:
            container[data.draw(st.sampled_from(NAMES) | st.text(max_size=5))] = container.pop(key)
        elif action == "exchange":
            other, second = places[data.draw(st.integers(0, len(places) - 1))]
            container[key] = json.loads(json.dumps(other[second]))
        elif action == "wrap":
            container[key] = [container[key]]
        else:
            container[key] = data.draw(values)
    return top[""]


def _places(value: Any) -> Any:
    found = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(found):
        yield value, key
        yield from _places(inner)


def changed_bytes(data: st.DataObject, raw: bytes) -> bytes:
    """A copy of some bytes with a few regions changed."""
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(0, len(raw) - 1)))
        end = min(len(raw), start + data.draw(st.integers(1, 64)))
        action = data.draw(st.sampled_from(["flip", "cut", "truncate", "zero", "double", "insert", "number"]))
        middle = {
            "flip": lambda part: bytes([part[0] ^ (1 << data.draw(st.integers(0, 7)))]) + part[1:] if part else b"",
            "cut": lambda part: b"",
            "truncate": lambda part: b"",
            "zero": lambda part: bytes(len(part)),
            "double": lambda part: part + part,
            "insert": lambda part: data.draw(st.binary(max_size=16)) + part,
            "number": lambda part: b"9" * len(part),
        }[action](raw[start:end])
        raw = raw[:start] + middle + (b"" if action == "truncate" else raw[end:])
    return raw


def dumps(value: Any) -> bytes:
    """JSON, with whatever Python's encoder lets through."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def fuzzed_json(data: st.DataObject, value: Any) -> bytes:
    """A JSON value as bytes, changed in one of the two ways."""
    return changed_bytes(data, dumps(value)) if data.draw(st.integers(0, 3)) == 0 else dumps(changed_json(data, value))


def tree(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {path.as_posix() for path in folder.rglob("*")}
