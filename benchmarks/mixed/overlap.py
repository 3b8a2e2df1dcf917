"""How much of a text is part of the source code beside it: then a mix of both sees that text more than once.

Every line of the text, without the white space at both ends, is cut into stretches of `STRETCH` bytes, and
each is looked for at every place of the code. Shorter lines, and what is left at the end of a line, do not
count.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from arbitor.config import RunConfig, override
from arbitor.data.corpus import ByteCorpus
from arbitor.data.mixed import open_mix
from arbitor.data.stream import ByteStream

STRETCH = 40
AT_A_TIME = 1 << 20  # bytes
MOST_BYTES = 64 << 20  # of the text, and of the code
_FACTOR = 0x9E3779B97F4A7C15  # of the polynomial
_BITS = 20  # of a hash, of which a table says whether any stretch has them


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many stretches of a text there are, and how many of them occur in the code.

    Attributes:
        found, count: stretches.
    """

    found: int
    count: int

    @property
    def share(self) -> float:
        """Of the stretches; 0 without any."""
        return self.found / max(1, self.count)


def overlaps(config: RunConfig) -> dict[str, Overlap] | None:
    """Of the training text and of the held-out text with the training code of a run.

    Args:
        config: of the run.

    Returns:
        By "text" and "held_out"; None where the run has no code or no text, or one is a data set of the hub.
    """
    if not (config.mix.text_weight and config.mix.code_weight):
        return None
    parts = open_mix(override(config, image_weight=0.0, audio_weight=0.0, video_weight=0.0)).parts
    text, code = parts["text"], parts["code"]
    if not isinstance(text, ByteCorpus) or not isinstance(code, ByteCorpus):
        return None
    return {
        "text": overlap(text.train, code.train),
        "held_out": overlap(text.held_out, code.train),
    }


def overlap(text: ByteStream, code: ByteStream) -> Overlap:
    """How many different stretches of a text occur in code, of the first `MOST_BYTES` of each."""
    pieces = b"".join(set(_stretches(text.as_array(MOST_BYTES).tobytes())))
    if not pieces:
        return Overlap(0, 0)
    wanted = _hashes(np.frombuffer(pieces, dtype=np.uint8).reshape(-1, STRETCH))[:, 0]
    found = np.zeros(len(wanted), dtype=bool)
    shift = np.uint64(64 - _BITS)
    likely = np.zeros(1 << _BITS, dtype=bool)
    likely[wanted >> shift] = True
    size = min(MOST_BYTES, len(code))
    for first in range(0, size - STRETCH + 1, AT_A_TIME):
        part = code.window(first, min(AT_A_TIME + STRETCH - 1, size - first))
        there = _hashes(np.asarray(part)[None])[0]
        found |= np.isin(wanted, there[likely[there >> shift]])
    return Overlap(int(found.sum()), len(wanted))


def _stretches(text: bytes) -> Iterator[bytes]:
    for line in map(bytes.strip, text.splitlines()):
        for first in range(0, len(line) - STRETCH + 1, STRETCH):
            yield line[first : first + STRETCH]


def _hashes(rows_NL: np.ndarray) -> np.ndarray:
    """A hash of every stretch of each row, uint64 [N, L - STRETCH + 1]: a polynomial modulo 2^64.

    Stretches of twice the length are made of two, as in a product of powers; 40 are 32 and 8.
    """
    of = {1: rows_NL.astype(np.uint64)}
    for length in (2, 4, 8, 16, 32):
        of[length] = _joined(of[length // 2], of[length // 2], length // 2, length // 2)
    return _joined(of[32], of[8], 32, STRETCH - 32)


def _joined(one_NL: np.ndarray, other_NL: np.ndarray, length: int, other_length: int) -> np.ndarray:
    """Hashes of stretches of one length, each with what stands behind it."""
    behind = other_NL[:, length:]
    factor = np.uint64(pow(_FACTOR, other_length, 1 << 64))
    return one_NL[:, : behind.shape[1]] * factor + behind
