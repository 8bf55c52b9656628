"""The contract of checks: `Question` in, `Finding` out; and `probe`, which tries in a child process what may crash."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from ts_handlers.errors import SettingsError, one_line
from ts_handlers.settings import Settings, parse_settings

Status = Literal["ok", "warn", "fail"]
PROBE_SECONDS = 180.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes
    ----------
    check: what was looked at.
    status: ``ok``, ``warn`` (works, with a restriction) or ``fail`` (will not work).
    found: what is there.
    remedy: what to do; empty when there is nothing to do.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The same as JSON-compatible data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Question:
    """What `ts_handlers.doctor.diagnose` was asked."""

    root: Path | None
    default_root: Path
    model_config: Path | None
    model: str | None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The parsed model-config.yaml; empty without one.

        Raises
        ------
        SettingsError
            It cannot be read.
        """
        if self.model_config is None:
            return {}
        try:
            import yaml
        except ImportError as error:
            raise SettingsError(f"{self.model_config} needs the package pyyaml: pip install pyyaml") from error
        try:
            config = yaml.safe_load(self.model_config.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SettingsError(f"{self.model_config} cannot be read: {error}") from error
        if not isinstance(config or {}, dict):
            raise SettingsError(f"{self.model_config}: expected a mapping at the top, found {type(config).__name__}")
        return config or {}

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings of that file; the defaults without one. Raises `SettingsError`."""
        return parse_settings(self.config)

    @property
    def store(self) -> Path:
        """The store's root."""
        if self.root is not None:
            return self.root
        try:
            named = self.settings.store
        except SettingsError:  # a finding of its own
            named = None
        return Path(named).expanduser().absolute() if named else self.default_root


def run(command: list[str], seconds: float = 60.0) -> tuple[int | None, str]:
    """Exit code (None: it cannot be started, or took too long) and standard output and error of a command."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return None, f"no end after {seconds:g} s"
    except OSError as error:
        return None, str(error)
    return result.returncode, result.stdout


_PROBE = """
import json, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
try:
    facts = {}
    exec(compile(sys.argv[1], "<probe>", "exec"), {"facts": facts})
    answer = {"facts": facts}
except BaseException as error:
    answer = {"error": f"{type(error).__name__}: {error}"}
out.write(json.dumps(answer) + chr(10))
out.flush()
os._exit(0)
"""


def probe(code: str, seconds: float = PROBE_SECONDS) -> tuple[dict[str, Any] | None, str]:
    """Run Python code that fills the dict `facts` in a child process.

    Imports of native libraries may raise anything, hang, or end the process.

    Returns
    -------
    The facts and an empty text, or None and what went wrong in one line.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE, code], capture_output=True, timeout=seconds, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer after {seconds:g} s"
    try:
        answer = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        code_text = f"exit code {result.returncode}"
        if result.returncode < 0:
            code_text = signal.Signals(-result.returncode).name
        last = (result.stderr.strip().splitlines() or [""])[-1]
        return None, f"the process died ({code_text}) {last}".strip()
    if "error" in answer:
        return None, one_line(str(answer["error"]), 300)
    return answer["facts"], ""
