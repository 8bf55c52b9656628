"""Answer the requests of a batch so that none fails because of another: together if that works, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ts_handlers.errors import BusyError
from ts_handlers.servers.torchserve.request_batch import RequestBatch, can_be_sent

Below = Callable[[RequestBatch], Any]
"""Answers a batch with one answer for each request, or raises."""


def answer(batch: RequestBatch, together: Below, below: Below) -> Any:
    """Answer the predictions of a batch together, and what asks for something else by itself.

    TorchServe puts the management API's describe into a batch with predictions, and explanations too; its base handler
    looks at the first request alone.

    Parameters
    ----------
    batch:
        All requests that TorchServe has handed over.
    together:
        Answers predictions.
    below:
        Answers one request of any kind.
    """
    count = len(batch.rows) if batch.can_be_split else 0
    apart = [index for index in range(count) if batch.asks_alone(index)]
    if not apart:
        return together(batch)
    rest = [index for index in range(count) if index not in apart]
    answers = dict(zip(apart, answer_one_by_one(batch, below, apart), strict=True))
    if rest:
        part = batch.select(rest)
        given = together(part) if len(rest) > 1 else answer_one_by_one(part, below)
        answers.update(zip(rest, given, strict=True))
    return [answers[index] for index in range(count)]


def answer_together(batch: RequestBatch, below: Below) -> Any:
    """Answer a batch at once; when that fails, answer each request alone if its requests may be repeated.

    Raises
    ------
    Exception
        What a batch of one request has failed with, unless it is a refusal.
    """
    try:
        answers = below(batch.copied())
    except BusyError as error:
        return batch.refuse_or_raise(error)
    except Exception as error:
        if not batch.can_be_repeated:
            return batch.refuse_or_raise(error)
    else:
        if batch.has_answers(answers):
            return answers
        if not batch.can_be_repeated:
            if isinstance(answers, list) and not all(map(can_be_sent, answers)):
                return batch.refuse_or_raise(ValueError("an answer holds a surrogate, which UTF-8 does not have"))
            return answers  # TorchServe tells what is wrong with the answer to a batch of one
    return answer_one_by_one(batch, below)


def answer_one_by_one(batch: RequestBatch, below: Below, indexes: Sequence[int] | None = None) -> list[Any]:
    """Answer each request alone, so that only the bad ones fail; never raises an `Exception` of one."""
    answers: list[Any] = []
    busy: BusyError | None = None
    for index in range(len(batch.rows)) if indexes is None else indexes:
        part = batch.select([index])
        if busy is not None:  # behind one that found no context the others would wait as long again
            answers.extend(part.refuse(busy))
            continue
        try:
            found = below(part)
        except Exception as error:
            busy = error if isinstance(error, BusyError) else None
            answers.extend(part.refuse(error))
        else:
            wrong = RuntimeError(f"expected a list of 1 answer, found {type(found).__name__}")
            answers.extend(found if part.has_answers(found) else part.refuse(wrong))
    return answers
