"""Without a server: process start to first output, and the cost of a call.

    python benchmarks/in_process.py --table --json in_process.json
    python benchmarks/in_process.py --models tiny -n 1 --overhead none --table

Fresh processes, interleaved; preparation runs (which build and fill caches) are not counted. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import archives
import command_line
import environment
import torch
from measure import TOLERANCE, Host
from start_child import LAUNCHED

HERE = Path(__file__).resolve().parent
MODES = ("eager", "aot_inductor", "inductor", "compile")
TITLES = {
    "eager": "eager",
    "aot_inductor": "ours, hit: aot_inductor",
    "inductor": "ours, hit: inductor",
    "compile": "torch.compile, warm cache folder",
}
CACHES = {"eager": "none", "aot_inductor": "store", "inductor": "store", "compile": "inductor"}
START_LIMIT = 1.15
OVERHEAD_LIMIT = 1.03
STEADY_LIMIT = 1.0
OVERHEAD_MODEL = "minilm_size"


def measure_starts(model: str, rounds: int, directory: Path) -> dict[str, Any]:
    """Start every mode `rounds` times, interleaved, and summarise."""
    files = archives.prepare(model, directory / model)
    expected = files.answer()
    work = write_work(files, directory / f"{model}-work")
    hosts = {mode: Host(directory / f"{model}-{mode}").create() for mode in MODES}
    for mode in MODES:
        _say(f"{model}: preparing {mode}")
        _start(mode, files.directory, work, hosts[mode])
    runs = []
    for number in range(1, rounds + 1):
        for mode in MODES:
            run = {"round": number, **_start(mode, files.directory, work, hosts[mode])}
            run["problems"] = _problems(run, expected)
            del run["output"]
            runs.append(run)
            _say(f"{model}: round {number}/{rounds} {mode}: {run['total_s']:.2f} s {'; '.join(run['problems'])}")
    return {"modes": {mode: _summarise(runs, mode) for mode in MODES}, "bars": _start_bars(runs), "runs": runs}


def write_work(files: archives.ModelFiles, work: Path) -> Path:
    """Inputs as raw bytes and one settings file for each backend."""
    work.mkdir()
    specs = {}
    for name, tensor in files.inputs().items():
        (work / name).write_bytes(tensor.numpy().tobytes())
        specs[name] = (str(tensor.dtype)[6:], list(tensor.shape))
    (work / "inputs.json").write_text(json.dumps(specs), "utf-8")
    for backend in ("aot_inductor", "inductor"):
        archives.as_settings_file(files, [backend, "eager"], work / f"{backend}.json")
    return work


def _start(mode: str, directory: Path, work: Path, host: Host) -> dict[str, Any]:
    return _child("start_child.py", [mode, str(directory), str(work)], host.env(CACHES[mode]))


def _child(script: str, arguments: list[str], changes: dict[str, str | None]) -> dict[str, Any]:
    env = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    command = [sys.executable, str(HERE / script), *arguments]
    os.sync()
    time.sleep(0.3)
    env[LAUNCHED] = repr(time.monotonic())
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{script} {arguments[0]} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _problems(run: dict[str, Any], expected: torch.Tensor) -> list[str]:
    """Why a run does not count: wrong answer, no hit, or a heavy import."""
    mode, outcome = run["mode"], run["outcome"]
    problems = []
    error = archives.relative_error(torch.tensor(run["output"], dtype=expected.dtype), expected)
    if not error <= TOLERANCE:
        problems.append(f"wrong answer: relative error {error:.3g} against eager")
    if mode in ("aot_inductor", "inductor") and (outcome["backend"], outcome["result"]) != (mode, "hit"):
        problems.append(f"{outcome['backend']} {outcome['result']}, expected {mode} hit")
    if mode == "aot_inductor" and run["heavy_modules"]:
        problems.append(f"imported {', '.join(run['heavy_modules'])}")
    if mode == "compile" and outcome["fxgraph_cache_miss"]:
        problems.append(f"{outcome['fxgraph_cache_miss']} cache misses")
    return problems


def _floor(run: dict[str, Any]) -> float:
    """`import torch` and the first eager inference, without the construction of the model."""
    parts = run["parts_s"]
    return float(parts["python"] + parts["import_torch"] + parts["first_inference"])


def _summarise(runs: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    mine = [run for run in runs if run["mode"] == mode]
    good = [run for run in mine if not run["problems"]]
    summary: dict[str, Any] = {"runs": len(mine), "failed": len(mine) - len(good)}
    summary["problems"] = sorted({problem for run in mine for problem in run["problems"]})
    if good:
        summary["total_s"] = _median([run["total_s"] for run in good])
        summary["steady_ms"] = _median([run["steady_ms"] for run in good])
        summary["parts_s"] = {part: _median([run["parts_s"][part] for run in good]) for part in good[0]["parts_s"]}
        if mode == "eager":
            summary["floor_s"] = _median([_floor(run) for run in good])
    return summary


def _start_bars(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    good = {(run["mode"], run["round"]): run for run in runs if not run["problems"]}
    rounds = sorted({number for _, number in good})
    bars = []
    for mode, limit in (("aot_inductor", START_LIMIT), ("inductor", None), ("compile", None)):
        pairs = [(good[mode, n], good["eager", n]) for n in rounds if (mode, n) in good and ("eager", n) in good]
        starts = [ours["total_s"] / _floor(eager) for ours, eager in pairs]
        bars.append(_bar(f"{mode}: first output / (import torch + first eager inference)", starts, limit))
    for mode in ("aot_inductor", "inductor"):
        pairs = [(good[mode, n], good["compile", n]) for n in rounds if (mode, n) in good and ("compile", n) in good]
        steady = [ours["steady_ms"] / plain["steady_ms"] for ours, plain in pairs]
        bars.append(_bar(f"{mode}: steady state / torch.compile", steady, STEADY_LIMIT))
    return bars


def _bar(label: str, ratios: list[float], limit: float | None) -> dict[str, Any]:
    measured = _median(ratios) if ratios else None
    met = None if limit is None else measured is not None and measured <= limit
    return {"bar": label, "measured": measured, "limit": limit, "met": met}


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def measure_overhead(sequences: list[int], calls: int, rounds: int, directory: Path) -> dict[str, Any]:
    """Cost of a call at batch 1, for each sequence length in processes of their own; the median process counts."""
    files = archives.prepare(OVERHEAD_MODEL, directory / OVERHEAD_MODEL)
    results: dict[str, Any] = {}
    for sequence in sequences:
        section = {**files.config["handler"]["ts_handlers"], "warmup": [{"batch": 1, "sequence": sequence}]}
        sized = dataclasses.replace(files, config={"handler": {"ts_handlers": section}})
        work = write_work(sized, directory / f"overhead-{sequence}")
        host = Host(directory / f"overhead-host-{sequence}").create()
        env = {**host.env("store"), "TORCHINDUCTOR_CACHE_DIR": str(host.root / "inductor")}
        _say(f"overhead, sequence {sequence}: preparing")
        _child("overhead_child.py", [str(files.directory), str(work), "1"], env)
        runs = []
        for number in range(1, rounds + 1):
            runs.append(_child("overhead_child.py", [str(files.directory), str(work), str(calls)], env))
            if runs[-1]["result"] != "hit" or not runs[-1]["relative_error"] <= TOLERANCE:
                raise SystemExit(f"overhead: {runs[-1]['result']}, relative error {runs[-1]['relative_error']:.3g}")
            _say(f"overhead, sequence {sequence}: {number}/{rounds} {runs[-1]['median_ms']}")
        bars = []
        for name, limit in (("runner", OVERHEAD_LIMIT), ("torch_compile", STEADY_LIMIT)):
            label = f"sequence {sequence}, batch 1: CompiledModel / {name}"
            bars.append(_bar(label, [run[f"compiled_model_over_{name}"] for run in runs], limit))
        medians = {name: _median([run["median_ms"][name] for run in runs]) for name in runs[0]["median_ms"]}
        results[str(sequence)] = {"median_ms": medians, "bars": bars, "runs": runs}
    return results


def markdown(result: dict[str, Any]) -> str:
    """Tables of a result."""
    lines: list[str] = []
    for model, measured in result["models"].items():
        parts = ("python", "import_torch", "inputs", "model", "first_inference")
        lines += [f"## {model}: process start to first output", ""]
        lines += [
            "| | seconds | python | import torch | inputs | model | first inference | steady ms | runs |",
            "| --- |" + " ---: |" * 8,
        ]
        for mode, summary in measured["modes"].items():
            runs = f"{summary['runs'] - summary['failed']}/{summary['runs']}"
            if "total_s" not in summary:
                lines.append(f"| {TITLES[mode]} | failed |" + " |" * 6 + f" {runs} |")
                continue
            cells = [f"{summary['total_s']:.2f}", *(f"{summary['parts_s'][part]:.2f}" for part in parts)]
            lines.append(f"| {TITLES[mode]} | {' | '.join(cells)} | {summary['steady_ms']:.2f} | {runs} |")
            if "floor_s" in summary:
                lines.append(f"| import torch + first eager inference | {summary['floor_s']:.2f} |" + " |" * 7)
        lines += ["", *_bar_lines(measured["bars"]), ""]
        for mode, summary in measured["modes"].items():
            lines += [f"- failed: {mode}: {problem}" for problem in summary["problems"]]
    for sequence, measured in result["overhead"].items():
        lines += [f"## Cost of a call, MiniLM's size, batch 1, sequence {sequence}", "", "| | ms |", "| --- | ---: |"]
        lines += [f"| {name} | {value:.3f} |" for name, value in measured["median_ms"].items()]
        lines += ["", *_bar_lines(measured["bars"]), ""]
    facts = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    return "\n".join([*lines, f"Environment: {facts}.", ""])


def _bar_lines(bars: list[dict[str, Any]]) -> list[str]:
    lines = ["| ratio | measured | limit | met |", "| --- | ---: | ---: | --- |"]
    for bar in bars:
        measured = "" if bar["measured"] is None else f"{bar['measured']:.3f}"
        limit = "" if bar["limit"] is None else f"{bar['limit']:.2f}"
        lines.append(
            f"| {bar['bar']} | {measured} | {limit} | {({True: 'yes', False: '**no**'}).get(bar['met'], '')} |"
        )
    return lines


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Parse the command line, measure, print; 1 when any run failed."""
    parser = argparse.ArgumentParser(description="Process start to first output, and the cost of a call.")
    parser.add_argument("--models", default="resnet50,bert_base", help="comma-separated, or none")
    parser.add_argument("--overhead", default="16,128", help="sequence lengths, comma-separated, or none")
    parser.add_argument("--calls", type=int, default=300, help="calls of each kind per process (default 300)")
    command_line.add_options(parser, "models, caches and stores")
    arguments = parser.parse_args()
    models = [] if arguments.models == "none" else arguments.models.split(",")
    if unknown := sorted(set(models) - set(archives.MODELS)):
        parser.error(f"--models: unknown {', '.join(unknown)}; known: {', '.join(archives.MODELS)}")
    sequences = [] if arguments.overhead == "none" else [int(item) for item in arguments.overhead.split(",")]
    facts = environment.facts()
    if warning := environment.warn_if_busy(facts):
        _say(f"warning: {warning}")
    with command_line.work_folder("in_process", arguments.workdir) as directory:
        result = {
            "benchmark": "in_process",
            "rounds": arguments.n,
            "environment": facts,
            "models": {model: measure_starts(model, arguments.n, directory) for model in models},
            "overhead": measure_overhead(sequences, arguments.calls, arguments.n, directory) if sequences else {},
        }
    command_line.write(result, arguments, markdown)
    failed = any(summary["failed"] for each in result["models"].values() for summary in each["modes"].values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
