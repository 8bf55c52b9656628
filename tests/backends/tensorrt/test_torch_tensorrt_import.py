"""A broken torch-tensorrt installation, in each way that was seen, is a reason and not a dead worker."""

from __future__ import annotations

import logging
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Register
from tests.support.file_backend import FileBackend
from tests.support.models import archive_source, settings_of
from tests.support.subprocesses import finish, start_python
from ts_handlers import start_model
from ts_handlers.backends.base import Built, Target, Workspace
from ts_handlers.backends.tensorrt import torch_tensorrt_import
from ts_handlers.backends.tensorrt.torch_tensorrt_import import import_torch_tensorrt
from ts_handlers.errors import BuildError

RAISES = {
    "no libnvinfer": ("raise Exception('libnvinfer.so.10 is not found')", "Exception: libnvinfer.so.10 is not found"),
    "torch without CUDA": (
        "assert False, 'Torch not compiled with CUDA enabled'",
        "AssertionError: Torch not compiled",
    ),
    "C++ library": ("raise OSError('libtorchtrt.so: undefined symbol')", "OSError: libtorchtrt.so: undefined symbol"),
    "user id without a name": ("raise KeyError('getpwuid(): uid not found: 4711')", "KeyError: .*uid not found: 4711"),
    "import error": ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
}
DIES = {
    "exits": ("import os; os._exit(3)", "ended the process with exit code 3"),
    "exits as if all were well": ("import os; os._exit(0)", "ended the process with exit code 0"),
    "calls sys.exit": ("import sys; sys.exit(4)", "ended the process with exit code 4"),
    "segmentation fault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
}

Install = Callable[[str], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a torch_tensorrt with this code, as if the process were fresh."""
    before = dict(sys.modules)

    def put(code: str) -> Path:
        package = tmp_path / "torch_tensorrt"
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(code))
        (package / "part.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        return package

    sys.modules.pop("torch_tensorrt", None)
    torch_tensorrt_import._import.cache_clear()
    yield put
    torch_tensorrt_import._import.cache_clear()
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in ("torch_tensorrt", "tensorrt"):
            del sys.modules[name]
    logging.captureWarnings(False)


@pytest.mark.processes
@pytest.mark.parametrize("way", [*RAISES, *DIES])
def test_the_reason_is_told_and_nobody_tries_again(way: str, install: Install, tmp_path: Path) -> None:
    code, reason = {**RAISES, **DIES}[way]
    log = tmp_path / "imports"
    install(f"open({str(log)!r}, 'a').write('x')\n{code}")
    for _ in range(2):
        with pytest.raises(BuildError, match=f"import torch_tensorrt fails: .*{reason}"):
            import_torch_tensorrt()
    assert log.read_text() == "x"  # once, in the child process
    with pytest.raises(ModuleNotFoundError):
        import torch_tensorrt  # noqa: F401


def test_not_installed() -> None:
    if torch_tensorrt_import._missing() is None:
        pytest.skip("torch-tensorrt is installed")
    with pytest.raises(BuildError, match="torch_tensorrt is not installed; install torch-tensorrt"):
        import_torch_tensorrt()
    torch_tensorrt_import._import.cache_clear()
    del sys.modules["torch_tensorrt"]


@pytest.mark.processes
def test_an_import_that_never_ends_is_stopped(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("import threading; threading.Event().wait()")
    monkeypatch.setattr(torch_tensorrt_import, "PROBE_SECONDS", 0.5)
    with pytest.raises(BuildError, match=r"does not end: it was stopped after 0\.5 s"):
        import_torch_tensorrt()


SIDE_EFFECTS = """
    import logging, sys, types
    from torch_tensorrt import part
    logging.captureWarnings(True)
    sys.modules["tensorrt"] = types.ModuleType("tensorrt")
"""


@pytest.mark.processes
@pytest.mark.parametrize("fails_here", [False, True])
def test_side_effects_are_undone(fails_here: bool, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", ours)
    # Something that only this process has: the probe in the child process succeeds.
    monkeypatch.setattr(sys, "only_in_this_process", True, raising=False)
    last = "if hasattr(sys, 'only_in_this_process'): raise RuntimeError('only here')"
    install(textwrap.dedent(SIDE_EFFECTS) + (last if fails_here else ""))
    if fails_here:
        with pytest.raises(BuildError, match="import torch_tensorrt fails: RuntimeError: only here"):
            import_torch_tensorrt()
        assert sys.modules["torch_tensorrt"] is None
        assert "torch_tensorrt.part" not in sys.modules
    else:
        module = import_torch_tensorrt()
        assert module is import_torch_tensorrt()
        assert sys.modules["torch_tensorrt.part"] is module.part
    assert sys.modules["tensorrt"] is ours
    assert logging._warnings_showwarning is None  # type: ignore[attr-defined]


@pytest.mark.processes
def test_the_reason_is_in_describe(
    install: Install, archive: Path, monkeypatch: pytest.MonkeyPatch, register: Register
) -> None:
    class Importing(FileBackend):
        """Imports it where the backend `tensorrt` does, which asks for a GPU before."""

        name = "tensorrt"

        def build(self, target: Target, workspace: Workspace) -> Built:
            import_torch_tensorrt()
            raise AssertionError

    install(RAISES["C++ library"][0])
    module = types.ModuleType("importing_backend")
    module.BACKEND = Importing()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register("tensorrt", f"{module.__name__}:BACKEND")
    settings = settings_of(backends=["tensorrt", "eager"], store=str(archive.parent / "store"))
    model = start_model(archive_source(archive), settings)
    facts = model.describe()
    assert facts["backend"] == "eager"
    (fallback,) = facts["fallbacks"]
    assert fallback["backend"] == "tensorrt"
    assert "OSError: libtorchtrt.so: undefined symbol" in fallback["reason"]


@pytest.mark.processes
def test_the_handler_is_imported_beside_every_broken_installation(tmp_path: Path) -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    code = """
        from ts_handlers import CompiledHandler
        import sys
        assert "torch_tensorrt" not in sys.modules
        try:
            import torch_tensorrt
        except BaseException as error:
            print(type(error).__name__)
    """
    processes = {}
    for index, name in enumerate(("Exception", "AssertionError", "OSError", "KeyError")):
        package = tmp_path / str(index) / "torch_tensorrt"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise {name}('broken')")
        processes[name] = start_python(
            f"import sys; sys.path.insert(0, {str(package.parent)!r})\n{textwrap.dedent(code)}"
        )
    for name, process in processes.items():
        assert finish(process).strip().splitlines()[-1] == name  # it is really broken, and we were not hurt
