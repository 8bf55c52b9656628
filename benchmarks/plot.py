"""A bar chart of a result; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS, PEERS = "#1b6ca8", "#b0b0b0"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write medians with their spread as horizontal bars; the suffix of `path` chooses the format (.png, .svg)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text keeps an SVG small
    import matplotlib.pyplot as plt

    shown = [summary for summary in result["rows"].values() if summary[summary["metric"]] is not None]
    spreads = [summary[summary["metric"]] for summary in shown]
    medians = [spread["median"] for spread in spreads]
    errors = [
        [median - spread["min"] for median, spread in zip(medians, spreads, strict=True)],
        [spread["max"] - median for median, spread in zip(medians, spreads, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(shown) + 1.4))
    colors = [OURS if summary["title"].startswith("ours") else PEERS for summary in shown]
    axes.barh([summary["title"] for summary in shown], medians, xerr=errors, color=colors, ecolor="#404040", capsize=2)
    for position, spread in enumerate(spreads):
        place = (spread["max"], position)
        axes.annotate(f"{spread['median']:.1f}", place, xytext=(4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("seconds from launch to first HTTP 200 (4 workers: to all READY)")
    axes.set_title(f"{result['model']}, archive format {result['archive_format']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
