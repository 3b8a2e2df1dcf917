"""Triton kernel of `factored_update`: the direction of some weights, their votes, flips and repacking.

A program takes a patch of rows and packed bytes of an expert that has rows, which it finds in the offsets.
Shape letters: R rows of the factors, O out, I in, E experts, P packed bytes a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.expert_linear.triton import _tile_of
from arbitor.ops.triton import digit, random_word, round_even

ROWS = 16
BYTES = 64  # two blocks of 160 trits
ANY = tl.constexpr(1 << 30)  # more rows than an expert can have: one tile takes all


@triton.jit
def _columns(first, plane: tl.constexpr, BLOCKS: tl.constexpr):
    """Columns int32 [1, BLOCKS, 32] of trit `plane` of the packed bytes from number `first` on."""
    block = tl.arange(0, BLOCKS)[None, :, None] * 160
    return first // 32 * 160 + block + 32 * plane + tl.arange(0, 32)[None, None, :]


@triton.jit
def _add_product(total, left, right_at, first, columns, plane: tl.constexpr, BLOCKS: tl.constexpr):
    column = _columns(first, plane, BLOCKS)
    return total + left * tl.load(right_at + column, mask=column < columns, other=0.0)


@triton.jit
def _vote(
    direction, code, value, count, accumulator, row, first, rows, columns, base, factor, key_a, key_b,
    span, threshold, lowest, rail, plane: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The digits so far with those of `plane` after their votes, and the flips so far."""
    column = _columns(first, plane, BLOCKS)
    used = (row < rows) & (column < columns)
    element = row * columns + column
    # `stochastic_floor` of ops/state_update; `factor` is times 2^16 already.
    fixed = tl.minimum(tl.maximum(direction * factor, -1073741824.0), 1073741824.0)
    word = random_word(element + base, key_a, key_b)
    votes = (round_even(fixed).to(tl.int32) + (word & 0xFFFF)) >> 16
    votes = tl.where(used, votes, 0)
    trit = digit(code, plane) - 1
    at = accumulator + element.to(tl.int64)
    total = votes + tl.load(at, mask=used, other=0).to(tl.int32)
    flip = tl.where((total >= threshold) & (trit < 1), 1, 0)
    flip -= tl.where((total <= -lowest) & (trit > -1), 1, 0)
    flip = tl.where(votes != 0, flip, 0)
    trit += flip
    total -= flip * span
    excess = tl.maximum(total * trit - rail, 0) * trit
    total -= tl.where(votes != 0, excess, 0)
    total = tl.minimum(tl.maximum(total, -127), 127)
    tl.store(at, total.to(tl.int8), mask=used)
    return value * 3 + tl.where(used, trit + 1, 1), count + tl.abs(flip)


@triton.jit(do_not_specialize=["tokens"])
def _factored_update_kernel(
    packed, accumulator, left, right, offsets, keys, ok, flips, step, experts, tokens, rows, columns, width,
    span, threshold, lowest, rail, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    if tl.load(ok) == 0:
        return
    expert, begin, end = _tile_of(offsets, tl.program_id(1), experts, tokens, ANY, EXPERTS)
    if (begin >= end) | (expert == experts):
        return
    tiles = tl.cdiv(width, 32 * BLOCKS)
    first = tl.program_id(0) % tiles * (32 * BLOCKS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)[:, None, None]
    inside = row < rows
    d0 = tl.zeros((ROWS, BLOCKS, 32), dtype=tl.float32)
    d1 = tl.zeros((ROWS, BLOCKS, 32), dtype=tl.float32)
    d2 = tl.zeros((ROWS, BLOCKS, 32), dtype=tl.float32)
    d3 = tl.zeros((ROWS, BLOCKS, 32), dtype=tl.float32)
    d4 = tl.zeros((ROWS, BLOCKS, 32), dtype=tl.float32)
    left_at = left + begin.to(tl.int64) * rows + row
    right_at = right + begin.to(tl.int64) * columns
    for _ in range(begin, end):
        factor = tl.load(left_at, mask=inside, other=0.0)
        d0 = _add_product(d0, factor, right_at, first, columns, 0, BLOCKS)
        d1 = _add_product(d1, factor, right_at, first, columns, 1, BLOCKS)
        d2 = _add_product(d2, factor, right_at, first, columns, 2, BLOCKS)
        d3 = _add_product(d3, factor, right_at, first, columns, 3, BLOCKS)
        d4 = _add_product(d4, factor, right_at, first, columns, 4, BLOCKS)
        left_at += rows
        right_at += columns
    byte = first + tl.arange(0, BLOCKS)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    whole = inside & (byte < width)
    here = packed + (expert.to(tl.int64) * rows + row) * width + byte
    code = tl.load(here, mask=whole, other=0).to(tl.int32)
    state = accumulator + expert.to(tl.int64) * rows * columns
    base = (expert.to(tl.int64) * rows * columns).to(tl.int32)
    factor = tl.load(step) * -65536.0
    key_a, key_b = tl.load(keys), tl.load(keys + 1)
    value = tl.zeros((ROWS, BLOCKS, 32), dtype=tl.int32)
    count = tl.zeros((ROWS, BLOCKS, 32), dtype=tl.int32)
    value, count = _vote(
        d0, code, value, count, state, row, first, rows, columns, base, factor, key_a, key_b,
        span, threshold, lowest, rail, 0, BLOCKS,
    )  # fmt: skip
    value, count = _vote(
        d1, code, value, count, state, row, first, rows, columns, base, factor, key_a, key_b,
        span, threshold, lowest, rail, 1, BLOCKS,
    )  # fmt: skip
    value, count = _vote(
        d2, code, value, count, state, row, first, rows, columns, base, factor, key_a, key_b,
        span, threshold, lowest, rail, 2, BLOCKS,
    )  # fmt: skip
    value, count = _vote(
        d3, code, value, count, state, row, first, rows, columns, base, factor, key_a, key_b,
        span, threshold, lowest, rail, 3, BLOCKS,
    )  # fmt: skip
    value, count = _vote(
        d4, code, value, count, state, row, first, rows, columns, base, factor, key_a, key_b,
        span, threshold, lowest, rail, 4, BLOCKS,
    )  # fmt: skip
    repacked = value + (13 * value + 242) // 243
    tl.store(here, repacked.to(tl.uint8), mask=whole)
    by_row = tl.sum(tl.reshape(count, (ROWS, 32 * BLOCKS)), axis=1)
    tl.atomic_add(flips, tl.sum(by_row, axis=0).to(tl.int64))


def update(
    packed: Tensor,
    accumulator: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    keys: Tensor,
    ok: Tensor,
    flips: Tensor,
    step: Tensor,
    span: int,
    threshold: int,
    rail: int,
) -> None:
    """As `reference.update`, with sums in order of the tokens, each product rounded first."""
    assert packed.is_contiguous()
    assert accumulator.is_contiguous()
    experts, rows, columns = accumulator.shape
    tokens, width = len(left), packed.shape[-1]
    if not tokens or not accumulator.numel():
        return
    patches = triton.cdiv(rows, ROWS) * triton.cdiv(width, BYTES)
    _factored_update_kernel[(patches, min(experts + 1, tokens))](
        packed, accumulator, left.contiguous(), right.contiguous(), offsets, keys, ok.view(torch.uint8),
        flips, step, experts, tokens, rows, columns, width, span, threshold,
        threshold if 2 * threshold > span else threshold + 1, rail,
        EXPERTS=triton.next_power_of_2(experts + 1), ROWS=ROWS, BLOCKS=BYTES // 32,
        enable_fp_fusion=False,
    )  # fmt: skip
