"""Whom does the kernel cache trust? Files and folders that are the own user's, and no other can exchange."""

import os
import stat
from pathlib import Path


class Untrusted(Exception):
    """Why a file of the cache is not read."""


def prepared(where: Path) -> str | None:
    """Make the directory, for this user alone; a sentence that says why not, if it cannot be trusted."""
    _make(where)
    above = where.parent
    if (refusal := _unsafe_above(above.parent) or untrusted(above, sticky=True)) is not None:
        return refusal
    for folder in (where, where / "__pycache__"):
        _make(folder)
        if (refusal := untrusted(folder)) is not None:
            return refusal
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
    return None


def _make(folder: Path) -> None:
    """Make a directory and those above it that are not there, each for this user alone."""
    if not folder.is_dir():
        if folder.parent != folder:
            _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)  # the umask may have taken even that away


def untrusted(path: Path, *, sticky: bool = False) -> str | None:
    """Why nothing should be executed from `path`; None if it may, or is not there. `sticky`: others may write
    beside what is of this user, but not rename it.
    """
    if os.name != "posix":
        return None
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link; the kernel cache takes only what this user wrote"
    safe = sticky and found.st_mode & stat.S_ISVTX and found.st_uid in _trusted_owners()
    if not safe and found.st_uid != os.getuid():
        return f"{path} belongs to user {found.st_uid}; the kernel cache takes only what this user wrote"
    if not safe and found.st_mode & 0o022:
        return (
            f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):o}); write chmod go-w {path}"
        )
    return None


def _unsafe_above(folder: Path) -> str | None:
    """Why another user could put another directory in the place of one below `folder`; None if none can.

    Links are followed, as in a cache that lies on another disk: both ways are looked at.
    """
    if os.name != "posix":
        return None
    for path in dict.fromkeys(
        p for way in (folder.absolute(), folder.resolve()) for p in (way, *way.parents)
    ):
        found = path.stat()
        if found.st_uid not in _trusted_owners():
            return f"{path} belongs to user {found.st_uid}, who could replace the kernel cache below it"
        shared = found.st_mode & (0o002 if is_own_group(found.st_gid) else 0o022)
        if shared and not found.st_mode & stat.S_ISVTX:
            mode = stat.S_IMODE(found.st_mode)
            return (
                f"{path} can be written by others (mode {mode:o}), who could replace the kernel cache below "
                f"it; write chmod go-w {path}"
            )
    return None


def _trusted_owners() -> tuple[int, ...]:
    """This user and root, whatever number root has here (in a container, say)."""
    return os.getuid(), 0, Path("/").stat().st_uid


def is_own_group(gid: int) -> bool:
    """Whether this is the private group of this user: of the same name, without other members."""
    import grp
    import pwd

    try:
        name, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}
