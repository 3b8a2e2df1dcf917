"""Folders are swapped so that a kill at any point leaves the old one or the new one, whole."""

import shutil
from pathlib import Path

import pytest

from arbitor.train import swap


def fill_with(text: str):
    def fill(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).write_text(text)

    return fill


def content(folder: Path) -> set[str]:
    return {path.read_text() for path in swap.locate(folder).iterdir()}


@pytest.mark.parametrize("keep_previous", [True, False])
@pytest.mark.parametrize("leftover", ["nothing", "previous", "killed between the renames"])
def test_a_kill_before_any_call_leaves_a_whole_folder(tmp_path, kill_at_call, keep_previous, leftover):
    for at in range(100):
        place = tmp_path / str(at)
        place.mkdir()
        folder = place / "latest"
        swap.write_folder(folder, fill_with("first"))
        if leftover != "nothing":
            swap.write_folder(folder, fill_with("old"), keep_previous=True)
        if leftover == "killed between the renames":
            shutil.rmtree(swap.previous_of(folder))
            folder.rename(swap.previous_of(folder))
        old = "first" if leftover == "nothing" else "old"
        with kill_at_call(at) as outcome:
            swap.write_folder(folder, fill_with("new"), keep_previous=keep_previous)
        assert content(folder) in ({old}, {"new"}), f"killed at call {at}"
        if not outcome.killed:
            assert content(folder) == {"new"}
        swap.recover(folder, keep_previous=keep_previous)
        assert content(folder) in ({old}, {"new"})
        left = {path.name for path in place.iterdir()}
        assert left <= ({"latest", ".latest.previous"} if keep_previous else {"latest"})
        swap.write_folder(folder, fill_with("later"))
        assert content(folder) == {"later"}
        if not outcome.killed:
            break
    assert not outcome.killed
    assert at > 8  # the calls were seen at all


def test_a_failing_write_leaves_the_old_folder_alone(tmp_path):
    folder = tmp_path / "latest"
    swap.write_folder(folder, fill_with("old"))

    def fail(temporary: Path) -> None:
        (temporary / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        swap.write_folder(folder, fail)
    assert content(folder) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_the_previous_folder_is_kept_on_demand(tmp_path):
    folder = tmp_path / "latest"
    for text in ("one", "two", "three"):
        swap.write_folder(folder, fill_with(text), keep_previous=True)
    assert content(folder) == {"three"}
    assert content(swap.previous_of(folder)) == {"two"}
    swap.restore_previous(folder)
    assert content(folder) == {"two"}
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, kill_at_call):
    path = tmp_path / "summary.json"
    path.write_text("old")
    for at in range(10):
        with kill_at_call(at) as outcome:
            swap.write_file(path, "new")
        assert path.read_text() in ("old", "new")
        if not outcome.killed:
            break
    assert path.read_text() == "new"
    assert not outcome.killed
