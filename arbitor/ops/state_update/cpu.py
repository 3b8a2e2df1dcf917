"""Votes and flips on a CPU: the integers of the reference by sums of bytes, for what is active throughout.

torch's comparisons take an order of magnitude longer than its sums and limits of small integers, so
conditions are written as those.
"""

import ctypes

import torch
from torch import Tensor

from arbitor.ops import native
from arbitor.ops.state_update.reference import lowest_of, stochastic_floor
from arbitor.ops.trit_codec import cpu as trit_codec
from arbitor.ops.trit_codec.reference import PLANE


def update(
    packed: Tensor,
    accumulator: Tensor,
    direction: Tensor,
    bits: Tensor,
    step: float | Tensor,
    span: int,
    threshold: int,
    rail: int,
    reset: bool,
) -> Tensor:
    """`reference.update` of blocks that are all active.

    Args:
        packed: uint8 [N, 32]; changed.
        accumulator: int8 [N, 160]; changed.
        direction: fp32 [N, 160].
        bits: int32 [N, 160].
        step, span, threshold, rail, reset: as in the reference.

    Returns:
        int32 [N]: flips in each block.
    """
    assert packed.shape[-1] == PLANE
    lowest = lowest_of(span, threshold, reset)
    compiled = native.passes(
        (packed, torch.uint8), (accumulator, torch.int8), (direction, torch.float32), (bits, torch.int32)
    )
    if compiled is not None:
        flips = packed.new_empty(len(packed), dtype=torch.int32)
        voting = native.Voting(float(-step * 65536.0), span, threshold, lowest, rail, reset)
        if compiled.update(
            packed.data_ptr(), accumulator.data_ptr(), direction.data_ptr(), bits.data_ptr(),
            flips.data_ptr(), len(packed), ctypes.byref(voting), torch.get_num_threads(),
        ):  # fmt: skip
            return flips
    total = stochastic_floor(direction, -step, bits).to(torch.int16)
    voted = total.abs().clamp_max_(1).to(torch.int8)
    trits = trit_codec.unpack(packed, accumulator.shape[-1])
    total.add_(accumulator.to(torch.int16))
    limited = total.clamp(-128, 127).to(torch.int8)
    # 1 at the threshold and above, -1 at -lowest and below, else 0.
    crossed = limited.clamp(threshold - 1, threshold)
    crossed.add_(limited.clamp_(-lowest, 1 - lowest)).add_(lowest - threshold).mul_(voted)
    moved = crossed.add_(trits).clamp_(-1, 1)
    flip = moved - trits
    if reset:
        total.mul_(1 - flip.abs())
    else:
        total.sub_(flip.to(torch.int16), alpha=span)
    held = total.clamp_(-127, 127).to(torch.int8)
    # At a rail, trit * total is how far the accumulator stands outwards.
    outwards = held * moved
    excess = outwards.sub_(outwards.clamp_max(rail)).mul_(moved).mul_(voted)
    accumulator.copy_(held.sub_(excess))
    packed.copy_(trit_codec.pack(moved))
    return flip.abs_().sum(dim=-1, dtype=torch.int32)
