"""Model sources: identity of modules, weights files, model classes, and what is said when they are wrong."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.support.models import LINEAR, archive_source, eager_model, save_weights, write_archive
from ts_handlers import ExportedSource, ModuleSource
from ts_handlers.errors import BuildError, ModelError
from ts_handlers.model.archive_files import load_model_class, read_weights

SECOND = LINEAR + "\n\nclass Other(torch.nn.Module):\n    pass\n"


def test_eager_model_is_built_once_in_eval_mode_with_its_weights(archive: Path) -> None:
    source = archive_source(archive)
    module = source.eager()
    assert module is source.eager()
    assert not module.training
    x = torch.randn(2, 4)
    assert torch.equal(module(x), eager_model(archive)(x))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.safetensors"])
def test_weights_files(name: str, mmap: bool, tmp_path: Path) -> None:
    directory = write_archive(tmp_path, weights=name)
    source = archive_source(directory, name, mmap=mmap)
    state = source.weights()
    assert sorted(state) == ["layer.bias", "layer.weight"]
    assert all(torch.equal(tensor, source.eager().state_dict()[key]) for key, tensor in state.items())
    assert len(source.weights_digest()) == 64


def test_mapped_weights_are_not_copied_into_the_store_of_another_file(archive: Path) -> None:
    source = archive_source(archive, mmap=False)
    before = source.weights()["layer.bias"].clone()
    save_weights(archive / "model.pt", {name: tensor + 1 for name, tensor in source.weights().items()})
    assert torch.equal(source.weights()["layer.bias"], before)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickle(value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(pickle.dumps(value))


def _save(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, "may be truncated"),
    "empty": (lambda path: path.write_bytes(b""), r"\(0 bytes\) cannot be read"),
    "text": (lambda path: path.write_text("hello"), "cannot be read"),
    "a whole module": (_save(torch.nn.Linear(1, 1)), "more than tensors: save it with torch.save"),
    "foreign class": (_pickle(functools.partial(print, 1)), "cannot be read"),
    "a list": (_save([torch.zeros(1)]), "holds a list, expected a state dict"),
    "a checkpoint of several things": (_save({"epoch": 3, "state": {}}), "expected a state dict"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_a_model_error(case: str, archive: Path) -> None:
    damage, text = BROKEN[case]
    damage(archive / "model.pt")
    with pytest.raises(ModelError, match=text) as caught:
        archive_source(archive).weights()
    assert "model.pt" in str(caught.value)


def test_broken_safetensors_is_a_model_error(tmp_path: Path) -> None:
    directory = write_archive(tmp_path, weights="model.safetensors")
    _truncate(directory / "model.safetensors")
    for mmap in (True, False):
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            read_weights(directory / "model.safetensors", mmap=mmap)


def test_unpickling_runs_no_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ModelError):
        read_weights(tmp_path / "model.pt", mmap=True)
    assert not (tmp_path / "ran").exists()


def test_missing_files_are_named(archive: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights file 'absent\.pt'.*--serialized-file"):
        archive_source(archive, "absent.pt")
    (archive / "model.py").unlink()
    with pytest.raises(ModelError, match=r"no model file 'model\.py'.*--model-file"):
        archive_source(archive)


def test_weights_of_another_class_are_refused(archive: Path) -> None:
    save_weights(archive / "model.pt", {"layer.weight": torch.zeros(3, 4)})
    with pytest.raises(ModelError, match=r"(?s)do not fit the class.*layer\.bias"):
        archive_source(archive).eager()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import torch\n", r"found 0 \(none\)"),
        (SECOND, r"found 2 \(Model, Other\).*__model__"),
        ("from torch.nn import Linear\n", r"found 0 \(none\)"),
        ("this is no Python", "SyntaxError"),
        ("import a_module_that_does_not_exist\n", "ModuleNotFoundError"),
        ("raise SystemError('no')\n", "SystemError: no"),
    ],
)
def test_model_files_without_exactly_one_class_are_refused(code: str, text: str, tmp_path: Path) -> None:
    write_archive(tmp_path, code, seed=None)
    with pytest.raises(ModelError, match=text):
        load_model_class(tmp_path / "model.py")


def test_one_marked_class_is_taken(tmp_path: Path) -> None:
    write_archive(tmp_path, SECOND + "\n\nOther.__model__ = True\n", seed=None)
    assert load_model_class(tmp_path / "model.py").__name__ == "Other"


def test_constructor_with_arguments_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path, LINEAR.replace("__init__(self)", "__init__(self, size)"), seed=None)
    with pytest.raises(ModelError, match=r"Model\(\) raised TypeError.*without arguments"):
        archive_source(tmp_path, None).eager()


def test_model_file_may_import_a_helper_beside_it(tmp_path: Path) -> None:
    (tmp_path / "sizes_of_this_model.py").write_text("OUT = 3\n")
    code = LINEAR.replace("import torch", "import torch\nfrom sizes_of_this_model import OUT", 1)
    write_archive(tmp_path, code.replace("(4, 3)", "(4, OUT)"))
    assert archive_source(tmp_path).eager().layer.out_features == 3


def test_release_forgets_the_module(archive: Path) -> None:
    source = archive_source(archive)
    first = source.eager()
    source.release()
    assert source.eager() is not first


def double(x: Any, factor: int = 2) -> Any:
    return [item * factor for item in x]


def triple(x: Any, factor: int = 3) -> Any:
    return [item * factor for item in x]


triple.__qualname__ = double.__qualname__


class Holder(torch.nn.Module):
    """Holds any attribute."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Options:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def _with_buffer(values: torch.Tensor) -> torch.nn.Module:
    module = Holder(1)
    module.register_buffer("table", values, persistent=False)
    return module


def _with_hook(factor: float) -> torch.nn.Module:
    module = Holder(1)
    module.register_forward_hook(lambda module, inputs, output: output * factor)
    return module


def _table(middle: int) -> numpy.ndarray[Any, Any]:
    table = numpy.zeros(5000)
    table[2500] = middle
    return table


def _nested(inner: int) -> Callable[[Any], Any]:
    if inner == 1:
        return lambda x: [item + 1 for item in x]
    return lambda x: [item + 2 for item in x]


DIFFERENT: dict[str, tuple[torch.nn.Module, torch.nn.Module]] = {
    "number": (Holder(1), Holder(2)),
    "number and text": (Holder(1), Holder("1")),
    "order of a list": (Holder([1, 2]), Holder([2, 1])),
    "tensor": (Holder(torch.zeros(3)), Holder(torch.ones(3))),
    "dtype of a tensor": (Holder(torch.zeros(3)), Holder(torch.zeros(3).half())),
    "the middle of a large array": (Holder(_table(0)), Holder(_table(1))),
    "nested options": (Holder(Options(a=Options(b=1))), Holder(Options(a=Options(b=2)))),
    "function defaults": (Holder(double), Holder(triple)),
    "code inside a function": (Holder(_nested(1)), Holder(_nested(2))),
    "partial": (Holder(functools.partial(double, factor=1)), Holder(functools.partial(double, factor=2))),
    "the middle of a non-persistent buffer": (
        _with_buffer(torch.zeros(5000)),
        _with_buffer(torch.zeros(5000).index_fill(0, torch.tensor(2500), 1.0)),
    ),
    "forward hook": (_with_hook(1.0), _with_hook(2.0)),
    "a hook at all": (Holder(1), _with_hook(1.0)),
    "training": (Holder(1).eval(), Holder(1).train()),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_modules_that_may_compute_differently_have_different_digests(case: str) -> None:
    first, second = DIFFERENT[case]
    assert ModuleSource("m", first).digest() != ModuleSource("m", second).digest()
    assert ModuleSource("m", first).digest() == ModuleSource("m", first).digest()


def test_equal_modules_have_equal_digests() -> None:
    for make in (lambda: Holder({"a": {1, 2}, "b": None}), lambda: _with_hook(3.0), lambda: Holder(_nested(1))):
        assert ModuleSource("m", make()).digest() == ModuleSource("m", make()).digest()


def test_attributes_that_refer_back_cannot_be_keyed() -> None:
    options = Options()
    options.me = options  # type: ignore[attr-defined]
    with pytest.raises(BuildError, match="refers back"):
        ModuleSource("m", Holder(options)).digest()


def test_exported_program_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no exported program 'model\.pt2'"):
        ExportedSource("m", tmp_path / "model.pt2")
    (tmp_path / "model.pt2").write_text("no archive")
    with pytest.raises(ModelError, match="is not an exported program"):
        ExportedSource("m", tmp_path / "model.pt2")


def test_compiled_package_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/data/aotinductor/model/x.so", b"")
    with pytest.raises(ModelError, match="compiled AOTInductor package"):
        ExportedSource("m", tmp_path / "model.pt2")


def test_an_archive_without_weights_is_told_apart_from_a_model_without_any(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.support.models import settings_of
    from ts_handlers import start_model

    constant = "import torch\n\n\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return x\n"
    filled = LINEAR.replace("torch.nn.Linear(4, 3)", "torch.nn.LayerNorm(4)")
    for index, (code, random) in enumerate(((LINEAR, True), (constant, False), (filled, False))):
        source = archive_source(write_archive(tmp_path / str(index), code, seed=None), None)
        notes = start_model(source, settings_of(backends=["eager"])).describe()["notes"]
        assert any("no weights" in note and "--serialized-file" in note for note in notes) == random
    assert caplog.text.count("the archive has no weights") == 1
