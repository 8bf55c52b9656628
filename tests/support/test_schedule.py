"""Tests that share a fixture of their module stay with one worker of pytest."""

from __future__ import annotations

import os

import pytest

_made: list[int] = []


@pytest.fixture(scope="module")
def shared() -> int:
    _made.append(os.getpid())
    return os.getpid()


@pytest.mark.parametrize("number", range(4))
def test_a_test_with_a_modules_fixture_is_in_a_group(shared: int, number: int, request: pytest.FixtureRequest) -> None:
    """xdist tells a group by the end of a test's id; see the version of pytest in pyproject.toml."""
    assert _made == [shared]
    config = request.config
    if hasattr(config, "workerinput") and config.getvalue("loadgroup"):
        assert request.node.nodeid.endswith("@support.test_schedule")
