"""`ts-handlers metrics`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ts_handlers.cli.options import JsonOption, StoreOptions
from ts_handlers.cli.output import print_json, say


def command(
    *,
    store: StoreOptions,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8083,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    once: Annotated[bool, typer.Option("--once", help="Print the metrics once and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Serve the metrics of all workers that use the store: /metrics for Prometheus, /ready and /progress as JSON.

    With --json it prints once what /progress answers.

    Run it beside the server, as the same user. Who reaches the port reads names of models and keys; there is no
    authorization, so it listens on the loopback interface unless --host says otherwise.
    """
    from ts_handlers.exporter.collecting import Collector
    from ts_handlers.exporter.server import ExporterServer
    from ts_handlers.monitoring.exposition import exposition

    collector = Collector(store.path())
    if as_json:
        print_json({"models": collector.progress()})
        return
    if once:
        sys.stdout.write(exposition(collector.series()))
        return
    with ExporterServer((host, port), collector) as server:
        say(f"metrics of {store.path()} at http://{host}:{server.server_port}/metrics")
        sys.stdout.flush()
        server.serve_forever()
