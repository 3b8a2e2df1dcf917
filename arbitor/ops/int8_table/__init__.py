"""Byte tables in int8: `int8_gather`, `int8_linear`, `int8_linear_backward`, `int8_table_update`.

`int8_table_step` is momentum and update together.

Shape letters: V rows, D dim, N tokens.
"""

import torch
from torch import Tensor

from arbitor.ops import activations
from arbitor.ops.backend import uses_triton
from arbitor.ops.int8_matmul import MAX_IN_FEATURES, has_int8_kernels
from arbitor.ops.int8_table import reference
from arbitor.ops.int8_table.reference import FRACTION_BITS, Q_MAX
from arbitor.ops.momentum import momentum_fold, momentum_fold_drawn
from arbitor.ops.random_bits import random_bits
from arbitor.ops.registry import register
from arbitor.ops.scalar import scalar

__all__ = [
    "FRACTION_BITS",
    "Q_MAX",
    "int8_gather",
    "int8_linear",
    "int8_linear_backward",
    "int8_table_step",
    "int8_table_update",
]


def int8_gather(q: Tensor, exponent: Tensor, ids: Tensor) -> Tensor:
    """Rows ids int64 [...] of the table q [V, D], exponent [V] -> fp32 [..., D].

    An id that is no row raises IndexError on a CPU; on a GPU its row is NaN.
    """
    return _gather(q, exponent, ids)


def int8_linear(
    x: Tensor, q: Tensor, exponent: Tensor, quantize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMS norm, int8 codes per token, product with the table.

    Args:
        x: float [N, D].
        q: int8 [V, D].
        exponent: int8 [V].
        quantize: int8 activations, else float.
        out_dtype: of y.

    Returns:
        y [N, V]; codes [N, D] (int8 when `quantize`); scale [N, 1]; rstd [N, 1].
    """
    return _linear(x, q, exponent, quantize, out_dtype)


def int8_linear_backward(dy: Tensor, x: Tensor, rstd: Tensor, q: Tensor, exponent: Tensor) -> Tensor:
    """Gradient [N, D] of x, in its dtype, from dy [N, V]; rounding passes straight through."""
    return _linear_backward(dy, x, rstd, q, exponent)


def int8_table_update(
    q: Tensor, direction: Tensor, step: float | Tensor, bits: Tensor, active: Tensor
) -> None:
    """q += floor(-step * sign(direction) + uniform), in place; see `reference.update`.

    `step` is a number or an fp32 scalar on the device.
    """
    _update(q, direction, scalar(step, q.device), bits, active)


def int8_table_step(
    q: Tensor,
    gradient: Tensor,
    codes: Tensor,
    exponent: Tensor,
    keys: Tensor,
    active: Tensor,
    step: float | Tensor,
    beta: float,
    lookahead: float,
) -> None:
    """`momentum_fold` of a table with 8-bit codes, then `int8_table_update`, both with the same random bits.

    Args:
        q: int8 [V, D], changed.
        gradient: fp32 [V, D].
        codes, exponent: of the momentum, as in `momentum_fold`; changed.
        keys: int32 [1, 2], random stream of the table.
        active: bool [V]; other rows stay, and so does their momentum.
        step: as in `int8_table_update`.
        beta, lookahead: as in `momentum_fold`.
    """
    if uses_triton(q):
        from arbitor.ops.int8_table import triton

        matrix = gradient[None], codes[None], exponent[None], keys, active[None, :, None]
        direction = momentum_fold_drawn(*matrix, 8, beta, lookahead)[0]
        triton.update(q, direction, scalar(step, q.device), keys, active)
        return
    bits = random_bits(keys, q.numel()).view(q.shape)
    direction = momentum_fold(gradient, codes, exponent, bits, active[:, None], 8, beta, lookahead)
    int8_table_update(q, direction, step, bits, active)


def _dispatch_linear(
    x: Tensor, q: Tensor, exponent: Tensor, quantize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = x.shape[-1] * Q_MAX <= MAX_IN_FEATURES and activations.compute_dtype(x) == torch.float32
    if quantize and exact and uses_triton(x) and has_int8_kernels(x.device):
        from arbitor.ops.int8_table import triton

        return triton.linear(x, q, exponent, out_dtype)
    return reference.linear(x, q, exponent, quantize, out_dtype)


def _dispatch_gather(q: Tensor, exponent: Tensor, ids: Tensor) -> Tensor:
    if uses_triton(q):
        from arbitor.ops.int8_table import triton

        return triton.gather(q, exponent, ids)
    return reference.gather(q, exponent, ids)


_gather = register(
    "int8_gather(Tensor q, Tensor exponent, Tensor ids) -> Tensor",
    _dispatch_gather,
    lambda q, exponent, ids: q.new_empty((*ids.shape, q.shape[1]), dtype=torch.float32),
)
_linear = register(
    "int8_linear(Tensor x, Tensor q, Tensor exponent, bool quantize, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch_linear,
    lambda x, q, exponent, quantize, out_dtype: activations.linear_outputs(
        x, q.shape[0], quantize, out_dtype
    ),
)
_linear_backward = register(
    "int8_linear_backward(Tensor dy, Tensor x, Tensor rstd, Tensor q, Tensor exponent) -> Tensor",
    reference.linear_backward,
    lambda dy, x, rstd, q, exponent: torch.empty_like(x),
)
_update = register(
    "int8_table_update(Tensor(a!) q, Tensor direction, Tensor step, Tensor bits, Tensor active) -> ()",
    reference.update,
    lambda q, direction, step, bits, active: None,
)
