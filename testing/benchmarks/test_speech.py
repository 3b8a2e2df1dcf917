import csv

import numpy as np
import pytest
import torch

from arbitor.config import preset
from arbitor.data.audio import open_audio
from arbitor.data.waves import write_recording
from arbitor.model import ARBModel
from arbitor.ternary import TernaryConv1d, TernaryUpsample1d
from benchmarks.common import RESULTS
from benchmarks.learning.contestants import Run
from benchmarks.learning.table import Table
from benchmarks.speech.__main__ import COLUMNS, KEY, RATES, build_pipeline, main
from benchmarks.speech.recogniser import share_right, train_recogniser
from benchmarks.speech.summary import results
from benchmarks.speech.twins import DenseConv1d
from testing.small_run import MODEL

pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def words(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    for number in range(12):
        noise = 0.1 * np.random.default_rng(number).normal(size=900).astype(np.float32)
        write_recording(folder / f"{number % 3}_{'ab'[number % 2]}_{number}.wav", noise, 2000)
    return folder


def test_a_twin_of_the_convolutions_computes_what_they_do():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10)
    layers = [
        TernaryConv1d(3, 4, 5, stride=2, dilation=2),
        TernaryConv1d(3, 4, 1, input_norm=False),
        TernaryUpsample1d(3, 4, 3, kernel_size=3),
    ]
    for layer in layers:
        twin = DenseConv1d(layer, torch.device("cpu"))
        with torch.no_grad():
            twin.weight.copy_(layer.decode())
            # int8 activations are off by at most half a code of 127.
            torch.testing.assert_close(twin(x), layer(x, quantize=False), rtol=1e-5, atol=1e-5)


def test_the_twin_is_float_throughout_and_of_the_same_size():
    config = preset("tiny", **MODEL, audio_rate=2000, audio_dim=16, audio_layers=1).model
    trits, twin = (
        build_pipeline(Run(name, 0.01, 0), config, torch.device("cpu"))
        for name in ("trits-full", "dense-adamw")
    )
    assert trits.trunk_weights() == twin.trunk_weights()
    assert all(p.is_floating_point() for p in twin.model.parameters())
    assert isinstance(twin.model, ARBModel)
    optimised = {id(p) for group in twin.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in twin.model.parameters()}


@pytest.fixture
def arguments(words, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.speech.__main__.preset", lambda _: preset("tiny", **MODEL))
    return [
        *("--data", str(words), "--results", str(tmp_path), "--rate", "2000", "--device", "cpu"),
        *("--batch", "2", "--codec-steps", "1", "--steps", "1", "--recogniser-steps", "1"),
        *("--commit", "test"),
    ]  # fmt: skip


@pytest.mark.long
def test_the_command_writes_rows_and_goes_on_where_it_stopped(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    told = capsys.readouterr().out
    rows = read(tmp_path / "speech-cpu.csv")
    assert [(r["task"], r["contestant"], r["held_out"]) for r in rows] == [
        (task, contestant, fold)
        for task, folds in (("listen", ("speaker:a", "speaker:b")), ("speak", ("0.1",)))
        for contestant in ("trits-full", "dense-adamw")
        for fold in folds
    ]
    assert all(0 <= float(row["words_right"]) <= 1 for row in rows)
    assert all(float(row["log_mel_distance"]) > 0 for row in rows)
    assert "trits over float twin" in told
    assert main(arguments) == 0
    assert read(tmp_path / "speech-cpu.csv") == rows


def test_rows_of_several_recipes_stand_beside_each_other(arguments, tmp_path, capsys, monkeypatch):
    made = []

    def build(run, config, device):
        made.append(config.audio_equalise)
        return build_pipeline(run, config, device)

    monkeypatch.setattr("benchmarks.speech.__main__.build_pipeline", build)
    one = [*arguments, "--task", "listen", "--contestant", "trits-full", "--speaker", "a"]
    recipes = ([], ["--no-equalise"], ["--seed", "1"], ["--lr", "0.025"], ["--codec-lr", "0.1"])
    own = str(RATES["listen"]["trits-full"][0])
    for recipe in recipes:
        assert main([*one, *recipe]) == 0
        assert capsys.readouterr().out.count("listen trits-full") == 2  # a run, and the summary of it alone
    rows = read(tmp_path / "speech-cpu.csv")
    assert [(r["equalise"], r["seed"], r["lr"], r["codec_lr"]) for r in rows] == [
        ("on", "0", own, own),
        ("off", "0", own, own),
        ("on", "1", own, own),
        ("on", "0", "0.025", "0.025"),
        ("on", "0", own, "0.1"),
    ]
    assert made == [True, False, True, True, True]
    for recipe in recipes:
        assert main([*one, *recipe]) == 0
    assert read(tmp_path / "speech-cpu.csv") == rows


def test_all_rates_are_tried_on_the_first_speaker_and_the_best_on_the_others(arguments, tmp_path):
    one = [*arguments, "--task", "listen", "--contestant", "trits-full"]
    rates = ["--lr", "0.05", "--codec-lr", "0.05", "--codec-lr", "0.1"]
    assert main([*one, *rates]) == 0
    rows = read(tmp_path / "speech-cpu.csv")
    assert [(r["held_out"], r["codec_lr"]) for r in rows[:2]] == [("speaker:a", "0.05"), ("speaker:a", "0.1")]
    best = max(rows[:2], key=lambda row: float(row["words_right"]))["codec_lr"]
    assert [(r["held_out"], r["codec_lr"]) for r in rows[2:]] == [("speaker:b", best)]


def test_the_codec_learns_at_its_own_rate(arguments, monkeypatch):
    peaks = []
    monkeypatch.setattr(
        "benchmarks.speech.__main__.train_on", lambda trainee, task, steps, peak=1.0: peaks.append(peak)
    )
    one = [*arguments, "--task", "speak", "--contestant", "trits-full"]
    assert main([*one, "--lr", "0.05", "--codec-lr", "0.1"]) == 0
    assert main([*one, "--lr", "0.05"]) == 0
    assert peaks == [2.0, 1.0, 1.0, 1.0]


def test_speaking_hears_nothing_that_could_be_equalised(arguments, tmp_path, capsys):
    one = [*arguments, "--task", "speak", "--contestant", "trits-full"]
    for recipe in ("--equalise", "--no-equalise"):
        assert main([*one, recipe]) == 0
    assert [row["equalise"] for row in read(tmp_path / "speech-cpu.csv")] == [""]


def test_rates_that_cannot_be_are_exit_code_two(arguments, tmp_path, capsys):
    for flag in ("--lr", "--codec-lr"):
        assert main([*arguments, flag, "0"]) == 2
        assert "lr must be above 0" in capsys.readouterr().err
    assert not (tmp_path / "speech-cpu.csv").exists()


def test_the_results_that_are_kept_say_what_was_heard():
    rows = Table(RESULTS / "speech-h100.csv", COLUMNS, KEY).rows()
    heard = {(row["task"], row["equalise"]) for row in rows}
    assert heard <= {("listen", "on"), ("listen", "off"), ("speak", "")}


def test_rates_are_by_default_the_best_of_the_kept_rows():
    """Of the runs with the same settings, those with as many seeds at least."""
    rows = Table(RESULTS / "speech-h100.csv", COLUMNS, KEY).rows()
    sizes = {"steps": "3000", "codec_steps": "3000", "dim": "160", "codec_dim": "160"}
    for task, equalise in (("listen", "on"), ("speak", "")):
        wanted = {"contestant": "trits-full", "equalise": equalise, **sizes}
        found = [r for r in results(task, rows) if wanted.items() <= r.recipe.items()]
        own = format(RATES[task]["trits-full"][0], "g")
        default = next(r for r in found if r.recipe["lr"] == r.recipe["codec_lr"] == own)
        assert default == next(r for r in found if len(r.seeds) >= len(default.seeds))


def test_the_summary_of_all_needs_no_data_and_trains_nothing(tmp_path, capsys):
    assert main(["--results", str(tmp_path)]) == 2
    assert "--data is needed" in capsys.readouterr().err
    assert main(["--summary", "--results", str(tmp_path)]) == 2
    assert "there are no speech-*.csv" in capsys.readouterr().err
    assert main(["--summary"]) == 0
    assert "each at its own best recipe: trits-full" in capsys.readouterr().out


def test_a_sweep_is_not_compared_with_runs_on_more_speakers(arguments, tmp_path, capsys):
    """A contestant's best rates on the first speaker may have no rows of the others."""
    one = [*arguments, "--task", "listen"]
    assert main([*one, "--contestant", "dense-adamw"]) == 0
    assert main([*one, "--contestant", "trits-full", "--speaker", "a"]) == 0
    assert "no ratio" not in capsys.readouterr().out  # on that speaker alone both have a row
    assert main([*one, "--contestant", "dense-adamw"]) == 0
    told = capsys.readouterr().out
    assert "1 of 2 folds" in told
    assert "no ratio" in told
    assert "trits over float twin" not in told


def test_bad_data_is_exit_code_two(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none"), "--results", str(tmp_path)]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.long
def test_the_recogniser_tells_synthesised_sounds_apart():
    corpus = open_audio([], None, 8000)
    recogniser = train_recogniser(corpus.train, 8000, 60, torch.device("cpu"))
    held_out = corpus.held_out
    share = share_right(recogniser, [held_out.wave(n) for n in range(len(held_out))], held_out.labels)
    assert share > 0.6  # a guess is 1/6
