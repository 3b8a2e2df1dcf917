"""Sums by row against a dictionary, to the last bit."""

import pytest
import torch

from arbitor.ops.row_sums import row_sums


def look_ups(count, width, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, (count,), generator=generator)
    return ids, torch.randn(count, width, generator=generator)


@pytest.mark.parametrize(("count", "width", "rows"), [(1, 1, 1), (5, 3, 1), (40, 7, 9), (300, 33, 1 << 40)])
def test_equals_sums_one_after_the_other(count, width, rows):
    ids, gradient = look_ups(count, width, rows)
    expected = {}
    for row, numbers in zip(ids.tolist(), gradient, strict=True):
        expected[row] = expected.get(row, torch.zeros(width)) + numbers
    found_ids, sums = row_sums(ids, gradient)
    order = sorted(expected)
    assert found_ids.tolist() == order + [order[-1]] * (count - len(order))
    for row, numbers in zip(found_ids.tolist(), sums, strict=True):
        assert torch.equal(numbers, expected[row])


def test_of_nothing():
    ids, sums = row_sums(torch.empty(0, dtype=torch.int64), torch.empty(0, 4))
    assert ids.shape == (0,)
    assert sums.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_add_up_in_fp32(dtype):
    ids, gradient = look_ups(50, 6, 3)
    found = row_sums(ids, gradient.to(dtype))[1]
    assert torch.equal(found, row_sums(ids, gradient.to(dtype).float())[1])


def test_what_is_given_stays():
    ids, gradient = look_ups(20, 3, 5)
    given = ids.clone(), gradient.clone()
    row_sums(ids, gradient)
    assert torch.equal(ids, given[0])
    assert torch.equal(gradient, given[1])


@pytest.mark.parametrize("count", [0, 9])
def test_opcheck(count):
    torch.library.opcheck(torch.ops.arbitor.row_sums, look_ups(count, 4, 3))
