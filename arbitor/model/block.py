"""One layer of the trunk: attention, then feed-forward, each added to the residual stream."""

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.attention import LatentAttention
from arbitor.model.ffn import FeedForward
from arbitor.model.ledger import LayerLedger
from arbitor.model.rotary import Rotation
from arbitor.ternary.stream import add_to_stream


class Block(nn.Module):
    """h + attention(h), then h + ffn(h). The linears normalise their inputs, so the block has no norm."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.attention = LatentAttention(config, device)
        self.ffn = FeedForward(config, device)

    def forward(self, h_BND: Tensor, rotation: Rotation, ledger: LayerLedger | None = None) -> Tensor:
        """Residual stream [B, N, D] -> residual stream [B, N, D], same dtype; see `LatentAttention`."""
        h_BND = add_to_stream(*self.attention.update(h_BND, rotation, ledger))
        return add_to_stream(*self.ffn.update(h_BND))
