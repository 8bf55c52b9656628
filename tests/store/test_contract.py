"""The contract of a store: both stores keep it, and a start asks for nothing beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ts_handlers
from ts_handlers.store.base import Store
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.tiered.store import TieredStore

ROOT = Path(ts_handlers.__file__).parent
MEMBERS = {name for name in vars(Store) if not name.startswith("_")}


@pytest.mark.parametrize("kind", [LocalStore, TieredStore])
def test_a_store_has_every_method_of_the_contract(kind: type) -> None:
    methods = {name for name in MEMBERS if callable(getattr(Store, name))}
    assert {name for name in methods if callable(getattr(kind, name, None))} == methods


def test_a_local_store_keeps_its_state_in_its_root(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    assert (store.name, store.state_directory) == (str(tmp_path / "store"), tmp_path / "store")
    assert store.shared_directory == tmp_path / "store" / "shared"
    assert not store.shared_directory.exists()


@pytest.mark.parametrize("room", ["startup", "model_process", "servers", "compiled_model.py", "start.py"])
def test_who_serves_a_model_uses_the_contract_alone(room: str) -> None:
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    beyond = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value).rpartition(".")[2] in ("store", "_store")
        and node.attr not in MEMBERS
        and ast.unparse(node.value) not in ("settings.store", "space.store")
    ]
    assert beyond == []
