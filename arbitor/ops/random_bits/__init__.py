"""Counter-based random bits: `stream_keys` on the host, `random_bits` on the device."""

import torch
from torch import Tensor

from arbitor.ops.random_bits import reference
from arbitor.ops.random_bits.reference import stream_keys
from arbitor.ops.registry import register

__all__ = ["random_bits", "skip", "stream_keys"]


def random_bits(keys: Tensor, count: int) -> Tensor:
    """int32 keys [..., 2] -> int32 [..., count], 32 random bits an element."""
    return _random_bits(keys, count)


def skip(keys: Tensor, counts: int | Tensor) -> Tensor:
    """Keys whose element 0 is element `counts` of the streams of `keys`, counted modulo 2^32.

    Args:
        keys: int32 [..., 2].
        counts: a number, or int64 [...] one for each pair of keys.

    Returns:
        int32 [..., 2].
    """
    first = keys[..., 0].to(torch.int64) + counts
    return torch.stack([first.to(torch.int32), keys[..., 1].expand_as(first)], dim=-1)


_random_bits = register(
    "random_bits(Tensor keys, int count) -> Tensor",
    reference.random_bits,
    lambda keys, count: keys.new_empty((*keys.shape[:-1], count)),
)
