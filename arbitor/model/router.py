"""OutputRouter: which head each position's prediction belongs to.

Shape letters: B batch, N positions, D dim, C modalities.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.ternary import TernaryLinear
from arbitor.ternary.stream import widened

MODALITIES: Final = ("text", "audio", "video")
UNSUPERVISED: Final = -100  # the modality of a position that has no target


class OutputRouter(nn.Module):
    """A linear classifier over `MODALITIES`, trained with the modality of every target."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = TernaryLinear(config.dim, len(MODALITIES), tscale=config.tscale, device=device)

    def forward(self, h_BND: Tensor) -> Tensor:
        """Residual stream [B, N, D] -> logits of the modalities, fp32 [B, N, C]."""
        with torch.autocast(h_BND.device.type, enabled=False):
            return self.linear(widened(h_BND)).float()

    @staticmethod
    def loss(logits_BNC: Tensor, modality_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats, and the share of positions whose likeliest modality is the right one.

        Args:
            logits_BNC: of this router.
            modality_BN: int64, the targets' modalities as indices into `MODALITIES`; a negative one does not
                count.
        """
        counted_BN = modality_BN >= 0
        modality_M = modality_BN.masked_fill(~counted_BN, UNSUPERVISED).flatten()
        loss = F.cross_entropy(logits_BNC.flatten(0, 1), modality_M, ignore_index=UNSUPERVISED)
        right = (logits_BNC.detach().argmax(dim=-1) == modality_BN).sum()
        return loss, right / counted_BN.sum()
