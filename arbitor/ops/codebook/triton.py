"""Triton kernel of `codebook_nearest`: distances are compared where they are computed, and none is written.

A program takes some queries through all rows. Shape letters: M queries, R rows, C width, P packed bytes a
row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.codebook.reference import FRACTION_BITS
from arbitor.ops.triton import exp2_int, is_legal

QUERIES = 64
ROWS = 64


@triton.jit
def _numbers(x, query, queries, columns, first):
    """fp64 [QUERIES, 32], 0 beyond the end."""
    column = first + tl.arange(0, 32)
    used = (query < queries)[:, None] & (column < columns)[None, :]
    return tl.load(x + query[:, None] * columns + column[None, :], mask=used, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["queries"])
def _nearest_kernel(
    x, packed, exponents, found, queries, rows, columns, width, grid,
    QUERIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    largest = tl.zeros((QUERIES,), dtype=tl.float64)
    for first in range(0, columns, 32):
        largest = tl.maximum(largest, tl.max(tl.abs(_numbers(x, query, queries, columns, first)), axis=1))
    large = (largest * grid)[:, None]
    best = tl.full((QUERIES,), float("inf"), dtype=tl.float64)
    best_row = tl.zeros((QUERIES,), dtype=tl.int32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        product = tl.zeros((QUERIES, ROWS), dtype=tl.float64)
        count = tl.zeros((ROWS,), dtype=tl.int32)
        illegal = tl.zeros((ROWS,), dtype=tl.int32)
        for first in range(0, columns, 32):
            # 32 neighbouring columns are one digit of 32 neighbouring bytes.
            plane = (first // 32) % 5
            power = tl.where(plane == 0, 1, tl.where(plane == 1, 3, tl.where(plane == 2, 9, 27)))
            power = tl.where(plane == 4, 81, power)
            lane = tl.arange(0, 32)
            at = packed + row.to(tl.int64)[:, None] * width + first // 160 * 32 + lane[None, :]
            code = tl.load(at, mask=(row < rows)[:, None], other=0).to(tl.int32)
            illegal |= tl.max(tl.where(is_legal(code), 0, 1), axis=1)
            trit = ((((code * power) & 255) * 3) >> 8) - 1
            trit = tl.where((first + lane < columns)[None, :], trit, 0)
            count += tl.sum(trit * trit, axis=1)
            number = (_numbers(x, query, queries, columns, first) + large) - large
            product = tl.dot(number, tl.trans(trit.to(tl.float64)), product, out_dtype=tl.float64)
        exponent = tl.load(exponents + row, mask=row < rows, other=0).to(tl.int32)
        unit = exp2_int(exponent).to(tl.float64)
        square = count.to(tl.float64) * (unit * unit)
        distance = square[None, :] - 2 * (product * unit[None, :])
        usable = (row < rows) & (illegal == 0)
        distance = tl.where(usable[None, :] & (distance < float("inf")), distance, float("inf"))  # not NaN
        nearest, index = tl.min(distance, axis=1, return_indices=True)  # the first of equal ones
        nearer = nearest < best
        best = tl.where(nearer, nearest, best)
        best_row = tl.where(nearer, start + index, best_row)
    tl.store(found + query, best_row.to(tl.int64), mask=query < queries)


def nearest(x: Tensor, packed: Tensor, exponent: Tensor) -> Tensor:
    """As `reference.nearest` of legal bytes; a row with another byte is nobody's nearest."""
    queries, columns = x.shape
    rows, width = packed.shape
    found = torch.empty(queries, dtype=torch.int64, device=x.device)
    if queries:
        _nearest_kernel[(triton.cdiv(queries, QUERIES),)](
            x.contiguous(), packed.contiguous(), exponent.contiguous(), found, queries, rows, columns, width,
            2.0 ** (52 - FRACTION_BITS), QUERIES=QUERIES, ROWS=ROWS, enable_fp_fusion=False,
        )  # fmt: skip
    return found
