"""A linear on the first rows: as on a tensor of those rows alone, whatever stands behind them."""

import pytest
import torch
from torch import nn

from arbitor.ops.backend import has_triton
from arbitor.ternary import TernaryLinear, VoteOptimizer
from arbitor.ternary.first_rows import on_first_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, IN, OUT = 11, 34, 21

each_count = pytest.mark.parametrize("count", [0, 1, 7, ROWS])


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "triton" and not has_triton():
        pytest.skip("needs Triton, which the extra `test` installs on Linux")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", request.param)
    return request.param


def make(rows=OUT, columns=IN, **options):
    torch.manual_seed(0)
    return TernaryLinear(columns, rows, **options).to(DEVICE)


def numbers(count, columns, seed):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def counted(count):
    return torch.tensor([count], dtype=torch.int32, device=DEVICE)


def gradients(linear, x, dy, uses=1, **options):
    """Output, gradient of x, and the captured gradient, of some equal uses."""
    optimizer = VoteOptimizer(linear)
    x = x.clone().requires_grad_()
    for _ in range(uses):
        y = linear(x, **options)
        y.backward(dy)
    captured = None if linear.capture.empty else linear.capture.gradient().clone()
    optimizer.detach()
    return y.detach(), x.grad, captured


@pytest.mark.long
@each_count
@pytest.mark.parametrize("tscale", ["ROW", "T32"])
@pytest.mark.parametrize("input_norm", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_equals_the_linear_of_those_rows(count, tscale, input_norm, squared):
    linear = make(tscale=tscale, input_norm=input_norm)
    x, dy = numbers(ROWS, IN, 1), numbers(ROWS, OUT, 2)
    dy[count:] = 0
    expected = gradients(linear, x[:count], dy[:count], squared=squared)
    y, dx, dw = gradients(linear, x, dy, squared=squared, count=counted(count))
    assert torch.equal(y[:count], expected[0])
    assert (y[count:] == 0).all()
    # Sums of OUT and of `count` terms, of bf16 operands on a GPU, in another order.
    close = {"rtol": 1e-5, "atol": 1e-5} if DEVICE == "cpu" else {"rtol": 2**-7, "atol": 2**-5}
    torch.testing.assert_close(dx[:count], expected[1], **close)
    assert (dx[count:] == 0).all()
    if count:
        torch.testing.assert_close(dw, expected[2], **close)
    else:
        assert dw is None or not dw.any()


@pytest.mark.long
@pytest.mark.parametrize("uses", [1, 3])
@pytest.mark.parametrize("count", [0, 30, 50])
def test_many_rows_leave_a_gradient_that_is_formed(uses, count):
    linear = make(10, 24)
    x, dy = numbers(50, 24, 1), numbers(50, 10, 2)
    dy[count:] = 0
    dw = gradients(linear, x, dy, uses, count=counted(count))[2]
    expected = gradients(linear, x, dy, uses)[2]
    # 150 products, each rounded twice; on a GPU also to bf16.
    bound = 150 * 3 * 2.0**-24 + (2.0**-8 if DEVICE == "cuda" else 0)
    assert (dw - expected).abs().max() <= bound * expected.abs().max()


def test_what_stands_behind_is_not_looked_at(backend):
    linear = make()
    x, dy = numbers(ROWS, IN, 1), numbers(ROWS, OUT, 2)
    dy[7:] = 0
    expected = gradients(linear, x, dy, count=counted(7))
    x[7:] = 1e3
    for mine, theirs in zip(gradients(linear, x, dy, count=counted(7)), expected, strict=True):
        assert torch.equal(mine, theirs)
    if backend == "triton":
        x[7:] = torch.nan
        with torch.no_grad():
            assert torch.equal(linear(x, count=counted(7)), expected[0])


def test_other_modules_compute_all_rows():
    linear = nn.Linear(IN, OUT).to(DEVICE)
    x = numbers(ROWS, IN, 1)
    assert torch.equal(on_first_rows(linear, x, counted(3)), linear(x))
    assert torch.equal(on_first_rows(make(), x, None), make()(x))
