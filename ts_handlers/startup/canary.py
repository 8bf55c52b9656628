"""The canary: an artifact is served only after it has reproduced the eager model's output with these weights.

The first start with new weights runs the eager model and records its output in the store; later starts compare with the
record. How outputs are compared is in `ts_handlers.backends.compare`, where inputs come from in
`ts_handlers.startup.inputs`.

A record is a dict with these keys; the last three are absent in records of older versions::

    cases  list of dicts with the fields of `ts_handlers.backends.compare.Case`, and "origin"
    kind   what `ts_handlers.model.sampling` draws for this model
    rows   whether rows are independent, see `ts_handlers.startup.rows`; None where nothing can be joined
    constants  values of these weights in the place of the artifact's own, see `ts_handlers.startup.constants`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ts_handlers.backends.base import Target
from ts_handlers.backends.compare import Case, case_of, compare_case
from ts_handlers.backends.eager import eager_run
from ts_handlers.errors import SampleError
from ts_handlers.execution.base import Loaded, Run
from ts_handlers.model.sampling import KINDS, RANDOM
from ts_handlers.model.signature import Sizes
from ts_handlers.startup.constants import take_constants, use_constants
from ts_handlers.startup.inputs import PADDED, SAMPLE, CanaryInput, canary_inputs, padded_input, settle_kind
from ts_handlers.startup.rows import joined_sizes, rows_are_independent
from ts_handlers.startup.warmup import declared_sizes, few_threads
from ts_handlers.store.address import Address
from ts_handlers.store.base import Store

Record = dict[str, Any]


def check_canary(
    store: Store, address: Address, target: Target, loaded: Loaded, notes: list[str], *, thorough: bool = False
) -> dict[str, Any]:
    """Compare an artifact with the recorded eager output for these weights, or with eager itself the first time.

    Parameters
    ----------
    notes:
        Gets what `describe` shall say.
    thorough:
        Compare on all inputs of a record, as with an artifact that nobody has served yet.

    Returns
    -------
    ``{"source": "record" | "eager", "error": largest relative error, "cases": sizes, "rows": bool | None}`` for
    `describe`.

    Raises
    ------
    CanaryError
        The artifact must not be served with these weights.
    SampleError
        The eager model refuses every input that is drawn.
    """
    weights = target.source.weights_digest()
    record = store.read_canary(address, weights)
    source = "record"
    with few_threads(loaded):
        if record is None or not _is_complete(record, loaded):
            source = "eager"
            constants = take_constants(target, loaded)
            record = {**_record(target, loaded, notes), "constants": constants}
        else:
            use_constants(loaded, record.get("constants", {}))
            if "rows" not in record and joined_sizes(loaded.signature) is not None:
                source, thorough = "eager", True
                record = _completed(record, target, loaded)
        loaded.signature.kind = record["kind"] if record.get("kind") in KINDS else RANDOM
        cases = record["cases"]
        if source == "record" and loaded.variants == 1 and not thorough:
            cases = [_one_case(cases, target, loaded)]
        error = _run_cases(cases, target, loaded)
        if source == "eager":
            store.write_canary(address, weights, record)
    rows = record.get("rows")
    sizes = [case["sizes"] for case in cases]
    return {"source": source, "error": error, "cases": sizes, "rows": rows if isinstance(rows, bool) else None}


def _one_case(cases: list[Record], target: Target, loaded: Loaded) -> Record:
    """The case that is also the first warm-up, so that it need not run twice; otherwise the smallest one."""
    wanted = declared_sizes(target, loaded)[:1]
    return next((case for case in cases if case["sizes"] in wanted), cases[0])


def _is_complete(record: Record, loaded: Loaded) -> bool:
    if "constants" not in record and loaded.held is not None and (loaded.held.constants or loaded.held.folded):
        return False  # of an earlier version, which did not compare them
    cases = record.get("cases")
    if not isinstance(cases, list) or not cases:
        return False
    return all(isinstance(case, dict) and {"sizes", "inputs", "outputs", "constants"} <= set(case) for case in cases)


def _run_cases(cases: list[Record], target: Target, loaded: Loaded) -> float:
    tolerance = target.settings.canary.tolerance
    fields = [field.name for field in dataclasses.fields(Case)]
    wanted = [Case(**{name: case[name] for name in fields}) for case in cases]
    return max(compare_case(loaded.run, case, target.device, tolerance) for case in wanted)


def _record(target: Target, loaded: Loaded, notes: list[str]) -> Record:
    """Run the eager model on canary inputs: the smallest sizes, the example sizes and those of the first warm-up."""
    signature = loaded.signature
    eager = eager_run(target, signature.names)
    wanted = _wanted(target, loaded)
    if signature.kind is None:
        settle_kind(eager, signature, target, notes)
    inputs = canary_inputs(signature, wanted, target.settings.canary.seed, target.source.samples)
    cases = _cases(inputs, eager, target)
    return {"cases": cases, "kind": signature.kind, "rows": _rows(eager, target, loaded)}


def _completed(record: Record, target: Target, loaded: Loaded) -> Record:
    """A record of an older version with what it lacks; its own inputs stay."""
    eager = eager_run(target, loaded.signature.names)
    padded = padded_input(loaded.signature, _wanted(target, loaded), target.settings.canary.seed)
    cases = [*record["cases"], *_cases(padded, eager, target)]
    return {"kind": RANDOM, **record, "cases": cases, "rows": _rows(eager, target, loaded)}


def _rows(eager: Run, target: Target, loaded: Loaded) -> bool | None:
    canary = target.settings.canary
    if joined_sizes(loaded.signature) is None:
        return None
    return rows_are_independent(eager, loaded.signature, canary.seed, target.device, canary.tolerance)


def _wanted(target: Target, loaded: Loaded) -> list[Sizes]:
    if loaded.sizes is not None:
        return loaded.sizes
    signature = loaded.signature
    wanted = [signature.example_sizes()]
    if target.settings.inputs:
        smallest = {name: dimension.min for name, dimension in signature.dimensions.items()}
        wanted = [smallest, *wanted, *declared_sizes(target, loaded)[:1]]
    return [sizes for position, sizes in enumerate(wanted) if sizes not in wanted[:position]]


def _cases(inputs: Iterable[CanaryInput], eager: Run, target: Target) -> list[Record]:
    cases = []
    for each in inputs:
        try:
            case = case_of(eager, each.sizes, each.tensors, target.device)
        except Exception as error:
            if each.origin in (PADDED, SAMPLE):
                continue  # a mask that the model does not take as one, or what another model took
            shapes = [tuple(tensor.shape) for tensor in each.tensors]
            raise SampleError(
                f"the drawn input of the shapes {shapes} is refused by the plain model: {type(error).__name__}: {error}"
            ) from error
        fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        cases.append({**fields, "origin": each.origin})
    return cases
