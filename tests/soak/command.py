"""The command: one subcommand for each kind of trial, and a total."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from tests.soak import blame, descriptors, faults, flip, fuzz, process, race, requests
from tests.soak.subject import workplace
from tests.soak.tally import Tally

Part = Callable[[Tally, Path, int, int], None]
FILES = 10  # at least as many in a store; a region has six changes


def _flip(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    (folder / "quarantined").mkdir()
    flip.run(tally, folder, seed, real=False, regions=trials // (6 * FILES) + 1, limit=trials)
    flip.quarantined(tally, folder / "quarantined", seed, regions=max(1, trials // 300))


def _flip_real(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    flip.run(tally, folder, seed, real=True, regions=trials // (6 * FILES) + 1, limit=trials)


def _race(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    race.run(tally, folder, seed, trials)


def _race_hosts(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    race.run(tally, folder, seed, trials, hosts=3)


def _clocks(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    faults.clocks(tally, folder, seed, trials)


PARTS: dict[str, tuple[Part, float]] = {
    "race": (_race, 0.20),
    "race-hosts": (_race_hosts, 0.03),
    "flip": (_flip, 0.08),
    "flip-real": (_flip_real, 0.07),
    "fuzz": (fuzz.run, 0.14),
    "faults": (faults.run, 0.09),
    "clocks": (_clocks, 0.008),
    "requests": (requests.run, 0.12),
    "blame": (blame.run, 0.222),
    "descriptors": (descriptors.run, 0.02),
    "process": (process.run, 0.02),
}
"""What each part runs, and its share of the trials of ``all``."""
PRELOADED = ("faults", "clocks")


def _preload(arguments: list[str]) -> int:
    """Run this command again with the library that makes faults."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        library = faults.build_library(Path(folder))
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [
            sys.executable,
            "-c",
            "import sys; from tests.soak.command import main; sys.exit(main())",
            *arguments,
        ]
        return subprocess.run(command, env=environment, check=False).returncode


def _run(name: str, trials: int, seed: int) -> tuple[Tally, int]:
    """Run one part in this process; its tally, and the seconds that it took."""
    tally, begun = Tally(), time.monotonic()
    with workplace() as folder:
        PARTS[name][0](tally, folder, seed, trials)
    return tally, round(time.monotonic() - begun)


def _run_all(parts: dict[str, int], seed: int, jobs: int) -> Iterator[tuple[str, Tally, int]]:
    """Run parts, each with so many trials, as they end."""
    if jobs == 1:
        yield from ((name, *_run(name, trials, seed)) for name, trials in parts.items())
        return
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_run_apart, name, trials, seed): name for name, trials in parts.items()}
        yield from ((running[future], *future.result()) for future in as_completed(running))


def _run_apart(name: str, trials: int, seed: int) -> tuple[Tally, int]:
    """Run one part in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = Path(folder, "result")
        code = "import sys; from tests.soak.command import leave_result; leave_result(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(result), name, str(trials), str(seed)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            tally = Tally()
            tally.trial("crash", f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
            return tally, 0
        tally, seconds = pickle.loads(result.read_bytes())
        return tally, seconds


def leave_result(path: str, name: str, trials: str, seed: str) -> None:
    """In a process of its own: run a part, and write what it came to into a file."""
    _be_quiet()
    Path(path).write_bytes(pickle.dumps(_run(name, int(trials), int(seed))))


def _be_quiet() -> None:
    logging.basicConfig(level=logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns 1 when something happened that must not."""
    parser = argparse.ArgumentParser(
        description="Soak and fuzz the store, whole starts, the crash guard, requests and the model's process."
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--trials", type=int, default=10_000, help="of all parts together, or of the one part")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=1, help="parts that run at once, each in a process of its own")
    parser.add_argument("--json", type=Path, help="write counts and environment here")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    needs = options.part == "all" or options.part in PRELOADED
    if needs and not faults.is_preloaded():
        return _preload(words)
    _be_quiet()
    begun, facts = time.monotonic(), _facts(words, options) if options.json is not None else {}
    print(f"seed {options.seed}", flush=True)
    parts = {options.part: options.trials}
    if options.part == "all":
        parts = {name: max(1, round(share * options.trials)) for name, (_, share) in PARTS.items()}
    total, counts = Tally(), {}
    for name, tally, seconds in _run_all(parts, options.seed, options.jobs):
        print(tally.summary(name), flush=True)
        for failure in tally.failures[:20]:
            print(f"  {failure}", flush=True)
        counts[name] = {"trials": tally.trials, **tally.counts, "seconds": seconds}
        total.add(tally)
    summary = total.summary("soak")
    print(summary, flush=True)
    if options.json is not None:
        facts |= {"summary": summary, "seconds": round(time.monotonic() - begun)}
        facts["parts"] = {name: counts[name] for name in parts}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return int(not total.clean)


def _facts(words: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What a result says beside its counts; at the beginning, since the checkout may go on meanwhile."""
    import environment

    return {
        "benchmark": "soak",
        "summary": "",
        "command": shlex.join(["python", "benchmarks/soak.py", *words]),
        "seed": options.seed,
        "seconds": 0,
        "environment": environment.facts(),
    }
