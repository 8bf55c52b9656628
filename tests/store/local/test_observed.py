"""Records of calls: small, bounded, atomic; a damaged one is as good as none."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from ts_handlers.model.declaration import Declaration, declare
from ts_handlers.model.observed_calls import ObservedCalls, call_kind
from ts_handlers.store.local.layout import OBSERVED
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.upkeep.garbage import OBSERVED_SECONDS, find_garbage

IDENTITY = "ab" * 16


def calls(*rows: int) -> ObservedCalls:
    found = ObservedCalls()
    for count in rows:
        found.add(*call_kind(torch.nn.Linear(4, 3), [torch.zeros(count, 4)], {}))
    return found


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_calls_are_added_to_those_that_are_known(store: LocalStore) -> None:
    assert store.read_calls(IDENTITY) is None
    before = time.time()
    assert store.add_calls(IDENTITY, calls(1, 2))
    first = store.read_calls(IDENTITY)
    assert first is not None
    assert before <= first.first <= time.time()
    assert store.add_calls(IDENTITY, calls(2, 3))
    record = LocalStore(store.root).read_calls(IDENTITY)
    assert record is not None
    assert (record.first, record.calls.count) == (first.first, 4)
    assert {tuple(shapes): count for shapes, count in record.calls.kinds()[0].shapes} == {
        ((1, 4),): 1,
        ((2, 4),): 2,
        ((3, 4),): 1,
    }


def test_a_declaration_is_read_as_it_was_written(store: LocalStore) -> None:
    assert store.read_declaration(IDENTITY) is None
    declaration = declare(calls(1, 2))
    assert store.write_declaration(IDENTITY, declaration)
    assert LocalStore(store.root).read_declaration(IDENTITY) == declaration


@pytest.mark.parametrize("name", ["calls", "declaration"])
def test_damage_and_records_of_others_are_not_used(
    name: str, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    def read(identity: str = IDENTITY) -> object:
        return store.read_calls(identity) if name == "calls" else store.read_declaration(identity)

    store.add_calls(IDENTITY, calls(1))
    store.write_declaration(IDENTITY, declare(calls(1, 2)))
    path = store.root / OBSERVED / IDENTITY / name
    whole = path.read_bytes()
    other = store.root / OBSERVED / ("cd" * 16) / name
    other.parent.mkdir()
    other.write_bytes(whole)
    assert read("cd" * 16) is None
    for index in range(0, len(whole), 7):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        assert read() is None
    path.write_bytes(b"")
    assert read() is None
    assert "is not used" in caplog.text
    path.write_bytes(whole)
    assert read() is not None


def test_what_settings_would_refuse_is_not_used(store: LocalStore) -> None:
    declaration = declare(calls(1, 2))
    store.write_declaration(IDENTITY, Declaration(declaration.inputs, {}))
    assert store.read_declaration(IDENTITY) is None


def test_a_store_that_cannot_be_written_says_so(store: LocalStore) -> None:
    (store.root / OBSERVED).write_text("in the way")
    assert not store.add_calls(IDENTITY, calls(1))
    assert not store.write_declaration(IDENTITY, declare(calls(1)))
    assert store.read_calls(IDENTITY) is None


def test_records_that_nobody_asks_for_are_garbage_after_long(store: LocalStore) -> None:
    store.write_declaration(IDENTITY, declare(calls(1)))
    folder = store.root / OBSERVED / IDENTITY
    assert find_garbage(store.root) == []
    old = time.time() - OBSERVED_SECONDS - 10
    os.utime(folder, (old, old))
    assert [item.path for item in find_garbage(store.root)] == [folder]
    assert store.read_declaration(IDENTITY) is not None
    assert find_garbage(store.root) == []
