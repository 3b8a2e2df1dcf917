"""What turns the residual stream into predictions, one head a modality."""

import torch
from torch import Tensor

from arbitor.config import ModelConfig
from arbitor.ternary import Int8Embedding


class ByteHead(Int8Embedding):
    """Logits of the id that follows: `logits(h)`, float [..., D] -> [..., vocab_size].

    Attributes:
        in_features, out_features: D and vocab_size, as a linear has them.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__(config.vocab_size, config.dim, kind="head", device=device)
        self.in_features, self.out_features = config.dim, config.vocab_size

    def forward(self, x: Tensor, quantize: bool = True) -> Tensor:
        """The same as `logits`: a head is a linear, its rows are not looked up."""
        return self.logits(x, quantize)
