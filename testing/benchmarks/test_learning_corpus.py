"""Texts of the comparison: distinct files, split by content, the same on every call."""

import numpy as np
import pytest

from arbitor.errors import UserError
from benchmarks.learning.corpus import Texts, distinct_sources, keep_to_one_text, load_texts
from benchmarks.learning.sizes import SIZES
from benchmarks.learning.table import COLUMNS, Table


@pytest.fixture
def sources(tmp_path):
    for i in range(200):
        folder = tmp_path / f"package{i % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"module{i}.py").write_text(f"# {i}\n" + f"value = {i}\n" * 30)
        (folder / f"copy{i}.py").write_text(f"# {i}\n" + f"value = {i}\n" * 30)
        (folder / f"note{i}.txt").write_text("not a source")
    (tmp_path / "empty.py").write_text("")
    return tmp_path


def texts_of(*folders, **options):
    return distinct_sources(((f, path) for f in folders for path in f.rglob("*.py")), **options)


def files_in(text):
    """The numbers of the files whose first line stands in the text, with repetitions."""
    return [int(line[2:]) for line in text.tobytes().decode().splitlines() if line.startswith("# ")]


def test_each_content_once_and_on_one_side(sources):
    texts = texts_of(sources)
    train, held_out = files_in(texts.train), files_in(texts.held_out)
    assert sorted(train + held_out) == list(range(200))
    # 200 files, each held out with probability 1/20; the hashes are fixed, so this is no gamble.
    assert 0 < len(held_out) < 26
    assert texts.train.dtype == texts.held_out.dtype == np.uint8


def test_the_same_files_give_the_same_texts(sources):
    first, second = texts_of(sources), texts_of(sources, sources / "package3")
    assert np.array_equal(first.held_out, second.held_out)
    assert np.array_equal(first.train, second.train)
    assert first.description == second.description


def test_the_cap_stops_early(sources):
    texts = texts_of(sources, max_bytes=20_000)
    assert 20_000 <= len(texts.train) + len(texts.held_out) < 20_000 + 400


def test_no_sources_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="--data"):
        texts_of(tmp_path)


def test_shakespeare_needs_its_text_and_holds_out_the_last_tenth(tmp_path):
    with pytest.raises(UserError, match="--data"):
        load_texts(SIZES["shakespeare"])
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 100)
    texts = load_texts(SIZES["shakespeare"], [str(path)])
    assert len(texts.train) == 23_040
    assert np.concatenate([texts.train, texts.held_out]).tobytes() == path.read_bytes()


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "learning-cpu.csv")


def two_texts():
    return [Texts(np.full(8, k, np.uint8), np.full(4, k, np.uint8), "") for k in (1, 2)]


def row(text, seed="0"):
    return dict.fromkeys(COLUMNS, "1") | {"text": text, "seed": seed}


def test_rows_of_two_texts_never_stand_in_one_table(table):
    mine, other = two_texts()
    table.put(row(mine.fingerprint))
    keep_to_one_text(table, mine, table.rows())
    noted, rows = table.path.with_suffix(".text").read_text(), table.rows()
    assert noted == f"{mine.fingerprint} 8 bytes to train on, 4 held out\n"
    with pytest.raises(UserError, match=f"this is {other.fingerprint}"):
        keep_to_one_text(table, other, table.rows())
    assert (table.path.with_suffix(".text").read_text(), table.rows()) == (noted, rows)
    keep_to_one_text(table, other, [])  # all of them are to be measured again
    assert table.rows() == []
    assert table.path.with_suffix(".text").read_text().startswith(other.fingerprint)


def test_a_row_names_its_text_whatever_the_note_says(table):
    mine, other = two_texts()
    keep_to_one_text(table, mine, [])
    table.put(row(other.fingerprint))
    with pytest.raises(UserError, match=f"rows of another text \\({other.fingerprint}"):
        keep_to_one_text(table, mine, table.rows())


def test_rows_of_this_text_stay_while_others_leave(table):
    mine, other = two_texts()
    table.put(row(mine.fingerprint))
    table.put(row(other.fingerprint, seed="1"))
    keep_to_one_text(table, mine, [row(mine.fingerprint)])
    assert table.rows() == [row(mine.fingerprint)]
