"""On instructions made from real text, a finetune learns what its base cannot do."""

import json
from pathlib import Path

import pytest

from arbitor.cli import main

TOML = """
[model]
dim = 64
num_prelude_layers = 2
num_heads = 2
head_dim = 16
rope_dim = 16
value_dim = 32
kv_latent_dim = 64
ffn_dim = 128
ctx = 96
[train]
steps = 120
batch = 16
eval_steps = 8
device = "cpu"
"""


def instructions(lines: list[str]) -> str:
    """For every line of 12 to 30 characters: say it in upper case."""
    records = [
        {"prompt": f"Shout: {line}", "response": line.upper()} for line in lines if 12 <= len(line) <= 30
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["--full"]], ids=["adapter", "full"])
def test_held_out_answers_improve_by_a_third(data_folder, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.train.report.SAMPLE_BYTES", 2)
    text = (data_folder / "text" / "tinyshakespeare.txt").read_text()
    cut = len(text) * 9 // 10
    Path("train.txt").write_text(text[:cut])
    Path("small.toml").write_text(TOML)
    Path("talk.jsonl").write_text(instructions(text[:cut].splitlines()[:8000]))
    Path("held.jsonl").write_text(instructions(text[cut:].splitlines()))
    assert main(["train", "--data", "train.txt", "--config", "small.toml", "--run", "base"]) == 0
    data = ["--data", "talk.jsonl", "--held-out", "held.jsonl"]
    assert main(["finetune", "base", *data, "--steps", "120", "--lr", "0.02", "--run", "tuned", *flags]) == 0
    summary = json.loads(Path("runs/tuned/summary.json").read_text())
    assert summary["held_out_conversations"] == 256
    # A third below the base, and well below 3.14 nats, the entropy of single ids of these answers: knowing
    # how often each comes would not do.
    assert summary["reduction"] > 1 / 3
    assert summary["held_out_answer_loss"] < 2.6
