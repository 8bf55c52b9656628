"""The dashboards and alert rules of deploy/, and which metrics and labels a query names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
_WORDS = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_NOT_METRICS = {
    *("sum", "max", "min", "by", "on", "rate", "increase", "histogram_quantile", "group_left", "and", "or", "ignoring"),
}


class Query(NamedTuple):
    """One query of a panel or a rule."""

    where: str
    expression: str


def panel_queries() -> Iterator[Query]:
    """Every query of every dashboard."""
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            for target in panel["targets"]:
                yield Query(f"{path.stem}: {panel['title']}", target["expr"])


def alert_queries() -> Iterator[Query]:
    """The expression of every alert."""
    rules: Any = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield Query(f"alert {rule['alert']}", rule["expr"])


def metrics_of(expression: str) -> set[str]:
    """The names of metrics in a query."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expression)
    bare = re.sub(r"\b(by|on|ignoring|group_left)\s*\([^)]*\)", " ", bare)
    return {word for word in _WORDS.findall(bare) if word not in _NOT_METRICS and not word.startswith("e-")} - {"e"}


def labels_of(expression: str) -> set[str]:
    """The labels that a query matches or groups by."""
    inside = " ".join(re.findall(r"\{([^}]*)\}", expression))
    matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', "", inside)))
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression))))
    return matched | grouped


def at_rest(expression: str, window: str) -> str:
    """A query with Grafana's variables replaced."""
    return expression.replace("$__rate_interval", window).replace("$__range", window).replace("$model", ".*")
