"""Triton kernels of `step_keys`, the random streams of all tensors of a step, and of `random_bits`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.triton import random_word, shift_right

BLOCK = 128
WORDS = 1024  # of a program of `random_bits`


@triton.jit
def _mix(x):
    """The 32-bit hash of `reference._mix_int` on int32."""
    x = (x ^ shift_right(x, 16)) * 0x7FEB352D
    x = (x ^ shift_right(x, 15)) * -2073254261  # 0x846CA68B
    return x ^ shift_right(x, 16)


@triton.jit
def _step_keys_kernel(step, tensors, keys, base, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    key = _mix(_mix(tl.load(step) + base) + tl.load(tensors + place, mask=inside, other=0))
    tl.store(keys + 2 * place, key, mask=inside)
    tl.store(keys + 2 * place + 1, _mix(key - 1640531527), mask=inside)  # + 0x9E3779B9


@triton.jit(do_not_specialize=["streams", "count", "blocks"])
def _random_bits_kernel(keys, words, streams, count, blocks, STREAMS: tl.constexpr, COUNT: tl.constexpr):
    stream = (tl.program_id(0) // blocks) * STREAMS + tl.arange(0, STREAMS)
    index = (tl.program_id(0) % blocks) * COUNT + tl.arange(0, COUNT)
    inside = stream < streams
    key_a = tl.load(keys + 2 * stream, mask=inside, other=0)[:, None]
    key_b = tl.load(keys + 2 * stream + 1, mask=inside, other=0)[:, None]
    at = words + stream.to(tl.int64)[:, None] * count + index[None, :]
    tl.store(at, random_word(index[None, :], key_a, key_b), mask=inside[:, None] & (index < count)[None, :])


def step_keys(base: int, step: Tensor, tensors: Tensor) -> Tensor:
    """As `reference.step_keys`; `base` is `reference.seed_base(seed)`."""
    count = len(tensors)
    keys = torch.empty((count, 2), dtype=torch.int32, device=tensors.device)
    if count:
        _step_keys_kernel[(triton.cdiv(count, BLOCK),)](step, tensors, keys, base, count, BLOCK=BLOCK)
    return keys


def random_bits(keys: Tensor, count: int) -> Tensor:
    """As `reference.random_bits`."""
    words = torch.empty((*keys.shape[:-1], count), dtype=torch.int32, device=keys.device)
    if words.numel():
        streams = words.numel() // count
        block = min(WORDS, triton.next_power_of_2(count))
        blocks = triton.cdiv(count, block)
        _random_bits_kernel[(triton.cdiv(streams, WORDS // block) * blocks,)](
            keys.contiguous(), words, streams, count, blocks, STREAMS=WORDS // block, COUNT=block
        )
    return words
