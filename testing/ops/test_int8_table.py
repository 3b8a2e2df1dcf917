import math

import pytest
import torch

from arbitor.ops.int8_matmul import cpu
from arbitor.ops.int8_table import (
    Q_MAX,
    int8_gather,
    int8_linear,
    int8_linear_backward,
    int8_table_update,
)
from arbitor.ops.int8_table.reference import decode
from testing import oracles

ALL_Q = list(range(-Q_MAX, Q_MAX + 1))
EXPONENTS = range(-62, 32)


@pytest.fixture(params=[True, False], ids=["integers", "floats"], autouse=True)
def product(request, monkeypatch):
    """Which product a CPU takes for the forward; both must do everything here."""
    monkeypatch.setattr(cpu, "pays", lambda *_: request.param)


def table(rows=9, dim=33, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-Q_MAX, Q_MAX + 1, (rows, dim), generator=generator, dtype=torch.int8)
    exponent = torch.randint(-4, 1, (rows,), generator=generator, dtype=torch.int8)
    return q, exponent


def tokens(number, dim, seed=1, dtype=torch.float32):
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_code_at_every_exponent():
    q = torch.tensor([ALL_Q] * len(EXPONENTS), dtype=torch.int8)
    exact = [[math.ldexp(code, e - 6) for code in ALL_Q] for e in EXPONENTS]
    return q, torch.tensor(EXPONENTS, dtype=torch.int8), exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_code_at_every_exponent_decodes_exactly(dtype):
    q, exponent, exact = every_code_at_every_exponent()
    assert decode(q, exponent, dtype).to(torch.float64).tolist() == exact


def test_gather_gives_exact_rows_in_the_shape_of_the_ids():
    q, exponent, exact = every_code_at_every_exponent()
    rows = int8_gather(q, exponent, torch.arange(len(EXPONENTS)))
    assert rows.to(torch.float64).tolist() == exact
    ids = torch.tensor([[3, 3, 0], [93, 50, 7]])
    assert torch.equal(int8_gather(q, exponent, ids), rows[ids])
    assert int8_gather(q, exponent, torch.tensor(5)).shape == (len(ALL_Q),)
    assert int8_gather(q, exponent, torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, len(ALL_Q))


@pytest.mark.parametrize(("number", "rows", "dim"), [(1, 1, 1), (5, 288, 160), (3, 9, 33), (2, 4, 1280)])
def test_linear_equals_integer_arithmetic_bit_for_bit(number, rows, dim):
    q, exponent = table(rows, dim)
    x = tokens(number, dim)
    y, codes, scale, _ = int8_linear(x, q, exponent, True, torch.float32)
    sums = codes.to(torch.int64) @ q.to(torch.int64).T
    assert sums.abs().max() < 1 << 24
    # A row's sum times its power of two has at most 24 bits, so only the token's scale rounds.
    exact = [[math.ldexp(s, int(e) - 6) for s, e in zip(row, exponent, strict=True)] for row in sums.tolist()]
    assert torch.equal(y, torch.tensor(exact, dtype=torch.float32) * scale)
    assert codes.abs().amax(-1).eq(127).all()


def test_a_token_does_not_depend_on_its_batch():
    q, exponent = table(288, 160)
    x = tokens(12, 160)
    whole = int8_linear(x, q, exponent, True, torch.float32)[0]
    for size in (1, 2, 5):
        parts = [int8_linear(p, q, exponent, True, torch.float32)[0] for p in x.split(size)]
        assert torch.equal(whole, torch.cat(parts))


def test_linear_and_its_backward_match_a_dense_float64_model():
    q, exponent = table()
    x, dy = tokens(6, 33, dtype=torch.float64), tokens(6, 9, seed=2, dtype=torch.float64)
    y, _, _, rstd = int8_linear(x, q, exponent, False, torch.float64)
    x64 = x.clone().requires_grad_()
    expected = (x64 / x64.square().mean(-1, keepdim=True).add(1e-6).sqrt()) @ decode(q, exponent, x.dtype).T
    torch.testing.assert_close(y, expected.detach(), rtol=1e-13, atol=1e-13)
    (dx,) = torch.autograd.grad(expected, x64, dy)
    actual = int8_linear_backward(dy, x, rstd, q, exponent)
    torch.testing.assert_close(actual, dx, rtol=1e-12, atol=1e-13)


def test_bf16_autocast_changes_no_arithmetic_inside():
    q, exponent = table(40, 161)
    x, dy = tokens(6, 161), tokens(6, 40)
    y, _, _, rstd = int8_linear(x, q, exponent, True, torch.float32)
    dx = int8_linear_backward(dy, x, rstd, q, exponent)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_linear(x, q, exponent, True, torch.float32)[0], y)
        assert torch.equal(int8_linear_backward(dy, x, rstd, q, exponent), dx)


@pytest.mark.parametrize("step", [0.0, 1e-4, 0.3, 1.0, 1.6, 4.8, 300.0])
def test_update_equals_the_oracle_from_every_code(step):
    q = torch.tensor([ALL_Q] * 3, dtype=torch.int8)
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, q.shape, generator=generator).to(torch.int32)
    direction = torch.tensor([-3e-9, 0.0, 7e5])[:, None].expand_as(q).contiguous()
    updated = q.clone()
    int8_table_update(updated, direction, step, bits, torch.ones(3, dtype=torch.bool))
    for row, sign in enumerate((-1, 0, 1)):
        expected = [
            oracles.table_update(code, sign, step, b)
            for code, b in zip(ALL_Q, bits[row].tolist(), strict=True)
        ]
        assert updated[row].tolist() == expected
    assert torch.equal(updated[1], q[1]), "a direction of zero moves nothing"


@pytest.mark.parametrize("step", [0.05, 0.8, 1.6])
def test_update_is_unbiased_over_all_random_numbers(step):
    numbers = torch.arange(1 << 16, dtype=torch.int32)
    bits = (numbers | (numbers * 40503) << 16)[:, None].expand(-1, 2).contiguous()
    q = torch.zeros(1 << 16, 2, dtype=torch.int8)
    direction = torch.tensor([1.0, -1.0]).expand_as(q).contiguous()
    int8_table_update(q, direction, step, bits, torch.ones(1 << 16, dtype=torch.bool))
    assert q.to(torch.int64).sum(0).tolist() == [-round(step * 65536), round(step * 65536)]


def test_inactive_rows_stay():
    q, _ = table()
    active = torch.tensor([True, False, True, False, True, False, True, False, True])
    bits = torch.zeros(q.shape, dtype=torch.int32)
    updated = q.clone()
    int8_table_update(updated, torch.full(q.shape, -1.0), 2.0, bits, active)
    assert torch.equal(updated[~active], q[~active])
    assert torch.equal(updated[active], (q[active].to(torch.int16) + 2).clamp(max=Q_MAX).to(torch.int8))
    updated = q.clone()
    int8_table_update(updated, torch.full(q.shape, torch.nan), 2.0, bits, torch.zeros(9, dtype=torch.bool))
    assert torch.equal(updated, q)


@pytest.mark.parametrize("quantize", [True, False], ids=["int8", "float"])
def test_opcheck_linear(quantize):
    q, exponent = table()
    x = tokens(4, 33)
    arguments = (x, q, exponent, quantize, torch.bfloat16)
    torch.library.opcheck(torch.ops.arbitor.int8_linear, arguments)
    rstd = int8_linear(*arguments)[3]
    torch.library.opcheck(torch.ops.arbitor.int8_linear_backward, (tokens(4, 9), x, rstd, q, exponent))


def test_opcheck_gather_and_update():
    q, exponent = table()
    torch.library.opcheck(torch.ops.arbitor.int8_gather, (q, exponent, torch.tensor([[1, 2], [3, 1]])))
    bits = torch.zeros(q.shape, dtype=torch.int32)
    active = torch.ones(9, dtype=torch.bool)
    arguments = (q, torch.ones(q.shape), torch.tensor(1.5), bits, active)
    torch.library.opcheck(torch.ops.arbitor.int8_table_update, arguments)
