"""The answer to a request that has failed, and what the log says of it: both bounded, whatever the request holds.

The status is the one with which TorchServe answers a batch of one for the same error. TorchServe ends a worker whose
answer is larger than `max_response_size`, and reads metrics from the worker's output, so a request must not shape
either at will.
"""

from __future__ import annotations

import json
import traceback

from ts_handlers.errors import BusyError, InputError, bounded, shown

MOST_BYTES = 1000
"""Of the body of a refusal."""
MOST_LOGGED = 4000
"""Characters of an error's text in the log."""
_MOST_FRAMES = 8


def status_of(error: Exception) -> tuple[int, str]:
    """HTTP status and reason phrase.

    Examples
    --------
    >>> status_of(InputError("no")), status_of(KeyError("x"))
    ((400, 'Bad Request'), (503, 'Service Unavailable'))
    """
    if isinstance(error, InputError):
        return 400, "Bad Request"
    if _is_out_of_memory(error):
        return 507, "Insufficient Storage"
    code = getattr(error, "error_code", None)
    if _is_prediction_exception(error) and isinstance(code, int) and 400 <= code < 600:
        return code, ""
    return 503, "Service Unavailable"


def refusal(error: Exception) -> str:
    """The body of an answer: JSON with the status, a type and a message, at most `MOST_BYTES` long.

    Examples
    --------
    >>> refusal(InputError("no"))
    '{"code": 400, "type": "InputError", "message": "no"}'
    >>> len(refusal(InputError("x" * 1_000_000)))
    1000
    """
    kind = next((kind.__name__ for kind in (InputError, BusyError) if isinstance(error, kind)), None)
    return _bounded_body({"code": status_of(error)[0], "type": kind or "InternalServerException"}, _message(error))


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
