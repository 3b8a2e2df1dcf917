"""The passes around a linear's products on a CPU, for fp32: the bits of the reference in fewer passes.

Compiled, they go over memory once. Else they go over some tokens at a time: what lies between two passes over
these stays in a core's cache, and no tensor of all tokens is made for it.

Shape letters: N tokens, I in, O out.
"""

import torch
from torch import Tensor

from arbitor.ops import native
from arbitor.ops.activations import reference
from arbitor.ops.rows import row_parts


def quantize(x: Tensor, input_norm: bool, squared: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.normalize_and_quantize` with codes in int8.

    Args:
        x: fp32 [N, I].
        input_norm, squared: as there.

    Returns:
        codes int8 [N, I]; scale fp32 [N, 1]; rstd fp32 [N, 1].
    """
    smallest = torch.finfo(torch.float32).tiny * reference.CODE_SCALE
    if (compiled := native.passes((x, torch.float32))) is not None:
        threads = torch.get_num_threads()
        if squared:
            given, x = x, torch.empty_like(x)
            compiled.squared_relu(given.data_ptr(), x.data_ptr(), *x.shape, threads)
        norms = torch.linalg.vector_norm(x, dim=-1) if input_norm else None
        codes = torch.empty_like(x, dtype=torch.int8)
        scale, rstd = x.new_empty((len(x), 1)), x.new_empty((len(x), 1))
        compiled.quantize(
            x.data_ptr(), None if norms is None else norms.data_ptr(), codes.data_ptr(), scale.data_ptr(),
            rstd.data_ptr(), *x.shape, reference.CODE_SCALE, smallest, reference.RMS_EPS, threads,
        )  # fmt: skip
        return codes, scale, rstd
    codes = torch.empty_like(x, dtype=torch.int8)
    absmax, norm = x.new_empty((2, x.shape[0], 1))
    for x_part, codes_part, absmax_part, norm_part in row_parts(x, codes, absmax, norm):
        squares = _squared_relu(x_part) if squared else None
        read = x_part if squares is None else squares
        if input_norm:
            torch.linalg.vector_norm(read, dim=-1, keepdim=True, out=norm_part)
        torch.amax(read, dim=-1, keepdim=True, out=absmax_part)
        if squares is None:  # a second reduction is faster than a tensor of magnitudes
            torch.maximum(absmax_part, read.amin(dim=-1, keepdim=True).neg_(), out=absmax_part)
        factor = reference.CODE_SCALE / absmax_part.clamp_min_(smallest)
        scaled = x_part * factor if squares is None else squares.mul_(factor)
        codes_part.copy_(scaled.round_())
    if input_norm:
        rstd = reference.rstd_of(norm, x.shape[-1])
    else:
        rstd = torch.ones_like(norm)
    return codes, absmax.mul_(rstd).div_(reference.CODE_SCALE), rstd


def round_scaled(dy: Tensor, scale: Tensor) -> Tensor:
    """fp32 dy [N, O] times scale [N, 1], rounded to bf16."""
    rounded = torch.empty_like(dy, dtype=torch.bfloat16)
    compiled = native.passes((dy, torch.float32), (scale, torch.float32))
    if compiled is not None and scale.numel() == len(dy):
        compiled.round_scaled(
            dy.data_ptr(), scale.data_ptr(), rounded.data_ptr(), *dy.shape, torch.get_num_threads()
        )
        return rounded
    for dy_part, scale_part, rounded_part in row_parts(dy, scale, rounded):
        rounded_part.copy_(dy_part * scale_part)
    return rounded


def input_gradient(dxn: Tensor, x: Tensor, rstd: Tensor, input_norm: bool, squared: bool = False) -> Tensor:
    """See `reference.input_gradient`; dxn [N, I] of fp32 or bf16 is kept."""
    narrow = dxn.dtype == torch.bfloat16
    wanted = torch.bfloat16 if narrow else torch.float32
    compiled = native.passes((dxn, wanted), (x, torch.float32), (rstd, torch.float32))
    if compiled is not None and rstd.numel() == len(x) and dxn.shape == x.shape:
        threads = torch.get_num_threads()
        dx = torch.empty_like(x) if narrow else dxn.clone()
        products = torch.empty_like(x) if input_norm else None
        compiled.widen_products(
            dxn.data_ptr() if narrow else None, x.data_ptr(), dx.data_ptr(),
            None if products is None else products.data_ptr(), *x.shape, squared, threads,
        )  # fmt: skip
        sums = None if products is None else products.sum(dim=-1)
        compiled.through_norm(
            dx.data_ptr(), x.data_ptr(), rstd.data_ptr(), None if sums is None else sums.data_ptr(), *x.shape,
            squared, threads,
        )  # fmt: skip
        return dx
    dx = torch.empty_like(x)
    for x_part, dxn_part, rstd_part, out in row_parts(x, dxn, rstd, dx):
        out.copy_(dxn_part)
        positive = x_part.clamp_min(0) if squared else None
        if input_norm:
            normed = x_part if positive is None else positive * positive
            reference.norm_backward(out, normed, rstd_part)
        if positive is not None:
            out.mul_(positive).mul_(2)
    return dx


def _squared_relu(x: Tensor) -> Tensor:
    """`reference.squared_relu` with one new tensor."""
    positive = x.clamp_min(0)
    return positive.mul_(positive)
