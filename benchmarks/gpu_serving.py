"""k execution contexts against k eager workers in TorchServe, on a GPU: throughput, p99 and memory.

    python benchmarks/gpu_serving.py --workers 4 1 --seconds 2 --rounds 3 --json FILE
    python benchmarks/gpu_serving.py --workers 4 --sides eager across_workers --model resnet50 --json FILE

The models are gpu_start.py's BERT-base and ResNet-50 in fp16 (`--model`). A request to BERT-base holds 8 sequences of
128 token ids (int16, 2 KiB) and its answer their first tokens' vectors (float16, 12 KiB); one to ResNet-50 holds 8
images of 32 x 32 (uint8, 24 KiB), which the handler enlarges, and its answer the scores (float16, 16 KiB). So the sides
compete for the GPU and not for HTTP. Every inference, on every side, takes `--together` requests. The contexts belong
to one worker, which gets eight inferences for each context from TorchServe at once and spreads them over its contexts,
by TorchServe's micro-batching (`tensorrt`, `aot_inductor`); or to one process that 2 k workers share, which get one
inference at a time as the eager workers do (`across_workers`, of an AOTInductor artifact).

Throughput is that of a closed loop of `--clients` connections, in requests; p99 is taken in the same loop, and at equal
rates for all sides, fractions of what the eager workers can do, from the time at which a request was due. Memory is the
whole GPU's, from nvidia-smi; its parts are those that can be told apart. "Without a server" is the bound that the GPU
sets: k threads of one process, or k eager processes, that do what the handler does and nothing else.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_serving_models import BATCH, HANDLER, LOADS
from gpu_start import INPUTS, ROOT, SOURCES, environment

sys.path.insert(0, str(ROOT))

PROCESSES = 8
SIDES = ("eager", "tensorrt", "aot_inductor", "across_workers")
RATES = (0.8, 0.95, 1.0)
INFERENCES_EACH = 8
SHARING = 2
"""Workers for each context with `across_workers`: one prepares while another's call runs."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
Facts = dict[str, Any]


def workers_of(side: str, workers: int) -> int:
    """How many workers TorchServe runs, against so many eager ones."""
    return {"eager": workers, "across_workers": SHARING * workers}.get(side, 1)


def configuration(model: str, side: str, workers: int, together: int, store: str) -> Facts:
    """model-config.yaml of one side."""
    rows = BATCH * together
    section: Facts = {
        "store": store,
        "backends": ["aot_inductor" if side == "across_workers" else side],
        "strict": True,
        "dtype": "float16",
        "inputs": INPUTS[model],
        "dimensions": {"batch": {"min": 1, "max": 16}},
        "warmup": [{"batch": rows}],
    }
    config: Facts = {
        "minWorkers": workers_of(side, workers),
        "maxWorkers": workers_of(side, workers),
        "batchSize": together,
        "maxBatchDelay": 1,
        "responseTimeout": 120,
        "startupTimeout": 600,
        "handler": {"ts_handlers": section},
    }
    if side != "eager":
        section["contexts"] = {"count": workers, "cuda_graphs": True, "across_workers": side == "across_workers"}
        section["tensorrt"] = {"ranges": [{"batch": {"min": 1, "opt": rows, "max": 16}}]}
    if side in ("tensorrt", "aot_inductor"):
        parallelism = {"preprocess": 1, "inference": workers, "postprocess": 1}
        config["micro_batching"] = {"micro_batch_size": together, "parallelism": parallelism}
        config.update(batchSize=INFERENCES_EACH * workers * together)
    return config


def client(model: str, port: int, connections: int, seconds: float, rate: float, pipe: Any) -> None:
    """A process with some connections in threads: a closed loop, or one request per `connections / rate` seconds each.

    Sends back the latencies in seconds, counted from when the request was due.
    """
    import threading

    latencies: list[float] = []
    wrong: list[str] = []
    body = LOADS[model].body()
    ready = threading.Barrier(connections + 1)

    def work(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        interval = connections / rate if rate else 0.0
        ready.wait()
        due = time.perf_counter() + number / connections * interval
        end = time.perf_counter() + seconds
        while True:
            if interval:
                time.sleep(max(0.0, due - time.perf_counter()))
            started = due if interval else time.perf_counter()
            if started >= end:
                return
            connection.request("POST", "/predictions/model", body, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200 or len(content) != LOADS[model].answer_bytes:
                wrong.append(f"{answer.status}: {content[:200]!r}")
            latencies.append(time.perf_counter() - started)
            due += interval

    threads = [threading.Thread(target=work, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    ready.wait()
    for thread in threads:
        thread.join()
    pipe.send((latencies, wrong[:3]))


def load(model: str, port: int, clients: int, seconds: float, rate: float = 0.0) -> Facts:
    """Requests per second and latencies in milliseconds."""
    pipes, processes = [], []
    for _ in range(PROCESSES):
        ours, theirs = multiprocessing.Pipe()
        arguments = (model, port, clients // PROCESSES, seconds, rate / PROCESSES, theirs)
        processes.append(multiprocessing.Process(target=client, args=arguments))
        pipes.append(ours)
    for process in processes:
        process.start()
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    latencies = sorted(latency for some, _ in found for latency in some)
    wrong = [message for _, some in found for message in some]
    if wrong:
        raise SystemExit(f"wrong answers: {wrong[0]}")
    at = {name: latencies[int(len(latencies) * part)] * 1000 for name, part in (("p50", 0.5), ("p99", 0.99))}
    return {"per_second": len(latencies) / seconds, **{name: round(value, 2) for name, value in at.items()}}


def gpu_memory_mib() -> int:
    """Memory in use on the whole GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def serve(model: str, side: str, model_store: Path, workers: int, measure: Any) -> Facts:
    """Start TorchServe with one side and measure it."""
    from ts_handlers.testing.server import TorchServe

    before = gpu_memory_mib()
    with TorchServe(model_store, {"model": side}, env=ENVIRONMENT) as server:
        server.wait_ready("model", workers_of(side, workers), timeout=400)
        ready = server.elapsed
        port = int(server.url().rpartition(":")[2])
        load(model, port, 64, 2.0)
        facts: Facts = measure(port)
        facts["ready_s"] = round(ready, 2)
        facts["gpu_memory_mib"] = gpu_memory_mib() - before
        facts["describe"] = server.describe("model")
    return facts


def without_server(model: str, side: str, folder: Path, workers: int, seconds: float) -> float:
    """Inferences per second without TorchServe, all together."""
    processes, threads = (workers, 1) if side == "eager" else (1, workers)
    child = Path(__file__).with_name("serving_child.py")
    command = [sys.executable, str(child), model, str(folder), str(threads), str(seconds)]
    pipes: Facts = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, **pipes) for _ in range(processes)]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started)


def context_mib() -> int:
    """What a process takes that has done nothing but create torch's CUDA context."""
    code = "import torch, sys; torch.zeros(1, device='cuda'); print(flush=True); sys.stdin.read()"
    before = gpu_memory_mib()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        used = gpu_memory_mib() - before
        process.stdin.close()
    return used


def memory_parts(facts: Facts, context: int, weights: int) -> Facts:
    """Parts of a side's memory in MiB, of one process where there are several."""
    parts = {"CUDA context": context, "weights": weights}
    artifact = facts["describe"]["artifact"]
    predicted = artifact.get("memory", {}).get("predicted")
    if predicted is not None:
        parts["scratch"] = predicted["scratch_bytes"] >> 20
        parts["outputs and bindings"] = predicted["buffer_bytes"] >> 20
    allocator = artifact.get("gpu_memory")
    if allocator is not None:
        parts["CUDA graphs with their scratch and outputs"] = allocator["graph_bytes"] >> 20
        own = sum(parts.values()) - context - (weights if predicted is not None else 0)  # a plan holds its weights
        parts["torch's allocator otherwise"] = (allocator["torch_bytes"] >> 20) - own
    parts["everything else"] = facts["gpu_memory_mib"] // facts["processes"] - sum(parts.values())
    return parts


def prepare(work: Path, model: str, store: str, workers: int, together: int, sides: list[str]) -> tuple[Path, int]:
    """A folder for each side (TorchServe's no-archive format), with the same seeded weights, whose MiB are returned."""
    import torch
    import yaml

    from ts_handlers.model.archive_files import load_model_class

    model_store = work / "models"
    for side in sides:
        folder = model_store / side
        (folder / "MAR-INF").mkdir(parents=True)
        (folder / "model.py").write_text(SOURCES[model])
        (folder / "handler.py").write_text(HANDLER)
        (folder / "codec.py").write_text(LOADS[model].codec)
        config = configuration(model, side, workers, together, store)
        (folder / "model-config.yaml").write_text(yaml.safe_dump(config))
        described = {
            "modelName": "model",
            "serializedFile": "model.pt",
            "modelFile": "model.py",
            "handler": "handler.py",
            "modelVersion": "1.0",
            "configFile": "model-config.yaml",
        }
        (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"runtime": "python", "model": described}))
        torch.manual_seed(0)
        state = load_model_class(folder / "model.py")().state_dict()
        torch.save(state, folder / "model.pt")
    return model_store, sum(tensor.numel() * 2 for tensor in state.values()) >> 20


def build(model: str, model_store: Path, sides: list[str]) -> None:
    """Fill the store, all backends at once; what is measured starts from it."""
    with ThreadPoolExecutor() as threads:
        artifacts = [side for side in ("tensorrt", "aot_inductor") if side in sides]
        if "across_workers" in sides and "aot_inductor" not in sides:
            artifacts.append("across_workers")
        list(threads.map(lambda side: without_server(model, side, model_store / side, 1, 0.1), artifacts))


def compare(workers: int, arguments: argparse.Namespace) -> dict[str, Facts]:
    """Measure one side after the other."""
    found: dict[str, Facts] = {}
    model, clients, seconds = arguments.model, arguments.clients, arguments.seconds
    sides = [side for side in arguments.sides if workers == arguments.workers[0] or side != "tensorrt"]
    with tempfile.TemporaryDirectory() as folder:
        model_store, weights = prepare(Path(folder), model, arguments.store, workers, arguments.together, sides)
        build(model, model_store, sides[1:])
        context = context_mib()
        capacity = 0.0
        for side in sides:

            def measure(port: int) -> Facts:
                nonlocal capacity
                rounds = range(arguments.rounds)
                closed = [load(model, port, clients, seconds) for _ in rounds]
                capacity = capacity or statistics.median(one["per_second"] for one in closed)
                at = {
                    str(part): [
                        load(model, port, arguments.clients, arguments.seconds, part * capacity) for _ in rounds
                    ]
                    for part in RATES
                }
                return {"closed": closed, **at}

            facts = found[side] = serve(model, side, model_store, workers, measure)
            facts["processes"] = workers if side == "eager" else 1
            facts["memory_parts_mib"] = memory_parts(facts, context, weights)
            facts["without_server"] = [
                without_server(model, side, model_store / side, workers, arguments.seconds)
                for _ in range(arguments.rounds)
            ]
            print(side, {key: value for key, value in facts.items() if key != "describe"}, flush=True)
    return found


def main() -> None:
    """Compare for each number of workers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[4, 1], help="eager workers, and contexts of the others together"
    )
    parser.add_argument("--model", choices=sorted(LOADS), default="bert_base")
    parser.add_argument("--together", type=int, default=1, choices=(1, 2), help="requests in one inference")
    parser.add_argument(
        "--sides", nargs="+", default=list(SIDES), choices=SIDES, help="eager comes first; tensorrt with the first k"
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", help="keep the artifacts here; a run that finds them builds nothing")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results: Facts = {}
    with tempfile.TemporaryDirectory() as store:
        arguments.store = arguments.store or store
        for workers in arguments.workers:
            found = results[str(workers)] = compare(workers, arguments)
            report(found, workers, arguments)
            if arguments.json:
                asked = {name: value for name, value in vars(arguments).items() if name not in ("json", "store")}
                facts = {"environment": environment(), "arguments": asked, "results": results}
                Path(arguments.json).write_text(json.dumps(facts, indent=1))


def report(found: dict[str, Facts], workers: int, arguments: argparse.Namespace) -> None:
    """A row for each side, with ratios of medians to the eager workers."""

    def median(side: str, kind: str, name: str) -> float:
        return statistics.median(one[name] for one in found[side][kind])

    first = arguments.sides[0]
    kinds = ("closed", *map(str, RATES))
    print(f"{workers} contexts in one process, or {workers} workers; ratios to {first}")
    print(
        "| side | requests/s | ratio | "
        + " | ".join(f"p99 ms {kind} | ratio" for kind in kinds)
        + " | GPU MiB | READY s | without a server |"
    )
    for side, facts in found.items():
        throughput = median(side, "closed", "per_second")
        cells = [side, f"{throughput:.0f}", f"{throughput / median(first, 'closed', 'per_second'):.2f}"]
        for kind in kinds:
            p99 = median(side, kind, "p99")
            cells += [f"{p99:.1f}", f"{p99 / median(first, kind, 'p99'):.2f}"]
        cells += [str(facts["gpu_memory_mib"]), str(facts["ready_s"])]
        cells.append(f"{statistics.median(facts['without_server']):.0f}")
        print("| " + " | ".join(cells) + " |")
    for side, facts in found.items():
        print(f"{side}: MiB of each process: {facts['memory_parts_mib']}")


if __name__ == "__main__":
    main()
