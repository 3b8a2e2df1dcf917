import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbitor.ops.exponent import exp2_int
from arbitor.ops.trit_codec import (
    BLOCK,
    ILLEGAL,
    PLANE,
    cpu,
    legal_bytes,
    packed_width,
    reference,
    ternary_decode,
    trit_pack,
    trit_unpack,
)
from testing import oracles

FLOATS = [torch.float64, torch.float32, torch.bfloat16]
EXPONENTS = range(-62, 32)
LEGAL = [b for b in range(256) if oracles.trits_of_byte(b) is not None]
ROUGH_SIZES = [1, 2, 31, 32, 33, 127, 159, 160, 161, 257, 320, 321, 643]


def random_trits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)


def every_byte_once():
    """[8, 32]: all 256 byte values, a block a row."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(8, PLANE)


def test_243_of_the_256_bytes_are_legal():
    assert len(LEGAL) == 243
    assert legal_bytes(torch.device("cpu")).nonzero().flatten().tolist() == LEGAL


def test_every_byte_unpacks_to_its_five_trits():
    planes = trit_unpack(every_byte_once(), BLOCK).view(8, 5, PLANE)
    for byte in range(256):
        trits = planes[byte // PLANE, :, byte % PLANE].tolist()
        assert trits == (oracles.trits_of_byte(byte) or [ILLEGAL] * 5), f"byte {byte}"


def test_fixed_point_digits_need_only_multiplications_and_shifts():
    for byte in LEGAL:
        digits = [((byte * 3**n & 255) * 3 >> 8) - 1 for n in range(5)]
        assert digits == oracles.trits_of_byte(byte), f"byte {byte}"


def test_every_legal_byte_packs_back_to_itself():
    legal = torch.tensor(LEGAL, dtype=torch.uint8)[:, None].expand(-1, PLANE).contiguous()
    assert torch.equal(trit_pack(trit_unpack(legal, BLOCK)), legal)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_illegal_byte_decodes_to_nan_and_only_there(dtype):
    weights = ternary_decode(every_byte_once(), torch.zeros(8, 1, dtype=torch.int8), BLOCK, BLOCK, dtype)
    nan = weights.isnan().view(8, 5, PLANE)
    assert torch.equal(nan.any(1), nan.all(1))
    assert (~nan.any(1)).flatten().nonzero().flatten().tolist() == LEGAL


def test_element_k_is_digit_k_div_32_of_byte_k_mod_32():
    zero = oracles.pack_row([0] * BLOCK)[0]
    for k in range(2 * BLOCK):
        trits = torch.zeros(1, 2 * BLOCK, dtype=torch.int8)
        trits[0, k] = 1
        block, offset = divmod(k, BLOCK)
        plane, byte = divmod(offset, PLANE)
        row = trit_pack(trits)[0].tolist()
        changed = [i for i, b in enumerate(row) if b != zero]
        assert changed == [PLANE * block + byte]
        assert oracles.trits_of_byte(row[changed[0]])[plane] == 1


def test_a_block_of_zeros_is_32_bytes_of_128():
    assert trit_pack(torch.zeros(1, BLOCK, dtype=torch.int8)).tolist() == [[128] * 32]


@pytest.mark.parametrize("size", ROUGH_SIZES)
def test_pack_and_unpack_equal_the_oracle(size):
    trits = random_trits(3, size, seed=size)
    packed = trit_pack(trits)
    assert packed.shape == (3, packed_width(size)) == (3, 32 * math.ceil(size / 160))
    assert packed.tolist() == [oracles.pack_row(row) for row in trits.tolist()]
    assert trit_unpack(packed, size).tolist() == [oracles.unpack_row(row, size) for row in packed.tolist()]


@pytest.mark.parametrize("size", [s for s in ROUGH_SIZES if s % BLOCK])
def test_padding_holds_zero_trits(size):
    packed = trit_pack(torch.ones(2, size, dtype=torch.int8))
    whole = trit_unpack(packed, packed.shape[-1] * 5)
    assert whole[:, :size].eq(1).all()
    assert whole[:, size:].eq(0).all()


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 5),
    size=st.integers(1, 700),
    seed=st.integers(0, 2**31 - 1),
)
def test_unpack_inverts_pack(leading, rows, size, seed):
    trits = random_trits(*leading, rows, size, seed=seed)
    packed = trit_pack(trits)
    assert packed.shape == (*leading, rows, packed_width(size))
    assert packed.dtype == torch.uint8
    assert torch.equal(trit_unpack(packed, size), trits)
    one_by_one = [trit_pack(row[None])[0] for row in trits.flatten(0, -2)]
    assert torch.equal(packed.flatten(0, -2), torch.stack(one_by_one))


def test_packing_reads_non_contiguous_trits():
    trits = random_trits(200, 6)
    assert torch.equal(trit_pack(trits.t()), trit_pack(trits.t().contiguous()))


def test_powers_of_two_are_exact():
    exponents = range(-126, 128)
    assert exp2_int(torch.tensor(exponents)).tolist() == [math.ldexp(1.0, e) for e in exponents]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_trit_at_every_exponent_decodes_exactly(dtype):
    trits = torch.tensor([[-1, 0, 1]] * len(EXPONENTS), dtype=torch.int8)
    exponents = torch.tensor(EXPONENTS, dtype=torch.int8)[:, None]
    weights = ternary_decode(trit_pack(trits), exponents, 3, 3, dtype)
    assert weights.dtype == dtype
    expected = [[float(oracles.weight(t, e)) for t in (-1, 0, 1)] for e in EXPONENTS]
    assert weights.to(torch.float64).tolist() == expected


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    leading=st.lists(st.integers(1, 3), max_size=1),
    size=st.integers(1, 400),
    group=st.sampled_from([4, 6, 8, 16, 32, 64, 96, 0]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31 - 1),
)
def test_decode_gives_each_group_its_exponent(leading, size, group, dtype, seed):
    group = group or size
    trits = random_trits(*leading, 2, size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    groups = -(-size // group)
    exponents = torch.randint(-62, 32, (*leading, 2, groups), generator=generator, dtype=torch.int8)
    weights = ternary_decode(trit_pack(trits), exponents, size, group, dtype)
    for row_w, row_t, row_e in zip(
        weights.flatten(0, -2), trits.flatten(0, -2), exponents.flatten(0, -2), strict=True
    ):
        expected = [math.ldexp(t, e) for t, e in zip_groups(row_t.tolist(), row_e.tolist(), group)]
        assert row_w.to(torch.float64).tolist() == expected
    assert torch.equal(ternary_decode(trit_pack(trits), exponents, size, group, torch.int8), trits)


def zip_groups(trits, exponents, group):
    return [(trit, exponents[i // group]) for i, trit in enumerate(trits)]


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (torch.ops.arbitor.trit_pack, (random_trits(2, 3, 161),)),
        (torch.ops.arbitor.trit_unpack, (trit_pack(random_trits(2, 3, 161)), 161)),
        (
            torch.ops.arbitor.ternary_decode,
            (trit_pack(random_trits(3, 65)), torch.zeros(3, 3, dtype=torch.int8), 65, 32, torch.bfloat16),
        ),
        (
            torch.ops.arbitor.ternary_decode,
            (trit_pack(random_trits(3, 65)), torch.zeros(3, 1, dtype=torch.int8), 65, 65, torch.int8),
        ),
    ],
    ids=["trit_pack", "trit_unpack", "ternary_decode-bf16", "ternary_decode-int8"],
)
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("width", ROUGH_SIZES)
@pytest.mark.parametrize("at_once", [PLANE, 1 << 18], ids=["a block at a time", "at once"])
def test_the_arithmetic_of_a_cpu_equals_the_look_ups(width, at_once, monkeypatch):
    monkeypatch.setattr(cpu, "BYTES_AT_ONCE", at_once)
    trits = random_trits(2, 5, width)
    packed = reference.pack(trits)
    assert torch.equal(cpu.pack(trits), packed)
    assert torch.equal(cpu.unpack(packed, width), trits)


def test_a_cpu_knows_each_illegal_byte():
    for byte in range(256):
        block = torch.full((1, PLANE), byte, dtype=torch.uint8)
        assert cpu.all_legal(block) == (byte in LEGAL), byte
        assert torch.equal(cpu.unpack(block, BLOCK), reference.unpack(block, BLOCK))
