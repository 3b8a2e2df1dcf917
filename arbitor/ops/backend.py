"""Which implementation of the operations runs, and the variable that chooses it."""

import os

from arbitor.errors import UserError

VARIABLE = "ARB_TERNARY_BACKEND"
CHOICES = ("auto", "triton", "torch")


def requested_backend() -> str:
    """What `ARB_TERNARY_BACKEND` asks for: "auto" (also if unset), "triton" or "torch".

    Raises:
        UserError: another value, or one that this version does not have.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in CHOICES:
        raise UserError(f"{VARIABLE} is {value!r}; it must be one of {', '.join(CHOICES)}")
    if value == "triton":
        raise UserError(f"{VARIABLE} is 'triton', but this version has no Triton kernels; use auto or torch")
    return value
