"""Two lines over a handler and no inputs: samples tell what its model takes, or the calls that clients make."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import LINEAR, write_archive
from tests.support.their_archives import OURS, pack_theirs
from tests.support.torchserve_archives import ArchiveFactory
from tests.support.torchserve_records import ServerFactory, published, starts
from tests.torchserve.test_their_handlers import LABELS, PRETRAINED
from ts_handlers.store.local.layout import OBSERVED
from ts_handlers.testing import TorchServe

CONFIG = """
minWorkers: 1
maxWorkers: 1
batchSize: 1
startupTimeout: 600
responseTimeout: 120
handler:
  ts_handlers:
    backends: [aot_inductor, eager]
    background: {nice: 0}
"""
SAMPLES = "    samples: [sample.json]\n"
OBSERVE = "    observe: {calls: 6, seconds: null}\n"
MARKER = 49
BODIES: list[list[int]] = [[MARKER] * length for length in (3, 5, 3, 7, 3, 4)]


def pack(store: Path, work: Path, name: str, theirs: str, section: str, **manifest: str) -> None:
    """Write an archive of the two lines over their handler."""
    pack_theirs(store, work, theirs, CONFIG + section, {name: OURS}, **manifest)


@pytest.fixture(scope="module")
def sampled(archives: ArchiveFactory, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_archive(tmp_path_factory.mktemp("sampled") / "sampled", LINEAR)
    (folder / "sample.json").write_text("[0.5, -1.0, 2.0, 0.0]")
    pack(archives.model_store, folder, "sampled", LABELS, SAMPLES, modelFile="model.py", serializedFile="model.pt")
    return "sampled"


@pytest.fixture(scope="module")
def observed(archives: ArchiveFactory, tmp_path_factory: pytest.TempPathFactory) -> str:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("observed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    pack(archives.model_store, folder, "observed", PRETRAINED, OBSERVE, serializedFile="model.safetensors")
    return "observed"


def test_samples_tell_it_and_a_restart_builds_nothing(sampled: str, tmp_path: Path, make_server: ServerFactory) -> None:
    store = tmp_path / "store"
    keys = []
    for result, builds in (("built", 1), ("hit", 0)):
        with make_server([sampled], store) as server:
            server.wait_ready(sampled)
            answer = server.predict(sampled, [0.5, -1.0, 2.0, 0.0])
            assert answer.status == 200, answer.text
            assert answer.text in ("one", "two", "three")
            facts = server.describe(sampled)
            assert (facts["backend"], facts["result"]) == ("aot_inductor", result), facts
            assert (facts["counters"]["build"], facts["counters"]["outside_eager"]) == (builds, 0)
            assert [start["result"] for start in starts(server, sampled)] == [result]
            keys.append(facts["key"])
    assert keys[0] == keys[1]
    assert len(published(store)) == 1


def swapped(server: TorchServe, model: str) -> dict[str, Any]:
    """What describe says once a build in the background is over."""
    while True:
        facts: dict[str, Any] = server.describe(model)
        state = facts.get("background", {}).get("state")  # TorchServe leaves out what is null
        if state in ("swapped", "failed") or facts["observed"]["state"] == "off":
            return facts
        time.sleep(0.1)


def test_calls_tell_it_and_the_next_start_is_warm(observed: str, tmp_path: Path, make_server: ServerFactory) -> None:
    store = tmp_path / "store"
    env = {"HF_HUB_OFFLINE": "1"}
    with make_server([observed], store, env=env) as server:
        server.wait_ready(observed)
        first = server.describe(observed)
        assert (first["backend"], first["result"]) == ("eager", "eager")
        answers = [server.predict(observed, body) for body in BODIES]
        assert {answer.status for answer in answers} == {200}, answers[0].text
        facts = swapped(server, observed)
        assert facts["background"]["state"] == "swapped", facts
        again = [server.predict(observed, body) for body in BODIES]
        after = server.describe(observed)
    assert [answer.json() for answer in again] == [pytest.approx(answer.json(), abs=1e-4) for answer in answers]
    assert (after["backend"], after["counters"]["build"], after["counters"]["swap"]) == ("aot_inductor", 1, 1)
    assert after["counters"]["outside_eager"] == 0
    assert len(published(store)) == 1
    _assert_holds_no_contents(store)
    with make_server([observed], store, env=env) as server:
        server.wait_ready(observed)
        assert [server.predict(observed, body).json() for body in BODIES] == [answer.json() for answer in again]
        longer = server.predict(observed, [MARKER] * 12)
        facts = server.describe(observed)
        assert [start["result"] for start in starts(server, observed)] == ["hit"]
    assert (facts["result"], facts["key"]) == ("hit", after["key"])
    assert (facts["counters"]["build"], facts["counters"]["background_build"]) == (0, 0)
    assert (longer.status, facts["counters"]["outside_eager"]) == (200, 1)
    assert facts["observed"]["calls"] == 1


def _assert_holds_no_contents(store: Path) -> None:
    """No file holds three ids of a request, which are all the same, one behind the other.

    Two would be found by chance: the head of a library names a size in its file and the same size in memory.
    """
    needle = torch.full((3,), MARKER, dtype=torch.int64).numpy().tobytes()
    files = [path for path in store.rglob("*") if path.is_file()]
    assert [path for path in files if needle in path.read_bytes()] == []
    texts = [path.read_text() for path in files if path.relative_to(store).parts[0] == OBSERVED]
    assert len(texts) == 2
    assert [text for text in texts if f"[{MARKER}" in text or f"{MARKER}," in text] == []
