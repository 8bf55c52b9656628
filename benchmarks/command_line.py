"""What the command lines of the benchmarks share: options, the folder to work in, and where results go."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser, kept: str) -> None:
    """Add ``-n``, ``--json``, ``--table`` and ``--workdir``; `kept` says what a folder of the user's own keeps."""
    parser.add_argument("-n", type=rounds, default=3, metavar="ROUNDS", help="interleaved rounds (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--table", action="store_true", help="print Markdown tables")
    parser.add_argument("--workdir", type=Path, help=f"keep {kept} here")


def rounds(text: str) -> int:
    """The value of ``-n``: at least one round."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one round")
    return number


@contextlib.contextmanager
def work_folder(name: str, parent: Path | None) -> Iterator[Path]:
    """A new folder, removed at the end unless it lies in a folder that the user has named."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent)).resolve()
    try:
        yield directory
    finally:
        if parent is None:
            shutil.rmtree(directory, ignore_errors=True)


def write(result: dict[str, Any], arguments: argparse.Namespace, markdown: Callable[[dict[str, Any]], str]) -> None:
    """Write the result where ``--json`` says; print it as tables when asked to, or when it went nowhere else."""
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if arguments.table or not arguments.json:
        print(markdown(result))
