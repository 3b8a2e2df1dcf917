"""What turns the residual stream into predictions, one head a modality."""

import torch

from arbitor.config import ModelConfig
from arbitor.ternary import Int8Embedding


class ByteHead(Int8Embedding):
    """Logits of the id that follows: `logits(h)`, float [..., D] -> [..., vocab_size]."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__(config.vocab_size, config.dim, kind="head", device=device)
