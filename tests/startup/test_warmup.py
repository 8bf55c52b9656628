"""How many threads canary and warm-up use."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from tests.support.subprocesses import start_python
from ts_handlers.execution.base import Loaded
from ts_handlers.model.signature import Signature
from ts_handlers.startup import warmup


@pytest.mark.parametrize(("idle", "expected"), [(-3, 1), (0, 1), (1, 1), (2, 2), (3, 3), (64, 3)])
def test_canary_runs_on_the_idle_processors(idle: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "idle_processors", lambda: idle)
    loaded = Loaded(run=lambda tensors: None, signature=Signature((), {}), adjusts_threads=True)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with warmup.few_threads(loaded):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3
        with warmup.few_threads(dataclasses.replace(loaded, adjusts_threads=False)):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.processes
def test_running_processes_are_not_idle_processors() -> None:
    before = len(os.sched_getaffinity(0))
    assert warmup.idle_processors() <= before
    spinning = [start_python("print('on', flush=True)\nwhile True: pass") for _ in range(before)]
    try:
        for process in spinning:
            assert process.stdout is not None
            process.stdout.readline()
        assert warmup.idle_processors() <= 0
    finally:
        for process in spinning:
            process.kill()
            process.wait()
