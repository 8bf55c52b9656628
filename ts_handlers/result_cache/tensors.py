"""``on: tensors``: answers of the model kept by its inputs, around what runs an artifact.

Only calls that the artifact answers come here. Those outside of the declared ranges, of other forms, and explanations
pass by. Where the rows of a batch are independent (`ts_handlers.startup.rows`) each row is a request by itself: stored
rows are answered, equal ones computed once, and the rest runs together.

Answers are kept on the CPU, and each caller gets a copy of its own, which it may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ts_handlers.compiled_model import CompiledModel, answer_calls_with
from ts_handlers.errors import InputError
from ts_handlers.execution.base import Loaded
from ts_handlers.model.signature import row_dimension
from ts_handlers.model.structure import OutputStructure, flatten, unflatten
from ts_handlers.result_cache.base import Answered, Computed, Key
from ts_handlers.result_cache.cache import ResultCache
from ts_handlers.result_cache.epochs import Epochs
from ts_handlers.result_cache.keys import identity, row_keys, tensors_key

_TENSOR_BYTES = 512
"""What a tensor takes beside its elements, and its share of the structure around it."""


class _Output(NamedTuple):
    leaves: list[torch.Tensor]
    structure: OutputStructure


class TensorResults:
    """Answers one model's calls.

    Parameters
    ----------
    model:
        What is served.
    cache:
        Its answers.
    prefix:
        Who answers, see `ts_handlers.result_cache.keys.identity`.
    """

    def __init__(self, model: CompiledModel, cache: ResultCache, prefix: bytes) -> None:
        self.cache = cache
        self._model = model
        self._prefix = prefix
        self._epochs = Epochs(model)
        self._of_epoch = -1, b""

    def attach(self) -> None:
        """Have the calls that an artifact answers come here from now on."""
        answer_calls_with(self._model, self)

    def describe(self) -> dict[str, Any]:
        """The cache; JSON-compatible."""
        return {"on": "tensors", "reason": None, **self.cache.describe()}

    def __call__(self, serving: int, loaded: Loaded, tensors: list[torch.Tensor]) -> Any:
        """Answer a call.

        Parameters
        ----------
        serving:
            `ts_handlers.compiled_model.serving_epoch` before `loaded` was looked up.
        loaded:
            What answers.
        tensors:
            In declared order, checked, on the model's device.
        """
        now = self._epochs.at(serving)
        if now is None:  # the model has been swapped meanwhile; the call ends as it began
            return loaded.run(tensors)
        epoch = now.number
        prefix = self._prefix_of(epoch)
        names = loaded.signature.names
        if self._has_independent_rows(loaded, tensors):
            keys = row_keys(prefix, names, tensors)
            if keys is not None:
                return self._answer_rows(epoch, loaded, tensors, keys)
        key = tensors_key(prefix, names, tensors)

        def compute(indexes: Sequence[int]) -> list[Computed]:
            output = loaded.run(tensors)
            leaves, structure = flatten(output)
            return [Computed(output, _Output(_copies(leaves, torch.device("cpu")), structure), _size(leaves))]

        (answered,) = self.cache.answer([key], compute, epoch=epoch)
        value = _value(answered)
        if answered.how in ("hit", "coalesced"):
            return unflatten(_copies(value.leaves, self._model.device), value.structure)
        return value

    def _prefix_of(self, epoch: int) -> bytes:
        known, prefix = self._of_epoch
        if known != epoch:
            outcome = self._model.outcome
            artifact = ("backend", outcome.backend), ("artifact", outcome.key or "")
            prefix = identity([("model", self._prefix.hex()), *artifact, ("epoch", str(epoch))])
            self._of_epoch = epoch, prefix
        return prefix

    def _has_independent_rows(self, loaded: Loaded, tensors: Sequence[torch.Tensor]) -> bool:
        name = row_dimension(loaded.signature.inputs)
        if name is None or not self._model.outcome.independent_rows:
            return False
        return tensors[0].shape[0] > 1 and loaded.signature.dimensions[name].min == 1

    def _answer_rows(self, epoch: int, loaded: Loaded, tensors: list[torch.Tensor], keys: Sequence[Key]) -> Any:
        whole: list[Any] = []

        def compute(indexes: Sequence[int]) -> list[Computed]:
            output, rows, positions = _run_rows(loaded, tensors, indexes)
            leaves, structure = flatten(output)
            if rows == len(keys):
                whole.append(output)
            if any(not leaf.dim() or leaf.shape[0] != rows for leaf in leaves):
                return [Computed(None, shared=False) for _ in indexes]  # it is an answer to this batch alone
            computed = []
            for position in positions:
                row = _Output([leaf[position : position + 1] for leaf in leaves], structure)
                kept = _Output(_copies(row.leaves, torch.device("cpu")), structure)
                computed.append(Computed(row, kept, _size(row.leaves)))
            return computed

        answers = self.cache.answer(list(keys), compute, epoch=epoch)
        rows: list[_Output] = [_value(answered) for answered in answers]
        if len(whole) == 1 and all(each.how in ("miss", "bypass") for each in answers):
            return whole[0]
        if any(row is None for row in rows) or not _can_be_joined(rows):
            return loaded.run(tensors)
        device = self._model.device
        parts = zip(*(row.leaves for row in rows), strict=True)
        return unflatten([torch.cat([part.to(device) for part in leaf]) for leaf in parts], rows[0].structure)


def _run_rows(loaded: Loaded, tensors: list[torch.Tensor], indexes: Sequence[int]) -> tuple[Any, int, Sequence[int]]:
    """Run some rows of a batch, or all where the artifact does not take so few.

    Returns
    -------
    The output, how many rows were run, and where in the output those of the indexes are.
    """
    rows = tensors[0].shape[0]
    if len(indexes) < rows:
        part = [tensor[list(indexes)] for tensor in tensors]
        try:
            loaded.signature.check(part)
            return loaded.run(part), len(indexes), range(len(indexes))
        except InputError:  # its sizes have gaps
            pass
    return loaded.run(tensors), rows, indexes


def _value(answered: Answered) -> Any:
    if answered.error is not None:
        raise answered.error
    return answered.value


def _can_be_joined(rows: Sequence[_Output]) -> bool:
    first = rows[0]
    shapes = [(leaf.shape[1:], leaf.dtype) for leaf in first.leaves]
    return all(
        row.structure == first.structure and [(leaf.shape[1:], leaf.dtype) for leaf in row.leaves] == shapes
        for row in rows[1:]
    )


def _copies(leaves: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [leaf.detach().to(device, copy=True) for leaf in leaves]


def _size(leaves: Sequence[torch.Tensor]) -> int:
    return sum(leaf.nbytes + _TENSOR_BYTES for leaf in leaves)
