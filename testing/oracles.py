"""The number format and the learning rule, one element at a time in Python integers.

Written from the definitions in the documentation and not from the tensor code, so that a mistake there does
not repeat here. Nothing in this module uses torch.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

PLANE = 32
BLOCK = 160
MASK = 0xFFFFFFFF


def pack_row(trits: Sequence[int]) -> list[int]:
    """Bytes of one row: digit n of byte j in a block of 160 is element 32 n + j."""
    padded = list(trits) + [0] * (-len(trits) % BLOCK)
    row = []
    for start in range(0, len(padded), BLOCK):
        for j in range(PLANE):
            v = sum((padded[start + PLANE * n + j] + 1) * 3 ** (4 - n) for n in range(5))
            row.append((256 * v + 242) // 243)
    return row


def trits_of_byte(byte: int) -> list[int] | None:
    """The five trits of a byte value, None if packing never produces it."""
    for v in range(243):
        if (256 * v + 242) // 243 == byte:
            return [v // 3 ** (4 - n) % 3 - 1 for n in range(5)]
    return None


def unpack_row(row: Sequence[int], in_features: int) -> list[int]:
    """Inverse of `pack_row`, padding dropped."""
    trits = [0] * (len(row) * 5)
    for index, byte in enumerate(row):
        block, j = divmod(index, PLANE)
        digits = trits_of_byte(byte)
        assert digits is not None
        for n, trit in enumerate(digits):
            trits[BLOCK * block + PLANE * n + j] = trit
    return trits[:in_features]


def weight(trit: int, exponent: int) -> Fraction:
    """T * 2^E."""
    return Fraction(trit) * Fraction(2) ** exponent


def mix(x: int) -> int:
    """lowbias32: xorshift 16, multiply, xorshift 15, multiply, xorshift 16, modulo 2^32."""
    x &= MASK
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def signed(x: int) -> int:
    """The int32 with the same bits."""
    return x - (1 << 32) if x >> 31 else x


def stream_keys(seed: int, step: int, tensor: int) -> tuple[int, int]:
    """The two unsigned keys of a stream."""
    key = mix(mix(mix(mix(seed) + (seed >> 32)) + step) + tensor)
    return key, mix(key + 0x9E3779B9)


def random_word(keys: tuple[int, int], index: int) -> int:
    """Unsigned 32 random bits of one element: the hash of key + index, the second key mixed in halfway."""
    x = (index + keys[0]) & MASK
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x ^= keys[1]
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def fixed_point(value: float, factor: float) -> int:
    """rint(factor * 2^16 * value), the factor and the product rounded to fp32 once each, ties to even."""
    product = np.float32(value) * np.float32(factor * 65536.0)
    return round(Fraction(float(product)))


def vote(value: float, factor: float, random: int) -> int:
    """floor(factor * value + uniform), the uniform number being the low 16 bits of `random`."""
    return (fixed_point(value, factor) + (random & 0xFFFF)) >> 16


def vote_and_flip(
    trit: int, accumulator: int, votes: int, span: int, threshold: int, rail: int, reset: bool
) -> tuple[int, int]:
    """Trit and accumulator after the votes of one step."""
    if votes == 0:
        return trit, accumulator
    total = accumulator + votes
    inclusive = reset or threshold > span / 2
    flip = 0
    if total >= threshold and trit < 1:
        flip = 1
    elif trit > -1 and (total < -threshold or (inclusive and total == -threshold)):
        flip = -1
    trit += flip
    total = 0 if reset and flip else total - flip * span
    if trit == 1:
        total = min(total, rail)
    if trit == -1:
        total = max(total, -rail)
    return trit, max(-127, min(127, total))


def scale_vote(exponent: int, accumulator: int, votes: int, threshold: int) -> tuple[int, int]:
    """Exponent and accumulator after the votes of one step: whole octaves move, the rest stays."""
    if votes == 0:
        return exponent, accumulator
    total = accumulator + votes
    octaves = abs(total) // threshold * (1 if total > 0 else -1)
    return max(-62, min(31, exponent + octaves)), total - octaves * threshold


def table_update(q: int, sign: int, step: float, random: int) -> int:
    """q after a step of `step` against the sign, stochastically rounded and held to +-95."""
    moved = q + ((-sign * round(step * 65536) + (random & 0xFFFF)) >> 16)
    return max(-95, min(95, moved))
