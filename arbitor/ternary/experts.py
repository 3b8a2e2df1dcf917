"""TernaryExperts: one linear for each expert, in one packed tensor, for tokens that are sorted by expert.

Shape letters: M rows, I in, O out, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops.expert_linear import expert_linear, expert_linear_backward
from arbitor.ternary.capture import wants_weights
from arbitor.ternary.layers import output_dtype, root_of, scaled_gradient
from arbitor.ternary.tensor import TernaryScaleTensor, TScaleType


class _ExpertMatmul(torch.autograd.Function):
    """Forward and input gradient of a linear by expert on x [M, I]."""

    @staticmethod
    def forward(
        ctx: Any,
        root: Tensor | None,
        x: Tensor,
        offsets: Tensor,
        module: "TernaryExperts",
        quantize: bool,
        out_dtype: torch.dtype,
        squared: bool,
    ) -> Tensor:
        packed, exponent = module.T_packed, module.E
        y, codes, scale, rstd = expert_linear(
            x, offsets, packed, exponent, module.group, module.input_norm, quantize, out_dtype, squared
        )
        ctx.module = module
        ctx.squared = squared
        saved_codes = codes if module.capture is not None else None
        ctx.save_for_backward(x, offsets, rstd, packed, exponent, saved_codes, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, offsets, rstd, packed, exponent, codes, scale = ctx.saved_tensors
        module = ctx.module
        if module.capture is not None and codes is not None and wants_weights(ctx):
            module.capture.add_experts(codes, scaled_gradient(dy, scale), offsets)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = expert_linear_backward(
                dy, x, rstd, offsets, packed, exponent, module.group, module.input_norm, ctx.squared
            )
        return None, dx, None, None, None, None, None


class TernaryExperts(TernaryScaleTensor):
    """y = quantize(rms_norm(x)) W_e^T with the matrix of each row's expert; no gain, no bias.

    Args:
        num_experts: E.
        in_features, out_features: sizes of each expert's matrix.
        tscale: weights that share a scale exponent.
        input_norm: divide every token by its root mean square first.
        device: where to create the parameters.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        tscale: TScaleType | str = TScaleType.ROW,
        input_norm: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, tscale=tscale, leading_shape=(num_experts,), device=device
        )
        self.input_norm = input_norm

    def forward(
        self, x_MI: Tensor, offsets_E: Tensor, quantize: bool = True, squared: bool = False
    ) -> Tensor:
        """Apply to rows that are sorted by expert.

        Args:
            x_MI: float [M, I], the rows of expert 0 first.
            offsets_E: int32 [E] on the same device, the end of each expert's rows. Rows behind the last one's
                have undefined results, and a gradient of 0 must come back for them.
            quantize: int8 activations per token; False keeps them float.
            squared: apply to relu(x)^2 in place of x.

        Returns:
            [M, O] in autocast's dtype where autocast is on, else in the dtype of x.
        """
        if x_MI.dim() != 2 or x_MI.shape[1] != self.in_features:
            raise ValueError(f"expected [rows, {self.in_features}], got {tuple(x_MI.shape)}")
        if offsets_E.dtype != torch.int32 or offsets_E.shape != self.leading_shape:
            raise ValueError(
                f"expected int32 offsets of shape {self.leading_shape}, got {offsets_E.dtype} "
                f"{tuple(offsets_E.shape)}"
            )
        return _ExpertMatmul.apply(
            root_of(self), x_MI, offsets_E, self, quantize, output_dtype(x_MI), squared
        )
