"""The frozen encoder: rounding, what a checkpoint keeps, that nothing is trained; needs transformers."""

import json

import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.sidecars.encoder import FrozenEncoder, geometry_of, read_architecture
from arbitor.sidecars.frozen import rounded
from arbitor.ternary import VoteOptimizer, named_ternary
from arbitor.ternary.audit import audit
from arbitor.train.checkpoint import build_model
from arbitor.train.task import framed
from testing.small_run import MODEL

SMALL = {**MODEL, "ctx": 16}


@pytest.mark.parametrize("rows", [0, 5])
def test_rounding_is_as_fine_as_the_codes(rows):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 7, generator=generator) * torch.logspace(-9, 9, 5)[:, None]
    code, exponent = rounded(values, rows)
    assert code.dtype == (torch.int8 if rows else torch.int16)
    assert exponent.shape == (max(rows, 1),)
    step = torch.ldexp(torch.ones(len(exponent)), exponent.int())[:, None]
    assert ((code * step - values).abs() <= step / 2).all(), "no code is clipped"
    limit = 127 if rows else 32767
    largest = code.int().abs().reshape(max(rows, 1), -1).amax(1)
    assert (largest >= limit // 2).all(), "no bit of the codes is wasted"
    assert not rounded(torch.zeros(3, 4), 3)[0].any()


@pytest.mark.parametrize("architecture", ["{", "[]", "{}", '{"patch_size": 4, "num_channels": 3}'])
def test_what_is_no_architecture_is_refused(architecture):
    with pytest.raises(UserError, match="no line of JSON"):
        ModelConfig(image_encoder=architecture)


@pytest.fixture
def folder(tmp_path):
    """A small DINOv2 with random weights."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers (extra `vision`) is not installed"
    )
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=4, image_size=16
    )
    transformers.Dinov2Model(config).eval().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def seeing(folder):
    architecture = read_architecture(str(folder))
    torch.manual_seed(0)
    model = ARBModel(
        config=ModelConfig(**SMALL, **geometry_of(architecture), image_encoder=architecture), device="cpu"
    )
    model.take_encoder(str(folder))
    return model


def images(batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_it_computes_what_the_original_does_within_rounding(folder):
    import transformers

    model = seeing(folder)
    encoder = model.sidecars["image"].encoder
    original = transformers.Dinov2Model.from_pretrained(folder).eval()
    for name, parameter in original.named_parameters():
        step = parameter.detach().abs().amax() / 64
        assert (encoder.weights()[name] - parameter).abs().max() <= step / 2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = original((images() / 255 - mean) / std).last_hidden_state[:, 1:]
        exact = torch.func.functional_call(original, encoder.weights(), ((images() / 255 - mean) / std,))
    found = encoder(images())
    assert found.shape == (2, 16, 32)
    torch.testing.assert_close(found, exact.last_hidden_state[:, 1:])
    # Eight matrices one after another, each rounded to 7 bits of its rows' largest weight.
    assert (found - expected).norm() < 8**0.5 * 2**-6 * expected.norm()


def test_nothing_of_it_is_trained_and_all_is_integer(folder):
    model = seeing(folder)
    optimizer = VoteOptimizer(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, mask = framed([b"cat", b"dog"], 16)
    model(ids, ids, prefix=model.encode("image", images()), target_mask=mask).loss.backward()
    assert [name for name, module in named_ternary(model) if module.capture.empty] == []
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "sidecars.image.embed.T_packed" in changed
    assert not [name for name in changed if ".encoder." in name]
    report = audit(model, optimizer)
    assert report.ok, report.violations
    codes = [row for row in report.rows if ".encoder.codes." in row.name]
    assert len(codes) == len(list(model.sidecars["image"].encoder.codes.buffers()))
    assert {row.dtype for row in codes} == {"int8", "int16"}


def test_a_checkpoint_needs_no_other_file(folder):
    model = seeing(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for file in folder.iterdir():
        file.unlink()
    again = build_model(folder, model.config, weights, "cpu")
    assert torch.equal(again.encode("image", images()), model.encode("image", images()))


def test_what_does_not_fit_is_named(folder, tmp_path):
    architecture = read_architecture(str(folder))
    with pytest.raises(UserError, match="image_patch is 16 and image_channels 3; the encoder takes 4 and 3"):
        ModelConfig(image_encoder=architecture)
    other = json.dumps({**json.loads(architecture), "hidden_size": 64}, sort_keys=True)
    with pytest.raises(UserError, match="another architecture"):
        FrozenEncoder(other).take(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        FrozenEncoder(architecture).take(str(folder))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a bert; only dinov2"):
        read_architecture(str(folder))
    with pytest.raises(UserError, match="--image-encoder"):
        read_architecture(str(tmp_path / "nowhere" / "at" / "all"))
    with pytest.raises(UserError, match="no frozen image encoder"):
        ARBModel("tiny").take_encoder("x")


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"extra vision: pip install '\.\[vision\]'"):
        read_architecture("anything")
