"""Randomness that follows from the seed, and state that continues to the bit."""

import io

import pytest
import torch
from torch import nn

from arbitor.errors import UserError
from arbitor.ternary import TernaryLinear, VoteOptimizer, named_ternary
from arbitor.ternary.update import StepNumbers
from testing.small_net import SmallNet, backward, changed, each_state, make, snapshot, train


@each_state
def test_the_same_seed_gives_the_same_run_and_another_seed_another(state):
    runs = []
    for seed in (4, 4, 5):
        net, optimizer = make(state=state, seed=0)
        optimizer.seed = seed
        runs.append((train(net, optimizer, range(4)), snapshot(net, optimizer)))
    assert runs[0][0] == runs[1][0]
    assert changed(runs[0][1], runs[1][1]) == []
    assert "up.0.T_accum" in changed(runs[0][1], runs[2][1])
    assert runs[0][0] != runs[2][0]


def test_the_number_of_a_step_wraps_at_32_bits_and_no_sooner():
    numbers = StepNumbers(torch.device("cpu"))
    found = {}
    for count in (0, 255, 256, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32):
        numbers.write(count, 1.0, 1.0, 0.0)
        found[count] = int(numbers.count)
    assert found == {
        **{count: count for count in (0, 255, 256, 65536, (1 << 31) - 1)},
        1 << 31: -(1 << 31),
        (1 << 32) - 1: -1,
        1 << 32: 0,
    }


def test_the_global_generator_plays_no_part_in_a_step():
    net, optimizer = make()
    twin, twin_optimizer = make()
    train(net, optimizer, range(3))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    train(twin, twin_optimizer, range(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert changed(snapshot(net, optimizer), snapshot(twin, twin_optimizer)) == []


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@each_state
@pytest.mark.parametrize("form", ["state_dict", "named_state"])
def test_a_resumed_run_continues_to_the_bit(form, state):
    net, optimizer = make(state=state, scale_lr=0.1, accum_threshold=40)
    train(net, optimizer, range(3))
    optimizer.note_loss(torch.tensor(torch.nan))
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5

    resumed = SmallNet()
    resumed.load_state_dict(through_a_file(net.state_dict()))
    if form == "state_dict":
        other = VoteOptimizer(resumed, state=state, seed=3)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        other = VoteOptimizer(resumed, state=state, scale_lr=0.1, seed=3)
        other.load_hyperparameters(through_a_file(optimizer.hyperparameters()))
        other.load_named_state(through_a_file(optimizer.named_state()))
        other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    assert changed(snapshot(net, optimizer), snapshot(resumed, other)) == []
    assert other.hyperparameters() == optimizer.hyperparameters()
    assert train(resumed, other, range(4, 8)) == train(net, optimizer, range(4, 8))
    assert changed(snapshot(net, optimizer), snapshot(resumed, other)) == []
    assert other.dropped_steps == 1


def test_state_dict_holds_integers_and_plain_values_only():
    net, optimizer = make()
    train(net, optimizer, range(2))

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for v in value.values() for leaf in leaves(v)]
        return [leaf for v in value for leaf in leaves(v)] if isinstance(value, list) else [value]

    for leaf in leaves(optimizer.state_dict()):
        if isinstance(leaf, torch.Tensor):
            assert not leaf.is_floating_point()
        else:
            assert leaf is None or isinstance(leaf, (int, float, str, bool))


def test_loading_copies_into_the_live_state():
    net, optimizer = make()
    saved = {name: t.clone() for name, t in optimizer.named_state().items()}
    train(net, optimizer, range(2))
    live = optimizer.named_state()
    optimizer.load_named_state(saved)
    for name, tensor in optimizer.named_state().items():
        assert tensor is live[name]
        assert torch.equal(tensor, saved[name])
        assert tensor.data_ptr() != saved[name].data_ptr()


def drop(state, name):
    del state[name]


def add(state, name):
    state[name] = torch.zeros(3, dtype=torch.int8)


def reshape(state, name):
    state[name] = state[name][:-1]


def retype(state, name):
    state[name] = state[name].to(torch.float32)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (drop, "up.0.T_accum", r"1 missing \['up\.0\.T_accum'\], 0 unknown"),
        (add, "up.7.T_accum", r"0 missing \[\], 1 unknown \['up\.7\.T_accum'\]"),
        (
            reshape,
            "up.1.M",
            r"up\.1\.M is torch\.int8 \(35, 20\), expected torch\.int8 \(36, 20\)",
        ),
        (retype, "head.M_exp", r"head\.M_exp is torch\.float32 .* expected torch\.int16"),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_state_that_does_not_fit_is_named_and_changes_nothing(damage, name, message):
    net, optimizer = make()
    before = snapshot(net, optimizer)
    train(net, optimizer, range(1))
    damaged = {key: t.clone() for key, t in before.items() if key in optimizer.named_state()}
    damage(damaged, name)
    now = snapshot(net, optimizer)
    with pytest.raises(UserError, match=message):
        optimizer.load_named_state(damaged)
    assert changed(now, snapshot(net, optimizer)) == []


def test_a_state_dict_of_another_model_is_named_and_changes_nothing():
    def attach(*sizes):
        return VoteOptimizer(
            nn.Sequential(*(TernaryLinear(columns, 6) for columns in sizes)), seed=len(sizes)
        )

    optimizer = attach(40, 33)
    before = {name: t.clone() for name, t in optimizer.named_state().items()}
    hyperparameters = optimizer.hyperparameters()
    for other, message in (
        (attach(40, 32), r"1\.M is torch\.int8 \(6, 32\), expected torch\.int8 \(6, 33\)"),
        (attach(40), r"4 missing \['1\.E_accum', '1\.M', '1\.M_exp'\], 0 unknown"),
        (attach(40, 33, 5), r"0 missing \[\], 4 unknown \['2\.E_accum', '2\.M', '2\.M_exp'\]"),
    ):
        other.step_count = 9
        with pytest.raises(UserError, match=message):
            optimizer.load_state_dict(other.state_dict())
        assert changed(before, optimizer.named_state()) == []
        assert optimizer.hyperparameters() == hyperparameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "lean"}, "the saved optimizer has state 'full', this one 'lean'"),
        ({"rule": "row"}, "the saved optimizer has rule 'spectral', this one 'row'"),
    ],
    ids=["state", "rule"],
)
def test_hyperparameters_of_another_kind_are_refused(options, message):
    _, saved = make()
    _, optimizer = make(**options)
    with pytest.raises(UserError, match=message):
        optimizer.load_hyperparameters(saved.hyperparameters())
    with pytest.raises(UserError, match=message):
        optimizer.load_state_dict(saved.state_dict())


@each_state
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_weights_may_be_loaded_under_an_attached_optimizer(assign, state):
    net, optimizer = make(state=state, lr=0.2)
    train(net, optimizer, range(3))
    saved, saved_state = snapshot(net), snapshot(net, optimizer)
    expected = (train(net, optimizer, range(3, 5)), snapshot(net, optimizer))

    resumed, other = make(seed=1, state=state, lr=0.2)
    names, shapes = list(other.named_state()), [t.shape for t in other.named_state().values()]
    resumed.load_state_dict(saved, assign=assign)
    assert list(other.named_state()) == names
    assert [t.shape for t in other.named_state().values()] == shapes
    assert {id(p) for p in other.param_groups[0]["params"]} == {
        id(m.stored) for _, m in named_ternary(resumed)
    }
    assert not any(p.requires_grad for p in resumed.parameters())
    other.load_named_state({name: t for name, t in saved_state.items() if name in names})
    other.step_count = 3
    assert (train(resumed, other, range(3, 5)), changed(expected[1], snapshot(resumed, other))) == (
        expected[0],
        [],
    )


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_weights_keeps_the_state_until_it_is_reset(assign):
    net, optimizer = make(lr=0.3)
    train(net, optimizer, range(3))
    state = {name: t.clone() for name, t in optimizer.named_state().items()}
    others = SmallNet().state_dict()
    net.load_state_dict(others, assign=assign)
    assert changed(state, optimizer.named_state()) == []


@each_state
def test_a_reset_state_is_that_of_an_optimizer_for_loaded_weights(state):
    net, optimizer = make(state=state, lr=0.3, tscale="T8", scale_lr=0.5)
    train(net, optimizer, range(3))
    loaded = SmallNet("T8")
    loaded.load_state_dict(net.state_dict())
    fresh = VoteOptimizer(loaded, state=state, lr=0.3, scale_lr=0.5)
    fresh.step_count = 3
    backward(net)
    optimizer.reset_state()
    assert not optimizer.has_captures
    assert changed(fresh.named_state(), optimizer.named_state()) == []
    assert train(net, optimizer, range(3, 5)) == train(loaded, fresh, range(3, 5))
    assert changed(snapshot(net, optimizer), snapshot(loaded, fresh)) == []


def test_a_parameter_that_was_replaced_by_hand_is_named():
    net, optimizer = make()
    net.up[1].T_packed = nn.Parameter(net.up[1].T_packed.clone(), requires_grad=False)
    with pytest.raises(UserError, match=r"the parameter of up\.1 was replaced"):
        optimizer.named_state()


def test_load_state_dict_copies():
    net, optimizer = make()
    train(net, optimizer, range(2))
    saved = optimizer.state_dict()
    twin, other = make(seed=1)
    twin.load_state_dict(net.state_dict())
    live = other.named_state()
    other.load_state_dict(saved)
    assert all(tensor is live[name] for name, tensor in other.named_state().items())
    before = {name: t.clone() for name, t in optimizer.named_state().items()}
    train(twin, other, range(2, 4))
    other.param_groups[0]["lr"] = 0.7
    assert changed(before, optimizer.named_state()) == []
    assert optimizer.param_groups[0]["lr"] == saved["param_groups"][0]["lr"] == 0.05


def without(key):
    def damage(saved):
        del saved[key]

    return damage


def set_hyperparameter(key, value):
    def damage(saved):
        saved["hyperparameters"] = {**saved["hyperparameters"], key: value}
        if value is None:
            del saved["hyperparameters"][key]

    return damage


def set_rate(saved):
    saved["param_groups"] = [{**saved["param_groups"][0], "lr": float("nan")}]


def add_group(saved):
    saved["param_groups"] = saved["param_groups"] * 2


def not_a_tensor(saved):
    saved["state"] = {**saved["state"], 0: dict.fromkeys(saved["state"][0], 3)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("hyperparameters"), "no state_dict of a VoteOptimizer: it has no hyperparameters"),
        (without("state"), "no state_dict of a VoteOptimizer: it has no state"),
        (without("param_groups"), "no state_dict of a VoteOptimizer: it has no param_groups"),
        (set_hyperparameter("seed", None), "the saved optimizer has no seed"),
        (set_hyperparameter("step_count", "many"), "has step_count 'many', which is no whole number"),
        (set_hyperparameter("dropped_steps", 0.5), r"has dropped_steps 0\.5, which is no whole number"),
        (set_hyperparameter("accum_threshold", 500), "accum_threshold must be between 2 and 127, got 500"),
        (set_hyperparameter("rule", "row"), "the saved optimizer has rule 'row', this one 'spectral'"),
        (set_rate, "learning rate must be a finite number that is not negative, got nan"),
        (add_group, "does not have the one group of this model's weights"),
        (not_a_tensor, "is no tensor but a int"),
    ],
    ids=lambda value: None,
)
def test_a_damaged_state_dict_is_refused_whole(damage, message):
    net, saved_optimizer = make(seed=2)
    train(net, saved_optimizer, range(2))
    saved = dict(saved_optimizer.state_dict())
    damage(saved)
    net, optimizer = make(accum_threshold=40)
    train(net, optimizer, range(1))
    before, plain = snapshot(net, optimizer), optimizer.hyperparameters()
    rates = dict(optimizer.param_groups[0])
    with pytest.raises(UserError, match=message):
        optimizer.load_state_dict(saved)
    assert changed(before, snapshot(net, optimizer)) == []
    assert optimizer.hyperparameters() == plain
    assert optimizer.param_groups == [rates]
