"""Votes from factors: the reference against `state_update` of the product, and the kernel against it."""

import importlib.util

import pytest
import torch

from arbitor.ops.factored_update import factored_update, reference
from arbitor.ops.random_bits import random_bits, skip
from arbitor.ops.state_update import state_update
from arbitor.ops.trit_codec import trit_pack
from testing.guards import moved

CASES = [  # ends of the experts' rows, rows altogether, O, I
    ([1], 1, 1, 1),
    ([0, 0, 0], 3, 5, 7),
    ([2, 2, 9], 9, 37, 161),
    ([0, 3, 3, 4, 5, 5], 7, 18, 40),
    ([3], 5, 33, 700),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
CONSTANTS = [(128, 64, 63), (128, 80, 64)]


def factored_case(case, seed=0):
    """packed, accumulator, left, right, offsets, keys: factors whose products and sums are exact in fp32."""
    ends, count, rows, columns = case
    torch.manual_seed(seed)
    shape = len(ends), rows, columns
    packed = trit_pack(torch.randint(-1, 2, shape, dtype=torch.int8))
    accumulator = torch.randint(-127, 128, shape, dtype=torch.int8)
    left = torch.randint(-15, 16, (count, rows)) / 8.0
    right = torch.randint(-15, 16, (count, columns)) / 16.0
    keys = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32)
    return packed, accumulator, left, right, torch.tensor(ends, dtype=torch.int32), keys


def expected_update(case, ok, constants):
    packed, accumulator, left, right, offsets, keys = factored_case(case)
    flips = torch.zeros((), dtype=torch.int64)
    ends = offsets.tolist()
    rows, columns = accumulator.shape[1:]
    for expert, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        direction = left[first:last].t() @ right[first:last]
        bits = random_bits(skip(keys, expert * rows * columns), rows * columns).view(direction.shape)
        flips += state_update(
            packed[expert],
            accumulator[expert],
            direction,
            bits,
            torch.tensor([[ok]]),
            12.8,
            *constants,
            False,
        )
    return packed, accumulator, flips


@each_case
@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_equals_state_update_of_the_product(case, ok, constants, monkeypatch):
    monkeypatch.setattr(reference, "WEIGHTS_AT_ONCE", 1000)  # several slices
    packed, accumulator, *rest = factored_case(case)
    rest[1][case[0][-1] :] = torch.nan  # right, behind the last expert's rows
    flips = torch.tensor(5)
    factored_update(packed, accumulator, *rest, torch.tensor(ok), flips, 12.8, *constants)
    flips -= 5
    expected = expected_update(case, ok, constants)
    for found, theirs in zip((packed, accumulator, flips), expected, strict=True):
        assert torch.equal(found, theirs)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton, which the extra `test` installs on Linux",
)
@each_case
@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_the_kernel_of_factored_updates_equals_the_reference(case, ok, constants):
    from arbitor.ops.factored_update import triton

    packed, accumulator, left, right, offsets, keys = moved(*factored_case(case))
    left[case[0][-1] :] = torch.nan
    ok_there, step, flips = moved(torch.tensor(ok), torch.tensor(12.8), torch.tensor(0))
    triton.update(packed, accumulator, left, right, offsets, keys, ok_there, flips, step, *constants)
    expected = expected_update(case, ok, constants)
    for found, theirs in zip((packed, accumulator, flips), expected, strict=True):
        assert torch.equal(found.cpu(), theirs)


def test_opcheck():
    *tensors, keys = factored_case(CASES[2])
    arguments = (*tensors, keys, torch.tensor(True), torch.tensor(0), torch.tensor(12.8), 128, 64, 63)
    torch.library.opcheck(torch.ops.arbitor.factored_update, arguments)
