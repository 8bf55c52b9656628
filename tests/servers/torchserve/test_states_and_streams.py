"""Batches that must not be answered a second time: handlers with a state, and answers of which a part has been sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import RequestProcessor
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.torch_handler.base_handler import BaseHandler

from tests.support.handlers import make_context
from ts_handlers import CompiledHandlerMixin

pytestmark = pytest.mark.usefixtures("cheap_backend")
ROW = [1.0, 2.0, 3.0, 4.0]


class Sums(BaseHandler):  # type: ignore[misc]
    """Adds up what each sequence has sent, and runs the model on the sum."""

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.sums: dict[str, float] = {}

    def preprocess(self, data: Any) -> torch.Tensor:
        sums = []
        for index, row in enumerate(data):
            name = self.context.get_sequence_id(index)
            self.sums[name] = self.sums.get(name, 0.0) + row["body"]
            sums.append(self.sums[name])
        if any(row["body"] < 0 for row in data):
            raise RuntimeError("below zero")
        return torch.tensor(sums)[:, None].expand(-1, 4).contiguous()


class Streams(BaseHandler):  # type: ignore[misc]
    """Sends a part of each answer before the last one."""

    def handle(self, data: Any, context: Any) -> Any:
        parts = ["part"] * len(data)
        send_intermediate_predict_response(parts, context.request_ids, "Intermediate", 200, context)
        if any(row["body"] is None for row in data):
            raise RuntimeError("no body")
        with torch.no_grad():
            return [self.model(torch.tensor([row["body"]])).tolist()[0] for row in data]


class Socket:
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def sendall(self, message: bytes) -> None:
        self.sent.append(bytes(message))


def start(theirs: type, archive: Path, tmp_path: Path, **config: Any) -> tuple[Any, Any]:
    class Handler(CompiledHandlerMixin, theirs):  # type: ignore[misc]
        pass

    context = make_context(archive, tmp_path / "store", **config)
    handler: Any = Handler()
    handler.initialize(context)
    context.cl_socket = Socket()
    return handler, context


def send(handler: Any, context: Any, *bodies: Any) -> Any:
    context.request_processor = [RequestProcessor({"ts_request_sequence_id": str(n)}) for n in range(len(bodies))]
    context.request_ids = {index: f"request-{index}" for index in range(len(bodies))}
    return handler.handle([{"body": body} for body in bodies], context)


@pytest.mark.parametrize("setting", ["sequenceBatching", "continuousBatching"])
@pytest.mark.parametrize("micro", [{}, {"micro_batching": {"micro_batch_size": 2}}])
def test_a_batch_with_state_fails_once_and_as_a_whole(
    setting: str, micro: dict[str, Any], archive: Path, tmp_path: Path
) -> None:
    handler, context = start(Sums, archive, tmp_path, **{setting: True}, **micro)
    assert len(send(handler, context, 1.0, 2.0)) == 2
    assert handler.sums == {"0": 1.0, "1": 2.0}
    if micro and setting == "sequenceBatching":  # parts are answered by themselves
        send(handler, context, 1.0, -1.0)
        assert [context.get_response_status(index)[0] for index in range(2)] == [503, 503]
    else:
        with pytest.raises(RuntimeError, match="below zero"):
            send(handler, context, 1.0, -1.0)
    assert handler.sums == {"0": 2.0, "1": 1.0}  # each request has counted once
    assert handler.model.metrics.counters["outside_eager"] == 0


def test_without_such_a_setting_the_others_are_answered(archive: Path, tmp_path: Path) -> None:
    handler, context = start(Sums, archive, tmp_path)
    answers = send(handler, context, 1.0, -1.0)
    assert isinstance(answers[0], list)
    assert [context.get_response_status(index)[0] for index in range(2)] == [200, 503]


def test_a_criterion_to_stop_reaches_torchserve(archive: Path, tmp_path: Path) -> None:
    class Continues(Sums):
        def postprocess(self, data: Any) -> Any:
            self.context.stopping_criteria = [lambda answer: True] * len(data)
            return super().postprocess(data)

    handler, context = start(Continues, archive, tmp_path, continuousBatching=True)
    for count in (2, 3):
        send(handler, context, *[1.0] * count)
        assert len(context.stopping_criteria) == count


def test_parts_of_an_answer_are_sent_once(archive: Path, tmp_path: Path) -> None:
    handler, context = start(Streams, archive, tmp_path)
    answers = send(handler, context, ROW, ROW)
    assert len(context.cl_socket.sent) == 1
    assert answers[0] == answers[1]
    with pytest.raises(RuntimeError, match="no body"):
        send(handler, context, ROW, None)
    assert len(context.cl_socket.sent) == 2
    assert handler.model.outcome.backend == "aot_inductor"
