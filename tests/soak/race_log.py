"""What the log of a race proves.

Processes append what they do to one log, with the kernel's monotonic clock, before or after the deed such that a kill
in between cannot make a proof wrong:

- two builds of one key that overlap are duplicates. A build ends when its end is logged or its process is killed; where
  hosts share a remote store it also ends when its process is stopped for longer than the lease allows, and builds of a
  host that said that it goes on alone do not count.
- an entry whose publication was logged, and for which neither a planned eviction nor a damage is logged, must be found
  by every lookup that begins later, and lie in the store when all is over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.soak.tally import Tally
from ts_handlers.store.local.layout import EVICTED
from ts_handlers.store.upkeep.audit import audit
from ts_handlers.store.upkeep.eviction import Quotas
from ts_handlers.store.upkeep.garbage import find_garbage
from ts_handlers.store.upkeep.scan import scan_entries
from ts_handlers.store.upkeep.space import make_room

HEARTBEAT = 2.4  # seconds, of a lease among hosts


def examine(tally: Tally, events: list[dict[str, Any]], hosts: list[Path], what: str) -> None:
    """What the events and the hosts' stores prove."""
    for event in events:
        if event["event"] in ("wrong", "partial"):
            tally.note(event["event"], f"{what}: {event}")
        elif event["event"] == "started":
            outcome = {"hit": "served", "waited": "served", "built": "rebuild"}.get(event["result"], "refusal")
            tally.note(outcome if event["right"] else "wrong", f"{what}: {event}")
        elif event["event"] == "lookup":
            tally.note({"Hit": "served", "Miss": "missed", "Corrupt": "refusal"}[event["found"]])
        elif event["event"] == "published":
            tally.note("rebuild")
        elif event["event"] == "unpublished":
            tally.note("unpublished", event["reason"])
    for first, second in _overlaps(events):
        tally.note("duplicate", f"{what}: {first} and {second}")
    for text in (*_unfound(events), *_lost(events, hosts)):
        tally.note("lost", f"{what}: {text}")
    for host in hosts:
        for life in range(3):
            make_room(host / "store", Quotas(), Quotas()) if life else list(audit(host / "store", repair=True))
        left = [str(item.path) for item in find_garbage(host / "store") if "staging" in item.path.parts]
        if left or any((host / "store" / "staging").glob("*")):
            tally.note("stuck", f"{what}: left in staging: {left}")


def _overlaps(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Builds of one key at the same time under live leases."""
    shared = len({event["host"] for event in events if "host" in event}) > 1
    builds: list[dict[str, Any]] = []
    for index, event in enumerate(events):
        if event["event"] != "begin" or event["alone"]:
            continue
        end = next(
            (
                later["at"]
                for later in events[index:]
                if (
                    later["event"] in ("end", "unpublished")
                    and later["pid"] == event["pid"]
                    and later["key"] == event["key"]
                )
                or (later["event"] in ("kill", "dead") and later["who"] == event["pid"])
                or (shared and later["event"] == "stop" and later["who"] == event["pid"] and _is_long(events, later))
            ),
            event["at"],
        )
        builds.append({"key": event["key"], "pid": event["pid"], "begin": event["at"], "end": end})
    builds.sort(key=lambda build: build["begin"])
    for index, first in enumerate(builds):
        for second in builds[index + 1 :]:
            if second["begin"] < first["end"] and second["key"] == first["key"]:
                yield first, second


def _is_long(events: list[dict[str, Any]], stop: dict[str, Any]) -> bool:
    """Whether a stop may have cost a lease."""
    ends = (event["at"] for event in events if event["event"] == "continue" and event["who"] == stop["who"])
    return next((end for end in ends if end >= stop["at"]), stop["at"]) - stop["at"] > HEARTBEAT / 2


def _gone(events: list[dict[str, Any]], published: dict[str, Any]) -> float:
    """When an entry may have been removed or damaged for the first time."""
    times = [float("inf")]
    for index, event in enumerate(events):
        if event["event"] not in ("evict", "damage"):
            continue
        if (event["key"], event["host"]) != (published["key"], published["host"]):
            continue
        ends = (
            later
            for later in events[index:]
            if (later["event"] == "done" and (later["pid"], later["key"]) == (event["pid"], event["key"]))
            or (later["event"] == "dead" and later["who"] == event["pid"])
        )
        end = next(ends)
        if end["at"] >= published["at"] and not end.get("refusal"):
            times.append(event["at"])
    return min(times)


def _unfound(events: list[dict[str, Any]]) -> Iterator[str]:
    """Lookups that did not find what was there."""
    published = [event for event in events if event["event"] == "published"]
    for lookup in (event for event in events if event["event"] == "lookup" and event["found"] != "Hit"):
        for entry in published:
            same = (entry["key"], entry["host"]) == (lookup["key"], lookup["host"])
            if same and entry["at"] < lookup["began"] and _gone(events, entry) > lookup["ended"]:
                yield f"{lookup} did not find {entry}"


def _lost(events: list[dict[str, Any]], hosts: list[Path]) -> Iterator[str]:
    """Entries that are not in the store any more though nobody has removed or damaged them."""
    for host in hosts:
        present = {}
        for info in scan_entries(host / "store"):
            with contextlib.suppress(OSError):
                present[info.key] = (info.directory / "nonce").read_text()
        for event in events:
            if event["event"] != "published" or event["host"] != host.name:
                continue
            if _gone(events, event) < float("inf"):
                continue
            if present.get(event["key"]) != event["nonce"]:
                yield f"{event} is not in the store, which holds {present}"
        damaged = {event["key"] for event in events if event["event"] == "damage" and event["host"] == host.name}
        for path in (host / "store" / "trash").glob("*"):
            if not path.name.startswith(EVICTED) and path.name.rpartition("-")[0] not in damaged:
                yield f"{path.name} was moved aside and was not damaged: {(path / 'reason.txt').read_text()}"
