"""Marks that say what a test costs, derived from what it reaches, and checked against what it starts.

A helper that starts something says so with `costs`. A test gets the mark of every such helper that its code, its
fixtures' code and the functions of the tests that they call name. What a test really starts is watched with an audit
hook: a test without a mark that starts a process fails.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pytest

Function = TypeVar("Function", bound=Callable[..., Any])

COSTS = {
    "services": "starts a server: S3, Redis, Azure's or Google's store, or network namespaces",
    "processes": "starts Python processes, or forks",
    "compile": "runs the real compiler (seconds to a minute each)",
    "serving": "starts a real TorchServe",
    "gpu": "needs a CUDA GPU",
}
_EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
_COMPILERS = {"g++", "c++", "gcc", "cc"}
_CHEAP = {"mount", "umount", "openssl", "java", "cxx", *_COMPILERS}
"""Programs that take milliseconds; a compiler does, where it only says its version."""
_COMPILES = {"-shared", "-c"}

MARK = "__cost__"
_running: list[pytest.Item] = []
_started: list[str] = []


def costs(mark: str) -> Callable[[Function], Function]:
    """Mark every test that reaches this function or fixture, and refuse calls of tests without the mark."""
    assert mark in COSTS

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*arguments: Any, **options: Any) -> Any:
            require(mark, function.__qualname__)
            return function(*arguments, **options)

        @functools.wraps(function)
        def checked_fixture(*arguments: Any, **options: Any) -> Any:
            require(mark, function.__qualname__)
            yield from function(*arguments, **options)

        if inspect.isgeneratorfunction(function):
            checked = checked_fixture
        setattr(checked, MARK, mark)
        return checked  # type: ignore[return-value]

    return decorate


def require(mark: str, what: str) -> None:
    """Fail unless the running test carries the mark."""
    if _running and _running[-1].get_closest_marker(mark) is None:
        pytest.fail(f"{what} costs what the mark `{mark}` says; {_running[-1].nodeid} does not carry it")


def derived(item: pytest.Function) -> set[str]:
    """The costs of everything that a test's code and its fixtures' code name."""
    seen: set[int] = set()
    found: set[str] = set()
    functions: list[Any] = [item.function]
    names = [*item.fixturenames, *_fixtures_named_by_parameters(item)]
    for name in names:  # grows
        for each in item.session._fixturemanager.getfixturedefs(name, item) or ():
            functions.append(each.func)
            names += [argument for argument in each.argnames if argument not in names]
    while functions:
        function = functions.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if mark := getattr(function, MARK, None):
            found.add(mark)
        functions += reached(function)
    return found


def _fixtures_named_by_parameters(item: pytest.Function) -> Iterator[str]:
    """Parameters that a fixture or a test hands to `getfixturevalue`."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        if isinstance(value, str) and value.isidentifier():
            yield value


def reached(function: Any) -> Iterator[Any]:
    """Functions and methods of the tests that a function's code, or a class's, names."""
    if isinstance(function, type):
        yield from (each for each in vars(function).values() if inspect.isfunction(each))
        return
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType):
        return
    for name in _names(function.__code__):
        target = function.__globals__.get(name)
        if isinstance(target, types.ModuleType) and target.__name__.startswith("tests."):
            yield from (each for each in vars(target).values() if getattr(each, MARK, None))
        elif getattr(target, "__module__", "").startswith("tests.") and (
            isinstance(target, type) or inspect.isfunction(target)
        ):
            yield target


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def watch() -> None:
    """Watch what tests start, from now on."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and _running:
            words = _command(event, arguments)
            program = words[0].rpartition("/")[2]
            if program not in _CHEAP or (program in _COMPILERS and _COMPILES & set(words)):
                _started.append(f"{event} {' '.join(words)[:200]}")

    sys.addaudithook(hook)


def _command(event: str, arguments: tuple[Any, ...]) -> list[str]:
    if event == "subprocess.Popen":
        words = arguments[1]
        return [str(each) for each in ([words] if isinstance(words, str | bytes) else words)]
    return [str(each) for each in arguments[:1]] or ["this process"]


def begin(item: pytest.Item) -> None:
    """A test begins."""
    _running.append(item)
    _started.clear()


def end() -> None:
    """A test ends; fails if it started a process and carries no mark."""
    item = _running.pop()
    unmarked = not any(item.get_closest_marker(mark) for mark in COSTS)
    if unmarked and _started:
        pytest.fail(f"{item.nodeid} starts processes and carries no mark of that: {_started[:3]}", pytrace=False)


def mark_all(items: Iterable[pytest.Item]) -> None:
    """Give every collected test the marks that its code says."""
    for item in items:
        if isinstance(item, pytest.Function):
            for mark in sorted(derived(item)):
                if item.get_closest_marker(mark) is None:
                    item.add_marker(mark)
