"""The ahead-of-time backend on a model with everything that has gone wrong somewhere.

One artifact is built for the whole session; most tests use copies of its store and build nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.import_budget import beyond_budget
from tests.support.models import archive_source, eager_model, save_weights, settings_of, write_archive
from tests.support.subprocesses import finish, run_python, start_python
from ts_handlers import CompiledModel, ModuleSource, start_model
from ts_handlers.errors import BuildError, InputError, MissError
from ts_handlers.model.archive_files import load_model_class
from ts_handlers.model.structure import flatten

pytestmark = pytest.mark.compile
pytest.importorskip("transformers", reason="transformers is not installed")

# Two inputs, small weights of every kind that a compiler likes to fold into its code (a scalar, a bias of two elements,
# zeros, ones), tied weights, buffers of both kinds, and a nested output of a class of transformers.
CODE = """
import torch
from transformers.modeling_outputs import BaseModelOutput


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(30, 8)
        self.mixer = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 2)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.shift = torch.nn.Parameter(torch.zeros(8))
        self.gain = torch.nn.Parameter(torch.ones(8))
        self.tied = torch.nn.Linear(8, 30, bias=False)
        self.tied.weight = self.words.weight
        self.register_buffer("offset", torch.full((8,), 0.25))
        self.register_buffer("positions", torch.linspace(0, 1, 64).unsqueeze(1), persistent=False)

    def forward(self, ids, mask):
        x = self.words(ids) * self.scale + self.positions[: ids.shape[1]] + self.offset
        hidden = torch.tanh(self.mixer(x)) * self.gain + self.shift
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=({"logits": self.head(pooled), "labels": ["a", None, 2]}, self.tied(pooled)),
        )
"""
SECTION: dict[str, Any] = {
    "inputs": [
        {"name": "ids", "dtype": "int64", "shape": ["batch", "length"], "values": [0, 30]},
        {"name": "mask", "dtype": "int64", "shape": ["batch", "length"], "values": [0, 2]},
    ],
    "dimensions": {"batch": {"min": 1, "max": 8}, "length": {"min": 1, "max": 32}},
    "backends": ["aot_inductor"],
    "strict": True,
}
SMALL = ("scale", "head.bias", "shift", "gain", "offset", "words.weight", "mixer.weight")


@dataclasses.dataclass(frozen=True)
class Built:
    """The artifact of the session."""

    archive: Path
    store: Path
    facts: dict[str, Any]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build once, in a process of its own, as a first worker does."""
    archive = write_archive(tmp_path_factory.mktemp("aot") / "archive", CODE)
    store = tmp_path_factory.mktemp("aot-store")
    facts = json.loads(run_python(START, archive, store, json.dumps(SECTION)).splitlines()[-1])
    return Built(archive, store, facts)


START = """
    import json, sys
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model
    from ts_handlers.model.structure import flatten
    before = set(sys.modules)
    settings = settings_of(json.loads(sys.argv[3]), store=sys.argv[2])
    model = start_model(archive_source(sys.argv[1]), settings)
    facts = model.describe()
    import torch
    ids, mask = torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.int64)
    answer = [tensor.tolist() for tensor in flatten(model(ids, mask=mask))[0]]
    print(json.dumps({**facts, "answer": answer, "modules": sorted(set(sys.modules) - before)}))
"""
IDS, MASK = torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.int64)


@pytest.fixture
def archive(built: Built, tmp_path: Path) -> Path:
    """A copy of the session's archive, to change."""
    return Path(shutil.copytree(built.archive, tmp_path / "archive"))


@pytest.fixture
def store(built: Built, tmp_path: Path) -> Path:
    """A copy of the session's store, to change."""
    return Path(shutil.copytree(built.store, tmp_path / "store"))


def start(archive: Path, store: Path, **changes: Any) -> CompiledModel:
    """Start where nothing may be built, unless changes say so."""
    return start_model(archive_source(archive), settings_of(SECTION, store=str(store), on_miss="fail", **changes))


def check(model: Callable[..., Any], archive: Path, *inputs: torch.Tensor) -> None:
    ids, mask = inputs or (IDS, MASK)
    with torch.inference_mode():
        expected = eager_model(archive)(ids, mask)
    compare(flatten(model(ids, mask))[0], flatten(expected)[0])


def compare(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def answers(facts: dict[str, Any]) -> list[torch.Tensor]:
    return [torch.tensor(item) for item in facts["answer"]]


def test_first_start_builds_one_artifact_for_all_sizes(built: Built) -> None:
    assert built.facts["result"] == "built"
    assert built.facts["counters"]["build"] == 1
    assert built.facts["artifact"]["step"] == "dynamic"
    assert built.facts["artifact"]["weights_from"] == "archive"
    assert len(list((built.store / "entries").rglob("*.so"))) == 1


def test_entry_holds_no_weights(built: Built) -> None:
    (manifest,) = (built.store / "entries").rglob("manifest.json")
    constants = json.loads(manifest.read_text())["artifact"]["constants"]
    extra = {spec["name"] for spec in constants.values() if spec["extra"]}
    assert extra == {"positions"}  # the buffer that is in no state dict
    assert {spec["name"] for spec in constants.values()} >= {*SMALL, "head.weight"} - {"words.weight"}


def test_hit_in_a_new_process_imports_no_compiler_and_no_model_library(built: Built, tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    facts = json.loads(run_python(START, built.archive, built.store, json.dumps(SECTION), **env).splitlines()[-1])
    assert facts["result"] == "hit"
    assert facts["counters"]["hit"] == 1
    assert sum(facts["counters"].values()) == 1
    assert facts["canary"]["source"] == "record"
    assert not beyond_budget(facts["modules"])
    assert not any(name.startswith("ts_handlers_model_") for name in facts["modules"])
    assert not list(tmp_path.rglob("*.so"))
    compare(answers(facts), answers(built.facts))


def test_output_is_used_as_the_eager_models(built: Built) -> None:
    model = start(built.archive, built.store)
    out = model(IDS, MASK)
    assert out.last_hidden_state is out[0] is out["last_hidden_state"]
    assert out.last_hidden_state.shape == (3, 4, 8)
    first, second = out.hidden_states
    assert list(first) == ["logits", "labels"]
    assert first["labels"] == ["a", None, 2]
    assert second.shape == (3, 30)


def test_inputs_by_position_and_by_name(built: Built) -> None:
    model = start(built.archive, built.store)
    expected = flatten(model(IDS, MASK))[0]
    for found in (model(IDS, mask=MASK), model(mask=MASK, ids=IDS), model(IDS.t().contiguous().t(), MASK)):
        compare(flatten(found)[0], expected)


def test_new_weights_are_used_without_a_build(archive: Path, store: Path, built: Built) -> None:
    for seed in (5, 6):
        torch.manual_seed(seed)
        state = {name: torch.randn_like(tensor) for name, tensor in eager_model(archive).state_dict().items()}
        state["tied.weight"] = state["words.weight"]
        save_weights(archive / "model.pt", state)
        model = start(archive, store)
        assert model.outcome.result == "hit"
        assert model.outcome.key == built.facts["key"]
        assert model.metrics.counters["build"] == 0
        check(model, archive)


@pytest.mark.parametrize("name", SMALL)
def test_no_weight_is_baked_into_the_code(name: str, archive: Path, store: Path) -> None:
    state = eager_model(archive).state_dict()
    state[name] = state[name] * 1.5 + 0.125
    if name == "words.weight":
        state["tied.weight"] = state[name]
    before = flatten(start(archive, store)(IDS, MASK))[0]
    save_weights(archive / "model.pt", state)
    model = start(archive, store)
    check(model, archive)
    after = flatten(model(IDS, MASK))[0]
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, after, strict=True))
    assert model.metrics.counters["build"] == 0


def test_weights_as_uniform_as_they_can_be_are_used(archive: Path, store: Path) -> None:
    state = {name: torch.zeros_like(tensor) for name, tensor in eager_model(archive).state_dict().items()}
    save_weights(archive / "model.pt", state)
    model = start(archive, store)
    check(model, archive)
    assert all(tensor.eq(0).all() for tensor in flatten(model(IDS, MASK))[0])


@pytest.mark.processes
def test_two_fine_tunes_side_by_side(built: Built, tmp_path: Path, store: Path) -> None:
    archives = []
    for index in (1, 2):
        directory = Path(shutil.copytree(built.archive, tmp_path / f"fine-tune-{index}"))
        state = eager_model(directory).state_dict()
        state["scale"] = torch.tensor(float(index))
        state["head.bias"] = torch.tensor([index, -index]).float()
        save_weights(directory / "model.pt", state)
        archives.append(directory)
    children = [start_python(START, directory, store, json.dumps(SECTION)) for directory in archives]
    results = [json.loads(finish(child).splitlines()[-1]) for child in children]
    for directory, facts in zip(archives, results, strict=True):
        assert facts["result"] == "hit"
        with torch.inference_mode():
            compare(answers(facts), flatten(eager_model(directory)(IDS, MASK))[0])
    assert len(list((store / "entries").rglob("manifest.json"))) == 1


def test_any_request_gets_the_right_answer_or_is_refused(built: Built) -> None:
    model = start(built.archive, built.store)
    eager = eager_model(built.archive)

    def compare_with_eager(ids: torch.Tensor, mask: torch.Tensor) -> None:
        answers: list[Any] = []
        for called in (eager, model):
            try:
                with torch.inference_mode():
                    answers.append(flatten(called(ids, mask))[0])
            except Exception as error:
                answers.append(error)
        if any(isinstance(answer, Exception) for answer in answers):
            assert all(isinstance(answer, Exception) for answer in answers), answers
        else:
            compare(answers[1], answers[0])

    sizes = st.tuples(st.integers(0, 10), st.integers(0, 36))
    dtypes = st.sampled_from([torch.int64, torch.int64, torch.int64, torch.int32, torch.float32, torch.bool])
    layouts = st.sampled_from(["plain", "transposed", "strided", "offset"])

    def make(shape: tuple[int, int], dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
        values = torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(seed))
        if layout == "transposed":
            values = values.t().contiguous().t()
        elif layout == "strided":
            values = values.repeat_interleave(2, dim=1)[:, ::2]
        elif layout == "offset":
            values = torch.cat([values.new_zeros(1), values.flatten()])[1:].reshape(shape)
        return values.to(dtype)

    @settings(max_examples=200, deadline=None)
    @given(sizes, sizes | st.none(), dtypes, dtypes, layouts, st.integers(0, 5))
    @example((1, 1), None, torch.int64, torch.int64, "plain", 0)
    @example((8, 32), None, torch.int64, torch.int64, "strided", 0)
    @example((1, 32), None, torch.int64, torch.int64, "transposed", 0)
    @example((8, 1), None, torch.int64, torch.int64, "offset", 0)
    def run(
        first: tuple[int, int],
        second: tuple[int, int] | None,
        dtype: torch.dtype,
        mask_dtype: torch.dtype,
        layout: str,
        seed: int,
    ) -> None:
        ids = make(first, dtype, layout, seed)
        mask = make(second or first, mask_dtype, layout, seed + 1).clamp(max=1) if mask_dtype != torch.bool else None
        if mask is None:
            mask = torch.ones(second or first, dtype=torch.bool)
        same = (second or first) == first
        if not ids.dtype == mask.dtype == torch.int64:  # another form of call, which is the eager module's
            compare_with_eager(ids, mask)
        elif same and 1 <= first[0] <= 8 and 1 <= first[1] <= 32:
            with torch.inference_mode():
                expected = flatten(eager(ids, mask))[0]
            compare(flatten(model(ids, mask))[0], expected)
        else:
            with pytest.raises(InputError):
                model(ids, mask)

    run()


def test_calls_from_several_threads(built: Built) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, eager = start(built.archive, built.store), eager_model(built.archive)

    def call(index: int) -> None:
        ids = torch.full((index % 8 + 1, index % 32 + 1), index % 30)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            compare(flatten(model(ids, mask))[0], flatten(eager(ids, mask))[0])

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(call, range(64)))) == 64


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not a library"])
def test_damaged_library_is_never_loaded(
    damage: str, built: Built, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library,) = (store / "entries").rglob("*.so")
    data = library.read_bytes()
    changed = {"truncated": data[:4096], "flipped": data[:-9] + b"x" + data[-8:], "not a library": b"x" * len(data)}
    library.write_bytes(changed[damage])
    monkeypatch.setattr("ts_handlers.backends.aot_inductor.load.open_library", lambda *a: pytest.fail("loaded"))
    with pytest.raises(MissError, match="missed: corrupt"):
        start(built.archive, store)
    assert len(list((store / "trash").iterdir())) == 1


def test_library_of_another_machine_that_was_sealed_falls_back(built: Built, store: Path) -> None:
    """A loader error of a sealed library: the entry is moved aside and, without a compiler, eager serves."""
    from ts_handlers.store.entry import MANIFEST, list_files, read_manifest, write_manifest

    (library,) = (store / "entries").rglob("*.so")
    library.write_bytes(b"\x7fELF" + bytes(1000))
    (path,) = (store / "entries").rglob(MANIFEST)
    manifest = read_manifest(path.parent)
    import msgspec

    write_manifest(path.parent, msgspec.structs.replace(manifest, files=list_files(path.parent), digest=""))
    changes = {"strict": False, "on_miss": "eager", "backends": ["aot_inductor", "eager"]}
    model = start_model(archive_source(built.archive), settings_of(SECTION, store=str(store), **changes))
    assert model.outcome.backend == "eager"
    assert model.metrics.counters["corrupt"] == 1
    assert len(list((store / "trash").iterdir())) == 1
    check(model, built.archive)


def test_miss_policies(built: Built, tmp_path: Path) -> None:
    with pytest.raises(MissError, match=r"on_miss is 'fail'; missed: everything"):
        start(built.archive, tmp_path / "empty")
    changes = {"on_miss": "eager", "strict": False}
    model = start_model(archive_source(built.archive), settings_of(SECTION, store=str(tmp_path), **changes))
    assert model.outcome.backend == "eager"
    check(model, built.archive)


def test_strict_refuses_an_artifact_that_the_weights_do_not_suit(archive: Path, store: Path) -> None:
    """Weights of NaN make eager and artifact differ from every tolerance, or agree: never a silent difference."""
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in eager_model(archive).state_dict().items()}
    save_weights(archive / "model.pt", state)
    model = start(archive, store)
    assert all(tensor.isnan().all() for tensor in flatten(model(IDS, MASK))[0])


COUNTING = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * 2 + self.calls
"""
BRANCHING = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.layer(x)
        return self.layer(-x)
"""
IN_PLACE = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        x += 1
        return self.layer(x)
"""
REMEMBERING = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(4), persistent=False)

    def forward(self, x):
        out = self.layer(x)
        self.last.copy_(x.sum(0))
        return out
"""
# In Python, and in no answer to an ordinary input.
COUNTING_IN_PYTHON = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.n = 0
        self.seen = {"rows": []}

    def forward(self, x):
        self.n += 1
        self.seen["rows"].append(1)
        return torch.where(x.abs() > 50, x + self.n + len(self.seen["rows"]), self.layer(x))
"""
COUNTING_SELDOM = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.where(x.abs() > 50, x + self.calls, self.layer(x))
"""
UNSUITED = {
    "state that shows in no answer yet": (REMEMBERING, "changes its own state"),
    "counter": (COUNTING, "changes its own state"),
    "counter in Python": (COUNTING_IN_PYTHON, "changes its own state while it runs: n, seen['rows']"),
    "branch on the data": (BRANCHING, "no way of exporting"),
}


@pytest.mark.parametrize("case", UNSUITED)
def test_unsuited_model_falls_to_the_next_backend_with_a_reason(case: str, tmp_path: Path) -> None:
    code, reason = UNSUITED[case]
    archive = write_archive(tmp_path / "archive", code)
    changes = {"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"]}
    model = start_model(archive_source(archive), settings_of(**changes))
    assert model.outcome.backend == "eager"
    (fallback,) = model.outcome.fallbacks
    assert fallback["backend"] == "aot_inductor"
    assert reason in fallback["reason"]
    assert not list((tmp_path / "store" / "entries").rglob("manifest.json"))
    x = torch.ones(2, 4)
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), eager_model(archive)(x.clone()))
    with pytest.raises(BuildError, match=re.escape(reason)):
        start_model(archive_source(archive), settings_of(**changes, strict=True))


class WithDicts(torch.nn.Module):
    """Keeps containers as the models of diffusers do, which torch.export replaces by equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self._internal_dict = {"width": 4, "names": ["a", ("b", None)]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_dimension_of_one_or_two_and_a_module_with_dicts(tmp_path: Path) -> None:
    module = WithDicts().eval()
    settings = settings_of(
        store=str(tmp_path / "store"),
        strict=True,
        backends=["aot_inductor"],
        dimensions={"batch": {"min": 1, "max": 2}},
    )
    for result in ("built", "hit"):
        model = start_model(ModuleSource("model", module), settings)
        assert (model.outcome.result, model.outcome.backend) == (result, "aot_inductor")
        for rows in (1, 2):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(model(x), module(x).detach())
        with pytest.raises(InputError, match=r"outside the declared range 1\.\.2"):
            model(torch.ones(3, 4))


@pytest.mark.parametrize(("backend", "changed"), [("aot_inductor", 0.0), ("inductor", 1.0)])
def test_model_that_changes_its_input_is_compiled(backend: str, changed: float, tmp_path: Path) -> None:
    """Whether the caller's tensor changes, as with eager, depends on the backend: docs/settings.md says so."""
    archive = write_archive(tmp_path / "archive", IN_PLACE)
    changes = {"store": str(tmp_path / "store"), "backends": [backend], "strict": True}
    for result in ("built", "hit"):
        model = start_model(archive_source(archive), settings_of(**changes))
        assert (model.outcome.backend, model.outcome.result) == (backend, result)
        x = torch.zeros(2, 4)
        with torch.inference_mode():
            expected = eager_model(archive)(torch.zeros(2, 4))
        torch.testing.assert_close(model(x), expected)
        assert torch.equal(x, torch.full((2, 4), changed))


@pytest.mark.parametrize("code", [COUNTING_IN_PYTHON, COUNTING_SELDOM])
@pytest.mark.parametrize("backends", [["aot_inductor", "eager"], ["inductor", "eager"]])
def test_checks_leave_no_trace_in_the_model_that_serves(code: str, backends: list[str], tmp_path: Path) -> None:
    """Each start answers its first call as a fresh model does, and its second one too."""
    archive = write_archive(tmp_path / "archive", code)
    large = torch.full((2, 4), 100.0)
    for _ in range(2):
        model = start_model(
            archive_source(archive),
            settings_of(store=str(tmp_path / "store"), backends=backends, warmup=[{"batch": 3}]),
        )
        fresh = eager_model(archive)
        for _ in range(2):
            with torch.inference_mode():
                torch.testing.assert_close(model(large), fresh(large))


def test_module_that_somebody_holds_is_left_as_it_was(tmp_path: Path) -> None:
    module = load_model_class(write_archive(tmp_path / "archive", COUNTING_IN_PYTHON) / "model.py")().eval()
    start_model(ModuleSource("held", module), settings_of(store=str(tmp_path / "store")))
    assert (module.n, module.seen) == (0, {"rows": []})
