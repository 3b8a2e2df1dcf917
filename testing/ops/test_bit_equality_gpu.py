"""The integer ops give the same bits on CUDA as on a CPU, from the same floats."""

import pytest
import torch

from arbitor.ops.momentum import momentum_fold
from arbitor.ops.random_bits import random_bits, stream_keys
from arbitor.ops.state_update import scale_update, state_update
from arbitor.ops.trit_codec import ternary_decode, trit_pack, trit_unpack
from testing.guards import moved

pytestmark = pytest.mark.gpu


def random_case(seed):
    """Inputs of one step for a few matrices whose sizes divide by nothing."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high, shape=()):
        return torch.randint(low, high, shape, generator=generator)

    n, o, i = int(integer(1, 5)), int(integer(1, 90)), int(integer(1, 400))
    magnitude = 10.0 ** float(torch.randn((), generator=generator))
    return {
        "packed": trit_pack(integer(-1, 2, (n, o, i)).to(torch.int8)),
        "accumulator": integer(-64, 64, (n, o, i)).to(torch.int8),
        "direction": torch.randn(n, o, i, generator=generator) * magnitude,
        "keys": torch.tensor([stream_keys(seed, 3, k) for k in range(n)], dtype=torch.int32),
        "active": torch.rand(n, 1, 1, generator=generator) > 0.2,
        "codes8": integer(-127, 128, (n, o, i)).to(torch.int8),
        "codes4": (integer(1, 16, (n, o, -(-i // 2))) * 17).to(torch.uint8),
        "exponent": integer(-90, 20, (n, o, -(-i // 32))).to(torch.int16),
        "scale": integer(-62, 32, (n, o, -(-i // 32))).to(torch.int8),
        "scale_accumulator": integer(-31, 32, (n, o, -(-i // 32))).to(torch.int8),
    }


def one_step(case, device):
    """Everything a step changes or gives, computed on `device` and brought back."""
    values = moved(*case.values()) if device == "cuda" else [value.clone() for value in case.values()]
    t = dict(zip(case, values, strict=True))
    n, o, i = t["direction"].shape
    bits = random_bits(t["keys"], o * i).view(n, o, i)
    exponent4 = t["exponent"].clone()
    directions = [
        momentum_fold(t["direction"], t["codes8"], t["exponent"], bits, t["active"], 8, 0.9, 0.95),
        momentum_fold(t["direction"], t["codes4"], exponent4, bits, t["active"], 4, 0.8, 0.95),
    ]
    flips = state_update(
        t["packed"], t["accumulator"], t["direction"], bits, t["active"], 6.4, 128, 64, 63, False
    )
    scale_bits = random_bits(t["keys"], t["scale"][0].numel()).view(t["scale"].shape)
    scale_direction = t["direction"][..., ::32].contiguous()
    scale_update(t["scale"], t["scale_accumulator"], scale_direction, scale_bits, t["active"], 9.0, 32)
    weights = ternary_decode(t["packed"], t["scale"], i, 32, torch.float32)
    given = [d.masked_fill(~t["active"], 0) for d in directions]
    results = [*t.values(), exponent4, bits, flips, weights, trit_unpack(t["packed"], i), *given]
    return [result.cpu() for result in results]


@pytest.mark.parametrize("block", range(8))
def test_a_step_is_the_same_to_the_bit(block):
    for seed in range(block * 40, block * 40 + 40):
        case = random_case(seed)
        for on_cpu, on_gpu in zip(one_step(case, "cpu"), one_step(case, "cuda"), strict=True):
            assert torch.equal(on_cpu, on_gpu)
