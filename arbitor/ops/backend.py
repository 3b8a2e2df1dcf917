"""Which implementation of the operations runs, and how gradients are rounded on the way."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from arbitor.errors import UserError

VARIABLE = "ARB_TERNARY_BACKEND"
CHOICES = ("auto", "triton", "torch")

_rounds_on_cpu = False


def environment_choice(variable: str, choices: Sequence[str]) -> str:
    """What an environment variable asks for, "auto" if it is unset or empty.

    Raises:
        UserError: none of its choices.
    """
    value = os.environ.get(variable) or "auto"
    if value not in choices:
        raise UserError(f"{variable} is {value!r}; it must be one of {', '.join(choices)}")
    return value


def requested_backend() -> str:
    """What `ARB_TERNARY_BACKEND` asks for: "auto" (also if unset), "triton" or "torch".

    "auto" takes Triton's kernels on a GPU if Triton is there, and torch's operations otherwise.

    Raises:
        UserError: another value, or Triton where it is not installed.
    """
    value = environment_choice(VARIABLE, CHOICES)
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
def has_bf16_products() -> bool:
    """Whether this CPU has instructions for products of bf16 (AVX-512 BF16, AMX): twice as fast as fp32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def rounded_gradients(on: bool) -> Iterator[None]:
    """Inside, products of gradients on a CPU take bf16 operands and give bf16, as on a GPU, if `on`.

    Args:
        on: else they are of fp32, as they are outside.
    """
    global _rounds_on_cpu
    before, _rounds_on_cpu = _rounds_on_cpu, on
    try:
        yield
    finally:
        _rounds_on_cpu = before


def rounds_gradients(x: Tensor) -> bool:
    """Whether products with this gradient, or with that of this tensor, are to be of bf16 on the CPU."""
    return _rounds_on_cpu and x.device.type == "cpu" and x.dtype == torch.float32


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None
