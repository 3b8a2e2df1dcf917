"""The mixed run beside text alone: what its rows hold, and what is said of them."""

import csv
from pathlib import Path

import numpy as np
import pytest

from arbitor.config import override, preset
from arbitor.data.mixed import open_mix
from arbitor.data.stream import ByteStream
from arbitor.train.mix import MixTask
from arbitor.train.task import TextTask
from benchmarks.common import RESULTS
from benchmarks.learning.table import Table
from benchmarks.mixed import overlap as overlap_module
from benchmarks.mixed.__main__ import (
    ALONE,
    COLUMNS,
    KEY,
    MIXED,
    data_of,
    main,
    rows_of,
    steps_of_text,
    told,
    verdict,
)
from benchmarks.mixed.overlap import STRETCH, Overlap, overlap, overlaps
from testing.small_run import MODEL, one_thread  # noqa: F401 - a fixture that runs by itself

SOURCE = {"commit": "c", "device": "cpu", "torch": "t", "date": "d"}
SUMMARY = {
    "held_out_text": 2.0,
    "unigram_text": 4.5,
    "held_out_router_text": 0.995,
    "held_out_video": 1.5,
    "gaussian_video": 1.25,
}


FOUND = {"text": Overlap(1, 400), "held_out": Overlap(0, 30)}


def test_text_alone_takes_its_share_of_the_steps():
    config = override(preset("tiny"), steps=1000, text_weight=4.0, code_weight=4.0, image_weight=2.0)
    assert 350 < steps_of_text(config) < 450
    assert steps_of_text(override(config, steps=1)) == 1
    assert steps_of_text(override(config, code_weight=0.0, image_weight=0.0)) == 1000


@pytest.mark.parametrize("seed", [0, 5])
def test_text_alone_takes_as_many_batches_as_the_mix_draws(workplace, seed):
    config = override(
        preset("tiny", batch=1, ctx=16),
        steps=50,
        accum=3,
        seed=seed,
        text_weight=4.0,
        code_weight=7.0,
        text_data=("text.txt",),
        code_data=("code.txt",),
    )
    task = MixTask(config, open_mix(config))
    drawn = sum(int(task.next_batch()[0]) == 0 for _ in range(150))
    assert 0 <= 3 * steps_of_text(config) - drawn < 3


def test_a_row_says_what_it_is_of():
    config = override(preset("small"), steps=7, accum=4, text_weight=4.0, code_weight=4.0, audio_weight=1.5)
    config = override(config, audio_data=("some/words.tar",))
    (row,) = rows_of(MIXED, config, {"held_out_text": 2.0, "unigram_text": 4.5}, SOURCE, FOUND)
    assert (row["preset"], row["weights"], row["steps"], row["accum"]) == ("small", "4:4:0:1.5:0", "7", "4")
    assert (row["text_data"], row["code_data"]) == ("docstrings of Python's library", "Python's library")
    assert (row["image_data"], row["audio_data"], row["video_data"]) == ("", "words.tar", "")
    assert (row["text_in_code"], row["held_out_in_code"]) == ("0.00250", "0.00000")
    assert {"preset", "text_data", "audio_data", "steps", "weights"} < set(KEY)


def test_data_is_named_by_the_files_of_a_small_folder(workplace):
    Path("books").mkdir()
    for name in ("a.txt", "b.txt"):
        Path("books", name).write_text("some text\n")
    config = override(preset("tiny"), text_weight=1.0, text_data=("books",), image_weight=1.0)
    assert data_of(config, "text") == "a.txt b.txt"
    assert data_of(override(config, text_data=("hf:owner/books",)), "text") == "hf:owner/books"
    for name in "cdefg":
        Path("books", name).write_text("some text\n")
    assert data_of(config, "text") == "books"
    assert data_of(override(config, image_data=("pictures/mnist/",)), "image") == "mnist"


@pytest.mark.parametrize("at_a_time", [7, 1 << 20])
def test_overlap_counts_the_stretches_that_occur_in_the_code(monkeypatch, at_a_time):
    monkeypatch.setattr(overlap_module, "AT_A_TIME", at_a_time)
    random = np.random.default_rng(0)
    lines = [bytes(random.integers(97, 123, 100, dtype=np.uint8)) for _ in range(6)]
    text = b"  " + b"\n\t".join(lines) + b"\nshort\n"
    # Of two lines the second stretch, of one both; of another all but the last byte of the first.
    code = b"x" * 3 + lines[0][40:80] + lines[1][38:85] + b"~~~" + lines[2] + lines[3][: STRETCH - 1]
    streams = [ByteStream([np.frombuffer(part, dtype=np.uint8)]) for part in (text, code)]
    assert overlap(*streams) == Overlap(4, 12)
    assert overlap(streams[0], ByteStream([])) == Overlap(0, 12)
    assert overlap(ByteStream([]), streams[1]) == Overlap(0, 0)


def test_too_much_in_common_is_warned_of():
    assert "WARNING" not in told(FOUND)
    assert "of 400 stretches of 40 bytes of the training text, 1 occur in the code (0.25 %)" in told(FOUND)
    assert "WARNING" in told({**FOUND, "held_out": Overlap(1, 30)})
    assert "not searched" in told(None)


def test_the_rows_that_are_kept_have_these_columns():
    for path in RESULTS.glob("mixed-*.csv"):
        table = Table(path, COLUMNS, KEY)
        rows = table.rows()
        assert len({table.identity(row) for row in rows}) == len(rows) > 0


def test_rows_have_the_figures_of_the_parts_that_are_there():
    text, video = rows_of(MIXED, preset("tiny"), SUMMARY, SOURCE, None)
    assert tuple(text) == COLUMNS
    assert (text["text_in_code"], text["held_out_in_code"]) == ("", "")
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
    alone = rows_of(ALONE, preset("tiny"), {"held_out_text": 1.6, "unigram_text": 4.5}, SOURCE, FOUND)
    mixed = rows_of(MIXED, preset("tiny"), SUMMARY, SOURCE, FOUND)
    lines = verdict({MIXED: mixed, ALONE: alone}).splitlines()
    assert lines[0] == "text: 2.0000 bits/byte, unigram entropy 4.5000: below"
    assert lines[1].endswith("1.2500: NOT below")
    assert lines[2] == "router right at 99.5 % of the positions of each part or more, goal 99 %"
    assert lines[3] == "text in the mix over text alone: 1.250 (2.0000 and 1.6000), goal at most 1.05"
    assert len(lines) == 4
    mixed = rows_of(MIXED, preset("tiny"), SUMMARY, SOURCE, {**FOUND, "text": Overlap(9, 10)})
    assert "says little" in verdict({MIXED: mixed, ALONE: alone}).splitlines()[4]


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
        ("text alone", "text", "3"),
    ]
    assert {row["commit"] for row in rows} == {"abc"}
    assert "text in the mix over text alone" in capsys.readouterr().out
    assert list(Path("runs").iterdir()) == []


def test_both_runs_draw_the_same_text(workplace, monkeypatch):
    drawn = []
    next_batch = TextTask.next_batch

    def recorded(self):
        batch = next_batch(self)
        drawn.append(bytes(batch[0].numpy().astype(np.uint8).tobytes()))
        return batch

    monkeypatch.setattr(TextTask, "next_batch", recorded)
    assert main([*ARGUMENTS, "--accum", "3"]) == 0
    first, code = [batch for batch in drawn if b"=" not in batch], [b for b in drawn if b"=" in b]
    in_mix = 12 - len(code)
    alone = first[in_mix:]
    assert 0 < in_mix < 12
    assert alone[:in_mix] == first[:in_mix]
    assert len(alone) - in_mix < 3


def test_text_that_is_part_of_the_code_is_counted(workplace, capsys):
    long = [f"This is line {n * n} of a text that the code quotes, word for word. " for n in range(300)]
    Path("text.txt").write_text("\n".join(long))
    Path("code.txt").write_text("".join(f"    # {line}\n" for line in long[:270]))
    assert main(ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert "WARNING" in out
    assert "says little" in out
    with open("results/mixed-cpu.csv", encoding="utf-8") as file:
        mixed, code, alone = csv.DictReader(file)
    assert mixed["text_in_code"] == alone["text_in_code"] > "0.8"
    assert code["text_in_code"] == ""
    assert (mixed["text_data"], mixed["code_data"], alone["code_data"]) == ("text.txt", "code.txt", "")


def test_what_is_held_out_is_not_learnt_from(workplace):
    for name in ("other.txt", "more.txt"):
        Path(name).write_text("".join(f"{name} has line {n}.\n" for n in range(300)))
    config = override(preset("tiny", ctx=16), text_weight=1.0, code_weight=1.0, code_data=("code.txt",))
    text = open_mix(override(config, text_data=("*.txt",))).parts["text"]
    held_out, train = (set(bytes(part.as_array()).split(b"\n")) for part in (text.held_out, text.train))
    assert {line for line in held_out & train if line.endswith(b".")} == set()
    found = overlaps(override(config, text_data=("other.txt",)))
    assert found is not None
    assert found["text"].found == 0


def test_a_run_that_fails_ends_it(workplace, capsys):
    assert main([*ARGUMENTS, "--batch", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("results").exists()
