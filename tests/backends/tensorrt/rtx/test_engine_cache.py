"""Our engine cache under the real Torch-TensorRT, without a GPU: real keys, real graphs, real plans, never run.

Two processes with different hash seeds do it all. `without_engines` says what is replaced.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import GRAPH_BREAK, write_archive
from tests.support.subprocesses import environment, run_python

pytestmark = pytest.mark.compile

RESULT = "self.second(hidden).softmax(-1)"
BREAKS = GRAPH_BREAK.replace(RESULT, f"torch.erfinv({RESULT} * 0.5)")
# The comparison fixes the batch size: no graph serves a range of sizes.
FIXED = """
import torch


class Model(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2 if x.shape[0] == 5 else torch.relu(x) * 3
"""
RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import without_gpu
import torch
from torch_tensorrt import Input
import without_engines
from torch_tensorrt.dynamo._engine_cache import BaseEngineCache
from tests.support.models import archive_source, eager_model, settings_of
from ts_handlers import start_model
from ts_handlers.backends.tensorrt import network as build
from ts_handlers.backends.torch_tensorrt.engine_cache import engine_key
from ts_handlers.settings.sections import TensorRTSettings

folder = Path(sys.argv[2])
found = {}
settings = build.compilation_settings(TensorRTSettings(), 0)

def graph(function, *modules, shape=(4, 4), largest=None):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for index, module in enumerate(modules):
                setattr(self, f"layer{index}", module)
        def forward(self, x):
            return function(x, *(getattr(self, f"layer{index}") for index in range(len(modules))))
    dynamic = None if largest is None else ({0: torch.export.Dim("batch", min=1, max=largest)},)
    program = torch.export.export(Model().eval(), (torch.ones(shape),), dynamic_shapes=dynamic, strict=False)
    return build.lower(build.decompose(program, settings).module(), settings)

def keys(module, shape=(4, 4), settings=settings, identity="entry"):
    inputs = [Input(shape=shape, dtype=torch.float32)]
    return [engine_key(identity, module, inputs, settings), BaseEngineCache.get_hash(module, inputs, settings)]

def linear(outputs, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(4, outputs)

def conv(stride):
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 4, 1, stride=stride)

call = lambda x, layer: layer(x)
image = (1, 4, 4, 4)
pairs = {
    "softmax": lambda: [graph(lambda x: torch.softmax(x, 0)), graph(lambda x: torch.softmax(x, 1))],
    "literal": lambda: [graph(lambda x: x + 1), graph(lambda x: x + 2)],
    "view": lambda: [graph(lambda x: x.view(2, 8)), graph(lambda x: x.view(8, 2))],
    "edges": lambda: [graph(lambda x: x - torch.relu(x)), graph(lambda x: torch.relu(x) - x)],
    "stride": lambda: [graph(call, conv(1), shape=image), graph(call, conv(2), shape=image)],
    "width": lambda: [graph(call, linear(8)), graph(call, linear(16))],
    "weights": lambda: [graph(call, linear(8)), graph(call, linear(8, seed=1))],
    "range": lambda: [graph(lambda x: x + 1, largest=16), graph(lambda x: x + 1, largest=32)],
}
found["pairs"] = {
    name: [keys(module, image if name == "stride" else (4, 4)) for module in [*make(), *make()]]
    for name, make in pairs.items()
}

def other_names(y, only):
    return only(y)

plus = graph(lambda x: x + 1)
found["isomorphic"] = [keys(graph(call, linear(8)))[0], keys(graph(other_names, linear(8)))[0]]
found["shape"] = [keys(plus)[0], keys(plus, (5, 4))[0]]
found["identity"] = [keys(plus)[0], keys(plus, identity="b")[0]]

def with_options(index=0, **options):
    return keys(plus, settings=build.compilation_settings(TensorRTSettings(options=options), index))[0]

ops = ["torch.ops.aten.relu.default", "torch.ops.aten.erf.default", "torch.ops.aten.tan.default"]
found["settings"] = [with_options(), with_options(use_fp32_acc=True), with_options(torch_executed_ops=ops)]
found["unordered"] = [with_options(torch_executed_ops=ops), with_options(torch_executed_ops=ops[::-1])]
found["device index"] = [with_options(), with_options(index=1)]

one = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
    "dimensions": {"batch": {"min": 1, "max": 12}},
    "warmup": [{"batch": 5}],
    "backends": ["torch_tensorrt"],
    "strict": True,
    "tensorrt": {"options": {"min_block_size": 1}},
}
two = {**one, "inputs": [*one["inputs"], {"name": "factor", "dtype": "float32", "shape": [8]}]}

def start(name, section, *inputs):
    without_engines.plans.clear()
    model = start_model(archive_source(folder / name), settings_of(section, store=str(folder / "store")))
    facts = {key: model.describe()[key] for key in ("result", "key", "artifact", "missed", "counters")}
    ready = model.describe()["graphs_in_process"]
    facts["plans"] = len(without_engines.plans)
    eager = eager_model(folder / name)
    facts["wrong"] = []
    for batch in range(1, 13):
        tensors = {"x": torch.randn(batch, 4), **{key: torch.rand(8) for key in inputs}}
        with torch.inference_mode():
            if not torch.allclose(model(**tensors), eager(**tensors), atol=1e-5):
                facts["wrong"].append(batch)
    facts["graphs_after_ready"] = model.describe()["graphs_in_process"] - ready
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return facts

def reason(section):
    try:
        start("breaks", section)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found["breaks"] = start("breaks", two, "factor")
if sys.argv[3] == "first":
    found["tuned"] = start("tuned", two, "factor")
    found["fixed"] = start("fixed", one)
    found["reasons"] = {
        "small graphs": reason({**two, "tensorrt": {"options": {"min_block_size": 50}}}),
        "autocast": reason({**two, "tensorrt": {"precision": "autocast"}}),
        "ignored": reason({**two, "tensorrt": {"options": {"offload_module_to_cpu": True}}}),
        "unknown": reason({**two, "tensorrt": {"options": {"min_block_sise": 1}}}),
    }
print("FOUND " + json.dumps(found))
"""


def run(tensorrt_folder: Path, folder: Path, order: str, seed: str) -> dict[str, Any]:
    path = os.pathsep.join([str(tensorrt_folder), environment()["PYTHONPATH"]])
    here = Path(__file__).parent
    out = run_python(RUN, here, folder, order, fresh=True, PYTHONPATH=path, PYTHONHASHSEED=seed)
    found: dict[str, Any] = json.loads(next(line for line in out.splitlines() if line.startswith("FOUND "))[6:])
    return found


@pytest.fixture(scope="module")
def found(tensorrt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a first process, which builds, and a second one with another hash seed found."""
    folder = tmp_path_factory.mktemp("engines")
    write_archive(folder / "breaks", BREAKS)
    write_archive(folder / "tuned", BREAKS, seed=1)
    write_archive(folder / "fixed", FIXED)
    return [run(tensorrt_folder, folder, order, seed) for order, seed in (("first", "1"), ("second", "4711"))]


COLLIDING = ["softmax", "literal", "view", "edges", "stride", "width"]


@pytest.mark.parametrize("name", [*COLLIDING, "weights", "range"])
def test_graphs_that_differ_have_keys_of_their_own(found: list[dict[str, Any]], name: str) -> None:
    (left, _), (right, _), (left_again, _), (right_again, _) = found[0]["pairs"][name]
    assert left != right
    assert (left, right) == (left_again, right_again)  # exported again


@pytest.mark.parametrize("name", [*COLLIDING, "weights"])
def test_the_same_graphs_share_a_key_upstream(found: list[dict[str, Any]], name: str) -> None:
    (_, left), (_, right), *_ = found[0]["pairs"][name]
    assert left == right


def test_what_else_changes_a_key(found: list[dict[str, Any]]) -> None:
    for name in ("shape", "identity", "settings"):
        assert len(set(found[0][name])) == len(found[0][name]), name
    for name in ("isomorphic", "unordered", "device index"):
        assert len(set(found[0][name])) == 1, name


def test_keys_do_not_depend_on_the_hash_seed(found: list[dict[str, Any]]) -> None:
    first, second = ({name: part for name, part in run.items() if name not in STARTS} for run in found)
    assert first == second


STARTS = ("breaks", "tuned", "fixed", "reasons")


def test_a_second_start_finds_every_engine(found: list[dict[str, Any]]) -> None:
    first, second = (run["breaks"] for run in found)
    engines = first["artifact"]["engines_built"]
    assert first["result"] == "built"
    assert first["plans"] == first["artifact"]["engine_cache_miss"] == engines > 2
    assert second["result"] == "hit"
    assert second["key"] == first["key"]
    assert second["plans"] == second["artifact"]["engines_built"] == second["artifact"]["engine_cache_miss"] == 0
    assert second["artifact"]["engine_cache_hit"] == engines
    for facts in (first, second):
        assert facts["wrong"] == []
        assert facts["graphs_after_ready"] == 0
        assert facts["artifact"]["shapes"] == "ranges"
        assert facts["artifact"]["sizes_partly_eager"] == []
        assert facts["artifact"]["graph_breaks"] > 0


def test_operators_left_in_torch_are_counted(found: list[dict[str, Any]]) -> None:
    in_tensorrt, total = found[0]["breaks"]["artifact"]["in_tensorrt"]
    graphs_with_erfinv = 3
    assert total - in_tensorrt == graphs_with_erfinv
    assert found[1]["breaks"]["artifact"]["in_tensorrt"] == [in_tensorrt, total]


def test_new_weights_get_engines_of_their_own(found: list[dict[str, Any]]) -> None:
    tuned = found[0]["tuned"]
    assert (tuned["result"], tuned["missed"]) == ("built", ["weights"])
    assert tuned["plans"] == found[0]["breaks"]["plans"]
    assert tuned["artifact"]["engine_cache_hit"] == 0
    assert tuned["wrong"] == []


def test_a_model_without_a_graph_for_a_range_gets_one_for_each_size(found: list[dict[str, Any]]) -> None:
    fixed = found[0]["fixed"]
    assert fixed["artifact"]["shapes"] == "static"
    assert fixed["artifact"]["engines_built"] == 2  # batch 1 and 5
    assert fixed["wrong"] == []  # the other sizes run eagerly
    assert fixed["graphs_after_ready"] == 0


def test_what_cannot_be_done_is_said(found: list[dict[str, Any]]) -> None:
    reasons = found[0]["reasons"]
    assert reasons["small graphs"].startswith("BuildError: no engine was built")
    assert "min_block_size" in reasons["small graphs"]
    assert "handler.ts_handlers.dtype" in reasons["autocast"]
    assert "offload_module_to_cpu" in reasons["ignored"]
    assert reasons["unknown"].startswith("SettingsError: handler.ts_handlers.tensorrt.options.min_block_sise")
    assert "pt2.compile.options.min_block_sise" in reasons["unknown"]
    assert "did you mean 'min_block_size'" in reasons["unknown"]
