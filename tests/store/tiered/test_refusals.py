"""What a host refuses of a remote store: unsigned, foreign, damaged or moved objects."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.tiered.conftest import FETCHED, Fleet, counters, notes, objects, trust
from tests.support.entries import address, publish
from ts_handlers.errors import RefusedError, SettingsError
from ts_handlers.settings.sections import TrustSettings
from ts_handlers.store.address import entry_path
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.remote.sealed import MAGIC
from ts_handlers.store.remote.signing import load_keyring
from ts_handlers.store.remote.transfer import seal_entry, unseal_entry

pytestmark = pytest.mark.usefixtures("backend")


def test_signed_entries_are_accepted_and_others_refused_and_built_again(shared: Fleet, keys: Path) -> None:
    shared.start("unsigned")
    signed = shared.start("signed", trust(keys, "a", "a"))
    assert signed.outcome.result == "built"
    assert counters(signed)["remote_refused"] == 3  # the entry, before and under the lease, and the canary
    assert counters(signed)["write_back"] == 2
    assert "not signed" in notes(signed)
    assert [path.suffix for path in objects(shared, "entries")] == [".0", ".1"]
    follower = shared.start("follower", trust(keys, "ab"))
    assert counters(follower)["remote_hit"] == 1
    assert counters(follower)["remote_refused"] == 2  # entry and canary of the unsigned host
    foreign = shared.start("foreign", trust(keys, "b", "b"))
    assert foreign.outcome.result == "built"
    assert "not among" in notes(foreign)
    assert shared.start("anything goes").outcome.result == "hit"


def test_rotation(shared: Fleet, keys: Path) -> None:
    shared.start("old", trust(keys, "a", "a"))
    assert counters(shared.start("both", trust(keys, "ab", "b"))) == FETCHED
    new = shared.start("new", trust(keys, "b", "b"))
    assert new.outcome.result == "built"
    assert shared.start("new too", trust(keys, "b")).outcome.result == "hit"
    assert counters(shared.start("still old", trust(keys, "a"))) == FETCHED


def test_host_that_cannot_sign_sends_nothing_where_signatures_are_required(shared: Fleet, keys: Path) -> None:
    model = shared.start("host", trust(keys, "a"))
    assert model.outcome.result == "built"
    assert "signing_key is not" in notes(model)
    assert objects(shared, "") == []


def test_wrong_key_file_is_a_mistake_of_the_settings(shared: Fleet, tmp_path: Path) -> None:
    (tmp_path / "nonsense.pub").write_text("nonsense")
    with pytest.raises(SettingsError, match=r"public_keys\[0\].*no public key"):
        shared.start("host", {"public_keys": [str(tmp_path / "nonsense.pub")]})


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


TAMPERED: dict[str, Callable[[bytes], bytes]] = {
    "file": lambda data: _flip(data, len(data) - 1),
    "header": lambda data: _flip(data, len(MAGIC) + 100),
    "truncated": lambda data: data[:-10],
    "extended": lambda data: data + b"x",
    "emptied": lambda data: b"",
    "another kind of file": lambda data: b"PK\x03\x04" + bytes(5000),
}


@pytest.mark.parametrize("change", TAMPERED)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_tampered_entry_is_refused_counted_and_built_again(
    change: str, signed: bool, shared: Fleet, keys: Path
) -> None:
    section = trust(keys, "a", "a") if signed else {}
    shared.start("first", section)
    (path,) = objects(shared, "entries")
    path.write_bytes(TAMPERED[change](path.read_bytes()))
    tampered = path.read_bytes()
    second = shared.start("second", section)
    assert second.outcome.result == "built"
    assert second.outcome.fallbacks == ()
    assert counters(second)["remote_refused"] == 2
    assert "refused from the remote" in notes(second)
    assert path.read_bytes() == tampered  # nothing is replaced; the good object stands beside it
    assert counters(shared.start("third", section))["remote_hit"] == 1
    assert list((shared.root / "second" / "staging").iterdir()) == []


def test_entry_moved_to_another_address_is_refused(shared: Fleet) -> None:
    shared.start("first")
    (path,) = objects(shared, "entries")
    write = shared.archive / "model.py"
    write.write_text(write.read_text().replace("torch.nn.Linear(4, 3)", "torch.nn.Linear(4, 3) "))
    shared.start("second")
    (other,) = (found for found in objects(shared, "entries") if found != path)
    shutil.copy(path, other)
    third = shared.start("third")
    assert third.outcome.result == "built"
    assert "expected 'model/" in notes(third)


def test_a_signed_entry_of_another_key_is_refused_under_this_address(keys: Path, tmp_path: Path) -> None:
    """As a host with the signing key could make it by mistake."""
    keyring = load_keyring(TrustSettings((str(keys / "a.pub"),), str(keys / "a.key")))
    directory = publish(LocalStore(tmp_path / "store"), address())
    (tmp_path / "unpacked").mkdir()
    target, wanted = io.BytesIO(), entry_path(address(options="another"))
    seal_entry(target, directory, wanted, keyring)
    with pytest.raises(RefusedError, match=rf"its manifest's key is {address().key.digest}, its address '{wanted}'"):
        unseal_entry(io.BytesIO(target.getvalue()), tmp_path / "unpacked", wanted, keyring)


def test_tampered_canary_is_refused_and_recorded_again(shared: Fleet) -> None:
    shared.start("first")
    (path,) = objects(shared, "canaries")
    path.write_bytes(_flip(path.read_bytes(), len(path.read_bytes()) - 1))
    second = shared.start("second")
    assert second.outcome.result == "hit"
    assert counters(second) == {**FETCHED, "remote_refused": 1, "canary_recorded": 1, "write_back": 1}
    assert counters(shared.start("third")) == {**FETCHED, "remote_refused": 1}


def test_a_remote_without_keys_is_named_once(shared: Fleet, keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    unsigned = "trust.public_keys is not set, so whoever can write there can run code here"
    assert notes(shared.start("host")).count(unsigned) == 1
    assert [record.levelname for record in caplog.records if unsigned in record.getMessage()] == ["WARNING"]
    caplog.clear()
    assert unsigned not in notes(shared.start("other", trust(keys, "a", "a")))
    assert unsigned not in caplog.text


def test_an_object_that_is_no_file_costs_one_key_and_not_the_remote(shared: Fleet) -> None:
    shared.start("first")
    (entry,) = objects(shared, "entries")
    entry.unlink()
    os.mkfifo(entry)
    model = shared.start("second")
    assert model.outcome.result == "built"
    assert (counters(model)["remote_refused"], counters(model)["write_back"]) == (2, 1)
    assert "going on alone" not in notes(model)
    assert counters(shared.start("third"))["remote_hit"] == 1
