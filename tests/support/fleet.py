"""Workers on hosts of their own, as cheap as can be: one process imports everything and forks them.

    python fleet.py SPECIFICATION.json

The specification holds ``archive``, ``section`` (of model-config.yaml) and ``hosts``: for each the folder that is its
root, the number of workers, seconds by which its clock is wrong, and further environment variables. Each worker writes
what `describe` says, and an answer, to ``<root>/worker-<number>.json``.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.support.file_backend import use_file_backend
from tests.support.models import archive_source, settings_of
from ts_handlers import start_model


def enter_host(root: Path, variables: dict[str, str], skew: float) -> None:
    """Make this process one of a host's."""
    for name, folder in (("HOME", "home"), ("TMPDIR", "tmp"), ("XDG_CACHE_HOME", "cache")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(root / folder)
    tempfile.tempdir = None
    os.environ.pop("TS_HANDLERS_CACHE", None)  # the store is below XDG_CACHE_HOME
    os.environ.update(variables)
    if skew:
        true_time = time.time
        time.time = lambda: true_time() + skew


def work(specification: dict[str, Any], host: dict[str, Any], number: int) -> None:
    """One worker's life."""
    root = Path(host["root"])
    enter_host(root, host.get("variables", {}), host.get("skew", 0.0))
    use_file_backend()
    model = start_model(archive_source(Path(specification["archive"])), settings_of(**specification["section"]))
    assert model.store is not None
    model.store.write_back.wait()
    facts = {**model.describe(), "notes": model.store.notes, "answer": model(torch.ones(2, 4)).tolist()}
    (root / f"worker-{number}.json").write_text(json.dumps(facts))


def main() -> None:
    """Fork, wait, and end with the number of workers that did not end well."""
    specification = json.loads(Path(sys.argv[1]).read_text())
    children = {}
    for host in specification["hosts"]:
        for number in range(host["workers"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(specification, host, number)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                atexit._run_exitfuncs()
                sys.stderr.flush()
                os._exit(code)
            children[child] = host
    bad = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    sys.exit(bad)


if __name__ == "__main__":
    main()
