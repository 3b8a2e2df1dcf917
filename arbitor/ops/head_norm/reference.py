"""RMS norm of the queries and keys of attention heads, with the rotation of their rotary part.

The forwards are written so that autograd differentiates them; the backwards are the same gradients in closed
form, for the kernels' sake.

Shape letters: B batch, N positions, H heads, P plain (not rotary) dims of a head, R rotary dims (the pairs
are (i, i + R/2)), K = P + R, V value dims of a head, U = P + V, C latent, E = C + R.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-6


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., R] by angles whose cos and sin broadcast to [..., R/2]; at least fp32."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


def norm_and_rotate(x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """See `arbitor.ops.head_norm.norm_and_rotate`."""
    rotary = 2 * cos_NR.shape[-1]
    plain_BNHP, rotary_BNHR = rms_norm(x_BNHK).split([x_BNHK.shape[-1] - rotary, rotary], dim=-1)
    rotary_BNHR = rotate(rotary_BNHR, cos_NR[:, None], sin_NR[:, None])
    return torch.cat([plain_BNHP, rotary_BNHR], dim=-1).to(x_BNHK.dtype)


def norm_and_rotate_backward(dy_BNHK: Tensor, x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Gradient of x_BNHK, in its dtype."""
    rotary = 2 * cos_NR.shape[-1]
    dy = _wide(dy_BNHK)
    plain, turned = dy.split([dy.shape[-1] - rotary, rotary], dim=-1)
    turned = rotate(turned, cos_NR[:, None], -sin_NR[:, None])
    return _norm_backward(torch.cat([plain, turned], dim=-1), x_BNHK)


def split_latent(
    down_BNE: Tensor, cos_NR: Tensor, sin_NR: Tensor, latent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `arbitor.ops.head_norm.split_latent`; the rotary part as it was comes second."""
    latent_BNC, rotary_BNR = down_BNE.split([latent, down_BNE.shape[-1] - latent], dim=-1)
    shared_BNR = norm_and_rotate(rotary_BNR[:, :, None], cos_NR, sin_NR)[:, :, 0]
    return latent_BNC.contiguous(), rotary_BNR.contiguous(), shared_BNR.contiguous()


def split_latent_backward(
    dlatent_BNC: Tensor, dshared_BNR: Tensor, rotary_BNR: Tensor, cos_NR: Tensor, sin_NR: Tensor
) -> Tensor:
    """Gradient of down_BNE, in the dtype of its rotary part."""
    drotary_BNR = norm_and_rotate_backward(dshared_BNR[:, :, None], rotary_BNR[:, :, None], cos_NR, sin_NR)
    return torch.cat([dlatent_BNC.to(rotary_BNR.dtype), drotary_BNR[:, :, 0]], dim=-1)


def keys(up_BNHU: Tensor, shared_BNR: Tensor, plain: int) -> Tensor:
    """See `arbitor.ops.head_norm.keys`."""
    shared_BNHR = shared_BNR[:, :, None].expand(-1, -1, up_BNHU.shape[2], -1)
    return torch.cat([rms_norm(up_BNHU[..., :plain]), shared_BNHR], dim=-1).to(up_BNHU.dtype)


def keys_backward(
    dkey_BNHK: Tensor, dvalue_BNHV: Tensor, up_BNHU: Tensor, shared_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of up_BNHU = [plain part of the key; value] and of shared_BNR."""
    plain = up_BNHU.shape[-1] - dvalue_BNHV.shape[-1]
    dup_BNHU = up_BNHU.new_empty(up_BNHU.shape)
    dup_BNHU[..., plain:] = dvalue_BNHV
    return dup_BNHU, plain_backward(dkey_BNHK, up_BNHU, dup_BNHU, plain, shared_dtype)


def plain_backward(
    dkey_BNHK: Tensor, up_BNHU: Tensor, dup_BNHU: Tensor, plain: int, shared_dtype: torch.dtype
) -> Tensor:
    """Gradient of shared_BNR; that of the keys' plain part is written into `dup_BNHU`, and no more of it."""
    dup_BNHU[..., :plain] = _norm_backward(_wide(dkey_BNHK[..., :plain]), up_BNHU[..., :plain])
    return _wide(dkey_BNHK[..., plain:]).sum(dim=2).to(shared_dtype)


def _norm_backward(dxn: Tensor, x: Tensor) -> Tensor:
    wide = _wide(x)
    rstd = (wide.square().mean(dim=-1, keepdim=True) + RMS_EPS).rsqrt()
    mean = (dxn * wide).mean(dim=-1, keepdim=True)
    return (rstd * dxn - wide * (rstd**3 * mean)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
