"""Soak and fuzz, see benchmarks/README.md: `python benchmarks/soak.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from tests.soak.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
