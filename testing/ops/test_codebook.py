"""Look-up in a table of trits: against all distances, ties, slices, memory."""

import math

import pytest
import torch

from arbitor.ops.codebook import codebook_nearest, reference
from arbitor.ops.trit_codec import trit_pack


def table(rows, width, seed=0, exponents=(-2, 2)):
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (rows, width), generator=generator, dtype=torch.int8)
    exponent = torch.randint(*exponents, (rows, 1), generator=generator, dtype=torch.int8)
    return trits, exponent, trits.double() * 2.0 ** exponent.double()


def queries(number, width, seed=1):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def all_distances(x, rows):
    """Squared distances in fp64, from differences: another formula than the one under test."""
    return (x.double()[:, None] - rows).square().sum(-1)


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(reference, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(reference, "ROWS_AT_ONCE", 5)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (9, 3), (63, 16), (2500, 32), (40, 161)])
def test_finds_the_nearest_of_all(rows, width):
    trits, exponent, values = table(rows, width)
    x = queries(50, width)
    found = codebook_nearest(x, trit_pack(trits), exponent)
    distances = all_distances(x, values)
    smallest = distances.min(dim=-1, keepdim=True).values
    # Rows may be equal, and a distance from differences has rounded in each of its terms.
    near = distances <= smallest * (1 + 4 * width * 2.0**-53)
    assert found.tolist() == near.to(torch.int8).argmax(dim=-1).tolist()


def test_ties_go_to_the_first_row_in_and_across_slices(small_slices):
    trits, exponent, _ = table(4, 12, exponents=(0, 1))
    order = torch.tensor([1, 0, 1, 2, 3, 0, 2, 1, 3, 3, 0, 2, 1])
    first = torch.tensor([1, 0, 3, 4])
    found = codebook_nearest(queries(60, 12), trit_pack(trits[order]), exponent[order])
    alone = codebook_nearest(queries(60, 12), trit_pack(trits), exponent)
    assert torch.equal(found, first[alone])
    assert set(alone.tolist()) == {0, 1, 2, 3}
    # Different rows in equal distance: exact sums, so that nothing but the order decides.
    rows = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]], dtype=torch.int8)
    x = torch.tensor([[0.1, 0.7, 0.7], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0], [0.1, 0.2, 0.2]])
    ones = torch.zeros(4, 1, dtype=torch.int8)
    assert codebook_nearest(x, trit_pack(rows), ones).tolist() == [1, 0, 0, 1]
    assert codebook_nearest(x, trit_pack(rows.flip(0)), ones).tolist() == [1, 1, 0, 1]


def test_slices_and_other_queries_change_nothing(monkeypatch):
    trits, exponent, _ = table(60, 24)
    packed = trit_pack(trits)
    # Queries between two rows, which the last bit of a sum would decide.
    generator = torch.Generator().manual_seed(5)
    pairs = torch.randint(60, (2, 100), generator=generator)
    values = trits.float() * 2.0 ** exponent.float()
    x = torch.cat([queries(100, 24), values[pairs[0]] * 0.5 + values[pairs[1]] * 0.5]) * 0.3
    whole = codebook_nearest(x, packed, exponent)
    assert torch.equal(torch.cat([codebook_nearest(p, packed, exponent) for p in x.split(1)]), whole)
    for size in (1, 7, 59):
        monkeypatch.setattr(reference, "ROWS_AT_ONCE", size)
        monkeypatch.setattr(reference, "QUERIES_AT_ONCE", 3 * size + 10)
        assert torch.equal(codebook_nearest(x, packed, exponent), whole)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3e7])
def test_the_grid_is_fine_and_its_sums_are_exact(scale):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, reference.MAX_WIDTH, generator=generator, dtype=torch.float64) * scale
    x *= 2.0 ** torch.arange(200)[:, None].remainder(9)
    grid = reference._on_grid(x)
    largest = x.abs().amax(dim=-1, keepdim=True)
    assert bool(((grid - x).abs() <= largest * 2.0**-40).all())
    for row, top in zip(grid[:20].tolist(), largest[:20, 0].tolist(), strict=True):
        step = 2.0 ** (math.frexp(top)[1] - 42)
        assert all((value / step).is_integer() for value in row)
        assert top / step * reference.MAX_WIDTH < 1 << 53, (
            "no partial sum, whatever the trits, needs more bits"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_float_types(dtype):
    trits, exponent, _ = table(100, 9)
    x = queries(80, 9).to(dtype)
    expected = codebook_nearest(x.double(), trit_pack(trits), exponent)
    assert torch.equal(codebook_nearest(x, trit_pack(trits), exponent), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook_nearest(x, trit_pack(trits), exponent), expected)


def test_fp64_queries_are_not_rounded_to_fp32():
    rows = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8)
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5 + 1e-10], [0.5 + 1e-10, 0.5]], dtype=torch.float64)
    exponent = torch.zeros(2, 1, dtype=torch.int8)
    assert codebook_nearest(x, trit_pack(rows), exponent).tolist() == [0, 1, 0]
    assert codebook_nearest(x, trit_pack(rows.flip(0)), exponent).tolist() == [0, 0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite_gets_a_legal_row(value):
    trits, exponent, _ = table(30, 4)
    x = queries(6, 4)
    expected = codebook_nearest(x, trit_pack(trits), exponent)
    x[2, 1], expected[2] = value, 0
    assert torch.equal(codebook_nearest(x, trit_pack(trits), exponent), expected)


def test_nothing_of_queries_times_rows_is_formed():
    trits, exponent, _ = table(8_000, 8)
    packed, x = trit_pack(trits), queries(2100, 8)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    with Sizes():
        reference.nearest(x, packed, exponent)
    assert reference.QUERIES_AT_ONCE * reference.ROWS_AT_ONCE == largest < x.shape[0] * len(trits) // 10


def test_no_queries():
    trits, exponent, _ = table(3, 4)
    assert codebook_nearest(torch.empty(0, 4), trit_pack(trits), exponent).tolist() == []


def test_wrong_arguments_are_refused():
    trits, exponent, _ = table(3, 4)
    packed = trit_pack(trits)
    for x in (torch.zeros(4), torch.zeros(2, 1025), torch.zeros(2, 0), torch.zeros(2, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="x must be float"):
            codebook_nearest(x, packed, exponent)
    for p, e in ((packed, exponent[:2]), (packed, exponent[:, 0]), (packed[:0], exponent[:0])):
        with pytest.raises(ValueError, match="at least one row and exponent"):
            codebook_nearest(torch.zeros(2, 4), p, e)


def test_opcheck():
    trits, exponent, _ = table(9, 5)
    torch.library.opcheck(torch.ops.arbitor.codebook_nearest, (queries(4, 5), trit_pack(trits), exponent))
