"""Exporting and compiling for the backend `aot_inductor`: the export steps, and what each is checked for.

Imported on a build only.
"""

from __future__ import annotations

import gc
import itertools
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ts_handlers.backends.aot_inductor.static_sizes import STATIC, static_sizes
from ts_handlers.backends.base import Target
from ts_handlers.backends.export import live_weights
from ts_handlers.errors import BuildError
from ts_handlers.model.signature import Signature, Sizes
from ts_handlers.system.files import RememberingWriter

Variant = tuple[str, Sizes, dict[str, tuple[int, int]], bool]  # name, fixed sizes, dynamic ranges, size-oblivious


def export_steps(signature: Signature, target: Target) -> Iterator[tuple[str, list[Variant]]]:
    """The export steps, widest ranges first, each with its name and its variants."""
    ranges = {name: (d.min, d.max) for name, d in signature.dimensions.items() if d.min != d.max}
    fixed = {name: d.min for name, d in signature.dimensions.items() if d.min == d.max}
    if not ranges:
        yield STATIC, [(STATIC, fixed, {}, False)]
        return
    if all(high > 2 for _, high in ranges.values()):  # torch.export takes 1 to 2 for 2 alone
        yield "dynamic", [("dynamic", fixed, ranges, True)]
    ones = [name for name, (low, _) in ranges.items() if low == 1]
    variants: list[Variant] = []
    for count in range(len(ones) + 1):
        for chosen in itertools.combinations(ones, count):
            rest = {n: (max(low, 2), high) for n, (low, high) in ranges.items() if n not in chosen}
            sizes = {**fixed, **dict.fromkeys(chosen, 1), **{n: low for n, (low, high) in rest.items() if low == high}}
            rest = {n: (low, high) for n, (low, high) in rest.items() if low < high}
            name = "dynamic" + "".join(f"-{n}1" for n in chosen)
            variants.append((name, sizes, rest, False))
    yield "dynamic+ones", variants
    declared = static_sizes(target.settings)
    if declared:
        yield STATIC, [(_sizes_name(sizes), sizes, {}, False) for sizes in declared]


def _sizes_name(sizes: Sizes) -> str:
    return "static-" + "-".join(f"{name}{size}" for name, size in sizes.items())


def compile_program(program: Any, target: Target, directory: Path, *, baked: bool) -> dict[str, str]:
    """Compile a program and unpack the files that the loader needs into `directory`."""
    import torch._inductor
    import torch._inductor.config as inductor_config

    from ts_handlers.backends.working_directory import private_cache

    configs: dict[str, Any] = {
        "aot_inductor.package_constants_in_so": baked,
        # Scalars, short vectors (up to 8 elements: a small classifier's bias) and weights that are uniform today would
        # otherwise be written into the code and survive an update of the weights; see
        # docs/decisions/0001-weights-outside.md.
        "always_keep_tensor_constants": not baked,
        "joint_graph_constant_folding": baked,
        # Ranges are checked before an artifact is called.
        "aot_inductor.check_lowerbound": False,
        # Inductor would compile and open a program for each of the processor's instruction sets, a large part of a
        # build. A compiler of C++20, which torch's headers need, knows AVX2 and AVX-512; extensions are still tried.
        "cpp.vec_isa_ok": True,
    }
    known = inductor_config.get_config_copy()
    configs = {name: value for name, value in configs.items() if name in known}
    if target.settings.compile.mode is not None:
        configs.update(torch._inductor.list_mode_options(target.settings.compile.mode))
    configs.update(target.settings.compile.options)
    configs.pop("triton.cudagraphs", None)  # not a feature of ahead-of-time artifacts
    directory.mkdir(parents=True)
    package = directory / "package.pt2"
    with private_cache(), torch.no_grad(), RememberingWriter(package) as file:
        torch._inductor.aoti_compile_and_package(program, package_path=cast(Any, file), inductor_configs=configs)
        file.check()
    library = ""
    with zipfile.ZipFile(package) as archive:
        for info in archive.infolist():
            base = os.path.basename(info.filename)
            if "/data/aotinductor/" not in info.filename or base.endswith((".cpp", ".h", "_metadata.json")):
                continue
            (directory / base).write_bytes(archive.read(info))
            if base.endswith(".so"):
                library = base
    package.unlink()
    if not library:
        raise BuildError("the compiled package holds no shared library")
    os.chmod(directory / library, 0o700)
    return {"library": library}


def forget_traces() -> None:
    """Let go of the traced programs, whose modules hold the eager model's weights.

    torch keeps the nodes of the last trace for a check of `torch.export` (2.11 and 2.13), and the rest are cycles.
    """
    from torch.fx.experimental import proxy_tensor

    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
    gc.collect()


def refuse_folded_weights(program: Any, fqns: set[str]) -> None:
    """Refuse code into which a weight was folded: it would survive an update of the weights."""
    used = live_weights(program)
    state = program.state_dict
    storages = {state[fqn].untyped_storage().data_ptr() for fqn in fqns if fqn in state}
    folded = {fqn for fqn in used - fqns if fqn in state and state[fqn].untyped_storage().data_ptr() not in storages}
    if folded:
        raise BuildError(f"the compiler folded weights into the code: {', '.join(sorted(folded)[:5])}")
