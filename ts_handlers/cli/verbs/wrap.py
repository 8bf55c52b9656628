"""`ts-handlers wrap`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_handlers.cli.options import JsonOption
from ts_handlers.cli.output import print_json, say


def command(
    handler: Annotated[
        str,
        typer.Argument(
            metavar="HANDLER",
            help="Your handler file, file.py:function, or a handler of TorchServe's own such as image_classifier.",
        ),
    ],
    target: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="The file to write; warm_HANDLER.py beside yours otherwise.")
    ] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="The class, where a file defines several.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that this command has not written.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a handler file with the two lines over your handler, which stays as it is.

    Your file is read, not run.
    """
    from ts_handlers.servers.torchserve.wrapping import find_handler, write_handler

    found = find_handler(handler, class_name)
    beside = Path() if found.file is None else found.file.parent
    target = target or beside / f"warm_{found.module.rpartition('.')[2]}.py"
    write_handler(found, target, force=force)
    extra = None if found.file is None else str(found.file)
    if as_json:
        print_json({"written": str(target), found.kind: found.name, "module": found.module, "extra_file": extra})
        return
    say(f"{target}: the two lines over the {found.kind} {found.name} of {found.module}")
    say(f"archive it with --handler {target}" + (f" --extra-files {extra}" if extra else ""))
