"""Runs on a data set of the hub that fails in the middle: all that was done is saved, and goes on exactly."""

import pytest

from arbitor.audio_command import main as audio
from arbitor.cli import main as arbitor
from arbitor.pretrain_command import main as pretrain
from arbitor.train.metrics import read_metrics
from testing.fake_hub import failing_at, install, rows_of

SMALL = [
    *("--steps", "8", "--batch", "4", "--ctx", "40", "--eval-steps", "2", "--eval-interval", "4"),
    *("--save-interval", "0", "--device", "cpu"),
]  # fmt: skip
CODEC = ["--codec-dim", "16", "--codec-layers", "1"]
PATCHES = ["--image-size", "8", "--image-patch", "4"]
WITHOUT = ["--code-weight", "0", "--audio-weight", "0", "--video-weight", "0"]
COMMANDS = {
    "vision": (
        arbitor,
        ["train", "--enable-vision", "--data", "hf:some/media", *PATCHES],
    ),
    "listen": (
        audio,
        ["--task", "listen", "--data", "hf:some/media", "--rate", "2000", *CODEC],
    ),
    "mix": (
        pretrain,
        ["--text-data", "hf:some/media", "--image-data", "hf:some/media", *PATCHES, *WITHOUT],
    ),
}


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.data.hub_media.OPENING", 20)
    monkeypatch.setattr("arbitor.data.hub_media.BLOCK_ITEMS", 7)
    monkeypatch.setattr("arbitor.data.documents.HELD_OUT_EXAMPLES", 20)


def rows():
    long = rows_of(90)
    for row in long:
        row["text"] += " and so on"
    return long


def files(run):
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    return {name: open(f"runs/{run}/latest/{name}", "rb").read() for name in names}


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_stream_that_breaks_off_ends_the_run_with_all_saved(name, tmp_path, monkeypatch, capsys):
    command, given = COMMANDS[name]
    given = [*given, *SMALL]
    resumed = ["train"] if command is arbitor else []
    install(monkeypatch, rows())
    assert command([*given, "--run", "whole"]) == 0
    stream = install(monkeypatch, rows())
    stream.failing = failing_at(34, 99, ConnectionError("network is down"))
    capsys.readouterr()
    assert command([*given, "--run", "parts"]) == 2
    error = capsys.readouterr().err
    steps = [line["step"] for line in read_metrics(tmp_path / "runs/parts/metrics.jsonl") if "loss" in line]
    assert steps == [*range(1, steps[-1] + 1)]
    assert 1 <= steps[-1] < 8
    assert error.strip().splitlines()[-1:] == [
        f"arbitor: error: stopped at step {steps[-1]} of 8: cannot read example 34 of the data set "
        "hf:some/media:train: network is down (tried 6 times); saved runs/parts/latest, go on with --resume "
        "--run parts"
    ]
    assert command([*resumed, "--resume", "--run", "parts"]) == 2  # it is still down
    install(monkeypatch, rows())
    assert command([*resumed, "--resume", "--run", "parts"]) == 0
    assert files("parts") == files("whole")


def test_a_stream_that_comes_back_is_told_and_changes_nothing(tmp_path, monkeypatch, capsys):
    command, given = COMMANDS["vision"]
    install(monkeypatch, rows())
    assert command([*given, *SMALL, "--run", "whole"]) == 0
    stream = install(monkeypatch, rows())
    stream.failing = failing_at(34, 2, ConnectionError("network is down"))
    capsys.readouterr()
    assert command([*given, *SMALL, "--run", "again"]) == 0
    assert "hf:some/media:train: example 34 was read after 2 failures" in capsys.readouterr().out
    assert files("again") == files("whole")


def test_a_stream_that_cannot_be_opened_leaves_no_run(tmp_path, monkeypatch, capsys):
    command, given = COMMANDS["vision"]
    stream = install(monkeypatch, rows())
    stream.failing = failing_at(3, 99, ConnectionError("network is down"))
    assert command([*given, *SMALL, "--run", "none"]) == 2
    assert "cannot read example 3" in capsys.readouterr().err
    assert not (tmp_path / "runs/none").exists()


def test_without_saving_the_line_says_so(tmp_path, monkeypatch, capsys):
    command, given = COMMANDS["vision"]
    stream = install(monkeypatch, rows())
    stream.failing = failing_at(34, 99, ConnectionError("network is down"))
    assert command([*given, *SMALL, "--no-save", "--run", "lost"]) == 2
    assert "nothing was saved (--no-save)" in capsys.readouterr().err


def test_a_cache_that_is_cut_short_ends_the_run_with_all_saved(tmp_path, monkeypatch, capsys, cache_of_run):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, row in enumerate(rows_of(40)):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
        (folder / f"{number}.txt").write_text(row["text"])
    from arbitor.train.loop import Run

    take = Run._take_step

    def cut(self):
        if self.trainer.step == 5:
            with open(next(cache_of_run.glob("*.bytes")), "r+b") as file:
                file.truncate(100)
        take(self)

    monkeypatch.setattr(Run, "_take_step", cut)
    given = ["train", "--enable-vision", "--data", "images", *PATCHES]
    assert arbitor([*given, *SMALL, "--run", "cut"]) == 2
    error = capsys.readouterr().err
    assert "stopped at step 5 of 8" in error
    assert "was cut short while it was in use" in error
    assert (tmp_path / "runs/cut/latest/state.json").is_file()


@pytest.fixture
def cache_of_run(tmp_path, monkeypatch):
    """A cache folder that everything is written to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("arbitor.data.store.Store.__init__.__defaults__", (0,))
    return tmp_path / "cache" / "arbitor"
