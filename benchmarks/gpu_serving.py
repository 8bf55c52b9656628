"""One TorchServe worker with k execution contexts against k eager workers, on a GPU: throughput, p99 and memory.

    python benchmarks/gpu_serving.py --workers 4 --seconds 5 --rounds 3 --json FILE

The model is gpu_start.py's BERT-base in fp16; a request holds 8 sequences of 128 token ids (int16, 2 KiB) and its
answer their first tokens' vectors (float16, 12 KiB), so that the two sides compete for the GPU and not for HTTP. Eager
workers take one request at a time; the worker with contexts takes four for each context from TorchServe and hands them
to its contexts one by one, by TorchServe's micro-batching. Throughput is that of a closed loop of `--clients`
connections, in requests; p99 is taken at an equal rate for both sides, a fraction of what the eager workers can do,
from the time at which a request was due. Memory is the whole GPU's, from nvidia-smi.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_start import BERT_BASE, INPUTS, ROOT, environment

sys.path.insert(0, str(ROOT))

HANDLER = """
import numpy
import torch

from ts_handlers import CompiledHandler


class Handler(CompiledHandler):
    def preprocess(self, data):
        (row,) = data
        rows = numpy.frombuffer(self.request_body(row), dtype=numpy.int16).reshape(8, 128)
        ids = torch.from_numpy(rows.astype(numpy.int64)).to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def postprocess(self, data):
        return [data[:, 0].cpu().numpy().tobytes()]
"""
BATCH = 8
ANSWER_BYTES = BATCH * 768 * 2
PROCESSES = 8
Facts = dict[str, Any]


def configuration(backend: str, workers: int, store: Path) -> Facts:
    """model-config.yaml of one side."""
    contexts = workers if backend == "tensorrt" else 1
    config: Facts = {
        "minWorkers": 1 if backend == "tensorrt" else workers,
        "maxWorkers": 1 if backend == "tensorrt" else workers,
        "batchSize": 4 * contexts if contexts > 1 else 1,
        "maxBatchDelay": 2,
        "responseTimeout": 120,
        "startupTimeout": 600,
        "handler": {
            "ts_handlers": {
                "store": str(store),
                "backends": [backend],
                "strict": True,
                "dtype": "float16",
                "inputs": INPUTS["bert_base"],
                "dimensions": {"batch": {"min": 1, "max": 16}},
                "warmup": [{"batch": BATCH}],
            }
        },
    }
    if contexts > 1:
        config["handler"]["ts_handlers"]["contexts"] = {"count": contexts, "cuda_graphs": True}
        parallelism = {"preprocess": 2, "inference": contexts, "postprocess": 2}
        config["micro_batching"] = {"micro_batch_size": 1, "parallelism": parallelism}
    return config


def client(port: int, connections: int, seconds: float, rate: float, pipe: Any) -> None:
    """A process with some connections in threads: a closed loop, or one request per `connections / rate` seconds each.

    Sends back the latencies in seconds, counted from when the request was due.
    """
    import random
    import threading

    latencies: list[float] = []
    wrong: list[str] = []
    ids = random.randbytes(BATCH * 256)
    body = bytes(b if i % 2 == 0 else b % 100 for i, b in enumerate(ids))  # int16 inside the vocabulary
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
            if answer.status != 200 or len(content) != ANSWER_BYTES:
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


def load(port: int, clients: int, seconds: float, rate: float = 0.0) -> Facts:
    """Requests per second and latencies in milliseconds."""
    pipes, processes = [], []
    for _ in range(PROCESSES):
        ours, theirs = multiprocessing.Pipe()
        arguments = (port, clients // PROCESSES, seconds, rate / PROCESSES, theirs)
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


def serve(side: str, model_store: Path, workers: int, measure: Any) -> Facts:
    """Start TorchServe with one side and measure it."""
    from ts_handlers.testing.server import TorchServe

    before = gpu_memory_mib()
    with TorchServe(model_store, {"model": side}, env={"OMP_NUM_THREADS": "1"}) as server:
        server.wait_ready("model", 1 if side != "eager" else workers, timeout=400)
        ready = server.elapsed
        port = int(server.url().rpartition(":")[2])
        load(port, 64, 2.0)
        facts: Facts = measure(port)
        facts["ready_s"] = round(ready, 2)
        facts["gpu_memory_mib"] = gpu_memory_mib() - before
        facts["describe"] = server.describe("model")
    return facts


def prepare(work: Path, workers: int) -> Path:
    """A folder for each side (TorchServe's no-archive format), with the same seeded weights."""
    import torch
    import yaml

    from ts_handlers.archive_files import load_model_class

    model_store = work / "models"
    for side in ("eager", "tensorrt"):
        folder = model_store / side
        (folder / "MAR-INF").mkdir(parents=True)
        (folder / "model.py").write_text(BERT_BASE)
        (folder / "handler.py").write_text(HANDLER)
        (folder / "model-config.yaml").write_text(yaml.safe_dump(configuration(side, workers, work / "store")))
        model = {
            "modelName": "model",
            "serializedFile": "model.pt",
            "modelFile": "model.py",
            "handler": "handler.py",
            "modelVersion": "1.0",
            "configFile": "model-config.yaml",
        }
        (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"runtime": "python", "model": model}))
        torch.manual_seed(0)
        torch.save(load_model_class(folder / "model.py")().state_dict(), folder / "model.pt")
    return model_store


def main() -> None:
    """Measure one side after the other and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="eager workers, and contexts of the one other worker")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.8, help="rate for p99, as a fraction of the eager throughput")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    found: dict[str, Facts] = {}
    with tempfile.TemporaryDirectory() as folder:
        model_store = prepare(Path(folder), arguments.workers)
        serve(
            "tensorrt", model_store, arguments.workers, lambda port: {}
        )  # builds; what is measured starts from the store
        rate = 0.0
        for side in ("eager", "tensorrt"):

            def measure(port: int) -> Facts:
                nonlocal rate
                closed = [load(port, arguments.clients, arguments.seconds) for _ in range(arguments.rounds)]
                rate = rate or arguments.load * statistics.median(one["per_second"] for one in closed)
                equal = [load(port, arguments.clients, arguments.seconds, rate) for _ in range(arguments.rounds)]
                return {"closed": closed, "equal": equal}

            found[side] = serve(side, model_store, arguments.workers, measure)
            print(side, {key: value for key, value in found[side].items() if key != "describe"}, flush=True)
        results = {"rate": rate, "sides": found, "arguments": vars(arguments)}
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({"environment": environment(), "results": results}, indent=1))
    report(found, arguments.workers)


def report(found: dict[str, Facts], workers: int) -> None:
    """Ratios of medians."""

    def ratio(kind: str, name: str) -> float:
        values = {side: statistics.median(one[name] for one in facts[kind]) for side, facts in found.items()}
        return values["tensorrt"] / values["eager"]

    ours, eager = found["tensorrt"], found["eager"]
    print(f"one worker with {workers} contexts / {workers} eager workers:")
    print(f"  throughput {ratio('closed', 'per_second'):.2f}, p99 at equal load {ratio('equal', 'p99'):.2f}")
    print(f"  GPU memory {ours['gpu_memory_mib']} / {eager['gpu_memory_mib']} MiB, READY {ours['ready_s']} s")
    memory = ours["describe"]["artifact"]["memory"]
    print(f"  memory of the contexts: {json.dumps(memory['predicted'])} used {json.dumps(memory['used'])}")


if __name__ == "__main__":
    main()
