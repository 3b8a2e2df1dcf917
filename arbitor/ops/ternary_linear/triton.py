"""Triton forward of the linear on packed trits.

Where a row has one exponent, few tokens are multiplied by trits that are decoded on the way; for many, trits
are decoded once, into int8. So they are where groups of a multiple of 32 have exponents of their own, with
the exponents' differences multiplied in. For other groups, and on GPUs before Ampere, they become floats.

Shape letters: N tokens, I in, O out, P packed bytes a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.activations.triton import add_and_quantize, quantize
from arbitor.ops.int8_matmul import MAX_IN_FEATURES, has_int8_kernels, int8_matmul
from arbitor.ops.thresholds import threshold
from arbitor.ops.trit_codec import triton as trit_codec
from arbitor.ops.trit_codec.triton import digits, leading, marked
from arbitor.ops.triton import exp2_int, has_ptx

PAIRED_TOKENS = 4  # up to so many tokens, each takes two of the eight columns that a product has at least


class Tile(NamedTuple):
    """Sizes of a program for few tokens: its part of the result, and packed bytes of a row at a time."""

    tokens: int
    rows: int
    bytes: int
    warps: int
    stages: int


WIDE_TILE = (128, 128, 64, 8, 3)  # tokens, rows and columns of a tile of floats; its warps; stages

# For every number of tokens, the first one is in use, and others may be timed.
TILES = (
    Tile(8, 64, 128, 4, 4),
    Tile(8, 64, 64, 4, 6),
    Tile(8, 128, 128, 8, 4),
    Tile(16, 128, 128, 8, 3),
    Tile(16, 64, 64, 4, 5),
    Tile(32, 128, 128, 8, 3),
    Tile(32, 128, 64, 8, 4),
)


@triton.jit
def _codes(at, column, left, used, EVEN: tl.constexpr):
    """Codes [BYTES, TOKENS] of one plane, 0 behind the last column; those of all rows are the same."""
    if EVEN:
        return tl.load(at, mask=used, other=0, cache_modifier=".ca")
    return tl.load(at, mask=used & (column < left), other=0, cache_modifier=".ca")


@triton.jit(do_not_specialize=["tokens"])
def _few_tokens_kernel(
    codes, packed, exponents, scale, sums, y, tokens, rows, columns, width,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, EVEN: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TOKENS // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, TOKENS)[None, :]
    byte = tl.arange(0, BYTES)
    # Beyond the end, tiles read what other tiles read, and do not write.
    packed_at = packed + (row % rows).to(tl.int64)[:, None] * width + byte[None, :]
    column = (byte // 32 * 160 + byte % 32)[:, None]
    everywhere, first_half = place < TOKENS, place < TOKENS
    if PAIRS:
        # Digit k is V_k - 3 V_(k-1). Of a token's two columns, one has the codes of plane k beside V_k, the
        # other those of the next plane, and the difference is taken of the sums, not of every digit.
        column = column + place // HALF * 32
        token = place % HALF
        first_half = place < HALF
    else:
        token = tl.program_id(1) * TOKENS + place
    codes_at = codes + (token % tokens).to(tl.int64) * columns + column
    even = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
    odd = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
    illegal = tl.zeros((ROWS, 8), dtype=tl.int32)
    plus = tl.full((BYTES, 8), 1, dtype=tl.int8)
    minus = tl.full((BYTES, 8), -1, dtype=tl.int8)
    for first in range(0, width, BYTES):
        if EVEN:
            code = tl.load(packed_at + first)
        else:
            code = tl.load(packed_at + first, mask=byte[None, :] < width - first, other=0)
        left = columns - 5 * first
        c0 = _codes(codes_at, column, left, everywhere, EVEN)
        c1 = _codes(codes_at + 32, column, left - 32, everywhere, EVEN)
        c2 = _codes(codes_at + 64, column, left - 64, everywhere, EVEN)
        c3 = _codes(codes_at + 96, column, left - 96, first_half, EVEN)
        c4 = _codes(codes_at + 128, column, left - 128, first_half, EVEN)
        even = tl.dot(leading(code, 1, PTX), c0, even, out_dtype=tl.int32)
        if PAIRS:
            odd = tl.dot(leading(code, 2, PTX), c1, odd, out_dtype=tl.int32)
            even = tl.dot(leading(code, 3, PTX), c2, even, out_dtype=tl.int32)
            odd = tl.dot(leading(code, 4, PTX), c3, odd, out_dtype=tl.int32)
        else:
            odd = tl.dot(digits(code, 1, PTX), c1, odd, out_dtype=tl.int32)
            even = tl.dot(digits(code, 2, PTX), c2, even, out_dtype=tl.int32)
            odd = tl.dot(digits(code, 3, PTX), c3, odd, out_dtype=tl.int32)
        even = tl.dot(digits(code, 4, PTX), c4, even, out_dtype=tl.int32)
        # Nothing remains of these but what `marked` adds for bytes that packing never produces.
        illegal = tl.dot(marked(code, PTX), plus, illegal, out_dtype=tl.int32)
        illegal = tl.dot(leading(code, 5, PTX), minus, illegal, out_dtype=tl.int32)
        codes_at += 5 * BYTES
    total = even + odd
    if PAIRS:
        total = tl.sum(tl.reshape(total * (1 - place // HALF * 4), (ROWS, 2, HALF)), axis=1)
        token = tl.arange(0, HALF)[None, :]
    used = (row < rows)[:, None] & (token < tokens)
    total -= tl.load(sums + token % tokens)  # digits are trits plus 1
    by_row = exp2_int(tl.load(exponents + row % rows).to(tl.int32))
    by_row = tl.where(tl.max(tl.abs(illegal), axis=1) == 0, by_row, float("nan"))
    result = total.to(tl.float32) * by_row[:, None] * tl.load(scale + token % tokens)
    at = y + token.to(tl.int64) * rows + row[:, None]
    tl.store(at, result.to(y.dtype.element_ty), mask=used)


def few_tokens(
    codes: Tensor,
    packed: Tensor,
    exponent: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype,
    sums: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Product of codes int8 [N, I] and the trits, equal to `int8_matmul` of the decoded ones.

    `sums`, int32 [N, 1] of the codes, are computed where they are not given.
    """
    tokens, columns = codes.shape
    rows, width = packed.shape
    y = torch.empty((tokens, rows), dtype=out_dtype, device=codes.device)
    if not columns:
        return y.zero_()
    if y.numel():
        tile = tile or _tile(tokens)
        pairs = tile.tokens == 2 * PAIRED_TOKENS and tokens <= PAIRED_TOKENS
        if sums is None:
            sums = codes.sum(dim=1, dtype=torch.int32)
        _few_tokens_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.tokens))](
            codes.contiguous(), packed.contiguous(), exponent.contiguous(), scale, sums, y,
            tokens, rows, columns, width, TOKENS=tile.tokens, PAIRS=pairs, ROWS=tile.rows, BYTES=tile.bytes,
            EVEN=columns % (5 * tile.bytes) == 0, PTX=has_ptx(), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def _tile(tokens: int) -> Tile:
    """The tile for some tokens."""
    width = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
    return next(tile for tile in TILES if tile.tokens == width)


@triton.jit(do_not_specialize=["tokens"])
def _wide_kernel(
    codes, weight, wide, scale, y, tokens, rows, columns,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if tl.load(wide) == 0:
        return
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    codes_at = codes + (token % tokens).to(tl.int64)[:, None] * columns + column[None, :]
    weight_at = weight + (row % rows).to(tl.int64)[None, :] * columns + column[:, None]
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        code = tl.load(codes_at + first, mask=column[None, :] < columns - first, other=0)
        part = tl.load(weight_at + first, mask=column[:, None] < columns - first, other=0.0)
        total = tl.dot(code.to(part.dtype), part, total)
    result = total * tl.load(scale + token, mask=token < tokens, other=0.0)[:, None]
    at = y + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(at, result.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (row < rows)[None, :])


def grouped(
    codes: Tensor, scale: Tensor, packed: Tensor, exponent: Tensor, group: int, out_dtype: torch.dtype
) -> Tensor:
    """`product` for groups of a multiple of 32: as integers times the lowest scale of each row.

    Exponents that lie too far apart for that are found out on the device, and the product is then taken once
    more with floats; two kernels are launched for it that otherwise end at once.
    """
    columns = codes.shape[-1]
    trits, row_scale, wide = trit_codec.decode_integers(packed, exponent, columns, group)
    y = int8_matmul(codes, trits, scale, row_scale, out_dtype)
    if y.numel() and columns:
        weight = trit_codec.decode(
            packed, exponent, columns, group, activations.weight_dtype(scale, True), wanted=wide
        )
        (tokens, rows), (block_n, block_o, block_i, warps, stages) = y.shape, WIDE_TILE
        _wide_kernel[(triton.cdiv(tokens, block_n), triton.cdiv(rows, block_o))](
            codes.contiguous(), weight, wide, scale, y, tokens, rows, columns,
            TOKENS=block_n, ROWS=block_o, COLUMNS=block_i, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y


def product(
    codes: Tensor,
    scale: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    out_dtype: torch.dtype,
    sums: Tensor | None = None,
) -> Tensor:
    """Output [N, O] of a linear from its quantised input: codes int8 [N, I] and their scale fp32 [N, 1].

    `sums`, int32 [N, 1], are those of the codes, where they are known.
    """
    columns = codes.shape[-1]
    if columns <= MAX_IN_FEATURES and has_int8_kernels(codes.device):
        if exponent.shape[-1] == 1:
            if len(codes) <= threshold("few_tokens", codes.device):
                return few_tokens(codes, packed, exponent, scale, out_dtype, sums)
            trits, row_scale = trit_codec.decode_rows(packed, exponent, columns)
            return int8_matmul(codes, trits, scale, row_scale, out_dtype)
        if group % trit_codec.PLANE == 0:
            return grouped(codes, scale, packed, exponent, group, out_dtype)
    weight = trit_codec.decode(packed, exponent, columns, group, activations.weight_dtype(scale, True))
    return activations.scale_tokens(activations.exact_matmul(codes, weight, True), scale, out_dtype)


def quantized(
    x: Tensor, input_norm: bool, squared: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Codes, scale and rstd as `activations.triton.quantize`, and the sums of codes that few tokens need."""
    sums = _room_for_sums(x)
    return *quantize(x, input_norm, squared, sums=sums), sums


def sum_quantized(x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x + added, or x, and what `quantized` gives for it with its norm."""
    if added is None:
        return x, *quantized(x, True)
    sums = _room_for_sums(x)
    return *add_and_quantize(x, added, sums=sums), sums


def _room_for_sums(x: Tensor) -> Tensor | None:
    """int32 [N, 1] for a few tokens; None for more."""
    if len(x) > threshold("few_tokens", x.device):
        return None
    return torch.empty((len(x), 1), dtype=torch.int32, device=x.device)


def forward(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    out_dtype: torch.dtype,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.forward` of x [N, I], fp32 or narrower, quantised."""
    codes, scale, rstd, sums = quantized(x, input_norm, squared)
    with torch.autocast(x.device.type, enabled=False):
        return product(codes, scale, packed, exponent, group, out_dtype, sums), codes, scale, rstd
