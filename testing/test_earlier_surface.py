"""Names that scripts of the earlier system use, each tried for what is said of it."""

import contextlib
import copy
import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import arbitor
from arbitor.config import PRESETS, load_config, preset
from arbitor.drawing import draw
from arbitor.model import ARBModel, KVLedger
from arbitor.ternary.runtime import attached_optimizer
from testing.small_net import changed, snapshot
from testing.small_run import MODEL
from training.ternary_runtime import configure_ternary_training, reset_runtime_state

SMALL = {
    "dim": 32,
    "num_prelude_layers": 1,
    "num_coda_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "rope_dim": 8,
    "value_dim": 16,
    "kv_latent_dim": 32,
    "ffn_dim": 64,
    "num_experts": 4,
    "expert_dim": 64,
    "graph_edges": 64,
    "graph_heads": 2,
}


def small(**overrides):
    torch.manual_seed(0)
    return ARBModel("arb-1b", **{**SMALL, **overrides})


def ids(seed=0):
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(seed))


def test_the_default_model_has_text_motifs_and_graph():
    model = arbitor.ARBModel(device="meta")
    config = model.config
    assert config == arbitor.ARBModel("arb-1b", device="meta").config
    assert config.motif_trits == 9
    assert config.num_experts == 32
    assert config.graph_edges > 0
    assert (config.halt_threshold, config.max_moe_iters) == (0.99, 4)
    assert config.memory_rows == 0, "the memory is opt-in"


def test_memory_is_enabled_by_name():
    assert arbitor.ARBModel(device="meta", enable_memory=True).config.memory_rows > 0


def test_the_loop_of_the_earlier_system():
    model = small()
    for step in range(3):
        model.prepare_ternary_backward()
        loss = model(ids(step), targets=ids(step)).loss
        loss.backward()
        before = snapshot(model)
        assert model._ternary_update_memory(loss_signal=loss) is True
        assert changed(before, snapshot(model)) != []
    assert attached_optimizer(model).state_name == "lean"


def test_a_loop_that_prepares_with_the_loss_that_it_has():
    model = small()
    taken = []
    configure_ternary_training(model)
    for step in range(2):
        loss = model(ids(step), targets=ids(step)).loss
        model.prepare_ternary_backward(loss_signal=loss, update_scales=False)
        loss.backward()
        taken.append(model._ternary_update_memory(loss_signal=loss, loss_components={"text": loss}))
    assert taken == [True, True]


def test_a_loop_that_configures_nothing_begins_with_its_second_step():
    model = small()
    before = snapshot(model)
    taken = []
    for step in range(2):
        loss = model(ids(step), targets=ids(step)).loss
        with (
            pytest.warns(UserWarning, match="before an optimizer") if step == 0 else contextlib.nullcontext()
        ):
            model.prepare_ternary_backward(loss_signal=loss)
        loss.backward()
        taken.append(model._ternary_update_memory(loss_signal=loss))
        assert (changed(before, snapshot(model)) != []) is taken[-1]
    assert taken == [False, True]


def test_a_loss_by_components_trains_as_their_sum_does():
    states = []
    for components in (False, True):
        model = small()
        model.prepare_ternary_backward()
        output = model(ids(), targets=ids())
        weighted = {
            "text": output.losses["text"],
            "ponder": model.config.ponder_weight * output.losses["ponder"],
        }
        assert model._ternary_update_memory(
            *((None, weighted) if components else (weighted["text"] + weighted["ponder"],))
        )
        states.append(snapshot(model))
    assert changed(*states) == []


def test_a_model_that_nobody_trains_is_left_alone():
    model = small()
    before = snapshot(model)
    loss = model(ids(), targets=ids()).loss
    assert model._ternary_update_memory(loss_signal=loss) is False
    assert attached_optimizer(model) is None
    assert changed(before, snapshot(model)) == []


def test_pending_steps_of_scales_are_applied_by_hand():
    model = small()
    configure_ternary_training(model, e_accum_threshold=32)
    layer = model.prelude[0].ffn.up
    start = layer.E.clone()
    attached_optimizer(model).state[layer.T_packed]["E_accum"].fill_(20)
    assert layer.update_E() == 0
    configure_ternary_training(model, e_accum_threshold=16)
    assert layer.update_E() == layer.E.numel()
    assert torch.equal(layer.E, start + 1)
    assert (attached_optimizer(model).state[layer.T_packed]["E_accum"] == 4).all()


def test_scripts_import_the_runtime_from_a_checkout(repository):
    code = (
        "from training.ternary_runtime import configure_ternary_training, reset_runtime_state; "
        "from arbitor import ARBModel; model = ARBModel('tiny'); reset_runtime_state(model); "
        "print(configure_ternary_training(model, accum_threshold=20))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("20\n", "")


def test_the_update_runs_backward_itself_if_nobody_did():
    model = small()
    model.prepare_ternary_backward()
    output = model(ids(), targets=ids())
    other = small()
    other.prepare_ternary_backward()
    assert model._ternary_update_memory(output.loss)
    loss = other(ids(), targets=ids()).loss
    loss.backward()
    assert other._ternary_update_memory(loss)
    assert changed(snapshot(model), snapshot(other)) == []


def test_the_update_without_captures_and_loss_says_so():
    model = small()
    model.prepare_ternary_backward()
    before = snapshot(model, attached_optimizer(model))
    assert model._ternary_update_memory() is False
    assert model._ternary_update_memory(loss_signal=torch.tensor(3.0), loss_components={}) is False
    assert changed(before, snapshot(model, attached_optimizer(model))) == []


def test_thresholds_are_configured_on_the_model():
    model = small()
    assert configure_ternary_training(model) == 32
    assert configure_ternary_training(model, accum_threshold=48, e_accum_threshold=16) == 48
    assert attached_optimizer(model).accum_threshold == 48


def test_runtime_state_is_reset():
    model = small(motif_trits=4, attention_window=5)
    ledger, other = KVLedger(model.config, 40), KVLedger(model.config, 40)
    first = model(ids(), ledger=ledger).logits
    model(ids(1), ledger=other)
    before = snapshot(model)
    reset_runtime_state(model)
    assert (ledger.num_ids, other.num_ids) == (0, 0)
    assert torch.equal(model(ids(), ledger=ledger).logits, first), "nothing is left of the text before"
    assert changed(before, snapshot(model)) == []
    reset_runtime_state(torch.nn.Linear(2, 2))


def test_a_ledger_that_is_gone_is_forgotten():
    model = small()
    model(ids(), ledger=KVLedger(model.config, 40))
    assert len(model.ledgers) == 0


def test_a_model_that_was_used_can_be_copied():
    model = small()
    model.prepare_ternary_backward()
    model(ids(), ledger=KVLedger(model.config, 40))
    other = copy.deepcopy(model)
    assert attached_optimizer(other) is None


@pytest.mark.parametrize(
    ("flags", "off"),
    [
        (["--disable-moe"], {"num_experts": 0}),
        (["--disable-vq"], {"motif_trits": 0, "codebook_rows": 0, "graph_edges": 0}),
        (["--disable-graph"], {"graph_edges": 0}),
        (["--max-moe-iters", "2"], {"max_moe_iters": 2}),
        (["--memory-rows", "99"], {"memory_rows": 99}),
    ],
)
def test_flags_leave_parts_out(monkeypatch, flags, off):
    given = {}
    monkeypatch.setattr("arbitor.train.session.start_training", lambda settings, **_: given.update(settings))
    from arbitor.cli import main

    main(["train", "--preset", "arb-small", *flags])
    assert given == off


def test_the_memory_is_enabled_by_a_flag(monkeypatch):
    given = {}
    monkeypatch.setattr("arbitor.train.session.start_training", lambda settings, **_: given.update(settings))
    from arbitor.cli import main

    main(["train", "--enable-memory"])
    assert given["memory_rows"] > 0
    given.clear()
    main(["train", "--enable-memory", "--memory-rows", "7"])
    assert given == {"memory_rows": 7}


@pytest.mark.parametrize(
    "flags",
    [
        ["--disable-moe", "--disable-vq", "--disable-graph"],
        ["--max-moe-iters", "1", "--disable-vq", "--disable-graph"],
        [],
    ],
)
def test_one_step_of_training_with_the_flags_of_the_earlier_system(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(
        'preset = "arb-1b"\n[model]\n' + "\n".join(f"{name} = {value}" for name, value in SMALL.items())
    )
    (tmp_path / "data.txt").write_text("A text that repeats itself. " * 50)
    from arbitor.cli import main

    command = (
        "train --preset arb-1b --steps 1 --batch 1 --accum 1 --ctx 4 --eval-steps 1 --eval-interval 1 "
        "--save-interval 0 --no-save --run smoke --reset --config small.toml --data data.txt --device cpu"
    )
    for _ in range(2):  # --reset starts an existing run anew
        assert main([*command.split(), *flags]) == 0, capsys.readouterr().err
    assert not (tmp_path / "runs" / "smoke" / "latest").exists()


# -- command lines ------------------------------------------------------------------------------------------

TINY = dict(MODEL, ctx=16, motif_trits=3, num_experts=2, expert_dim=32, graph_edges=16, graph_heads=2)
TINY |= {"memory_heads": 1, "memory_dim": 8, "image_patch": 4, "image_channels": 1}
TINY |= {"audio_dim": 16, "audio_layers": 1, "video_dim": 32, "video_layers": 1, "video_frames": 2}
STEP = "--steps 1 --batch 2 --accum 2 --eval-steps 1 --eval-interval 1 --save-interval 1 --device cpu"
PARTS = "--max-moe-iters 1 --enable-memory --accum-threshold 20 --e-accum-threshold 24"
BARE = "--disable-moe --disable-vq --disable-graph --no-save"
TEXT, PHOTOS = "--data data.txt --ctx 64", "--data photos --image-size 8 --ctx 16"
MIX = "--text-weight 2 --code-weight 1 --image-weight 1 --audio-weight 1 --video-weight 1 --log-interval 1"
MIXED = "--text-data data.txt --code-data data.txt --image-data photos --image-size 8 --audio-seconds 0.1"
TUNE = "--steps 1 --batch 2 --device cpu --eval-interval 1 --save-interval 1 --run tuned"

# Command lines with what they are given beside `STEP`, and those that finetune what they made.
LINES = {
    "arbitor.train": (f"{TEXT} {PARTS}", "training/finetuning/text.py made --data talk.jsonl"),
    "arbitor.train --enable-audio": (f"--ctx 16 {PARTS}", None),
    "arbitor.train --enable-vision --enable-audio": (f"--config mix.toml --ctx 16 {PARTS}", None),
    "training/text.py": (f"{TEXT} {PARTS}", None),
    "training/vision.py": (
        f"--enable-image {PHOTOS} {PARTS}",
        "training/finetuning/vision.py made --enable-vision --data photos",
    ),
    "training/audio.py": (f"--ctx 800 {PARTS}", "training/finetuning/audio.py made --enable-audio"),
    "training/diffusion.py": (
        "--size 8 --held-out 4",
        "training/finetuning/diffusion.py made --held-out 4",
    ),
    "training/pretrain.py": (
        f"--enable-vision --enable-audio {MIX} {MIXED} --video-size 8 --ctx 16 --preserve-state {PARTS}",
        None,
    ),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with data, where a step of the preset `tiny`, which has every part here, takes little."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", preset("tiny", **TINY))
    for name, small in (
        ("data.audio._SYNTHETIC_COUNT", 30),
        ("train.mix.SHOWN_BYTES", 4),
        ("train.mix.ROUTER_ITEMS", 1),
        ("train.report.SAMPLE_BYTES", 4),
        ("train.loop.LAST_WINDOWS_PER_TRAINED", 1),
        ("train.video_tasks.STANDARD_CLIPS", 8),
        ("train.video_tasks.draw", functools.partial(draw, steps=1)),
    ):
        monkeypatch.setattr(f"arbitor.{name}", small)
    (tmp_path / "data.txt").write_text("".join(f"line {n} of some text\n" for n in range(400)))
    lines = [json.dumps({"prompt": f"say {n}", "response": f"<{n}>"}) for n in range(10)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    (tmp_path / "photos").mkdir()
    for n in range(10):
        Image.new("L", (8, 8), 20 * n).save(tmp_path / f"photos/{n}.png")
        (tmp_path / f"photos/{n}.txt").write_text(f"<{n}>")
    mix = (
        "[model]\nimage_size = 8\naudio_samples = 800\n[mix]\ntext_data = 'data.txt'\nimage_data = 'photos'\n"
    )
    (tmp_path / "mix.toml").write_text(mix)
    return tmp_path


@pytest.fixture
def call(repository, monkeypatch, capsys):
    """call(line): the exit code of `python line`, or of `python -m line`."""

    def run(line):
        script, *arguments = line.split()
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        if script.endswith(".py"):
            start = functools.partial(runpy.run_path, str(repository / script))
        else:
            start = functools.partial(runpy.run_module, script, alter_sys=True)
        with pytest.raises(SystemExit) as end:
            start(run_name="__main__")
        if end.value.code:
            pytest.fail(capsys.readouterr().err)
        return end.value.code

    return run


@pytest.mark.long
@pytest.mark.parametrize("line", LINES)
def test_every_flag_of_the_earlier_system_trains_a_step(line, workplace, call):
    more, finetune = LINES[line]
    first = " --codec-steps 1" if "diffusion" in line else ""  # in place of ten
    assert call(f"{line} {STEP} {more} --run made --reset{first}") == 0
    config = load_config("runs/made/config.toml")
    assert (config.train.batch, config.train.accum, config.train.eval_steps) == (2, 2, 1)
    assert call(f"{line} {STEP.replace('--steps 1', '--steps 2')} {more} --run made --resume") == 0
    assert load_config("runs/made/config.toml").train.steps == 2
    if PARTS in more:
        assert config.model.memory_rows > 0
        assert config.model.max_moe_iters == 1
        assert (config.train.accum_threshold, config.train.e_accum_threshold) == (20, 24)
        assert call(f"{line} {STEP} {more.replace(PARTS, BARE)} --run bare") == 0
        bare = load_config("runs/bare/config.toml").model
        assert (bare.num_experts, bare.motif_trits, bare.graph_edges, bare.memory_rows) == (0, 0, 0, 0)
        assert not Path("runs/bare/latest").exists()
    if finetune is not None:
        assert call(f"{finetune} {TUNE}") == 0
        assert Path("runs/tuned/final/adapter_config.json").is_file()


def test_smoke_takes_the_flags_of_the_earlier_system(call):
    flags = "--preset tiny --state lean --seed 1 --ctx 8 --batch 1 --max-moe-iters 1 --no-vq --no-graph"
    assert call(f"arbitor.smoke {flags} --backward --device cpu") == 0
