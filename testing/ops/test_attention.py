"""`attention`: closed gradients against autograd, and the kernels against plain softmax in fp64.

The kernels' bounds hold for each element and follow from where a kernel rounds. Rounding x to the operands'
dtype costs u (|x| + the least normal number), u half of its eps; an operation of fp32 costs its eps, since
tensor cores may cut off, and a sum of L products L times that of the sum of their sizes. To first order:

- a weight w is off by w r in fp32, where r collects what its score, the sum over all positions and the
  exponential cost; where it is multiplied with values or gradients it is rounded besides;
- the inner product of an output with its gradient takes the output as rounded, off by as much as outputs are;
- the gradient of a score is off by w times what its factor is off, plus r times itself, and is rounded;
- each result is rounded once more at the end.

Products of two such errors are covered by the factor 1 + 8 u.
"""

import math

import pytest
import torch

from arbitor.ops import attention
from arbitor.ops.attention import attend, can_attend, reference
from arbitor.ops.head_norm import keys_alone
from arbitor.ops.head_norm import reference as head_norm
from testing.guards import DEVICE, moved

# B, N, H, P, R, V, of widths that kernels take.
ALIGNED = [
    (2, 70, 1, 48, 32, 80),
    (1, 1, 1, 8, 8, 8),
    (1, 131, 1, 8, 8, 24),
    (1, 33, 2, 80, 32, 16),
    (0, 5, 2, 8, 8, 8),
    (1, 64, 1, 32, 32, 112),
    (1, 200, 2, 56, 16, 72),
]
SHAPES = [*ALIGNED, (1, 1, 1, 1, 2, 1), (1, 131, 1, 10, 6, 24), (0, 5, 2, 4, 4, 8)]
# On a GPU, kernels are for operands of 16 bits; under the interpreter, those of bf16 are wrong.
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.float16)
EPS32 = torch.finfo(torch.float32).eps

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def kernels(monkeypatch):
    """The module of the kernels, which run."""
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    from arbitor.ops.attention import triton

    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    return triton


def normal(*sizes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)


def inputs(shape, dtype=torch.float32):
    B, N, H, P, R, V = shape
    query, up = normal(B, N, H, P + R, dtype=dtype), normal(B, N, H, P + V, dtype=dtype, seed=1)
    return query, up, normal(B, N, R, dtype=dtype, seed=2)


def among_nans(tensor, rows=64):
    """On the device, with NaN ahead of it and behind it, as many as some positions hold."""
    width = rows * math.prod(tensor.shape[2:])
    storage = torch.full((tensor.numel() + 2 * width,), torch.nan, dtype=tensor.dtype, device=DEVICE)
    inner = storage[width : width + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def results_and_bounds(query, key, value, dout):
    """Output, gradients of query, key and value, in fp64; and by how much those of kernels may differ."""
    u, tiny, K, V, N = torch.finfo(query.dtype).eps / 2, torch.finfo(query.dtype).tiny, *sizes(query, value)
    query, key, value, dout = (t.detach().cpu().double().transpose(1, 2) for t in (query, key, value, dout))
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    score = query @ key.mT * K**-0.5
    weight = score.masked_fill(hidden, -torch.inf).softmax(-1)
    y = weight @ value
    inner = (dout * y).sum(-1, keepdim=True)
    dweight = dout @ value.mT
    dscore = weight * (dweight - inner)
    dquery, dkey = dscore @ key * K**-0.5, dscore.mT @ query * K**-0.5

    def rounding(x):
        return u * (x.abs() + tiny)

    size = (query.abs() @ key.abs().mT * K**-0.5).masked_fill(hidden, 0)
    r = EPS32 * ((K + 8) * (size + size.amax(-1, keepdim=True)) + N + 8)
    off_weight = weight * (r + N * EPS32) + rounding(weight)
    off_y = off_weight @ value.abs() + rounding(y)
    off_dvalue = off_weight.mT @ dout.abs() + rounding(weight.mT @ dout)
    off_inner = (dout.abs() * (off_y + EPS32 * (V + 8) * y.abs())).sum(-1, keepdim=True)
    off_dweight = EPS32 * (V + 8) * dout.abs() @ value.abs().mT
    off_dscore = weight * (off_dweight + off_inner) + (r + N * EPS32) * dscore.abs() + rounding(dscore)
    off_dquery = off_dscore @ key.abs() * K**-0.5 + rounding(dquery)
    off_dkey = off_dscore.mT @ query.abs() * K**-0.5 + rounding(dkey)
    found = y, dquery, dkey, weight.mT @ dout
    off = (t * (1 + 8 * u) for t in (off_y, off_dquery, off_dkey, off_dvalue))
    return [[t.transpose(1, 2) for t in group] for group in (found, off)]


def sizes(query, value):
    return query.shape[-1], value.shape[-1], query.shape[1]


def by_autograd(query, up, shared):
    P = query.shape[-1] - shared.shape[-1]
    key, value = head_norm.keys(up, shared, P), up[..., P:]
    heads = (t.transpose(1, 2) for t in (query, key, value))
    y = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    return y.transpose(1, 2)


def results(function, *given):
    """Output and gradients of the inputs."""
    given = [t.detach().requires_grad_() for t in given]
    y = function(*given)
    y.backward(normal(*y.shape, dtype=y.dtype, seed=3).to(DEVICE if y.is_cuda else "cpu"))
    return [t.detach().cpu() for t in (y, *(t.grad for t in given))]


@each_shape
def test_closed_gradients_are_autograds(shape):
    given = inputs(shape, torch.float64)
    for found, expected in zip(results(attend, *given), results(by_autograd, *given), strict=True):
        torch.testing.assert_close(found, expected)


def test_ops_are_registered_as_they_behave():
    ops = torch.ops.arbitor
    for dtype in (torch.float32, torch.bfloat16):
        query, up, shared = inputs((2, 5, 3, 6, 4, 8), dtype)
        key = head_norm.keys(up, shared, 6)
        out, lse = ops.attention(query, key, up[..., 6:])
        torch.library.opcheck(ops.attention.default, (query, key, up[..., 6:]))
        torch.library.opcheck(
            ops.attention_backward.default, (torch.ones_like(out), query, key, up, out, lse, dtype)
        )


def test_kernels_take_what_they_are_for(kernels):
    query, up, shared = moved(*inputs((1, 3, 2, 48, 32, 80), torch.float16))
    assert can_attend(query, up, shared)
    assert not can_attend(query.float(), up.float(), shared.float())
    assert not can_attend(query[:, 2:], up, shared)  # as after positions of a ledger
    for shape in ((1, 3, 2, 48, 32, 81), (1, 3, 2, 44, 32, 84), (1, 3, 2, 48, 28, 80)):
        assert not can_attend(*moved(*inputs(shape, torch.float16)))
    shifted = torch.empty(up.numel() + 4, dtype=up.dtype, device=DEVICE)[4:].view_as(up)
    assert not can_attend(query, shifted, shared)
    assert not can_attend(query, torch.cat([up, up], dim=-1), shared)


def test_kernels_run_on_gpus_they_were_tried_on(kernels, monkeypatch):
    given = moved(*inputs((1, 3, 2, 48, 32, 80), torch.float16))
    assert can_attend(*given)
    monkeypatch.setattr(attention, "_is_tried", lambda _: False)
    assert not can_attend(*given)


def test_kernels_take_windows_of_one_longer_text(kernels):
    """Whose stride of dims of size 1 is not what contiguous tensors usually have."""
    query, up, shared = moved(*inputs((1, 9, 2, 16, 8, 16), DTYPES[1]))
    part = query[:, :6].contiguous(), up[:, :6], shared[:, :6].contiguous()
    assert can_attend(*part)
    for once, again in zip(results(attend, *part), results(attend, *(t.clone() for t in part)), strict=True):
        assert torch.equal(once, again)


def run_kernels(kernels, query, key, value, dout):
    """As `results_and_bounds`; the values are a part of what is wider, as is their gradient."""
    B, N, H, V = value.shape
    up, dup = (among_nans(torch.full((B, N, H, V + 8), torch.nan, dtype=value.dtype)) for _ in range(2))
    up[..., 8:] = value
    query, key, dout = (among_nans(t) for t in (query, key, dout))
    out, lse = kernels.forward(query, key, up[..., 8:])
    gradients = kernels.backward(dout, query, key, up[..., 8:], out, lse, dup[..., 8:])
    band = dup._base.numel() - dup.numel()
    assert dup._base.isnan().sum() >= band + 8 * B * N * H, "what is not of the values is left alone"
    return [t.cpu() for t in (out, *gradients, dup[..., 8:])]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(ALIGNED[0], DTYPES[0]), *((shape, DTYPES[i % 2]) for i, shape in enumerate(ALIGNED, 1))],
    ids=str,
)
def test_kernels_equal_plain_softmax(shape, dtype, kernels):
    B, N, H, P, R, V = shape
    query, key = (normal(B, N, H, P + R, dtype=dtype, seed=seed) for seed in (0, 1))
    value, dout = (normal(B, N, H, V, dtype=dtype, seed=seed) for seed in (2, 3))
    expected, bounds = results_and_bounds(query, key, value, dout)
    for mine, theirs, bound in zip(
        run_kernels(kernels, query, key, value, dout), expected, bounds, strict=True
    ):
        assert mine.dtype == dtype
        assert ((mine.double() - theirs).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(2, 5, 3, 16, 8, 8), (1, 66, 2, 8, 8, 40)], ids=str)
def test_kernels_within_attend(shape, kernels):
    """The norm's gradient does not stretch an error by more than the norm does."""
    P, dtype = shape[3], DTYPES[1]
    query, up, shared = moved(*inputs(shape, dtype))
    key = keys_alone(up, shared, P)
    dout = normal(*up[..., P:].shape, dtype=dtype, seed=3)
    (y, dquery, dkey, dvalue), bounds = results_and_bounds(query, key, up[..., P:], dout)
    up64 = up.cpu().double()
    dup = torch.empty_like(up64)
    dshared = head_norm.plain_backward(dkey, up64, dup, P, torch.float64)
    found = results(attend, query, up, shared)
    u = torch.finfo(dtype).eps / 2
    for mine, theirs, bound in (
        (found[0], y, bounds[0]),
        (found[1], dquery, bounds[1]),
        (found[2][..., P:], dvalue, bounds[3]),
        (found[3], dshared, bounds[2][..., P:].sum(dim=2) + u * dshared.abs()),
    ):
        assert ((mine.double() - theirs).abs() <= bound * (1 + 8 * u)).all()
    rstd = (up64[..., :P].square().mean(-1) + head_norm.RMS_EPS).rsqrt()
    bound = rstd * bounds[2][..., :P].norm(dim=-1) + u * dup[..., :P].norm(dim=-1)
    assert ((found[2][..., :P].double() - dup[..., :P]).norm(dim=-1) <= bound * (1 + 8 * u)).all()


def test_kernels_take_values_of_any_strides(kernels):
    query, key, value = moved(*(normal(2, 70, 2, 80, dtype=DTYPES[1], seed=seed) for seed in range(3)))
    plain = kernels.forward(query, key, value)
    transposed = value.transpose(1, 2).contiguous().transpose(1, 2)
    odd_rows = torch.cat([value[..., :3], value], dim=-1)[..., 3:]
    shifted = torch.cat([value.flatten()[:3], value.flatten()])[3:].view_as(value)
    for given in (transposed, odd_rows, shifted):
        for mine, theirs in zip(kernels.forward(query, key, given), plain, strict=True):
            assert torch.equal(mine, theirs)


# Which of the positions ahead of, at and behind one show what is not finite there: of the output and of the
# gradients of query, key and value.
SEEN = {
    ("query", torch.nan): ("at", "at", "to", "to"),
    ("key", torch.nan): ("from", "from", "all", "all"),
    ("value", torch.nan): ("from", "from", "all", "none"),
    ("dout", torch.nan): ("none", "at", "to", "to"),
    ("dout", torch.inf): ("none", "at", "to", "to"),
}


@pytest.mark.parametrize(("where", "bad"), SEEN, ids=str)
def test_kernels_show_what_is_not_finite(where, bad, kernels):
    names, place, N = ("query", "key", "value", "dout"), 65, 67
    given = {name: normal(1, N, 1, 16, dtype=DTYPES[1], seed=i) for i, name in enumerate(names)}
    given[where][0, place, 0, 3] = bad
    n = torch.arange(N)
    parts = {"at": n == place, "to": n <= place, "from": n >= place, "all": n >= 0, "none": n < 0}
    found = run_kernels(kernels, *given.values())
    for result, part in zip(found, SEEN[where, bad], strict=True):
        shows = ~result.isfinite().flatten(2).all(dim=-1)[0]
        assert shows[parts[part]].all()


@pytest.mark.gpu
def test_kernels_give_equal_bits_twice(kernels):
    given = moved(*inputs((2, 333, 12, 48, 32, 80), torch.bfloat16))
    for once, again in zip(results(attend, *given), results(attend, *given), strict=True):
        assert torch.equal(once, again)


def test_a_log_sum_is_infinite_behind_the_last_position():
    query = normal(1, 5, 1, 4, dtype=torch.float32)
    _, lse = reference.forward(query, query, query)
    assert lse.shape[-1] % reference.BLOCK == 0
    assert torch.isinf(lse[..., 5:]).all()
    assert lse[..., :5].isfinite().all()
