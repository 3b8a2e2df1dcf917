"""Newton-Schulz in torch's products; see `arbitor.ops.newton_schulz`.

Shape letters: n matrices, O out, I in.
"""

import torch
from torch import Tensor

TINY = 1e-30
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, Muon


def brought_to_unit_norm(n: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [..., O, I] over their norms, in `dtype`, by way of their largest magnitudes [..., 1, 1]."""
    x = n / largest
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min_(TINY)
    return torch.div(x, norm, out=x if dtype == x.dtype else torch.empty_like(x, dtype=dtype))


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps on matrices [n, O, I] of norm 1 or less; of tall ones a transposed view comes back."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
