"""A child of gpu_serving.py: how many inferences a process makes without a server.

    python benchmarks/serving_child.py MODEL FOLDER THREADS SECONDS

Its threads do what the benchmark's handler does with one request: inputs from bytes, the model, bytes of the answer. It
prints a line when it is ready, waits for one, and prints inferences per second.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import torch
import yaml
from gpu_serving_models import LOADS

from ts_handlers import ArchiveSource, parse_settings, start_model

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def main(name: str, folder: Path, threads: int, seconds: float) -> None:
    """Start the model from its folder and count."""
    settings = parse_settings(yaml.safe_load((folder / "model-config.yaml").read_text()))
    contexts = msgspec.structs.replace(settings.contexts, across_workers=False)  # this is the one process
    settings = msgspec.structs.replace(settings, contexts=contexts)
    source = ArchiveSource("model", folder, "model.py", "model.pt", ignored_files=("handler.py",))
    model = start_model(source, settings, DEVICE)
    load = LOADS[name]
    codec: dict[str, Any] = {}
    exec(load.codec, codec)
    body = load.body()
    counts = [0] * threads
    over = threading.Event()

    def work(number: int) -> None:
        with torch.inference_mode():
            while not over.is_set():
                codec["encode"](model(**codec["decode"]([body], DEVICE)), 1)
                counts[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    time.sleep(1)
    print("ready", model.describe()["result"], flush=True)
    sys.stdin.readline()
    before, started = sum(counts), time.perf_counter()
    time.sleep(seconds)
    print((sum(counts) - before) / (time.perf_counter() - started))
    over.set()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
