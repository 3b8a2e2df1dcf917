"""One long run of bytes laid over many arrays.

Memory-mapped files are looked at before each access (`MappedBytes.check`, 2 us): reading a page that a file
has lost since it was mapped would end the process. What is handed out as a view is not watched any more.

Shapes: N windows, L bytes each.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from arbitor.data.store import MappedBytes

_WHOLE_BYTES = 256 << 20  # what is hashed byte for byte, in less than a second
_CHUNK_BYTES = 1 << 20
_PROBES = 4096
_PROBE_BYTES = 16 << 10


class ByteStream:
    """The concatenation of uint8 arrays, in memory or memory-mapped, without copying them."""

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        """`arrays`: one-dimensional uint8 arrays; empty ones are dropped."""
        self._segments = _coalesced(arrays)
        self._starts = np.cumsum([0, *(len(s) for s in self._segments)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def window(self, offset: int, length: int) -> np.ndarray:
        """The `length` bytes from `offset` on, uint8 [length]; a copy where they span two files.

        Raises:
            IndexError: if they do not lie inside the stream.
        """
        if length < 0 or not 0 <= offset <= len(self) - length:
            raise IndexError(f"bytes {offset} to {offset + length} of a stream of {len(self)}")
        index = int(np.searchsorted(self._starts, offset, side="right")) - 1
        parts = []
        while length > 0:
            start = offset - int(self._starts[index])
            segment = self._segments[index]
            if isinstance(segment, MappedBytes):
                segment.check()
            part: np.ndarray = segment[start : start + length]
            parts.append(part)
            offset, length, index = offset + len(part), length - len(part), index + 1
        if not parts:
            return np.empty(0, dtype=np.uint8)
        return parts[0] if len(parts) == 1 else np.concatenate([part.view(np.ndarray) for part in parts])

    def windows(self, offsets_N: np.ndarray, length: int) -> np.ndarray:
        """The windows of `length` bytes at `offsets_N` (int64), as one new uint8 array [N, length]."""
        if len(self._segments) == 1 and length <= len(self):
            if isinstance(self._segments[0], MappedBytes):
                self._segments[0].check()
            return sliding_window_view(self._segments[0], length)[offsets_N]
        windows_NL = np.empty((len(offsets_N), length), dtype=np.uint8)
        for row, offset in zip(windows_NL, offsets_N.tolist(), strict=True):
            row[:] = self.window(offset, length)
        return windows_NL

    def as_array(self, max_bytes: int | None = None) -> np.ndarray:
        """The first `max_bytes` (all, if None) as one uint8 array; a copy where they span two files."""
        return self.window(0, len(self) if max_bytes is None else min(max_bytes, len(self)))

    def fingerprint(self) -> int:
        """A number below 2^63 made from the length and the content.

        Equal streams have equal fingerprints wherever their files lie. Up to 256 MiB every byte counts; of a
        longer stream the length and 4,096 evenly spaced blocks of 16 KiB do, the first and the last bytes
        among them, so that a start does not read all of it. It tells by accident changed data, not an
        adversary.
        """
        digest = hashlib.blake2b(len(self).to_bytes(8, "little"), digest_size=8)
        if len(self) <= _WHOLE_BYTES:
            starts = range(0, len(self), _CHUNK_BYTES)
            pieces = [(start, min(_CHUNK_BYTES, len(self) - start)) for start in starts]
        else:
            room = len(self) - _PROBE_BYTES
            pieces = [(room * probe // (_PROBES - 1), _PROBE_BYTES) for probe in range(_PROBES)]
        for start, length in pieces:
            digest.update(np.ascontiguousarray(self.window(start, length)).data)
        return int.from_bytes(digest.digest(), "little") >> 1


def _coalesced(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
    """`arrays` without empty ones, neighbouring slices of one buffer joined into one slice.

    Many small files are read into one buffer, and windows of a single segment are gathered at once.
    """
    joined: list[np.ndarray] = []
    for array in arrays:
        if array.dtype != np.uint8 or array.ndim != 1:
            raise TypeError(f"a byte stream is made of uint8 [N] arrays, got {array.dtype} {array.shape}")
        if not len(array):
            continue
        base = _common_base(joined[-1], array) if joined else None
        if base is not None:
            start = joined[-1].ctypes.data - base.ctypes.data
            joined[-1] = base[start : start + len(joined[-1]) + len(array)]
        else:
            joined.append(array)
    return joined


def _common_base(first: np.ndarray, second: np.ndarray) -> np.ndarray | None:
    """The buffer in which `second` follows `first` directly, or None."""
    base = first.base
    if (
        not isinstance(base, np.ndarray)
        or base is not second.base
        or base.dtype != np.uint8
        or base.ndim != 1
    ):
        return None
    contiguous = all(array.flags.c_contiguous for array in (base, first, second))
    return base if contiguous and first.ctypes.data + first.nbytes == second.ctypes.data else None
