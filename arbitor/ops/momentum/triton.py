"""Triton kernel of `momentum_fold`: decode, fold, round and repack in one pass.

A program takes a group of neighbours of some rows; of 4-bit codes, even and odd ones are the low and high
halves of a byte.

Shape letters: n matrices, O out, I in, C code bytes a row, H groups a row, G scale groups.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.momentum import reference
from arbitor.ops.momentum.reference import Weighed
from arbitor.ops.triton import (
    dense_rows,
    exp2_int,
    grid_of_rows,
    has_ptx,
    part_of_rows,
    random_word,
    rounded,
    shift_right,
)

# Rows of a program; the first is in use, others may be timed.
TILES = (64, 32)


@triton.jit
def _scale(table, exponent, sign: tl.constexpr):
    """table[exponent mod 8] * 2^(sign * (exponent div 8)) for int32 exponents."""
    return tl.load(table + (exponent & 7)) * exp2_int(sign * (exponent >> 3))


@triton.jit
def _group_exponent(largest, thresholds):
    """Smallest e with 2^(e / 8) >= largest."""
    bits = largest.to(tl.int32, bitcast=True)
    fraction = bits & 0x7FFFFF
    eighths = tl.zeros_like(bits)
    for i in tl.static_range(8):
        eighths += (fraction > tl.load(thresholds + i)).to(tl.int32)
    exponent = ((bits >> 23) - 127) * 8 + eighths
    return tl.minimum(tl.maximum(exponent, -800), 800)


@triton.jit
def _rounded(value, scale, word, largest_fixed, largest: tl.constexpr, PTX: tl.constexpr):
    """Stochastic rounding of value * scale (codes in 2^-16) to codes."""
    fixed = tl.minimum(tl.maximum(value * scale, -largest_fixed), largest_fixed)
    code = (rounded(fixed, PTX) + shift_right(word, 16)) >> 16
    return tl.minimum(tl.maximum(code, -largest), largest)


@triton.jit(do_not_specialize=["rows", "active_matrix_stride", "number"])
def _fold_kernel(
    gradient,
    codes,
    exponents,
    keys,
    active,
    direction,
    decode_table,
    encode_table,
    thresholds,
    weights,
    largest,
    number,
    rows,
    columns,
    groups,
    width,
    weight_group,
    weight_groups,
    gradient_stride,
    direction_stride,
    codes_stride,
    exponents_stride,
    active_matrix_stride,
    active_row_stride,
    beta,
    one_minus_beta,
    lookahead,
    one_minus_lookahead,
    largest_fixed,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    TURNED: tl.constexpr,
    WEIGHED: tl.constexpr,
    PTX: tl.constexpr,
):
    """Of matrices that are `number` and following of those that keys, active and what is written are for."""
    group, part = part_of_rows(TURNED)
    row = part * ROWS + tl.arange(0, ROWS)
    matrix = tl.program_id(2).to(tl.int64)
    own = matrix + number
    inside = row < rows
    place = tl.arange(0, GROUP)[None, :]
    column = group * GROUP + place
    used = inside[:, None] & (WHOLE | (column < columns))
    element = row[:, None] * columns + column
    flag = active + own * active_matrix_stride + row * active_row_stride
    moves = inside & (tl.load(flag, mask=inside, other=0) != 0)

    g = tl.load(gradient + matrix * gradient_stride + element, mask=used, other=0.0).to(tl.float32)
    exponent_at = exponents + matrix * exponents_stride + (row * groups + group)
    scale = _scale(decode_table, tl.load(exponent_at, mask=inside, other=0).to(tl.int32), 1)[:, None]
    codes += matrix * codes_stride
    if BITS == 8:
        code_at = codes + (row[:, None] * width + column)
        code_used = used
        old = tl.load(code_at, mask=used, other=0).to(tl.int32)
    else:
        pair = group * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        code_at = codes + (row[:, None] * width + pair)
        code_used = inside[:, None] & (WHOLE | (pair < width))
        byte = tl.load(code_at, mask=code_used, other=0x88).to(tl.int32)
        old = tl.reshape(tl.join((byte & 15) - 8, (byte >> 4) - 8), (ROWS, GROUP))
    m = (old.to(tl.float32) * scale) * beta + g * one_minus_beta
    if not WHOLE:
        m = tl.where(used, m, 0.0)

    exponent = _group_exponent(tl.max(tl.abs(m), axis=1), thresholds)
    inverse = _scale(encode_table, exponent, -1)[:, None]
    word = random_word(element, tl.load(keys + 2 * own), tl.load(keys + 2 * own + 1))
    new = _rounded(m, inverse, word, largest_fixed, LARGEST, PTX)
    if BITS == 8:
        tl.store(code_at, new.to(tl.int8), mask=code_used & moves[:, None])
    else:
        if not WHOLE:
            new = tl.where(used, new, 0)
        low, high = tl.split(tl.reshape(new + 8, (ROWS, GROUP // 2, 2)))
        tl.store(code_at, (low | (high << 4)).to(tl.uint8), mask=code_used & moves[:, None])
    tl.store(exponent_at, exponent.to(tl.int16), mask=moves)
    there = direction + own * direction_stride + element
    d = m * lookahead + g * one_minus_lookahead
    if WEIGHED:
        weights += own * rows * weight_groups
        weight_at = weights + row[:, None] * weight_groups + column // weight_group
        d *= tl.load(weight_at, mask=used, other=0.0)
        # As integers, of which the largest does not depend on who comes first; what is no number is larger.
        bits = d.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(largest + own, tl.max(bits), sem="relaxed")
    tl.store(there, d.to(direction.dtype.element_ty), mask=used)


@cache
def _tables(device: torch.device, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of decoding and encoding, fp32 [8], and the thresholds' fractions, int32 [8]."""
    largest = reference.code_max(bits)
    return (
        reference._fractions(device, 1 / largest, 1),
        reference._fractions(device, largest * 65536.0, -1),
        reference._fractions(device, 1.0, 1).view(torch.int32) & 0x7FFFFF,
    )


def fold(
    gradient: Tensor,
    codes: Tensor,
    exponent: Tensor,
    keys: Tensor,
    active: Tensor,
    bits: int,
    beta: float,
    lookahead: float,
    tile: int | None = None,
    *,
    into: Weighed | None = None,
) -> Tensor:
    """As `reference.fold` of bits drawn from `keys`, on [n, O, I] of any dtype.

    With `into`, of some matrices out of n: keys and active are those of all n, and the direction, which is
    returned, is weighed and lies there.
    """
    assert codes.stride(-2) == codes.shape[-1]
    assert exponent.stride(-2) == exponent.shape[-1]
    gradient = dense_rows(gradient)
    matrices, rows, columns = gradient.shape
    groups = exponent.shape[-1]
    if into is None:
        direction = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
    else:
        direction = into.direction
    if gradient.numel() == 0:
        return direction
    active = active.expand(len(direction), active.shape[-2] if active.shape[-2] == 1 else rows, 1)
    tile = tile or TILES[0]
    group = reference.group_of(columns, groups)
    grid, turned = grid_of_rows(groups, triton.cdiv(rows, tile), matrices)
    largest = reference.code_max(bits)
    _fold_kernel[grid](
        gradient,
        codes,
        exponent,
        keys,
        active.view(torch.uint8),
        direction,
        *_tables(gradient.device, bits),
        direction if into is None else into.weights,
        keys if into is None else into.largest,
        0 if into is None else into.number,
        rows,
        columns,
        groups,
        codes.shape[-1],
        1 if into is None else into.group,
        1 if into is None else into.weights.shape[-1],
        gradient.stride(0),
        direction.stride(0),
        codes.stride(0),
        exponent.stride(0),
        active.stride(0),
        0 if active.shape[-2] == 1 else active.stride(1),
        beta,
        1 - beta,
        lookahead,
        1 - lookahead,
        largest * 65536.0,
        BITS=bits,
        LARGEST=largest,
        ROWS=tile,
        GROUP=group,
        WHOLE=columns % group == 0,
        TURNED=turned,
        WEIGHED=into is not None,
        PTX=has_ptx(),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return direction
