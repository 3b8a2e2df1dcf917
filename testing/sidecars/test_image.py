"""The image sidecar: patches, positions, learning, what a checkpoint keeps of it."""

import numpy as np
import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.sidecars.image import ImageSequencer, patches
from arbitor.ternary import VoteOptimizer, named_ternary
from arbitor.ternary.audit import audit
from arbitor.train.task import framed

SMALL = {
    "dim": 40,
    "num_prelude_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "rope_dim": 4,
    "value_dim": 20,
    "kv_latent_dim": 24,
    "ffn_dim": 80,
    "ctx": 16,
    "image_size": 6,
    "image_patch": 2,
    "image_channels": 3,
}


def sequencer(**changes):
    torch.manual_seed(0)
    return ImageSequencer(ModelConfig(**{**SMALL, **changes}))


def random_images(batch, channels=3, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=generator)


def test_patches_go_row_by_row_and_hold_every_pixel_once():
    pixels = random_images(2)
    found = patches(pixels, 2)
    assert found.shape == (2, 9, 12)
    for p in range(9):
        row, column = divmod(p, 3)
        block = pixels[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].int()
        assert torch.equal(found[:, p], (block.flatten(1) - 128) / 128)


def test_a_position_depends_on_its_patch_and_place_alone():
    part = sequencer()
    pixels = random_images(1)
    before = part(pixels)[0]
    assert before.shape == (9, 40)
    torch.testing.assert_close(before.square().mean(-1), torch.ones(9), rtol=1e-4, atol=0)
    changed = pixels.clone()
    changed[0, 1, 2, 5] ^= 255  # the third patch of the second row
    after = part(changed)[0]
    assert [p for p in range(9) if not torch.equal(before[p], after[p])] == [5]
    same = part(torch.full_like(pixels, 77))[0]
    assert len({tuple(row.tolist()) for row in same}) == 9, "equal patches differ by their places"


def test_black_grey_and_white_differ():
    part = sequencer()
    black, grey, white = (
        part(torch.full((1, 3, 6, 6), value, dtype=torch.uint8))[0] for value in (0, 90, 255)
    )
    for one, other in ((black, grey), (grey, white), (black, white)):
        assert (one - other).square().mean() > 0.01


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "patch"), [(6, 2), (6, 6), (7, 7), (9, 3), (5, 1)])
def test_sizes(size, patch, channels):
    part = sequencer(image_size=size, image_patch=patch, image_channels=channels)
    assert part(random_images(3, channels, size)).shape == (3, (size // patch) ** 2, 40)
    assert part.num_positions == (size // patch) ** 2


def test_settings_that_cannot_be_used():
    with pytest.raises(UserError, match="image_size 8 is no multiple of image_patch 3"):
        ModelConfig(image_size=8, image_patch=3)
    with pytest.raises(UserError, match="image_channels must be 1"):
        ModelConfig(image_channels=4)
    with pytest.raises(UserError, match="image_size must be between 0 and 4096"):
        ModelConfig(image_size=-1)


def test_vision_is_opt_in():
    assert "image" not in ARBModel("tiny").sidecars
    model = ARBModel("tiny", enable_vision=True)
    assert (model.config.image_size, model.sidecars["image"].num_positions) == (224, 196)
    small = ARBModel("tiny", enable_vision=True, image_size=32)
    assert small.config.image_size == 32
    assert "image" not in ARBModel("tiny", image_size=32, enable_vision=False).sidecars


@pytest.mark.parametrize("state", ["full", "compact", "lean"])
def test_every_trained_tensor_is_an_integer(state):
    torch.manual_seed(0)
    model = ARBModel(config=ModelConfig(**SMALL))
    optimizer = VoteOptimizer(model, state=state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in range(3):
        ids, mask = framed([b"cat", b"a dog"], 16)
        prefix = model.encode("image", random_images(2, seed=seed))
        model(ids, ids, prefix=prefix, target_mask=mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = audit(model, optimizer)
    assert report.ok, report.violations
    names = {row.name for row in report.rows if "sidecars.image" in row.name}
    assert {"embed", "rows", "columns"} == {name.split(".")[2] for name in names if "sidecars" in name[:8]}
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in ("embed.T_packed", "rows.q", "columns.q"):
        assert f"sidecars.image.{part}" in moved


def test_two_images_are_told_apart():
    """The whole way, from pixels to text, in 60 steps: light and dark squares left or right."""
    torch.manual_seed(0)
    model = ARBModel(config=ModelConfig(**SMALL))
    optimizer = VoteOptimizer(model, lr=0.1)
    left = np.zeros((3, 6, 6), dtype=np.uint8)
    left[:, :, :2] = 200
    images = torch.from_numpy(np.stack([left, left[:, :, ::-1], 255 - left]))
    captions = [b"left", b"right", b"dark"]
    ids, mask = framed(captions, 16)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 60)
        model(ids, ids, prefix=model.encode("image", images), target_mask=mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for image, caption in zip(images, captions, strict=True):
        said = model.generate(max_bytes=8, temperature=0, prefix=model.encode("image", image[None]))
        assert said == caption


def test_every_weight_is_reached():
    torch.manual_seed(0)
    model = ARBModel(config=ModelConfig(**SMALL))
    VoteOptimizer(model)
    ids, mask = framed([b"cat", b"dog"], 16)
    prefix = model.encode("image", random_images(2))
    model(ids, ids, prefix=prefix, target_mask=mask).loss.backward()
    assert [name for name, module in named_ternary(model) if module.capture.empty] == []


def test_framing():
    ids, mask = framed([b"ab", b"xyz"], 16)
    assert ids.tolist() == [[256] * 3 + [97, 98, 257, 256], [256] * 3 + [120, 121, 122, 257]]
    assert mask.tolist() == [[False] * 3 + [True] * 3 + [False], [False] * 3 + [True] * 4]
    ids, mask = framed([b"abcdef"], 6)
    assert ids.tolist() == [[256, 256, 256, 97, 98, 99]]
    assert mask.sum() == 3
    ids, mask = framed([b"a"], 16, 9)
    assert ids.shape == mask.shape == (1, 9)
