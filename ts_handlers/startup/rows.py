"""Whether a model answers a row alone as it does among other rows, so that requests of a batch may be joined.

A server joins the requests of several users along dimension 0. Where a softmax, a normalization or a ranking runs over
that dimension, a joined answer holds what belongs to others, and no size tells it. So the eager model is asked, with
different rows together and each of them alone. What differs less than the canary's tolerance counts as equal, and what
the drawn rows do not show stays unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ts_handlers.backends.compare import compare_outputs
from ts_handlers.errors import CanaryError, one_line
from ts_handlers.execution.base import Run
from ts_handlers.model.signature import Signature, Sizes, row_dimension
from ts_handlers.model.structure import constants_of, flatten

logger = logging.getLogger(__name__)

PARTS = 3
"""So many parts, each of the fewest rows that are declared, are joined where the range has room for them."""


def joined_sizes(signature: Signature) -> tuple[Sizes, int] | None:
    """The sizes of a batch that is joined from several parts, and the rows of a part; None when nothing can be joined.

    Examples
    --------
    >>> from ts_handlers.settings import Dimension, InputSpec
    >>> inputs = [InputSpec("x", "float32", ("batch", 3))]
    >>> joined_sizes(Signature(inputs, {"batch": Dimension(1, 8)}))
    ({'batch': 3}, 1)
    >>> joined_sizes(Signature(inputs, {"batch": Dimension(4, 4)})) is None
    True
    """
    name = row_dimension(signature.inputs)
    if name is None:
        return None
    least, most = signature.dimensions[name].min, signature.dimensions[name].max
    parts = min(PARTS, most // least)
    if parts < 2:
        return None
    return {**signature.example_sizes(), name: parts * least}, least


def rows_are_independent(
    eager: Run, signature: Signature, seed: int, device: torch.device, tolerance: float | None
) -> bool:
    """Ask the eager model for a batch and for its parts, and compare the answers.

    Parameters
    ----------
    eager:
        Runs the eager model.
    signature:
        One for which `joined_sizes` finds a batch.
    seed:
        Of the drawn rows.
    device:
        Where the model runs.
    tolerance:
        As of `ts_handlers.backends.compare.compare_outputs`.

    Returns
    -------
    Whether each tensor of the answer has a row for each row of the input, and they are the same alone and together. An
    exception counts as no.
    """
    found = joined_sizes(signature)
    if found is None:
        return False
    inputs = _different_rows(signature, found[0], seed)
    if inputs is None:
        return False
    try:
        _compare(eager, inputs, found[1], device, tolerance)
    except Exception as error:  # whatever the model raises for a part that it answers in a batch
        logger.info("requests are answered one by one: %s", one_line(error))
        return False
    return True


def _different_rows(signature: Signature, sizes: Sizes, seed: int) -> list[torch.Tensor] | None:
    """Inputs whose rows differ, as far as the values allow; None when they are all the same."""
    best: list[torch.Tensor] | None = None
    most = 1
    for attempt in range(8):
        inputs = signature.generate(sizes, seed=seed + attempt)
        rows = {tuple(str(tensor[row].tolist()) for tensor in inputs) for row in range(inputs[0].shape[0])}
        if len(rows) > most:
            best, most = inputs, len(rows)
        if most == inputs[0].shape[0]:
            break
    return best


def _compare(
    eager: Run, inputs: Sequence[torch.Tensor], rows: int, device: torch.device, tolerance: float | None
) -> None:
    total = inputs[0].shape[0]
    joined, constants = _answer(eager, inputs, device)
    if any(not leaf.dim() or leaf.shape[0] != total for leaf in joined):
        raise CanaryError("an output has no row for each row of the input")
    for begin in range(0, total, rows):
        alone, others = _answer(eager, [tensor[begin : begin + rows] for tensor in inputs], device)
        if others != constants:
            raise CanaryError("the numbers or texts of the output depend on the batch")
        compare_outputs([leaf[begin : begin + rows] for leaf in joined], alone, tolerance)


def _answer(eager: Run, inputs: Sequence[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor], list[str]]:
    # Copies, also of what is answered: a model may change its input, or answer with a part of it.
    leaves, structure = flatten(eager([tensor.clone().to(device) for tensor in inputs]))
    return [leaf.detach().clone() for leaf in leaves], constants_of(structure)
