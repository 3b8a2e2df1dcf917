"""Folders for this user alone, and whether others could have written to what is about to be believed."""

import os
import stat
from pathlib import Path

PRIVATE = 0o700
NOBODY = 65534  # owns root's folders (/, /home) as seen from within a container that has users of its own


def make_private(folder: Path) -> None:
    """Make a folder and those above it that do not exist, for this user alone whatever the umask says.

    Raises:
        OSError: one of them cannot be made.
    """
    for place in (*reversed(folder.parents), folder):
        if not place.is_dir():
            place.mkdir(mode=PRIVATE, exist_ok=True)


def why_untrusted(path: Path) -> str | None:
    """Who else could have written what `path` holds, in words; None if only this user and root could.

    Looked at are the path, all folders above it and the links among them, as `ssh` does for its keys: their
    owner, and whether a group or everybody may write. Of folders in which only owners may remove (`/tmp`),
    the latter does not matter; nor does a group that has the user's own name and no other member.

    Args:
        path: need not exist; then what of it exists is looked at.
    """
    if not hasattr(os, "geteuid"):  # Windows, whose access lists these bits do not show
        return None
    whole = Path(os.path.abspath(path))
    real = Path(os.path.realpath(whole))
    above = {*real.parents, *whole.parents}
    for place in dict.fromkeys((real, *real.parents, whole, *whole.parents)):
        try:
            status = place.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{place} cannot be looked at ({error.strerror})"
        trusted = (os.geteuid(), 0, NOBODY) if place in above else (os.geteuid(), 0)
        if status.st_uid not in trusted:
            return f"{place} belongs to another user"
        if stat.S_ISLNK(status.st_mode):
            continue
        shared = status.st_mode & stat.S_ISVTX and stat.S_ISDIR(status.st_mode) and place != real
        if status.st_mode & stat.S_IWOTH and not shared:
            return f"everybody may write to {place}"
        if status.st_mode & stat.S_IWGRP and not shared and not _is_own_group(status.st_gid):
            return f"the group of {place} may write to it"
    return None


def _is_own_group(number: int) -> bool:
    """Whether a group is the one that many systems make for each user alone."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(number)
    except KeyError:
        return False
    return number == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
