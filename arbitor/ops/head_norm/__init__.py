"""RMS norm and rotation of attention's queries and keys.

Shape letters: B batch, N positions, H heads, P plain (not rotary) dims of a head, R rotary dims, K = P + R,
V value dims of a head, U = P + V, C latent, E = C + R.
"""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.head_norm import cpu, reference
from arbitor.ops.head_norm.reference import RMS_EPS, rms_norm, rotate
from arbitor.ops.registry import register

__all__ = ["RMS_EPS", "keys_and_values", "norm_and_rotate", "rms_norm", "rotate", "split_latent"]


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


def split_latent(down_BNE: Tensor, cos_NR: Tensor, sin_NR: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """A latent, and the rotary part of keys beside it, which is normalised and rotated.

    Args:
        down_BNE: float.
        cos_NR, sin_NR: fp32 [N, R/2], of the angles.
        latent: C.

    Returns:
        [B, N, C] and [B, N, R] in the dtype of `down_BNE`.
    """
    if down_BNE.dtype != torch.float64 and not torch.compiler.is_compiling() and uses_triton(down_BNE):
        return _SplitLatent.apply(down_BNE, cos_NR, sin_NR, latent)
    latent_BNC, rotary_BNR = down_BNE.split([latent, down_BNE.shape[-1] - latent], dim=-1)
    return latent_BNC, norm_and_rotate(rotary_BNR[:, :, None], cos_NR, sin_NR)[:, :, 0]


def keys_alone(up_BNHU: Tensor, shared_BNR: Tensor, plain: int) -> Tensor:
    """The keys of `keys_and_values`, for functions with a backward of their own."""
    return _keys(up_BNHU, shared_BNR, plain)


def keys_alone_backward(
    dkey_BNHK: Tensor, up_BNHU: Tensor, dup_BNHU: Tensor, plain: int, shared_dtype: torch.dtype
) -> Tensor:
    """Gradient of `shared_BNR`; that of the keys' plain part is written into `dup_BNHU`, the rest is not."""
    return _widely(up_BNHU).plain_backward(dkey_BNHK, up_BNHU, dup_BNHU, plain, shared_dtype)


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


class _SplitLatent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, down_BNE: Tensor, cos_NR: Tensor, sin_NR: Tensor, latent: int
    ) -> tuple[Tensor, Tensor]:
        latent_BNC, rotary_BNR, shared_BNR = _split(down_BNE, cos_NR, sin_NR, latent)
        ctx.save_for_backward(rotary_BNR, cos_NR, sin_NR)
        return latent_BNC, shared_BNR

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlatent_BNC: Tensor, dshared_BNR: Tensor) -> tuple[Tensor, None, None, None]:
        return _split_backward(dlatent_BNC, dshared_BNR, *ctx.saved_tensors), None, None, None


def _kernels(x: Tensor) -> Any:
    """The module whose functions compute for x."""
    if x.dtype != torch.float64 and uses_triton(x):
        from arbitor.ops.head_norm import triton

        return triton
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return cpu
    return reference


def _widely(x: Tensor) -> Any:
    """As `_kernels`, for what a CPU has no functions of its own for."""
    kernels = _kernels(x)
    return reference if kernels is cpu else kernels


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
_split = register(
    "head_latent(Tensor down, Tensor cos, Tensor sin, int latent) -> (Tensor, Tensor, Tensor)",
    lambda down, cos, sin, latent: _widely(down).split_latent(down, cos, sin, latent),
    lambda down, cos, sin, latent: (
        down.new_empty((*down.shape[:-1], latent)),
        down.new_empty((*down.shape[:-1], down.shape[-1] - latent)),
        down.new_empty((*down.shape[:-1], down.shape[-1] - latent)),
    ),
)
_split_backward = register(
    "head_latent_backward(Tensor dlatent, Tensor dshared, Tensor rotary, Tensor cos, Tensor sin) -> Tensor",
    lambda dlatent, dshared, rotary, cos, sin: _widely(rotary).split_latent_backward(
        dlatent, dshared, rotary, cos, sin
    ),
    lambda dlatent, dshared, rotary, cos, sin: rotary.new_empty(
        (*rotary.shape[:-1], dlatent.shape[-1] + rotary.shape[-1])
    ),
)
