"""Digests of files, tensors and source code, and facts about this machine and toolchain.

Everything here works without importing a compiler: it runs on the warm path.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ts_handlers.key.digests import digest_file as digest_file
from ts_handlers.key.digests import digest_text as digest_text
from ts_handlers.version import __version__


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}:{_kind(tensor)}{tuple(tensor.shape)};".encode())
        for part in dense_parts(tensor):
            if part is not tensor:
                digest.update(f"{part.dtype}:{tuple(part.shape)};".encode())
            raw = part.cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(raw.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that hold a tensor's content: itself, or the indices and values of a sparse one.

    Examples
    --------
    >>> [part.tolist() for part in dense_parts(torch.tensor([0.0, 0.0, 7.0]).to_sparse())]
    [[[2]], [7.0]]
    """
    if tensor.layout == torch.strided and not tensor.is_quantized:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        together = tensor.coalesce()
        return [together.indices(), together.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]  # which holds the scales and zero points
    return [tensor.to_dense()]


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}:" if tensor.layout == torch.strided else f"{tensor.dtype}:{tensor.layout}:"


def tensor_specification(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of the names, shapes and dtypes, not of the values."""
    lines = (f"{name}:{_kind(tensors[name])}{tuple(tensors[name].shape)}" for name in sorted(tensors))
    return digest_text("\n".join(lines))


# What `-march=native` may use, by the kernel's names; other flags of /proc/cpuinfo say nothing about code.
_ISA = re.compile(
    r"^(sse\w*|ssse3|avx\w*|amx\w*|fma4?|bmi[12]|f16c|aes|vaes|v?pclmulqdq|gfni|sha_ni|sha512|sm[34]|adx|abm|lzcnt|"
    r"popcnt|movbe|rdrand|rdseed|rdpid|xsave\w*|clflushopt|clwb|clzero|cldemote|mwaitx|prefetchw\w*|3dnow\w*|xop|tbm|lwp|"
    r"serialize|movdir\w*|waitpkg|wbnoinvd|cx16|fsgsbase|lahf_lm|pku|ptwrite|"
    r"asimd\w*|sve\w*|fp|fphp|crc32|atomics|bf16|i8mm|dotprod|sme\w*)$"
)


@functools.cache
def cpu_identity() -> str:
    """Architecture and the instruction sets that a compiler may use here, for example ``x86_64 avx avx2 ...``.

    Inductor compiles with ``-march=native``, so code built on a richer processor kills the process on a lesser one.
    """
    flags: set[str] = set()
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    if match:
        flags = {flag for flag in match[1].split() if _ISA.match(flag)}
    if not flags:
        flags = {torch.backends.cpu.get_cpu_capability().lower()}
    return " ".join([platform.machine(), *sorted(flags)])


def device_identity(device: torch.device) -> str:
    """What a device artifact depends on; never the device's index: an artifact of cuda:0 must serve cuda:1."""
    if device.type != "cuda":
        return cpu_identity()
    properties = torch.cuda.get_device_properties(device)
    gib = round(properties.total_memory / 2**30)
    # Host code is compiled too: the wrapper and the launchers are C++ built for the host's processor.
    return f"{properties.name} sm_{properties.major}{properties.minor} {gib}GiB | {cpu_identity()}"


def device_slug(device: torch.device) -> str:
    """A short folder name for `device_identity`, for example ``cpu-x86_64-AVX512`` or ``cuda-NVIDIA_H200-sm_90``."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"cuda-{properties.name}-sm_{properties.major}{properties.minor}"
    else:
        name = f"{device.type}-{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


@functools.cache
def toolchain(device_type: str) -> str:
    """Versions on which host and device code depend, readable without importing what they name."""
    facts = [f"torch={torch.__version__}", f"git={str(torch.version.git_version)[:12]}"]
    facts.append(f"libc={_libc()}")
    if device_type == "cuda":
        facts.append(f"cuda={torch.version.cuda}")
        cudnn_version: Any = torch.backends.cudnn.version
        facts.append(f"cudnn={cudnn_version()}")
        facts.append(f"triton={distribution_version('triton') or 'none'}")
    return " ".join(facts)


def _libc() -> str:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "unknown").replace(" ", "-")
    except (ValueError, OSError):
        return "-".join(platform.libc_ver())


@functools.cache
def runtime_identity() -> dict[str, str]:
    """What loaded native code meets beside its own toolchain: a crash with one of them says nothing of another."""
    libstdcxx = mapped_library("libstdc++")
    return {
        "torch": f"{torch.__version__} {str(torch.version.git_version)[:12]}",
        "libc": _libc(),
        "libstdc++": "none" if libstdcxx is None else libstdcxx.name,
        "driver": _first_line(Path("/sys/module/nvidia/version")),
        "python": python_identity(),
        "ts_handlers": __version__,
    }


def mapped_library(name: str) -> Path | None:
    """Path of a shared library of this process, by the beginning of its file name; its end is its full version."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    match = re.search(rf"(/\S*/{re.escape(name)}[^/\s]*)$", maps, re.MULTILINE)
    return Path(match[1]) if match else None


def _first_line(path: Path) -> str:
    try:
        return path.read_text().partition("\n")[0].strip()
    except OSError:
        return "none"


def python_identity() -> str:
    """Interpreter version, for artifacts that hold Python code or pickles."""
    return f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"


@functools.cache
def compiler_identity() -> str:
    """First line of the C++ compiler's ``--version``, or ``none``."""
    compiler = os.environ.get("CXX", "g++")
    try:
        result = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return result.stdout.splitlines()[0].strip() if result.stdout else "none"


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution, or None; reads metadata and imports nothing."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    # Parsing all of the metadata, which holds the project's description, takes several times as long.
    headers = (found.read_text("METADATA") or "").partition("\n\n")[0]
    match = re.search(r"^Version:[ \t]*(\S+)[ \t]*$", headers, re.MULTILINE)
    return match[1] if match else found.version


def libraries(modules: Iterable[str], search: Path | None = None) -> str:
    """Versions of the distributions behind top-level module names, for example ``transformers=5.23.0``.

    The standard library, torch (which is in the toolchain) and modules that lie in `search` (whose files are digested
    themselves) are left out. A module that belongs to no distribution, such as one on PYTHONPATH, is represented by a
    digest of its files, because no version tells when it changes.
    """
    import importlib.util

    facts = []
    for module in sorted(set(modules)):
        if module in sys.stdlib_module_names or module in ("torch", "ts_handlers", "ts"):
            continue
        if search is not None and ((search / f"{module}.py").exists() or (search / module).is_dir()):
            continue
        version = distribution_version(module)
        if version is None:
            names = importlib.metadata.packages_distributions().get(module, [])
            version = ",".join(f"{name}-{distribution_version(name)}" for name in sorted(set(names))) or None
        if version is None or is_editable(module):
            spec = importlib.util.find_spec(module)
            version = digest_module(spec.origin) if spec is not None and spec.origin else "absent"
        facts.append(f"{module}={version}")
    return " ".join(facts)


def is_editable(name: str) -> bool:
    """Whether a distribution is installed in editable mode: its files change and its version does not."""
    try:
        text = importlib.metadata.distribution(name).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(text and '"editable": true' in text)


def digest_module(origin: str) -> str:
    """Digest of a module's file, or of every Python file of a package whose ``__init__.py`` is given."""
    path = Path(origin)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.name}:{digest_file(file)};".encode())
    return "sha256-" + digest.hexdigest()[:16]
