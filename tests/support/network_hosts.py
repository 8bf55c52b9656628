"""Hosts as network namespaces of this machine, joined by a bridge; needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator

import pytest

from tests.support.costs import costs
from tests.support.subprocesses import environment

_NETWORK = "10.213.77"
_S3 = """
    import logging, sys
    import boto3
    from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    address, key, secret = sys.argv[1:]
    server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    account = {"aws_access_key_id": key, "aws_secret_access_key": secret, "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **account).create_bucket(Bucket="bucket")
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
"""


class Network:
    """One namespace with a bridge and a server, and one for each host."""

    def __init__(self) -> None:
        self.name = f"tsh{uuid.uuid4().hex[:6]}"
        self.address = f"{_NETWORK}.1"
        self._hosts: list[str] = []
        self._processes: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        """Make the namespace of the server; skips where that is not allowed."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces need root and iproute2's ip")
        made = subprocess.run(["ip", "netns", "add", self.name], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        self._hosts.append(self.name)
        self._ip("link", "add", "bridge", "type", "bridge")
        self._ip("address", "add", f"{self.address}/24", "dev", "bridge")
        self._ip("link", "set", "bridge", "up")
        self._ip("link", "set", "lo", "up")

    def close(self) -> None:
        """Kill what still runs there, and remove every namespace and with them the links."""
        for process in self._processes:
            process.kill()
            process.communicate()
        for host in self._hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False)

    def add(self, host: str) -> None:
        """Make a host."""
        namespace = f"{self.name}-{host}"
        subprocess.run(["ip", "netns", "add", namespace], check=True)
        self._hosts.append(namespace)
        self._ip("link", "add", "name", f"to-{host}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self._ip("link", "set", "dev", f"to-{host}", "master", "bridge", "up")
        for command in (
            ["address", "add", f"{_NETWORK}.{len(self._hosts)}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            subprocess.run(["ip", "-n", namespace, *command], check=True)

    def cut(self, host: str) -> None:
        """Unplug a host."""
        self._ip("link", "set", "dev", f"to-{host}", "down")

    def join(self, host: str) -> None:
        """Plug it in again."""
        self._ip("link", "set", "dev", f"to-{host}", "up")

    def slow_down(self, host: str, rate: str) -> None:
        """Throttle what a host receives to a rate as `tc-tbf` writes it; skips where the kernel cannot."""
        bucket = ["tbf", "rate", rate, "burst", "2000", "limit", "1000000"]
        command = ["tc", "-n", self.name, "qdisc", "replace", "dev", f"to-{host}", "root", *bucket]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"links cannot be throttled here: {done.stderr.strip()}")

    def start(self, host: str | None, code: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
        """Start Python code on a host, or beside the bridge (None)."""
        namespace = self.name if host is None else f"{self.name}-{host}"
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**env),
        )
        self._processes.append(process)
        return process

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True)


@costs("services")
@contextlib.contextmanager
def network(*hosts: str) -> Iterator[Network]:
    """A network with hosts."""
    found = Network()
    try:
        found.open()
        for host in hosts:
            found.add(host)
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def s3_server(found: Network, key: str, secret: str) -> Iterator[str]:
    """An S3 server beside the bridge with the bucket ``bucket``; yields its URL."""
    process = found.start(None, _S3, found.address, key, secret)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url, process.communicate()[1]
    yield url
    process.kill()
