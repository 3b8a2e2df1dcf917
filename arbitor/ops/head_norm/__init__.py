"""RMS norm and rotation of attention's queries and keys: `norm_and_rotate`, `keys`.

Shape letters: B batch, N positions, H heads, P plain (not rotary) dims of a head, R rotary dims, K = P + R,
V value dims of a head, U = P + V.
"""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.head_norm import cpu, reference
from arbitor.ops.head_norm.reference import RMS_EPS, rms_norm, rotate
from arbitor.ops.registry import register

__all__ = ["RMS_EPS", "keys_and_values", "norm_and_rotate", "rms_norm", "rotate"]


def norm_and_rotate(x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """RMS norm over K, then rotation of the last R dims.

    Args:
        x_BNHK: float.
        cos_NR, sin_NR: fp32 [N, R/2], of the angles.

    Returns:
        [B, N, H, K] in the dtype of x.
    """
    if _fused(x_BNHK):
        return _NormAndRotate.apply(x_BNHK, cos_NR, sin_NR)
    return reference.norm_and_rotate(x_BNHK, cos_NR, sin_NR)


def keys_and_values(up_BNHU: Tensor, shared_BNR: Tensor, plain: int) -> tuple[Tensor, Tensor]:
    """Keys of a plain part that is normalised and a rotary part that all heads share; the values beside them.

    Args:
        up_BNHU: float, the plain parts of the keys, then the values.
        shared_BNR: the rotary part, normalised and rotated.
        plain: P.

    Returns:
        [B, N, H, K] in the dtype of `up_BNHU`, and a view of it [B, N, H, V].
    """
    if _fused(up_BNHU):
        return _KeysAndValues.apply(up_BNHU, shared_BNR, plain)
    return reference.keys(up_BNHU, shared_BNR, plain), up_BNHU[..., plain:]


def _fused(x: Tensor) -> bool:
    """Whether kernels run or, on a CPU, closed gradients, which take half of autograd's passes.

    Where torch compiles the model, it fuses the reference itself.
    """
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    return uses_triton(x) or (x.device.type == "cpu" and x.dtype == torch.float32)


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
        ctx.save_for_backward(x_BNHK, cos_NR, sin_NR)
        return _rotate(x_BNHK, cos_NR, sin_NR)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BNHK: Tensor) -> tuple[Tensor, None, None]:
        return _rotate_backward(dy_BNHK, *ctx.saved_tensors), None, None


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up_BNHU: Tensor, shared_BNR: Tensor, plain: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(up_BNHU)
        ctx.shared_dtype = shared_BNR.dtype
        return _keys(up_BNHU, shared_BNR, plain), up_BNHU[..., plain:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dkey_BNHK: Tensor, dvalue_BNHV: Tensor) -> tuple[Tensor, Tensor, None]:
        (up_BNHU,) = ctx.saved_tensors
        return *_keys_backward(dkey_BNHK, dvalue_BNHV, up_BNHU, ctx.shared_dtype), None


def _kernels(x: Tensor) -> Any:
    """The module whose functions compute for x."""
    if x.dtype != torch.float64 and uses_triton(x):
        from arbitor.ops.head_norm import triton

        return triton
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return cpu
    return reference


_rotate = register(
    "head_norm(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    lambda x, cos, sin: _kernels(x).norm_and_rotate(x, cos, sin),
    lambda x, cos, sin: x.new_empty(x.shape),
)
_rotate_backward = register(
    "head_norm_backward(Tensor dy, Tensor x, Tensor cos, Tensor sin) -> Tensor",
    lambda dy, x, cos, sin: _kernels(x).norm_and_rotate_backward(dy, x, cos, sin),
    lambda dy, x, cos, sin: x.new_empty(x.shape),
)
_keys = register(
    "head_keys(Tensor up, Tensor shared, int plain) -> Tensor",
    lambda up, shared, plain: _kernels(up).keys(up, shared, plain),
    lambda up, shared, plain: up.new_empty((*up.shape[:-1], plain + shared.shape[-1])),
)
_keys_backward = register(
    "head_keys_backward(Tensor dkey, Tensor dvalue, Tensor up, ScalarType shared_dtype) -> (Tensor, Tensor)",
    lambda dkey, dvalue, up, shared_dtype: _kernels(up).keys_backward(dkey, dvalue, up, shared_dtype),
    lambda dkey, dvalue, up, shared_dtype: (
        up.new_empty(up.shape),
        up.new_empty((*up.shape[:2], dkey.shape[-1] + dvalue.shape[-1] - up.shape[-1]), dtype=shared_dtype),
    ),
)
