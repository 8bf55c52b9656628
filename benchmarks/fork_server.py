"""Starts of TorchServe and its workers with a fork server and without: launch, restart of workers, scale-out.

    python benchmarks/fork_server.py --model resnet50 -n 5 --table --json fork_server.json
    python benchmarks/fork_server.py --model tiny -n 1 --table    # tries the benchmark

Rows are interleaved, and checked as in cold_start.py. The fork server is started with the server. When a worker has
answered, all workers are killed: by then the fork server is resident. TorchServe waits a second before it starts a
worker again, which every row's time holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import archives
import command_line
import environment
from measure import READY_INTERVAL_SECONDS, TIMEOUT_SECONDS, Bench, Run, check_answer
from report import ratio
from rows import AOT_HIT, EAGER, Row

from ts_handlers.testing import TorchServe

AFTER_DEATH_SECONDS = 0.05
"""From a worker's death to the request: TorchServe itself may lose one that comes earlier (worker_death.py)."""
WORKER_DIED = 507
"""The status with which TorchServe answers a request that it has given to a worker that died."""
WORKERS = (1, 4)
SCALED = 4
MEASURES = {
    "launch_s": "launch to first 200",
    "ready_s": "launch to READY",
    "killed_s": "SIGKILL to next 200",
    "killed_ready_s": "SIGKILL to READY",
    "scaled_s": f"1 to {SCALED} workers",
}


def rows(numbers: Sequence[int]) -> list[Row]:
    """Eager, an ordinary warm start, and one with a fork server, for each number of workers."""
    found = []
    for workers in numbers:
        name = "" if workers == 1 else f"_{workers}"
        text = "" if workers == 1 else f", {workers} workers"
        eager = Row(f"eager{name}", f"eager{text}", "eager", EAGER, workers=workers)
        warm = Row(f"warm{name}", f"ours, warm{text}", "aot", AOT_HIT, "store", ("aot",), "same", workers)
        fork = dataclasses.replace(warm, name=f"fork{name}", title=f"ours, warm, fork server{text}", serve=())
        found += [eager, warm, fork]
    return found


class Restarts(Bench):
    """Kills the workers of each server that serves, and scales it out if it has one."""

    model_api = True

    def while_serving(self, server: TorchServe, row: Row, run: Run) -> None:
        """Seconds from SIGKILL of all workers to the next answer and to READY, and those of a scale-out."""
        model = self._archives.model
        if row.serve is not None and "starts without the fork server" in server.log():
            run.problems.append("a worker started without the fork server")
        gone = server.worker_pids(model)
        for pid in gone:
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        time.sleep(AFTER_DEATH_SECONDS)
        answer = server.predict(model, self._archives.body, timeout=TIMEOUT_SECONDS)
        while answer.status == WORKER_DIED:
            time.sleep(READY_INTERVAL_SECONDS)
            answer = server.predict(model, self._archives.body, timeout=TIMEOUT_SECONDS)
        run.further_s["killed_s"] = round(time.monotonic() - killed, 3)
        if answer.status != 200:
            run.problems.append(f"HTTP {answer.status} after the workers' death: {answer.text[:200]}")
            return
        run.problems += check_answer(answer.json(), self._archives.expected(row.archive))
        _wait_for_others(server, model, gone)
        run.further_s["killed_ready_s"] = round(time.monotonic() - killed, 3)
        if row.workers == 1:
            server.wait_ready(model, tolerate_restarts=True)  # the log's words about the killed worker are old by now
            began = time.monotonic()
            server.scale(model, SCALED, timeout=TIMEOUT_SECONDS)
            run.further_s["scaled_s"] = round(time.monotonic() - began, 3)


def _wait_for_others(server: TorchServe, model: str, gone: list[int]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        workers = server.status(model)[0]["workers"]
        if sum(each["status"] == "READY" and int(each["pid"]) not in gone for each in workers) == len(gone):
            return
        time.sleep(READY_INTERVAL_SECONDS)
    raise TimeoutError(f"{len(gone)} workers expected after {TIMEOUT_SECONDS} s")


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A run with one of its times, as `ratio` takes it."""

    row: str
    round: int
    ok: bool
    seconds: float | None


def summarise(runs: list[Run], chosen: list[Row]) -> dict[str, Any]:
    """Medians of each row's times, and their ratios to eager and to the ordinary warm start of the same round."""
    summary: dict[str, Any] = {}
    for row in chosen:
        good = [run for run in runs if run.row == row.name and run.ok]
        total = sum(run.row == row.name for run in runs)
        facts: dict[str, Any] = {"title": row.title, "runs": total, "failed": total - len(good), "times": {}}
        facts["problems"] = sorted({problem for run in runs if run.row == row.name for problem in run.problems})
        end = row.name.removeprefix(row.name.partition("_")[0])
        for measure in MEASURES:
            taken = [_Measured(run.row, run.round, run.ok, _seconds(run, measure)) for run in runs]
            values = [each.seconds for each in taken if each.row == row.name and each.ok and each.seconds is not None]
            if values:
                facts["times"][measure] = {
                    "median": round(statistics.median(values), 3),
                    "min": min(values),
                    "max": max(values),
                    "x eager": ratio(taken, row.name, f"eager{end}", "seconds"),  # type: ignore[arg-type]
                    "x warm": ratio(taken, row.name, f"warm{end}", "seconds"),  # type: ignore[arg-type]
                }
        summary[row.name] = facts
    return summary


def _seconds(run: Run, measure: str) -> float | None:
    return {"launch_s": run.first_200_s, "ready_s": run.ready_s, **run.further_s}.get(measure)


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    lines = [f"## {result['model']}, {result['archive_format']}, {result['rounds']} rounds", ""]
    lines += ["Seconds (x eager, x ours warm), medians.", ""]
    lines += ["| row | " + " | ".join(MEASURES.values()) + " | runs |", "|---" * (len(MEASURES) + 2) + "|"]
    for facts in result["rows"].values():
        cells = [_cell(facts["times"].get(measure)) for measure in MEASURES]
        lines.append(f"| {facts['title']} | {' | '.join(cells)} | {facts['runs'] - facts['failed']}/{facts['runs']} |")
    lines += [""] + [f"- {name}: {text[:300]}" for name, facts in result["rows"].items() for text in facts["problems"]]
    return "\n".join([*lines, f"Environment: {result['environment']}", ""])


def _cell(time: dict[str, Any] | None) -> str:
    if time is None:
        return ""
    ratios = [f"{time[name]:.2f}" if time[name] is not None else "-" for name in ("x eager", "x warm")]
    return f"{time['median']:.2f} ({', '.join(ratios)})"


def main() -> int:
    """Parse the command line, measure, and print or write; 1 when any run failed."""
    parser = argparse.ArgumentParser(description="Starts of TorchServe's workers with a fork server and without.")
    parser.add_argument("--model", choices=archives.MODELS, default="resnet50")
    parser.add_argument("--archive-format", choices=sorted(archives.FORMATS), default="zip")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="how many workers (default: 1 4)")
    command_line.add_options(parser, "archives, stores and logs of failed runs")
    arguments = parser.parse_args()
    facts = environment.facts()
    if warning := environment.warn_if_busy(facts):
        print(f"warning: {warning}", file=sys.stderr)
    runs: list[Run] = []
    chosen = rows(arguments.workers)
    with command_line.work_folder("fork_server", arguments.workdir) as directory:
        built = archives.build(arguments.model, arguments.archive_format, {"eager", "aot"}, directory)
        bench = Restarts(built, directory)
        for row in chosen:
            bench.prepare(row)
        for number in range(1, arguments.n + 1):
            for row in chosen:
                runs.append(bench.measure(row, number))
                said = runs[-1].problems or {"launch_s": runs[-1].first_200_s, **runs[-1].further_s}
                print(f"round {number}/{arguments.n} {row.name}: {str(said)[:1000]}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "fork_server",
        "model": arguments.model,
        "archive_format": arguments.archive_format,
        "rounds": arguments.n,
        "environment": facts,
        "rows": summarise(runs, chosen),
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    command_line.write(result, arguments, markdown)
    return 1 if any(summary["failed"] for summary in result["rows"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
