"""Facts of processes, from /proc."""

from __future__ import annotations

import os

from ts_handlers.system.processes import boot_id, parent_of, process_age_ms, process_start


def test_this_process_and_one_that_does_not_exist() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    assert process_start(os.getpid()) >= process_start(os.getppid()) > 0
    assert process_start(2**30) == 0
    assert boot_id() == boot_id() != ""
    age = process_age_ms()
    assert age is not None
    assert 0 < age < 86_400_000
