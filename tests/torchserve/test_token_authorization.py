"""TorchServe's token authorization stays on where the configuration leaves it on."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.torchserve_archives import ROWS
from tests.support.torchserve_records import ServerFactory
from ts_handlers.testing.server import read_properties

CONFIG = Path(__file__).parents[2] / "config.properties"


def test_requests_need_the_right_token(tiny: str, warm_store: Path, make_server: ServerFactory) -> None:
    with make_server([tiny], warm_store, config=CONFIG, token_auth=True) as server:
        server.wait_ready(tiny)
        assert server.predict(tiny, ROWS).status == 200
        # TorchServe 0.12 answers 400 with InvalidKeyException where HTTP has 401.
        for token in ("", "Bearer wrong", f"Bearer {server.token('management')}"):
            refused = server.predict(tiny, ROWS, headers={"Authorization": token})
            assert refused.status in (400, 401), token
            assert refused.json()["type"] == "InvalidKeyException"
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{server.url('management')}/models", timeout=30)
        assert refusal.value.code in (400, 401)
        refusal.value.close()


def test_configuration_is_safe() -> None:
    properties = read_properties(CONFIG)
    for name in ("inference_address", "management_address", "metrics_address"):
        assert properties[name].startswith("http://127.0.0.1:")
    for name in ("disable_token_authorization", "enable_model_api"):
        assert properties.get(name, "false") == "false"
