"""Packing and decoding of trits: `trit_pack`, `trit_unpack`, `ternary_decode`."""

import torch
from torch import Tensor

from arbitor.ops.trit_codec import reference
from arbitor.ops.trit_codec.reference import (
    BLOCK,
    ILLEGAL,
    PLANE,
    legal_bytes,
    packed_width,
)

__all__ = [
    "BLOCK",
    "ILLEGAL",
    "PLANE",
    "legal_bytes",
    "packed_width",
    "ternary_decode",
    "trit_pack",
    "trit_unpack",
]


@torch.library.custom_op("arbitor::trit_pack", mutates_args=())
def trit_pack(trits: Tensor) -> Tensor:
    """int8 [..., I] of -1, 0, +1 -> uint8 [..., packed_width(I)]."""
    return reference.pack(trits)


@trit_pack.register_fake
def _(trits: Tensor) -> Tensor:
    return trits.new_empty((*trits.shape[:-1], packed_width(trits.shape[-1])), dtype=torch.uint8)


@torch.library.custom_op("arbitor::trit_unpack", mutates_args=())
def trit_unpack(packed: Tensor, in_features: int) -> Tensor:
    """uint8 [..., P] -> int8 [..., in_features]; ILLEGAL for bytes that packing never produces."""
    return reference.unpack(packed, in_features)


@trit_unpack.register_fake
def _(packed: Tensor, in_features: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], in_features), dtype=torch.int8)


@torch.library.custom_op("arbitor::ternary_decode", mutates_args=())
def ternary_decode(
    packed: Tensor, exponent: Tensor, in_features: int, group: int, dtype: torch.dtype
) -> Tensor:
    """uint8 [..., O, P] and int8 [..., O, G] -> T * 2^E as `dtype` [..., O, in_features]."""
    return reference.decode(packed, exponent, in_features, group, dtype)


@ternary_decode.register_fake
def _(packed: Tensor, exponent: Tensor, in_features: int, group: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], in_features), dtype=dtype)
