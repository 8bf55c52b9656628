"""One backend in one start: find its entry; or refuse, or build, load, check and publish a new one.

Native code runs under the crash guard, see `ts_handlers.guard.guard`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from pathlib import Path

from ts_handlers.backends.base import Backend, Workspace
from ts_handlers.errors import (
    FINAL,
    CanaryError,
    FailedBeforeError,
    MissingDependencyError,
    QuarantinedError,
    RefitError,
    SampleError,
    StoreError,
    one_line,
)
from ts_handlers.execution.base import Loaded
from ts_handlers.guard.guard import Guard
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.key.names import LIBRARIES
from ts_handlers.startup.address import address_in_store, known_names
from ts_handlers.startup.base import Served, Start
from ts_handlers.startup.inputs import settle_inputs
from ts_handlers.startup.loading import Loader
from ts_handlers.store.address import Address
from ts_handlers.store.base import Corrupt, Hit, Miss
from ts_handlers.store.entry import Manifest, new_manifest, read_manifest
from ts_handlers.store.local.layout import STAGING
from ts_handlers.store.local.lease import Lease
from ts_handlers.system.cycle_collector import collection_paused
from ts_handlers.system.locked_directory import collect_directories

logger = logging.getLogger(__name__)

_MISSING = re.compile(r"Could not find schema for|cannot open shared object file|No module named")
"""What torch and the C library say where an operator or a library is missing, which the entry cannot help."""


@dataclasses.dataclass
class _Made:
    """A build that has loaded; `live` when the backend handed over what it had in memory. Nobody else holds `loaded`,
    so that two artifacts are never in memory at once."""

    manifest: Manifest
    loaded: Loaded
    canary: dict[str, object]
    live: bool


class Attempt:
    """The attempt to serve a model with one backend.

    Parameters
    ----------
    start:
        What the attempts of one start share.
    backend, address:
        The backend, and where its artifact belongs in the store.

    Attributes
    ----------
    missed:
        The key parts that kept the nearest entry from being a hit.

    Its key changes when more becomes known of what making the model reads: another host's record says it, or the eager
    model is made (`_learn`).
    """

    def __init__(self, start: Start, backend: Backend, address: Address) -> None:
        self.missed: tuple[str, ...] = ()
        self._start = start
        self._target = start.target
        self._metrics = start.metrics
        self._store = start.store
        self._backend = backend
        self._move(address)

    @property
    def key(self) -> CacheKey:
        """The key of what is looked up and published."""
        return self._address.key

    def _move(self, address: Address) -> None:
        self._address = address
        start, target = self._start, self._target
        follows = getattr(self._backend, "follows", None)
        # Under a key that is shared, its failures are its own: those of the first attempt must not refuse this one.
        key = address.key if follows is None else CacheKey((*address.key.parts, ("after", follows)))
        digest = target.source.weights_digest
        self._guard = Guard(start.store.state_directory, target.settings, key, address.model, digest, start.retry_since)
        self._loader = Loader(start, self._backend, address, self._guard)

    def _moved(self) -> bool:
        """Go to the key of what is known by now; whether that is another one."""
        address = address_in_store(self._backend, self._target, self._store)
        if address.key == self._address.key:
            return False
        self._move(address)
        return True

    def _learn(self) -> None:
        """Make the eager model, where that shows what the artifact depends on, and keep the names.

        Not under the guard: a good end would say that the build is good. What fails here fails again in the build.
        """
        source = self._target.source
        if source.surroundings.directory is None:
            return
        with self._metrics.phase("build"):
            try:
                self._target.check_source()
                source.eager()
            except FINAL:
                self._metrics.count("build_failed")
                raise
            except Exception as error:
                logger.debug("details", exc_info=error)
        self._keep_names()

    def _keep_names(self, *, of_hit: bool = False) -> None:
        """Tell the store what making the model reads.

        Which libraries are seen depends on what a process has imported. After a hit they would only send the next start
        to another key, so then files and variables are kept alone.
        """
        surroundings = self._target.source.surroundings
        if of_hit:
            names = frozenset(name for name in surroundings.seen if not name.startswith(LIBRARIES))
        else:
            names = surroundings.names
        if names:
            self._store.write_outside(self._address.key.base.digest, names)

    def find(self) -> Served | None:
        """Serve the entry that is there; one that does not load although its bytes are right is moved aside.

        Raises
        ------
        QuarantinedError
            The entry is quarantined.
        """
        with self._metrics.phase("lookup"):
            found = self._store.lookup(self._address)
            if isinstance(found, Miss) and self._moved():
                found = self._store.lookup(self._address)
        return self._serve(found, "hit")

    def _serve(self, found: Hit | Miss | Corrupt, result: str) -> Served | None:
        served = self._from_entry(found, result) if isinstance(found, Hit) else found
        if isinstance(served, Served):
            return served
        self._metrics.missed = ("corrupt",) if isinstance(served, Corrupt) else served.parts
        self._metrics.count("miss")
        if isinstance(served, Corrupt):
            self._metrics.count("corrupt")
            self._start.notes.append(f"damaged entry: {served.reason}")
            self.missed = ("corrupt",)
        else:
            self.missed = served.parts
        return None

    def _from_entry(self, hit: Hit, result: str) -> Served | Corrupt:
        digest = hit.manifest.digest
        self._refuse(digest)
        try:
            # Beside a model that serves the collector goes on, for what its requests leave behind.
            with (
                collection_paused() if self._start.windows is None else contextlib.nullcontext(),
                self._target.source.surroundings.deferring(),
            ):
                loaded, canary = self._loader.load(hit.directory, hit.manifest, digest)
        except FINAL:
            raise
        except Exception as error:
            if not _is_damage(error):
                raise
            self._store.discard(self._address, f"{type(error).__name__}: {one_line(error)}")
            return Corrupt(one_line(error))
        self._metrics.count("hit")
        self._keep_names(of_hit=True)  # of the eager model, if the canary has made it
        return Served(loaded, result, canary)

    def has_entry(self) -> bool:
        """Whether there is an entry that would be tried."""
        found = self._store.lookup(self._address)
        if not isinstance(found, Hit):
            return False
        with contextlib.suppress(QuarantinedError):
            self._guard.refuse(found.manifest.digest)
            return True
        return False

    @property
    def failed_before(self) -> bool:
        """Whether a build failed before and will hardly end otherwise now."""
        return self._guard.hopeless_build() is not None

    def postpone_build(self, instead: str | None) -> None:
        """Raise `FailedBeforeError` when a build failed before and another backend's entry can be served meanwhile.

        Parameters
        ----------
        instead:
            That backend, None when there is none.
        """
        record = self._guard.hopeless_build()
        if record is None or instead is None:
            return
        self._metrics.count("build_skipped")
        error = FailedBeforeError(
            f"a build failed before, and the entry of {instead} is there; `ts-handlers prewarm` tries it again: "
            f"{record.reason}"
        )
        error.unbuildable = record.unbuildable
        raise error

    def refuse_build(self) -> None:
        """Raise `QuarantinedError` or `FailedBeforeError` when this key is not to be built now.

        What a process left that died while it built goes: on a full disk it is in the way of the next build.
        """
        try:
            self._refuse("")
        except (QuarantinedError, FailedBeforeError):
            collect_directories(self._store.state_directory / STAGING)
            raise

    def _refuse(self, digest: str) -> None:
        try:
            self._guard.refuse(digest)
        except QuarantinedError:
            self._metrics.count("quarantined")
            raise
        except FailedBeforeError:
            self._metrics.count("build_skipped")
            raise

    def build(self, estimate: float | None) -> Served:
        """Build and publish, or serve what another process has published while this one waited for the lease.

        Parameters
        ----------
        estimate:
            Seconds that it took the last time, None when unknown.
        """
        with contextlib.ExitStack() as stack:
            with self._metrics.phase("wait"):
                lease = stack.enter_context(self._store.lease(self._address, estimate))
            self._moved()  # by what others have seen while this process waited
            served = self._waited()
            if served is None:
                self.refuse_build()
                self._learn()
                if self._moved():
                    served = self._waited()
                    if served is None:
                        self.refuse_build()
            if served is not None:
                return served
            expected = f", about {estimate:.0f} s" if estimate else ""
            logger.info("%s: building with %s%s", self._target.source.name, self._backend.name, expected)
            with self._store.staging(self._address) as staging:
                return self._publish(lease, staging, self._make(lease, staging))

    def _waited(self) -> Served | None:
        """What somebody has published while this process waited."""
        found = self._store.lookup(self._address)
        return self._serve(found, "waited") if isinstance(found, Hit) else None

    def _make(self, lease: Lease, staging: Path) -> _Made:
        """Build into `staging`, load and check; a failure is remembered for later starts."""
        try:
            with self._guard.remembered():
                try:
                    return self._compile(lease, staging)
                except Exception as error:
                    from ts_handlers.guard.failures import is_disk_full

                    if not is_disk_full(error):
                        raise
                    from ts_handlers.startup.disk_full import make_room_for_build

                    space, model = self._target.settings.space, self._address.model
                    make_room_for_build(self._store.state_directory, staging, space, model, self._metrics, error)
                self._target.release()
                return self._compile(lease, staging)
        except Exception:
            self._metrics.count("build_failed")
            raise

    def _compile(self, lease: Lease, staging: Path) -> _Made:
        self._target.check_source()
        settle_inputs(self._target, self._start.notes)
        lease.report(phase="build")
        with self._metrics.phase("build"), self._guard.marked("build"):
            workspace = Workspace(staging, self._metrics.build_phase, self._store.shared_directory)
            built = self._backend.build(self._target, workspace)
        self._metrics.count("build")
        names = known_names(self._store, self._target, self._address.key)
        manifest = new_manifest(self._address.key, built.description, staging, self._metrics.build_ms, names)
        lease.report(phase="load")
        loaded, canary = self._loader.load(staging, manifest, live=built.loaded)
        return _Made(manifest, loaded, canary, live=built.loaded is not None)

    def _publish(self, lease: Lease, staging: Path, made: _Made) -> Served:
        """Publish what has loaded and answered rightly."""
        lease.report(phase="publish")
        directory = staging
        with self._metrics.phase("publish"):
            try:
                directory = self._store.publish(self._address, staging, made.manifest)
            except StoreError as error:
                logger.warning("%s; serving it unpublished", error)
                self._metrics.count("publish_failed")
                self._start.notes.append(one_line(error))
        if directory != staging and not made.live:
            # What was loaded may open further files of its directory later, and that has moved.
            del made.loaded
            manifest = read_manifest(directory)  # another process may have published the same key first
            made.loaded, _ = self._loader.load(directory, manifest, manifest.digest)
        return Served(made.loaded, "built", made.canary)


def _is_damage(error: Exception) -> bool:
    """Whether an error while loading a verified entry says that the entry is at fault.

    Others speak of the model, of the weights, or of what is missing or failing on this machine at this moment: the
    bytes are right, and others load them.
    """
    if isinstance(error, (CanaryError, ImportError, MemoryError, MissingDependencyError, RefitError, SampleError)):
        return False
    from ts_handlers.guard.failures import is_passing

    return not is_passing(error) and _MISSING.search(str(error)) is None
