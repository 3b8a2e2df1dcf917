"""Convolutions over time on packed trits: TernaryConv1d, and TernaryUpsample1d that goes the other way.

A convolution is the product of a ternary matrix [O, C K] with every window of its input, so norm, int8 codes,
capture and votes are those of a `TernaryLinear` whose tokens are windows.

Shape letters: B batch, C channels in, O channels out, K taps of the kernel, T times in, U times out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.errors import UserError
from arbitor.ternary.layers import NormedMatrix, ternary_matmul
from arbitor.ternary.tensor import TScaleType


class TernaryConv1d(NormedMatrix):
    """y[b, :, u] = W quantize(rms_norm(window u of x[b])); no gain, no bias.

    A window is K times, `dilation` apart, of all channels, flattened channel by channel as in torch's
    `Conv1d`: `decode().view(O, C, K)` is the weight of a `Conv1d`. Zeros stand beyond both ends, so that the
    output has U = ceil(T / stride) times. Norm and int8 scale are those of the whole window.

    Args:
        in_channels, out_channels: C and O.
        kernel_size: K.
        stride: times from one window to the next.
        dilation: times from one tap to the next.
        causal: all zeros stand ahead, so that output u sees nothing after time u * stride; else they stand on
            both sides, the odd one behind.
        tscale: weights that share a scale exponent.
        input_norm: divide every window by its root mean square first.
        device: where to create the parameters.

    Raises:
        UserError: a size below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
        tscale: TScaleType | str = TScaleType.ROW,
        input_norm: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "dilation": dilation,
        }
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name} of a convolution must be at least 1, got {size}")
        super().__init__(in_channels * kernel_size, out_channels, tscale=tscale, device=device)
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.causal = causal
        self.input_norm = input_norm

    def forward(self, x: Tensor, quantize: bool = True) -> Tensor:
        """Apply to x.

        Args:
            x: float [B, C, T], T >= 1.
            quantize: int8 activations per window; False keeps them float.

        Returns:
            [B, O, U] in autocast's dtype where autocast is on, else in the dtype of x.
        """
        if x.dim() != 3 or x.shape[1] != self.in_channels or not x.shape[2]:
            raise ValueError(f"expected [batch, {self.in_channels}, times], got {tuple(x.shape)}")
        return ternary_matmul(self, self.windows(x), quantize).transpose(1, 2)

    def windows(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, U, C K]."""
        span = self.dilation * (self.kernel_size - 1)
        before = span if self.causal else span // 2
        padded = F.pad(x, (before, span - before))
        if self.dilation == 1:
            windows_BCUK = padded.unfold(2, self.kernel_size, self.stride)
        else:
            windows_BCUK = padded.unfold(2, span + 1, self.stride)[..., :: self.dilation]
        return windows_BCUK.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Sizes and how the kernel moves."""
        return (
            f"in={self.in_channels}, out={self.out_features}, kernel={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, causal={self.causal}, tscale={self.tscale.name}"
        )


class TernaryUpsample1d(TernaryConv1d):
    """A convolution to `factor` times as many times: window t of the input gives times t * factor and on.

    It equals a transposed convolution of stride `factor` and kernel `factor * kernel_size`, computed at the
    input's rate and spread out afterwards (Shi et al. 2016, "Is the deconvolution layer the same as a
    convolutional layer?"), so that every weight has one row of the matrix and every window one norm.

    Args:
        in_channels, out_channels: C and O; the matrix has factor * O rows.
        factor: how many times more.
        kernel_size: input times that an output time is made of.
        causal: as in `TernaryConv1d`.
        tscale, input_norm, device: as there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int,
        *,
        kernel_size: int = 1,
        causal: bool = False,
        tscale: TScaleType | str = TScaleType.ROW,
        input_norm: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if factor < 1:
            raise UserError(f"factor of an upsampling must be at least 1, got {factor}")
        super().__init__(
            in_channels,
            out_channels * factor,
            kernel_size,
            causal=causal,
            tscale=tscale,
            input_norm=input_norm,
            device=device,
        )
        self.factor = factor

    def forward(self, x: Tensor, quantize: bool = True) -> Tensor:
        """x float [B, C, T] -> [B, O, T * factor]."""
        y_BRT = super().forward(x, quantize)
        batch, rows, times = y_BRT.shape
        parts = y_BRT.view(batch, rows // self.factor, self.factor, times)
        return parts.transpose(2, 3).flatten(2)
