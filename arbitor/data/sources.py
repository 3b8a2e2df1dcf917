"""Which files stand behind what the user named: files, folders and globs.

A file that is named, or matched by a glob, is taken as it is. A folder gives every text-like file beneath it
in any depth: regular files that are not empty, not hidden (nor in a hidden folder) and have no NUL byte in
their first 8 KiB, which is how git tells text from binary; `.gz` files are judged by what they hold. The
folder in which runs are written, and runs that lie elsewhere, are left out of folders and globs that do not
begin in them.
"""

import contextlib
import functools
import glob
import gzip
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from arbitor.config import RUNS, did_you_mean
from arbitor.errors import UserError

_SNIFFED_BYTES = 8 << 10
# Of which a run or a checkpoint has one or more, beside its settings.
_OF_RUNS = ("metrics.jsonl", "latest", "best", "final", "model.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file to read.

    Attributes:
        path: The file, as it was named or found.
        size: Its size in bytes when it was found.
        mtime_ns: Its time of modification, in nanoseconds.
    """

    path: Path
    size: int
    mtime_ns: int


@dataclass(kw_only=True, slots=True)
class Skipped:
    """How many entries of folders were left out, by reason; a hidden folder, or one of a run, counts once."""

    hidden: int = 0
    binary: int = 0
    empty: int = 0
    special: int = 0
    runs: int = 0
    runs_elsewhere: int = 0

    def __str__(self) -> str:
        """E.g. `skipped 3 binary and 1 hidden`; empty if nothing was skipped."""
        counts = (
            (self.binary, "binary"),
            (self.hidden, "hidden"),
            (self.empty, "empty"),
            (self.special, "special"),
            (self.runs, "folder of runs"),
            (self.runs_elsewhere, "holding a run"),
        )
        parts = [f"{count:,} {reason}" for count, reason in counts if count]
        return "skipped " + " and ".join(", ".join(parts).rsplit(", ", 1)) if parts else ""


def find_sources(items: Sequence[str], skipped: Skipped) -> list[Source]:
    """The files behind `items` (files, folders, globs), each once, sorted by path; `skipped` is counted up.

    Raises:
        UserError: for an item that is missing, empty, unreadable, matches nothing or holds no text.
    """
    found: dict[str, Source] = {}
    for item in items:
        if len(items) > 1 and is_runs(item):  # as a shell expands `*`
            skipped.runs = 1
            continue
        for source in _expand(item, skipped):
            found.setdefault(os.path.realpath(source.path), source)
    return sorted(found.values(), key=lambda source: source.path.as_posix())


def is_runs(path: str | Path) -> bool:
    """Whether a path is that of the folder in which runs are written."""
    try:
        return os.path.realpath(path) == os.path.realpath(RUNS)
    except ValueError:  # of a name that no file can have
        return False


def is_run_elsewhere(folder: Path) -> bool:
    """Whether a folder is a run or a checkpoint, as arbitor writes them, and does not lie in `RUNS`."""
    if not any(os.path.exists(folder / name) for name in _OF_RUNS):
        return False
    return (_has_settings(folder) or _has_finetune(folder)) and not _is_in_runs(folder)


def without_runs(root: str, names: Iterable[str]) -> tuple[list[str], bool, int]:
    """Those of the folders `names` in `root` to look into; whether one was `RUNS`, and how many were runs."""
    kept, holds_runs, elsewhere = [], False, 0
    for name in names:
        if is_runs(Path(root, name)):
            holds_runs = True
        elif is_run_elsewhere(Path(root, name)):
            elsewhere += 1
        else:
            kept.append(name)
    return kept, holds_runs, elsewhere


def _has_settings(folder: Path) -> bool:
    with contextlib.suppress(OSError), open(folder / "config.toml", "rb") as file:
        first, second = file.readline(256), file.readline(256)
        return first.startswith(b'preset = "') and second.startswith(b'version = "')
    return False


def _has_finetune(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError), open(folder / "finetune.json", "rb") as file:
        document = json.loads(file.read(1 << 20))
        return isinstance(document, dict) and document.keys() >= {"format", "checksum"}
    return False


def _is_in_runs(path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(RUNS))


def reason(error: Exception) -> str:
    """Why the operating system refused, in its own words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def expanded(item: str) -> Path:
    """The path of a name that may begin with `~`.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(item).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UserError(f"no such file or folder: {item!r}") from error


def _expand(item: str, skipped: Skipped) -> Iterator[Source]:
    path = expanded(item)
    if not os.path.lexists(path) and glob.has_magic(item):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(
                f"nothing matches the pattern {item!r}; give a file, a folder or a pattern that matches"
            )
        before = str(skipped)
        count = 0
        begin = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        is_run, left_out = functools.cache(is_run_elsewhere), set()
        for match in map(Path, matches):
            if _is_in_runs(match) and not _is_in_runs(begin):
                skipped.runs = 1
                continue
            below = itertools.takewhile(lambda folder: folder != begin, (match, *match.parents))
            if run := next(filter(is_run, below), None):
                skipped.runs_elsewhere += run not in left_out
                left_out.add(run)
                continue
            # With `**` every folder's files are matches of their own already.
            if match.is_dir() and "**" in item:
                continue
            for source in _folder(match, skipped) if match.is_dir() else _named_file(match):
                count += 1
                yield source
        if not count:
            raise UserError(f"no text in what matches {item!r}" + _because(skipped, before))
    elif os.path.isdir(path):  # `Path.is_dir` raises for names that are too long
        before = str(skipped)
        count = 0
        for source in _folder(path, skipped):
            count += 1
            yield source
        if not count:
            raise UserError(f"no text files in the folder {item!r}" + _because(skipped, before))
    else:
        yield from _named_file(path)


def _because(skipped: Skipped, before: str) -> str:
    if str(skipped) == before:
        return ""
    return f" ({skipped}; a file named by itself is taken as it is)"


def _named_file(path: Path) -> Iterator[Source]:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            if path.is_symlink():
                raise UserError(f"{str(path)!r} is a link to what is not there") from error
            hint = did_you_mean(path.name, names_in(path.parent))
            raise UserError(f"no such file or folder: {str(path)!r}{hint}") from error
        raise UserError(f"cannot read {str(path)!r}: {reason(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{str(path)!r} is neither a regular file nor a folder; copy its content to a file first"
        )
    if not status.st_size:
        raise UserError(f"{str(path)!r} is empty; give a file with text")
    yield Source(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns)


def names_in(folder: Path) -> list[str]:
    """Some names in `folder`, none if it cannot be read; all of a large one would take long to compare."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, 1000)]
    except OSError:
        return []


def _folder(folder: Path, skipped: Skipped) -> Iterator[Source]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename!r}: {reason(error)}") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        shown = sorted(name for name in folders if not name.startswith("."))
        skipped.hidden += len(folders) - len(shown)
        folders[:], holds_runs, elsewhere = without_runs(root, shown)
        skipped.runs |= holds_runs
        skipped.runs_elsewhere += elsewhere
        for name in sorted(names):
            if name.startswith("."):
                skipped.hidden += 1
                continue
            path = Path(root, name)
            try:
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    skipped.special += 1
                elif not status.st_size:
                    skipped.empty += 1
                elif b"\0" in _first_bytes(path):
                    skipped.binary += 1
                else:
                    yield Source(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns)
            except FileNotFoundError:  # a link that leads nowhere, or a file just removed
                skipped.special += 1
            except OSError as error:
                raise UserError(f"cannot read {str(path)!r}: {reason(error)}") from error


def _first_bytes(path: Path) -> bytes:
    if path.name.lower().endswith(".gz"):
        try:
            with gzip.open(path, "rb") as file:
                return file.read(_SNIFFED_BYTES)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            return b""  # Not skipped in silence: reading it gives the error that names the fault.
    with open(path, "rb") as file:
        return file.read(_SNIFFED_BYTES)
