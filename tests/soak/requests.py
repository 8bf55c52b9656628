"""Hostile requests beside good ones in one batch of a handler: the good ones are answered, the others refused in short.

A trial is one batch. `CompiledHandler` runs on TorchServe's own context objects, in processes of their own, so that a
request that ends the process is seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.soak import forks
from tests.soak.subject import backend_of
from tests.soak.tally import Tally
from tests.support.models import LINEAR, eager_model, write_archive

LARGEST_REFUSAL = 1024
"""Bytes of an answer that refuses a request."""
BATCHES = 250
"""Batches for each process."""
LARGE = 200_000
GOOD = [[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 0.0, 2.0]]

Draw = Callable[[random.Random], Any]


def _number(rng: random.Random) -> str:
    """A number as JSON or as what its reader may take for one."""
    texts = [
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "-Infinity",
        "1" + "0" * 400,
        "0.1",
        "-0",
        "1e39",
        "00",
        "1_0",
        "0x1",
    ]
    return rng.choice([*texts, str(rng.randint(-(10**30), 10**30)), repr(rng.uniform(-1e300, 1e300))])


def _text(rng: random.Random) -> str:
    parts = [
        "x",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "é",
        "\u202e",
        "%s",
        "{0}",
        "../",
        "\n",
        "a" * rng.choice([1, 300, 5000]),
    ]
    return "".join(rng.choices(parts, k=rng.randint(0, 6)))


def _numbers(rng: random.Random) -> bytes:
    rows = [[_number(rng) for _ in range(rng.choice([4, 4, 4, 3, 0]))] for _ in range(rng.randint(1, 3))]
    return ("[" + ",".join("[" + ",".join(row) + "]" for row in rows) + "]").encode()


def _names(rng: random.Random) -> Any:
    size = rng.choice([1, 3, 50])
    return {_text(rng) or "k": rng.choice([GOOD, None, _text(rng), [], {}]) for _ in range(size)}


def _many_names(rng: random.Random) -> Any:
    return {f"{number}{'n' * rng.choice([5, 50])}": GOOD for number in range(rng.choice([200, 2000]))}


def _long_name(rng: random.Random) -> Any:
    return {rng.choice("x\u00e9\x01") * LARGE: GOOD}


def _long_value(rng: random.Random) -> Any:
    return rng.choice(["y" * LARGE, {"x": "y" * LARGE}, {"x": [["y" * LARGE] * 4]}, [LARGE * "["]])


def _deep(rng: random.Random) -> bytes:
    depth = rng.choice([10, 500, 20_000])
    return rng.choice([b"[" * depth + b"]" * depth, b'{"x":' * depth + b"1" + b"}" * depth, b"[" * depth])


def _shapes(rng: random.Random) -> Any:
    choices = [[], [[]], [[1, 2, 3]], [[1, 2, 3, 4], [1]], [[[1, 2, 3, 4]]], 1, "x", None, True, [None], [["1"] * 4]]
    return rng.choice([*choices, [[1.0] * 4] * rng.choice([13, 500]), [[True, 2, 3, 4]], {"x": GOOD, "y": GOOD}])


def _bytes(rng: random.Random) -> bytes:
    return rng.choice([rng.randbytes(rng.randint(0, 40)), b"\xff\xfe" + rng.randbytes(8), b"", b"{", b"nul", b"[1,2"])


HOSTILE: tuple[Draw, ...] = (_numbers, _names, _many_names, _long_name, _long_value, _deep, _shapes, _bytes)


def _batches(archive: Path, store: Path, seed: int, batches: int) -> dict[str, Any]:
    """Answer batches in this process; what went wrong, by kind."""
    from tests.support.handlers import ask, make_context
    from ts_handlers import CompiledHandler

    with backend_of(False):
        context = make_context(archive, store)
        handler = CompiledHandler()
        handler.initialize(context)
    with torch.inference_mode():
        right = eager_model(archive)(torch.tensor(GOOD))
    rng = random.Random(seed)
    found: dict[str, Any] = {"served": 0, "refusal": 0, "problems": []}
    for number in range(batches):
        bodies: list[Any] = [rng.choice(HOSTILE)(rng) for _ in range(rng.randint(0, 3))]
        place = rng.randint(0, len(bodies))
        bodies.insert(place, GOOD)
        try:
            answers = ask(handler, context, *bodies)
        except Exception as error:
            found["problems"].append(
                ("neighbour", f"seed {seed} batch {number}: {type(error).__name__}: {error!s:.200}")
            )
            continue
        for index, (status, answer) in enumerate(answers):
            text = answer if isinstance(answer, str) else json.dumps(answer)
            if index == place:
                if status != 200:
                    found["problems"].append(("neighbour", f"seed {seed} batch {number}: {status}: {text[:200]}"))
                elif not torch.allclose(torch.tensor(answer), right, atol=1e-5):
                    found["problems"].append(("wrong", f"seed {seed} batch {number}: {text[:200]}"))
                else:
                    found["served"] += 1
            elif status != 200:
                found["refusal"] += 1
                if len(text.encode("utf-8", "surrogatepass")) > LARGEST_REFUSAL:
                    found["problems"].append(("unbounded", f"seed {seed} batch {number}: {len(text)}: {text[:100]}"))
    return found


def run(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    """Answer `trials` batches."""
    archive = write_archive(folder / "archive", LINEAR)
    done = 0
    while done < trials:
        batches = min(BATCHES, trials - done)
        chosen = seed * 1000 + done
        code, found, text = forks.call(lambda n=batches, s=chosen: _batches(archive, folder / "store", s, n), 900.0)  # type: ignore[misc]
        done += batches
        tally.trials += batches
        if code:
            tally.note("crash" if code < 0 else "escaped", f"batches from {chosen}: {text[-400:]}")
            continue
        tally.note("served", count=found["served"])
        tally.note("refusal", count=found["refusal"])
        for kind, what in found["problems"]:
            tally.note(kind, what)
