"""torch's compiler in a process that only loads what it has compiled before: without what a cold start needs alone.

Everything here is about time; with a torch version in which a name is gone, a warm start is a little slower. What is
left out, and what each saves, stands in docs/decisions/0020-warm-torch-compile.md.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def warm_compiler() -> Iterator[None]:
    """Import Inductor, and inside the block do not let it prepare or check again what is in the entry."""
    with contextlib.ExitStack() as stack:
        from torch._inductor.codegen import common

        # Importing Inductor parses its Jinja templates, which only autotuning uses.
        templates = getattr(common, "KernelTemplate", None)
        parse = getattr(templates, "_template_from_string", None)
        with _replaced(templates, "_template_from_string", staticmethod(lambda source: _Template(parse, source))):
            from torch._inductor import codecache, compile_fx, cpu_vec_isa  # noqa: F401

        # The digest of torch's own sources, a part of Inductor's keys, is computed while the model is built and traced.
        threading.Thread(target=codecache.torch_key, daemon=True, name="ts_handlers-torch-key").start()
        # Inductor compiles a small library for each extension of the instruction sets (AVX512-VNNI, BF16, AMX) and
        # opens it in a child process. The seeded directory holds these libraries, and opening them again could only
        # tell what the key has told: instruction sets, C++ compiler and torch are those of the build.
        stack.enter_context(_replaced(cpu_vec_isa.VecISA, "_probe_load", lambda self, output_path: True))
        # A graph's first call goes operator by operator through Python, to warn of custom operators that return an
        # alias of an input. It has done so in the build.
        from torch._functorch._aot_autograd import runtime_wrappers

        first_call = getattr(runtime_wrappers, "_FirstInvocationContext", None)
        stack.enter_context(_replaced(first_call, "__call__", _first_call))
        yield


def _first_call(self: Any) -> contextlib.AbstractContextManager[None]:
    self._is_first = False
    return contextlib.nullcontext()


class _Template:
    """A Jinja template that is parsed when it is used."""

    def __init__(self, parse: Any, source: str) -> None:
        self._parsed = functools.cache(lambda: parse(source))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._parsed(), name)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block, if there is such a name."""
    original = getattr(owner, "__dict__", {}).get(name)
    if original is None:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
