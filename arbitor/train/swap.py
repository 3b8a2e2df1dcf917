"""Folders that are whole or absent, whatever moment the process is killed at.

A folder NAME is written as `.NAME.tmp-<process>` beside it, flushed to the disk, and swapped in by two
renames: NAME becomes `.NAME.previous`, the temporary folder becomes NAME. Between the two, `.NAME.previous`
is the good one, and `locate` and `recover` know that.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock; two processes that save to one folder are then not kept apart
    fcntl = None  # type: ignore[assignment]


def previous_of(folder: Path) -> Path:
    """Where the folder that `folder` replaced is kept."""
    return folder.parent / f".{folder.name}.previous"


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """Replace a small text file; whoever reads it, at any moment, gets the old text or the new one whole."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Hold the lock of `parent`, where the file system has locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_folder(folder: Path, fill: Callable[[Path], None], *, keep_previous: bool = False) -> None:
    """Replace `folder` by one that `fill` writes; on any error the old one stays as it was.

    Args:
        folder: the target; its parent exists.
        fill: writes plain files into the empty folder that it is given.
        keep_previous: leave the replaced folder at `previous_of(folder)`.

    Raises:
        OSError: the disk did not take it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with _alone_in(folder.parent):
        _remove(temporary)
        try:
            os.mkdir(temporary)
            fill(temporary)
            for path in sorted(temporary.iterdir()):
                sync(path)
            sync(temporary)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        previous = previous_of(folder)
        if folder.exists():
            _remove(previous)
            os.rename(folder, previous)
        os.rename(temporary, folder)
        sync(folder.parent)
        if not keep_previous:
            _remove(previous)


def locate(folder: Path) -> Path:
    """`folder`, or what it was about to replace if a save was cut short between its two renames."""
    previous = previous_of(folder)
    return previous if not folder.exists() and previous.exists() else folder


def recover(folder: Path, *, keep_previous: bool = False) -> None:
    """Undo what a killed `write_folder` left half done, and remove what it did not get to remove.

    The caller makes sure that no other process writes there.
    """
    for temporary in folder.parent.glob(f".{folder.name}.tmp-*"):
        _remove(temporary)
    if locate(folder) != folder:
        os.rename(previous_of(folder), folder)
    if not keep_previous:
        _remove(previous_of(folder))


def restore_previous(folder: Path) -> None:
    """Put the folder that `folder` replaced back in its place, and drop `folder`."""
    os.rename(folder, folder.with_name(f".{folder.name}.tmp-dropped"))
    os.rename(previous_of(folder), folder)
    recover(folder, keep_previous=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
