"""Momentum on a CPU: the bits of the reference in fewer passes, for what is active throughout."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from arbitor.ops import native
from arbitor.ops.momentum import reference
from arbitor.ops.momentum.reference import MAX_EXPONENT, MIN_EXPONENT, OCTAVE, code_max

_MANTISSA = 0x7FFFFF


def fold(
    gradient: Tensor,
    codes: Tensor,
    exponent: Tensor,
    random_bits: Tensor,
    bits: int,
    beta: float,
    lookahead: float,
) -> None:
    """`reference.fold` where all is active; the direction is written over the gradient.

    Args:
        gradient: fp32 [N, I], I a multiple of the group; contiguous, changed.
        codes, exponent: as in the reference; contiguous, changed.
        random_bits: int32 [N, I], kept.
        bits, beta, lookahead: as in the reference.
    """
    N, in_features = gradient.shape
    H = exponent.shape[1]
    compiled = native.passes(
        (gradient, torch.float32),
        (codes, torch.int8 if bits == 8 else torch.uint8),
        (exponent, torch.int16),
        (random_bits, torch.int32),
    )
    if compiled is not None and in_features in (H * reference.GROUP, H * reference.SMALL_GROUP):
        compiled.fold(
            gradient.data_ptr(), codes.data_ptr(), exponent.data_ptr(), random_bits.data_ptr(), N,
            in_features, H, bits, ctypes.byref(_folding(bits, beta, lookahead)), torch.get_num_threads(),
        )  # fmt: skip
        return
    momentum_NI = codes if bits == 8 else reference.unpack_nibbles(codes, in_features)
    momentum_NI = momentum_NI.to(torch.float32)
    momentum_NHW = momentum_NI.view(N, H, -1)
    momentum_NHW.mul_(reference._scale(exponent, 1 / code_max(bits), 1)[..., None])
    momentum_NI.mul_(beta).add_(gradient * (1 - beta))
    new_exponent_NH = _group_exponent(momentum_NHW)
    largest = code_max(bits) * 65536.0
    fixed_NHW = momentum_NHW * reference._scale(new_exponent_NH, largest, -1)[..., None]
    fixed_NI = fixed_NHW.clamp_(-largest, largest).round_().view(N, in_features).to(torch.int32)
    fixed_NI.add_((random_bits >> 16).bitwise_and_(0xFFFF)).bitwise_right_shift_(16)
    fixed_NI.clamp_(-code_max(bits), code_max(bits))
    codes.copy_(fixed_NI if bits == 8 else reference.pack_nibbles(fixed_NI.to(torch.int8)))
    exponent.copy_(new_exponent_NH)
    gradient.mul_(1 - lookahead).add_(momentum_NI.mul_(lookahead))


@cache
def _folding(bits: int, beta: float, lookahead: float) -> native.Folding:
    """What the compiled pass is told."""
    cpu = torch.device("cpu")
    largest = code_max(bits)
    mantissas = reference._fractions(cpu, 1.0, 1).view(torch.int32) & _MANTISSA
    return native.Folding(
        beta,
        1 - beta,
        1 - lookahead,
        lookahead,
        tuple(reference._fractions(cpu, 1 / largest, 1).tolist()),
        tuple(reference._fractions(cpu, largest * 65536.0, -1).tolist()),
        tuple(mantissas.tolist()),
        MIN_EXPONENT,
        MAX_EXPONENT,
    )


def _group_exponent(values_NHW: Tensor) -> Tensor:
    """`reference.group_exponent` of groups that are full: int16 [N, H]."""
    absmax_NH = values_NHW.abs().amax(dim=-1)
    bits_NH = absmax_NH.view(torch.int32)
    thresholds = reference._fractions(values_NHW.device, 1.0, 1).view(torch.int32) & _MANTISSA
    eighths_NH = torch.bucketize(bits_NH & _MANTISSA, thresholds, out_int32=True)
    exponent_NH = ((bits_NH >> 23) - 127) * OCTAVE + eighths_NH
    return exponent_NH.clamp_(MIN_EXPONENT, MAX_EXPONENT).to(torch.int16)
