"""Names that scripts of the earlier system use, each tried for what is said of it."""

import contextlib
import copy
import subprocess
import sys

import pytest
import torch

import arbitor
from arbitor.model import ARBModel, KVLedger
from arbitor.ternary.runtime import attached_optimizer
from testing.small_net import changed, snapshot
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
