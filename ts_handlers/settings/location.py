"""Where the store lies when no setting says so."""

from __future__ import annotations

import os
from collections.abc import Mapping


def default_store_root(environ: Mapping[str, str] = os.environ) -> str:
    """The store's root when no setting names one.

    ``TS_HANDLERS_CACHE``, then ``$XDG_CACHE_HOME/ts_handlers``, then ``~/.cache/ts_handlers``; a uid without a home
    folder gets a folder of its own in the temporary directory.
    """
    if environ.get("TS_HANDLERS_CACHE"):
        return environ["TS_HANDLERS_CACHE"]
    if environ.get("XDG_CACHE_HOME"):
        return os.path.join(environ["XDG_CACHE_HOME"], "ts_handlers")
    home = environ.get("HOME", "")
    if not home:
        expanded = os.path.expanduser("~")  # the passwd entry, if there is one; unchanged otherwise
        home = expanded if os.path.isabs(expanded) else ""
    if home and home != "/" and os.access(home, os.W_OK | os.X_OK):
        return os.path.join(home, ".cache", "ts_handlers")
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"ts_handlers-{os.getuid()}")
