"""Runs that learn captions of images: exact resume, what is logged, growth from a text run, the flags."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from arbitor.cli import main
from arbitor.config import ENCODER_FIELDS, load_config
from arbitor.data.images import Geometry, open_images
from arbitor.errors import UserError
from arbitor.ternary.audit import audit_checkpoint
from arbitor.train.checkpoint import load, load_checkpoint
from arbitor.train.device import deterministic
from arbitor.train.loop import Trainer
from arbitor.train.session import start_training

EYES = {"image_size": 8, "image_patch": 4, "image_channels": 1}


@pytest.fixture
def folder(workplace, monkeypatch):
    """Images of one grey each, called dark or bright; the current folder is the one above."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    place = workplace / "images"
    place.mkdir()
    for n in range(30):
        value = (0 if n % 2 else 200) + n
        Image.new("L", (8, 8), value).save(place / f"{n:02}.png")
        (place / f"{n:02}.txt").write_text("dark" if value < 100 else "bright")
    return place


@pytest.fixture
def vision(settings, folder):
    return {**settings, **EYES, "data": ["images"], "steps": 6}


def lines_of(run):
    return [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_says_how_many_captions_are_right(vision, capsys):
    assert start_training({**vision, "steps": 40, "lr": 0.1, "eval_interval": 20}, run="r") == 0
    evaluations = [line for line in lines_of("r") if "captions_right" in line]
    assert [line["step"] for line in evaluations] == [20, 40]
    assert all(line["held_out_bits_per_byte"] > 0 for line in evaluations)
    summary = json.loads(Path("runs/r/summary.json").read_text())
    assert summary["captions_right"] == 1
    assert summary["held_out_whole"] is True
    # Numbers 9, 19 and 29 are dark: 3 captions of 4 bytes and EOS.
    assert summary["held_out_bytes"] == 15
    assert Path("runs/r/sample.txt").read_text() == "dark\ndark\ndark"
    printed = capsys.readouterr().out
    assert "captions  100.00 % of the held-out ones written right\n" in printed
    assert "27 images to train on, 3 held out (one of 10)" in printed
    assert "grey images of 8 x 8 in 4 patches" in printed
    assert "next: arbitor generate r --image FILE --temperature 0" in printed
    Image.new("L", (20, 20), 10).save("one.png")
    assert main(["generate", "r", "--image", "one.png", "--temperature", "0", "--device", "cpu"]) == 0
    assert main(["audit", "r"]) == 0
    report = audit_checkpoint(Path("runs/r/latest"))
    assert report.ok
    assert "sidecars.image.embed.T_packed" in {row.name for row in report.rows}


def kept(trainer):
    return dict(trainer.model.state_dict()) | trainer.optimizer.named_state()


@pytest.mark.parametrize("state", ["full", "lean"])
def test_a_resumed_run_equals_an_uninterrupted_one(make_config, vision, cpu, tmp_path, state):
    config = make_config(**{**vision, "state": state, "accum": 2})

    def trainer(steps, checkpoint=None):
        corpus = open_images(config.data.data, None, Geometry(size=8, channels=1))
        with deterministic(0, cpu.device):
            made = Trainer(config, corpus, cpu, checkpoint)
            losses = [float(made.take_step()) for _ in range(steps)]
        return made, losses

    whole, losses = trainer(6)
    first, early = trainer(2)
    first.save(tmp_path / "latest")
    second, middle = trainer(2, load_checkpoint(tmp_path / "latest"))
    second.save(tmp_path / "latest")
    third, late = trainer(2, load_checkpoint(tmp_path / "latest"))
    assert early + middle + late == losses
    assert kept(whole).keys() == kept(third).keys()
    assert [name for name, tensor in kept(whole).items() if not torch.equal(tensor, kept(third)[name])] == []
    assert whole.task.sampler_state() == third.task.sampler_state()


def test_other_images_are_no_resume(vision):
    assert start_training({**vision, "steps": 2}, run="r") == 0
    (Path("images") / "03.txt").write_text("other")
    with pytest.raises(UserError, match="training images are not what they were"):
        start_training({"steps": 4}, run="r", resume=True)


def test_bad_images_do_not_stop_a_run(vision, folder, capsys):
    (folder / "01.png").write_bytes(b"no image")
    (folder / "02.txt").unlink()
    (folder / "03.txt").write_text("a caption that is much longer than the context of sixteen bytes")
    assert start_training({**vision, "steps": 2}, run="r") == 0
    printed = capsys.readouterr().out
    assert "skipped 1 damaged, 1 without a caption; 1 captions are cut to the context of 16 bytes" in printed


def test_a_text_run_grows_into_one_that_sees(workplace, settings, vision, capsys):
    assert start_training({**settings, "steps": 3}, run="text") == 0
    before = (Path("runs/text/latest/model.safetensors")).read_bytes()
    capsys.readouterr()
    grown = {**EYES, "data": ["images"], "steps": 2, "lr": 1e-9, "batch": 2}
    assert start_training(grown, run="text", resume=True) == 0
    printed = capsys.readouterr().out
    old = load_checkpoint(Path("runs/text/latest"))
    assert (
        f"grown from runs/text/latest (step 3): {len(old.weights)} tensors taken over\n"
        "added, 640 weights: sidecars.image.embed, sidecars.image.rows, sidecars.image.columns\n"
        "left out: nothing\n"
        "training state taken over: all of it; steps, schedule and data begin anew\n"
    ) in printed
    assert Path("runs/text/latest/model.safetensors").read_bytes() == before, "the old run stays as it is"
    new = load_checkpoint(Path("runs/tiny-1/latest"))
    config = load_config("runs/tiny-1/config.toml")
    assert (config.train.steps, config.model.dim, config.data.data) == (2, 32, ("images",))
    trits = [name for name in old.weights if name.endswith("T_packed")]
    # At this rate nothing flips but what stood at a flip already.
    same = [(new.weights[name] == old.weights[name]).float().mean() for name in trits]
    assert min(same) > 0.95
    assert start_training({"steps": 4}, run="tiny-1", resume=True) == 0, "and is a run like any other"
    ids = torch.arange(16)[None]
    assert load("runs/tiny-1", "cpu")(ids).logits.shape == (1, 14, 288)


def test_growth_with_another_state_says_what_is_left_out(settings, vision, capsys):
    assert start_training({**settings, "steps": 2}, run="text") == 0
    capsys.readouterr()
    grown = {**EYES, "data": ["images"], "steps": 1, "batch": 2, "state": "lean", "lr": 0.1}
    assert start_training(grown, run="text", resume=True) == 0
    assert "of its tensors left out (M, M_exp); steps" in capsys.readouterr().out


def test_growth_keeps_what_the_text_model_knew(make_trainer, vision, cpu, make_config, tmp_path):
    """Weights and training state of the old parts are the checkpoint's; of the new ones, what was drawn."""
    base = make_trainer(3)
    base.save(tmp_path / "latest")
    config = make_config(**vision)
    corpus = open_images(config.data.data, None, Geometry(size=8, channels=1))
    with deterministic(0, cpu.device):
        grown = Trainer(config, corpus, cpu, base=load_checkpoint(tmp_path / "latest"))
    for name, tensor in kept(base).items():
        assert torch.equal(kept(grown)[name], tensor), name
    assert kept(grown)["sidecars.image.embed.T_accum"].any(), "what initialisation rounded away is kept"
    ids = torch.arange(16)[None]
    assert torch.equal(grown.model(ids).logits, base.model(ids).logits)
    larger = make_config(**{**vision, "ffn_dim": 128})
    with pytest.raises(UserError, match=r"cannot grow into this model: prelude.0.ffn"):
        Trainer(larger, corpus, cpu, base=load_checkpoint(tmp_path / "latest"))


def test_the_folder_of_an_encoder_is_not_needed_to_grow(vision, monkeypatch):
    class Encoder(torch.nn.Module):
        """Stands for `FrozenEncoder`, which needs transformers."""

        width = 16

        def __init__(self, architecture, device=None):
            super().__init__()
            self.register_buffer("codes", torch.zeros(1, dtype=torch.int8, device=device))

        def forward(self, pixels):
            return torch.ones(len(pixels), 4, self.width) * self.codes

    def take(model, source):
        if source != "there":
            raise UserError(f"{source} is gone")
        model.sidecars["image"].encoder.codes.fill_(7)

    monkeypatch.setattr("arbitor.sidecars.encoder.FrozenEncoder", Encoder)
    monkeypatch.setattr("arbitor.model.ARBModel.take_encoder", take)
    architecture = json.dumps({**dict.fromkeys(ENCODER_FIELDS, 1), "patch_size": 4})
    frozen = {"image_encoder": architecture, "encoder": "there"}
    assert start_training({**vision, **frozen, "steps": 1}, run="sees") == 0
    monkeypatch.setattr("arbitor.model.ARBModel.take_encoder", lambda *_: pytest.fail("is not needed"))
    assert start_training({"data": ["images"], "steps": 1}, base="sees", run="grown") == 0
    grown = load_checkpoint(Path("runs/grown/latest"))
    assert grown.weights["sidecars.image.encoder.codes"].tolist() == [7]
    with pytest.raises(pytest.fail.Exception):
        start_training({**vision, **frozen, "steps": 1}, run="anew")


def test_flags(folder, capsys):
    Path("small.toml").write_text(
        "[model]\ndim = 32\nnum_prelude_layers = 1\nkv_latent_dim = 32\nffn_dim = 64\nctx = 16\n"
        "[train]\nsteps = 1\nbatch = 2\neval_steps = 2\n"
    )
    train = ["train", "--config", "small.toml", "--data", "images", "--device", "cpu"]
    assert main([*train, "--run", "a", "--enable-image", "--image-size", "12", "--image-patch", "6"]) == 0
    model = load_config("runs/a/config.toml").model
    assert (model.image_size, model.image_patch, model.image_channels) == (12, 6, 3)
    assert main([*train, "--run", "b", "--enable-vision", "--image-size", "8", "--image-patch", "8"]) == 0
    assert main(["train", "--resume", "--run", "b", "--enable-vision", "--steps", "2"]) == 0
    capsys.readouterr()
    for wrong, words in (
        (["--image-size", "16"], "--image-size 16 contradicts the run's image_size = 8"),
        (["--enable-vision", "--no-augment"], "--no-augment contradicts the run's augment = True"),
    ):
        assert main(["train", "--resume", "--run", "b", "--steps", "3", *wrong]) == 2
        assert words in capsys.readouterr().err
    text = ["train", "--config", "small.toml", "--data", "data.txt", "--device", "cpu", "--run", "c"]
    assert main([*text, "--image-size", "16"]) == 0
    assert "--image-size without --enable-vision: no effect" in capsys.readouterr().err
    assert load_config("runs/c/config.toml").model.image_size == 0
    assert main(["generate", "b", "--image", "data.txt", "--device", "cpu"]) == 2
    assert "'data.txt' is damaged; give a whole image" in capsys.readouterr().err


def test_an_image_for_a_model_of_text_is_refused(workplace, settings, capsys):
    assert start_training({**settings, "steps": 1}, run="text") == 0
    assert main(["generate", "text", "--image", "data.txt", "--device", "cpu"]) == 2
    assert (
        "not to name images: `arbitor train --enable-vision` makes a run that has" in capsys.readouterr().err
    )
