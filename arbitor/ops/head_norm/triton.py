"""Triton kernels of `head_norm`: a head's norm and rotation, or its key from two parts, in one pass each way.

A program takes some heads of `norm_and_rotate`, or all heads of a position. Shape letters: B batch,
N positions, H heads, P plain dims of a head, R rotary dims, K = P + R, V value dims of a head, U = P + V.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.head_norm.reference import RMS_EPS

HEADS = 32  # of a program


@triton.jit
def _rotate_kernel(
    x, dy, cos, sin, y, total, heads, positions, eps,
    PLAIN: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_PLAIN: tl.constexpr, BLOCK_HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    inside = head < total
    position = (head // heads) % positions
    i = tl.arange(0, BLOCK_HALF)[None, :]
    first = head.to(tl.int64)[:, None] * (PLAIN + 2 * HALF) + PLAIN + i
    second = first + HALF
    used = inside[:, None] & (i < HALF)
    x1 = tl.load(x + first, mask=used, other=0.0).to(tl.float32)
    x2 = tl.load(x + second, mask=used, other=0.0).to(tl.float32)
    square = tl.sum(x1 * x1 + x2 * x2, axis=1)
    if PLAIN:
        p = tl.arange(0, BLOCK_PLAIN)[None, :]
        plain = head.to(tl.int64)[:, None] * (PLAIN + 2 * HALF) + p
        used_plain = inside[:, None] & (p < PLAIN)
        x0 = tl.load(x + plain, mask=used_plain, other=0.0).to(tl.float32)
        square += tl.sum(x0 * x0, axis=1)
    rstd = 1.0 / tl.sqrt(square / (PLAIN + 2 * HALF) + eps)
    c = tl.load(cos + position[:, None] * HALF + i, mask=used, other=0.0)
    s = tl.load(sin + position[:, None] * HALF + i, mask=used, other=0.0)
    if BACKWARD:
        d1 = tl.load(dy + first, mask=used, other=0.0).to(tl.float32)
        d2 = tl.load(dy + second, mask=used, other=0.0).to(tl.float32)
        g1 = d1 * c + d2 * s
        g2 = d2 * c - d1 * s
        dot = tl.sum(g1 * x1 + g2 * x2, axis=1)
        if PLAIN:
            g0 = tl.load(dy + plain, mask=used_plain, other=0.0).to(tl.float32)
            dot += tl.sum(g0 * x0, axis=1)
        coefficient = dot * (rstd * rstd * rstd / (PLAIN + 2 * HALF))
        y1 = g1 * rstd[:, None] - x1 * coefficient[:, None]
        y2 = g2 * rstd[:, None] - x2 * coefficient[:, None]
        if PLAIN:
            y0 = g0 * rstd[:, None] - x0 * coefficient[:, None]
            tl.store(y + plain, y0.to(y.dtype.element_ty), mask=used_plain)
    else:
        n1 = x1 * rstd[:, None]
        n2 = x2 * rstd[:, None]
        y1 = n1 * c - n2 * s
        y2 = n1 * s + n2 * c
        if PLAIN:
            tl.store(y + plain, (x0 * rstd[:, None]).to(y.dtype.element_ty), mask=used_plain)
    tl.store(y + first, y1.to(y.dtype.element_ty), mask=used)
    tl.store(y + second, y2.to(y.dtype.element_ty), mask=used)


@triton.jit
def _keys_kernel(
    up, shared, key, heads, eps, PLAIN: tl.constexpr, VALUE: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_PLAIN: tl.constexpr, BLOCK_ROTARY: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    p = tl.arange(0, BLOCK_PLAIN)[None, :]
    r = tl.arange(0, BLOCK_ROTARY)[None, :]
    used = (head < heads) & (p < PLAIN)
    x = tl.load(up + (token * heads + head) * (PLAIN + VALUE) + p, mask=used, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / PLAIN + eps)
    at = (token * heads + head) * (PLAIN + ROTARY)
    tl.store(key + at + p, (x * rstd[:, None]).to(key.dtype.element_ty), mask=used)
    rotary = tl.load(shared + token * ROTARY + r, mask=r < ROTARY, other=0.0)
    rotary = rotary.to(key.dtype.element_ty) + tl.zeros((HEADS, 1), dtype=key.dtype.element_ty)
    tl.store(key + at + PLAIN + r, rotary, mask=(head < heads) & (r < ROTARY))


@triton.jit
def _keys_backward_kernel(
    dkey, dvalue, up, dup, dshared, heads, eps,
    PLAIN: tl.constexpr, VALUE: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_PLAIN: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_ROTARY: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    p = tl.arange(0, BLOCK_PLAIN)[None, :]
    v = tl.arange(0, BLOCK_VALUE)[None, :]
    r = tl.arange(0, BLOCK_ROTARY)[None, :]
    in_up = up + (token * heads + head) * (PLAIN + VALUE)
    out = dup + (token * heads + head) * (PLAIN + VALUE)
    in_key = dkey + (token * heads + head) * (PLAIN + ROTARY)
    used = (head < heads) & (p < PLAIN)
    x = tl.load(in_up + p, mask=used, other=0.0).to(tl.float32)
    gradient = tl.load(in_key + p, mask=used, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / PLAIN + eps)
    coefficient = tl.sum(gradient * x, axis=1) * (rstd * rstd * rstd / PLAIN)
    result = gradient * rstd[:, None] - x * coefficient[:, None]
    tl.store(out + p, result.to(dup.dtype.element_ty), mask=used)
    used = (head < heads) & (v < VALUE)
    value = tl.load(dvalue + (token * heads + head) * VALUE + v, mask=used, other=0.0)
    tl.store(out + PLAIN + v, value.to(dup.dtype.element_ty), mask=used)
    rotary = tl.load(in_key + PLAIN + r, mask=(head < heads) & (r < ROTARY), other=0.0).to(tl.float32)
    r_flat = tl.arange(0, BLOCK_ROTARY)
    total = tl.sum(rotary, axis=0)
    tl.store(dshared + token * ROTARY + r_flat, total.to(dshared.dtype.element_ty), mask=r_flat < ROTARY)


def norm_and_rotate(x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """As the reference's."""
    return _rotate(x_BNHK, None, cos_NR, sin_NR)


def norm_and_rotate_backward(dy_BNHK: Tensor, x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """As the reference's."""
    return _rotate(x_BNHK, dy_BNHK, cos_NR, sin_NR)


def _rotate(x_BNHK: Tensor, dy_BNHK: Tensor | None, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    _, positions, heads, width = x_BNHK.shape
    y = torch.empty(x_BNHK.shape, dtype=x_BNHK.dtype, device=x_BNHK.device)
    x_BNHK = x_BNHK.contiguous()
    if y.numel():
        half = cos_NR.shape[-1]
        total = y.numel() // width
        _rotate_kernel[(triton.cdiv(total, HEADS),)](
            x_BNHK, x_BNHK if dy_BNHK is None else dy_BNHK.contiguous(),
            cos_NR.contiguous(), sin_NR.contiguous(), y, total, heads, positions, RMS_EPS,
            PLAIN=width - 2 * half, HALF=half, BACKWARD=dy_BNHK is not None,
            BLOCK_PLAIN=triton.next_power_of_2(width - 2 * half), BLOCK_HALF=triton.next_power_of_2(half),
            HEADS=HEADS, num_warps=4,
        )  # fmt: skip
    return y


def keys(up_BNHU: Tensor, shared_BNR: Tensor, plain: int) -> Tensor:
    """As the reference's."""
    *leading, heads, width = up_BNHU.shape
    rotary = shared_BNR.shape[-1]
    key = torch.empty((*leading, heads, plain + rotary), dtype=up_BNHU.dtype, device=up_BNHU.device)
    if key.numel():
        _keys_kernel[(key.shape[0] * key.shape[1],)](
            up_BNHU.contiguous(), shared_BNR.contiguous(), key, heads, RMS_EPS,
            PLAIN=plain, VALUE=width - plain, ROTARY=rotary, BLOCK_PLAIN=triton.next_power_of_2(plain),
            BLOCK_ROTARY=triton.next_power_of_2(rotary), HEADS=triton.next_power_of_2(heads), num_warps=4,
        )  # fmt: skip
    return key


def keys_backward(
    dkey_BNHK: Tensor, dvalue_BNHV: Tensor, up_BNHU: Tensor, shared_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    batch, positions, heads, width = up_BNHU.shape
    value = dvalue_BNHV.shape[-1]
    plain = width - value
    rotary = dkey_BNHK.shape[-1] - plain
    dup = torch.empty(up_BNHU.shape, dtype=up_BNHU.dtype, device=up_BNHU.device)
    dshared = torch.empty((batch, positions, rotary), dtype=shared_dtype, device=up_BNHU.device)
    if dup.numel():
        _keys_backward_kernel[(batch * positions,)](
            dkey_BNHK.contiguous(), dvalue_BNHV.contiguous(), up_BNHU.contiguous(), dup, dshared, heads,
            RMS_EPS, PLAIN=plain, VALUE=value, ROTARY=rotary, BLOCK_PLAIN=triton.next_power_of_2(plain),
            BLOCK_VALUE=triton.next_power_of_2(value), BLOCK_ROTARY=triton.next_power_of_2(rotary),
            HEADS=triton.next_power_of_2(heads), num_warps=4,
        )  # fmt: skip
    return dup, dshared
