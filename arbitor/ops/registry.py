"""Registration of library ops (`torch.ops.arbitor.*`).

`torch.library.custom_op` would do the same, but imports torch's compiler on the first call (2.2 s) and adds
about 0.1 ms to every call.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("arbitor", "FRAGMENT")


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op and its implementation for every device.

    Args:
        schema: name, arguments and returns in torch's schema language.
        reference: plain-torch implementation, run without autograd.
        fake: gives outputs of the right shape, dtype and device without computing, for tracing.

    Returns:
        The callable op.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"arbitor::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.arbitor, name).default
