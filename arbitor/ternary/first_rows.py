"""A ternary linear on the first rows of a tensor, whose number only the device knows.

It is the linear of one expert whose rows end there: programs for the others exit at once, so that neither the
host waits for the number nor a step's shapes depend on it. Shape letters: N rows, I in, O out.
"""

from typing import Any

import torch
from torch import Tensor, nn

from arbitor.ops.activations import scale_tokens
from arbitor.ops.backend import uses_triton
from arbitor.ops.expert_linear import expert_linear, expert_linear_backward, grouped_outer
from arbitor.ternary.capture import GradientCapture, outside_autocast, wants_weights
from arbitor.ternary.layers import NormedMatrix, TernaryLinear, capture_linear, output_dtype, root_of


class _FirstRowsMatmul(torch.autograd.Function):
    """Forward and input gradient of a ternary linear on the first rows of x [N, I]."""

    @staticmethod
    def forward(
        ctx: Any,
        root: Tensor | None,
        x: Tensor,
        count: Tensor,
        module: NormedMatrix,
        quantize: bool,
        out_dtype: torch.dtype,
        squared: bool,
    ) -> Tensor:
        packed, exponent = module.T_packed, module.E
        y, codes, scale, rstd = expert_linear(
            x,
            count,
            packed[None],
            exponent[None],
            module.group,
            module.input_norm,
            quantize,
            out_dtype,
            squared,
        )
        ctx.module = module
        ctx.squared = squared
        saved_codes = codes if module.capture is not None else None
        ctx.save_for_backward(x, count, rstd, packed, exponent, saved_codes, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, count, rstd, packed, exponent, codes, scale = ctx.saved_tensors
        module = ctx.module
        if module.capture is not None and codes is not None and wants_weights(ctx):
            _capture(module.capture, codes, scale, dy, count)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = expert_linear_backward(
                dy, x, rstd, count, packed[None], exponent[None], module.group, module.input_norm, ctx.squared
            )
        return None, dx, None, None, None, None, None


def _capture(capture: GradientCapture, codes: Tensor, scale: Tensor, dy: Tensor, count: Tensor) -> None:
    """As `capture_linear`, where dy is 0 behind the first rows; if it can, it leaves their products out."""
    # On a GPU the library has grouped products that do not wait for the host of bf16 only.
    grouped = dy.dtype == torch.bfloat16 if dy.is_cuda else dy.dtype == torch.float32
    if grouped and uses_triton(dy) and capture.forms_product(codes, dy):
        with outside_autocast():
            capture.add_dense(grouped_outer(dy, scale_tokens(codes, scale, dy.dtype), count)[0])
    else:
        capture_linear(capture, codes, scale, dy)


def on_first_rows(linear: nn.Module, x_NI: Tensor, count: Tensor | None, **options: Any) -> Tensor:
    """linear(x) where only the first rows' results are wanted.

    Args:
        linear: a module from [N, I] to [N, O].
        x_NI: float [N, I].
        count: int32 [1] on the same device, how many rows; None are all. The gradient that comes back for the
            others must be 0.
        options: of the linear's forward.

    Returns:
        [N, O]. For a plain ternary linear the others' results are 0 and cost nothing; for any other module
        they are what it gives.
    """
    if count is None or type(linear) is not TernaryLinear:
        return linear(x_NI, **options)
    return linear(x_NI, count=count, **options)


def first_rows_matmul(
    module: NormedMatrix, x_NI: Tensor, count: Tensor, quantize: bool, squared: bool
) -> Tensor:
    """The first rows of x float [N, I] times the matrix of `module`, and zeros: [N, O]; captured."""
    root, dtype = root_of(module), output_dtype(x_NI)
    return _FirstRowsMatmul.apply(root, x_NI, count, module, quantize, dtype, squared)
