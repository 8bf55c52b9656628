"""Archives of a handler that knows nothing of the package, and of the two lines over it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

from tests.support.archive_files import files_of, write_zip

TWO_LINES = """
from their import TheirHandler
from ts_handlers import CompiledHandlerMixin


class Handler(CompiledHandlerMixin, TheirHandler):
    pass
"""
THEIRS, OURS = "their.py", "handler.py"


def pack_theirs(
    store: Path, work: Path, theirs: str, config: str, archives: Mapping[str, str], **manifest: str
) -> None:
    """Write archives of one folder into a model store.

    Parameters
    ----------
    theirs:
        The source of their handler.
    config:
        The model-config.yaml.
    archives:
        For each archive's name the handler file, `THEIRS` or `OURS`.
    manifest:
        Further entries of the manifest's ``model``.
    """
    (work / THEIRS).write_text(textwrap.dedent(theirs))
    (work / OURS).write_text(TWO_LINES)
    (work / "model-config.yaml").write_text(config)
    for name, handler in archives.items():
        model = {"modelName": name, "handler": handler, "modelVersion": "1.0", **manifest}
        described = {"model": {**model, "configFile": "model-config.yaml"}, "runtime": "python"}
        files = {**files_of(work), "MAR-INF/MANIFEST.json": json.dumps(described).encode()}
        write_zip(store / f"{name}.mar", files)
