"""Plans that take new weights, on a real GPU: built once, refitted, compared with eager; and models that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.marks import TENSORRT
from tests.support.models import archive_source, eager_model, save_weights, settings_of, write_archive
from tests.support.subprocesses import run_python
from ts_handlers import CompiledModel, start_model
from ts_handlers.model.archive_files import load_model_class

pytestmark = TENSORRT

CODE = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 64, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(64)
        self.norm = torch.nn.LayerNorm(64)
        self.first = torch.nn.Linear(64, 64)
        self.second = torch.nn.Linear(64, 8)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = self.norm(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
        return {"logits": self.second(torch.relu(self.first(y))) * self.scale, "features": y}
"""
FOLDED = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 8)
        self.steepness = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        return {"logits": self.layer(x.flatten(1)) * torch.exp(self.steepness)}
"""
SECTION: dict[str, Any] = {
    "backends": ["tensorrt"],
    "strict": True,
    "inputs": [{"name": "x", "dtype": "float16", "shape": ["batch", 3, 8, 8]}],
    "dtype": "float16",
    "dimensions": {"batch": {"min": 1, "max": 16}},
    "warmup": [{"batch": 8}],
    "tensorrt": {"refit": True},
}


def archive(folder: Path, code: str, seed: int) -> Path:
    """The model with random weights, running statistics included."""
    write_archive(folder, code, seed=None)
    generator = torch.Generator().manual_seed(seed)
    state = load_model_class(folder / "model.py")().state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            spread = torch.rand(value.shape, generator=generator)
            state[name] = (spread - 0.5) * 0.5 if value.dim() > 1 else spread + 0.5
    save_weights(folder / "model.pt", state)
    return folder


def start(folder: Path, root: Path, **changes: Any) -> CompiledModel:
    return start_model(archive_source(folder), settings_of({**SECTION, **changes}, store=str(root)), "cuda:0")


def error_of(model: CompiledModel, folder: Path, batch: int) -> float:
    """Largest relative error of the answer against the eager model in float32."""
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch)).half().cuda()
    with torch.inference_mode():
        expected = eager_model(folder).cuda()(x.float())
        found = model(x)
    return max(float((found[k].float() - expected[k]).norm() / expected[k].norm()) for k in expected)


def refit_of(root: Path) -> dict[str, Any]:
    """What the only entry of a store says about its weights."""
    (manifest,) = (root / "entries").rglob("manifest.json")
    refit: dict[str, Any] = json.loads(manifest.read_text())["artifact"]["refit"]
    return refit


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("archives")
    return [archive(folder / str(seed), CODE, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, archives: list[Path]) -> Path:
    """A store that holds the plan of the first archive."""
    root = tmp_path_factory.mktemp("store")
    model = start(archives[0], root)
    facts = model.describe()["artifact"]
    assert (model.outcome.result, facts.get("refit_refused")) == ("built", None)
    assert facts["weights_from"] == "archive"
    assert error_of(model, archives[0], 8) < 5e-3
    print(f"\nrefittable with {'+'.join(refit_of(root)['flags'])}")
    return root


def test_new_weights_are_put_into_the_stored_plan(archives: list[Path], store: Path) -> None:
    models = [start(folder, store, on_miss="fail") for folder in archives]
    assert [model.outcome.result for model in models] == ["hit"] * 3
    for batch in (1, 7, 8, 16):
        for index, model in enumerate(models):
            assert error_of(model, archives[index], batch) < 5e-3
            assert error_of(model, archives[index - 1], batch) > 0.05  # the archives differ, and so do the answers


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_contexts_of_a_refitted_plan(archives: list[Path], store: Path, cuda_graphs: bool) -> None:
    contexts = {"count": 2, "scratch": "shared", "cuda_graphs": cuda_graphs}
    model = start(archives[1], store, on_miss="fail", contexts=contexts)
    for batch in (8, 3, 8):
        assert error_of(model, archives[1], batch) < 5e-3


def test_a_start_with_new_weights_imports_no_compiler(archives: list[Path], store: Path) -> None:
    """With a canary record: the first start with unseen weights runs the eager model."""
    section = {**SECTION, "store": str(store), "on_miss": "fail"}
    code = f"""
import json, sys
from pathlib import Path
from tests.support.models import archive_source, settings_of
from ts_handlers import start_model
start_model(archive_source(Path({str(archives[2])!r})), settings_of({section!r}), "cuda:0")
print("FOUND " + json.dumps(sorted({{"torch_tensorrt", "torch._inductor", "torch._dynamo"}} & set(sys.modules))))
"""
    start(archives[2], store, on_miss="fail")
    out = run_python(code)
    assert json.loads(next(line for line in out.splitlines() if line.startswith("FOUND "))[6:]) == []


def test_a_model_whose_weights_are_folded_gets_plans_of_its_own(tmp_path: Path) -> None:
    first, second = (archive(tmp_path / str(seed), FOLDED, seed) for seed in (0, 1))
    model = start(first, tmp_path / "s")
    assert "cannot be computed from the model's weights" in model.describe()["artifact"]["refit_refused"]
    assert error_of(model, first, 8) < 5e-3
    other = start(second, tmp_path / "s")
    assert other.outcome.result == "built"
    assert "cannot take other weights" in other.outcome.fallbacks[0]["reason"]
    for folder in (first, second):
        model = start(folder, tmp_path / "s", on_miss="fail")
        assert model.outcome.result == "hit"
        assert error_of(model, folder, 3) < 5e-3


def test_a_plan_that_lost_a_weight_on_its_way_is_not_served(archives: list[Path], store: Path, tmp_path: Path) -> None:
    """A description that lacks or mixes up weights: TensorRT or the canary refuses it, and it is built again."""
    import shutil

    import msgspec

    from ts_handlers.store.entry import read_manifest, write_manifest

    root = tmp_path / "s"
    shutil.copytree(store, root)
    shutil.rmtree(root / "canaries", ignore_errors=True)
    (manifest,) = (root / "entries").rglob("manifest.json")
    found = read_manifest(manifest.parent)
    weights = list(found.artifact["refit"]["weights"])  # type: ignore[index, call-overload]
    vectors = [w for w in weights if w["from"] in (["norm.weight"], ["norm.bias"])]
    assert len(vectors) == 2
    swapped = [{**w, "from": vectors[1 - vectors.index(w)]["from"]} if w in vectors else w for w in weights]
    refit = {**found.artifact["refit"], "weights": swapped}  # type: ignore[dict-item]
    write_manifest(manifest.parent, msgspec.structs.replace(found, artifact={**found.artifact, "refit": refit}))
    model = start(archives[1], root, strict=False)
    assert model.outcome.result == "built"
    assert "CanaryError" in model.outcome.fallbacks[0]["reason"]
    assert error_of(model, archives[1], 8) < 5e-3
