"""Triton kernels of `head_norm`: a head's norm and rotation, or its key from two parts, in one pass each way.

A program takes some heads of `norm_and_rotate`, or all heads of a position. Shape letters: B batch,
N positions, H heads, P plain dims of a head, R rotary dims, K = P + R, V value dims of a head, U = P + V,
C latent, E = C + R.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.head_norm.reference import RMS_EPS

HEADS = 32  # of a program
TOKENS = 16  # of a program, of latents
COLUMNS = 64  # of a latent at a time


@triton.jit
def _turned(x1, x2, c, s):
    """A pair of halves, rotated."""
    return x1 * c - x2 * s, x1 * s + x2 * c


@triton.jit
def _turned_back(d1, d2, c, s):
    """The gradient of what `_turned` was given."""
    return d1 * c + d2 * s, d2 * c - d1 * s


@triton.jit(do_not_specialize=["total", "positions"])
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
        g1, g2 = _turned_back(d1, d2, c, s)
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
        y1, y2 = _turned(x1 * rstd[:, None], x2 * rstd[:, None], c, s)
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
    PLAIN: tl.constexpr, VALUE: tl.constexpr, ROTARY: tl.constexpr, COPY_VALUE: tl.constexpr,
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
    if COPY_VALUE:
        used = (head < heads) & (v < VALUE)
        value = tl.load(dvalue + (token * heads + head) * VALUE + v, mask=used, other=0.0)
        tl.store(out + PLAIN + v, value.to(dup.dtype.element_ty), mask=used)
    rotary = tl.load(in_key + PLAIN + r, mask=(head < heads) & (r < ROTARY), other=0.0).to(tl.float32)
    r_flat = tl.arange(0, BLOCK_ROTARY)
    total = tl.sum(rotary, axis=0)
    tl.store(dshared + token * ROTARY + r_flat, total.to(dshared.dtype.element_ty), mask=r_flat < ROTARY)


@triton.jit(do_not_specialize=["tokens", "positions"])
def _latent_kernel(
    down, latent, rotary, shared, cos, sin, tokens, positions, eps,
    LATENT: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_HALF: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Latent, rotary part and its rotation from `down`; backward, the gradient of `down` from theirs."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    in_down = token.to(tl.int64)[:, None] * (LATENT + 2 * HALF)
    in_latent = token.to(tl.int64)[:, None] * LATENT
    for start in tl.static_range(0, LATENT, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        used = inside & (column < LATENT)
        if BACKWARD:
            part = tl.load(latent + in_latent + column, mask=used)
            tl.store(down + in_down + column, part.to(down.dtype.element_ty), mask=used)
        else:
            tl.store(latent + in_latent + column, tl.load(down + in_down + column, mask=used), mask=used)
    i = tl.arange(0, BLOCK_HALF)[None, :]
    used = inside & (i < HALF)
    at = token.to(tl.int64)[:, None] * (2 * HALF) + i
    angle = (token % positions)[:, None] * HALF + i
    c = tl.load(cos + angle, mask=used, other=0.0)
    s = tl.load(sin + angle, mask=used, other=0.0)
    x = rotary + at if BACKWARD else down + in_down + LATENT + i
    r1 = tl.load(x, mask=used, other=0.0)
    r2 = tl.load(x + HALF, mask=used, other=0.0)
    x1 = r1.to(tl.float32)
    x2 = r2.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)
    if BACKWARD:
        d1 = tl.load(shared + at, mask=used, other=0.0).to(tl.float32)
        d2 = tl.load(shared + at + HALF, mask=used, other=0.0).to(tl.float32)
        g1, g2 = _turned_back(d1, d2, c, s)
        coefficient = tl.sum(g1 * x1 + g2 * x2, axis=1) * (rstd * rstd * rstd / (2 * HALF))
        y1 = g1 * rstd[:, None] - x1 * coefficient[:, None]
        y2 = g2 * rstd[:, None] - x2 * coefficient[:, None]
        out = down + in_down + LATENT + i
    else:
        tl.store(rotary + at, r1, mask=used)
        tl.store(rotary + at + HALF, r2, mask=used)
        y1, y2 = _turned(x1 * rstd[:, None], x2 * rstd[:, None], c, s)
        out = shared + at
    tl.store(out, y1.to(down.dtype.element_ty), mask=used)
    tl.store(out + HALF, y2.to(down.dtype.element_ty), mask=used)


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
    dup_BNHU = torch.empty(up_BNHU.shape, dtype=up_BNHU.dtype, device=up_BNHU.device)
    plain = up_BNHU.shape[-1] - dvalue_BNHV.shape[-1]
    return dup_BNHU, _keys_backward(dkey_BNHK, dvalue_BNHV, up_BNHU, dup_BNHU, plain, shared_dtype)


def plain_backward(
    dkey_BNHK: Tensor, up_BNHU: Tensor, dup_BNHU: Tensor, plain: int, shared_dtype: torch.dtype
) -> Tensor:
    """As the reference's."""
    return _keys_backward(dkey_BNHK, None, up_BNHU, dup_BNHU, plain, shared_dtype)


def _keys_backward(
    dkey_BNHK: Tensor,
    dvalue_BNHV: Tensor | None,
    up_BNHU: Tensor,
    dup_BNHU: Tensor,
    plain: int,
    shared_dtype: torch.dtype,
) -> Tensor:
    batch, positions, heads, width = up_BNHU.shape
    value = width - plain
    rotary = dkey_BNHK.shape[-1] - plain
    dshared = torch.empty((batch, positions, rotary), dtype=shared_dtype, device=up_BNHU.device)
    if dup_BNHU.numel():
        _keys_backward_kernel[(batch * positions,)](
            dkey_BNHK.contiguous(), dup_BNHU if dvalue_BNHV is None else dvalue_BNHV.contiguous(),
            up_BNHU.contiguous(), dup_BNHU, dshared, heads,
            RMS_EPS, PLAIN=plain, VALUE=value, ROTARY=rotary, COPY_VALUE=dvalue_BNHV is not None,
            BLOCK_PLAIN=triton.next_power_of_2(plain),
            BLOCK_VALUE=triton.next_power_of_2(value), BLOCK_ROTARY=triton.next_power_of_2(rotary),
            HEADS=triton.next_power_of_2(heads), num_warps=4,
        )  # fmt: skip
    return dshared


def split_latent(
    down_BNE: Tensor, cos_NR: Tensor, sin_NR: Tensor, latent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's."""
    leading, width = down_BNE.shape[:-1], down_BNE.shape[-1]
    latent_BNC, rotary_BNR, shared_BNR = (
        torch.empty((*leading, columns), dtype=down_BNE.dtype, device=down_BNE.device)
        for columns in (latent, width - latent, width - latent)
    )
    _split(down_BNE.contiguous(), latent_BNC, rotary_BNR, shared_BNR, cos_NR, sin_NR, False)
    return latent_BNC, rotary_BNR, shared_BNR


def split_latent_backward(
    dlatent_BNC: Tensor, dshared_BNR: Tensor, rotary_BNR: Tensor, cos_NR: Tensor, sin_NR: Tensor
) -> Tensor:
    """As the reference's."""
    width = dlatent_BNC.shape[-1] + rotary_BNR.shape[-1]
    ddown_BNE = torch.empty((*rotary_BNR.shape[:-1], width), dtype=rotary_BNR.dtype, device=rotary_BNR.device)
    _split(ddown_BNE, dlatent_BNC.contiguous(), rotary_BNR, dshared_BNR.contiguous(), cos_NR, sin_NR, True)
    return ddown_BNE


def _split(
    down_BNE: Tensor,
    latent_BNC: Tensor,
    rotary_BNR: Tensor,
    shared_BNR: Tensor,
    cos_NR: Tensor,
    sin_NR: Tensor,
    backward: bool,
) -> None:
    tokens = down_BNE.shape[0] * down_BNE.shape[1]
    if tokens:
        half = cos_NR.shape[-1]
        _latent_kernel[(triton.cdiv(tokens, TOKENS),)](
            down_BNE, latent_BNC, rotary_BNR, shared_BNR, cos_NR.contiguous(), sin_NR.contiguous(),
            tokens, down_BNE.shape[1], RMS_EPS, LATENT=latent_BNC.shape[-1], HALF=half, BACKWARD=backward,
            BLOCK_HALF=triton.next_power_of_2(half), TOKENS=TOKENS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
