"""RMS norm and rotation of attention's heads on a CPU: the bits of the reference in fewer passes, for fp32.

Shape letters: as in the reference.
"""

import torch
from torch import Tensor

from arbitor.ops.head_norm.reference import RMS_EPS, keys, rms_norm
from arbitor.ops.rows import row_parts

__all__ = ["keys", "keys_backward", "norm_and_rotate", "norm_and_rotate_backward"]


def norm_and_rotate(x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """See `arbitor.ops.head_norm.norm_and_rotate`."""
    y_BNHK = rms_norm(x_BNHK).contiguous()
    _rotate_in_place(y_BNHK, cos_NR, sin_NR)
    return y_BNHK


def norm_and_rotate_backward(dy_BNHK: Tensor, x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Gradient of x_BNHK."""
    dx_BNHK = x_BNHK.new_empty(x_BNHK.shape)
    for x, dy, dx in row_parts(x_BNHK, dy_BNHK, dx_BNHK):
        dx.copy_(dy)
        _rotate_in_place(dx, cos_NR, -sin_NR)
        _norm_backward_in_place(dx, x)
    return dx_BNHK


def keys_backward(
    dkey_BNHK: Tensor, dvalue_BNHV: Tensor, up_BNHU: Tensor, shared_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of up_BNHU = [plain part of the key; value] and of shared_BNR."""
    plain = up_BNHU.shape[-1] - dvalue_BNHV.shape[-1]
    dup_BNHU = up_BNHU.new_empty(up_BNHU.shape)
    for up, dkey, dvalue, dup in row_parts(up_BNHU, dkey_BNHK, dvalue_BNHV, dup_BNHU):
        dplain = dup[..., :plain].copy_(dkey[..., :plain])
        _norm_backward_in_place(dplain, up[..., :plain])
        dup[..., plain:].copy_(dvalue)
    return dup_BNHU, dkey_BNHK[..., plain:].sum(dim=2).to(shared_dtype)


def _rotate_in_place(x_BNHK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> None:
    """`reference.rotate` of the last dims, as one sum of two products."""
    rotary_BNHR = x_BNHK[..., -2 * cos_NR.shape[-1] :]
    first, second = rotary_BNHR.chunk(2, dim=-1)
    crossed = torch.cat([second, first], dim=-1).mul_(torch.cat([-sin_NR, sin_NR], dim=-1)[:, None])
    rotary_BNHR.mul_(torch.cat([cos_NR, cos_NR], dim=-1)[:, None]).add_(crossed)


def _norm_backward_in_place(dxn: Tensor, x: Tensor) -> None:
    """From the gradient of x / rms(x) to that of x."""
    rstd = x.square().mean(dim=-1, keepdim=True).add_(RMS_EPS).rsqrt_()
    mean = (dxn * x).mean(dim=-1, keepdim=True)
    dxn.mul_(rstd).sub_(x * (rstd**3 * mean))
