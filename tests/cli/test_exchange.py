"""keygen, push, pull, export and import: entries travel with their canaries, and only the accepted ones arrive."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Result
from tests.conftest import Register
from tests.support.file_backend import FileBackend
from tests.support.models import archive_source, settings_of
from ts_handlers import start_model
from ts_handlers.store.remote.sealed import SealedReader, seal
from ts_handlers.store.remote.signing import Keyring
from ts_handlers.store.upkeep.scan import scan_entries

Run = Callable[..., Result]


@pytest.fixture
def remote(tmp_path: Path) -> str:
    (tmp_path / "remote").mkdir()
    return f"file://{tmp_path}/remote"


@pytest.fixture
def keys(run: Run, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a pair of keys and returns the private one's path; the public one's ends with ``.pub``."""

    def make(name: str) -> Path:
        made = run("keygen", tmp_path / name, "--json")
        assert made.code == 0
        assert Path(made.json["public"]) == tmp_path / f"{name}.pub"
        return tmp_path / name

    return make


def outcomes(result: Result) -> list[tuple[str, int]]:
    return [(row["outcome"], row["canaries"]) for row in result.json]


@pytest.fixture
def start(archive: Path, register: Register) -> Callable[[Path], Any]:
    """Start the model of `filled` on a store and return how that ended."""
    register("aot_inductor", f"{FileBackend.__module__}:BACKEND")

    def run(store: Path) -> Any:
        settings = settings_of(store=str(store), backends=["aot_inductor"], on_miss="fail")
        return start_model(archive_source(archive, name="linear"), settings).outcome

    return run


def test_push_and_pull(
    run: Run, filled: Path, remote: str, tmp_path: Path, keys: Callable[[str], Path], start: Callable[[Path], Any]
) -> None:
    ours, other = keys("ours"), keys("other")
    sent = run("push", remote, "--store", filled, "--signing-key", ours, "--json")
    assert (sent.code, outcomes(sent)) == (0, [("done", 1)])
    again = run("push", remote, "--store", filled, "--signing-key", ours, "--json")
    assert (again.code, outcomes(again)) == (0, [("present", 0)])
    refused = run("pull", remote, "--store", tmp_path / "new", "--public-key", f"{other}.pub", "--json")
    assert (refused.code, outcomes(refused)) == (1, [("refused", 0)])
    assert "not among" in refused.json[0]["reason"]
    fetched = run("pull", remote, "--store", tmp_path / "new", "--public-key", f"{ours}.pub", "--json")
    assert (fetched.code, outcomes(fetched)) == (0, [("done", 1)])
    assert outcomes(run("pull", remote, "--store", tmp_path / "new", "--json")) == [("present", 0)]
    outcome = start(tmp_path / "new")
    assert (outcome.result, outcome.canary["source"]) == ("hit", "record")


def test_folders_above_the_store_can_be_trusted(run: Run, filled: Path, remote: str, tmp_path: Path) -> None:
    outer, bundle = tmp_path / "outer", tmp_path / "bundle"
    outer.mkdir()
    outer.chmod(0o777)
    filled = Path(shutil.move(filled, outer / "filled"))
    for index, verb in enumerate((("push", remote), ("export", bundle), ("pull", remote), ("import", bundle))):
        store = filled if verb[0] in ("push", "export") else outer / f"new-{index}"
        refused = run(*verb, "--store", store)
        assert refused.code == 3
        assert "--trust-folder" in refused.err
        assert run(*verb, "--store", store, "--trust-folder", tmp_path / "another").code == 3
        accepted = run(*verb, "--store", store, "--trust-folder", outer, "--json")
        assert (accepted.code, outcomes(accepted)) == (0, [("done", 1)])
    for verb in ("ls", "verify", "gc"):
        assert run(verb, "--store", filled).code == 3
        assert run(verb, "--store", filled, "--trust-folder", outer).code == 0


def test_client_of_the_remote_store(run: Run, filled: Path, remote: str, tmp_path: Path) -> None:
    assert run("push", remote, "--store", filled, "--client", "fsspec").code == 0
    wrong = run("pull", remote, "--store", tmp_path / "new", "--client", "obstore")
    assert wrong.code == 2
    assert "obstore serves s3, gs and abfs URLs" in wrong.err


def test_what_is_not_asked_for_stays(run: Run, filled: Path, remote: str, tmp_path: Path) -> None:
    for arguments in (("--model", "another"), ("--key", "zz")):
        assert run("push", remote, "--store", filled, "--json", *arguments).json == []
    assert run("push", remote, "--store", filled, "--model", "linear").code == 0
    assert run("pull", remote, "--store", tmp_path / "new", "--model", "another", "--json").json == []


def test_damaged_entry_is_not_sent(run: Run, filled: Path, remote: str) -> None:
    (path,) = (filled / "entries").rglob("second.json")
    path.write_text("damaged")
    sent = run("push", remote, "--store", filled, "--json")
    assert (sent.code, outcomes(sent)) == (1, [("failed", 0)])
    assert run("export", filled.parent / "bundle", "--store", filled).code == 3
    assert not (filled.parent / "bundle").exists()


def test_push_without_a_signing_key_where_signatures_are_asked_for(
    run: Run, filled: Path, remote: str, keys: Callable[[str], Path]
) -> None:
    failed = run("push", remote, "--store", filled, "--public-key", f"{keys('ours')}.pub")
    assert failed.code == 3
    assert "no signing key" in failed.err


def test_export_and_import(
    run: Run, filled: Path, tmp_path: Path, keys: Callable[[str], Path], start: Callable[[Path], Any]
) -> None:
    ours, other = keys("ours"), keys("other")
    bundle = tmp_path / "bundle"
    written = run("export", bundle, "--store", filled, "--signing-key", ours, "--json")
    assert (written.code, outcomes(written)) == (0, [("done", 1)])
    assert run("export", bundle, "--store", filled).code == 3  # no file is overwritten
    refused = run("import", bundle, "--store", tmp_path / "new", "--public-key", f"{other}.pub")
    assert refused.code == 4
    assert "not among" in refused.err
    assert not (tmp_path / "new" / "entries").exists()
    read = run("import", bundle, "--store", tmp_path / "new", "--public-key", f"{ours}.pub", "--json")
    assert (read.code, outcomes(read)) == (0, [("done", 1)])
    assert outcomes(run("import", bundle, "--store", tmp_path / "new", "--json")) == [("present", 0)]
    outcome = start(tmp_path / "new")
    assert (outcome.result, outcome.canary["source"]) == ("hit", "record")


def subjects(store: Path) -> list[str]:
    return [entry.model for entry in scan_entries(store) if entry.state == "ok"]


@pytest.mark.parametrize("transport", ["bundle", "remote"])
def test_two_names_of_one_model_travel_both(
    transport: str, run: Run, filled: Path, archive: Path, remote: str, tmp_path: Path, start: Callable[[Path], Any]
) -> None:
    """Models with the same content have one key; their entries lie at two addresses."""
    settings = settings_of(store=str(filled), backends=["aot_inductor"], strict=True)
    assert start_model(archive_source(archive, name="twin"), settings).outcome.result == "built"
    assert len({entry.key for entry in scan_entries(filled)}) == 1
    new = tmp_path / "new"
    if transport == "bundle":
        sent = run("export", tmp_path / "bundle", "--store", filled, "--json")
        fetched = run("import", tmp_path / "bundle", "--store", new, "--json")
    else:
        sent = run("push", remote, "--store", filled, "--json")
        fetched = run("pull", remote, "--store", new, "--json")
    assert [row["entry"].split("/")[0] for row in sent.json] == ["linear", "twin"]
    assert [(row["entry"].split("/")[0], row["outcome"]) for row in fetched.json] == [
        ("linear", "done"),
        ("twin", "done"),
    ]
    assert (fetched.code, subjects(new)) == (0, ["linear", "twin"])
    outcome = start(new)
    assert (outcome.result, outcome.canary["source"]) == ("hit", "record")


def test_an_older_bundle_is_imported(run: Run, filled: Path, tmp_path: Path) -> None:
    """Older versions wrote the canary records of a key behind each of its entries."""
    bundle, parts = tmp_path / "bundle", tmp_path / "parts"
    assert run("export", bundle, "--store", filled).code == 0
    parts.mkdir()
    with bundle.open("rb") as stream:
        SealedReader(stream, Keyring(), "bundle").extract(parts)
    (canary,) = parts.glob("canary-*")
    (parts / "canary-00009").write_bytes(canary.read_bytes())
    with bundle.open("wb") as target:
        seal(target, "bundle", "bundle", {path.name: path for path in parts.iterdir()}, Keyring())
    assert outcomes(run("import", bundle, "--store", tmp_path / "new", "--json")) == [("done", 1)]


@pytest.mark.parametrize("position", [30, 200, -1])
def test_damaged_bundle_publishes_nothing(position: int, run: Run, filled: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    run("export", bundle, "--store", filled)
    data = bytearray(bundle.read_bytes())
    data[position] ^= 1
    bundle.write_bytes(data)
    assert run("import", bundle, "--store", tmp_path / "new").code == 4
    assert not (tmp_path / "new" / "entries").exists()
    assert list((tmp_path / "new" / "staging").iterdir()) == []


def test_bundle_with_something_damaged_inside_publishes_nothing(run: Run, filled: Path, tmp_path: Path) -> None:
    """Whoever made the bundle put damaged bytes in; its own digests are right."""
    bundle, parts = tmp_path / "bundle", tmp_path / "parts"
    assert run("export", bundle, "--store", filled).code == 0
    parts.mkdir()
    with bundle.open("rb") as stream:
        SealedReader(stream, Keyring(), "bundle").extract(parts)
    (canary,) = parts.glob("canary-*")
    canary.write_bytes(canary.read_bytes()[:-1] + b"?")
    with bundle.open("wb") as target:
        seal(target, "bundle", "bundle", {path.name: path for path in parts.iterdir()}, Keyring())
    assert run("import", bundle, "--store", tmp_path / "new").code == 4
    assert scan_entries(tmp_path / "new") == []


def test_nothing_to_export(run: Run, filled: Path, tmp_path: Path) -> None:
    result = run("export", tmp_path / "bundle", "--store", filled, "--model", "another")
    assert result.code == 2
    assert not (tmp_path / "bundle").exists()


def test_keygen_overwrites_nothing(run: Run, keys: Callable[[str], Path], tmp_path: Path) -> None:
    keys("ours")
    assert run("keygen", tmp_path / "ours").code == 3
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o600


def test_wrong_addresses_are_usage_errors(run: Run, filled: Path, tmp_path: Path) -> None:
    assert run("push", "somewhere", "--store", filled).code == 2
    assert run("push", f"file://{tmp_path}", "--store", filled, "--option", "nonsense").code == 2
    unreachable = run("push", f"file://{tmp_path}/not-mounted", "--store", filled)
    assert unreachable.code == 3
    assert "make or mount it" in unreachable.err
