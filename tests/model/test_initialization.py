"""Skipped initialisation: the model equals the ordinary one, or is built in the ordinary way."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from tests.support.models import archive_source, write_archive
from ts_handlers.model.archive_files import load_model_class
from ts_handlers.model.initialization import skip_random_initialization

HEAD = """
import torch


class Model(torch.nn.Module):
    built = 0

    def __init__(self):
        super().__init__()
        Model.built += 1
"""

SOUND = {
    "layers": """
        self.a = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv1d(1, 2, 3), torch.nn.Embedding(5, 4, 0))
        self.b = torch.nn.LSTM(4, 4)
        self.c = torch.nn.MultiheadAttention(4, 2)
    """,
    "truncated normal": """
        self.a = torch.nn.Linear(4, 4)
        torch.nn.init.trunc_normal_(self.a.weight, std=0.02)
    """,
    "part of a parameter": """
        self.a = torch.nn.Parameter(torch.zeros(6, 2))
        torch.nn.init.normal_(self.a.data[2:4])
    """,
    "persistent buffer": """
        self.register_buffer("a", torch.empty(4).uniform_())
    """,
    "a generator of its own": """
        self.a = torch.nn.Linear(2, 2)
        self.register_buffer("b", torch.empty(4).normal_(generator=torch.Generator().manual_seed(3)), persistent=False)
    """,
}

# Drawn by rejection or through the inverse error function, by torch's version: built twice or once, and right.
VARYING = {
    "truncated normal off centre": """
        self.a = torch.nn.Linear(4, 4)
        torch.nn.init.trunc_normal_(self.a.weight, mean=0.0, std=1.0, a=1.5, b=9.0)
    """,
    "truncated normal far from its mean": """
        self.a = torch.nn.Linear(4, 4)
        torch.nn.init.trunc_normal_(self.a.weight, mean=0.0, std=1.0, a=0.1, b=9.0)
    """,
}

UNSOUND = {
    "non-persistent random buffer": """
        torch.manual_seed(1)
        self.a = torch.nn.Linear(4, 4)
        self.register_buffer("b", torch.empty(4).normal_(), persistent=False)
    """,
    "seeded permutation": """
        torch.manual_seed(2)
        self.a = torch.nn.Linear(4, 4)
        self.register_buffer("b", torch.randperm(16), persistent=False)
    """,
    "permutation after drawn weights": """
        self.a = torch.nn.Linear(4, 4)
        self.order = torch.randperm(16)
    """,
    "plain attribute": """
        torch.manual_seed(3)
        self.a = torch.nn.Linear(4, 4)
        self.noise = torch.empty(3).uniform_()
    """,
    "memory shared with a loaded tensor": """
        torch.manual_seed(4)
        both = torch.empty(10).normal_()
        self.register_buffer("a", both[:5])
        self.rest = both[5:]
    """,
    "orthogonal": """
        self.a = torch.nn.Linear(4, 4)
        torch.nn.init.orthogonal_(self.a.weight)
    """,
    "truncated normal off centre": """
        self.a = torch.nn.Linear(4, 4)
        torch.nn.init.trunc_normal_(self.a.weight, mean=0.0, std=1.0, a=1.5, b=9.0)
    """,
    "truncated normal far from its mean": """
        self.a = torch.nn.Linear(4, 4)
        torch.nn.init.trunc_normal_(self.a.weight, mean=0.0, std=1.0, a=0.1, b=9.0)
    """,
    "a loop that draws until it likes the result": """
        self.a = torch.nn.Linear(4, 4)
        with torch.no_grad():
            while not self.a.weight.std() > 0:
                self.a.weight.data = torch.empty(4, 4).normal_()
    """,
    "a constructor that needs its random weights": """
        self.a = torch.nn.Linear(4, 4)
        with torch.no_grad():
            self.a.weight.fill_(0.0).normal_()
        assert self.a.weight.std() > 0, "not initialised"
    """,
}


def build(directory: Path, body: str) -> torch.nn.Module:
    forward = "\n    def forward(self, x):\n        return x\n"
    write_archive(directory, HEAD + body.rstrip() + "\n" + forward)
    load_model_class(directory / "model.py").built = 0  # type: ignore[attr-defined]  # by whoever wrote the weights
    return archive_source(directory).eager()


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    buffers = dict(module.named_buffers())
    plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return {**module.state_dict(), **buffers, **plain}


@pytest.mark.parametrize("case", [*SOUND, *VARYING])
def test_sound_models_are_built_once_and_equal(case: str, tmp_path: Path) -> None:
    module = build(tmp_path, {**SOUND, **VARYING}[case])
    assert type(module).built == 1 or case in VARYING
    expected = {**tensors_of(type(module)()), **torch.load(tmp_path / "model.pt", weights_only=True)}
    assert set(tensors_of(module)) == set(expected)
    for name, tensor in tensors_of(module).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_models_are_built_again_in_the_ordinary_way(case: str, tmp_path: Path) -> None:
    module = build(tmp_path, UNSOUND[case])
    assert type(module).built == 2
    if "manual_seed" in UNSOUND[case]:
        expected = {**tensors_of(type(module)()), **torch.load(tmp_path / "model.pt", weights_only=True)}
        for name, tensor in tensors_of(module).items():
            assert torch.equal(tensor, expected[name]), name


def test_random_methods_are_restored_even_after_an_error() -> None:
    before = {name: getattr(torch.Tensor, name) for name in ("normal_", "uniform_")}
    with contextlib.suppress(ZeroDivisionError), skip_random_initialization():
        assert torch.zeros(3).normal_().eq(0).all()
        _ = 1 / 0
    assert {name: getattr(torch.Tensor, name) for name in before} == before
    assert not torch.zeros(100).normal_().eq(0).all()


def test_other_threads_draw_as_usual() -> None:
    import threading

    drawn: list[torch.Tensor] = []
    with skip_random_initialization() as skipped:
        thread = threading.Thread(target=lambda: drawn.append(torch.zeros(100).normal_()))
        thread.start()
        thread.join()
        assert skipped.was_sound(torch.nn.Module()) is False  # the other thread has moved the generator
    assert not drawn[0].eq(0).all()
