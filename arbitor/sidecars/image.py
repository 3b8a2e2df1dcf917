"""ImageSequencer: the patches of an image as positions of the residual stream.

A patch embedding as in the vision transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words",
section 3.1) on trits, with one learned int8 vector for a patch's row and one for its column.

Shape letters: B images, C channels, H rows and W columns of pixels, G patches a side, P = G^2 patches, K
numbers of a patch, D dim.
"""

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.model.norm import rms_norm
from arbitor.ternary import Int8Embedding, TernaryLinear

MIDDLE = 128  # the grey that becomes 0


class ImageSequencer(nn.Module):
    """Position p is rms_norm(embed(patch p) + row vector + column vector); patches go row by row.

    A patch is its pixels as int8 numbers, pixel - 128, in units of 2^-7. They are not normalised, since a
    norm would make dark patches look like bright ones.

    Tables of rows and columns, not a rotation in two dimensions: attention's rotary part is made of the place
    in the sequence, which image and text share, and stays as it is; and 2 G vectors serve G^2 patches.

    With `image_encoder`, a frozen encoder stands ahead: the patches' vectors are its outputs, which know
    their places already, so that the matrix alone is trained.

    Args:
        config: `image_size`, `image_patch`, `image_channels`, `image_encoder`.
        device: where to make it.

    Attributes:
        num_positions: P.
        encoder: the frozen encoder, or None.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.size, self.patch, self.channels = config.image_size, config.image_patch, config.image_channels
        side = self.size // self.patch
        self.num_positions = side * side
        self.encoder: nn.Module | None = None
        if config.image_encoder:
            from arbitor.sidecars.encoder import FrozenEncoder

            self.encoder = encoder = FrozenEncoder(config.image_encoder, device)
            self.embed = TernaryLinear(encoder.width, config.dim, tscale=config.tscale, device=device)
            return
        self.embed = TernaryLinear(
            self.channels * self.patch**2, config.dim, tscale=config.tscale, input_norm=False, device=device
        )
        self.rows = Int8Embedding(side, config.dim, device=device)
        self.columns = Int8Embedding(side, config.dim, device=device)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images uint8 [B, C, H, W], H = W = `image_size` -> [B, P, D] of RMS 1.

        Raises:
            UserError: another dtype or shape.
        """
        wanted = (self.channels, self.size, self.size)
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or tuple(pixels.shape[1:]) != wanted:
            raise UserError(
                f"images must be uint8 of shape (batch, {', '.join(map(str, wanted))}), got "
                f"{pixels.dtype} {tuple(pixels.shape)}; arbitor.data.images.fit makes one fit"
            )
        if self.encoder is not None:
            return rms_norm(self.embed(self.encoder(pixels)).float())
        h_BPD = self.embed(patches(pixels, self.patch)).float()
        place_G = torch.arange(self.size // self.patch, device=pixels.device)
        places_PD = (self.rows(place_G)[:, None] + self.columns(place_G)).flatten(0, 1)
        return rms_norm(h_BPD + places_PD)


def patches(pixels: Tensor, patch: int) -> Tensor:
    """uint8 [B, C, H, W] -> fp32 [B, P, K]: int8 values in units of 2^-7, a patch by channel, row, column."""
    x_BPK = nn.functional.unfold(pixels.to(torch.float32) - MIDDLE, patch, stride=patch).mT
    return x_BPK / MIDDLE
