"""The ahead-of-time backend on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import LINEAR_SECTION, archive_source, eager_model, settings_of, write_archive, write_weights

from ts_handlers import start_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_built_loaded_and_refilled_with_new_weights(tmp_path: Path) -> None:
    folder = write_archive(tmp_path / "archive")
    settings = settings_of({**LINEAR_SECTION, "contexts": {"count": 2}}, store=str(tmp_path / "s"), strict=True)
    results = []
    for seed in (0, 0, 5):
        write_weights(folder, seed)
        model = start_model(archive_source(folder), settings, "cuda:0")
        results.append(model.outcome.result)
        for batch in (1, 3, 8):
            x = torch.randn(batch, 4, device="cuda")
            with torch.inference_mode():
                torch.testing.assert_close(model(x), eager_model(folder).cuda()(x), rtol=1e-3, atol=1e-4)
    assert results == ["built", "hit", "hit"]
