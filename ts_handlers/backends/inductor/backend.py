"""Backend `inductor`: `torch.compile` with every cache of the compiler in the entry.

For models that cannot be exported (graph breaks, data-dependent control flow). The entry holds Inductor's directory:
FX graph and AOTAutograd entries, compiled C++ and Triton code, autotuning results. A warm start seeds a private
directory from it and compiles again, which then consists of tracing and loading. Weights are inputs of the graphs, so
an entry survives an update of the weights.

torch's precompiled Dynamo state (`caching_precompile`) is not used: it drops identity and closure guards and answered
wrongly from a hit; see docs/decisions/0002-no-precompiled-dynamo-state.md.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Backend, Built, Description, Target, Workspace, call_module, takes_names
from ts_handlers.backends.inductor.one_graph import mark_dynamic, one_graph
from ts_handlers.backends.inductor.warm_compiler import warm_compiler
from ts_handlers.backends.torch_compile import compiles_nothing, plain, warmup_sizes
from ts_handlers.backends.working_directory import make_working_directory, use_cache
from ts_handlers.errors import LoadError
from ts_handlers.execution.base import Loaded
from ts_handlers.key import fingerprint
from ts_handlers.metrics import dynamo_counter
from ts_handlers.settings import Settings

logger = logging.getLogger(__name__)

CACHE = "cache"

# The precompiled header lies outside the cache directory and takes seconds when it is lost; the probe for instruction
# sets compiles a program, and ours are in the key. Both switches are part of Inductor's own keys, so they are the same
# when building and when loading.
KNOBS = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_VEC_ISA_OK": "1"}


class InductorBackend:
    """See the module's docstring."""

    name = "inductor"
    persistent = True
    needs_eager_module = True

    def bakes_weights(self, target: Target) -> bool:
        """Weights are inputs of the compiled graphs."""
        return False

    def options(self, target: Target) -> dict[str, str]:
        """The arguments of `torch.compile`."""
        compile_settings = target.settings.compile
        facts = {f"inductor.{name}": json.dumps(value) for name, value in compile_settings.options.items()}
        facts["dynamic"] = str(compile_settings.dynamic)
        facts["fullgraph"] = str(compile_settings.fullgraph)
        if compile_settings.mode is not None:
            facts["mode"] = compile_settings.mode
        if target.device.type == "cpu":
            facts["threads"] = str(torch.get_num_threads())  # in the OpenMP pragmas, and one of Dynamo's guards
        facts["warmup"] = json.dumps(warmup_sizes(target), separators=(",", ":"), sort_keys=True)
        return facts

    def toolchain(self, target: Target) -> str:
        """torch and everything that its own cache keys hold: Python and the C++ compiler too."""
        facts = [fingerprint.toolchain(target.device.type), f"python={fingerprint.python_identity()}"]
        facts.append(f"cxx={fingerprint.compiler_identity()}")
        return " ".join(facts)

    def build(self, target: Target, workspace: Workspace) -> Built:
        """Compile by running the warm-up, and copy the compiler's directory into the entry."""
        with workspace.phase("compile"):
            oblivious, working, loaded = _compile_first(target)
        shutil.copytree(working, workspace.directory / CACHE, ignore=_ignore_scratch)
        return Built({"oblivious": oblivious}, loaded)

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        """Seed a private directory from the entry and compile from it."""
        working = make_working_directory()
        source = directory / CACHE
        if not source.is_dir():
            raise LoadError("the entry holds no Inductor directory")
        shutil.copytree(source, working, dirs_exist_ok=True, copy_function=_copy)
        _configure(working, warm=True)
        with warm_compiler():
            return _compile(target, warm=True, oblivious=bool(description["oblivious"]))

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        """None: the next backend of the fallback order."""
        return None


def _compile_first(target: Target) -> tuple[bool, Path, Loaded]:
    """Compile with one graph for all sizes where the model allows it, otherwise with one more for each size 1.

    One graph halves the tracing of every warm start. `dynamic` set by the user is taken as it is.
    """
    from ts_handlers.backends.compare import compare_sizes

    working = make_working_directory()
    if target.settings.compile.dynamic is None and target.require_signature().dimensions:
        try:
            _configure(working, warm=False)
            loaded = _compile(target, warm=False, oblivious=True)
            loaded.end_warmup()
            compare_sizes(target, loaded, loaded.signature.corner_sizes())
            return True, working, loaded
        except Exception as error:
            logger.info("%s has no single graph for all sizes: %s", target.source.name, error)
            import torch._dynamo

            torch._dynamo.reset()
            working = make_working_directory()
    _configure(working, warm=False)
    return False, working, _compile(target, warm=False, oblivious=False)


def _copy(source: str, target: str) -> str:
    """Copy bytes and make the copy ours to write, whatever the store's modes are."""
    shutil.copyfile(source, target)
    if target.endswith(".so"):
        os.chmod(target, 0o700)
    return target


def _ignore_scratch(directory: str, names: list[str]) -> set[str]:
    """Lock files, precompiled headers and temporary files stay out of the entry."""
    scratch = {name for name in names if name.endswith((".lock", ".gch", ".pch", ".tmp")) or name == "locks"}
    return scratch | {name for name in names if os.path.islink(os.path.join(directory, name))}


def _configure(working: Path, *, warm: bool) -> None:
    """Point the compiler at a working directory and switch on its caches; what is keyed is the same, warm or not."""
    os.environ.update(KNOBS)
    use_cache(working)
    if warm:  # the pool of compile processes is of no use; not part of any key
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch._dynamo
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    _set(inductor_config, cpp_cache_precompile_headers=False, fx_graph_cache=True, fx_graph_remote_cache=False)
    _set(inductor_config, bundle_triton_into_fx_graph_cache=True)
    _set(functorch_config, enable_autograd_cache=True, enable_remote_autograd_cache=False)
    _set(inductor_config.cpp, vec_isa_ok=True)  # KNOBS again: the model's libraries may have imported the compiler
    if warm:
        _set(inductor_config, compile_threads=1)
        _set(torch._dynamo.config, run_gc_after_compile=False)  # a full pass for each graph


def _compile(target: Target, *, warm: bool, oblivious: bool) -> Loaded:
    signature = target.require_signature()
    module = target.eager()
    by_name = takes_names(module, signature.names)
    arguments = target.settings.compile
    dynamic = arguments.dynamic
    if dynamic is None and not oblivious and any(d.min != d.max for d in signature.dimensions.values()):
        dynamic = True  # entries would otherwise depend on the order in which shapes were seen
    compiled = torch.compile(
        module,
        backend="inductor",
        mode=arguments.mode,
        options=dict(arguments.options) or None,  # type: ignore[arg-type]
        dynamic=dynamic,
        fullgraph=arguments.fullgraph,
    )
    warming_up = True

    def run(tensors: list[torch.Tensor]) -> Any:
        # One mode for warm-up and requests: tensors made in inference mode have other dispatch keys, which is a guard
        # miss and a compilation.
        with torch.inference_mode(False), torch.no_grad(), compiles_nothing(not warming_up):
            return call_module(compiled, signature.names, [plain(tensor) for tensor in tensors], by_name)

    def end_warmup() -> None:
        nonlocal warming_up
        warming_up = False

    before = _cache_counters()
    with one_graph(oblivious):
        for sizes in warmup_sizes(target):
            tensors = [tensor.to(target.device) for tensor in signature.generate(sizes, seed=1)]
            if oblivious:
                mark_dynamic(signature, tensors)
            run(tensors)
    after = _cache_counters()
    facts = {name: after[name] - before[name] for name in after}
    facts["graphs"] = dynamo_counter("stats", "unique_graphs")
    if warm and facts["fxgraph_cache_miss"]:
        logger.warning("%s: the entry lacked %d graphs", target.source.name, facts["fxgraph_cache_miss"])
    return Loaded(run=run, signature=signature, facts=facts, end_warmup=end_warmup, warmed_up=True)


def _set(config: Any, **values: Any) -> None:
    """Set the options that this torch version has."""
    for name, value in values.items():
        if hasattr(config, name):
            setattr(config, name, value)


def _cache_counters() -> dict[str, int]:
    return {
        "fxgraph_cache_hit": dynamo_counter("inductor", "fxgraph_cache_hit"),
        "fxgraph_cache_miss": dynamo_counter("inductor", "fxgraph_cache_miss"),
    }


BACKEND = InductorBackend()
