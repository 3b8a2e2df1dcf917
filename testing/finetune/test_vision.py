"""Finetuning on captions of images: adapters and votes, exact resume, refusals."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from arbitor.cli import main
from arbitor.config import ModelConfig
from arbitor.data.images import Geometry
from arbitor.finetune.data import open_captions
from arbitor.finetune.instructions import collate, prefix_of
from arbitor.model import ARBModel
from testing.finetune.conftest import TOML

TRAIN = ["--config", "small.toml", "--data", "images", "--enable-vision", "--image-size", "8"]


@pytest.fixture
def seeing(workplace, monkeypatch):
    """A run `eyes` in the current folder, which was trained on other captions than those of `images`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    for place, words in (("images", ("dark", "bright")), ("others", ("black", "white"))):
        Path(place).mkdir()
        for n in range(30):
            value = (0 if n % 2 else 200) + n
            Image.new("L", (8, 8), value).save(f"{place}/{n:02}.png")
            Path(f"{place}/{n:02}.txt").write_text(words[value > 100])
    Path("small.toml").write_text(TOML)
    flags = ["--image-patch", "4", "--image-channels", "1", "--run", "eyes"]
    assert main(["train", *TRAIN, *flags]) == 0
    return workplace


def finetune(*flags):
    fixed = ["--enable-vision", "--data", "others", "--batch", "4", "--device", "cpu"]
    return main(["finetune", "eyes", *fixed, *flags])


@pytest.mark.parametrize("full", [(), ("--full",)], ids=["adapters", "votes"])
def test_new_captions_are_learnt(seeing, capsys, full):
    before = Path("runs/eyes/best/model.safetensors").read_bytes()
    assert finetune("--steps", "60", "--run", "f", *full) == 0
    summary = json.loads(Path("runs/f/summary.json").read_text())
    assert summary["held_out_answer_loss"] < 0.2 * summary["held_out_answer_loss_before"]
    assert summary["held_out_images"] == 3
    assert "model: black\nright: black" in Path("runs/f/sample.txt").read_text()
    assert Path("runs/eyes/best/model.safetensors").read_bytes() == before
    assert "generate f --image FILE" in capsys.readouterr().out
    Image.new("L", (30, 30), 5).save("one.png")
    assert main(["generate", "f", "--image", "one.png", "--temperature", "0", "--device", "cpu"]) == 0


def test_a_resumed_finetune_is_equal(seeing, monkeypatch):
    assert finetune("--steps", "6", "--run", "whole", "--save-interval", "0", "--eval-interval", "0") == 0

    def stop(self, _step=[0]):  # noqa: B006 - counts the calls
        _step[0] += 1
        if _step[0] == 4:
            self.guard.received = 2
        return take(self)

    from arbitor.finetune.loop import Finetune

    take = Finetune._take_step
    flags = ("--steps", "6", "--run", "half", "--save-interval", "0", "--eval-interval", "0")
    with monkeypatch.context() as patch:
        patch.setattr(Finetune, "_take_step", stop)
        assert finetune(*flags) == 130
    assert main(["finetune", "--resume", "--run", "half"]) == 0
    one, two = (Path(f"runs/{run}/final/adapter_model.safetensors").read_bytes() for run in ("whole", "half"))
    assert one == two


def test_a_base_of_text_is_refused(workplace, capsys):
    assert main(["finetune", "base", "--enable-vision", "--device", "cpu"]) == 2
    assert "takes no images" in capsys.readouterr().err
    assert not list(Path("runs").glob("base-*"))


def test_the_image_stands_ahead_of_its_caption(seeing):
    data = open_captions(["images"], None, 32, Geometry(size=8, channels=1))
    changed = open_captions(["others"], None, 32, Geometry(size=8, channels=1))
    assert data.fingerprint() != changed.fingerprint()
    torch.manual_seed(0)
    model = ARBModel(config=ModelConfig(dim=32, ctx=32, image_size=8, image_patch=4, image_channels=1))
    batch = data.train[:3]
    ids, is_answer = collate(batch)
    bright, dark = ([*[256] * 3, *word, 257] for word in (b"bright", b"dark"))
    assert ids.tolist() == [bright, [*dark, 256, 256], bright]
    assert is_answer.sum(1).tolist() == [7, 5, 7]
    prefix = prefix_of(model, batch)
    assert prefix.shape == (3, 4, 32)
    assert torch.equal(prefix[1:2], model.encode("image", torch.from_numpy(batch[1].pixels)[None]))
