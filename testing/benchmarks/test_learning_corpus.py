"""Texts of the comparison: distinct files, split by content, the same on every call."""

import numpy as np
import pytest

from arbitor.errors import UserError
from benchmarks.learning.corpus import Texts, distinct_sources, keep_to_one_text, load_texts
from benchmarks.learning.sizes import SIZES


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


def test_rows_of_two_texts_never_stand_in_one_table(tmp_path):
    results = tmp_path / "learning-cpu.csv"
    texts = [Texts(np.full(8, k, np.uint8), np.full(4, k, np.uint8), "") for k in (1, 2)]
    keep_to_one_text(results, texts[0], fresh=True)
    keep_to_one_text(results, texts[0], fresh=False)
    noted = results.with_suffix(".text").read_text()
    with pytest.raises(UserError, match=f"this is {texts[1].fingerprint}"):
        keep_to_one_text(results, texts[1], fresh=False)
    assert results.with_suffix(".text").read_text() == noted
    keep_to_one_text(results, texts[1], fresh=True)
    assert results.with_suffix(".text").read_text() != noted
