"""`ts-handlers serve`: TorchServe with its own arguments, and a fork server for its workers.

Both start at the same moment. TorchServe's launcher runs in this process, with ``sys.executable`` naming the file that
stands in the interpreter's place: TorchServe starts its workers with that. The Java process inherits the leash of the
fork server, which so ends with TorchServe, also if that goes on in the background.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ts_handlers.errors import SettingsError, WarmStartError
from ts_handlers.fork_server.start import ForkServer, facts_of, write_stand_in
from ts_handlers.servers.torchserve.workers import WORKER, environment_of_workers, preloaded_modules
from ts_handlers.system.patching import replaced_attribute

_DESCRIPTION = """Run TorchServe with a fork server for its workers. All other arguments are TorchServe's own
(torchserve --help)."""
_MODES = ("auto", "on", "off")
_MODE, _PRELOAD, _SOCKET = (f"TS_HANDLERS_FORK_SERVER{end}" for end in ("", "_PRELOAD", "_SOCKET"))
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def main(arguments: list[str]) -> int:
    """Run ``ts-handlers serve``; returns the exit code.

    Raises
    ------
    SettingsError
        An argument or a variable is wrong.
    WarmStartError
        ``--fork-server on``, and the fork server does not work.
    """
    options, theirs = parse(arguments)
    if {"--help", "-h"} & set(theirs):
        _parser().print_help()
    starts = not {"--stop", "--version", "-v", "--help", "-h"} & set(theirs)
    if options.fork_server == "off" or not starts:
        return _launch(theirs, sys.executable, None)
    resident = options.fork_server_socket
    if resident is not None and (problem := _problem_of_resident(resident)) is not None:
        _say(problem)
        if options.fork_server == "on":
            raise WarmStartError(f"--fork-server on: {problem}")
        resident = None
    if resident is not None:
        return _launch(theirs, str(write_stand_in(resident, WORKER)), None)
    return _launch_with_own(theirs, options)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and TorchServe's arguments.

    Examples
    --------
    >>> ours, theirs = parse(["--preload", "json,csv", "--start", "--ncs"])
    >>> ours.preload, ours.fork_server, theirs
    (['json', 'csv'], 'auto', ['--start', '--ncs'])
    """
    options, theirs = _parser().parse_known_args(arguments)
    if options.fork_server not in _MODES:
        raise SettingsError(f"{_MODE}: expected auto, on or off, found {options.fork_server!r}")
    lists = options.preload or [os.environ.get(_PRELOAD, "")]
    options.preload = [name.strip() for each in lists for name in each.split(",") if name.strip()]
    return options, theirs


def _parser() -> argparse.ArgumentParser:
    mode, socket = os.environ.get(_MODE) or "auto", os.environ.get(_SOCKET) or None
    parser = argparse.ArgumentParser("ts-handlers serve", description=_DESCRIPTION, allow_abbrev=False, add_help=False)
    parser.add_argument("--fork-server", choices=_MODES, default=mode, help=f"or {_MODE}; the default is auto")
    text = f"what the archives' handlers import; or {_PRELOAD}"
    parser.add_argument("--preload", metavar="MODULE,...", action="append", help=text)
    text = f"of a fork server that runs already (ts-handlers fork-server); or {_SOCKET}"
    parser.add_argument("--fork-server-socket", metavar="PATH", type=Path, default=socket, help=text)
    return parser


def _launch_with_own(theirs: list[str], options: argparse.Namespace) -> int:
    try:
        server = ForkServer(preloaded_modules(options.preload), environment_of_workers(os.environ, _properties(theirs)))
        stand_in = str(write_stand_in(server.socket, WORKER))
    except OSError as error:
        if options.fork_server == "on":
            raise WarmStartError(f"--fork-server on: the fork server does not start: {error}") from None
        _say(f"the fork server does not start, so workers start without it: {error}")
        return _launch(theirs, sys.executable, None)
    stays = False
    try:
        if options.fork_server == "on":
            _expect_all(server, options.preload)
        threading.Thread(target=_tell_its_end, args=(server,), daemon=True).start()
        code = _launch(theirs, stand_in, server.leash)
        stays = "--foreground" not in theirs and code == 0
        return code
    finally:
        if not stays:
            server.close()


def _expect_all(server: ForkServer, declared: list[str]) -> None:
    """Wait until the fork server has imported everything; raises `WarmStartError` if it could not."""
    if not server.wait_ready():
        raise WarmStartError("--fork-server on: the fork server has ended while it imported; its output says why")
    failed = facts_of(server.socket)["failed"]
    if missing := [f"{name}: {failed[name]}" for name in ("torch", *declared) if name in failed]:
        raise WarmStartError(f"--fork-server on: not all is preloaded: {'; '.join(missing)}")


def _problem_of_resident(path: Path) -> str | None:
    """Why the fork server at a socket is of no use here, or None."""
    try:
        facts = facts_of(path)
    except OSError as error:
        return f"no fork server answers at {path}: {error}"
    if (facts["python"], facts["version"]) != (sys.executable, sys.version):
        return f"the fork server at {path} runs {facts['python']}, expected {sys.executable}"
    return None


def _properties(theirs: list[str]) -> dict[str, str]:
    """TorchServe's configuration, as its launcher will find it."""
    from ts.arg_parser import ArgParser

    with contextlib.suppress(SystemExit):
        found = os.environ.get("TS_CONFIG_FILE") or ArgParser.ts_parser().parse_known_args(theirs)[0].ts_config
        return read_properties(found)
    return {}


def read_properties(path: Path | str | None) -> dict[str, str]:
    """TorchServe's configuration in a file; empty without one, or where it cannot be read."""
    from ts.model_server import load_properties

    with contextlib.suppress(OSError):
        return dict(load_properties(path)) if path else {}
    return {}


def _launch(theirs: list[str], python: str, leash: int | None) -> int:
    """Run TorchServe's launcher in this process; returns its exit code.

    Parameters
    ----------
    python:
        What the workers are started with.
    leash:
        A descriptor that the Java process inherits.
    """
    from ts import model_server

    started: list[subprocess.Popen[bytes]] = []
    ended_by: list[int] = []

    class Java(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            if leash is not None:
                keywords["pass_fds"] = [leash]
            super().__init__(*arguments, **keywords)
            started.append(self)
            if ended_by:  # by a signal that came before
                self.send_signal(signal.SIGTERM)

    def pass_on(number: int, _: Any) -> None:
        ended_by.append(number)
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    class Subprocess:
        Popen = Java

    with (
        _handling(pass_on),
        replaced_attribute(sys, "argv", ["torchserve", *theirs]),
        replaced_attribute(sys, "executable", python),
        replaced_attribute(model_server, "subprocess", Subprocess),
    ):
        try:
            model_server.start()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    if not started and {"--start", "--foreground"} & set(theirs):
        return 1  # it has said why
    return 130 if signal.SIGINT in ended_by else 0


@contextlib.contextmanager
def _handling(handler: Any) -> Iterator[None]:
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _tell_its_end(server: ForkServer) -> None:
    status = server.process.wait()
    if status and not server.closed:
        from ts_handlers.system.child_process import how_it_ended

        _say(f"the fork server {how_it_ended(status)}; workers go on, and new ones start without it")


def _say(text: str) -> None:
    print(f"ts_handlers: {text}", file=sys.stderr, flush=True)
