"""Writing rows by number, and going through some at a time."""

import pytest
import torch

from arbitor.ops.rows import row_parts, write_rows


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 5)])
def test_rows_are_written_where_they_belong(shape, strict):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(-9, 9, shape, generator=generator)
    expected = target.clone()
    rows = torch.randint(-9, 9, (3, *shape[1:]), generator=generator)
    rows[2] = rows[0]
    torch.use_deterministic_algorithms(strict)
    try:
        result = write_rows(target, torch.tensor([5, 0, 5]), rows)
        assert torch.are_deterministic_algorithms_enabled() is strict
    finally:
        torch.use_deterministic_algorithms(False)
    expected[5], expected[0] = rows[0], rows[1]
    assert result is target
    assert torch.equal(target, expected)


@pytest.mark.gpu
def test_determinism_is_asked_for_again_on_a_gpu():
    target = torch.zeros(4, 2, device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        write_rows(target, torch.tensor([2, 1], device="cuda"), torch.ones(2, 2, device="cuda"))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert target.sum(dim=1).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (7, 0), (7, 5), (7, 2, 5), (64, 5)])
@pytest.mark.parametrize("most", [1, 23, 1 << 20])
def test_parts_hold_every_row_once_and_not_a_row_more_than_fits(shape, most, monkeypatch):
    monkeypatch.setattr("arbitor.ops.rows.ELEMENTS_A_CORE", most)
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    number = torch.arange(len(x))
    parts = list(row_parts(x, number))
    assert torch.equal(torch.cat([part for part, _ in parts]), x)
    assert torch.equal(torch.cat([part for _, part in parts]), number)
    assert all(part[1:].numel() < most * torch.get_num_threads() for part, _ in parts)
