"""The command: one subcommand for each kind of trial, and a total."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.soak import blame, descriptors, faults, flip, fuzz, process, race, requests
from tests.soak.subject import workplace
from tests.soak.tally import Tally

Part = Callable[[Tally, Path, int, int], None]
FILES = 12  # about as many in a store; a region has six changes


def _flip(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    (folder / "quarantined").mkdir()
    flip.run(tally, folder, seed, real=False, regions=max(1, trials // (6 * FILES)), limit=trials)
    flip.quarantined(tally, folder / "quarantined", seed, regions=max(1, trials // 300))


def _flip_real(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    flip.run(tally, folder, seed, real=True, regions=max(1, trials // (6 * FILES)), limit=trials)


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
    "clocks": (_clocks, 0.01),
    "requests": (requests.run, 0.12),
    "blame": (blame.run, 0.22),
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


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns 1 when something happened that must not."""
    parser = argparse.ArgumentParser(
        description="Soak and fuzz the store, whole starts, the crash guard, requests and the model's process."
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--trials", type=int, default=10_000, help="of all parts together, or of the one part")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="write counts and environment here")
    options = parser.parse_args(arguments)
    needs = options.part == "all" or options.part in PRELOADED
    words = list(sys.argv[1:] if arguments is None else arguments)
    if needs and not faults.is_preloaded():
        return _preload(words)
    logging.basicConfig(level=logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    total, counts = Tally(), {}
    facts_of_machine: dict[str, object] = {}
    if options.json is not None:
        import environment

        facts_of_machine = environment.facts()  # of the beginning: the checkout may go on meanwhile
    started = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    for name in PARTS if options.part == "all" else [options.part]:
        part, share = PARTS[name]
        tally, begun = Tally(), time.monotonic()
        with workplace() as folder:
            trials = options.trials if options.part != "all" else max(1, round(share * options.trials))
            part(tally, folder, options.seed, trials)
        print(tally.summary(name), flush=True)
        for failure in tally.failures[:20]:
            print(f"  {failure}", flush=True)
        counts[name] = {"trials": tally.trials, **tally.counts, "seconds": round(time.monotonic() - begun)}
        total.add(tally)
    summary = total.summary("soak")
    print(summary, flush=True)
    if options.json is not None:
        facts = {
            "benchmark": "soak",
            "summary": summary,
            "command": shlex.join(["python", "benchmarks/soak.py", *words]),
            "seed": options.seed,
            "seconds": round(time.monotonic() - started),
            "environment": facts_of_machine,
            "parts": counts,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return int(not total.clean)
