"""The guards of the other tests catch kernels that write too much or too little, and leave torch as it is."""

import pytest
import torch

from testing.guards import ALIGNMENT, BAND, DEVICE, FILLED, UNWRITTEN, filling, guarding, moved

triton = pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
tl = triton.language

COUNT = 37
DTYPES = [torch.float32, torch.float16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def guards():
    """Each test has its own."""


@triton.jit
def _fill(out, first, last):
    """Twos in the elements from `first` up to `last`."""
    place = first + tl.arange(0, 64)
    tl.store(out + place, tl.full((64,), 2, out.dtype.element_ty), mask=place < last)


@triton.jit
def _put(out, place, value):
    tl.store(out + place, value)


def filled(first, last, dtype=torch.float32):
    out = torch.empty((COUNT,), dtype=dtype, device=DEVICE)
    _fill[(1,)](out, first, last)
    return out


@each_dtype
def test_a_kernel_that_writes_its_elements_passes(dtype):
    with guarding():
        assert filled(0, COUNT, dtype).eq(2).all()


@pytest.mark.parametrize(("first", "last", "where"), [(0, COUNT + 1, "behind"), (-1, COUNT, "in front of")])
@each_dtype
def test_one_element_too_far_is_caught(first, last, where, dtype):
    with pytest.raises(AssertionError, match=rf"{where} {dtype} \[37\] of .*test_guards.py"), guarding():
        filled(first, last, dtype)


@each_dtype
@pytest.mark.parametrize("place", [COUNT - 1, 0, 11])
def test_what_is_left_unwritten_is_no_value(dtype, place):
    with guarding():
        out = filled(0, place, dtype)
        _fill[(1,)](out, place + 1, COUNT)
        others = torch.arange(COUNT) != place
        assert out.cpu()[others].eq(2).all()
        assert set(out[place : place + 1].view(torch.uint8).tolist()) == {filling(dtype)}
        assert not dtype.is_floating_point or out[place].isnan()


@pytest.mark.parametrize("place", [-1, COUNT, -BAND // 4, COUNT + BAND // 4 - 1])
@pytest.mark.parametrize("value", [0.0, float("nan"), 1.0])
def test_inputs_and_what_torch_fills_have_bands(place, value):
    for make in (
        lambda: moved(torch.randn(COUNT))[0],
        lambda: torch.zeros(COUNT, device=DEVICE),
        lambda: moved(torch.randn(COUNT))[0].clone(),
        lambda: torch.cat([torch.randn(30), torch.randn(7)]).to(DEVICE),
        lambda: torch.empty_like(moved(torch.randn(COUNT))[0]),
        lambda: moved(torch.randn(COUNT))[0].new_empty((COUNT,)),
    ):
        with pytest.raises(AssertionError, match=r"a kernel wrote \d bytes"), guarding():
            _put[(1,)](make(), place, value)


def test_a_tensor_without_bands_must_not_be_written():
    with guarding():
        (inside,) = moved(torch.ones(COUNT))
        outside = inside + 4
        with pytest.raises(
            AssertionError, match=r"_fill writes torch.float32 \[37\] that has no guard bands"
        ):
            _fill[(1,)](outside, 0, 1)


def test_tensors_keep_their_layout_and_torch_its_functions():
    names = [(owner, name) for owner, group in (*UNWRITTEN, *FILLED) for name in group.split()]
    before = [getattr(*pair) for pair in names], [vars(owner).get(name) for owner, name in names]
    with guarding():
        assert all(getattr(*pair) is not function for pair, function in zip(names, before[0], strict=True))
        (turned,) = moved(torch.arange(6).view(2, 3).mT)
        assert turned.tolist() == [[0, 3], [1, 4], [2, 5]]
        apart = torch.empty_strided((2, 3), (1, 9))
        assert (turned.stride(), apart.stride()) == ((1, 3), (1, 9))
        assert apart.to(torch.float32) is apart
        for tensor in (turned, apart, torch.empty(3, 5, dtype=torch.int8)):
            assert tensor.data_ptr() % ALIGNMENT == 0
        with pytest.raises(NotImplementedError, match="no bands for empty with out"):
            torch.empty(3, out=turned)
    assert before == (
        [getattr(*pair) for pair in names],
        [vars(owner).get(name) for owner, name in names],
    )
