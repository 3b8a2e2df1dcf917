"""The frozen autoencoder of frames: what it computes, keeps and refuses; most of it needs diffusers."""

import json
import math

import pytest
import torch

from arbitor.config import AUTOENCODER_FIELDS, ModelConfig, override, preset
from arbitor.drawing import autoencoder_of, draw, drawn_ids
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.sidecars.vae import FrozenAutoencoder, geometry_of, read_architecture
from arbitor.sidecars.video import VideoAutoencoder
from arbitor.ternary import VoteOptimizer
from arbitor.ternary.audit import audit
from arbitor.train.checkpoint import build_model
from testing.small_run import MODEL
from testing.small_vae import small_autoencoder

SMALL = {**MODEL, "video_size": 8, "video_frames": 3, "video_dim": 32, "video_layers": 1}
SCALE, SHIFT = 1.5, 0.25


@pytest.fixture
def folder(tmp_path):
    return small_autoencoder(tmp_path / "ae", scaling_factor=SCALE, shift_factor=SHIFT)


def clips(channels=1, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, channels, 8, 8), dtype=torch.uint8, generator=generator)


def drawing(folder, **options):
    architecture = read_architecture(str(folder))
    torch.manual_seed(0)
    config = ModelConfig(**SMALL, **geometry_of(architecture), video_autoencoder=architecture, **options)
    model = ARBModel(config=config, device="cpu").eval()
    model.take_autoencoder(str(folder))
    return model


def original(folder, weights=None):
    """The library's autoencoder, in full precision or with the model's rounded weights."""
    from diffusers import AutoencoderKL

    module = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    if weights is not None:
        module.load_state_dict(weights)
    return module


@torch.no_grad()
def latents_by_library(module, given):
    """float [B, 16, F, H, W] of clips, one frame after another."""
    frames = []
    for frame in given.float().div(255).mul(2).sub(1).unbind(1):
        colours = frame.repeat(1, 3 // frame.shape[1], 1, 1)
        frames.append((module.encode(colours).latent_dist.mode() - SHIFT) * SCALE)
    return torch.stack(frames, dim=2)


@torch.no_grad()
def clips_by_library(module, latents, channels):
    """float [B, F, C, S, S] in 0 ... 255, one frame after another."""
    frames = [module.decode(frame / SCALE + SHIFT).sample for frame in latents.unbind(2)]
    colours = (torch.stack(frames, dim=1) + 1) * 127.5
    return colours if channels == 3 else colours.mean(dim=2, keepdim=True)


def matrices(module, part):
    """How many are applied one after the other in a part, at most."""
    return sum(p.dim() > 1 for name, p in module.named_parameters() if part in name)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quant", [False, True])
def test_it_computes_what_the_library_does_within_rounding(channels, quant, tmp_path):
    folder = small_autoencoder(
        tmp_path / "ae",
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    codec = autoencoder_of(drawing(folder, video_channels=channels))
    given = clips(channels)
    whole, same = original(folder), original(folder, codec.frozen.weights())
    for name, parameter in whole.named_parameters():
        step = parameter.detach().abs().amax() / 64
        assert (codec.frozen.weights()[name] - parameter).abs().max() <= step / 2
    found = codec.encode(given)
    assert (found.shape, found.dtype, codec.latent_shape) == ((2, 16, 3, 4, 4), torch.float32, (16, 3, 4, 4))
    torch.testing.assert_close(found, latents_by_library(same, given), rtol=1e-4, atol=1e-5)
    expected = latents_by_library(whole, given)
    # Matrices one after another, each rounded to 7 bits of its rows' largest weight.
    bound = 2**-6 * math.sqrt(matrices(whole, "encoder")) * (expected / SCALE + SHIFT).norm() * SCALE
    assert (found - expected).norm() < bound
    back = codec.decode(found)
    assert (back.shape, back.dtype) == (given.shape, torch.uint8)
    exact = clips_by_library(same, found, channels)
    assert (back - exact.clamp(0, 255)).abs().max() <= 0.5 + 1e-2
    torch.testing.assert_close(codec(given) * 255, exact, rtol=1e-4, atol=1e-2)
    unrounded = clips_by_library(whole, found, channels)
    bound = 2**-6 * math.sqrt(matrices(whole, "decoder")) * (unrounded - 127.5).norm()
    assert (codec(given) * 255 - unrounded).norm() < bound
    assert float(codec.loss(given)) == pytest.approx(
        float((exact - given).div(255).square().mean()), rel=1e-4
    )


def test_many_frames_are_coded_in_parts(folder, monkeypatch):
    codec = autoencoder_of(drawing(folder))
    whole = codec.encode(clips(batch=4))
    monkeypatch.setattr("arbitor.sidecars.vae.PIXELS_AT_A_TIME", 5 * 64)
    torch.testing.assert_close(codec.encode(clips(batch=4)), whole)


def test_nothing_of_it_is_trained_and_all_is_integer(folder):
    model = drawing(folder)
    optimizer = VoteOptimizer(model)
    codec = autoencoder_of(model)
    assert not list(codec.parameters())
    codec.standardise(clips())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    latents = codec.encode(clips())
    ids = drawn_ids([b"a", b"b"], 16)
    model.flow(ids, latents, torch.randn_like(latents), torch.tensor([0.2, 0.7])).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("heads.video.") for name in changed)
    assert not [name for name in changed if ".codec." in name]
    report = audit(model, optimizer)
    assert report.ok, report.violations
    rows = [row for row in report.rows if ".codec." in row.name]
    assert {row.dtype for row in rows} == {"int8", "int16"}
    assert {row.role for row in rows} == {"integer"}
    assert len(rows) == len(list(codec.buffers()))


def test_a_checkpoint_needs_no_other_file(folder):
    model = drawing(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for file in folder.iterdir():
        file.unlink()
    again = build_model(folder, model.config, weights, "cpu")
    assert torch.equal(again.encode("video", clips()), model.encode("video", clips()))
    assert torch.equal(draw(again, [b"x"], steps=1, seed=0), draw(model, [b"x"], steps=1, seed=0))


def test_the_one_of_trits_is_built_only_without_it(folder):
    assert not any(isinstance(module, VideoAutoencoder) for module in drawing(folder).modules())
    assert isinstance(autoencoder_of(ARBModel(config=ModelConfig(**SMALL, video_stride=1))), VideoAutoencoder)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"latent_channels": 4}, r"has latents of 4 channels; they must be 16"),
        ({"out_channels": 1}, r"turns 3 channels into 1; it must be 1 or 3"),
        ({"_class_name": "AutoencoderTiny"}, r"is an AutoencoderTiny; only an AutoencoderKL"),
        ({"_class_name": None}, r"is of no kind"),
        ({"latents_mean": [0.0] * 16}, r"latents_mean"),
        ({"scaling_factor": 0.0}, r"scaling_factor is 0\.0"),
        ({"scaling_factor": "much"}, r"scaling_factor is 'much'"),
        ({"shift_factor": math.inf}, r"shift_factor inf"),
        ({"down_block_types": ["Spiral"]}, r"its config\.json makes no autoencoder"),
        ({"block_out_channels": "wide"}, r"its config\.json makes no autoencoder"),
    ],
)
def test_what_cannot_be_used_is_named(changes, why, folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=why) as error:
        read_architecture(str(folder))
    assert str(error.value).startswith(f"--autoencoder {folder}")
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named(folder, tmp_path):
    architecture = read_architecture(str(folder))
    with pytest.raises(UserError, match="video_patch is 4; that of the frozen autoencoder is 2"):
        ModelConfig(video_autoencoder=architecture)
    with pytest.raises(UserError, match="video_stride is 2; that of the frozen autoencoder is 1"):
        ModelConfig(video_autoencoder=architecture, video_patch=2)
    other = json.dumps({**json.loads(architecture), "norm_num_groups": 2}, sort_keys=True)
    with pytest.raises(UserError, match="another architecture"):
        FrozenAutoencoder(other, size=8, frames=3).take(str(folder))
    codec = FrozenAutoencoder(architecture, size=8, frames=3)
    with pytest.raises(UserError, match="clips must be uint8"):
        codec.encode(clips(channels=3))
    with pytest.raises(UserError, match="latents must have the shape"):
        codec.decode(torch.zeros(1, 16, 3, 4, 5))
    with pytest.raises(UserError, match="squares of 2"):
        FrozenAutoencoder(architecture, size=7)
    for gone in (tmp_path / "nowhere", "no where", "name"):
        with pytest.raises(UserError, match="no such folder; a name on the hub is owner/name"):
            read_architecture(str(gone))
    with pytest.raises(UserError, match="no frozen autoencoder"):
        ARBModel("tiny", **MODEL).take_autoencoder("x")


def test_weights_that_are_not_whole_are_refused(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "diffusion_pytorch_model.safetensors"
    codec = FrozenAutoencoder(read_architecture(str(folder)), size=8, frames=3)
    weights = load_file(file)
    lacking = {name: tensor for name, tensor in weights.items() if name != "decoder.conv_in.bias"}
    save_file(lacking, file)
    with pytest.raises(UserError, match=r"1 weights are not there, decoder\.conv_in\.bias first"):
        codec.take(str(folder))
    save_file({**weights, "decoder.conv_in.bias": torch.full((8,), math.nan)}, file)
    with pytest.raises(UserError, match=r"decoder\.conv_in\.bias holds numbers that are not finite"):
        codec.take(str(folder))
    file.write_bytes(b"damaged" * 9)
    with pytest.raises(UserError, match="--autoencoder"):
        codec.take(str(folder))
    file.unlink()
    with pytest.raises(UserError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        codec.take(str(folder))
    assert not any(buffer.any() for buffer in codec.buffers())


def test_a_name_on_the_hub_may_have_a_folder(folder, monkeypatch):
    from diffusers import AutoencoderKL

    asked = []
    config = AutoencoderKL.load_config(str(folder))
    monkeypatch.setattr(AutoencoderKL, "load_config", lambda **given: asked.append(given) or config)
    assert read_architecture("owner/name/vae") == read_architecture("owner/name")
    assert asked == [
        {"pretrained_model_name_or_path": "owner/name", "subfolder": "vae"},
        {"pretrained_model_name_or_path": "owner/name", "subfolder": None},
    ]


@pytest.mark.parametrize(
    "architecture", ["{", "[]", "{}", '{"block_out_channels": [8], "latent_channels": 16}']
)
def test_what_is_no_architecture_is_refused(architecture):
    with pytest.raises(UserError, match="video_autoencoder is no line of JSON"):
        ModelConfig(video_autoencoder=architecture)


def test_a_frozen_one_is_not_learnt():
    fields = {**dict.fromkeys(AUTOENCODER_FIELDS, 1), "block_out_channels": [8, 8, 8], "latent_channels": 16}
    frozen = {"video_size": 8, "video_stride": 1, "video_autoencoder": json.dumps(fields)}
    with pytest.raises(UserError, match="video_task is codec, but the autoencoder is a frozen one"):
        preset("tiny", **frozen, video_task="codec")
    mixed = preset("tiny", **frozen, video_weight=1)
    assert (mixed.trains_autoencoder, mixed.learns) == (False, ("flow",))
    assert override(mixed, video_autoencoder="").learns == ("autoencoder", "flow")
    with pytest.raises(UserError, match="video_channels is 3; the frozen autoencoder takes grey only"):
        override(mixed, video_channels=3)


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match=r"extra autoencoder: pip install '\.\[autoencoder\]'"):
        read_architecture("anything")
