"""Handlers as users have them, plain and with the two lines over them, in a real TorchServe.

    python benchmarks/handlers.py --table --json handlers.json
    python benchmarks/handlers.py --only classifier,handle -n 0     # answers and builds, no times

For each handler: what is compiled, the backend, the number of builds after a restart by the worker's counters, whether
every answer is plain's, and with ``-n ROUNDS`` the launch of a warm worker to its first answer against plain's, the
median of interleaved rounds. The handlers are `handlers_own/`; `handler_cases.py` says what each is like. Exit code 1
when an answer differs or a restart builds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import command_line
import environment
from handler_cases import Case, build, equal, select
from measure import settle

from ts_handlers.testing import TorchServe

KINDS = ("plain", "ours")
READY_SECONDS = 600


class Bench:
    """The model store and the artifact store of one run."""

    def __init__(self, work: Path) -> None:
        self.models = work / "model_store"
        self.models.mkdir()
        self._work = work
        self._env = {"TS_HANDLERS_CACHE": str(work / "store"), "HF_HUB_OFFLINE": "1"}
        self._servers = 0

    def server(self, names: list[str]) -> TorchServe:
        """A TorchServe with these archives, not started."""
        self._servers += 1
        return TorchServe(self.models, names, env=self._env, directory=self._work / f"server-{self._servers}")

    def first(self, case: Case) -> dict[str, Any]:
        """Plain and ours in one server: whether the answers are equal, and what describe says."""
        with self.server([f"{kind}_{case.name}" for kind in KINDS]) as server:
            for kind in KINDS:
                server.wait_ready(f"{kind}_{case.name}", timeout=READY_SECONDS)
            answers = {kind: [_answer(server, kind, case, body) for body in case.bodies()] for kind in KINDS}
            facts = facts_of(server, case)
        problems = [f"HTTP {status}: {text[:200]}" for status, text in answers["plain"] if status != 200]
        same = all(map(_same, answers["plain"], answers["ours"]))
        return {"equal": same, "problems": problems, "describe": facts, **({} if same else {"answers": answers})}

    def launch(self, case: Case, kind: str) -> tuple[float, dict[str, Any]]:
        """Seconds from the launch of a server with one archive to its first answer, and what describe says."""
        settle(self.models / f"{kind}_{case.name}.mar")
        with self.server([f"{kind}_{case.name}"]) as server:
            server.wait_ready(f"{kind}_{case.name}", timeout=READY_SECONDS, interval=0.025)
            status, text = _answer(server, kind, case, case.bodies()[0])
            took = server.elapsed
            facts = facts_of(server, case) if kind == "ours" else {}
            return round(took, 3), facts if status == 200 else {**facts, "problem": f"HTTP {status}: {text[:200]}"}


def facts_of(server: TorchServe, case: Case) -> dict[str, Any]:
    """What describe says of ours, or the log where TorchServe answers no describe: with sequence batching."""
    name = f"ours_{case.name}"
    if "sequenceBatching" not in case.config:
        return server.describe(name)
    found = [line.partition("ts_handlers start ")[2] for line in server.log().splitlines()]
    (record,) = [each for each in map(json.loads, filter(None, found)) if each["model"] == name]
    return {**record, "counters": {"build": int(record["result"] == "built")}}


def _answer(server: TorchServe, kind: str, case: Case, body: Any) -> tuple[int, str]:
    """Status and body; not through `urllib`, which changes the case of headers that TorchServe reads as they are."""
    connection = http.client.HTTPConnection(urllib.parse.urlparse(server.url()).netloc, timeout=300)
    headers = {"Content-Type": "application/json", **case.headers()}
    connection.request("POST", f"/predictions/{kind}_{case.name}", json.dumps(body), headers)
    with connection.getresponse() as answer:
        return answer.status, answer.read().decode()


def _same(plain: tuple[int, str], ours: tuple[int, str]) -> bool:
    if plain == ours:
        return True
    try:
        return plain[0] == ours[0] == 200 and equal(json.loads(plain[1]), json.loads(ours[1]))
    except ValueError:
        return False


def measure(cases: list[Case], rounds: int, work: Path) -> dict[str, Any]:
    """Run everything; returns JSON-compatible data."""
    bench = Bench(work)
    facts = environment.facts()
    if rounds and (warning := environment.warn_if_busy(facts)):
        print(f"warning: {warning}", file=sys.stderr)
    rows: dict[str, Any] = {}
    for case in cases:
        build(case, bench.models, work / "sources" / case.name)
        row = rows[case.name] = {"shape": case.shape, "declared": bool(case.section), **bench.first(case)}
        row["restart"] = bench.launch(case, "ours")[1]
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                seconds[kind].append(bench.launch(case, kind)[0])
        row["seconds"] = seconds
        if rounds:
            pairs = zip(seconds["ours"], seconds["plain"], strict=True)
            row["launch_ratio"] = round(statistics.median(ours / plain for ours, plain in pairs), 2)
        print(f"{case.name}: {_cells(row)[1:]}", file=sys.stderr, flush=True)
    return {"benchmark": "handlers", "environment": facts, "rounds": rounds, "rows": rows}


def builds(facts: dict[str, Any]) -> int:
    """Builds that a worker counts."""
    return int(facts.get("counters", {}).get("build", 0))


def _cells(row: dict[str, Any]) -> list[str]:
    first, restart = row["describe"], row["restart"]
    compiled = first.get("result") in ("built", "hit", "waited")
    what = "the module" if compiled else "nothing"
    if compiled and first.get("other_forms"):
        what += "; eager: " + ", ".join(first["other_forms"])
    backend = str(first.get("backend")) if compiled else f"none: {_reason(first)}"
    warm = f"{builds(restart)} builds" + (f" ({restart['result']})" if compiled else "")
    return [
        row["shape"],
        "2" + (", `inputs`" if row["declared"] else ""),
        what,
        backend,
        warm,
        "yes" if row["equal"] and not row["problems"] else "no",
        *([f"{row['launch_ratio']:.2f}"] if "launch_ratio" in row else []),
    ]


def _reason(facts: dict[str, Any]) -> str:
    """Why nothing is compiled, short."""
    if facts.get("reason"):
        return str(facts["reason"])
    fallbacks = facts.get("fallbacks") or [{"reason": "eager was asked for"}]
    reason = str(fallbacks[0]["reason"])
    return "no `inputs`" if "needs the model's inputs" in reason else reason[:120]


def failures(result: dict[str, Any]) -> list[str]:
    """What a run shows that must not be: other answers, a plain handler that fails, a build after a restart."""
    found = []
    for name, row in result["rows"].items():
        if row["problems"] or not row["equal"]:
            found.append(f"{name}: {row['problems'] or 'answers differ'}")
        if builds(row["restart"]) or "problem" in row["restart"]:
            found.append(f"{name}: after a restart: {row['restart'].get('problem', 'a build')}")
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table of docs/handlers.md."""
    columns = ["handler", "lines", "what is compiled", "backend", "after a restart", "answers equal"]
    if result["rounds"]:
        columns.append("launch, ours / plain")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result["rows"].values()]
    return "\n".join([*lines, *(f"\n{each}" for each in failures(result))])


def main() -> int:
    """Parse the command line, run, and print or write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="comma-separated names of handlers")
    parser.add_argument("-n", type=int, default=3, metavar="ROUNDS", help="interleaved launches; 0 measures no times")
    parser.add_argument("--real-size", action="store_true", help="models of the size of ResNet-50 and BERT-base")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was seen")
    parser.add_argument("--table", action="store_true", help="print Markdown tables")
    parser.add_argument("--workdir", type=Path, help="keep archives, the store and logs here")
    arguments = parser.parse_args()
    with command_line.work_folder("handlers", arguments.workdir) as work:
        result = measure(select(arguments.only, real_size=arguments.real_size), arguments.n, work)
    command_line.write(result, arguments, markdown)
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
