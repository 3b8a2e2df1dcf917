"""Triton kernel of `factored_update`: the direction of some weights, their votes, flips and repacking.

A program takes a block of 32 packed bytes of some rows of an expert that has rows, which it finds in the
offsets. Shape letters: R rows of the factors, O out, I in, E experts, P packed bytes a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.expert_linear.triton import tile_of
from arbitor.ops.state_update.triton import (
    load_state,
    planes_used,
    rule_options,
    vote_and_store,
)
from arbitor.ops.trit_codec.reference import BLOCK, PLANE

ROWS = 16
ANY = tl.constexpr(1 << 30)  # more rows than an expert can have: one tile takes all


@triton.jit
def _with_product(total, left, right_at, left_columns, byte, WHOLE: tl.constexpr):
    """The sums [ROWS, 32] of one plane with a token's products."""
    right = tl.load(right_at + byte, mask=WHOLE | (byte < left_columns), other=0.0)
    return total + left * right


@triton.jit(do_not_specialize=["tokens"])
def _factored_update_kernel(
    packed, accumulator, left, right, offsets, keys, ok, flips, step, experts, tokens, rows, columns, width,
    SPAN: tl.constexpr, THRESHOLD: tl.constexpr, LOWEST: tl.constexpr, RAIL: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr, RULE: tl.constexpr,
    OPERANDS: tl.constexpr,
):  # fmt: skip
    if tl.load(ok) == 0:
        return
    expert, begin, end = tile_of(offsets, tl.program_id(2), experts, tokens, ANY, EXPERTS)
    if (begin >= end) | (expert == experts):
        return
    block = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    byte = tl.arange(0, 32)[None, :]
    inside = row < rows
    # Columns that are left, seen from byte 0 of the plane.
    cols = columns - block * 160
    d0 = tl.zeros((ROWS, 32), dtype=tl.float32)
    d1 = tl.zeros((ROWS, 32), dtype=tl.float32)
    d2 = tl.zeros((ROWS, 32), dtype=tl.float32)
    d3 = tl.zeros((ROWS, 32), dtype=tl.float32)
    d4 = tl.zeros((ROWS, 32), dtype=tl.float32)
    left_at = left + begin.to(tl.int64) * rows + row
    right_at = right + begin.to(tl.int64) * columns + block * 160
    for _ in range(begin, end):
        factor = tl.load(left_at, mask=inside, other=0.0)
        d0 = _with_product(d0, factor, right_at, cols, byte, WHOLE)
        d1 = _with_product(d1, factor, right_at + 32, cols - 32, byte, WHOLE)
        d2 = _with_product(d2, factor, right_at + 64, cols - 64, byte, WHOLE)
        d3 = _with_product(d3, factor, right_at + 96, cols - 96, byte, WHOLE)
        d4 = _with_product(d4, factor, right_at + 128, cols - 128, byte, WHOLE)
        left_at += rows
        right_at += columns
    element = row * columns + (block * 160 + byte)
    number = element + (expert.to(tl.int64) * rows * columns).to(tl.int32)
    factor = tl.load(step) * -65536.0
    key_a, key_b = tl.load(keys), tl.load(keys + 1)
    code_at = packed + (expert.to(tl.int64) * rows + row) * width + (block * 32 + byte)
    state_at = accumulator + expert.to(tl.int64) * rows * columns + element
    u0, u1, u2, u3, u4 = planes_used(inside, byte, cols, WHOLE)
    present = inside & (byte < 32)
    code, a0, a1, a2, a3, a4 = load_state(code_at, state_at, present, u0, u1, u2, u3, u4)
    count = vote_and_store(
        code_at, state_at, present, u0, u1, u2, u3, u4, code, a0, a1, a2, a3, a4, d0, d1, d2, d3, d4,
        factor, number, key_a, key_b, SPAN, THRESHOLD, LOWEST, RAIL, False, RULE, OPERANDS,
    )  # fmt: skip
    tl.atomic_add(flips, tl.sum(count).to(tl.int64), sem="relaxed")


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
    grid = (width // PLANE, triton.cdiv(rows, ROWS), min(experts + 1, tokens))
    _factored_update_kernel[grid](
        packed, accumulator, left.contiguous(), right.contiguous(), offsets, keys, ok.view(torch.uint8),
        flips, step, experts, tokens, rows, columns, width,
        **rule_options(packed.device, span, threshold, rail, reset=False),
        EXPERTS=triton.next_power_of_2(experts + 1), ROWS=ROWS, WHOLE=columns % BLOCK == 0,
        num_warps=ROWS // 4,  # four bytes a thread
        enable_fp_fusion=False,
    )  # fmt: skip
