"""The race: equal data for all contestants, a row and a curve for each run, one line for bad arguments."""

import csv

import pytest
import torch

from arbitor.config import preset
from arbitor.train.device import resolve_device
from benchmarks.learning.contestants import Run
from benchmarks.race import training
from benchmarks.race.__main__ import CURVE_COLUMNS, main

SMALL = ["--preset", "tiny", "--batch", "2", "--ctx", "16", "--held-out-bytes", "200", "--device", "cpu"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i % 10} and {i % 7} are {i % 10 + i % 7}\n" for i in range(2000)))
    return str(path)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_each_contestant_leaves_a_row_and_a_curve(text, tmp_path, capsys):
    who = ["--contestants", "trits-full", "dense-adamw", "dense-muon"]
    arguments = [*SMALL, *who, "--steps", "20", "--data", text, "--results", str(tmp_path), "--commit", "abc"]
    assert main(arguments) == 0
    trits, dense, muon = rows(tmp_path / "race-cpu.csv")
    assert [row["contestant"] for row in (trits, dense, muon)] == who[1:]
    for row in (trits, dense, muon):
        assert (row["steps"], row["bytes_seen"], row["commit"]) == ("20", "640", "abc")
        assert 1 < float(row["held_out_bits_per_byte"]) < 9
        most, least = (int(row["bytes_seen"]) / (int(row["bytes_per_second"]) + half) for half in (-0.5, 0.5))
        assert least - 0.051 < float(row["seconds"]) < most + 0.051  # one decimal
    assert trits["trunk_weights"] == dense["trunk_weights"]
    assert trits["text"] == dense["text"]
    assert float(dense["bytes_per_weight"]) == pytest.approx(12, abs=0.01)
    assert float(muon["bytes_per_weight"]) == pytest.approx(8, abs=0.01)
    assert float(trits["bytes_per_weight"]) < 2.4
    curve = rows(tmp_path / "race-cpu-curve.csv")
    assert tuple(curve[0]) == CURVE_COLUMNS
    assert [row["step"] for row in curve] == [str(step) for step in range(2, 20, 2)] * 3
    assert main(arguments) == 0  # again: rows are replaced
    assert len(rows(tmp_path / "race-cpu.csv")) == 3
    assert torch.get_float32_matmul_precision() == "highest"  # as before
    assert len(rows(tmp_path / "race-cpu-curve.csv")) == len(curve)


@pytest.mark.long
def test_rows_of_another_text_are_kept(text, tmp_path):
    arguments = [*SMALL, "--contestants", "trits-full", "--steps", "16", "--results", str(tmp_path)]
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 2000)
    for data in (text, str(other), text):
        assert main([*arguments, "--data", data]) == 0
    for name, count in (("race-cpu.csv", 1), ("race-cpu-curve.csv", 7)):
        texts = [row["text"] for row in rows(tmp_path / name)]
        assert len(texts) == 2 * count
        assert texts[0] != texts[-1]


def test_contestants_read_the_same_windows():
    config = preset("tiny", batch=3, ctx=16)
    text = torch.arange(1000).to(torch.uint8)
    ones, others = (training._batches(text, config, 5) for _ in range(2))
    first = next(ones)
    assert torch.equal(first, next(others))
    assert first.shape == (3, 16)
    assert torch.equal(first[:, 1:], (first[:, :-1] + 1) % 256)
    assert not torch.equal(first, next(training._batches(text, config, 6)))


def test_steps_are_those_that_fit_into_the_time(monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    config = preset("tiny", batch=1, ctx=16)
    text = torch.zeros(100, dtype=torch.uint8)
    # The ten steps took 5 s by this clock.
    assert training.steps_in(Run("trits-full", 0.05, 0), config, text, resolve_device("cpu"), 60.2) == 120


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contestants", "trits-big"], "unknown contestant 'trits-big'"),
        (["--contestants", "bitnet-adamw"], "give --lr"),
        (["--steps", "3"], "--steps must be at least 16, got 3"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--batch", "0"], "batch"),
        (["--minutes", "0.0001"], "give more --minutes"),
    ],
)
def test_bad_arguments_are_one_line(text, tmp_path, capsys, arguments, words):
    assert main([*SMALL, "--data", text, "--results", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.race: error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.csv"))
