"""Which inputs an artifact is compared on, and whether the plain model accepts what is drawn for it.

`canary_inputs` is the only place where canary inputs come from. `settle_inputs` asks the plain model before anything is
built: a model may refuse random inputs, such as boxes whose ends are swapped or an index of a smaller table, and then
no backend is at fault. On a GPU an index out of range is no exception, but ends CUDA in the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ts_handlers.backends.base import Target
from ts_handlers.backends.calling import call_module, check_names, takes_names
from ts_handlers.errors import InputError, SampleError, one_line, without_frames
from ts_handlers.execution.base import Loaded, Run
from ts_handlers.model.sampling import KINDS, RANDOM, SMALL
from ts_handlers.model.signature import Signature, Sizes
from ts_handlers.settings import SECTION, InputSpec
from ts_handlers.settings.dtypes import INTEGERS
from ts_handlers.startup.rows import joined_sizes, rows_are_independent

logger = logging.getLogger(__name__)

PADDED = "padded"
SAMPLE = "sample"


@dataclasses.dataclass(frozen=True)
class CanaryInput:
    """An input of the canary.

    Attributes
    ----------
    sizes:
        The sizes of the dynamic dimensions.
    tensors:
        In declared order, on the CPU.
    origin:
        A kind of `ts_handlers.model.sampling.KINDS`, `PADDED`: drawn, but for masks that are left-aligned, or `SAMPLE`:
        what a sample request has led to.
    """

    sizes: Sizes
    tensors: list[torch.Tensor]
    origin: str


def canary_inputs(
    signature: Signature, wanted: Sequence[Sizes], seed: int, samples: Sequence[Mapping[str, torch.Tensor]] = ()
) -> Iterator[CanaryInput]:
    """The inputs on which an artifact is compared with the eager model, each with where it came from.

    Parameters
    ----------
    signature:
        What the artifact accepts.
    wanted:
        The sizes, one input for each.
    seed:
        Of the first one.
    samples:
        Inputs by name, on the CPU; those that the signature does not accept are left out.
    """
    for index, sizes in enumerate(wanted):
        yield CanaryInput(sizes, signature.generate(sizes, seed=seed + index), signature.kind or RANDOM)
    yield from padded_input(signature, wanted, seed)
    for sample in samples:
        if set(sample) == set(signature.names):
            with contextlib.suppress(InputError):
                tensors = signature.bind((), sample, torch.device("cpu"))
                yield CanaryInput(signature.check(tensors), tensors, SAMPLE)


def padded_input(signature: Signature, wanted: Sequence[Sizes], seed: int) -> Iterator[CanaryInput]:
    """One input whose padding masks are as in real requests: each row begins with content and ends with padding.

    Random masks do not show a model that has a path of its own for such masks, as `torch.nn.TransformerEncoder` has.
    """
    for sizes in reversed(wanted):
        tensors = signature.generate(sizes, seed=seed)
        found = [index for index, spec in enumerate(signature.inputs) if _is_mask(spec, signature.inputs)]
        for index in found:
            mask = _left_aligned(signature.inputs[index], tensors[index])
            if mask is None:
                break
            tensors[index] = mask
        else:
            if found:
                yield CanaryInput(sizes, tensors, PADDED)
            return


def _is_mask(spec: InputSpec, inputs: Sequence[InputSpec]) -> bool:
    """Whether an input is named like a mask and has an element for each position of another input."""
    if "mask" not in spec.name.lower() or spec.dtype not in INTEGERS or len(spec.shape) != 2:
        return False
    return any(other is not spec and other.shape[:2] == spec.shape for other in inputs)


def _left_aligned(spec: InputSpec, drawn: torch.Tensor) -> torch.Tensor | None:
    rows, length = drawn.shape
    if length < 2:
        return None
    kept = torch.tensor([1 + (length - 1) * (row + 1) // (rows + 1) for row in range(rows)]).clamp(max=length - 1)
    content = torch.arange(length) < kept.unsqueeze(1)
    # PyTorch's own `key_padding_mask` is true where there is padding, all others where there is content.
    mask = (~content if "pad" in spec.name.lower() else content).to(drawn.dtype)
    limits = [bound for bound in (spec.limits or ()) if not isinstance(bound, tuple)]
    if limits and ((limits[0] or 0) > 0 or (limits[1] is not None and limits[1] <= 1)):
        return None
    return None if spec.excludes or len(limits) != len(spec.limits or ()) else mask


def settle_inputs(target: Target, notes: list[str]) -> None:
    """Find a kind of drawn inputs that the plain model accepts; from then on the target's signature draws that kind.

    Parameters
    ----------
    notes:
        Gets what `describe` shall say.

    Raises
    ------
    SettingsError
        The declared inputs do not fit the parameters of `forward`.
    SampleError
        The plain model refuses all kinds.
    """
    signature = target.signature
    if signature is None or signature.kind is not None:
        return
    module = target.eager()
    if target.source.weights_by_name:  # an exported program has compared its inputs itself
        check_names(module, signature.names)
    how = takes_names(module, signature.names)

    def run(tensors: list[torch.Tensor]) -> Any:
        with torch.no_grad():  # not in inference mode: a model may keep what it computes for the export to come
            return call_module(module, signature.names, tensors, how)

    before = _state(module)
    settle_kind(run, signature, target, notes)
    if not _is_same(before, _state(module)):
        target.source.release()


def settle_kind(
    run: Run,
    signature: Signature,
    target: Target,
    notes: list[str],
    kinds: Sequence[str] = KINDS,
    *,
    once: bool = False,
) -> None:
    """The same for a signature and a function that runs the plain model on the target's device.

    Parameters
    ----------
    kinds:
        What is tried.
    once:
        Try each kind at the first warm-up's sizes only, as where no artifact is compared.
    """
    smallest = {name: dimension.min for name, dimension in signature.dimensions.items()}
    example = signature.example_sizes(target.settings.warmup_sizes[0] if target.settings.warmup_sizes else None)
    seeds = dict.fromkeys((target.settings.canary.seed, 1))
    attempts = [(example, target.settings.canary.seed)] if once else [*itertools.product((example, smallest), seeds)]
    first: tuple[Exception, Sizes] | None = None
    for kind in kinds:
        signature.kind = kind
        for sizes, seed in attempts:
            try:
                run([tensor.to(target.device) for tensor in signature.generate(sizes, seed=seed)])
            except Exception as error:  # whatever the model raises
                first = first or (without_frames(error), sizes)
                break
        else:
            if first is not None:
                message = f"{_refusal(signature, *first)}; canary and warm-up use the kind {kind!r} instead"
                logger.warning("%s: %s", target.source.name, message)
                notes.append(message)
            return
    signature.kind = None
    assert first is not None
    raise SampleError(_refusal(signature, *first)) from first[0]


def try_eager(target: Target, loaded: Loaded, notes: list[str]) -> bool | None:
    """Let the eager model answer one input before it serves, and find out whether its rows are independent.

    What plain TorchServe serves is served, so a model that refuses the input is not refused: the reason is logged, and
    `describe` shows it.

    Returns
    -------
    Whether rows are independent, None where that was not tried.
    """
    signature = loaded.signature
    if not signature.inputs:
        return None
    if target.source.weights_by_name:
        check_names(target.eager(), signature.names)
    # On a GPU an index out of range would end what is to serve.
    kinds = (SMALL,) if target.device.type == "cuda" else KINDS
    try:
        if signature.kind is None:
            settle_kind(loaded.run, signature, target, notes, kinds, once=True)
        if joined_sizes(signature) is None:
            return None
    except SampleError as error:
        message = f"the eager model did not answer before READY: {one_line(error, 600)}"
        logger.warning("%s: %s", target.source.name, message)
        notes.append(message)
        return None
    canary = target.settings.canary
    return rows_are_independent(loaded.run, signature, canary.seed, target.device, canary.tolerance)


def _refusal(signature: Signature, error: Exception, sizes: Sizes) -> str:
    shown = []
    for spec in signature.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        shown.append(f"{spec.name} ({spec.dtype}, shape {shape})")
    return (
        f"the drawn input {', '.join(shown)[:300]} is refused by the plain model: {type(error).__name__}: "
        f"{one_line(error, 200)}; say what it accepts with values, or with limits for each column, in {SECTION}.inputs"
    )


def _state(module: torch.nn.Module) -> list[Any]:
    """What a run may have changed: attributes by identity, the lengths of containers, and versions of tensors."""
    found: list[Any] = []
    for child in module.modules():
        tensors = [*child._parameters.values(), *child._buffers.values()]
        found.extend((tensor, None if tensor is None else tensor._version) for tensor in tensors)
        for name, value in vars(child).items():
            if name not in ("_parameters", "_buffers"):
                found.append((value, len(value) if isinstance(value, (list, dict, set)) else None))
    return found


def _is_same(before: list[Any], after: list[Any]) -> bool:
    if len(before) != len(after):
        return False
    return all(a is b and x == y for (a, x), (b, y) in zip(before, after, strict=True))
