"""Triton kernels of the linear by expert against the reference, on a GPU or under Triton's interpreter."""

import pytest
import torch

from arbitor.ops.trit_codec import trit_pack
from testing.guards import DEVICE, moved

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

CASES = [  # ends of the experts' rows, rows altogether, O, I
    ([1], 1, 1, 1),
    ([0, 0, 0], 3, 5, 7),
    ([2, 2, 9], 9, 37, 161),
    ([0, 5, 5, 30, 31, 31], 40, 70, 40),
    ([3], 20, 129, 320),
    ([40, 40, 75], 75, 33, 700),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def experts_case(case, group=None, seed=0):
    """offsets, trits, packed, exponent, group, codes, scale, which is NaN behind the rows of experts."""
    ends, count, rows, columns = case
    torch.manual_seed(seed)
    trits = torch.randint(-1, 2, (len(ends), rows, columns), dtype=torch.int8)
    lowest = -3 if group else -9  # sums of what has several exponents a row must be exact in fp32
    group = min(group or columns, columns)
    exponent = torch.randint(lowest, 3, (len(ends), rows, -(-columns // group)), dtype=torch.int8)
    codes = torch.randint(-127, 128, (count, columns), dtype=torch.int8)
    scale = torch.rand(count, 1) * torch.exp2(torch.randint(-30, 30, (count, 1)).float())
    scale[ends[-1] :] = torch.nan
    return torch.tensor(ends, dtype=torch.int32), trits, trit_pack(trits), exponent, group, codes, scale


def owners(ends, count):
    """The expert of each row; -1 behind the last one's."""
    return [next((e for e, end in enumerate(ends.tolist()) if row < end), -1) for row in range(count)]


def weights_of(trits, exponent, group):
    """fp64 [E, O, I]."""
    scale = torch.exp2(exponent.double()).repeat_interleave(group, dim=-1)[..., : trits.shape[-1]]
    return trits.double() * scale


def expected_product(offsets, trits, exponent, group, codes, scale):
    """Sums in fp64, exact here, then one rounding for the token's scale; zeros behind the last expert."""
    weight = weights_of(trits, exponent, group)
    y = torch.zeros(len(codes), trits.shape[1])
    for row, expert in enumerate(owners(offsets, len(codes))):
        if expert >= 0:
            y[row] = (weight[expert] @ codes[row].double()).float() * scale[row]
    return y


@each_case
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_by_expert_equal_the_reference(case, few, dtype, monkeypatch):
    from arbitor.ops.expert_linear import reference, triton

    monkeypatch.setattr(triton, "has_few_rows", lambda *_: few)
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", 1 << 12)  # several slices
    offsets, trits, packed, exponent, group, codes, scale = experts_case(case)
    expected = expected_product(offsets, trits, exponent, group, codes, scale).to(dtype)
    given = moved(codes, scale, offsets, packed, exponent)
    assert torch.equal(triton.product(*given, group, dtype).cpu(), expected)


@each_case
@pytest.mark.parametrize("group", [4, 6, 32, 96])
def test_products_with_several_exponents_a_row_equal_the_reference(case, group, monkeypatch):
    from arbitor.ops.expert_linear import triton

    monkeypatch.setattr(triton, "has_few_rows", lambda *_: True)
    offsets, trits, packed, exponent, group, codes, scale = experts_case(case, group)
    expected = expected_product(offsets, trits, exponent, group, codes, scale)
    found = triton.product(*moved(codes, scale, offsets, packed, exponent), group, torch.float32)
    assert torch.equal(found.cpu(), expected), "integers times powers of two within 24 bits"


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_every_tile_of_products_by_expert_equals_the_reference(few, monkeypatch):
    from arbitor.ops.expert_linear import triton

    monkeypatch.setattr(triton, "has_few_rows", lambda *_: few)
    offsets, trits, packed, exponent, group, codes, scale = experts_case(([30, 31, 80], 90, 140, 170))
    expected = expected_product(offsets, trits, exponent, group, codes, scale)
    given = moved(codes, scale, offsets, packed, exponent)
    name = "_few_tile" if few else "_many_tile"
    for sizes in ((70,), (1 << 14,)) if few else ((1, 3, 70), (1 << 14, 3, 1 << 14)):
        tile = getattr(triton, name)(*sizes)
        monkeypatch.setattr(triton, name, lambda *_, tile=tile: tile)
        assert torch.equal(triton.product(*given, group, torch.float32).cpu(), expected)
        monkeypatch.undo()
        monkeypatch.setattr(triton, "has_few_rows", lambda *_: few)


@each_case
@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("group", [None, 6, 32])
def test_input_gradients_by_expert_are_within_rounding(case, few, group, monkeypatch):
    from arbitor.ops.expert_linear import reference, triton

    monkeypatch.setattr(triton, "has_few_rows", lambda *_: few)
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", 1 << 14)
    monkeypatch.setattr(triton, "MIN_ROWS_EACH", 64)  # several parts of a sum
    offsets, trits, packed, exponent, group, codes, _ = experts_case(case, group)
    count, columns = codes.shape
    rows = trits.shape[1]
    dy = torch.randn(count, rows)
    weight = weights_of(trits, exponent, group)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    rounded = dy.to(dtype).double()
    expected = torch.zeros(count, columns, dtype=torch.float64)
    magnitude = torch.zeros_like(expected)
    for row, expert in enumerate(owners(offsets, count)):
        if expert >= 0:
            expected[row] = rounded[row] @ weight[expert]
            magnitude[row] = rounded[row].abs() @ weight[expert].abs()
    x, rstd = torch.randn(count, columns), torch.ones(count, 1)
    given = moved(dy, x, rstd, offsets, packed, exponent)
    found = triton.backward(*given, group, False, False).cpu().double()
    # Terms are exact; a sum of O of them in fp32, and where the library sums in bf16 one rounding a slice.
    eps = 2.0**-24 * (2 + rows) if few or DEVICE == "cpu" else 2.0**-8
    assert ((found - expected).abs() <= eps * magnitude).all()
    assert (found[int(offsets[-1]) :] == 0).all()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("input_norm", [False, True])
def test_what_is_around_products_leaves_rows_behind_the_last_out(input_norm, squared):
    from arbitor.ops.activations import triton

    torch.manual_seed(0)
    offsets, x, gradient = moved(torch.tensor([2, 2, 5], dtype=torch.int32), *torch.randn(2, 8, 300))
    codes, scale, rstd = triton.quantize(x[:5], input_norm, squared)
    expected = triton.norm_backward(gradient[:5], x[:5], rstd, input_norm, squared)
    x[5:] = gradient[5:] = torch.nan
    found = triton.quantize(x, input_norm, squared, offsets=offsets)
    for mine, theirs in zip(found, (codes, scale, rstd), strict=True):
        assert torch.equal(mine[:5], theirs)
    assert (found[1][5:] == 0).all()
    assert (found[2][5:] == 0).all()
    dx = triton.norm_backward(gradient, x, found[2], input_norm, squared, offsets=offsets)
    assert torch.equal(dx[:5], expected)
    assert (dx[5:] == 0).all()


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("group", [None, 32])
def test_illegal_bytes_of_experts_show(few, group, monkeypatch):
    from arbitor.ops.expert_linear import triton

    if not few and group:
        pytest.skip("the reference multiplies these")
    monkeypatch.setattr(triton, "has_few_rows", lambda *_: few)
    offsets, _, packed, exponent, group, codes, scale = experts_case(([3, 6, 8], 8, 20, 161), group)
    packed[0, 4, 3] = 1
    packed[2] = 1  # of an expert whose rows are last
    offsets[2] = 6  # and now has none
    given = moved(codes, scale, offsets, packed, exponent)
    y = triton.product(*given, group, torch.float32).cpu()
    assert y[:3].isnan().any(dim=0).nonzero().flatten().tolist() == [4]
    assert y[3:].isfinite().all()
    x, rstd, dy = torch.randn(8, 161), torch.ones(8, 1), torch.randn(8, 20)
    given = moved(dy, x, rstd, offsets, packed, exponent)
    dx = triton.backward(*given, group, False, False).cpu()
    bad = dx.isnan()
    assert bad[3:].sum() == 0
    assert bad[:3].all(dim=0).nonzero().flatten().tolist() == [3, 35, 67, 99, 131]


@pytest.mark.parametrize("tokens", [1, 7, 66])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("quantize", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("squared", [False, True])
def test_the_linear_by_expert_equals_the_reference(tokens, group, quantize, squared, monkeypatch):
    from arbitor.ops.expert_linear import expert_linear

    offsets = torch.tensor([tokens // 3, tokens // 3, tokens], dtype=torch.int32)
    _, _, packed, exponent, group, _, _ = experts_case((offsets.tolist(), tokens, 37, 200), group)
    x = torch.randn(tokens, 200)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        given = moved(x, offsets, packed, exponent)
        results.append(expert_linear(*given, group, False, quantize, torch.float32, squared))
    for expected, found in zip(*results, strict=True):
        if quantize:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected)


def test_gradients_of_experts_without_rows_are_zeros():
    from arbitor.ops.expert_linear import triton

    gradient = torch.full((4, 9, 70), torch.nan)
    gradient[1] = 3
    found = triton.clear_idle(*moved(gradient, torch.tensor([0, 5, 5, 5], dtype=torch.int32)))
    assert (found[1] == 3).all()
    assert (found[[0, 2, 3]] == 0).all()


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16",) * 2, ("float32",) * 2], ids=str)
def test_gradients_are_added_where_experts_have_rows_and_nothing_else_is_written(dtypes):
    from arbitor.ops.expert_linear import triton

    total, gradient = (
        torch.randn(4, 9, 701, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
        for seed, dtype in enumerate(dtypes)
    )
    if total.dtype == torch.bfloat16:  # which Triton's interpreter rounds towards zero
        total, gradient = total.round(), gradient.round()
    gradient[[0, 2]] = torch.nan  # of experts without rows
    gradient[3, 4, 5] = torch.inf
    expected = total.clone()
    expected[[1, 3]] += gradient[[1, 3]]
    given = moved(total, gradient, torch.tensor([0, 5, 5, 9], dtype=torch.int32))
    triton.add_busy(*given)
    assert torch.equal(given[0].cpu(), expected)


@pytest.mark.parametrize("ends", [[0, 5, 5, 30], [40, 40, 40, 40], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("sizes", [(70, 37), (8, 16)], ids=str)
def test_products_by_expert_are_added_as_those_that_are_formed(ends, sizes, monkeypatch):
    from arbitor.ops.expert_linear import add_grouped_outer, grouped_outer

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, size, generator=generator) for size in sizes)
    total = torch.randn(4, *sizes, generator=generator)
    offsets = torch.tensor(ends, dtype=torch.int32)
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        found, *given = moved(total, a, b, offsets)
        expected = found + grouped_outer(*given)
        add_grouped_outer(found, *given)
        assert torch.equal(found, expected)
