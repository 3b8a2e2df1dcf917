"""Feed-forward part of a block: squared ReLU (So et al. 2021, "Primer", section 3.1)."""

from typing import Any

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.ternary import TernaryLinear


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2, keeping one tensor and taking two passes backward where autograd would take five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return 2 * (dy * positive)


class FeedForward(nn.Module):
    """down(relu(up(h))^2); both linears RMS-normalise their own input."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.up = TernaryLinear(config.dim, config.ffn_dim, tscale=config.tscale, device=device)
        self.down = TernaryLinear(config.ffn_dim, config.dim, tscale=config.tscale, device=device)

    def forward(self, h_BND: Tensor) -> Tensor:
        """Residual stream [B, N, D] -> what is added to it, [B, N, D]."""
        return self.down(_SquaredReLU.apply(self.up(h_BND)))
