"""Sealed files: the same bytes for the same contents, and nothing outside what a checked header lists is ever made."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ts_handlers.errors import RefusedError, StoreError
from ts_handlers.settings.sections import TrustSettings
from ts_handlers.store.remote.sealed import MAGIC, SealedReader, check_name, seal
from ts_handlers.store.remote.signing import Keyring, load_keyring

FILES: dict[str, Path | bytes] = {"manifest.json": b"{}", "code/model.so": bytes(range(256)) * 5, "empty": b""}


def trust(keys: Path, accepted: str, signing: str | None) -> Keyring:
    public = tuple(str(keys / f"{name}.pub") for name in accepted)
    return load_keyring(TrustSettings(public, None if signing is None else str(keys / f"{signing}.key")))


def sealed(trust: Keyring | None = None, files: dict[str, Path | bytes] | None = None, subject: str = "it") -> bytes:
    target = io.BytesIO()
    seal(target, "entry", subject, FILES if files is None else files, trust or Keyring())
    return target.getvalue()


def by_hand(header: Any, body: bytes = b"", signature: bytes = b"-") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    digest = hashlib.sha256(MAGIC + raw).hexdigest().encode()
    return MAGIC + b"%d\n" % len(raw) + raw + b"\n" + digest + b" " + signature + b"\n" + body


def extract(data: bytes, directory: Path, trust: Keyring | None = None, subject: str = "it") -> None:
    SealedReader(io.BytesIO(data), trust or Keyring(), "entry", subject).extract(directory)


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    (tmp_path / "model.so").write_bytes(bytes(range(256)) * 5)
    (tmp_path / "out").mkdir()
    data = sealed(files={**FILES, "code/model.so": tmp_path / "model.so"})
    assert data == sealed() == sealed(files=dict(reversed(FILES.items())))
    extract(data, tmp_path / "out")
    assert tree(tmp_path / "out") == FILES
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()} == {0o600}
    SealedReader(io.BytesIO(data), Keyring(), "entry").verify()


def test_signed_files_are_the_same_bytes_too_and_are_accepted(keys: Path, tmp_path: Path) -> None:
    data = sealed(trust(keys, "", "a"))
    assert data == sealed(trust(keys, "", "a"))
    extract(data, tmp_path, trust(keys, "ba", None))
    assert tree(tmp_path) == FILES


@pytest.mark.parametrize(
    ("signing", "accepted", "reason"),
    [
        (None, "a", r"not signed.*public_keys"),
        ("b", "a", r"signed with the key [0-9a-f]{16}, which is not among.*add that key"),
    ],
)
def test_unsigned_and_foreign_files_are_refused(
    signing: str | None, accepted: str, reason: str, keys: Path, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=reason):
        extract(sealed(trust(keys, "", signing)), tmp_path, trust(keys, accepted, None))
    assert tree(tmp_path) == {}
    extract(sealed(trust(keys, "", signing)), tmp_path)  # without public keys anything is accepted


def test_rotation_accepts_old_and_new_and_then_only_new(keys: Path, tmp_path: Path) -> None:
    old, new = sealed(trust(keys, "", "a")), sealed(trust(keys, "", "b"))
    for name, data in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        extract(data, tmp_path / name, trust(keys, "ab", "b"))
    with pytest.raises(RefusedError, match="not among"):
        SealedReader(io.BytesIO(old), trust(keys, "b", "b"), "entry")


def test_signature_of_one_file_does_not_fit_another(keys: Path) -> None:
    signed, other = sealed(trust(keys, "", "a")), sealed(subject="other")
    signature = signed[len(MAGIC) :].split(b"\n")[2].split(b" ", 1)[1]
    raw = other[len(MAGIC) :].split(b"\n")[1]
    with pytest.raises(RefusedError, match="changed after it was signed"):
        SealedReader(io.BytesIO(by_hand(raw, signature=signature)), trust(keys, "a", None), "entry")
    for forged in (base64.b64encode(bytes(64)), b"no base64", b"", base64.b64encode(b"short"), b"A" * 88):
        line = signature.split(b" ")[0] + b" " + forged
        with pytest.raises(RefusedError, match=r"changed after it was signed|no signature of this format"):
            SealedReader(io.BytesIO(by_hand(raw, signature=line)), trust(keys, "a", None), "entry")


def test_nothing_is_interpreted_before_the_signature_was_right(keys: Path) -> None:
    with pytest.raises(RefusedError, match="not signed"):
        SealedReader(io.BytesIO(by_hand(b"not even JSON")), trust(keys, "a", None), "entry")


def test_an_object_is_not_passed_off_as_another_one() -> None:
    with pytest.raises(RefusedError, match=r"of 'it', expected 'that'"):
        SealedReader(io.BytesIO(sealed()), Keyring(), "entry", "that")
    with pytest.raises(RefusedError, match=r"kind 'canary', found 'entry'"):
        SealedReader(io.BytesIO(sealed()), Keyring(), "canary", "it")


DIGEST = "0" * 64
BAD_NAMES = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "",
    ".",
    "a//b",
    "a/./b",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 300,
    "a/",
    "é" * 200,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_plain_relative_paths_are_refused(name: str, tmp_path: Path) -> None:
    data = by_hand({"kind": "entry", "subject": "it", "files": {name: {"size": 1, "sha256": DIGEST}}}, b"x")
    with pytest.raises(RefusedError, match="not a plain relative path"):
        extract(data, tmp_path)
    assert tree(tmp_path) == {}


def _records(**files: int) -> dict[str, Any]:
    return {"kind": "entry", "subject": "it", "files": {n: {"size": s, "sha256": DIGEST} for n, s in files.items()}}


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "another format": (b"PK\x03\x04" * 10, "not a sealed file"),
    "no number": (MAGIC + b"-1\n", "not a number"),
    "huge header": (MAGIC + b"9" * 20 + b"\n", "too long"),
    "no JSON": (by_hand(b"{"), "header is damaged"),
    "deep JSON": (by_hand(b"[" * 100_000), "header is damaged"),
    "no UTF-8": (by_hand(b'{"kind": "\xff"}'), "header is damaged"),
    "unknown field": (by_hand({**_records(), "mode": 0o777}), "header is damaged"),
    "negative size": (by_hand(_records(a=-1)), "is no size"),
    "file and folder": (
        by_hand({**_records(), "files": {n: {"size": 0, "sha256": DIGEST} for n in ("a", "a/b")}}),
        "both",
    ),
    "too many files": (by_hand(_records(**{f"f{i}": 0 for i in range(70_000)})), "at most"),
    "extended": (sealed() + b"x", "after its last file"),
    "truncated": (sealed()[:-1], "truncated"),
    "flipped": (sealed()[:-1] + b"x", "digest differs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_their_reason(name: str, tmp_path: Path) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(RefusedError, match=reason):
        extract(data, tmp_path)
    assert set(tree(tmp_path)) <= set(FILES)


def test_size_bombs_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{1 << 60} bytes are needed"):
        extract(by_hand(_records(bomb=1 << 60)), tmp_path)
    with pytest.raises(RefusedError, match="at most 100 bytes"):
        SealedReader(io.BytesIO(by_hand(_records(bomb=101), bytes(101))), Keyring(), "entry").read("bomb", 100)
    assert tree(tmp_path) == {}


def test_links_in_the_target_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "empty").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="cannot be made"):
        extract(sealed(), tmp_path / "target")
    assert not (tmp_path / "outside").exists()


def test_a_file_that_changes_while_it_is_sealed_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ts_handlers.store.remote import sealed as module

    (tmp_path / "file").write_bytes(b"before")
    record = module._record

    def change(source: Path | bytes) -> Any:
        found = record(source)
        (tmp_path / "file").write_bytes(b"after")
        return found

    monkeypatch.setattr(module, "_record", change)
    with pytest.raises(StoreError, match="changed while it was read"):
        sealed(files={"file": tmp_path / "file"})


def _check_damage(data: bytes, expected: dict[str, Any], trust: Keyring | None = None) -> None:
    """Whatever `data` is: either the very files come out, or it is refused and nothing unlisted was made."""
    outer = Path(os.environ["PYTEST_FUZZ_FOLDER"])
    shutil.rmtree(outer, ignore_errors=True)
    (outer / "inner").mkdir(parents=True)
    try:
        extract(data, outer / "inner", trust)
    except (RefusedError, StoreError):
        assert set(tree(outer / "inner")) <= set(expected)
    else:
        assert tree(outer / "inner") == expected
    assert [path.name for path in outer.iterdir()] == ["inner"]
    assert not any(path.is_symlink() for path in outer.rglob("*"))


@pytest.fixture(autouse=True)
def _fuzz_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_FUZZ_FOLDER", str(tmp_path / "fuzz"))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_no_flipped_bit_changes_what_comes_out(signed: bool, position: int, bit: int, keys: Path) -> None:
    both = trust(keys, "a", "a") if signed else Keyring()
    data = bytearray(sealed(both))
    data[position % len(data)] ^= 1 << bit
    _check_damage(bytes(data), FILES, both)


@given(st.integers(0, 10**9))
def test_every_truncation_is_refused(length: int) -> None:
    data = sealed()
    with pytest.raises(RefusedError, match="truncated"):
        SealedReader(io.BytesIO(data[: length % len(data)]), Keyring(), "entry").verify()
    _check_damage(data[: length % len(data)], FILES)


@given(st.dictionaries(st.text(max_size=12), st.tuples(st.integers(-2, 20), st.binary(max_size=20)), max_size=4))
def test_any_header_is_obeyed_inside_the_folder_or_refused(files: dict[str, tuple[int, bytes]]) -> None:
    header = {
        "kind": "entry",
        "subject": "it",
        "files": {
            name: {"size": size, "sha256": hashlib.sha256(data).hexdigest()} for name, (size, data) in files.items()
        },
    }
    body = b"".join(files[name][1] for name in sorted(files))
    _check_damage(by_hand(header, body), {name: data for name, (_, data) in files.items()})


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    _check_damage(data, {})
    _check_damage(MAGIC + data, {})
    _check_damage(by_hand(data), {})


@given(st.text(min_size=1, max_size=30))
def test_accepted_names_stay_inside(name: str) -> None:
    try:
        check_name(name)
    except RefusedError:
        return
    folder = "/some/where"
    assert os.path.normpath(os.path.join(folder, name)) == f"{folder}/{name}"


def test_openssl_reads_the_keys(keys: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    command = ["openssl", "pkey", "-in", str(keys / "a.key"), "-pubout"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (keys / "a.pub").read_text()
