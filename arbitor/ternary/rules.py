"""Directions of the vote: from a gradient (or its momentum) to a matrix with RMS near 1.

A direction says how strongly each trit is asked to move relative to the others of its matrix; the learning
rate turns it into votes. Shape letters: O out, I in; `...` leading dimensions are separate matrices.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.ops import newton_schulz
from arbitor.ops.backend import rounds_gradients
from arbitor.ops.newton_schulz import reference

_TINY = 1e-30
_SINKHORN_ROUNDS = 3
_COLUMNS_AT_ONCE = 1 << 20  # numbers of factors that are fp64 at a time


def spectral(n: Tensor) -> Tensor:
    """Orthogonalise: the nearest matrix with all singular values equal, RMS near 1.

    Five steps of the quintic Newton-Schulz iteration with the coefficients of Jordan et al. 2024 (Muon), in
    bf16 on CUDA, and on a CPU where gradients are rounded; in fp32 elsewhere.

    Args:
        n: fp32 [..., O, I].

    Returns:
        fp32 [..., O, I]; zero where the matrix is zero.
    """
    rows, columns = n.shape[-2:]
    dtype = torch.bfloat16 if n.is_cuda or rounds_gradients(n) else n.dtype
    x = reference.brought_to_unit_norm(n, _largest(n).clamp_min_(_TINY), dtype)
    x = x.flatten(0, -3) if n.dim() > 2 else x[None]
    if newton_schulz.iterates_narrow(n):
        x = newton_schulz.newton_schulz(x, x.new_ones(len(x), dtype=torch.float32).view(torch.int32))
    else:
        x = reference.newton_schulz(x)
    scale = spectral_scale(rows, columns)
    if not n.is_cuda:
        return x.to(n.dtype, copy=True).reshape(n.shape).mul_(scale)
    direction = torch.empty_like(n, memory_format=torch.contiguous_format)
    torch.mul(x, n.new_full((1,), scale), out=direction.view(x.shape))  # one pass, turned back as well
    return direction


def spectral_scale(rows: int, columns: int) -> float:
    """What brings a matrix with all singular values 1 to an RMS of 1, if it is of full rank."""
    return float(max(rows, columns) ** 0.5)


def _largest(n: Tensor) -> Tensor:
    """Largest magnitude of each matrix [..., O, I], as [..., 1, 1], in the way that is one fast pass."""
    if n.is_cuda:
        return torch.linalg.vector_norm(n, math.inf, dim=(-2, -1), keepdim=True)
    return n.abs().amax(dim=(-2, -1), keepdim=True)


def gram(x: Tensor) -> Tensor:
    """x x^T in fp64 of x fp32 [n, R, C], some columns at a time."""
    n, rows, columns = x.shape
    total = x.new_zeros((n, rows, rows), dtype=torch.float64)
    for part in x.split(max(1, _COLUMNS_AT_ONCE // max(1, n * rows)), dim=-1) if columns else ():
        wide = part.to(torch.float64)
        total.baddbmm_(wide, wide.mT)
    return total


def spectral_coefficients(left_gram: Tensor, right_gram: Tensor, same: Tensor) -> Tensor:
    """`spectral` of N = left^T right, up to its scale, without forming it: for gradients of few tokens.

    The same iteration on X = left^T C right, of which only the R x R matrix C changes: with
    K = C (right right^T) C^T (left left^T), C becomes a C + (b K + c K^2) C. In fp64, since Gram matrices
    square the condition number; R is small. Tokens of several matrices are blocks of C.

    Args:
        left_gram, right_gram: fp64 [n, R, R], left left^T and right right^T.
        same: fp64, broadcasts to [n, R, R]: 1 where two tokens belong to the same matrix, else 0.

    Returns:
        C fp64 [n, R, R]: the direction is left^T C right; 0 where a matrix is zero.
    """
    left_gram, right_gram = left_gram * same, right_gram * same
    square = same @ (left_gram * right_gram).sum(dim=-1, keepdim=True)
    coefficients = torch.diag_embed(torch.where(square > 0, square.rsqrt(), 0)[..., 0])
    a, b, c = newton_schulz.COEFFICIENTS
    for _ in range(newton_schulz.STEPS):
        k = coefficients @ right_gram @ coefficients.mT @ left_gram
        polynomial = torch.baddbmm(k, k, k, beta=b, alpha=c)
        coefficients = torch.baddbmm(coefficients, polynomial, coefficients, beta=a)
    return coefficients


def bring_rows_to_unit_rms(left: Tensor, right_gram: Tensor, same: Tensor, columns: int) -> None:
    """`row` of N = left^T right without forming it: scales `left` in place.

    Args:
        left: fp32 [n, R, O].
        right_gram: fp64 [n, R, R], right right^T.
        same: as in `spectral_coefficients`.
        columns: I.
    """
    n, rows, _ = left.shape
    right_gram = right_gram * same
    for part in left.split(max(1, _COLUMNS_AT_ONCE // max(1, n * rows)), dim=-1):
        wide = part.to(torch.float64)
        square = same @ torch.mul(right_gram @ wide, wide)
        part.mul_(torch.where(square > 0, (square / columns).rsqrt(), 0))


def sinkhorn(n: Tensor) -> Tensor:
    """Bring rows, then columns, to RMS 1, three times: fp32 [..., O, I] -> fp32 [..., O, I]."""
    for _ in range(_SINKHORN_ROUNDS):
        n = _unit_rms(n, dim=-1)
        n = _unit_rms(n, dim=-2)
    return n


def row(n: Tensor) -> Tensor:
    """Bring each row to RMS 1: fp32 [..., O, I] -> fp32 [..., O, I]."""
    return _unit_rms(n, dim=-1)


def sign(n: Tensor) -> Tensor:
    """The sign of every element, a full vote each: fp32 [..., O, I] -> -1, 0, +1."""
    return n.sign()


def _unit_rms(n: Tensor, dim: int) -> Tensor:
    largest = n.abs().amax(dim=dim, keepdim=True).clamp_min(_TINY)
    n = n / largest
    return n * n.square().mean(dim=dim, keepdim=True).clamp_min(_TINY).rsqrt()


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "spectral": spectral,
    "sinkhorn": sinkhorn,
    "row": row,
    "sign": sign,
}


def get_rule(name: str) -> Callable[[Tensor], Tensor]:
    """The direction of a rule by its name; UserError for an unknown one."""
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}; choose one of {', '.join(RULES)}")
    return RULES[name]
