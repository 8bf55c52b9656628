"""TensorRT execution contexts on a GPU: latency, throughput and memory of one engine, against eager and Inductor.

    python benchmarks/gpu_contexts.py --models resnet50 bert_base --rounds 3 --json FILE

Models, inputs and weights are those of gpu_start.py: fp16, batch 8, dynamic from 1 to 16. One process for each model;
rounds repeat all rows one after the other, and medians over the rounds are reported. Latency is the device's time of
one call from one thread, throughput that of as many threads as there are contexts, each of which waits for its answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gpu_start import ROOT, environment, prepare, relative_error, settings_of, steady_ms

CONTEXTS = 4
CALLS = 400
ROWS: dict[str, dict[str, Any]] = {
    "one context": {"count": 1},
    "one context, CUDA graphs": {"count": 1, "cuda_graphs": True},
    "private": {"count": CONTEXTS, "scratch": "private"},
    "private, CUDA graphs": {"count": CONTEXTS, "scratch": "private", "cuda_graphs": True},
    "shared": {"count": CONTEXTS, "scratch": "shared"},
    "shared, CUDA graphs": {"count": CONTEXTS, "scratch": "shared", "cuda_graphs": True},
    "one context, float32 accumulation": {"count": 1},
}

Facts = dict[str, Any]


def throughput(call: Any, threads: int) -> float:
    """Calls per second of so many threads, each waiting for its own answer."""
    import torch

    def work() -> None:
        with torch.inference_mode():
            for _ in range(CALLS // threads):
                call()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    torch.cuda.synchronize()
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.cuda.synchronize()
    return CALLS / (time.perf_counter() - started)


def child(model: str, directory: str, store: str, rounds: int, autotune: bool, rows: list[str]) -> None:
    """Measure the rows in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    from ts_handlers import ArchiveSource, parse_settings, start_model

    torch.cuda.set_device(0)
    inputs = [tensor.cuda() for tensor in torch.load(f"{directory}/inputs.pt")]

    def start(backend: str, contexts: Facts, **tensorrt: bool) -> Any:
        config = settings_of(model, backend, store)
        config["handler"]["ts_handlers"].update(contexts=contexts, tensorrt=tensorrt)
        source = ArchiveSource(model, directory, "model.py", "model.pt", ignored_files=("inputs.pt", "eager.pt"))
        return start_model(source, parse_settings(config), "cuda:0")

    eager = start("eager", {"count": 1})
    calls: dict[str, Any] = {"eager": eager}
    facts: Facts = {"eager": {}}
    with torch.inference_mode():
        expected = eager(*inputs).cpu().double()
    for row in rows:
        contexts = ROWS[row]
        before = torch.cuda.memory_allocated()
        found = start("tensorrt", contexts, float32_accumulation="float32" in row)
        artifact = found.describe()["artifact"]
        facts[row] = {
            "memory": artifact["memory"],
            "allocated_bytes": torch.cuda.memory_allocated() - before,
            "relative_error": relative_error(found(*inputs), expected),
            "in_tensorrt": artifact["in_tensorrt"],
        }
        calls[row] = found
    if autotune:
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.wait_pool_ready()  # what is tuned is otherwise compiled by this process alone
        started = time.perf_counter()
        tuned = torch.compile(eager._request.eager(), mode="max-autotune", dynamic=False)
        with torch.inference_mode():
            error = relative_error(tuned(*inputs), expected)
        calls["inductor max-autotune"] = tuned
        facts["inductor max-autotune"] = {"relative_error": error, "compile_s": time.perf_counter() - started}
    for _ in range(rounds):
        for row, call in calls.items():
            threads = ROWS.get(row, {}).get("count", 1)
            with torch.inference_mode():
                facts[row].setdefault("steady_ms", []).append(steady_ms(call, inputs))
            facts[row].setdefault("per_second", []).append(throughput(lambda call=call: _wait(call, inputs), threads))
    print("RESULT " + json.dumps(facts))


def _wait(call: Any, inputs: list[Any]) -> None:
    """One call whose answer has arrived on the host: what a handler's postprocess does."""
    answer = call(*inputs)
    answer.cpu()


def report(model: str, facts: Facts) -> None:
    """One line per row, with ratios per round."""
    eager, one = facts["eager"], facts["one context"]
    print(f"\n{model}: row | ms | eager / ms | per second | x one context | predicted, torch MiB | error")
    for row, found in facts.items():
        speed = statistics.median(a / b for a, b in zip(eager["steady_ms"], found["steady_ms"], strict=True))
        gain = statistics.median(a / b for a, b in zip(found["per_second"], one["per_second"], strict=True))
        memory = ""
        if "memory" in found:
            used = found["memory"]["used"]["torch_bytes"]
            memory = f"{found['memory']['predicted']['total_bytes'] / 2**20:.1f}, {used / 2**20:.1f}"
        print(
            f"  {row} | {statistics.median(found['steady_ms']):.3f} | {speed:.2f} | "
            f"{statistics.median(found['per_second']):.0f} | {gain:.2f} | {memory} | "
            f"{found.get('relative_error', 0):.2g} {found.get('compile_s', '')}"
        )


def main() -> None:
    """Run each model in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "bert_base"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="one context comes first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-autotune", action="store_true", help="measure that mode too (minutes)")
    parser.add_argument("--json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child, arguments.rounds, arguments.max_autotune, arguments.rows)
        return
    results: Facts = {}
    with tempfile.TemporaryDirectory() as work:
        for model in arguments.models:
            directory = Path(work) / model
            prepare(model, directory)
            command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--rows", *arguments.rows]
            command += ["--child", model, str(directory), f"{work}/{model}-store"]
            command += ["--max-autotune"] if arguments.max_autotune else []
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in found.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{model}: FAILED {(found.stdout + found.stderr)[-3000:]}")
                continue
            results[model] = json.loads(lines[0][7:])
            report(model, results[model])
            if arguments.json:
                facts = {"environment": environment(), "results": results}
                Path(arguments.json).write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
