"""One graph for all batch sizes of a model with convolutions, whose memory format Inductor asks for with a guard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import write_archive
from tests.support.subprocesses import run_python
from ts_handlers.backends.inductor.one_graph import one_graph

pytestmark = pytest.mark.compile

CODE = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 4, 1),
        )

    def forward(self, image):
        return self.layers(image).mean((2, 3))
"""
SECTION: dict[str, Any] = {
    "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 12, 12]}],
    "dimensions": {"batch": {"min": 1, "max": 12}},
    "backends": ["inductor"],
    "warmup": [{"batch": 1}],
    "strict": True,
}
# argv[4] says whether the compiler has been imported before, as by a handler that imports transformers.
START = """
    import json, pathlib, sys
    import torch
    if sys.argv[4] == "compiler first":
        import torch._inductor.config
    from tests.support.models import archive_source, eager_model, settings_of
    from ts_handlers import start_model
    import ts_handlers.backends.inductor.backend as inductor
    from ts_handlers.metrics import compiled_graphs

    # A request that misses a guard fails here, instead of running eagerly.
    assert inductor.compiles_nothing
    inductor.compiles_nothing = lambda after_warmup=True: torch.compiler.set_stance(
        "fail_on_recompile" if after_warmup else "default"
    )
    model = start_model(archive_source(sys.argv[1]), settings_of(json.loads(sys.argv[3]), store=sys.argv[2]))
    facts = model.describe()
    eager = eager_model(pathlib.Path(sys.argv[1]))
    wrong = []
    with torch.inference_mode():
        for batch in range(1, 13):
            image = torch.randn(batch, 3, 12, 12)
            if not torch.allclose(model(image), eager(image), atol=1e-5):
                wrong.append(batch)
    print(json.dumps({**facts, "wrong": wrong, "graphs": compiled_graphs()}))
"""


def start(archive: Path, store: Path, host: Path, order: str) -> dict[str, Any]:
    host.mkdir()
    out = run_python(START, archive, store, json.dumps(SECTION), order, TMPDIR=str(host), HOME=str(host))
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


def test_one_graph_answers_every_batch_size_and_a_warm_start_traces_it_once(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", CODE)
    built = start(archive, tmp_path / "store", tmp_path / "first", "package first")
    assert (built["result"], built["graphs"], built["wrong"]) == ("built", 1, [])
    warm = start(archive, tmp_path / "store", tmp_path / "second", "compiler first")
    assert (warm["result"], warm["graphs"], warm["wrong"]) == ("hit", 1, [])
    assert (warm["artifact"]["fxgraph_cache_hit"], warm["artifact"]["fxgraph_cache_miss"]) == (1, 0)


@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (2, 3, 5, 5), (1, 4, 1, 1), (3, 1, 6, 6), (1, 1, 1, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_a_convolution_does_not_depend_on_the_batch_size(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    """What `one_graph` relies on: any batch size has the format of a batch of 2 with the same strides."""
    image = torch.randn(shape).to(memory_format=layout)
    weight = torch.randn(2, shape[1], 1, 1)
    settings: dict[str, Any] = {
        "bias": None,
        "bias_sizes": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "transposed": False,
        "output_padding": [0, 0],
        "groups": 1,
    }
    backend = torch._C._select_conv_backend(image, weight, **settings)
    two = image.new_empty_strided((2, *shape[1:]), image.stride())
    ask = torch._C._conv_determine_backend_memory_format
    assert ask(image, weight, backend) == ask(two, weight, backend)


def test_what_is_patched_is_restored() -> None:
    before = torch._C._conv_determine_backend_memory_format
    with one_graph(True):
        assert torch._C._conv_determine_backend_memory_format is not before
    assert torch._C._conv_determine_backend_memory_format is before
