"""Prometheus's text format 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ts_handlers.monitoring.catalogue import FAMILIES, Family
from ts_handlers.monitoring.process_file import Key

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(series: Mapping[Key, list[float]], families: Iterable[Family] = FAMILIES) -> str:
    """Every metric with its help and type, and its series.

    Examples
    --------
    >>> family = next(family for family in FAMILIES if family.name == "swaps_total")
    >>> print(exposition({("swaps_total", ("resnet",)): [2.0]}, [family]), end="")
    # HELP ts_handlers_swaps_total Eager models replaced by the artifact built beside them.
    # TYPE ts_handlers_swaps_total counter
    ts_handlers_swaps_total{model="resnet"} 2
    """
    by_name: dict[str, list[tuple[tuple[str, ...], list[float]]]] = {}
    for (name, labels), numbers in sorted(series.items()):
        by_name.setdefault(name, []).append((labels, numbers))
    lines: list[str] = []
    for family in families:
        lines.append(f"# HELP {family.full_name} {family.help}")
        lines.append(f"# TYPE {family.full_name} {family.type}")
        for labels, numbers in by_name.get(family.name, ()):
            pairs = tuple(zip(family.labels, labels, strict=True))
            if family.type == "histogram":
                lines += _histogram(family, pairs, numbers)
            elif not (family.name.endswith("_info") and numbers[0] == 0):
                lines.append(_sample(family.full_name, pairs, numbers[0]))
    return "\n".join(lines) + "\n"


def _histogram(family: Family, labels: tuple[tuple[str, str], ...], numbers: list[float]) -> Iterable[str]:
    total = 0.0
    bounds = [*(_number(bound) for bound in family.buckets), "+Inf"]
    for bound, count in zip(bounds, numbers, strict=False):
        total += count
        yield _sample(f"{family.full_name}_bucket", (*labels, ("le", bound)), total)
    yield _sample(f"{family.full_name}_sum", labels, numbers[-1])
    yield _sample(f"{family.full_name}_count", labels, total)


def _sample(name: str, labels: tuple[tuple[str, str], ...], value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
    return f"{name}{{{inside}}} {_number(value)}" if labels else f"{name} {_number(value)}"


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
