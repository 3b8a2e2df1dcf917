"""Votes, flips and repacking: `state_update` for trits, `scale_update` for exponents.

Shape letters: O out, I in, P packed bytes a row, G groups; `...` leading dimensions (matrices, experts).
"""

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.random_bits import random_bits
from arbitor.ops.registry import register
from arbitor.ops.scalar import scalar
from arbitor.ops.state_update import reference
from arbitor.ops.state_update.reference import MAX_SCALE_EXPONENT, MIN_SCALE_EXPONENT, Given

__all__ = [
    "MAX_SCALE_EXPONENT",
    "MIN_SCALE_EXPONENT",
    "Given",
    "scale_update",
    "state_update",
    "state_update_drawn",
    "state_update_of",
]


def state_update(
    packed: Tensor,
    accumulator: Tensor,
    direction: Tensor,
    bits: Tensor,
    active: Tensor,
    step: float | Tensor,
    span: int,
    threshold: int,
    rail: int,
    reset: bool,
) -> Tensor:
    """Turn a direction into integer votes, collect them, and flip trits whose accumulator crossed.

    A weight with no vote keeps trit and accumulator. Otherwise the vote is added; an accumulator at or above
    the threshold raises a trit below +1 and falls by the span, one below minus the threshold does the
    opposite (at minus the threshold too when threshold > span / 2, where that cannot swing back); at a rail
    (T = +-1) the accumulator is held to the rail limit outwards, and last of all to +-127.

    Args:
        packed: uint8 [..., O, P]; changed.
        accumulator: int8 [..., O, I]; changed.
        direction: fp32 [..., O, I], steps go against it.
        bits: int32 [..., O, I], of which the low 16 round.
        active: bool [..., 1, 1] or, of single rows, [..., O, 1]; where False nothing changes.
        step: accumulator units for a direction of 1 (learning rate in trits times span), a number or an fp32
            scalar on the device.
        span: accumulator units between neighbouring trits.
        threshold: accumulator value at which a trit flips.
        rail: limit of the accumulator outwards at T = +-1.
        reset: set the accumulator to 0 after a flip instead of keeping the rest.

    Returns:
        int64 [...]: flips in each matrix.
    """
    step = scalar(step, direction.device)
    return _update(packed, accumulator, direction, bits, active, step, span, threshold, rail, reset)


def state_update_drawn(
    packed: Tensor,
    accumulator: Tensor,
    direction: Tensor,
    keys: Tensor,
    active: Tensor,
    step: float | Tensor,
    span: int,
    threshold: int,
    rail: int,
    reset: bool,
) -> Tensor:
    """`state_update` of n matrices, its bits drawn from their random streams.

    Args:
        packed, accumulator, direction: [n, O, ...] as in `state_update`; slices of rows of larger matrices
            are fine.
        keys: int32 [n, 2], whose element 0 belongs to the first weight.
        active, step, span, threshold, rail, reset: as in `state_update`.

    Returns:
        int64 [n]: flips.
    """
    if uses_triton(packed):
        from arbitor.ops.state_update import triton

        step = scalar(step, direction.device)
        return triton.update(packed, accumulator, direction, keys, active, step, span, threshold, rail, reset)
    bits = random_bits(keys, direction[0].numel()).view(direction.shape)
    return state_update(packed, accumulator, direction, bits, active, step, span, threshold, rail, reset)


def state_update_of(
    packed: Tensor,
    accumulator: Tensor,
    given: Given,
    number: int,
    span: int,
    threshold: int,
    rail: int,
    reset: bool,
) -> None:
    """`state_update_drawn` of some matrices out of n, where kernels run.

    Args:
        packed, accumulator: [m, O, ...], changed.
        given: of all n matrices.
        number: of the first of the m among the n.
        span, threshold, rail, reset: as in `state_update`.
    """
    from arbitor.ops.state_update import triton

    triton.update_some(packed, accumulator, given, number, span, threshold, rail, reset)


def scale_update(
    exponent: Tensor,
    accumulator: Tensor,
    direction: Tensor,
    bits: Tensor,
    active: Tensor,
    step: float | Tensor,
    threshold: int,
) -> None:
    """Collect votes on scale exponents and apply whole steps; the rest stays in the accumulator.

    A group with no vote keeps exponent and accumulator.

    Args:
        exponent: int8 [..., O, G]; changed, held to [-62, 31].
        accumulator: int8 [..., O, G]; changed.
        direction: fp32 [..., O, G], steps go against it.
        bits: int32 [..., O, G], of which the low 16 round.
        active: bool [..., 1, 1] or, of single rows, [..., O, 1]; where False nothing changes.
        step: accumulator units for a direction of 1, a number or an fp32 scalar on the device.
        threshold: accumulator units in a whole octave.
    """
    step = scalar(step, direction.device)
    _scale_update(exponent, accumulator, direction, bits, active, step, threshold)


_update = register(
    "state_update(Tensor(a!) packed, Tensor(b!) accumulator, Tensor direction, Tensor bits, Tensor active, "
    "Tensor step, int span, int threshold, int rail, bool reset) -> Tensor",
    reference.update,
    lambda packed, *_: packed.new_empty(packed.shape[:-2], dtype=torch.int64),
)
_scale_update = register(
    "scale_update(Tensor(a!) exponent, Tensor(b!) accumulator, Tensor direction, Tensor bits, Tensor active, "
    "Tensor step, int threshold) -> ()",
    reference.scale_update,
    lambda *_: None,
)
