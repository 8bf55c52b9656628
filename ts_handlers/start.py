"""`start_model`, which every server calls: it makes a model ready, here or in a process that all workers share."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from ts_handlers.compiled_model import ServedModel
from ts_handlers.model.base import ModelSource
from ts_handlers.model.recipes import Made
from ts_handlers.settings import Settings
from ts_handlers.startup.fallback import Progress, start_here

if TYPE_CHECKING:
    from ts_handlers.model.declaration import Declaration


class Observed(NamedTuple):
    """What has told a model's inputs, where nobody has declared them, so that calls outside of it are noted.

    Attributes
    ----------
    identity:
        Under which name the store keeps what is known of the model's calls.
    declaration:
        The inputs that the settings have now.
    """

    identity: str
    declaration: Declaration


_captured: contextvars.ContextVar[list[Made] | None] = contextvars.ContextVar("ts_handlers_captured", default=None)


def start_model(
    source: ModelSource,
    settings: Settings,
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
    retry_failed: bool = False,
    event: str = "start",
    observed: Observed | None = None,
) -> ServedModel:
    """Make a model ready: load it from the store, or build and publish it first.

    With ``contexts: {across_workers: true}`` that happens in another process, which is started if need be, and this one
    gets a model on the CPU that calls it there; see `ts_handlers.model_process`.

    Parameters
    ----------
    source:
        Where the model comes from; see `ts_handlers.model.base`.
    settings:
        See `ts_handlers.settings.parse_settings`.
    device:
        Where it runs. Call `torch.cuda.set_device` before, as the handler does.
    progress:
        Called when a phase begins, with its name and the seconds that the build took the last time, if that is known.
    retry_failed:
        Build what has failed a short time ago, too, as with `strict: true`.
    event:
        How the log calls it.
    observed:
        What has told the inputs of the settings, where that was not their author.

    Raises
    ------
    ModelError, SettingsError
        The model or the settings are wrong.
    MissError
        `on_miss: fail` and there is no entry.
    WarmStartError
        `strict: true` and a backend failed.

    Examples
    --------
    >>> import tempfile, torch
    >>> from ts_handlers import ModuleSource, Settings, start_model
    >>> model = start_model(ModuleSource("linear", torch.nn.Linear(2, 1)), Settings(backends=("eager",)))
    >>> model(torch.zeros(3, 2)).shape, model.outcome.backend
    (torch.Size([3, 1]), 'eager')
    """
    hand_over([Made(source, settings, torch.device(device), observed is not None)])
    settings = _beside_serving(source, settings)
    if settings.contexts.across_workers:
        from ts_handlers.model_process.shared_model import join_model

        return join_model(source, settings, torch.device(device))
    return start_here(
        source, settings, device, progress=progress, retry_failed=retry_failed, event=event, observed=observed
    )


def _beside_serving(source: ModelSource, settings: Settings) -> Settings:
    """The settings; where nobody has declared the inputs, a miss is built beside the eager model and not before it.

    Nobody has asked for that build, so a server waits for it no longer than without this package.
    """
    undeclared = source.weights_by_name and not settings.inputs and settings.observing is not None
    if not undeclared or settings.on_miss != "compile" or settings.strict or settings.contexts.across_workers:
        return settings
    return msgspec.structs.replace(settings, on_miss="background")


def hand_over(made: Sequence[Made]) -> None:
    """Inside a block of `captured_start`, hand over all that is about to be started, and end the block.

    Elsewhere it does nothing, and so it does without anything to start.
    """
    captured = _captured.get()
    if captured is not None and made:
        captured.extend(made)
        raise _Captured


class _Captured(BaseException):
    """Ends whoever called `start_model`; no Exception, so that nobody takes it for a failure."""


def is_captured() -> bool:
    """Whether `start_model` starts nothing now, see `captured_start`."""
    return _captured.get() is not None


@contextlib.contextmanager
def captured_start() -> Iterator[list[Made]]:
    """Inside the block, `start_model` starts nothing: what it was called with goes to the list, and the block ends.

    So another process finds out what a server's handler would start, without starting it. An error that the handler
    raises after that is of no interest.
    """
    found: list[Made] = []
    token = _captured.set(found)
    try:
        yield found
    except _Captured:
        pass
    except Exception:
        if not found:
            raise
    finally:
        _captured.reset(token)
