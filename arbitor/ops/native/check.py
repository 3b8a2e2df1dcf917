"""Whether compiled passes give the bits of torch's operations here, with this compiler and this torch.

What could differ is how floats are rounded: torch's own passes round some sums of a product once, others
twice, as its compiler chose.
"""

import ctypes
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from arbitor.ops import native
from arbitor.ops.activations import cpu as activations
from arbitor.ops.int8_matmul import cpu as int8_matmul
from arbitor.ops.momentum import cpu as momentum
from arbitor.ops.random_bits import random_bits, reference
from arbitor.ops.state_update import cpu as state_update
from arbitor.ops.ternary_linear import cpu as ternary_linear
from arbitor.ops.trit_codec import reference as trit_codec

_TOKENS, _COLUMNS, _ROWS = 37, 320, 24
_BITS = 8, 4


def disagreements(library: ctypes.CDLL) -> list[str]:
    """The names of passes whose results differ from torch's."""
    wrong = []
    for name, work in examples().items():
        with native.trying(None):
            expected = work()
        with native.trying(library):
            results = work()
        if not all(map(_equal, results, expected)):
            wrong.append(name)
    return wrong


def examples() -> Mapping[str, Callable[[], tuple[Tensor, ...]]]:
    """A call of every pass, by its name, that changes nothing outside."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    x = normal(_TOKENS, _COLUMNS) * normal(_TOKENS, 1).exp()
    gradient = normal(_TOKENS, _COLUMNS)
    codes = torch.randint(-127, 128, (_TOKENS, _COLUMNS), generator=generator).to(torch.int8)
    trits = torch.randint(-1, 2, (_ROWS, _COLUMNS), generator=generator).to(torch.int8)
    exponent = torch.randint(-20, 5, (_ROWS, 1), generator=generator).to(torch.int8)
    packed = trit_codec.pack(trits)
    scale, rstd = normal(2, _TOKENS, 1).exp()
    row_scale = torch.ldexp(torch.ones(_ROWS), exponent[:, 0])
    keys = torch.randint(-(1 << 31), 1 << 31, (_TOKENS, 2), generator=generator).to(torch.int32)
    bits = reference.random_bits(keys, _COLUMNS)

    def decode() -> tuple[Tensor, ...]:
        return ternary_linear.decode(packed, exponent, _COLUMNS)

    def input_gradient() -> tuple[Tensor, ...]:
        kinds = [(dxn, n, s) for dxn in (gradient, gradient.bfloat16()) for n in (0, 1) for s in (0, 1)]
        return tuple(activations.input_gradient(dxn, x, rstd, bool(n), bool(s)) for dxn, n, s in kinds)

    def quantize() -> tuple[Tensor, ...]:
        kinds = [(bool(n), bool(s)) for n in (0, 1) for s in (0, 1)]
        return sum((activations.quantize(x, *kind) for kind in kinds), ())

    def fold() -> tuple[Tensor, ...]:
        changed: list[Tensor] = []
        for width in _BITS:
            direction = gradient.clone()
            momenta = codes if width == 8 else codes[:, : _COLUMNS // 2].view(torch.uint8) & 0x77 | 0x11
            momenta, exponents = momenta.clone(), torch.full((_TOKENS, _COLUMNS // 32), -9, dtype=torch.int16)
            momentum.fold(direction, momenta, exponents, bits, width, 0.8, 0.5)
            changed += [direction, momenta, exponents]
        return tuple(changed)

    def update() -> tuple[Tensor, ...]:
        blocks = packed.view(-1, trit_codec.PLANE).clone()
        drawn = bits.view(-1, trit_codec.BLOCK)[: len(blocks)]
        direction = gradient.view(-1, trit_codec.BLOCK)[: len(blocks)]
        accumulator = codes.view(-1, trit_codec.BLOCK)[: len(blocks)].clamp(-60, 60)
        flips = state_update.update(blocks, accumulator, direction, drawn, 20.0, 128, 80, 64, False)
        return blocks, accumulator, flips

    return {
        "decode": decode,
        "fold": fold,
        "input_gradient": input_gradient,
        "int8_matmul": lambda: (int8_matmul.int8_matmul(codes, trits, scale, row_scale, torch.float32),),
        "quantize": quantize,
        "random_bits": lambda: (random_bits(keys, _COLUMNS),),
        "round_scaled": lambda: (activations.round_scaled(x, scale),),
        "update": update,
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
