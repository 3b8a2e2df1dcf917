import dataclasses

import pytest
import torch

from arbitor.config import preset
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.model.heads import TalkerHead
from arbitor.model.ledger import KVLedger
from arbitor.sidecars.audio import AudioVQEncoder, levelled
from arbitor.sidecars.spectrum import equalised
from arbitor.speech import hear, say, spoken_ids
from arbitor.ternary import VoteOptimizer
from arbitor.ternary.audit import audit
from arbitor.train.schedule import learning_rate
from testing.small_run import MODEL

SMALL = {**MODEL, "ctx": 32, "audio_rate": 2000, "audio_samples": 1000, "audio_dim": 16, "audio_layers": 1}
WITH_PARTS = {
    "plain": {},
    "memory of bytes": {"memory_rows": 64, "memory_heads": 1, "memory_dim": 16},
    "memory of motifs": {
        "memory_rows": 64, "memory_heads": 1, "memory_dim": 16, "motif_trits": 3, "memory_over": "motifs",
    },
    "core": {"motif_trits": 3, "graph_edges": 32, "num_experts": 4, "expert_dim": 32},
    "one code": {"audio_codes": 1, "audio_trits": 3},
}  # fmt: skip


def codec(**options):
    torch.manual_seed(0)
    return AudioVQEncoder(**{"rate": 2000, "dim": 16, "num_layers": 1, **options})


def model(**options):
    torch.manual_seed(0)
    return ARBModel(config=preset("tiny", **{**SMALL, **options}).model).eval()


def sound(batch=2, samples=1000, seed=0):
    return 0.2 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("samples", [1, 39, 40, 41, 1000])
def test_codec_shapes(samples):
    net = codec(num_codes=3, code_trits=2)
    output = net(sound(2, samples))
    times = -(-samples // 40)
    assert net.samples_per_time == 40
    assert output.wave.shape == (2, samples)
    assert output.ids.shape == (2, times, 3)
    assert output.ids.min() >= 0
    assert output.ids.max() < 9
    assert torch.equal(net.encode(sound(2, samples)), output.ids)
    decoded = net.decode(output.ids)
    assert decoded.shape == (2, times * 40)
    torch.testing.assert_close(decoded[:, :samples], output.wave, rtol=1e-5, atol=1e-6)


def test_no_times_decode_to_no_samples():
    assert codec().decode(torch.zeros((2, 0, 4), dtype=torch.int64)).shape == (2, 0)


def test_every_trained_tensor_is_an_integer_and_votes_reduce_the_loss():
    net = codec(num_layers=2, dim=32)
    optimizer = VoteOptimizer(net)
    time = torch.arange(1000) / 2000
    waves = torch.stack([0.3 * torch.sin(2 * torch.pi * f * time) for f in (100, 200, 400, 700)])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    losses = []
    for step in range(60):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 60, 0.05, 0.05)
        loss, _ = net.loss(waves)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(not value.is_floating_point() for value in net.state_dict().values())
    assert audit(net, optimizer).ok
    changed = {n for n, value in net.state_dict().items() if not torch.equal(value, before[n])}
    assert {n for n in before if n.endswith(("T_packed", ".q"))} == changed


def test_codes_tell_loud_from_soft():
    net = codec()
    wave = sound(1)
    assert not torch.equal(net.encode(wave), net.encode(0.1 * wave))


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(5), torch.zeros(1, 0), torch.zeros(1, 5, dtype=torch.int64)],
    ids=["1d", "empty", "int"],
)
def test_waveforms_of_another_kind_are_refused(bad):
    with pytest.raises(UserError, match="a codec takes float waveforms"):
        codec()(bad)


def test_codes_that_cannot_be_are_refused():
    net = codec()
    with pytest.raises(UserError, match=r"codes must be 0\.\.\.242, got 243"):
        net.decode(torch.full((1, 2, 4), 243))
    with pytest.raises(UserError, match="codes must be integers"):
        net.decode(torch.zeros((1, 2, 3), dtype=torch.int64))
    with pytest.raises(UserError, match="multiple of 200"):
        AudioVQEncoder(rate=11025)


@pytest.mark.parametrize("parts", WITH_PARTS, ids=str)
def test_speaking_time_by_time_equals_the_whole_forward(parts):
    net = model(**WITH_PARTS[parts])
    ids = spoken_ids([b"one", b"three"])
    codes = net.sidecars["audio"].codec.encode(sound())[:, :6]
    ledger = KVLedger(net.config, 40)
    states = [net.speak(ids, codes[:, :0], ledger=ledger).logits]
    states += [net.speak(None, codes[:, t : t + 1], ledger=ledger).logits for t in range(6)]
    assert ledger in net.ledgers  # so that it is cleared with the rest of the runtime state
    with torch.no_grad():
        for t, state in enumerate(states):
            whole = net.speak(ids, codes[:, :t]).logits
            torch.testing.assert_close(state, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", WITH_PARTS, ids=str)
@pytest.mark.parametrize("time", [0, 3])
def test_no_logit_sees_its_own_code_or_a_later_one(parts, time):
    net = model(**WITH_PARTS[parts])
    num_codes = net.config.audio_codes
    ids = spoken_ids([b"one"])
    codes = net.sidecars["audio"].codec.encode(sound(1))[:, :6]
    with torch.no_grad():
        logits = net.speak(ids, codes, torch.tensor([6])).logits
        for q in range(num_codes):
            changed = codes.clone()
            changed[:, time, q] = (changed[:, time, q] + 1) % 3**net.config.audio_trits
            other = net.speak(ids, changed, torch.tensor([6])).logits
            assert torch.equal(logits[:, :time], other[:, :time])
            assert torch.equal(logits[:, time, : q + 1], other[:, time, : q + 1])
            if q + 1 < num_codes:
                assert not torch.equal(logits[:, time, q + 1 :], other[:, time, q + 1 :])
            assert not torch.equal(logits[:, time + 1 :], other[:, time + 1 :])


def test_what_stands_behind_a_sound_does_not_count():
    net = model()
    ids, codes = spoken_ids([b"one", b"two"]), net.sidecars["audio"].codec.encode(sound())[:, :8]
    counts = torch.tensor([8, 3])
    changed = codes.clone()
    changed[1, 3:] = 7
    with torch.no_grad():
        losses = [float(net.speak(ids, c, counts).loss) for c in (codes, changed)]
    assert losses[0] == losses[1]


def test_the_loss_of_the_talker_is_the_mean_over_codes_and_ends():
    net = model()
    head = net.heads["audio"]
    assert isinstance(head, TalkerHead)
    h = torch.randn(2, 4, net.config.dim)
    codes = torch.randint(0, 243, (2, 3, 4))
    logits, loss = head.loss(h, codes, torch.tensor([3, 1]))
    probabilities = logits.log_softmax(-1)
    picked = [probabilities[0, t, q, codes[0, t, q]] for t in range(3) for q in range(4)]
    picked += [probabilities[1, 0, q, codes[1, 0, q]] for q in range(4)]
    picked += [probabilities[0, 3, 0, head.end], probabilities[1, 1, 0, head.end]]
    torch.testing.assert_close(loss, -torch.stack(picked).mean())
    assert bool(probabilities[:, :, 1:, head.end].isinf().all())


def test_draws_follow_the_logits_of_the_codes_drawn_before():
    net = model()
    head, h = net.heads["audio"], torch.randn(3, net.config.dim)
    codes, over = head.draw(h, 0.0, 0, torch.Generator())
    logits = head(h[:, None], codes[:, None])[:, 0]
    assert not over.any()
    assert torch.equal(codes, logits.argmax(dim=-1))
    seeded = [head.draw(h, 1.0, 5, torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*seeded)
    drawn = torch.stack([head.draw(h, 1.0, 5, torch.Generator().manual_seed(s))[0][:, 0] for s in range(40)])
    likeliest = logits[:, 0].topk(5).indices
    assert all(set(drawn[:, row].tolist()) <= set(likeliest[row].tolist()) for row in range(3))
    assert len(set(drawn[:, 0].tolist())) > 1


def test_gradients_reach_every_part_but_the_codec():
    net = model()
    optimizer = VoteOptimizer(net)
    wave, ids = sound(), spoken_ids([b"one", b"two"])
    text = net(ids, targets=ids, prefix=net.encode("audio", wave))
    codes = net.sidecars["audio"].codec.encode(wave)
    (text.loss + net.speak(ids, codes, torch.tensor([25, 9])).loss).backward()
    silent = {
        n for n, m in net.named_modules() if getattr(m, "capture", None) is not None and m.capture.empty
    }
    assert silent == {n for n in silent if n.startswith("sidecars.audio.codec.")}
    assert len(silent) == sum(
        1 for n, m in net.named_modules() if n.startswith("sidecars.audio.codec.") and hasattr(m, "stored")
    )
    before = {n: v.clone() for n, v in net.state_dict().items() if ".codec." in n}
    optimizer.step()
    assert all(torch.equal(net.state_dict()[n], value) for n, value in before.items())


def test_waveforms_and_their_codes_are_the_same_prefix():
    net = model()
    wave = sound()
    codec = net.sidecars["audio"].codec
    codes = codec.encode(levelled(equalised(levelled(wave), codec.rate)))
    assert torch.equal(net.encode("audio", wave), net.encode("audio", codes))
    assert torch.equal(net.encode("audio", wave), net.encode("audio", 0.25 * wave))
    assert bool(torch.isfinite(net.encode("audio", 0 * wave)).all())
    assert net.encode("audio", wave).shape == (2, 25, net.config.dim)


def test_without_equalising_sounds_are_heard_levelled():
    net, other = model(audio_equalise=False), model()
    wave = sound().cumsum(dim=1)  # of a spectrum that equalising changes
    codes = net.sidecars["audio"].codec.encode(levelled(wave))
    assert torch.equal(net.encode("audio", wave), net.encode("audio", codes))
    assert torch.equal(net.encode("audio", codes), other.encode("audio", codes))
    assert not torch.equal(net.encode("audio", wave), other.encode("audio", wave))


def test_saying_and_hearing():
    net = model()
    waves = say(net, [b"one", b"seventeen"], seed=1)
    assert [w.dtype.name for w in waves] == ["float32"] * 2
    assert all(len(w) % 40 == 0 and len(w) <= 1000 for w in waves)
    again = say(net, [b"one", b"seventeen"], seed=1)
    assert all((a == b).all() for a, b in zip(waves, again, strict=True))
    assert [len(w) for w in say(net, [b"one"], seconds=0.1, temperature=0)] in (
        [200],
        [0],
        [40],
        [80],
        [120],
        [160],
    )
    assert len(hear(net, sound(), max_bytes=5)) == 2


def test_a_model_without_the_sidecar_says_so():
    net = ARBModel(config=preset("tiny", **MODEL).model)
    with pytest.raises(UserError, match="no sidecar for sounds"):
        say(net, [b"x"])
    with pytest.raises(UserError, match="no sidecar for sounds"):
        net.speak(spoken_ids([b"x"]), torch.zeros((1, 0, 4), dtype=torch.int64))
    with pytest.raises(UserError, match="no sidecar for 'audio'"):
        net.encode("audio", sound())
    with pytest.raises(UserError, match="nothing to say"):
        say(model(), [b""])


def test_the_sidecar_changes_no_random_number_of_the_other_parts():
    torch.manual_seed(0)
    without = ARBModel(config=dataclasses.replace(preset("tiny", **SMALL).model, audio_rate=0))
    with_it = model().state_dict()
    assert all(torch.equal(with_it[name], value) for name, value in without.state_dict().items())


def test_enable_audio():
    assert ARBModel("tiny", enable_audio=True).config.audio_rate == 8000
    assert "audio" not in ARBModel("tiny", enable_audio=False, audio_rate=8000).sidecars


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio_rate", 11025),
        ("audio_rate", 100),
        ("audio_samples", 0),
        ("audio_codes", 0),
        ("audio_trits", 10),
    ],
)
def test_sizes_that_cannot_be_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        preset("tiny", **{name: value})
