"""The rows of the benchmark: what is started, from which state, and what must be true of it afterwards."""

from __future__ import annotations

import dataclasses

Seeds = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a row says of itself; a run of which it is not true is a failed run.

    `result` is "eager", "compiled" (torch.compile, nothing cached), "cached" (torch.compile, nothing missed), or for
    our handler "built" or "hit". `builds` is the number of builds of all workers together. `canary` is where our
    handler took the expected output from: "record" or "eager".
    """

    backend: str
    result: str
    builds: int = 0
    canary: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to start the model.

    Attributes
    ----------
    name, title:
        For the command line and the table.
    archive:
        A name of `archives.VARIANTS`.
    cache:
        "none", "inductor" (an own TORCHINDUCTOR_CACHE_DIR), "example" (that and TORCHINDUCTOR_FX_GRAPH_CACHE=1, as
        TorchServe's caching example documents) or "store" (TS_HANDLERS_CACHE).
    seeds:
        Archives that are started once, uncounted, before the measurement, so that the caches hold what they leave.
    host:
        "fresh": everything empty. "same": the very folders that the seeds used. "copy": a copy of all of them.
        "new": a copy of the cache alone under another path; temporary folder and home empty.
    package:
        A checkout of the project from which the workers import the package; None takes what is installed.
    serve:
        Options of ``ts-handlers serve``, which then launches TorchServe; None launches it by ``torchserve``.
    workers:
        Workers of the model. With more than one the row's time is that until all are READY.
    """

    name: str
    title: str
    archive: str
    claim: Claim
    cache: str = "none"
    seeds: Seeds = ()
    host: str = "fresh"
    workers: int = 1
    package: str | None = None
    serve: tuple[str, ...] | None = None

    @property
    def metric(self) -> str:
        """The measurement that is the row's time."""
        return "first_200_s" if self.workers == 1 else "ready_s"


def _ours(backend: str, result: str, builds: int = 0, canary: str = "record") -> Claim:
    return Claim(backend, result, builds, canary)


EAGER = Claim("eager", "eager")
COMPILED = Claim("torch.compile", "compiled")
CACHED = Claim("torch.compile", "cached")
AOT_HIT = _ours("aot_inductor", "hit")
AOT_BUILT = _ours("aot_inductor", "built", builds=1, canary="eager")
AOT_UPDATED = _ours("aot_inductor", "hit", canary="eager")
INDUCTOR_HIT = _ours("inductor", "hit")
INDUCTOR_UPDATED = _ours("inductor", "hit", canary="eager")

_COMPILE, _AOT, _INDUCTOR = ("compile",), ("aot",), ("inductor",)
_STORE = "store"

ROWS = (
    Row("eager", "eager (BaseHandler)", "eager", EAGER),
    Row("compile_cold", "pt2 compile, cold", "compile", COMPILED, "inductor"),
    Row("example_warm", "caching example, same temp folder", "compile", CACHED, "example", _COMPILE, "same"),
    Row("example_new_container", "caching example, new container", "compile", CACHED, "example", _COMPILE, "new"),
    Row("aot_cold", "ours, cold", "aot", AOT_BUILT, _STORE),
    Row("aot_warm", "ours, warm: aot_inductor", "aot", AOT_HIT, _STORE, _AOT, "same"),
    Row("inductor_warm", "ours, warm: inductor", "inductor", INDUCTOR_HIT, _STORE, _INDUCTOR, "same"),
    Row("aot_new_host", "ours, new host: aot_inductor", "aot", AOT_HIT, _STORE, _AOT, "new"),
    Row("inductor_new_host", "ours, new host: inductor", "inductor", INDUCTOR_HIT, _STORE, _INDUCTOR, "new"),
    Row(
        "aot_update_first",
        "ours, new weights, 1st start: aot_inductor",
        "aot_update",
        AOT_UPDATED,
        _STORE,
        _AOT,
        "copy",
    ),
    Row(
        "aot_update_second",
        "ours, new weights, 2nd start: aot_inductor",
        "aot_update",
        AOT_HIT,
        _STORE,
        ("aot", "aot_update"),
        "same",
    ),
    Row(
        "inductor_update_first",
        "ours, new weights, 1st start: inductor",
        "inductor_update",
        INDUCTOR_UPDATED,
        _STORE,
        _INDUCTOR,
        "copy",
    ),
    Row("eager_4", "eager, 4 workers", "eager", EAGER, workers=4),
    Row("aot_cold_4", "ours, cold, 4 workers", "aot", AOT_BUILT, _STORE, workers=4),
    Row("aot_warm_4", "ours, warm, 4 workers: aot_inductor", "aot", AOT_HIT, _STORE, _AOT, "same", workers=4),
)


def select(names: str | None) -> list[Row]:
    """The rows of a comma-separated list, in the benchmark's order; all of them for None."""
    if names is None:
        return list(ROWS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {row.name for row in ROWS}
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise SystemExit(f"--rows: unknown {', '.join(unknown) or 'empty list'}; known: {', '.join(sorted(known))}")
    return [row for row in ROWS if row.name in wanted]
