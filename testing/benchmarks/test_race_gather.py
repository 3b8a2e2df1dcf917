"""A folder of all text: what is taken, each content once, under names that say nothing of where it was."""

import sysconfig

import pytest

from benchmarks.race import gather
from benchmarks.race.gather import MAX_FILE_BYTES, main


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The only folder that is looked at."""
    folder = tmp_path / "machine"
    (folder / "deep").mkdir(parents=True)
    monkeypatch.setattr(gather, "SYSTEM", (str(folder), str(tmp_path / "none")))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    return folder


def test_each_distinct_text_is_there_once(machine, tmp_path, capsys):
    (machine / "a.py").write_bytes(b"one")
    (machine / "deep" / "b.h").write_bytes(b"two")
    (machine / "deep" / "copy.rst").write_bytes(b"one")
    (machine / "picture.png").write_bytes(b"three")
    (machine / "null.c").write_bytes(b"a\0b")
    (machine / "empty.txt").write_bytes(b"")
    (machine / "table.py").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    (machine / "dangling.py").symlink_to(tmp_path / "nowhere")
    more = tmp_path / "more"
    more.mkdir()
    (more / "c.md").write_bytes(b"four")
    assert main([str(tmp_path / "text"), str(more)]) == 0
    files = sorted((tmp_path / "text").iterdir())
    assert sorted(file.read_bytes() for file in files) == [b"four", b"one", b"two"]
    assert all(file.suffix == ".txt" and len(file.stem) == 32 for file in files)
    assert "3 files" in capsys.readouterr().out


def test_a_folder_that_is_there_is_left_alone(machine, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    assert main([str(tmp_path / "text")]) == 2
    assert "File exists" in capsys.readouterr().err
    assert list((tmp_path / "text").iterdir()) == []
