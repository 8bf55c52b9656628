"""A TensorRT plan in an entry: writing its files, loading it, and checking a new one against the eager model."""

from __future__ import annotations

import contextlib
import functools
import itertools
from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Description, Target
from ts_handlers.backends.index_limits import limit_facts, with_limits
from ts_handlers.backends.tensorrt import library as tensorrt_library
from ts_handlers.backends.tensorrt import weights as tensorrt_refit
from ts_handlers.backends.tensorrt.outputs import take
from ts_handlers.backends.tensorrt.profiles import canary_sizes, choose_profile, covered_signature, show_bounds
from ts_handlers.execution.base import Loaded, Run
from ts_handlers.model.archive_files import Tensors
from ts_handlers.model.structure import unflatten
from ts_handlers.settings.sections import ContextSettings

PLAN, CACHE = "plan.engine", "plan.cache"


def write_plan(plan: Any, directory: Path, description: Description) -> None:
    """Write a plan into an entry, and what loading it needs to know into the entry's description.

    Parameters
    ----------
    plan:
        A `ts_handlers.backends.tensorrt.network.Plan`.
    """
    (directory / PLAN).write_bytes(plan.data)
    description["inputs"], description["outputs"] = list(plan.inputs), list(plan.outputs)
    description["returns"] = [list(place) for place in plan.returns]
    description["in_tensorrt"] = [plan.converted, plan.total]


def load_plan(
    target: Target, directory: Path, description: Description, state: Tensors | None = None
) -> tuple[Loaded, Any]:
    """Put a plan on the device.

    Parameters
    ----------
    state:
        Weights to take instead of the archive's, by the archive's names.

    Returns
    -------
    The artifact, and its `ts_handlers.backends.tensorrt.runtime.TensorRTEngine`.

    Raises
    ------
    LoadError
        TensorRT does not accept the plan or the weights.
    RefitError
        The plan cannot take these weights.
    """
    from ts_handlers.backends.tensorrt.runtime import TensorRTEngine
    from ts_handlers.execution.runner import EngineRunner
    from ts_handlers.execution.torch_device import TorchDevice

    signature = target.require_signature()
    contexts = target.settings.contexts
    profiles = description["profiles"]
    weights = tensorrt_refit.plan_weights(target, description, state)
    engine: Any = TensorRTEngine(
        description["flavour"],
        directory / PLAN,
        name=" | ".join(show_bounds(ranges) for ranges in profiles),
        inputs=description["inputs"],
        outputs=description["outputs"],
        device=target.device,
        weights=weights,
        runtime_cache=directory / CACHE,
        cuda_graphs=contexts.cuda_graphs,
        output_bytes=description.get("output_bytes"),
    )
    device: Any = TorchDevice(target.device)
    runner = EngineRunner([engine], contexts, device)
    output = description["output"]
    returns = description.get("returns") or [["output", n] for n in range(len(description["outputs"]))]  # older entries
    several = len(profiles) > 1

    def run(tensors: list[torch.Tensor]) -> Any:
        index = choose_profile(profiles, signature.sizes(tensors)) if several else 0
        return unflatten(take(returns, runner.run(index, tensors), tensors), output)

    facts = _facts(description, contexts)
    facts["weights_from"] = "plan" if weights is None else "archive"
    facts["memory"] = runner.memory()
    facts.update(limit_facts(description, target.signature))
    loaded = Loaded(
        run=run,
        signature=with_limits(covered_signature(signature, profiles), description),
        sizes=canary_sizes(profiles),
        variants=len(profiles),
        facts=facts,
        pool=runner.pool,
        end_warmup=functools.partial(_stop_recording, engine.recorder, facts),
    )
    return loaded, engine


def _facts(description: Description, contexts: ContextSettings) -> dict[str, Any]:
    """What `describe` says of a plan and how it runs."""
    facts = {
        "flavour": tensorrt_library.version(description["flavour"]),
        "profiles": description["profiles"],
        "in_tensorrt": description["in_tensorrt"],
        "quantized": description["quantized"],
        "contexts": contexts.count,
        "scratch": contexts.scratch,
    }
    if "refused" in description.get("refit", {}):
        facts["refit_refused"] = description["refit"]["refused"]
    return facts


def _stop_recording(recorder: Any, facts: dict[str, Any]) -> None:
    if recorder is not None:
        recorder.stop_recording(facts)


def verify(
    target: Target,
    directory: Path,
    description: Description,
    eager: Run | None = None,
    state: Tensors | None = None,
) -> Loaded:
    """Compare the plan with eager at the ends of every profile, and keep the kernels compiled on the way.

    Parameters
    ----------
    eager:
        What to compare with; None takes the eager model.
    state:
        Weights to take instead of the archive's, with which `eager` computes.

    Raises
    ------
    BuildError
        With the sizes at which the plan differs or does not run.
    """
    from ts_handlers.backends.compare import compare_sizes

    loaded, engine = load_plan(target, directory, description, state)
    description["output_bytes"] = engine.output_bytes
    corners = [
        dict(zip(ranges, corner, strict=True))
        for ranges in description["profiles"]
        for corner in itertools.product(*(sorted(set(bounds)) for bounds in ranges.values()))
    ]
    with contextlib.nullcontext() if engine.recorder is None else engine.recorder.paused():
        compare_sizes(target, loaded, corners, eager=eager, what="plan")
    cache = engine.runtime_cache()
    if cache:
        (directory / CACHE).write_bytes(cache)
    return loaded
