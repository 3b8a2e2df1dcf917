"""Where decoded content lives: a little in memory, the rest in cache files that are memory-mapped."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from arbitor.cache import cache_folder
from arbitor.errors import UserError

MEMORY_BYTES = 64 << 20
_STALE_SECONDS = 24 * 3600


class MappedBytes(np.ndarray):
    """A memory-mapped file, or a part of one, uint8 [N]; slices know their file as well.

    Reading a mapped page that the file does not have any more kills the process (SIGBUS), so whoever reads
    calls `check` before. Reading by `pread` instead would need no check, but a descriptor for each file, and
    files may be many; what is left is a truncation between the check and the read, microseconds later. A file
    that was removed or replaced by another one does no harm: the map keeps the one that it was made of.

    Attributes:
        source: path, size, device and inode of the file when it was mapped; None in arrays computed from one.
    """

    source: tuple[Path, int, int, int] | None

    def __array_finalize__(self, parent: object) -> None:
        self.source = getattr(parent, "source", None)

    def check(self) -> None:
        """Raise UserError if the file has become shorter since it was mapped."""
        if self.source is None:
            return
        path, size, device, inode = self.source
        try:
            status = os.stat(path)
        except OSError:
            return
        if status.st_size < size and (status.st_dev, status.st_ino) == (device, inode):
            raise UserError(
                f"{str(path)!r} was cut short while it was in use: it has {status.st_size:,} of {size:,} "
                "bytes; put it back and start again (a run goes on with --resume)"
            )


def map_file(path: Path, size: int) -> MappedBytes:
    """The first `size` bytes of a file, memory-mapped, uint8 [size].

    Mapped through torch, which closes the file again; `mmap` keeps a descriptor for every map, and a folder
    of a thousand files would run out of them.

    Raises:
        UserError: if the file cannot be mapped.
    """
    import torch

    try:
        status = os.stat(path)
        array = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {str(path)!r}: {str(error).splitlines()[0]}") from error
    mapped = array.view(MappedBytes)
    mapped.source = (Path(os.path.abspath(path)), size, status.st_dev, status.st_ino)
    return mapped


class Store:
    """Keeps the decoded content of one corpus: `memory_bytes` in memory, the rest in cache files."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_left = memory_bytes
        self.unwritable: str | None = None
        """Why content had to stay in memory, if the cache could not be written."""

    def keep(
        self,
        key: tuple[object, ...],
        chunks: Iterable[bytes],
        lasting: Callable[[], bool] = lambda: True,
    ) -> np.ndarray:
        """The concatenation of `chunks`, uint8; what was cached under `key` before is not produced again.

        Args:
            key: all that the content depends on.
            chunks: the content.
            lasting: asked behind the last chunk, whether the content is worth to be found by other runs.

        Raises:
            UserError: if the cache's disk is full; whatever `chunks` raises passes through, with no cache
                file left behind.
        """
        name = (
            hashlib.blake2b(repr(key).encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()
            + ".bytes"
        )
        path = cache_folder() / name
        with contextlib.suppress(OSError):
            if size := path.stat().st_size:
                return map_file(path, size)
        rest = iter(chunks)
        head = bytearray()
        for chunk in rest:
            head += chunk
            if len(head) > self._memory_left and self.unwritable is None:
                break
        else:
            self._memory_left = max(0, self._memory_left - len(head))
            return np.frombuffer(head, dtype=np.uint8)
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _remove_stale(path.parent)
                descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
            except OSError as error:
                self.unwritable = f"{path.parent}: {error.strerror}"
                for chunk in rest:
                    head += chunk
                return np.frombuffer(head, dtype=np.uint8)
            stack.callback(_unlink, partial)
            try:
                _write(descriptor, head, rest)
                if not lasting():
                    return map_file(Path(partial), os.path.getsize(partial))  # outlives the name of its file
                os.replace(partial, path)
            except OSError as error:
                raise UserError(
                    f"cannot write the cache {str(path.parent)!r}: {error.strerror}; make room there or let"
                    " XDG_CACHE_HOME name another folder"
                ) from error
        return map_file(path, path.stat().st_size)


def _write(descriptor: int, head: bytes | bytearray, rest: Iterator[bytes]) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(head)
        for chunk in rest:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _remove_stale(folder: Path) -> None:
    """Remove what writers that were killed left behind."""
    for partial in folder.glob("*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                partial.unlink()
