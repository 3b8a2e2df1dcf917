"""Finite scalar quantisation: every id, the definition in Python numbers, gradients, use of the codes."""

import itertools
import math

import pytest
import torch

from arbitor.ops.activations import RMS_EPS
from arbitor.ops.fsq import MAX_TRITS, fsq, fsq_backward, fsq_trits, reference

each_k = pytest.mark.parametrize("k", range(1, MAX_TRITS + 1))
THRESHOLD = math.atanh(0.5 / 1.001)


def vectors(number, k, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, k, generator=generator, dtype=torch.float64).to(dtype)


def literal(x):
    """Code and id of one vector in Python's floats; None if a number stands too near to a threshold."""
    rms = math.sqrt(math.fsum(v * v for v in x) / len(x) + 1e-6)
    if any(abs(abs(v / rms) - THRESHOLD) < 1e-6 for v in x):
        return None
    code = [round(1.001 * math.tanh(v / rms)) for v in x]
    return code, sum((trit + 1) * 3**n for n, trit in enumerate(code))


def all_codes(k):
    """All 3^k codes in the order of their ids: the first trit turns fastest."""
    return torch.tensor([code[::-1] for code in itertools.product((-1, 0, 1), repeat=k)], dtype=torch.int8)


@each_k
def test_equals_the_definition(k):
    x = vectors(300, k, seed=k)
    codes, ids = fsq(x)
    assert codes.dtype == torch.float32
    assert ids.dtype == torch.int64
    known = [(n, expected) for n, row in enumerate(x.tolist()) if (expected := literal(row))]
    assert len(known) > 290
    assert [(codes[n].tolist(), int(ids[n])) for n, _ in known] == [(code, i) for _, (code, i) in known]


@pytest.mark.parametrize("k", range(1, 9))
def test_every_code_is_found_and_comes_back_from_its_id(k):
    codes = all_codes(k)
    ids = torch.arange(3**k)
    assert torch.equal(fsq_trits(ids, k), codes)
    found, found_ids = fsq(codes.float())
    # A code's own numbers over their RMS are at least 1, so that each is its own nearest code.
    assert torch.equal(found, codes.float())
    assert torch.equal(found_ids, ids)


def test_sampled_ids_of_fifteen_trits():
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat([torch.randint(3**15, (5000,), generator=generator), torch.tensor([0, 3**15 - 1])])
    trits = fsq_trits(ids, 15)
    assert [sum((t + 1) * 3**n for n, t in enumerate(row)) for row in trits.tolist()] == ids.tolist()
    assert torch.equal(fsq(trits.float())[1], ids)
    assert torch.equal(fsq_trits(ids.to(torch.int32), 15), trits)
    assert trits.dtype == torch.int8


@each_k
def test_a_code_depends_on_its_own_vector_only(k):
    x = vectors(203, k)
    codes, ids = fsq(x)
    for size in (1, 2, 7, 64):
        parts = [fsq(part) for part in x.split(size)]
        assert torch.equal(torch.cat([c for c, _ in parts]), codes)
        assert torch.equal(torch.cat([i for _, i in parts]), ids)
    apart = torch.empty(203, 2, k)[:, 1].copy_(x)
    assert torch.equal(fsq(apart)[1], ids)
    assert torch.equal(fsq(x.view(7, 29, k))[1], ids.view(7, 29))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_are_kept_and_compute_in_fp32_or_more(dtype):
    x = vectors(500, 9, dtype=dtype)
    codes, ids = fsq(x)
    assert codes.dtype == dtype
    wide = fsq(x.to(torch.float32 if dtype != torch.float64 else dtype))
    assert torch.equal(ids, wide[1])
    assert torch.equal(codes.float(), wide[0].float())


def test_scale_does_not_matter_and_zero_is_a_code():
    x = vectors(400, 9)
    ids = fsq(x)[1]
    assert torch.equal(fsq(x * 2.0**20)[1], ids)
    codes, ids = fsq(torch.zeros(3, 9))
    assert not codes.any()
    assert ids.tolist() == [(3**9 - 1) // 2] * 3
    # The epsilon of the norm: what is far below it is 0.
    assert not fsq(torch.full((1, 4), 0.1 * RMS_EPS**0.5))[0].any()
    assert fsq(torch.full((1, 4), 10 * RMS_EPS**0.5))[0].all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_shows_and_its_id_is_legal(value):
    x = vectors(5, 4)
    expected = fsq(x)
    x[2, 1] = value
    codes, ids = fsq(x)
    assert codes[2].isnan().all()
    assert 0 <= int(ids[2]) < 81
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(codes[others], expected[0][others])
    assert torch.equal(ids[others], expected[1][others])


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return reference.smooth(x)

    @staticmethod
    def backward(ctx, dy):
        return fsq_backward(dy, *ctx.saved_tensors)


@pytest.mark.parametrize("k", [1, 2, 9, 15])
def test_gradcheck_of_the_smooth_part(k):
    x = vectors(4, k, dtype=torch.float64).mul_(0.7).requires_grad_()
    assert torch.autograd.gradcheck(_Smooth.apply, (x,))


@pytest.mark.parametrize("k", [1, 3, 15])
def test_rounding_passes_the_gradient_straight_through(k):
    x = vectors(50, k, dtype=torch.float64).requires_grad_()
    dy = vectors(50, k, seed=1, dtype=torch.float64)
    z = 1.001 * torch.tanh(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.equal(fsq(x.detach())[0], z.detach().round())
    (expected,) = torch.autograd.grad(z + (z.round() - z).detach(), x, dy)
    actual = fsq_backward(dy, x.detach())
    # Some ten operations of 2^-53 each on numbers whose largest stand for the size of all.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    low = fsq_backward(dy.bfloat16(), x.detach().bfloat16())
    assert low.dtype == torch.bfloat16


def test_codes_of_random_vectors_are_used_almost_evenly():
    # The norm keeps the numbers from being independent; with many of them each is near N(0, 1), for which
    # the entropy of a trit is 1.563 bits of at most 1.585.
    far = math.erfc(THRESHOLD / math.sqrt(2))
    bits = -far * math.log2(far / 2) - (1 - far) * math.log2(1 - far)
    ids = fsq(vectors(400_000, 6))[1]
    share = torch.bincount(ids, minlength=3**6).double() / len(ids)
    perplexity = math.exp(-float(torch.special.xlogy(share, share).sum()))
    assert 0.95 * 2 ** (6 * bits) < perplexity <= 3**6


def test_nothing_to_quantise():
    codes, ids = fsq(torch.empty(0, 3, 4))
    assert codes.shape == (0, 3, 4)
    assert ids.shape == (0, 3)
    assert fsq_backward(codes, codes).shape == (0, 3, 4)
    assert fsq_trits(torch.empty(0, dtype=torch.int64), 4).shape == (0, 4)
    assert fsq_trits(torch.tensor(5), 2).tolist() == [1, 0]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"got torch.float32 \[2, 16\]"):
        fsq(torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"got torch.float32 \[2, 0\]"):
        fsq(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"got torch.int64 \[3\]"):
        fsq(torch.zeros(3, dtype=torch.int64))
    for ids, k in ((torch.zeros(3), 4), (torch.zeros(3, dtype=torch.int64), 16), (torch.tensor(1), 0)):
        with pytest.raises(ValueError, match=f"k = {k}"):
            fsq_trits(ids, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x = vectors(6, 5, dtype=dtype).view(2, 3, 5)
    torch.library.opcheck(torch.ops.arbitor.fsq, (x,))
    torch.library.opcheck(torch.ops.arbitor.fsq_backward, (torch.ones_like(x), x))
    torch.library.opcheck(torch.ops.arbitor.fsq_trits, (torch.arange(9).view(3, 3), 2))
