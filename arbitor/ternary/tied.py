"""Modules that share their parameters: each weight has one state and votes once."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from arbitor.errors import UserError
from arbitor.ternary.tensor import IntegerModule


def untied(
    modules: Iterable[tuple[str, IntegerModule]],
) -> tuple[dict[str, IntegerModule], list[tuple[IntegerModule, IntegerModule]]]:
    """Modules by name without those whose parameters another one of them has, and these with that other one.

    Raises:
        UserError: modules share only some of their parameters, or give them another meaning.
    """
    own: dict[str, IntegerModule] = {}
    tied: list[tuple[IntegerModule, IntegerModule]] = []
    owner_of: dict[Any, str] = {}
    for name, module in modules:
        keys = [_identity(parameter) for parameter in module.parameters(recurse=False)]
        sharing = {owner_of[key] for key in keys if key in owner_of}
        if not sharing:
            own[name] = module
            owner_of |= dict.fromkeys(keys, name)
            continue
        first = sorted(sharing)[0]
        if _meaning(module) != _meaning(own[first]):
            raise UserError(
                f"{name} and {first} share some of their weights; modules of one shape may share all their "
                "parameters, as one and the same object, or none"
            )
        tied.append((module, own[first]))
    return own, tied


def _identity(parameter: nn.Parameter) -> Any:
    """Equal for parameters that are one, or lie in the same memory."""
    address = 0 if parameter.is_meta else parameter.data_ptr()
    return (parameter.device, address) if address else id(parameter)


def _meaning(module: IntegerModule) -> tuple[Any, ...]:
    """What must be equal where modules share weights: the parameters themselves, and how they are read."""
    numbers = ("in_features", "out_features", "group", "leading_shape", "sparse", "fraction_bits")
    parameters = {key: id(parameter) for key, parameter in module.named_parameters(recurse=False)}
    return parameters, *(getattr(module, number, None) for number in numbers)
