"""One layer of the trunk: attention, then feed-forward, each added to the residual stream."""

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.attention import LatentAttention
from arbitor.model.ffn import FeedForward
from arbitor.model.ledger import LayerLedger
from arbitor.model.rotary import Rotation
from arbitor.ternary.stream import Stream


class Block(nn.Module):
    """h + attention(h), then h + ffn(h). The linears normalise their inputs, so the block has no norm."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.attention = LatentAttention(config, device)
        self.ffn = FeedForward(config, device)

    def forward(
        self, h_BND: Tensor | Stream, rotation: Rotation, ledger: LayerLedger | None = None
    ) -> Tensor | Stream:
        """Residual stream [B, N, D] -> residual stream [B, N, D], same dtype; see `LatentAttention`.

        What it adds last waits in the result where it was given a `Stream`.
        """
        stream = Stream(*self.attention.update(h_BND, rotation, ledger))
        stream = Stream(*self.ffn.update(stream))
        return stream if isinstance(h_BND, Stream) else stream.settled()
