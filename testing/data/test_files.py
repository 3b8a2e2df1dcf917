"""Files, folders, globs, gzip and JSON Lines: what is taken, what is skipped, what is refused."""

import contextlib
import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arbitor.config import dump_toml, preset
from arbitor.data import ByteStream, Sampler, contents, open_corpus, store
from arbitor.data.contents import open_contents
from arbitor.data.media import listed
from arbitor.data.sources import Skipped, find_sources
from arbitor.data.store import Store
from arbitor.errors import UserError
from arbitor.train import runs


def read(*items: Path | str, field: str = "text", memory_bytes: int = store.MEMORY_BYTES) -> bytes:
    """The concatenated content of what `items` name."""
    arrays = open_contents(find_sources([str(i) for i in items], Skipped()), field, Store(memory_bytes))
    return b"".join(array.tobytes() for array in arrays)


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refusal(*items: Path | str, **kwargs: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*items, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is taken


def test_a_named_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / ".odd.bin"
    path.write_bytes(b"\0binary\0")
    assert read(path) == b"\0binary\0"


def test_a_folder_gives_text_files_of_any_depth_and_counts_the_rest(tmp_path):
    for name in ("b.txt", "a.py", "sub/deep/c.md", "sub/no_suffix"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"[{name}]")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / ".env").write_text("hidden")
    (tmp_path / "late.bin").write_bytes(b"x" * 8192 + b"\0")  # its NUL lies behind the first 8 KiB
    (tmp_path / "early.bin").write_bytes(b"x" * 8191 + b"\0")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    skipped = Skipped()
    sources = find_sources([str(tmp_path)], skipped)
    names = [source.path.relative_to(tmp_path).as_posix() for source in sources]
    assert names == ["a.py", "b.txt", "late.bin", "sub/deep/c.md", "sub/no_suffix"]
    assert skipped == Skipped(hidden=2, binary=1, empty=1, special=2)
    assert str(skipped) == "skipped 1 binary, 2 hidden, 1 empty and 2 special"


def test_a_glob_means_what_the_shell_makes_of_it(tmp_path):
    for name in ("a.txt", "b.txt", "c.md", "sub/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"[{name}]")
    assert read(tmp_path / "*.txt") == b"[a.txt][b.txt]"
    assert read(tmp_path / "**" / "*.txt") == b"[a.txt][b.txt][sub/d.txt]"
    assert read(tmp_path / "*") == b"[a.txt][b.txt][c.md][sub/d.txt]"
    assert read(tmp_path / "**") == b"[a.txt][b.txt][c.md][sub/d.txt]"


def test_the_folder_of_runs_is_left_out_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "sub/runs/b.txt", "runs/tiny-1/metrics.jsonl", "runs/tiny-1/sample.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    for items in (["."], [str(tmp_path)], ["**"], ["*"], ["**/*.txt", "runs"], ["sub", "a.txt", "runs"]):
        skipped = Skipped()
        found = [source.path.resolve().relative_to(tmp_path) for source in find_sources(items, skipped)]
        assert list(map(str, found)) == ["a.txt", "sub/runs/b.txt"], items
        assert str(skipped) == "skipped 1 folder of runs"
    sample = str(Path("runs/tiny-1/sample.txt"))
    for item in (sample, "runs/*/sample.txt", "runs/*/*.txt", str(tmp_path / "runs/tiny-1/*.txt")):
        assert read(item) == sample.encode()
    assert len(find_sources(["runs"], Skipped())) == 2
    lines, media = listed(Path("."), (".txt",), left_out := Counter())
    assert ([str(path) for path in media], lines) == (["a.txt", "sub/runs/b.txt"], [])
    assert left_out == {"folder of runs": 1}


def test_runs_elsewhere_are_left_out_unless_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = dump_toml(preset("tiny"))
    for name, text in {
        "a.txt": "a",
        "log/config.toml": "[log]",  # of another program
        "log/metrics.jsonl": "{}",
        "other/config.toml": 'preset = "dark"\n',
        "other/finetune.json": "{}",
        "other/final/essay.txt": "essay",
        "old/best/config.toml": written,  # a checkpoint that was copied
        "old/best/model.safetensors": "weights",
        f"old/tiny-1/{runs.CONFIG_FILE}": written,
        f"old/tiny-1/{runs.METRICS_FILE}": "{}",
        "old/tiny-1/sample.txt": "sample",
        f"old/deep/lora/{runs.FINETUNE_FILE}": '{"checksum": "0", "format": 1}',
        f"old/deep/lora/{runs.CHECKPOINTS[0]}/adapter_config.json": "{}",
        "old/deep/mine.toml": written,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    kept = ["a.txt", "log/config.toml", "log/metrics.jsonl", "old/deep/mine.toml"]
    kept += ["other/config.toml", "other/final/essay.txt", "other/finetune.json"]
    for items in (["."], [str(tmp_path)], ["**"], ["*"], ["**/*", "a.txt"]):
        skipped = Skipped()
        found = [source.path.resolve().relative_to(tmp_path) for source in find_sources(items, skipped)]
        assert list(map(str, found)) == kept, items
        assert str(skipped) == "skipped 3 holding a run"
    for item in ("old/tiny-1/sample.txt", "old/tiny-1/s*.txt", "old/tiny-1/*ample.t*"):
        assert read(item) == b"sample"
    assert len(find_sources(["old/tiny-1"], Skipped())) == 3
    with pytest.raises(
        UserError, match=r"no text in what matches .* \(skipped 1 holding a run; a file named by"
    ):
        find_sources(["old/*/sample.txt"], Skipped())
    lines, media = listed(Path("."), (".txt", ".toml"), left_out := Counter())
    assert [str(path) for path in lines] == ["log/metrics.jsonl"]
    assert sorted(map(str, media)) == [name for name in kept if name.endswith((".txt", ".toml"))]
    assert left_out == {"holding a run": 3}


def test_a_name_with_glob_characters_is_taken_literally_where_it_exists(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("other")
    assert read(tmp_path / "a[1].txt") == b"brackets"


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("home")
    assert read("~/mine.txt") == b"home"
    assert read("~/*.txt") == b"home"


def test_large_files_are_mapped_and_small_ones_share_a_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_MAPPED_FROM", 100)
    sizes = {"a": 99, "b": 100, "c": 3, "d": 5000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(name.encode() * size)
    arrays = open_contents(find_sources([str(tmp_path)], Skipped()), "text", Store())
    assert [array.tobytes() for array in arrays] == [name.encode() * size for name, size in sizes.items()]
    assert arrays[0].base is arrays[2].base
    assert arrays[1].base is not arrays[3].base


def test_many_mapped_files_need_no_file_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_MAPPED_FROM", 1)
    for i in range(50):
        (tmp_path / f"{i:02d}").write_bytes(b"%02d" % i)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if before is None:
        pytest.skip("no /proc/self/fd to count open files with")
    arrays = open_contents(find_sources([str(tmp_path)], Skipped()), "text", Store())
    assert b"".join(a.tobytes() for a in arrays) == b"".join(b"%02d" % i for i in range(50))
    assert len(os.listdir("/proc/self/fd")) == before


def test_gzip_is_decompressed_by_name(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (tmp_path / "b.GZ").write_bytes(gzip.compress(b"more") + gzip.compress(b" members"))
    assert read(tmp_path) == b"packed textmore members"


def test_a_folder_judges_gzip_by_what_it_holds(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    (tmp_path / "archive.tar.gz").write_bytes(gzip.compress(buffer.getvalue()))
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"text"))
    skipped = Skipped()
    assert [s.path.name for s in find_sources([str(tmp_path)], skipped)] == ["text.gz"]
    assert skipped == Skipped(binary=1)


def test_jsonl_gives_its_field_with_a_newline_after_each(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one", "id": 1}, {"text": "zwei ü\n"}, {"text": ""})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n   \n" + b'{"text": "no newline"}')
    assert read(path) == "one\nzwei ü\n\n\nno newline\n".encode()


def test_jsonl_with_another_field_and_packed(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"body": "b1"}\r\n{"body": "b2"}\r\n'))
    assert read(path, field="body") == b"b1\nb2\n"


def test_a_lone_surrogate_in_jsonl_becomes_a_question_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    assert read(path) == b"a?b\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_texts_survive_jsonl(tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    os.utime(
        path, ns=(0, 0)
    )  # The key is path, size and time: other texts of equal size must not be mixed up,
    # and are not, because so little content stays in memory and never enters the cache.
    assert read(path) == "".join(text + "\n" for text in texts).encode()


# The cache


def test_large_decoded_content_goes_to_the_cache_and_is_used_again(tmp_path, cache, monkeypatch):
    text = b"0123456789" * 100
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(text))
    assert read(path, memory_bytes=10) == text
    (cached,) = cache.iterdir()
    assert cached.read_bytes() == text
    monkeypatch.setattr(contents, "_decoded", lambda path, field: iter([b"decoded again"]))
    assert read(path, memory_bytes=10) == text


def test_the_cache_key_follows_path_size_time_and_field(tmp_path, cache):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "aaaa", "body": "bbbb"})
    assert read(path, memory_bytes=1) == b"aaaa\n"
    assert read(path, field="body", memory_bytes=1) == b"bbbb\n"
    write_jsonl(path, {"text": "cccc", "body": "dddd"})
    os.utime(path, ns=(5, 5))
    assert read(path, memory_bytes=1) == b"cccc\n"
    os.utime(path, ns=(6, 6))
    assert read(path, memory_bytes=1) == b"cccc\n"
    write_jsonl(path, {"text": "eeeee", "body": "dddd"})
    os.utime(path, ns=(6, 6))
    assert read(path, memory_bytes=1) == b"eeeee\n"
    path.rename(tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl", memory_bytes=1) == b"eeeee\n"
    assert len(list(cache.iterdir())) == 6


def test_many_small_files_are_cached_together_beyond_the_memory(tmp_path, cache):
    for name in "abc":
        (tmp_path / name).write_text(name * 10)
    assert read(tmp_path, memory_bytes=5) == b"a" * 10 + b"b" * 10 + b"c" * 10
    assert len(list(cache.iterdir())) == 1
    (tmp_path / "b").write_text("B" * 12)
    assert read(tmp_path, memory_bytes=5) == b"a" * 10 + b"B" * 12 + b"c" * 10


def test_a_failed_decoding_leaves_no_cache_file(tmp_path, cache):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(os.urandom(4 << 20))[: 3 << 20])
    with pytest.raises(UserError, match="truncated"):
        read(path, memory_bytes=10)
    assert list(cache.iterdir()) == []


def test_without_a_writable_cache_content_stays_in_memory_and_is_said_so(tmp_path, monkeypatch):
    (tmp_path / "not_a_folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not_a_folder"))
    monkeypatch.setattr(store.Store.__init__, "__defaults__", (10,))
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"0123456789" * 10))
    corpus = open_corpus([str(path)])
    assert corpus.train.as_array().tobytes() == b"0123456789" * 9
    assert "kept in memory" in corpus.description


def test_a_full_disk_is_named(tmp_path, cache, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"0123456789" * 10))
    with pytest.raises(UserError, match=r"No space left on device; .*XDG_CACHE_HOME"):
        read(tmp_path / "a.gz", memory_bytes=10)
    assert list(cache.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_after_a_day(tmp_path, cache):
    cache.mkdir()
    for name, age in (("old", 2 * 86400), ("young", 60)):
        (cache / f"{name}.partial").touch()
        moment = (cache / f"{name}.partial").stat().st_mtime - age
        os.utime(cache / f"{name}.partial", (moment, moment))
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"0123456789"))
    read(tmp_path / "a.gz", memory_bytes=1)
    assert sorted(path.name for path in cache.glob("*.partial")) == ["young.partial"]


@pytest.mark.parametrize("value", ["", "relative/folder"])
def test_an_unusable_cache_variable_means_the_home_folder(tmp_path, monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "arbitor"


# What is refused


def test_a_missing_path_is_named_with_a_near_one(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("x")
    message = refusal(tmp_path / "shakespear.txt")
    assert message == (
        f"no such file or folder: {str(tmp_path / 'shakespear.txt')!r} (did you mean 'shakespeare.txt'?)"
    )
    assert "no such file" in refusal(tmp_path / "no" / "where")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "e.txt").touch()
    assert "is empty" in refusal(tmp_path / "e.txt")


def test_a_folder_without_text_is_refused_with_what_it_holds(tmp_path):
    assert "no text files in the folder" in refusal(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"\0")
    assert "skipped 1 binary" in refusal(tmp_path)


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
    assert "nothing matches the pattern" in refusal(tmp_path / "*.txt")
    (tmp_path / "sub").mkdir()
    assert "no text" in refusal(tmp_path / "*")


def test_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a regular file nor a folder" in refusal(tmp_path / "pipe")


def test_a_name_that_no_system_takes_is_refused(tmp_path):
    assert "null" in refusal("a\0b")
    assert "too long" in refusal("x" * 5000).lower()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.gz", "big.txt"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_an_unreadable_file_is_refused(tmp_path, monkeypatch, name, whole_folder):
    # Permissions do not bind root, so the refusal comes from a stand-in for `open`.
    (tmp_path / name).write_bytes(b"x" * 20)
    monkeypatch.setattr(contents, "_MAPPED_FROM", 10 if name == "big.txt" else 1000)

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", args[0])

    monkeypatch.setattr("builtins.open", denied)
    message = refusal(tmp_path if whole_folder else tmp_path / name)
    assert message == f"cannot read {str(tmp_path / name)!r}: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_an_unreadable_folder_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "closed" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [5, 15, -4])
def test_a_truncated_gzip_is_refused(tmp_path, keep):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"some text that was packed")[:keep])
    assert "truncated gzip" in refusal(tmp_path / "a.gz")
    assert "truncated gzip" in refusal(tmp_path)


def test_a_gzip_that_is_none_or_damaged_is_refused(tmp_path):
    path = tmp_path / "a.gz"
    path.write_text("plain text")
    assert "not a valid gzip file" in refusal(path)
    packed = bytearray(gzip.compress(b"some text that was packed"))
    packed[-6] ^= 1
    path.write_bytes(packed)
    assert "not a valid gzip file" in refusal(path)
    packed[10] = 0xFF
    path.write_bytes(packed)
    assert "not a valid gzip file" in refusal(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_gzip_is_refused_or_gives_the_same_text(tmp_path, data):
    text = b"some text that was packed, long enough to be compressed compressed compressed"
    packed = bytearray(gzip.compress(text, mtime=0))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "a.gz").write_bytes(packed)
    with contextlib.suppress(UserError):
        assert read(tmp_path / "a.gz") == text


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "x"', ["not valid JSON", "column"]),
        ('{"body": "x", "title": "y"}', ["no field 'text'", "'body', 'title'", "--field"]),
        ("{}", ["no field 'text'", "none"]),
        ('["text"]', ["JSON object", "list"]),
        ('{"text": 3}', ["must be a string", "int"]),
        ('{"text": null}', ["must be a string", "NoneType"]),
        (b'{"text": "\xff"}', ["not UTF-8", "byte 11"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"n": ' + "9" * 5000 + "}", ["number too long"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_malformed_jsonl_is_named_with_its_line(tmp_path, line, parts, packed):
    raw = (
        b'{"text": "good"}\n\n'
        + (line if isinstance(line, bytes) else line.encode())
        + b'\n{"text": "good"}\n'
    )
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    message = refusal(path)
    assert message.startswith(f"{str(path)!r}, line 3: ")
    for part in parts:
        assert part in message


def test_jsonl_and_gzip_without_text_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "holds no text" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b""))
    assert "holds no text" in refusal(tmp_path / "a.gz")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(raw=st.binary(max_size=60) | st.text('{}[]":,text\\u0dn1 \n', max_size=60).map(str.encode))
def test_random_jsonl_is_text_or_a_user_error(tmp_path, raw):
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    with contextlib.suppress(UserError):
        assert read(path).endswith(b"\n")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first")
    sources = find_sources([str(path)], Skipped())
    path.write_text("longer now")
    with pytest.raises(UserError, match="changed while it was read"):
        open_contents(sources, "text", Store())


@pytest.mark.parametrize("files", [1, 2])
def test_a_file_that_loses_its_pages_is_an_error_and_not_the_end_of_the_process(tmp_path, files):
    for i in range(files):
        (tmp_path / f"{i}.txt").write_bytes(b"0123456789" * 300_000)
    corpus = open_corpus([str(tmp_path)], min_bytes=128)
    sampler = Sampler(corpus.train, 64, 128)
    sampler.next()
    os.truncate(tmp_path / "0.txt", 100_000)
    message = r"0\.txt' was cut short while it was in use: it has 100,000 of 3,000,000 bytes; put it back"
    with pytest.raises(UserError, match=message):
        sampler.next()
    with pytest.raises(UserError, match=message):
        corpus.held_out.window(0, 10)
    with pytest.raises(UserError, match=message):
        corpus.train.fingerprint()


@pytest.mark.parametrize("how", ["removed", "replaced", "longer"])
def test_a_mapped_file_that_keeps_its_pages_goes_on(tmp_path, how):
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789" * 300_000)
    corpus = open_corpus([str(path)], min_bytes=128)
    before = corpus.train.fingerprint()
    if how == "removed":
        path.unlink()
    elif how == "replaced":
        (tmp_path / "b.txt").write_text("short")
        (tmp_path / "b.txt").rename(path)
    else:
        with open(path, "ab") as file:
            file.write(b"more")
    assert corpus.train.fingerprint() == before
    Sampler(corpus.train, 64, 128).next()


def test_a_decoded_cache_that_is_cut_short_is_noticed_as_well(tmp_path, cache):
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(100_000)))
    (array,) = open_contents(find_sources([str(tmp_path / "a.gz")], Skipped()), "text", Store(1000))
    (file,) = cache.glob("*.bytes")
    os.truncate(file, 5000)
    with pytest.raises(UserError, match=r"\.bytes' was cut short"):
        ByteStream([array[50_000:]]).window(0, 10)


def test_contents_are_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (array,) = open_contents(find_sources([str(tmp_path)], Skipped()), "text", Store())
    assert array.dtype == np.uint8
    assert array.shape == (1,)
