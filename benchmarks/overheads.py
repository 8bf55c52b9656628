"""What single mechanisms of the package cost, for the pages under docs/decisions/ that quote them.

    python benchmarks/overheads.py --table                        # all; the compiling ones take minutes
    python benchmarks/overheads.py guard slot usage memory -n 5

Each measurement runs in a process of its own, once per round, the rounds interleaved; the median of the rounds is
reported with the smallest and the largest. Names that end in ``_ratio`` are ratios of what was measured in turn.
`overhead_measures.py` says what each figure is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_line
import environment

HERE = Path(__file__).resolve().parent
TITLES = {
    "guard": "crash guard of one warm start",
    "slot": "a lent slot, per call (CPU, one slot, no waiting)",
    "across_workers": "a call of a model that another process holds, against a call in the worker (CPU)",
    "usage": "recording a use, per hit",
    "memory": "memory that counts against background.memory_mb",
    "initialization": "building eager BERT-base without drawing random initial weights",
    "call": "a call of an `inductor` artifact, on the model `tiny`",
    "lock": "a thread that counts beside calls of a BERT of MiniLM's size",
    "collector": "the cycle collector around a warm start of `inductor`, on a BERT of MiniLM's size",
    "beside": "eager calls of a BERT of MiniLM's size while a thread loads its `inductor` entry",
    "threads": "`cpp.dynamic_threads` on ResNet-50",
    "linears": "merged linear layers of `aot_inductor`",
}
MEASURES = tuple(TITLES)


def run_child(step: str, name: str, folder: Path) -> dict[str, float]:
    """Run one step of a measurement in a fresh process; what it measured."""
    folder.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR_", "TRITON_"))}
    env["TS_HANDLERS_CACHE"] = str(folder / "store")
    command = [sys.executable, str(HERE / "overhead_measures.py"), step, name, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {step} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(names: list[str], rounds: int, directory: Path) -> dict[str, Any]:
    """Median, smallest and largest of each figure over the rounds."""
    for name in names:
        _say(f"{name}: preparing")
        run_child("prepare", name, directory / name)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name in names:
            runs[name].append(run_child("measure", name, directory / name))
            _say(f"{name}: round {number}/{rounds} {runs[name][-1]}")
    return {
        name: {figure: _summary([run[figure] for run in found]) for figure in found[0]} for name, found in runs.items()
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": _short(statistics.median(values)), "min": _short(min(values)), "max": _short(max(values))}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def markdown(result: dict[str, Any]) -> str:
    """One table of all figures."""
    lines = ["| | figure | median | smallest | largest |", "| --- | --- | ---: | ---: | ---: |"]
    for name, figures in result["overheads"].items():
        for figure, value in figures.items():
            numbers = " | ".join(f"{value[part]:g}" for part in ("median", "min", "max"))
            lines.append(f"| {TITLES[name]} | {figure} | {numbers} |")
    return "\n".join(lines)


def _gpu() -> str | None:
    """The GPU's name; asked in another process, so that this one takes no memory of it."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Parse the command line, measure, and print or write what was asked for."""
    parser = argparse.ArgumentParser(description="What single mechanisms of the package cost.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)}; default: all")
    command_line.add_options(parser, "models and stores")
    arguments = parser.parse_args()
    names = arguments.names or list(MEASURES)
    if unknown := sorted(set(names) - set(MEASURES)):
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(MEASURES)}")
    facts = {**environment.facts(), "gpu": _gpu()}
    if warning := environment.warn_if_busy(facts):
        _say(f"warning: {warning}")
    with command_line.work_folder("overheads", arguments.workdir) as directory:
        found = measure(names, arguments.n, directory)
    result = {"benchmark": "overheads", "rounds": arguments.n, "environment": facts, "overheads": found}
    command_line.write(result, arguments, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
