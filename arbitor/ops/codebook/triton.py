"""Triton kernels of `codebook_nearest`: distances are compared where they are computed, and none is written.

The reference's numbers on their grid are integers of 43 bits times a power of two. One kernel writes them as
six bytes; the other multiplies these by trits in exact 8-bit products, whose sums it joins to the fp64
product that the reference has, so that what follows rounds alike.

Shape letters: M queries, R rows, C width, P packed bytes a row, W width in whole blocks of 32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.codebook.reference import FRACTION_BITS
from arbitor.ops.triton import exp2_int, is_legal

DIGITS = 6
QUERIES = 64
ROWS = 64


@triton.jit
def _power_of_two(biased):
    """fp64 with this biased exponent, an int64; 0 if there is none so small."""
    return tl.where(biased > 0, biased << 52, 0).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["queries"])
def _digits_kernel(
    x, digits, units, queries, columns, width, grid, DIGITS: tl.constexpr, QUERIES: tl.constexpr
):
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, 32)
    inside = (query < queries)[:, None]
    at = x + query[:, None] * columns + lane[None, :]
    largest = tl.zeros((QUERIES,), dtype=tl.float64)
    bad = tl.zeros((QUERIES,), dtype=tl.int32)
    for first in range(0, columns, 32):
        used = inside & (first + lane < columns)[None, :]
        size = tl.abs(tl.load(at + first, mask=used, other=0.0).to(tl.float64))
        bad |= tl.max(tl.where(size < float("inf"), 0, 1), axis=1)
        largest = tl.maximum(largest, tl.max(tl.where(size < float("inf"), size, 0.0), axis=1))
    large = largest * grid
    bad = (bad != 0) | (large == float("inf"))
    # Half of the last bit of `large`: what the reference's sums may be rounded to. What is too small to have
    # one is too small to change a distance.
    biased = (large.to(tl.int64, bitcast=True) >> 52) - 53
    usable = (biased > 0) & (bad == 0)
    tl.store(units + query, tl.where(bad, float("nan"), _power_of_two(biased)), mask=query < queries)
    inverse = _power_of_two(tl.where(usable, 2046 - biased, 0))[:, None]
    large = tl.where(usable, large, 0.0)[:, None]
    for first in range(0, columns, 32):
        used = inside & (first + lane < columns)[None, :]
        number = tl.load(at + first, mask=used & usable[:, None], other=0.0).to(tl.float64)
        whole = (((number + large) - large) * inverse).to(tl.int64)
        for n in tl.static_range(DIGITS):
            digit = ((whole + 128) & 255) - 128
            whole = (whole - digit) >> 8
            to = digits + (query[:, None] * DIGITS + n) * width + first + lane[None, :]
            tl.store(to, digit.to(tl.int8), mask=inside)


@triton.jit
def _times(digits, trit, product, n: tl.constexpr, width):
    return tl.dot(tl.load(digits + n * width), trit, product, out_dtype=tl.int32)


@triton.jit(do_not_specialize=["queries"])
def _nearest_kernel(
    digits, units, packed, exponents, found, queries, rows, columns, packed_width, width,
    QUERIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, 32)
    inside = query < queries
    query_unit = tl.load(units + query, mask=inside, other=0.0)
    # Beyond the end, tiles read what other tiles read, and do not write.
    digits_at = digits + tl.where(inside, query, 0)[:, None] * (6 * width) + lane[None, :]
    best = tl.full((QUERIES,), float("inf"), dtype=tl.float64)
    best_row = tl.zeros((QUERIES,), dtype=tl.int32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        packed_at = packed + row.to(tl.int64)[None, :] * packed_width + lane[:, None]
        count = tl.zeros((ROWS,), dtype=tl.int32)
        illegal = tl.zeros((ROWS,), dtype=tl.int32)
        p0 = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
        p1 = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
        p2 = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
        p3 = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
        p4 = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
        p5 = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
        for first in range(0, columns, 32):
            # 32 neighbouring columns are one digit of 32 neighbouring bytes.
            plane = (first // 32) % 5
            power = tl.where(plane == 0, 1, tl.where(plane == 1, 3, tl.where(plane == 2, 9, 27)))
            power = tl.where(plane == 4, 81, power)
            code = tl.load(packed_at + first // 160 * 32, mask=(row < rows)[None, :], other=0).to(tl.int32)
            illegal |= tl.max(tl.where(is_legal(code), 0, 1), axis=0)
            trit = ((((code * power) & 255) * 3) >> 8) - 1
            trit = tl.where((first + lane < columns)[:, None], trit, 0)
            count += tl.sum(trit * trit, axis=0)
            trit = trit.to(tl.int8)
            p0 = _times(digits_at + first, trit, p0, 0, width)
            p1 = _times(digits_at + first, trit, p1, 1, width)
            p2 = _times(digits_at + first, trit, p2, 2, width)
            p3 = _times(digits_at + first, trit, p3, 3, width)
            p4 = _times(digits_at + first, trit, p4, 4, width)
            p5 = _times(digits_at + first, trit, p5, 5, width)
        # Pairs of digits stay within 32 bits: sums of up to 1024 are below 2^17.
        whole = (p0 + p1 * 256).to(tl.int64) + (p2 + p3 * 256).to(tl.int64) * 65536
        whole += (p4 + p5 * 256).to(tl.int64) * 4294967296
        unit = exp2_int(tl.load(exponents + row, mask=row < rows, other=0).to(tl.int32)).to(tl.float64)
        square = count.to(tl.float64) * (unit * unit)
        distance = square[None, :] - whole.to(tl.float64) * query_unit[:, None] * (2 * unit)[None, :]
        usable = (row < rows) & (illegal == 0)
        distance = tl.where(usable[None, :] & (distance < float("inf")), distance, float("inf"))  # not NaN
        nearest, index = tl.min(distance, axis=1, return_indices=True)  # the first of equal ones
        nearer = nearest < best
        best = tl.where(nearer, nearest, best)
        best_row = tl.where(nearer, start + index, best_row)
    tl.store(found + query, best_row.to(tl.int64), mask=inside)


def nearest(x: Tensor, packed: Tensor, exponent: Tensor) -> Tensor:
    """As `reference.nearest` of legal bytes; a row with another byte is nobody's nearest."""
    queries, columns = x.shape
    rows, packed_width = packed.shape
    width = triton.cdiv(columns, 32) * 32
    found = torch.empty(queries, dtype=torch.int64, device=x.device)
    digits = torch.empty((queries, DIGITS, width), dtype=torch.int8, device=x.device)
    units = torch.empty(queries, dtype=torch.float64, device=x.device)
    if queries:
        grid = (triton.cdiv(queries, QUERIES),)
        _digits_kernel[grid](
            x.contiguous(), digits, units, queries, columns, width, 2.0 ** (52 - FRACTION_BITS),
            DIGITS=DIGITS, QUERIES=QUERIES, enable_fp_fusion=False,
        )  # fmt: skip
        _nearest_kernel[grid](
            digits, units, packed.contiguous(), exponent.contiguous(), found, queries, rows, columns,
            packed_width, width, QUERIES=QUERIES, ROWS=ROWS, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return found
