"""Counter-based random bits: the keys of streams, and `random_bits` of a stream."""

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.random_bits import cpu, reference
from arbitor.ops.random_bits.reference import stream_keys
from arbitor.ops.registry import register

__all__ = ["random_bits", "skip", "step_keys", "stream_keys"]


def step_keys(seed: int, step: Tensor, tensors: Tensor) -> Tensor:
    """`stream_keys` of many tensors where the number of the step is on the device.

    Args:
        seed: of the run, any integer; all of its 64 low bits count.
        step: int32 scalar.
        tensors: int32 [n], the low 32 bits of their numbers.

    Returns:
        int32 [n, 2].
    """
    if uses_triton(step):
        from arbitor.ops.random_bits import triton

        return triton.step_keys(reference.seed_base(seed), step, tensors)
    return reference.step_keys(seed, step, tensors)


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


def _dispatch(keys: Tensor, count: int) -> Tensor:
    if uses_triton(keys):
        from arbitor.ops.random_bits import triton

        return triton.random_bits(keys, count)
    return (cpu if keys.is_cpu else reference).random_bits(keys, count)


_random_bits = register(
    "random_bits(Tensor keys, int count) -> Tensor",
    _dispatch,
    lambda keys, count: keys.new_empty((*keys.shape[:-1], count)),
)
