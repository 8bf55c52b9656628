"""Whether a folder can be trusted: nobody but this user and root may replace it or anything on the way to it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from ts_handlers.errors import StoreError
from ts_handlers.system.ownership import is_ours_or_roots, others_may_write

_LINKS_LIMIT = 40  # as the kernel's


def check_path(root: Path, trusted: Collection[str | Path] = (), what: str = "store") -> None:
    """Check owner and mode of every folder and link from ``/`` to `root`, a folder or file.

    Each must belong to this process's user or to root. The root itself must not be writable by others at all; a folder
    above it may be when it is sticky (as ``/tmp`` is), when its group is this user's private one, or when it is among
    `trusted`.

    Parameters
    ----------
    root:
        An absolute path that exists.
    trusted:
        Folders whose owner and mode are accepted as they are: a volume that only this container mounts, for example.
    what:
        What messages call it.

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
        name = f"the {what} {root}" if last else f"the folder {path}, on the way to the {what} {root},"
        if not is_ours_or_roots(status):
            raise StoreError(
                f"{name} belongs to uid {status.st_uid}, this process runs as uid {os.geteuid()}; "
                f"chown it, or name another {what}{'' if last else _OR_TRUST}"
            )
        if stat.S_ISLNK(status.st_mode) or not others_may_write(status):
            continue
        if not last and (status.st_mode & stat.S_ISVTX or _only_private_group(status)):
            continue
        raise StoreError(
            f"{name} is writable by others (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"{'an entry is code' if what == 'store' else 'it decides whose code runs'}: "
            f"chmod go-w it{'' if last else _OR_TRUST}"
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
    if group.gr_name != user.pw_name or not set(group.gr_mem) <= {user.pw_name}:
        return False
    # Who has the group as the primary one is not among its members.
    return all(other.pw_uid == user.pw_uid for other in pwd.getpwall() if other.pw_gid == status.st_gid)


class NotOursError(Exception):
    """Something below the root could be another user's; the message names it and says what to do."""


class OwnedTree:
    """The folders and files below a store's root, each looked at by descriptor and once.

    What is opened belongs to this process's user or to root; no link is followed; and nobody else may write it or reach
    it: the mode of what lies below a folder that others cannot enter says nothing.

    Parameters
    ----------
    root:
        The store's root, the way to which `check_path` has checked.

    Raises
    ------
    OSError
        The root cannot be opened.
    NotOursError
        The root is another user's.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, tuple[int, bool]] = {}
        descriptor = os.open(root, _FOLDER & ~os.O_NOFOLLOW)
        self._folders[""] = descriptor, False
        try:
            self._folders[""] = descriptor, self._check("", os.fstat(descriptor), False)
        except NotOursError:
            self.close()
            raise

    def __enter__(self) -> OwnedTree:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folders."""
        for descriptor, _ in self._folders.values():
            os.close(descriptor)
        self._folders.clear()

    def check_folder(self, name: str) -> None:
        """Check a folder and those above it.

        Parameters
        ----------
        name:
            Relative to the root, with slashes.

        Raises
        ------
        NotOursError
            One of them is a link or a file, could be written by others, or belongs to somebody else.
        OSError
            One of them is missing or cannot be opened.
        """
        self._folder(name)

    def status(self, name: str) -> os.stat_result:
        """The status of a plain file.

        Raises
        ------
        NotOursError
            As of `check_folder`, also for the file itself.
        ValueError
            It is missing or no plain file.
        OSError
            A folder cannot be opened.
        """
        folder, _, base = name.rpartition("/")
        try:
            descriptor, closed = self._folder(folder)
            status = os.stat(base, dir_fd=descriptor, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{base} is missing or not a plain file") from error
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{base} is missing or not a plain file")
        self._check(name, status, closed)
        return status

    def _folder(self, name: str) -> tuple[int, bool]:
        """Descriptor of a folder, and whether others cannot enter it."""
        known = self._folders.get(name)
        if known is not None:
            return known
        above, _, base = name.rpartition("/")
        parent, closed = self._folder(above)
        try:
            descriptor = os.open(base, _FOLDER, dir_fd=parent)
        except OSError as error:
            if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and self._is_link(base, parent)):
                raise NotOursError(
                    f"{self._root / name} leads out of the store by a symbolic link; remove the link"
                ) from error
            raise
        try:
            self._folders[name] = descriptor, self._check(name, os.fstat(descriptor), closed)
        except NotOursError:
            os.close(descriptor)
            raise
        return self._folders[name]

    @staticmethod
    def _is_link(base: str, parent: int) -> bool:
        try:
            return stat.S_ISLNK(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode)
        except OSError:
            return False

    def _check(self, name: str, status: os.stat_result, closed: bool) -> bool:
        """Whether others cannot reach what lies below."""
        path = self._root / name
        if not is_ours_or_roots(status):
            raise NotOursError(
                f"{path} belongs to uid {status.st_uid}, this process runs as uid {os.geteuid()}, and an entry is "
                "code: chown or remove it"
            )
        if not closed and others_may_write(status):
            raise NotOursError(
                f"{path} is writable by others (mode {stat.S_IMODE(status.st_mode):04o}), and an entry is code: "
                "find out whose it is, then chmod go-w or remove it"
            )
        return closed or not status.st_mode & (stat.S_IXGRP | stat.S_IXOTH)


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make_private_folders(directory: Path, root: Path) -> None:
    """Make the folders from `root` down to `directory`, each closed to others whatever the umask is.

    Raises
    ------
    OSError
        One cannot be made, or there is one that others could write, or a symbolic link.
    """
    path = root
    for part in directory.relative_to(root).parts:
        path = path / part
        path.mkdir(mode=0o700, exist_ok=True)
    try:
        with OwnedTree(root) as tree:
            tree.check_folder(directory.relative_to(root).as_posix())
    except NotOursError as error:
        raise OSError(errno.EPERM, str(error)) from error
