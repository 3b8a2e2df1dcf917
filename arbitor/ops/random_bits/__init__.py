"""Counter-based random bits: `stream_keys` on the host, `random_bits` on the device."""

from torch import Tensor

from arbitor.ops.random_bits import reference
from arbitor.ops.random_bits.reference import stream_keys
from arbitor.ops.registry import register

__all__ = ["random_bits", "stream_keys"]


def random_bits(keys: Tensor, count: int) -> Tensor:
    """int32 keys [..., 2] -> int32 [..., count], 32 random bits an element."""
    return _random_bits(keys, count)


_random_bits = register(
    "random_bits(Tensor keys, int count) -> Tensor",
    reference.random_bits,
    lambda keys, count: keys.new_empty((*keys.shape[:-1], count)),
)
