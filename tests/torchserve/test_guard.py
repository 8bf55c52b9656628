"""Artifacts that end the worker in native code: each is serving again after one restart, and nobody else notices."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from tests.support.torchserve_archives import ROWS, ArchiveFactory, expected
from tests.support.torchserve_records import FirstStart, ServerFactory, copy_store, starts
from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.store.entry import list_files, read_manifest, write_manifest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the artifacts that kill the worker")

# What the library does while it is opened, the settings of the guard, and the reason that must be given.
KILLERS = {
    "segfaults": ("*(volatile int*)8 = 1;", "load_seconds: 300", "Segmentation fault while loading"),
    "aborts": ("std::abort();", "load_seconds: 300", "Aborted while loading"),
    "hangs": ("for (volatile long i = 0;; i = i + 1) {}", "load_seconds: 4", "took longer than 4 s"),
    "allocates": (
        "for (;;) { char* p = new char[1 << 22]; std::memset(p, 1, 1 << 22); }",
        "load_memory_mb: 400",
        "Aborted while loading or warming up, allocations bounded to 400 MiB",
    ),
}


def compile_killer(body: str, path: Path) -> None:
    source = path.with_suffix(".cpp")
    includes = "#include <cstdlib>\n#include <cstring>\n"
    source.write_text(f"{includes}__attribute__((constructor)) static void opened() {{ {body} }}\n", "utf-8")
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    source.unlink()


def plant(store: Path, name: str, body: str) -> None:
    """Give a model the tiny model's entry with a library that kills; the manifest is right about its digest."""
    target = store / "entries" / name
    shutil.copytree(store / "entries" / "tiny", target)
    (manifest,) = target.rglob("manifest.json")
    (library,) = manifest.parent.rglob("*.so")
    compile_killer(body, library)
    changed = msgspec.structs.replace(read_manifest(manifest.parent), files=list_files(manifest.parent))
    write_manifest(manifest.parent, changed)


def test_artifacts_that_end_the_worker(
    archives: ArchiveFactory,
    tiny: str,
    first_start: FirstStart,
    make_server: ServerFactory,
    tmp_path: Path,
) -> None:
    store = copy_store(first_start, tmp_path / "store")
    for name, (body, limits, _) in KILLERS.items():
        plant(store, name, body)
        settings = f"[aot_inductor, eager]\n    guard: {{{limits}}}"
        archives.tiny(name, replace={"model-config.yaml": ("[aot_inductor, inductor, eager]", settings)})
    with make_server([tiny, *KILLERS], store) as server:
        server.wait_ready(tiny)
        pids = server.worker_pids(tiny)
        for name, (_, _, reason) in KILLERS.items():
            server.wait_ready(name, tolerate_restarts=True)
            description = server.describe(name)
            assert description["backend"] == "eager"
            assert description["counters"]["quarantined"] == 1
            assert reason in description["fallbacks"][0]["reason"]
            for row, right in zip(server.predict(name, ROWS).json(), expected(1, ROWS), strict=True):
                assert row == pytest.approx(right, abs=1e-6)
            assert len(starts(server, name)) == 1
            processes = re.findall(rf"W-\d+-{name}_1.0-stdout .*Torch worker started", server.log())
            assert len(processes) == 2
        assert server.predict(tiny, ROWS).json() == first_start.answer
        assert server.worker_pids(tiny) == pids
    assert sorted(record.model for record in read_quarantines(store)) == sorted(KILLERS)
