"""Exit codes of `ts-handlers`, for scripts; docs/cli.md has the same list."""

from __future__ import annotations

import enum

from ts_handlers.errors import ModelError, SettingsError, StoreError, WarmStartError


class ExitCode(enum.IntEnum):
    """How a verb ended.

    Attributes
    ----------
    OK:
        Done, and nothing to report.
    FINDINGS:
        Done, and there is something to look at: damage, a difference, a part of the work that was left out.
    USAGE:
        Wrong arguments, settings or archive; nothing was done.
    STORE:
        The store is missing, closed, foreign or full.
    FAILED:
        The verb could not do its work for another reason that its message names.
    BUG:
        An unexpected exception; its traceback is on stderr.
    INTERRUPTED:
        Stopped by Ctrl-C.
    """

    OK = 0
    FINDINGS = 1
    USAGE = 2
    STORE = 3
    FAILED = 4
    BUG = 70
    INTERRUPTED = 130


def exit_code_of(error: Exception) -> ExitCode:
    """The exit code for an exception that left a verb."""
    if isinstance(error, (SettingsError, ModelError)):
        return ExitCode.USAGE
    if isinstance(error, (StoreError, OSError)):
        return ExitCode.STORE
    return ExitCode.FAILED if isinstance(error, WarmStartError) else ExitCode.BUG
