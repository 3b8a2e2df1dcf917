"""Triton kernel of `state_update`: votes, flips, repacking and the random bits in one pass.

Shape letters: n matrices, O out, I in, P packed bytes a row. A program takes some packed bytes of one matrix;
digit d of a byte is one of five weights that stand 32 apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.triton import dense_rows, digit, random_word, stochastic_floor

BYTES = 512


@triton.jit(do_not_specialize=["rows", "active_matrix_stride"])
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
    span,
    threshold,
    lowest,
    rail,
    RESET: tl.constexpr,
    BYTES: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    inside = byte < rows * width
    row = byte // width
    within = byte % width
    column = (within // 32) * 160 + within % 32
    key_a, key_b = tl.load(keys + 2 * matrix), tl.load(keys + 2 * matrix + 1)
    factor = tl.load(step) * -65536.0
    flag = active + matrix * active_matrix_stride + row * active_row_stride
    moves = tl.load(flag, mask=inside, other=0) != 0
    here = packed + matrix * packed_stride + byte
    code = tl.load(here, mask=inside, other=0).to(tl.int32)
    value = tl.zeros((BYTES,), dtype=tl.int32)
    count = tl.zeros((BYTES,), dtype=tl.int32)
    for plane in tl.static_range(5):
        col = column + 32 * plane
        used = inside & (col < columns)
        element = row * columns + col
        offset = element.to(tl.int64)
        u = tl.load(direction + matrix * direction_stride + offset, mask=used, other=0.0)
        votes = stochastic_floor(u, factor, random_word(element, key_a, key_b))
        votes = tl.where(moves & used, votes, 0)
        trit = digit(code, plane) - 1
        state = accumulator + matrix * accumulator_stride + offset
        total = votes + tl.load(state, mask=used, other=0).to(tl.int32)
        flip = tl.where((total >= threshold) & (trit < 1), 1, 0) - tl.where(
            (total <= -lowest) & (trit > -1), 1, 0
        )
        flip = tl.where(votes != 0, flip, 0)
        trit += flip
        if RESET:
            total = tl.where(flip != 0, 0, total)
        else:
            total -= flip * span
        excess = tl.maximum(total * trit - rail, 0) * trit
        total -= tl.where(votes != 0, excess, 0)
        total = tl.minimum(tl.maximum(total, -127), 127)
        tl.store(state, total.to(tl.int8), mask=used)
        value = value * 3 + tl.where(used, trit + 1, 1)
        count += tl.abs(flip)
    repacked = value + (13 * value + 242) // 243
    tl.store(here, repacked.to(tl.uint8), mask=inside)
    tl.atomic_add(flips + matrix, tl.sum(count).to(tl.int64))


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
) -> Tensor:
    """As `reference.update` of bits drawn from `keys`; see `arbitor.ops.state_update.state_update`."""
    assert packed.stride(-2) == packed.shape[-1]
    assert accumulator.stride(-2) == accumulator.shape[-1]
    direction = dense_rows(direction)
    matrices, rows, columns = direction.shape
    width = packed.shape[-1]
    flips = torch.zeros(matrices, dtype=torch.int64, device=packed.device)
    if flips.numel() == 0 or rows * columns == 0:
        return flips
    active = active.expand(matrices, active.shape[-2] if active.shape[-2] == 1 else rows, 1)
    grid = (triton.cdiv(rows * width, BYTES), matrices)
    _update_kernel[grid](
        packed,
        accumulator,
        direction,
        keys,
        active.view(torch.uint8),
        flips,
        rows,
        columns,
        width,
        packed.stride(0),
        accumulator.stride(0),
        direction.stride(0),
        active.stride(0),
        0 if active.shape[-2] == 1 else active.stride(1),
        step,
        span,
        threshold,
        threshold if reset or 2 * threshold > span else threshold + 1,
        rail,
        RESET=reset,
        BYTES=BYTES,
        enable_fp_fusion=False,
    )
    return flips
