"""The measured processes of overheads.py: one function for each measurement, named as there. Prints one JSON line.

A measurement that needs a model, or an artifact in the store, has a second function that prepares it once.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Figures = dict[str, float]
REPETITIONS = 300
BLOCK = 200
SECONDS = 2.0
LINEARS = ("minilm_size", "bert_base")
LINEARS_SIZES = ((1, 16), (8, 128))
LINEARS_CONTEXTS = 4


def median_us(call: Callable[[], Any], repetitions: int = REPETITIONS) -> float:
    """Median microseconds of one call."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def in_turn(
    calls: dict[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call by `clock`, all of them called in turn and in a random order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(repetitions):
        for name in order.sample(list(calls), len(calls)):
            started = clock()
            calls[name]()
            times[name].append(clock() - started)
    return times


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """Median of the ratios of neighbouring calls."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


def guard(folder: Path) -> Figures:
    """`warm_start_us`: judging the dead, marker and limits; `first_in_process_us`: reading versions, once."""
    from ts_handlers.guard.guard import Guard
    from ts_handlers.key.cache_key import CacheKey
    from ts_handlers.key.fingerprint import runtime_identity
    from ts_handlers.settings import Settings

    store = folder / "store"
    store.mkdir(mode=0o700, exist_ok=True)
    started = time.perf_counter()
    runtime_identity()
    first = time.perf_counter() - started
    made = Guard(store, Settings(), CacheKey((("backend", "aot_inductor"),)), "model", lambda: "")

    def warm_start() -> None:
        made.refuse("seal")
        with made.marked("load", "seal"), made.limited():
            pass

    return {"warm_start_us": median_us(warm_start), "first_in_process_us": first * 1e6}


def slot(folder: Path) -> Figures:
    """`us`: what `ModuleSlots` adds to a call of a function that does nothing."""
    import torch

    from ts_handlers.execution.base import Loaded
    from ts_handlers.execution.slots import ModuleSlots
    from ts_handlers.model.signature import Signature
    from ts_handlers.settings.sections import ContextSettings

    def block(run: Callable[[list[Any]], Any]) -> Callable[[], None]:
        def calls() -> None:
            for _ in range(BLOCK):
                run([])

        return calls

    bare = Loaded(lambda tensors: tensors, Signature([], {}))
    lent = ModuleSlots(ContextSettings(), torch.device("cpu")).wrap(bare)
    times = in_turn({"bare": block(bare.run), "lent": block(lent.run)}, REPETITIONS)
    differences = [lent - bare for lent, bare in zip(times["lent"], times["bare"], strict=True)]
    return {"us": statistics.median(differences) / BLOCK * 1e6}


def across_workers(folder: Path) -> Figures:
    """`small_us`, `large_us`: what a call takes longer in the model process, with 4 KiB and with 1.5 MiB each way."""
    import torch

    from ts_handlers import ArchiveSource, parse_settings, start_model

    (folder / "model").mkdir(exist_ok=True)
    code = "import torch\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return x + 1\n"
    (folder / "model" / "model.py").write_text(code, "utf-8")
    source = ArchiveSource("model", folder / "model", "model.py", None)
    models = {}
    for across in (False, True):
        section = {
            "backends": ["eager"],
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 1024]}],
            "dimensions": {"batch": {"min": 1, "max": 512}},
            "contexts": {"across_workers": across},
        }
        models[across] = start_model(source, parse_settings({"handler": {"ts_handlers": section}}))
    figures = {}
    for name, batch in (("small_us", 1), ("large_us", 384)):
        x = torch.randn(batch, 1024)

        def block(model: Any, x: Any = x) -> Callable[[], None]:
            def calls() -> None:
                for _ in range(20):
                    model(x)

            return calls

        times = in_turn({"here": block(models[False]), "there": block(models[True])}, 100)
        differences = [there - here for there, here in zip(times["there"], times["here"], strict=True)]
        figures[name] = statistics.median(differences) / 20 * 1e6
    return figures


def usage(folder: Path) -> Figures:
    """`us`: one `record_use`."""
    from ts_handlers.store.local.usage import record_use

    (folder / "store").mkdir(mode=0o700, exist_ok=True)
    return {"us": median_us(lambda: record_use(folder / "store", "key"))}


def memory(folder: Path) -> Figures:
    """`import_torch_mib`: what RLIMIT_DATA counts after ``import torch``, VmData in proc_pid_status(5)."""
    import torch  # noqa: F401

    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmData:"))
    return {"import_torch_mib": int(kilobytes) / 1024}


def prepare_initialization(folder: Path) -> None:
    """Weights of BERT-base."""
    import archives

    archives.prepare("bert_base", folder / "model")


def initialization(folder: Path) -> Figures:
    """`skipped_ratio`: processor time of constructor and state dict, random initialization skipped over drawn.

    `sound` is 1 when each module built so equals one built in the ordinary way.
    """
    import torch

    from ts_handlers.model.archive_files import load_model_class
    from ts_handlers.model.initialization import skip_random_initialization

    model_class = load_model_class(folder / "model" / "model.py")
    weights = torch.load(folder / "model" / "model.pt", weights_only=True, mmap=True)
    size = sum(tensor.nbytes for tensor in weights.values())
    sound = []

    def build(skip: bool) -> None:
        with skip_random_initialization(size) if skip else contextlib.nullcontext() as skipped:
            module = model_class()
            module.load_state_dict(weights)
        if skipped is not None:
            sound.append(skipped.was_sound(module))

    build(False)
    times = in_turn({"skipped": lambda: build(True), "drawn": lambda: build(False)}, 5, time.process_time)
    return {"skipped_ratio": ratio(times, "skipped", "drawn"), "sound": float(all(sound))}


def prepare_artifacts(model: str, backends: list[str], folder: Path) -> None:
    """A model, its request, and an entry of each of the backends in the store."""
    import archives
    from in_process import write_work
    from start_child import start_ours

    files = archives.prepare(model, folder / "model")
    work = write_work(files, folder / "work")
    for backend in backends:
        found = start_ours(folder / "model", work / f"{backend}.json")
        if found.outcome.backend != backend:
            raise SystemExit(f"{model} is served by {found.outcome.backend}: {found.outcome.fallbacks}")


def start_hit(folder: Path, backend: str) -> Any:
    """The model from the store, which must hold it."""
    from start_child import start_ours

    found = start_ours(folder / "model", folder / "work" / f"{backend}.json")
    if (found.outcome.backend, found.outcome.result) != (backend, "hit"):
        raise SystemExit(f"{found.outcome.backend} {found.outcome.result}, expected {backend} hit")
    return found


def prepare_call(folder: Path) -> None:
    """An entry of `inductor`."""
    prepare_artifacts("tiny", ["inductor"], folder)


def call(folder: Path) -> Figures:
    """`added_us`: `CompiledModel` minus ``torch.compile(model)``, in turn; `torch_compile_us`: the latter alone."""
    import torch
    from start_child import build_eager, read_inputs

    inputs = read_inputs(folder / "work")
    model = start_hit(folder, "inductor")
    compiled = torch.compile(build_eager(folder / "model"))
    with torch.inference_mode():
        calls = {"ours": lambda: model(**inputs), "plain": lambda: compiled(**inputs)}
        in_turn(calls, 50)
        times = in_turn(calls, 10 * REPETITIONS)
    differences = [ours - plain for ours, plain in zip(times["ours"], times["plain"], strict=True)]
    plain = statistics.median(times["plain"])
    return {"added_us": statistics.median(differences) * 1e6, "torch_compile_us": plain * 1e6}


def prepare_lock(folder: Path) -> None:
    """An entry of `aot_inductor`."""
    prepare_artifacts("minilm_size", ["aot_inductor"], folder)


def lock(folder: Path) -> Figures:
    """Steps per second of a counting thread: beside eager, beside an artifact as it is served, beside torch's runner.

    At batch 16 and sequence 128, so that calls are long against the interpreter's switch interval.
    """
    import torch
    from overhead_child import open_runner
    from start_child import build_eager, read_inputs

    inputs = {name: tensor.repeat(16, 8) for name, tensor in read_inputs(folder / "work").items()}
    tensors = list(inputs.values())
    served = start_hit(folder, "aot_inductor")
    runner = open_runner(served)
    eager = build_eager(folder / "model")
    with torch.inference_mode():
        beside_eager = steps_beside(lambda: eager(**inputs))
        beside_served = steps_beside(lambda: served(**inputs))
        beside_runner = steps_beside(lambda: runner(tensors))
    return {
        "beside_served_ratio": beside_served / beside_eager,
        "beside_runner_ratio": beside_runner / beside_eager,
        "beside_eager_per_s": beside_eager,
        "beside_served_per_s": beside_served,
        "beside_runner_per_s": beside_runner,
    }


def steps_beside(call: Callable[[], Any]) -> float:
    """Steps per second that a thread counts while this one calls."""
    steps, stop = itertools.count(), threading.Event()

    def count() -> None:
        while not stop.is_set():
            next(steps)

    call()
    thread = threading.Thread(target=count)
    started = time.perf_counter()
    thread.start()
    while time.perf_counter() < started + SECONDS:
        call()
    stop.set()
    seconds = time.perf_counter() - started
    thread.join()
    return next(steps) / seconds


def prepare_collector(folder: Path) -> None:
    """An entry of `inductor`."""
    prepare_artifacts("minilm_size", ["inductor"], folder)


def collector(folder: Path) -> Figures:
    """Two warm starts in fresh processes, with the collector paused while loading and without.

    `paused_ratio` is the processor time of the main thread with over without; `objects` what the collector knows after
    a start, `full_pass_ms` one full pass over them, `unreachable` what the first such pass finds, `frozen_pass_ms`
    one after `exempt_from_collection`.
    """
    paused, running = forked(start_and_collect, folder, True), forked(start_and_collect, folder, False)
    return {"paused_ratio": paused.pop("start_s") / running["start_s"], **paused}


def forked(function: Callable[..., Figures], *arguments: Any) -> Figures:
    """What `function` returns in a child process that has imported no more than this one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(function(*arguments)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        text = file.read()
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a measured child process failed; its traceback is above")
    found: Figures = json.loads(text)
    return found


def start_and_collect(folder: Path, pause: bool) -> Figures:
    """One warm start; see `collector`."""
    import ts_handlers.startup.attempt
    from ts_handlers.system.cycle_collector import exempt_from_collection

    if not pause:
        ts_handlers.startup.attempt.collection_paused = contextlib.nullcontext
    model = start_hit(folder, "inductor")  # kept: what it holds is no garbage
    found: Figures = {"start_s": time.thread_time(), "objects": len(gc.get_objects())}
    started = time.perf_counter()
    found["unreachable"] = gc.collect()
    found["full_pass_ms"] = (time.perf_counter() - started) * 1000
    exempt_from_collection(False)
    started = time.perf_counter()
    gc.collect()
    found["frozen_pass_ms"] = (time.perf_counter() - started) * 1000
    del model
    return found


prepare_beside = prepare_collector


def beside(folder: Path) -> Figures:
    """Latencies of eager calls, 5 ms between them, while a thread loads an `inductor` entry, over those of calls alone.

    ``short_``: with the interpreter's switch interval at a tenth of its default.
    """
    found = forked(load_beside, folder, sys.getswitchinterval())
    short = forked(load_beside, folder, sys.getswitchinterval() / 10)
    return {**found, **{f"short_{name}": value for name, value in short.items()}}


def load_beside(folder: Path, interval: float) -> Figures:
    """One load beside calls; see `beside`."""
    import torch
    from start_child import build_eager, read_inputs

    sys.setswitchinterval(interval)
    torch.set_num_threads(1)
    inputs = read_inputs(folder / "work")
    eager = build_eager(folder / "model")
    os.environ["OMP_NUM_THREADS"] = "1"

    def latencies(until: Callable[[], bool]) -> list[float]:
        times = []
        with torch.inference_mode():
            while not until():
                started = time.perf_counter()
                eager(**inputs)
                times.append(time.perf_counter() - started)
                time.sleep(0.005)
        return sorted(times)

    end = time.perf_counter() + SECONDS
    alone = latencies(lambda: time.perf_counter() > end)
    thread = threading.Thread(target=start_hit, args=(folder, "inductor"))
    thread.start()
    loading = latencies(lambda: not thread.is_alive())
    thread.join()
    return {
        "median_ratio": statistics.median(loading) / statistics.median(alone),
        "p99_ratio": loading[int(0.99 * len(loading))] / alone[int(0.99 * len(alone))],
    }


def prepare_threads(folder: Path) -> None:
    """Entries of `aot_inductor` with and without the option."""
    prepare_artifacts("resnet50", ["aot_inductor"], folder)
    path = folder / "work" / "aot_inductor.json"
    config = json.loads(path.read_text("utf-8"))
    config["pt2"] = {"compile": {"enable": True, "options": {"cpp.dynamic_threads": True}}}
    (folder / "work" / "dynamic.json").write_text(json.dumps(config), "utf-8")
    from start_child import start_ours

    start_ours(folder / "model", folder / "work" / "dynamic.json")


def threads(folder: Path) -> Figures:
    """`dynamic_ratio`: a call of the artifact with ``cpp.dynamic_threads`` over one without, in turn."""
    import torch
    from start_child import read_inputs, start_ours

    inputs = read_inputs(folder / "work")
    fixed = start_hit(folder, "aot_inductor")
    dynamic = start_ours(folder / "model", folder / "work" / "dynamic.json")
    if dynamic.outcome.result != "hit" or dynamic.outcome.key == fixed.outcome.key:
        raise SystemExit(f"{dynamic.outcome}, expected a hit of another artifact")
    with torch.inference_mode():
        calls = {"dynamic": lambda: dynamic(**inputs), "fixed": lambda: fixed(**inputs)}
        in_turn(calls, 5)
        times = in_turn(calls, 60)
    return {"dynamic_ratio": ratio(times, "dynamic", "fixed")}


def prepare_linears(folder: Path) -> None:
    """The models, and an artifact of each with merged linear layers and one without."""
    import archives

    for model in LINEARS:
        archives.prepare(model, folder / model)
        linears_models(folder / model)


def linears(folder: Path) -> Figures:
    """Artifacts with merged linear layers over artifacts without, called in turn; float16 on a GPU if there is one.

    For each model and size ``_ratio`` of the duration of a call and ``_ms`` of one with merged layers, ``_difference``
    of the answers, relative, and on a GPU ``_throughput_ratio`` of calls from as many threads as there are contexts.
    """
    figures: Figures = {}
    for model in LINEARS:
        found = linears_models(folder / model)
        for batch, sequence in LINEARS_SIZES:
            name = f"{model}_{batch}x{sequence}"
            figures.update({f"{name}_{figure}": value for figure, value in compare_linears(found, batch, sequence)})
    return figures


def linears_models(directory: Path) -> dict[str, Any]:
    """The model with merged linear layers and without; what the store lacks is built."""
    import torch
    import yaml

    from ts_handlers import ArchiveSource, parse_settings, start_model
    from ts_handlers.backends.aot_inductor import backend as aot_inductor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = yaml.safe_load((directory / "model-config.yaml").read_text("utf-8"))
    section = config["handler"]["ts_handlers"]
    section.update(backends=["aot_inductor"], strict=True)
    section["warmup"] = [{"batch": batch, "sequence": sequence} for batch, sequence in reversed(LINEARS_SIZES)]
    if device == "cuda":
        section.update(dtype="float16", contexts={"count": LINEARS_CONTEXTS, "cuda_graphs": True})
    settings = parse_settings({"handler": {"ts_handlers": section}})
    found = {}
    for name, devices in (("merged", (device,)), ("apart", ())):
        aot_inductor.MERGES_LINEARS = devices
        source = ArchiveSource(directory.name, directory, "model.py", "model.pt", ignored_files=["handler.py"])
        found[name] = start_model(source, settings, device)
        merged = found[name].describe()["artifact"]["merged_linears"]
        if bool(merged) != (name == "merged"):
            raise SystemExit(f"{directory.name}: {merged} merged linear layers where they are to be {name}")
    return found


def compare_linears(found: dict[str, Any], batch: int, sequence: int) -> Iterator[tuple[str, float]]:
    """The figures of `linears` for one size."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(0, 30000, (batch, sequence), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def call_of(model: Any) -> Callable[[], Any]:
        def call() -> Any:
            answer = model(**inputs)
            if device == "cuda":
                torch.cuda.synchronize()
            return answer

        return call

    calls = {name: call_of(model) for name, model in found.items()}
    with torch.inference_mode():
        merged, apart = calls["merged"]().double(), calls["apart"]().double()
        yield "difference", float((merged - apart).norm() / apart.norm())
        seconds = statistics.median(in_turn(calls, 5)["apart"])
        times = in_turn(calls, min(10 * REPETITIONS, max(10, int(2 * SECONDS / seconds))))
        yield "ratio", ratio(times, "merged", "apart")
        yield "ms", statistics.median(times["merged"]) * 1000
        if device == "cuda":
            rates = [{name: calls_per_second(call) for name, call in calls.items()} for _ in range(3)]
            yield "throughput_ratio", statistics.median(rate["merged"] / rate["apart"] for rate in rates)


def calls_per_second(call: Callable[[], Any]) -> float:
    """Calls per second from as many threads as `linears` has contexts."""
    import torch

    number = itertools.count()
    end = time.perf_counter() + SECONDS / 2

    def work() -> None:
        with torch.inference_mode():
            while time.perf_counter() < end:
                call()
                next(number)

    threads = [threading.Thread(target=work) for _ in range(LINEARS_CONTEXTS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next(number) / (time.perf_counter() - started)


if __name__ == "__main__":
    step, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if step == "measure":
        print(json.dumps(globals()[name](folder)))
    else:
        globals().get(f"prepare_{name}", lambda folder: None)(folder)
        print("{}")
