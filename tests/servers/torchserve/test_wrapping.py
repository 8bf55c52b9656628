"""Which class or function of a handler file is wrapped, what is written over it, and what is refused."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from ts_handlers.errors import ModelError
from ts_handlers.servers.torchserve.wrapping import MARK, find_handler, write_handler

ONE = """
import io
from json import JSONDecoder

raise RuntimeError("read, not run")


class TheirHandler:
    class Inner:
        pass

    def initialize(self, context):
        pass

    def handle(self, data, context):
        return data
"""
TWO = """
from ts.torch_handler.base_handler import BaseHandler


class Helper:
    pass


if True:
    class Second(BaseHandler):
        pass
"""
TWO_LINES = """
from their_handler import TheirHandler
from ts_handlers import CompiledHandlerMixin


class Handler(CompiledHandlerMixin, TheirHandler):
    pass
"""


def their(tmp_path: Path, code: str, name: str = "their_handler.py") -> str:
    (tmp_path / name).write_text(textwrap.dedent(code))
    return str(tmp_path / name)


def test_the_two_lines_are_written_over_the_only_class(tmp_path: Path) -> None:
    found = find_handler(their(tmp_path, ONE))
    assert (found.kind, found.name, found.module) == ("class", "TheirHandler", "their_handler")
    write_handler(found, tmp_path / "handler.py")
    assert (tmp_path / "handler.py").read_text() == MARK + TWO_LINES
    write_handler(found, tmp_path / "handler.py")  # its own file may be written again


def test_a_class_that_is_called_handler_keeps_its_name_apart(tmp_path: Path) -> None:
    text = find_handler(their(tmp_path, ONE.replace("TheirHandler", "Handler"))).text()
    assert "from their_handler import Handler as TheirHandler" in text
    assert "class Handler(CompiledHandlerMixin, TheirHandler):" in text


def test_a_class_can_be_chosen_where_a_file_defines_several(tmp_path: Path) -> None:
    path = their(tmp_path, TWO)
    with pytest.raises(ModelError, match=r"several classes \(Helper, Second\).*--class"):
        find_handler(path)
    assert find_handler(path, "Second").name == "Second"
    with pytest.raises(ModelError, match=r"no class 'Third'; it defines Helper, Second"):
        find_handler(path, "Third")


@pytest.mark.parametrize(
    "code",
    [
        "def handle(data, context):\n    return data\n",
        "async def handle(data, context):\n    return data\n",
        "from elsewhere import handle\n",
        "from elsewhere import serve as handle\n",
        "class Service:\n    pass\n\n_service = Service()\nhandle = _service.handle\n",
        "try:\n    import fast\nexcept ImportError:\n    def handle(data, context):\n        return data\n",
        "handle: object = print\n",
    ],
)
def test_a_function_handle_goes_before_any_class(code: str, tmp_path: Path) -> None:
    found = find_handler(their(tmp_path, code))
    assert (found.kind, found.name) == ("function", "handle")
    assert "function = staticmethod(their_handler.handle)" in found.text()


def test_a_function_can_be_named_as_in_the_archiver(tmp_path: Path) -> None:
    path = their(tmp_path, ONE + "\n\ndef pre_processing(data, context):\n    return data\n")
    assert find_handler(f"{path}:pre_processing").name == "pre_processing"
    with pytest.raises(ModelError, match="defines no 'post_processing'"):
        find_handler(f"{path}:post_processing")


def test_a_handler_of_torchserves_own_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    monkeypatch.chdir(tmp_path)
    found = find_handler("image_classifier")
    assert "from ts.torch_handler.image_classifier import ImageClassifier\n" in found.text()
    assert found.file is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "defines neither a class nor a function handle"),
        ("from ts.torch_handler.base_handler import BaseHandler\n", "imported classes do not count"),
        ("def other(data, context):\n    return data\n", "defines neither a class nor a function handle"),
        ("class Broken(:\n", "is no Python source"),
        ("class Empty:\n    pass\n", "no base class and no initialize and no handle, which TorchServe calls"),
        ("class Half:\n    def handle(self, data, context):\n        return data\n", "and no initialize, which"),
        ("from ts_handlers import CompiledHandler\n\n\nclass H(CompiledHandler):\n    pass\n", "archive it as it is"),
        (TWO_LINES, "Handler uses CompiledHandlerMixin already"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_with_the_reason(code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        find_handler(their(tmp_path, code))


def test_files_that_cannot_be_imported_by_name_or_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'my-handler' cannot stand in an import; rename"):
        find_handler(their(tmp_path, ONE, "my-handler.py"))
    with pytest.raises(ModelError, match="cannot be read"):
        find_handler(str(tmp_path / "absent.py"))


def test_only_files_of_its_own_are_overwritten(tmp_path: Path) -> None:
    found = find_handler(their(tmp_path, ONE))
    other = tmp_path / "other.py"
    other.write_text("theirs = True\n")
    for target, message in (
        (other, "was not written by `ts-handlers wrap`"),
        (tmp_path / "their_handler.py", "is the file to wrap"),
        (tmp_path / "sub" / "their_handler.py", "imports a module of the same name"),
        (tmp_path / "ts_handlers.py", "imports a module of the same name"),
        (tmp_path / "a-b.py", "expected the name of a Python module"),
    ):
        with pytest.raises(ModelError, match=message):
            write_handler(found, target)
    write_handler(found, other, force=True)
    assert other.read_text() == MARK + TWO_LINES
