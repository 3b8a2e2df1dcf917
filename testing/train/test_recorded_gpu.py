"""Steps that a GPU replays from a graph are those that it takes without one."""

import dataclasses

import pytest
import torch

from arbitor.audio_command import main as audio_main
from arbitor.cli import main as cli_main
from arbitor.config import preset
from arbitor.data import open_corpus
from arbitor.pretrain_command import main as pretrain_main
from arbitor.ternary.optimizer import STATES, WORKSPACE_BYTES_PER_WEIGHT
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.device import deterministic, resolve_device
from arbitor.train.loop import Trainer
from arbitor.train.recorded import MOST_AHEAD, WARM_UP, RecordedStep, can_record
from arbitor.video_command import main as video_main
from testing.small_run import MODEL
from testing.train.test_model_parts import PARTS

pytestmark = pytest.mark.gpu

STEPS = WARM_UP + 5
SOUNDS = ["--ctx", "1000", "--rate", "2000", "--codec-dim", "16", "--codec-layers", "1"]
KINDS = {
    "text": {},
    "compact": {"state": "compact"},
    "lean": {"state": "lean"},
    "scales": {"scale_lr": 0.01},
    "micro-batches": {"accum": 2},
    "T32": {"tscale": "T32"},
    "sign": {"rule": "sign"},
    "parts": {**PARTS, "max_moe_iters": 1},
    "iterations": PARTS,
    "experts, lean": {**PARTS, "max_moe_iters": 1, "state": "lean"},
}


@pytest.fixture
def make(settings, workplace):
    """make(recorded, checkpoint=None, **settings) -> a trainer on the GPU."""
    device = resolve_device("cuda")

    def trainer(recorded, checkpoint=None, **changes):
        values = {**settings, "device": "cuda", "steps": STEPS, **changes}
        made = Trainer(preset("tiny", **values), open_corpus(["data.txt"]), device, checkpoint)
        assert can_record(made.model)
        if not recorded:
            made._recorded = None
        return made

    return trainer


def kept(trainer):
    return dict(trainer.model.state_dict()) | trainer.optimizer.named_state()


def steps(trainer, count):
    """Losses, whether they counted, all readings and flip rates, of `count` steps."""
    seen = []
    for _ in range(count):
        loss = trainer.take_step()
        scalars = {**trainer.readings, "loss": loss, "ok": trainer.last_ok}
        seen.append({k: float(v) for k, v in scalars.items()} | {"flips": trainer.optimizer.flip_rate()})
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_others(make, kind):
    results = []
    for recorded in (False, True):
        with deterministic(3, torch.device("cuda")):
            trainer = make(recorded, **KINDS[kind])
            seen = steps(trainer, STEPS)
            assert not trainer.waits
            assert (trainer._recorded is not None and trainer._recorded.recorded) == recorded
            results.append((seen, kept(trainer), trainer.optimizer.hyperparameters()))
    (plain, state, values), (replayed, replayed_state, replayed_values) = results
    assert replayed == plain
    assert replayed_values == values
    assert [name for name in state if not torch.equal(state[name], replayed_state[name])] == []
    assert len({step["loss"] for step in replayed}) == STEPS


def test_few_replays_wait_for_the_gpu():
    """Else a run could be hundreds of steps behind what its host has asked for."""

    def work(batch):
        torch.cuda._sleep(10_000_000)  # milliseconds, where a replay is launched in microseconds
        return {"sum": batch[0].sum()}

    step = RecordedStep(work, torch.device("cuda"))
    another = RecordedStep(work, torch.device("cuda"), beside=step)
    ends, waiting, sums = [], [], []
    for number in range(WARM_UP + 1):
        step([torch.full((2,), number)])
        another([torch.full((2,), number)])
    torch.cuda.synchronize()
    for number in range(4 * MOST_AHEAD):
        sums.append((step, another)[number % 2]([torch.full((2,), number)])["sum"])
        ends.append(torch.cuda.Event())
        ends[-1].record()
        waiting.append(sum(not end.query() for end in ends))
    assert step.recorded
    assert another.recorded
    assert max(waiting) == MOST_AHEAD
    assert torch.stack(sums).tolist() == [2 * number for number in range(len(sums))]


def test_a_step_in_which_the_host_waits_is_not_recorded(make, monkeypatch):
    """A workspace for one expert, and fewer tokens than make its gradient dense."""
    one = PARTS["expert_dim"] * MODEL["dim"] * WORKSPACE_BYTES_PER_WEIGHT
    monkeypatch.setitem(STATES, "full", dataclasses.replace(STATES["full"], workspace_bytes=one))
    results = []
    for recorded in (False, True):
        with deterministic(3, torch.device("cuda")):
            trainer = make(recorded, **PARTS, max_moe_iters=1, batch=2)
            results.append((steps(trainer, STEPS), kept(trainer)))
    assert trainer.waits
    assert not trainer._recorded.recorded
    assert torch.cuda.get_sync_debug_mode() == 0
    assert results[0][0] == results[1][0]
    assert [
        name for name, tensor in results[0][1].items() if not torch.equal(tensor, results[1][1][name])
    ] == []


def test_an_evaluation_between_replays_changes_nothing(make):
    results = []
    for evaluate in (False, True):
        with deterministic(3, torch.device("cuda")):
            trainer = make(True)
            steps(trainer, WARM_UP + 2)
            if evaluate:
                trainer.evaluate(max_windows=4)
            results.append(steps(trainer, STEPS - WARM_UP - 2))
    assert results[0] == results[1]


def test_a_resumed_run_equals_an_uninterrupted_one(make, tmp_path):
    with deterministic(3, torch.device("cuda")):
        whole = make(True, **PARTS)
        first = steps(whole, WARM_UP + 2)
        whole.save(tmp_path / "latest")
        rest = steps(whole, STEPS - len(first))
    with deterministic(4, torch.device("cuda")):
        resumed = make(True, load_checkpoint(tmp_path / "latest"), **PARTS)
        assert steps(resumed, len(rest)) == rest
    states = kept(whole), kept(resumed)
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_a_replayed_step_can_be_dropped(make):
    with deterministic(3, torch.device("cuda")):
        trainer = make(True)
        steps(trainer, WARM_UP + 1)
        before = {name: tensor.clone() for name, tensor in kept(trainer).items()}
        embed = trainer.model.embed
        exponent = embed.E.clone()
        embed.E.fill_(127)  # so large that the loss is not finite
        seen = steps(trainer, 1)
        embed.E.copy_(exponent)
        assert seen[0]["ok"] == 0.0
        assert trainer.optimizer.dropped_steps == 1
        after = kept(trainer)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert steps(trainer, 1)[0]["ok"] == 1.0


COMMANDS = {
    "codec": ["--task", "codec", *SOUNDS],
    "listen": ["--task", "listen", *SOUNDS],
    "speak": ["--task", "speak", *SOUNDS],
    "video codec": ["--task", "codec", "--size", "8", "--frames", "4", "--dim", "32"],
    "video flow": ["--task", "flow", "--size", "8", "--frames", "4", "--dim", "32"],
    "images": ["train", "--enable-vision", "--image-size", "8", "--image-patch", "4", "--ctx", "32"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_runs_on_media_are_the_same_with_and_without_replays(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.data.audio._SYNTHETIC_COUNT", 30)
    main = cli_main if name == "images" else video_main if name.startswith("video") else audio_main
    common = ["--steps", str(STEPS), "--batch", "4", "--eval-steps", "4", "--device", "cuda", "--run"]
    assert main([*COMMANDS[name], *common, "replayed"]) == 0
    monkeypatch.setattr("arbitor.train.loop.can_record", lambda model: False)
    assert main([*COMMANDS[name], *common, "plain"]) == 0
    runs = (tmp_path / "runs" / run / "final" for run in ("replayed", "plain"))
    models, optimizers = zip(
        *(((f / "model.safetensors").read_bytes(), (f / "optimizer.safetensors").read_bytes()) for f in runs),
        strict=True,
    )
    assert models[0] == models[1]
    assert optimizers[0] == optimizers[1]


def test_a_mixed_run_is_the_same_with_and_without_replays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arbitor.data.audio._SYNTHETIC_COUNT", 30)
    weights = [
        flag for name in ("text", "code", "image", "audio", "video") for flag in (f"--{name}-weight", "1")
    ]
    sizes = ["--audio-seconds", "0.1", "--video-size", "8", "--video-frames", "4"]
    common = [
        *("--steps", "40", "--batch", "4", "--eval-steps", "4", "--eval-interval", "20", "--device", "cuda"),
        *(*weights, *sizes, "--run"),
    ]  # fmt: skip
    seen = []
    take = Trainer.take_step

    def watched(self):
        loss = take(self)
        seen.append((float(loss), self.optimizer.flip_rate(), self._recorded))
        return loss

    monkeypatch.setattr(Trainer, "take_step", watched)
    assert pretrain_main([*common, "replayed"]) == 0
    steps = seen[-1][2]._steps
    assert len(steps) == 4  # all but sounds, whose batches differ in length
    assert not seen[-1][2].waits
    assert sum(step.recorded for step in steps.values()) >= 3
    monkeypatch.setattr("arbitor.train.loop.can_record", lambda model: False)
    assert pretrain_main([*common, "plain"]) == 0
    assert [step[:2] for step in seen[:40]] == [step[:2] for step in seen[40:]]
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = ((tmp_path / "runs" / run / "final" / file).read_bytes() for run in ("replayed", "plain"))
        assert one == two
