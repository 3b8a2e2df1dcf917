import copy

import pytest
import torch

from arbitor.ternary.capture import GradientCapture


def use(tokens, rows, columns, seed=0, dtype=torch.bfloat16):
    """One use of a linear: int8 codes [N, I] and output gradients [N, O]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (tokens, columns), generator=generator, dtype=torch.int8)
    return codes, torch.randn(tokens, rows, generator=generator).to(dtype)


def product(codes, dy):
    return dy.to(torch.float64).T @ codes.to(torch.float64)


def kept_bytes(capture):
    pairs = sum(a.nbytes + b.nbytes for a, b in capture._pairs)
    return pairs + (capture._dense.nbytes if capture._dense is not None else 0)


def test_a_new_capture_is_empty():
    capture = GradientCapture(4, 5)
    assert capture.empty
    assert capture.magnitudes() == []
    with pytest.raises(ValueError, match="nothing was captured"):
        capture.gradient()


@pytest.mark.parametrize(
    ("tokens", "pairs"), [(1, True), (20, True), (39, True), (40, False), (64, False)], ids=str
)
def test_the_smaller_form_is_kept(tokens, pairs):
    # 60 + 2 * 40 bytes a token against 2 * 40 * 60 bytes of dW: pairs are smaller below 34.3 tokens.
    tokens = tokens if tokens < 30 or tokens > 39 else tokens - 5
    capture = GradientCapture(40, 60)
    capture.add_linear(*use(tokens, 40, 60))
    assert bool(capture._pairs) == pairs
    assert (capture._dense is None) == pairs
    assert kept_bytes(capture) == min(tokens * 140, 4800)


def test_pairs_turn_into_the_dense_form_once_they_are_larger():
    capture = GradientCapture(40, 60)
    total = torch.zeros(40, 60, dtype=torch.float64)
    for seed in range(5):
        codes, dy = use(11, 40, 60, seed)
        total += product(codes, dy)
        capture.add_linear(codes, dy)
        assert kept_bytes(capture) <= 4800
        assert (capture._dense is None) == (seed < 3)
        # Every product and every sum is rounded to bf16, whose unit roundoff is 2^-8.
        error = (capture.gradient().to(torch.float64) - total).abs().max()
        assert error <= 2 * (seed + 1) * 2**-8 * total.abs().max()
    assert capture._pairs == []
    assert capture.gradient().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [3, 60], ids=["pairs", "dense"])
def test_the_gradient_is_the_sum_of_all_uses(dtype, tokens):
    capture = GradientCapture(12, 15)
    uses = [use(tokens, 12, 15, seed, dtype) for seed in range(3)]
    for codes, dy in uses:
        capture.add_linear(codes, dy)
    expected = sum(product(*u) for u in uses)
    rtol = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(capture.gradient().to(torch.float64), expected, rtol=rtol, atol=rtol * 1000)
    torch.testing.assert_close(capture.gradient(), capture.gradient(), rtol=0, atol=0)


def test_dense_gradients_and_pairs_add_up():
    capture = GradientCapture(12, 15)
    codes, dy = use(2, 12, 15, dtype=torch.float32)
    capture.add_linear(codes, dy)
    capture.add_dense(torch.ones(12, 15))
    capture.add_dense(torch.ones(12, 15))
    capture.add_linear(codes, dy)
    torch.testing.assert_close(
        capture.gradient().to(torch.float64), 2 + 2 * product(codes, dy), rtol=1e-5, atol=1e-3
    )


def test_reading_the_gradient_changes_nothing():
    capture = GradientCapture(12, 15)
    capture.add_dense(torch.ones(12, 15))
    capture.add_linear(*use(2, 12, 15, dtype=torch.float32))
    first = capture.gradient().clone()
    assert torch.equal(capture.gradient(), first)


def test_clear_forgets_everything():
    capture = GradientCapture(12, 15)
    capture.add_linear(*use(2, 12, 15))
    capture.add_dense(torch.ones(12, 15))
    capture.clear()
    assert capture.empty
    assert kept_bytes(capture) == 0


def test_a_copy_is_no_capture():
    capture = GradientCapture(12, 15)
    capture.add_linear(*use(2, 12, 15))
    assert copy.deepcopy(capture) is None
    assert copy.deepcopy({"capture": capture}) == {"capture": None}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["pairs", "pairs-before-dense", "dense", "float-activations"])
def test_magnitudes_show_what_is_not_finite(where, bad):
    def finite(capture):
        return all(bool(m.isfinite().all()) for m in capture.magnitudes())

    capture = GradientCapture(12, 15)
    codes, dy = use(3, 12, 15, dtype=torch.float32)
    codes = codes.to(torch.float32) if where == "float-activations" else codes
    capture.add_linear(codes, dy)
    assert finite(capture)
    if where == "dense":
        capture.add_dense(torch.full((12, 15), bad))
    elif where == "pairs-before-dense":
        # A table that is both embedding and head captures a pair from one use and rows from the other.
        dy[1, 4] = bad
        capture.add_linear(codes, dy)
        capture.add_dense(torch.ones(12, 15))
    elif where == "pairs":
        dy[1, 4] = bad
        capture.add_linear(codes, dy)
    else:
        codes[1, 4] = bad
        capture.add_linear(codes, dy)
    assert not finite(capture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_magnitudes_show_a_product_that_overflows(dtype):
    # Every captured number is finite, their products are not: such a step must be dropped too.
    capture = GradientCapture(40, 60)
    codes = torch.full((3, 60), 127, dtype=torch.int8)
    capture.add_linear(codes, torch.full((3, 40), torch.finfo(dtype).max / 100, dtype=dtype))
    assert not capture.gradient().isfinite().all()
    assert not all(bool(m.isfinite().all()) for m in capture.magnitudes())


def test_magnitudes_of_large_gradients_that_still_fit_are_finite():
    capture = GradientCapture(40, 60)
    capture.add_linear(torch.full((3, 60), 127, dtype=torch.int8), torch.full((3, 40), 1e35))
    assert capture.gradient().isfinite().all()
    assert all(bool(m.isfinite().all()) for m in capture.magnitudes())
