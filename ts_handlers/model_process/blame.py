"""Whether a call has ended the model's process: what there is to show that it was not ended from outside.

A call that ran alone when the process ended need not have ended it: somebody may have killed or stopped the process,
and twice. So a call is blamed only if it ran alone and the process ended by a fault of its own code, by `exit`, for
lack of memory, or because its code kept the interpreter's lock. The worker that started a process knows how it has
ended, and leaves word in the folder (`ts_handlers.model_process.folder`).
"""

from __future__ import annotations

import signal
import time

from ts_handlers.model_process.folder import Folder, Holder
from ts_handlers.system.child_process import how_it_ended
from ts_handlers.system.process_limits import oom_kills

EVIDENCE_SECONDS = 5.0
"""How long the word of another worker may take."""
HANGS_STATUS = 71
"""With which the process ends itself for a call of which it knows that it hangs, and which it has answered."""
_FAULTS = {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}


def what_ended_it(folder: Folder, holder: Holder, oom_kills_before: int | None) -> str | None:
    """Why a process has ended, as the predicate of a sentence, if what it ran can have been the cause; else None.

    Parameters
    ----------
    folder, holder:
        The process's.
    oom_kills_before:
        `ts_handlers.system.process_limits.oom_kills` when the call was sent.
    """
    deadline = time.monotonic() + EVIDENCE_SECONDS
    while True:
        cause = folder.killed(holder)
        if cause is not None:
            return "kept the interpreter's lock and gave no sign of life" if cause == "silent" else None
        code = folder.ended(holder)
        if code is not None:
            return _verdict(code, oom_kills_before)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.02)


def _verdict(code: int, oom_kills_before: int | None) -> str | None:
    if code >= 0:
        return how_it_ended(code) if code not in (0, HANGS_STATUS) else None
    if -code in _FAULTS:
        return how_it_ended(code)
    now = oom_kills()
    if -code == signal.SIGKILL and now is not None and oom_kills_before is not None and now > oom_kills_before:
        return "was killed for lack of memory"
    return None
