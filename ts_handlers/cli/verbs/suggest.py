"""`ts-handlers suggest`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import (
    ArchiveArgument,
    ConfigOption,
    DeviceOption,
    JsonOption,
    ModelNameOption,
    StoreOptions,
)
from ts_handlers.cli.output import print_json, say


def command(
    archive: ArchiveArgument,
    *,
    device: DeviceOption = None,
    config: ConfigOption = None,
    model_name: ModelNameOption = None,
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Print what model-config.yaml could declare for an archive's model, and why.

    That is what is declared; or what the handler's samples or earlier calls have told; or a guess, with which the verb
    ends with 1. The archive's handler is imported and run up to the start of its model, and answers its samples.
    """
    from ts_handlers.servers.torchserve.suggestion import suggest

    opened = store.make()
    with contextlib.redirect_stdout(sys.stderr):  # what the archive's own code prints
        found = suggest(archive, opened, device=device, config=config, model_name=model_name)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print(found.yaml or f"# {found.why}\n", end="")
        for note in found.notes:
            say(note, file=sys.stderr)
    return ExitCode.FINDINGS if found.origin in ("guess", "nothing") else ExitCode.OK
