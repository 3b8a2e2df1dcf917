"""The mixed run beside text alone: what its rows hold, and what is said of them."""

import csv
from pathlib import Path

import pytest

from arbitor.config import override, preset
from benchmarks.mixed.__main__ import ALONE, COLUMNS, MIXED, main, rows_of, steps_of_text, verdict
from testing.small_run import MODEL, one_thread  # noqa: F401 - a fixture that runs by itself

SOURCE = {"commit": "c", "device": "cpu", "torch": "t", "date": "d"}
SUMMARY = {
    "held_out_text": 2.0,
    "unigram_text": 4.5,
    "held_out_router_text": 0.995,
    "held_out_video": 1.5,
    "gaussian_video": 1.25,
}


def test_text_alone_takes_its_share_of_the_steps():
    config = override(preset("tiny"), steps=1000, text_weight=4.0, code_weight=4.0, image_weight=2.0)
    assert steps_of_text(config) == 400
    assert steps_of_text(override(config, steps=1)) == 1


def test_rows_have_the_figures_of_the_parts_that_are_there():
    text, video = rows_of(MIXED, preset("tiny"), SUMMARY, SOURCE)
    assert tuple(text) == COLUMNS
    assert (text["part"], text["held_out"], text["baseline"]) == ("text", "2.0000", "4.5000")
    assert (text["unit"], text["baseline_is"], text["router_right"]) == (
        "bits/byte",
        "unigram entropy",
        "0.9950",
    )
    assert (video["part"], video["baseline_is"], video["router_right"]) == (
        "video",
        "Gaussian of the training latents",
        "",
    )


def test_the_verdict_says_what_falls_short():
    alone = rows_of(ALONE, preset("tiny"), {"held_out_text": 1.6, "unigram_text": 4.5}, SOURCE)
    lines = verdict({MIXED: rows_of(MIXED, preset("tiny"), SUMMARY, SOURCE), ALONE: alone}).splitlines()
    assert lines[0] == "text: 2.0000 bits/byte, unigram entropy 4.5000: below"
    assert lines[1].endswith("1.2500: NOT below")
    assert lines[2] == "router right at 99.5 % of the positions of each part or more, goal 99 %"
    assert lines[3] == "text in the mix over text alone: 1.250 (2.0000 and 1.6000), goal at most 1.05"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.train.loop.LAST_WINDOWS_PER_TRAINED", 1)
    toml = "[model]\n" + "".join(f"{name} = {value}\n" for name, value in MODEL.items()) + "ctx = 16\n"
    Path("small.toml").write_text(toml)
    Path("text.txt").write_text("".join(f"a sentence of number {n}. " for n in range(300)))
    Path("code.txt").write_text("".join(f"x_{n} = f({n})\n" for n in range(300)))
    return tmp_path


ARGUMENTS = [
    *("--device", "cpu", "--steps", "4", "--results", "results", "--commit", "abc"),
    *("--config", "small.toml", "--text-data", "text.txt", "--code-data", "code.txt", "--batch", "4"),
    *("--image-weight", "0", "--audio-weight", "0", "--video-weight", "0"),
]


def test_the_command_trains_both_and_leaves_rows(workplace, capsys):
    assert main(ARGUMENTS) == 0
    with open("results/mixed-cpu.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["part"], row["steps"]) for row in rows] == [
        ("mixed", "text", "4"),
        ("mixed", "code", "4"),
        ("text alone", "text", "2"),
    ]
    assert {row["commit"] for row in rows} == {"abc"}
    assert "text in the mix over text alone" in capsys.readouterr().out
    assert list(Path("runs").iterdir()) == []


def test_a_run_that_fails_ends_it(workplace, capsys):
    assert main([*ARGUMENTS, "--batch", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("results").exists()
