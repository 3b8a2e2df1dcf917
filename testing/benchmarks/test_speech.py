import csv

import numpy as np
import pytest
import torch

from arbitor.config import preset
from arbitor.data.audio import open_audio
from arbitor.data.waves import write_recording
from arbitor.model import ARBModel
from arbitor.ternary import TernaryConv1d, TernaryUpsample1d
from benchmarks.learning.contestants import Run
from benchmarks.speech.__main__ import build_pipeline, main
from benchmarks.speech.recogniser import share_right, train_recogniser
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


def test_the_command_writes_rows_and_goes_on_where_it_stopped(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.speech.__main__.preset", lambda _: preset("tiny", **MODEL))
    arguments = [
        *("--data", str(words), "--results", str(tmp_path), "--rate", "2000", "--device", "cpu"),
        *("--batch", "2", "--codec-steps", "1", "--steps", "1", "--recogniser-steps", "1"),
        *("--commit", "test"),
    ]  # fmt: skip
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


def test_bad_data_is_exit_code_two(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none"), "--results", str(tmp_path)]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_the_recogniser_tells_synthesised_sounds_apart():
    corpus = open_audio([], None, 8000)
    recogniser = train_recogniser(corpus.train, 8000, 60, torch.device("cpu"))
    held_out = corpus.held_out
    share = share_right(recogniser, [held_out.wave(n) for n in range(len(held_out))], held_out.labels)
    assert share > 0.6  # a guess is 1/6
