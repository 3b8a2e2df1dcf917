"""The codebook benchmark: its recall can fall, its command writes one row a codebook."""

import csv

import torch

from arbitor.train.device import resolve_device
from benchmarks import codebook as benchmark


def test_one_row_for_every_codebook(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CODEBOOKS", ((49, 2), (30, 1)))
    for _ in range(2):
        assert benchmark.main(["--device", "cpu", "--queries", "5", "--results", str(tmp_path)]) == 0
    with open(tmp_path / "codebook-cpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rows"], row["parts"], row["recall"]) for row in rows] == [
        ("49", "2", "1.0000"),
        ("30", "1", "1.0000"),
    ]
    assert all(float(row["us_per_query"]) > 0 for row in rows)
    assert "recall 1.0000" in capsys.readouterr().out


def test_recall_counts_queries_with_another_row_than_the_nearest(monkeypatch):
    from arbitor.ternary import codebook

    def off_by_one_for_half(x, packed, exponent, nearest=codebook.codebook_nearest):
        ids = nearest(x, packed, exponent)
        ids[::2] = (ids[::2] + 1) % len(packed)
        return ids

    monkeypatch.setattr(codebook, "codebook_nearest", off_by_one_for_half)
    assert benchmark.measure(100, 1, 40, resolve_device("cpu"))["recall"] == "0.5000"


def test_the_exhaustive_search_goes_over_all_rows(monkeypatch):
    monkeypatch.setattr(benchmark, "NUMBERS_AT_ONCE", 3 * 2 * benchmark.CODEBOOK_DIM)
    torch.manual_seed(0)
    book = benchmark.TernaryVQCodebook(49, benchmark.CODEBOOK_DIM, parts=2)
    rows = book.rows(torch.arange(49))
    for pair in torch.arange(48).view(-1, 2):
        assert benchmark.nearest_distance(book, rows[pair]).tolist() == [0, 0]


def test_wrong_arguments_are_refused(capsys):
    assert benchmark.main(["--queries", "0"]) == 2
    assert benchmark.main(["--device", "gpu"]) == 2
    assert "--queries must be at least 1" in capsys.readouterr().err
