"""Triton kernel of `state_update`: votes, flips, repacking and the random bits in one pass.

Shape letters: n matrices, O out, I in, P packed bytes a row. A program takes blocks of 32 packed bytes of
some rows of one matrix; digit d of a byte is one of five weights that stand 32 apart. All loads of a block,
and of the next ones, are issued ahead of its first store: with loads between stores, the kernel reached
a third of an H100's bandwidth (docs/kernels.md).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.state_update import assembly
from arbitor.ops.state_update.reference import Given, lowest_of
from arbitor.ops.trit_codec.reference import BLOCK, PLANE
from arbitor.ops.triton import (
    dense_rows,
    digit,
    fixed_point,
    grid_of_rows,
    has_halves,
    part_of_rows,
    random_word,
)


class Tile(NamedTuple):
    """Rows of a program, blocks of 32 bytes of each that it takes, and how many are loaded ahead."""

    rows: int
    blocks: int
    stages: int


# The first is in use, others may be timed.
TILES = (
    Tile(16, 2, 3),
    Tile(16, 2, 1),
    Tile(16, 4, 3),
    Tile(8, 2, 3),
    Tile(32, 2, 3),
    Tile(16, 13, 2),
)


@triton.jit
def sums(direction, factor, element, key_a, key_b, SPAN: tl.constexpr, PTX: tl.constexpr):
    """(vote - span) * 2^16 plus what is rounded away: int32, its upper half the vote less the span."""
    return fixed_point(direction, factor, PTX) + (
        (random_word(element, key_a, key_b) & 0xFFFF) - (SPAN << 16)
    )


@triton.jit
def planes_used(moves, byte, columns, WHOLE: tl.constexpr):
    """Which weights of each plane there are, of rows that move; `columns` are seen from byte 0 of plane 0."""
    u0 = moves & (WHOLE | (byte < columns))
    u1 = moves & (WHOLE | (byte < columns - 32))
    u2 = moves & (WHOLE | (byte < columns - 64))
    u3 = moves & (WHOLE | (byte < columns - 96))
    u4 = moves & (WHOLE | (byte < columns - 128))
    return u0, u1, u2, u3, u4


@triton.jit
def load_state(code_at, state_at, present, u0, u1, u2, u3, u4):
    """Packed bytes, and the accumulators of their five planes; 128 stands for five zeros."""
    code = tl.load(code_at, mask=present, other=128)
    a0 = tl.load(state_at, mask=u0, other=0)
    a1 = tl.load(state_at + 32, mask=u1, other=0)
    a2 = tl.load(state_at + 64, mask=u2, other=0)
    a3 = tl.load(state_at + 96, mask=u3, other=0)
    a4 = tl.load(state_at + 128, mask=u4, other=0)
    return code, a0, a1, a2, a3, a4


@triton.jit
def _voted(
    code, accumulator, sums, value, count, plane: tl.constexpr, SPAN: tl.constexpr, THRESHOLD: tl.constexpr,
    LOWEST: tl.constexpr, RAIL: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """The rule on one plane: its accumulator, the value of the digits so far, and flips so far."""
    votes = (sums >> 16) + SPAN
    trit = digit(code.to(tl.int32), plane) - 1
    total = votes + accumulator.to(tl.int32)
    flip = tl.where((total >= THRESHOLD) & (trit < 1), 1, 0) - tl.where(
        (total <= -LOWEST) & (trit > -1), 1, 0
    )
    flip = tl.where(votes != 0, flip, 0)
    trit += flip
    if RESET:
        total = tl.where(flip != 0, 0, total)
    else:
        total -= flip * SPAN
    excess = tl.maximum(total * trit - RAIL, 0) * trit
    total -= tl.where(votes != 0, excess, 0)
    total = tl.minimum(tl.maximum(total, -127), 127)
    return total.to(tl.int8), value * 3 + (trit + 1), count + tl.abs(flip)


@triton.jit
def vote_and_store(
    code_at, state_at, present, u0, u1, u2, u3, u4, code, a0, a1, a2, a3, a4, d0, d1, d2, d3, d4,
    factor, element, key_a, key_b,
    SPAN: tl.constexpr, THRESHOLD: tl.constexpr, LOWEST: tl.constexpr, RAIL: tl.constexpr,
    RESET: tl.constexpr, RULE: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """The rule on what `load_state` gave and directions of five planes; stored. Returns the flips, int32.

    `element` numbers the weights of the first plane in their random stream.
    """
    PTX: tl.constexpr = RULE is not None
    s0 = sums(d0, factor, element, key_a, key_b, SPAN, PTX)
    s1 = sums(d1, factor, element + 32, key_a, key_b, SPAN, PTX)
    s2 = sums(d2, factor, element + 64, key_a, key_b, SPAN, PTX)
    s3 = sums(d3, factor, element + 96, key_a, key_b, SPAN, PTX)
    s4 = sums(d4, factor, element + 128, key_a, key_b, SPAN, PTX)
    if RULE is not None:
        code, a0, a1, a2, a3, a4, count = tl.inline_asm_elementwise(
            RULE, OPERANDS, [code, a0, a1, a2, a3, a4, s0, s1, s2, s3, s4],
            dtype=(tl.uint8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        value = tl.zeros(code.shape, dtype=tl.int32)
        count = tl.zeros(code.shape, dtype=tl.int32)
        a0, value, count = _voted(code, a0, s0, value, count, 0, SPAN, THRESHOLD, LOWEST, RAIL, RESET)
        a1, value, count = _voted(code, a1, s1, value, count, 1, SPAN, THRESHOLD, LOWEST, RAIL, RESET)
        a2, value, count = _voted(code, a2, s2, value, count, 2, SPAN, THRESHOLD, LOWEST, RAIL, RESET)
        a3, value, count = _voted(code, a3, s3, value, count, 3, SPAN, THRESHOLD, LOWEST, RAIL, RESET)
        a4, value, count = _voted(code, a4, s4, value, count, 4, SPAN, THRESHOLD, LOWEST, RAIL, RESET)
        code = (value + (13 * value + 242) // 243).to(tl.uint8)
    tl.store(state_at, a0, mask=u0)
    tl.store(state_at + 32, a1, mask=u1)
    tl.store(state_at + 64, a2, mask=u2)
    tl.store(state_at + 96, a3, mask=u3)
    tl.store(state_at + 128, a4, mask=u4)
    tl.store(code_at, code, mask=present)
    return count


@triton.jit(do_not_specialize=["rows", "active_matrix_stride", "number", "unit"])
def _update_kernel(
    packed,
    accumulator,
    direction,
    keys,
    active,
    flips,
    rows,
    columns,
    width,
    packed_stride,
    accumulator_stride,
    direction_stride,
    active_matrix_stride,
    active_row_stride,
    step,
    unit,
    number,
    SPAN: tl.constexpr,
    THRESHOLD: tl.constexpr,
    LOWEST: tl.constexpr,
    RAIL: tl.constexpr,
    RESET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    TURNED: tl.constexpr,
    RULE: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """Of matrices that are `number` and following of those that all but packed and accumulator are for."""
    across, part = part_of_rows(TURNED)
    row = part * ROWS + tl.arange(0, ROWS)[:, None]
    matrix = tl.program_id(2).to(tl.int64)
    own = matrix + number
    byte = tl.arange(0, 32)[None, :]
    flag = active + own * active_matrix_stride + row * active_row_stride
    moves = (row < rows) & (tl.load(flag, mask=row < rows, other=0) != 0)
    key_a, key_b = tl.load(keys + 2 * own), tl.load(keys + 2 * own + 1)
    factor = tl.load(step) * -65536.0
    flipped = tl.zeros((ROWS, 32), dtype=tl.int32)
    for ahead in tl.range(0, BLOCKS, num_stages=STAGES):
        block = across * BLOCKS + ahead
        element = row * columns + (block * 160 + byte)
        code_at = packed + matrix * packed_stride + (row * width + (block * 32 + byte))
        u_at = direction + own * direction_stride + element
        state_at = accumulator + matrix * accumulator_stride + element
        # What is not used has no vote and stays as it is.
        u0, u1, u2, u3, u4 = planes_used(moves, byte, columns - block * 160, WHOLE)
        present = moves & (WHOLE | (byte < width - block * 32))
        d0 = tl.load(u_at, mask=u0, other=0.0).to(tl.float32) * unit
        d1 = tl.load(u_at + 32, mask=u1, other=0.0).to(tl.float32) * unit
        d2 = tl.load(u_at + 64, mask=u2, other=0.0).to(tl.float32) * unit
        d3 = tl.load(u_at + 96, mask=u3, other=0.0).to(tl.float32) * unit
        d4 = tl.load(u_at + 128, mask=u4, other=0.0).to(tl.float32) * unit
        code, a0, a1, a2, a3, a4 = load_state(code_at, state_at, present, u0, u1, u2, u3, u4)
        flipped += vote_and_store(
            code_at, state_at, present, u0, u1, u2, u3, u4, code, a0, a1, a2, a3, a4, d0, d1, d2, d3, d4,
            factor, element, key_a, key_b, SPAN, THRESHOLD, LOWEST, RAIL, RESET, RULE, OPERANDS,
        )  # fmt: skip
    tl.atomic_add(flips + own, tl.sum(flipped).to(tl.int64), sem="relaxed")


def rule_options(
    device: torch.device, span: int, threshold: int, rail: int, reset: bool
) -> dict[str, int | str | None]:
    """Constants of a kernel that votes: the rule's numbers, and its assembly where that can be run."""
    lowest = lowest_of(span, threshold, reset)
    ptx = has_halves(device) and assembly.fits(span, threshold, rail)
    return {
        "SPAN": span,
        "THRESHOLD": threshold,
        "LOWEST": lowest,
        "RAIL": rail,
        "RULE": assembly.rule(span, threshold, lowest, rail, reset) if ptx else None,
        "OPERANDS": assembly.constraints() if ptx else None,
    }


def update(
    packed: Tensor,
    accumulator: Tensor,
    direction: Tensor,
    keys: Tensor,
    active: Tensor,
    step: Tensor,
    span: int,
    threshold: int,
    rail: int,
    reset: bool,
    tile: Tile | None = None,
) -> Tensor:
    """As `reference.update` of bits drawn from `keys`; see `arbitor.ops.state_update.state_update`."""
    flips = torch.zeros(len(direction), dtype=torch.int64, device=packed.device)
    given = Given(dense_rows(direction), 1.0, keys, active, step, flips)
    update_some(packed, accumulator, given, 0, span, threshold, rail, reset, tile)
    return flips


def update_some(
    packed: Tensor,
    accumulator: Tensor,
    given: Given,
    number: int,
    span: int,
    threshold: int,
    rail: int,
    reset: bool,
    tile: Tile | None = None,
) -> None:
    """`update` of some matrices out of n.

    Args:
        packed, accumulator: [m, O, ...], changed.
        given: of all n matrices.
        number: of the first of the m among the n.
        span, threshold, rail, reset: as in `update`.
        tile: of a program.
    """
    assert packed.stride(-2) == packed.shape[-1]
    assert accumulator.stride(-2) == accumulator.shape[-1]
    matrices, rows, columns = accumulator.shape
    width = packed.shape[-1]
    if accumulator.numel() == 0:
        return
    active = given.active
    active = active.expand(len(given.flips), active.shape[-2] if active.shape[-2] == 1 else rows, 1)
    tile = tile or TILES[0]
    across = triton.cdiv(width // PLANE, tile.blocks)
    grid, turned = grid_of_rows(across, triton.cdiv(rows, tile.rows), matrices)
    _update_kernel[grid](
        packed,
        accumulator,
        given.direction,
        given.keys,
        active.view(torch.uint8),
        given.flips,
        rows,
        columns,
        width,
        packed.stride(0),
        accumulator.stride(0),
        given.direction.stride(0),
        active.stride(0),
        0 if active.shape[-2] == 1 else active.stride(1),
        given.step,
        given.unit,
        number,
        **rule_options(packed.device, span, threshold, rail, reset),
        RESET=reset,
        ROWS=tile.rows,
        BLOCKS=tile.blocks,
        STAGES=tile.stages,
        WHOLE=columns % (BLOCK * tile.blocks) == 0,
        TURNED=turned,
        num_warps=tile.rows // 4,  # four bytes a thread
        enable_fp_fusion=False,
    )
