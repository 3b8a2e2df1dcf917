"""Which implementation of the operations runs, and the variable that chooses it."""

import os
from importlib.util import find_spec

from torch import Tensor

from arbitor.errors import UserError

VARIABLE = "ARB_TERNARY_BACKEND"
CHOICES = ("auto", "triton", "torch")


def requested_backend() -> str:
    """What `ARB_TERNARY_BACKEND` asks for: "auto" (also if unset), "triton" or "torch".

    "auto" takes torch's operations everywhere: Triton's kernels equal them bit for bit in integers, but which
    is faster at which size has not been measured.

    Raises:
        UserError: another value, or Triton where it is not installed.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in CHOICES:
        raise UserError(f"{VARIABLE} is {value!r}; it must be one of {', '.join(CHOICES)}")
    if value == "triton" and find_spec("triton") is None:
        raise UserError(f"{VARIABLE} is 'triton', but Triton is not installed; use auto or torch")
    return value


def uses_triton(tensor: Tensor) -> bool:
    """Whether the kernels run on this tensor: on a GPU, or anywhere under Triton's interpreter."""
    if os.environ.get(VARIABLE) != "triton":
        return False
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
