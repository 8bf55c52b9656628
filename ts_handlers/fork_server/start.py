"""Starting a fork server, asking one that runs, and writing the file that takes an interpreter's place."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ts_handlers.fork_server import client
from ts_handlers.fork_server.server import Options, command_line
from ts_handlers.system.ownership import is_private_folder

LONGEST_SOCKET = 100
"""Bytes; the kernel takes 107."""
LONGEST_INTERPRETER = 120
"""Bytes of the first line of a script that every kernel reads, without the options."""
FACTS_SECONDS = 10.0


class ForkServer:
    """A fork server that ends when the last process ends that holds `leash`.

    Parameters
    ----------
    preload:
        Modules that it imports, in order.
    environment:
        The environment that its processes have.

    Attributes
    ----------
    socket:
        Where it listens, in a folder of its own.
    leash:
        A descriptor of this process; a process that inherits it keeps the server.
    closed:
        Whether `close` has been called.
    """

    def __init__(self, preload: list[str], environment: Mapping[str, str]) -> None:
        folder = _new_folder()
        self.socket = folder / "socket"
        end, self.leash = os.pipe()
        self.closed = False
        self._ready, ready = os.pipe()
        options = Options(str(self.socket), preload, leash=end, folder=str(folder), ready=ready)
        try:
            self.process = subprocess.Popen(
                command_line(options),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                pass_fds=[end, ready],
            )
        finally:
            os.close(end)
            os.close(ready)

    def wait_ready(self) -> bool:
        """Wait until it has imported everything; whether it has."""
        os.read(self._ready, 1)
        return self.process.poll() is None

    def close(self) -> None:
        """End it, and remove its folder."""
        self.closed = True
        os.close(self.leash)
        os.close(self._ready)
        self.process.terminate()
        self.process.wait()
        for path in (*self.socket.parent.glob("*"),):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.socket.parent.rmdir()


def _new_folder() -> Path:
    """A new folder of this user alone, with a path that is short enough for a socket."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), None, "/tmp"):
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="ts_handlers-fork-", dir=parent or None))
            if len(os.fsencode(folder / "socket")) <= LONGEST_SOCKET:
                return folder
            folder.rmdir()
    raise OSError("no folder could be made for the fork server's socket; set TMPDIR to one with a short path")


def facts_of(path: Path) -> dict[str, Any]:
    """What the fork server at a socket says of itself: ``pid``, ``python``, ``version``, ``modules``, ``failed``.

    Raises
    ------
    OSError
        None of this user answers there.
    """
    try:
        connection = client.connect(str(path))
    except client.Unavailable as error:
        raise ConnectionRefusedError(str(error)) from None
    with socket.socket(fileno=connection.detach()) as opened:
        opened.settimeout(FACTS_SECONDS)
        opened.sendall(b"".join([client.MAGIC, len(client.FACTS).to_bytes(4, sys.byteorder), client.FACTS]))
        data = b"".join(iter(lambda: _until_status(opened), b""))
    try:
        return dict(json.loads(data))
    except ValueError:
        raise ConnectionError(f"{path}: expected a fork server's facts, found {data[:64]!r}") from None


def _until_status(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    return data.partition(client.STATUS)[0]


def write_stand_in(path: Path, script: str) -> Path:
    """Write the executable file that stands in this interpreter's place, beside the socket; returns its path.

    Parameters
    ----------
    path:
        The fork server's socket.
    script:
        The end of the path of the script that the fork server runs.

    Raises
    ------
    OSError
        It cannot be written, or others could.
    """
    folder = path.parent
    if not is_private_folder(folder):
        raise PermissionError(f"{folder} must be a folder of this user that nobody else writes")
    here = str(Path(client.__file__).parent)
    code = f"import sys\nsys.path.insert(0, {here!r})\nimport client\ndel sys.path[0]\n"
    code += f"client.main({str(path)!r}, {sys.executable!r}, {script!r})\n"
    target = folder / "python"
    if len(os.fsencode(sys.executable)) <= LONGEST_INTERPRETER and not any(map(str.isspace, sys.executable)):
        text = f"#!{sys.executable} -IS\n{code}"
    else:  # the kernel would not read that line; a shell drops variables with names that it cannot have
        quoted = sys.executable.replace("'", "'\\''")
        text = f"#!/bin/sh\n'''exec' '{quoted}' -I -S \"$0\" \"$@\"\n' '''\n{code}"
    written = target.with_name(f".{target.name}-{os.getpid()}")
    written.write_text(text, "utf-8", "surrogateescape")
    written.chmod(0o700)
    written.replace(target)
    return target
