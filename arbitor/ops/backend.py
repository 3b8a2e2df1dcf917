"""Which implementation of the operations runs, and the variable that chooses it."""

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from arbitor.errors import UserError

VARIABLE = "ARB_TERNARY_BACKEND"
CHOICES = ("auto", "triton", "torch")


def requested_backend() -> str:
    """What `ARB_TERNARY_BACKEND` asks for: "auto" (also if unset), "triton" or "torch".

    "auto" takes Triton's kernels on a GPU if Triton is there, and torch's operations otherwise.

    Raises:
        UserError: another value, or Triton where it is not installed.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in CHOICES:
        raise UserError(f"{VARIABLE} is {value!r}; it must be one of {', '.join(CHOICES)}")
    if value == "triton" and not has_triton():
        raise UserError(f"{VARIABLE} is 'triton', but Triton is not installed; use auto or torch")
    return value


def uses_triton(tensor: Tensor) -> bool:
    """Whether the kernels run on this tensor: on a GPU, or, if asked for, under Triton's interpreter."""
    value = os.environ.get(VARIABLE) or "auto"
    if tensor.is_cuda:
        return value == "triton" or (value == "auto" and has_triton())
    return value == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None
