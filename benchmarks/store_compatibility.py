"""Whether this tree hits what another checkout of the project has stored, and has the same keys.

    python benchmarks/store_compatibility.py CHECKOUT [--only NAME ...]

Builds the example archives' models with the package of CHECKOUT into an empty store, each backend of `BACKENDS` alone,
then starts them with the package of this tree on that store with ``on_miss: fail``, and prints the keys and results.
The exit status is 1 unless each start was a hit under the same key with the same answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = ("digits", "minilm", "resnet50", "bert_base")
BACKENDS = ("aot_inductor", "inductor")

START = """
import json, sys
from pathlib import Path
import torch, yaml
from ts_handlers import ArchiveSource, parse_settings, start_model
folder, store, backend, on_miss = sys.argv[1:]
config = yaml.safe_load(Path(folder, "model-config.yaml").read_text())
config["handler"]["ts_handlers"].update(store=store, backends=[backend], on_miss=on_miss, strict=True)
settings = parse_settings(config)
model = start_model(ArchiveSource("model", folder, "model.py", "model.pt", ignored_files=("handler.py",)), settings)
inputs = model.signature.generate(model.signature.example_sizes(), seed=5)
answer = model(*inputs)
leaves = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (tuple, list)) else [answer]
total = float(sum(leaf.double().sum() for leaf in leaves if isinstance(leaf, torch.Tensor)))
facts = model.describe()
print(json.dumps({"result": facts["result"], "key": facts["key"], "builds": facts["counters"]["build"], "sum": total}))
"""


def start(package: Path, folder: Path, store: Path, backend: str, on_miss: str) -> dict[str, Any]:
    """What a start with the package of a checkout says."""
    command = [sys.executable, "-c", START, str(folder), str(store), backend, on_miss]
    variables = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder.name} with {backend} in {package}:\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", action="append", choices=EXAMPLES)
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from build_archives import build

    wrong = 0
    with tempfile.TemporaryDirectory(prefix="ts_handlers-compatibility-") as work:
        for name in arguments.only or EXAMPLES:
            folder = build(name, Path(work) / "models", "no-archive")
            for backend in BACKENDS:
                store = Path(work) / f"store-{name}-{backend}"
                before = start(arguments.checkout, folder, store, backend, "compile")
                after = start(REPOSITORY, folder, store, backend, "fail")
                same = before["key"] == after["key"] and abs(before["sum"] - after["sum"]) <= 1e-3 * abs(before["sum"])
                fine = same and after["result"] == "hit" and after["builds"] == 0
                wrong += not fine
                print(
                    f"{name:10} {backend:13} {before['key']} {'hit, same key and answer' if fine else (before, after)}"
                )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
