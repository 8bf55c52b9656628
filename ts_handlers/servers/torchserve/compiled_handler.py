"""`CompiledHandler`: a TorchServe handler for tensors as JSON."""

from __future__ import annotations

from typing import Any

import torch

from ts_handlers.servers.torchserve.handler import CompiledHandlerMixin  # first: it sees to the cycle collector

# isort: split
from ts_handlers.compiled_model import ServedModel
from ts_handlers.errors import InputError
from ts_handlers.model.base import ModelSource
from ts_handlers.servers.json_tensors import (
    DEPENDENT_ROWS,
    NON_FINITE,
    NOT_BY_ROW,
    have_rows,
    is_finite,
    join_rows,
    read_tensors,
    rows_of,
    split_rows,
)
from ts_handlers.servers.torchserve.base_handler import BaseHandler
from ts_handlers.servers.torchserve.their_handler import inputs_needed
from ts_handlers.settings import Settings, parse_settings
from ts_handlers.start import is_captured


class CompiledHandler(CompiledHandlerMixin, BaseHandler):  # type: ignore[misc]
    """A TorchServe handler for tensors as JSON.

    A request is ``{input name: nested list}`` with the batch dimension included, or the bare nested list when the model
    has one input. Requests are joined along dimension 0 and their answers split again; they are answered one by one if
    an input or output has no row for each row of a request, and unless the start has found that a row is answered alone
    as it is among others (`ts_handlers.startup.rows`). Answers have the output's structure, tensors as lists, and None
    in place of NaN and infinity, or none at all with ``non_finite: refuse``.
    """

    _answers_alone = False

    def _start(self, source: ModelSource, device: torch.device | None = None) -> ServedModel:
        own = type(self).preprocess is CompiledHandler.preprocess and not is_captured()
        if own and source.weights_by_name and self.settings.backends != ("eager",) and not self.settings.inputs:
            raise inputs_needed(source.eager)
        return super()._start(source, device)

    @staticmethod
    def _read_settings(config: Any) -> tuple[Settings, str | None]:
        return parse_settings(config), None  # its methods need a model of ours

    def preprocess(self, data: Any) -> Any:
        """JSON bodies to input tensors, concatenated along dimension 0."""
        specs = self.settings.inputs
        if not specs:
            raise inputs_needed(lambda: self.model)
        if len(data) > 1 and (self._answers_alone or not have_rows(specs)):
            raise InputError(NOT_BY_ROW)
        if len(data) > 1 and not (isinstance(self.model, ServedModel) and self.model.outcome.independent_rows):
            raise InputError(DEPENDENT_ROWS)
        rows = [read_tensors(self.request_body(row), specs) for row in data]
        joined, self.batch_state.counts = join_rows(rows, specs)
        return joined

    def postprocess(self, data: Any) -> list[Any]:
        """One answer per request: the model's output for its rows, tensors as nested lists."""
        if self.settings.non_finite == "refuse" and not is_finite(data):
            raise InputError(NON_FINITE)
        answers = split_rows(data, self.batch_state.counts)
        if answers is None:
            self._answers_alone = True
            if len(self.batch_state.counts) > 1:
                raise InputError(NOT_BY_ROW)
        return answers or [rows_of(data)]
