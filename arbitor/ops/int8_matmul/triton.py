"""Triton kernel of `int8_matmul`: int8 tensor cores with both scales in the epilogue.

A program computes a tile of tokens times rows. Both operands lie along I, as 8-bit tensor cores want them.
Shape letters: N tokens, I in, O out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES_AT_ONCE = 8  # tiles of tokens that share the weights in the second-level cache


@triton.jit(do_not_specialize=["tokens"])
def _matmul_kernel(
    codes, weight, scale, row_scale, y, tokens, rows, columns,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_o = tl.cdiv(rows, ROWS)
    first_n = tile // (TILES * tiles_o) * TILES
    height = tl.minimum(tl.cdiv(tokens, TOKENS) - first_n, TILES)
    within = tile % (TILES * tiles_o)
    token = (first_n + within % height) * TOKENS + tl.arange(0, TOKENS)
    row = within // height * ROWS + tl.arange(0, ROWS)
    # Beyond the end, tiles read what other tiles read, and do not write.
    column = tl.arange(0, COLUMNS)
    codes_at = codes + (token % tokens).to(tl.int64)[:, None] * columns + column[None, :]
    weight_at = weight + (row % rows).to(tl.int64)[None, :] * columns + column[:, None]
    total = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
    for first in range(0, columns, COLUMNS):
        if EVEN:
            a = tl.load(codes_at)
            b = tl.load(weight_at)
        else:
            a = tl.load(codes_at, mask=column[None, :] < columns - first, other=0)
            b = tl.load(weight_at, mask=column[:, None] < columns - first, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        codes_at += COLUMNS
        weight_at += COLUMNS
    by_token = tl.load(scale + token, mask=token < tokens, other=0.0)
    by_row = tl.load(row_scale + row, mask=row < rows, other=0.0)
    result = total.to(tl.float32) * by_row[None, :] * by_token[:, None]
    used = (token < tokens)[:, None] & (row < rows)[None, :]
    y_at = y + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=used)


def int8_matmul(
    codes: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """As `reference.int8_matmul`, equal to the last bit where I is at most MAX_IN_FEATURES."""
    (tokens, columns), rows = codes.shape, weight.shape[0]
    y = torch.empty((tokens, rows), dtype=out_dtype, device=codes.device)
    if not columns:
        return y.zero_()
    if y.numel():
        block_n, block_o, block_i, warps, stages = _tile(tokens, rows)
        grid = (triton.cdiv(tokens, block_n) * triton.cdiv(rows, block_o),)
        _matmul_kernel[grid](
            codes.contiguous(), weight.contiguous(), scale, row_scale, y, tokens, rows, columns,
            TOKENS=block_n, ROWS=block_o, COLUMNS=block_i, EVEN=columns % block_i == 0, TILES=TILES_AT_ONCE,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y


def _tile(tokens: int, rows: int) -> tuple[int, int, int, int, int]:
    """Tokens, rows and columns of a tile; warps; stages."""
    if tokens <= 64:
        return 16, 64, 128, 4, 4
    if tokens <= 1024 or rows <= 128:
        return 64, 128, 128, 4, 4
    return 128, 256, 128, 8, 3
