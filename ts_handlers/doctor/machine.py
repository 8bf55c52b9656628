"""Checks of the compiler, the processor, the GPU and the libraries that artifacts meet."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ts_handlers.backends.tensorrt.library import FLAVOURS
from ts_handlers.doctor.base import Finding, Question, probe, run
from ts_handlers.key import fingerprint

_SAMPLE = "#include <cmath>\n#include <omp.h>\nint f() { return omp_get_max_threads(); }\n"

_GPU = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    facts["available"] = torch.cuda.is_available()
    facts["devices"] = [
        [torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)]
        for i in range(torch.cuda.device_count() if facts["available"] else 0)
    ]
    facts["architectures"] = torch.cuda.get_arch_list() if facts["available"] else []
facts["warnings"] = [str(warning.message) for warning in caught]
"""


def check_compiler(question: Question) -> Iterator[Finding]:
    """A C++ compiler, which only building needs: tried on a small shared library with OpenMP."""
    compiler = os.environ.get("CXX", "g++")
    identity = fingerprint.compiler_identity()
    if identity == "none":
        found = f"no C++ compiler ({compiler}): artifacts can be loaded, but not built"
        yield Finding("compiler", "warn", found, "install g++, or name another with CXX; not needed where all is built")
        return
    with tempfile.TemporaryDirectory(prefix="ts_handlers-doctor-") as directory:
        source = Path(directory) / "sample.cpp"
        source.write_text(_SAMPLE, "utf-8")
        command = [compiler, "-shared", "-fPIC", "-fopenmp", "-o", str(source.with_suffix(".so")), str(source)]
        code, text = run(command)
    if code != 0:
        first = next((line for line in text.splitlines() if "error" in line.lower()), text.strip())[:200]
        remedy = "install the compiler's C++ and OpenMP headers (libstdc++-dev, libgomp), or name another with CXX"
        yield Finding("compiler", "fail", f"{identity}: {first}", remedy)
        return
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        found = f"{identity}; no {headers}, which the backend inductor compiles against"
        yield Finding("compiler", "warn", found, f"install python{sysconfig.get_python_version()}-dev")
        return
    yield Finding("compiler", "ok", identity)


def check_cpu(question: Question) -> Iterator[Finding]:
    """What the compiler may use, and how many threads an artifact would have."""
    capability = torch.backends.cpu.get_cpu_capability()
    usable = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    found = f"{platform.machine()} {capability}, {usable} processors, {threads} threads"
    if capability == "DEFAULT" and platform.machine() == "x86_64":
        remedy = "run where AVX2 is (a virtual machine may hide it); artifacts of other machines will miss here"
        yield Finding("cpu", "warn", f"{found}: no AVX2", remedy)
    elif threads > usable:
        remedy = f"set OMP_NUM_THREADS={usable}; the number of threads is part of the cache key"
        yield Finding("cpu", "warn", f"{found}: more threads than processors", remedy)
    else:
        yield Finding("cpu", "ok", found)


def check_gpu(question: Question) -> Iterator[Finding]:
    """GPU, driver and torch's CUDA; asked in a child process."""
    version = Path("/sys/module/nvidia/version")
    driver = version.read_text().strip() if version.exists() else None
    if torch.version.cuda is None:
        if driver is None:
            yield Finding("gpu", "ok", f"none; torch {torch.__version__} is built for the CPU")
        else:
            found = f"driver {driver} is loaded, but torch {torch.__version__} is built for the CPU"
            yield Finding("gpu", "warn", found, "install a CUDA build of torch to use the GPU")
        return
    facts, problem = probe(_GPU)
    if facts is None:
        remedy = "run `python -c 'import torch; torch.cuda.init()'` and look at nvidia-smi"
        yield Finding("gpu", "fail", f"asking torch about CUDA failed: {problem}", remedy)
        return
    supports = f"torch {torch.__version__} with CUDA {torch.version.cuda}, driver {driver or 'not seen'}"
    if not facts["available"]:
        reason = "; ".join(facts["warnings"]) or "no device is visible"
        remedy = (
            "start the container with a GPU (--gpus all, or the device plugin), look at CUDA_VISIBLE_DEVICES, or "
            f"install a driver for CUDA {torch.version.cuda}"
        )
        yield Finding("gpu", "warn", f"{supports}: {reason}", remedy)
        return
    for name, major, minor in facts["devices"]:
        built_for = [arch for arch in facts["architectures"] if re.fullmatch(r"(sm|compute)_\d+\w*", arch)]
        numbers = [int(re.sub(r"\D", "", arch)) for arch in built_for]
        if numbers and not any(number // 10 == major and number <= major * 10 + minor for number in numbers):
            found = f"{name} is sm_{major}{minor}; {supports} was built for {', '.join(built_for)}"
            yield Finding("gpu", "fail", found, "install a torch build that has this architecture")
        else:
            yield Finding("gpu", "ok", f"{name} sm_{major}{minor}; {supports}")


def check_triton(question: Question) -> Iterator[Finding]:
    """Triton, with which Inductor builds for a GPU."""
    version = fingerprint.distribution_version("triton")
    if version is not None:
        yield Finding("triton", "ok", version)
    elif torch.version.cuda is None:
        yield Finding("triton", "ok", "not installed, not needed on the CPU")
    else:
        found = "not installed: nothing can be built for the GPU with aot_inductor or inductor"
        yield Finding("triton", "warn", found, "pip install triton, in the version that torch asks for")


def check_tensorrt(question: Question) -> Iterator[Finding]:
    """Each flavour of TensorRT: what is installed, whether it fits torch, and whether it imports.

    A broken installation raises anything from AssertionError to KeyError, or ends the process, so a child imports it.
    """
    installed = False
    for flavour, packaging in FLAVOURS.items():
        converter, runtime = packaging.converter, packaging.modules[0]
        names = (converter, *packaging.distributions)
        versions = {name: fingerprint.distribution_version(name) for name in names}
        present = [f"{name} {version}" for name, version in versions.items() if version is not None]
        if not present:
            continue
        installed = True
        found = ", ".join(present)
        converter_version = versions[converter]
        if converter_version is not None and converter_version.split(".")[:2] != torch.__version__.split(".")[:2]:
            remedy = f"pip install '{converter}=={'.'.join(torch.__version__.split('.')[:2])}.*'"
            yield Finding(flavour, "fail", f"{found}: not for torch {torch.__version__}", remedy)
            continue
        modules = [runtime, *(["torch_tensorrt"] if converter_version is not None else [])]
        for module in modules:
            facts, problem = probe(f"import {module}\nfacts['version'] = str({module}.__version__)")
            if facts is None:
                remedy = (
                    "the backend tensorrt will fall to the next one; reinstall the package, or put the folder of its "
                    "shared libraries on LD_LIBRARY_PATH"
                )
                yield Finding(flavour, "fail", f"{found}: import {module} failed: {problem}", remedy)
                break
        else:
            if converter_version is not None:
                yield Finding(flavour, "ok", found)
            else:
                problem = f"{found}; no {converter}: plans can be loaded, but not built"
                yield Finding(flavour, "warn", problem, f"pip install {converter}")
    if not installed:
        yield Finding("tensorrt", "ok", "not installed; only the backends tensorrt and torch_tensorrt need it")


def check_libstdcxx(question: Question) -> Iterator[Finding]:
    """The C++ library that artifacts meet: loadable (docs/decisions/0003), and not older than the compiler's."""
    try:
        ctypes.CDLL("libstdc++.so.6")
    except OSError as error:
        remedy = "install libstdc++6; without it artifacts of some torch builds end the process when they are loaded"
        yield Finding("libstdc++", "fail", str(error), remedy)
        return
    here = fingerprint.mapped_library("libstdc++")
    mine = _newest_symbols(here)
    found = f"{here.name if here else 'loaded'}, GLIBCXX_3.4.{mine}"
    code, text = run([os.environ.get("CXX", "g++"), "-print-file-name=libstdc++.so.6"])
    compilers = Path(text.strip()) if code == 0 else None
    theirs = _newest_symbols(compilers)
    if mine is not None and theirs is not None and theirs > mine:
        remedy = (
            "put the compiler's libstdc++ first (LD_LIBRARY_PATH), update the one of this Python environment, or build "
            "with a compiler that is not newer"
        )
        problem = f"{found}, older than the compiler's GLIBCXX_3.4.{theirs}: what is built may not load"
        yield Finding("libstdc++", "warn", problem, remedy)
    else:
        yield Finding("libstdc++", "ok", found)


def _newest_symbols(library: Path | None) -> int | None:
    """The last number of the newest ``GLIBCXX_3.4.n`` in a libstdc++."""
    try:
        content = library.read_bytes() if library is not None and library.is_absolute() else b""
    except OSError:
        return None
    return max((int(number) for number in re.findall(rb"GLIBCXX_3\.4\.(\d+)", content)), default=None)
