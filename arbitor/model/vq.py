"""VQBridge: a motif for every position, and its ternary code vector added to the residual stream.

Shape letters: B batch, N positions, D dim, C code width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.norm import rms_norm
from arbitor.model.precision import at_least_fp32
from arbitor.ops.fsq import fsq_quantize, fsq_slope, fsq_trits
from arbitor.ternary import TernaryLinear
from arbitor.ternary.codebook import TernaryVQCodebook

CODEBOOK_DIM = 32
PRODUCT_FROM_ROWS = 1 << 12  # from here on a codebook whose rows are a square is a product of two


class BridgeOutput(NamedTuple):
    """What the bridge returns.

    Attributes:
        h: residual stream with the code vectors added, [B, N, D].
        motifs: int64 [B, N].
        commitment: fp32 scalar loss of a learned codebook; None for one that is implicit.
    """

    h: Tensor
    motifs: Tensor
    commitment: Tensor | None


class _RoundToTrits(torch.autograd.Function):
    """Trits of h as floats; the gradient passes the rounding straight through."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        trits, ids = fsq_quantize(h)
        ctx.save_for_backward(h)
        ctx.mark_non_differentiable(ids)
        return trits.to(h.dtype), ids

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return dy * fsq_slope(h)


class VQBridge(nn.Module):
    """h + up(code(down(h))), where the code is the position's motif.

    With `motif_trits` = k the code has k trits, found one by one (finite scalar quantisation): all 3^k codes
    are motifs, and there is no table, no codebook loss and no dead code to revive. With `codebook_rows`
    the code is the nearest row of a learned codebook.

    Attributes:
        code_dim: C, width of a code vector.
        num_motifs: how many codes there are.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        rows = config.codebook_rows
        self.codebook = None
        if rows:
            square = round(rows**0.5) ** 2 == rows
            parts = 2 if rows >= PRODUCT_FROM_ROWS and square else 1
            self.codebook = TernaryVQCodebook(rows, CODEBOOK_DIM, parts=parts, device=device)
        self.code_dim = CODEBOOK_DIM if rows else config.motif_trits
        self.num_motifs = rows or 3**config.motif_trits
        self.down = TernaryLinear(config.dim, self.code_dim, tscale=config.tscale, device=device)
        self.up = TernaryLinear(
            self.code_dim, config.dim, tscale=config.tscale, input_norm=False, device=device
        )

    def forward(self, h_BND: Tensor) -> BridgeOutput:
        """Residual stream [B, N, D] -> the stream with codes added, motifs, and the codebook's loss."""
        narrow_BNC = rms_norm(at_least_fp32(self.down(h_BND)))
        if self.codebook is None:
            code_BNC, motif_BN = _RoundToTrits.apply(narrow_BNC)
            return BridgeOutput(h_BND + self.up(code_BNC), motif_BN, None)
        code_BNC, motif_BN, loss = self.codebook(narrow_BNC)
        return BridgeOutput(h_BND + self.up(code_BNC), motif_BN, loss)

    def code_vectors(self, motifs: Tensor) -> Tensor:
        """Code vectors of motifs int64 [...]: fp32 [..., C]."""
        if self.codebook is None:
            return fsq_trits(motifs, self.code_dim).to(torch.float32)
        return self.codebook.code_vectors(motifs)
