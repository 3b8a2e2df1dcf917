"""`training/pretrain.py`: what its flags do, from the command line to the files of a run."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arbitor.cli import main as arbitor_main
from arbitor.config import MIXED, load_config
from arbitor.data.mixed import open_mix
from arbitor.drawing import draw
from arbitor.pretrain_command import main
from arbitor.ternary.audit import audit_checkpoint
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.metrics import read_metrics
from testing.small_run import MODEL, one_thread  # noqa: F401 - a fixture that runs by itself

REPOSITORY = Path(__file__).parents[1]
TOML = "[model]\n" + "".join(f"{name} = {value}\n" for name, value in MODEL.items()) + "ctx = 16\n"
TOML += "audio_dim = 16\naudio_layers = 1\nvideo_dim = 32\nvideo_layers = 1\n"
FEW = [
    *("--batch", "4", "--eval-steps", "2", "--eval-interval", "3", "--save-interval", "3"),
    *("--device", "cpu"),
]  # fmt: skip
SOUNDS, CLIPS = ["--audio-seconds", "0.1"], ["--video-size", "8", "--video-frames", "2"]
MEDIA = [*SOUNDS, *CLIPS]
NEW = ["--config", "small.toml", "--text-data", "text.txt", "--code-data", "code.txt"]
TEXT_ONLY = ["--code-weight", "0", "--image-weight", "0", "--audio-weight", "0", "--video-weight", "0"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.data.audio._SYNTHETIC_COUNT", 30)
    monkeypatch.setattr("arbitor.train.mix.SHOWN_BYTES", 8)
    monkeypatch.setattr("arbitor.train.video_tasks.STANDARD_CLIPS", 32)
    monkeypatch.setattr("arbitor.train.loop.LAST_WINDOWS_PER_TRAINED", 1)
    monkeypatch.setattr("arbitor.train.video_tasks.draw", functools.partial(draw, steps=1))
    (tmp_path / "small.toml").write_text(TOML)
    (tmp_path / "text.txt").write_text("".join(f"a sentence of number {n}. " for n in range(300)))
    (tmp_path / "code.txt").write_text("".join(f"x_{n} = f({n})\n" for n in range(300)))
    return tmp_path


def files(run):
    folder = Path("runs", run, "latest")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state_of(run):
    return json.loads(Path("runs", run, "latest", "state.json").read_text())


def test_a_run_on_all_modalities_leaves_their_figures(workplace, capsys):
    assert main([*NEW, *FEW, *MEDIA, "--steps", "6", "--accum", "6", "--run", "all"]) == 0
    out = capsys.readouterr().out
    names = ("text", "code", "image", "audio", "video")
    summary = json.loads((workplace / "runs/all/summary.json").read_text())
    for name in names:
        assert summary[f"held_out_{name}"] > 0
        assert 0 <= summary[f"held_out_router_{name}"] <= 1
        beside, told = ("gaussian", "a Gaussian") if name == "video" else ("unigram", "unigrams")
        figure, baseline = summary[f"held_out_{name}"], summary[f"{beside}_{name}"]
        assert baseline > 0
        unit = {"audio": "bits per code", "video": "of velocity loss"}.get(name, "bits per byte")
        assert f"{figure:.4f} {unit}, {told} {baseline:.4f}; router right at" in out
    assert 0 < summary["pixel_error_of_mean"] < summary["held_out_pixel_error"]  # of an autoencoder so young
    lines = list(read_metrics(workplace / "runs/all/metrics.jsonl"))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    seen = {key for line in steps for key in line}
    assert {f"loss_{name}" for name in names} <= seen
    assert {f"router_accuracy_{name}" for name in names} <= seen
    measured = [line for line in lines if "held_out_mixed" in line]
    assert [line["step"] for line in measured] == [3, 6]
    assert all({f"held_out_{name}" for name in names} <= line.keys() for line in measured)
    assert set(state_of("all")["sampler"]["parts"]) == {*names}
    for checkpoint in ("latest", "best", "final"):
        assert audit_checkpoint(workplace / "runs/all" / checkpoint).ok
    assert (workplace / "runs/all/loss.png").is_file()
    assert list((workplace / "runs/all/samples").glob("*.wav"))
    assert (workplace / "runs/all/samples/drawn.gif").is_file()
    assert "[text]" in (workplace / "runs/all/sample.txt").read_text(encoding="utf-8")


def test_only_the_sidecars_of_what_is_drawn_are_built(capsys):
    for weights, more, wanted in (
        (TEXT_ONLY, [], {"router"}),
        (["--audio-weight", "0", "--video-weight", "0"], [], {"router", "image"}),
        (["--image-weight", "0", "--video-weight", "0"], SOUNDS, {"router", "audio"}),
        (["--image-weight", "0", "--audio-weight", "0"], CLIPS, {"router", "video"}),
    ):
        run = "-".join(sorted(wanted))
        data = NEW if weights is not TEXT_ONLY else NEW[:-2]
        assert main([*data, *FEW, *more, *weights, "--steps", "1", "--run", run]) == 0
        names = load_checkpoint(Path("runs", run, "latest")).weights
        sidecars = {name.split(".")[1] for name in names if name.startswith("sidecars.")}
        heads = {name.split(".")[1] for name in names if name.startswith("heads.")}
        assert heads == sidecars - {"image"}
        assert f"next: arbitor generate {run}" in capsys.readouterr().out
        found = sidecars
        assert found | {"router"} == wanted
        assert any(name.startswith("router.") for name in names)


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--accum", "2"], ["--preserve-state"]])
def test_a_run_that_is_stopped_at_every_step_equals_one_that_is_not(more, monkeypatch):
    from arbitor.train.loop import Run

    given = [*NEW, *FEW, *MEDIA, *more, "--steps", "5", "--video-weight", "3"]
    assert main([*given, "--run", "whole"]) == 0
    take = Run._take_step

    def take_and_stop(self):
        take(self)
        self.guard.received = 15

    monkeypatch.setattr(Run, "_take_step", take_and_stop)
    for step in range(1, 5):
        assert main([*(given if step == 1 else ["--resume"]), "--run", "parts"]) != 0
    monkeypatch.setattr(Run, "_take_step", take)
    assert main(["--resume", "--run", "parts"]) == 0
    assert files("parts") == files("whole")
    losses = [
        [line["loss"] for line in read_metrics(Path("runs", run, "metrics.jsonl")) if "loss" in line]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert main(["--resume", "--run", "parts"]) == 0  # finished: nothing to do
    assert arbitor_main(["train", "--resume", "--run", "parts"]) == 0  # the same command line as any run's


def test_a_text_run_grows_by_all_media_and_names_them(capsys):
    assert main([*NEW[:-2], *FEW, *TEXT_ONLY, "--steps", "2", "--run", "text"]) == 0
    capsys.readouterr()
    grown = [
        "--resume",
        "--run",
        "text",
        "--image-weight",
        "1",
        "--audio-weight",
        "2",
        *("--video-weight", "1"),
        *MEDIA,
    ]
    assert main([*grown, "--text-data", "text.txt", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    added = next(line for line in out.splitlines() if line.startswith("added"))
    assert "sidecars.image.embed" in added
    assert "sidecars.audio.codec.enter" in added
    assert "heads.audio.tables.0" in added
    assert "sidecars.video.codec.enter" in added
    assert "heads.video.blocks.0.qkv" in added
    assert "left out: nothing" in out
    assert "training state taken over: all of it" in out
    parts = state_of("tiny-1")["sampler"]["parts"]
    assert set(parts) == {"text", "image", "audio", "video"}
    before, after = (load_checkpoint(Path("runs", run, "latest")).weights for run in ("text", "tiny-1"))
    assert before.keys() < after.keys()
    assert state_of("text")["step"] == 2  # as it was


def test_a_config_file_says_weights_and_sizes_of_media(workplace):
    own = "image_size = 12\nimage_patch = 6\nimage_channels = 3\naudio_rate = 2000\naudio_samples = 300\n"
    own += "video_size = 8\nvideo_frames = 2\nvideo_ids = 12\n"
    mix = "[mix]\ntext_weight = 2\ncode_weight = 0.0\nvideo_weight = 3\n"
    (workplace / "own.toml").write_text(TOML + own + mix)
    given = ["--config", "own.toml", "--text-data", "text.txt", *FEW, "--steps", "1"]
    assert main([*given, "--run", "own"]) == 0
    config = load_config("runs/own/config.toml")
    assert [config.mix.weight(name) for name in MIXED] == [2, 0, 1, 1, 3]
    model = config.model
    assert (model.image_size, model.image_patch, model.image_channels) == (12, 6, 3)
    assert (model.audio_rate, model.audio_samples) == (2000, 300)
    assert (model.video_size, model.video_frames, model.video_ids) == (8, 2, 12)
    flags = ["--video-weight", "0", "--image-size", "6", "--audio-seconds", "0.1"]
    assert main([*given, *flags, "--run", "flags"]) == 0
    config = load_config("runs/flags/config.toml")
    assert [config.mix.weight(name) for name in MIXED] == [2, 0, 1, 1, 0]
    assert (config.model.image_size, config.model.image_patch) == (6, 6)
    assert (config.model.audio_rate, config.model.audio_samples) == (2000, 200)
    assert config.model.video_size == 0  # what is not drawn is not built
    # The settings of a whole run are a config file as well.
    few = ["--steps", "1", "--device", "cpu"]
    assert main(["--config", "runs/flags/config.toml", *few, "--run", "again"]) == 0
    again = load_config("runs/again/config.toml")
    assert (again.model, again.mix) == (config.model, config.mix)


def test_the_settings_of_a_run_that_is_not_mixed_say_nothing_of_the_mix(workplace):
    train = ["train", "--config", "small.toml", "--data", "text.txt", "--steps", "1", "--batch", "4"]
    assert arbitor_main([*train, "--device", "cpu", "--run", "plain"]) == 0
    assert main(["--config", "runs/plain/config.toml", *NEW[2:], *FEW, *MEDIA, "--run", "mixed"]) == 0
    config = load_config("runs/mixed/config.toml")
    assert [config.mix.weight(name) for name in MIXED] == [4, 4, 1, 1, 1]
    assert (config.model.image_size, config.model.image_patch, config.model.audio_rate) == (8, 4, 8000)


def test_a_mixed_run_that_grows_keeps_what_it_held_out(workplace):
    lines = [json.dumps({"body": f"a sentence of number {n}. "}) for n in range(300)]
    (workplace / "text.jsonl").write_text("\n".join(lines))
    given = ["--config", "small.toml", "--text-data", "text.jsonl", "--field", "body", "--held-out", "0.3"]
    assert main([*given, *FEW, *TEXT_ONLY, "--steps", "1", "--run", "text"]) == 0
    assert main(["--resume", "--run", "text", "--image-weight", "1", "--steps", "1"]) == 0
    grown = load_config("runs/tiny-1/config.toml")
    assert (grown.mix.text_data, grown.data.held_out, grown.data.field) == (("text.jsonl",), "0.3", "body")
    corpora = [open_mix(load_config(f"runs/{run}/config.toml")) for run in ("text", "tiny-1")]
    before, after = (corpus.parts["text"].held_out.as_array().tobytes() for corpus in corpora)
    assert before == after
    grow = ["--resume", "--run", "text", "--image-weight", "1", "--steps", "1"]
    assert main([*grow, "--held-out", "0.2"]) == 0
    assert load_config("runs/tiny-2/config.toml").data.held_out == "0.2"
    # A run of other data begins anew.
    train = ["train", *("--data" if word == "--text-data" else word for word in given), "--steps", "1"]
    assert arbitor_main([*train, "--batch", "4", "--device", "cpu", "--run", "plain"]) == 0
    assert main(["--base", "plain", "--steps", "1", *TEXT_ONLY, "--run", "x"]) == 0
    config = load_config("runs/x/config.toml")
    assert (config.data.held_out, config.data.field) == (None, "text")


def test_a_run_that_is_not_mixed_grows_by_what_is_asked_for_alone(workplace, capsys):
    train = ["train", "--config", "small.toml", "--data", "text.txt", "--steps", "1", "--batch", "4"]
    assert arbitor_main([*train, "--device", "cpu", "--run", "plain"]) == 0
    for given in ([], ["--text-weight", "1"], ["--steps", "9"]):
        capsys.readouterr()
        assert main(["--resume", "--run", "plain", *given]) == 2
        assert capsys.readouterr().err == (
            "arbitor: error: the run 'plain' is not mixed, and no weight asks for a part that it has not: "
            "give one, such as --image-weight 1, or go on with it by: arbitor train --resume --run plain\n"
        )
        assert [path.name for path in (workplace / "runs").iterdir()] == ["plain"]
    data = ["--text-data", "text.txt", "--code-data", "code.txt"]
    assert main(["--resume", "--run", "plain", "--image-weight", "2", *data, "--steps", "1"]) == 0
    config = load_config("runs/tiny-1/config.toml")
    assert [config.mix.weight(name) for name in MIXED] == [4, 4, 2, 0, 0]
    assert (config.model.audio_rate, config.model.video_size) == (0, 0)


def test_the_field_is_that_of_captions_as_well(workplace, capsys):
    from PIL import Image

    folder = workplace / "photos"
    folder.mkdir()
    for number in range(10):
        Image.new("L", (8, 8), 20 * number).save(folder / f"{number}.png")
    lines = [{"image": f"{n}.png", "text": "this", "body": f"the other {n}"} for n in range(10)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    weights = ["--text-weight", "0", *TEXT_ONLY[:2], *TEXT_ONLY[4:], "--image-size", "16"]
    given = ["--config", "small.toml", "--image-data", "photos", *FEW, *weights, "--steps", "1"]
    assert main([*given, "--field", "body", "--run", "r"]) == 0
    held_out = open_mix(load_config("runs/r/config.toml")).parts["image"].held_out
    assert held_out.captions == [b"the other 9"]
    assert main([*given, "--field", "nothing"]) == 2
    assert "no text in the field 'nothing'" in capsys.readouterr().err


def test_a_run_of_arbitor_train_is_a_base_and_its_codec_stays(tmp_path):
    from arbitor.audio_command import main as audio_main

    small = ["--ctx", "200", "--rate", "2000", "--codec-dim", "16", "--codec-layers", "1"]
    assert audio_main([*small, "--steps", "1", "--batch", "2", "--device", "cpu", "--run", "codec"]) == 0
    given = [
        *NEW[2:],
        *FEW,
        *SOUNDS,
        *("--steps", "4", "--text-weight", "0", "--code-weight", "0", "--image-weight", "0"),
        *("--video-weight", "0"),
    ]
    given = [
        flag for flag in given if not flag.endswith(".txt") and flag not in ("--text-data", "--code-data")
    ]
    assert main(["--base", "codec", *given, "--run", "mixed"]) == 0
    before, after = (load_checkpoint(Path("runs", run, "latest")).weights for run in ("codec", "mixed"))
    codec = [name for name in before if ".codec." in name]
    assert codec
    assert all((before[name] == after[name]).all() for name in codec)
    assert any((before[name] != after[name]).any() for name in before if name.startswith("heads.audio"))


def test_a_mixed_run_is_the_base_of_one_that_is_not_mixed(capsys):
    from arbitor.audio_command import main as audio_main

    assert main([*NEW, *FEW, *MEDIA, "--steps", "1", "--run", "mixed"]) == 0
    capsys.readouterr()
    assert audio_main(["--base", "mixed", "--task", "listen", "--steps", "1", "--run", "listens"]) == 0
    assert "drawn" in state_of("listens")["sampler"]
    assert "parts" not in state_of("listens")["sampler"]


def test_an_autoencoder_of_a_base_stays_and_the_flow_learns(capsys):
    from arbitor.video_command import main as video_main

    small = ["--size", "8", "--frames", "2", "--dim", "32", "--layers", "1", "--device", "cpu"]
    assert video_main(["--task", "codec", *small, "--steps", "1", "--batch", "2", "--run", "codec"]) == 0
    weights = ["--code-weight", "0", "--image-weight", "0", "--audio-weight", "0", "--text-weight", "0"]
    assert main(["--base", "codec", *FEW, *weights, "--steps", "4", "--run", "mixed"]) == 0
    assert "next: arbitor diffusion --sample TEXT --run mixed" in capsys.readouterr().out
    before, after = (load_checkpoint(Path("runs", run, "latest")).weights for run in ("codec", "mixed"))
    codec = [name for name in before if ".codec." in name and "latent_" not in name]
    assert codec
    assert all((before[name] == after[name]).all() for name in codec)
    assert (after["sidecars.video.codec.latent_std"] != 1 << 12).any()
    assert any((before[name] != after[name]).any() for name in before if name.startswith("heads.video"))
    assert any(name.startswith("router.") for name in after)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--text-weight", "-1"], "--text-weight must be 0 or a number above, got -1"),
        (["--audio-weight", "nan"], "--audio-weight must be 0 or a number above"),
        (["--code-weight", "inf"], "--code-weight must be 0 or a number above"),
        (["--text-weight", "0", *TEXT_ONLY], "all weights are 0"),
        (["--video-weight", "-1"], "--video-weight must be 0 or a number above"),
        (["--code-weight", "0"], "--code-data is given and --code-weight is 0"),
        (["--image-weight", "0", "--image-size", "8"], "--image-size is for images"),
        (["--image-weight", "0", "--image-encoder", "x"], "--image-encoder is for images"),
        (["--image-encoder", "nowhere"], "--image-encoder"),
        (["--audio-weight", "0"], "--audio-seconds is for sounds"),
        (["--video-weight", "0"], "--video-size is for videos"),
        (
            ["--enable-audio", "--audio-weight", "0"],
            "--enable-audio asks for sounds and --audio-weight 0 for none",
        ),
        (
            ["--enable-image", "--image-weight", "0"],
            "--enable-vision asks for images and --image-weight 0 for",
        ),
        (
            ["--enable-vision", "--image-size", "0"],
            "--enable-vision asks for images and --image-size 0 for none",
        ),
        (["--video-size", "0"], "--video-size 0: a clip has one pixel or more"),
        (["--video-size", "9"], "--video-size 9 is no multiple of video_patch 4"),
        (["--video-size", "4"], "--video-data: the built-in digits have 8 pixels a side, clips only 4"),
        (["--video-data", "nowhere"], "--video-data: no such file or folder: 'nowhere'"),
        (["--held-out", "text.txt"], "--held-out must be a share"),
        (["--held-out", "1"], "--held-out must be a share"),
        (["--image-data", "nowhere"], "--image-data: no such file or folder: 'nowhere'"),
        (["--audio-data", "nowhere"], "no such file or folder: 'nowhere'"),
        (["--resume", "--base", "x"], "give one of them"),
        (["--base", "none"], "there is no run"),
        (["--text-wieght", "1"], "--text-wieght"),
        (["--batch", "0"], "--batch"),
        (["--text-weight", "1e-9"], "--text-weight must be 0 or at least 1e-6"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(arguments, why, workplace, capsys):
    clips = [] if "--video-size" in arguments else CLIPS
    assert main([*NEW, *FEW, *SOUNDS, *clips, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("arbitor: error: ")
    assert why in error
    assert not (workplace / "runs").exists() or not list((workplace / "runs").iterdir())


@pytest.fixture
def settings_of(monkeypatch):
    """settings_of(main, arguments): the settings that a run would be started with."""
    started = []

    def keep(settings, **_):
        started.append(settings)
        return 0

    def of(command, arguments):
        monkeypatch.setattr("arbitor.train.session.start_training", keep)
        assert command(arguments) == 0
        monkeypatch.undo()
        return started.pop()

    return of


def weights_in(settings):
    return [settings[f"{name}_weight"] for name in MIXED]


@pytest.mark.parametrize("flag", ["--enable-vision", "--enable-image"])
def test_a_medium_that_is_enabled_has_its_usual_weight(flag, workplace, settings_of):
    (workplace / "mix.toml").write_text("[mix]\ntext_weight = 2\nimage_weight = 0\naudio_weight = 3\n")
    given = ["--config", str(workplace / "mix.toml")]
    assert weights_in(settings_of(main, given)) == [2, 4, 0, 3, 1]
    enabled = settings_of(main, [*given, flag, "--enable-audio"])
    assert weights_in(enabled) == [2, 4, 1, 3, 1]
    assert (enabled["image_size"], enabled["audio_rate"]) == (8, 8000)
    assert weights_in(settings_of(main, [flag])) == [4, 4, 1, 1, 1]
    assert weights_in(settings_of(main, [flag, "--image-weight", "5"])) == [4, 4, 5, 1, 1]


def test_a_run_grows_by_a_medium_that_is_enabled(workplace):
    assert main([*NEW[:4], *FEW, *TEXT_ONLY, "--steps", "1", "--run", "text"]) == 0
    assert main(["--resume", "--run", "text", "--enable-vision", "--steps", "1"]) == 0
    config = load_config("runs/tiny-1/config.toml")
    assert [config.mix.weight(name) for name in MIXED] == [4, 0, 1, 0, 0]


SEVERAL = ["train", "--enable-vision", "--enable-audio"]
MIXES = "arbitor: note: --enable-vision and --enable-audio train one model on a mix, with the weights "


def test_several_media_of_arbitor_train_are_a_mix(workplace, settings_of, capsys):
    flags = ["--steps", "7", "--ctx", "16", "--enable-memory", "--accum-threshold", "20", "--image-size", "4"]
    settings = settings_of(arbitor_main, [*SEVERAL, *flags, "--no-save", "--no-augment"])
    assert capsys.readouterr().err == f"{MIXES}text 4, image 1, audio 1; `arbitor pretrain` takes others\n"
    pretrain = ["--enable-vision", "--enable-audio", "--code-weight", "0", "--video-weight", "0", *flags]
    assert settings == settings_of(main, [*pretrain, "--no-save", "--no-augment"])
    assert (settings["steps"], settings["save"], settings["augment"]) == (7, False, False)
    assert settings["memory_rows"] > 0
    assert weights_in(settings) == [4, 0, 1, 1, 0]
    (workplace / "mix.toml").write_text("[mix]\ntext_weight = 2\nvideo_weight = 3\nimage_weight = 0\n")
    settings = settings_of(arbitor_main, [*SEVERAL, "--config", str(workplace / "mix.toml"), "--field", "x"])
    assert weights_in(settings) == [2, 0, 1, 1, 3]
    assert capsys.readouterr().err.splitlines()[-1] == (
        "arbitor: note: --field x has no effect: no .jsonl file is among the data"
    )


def test_several_media_of_arbitor_train_go_on_and_grow(workplace, capsys):
    (workplace / "mix.toml").write_text(f"{TOML}audio_samples = 800\n[mix]\ntext_data = 'text.txt'\n")
    assert arbitor_main([*SEVERAL, "--config", "mix.toml", *FEW, "--steps", "1", "--run", "mixed"]) == 0
    assert f"{MIXES}text 4, image 1, audio 1" in capsys.readouterr().err
    assert set(state_of("mixed")["sampler"]["parts"]) == {"text", "image", "audio"}
    assert arbitor_main([*SEVERAL, "--resume", "--run", "mixed", "--steps", "2"]) == 0
    assert state_of("mixed")["step"] == 2
    train = ["train", "--config", "small.toml", *FEW, "--steps", "1"]
    assert arbitor_main([*train, "--data", "text.txt", "--run", "plain"]) == 0
    capsys.readouterr()
    for given, data in (
        (["--resume", "--run", "plain"], "its data"),
        (["--config", "runs/plain/config.toml"], "data of the config file"),
        (["--resume", "--run", "mixed", "--data", "text.txt"], "--data"),
        (["--data", "text.txt"], "--data"),
    ):
        assert arbitor_main([*SEVERAL, *given]) == 2
        assert capsys.readouterr().err == (
            "arbitor: error: --enable-vision and --enable-audio: text and media are drawn by turns, each "
            f"from data of its own, which {data} cannot tell apart; `arbitor pretrain` takes --text-data, "
            "--image-data, --audio-data\n"
        )
    assert arbitor_main([*train, "--enable-vision", "--run", "sees"]) == 0
    assert arbitor_main([*SEVERAL, "--resume", "--run", "sees", "--steps", "1"]) == 0
    assert [load_config("runs/tiny-1/config.toml").mix.weight(name) for name in MIXED] == [4, 0, 1, 1, 0]
    assert arbitor_main(["train", "--resume", "--run", "sees", "--enable-audio", "--steps", "1"]) == 0
    capsys.readouterr()
    assert arbitor_main([*SEVERAL, "--resume", "--run", "tiny-2"]) == 2
    assert capsys.readouterr().err == (
        "arbitor: error: --enable-vision and --enable-audio: the run 'tiny-2' has these parts and is not "
        "mixed; a mixed run that starts from it is made by: arbitor pretrain --base tiny-2 --code-weight 0 "
        "--video-weight 0\n"
    )


def test_a_state_that_nothing_would_keep_is_refused(capsys):
    assert main(["--text-weight", "0", "--code-weight", "0", "--preserve-state"]) == 2
    assert "--preserve-state is for text and code" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9"])
def test_sounds_of_no_length_are_refused(seconds, capsys):
    assert main(["--audio-seconds", seconds]) == 2
    assert "--audio-seconds must be between 0.05 and 3600" in capsys.readouterr().err


def test_a_modality_without_a_part_is_refused(capsys, monkeypatch):
    from arbitor.data import mixed

    monkeypatch.setattr(mixed, "OPENERS", {n: o for n, o in mixed.OPENERS.items() if n != "video"})
    assert main([*NEW, *FEW, *MEDIA, "--video-weight", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines() == [
        "arbitor: error: --video-weight 1: this version cannot mix video; leave it out (it mixes text, code, "
        "image, audio)"
    ]


def test_other_weights_than_those_of_a_run_contradict_it(capsys):
    assert main([*NEW, *FEW, *MEDIA, "--steps", "1", "--run", "r"]) == 0
    assert main(["--resume", "--run", "r", "--text-weight", "2"]) == 2
    assert "--text-weight 2.0 contradicts the run's text_weight = 4.0" in capsys.readouterr().err
    assert main(["--resume", "--run", "r", "--preserve-state"]) == 2
    assert "--preserve-state contradicts" in capsys.readouterr().err
    assert main(["--resume", "--run", "r", "--audio-seconds", "0.2"]) == 2
    assert "--audio-seconds 0.2 contradicts the run's 0.1; leave it out" in capsys.readouterr().err
    assert main(["--resume", "--run", "r", "--audio-seconds", "0.1"]) == 0


def test_data_that_changed_is_refused_by_name(workplace, capsys):
    assert main([*NEW, *FEW, *MEDIA, "--steps", "1", "--run", "r"]) == 0
    with open(workplace / "code.txt", "a") as file:
        file.write("more = 1\n" * 50)
    assert main(["--resume", "--run", "r", "--steps", "2"]) == 2
    assert "code: the training data is not what it was" in capsys.readouterr().err


@pytest.mark.long
def test_a_step_on_embedded_data_takes_no_minute(workplace):
    before = os.times()
    done = subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "training" / "pretrain.py")),
            *("--steps", "1", "--eval-steps", "2", "--device", "cpu", "--run", "embedded"),
        ],
        env={"PATH": "", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HOME": str(workplace)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = os.times()  # of a processor, since others may be at work on this machine
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 60
    for name in (
        "docstrings of Python's standard library",
        "handwritten digits",
        "synthesised tones",
        "moving digits",
    ):
        assert name in done.stdout
    summary = json.loads((workplace / "runs/embedded/summary.json").read_text())
    assert summary["steps"] == 1
