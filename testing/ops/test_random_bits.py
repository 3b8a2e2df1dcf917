import itertools
import json
from pathlib import Path

import pytest
import torch

from arbitor.ops.random_bits import random_bits, step_keys, stream_keys
from testing import oracles

# The hash is part of the checkpoint format: a resumed run must draw the numbers that it would have drawn.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "random_bits.json").read_text())
STREAMS = [pytest.param(s, id=f"{s['seed']}-{s['step']}-{s['tensor']}") for s in GOLDEN["streams"]]

COUNT = 1 << 18
# Statistics of fixed numbers are the same on every machine; six standard deviations say they look random.
SIGMAS = 6


def words(seed=0, step=0, tensor=0, count=COUNT):
    """int64 [count], the unsigned words of a stream."""
    keys = torch.tensor(stream_keys(seed, step, tensor), dtype=torch.int32)
    return random_bits(keys, count).to(torch.int64) & oracles.MASK


def halves(word):
    return word & 0xFFFF, word >> 16


def assert_uncorrelated(a, b):
    correlation = torch.corrcoef(torch.stack((a, b)).to(torch.float64))[0, 1].item()
    assert abs(correlation) < SIGMAS / len(a) ** 0.5


def assert_uniform(buckets, number):
    """Chi-square of integers below `number`."""
    observed = torch.bincount(buckets, minlength=number).to(torch.float64)
    expected = len(buckets) / number
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = number - 1
    assert abs(chi_square - freedom) < SIGMAS * (2 * freedom) ** 0.5


@pytest.mark.parametrize("stream", STREAMS)
def test_known_answers(stream):
    keys = stream_keys(stream["seed"], stream["step"], stream["tensor"])
    assert [k & oracles.MASK for k in keys] == stream["keys"]
    drawn = random_bits(torch.tensor(keys, dtype=torch.int32), max(GOLDEN["elements"]) + 1)
    assert drawn.dtype == torch.int32
    assert (drawn[GOLDEN["elements"]].to(torch.int64) & oracles.MASK).tolist() == stream["words"]


@pytest.mark.parametrize("stream", STREAMS)
def test_known_answers_follow_from_the_definition(stream):
    keys = oracles.stream_keys(stream["seed"], stream["step"], stream["tensor"])
    assert list(keys) == stream["keys"]
    assert [oracles.random_word(keys, i) for i in GOLDEN["elements"]] == stream["words"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("seed", [0, -1, 7, 2**31, 2**63 - 1, -(2**63)])
def test_keys_of_a_step_by_operations_and_by_kernel_are_those_of_the_host(monkeypatch, backend, seed):
    if backend == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tensors = [0, 1, -1, 2**31 - 1, -(2**31), *range(5, 300)]
    numbers = torch.tensor(tensors, dtype=torch.int32, device=device)
    for step in (0, 1, 12345, 2**31 - 1, -(2**31), -1):
        keys = step_keys(seed, torch.tensor(step, dtype=torch.int32, device=device), numbers)
        assert keys.dtype == torch.int32
        assert keys.tolist() == [list(stream_keys(seed, step, tensor)) for tensor in tensors]


def test_keys_are_int32():
    for seed, step, tensor in itertools.product((0, -1, 2**63 - 1, -(2**63)), (0, 2**32 - 1), (0, 2**32 - 1)):
        for key in stream_keys(seed, step, tensor):
            assert -(2**31) <= key < 2**31


def test_every_seed_step_and_tensor_has_its_own_keys():
    seeds = [0, 1, 2, -1, 2**31, 2**32, 2**32 + 1, 2**33, 2**63 - 1]
    streams = list(itertools.product(seeds, range(12), range(12)))
    assert len({stream_keys(*stream) for stream in streams}) == len(streams)


def test_an_element_does_not_depend_on_the_count():
    assert torch.equal(words(count=1000)[:37], words(count=37))


def test_a_batch_of_keys_equals_one_stream_at_a_time():
    keys = torch.tensor([stream_keys(3, 4, n) for n in range(6)], dtype=torch.int32).view(2, 3, 2)
    batch = random_bits(keys, 50)
    assert batch.shape == (2, 3, 50)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(batch[i, j], random_bits(keys[i, j], 50))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_every_bit_is_fair(seed):
    word = words(seed)
    for bit in range(32):
        mean = (word >> bit & 1).to(torch.float64).mean().item()
        assert abs(mean - 0.5) < SIGMAS * 0.5 / COUNT**0.5, f"bit {bit}"


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_both_halves_are_uniform(seed):
    for half in halves(words(seed)):
        assert_uniform(half >> 8, 256)
        assert_uniform(half & 255, 256)
        assert_uniform(half, 1 << 16)


def test_low_and_high_half_are_independent():
    # One word rounds a vote with its low half and the same weight's momentum with its high half.
    low, high = halves(words())
    assert_uncorrelated(low, high)
    assert_uniform(low >> 12 << 4 | high >> 12, 256)
    assert_uniform((low & 15) << 4 | high & 15, 256)


@pytest.mark.parametrize("distance", [1, 2, 3, 32, 160, 1024])
def test_neighbouring_elements_are_independent(distance):
    for half in halves(words(5)):
        near, far = half[:-distance], half[distance:]
        assert_uncorrelated(near, far)
        assert_uniform(near >> 12 << 4 | far >> 12, 256)
        assert_uniform((near & 15) << 4 | far & 15, 256)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 1 << 32}, {"step": 1}, {"step": 2}, {"tensor": 1}, {"tensor": 1 << 31}],
    ids=lambda other: "-".join(f"{k}{v}" for k, v in other.items()),
)
def test_streams_are_independent(other):
    for a, b in zip(halves(words()), halves(words(**other)), strict=True):
        assert_uncorrelated(a, b)
        assert_uniform(a >> 12 << 4 | b >> 12, 256)
        assert_uniform((a ^ b) & 255, 256)


def test_one_element_over_the_steps_is_uniform():
    # What a single weight sees in the course of a run.
    keys = torch.tensor([stream_keys(0, step, 17) for step in range(1 << 13)], dtype=torch.int32)
    over_steps = random_bits(keys, 4).to(torch.int64)[:, 3] & oracles.MASK
    for half in halves(over_steps):
        assert_uniform(half >> 10, 64)
        assert_uncorrelated(half[:-1], half[1:])


def test_opcheck():
    keys = torch.tensor([stream_keys(0, 0, n) for n in range(3)], dtype=torch.int32)
    torch.library.opcheck(torch.ops.arbitor.random_bits, (keys, 40))
