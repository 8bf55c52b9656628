"""Processor time of a first build with Inductor's precompiled headers, with those there already, and without.

    python benchmarks/precompiled_headers.py [-n ROUNDS]

Each build is a process of its own with an empty temporary folder; prints a Markdown table of medians, in seconds of the
compiler and its helpers (see docs/decisions/0038-no-precompiled-headers.md).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

BUILD = """
import os, resource, sys, tempfile
import torch
import torch._inductor
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
module = torch.nn.Linear(4, 3).eval()
program = torch.export.export(module, (torch.zeros(2, 4),))
configs = {"cpp.vec_isa_ok": True, "aot_inductor.precompile_headers": sys.argv[1] == "with"}
package = os.path.join(tempfile.mkdtemp(), "package.pt2")
torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=configs)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""


def build(headers: str, temporary: str) -> float:
    """Seconds of processor time of the children of one build."""
    command = [sys.executable, "-c", BUILD, headers]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": temporary}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=3, metavar="ROUNDS", dest="rounds")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {"with": [], "with, there already": [], "without": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as temporary:
            seconds["with"].append(build("with", temporary))
            seconds["with, there already"].append(build("with", temporary))
        with tempfile.TemporaryDirectory() as temporary:
            seconds["without"].append(build("without", temporary))
    print("| precompiled headers | median, s | least to most |\n|---|---:|---:|")
    for name, each in seconds.items():
        print(f"| {name} | {statistics.median(each):.1f} | {min(each):.1f}-{max(each):.1f} |")


if __name__ == "__main__":
    main()
