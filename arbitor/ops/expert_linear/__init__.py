"""Linear on the packed trits of many experts: `expert_linear` and `expert_linear_backward`.

Shape letters: M rows (tokens sorted by expert), I in, O out, E experts, P packed bytes a row, G groups.
"""

import torch
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.backend import rounds_gradients, uses_triton
from arbitor.ops.expert_linear import reference
from arbitor.ops.expert_linear.reference import (
    add_grouped_outer,
    busy_experts,
    grouped_matmul,
    grouped_outer,
)
from arbitor.ops.registry import register

__all__ = [
    "add_grouped_outer",
    "busy_experts",
    "expert_linear",
    "expert_linear_backward",
    "grouped_matmul",
    "grouped_outer",
]


def expert_linear(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMS norm, int8 codes per token, product with the trits of the token's expert.

    Args:
        x: float [M, I], rows of expert 0 first, then those of expert 1, ...
        offsets: int32 [E], the end of each expert's rows. Of rows behind the last one y is 0, and the rest
            undefined.
        packed: uint8 [E, O, P].
        exponent: int8 [E, O, G].
        group: neighbouring elements along I that share an exponent.
        input_norm: divide every token by its root mean square first.
        quantize: int8 activations; False keeps them float.
        out_dtype: of y.
        squared: apply to relu(x)^2 in place of x.

    Returns:
        y [M, O]; codes [M, I] (int8 when `quantize`); scale [M, 1]; rstd [M, 1].
    """
    return _forward(x, offsets, packed, exponent, group, input_norm, quantize, out_dtype, squared)


def expert_linear_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    squared: bool = False,
) -> Tensor:
    """Gradient [M, I] of x, in its dtype, from dy [M, O]; rounding passes straight through.

    It is 0 for rows behind the last expert's.
    """
    return _backward(dy, x, rstd, offsets, packed, exponent, group, input_norm, squared)


def _dispatch_forward(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if quantize and activations.compute_dtype(x) == torch.float32 and uses_triton(x):
        from arbitor.ops.expert_linear import triton

        if triton.runs_forward(x, offsets, exponent):
            return triton.forward(x, offsets, packed, exponent, group, input_norm, out_dtype, squared)
    return reference.forward(x, offsets, packed, exponent, group, input_norm, quantize, out_dtype, squared)


def _dispatch_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    squared: bool = False,
) -> Tensor:
    if activations.compute_dtype(x) == torch.float32 and uses_triton(x) and not rounds_gradients(x):
        from arbitor.ops.expert_linear import triton

        return triton.backward(dy, x, rstd, offsets, packed, exponent, group, input_norm, squared)
    return reference.backward(dy, x, rstd, offsets, packed, exponent, group, input_norm, squared)


_forward = register(
    "expert_linear(Tensor x, Tensor offsets, Tensor packed, Tensor exponent, int group, bool input_norm, "
    "bool quantize, ScalarType out_dtype, bool squared=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch_forward,
    lambda x, offsets, packed, exponent, group, input_norm, quantize, out_dtype, squared=False: (
        activations.linear_outputs(x, packed.shape[1], quantize, out_dtype)
    ),
)
_backward = register(
    "expert_linear_backward(Tensor dy, Tensor x, Tensor rstd, Tensor offsets, Tensor packed, "
    "Tensor exponent, int group, bool input_norm, bool squared=False) -> Tensor",
    _dispatch_backward,
    lambda dy, x, rstd, offsets, packed, exponent, group, input_norm, squared=False: torch.empty_like(x),
)
