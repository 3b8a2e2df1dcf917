"""Votes and decoding on a thousand random shapes: the kernels give the bits of the reference.

A shape is as likely to lie between 1 and 2 as between 100 and 200, so that there are single rows and columns,
and most sizes divide by nothing. Every eighth has rows of whole blocks, every fiftieth no matrix.
"""

from dataclasses import astuple

import pytest
import torch

from arbitor.ops.random_bits import random_bits
from arbitor.ops.trit_codec import trit_pack
from testing.guards import DEVICE, guarding, moved
from testing.ops.test_state_update import CONSTANTS

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

RULES = [astuple(CONSTANTS[state]) for state in ("full", "lean", "sign")]


def pytest_generate_tests(metafunc):
    """Under the interpreter a few shapes of a hundred, unless all are asked for."""
    if DEVICE == "cuda":
        seeds = [range(first, first + 250) for first in range(0, 1000, 250)]
    elif metafunc.config.getoption("every"):
        seeds = [range(first, first + 20) for first in range(0, 1000, 20)]
    else:
        seeds = [range(first, first + 4) for first in (0, 4, 500, 996)]
    metafunc.parametrize("seeds", seeds, ids=str)


@pytest.fixture(autouse=True)
def guards():
    """Each shape has its own."""


class Draw:
    """Random numbers of one case, the same on every machine."""

    def __init__(self, seed):
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        columns = self.size(500)
        columns = 320 * (1 + columns // 320) if seed % 8 == 7 else columns
        self.shape = 0 if seed % 50 == 49 else self.size(4), self.size(40), columns

    def integers(self, low, high, *shape, dtype=torch.int8):
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def size(self, most):
        """From 1 to `most`, of all magnitudes alike."""
        return int((most + 1) ** float(torch.rand((), generator=self.generator)))

    def one_of(self, *given):
        return given[int(self.integers(0, len(given)))]

    def state(self):
        return trit_pack(self.integers(-1, 2, *self.shape)), self.integers(-127, 128, *self.shape)

    def keys(self, *shape):
        return self.integers(-(2**31), 2**31, *shape, dtype=torch.int32)

    def equal(self, found, expected):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine.cpu(), theirs), f"seed {self.seed}: {self.shape}"


def test_state_updates_equal_the_reference(seeds):
    from arbitor.ops.state_update import reference, triton

    for seed in seeds:
        with guarding():
            draw = Draw(seed)
            n, rows, columns = draw.shape
            state, keys = draw.state(), draw.keys(n, 2)
            active = draw.integers(0, 4, n, draw.one_of(1, rows), 1) > 0
            direction = torch.randn(draw.shape, generator=draw.generator)
            direction *= torch.exp2(draw.integers(-3, 12, n, rows, 1).float())
            direction.masked_fill_(~active, torch.nan)
            step = torch.tensor(12.8)
            constants = draw.one_of(*RULES)
            found, given = moved(*state), moved(direction, keys, active, step)
            bits = random_bits(keys, rows * columns).view(draw.shape)
            flips = reference.update(*state, direction, bits, active, step, *constants)
            found_flips = triton.update(*found, *given, *constants)
            draw.equal((*found, found_flips), (*state, flips))


def test_updates_of_experts_equal_the_reference(seeds):
    """Of which some have no tokens, and some tokens no expert."""
    from arbitor.ops.factored_update import reference, triton

    for seed in seeds:
        with guarding():
            draw = Draw(seed)
            n, rows, columns = draw.shape
            state, keys = draw.state(), draw.keys(2)
            tokens = draw.one_of(0, draw.size(20), draw.size(20))
            ends = draw.integers(0, tokens + 1, n, dtype=torch.int32).sort().values
            # Products and their sums are exact, in whatever order.
            left = draw.integers(-15, 16, tokens, rows, dtype=torch.float32) / 8
            right = draw.integers(-15, 16, tokens, columns, dtype=torch.float32) / 16
            left[int(ends[-1]) if n else 0 :] = torch.nan
            span, threshold, rail, _ = draw.one_of(*RULES[:2])
            ok, step = torch.tensor(draw.seed % 7 != 6), torch.tensor(12.8)
            flips = torch.tensor(5)
            case = *state, left, right, ends, keys, ok, flips, step
            found = moved(*case)
            if n:  # the reference takes at least one
                reference.update(*case, span, threshold, rail)
            triton.update(*found, span, threshold, rail)
            draw.equal(found[:2] + found[7:8], (*state, flips))


def test_decoded_weights_equal_the_reference(seeds):
    from arbitor.ops.trit_codec import reference, triton

    for seed in seeds:
        with guarding():
            draw = Draw(seed)
            *leading, columns = draw.shape
            group = min(columns, draw.one_of(1, 6, 32, 96, columns))
            exponent = draw.integers(-62, 32, *leading, -(-columns // group))
            case, dtype = (draw.state()[0], exponent), draw.one_of(torch.float32, torch.bfloat16)
            found = triton.decode(*moved(*case), columns, group, dtype)
            trits, scale = triton.decode_rows(*moved(case[0], exponent[..., :1]), columns)
            expected = reference.decode(*case, columns, group, dtype)
            rows = reference.unpack(case[0], columns), torch.exp2(exponent[..., 0].float())
            draw.equal((found, trits, scale), (expected, *rows))
