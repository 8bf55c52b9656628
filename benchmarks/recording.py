"""What recording metrics costs a worker: its import, the beginning, a phase of a start, a batch of requests.

    python benchmarks/recording.py [-n ROUNDS]

Prints a Markdown table of medians of processor time (see docs/decisions/0040-metrics-exporter.md). The import is that
of a new process that has imported the rest of the package, without what records.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

IMPORT = """
import sys, time
import torch, msgspec, json, mmap, bisect
import ts_handlers.guard.state_directory, ts_handlers.metrics, ts_handlers.system.ownership
began = time.process_time()
import {module}
print((time.process_time() - began) * 1e6)
"""


def import_us(module: str) -> float:
    """Microseconds of the processor for the import of a module."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.format(module=module)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def each_us(work: Callable[[], object], times: int) -> float:
    """Microseconds of the processor for one call, of many."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times * 1e6


def begin(store: Path) -> None:
    """Begin to record, with one model."""
    from ts_handlers.monitoring import recorder

    recorder.stop_recording()
    recorder.begin_recording(store)
    recorder.recorder_of("model")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=7)
    rounds = range(parser.parse_args().rounds)
    from ts_handlers.monitoring.recorder import recorder_of

    rows = {"import of the recorder": statistics.median(import_us("ts_handlers.monitoring.recorder") for _ in rounds)}
    with tempfile.TemporaryDirectory() as folder:
        rows["begin, with one model at 0"] = statistics.median(each_us(lambda: begin(Path(folder)), 10) for _ in rounds)
        recorder = recorder_of("model")
        assert recorder is not None

        def batch() -> None:
            with recorder.batch(1):
                pass

        rows["one phase of a start"] = statistics.median(
            each_us(lambda: recorder.phase_begins("load"), 2000) for _ in rounds
        )
        rows["one batch of requests"] = statistics.median(each_us(batch, 5000) for _ in rounds)
    print("| | us |\n|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {value:,.1f} |")


if __name__ == "__main__":
    main()
