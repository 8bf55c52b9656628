"""What starts of several hosts fetch from a remote store and send to it, and what a local hit leaves alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import msgspec
import pytest

from tests.store.tiered.conftest import BUILT, FETCHED, Fleet, counters, notes, objects
from tests.support.file_backend import FileBackend
from tests.support.marks import needs_root
from tests.support.models import write_weights
from tests.support.subprocesses import run_python
from tests.support.tcp_proxy import Proxy
from ts_handlers.errors import LoadError
from ts_handlers.settings.sections import RemoteSettings

pytestmark = pytest.mark.usefixtures("backend")


def test_first_host_builds_and_others_fetch_the_entry_and_its_canary(fleet: Fleet) -> None:
    first = fleet.start("first")
    assert counters(first) == BUILT
    assert re.fullmatch(r".*: trust.public_keys is not set, [^;]*; ts-handlers keygen makes keys", notes(first))
    second = fleet.start("second")
    assert second.outcome.result == "hit"
    assert second.outcome.canary is not None
    assert second.outcome.canary["source"] == "record"  # no eager model was built
    assert counters(second) == FETCHED
    assert second.metrics.phases_ms["fetch"] > 0
    third = fleet.start("second")
    assert counters(third) == {"hit": 1}
    assert "fetch" not in third.metrics.phases_ms


def test_remote_hit_costs_one_request_for_each_object(shared: Fleet, s3: RemoteSettings, s3_port: int) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    shared.remote = msgspec.to_builtins(s3)
    shared.start("first")
    with Proxy(("127.0.0.1", s3_port)) as proxy:
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"}
        assert counters(shared.start("second", options=options)) == FETCHED
    wanted = [re.match(rb"GET /\S*prefix(?:/|%2F)(outside|entries|canaries)(?:/|%2F)", line) for line in proxy.requests]
    assert [found and found[1] for found in wanted] == [b"outside", b"entries", b"canaries"]


def test_new_weights_are_checked_by_one_host_for_all(shared: Fleet) -> None:
    shared.start("first")
    shared.start("second")
    write_weights(shared.archive, 7)
    assert counters(shared.start("second")) == {"hit": 1, "canary_recorded": 1, "write_back": 1}
    assert counters(shared.start("first")) == {"hit": 1}
    assert counters(shared.start("third")) == FETCHED


def test_local_hit_neither_asks_the_remote_nor_imports_anything_for_it(shared: Fleet) -> None:
    shared.start("host")
    shutil.rmtree(shared.root / "remote")
    assert counters(shared.start("host")) == {"hit": 1}
    code = """
        import json, sys
        import torch
        from tests.support.file_backend import use_file_backend
        from tests.support.models import archive_source, settings_of
        from ts_handlers import start_model
        use_file_backend()
        before = set(sys.modules)
        settings = settings_of(store=sys.argv[2], backends=["aot_inductor"], remote=json.loads(sys.argv[3]))
        model = start_model(archive_source(sys.argv[1]), settings)
        print(json.dumps([model.outcome.result, sorted(set(sys.modules) - before)]))
    """
    remote = {**shared.remote, "lease": "redis://127.0.0.1:1/0"}
    result, modules = json.loads(run_python(code, shared.archive, shared.root / "host", json.dumps(remote)))
    assert result == "hit"
    heavy = {"fsspec", "obstore", "redis", "cryptography", "s3fs", "filelock", "ts_handlers.store.remote.redis_lease"}
    assert not {name.partition(".")[0] for name in modules} & heavy


def test_read_only_host_takes_and_gives_nothing(shared: Fleet) -> None:
    alone = {name: count for name, count in BUILT.items() if name != "write_back"}
    assert counters(shared.start("reader", read_only=True)) == alone
    assert objects(shared, "") == []
    shared.start("writer")
    before = objects(shared, "")
    assert counters(shared.start("another reader", read_only=True)) == FETCHED
    assert objects(shared, "") == before


def test_entry_that_is_damaged_here_is_fetched_again(shared: Fleet) -> None:
    shared.start("first")
    (path,) = (shared.root / "first" / "entries").rglob("second.json")
    path.write_text("damaged")
    again = shared.start("first")
    assert again.outcome.result == "hit"
    assert counters(again) == {**FETCHED, "corrupt": 1}
    assert "damaged entry, fetched again" in notes(again)


def test_entry_that_does_not_load_here_is_built_here_and_fetched_once(shared: Fleet, backend: FileBackend) -> None:
    shared.start("first")
    backend.load_errors.append(LoadError("undefined symbol"))
    second = shared.start("second")
    assert second.outcome.result == "built"
    assert counters(second)["remote_hit"] == 1
    assert counters(shared.start("second")) == {"hit": 1}


@pytest.mark.parametrize("lease", ["auto", "off", pytest.param("redis", marks=pytest.mark.services)])
def test_every_kind_of_lease(lease: str, shared: Fleet, request: pytest.FixtureRequest) -> None:
    value = request.getfixturevalue("redis_url") if lease == "redis" else lease
    assert counters(shared.start("first", lease=value)) == BUILT
    assert counters(shared.start("second", lease=value)) == FETCHED
    signs = [path.read_bytes() for path in objects(shared, "leases") if path.suffix == ".sign"]
    assert signs == ([b"released"] if lease == "auto" else [])


def test_file_system_without_exclusive_create_is_read_only(shared: Fleet) -> None:
    model = shared.start("host", url="memory://somewhere")
    assert model.outcome.result == "built"
    assert counters(model)["write_back_failed"] == 2
    assert "no atomic create" in notes(model)


@needs_root
def test_read_only_store_is_served_from_the_remote(shared: Fleet) -> None:
    shared.start("first")
    disk = shared.root / "disk"
    (disk).mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700,ro", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        model = shared.start("disk")
        assert model.outcome.result == "hit"
        assert counters(model)["remote_hit"] == 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
