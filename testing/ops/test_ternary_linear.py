import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbitor.ops.activations import CODE_SCALE, input_gradient, normalize_and_quantize, scale_tokens
from arbitor.ops.activations import cpu as passes
from arbitor.ops.activations import reference as activations
from arbitor.ops.int8_matmul import cpu
from arbitor.ops.ternary_linear import ternary_linear, ternary_linear_backward
from arbitor.ops.trit_codec import ternary_decode, trit_pack

EPS32 = torch.finfo(torch.float32).eps
SHAPES = [(1, 1, 1), (5, 3, 7), (4, 33, 160), (9, 65, 161), (3, 17, 643), (2, 8, 1280)]  # N, O, I


@pytest.fixture(params=[True, False], ids=["integers", "floats"], autouse=True)
def product(request, monkeypatch):
    """Which product a CPU takes for rows of one exponent; both must do everything here."""
    monkeypatch.setattr(cpu, "pays", lambda *_: request.param)


def matrix(rows, columns, group=None, spread=3, seed=0):
    """T int8 [O, I], packed, E int8 [O, G] around -3, group."""
    generator = torch.Generator().manual_seed(seed)
    group = group or columns
    trits = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    exponent = torch.randint(-spread - 3, -2, (rows, -(-columns // group)), generator=generator).to(
        torch.int8
    )
    return trits, trit_pack(trits), exponent, group


def tokens(number, columns, seed=1, dtype=torch.float32):
    return torch.randn(number, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected_codes(x):
    """Absmax codes by numpy's fp32 arithmetic, one rounding an operation, ties to even."""
    x = x.to(torch.float32).numpy()
    absmax = np.abs(x).max(axis=-1, keepdims=True)
    return np.rint(x * (np.float32(CODE_SCALE) / absmax)).astype(np.int64), absmax


def expected_output(x, trits, exponent, group, rstd):
    """int64 sums of codes times trits at the smallest exponent, then one rounding for the token's scale."""
    codes, absmax = expected_codes(x)
    e = exponent.to(torch.int64).numpy().repeat(group, axis=-1)[:, : trits.shape[1]]
    lowest = int(e.min())
    sums = codes @ (trits.to(torch.int64).numpy() << (e - lowest)).T
    assert np.abs(sums).max() < 1 << 24, "the test's sums must be exact in fp32"
    exact = np.ldexp(sums.astype(np.float32), lowest)
    scale = absmax * rstd.numpy() / np.float32(CODE_SCALE)
    return torch.from_numpy(exact * scale)


@pytest.mark.parametrize("group", [None, 4, 6, 32, 96], ids=lambda g: f"group{g or 'ROW'}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
def test_forward_equals_integer_arithmetic_bit_for_bit(shape, group, input_norm):
    number, rows, columns = shape
    trits, packed, exponent, group = matrix(rows, columns, group)
    x = tokens(number, columns)
    y, codes, scale, rstd = ternary_linear(x, packed, exponent, group, input_norm, True, torch.float32)
    assert codes.dtype == torch.int8
    assert codes.tolist() == expected_codes(x)[0].tolist()
    assert torch.equal(y, expected_output(x, trits, exponent, group, rstd))
    rms = x.to(torch.float64).square().mean(-1, keepdim=True).add(1e-6).sqrt()
    if input_norm:
        assert ((rstd * rms - 1).abs() < EPS32 * (4 + columns**0.5)).all()
    else:
        assert rstd.eq(1).all()
    assert torch.equal(scale, torch.from_numpy(expected_codes(x)[1]) * rstd / CODE_SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_input_and_output_dtypes(dtype, out_dtype):
    trits, packed, exponent, group = matrix(12, 70)
    x = tokens(4, 70, dtype=dtype)
    y, _, _, rstd = ternary_linear(x, packed, exponent, group, True, True, out_dtype)
    assert y.dtype == out_dtype
    assert torch.equal(y, expected_output(x, trits, exponent, group, rstd).to(out_dtype))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    number=st.integers(2, 9),
    rows=st.integers(1, 40),
    columns=st.integers(1, 400),
    cut=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_a_token_does_not_depend_on_its_batch(number, rows, columns, cut, seed):
    _, packed, exponent, group = matrix(rows, columns, 32, seed=seed)
    x = tokens(number, columns, seed)
    together = ternary_linear(x, packed, exponent, group, True, True, torch.float32)
    for part in (x.split(min(cut, number)), x.split(1)):
        apart = [ternary_linear(p, packed, exponent, group, True, True, torch.float32) for p in part]
        for whole, pieces in zip(together, zip(*apart, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_codes_do_not_depend_on_a_tokens_magnitude(power):
    _, packed, exponent, group = matrix(12, 70)
    x = tokens(4, 70)
    codes = ternary_linear(x, packed, exponent, group, False, True, torch.float32)[1]
    scaled = ternary_linear(x * 2.0**power, packed, exponent, group, False, True, torch.float32)[1]
    assert torch.equal(codes, scaled)


def test_the_largest_element_is_127_and_its_half_is_no_tie():
    # Activations are often small integers times one scale. Half the largest must not sit between two codes,
    # where the last bit of an earlier rounding would choose one.
    _, packed, exponent, group = matrix(12, 4)
    for half in (0.5, 0.5 + 2.0**-20, 0.5 - 2.0**-20):
        x = torch.tensor([[1.0, -1.0, half, -half]]) * 0.37
        codes = ternary_linear(x, packed, exponent, group, True, True, torch.float32)[1]
        assert codes.tolist() == [[127, -127, 63, -63]]


def test_a_token_of_zeros_gives_zeros():
    _, packed, exponent, group = matrix(12, 70)
    x = torch.zeros(3, 70)
    y, codes, scale, rstd = ternary_linear(x, packed, exponent, group, True, True, torch.float32)
    assert y.eq(0).all()
    assert codes.eq(0).all()
    assert scale.isfinite().all()
    dx = ternary_linear_backward(torch.ones(3, 12), x, rstd, packed, exponent, group, True)
    assert dx.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
def test_a_value_that_is_not_finite_shows_in_its_token_alone(bad, input_norm):
    _, packed, exponent, group = matrix(12, 70)
    x = tokens(3, 70)
    x[1, 5] = bad
    y, _, scale, _ = ternary_linear(x, packed, exponent, group, input_norm, True, torch.float32)
    assert not scale[1].isfinite().any()
    assert not y[1].isfinite().all()
    assert y[0].isfinite().all()
    assert y[2].isfinite().all()


def test_an_illegal_byte_shows_as_nan():
    _, packed, exponent, group = matrix(12, 70)
    packed[3, 7] = 1
    y = ternary_linear(tokens(2, 70), packed, exponent, group, True, True, torch.float32)[0]
    assert y[:, 3].isnan().all()
    assert y[:, [r for r in range(12) if r != 3]].isfinite().all()


@pytest.mark.parametrize("group", [None, 32], ids=["ROW", "T32"])
@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
def test_float_activations_match_a_dense_linear(group, input_norm):
    _, packed, exponent, group = matrix(40, 161, group)
    x = tokens(6, 161, dtype=torch.float64)
    y, codes, scale, rstd = ternary_linear(x, packed, exponent, group, input_norm, False, torch.float64)
    xn = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() if input_norm else x
    weight = ternary_decode(packed, exponent, 161, group, torch.float64)
    torch.testing.assert_close(y, xn @ weight.T, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(codes, xn, rtol=1e-14, atol=1e-14)
    assert scale.eq(1).all()
    assert rstd.shape == (6, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("squared", [False, True], ids=["plain", "squared"])
def test_backward_matches_autograd_of_a_dense_linear(shape, input_norm, dtype, squared):
    number, rows, columns = shape
    _, packed, exponent, group = matrix(rows, columns, 32)
    x = tokens(number, columns, dtype=dtype)
    dy = tokens(number, rows, seed=2, dtype=dtype)
    rstd = ternary_linear(x, packed, exponent, group, input_norm, True, dtype, squared)[3]
    dx = ternary_linear_backward(dy, x, rstd, packed, exponent, group, input_norm, squared)
    assert dx.dtype == dtype

    x64 = x.to(torch.float64).requires_grad_()
    u64 = x64.relu().square() if squared else x64
    xn = u64 / u64.square().mean(-1, keepdim=True).add(1e-6).sqrt() if input_norm else u64
    weight = ternary_decode(packed, exponent, columns, group, torch.float64)
    (expected,) = torch.autograd.grad(xn @ weight.T, x64, dy.to(torch.float64))
    # Rounding grows with the square root of the terms in a sum: O for dy W, I for the norm's inner product.
    bound = torch.finfo(dtype).eps * (4 + rows**0.5 + columns**0.5)
    magnitude = (dy.abs().to(torch.float64) @ weight.abs()).amax() * rstd.amax()
    if squared:
        magnitude *= 2 * x.relu().amax()
    assert (dx - expected).abs().max() <= bound * magnitude


@pytest.mark.parametrize("quantize", [True, False], ids=["int8", "float"])
def test_a_squared_input_is_that_of_squared_relu(quantize):
    _, packed, exponent, group = matrix(40, 161)
    x = tokens(6, 161)
    expected = ternary_linear(x.relu().square(), packed, exponent, group, True, quantize, torch.float32)
    found = ternary_linear(x, packed, exponent, group, True, quantize, torch.float32, squared=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_backward_leaves_its_arguments_alone():
    _, packed, exponent, group = matrix(12, 70)
    x, dy = tokens(4, 70), tokens(4, 12)
    rstd = ternary_linear(x, packed, exponent, group, True, True, torch.float32)[3]
    arguments = (dy, x, rstd, packed, exponent)
    before = [t.clone() for t in arguments]
    ternary_linear_backward(*arguments, group, True)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_bf16_autocast_changes_no_arithmetic_inside():
    _, packed, exponent, group = matrix(40, 161)
    x, dy = tokens(6, 161), tokens(6, 40)
    y, _, _, rstd = ternary_linear(x, packed, exponent, group, True, True, torch.float32)
    dx = ternary_linear_backward(dy, x, rstd, packed, exponent, group, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ternary_linear(x, packed, exponent, group, True, True, torch.float32)[0], y)
        assert torch.equal(ternary_linear_backward(dy, x, rstd, packed, exponent, group, True), dx)


@pytest.mark.parametrize("quantize", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
def test_opcheck(quantize, input_norm):
    _, packed, exponent, group = matrix(7, 33, 32)
    x, dy = tokens(4, 33), tokens(4, 7)
    arguments = (x, packed, exponent, group, input_norm, quantize, torch.bfloat16, True)
    torch.library.opcheck(torch.ops.arbitor.ternary_linear, arguments)
    rstd = ternary_linear(*arguments)[3]
    backward = (dy, x, rstd, packed, exponent, group, input_norm, True)
    torch.library.opcheck(torch.ops.arbitor.ternary_linear_backward, backward)


@pytest.mark.parametrize("value", [1e25, float("inf"), float("nan")])
def test_a_token_whose_norm_overflows_never_passes_for_zero(value):
    x = torch.randn(3, 40)
    x[1, 7] = value
    packed = trit_pack(torch.ones(2, 40, dtype=torch.int8))
    y, *_ = ternary_linear(x, packed, torch.zeros(2, 1, dtype=torch.int8), 40, True, True, torch.float32)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.fixture(params=[1, 1 << 20], ids=["a token at a time", "at once"])
def at_once(request, monkeypatch):
    monkeypatch.setattr("arbitor.ops.rows.ELEMENTS_A_CORE", request.param)


def difficult_tokens(squared):
    """Ordinary ones, zeros, and the smallest and largest that there are."""
    x = tokens(7, 70)
    x[1] = 0
    x[2] *= 1e-38
    x[3] *= 1e18 if squared else 1e36
    x[4, 5:] = 0
    return x


@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("squared", [True, False], ids=["squared", "plain"])
def test_codes_of_some_tokens_at_a_time_equal_the_reference(input_norm, squared, at_once):
    x = difficult_tokens(squared)
    codes, *factors = passes.quantize(x, input_norm, squared)
    expected, *expected_factors = normalize_and_quantize(x, input_norm, True, squared)
    assert torch.equal(codes.to(torch.float32), expected)
    # One token's square is too large, so its factors are NaN.
    torch.testing.assert_close(factors, expected_factors, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("squared", [True, False], ids=["squared", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_some_tokens_at_a_time_equal_the_reference(input_norm, squared, dtype, at_once):
    x, dxn = tokens(7, 70), tokens(7, 70, seed=2, dtype=dtype)
    rstd = normalize_and_quantize(x, input_norm, True, squared)[2]
    normed = activations.squared_relu(x) if squared else x
    expected = dxn.to(torch.float32, copy=True)
    if input_norm:
        expected = activations.norm_backward(expected, normed, rstd)
    if squared:
        expected = activations.squared_relu_backward(expected, x)
    assert torch.equal(input_gradient(dxn, x, rstd, input_norm, squared), expected)


def test_scaled_tokens_are_rounded_once(at_once):
    x, scale = tokens(7, 70), tokens(7, 1, seed=2)
    assert torch.equal(scale_tokens(x, scale, torch.bfloat16), (x * scale).to(torch.bfloat16))
