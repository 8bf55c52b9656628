"""Hosts that lose their network, get it back, or have a slow one: real links between network namespaces."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.store.conftest import PATIENT_SECONDS
from tests.support.file_backend import START
from tests.support.models import eager_model
from tests.support.network_hosts import Network, network, s3_server
from tests.support.subprocesses import finish
from tests.support.workers import wait_until

pytestmark = pytest.mark.processes

KEYS = {"key": "test-access-key", "secret": "test-secret-key"}
HOSTS = ("a", "b")


class Hosts:
    """Starts the archive's model on hosts, each with a store of its own."""

    def __init__(self, found: Network, url: str, archive: Path, root: Path) -> None:
        self.network = found
        self.root = root
        self._archive = archive
        region = {"client_kwargs": {"region_name": "us-east-1"}}
        self.remote = {"url": "s3://bucket/x", "options": {**KEYS, **region, "endpoint_url": url}}

    def begin(self, host: str, *, seconds: float = PATIENT_SECONDS, **env: str) -> subprocess.Popen[str]:
        remote = {**self.remote, "heartbeat_seconds": 0.8, "timeout_seconds": seconds}
        log = str(self.root / f"builds-{host}")
        store = self.root / f"store-{host}"
        return self.network.start(
            host, START, self._archive, store, json.dumps({"remote": remote}), BUILD_LOG=log, **env
        )

    def end(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """What `describe` says in the end."""
        facts: dict[str, Any] = json.loads(finish(process).splitlines()[-1])
        with torch.inference_mode():
            expected = eager_model(self._archive)(torch.ones(2, 4))
        assert torch.allclose(torch.tensor(facts["answer"]), expected, atol=1e-5)
        assert facts["fallbacks"] == []
        return facts

    def wait_for_build(self, host: str, process: subprocess.Popen[str]) -> None:
        log = self.root / f"builds-{host}"
        while not log.exists() or "begin" not in log.read_text():
            assert process.poll() is None, process.communicate()[1]

    def has_failed(self, host: str) -> bool:
        """Whether the host has given the remote up for now."""
        return self._failures(host) != []

    def forget_failures(self, host: str) -> None:
        """What the pause after a failure does, without waiting for it."""
        for state in self._failures(host):
            state.unlink()

    def _failures(self, host: str) -> list[Path]:
        return list((self.root / f"store-{host}" / "remote").glob("*.json"))


@pytest.fixture
def hosts(archive: Path, tmp_path: Path) -> Iterator[Hosts]:
    pytest.importorskip("moto.server", reason="moto is not installed")
    with network(*HOSTS) as found, s3_server(found, *KEYS.values()) as url:
        yield Hosts(found, url, archive, tmp_path)


LOOK = """
    import hashlib, json, sys
    from ts_handlers.settings.sections import RemoteSettings
    from ts_handlers.store.remote.objects import RemoteObjects
    settings = json.loads(sys.argv[1])
    remote = RemoteObjects(RemoteSettings(**settings), None)
    names = remote.list("", recursive=True)
    print(json.dumps({name: hashlib.sha256(remote.get(name)).hexdigest() for name in names}))
"""


def objects(hosts: Hosts, host: str) -> dict[str, str]:
    """Digests of the entries and canary records in the remote store, as a host sees them."""
    found: dict[str, str] = json.loads(finish(hosts.network.start(host, LOOK, json.dumps(hosts.remote))))
    return {name: digest for name, digest in found.items() if name.startswith(("entries/", "canaries/"))}


def counters(facts: dict[str, Any], *names: str) -> list[int]:
    return [facts["counters"][name] for name in names]


def test_builder_that_is_cut_off_is_taken_over_and_changes_nothing_when_it_comes_back(hosts: Hosts) -> None:
    gate = hosts.root / "gate"
    first = hosts.begin("a", seconds=8.0, BUILD_UNTIL=str(gate))
    hosts.wait_for_build("a", first)
    hosts.network.cut("a")

    second = hosts.end(hosts.begin("b"))
    assert second["result"] == "built"
    assert counters(second, "takeover", "write_back", "remote_failed") == [1, 2, 0]
    published = objects(hosts, "b")
    assert sorted(name.partition("/")[0] for name in published) == ["canaries", "entries"]

    assert wait_until(lambda: hosts.has_failed("a"))  # its latest renewal has reached its timeout
    hosts.network.join("a")
    gate.touch()
    facts = hosts.end(first)
    assert facts["result"] == "built"
    assert counters(facts, "write_back") == [0]
    assert objects(hosts, "b") == published

    hosts.forget_failures("a")
    assert list((hosts.root / "store-a" / "remote").glob("unsent-*")) != []
    again = hosts.end(hosts.begin("a"))
    assert again["result"] == "hit"
    assert counters(again, "write_back", "write_back_failed", "remote_failed") == [0, 0, 0]
    assert list((hosts.root / "store-a" / "remote").glob("unsent-*")) == []  # another host's object is there
    assert objects(hosts, "b") == published


def test_slow_link_is_waited_for_and_a_useless_one_is_not(hosts: Hosts) -> None:
    assert hosts.end(hosts.begin("a"))["result"] == "built"
    hosts.network.slow_down("b", "2kbit")
    facts = hosts.end(hosts.begin("b", seconds=1.0))
    assert facts["result"] == "built"
    assert counters(facts, "remote_failed", "remote_hit") == [1, 0]
    hosts.forget_failures("b")
    (hosts.root / "store-b").rename(hosts.root / "store-b-alone")
    hosts.network.slow_down("b", "100kbit")
    facts = hosts.end(hosts.begin("b"))
    assert facts["result"] == "hit"
    assert counters(facts, "remote_failed", "remote_hit") == [0, 1]
