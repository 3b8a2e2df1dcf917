from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbitor.ops.momentum import GROUP, code_max, cpu, momentum_fold
from arbitor.ops.momentum.reference import (
    decode,
    encode,
    fold,
    group_exponent,
    group_of,
    pack_nibbles,
    unpack_nibbles,
)

LOWEST, HIGHEST = -800, 800  # exponents in eighths of an octave
HALF_ULP = Fraction(1, 1 << 24)  # relative; 2^(e/8) is rounded to fp32 once
both_widths = pytest.mark.parametrize("bits", [8, 4], ids=["int8", "4bit"])


def exp2_eighths(e):
    """2^(e/8) to 60 digits, as a fraction."""
    with localcontext() as context:
        context.prec = 60
        root = Decimal(2).sqrt().sqrt().sqrt()
        return Fraction(root ** (e % 8)) * Fraction(2) ** (e // 8)


def words(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def new_state(rows, columns, bits):
    """Codes of zero and exponent of zero, as a fresh optimizer has them."""
    if bits == 4:
        codes = torch.full((*rows, -(-columns // 2)), 0x88, dtype=torch.uint8)
    else:
        codes = torch.zeros(*rows, columns, dtype=torch.int8)
    return codes, torch.zeros(*rows, -(-columns // GROUP), dtype=torch.int16)


def assert_smallest_covering(absmax, e):
    """2^(e/8) >= absmax > 2^((e-1)/8), each power as fp32 has it; exact at whole octaves."""
    absmax = Fraction(absmax)
    slack = 0 if e % 8 == 0 else HALF_ULP
    assert absmax <= exp2_eighths(e) * (1 + slack) or e == HIGHEST
    slack = 0 if (e - 1) % 8 == 0 else HALF_ULP
    assert absmax > exp2_eighths(e - 1) * (1 - slack) or e == LOWEST


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.floats(0, torch.finfo(torch.float32).max, width=32))
def test_group_exponent_is_the_smallest_that_covers(absmax):
    values = torch.zeros(1, GROUP)
    values[0, 13] = -absmax
    values[0, 14] = absmax / 2
    assert_smallest_covering(absmax, group_exponent(values).item())


@pytest.mark.parametrize("octave", [-100, -99, -24, -1, 0, 1, 30, 99])
def test_group_exponent_at_every_threshold_and_its_two_neighbours(octave):
    for j in range(8):
        middle = torch.tensor(float(exp2_eighths(8 * octave + j)), dtype=torch.float32)
        for value in (
            middle,
            torch.nextafter(middle, torch.tensor(0.0)),
            torch.nextafter(middle, torch.tensor(torch.inf)),
        ):
            e = group_exponent(value.expand(1, 1)).item()
            assert_smallest_covering(value.item(), e)
        assert group_exponent(middle.expand(1, 1)).item() == 8 * octave + j


def test_each_group_of_32_has_its_own_exponent():
    values = torch.zeros(2, 70)
    values[0, 31], values[0, 32], values[0, 69] = 1.0, -4.0, 2.0**-9
    values[1, 5] = 16.0
    assert group_exponent(values).tolist() == [[0, 16, -72], [32, LOWEST, LOWEST]]


def test_each_group_of_16_has_its_own_exponent():
    values = torch.zeros(1, 40)
    values[0, 15], values[0, 16], values[0, 39] = 1.0, -4.0, 2.0**-9
    assert group_exponent(values, 16).tolist() == [[0, 16, -72]]


def test_the_size_of_groups_follows_from_their_number():
    for columns in range(1, 200):
        assert group_of(columns, -(-columns // 32)) == 32
        assert group_of(columns, -(-columns // 16)) == (16 if columns > 16 else 32)
    with pytest.raises(ValueError, match="5 exponents for 97 elements"):
        group_of(97, 5)


@pytest.mark.parametrize(
    ("value", "e"),
    [
        (0.0, LOWEST),
        (1e-45, LOWEST),
        (1e-38, LOWEST),
        (2.0**-100, LOWEST),
        (2.0**100, HIGHEST),
        (3e38, HIGHEST),
    ],
)
def test_group_exponent_is_held_to_what_fp32_can_scale(value, e):
    assert group_exponent(torch.full((1, 3), value)).item() == e


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 31, 32, 33, 161])
def test_nibbles_hold_every_code(columns):
    codes = (torch.arange(3 * columns).view(3, columns) % 15 - 7).to(torch.int8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, (columns + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, columns), codes)
    for row, c in zip(packed.tolist(), codes.tolist(), strict=True):
        padded = [*c, 0]
        assert row == [padded[2 * j] + 8 | padded[2 * j + 1] + 8 << 4 for j in range(len(row))]


def test_a_fresh_state_decodes_to_zero():
    for bits in (8, 4):
        codes, exponent = new_state((3,), 33, bits)
        assert decode(codes, exponent, 33, bits).eq(0).all()


@both_widths
@pytest.mark.parametrize("e", [LOWEST, -241, -8, -1, 0, 3, 100, 797])
def test_every_code_decodes_to_its_value(bits, e):
    largest = code_max(bits)
    codes = torch.arange(-largest, largest + 1, dtype=torch.int8)[None]
    columns = codes.shape[1]
    stored = pack_nibbles(codes) if bits == 4 else codes
    exponent = torch.full((1, -(-columns // GROUP)), e, dtype=torch.int16)
    values = decode(stored, exponent, columns, bits)[0].tolist()
    for code, value in zip(range(-largest, largest + 1), values, strict=True):
        exact = Fraction(code, largest) * exp2_eighths(e)
        # Two roundings: of the group's scale and of the product.
        assert abs(Fraction(value) - exact) <= 2 * HALF_ULP * (1 + HALF_ULP) * abs(exact)


@both_widths
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("scale", [1.0, 3e-5, 1e-29, 1e29], ids=str)
def test_a_round_trip_is_within_one_code(bits, scale, group):
    values = gaussian(4, 97) * scale
    codes, exponent = encode(values, words(4, 97), bits, group)
    restored = decode(codes, exponent, 97, bits)
    for i in range(4):
        for j in range(97):
            unit = exp2_eighths(exponent[i, j // group].item()) / code_max(bits)
            difference = abs(Fraction(restored[i, j].item()) - Fraction(values[i, j].item()))
            assert difference < unit * (1 + Fraction(1, 1 << 15))


@both_widths
def test_rounding_is_unbiased_over_all_random_numbers(bits):
    values = torch.tensor([1.0, 0.99, 0.5, 0.3333, 0.1, 7e-3, 1e-4, 1e-6, 0.0, -0.123, -0.9])
    number = torch.arange(1 << 16, dtype=torch.int32)
    random = (number << 16 | 0x1234)[:, None].expand(-1, len(values)).contiguous()
    codes, exponent = encode(values.expand(1 << 16, -1).contiguous(), random, bits)
    assert exponent.eq(0).all(), "the group's largest magnitude is 1"
    codes = unpack_nibbles(codes, len(values)) if bits == 4 else codes
    for value, total in zip(values.tolist(), codes.to(torch.int64).sum(0).tolist(), strict=True):
        # The mean is the fixed-point number round(65536 * Q * value), so the sum is that number itself.
        assert abs(total - value * code_max(bits) * 65536) <= 0.5 + 2**-23 * abs(total)


@both_widths
def test_only_the_high_half_of_the_random_bits_counts(bits):
    values, random = gaussian(3, 40), words(3, 40)
    other_low = random ^ words(3, 40, seed=1) & 0xFFFF
    for a, b in zip(encode(values, random, bits), encode(values, other_low, bits), strict=True):
        assert torch.equal(a, b)


@both_widths
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 161])
@pytest.mark.parametrize("group", [16, 32])
def test_fold_is_decode_average_encode(bits, columns, group):
    gradient, random = gaussian(3, columns, seed=2), words(3, columns)
    codes, exponent = encode(gaussian(3, columns, seed=1) * 0.1, words(3, columns, seed=5), bits, group)
    beta, lookahead = 0.9, 0.95
    old = decode(codes, exponent, columns, bits).to(torch.float64)
    active = torch.ones(3, 1, dtype=torch.bool)
    direction = momentum_fold(gradient, codes, exponent, random, active, bits, beta, lookahead)

    momentum = beta * old + (1 - beta) * gradient.to(torch.float64)
    tolerance = 8 * float(HALF_ULP) * (old.abs() + gradient.abs())
    expected = (1 - lookahead) * gradient + lookahead * momentum
    assert ((direction - expected).abs() <= tolerance).all()
    unit = torch.exp2(exponent.to(torch.float64) / 8).repeat_interleave(group, -1)[:, :columns] / code_max(
        bits
    )
    new = decode(codes, exponent, columns, bits)
    assert ((new - momentum).abs() <= unit * (1 + 2**-15) + tolerance).all()


def test_the_direction_is_not_rounded():
    # Rounding M before using it costs quality: a gradient far below one code must still steer.
    codes, exponent = encode(torch.tensor([[1.0, 1.0]]), words(1, 2), 4)
    arguments = (codes, exponent, torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 1, dtype=torch.bool))
    direction = momentum_fold(torch.tensor([[1e-4, -1e-4]]), *arguments, 4, 0.8, 0.95)
    assert direction[0, 0] > direction[0, 1]


@both_widths
def test_inactive_matrices_and_rows_stay_bit_for_bit(bits):
    gradient = gaussian(4, 3, 37, seed=3)
    codes, exponent = encode(gaussian(4, 3, 37), words(4, 3, 37), bits)
    old_codes, old_exponent = codes.clone(), exponent.clone()
    active = torch.tensor(
        [[[1], [1], [1]], [[0], [0], [0]], [[0], [1], [0]], [[1], [0], [1]]], dtype=torch.bool
    )
    gradient[1] = torch.nan
    gradient[2, 0] = torch.inf
    momentum_fold(gradient, codes, exponent, words(4, 3, 37, seed=9), active, bits, 0.9, 0.95)
    still = ~active[..., 0]
    assert torch.equal(codes[still], old_codes[still])
    assert torch.equal(exponent[still], old_exponent[still])
    assert (codes[~still] != old_codes[~still]).any(-1).all()


@both_widths
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 1e38, 3e38], ids=str)
def test_extreme_magnitudes_keep_sign_and_stay_finite(bits, magnitude):
    signs = torch.tensor([1.0, -1.0, 0.0] * 11)
    gradient = (signs * magnitude)[None]
    codes, exponent = new_state((1,), 33, bits)
    active = torch.ones(1, 1, dtype=torch.bool)
    for step in range(3):
        random = words(1, 33, seed=step)
        direction = momentum_fold(gradient, codes, exponent, random, active, bits, 0.9, 0.95)
        momentum = decode(codes, exponent, 33, bits)
        assert direction.isfinite().all()
        assert momentum.isfinite().all()
        assert (momentum * signs >= 0).all()
        assert (direction * signs >= 0).all()
        assert exponent.abs().max() <= HIGHEST


@both_widths
def test_momentum_of_a_constant_gradient_approaches_it(bits):
    gradient = gaussian(8, 64, seed=4)
    codes, exponent = new_state((8,), 64, bits)
    active = torch.ones(8, 1, dtype=torch.bool)
    for step in range(80):
        momentum_fold(gradient, codes, exponent, words(8, 64, seed=step), active, bits, 0.9, 0.95)
    unit = torch.exp2(exponent.to(torch.float32) / 8).repeat_interleave(GROUP, -1) / code_max(bits)
    error = (decode(codes, exponent, 64, bits) - gradient) / unit
    # Rounding errors below one code, decaying by 0.9 a step: at most 1 / (1 - 0.9) codes, typically far less.
    assert error.abs().max() < 10
    assert error.mean().abs() < 0.25


@both_widths
def test_opcheck(bits):
    codes, exponent = new_state((2, 3), 33, bits)
    active = torch.tensor([True, False])[:, None, None]
    arguments = (gaussian(2, 3, 33), codes, exponent, words(2, 3, 33), active, bits, 0.9, 0.95)
    torch.library.opcheck(torch.ops.arbitor.momentum_fold, arguments)


@both_widths
@pytest.mark.parametrize("group", [32, 16])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-38, 1e25, 1e38, 0.0])
def test_the_fold_of_a_cpu_equals_the_reference_over_several_steps(bits, group, scale):
    codes, _ = new_state((7,), 160, bits)
    exponent = torch.zeros(7, 160 // group, dtype=torch.int16)
    expected_codes, expected_exponent = codes.clone(), exponent.clone()
    everywhere = torch.ones((), dtype=torch.bool)
    for step in range(4):
        gradient, random = gaussian(7, 160, seed=step) * scale, words(7, 160, seed=step)
        state = expected_codes, expected_exponent
        expected = fold(gradient, *state, random, everywhere, bits, 0.9, 0.95)
        cpu.fold(gradient, codes, exponent, random, bits, 0.9, 0.95)
        assert torch.equal(gradient, expected)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(exponent, expected_exponent)
