"""From runs to medians, ratios within a round, the bars, and a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from measure import Run
from rows import Row

REFERENCES = {
    "eager": "x eager",
    "example_warm": "x example",
    "example_new_container": "x example, new container",
}
"""Rows that the others are divided by, round by round, and the heads of their columns."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """An upper limit of the ratio of two rows' times. `limits` is by archive format, or one for both."""

    label: str
    row: str
    reference: str
    limits: Mapping[str, float]
    metric: str | None = None
    models: tuple[str, ...] = ("resnet50",)


_BOTH = ("zip", "no-archive")
BARS = (
    Bar("aot_inductor warm / eager", "aot_warm", "eager", {"zip": 0.65, "no-archive": 0.5}),
    Bar("aot_inductor warm / example warm", "aot_warm", "example_warm", dict.fromkeys(_BOTH, 0.40)),
    Bar("aot_inductor warm / example, new container", "aot_warm", "example_new_container", dict.fromkeys(_BOTH, 0.28)),
    Bar("inductor warm / eager", "inductor_warm", "eager", dict.fromkeys(_BOTH, 1.5)),
    Bar("inductor new host / eager", "inductor_new_host", "eager", dict.fromkeys(_BOTH, 1.5)),
    Bar("aot_inductor new host / warm", "aot_new_host", "aot_warm", dict.fromkeys(_BOTH, 1.10)),
    Bar("4 workers cold / 1 worker cold, until READY", "aot_cold_4", "aot_cold", dict.fromkeys(_BOTH, 1.3), "ready_s"),
)


def summarise(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, Any]:
    """Medians, spread, failures and ratios of each row.

    A ratio is the median over the rounds in which both runs were what they claim: the two starts of a round are
    neighbours in time, so a slow spell of the machine touches both.
    """
    return {row.name: _summarise_row(runs, row, {r.name: r for r in rows}) for row in rows}


def _summarise_row(runs: Sequence[Run], row: Row, rows: Mapping[str, Row]) -> dict[str, Any]:
    mine = [run for run in runs if run.row == row.name]
    good = [run for run in mine if run.ok]
    summary: dict[str, Any] = {
        "title": row.title,
        "metric": row.metric,
        "runs": len(mine),
        "failed": len(mine) - len(good),
        "problems": sorted({problem for run in mine for problem in run.problems}),
        "ratios": {},
    }
    for metric in ("first_200_s", "ready_s"):
        values = [getattr(run, metric) for run in good]
        summary[metric] = _spread(values) if values else None
    phases = {name for run in good for name in run.description.get("phases_ms", {})}
    summary["phases_ms"] = {
        name: round(statistics.median([run.description["phases_ms"].get(name, 0.0) for run in good]), 1)
        for name in sorted(phases)
    }
    references = ("eager_4",) if row.workers > 1 else tuple(REFERENCES)
    for reference in references:
        if reference in rows:
            summary["ratios"][reference] = ratio(runs, row.name, reference, row.metric)
    before = f"{row.name}@before"
    if before in rows:
        summary["ratios"]["before"] = ratio(runs, row.name, before, row.metric)
    return summary


def ratio(runs: Sequence[Run], row: str, reference: str, metric: str) -> float | None:
    """Median over rounds of one row's time divided by another's; None when no round has both."""
    times = {(run.row, run.round): getattr(run, metric) for run in runs if run.ok}
    ratios = [
        seconds / times[reference, number]
        for (name, number), seconds in times.items()
        if name == row and times.get((reference, number))
    ]
    return round(statistics.median(ratios), 3) if ratios else None


def judge_bars(runs: Sequence[Run], rows: Sequence[Row], model: str, archive_format: str) -> list[dict[str, Any]]:
    """Measured ratio and limit of each bar whose rows were measured; `met` is None for a model without that bar."""
    names = {row.name: row for row in rows}
    verdicts = []
    for bar in BARS:
        if bar.row in names and bar.reference in names:
            found = ratio(runs, bar.row, bar.reference, bar.metric or names[bar.row].metric)
            limit = bar.limits[archive_format]
            met = found is not None and found <= limit if model in bar.models else None
            verdicts.append({"bar": bar.label, "limit": limit, "measured": found, "met": met})
    return verdicts


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": min(values), "max": max(values)}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of one result: rows, bars, failures and the environment."""
    environment = result["environment"]
    title = f"{result['model']}, archive format {result['archive_format']}, {result['rounds']} rounds"
    lines = [f"## {title}", "", "Seconds since the launch of TorchServe, medians (smallest to largest).", ""]
    heads = ["row", "first 200", "READY", *REFERENCES.values(), "x eager, 4 workers", "runs"]
    lines += [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1))]
    for summary in result["rows"].values():
        ratios = [_ratio(summary["ratios"].get(name)) for name in (*REFERENCES, "eager_4")]
        runs = f"{summary['runs'] - summary['failed']}/{summary['runs']}"
        lines.append(
            _line([summary["title"], _seconds(summary["first_200_s"]), _seconds(summary["ready_s"]), *ratios, runs])
        )
    beside = {name: each["ratios"]["before"] for name, each in result["rows"].items() if "before" in each["ratios"]}
    if beside:
        lines += ["", _line(["row", "x the other checkout"]), _line(["---", "---:"])]
        lines += [_line([name, "" if value is None else f"{value:.3f}"]) for name, value in beside.items()]
    if result["bars"]:
        lines += ["", _line(["bar", "measured", "limit", "met"]), _line(["---", "---:", "---:", "---"])]
        for bar in result["bars"]:
            met = {True: "yes", False: "**no**", None: "(not for this model)"}[bar["met"]]
            lines.append(_line([bar["bar"], _ratio(bar["measured"]), f"{bar['limit']:.2f}", met]))
    failed = {name: summary["problems"] for name, summary in result["rows"].items() if summary["failed"]}
    if failed:
        lines += ["", "Failed runs (not in the medians):", ""]
        lines += [f"- {name}: {_one_line(problem)}" for name, problems in failed.items() for problem in problems]
    facts = ", ".join(f"{name} {value}" for name, value in environment.items())
    return "\n".join([*lines, "", f"Environment: {facts}.", ""])


def _one_line(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _seconds(spread: Mapping[str, float] | None) -> str:
    return "failed" if spread is None else f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
