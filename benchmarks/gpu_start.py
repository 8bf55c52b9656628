"""Process start to first output, and steady state, on a GPU: eager against cold and warm artifacts, fresh processes.

    python benchmarks/gpu_start.py --models resnet50 bert_base --rows eager aot_inductor tensorrt --rounds 3 --json FILE
    python benchmarks/gpu_start.py --rows eager aot_inductor aot_inductor+fork_server --rounds 5 --json FILE

Rows of one round run one after the other, rounds repeat them (A B C A B C), ratios are taken per round and their median
is reported. ResNet-50 is torchvision's in fp16 at batch 8, BERT-base is transformers' in fp16 at 8 x 128; weights are
random with a fixed seed; the batch is dynamic from 1 to 16. Every row's answer is compared with eager's. The process of
a row with ``+fork_server`` is a fork of a resident fork server (docs/fork-server.md), which has imported what workers
import before the row is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

RESNET50 = """
import torch, torchvision
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torchvision.models.resnet50(weights=None)
    def forward(self, pixel_values):
        return self.net(pixel_values)
"""
BERT_BASE = """
import torch
from transformers import BertConfig, BertModel
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = BertModel(BertConfig())
    def forward(self, input_ids, attention_mask):
        return self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
"""
SOURCES = {"resnet50": RESNET50, "bert_base": BERT_BASE}
INPUTS: dict[str, list[dict[str, Any]]] = {
    "resnet50": [{"name": "pixel_values", "dtype": "float16", "shape": ["batch", 3, 224, 224]}],
    "bert_base": [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", 128], "values": [0, 30000]},
        {"name": "attention_mask", "dtype": "int64", "shape": ["batch", 128], "values": [1, 2]},
    ],
}
ROWS = ("eager", "inductor", "aot_inductor", "tensorrt", "aot_inductor+fork_server")
FORK_SERVER = "+fork_server"
BUILT = ("inductor", "aot_inductor", "tensorrt")
STEADY_CALLS = 200
HEAVY = ("sympy", "torch._inductor", "torch._dynamo", "torch_tensorrt", "transformers", "torchvision")

Facts = dict[str, Any]


def settings_of(model: str, backend: str, store: str) -> Facts:
    """model-config.yaml of one row, parsed."""
    section = {
        "store": store,
        "backends": [backend],
        "strict": True,
        "dtype": "float16",
        "inputs": INPUTS[model],
        "dimensions": {"batch": {"min": 1, "max": 16}},
        "warmup": [{"batch": 8}],
    }
    return {"handler": {"ts_handlers": section}}


def child(model: str, row: str, directory: str, store: str) -> None:
    """One fresh process: first output, steady state, and how it came about."""
    sys.path.insert(0, str(ROOT))
    import torch

    facts: Facts = {}
    inputs = torch.load(f"{directory}/inputs.pt")
    call: Any
    if row == "eager":
        sys.path.insert(0, directory)
        from model import Model  # type: ignore[import-not-found]

        module = Model()
        module.load_state_dict(torch.load(f"{directory}/model.pt", weights_only=True))
        call = module.eval().half().cuda()
    else:
        from ts_handlers import ArchiveSource, parse_settings, start_model

        source = ArchiveSource(model, directory, "model.py", "model.pt", ignored_files=("inputs.pt", "eager.pt"))
        call = start_model(source, parse_settings(settings_of(model, row, store)), "cuda:0")
        description = call.describe()
        facts = {key: description[key] for key in ("result", "phases_ms", "build_ms", "artifact", "canary", "key")}
    inputs = [tensor.cuda() for tensor in inputs]
    with torch.inference_mode():
        output = call(*inputs)
        torch.cuda.synchronize()
        facts["first_output_at"] = time.time()
        facts["heavy"] = [name for name in HEAVY if name in sys.modules]
        facts["steady_ms"] = steady_ms(call, inputs)
        reference = Path(directory) / "eager.pt"
        if row == "eager" and not reference.exists():
            torch.save(output.cpu(), reference)
        expected = torch.load(reference).double()
        facts["relative_error"] = relative_error(output, expected)
        one = call(*[tensor[:1] for tensor in inputs])
        facts["batch_1_error"] = relative_error(one, expected[:1])
    facts["gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    print("RESULT " + json.dumps(facts))


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.cpu().double() - expected).norm() / expected.norm())


def steady_ms(call: Any, inputs: list[Any]) -> float:
    """Median of device time per call in milliseconds, launch gaps included."""
    import torch

    for _ in range(20):
        call(*inputs)
    times = []
    for _ in range(STEADY_CALLS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(*inputs)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def run(model: str, row: str, directory: Path, store: Path) -> Facts:
    """Start one child in a new temporary folder and time it from outside."""
    temporary = tempfile.mkdtemp(dir=directory.parent)
    if row.endswith(FORK_SERVER):
        with fork_server(temporary) as interpreter:
            return timed(interpreter, model, row.removesuffix(FORK_SERVER), directory, store, temporary)
    return timed(sys.executable, model, row, directory, store, temporary)


@contextlib.contextmanager
def fork_server(temporary: str) -> Iterator[str]:
    """A fork server that has imported its modules; what starts a process of it, in an interpreter's place."""
    sys.path.insert(0, str(ROOT))
    from ts_handlers.fork_server.start import ForkServer, write_stand_in
    from ts_handlers.servers.torchserve.workers import preloaded_modules

    server = ForkServer(preloaded_modules(["numpy"]), {"TMPDIR": temporary, "PYTHONPATH": str(ROOT)})
    try:
        if not server.wait_ready():
            raise SystemExit("the fork server has ended while it imported")
        yield str(write_stand_in(server.socket, f"/{Path(__file__).name}"))
    finally:
        server.close()


def timed(interpreter: str, model: str, row: str, directory: Path, store: Path, temporary: str) -> Facts:
    """Run a child and time it from outside."""
    command = [interpreter, os.path.abspath(__file__), "--child", model, row, str(directory), str(store)]
    started = time.time()
    result = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": temporary, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(temporary, ignore_errors=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"failed": f"exit {result.returncode}: {(result.stdout + result.stderr)[-1500:]}"}
    facts: Facts = json.loads(lines[0][7:])
    facts["first_output_s"] = facts.pop("first_output_at") - started
    refused = "starts without the fork server"
    if interpreter != sys.executable and refused in result.stderr:
        return {"failed": next(line for line in result.stderr.splitlines() if refused in line)}
    return facts


def prepare(model: str, directory: Path) -> None:
    """Model file, seeded weights and one input batch."""
    directory.mkdir(parents=True)
    (directory / "model.py").write_text(SOURCES[model])
    code = (
        "import sys, torch; from pathlib import Path\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]\n"
        "from gpu_start import settings_of\n"
        "from ts_handlers.model.archive_files import load_model_class\n"
        "from ts_handlers import parse_settings\n"
        "from ts_handlers.model.signature import Signature\n"
        f"d = Path({str(directory)!r}); torch.manual_seed(0)\n"
        "torch.save(load_model_class(d / 'model.py')().state_dict(), d / 'model.pt')\n"
        f"s = parse_settings(settings_of({model!r}, 'eager', ''))\n"
        "torch.save(Signature(s.inputs, s.dimensions).generate({'batch': 8}, seed=3), d / 'inputs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--rows", nargs="+", default=["eager", "inductor", "aot_inductor"], choices=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    results: Facts = {}
    with tempfile.TemporaryDirectory() as work:
        for model in arguments.models:
            directory, store = Path(work) / model, Path(work) / f"{model}-store"
            prepare(model, directory)
            run(model, "eager", directory, store)  # not counted: page cache and the reference output
            cold = {row: run(model, row, directory, store) for row in arguments.rows if row in BUILT}
            rounds = [
                {row: run(model, row, directory, store) for row in arguments.rows} for _ in range(arguments.rounds)
            ]
            results[model] = {"cold": cold, "rounds": rounds}
            report(model, cold, rounds)
            if arguments.json:
                facts = {"environment": environment(), "results": results}
                Path(arguments.json).write_text(json.dumps(facts, indent=1))


def report(model: str, cold: dict[str, Facts], rounds: list[dict[str, Facts]]) -> None:
    """One line per row."""
    print(f"\n{model}: row | first output s | x eager | steady ms | eager / steady | error, batch 1 error")
    for row, facts in cold.items():
        shown = ("first_output_s", "build_ms", "artifact", "relative_error")
        print(f"  cold {row}: {facts.get('failed') or {key: facts[key] for key in shown}}")
    for row in rounds[0]:
        bad = [entry[row]["failed"] for entry in rounds if "failed" in entry[row]]
        if bad:
            print(f"  {row}: FAILED {bad[0]}")
            continue
        first = statistics.median(e[row]["first_output_s"] for e in rounds)
        first_ratio = statistics.median(e[row]["first_output_s"] / e["eager"]["first_output_s"] for e in rounds)
        steady = statistics.median(e[row]["steady_ms"] for e in rounds)
        speed = statistics.median(e["eager"]["steady_ms"] / e[row]["steady_ms"] for e in rounds)
        errors = [max(e[row][key] for e in rounds) for key in ("relative_error", "batch_1_error")]
        last = rounds[-1][row]
        print(
            f"  warm {row} | {first:.2f} | {first_ratio:.2f} | {steady:.3f} | {speed:.2f} | "
            f"{errors[0]:.2g}, {errors[1]:.2g} | {last.get('result')} {last.get('phases_ms')} "
            f"{last.get('artifact')} imports {last['heavy']}"
        )


def commit() -> str | None:
    """The checked out commit."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def environment() -> Facts:
    """What the figures were measured on."""
    code = (
        "import torch, json; print(json.dumps({'torch': torch.__version__, 'gpu': torch.cuda.get_device_name(),"
        "'capability': torch.cuda.get_device_capability()}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    facts: Facts = json.loads(found or "{}")
    facts.update(date=time.strftime("%Y-%m-%d"), python=platform.python_version(), cpus=os.cpu_count())
    facts["commit"] = os.environ.get("BENCHMARK_COMMIT") or commit()  # the former where the tree is a copy without git
    return facts


if __name__ == "__main__":
    main()
