"""Inline assembly of the kernels against the reference, interpreted, so that it is tested without a GPU."""

import numpy as np
import pytest
import torch

from arbitor.ops.state_update import assembly as update_assembly
from arbitor.ops.state_update import reference as update_reference
from arbitor.ops.trit_codec import assembly as codec_assembly
from arbitor.ops.trit_codec import legal_bytes, trit_pack
from testing.ops import ptx


def words(bytes_):
    """int8 or uint8 [..., 32] as registers of four neighbours, uint32 [..., 8]."""
    return np.ascontiguousarray(bytes_.numpy()).view(np.uint32)


def octets(registers, dtype):
    return torch.from_numpy(np.ascontiguousarray(registers).view(dtype))


@pytest.mark.parametrize(
    ("span", "threshold", "rail", "reset"),
    [(128, 64, 63, False), (128, 80, 64, False), (64, 32, 32, True), (254, 127, 200, False), (4, 2, 1, True)],
)
@pytest.mark.parametrize("largest", [3, 300, 16384])
def test_the_rule_of_the_state_update_equals_the_reference(span, threshold, rail, reset, largest):
    torch.manual_seed(largest)
    rows = 4000
    trits = torch.randint(-1, 2, (rows, 160), dtype=torch.int8)
    accumulator = torch.randint(-127, 128, trits.shape, dtype=torch.int8)
    votes = torch.randint(-largest, largest + 1, trits.shape, dtype=torch.int32)
    below = torch.randint(0, 1 << 16, trits.shape, dtype=torch.int32)
    packed = trit_pack(trits)
    expected = packed.clone(), accumulator.clone()
    # A step of -1, whose votes are the directions; the bits decide nothing.
    flips = update_reference.update(
        *expected, votes.float(), torch.zeros_like(votes), torch.tensor(True), -1.0, span, threshold, rail,
        reset,
    )  # fmt: skip

    lowest = threshold if reset or 2 * threshold > span else threshold + 1
    sums = ((votes - span) << 16) + below
    planes = sums.view(rows, 5, 8, 4)
    inputs = [
        words(packed),
        *(words(accumulator.view(rows, 5, 32)[:, plane]) for plane in range(5)),
        *(planes[:, plane, :, byte].numpy() for plane in range(5) for byte in range(4)),
    ]
    assert update_assembly.fits(span, threshold, rail)
    rule = update_assembly.rule(span, threshold, lowest, rail, reset)
    assert update_assembly.constraints().count(",") + 1 == 10 + len(inputs)
    code, *states, count, second, third, fourth = ptx.run(rule, 10, inputs)
    assert torch.equal(octets(code, np.uint8), expected[0])
    found = torch.stack([octets(state, np.int8) for state in states], dim=1).view(rows, 160)
    assert torch.equal(found, expected[1])
    assert int(count.sum()) == int(flips) > 0
    assert not np.any([second, third, fourth])


def test_every_value_of_five_digits_is_repacked():
    v = np.arange(243)
    packed = (v * update_assembly.REPACK_FACTOR + update_assembly.REPACK_OFFSET) >> 16
    assert (packed == -(-256 * v // 243)).all()


@pytest.fixture(scope="module")
def every_byte():
    """uint8 [256 * 3, 4]: every byte in every place, beside the extremes in the others."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    rows = torch.stack([bytes_, 255 - bytes_, torch.full_like(bytes_, 255), torch.zeros_like(bytes_)], dim=1)
    return torch.cat([rows, rows.flip(1), rows.roll(1, dims=1)])


def digits_of(bytes_):
    """int32 [..., 5] of uint8 [...], by the serial recurrence."""
    return torch.stack([(((bytes_.int() * 3**n) & 255) * 3) >> 8 for n in range(5)], dim=-1)


def test_digits_of_every_byte(every_byte):
    digits = digits_of(every_byte)
    number = torch.zeros(every_byte.shape, dtype=torch.int32)
    for plane in range(5):
        (found,) = ptx.run(codec_assembly.digit(plane), 1, [words(every_byte)])
        assert torch.equal(octets(found, np.uint8).int(), digits[..., plane])
        number = number * 3 + digits[..., plane]
        (found,) = ptx.run(codec_assembly.leading(plane + 1), 1, [words(every_byte)])
        assert torch.equal(octets(found, np.uint8).int(), number)
    (found,) = ptx.run(codec_assembly.leading(5, codec_assembly.MARK), 1, [words(every_byte)])
    illegal = ~legal_bytes(torch.device("cpu"))[every_byte.int()]
    assert torch.equal(octets(found, np.uint8).int(), number + illegal.int())


@pytest.mark.parametrize("times", [1, 2, 64])
def test_trits_of_every_byte(every_byte, times):
    factors = [torch.full_like(every_byte, times).numpy().view(np.uint32)] * 5
    *found, marks = ptx.run(codec_assembly.trits(), 6, [words(every_byte), *factors])
    found = torch.stack([octets(plane, np.int8) for plane in found], dim=-1)
    illegal = ~legal_bytes(torch.device("cpu"))[every_byte.int()]
    assert torch.equal(found.int(), (digits_of(every_byte) - 1) * times)
    assert torch.equal(octets(marks, np.uint8) != 0, illegal)


@pytest.mark.parametrize("exponent", [-62, 0, 31])
def test_weights_of_every_byte(every_byte, exponent):
    scale = torch.full((len(every_byte), 4), 2.0**exponent, dtype=torch.bfloat16)
    registers = list(scale.view(torch.int16).numpy().view(np.uint32).T[:, :, None])
    found = ptx.run(codec_assembly.weights(), 10, [words(every_byte), *registers * 5])
    found = torch.stack(
        [torch.from_numpy(np.concatenate(found[2 * n : 2 * n + 2], axis=1).view(np.int16)) for n in range(5)],
        dim=-1,
    ).view(torch.bfloat16)
    legal = legal_bytes(torch.device("cpu"))[every_byte.int()]
    expected = (digits_of(every_byte) - 1) * 2.0**exponent
    assert torch.equal(found[legal].double(), expected[legal].double())
    assert found[~legal].isnan().all()
    assert not found[legal][expected[legal] == 0].signbit().any()
