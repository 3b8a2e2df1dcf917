"""Triton kernels of `newton_schulz`: products that are symmetric, of which half is computed.

Of the three products of a step, A = X X^T and P = a + b A + c A A are symmetric, and A A is A A^T: one kernel
computes the tiles on and below the diagonal of either and stores both halves. a X + (b A + c A A) X is then
a product of P and X with nothing to add, which is left to torch.

X comes with any norm, which is divided by as a factor of the first P: its square is the trace of the first
A. The norm's own range is not that of its square, so A is multiplied by the square of a power of two.

Shape letters: n matrices, O out, I in, M the smaller of both.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from arbitor.ops.newton_schulz.reference import COEFFICIENTS, STEPS
from arbitor.ops.triton import exp2_int, has_halves, shared_memory

A, B, C = (tl.constexpr(coefficient) for coefficient in COEFFICIENTS)
LEAST = tl.constexpr(1e-15)  # below all traces but 0, and 1 over its square is finite
# Largest magnitudes from 2^-50 to 2^50 have squares that fp32 holds, and so their sums.
OCTAVES = tl.constexpr(50)
PROGRAMS = 64  # for each matrix, that bring numbers into range
NUMBERS = 4096  # that they take at a time


class Tile(NamedTuple):
    """Sizes of a program's tile: rows and columns of a product, and how many of its terms at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# The first of each is in use, others may be timed. Columns are one or two times the rows.
SMALL_TILES = (Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 4, 3))
LARGE_TILES = (
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 64, 8, 3),
)
LARGE = 512  # from this M on
LARGE_BYTES = 200_000  # of shared memory, which the first large tile takes at most


@triton.jit
def _octave(bits):
    """k where 2^k is the power of two at or below a magnitude, given by its bits."""
    return (bits >> 23) - 127


@triton.jit
def _in_range(bits):
    """Whether a matrix with this largest magnitude can be squared; one of zeros can."""
    octave = _octave(bits)
    return ((octave >= -OCTAVES) & (octave <= OCTAVES)) | (bits == 0)


@triton.jit
def _unit(bits):
    """The power of two that brings a matrix to a largest magnitude from 1 to 2, after `_range_kernel`."""
    return tl.where(_in_range(bits) & (bits != 0), exp2_int(-_octave(bits)), 1.0)


@triton.jit(do_not_specialize=["size"])
def _range_kernel(x, largest, size, NUMBERS: tl.constexpr):
    """Multiplies matrices that cannot be squared by a power of two; others stay."""
    matrix = tl.program_id(1)
    bits = tl.load(largest + matrix)
    if not _in_range(bits):
        octave = tl.minimum(tl.maximum(-_octave(bits), -128), 126)
        half = octave // 2
        first, second = exp2_int(half), exp2_int(octave - half)
        x += matrix.to(tl.int64) * size
        for start in range(tl.program_id(0) * NUMBERS, size, tl.num_programs(0) * NUMBERS):
            place = start + tl.arange(0, NUMBERS)
            value = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
            tl.store(x + place, (value * first * second).to(x.dtype.element_ty), mask=place < size)


@triton.jit
def _trace(squares, size):
    total = tl.zeros((256,), dtype=tl.float32)
    for start in range(0, size, 256):
        place = start + tl.arange(0, 256)
        total += tl.load(squares + place, mask=place < size, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["first"])
def _symmetric_kernel(
    left_of, right_of, base, y, squares, largest, size, depth, first,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TALL: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
):  # fmt: skip
    """y = x x^T, of tall x x^T x, or the polynomial of x, which is also `base`; norms are any if `first`."""
    tile, matrix = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(size, COLUMNS)
    first_row = tile // across * ROWS
    first_column = tile % across * COLUMNS
    if first_column < first_row + ROWS:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            if TALL:
                left = left_of.load([matrix, start, first_row]).reshape(DEPTH, ROWS).T
                right = right_of.load([matrix, start, first_column]).reshape(DEPTH, COLUMNS)
            else:
                left = left_of.load([matrix, first_row, start]).reshape(ROWS, DEPTH)
                right = right_of.load([matrix, first_column, start]).reshape(COLUMNS, DEPTH).T
            total = tl.dot(left, right, total)
        row = first_row + tl.arange(0, ROWS)[:, None]
        column = first_column + tl.arange(0, COLUMNS)[None, :]
        # By whole squares of the diagonal, each of which one program stores; others are stored twice, turned.
        own = (row < size) & (column < tl.minimum(first_row + ROWS, size))
        turned = own & (column < first_row)
        place = matrix.to(tl.int64) * size * size
        if POLYNOMIAL:
            one, two, three = A, B, C
            if first != 0:
                trace = _trace(squares + matrix * size, size)
                inverse = 1.0 / tl.where(trace < LEAST, LEAST, trace)
                factor = tl.sqrt(inverse) * _unit(tl.load(largest + matrix))
                one, two, three = A * factor, B * inverse * factor, C * inverse * inverse * factor
            value = tl.load(base + place + row * size + column, mask=own, other=0.0).to(tl.float32)
            total = total * three + value * two + tl.where(row == column, one, 0.0)
        elif first != 0:
            unit = _unit(tl.load(largest + matrix))
            total = total * unit * unit
            diagonal = tl.sum(tl.where(row == column, total, 0.0), axis=1)
            line = first_row + tl.arange(0, ROWS)
            holds = (line >= first_column) & (line < first_column + COLUMNS) & (line < size)
            tl.store(squares + matrix * size + line, diagonal, mask=holds)
        result = total.to(y.dtype.element_ty)
        tl.store(y + place + row * size + column, result, mask=own)
        tl.store(y + place + column.T * size + row.T, result.T, mask=turned.T)


def can_multiply(x: Tensor) -> bool:
    """Whether the GPU can copy tiles of [n, O, I] and of their Gram matrices by itself, as Hopper does."""
    aligned = 16 // x.element_size()
    return x.numel() > 0 and not (x.shape[1] % aligned or x.shape[2] % aligned) and has_halves(x.device)


def newton_schulz(x: Tensor, largest: Tensor, tile: Tile | None = None) -> Tensor:
    """As `arbitor.ops.newton_schulz.newton_schulz`, of x for which `can_multiply` holds."""
    assert x.is_contiguous()
    n, rows, columns = x.shape
    _range_kernel[(PROGRAMS, n)](x, largest, rows * columns, NUMBERS=NUMBERS)
    tall = rows > columns
    size = min(rows, columns)
    tile = tile or _tile(size, x.device)
    squares = torch.empty((n, size), dtype=torch.float32, device=x.device)
    gram, polynomial = (torch.empty((n, size, size), dtype=x.dtype, device=x.device) for _ in range(2))
    other = torch.empty_like(x)
    for step in range(STEPS):
        first = int(step == 0)
        multiply_symmetric(x, gram, squares, largest, first, tall=tall, polynomial=False, tile=tile)
        multiply_symmetric(gram, polynomial, squares, largest, first, tall=False, polynomial=True, tile=tile)
        torch.bmm(*((x, polynomial) if tall else (polynomial, x)), out=other)
        x, other = other, x
    return x


def _tile(size: int, device: torch.device) -> Tile:
    """A large one for large matrices, where a program may take so much memory; the interpreter has enough."""
    room = LARGE_BYTES if device.type != "cuda" else shared_memory(device)
    return (LARGE_TILES if size >= LARGE and room >= LARGE_BYTES else SMALL_TILES)[0]


def multiply_symmetric(
    x: Tensor,
    y: Tensor,
    squares: Tensor,
    largest: Tensor,
    first: int,
    *,
    tall: bool,
    polynomial: bool,
    tile: Tile,
) -> None:
    """Launch the product of [n, M, K], or of tall [n, K, M], or the polynomial of [n, M, M].

    Args:
        x: the factor.
        y: [n, M, M], the result.
        squares: fp32 [n, M], diagonals of the first products: written with these, read for the polynomial.
        largest: int32 [n], see `arbitor.ops.newton_schulz.newton_schulz`.
        first: 1 in the first step.
        tall: whether x is.
        polynomial: of x, which is symmetric.
        tile: of a program.
    """
    n, size, _ = y.shape
    depth = x.shape[1] if tall else x.shape[2]
    blocks = [[1, tile.depth, side] if tall else [1, side, tile.depth] for side in (tile.rows, tile.columns)]
    tiles = triton.cdiv(size, tile.rows) * triton.cdiv(size, tile.columns)
    _symmetric_kernel[(tiles, n)](
        *(TensorDescriptor.from_tensor(x, block) for block in blocks),
        x, y, squares, largest, size, depth, first,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, TALL=tall, POLYNOMIAL=polynomial,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
