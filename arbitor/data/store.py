"""Where decoded content lives: a little in memory, the rest in cache files that are memory-mapped."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from arbitor.errors import UserError

MEMORY_BYTES = 64 << 20
_STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/arbitor`, or `~/.cache/arbitor`."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()) / "arbitor"


def map_file(path: Path, size: int) -> np.ndarray:
    """The first `size` bytes of a file, memory-mapped, uint8 [size].

    Mapped through torch, which closes the file again; `mmap` keeps a descriptor for every map, and a folder
    of a thousand files would run out of them.

    Raises:
        UserError: if the file cannot be mapped.
    """
    import torch

    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {str(path)!r}: {str(error).splitlines()[0]}") from error


class Store:
    """Keeps the decoded content of one corpus: `memory_bytes` in memory, the rest in cache files."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_left = memory_bytes
        self.unwritable: str | None = None
        """Why content had to stay in memory, if the cache could not be written."""

    def keep(self, key: tuple[object, ...], chunks: Iterable[bytes]) -> np.ndarray:
        """The concatenation of `chunks`, uint8; what was cached under `key` before is not produced again.

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
