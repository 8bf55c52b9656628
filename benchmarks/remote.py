"""A new host with a warm remote store, a dead remote store, and the takeover of a lease.

    python benchmarks/remote.py --model resnet50 --table --json remote.json
    python benchmarks/remote.py --model tiny -n 1 --table

The remote store is a folder and an S3 server on this machine, so what is measured is the work, not a network. See
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import archives
import command_line
import environment
import torch
from measure import Bench, Run
from rows import AOT_HIT, EAGER, Row

from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.lease import RENEWALS_PER_HEARTBEAT, wait_for_lease
from ts_handlers.store.remote.object_lease import ObjectLeases
from ts_handlers.store.remote.objects import RemoteObjects

NEW_HOST_LIMIT = 1.15
TAKEOVER_LIMIT = 2.0  # heartbeats
DEAD_TIMEOUT_SECONDS = 2.0
S3 = {"key": "benchmark", "secret": "benchmark", "client_kwargs": {"region_name": "us-east-1"}}

ROWS = (
    Row("local_warm", "local warm", "folder", AOT_HIT, "store", ("folder",), "same"),
    Row("new_host_folder", "new host, warm remote folder", "folder", AOT_HIT, "store"),
    Row("new_host_s3", "new host, warm S3", "s3", AOT_HIT, "store"),
    Row("new_host_s3fs", "the same through s3fs", "s3fs", AOT_HIT, "store"),
    Row("eager_alone", "local miss, served eagerly, no remote", "alone", EAGER, "store"),
    Row("eager_dead", f"the same, dead remote, timeout {DEAD_TIMEOUT_SECONDS:g} s", "dead", EAGER, "store"),
)
HOLDER = """
import sys, time
from pathlib import Path
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.object_lease import ObjectLeases
from ts_handlers.store.remote.objects import RemoteObjects
from ts_handlers.store.remote.lease import wait_for_lease
url, state, heartbeat = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
held = wait_for_lease(ObjectLeases(RemoteObjects(RemoteSettings(url), state)), "key", heartbeat, lambda: False)
print("held", flush=True)
time.sleep(600)
"""


class OneAnswer(archives.Archives):
    """Archives that differ in their settings alone, so that all answer alike."""

    def expected(self, variant: str) -> torch.Tensor:
        """The eager model's answer."""
        return self.answers["first"]


def build(model: str, remotes: dict[str, dict[str, Any] | None], directory: Path) -> OneAnswer:
    """Pack the model once for each remote section; those of ``alone`` and ``dead`` serve a miss eagerly."""
    files = archives.prepare(model, directory / f"{model}-first")
    for name, remote in remotes.items():
        staged = directory / f"{model}-{name}"
        staged.mkdir()
        for file in ("model.py", "handler.py"):
            shutil.copyfile(files.directory / file, staged / file)
        (staged / "model.pt").symlink_to(files.directory / "model.pt")
        config = archives.configure(files.config, archives.VARIANTS["aot"])
        config["handler"]["ts_handlers"]["on_miss"] = "eager" if name in ("alone", "dead") else "compile"
        if remote is not None:
            config["handler"]["ts_handlers"]["remote"] = remote
        (staged / "model-config.yaml").write_text(json.dumps(config), "utf-8")  # JSON is YAML
        archives.build_archives.write_archive(
            model,
            staged,
            directory / "model_store",
            extra_files=files.extra_files,
            archive_format=archives.FORMATS["zip"],
            file_name=f"{model}-{name}",
        )
    body = archives.request_body(files.inputs())
    return OneAnswer(model, directory / "model_store", body, {"first": files.answer()})


@contextmanager
def s3_server() -> Iterator[dict[str, Any]]:
    """An S3 server on this machine with a bucket; yields storage options."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        options = {**S3, "endpoint_url": f"http://127.0.0.1:{server.get_host_and_port()[1]}"}
        s3fs.S3FileSystem(**options).call_s3("create_bucket", Bucket="benchmark")
        yield options
    finally:
        server.stop()


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener.getsockname()[1]


def measure_starts(model: str, rounds: int, directory: Path) -> list[Run]:
    """Interleaved starts of every row."""
    with s3_server() as options, silent_server() as port:
        (directory / "remote").mkdir()
        dead = {"url": "s3://benchmark/x", "options": {**S3, "endpoint_url": f"http://127.0.0.1:{port}"}}
        remotes = {
            "folder": {"url": f"file://{directory}/remote"},
            "s3": {"url": "s3://benchmark/store", "options": options},
            "s3fs": {"url": "s3://benchmark/store", "options": options, "client": "fsspec"},
            "alone": None,
            "dead": {**dead, "timeout_seconds": DEAD_TIMEOUT_SECONDS},
        }
        bench = Bench(build(model, remotes, directory), directory)
        _say(f"{model}: filling the remote stores")
        bench.prepare(ROWS[0])
        bench.prepare(dataclasses.replace(ROWS[0], archive="s3", seeds=("s3",), cache="store"))
        runs = []
        for number in range(1, rounds + 1):
            for row in ROWS:
                runs.append(bench.measure(row, number))
                run = runs[-1]
                _say(
                    f"{model}: round {number}/{rounds} {row.name}: {run.first_200_s} s {'; '.join(run.problems)[:2000]}"
                )
        return runs


def measure_takeover(heartbeat: float, rounds: int, directory: Path) -> list[float]:
    """Heartbeats from the death of a holder to the takeover, at another moment between two renewals in each round."""
    found = []
    for number in range(rounds):
        folder = directory / f"takeover-{number}"
        folder.mkdir()
        url = f"file://{folder}"
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, url, str(folder / "holder"), str(heartbeat)], stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        holder.stdout.readline()
        time.sleep(heartbeat * (1 + number / rounds / RENEWALS_PER_HEARTBEAT))
        service = ObjectLeases(RemoteObjects(RemoteSettings(url), folder / "waiter"))
        waiter = ThreadPool(1)
        waiting = waiter.apply_async(wait_for_lease, (service, "key", heartbeat, lambda: False))
        time.sleep(heartbeat)  # it has seen renewals
        holder.kill()
        killed = time.monotonic()
        holder.wait()
        held = waiting.get()
        found.append((time.monotonic() - killed) / heartbeat)
        waiter.terminate()
        assert held is not None
        assert held.grant.took_over
        held.release()
    return found


def summarise(runs: list[Run], takeovers: list[float]) -> dict[str, Any]:
    """Medians, and the bars."""
    good = {(run.row, run.round): run.first_200_s for run in runs if run.ok and run.first_200_s is not None}
    rounds = sorted({run.round for run in runs})

    def paired(row: str, base: str, difference: bool = False) -> float | None:
        pairs = [(good[row, n], good[base, n]) for n in rounds if (row, n) in good and (base, n) in good]
        values = [a - b if difference else a / b for a, b in pairs]
        return round(statistics.median(values), 4) if values else None

    bars = [
        _bar("new host, warm remote folder / local warm", paired("new_host_folder", "local_warm"), NEW_HOST_LIMIT),
        _bar("new host, warm S3 / local warm", paired("new_host_s3", "local_warm"), NEW_HOST_LIMIT),
        _bar("dead remote, seconds added", paired("eager_dead", "eager_alone", True), DEAD_TIMEOUT_SECONDS),
        _bar("takeover of a killed holder, heartbeats (worst)", round(max(takeovers), 3), TAKEOVER_LIMIT),
    ]
    rows = {}
    for row in ROWS:
        times = [good[row.name, n] for n in rounds if (row.name, n) in good]
        failed = sum(1 for run in runs if run.row == row.name and not run.ok)
        median = round(statistics.median(times), 3) if times else None
        fetched = [run.starts[0]["phases_ms"].get("fetch") for run in runs if run.row == row.name and run.ok]
        fetch = [milliseconds for milliseconds in fetched if milliseconds is not None]
        rows[row.name] = {
            "title": row.title,
            "first_200_s": median,
            "fetch_ms": round(statistics.median(fetch), 1) if fetch else None,
            "runs": len(times),
            "failed": failed,
        }
    return {"rows": rows, "bars": bars}


def _bar(label: str, measured: float | None, limit: float) -> dict[str, Any]:
    return {"bar": label, "measured": measured, "limit": limit, "met": measured is not None and measured <= limit}


def markdown(result: dict[str, Any]) -> str:
    """Tables of a result."""
    lines = ["| | first 200, s | of it fetching, ms | runs |", "| --- | ---: | ---: | ---: |"]
    for row in result["rows"].values():
        fetch = "" if row["fetch_ms"] is None else row["fetch_ms"]
        lines.append(f"| {row['title']} | {row['first_200_s']} | {fetch} | {row['runs']} |")
    lines += ["", "| bar | measured | limit | met |", "| --- | ---: | ---: | --- |"]
    for bar in result["bars"]:
        lines.append(f"| {bar['bar']} | {bar['measured']} | {bar['limit']} | {'yes' if bar['met'] else '**no**'} |")
    facts = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    return "\n".join([*lines, "", f"Environment: {facts}."])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Parse the command line, measure, print; 1 when any run failed."""
    parser = argparse.ArgumentParser(description="What the remote store costs and saves.")
    parser.add_argument("--model", choices=archives.MODELS, default="resnet50")
    parser.add_argument("--heartbeat", type=float, default=1.0, metavar="SECONDS", help="of the takeover (default 1)")
    command_line.add_options(parser, "archives, stores and logs of failed runs")
    arguments = parser.parse_args()
    facts = environment.facts()
    if warning := environment.warn_if_busy(facts):
        _say(f"warning: {warning}")
    with command_line.work_folder("remote", arguments.workdir) as directory:
        takeovers = measure_takeover(arguments.heartbeat, arguments.n, directory)
        runs = measure_starts(arguments.model, arguments.n, directory)
    result = {
        "benchmark": "remote",
        "model": arguments.model,
        "rounds": arguments.n,
        "environment": facts,
        **summarise(runs, takeovers),
        "takeover_heartbeats": [round(value, 3) for value in takeovers],
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    command_line.write(result, arguments, markdown)
    return 1 if any(not run.ok for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
