"""Packing and decoding of trits: `trit_pack`, `trit_unpack`, `ternary_decode`."""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.registry import register
from arbitor.ops.trit_codec import cpu, reference
from arbitor.ops.trit_codec.reference import BLOCK, ILLEGAL, PLANE, legal_bytes, packed_width

__all__ = [
    "BLOCK",
    "ILLEGAL",
    "PLANE",
    "decode",
    "legal_bytes",
    "packed_width",
    "ternary_decode",
    "trit_pack",
    "trit_unpack",
]


def trit_pack(trits: Tensor) -> Tensor:
    """int8 [..., I] of -1, 0, +1 -> uint8 [..., packed_width(I)]."""
    return _pack(trits)


def trit_unpack(packed: Tensor, in_features: int) -> Tensor:
    """uint8 [..., P] -> int8 [..., in_features]; ILLEGAL for bytes that packing never produces."""
    return _unpack(packed, in_features)


def ternary_decode(
    packed: Tensor, exponent: Tensor, in_features: int, group: int, dtype: torch.dtype
) -> Tensor:
    """uint8 [..., O, P] and int8 [..., O, G] -> T * 2^E as `dtype` [..., O, in_features]."""
    return _decode(packed, exponent, in_features, group, dtype)


def decode(packed: Tensor, exponent: Tensor, in_features: int, group: int, dtype: torch.dtype) -> Tensor:
    """What `ternary_decode` computes, for use inside other operations."""
    if dtype in (torch.float32, torch.bfloat16) and uses_triton(packed):
        from arbitor.ops.trit_codec import triton

        return triton.decode(packed, exponent, in_features, group, dtype)
    return reference.decode(packed, exponent, in_features, group, dtype)


def _implementation(x: Tensor) -> Any:
    """The module whose `pack` and `unpack` compute for x."""
    return cpu if x.device.type == "cpu" else reference


_pack = register(
    "trit_pack(Tensor trits) -> Tensor",
    lambda trits: _implementation(trits).pack(trits),
    lambda trits: trits.new_empty((*trits.shape[:-1], packed_width(trits.shape[-1])), dtype=torch.uint8),
)
_unpack = register(
    "trit_unpack(Tensor packed, int in_features) -> Tensor",
    lambda packed, in_features: _implementation(packed).unpack(packed, in_features),
    lambda packed, in_features: packed.new_empty((*packed.shape[:-1], in_features), dtype=torch.int8),
)
_decode = register(
    "ternary_decode(Tensor packed, Tensor exponent, int in_features, int group, ScalarType dtype) -> Tensor",
    decode,
    lambda packed, exponent, in_features, group, dtype: packed.new_empty(
        (*packed.shape[:-1], in_features), dtype=dtype
    ),
)
