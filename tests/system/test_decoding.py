"""JSON to structs, in several threads."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

import ts_handlers
from tests.support.subprocesses import run_python
from ts_handlers.system.decoding import convert, decode_json, decoder_of

STORM = """
import sys, threading, types
from ts_handlers.system.decoding import decode_json
sys.setswitchinterval(1e-7)
SOURCE = '''
from __future__ import annotations
import msgspec
class Inner(msgspec.Struct):
    numbers: tuple[int, int, int]
    more: dict[str, float] | None
class Outer(msgspec.Struct):
    name: str
    files: dict[str, Inner]
'''
DATA = b'{"name": "x", "files": {"f": {"numbers": [1, 2, 3], "more": {"q": 1.0}}}}'
for number in range(300):
    module = sys.modules[f"m{number}"] = types.ModuleType(f"m{number}")
    exec(SOURCE, module.__dict__)
    begin, found = threading.Barrier(4), []
    def work():
        begin.wait()
        found.append(decode_json(DATA, module.Outer).files["f"].numbers)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [(1, 2, 3)] * 4
print("right")
"""


class Point(msgspec.Struct):
    x: int


@pytest.mark.processes
def test_threads_that_use_a_class_first_at_once_do_not_end_the_process() -> None:
    """With `msgspec.json.decode` it ends with a segmentation fault; the soak met that in a start."""
    assert run_python(STORM).splitlines()[-1] == "right"


def test_decoding_and_converting() -> None:
    assert decode_json(b'{"x": 1}', Point) == convert({"x": 1}, Point) == Point(1)
    assert decoder_of(Point) is decoder_of(Point)
    with pytest.raises(msgspec.ValidationError):
        decode_json(b'{"x": "1"}', Point)


def test_nothing_else_decodes_to_a_class() -> None:
    root = Path(ts_handlers.__file__).parent
    pattern = re.compile(r"msgspec\.(json\.decode|convert|msgpack\.decode)\([^#\n]*type=(?!dict)|msgspec\.convert\(")
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if pattern.search(path.read_text("utf-8"))}
    assert found == {"system/decoding.py"}
