"""AOTInductor's libraries behind their C interface: answers, memory, errors, threads, and what needs torch's runner."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import LINEAR, LINEAR_SECTION, archive_source, eager_model, settings_of, write_archive
from ts_handlers import CompiledModel, start_model
from ts_handlers.backends.aot_inductor.container import Container, TorchRunner, open_library
from ts_handlers.backends.aot_inductor.load import ensure_loadable
from ts_handlers.backends.export import PREFIX
from ts_handlers.errors import LoadError

pytestmark = pytest.mark.compile

CPU = torch.device("cpu")
WIDE = LINEAR.replace("Linear(4, 3)", "Linear(256, 256)").replace(
    "return self.layer(x)",
    "for _ in range(40):\n            x = torch.tanh(self.layer(x))\n        return x, x.sum(0)",
)
WIDE_SECTION: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 256]}],
    "dimensions": {"batch": {"min": 1, "max": 4096}},
}
SINGULAR_VALUES = LINEAR.replace("return self.layer(x)", "return torch.linalg.svdvals(self.layer(x))")
Library = tuple[Path, dict[str, torch.Tensor]]


def start(folder: Path, section: dict[str, Any]) -> CompiledModel:
    """Start the archive that lies in `folder`."""
    settings = settings_of(section, store=str(folder / "store"), backends=["aot_inductor"], strict=True)
    return start_model(archive_source(folder / "archive"), settings)


def build(folder: Path, code: str, section: dict[str, Any]) -> tuple[Path, Path]:
    """A model's archive and the library in its entry."""
    archive = write_archive(folder / "archive", code)
    assert start(folder, section).outcome.result == "built"
    (library,) = (folder / "store" / "entries").rglob("*.so")
    return archive, library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A library, and its constants by their names in it."""
    archive, path = build(tmp_path_factory.mktemp("container"), WIDE, WIDE_SECTION)
    ensure_loadable()
    weights = eager_model(archive).state_dict()
    names = open_library(path, CPU).constant_names()
    return path, {name: weights[fqn.removeprefix(PREFIX)] for name, fqn in names.items()}


def opened(library: Library, kind: Callable[..., Any] = open_library, count: int = 1) -> Any:
    path, constants = library
    made = kind(path, CPU, count)
    made.use_constants(constants)
    return made


def test_answers_are_those_of_torchs_runner(library: Library) -> None:
    container, runner = opened(library), opened(library, TorchRunner)
    assert isinstance(container, Container)
    assert container.constant_names() == runner.constant_names()
    for batch in (1, 3, 64):
        x = torch.randn(batch, 256)
        for found, expected in zip(container.run([x]), runner.run([x]), strict=True):
            assert torch.equal(found, expected)
            assert not found.requires_grad


def test_other_threads_run_while_it_computes(library: Library) -> None:
    """Steps that this thread makes during one call on another thread; torch's runner allows next to none."""
    x = torch.randn(4096, 256)

    def steps(run: Callable[[list[torch.Tensor]], Any]) -> int:
        count = 0
        running = threading.Event()

        def call() -> None:
            running.set()
            run([x])

        thread = threading.Thread(target=call)
        thread.start()
        running.wait()
        while thread.is_alive():
            count += 1
        return count

    beside_torchs = max(steps(opened(library, TorchRunner).run) for _ in range(3))
    beside_ours = max(steps(opened(library).run) for _ in range(3))
    assert beside_ours > 10 * max(beside_torchs, 1000)


def test_many_threads_get_their_own_answers(library: Library) -> None:
    container = opened(library, count=3)
    inputs = [torch.randn(batch, 256) for batch in (1, 2, 3, 5, 8, 13)]
    expected = [container.run([x])[0] for x in inputs]

    def right(index: int) -> int:
        return sum(torch.equal(container.run([inputs[index]])[0], expected[index]) for _ in range(20))

    with ThreadPoolExecutor(len(inputs)) as threads:
        assert list(threads.map(right, range(len(inputs)))) == [20] * len(inputs)


def test_tensors_are_released(library: Library) -> None:
    """Inputs and answers after the call, our hold on the weights with the container; torch never gives up its own."""
    x = torch.randn(2, 256)
    tensors = [x, *library[1].values()]

    def uses() -> list[int]:
        gc.collect()
        return [tensor._use_count() for tensor in tensors]  # type: ignore[attr-defined]

    container = opened(library)
    before = uses()
    for _ in range(3):
        answers = container.run([x])
    assert uses() == before
    assert [answer._use_count() for answer in answers] == [1, 1]
    del container
    assert uses() == [before[0], *(count - 1 for count in before[1:])]


def test_a_missing_constant_is_an_error(library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    path, constants = library
    container = open_library(path, CPU)
    name, *_ = constants
    with pytest.raises(LoadError, match="reason is in the worker's log"):
        container.use_constants({other: tensor for other, tensor in constants.items() if other != name})
    assert name in capfd.readouterr().err


def test_what_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"\x7fELF")
    with pytest.raises(LoadError, match=r"model\.so cannot be loaded"):
        open_library(path, CPU)
    with pytest.raises(LoadError, match="no AOTInductor runner for device 'meta'"):
        open_library(path, torch.device("meta"))


def test_operators_without_a_c_interface_take_torchs_runner(tmp_path: Path) -> None:
    archive, path = build(tmp_path, SINGULAR_VALUES, LINEAR_SECTION)
    assert isinstance(open_library(path, CPU), TorchRunner)
    model = start(tmp_path, LINEAR_SECTION)
    assert model.outcome.result == "hit"
    assert not model._loaded.frees_interpreter
    x = torch.randn(5, 4)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), eager_model(archive)(x))


def test_a_start_that_builds_places_each_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads what it has built more than once, and torch never frees what a load was given."""
    given: list[dict[str, int]] = []
    original = Container.use_constants

    def use_constants(self: Container, constants: dict[str, torch.Tensor]) -> None:
        given.append({name: tensor.data_ptr() for name, tensor in constants.items()})
        original(self, constants)

    monkeypatch.setattr(Container, "use_constants", use_constants)
    section = {
        "inputs": [{"name": "x", "dtype": "bfloat16", "shape": ["batch", 4]}],
        "dimensions": {"batch": {"min": 2, "max": 8}},
        "dtype": "bfloat16",  # a copy of the archive's float32 weights
    }
    build(tmp_path, LINEAR, section)
    assert len(given) > 1
    assert all(pointers == given[0] for pointers in given)
    assert len(set(given[0].values())) == 2
