"""torch's compiler in a process that only loads what it has compiled before: without what a cold start needs alone.

Everything here is about time; with a torch version in which a name is gone, a warm start is a little slower. What is
left out, and what each saves, is in docs/decisions/0020-warm-torch-compile.md.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from ts_handlers.system.patching import replaced_attribute


@contextlib.contextmanager
def warm_compiler() -> Iterator[None]:
    """Import Inductor, and inside the block do not let it prepare or check again what is in the entry."""
    with contextlib.ExitStack() as stack:
        from torch._inductor.codegen import common

        # Importing Inductor parses its Jinja templates, which only autotuning uses.
        templates = getattr(common, "KernelTemplate", None)
        parse = getattr(templates, "_template_from_string", None)
        lazily = staticmethod(lambda source: _Template(parse, source))
        with replaced_attribute(templates, "_template_from_string", lazily, optional=True):
            from torch._inductor import codecache, compile_fx, cpu_vec_isa  # noqa: F401

        # The digest of torch's own sources, a part of Inductor's keys, is computed while the model is built and traced.
        threading.Thread(target=codecache.torch_key, daemon=True, name="ts_handlers-torch-key").start()
        # Inductor compiles a small library for each extension of the instruction sets (AVX512-VNNI, BF16, AMX) and
        # opens it in a child process. The seeded directory holds these libraries, and opening them again could only
        # tell what the key has told: instruction sets, C++ compiler and torch are those of the build.
        no_probe: Any = lambda self, output_path: True  # noqa: E731
        stack.enter_context(replaced_attribute(cpu_vec_isa.VecISA, "_probe_load", no_probe, optional=True))
        # A graph's first call goes operator by operator through Python, to warn of custom operators that return an
        # alias of an input. It has done so in the build.
        from torch._functorch._aot_autograd import runtime_wrappers

        first_call = getattr(runtime_wrappers, "_FirstInvocationContext", None)
        stack.enter_context(replaced_attribute(first_call, "__call__", _first_call, optional=True))
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
