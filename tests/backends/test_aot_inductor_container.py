"""AOTInductor's libraries behind their C interface: answers, memory, errors, threads, and what needs torch's runner."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import archive_source, eager_model, settings_of, write_archive

from ts_handlers import start_model
from ts_handlers.backends.aot_inductor import ensure_loadable
from ts_handlers.backends.aot_inductor_container import Container, TorchRunner, open_library
from ts_handlers.backends.aot_inductor_export import PREFIX
from ts_handlers.errors import LoadError

pytestmark = pytest.mark.compile

CPU = torch.device("cpu")
CODE = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(256, 256)

    def forward(self, x):
        for _ in range(40):
            x = torch.tanh(self.first(x))
        return x, x.sum(0)
"""
FALLBACK = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)

    def forward(self, x):
        return torch.linalg.svdvals(self.first(x))
"""
Library = tuple[Path, dict[str, torch.Tensor]]


def build(folder: Path, code: str, width: int) -> tuple[Path, Path]:
    """A model's archive and the library in its entry."""
    archive = write_archive(folder / "archive", code)
    section = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", width]}],
        "dimensions": {"batch": {"min": 1, "max": 4096}},
    }
    settings = settings_of(section, store=str(folder / "store"), backends=["aot_inductor"], strict=True)
    start_model(archive_source(archive), settings)
    (library,) = (folder / "store" / "entries").rglob("*.so")
    return archive, library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A library, and its constants by their names in it."""
    archive, path = build(tmp_path_factory.mktemp("container"), CODE, 256)
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
    assert beside_ours > 10 * beside_torchs


def test_many_threads_get_their_own_answers(library: Library) -> None:
    container = opened(library, count=3)
    inputs = [torch.randn(batch, 256) for batch in (1, 2, 3, 5, 8, 13)]
    expected = [container.run([x])[0] for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(20):
            if not torch.equal(container.run([inputs[index]])[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


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
    with pytest.raises(LoadError, match="reason stands in the worker's log"):
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
    archive, path = build(tmp_path, FALLBACK, 6)
    assert isinstance(open_library(path, CPU), TorchRunner)
    settings = settings_of(
        {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 6]}],
            "dimensions": {"batch": {"min": 1, "max": 4096}},
        },
        store=str(tmp_path / "store"),
        backends=["aot_inductor"],
        strict=True,
    )
    model = start_model(archive_source(archive), settings)
    assert model.outcome.result == "hit"
    assert not model._loaded.frees_interpreter
    x = torch.randn(5, 6)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), eager_model(archive)(x))
