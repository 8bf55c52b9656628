"""`ts-handlers serve`."""

from __future__ import annotations

import sys

import typer

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}
"""All arguments are TorchServe's, or read in `ts_handlers.servers.torchserve.launch`."""


def command(context: typer.Context) -> None:
    """Run TorchServe with its own arguments, and a fork server from which its workers start (docs/fork-server.md)."""
    from ts_handlers.servers.torchserve.launch import main

    sys.exit(main(context.args))
