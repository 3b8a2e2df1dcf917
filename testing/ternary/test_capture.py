import copy

import pytest
import torch

from arbitor.ternary.capture import ExpertCapture, GradientCapture, RowCapture


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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


def finite(capture):
    return all(bool(m.isfinite().all()) for m in capture.magnitudes())


@pytest.mark.parametrize("form", ["pairs", "pairs-and-dense", "rows", "experts"])
def test_a_sum_that_overflows_shows_though_every_use_is_finite(form):
    largest = torch.finfo(torch.float32).max
    codes, dy = torch.full((1, 40), 127, dtype=torch.int8), torch.full((1, 40), largest / 127 * 0.6)
    if form == "rows":
        capture = RowCapture(9, 40)

        def add():
            capture.add_rows(torch.tensor([3]), torch.full((1, 40), largest * 0.6))

    elif form == "experts":
        capture = ExpertCapture(2, 40, 40)

        def add():
            capture.add_experts(codes, dy, torch.tensor([0, 1], dtype=torch.int32))

    else:
        capture = GradientCapture(40, 40)

        def add():
            if form == "pairs" or capture.empty:
                capture.add_linear(codes, dy)
            else:
                capture.add_dense(torch.full((40, 40), largest * 0.6))

    add()
    assert finite(capture)
    add()
    total = capture.touched()[1] if form == "rows" else None
    if form in ("pairs", "pairs-and-dense"):
        total = capture.gradient()
    assert total is None or not total.isfinite().all()
    assert not finite(capture)


@pytest.mark.parametrize("tokens", [2, 200], ids=["pairs", "dense"])
@pytest.mark.parametrize("uses", [1, 3])
def test_half_precision_gradients_beyond_its_range_are_kept(tokens, uses):
    # 127 * 600 is beyond 65,504, the largest number of fp16, and far within the range of a gradient.
    capture = GradientCapture(40, 60)
    codes = torch.full((tokens, 60), 127, dtype=torch.int8)
    for _ in range(uses):
        capture.add_linear(codes, torch.full((tokens, 40), 600.0, dtype=torch.float16))
    assert finite(capture)
    assert torch.equal(capture.gradient(), torch.full((40, 60), 127 * 600.0 * tokens * uses))


def test_half_precision_gradients_that_are_formed_already_add_up_beyond_its_range():
    capture = GradientCapture(4, 5)
    for _ in range(2):
        capture.add_dense(torch.full((4, 5), 60000.0, dtype=torch.float16))
    assert finite(capture)
    assert torch.equal(capture.gradient(), torch.full((4, 5), 120000.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 30, 200])
def test_what_passes_the_flag_is_finite_when_it_is_formed(dtype, tokens):
    # Around the limit, in steps of 1 %; wherever the gradient is not finite, the flag must be down.
    limit = torch.finfo(torch.float32).max / 127 / tokens / 2
    seen = set()
    for percent in range(85, 105):
        capture = GradientCapture(60, 60)
        for _ in range(2):
            capture.add_linear(
                torch.full((tokens, 60), 127, dtype=torch.int8),
                torch.full((tokens, 60), limit * percent / 100, dtype=dtype),
            )
        formed = bool(capture.gradient().to(torch.float32).isfinite().all())
        assert formed or not finite(capture)
        seen.add((formed, finite(capture)))
    assert (True, True) in seen
    assert (False, False) in seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["matrix", "experts", "formed"])
def test_many_micro_batches_equal_one_batch(dtype, kind):
    count, tokens, rows, columns = 1024, 24, 16, 12
    codes, dy = use(count * tokens, rows, columns, dtype=dtype)
    codes, dy = codes.abs(), dy.abs()  # so that sums grow with the number of parts
    offsets = torch.tensor([10, tokens], dtype=torch.int32)
    capture = ExpertCapture(2, rows, columns) if kind == "experts" else GradientCapture(rows, columns)
    expected = torch.zeros(2, rows, columns, dtype=torch.float64)
    for part_codes, part_dy in zip(codes.split(tokens), dy.split(tokens), strict=True):
        for expert, of in enumerate((slice(0, 10), slice(10, tokens))):
            expected[expert] += product(part_codes[of], part_dy[of])
        if kind == "experts":
            capture.add_experts(part_codes, part_dy, offsets)
        elif kind == "matrix":
            capture.add_linear(part_codes, part_dy)
        else:
            capture.add_dense(part_dy.t() @ part_codes.to(dtype) / 1024)
    actual = (capture.dense if kind == "experts" else capture.gradient()).to(torch.float64)
    if kind == "formed":
        actual = actual * 1024
    if kind != "experts":
        expected = expected.sum(0)
    # Every part is rounded once to the dtype that it is formed in; the first sums, of 4 of 1,024 parts, once
    # each too; sums in fp32 over all parts and all tokens.
    formed = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    formed = dtype if kind == "formed" else formed
    unit = torch.finfo(formed).eps / 2
    relative = unit * (1 + 4 * 4 / count) + (count + tokens) * 2**-24
    assert ((actual - expected).abs() <= relative * expected).all()


def test_one_batch_keeps_the_dtype_of_its_gradients():
    # As many uses as a loop makes in one batch cost what one does.
    capture = GradientCapture(40, 60)
    for seed in range(4):
        capture.add_linear(*use(64, 40, 60, seed))
        assert kept_bytes(capture) == 4800
    capture.add_linear(*use(64, 40, 60, 4))
    assert kept_bytes(capture) == 9600
    capture.clear()
    capture.add_linear(*use(64, 40, 60))
    assert kept_bytes(capture) == 4800


@pytest.mark.parametrize("parts", [1, 512])
def test_half_precision_look_ups_of_one_row_add_up(parts):
    capture = RowCapture(9, 4)
    ids, gradient = torch.full((2048,), 3), torch.full((2048, 4), 0.01, dtype=torch.bfloat16)
    for i, g in zip(ids.chunk(parts), gradient.chunk(parts), strict=True):
        capture.add_rows(i, g)
    _, sums = capture.touched()
    expected = 2048 * float(gradient[0, 0])
    assert (sums - expected).abs().max() <= 2048 * 2**-24 * expected


def test_products_keep_their_dtype_inside_autocast():
    plain, inside = GradientCapture(40, 60), GradientCapture(40, 60)
    codes, dy = use(200, 40, 60, dtype=torch.float32)
    plain.add_linear(codes, dy)
    with torch.autocast("cpu", torch.bfloat16):
        inside.add_linear(codes, dy)
    assert torch.equal(inside.gradient(), plain.gradient())
