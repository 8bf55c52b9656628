"""One measured process of in_process.py: start, first output, steady state. Prints one JSON line.

Imports nothing heavy by itself; what a mode needs is imported where it is timed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

LAUNCHED = "BENCHMARK_LAUNCHED"
"""Environment variable: `time.monotonic()` of the parent just before it started this process."""
HEAVY = ("sympy", "torch._inductor", "torch._dynamo", "transformers", "fsspec", "redis", "rich")
STEADY_SECONDS = 4.0


class Clock:
    """Seconds since the launch of this process, and the parts between marks."""

    def __init__(self) -> None:
        self._launched = float(os.environ[LAUNCHED])
        self._last = 0.0
        self.parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """End a part here."""
        now = time.monotonic() - self._launched
        self.parts[part] = round(now - self._last, 4)
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the launch to the last mark."""
        return round(self._last, 4)


def read_inputs(folder: Path) -> dict[str, Any]:
    """Tensors that the parent wrote as raw bytes: cheaper than any format with a reader of its own."""
    import torch

    specs = json.loads((folder / "inputs.json").read_text("utf-8"))
    return {
        name: torch.frombuffer(bytearray((folder / name).read_bytes()), dtype=getattr(torch, dtype)).reshape(shape)
        for name, (dtype, shape) in specs.items()
    }


def build_eager(directory: Path) -> Any:
    """The eager model, as TorchServe's BaseHandler builds it: import, construct, load."""
    import torch

    spec = importlib.util.spec_from_file_location("benchmark_model", directory / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (model_class,) = (
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    )
    model = model_class()
    model.load_state_dict(torch.load(directory / "model.pt", map_location="cpu"))
    return model.eval()


def start_ours(directory: Path, settings_file: Path) -> Any:
    """The model from the store, through the package's own way."""
    from ts_handlers import ArchiveSource, parse_settings, start_model

    settings = parse_settings(json.loads(settings_file.read_text("utf-8")))
    source = ArchiveSource("benchmark", directory, "model.py", "model.pt", ignored_files=["handler.py"])
    return start_model(source, settings)


def run(mode: str, directory: Path, work: Path) -> dict[str, Any]:
    """Start in a mode ("eager", "compile", or a backend of ours) and return what was measured."""
    clock = Clock()
    clock.mark("python")
    import torch

    clock.mark("import_torch")
    inputs = read_inputs(work)
    clock.mark("inputs")
    outcome: dict[str, Any] = {}
    if mode in ("eager", "compile"):
        model = build_eager(directory)
        if mode == "compile":
            model = torch.compile(model)
        context = torch.no_grad
    else:
        model = start_ours(directory, work / f"{mode}.json")
        outcome = {"backend": model.outcome.backend, "result": model.outcome.result}
        context = torch.no_grad
    clock.mark("model")
    with context():
        output = model(**inputs)
        clock.mark("first_inference")
        heavy = sorted(name for name in HEAVY if name in sys.modules)
        steady = _steady(lambda: model(**inputs))
    if mode == "compile":
        outcome = _cache_result()
    elif mode != "eager":
        outcome["phases_ms"] = model.describe()["phases_ms"]
    return {
        "mode": mode,
        "total_s": clock.total,
        "parts_s": clock.parts,
        "steady_ms": steady,
        "heavy_modules": heavy,
        "outcome": outcome,
        "output": output.tolist(),
    }


def _steady(call: Any) -> float:
    """Median milliseconds of one call."""
    times: list[float] = []
    deadline = time.perf_counter() + STEADY_SECONDS
    while len(times) < 10 or time.perf_counter() < deadline:
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
    return round(statistics.median(times), 3)


def _cache_result() -> dict[str, Any]:
    from torch._dynamo.utils import counters

    return {
        "fxgraph_cache_hit": counters["inductor"]["fxgraph_cache_hit"],
        "fxgraph_cache_miss": counters["inductor"]["fxgraph_cache_miss"],
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
