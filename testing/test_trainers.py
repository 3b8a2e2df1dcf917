"""A small training run from the command line learns, and leaves everything that others build on."""

import json
import math
from pathlib import Path

import pytest
import torch

import arbitor
from arbitor.cli import main
from arbitor.config import load_config

UNIFORM = math.log2(288)  # bits per byte of a model that knows nothing
STEPS = 60
TOML = f"""
[model]
dim = 64
num_prelude_layers = 1
num_heads = 2
head_dim = 16
rope_dim = 8
value_dim = 32
kv_latent_dim = 32
ffn_dim = 128
ctx = 32
[train]
steps = {STEPS}
batch = 8
eval_steps = 16
eval_interval = 20
save_interval = 30
device = "cpu"
"""
STEP_KEYS = ["step", "bytes_seen", "loss", "bits_per_byte", "lr", "bytes_per_second", "memory", "flip_rate"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Folder of a finished run on text of a simple pattern."""
    folder = tmp_path_factory.mktemp("trainers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("arbitor.train.report.SAMPLE_BYTES", 40)
        lines = [f"def f_{i % 50}(x):\n    return x + {i % 7}\n\n" for i in range(600)]
        Path("data.py").write_text("".join(lines))
        Path("small.toml").write_text(TOML)
        assert main(["train", "--data", "data.py", "--config", "small.toml", "--run", "learns"]) == 0
    torch.set_num_threads(threads)
    return folder / "runs" / "learns"


@pytest.fixture(scope="module")
def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_well_below_a_uniform_guess(lines):
    losses = [line["bits_per_byte"] for line in lines if "loss" in line]
    assert losses[0] > UNIFORM - 1
    assert sum(losses[-5:]) / 5 < 0.4 * UNIFORM
    held_out = [line["held_out_bits_per_byte"] for line in lines if "loss" not in line]
    assert all(later < 0.7 * held_out[0] for later in held_out[1:])
    assert held_out[-1] < 0.4 * UNIFORM


def test_the_folder_holds_what_is_promised(run):
    visible = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert visible == {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "loss.png",
        "sample.txt",
        "latest",
        "best",
        "final",
    }
    for checkpoint in ("latest", "best", "final"):
        assert {path.name for path in (run / checkpoint).iterdir()} == {
            "model.safetensors",
            "optimizer.safetensors",
            "state.json",
            "config.toml",
        }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    data = (run.parents[1] / "data.py").read_text()
    prompt = (run / "sample.txt").read_text(encoding="utf-8")[:32]
    assert data.count(prompt) > 0  # the sample goes on from held-out data


def test_every_step_has_its_line(lines):
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert list(line) == STEP_KEYS
        assert line["bytes_seen"] == line["step"] * 8 * 32
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
        assert line["bytes_per_second"] > 0
        assert line["memory"] > 1 << 20
        assert 0 <= line["flip_rate"] <= 1
    assert max(line["flip_rate"] for line in steps) > 0
    assert max(line["lr"] for line in steps) == pytest.approx(0.05)
    assert [line["step"] for line in lines if "held_out_bits_per_byte" in line] == [20, 40, 60]


def test_the_summary(run, lines):
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["held_out_bits_per_byte"] < 0.4 * UNIFORM
    assert summary["held_out_bytes"] > 1000
    model = arbitor.load(run / "final", device="cpu")
    weights = sum(m.numel() for m in model.modules() if isinstance(m, arbitor.TernaryScaleTensor))
    assert summary["trit_weights"] == weights
    assert 2.2 < summary["bytes_per_weight"] < 3.0  # narrow matrices pay for padding
    assert 2.2 < summary["trunk_bytes_per_weight"] < 3.0
    files = sum((run / "final" / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    assert summary["state_bytes"] < files < summary["state_bytes"] + 20_000
    assert summary["steps"] == STEPS
    assert summary["bytes_seen"] == STEPS * 8 * 32
    assert summary["seconds"] > 0
    assert summary["device"] == "cpu"
    assert summary["version"] == arbitor.__version__


def test_the_resolved_config_is_saved(run):
    config = load_config(run / "config.toml")
    assert (config.preset, config.model.dim, config.train.steps) == ("tiny", 64, STEPS)
    assert config.data.data == ("data.py",)
    assert load_config(run / "final" / "config.toml") == config


def test_no_checkpoint_holds_a_float(run):
    for checkpoint in ("latest", "best", "final"):
        from arbitor.ternary.audit import audit_checkpoint

        assert audit_checkpoint(run / checkpoint).ok


def test_equal_runs_are_equal(run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    monkeypatch.setattr("arbitor.train.report.SAMPLE_BYTES", 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["train", "--data", "data.py", "--config", "small.toml", "--run", "again"]) == 0
    torch.set_num_threads(threads)
    for path in (run / "final").iterdir():
        assert path.read_bytes() == (run.parent / "again" / "final" / path.name).read_bytes(), path.name
    assert (run / "sample.txt").read_bytes() == (run.parent / "again" / "sample.txt").read_bytes()
