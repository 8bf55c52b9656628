"""Steps of the ahead-of-time backend that few models need: fixed sizes, and weights that the model itself changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.support.models import LINEAR, archive_source, eager_model, settings_of, write_archive, write_weights
from tests.support.second_backend import SecondBackend
from tests.support.starts import fail_builds
from tests.support.subprocesses import run_python
from ts_handlers import CompiledModel, start_model
from ts_handlers.errors import BuildError, CanaryError, InputError, MissError
from ts_handlers.store.entry import MANIFEST, read_manifest, write_manifest
from ts_handlers.store.local.store import LocalStore

pytestmark = pytest.mark.compile

# A loop over the rows has one graph for each batch size.
LOOP = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        rows = self.layer(x)
        for row in range(int(x.shape[0])):
            rows = rows + row
        return rows * x.shape[0]
"""
LOADING = """
    def load_state_dict(self, state, *args, **kwargs):
        loaded = super().load_state_dict(state, *args, **kwargs)
        {change}
        return loaded

    def forward("""
DOUBLED = LINEAR.replace("\n    def forward(", LOADING.format(change="self.layer.weight.data.mul_(2.0)"))
CLAMPED = LINEAR.replace("\n    def forward(", LOADING.format(change="self.layer.weight.data.clamp_(-1.0, 1.0)"))


def start(archive: Path, store: Path, **changes: Any) -> CompiledModel:
    section = {"store": str(store), "backends": ["aot_inductor"], "strict": True, **changes}
    return start_model(archive_source(archive), settings_of(**section))


def check(model: CompiledModel, archive: Path, batch: int) -> None:
    """The answer is the eager model's."""
    x = torch.linspace(-2, 2, 4 * batch).reshape(batch, 4)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), eager_model(archive)(x), atol=1e-5, rtol=1e-4)


def counted(model: CompiledModel) -> Mapping[str, int]:
    return {name: count for name, count in model.metrics.counters.items() if count}


def artifact(store: Path) -> dict[str, Any]:
    """What the store's only entry says about itself."""
    (manifest,) = (store / "entries").rglob("manifest.json")
    description: dict[str, Any] = json.loads(manifest.read_text())["artifact"]
    return description


def test_model_that_fits_no_range_gets_one_variant_for_each_warmup_size(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", LOOP), tmp_path / "store"
    warmup = [{"batch": 2}, {"batch": 5}]
    built = start(archive, store, warmup=warmup)
    assert built.describe()["artifact"]["step"] == "static"
    assert [reason.partition(":")[0] for reason in artifact(store)["steps_failed"]] == ["dynamic", "dynamic+ones"]
    assert len(list((store / "entries").rglob("*.so"))) == 2

    write_weights(archive, seed=1)
    model = start(archive, store, warmup=warmup)
    assert counted(model) == {"hit": 1, "canary_recorded": 1}
    for batch in range(1, 9):  # those that are declared and not compiled are answered by the eager model
        check(model, archive, batch)
    with pytest.raises(InputError, match=r"outside the declared range 1\.\.8"):
        model(torch.ones(9, 4))
    assert (counted(model)["outside_eager"], counted(model)["refused"]) == (6, 1)
    facts = model.describe()["artifact"]
    assert facts["compiled"] == warmup
    assert facts["declared"] == {"batch": [1, 8]}

    eager = start(archive, store, warmup=warmup, outside="eager")
    for batch in (2, 3, 5, 9):
        check(eager, archive, batch)
    assert counted(eager) == {"hit": 1, "outside_eager": 2}


# Right for one of its sizes only, and nothing in it says so: the branch that the export took is all that it has.
BRANCHES = LINEAR.replace(
    "return self.layer(x)", "x = self.layer(x)\n        return x * 2 if x.shape[0] > 4 else x * 3"
)
WIDE = {"dimensions": {"batch": {"min": 1, "max": 16}}, "warmup": [{"batch": 8}]}


def test_one_static_artifact_answers_its_own_size_only(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", BRANCHES), tmp_path / "store"
    model = start(archive, store, **WIDE)
    for batch in (1, 4, 5, 8, 16):
        check(model, archive, batch)
    assert counted(model)["outside_eager"] == 4
    assert artifact(store)["dimensions"] == {"batch": [8, 8]}
    facts = model.describe()["artifact"]
    assert (facts["step"], facts["compiled"], facts["declared"]) == ("static", [{"batch": 8}], {"batch": [1, 16]})


def test_entry_that_claims_what_was_declared_is_read_by_its_variants(tmp_path: Path) -> None:
    """As versions before 1.0 have published it."""
    archive, store = write_archive(tmp_path / "archive", BRANCHES), tmp_path / "store"
    start(archive, store, **WIDE)
    (path,) = (store / "entries").rglob(MANIFEST)
    manifest = read_manifest(path.parent)
    claimed = {**manifest.artifact, "dimensions": {"batch": [1, 16]}}
    write_manifest(path.parent, msgspec.structs.replace(manifest, artifact=claimed, digest=""))
    model = start(archive, store, **WIDE)
    assert counted(model) == {"hit": 1}
    for batch in (1, 4, 5, 8, 16):
        check(model, archive, batch)
    assert counted(model)["outside_eager"] == 4


def test_backend_that_covers_every_size_is_preferred_to_static_sizes(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", BRANCHES), tmp_path / "store"
    changes = {**WIDE, "backends": ["aot_inductor", "inductor", "eager"], "strict": False}
    built = start(archive, store, **changes)
    assert built.outcome.backend == "inductor"
    for expected in ("compile", "fail"):
        model = start(archive, store, **changes, on_miss=expected)
        assert (model.outcome.backend, model.outcome.result) == ("inductor", "hit")
        assert (counted(model).get("build", 0), counted(model).get("build_failed", 0)) == (0, 0)
    for batch in (1, 4, 5, 8, 16):
        check(model, archive, batch)


def test_static_sizes_are_built_when_no_other_backend_works(
    tmp_path: Path, register: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, store = write_archive(tmp_path / "archive", BRANCHES), tmp_path / "store"
    other = SecondBackend()
    register("inductor", other)
    fail_builds(other, monkeypatch, BuildError("no graph"))
    changes = {**WIDE, "backends": ["aot_inductor", "inductor", "eager"], "strict": False}
    with pytest.raises(MissError, match="backend aot_inductor"):
        start(archive, store, **changes, on_miss="fail")
    model = start(archive, store, **changes)
    assert (model.outcome.backend, model.outcome.result) == ("aot_inductor", "built")
    assert [each["backend"] for each in model.outcome.fallbacks] == ["aot_inductor", "inductor"]
    assert counted(start(archive, store, **changes)) == {"hit": 1}
    for batch in (1, 8, 16):
        check(model, archive, batch)


def test_static_sizes_that_cannot_be_built_are_not_tried_at_each_start(
    tmp_path: Path, register: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, store = write_archive(tmp_path / "archive", BRANCHES), tmp_path / "store"
    other = SecondBackend()
    register("inductor", other)
    fail_builds(other, monkeypatch, BuildError("no graph"))
    monkeypatch.setattr("ts_handlers.backends.aot_inductor.build.compile_program", lambda *a, **k: 1 / 0)
    changes = {**WIDE, "backends": ["aot_inductor", "inductor", "eager"], "strict": False}
    model = start(archive, store, **changes)
    assert (model.outcome.backend, counted(model)["build_failed"]) == ("eager", 3)
    model = start(archive, store, **changes)
    assert (model.outcome.backend, counted(model)["build_skipped"]) == ("eager", 3)
    assert "build_failed" not in counted(model)


def test_model_without_dynamic_dimensions_has_one_static_variant(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", LOOP), tmp_path / "store"
    changes = {"inputs": [{"name": "x", "dtype": "float32", "shape": [3, 4]}], "dimensions": {}}
    assert start(archive, store, **changes).describe()["artifact"]["variants"] == ["static"]
    write_weights(archive, seed=1)
    model = start(archive, store, **changes)
    assert counted(model) == {"hit": 1, "canary_recorded": 1}
    check(model, archive, 3)
    for batch in (1, 4):
        with pytest.raises(InputError, match=r"expected size 3 in dimension 0"):
            model(torch.ones(batch, 4))


def test_weights_that_the_model_changes_are_taken_from_the_model(tmp_path: Path) -> None:
    """Each start builds the eager module for them, and never an artifact."""
    archive, store = write_archive(tmp_path / "archive", DOUBLED), tmp_path / "store"
    assert counted(start(archive, store))["build"] == 1
    assert artifact(store)["weights_from"] == "module"
    for seed in (1, 2):
        write_weights(archive, seed)
        for expected in ({"hit": 1, "canary_recorded": 1}, {"hit": 1}):
            model = start(archive, store)
            assert counted(model) == expected
            for batch in (1, 3, 8):
                check(model, archive, batch)


def test_weights_that_the_model_changes_only_sometimes_are_never_served_wrongly(tmp_path: Path) -> None:
    """The weights of the build were left as they were, so the artifact takes the archive's; those of later ones not."""
    archive, store = write_archive(tmp_path / "archive", CLAMPED), tmp_path / "store"
    start(archive, store)
    assert artifact(store)["weights_from"] == "archive"
    state = {name: tensor * 10 for name, tensor in eager_model(archive).state_dict().items()}
    torch.save(state, archive / "model.pt")
    with pytest.raises(CanaryError):
        start(archive, store)
    model = start(archive, store, backends=["aot_inductor", "eager"], strict=False)
    assert model.outcome.backend == "eager"
    assert counted(model) == {"quarantined": 1, "fallback": 1}
    check(model, archive, 3)


CONSTANTS = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.offset = torch.arange(3.0)

    def load_state_dict(self, state, *args, **kwargs):
        loaded = super().load_state_dict(state, *args, **kwargs)
        self.temperature = float(self.layer.bias.detach().abs().sum())
        return loaded

    def forward(self, x):
        return {"y": self.layer(x) + self.offset + torch.tensor([1.0, 2.0, 3.0]), "temperature": self.temperature}
"""


def test_tensors_in_the_code_and_numbers_in_the_output(tmp_path: Path) -> None:
    """The former belong to the artifact; of the latter, those of other weights are not served."""
    archive = write_archive(tmp_path / "archive", CONSTANTS)
    x = torch.randn(3, 4)
    found = []
    for seed in (0, 0, 5):
        write_weights(archive, seed)
        model = start_model(archive_source(archive), settings_of(store=str(tmp_path / "store")))
        with torch.inference_mode():
            answer, expected = model(x), eager_model(archive)(x)
        torch.testing.assert_close(answer["y"], expected["y"], rtol=1e-4, atol=1e-5)
        assert answer["temperature"] == expected["temperature"]
        found.append((model.outcome.backend, model.outcome.result))
    assert found[:2] == [("aot_inductor", "built"), ("aot_inductor", "hit")]
    assert "the model's attribute 'temperature'" in model.outcome.fallbacks[0]["reason"]


def test_no_instruction_set_is_tried_with_the_compiler(tmp_path: Path) -> None:
    """In a process of its own, since Inductor remembers what it has tried; extensions (AMX, VNNI) are still tried."""
    out = run_python(
        """
        import sys
        from pathlib import Path
        import torch
        from tests.support.models import archive_source, eager_model, settings_of, write_archive
        from torch._inductor import cpu_vec_isa
        from ts_handlers import start_model

        tried, check_build = [], cpu_vec_isa.VecISA.check_build

        def counted(self, code):
            tried.extend([self] if code == cpu_vec_isa.VecISA._avx_code else [])
            return check_build(self, code)

        cpu_vec_isa.VecISA.check_build = counted
        folder = write_archive(Path(sys.argv[1]) / "archive")
        settings = settings_of(store=sys.argv[1] + "/store", backends=["aot_inductor"], strict=True)
        model = start_model(archive_source(folder), settings)
        x = torch.linspace(-2, 2, 12).reshape(3, 4)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), eager_model(folder)(x), atol=1e-5, rtol=1e-4)
        print(model.outcome.result, len(tried))
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        cpu_vec_isa.pick_vec_isa()
        print(len(tried) > 0)  # what would have been counted
        """,
        tmp_path,
        TORCHINDUCTOR_VEC_ISA_OK=None,
    )
    assert out.split() == ["built", "0", "True"]


def test_nothing_is_taken_from_or_left_in_the_compilers_shared_folder(tmp_path: Path) -> None:
    """Torch keeps precompiled headers there, whoever owns it, and asks `openssl` for their digests."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    out = run_python(
        """
        import os, subprocess, sys
        from pathlib import Path
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
        from tests.support.models import archive_source, settings_of, write_archive
        from ts_handlers import start_model

        programs = []
        sys.addaudithook(lambda event, words: programs.append(str(words[0])) if event == "subprocess.Popen" else None)
        folder = write_archive(Path(sys.argv[1]) / "archive")
        settings = settings_of(store=sys.argv[1] + "/store", backends=["aot_inductor"], strict=True)
        model = start_model(archive_source(folder), settings)
        left = [file for _, _, files in os.walk(default_cache_dir()) for file in files]
        print(model.outcome.result, default_cache_dir().startswith(sys.argv[1]), len(left))
        print(any("g++" in program for program in programs), any("openssl" in program for program in programs))
        """,
        tmp_path,
        fresh=True,
        TMPDIR=str(temporary),
        TORCHINDUCTOR_CACHE_DIR=None,
    )
    assert out.split() == ["built", "True", "0", "True", "False"]


# What is computed from the weights when they are loaded; the answer shows it for large inputs only.
DERIVED = LINEAR.replace(
    "\n    def forward(",
    """
        {initial}
        self.register_load_state_dict_post_hook(self.derive)

    @staticmethod
    def derive(self, keys):
        {derived}

    def forward(""",
).replace("return self.layer(x)", "x = self.layer(x)\n        return torch.where(x.abs() > 50, x * self.scale, x)")
BUFFER = DERIVED.format(
    initial="self.register_buffer('scale', torch.ones(3), persistent=False)",
    derived="self.scale.copy_(self.layer.bias.detach().abs() + 1)",
)
ATTRIBUTE = DERIVED.format(
    initial="self.scale = torch.ones(3)", derived="self.scale = self.layer.bias.detach().abs() + 1"
)
NUMBER = DERIVED.format(initial="self.scale = 1.0", derived="self.scale = float(self.layer.bias.detach().abs().max())")


@pytest.mark.parametrize("code", [BUFFER, ATTRIBUTE])
def test_constant_that_the_model_derives_is_that_of_the_new_weights(code: str, tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", code), tmp_path / "store"
    start(archive, store)
    for seed in (1, 2, 0):
        write_weights(archive, seed)
        for expected in ({"hit": 1, "canary_recorded": 1}, {"hit": 1}):
            model = start(archive, store)
            if seed:
                assert counted(model) == expected
            x = torch.full((3, 4), 1000.0)
            with torch.inference_mode():
                torch.testing.assert_close(model(x), eager_model(archive)(x))


def test_number_that_the_model_derives_is_no_longer_that_of_the_build(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", NUMBER), tmp_path / "store"
    start(archive, store)
    write_weights(archive, 1)
    model = start(archive, store, strict=False)
    assert model.outcome.backend == "eager"
    assert "the model's attribute 'scale' is" in model.outcome.fallbacks[0]["reason"]


def test_record_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    """It attests answers only, and they need not show the constant."""
    archive, store = write_archive(tmp_path / "archive", BUFFER), tmp_path / "store"
    with pytest.MonkeyPatch.context() as patch:
        write = LocalStore.write_canary
        patch.setattr(LocalStore, "write_canary", lambda *a: write(*a[:3], {"cases": a[3]["cases"]}))
        start(archive, store)
    assert counted(start(archive, store)) == {"hit": 1, "canary_recorded": 1}
    assert counted(start(archive, store)) == {"hit": 1}
