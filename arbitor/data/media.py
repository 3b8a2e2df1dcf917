"""Files of media in folders, and the texts that stand beside them."""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from arbitor.config import did_you_mean
from arbitor.data.sources import expanded, names_in, reason, without_runs
from arbitor.errors import UserError

_LINES = (".jsonl", ".jsonl.gz")
_BOM = b"\xef\xbb\xbf"


class UnusableTextError(Exception):
    """Why a text cannot be used, in words that follow "skipped 3"."""


def existing(item: str) -> Path:
    """The path that the user named.

    Raises:
        UserError: nothing is there.
    """
    path = expanded(item)
    if not os.path.lexists(path):
        raise UserError(f"no such file or folder: {item!r}{did_you_mean(path.name, names_in(path.parent))}")
    return path


def is_lines(path: Path) -> bool:
    """Whether a file is read as JSON Lines."""
    return path.name.lower().endswith(_LINES)


def listed(folder: Path, suffixes: Sequence[str], skipped: Counter[str]) -> tuple[list[Path], list[Path]]:
    """JSON Lines files, and files that end in one of `suffixes`, beneath a folder in any depth.

    Links to folders are not followed, so that links in a circle do no harm; hidden files are counted, and
    so are the folder in which runs are written and runs elsewhere, which are left out.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename!r}: {reason(error)}") from error

    lines, media = [], []
    for root, folders, names in os.walk(folder, onerror=refuse):
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:], holds_runs, elsewhere = without_runs(root, shown)
        if holds_runs:
            skipped["folder of runs"] = 1
        if elsewhere:
            skipped["holding a run"] += elsewhere
        for name in sorted(names):
            path = Path(root, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif is_lines(path):
                lines.append(path)
            elif name.lower().endswith(tuple(suffixes)):
                media.append(path)
    return lines, media


def real_path(path: Path) -> str:
    """The path without links, or as it is if no file can have that name."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return str(path)


def file_status(path: Path) -> os.stat_result | None:
    """What the system says of a regular file.

    Returns:
        None if there is no file, or something that is not read like one: a folder, a pipe, a device.

    Raises:
        PermissionError: whether there is one cannot be seen.
    """
    try:
        status = path.stat()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def why_no_file(path: Path) -> str:
    """What is said where `file_status` is None, in words that follow "skipped 3" and "is"."""
    return "no regular file" if os.path.exists(path) else "missing"


def text_beside(path: Path, limit: int) -> bytes | None:
    """The text of the `.txt` beside a file, as by `cleaned`; None if there is none.

    Raises:
        UnusableTextError: it cannot be read, or is no text.
    """
    try:
        beside = path.with_suffix(".txt")
        if file_status(beside) is None:
            return None
        with open(beside, "rb") as file:
            return cleaned(file.read(limit + 1), limit)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UnusableTextError("with a caption that cannot be read") from error


def cleaned(raw: bytes, limit: int) -> bytes:
    """UTF-8 without a byte order mark and blanks at both ends, cut to `limit` bytes between two characters.

    Raises:
        UnusableTextError: it is of another encoding, or holds zeros, which no text does.
    """
    text = raw.removeprefix(_BOM)
    kept = text[:limit]
    try:
        kept.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(text) <= limit or error.reason != "unexpected end of data":
            raise UnusableTextError("with a caption that is not UTF-8") from error
        kept = kept[: error.start]
    if b"\0" in kept:
        raise UnusableTextError("with a caption that is not UTF-8")
    return kept.strip()


def is_unicode(name: str) -> bool:
    """Whether a file's name is one: names of other encodings hold lone surrogates in Python."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
