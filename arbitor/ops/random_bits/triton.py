"""Triton kernel of `step_keys`: the random streams of all tensors of a step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.triton import shift_right

BLOCK = 128


@triton.jit
def _mix(x):
    """The 32-bit hash of `reference._mix_int` on int32."""
    x = (x ^ shift_right(x, 16)) * 0x7FEB352D
    x = (x ^ shift_right(x, 15)) * -2073254261  # 0x846CA68B
    return x ^ shift_right(x, 16)


@triton.jit(do_not_specialize=["base", "count"])
def _step_keys_kernel(step, tensors, keys, base, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    key = _mix(_mix(tl.load(step) + base) + tl.load(tensors + place, mask=inside, other=0))
    tl.store(keys + 2 * place, key, mask=inside)
    tl.store(keys + 2 * place + 1, _mix(key - 1640531527), mask=inside)  # + 0x9E3779B9


def step_keys(base: int, step: Tensor, tensors: Tensor) -> Tensor:
    """As `reference.step_keys`; `base` is `reference.seed_base(seed)`."""
    count = len(tensors)
    keys = torch.empty((count, 2), dtype=torch.int32, device=tensors.device)
    if count:
        _step_keys_kernel[(triton.cdiv(count, BLOCK),)](step, tensors, keys, base, count, BLOCK=BLOCK)
    return keys
