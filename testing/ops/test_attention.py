"""`attention`: closed gradients against autograd, and the kernels against the reference."""

import pytest
import torch

from arbitor.ops.attention import attend
from arbitor.ops.head_norm import reference as head_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# B, N, H, P, R, V
SHAPES = [
    (2, 70, 3, 48, 32, 80),
    (1, 1, 1, 1, 2, 1),
    (1, 131, 2, 10, 6, 24),
    (3, 33, 2, 80, 32, 16),
    (0, 5, 2, 4, 4, 8),
    (1, 64, 1, 32, 32, 128),
]
EPS32 = torch.finfo(torch.float32).eps

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(shape, dtype=torch.float32):
    B, N, H, P, R, V = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    return normal(B, N, H, P + R), normal(B, N, H, P + V), normal(B, N, R)


def by_autograd(query, up, shared):
    P = query.shape[-1] - shared.shape[-1]
    key, value = head_norm.keys(up, shared, P), up[..., P:]
    heads = (t.transpose(1, 2) for t in (query, key, value))
    y = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    return y.transpose(1, 2)


def results(function, *given, dtype=torch.float64):
    """Output and gradients of the inputs, which are rounded to `dtype` first."""
    given = [t.detach().to(dtype).requires_grad_() for t in given]
    y = function(*given)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
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


# On a GPU, kernels are for operands of 16 bits; under the interpreter, those of bf16 are wrong.
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.float16)


@each_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one", [(True, True), (True, False), (False, False)], ids=["adding", "one", "two"])
def test_kernels_equal_the_reference(shape, dtype, one, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    from arbitor.ops.attention import triton

    monkeypatch.setattr(triton, "ONE_KERNEL", one[0])
    monkeypatch.setattr(triton, "ADD", one[1])
    given = [t.to(DEVICE) for t in inputs(shape, dtype)]
    expected = results(by_autograd, *given)
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    found = results(attend, *given, dtype=dtype)
    again = results(attend, *given, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for mine, twice, theirs in zip(found, again, expected, strict=True):
        assert torch.equal(mine, twice)
        assert mine.dtype == dtype
        assert mine.shape == theirs.shape
        error = (mine.double() - theirs).norm()
        assert error <= 4 * eps * theirs.norm() + 1e-300
