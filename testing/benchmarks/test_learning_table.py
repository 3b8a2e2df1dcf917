"""Results file: rows are appended, found again, replaced in place, and survive several writers."""

import csv
import multiprocessing

import pytest

from benchmarks.learning import scale_votes
from benchmarks.learning.table import COLUMNS, PROVENANCE, Table


def row(contestant="trits-full", lr="0.05", seed="0", bits="1.5"):
    values = dict.fromkeys(COLUMNS, "1")
    return values | {
        "contestant": contestant,
        "lr": lr,
        "seed": seed,
        "held_out_bits_per_byte": bits,
    }


def put_many(path, first):
    table = Table(path)
    for seed in range(first, first + 20):
        table.put(row(seed=str(seed)))


def test_no_file_means_no_rows_and_is_not_created(tmp_path):
    table = Table(tmp_path / "results.csv")
    assert table.rows() == []
    assert not table.path.exists()


def test_rows_come_back_in_the_order_they_were_put(tmp_path):
    table = Table(tmp_path / "deeper" / "results.csv")
    rows = [row(seed="0"), row(seed="1"), row(contestant="dense-muon")]
    for values in rows:
        table.put(values)
    assert table.rows() == rows
    with open(table.path, newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)


def test_an_equal_key_replaces_in_place_however_the_number_is_spelt(tmp_path):
    table = Table(tmp_path / "results.csv")
    table.put(row(lr="0.05"))
    table.put(row(lr="0.1"))
    table.put(row(lr="5e-2", bits="1.25"))
    assert [(r["lr"], r["held_out_bits_per_byte"]) for r in table.rows()] == [
        ("5e-2", "1.25"),
        ("0.1", "1.5"),
    ]


@pytest.mark.parametrize("other", [{"contestant": "trits-lean"}, {"lr": "0.06"}, {"seed": "1"}])
def test_each_part_of_the_key_tells_rows_apart(tmp_path, other):
    table = Table(tmp_path / "results.csv")
    table.put(row())
    table.put(row(**other))
    assert len(table.rows()) == 2


def test_wrong_columns_are_refused(tmp_path):
    table = Table(tmp_path / "results.csv")
    with pytest.raises(ValueError, match="columns"):
        table.put({"contestant": "trits-full"})
    table.path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        table.rows()


def test_a_file_without_text_and_commit_is_read_and_completed(tmp_path):
    table = Table(tmp_path / "results.csv")
    old = {name: value for name, value in row().items() if name not in PROVENANCE}
    table.path.write_text(",".join(old) + "\n" + ",".join(old.values()) + "\n")
    assert table.rows() == [old | {"text": "", "commit": ""}]
    (tmp_path / "results.text").write_text("c0ffee 10 bytes to train on, 2 held out\n")
    assert table.rows() == [old | {"text": "c0ffee", "commit": ""}]
    table.put(row(seed="1") | {"text": "c0ffee", "commit": "abc"})
    assert [(r["seed"], r["text"], r["commit"]) for r in table.rows()] == [
        ("0", "c0ffee", ""),
        ("1", "c0ffee", "abc"),
    ]
    header, first, _ = table.path.read_text().splitlines()
    assert header == ",".join([*old, "text", "commit"])
    assert first == ",".join([*old.values(), "c0ffee", ""])


@pytest.mark.parametrize("name", ["learning-gpu", "scale-votes-gpu"])
def test_the_committed_results_are_read_with_their_text(repository, name):
    path = repository / "benchmarks" / "results" / f"{name}.csv"
    scale_votes_columns = {"scale-votes-gpu": (scale_votes.COLUMNS, scale_votes.KEY)}
    rows = Table(path, *scale_votes_columns.get(name, ())).rows()
    assert len(rows) > 8
    noted = path.with_suffix(".text").read_text().split()[0]
    assert {row["text"] for row in rows} == {noted}


def test_two_processes_lose_no_row(tmp_path):
    path = tmp_path / "results.csv"
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=put_many, args=(path, first)) for first in (0, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(int(r["seed"]) for r in Table(path).rows()) == list(range(40))
