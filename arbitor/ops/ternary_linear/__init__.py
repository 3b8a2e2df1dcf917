"""Linear on packed trits: `ternary_linear` and `ternary_linear_backward`.

Shape letters: N tokens, I in, O out, P packed bytes a row, G groups.
"""

import torch
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.ternary_linear import reference

__all__ = ["ternary_linear", "ternary_linear_backward"]


@torch.library.custom_op("arbitor::ternary_linear", mutates_args=())
def ternary_linear(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMS norm, int8 codes per token, product with trits times powers of two.

    Args:
        x: float [N, I].
        packed: uint8 [O, P].
        exponent: int8 [O, G].
        group: neighbouring elements along I that share an exponent.
        input_norm: divide every token by its root mean square first.
        quantize: int8 activations; False keeps them float (for gradient checks and ablations).
        out_dtype: of y.

    Returns:
        y [N, O]; codes [N, I] (int8 when `quantize`); scale [N, 1], one code unit's worth; rstd [N, 1].
    """
    return reference.forward(x, packed, exponent, group, input_norm, quantize, out_dtype)


@ternary_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = activations.compute_dtype(x)
    per_token = x.new_empty((x.shape[0], 1), dtype=dtype)
    codes = x.new_empty(x.shape, dtype=torch.int8 if quantize else dtype)
    y = x.new_empty((x.shape[0], packed.shape[-2]), dtype=out_dtype)
    return y, codes, per_token, torch.empty_like(per_token)


@torch.library.custom_op("arbitor::ternary_linear_backward", mutates_args=())
def ternary_linear_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
) -> Tensor:
    """Gradient [N, I] of x, in its dtype, from dy [N, O]; rounding passes straight through."""
    return reference.backward(dy, x, rstd, packed, exponent, group, input_norm)


@ternary_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
) -> Tensor:
    return torch.empty_like(x)
