"""Packing and unpacking on a CPU: the integers of the reference, by arithmetic that vectorises.

torch's comparisons and look-ups take an order of magnitude longer than its sums of bytes.
"""

from functools import cache

import torch
from torch import Tensor

from arbitor.ops.trit_codec import reference
from arbitor.ops.trit_codec.reference import BLOCK, PLANE, TRITS_PER_BYTE

BYTES_AT_ONCE = 1 << 18  # packed bytes that are worked on at once
LEGAL_FACTOR = 243  # times this, modulo 256, a byte that packing produces is below this


def all_legal(packed: Tensor) -> bool:
    """Whether packing produces each of these bytes, uint8 [...]."""
    return packed.numel() == 0 or int((packed * LEGAL_FACTOR).amax()) < LEGAL_FACTOR


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """See `reference.unpack`."""
    return unpack_legal(packed, in_features) if all_legal(packed) else reference.unpack(packed, in_features)


def unpack_legal(packed: Tensor, in_features: int) -> Tensor:
    """`unpack` of bytes that are known to be legal."""
    *leading, width = packed.shape
    bytes_BP = packed.reshape(-1, PLANE)
    trits_BTP = torch.empty((len(bytes_BP), TRITS_PER_BYTE, PLANE), dtype=torch.int8)
    factors_T11 = _powers_of_3()
    for part in _parts(len(bytes_BP)):
        # Digit n of q is the whole part of 3 * (q * 3^n mod 256) / 256; uint8 takes the remainder by itself.
        digits_TBP = (bytes_BP[part] * factors_T11).to(torch.int16).mul_(3).bitwise_right_shift_(8)
        trits_BTP[part].copy_(digits_TBP.sub_(1).permute(1, 0, 2))
    trits = trits_BTP.view(*leading, width // PLANE * BLOCK)
    return trits if trits.shape[-1] == in_features else trits[..., :in_features].contiguous()


def pack(trits: Tensor) -> Tensor:
    """See `reference.pack`."""
    *leading, in_features = trits.shape
    width = reference.packed_width(in_features)
    if padding := width // PLANE * BLOCK - in_features:
        trits = torch.nn.functional.pad(trits, (0, padding))
    trits_BTP = trits.reshape(-1, TRITS_PER_BYTE, PLANE)
    value_BP = trits_BTP[:, 0]
    for n in range(1, TRITS_PER_BYTE):  # from -121 to 121
        value_BP = torch.add(trits_BTP[:, n], value_BP, alpha=3)
    value_BP = value_BP.to(torch.int32).add_(121)
    # ceil(256 v / 243) = v + floor((13 v + 242) / 243), and 270 / 2^16 divides these numbers by 243.
    rest_BP = (value_BP * 13).add_(242).mul_(270).bitwise_right_shift_(16)
    return rest_BP.add_(value_BP).to(torch.uint8).view(*leading, width)


@cache
def _powers_of_3() -> Tensor:
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)[:, None, None]


def _parts(blocks: int) -> list[slice]:
    size = BYTES_AT_ONCE // PLANE
    return [slice(first, first + size) for first in range(0, blocks, size)]
