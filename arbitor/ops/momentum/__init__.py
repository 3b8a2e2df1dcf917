"""Momentum in low-bit codes: `momentum_fold`."""

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.momentum import reference
from arbitor.ops.momentum.reference import GROUP, SMALL_GROUP, Weighed, code_max
from arbitor.ops.random_bits import random_bits
from arbitor.ops.registry import register

__all__ = [
    "GROUP",
    "SMALL_GROUP",
    "Weighed",
    "code_max",
    "momentum_fold",
    "momentum_fold_drawn",
    "momentum_fold_weighed",
]


def momentum_fold(
    gradient: Tensor,
    codes: Tensor,
    exponent: Tensor,
    random_bits: Tensor,
    active: Tensor,
    bits: int,
    beta: float,
    lookahead: float,
) -> Tensor:
    """Fold a gradient into the momentum and give the direction of the step.

    With m = decode(codes) * beta + gradient * (1 - beta) in fp32, the codes become m rounded stochastically,
    and the direction is gradient * (1 - lookahead) + m * lookahead with m unrounded.

    Args:
        gradient: fp32 [..., I].
        codes: int8 [..., I], or uint8 [..., ceil(I/2)] for 4 bits; changed.
        exponent: int16 [..., ceil(I/32)], or [..., ceil(I/16)] for groups of 16; changed.
        random_bits: int32 [..., I], of which the high 16 bits round.
        active: bool, broadcasts over [..., 1]; where False nothing changes.
        bits: 8 or 4.
        beta: share of the old momentum that stays.
        lookahead: weight of the momentum in the direction (Nesterov's form).

    Returns:
        fp32 [..., I], meaningless where not active.
    """
    return _fold(gradient, codes, exponent, random_bits, active, bits, beta, lookahead)


def momentum_fold_drawn(
    gradient: Tensor,
    codes: Tensor,
    exponent: Tensor,
    keys: Tensor,
    active: Tensor,
    bits: int,
    beta: float,
    lookahead: float,
) -> Tensor:
    """`momentum_fold` of n matrices [n, O, I] with bits drawn from random streams, keys int32 [n, 2]."""
    if uses_triton(gradient):
        from arbitor.ops.momentum import triton

        return triton.fold(gradient, codes, exponent, keys, active, bits, beta, lookahead)
    random = random_bits(keys, gradient[0].numel()).view(gradient.shape)
    return momentum_fold(gradient, codes, exponent, random, active, bits, beta, lookahead)


def momentum_fold_weighed(
    gradient: Tensor,
    codes: Tensor,
    exponent: Tensor,
    keys: Tensor,
    active: Tensor,
    bits: int,
    beta: float,
    lookahead: float,
    into: Weighed,
) -> None:
    """`momentum_fold_drawn` of some matrices out of n, whose direction is weighed; where kernels run.

    Args:
        gradient: float [m, O, I].
        codes, exponent: momentum of these m, changed.
        keys, active: of all n.
        bits, beta, lookahead: as in `momentum_fold`.
        into: what is written, of all n.
    """
    from arbitor.ops.momentum import triton

    triton.fold(gradient, codes, exponent, keys, active, bits, beta, lookahead, into=into)


_fold = register(
    "momentum_fold(Tensor gradient, Tensor(a!) codes, Tensor(b!) exponent, Tensor random_bits, "
    "Tensor active, int bits, float beta, float lookahead) -> Tensor",
    reference.fold,
    lambda gradient, codes, exponent, random_bits, active, bits, beta, lookahead: torch.empty_like(gradient),
)
