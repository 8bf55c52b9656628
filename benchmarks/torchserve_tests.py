"""TorchServe's own tests of its handlers, plain and with the mixin put over the handlers: how many pass.

    python benchmarks/torchserve_tests.py CHECKOUT --table --json torchserve_tests.json
    python benchmarks/torchserve_tests.py CHECKOUT --only test_base_handler,test_model_config

CHECKOUT is a checkout of TorchServe's repository; a copy of it is run, and nothing of it is kept. The tests download
weights and archives. Without a network `--seeded` gives them random weights of a seed: tests that ask for a certain
label then fail, plain as ours.

Needs what the tests need (pytest, torchvision, captum, orjson, requests) beside TorchServe. Exit code 1 when a test
that passes plain does not pass with the mixin.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import command_line
import environment

from ts_handlers.testing.server import find_java_home

HERE = Path(__file__).resolve().parent
UNIT = "ts/torch_handler/unit_tests"
SERVER = "test/pytest"
FILES = (
    *(f"{UNIT}/test_{name}.py" for name in ("base_handler", "envelopes", "image_classifier", "image_segmenter")),
    *(f"{UNIT}/test_{name}.py" for name in ("object_detector", "mnist_kf")),
    *(f"{SERVER}/test_{name}.py" for name in ("handler", "handler_traceback_logging", "torch_compile")),
    *(f"{SERVER}/test_example_{name}.py" for name in ("torch_compile", "micro_batching")),
    *(f"{SERVER}/test_example_stateful_sequence_{name}_http.py" for name in ("batching", "continuous_batching")),
    *(f"{SERVER}/test_{name}.py" for name in ("model_config", "send_intermediate_prediction_response", "parallelism")),
)
KINDS = ("plain", "ours")
LONGEST_SECONDS = 1200


def run_file(kind: str, file: str, checkout: Path, work: Path) -> dict[str, str]:
    """Outcome of each test of a file: passed, failed, error or skipped; a file that cannot be run has one entry."""
    report = work / f"{kind}-{Path(file).stem}.xml"
    scratch = work / "tmp" / f"{kind}-{Path(file).stem}"
    scratch.mkdir(parents=True, exist_ok=True)
    search = [str(HERE / "mixin_over"), str(HERE.parent)]
    env = {**os.environ, "TMPDIR": str(scratch), "TS_HANDLERS_CACHE": str(work / "store")}
    env["TORCHSERVE_CHECKOUT"] = str(checkout)
    if (checkout / "torch_home").is_dir():
        env["TORCH_HOME"] = str(checkout / "torch_home")
    java = find_java_home()
    if java is not None:
        env["JAVA_HOME"] = java
        env["PATH"] = os.pathsep.join((str(Path(java) / "bin"), env["PATH"]))
    env["PATH"] = os.pathsep.join((str(work / "bin"), env["PATH"]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if kind == "ours":
        env["MIXIN_OVER_HANDLERS"] = "1"
        command += ["-p", "mixin_over"]
    env["PYTHONPATH"] = os.pathsep.join([*search, *filter(None, [os.environ.get("PYTHONPATH")])])
    with_server = file.startswith(SERVER)
    if with_server:
        command += ["-p", "downloads"]
    folder = checkout / SERVER if with_server else checkout
    command.append(str(checkout / file))
    with (work / f"{kind}-{Path(file).stem}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            return {"(whole file)": f"error: longer than {LONGEST_SECONDS} s"}
        finally:
            _end_session(process)
    return (
        read_report(report) if report.is_file() else {"(whole file)": f"error: pytest ended with {process.returncode}"}
    )


def write_commands(folder: Path) -> None:
    """Write the commands that the tests call, for this interpreter."""
    folder.mkdir(exist_ok=True)
    for name, module, function in (
        ("torchserve", "ts.model_server", "start"),
        ("torch-model-archiver", "model_archiver.model_packaging", "generate_model_archive"),
    ):
        path = folder / name
        path.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\n\nsys.exit({function}())\n")
        path.chmod(0o755)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End what a test has left running: servers and their workers are of the same session."""
    for each in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, each)
        except ProcessLookupError:
            return
        time.sleep(1)
    process.wait()


def read_report(report: Path) -> dict[str, str]:
    """Outcome of each test in pytest's JUnit report, with the first line of what went wrong."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for kind, name in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            found = case.find(kind)
            if found is not None:
                outcome = (
                    f"{name}: {(found.get('message') or '').splitlines()[0][:160] if found.get('message') else ''}"
                )
        outcomes[case.get("name", "(whole file)")] = outcome
    return outcomes


def write_seeded_weights(checkout: Path, files: list[str]) -> None:
    """Put random weights of a seed where these tests would put what they download, and where a file is missing."""
    import torchvision
    from torchvision.models import detection, segmentation

    def model_of(file: str) -> Any:
        space: dict[str, Any] = {"__name__": "seeded"}
        exec(compile((checkout / file).read_text("utf-8"), file, "exec"), space)  # their own model file
        return space["Net"]

    def segmenter() -> Any:
        return segmentation.fcn_resnet101(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)

    def detector() -> Any:
        return detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)

    resnet = ".cache/" + Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
    hub = "torch_home/hub/checkpoints"
    mnist, stateful = "examples/image_classifier/mnist", "examples/stateful"
    for test, path, make in (
        ("image_classifier", resnet, torchvision.models.resnet18),
        ("micro_batching", resnet, torchvision.models.resnet18),
        ("image_segmenter", ".cache/fcn_resnet101_coco-7ecb50ca.pth", segmenter),
        ("image_segmenter", f"{hub}/resnet101-63fe2227.pth", torchvision.models.resnet101),
        ("object_detector", f"{hub}/resnet50-0676ba61.pth", torchvision.models.resnet50),
        ("object_detector", ".cache/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", detector),
        (
            "example_torch_compile",
            "examples/pt2/torch_compile/densenet161-8d451a50.pth",
            torchvision.models.densenet161,
        ),
        ("mnist", f"{mnist}/mnist_cnn.pt", lambda: model_of(f"{mnist}/mnist.py")()),
        ("stateful", f"{stateful}/model_cnn.pt", lambda: model_of(f"{stateful}/model.py")()),
    ):
        if any(test in file for file in files):
            _save(make, checkout / path)


def _save(make: Any, path: Path) -> None:
    import torch

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(1)
        torch.save(make().state_dict(), path)


def run(checkout: Path, files: list[str], seeded: bool, work: Path) -> dict[str, Any]:
    """Run each file plain and ours; returns JSON-compatible data."""
    copy = work / "checkout"
    write_commands(work / "bin")
    shutil.copytree(checkout, copy, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    if seeded:
        write_seeded_weights(copy, files)
    found: dict[str, Any] = {}
    for file in files:
        found[file] = {}
        for kind in KINDS:
            found[file][kind] = run_file(kind, file, copy, work)
            counts = Counter(outcome.partition(":")[0] for outcome in found[file][kind].values())
            print(f"{file}: {kind}: {dict(counts)}", file=sys.stderr, flush=True)
    return {"benchmark": "torchserve_tests", "environment": environment.facts(), "seeded": seeded, "files": found}


def worse(result: dict[str, Any]) -> list[str]:
    """Tests that pass plain and not with the mixin, with what was said."""
    return [
        f"{file}::{name}: {kinds['ours'].get(name, 'not run')}"
        for file, kinds in result["files"].items()
        for name, outcome in kinds["plain"].items()
        if outcome == "passed" and kinds["ours"].get(name) != "passed"
    ]


def markdown(result: dict[str, Any]) -> str:
    """Counts for each file, and the tests that only plain passes."""
    lines = ["| tests | plain: passed, failed, skipped | ours: passed, failed, skipped |", "|---|---|---|"]
    totals = {kind: Counter[str]() for kind in KINDS}
    for file, kinds in result["files"].items():
        cells = []
        for kind in KINDS:
            counts = Counter(outcome.partition(":")[0] for outcome in kinds[kind].values())
            counts["failed"] += counts.pop("error", 0)
            totals[kind] += counts
            cells.append(_counts(counts))
        lines.append(f"| `{file}` | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(_counts(totals[kind]) for kind in KINDS)} |")
    return "\n".join([*lines, "", *(worse(result) or ["No test passes plain alone."])])


def _counts(counts: Counter[str]) -> str:
    return ", ".join(str(counts[name]) for name in ("passed", "failed", "skipped"))


def main() -> int:
    """Parse the command line, run, and print or write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of TorchServe's repository")
    parser.add_argument("--only", help="comma-separated parts of file names")
    parser.add_argument("--seeded", action="store_true", help="random weights in place of downloads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome of each test")
    parser.add_argument("--table", action="store_true", help="print Markdown tables")
    parser.add_argument("--workdir", type=Path, help="keep logs and reports here")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    if not (checkout / UNIT).is_dir():
        parser.error(f"{checkout} has no {UNIT}; expected a checkout of TorchServe's repository")
    wanted = arguments.only.split(",") if arguments.only else [""]
    files = [file for file in FILES if any(part in file for part in wanted) and (checkout / file).is_file()]
    with command_line.work_folder("torchserve_tests", arguments.workdir) as work:
        result = run(checkout, files, arguments.seeded, work)
    command_line.write(result, arguments, markdown)
    return 1 if worse(result) else 0


if __name__ == "__main__":
    sys.exit(main())
