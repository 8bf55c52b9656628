"""The canary: an artifact is served only after it has reproduced the eager model's output with these weights.

The first start with new weights runs the eager model and records its output in the store; later starts compare with the
record. How outputs are compared is in `ts_handlers.backends.compare`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ts_handlers.backends.base import Target
from ts_handlers.backends.compare import Case, compare_case, eager_case
from ts_handlers.backends.eager import eager_run
from ts_handlers.execution.base import Loaded
from ts_handlers.startup.constants import take_constants, use_constants
from ts_handlers.startup.warmup import declared_sizes, few_threads
from ts_handlers.store.address import Address
from ts_handlers.store.base import Store


def check_canary(store: Store, address: Address, target: Target, loaded: Loaded) -> dict[str, Any]:
    """Compare an artifact with the recorded eager output for these weights, or with eager itself the first time.

    Returns
    -------
    ``{"source": "record" | "eager", "error": largest relative error}`` for `describe`.

    Raises
    ------
    CanaryError
        The artifact must not be served with these weights.
    """
    weights = target.source.weights_digest()
    record = store.read_canary(address, weights)
    source = "record"
    with few_threads(loaded):
        if record is None or not _is_complete(record, loaded):
            source = "eager"
            constants = take_constants(target, loaded)
            record = {**_record(target, loaded), "constants": constants}
            cases = record["cases"]
            error = _run_cases(cases, target, loaded)
            store.write_canary(address, weights, record)
        else:
            use_constants(loaded, record.get("constants", {}))
            cases = record["cases"] if loaded.variants > 1 else [_one_case(record["cases"], target, loaded)]
            error = _run_cases(cases, target, loaded)
    return {"source": source, "error": error, "cases": [case["sizes"] for case in cases]}


def _one_case(cases: list[dict[str, Any]], target: Target, loaded: Loaded) -> dict[str, Any]:
    """The case that is also the first warm-up, so that it need not run twice; otherwise the smallest one."""
    wanted = declared_sizes(target, loaded)[:1]
    return next((case for case in cases if case["sizes"] in wanted), cases[0])


def _is_complete(record: dict[str, Any], loaded: Loaded) -> bool:
    if "constants" not in record and loaded.held is not None and (loaded.held.constants or loaded.held.folded):
        return False  # of an earlier version, which did not compare them
    cases = record.get("cases")
    if not isinstance(cases, list) or not cases:
        return False
    return all(isinstance(case, dict) and {"sizes", "inputs", "outputs", "constants"} <= set(case) for case in cases)


def _run_cases(cases: list[dict[str, Any]], target: Target, loaded: Loaded) -> float:
    tolerance = target.settings.canary.tolerance
    fields = [field.name for field in dataclasses.fields(Case)]
    wanted = [Case(**{name: case[name] for name in fields}) for case in cases]
    return max(compare_case(loaded.run, case, target.device, tolerance) for case in wanted)


def _record(target: Target, loaded: Loaded) -> dict[str, Any]:
    """Run the eager model on canary inputs: the smallest sizes, the example sizes and those of the first warm-up."""
    signature = loaded.signature
    eager = eager_run(target, signature.names)
    wanted = [signature.example_sizes()]
    if target.settings.inputs:
        smallest = {name: dimension.min for name, dimension in signature.dimensions.items()}
        wanted = [smallest, *wanted, *declared_sizes(target, loaded)[:1]]
        wanted = [sizes for position, sizes in enumerate(wanted) if sizes not in wanted[:position]]
    cases = []
    for index, sizes in enumerate(wanted if loaded.sizes is None else loaded.sizes):
        case = eager_case(eager, signature, sizes, target.settings.canary.seed + index, target.device)
        cases.append({field.name: getattr(case, field.name) for field in dataclasses.fields(case)})
    return {"cases": cases}
