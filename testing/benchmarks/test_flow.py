"""The measurement of the flow: its baselines are what they claim, and the command leaves a row and sheets."""

import csv

import numpy as np
import pytest
import torch

from arbitor.data.images import WORDS
from arbitor.data.video import ClipGeometry, MovingDigits, VideoCorpus, open_videos
from arbitor.errors import UserError
from arbitor.train.gaussian import Gaussian
from benchmarks.common import RESULTS
from benchmarks.flow import features as features_module
from benchmarks.flow.__main__ import COLUMNS, KEY, main, summary
from benchmarks.flow.baselines import shuffled
from benchmarks.flow.clips import DRAWS, captions_of, play, random_clips
from benchmarks.flow.features import (
    FEATURES,
    ClipClassifier,
    features_of,
    frechet_distance,
    labelled,
    named_right,
    train_classifier,
)
from benchmarks.learning.table import Table


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(count, seed=0):
    mixing = normal(6, 6, seed=9)
    return (normal(count, 6, seed=seed) @ mixing + 2).view(count, 2, 3)


def test_the_gaussian_guess_is_the_best_linear_one():
    """No linear function of x_t, fitted to the very data by least squares, has a smaller loss."""
    data, noise = correlated(20_000), normal(20_000, 2, 3, seed=1)
    for time in (0.1, 0.5, 0.9):
        x_t = (1 - time) * noise + time * data
        guess = Gaussian.of(data, full=True).velocity(x_t, torch.full((20_000,), time))
        known = torch.cat([x_t.flatten(1), torch.ones(20_000, 1)], dim=1)
        target = (data - noise).flatten(1)
        fitted = known @ torch.linalg.lstsq(known, target).solution
        loss, best = ((g.flatten(1) - target).square().mean() for g in (guess, fitted))
        assert float(loss) == pytest.approx(float(best), rel=0.01)
        apart = Gaussian.of(data, full=False).velocity(x_t, torch.full((20_000,), time))
        assert (apart - (data - noise)).square().mean() > 1.002 * loss


def test_samples_of_a_gaussian_have_its_covariance():
    data = correlated(20_000)
    for full in (True, False):
        drawn = Gaussian.of(data, full).sample(normal(20_000, 2, 3, seed=2)).flatten(1)
        wanted = torch.cov(data.flatten(1).mT)
        wanted = wanted if full else wanted.diag().diag()
        assert (torch.cov(drawn.mT) - wanted).abs().max() < 0.05 * wanted.abs().max()
        assert (drawn.mean(dim=0) - 2).abs().max() < 0.2


def test_shuffled_clips_have_the_same_frames_in_another_order():
    clips = torch.arange(5 * 4).view(5, 4, 1)
    mixed = shuffled(clips, 0)
    assert torch.equal(mixed.sort(dim=1).values, clips)
    assert (mixed != clips).any(dim=1).all()
    assert torch.equal(mixed, shuffled(clips, 0))
    assert torch.equal(shuffled(clips[:, :1], 0), clips[:, :1])


def test_frechet_distance_of_known_gaussians():
    features = normal(50_000, 4)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    # Means 3 apart, and standard deviations of 1 and 2 in all four directions.
    assert frechet_distance(features, 2 * features + 3 / 2) == pytest.approx(4 * 1.5**2 + 4 * 1, rel=0.02)


def test_features_and_labels_of_clips():
    geometry = ClipGeometry(size=16, frames=8, channels=1)
    digits = MovingDigits(geometry, [b"three", b"nine"], np.full((2, 8, 8), 9, dtype=np.uint8))
    clips, names, ways = labelled(digits, 64, 0, 0)
    assert clips.shape == (64, 8, 1, 16, 16)
    assert set(names.tolist()) == {3, 9}
    assert set(ways.tolist()) <= set(range(25)) - {12}
    assert ClipClassifier(8, 1, 16)(clips).shape == (64, FEATURES)
    assert ClipClassifier(6, 3, 20)(torch.zeros(2, 6, 3, 20, 20)).shape == (2, FEATURES)


CPU = torch.device("cpu")


def bars():
    """Two digits, a bright one and a dark one, for training and held out."""
    geometry = ClipGeometry(size=16, frames=8, channels=1)
    pixels = np.stack([np.full((8, 8), value, dtype=np.uint8) for value in (250, 60)])
    digits = MovingDigits(geometry, [b"three", b"nine"], pixels)
    return VideoCorpus(train=digits, held_out=digits, description="")


def test_a_classifier_that_is_undertrained_is_refused():
    with pytest.raises(UserError, match=r"names \d.* of the real held-out clips after 0 steps"):
        train_classifier(bars(), 0, CPU)


def test_a_classifier_learns_names_and_captions_say_which_are_right(monkeypatch):
    monkeypatch.setattr(features_module, "CHECKED", 64)
    corpus = bars()
    checked = train_classifier(corpus, 30, CPU)
    assert checked.names >= 0.95
    assert not checked.model.training
    features = features_of(checked.model, random_clips(corpus.held_out, 40, 3), CPU, at_a_time=7)
    captions = captions_of(corpus.held_out, 40, 3)
    assert set(captions) == {b"three", b"nine"}
    assert named_right(checked.model, features, captions) >= 0.9
    swapped = [b"nine" if caption == b"three" else b"three" for caption in captions]
    assert named_right(checked.model, features, swapped) <= 0.1


def test_the_picture_that_plays_has_every_clip_and_frame(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    clips = np.random.default_rng(0).integers(0, 256, (DRAWS, 10, 8, 1, 16, 16), dtype=np.uint8)
    play(tmp_path / "a.gif", clips)
    with image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 8
        assert picture.size == (10 * 17 * 3, DRAWS * 17 * 3)
    assert (tmp_path / "a.gif").stat().st_size < 300_000  # of noise, the worst there is


def test_the_rows_that_are_kept_have_these_columns():
    for path in RESULTS.glob("flow-*.csv"):
        table = Table(path, COLUMNS, KEY)
        rows = table.rows()
        assert len({table.identity(row) for row in rows}) == len(rows) > 0
        assert all(float(row["real_named"]) >= 0.95 for row in rows if row["classifier"] == "pooled")


@pytest.mark.long
def test_the_classifier_names_held_out_digits():
    pytest.importorskip("sklearn", reason="scikit-learn (extra `video`) is not installed")
    corpus = open_videos([], None, ClipGeometry(size=16, frames=8, channels=1))
    checked = train_classifier(corpus, 400, CPU)
    assert checked.names >= 0.95
    assert sorted(set(corpus.held_out.captions)) == sorted(word.encode() for word in WORDS)


@pytest.mark.long
def test_the_command_measures_and_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.flow.__main__.GAUSSIAN_CLIPS", 2048)
    monkeypatch.setattr(features_module, "LEAST_NAMED", 0.0)
    pytest.importorskip("sklearn", reason="scikit-learn (extra `video`) is not installed")
    command = [
        *("--steps", "2", "--codec-steps", "2", "--batch", "8", "--dim", "32", "--layers", "1"),
        *("--clips", "128", "--classifier-steps", "2", "--sample-steps", "1", "--sampler", "euler"),
        *("--device", "cpu", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")),
        *("--commit", "c"),
    ]  # fmt: skip
    for _ in range(2):  # a step of the autoencoder; its other step and one of the flow
        assert main([*command, "--minutes", "0"]) == 75
    assert not (tmp_path / "results").exists()
    assert main(command) == 0
    with open(tmp_path / "results/flow-cpu.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == COLUMNS
    assert float(row["velocity_loss"]) > float(row["gaussian_loss"]) > 0
    assert float(row["independent_gaussian_loss"]) > float(row["gaussian_loss"])
    assert float(row["training_distance"]) < float(row["gaussian_distance"])
    assert all(0 <= float(row[name]) <= 1 for name in ("real_named", "coded_named", "drawn_named"))
    assert row["classifier_steps"] == "2"
    for ending in ("png", "gif"):
        assert 0 < (tmp_path / f"results/flow-cpu.{ending}").stat().st_size < 300_000
    out = capsys.readouterr().out
    assert summary(row) in out
    assert main(command) == 0
    assert "step" not in capsys.readouterr().out.splitlines()[0]
    assert main([*command, "--clips", "5"]) == 2
    # Another set of clips is another row, on what was trained already.
    assert main([*command, "--clips", "130"]) == 0
    assert "step 1" not in capsys.readouterr().out
