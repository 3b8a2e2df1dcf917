import os
import sysconfig
from fractions import Fraction
from pathlib import Path

import pytest

from arbitor.data import ByteCorpus, ByteStream, open_corpus
from arbitor.data import corpus as module
from arbitor.errors import UserError


def content(stream: ByteStream) -> bytes:
    return stream.as_array().tobytes()


def opened(*data: Path | str, held_out: Path | str | None = None, **kwargs) -> ByteCorpus:
    return open_corpus([str(d) for d in data], None if held_out is None else str(held_out), **kwargs)


def numbered(folder: Path, count: int) -> list[Path]:
    """Files 00.txt, 01.txt, ... that hold `<00>`, `<01>`, ..."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:02d}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_text(f"<{i:02d}>")
    return paths


def test_embedded_corpus_splits_the_standard_library():
    corpus = open_corpus([], None, "text", min_bytes=128)
    library = Path(sysconfig.get_path("stdlib"))
    sources = module.embedded_sources(library)
    names = [source.path.relative_to(library).as_posix() for source in sources]
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not [n for n in names if {"site-packages", "idlelib", "test", "tests"} & set(n.split("/"))]
    assert len(corpus.train) + len(corpus.held_out) == sum(s.size for s in sources) > 5_000_000
    out = [s.path.read_bytes() for s, n in zip(sources, names, strict=True) if module.is_held_out(n)]
    assert content(corpus.held_out) == b"".join(out)
    assert "embedded corpus" in corpus.description
    assert "\n" not in corpus.description


def test_path_hash_is_stable_and_holds_out_a_twentieth():
    # blake2b of these names; a change here changes everybody's held-out data.
    held_out = [i for i in range(100) if module.is_held_out(f"package/module_{i}.py")]
    assert held_out == [12, 56]
    share = sum(module.is_held_out(f"{i}.py") for i in range(20_000)) / 20_000
    assert share == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 20_000) ** 0.5)
    assert all(
        module.is_held_out(f"{i}.py", Fraction(1, 10)) for i in range(500) if module.is_held_out(f"{i}.py")
    )


def test_embedded_corpus_leaves_out_tests_packages_and_idlelib(tmp_path):
    kept = ["a.py", "pkg/b.py", "pkg/contest.py"]
    left = [
        "test_a.py",
        "test/a.py",
        "pkg/tests/b.py",
        "idlelib/c.py",
        "site-packages/d.py",
        "x.txt",
        "pkg/testing.py",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "empty.py").touch()
    sources = module.embedded_sources(tmp_path)
    assert [s.path.relative_to(tmp_path).as_posix() for s in sources] == kept


def test_a_python_without_sources_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="--data"):
        open_corpus()


def test_one_file_keeps_its_last_tenth_out(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(200)))
    corpus = opened(path)
    assert content(corpus.train) == bytes(range(180))
    assert content(corpus.held_out) == bytes(range(180, 200))


@pytest.mark.parametrize(("held_out", "count"), [("0.25", 50), ("0.005", 1), ("5e-1", 100), (".1", 20)])
def test_a_share_of_one_file(tmp_path, held_out, count):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(200)))
    corpus = opened(path, held_out=held_out)
    assert content(corpus.held_out) == bytes(range(200 - count, 200))
    assert content(corpus.train) == bytes(range(200 - count))


def test_of_many_files_every_tenth_by_path_is_held_out(tmp_path):
    numbered(tmp_path / "d", 25)
    corpus = opened(tmp_path / "d")
    assert content(corpus.held_out) == b"<09><19>"
    assert content(corpus.train) == b"".join(b"<%02d>" % i for i in range(25) if i not in (9, 19))


def test_the_order_of_arguments_does_not_matter_and_no_file_counts_twice(tmp_path):
    paths = numbered(tmp_path / "d", 20)
    shuffled = [*reversed(paths), tmp_path / "d", paths[3], tmp_path / "d" / "*.txt"]
    corpus = opened(*shuffled)
    assert content(corpus.held_out) == b"<09><19>"
    assert len(corpus.train) == 18 * 4


def test_few_files_keep_the_last_tenth_of_each_out(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 18 + name.upper() * 2)
    corpus = opened(tmp_path)
    assert content(corpus.train) == b"a" * 18 + b"b" * 18
    assert content(corpus.held_out) == b"AABB"
    assert "of every file" in corpus.description


def test_a_share_of_several_files_is_held_out_evenly(tmp_path):
    numbered(tmp_path / "d", 9)
    assert content(opened(tmp_path / "d", held_out="0.34").held_out) == b"<02><05><08>"


def test_a_held_out_path_is_taken_out_of_the_training_data(tmp_path):
    numbered(tmp_path / "d", 4)
    corpus = opened(tmp_path / "d", held_out=tmp_path / "d" / "02.txt")
    assert (content(corpus.train), content(corpus.held_out)) == (b"<00><01><03>", b"<02>")
    other = tmp_path / "other.txt"
    other.write_text("elsewhere")
    corpus = opened(tmp_path / "d", held_out=other)
    assert (content(corpus.train), content(corpus.held_out)) == (b"<00><01><02><03>", b"elsewhere")


def test_a_link_does_not_smuggle_held_out_data_into_training(tmp_path):
    numbered(tmp_path / "d", 3)
    (tmp_path / "link.txt").symlink_to(tmp_path / "d" / "01.txt")
    corpus = opened(tmp_path / "d", held_out=tmp_path / "link.txt")
    assert (content(corpus.train), content(corpus.held_out)) == (b"<00><02>", b"<01>")


def test_the_embedded_corpus_with_own_held_out_data(tmp_path):
    (tmp_path / "own.txt").write_text("own held-out text")
    corpus = open_corpus([], str(tmp_path / "own.txt"))
    assert content(corpus.held_out) == b"own held-out text"
    assert len(corpus.train) == sum(
        s.size for s in module.embedded_sources(Path(sysconfig.get_path("stdlib")))
    )


@pytest.mark.parametrize("held_out", ["0", "1", "-0.1", "2", "nan", "inf"])
def test_a_share_outside_0_and_1_is_refused(tmp_path, held_out):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="share above 0 and below 1"):
        opened(tmp_path / "a.txt", held_out=held_out)


def test_holding_out_everything_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="nothing is left to train on"):
        opened(tmp_path / "a.txt", held_out=tmp_path)


@pytest.mark.parametrize(
    ("size", "part", "advice"), [(80, "training", "smaller --ctx"), (300, "held-out", "larger --held-out")]
)
def test_data_shorter_than_the_context_is_refused(tmp_path, size, part, advice):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * size)
    with pytest.raises(UserError) as caught:
        opened(path, min_bytes=128)
    message = str(caught.value)
    assert message.startswith(f"{path}: the {part} data is ")
    assert "context of 128 bytes" in message
    assert advice in message
    assert "\n" not in message


def test_data_as_long_as_the_context_is_enough(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1280)
    assert len(opened(path, min_bytes=128).held_out) == 128


def test_the_description_is_one_line_with_sizes_and_what_was_skipped(tmp_path):
    numbered(tmp_path / "d", 10)
    (tmp_path / "d" / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "d" / ".hidden").write_text("x")
    description = opened(tmp_path / "d").description
    assert description == (
        f"{tmp_path / 'd'}: 36 bytes to train on; 4 bytes held out (1 of 10 files held out);"
        " skipped 1 binary and 1 hidden"
    )


def test_tinyshakespeare_splits_90_to_10():
    folder = Path(os.environ.get("ARBITOR_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = folder / "text" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"no {path}; ARBITOR_TEST_DATA names the folder with test data")
    corpus = opened(path, min_bytes=1024)
    raw = path.read_bytes()
    assert len(corpus.held_out) == len(raw) // 10
    assert content(corpus.train) + content(corpus.held_out) == raw
