"""Triton kernels of byte tables: rows by id, and a step of the table's codes with its random bits.

Shape letters: V rows, D dim, N tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.activations import triton as activation_kernels
from arbitor.ops.exponent import exp2_int as exponent_power
from arbitor.ops.int8_matmul import int8_matmul
from arbitor.ops.int8_table.reference import FRACTION_BITS, Q_MAX
from arbitor.ops.triton import exp2_int, random_word, round_even

ELEMENTS = 2048  # of a program's tile


@triton.jit(do_not_specialize=["tokens"])
def _gather_kernel(
    q, exponents, ids, out, tokens, rows, dim,
    FRACTION: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = token < tokens
    row = tl.load(ids + token, mask=inside, other=0)
    legal = (row >= 0) & (row < rows)
    exponent = tl.load(exponents + row, mask=inside & legal, other=0).to(tl.int32)
    scale = tl.where(legal, exp2_int(exponent - FRACTION), float("nan"))
    used = inside[:, None] & (column < dim)[None, :]
    code = tl.load(q + row[:, None] * dim + column[None, :], mask=used & legal[:, None], other=0)
    at = out + token.to(tl.int64)[:, None] * dim + column[None, :]
    tl.store(at, code.to(tl.float32) * scale[:, None], mask=used)


@triton.jit
def _update_kernel(q, direction, keys, active, step, dim, LIMIT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < dim
    if tl.load(active + row) != 0:
        at = row.to(tl.int64) * dim + column
        u = tl.load(direction + at, mask=used, other=0.0)
        code = tl.load(q + at, mask=used, other=0).to(tl.int32)
        whole = round_even(tl.load(step) * 65536.0).to(tl.int32)
        word = random_word(row * dim + column, tl.load(keys), tl.load(keys + 1)) & 0xFFFF
        against = tl.where(u > 0, -whole, tl.where(u < 0, whole, 0))
        code += (against + word) >> 16
        tl.store(q + at, tl.minimum(tl.maximum(code, -LIMIT), LIMIT).to(tl.int8), mask=used)


def gather(q: Tensor, exponent: Tensor, ids: Tensor) -> Tensor:
    """As `reference.gather`; NaN where an id is no row."""
    rows, dim = q.shape
    out = torch.empty((*ids.shape, dim), dtype=torch.float32, device=q.device)
    if out.numel():
        columns = min(triton.next_power_of_2(dim), ELEMENTS)
        at_once = ELEMENTS // columns if columns >= 64 else 32
        _gather_kernel[(triton.cdiv(ids.numel(), at_once), triton.cdiv(dim, columns))](
            q.contiguous(), exponent.contiguous(), ids.contiguous(), out, ids.numel(), rows, dim,
            FRACTION=FRACTION_BITS, TOKENS=at_once, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return out


def linear(
    x: Tensor, q: Tensor, exponent: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.linear` with quantised activations; equal bits where sums are exact in fp32."""
    codes, scale, rstd = activation_kernels.quantize(x, True)
    row_scale = exponent_power(exponent.to(torch.int32) - FRACTION_BITS)
    return int8_matmul(codes, q, scale, row_scale, out_dtype), codes, scale, rstd


def update(q: Tensor, direction: Tensor, step: Tensor, keys: Tensor, active: Tensor) -> None:
    """As `reference.update` of bits drawn from `keys`, int32 [1, 2], for legal codes."""
    assert q.is_contiguous()
    rows, dim = q.shape
    if q.numel():
        columns = min(triton.next_power_of_2(dim), 1024)
        _update_kernel[(rows, triton.cdiv(dim, columns))](
            q, direction.contiguous(), keys.contiguous(), active.contiguous().view(torch.uint8), step, dim,
            LIMIT=Q_MAX, COLUMNS=columns, enable_fp_fusion=False,
        )  # fmt: skip
