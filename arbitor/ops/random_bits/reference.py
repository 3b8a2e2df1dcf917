"""Counter-based random bits: a pure function of (seed, step, tensor, element), the same on every device.

The mixing constants are those of the 32-bit hash found by exhaustive search in Ellis' "hash prospector"
(lowbias32). All arithmetic is modulo 2^32, written here with int32 and masked shifts, because torch has no
32-bit unsigned multiply.
"""

import torch
from torch import Tensor

_MULTIPLIER_A = 0x7FEB352D
_MULTIPLIER_B = 0x846CA68B - (1 << 32)  # as the int32 with the same bits
_GOLDEN = 0x9E3779B9


def _mix_int(x: int) -> int:
    """The 32-bit hash on a Python integer."""
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def stream_keys(seed: int, step: int, tensor: int) -> tuple[int, int]:
    """Two int32 keys of the stream that one tensor uses in one step.

    Args:
        seed: of the run, any integer; all of its 64 low bits count.
        step: number of the optimizer step; its low 32 bits count.
        tensor: number of the tensor (and use) within the step.
    """
    key = _mix_int(_mix_int(seed_base(seed) + step) + tensor)
    return _signed(key), _signed(_mix_int(key + _GOLDEN))


def seed_base(seed: int) -> int:
    """What a seed contributes to keys, as the int32 with the same bits."""
    return _signed(_mix_int(_mix_int(seed) + (seed >> 32)))


def step_keys(seed: int, step: Tensor, tensors: Tensor) -> Tensor:
    """int32 [n, 2]; see `arbitor.ops.random_bits.step_keys`."""
    key = _mix(_mix(step + seed_base(seed)) + tensors)
    return torch.stack([key, _mix(key + _signed(_GOLDEN))], dim=-1)


def _mix(x: Tensor) -> Tensor:
    """`_mix_int` on int32."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MULTIPLIER_A
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MULTIPLIER_B
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(keys: Tensor, count: int) -> Tensor:
    """32 random bits for each element.

    Args:
        keys: int32 [..., 2], one pair of `stream_keys` for each tensor.
        count: elements a tensor.

    Returns:
        int32 [..., count]. Users take the low 16 bits for votes and the high 16 for rounding momentum.
    """
    index = torch.arange(count, dtype=torch.int32, device=keys.device)
    x = index + keys[..., 0:1]
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _MULTIPLIER_A
    x ^= keys[..., 1:2]
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _MULTIPLIER_B
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
