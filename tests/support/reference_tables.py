"""Rows of the tables in docs/ that are written from the code."""

from __future__ import annotations

from ts_handlers.monitoring.catalogue import COUNTED, FAMILIES, PREFIX
from ts_handlers.servers.torchserve.failures import FAILURES


def metric_rows() -> list[str]:
    """A row for each metric of the exporter."""
    rows = []
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels) or "-"
        rows.append(f"| `{family.full_name}` | {family.type} | {labels} | {family.help} |")
    return rows


def renamed_rows() -> list[str]:
    """A row for each of TorchServe's metrics that is deprecated and has another name now."""
    rows = []
    for counter, (name, values) in COUNTED.items():
        labels = next(family.labels for family in FAMILIES if family.name == name)[1:]
        inside = ", ".join(f'{label}="{value}"' for label, value in zip(labels, values, strict=True))
        rows.append(f"| `{PREFIX}{counter}_total` | `{PREFIX}{name}{'{' + inside + '}' if inside else ''}` |")
    return rows


def failure_rows() -> list[str]:
    """A row for each way in which a request can fail."""
    rows = []
    for each in FAILURES:
        http = "the handler's" if each.status is None else f"{each.status} {each.phrase}"
        grpc = "as of the status" if each.grpc is None else f"`{each.grpc}`"
        rows.append(f"| `{each.kind}` | {each.happened} | {http} | {grpc} | `{each.type}` | {each.retry} |")
    return rows
