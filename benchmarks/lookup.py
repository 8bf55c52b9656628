"""What finding and verifying an entry costs, with and without digests remembered from an earlier process.

Each lookup runs in a process of its own, as in a worker's start; its clock runs from before the store is opened until
the hit is returned. The entry's files are in the page cache. The same for the digest of a weights file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import environment

CHILD = """
import sys, time
from ts_handlers.key.cache_key import FORMAT, CacheKey
from ts_handlers.store.address import Address
from ts_handlers.store.base import Hit
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.verified import known_digest
from ts_handlers.key.digests import digest_file
from pathlib import Path
root, verify, weights = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
key = CacheKey((("format", FORMAT), ("backend", "aot_inductor")))
started = time.perf_counter()
found = LocalStore(root, verify=verify).lookup(Address("benchmark", "0" * 64, "cpu", key))
looked_up = time.perf_counter()
assert isinstance(found, Hit), found
known_digest(root, weights) if verify == "changed" else digest_file(weights)
print((looked_up - started) * 1000, (time.perf_counter() - looked_up) * 1000)
"""
FILES = 4


def make_store(root: Path, megabytes: int) -> None:
    """Publish one entry of `megabytes` in `FILES` files."""
    from ts_handlers.key.cache_key import FORMAT, CacheKey
    from ts_handlers.store.address import Address
    from ts_handlers.store.entry import Manifest, list_files
    from ts_handlers.store.local.store import LocalStore

    key = CacheKey((("format", FORMAT), ("backend", "aot_inductor")))
    where = Address("benchmark", "0" * 64, "cpu", key)
    store = LocalStore(root)
    with store.staging(where) as directory:
        for index in range(FILES):
            (directory / f"file{index}").write_bytes(os.urandom(megabytes * 1_000_000 // FILES))
        store.publish(where, directory, Manifest(FORMAT, key.parts, "aot_inductor", {}, list_files(directory), {}, {}))


def measure(root: Path, verify: str, weights: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of a lookup and of the weights' digest in `rounds` processes."""
    times = []
    for _ in range(rounds):
        command = [sys.executable, "-c", CHILD, str(root), verify, str(weights)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        times.append([float(value) for value in out.split()])
    names = ("lookup_ms", "weights_digest_ms")
    return {
        name: {
            "median": round(statistics.median(values), 2),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
        }
        for name, values in zip(names, zip(*times, strict=True), strict=True)
    }


def main() -> None:
    """Measure and print, as JSON or as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entry-mb", type=int, default=100, help="size of the entry in megabytes")
    parser.add_argument("--weights-mb", type=int, default=440, help="size of the weights file in megabytes")
    parser.add_argument("-n", "--rounds", type=int, default=15, help="processes for each row")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    facts = environment.facts()
    warning = environment.warn_if_busy(facts)
    if warning:
        print(warning, file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="ts_handlers-lookup-") as temporary:
        root, weights = Path(temporary) / "store", Path(temporary) / "weights"
        make_store(root, options.entry_mb)
        with weights.open("wb") as file:
            for _ in range(options.weights_mb):
                file.write(os.urandom(1_000_000))
        time.sleep(2.5)  # digests of files that have just changed are not remembered
        rows = {"always": measure(root, "always", weights, options.rounds)}
        measure(root, "changed", weights, 1)  # remembers
        rows["changed"] = measure(root, "changed", weights, options.rounds)
    for name, row in rows.items():
        for what, value in row.items():
            print(f"verify: {name:8} {what:18} {value['median']:9.2f} ms ({value['min']:.2f} to {value['max']:.2f})")
    if options.json:
        result = {
            "benchmark": "lookup",
            "rounds": options.rounds,
            "entry_mb": options.entry_mb,
            "weights_mb": options.weights_mb,
            "environment": facts,
            "verify": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
