"""What a replaced attribute leaves behind, and modules that cannot be imported for a while."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from ts_handlers.system.patching import hidden_modules, hide_module, replaced_attribute


class Base:
    def inherited(self) -> str:
        return "inherited"


class Owner(Base):
    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    def method(self) -> str:
        return "method"


@pytest.mark.parametrize("name", ["static", "of_class", "method", "inherited"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_class_is_as_before(name: str, fails: bool) -> None:
    before, answer = dict(vars(Owner)), getattr(Owner(), name)()
    try:
        with replaced_attribute(Owner, name, staticmethod(lambda: "replaced")):
            assert getattr(Owner(), name)() == "replaced"
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert dict(vars(Owner)) == before
    assert getattr(Owner(), name)() == answer


def test_blocks_inside_each_other_end_in_order() -> None:
    module: Any = types.ModuleType("module")
    module.value = 0
    with replaced_attribute(module, "value", 1):
        with replaced_attribute(module, "value", 2):
            assert module.value == 2
        assert module.value == 1
    assert module.value == 0


def test_what_is_not_there_is_an_error_unless_optional() -> None:
    module = types.ModuleType("module")
    with pytest.raises(AttributeError, match="has no attribute 'gone'"), replaced_attribute(module, "gone", 1):
        pass
    for owner in (module, None):
        with replaced_attribute(owner, "gone", 1, optional=True):
            assert not hasattr(owner, "gone")


def test_a_hidden_module_can_be_imported_afterwards() -> None:
    assert "this" not in sys.modules
    with hidden_modules("this", "sys"), pytest.raises(ModuleNotFoundError):
        import this  # noqa: F401
    assert "this" not in sys.modules
    assert isinstance(sys.modules["sys"], types.ModuleType)


def test_a_module_can_be_hidden_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "no_such_module", raising=False)
    hide_module("no_such_module")
    with pytest.raises(ModuleNotFoundError):
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert sys.modules.pop("no_such_module", "") is None
