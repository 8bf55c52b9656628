"""The real builder of TensorRT for RTX and Torch-TensorRT's real converters, without a GPU: plans are built, never run.

No figure and no numeric claim comes from here; plans are executed in tests/gpu.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.subprocesses import run_python

pytestmark = pytest.mark.compile

PRELUDE = """
import sys, json
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import without_gpu
import torch
from ts_handlers.backends import tensorrt_build as build
from ts_handlers.errors import BuildError, LoadError, SettingsError
from ts_handlers.settings.sections import TensorRTSettings
from ts_handlers.backends.tensorrt.torch_tensorrt_import import import_torch_tensorrt
assert import_torch_tensorrt().__name__ == "torch_tensorrt"

settings = build.compilation_settings(TensorRTSettings(), 0)

def ranges(low, best, high, rest=(4,), dtype=torch.float32):
    return build.InputRange("x", dtype, (low, *rest), (best, *rest), (high, *rest))

def export(function, rest=(4,), dtype=torch.float32):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            for name, module in getattr(function, "modules", {}).items():
                setattr(self, name, module.to(dtype))
        def forward(self, x):
            return function(self, x)
    batch = torch.export.Dim("batch", min=1, max=16)
    model = Model().eval()
    return torch.export.export(model, (torch.ones(3, *rest, dtype=dtype),), dynamic_shapes=({0: batch},), strict=False)

def plan(function, profiles=None, rest=(4,), dtype=torch.float32, settings=settings):
    whole = ranges(1, 4, 16, rest, dtype)
    program = export(function, rest, dtype)
    return build.Conversion(program, [whole], profiles or [[whole]], settings).network.build(None)

found = {}
"""


def in_child(folder: Path, code: str) -> Any:
    """What `code` left in `found`."""
    here = str(Path(__file__).parent)
    out = run_python(PRELUDE + code + "\nprint('FOUND ' + json.dumps(found))", here, PYTHONPATH=_path(folder))
    return json.loads(next(line for line in out.splitlines() if line.startswith("FOUND "))[6:])


def _path(folder: Path) -> str:
    import os

    from tests.support.subprocesses import environment

    return os.pathsep.join([str(folder), environment()["PYTHONPATH"]])


def test_plans_are_built_and_options_are_checked(tensorrt_folder: Path) -> None:
    found = in_child(
        tensorrt_folder,
        """
def conv(self, x):
    return self.head(self.conv(x).relu().mean((2, 3)))
conv.modules = {"conv": torch.nn.Conv2d(3, 8, 3), "head": torch.nn.Linear(8, 4)}
image = (3, 8, 8)
one = plan(conv, rest=image)
two = plan(conv, [[ranges(8, 8, 8, image)], [ranges(1, 4, 16, image)]], rest=image)
found["converted"] = [one.converted, one.total]
found["tensors"] = [one.inputs, one.outputs]
found["bytes"] = [len(one.data), len(two.data)]
softmax = plan(lambda self, x: torch.ops.aten._safe_softmax(x, -1))
found["softmax"] = [softmax.converted, softmax.total]
scores = torch.randn(3, 5)
scores[1] = scores[2, 3] = float("-inf")
found["softmax values"] = torch.equal(build._safe_softmax(scores, -1), torch.ops.aten._safe_softmax(scores, -1))

program = export(conv, image, torch.float16)
whole = ranges(1, 4, 16, image, torch.float16)
network = build.Conversion(program, [whole], [[whole]], settings, float32_accumulation=True).network.definition
layers = [network.get_layer(i) for i in range(network.num_layers)]
found["products"] = [
    [layer.type.name] + [str(layer.get_input(i).dtype).split(".")[-1] for i in range(layer.num_inputs)]
    for layer in layers if layer.type.name in ("CONVOLUTION", "MATRIX_MULTIPLY")
]
found["constants"] = sorted({str(l.get_output(0).dtype).split(".")[-1] for l in layers if l.type.name == "CONSTANT"})
found["output"] = str(network.get_output(0).dtype).split(".")[-1]

def refusal(**options):
    try:
        build.compilation_settings(TensorRTSettings(options=options), 0)
    except SettingsError as error:
        return str(error)
found["unknown"] = refusal(use_fp32_acx=True)
found["governed"] = refusal(workspace_size=1)
found["accepted"] = build.compilation_settings(TensorRTSettings(options={"use_fp32_acc": True}), 0).use_fp32_acc
found["workspace"] = build.compilation_settings(TensorRTSettings(workspace_mb=3), 0).workspace_size
found["tf32"] = build.compilation_settings(TensorRTSettings(tf32=False), 0).disable_tf32
""",
    )
    assert found["converted"][0] == found["converted"][1] > 0
    assert found["tensors"] == [["x"], ["output0"]]
    assert 0 < found["bytes"][0] < found["bytes"][1]  # a profile adds to the plan
    assert found["softmax"][0] == found["softmax"][1] > 0  # what attention without a mask may become
    assert {name for name, *_ in found["products"]} == {"CONVOLUTION", "MATRIX_MULTIPLY"}
    assert {dtype for _, *dtypes in found["products"] for dtype in dtypes} == {"FLOAT"}
    assert "HALF" not in found["constants"]  # TensorRT for RTX would take casts of 16-bit weights away again
    assert found["output"] == "HALF"
    assert found["softmax values"]
    assert "options.use_fp32_acx" in found["unknown"]
    assert "did you mean 'use_fp32_acc'" in found["unknown"]
    assert "governed by: workspace_mb" in found["governed"]
    assert found["accepted"] is True
    assert found["workspace"] == 3 << 20
    assert found["tf32"] is True


def test_graphs_that_share_operators_get_plans_of_their_own(tensorrt_folder: Path) -> None:
    """Torch-TensorRT's own engine cache takes each of these pairs for the same engine."""
    found = in_child(
        tensorrt_folder,
        """
import hashlib
pairs = {
    "softmax": (lambda self, x: torch.softmax(x, 0), lambda self, x: torch.softmax(x, 1)),
    "add": (lambda self, x: x + 1, lambda self, x: x + 2),
    "edges": (lambda self, x: x - torch.relu(x), lambda self, x: torch.relu(x) - x),
}
for name, pair in pairs.items():
    found[name] = [hashlib.sha256(plan(function).data).hexdigest() for function in pair]
""",
    )
    assert len(found) == 3
    for name, (left, right) in found.items():
        assert left != right, name


def test_what_does_not_convert_is_said_with_the_fraction(tensorrt_folder: Path) -> None:
    found = in_child(
        tensorrt_folder,
        """
def partial(self, x):
    return self.b(torch.erfinv(torch.tanh(self.a(x)) * 0.9))
partial.modules = {"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 2)}
try:
    plan(partial)
except build.PartialConversionError as error:
    found["partial"] = [error.converted, error.total, str(error)]

try:
    plan(lambda self, x: torch.nonzero(x))
except Exception as error:
    found["data"] = type(error).__name__
""",
    )
    converted, total, message = found["partial"]
    assert 0 < converted < total
    assert "erfinv" in message
    assert "tensorrt.partial" in message
    assert "data" in found  # refused: its output's shape depends on the data


def test_what_a_model_returns_twice_or_as_it_came_is_one_output_of_the_plan(tensorrt_folder: Path) -> None:
    found = in_child(
        tensorrt_folder,
        """
from ts_handlers.backends.tensorrt.library import import_tensorrt

def both(self, x):
    y = torch.relu(x)
    return y, x + 1, y
def copies(self, x):
    y = torch.relu(x)
    return y, y.contiguous(), y.float(), y.view(-1, 2, 2)
def passed(self, x):
    return x, torch.relu(x), x.to(torch.float32)
def apart(self, x):
    i = x.argmax(1)  # int32 in TensorRT, which is then one tensor in two dtypes
    return i, i.to(torch.int32), i
def constant(self, x):
    return torch.ones(3), x, torch.relu(x)
def single(self, x):
    return torch.relu(x)

functions = {f.__name__: f for f in (both, copies, passed, apart, constant, single)}
for name, function in functions.items():
    whole = ranges(1, 4, 16)
    network = build.Conversion(export(function), [whole], [[whole]], settings).network
    definition = network.definition
    outputs = [definition.get_output(i) for i in range(definition.num_outputs)]
    made = network.build(None)
    found[name] = {
        "returns": made.returns,
        "named": [made.inputs, sorted(made.outputs)],
        "in the network": [[definition.get_input(0).name], sorted(output.name for output in outputs)],
        "dtypes": [str(output.dtype).split(".")[-1] for output in outputs],
        "bytes": len(made.data),
    }
try:
    plan(lambda self, x: (x, x))
except BuildError as error:
    found["nothing"] = str(error)
""",
    )
    assert "returns its inputs and computes nothing" in found.pop("nothing")
    returns = {name: [f"{kind}{number}" for kind, number in facts["returns"]] for name, facts in found.items()}
    assert returns == {
        "both": ["output0", "output1", "output0"],
        "copies": ["output0", "output0", "output0", "output1"],
        "passed": ["input0", "output0", "input0"],
        "apart": ["output0", "output1", "output0"],
        "constant": ["output0", "input0", "output1"],
        "single": ["output0"],
    }
    for facts in found.values():
        assert facts["named"] == facts["in the network"]
        assert facts["bytes"] > 1000
    assert found["apart"]["dtypes"] == ["INT64", "INT32"]


def test_the_api_has_every_name_that_the_runner_uses(tensorrt_folder: Path) -> None:
    found = in_child(
        tensorrt_folder,
        """
from ts_handlers.backends.tensorrt.library import choose_flavour, import_tensorrt, installed_flavours, version
trt = import_tensorrt("tensorrt_rtx")
found["flavours"] = [installed_flavours(), choose_flavour("auto"), version("tensorrt_rtx")]
names = {
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": ["create_execution_context", "create_runtime_config", "num_io_tensors", "num_optimization_profiles",
        "get_tensor_name", "get_tensor_dtype", "get_tensor_shape", "get_tensor_profile_shape",
        "get_device_memory_size_for_profile_v2"],
    "IExecutionContext": ["set_input_shape", "get_tensor_shape", "set_tensor_address", "set_device_memory",
        "set_optimization_profile_async", "execute_async_v3"],
    "IRuntimeConfig": ["create_runtime_cache", "set_runtime_cache", "set_execution_context_allocation_strategy"],
    "IRuntimeCache": ["serialize", "deserialize"],
    "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    "Refitter": ["set_named_weights", "get_missing_weights", "refit_cuda_engine"],
    "BuilderFlag": ["REFIT", "REFIT_INDIVIDUAL", "STRIP_PLAN"],
    "TensorLocation": ["HOST"],
    "INetworkDefinition": ["set_weights_name", "mark_weights_refittable", "add_quantize", "add_dequantize"],
    "IBuilderConfig": ["create_timing_cache", "set_timing_cache", "get_timing_cache", "add_optimization_profile"],
}
found["missing"] = [f"{kind}.{name}" for kind, members in names.items() for name in members
                    if not hasattr(getattr(trt, kind), name)]
from ts_handlers.backends import tensorrt_runtime
found["dtypes"] = [name for name in tensorrt_runtime._DTYPES if not hasattr(trt.DataType, name)]

from ts_handlers.backends.tensorrt.runtime import TensorRTEngine
good = plan(lambda self, x: x + 1).data
import tempfile
file = Path(tempfile.mkstemp()[1])
refused = []
for data in (b"", b"x" * 100, good[: len(good) // 2], good):  # without a GPU not even a good plan is accepted
    file.write_bytes(data)
    try:
        TensorRTEngine("tensorrt_rtx", file, name="n", inputs=["x"], outputs=["output0"], device=torch.device("cuda"))
    except LoadError as error:
        refused.append(str(error))
file.unlink()
found["refused"] = refused
try:
    choose_flavour("tensorrt")
except LoadError as error:
    found["absent"] = str(error)
""",
    )
    assert found["flavours"] == [["tensorrt_rtx"], "tensorrt_rtx", "tensorrt_rtx-1.4.0.76"]
    assert found["missing"] == []
    assert found["dtypes"] == []
    assert len(found["refused"]) == 4
    assert all("does not accept the plan 'n'" in message for message in found["refused"])
    assert "ts-handlers[tensorrt]" in found["absent"]


def test_the_timing_cache_is_kept_by_one_build_at_a_time(tensorrt_folder: Path, tmp_path: Path) -> None:
    """TensorRT for RTX has the API and measures nothing; the file and its lock are what is checked here."""
    found = in_child(
        tensorrt_folder,
        f"""
import threading
from pathlib import Path
from filelock import FileLock, Timeout
from ts_handlers.backends.tensorrt.library import import_tensorrt, trt_logger

trt = import_tensorrt("tensorrt_rtx")
builder = trt.Builder(trt_logger("tensorrt_rtx"))

class Config:  # as the flavour that measures: by the module of its class
    def __init__(self):
        self.config, self.given = builder.create_builder_config(), []
    def create_timing_cache(self, data):
        self.given.append(len(data))
        return self.config.create_timing_cache(data)
    def __getattr__(self, name):
        return getattr(self.config, name)

path = Path({str(tmp_path / "timing" / "gpu.cache")!r})
sizes = []
for content in (None, None, b"of another version"):
    if content is not None:
        path.write_bytes(content)
    config = Config()
    with build._timing_cache(config, path):
        try:
            FileLock(f"{{path}}.lock").acquire(timeout=0)
            found["locked"] = False
        except Timeout:
            found["locked"] = True
    sizes.append([config.given, path.stat().st_size])
found["sizes"] = sizes
try:
    with build._timing_cache(Config(), path):
        raise BuildError("no plan")
except BuildError:
    pass
FileLock(f"{{path}}.lock").acquire(timeout=0)  # given back
found["files"] = sorted(each.name for each in path.parent.iterdir())
rtx = Path({str(tmp_path / "rtx" / "gpu.cache")!r})
with build._timing_cache(builder.create_builder_config(), rtx):
    pass
found["rtx"] = rtx.parent.exists()
""",
    )
    (first, size), (second, again), (foreign, replaced) = found["sizes"]
    assert first == [0]
    assert second == [size]  # what the first build left
    assert foreign[0] == len("of another version")
    assert size == again == replaced > len("of another version")
    assert found["locked"] is True
    assert found["files"] == ["gpu.cache", "gpu.cache.lock"]
    assert found["rtx"] is False
