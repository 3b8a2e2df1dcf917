"""training/diffusion.py: both parts of the default run, resuming, growing, drawing, and what is refused."""

import functools
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from arbitor import video_command
from arbitor.config import load_config
from arbitor.drawing import draw
from arbitor.sidecars import vae
from arbitor.train.checkpoint import load
from arbitor.train.metrics import read_metrics
from arbitor.video_command import main
from testing.small_vae import small_autoencoder

pytest.importorskip("sklearn", reason="scikit-learn (extra `video`) is not installed")

SIZES = ["--size", "8", "--frames", "4", "--dim", "32", "--layers", "1"]
FEW = [
    *("--batch", "4", "--eval-steps", "5", "--eval-interval", "2", "--save-interval", "2", "--device", "cpu"),
]  # fmt: skip
SMALL = ["--steps", "3", *SIZES, *FEW]
FIGURES = {"codec": "pixel_error", "flow": "velocity_loss"}


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.train.video_tasks.STANDARD_CLIPS", 16)
    monkeypatch.setattr("arbitor.train.video_tasks.draw", functools.partial(draw, steps=1))


def files(run):
    folder = f"runs/{run}/latest"
    names = ("model.safetensors", "optimizer.safetensors", "state.json", "config.toml")
    return {name: open(f"{folder}/{name}", "rb").read() for name in names}


@pytest.mark.long
def test_without_a_task_the_autoencoder_is_trained_and_then_the_flow(tmp_path, capsys):
    assert main([*SMALL, "--codec-steps", "2", "--run", "clips"]) == 0
    runs = tmp_path / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["clips", "clips-codec"]
    for run, figure, steps in (("clips-codec", "pixel_error", 2), ("clips", "velocity_loss", 3)):
        summary = json.loads((runs / run / "summary.json").read_text())
        assert summary["figure"] == figure
        assert summary["steps"] == steps
        assert summary[f"held_out_{figure}"] > 0
        assert (runs / run / "loss.png").is_file()
    assert [path.name for path in (runs / "clips-codec/samples").iterdir()] == ["given-and-coded.png"]
    assert sorted(path.name for path in (runs / "clips/samples").iterdir()) == [
        *("drawn.gif", "drawn.png", "drawn.txt")
    ]
    with Image.open(runs / "clips/samples/drawn.gif") as playing:
        assert playing.n_frames == 4
    rates = [load_config(runs / run / "config.toml").train.lr for run in ("clips-codec", "clips")]
    assert rates == [0.05, 0.025]
    before, after = load("runs/clips-codec").state_dict(), load("runs/clips").state_dict()
    kept = [name for name in before if ".codec." in name and "latent_" not in name]
    assert kept
    assert all((before[name] == after[name]).all() for name in kept)
    assert (after["sidecars.video.codec.latent_std"] != 1 << 12).any()
    assert any((before[name] != after[name]).any() for name in before if name.startswith("heads.video"))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("next:")] == [
        "next: arbitor diffusion --sample TEXT --run clips"
    ]
    assert main([*SMALL, "--codec-steps", "2", "--run", "clips"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*SMALL, "--codec-steps", "2", "--run", "clips", "--reset"]) == 0


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ([], [300, 400]),
        (["--steps", "1"], [10, 1]),
        (["--steps", "29"], [290, 29]),
        (["--steps", "1000"], [300, 1000]),
        (["--steps", "1", "--codec-steps", "7"], [7, 1]),
    ],
)
def test_few_steps_are_few_of_the_autoencoder_too(given, steps, monkeypatch):
    taken = []

    def start(settings, **_):
        taken.append(settings["steps"])
        return 0

    monkeypatch.setattr("arbitor.video_command._defaults", _defaults_without_a_base)
    monkeypatch.setattr("arbitor.train.session.start_training", start)
    assert main(given) == 0
    assert taken == steps


def _defaults_without_a_base(settings, base, preset, whole=video_command._defaults):
    return whole(settings, None, preset)  # the autoencoder was not trained


@pytest.mark.long
def test_an_interrupted_autoencoder_says_how_to_come_to_the_flow(capsys, monkeypatch):
    from arbitor.cli import main as arbitor
    from arbitor.train.loop import Run

    given = [*SMALL, "--lr", "0.03", "--held-out", "0.2"]
    assert main([*given, "--run", "whole"]) == 0
    take = Run._take_step

    def take_and_stop(self):
        take(self)
        self.guard.received = 2

    for reset in ([], ["--reset"]):
        monkeypatch.setattr(Run, "_take_step", take_and_stop)
        capsys.readouterr()
        assert main([*given, "--run", "clips", *reset]) == 130
        monkeypatch.setattr(Run, "_take_step", take)
        out, note = capsys.readouterr()
        resume = out.strip().rpartition("go on with: ")[2]
        assert resume == "arbitor train --resume --run clips-codec"
        before, _, flow = note.strip().rpartition(", start it with: ")
        assert before == "arbitor: note: the flow is yet to be trained; once the autoencoder is finished" + (
            " and runs/clips is deleted" if reset else ""
        )
        if reset:
            shutil.rmtree("runs/clips")
        for command in (resume, flow):
            program, *arguments = shlex.split(command)
            assert program == "arbitor"
            assert arbitor(arguments) == 0
        assert files("clips") == files("whole")


def test_the_autoencoder_alone_says_what_is_next(capsys):
    assert main(["--task", "codec", *SMALL, "--run", "c"]) == 0
    assert "next: arbitor diffusion --task flow --base c\n" in capsys.readouterr().out


@pytest.mark.parametrize("task", FIGURES)
def test_both_tasks_resume_bit_for_bit(task, tmp_path, monkeypatch):
    from arbitor.train.loop import Run

    assert main(["--task", task, *SMALL, "--run", "whole"]) == 0
    lines = list(read_metrics(tmp_path / "runs/whole/metrics.jsonl"))
    assert [line["step"] for line in lines if f"held_out_{FIGURES[task]}" in line] == [2, 3]
    assert sum("loss" in line for line in lines) == 3
    take = Run._take_step

    def take_and_stop(self):
        take(self)
        self.guard.received = 15

    monkeypatch.setattr(Run, "_take_step", take_and_stop)
    for step in range(1, 3):
        given = ["--task", task, *SMALL] if step == 1 else ["--resume"]
        assert main([*given, "--run", "parts"]) != 0
    monkeypatch.setattr(Run, "_take_step", take)
    assert main(["--resume", "--run", "parts"]) == 0
    assert files("parts") == files("whole")
    assert main(["--resume", "--run", "parts"]) == 0  # finished: nothing to do


def test_clips_are_drawn_with_a_run(tmp_path, capsys):
    assert main(["--task", "flow", *SMALL, "--run", "f"]) == 0
    draw = ["--sample", "one", "two", "--seed", "1"]
    few = ["--count", "3", "--sample-steps", "2"]
    assert main([*draw, *few, "--out", "a.png", "--run", "f"]) == 0
    assert Image.open("a.png").size == (4 * 4 * 9, 4 * 6 * 9)
    assert main([*draw, *few, "--out", "b.png", "--sampler", "euler"]) == 0  # the newest run
    assert main([*draw, *few, "--out", "c.png", "--guidance", "2"]) == 0
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert len(set(pictures)) == 3
    assert main([*draw, *few, "--out", "d.png"]) == 0
    assert (tmp_path / "d.png").read_bytes() == pictures[0]
    capsys.readouterr()
    for wrong, why in (
        (["--out", "a.mp4"], "must end in .gif or .png"),
        (["--count", "0"], "at least 1"),
        (["--sample-steps", "0"], "at least one step"),
        (["--task", "flow"], "without training"),
        (["--guidance", "nan"], "error: --guidance is nan; it must be a finite number"),
        (["--guidance", "inf"], "error: --guidance is inf"),
        (["--seed", "99999999999999999999"], "error: --seed is 99999999999999999999; it must be from 0"),
        (["--seed", "-1"], "error: --seed is -1"),
    ):
        assert main([*draw[:3], *wrong]) == 2
        assert why in capsys.readouterr().err
        assert not (tmp_path / "out.gif").exists()
    assert main(["--resume", "--run", "f", "--size", "16"]) == 2
    assert "--size 16 contradicts the run's video_size = 8" in capsys.readouterr().err


def test_a_text_run_grows_into_one_that_draws(tmp_path, capsys):
    from arbitor import cli

    (tmp_path / "data.txt").write_text("some text to learn from, again and again\n" * 200)
    few = ["--steps", "2", "--batch", "4", "--eval-steps", "4", "--device", "cpu"]
    assert cli.main(["train", "--data", "data.txt", *few, "--run", "text"]) == 0
    assert main(["--base", "text"]) == 2
    assert capsys.readouterr().err == (
        "arbitor: error: --task flow: text has no autoencoder of clips; first train one that starts from it, "
        "with arbitor diffusion --task codec --base text, and give that run as --base\n"
    )
    assert main(["--base", "text", "--task", "codec", *SMALL, "--run", "codec"]) == 0
    assert main(["--sample", "x", "--run", "codec"]) == 2
    assert "has learnt to continue text and the autoencoder of clips, not to draw clips: " in (
        capsys.readouterr().err
    )
    assert main(["--base", "codec", "--steps", "2", "--run", "flow"]) == 0
    summary = json.loads((tmp_path / "runs/flow/summary.json").read_text())
    assert summary["figure"] == "velocity_loss"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--data", "nothing"], "no such file or folder"),
        (["--size", "10"], "no multiple of video_patch"),
        (["--dim", "40"], "multiple of 32"),
        (["--task", "sing"], "sing"),
        (["--base", "none"], "there is no run"),
        (["--sample", "x", "--run", "none"], "there is no run"),
        (["--no-save"], "checkpoint"),
        (["--reset"], "name it with --run"),
        (["--task", "codec", "--codec-steps", "3"], "leave it out"),
        (["--caption-ids", "2"], "error: --caption-ids must be"),
        (["--size", "15"], "error: --size 15 is no multiple of video_patch 4"),
        (["--frames", "7"], "error: --frames 7 is no multiple"),
        (["--task", "codec", "--layers", "0"], "error: --layers must be"),
        (["--size", "0"], "--size 0: a clip has one pixel or more"),
        (["--batch", "0"], "batch"),
        (["--steps", "0"], "got 0"),
        (["--steps", "-1"], "got -1"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(arguments, why, tmp_path, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("arbitor: error: ")
    assert why in error
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


FLOW = [*SIZES, *FEW, "--autoencoder", "ae"]


@pytest.mark.long
def test_a_frozen_autoencoder_goes_without_training_and_its_folder_is_not_needed_again(
    tmp_path, capsys, monkeypatch
):
    from arbitor import cli
    from arbitor.train.loop import Run

    small_autoencoder(tmp_path / "ae")
    assert main([*FLOW, "--steps", "2", "--run", "whole"]) == 0
    out, err = capsys.readouterr()
    assert err == "arbitor: note: --autoencoder is used as it is: only the flow is trained\n"
    assert "clips of 4 frames of 8 x 8 in 4 x 4 x 4 latents of a frozen autoencoder" in out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["whole"]
    config = load_config("runs/whole/config.toml")
    assert (config.model.video_patch, config.model.video_stride, config.data.autoencoder) == (2, 1, "ae")
    assert config.learnt == ("flow",)
    take = Run._take_step

    def take_and_stop(self):
        take(self)
        self.guard.received = 15

    monkeypatch.setattr(Run, "_take_step", take_and_stop)
    assert main([*FLOW, "--steps", "2", "--run", "parts"]) != 0
    monkeypatch.setattr(Run, "_take_step", take)
    shutil.rmtree("ae")
    assert main(["--resume", "--run", "parts", "--autoencoder", "ae"]) == 0
    assert files("parts") == files("whole")
    assert main(["--sample", "one", "--sample-steps", "1", "--count", "1", "--run", "whole"]) == 0
    assert Image.open("out.gif").n_frames == 4
    capsys.readouterr()
    assert cli.main(["audit", "whole"]) == 0
    assert "float" not in capsys.readouterr().out.replace("no float", "")
    assert main(["--base", "whole", "--steps", "1", "--run", "on"]) == 0
    before, after = load("runs/whole").state_dict(), load("runs/on").state_dict()
    kept = [name for name in before if ".codec." in name]
    assert kept
    assert all((before[name] == after[name]).all() for name in kept)
    capsys.readouterr()
    for wrong, why in (
        (["--resume", "--run", "whole", "--autoencoder", "b"], "contradicts the run's autoencoder = ae"),
        (["--base", "whole", "--autoencoder", "ae"], "has an autoencoder already; leave it out"),
        (["--base", "whole", "--task", "codec"], "--task is codec, but the autoencoder is a frozen one"),
        (["--sample", "x", "--autoencoder", "ae"], "without training"),
    ):
        assert main(wrong) == 2
        assert why in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "diffusers", None)
    vae._skeleton.cache_clear()
    assert main(["--sample", "one", "--run", "whole"]) == 2
    assert "extra autoencoder: pip install '.[autoencoder]'" in capsys.readouterr().err


@pytest.mark.long
def test_a_frozen_autoencoder_comes_to_a_run_of_text_and_into_the_mix(tmp_path, capsys):
    from arbitor import cli

    small_autoencoder(tmp_path / "ae")
    (tmp_path / "data.txt").write_text("some text to learn from, again and again\n" * 200)
    few = ["--steps", "1", "--batch", "2", "--eval-steps", "2", "--device", "cpu"]
    assert cli.main(["train", "--data", "data.txt", *few, "--run", "text"]) == 0
    assert main(["--base", "text", *FLOW, "--steps", "1", "--run", "flow"]) == 0
    assert load_config("runs/flow/config.toml").learnt == ("text", "flow")
    sizes = "video_size = 8\nvideo_frames = 4\nvideo_dim = 32\nvideo_layers = 1\n"
    weights = "text_weight = 1\nvideo_weight = 1\ntext_data = ['data.txt']\n"
    Path("mix.toml").write_text(f"[model]\n{sizes}[data]\nautoencoder = 'ae'\n[mix]\n{weights}")
    assert cli.main(["train", "--config", "mix.toml", *few, "--run", "mixed"]) == 0
    config = load_config("runs/mixed/config.toml")
    assert (config.model.video_patch, config.learnt) == (2, ("text", "flow"))
    assert "held_out_pixel_error" in json.loads((tmp_path / "runs/mixed/summary.json").read_text())
    Path("wrong.toml").write_text("[data]\nautoencoder = 'ae'\ndata = ['data.txt']\n")
    capsys.readouterr()
    assert cli.main(["train", "--config", "wrong.toml", *few, "--run", "none"]) == 0
    assert "note: autoencoder ae has no effect: the model takes no clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "given", "why"),
    [
        ({"latent_channels": 4}, [], "error: --autoencoder ae has latents of 4 channels; they must be 16"),
        ({}, ["--autoencoder", "nowhere"], "error: --autoencoder nowhere: no such folder"),
        ({}, ["--patch", "4"], "error: --patch is 4; that of the frozen autoencoder is 2"),
        ({}, ["--stride", "2"], "error: --stride is 2; that of the frozen autoencoder is 1"),
        ({}, ["--task", "codec"], "give one of them"),
        ({}, ["--codec-steps", "2"], "leave it out"),
        ({"in_channels": 1, "out_channels": 1}, ["--channels", "3"], "error: --channels is 3; the frozen"),
        (None, [], "error: ae holds no diffusion_pytorch_model.safetensors"),
    ],
)
def test_autoencoders_that_cannot_be_used_leave_nothing(changes, given, why, tmp_path, capsys):
    small_autoencoder(tmp_path / "ae", **(changes or {}))
    if changes is None:
        (tmp_path / "ae/diffusion_pytorch_model.safetensors").unlink()
    flow = SIZES if "--autoencoder" in given else FLOW
    assert main([*flow, "--steps", "1", *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert why in error
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_without_diffusers_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main([*FLOW, "--steps", "1"]) == 2
    assert "extra autoencoder: pip install '.[autoencoder]'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
