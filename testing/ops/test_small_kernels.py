"""Triton kernels of look-ups and tables against the reference: on a GPU, elsewhere under the interpreter.

They are compared bit by bit, in memory that shows what is written outside of a tensor or not at all
(`testing/guards.py`).
"""

import math

import pytest
import torch

from arbitor.ops.random_bits import reference as random_reference
from arbitor.ops.trit_codec import legal_bytes, trit_pack
from testing.guards import DEVICE, moved
from testing.ops.test_kernels import keys

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

needs_bf16 = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no bf16 of its own")
float_types = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_bf16)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, shape, dtype=torch.int64, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_kernels(function, *tensors, **options):
    """What a kernel makes of tensors, on the CPU."""
    found = function(*moved(*tensors), **options)
    return tuple(t.cpu() for t in found) if isinstance(found, tuple) else found.cpu()


# -- byte tables --------------------------------------------------------------------------------------------

TABLES = [(1, 1), (9, 33), (288, 160), (5, 3000), (7, 480)]
each_table = pytest.mark.parametrize(("rows", "dim"), TABLES)
each_shape_of_ids = pytest.mark.parametrize("ids_shape", [(), (1,), (0,), (3, 7), (130,)], ids=str)


def byte_table(rows, dim):
    return integers(-95, 96, (rows, dim), torch.int8), integers(-62, 32, (rows,), torch.int8)


@each_table
@each_shape_of_ids
def test_int8_gather_equals_the_reference(rows, dim, ids_shape):
    from arbitor.ops.int8_table import reference, triton

    case = *byte_table(rows, dim), integers(0, rows, ids_shape)
    assert torch.equal(of_kernels(triton.gather, *case), reference.gather(*case))


def test_rows_that_no_byte_table_has_are_nan():
    from arbitor.ops.int8_table import triton

    ids = torch.tensor([3, 4, -1, 0, 2**40])
    found = of_kernels(triton.gather, *byte_table(4, 10), ids)
    assert found.isnan().all(dim=1).tolist() == [False, True, True, False, True]


@each_table
@pytest.mark.parametrize("step", [0.0, 0.3, 4.8, 300.0])
def test_int8_update_equals_the_reference(rows, dim, step):
    from arbitor.ops.int8_table import reference, triton

    q, _ = byte_table(rows, dim)
    direction = draw(rows, dim) * (draw(rows, dim, seed=1) > 0)
    active, stream, step = draw(rows, seed=2) > -0.5, keys(1), torch.tensor(step)
    expected = q.clone()
    bits = random_reference.random_bits(stream, q.numel()).view(q.shape)
    reference.update(expected, direction, step, bits, active)
    found, *given = moved(q, direction, step, stream, active)
    triton.update(found, *given)
    assert torch.equal(found.cpu(), expected)


def test_a_step_of_a_byte_table_equals_the_reference(monkeypatch):
    from arbitor.ops.int8_table import int8_table_step

    q, stream = integers(-95, 96, (13, 70), torch.int8), keys(1)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        table, codes = moved(q, torch.zeros(13, 70, dtype=torch.int8))
        exponent = torch.zeros(13, 3, dtype=torch.int16, device=DEVICE)
        for step in range(3):
            gradient, active = moved(draw(13, 70, seed=step), draw(13, seed=9 + step) > -1)
            int8_table_step(table, gradient, codes, exponent, *moved(stream), active, 1.7, 0.9, 0.95)
        results.append((table, codes, exponent))
    assert not torch.equal(results[0][0].cpu(), q)
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


# -- random bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1023), (1, 5000), (700, 3), (2, 0), (0, 4)], ids=str)
def test_random_bits_kernel_equals_the_reference(shape):
    from arbitor.ops.random_bits import triton

    stream, count = keys(shape[0]), shape[1]
    expected = random_reference.random_bits(stream, count)
    assert torch.equal(of_kernels(triton.random_bits, stream, count=count), expected)


# -- codes of trits -----------------------------------------------------------------------------------------

each_k = pytest.mark.parametrize("k", [1, 2, 9, 15])
each_leading = pytest.mark.parametrize("leading", [(), (1,), (0,), (3, 43), (257,)], ids=str)


@each_k
@each_leading
@pytest.mark.parametrize("dtype", float_types, ids=str)
def test_fsq_kernel_equals_the_reference(k, leading, dtype):
    from arbitor.ops.fsq import reference, triton

    x = (draw(*leading, k) * 3).to(dtype)
    for expected, found in zip(reference.quantize(x), of_kernels(triton.quantize, x), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_fsq_kernel_shows_what_is_not_finite(value):
    from arbitor.ops.fsq import reference, triton

    x = draw(5, 4)
    x[2, 1] = value
    (codes, ids), expected = of_kernels(triton.quantize, x), reference.quantize(x)
    assert codes.isnan().all(dim=1).tolist() == [False, False, True, False, False]
    assert torch.equal(codes.nan_to_num(7), expected[0].nan_to_num(7))
    assert torch.equal(ids, expected[1])


@each_k
@each_leading
def test_fsq_backward_kernel_equals_the_reference(k, leading):
    from arbitor.ops.fsq import reference, triton

    x, dy = draw(*leading, k), draw(*leading, k, seed=1)
    expected = reference.backward(dy.double(), x.double())
    found = of_kernels(triton.backward, dy, x)
    assert found.dtype == torch.float32
    # Of numbers of RMS 1: sums of k terms, and a dozen operations on either side of a difference.
    size = (dy.abs().sum(-1, keepdim=True) + 1) / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert ((found - expected).abs() <= 2**-24 * (12 + k) * size).all()


@each_k
@each_leading
def test_trits_of_ids_kernel_equals_the_reference(k, leading):
    from arbitor.ops.fsq import reference, triton

    ids = integers(0, 3**k, leading)
    assert torch.equal(of_kernels(triton.trits, ids, k=k), reference.trits(ids, k))


# -- learned codebooks --------------------------------------------------------------------------------------


def codebook(rows, width, exponents=(-2, 2)):
    return trit_pack(integers(-1, 2, (rows, width), torch.int8)), integers(*exponents, (rows, 1), torch.int8)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (63, 32), (130, 33), (70, 161)])
@pytest.mark.parametrize("queries", [0, 1, 70])
@pytest.mark.parametrize("dtype", [torch.float64, *float_types], ids=str)
def test_nearest_kernel_equals_the_reference(rows, width, queries, dtype):
    from arbitor.ops.codebook import reference, triton

    x = (draw(queries, width) * torch.exp2(integers(-20, 20, (queries, 1)))).to(dtype)
    case = x, *codebook(rows, width)
    assert torch.equal(of_kernels(triton.nearest, *case), reference.nearest(*case))


def test_nearest_kernel_of_the_largest_sums_equals_the_reference():
    from arbitor.ops.codebook import reference, triton

    signs = integers(0, 2, (5, reference.MAX_WIDTH)) * 2 - 1
    # Every product counts, so that the sums are as large as they can be.
    case = signs * (2 - 2.0**-23), trit_pack(signs.to(torch.int8)), torch.zeros(5, 1, dtype=torch.int8)
    found = of_kernels(triton.nearest, *case)
    assert found.tolist() == reference.nearest(*case).tolist() == list(range(5))


def test_ties_of_the_nearest_kernel_go_to_the_first_row():
    from arbitor.ops.codebook import reference, triton

    packed, exponent = codebook(5, 12, exponents=(0, 1))
    order = integers(0, 5, (300,), seed=3)
    values = reference.ternary_decode(packed, exponent, 12, 12, torch.float32)
    between = (values[:, None] + values).flatten(0, 1) * 0.15
    case = between, packed[order], exponent[order]
    found = of_kernels(triton.nearest, *case)
    assert torch.equal(found, reference.nearest(*case))
    assert (found < 64).all(), "equal rows follow in every tile"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nearest_kernel_gives_a_query_that_is_not_finite_row_0(value):
    from arbitor.ops.codebook import reference, triton

    x, table = draw(70, 9), codebook(100, 9)
    x[2, 1] = value
    found = of_kernels(triton.nearest, x, *table)
    assert found[2] == 0
    assert torch.equal(found, reference.nearest(x, *table))


def test_a_row_with_an_illegal_byte_is_nobodys_nearest_in_the_kernel():
    from arbitor.ops.codebook import triton

    packed, exponent = codebook(70, 32)
    x = draw(200, 32)
    packed[5, 3] = int((~legal_bytes(torch.device("cpu"))).nonzero()[0])
    assert 5 not in of_kernels(triton.nearest, x, packed, exponent)


# -- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids_shape", [(3,), (2,), (0, 9), (2, 7), (3, 5, 40)], ids=str)
@pytest.mark.parametrize(("heads", "num_rows"), [(1, 1), (4, 1 << 15), (3, 1009), (2, 1 << 28)])
def test_ngram_hash_kernel_equals_the_reference(ids_shape, heads, num_rows):
    from arbitor.ops.ngram_hash import reference, triton

    ids = integers(0, 3**15, ids_shape)
    found = of_kernels(triton.rows, ids, heads=heads, num_rows=num_rows)
    assert torch.equal(found, reference.rows(ids, heads, num_rows))


@pytest.mark.parametrize("width", [1, 40, 160, 161, 479])
@pytest.mark.parametrize("group", [6, 1000])
@each_shape_of_ids
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=str)
def test_gathered_trits_equal_the_reference(width, group, ids_shape, dtype):
    from arbitor.ops.trit_gather import reference, triton

    group = min(group, width)
    packed = trit_pack(integers(-1, 2, (37, width), torch.int8))
    exponent = integers(-62, 32, (37, -(-width // group)), torch.int8)
    case, rest = (packed, exponent, integers(0, 37, ids_shape)), (width, group, dtype)
    found = of_kernels(lambda *tensors: triton.gather(*tensors, *rest), *case)
    assert torch.equal(found, reference.gather(*case, *rest))


def test_gathered_trits_of_illegal_bytes_and_of_no_row_are_nan():
    from arbitor.ops.trit_gather import triton

    packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
    ids = torch.tensor([*range(8), 8, -1])
    found = triton.gather(*moved(packed, torch.zeros(8, 1, dtype=torch.int8), ids), 160, 160, torch.float32)
    illegal = ~legal_bytes(torch.device("cpu")).view(8, 1, 32).expand(8, 5, 32).reshape(8, 160)
    assert torch.equal(found[:8].isnan().cpu(), illegal)
    assert found[8:].isnan().all()


# -- motif graph --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 37, 300])
@pytest.mark.parametrize("used", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("ids_shape", [(), (0, 3), (3, 67)], ids=str)
def test_look_up_kernel_equals_the_reference(capacity, used, count, ids_shape):
    from arbitor.ops.edge_list import UNUSED, reference, triton

    edges = round(capacity * used)
    src = integers(0, 9, (capacity,), torch.int32).sort().values
    src[edges:] = UNUSED
    dst = integers(0, 3**15, (capacity,), torch.int32).masked_fill(src == UNUSED, 0)
    score = integers(1, 128, (capacity,), torch.int8).masked_fill(src == UNUSED, 0)
    case = src, dst, score, integers(0, 11, ids_shape)
    found = of_kernels(triton.look_up, *case, count=count)
    for mine, expected in zip(found, reference.look_up(*case, count), strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


def edge_list(capacity, edges, nodes, seed):
    """A list of so many different edges, in order."""
    key = torch.randperm(nodes * nodes, generator=torch.Generator().manual_seed(seed))[:edges]
    score = integers(1, 128, (edges,), seed=seed)
    place = torch.argsort((key // nodes * 128 + 127 - score) * nodes + key % nodes)
    src = torch.full((capacity,), 2**31 - 1, dtype=torch.int32)
    dst, scores = torch.zeros_like(src), torch.zeros(capacity, dtype=torch.int8)
    src[:edges], dst[:edges], scores[:edges] = (
        key[place] // nodes,
        key[place] % nodes,
        score[place].to(torch.int8),
    )
    return src, dst, scores


@pytest.mark.parametrize(("capacity", "edges", "pairs", "nodes"), [
    (1, 0, 1, 1), (1, 1, 0, 1), (5, 3, 40, 4), (37, 37, 63, 30), (90, 60, 300, 12), (140, 139, 7, 20),
])  # fmt: skip
@pytest.mark.parametrize("rate_bits", [0, 4, 7])
def test_merge_kernels_equal_the_reference(capacity, edges, pairs, nodes, rate_bits):
    from arbitor.ops.edge_list import reference, triton

    expected = edge_list(capacity, edges, nodes, seed=edges)
    found = moved(*expected)
    for step in range(2):
        pair = integers(0, nodes, (2, pairs), torch.int32, seed=step)
        bits = integers(-(2**31), 2**31, (capacity + pairs,), seed=step).to(torch.int32)
        rest = *pair, bits, rate_bits, torch.tensor(True)
        reference.merge(*expected, *rest)
        triton.merge(*found, *moved(*rest[:3]), rate_bits, *moved(rest[4]))
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine.cpu(), other)


def test_merge_kernels_change_nothing_unless_ok():
    from arbitor.ops.edge_list import triton

    before = edge_list(20, 9, 5, seed=1)
    found = moved(*before)
    pair, bits = moved(integers(0, 5, (2, 30), torch.int32), torch.zeros(50, dtype=torch.int32))
    for ok in (False, True):
        triton.merge(*found, *pair, bits, 4, *moved(torch.tensor(ok)))
        same = [torch.equal(mine.cpu(), other) for mine, other in zip(found, before, strict=True)]
        assert all(same) == (not ok)


def test_merge_kernels_of_the_largest_nodes():
    from arbitor.ops.edge_list import reference, triton

    big = 2**31 - 2
    expected = [torch.tensor(numbers, dtype=torch.int32) for numbers in ([big, 2**31 - 1], [3, 0])]
    expected.append(torch.tensor([90, 0], dtype=torch.int8))
    found = moved(*expected)
    pair = torch.tensor([[big, big, big, 0], [big, 3, big, big]], dtype=torch.int32)
    rest = *pair, torch.arange(6, dtype=torch.int32), 4, torch.tensor(True)
    reference.merge(*expected, *rest)
    triton.merge(*found, *moved(*rest[:3]), 4, *moved(rest[4]))
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), other)


# -- sums by row --------------------------------------------------------------------------------------------


def in_chunks(gradient, chunk):
    """The sum of some rows in the kernels' order, added one after the other in fp32."""
    whole = len(gradient) // chunk * chunk
    total = torch.zeros(gradient.shape[1])
    for part in gradient[:whole].split(chunk) if whole else []:
        of_part = torch.zeros_like(total)
        for row in part:
            of_part = of_part + row
        total = total + of_part
    for row in gradient[whole:]:
        total = total + row
    return total


@pytest.mark.parametrize(("total", "dim", "rows"), [
    (0, 5, 3), (1, 1, 1), (2, 3, 1), (60, 7, 90), (20, 300, 9), (137, 4, 1), (130, 33, 3),
])  # fmt: skip
def test_row_sums_kernels_equal_the_reference(total, dim, rows):
    from arbitor.ops.row_sums import reference, triton

    # Squared, so that some rows have far more look-ups than others.
    share = torch.rand(total, generator=torch.Generator().manual_seed(1)).square()
    ids, gradient = (share * rows).to(torch.int64) + 2**33, draw(total, dim)
    found_ids, found = of_kernels(triton.row_sums, ids, gradient)
    expected_ids, expected = reference.row_sums(ids, gradient)
    assert torch.equal(found_ids, expected_ids)
    size = reference.row_sums(ids, gradient.abs())[1]
    assert ((found - expected).abs() <= 2 * total * 2**-24 * size).all()
    distinct, counts = ids.unique(return_counts=True)
    assert torch.equal(
        found[len(distinct) :], found[len(distinct) - 1 :][:1].expand(total - len(distinct), -1)
    )
    for slot, (row, count) in enumerate(zip(distinct, counts.tolist(), strict=True)):
        assert torch.equal(found[slot], in_chunks(gradient[ids == row], triton.CHUNK))
        assert count > triton.CHUNK or torch.equal(found[slot], expected[slot])


def test_row_sums_of_narrow_gradients_add_up_in_fp32():
    from arbitor.ops.row_sums import reference, triton

    ids, gradient = integers(0, 3, (30,)), draw(30, 5).to(torch.float16)
    found = of_kernels(triton.row_sums, ids, gradient)[1]
    assert torch.equal(found, reference.row_sums(ids, gradient.float())[1])
