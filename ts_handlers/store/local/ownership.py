"""Whether a folder can be trusted: nobody but this user and root may replace it or anything on the way to it."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from ts_handlers.errors import StoreError
from ts_handlers.system.ownership import is_ours_or_roots, others_may_write

_LINKS_LIMIT = 40  # as the kernel's


def check_path(root: Path, trusted: Collection[str | Path] = ()) -> None:
    """Check owner and mode of every folder and link from ``/`` to `root`.

    Each must belong to this process's user or to root. The root itself must not be writable by others at all; a folder
    above it may be when it is sticky (as ``/tmp`` is), when its group is this user's private one, or when it is among
    `trusted`.

    Parameters
    ----------
    root:
        An absolute path that exists.
    trusted:
        Folders whose owner and mode are accepted as they are: a volume that only this container mounts, for example.

    Raises
    ------
    StoreError
        With the first folder that others could use to replace the store, and the remedy.
    """
    accepted = {os.path.normpath(path) for path in trusted}
    way = list(_way(root))
    for index, (path, status) in enumerate(way):
        last = index == len(way) - 1
        if str(path) in accepted and not last:
            continue
        name = f"the store {root}" if last else f"the folder {path}, on the way to the store {root},"
        if not is_ours_or_roots(status):
            raise StoreError(
                f"{name} belongs to uid {status.st_uid}, this process runs as uid {os.geteuid()}; "
                f"chown it, or name another store{'' if last else _OR_TRUST}"
            )
        if stat.S_ISLNK(status.st_mode) or not others_may_write(status):
            continue
        if not last and (status.st_mode & stat.S_ISVTX or _only_private_group(status)):
            continue
        raise StoreError(
            f"{name} is writable by others (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"an entry is code: chmod go-w it{'' if last else _OR_TRUST}"
        )


_OR_TRUST = (
    ", or add it to handler.ts_handlers.trust.folders (on the command line: --trust-folder) if nobody else can reach it"
)


def _way(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every folder and link that the kernel visits on its way to `root`; last the folder itself."""
    current, left, links = Path("/"), list(reversed(root.parts[1:])), 0
    yield current, os.lstat(current)
    while left:
        part = left.pop()
        if part == "..":
            current = current.parent
            continue
        path = current / part
        status = os.lstat(path)
        yield path, status
        if not stat.S_ISLNK(status.st_mode):
            current = path
            continue
        links += 1
        if links > _LINKS_LIMIT:
            raise StoreError(f"the store {root}: too many symbolic links at {path}")
        target = Path(os.readlink(path))
        if target.is_absolute():
            current, target = Path("/"), target.relative_to("/")
        left.extend(reversed(target.parts))


def _only_private_group(status: os.stat_result) -> bool:
    """Whether the only others who may write are a group that holds this user alone, as many systems make them."""
    if status.st_mode & stat.S_IWOTH or status.st_gid != os.getegid():
        return False
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def is_inside(root: Path, path: Path) -> bool:
    """Whether `path` still lies below `root` after every symbolic link on the way has been followed."""
    return os.path.realpath(path).startswith(os.path.realpath(root) + os.sep)
