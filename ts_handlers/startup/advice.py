"""One line for the log of a start that fell back: what serves, what was to serve, why it does not, and what to do."""

from __future__ import annotations

from ts_handlers.errors import one_line
from ts_handlers.execution.outcome import Outcome
from ts_handlers.settings import SECTION

_STORE = "make the store writable for this user, or name another one (`ts-handlers doctor`)"
_SAYS_IT = ("SettingsError", "ContextMemoryError", "StoreError", "RemoteError", "MissingDependencyError", "RefitError")
"""Errors whose messages say what to do."""
_ADVICE = {
    "FailedBeforeError": "repair what the reason names; `ts-handlers prewarm ARCHIVE` tries at once",
    "QuarantinedError": "`ts-handlers ls` shows it, `ts-handlers unquarantine KEY` lets the next start try again",
    "CanaryError": f"widen {SECTION}.canary if such a difference is harmless, or leave the backend out of backends",
    "SampleError": f"declare limits of the values in {SECTION}.inputs, so that the model takes what is drawn",
}
_OTHERWISE = (
    "`ts-handlers doctor` says what the machine lacks; if the model cannot be compiled, leave the backend out of "
    f"{SECTION}.backends"
)


def fallback_line(name: str, outcome: Outcome) -> str | None:
    """What the log says when a start fell back; None when it did not.

    Parameters
    ----------
    name:
        The model's name.
    outcome:
        How the start ended. The first of its fallbacks is the one that a person would mend.

    Examples
    --------
    >>> reason = "BuildError: no export"
    >>> outcome = Outcome("eager", None, "eager", fallbacks=({"backend": "inductor", "reason": reason},))
    >>> print(fallback_line("net", outcome)[:82])
    net: fell back: eager serves, and not inductor: BuildError: no export. What to do:
    """
    if not outcome.fallbacks:
        return None
    first = outcome.fallbacks[0]
    reason = one_line(first["reason"], 600).rstrip(".")
    kind = reason.partition(":")[0]
    if first["backend"] == "store":
        serves, advice = "a temporary store is used, which the next start does not find", _STORE
    else:
        serves = f"{outcome.backend} serves, and not {first['backend']}"
        advice = "" if kind in _SAYS_IT else _ADVICE.get(kind, _OTHERWISE)
    return f"{name}: fell back: {serves}: {reason}" + (f". What to do: {advice}" if advice else "")
