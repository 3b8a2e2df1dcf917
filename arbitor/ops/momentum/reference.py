"""Momentum kept as int8 or 4-bit codes with a shared exponent for every group of neighbours: 32, or 16.

value = code / Q * 2^(e / 8), Q = 127 or 7, with e int16 in eighths of an octave: the smallest e whose
2^(e/8) covers the group's largest magnitude, found from the float's bits and eight thresholds (no
logarithm), so that every device finds the same one. Codes are rounded stochastically.

Shape letters: O out, I in, C code bytes a row (I, or ceil(I/2) for 4 bits), H groups a row, G scale groups.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from arbitor.ops.exponent import exp2_int

GROUP = 32
SMALL_GROUP = 16
OCTAVE = 8  # exponent steps in a factor of two
MIN_EXPONENT = -100 * OCTAVE
MAX_EXPONENT = 100 * OCTAVE


class Weighed(NamedTuple):
    """Where directions of n matrices go that are weighed on the way.

    Attributes:
        direction: float [n, O, I], written.
        weights: fp32 [n, O, G], multiplied by.
        group: neighbours in a row that share a weight.
        largest: int32 [n], raised to the bits of the largest magnitude ahead of rounding, sign cleared.
        number: of the first matrix at hand among the n.
    """

    direction: Tensor
    weights: Tensor
    group: int
    largest: Tensor
    number: int


def code_max(bits: int) -> int:
    """Largest code: 127 for 8 bits, 7 for 4."""
    return (1 << (bits - 1)) - 1


@cache
def _fractions(device: torch.device, factor: float, sign: int) -> Tensor:
    """fp32 [8]: factor * 2^(sign * j / 8)."""
    values = [factor * 2.0 ** (sign * j / OCTAVE) for j in range(OCTAVE)]
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).to(device)


def _scale(exponent: Tensor, factor: float, sign: int) -> Tensor:
    """factor * 2^(sign * exponent / 8) as fp32, with one rounding."""
    e = exponent.to(torch.int32)
    return _fractions(e.device, factor, sign)[e & (OCTAVE - 1)] * exp2_int(sign * (e >> 3))


def group_of(in_features: int, num_groups: int) -> int:
    """The size of the groups that a row of `in_features` has `num_groups` exponents for: 32 or 16.

    Where both sizes give as many, the row is a single group and they mean the same.

    Raises:
        ValueError: neither size gives that many.
    """
    for group in (GROUP, SMALL_GROUP):
        if num_groups == -(-in_features // group):
            return group
    raise ValueError(f"{num_groups} exponents for {in_features} elements are not one for every 32 or 16")


def _scaled(values: Tensor, per_group: Tensor, group: int) -> Tensor:
    """values [..., I] times the factor [..., H] of their group, as fp32."""
    in_features = values.shape[-1]
    if in_features % group:
        return values * per_group.repeat_interleave(group, dim=-1)[..., :in_features]
    return (values.unflatten(-1, (-1, group)) * per_group[..., None]).flatten(-2)


def group_exponent(values: Tensor, group: int = GROUP) -> Tensor:
    """Smallest e with 2^(e/8) >= max |values| in each group.

    Args:
        values: fp32 [..., I], finite.
        group: neighbours that share an exponent.

    Returns:
        int16 [..., H], clamped to the legal range.
    """
    in_features = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -in_features % group)) if in_features % group else values
    absmax = padded.unflatten(-1, (-1, group)).abs().amax(dim=-1)
    bits = absmax.view(torch.int32)
    thresholds = _fractions(values.device, 1.0, 1).view(torch.int32) & 0x7FFFFF
    eighths = ((bits & 0x7FFFFF)[..., None] > thresholds).sum(dim=-1)
    exponent = ((bits >> 23) - 127) * OCTAVE + eighths
    return exponent.clamp_(MIN_EXPONENT, MAX_EXPONENT).to(torch.int16)


def pack_nibbles(codes: Tensor) -> Tensor:
    """int codes [..., I] in [-7, 7] -> uint8 [..., ceil(I/2)]: element 2j low, 2j+1 high, each plus 8."""
    shifted = torch.nn.functional.pad(codes + 8, (0, codes.shape[-1] % 2), value=8).to(torch.uint8)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """uint8 [..., ceil(I/2)] -> int8 codes [..., I]."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1).to(torch.int8) - 8
    return pairs.flatten(-2)[..., :in_features]


def decode(codes: Tensor, exponent: Tensor, in_features: int, bits: int) -> Tensor:
    """Momentum as fp32 [..., I] from codes [..., C] and exponent int16 [..., H]."""
    if bits == 4:
        codes = unpack_nibbles(codes, in_features)
    group = group_of(in_features, exponent.shape[-1])
    return _scaled(codes, _scale(exponent, 1 / code_max(bits), 1), group)


def encode(values: Tensor, random_bits: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Round fp32 [..., I] stochastically; the high 16 of `random_bits` int32 [..., I] are used.

    Neighbours share an exponent in groups of `group`, 32 or 16.

    Returns:
        codes int8 [..., I] or uint8 [..., ceil(I/2)], and exponent int16 [..., H].
    """
    exponent = group_exponent(values, group)
    largest = code_max(bits) * 65536.0
    # Beyond 2^100 the exponent no longer covers the values, and int32 would not hold them.
    fixed = (
        _scaled(values, _scale(exponent, largest, -1), group)
        .clamp_(-largest, largest)
        .round_()
        .to(torch.int32)
    )
    codes = fixed.add_((random_bits >> 16).bitwise_and_(0xFFFF)).bitwise_right_shift_(16)
    codes = codes.clamp_(-code_max(bits), code_max(bits)).to(torch.int8)
    return (pack_nibbles(codes) if bits == 4 else codes), exponent


def fold(
    gradient: Tensor,
    codes: Tensor,
    exponent: Tensor,
    random_bits: Tensor,
    active: Tensor,
    bits: int,
    beta: float,
    lookahead: float,
) -> Tensor:
    """Momentum step in place; see `arbitor.ops.momentum.momentum_fold`."""
    momentum = decode(codes, exponent, gradient.shape[-1], bits)
    momentum = momentum.mul_(beta).add_(gradient * (1 - beta))
    new_codes, new_exponent = encode(
        momentum, random_bits, bits, group_of(gradient.shape[-1], exponent.shape[-1])
    )
    torch.where(active, new_codes, codes, out=codes)
    torch.where(active, new_exponent, exponent, out=exponent)
    return momentum.mul_(lookahead).add_(gradient * (1 - lookahead))
