"""Warm-up before READY, and the canary: an artifact is served only after it reproduced the eager model's output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ts_handlers.backends.base import Loaded, Request
from ts_handlers.backends.eager import eager_run
from ts_handlers.errors import BuildError, CanaryError, InputError
from ts_handlers.signature import Sizes
from ts_handlers.store.base import Address, Store
from ts_handlers.structure import constants_of, flatten

# Largest accepted relative error, ||artifact - eager|| / ||eager||, by dtype of the output. Compiled float32 differs
# from eager in its last digits on the CPU and by far more where TF32 is on; half precision by 1e-3 (ResNet-50 in fp16,
# benchmarks/results/2026-11-26-h200-tensorrt-contexts-resnet50.json).
TOLERANCES = {
    torch.float64: 1e-7,
    torch.float32: 2e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
INTEGER_TOLERANCE = 0.0


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`, computed in float64; NaN where only one of them is NaN."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), a - b)
    reference = torch.where(b.isfinite(), b, torch.zeros_like(b))
    norm = float(reference.norm())
    error = float(difference.norm())
    return error / norm if norm > 0 else error


def compare_outputs(found: Any, expected: Any, tolerance: float | None = None) -> float:
    """Compare two outputs of a model, tensor by tensor, and their constants.

    Parameters
    ----------
    tolerance:
        Largest accepted relative error of floating-point outputs; None takes `TOLERANCES`. Integer and boolean outputs
        must be equal.

    Returns
    -------
    The largest relative error.

    Raises
    ------
    CanaryError
        With the first tensor that differs and by how much.
    """
    (left, found_structure), (right, structure) = flatten(found), flatten(expected)
    _compare_constants(constants_of(found_structure), constants_of(structure))
    if len(left) != len(right):
        raise CanaryError(f"expected {len(right)} output tensors, found {len(left)}")
    worst = 0.0
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CanaryError(f"output {index}: expected {b.dtype} {tuple(b.shape)}, found {a.dtype} {tuple(a.shape)}")
        if not a.numel():
            continue
        if b.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        limit = INTEGER_TOLERANCE
        if b.is_floating_point():
            limit = TOLERANCES.get(b.dtype, 5e-2) if tolerance is None else tolerance
        error = relative_error(a, b)
        if not error <= limit:  # also catches NaN
            raise CanaryError(f"output {index}: relative error {error:.3g} against eager, at most {limit:.3g} accepted")
        worst = max(worst, error)
    return worst


def _compare_constants(found: list[str], expected: list[str]) -> None:
    """Compare the numbers and texts in two outputs, which may have been computed from other weights."""
    if found != expected:
        raise CanaryError(f"the output's constants: expected {', '.join(expected)}, found {', '.join(found)}")


def compare_sizes(request: Request, loaded: Loaded, cases: Sequence[Sizes]) -> None:
    """Compare an artifact that was just built with the eager model at the given sizes.

    Raises
    ------
    BuildError
        With the sizes at which it differs or does not run.
    """
    eager = eager_run(request, loaded.signature.names)
    for sizes in cases:
        tensors = [tensor.to(request.device) for tensor in loaded.signature.generate(sizes, seed=2)]
        expected = eager(tensors)
        try:
            compare_outputs(loaded.run(tensors), expected, request.settings.canary.tolerance)
        except (CanaryError, RuntimeError, InputError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise BuildError(f"at {sizes} the artifact differs from eager: {reason[:300]}") from error


def check_canary(store: Store, address: Address, request: Request, loaded: Loaded) -> dict[str, Any]:
    """Compare an artifact with the recorded eager output for these weights, or with eager itself the first time.

    Returns
    -------
    ``{"source": "record" | "eager", "error": largest relative error}`` for `describe`.

    Raises
    ------
    CanaryError
        The artifact must not be served with these weights.
    """
    weights = request.source.weights_digest()
    record = store.read_canary(address, weights)
    source = "record"
    with few_threads(loaded):
        if record is None or not _is_complete(record):
            source = "eager"
            record = _record(request, loaded)
            cases = record["cases"]
            error = _run_cases(cases, request, loaded)
            store.write_canary(address, weights, record)
        else:
            cases = record["cases"] if loaded.variants > 1 else [_one_case(record["cases"], request, loaded)]
            error = _run_cases(cases, request, loaded)
    return {"source": source, "error": error, "cases": [case["sizes"] for case in cases]}


def _one_case(cases: list[dict[str, Any]], request: Request, loaded: Loaded) -> dict[str, Any]:
    """The case that is also the first warm-up, so that it need not run twice; otherwise the smallest one."""
    wanted = _declared_sizes(request, loaded)[:1]
    return next((case for case in cases if case["sizes"] in wanted), cases[0])


def _declared_sizes(request: Request, loaded: Loaded) -> list[Sizes]:
    example = loaded.signature.example_sizes()
    return [{**example, **sizes} for sizes in request.settings.warmup]


def _is_complete(record: dict[str, Any]) -> bool:
    cases = record.get("cases")
    if not isinstance(cases, list) or not cases:
        return False
    return all(isinstance(case, dict) and {"sizes", "inputs", "outputs", "constants"} <= set(case) for case in cases)


@contextlib.contextmanager
def few_threads(loaded: Loaded) -> Iterator[None]:
    """Run torch's own operators on as many threads as there are idle processors, where that compiles nothing anew.

    Workers of a server start together, each with as many threads as there are processors, and OpenMP threads spin
    while they wait for a descheduled one: the canaries of two workers on two processors then take many times as long as
    one alone.
    """
    threads = torch.get_num_threads()
    few = min(threads, max(1, idle_processors()))
    if not loaded.adjusts_threads or few == threads:
        yield
        return
    torch.set_num_threads(few)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def idle_processors() -> int:
    """Processors that run nothing but this thread at this moment; 0 where the kernel does not tell.

    The fourth field of /proc/loadavg is ``running/total`` threads of the whole machine, see proc_loadavg(5).
    """
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            running = int(file.read().split()[3].partition("/")[0])
        return len(os.sched_getaffinity(0)) - (running - 1)
    except (AttributeError, OSError, ValueError, IndexError):
        return 0


def _run_cases(cases: list[dict[str, Any]], request: Request, loaded: Loaded) -> float:
    worst = 0.0
    for case in cases:
        found = loaded.run([tensor.to(request.device) for tensor in case["inputs"]])
        leaves, structure = flatten(found)
        _compare_constants(constants_of(structure), case["constants"])
        worst = max(worst, compare_outputs(tuple(leaves), tuple(case["outputs"]), request.settings.canary.tolerance))
    return worst


def _record(request: Request, loaded: Loaded) -> dict[str, Any]:
    """Run the eager model on canary inputs: the smallest sizes, the example sizes and those of the first warm-up."""
    signature = loaded.signature
    eager = eager_run(request, signature.names)
    wanted = [signature.example_sizes()]
    if request.settings.inputs:
        smallest = {name: dimension.min for name, dimension in signature.dimensions.items()}
        wanted = [smallest, *wanted, *_declared_sizes(request, loaded)[:1]]
        wanted = [sizes for position, sizes in enumerate(wanted) if sizes not in wanted[:position]]
    cases = []
    for index, sizes in enumerate(wanted if loaded.sizes is None else loaded.sizes):
        inputs = signature.generate(sizes, seed=request.settings.canary.seed + index)
        outputs, structure = flatten(eager([tensor.to(request.device) for tensor in inputs]))
        kept = [tensor.detach().cpu().clone() for tensor in outputs]
        constants = constants_of(structure)
        cases.append({"sizes": dict(sizes), "inputs": inputs, "outputs": kept, "constants": constants})
    return {"cases": cases}


def run_warmup(request: Request, loaded: Loaded, done: Sequence[Sizes] = ()) -> int:
    """Run the declared warm-up sizes on each slot, except those in `done`, which ran on one; returns the runs."""
    if not request.settings.inputs or loaded.warmed_up:
        return 0
    wanted = _declared_sizes(request, loaded)
    # A GPU's first run in each context allocates and may compile kernels. The pool lends its slots in turn.
    slots = loaded.pool.size if loaded.pool is not None and request.device.type == "cuda" else 1
    remaining = [sizes for sizes in wanted if slots > 1 or sizes not in done]
    with few_threads(loaded):
        for sizes in remaining:
            tensors = [tensor.to(request.device) for tensor in loaded.signature.generate(sizes)]
            for _ in range(slots):
                loaded.run(tensors)
    return len(remaining) * slots
