"""`ts-handlers keygen`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_handlers.cli.options import JsonOption
from ts_handlers.cli.output import print_json, say


def command(
    private: Annotated[Path, typer.Argument(metavar="PRIVATE", help="New file for the private key.")],
    public: Annotated[
        Path | None, typer.Argument(metavar="[PUBLIC]", help="New file for the public key; PRIVATE.pub otherwise.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a pair of Ed25519 keys, for `trust.signing_key` and `trust.public_keys`."""
    from ts_handlers.store.remote.signing import generate_keys

    public = public or private.with_name(f"{private.name}.pub")
    name = generate_keys(private, public)
    if as_json:
        print_json({"key": name, "private": str(private), "public": str(public)})
    else:
        say(f"key {name}: {private} (keep it secret) and {public}")
