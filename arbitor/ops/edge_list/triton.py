"""Triton kernel of `edge_list_look_up`: a binary search for each node, then its edges.

Shape letters: C capacity, M nodes, K neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NODES = 128


@triton.jit(do_not_specialize=["nodes"])
def _look_up_kernel(
    src, dst, score, ids, dst_out, score_out, nodes, capacity, count,
    STEPS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    node = tl.program_id(0).to(tl.int64) * NODES + tl.arange(0, NODES)
    inside = node < nodes
    wanted = tl.load(ids + node, mask=inside, other=0).to(tl.int64)
    key = wanted.to(tl.int32)
    first = tl.zeros((NODES,), dtype=tl.int32)
    end = tl.zeros((NODES,), dtype=tl.int32) + capacity
    for _ in tl.static_range(STEPS):
        middle = (first + end) >> 1
        searching = first < end
        less = tl.load(src + middle, mask=searching, other=0) < key
        first = tl.where(searching & less, middle + 1, first)
        end = tl.where(searching & (less == 0), middle, end)
    for k in range(count):
        slot = first + k
        is_edge = inside & (slot < capacity)
        is_edge = is_edge & (tl.load(src + slot, mask=is_edge, other=-1).to(tl.int64) == wanted)
        at = node * count + k
        tl.store(dst_out + at, tl.load(dst + slot, mask=is_edge, other=0).to(tl.int64), mask=inside)
        tl.store(score_out + at, tl.load(score + slot, mask=is_edge, other=0), mask=inside)


def look_up(src: Tensor, dst: Tensor, score: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `reference.look_up`."""
    dst_out = torch.empty((*ids.shape, count), dtype=torch.int64, device=src.device)
    score_out = torch.empty((*ids.shape, count), dtype=torch.int8, device=src.device)
    if dst_out.numel():
        _look_up_kernel[(triton.cdiv(ids.numel(), NODES),)](
            src.contiguous(), dst.contiguous(), score.contiguous(), ids.contiguous(), dst_out, score_out,
            ids.numel(), len(src), count, STEPS=len(src).bit_length(), NODES=NODES,
        )  # fmt: skip
    return dst_out, score_out
