"""Triton kernels of the edge list: a node's edges by binary search, and all of a merge but its sorts.

A merge sorts by a library. Between the sorts stands arithmetic on some 10^5 integers, which costs nothing but
launches; here it is one kernel each time, and counts come from binary searches in what is sorted already.

Shape letters: C capacity, P pairs, L = C + P, M nodes, K neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.edge_list.reference import FRACTION_BITS, MAX_SCORE, UNUSED

BLOCK = 128
NO_SOURCE = tl.constexpr(UNUSED)
NODE_BITS = tl.constexpr(31)


@triton.jit
def _first_at_least(numbers, count, steps, wanted):
    """How many of `count` ascending numbers are below each of `wanted`; `steps` is count's bit length."""
    first = tl.zeros_like(wanted).to(tl.int32)
    end = first + count
    for _ in range(steps):
        middle = (first + end) >> 1
        searching = first < end
        less = searching & (tl.load(numbers + middle, mask=searching, other=0) < wanted)
        end = tl.where(less, end, middle)
        first = tl.where(less, middle + 1, first)
    return first


@triton.jit(do_not_specialize=["nodes"])
def _look_up_kernel(
    src, dst, score, ids, dst_out, score_out, nodes, capacity, steps, count, BLOCK: tl.constexpr
):
    node = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = node < nodes
    wanted = tl.load(ids + node, mask=inside, other=0).to(tl.int64)
    first = _first_at_least(src, capacity, steps, wanted)
    for k in range(count):
        slot = first + k
        is_edge = inside & (slot < capacity)
        is_edge = is_edge & (tl.load(src + slot, mask=is_edge, other=-1).to(tl.int64) == wanted)
        at = node * count + k
        tl.store(dst_out + at, tl.load(dst + slot, mask=is_edge, other=0).to(tl.int64), mask=inside)
        tl.store(score_out + at, tl.load(score + slot, mask=is_edge, other=0), mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def _keys_kernel(src, dst, pair_src, pair_dst, keys, capacity, pairs, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_list = place < capacity
    pair = place - capacity
    is_pair = (pair >= 0) & (pair < pairs)
    source = tl.load(src + place, mask=in_list, other=0) + tl.load(pair_src + pair, mask=is_pair, other=0)
    target = tl.load(dst + place, mask=in_list, other=0) + tl.load(pair_dst + pair, mask=is_pair, other=0)
    key = (source.to(tl.int64) << NODE_BITS) | target.to(tl.int64)
    tl.store(keys + place, key, mask=in_list | is_pair)


@triton.jit(do_not_specialize=["total", "steps"])
def _scores_kernel(
    keys, order, src, score, bits, new, total, steps, capacity, list_steps, rate_bits,
    FRACTION: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    key = tl.load(keys + place, mask=inside, other=0)
    before = tl.load(keys + place - 1, mask=inside & (place > 0), other=-1)
    source = key >> NODE_BITS
    own = tl.load(order + place, mask=inside, other=0)
    old = tl.load(score + own, mask=inside & (own < capacity), other=0).to(tl.int64)
    first = _first_at_least(keys, total, steps, key)
    taken = _first_at_least(keys, total, steps, key + 1) - first
    taken -= (tl.load(order + first, mask=inside, other=0) < capacity).to(tl.int32)
    left = _first_at_least(keys, total, steps, (source + 1) << NODE_BITS)
    left -= _first_at_least(keys, total, steps, source << NODE_BITS)
    left -= _first_at_least(src, capacity, list_steps, source + 1)
    left += _first_at_least(src, capacity, list_steps, source)
    over = ((MOST * taken.to(tl.int64)) - old * left.to(tl.int64)) << FRACTION
    under = tl.maximum(left, 1).to(tl.int64) << rate_bits
    step = over // under
    step -= (over - step * under < 0).to(tl.int64)  # // rounds towards zero
    fraction = tl.load(bits + place, mask=inside, other=0) & ((1 << FRACTION) - 1)
    value = old + ((step + fraction) >> FRACTION)
    # An edge's first entry stands for all of them.
    value = tl.where((key == before) | (source == NO_SOURCE), 0, value)
    tl.store(new + place, value.to(tl.int8), mask=inside)


@triton.jit
def _kept_kernel(keys, new, best, source, capacity, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < capacity
    entry = tl.load(best + place, mask=inside, other=0)
    value = (tl.load(keys + entry, mask=inside, other=0) >> NODE_BITS).to(tl.int32)
    value = tl.where(tl.load(new + entry, mask=inside, other=0) == 0, NO_SOURCE, value)
    tl.store(source + place, value, mask=inside)


@triton.jit
def _write_kernel(keys, new, best, source, order, ok, src, dst, score, capacity, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < capacity
    if tl.load(ok) != 0:
        entry = tl.load(best + tl.load(order + place, mask=inside, other=0), mask=inside, other=0)
        value = tl.load(new + entry, mask=inside, other=0)
        target = (tl.load(keys + entry, mask=inside, other=0) & NO_SOURCE).to(tl.int32)
        tl.store(src + place, tl.load(source + place, mask=inside, other=0), mask=inside)
        tl.store(dst + place, tl.where(value == 0, 0, target), mask=inside)
        tl.store(score + place, value, mask=inside)


def look_up(src: Tensor, dst: Tensor, score: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `reference.look_up`."""
    dst_out = torch.empty((*ids.shape, count), dtype=torch.int64, device=src.device)
    score_out = torch.empty((*ids.shape, count), dtype=torch.int8, device=src.device)
    if dst_out.numel():
        _look_up_kernel[(triton.cdiv(ids.numel(), BLOCK),)](
            src.contiguous(), dst.contiguous(), score.contiguous(), ids.contiguous(), dst_out, score_out,
            ids.numel(), len(src), len(src).bit_length(), count, BLOCK=BLOCK,
        )  # fmt: skip
    return dst_out, score_out


def merge(
    src: Tensor,
    dst: Tensor,
    score: Tensor,
    pair_src: Tensor,
    pair_dst: Tensor,
    bits: Tensor,
    rate_bits: int,
    ok: Tensor,
) -> None:
    """As `reference.merge` of a list in which no edge stands twice."""
    assert all(buffer.is_contiguous() for buffer in (src, dst, score))
    capacity, total = len(src), len(src) + len(pair_src)
    if not capacity:
        return
    grid, list_grid = (triton.cdiv(total, BLOCK),), (triton.cdiv(capacity, BLOCK),)
    keys = torch.empty(total, dtype=torch.int64, device=src.device)
    new = torch.empty(total, dtype=torch.int8, device=src.device)
    source = torch.empty_like(src)
    _keys_kernel[grid](
        src, dst, pair_src.contiguous(), pair_dst.contiguous(), keys, capacity, len(pair_src), BLOCK=BLOCK
    )
    keys, order = torch.sort(keys, stable=True)
    _scores_kernel[grid](
        keys, order, src, score, bits.contiguous(), new, total, total.bit_length(), capacity,
        capacity.bit_length(), rate_bits, FRACTION=FRACTION_BITS, MOST=MAX_SCORE, BLOCK=BLOCK,
    )  # fmt: skip
    best = torch.sort(new, descending=True, stable=True).indices
    _kept_kernel[list_grid](keys, new, best, source, capacity, BLOCK=BLOCK)
    source, order = torch.sort(source, stable=True)
    _write_kernel[list_grid](
        keys, new, best, source, order, ok.view(torch.uint8), src, dst, score, capacity, BLOCK=BLOCK
    )
