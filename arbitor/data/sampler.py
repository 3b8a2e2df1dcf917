"""Random windows of a byte stream, in an order that depends on the seed and a counter alone.

Shapes: B windows a batch, L = ctx bytes each.
"""

from collections.abc import Mapping

import numpy as np

from arbitor.data.stream import ByteStream
from arbitor.errors import UserError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STATE_KEYS = ("seed", "drawn", "stream_bytes", "stream_digest")


class Sampler:
    """Draws windows at uniformly random offsets, files' borders ignored, with replacement.

    Window n of a run is a function of (seed, n) and the stream, so two integers are the whole state, the
    batch size does not change which windows come in which order, and every platform draws the same.
    """

    def __init__(self, stream: ByteStream, batch: int, ctx: int, seed: int = 0) -> None:
        """`batch` windows of `ctx` bytes a draw; `seed` any non-negative integer below 2^63."""
        if len(stream) < ctx:
            raise UserError(f"{len(stream)} bytes of data are shorter than the context of {ctx} bytes")
        self._stream = stream
        self._batch = batch
        self._ctx = ctx
        self._seed = seed
        self._drawn = 0
        self._fingerprint = stream.fingerprint()

    def next(self) -> np.ndarray:
        """The next windows, int64 [batch, ctx]."""
        counters_B = np.arange(self._drawn, self._drawn + self._batch, dtype=np.uint64)
        self._drawn += self._batch
        # The remainder's bias is (number of offsets) / 2^64: nothing for any stream that fits on a disk.
        num_offsets = np.uint64(len(self._stream) - self._ctx + 1)
        offsets_B = (random_bits(self._seed, counters_B) % num_offsets).astype(np.int64)
        return self._stream.windows(offsets_B, self._ctx).astype(np.int64)

    def state(self) -> dict[str, int]:
        """Where the sampler stands, as plain integers."""
        values = (self._seed, self._drawn, len(self._stream), self._fingerprint)
        return dict(zip(_STATE_KEYS, values, strict=True))

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from `state`, exactly.

        Raises:
            UserError: if `state` is not a sampler's, or was taken on other data.
        """
        if sorted(state) != sorted(_STATE_KEYS):
            raise UserError(f"sampler state has the keys {sorted(state)}, needed are {sorted(_STATE_KEYS)}")
        for key in _STATE_KEYS:
            if type(state[key]) is not int or not 0 <= state[key] < 1 << 63:
                raise UserError(
                    f"sampler state: {key} must be a non-negative integer, got {state[key]!r:.80}"
                )
        if (state["stream_bytes"], state["stream_digest"]) != (len(self._stream), self._fingerprint):
            raise UserError(
                f"the training data is not what it was: {state['stream_bytes']:,} bytes then,"
                f" {len(self._stream):,} now"
                + (", with other content" if state["stream_bytes"] == len(self._stream) else "")
                + "; an exact resume needs the same data (start a new run to train on other data)"
            )
        self._seed = state["seed"]
        self._drawn = state["drawn"]


def random_bits(seed: int, counters: np.ndarray) -> np.ndarray:
    """64 random bits for every counter (uint64): SplitMix64 (Steele, Lea, Flood 2014), keyed by the seed."""
    key = _mixed(np.array([seed], dtype=np.uint64) + _GOLDEN)
    return _mixed(key + counters * _GOLDEN)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
