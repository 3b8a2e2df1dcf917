"""Causal softmax attention whose keys and values come from one tensor: `attend`, `can_attend`.

Shape letters: B batch, N positions, H heads, P plain (not rotary) dims of a head, R rotary dims, K = P + R,
V value dims of a head, U = P + V, L = N in whole blocks.
"""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops.attention import reference
from arbitor.ops.backend import uses_triton
from arbitor.ops.head_norm import keys_alone, keys_alone_backward
from arbitor.ops.registry import register

__all__ = ["attend", "can_attend"]

MAX_WIDTH = 128  # of what the kernels take
VECTOR = 8  # elements in 16 bytes: the kernels read each row from a multiple of these on, see docs/kernels.md


def can_attend(query_BNHK: Tensor, up_BNHU: Tensor, shared_BNR: Tensor) -> bool:
    """Whether kernels can compute `attend` of these; elsewhere the library's fused attention does."""
    K, P = query_BNHK.shape[-1], query_BNHK.shape[-1] - shared_BNR.shape[-1]
    V = up_BNHU.shape[-1] - P
    fits = P > 0 and max(K, V) <= MAX_WIDTH and not any(width % VECTOR for width in (K, P, V))
    of_half = query_BNHK.dtype in (torch.bfloat16, torch.float16) and up_BNHU.dtype == query_BNHK.dtype
    square = query_BNHK.shape[:2] == up_BNHU.shape[:2] == shared_BNR.shape[:2]
    aligned = up_BNHU.storage_offset() % VECTOR == 0
    fits = fits and of_half and square and aligned
    return fits and not torch.compiler.is_compiling() and uses_triton(query_BNHK) and _is_tried(query_BNHK)


def attend(query_BNHK: Tensor, up_BNHU: Tensor, shared_BNR: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(K)) value over each position and those ahead of it.

    Args:
        query_BNHK: float, normalised and rotated.
        up_BNHU: the plain parts of the keys, which are normalised here, then the values.
        shared_BNR: the keys' rotary part, normalised and rotated, of all heads.

    Returns:
        [B, N, H, V] in the dtype of the query.
    """
    return _Attend.apply(query_BNHK, up_BNHU, shared_BNR)


def _is_tried(x: Tensor) -> bool:
    """Whether a GPU is a Hopper, where the kernels were tried; others may have too little shared memory."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] == 9


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BNHK: Tensor, up_BNHU: Tensor, shared_BNR: Tensor) -> Tensor:
        plain = query_BNHK.shape[-1] - shared_BNR.shape[-1]
        key_BNHK = keys_alone(up_BNHU, shared_BNR, plain)
        out_BNHV, lse_BHL = _forward(query_BNHK, key_BNHK, up_BNHU[..., plain:])
        ctx.save_for_backward(query_BNHK, key_BNHK, up_BNHU, out_BNHV, lse_BHL)
        ctx.shared_dtype = shared_BNR.dtype
        return out_BNHV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_BNHV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(dout_BNHV, *ctx.saved_tensors, ctx.shared_dtype)


def _kernels(x: Tensor) -> Any:
    """The module whose functions compute for x."""
    if x.dtype != torch.float64 and uses_triton(x):
        from arbitor.ops.attention import triton

        return triton
    return reference


def _gradients(
    dout: Tensor, query: Tensor, key: Tensor, up: Tensor, out: Tensor, lse: Tensor, shared_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the three inputs of `attend`; that of the values is written in its place in that of `up`."""
    plain = up.shape[-1] - out.shape[-1]
    up = up.reshape(-1).view(up.shape)  # of the usual strides, also of dims of size 1
    dup = torch.empty_like(up)
    dquery, dkey = _kernels(query).backward(dout, query, key, up[..., plain:], out, lse, dup[..., plain:])
    dshared = keys_alone_backward(dkey, up, dup, plain, shared_dtype)
    return dquery, dup, dshared


_forward = register(
    "attention(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)",
    lambda query, key, value: _kernels(query).forward(query, key, value),
    lambda query, key, value: (
        query.new_empty(value.shape),
        query.new_empty(reference.lse_shape(query), dtype=torch.promote_types(query.dtype, torch.float32)),
    ),
)
_backward = register(
    "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor up, Tensor out, Tensor lse, "
    "ScalarType shared_dtype) -> (Tensor, Tensor, Tensor)",
    _gradients,
    lambda dout, query, key, up, out, lse, shared_dtype: (
        query.new_empty(query.shape),
        up.new_empty(up.shape),
        query.new_empty(
            (*query.shape[:2], query.shape[-1] + out.shape[-1] - up.shape[-1]), dtype=shared_dtype
        ),
    ),
)
