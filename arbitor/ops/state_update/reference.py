"""Votes, flips and repacking: the one place where trits, accumulators and exponents change.

With S = span, theta = threshold and R = rail, an accumulator in units of 1/S trit and a trit are together
the integer latent weight S*T + T_accum. Shape letters: O out, I in, P packed bytes a row, G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from arbitor.ops.trit_codec import reference as trit_codec

MIN_SCALE_EXPONENT = -62
MAX_SCALE_EXPONENT = 31
_FIXED_LIMIT = float(1 << 30)  # keeps the fixed-point vote inside int32 whatever the learning rate


class Given(NamedTuple):
    """What n matrices are updated with.

    Attributes:
        direction: float [n, O, I], every matrix dense; `unit` times it is what is meant, rounded to fp32.
        unit: see above.
        keys: int32 [n, 2].
        active: bool [n, 1, 1] or [n, O, 1].
        step: fp32 scalar.
        flips: int64 [n], added to.
    """

    direction: Tensor
    unit: float
    keys: Tensor
    active: Tensor
    step: Tensor
    flips: Tensor


def stochastic_floor(values: Tensor, factor: float | Tensor, bits: Tensor) -> Tensor:
    """floor(factor * values + uniform[0, 1)) in integers after one float rounding.

    Args:
        values: fp32 [...].
        factor: a number, rounded to fp32 before use, or an fp32 scalar.
        bits: int32 [...], of which the low 16 are the uniform number.

    Returns:
        int32 [...]: (rint(factor * 2^16 * values) + bits mod 2^16) >> 16.
    """
    fixed = (values * (factor * 65536.0)).clamp_(-_FIXED_LIMIT, _FIXED_LIMIT).round_().to(torch.int32)
    return fixed.add_(bits & 0xFFFF).bitwise_right_shift_(16)


def lowest_of(span: int, threshold: int, reset: bool) -> int:
    """How far below zero an accumulator flips a trit down: one further where it could swing back at once."""
    return threshold if reset or 2 * threshold > span else threshold + 1


def update(
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
    """Vote and flip in place; see `arbitor.ops.state_update.state_update`."""
    votes = stochastic_floor(direction, -step, bits).to(torch.int16).mul_(active)
    voted = (votes != 0).view(torch.int8)
    trits = trit_codec.unpack(packed, direction.shape[-1])
    total = votes.add_(accumulator)
    lowest = lowest_of(span, threshold, reset)
    up = (total >= threshold).logical_and_(trits < 1)
    down = (total <= -lowest).logical_and_(trits > -1)
    flip = (up.view(torch.int8) - down.view(torch.int8)).mul_(voted)
    trits += flip
    total = total.masked_fill_(flip != 0, 0) if reset else total.sub_(flip, alpha=span)
    # At a rail, trit * total is how far the accumulator stands outwards; elsewhere the excess is zero.
    excess = (total * trits).sub_(rail).clamp_min_(0).mul_(trits).mul_(voted)
    accumulator.copy_(total.sub_(excess).clamp_(-127, 127))
    packed.copy_(trit_codec.pack(trits))
    return flip.abs_().sum(dim=(-2, -1), dtype=torch.int64)


def scale_update(
    exponent: Tensor,
    accumulator: Tensor,
    direction: Tensor,
    bits: Tensor,
    active: Tensor,
    step: float | Tensor,
    threshold: int,
) -> None:
    """Votes on scale exponents in place; see `arbitor.ops.state_update.scale_update`."""
    votes = stochastic_floor(direction, -step, bits).clamp_(-16384, 16384).masked_fill_(~active, 0)
    total = accumulator.to(torch.int32) + votes
    whole = torch.div(total, threshold, rounding_mode="trunc").masked_fill_(votes == 0, 0)
    accumulator.copy_((total - whole * threshold).clamp_(-127, 127))
    exponent.copy_((exponent + whole).clamp_(MIN_SCALE_EXPONENT, MAX_SCALE_EXPONENT))
