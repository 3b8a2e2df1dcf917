import math

import pytest
import torch

from arbitor.config import preset
from arbitor.drawing import draw, drawn_ids
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.model.vocab import EOS, PAD
from arbitor.sidecars.video import VideoAutoencoder, VideoHead, integrate
from arbitor.ternary import VoteOptimizer
from arbitor.ternary.audit import audit
from arbitor.train.schedule import learning_rate
from testing.small_run import MODEL

SMALL = {**MODEL, "video_size": 8, "video_frames": 4, "video_dim": 32, "video_layers": 1}
SHAPE = (16, 2, 2, 2)


def codec(**options):
    torch.manual_seed(0)
    return VideoAutoencoder(**{"size": 8, "frames": 4, "dim": 32, "num_layers": 1, **options})


def head(**options):
    torch.manual_seed(0)
    return VideoHead(SHAPE, 8, **{"dim": 32, "num_layers": 1, **options})


def model(**options):
    torch.manual_seed(0)
    return ARBModel(config=preset("tiny", **{**SMALL, **options}).model).eval()


def clips(batch=3, frames=4, channels=1, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (16, 2, 2, 2)),
        ({"channels": 3, "stride": 1, "patch": 8}, (16, 4, 1, 1)),
        ({"size": 12, "frames": 6, "stride": 3}, (16, 2, 3, 3)),
    ],
)
def test_shapes_of_the_autoencoder(options, shape):
    net = codec(**options)
    given = clips(2, net.frames, net.channels, net.size)
    assert net.latent_shape == shape
    assert net.encode(given).shape == (2, *shape)
    assert net(given).shape == given.shape
    back = net.decode(net.encode(given))
    assert (back.shape, back.dtype) == (given.shape, torch.uint8)
    # Latents keep to their boxes, so that decoding what was encoded is the forward, rounded.
    net.standardise(given)
    again = net.decode(net.encode(given)).float()
    assert (again - net(given).clamp(0, 1) * 255).abs().max() < 2


def test_every_box_is_coded_by_itself():
    net = codec()
    given = clips(1)
    other = given.clone()
    other[0, 2:, :, 4:, :4] = 255 - other[0, 2:, :, 4:, :4]
    changed = (net.encode(given) != net.encode(other))[0].any(dim=0)
    assert changed.nonzero().tolist() == [[1, 1, 0]]


def test_standardised_latents_have_mean_0_and_variance_1_by_integers():
    net = codec()
    given = clips(64)
    net.standardise(given)
    latents = net.encode(given).transpose(0, 1).flatten(1)
    assert latents.mean(dim=1).abs().max() < 1e-3
    assert (latents.std(dim=1) - 1).abs().max() < 2e-3
    assert net.latent_mean.dtype == net.latent_std.dtype == torch.int32
    assert {"latent_mean", "latent_std"} <= set(net.state_dict())


def test_what_does_not_fit_is_refused():
    net = codec()
    for wrong in (clips(frames=5), clips(channels=3), clips().float(), clips()[0]):
        with pytest.raises(UserError, match="clips must be uint8"):
            net.encode(wrong)
    with pytest.raises(UserError, match="latents must have the shape"):
        net.decode(torch.zeros(1, 16, 2, 2, 3))
    with pytest.raises(UserError, match="do not divide"):
        codec(size=10)
    with pytest.raises(UserError, match="multiple of 32"):
        head(dim=40)


def test_votes_reduce_the_losses_and_everything_kept_is_an_integer():
    """The autoencoder comes below the error of a constant, and the flow below twice its first loss."""
    net = model(video_layers=2)
    optimizer = VoteOptimizer(net)
    autoencoder, flow = net.sidecars["video"].codec, net.heads["video"]
    given = clips(1).repeat(8, 1, 1, 1, 1)
    data, noise, t = normal(8, *SHAPE), normal(8, *SHAPE, seed=1), (torch.arange(8) + 0.5) / 8
    ids = drawn_ids([b"one"] * 8, 8)
    losses = []
    for step in range(40):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 40, 0.05, 0.05)
        both = autoencoder.loss(given), flow.loss(data, net.read(ids), noise, t)
        sum(both).backward()
        optimizer.step()
        losses.append([loss.item() for loss in both])
    assert losses[-1][0] < float((given.float() / 255).var()) / 2
    assert losses[-1][1] < losses[0][1] / 2
    assert audit(net, optimizer).ok


def test_time_condition_and_every_position_count():
    net = head()
    x, condition, t = normal(1, *SHAPE), normal(1, 8), torch.tensor([0.3])
    first = net(x, t, condition)
    assert first.shape == x.shape
    assert (net(x, t, condition + normal(1, 8, seed=2)) != first).any()
    torch.testing.assert_close(net(x, t, 2 * condition), first)
    later = net(x, torch.tensor([0.31]), condition)
    assert (later != first).any()
    for place in ((0, 0, 0), (1, 1, 1)):
        moved = x.clone()
        moved[0, :, place[0], place[1], place[2]] += 1
        changed = (net(moved, t, condition) != first)[0].any(dim=0)
        assert changed.all()  # not causal


def test_a_head_that_predicts_nothing_makes_the_best_linear_guess(monkeypatch):
    net = head()
    monkeypatch.setattr(net, "_rest", lambda x, t, condition: torch.zeros_like(x))
    data, noise = normal(4000, *SHAPE), normal(4000, *SHAPE, seed=1)
    for time in (0.0, 0.3, 0.5, 1.0):
        t = torch.full((4000,), time)
        # Data and noise of variance 1 leave 1 / ((1 - t)^2 + t^2) of the velocity's variance of 2.
        expected = 1 / ((1 - time) ** 2 + time**2)
        assert float(net.loss(data, normal(4000, 8), noise, t)) == pytest.approx(expected, rel=0.02)


def test_samplers_are_of_first_and_second_order():
    """On dx/dt = x from 1, which ends at e, half the step leaves half the error, or a quarter of it."""

    def error(sampler, steps):
        end = integrate(lambda x, t: x, torch.ones(1, dtype=torch.float64), steps, sampler)
        return abs(float(end) - math.e)

    assert error("euler", 64) / error("euler", 128) == pytest.approx(2, rel=0.05)
    assert error("heun", 64) / error("heun", 128) == pytest.approx(4, rel=0.05)
    with pytest.raises(UserError, match="euler, heun"):
        integrate(lambda x, t: x, torch.ones(1), 4, "rk4")


def test_samples_follow_from_the_noise_and_guidance_goes_further():
    net = head()
    noise, condition, nothing = normal(2, *SHAPE), normal(2, 8), normal(2, 8, seed=5)
    plain = net.sample(noise, condition, steps=2)
    assert torch.equal(plain, net.sample(noise, condition, steps=2))
    assert torch.equal(plain, net.sample(noise, condition, steps=2, guidance=1.0, no_condition=nothing))
    one = net.sample(noise, condition, steps=1, sampler="euler", guidance=3.0, no_condition=nothing)
    t = torch.zeros(2)
    with torch.no_grad():
        with_it, without = net(noise, t, condition), net(noise, t, nothing)
    torch.testing.assert_close(one, noise + without + 3 * (with_it - without))
    with pytest.raises(UserError, match="at least one step"):
        net.sample(noise, condition, steps=0)
    with pytest.raises(UserError, match="no_condition"):
        net.sample(noise, condition, guidance=2.0)


def test_texts_end_alike_and_are_cut_to_what_fits():
    ids = drawn_ids([b"ab", b"", b"abcdefgh"], 8)
    assert ids.tolist() == [
        [PAD] * 5 + [97, 98, EOS],
        [PAD] * 7 + [EOS],
        [PAD] * 3 + [97, 98, 99, 100, EOS],
    ]


def test_clips_are_drawn_to_texts():
    net = model()
    drawn = draw(net, [b"one", b"two"], steps=2, seed=3)
    assert (drawn.shape, drawn.dtype) == ((2, 4, 1, 8, 8), torch.uint8)
    assert torch.equal(drawn, draw(net, [b"one", b"two"], steps=2, seed=3))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn, draw(net, [b"one", b"two"], steps=2, seed=3, guidance=3.0))
    with pytest.raises(UserError, match="give a text"):
        draw(net, [])
    with pytest.raises(UserError, match="no sidecar for clips"):
        draw(ARBModel("tiny", **MODEL), [b"one"])


def test_clips_are_a_prefix_of_a_model():
    net = model()
    prefix = net.encode("video", clips(2))
    assert prefix.shape == (2, 8, MODEL["dim"])
    torch.testing.assert_close(prefix.square().mean(dim=-1), torch.ones(2, 8), rtol=1e-3, atol=0)
    assert net(torch.randint(0, 256, (2, 6)), prefix=prefix).logits.shape == (2, 4, 288)


def test_the_sidecar_is_asked_for_by_a_flag():
    assert "video" in ARBModel("tiny", **MODEL, enable_video=True).heads
    assert not ARBModel("tiny", **MODEL, video_size=8, enable_video=False).heads
    with pytest.raises(UserError, match="video_size 10 is no multiple"):
        preset("tiny", video_size=10)
