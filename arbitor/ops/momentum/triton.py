"""Triton kernel of `momentum_fold`: decode, fold, round and repack in one pass.

A program takes some groups of neighbours, as even and odd elements, which are the low and high halves of a
byte of 4-bit codes.

Shape letters: n matrices, O out, I in, C code bytes a row, H groups a row.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.momentum import reference
from arbitor.ops.triton import dense_rows, exp2_int, random_word, round_even, shift_right

GROUPS = 16


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
def _rounded(value, scale, word, largest_fixed, largest: tl.constexpr):
    """Stochastic rounding of value * scale (codes in 2^-16) to codes."""
    fixed = tl.minimum(tl.maximum(value * scale, -largest_fixed), largest_fixed)
    code = (round_even(fixed).to(tl.int32) + shift_right(word, 16)) >> 16
    return tl.minimum(tl.maximum(code, -largest), largest)


@triton.jit(do_not_specialize=["rows", "active_matrix_stride"])
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
    rows,
    columns,
    groups,
    width,
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
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = group < rows * groups
    row = group // groups
    first = (group % groups) * GROUP
    pair = tl.arange(0, GROUP // 2)
    even = first[:, None] + 2 * pair[None, :]
    odd = even + 1
    even_used = inside[:, None] & (even < columns)
    odd_used = inside[:, None] & (odd < columns)
    even_element = row[:, None] * columns + even
    odd_element = even_element + 1
    flag = active + matrix * active_matrix_stride + row * active_row_stride
    moves = tl.load(flag, mask=inside, other=0) != 0

    here = gradient + matrix * gradient_stride
    even_g = tl.load(here + even_element, mask=even_used, other=0.0)
    odd_g = tl.load(here + odd_element, mask=odd_used, other=0.0)
    exponent_at = exponents + matrix * exponents_stride + group
    old = tl.load(exponent_at, mask=inside, other=0)
    scale = _scale(decode_table, old.to(tl.int32), 1)[:, None]
    code_row = codes + matrix * codes_stride + row[:, None] * width
    if BITS == 8:
        even_old = tl.load(code_row + even, mask=even_used, other=0).to(tl.int32)
        odd_old = tl.load(code_row + odd, mask=odd_used, other=0).to(tl.int32)
    else:
        packed = tl.load(code_row + even // 2, mask=even_used, other=0x88).to(tl.int32)
        even_old = (packed & 15) - 8
        odd_old = (packed >> 4) - 8
    even_m = (even_old.to(tl.float32) * scale) * beta + even_g * one_minus_beta
    odd_m = (odd_old.to(tl.float32) * scale) * beta + odd_g * one_minus_beta
    even_m = tl.where(even_used, even_m, 0.0)
    odd_m = tl.where(odd_used, odd_m, 0.0)

    largest = tl.maximum(tl.max(tl.abs(even_m), axis=1), tl.max(tl.abs(odd_m), axis=1))
    exponent = _group_exponent(largest, thresholds)
    inverse = _scale(encode_table, exponent, -1)[:, None]
    key_a, key_b = tl.load(keys + 2 * matrix), tl.load(keys + 2 * matrix + 1)
    even_new = _rounded(even_m, inverse, random_word(even_element, key_a, key_b), largest_fixed, LARGEST)
    odd_new = _rounded(odd_m, inverse, random_word(odd_element, key_a, key_b), largest_fixed, LARGEST)
    change = moves[:, None]
    if BITS == 8:
        tl.store(code_row + even, even_new.to(tl.int8), mask=even_used & change)
        tl.store(code_row + odd, odd_new.to(tl.int8), mask=odd_used & change)
    else:
        odd_new = tl.where(odd_used, odd_new, 0)
        byte = (even_new + 8) | ((odd_new + 8) << 4)
        tl.store(code_row + even // 2, byte.to(tl.uint8), mask=even_used & change)
    tl.store(exponent_at, exponent.to(tl.int16), mask=inside & moves)
    there = direction + matrix * direction_stride
    tl.store(there + even_element, even_m * lookahead + even_g * one_minus_lookahead, mask=even_used)
    tl.store(there + odd_element, odd_m * lookahead + odd_g * one_minus_lookahead, mask=odd_used)


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
) -> Tensor:
    """As `reference.fold` of bits drawn from `keys`, on [n, O, I]."""
    assert codes.stride(-2) == codes.shape[-1]
    assert exponent.stride(-2) == exponent.shape[-1]
    gradient = dense_rows(gradient)
    matrices, rows, columns = gradient.shape
    groups = exponent.shape[-1]
    direction = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
    if gradient.numel() == 0:
        return direction
    active = active.expand(matrices, active.shape[-2] if active.shape[-2] == 1 else rows, 1)
    grid = (triton.cdiv(rows * groups, GROUPS), matrices)
    largest = reference.code_max(bits)
    _fold_kernel[grid](
        gradient,
        codes,
        exponent,
        keys,
        active.view(torch.uint8),
        direction,
        *_tables(gradient.device, bits),
        rows,
        columns,
        groups,
        codes.shape[-1],
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
        GROUPS=GROUPS,
        GROUP=reference.group_of(columns, groups),
        enable_fp_fusion=False,
    )
    return direction
