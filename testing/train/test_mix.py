import json
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

from arbitor.config import override, preset
from arbitor.data import ByteStream
from arbitor.data.documents import DocumentSampler, HubDocuments, Stretches
from arbitor.data.hub import HubExamples, parse_spec
from arbitor.data.mixed import open_mix
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.model.vocab import EOS, PAD
from arbitor.ternary.audit import audit
from arbitor.train.device import deterministic, resolve_device
from arbitor.train.loop import Trainer
from arbitor.train.mix import MixTask, entropy
from testing.small_run import MODEL

MEDIA = {
    "output_router": True,
    "image_size": 8,
    "image_patch": 4,
    "image_channels": 1,
    "audio_rate": 2000,
    "audio_samples": 500,
    "audio_dim": 16,
    "audio_layers": 1,
}
VIDEO = {
    "video_weight": 1.0,
    "video_size": 8,
    "video_frames": 4,
    "video_dim": 32,
    "video_layers": 1,
}
ONLY_VIDEO = {**VIDEO, "text_weight": 0.0, "code_weight": 0.0, "image_weight": 0.0, "audio_weight": 0.0}
ALL = {"text_weight": 2.0, "code_weight": 1.0, "image_weight": 1.0, "audio_weight": 1.0}


@pytest.fixture(autouse=True)
def _few_sounds(monkeypatch):
    monkeypatch.setattr("arbitor.data.audio._SYNTHETIC_COUNT", 30)
    monkeypatch.setattr("arbitor.train.video_tasks.STANDARD_CLIPS", 64)


@pytest.fixture
def own_text(workplace):
    (workplace / "text.txt").write_text("".join(f"a sentence of number {n}. " for n in range(300)))
    return {"text_data": ["text.txt"], "code_data": ["data.txt"]}


@pytest.fixture
def mix_config(own_text):
    def make(**changes):
        base = {**MODEL, **MEDIA, "ctx": 16, "batch": 4, "steps": 20, "device": "cpu", **own_text, **ALL}
        return override(preset("tiny"), **{**base, **changes})

    return make


def trainer_of(config, steps=0, checkpoint=None):
    device = resolve_device("cpu")
    corpus = open_mix(config)
    with deterministic(config.train.seed, device.device):
        trainer = Trainer(config, corpus, device, checkpoint)
        losses = [float(trainer.take_step()) for _ in range(steps)]
    return trainer, losses


def drawn(config, count):
    task = MixTask(config, open_mix(config))
    return [task.names[int(task.next_batch()[0])] for _ in range(count)]


def test_modalities_come_as_often_as_their_weights_say(mix_config):
    names = drawn(mix_config(), 1000)
    shares = {name: names.count(name) / len(names) for name in ("text", "code", "image", "audio")}
    # Four standard deviations of a share of 1,000 draws are at most 0.063.
    assert shares == pytest.approx({"text": 0.4, "code": 0.2, "image": 0.2, "audio": 0.2}, abs=0.063)
    assert drawn(mix_config(), 50) == names[:50]
    assert drawn(mix_config(seed=1), 50) != names[:50]
    assert set(drawn(mix_config(text_weight=0, code_weight=0, audio_weight=0), 20)) == {"image"}


def test_a_batch_does_not_depend_on_what_else_is_drawn(mix_config):
    """Every modality has a sampler of its own."""
    both = MixTask(
        mix_config(image_weight=0.0, audio_weight=0.0),
        open_mix(mix_config(image_weight=0.0, audio_weight=0.0)),
    )
    texts = [
        ids for number, ids, *_ in (both.next_batch() for _ in range(40)) if both.names[number] == "text"
    ]
    alone = MixTask(
        mix_config(code_weight=0.0), open_mix(mix_config(code_weight=0, image_weight=0, audio_weight=0))
    )
    for ids in texts[:5]:
        assert torch.equal(ids, alone.next_batch()[1])


@pytest.mark.parametrize("accum", [1, 3])
def test_training_goes_on_from_a_checkpoint_with_identical_losses(accum, mix_config, tmp_path):
    from arbitor.train.checkpoint import load_checkpoint

    config = mix_config(accum=accum, audio_weight=2.0, **{**VIDEO, "video_weight": 2.0})
    whole, losses = trainer_of(config, 14)
    first, before = trainer_of(config, 6)
    first.save(tmp_path / "saved")
    second = trainer_of(config, 0, load_checkpoint(tmp_path / "saved"))[0]
    with deterministic(config.train.seed, torch.device("cpu")):
        after = [float(second.take_step()) for _ in range(8)]
    assert before + after == losses
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert second.task.sampler_state() == whole.task.sampler_state()


def test_all_that_training_keeps_is_integer(mix_config):
    trainer, _ = trainer_of(mix_config(**VIDEO), 8)
    report = audit(trainer.model, trainer.optimizer)
    assert report.ok
    assert not [name for name, tensor in trainer.model.state_dict().items() if tensor.is_floating_point()]
    assert not [n for n, tensor in trainer.optimizer.named_state().items() if tensor.is_floating_point()]


def test_parts_that_a_step_does_not_draw_stay_as_they_are(mix_config):
    config = mix_config(text_weight=1.0, code_weight=0.0, image_weight=0.0, audio_weight=1e-6)
    trainer, _ = trainer_of(config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for _ in range(4):
        trainer.take_step()
    after = trainer.model.state_dict()
    apart = ("sidecars.", "heads.")
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith(apart))
    assert any(not torch.equal(before[name], after[name]) for name in after if not name.startswith(apart))


def test_losses_are_named_by_modality_and_averaged_over_their_own_micro_batches(mix_config):
    trainer, _ = trainer_of(mix_config(accum=8))
    main = trainer.take_step()
    readings = {name: float(value) for name, value in trainer.readings.items()}
    names = drawn(mix_config(accum=8), 8)
    assert {name for name in readings if name.startswith("loss_")} == {f"loss_{name}" for name in set(names)}
    weighted = sum(readings[f"loss_{name}"] * names.count(name) / 8 for name in set(names))
    assert float(main) == pytest.approx(weighted, rel=1e-6)
    assert all(0 <= readings[f"router_accuracy_{name}"] <= 1 for name in set(names))
    assert readings["codec"] > 0


def test_the_codec_learns_only_if_it_shall(mix_config):
    only = {"text_weight": 0.0, "code_weight": 0.0, "image_weight": 0.0}
    for learns in (True, False):
        trainer, _ = trainer_of(mix_config(**only, train_codec=learns))
        codec = trainer.model.sidecars["audio"].codec
        before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
        for _ in range(3):
            trainer.take_step()
        changed = any(not torch.equal(before[name], tensor) for name, tensor in codec.state_dict().items())
        assert changed == learns


def test_evaluations_measure_every_part_beside_its_unigrams(mix_config):
    trainer, _ = trainer_of(mix_config(), 2)
    result = trainer.evaluate(max_windows=6)
    shares = {"text": 0.4, "code": 0.2, "image": 0.2, "audio": 0.2}
    mean = sum(result.extra[f"held_out_{name}"] * share for name, share in shares.items())
    assert result.bits_per_byte == pytest.approx(mean)
    assert all(0 <= result.extra[f"held_out_router_{name}"] <= 1 for name in shares)
    held_out = trainer.task.parts["text"].task.corpus.held_out.as_array()
    read = result.extra["unigram_text"]
    assert read == pytest.approx(entropy(np.bincount(held_out)))
    model = trainer.model
    assert torch.equal(  # nothing was changed by measuring
        model.head.logits(torch.ones(1, 32)),
        trainer_of(mix_config(), 2)[0].model.head.logits(torch.ones(1, 32)),
    )


def test_entropy_of_known_counts():
    assert entropy(np.array([1, 1, 0, 2])) == pytest.approx(1.5)
    assert entropy(np.array([5])) == 0.0


def test_the_router_learns_to_tell_codes_from_bytes(mix_config, monkeypatch):
    # Its usual weight is for models that are not this small; here a seed decided how much was learnt.
    monkeypatch.setattr("arbitor.model.arb.ROUTER_WEIGHT", 1.0)
    config = mix_config(text_weight=1.0, code_weight=0.0, image_weight=0.0, audio_weight=1.0, steps=60)
    trainer, _ = trainer_of(config)
    untrained = trainer.evaluate(max_windows=4).extra
    for _ in range(60):
        trainer.take_step()
    extra = trainer.evaluate(max_windows=4).extra
    # A router that always names one modality is right nowhere in the other one's part that has its own.
    assert extra["held_out_router_text"] > 0.9
    assert extra["held_out_router_audio"] > 0.9
    assert min(untrained["held_out_router_text"], untrained["held_out_router_audio"]) < 0.9


def test_speaking_supervises_the_router_with_bytes_ahead_and_codes_behind(mix_config):
    model = ARBModel(config=mix_config().model)
    ids = torch.tensor([[PAD, PAD, PAD, PAD, 97, EOS], [PAD, PAD, PAD, 97, 98, EOS]])
    codes = torch.zeros((2, 4, 4), dtype=torch.int64)
    output = model.speak(ids, codes, torch.tensor([4, 2]))
    said = output.modalities.argmax(dim=-1)  # 3 rows of text targets, 5 times
    assert said.shape == (2, 8)
    right = [said[0, 1] == 0, said[0, 2] == 0, *(said[0, 3:] == 1)]
    right += [*(said[1, :3] == 0), *(said[1, 3:6] == 1)]
    expected = sum(map(bool, right)) / len(right)
    assert float(model.part_metrics()["router_accuracy"]) == pytest.approx(expected)


def test_drawing_supervises_the_router_with_bytes_and_a_clip_behind_them(mix_config):
    model = ARBModel(config=mix_config(**VIDEO).model)
    ids = torch.tensor([[PAD, PAD, PAD, PAD, 97, EOS], [PAD, PAD, PAD, 97, 98, EOS]])
    latents = torch.zeros((2, 16, 2, 2, 2))
    output = model.flow(ids, latents, torch.randn_like(latents), torch.tensor([0.2, 0.7]))
    said = output.modalities.argmax(dim=-1)  # 3 rows of text targets, and the one behind them
    assert said.shape == (2, 4)
    right = [*(said[0, 1:3] == 0), said[0, 3] == 2, *(said[1, :3] == 0), said[1, 3] == 2]
    assert float(model.part_metrics()["router_accuracy"]) == pytest.approx(sum(map(bool, right)) / 7)
    weighted = output.losses["video"] + 0.01 * output.losses["router"]
    assert float(output.loss) == pytest.approx(float(weighted))
    with pytest.raises(UserError, match="enable_video"):
        ARBModel(config=mix_config().model).flow(ids, latents, latents, torch.zeros(2))


def test_without_a_router_the_flow_has_the_loss_of_its_head_alone(mix_config):
    model = ARBModel(config=mix_config(**VIDEO, output_router=False).model)
    ids = torch.tensor([[PAD, PAD, PAD, 97, 98, EOS]] * 2)
    latents, noise, t = torch.randn(2, 16, 2, 2, 2), torch.randn(2, 16, 2, 2, 2), torch.tensor([0.2, 0.7])
    output = model.flow(ids, latents, noise, t)
    assert output.losses.keys() == {"video"}
    assert torch.equal(output.loss, model.heads["video"].loss(latents, model.read(ids), noise, t))


def test_the_router_learns_where_a_clip_follows(mix_config, monkeypatch):
    # Its usual weight is for models that are not this small; here a seed decided how much was learnt.
    monkeypatch.setattr("arbitor.model.arb.ROUTER_WEIGHT", 1.0)
    config = mix_config(**{**ONLY_VIDEO, "text_weight": 1.0}, steps=60)
    trainer, _ = trainer_of(config)
    untrained = trainer.evaluate(max_windows=4).extra
    for _ in range(60):
        trainer.take_step()
    extra = trainer.evaluate(max_windows=4).extra
    assert extra["held_out_router_text"] > 0.9
    assert extra["held_out_router_video"] > 0.9
    assert min(untrained["held_out_router_text"], untrained["held_out_router_video"]) < 0.9


@pytest.mark.parametrize("learns", [True, False])
def test_the_autoencoder_learns_only_if_it_shall_and_its_constants_follow(learns, mix_config):
    trainer, _ = trainer_of(mix_config(**ONLY_VIDEO, train_autoencoder=learns, batch=16, lr=0.1))
    codec = trainer.model.sidecars["video"].codec
    clips = trainer.task.parts["video"].task.standard_clips()
    assert codec.encode(clips).std(dim=(0, 2, 3, 4), correction=0).tolist() == pytest.approx(
        [1.0] * 16, rel=0.01
    )
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    error = trainer.evaluate(max_windows=8).extra["held_out_pixel_error"]
    for _ in range(20):
        trainer.take_step()
    changed = {name for name, tensor in codec.state_dict().items() if not torch.equal(before[name], tensor)}
    constants = {"latent_mean", "latent_std"}
    assert (changed > constants) if learns else (not changed)
    assert (float(trainer.readings.get("autoencoder", 0.0)) > 0) == learns
    now = trainer.evaluate(max_windows=8).extra["held_out_pixel_error"]
    assert (now < 0.8 * error) if learns else (now == error)
    spread = codec.encode(clips).std(dim=(0, 2, 3, 4), correction=0)
    assert 0.5 < float(spread.min()) <= float(spread.max()) < 2
    moved = before["latent_std"] / codec.latent_std  # what it would be had they not followed
    assert float((spread / moved).sub(1).abs().max()) > (0.5 if learns else -1)


def test_a_clip_is_measured_beside_a_gaussian_of_training_latents(mix_config):
    trainer, _ = trainer_of(mix_config(**ONLY_VIDEO))
    part = trainer.task.parts["video"]
    result = trainer.evaluate(max_windows=40)
    batches = list(part.held_out_batches(40))
    assert sum(len(batch[0]) for batch in batches) == 160  # four times each
    latents = trainer.model.sidecars["video"].codec.encode(part.task.standard_clips()).flatten(1)
    variance = latents.var(dim=0, correction=0)
    # Of data that is such a Gaussian, what no guess can know of the velocity at a time t.
    t = torch.cat([batch[3] for batch in batches])[:, None]
    unknown = (variance / (t.square() * variance + (1 - t).square())).mean()
    assert result.extra["gaussian_video"] == pytest.approx(float(unknown), rel=0.15)
    assert result.extra["held_out_video"] == result.bits_per_byte
    assert result.extra["held_out_video"] > result.extra["gaussian_video"]  # nothing was learnt yet
    assert trainer.task.figure == "mixed"


# --- steps by kind, as a GPU records them


class Rehearsed:
    """A recorded step that is none: it does its work every time."""

    made: ClassVar[list["Rehearsed"]] = []

    def __init__(self, work, device, beside=None):
        self.work, self.beside, self.calls, self.waits = work, beside, 0, False
        self.shapes = set()
        Rehearsed.made.append(self)

    @property
    def recorded(self):
        return self.calls > 2

    def __call__(self, batch):
        self.calls += 1
        self.shapes.add(tuple((tensor.shape, tensor.dtype) for tensor in batch))
        return self.work(batch)


def test_steps_are_told_apart_by_modality_and_equal_those_that_are_not(mix_config, monkeypatch):
    config = mix_config(**VIDEO)
    plain, losses = trainer_of(config, 30)
    monkeypatch.setattr(Rehearsed, "made", [])
    monkeypatch.setattr("arbitor.train.recorded.RecordedStep", Rehearsed)
    monkeypatch.setattr("arbitor.train.loop.can_record", lambda model: True)
    trainer, _ = trainer_of(config)
    names = drawn(config, 30)
    seen, flips = [], []
    with deterministic(config.train.seed, torch.device("cpu")):
        for _ in range(30):
            seen.append(float(trainer.take_step()))
            flips.append(trainer.optimizer.flip_rate())
    assert seen == losses
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    counts = [names.count(name) for name in dict.fromkeys(names) if name != "audio"]
    assert [step.calls for step in Rehearsed.made] == counts  # sounds differ in length
    assert len(counts) == 4
    assert all(len(step.shapes) == 1 for step in Rehearsed.made)
    assert Rehearsed.made[0].beside is None
    assert all(step.beside is Rehearsed.made[0] for step in Rehearsed.made[1:])
    assert "but for audio" in trainer.task.how_replayed


def test_flips_are_those_of_the_kind_that_was_replayed(mix_config, monkeypatch):
    class Replayed(Rehearsed):
        """From the third call on, the optimizer is not seen to do anything."""

        def __call__(self, batch):
            before = trainer.optimizer.flips
            figures = super().__call__(batch)
            if self.recorded:
                for name, count in self.flips.items():
                    count.copy_(trainer.optimizer.flips[name])
                trainer.optimizer.flips = before
            else:
                self.flips = trainer.optimizer.flips
            return figures

    config = mix_config(audio_weight=0.0, image_weight=0.0)
    plain, _ = trainer_of(config)
    expected = [(float(plain.take_step()), plain.optimizer.flip_rate()) for _ in range(20)]
    monkeypatch.setattr("arbitor.train.recorded.RecordedStep", Replayed)
    monkeypatch.setattr("arbitor.train.loop.can_record", lambda model: True)
    trainer, _ = trainer_of(config)
    assert [(float(trainer.take_step()), trainer.optimizer.flip_rate()) for _ in range(20)] == expected
    assert len({rate for _, rate in expected}) > 10


def test_a_step_of_several_draws_is_of_no_kind(mix_config):
    task = trainer_of(mix_config(accum=2))[0].task
    assert not task.fixed_shapes
    assert task.kind_of([task.next_batch() for _ in range(2)]) is None


# --- documents in their order


def sampler_of(documents, with_context, ctx=8):
    stream = ByteStream([np.concatenate([np.frombuffer(d, dtype=np.uint8) for d in documents])])
    return DocumentSampler(Stretches(stream, len(documents)), len(documents), ctx, with_context=with_context)


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 12, 13, 14, 40])
def test_every_byte_of_a_document_is_predicted_once(with_context, length):
    text = bytes(range(1, length + 1))
    sampler = sampler_of([text, text], with_context)
    told = []
    while True:
        windows = sampler.next()
        ids, counted, context = (part[0] for part in windows)
        assert counted.any()
        told += ids[counted].tolist()
        assert not counted[: 1 if with_context else 3].any()
        seen = [PAD] * 8 + [PAD] * 3 + [*text, EOS] + [PAD] * 20
        place = next(p for p in range(8, len(seen)) if seen[p : p + 8] == ids.tolist())
        assert context.tolist() == seen[place - 8 : place]
        if EOS in ids.tolist():
            break
    assert told == [*text, EOS]


def test_rows_go_on_from_a_state_exactly():
    texts = [bytes(range(40)), bytes(range(40, 80)), bytes(range(80, 120))]
    whole, parts = sampler_of(texts, True), sampler_of(texts, True)
    for _ in range(7):
        whole.next()
        parts.next()
    again = sampler_of(texts, True)
    again.restore(json.loads(json.dumps(parts.state())))
    for _ in range(30):
        assert all(np.array_equal(a, b) for a, b in zip(whole.next(), again.next(), strict=True))
    with pytest.raises(UserError, match="not what it was"):
        sampler_of([text[::-1] for text in texts], True).restore(parts.state())
    with pytest.raises(UserError, match="not one of documents"):
        again.restore({"drawn": 3})


# --- a context in the model


def test_a_context_gives_what_the_whole_text_gives_without_its_gradient(mix_config):
    torch.manual_seed(0)
    model = ARBModel(config=mix_config().model).eval()
    ids = torch.randint(0, 256, (2, 20))
    whole = model(ids).logits
    behind = model(ids[:, 12:], context=ids[:, :12]).logits
    assert behind.shape == (2, 8, 288)
    torch.testing.assert_close(behind, whole[:, 10:], rtol=1e-4, atol=1e-4)
    output = model(ids[:, 12:], targets=ids[:, 12:], context=ids[:, :12])
    expected = torch.nn.functional.cross_entropy(whole[:, 10:-1].flatten(0, 1), ids[:, 13:].flatten())
    assert float(output.loss - 0.01 * output.losses["router"]) == pytest.approx(float(expected), rel=1e-4)
    other = torch.cat([(ids[:, :11] + 1) % 256, ids[:, 11:12]], dim=1)
    assert not torch.equal(model(ids[:, 12:], context=other).logits, behind)


def test_a_context_that_cannot_be_used_is_refused(mix_config):
    model = ARBModel(config=mix_config().model)
    ids = torch.zeros((2, 8), dtype=torch.int64)
    with pytest.raises(UserError, match="batch must agree"):
        model(ids, context=ids[:1])
    with pytest.raises(UserError, match="a context and a prefix"):
        model(ids, context=ids, prefix=torch.ones(2, 1, 32))
    with pytest.raises(UserError, match="both must agree"):
        model(ids, context=ids, targets=ids[:, 1:])


def test_preserved_state_trains_and_resumes_exactly(mix_config, tmp_path):
    from arbitor.train.checkpoint import load_checkpoint

    config = mix_config(preserve_state=True, audio_weight=0.0)
    losses = trainer_of(config, 12)[1]
    assert losses != trainer_of(mix_config(audio_weight=0.0), 12)[1]
    first, before = trainer_of(config, 5)
    first.save(tmp_path / "saved")
    second = trainer_of(config, 0, load_checkpoint(tmp_path / "saved"))[0]
    with deterministic(config.train.seed, torch.device("cpu")):
        assert before + [float(second.take_step()) for _ in range(7)] == losses
    assert first.evaluate(max_windows=2).bits_per_byte > 0


def test_ledgers_are_cleared_ahead_of_every_batch(mix_config):
    from arbitor.model.ledger import KVLedger

    trainer, _ = trainer_of(mix_config())
    ledger = KVLedger(trainer.model.config)
    trainer.model(torch.zeros((1, 5), dtype=torch.int64), ledger=ledger)
    assert ledger.num_positions == 3
    trainer.take_step()
    assert ledger.num_positions == 0


# --- data sets of the hub


class FakeStream:
    """What `datasets.load_dataset(..., streaming=True)` returns, as far as it is used."""

    def __init__(self, rows, features=None):
        self.rows, self.features = rows, features

    def __iter__(self):
        return iter(self.rows)

    def skip(self, count):
        return FakeStream(self.rows[count:], self.features)

    def cast_column(self, name, feature):
        return FakeStream(self.rows, {**self.features, name: feature})


@pytest.fixture
def hub(monkeypatch):
    """hub(rows): the hub has one data set, "some/texts", with the split "train"."""
    module = types.ModuleType("datasets")
    held = {}

    def load_dataset(name, configuration, *, split, streaming):
        assert streaming
        if name != "some/texts":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore")
        if split != "train":
            raise ValueError(f"Bad split: {split}")
        return FakeStream(held["rows"], held.get("features"))

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)

    def put(rows):
        held["rows"] = rows

    return put


def test_names_of_data_sets():
    spec = parse_spec("hf:HuggingFaceFW/fineweb/sample-10BT:train:text")
    assert (spec.name, spec.configuration) == ("HuggingFaceFW/fineweb", "sample-10BT")
    assert (spec.split, spec.field) == ("train", "text")
    assert parse_spec("hf:a/b").split == "train"
    assert parse_spec("hf:a/b:train.clean.100").split == "train.clean.100"
    for bad in ("hf:", "hf:a:", "hf:a:b:c:d", "hf:a::b"):
        with pytest.raises(UserError, match="no data set of the hub"):
            parse_spec(bad)


def hub_sampler():
    documents = HubDocuments(HubExamples("hf:some/texts"), 1, 1)
    return DocumentSampler(documents, 2, 8, with_context=False)


def test_documents_of_the_hub_are_read_in_order_and_again_from_the_first(hub):
    hub([{"text": text} for text in ("held", "abc", "", "defghijkl", "mn")])
    sampler = hub_sampler()
    told = [[], []]
    for _ in range(6):
        windows = sampler.next()
        for row in range(2):
            told[row] += windows.ids[row][windows.counted[row]].tolist()
    said = ["".join("|" if n == EOS else chr(n) for n in row) for row in told]
    assert said[0].startswith(
        "abc|defghijkl|"
    )  # of the second row's, which is empty, the next takes the place
    assert said[1].startswith("mn|abc|")  # from the first again
    assert set("".join(said)) == set("abcdefghijklmn|")


@pytest.mark.parametrize("steps", range(12))
def test_a_stream_of_the_hub_is_resumed_at_the_same_example(steps, hub):
    texts = ["held"] + ["x" * (n % 5 * 4) + f"document {n}" for n in range(9)]
    hub([{"text": text} for text in texts])
    whole = hub_sampler()
    for _ in range(steps):
        whole.next()
    again = hub_sampler()
    again.restore(json.loads(json.dumps(whole.state())))
    for _ in range(25):
        assert all(np.array_equal(a, b) for a, b in zip(whole.next(), again.next(), strict=True))


def test_a_run_on_a_data_set_of_the_hub_resumes_exactly(hub, mix_config, tmp_path):
    from arbitor.train.checkpoint import load_checkpoint

    hub([{"text": f"document {n} has this text. " * (1 + n % 3)} for n in range(140)])
    config = mix_config(text_data=["hf:some/texts"], image_weight=0.0, audio_weight=0.0)
    losses = trainer_of(config, 12)[1]
    first, before = trainer_of(config, 7)
    first.save(tmp_path / "saved")
    second = trainer_of(config, 0, load_checkpoint(tmp_path / "saved"))[0]
    with deterministic(config.train.seed, torch.device("cpu")):
        assert before + [float(second.take_step()) for _ in range(5)] == losses
    assert second.evaluate(max_windows=3).extra["unigram_text"] > 1


@pytest.mark.parametrize(
    ("data", "rows", "why"),
    [
        (
            ["hf:other/texts"],
            200,
            "cannot read the data set hf:other/texts:train: Couldn't reach 'other/texts'",
        ),
        (["hf:some/texts:test"], 200, "Bad split"),
        (["hf:some/texts:train:body"], 200, "no field 'body'; the fields are 'text'"),
        (["hf:some/texts"], 50, "no more than the 50 examples that are held out"),
        (["hf:some/texts"], 0, "are held out, have 0 bytes"),
        (["hf:some/texts", "data.txt"], 200, "stands alone"),
        (["hf:"], 200, "no data set of the hub"),
    ],
)
def test_data_sets_that_cannot_be_used_are_one_line(data, rows, why, hub, mix_config):
    hub([{"text": f"document {n}"} for n in range(rows)])
    with pytest.raises(UserError, match="--text-data: ") as error:
        open_mix(mix_config(text_data=data))
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_a_data_set_of_empty_texts_does_not_keep_a_run_waiting(hub, monkeypatch):
    monkeypatch.setattr("arbitor.data.documents.MAX_EMPTY", 20)
    hub([{"text": text} for text in ("held", "", "")])
    with pytest.raises(UserError, match="empty"):
        hub_sampler().next()


def test_without_the_library_the_extra_is_named(monkeypatch, mix_config):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"extra hub: pip install '\.\[hub\]'"):
        open_mix(mix_config(text_data=["hf:some/texts"]))


def test_a_local_folder_through_the_library_itself(tmp_path, mix_config):
    pytest.importorskip("datasets", reason="needs datasets (the extra hub)")
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"body": f"document {n} " * 3, "n": n}) for n in range(150)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    config = mix_config(text_data=[f"hf:{folder}:train:body"], image_weight=0.0, audio_weight=0.0)
    _, losses = trainer_of(config, 3)
    assert all(np.isfinite(losses))
    examples = HubExamples(f"hf:{folder}:train:body")
    assert next(examples.from_number(117))["n"] == 117


def test_images_and_recordings_of_a_data_set_are_learnt_from(tmp_path, monkeypatch, mix_config):
    import io

    from PIL import Image

    from arbitor.data.waves import write_recording

    pytest.importorskip("soundfile", reason="needs soundfile (the extra audio)")
    kinds = {
        name: type(name, (), {"__init__": lambda self, decode=True: None}) for name in ("Image", "Audio")
    }
    rows = []
    for number in range(20):
        picture = io.BytesIO()
        Image.fromarray(np.full((8, 8), 10 * number, np.uint8)).save(picture, "PNG")
        noise = 0.1 * np.random.default_rng(number).normal(size=600).astype(np.float32)
        write_recording(tmp_path / "sound.wav", noise, 2000)
        sound = (tmp_path / "sound.wav").read_bytes()
        rows.append(
            {
                "image": {"bytes": picture.getvalue(), "path": None},
                "audio": {"bytes": sound if number else b"damaged", "path": None},
                "text": f"number {number}",
            }
        )
    rows.append({"image": {"bytes": None, "path": "nowhere.png"}, "audio": None, "text": "missing"})
    module = types.ModuleType("datasets")
    features = {"image": kinds["Image"](), "audio": kinds["Audio"](), "text": None}
    module.load_dataset = lambda *_, **__: FakeStream(rows, features)
    module.Value = str
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = {"image_data": ["hf:some/media"], "audio_data": ["hf:some/media"]}
    config = mix_config(**data, text_weight=0.0, code_weight=0.0)
    trainer, losses = trainer_of(config, 6)
    assert all(np.isfinite(losses))
    assert "image 50%: hf:some/media:train: a stream, shuffled 512 at a time; 2 held out" in (
        trainer.task.description
    )
    held_out = [trainer.task.parts[name].task.corpus.held_out for name in ("image", "audio")]
    assert held_out[0].captions == held_out[1].labels == [b"number 9", b"number 19"]
    told = "\n".join(trainer.task.news())
    assert told.count("hf:some/media:train; skipped ") == 2
    assert "skipped 1 damaged" in told
