"""One process that measures the cost of a call: the artifact's runner alone, ours, and plain torch.compile.

They are called in turn, so that a slow moment touches all of them alike, and in a random order, so that none always
finds the weights that another one left in the processor's caches. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from start_child import build_eager, read_inputs, start_ours

from ts_handlers.backends.aot_inductor.container import TorchRunner
from ts_handlers.backends.aot_inductor.load import place_weights
from ts_handlers.store.entry import read_manifest

WARM_UP_CALLS = 20


def open_runner(model: Any) -> Callable[[list[torch.Tensor]], Any]:
    """torch's own runner on the artifact that `model` was loaded from, without anything of ours around it."""
    (manifest,) = Path(os.environ["TS_HANDLERS_CACHE"], "entries").rglob("manifest.json")
    description = read_manifest(manifest.parent).artifact
    target = model._target
    constants = place_weights(target, manifest.parent, description)
    (variant,) = description["variants"]
    runner = TorchRunner(manifest.parent / variant["name"] / variant["library"], target.device, 1)
    runner.use_constants({name: constants[fqn] for name, fqn in runner.constant_names().items()})
    run: Callable[[list[torch.Tensor]], Any] = runner.run
    return run


def measure(directory: Path, work: Path, calls: int) -> dict[str, Any]:
    """Medians in milliseconds, and medians of the ratios of neighbouring calls."""
    inputs = read_inputs(work)
    tensors = list(inputs.values())
    model = start_ours(directory, work / "aot_inductor.json")
    if model.outcome.backend != "aot_inductor":
        raise SystemExit(f"the model is served by {model.outcome.backend}: {model.outcome.fallbacks}")
    runner = open_runner(model)
    eager = build_eager(directory)
    compiled = torch.compile(eager)
    candidates: dict[str, Callable[[], Any]] = {
        "runner": lambda: runner(tensors),
        "compiled_model": lambda: model(**inputs),
        "torch_compile": lambda: compiled(**inputs),
        "eager": lambda: eager(**inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    order = random.Random(0)
    with torch.no_grad():
        for number in range(WARM_UP_CALLS + calls):
            for name in order.sample(names, len(names)):
                started = time.perf_counter()
                candidates[name]()
                if number >= WARM_UP_CALLS:
                    times[name].append((time.perf_counter() - started) * 1000)
        error = float((candidates["compiled_model"]() - candidates["eager"]()).norm() / candidates["eager"]().norm())
    return {
        "result": model.outcome.result,
        "relative_error": error,
        "median_ms": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "compiled_model_over_runner": _ratio(times["compiled_model"], times["runner"]),
        "compiled_model_over_torch_compile": _ratio(times["compiled_model"], times["torch_compile"]),
    }


def _ratio(times: list[float], reference: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(times, reference, strict=True)), 4)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
