"""Triton kernels of `fsq`: codes and ids, the gradient, and codes of ids, each in one pass.

A program takes some vectors and goes through their numbers one after the other, as the reference does.
Shape letters: K trits of a code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.activations import RMS_EPS
from arbitor.ops.fsq.reference import LEVEL_SCALE, ZERO_BELOW

VECTORS = 128


@triton.jit(do_not_specialize=["total"])
def _quantize_kernel(x, codes, ids, total, epsilon, zero_below, K: tl.constexpr, VECTORS: tl.constexpr):
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    inside = vector < total
    squares = tl.zeros((VECTORS,), dtype=tl.float32)
    for n in tl.static_range(K):
        number = tl.load(x + vector * K + n, mask=inside, other=0.0).to(tl.float32)
        squares += number * number
    limit = (squares + epsilon) * zero_below
    poison = squares - squares  # 0, or NaN where a number was not finite
    code_id = tl.zeros((VECTORS,), dtype=tl.int32)
    for n in tl.static_range(K):
        number = tl.load(x + vector * K + n, mask=inside, other=0.0).to(tl.float32)
        far = (number * number) * K > limit
        trit = (far & (number > 0)).to(tl.int32) - (far & (number < 0)).to(tl.int32)
        code_id += (trit + 1) * 3**n
        code = (trit.to(tl.float32) + poison).to(codes.dtype.element_ty)
        tl.store(codes + vector * K + n, code, mask=inside)
    tl.store(ids + vector, code_id.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _backward_kernel(dy, x, dx, total, epsilon, level_scale, K: tl.constexpr, VECTORS: tl.constexpr):
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    inside = vector < total
    squares = tl.zeros((VECTORS,), dtype=tl.float32)
    for n in tl.static_range(K):
        number = tl.load(x + vector * K + n, mask=inside, other=0.0).to(tl.float32)
        squares += number * number
    rstd = 1.0 / tl.sqrt(squares / K + epsilon)
    dot = tl.zeros((VECTORS,), dtype=tl.float32)
    for n in tl.static_range(K):
        number = tl.load(x + vector * K + n, mask=inside, other=0.0).to(tl.float32)
        dot += _through_tanh(dy, vector * K + n, inside, number * rstd, level_scale) * number
    coefficient = dot * (rstd * rstd * rstd / K)
    for n in tl.static_range(K):
        number = tl.load(x + vector * K + n, mask=inside, other=0.0).to(tl.float32)
        gradient = _through_tanh(dy, vector * K + n, inside, number * rstd, level_scale)
        gradient = gradient * rstd - number * coefficient
        tl.store(dx + vector * K + n, gradient.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _through_tanh(dy, at, inside, normed, level_scale):
    """Gradient of the normed number: dy * level_scale * (1 - tanh^2), which is 4 e / (1 + e)^2."""
    e = tl.exp(-2.0 * tl.abs(normed))
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return slope * tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * level_scale


@triton.jit(do_not_specialize=["total"])
def _trits_kernel(ids, trits, total, K: tl.constexpr, VECTORS: tl.constexpr):
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    inside = vector < total
    rest = tl.load(ids + vector, mask=inside, other=0).to(tl.int32)
    for n in tl.static_range(K):
        tl.store(trits + vector * K + n, (rest % 3 - 1).to(tl.int8), mask=inside)
        rest = rest // 3


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.quantize` of fp32 or narrower."""
    k = x.shape[-1]
    codes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ids = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    if ids.numel():
        _quantize_kernel[(triton.cdiv(ids.numel(), VECTORS),)](
            x.contiguous(), codes, ids, ids.numel(), k * RMS_EPS, ZERO_BELOW,
            K=k, VECTORS=VECTORS, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, ids


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """As `reference.backward` of fp32 or narrower, up to the rounding of sums and of tanh."""
    k = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x.numel() // k
    if total:
        _backward_kernel[(triton.cdiv(total, VECTORS),)](
            dy.contiguous(), x.contiguous(), dx, total, RMS_EPS, LEVEL_SCALE, K=k, VECTORS=VECTORS
        )
    return dx


def trits(ids: Tensor, k: int) -> Tensor:
    """As `reference.trits` of ids in 0...3^k - 1."""
    out = torch.empty((*ids.shape, k), dtype=torch.int8, device=ids.device)
    if ids.numel():
        grid = (triton.cdiv(ids.numel(), VECTORS),)
        _trits_kernel[grid](ids.contiguous(), out, ids.numel(), K=k, VECTORS=VECTORS)
    return out
