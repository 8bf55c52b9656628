"""A TCP proxy that can be cut, swallow everything, or be slow."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time

_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) /")


class Proxy:
    """Listens on a port of its own and forwards to `target`.

    Attributes
    ----------
    mode: ``forward``; ``swallow`` (accepts and never answers); ``cut`` (closes every connection).
    bytes_per_second: of the answers; None does not limit them.
    connections: how many were accepted.
    requests: first lines of the HTTP requests that were forwarded.
    """

    def __init__(self, target: tuple[str, int] | None = None, mode: str = "forward") -> None:
        self.mode = mode
        self.bytes_per_second: int | None = None
        self.connections = 0
        self.requests: list[bytes] = []
        self._target = target
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._drop()

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        self.mode = "cut"
        self._drop()

    def _drop(self) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                self._open.append(client)
                if self.mode == "cut":
                    client.close()
                elif self.mode == "forward":
                    assert self._target is not None
                    server = socket.create_connection(self._target)
                    self._open.append(server)
                    threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                    threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answer: bool) -> None:
        with contextlib.suppress(OSError):
            while True:
                slow = answer and self.bytes_per_second
                data = source.recv(self.bytes_per_second // 10 if slow and self.bytes_per_second else 65536)
                if not data or self.mode == "cut":
                    break
                if self.mode == "swallow":
                    continue
                if not answer and _REQUEST.match(data):
                    self.requests.append(data.partition(b"\r")[0])
                if slow:
                    time.sleep(0.1)
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
