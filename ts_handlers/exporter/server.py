"""The HTTP server: ``/metrics``, ``/ready`` and ``/progress``."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ts_handlers.exporter.collecting import Collector, is_ready
from ts_handlers.monitoring.exposition import CONTENT_TYPE, exposition

_JSON = "application/json"
MOST_SECONDS = 10.0
"""For which a client may keep a connection without sending anything."""


class ExporterServer(ThreadingHTTPServer):
    """Answers GET requests about one store.

    Parameters
    ----------
    address:
        Host and port; port 0 takes a free one, which `server_port` tells.
    collector:
        Looks at the store.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], collector: Collector) -> None:
        self._collector = collector
        self._lock = threading.Lock()  # one look at a time, however many ask
        super().__init__(address, _Handler)

    def answer(self, target: str) -> tuple[int, str, str]:
        """Status, content type and body for the path and query of a request."""
        parts = urlsplit(target)
        if parts.path == "/metrics":
            with self._lock:
                return 200, CONTENT_TYPE, exposition(self._collector.series())
        if parts.path not in ("/ready", "/progress"):
            return 404, _JSON, json.dumps({"message": "expected /metrics, /ready or /progress"})
        with self._lock:
            models = self._collector.progress()
        if parts.path == "/progress":
            return 200, _JSON, json.dumps({"models": models})
        asked = parse_qs(parts.query).get("model", [])
        ready = is_ready(models, asked)
        states: dict[str, Any] = {
            name: {key: models[name][key] for key in ("state", "phase", "serving", "share", "estimate_seconds")}
            for name in (asked or models)
            if name in models
        }
        return (200 if ready else 503), _JSON, json.dumps({"ready": ready, "models": states})


class _Handler(BaseHTTPRequestHandler):
    server: ExporterServer
    server_version = "ts-handlers-exporter"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = MOST_SECONDS

    def do_GET(self) -> None:
        status, kind, text = self.server.answer(self.path)
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a scrape every few seconds would fill the log."""
