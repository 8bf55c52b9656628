"""The result cache of a handler: what is kept, what never is, and that an answer is always the right one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context, RequestProcessor

from tests.support.handlers import ROWS, close, expected, make_context
from ts_handlers import CompiledHandler, CompiledHandlerMixin
from ts_handlers.errors import BusyError
from ts_handlers.servers.torchserve.result_cache import results_of

pytestmark = pytest.mark.usefixtures("cheap_backend")

OTHER = [[9.0, 8.0, 7.0, 6.0]]
Start = Callable[..., tuple[Any, Context]]


class Counting(CompiledHandler):
    """Counts what it is asked and what its model is."""

    asked = 0

    def preprocess(self, data: Any) -> Any:
        self.asked += len(data)
        return super().preprocess(data)


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Start:
    """Starts a handler with a result cache; the first answers have been tried unless `tried` is false."""

    def make(kind: type = Counting, tried: bool = True, section: Any = None, **results: Any) -> tuple[Any, Context]:
        more = {"result_cache": results, **(section or {})}
        context = make_context(archive, tmp_path / "store", section=more)
        handler = kind()
        handler.initialize(context)
        if tried:
            for number in range(2):
                send(handler, context, [[float(number), 99.0, 99.0, 99.0]])
        for name in [name for name in handler.model.metrics.counters if name.startswith("result_cache")]:
            handler.model.metrics.counters[name] = 0
        handler.asked = 0
        return handler, context

    return make


def send(
    handler: Any, context: Context, *bodies: Any, headers: Any = None, path: str = "body"
) -> list[tuple[int, Any, dict[str, str]]]:
    """Send a batch; returns status, answer and headers of each."""
    given = headers if isinstance(headers, list) else [headers or {}] * len(bodies)
    context.request_processor = [RequestProcessor(dict(each)) for each in given]
    context.request_ids = {index: f"request-{index}" for index in range(len(bodies))}
    answers = handler.handle([{path: body} for body in bodies], context)
    assert len(answers) == len(bodies)
    return [
        (context.get_response_status(index)[0] or 200, answer, context.get_response_headers(index))
        for index, answer in enumerate(answers)
    ]


def how(answers: list[tuple[int, Any, dict[str, str]]]) -> list[str]:
    return [headers["X-Cache"] for _, _, headers in answers]


def counted(handler: Any) -> dict[str, int]:
    return {
        name.removeprefix("result_cache_"): count
        for name, count in handler.model.metrics.counters.items()
        if name.startswith("result_cache") and count
    }


def test_an_equal_request_is_answered_without_the_handler(start: Start, archive: Path) -> None:
    handler, context = start()
    first, second = send(handler, context, ROWS), send(handler, context, ROWS)
    assert (how(first), how(second), handler.asked) == (["miss"], ["hit"], 1)
    assert first[0][1] == second[0][1]
    assert close(second[0][1], expected(archive, ROWS))
    assert second[0][2]["Age"] == "0"
    assert counted(handler) == {"miss": 1, "hit": 1}
    shown = handler.describe_handle()["result_cache"]
    assert (shown["on"], shown["reason"], shown["entries"]) == ("request", None, 3)
    assert shown["stored_bytes"] > 0


def test_in_a_batch_hits_are_answered_duplicates_computed_once_and_the_rest_runs(start: Start, archive: Path) -> None:
    handler, context = start()
    send(handler, context, ROWS)
    handler.asked = 0
    answers = send(handler, context, ROWS, OTHER, OTHER, ROWS[:1], [[1, 2]])
    assert how(answers) == ["hit", "miss", "coalesced", "miss", "miss"]
    assert [status for status, _, _ in answers] == [200, 200, 200, 200, 400]
    for (_, answer, _), rows in zip(answers, (ROWS, OTHER, OTHER, ROWS[:1]), strict=False):
        assert close(answer, expected(archive, rows))
    again = send(handler, context, [[1, 2]], ROWS[:1], [[1, 2]])
    assert [(status, headers["X-Cache"]) for status, _, headers in again] == [
        (400, "miss"),
        (200, "hit"),
        (400, "coalesced"),
    ]
    assert again[0][2]["content-type"] == again[2][2]["content-type"] == "application/json"


def test_without_the_section_nothing_is_kept_and_no_header_is_set(handler: Any, context: Context) -> None:
    for _ in range(2):
        ((_, _, headers),) = send(handler, context, ROWS)
        assert headers == {}
    assert handler.describe_handle()["result_cache"] is None
    assert handler._results is None
    assert counted(handler) == {}


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ({"Cache-Control": "no-store"}, {}, ["bypass", "miss"]),
        ({}, {"cache-control": "No-Store"}, ["miss", "bypass"]),
        ({}, {"Cache-Control": "no-cache"}, ["miss", "miss"]),
        ({"Accept": "a"}, {"Accept": "b"}, ["miss", "miss"]),
        ({"Content-Type": "a"}, {"content-type": "a"}, ["miss", "miss"]),
        ({"X-Other": "a"}, {"X-Other": "b"}, ["miss", "hit"]),
        ({"X-Language": "de"}, {"X-Language": "fr"}, ["miss", "miss"]),
    ],
)
def test_headers_that_count(first: Any, second: Any, found: list[str], start: Start) -> None:
    handler, context = start(headers=["x-language"])
    seen = [how(send(handler, context, ROWS, headers=headers))[0] for headers in (first, second)]
    assert seen == found


def test_what_is_asked_for_anew_replaces_what_was_stored(start: Start) -> None:
    handler, context = start()
    send(handler, context, ROWS)
    send(handler, context, ROWS, headers={"Cache-Control": "no-cache"})
    assert handler.asked == 2
    assert how(send(handler, context, ROWS)) == ["hit"]


def test_numbers_of_other_types_and_fields_in_another_order_are_other_requests(start: Start) -> None:
    handler, context = start()
    bodies = [{"x": [[1.0, 0, 0, 0]]}, {"x": [[1, 0, 0, 0]]}, b'{"x": [[1, 0, 0, 0]]}', '{"x": [[1, 0, 0, 0]]}']
    assert [how(send(handler, context, body))[0] for body in bodies] == ["miss"] * 4
    assert how(send(handler, context, ROWS, path="data")) == ["miss"]
    assert how(send(handler, context, ROWS, path="body")) == ["miss"]


class ReadsHeaders(Counting):
    """Answers with a header of its request."""

    def postprocess(self, data: Any) -> list[Any]:
        answers = super().postprocess(data)
        return [[self.context.get_request_header(index, "X-User"), answer] for index, answer in enumerate(answers)]


class ReadsAllHeaders(Counting):
    def postprocess(self, data: Any) -> list[Any]:
        answers = super().postprocess(data)
        every = [self.context.get_all_request_header(index) for index in range(len(answers))]
        return [[headers.get("X-User"), answer] for headers, answer in zip(every, answers, strict=True)]


class ReadsIds(Counting):
    def postprocess(self, data: Any) -> list[Any]:
        answers = super().postprocess(data)
        return [[self.context.get_request_id(index), answer] for index, answer in enumerate(answers)]


@pytest.mark.parametrize("kind", [ReadsHeaders, ReadsAllHeaders])
def test_an_answer_is_not_kept_for_which_a_header_was_read_that_is_no_part_of_the_key(
    kind: type, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    handler, context = start(kind)
    answers = send(handler, context, ROWS, ROWS, headers=[{"X-User": "a"}, {"X-User": "b"}])
    assert [answer[0] for _, answer, _ in answers] == ["a", "b"]
    assert [answer[0] for _, answer, _ in send(handler, context, ROWS, headers={"X-User": "c"})] == ["c"]
    reasons = handler.describe_handle()["result_cache"]["not_stored"]
    assert ["'X-User'" in reason for reason in reasons] == [True]
    assert sum("result_cache.headers" in record.message for record in caplog.records) == 1
    handler, context = start(kind, headers=["X-User"])
    found = [send(handler, context, ROWS, headers={"X-User": user})[0] for user in "aab"]
    assert [(answer[0], headers["X-Cache"]) for _, answer, headers in found] == [
        ("a", "miss"),
        ("a", "hit"),
        ("b", "miss"),
    ]


def test_an_answer_is_not_kept_for_which_the_id_of_the_request_was_read(start: Start) -> None:
    handler, context = start(ReadsIds)
    answers = send(handler, context, ROWS, ROWS)
    assert [answer[0] for _, answer, _ in answers] == ["request-0", "request-1"]
    assert handler.describe_handle()["result_cache"]["entries"] == 0


class Numbering(Counting):
    """Answers with how many answers there have been, as one with a time or a random number would."""

    given = 0

    def postprocess(self, data: Any) -> list[Any]:
        answers = super().postprocess(data)
        self.given += 1
        return [[self.given, answer] for answer in answers]


def test_a_handler_that_answers_the_same_request_in_two_ways_is_found(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    handler, context = start(Numbering)
    assert how(send(handler, context, ROWS)) == ["bypass"]
    numbers = [send(handler, context, ROWS)[0][1][0] for _ in range(2)]
    assert numbers[0] != numbers[1]
    assert "in two ways" in handler.describe_handle()["result_cache"]["reason"]
    assert sum("no answers are kept" in record.message for record in caplog.records) == 1


def test_the_client_does_not_see_the_second_answer_of_a_trial(start: Start) -> None:
    handler, context = start(Numbering, tried=False)
    ((status, answer, headers),) = send(handler, context, ROWS)
    assert (status, answer[0], headers["X-Cache"], handler.given) == (200, 1, "miss", 2)


class BusyTwice(Counting):
    """Finds no execution context for its second and third answer."""

    given = 0

    def postprocess(self, data: Any) -> list[Any]:
        self.given += 1
        if self.given in (2, 3):
            raise BusyError("no execution context came free")
        return super().postprocess(data)


def test_a_trial_that_finds_no_context_says_nothing_and_is_made_again(start: Start) -> None:
    handler, context = start(BusyTwice, tried=False)
    ((status, _, headers),) = send(handler, context, ROWS)
    assert (status, headers["X-Cache"]) == (200, "miss")
    assert "content-type" not in headers
    assert [send(handler, context, ROWS)[0][0] for _ in range(3)] == [503, 200, 200]
    assert how(send(handler, context, ROWS)) == ["hit"]
    assert handler.given == 5
    send(handler, context, OTHER)
    assert handler.given == 7  # the second of two trials
    send(handler, context, ROWS[:1])
    assert handler.given == 8


class Stochastic(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(1)


class Own(Counting):
    """Serves a module of its own."""

    module: Any = None

    def load_model(self, *arguments: Any) -> Any:
        return type(self).module()


@pytest.mark.parametrize("on", ["request", "tensors"])
def test_a_model_that_draws_random_numbers_has_no_cache_and_starts(
    on: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    kind = type("Handler", (Own,), {"module": Stochastic})
    handler, context = start(kind, on=on, deterministic=True, section={"backends": ["eager"]})
    shown = handler.describe_handle()
    assert "random numbers" in shown["result_cache"]["reason"] + "".join(shown["notes"])
    assert send(handler, context, ROWS)[0][1] != send(handler, context, ROWS)[0][1]
    assert sum("random numbers" in record.message for record in caplog.records) == 1


class CountsCalls(torch.nn.Module):
    """Draws nothing, and answers otherwise each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls * 1e-4


def test_a_model_that_answers_otherwise_each_time_has_no_cache_unless_the_last_digits_may_vary(start: Start) -> None:
    kind = type("Handler", (Own,), {"module": CountsCalls})
    handler, _ = start(kind, section={"backends": ["eager"]})
    reason = handler.describe_handle()["result_cache"]["reason"]
    assert "different answers" in reason
    assert "deterministic: true" in reason
    handler, context = start(kind, deterministic=True, section={"backends": ["eager"]})
    assert handler.describe_handle()["result_cache"]["reason"] is None
    send(handler, context, ROWS)
    assert how(send(handler, context, ROWS)) == ["hit"]


@pytest.mark.parametrize("name", ["sequenceBatching", "continuousBatching"])
def test_a_handler_with_state_has_no_cache(name: str, archive: Path, tmp_path: Path) -> None:
    context = make_context(archive, tmp_path / "store", section={"result_cache": {}}, **{name: True})
    handler = Counting()
    handler.initialize(context)
    assert name in handler.describe_handle()["result_cache"]["reason"]


class Asynchronous(Counting):
    async def handle(self, data: Any, context: Any) -> Any:
        return CompiledHandler.handle(self, data, context)


def test_an_asynchronous_handler_has_no_cache_of_requests(start: Start) -> None:
    handler, _ = start(Asynchronous, tried=False)
    assert "asynchronous" in handler.describe_handle()["result_cache"]["reason"]


class Streaming(Counting):
    """Sends a part of each answer before the answer."""

    parts: list[str]

    def postprocess(self, data: Any) -> list[Any]:
        answers = super().postprocess(data)
        for index in range(len(answers)):
            self.parts = [*getattr(self, "parts", []), "part"]
            self.context.set_response_header(index, "ts_stream_next", "true")
        return answers


def test_a_handler_that_streams_is_found_and_each_request_gets_its_parts(start: Start) -> None:
    handler, context = start(Streaming, tried=False)
    send(handler, context, ROWS, ROWS)
    assert handler.parts == ["part"] * 2
    send(handler, context, ROWS)
    assert handler.parts == ["part"] * 3
    assert "in parts" in handler.describe_handle()["result_cache"]["reason"]


def test_answers_of_eager_outside_of_the_declared_ranges_are_not_kept(start: Start, archive: Path) -> None:
    handler, context = start(section={"outside": "eager"})
    rows = [ROWS[0]] * 20
    for _ in range(2):
        ((status, answer, headers),) = send(handler, context, rows)
        assert (status, headers["X-Cache"]) == (200, "miss")
        assert close(answer, expected(archive, rows))
    assert handler.describe_handle()["result_cache"]["entries"] == 2


class NoPlainData(Counting):
    def postprocess(self, data: Any) -> list[Any]:
        return [{1: answer} for answer in super().postprocess(data)]


def test_an_answer_that_would_not_come_back_as_it_was_is_not_kept(start: Start) -> None:
    handler, context = start(NoPlainData)
    answers = [send(handler, context, ROWS)[0] for _ in range(2)]
    assert [(list(answer), headers["X-Cache"]) for _, answer, headers in answers] == [([1], "miss")] * 2


class Headers(Counting):
    """Sets a status, a header and a content type of its own."""

    def postprocess(self, data: Any) -> list[Any]:
        answers = super().postprocess(data)
        for index in range(len(answers)):
            self.context.set_response_header(index, "X-Model", "linear")
            self.context.set_response_content_type(index, "text/csv")
            self.context.set_response_status(200, "Fine", index)
        return [str(answer) for answer in answers]


def test_a_hit_has_the_status_and_the_headers_of_the_first_answer(start: Start) -> None:
    handler, context = start(Headers)
    seen = []
    for _ in range(2):
        ((_, answer, headers),) = send(handler, context, ROWS)
        seen.append((answer, headers["X-Model"], headers["content-type"], context.get_response_status(0)))
    assert seen[0] == seen[1]
    assert seen[1][3] == (200, "Fine")


class InFront(Counting):
    """Reads a header before the mixin sees the request."""

    user: Any = None

    def handle(self, data: Any, context: Any) -> Any:
        self.user = context.get_request_header(0, "X-User")
        return super().handle(data, context)

    def postprocess(self, data: Any) -> list[Any]:
        return [[self.user, answer] for answer in super().postprocess(data)]


def test_a_handle_in_front_of_the_cache_is_not_seen_and_so_there_is_none(start: Start) -> None:
    handler, context = start(InFront, tried=False)
    assert "in front of the mixin" in handler.describe_handle()["result_cache"]["reason"]
    assert [send(handler, context, ROWS, headers={"X-User": user})[0][1][0] for user in "ab"] == ["a", "b"]


class Keeps(Counting):
    """Has kept the context of its start, which is TorchServe's for all batches."""

    kept: Any = None

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.kept = context

    def postprocess(self, data: Any) -> list[Any]:
        answers = super().postprocess(data)
        return [[self.kept.get_request_header(index, "X-User"), answer] for index, answer in enumerate(answers)]


def test_what_is_read_of_a_context_that_a_handler_has_kept_is_seen_and_right(start: Start) -> None:
    handler, context = start(Keeps)
    for _ in range(2):
        found = send(handler, context, ROWS, OTHER, ROWS, headers=[{"X-User": user} for user in "abc"])
        assert [answer[0] for _, answer, _ in found] == ["a", "b", "c"]
        assert how(found) == ["miss", "miss", "bypass"]
    handler, context = start(Keeps, headers=["X-User"])
    send(handler, context, ROWS, headers={"X-User": "a"})
    found = send(handler, context, ROWS, ROWS, headers=[{"X-User": user} for user in "ab"])
    assert [(answer[0], headers["X-Cache"]) for _, answer, headers in found] == [("a", "hit"), ("b", "miss")]


def test_what_is_stored_is_nobodys_to_change(start: Start) -> None:
    handler, context = start()
    for _ in range(3):
        ((_, answer, _),) = send(handler, context, ROWS)
        assert len(answer) == 2
        answer.append("changed")


def test_an_error_of_a_neighbour_is_nobody_elses_and_is_not_kept(start: Start) -> None:
    class Failing(Counting):
        fails = True

        def preprocess(self, data: Any) -> Any:
            if self.fails and any(row["body"] == OTHER for row in data):
                raise RuntimeError("broken")
            return super().preprocess(data)

    handler, context = start(Failing)
    for _ in range(2):  # with a neighbour that is computed, and with one that is stored
        answers = send(handler, context, ROWS, OTHER, OTHER)
        assert [status for status, _, _ in answers] == [200, 503, 503]
    with pytest.raises(RuntimeError, match="broken"):
        send(handler, context, OTHER)
    handler.fails = False
    assert [status for status, _, _ in send(handler, context, OTHER)] == [200]


def test_a_describe_and_explanations_pass_by(start: Start) -> None:
    handler, context = start()
    send(handler, context, ROWS)
    context.request_processor = [RequestProcessor({"describe": "True"})]
    (described,) = handler.handle([{}], context)
    assert described["backend"] == "aot_inductor"
    assert "X-Cache" not in context.get_response_headers(0)
    assert handler.describe_handle()["result_cache"]["entries"] == 3


def test_a_swap_of_the_model_is_another_key(start: Start, archive: Path) -> None:
    handler, context = start()
    send(handler, context, ROWS)
    handler.model.return_to_eager("as a test wants it")
    found = [send(handler, context, ROWS)[0] for _ in range(2)]
    assert [headers["X-Cache"] for _, _, headers in found] == ["miss", "hit"]
    assert close(found[0][1], expected(archive, ROWS))


def test_new_values_of_an_eager_models_tensors_are_another_key(start: Start) -> None:
    handler, context = start(section={"backends": ["eager"]})
    send(handler, context, ROWS)
    assert how(send(handler, context, ROWS)) == ["hit"]
    state = {name: tensor * 2 for name, tensor in handler.model.state_dict().items()}
    handler.model.load_state_dict(state)
    ((_, answer, headers),) = send(handler, context, ROWS)
    assert headers["X-Cache"] == "miss"
    wanted = torch.tensor(ROWS) @ state["layer.weight"].T + state["layer.bias"]
    assert close(answer, wanted.tolist())


def test_new_weights_another_handler_file_and_other_settings_are_other_keys(archive: Path, tmp_path: Path) -> None:
    def prefix(kind: type = Counting, **section: Any) -> bytes:
        context = make_context(archive, tmp_path / "store", section={"result_cache": {}, **section})
        handler = kind()
        handler.initialize(context)
        results: Any = handler._results._cached
        return results._prefix_of(handler.model.outcome, 0, False)  # type: ignore[no-any-return]

    first = prefix()
    assert prefix() == first
    assert prefix(result_cache={"ttl": "1min"}) == first
    seen = {first, prefix(kind=ReadsIds), prefix(outside="eager"), prefix(backends=["eager"])}
    (archive / "vocabulary.txt").write_text("a")
    seen.add(prefix())
    (archive / "vocabulary.txt").write_text("b")
    seen.add(prefix())
    state = torch.load(archive / "model.pt", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, archive / "model.pt")
    seen.add(prefix())
    assert len(seen) == 7


def test_micro_batches_are_of_what_is_not_stored(archive: Path, tmp_path: Path) -> None:
    micro = {"micro_batch_size": 1, "parallelism": {"preprocess": 2, "inference": 2, "postprocess": 2}}
    section = {"result_cache": {}, "contexts": {"count": 2}}
    context = make_context(archive, tmp_path / "store", section=section, micro_batching=micro)
    handler = Counting()
    handler.initialize(context)
    for _ in range(2):
        answers = send(handler, context, ROWS, OTHER, ROWS, ROWS[:1], [[1, 2]])
        assert [status for status, _, _ in answers] == [200, 200, 200, 200, 400]
        for (_, answer, _), rows in zip(answers, (ROWS, OTHER, ROWS, ROWS[:1]), strict=False):
            assert close(answer, expected(archive, rows))
    assert how(answers) == ["hit", "hit", "hit", "hit", "miss"]
    assert counted(handler)["coalesced"] == 1


def test_behind_an_envelope_requests_pass_by(start: Start, archive: Path) -> None:
    handler, context = start()
    context.inside_envelope = True
    context.request_processor = [RequestProcessor({})]
    answers = handler.handle([{"body": ROWS}, {"body": OTHER}], context)
    assert close(answers[1], expected(archive, OTHER))
    assert counted(handler) == {"bypass": 2}


def test_hosts_share_answers_of_the_same_weights_through_redis_and_no_others(
    redis_url: str, archive: Path, tmp_path: Path
) -> None:
    def host(name: str) -> tuple[Any, Context]:
        section = {"result_cache": {"redis": {"url": redis_url, "timeout": "60s"}}, "store": str(tmp_path / name)}
        context = make_context(archive, tmp_path / name, section=section)
        handler = Counting()
        handler.initialize(context)
        return handler, context

    handler, context = host("first")
    assert how(send(handler, context, ROWS, OTHER)) == ["miss", "miss"]
    handler, context = host("second")
    found = send(handler, context, ROWS, ROWS[:1], OTHER)
    assert (how(found), handler.asked) == (["hit", "miss", "hit"], 2)  # one, and its trial
    assert close(found[0][1], expected(archive, ROWS))
    assert redis_url in str(handler.describe_handle()["result_cache"]["shared"])
    state = torch.load(archive / "model.pt", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, archive / "model.pt")
    handler, context = host("third")
    found = send(handler, context, ROWS)
    assert how(found) == ["miss"]
    assert close(found[0][1], expected(archive, ROWS))


def test_what_a_handler_has_changed_in_its_model_is_shared_with_nobody(
    redis_url: str, archive: Path, tmp_path: Path
) -> None:
    section = {"result_cache": {"redis": {"url": redis_url, "timeout": "60s"}}, "backends": ["eager"]}
    hosts = []
    for name in ("first", "second"):
        context = make_context(archive, tmp_path / name, section=section)
        hosts.append((Counting(), context))
        hosts[-1][0].initialize(context)
    changed, context = hosts[0]
    send(changed, context, OTHER)
    changed.model.load_state_dict({name: tensor + 1 for name, tensor in changed.model.state_dict().items()})
    send(changed, context, ROWS)
    other, context = hosts[1]
    ((_, answer, headers),) = send(other, context, ROWS)
    assert headers["X-Cache"] == "miss"
    assert close(answer, expected(archive, ROWS))


class Plain:
    """Holds no module, and is no `BaseHandler`."""

    model: Any = None

    def initialize(self, context: Any) -> None:
        self.model = len

    def handle(self, data: Any, context: Any) -> list[Any]:
        return [len(row["body"]) for row in data]


def test_a_handler_whose_model_is_nobodys_has_no_cache(archive: Path, tmp_path: Path) -> None:
    class Handler(CompiledHandlerMixin, Plain):
        pass

    context = make_context(archive, tmp_path / "store", section={"result_cache": {}})
    handler = Handler()
    handler.initialize(context)
    assert "served as it is" in handler.describe_handle()["result_cache"]["reason"]
    context.request_processor = [RequestProcessor({})]
    assert handler.handle([{"body": "abc"}], context) == [3]


@pytest.mark.processes
def test_with_a_model_in_another_process_requests_are_kept_where_a_worker_sees_all_that_counts(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    section = {"result_cache": {}, "contexts": {"across_workers": True}, "backends": ["eager"]}
    context = make_context(archive, tmp_path / "store", section=section)
    handler = Counting()
    handler.initialize(context)
    try:
        found = [send(handler, context, ROWS)[0] for _ in range(2)]
        assert [headers["X-Cache"] for _, _, headers in found] == ["miss", "hit"]
        assert close(found[1][1], expected(archive, ROWS))
        for more, word in (
            ({"outside": "eager"}, "outside: eager"),
            ({"on_miss": "background"}, "on_miss: background"),
        ):
            settings = msgspec.structs.replace(handler.settings, **more)
            results = results_of(handler, handler.handle, handler.model, settings, {}, context)
            assert results is not None
            reason = results.describe(None)["reason"]
            assert word in reason
            assert "on: tensors" in reason
    finally:
        handler.model.close()


def test_on_tensors_the_model_is_asked_once_and_the_handler_each_time(start: Start, archive: Path) -> None:
    handler, context = start(tried=False, on="tensors")
    for _ in range(2):
        ((status, answer, headers),) = send(handler, context, ROWS)
        assert (status, headers) == (200, {})
        assert close(answer, expected(archive, ROWS))
    assert handler.asked == 2
    assert counted(handler) == {"miss": 2, "hit": 2}
    shown = handler.describe_handle()["result_cache"]
    assert (shown["on"], shown["reason"], shown["entries"]) == ("tensors", None, 2)


def test_a_cache_that_cannot_be_made_costs_no_start(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ts_handlers.servers.torchserve import result_cache

    def fail(*arguments: Any) -> Any:
        raise OSError("no such luck")

    monkeypatch.setattr(result_cache, "_digest_of_files", fail)
    with caplog.at_level(logging.WARNING):
        handler, context = start(tried=False)
    assert handler.describe_handle()["result_cache"] == {"on": "request", "reason": "OSError: no such luck"}
    assert send(handler, context, ROWS)[0][0] == 200
