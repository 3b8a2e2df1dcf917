"""Linear on packed trits, forward and gradient of its input, by decoding and a library matmul.

Shape letters: N tokens, I in, O out, P packed bytes a row, G groups.
"""

import torch
from torch import Tensor

from arbitor.ops import activations, trit_codec
from arbitor.ops.exponent import exp2_int


def forward(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = quantize(rms_norm(x)) @ (T * 2^E)^T; see `arbitor.ops.ternary_linear.ternary_linear`."""
    weight = trit_codec.decode(packed, exponent, x.shape[-1], group, activations.weight_dtype(x, quantize))
    return activations.linear(x, weight, input_norm, quantize, out_dtype, squared)


def integer_forward(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    input_norm: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` with quantised activations and one exponent a row, its product in integers: equal bits."""
    trits = trit_codec.trit_unpack(packed, x.shape[-1])
    row_scale = exp2_int(exponent[:, 0])
    row_scale.masked_fill_((trits == trit_codec.ILLEGAL).any(dim=1), torch.nan)
    return activations.integer_linear(x, trits, row_scale, input_norm, out_dtype, squared)


def backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    squared: bool = False,
) -> Tensor:
    """Gradient of x; see `arbitor.ops.ternary_linear.ternary_linear_backward`."""
    weight = trit_codec.decode(
        packed,
        exponent,
        x.shape[-1],
        group,
        activations.backward_dtype(x),
    )
    return activations.linear_backward(dy, x, rstd, weight, input_norm, squared)
