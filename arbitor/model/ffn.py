"""Feed-forward part of a block: squared ReLU (So et al. 2021, "Primer", section 3.1)."""

from typing import Any

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.ops.backend import uses_triton
from arbitor.ternary import TernaryExperts, TernaryLinear
from arbitor.ternary.first_rows import on_first_rows
from arbitor.ternary.stream import Stream, read_stream


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


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, elementwise."""
    return _SquaredReLU.apply(x)


def after_squared_relu(linear: nn.Module, x: Tensor, *others: Tensor, **options: Tensor) -> Tensor:
    """linear(relu(x)^2, *others, **options), in one where that is faster.

    On a GPU a linear's kernels take the square along, and on a CPU the passes over a few tokens at a time do.
    Elsewhere it is cheaper to keep it.
    """
    in_passes = type(linear) is TernaryLinear and x.device.type == "cpu" and x.dtype == torch.float32
    if in_passes or (type(linear) in (TernaryLinear, TernaryExperts) and uses_triton(x)):
        return linear(x, *others, squared=True, **options)
    return linear(squared_relu(x), *others, **options)


class FeedForward(nn.Module):
    """down(relu(up(h))^2); both linears RMS-normalise their own input.

    Args:
        config: `dim` and `tscale`.
        device: where to make it.
        hidden: width between the linears; None is `config.ffn_dim`.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device | None = None, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = config.ffn_dim if hidden is None else hidden
        self.up = TernaryLinear(config.dim, hidden, tscale=config.tscale, device=device)
        self.down = TernaryLinear(hidden, config.dim, tscale=config.tscale, device=device)

    def forward(self, h: Tensor, count: Tensor | None = None) -> Tensor:
        """Residual stream [..., D] -> what is added to it, [..., D].

        With `count`, int32 [1], only of the first rows of a stream [N, D]; see `on_first_rows`.
        """
        if count is None:
            return self.update(h)[1]
        u = on_first_rows(self.up, h, count)
        if type(self.down) is not TernaryLinear:
            return after_squared_relu(self.down, u)
        return after_squared_relu(self.down, u, count=count)

    def update(self, stream: Tensor | Stream) -> tuple[Tensor, Tensor]:
        """The residual stream, to go on with, and what is added to it."""
        h, u = read_stream(stream, self.up)
        return h, after_squared_relu(self.down, u)
