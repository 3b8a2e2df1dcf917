from dataclasses import astuple, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbitor.ops.state_update import cpu, reference, scale_update, state_update
from arbitor.ops.state_update.reference import stochastic_floor
from arbitor.ops.trit_codec import trit_pack, trit_unpack
from testing import oracles

ACCUMULATORS = list(range(-127, 128))
VOTES = [*range(-135, 136), -16384, -1000, -257, -200, 200, 257, 1000, 16383]
FIRST, LAST = -62, 31


@dataclass(frozen=True)
class Constants:
    span: int
    threshold: int
    rail: int
    reset: bool = False


CONSTANTS = {
    "full": Constants(span=128, threshold=64, rail=63),
    "lean": Constants(span=128, threshold=80, rail=64),
    "sign": Constants(span=64, threshold=32, rail=32, reset=True),
    "full-32": Constants(span=64, threshold=32, rail=31),
    "lean-32": Constants(span=51, threshold=32, rail=26),
    "full-127": Constants(span=254, threshold=127, rail=126),
    "full-2": Constants(span=4, threshold=2, rail=1),
}
each_constants = pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)


def random_words(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def update(trits, accumulator, direction, constants, *, step=1.0, bits=None, active=None):
    """New trits, new accumulators, flips a matrix."""
    packed, accumulator = trit_pack(trits), accumulator.clone()
    bits = torch.zeros(trits.shape, dtype=torch.int32) if bits is None else bits
    active = torch.ones((*trits.shape[:-2], 1, 1), dtype=torch.bool) if active is None else active
    flips = state_update(packed, accumulator, direction, bits, active, step, *astuple(constants))
    assert torch.equal(trit_pack(trit_unpack(packed, trits.shape[-1])), packed), "padding or code damaged"
    return trit_unpack(packed, trits.shape[-1]), accumulator, flips


def every_state(votes):
    """Trits, accumulators [3, len(votes), 255] and a direction that gives exactly these votes at step 1."""
    shape = (3, len(votes), len(ACCUMULATORS))
    trits = torch.tensor([-1, 0, 1], dtype=torch.int8)[:, None, None].expand(shape).contiguous()
    accumulator = torch.tensor(ACCUMULATORS, dtype=torch.int8).expand(shape).contiguous()
    direction = -torch.tensor(votes, dtype=torch.float32)[None, :, None].expand(shape).contiguous()
    return trits, accumulator, direction


@each_constants
def test_every_state_under_every_vote_equals_the_oracle(constants):
    trits, accumulator, direction = every_state(VOTES)
    new_trits, new_accumulator, flips = update(trits, accumulator, direction, constants)
    t_list, a_list = new_trits.tolist(), new_accumulator.tolist()
    arguments = astuple(constants)
    for i, trit in enumerate((-1, 0, 1)):
        moved = 0
        for j, votes in enumerate(VOTES):
            expected = [oracles.vote_and_flip(trit, a, votes, *arguments) for a in ACCUMULATORS]
            assert list(zip(t_list[i][j], a_list[i][j], strict=True)) == expected, f"T={trit}, v={votes}"
            moved += sum(t != trit for t, _ in expected)
        assert flips[i].item() == moved


@each_constants
def test_zero_votes_change_nothing_from_any_state(constants):
    trits, accumulator, direction = every_state([0])
    for bits in (None, random_words(*trits.shape)):
        new_trits, new_accumulator, flips = update(trits, accumulator, direction, constants, bits=bits)
        assert torch.equal(new_trits, trits)
        assert torch.equal(new_accumulator, accumulator)
        assert flips.eq(0).all()


@each_constants
def test_at_most_one_flip_a_step(constants):
    trits, accumulator, direction = every_state([-16384, -400, 400, 16383])
    new_trits, _, _ = update(trits, accumulator, direction, constants)
    assert (new_trits - trits).abs().max() == 1


@pytest.mark.parametrize("name", ["full", "lean"])
def test_votes_move_the_latent_weight_by_exactly_their_number(name):
    # S T + T_accum is one integer; only the limits at the rails and at +-127 take anything away.
    constants = CONSTANTS[name]
    votes = list(range(-60, 61))
    trits, accumulator, direction = every_state(votes)
    new_trits, new_accumulator, _ = update(trits, accumulator, direction, constants)

    def latent(t, a):
        return constants.span * t.to(torch.int32) + a

    held = (new_trits * new_accumulator >= constants.rail) | (new_accumulator.abs() == 127)
    moved = latent(new_trits, new_accumulator) - latent(trits, accumulator)
    free = ~held
    assert free.float().mean() > 0.5
    assert torch.equal(moved[free], (-direction).to(torch.int32)[free])


def test_beyond_half_a_span_a_flip_does_not_swing_back():
    # At threshold 80 of span 128 a flip lands 32 units away from the one back, so votes of +-1 flip once.
    constants = CONSTANTS["lean"]
    trits, accumulator = torch.zeros(1, 1, dtype=torch.int8), torch.full((1, 1), 79, dtype=torch.int8)
    total = 0
    for vote in (1.0, -1.0) * 10:
        trits, accumulator, flips = update(trits, accumulator, torch.tensor([[-vote]]), constants)
        total += flips.item()
    assert total == 1


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    leading=st.lists(st.integers(1, 3), max_size=1),
    rows=st.integers(1, 4),
    columns=st.integers(1, 200),
    step=st.floats(0.01, 60),
    name=st.sampled_from(list(CONSTANTS)),
    seed=st.integers(0, 1 << 30),
)
def test_random_matrices_equal_the_oracle(leading, rows, columns, step, name, seed):
    constants = CONSTANTS[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, rows, columns)
    trits = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    accumulator = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    direction = torch.randn(shape, generator=generator)
    bits = random_words(*shape, seed=seed)
    new_trits, new_accumulator, flips = update(trits, accumulator, direction, constants, step=step, bits=bits)
    elements = zip(*(t.flatten().tolist() for t in (trits, accumulator, direction, bits)), strict=True)
    expected = [
        oracles.vote_and_flip(t, a, oracles.vote(u, -step, r), *astuple(constants)) for t, a, u, r in elements
    ]
    actual = list(zip(new_trits.flatten().tolist(), new_accumulator.flatten().tolist(), strict=True))
    assert actual == expected
    assert torch.equal(flips, (new_trits != trits).sum(dim=(-2, -1)))


def test_inactive_matrices_stay_even_with_gradients_that_are_not_numbers():
    constants = CONSTANTS["full"]
    generator = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (2, 3, 4, 33), generator=generator, dtype=torch.int8)
    accumulator = torch.randint(-127, 128, trits.shape, generator=generator, dtype=torch.int8)
    direction = torch.randn(trits.shape, generator=generator) * 5
    active = torch.tensor([[True, False, True], [False, False, True]])
    direction[~active] = torch.nan
    direction[1, 0] = torch.inf
    new_trits, new_accumulator, flips = update(
        trits, accumulator, direction, constants, step=30.0, active=active[..., None, None]
    )
    assert torch.equal(new_trits[~active], trits[~active])
    assert torch.equal(new_accumulator[~active], accumulator[~active])
    assert flips[~active].eq(0).all()
    alone = update(trits[active], accumulator[active], direction[active], constants, step=30.0)
    assert torch.equal(new_trits[active], alone[0])
    assert torch.equal(new_accumulator[active], alone[1])
    assert torch.equal(flips[active], alone[2])


def test_rows_may_be_inactive():
    constants = CONSTANTS["full"]
    trits, accumulator = torch.zeros(3, 40, dtype=torch.int8), torch.zeros(3, 40, dtype=torch.int8)
    active = torch.tensor([True, False, True])[:, None]
    new_trits, new_accumulator, _ = update(
        trits, accumulator, torch.full((3, 40), -5.0), constants, active=active
    )
    assert new_accumulator.tolist() == [[5] * 40, [0] * 40, [5] * 40]
    assert torch.equal(new_trits, trits)


@pytest.mark.parametrize("value", [1e30, torch.inf])
def test_a_huge_direction_is_one_full_vote_in_its_sense(value):
    constants = CONSTANTS["full"]
    trits, accumulator = torch.zeros(1, 2, dtype=torch.int8), torch.zeros(1, 2, dtype=torch.int8)
    direction = torch.tensor([[value, -value]])
    new_trits, new_accumulator, flips = update(trits, accumulator, direction, constants, step=6.4)
    assert new_trits.tolist() == [[-1, 1]]
    assert new_accumulator.tolist() == [[-63, 63]]
    assert flips.item() == 2


@pytest.mark.parametrize("factor", [-6.4, -0.05 * 128, -1e-4, -40.0, 3.0])
def test_votes_are_unbiased_over_all_random_numbers(factor):
    # The mean over the 65,536 numbers is the fixed-point value, which is within half a unit of factor * U.
    values = torch.tensor([-2.5, -1.0, -0.3, -1e-3, 0.0, 1e-7, 0.01, 0.7, 1.0, 1.9999])
    numbers = torch.arange(1 << 16, dtype=torch.int32)[:, None] | 0x7ABC0000
    votes = stochastic_floor(values.expand(1 << 16, -1), factor, numbers)
    for value, total in zip(values.tolist(), votes.to(torch.int64).sum(0).tolist(), strict=True):
        assert total == oracles.fixed_point(value, factor)
        exact = factor * 65536 * value
        assert abs(total - exact) <= 0.5 + 2**-22 * abs(exact)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    value=st.floats(-50, 50, width=32),
    factor=st.floats(-100, 100),
    random=st.integers(-(2**31), 2**31 - 1),
)
def test_a_vote_equals_the_oracle(value, factor, random):
    votes = stochastic_floor(torch.tensor([value]), factor, torch.tensor([random], dtype=torch.int32))
    assert votes.item() == oracles.vote(value, factor, random)


@pytest.mark.parametrize("threshold", [1, 8, 32, 127])
def test_every_scale_state_under_every_vote_equals_the_oracle(threshold):
    exponents = [FIRST, FIRST + 1, -5, 0, LAST - 1, LAST]
    votes = [*range(-70, 71), -9000, 9000]
    shape = (len(exponents), len(votes), len(ACCUMULATORS))
    exponent = torch.tensor(exponents, dtype=torch.int8)[:, None, None].expand(shape).contiguous()
    accumulator = torch.tensor(ACCUMULATORS, dtype=torch.int8).expand(shape).contiguous()
    direction = -torch.tensor(votes, dtype=torch.float32)[None, :, None].expand(shape).contiguous()
    bits, active = torch.zeros(shape, dtype=torch.int32), torch.ones(len(exponents), 1, 1, dtype=torch.bool)
    scale_update(exponent, accumulator, direction, bits, active, 1.0, threshold)
    e_list, a_list = exponent.tolist(), accumulator.tolist()
    for i, e in enumerate(exponents):
        for j, v in enumerate(votes):
            expected = [oracles.scale_vote(e, a, v, threshold) for a in ACCUMULATORS]
            assert list(zip(e_list[i][j], a_list[i][j], strict=True)) == expected, f"E={e}, v={v}"
    assert exponent.amin() >= FIRST
    assert exponent.amax() <= LAST


def test_scale_votes_keep_the_residual_and_skip_what_is_inactive():
    exponent = torch.tensor([[[-4], [-4]], [[-4], [-4]]], dtype=torch.int8)
    accumulator = torch.tensor([[[30], [-30]], [[30], [-30]]], dtype=torch.int8)
    direction = torch.tensor([[[-1.0], [1.0]], [[torch.nan], [-1.0]]])
    active = torch.tensor([True, False])[:, None, None]
    bits = torch.zeros(2, 2, 1, dtype=torch.int32)
    scale_update(exponent, accumulator, direction, bits, active, 5.0, 32)
    assert exponent.flatten().tolist() == [-3, -5, -4, -4]
    assert accumulator.flatten().tolist() == [3, -3, 30, -30]


def test_opcheck_state_update():
    trits = torch.randint(-1, 2, (2, 3, 33), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    direction = torch.randn(trits.shape, generator=torch.Generator().manual_seed(1)) * 40
    bits, active = random_words(*trits.shape), torch.tensor([True, False])[:, None, None]
    arguments = (trit_pack(trits), torch.zeros_like(trits), direction, bits, active)
    arguments += (torch.tensor(1.0), 128, 64, 63, False)
    torch.library.opcheck(torch.ops.arbitor.state_update, arguments)


def test_opcheck_scale_update():
    exponent = torch.zeros(2, 3, 2, dtype=torch.int8)
    direction, bits = torch.full((2, 3, 2), -40.0), random_words(2, 3, 2)
    arguments = (
        exponent,
        exponent.clone(),
        direction,
        bits,
        torch.tensor([True, False])[:, None, None],
        torch.tensor(1.0),
        32,
    )
    torch.library.opcheck(torch.ops.arbitor.scale_update, arguments)


@each_constants
@pytest.mark.parametrize("step", [1.0, torch.tensor(0.37)], ids=["whole votes", "rounded votes"])
def test_the_sums_of_a_cpu_equal_the_comparisons_in_every_state(constants, step):
    blocks = [t.reshape(-1) for t in every_state(VOTES)]
    trits, accumulator, direction = (t[: len(t) // 160 * 160].view(-1, 160) for t in blocks)
    bits = random_words(*trits.shape)
    packed, expected_packed = trit_pack(trits), trit_pack(trits)
    expected = accumulator.clone()
    flips = cpu.update(packed, accumulator, direction, bits, step, *astuple(constants))
    everywhere = torch.ones((), dtype=torch.bool)
    rows = expected_packed[:, None], expected[:, None], direction[:, None], bits[:, None]
    expected_flips = reference.update(*rows, everywhere, step, *astuple(constants))
    assert torch.equal(flips.to(torch.int64), expected_flips)
    assert torch.equal(accumulator, expected)
    assert torch.equal(packed, expected_packed)
