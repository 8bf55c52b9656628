"""`on_miss: background` on a real TorchServe: time to READY against plain eager, and requests while a child builds.

    python benchmarks/background.py --model resnet50 --table --json background.json
    python benchmarks/background.py --model tiny -n 1 --table                        # tries the benchmark

Each round starts plain eager (`BaseHandler`) and then ours on an empty store, and sends both the same requests, one
after the other with a pause between them. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import archives
import command_line
import environment
from measure import READY_INTERVAL_SECONDS, TIMEOUT_SECONDS, Host, check_answer, clean, settle

from ts_handlers.testing import TorchServe

STEADY_SECONDS = 10.0
"""How long requests are measured where nothing else goes on."""
PERIODS = {
    "eager": "plain eager, READY",
    "building": "ours, eager, a child process builds",
    "loading": "ours, eager, the artifact is loaded and checked",
    "swapped": "ours, after the swap",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One request: seconds since the epoch at which it was sent, milliseconds until its answer, what was wrong."""

    sent: float
    took_ms: float
    problem: str | None


class Client(threading.Thread):
    """Sends one request after the other, with a pause between them, until it is told to stop."""

    def __init__(self, server: TorchServe, packed: archives.Archives, variant: str, pause: float) -> None:
        super().__init__(daemon=True)
        self.answers: list[Answer] = []
        self._server, self._packed, self._pause = server, packed, pause
        self._expected = packed.expected(variant)
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            sent, started = time.time(), time.perf_counter()
            answer = self._server.predict(self._packed.model, self._packed.body, timeout=TIMEOUT_SECONDS)
            took = (time.perf_counter() - started) * 1000
            if answer.status == 200:
                problems = check_answer(answer.json(), self._expected)
            else:
                problems = [f"HTTP {answer.status}: {answer.text[:200]}"]
            self.answers.append(Answer(sent, round(took, 2), problems[0] if problems else None))
            time.sleep(self._pause)

    def stop(self) -> list[Answer]:
        """End after the request that is under way, and return all answers."""
        self._over.set()
        self.join()
        return self.answers


def measure(packed: archives.Archives, variant: str, directory: Path, pause: float) -> dict[str, Any]:
    """One start of a variant on an empty host, with requests from READY on."""
    host = Host(directory / "host").create()
    settle(packed.model_store / packed.file(variant))
    server = TorchServe(
        packed.model_store,
        {packed.model: packed.file(variant)},
        config={"default_workers_per_model": "1"},
        env=host.env("store"),
        directory=directory / "server",
    )
    with server:
        server.wait_ready(packed.model, timeout=TIMEOUT_SECONDS, interval=READY_INTERVAL_SECONDS)
        ready = round(server.elapsed, 3)
        client = Client(server, packed, variant, pause)
        client.start()
        facts: dict[str, Any] = {}
        if variant == "background":
            facts = _wait_for_swap(server, packed.model)
        time.sleep(STEADY_SECONDS)
        answers = client.stop()
        if variant == "background":
            facts = server.describe(packed.model)
    run = {"variant": variant, "ready_s": ready, "problems": _problems(variant, facts), "description": facts}
    return {**run, "answers": [[period, *dataclasses.astuple(a)] for a in answers for period in [_period(a, facts)]]}


def _wait_for_swap(server: TorchServe, model: str) -> dict[str, Any]:
    """Ask rarely: describe is a request to the same worker."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        facts = server.describe(model)
        if facts["background"]["state"] in ("swapped", "failed") or time.monotonic() > deadline:
            return facts
        time.sleep(2.0)


def _problems(variant: str, facts: Mapping[str, Any]) -> list[str]:
    if variant != "background":
        return []
    wanted = {"backend": "aot_inductor", "result": "swapped"}
    problems = [f"{name} {facts[name]!r}, expected {value!r}" for name, value in wanted.items() if facts[name] != value]
    if facts["counters"]["build"] != 1:
        problems.append(f"{facts['counters']['build']} builds, expected 1")
    reason = facts["background"].get("reason")  # TorchServe leaves out what is None
    return problems + ([str(reason)] if reason else [])


def _period(answer: Answer, facts: Mapping[str, Any]) -> str:
    """What went on while a request was answered."""
    if not facts:
        return "eager"
    background = facts["background"]
    swapped = background["began"] + background["elapsed_s"]
    if answer.sent >= swapped:
        return "swapped"
    began = background.get("load_began", swapped)  # absent when the build failed before
    return "loading" if answer.sent + answer.took_ms / 1000 >= began else "building"


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds: seconds to READY, and latencies of each period over all rounds."""
    ready = {name: [run["ready_s"] for run in runs if run["variant"] == name] for name in ("eager", "background")}
    ratios = [ours / eager for ours, eager in zip(ready["background"], ready["eager"], strict=True)]
    builds = [run["description"] for run in runs if run["variant"] == "background"]
    return {
        "ready_s": {name: round(statistics.median(values), 3) for name, values in ready.items()},
        "ready_ratio": round(statistics.median(ratios), 3),
        "build_s": round(statistics.median(sum(each["build_ms"].values()) / 1000 for each in builds), 1),
        "swapped_after_s": round(statistics.median(each["background"]["elapsed_s"] for each in builds), 1),
        "requests": {period: _latencies(runs, period) for period in PERIODS},
    }


def _latencies(runs: Sequence[Mapping[str, Any]], period: str) -> dict[str, Any]:
    mine = [answer for run in runs for answer in run["answers"] if answer[0] == period]
    times = sorted(answer[2] for answer in mine)
    summary: dict[str, Any] = {"count": len(mine), "failed": sum(answer[3] is not None for answer in mine)}
    if times:
        summary["p50_ms"] = round(statistics.median(times), 2)
        summary["p99_ms"] = times[min(len(times) - 1, int(len(times) * 0.99))]
        summary["max_ms"] = times[-1]
    return summary


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of one result."""
    summary = result["summary"]
    ready = summary["ready_s"]
    lines = [
        f"## {result['model']}, {result['rounds']} rounds, a request, then a pause of {result['pause_s']:g} s",
        "",
        f"READY after {ready['background']:.2f} s, plain eager after {ready['eager']:.2f} s: "
        f"{summary['ready_ratio']:.2f} times. The build took {summary['build_s']} s, the swap came "
        f"{summary['swapped_after_s']} s after its beginning (medians).",
        "",
        "| period | requests | failed | p50 ms | p99 ms | max ms | p50 / plain eager |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    reference = summary["requests"]["eager"].get("p50_ms")
    for period, title in PERIODS.items():
        facts = summary["requests"][period]
        cells = [title, str(facts["count"]), str(facts["failed"])]
        if "p50_ms" in facts:
            cells += [f"{facts[name]:.1f}" for name in ("p50_ms", "p99_ms", "max_ms")]
            cells.append(f"{facts['p50_ms'] / reference:.2f}" if reference else "")
        lines.append("| " + " | ".join([*cells, *[""] * (7 - len(cells))]) + " |")
    loading = [f"{answer[2]:.0f}" for run in result["runs"] for answer in run["answers"] if answer[0] == "loading"]
    lines += ["", f"Each request while the artifact is loaded and checked, ms: {', '.join(loading) or 'none'}."]
    problems = sorted({problem for run in result["runs"] for problem in run["problems"]})
    lines += ["", *[f"- failed: {problem}" for problem in problems]]
    facts = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    return "\n".join([*lines, f"Environment: {facts}.", ""])


def run(model: str, rounds: int, pause: float, directory: Path) -> dict[str, Any]:
    """Build the archives and measure interleaved rounds; returns JSON-compatible data."""
    facts = environment.facts()
    if warning := environment.warn_if_busy(facts):
        print(f"warning: {warning}", file=sys.stderr)
    packed = archives.build(model, "zip", {"eager", "background"}, directory)
    runs = []
    for number in range(1, rounds + 1):
        for variant in ("eager", "background"):
            work = directory / f"{variant}-{number}"
            measured = measure(packed, variant, work, pause)
            clean(work, keep_log=bool(measured["problems"]))
            runs.append({"round": number, **measured})
            print(f"{model}: round {number}/{rounds} {variant}: READY {measured['ready_s']} s", file=sys.stderr)
    return {
        "benchmark": "background",
        "model": model,
        "rounds": rounds,
        "pause_s": pause,
        "environment": facts,
        "summary": summarise(runs),
        "runs": runs,
    }


def main() -> int:
    """Parse the command line, run, and print or write what was asked for; 1 when anything failed."""
    parser = argparse.ArgumentParser(description="on_miss: background: time to READY, and requests during a build.")
    parser.add_argument("--model", choices=archives.MODELS, default="resnet50")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between two requests (default 0.05)")
    command_line.add_options(parser, "archives and logs")
    arguments = parser.parse_args()
    with command_line.work_folder("background", arguments.workdir) as directory:
        result = run(arguments.model, arguments.n, arguments.pause, directory)
    command_line.write(result, arguments, markdown)
    failed = sum(facts["failed"] for facts in result["summary"]["requests"].values())
    return 1 if failed or any(each["problems"] for each in result["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
