"""Finetuning on recordings and clips: what is learnt, exact resume, what the result is for, refusals."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arbitor.audio_command import main as audio_main
from arbitor.cli import main
from arbitor.data.waves import write_recording
from arbitor.drawing import draw
from arbitor.finetune.adapter import audit_adapter, read_adapter
from arbitor.finetune.session import newest_adapter
from arbitor.pretrain_command import main as pretrain_main
from arbitor.ternary.audit import audit_checkpoint
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.metrics import read_metrics
from arbitor.train.runs import is_finished
from arbitor.video_command import main as video_main
from testing.small_run import MODEL
from testing.test_cli import tree

pytest.importorskip("sklearn", reason="scikit-learn (extra `video`) is not installed")

TOML = "[model]\n" + "".join(f"{name} = {value}\n" for name, value in MODEL.items()) + "ctx = 32\n"
TOML += "audio_dim = 16\naudio_layers = 1\nvideo_dim = 32\nvideo_layers = 1\nvideo_ids = 10\n"
KINDS = {
    "listen": ("answer_loss", ["--enable-audio", "--task", "listen"]),
    "speak": ("code_loss", ["--enable-audio", "--task", "speak"]),
    "draw": ("velocity_loss", ["--enable-video"]),
}
FEW = ["--batch", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("arbitor.data.audio._SYNTHETIC_COUNT", 30)
    monkeypatch.setattr("arbitor.train.video_tasks.STANDARD_CLIPS", 32)
    monkeypatch.setattr("arbitor.train.video_tasks.draw", functools.partial(draw, steps=1))
    monkeypatch.setattr("arbitor.train.loop.LAST_WINDOWS_PER_TRAINED", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run `base` that has the parts for sounds and clips, and a later one of text, `text`."""
    folder = tmp_path_factory.mktemp("media")
    former = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("arbitor.data.audio._SYNTHETIC_COUNT", 30)
            patch.setattr("arbitor.train.video_tasks.STANDARD_CLIPS", 32)
            patch.setattr("arbitor.train.video_tasks.draw", functools.partial(draw, steps=1))
            patch.setattr("arbitor.train.loop.LAST_WINDOWS_PER_TRAINED", 1)
            patch.setattr("arbitor.train.report.SAMPLE_BYTES", 4)
            Path("small.toml").write_text(TOML)
            Path("data.txt").write_text("".join(f"line {i}: {i * i % 97}\n" for i in range(200)))
            weights = ["--text-weight", "0", "--code-weight", "0", "--image-weight", "0"]
            sizes = ["--audio-seconds", "0.1", "--video-size", "8", "--video-frames", "2"]
            few = ["--config", "small.toml", *FEW, "--eval-steps", "2", "--steps", "12"]
            assert pretrain_main([*few, *weights, *sizes, "--run", "base"]) == 0
            assert main(["train", *few, "--data", "data.txt", "--run", "text"]) == 0
    finally:
        os.chdir(former)
    return folder


@pytest.fixture
def workplace(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def finetune(kind, *flags):
    return main(["finetune", "base", *KINDS[kind][1], *FEW, "--held-out", "8", *flags])


@pytest.mark.long
@pytest.mark.parametrize("full", [(), ("--full",)], ids=["adapters", "votes"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_falls_and_the_base_stays(workplace, capsys, kind, full):
    before = tree(workplace / "runs/base")
    assert finetune(kind, "--steps", "40", "--eval-interval", "20", "--run", "f", *full) == 0
    assert tree(workplace / "runs/base") == before
    summary = json.loads(Path("runs/f/summary.json").read_text())
    key = f"held_out_{KINDS[kind][0]}"
    assert summary[key] < 0.97 * summary[f"{key}_before"]
    assert summary["figure"] == KINDS[kind][0]
    assert summary["held_out_clips" if kind == "draw" else "held_out_recordings"] > 1
    out = capsys.readouterr().out
    assert f"held-out loss {summary[f'{key}_before']:.4f} -> {summary[key]:.4f} " in out
    lines = list(read_metrics(Path("runs/f/metrics.jsonl")))
    figure = {"listen": "bits_per_byte", "speak": "bits_per_code", "draw": "velocity_loss"}[kind]
    assert [line["step"] for line in lines if f"held_out_{figure}" in line] == [0, 20, 40]
    assert all((line["bits_per_byte"] is None) == (kind != "listen") for line in lines if "loss" in line)
    assert Path("runs/f/loss.png").is_file()
    assert audit_checkpoint(Path("runs/base/best")).ok
    names = {name for name, _ in _trained(Path("runs/f/final"), bool(full))}
    codec = [name for name in names if ".codec." in name]
    assert names
    assert not codec
    assert is_finished(Path("runs/f"))
    capsys.readouterr()
    assert main(["finetune", "--resume", "--run", "f"]) == 0
    assert "finished; nothing to do" in capsys.readouterr().out


def _trained(folder, full):
    """What a finetune changed, or its adapters."""
    if not full:
        report = audit_adapter(folder)
        assert report.ok
        return read_adapter(folder).weights.items()
    assert audit_checkpoint(folder).ok
    before = load_checkpoint(Path("runs/base/best")).weights
    after = load_checkpoint(folder).weights
    return [(name, tensor) for name, tensor in after.items() if not tensor.equal(before[name])]


@pytest.mark.parametrize(
    ("kind", "reached"),
    [
        ("listen", {"prelude", "sequencer", "sidecars.audio.from_trits", "head"}),
        ("speak", {"prelude", "sequencer", "sidecars.audio.from_trits", "heads.audio"}),
        ("draw", {"prelude", "sequencer", "heads.video"}),
    ],
)
def test_adapters_stand_where_the_data_reaches(workplace, kind, reached):
    assert finetune(kind, "--steps", "3", "--dropout", "0.1", "--run", "f") == 0
    weights = read_adapter(Path("runs/f/final")).weights
    # A step of AdamW moves every B that a gradient reaches away from zero.
    still = [name for name, tensor in weights.items() if "lora_B" in name and not bool(tensor.any())]
    assert not still
    whole = ("sidecars", "heads")
    parts = {".".join(name.split(".")[: 3 if name.startswith("sidecars") else 2]) for name in weights}
    parts = {part if part.startswith(whole) else part.split(".")[0] for part in parts}
    assert parts == reached


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--dropout", "0.3"], ["--full"]], ids=["adapters", "votes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_finetune_equals_an_uninterrupted_one(workplace, monkeypatch, kind, flags):
    from arbitor.finetune.loop import Finetune

    steps = ["--steps", "6", "--eval-interval", "3", "--save-interval", "2", *flags]
    assert finetune(kind, *steps, "--run", "whole") == 0
    take = Finetune._take_step

    def take_and_stop(self):
        take(self)
        if self.step in (1, 3, 4):
            self.guard.received = 2

    with monkeypatch.context() as patch:
        patch.setattr(Finetune, "_take_step", take_and_stop)
        assert finetune(kind, *steps, "--run", "parts") == 130
        for _ in range(2):
            assert main(["finetune", "--resume", "--run", "parts"]) == 130
    assert main(["finetune", "--resume", "--run", "parts"]) == 0
    for name in ("final", "best", "latest"):
        files = {path.name for path in Path("runs/whole", name).iterdir()}
        assert len(files) == 4
        for file in files:
            assert Path("runs/parts", name, file).read_bytes() == Path("runs/whole", name, file).read_bytes()


def test_finetunes_are_tried_like_runs(workplace, capsys):
    for kind in KINDS:
        assert finetune(kind, "--steps", "2", "--run", kind) == 0
    out = capsys.readouterr().out
    assert "next: arbitor audio --hear FILE --run listen" in out
    assert "next: arbitor audio --say TEXT --run speak" in out
    assert "next: arbitor diffusion --sample TEXT --run draw" in out
    for verb in (["generate", "speak"], ["chat", "speak"], ["eval", "draw", "--data", "data.txt"]):
        assert main(verb) == 2
        assert f"runs/{verb[1]}/best has learnt " in (error := capsys.readouterr().err)
        assert "not to continue text: the run 'text' has" in error
    assert newest_adapter(("text", "chat")) is None  # those of media do not chat
    assert list(Path("runs/speak/samples").glob("*.wav"))
    assert Path("runs/draw/samples/drawn.gif").is_file()
    assert not Path("runs/listen/samples").exists()
    assert Path("runs/listen/sample.txt").read_text().count("(it is:") > 1
    assert audio_main(["--say", "high tone", "--run", "speak", "--seed", "1", "--out", "said.wav"]) == 0
    assert "with the adapter runs/speak/best" in capsys.readouterr().out
    assert Path("said.wav").stat().st_size > 40
    noise = 0.1 * np.random.default_rng(0).normal(size=800).astype(np.float32)
    write_recording("noise.wav", noise, 8000)
    assert audio_main(["--hear", "noise.wav", "--run", "listen"]) == 0
    few = ["--count", "1", "--sample-steps", "1", "--seed", "1"]
    assert video_main(["--sample", "seven", *few, "--run", "draw", "--out", "one.png"]) == 0
    assert video_main(["--sample", "seven", *few, "--run", "base", "--out", "two.png"]) == 0
    assert Image.open("one.png").tobytes() != Image.open("two.png").tobytes()


def test_without_a_name_the_newest_run_with_the_part_is_the_base(workplace):
    few = [*FEW, "--held-out", "8", "--steps", "1"]
    assert main(["finetune", "--enable-video", *few, "--run", "f"]) == 0
    assert json.loads(Path("runs/f/summary.json").read_text())["base"] == "runs/base/best"


def test_the_task_of_a_base_is_the_default(workplace):
    small = ["--codec-dim", "16", "--codec-layers", "1", "--ctx", "800", "--steps", "1", *FEW]
    assert audio_main(["--task", "speak", *small, "--run", "speaker"]) == 0
    assert main(["finetune", "speaker", "--enable-audio", *FEW, "--steps", "1", "--run", "f"]) == 0
    assert json.loads(Path("runs/f/finetune.json").read_text())["audio_task"] == "speak"
    assert main(["finetune", "base", "--enable-audio", *FEW, "--steps", "1", "--run", "g"]) == 0
    assert json.loads(Path("runs/g/finetune.json").read_text())["audio_task"] == "listen"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["text", "--enable-audio"], "--enable-audio: the base runs/text/best takes no sounds"),
        (["text", "--enable-video"], "--enable-video: the base runs/text/best takes no clips"),
        (["base", "--enable-audio", "--enable-video"], "learns from one medium"),
        (["base", "--task", "speak"], "--task is of sounds: give --enable-audio as well"),
        (["base", "--enable-audio", "--task", "codec"], "--task"),
        (["base", "--enable-audio", "--data", "nowhere"], "no such file or folder: 'nowhere'"),
        (["base", "--enable-video", "--data", "nowhere"], "no such file or folder: 'nowhere'"),
        (["base", "--enable-audio", "--ctx", "3"], "--ctx must be at least 4"),
        (["base", "--enable-video", "--ctx", "11"], "--ctx is 11, the base was trained with 10 ids"),
        (["base", "--enable-audio", "--held-out", "0"], "held"),
        (["base", "--enable-audio", "--full", "--rank", "2"], "--rank has no effect"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(workplace, capsys, arguments, why):
    before = tree(workplace)
    assert main(["finetune", *arguments, *FEW]) == 2
    error = capsys.readouterr().err
    assert error.startswith("arbitor: error: ")
    assert error.count("\n") == 1
    assert why in error
    assert tree(workplace) == before


def test_a_resume_needs_the_same_data_and_settings(workplace, capsys, monkeypatch):
    from arbitor.finetune.loop import Finetune

    take = Finetune._take_step

    def take_and_stop(self):
        take(self)
        self.guard.received = 2

    with monkeypatch.context() as patch:
        patch.setattr(Finetune, "_take_step", take_and_stop)
        assert finetune("listen", "--steps", "4", "--run", "f") == 130
    capsys.readouterr()
    for flags, why in (
        (["--task", "speak"], "--task speak contradicts audio_task = listen"),
        (["--enable-video"], "--enable-video True contradicts video = False"),
    ):
        assert main(["finetune", "--resume", "--run", "f", *flags]) == 2
        assert why in capsys.readouterr().err
    monkeypatch.setattr("arbitor.data.audio._SYNTHETIC_COUNT", 60)
    assert main(["finetune", "--resume", "--run", "f"]) == 2
    assert "the recordings are not what they were" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "kind"), [("audio", "recordings"), ("diffusion", "clips")])
def test_a_recipe_on_embedded_data_takes_no_minute(workplace, repository, recipe, kind):
    before = os.times()
    done = subprocess.run(
        [sys.executable, repository / f"training/finetuning/{recipe}.py", "--steps", "1", "--run", "f"],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = os.times()  # of a processor, since others may be at work on this machine
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 60
    assert f"1 of 16 {kind}" in done.stdout
    assert json.loads(Path("runs/f/summary.json").read_text())["base_unchanged"] is True
