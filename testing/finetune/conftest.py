"""A base so small that a finetune's step takes milliseconds."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arbitor.cli import main
from arbitor.config import ModelConfig
from arbitor.model import ARBModel
from testing.small_run import MODEL, one_thread  # noqa: F401 - a fixture that runs by itself

SMALL = {
    **MODEL,
    "ctx": 32,
}
TOML = "[model]\n" + "".join(f"{name} = {value}\n" for name, value in SMALL.items())
TOML += "[train]\nsteps = 3\nbatch = 4\neval_steps = 4\ndevice = 'cpu'\n"
PARTS = {"motif_trits": 4, "num_experts": 3, "expert_dim": 32, "graph_edges": 64, "output_router": True}


@pytest.fixture
def make_model() -> Callable[..., ARBModel]:
    """make_model(seed=0, **fields of ModelConfig) -> a small model."""

    def make(seed: int = 0, **overrides) -> ARBModel:
        torch.manual_seed(seed)
        return ARBModel(config=ModelConfig(**{**SMALL, **overrides})).eval()

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run `base` and conversations `talk.jsonl`."""
    folder = tmp_path_factory.mktemp("base")
    former = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("arbitor.train.report.SAMPLE_BYTES", 4)
            Path("data.txt").write_text("".join(f"line {i}: {i * i % 97}\n" for i in range(200)))
            Path("small.toml").write_text(TOML)
            assert main(["train", "--data", "data.txt", "--config", "small.toml", "--run", "base"]) == 0
    finally:
        os.chdir(former)
    lines = [json.dumps({"prompt": f"say {i}", "response": f"<{i}>"}) for i in range(60)]
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch) -> Path:
    """A copy of `trained` as the current folder."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def finetune(workplace) -> Callable[..., int]:
    """finetune(*flags) -> exit code of `arbitor finetune base` on the conversations."""

    def run(*flags: str) -> int:
        return main(["finetune", "base", "--data", "talk.jsonl", "--batch", "4", "--device", "cpu", *flags])

    return run
