"""Triton kernel of `int8_matmul`: int8 tensor cores with both scales in the epilogue.

A program computes a tile of tokens times rows. Both operands lie along I, as 8-bit tensor cores want them.
Shape letters: N tokens, I in, O out.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from arbitor.ops.triton import has_halves, shared_memory


class Tile(NamedTuple):
    """Sizes of a program's tile.

    `persistent`: as many programs as processors, tile after tile. `together`: tiles of tokens that are worked
    on at the same time, with the same weights in the second-level cache.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    persistent: bool = False
    together: int = 8


# The first of each that can be launched is in use, others may be timed.
FEW_TILES = (Tile(16, 64, 128, 4, 4),)
SOME_TILES = (Tile(64, 128, 128, 4, 4), Tile(64, 256, 128, 4, 4), Tile(128, 128, 128, 4, 3))
MANY_TILES = (
    Tile(128, 256, 128, 8, 4, True, 16),
    Tile(128, 128, 128, 4, 3),
    Tile(128, 256, 128, 8, 4),
    Tile(128, 256, 128, 8, 4, True),
    Tile(128, 256, 128, 8, 4, True, 4),
    Tile(128, 256, 128, 8, 4, True, 32),
    Tile(256, 128, 128, 8, 4, True),
    Tile(256, 128, 128, 8, 4, True, 4),
)
PERSISTENT_BYTES = 229_408  # most shared memory that one of these takes for results of two bytes


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


@triton.jit(do_not_specialize=["tokens", "programs"])
def _persistent_kernel(
    codes, weight, scale, row_scale, y, tokens, rows, columns, programs,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_o = tl.cdiv(tokens, TOKENS), tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_o, programs, flatten=True):
        first_n = tile // (TILES * tiles_o) * TILES
        height = tl.minimum(tiles_n - first_n, TILES)
        within = tile % (TILES * tiles_o)
        first_token = (first_n + within % height) * TOKENS
        first_row = within // height * ROWS
        total = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
        for first in range(0, columns, COLUMNS):
            a = codes.load([first_token, first])
            b = weight.load([first_row, first])
            total = tl.dot(a, b.T, total, out_dtype=tl.int32)
        token = first_token + tl.arange(0, TOKENS)
        row = first_row + tl.arange(0, ROWS)
        by_token = tl.load(scale + token, mask=token < tokens, other=0.0)
        by_row = tl.load(row_scale + row, mask=row < rows, other=0.0)
        result = total.to(tl.float32) * by_row[None, :] * by_token[:, None]
        used = (token < tokens)[:, None] & (row < rows)[None, :]
        y_at = y + token.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(y_at, result.to(y.dtype.element_ty), mask=used)


def int8_matmul(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """As `reference.int8_matmul`, equal to the last bit where I is at most MAX_IN_FEATURES."""
    (tokens, columns), rows = codes.shape, weight.shape[0]
    y = torch.empty((tokens, rows), dtype=out_dtype, device=codes.device)
    if not columns:
        return y.zero_()
    if not y.numel():
        return y
    codes, weight = codes.contiguous(), weight.contiguous()
    persists = _can_persist(codes, weight, y)
    tile = tile or _tile(tokens, rows, persists)
    tiles = triton.cdiv(tokens, tile.tokens) * triton.cdiv(rows, tile.rows)
    sizes = {"TOKENS": tile.tokens, "ROWS": tile.rows, "COLUMNS": tile.columns, "TILES": tile.together}
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.persistent and persists:
        programs = min(tiles, _processors(codes.device)[0])
        _persistent_kernel[(programs,)](
            TensorDescriptor.from_tensor(codes, [tile.tokens, tile.columns]),
            TensorDescriptor.from_tensor(weight, [tile.rows, tile.columns]),
            scale, row_scale, y, tokens, rows, columns, programs, **sizes, **launch,
        )  # fmt: skip
    else:
        _matmul_kernel[(tiles,)](
            codes, weight, scale, row_scale, y, tokens, rows, columns, EVEN=columns % tile.columns == 0,
            **sizes, **launch,
        )  # fmt: skip
    return y


def _can_persist(codes: Tensor, weight: Tensor, y: Tensor) -> bool:
    """Whether persistent programs can compute a product.

    The GPU must copy tiles of the matrices by itself, as Hopper and data centres' later ones do where memory
    is aligned to 16 bytes, and have room for the next tile's operands beside results.
    """
    if codes.shape[-1] % 16 or codes.data_ptr() % 16 or weight.data_ptr() % 16:
        return False
    if codes.device.type != "cuda":
        return has_halves(codes.device)
    return y.element_size() == 2 and _processors(codes.device)[1] >= PERSISTENT_BYTES


@cache
def _processors(device: torch.device) -> tuple[int, int]:
    """How many a GPU has, and bytes of shared memory that a program may take; 0 of what cannot copy tiles."""
    if device.type != "cuda":
        return 3, 0  # of the interpreter, so that a program has several tiles
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return count, shared_memory(device) if has_halves(device) else 0


def _tile(tokens: int, rows: int, persists: bool) -> Tile:
    """The tile for some tokens and rows."""
    if tokens <= 64:
        return FEW_TILES[0]
    if tokens <= 1024 or rows <= 128:
        return SOME_TILES[0]
    return next(tile for tile in MANY_TILES if persists or not tile.persistent)
