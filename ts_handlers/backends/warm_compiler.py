"""torch's compiler in a process that only loads what it has compiled before: without what a cold start needs alone.

Everything here is about time; with a torch version in which a name is gone, a warm start is a little slower.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def warm_compiler() -> Iterator[None]:
    """Import Inductor, and inside the block let it trust the processor's instruction sets.

    Inductor compiles a small library for each extension of the instruction sets (AVX512-VNNI, BF16, AMX) and opens it
    in a child process. A warm start finds these libraries in its seeded directory, and opening them again could
    only tell what the key has told: instruction sets, C++ compiler and torch are those of the build.
    """
    from torch._inductor import codecache, cpu_vec_isa

    # The digest of torch's own sources, a part of Inductor's keys, is computed while the model is built and traced.
    threading.Thread(target=codecache.torch_key, daemon=True, name="ts_handlers-torch-key").start()
    isa: Any = cpu_vec_isa.VecISA
    original = getattr(isa, "_probe_load", None)
    if original is None:
        yield
        return
    isa._probe_load = lambda self, output_path: True
    try:
        yield
    finally:
        isa._probe_load = original
