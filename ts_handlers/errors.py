"""The exceptions of the package: one tree, rooted in `WarmStartError`.

Every message says what was expected, what was found and what to do.
"""

from __future__ import annotations

import re

UNDECODABLE = (ValueError, RecursionError)
"""What decoders of JSON and of UTF-8 raise for damaged bytes; msgspec's own error is not all of it."""


class WarmStartError(Exception):
    """Root of every exception that this package raises on purpose."""


class SettingsError(WarmStartError, ValueError):
    """A setting of model-config.yaml is unknown, of a wrong type, or impossible together with another."""


class ForeignBackendError(SettingsError):
    """`pt2` names a compiler of which no artifact can be kept; plain TorchServe may know it.

    `backend` is its name.
    """

    def __init__(self, message: str, backend: str) -> None:
        super().__init__(message)
        self.backend = backend


class ModelError(WarmStartError, RuntimeError):
    """The archive's model cannot be built or its weights cannot be read; no backend can help."""


class InputError(WarmStartError, ValueError):
    """A request that the model cannot answer; served as HTTP 400 with this message."""


class BuildError(WarmStartError, RuntimeError):
    """A backend cannot compile this model; the next backend of the fallback order is tried."""


class DiskFullError(BuildError):
    """A build ran out of disk space; it is tried again when there is more.

    `free` holds the free bytes that the build had, by the folder that was too small.
    """

    def __init__(self, message: str, free: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.free = dict(free or {})


class ChangedInputError(BuildError):
    """The model changes its inputs in place, which a graph for native code must not."""


class FailedBeforeError(BuildError):
    """A build of the same key has failed a short time ago and is not repeated yet; the next backend is tried.

    `unbuildable` tells whether that was a `BuildError`: the backend cannot build the model, and no variant of it could.
    """

    unbuildable: bool = True


class LoadError(WarmStartError, RuntimeError):
    """A stored artifact cannot be loaded here; it is rebuilt, or the next backend is tried."""


class MissingDependencyError(LoadError):
    """What a stored artifact needs is not in this process, such as an operator; the artifact is sound and stays."""


class RefitError(LoadError):
    """A stored plan is sound and cannot take the weights at hand; they get a plan of their own."""


class CanaryError(WarmStartError, RuntimeError):
    """An artifact did not reproduce the eager model's output; it is not served."""


class FrozenModelError(WarmStartError, RuntimeError):
    """A change of the model after its start, which what serves would not see."""


class SampleError(WarmStartError, RuntimeError):
    """The plain model refuses every input that is drawn for canary and warm-up; no backend is at fault."""


class QuarantinedError(WarmStartError, RuntimeError):
    """An artifact has ended a process here, or answered wrongly; it is not tried again until that is lifted."""


class StoreError(WarmStartError, OSError):
    """The store cannot be used as configured (missing, foreign, unreadable or full)."""


class RemoteError(StoreError):
    """The remote store or the lease service did not answer as it should; the host goes on without it.

    `first` tells the failure itself from the refusals to try again that follow it.
    """

    first: bool = False


class RefusedError(WarmStartError, ValueError):
    """Something from another host is unsigned, foreign, damaged or not what it should be; it is not used."""


class MissError(WarmStartError, RuntimeError):
    """`on_miss: fail` and the store holds no entry for the key."""


class BusyError(WarmStartError, RuntimeError):
    """Every execution context of the model is in use; served as HTTP 503 with this message."""


class ContextMemoryError(WarmStartError, MemoryError):
    """The execution contexts that the settings ask for do not fit into the device's memory."""


FINAL = (ModelError, SettingsError, MissError)
"""Errors of the archive or of the settings: no other backend would do better."""


def one_line(error: BaseException | str, length: int = 400) -> str:
    """An error's message as one line of at most `length` characters.

    Examples
    --------
    >>> one_line(ValueError("expected 3,\\n    found 4"), 20)
    'expected 3, found 4'
    """
    return re.sub(r"\s+", " ", str(error)).strip()[:length]


def shown(text: object, length: int = 80) -> str:
    """A text that a request has shaped, in quotes, as printable ASCII of about `length` characters at most.

    Quotes, control characters and surrogates are escaped, so that it can stand in a message, a log line and a terminal.

    Examples
    --------
    >>> shown("x"), shown("a" * 1_000_000, 8), shown("\\x1b[2J")
    ("'x'", "'aaaaaaaa'... (1000000 characters)", "'\\\\x1b[2J'")
    """
    whole = str(text)
    head = ascii(whole[:length])
    if len(head) > 2 * length:  # escapes take up to ten characters each
        head = head[: 2 * length]
    return head if len(whole) <= length else f"{head}... ({len(whole)} characters)"


def bounded(text: object, length: int = 400) -> str:
    """A message of at most `length` characters and a few, which every encoding of text takes.

    Examples
    --------
    >>> bounded("a" * 1_000_000, 8)
    'aaaaaaaa... (1000000 characters)'
    """
    whole = str(text)
    head = whole[:length].encode("utf-8", "backslashreplace").decode()
    return head if len(whole) <= length else f"{head}... ({len(whole)} characters)"


def without_frames(error: Exception) -> Exception:
    """The error, and those that it came from, without tracebacks: their frames hold what failed.

    A frame refers to its caller, so an error that the caller keeps would keep itself, and all that the frames hold.

    Examples
    --------
    >>> try:
    ...     1 / 0
    ... except ZeroDivisionError as error:
    ...     kept = without_frames(error)
    >>> kept.__traceback__ is None
    True
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            waiting += [each.__cause__, each.__context__]
    return error
