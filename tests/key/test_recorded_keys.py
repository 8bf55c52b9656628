"""Keys that were recorded: an entry that is in somebody's store today must be found by the next version.

`recorded_keys.json` holds the parts and the digest of each key, as commit 57742ee computed them with the constants of
`tests.support.recorded_keys` in the place of this machine. A key that changes makes every entry of its kind a miss.
When that is meant, or a file in examples/ has changed (then the part ``model`` changes, and no other), set
``TS_HANDLERS_RECORD_KEYS=1`` and run this file; the difference in the JSON file says what will miss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.recorded_keys import NAMES, VARIANTS, WEIGHTS, parsed_config, use_constants, write_archive_of
from ts_handlers import ArchiveSource
from ts_handlers.backends import get_backend
from ts_handlers.backends.base import Target
from ts_handlers.backends.tensorrt import library
from ts_handlers.key import fingerprint
from ts_handlers.key.parts import ENVIRONMENT, compute_key
from ts_handlers.settings import parse_settings

RECORD = Path(__file__).with_name("recorded_keys.json")


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fingerprint.toolchain.cache_clear()
    use_constants(monkeypatch, fingerprint, library, ENVIRONMENT)
    yield
    fingerprint.toolchain.cache_clear()


def keys_of(example: str, folder: Path) -> dict[str, Any]:
    config = write_archive_of(example, folder)
    found = {}
    for name, (backend, device, changes, pt2) in VARIANTS.items():
        settings = parse_settings(parsed_config(config, changes, pt2))
        target = Target(ArchiveSource(example, folder, "model.py", WEIGHTS), settings, torch.device(device))
        key = compute_key(get_backend(backend), target)
        found[name] = {"digest": key.digest, "parts": dict(key.parts)}
    return found


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("example", NAMES)
def test_keys_are_those_that_were_recorded(example: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    found = keys_of(example, tmp_path / example)
    known = json.loads(RECORD.read_text("utf-8"))
    if os.environ.get("TS_HANDLERS_RECORD_KEYS"):
        RECORD.write_text(json.dumps({**known, example: found}, indent=1) + "\n", "utf-8")
        pytest.skip("recorded")
    for name, recorded in known[example].items():
        assert found[name]["parts"] == recorded["parts"], name
    assert found == known[example]


def test_every_backend_and_variant_has_a_record() -> None:
    known = json.loads(RECORD.read_text("utf-8"))
    assert {example: set(keys) for example, keys in known.items()} == {name: set(VARIANTS) for name in NAMES}
    digests = [key["digest"] for keys in known.values() for key in keys.values()]
    assert len(set(digests)) == len(digests)
