"""The integer product of a CPU, which `testing/ops/test_kernels.py` has for GPUs."""

import time

import pytest
import torch

from arbitor.ops.int8_matmul import cpu, reference

SIZES = (0, 1, 2, 3, 16, 33, 160, 257)


@pytest.mark.parametrize("at_once", [300, 1 << 20])
@pytest.mark.parametrize("columns", [1, 2, 3, 17, 64, 161, 643])
def test_it_equals_the_reference_at_every_shape(columns, at_once, monkeypatch):
    monkeypatch.setattr("arbitor.ops.rows.ELEMENTS_A_CORE", at_once)
    generator = torch.Generator().manual_seed(columns)
    for tokens in SIZES:
        for rows in SIZES[1:]:
            codes = torch.randint(-127, 128, (tokens, columns), generator=generator, dtype=torch.int8)
            weight = torch.randint(-95, 96, (rows, columns), generator=generator, dtype=torch.int8)
            scale = torch.rand((tokens, 1), generator=generator)
            row_scale = torch.exp2(torch.randint(-9, 9, (rows,), generator=generator).float())
            case = (codes, weight, scale, row_scale, torch.float32)
            assert torch.equal(cpu.int8_matmul(*case), reference.int8_matmul(*case)), (tokens, rows)


def test_strides_of_a_dimension_of_one_element_do_not_matter():
    codes = torch.arange(-60, 60, dtype=torch.int8).as_strided((1, 120), (0, 1))
    weight = torch.ones((5, 120), dtype=torch.int8)
    assert cpu.sums(codes, weight).tolist() == [[-60] * 5]


def test_a_product_that_is_slower_than_that_of_floats_does_not_pay():
    calls = []
    assert not cpu._quicker_than_floats(lambda: calls.append(time.sleep(0.2)))
    assert len(calls) == 2  # and is given up soon
    assert cpu._quicker_than_floats(lambda: None)


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_are_no_trits_need_the_product_of_the_library(by_library, compiled, monkeypatch):
    monkeypatch.setattr(cpu, "library_pays", lambda: by_library)
    monkeypatch.setattr(cpu, "compiled_pays", lambda: compiled)
    assert cpu.pays() is (by_library or compiled)
    assert cpu.pays(95) is by_library
