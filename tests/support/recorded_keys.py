"""Archives shaped like those of examples/, and an environment of constants, for keys that are recorded.

Imports nothing of the package, so that an older version of it can be asked for its keys too.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("bert_base", "digits", "minilm", "resnet50")
WEIGHTS = "model.safetensors"
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "first.weight": ("F32", (4, 3)),
    "first.bias": ("F32", (4,)),
    "second.weight": ("F16", (2, 4)),
    "count": ("I64", ()),
}
"""Small tensors in the place of an example's own, which a key sees by their names, dtypes, shapes and bytes only."""
_BYTES = {"F32": 4, "F16": 2, "I64": 8}

TENSORRT = {
    "precision": "autocast",
    "tf32": False,
    "workspace_mb": 64,
    "optimization_level": 3,
    "partial": "module",
    "options": {"min_block_size": 2},
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None]] = {
    "aot_inductor": ("aot_inductor", "cpu", {}, None),
    "aot_inductor, GPU": ("aot_inductor", "cuda", {}, None),
    "aot_inductor, bfloat16, mode": ("aot_inductor", "cpu", {"dtype": "bfloat16"}, {"mode": "max-autotune"}),
    "inductor": ("inductor", "cpu", {}, None),
    "inductor, GPU, options": ("inductor", "cuda", {}, {"dynamic": True, "options": {"max_autotune": True}}),
    "tensorrt": ("tensorrt", "cuda", {}, None),
    "tensorrt, refit": ("tensorrt", "cuda", {"tensorrt": {"refit": True}}, None),
    "tensorrt, settings": ("tensorrt", "cuda", {"dtype": "float16", "tensorrt": TENSORRT}, None),
    "torch_tensorrt": ("torch_tensorrt", "cuda", {}, None),
    "torch_tensorrt, settings": ("torch_tensorrt", "cuda", {"tensorrt": TENSORRT}, {"fullgraph": True}),
}
"""Backend, device, changes of the example's section, and ``pt2: {compile: ...}``, by the name of the record."""


def write_archive_of(name: str, folder: Path) -> dict[str, Any]:
    """Write an archive like an example's into `folder`; returns its model-config.yaml."""
    yaml = pytest.importorskip("yaml")
    folder.mkdir(parents=True)
    for file in ("model.py", "handler.py", "model-config.yaml"):
        shutil.copyfile(EXAMPLES / name / file, folder / file)
    if name != "digits":
        (folder / "config.json").write_text('{"hidden_size": 8}\n', "utf-8")
    if name == "minilm":
        (folder / "tokenizer.json").write_text("{}\n", "utf-8")
    (folder / WEIGHTS).write_bytes(_safetensors())
    config: dict[str, Any] = yaml.safe_load((folder / "model-config.yaml").read_text("utf-8"))
    return config


def _safetensors() -> bytes:
    """A file in the format of safetensors, the same bytes whatever wrote it."""
    header, data = {}, b""
    for name, (dtype, shape) in TENSORS.items():
        size = _BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def use_constants(monkeypatch: pytest.MonkeyPatch, fingerprint: Any, library: Any, variables: tuple[str, ...]) -> None:
    """Replace every fact about this machine and what is installed on it by a constant.

    Parameters
    ----------
    fingerprint, library:
        The package's `key.fingerprint` and `backends.tensorrt.library`.
    variables:
        The environment variables that are part of a key.
    """
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    monkeypatch.setattr(torch.version, "git_version", "0123456789abcdef")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    monkeypatch.setattr(fingerprint, "cpu_identity", lambda: "x86_64 avx avx2")
    monkeypatch.setattr(fingerprint, "_libc", lambda: "glibc-2.36")
    monkeypatch.setattr(fingerprint, "python_identity", lambda: "cpython-3.11")
    monkeypatch.setattr(fingerprint, "compiler_identity", lambda: "g++ 12.2.0")
    monkeypatch.setattr(fingerprint, "is_editable", lambda name: False)
    for module in (fingerprint, library):
        monkeypatch.setattr(module, "distribution_version", lambda name: "1.2.3")
    monkeypatch.setattr(library, "installed_flavours", lambda: ("tensorrt_rtx",))
    monkeypatch.setattr(library, "import_tensorrt", lambda flavour: SimpleNamespace(__version__="1.4.0"))
    for name in variables:
        monkeypatch.delenv(name, raising=False)


def parsed_config(config: dict[str, Any], changes: dict[str, Any], pt2: dict[str, Any] | None) -> dict[str, Any]:
    """A model-config.yaml with the changes of a variant."""
    section = {**config["handler"]["ts_handlers"], **changes}
    more = {} if pt2 is None else {"pt2": {"compile": {"enable": True, "backend": "inductor", **pt2}}}
    return {**config, "handler": {"ts_handlers": section}, **more}
