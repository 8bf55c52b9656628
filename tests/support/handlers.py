"""Handlers on TorchServe's own context objects; a test module that imports this is skipped without TorchServe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context, RequestProcessor

from tests.support.models import LINEAR_SECTION, eager_model

ROWS = [[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 0.0, 2.0]]


class Metrics:
    """What TorchServe's metrics cache is asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add_time(self, name: str, *arguments: Any) -> None:
        self.names.append(name)

    def add_counter(self, name: str, *arguments: Any) -> None:
        self.names.append(name)


def make_context(archive: Path, store: Path, manifest: dict[str, str] | None = None, **config: Any) -> Context:
    """The context of a worker that has just loaded an archive."""
    names = {"modelName": "model", "modelFile": "model.py", "serializedFile": "model.pt"}
    names = names if manifest is None else {"modelName": "model", **manifest}
    section = {
        **LINEAR_SECTION,
        "store": str(store),
        "backends": ["aot_inductor", "eager"],
        **config.pop("section", {}),
    }
    section = {name: value for name, value in section.items() if value is not None}
    yaml = {"handler": {"ts_handlers": section}, **config}
    return Context("model", str(archive), {"model": names}, 1, None, "0.12", metrics=Metrics(), model_yaml_config=yaml)


def ask(handler: Any, context: Context, *bodies: Any, header: dict[str, str] | None = None) -> list[tuple[int, Any]]:
    """Send a batch; returns (status, answer) of each request."""
    context.request_processor = [RequestProcessor(header or {}) for _ in bodies]
    answers = handler.handle([{"body": body} for body in bodies], context)
    assert len(answers) == len(bodies)
    return [(context.get_response_status(index)[0] or 200, answer) for index, answer in enumerate(answers)]


def expected(archive: Path, rows: list[list[float]]) -> list[list[float]]:
    with torch.inference_mode():
        answer: list[list[float]] = eager_model(archive)(torch.tensor(rows)).tolist()
    return answer


def close(found: Any, wanted: Any) -> bool:
    return bool(torch.allclose(torch.tensor(found), torch.tensor(wanted), atol=1e-5))
