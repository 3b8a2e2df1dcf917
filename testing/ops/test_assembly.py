"""Inline assembly of the kernels against the reference, interpreted, so that it is tested without a GPU."""

import numpy as np
import pytest
import torch

from arbitor.ops.state_update import assembly as update_assembly
from arbitor.ops.state_update import reference as update_reference
from arbitor.ops.trit_codec import trit_pack
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
    code, *states, count, zero0, zero1, zero2 = ptx.run(rule, 10, inputs)
    assert torch.equal(octets(code, np.uint8), expected[0])
    found = torch.stack([octets(state, np.int8) for state in states], dim=1).view(rows, 160)
    assert torch.equal(found, expected[1])
    assert int(count.sum()) == int(flips) > 0
    assert not (zero0.any() or zero1.any() or zero2.any())


def test_every_value_of_five_digits_is_repacked():
    v = np.arange(243)
    packed = (v * update_assembly.REPACK_FACTOR + update_assembly.REPACK_OFFSET) >> 16
    assert (packed == -(-256 * v // 243)).all()
