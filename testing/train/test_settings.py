"""Every training setting does what it says: a run is compared, bit for bit, with a loop written out here."""

import json
import math
from pathlib import Path

import pytest
import torch

from arbitor.config import load_config, preset
from arbitor.data import Sampler, open_corpus
from arbitor.model import ARBModel
from arbitor.ops.backend import has_bf16_products, rounded_gradients
from arbitor.ternary import VoteOptimizer
from arbitor.train import schedule
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.loop import Trainer
from arbitor.train.session import start_training

STEPS = 12
RUN = Path("runs") / "r"
QUIET = {"steps": STEPS, "eval_interval": 0, "save_interval": 0}
# What a state stands for where nothing is said, and what it becomes.
DEFAULT_LR = {"full": 0.05, "compact": 0.07, "lean": 0.15}
CHANGES = [
    {},
    {"lr": 0.4},
    {"rule": "row"},
    {"rule": "sinkhorn"},
    {"rule": "sign"},
    {"state": "compact"},
    {"state": "lean"},
    {"accum_threshold": 20},
    {"scale_lr": 0.5},
    {"scale_lr": 0.5, "e_accum_threshold": 3},
    {"warmup": 0.0},
    {"warmup": 0.5},
    {"seed": 7},
    {"batch": 2},
    {"accum": 3},
]
IDS = [" ".join(f"{name}={value}" for name, value in change.items()) or "defaults" for change in CHANGES]


def peak_rate(config) -> float:
    train = config.train
    return train.lr or (0.05 if train.rule == "sign" else DEFAULT_LR[train.state])


def expected_rates(config) -> list[float]:
    """A linear rise over the share `warmup` of the steps, then half a cosine towards 0."""
    train, peak = config.train, peak_rate(config)
    rising = round(train.warmup * train.steps)
    rates = [peak * (i + 1) / rising for i in range(rising)]
    falling = train.steps - rising
    return rates + [peak / 2 * (1 + math.cos(math.pi * i / falling)) for i in range(falling)]


def trained_here(config) -> tuple[dict, list[float]]:
    """Weights and state of `config`, and the loss of each step, by nothing of the training loop."""
    train = config.train
    torch.manual_seed(train.seed)
    model = ARBModel(config=config.model)
    optimizer = VoteOptimizer(
        model,
        train.lr,
        train.rule,
        train.state,
        train.seed,
        accum_threshold=train.accum_threshold,
        e_accum_threshold=train.e_accum_threshold,
    )
    corpus = open_corpus(config.data.data, min_bytes=config.model.ctx)
    sampler = Sampler(corpus.train, train.batch, config.model.ctx, train.seed)
    losses = []
    for rate in expected_rates(config):
        group = optimizer.param_groups[0]
        group["lr"], group["scale_lr"] = rate, train.scale_lr * rate / peak_rate(config)
        total = 0.0
        for _ in range(train.accum):
            ids = torch.from_numpy(sampler.next())
            loss = model(ids, targets=ids).loss
            (loss / train.accum).backward()
            total += float(loss.detach()) / train.accum
        losses.append(total)
        optimizer.step()
    return dict(model.state_dict()) | optimizer.named_state(), losses


@pytest.mark.parametrize("change", CHANGES, ids=IDS)
def test_a_run_is_the_loop_written_out(workplace, settings, change):
    settings |= QUIET
    usual = preset("tiny", **settings)
    settings |= change
    assert start_training(settings, run="r") == 0
    saved = load_checkpoint(RUN / "latest")
    kept = saved.weights | saved.optimizer_state
    with rounded_gradients(has_bf16_products()):  # as training rounds them on a CPU that has such products
        expected, losses = trained_here(preset("tiny", **settings))
    assert kept.keys() == expected.keys()
    assert [name for name in kept if not torch.equal(kept[name], expected[name])] == []
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["lr"] for line in steps] == pytest.approx(expected_rates(preset("tiny", **settings)))
    assert [line["loss"] for line in steps] == pytest.approx(losses, rel=1e-6)
    if change:  # so that the comparison is not one of two runs that ignore the setting alike
        with rounded_gradients(has_bf16_products()):
            other, _ = trained_here(usual)
        assert any(not torch.equal(kept[name], other[name]) for name in kept.keys() & other.keys())


def test_a_long_run_has_a_lower_peak_unless_one_is_given(workplace, settings, monkeypatch):
    monkeypatch.setattr(schedule, "STATES_STEPS", STEPS // 4)
    assert start_training(settings | QUIET, run="r") == 0
    assert load_config(RUN / "config.toml").train.lr == pytest.approx(0.025)
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("lr", 0) for line in lines) == pytest.approx(0.025)
    assert start_training({**settings, **QUIET, "lr": 0.3}, run="given") == 0
    assert load_config(Path("runs/given/config.toml")).train.lr == 0.3


def test_the_optimizer_has_the_thresholds_of_the_settings(make_trainer):
    optimizer = make_trainer(accum_threshold=40, e_accum_threshold=9, scale_lr=0.25, seed=5).optimizer
    assert (optimizer.accum_threshold, optimizer.span, optimizer.rail) == (40, 80, 39)
    assert optimizer.e_accum_threshold == 9
    assert optimizer.seed == 5
    assert optimizer.param_groups[0]["scale_lr"] == 0.25


def test_the_seed_is_of_weights_data_order_and_rounding(make_trainer):
    one, two = make_trainer(seed=0), make_trainer(seed=3)
    assert not torch.equal(one.model.head.q, two.model.head.q)
    assert one.task.sampler.next().tolist() != two.task.sampler.next().tolist()
    assert (one.optimizer.seed, two.optimizer.seed) == (0, 3)


def test_eval_steps_are_the_windows_of_an_evaluation(workplace, settings, monkeypatch):
    asked = []
    evaluate = Trainer.evaluate

    def noted(self, *, max_windows=None, progress=None):
        asked.append(max_windows)
        return evaluate(self, max_windows=max_windows, progress=progress)

    monkeypatch.setattr(Trainer, "evaluate", noted)
    assert start_training({**settings, "eval_steps": 7}, run="r") == 0
    assert asked[:3] == [7, 7, 7]
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    # The first window of 16 predicts 13 bytes, each one after it 8.
    assert [line["held_out_bytes"] for line in lines if "loss" not in line] == [13 + 6 * 8] * 3


def test_a_checkpoint_of_every_interval_is_written(workplace, settings, monkeypatch):
    saved = []
    save = Trainer.save

    def noted(self, folder, **rest):
        saved.append((folder.name, self.step))
        save(self, folder, **rest)

    monkeypatch.setattr(Trainer, "save", noted)
    assert start_training({**settings, "eval_interval": 0, "save_interval": 5}, run="r") == 0
    assert [step for name, step in saved if name == "latest"] == [5, 10, 12]
