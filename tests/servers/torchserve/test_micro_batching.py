"""TorchServe's micro-batching through the handler, without a server."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.handlers import ROWS, ask, close, expected, make_context
from tests.support.models import eager_model

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts_handlers import CompiledHandler, InputError
from ts_handlers.errors import BusyError, SettingsError
from ts_handlers.servers.torchserve.micro_batching import read_micro_batching

MICRO: dict[str, Any] = {
    "micro_batch_size": 2,
    "parallelism": {"preprocess": 2, "inference": 3, "postprocess": 2},
}


def start(
    handler: CompiledHandler, archive: Path, tmp_path: Path, micro: Any = MICRO, contexts: int = 3
) -> tuple[CompiledHandler, Any]:
    section = {"backends": ["eager"], "contexts": {"count": contexts, "wait_seconds": 20}}
    config = {} if micro is None else {"micro_batching": micro}
    context = make_context(archive, tmp_path / "store", section=section, **config)
    handler.initialize(context)
    return handler, context


def test_each_request_gets_its_own_answer(archive: Path, tmp_path: Path) -> None:
    handler, context = start(CompiledHandler(), archive, tmp_path)
    batch = [[[float(i), 0, 0, float(j)] for j in range(1 + i % 3)] for i in range(16)]
    for _ in range(5):
        answers = ask(handler, context, *batch)
        assert [status for status, _ in answers] == [200] * 16
        for rows, (_, answer) in zip(batch, answers, strict=True):
            assert close(answer, expected(archive, rows))
    assert handler.model.describe()["contexts"]["lent"] == 5 * 8  # micro-batches of two
    assert context.metrics.names.count("HandlerTime") == 5


def test_bad_requests_are_refused_alone(archive: Path, tmp_path: Path) -> None:
    handler, context = start(CompiledHandler(), archive, tmp_path)
    bad: list[Any] = [None, b"{half", [[1, 2]], [[0, 0, 0, 0]] * 9]
    answers = ask(handler, context, *[ROWS if i % 2 else bad[i // 2] for i in range(8)])
    assert [status for status, _ in answers] == [400, 200] * 4
    assert all(close(answer, expected(archive, ROWS)) for status, answer in answers if status == 200)


class Counting(CompiledHandler):
    """Counts how many parts are in each phase at once; a phase waits until it is as full as its setting allows."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.inside = dict.fromkeys(MICRO["parallelism"], 0)
        self.most = dict.fromkeys(MICRO["parallelism"], 0)
        self.callers: set[threading.Thread] = set()
        self.full = {phase: threading.Event() for phase in MICRO["parallelism"]}

    def counted(self, phase: str, call: Any, data: Any) -> Any:
        with self.lock:
            self.callers.add(threading.current_thread())
            self.inside[phase] += 1
            self.most[phase] = max(self.most[phase], self.inside[phase])
            if self.inside[phase] == MICRO["parallelism"][phase]:
                self.full[phase].set()
        try:
            assert self.full[phase].wait(60)
            time.sleep(0.002)  # one more would come in now
            return call(data)
        finally:
            with self.lock:
                self.inside[phase] -= 1

    def preprocess(self, data: Any) -> Any:
        return self.counted("preprocess", super().preprocess, data)

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        return self.counted("inference", super().inference, data)

    def postprocess(self, data: Any) -> Any:
        return self.counted("postprocess", super().postprocess, data)


def test_as_many_parts_are_in_a_phase_as_the_setting_says(archive: Path, tmp_path: Path) -> None:
    handler, context = start(Counting(), archive, tmp_path)
    assert isinstance(handler, Counting)
    answers = ask(handler, context, *[ROWS] * 40)
    assert [status for status, _ in answers] == [200] * 40
    assert handler.most == MICRO["parallelism"]
    assert threading.current_thread() not in handler.callers


def test_a_single_part_is_answered_by_the_calling_thread(archive: Path, tmp_path: Path) -> None:
    handler, context = start(Counting(), archive, tmp_path)
    assert isinstance(handler, Counting)
    for full in handler.full.values():
        full.set()
    answers = ask(handler, context, ROWS, ROWS)
    assert [status for status, _ in answers] == [200] * 2
    assert handler.callers == {threading.current_thread()}


class Named(CompiledHandler):
    """Uses headers, per-batch state and TorchServe's plain signatures."""

    def preprocess(self, data: Any) -> Any:
        names = [self.context.get_request_header(index, "name") for index in range(len(data))]
        self.batch_state.names = names
        time.sleep(0.001 * len(names[0]))  # later batches overtake earlier ones
        if "bad" in names and len(names) == 1:
            raise InputError("a bad name")
        if "bad" in names:
            raise InputError("one of them is bad")
        if "broken" in names:
            raise KeyError("broken")
        return torch.tensor([row["body"] for row in data])

    def inference(self, data: Any) -> Any:
        return super().inference(data)

    def postprocess(self, data: Any) -> list[Any]:
        for index, name in enumerate(self.batch_state.names):
            self.context.set_response_header(index, "name", name)
        pairs = zip(self.batch_state.names, data, strict=True)
        return [{"name": name, "sum": round(float(row.sum()), 3)} for name, row in pairs]


def ask_named(handler: CompiledHandler, context: Any, names: list[str]) -> list[Any]:
    from ts.context import RequestProcessor

    context.request_processor = [RequestProcessor({"name": name}) for name in names]
    context.request_ids = {index: f"id-{name}" for index, name in enumerate(names)}
    answers: list[Any] = handler.handle([{"body": [float(len(name)), 0, 0, 0]} for name in names], context)
    return answers


@pytest.mark.parametrize("micro", [MICRO, None], ids=["micro-batching", "plain"])
@pytest.mark.parametrize("bad", [[], [1], [0, 4]], ids=["all good", "one bad", "two bad"])
def test_headers_and_state_belong_to_their_request(bad: list[int], micro: Any, archive: Path, tmp_path: Path) -> None:
    handler, context = start(Named(), archive, tmp_path, micro)
    names = ["bad" if index in bad else "n" * (9 - index) for index in range(8)]
    model = eager_model(archive)
    answers = ask_named(handler, context, names)
    for index, (name, answer) in enumerate(zip(names, answers, strict=True)):
        if index in bad:
            assert context.get_response_status(index)[0] == 400
            continue
        right = model(torch.tensor([[float(len(name)), 0, 0, 0]])).sum().item()
        assert answer == {"name": name, "sum": pytest.approx(right, abs=2e-3)}
        assert context.get_response_status(index)[0] == 200
        assert context.get_response_headers(index)["name"] == name


@pytest.mark.parametrize("micro", [MICRO, None], ids=["micro-batching", "plain"])
def test_other_errors_fail_their_request_alone(micro: Any, archive: Path, tmp_path: Path) -> None:
    handler, context = start(Named(), archive, tmp_path, micro)
    for _ in range(3):
        answers = ask_named(handler, context, ["a", "b", "broken", "d"])
        assert [context.get_response_status(index)[0] for index in range(4)] == [200, 200, 503, 200]
        assert json.loads(answers.pop(2))["message"] == "Prediction failed"
        assert [answer["name"] for answer in answers] == ["a", "b", "d"]
        with pytest.raises(KeyError, match="broken"):  # a batch of one is TorchServe's to answer
            ask_named(handler, context, ["broken"])
    assert [answer["name"] for answer in ask_named(handler, context, ["a", "b", "c"])] == ["a", "b", "c"]


@pytest.mark.parametrize("micro", [MICRO, None], ids=["micro-batching", "plain"])
def test_a_postprocess_with_too_few_answers_fails_the_requests_without_one(
    micro: Any, archive: Path, tmp_path: Path
) -> None:
    class Handler(CompiledHandler):
        def postprocess(self, data: Any) -> list[Any]:
            return [answer for answer in super().postprocess(data) if len(answer) == len(ROWS)]

    handler, context = start(Handler(), archive, tmp_path, micro)
    answers = ask(handler, context, ROWS, ROWS[:1], ROWS, ROWS)
    assert [status for status, _ in answers] == [200, 503, 200, 200]
    assert close(answers[2][1], expected(archive, ROWS))


@pytest.mark.parametrize("micro", [MICRO, None], ids=["micro-batching", "plain"])
def test_busy_is_answered_with_503(micro: Any, archive: Path, tmp_path: Path) -> None:
    class Handler(CompiledHandler):
        def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            raise BusyError("no context")

    handler, context = start(Handler(), archive, tmp_path, micro)
    answers = ask(handler, context, ROWS, ROWS, ROWS)
    assert [status for status, _ in answers] == [503] * 3
    assert '"type": "BusyError"' in answers[0][1]


def test_describe_is_answered_as_before(archive: Path, tmp_path: Path) -> None:
    from ts.context import RequestProcessor

    handler, context = start(CompiledHandler(), archive, tmp_path)
    context.request_processor = [RequestProcessor({"describe": "True"})]
    (facts,) = handler.handle([{}], context)
    assert facts["contexts"]["size"] == 3


def test_threads_that_do_not_match_the_contexts_are_warned_about(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(CompiledHandler(), archive, tmp_path, contexts=3)
    assert "micro_batching" not in caplog.text
    start(CompiledHandler(), archive, tmp_path, contexts=2)
    assert "parallelism.inference is 3 and handler.ts_handlers.contexts.count is 2" in caplog.text


def test_threads_do_not_keep_the_process_alive(archive: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    start(CompiledHandler(), archive, tmp_path)
    started = set(threading.enumerate()) - before
    assert len(started) == 7
    assert all(thread.daemon for thread in started)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], r"micro_batching: Expected `object`, got `array` \(value: \[\]\)"),
        ({"size": 2}, r"micro_batching\.size: unknown key"),
        ({"micro_batch_sise": 2}, r"did you mean 'micro_batch_size'"),
        ({"micro_batch_size": 0}, r"micro_batch_size: expected a whole number from 1, found 0"),
        ({"micro_batch_size": True}, r"micro_batch_size: .*\(value: True\)"),
        ({"micro_batch_size": "2"}, r"micro_batch_size: .*\(value: '2'\)"),
        ({"parallelism": {"inferense": 2}}, r"did you mean 'inference'"),
        ({"parallelism": {"inference": 0}}, r"parallelism\.inference: expected a whole number from 1"),
        ({"parallelism": 3}, r"micro_batching\.parallelism: Expected `object`, got `int` \(value: 3\)"),
    ],
)
def test_mistakes_in_the_section_are_named(section: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_micro_batching({"micro_batching": section})
