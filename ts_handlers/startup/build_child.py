"""The child process that builds artifacts into the store and serves nothing; `build_process` is the parent's side.

Its specification (`ts_handlers.system.child_process`):

- ``parent``: the process with which this one ends
- ``nice``, ``memory_mb``: limits, the latter None for no bound on what each process of the build may allocate
- what `ts_handlers.model.recipes.restore` takes
- ``retry_failed``: whether to build what has failed a short time ago
- ``keys``: the parts of the keys that the parent computed, by backend; building under another key would be in vain

Answers as `ts_handlers.startup.build_process` says. Everything that anybody prints goes to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from ts_handlers.system.child_process import end_with_parent, read_specification

Send = Callable[[dict[str, Any]], None]


def main() -> int:
    """Read the specification, build, answer; the exit status is 0 when there is a result."""
    send = _take_standard_output()
    spec = read_specification()
    end_with_parent(int(spec["parent"]))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        _limit(int(spec["nice"]), spec["memory_mb"])
        result = _build(spec, send)
    except Exception as error:
        if _lacks_memory(error):
            needs = f"a process of the build needs more than background.memory_mb: {spec['memory_mb']}"
            send({"error": f"MemoryError: {needs}"})
            return 1
        logging.getLogger(__name__).debug("details", exc_info=error)
        send({"error": _reason(error, spec["memory_mb"])})
        return 1
    send({"result": result})
    return 0


def _take_standard_output() -> Send:
    """Keep standard output for answers; what others print goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")  # a copy is not inherited by what this process starts
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    return send


def _reason(error: Exception, memory_mb: int | None) -> str:
    # A library that does not fit is an ImportError with a message of the C library.
    if isinstance(error, MemoryError) or (memory_mb is not None and "failed to map segment" in str(error)):
        return f"MemoryError: a process of the build needs more than background.memory_mb: {memory_mb}"
    return f"{type(error).__name__}: {error}"


def _limit(nice: int, memory_mb: int | None) -> None:
    os.nice(nice)
    if memory_mb is None:
        return
    import resource

    # Memory that the process could write to; its address space would count what a GPU driver merely reserves.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = memory_mb << 20
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _lacks_memory(error: Exception) -> bool:
    """Whether memory was refused; a library that the loader cannot map for that reason is an `ImportError`."""
    return isinstance(error, MemoryError) or (isinstance(error, ImportError) and "failed to map segment" in str(error))


def _build(spec: dict[str, Any], send: Send) -> dict[str, Any]:
    from ts_handlers.model.recipes import restore
    from ts_handlers.startup.fallback import start_here
    from ts_handlers.startup.target import new_target
    from ts_handlers.store.upkeep.space import wait_for_room

    made = restore(spec)
    _check_keys(new_target(*made), spec["keys"])
    model = start_here(
        *made,
        progress=lambda phase, estimate: send({"phase": phase, "estimate": estimate}),
        retry_failed=spec["retry_failed"],
        event="build",
    )
    wait_for_room()
    facts = model.describe()
    wanted = ("backend", "key", "result", "missed", "fallbacks", "notes", "counters", "build_ms", "phases_ms", "device")
    return {"model": made.source.name, **{name: facts[name] for name in wanted}}


def _check_keys(target: Any, expected: dict[str, list[list[str]]]) -> None:
    from ts_handlers.backends import get_backend
    from ts_handlers.errors import BuildError
    from ts_handlers.key.cache_key import CacheKey, explain, only_differing
    from ts_handlers.metrics import Metrics
    from ts_handlers.startup.address import key_in_store
    from ts_handlers.store.opening import open_store

    store, _ = open_store(target.settings, Metrics()) if expected else (None, None)
    for backend, parts in expected.items():
        theirs = CacheKey(tuple((name, value) for name, value in parts))
        assert store is not None
        different = explain(theirs, key_in_store(get_backend(backend), target, store))
        if different:
            values = [(name, *only_differing(left, right)) for name, left, right in different]
            found = "; ".join(f"{name}: {left!r} there, {right!r} here" for name, left, right in values)
            raise BuildError(
                f"the build process computes another key than the server ({found}), so its artifact would not be "
                "found; the model or torch's state depends on something that only the server has, such as a variable"
            )


if __name__ == "__main__":
    sys.exit(main())
