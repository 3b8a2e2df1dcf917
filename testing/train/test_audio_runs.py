import json
import sys
import wave

import numpy as np
import pytest

from arbitor.audio_command import main
from arbitor.data.waves import write_recording
from arbitor.train.metrics import read_metrics

SMALL = [
    *("--steps", "3", "--batch", "4", "--ctx", "1000", "--rate", "2000", "--codec-dim", "16"),
    *("--codec-layers", "1", "--eval-steps", "5", "--eval-interval", "2", "--save-interval", "2"),
    *("--device", "cpu"),
]  # fmt: skip
SMALL_CODEC = ["--steps", "1", "--ctx", "1000", "--codec-dim", "16", "--codec-layers", "1", "--batch", "2"]
FIGURES = {"codec": "log_mel_distance", "listen": "bits_per_byte", "speak": "bits_per_code"}


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.data.audio._SYNTHETIC_COUNT", 30)


def files(run):
    folder = f"runs/{run}/latest"
    names = ("model.safetensors", "optimizer.safetensors", "state.json", "config.toml")
    return {name: open(f"{folder}/{name}", "rb").read() for name in names}


@pytest.mark.parametrize("task", FIGURES)
def test_every_task_runs_on_the_embedded_sounds_and_resumes_bit_for_bit(task, tmp_path, monkeypatch):
    assert main(["--task", task, *SMALL, "--run", "whole"]) == 0
    lines = list(read_metrics(tmp_path / "runs/whole/metrics.jsonl"))
    held_out = [line for line in lines if f"held_out_{FIGURES[task]}" in line]
    assert [line["step"] for line in held_out] == [2, 3]
    assert sum("loss" in line for line in lines) == 3
    summary = json.loads((tmp_path / "runs/whole/summary.json").read_text())
    assert summary[f"held_out_{FIGURES[task]}"] > 0
    assert (tmp_path / "runs/whole/loss.png").is_file()

    def stop(run):
        run.guard.received = 15

    from arbitor.train.loop import Run

    take = Run._take_step

    def take_and_stop(self):
        take(self)
        stop(self)

    monkeypatch.setattr(Run, "_take_step", take_and_stop)
    for step in range(1, 3):
        given = ["--task", task, *SMALL] if step == 1 else ["--resume"]
        assert main([*given, "--run", "parts"]) != 0
    monkeypatch.setattr(Run, "_take_step", take)
    assert main(["--resume", "--run", "parts"]) == 0
    assert files("parts") == files("whole")
    assert main(["--resume", "--run", "parts"]) == 0  # finished: nothing to do


def test_the_codec_is_measured_against_the_median(tmp_path):
    assert main([*SMALL, "--run", "c"]) == 0
    summary = json.loads((tmp_path / "runs/c/summary.json").read_text())
    share = summary["held_out_log_mel_distance"] / summary["log_mel_distance_of_median"]
    assert summary["share_of_median"] == pytest.approx(share)
    assert sorted(p.name for p in (tmp_path / "runs/c/samples").iterdir())[:2] == [
        "0-coded.wav",
        "0-given.wav",
    ]


@pytest.mark.parametrize("size", [1, 3000], ids=["single samples", "silence"])
@pytest.mark.parametrize("task", FIGURES)
def test_recordings_without_a_sound_end_no_run(task, size, tmp_path):
    for number in range(12):
        write_recording(tmp_path / f"{number}_x.wav", np.zeros(size, np.float32), 2000)
    assert main(["--task", task, "--data", str(tmp_path), *SMALL, "--run", "silent"]) == 0
    summary = json.loads((tmp_path / "runs/silent/summary.json").read_text())
    assert np.isfinite(summary[f"held_out_{FIGURES[task]}"])


def test_listening_and_speaking_keep_the_codec_of_their_base(tmp_path):
    from arbitor.train.checkpoint import load

    assert main([*SMALL, "--run", "codec"]) == 0
    assert main(["--task", "listen", "--base", "codec", "--steps", "2", "--run", "listen"]) == 0
    assert main(["--task", "speak", "--base", "listen", "--steps", "2", "--run", "speak"]) == 0
    runs = [load(run).state_dict() for run in ("codec", "listen", "speak")]  # the best, as --base takes
    codec = [name for name in runs[0] if ".codec." in name]
    assert codec
    assert all((run[name] == runs[0][name]).all() for run in runs[1:] for name in codec)
    assert any((runs[2][name] != runs[1][name]).any() for name in runs[0] if name.startswith("heads.audio"))
    assert len(list((tmp_path / "runs/speak/samples").iterdir())) == 6


def test_the_choice_to_equalise_is_kept_by_the_run_and_those_that_start_from_it(tmp_path, capsys):
    from arbitor.config import load_config
    from arbitor.train.checkpoint import load

    assert main([*SMALL, "--run", "codec"]) == 0
    listen = ["--task", "listen", "--steps", "2"]
    assert main([*listen, "--base", "codec", "--run", "even"]) == 0
    assert main([*listen, "--base", "codec", "--no-equalise", "--run", "raw"]) == 0
    assert main([*listen, "--base", "raw", "--run", "raw-again"]) == 0
    assert main([*listen, "--base", "raw", "--equalise", "--run", "even-again"]) == 0
    for run, equalise in (("even", True), ("raw", False), ("raw-again", False), ("even-again", True)):
        assert load_config(f"runs/{run}/config.toml").model.audio_equalise is equalise
        assert load(run).sidecars["audio"].equalise is equalise
    write_recording("in.wav", np.zeros(2000, np.float32), 8000)
    assert main(["--hear", "in.wav", "--run", "raw"]) == 0
    assert main(["--resume", "--run", "raw", "--no-equalise", "--steps", "3"]) == 0
    assert load("raw").sidecars["audio"].equalise is False
    capsys.readouterr()
    for run, flag, own in (("raw", "--equalise", False), ("even", "--no-equalise", True)):
        assert main(["--resume", "--run", run, flag]) == 2
        assert f"{flag} contradicts the run's audio_equalise = {own}" in capsys.readouterr().err


def test_a_run_from_before_there_was_a_choice_equalises(tmp_path):
    from arbitor.config import load_config
    from arbitor.train.checkpoint import load
    from arbitor.train.tensorfile import read_tensors, write_tensors

    assert main(["--task", "listen", "--no-equalise", *SMALL, "--run", "l"]) == 0
    weights, header = read_tensors(tmp_path / "runs/l/final/model.safetensors", "model")
    assert header["config"].pop("audio_equalise") is False
    write_tensors(tmp_path / "model.safetensors", "model", weights, config=header["config"])
    assert load(tmp_path / "model.safetensors").sidecars["audio"].equalise
    toml = (tmp_path / "runs/l/config.toml").read_text()
    (tmp_path / "earlier.toml").write_text(toml.replace("audio_equalise = false\n", ""))
    assert "audio_equalise" not in (tmp_path / "earlier.toml").read_text()
    assert load_config(tmp_path / "earlier.toml").model.audio_equalise


def test_wav_files_by_one_command(tmp_path, capsys):
    assert main([*SMALL, "--run", "c"]) == 0
    write_recording("in.wav", 0.1 * np.random.default_rng(0).normal(size=3000).astype(np.float32), 8000)
    assert main(["--reconstruct", "in.wav", "--out", "back.wav"]) == 0
    with wave.open("back.wav") as file:
        assert (file.getframerate(), file.getnframes()) == (2000, 750)
    assert main(["--task", "speak", "--base", "c", "--steps", "2", "--run", "s"]) == 0
    assert main(["--say", "seven", "--out", "seven.wav", "--temperature", "0"]) == 0
    with wave.open("seven.wav") as file:
        assert file.getframerate() == 2000
        assert file.getnframes() <= 1000
    assert main(["--task", "listen", "--base", "c", "--steps", "2", "--run", "l"]) == 0
    capsys.readouterr()
    assert main(["--hear", "in.wav"]) == 0
    done = capsys.readouterr()
    assert done.out.count("\n") == 1
    assert not done.err
    assert main(["--hear", "in.wav", "--run", "s"]) == 2
    assert "runs/s/best has learnt the codec of sounds and to speak, not to listen: the run 'l' has" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(("what", "task"), [("--say", "speak"), ("--hear", "listen")])
def test_a_run_of_the_codec_alone_neither_speaks_nor_listens(what, task, tmp_path, capsys):
    assert main([*SMALL, "--run", "c"]) == 0
    write_recording("in.wav", np.zeros(2000, np.float32), 8000)
    for run in ([], ["--run", "c"], ["--run", "runs/c/latest"]):
        capsys.readouterr()
        assert main([what, "in.wav", "--out", "out.wav", *run]) == 2
        done = capsys.readouterr()
        assert not done.out
        folder = "runs/c/latest" if "runs/c/latest" in run else "runs/c/best"
        name = folder if folder.endswith("latest") else "c"
        assert done.err == (
            f"arbitor: error: {folder} has learnt the codec of sounds, not to {task}: "
            f"`arbitor audio --task {task} --base {name}` makes a run that has; what this one is "
            f"for: arbitor audio --reconstruct FILE --run {name}\n"
        )
        assert not (tmp_path / "out.wav").exists()
    assert main(["--task", task, "--base", folder, "--steps", "1", "--run", "behind"]) == 0
    assert main([what, "in.wav", "--out", "out.wav", "--seed", "0"]) == 0


def test_a_run_of_the_codec_is_no_model_of_text(tmp_path, capsys):
    from arbitor import cli

    assert main([*SMALL, "--run", "c"]) == 0
    (tmp_path / "data.txt").write_text("some text to learn from, again and again\n" * 50)
    verbs = (["generate"], ["eval", "--data", "data.txt"], ["chat"], ["finetune"])
    for verb, *flags in verbs:
        for run in ([], ["c"]):
            capsys.readouterr()
            assert cli.main([verb, *run, *flags]) == 2
            done = capsys.readouterr()
            assert not done.out
            assert done.err == (
                "arbitor: error: runs/c/best has learnt the codec of sounds, not to continue text: "
                "`arbitor train` makes a run that has; what this one is for: "
                "arbitor audio --reconstruct FILE --run c\n"
            )
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["c"]


def test_a_sound_that_ends_at_once_is_not_written(tmp_path, capsys, monkeypatch):
    assert main(["--task", "speak", *SMALL, "--run", "s"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("arbitor.audio_tries.say", lambda model, texts, **_: [np.zeros(0, np.float32)])
    assert main(["--say", "seven", "--out", "out.wav"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("task", FIGURES)
def test_five_recordings_are_enough(task, tmp_path, capsys):
    pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")
    for number in range(5):
        noise = 0.1 * np.random.default_rng(number).normal(size=1500).astype(np.float32)
        write_recording(tmp_path / f"{number}_x.wav", noise, 8000)
    assert main(["--task", task, "--data", str(tmp_path), *SMALL, "--run", "few"]) == 0
    summary = json.loads((tmp_path / "runs/few/summary.json").read_text())
    assert np.isfinite(summary[f"held_out_{FIGURES[task]}"])


def test_without_soundfile_the_missing_reader_is_named_not_the_files(tmp_path, capsys, monkeypatch):
    from arbitor import cli

    for number in range(5):
        write_recording(tmp_path / f"{number}_x.wav", np.zeros(2000, np.float32), 8000)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for command in (
        lambda: cli.main(["train", "--enable-audio", "--data", str(tmp_path), "--steps", "1"]),
        lambda: main(["--data", str(tmp_path), "--rate", "2000", "--steps", "1"]),
    ):
        assert command() == 2
        error = capsys.readouterr().err
        assert error.startswith("arbitor: error: audio files need soundfile")
        assert error.count("\n") == 1
        assert "skipped" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--data", "nothing"], "no such file or folder"),
        (["--hear", "none.wav", "--run", "none"], "there is no run"),
        (["--say", "x", "--hear", "y"], "give one of them"),
        (["--reconstruct", "x", "--task", "speak"], "without training"),
        (["--base", "none"], "there is no run"),
        (["--rate", "12345"], "error: --rate must be 0 or a multiple of 200"),
        (["--rate", "0"], "--rate 0: a sound has 2000 samples a second or more"),
        (["--ctx", "0"], "error: --ctx must be"),
        (["--codec-dim", "0"], "error: --codec-dim must be"),
        (["--codec-layers", "0"], "error: --codec-layers must be"),
        (["--codes", "0"], "error: --codes must be"),
        (["--trits", "0"], "error: --trits must be"),
        (["--task", "sing"], "sing"),
        (["--no-equalise"], "--no-equalise is about what is heard: give it with --task listen, not codec"),
        (["--task", "speak", "--equalise"], "--equalise is about what is heard"),
        (["--held-out", "speaker:nobody"], "nobody of that name"),
        (["--batch", "0"], "batch"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(arguments, why, tmp_path, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("arbitor: error: ")
    assert why in error
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_enable_audio_of_the_train_verb_listens_and_grows_a_text_run(tmp_path, capsys):
    from arbitor import cli
    from arbitor.verbs import find_model

    (tmp_path / "data.txt").write_text("some text to learn from, again and again\n" * 200)
    few = ["--steps", "2", "--batch", "4", "--eval-steps", "4", "--device", "cpu"]
    assert cli.main(["train", "--data", "data.txt", *few, "--run", "text"]) == 0
    capsys.readouterr()
    assert main(["--task", "listen", "--base", "text"]) == 2
    assert capsys.readouterr().err == (
        "arbitor: error: --task listen: text has no codec of sounds; first train one that starts from it, "
        "with arbitor audio --base text, and give that run as --base\n"
    )
    assert main(["--base", "text", *SMALL_CODEC, "--run", "codec"]) == 0
    assert find_model("codec", None, ("text",)).learnt == ("text", "codec")  # it left the text as it was
    assert cli.main(["train", "--resume", "--run", "text", "--enable-audio", *few]) == 0
    assert "of the captions right" in capsys.readouterr().out
    assert (tmp_path / "runs/tiny-1/summary.json").is_file()
    assert cli.main(["train", "--resume", "--run", "tiny-1", "--enable-audio", "--steps", "3"]) == 0


def test_the_model_has_the_parts_that_flags_ask_for(capsys):
    from arbitor.config import load_config

    parts = ["--enable-memory", "--memory-rows", "50", "--max-moe-iters", "2"]
    thresholds = ["--accum-threshold", "20", "--e-accum-threshold", "24"]
    assert main([*SMALL_CODEC, *parts, *thresholds, "--run", "codec"]) == 0
    assert "note: --max-moe-iters 2 has no effect" in capsys.readouterr().err
    config = load_config("runs/codec/config.toml")
    assert (config.model.memory_rows, config.model.max_moe_iters) == (50, 2)
    assert (config.train.accum_threshold, config.train.e_accum_threshold) == (20, 24)
    assert main(["--resume", "--run", "codec", *parts, *thresholds]) == 0
    assert main(["--resume", "--run", "codec", "--max-moe-iters", "3"]) == 2
    assert "--max-moe-iters 3 contradicts the run's max_moe_iters = 2" in capsys.readouterr().err
    # A run that starts from it has its parts, but for those that flags take away or add.
    few = ["--task", "speak", "--base", "codec", "--steps", "1", "--batch", "2", "--disable-moe"]
    assert main([*few, "--memory-rows", "0", "--run", "speaks"]) == 0
    assert load_config("runs/speaks/config.toml").model.memory_rows == 0


def test_enable_audio_keeps_what_the_config_file_says(tmp_path):
    from arbitor import cli
    from arbitor.config import load_config

    small = "ctx = 32\ndim = 32\nnum_prelude_layers = 1\naudio_dim = 16\naudio_layers = 1\n"
    train = ["train", "--enable-audio", "--steps", "1", "--batch", "2", "--device", "cpu"]
    for run, own, wanted in (
        ("both", "audio_rate = 2000\naudio_samples = 700\n", (2000, 700)),
        ("rate", "audio_rate = 2000\n", (2000, 2000)),
        ("samples", "audio_samples = 700\n", (8000, 700)),
        ("none", "audio_rate = 0\naudio_samples = 700\n", (8000, 8000)),  # that of a run without sounds
    ):
        (tmp_path / "own.toml").write_text(f"[model]\n{small}{own}[data]\naudio_task = 'codec'\n")
        assert cli.main([*train, "--config", "own.toml", "--run", run]) == 0
        config = load_config(tmp_path / f"runs/{run}/config.toml")
        assert (config.model.audio_rate, config.model.audio_samples) == wanted
        assert config.data.audio_task == "listen"


def test_a_recording_without_a_label_ends_no_run_that_speaks(tmp_path, capsys):
    for name in ("_three", "1_x", "2_x", "3_x", "4_x", "5_x"):
        write_recording(tmp_path / f"{name}.wav", np.zeros(1500, np.float32), 2000)
    assert main(["--task", "speak", "--data", str(tmp_path), *SMALL, "--run", "s"]) == 0
    assert "skipped 1 without a label" in capsys.readouterr().out
    assert len(list((tmp_path / "runs/s/samples").iterdir())) == 4  # one of five is held out


def test_a_sample_that_fails_leaves_a_finished_run(tmp_path, capsys, monkeypatch):
    from arbitor.errors import UserError
    from arbitor.train.checkpoint import load_checkpoint

    def fail(*_, **__):
        raise UserError("no sound today")

    monkeypatch.setattr("arbitor.train.audio_tasks.say", fail)
    assert main(["--task", "speak", *SMALL, "--run", "s"]) == 0
    assert "warning: not all samples are written: no sound today" in " ".join(capsys.readouterr().out.split())
    assert load_checkpoint(tmp_path / "runs/s/final").state["step"] == 3
    assert (tmp_path / "runs/s/summary.json").is_file()


def test_what_is_said_by_bad_settings_is_not_written(tmp_path, capsys):
    assert main(["--task", "speak", *SMALL, "--run", "s"]) == 0
    for wrong, why in (
        (
            ["--temperature", "-1"],
            "--temperature is -1.0; it must be 0 (the most probable) or",
        ),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "inf"], "--temperature is inf"),
        (["--seed", "99999999999999999999"], "--seed is 99999999999999999999; it must be from 0 to 2^63 - 1"),
        (["--seed", "-1"], "--seed is -1"),
    ):
        capsys.readouterr()
        assert main(["--say", "one", "--out", "out.wav", *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"arbitor: error: {why}")
        assert error.count("\n") == 1
        assert not (tmp_path / "out.wav").exists()


def test_a_resumed_run_is_contradicted_by_the_flags_of_the_command(tmp_path, capsys):
    assert main([*SMALL, "--run", "c"]) == 0
    for flag, value, setting in (
        ("--ctx", "8000", "audio_samples = 1000"),
        ("--rate", "8000", "audio_rate = 2000"),
        ("--codec-dim", "32", "audio_dim = 16"),
    ):
        capsys.readouterr()
        assert main(["--resume", "--run", "c", flag, value]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"arbitor: error: {flag} {value} contradicts the run's {setting} in ")


def test_bad_recordings_do_not_stop_a_run(tmp_path, capsys):
    folder = tmp_path / "words"
    folder.mkdir()
    for number in range(8):
        noise = 0.1 * np.random.default_rng(number).normal(size=1500).astype(np.float32)
        write_recording(folder / f"{number}_x_0.wav", noise, 8000)
    (folder / "cut_x_0.wav").write_bytes((folder / "0_x_0.wav").read_bytes()[:500])
    (folder / "empty_x_0.wav").write_bytes(b"")
    pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")
    assert main(["--task", "listen", "--data", str(folder), "--held-out", "2", *SMALL]) == 0
    assert "skipped 1 cut short, 1 empty" in capsys.readouterr().out


def test_a_base_with_a_preset_is_refused(tmp_path, capsys):
    assert main([*SMALL, "--run", "c"]) == 0
    assert main(["--base", "c", "--preset", "small"]) == 2
    assert "leave it out" in capsys.readouterr().err
