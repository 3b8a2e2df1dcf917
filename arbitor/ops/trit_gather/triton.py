"""Triton kernel of `ternary_gather`: packed rows are read where they lie and written decoded.

A program takes some ids and 32 packed bytes of each row at a time; digit d of a byte is one of five weights
that stand 32 apart. Shape letters: V rows, W width, P packed bytes a row, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.triton import digit, exp2_int, is_legal

IDS = 32


@triton.jit(do_not_specialize=["total"])
def _gather_kernel(
    packed, exponents, ids, out, total, rows, columns, width, group, groups,
    BY_ROW: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * IDS + tl.arange(0, IDS)
    inside = place < total
    row = tl.load(ids + place, mask=inside, other=0)
    known = (row >= 0) & (row < rows)
    read = (inside & known)[:, None]
    lane = tl.arange(0, 32)[None, :]
    packed_at = packed + row[:, None] * width + lane
    out_at = out + place.to(tl.int64)[:, None] * columns + lane
    if BY_ROW:
        scale = exp2_int(tl.load(exponents + row, mask=inside & known, other=0).to(tl.int32))[:, None]
    for block in range(width // 32):
        code = tl.load(packed_at + 32 * block, mask=read, other=1).to(tl.int32)  # 1 is illegal
        legal = is_legal(code)
        for plane in tl.static_range(5):
            column = block * 160 + 32 * plane + lane
            used = inside[:, None] & (column < columns)
            weight = (digit(code, plane) - 1).to(tl.float32)
            if BY_ROW:
                weight *= scale
            else:
                at = exponents + row[:, None] * groups + column // group
                weight *= exp2_int(tl.load(at, mask=read & (column < columns), other=0).to(tl.int32))
            weight = tl.where(legal, weight, float("nan"))
            tl.store(out_at + block * 160 + 32 * plane, weight.to(out.dtype.element_ty), mask=used)


def gather(
    packed: Tensor, exponent: Tensor, ids: Tensor, in_features: int, group: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.gather`; NaN where an id is no row."""
    out = torch.empty((*ids.shape, in_features), dtype=dtype, device=packed.device)
    if out.numel():
        rows, width = packed.shape
        groups = exponent.shape[-1]
        _gather_kernel[(triton.cdiv(ids.numel(), IDS),)](
            packed.contiguous(), exponent.contiguous(), ids.contiguous(), out, ids.numel(), rows,
            in_features, width, group, groups, BY_ROW=groups == 1, IDS=IDS, num_warps=4,
        )  # fmt: skip
    return out
