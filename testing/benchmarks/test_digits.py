"""The comparison on digits: same architecture and images for both, what is run and what is summed up."""

import csv
import dataclasses
import struct

import numpy as np
import pytest
import torch

from arbitor.config import override, preset
from arbitor.data.images import Geometry, default_geometry, open_images
from arbitor.evaluate import Evaluation
from arbitor.ternary import Int8Embedding
from arbitor.ternary.tensor import TernaryScaleTensor
from arbitor.train.task import CaptionTask
from benchmarks.common import RESULTS
from benchmarks.digits.__main__ import COLUMNS, KEY, RATES, main, measure, next_run, split_of, summary
from benchmarks.learning.contestants import Run, build
from benchmarks.learning.table import Table
from benchmarks.learning.training import train_on
from benchmarks.learning.twins import DenseLinear, rms_norm

CPU = torch.device("cpu")


@pytest.fixture
def digits(monkeypatch, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn (extra `vision`) is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return open_images([], None, Geometry(size=8, channels=1))


def config(**changes):
    small = {"dim": 32, "num_prelude_layers": 1, "ffn_dim": 64, "kv_latent_dim": 32, **default_geometry([])}
    return override(preset("tiny"), **{**small, "steps": 2, "batch": 4, **changes})


def test_the_twin_is_the_same_network_of_floats(digits):
    trits, dense = (build(Run(name, 0.01, 0), config().model, CPU).model for name in RATES)
    assert not [m for m in dense.modules() if isinstance(m, TernaryScaleTensor | Int8Embedding)]
    ternary = {n: m for n, m in trits.named_modules() if isinstance(m, TernaryScaleTensor)}
    twins = {n: m for n, m in dense.named_modules() if isinstance(m, DenseLinear)}
    assert ternary.keys() == twins.keys()
    assert "sidecars.image.embed" in twins
    for name, twin in twins.items():
        module = ternary[name]
        assert (twin.in_features, twin.out_features) == (module.in_features, module.out_features)
        assert twin.input_norm == module.input_norm
        x = torch.randn(3, twin.in_features)
        expected = (x if name == "sidecars.image.embed" else rms_norm(x)) @ twin.weight.T
        torch.testing.assert_close(twin(x), expected)


def test_both_get_the_same_batches(digits):
    seen = []
    for name in RATES:
        trainee = build(Run(name, 0.01, 3), config().model, CPU)
        task = CaptionTask(override(config(), seed=3), digits)
        trainee.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0], kwargs["target_mask"])), with_kwargs=True
        )
        trainee.model.sidecars["image"].register_forward_pre_hook(lambda _, args: seen.append(args))
        train_on(trainee, task, 2)
    for one, other in zip(seen[:4], seen[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_row_holds_what_was_measured(digits, monkeypatch):
    monkeypatch.setattr(CaptionTask, "evaluate", lambda *_: Evaluation(0.25, 900, 179, 0.75))
    row = measure(Run("trits-full", 0.05, 1), config(), digits, "share 0.1", CPU, "abc")
    assert (row["captions_right"], row["held_out_bits_per_byte"]) == ("0.75000", "0.25000")
    assert (row["images"], row["held_out"], row["commit"], row["seed"]) == ("1618", "179", "abc", "1")
    assert row["split"] == "share 0.1"
    assert row.keys() == set(COLUMNS)
    assert 2 < float(row["bytes_per_weight"]) < 3


def row(contestant, lr, seed, right):
    return {
        "contestant": contestant,
        "lr": str(lr),
        "seed": str(seed),
        "captions_right": str(right),
        "held_out_bits_per_byte": "0.1",
    }


def test_the_best_rate_gets_more_seeds():
    rows = []
    asked = []
    while (run := next_run("trits-full", rows)) is not None:
        asked.append((run.lr, run.seed))
        rows.append(row("trits-full", run.lr, run.seed, 0.9 if run.lr == 0.05 else 0.8))
    assert asked == [(0.025, 0), (0.05, 0), (0.1, 0), (0.05, 1), (0.05, 2)]


def test_the_summary_is_of_the_best_rates():
    rows = [row("trits-full", lr, 0, right) for lr, right in ((0.025, 0.90), (0.05, 0.98), (0.1, 0.5))]
    rows += [row("trits-full", 0.05, 1, 0.94), row("trits-full", 0.05, 2, 0.96)]
    rows += [row("dense-adamw", lr, seed, 0.97) for lr, seed in ((0.001, 0), (0.001, 1), (0.001, 2))]
    text = summary(rows)
    assert "trits-full   lr 0.05: 96.00 % right (mean of 3 seeds, 94.00 to 98.00)" in text
    assert f"trits over float twin: {0.96 / 0.97:.4f} (goal: at least 0.98)" in text


def test_what_is_done_is_skipped(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CaptionTask, "evaluate", lambda *_: Evaluation(0.25, 900, 179, 0.75))
    command = ["--steps", "1", "--batch", "2", "--device", "cpu", "--results", str(tmp_path), "--commit", "c"]
    assert main([*command, "--contestant", "dense-adamw"]) == 0
    with open(tmp_path / "digits-sklearn-cpu.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 5
    first = capsys.readouterr().out
    assert first.count("% right in") == 5
    assert main([*command, "--contestant", "dense-adamw"]) == 0
    assert capsys.readouterr().out.count("% right in") == 0
    assert main([*command, "--contestant", "trits-full", "--minutes", "0"]) == 75
    assert main([*command, "--data", str(tmp_path)]) == 2
    assert "holds no IDX files" in capsys.readouterr().err


def test_rows_of_other_images_are_neither_skipped_nor_summed_up_nor_replaced(
    digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(CaptionTask, "evaluate", lambda *_: Evaluation(0.25, 900, 179, 0.75))
    command = ["--steps", "1", "--batch", "2", "--device", "cpu", "--results", str(tmp_path), "--commit", "c"]
    command += ["--contestant", "dense-adamw"]
    splits = ((), ("--held-out", "179"), ("--held-out", "200"), ("--held-out", "0.2"))
    for split in splits:
        assert main([*command, *split]) == 0
        told = capsys.readouterr().out
        assert told.count("% right in") == 5
        assert "mean of 3 seeds" in told
    rows = Table(tmp_path / "digits-sklearn-cpu.csv", COLUMNS, KEY).rows()
    assert [(r["images"], r["held_out"], r["split"]) for r in rows[::5]] == [
        ("1618", "179", "share 0.1"),
        ("1618", "179", "last 179"),
        ("1597", "200", "last 200"),
        ("1438", "359", "share 0.2"),
    ]
    assert len(rows) == 20
    for split in (*splits, ("--held-out", "0.10")):
        assert main([*command, *split]) == 0
        assert "% right in" not in capsys.readouterr().out


def test_what_is_held_out_is_told_apart(digits):
    own = dataclasses.replace(digits, description="MNIST: 9 images to train on, 1 held out (the t10k files)")
    assert split_of(None, digits) == split_of("0.1", digits) == "share 0.1"
    assert split_of(None, own) == "t10k"
    assert split_of("1000", own) == split_of("1e3", own) == "last 1000"
    assert split_of("folder/others", own) == "others"


def test_the_files_of_mnist_are_held_out_by_default(digits, tmp_path):
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    corpus = open_images([str(tmp_path)], None, Geometry(size=8, channels=1))
    assert (len(corpus.held_out), split_of(None, corpus)) == (3, "t10k")


def write_idx(path, array):
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_the_results_that_are_kept_say_what_was_held_out():
    for name, split, images in (("mnist-h100", "last 1000", "8000"), ("sklearn-cpu", "share 0.1", "1618")):
        rows = Table(RESULTS / f"digits-{name}.csv", COLUMNS, KEY).rows()
        assert len(rows) >= 10
        assert {(r["split"], r["images"]) for r in rows} == {(split, images)}


def mnist(data_folder):
    if not (data_folder / "mnist").is_dir():
        pytest.skip(f"no MNIST at {data_folder / 'mnist'} (IDX files)")
    return str(data_folder / "mnist")


def test_mnist_is_read(data_folder):
    folder = mnist(data_folder)
    corpus = open_images([folder], "1000", Geometry(size=28, channels=1))
    assert (len(corpus.train), len(corpus.held_out)) == (8000, 1000)
    assert default_geometry([folder]) == {"image_size": 28, "image_patch": 4, "image_channels": 1}
    assert corpus.train.captions[:4] == [b"seven", b"two", b"one", b"zero"]


@pytest.mark.gpu
def test_mnist_is_learnt(data_folder):
    """At least 96 of 100 held-out digits of MNIST are named right after 2,000 steps on 8,000 of them."""
    folder = mnist(data_folder)
    corpus = open_images([folder], "1000", Geometry(size=28, channels=1))
    settings = override(preset("tiny"), steps=2000, batch=128, **default_geometry([folder]))
    row = measure(Run("trits-full", 0.05, 0), settings, corpus, "last 1000", torch.device("cuda"), "")
    assert float(row["captions_right"]) >= 0.96
