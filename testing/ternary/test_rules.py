import pytest
import torch

from arbitor.errors import UserError
from arbitor.ternary.rules import RULES, get_rule, row, sign, sinkhorn, spectral

SHAPES = {"square": (48, 48), "tall": (200, 40), "wide": (40, 200), "one-row": (1, 64), "one-column": (64, 1)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

# Where the quintic iteration carries a singular value that started above a hundredth of the norm.
LOWEST, HIGHEST = 0.65, 1.25


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values, rows, columns, seed=0):
    """A matrix with random singular vectors and these singular values."""
    k = len(values)
    u = torch.linalg.qr(gaussian(rows, k, seed=seed))[0]
    v = torch.linalg.qr(gaussian(columns, k, seed=seed + 1))[0]
    return u @ torch.diag(torch.tensor(values)) @ v.T


def rms(x, dim=(-2, -1)):
    return x.square().mean(dim=dim).sqrt()


@each_shape
def test_spectral_brings_singular_values_near_one_and_rms_near_one(shape):
    k = min(shape)
    n = with_singular_values([1.0 - 0.8 * i / k for i in range(k)], *shape)
    singular = torch.linalg.svdvals(spectral(n)) / max(shape) ** 0.5
    assert singular.min() > LOWEST
    assert singular.max() < HIGHEST
    assert LOWEST < rms(spectral(n)) < HIGHEST


@each_shape
def test_spectral_of_a_random_gradient_has_rms_near_one(shape):
    # A square Gaussian has singular values down to 0, which five steps leave small; they weigh little here.
    assert LOWEST < rms(spectral(gaussian(*shape))) < HIGHEST


def test_spectral_keeps_singular_vectors():
    n = with_singular_values([1.0, 0.7, 0.5, 0.3], 30, 20)
    direction = spectral(n)
    u, _, vh = torch.linalg.svd(n, full_matrices=False)
    core = u[:, :4].T @ direction @ vh[:4].T
    off_diagonal = core - torch.diag(core.diagonal())
    assert off_diagonal.abs().max() < 1e-3 * core.diagonal().min()


def test_spectral_follows_the_quintic_polynomial():
    start = [0.8, 0.5, 0.3, 0.05]
    direction = spectral(with_singular_values(start, 24, 16))
    norm = sum(s * s for s in start) ** 0.5
    expected = []
    for s in start:
        s /= norm
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected.append(s * 24**0.5)
    actual = torch.linalg.svdvals(direction)[:4]
    torch.testing.assert_close(actual, torch.tensor(sorted(expected, reverse=True)), rtol=1e-4, atol=0)


@each_rule
@pytest.mark.parametrize("shape", [(6, 20, 30), (2, 3, 30, 20)], ids=str)
def test_a_batch_of_matrices_equals_one_at_a_time(rule, shape):
    n = gaussian(*shape)
    together = rule(n)
    assert together.shape == n.shape
    for whole, single in zip(together.flatten(0, -3), n.flatten(0, -3), strict=True):
        torch.testing.assert_close(whole, rule(single), rtol=1e-4, atol=1e-4)


@each_rule
@each_shape
def test_zero_stays_zero(rule, shape):
    assert rule(torch.zeros(shape)).eq(0).all()
    mixed = torch.stack((gaussian(*shape), torch.zeros(shape)))
    assert rule(mixed)[1].eq(0).all()


@each_rule
@each_shape
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e30], ids=str)
def test_magnitude_does_not_matter(rule, shape, magnitude):
    n = gaussian(*shape)
    scaled = rule(n * magnitude)
    assert scaled.isfinite().all()
    torch.testing.assert_close(scaled, rule(n), rtol=1e-3, atol=1e-3)


@each_rule
def test_a_power_of_two_changes_no_bit(rule):
    n = gaussian(20, 30)
    assert torch.equal(rule(n * 2.0**40), rule(n))


@each_rule
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 3e38], ids=str)
def test_the_ends_of_fp32_stay_finite(rule, magnitude):
    n = gaussian(20, 30).sign() * magnitude
    assert rule(n).isfinite().all()
    assert (rule(n) * n.sign()).sum() >= 0


@each_rule
def test_the_argument_stays(rule):
    n = gaussian(3, 20, 30)
    before = n.clone()
    rule(n)
    assert torch.equal(n, before)


@each_rule
@each_shape
def test_a_direction_climbs(rule, shape):
    n = gaussian(*shape)
    assert (rule(n) * n).sum() > 0


def test_row_brings_each_row_to_rms_one():
    n = gaussian(30, 50) * torch.logspace(-20, 20, 30)[:, None]
    torch.testing.assert_close(rms(row(n), dim=-1), torch.ones(30))
    n[4] = 0
    assert row(n)[4].eq(0).all()


def test_sinkhorn_brings_rows_and_columns_to_rms_one():
    # The columns come last and are exact; three rounds bring the rows of a Gaussian within a few percent.
    direction = sinkhorn(gaussian(60, 80))
    torch.testing.assert_close(rms(direction, dim=-2), torch.ones(80))
    torch.testing.assert_close(rms(direction, dim=-1), torch.ones(60), rtol=0.05, atol=0)


def test_sinkhorn_does_rows_then_columns_three_times():
    n = gaussian(60, 80).double() * torch.logspace(-1, 1, 80)
    expected = n.clone()
    for _ in range(3):
        expected /= rms(expected, dim=-1)[:, None]
        expected /= rms(expected, dim=-2)
    torch.testing.assert_close(sinkhorn(n.float()).double(), expected, rtol=1e-5, atol=1e-6)


def test_sinkhorn_balances_rows_and_columns_of_any_magnitude():
    n = gaussian(60, 80).sign() * torch.logspace(-6, 6, 60)[:, None] * torch.logspace(-3, 3, 80)
    torch.testing.assert_close(sinkhorn(n), n.sign(), rtol=1e-4, atol=0)


def test_sign_is_the_sign():
    assert sign(torch.tensor([[-1e-40, 0.0, 5.0]])).tolist() == [[-1.0, 0.0, 1.0]]


def test_rules_by_name():
    assert list(RULES) == ["spectral", "sinkhorn", "row", "sign"]
    assert get_rule("row") is row
    with pytest.raises(
        UserError, match=r"unknown rule 'spectal'; choose one of spectral, sinkhorn, row, sign"
    ):
        get_rule("spectal")
