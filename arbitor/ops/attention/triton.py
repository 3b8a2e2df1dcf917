"""Triton kernels of `attention`: softmax over blocks of keys, its weights computed again in the backward.

After Dao 2023, "FlashAttention-2" (Milakov and Gimelshein 2018 for the running maximum and sum). The weights
are powers of two, so that the exponential is one instruction. Head dims are split into two parts whose widths
are powers of two (80 = 64 + 16), which spares the products with the zeros that one part of 128 would have.

All rows begin at multiples of 16 bytes, so that the pipeline copies keys and values ahead. Where it does not
(other rows, or one stage), Triton 3.6 holds them in registers first, and an H100 then multiplied wrongly with
the second part of values or read memory that is not there.

Rows beyond the last position read the last one, and nothing of theirs is written. Their keys lie behind all
queries, which hides them; their queries have an infinite log-sum-exp, which makes all weights zero.

Shape letters: B batch, N positions, H heads, K dims of a query or key, V value dims, L = N in
whole blocks.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.ops.attention.reference import lse_shape

# Positions of queries and of keys in a block, warps and stages, of each kernel: of those that were tried, the
# fastest on an H100 for sequences of 1024 with heads of 80. A block of keys is a multiple of one of queries
# in the gradient of keys; all blocks of queries divide those that `lse_shape` counts in.
FORWARD = (64, 64, 4, 3)
QUERY_GRADIENT = (64, 64, 4, 2)
KEY_GRADIENT = (64, 64, 4, 3)
ALIGNMENT = 16  # bytes


@triton.jit
def _part(start, rows, row_stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr):
    """Columns FIRST, ..., FIRST + WIDTH - 1 of some rows; zeros from TOTAL on."""
    column = FIRST + tl.arange(0, WIDTH)
    at = start + rows[:, None] * row_stride + column[None, :]
    if FIRST + WIDTH <= TOTAL:
        return tl.load(at)
    return tl.load(at, mask=column[None, :] < TOTAL, other=0.0)


@triton.jit
def _store_part(
    start, rows, row_stride, part, below, FIRST: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr
):
    """The inverse of `_part`, of rows ahead of `below`."""
    column = FIRST + tl.arange(0, WIDTH)
    at = start + rows[:, None] * row_stride + column[None, :]
    used = rows[:, None] < below
    if FIRST + WIDTH > TOTAL:
        used = used & (column[None, :] < TOTAL)
    tl.store(at, part.to(start.dtype.element_ty), mask=used)


@triton.jit
def _scores(a0, a1, b0, b1, TWO: tl.constexpr):
    """a b^T, fp32, of two parts each; of the first ones alone without TWO."""
    score = tl.dot(a0, tl.trans(b0))
    if TWO:
        score = tl.dot(a1, tl.trans(b1), score)
    return score


@triton.jit(do_not_specialize=["positions"])
def _forward_kernel(
    query, key, value, out, lse, heads, positions, rows_of_lse, scale,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = rows_of_lse // BLOCK_Q
    sequence = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q  # what takes longest comes first
    token = (sequence // heads).to(tl.int64) * positions
    row = token * heads + sequence % heads
    query += row * K
    key += row * K
    value += row * VALUE_STRIDE
    n = first + tl.arange(0, BLOCK_Q)
    rows = tl.minimum(n, positions - 1)
    q0 = _part(query, rows, heads * K, 0, K0, K)
    q1 = _part(query, rows, heads * K, K0, K1, K) if K1 else q0
    most = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    y0 = tl.zeros((BLOCK_Q, V0), tl.float32)
    y1 = tl.zeros((BLOCK_Q, V1 if V1 else 16), tl.float32)
    seen = tl.minimum(first, positions) // BLOCK_K * BLOCK_K  # keys that all queries of the block see
    for start in range(0, seen, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        most, total, y0, y1 = _attend_to_keys(
            q0, q1, key, value, m, m, n, heads, scale, most, total, y0, y1,
            K, K0, K1, V, V0, V1, VALUE_STRIDE, False,
        )  # fmt: skip
    for start in range(seen, tl.minimum(first + BLOCK_Q, positions), BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        most, total, y0, y1 = _attend_to_keys(
            q0, q1, key, value, m, tl.minimum(m, positions - 1), n, heads, scale, most, total, y0, y1,
            K, K0, K1, V, V0, V1, VALUE_STRIDE, True,
        )  # fmt: skip
    inverse = 1.0 / total
    out += row * V
    _store_part(out, n, heads * V, y0 * inverse[:, None], positions, 0, V0, V)
    if V1:
        _store_part(out, n, heads * V, y1 * inverse[:, None], positions, V0, V1, V)
    log = tl.where(n < positions, most + tl.log2(total), float("inf"))
    tl.store(lse + sequence.to(tl.int64) * rows_of_lse + n, log)


@triton.jit
def _attend_to_keys(
    q0, q1, key, value, m, rows, n, heads, scale, most, total, y0, y1,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, VALUE_STRIDE: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and output of queries n, with the keys m, which are read at `rows`."""
    k0 = _part(key, rows, heads * K, 0, K0, K)
    k1 = _part(key, rows, heads * K, K0, K1, K) if K1 else k0
    score = _scores(q0, q1, k0, k1, K1 > 0)
    if DIAGONAL:
        score = tl.where(m[None, :] <= n[:, None], score, float("-inf"))
    most, total, weight, shrink = _softmax(score, most, total, scale)
    weight = weight.to(value.dtype.element_ty)
    v0 = _part(value, rows, heads * VALUE_STRIDE, 0, V0, V)
    y0 = tl.dot(weight, v0, y0 * shrink[:, None])
    if V1:
        v1 = _part(value, rows, heads * VALUE_STRIDE, V0, V1, V)
        y1 = tl.dot(weight, v1, y1 * shrink[:, None])
    return most, total, y0, y1


@triton.jit
def _softmax(score, most, total, scale):
    """The running maximum and sum with a block of scores, its weights, and the factor of what was before."""
    above = tl.maximum(most, tl.max(score, axis=1) * scale)
    shrink = tl.exp2(most - above)
    weight = tl.exp2(score * scale - above[:, None])
    return above, total * shrink + tl.sum(weight, axis=1), weight, shrink


@triton.jit(do_not_specialize=["positions"])
def _query_gradient_kernel(
    query, key, value, out, lse, dout, dquery, delta, heads, positions, rows_of_lse, scale, dscale,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = rows_of_lse // BLOCK_Q
    sequence = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    token = (sequence // heads).to(tl.int64) * positions
    row = token * heads + sequence % heads
    query += row * K
    key += row * K
    value += row * VALUE_STRIDE
    n = first + tl.arange(0, BLOCK_Q)
    rows = tl.minimum(n, positions - 1)
    q0 = _part(query, rows, heads * K, 0, K0, K)
    q1 = _part(query, rows, heads * K, K0, K1, K) if K1 else q0
    do0 = _part(dout + row * V, rows, heads * V, 0, V0, V)
    do1 = _part(dout + row * V, rows, heads * V, V0, V1, V) if V1 else do0
    o0 = _part(out + row * V, rows, heads * V, 0, V0, V)
    inner = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), axis=1)
    if V1:
        o1 = _part(out + row * V, rows, heads * V, V0, V1, V)
        inner += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), axis=1)
    at = sequence.to(tl.int64) * rows_of_lse + n
    tl.store(delta + at, inner)
    log = tl.load(lse + at)
    dq0 = tl.zeros((BLOCK_Q, K0), tl.float32)
    dq1 = tl.zeros((BLOCK_Q, K1 if K1 else 16), tl.float32)
    seen = tl.minimum(first, positions) // BLOCK_K * BLOCK_K
    for start in range(0, seen, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        dq0, dq1 = _query_gradients(
            q0, q1, do0, do1, key, value, m, m, n, heads, scale, log, inner, dq0, dq1,
            K, K0, K1, V, V0, V1, VALUE_STRIDE, False,
        )  # fmt: skip
    for start in range(seen, tl.minimum(first + BLOCK_Q, positions), BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        dq0, dq1 = _query_gradients(
            q0, q1, do0, do1, key, value, m, tl.minimum(m, positions - 1), n, heads, scale, log, inner,
            dq0, dq1, K, K0, K1, V, V0, V1, VALUE_STRIDE, True,
        )  # fmt: skip
    dquery += row * K
    _store_part(dquery, n, heads * K, dq0 * dscale, positions, 0, K0, K)
    if K1:
        _store_part(dquery, n, heads * K, dq1 * dscale, positions, K0, K1, K)


@triton.jit
def _query_gradients(
    q0, q1, do0, do1, key, value, m, rows, n, heads, scale, log, inner, dq0, dq1,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, VALUE_STRIDE: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Unscaled gradients of queries n, with what the keys m add, which are read at `rows`."""
    k0 = _part(key, rows, heads * K, 0, K0, K)
    k1 = _part(key, rows, heads * K, K0, K1, K) if K1 else k0
    v0 = _part(value, rows, heads * VALUE_STRIDE, 0, V0, V)
    v1 = _part(value, rows, heads * VALUE_STRIDE, V0, V1, V) if V1 else v0
    score = _scores(q0, q1, k0, k1, K1 > 0)
    dweight = _scores(do0, do1, v0, v1, V1 > 0)
    weight = tl.exp2(score * scale - log[:, None])
    dscore = weight * (dweight - inner[:, None])
    if DIAGONAL:
        dscore = tl.where(m[None, :] <= n[:, None], dscore, 0.0)
    dscore = dscore.to(key.dtype.element_ty)
    dq0 = tl.dot(dscore, k0, dq0)
    if K1:
        dq1 = tl.dot(dscore, k1, dq1)
    return dq0, dq1


@triton.jit(do_not_specialize=["positions"])
def _key_gradient_kernel(
    query, key, value, lse, dout, delta, dkey, dvalue, heads, positions, rows_of_lse, scale, dscale,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(positions, BLOCK_K)
    sequence = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_K
    token = (sequence // heads).to(tl.int64) * positions
    row = token * heads + sequence % heads
    m = first + tl.arange(0, BLOCK_K)
    rows = tl.minimum(m, positions - 1)
    k0 = _part(key + row * K, rows, heads * K, 0, K0, K)
    k1 = _part(key + row * K, rows, heads * K, K0, K1, K) if K1 else k0
    v0 = _part(value + row * VALUE_STRIDE, rows, heads * VALUE_STRIDE, 0, V0, V)
    v1 = _part(value + row * VALUE_STRIDE, rows, heads * VALUE_STRIDE, V0, V1, V) if V1 else v0
    query += row * K
    dout += row * V
    lse += sequence.to(tl.int64) * rows_of_lse
    delta += sequence.to(tl.int64) * rows_of_lse
    dk0 = tl.zeros((BLOCK_K, K0), tl.float32)
    dk1 = tl.zeros((BLOCK_K, K1 if K1 else 16), tl.float32)
    dv0 = tl.zeros((BLOCK_K, V0), tl.float32)
    dv1 = tl.zeros((BLOCK_K, V1 if V1 else 16), tl.float32)
    seen = first + BLOCK_K  # by queries from here on
    for start in range(first, tl.minimum(seen, positions), BLOCK_Q):
        n = start + tl.arange(0, BLOCK_Q)
        dk0, dk1, dv0, dv1 = _key_gradients(
            k0, k1, v0, v1, query, dout, lse, delta, m, n, positions, heads, scale, dk0, dk1, dv0, dv1,
            K, K0, K1, V, V0, V1, True,
        )  # fmt: skip
    for start in range(seen, positions, BLOCK_Q):
        n = start + tl.arange(0, BLOCK_Q)
        dk0, dk1, dv0, dv1 = _key_gradients(
            k0, k1, v0, v1, query, dout, lse, delta, m, n, positions, heads, scale, dk0, dk1, dv0, dv1,
            K, K0, K1, V, V0, V1, False,
        )  # fmt: skip
    dkey += row * K
    dvalue += row * VALUE_STRIDE
    _store_part(dkey, m, heads * K, dk0 * dscale, positions, 0, K0, K)
    _store_part(dvalue, m, heads * VALUE_STRIDE, dv0, positions, 0, V0, V)
    if K1:
        _store_part(dkey, m, heads * K, dk1 * dscale, positions, K0, K1, K)
    if V1:
        _store_part(dvalue, m, heads * VALUE_STRIDE, dv1, positions, V0, V1, V)


@triton.jit
def _key_gradients(
    k0, k1, v0, v1, query, dout, lse, delta, m, n, positions, heads, scale, dk0, dk1, dv0, dv1,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Unscaled gradients of keys m, and those of their values, with what the queries n add."""
    rows = tl.minimum(n, positions - 1)
    q0 = _part(query, rows, heads * K, 0, K0, K)
    q1 = _part(query, rows, heads * K, K0, K1, K) if K1 else q0
    do0 = _part(dout, rows, heads * V, 0, V0, V)
    do1 = _part(dout, rows, heads * V, V0, V1, V) if V1 else do0
    log = tl.load(lse + n)
    inner = tl.load(delta + n)
    score = _scores(k0, k1, q0, q1, K1 > 0)
    weight = tl.exp2(score * scale - log[None, :])
    if DIAGONAL:
        weight = tl.where(m[:, None] <= n[None, :], weight, 0.0)
    rounded = weight.to(do0.dtype)
    dv0 = tl.dot(rounded, do0, dv0)
    if V1:
        dv1 = tl.dot(rounded, do1, dv1)
    dweight = _scores(v0, v1, do0, do1, V1 > 0)
    dscore = (weight * (dweight - inner[None, :])).to(q0.dtype)
    dk0 = tl.dot(dscore, q0, dk0)
    if K1:
        dk1 = tl.dot(dscore, q1, dk1)
    return dk0, dk1, dv0, dv1


def forward(query_BNHK: Tensor, key_BNHK: Tensor, value_BNHV: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    _, positions, heads, width = query_BNHK.shape
    query_BNHK, key_BNHK, value_BNHV = _rows(query_BNHK), _rows(key_BNHK), _strided_rows(value_BNHV)
    out = torch.empty(value_BNHV.shape, dtype=query_BNHK.dtype, device=query_BNHK.device)
    lse = torch.empty(lse_shape(query_BNHK), dtype=torch.float32, device=query_BNHK.device)
    if out.numel():
        block_q, block_k, warps, stages = FORWARD
        _forward_kernel[(lse.numel() // block_q,)](
            query_BNHK, key_BNHK, value_BNHV, out, lse,
            heads, positions, lse.shape[2], width**-0.5 * math.log2(math.e), **_widths(width, value_BNHV),
            BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def backward(
    dout_BNHV: Tensor,
    query_BNHK: Tensor,
    key_BNHK: Tensor,
    value_BNHV: Tensor,
    out_BNHV: Tensor,
    lse_BHL: Tensor,
    dvalue_BNHV: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    batch, positions, heads, width = query_BNHK.shape
    dquery = torch.empty(query_BNHK.shape, dtype=query_BNHK.dtype, device=query_BNHK.device)
    dkey = torch.empty(key_BNHK.shape, dtype=key_BNHK.dtype, device=key_BNHK.device)
    if not out_BNHV.numel():
        return dquery.zero_(), dkey.zero_()
    value_BNHV = _strided_rows(value_BNHV)
    assert dvalue_BNHV.stride() == value_BNHV.stride()
    query_BNHK, key_BNHK, dout_BNHV, out_BNHV = map(_rows, (query_BNHK, key_BNHK, dout_BNHV, out_BNHV))
    delta = torch.empty_like(lse_BHL)
    scale = width**-0.5
    rest = heads, positions, lse_BHL.shape[2], scale * math.log2(math.e), scale
    block_q, block_k, warps, stages = QUERY_GRADIENT
    _query_gradient_kernel[(lse_BHL.numel() // block_q,)](
        query_BNHK, key_BNHK, value_BNHV, out_BNHV, lse_BHL, dout_BNHV, dquery, delta, *rest,
        **_widths(width, value_BNHV), BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_q, block_k, warps, stages = KEY_GRADIENT
    _key_gradient_kernel[(batch * heads * triton.cdiv(positions, block_k),)](
        query_BNHK, key_BNHK, value_BNHV, lse_BHL, dout_BNHV, delta, dkey, dvalue_BNHV, *rest,
        **_widths(width, value_BNHV), BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dquery, dkey


def _rows(x: Tensor) -> Tensor:
    """x, contiguous, with rows that begin at multiples of 16 bytes; they are as long as some of these."""
    assert x.shape[-1] * x.element_size() % ALIGNMENT == 0
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _strided_rows(x_BNHV: Tensor) -> Tensor:
    """x if its heads lie equally far from each other throughout, as in a slice of their last dim."""
    _, positions, heads, _ = x_BNHV.shape
    stride = x_BNHV.stride(2)
    regular = x_BNHV.stride() == (positions * heads * stride, heads * stride, stride, 1)
    aligned = stride * x_BNHV.element_size() % ALIGNMENT == 0 == x_BNHV.data_ptr() % ALIGNMENT
    return x_BNHV if regular and aligned else _rows(x_BNHV)


def _widths(width: int, value_BNHV: Tensor) -> dict[str, int]:
    parts = *_parts(width), *_parts(value_BNHV.shape[-1])
    names = ("K0", "K1", "V0", "V1")
    return {
        "K": width,
        "V": value_BNHV.shape[-1],
        "VALUE_STRIDE": value_BNHV.stride(2),
        **dict(zip(names, parts, strict=True)),
    }


def _parts(width: int) -> tuple[int, int]:
    """Two powers of two of at least 16, or one and 0, that hold a width with few zeros."""
    first = max(16, 1 << width.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(width - first)) if width > first else 0
