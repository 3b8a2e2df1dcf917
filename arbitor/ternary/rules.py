"""Directions of the vote: from a gradient (or its momentum) to a matrix with RMS near 1.

A direction says how strongly each trit is asked to move relative to the others of its matrix; the learning
rate turns it into votes. Shape letters: O out, I in; `...` leading dimensions are separate matrices.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.ops.backend import rounds_gradients

_TINY = 1e-30
_NEWTON_SCHULZ_STEPS = 5
_NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SINKHORN_ROUNDS = 3


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
    x = n / n.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(_TINY)
    x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min_(_TINY))
    x = x.flatten(0, -3) if n.dim() > 2 else x[None]
    if n.is_cuda or rounds_gradients(n):
        x = x.to(torch.bfloat16)
    if rows > columns:
        x = x.mT
    a, b, c = _NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if rows > columns:
        x = x.mT
    return x.to(n.dtype, copy=True).reshape(n.shape).mul_(max(rows, columns) ** 0.5)


def spectral_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """`spectral` of N = left^T right without forming it: for gradients of few tokens.

    The same iteration on X = left^T C right, of which only the R x R matrix C changes: with
    K = C (right right^T) C^T (left left^T), C becomes a C + (b K + c K^2) C. In fp64, since Gram matrices
    square the condition number; R is small.

    Args:
        left: fp32 [..., R, O].
        right: fp32 [..., R, I].

    Returns:
        right' [..., R, I] fp32, so that the direction is left^T right'; and whether N has any element that
        is not 0, bool [...].
    """
    left_gram = left.to(torch.float64)
    left_gram = left_gram @ left_gram.mT
    right_gram = right.to(torch.float64)
    right_gram = right_gram @ right_gram.mT
    square = (left_gram * right_gram).sum(dim=(-2, -1), keepdim=True)
    identity = torch.eye(left.shape[-2], dtype=torch.float64, device=left.device)
    coefficients = identity * torch.where(square > 0, square.rsqrt(), 0)
    a, b, c = _NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(_NEWTON_SCHULZ_STEPS):
        k = coefficients @ right_gram @ coefficients.mT @ left_gram
        coefficients = a * coefficients + (b * k + c * (k @ k)) @ coefficients
    scale = max(left.shape[-1], right.shape[-1]) ** 0.5
    return (coefficients * scale).to(torch.float32) @ right, square[..., 0, 0] > 0


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
