"""Launch of a real TorchServe to its first HTTP 200: eager, torch.compile, TorchServe's caching example, and ours.

    python benchmarks/cold_start.py --model resnet50 --table --json resnet50.json --plot resnet50.png
    python benchmarks/cold_start.py --model tiny -n 1 --rows eager,aot_cold,aot_warm --table

Every start is a fresh process. The rows are interleaved (A B C A B C ...), and a run that was not what its row claims,
or that answered wrongly, is reported as failed and never counted. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import archives
import command_line
import environment
import report
from measure import Bench, Run
from rows import ROWS, Row, select

AGAINST = "measure each row of ours with the package of another checkout too, on the same stores, interleaved"


def run(model: str, archive_format: str, rows: list[Row], rounds: int, directory: Path) -> dict[str, Any]:
    """Build the archives, prepare, and measure `rounds` interleaved rounds; returns JSON-compatible data."""
    facts = environment.facts()
    if warning := environment.warn_if_busy(facts):
        _say(f"warning: {warning}")
    started = time.monotonic()
    _say(f"{model}: building archives ({archive_format})")
    variants = {row.archive for row in rows} | {seed for row in rows for seed in row.seeds}
    bench = Bench(archives.build(model, archive_format, variants, directory), directory)
    for row in rows:
        if not bench.is_prepared(row):
            _say(f"{model}: preparing {row.name}")
            bench.prepare(row)
    prepared = time.monotonic()
    runs: list[Run] = []
    for number in range(1, rounds + 1):
        for row in rows:
            runs.append(bench.measure(row, number))
            _say(f"{model}: round {number}/{rounds} {_progress(runs[-1], row)}")
    return {
        "benchmark": "cold_start",
        "model": model,
        "archive_format": archive_format,
        "rounds": rounds,
        "environment": facts,
        "preparation_s": round(prepared - started, 1),
        "measurement_s": round(time.monotonic() - prepared, 1),
        "rows": report.summarise(runs, rows),
        "bars": report.judge_bars(runs, rows, model, archive_format),
        "runs": [dataclasses.asdict(each) for each in runs],
    }


def beside(rows: list[Row], checkout: Path) -> list[Row]:
    """Each row that uses the package twice: with this tree's, and as ``NAME@before`` with that of another checkout."""
    ours = str(Path(__file__).resolve().parent.parent)
    both: list[Row] = []
    for row in rows:
        if row.cache != "store":
            both.append(row)
            continue
        title = f"{row.title}, other checkout"
        both.append(dataclasses.replace(row, name=f"{row.name}@before", title=title, package=str(checkout)))
        # An entry of an older package is a hit, but a start may have to complete its canary record: once, uncounted.
        both.append(dataclasses.replace(row, package=ours, seeds=(*row.seeds, *row.seeds[-1:])))
    return both


def _progress(run: Run, row: Row) -> str:
    if run.problems:
        return f"{row.name}: FAILED: {run.problems[0][:2000]}"
    return f"{row.name}: {getattr(run, row.metric):.2f} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Parse the command line, run, and print or write what was asked for; 1 when any run failed."""
    parser = argparse.ArgumentParser(description="Time from the launch of TorchServe to its first HTTP 200.")
    parser.add_argument("--model", choices=archives.MODELS, default="resnet50")
    parser.add_argument("--archive-format", choices=sorted(archives.FORMATS), default="zip")
    parser.add_argument("--rows", help=f"comma-separated; default: all of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart (.png or .svg; needs matplotlib)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help=AGAINST)
    command_line.add_options(parser, "archives, caches and logs of failed runs")
    arguments = parser.parse_args()
    rows = select(arguments.rows)
    if arguments.against is not None:
        rows = beside(rows, arguments.against.resolve())
    with command_line.work_folder("cold_start", arguments.workdir) as directory:
        result = run(arguments.model, arguments.archive_format, rows, arguments.n, directory)
    command_line.write(result, arguments, report.markdown)
    if arguments.plot:
        from plot import plot

        plot(result, arguments.plot)
    return 1 if any(summary["failed"] for summary in result["rows"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
