"""Base-3 packing of trits, five to a byte, in plane layout.

A row is padded with zeros to blocks of 160 trits = 32 bytes. Digit n of byte j in a block is element
32*n + j, so each of the five digit planes is 32 contiguous trits. With digits d_n = trit + 1 and
v = sum d_n * 3^(4-n), the byte is q = ceil(256 * v / 243): a fixed-point fraction whose digits come out by
multiplying with 3 and keeping the overflow. 243 of the 256 byte values occur.

Shape letters: O out, I in, B blocks of 160 trits, P = 32*B packed bytes a row, G groups. `...` leading
dimensions (experts).
"""

from functools import cache

import torch
from torch import Tensor

from arbitor.ops.exponent import exp2_int

TRITS_PER_BYTE = 5
PLANE = 32
BLOCK = TRITS_PER_BYTE * PLANE
BYTES_AT_ONCE = 1 << 20  # packed bytes that are looked up at once
ILLEGAL = -128  # what `unpack` gives for a byte that packing never produces


def packed_width(in_features: int) -> int:
    """Bytes that a row of `in_features` trits takes."""
    return PLANE * -(-in_features // BLOCK)


@cache
def _trit_table(device: torch.device) -> Tensor:
    """int8 [256, 5]: the trits of every byte value; ILLEGAL where packing never produces the value."""
    table = torch.full((256, TRITS_PER_BYTE), ILLEGAL, dtype=torch.int8)
    for v in range(3**TRITS_PER_BYTE):
        q = -(-256 * v // 243)
        for n in range(TRITS_PER_BYTE):
            table[q, n] = (((q * 3**n) & 255) * 3 >> 8) - 1
    return table.to(device)


@cache
def _float_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 5] in a float dtype; NaN for illegal bytes, so that one can never pass for a weight."""
    table = _trit_table(torch.device("cpu")).to(torch.float32)
    return table.masked_fill(table == ILLEGAL, torch.nan).to(device=device, dtype=dtype)


def legal_bytes(device: torch.device) -> Tensor:
    """bool [256]: True for the 243 byte values that packing produces."""
    return _trit_table(device)[:, 0] != ILLEGAL


def pack(trits: Tensor) -> Tensor:
    """Pack trits.

    Args:
        trits: int8 [..., I], values -1, 0, +1.

    Returns:
        uint8 [..., P].
    """
    *leading, in_features = trits.shape
    width = packed_width(in_features)
    blocks = width // PLANE
    digits = torch.nn.functional.pad(trits, (0, blocks * BLOCK - in_features)).to(torch.int16) + 1
    digits_B5P = digits.view(*leading, blocks, TRITS_PER_BYTE, PLANE)
    v = digits_B5P[..., 0, :]
    for n in range(1, TRITS_PER_BYTE):
        v = v * 3 + digits_B5P[..., n, :]
    # ceil(256 v / 243) in int16: 256 v / 243 = v + 13 v / 243, and 13 * 242 + 242 < 2^15.
    q = v + (13 * v + 242) // 243
    return q.to(torch.uint8).reshape(*leading, width)


def _look_up(packed: Tensor, table: Tensor, in_features: int) -> Tensor:
    """table[byte] of every packed byte, its five entries in their places: uint8 [..., P] -> [..., I].

    Some rows at a time, so that beside the result only little is alive.
    """
    *leading, width = packed.shape
    blocks = width // PLANE
    rows = packed.reshape(-1, width)
    result = torch.empty((len(rows), blocks * BLOCK), dtype=table.dtype, device=packed.device)
    step = max(1, BYTES_AT_ONCE // max(1, width))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        digits = table.index_select(0, part.reshape(-1).to(torch.int32))
        planes = digits.view(len(part), blocks, PLANE, TRITS_PER_BYTE).transpose(-1, -2)
        result[first : first + step].view(planes.shape).copy_(planes)
    return result.view(*leading, blocks * BLOCK)[..., :in_features].contiguous()


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Trits of packed bytes; ILLEGAL for the five trits of an illegal byte.

    Args:
        packed: uint8 [..., P].
        in_features: I, with P = packed_width(I).

    Returns:
        int8 [..., I].
    """
    return _look_up(packed, _trit_table(packed.device), in_features)


def decode(packed: Tensor, exponent: Tensor, in_features: int, group: int, dtype: torch.dtype) -> Tensor:
    """Weights W = T * 2^E, exact in every float dtype whose range holds them.

    Args:
        packed: uint8 [..., O, P].
        exponent: int8 [..., O, G], G = ceil(I / group).
        in_features: I.
        group: neighbouring elements along I that share an exponent.
        dtype: of the result: fp64, fp32, bf16, or int8 for the trits without their scale.

    Returns:
        [..., O, I]; NaN (int8: ILLEGAL) where a byte is illegal.
    """
    if dtype == torch.int8:
        return unpack(packed, in_features)
    weight = _look_up(packed, _float_table(packed.device, dtype), in_features)
    scale = exp2_int(exponent).to(dtype)
    if exponent.shape[-1] == 1:
        return weight.mul_(scale)
    scale = scale.repeat_interleave(group, dim=-1)[..., :in_features]
    return weight.mul_(scale)
