"""VQBridge: a motif for every position, whose code vector is added to the residual stream.

Shape letters: B batch, N positions, M ids, D dim, C width of a code.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arbitor.config import LARGEST_SINGLE_CODEBOOK, ModelConfig
from arbitor.model.norm import rms_norm
from arbitor.ops.fsq import fsq, fsq_backward, fsq_trits
from arbitor.ternary import TernaryLinear, TernaryVQCodebook

MOST_COMPARED = 1024  # positions whose codes are compared
STEEPNESS = 2.0  # with which codes of RMS 1 that are a trit apart are alike by a third, two trits a tenth
CODEBOOK_DIM = 32  # width of a learned codebook's rows


class BridgeOutput(NamedTuple):
    """What the bridge returns.

    Attributes:
        state: [B, N, D], the residual stream with the codes' vectors added.
        motifs: int64 [B, N] in 0...num_motifs - 1.
        losses: scalars of training. "commitment", of a learned codebook, its commitment term already
            weighted; "diversity", of codes of trits, while an optimizer trains them.
    """

    state: Tensor
    motifs: Tensor
    losses: dict[str, Tensor]


class _Quantize(torch.autograd.Function):
    """Codes of trits and their ids; the gradient passes the rounding straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        code, ids = fsq(x)
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable(ids)
        return code, ids

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return fsq_backward(dy, x)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`fsq` with a gradient: float [..., K] -> codes of trits [..., K], and their ids int64 [...]."""
    code, ids = _Quantize.apply(x)
    return code, ids


class VQBridge(nn.Module):
    """h + up(code), with code = quantise(down(h)).

    With `motif_trits` k the code is k trits by finite scalar quantisation (`arbitor.ops.fsq`), and the motifs
    are all 3^k of them. What a code adds to the stream says little about which trits are worth having, and
    left to it they become alike; so `down` also learns to keep those of different positions apart, by a loss
    of its own (`diversity`). With `codebook_rows` the code is the nearest row of a learned
    `TernaryVQCodebook`, the product of two codebooks where the rows are more than 4096 and a square.

    Attributes:
        num_motifs: how many motifs there are.
        code_dim: C.
        codebook: the learned codebook, or None.

    Args:
        config: `motif_trits` or `codebook_rows`, one of them above 0.
        device: where to make it.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        rows = config.codebook_rows
        self.num_motifs = rows or 3**config.motif_trits
        self.code_dim = CODEBOOK_DIM if rows else config.motif_trits
        self.codebook = None
        if rows:
            parts = 2 if rows > LARGEST_SINGLE_CODEBOOK else 1
            self.codebook = TernaryVQCodebook(rows, CODEBOOK_DIM, parts=parts, device=device)
        self.down = TernaryLinear(config.dim, self.code_dim, tscale=config.tscale, device=device)
        # A code of few trits may be all 0, and the length of others says something too: no norm.
        self.up = TernaryLinear(
            self.code_dim, config.dim, tscale=config.tscale, input_norm=False, device=device
        )

    def forward(self, h_BND: Tensor) -> BridgeOutput:
        """Quantise every position of the residual stream by itself."""
        # Outside of bf16: rounded numbers would fall onto a threshold, or between two rows, more often.
        with torch.autocast(h_BND.device.type, enabled=False):
            x_BNC = self.down(h_BND)
            losses: dict[str, Tensor] = {}
            if self.codebook is None:
                code_BNC, motif_BN = quantize(x_BNC)
                if self.down.capture is not None and torch.is_grad_enabled():
                    losses["diversity"] = diversity(self.down(h_BND.detach()))
            else:
                code_BNC, motif_BN, losses["commitment"] = self.codebook(rms_norm(x_BNC))
        return BridgeOutput(h_BND + self.up(code_BNC), motif_BN, losses)

    def code_vectors(self, ids: Tensor) -> Tensor:
        """Code vectors of motifs: int64 [...] -> fp32 [..., C], without gradient."""
        if self.codebook is None:
            return fsq_trits(ids, self.code_dim).to(torch.float32)
        return self.codebook.rows(ids)

    def metrics(self, motif_BN: Tensor) -> dict[str, Tensor]:
        """`motif_perplexity` and `motif_dead_share` of these motifs; see `motif_metrics`."""
        return motif_metrics(motif_BN, self.num_motifs)


def diversity(x: Tensor) -> Tensor:
    """How alike the codes of different positions are: log(sum of exp(-2 |z_i - z_j|^2) over i and j / S).

    z = tanh(x / rms(x)) are the codes ahead of rounding. Of many positions, S are compared, spread over all
    windows and all places in them. It is the uniformity loss of Wang and Isola 2020 (section 4.1) with each
    position counted as alike to itself.

    Args:
        x: fp32 [..., N, C], ahead of quantisation, at least one.

    Returns:
        scalar from 0, where no two are alike, to log(S), where all are.
    """
    x_MC = x.flatten(0, -2)
    step = -(-len(x_MC) // MOST_COMPARED)
    while math.gcd(step, x.shape[-2]) > 1:  # which would fall on some places of windows alone
        step += 1
    z_SC = torch.tanh(rms_norm(x_MC[::step]))
    square_S = z_SC.square().sum(dim=-1)
    distance_SS = (square_S[:, None] + square_S - 2 * z_SC @ z_SC.T).clamp_min(0)
    return torch.exp(-STEEPNESS * distance_SS).sum(dim=-1).mean().log()


def motif_metrics(ids: Tensor, num_motifs: int) -> dict[str, Tensor]:
    """How widely motifs are used, without a histogram of all there are.

    Args:
        ids: int64 [...], at least one.
        num_motifs: how many there are.

    Returns:
        fp64 scalars on the device: `motif_perplexity`, exp of the entropy of the ids' frequencies (from 1 to
        the smaller of `num_motifs` and the number of ids), and `motif_dead_share`, the share of all motifs
        that do not occur.

    Raises:
        ValueError: no ids.
    """
    if not ids.numel():
        raise ValueError("the use of motifs needs at least one id")
    ids_M = ids.flatten().sort().values
    first_M = torch.searchsorted(ids_M, ids_M)
    count_M = torch.searchsorted(ids_M, ids_M, right=True) - first_M
    # The sum of -p log p over motifs is the mean of -log p over positions.
    entropy = math.log(len(ids_M)) - count_M.double().log().mean()
    distinct = (first_M == torch.arange(len(ids_M), device=ids.device)).sum()
    return {"motif_perplexity": entropy.exp(), "motif_dead_share": 1 - distinct.double() / num_motifs}
