"""How far the start of a model has got: what `/progress` and TorchServe's describe say of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

STATES = ("starting", "waiting", "compiling", "ready", "failed")
"""``waiting`` is for another process's build; ``starting`` everything of a start that is neither that nor a build."""
_NEARLY = 0.99
"""The greatest share: an estimate does not say that something has ended."""


class Progress(msgspec.Struct):
    """One model in one process.

    Attributes
    ----------
    state:
        One of `STATES`.
    phase:
        The phase that the start is in, as of `ts_handlers.metrics.PHASES`, one inside a build as ``build: export``;
        None when it is over.
    serving:
        Whether requests are answered: also while a build goes on beside the eager model.
    began, build_began, ended:
        Seconds since the epoch.
    estimate:
        Seconds that the latest build of this model took, None when there was none.
    reason:
        Why the start failed.
    """

    state: str = "starting"
    phase: str | None = "process"
    serving: bool = False
    began: float = msgspec.field(default_factory=time.time)
    build_began: float | None = None
    ended: float | None = None
    estimate: float | None = None
    reason: str | None = None

    def enter(self, phase: str) -> None:
        """A phase begins."""
        self.phase = phase
        if phase == "wait":
            self.state = "waiting"
        elif phase.startswith("build"):
            self.state = "compiling"
            self.build_began = self.build_began or time.time()
        elif self.state == "waiting" or phase != "publish":
            self.state = "starting"

    def end(self, state: str, reason: str | None = None) -> None:
        """The start is over."""
        self.state, self.phase, self.reason, self.ended = state, None, reason, time.time()


def shown(facts: Mapping[str, Any], now: float | None = None) -> dict[str, Any]:
    """The fields of a `Progress` as users see them: durations in the place of moments, and the share.

    Examples
    --------
    >>> compiling = Progress("compiling", "build: compile", began=100.0, build_began=104.0, estimate=20.0)
    >>> found = shown(msgspec.structs.asdict(compiling), now=109.0)
    >>> found["state"], found["phase"], found["seconds"], found["estimate_seconds"], found["share"]
    ('compiling', 'build: compile', 9.0, 20.0, 0.25)
    """
    now = time.time() if now is None else now
    began, build_began, ended = facts.get("began"), facts.get("build_began"), facts.get("ended")
    estimate, state = facts.get("estimate"), facts.get("state")
    since = build_began if build_began is not None else began
    share = None
    if state == "ready":
        share = 1.0
    elif estimate and since is not None and state in ("compiling", "waiting"):
        share = round(min(_NEARLY, max(0.0, (now - since) / estimate)), 3)
    return {
        "state": state,
        "phase": facts.get("phase"),
        "serving": bool(facts.get("serving")),
        "seconds": None if began is None else round(max(0.0, (ended or now) - began), 3),
        "estimate_seconds": None if estimate is None else round(float(estimate), 1),
        "share": share,
        "reason": facts.get("reason"),
    }


def of_background(described: Mapping[str, Any] | None) -> dict[str, Any]:
    """The same for a model that is served, from what the build beside it says of itself.

    Parameters
    ----------
    described:
        See `ts_handlers.startup.background.build.BackgroundBuild.describe`; None where no build goes on.
    """
    if described is None:
        return shown(msgspec.structs.asdict(Progress("ready", None, True)), 0.0) | {"seconds": None}
    states = {"waiting": "waiting", "building": "compiling", "loading": "starting", "swapped": "ready"}
    state = states.get(described["state"], "failed")
    began = described["began"]
    facts = Progress(state, described["phase"], True, began, began, began + described["elapsed_s"])
    facts.estimate, facts.reason = described["estimate_s"], described["reason"]
    return shown(msgspec.structs.asdict(facts), facts.ended)
