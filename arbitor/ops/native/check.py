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

_TOKENS, _ROWS = 37, 24
_COLUMNS = 320
_UNEVEN = (200, 33, 7)  # numbers of columns that end within a block, or within a machine's vectors
_BITS = (8, 4)
_CPU = torch.device("cpu")


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
    floats = partial(torch.randn, generator=generator, dtype=torch.float32, device=_CPU)
    integers = partial(torch.randint, generator=generator, device=_CPU)
    x = floats(_TOKENS, _COLUMNS) * floats(_TOKENS, 1).exp()
    gradient = floats(_TOKENS, _COLUMNS)
    codes = integers(-127, 128, (_TOKENS, _COLUMNS), dtype=torch.int8)
    trits = integers(-1, 2, (_ROWS, _COLUMNS), dtype=torch.int8)
    exponent = integers(-20, 5, (_ROWS, 1), dtype=torch.int8)
    packed = trit_codec.pack(trits)
    scale, rstd = floats(2, _TOKENS, 1).exp()
    row_scale = floats(_ROWS).exp()
    keys = integers(-(1 << 31), 1 << 31, (_TOKENS, 2), dtype=torch.int64).to(torch.int32)
    bits = reference.random_bits(keys, _COLUMNS)
    cut = [
        [tensor[:, :columns].contiguous() for tensor in (x, gradient, codes, trits)]
        for columns in (_COLUMNS, *_UNEVEN)
    ]
    kinds = [(norm, squared) for norm in (False, True) for squared in (False, True)]

    def decode() -> tuple[Tensor, ...]:
        parts = [(trit_codec.pack(t), t.shape[1]) for *_, t in cut]
        return sum((ternary_linear.decode(p, exponent, columns) for p, columns in parts), ())

    def input_gradient() -> tuple[Tensor, ...]:
        return tuple(
            activations.input_gradient(dxn, x, rstd, *kind)
            for x, gradient, *_ in cut
            for dxn in (gradient, gradient.to(torch.bfloat16))
            for kind in kinds
        )

    def products() -> tuple[Tensor, ...]:
        rows = torch.arange(_ROWS + 5).remainder(_ROWS)  # so many are no whole panel
        several, scales = [(c, t[rows]) for *_, c, t in cut], row_scale[rows]
        return tuple(int8_matmul.int8_matmul(c, t, scale, scales, torch.float32) for c, t in several)

    def quantize() -> tuple[Tensor, ...]:
        return sum((activations.quantize(x, *kind) for x, *_ in cut for kind in kinds), ())

    def fold() -> tuple[Tensor, ...]:
        changed: list[Tensor] = []
        for width in _BITS:
            direction = gradient.clone()
            momenta = codes if width == 8 else codes[:, : _COLUMNS // 2].view(torch.uint8) & 0x77 | 0x11
            momenta, exponents = momenta.clone(), keys.new_full((_TOKENS, _COLUMNS // 32), -9).to(torch.int16)
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
        "int8_matmul": products,
        "quantize": quantize,
        "random_bits": lambda: tuple(random_bits(keys, columns) for columns in (_COLUMNS, *_UNEVEN)),
        "round_scaled": lambda: tuple(activations.round_scaled(x, scale) for x, *_ in cut),
        "update": update,
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    """To the bit, signs of zero included."""
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(a.dtype, a.dtype)
    return a.dtype == b.dtype and torch.equal(a.view(whole), b.view(whole))
