import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbitor.data import ByteStream, Sampler
from arbitor.data.sampler import random_bits
from arbitor.errors import UserError


def stream_of(*sizes: int) -> ByteStream:
    start, arrays = 0, []
    for size in sizes:
        arrays.append((np.arange(start, start + size) % 251).astype(np.uint8))
        start += size
    return ByteStream(arrays)


def take(sampler: Sampler, count: int) -> list[np.ndarray]:
    return [sampler.next() for _ in range(count)]


def test_windows_are_int64_pieces_of_the_stream():
    stream = stream_of(100, 7, 300)
    batch = Sampler(stream, batch=16, ctx=20, seed=3).next()
    assert batch.dtype == np.int64
    assert batch.shape == (16, 20)
    whole = stream.as_array().tobytes()
    assert all(bytes(row.tolist()) in whole for row in batch)


@settings(deadline=None)
@given(
    seed=st.integers(0, (1 << 63) - 1),
    before=st.integers(0, 6),
    batch=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_resume_is_exact_at_any_point(seed, before, batch, sizes):
    stream = stream_of(8, *sizes)
    uninterrupted = Sampler(stream, batch, ctx=8, seed=seed)
    expected = take(uninterrupted, before + 3)
    first = Sampler(stream, batch, ctx=8, seed=seed)
    take(first, before)
    second = Sampler(stream, batch, ctx=8, seed=0)
    second.restore(first.state())
    third = Sampler(stream, batch, ctx=8, seed=1)
    np.testing.assert_array_equal(second.next(), expected[before])
    third.restore(second.state())
    np.testing.assert_array_equal(take(third, 2), expected[before + 1 :])
    assert third.state() == uninterrupted.state()


def test_batch_size_does_not_change_the_order_of_windows():
    stream = stream_of(1000)
    one_by_one = np.concatenate(take(Sampler(stream, 1, 16, seed=5), 12))
    at_once = np.concatenate(take(Sampler(stream, 6, 16, seed=5), 2))
    np.testing.assert_array_equal(one_by_one, at_once)


def testrandom_bits_are_those_of_splitmix64():
    # Written with Python's integers from the paper: its n-th number is mix(state + n * gold).
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    gold = 0x9E3779B97F4A7C15
    for seed in (0, 1, 2**63 - 1):
        key = mix((seed + gold) % 2**64)
        expected = [mix((key + n * gold) % 2**64) for n in (0, 1, 2, 2**40)]
        assert random_bits(seed, np.array([0, 1, 2, 2**40], dtype=np.uint64)).tolist() == expected


def test_the_order_is_the_same_on_every_platform():
    # Fixed values: if they change, saved runs no longer resume exactly.
    batch = Sampler(stream_of(250), batch=6, ctx=8, seed=42).next()
    assert batch[:, 0].tolist() == [35, 149, 30, 26, 188, 104]


def test_offsets_are_uniform_and_reach_both_ends():
    stream = stream_of(17)  # ten offsets for windows of eight bytes
    counts = np.bincount(Sampler(stream, batch=20_000, ctx=8, seed=1).next()[:, 0], minlength=10)
    assert counts.size == 10
    # Chi-square with 9 degrees of freedom exceeds 33.7 with probability 1e-4.
    assert ((counts - 2000) ** 2 / 2000).sum() < 33.7


def test_seeds_give_different_orders():
    stream = stream_of(100_000)
    batches = [Sampler(stream, 4, 64, seed=s).next().tobytes() for s in range(8)]
    assert len(set(batches)) == 8


def test_a_stream_of_exactly_one_window_works():
    batch = Sampler(stream_of(8), batch=2, ctx=8, seed=0).next()
    assert batch.tolist() == [list(range(8))] * 2


def test_a_short_stream_is_refused():
    with pytest.raises(UserError, match=r"7 bytes .* shorter than the context of 8"):
        Sampler(stream_of(7), batch=1, ctx=8, seed=0)


@pytest.mark.parametrize("other", [stream_of(499), stream_of(501)])
def test_other_data_is_refused(other):
    state = Sampler(stream_of(500), 2, 8, seed=0).state()
    with pytest.raises(UserError, match="training data is not what it was: 500 bytes then"):
        Sampler(other, 2, 8, seed=0).restore(state)


def test_changed_content_of_the_same_length_is_refused():
    state = Sampler(stream_of(500), 2, 8, seed=0).state()
    other = ByteStream([np.zeros(500, dtype=np.uint8)])
    with pytest.raises(UserError, match="with other content"):
        Sampler(other, 2, 8, seed=0).restore(state)


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"drawn": 1.0}, {"drawn": True}, {"drawn": "3"}, {"seed": 1 << 63}, {"extra": 1}],
)
def test_a_state_that_is_none_is_refused(change):
    sampler = Sampler(stream_of(500), 2, 8, seed=0)
    with pytest.raises(UserError, match="sampler state"):
        sampler.restore(sampler.state() | change)


def test_state_is_plain_integers():
    sampler = Sampler(stream_of(500), 2, 8, seed=9)
    take(sampler, 3)
    assert all(type(value) is int for value in sampler.state().values())
    assert sampler.state()["drawn"] == 6
