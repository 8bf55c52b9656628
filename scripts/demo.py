"""Start TorchServe twice on config.properties: on an empty artifact store, then on the one just filled.

Shows real predictions of both and a table of the phases of each worker's start. Run by scripts/demo.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import socket
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

from ts_handlers.testing import TorchServe
from ts_handlers.testing.server import read_properties

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "config.properties"
MODELS = ("minilm", "digits")
SENTENCES = ("The cat sleeps on the sofa.", "A kitten is napping on the couch.")
DIGIT = 7


def addresses_are_free(config: Path) -> bool:
    """Whether the three addresses of a configuration can be bound now."""
    with contextlib.ExitStack() as stack:
        for name, value in read_properties(config).items():
            if name in ("inference_address", "management_address", "metrics_address"):
                url = urllib.parse.urlsplit(value)
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((url.hostname, url.port))
                except OSError:
                    return False
    return True


def digit_png(digit: int) -> bytes:
    """The first image of a digit in scikit-learn's set, as a PNG."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = digits.images[list(digits.target).index(digit)] / 16 * 255
    stream = io.BytesIO()
    Image.fromarray(pixels.round().astype("uint8")).save(stream, "PNG")
    return stream.getvalue()


def predict(server: TorchServe) -> None:
    """Ask both models, and once without a token."""
    refused = server.predict("minilm", SENTENCES[0], headers={"Authorization": ""})
    print(f"  without a token: HTTP {refused.status}, {refused.json()['type']}")
    one, two = server.predict("minilm", list(SENTENCES)).json()
    cosine = sum(a * b for a, b in zip(one, two, strict=True))
    print(f"  minilm: {SENTENCES[0]!r} and {SENTENCES[1]!r}")
    print(f"          two vectors of {len(one)} numbers, length {math.hypot(*one):.3f}, cosine {cosine:.3f}")
    answer = server.predict("digits", digit_png(DIGIT)).json()
    print(f"  digits: PNG of a {DIGIT}: class {answer['class']}, probability {max(answer['probabilities']):.3f}")


def serve(title: str, store: Path, keep_addresses: bool) -> dict[str, dict[str, Any]]:
    """One start of the server; returns each model's description of its start, and the seconds to READY."""
    print(f"\n{title}", flush=True)
    descriptions: dict[str, dict[str, Any]] = {}
    with TorchServe(
        REPOSITORY / "model_store",
        MODELS,
        config=CONFIG,
        env={"TS_HANDLERS_CACHE": str(store)},
        token_auth=True,
        keep_addresses=keep_addresses,
    ) as server:
        print(f"  HTTP on {server.url()} after {server.elapsed:.1f} s", flush=True)
        for model in MODELS:
            server.wait_ready(model)
        ready = server.elapsed
        print(f"  both models READY after {ready:.1f} s", flush=True)
        for model in MODELS:
            descriptions[model] = server.describe(model)
        predict(server)
    for description in descriptions.values():
        description["ready_s"] = ready
    return descriptions


def print_table(starts: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Phases in milliseconds, one column per model and start."""
    columns = [(model, start) for model in MODELS for start in starts]
    phases: dict[str, None] = {}
    for model, start in columns:
        phases.update(dict.fromkeys(starts[start][model]["phases_ms"]))
    rows = [["", *(f"{model} {start}" for model, start in columns)]]
    for key in ("backend", "result"):
        rows.append([key, *(str(starts[start][model].get(key, "")) for model, start in columns)])
    for phase in phases:
        values = [starts[start][model]["phases_ms"].get(phase) for model, start in columns]
        rows.append([f"{phase}, ms", *("" if value is None else f"{value:.0f}" for value in values)])
    rows.append(["launch to READY, s", *(f"{starts[start][model]['ready_s']:.1f}" for model, start in columns)])
    for model, start in columns:
        for fallback in starts[start][model].get("fallbacks", ()):
            print(f"{model} {start}: {fallback['backend']} was not used: {fallback['reason']}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Cold and warm start of two models on a real TorchServe.")
    parser.add_argument("--store", type=Path, help="artifact store to use and keep (default: a temporary one)")
    arguments = parser.parse_args()
    keep_addresses = addresses_are_free(CONFIG)
    if not keep_addresses:
        print("A port of config.properties is taken; using free ports instead.")
    with tempfile.TemporaryDirectory(prefix="ts-handlers-demo-") as temporary:
        store = arguments.store or Path(temporary) / "store"
        starts = {
            "cold": serve("First start, empty store: compile and publish", store, keep_addresses),
            "warm": serve("Restart: load what the first start published", store, keep_addresses),
        }
    print_table(starts)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; TorchServe and its workers have been ended") from None
