"""Names of runs, and finding checkpoints."""

import os
from pathlib import Path

import pytest

from arbitor.config import dump_toml, preset
from arbitor.errors import UserError
from arbitor.train import runs
from arbitor.train.runs import find_checkpoint


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(name: str, *checkpoints: str, age: int = 0, **settings: object) -> Path:
    """A run that was made `age` seconds ago; with settings, they stand in its checkpoints as well."""
    path = Path("runs") / name
    path.mkdir(parents=True)
    (path / "config.toml").write_text("")
    written = (path / "config.toml").stat().st_mtime_ns - age * 10**9
    os.utime(path / "config.toml", ns=(written, written))
    for checkpoint in checkpoints:
        (path / checkpoint).mkdir()
        (path / checkpoint / "model.safetensors").touch()
        if settings:
            config = preset("tiny", **{"learnt_before": (), **settings})
            (path / checkpoint / "config.toml").write_text(dump_toml(config))
    return path


def test_names_count_up_and_fill_no_gap_twice():
    assert [runs.make_run("tiny").name for _ in range(3)] == ["tiny-1", "tiny-2", "tiny-3"]
    assert runs.make_run("small").name == "small-1"
    assert runs.make_run("tiny", "mine") == Path("runs/mine")
    with pytest.raises(
        UserError, match="the run 'mine' exists, without a checkpoint to go on from: start it"
    ):
        runs.make_run("tiny", "mine")
    make("half", "latest")
    with pytest.raises(UserError, match="the run 'half' exists: continue it with --resume"):
        runs.make_run("tiny", "half")


def test_a_file_in_the_place_of_the_folder_is_named():
    Path("runs").write_text("mine")
    with pytest.raises(UserError, match=r"cannot make a run under .*: runs is a file; train in a"):
        runs.make_run("tiny")
    assert Path("runs").read_text() == "mine"


def test_no_run_is_recommended_whose_settings_cannot_be_read():
    make("text", "latest", age=2, audio_rate=0)
    damaged = make("damaged", "latest", age=1)
    (damaged / "latest" / "config.toml").write_text("codebook_rows")
    assert runs.newest_checkpoint(("image",)) == damaged / "latest"
    with pytest.raises(UserError) as refused:
        find_checkpoint("text", ("image",))
    assert "damaged" not in str(refused.value)
    assert "`arbitor train --enable-vision` makes a run that has" in str(refused.value)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/abs", ".hidden", "-flag", "a\\b", "nul\0"])
def test_names_cannot_leave_the_folder(name):
    with pytest.raises(UserError, match="is no name of a run"):
        runs.run_path(name)


def test_only_runs_are_removed():
    for name in ("mine", "else"):
        make(name)
    (Path("runs") / "else" / "config.toml").rename(Path("runs") / "else" / "precious.txt")
    runs.remove_run(Path("runs/mine"))
    assert not Path("runs/mine").exists()
    with pytest.raises(UserError, match="is not a run"):
        runs.remove_run(Path("runs/else"))
    Path("runs/link").symlink_to("else")
    with pytest.raises(UserError, match="is not a run"):
        runs.remove_run(Path("runs/link"))
    assert Path("runs/else/precious.txt").exists()


def test_the_newest_run_is_found_by_when_it_was_made():
    with pytest.raises(UserError, match=r"there is no run under \./runs; `arbitor train` makes one"):
        runs.existing_run(None)
    make("old", age=9)
    make("tiny-10", age=3)
    make("tiny-9", age=5)
    assert [path.name for path in runs.list_runs()] == ["tiny-10", "tiny-9", "old"]
    assert runs.existing_run(None).name == "tiny-10"
    assert runs.existing_run("old").name == "old"
    with pytest.raises(UserError, match=r"no run 'tiny-11' under \./runs \(did you mean 'tiny-10'\?\)"):
        runs.existing_run("tiny-11")


def test_what_a_command_means_by_a_checkpoint():
    make("older", "best", "latest", "final", age=5)
    make("stopped", "latest", age=3)
    make("empty")
    cases = {
        None: "runs/stopped/latest",
        "older": "runs/older/best",
        "runs/older": "runs/older/best",
        "runs/older/final": "runs/older/final",
        "runs/older/final/model.safetensors": "runs/older/final",
        "stopped": "runs/stopped/latest",
        str(Path("runs/older/latest").resolve()): str(Path("runs/older/latest").resolve()),
    }
    for given, expected in cases.items():
        assert find_checkpoint(given) == Path(expected)
    Path("runs/older/best").rename("runs/older/.best.previous")  # killed between the two renames
    assert find_checkpoint("older") == Path("runs/older/.best.previous")
    assert find_checkpoint("runs/older/best") == Path("runs/older/.best.previous")


def test_the_newest_run_that_fits_is_taken_and_others_are_refused():
    make("codec", "best", audio_task="codec", audio_rate=8000)
    with pytest.raises(UserError, match=r"^runs/codec/best has learnt the codec of sounds, not to continue"):
        find_checkpoint(None, ("text",))
    make("text", "best", age=9, steps=1)
    make("images", "latest", age=5, image_size=16)
    make("grown", "best", age=7, audio_task="listen", audio_rate=8000, learnt_before=("image", "codec"))
    for wanted, name in (("text", "text"), ("image", "images"), ("listen", "grown"), ("codec", "codec")):
        assert find_checkpoint(None, (wanted,)).parent.name == name
        assert find_checkpoint(name, (wanted,)).parent.name == name
    assert find_checkpoint("grown", ("image",)) == Path("runs/grown/best")
    assert find_checkpoint(None) == Path("runs/codec/best")
    with pytest.raises(UserError, match=r"not to continue text: the run 'text' has; what this one is for: "):
        find_checkpoint("images", ("text",))
    with pytest.raises(UserError, match=r"not to draw clips: `arbitor diffusion` makes a run that"):
        find_checkpoint(None, ("flow",))
    make("unknown", "best", age=8)  # no settings beside its weights
    assert find_checkpoint("unknown", ("flow",)) == find_checkpoint(None, ("flow",))


def test_a_run_of_an_earlier_version_is_taken_where_it_is_named(capsys):
    make("grown", "best", audio_task="listen", audio_rate=8000, learnt_before=None)
    for given in ("grown", "runs/grown", "runs/grown/best/model.safetensors"):
        assert find_checkpoint(given, ("text", "chat")) == Path("runs/grown/best")
        assert capsys.readouterr().err == (
            "arbitor: note: runs/grown/best has learnt to listen; what it learnt before, the earlier version "
            "that made it did not write down: going on as if it had learnt to continue text\n"
        )
        assert find_checkpoint(given, ("listen",)) == Path("runs/grown/best")
    with pytest.raises(UserError, match="has learnt to listen, not to continue text: `arbitor train` makes"):
        find_checkpoint(None, ("text",))
    make("text", "best", age=9, steps=1)
    assert find_checkpoint(None, ("text",)) == Path("runs/text/best")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "there is no run or checkpoint 'nowhere'"),
        ("oldest", r"\(did you mean 'older'\?\)"),
        ("empty", "has no checkpoint"),
        (".", "is neither a run nor a checkpoint"),
        ("", "is neither a run nor a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(given, message):
    make("older", "best")
    make("empty")
    with pytest.raises(UserError, match=message):
        find_checkpoint(given)
