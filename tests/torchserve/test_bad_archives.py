"""An archive that cannot be served says why in the log, and the other models keep being served."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.torchserve_archives import ROWS, ArchiveFactory
from tests.support.torchserve_records import FirstStart, ServerFactory, copy_store
from ts_handlers.testing import TorchServe, TorchServeError

TWO_CLASSES = "class Second(torch.nn.Module):\n    pass\n\n\nclass Tiny("
BROKEN = {
    "absent_weights": r"no weights file 'model\.pt'|model\.pt",
    "truncated_weights": r"model\.pt",
    "wrong_weights": r"model\.pt.*do not fit",
    "no_class": r"model\.py.*class",
    "two_classes": r"model\.py.*(Second|class)",
    "unknown_setting": r"handler\.ts_handlers\.bakends: unknown key",
}


@pytest.fixture(scope="module")
def server(
    archives: ArchiveFactory,
    first_start: FirstStart,
    tiny: str,
    make_server: ServerFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TorchServe]:
    archives.without_weights("absent_weights")
    archives.tiny("truncated_weights", truncate_weights=True)
    archives.tiny("wrong_weights", replace={"model.py": ("Linear(8, 3)", "Linear(8, 5)")})
    archives.tiny("no_class", replace={"model.py": ("class Tiny(torch.nn.Module)", "class Tiny")})
    archives.tiny("two_classes", replace={"model.py": ("class Tiny(", TWO_CLASSES)})
    archives.tiny("unknown_setting", replace={"model-config.yaml": ("backends:", "bakends:")})
    store = copy_store(first_start, tmp_path_factory.mktemp("broken") / "store")
    with make_server([tiny], store, model_api=True) as running:
        running.wait_ready(tiny)
        yield running


@pytest.mark.parametrize("name", BROKEN)
def test_fails_clearly_and_alone(server: TorchServe, tiny: str, name: str) -> None:
    pids = server.worker_pids(tiny)
    server.register(f"{name}.mar")
    with pytest.raises(TorchServeError, match=f"{name}: a worker failed while loading"):
        server.wait_ready(name)
    assert server.predict(tiny, ROWS).status == 200
    server.unregister(name)
    lines = [line for line in server.log().splitlines() if f"-{name}_1.0-stdout" in line]
    assert re.search(BROKEN[name], "\n".join(lines)), "\n".join(lines[-40:])
    assert server.predict(tiny, ROWS).status == 200
    assert server.worker_pids(tiny) == pids
