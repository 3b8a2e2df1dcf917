"""Triton kernels against the reference: on a GPU, elsewhere under Triton's interpreter.

Integers are compared bit by bit, in memory that shows what is written outside of a tensor or not at all
(`testing/guards.py`).
"""

import os

import pytest
import torch

from arbitor.ops.random_bits import random_bits
from arbitor.ops.trit_codec import trit_pack
from arbitor.ternary import VoteOptimizer
from testing.guards import DEVICE, moved
from testing.small_net import SmallNet, train

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

SHAPES = [(1, 1, 1), (2, 3, 40), (1, 7, 161), (3, 5, 320), (1, 2, 33), (2, 31, 96), (1, 1, 479)]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")


def keys(n):
    return torch.randint(-(2**31), 2**31 - 1, (n, 2), dtype=torch.int32)


@each_shape
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("span", "threshold", "rail", "reset"), [(128, 64, 63, False), (128, 80, 64, False), (64, 32, 32, True)]
)
def test_state_update_equals_the_reference(shape, by_row, span, threshold, rail, reset):
    from arbitor.ops.state_update import reference, triton

    torch.manual_seed(hash(shape) % 1000)
    n, rows, columns = shape
    packed = trit_pack(torch.randint(-1, 2, shape, dtype=torch.int8))
    accumulator = torch.randint(-127, 128, shape, dtype=torch.int8)
    direction = torch.randn(shape) * torch.exp2(torch.randint(-3, 12, (n, rows, 1)).float())
    stream = keys(n)
    active = torch.rand(n, rows if by_row else 1, 1) > 0.3
    bits = random_bits(stream, rows * columns).view(shape)
    step, *constants = torch.tensor(12.8), span, threshold, rail, reset
    expected = packed.clone(), accumulator.clone()
    flips = reference.update(*expected, direction, bits, active, step, *constants)
    found, given = moved(packed, accumulator), moved(direction, stream, active, step)
    found_flips = triton.update(*found, *given, *constants)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.equal(found_flips.cpu(), flips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_update_of_one_of_several_matrices(dtype):
    from arbitor.ops.state_update import Given, reference, triton

    torch.manual_seed(2)
    shape = (3, 5, 200)
    packed = trit_pack(torch.randint(-1, 2, shape, dtype=torch.int8))
    accumulator = torch.randint(-127, 128, shape, dtype=torch.int8)
    direction, stream, unit = torch.randn(shape).to(dtype), keys(3), 60**0.5
    active = torch.tensor([True, True, False])[:, None, None]
    bits = random_bits(stream, 5 * 200).view(shape)
    expected = packed.clone(), accumulator.clone()
    wide = direction.to(torch.float32) * unit
    flips = reference.update(*expected, wide, bits, active, torch.tensor(1.7), 128, 64, 63, False)
    found, step = moved(packed, accumulator), torch.tensor(1.7, device=DEVICE)
    found_flips = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    direction, stream, active = moved(direction, stream, active)
    given = Given(direction, unit, stream, active, step, found_flips)
    for i in range(3):
        triton.update_some(found[0][i : i + 1], found[1][i : i + 1], given, i, 128, 64, 63, False)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.equal(found_flips.cpu(), flips)


@pytest.fixture(params=[False, True], ids=["", "taller than a grid"])
def tall(request, monkeypatch):
    """Matrices that have more parts than a grid's second dimension takes: here, more than one."""
    from arbitor.ops import triton

    if request.param:
        monkeypatch.setattr(triton, "MOST_PROGRAMS", 1)


@pytest.mark.usefixtures("tall")
def test_every_tile_of_the_state_update_equals_the_reference():
    from arbitor.ops.state_update import reference, triton

    torch.manual_seed(0)
    shape = (2, 35, 200)
    packed = trit_pack(torch.randint(-1, 2, shape, dtype=torch.int8))
    accumulator = torch.randint(-127, 128, shape, dtype=torch.int8)
    direction, stream, active = torch.randn(shape), keys(2), torch.ones(2, 1, 1, dtype=torch.bool)
    bits = random_bits(stream, 35 * 200).view(shape)
    step, *constants = torch.tensor(12.8), 128, 64, 63, False
    expected = packed.clone(), accumulator.clone()
    reference.update(*expected, direction, bits, active, step, *constants)
    given = moved(direction, stream, active, step)
    found = []
    for tile in triton.TILES:
        state = moved(packed.clone(), accumulator.clone())
        triton.update(*state, *given, *constants, tile=tile)
        found.append([torch.equal(own.cpu(), other) for own, other in zip(state, expected, strict=True)])
    assert found == [[True, True]] * len(triton.TILES)


@pytest.mark.parametrize("transposed", [False, True])
def test_state_update_of_some_rows_of_larger_matrices(transposed):
    from arbitor.ops.random_bits import skip
    from arbitor.ops.state_update import reference, triton

    torch.manual_seed(1)
    n, rows, columns = 2, 9, 70
    packed = trit_pack(torch.randint(-1, 2, (n, rows, columns), dtype=torch.int8))
    accumulator = torch.randint(-127, 128, (n, rows, columns), dtype=torch.int8)
    direction, stream, active = torch.randn(n, rows, columns), keys(n), torch.ones(n, 1, 1, dtype=torch.bool)
    bits = random_bits(stream, rows * columns).view(direction.shape)
    expected = packed.clone(), accumulator.clone()
    reference.update(*expected, direction, bits, active, torch.tensor(12.8), 128, 64, 63, False)
    packed, accumulator, direction, stream, active, step = moved(
        packed, accumulator, direction, stream, active, torch.tensor(12.8)
    )
    if transposed:  # as the orthogonalisation of a tall matrix leaves it
        direction = direction.mT.contiguous().mT
    for part in (slice(0, 4), slice(4, 9)):
        triton.update(
            packed[:, part], accumulator[:, part], direction[:, part], skip(stream, part.start * columns),
            active, step, 128, 64, 63, False,
        )  # fmt: skip
    assert torch.equal(packed.cpu(), expected[0])
    assert torch.equal(accumulator.cpu(), expected[1])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 40), (1, 7, 161), (2, 5, 64), (1, 2, 33), (1, 70, 16)], ids=str
)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("group", [32, 16])
def test_momentum_equals_the_reference_over_several_steps(shape, bits, by_row, group):
    from arbitor.ops.momentum import reference, triton

    torch.manual_seed(hash(shape) % 1000)
    n, rows, columns = shape
    if bits == 8:
        codes = torch.zeros(shape, dtype=torch.int8)
    else:
        codes = torch.full((n, rows, -(-columns // 2)), 0x88, dtype=torch.uint8)
    exponent = torch.zeros((n, rows, -(-columns // group)), dtype=torch.int16)
    expected = codes.clone(), exponent.clone()
    found = moved(codes, exponent)
    for _ in range(3):
        gradient = torch.randn(shape) * torch.exp2(torch.randint(-40, 20, (n, rows, 1)).float())
        stream = keys(n)
        active = torch.rand(n, rows if by_row else 1, 1) > 0.3
        random = random_bits(stream, rows * columns).view(shape)
        direction = reference.fold(gradient, *expected, random, active, bits, 0.9, 0.95)
        given = moved(gradient, stream, active)
        found_direction = triton.fold(given[0], *found, *given[1:], bits, 0.9, 0.95)
        assert torch.equal(found_direction.cpu(), direction)
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize(
    ("columns", "group", "bits", "dtype"),
    [(75, 75, 8, torch.bfloat16), (64, 32, 4, torch.float32), (70, 24, 8, torch.float32)],
)
def test_weighed_momentum_equals_the_reference(columns, group, bits, dtype):
    from arbitor.ops.momentum import Weighed, reference, triton

    torch.manual_seed(0)
    n, rows, _ = shape = (3, 5, columns)
    codes, exponent = reference.encode(torch.randn(shape), torch.zeros(shape, dtype=torch.int32), bits)
    gradient, stream = torch.randn(shape).to(torch.bfloat16), keys(n)
    gradient[2, 1, 3] = torch.nan
    active = torch.ones(n, 1, 1, dtype=torch.bool)
    weights = torch.exp2(-torch.randint(0, 9, (n, rows, -(-columns // group))).float())
    state = codes.clone(), exponent.clone()
    random = random_bits(stream, rows * columns).view(shape)
    direction = reference.fold(gradient.float(), *state, random, active, bits, 0.9, 0.95)
    direction *= weights.repeat_interleave(group, dim=-1)[..., :columns]
    found = moved(codes.clone(), exponent.clone())
    written = torch.empty(shape, dtype=dtype, device=DEVICE)
    largest = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    given, stream, active, weights = moved(gradient, stream, active, weights)
    for i in range(n):
        part = slice(i, i + 1)
        into = Weighed(written, weights, group, largest, i)
        triton.fold(given[part], found[0][part], found[1][part], stream, active, bits, 0.9, 0.95, into=into)
    # The interpreter cuts off what bf16 does not hold.
    exact = dtype == torch.float32 or DEVICE == "cuda"
    tolerance = 0 if exact else 2**-7
    torch.testing.assert_close(
        written.cpu().float(), direction.to(dtype).float(), rtol=tolerance, atol=0, equal_nan=True
    )
    assert torch.equal(found[0][:2].cpu(), state[0][:2])
    assert torch.equal(found[1][:2].cpu(), state[1][:2])
    magnitudes = largest.cpu().view(torch.float32)
    assert torch.equal(magnitudes[:2], direction.abs().amax(dim=(1, 2))[:2])
    assert magnitudes[2].isnan()


@pytest.mark.usefixtures("tall")
@pytest.mark.parametrize("bits", [8, 4])
def test_every_tile_of_momentum_equals_the_reference(bits):
    from arbitor.ops.momentum import reference, triton

    torch.manual_seed(0)
    n, rows, columns = shape = (2, 70, 75)
    zeros = torch.zeros(shape, dtype=torch.int32)
    codes, exponent = reference.encode(torch.randn(shape), zeros, bits)
    gradient, stream, active = torch.randn(shape), keys(n), torch.ones(n, 1, 1, dtype=torch.bool)
    expected = codes.clone(), exponent.clone()
    random = random_bits(stream, rows * columns).view(shape)
    direction = reference.fold(gradient, *expected, random, active, bits, 0.9, 0.95)
    given, found = moved(gradient, stream, active), []
    for tile in triton.TILES:
        state = moved(codes.clone(), exponent.clone())
        results = triton.fold(given[0], *state, *given[1:], bits, 0.9, 0.95, tile), *state
        found.append([torch.equal(a.cpu(), b) for a, b in zip(results, (direction, *expected), strict=True)])
    assert found == [[True] * 3] * len(triton.TILES)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [6, 32, 1000])
def test_decode_equals_the_reference(shape, dtype, group):
    from arbitor.ops.trit_codec import reference, triton

    torch.manual_seed(0)
    columns = shape[-1]
    group = min(group, columns)
    packed = trit_pack(torch.randint(-1, 2, shape, dtype=torch.int8))
    exponent = torch.randint(-62, 32, (*shape[:-1], -(-columns // group)), dtype=torch.int8)
    expected = reference.decode(packed, exponent, columns, group, dtype)
    found = triton.decode(*moved(packed, exponent), columns, group, dtype)
    assert torch.equal(found.cpu(), expected)


def test_decode_with_groups_that_planes_do_not_hold():
    from arbitor.ops.trit_codec import reference, triton

    packed = trit_pack(torch.randint(-1, 2, (5, 161), dtype=torch.int8))
    exponent = torch.randint(-62, 32, (5, 27), dtype=torch.int8)
    expected = reference.decode(packed, exponent, 161, 6, torch.float32)
    assert torch.equal(triton.decode(*moved(packed, exponent), 161, 6, torch.float32).cpu(), expected)


@pytest.mark.usefixtures("tall")
@pytest.mark.parametrize("group", [32, 161])
def test_every_tile_of_decode_equals_the_reference(group):
    from arbitor.ops.trit_codec import reference, triton

    packed = trit_pack(torch.randint(-1, 2, (37, 161), dtype=torch.int8))
    exponent = torch.randint(-62, 32, (37, -(-161 // group)), dtype=torch.int8)
    expected = reference.decode(packed, exponent, 161, group, torch.float32)
    given = moved(packed, exponent)
    found = [triton.decode(*given, 161, group, torch.float32, tile=tile).cpu() for tile in triton.TILES]
    assert [torch.equal(weights, expected) for weights in found] == [True] * len(found)


@pytest.mark.parametrize("asked", [0, 1])
def test_weights_are_decoded_only_where_wanted(asked):
    from arbitor.ops.trit_codec import triton

    given = moved(trit_pack(torch.ones((2, 160), dtype=torch.int8)), torch.zeros((2, 5), dtype=torch.int8))
    (wanted,) = moved(torch.tensor([asked], dtype=torch.int32))
    weights = triton.decode(*given, 160, 32, torch.float32, wanted=wanted)
    assert (weights == 1).all() if asked else weights.isnan().all(), "as the guards left it"


def test_decode_of_every_byte():
    from arbitor.ops.trit_codec import reference, triton

    packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
    exponent = torch.zeros(8, 1, dtype=torch.int8)
    expected = reference.decode(packed, exponent, 160, 160, torch.float32)
    found = triton.decode(*moved(packed, exponent), 160, 160, torch.float32).cpu()
    assert expected.isnan().sum() == 5 * 13
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize(("tokens", "columns"), [(5, 40), (3, 1), (2, 9000), (4, 161), (0, 7)])
@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("squared", [False, True])
def test_codes_equal_the_reference(tokens, columns, input_norm, dtype, squared):
    from arbitor.ops.activations import reference, triton

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 of its own")
    torch.manual_seed(0)
    x = (torch.randn(tokens, columns) * torch.exp2(torch.randint(-10, 10, (tokens, 1)).float())).to(dtype)
    u = reference.squared_relu(x) if squared else x
    codes, scale, rstd = reference.normalize_and_quantize(u.float(), input_norm, True)
    found = triton.quantize(*moved(x), input_norm, squared)
    assert torch.equal(found[0].cpu(), codes.to(torch.int8))
    # Sums of `columns` squares, in another order.
    for mine, theirs in zip(found[1:], (scale, rstd), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2**-23 * (2 + columns**0.5), atol=0)


@pytest.mark.parametrize(("tokens", "columns"), [(5, 40), (3, 1), (2, 1100), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [16384, 512])
def test_codes_of_a_sum_equal_those_of_the_sum(tokens, columns, dtype, block, monkeypatch):
    from arbitor.ops.activations import triton

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 of its own")
    monkeypatch.setattr(triton, "MAX_BLOCK", block)
    torch.manual_seed(0)
    x, y = moved(torch.randn(tokens, columns).to(dtype), torch.randn(tokens, columns).to(torch.bfloat16))
    total, *found = triton.add_and_quantize(x, y)
    assert torch.equal(total, x + y)
    for mine, theirs in zip(found, triton.quantize(x + y, True), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("squared", [False, True])
def test_rows_beyond_a_block_equal_those_within(squared, monkeypatch):
    from arbitor.ops.activations import triton

    torch.manual_seed(0)
    x, gradient, more, beside = moved(*torch.randn(4, 3, 1100))
    codes, scale, rstd = triton.quantize(x, True, squared)
    dx = triton.norm_backward(gradient, x, rstd, True, squared, more=more, beside=beside)
    monkeypatch.setattr(triton, "MAX_BLOCK", 512)
    found = triton.quantize(x, True, squared)
    assert torch.equal(found[0], codes)
    for mine, theirs in zip(found[1:], (scale, rstd), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-23 * (2 + 1100**0.5), atol=0)
    found = triton.norm_backward(gradient, x, rstd, True, squared, more=more, beside=beside)
    assert (found - dx).norm() <= 2**-23 * (4 + 1100**0.5) * 2 * float(x.max()) * dx.norm()


def test_a_token_that_overflows_shows():
    from arbitor.ops.activations import triton

    x = torch.full((1, 5), 1e30)
    assert triton.quantize(*moved(x), True)[1].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_a_token_that_is_not_finite_shows_in_its_scale(bad, input_norm, squared):
    from arbitor.ops.activations import triton

    x = torch.randn(3, 40)
    x[1, 7] = bad
    scale = triton.quantize(*moved(x), input_norm, squared)[1]
    assert scale.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize(("tokens", "columns"), [(5, 40), (3, 1), (2, 9000), (4, 161)])
@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_norm_backward_equals_the_reference(tokens, columns, input_norm, squared):
    from arbitor.ops.activations import reference, triton

    torch.manual_seed(0)
    x, gradient = torch.randn(tokens, columns), torch.randn(tokens, columns)
    u = reference.squared_relu(x) if squared else x
    rstd = (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt() if input_norm else torch.ones(tokens, 1)
    expected = reference.norm_backward(gradient.clone(), u, rstd) if input_norm else gradient
    if squared:
        expected = reference.squared_relu_backward(expected, x)
    found = triton.norm_backward(*moved(gradient, x, rstd), input_norm, squared).cpu()
    error = (found - expected).norm() / gradient.norm()
    assert error <= 2**-23 * (4 + columns**0.5) * float(2 * x.max() if squared else 1)


@pytest.mark.parametrize("columns", [1, 40, 9000])
def test_norm_backward_adds_other_gradients(columns):
    from arbitor.ops.activations import reference, triton

    torch.manual_seed(0)
    x, first, second, beside = torch.randn(4, 3, columns)
    rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = reference.norm_backward(first + second, x, rstd) + beside
    x, first, second, beside, rstd = moved(x, first, second, beside, rstd)
    found = triton.norm_backward(first, x, rstd, more=second, beside=beside).cpu()
    error = (found - expected).norm() / (first.norm() + second.norm() + beside.norm()).cpu()
    assert error <= 2**-23 * (4 + columns**0.5)


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (7, 1000)], ids=str)
def test_a_sum_of_two_dtypes_equals_torchs(shape):
    from arbitor.ops.activations import triton

    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randn(shape).to(torch.bfloat16)
    assert torch.equal(triton.add(*moved(x, y)).cpu(), x + y)


MATMULS = [
    (1, 1, 1),
    (3, 70, 40),
    (70, 300, 161),
    (65, 64, 256),
    (130, 129, 128),
    (0, 3, 5),
    (5, 0, 3),
    (2, 3, 0),
]


def int8_case(tokens, rows, columns):
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    weight = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    scale = torch.rand(tokens, 1) * torch.exp2(torch.randint(-30, 30, (tokens, 1)).float())
    row_scale = torch.exp2(torch.randint(-62, 32, (rows,)).float())
    return codes, weight, scale, row_scale


@pytest.mark.parametrize("shape", MATMULS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_matmul_equals_the_reference(shape, dtype):
    from arbitor.ops.int8_matmul import reference, triton

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 of its own")
    case = int8_case(*shape)
    found = triton.int8_matmul(*moved(*case), dtype)
    assert torch.equal(found.cpu(), reference.int8_matmul(*case, dtype))


def test_every_tile_of_int8_matmul_equals_the_reference():
    from arbitor.ops.int8_matmul import reference, triton

    case = int8_case(200, 300, 160)
    expected = reference.int8_matmul(*case, torch.float32)
    tiles = (*triton.FEW_TILES, *triton.SOME_TILES, *triton.MANY_TILES)
    found = [triton.int8_matmul(*moved(*case), torch.float32, tile).cpu() for tile in tiles]
    assert [torch.equal(y, expected) for y in found] == [True] * len(tiles)


def test_int8_matmul_keeps_a_token_that_is_not_finite_apart():
    from arbitor.ops.int8_matmul import triton

    codes, weight, scale, row_scale = int8_case(3, 4, 8)
    scale[1] = torch.nan
    found = triton.int8_matmul(*moved(codes, weight, scale, row_scale), torch.float32)
    assert found.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [*MATMULS, (20, 33, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_of_few_tokens_equals_the_reference(shape, dtype):
    from arbitor.ops.int8_matmul import reference
    from arbitor.ops.ternary_linear import triton

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 of its own")
    codes, trits, scale, row_scale = int8_case(*shape)
    exponent = row_scale.log2().to(torch.int8)[:, None]
    found = triton.few_tokens(*moved(codes, trit_pack(trits), exponent, scale), dtype)
    assert torch.equal(found.cpu(), reference.int8_matmul(codes, trits, scale, row_scale, dtype))


@pytest.mark.parametrize("tokens", [3, 5, 35])
def test_every_tile_of_few_tokens_equals_the_reference(tokens):
    from arbitor.ops.int8_matmul import reference
    from arbitor.ops.ternary_linear import triton

    codes, trits, scale, row_scale = int8_case(tokens, 70, 170)
    exponent = row_scale.log2().to(torch.int8)[:, None]
    expected = reference.int8_matmul(codes, trits, scale, row_scale, torch.float32)
    given = moved(codes, trit_pack(trits), exponent, scale)
    found = [triton.few_tokens(*given, torch.float32, tile=tile).cpu() for tile in triton.TILES]
    assert [torch.equal(y, expected) for y in found] == [True] * len(triton.TILES)


def test_there_are_tiles_for_every_number_of_few_tokens():
    from arbitor.ops.ternary_linear import triton

    for tokens in range(1, 65):
        assert triton._tile(tokens).tokens >= min(tokens, 32)


def grouped_case(shape, group, octaves):
    tokens, rows, columns = shape
    codes, trits, scale, _ = int8_case(tokens, rows, columns)
    lowest = torch.randint(-30, 20, (rows, 1))
    exponent = lowest + torch.randint(0, octaves + 1, (rows, -(-columns // group)))
    return codes, trits, scale, exponent.to(torch.int8)


@pytest.mark.parametrize("shape", [(1, 1, 40), (3, 20, 400), (5, 0, 33), (2, 3, 321)], ids=str)
@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("octaves", [6, 9])
def test_products_with_grouped_exponents_equal_the_reference(shape, group, octaves, triton_backend):
    """Exactly up to MAX_SHIFT octaves, since every sum is an integer below 2^24 times a power of two."""
    from arbitor.ops.ternary_linear import triton
    from arbitor.ops.trit_codec import reference
    from arbitor.ops.trit_codec import triton as trit_codec

    codes, trits, scale, exponent = grouped_case(shape, group, octaves)
    packed = trit_pack(trits)
    weight = reference.decode(packed, exponent, shape[-1], group, torch.float64)
    expected = (codes.double() @ weight.t()).float() * scale
    found = triton.grouped(*moved(codes, scale, packed, exponent), group, torch.float32).cpu()
    if octaves <= trit_codec.MAX_SHIFT:
        assert torch.equal(found, expected)
    else:  # sums of floats, in an order of the GPU's
        assert (found - expected).norm() <= 2**-16 * expected.norm()


@pytest.mark.parametrize("shape", [(1, 40), (3, 400), (7, 161), (2, 1000)], ids=str)
@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("octaves", [0, 6, 7])
def test_decode_to_integers_equals_the_reference(shape, group, octaves):
    from arbitor.ops.trit_codec import reference, triton

    _, trits, _, exponent = grouped_case((1, *shape), group, octaves)
    if octaves and exponent.shape[-1] > 1:
        exponent[0] = -3
        exponent[0, -1] += octaves
    packed = trit_pack(trits)
    integers, scale, wide = triton.decode_integers(*moved(packed, exponent), shape[-1], group)
    if exponent.shape[-1] > 1:
        assert bool(wide) == (octaves > triton.MAX_SHIFT)
    if octaves <= triton.MAX_SHIFT:
        weight = reference.decode(packed, exponent, shape[-1], group, torch.float64)
        assert torch.equal(integers.cpu() * scale.cpu()[:, None].double(), weight)
    packed[0, 0] = 1  # which packing never produces
    assert triton.decode_integers(*moved(packed, exponent), shape[-1], group)[1].isnan().tolist() == [
        True, *[False] * (shape[0] - 1)
    ]  # fmt: skip


@pytest.mark.parametrize(("tokens", "columns"), [(5, 40), (3, 1), (2, 9000)])
def test_sums_of_codes(tokens, columns):
    from arbitor.ops.activations import triton

    (sums,) = moved(torch.full((tokens, 1), 77, dtype=torch.int32))
    codes, _, _ = triton.quantize(*moved(torch.randn(tokens, columns)), True, sums=sums)
    assert torch.equal(sums, codes.sum(dim=1, keepdim=True, dtype=torch.int32))


def test_illegal_bytes_show_in_products_of_few_tokens():
    from arbitor.ops.ternary_linear import triton
    from arbitor.ops.trit_codec import legal_bytes

    packed = torch.full((256, 32), 128, dtype=torch.uint8)
    packed[:, 17] = torch.arange(256, dtype=torch.uint8)
    codes, scale = torch.zeros(2, 160, dtype=torch.int8), torch.ones(2, 1)
    exponent = torch.zeros(256, 1, dtype=torch.int8)
    y = triton.few_tokens(*moved(codes, packed, exponent, scale), torch.float32).cpu()
    legal = legal_bytes(torch.device("cpu"))
    assert y.isnan().all(dim=0).tolist() == (~legal).tolist()
    assert y[:, legal].eq(0).all()


@each_shape
def test_decoded_rows_equal_the_reference(shape):
    from arbitor.ops.trit_codec import reference, triton

    torch.manual_seed(0)
    packed = trit_pack(torch.randint(-1, 2, shape, dtype=torch.int8))
    exponent = torch.randint(-62, 32, (*shape[:-1], 1), dtype=torch.int8)
    trits, scale = triton.decode_rows(*moved(packed, exponent), shape[-1])
    assert torch.equal(trits.cpu(), reference.unpack(packed, shape[-1]))
    assert torch.equal(scale.cpu(), torch.exp2(exponent[..., 0].float()))


def test_a_row_with_an_illegal_byte_has_no_scale():
    from arbitor.ops.trit_codec import reference, triton

    packed = torch.full((256, 32), 128, dtype=torch.uint8)
    packed[:, 17] = torch.arange(256, dtype=torch.uint8)
    exponent = torch.zeros(256, 1, dtype=torch.int8)
    trits, scale = triton.decode_rows(*moved(packed, exponent), 160)
    illegal = reference.unpack(packed, 160).eq(reference.ILLEGAL).any(dim=1)
    assert illegal.sum() == 13
    assert torch.equal(scale.cpu().isnan(), illegal)
    assert torch.equal(trits.cpu()[~illegal], reference.unpack(packed, 160)[~illegal])


@pytest.mark.parametrize(("tokens", "columns"), [(5, 40), (3, 1), (2, 9000), (4, 161), (0, 7), (70, 600)])
@pytest.mark.parametrize("given", [torch.int8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_tokens_equal_the_reference(tokens, columns, given, dtype):
    from arbitor.ops.activations import reference, triton

    if torch.bfloat16 in (given, dtype) and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 of its own")
    torch.manual_seed(0)
    x, scale = (torch.randn(tokens, columns) * 40).to(given), torch.rand(tokens, 1)
    expected = reference.scale_tokens(x, scale, dtype)
    assert torch.equal(triton.scale_tokens(*moved(x, scale), dtype).cpu(), expected)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("group", [32, 1000])
@pytest.mark.parametrize("tokens", [1, 7, 66])
@pytest.mark.parametrize("squared", [False, True])
def test_ternary_linear_equals_the_reference(tokens, group, quantize, squared, monkeypatch):
    from arbitor.ops.ternary_linear import ternary_linear

    torch.manual_seed(0)
    rows, columns = 37, 200
    x = torch.randn(tokens, columns)
    packed = trit_pack(torch.randint(-1, 2, (rows, columns), dtype=torch.int8))
    group = min(group, columns)
    exponent = torch.randint(-9, 3, (rows, -(-columns // group)), dtype=torch.int8)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        given = moved(x, packed, exponent)
        results.append(ternary_linear(*given, group, False, quantize, torch.float32, squared))
    for expected, found in zip(*results, strict=True):
        if quantize:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected)


def test_a_gpu_without_int8_products_multiplies_floats(monkeypatch):
    from arbitor.ops.ternary_linear import triton

    torch.manual_seed(0)
    codes, trits, scale, row_scale = moved(*int8_case(70, 37, 200))
    packed, exponent = trit_pack(trits), row_scale.log2().to(torch.int8)[:, None].clamp(-30, 20)
    expected = triton.product(codes, scale, packed, exponent, 200, torch.float32)
    monkeypatch.setattr(triton, "has_int8_kernels", lambda device: False)
    monkeypatch.setattr(triton, "int8_matmul", None)
    assert torch.equal(triton.product(codes, scale, packed, exponent, 200, torch.float32), expected)


def test_captured_gradients_equal_the_references(monkeypatch):
    from arbitor.ternary import TernaryLinear

    torch.manual_seed(0)
    linear = TernaryLinear(24, 10).to(DEVICE)
    optimizer = VoteOptimizer(linear)
    x, dy = moved(torch.randn(50, 24), torch.randn(50, 10))
    gradients = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        for uses in (1, 2):
            for _ in range(uses):
                linear(x).backward(dy)
            gradients.append(linear.capture.gradient())
            optimizer.zero_grad()
    # Either way each of the 50 products is rounded twice.
    tolerance = {"rtol": 0, "atol": 50 * 3 * 2**-23 * float(gradients[1].abs().max())}
    torch.testing.assert_close(gradients[2], gradients[0], **tolerance)
    torch.testing.assert_close(gradients[3], gradients[1], **tolerance)


@pytest.mark.parametrize("workspace", [1, 1 << 26])
@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_experts_equal_the_reference(workspace, input_norm, squared, monkeypatch):
    from arbitor.ops.expert_linear import reference
    from arbitor.ternary import TernaryExperts

    monkeypatch.setattr(reference, "WORKSPACE_BYTES", workspace)
    torch.manual_seed(0)
    experts = TernaryExperts(3, 40, 70, input_norm=input_norm).to(DEVICE)
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32, device=DEVICE)
    x = torch.randn(9, 40, device=DEVICE, requires_grad=True)
    dy = torch.randn(9, 70, device=DEVICE)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        y = experts(x, offsets, squared=squared)
        results.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    (expected, expected_dx), (y, dx) = results
    bound = 2**-23 * (8 + 70**0.5)
    assert (y - expected).abs().max() <= bound * expected.abs().max()
    # On a GPU the reference's gradient of the normed input is the library's, in bf16.
    rounding = 0.0 if DEVICE == "cpu" else 2**-8
    assert (dx - expected_dx).abs().max() <= (bound + rounding) * expected_dx.abs().max()


@pytest.mark.long
def test_a_feed_forward_part_equals_the_reference(monkeypatch):
    from arbitor.config import preset
    from arbitor.model.ffn import FeedForward

    torch.manual_seed(0)
    ffn = FeedForward(preset("tiny").model).to(DEVICE)
    optimizer = VoteOptimizer(ffn)
    h = torch.randn(9, ffn.up.in_features, device=DEVICE, requires_grad=True)
    dy = torch.randn(9, ffn.up.in_features, device=DEVICE)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        y = ffn(h)
        (dh,) = torch.autograd.grad(y, h, dy, retain_graph=True)
        y.backward(dy)
        results.append([y.detach(), dh, *(linear.capture.gradient() for linear in (ffn.up, ffn.down))])
        optimizer.zero_grad()
    for found, expected in zip(results[1], results[0], strict=True):
        error = (found - expected).norm() / expected.norm()
        assert error <= 2**-23 * 4 * ffn.up.out_features**0.5


@pytest.mark.long
def test_a_model_trains_as_on_the_reference(triton_backend, monkeypatch):
    losses = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        torch.manual_seed(0)
        net = SmallNet()
        losses.append(train(net, VoteOptimizer(net, lr=0.2), range(3)))
    # The codes' scales may differ in their last bit, and a vote with them.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-2)
    assert losses[0][2] != losses[0][0]


@pytest.mark.long
@pytest.mark.parametrize(("state", "tscale"), [("full", "ROW"), ("compact", "T32"), ("lean", "ROW")])
def test_matrices_in_few_passes_move_as_in_many(state, tscale, triton_backend, monkeypatch):
    from arbitor.ternary import TernaryLinear
    from arbitor.ternary.step import Step

    snapshots = []
    for apart in (True, False):
        if not apart:
            monkeypatch.setattr(Step, "_moves_apart", lambda *_: False)
        torch.manual_seed(0)
        shapes = {"a": (40, 12), "b": (40, 12), "c": (12, 40), "still": (12, 40)}
        layers = {name: TernaryLinear(*shape, tscale=tscale) for name, shape in shapes.items()}
        net = torch.nn.ModuleDict(layers).to(DEVICE)
        # A vote is about 6 of an accumulator's 128 places; of those in bf16 a twentieth falls on a neighbour.
        optimizer = VoteOptimizer(net, state=state, lr=0.05)
        for name, layer in layers.items():
            gradient = torch.randn(layer.out_features, layer.in_features) * (name != "still")
            layer.capture.add_dense(gradient.to(torch.bfloat16).to(DEVICE))
        optimizer.step()
        assert optimizer.flip_rate() > 0
        snapshots.append({**optimizer.named_state(), **net.state_dict()})
    if DEVICE == "cpu":  # on a GPU products are rounded elsewhere
        assert [key for key in snapshots[0] if not torch.equal(snapshots[0][key], snapshots[1][key])] == []
    same = [(snapshots[0][key] == snapshots[1][key]).float().mean() for key in snapshots[0]]
    assert min(same) > 0.7


@pytest.mark.parametrize("size", [(9, 40), (1, 33)], ids=str)
def test_bytes_step_as_on_the_reference(size, monkeypatch):
    from arbitor.ternary import Int8Embedding

    gradients = torch.randn(3, *size, device=DEVICE)
    gradients[1, 0] = 0
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        torch.manual_seed(0)
        table = Int8Embedding(*size).to(DEVICE)
        optimizer = VoteOptimizer(table, lr=0.07, seed=5)
        for gradient in gradients:
            table.capture.add_dense(gradient.clone())
            optimizer.step()
        results.append([table.q, *optimizer.named_state().values()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_the_kernels_are_what_runs(triton_backend, monkeypatch):
    from arbitor.ops.state_update import triton

    seen = []
    update = triton.update_some
    monkeypatch.setattr(triton, "update_some", lambda *args: seen.append(args[0].shape) or update(*args))
    net = SmallNet().to(DEVICE)
    train(net, VoteOptimizer(net), range(1))
    assert sum(shape[0] for shape in seen) == 5, "every matrix was updated by the kernel"


def test_what_operations_allocate_has_guard_bands(guards):
    from arbitor.ops.trit_codec import triton

    given = moved(trit_pack(torch.ones((2, 7), dtype=torch.int8)), torch.zeros((2, 1), dtype=torch.int8))
    assert all(map(guards.has, (*given, *triton.decode_rows(*given, 7))))
    assert not guards.has(given[0] + 1)


def test_interpreter_is_on_where_there_is_no_gpu():
    assert DEVICE == "cuda" or os.environ["TRITON_INTERPRET"] == "1"
