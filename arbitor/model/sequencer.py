"""From byte embeddings to the residual stream: a causal trigram window.

Shape letters: B batch, L ids, N positions (L - 2), D dim.
"""

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.norm import rms_norm
from arbitor.ternary import TernaryLinear

WINDOW = 3  # bytes that a position sees directly: its own and the two before it


class TextSequencer(nn.Module):
    """Position t reads bytes t-2, t-1 and t: h_t = rms_norm(e_t + mix([e_{t-2}, e_{t-1}, e_t])).

    The first position is t = 2, so L ids make L - 2 positions.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.mix = TernaryLinear(WINDOW * config.dim, config.dim, tscale=config.tscale, device=device)

    def forward(self, e_BLD: Tensor) -> Tensor:
        """Embeddings [B, L, D] -> residual stream [B, L - 2, D] in the embeddings' dtype, RMS 1."""
        window_BNW = torch.cat([e_BLD[:, :-2], e_BLD[:, 1:-1], e_BLD[:, 2:]], dim=-1)
        return rms_norm(e_BLD[:, 2:] + self.mix(window_BNW))
