"""Key: equal parts give an equal digest, any other part another one, and `explain` names the parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import LINEAR, archive_source, settings_of, write_archive, write_weights
from tests.support.subprocesses import run_python
from ts_handlers import ModuleSource, Settings
from ts_handlers.backends import get_backend
from ts_handlers.backends.base import Target
from ts_handlers.key import fingerprint
from ts_handlers.key.cache_key import CacheKey, explain
from ts_handlers.key.parts import ENVIRONMENT, PARTS, compute_key
from ts_handlers.model.base import ModelSource

NAMES = [name for name, _ in PARTS]
BACKENDS = ["aot_inductor", "inductor"]
parts = st.fixed_dictionaries({name: st.text(max_size=8) for name in NAMES})


def cache_key(values: dict[str, str]) -> CacheKey:
    return CacheKey(tuple(values.items()))


def key_of(source: ModelSource, backend: str = "aot_inductor", settings: Settings | None = None) -> CacheKey:
    target = Target(source, settings or settings_of(), torch.device("cpu"))
    return compute_key(get_backend(backend), target)


def changed(before: CacheKey, after: CacheKey) -> list[str]:
    assert (before.digest == after.digest) == (before == after)
    return [name for name, _, _ in explain(before, after)]


@given(parts, parts)
def test_digests_are_equal_exactly_when_the_parts_are(a: dict[str, str], b: dict[str, str]) -> None:
    assert (cache_key(a).digest == cache_key(b).digest) == (a == b)


@given(parts, st.sets(st.sampled_from(NAMES)))
def test_explain_names_exactly_the_changed_parts(values: dict[str, str], names: set[str]) -> None:
    other = {name: value + "*" if name in names else value for name, value in values.items()}
    assert {name for name, _, _ in explain(cache_key(values), cache_key(other))} == names
    assert (cache_key(values).digest == cache_key(other).digest) == (not names)


@given(st.text(max_size=6), st.text(max_size=6), st.text(max_size=6), st.text(max_size=6))
def test_neighbouring_parts_do_not_run_into_each_other(a: str, b: str, c: str, d: str) -> None:
    left, right = CacheKey((("model", a), ("weights", b))), CacheKey((("model", c), ("weights", d)))
    assert (left.digest == right.digest) == ((a, b) == (c, d))


def test_a_part_that_only_one_key_has_is_named() -> None:
    assert explain(CacheKey((("a", "1"),)), CacheKey((("a", "1"), ("b", "2")))) == [("b", "", "2")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_stand_in_declared_order(backend: str, archive: Path) -> None:
    key = key_of(archive_source(archive), backend)
    assert [name for name, _ in key.parts] == NAMES
    assert all(isinstance(value, str) and value for _, value in key.parts)


@given(st.permutations(["a_option", "b_option", "c_option"]), st.permutations(["batch", "length"]))
def test_order_of_mappings_is_irrelevant(options: list[str], dimensions: list[str]) -> None:
    source = ModuleSource("linear", torch.nn.Linear(4, 3))

    def make(names: list[str], sizes: list[str]) -> str:
        from ts_handlers import parse_settings

        section = {
            "backends": ["aot_inductor"],
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length"]}],
            "dimensions": {name: {"min": 1, "max": 5} for name in sizes},
            "warmup": [dict.fromkeys(sizes, 3)],
        }
        config = {"handler": {"ts_handlers": section}, "pt2": {"compile": {"options": dict.fromkeys(names, 1)}}}
        return key_of(source, settings=parse_settings(config))["inputs"]

    assert make(options, dimensions) == make(sorted(options), sorted(dimensions))


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "range": ({"dimensions": {"batch": {"min": 1, "max": 9}}}, ["inputs"]),
    "input dtype": ({"inputs": [{"name": "x", "dtype": "float64", "shape": ["batch", 4]}]}, ["inputs"]),
    "input name": ({"inputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 4]}]}, ["inputs"]),
    "model dtype": ({"dtype": "float16"}, ["options"]),
    "example size": ({"warmup": [{"batch": 7}]}, ["options"]),
    "canary": ({"canary": {"tolerance": 0.1, "seed": 3}}, []),
    "policy": ({"on_miss": "fail", "strict": True, "outside": "eager", "mmap": "never"}, []),
    "store": ({"store": "/elsewhere"}, []),
    "drawn values": (
        {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4], "values": [0, 1]}]},
        [],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_change_exactly_these_parts(backend: str, change: str, archive: Path) -> None:
    section, expected = CHANGES[change]
    source = archive_source(archive)
    assert changed(key_of(source, backend), key_of(source, backend, settings_of(**section))) == expected


def test_backends_have_different_keys(archive: Path) -> None:
    source = archive_source(archive)
    assert "backend" in changed(key_of(source, "aot_inductor"), key_of(source, "inductor"))


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_environment_inside_the_allow_list_counts(name: str, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = archive_source(archive)
    monkeypatch.delenv(name, raising=False)
    before = key_of(source)
    monkeypatch.setenv(name, "1")
    one = key_of(source)
    monkeypatch.setenv(name, "0")
    assert changed(before, one) == ["options"]
    assert changed(one, key_of(source)) == ["options"]


def test_environment_outside_the_allow_list_does_not_count(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = archive_source(archive)
    before = key_of(source)
    for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_LOGS", "HOSTNAME", "SOMETHING_ELSE"):
        monkeypatch.setenv(name, "/nowhere")
    assert changed(before, key_of(source)) == []


@pytest.mark.parametrize(
    ("function", "name", "part"),
    [
        ("device_identity", "x86_64 another processor", "device"),
        ("toolchain", "torch=9.9", "toolchain"),
    ],
)
def test_machine_and_toolchain_count(
    function: str, name: str, part: str, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = archive_source(archive)
    before = key_of(source)
    monkeypatch.setattr(fingerprint, function, lambda device: name)
    assert changed(before, key_of(source)) == [part]


def test_device_index_is_not_keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "NVIDIA H200", 9, 0, 139 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    first, second = (fingerprint.device_identity(torch.device("cuda", index)) for index in (0, 1))
    assert first == second
    assert "NVIDIA H200 sm_90 139GiB" in first
    assert fingerprint.device_slug(torch.device("cuda", 0)) == fingerprint.device_slug(torch.device("cuda", 1))
    Properties.minor = 1
    assert fingerprint.device_identity(torch.device("cuda", 0)) != first


@pytest.mark.processes
def test_key_is_the_same_in_every_process(archive: Path) -> None:
    code = """
        import json, sys
        import torch
        from tests.support.models import archive_source, settings_of
        from ts_handlers import ModuleSource
        from tests.key.test_parts import key_of
        made = archive_source(sys.argv[1]).eager()
        made.options = {"b", "a", "c"}
        sources = [archive_source(sys.argv[1]), ModuleSource("eager", made)]
        print(json.dumps([key_of(source, name).parts for source in sources for name in ("aot_inductor", "inductor")]))
    """
    answers = [json.loads(run_python(code, archive, fresh=True, PYTHONHASHSEED=seed)) for seed in ("1", "2")]
    assert answers[0] == answers[1]


OPERATIONS = {
    "softmax over rows": ("torch.nn.Softmax(dim=0)", "self.part(x)"),
    "softmax over columns": ("torch.nn.Softmax(dim=1)", "self.part(x)"),
    "stride 1": ("torch.nn.Conv1d(1, 1, 3, stride=1)", "self.part(x)"),
    "stride 2": ("torch.nn.Conv1d(1, 1, 3, stride=2)", "self.part(x)"),
    "x - relu(x)": ("torch.nn.ReLU()", "x - self.part(x)"),
    "relu(x) - x": ("torch.nn.ReLU()", "self.part(x) - x"),
}
CODE = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.part = {part}

    def forward(self, x):
        return {forward}
"""


@pytest.mark.parametrize("as_module", [False, True], ids=["archive", "module"])
def test_models_that_compute_differently_have_different_digests(as_module: bool, tmp_path: Path) -> None:
    digests = {}
    for index, (name, (part, forward)) in enumerate(OPERATIONS.items()):
        directory = write_archive(tmp_path / str(index), CODE.format(part=part, forward=forward))
        source = archive_source(directory)
        digests[name] = (ModuleSource("m", source.eager()) if as_module else source).digest()
    assert len(set(digests.values())) == len(OPERATIONS)


def test_new_weights_of_the_same_architecture_keep_the_key(archive: Path, tmp_path: Path) -> None:
    first = archive_source(archive)
    other = write_archive(tmp_path / "other", seed=5)
    second = archive_source(other)
    assert first.weights_digest() != second.weights_digest()
    assert changed(key_of(first), key_of(second)) == []
    one, two = (ModuleSource("m", torch.nn.Linear(4, 3)) for _ in range(2))
    assert one.weights_digest() != two.weights_digest()
    assert changed(key_of(one), key_of(two)) == []


def test_an_architecture_with_other_shapes_changes_the_model_part(archive: Path, tmp_path: Path) -> None:
    other = write_archive(tmp_path / "other", LINEAR.replace("Linear(4, 3)", "Linear(4, 3, bias=False)"))
    assert changed(key_of(archive_source(archive)), key_of(archive_source(other))) == ["model"]


def _add(name: str, text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return change


FILES = {
    "config.json": (_add("config.json", '{"layers": 2}'), True),
    "a data file in a folder": (_add("data/table.csv", "1,2"), True),
    "a helper module": (_add("helper.py", "X = 1"), True),
    "vocab.txt": (_add("vocab.txt", "the"), False),
    "tokenizer.json": (_add("tokenizer.json", "{}"), False),
    "tokenizer_config.json": (_add("tokenizer_config.json", "{}"), False),
    "index_to_name.json": (_add("index_to_name.json", "{}"), False),
    "model-config.yaml": (_add("model-config.yaml", "batchSize: 9"), False),
    "MAR-INF": (_add("MAR-INF/MANIFEST.json", "{}"), False),
    "README.md": (_add("README.md", "text"), False),
    "byte code": (_add("__pycache__/model.cpython-311.pyc", "x"), False),
    "new weights": (lambda directory: write_weights(directory, 9), False),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_the_archive_change_the_model_part_or_not(case: str, archive: Path) -> None:
    change, counts = FILES[case]
    before = key_of(archive_source(archive))
    change(archive)
    assert changed(before, key_of(archive_source(archive))) == (["model"] if counts else [])


def test_changed_content_of_a_file_counts(archive: Path) -> None:
    _add("config.json", '{"layers": 2}')(archive)
    before = key_of(archive_source(archive))
    _add("config.json", '{"layers": 3}')(archive)
    assert changed(before, key_of(archive_source(archive))) == ["model"]
    assert changed(key_of(archive_source(archive, ignored_files=["config.*"])), key_of(archive_source(archive))) == [
        "model"
    ]


def test_version_of_an_imported_library_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_archive(tmp_path, "import numpy as np\n" + LINEAR)
    before = key_of(archive_source(directory))
    known = fingerprint.distribution_version

    def newer(name: str) -> str | None:
        return "99.0" if name == "numpy" else known(name)

    monkeypatch.setattr(fingerprint, "distribution_version", newer)
    assert changed(before, key_of(archive_source(directory))) == ["model"]


def test_module_on_the_path_without_a_version_counts_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "path" / "layers_of_ours"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(str(package.parent))
    directory = write_archive(tmp_path / "archive", "from layers_of_ours import A\n" + LINEAR)
    before = key_of(archive_source(directory))
    (package / "blocks.py").write_text("B = 2\n")
    assert changed(before, key_of(archive_source(directory))) == ["model"]
