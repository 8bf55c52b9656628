"""`ts-handlers prewarm`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import (
    ArchiveArgument,
    ConfigOption,
    DeviceOption,
    JsonOption,
    ModelNameOption,
    StoreOption,
)
from ts_handlers.cli.output import PrintableFormatter, print_json, say

if TYPE_CHECKING:
    from ts_handlers.servers.torchserve.prewarm import Prewarmed


def command(
    archive: ArchiveArgument,
    device: DeviceOption = None,
    config: ConfigOption = None,
    model_name: ModelNameOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of the build.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Build a model archive's artifact into the store before anybody serves it.

    Ends with 0 when the next start is a hit, and with 1 when a backend fell back or failed. Progress goes to stderr.
    """
    from ts_handlers.servers.torchserve.prewarm import prewarm

    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(PrintableFormatter("%(message)s"))
    done = prewarm(archive, store=store, device=device, config=config, model_name=model_name, progress=_print_progress)
    if as_json:
        facts: dict[str, Any] = {**dataclasses.asdict(done), "ok": done.ok}
        print_json(facts)
    else:
        for each in done.parts or (done,):
            say(_sentence(each))
    return ExitCode.OK if done.ok else ExitCode.FINDINGS


def _print_progress(phase: str, elapsed: float, estimate: float | None) -> None:
    expected = "" if estimate is None else f" (the build took {estimate:.0f} s the last time)"
    say(f"{elapsed:7.1f} s  {phase}{expected}", file=sys.stderr, flush=True)


def _sentence(done: Prewarmed) -> str:
    where = f"{done.model}: {done.backend} on {done.device}"
    if done.result == "failed":
        text = f"{done.model}: failed: {done.reason}"
    elif done.result == "eager":
        text = f"{done.model}: no backend works"
    else:
        verb = {"built": "built", "hit": "already there", "waited": "built by another process"}[done.result]
        text = f"{where}: {verb}, key {done.key}, {done.seconds:.1f} s"
    fallbacks = [f"\n  {each['backend']} fell back: {each['reason']}" for each in done.fallbacks]
    unpublished = [f"\n  not published: {note}" for note in done.notes if done.key and not done.published]
    return "".join([text, *fallbacks, *unpublished])
