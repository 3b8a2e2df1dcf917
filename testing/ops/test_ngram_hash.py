"""The n-gram hash: known answers, its definition in Python integers, and how evenly it spreads."""

import itertools

import pytest
import torch

from arbitor.ops.ngram_hash import multipliers, ngram_hash

MASK = (1 << 64) - 1
TEXT = [256, 256, 0, 1, 255, 287, 3**15 - 1, 0, 0, 0]
# Rows are part of a checkpoint's meaning: a table is useless under another hash.
GOLDEN_MULTIPLIERS = [-2152535657050944081, 487617019471545679, 7960286522194355701, -537132696929009171]
GOLDEN = [
    [40531, 1705321, 2082250, 3787652],
    [213901, 1137010, 2859957, 3537364],
    [973434, 1138294, 2854645, 3870830],
    [998508, 1662819, 2061505, 3901069],
    [771359, 1332972, 2680382, 3477367],
    [714279, 1295778, 2811446, 3193405],
    [727559, 1454460, 2757207, 3219138],
    [727559, 1454460, 2106419, 3952658],
]


def literal_row(multiplier, ids, num_rows):
    x = 0
    for i in ids:
        x = (x ^ (i + 1)) * multiplier & MASK
        x ^= x >> 32
    x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 32
    return (x & ((1 << 63) - 1)) % num_rows


def literal_rows(ids, heads, num_rows):
    rows = []
    for t in range(2, len(ids)):
        grams = [ids[t - 1 : t + 1]] * heads + [ids[t - 2 : t + 1]] * heads
        rows.append(
            [
                table * num_rows + literal_row(m & MASK, gram, num_rows)
                for table, (m, gram) in enumerate(zip(multipliers(heads), grams, strict=True))
            ]
        )
    return rows


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 7, 1 << 16, (1 << 28) - 57, 1 << 28])
def test_equals_the_definition(heads, num_rows):
    rows = ngram_hash(torch.tensor(TEXT), heads, num_rows)
    assert rows.dtype == torch.int64
    assert rows.tolist() == literal_rows(TEXT, heads, num_rows)


def test_known_answers():
    assert multipliers(2) == GOLDEN_MULTIPLIERS
    rows = ngram_hash(torch.tensor(TEXT), 2, 1_000_003)
    assert rows.tolist() == GOLDEN


def test_multipliers_are_odd_distinct_and_independent_of_their_number():
    many = multipliers(64)
    assert len(set(many)) == 128
    assert all(m % 2 for m in many)
    assert multipliers(5) == many[:5] + many[64:69]


def test_a_row_depends_on_its_ngram_only():
    text = torch.tensor(TEXT)
    rows = ngram_hash(text, 3, 1009)
    assert torch.equal(ngram_hash(text.expand(2, 3, -1), 3, 1009), rows.expand(2, 3, -1, -1))
    for t, other in itertools.product(range(len(TEXT)), (5, 300)):
        changed = text.clone()
        changed[t] = other
        moved = ngram_hash(changed, 3, 1009) != rows
        # Position p has the ids p, p + 1, p + 2; its 2-gram the last two of them.
        assert [p for p in range(8) if moved[p, :3].any()] == [p for p in (t - 2, t - 1) if 0 <= p < 8]
        assert [p for p in range(8) if moved[p, 3:].any()] == [p for p in (t - 2, t - 1, t) if 0 <= p < 8]


@pytest.mark.parametrize("shape", [(2,), (0, 7), (3, 2)])
def test_nothing_to_hash(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    assert ngram_hash(ids, 2, 5).shape == (*shape[:-1], shape[-1] - 2, 4)


# Statistics of fixed numbers are the same on every machine; six standard deviations say they look random.
SIGMAS = 6
STRUCTURED = {
    "bytes": torch.cartesian_prod(torch.arange(256), torch.arange(256)),
    "motifs": torch.stack([torch.arange(1 << 16) * 219 % 3**15, torch.arange(1 << 16)], dim=1),
    "multiples": torch.cartesian_prod(torch.arange(256) << 16, torch.arange(256) << 15),
}


@pytest.mark.parametrize("num_rows", [1 << 12, 1 << 17, 4099], ids=str)
@pytest.mark.parametrize("name", STRUCTURED)
def test_rows_of_every_table_are_spread_evenly(name, num_rows):
    pairs = STRUCTURED[name]
    ids = torch.cat([pairs[:, :1].flip(0), pairs], dim=1)
    rows = ngram_hash(ids, 4, num_rows)[:, 0] - torch.arange(8) * num_rows
    expected = len(pairs) / num_rows
    for table in range(8):
        counts = torch.bincount(rows[:, table], minlength=num_rows).double()
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - (num_rows - 1)) < SIGMAS * (2 * (num_rows - 1)) ** 0.5, table


def test_tables_collide_independently():
    ids = torch.cat([STRUCTURED["bytes"].flip(1)[:, :1], STRUCTURED["bytes"]], dim=1)
    rows = ngram_hash(ids, 4, 1 << 16)[:, 0] - torch.arange(8) * (1 << 16)
    for a, b in itertools.combinations(range(8), 2):
        # Pairs of n-grams that share their rows in both tables: n^2 / 2 / 2^32 = 0.5 are expected.
        both = rows[:, a] * (1 << 16) + rows[:, b]
        assert len(both) - len(both.unique()) <= 5, (a, b)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"got torch.int32 \[3\]"):
        ngram_hash(torch.zeros(3, dtype=torch.int32), 1, 5)
    with pytest.raises(ValueError, match=r"got torch.int64 \[4, 1\]"):
        ngram_hash(torch.zeros(4, 1, dtype=torch.int64), 1, 5)


def test_opcheck():
    torch.library.opcheck(torch.ops.arbitor.ngram_hash, (torch.tensor([TEXT, TEXT]), 3, 1009))
