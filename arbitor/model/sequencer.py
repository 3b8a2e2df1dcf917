"""From byte embeddings to the residual stream: a causal trigram window.

Shape letters: B batch, L ids, N positions (L - 2), D dim.
"""

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.norm import rms_norm
from arbitor.ops.byte_windows import add_and_norm, kernels_run, reference, windows
from arbitor.ternary import TernaryLinear
from arbitor.ternary.stream import stream_dtype

WINDOW = 3  # bytes that a position sees directly: its own and the two before it


class TextSequencer(nn.Module):
    """Position t reads bytes t-2, t-1 and t: h_t = rms_norm(e_t + mix([e_{t-2}, e_{t-1}, e_t])).

    The first position is t = 2, so L ids make L - 2 positions.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        # Motifs are chosen by thresholds, which a narrower number would fall onto more often.
        self.wide = config.has_motifs
        self.mix = TernaryLinear(WINDOW * config.dim, config.dim, tscale=config.tscale, device=device)

    def forward(self, e_BLD: Tensor) -> Tensor:
        """Embeddings [B, L, D] -> residual stream [B, L - 2, D] in the embeddings' dtype, RMS 1.

        Where kernels run its dtype is that of `stream_dtype`, unless motifs are made of it. So is that of the
        windows, which holds the rows of a byte table exactly.
        """
        if type(self.mix) is TernaryLinear and kernels_run(e_BLD):
            dtype = stream_dtype(e_BLD)
            window_BNW, own_BND = windows(e_BLD, dtype)
            return add_and_norm(own_BND, self.mix(window_BNW), e_BLD.dtype if self.wide else dtype)
        window_BNW, own_BND = reference.windows(e_BLD, e_BLD.dtype)
        return rms_norm(own_BND + self.mix(window_BNW))
