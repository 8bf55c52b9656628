"""Which entries go, and that nobody who uses one loses it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.entries import address, publish
from ts_handlers.store.base import Hit, Miss
from ts_handlers.store.local.pins import pin
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.usage import in_use, record_use
from ts_handlers.store.upkeep import eviction
from ts_handlers.store.upkeep.eviction import Candidate, Eviction, EvictionPlan, Quotas, evict, find_candidates, plan
from ts_handlers.store.upkeep.space import make_room, make_room_in_background

NO_QUOTAS = Quotas()


def candidates_of(rows: list[tuple[str, int, int, int, str | None]]) -> list[Candidate]:
    return [
        Candidate(Path(f"/{index}"), model, str(index), size, inodes, float(used), kept)
        for index, (model, size, inodes, used, kept) in enumerate(rows)
    ]


CANDIDATES = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(0, 50),
        st.integers(1, 9),
        st.integers(0, 5),
        st.sampled_from([None, None, None, "pinned", "in use"]),
    ),
    max_size=14,
).map(candidates_of)
BOUND = st.none() | st.integers(0, 120)
QUOTAS = st.builds(Quotas, BOUND, st.none() | st.integers(0, 8), BOUND)


def after(candidates: list[Candidate], planned: EvictionPlan) -> list[Candidate]:
    gone = {item.candidate.directory for item in planned.evictions}
    return [candidate for candidate in candidates if candidate.directory not in gone]


@given(CANDIDATES, QUOTAS, QUOTAS)
def test_plan_keeps_the_quotas_or_says_why_not(candidates: list[Candidate], store: Quotas, per_model: Quotas) -> None:
    planned = plan(candidates, store, per_model)
    evicted = [item.candidate for item in planned.evictions]
    assert len({candidate.directory for candidate in evicted}) == len(evicted)
    assert all(candidate.kept_because is None for candidate in evicted)
    left = after(candidates, planned)
    scopes = [("the store", store, left)]
    for model in {candidate.model for candidate in candidates}:
        scopes.append((f"model {model} ", per_model, [candidate for candidate in left if candidate.model == model]))
    for name, limits, inside in scopes:
        if limits.exceeded_by(inside) is not None:
            assert all(candidate.kept_because for candidate in inside)
            assert any(text.startswith(name) for text in planned.unmet)


@given(CANDIDATES, QUOTAS, QUOTAS)
def test_plan_evicts_nothing_needlessly_and_the_least_recently_used_first(
    candidates: list[Candidate], store: Quotas, per_model: Quotas
) -> None:
    remaining = list(candidates)
    for item in plan(candidates, store, per_model).evictions:
        victim = item.candidate
        whole = item.reason.startswith("the store")
        inside = [candidate for candidate in remaining if whole or candidate.model == victim.model]
        assert (store if whole else per_model).exceeded_by(inside) is not None
        evictable = [candidate for candidate in inside if candidate.kept_because is None]
        assert victim.last_used == min(candidate.last_used for candidate in evictable)
        remaining.remove(victim)


@given(CANDIDATES, QUOTAS, QUOTAS, st.randoms())
def test_plan_does_not_depend_on_the_order_of_what_was_found(
    candidates: list[Candidate], store: Quotas, per_model: Quotas, random: st.random_module
) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(shuffled, store, per_model) == plan(candidates, store, per_model)


@given(CANDIDATES)
def test_plan_without_quotas_does_nothing(candidates: list[Candidate]) -> None:
    assert plan(candidates, NO_QUOTAS, NO_QUOTAS) == EvictionPlan((), ())


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def fill_store(store: LocalStore, count: int, model: str = "m") -> list[Path]:
    """Entries that nobody uses, the first one used longest ago."""
    directories = []
    for index in range(count):
        where = address(model, device=f"{model}{index}")
        directories.append(publish(store, where))
        os.utime(directories[-1], (1000, 1000))
        record_use(store.root, where.key.digest)
        os.utime(store.root / "usage" / where.key.digest, (2000 + index, 2000 + index))
    store.close()
    return directories


def test_quota_of_entries_evicts_the_least_recently_used_and_what_belongs_to_it(store: LocalStore) -> None:
    directories = fill_store(store, 4)
    where = address(device="m0")
    store.write_canary(where, "w", {"cases": []})
    report = make_room(store.root, Quotas(entries=2), NO_QUOTAS)
    assert [path.exists() for path in directories] == [False, False, True, True]
    assert len(report.done) == 2
    assert report.freed_bytes > 2 * 2048
    assert not (store.root / "canaries" / where.key.digest).exists()
    assert not (store.root / "usage" / where.key.digest).exists()
    assert list((store.root / "trash").iterdir()) == []
    assert isinstance(store.lookup(where), Miss)
    assert isinstance(store.lookup(address(device="m3")), Hit)


def test_quota_of_each_model_leaves_the_others_alone(store: LocalStore) -> None:
    first, second = fill_store(store, 3, "first"), fill_store(store, 1, "second")
    make_room(store.root, NO_QUOTAS, Quotas(entries=1))
    assert [path.exists() for path in first + second] == [False, False, True, True]


def test_dry_run_says_the_same_and_removes_nothing(store: LocalStore) -> None:
    directories = fill_store(store, 3)
    said = make_room(store.root, Quotas(bytes=0), NO_QUOTAS, dry_run=True)
    assert all(path.exists() for path in directories)
    assert make_room(store.root, Quotas(bytes=0), NO_QUOTAS) == said
    assert not any(path.exists() for path in directories)


def test_model_folders_go_with_their_last_entry(store: LocalStore) -> None:
    fill_store(store, 1)
    make_room(store.root, Quotas(entries=0), NO_QUOTAS)
    assert list((store.root / "entries").iterdir()) == []


def test_pinned_entry_and_entry_in_use_stay_and_the_quota_is_reported(store: LocalStore) -> None:
    directories = fill_store(store, 3)
    pin(store.root, directories[0].name, "production")
    reader = LocalStore(store.root)
    assert isinstance(reader.lookup(address(device="m1")), Hit)
    report = make_room(store.root, Quotas(entries=0), NO_QUOTAS)
    assert [path.exists() for path in directories] == [True, True, False]
    assert report.unmet == ("the store exceeds its quota of entries: 2 of 0; the rest is pinned or in use",)


def test_entry_that_was_in_use_at_the_last_collection_is_not_the_oldest(store: LocalStore) -> None:
    directories = fill_store(store, 2)
    reader = LocalStore(store.root)
    assert isinstance(reader.lookup(address(device="m0")), Hit)
    os.utime(store.root / "usage" / directories[0].name, (1, 1))  # the process has been reading it for long
    make_room(store.root, Quotas(entries=2), NO_QUOTAS)
    reader.close()
    make_room(store.root, Quotas(entries=1), NO_QUOTAS)
    assert [path.exists() for path in directories] == [True, False]


def _use(store: LocalStore) -> None:
    assert isinstance(store.lookup(address(device="m0")), Hit)
    store.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_use, "used since"),
        (lambda store: pin(store.root, address(device="m0").key.digest), "pinned"),
        (lambda store: store.lookup(address(device="m0")), "in use"),
        (lambda store: shutil.rmtree(store.root / "entries"), None),
    ],
    ids=["used", "pinned", "locked", "gone"],
)
def test_what_happens_after_the_plan_is_respected(
    change: Callable[[LocalStore], object], reason: str | None, store: LocalStore
) -> None:
    fill_store(store, 1)
    (candidate,) = find_candidates(store.root)
    change(store)
    assert evict(store.root, Eviction(candidate, "a reason")) == reason


def test_another_entry_goes_for_one_that_turns_out_to_be_in_use(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = fill_store(store, 3)
    reader = LocalStore(store.root)

    def in_use_afterwards(directory: Path) -> bool:
        busy = in_use(directory)
        if directory == directories[0]:
            reader.lookup(address(device="m0"))
        return busy

    monkeypatch.setattr(eviction, "in_use", in_use_afterwards)
    report = make_room(store.root, Quotas(entries=2), NO_QUOTAS)
    assert [path.exists() for path in directories] == [True, False, True]
    assert [step.refusal for step in report.steps] == ["in use", None]


def test_publisher_whose_folders_are_removed_makes_them_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eviction removes the empty folders above an entry just before another one is renamed into them."""
    rename, removed = os.rename, []

    def rename_after_eviction(source: Path, target: Path) -> None:
        if not removed:
            removed.append(target)
            target.parent.rmdir()
        rename(source, target)

    monkeypatch.setattr("ts_handlers.store.local.store.os.rename", rename_after_eviction)
    publish(store, address())
    assert len(removed) == 1
    assert isinstance(store.lookup(address()), Hit)


def test_background_collection_fails_nobody(store: LocalStore, caplog: pytest.LogCaptureFixture) -> None:
    from ts_handlers.settings.sections import Quota, SpaceSettings

    fill_store(store, 3)
    reports = []
    make_room_in_background(store.root, SpaceSettings(store=Quota(entries=1)), reports.append).join()
    assert [len(report.done) for report in reports] == [2]
    make_room_in_background(store.root, SpaceSettings(store=Quota(bytes="no size")), reports.append).join()
    assert len(reports) == 1
    assert "could not be tidied" in caplog.text
