"""Linear on packed trits: `ternary_linear` and `ternary_linear_backward`.

Shape letters: N tokens, I in, O out, P packed bytes a row, G groups.
"""

import torch
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.backend import uses_triton
from arbitor.ops.int8_matmul import integers_pay
from arbitor.ops.registry import register
from arbitor.ops.ternary_linear import reference

__all__ = ["ternary_linear", "ternary_linear_backward"]


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
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
        squared: apply to relu(x)^2 in place of x.

    Returns:
        y [N, O]; codes [N, I] (int8 when `quantize`); scale [N, 1], one code unit's worth; rstd [N, 1].
    """
    return _forward(x, packed, exponent, group, input_norm, quantize, out_dtype, squared)


def ternary_linear_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    squared: bool = False,
) -> Tensor:
    """Gradient [N, I] of x, in its dtype, from dy [N, O]; rounding passes straight through."""
    return _backward(dy, x, rstd, packed, exponent, group, input_norm, squared)


def _dispatch_forward(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if quantize and activations.compute_dtype(x) == torch.float32 and uses_triton(x):
        from arbitor.ops.ternary_linear import triton

        return triton.forward(x, packed, exponent, group, input_norm, out_dtype, squared)
    if quantize and exponent.shape[-1] == 1 and integers_pay(x):
        return reference.integer_forward(x, packed, exponent, input_norm, out_dtype, squared)
    return reference.forward(x, packed, exponent, group, input_norm, quantize, out_dtype, squared)


def _forward_fake(
    x: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not x.device == packed.device == exponent.device:  # meta weights bring a tensor of the CPU here, too
        raise RuntimeError(f"x is on {x.device}, packed on {packed.device} and exponent on {exponent.device}")
    return activations.linear_outputs(x, packed.shape[-2], quantize, out_dtype)


_forward = register(
    "ternary_linear(Tensor x, Tensor packed, Tensor exponent, int group, bool input_norm, bool quantize, "
    "ScalarType out_dtype, bool squared=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch_forward,
    _forward_fake,
)
_backward = register(
    "ternary_linear_backward(Tensor dy, Tensor x, Tensor rstd, Tensor packed, Tensor exponent, int group, "
    "bool input_norm, bool squared=False) -> Tensor",
    reference.backward,
    lambda dy, x, rstd, packed, exponent, group, input_norm, squared=False: torch.empty_like(x),
)
