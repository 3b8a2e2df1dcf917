"""Counter-based random bits: `stream_keys` on the host, `random_bits` on the device."""

import torch
from torch import Tensor

from arbitor.ops.random_bits import reference
from arbitor.ops.random_bits.reference import stream_keys

__all__ = ["random_bits", "stream_keys"]


@torch.library.custom_op("arbitor::random_bits", mutates_args=())
def random_bits(keys: Tensor, count: int) -> Tensor:
    """int32 keys [..., 2] -> int32 [..., count], 32 random bits an element."""
    return reference.random_bits(keys, count)


@random_bits.register_fake
def _(keys: Tensor, count: int) -> Tensor:
    return keys.new_empty((*keys.shape[:-1], count))
