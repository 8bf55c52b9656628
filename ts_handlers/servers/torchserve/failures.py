"""The answer to a request that has failed, and what the log says of it: both bounded, whatever the request holds.

The status is the one with which TorchServe answers a batch of one for the same error. TorchServe ends a worker whose
answer is larger than `max_response_size`, and reads metrics from the worker's output, so a request must not shape
either at will.
"""

from __future__ import annotations

import dataclasses
import json
import traceback

from ts_handlers.errors import BusyError, InputError, bounded, shown

MOST_BYTES = 1000
"""Of the body of a refusal."""
MOST_LOGGED = 4000
"""Characters of an error's text in the log."""
_MOST_FRAMES = 8


@dataclasses.dataclass(frozen=True)
class Failure:
    """One row of docs/errors.md: what a client is told, and whether it should try again.

    Attributes
    ----------
    kind:
        The label of the metric ``ts_handlers_request_errors_total``.
    happened:
        What has happened, for people.
    status, phrase:
        Of HTTP. None: the handler's own status.
    type:
        The body's field ``type``.
    grpc:
        Status of gRPC. None: TorchServe derives it from the handler's own status.
    retry:
        ``no``, ``later`` or ``once``, and why.
    """

    kind: str
    happened: str
    status: int | None
    phrase: str
    type: str
    grpc: str | None
    retry: str


INVALID_INPUT = Failure(
    "invalid_input",
    "The request cannot be decoded, or its inputs are outside what the model declares.",
    *(400, "Bad Request", "InputError", "INVALID_ARGUMENT"),
    "no: the same request is refused again",
)
BUSY = Failure(
    "busy",
    "No execution context came free within `contexts.wait_seconds`.",
    *(503, "Service Unavailable", "BusyError", "UNAVAILABLE"),
    "later: with a growing pause",
)
OUT_OF_MEMORY = Failure(
    "out_of_memory",
    "The worker or its GPU had no memory left for this request.",
    *(507, "Insufficient Storage", "InternalServerException", "INTERNAL"),
    "later: with a smaller request, or elsewhere",
)
HANDLER = Failure(
    "handler",
    "The handler raised TorchServe's `PredictionException` with a status from 400 to 599.",
    *(None, "", "InternalServerException", None),
    "as the handler's author says",
)
INTERNAL = Failure(
    "internal",
    "Anything else was raised; the worker's log has the error and its traceback.",
    *(503, "Service Unavailable", "InternalServerException", "UNAVAILABLE"),
    "once: it may be a fault of the request",
)
FAILURES = (INVALID_INPUT, BUSY, OUT_OF_MEMORY, HANDLER, INTERNAL)


def failure_of(error: Exception) -> Failure:
    """The row of `FAILURES` for an error.

    Examples
    --------
    >>> failure_of(InputError("no")).kind, failure_of(MemoryError()).kind, failure_of(KeyError("x")).kind
    ('invalid_input', 'out_of_memory', 'internal')
    """
    if isinstance(error, InputError):
        return INVALID_INPUT
    if isinstance(error, BusyError):
        return BUSY
    if _is_out_of_memory(error):
        return OUT_OF_MEMORY
    code = getattr(error, "error_code", None)
    if _is_prediction_exception(error) and isinstance(code, int) and 400 <= code < 600:
        return HANDLER
    return INTERNAL


def status_of(error: Exception) -> tuple[int, str]:
    """HTTP status and reason phrase.

    Examples
    --------
    >>> status_of(InputError("no")), status_of(KeyError("x"))
    ((400, 'Bad Request'), (503, 'Service Unavailable'))
    """
    failure = failure_of(error)
    status: int = error.error_code if failure.status is None else failure.status  # type: ignore[attr-defined]
    return status, failure.phrase


def refusal(error: Exception) -> str:
    """The body of an answer: JSON with the status, a type and a message, at most `MOST_BYTES` long.

    Examples
    --------
    >>> refusal(InputError("no"))
    '{"code": 400, "type": "InputError", "message": "no"}'
    >>> len(refusal(InputError("x" * 1_000_000)))
    1000
    """
    return _bounded_body({"code": status_of(error)[0], "type": failure_of(error).type}, _message(error))


def as_prediction_exception(error: Exception) -> Exception:
    """The error by which TorchServe answers a batch of one over gRPC; its text is the `refusal`.

    That text goes to the worker's log, from which TorchServe reads metrics.
    """
    from ts.utils.util import PredictionException

    made: Exception = PredictionException(refusal(error).replace("[METR", "[ METR"), status_of(error)[0])
    return made


def log_text(error: Exception) -> str:
    """An error's type and text and the latest frames of its traceback, bounded and printable."""
    frames = traceback.format_tb(error.__traceback__)[-_MOST_FRAMES:]
    return "".join(bounded(frame, 1000) for frame in frames) + f"{type(error).__name__}: {shown(error, 1000)}"


def is_loggable(error: Exception) -> bool:
    """Whether TorchServe's own log of an error would be short and printable."""
    texts: list[str] = []
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        left += [each.__cause__, each.__context__]
        try:
            texts.append(str(each))
        except Exception:
            return False
    whole = "".join(texts)
    return (
        len(whole) <= MOST_LOGGED and whole.replace("\n", "").replace("\t", "").isprintable() and "[METR" not in whole
    )


def _message(error: Exception) -> str:
    if isinstance(error, (InputError, BusyError)):
        return str(error)
    if _is_out_of_memory(error):
        return "Out of resources"
    return str(getattr(error, "message", "")) if _is_prediction_exception(error) else "Prediction failed"


def _bounded_body(facts: dict[str, object], message: str) -> str:
    body = json.dumps({**facts, "message": message[:MOST_BYTES]})
    if len(message) <= MOST_BYTES and len(body) <= MOST_BYTES:
        return body
    end = f"... ({len(message)} characters)"
    room = MOST_BYTES - len(json.dumps({**facts, "message": end}))
    kept = 0
    for character in message:
        room -= len(json.dumps(character)) - 2
        if room < 0:
            break
        kept += 1
    return json.dumps({**facts, "message": message[:kept] + end})


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (not isinstance(error, (InputError, BusyError)) and "CUDA" in str(error))


def _is_prediction_exception(error: Exception) -> bool:
    kind = type(error)
    return any(base.__name__ == "PredictionException" and base.__module__ == "ts.utils.util" for base in kind.__mro__)
