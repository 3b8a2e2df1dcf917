"""The passes around a linear's products on a CPU: the bits of the reference, some tokens at a time.

What lies between two passes over a few tokens stays in a core's cache, and no tensor of all tokens is made
for it. For fp32.

Shape letters: N tokens, I in, O out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from arbitor.ops.activations import reference

ELEMENTS_AT_ONCE = 3 << 17


def quantize(x: Tensor, input_norm: bool, squared: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.normalize_and_quantize` with codes in int8.

    Args:
        x: fp32 [N, I].
        input_norm, squared: as there.

    Returns:
        codes int8 [N, I]; scale fp32 [N, 1]; rstd fp32 [N, 1].
    """
    codes = torch.empty_like(x, dtype=torch.int8)
    absmax, norm = x.new_empty((2, x.shape[0], 1))
    smallest = torch.finfo(torch.float32).tiny * reference.CODE_SCALE
    for part in token_parts(x):
        x_part = reference.squared_relu(x[part]) if squared else x[part]
        if input_norm:
            torch.linalg.vector_norm(x_part, dim=-1, keepdim=True, out=norm[part])
        magnitude = x_part if squared else x_part.abs()
        torch.amax(magnitude, dim=-1, keepdim=True, out=absmax[part])
        factor = reference.CODE_SCALE / absmax[part].clamp_min_(smallest)
        codes[part].copy_((x_part * factor).round_())
    if input_norm:
        rstd = reference.rstd_of(norm, x.shape[-1])
    else:
        rstd = torch.ones_like(norm)
    return codes, absmax.mul_(rstd).div_(reference.CODE_SCALE), rstd


def round_scaled(dy: Tensor, scale: Tensor) -> Tensor:
    """fp32 dy [N, O] times scale [N, 1], rounded to bf16."""
    rounded = torch.empty_like(dy, dtype=torch.bfloat16)
    for part in token_parts(dy):
        rounded[part].copy_(dy[part] * scale[part])
    return rounded


def input_gradient(dxn: Tensor, x: Tensor, rstd: Tensor, input_norm: bool, squared: bool = False) -> Tensor:
    """See `reference.input_gradient`; dxn [N, I] of fp32 or bf16 is kept."""
    dx = torch.empty_like(x)
    for part in token_parts(x):
        out, x_part = dx[part].copy_(dxn[part]), x[part]
        positive = x_part.clamp_min(0) if squared else None
        if input_norm:
            normed = x_part if positive is None else positive * positive
            reference.norm_backward(out, normed, rstd[part])
        if positive is not None:
            out.mul_(positive).mul_(2)
    return dx


def token_parts(x: Tensor) -> Iterator[slice]:
    """Ranges of rows of x [N, I], about equal, whose elements a cache holds."""
    size = max(1, -(-x.shape[0] // -(-x.numel() // ELEMENTS_AT_ONCE))) if x.numel() else 1
    for first in range(0, x.shape[0], size):
        yield slice(first, first + size)
