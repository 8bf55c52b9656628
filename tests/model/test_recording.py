"""What making an eager model reads from outside its archive, as the recorder names it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.models import archive_source, write_archive
from tests.support.subprocesses import run_python
from ts_handlers.errors import ModelError

MODEL = """
import os
import torch
{imports}

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        {read}

    def forward(self, x):
        return self.layer(x)
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the search path, whose modules are forgotten afterwards."""
    folder = tmp_path / "outside"
    folder.mkdir()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def recorded(archive: Path, imports: str = "", read: str = "pass", **options: object) -> set[str]:
    write_archive(archive, MODEL.format(imports=imports, read=read), seed=None)
    source = archive_source(archive, None, **options)
    source.eager()
    return set(source.surroundings.names)


def write_distribution(folder: Path, name: str, version: str, code: str = "") -> None:
    """A distribution as an installer leaves it, with one module of its name."""
    for old in folder.glob(f"{name}-*.dist-info"):
        (old / "METADATA").unlink()
        (old / "top_level.txt").unlink()
        old.rmdir()
    (folder / f"{name}.py").write_text(code)
    facts = folder / f"{name}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (facts / "top_level.txt").write_text(f"{name}\n")


READS = {
    "subscript": "os.environ['SCALE']",
    "get": "os.environ.get('SCALE', '1')",
    "getenv": "os.getenv('SCALE')",
    "contains": "'SCALE' in os.environ",
    "setdefault": "os.environ.setdefault('SCALE', '1')",
    "computed": "os.environ.get('SC' + 'ALE')",
    "expandvars": "os.path.expandvars('$SC' 'ALE/x')",
    "copy": "os.environ.copy().get('SCALE')",
    "prefix": "[os.environ[key] for key in os.environ if key.startswith('SCA' + 'LE')] or 'SCA_'",
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_variable_is_named_however_it_is_read(read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALE", "2")
    names = recorded(tmp_path / "archive", read=read)
    assert names == ({"variable:SCALE"} if "'SCA_'" not in read else set())


def test_a_prefix_in_the_code_names_the_variables_that_are_enumerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYAPP_SCALE", "2")
    names = recorded(tmp_path / "archive", read="[os.environ[k] for k in os.environ if k.startswith('MYAPP_')]")
    assert names == {"variable:MYAPP_SCALE"}


def test_environ_imported_by_name_is_watched(tmp_path: Path) -> None:
    assert recorded(tmp_path / "archive", "from os import environ", "environ.get('SC' + 'ALE')") == {"variable:SCALE"}


def test_a_variable_that_a_library_reads_counts_if_the_code_names_it(tmp_path: Path, outside: Path) -> None:
    code = "import os\nclass Env:\n    def str(self, name):\n        os.environ.get('LIBRARY_HOME')\n"
    write_distribution(outside, "envlib", "1.0", code + "        return os.environ.get(name)\n")
    assert recorded(tmp_path / "archive", "import envlib", "envlib.Env().str('SCALE')") == {"variable:SCALE"}


FILES = {
    "open": "open({path!r}, 'rb').read()",
    "pathlib": "__import__('pathlib').Path({path!r}).read_text()",
    "os.open": "os.close(os.open({path!r}, os.O_RDONLY))",
    "torch.load": "torch.load({path!r})",
    "torch.load mapped": "torch.load({path!r}, mmap=True)",
    "numpy": "__import__('numpy').fromfile({path!r})",
    "safetensors": "__import__('safetensors.torch').torch.load_file({path!r})",
    "torch.jit": "torch.jit.load({path!r})",
}


def write_table(read: str, path: Path) -> str:
    """Write what one of `FILES` reads; returns the code that reads it there."""
    if "safetensors" in read:
        pytest.importorskip("safetensors.torch").save_file({"x": torch.ones(2)}, path)
    elif "jit" in read:
        torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    else:
        torch.save({"x": torch.ones(2)}, path)
    return read.format(path=str(path)).replace("read_text", "read_bytes")


@pytest.mark.parametrize("read", FILES.values(), ids=FILES)
def test_a_file_outside_is_named_however_it_is_opened(read: str, tmp_path: Path) -> None:
    path = tmp_path / "table.bin"
    names = recorded(tmp_path / "archive", read=write_table(read, path))
    assert {name for name in names if not name.startswith("distribution:")} == {f"file:{path}"}


DEFERRED = """
import json, sys
hooks = []
sys.addaudithook = hooks.append
from tests.support.models import archive_source
source = archive_source(sys.argv[1], None)
with source.surroundings.deferring():
    source.eager()
files = sorted(name for name in source.surroundings.names if not name.startswith("distribution:"))
print(json.dumps([len(hooks), files]))
"""


@pytest.mark.processes
def test_a_start_that_hits_names_the_same_files_without_an_audit_hook(tmp_path: Path) -> None:
    """The hook stays: it cost a warm ResNet-50 with `inductor` 0.25 s, for the 320,000 events of tracing."""
    reads, expected = [], set()
    for number, read in enumerate(FILES.values()):
        path = tmp_path / f"table{number}.bin"
        reads.append(write_table(read, path))
        expected.add(f"file:{path}")
    reads.append(f"os.listdir({str(tmp_path)!r}), list(os.scandir(path={str(tmp_path)!r}))")
    scratch = str(tmp_path / "scratch")
    reads.append(f"open({scratch!r}, mode='w').close(), open(file={scratch!r}).close()")
    reads.append("type('Reader', (), {'open': open})().open('/proc/self/stat').close()")  # a builtin is no method
    archive = write_archive(tmp_path / "archive", MODEL.format(imports="", read="; ".join(reads)), seed=None)
    hooks, names = json.loads(run_python(DEFERRED, archive).splitlines()[-1])
    assert hooks == 0
    assert set(names) == expected | {f"folder:{tmp_path}"}


def test_a_file_that_is_not_there_yet_is_named(tmp_path: Path) -> None:
    code = f"try: open({str(tmp_path / 'no')!r})\n        except OSError: pass"
    assert recorded(tmp_path / "archive", read=code) == {f"file:{tmp_path / 'no'}"}


def test_what_the_model_writes_itself_is_not_named(tmp_path: Path) -> None:
    path = str(tmp_path / "scratch")
    assert recorded(tmp_path / "archive", read=f"open({path!r}, 'w').close(); open({path!r}).read()") == set()


def test_temporary_files_and_the_kernel_are_not_named(tmp_path: Path) -> None:
    read = "open('/proc/self/stat').read(); f = __import__('tempfile').NamedTemporaryFile(); open(f.name).read()"
    assert recorded(tmp_path / "archive", read=read) == set()


def test_a_listed_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    read = f"os.listdir({str(tmp_path / 'labels')!r})"
    assert recorded(tmp_path / "archive", read=read) == {f"folder:{tmp_path / 'labels'}"}


def test_files_of_the_archive_that_the_digest_leaves_out_are_named(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", seed=None)
    (archive / "vocab.txt").write_text("a")
    (archive / "other.bin").write_text("a")
    (archive / "labels.txt").write_text("a")
    (archive / "my_handler.py").write_text("SCALE = 1\n")
    here = "os.path.dirname(os.path.abspath(__file__))"
    read = f"[open(os.path.join({here}, n)).read() for n in ('vocab.txt', 'other.bin', 'labels.txt')]"
    names = recorded(archive, "import my_handler", read, ignored_files=["labels.txt", "my_handler.py"])
    sys.modules.pop("my_handler")
    assert names == {"archive:vocab.txt", "archive:labels.txt", "archive:my_handler.py"}


def test_distributions_behind_distributions_are_named(tmp_path: Path, outside: Path) -> None:
    write_distribution(outside, "lib_a", "1.0", "import lib_b\n")
    write_distribution(outside, "lib_b", "1.0", "from lib_c import thing\n")
    write_distribution(outside, "lib_c", "1.0", "def thing(): pass\n")
    write_distribution(outside, "lib_d", "1.0")
    assert recorded(tmp_path / "archive", "import lib_a") == {"distribution:lib_b", "distribution:lib_c"}


def test_modules_of_no_distribution_are_named_and_their_reads_count(tmp_path: Path, outside: Path) -> None:
    write_distribution(outside, "lib_a", "1.0", "import helpers\n")
    (outside / "helpers.py").write_text("import os\nSCALE = os.environ.get('SC' + 'ALE')\n")
    assert recorded(tmp_path / "archive", "import lib_a") == {"module:helpers", "variable:SCALE"}
    # The module does not read again in this process.
    assert recorded(tmp_path / "other", "import lib_a") == {"module:helpers", "variable:SCALE"}


def test_what_a_library_reads_while_it_is_imported_is_not_named(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = f"import os\nHOME = os.environ.get('HF_HOME')\nopen({str(tmp_path / 'config.json')!r}).read()\n"
    write_distribution(outside, "lib_a", "1.0", code)
    assert recorded(tmp_path / "archive", "import lib_a") == set()


def test_a_model_that_reads_nothing_has_no_names(archive: Path) -> None:
    source = archive_source(archive)
    source.prepare()
    source.eager()
    assert source.surroundings.names == frozenset()


def test_values_are_those_of_before_the_model_changed_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCALE", raising=False)
    write_archive(tmp_path / "archive", MODEL.format(imports="", read="os.environ.setdefault('SCALE', '1')"), seed=None)
    source = archive_source(tmp_path / "archive", None)
    before = source.surroundings.value("variable:SCALE")
    source.eager()
    assert os.environ["SCALE"] == "1"
    monkeypatch.setenv("SCALE", "1")
    assert before == source.surroundings.value("variable:SCALE") == "absent"


def test_a_file_that_changes_while_the_model_is_made_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("1")
    (tmp_path / "other").write_text("22")
    with pytest.raises(ModelError, match="changed while the model was made"):
        recorded(
            tmp_path / "archive",
            read=f"open({str(path)!r}).read(); os.replace({str(tmp_path / 'other')!r}, {str(path)!r})",
        )


def test_reads_of_threads_that_the_model_starts_count(tmp_path: Path) -> None:
    (tmp_path / "table").write_text("1")
    job = f"lambda: open({str(tmp_path / 'table')!r}).read()"
    read = f"t = __import__('threading').Thread(target={job}); t.start(); t.join()"
    assert recorded(tmp_path / "archive", read=read) == {f"file:{tmp_path / 'table'}"}
