"""The layout of a local store: every folder and file name below its root, named once.

::

    <root>/
        entries/<model>/<model digest>/<device>/<key>/    published entries, see store/entry.py
        canaries/<key>/<weights digest>                   canary records, see store/canaries.py
        outside/<base key>/<names digest>                 what a model reads elsewhere, see store/outside.py
        observed/<identity>/calls, declaration            calls of undeclared models, see store/observed.py
        leases/
            <key>.lock, <key>.json                        the right to build, and what its holder is doing
            <key>.<address>.fetch.lock                    held by the process that asks the remote store
            <key>.background.lock, <key>.background.json  the right to build beside a model that serves eagerly
            <key>.background.outcome                      how the latest of these builds ended
        remote/
            <service>.json                                why the host goes on alone, see store/remote/breaker.py
            unsent-<key>.entry-<address>                  the remote store lacks this entry, see store/tiered/sender.py
            unsent-<key>.<weights digest>                 the remote store lacks this canary record
        staging/<key>-<random>/                           an entry being built; its builder holds a lock on it
        trash/
            <key>-<random>/                               something damaged, moved aside, with its reason.txt
            evicted-<key>-<random>/                       an evicted entry on its way out, see store/upkeep/eviction.py
        usage/<key>                                       one byte per use, see store/local/usage.py
        pins/<key>                                        never evict this key; the file holds a note
        verified/<name>                                   digests computed before, see store/local/verified.py
        guards/<key>.<random>                             crash markers, see guard/markers.py
        quarantine/<key>-<identity>.json                  what is not tried again, see guard/records.py
        quarantine/<key>-build-<identity>.json            builds that are not tried again
        metrics/<boot>/<process>.series               what a process has counted, see monitoring/process_file.py
        metrics/<boot>/totals.json                    what ended processes had counted, see monitoring/gathering.py
        shared/                                           what builds share, a folder for each backend that needs one:
            timing/<version>-<device>.cache               TensorRT's measured kernel times, see backends/tensorrt

A name with a leading dot is a file being written, see `ts_handlers.system.files.atomic_file`. A remote store has
``entries``, ``canaries``, ``outside`` and ``leases`` of the same names, see `ts_handlers.store.remote.objects`.

The two folders of the crash guard, and ``timing``, are named by their owners, which lie below the store.
"""

from __future__ import annotations

from ts_handlers.guard.state_directory import MARKERS as MARKERS
from ts_handlers.guard.state_directory import RECORDS as RECORDS

ENTRIES = "entries"
ENTRY_DEPTH = 4
"""Folders from ``entries`` down to an entry: model, model digest, device, key."""
CANARIES = "canaries"
OUTSIDE = "outside"
OBSERVED = "observed"
OBSERVED_CALLS = "calls"
OBSERVED_DECLARATION = "declaration"
LEASES = "leases"
REMOTE = "remote"
STAGING = "staging"
TRASH = "trash"
USAGE = "usage"
PINS = "pins"
VERIFIED = "verified"
SHARED = "shared"

# Endings of the files in LEASES.
LEASE_LOCK = ".lock"
LEASE_STATUS = ".json"
FETCH_LOCK = ".fetch.lock"
BACKGROUND = ".background"
OUTCOME = ".outcome"

UNSENT = "unsent-"
"""How names in REMOTE begin that stand for something the remote store lacks."""
EVICTED = "evicted-"
"""How names in TRASH begin that stand for an entry on its way out."""
REASON = "reason.txt"
"""In TRASH, beside what was moved aside: why."""
