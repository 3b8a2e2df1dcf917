"""Functions between the linears whose result for an element does not depend on where in a tensor it stands.

Vectorised fp32 functions differ in the last bit from the scalar ones that handle the end of a tensor. Where a
threshold or a comparison follows, that would let a position depend on how many others there are; computed in
fp64 and rounded once, values agree (but for one in 2^28).
"""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """Logistic function, in fp32 (fp64 for fp64)."""
    return torch.sigmoid(x.to(torch.float64)).to(torch.promote_types(x.dtype, torch.float32))
