"""The import budget: what a worker does not need is not imported."""

from __future__ import annotations

import json

import pytest
from subprocesses import run_python

pytestmark = pytest.mark.processes

HEAVY = (
    "sympy",
    "torch._inductor",
    "torch._dynamo",
    "transformers",
    "fsspec",
    "obstore",
    "s3fs",
    "redis",
    "cryptography",
    "rich",
    "typer",
    "torch_tensorrt",
)


def imported(code: str) -> set[str]:
    return set(json.loads(run_python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")))


def test_the_package_alone_imports_neither_torch_nor_torchserve() -> None:
    modules = imported("import ts_handlers")
    assert not modules & {"torch", "ts", "msgspec", "filelock"}


def test_everything_but_the_handler_works_without_torchserve() -> None:
    code = "import sys; sys.modules['ts'] = None\nfrom ts_handlers import start_model, ArchiveSource, parse_settings"
    assert not imported(code) & set(HEAVY)


def test_the_handler_imports_no_compiler() -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    assert not imported("from ts_handlers import CompiledHandler") & set(HEAVY)


def test_unknown_name_is_an_attribute_error() -> None:
    import ts_handlers

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ts_handlers.nothing
    assert all(hasattr(ts_handlers, name) for name in ("InputError", "Settings", "start_model"))
