"""Triton kernels of `row_sums`: gradients are read once, in the order of their ids, and sums written once.

Most rows have few look-ups, some have thousands, which one program would add for too long: first every 64
look-ups of a row that are together in the sorted order are summed, then a program for each row adds these
sums and what is left. Shape letters: N look-ups, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
AT_ONCE = 4  # loads under way
BLOCK = 256


@triton.jit(do_not_specialize=["total"])
def _begins_kernel(ids, begins, total, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    own = tl.load(ids + place, mask=inside, other=0)
    other = tl.load(ids + place - 1, mask=inside & (place > 0), other=0)
    tl.store(begins + place, ((own != other) | (place == 0)).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _starts_kernel(begins, number, starts, total, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    is_start = inside & (tl.load(begins + place, mask=inside, other=0) != 0)
    segment = tl.load(number + place, mask=is_start, other=1) - 1
    tl.store(starts + segment, place, mask=is_start)


@triton.jit
def _add_rows(sums, order, gradient, first, end, dim, column, AT_ONCE: tl.constexpr):
    """sums + rows order[first...end - 1] of the gradient, one after the other."""
    for place in range(first, end, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            row = tl.load(order + tl.minimum(place + i, end - 1))
            used = column < tl.where(place + i < end, dim, 0)
            sums += tl.load(gradient + row * dim + column, mask=used, other=0.0).to(tl.float32)
    return sums


@triton.jit(do_not_specialize=["total"])
def _chunks_kernel(
    order, number, starts, gradient, partial, total, dim,
    CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Whole chunks begin CHUNK apart at least, so that of CHUNK places one is the first of one at most.
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = place < total
    segments = tl.load(number + total - 1)
    segment = tl.load(number + place, mask=inside, other=1) - 1
    start = tl.load(starts + segment)
    end = tl.load(starts + segment + 1, mask=segment + 1 < segments, other=total)
    is_first = inside & ((place - start) % CHUNK == 0) & (place + CHUNK <= end)
    first = tl.max(tl.where(is_first, place, -1), axis=0)
    if first >= 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros((COLUMNS,), dtype=tl.float32)
        sums = _add_rows(sums, order, gradient, first, first + CHUNK, dim, column, AT_ONCE)
        tl.store(partial + tl.program_id(0).to(tl.int64) * dim + column, sums, mask=column < dim)


@triton.jit(do_not_specialize=["total"])
def _sums_kernel(
    ids, order, number, starts, gradient, partial, ids_out, sums_out, total, dim,
    CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    segments = tl.load(number + total - 1)
    segment = tl.minimum(slot, segments - 1)
    start = tl.load(starts + segment)
    following = tl.load(starts + tl.minimum(segment + 1, segments - 1))
    end = tl.where(segment + 1 < segments, following, total)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < dim
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    chunks = (end - start) // CHUNK
    for chunk in range(0, chunks, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            at = partial + (start // CHUNK + chunk + i).to(tl.int64) * dim + column
            sums += tl.load(at, mask=column < tl.where(chunk + i < chunks, dim, 0), other=0.0)
    sums = _add_rows(sums, order, gradient, start + chunks * CHUNK, end, dim, column, AT_ONCE)
    tl.store(sums_out + slot.to(tl.int64) * dim + column, sums, mask=used)
    if tl.program_id(1) == 0:
        tl.store(ids_out + slot, tl.load(ids + start))


def row_sums(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.row_sums`; of rows with more than 64 look-ups in another order."""
    total, dim = gradient.shape
    gradient = gradient.contiguous()
    ids, order = torch.sort(ids, stable=True)
    ids_out = torch.empty_like(ids)
    sums = torch.empty((total, dim), dtype=torch.float32, device=ids.device)
    if not total:
        return ids_out, sums
    begins, starts = (torch.empty(total, dtype=torch.int32, device=ids.device) for _ in range(2))
    windows = triton.cdiv(total, CHUNK)
    partial = torch.empty((windows, dim), dtype=torch.float32, device=ids.device)
    columns = min(BLOCK, max(32, triton.next_power_of_2(dim)))
    blocks = max(1, triton.cdiv(dim, columns))
    grid = (triton.cdiv(total, BLOCK),)
    _begins_kernel[grid](ids, begins, total, BLOCK=BLOCK)
    number = begins.cumsum(0, dtype=torch.int32)
    _starts_kernel[grid](begins, number, starts, total, BLOCK=BLOCK)
    sizes = {"CHUNK": CHUNK, "AT_ONCE": AT_ONCE, "COLUMNS": columns}
    _chunks_kernel[(windows, blocks)](
        order, number, starts, gradient, partial, total, dim, **sizes, num_warps=1
    )
    _sums_kernel[(total, blocks)](
        ids, order, number, starts, gradient, partial, ids_out, sums, total, dim, **sizes, num_warps=1
    )
    return ids_out, sums
