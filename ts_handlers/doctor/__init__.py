"""Whether this machine can serve and build compiled models, each finding with its remedy.

    from ts_handlers.doctor import diagnose, report

    print(report(diagnose()))

A check is a function that takes `Question` and yields `Finding`; `CHECKS` lists them in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ts_handlers.doctor import machine, server, store
from ts_handlers.doctor.base import Finding as Finding
from ts_handlers.doctor.base import Question
from ts_handlers.doctor.base import Status as Status
from ts_handlers.settings.location import default_store_root

logger = logging.getLogger(__name__)

CHECKS: tuple[Callable[[Question], Iterator[Finding]], ...] = (
    server.check_java,
    server.check_torchserve,
    machine.check_compiler,
    machine.check_cpu,
    machine.check_gpu,
    machine.check_triton,
    machine.check_tensorrt,
    machine.check_libstdcxx,
    store.check_root,
    store.check_space,
    store.check_quarantine,
    store.check_time_limits,
    store.check_model_config,
)


def diagnose(
    root: str | Path | None = None, model_config: str | Path | None = None, model: str | None = None
) -> list[Finding]:
    """Run every check. Nothing is changed or made; what may crash is tried in a child process.

    Parameters
    ----------
    root:
        The store; None takes what `model_config` names, then the default one.
    model_config:
        Path of a model-config.yaml whose settings and time limits are checked too.
    model:
        The model's name in the store; None compares with the builds of every model.

    Returns
    -------
    The findings in the order of `CHECKS`; a check that fails unexpectedly is a finding of its own.
    """
    question = Question(
        root=None if root is None else Path(root).expanduser().absolute(),
        default_root=Path(default_store_root()).expanduser().absolute(),
        model_config=None if model_config is None else Path(model_config),
        model=model,
    )
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings.extend(check(question))
        except Exception as error:
            name = check.__name__.removeprefix("check_")
            logger.debug("details", exc_info=error)
            found = f"the check itself failed: {type(error).__name__}: {error}"
            findings.append(Finding(name, "warn", found, "please report this with the message"))
    return findings


def worst(findings: Iterable[Finding]) -> Status:
    """The gravest status among findings.

    Examples
    --------
    >>> worst([Finding("java", "ok", "17"), Finding("gpu", "warn", "old driver", "install a newer one")])
    'warn'
    """
    order: tuple[Status, ...] = ("ok", "warn", "fail")
    return max((finding.status for finding in findings), key=order.index, default="ok")


def exit_code(findings: Iterable[Finding]) -> int:
    """0 when all is well, 1 with warnings, 4 with failures: the exit codes of the command line."""
    return {"ok": 0, "warn": 1, "fail": 4}[worst(findings)]


def report(findings: Iterable[Finding]) -> dict[str, Any]:
    """The findings as JSON-compatible data: ``{"status": ..., "findings": [{check, status, found, remedy}]}``."""
    findings = list(findings)
    return {"status": worst(findings), "findings": [finding.as_dict() for finding in findings]}
