"""Which weights a plan may take: proven on real networks of the real converters, without a GPU.

The plans are built and not executed; tests/gpu/test_refit.py does that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backends.tensorrt.rtx.test_builder import in_child

pytestmark = pytest.mark.compile

MODELS = """
from torch import nn
from ts_handlers.backends.export import PREFIX, FlatModel
from ts_handlers.backends.tensorrt.library import import_tensorrt
from ts_handlers.backends.tensorrt.weights import compute
from ts_handlers.backends.tensorrt.refit.proof import model_state, prove, read_network
from ts_handlers.errors import RefitError
trt = import_tensorrt("tensorrt_rtx")

class Net(nn.Module):
    affine = True
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.plain = nn.BatchNorm2d(8, affine=self.affine)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("unused", torch.ones(3))
        self.register_buffer("fixed", torch.full((8,), 0.5), persistent=False)

    def forward(self, x):
        y = self.norm(self.plain(self.bn(self.conv(x)).relu()).mean((2, 3)))
        return self.second(self.first(y).relu() + self.fixed) * self.scale

class WithoutAffine(Net):  # Torch-TensorRT converts this in float32 only
    affine = False

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight
    def forward(self, x):
        return self.head(self.words(x))

def seeded(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = kind().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
    return model.to(dtype)

def conversion(model, x):
    batch = torch.export.Dim("batch", min=1, max=16)
    flat = FlatModel(model, ("x",)).eval()
    program = torch.export.export(flat, (x,), dynamic_shapes=(({0: batch},),), strict=False)
    whole = build.InputRange("x", x.dtype, (1, *x.shape[1:]), (4, *x.shape[1:]), (16, *x.shape[1:]))
    return build.Conversion(program, [whole], [[whole]], settings)

def proof(model, x, archive=None):
    found = conversion(model, x)
    state = model_state(found.program, model.state_dict() if archive is None else archive)
    probe = state.probe()
    probed = found.with_state({PREFIX + name: value for name, value in probe.items()})
    return found, state, prove(trt, found.network, probed, state, probe)

def reason(model, x, archive=None):
    try:
        proof(model, x, archive)
    except RefitError as error:
        return str(error)

def values(conversion):
    return read_network(trt, conversion.network).weights

image = torch.ones(3, 3, 8, 8)
"""


def child(folder: Path, code: str) -> Any:
    return in_child(folder, MODELS + code)


def test_formulas_give_the_weights_of_a_network_that_they_have_not_seen(tensorrt_folder: Path) -> None:
    """A third conversion, with other weights, is the judge: every byte that changes is what a formula gives."""
    found = child(
        tensorrt_folder,
        """
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    kind = WithoutAffine if dtype == torch.float32 else Net
    mine, other = seeded(kind, dtype), seeded(kind, dtype, seed=1)
    first, state, formulas = proof(mine, image.to(dtype))
    second = conversion(other, image.to(dtype))
    new = {name: value for name, value in other.state_dict().items()}
    pairs = list(zip(values(first), values(second), strict=True))
    changed = [right for left, right in pairs if not torch.equal(left.value, right.value)]
    made = [compute(formula, new) for formula in formulas]
    found[str(dtype)] = {
        "equal": all(torch.equal(a, b.value) for a, b in zip(made, changed, strict=True)),
        "weights": [len(changed), len(pairs)],
        "formulas": sorted({formula["formula"] for formula in formulas}),
        "moving": sorted(state.moving), "fixed": sorted(state.fixed),
        "covered": sorted({name for formula in formulas for name in formula["from"] if name}),
    }
    if dtype == torch.float32:
        plan = first.network.build(None)
        found["plan"] = len(plan.data)
        found["refittable"] = len(first.network.build(None, ["REFIT_INDIVIDUAL"]).data)
""",
    )
    assert found["plan"] > 1000  # marked weights do not hinder an ordinary plan
    assert found["refittable"] > found["plan"]  # the names of its weights
    for dtype in ("float32", "float16", "bfloat16"):
        facts = found[f"torch.{dtype}"]
        assert facts["equal"] is True
        assert facts["weights"][0] == 12 < facts["weights"][1]  # constants that follow from no weight are left alone
        assert facts["formulas"] == ["batch_norm_scale", "batch_norm_shift", "copy"]
        assert facts["covered"] == facts["moving"]
        assert len(facts["moving"]) == (14 if dtype == "float32" else 16)
        assert facts["fixed"] == []


def test_tied_weights_move_together(tensorrt_folder: Path) -> None:
    found = child(
        tensorrt_folder,
        """
_, state, formulas = proof(seeded(Tied), torch.ones(3, 5, dtype=torch.int64))
found["tied"] = state.tied
found["from"] = [formula["from"] for formula in formulas]
weights = seeded(Tied).state_dict()
words = torch.ones(3, 5, dtype=torch.int64)
found["one name"] = [reason(seeded(Tied), words, {name: weights[name]}) for name in weights]
found["untied"] = reason(seeded(Tied), words, {**weights, "words.weight": weights["words.weight"] + 1})
""",
    )
    assert found["tied"] == [["head.weight", "words.weight"]]
    assert found["from"]
    assert len({tuple(names) for names in found["from"]}) == 1
    assert None in found["one name"]  # an archive that has only the name which torch.export uses
    assert "these weights of the model are not seen in the plan" in next(filter(None, found["one name"]))
    assert "changes 'words.weight' after it has loaded it" in found["untied"]


def test_what_cannot_be_accounted_for_is_refused_with_the_reason(tensorrt_folder: Path) -> None:
    found = child(
        tensorrt_folder,
        """
class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.extra = nn.Parameter(torch.ones(4))
        self.register_buffer("index", torch.tensor([1, 0]))

def model(function):
    return seeded(type("Model", (Base,), {"forward": function}))

x = torch.ones(3, 4)
found["folded"] = reason(model(lambda self, x: self.layer(x) + self.extra.exp()), x)
found["decided"] = reason(model(lambda self, x: torch.where(self.extra > 0, self.layer(x), x)), x)
found["combined"] = reason(model(lambda self, x: self.layer(x) * (self.layer.bias * self.extra)), x)
plain = model(lambda self, x: self.layer(x) + self.extra)
found["plain"] = reason(plain, x)
archive = {name: value.clone() for name, value in plain.state_dict().items()}
archive["extra"] += 1
found["changed"] = reason(plain, x, archive)
halves = {name: value.double() if value.is_floating_point() else value for name, value in plain.state_dict().items()}
found["cast"] = reason(plain, x, halves)
fixed = model(lambda self, x: self.layer(x + self.extra)[:, self.index])
try:
    _, state, _ = proof(fixed, x)
    found["fixed"] = sorted(state.fixed)
except RefitError as error:
    found["fixed"] = str(error)
two = model(lambda self, x: self.layer(x) + self.extra)
with torch.no_grad():
    two.layer.bias.copy_(two.extra)  # equal today, and still told apart
_, _, formulas = proof(two, x)
found["told apart"] = sorted(name for formula in formulas for name in formula["from"])
""",
    )
    assert "cannot be computed from the model's weights" in found["folded"]
    assert "decides something by its weights" in found["decided"]
    assert "cannot be computed from the model's weights" in found["combined"]
    assert found["plain"] is None
    assert "changes 'extra' after it has loaded it" in found["changed"]
    assert found["cast"] is None
    assert found["told apart"] == ["extra", "layer.bias", "layer.weight"]
    assert found["fixed"] == ["index"]  # an integer that the plan holds; other weights must have the same


def test_a_function_of_a_weight_is_no_copy_of_it(tensorrt_folder: Path) -> None:
    """Each is the identity for the weights at hand and for the probe, and not for others."""
    found = child(
        tensorrt_folder,
        """
class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.extra = nn.Parameter(torch.ones(4))
        self.log_var = nn.Parameter(torch.ones(4))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))

def model(weight, name):
    forward = lambda self, x: self.layer(x) + weight(getattr(self, name))
    kind = type("Model", (Base,), {"forward": forward})
    made = seeded(kind)
    with torch.no_grad():
        made.scale.fill_(1.0)
    return made

functions = {
    "clamp": (lambda w: w.clamp(-10, 10), "extra"),
    "one-sided clamp": (lambda w: w.clamp(max=7), "extra"),
    "minimum": (lambda w: torch.minimum(w, torch.tensor(9.0)), "extra"),
    "relu": (lambda w: w.relu(), "scale"),
    "abs": (lambda w: w.abs(), "log_var"),
    "round": (lambda w: (w * 1024).round() / 1024, "scale"),
    "threshold": (lambda w: nn.functional.threshold(w, -8.0, 0.0), "extra"),
    "shrink": (lambda w: nn.functional.hardshrink(w, 1e-6), "extra"),
    "nan_to_num": (lambda w: w.nan_to_num(), "extra"),
    "hardtanh, transposed": (lambda w: nn.functional.hardtanh(w.view(2, 2).t(), -5, 5).reshape(4), "extra"),
    "rounded and cast back": (lambda w: w.to(torch.bfloat16).to(torch.float32), "scale"),
}
moves = {
    "as it is": (lambda w: w, "extra"),
    "view": (lambda w: w.view(2, 2).reshape(1, 4).squeeze(0).clone(), "extra"),
    "expand": (lambda w: w.expand(3, 4)[0], "extra"),
    "there and back": (lambda w: w.view(2, 2).t().t().flip(0).flip(0).reshape(4), "extra"),
    "split and joined": (lambda w: torch.cat(w.split(2)), "extra"),
    "widened and cast back": (lambda w: w.double().float(), "extra"),
}
x = torch.ones(3, 4)
for name, (function, weight) in {**functions, **moves}.items():
    made = model(function, weight)
    value = getattr(made, weight)
    assert torch.equal(function(value).flatten().sort().values, value.flatten().sort().values), name
    state = {n: v for n, v in made.state_dict().items()}
    found[name] = reason(made, x, state)
found["functions"], found["moves"] = list(functions), list(moves)
half = seeded(type("Half", (Base,), {"forward": lambda self, x: self.layer(x.half()).float() + self.extra.float()}))
found["cast once"] = reason(half.half(), x)
""",
    )
    reasons = {name: found[name] for name in found["functions"]}
    assert len(reasons) == 11
    for name, text in reasons.items():
        decided = name in ("threshold", "nan_to_num")  # which are made of a comparison
        assert ("decides something" if decided else "cannot be computed from the model's weights") in str(text), name
    assert "aten.clamp" in reasons["clamp"]
    assert {name: found[name] for name in [*found["moves"], "cast once"]} == dict.fromkeys(
        [*found["moves"], "cast once"]
    )


def test_scales_of_a_quantised_model_move(tensorrt_folder: Path) -> None:
    """Its dequantisation is computed from weights alone and nevertheless a layer: nothing of it is folded."""
    found = child(
        tensorrt_folder,
        """
from tests.support.quantized_models import quantized_code
names = {}
exec(quantized_code("int8", activations=False), names)
_, state, formulas = proof(names["Model"]().eval(), torch.randn(3, 64))
found["moving"], found["fixed"] = sorted(state.moving), sorted(state.fixed)
found["from"] = sorted(name for formula in formulas for name in formula["from"])
""",
    )
    assert found["from"] == found["moving"] == ["first.bias", "first.scale", "second.bias", "second.scale"]
    assert found["fixed"] == ["first.weight", "first.zero_points", "second.weight", "second.zero_points"]
