"""Training a model with all parts: what is logged, what a checkpoint holds, that resuming changes nothing."""

import json
from pathlib import Path

import pytest
import torch

from arbitor.ternary import named_ternary
from arbitor.train.checkpoint import build_model, load, load_checkpoint
from arbitor.train.report import captured_bytes, describe_parts
from arbitor.train.session import start_training

PARTS = {
    "motif_trits": 3,
    "num_experts": 4,
    "expert_dim": 32,
    "graph_edges": 64,
    "graph_heads": 2,
    "memory_rows": 31,
    "memory_heads": 2,
    "memory_dim": 16,
    "memory_over": "motifs",
    "output_router": True,
    "num_coda_layers": 1,
}
READINGS = {
    "ponder",
    "diversity",
    "router",
    "mean_iterations",
    "expert_load",
    "motif_perplexity",
    "motif_dead_share",
    "graph_edges",
    "graph_reach",
    "router_accuracy",
}


def lines_of(run):
    lines = [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(("interval", "read"), [(1, set(range(1, 7))), (3, {2, 3, 4, 6})])
def test_a_reading_has_the_figures_of_the_parts(workplace, settings, interval, read):
    settings |= {"steps": 6, "eval_interval": 0, "save_interval": 2, "log_interval": interval}
    assert start_training({**settings, **PARTS}, run="r") == 0
    plain = {"step", "bytes_seen", "loss", "bits_per_byte", "lr", "bytes_per_second", "memory", "flip_rate"}
    for line in lines_of("r"):
        assert set(line) == plain | (READINGS if line["step"] in read else set())
        assert line["loss"] == pytest.approx(line["bits_per_byte"] * 0.6931471805599453)
    last = lines_of("r")[-1]
    assert 1 <= last["mean_iterations"] <= 4
    assert last["mean_iterations"] < last["ponder"] <= last["mean_iterations"] + 1
    assert 1 <= last["expert_load"] <= 2
    assert 1 <= last["motif_perplexity"] <= 27
    assert last["graph_edges"] == int(last["graph_edges"]) > 0


def test_the_loss_that_is_logged_is_that_of_the_text(make_trainer):
    trainer = make_trainer(0, accum=2, **PARTS)
    outputs = []
    trainer.model.register_forward_hook(lambda _, __, output: outputs.append(output))
    loss = trainer.take_step()
    assert float(loss) == pytest.approx(sum(float(o.losses["text"].detach()) for o in outputs) / 2, rel=1e-6)
    ponder = sum(float(o.losses["ponder"].detach()) for o in outputs) / 2
    assert float(trainer.readings["ponder"]) == pytest.approx(ponder, rel=1e-6)
    assert float(loss) < sum(float(o.loss.detach()) for o in outputs) / 2 - 0.01
    assert not any(t.requires_grad for t in (loss, *trainer.readings.values()))


def test_a_model_without_parts_logs_what_it_always_did(workplace, settings):
    assert start_training({**settings, "steps": 2}, run="r") == 0
    assert list(lines_of("r")[0]) == [
        "step",
        "bytes_seen",
        "loss",
        "bits_per_byte",
        "lr",
        "bytes_per_second",
        "memory",
        "flip_rate",
    ]


@pytest.mark.parametrize("state", ["full", "lean"])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path, state):
    whole = make_trainer(6, state=state, **PARTS)
    first = make_trainer(3, state=state, **PARTS)
    first.save(tmp_path / "latest")
    second = make_trainer(3, load_checkpoint(tmp_path / "latest"), state=state, **PARTS)
    kept = [dict(t.model.state_dict()) | t.optimizer.named_state() for t in (whole, second)]
    assert kept[0].keys() == kept[1].keys()
    assert [name for name in kept[0] if not torch.equal(kept[0][name], kept[1][name])] == []
    counters = [name for name in kept[0] if name.endswith(("balance.bias", "graph.score"))]
    assert len(counters) == 2
    assert all(kept[0][name].any() for name in counters)


def test_a_checkpoint_alone_gives_the_model(make_trainer, tmp_path):
    trainer = make_trainer(3, **PARTS)
    trainer.save(tmp_path / "latest")
    ids = torch.from_numpy(trainer.task.sampler.next())
    assert torch.equal(load(tmp_path / "latest", "cpu")(ids).logits, trainer.model.eval()(ids).logits)


def test_a_memory_of_the_host_is_not_loaded_onto_the_device(make_trainer, tmp_path):
    make_trainer(1, memory_host=True, **PARTS).save(tmp_path / "latest")
    checkpoint = load_checkpoint(tmp_path / "latest")
    model = build_model(tmp_path, checkpoint.model_config, checkpoint.weights, "meta")
    assert model.memory.key.T_packed.device.type == "meta"
    assert torch.equal(model.memory.table.T_packed, checkpoint.weights["memory.table.T_packed"])


def test_evaluation_changes_neither_state_nor_readings(make_trainer):
    trainer = make_trainer(2, **PARTS)
    readings = dict(trainer.readings)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    first, second = trainer.evaluate(max_windows=3), trainer.evaluate(max_windows=3)
    assert first == second
    assert all(torch.equal(before[name], t) for name, t in trainer.model.state_dict().items())
    assert trainer.readings == readings


def test_the_parts_are_named_at_the_start(workplace, settings, capsys):
    assert start_training({**settings, **PARTS, "steps": 1}, run="r") == 0
    words = (
        "3^3 motifs; memory over motifs: 4 tables of 31 rows; 4 experts, 2 active and one shared; "
        "graph of 64 edges; at most 4 iterations; output router"
    )
    assert f"parts     {words}\n" in capsys.readouterr().out


def test_parts_are_described_as_they_are(make_config):
    assert describe_parts(make_config().model) == ""
    learned = make_config(codebook_rows=1000, max_moe_iters=1, num_experts=2).model
    assert describe_parts(learned) == (
        "1,000 learned motifs; 2 experts, 2 active and one shared; at most 1 iteration"
    )
    assert describe_parts(make_config(memory_rows=5, memory_host=True).model).endswith("5 rows on the host")


@pytest.mark.parametrize("iters", [1, 4])
def test_the_estimate_of_captured_gradients_is_what_is_captured(make_trainer, iters):
    changes = {**PARTS, "expert_dim": 320, "num_experts": 8, "max_moe_iters": iters}
    trainer = make_trainer(0, batch=1, **changes)
    if iters > 1:  # no position halts early
        trainer.model.core.halting.bias.q.fill_(-95)
    ids = torch.from_numpy(trainer.task.sampler.next())
    trainer.model(ids, targets=ids).loss.backward()
    assert float(trainer.model.part_metrics()["mean_iterations"]) > 0.95 * iters
    captured = 0
    for _, module in named_ternary(trainer.model):
        held = {key: value for key, value in vars(module.capture).items() if key.startswith("_")}
        flat = [held.get("_dense"), *(held.get("_pairs") or []), *(held.get("_uses") or [])]
        captured += sum(
            tensor.nbytes
            for use in flat
            for tensor in (use if isinstance(use, tuple) else [use])
            if tensor is not None
        )
    # A window of 16 bytes has 14 positions.
    assert 0.8 < captured / captured_bytes(trainer) < 1.02


def test_every_loss_is_noted_whole(make_trainer, monkeypatch):
    trainer = make_trainer(0, accum=2, **PARTS)
    outputs, noted = [], []
    trainer.model.register_forward_hook(lambda _, __, output: outputs.append(output))
    monkeypatch.setattr(trainer.optimizer, "note_loss", noted.append)
    trainer.take_step()
    assert [id(loss) for loss in noted] == [id(output.loss) for output in outputs]
