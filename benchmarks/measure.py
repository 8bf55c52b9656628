"""One start of a real TorchServe: launch, READY, first 200, and the checks that it was what its row claims."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from archives import Archives, relative_error
from rows import Claim, Row, Seeds

from ts_handlers.testing import TorchServe

TOLERANCE = 2e-3
"""Largest accepted relative error of an answer; the answers of old and new weights differ by ten times that."""
READY_INTERVAL_SECONDS = 0.025
TIMEOUT_SECONDS = 900
# Set by the benchmark alone, so that the caller's shell does not decide what is measured. Python's bytecode cache is
# on, as it is in an installation.
CLEARED_PREFIXES = ("TORCHINDUCTOR_", "TORCH_LOGS", "TRITON_", "TS_HANDLERS_", "PYTHONDONTWRITEBYTECODE", "XDG_CACHE")


@dataclasses.dataclass(frozen=True)
class Host:
    """The folders that tell one machine or container from another."""

    root: Path

    @property
    def cache(self) -> Path:
        """What is kept or copied: Inductor's folder or our store."""
        return self.root / "cache"

    def create(self) -> Host:
        """Make all folders."""
        for name in ("tmp", "home", "cache"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        return self

    def copy(self, target: Path, *, cache_only: bool) -> Host:
        """Copy everything, or the cache alone, to another path."""
        host = Host(target).create()
        for name in ("cache",) if cache_only else ("cache", "tmp", "home"):
            shutil.copytree(self.root / name, target / name, symlinks=True, dirs_exist_ok=True)
        return host

    def env(self, cache: str) -> dict[str, str | None]:
        """Environment of a server on this host; None removes a variable of the caller's."""
        env: dict[str, str | None] = {name: None for name in os.environ if name.startswith(CLEARED_PREFIXES)}
        env.update(TMPDIR=str(self.root / "tmp"), HOME=str(self.root / "home"))
        if cache == "store":
            env["TS_HANDLERS_CACHE"] = str(self.cache)
        elif cache in ("inductor", "example"):
            env["TORCHINDUCTOR_CACHE_DIR"] = str(self.cache)
        if cache == "example":
            env["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "1"
        return env


@dataclasses.dataclass
class Run:
    """One start: seconds since launch, and what is wrong with it (nothing, if it counts)."""

    row: str
    round: int
    ready_s: float | None = None
    first_200_s: float | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    description: dict[str, Any] = dataclasses.field(default_factory=dict)
    starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    further_s: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the run was what its row claims."""
        return not self.problems


class Bench:
    """Starts servers for rows; keeps the hosts that preparation runs have seeded.

    Parameters
    ----------
    archives:
        The packed model.
    directory:
        Working directory for hosts and servers.
    """

    def __init__(self, archives: Archives, directory: Path) -> None:
        self._archives = archives
        self._directory = directory
        self._seeded: dict[tuple[str, Seeds], Host] = {}
        self._count = 0

    model_api = False

    def while_serving(self, server: TorchServe, row: Row, run: Run) -> None:
        """Measure more while the server of a counted run serves; for benchmarks that derive from this one."""

    def is_prepared(self, row: Row) -> bool:
        """Whether everything that a row starts from is there."""
        return not row.seeds or (row.cache, row.seeds) in self._seeded

    def prepare(self, row: Row) -> None:
        """Seed the caches that a row starts from, once for all rows that start from the same; not counted.

        Raises
        ------
        SystemExit
            A preparation run failed, so that the row would measure something else.
        """
        if self.is_prepared(row):
            return
        before = self._seeded.get((row.cache, row.seeds[:-1]))
        if len(row.seeds) > 1 and before is None:
            self.prepare(dataclasses.replace(row, seeds=row.seeds[:-1]))
            before = self._seeded[row.cache, row.seeds[:-1]]
        target = self._new_directory("host")
        host = Host(target).create() if before is None else before.copy(target, cache_only=False)
        run = self._start(dataclasses.replace(row, archive=row.seeds[-1], workers=1), host, 0, None)
        if run.problems:
            raise SystemExit(f"preparing {row.name}: {'; '.join(run.problems)}")
        self._seeded[row.cache, row.seeds] = host

    def measure(self, row: Row, number: int) -> Run:
        """One counted start of a row; a failure is a run with problems, not an exception."""
        target = self._new_directory("host")
        if row.host == "fresh":
            host = Host(target).create()
        else:
            seeded = self._seeded[row.cache, row.seeds]
            host = seeded if row.host == "same" else seeded.copy(target, cache_only=row.host == "new")
        try:
            return self._start(row, host, number, row.claim)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _new_directory(self, kind: str) -> Path:
        self._count += 1
        return self._directory / f"{kind}-{self._count}"

    def _start(self, row: Row, host: Host, number: int, claim: Claim | None) -> Run:
        run = Run(row.name, number)
        archives, model = self._archives, self._archives.model
        file = archives.file(row.archive)
        directory = self._new_directory("server")
        settle(archives.model_store / file)
        env = host.env(row.cache)
        if row.package is not None:
            env["PYTHONPATH"] = row.package
        server = TorchServe(
            archives.model_store,
            {model: file},
            config={"default_workers_per_model": str(row.workers)},
            env=env,
            directory=directory,
            serve=row.serve,
            model_api=self.model_api,
        )
        try:
            with server:
                server.wait_ready(model, row.workers, timeout=TIMEOUT_SECONDS, interval=READY_INTERVAL_SECONDS)
                run.ready_s = round(server.elapsed, 3)
                answer = server.predict(model, archives.body, timeout=TIMEOUT_SECONDS)
                run.first_200_s = round(server.elapsed, 3)
                if answer.status != 200:
                    run.problems.append(f"HTTP {answer.status}: {answer.text[:200]}")
                else:
                    run.problems += check_answer(answer.json(), archives.expected(row.archive))
                run.description = server.describe(model)
                if row.cache == "store":
                    run.starts = _start_records(server, model, row.workers)
                if len(set(server.worker_pids(model))) != row.workers:
                    run.problems.append(f"{len(set(server.worker_pids(model)))} workers, expected {row.workers}")
                if claim is not None:
                    self.while_serving(server, row, run)
        except Exception as error:
            run.problems.append(f"{type(error).__name__}: {error}")
        if claim is not None and run.first_200_s is not None:
            run.problems += check_claim(claim, run, row.workers)
        clean(directory, keep_log=bool(run.problems))
        return run


def check_answer(answer: Any, expected: torch.Tensor) -> list[str]:
    """Problems of an answer against the eager model's."""
    error = relative_error(torch.tensor(answer, dtype=expected.dtype), expected)
    return [] if error <= TOLERANCE else [f"wrong answer: relative error {error:.3g} against eager"]


def check_claim(claim: Claim, run: Run, workers: int) -> list[str]:
    """Problems of a run against what its row claims."""
    facts = run.description
    problems = []
    if facts.get("backend") != claim.backend:
        problems.append(f"backend {facts.get('backend')!r}, expected {claim.backend!r}")
    if claim.result in ("eager", "compiled", "cached"):
        found = _compiler_result(facts)
        return problems + ([f"{found}, expected {claim.result}"] if found != claim.result else [])
    if facts.get("fallbacks"):
        problems.append(f"fallbacks: {facts['fallbacks']}")
    results = [start["result"] for start in run.starts]
    if results.count("built") != claim.builds:
        problems.append(f"{results.count('built')} builds, expected {claim.builds} ({', '.join(results)})")
    if len(results) != workers:
        problems.append(f"{len(results)} start records, expected {workers}")
    if any(start["backend"] != claim.backend for start in run.starts):
        problems.append(f"backends {[start['backend'] for start in run.starts]}, expected {claim.backend}")
    allowed = {claim.result, "waited", "hit"} if claim.builds and workers > 1 else {claim.result}
    if not set(results) <= allowed:
        problems.append(f"results {results}, expected {claim.result}")
    if workers == 1 and (facts.get("canary") or {}).get("source") != claim.canary:
        problems.append(f"canary {facts.get('canary')}, expected source {claim.canary!r}")
    if facts.get("counters", {}).get("compile_after_ready"):
        problems.append("compiled after READY")
    lacking = facts.get("artifact", {}).get("fxgraph_cache_miss")
    if claim.result == "hit" and claim.backend == "inductor" and lacking:
        problems.append(f"the entry lacked {lacking} graphs")
    if claim.result == "hit" and claim.backend == "aot_inductor" and facts.get("graphs_in_process"):
        problems.append(f"Dynamo compiled {facts['graphs_in_process']} graphs")
    return problems


def _compiler_result(facts: dict[str, Any]) -> str:
    """What torch.compile did in a worker of the peers' handler."""
    hits = facts.get("fxgraph_cache_hit", 0) + facts.get("autograd_cache_hit", 0)
    misses = facts.get("fxgraph_cache_miss", 0) + facts.get("autograd_cache_miss", 0)
    if not facts.get("graphs"):
        return "eager"
    if misses and not hits:
        return "compiled"
    return "cached" if hits and not misses else f"{hits} cache hits and {misses} misses"


def _start_records(server: TorchServe, model: str, workers: int, timeout: float = 10.0) -> list[dict[str, Any]]:
    """How each worker of our handler started, from the log, which lags behind READY."""
    deadline = time.monotonic() + timeout
    while True:
        lines = [line.partition("ts_handlers start ")[2] for line in server.log().splitlines()]
        records = [json.loads(line) for line in lines if line.startswith("{")]
        found = [{k: r[k] for k in ("backend", "result", "phases_ms")} for r in records if r["model"] == model]
        if len(found) >= workers or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def settle(archive: Path) -> None:
    """Start every run alike: nothing left to be written to the disk, the archive in the page cache."""
    os.sync()
    for path in [archive] if archive.is_file() else archive.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                while stream.read(1 << 22):
                    pass
    time.sleep(0.5)


def clean(directory: Path, *, keep_log: bool) -> None:
    for path in directory.iterdir() if directory.is_dir() else ():
        if keep_log and path.name == "torchserve.log":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not keep_log:
        shutil.rmtree(directory, ignore_errors=True)
