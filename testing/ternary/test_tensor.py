import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from arbitor.errors import UserError
from arbitor.ternary import (
    Int8Embedding,
    TernaryEmbeddingTable,
    TernaryLinear,
    TernaryScaleTensor,
    named_ternary,
)

ILLEGAL_BYTE = 1


def latent(w):
    """T + residual / 128, in trits."""
    return w.trits().double() + w.T_residual.double() / 128


def test_initial_trits_and_residuals_are_a_rounded_clamped_gaussian():
    torch.manual_seed(0)
    w = TernaryScaleTensor(640, 1000)
    u = latent(w).flatten().sort().values
    assert w.T_residual.abs().max() <= 64
    # Against the quantiles of N(0, 1): by Dvoretzky, Kiefer and Wolfowitz the empirical distribution of n
    # draws is off by more than sqrt(ln(2 / p) / 2n) with probability p; rounding to 1/128 adds half its
    # density.
    p = torch.special.ndtr(u)
    inside = u.abs() < 1.48
    rank = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
    bound = (math.log(2 / 1e-9) / (2 * len(u))) ** 0.5 + 0.4 / 128
    assert (p - rank)[inside].abs().max() <= bound
    assert u.abs().max() <= 1.49 + 0.5 / 128
    assert w.trits().float().std().item() == pytest.approx(0.786, abs=0.003)


def test_initial_weights_are_independent_of_their_neighbours(monkeypatch):
    monkeypatch.setattr("arbitor.ternary.tensor.INIT_WEIGHTS_AT_ONCE", 4 * 501)
    torch.manual_seed(0)
    w = TernaryScaleTensor(501, 400)
    u = latent(w)
    u = (u - u.mean()) / u.std()
    for shift in (1, 2, 3, 4, 8, 160, 501, 4 * 501, 8 * 501):
        flat = u.flatten()
        correlation = (flat[shift:] * flat[:-shift]).mean().item()
        assert abs(correlation) < 6 / u.numel() ** 0.5, f"{shift} apart"


def test_initial_weights_come_from_the_global_generator():
    torch.manual_seed(3)
    one, two = TernaryScaleTensor(70, 9, leading_shape=(2,)), TernaryScaleTensor(70, 9, leading_shape=(2,))
    torch.manual_seed(3)
    again = TernaryScaleTensor(70, 9, leading_shape=(2,))
    assert torch.equal(latent(one), latent(again))
    assert not torch.equal(latent(one), latent(two))
    assert one.T_residual.shape == (2, 9, 70)


@pytest.mark.parametrize("columns", [1, 40, 160, 480, 1920])
def test_initial_scale_brings_the_standard_deviation_near_the_inverse_root_of_the_width(columns):
    w = TernaryScaleTensor(columns, 64)
    assert w.E.unique().tolist() == [round(math.log2(columns**-0.5 / 0.786))]
    # A whole octave is the grid, so half an octave is the error that it leaves.
    ratio = 0.786 * 2.0 ** w.E[0, 0].item() * columns**0.5
    assert 2**-0.5 <= ratio <= 2**0.5


def test_tables_start_near_a_standard_deviation_of_one():
    torch.manual_seed(0)
    table = TernaryEmbeddingTable(288, 160)
    assert table.E.eq(0).all()
    assert table.decode().std().item() == pytest.approx(0.786, abs=0.01)


def test_int8_tables_start_as_rounded_gaussians():
    torch.manual_seed(0)
    embedding = Int8Embedding(288, 160)
    torch.manual_seed(0)
    u = torch.randn(288, 160).clamp(-1.49, 1.49)
    assert torch.equal(embedding.q, (64 * u).round().to(torch.int8))
    assert embedding.q.abs().max() == 95
    assert embedding.E.eq(0).all()
    assert Int8Embedding(288, 160, kind="head").E.unique().tolist() == [-4]


def test_weights_are_integer_parameters_that_ask_for_no_gradient():
    model = nn.Sequential(TernaryLinear(5, 7), Int8Embedding(3, 7))
    parameters = dict(model.named_parameters())
    assert list(parameters) == ["0.T_packed", "0.E", "1.q", "1.E"]
    assert [p.dtype for p in parameters.values()] == [torch.uint8, torch.int8, torch.int8, torch.int8]
    assert not any(p.requires_grad for p in parameters.values())


def test_the_residual_is_not_saved():
    w = TernaryLinear(5, 7)
    assert list(w.state_dict()) == ["T_packed", "E"]


def test_numel_counts_logical_weights():
    assert TernaryScaleTensor(33, 7).numel() == 33 * 7
    assert TernaryScaleTensor(33, 7, leading_shape=(2, 5)).numel() == 2 * 5 * 33 * 7
    assert Int8Embedding(288, 160).numel() == 288 * 160


def test_a_full_block_takes_a_fifth_of_a_byte_a_weight():
    assert TernaryScaleTensor(160, 1).T_packed.nbytes == 32
    assert TernaryScaleTensor(1120, 3).T_packed.nbytes == 3 * 1120 // 5


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (-1, 5)])
def test_sizes_must_be_positive(rows, columns):
    with pytest.raises(UserError, match=f"{rows} x {columns}"):
        TernaryScaleTensor(columns, rows)


def test_set_trits_replaces_and_forgets_the_residual():
    w = TernaryScaleTensor(33, 2)
    trits = torch.tensor([[-1, 0, 1] * 11, [1, 1, 0] * 11], dtype=torch.int8)
    w.set_trits(trits, torch.tensor([[-3], [4]], dtype=torch.int8))
    assert torch.equal(w.trits(), trits)
    assert w.decode()[:, 2].tolist() == [0.125, 0.0]
    assert w.T_residual is None


@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_set_trits_refuses_what_is_no_trit(value):
    w = TernaryScaleTensor(3, 1)
    before = w.T_packed.clone()
    with pytest.raises(UserError, match="trits must be int8 with values -1, 0 and"):
        w.set_trits(torch.tensor([[0, value, 1]], dtype=torch.int8), w.E)
    assert torch.equal(w.T_packed, before)
    with pytest.raises(UserError, match="trits must be int8"):
        w.set_trits(torch.zeros(1, 3), w.E)


@pytest.mark.parametrize(
    ("trits", "exponent", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(2, 1), r"trits have the shape \(1, 3\), expected \(2, 3\)"),
        (torch.zeros(3), torch.zeros(2, 1), r"trits have the shape \(3,\), expected \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(1, 1), r"E has the shape \(1, 1\), expected \(2, 1\)"),
        (torch.zeros(2, 3), torch.full((2, 1), 32), r"E holds an exponent outside -62\.\.\.31"),
        (torch.zeros(2, 3), torch.full((2, 1), -63), r"E holds an exponent outside -62\.\.\.31"),
    ],
    ids=["rows", "vector", "exponents", "high", "low"],
)
def test_set_trits_checks_before_it_copies(trits, exponent, message):
    w = TernaryScaleTensor(3, 2)
    w.set_trits(torch.ones(2, 3, dtype=torch.int8), torch.full((2, 1), -5, dtype=torch.int8))
    w.T_residual = residual = torch.zeros(2, 3, dtype=torch.int8)
    before = [w.T_packed.clone(), w.E.clone()]
    with pytest.raises(UserError, match=message):
        w.set_trits(trits.to(torch.int8), exponent.to(torch.int8))
    assert all(map(torch.equal, before, [w.T_packed, w.E]))
    assert w.T_residual is residual


def test_set_trits_refuses_exponents_of_another_dtype():
    w = TernaryScaleTensor(3, 2)
    before = w.T_packed.clone()
    with pytest.raises(UserError, match=r"E is torch\.float32, expected torch\.int8"):
        w.set_trits(torch.ones(2, 3, dtype=torch.int8), torch.full((2, 1), -4.5))
    assert torch.equal(w.T_packed, before)


def damage_shape(state):
    state["0.E"] = state["0.E"][:1]


def damage_vector(state):
    state["1.E"] = state["1.E"][:1]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize(
    "damage",
    ["damage_byte", "damage_padding", "damage_exponent", "damage_shape", "damage_code", "damage_vector"],
)
def test_nothing_of_a_damaged_module_is_loaded(damage, assign):
    model = nn.Sequential(TernaryLinear(33, 4), Int8Embedding(3, 4))
    torch.manual_seed(1)
    state = {
        k: t.clone() for k, t in nn.Sequential(TernaryLinear(33, 4), Int8Embedding(3, 4)).state_dict().items()
    }
    globals()[damage](state)
    bad = 1 if damage in ("damage_code", "damage_vector") else 0
    before = [parameter.clone() for parameter in model[bad].parameters()]
    residual = model[0].T_residual
    with pytest.raises(RuntimeError, match=rf"{bad}\."):
        model.load_state_dict(state, assign=assign)
    assert all(map(torch.equal, before, model[bad].parameters()))
    assert (model[0].T_residual is residual) == (bad == 0)
    model[bad].check()


def damage_byte(state):
    state["0.T_packed"][1, 3] = ILLEGAL_BYTE


def damage_padding(state):
    # Byte 255 holds five trits of +1; in a row of 33, four of byte 31's are padding.
    state["0.T_packed"][1, 31] = 255


def damage_exponent(state):
    state["0.E"][1, 0] = 32


def damage_code(state):
    state["1.q"][2, 2] = -96


def damage_table_exponent(state):
    state["1.E"][2] = -63


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_byte, r"0\.T_packed holds byte 1, which is no packed trits"),
        (damage_padding, r"0\.T_packed has trits in its padding"),
        (damage_exponent, r"0\.E holds an exponent outside -62\.\.\.31"),
        (damage_code, r"1\.q holds a code outside -95\.\.\.95"),
        (damage_table_exponent, r"1\.E holds an exponent outside -62\.\.\.31"),
    ],
    ids=["byte", "padding", "exponent", "table-code", "table-exponent"],
)
def test_damage_is_named_when_it_is_loaded_and_when_it_is_checked(damage, message):
    model = nn.Sequential(TernaryLinear(33, 4), Int8Embedding(3, 4))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(TernaryLinear(33, 4), Int8Embedding(3, 4)).load_state_dict(state)
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])
    name = message[0]
    with pytest.raises(UserError, match=message):
        dict(named_ternary(model))[name].check(name)


def test_every_illegal_byte_is_found_and_no_legal_one():
    w = TernaryScaleTensor(160, 1)
    refused = []
    for byte in range(256):
        w.T_packed[0, 17] = byte
        try:
            w.decode()
        except UserError as error:
            assert f"byte {byte}," in str(error)  # noqa: PT017 - which bytes raise is what is asked
            refused.append(byte)
    assert len(refused) == 13
    assert 128 not in refused


def test_padding_is_checked_beyond_the_last_weight_only():
    w = TernaryScaleTensor(159, 1)
    w.set_trits(torch.ones(1, 159, dtype=torch.int8), w.E)
    w.check()
    assert w.T_packed[0, 30] == 255
    w.T_packed[0, 31] = 255
    with pytest.raises(UserError, match="padding"):
        w.check()


def test_a_state_dict_restores_every_bit():
    torch.manual_seed(0)
    model = nn.Sequential(TernaryLinear(33, 4, tscale="T8"), Int8Embedding(3, 4), TernaryEmbeddingTable(5, 7))
    torch.manual_seed(1)
    other = nn.Sequential(TernaryLinear(33, 4, tscale="T8"), Int8Embedding(3, 4), TernaryEmbeddingTable(5, 7))
    other.load_state_dict(model.state_dict())
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert other[0].T_residual is None, "a residual belongs to the trits that it was drawn with"
    assert torch.equal(other[0].decode(), model[0].decode())


def test_missing_tensors_keep_torchs_own_message():
    w = TernaryLinear(33, 4)
    with pytest.raises(RuntimeError, match=r'Missing key.*"E"'):
        w.load_state_dict({"T_packed": w.T_packed})


def test_creation_on_the_meta_device_draws_nothing():
    before = torch.get_rng_state()
    w = TernaryLinear(10**6, 10**6, device="meta")
    table = Int8Embedding(10**6, 10**6, device="meta")
    assert w.T_packed.device.type == table.q.device.type == "meta"
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_hold_the_same_weights():
    w = TernaryLinear(33, 4)
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):  # noqa: S301 - of this very process
        assert torch.equal(twin.T_packed, w.T_packed)
        assert torch.equal(twin.T_residual, w.T_residual)


def test_named_ternary_lists_integer_modules_once_and_in_order():
    shared = TernaryLinear(4, 4)
    model = nn.ModuleDict(
        {"a": Int8Embedding(3, 4), "b": nn.Linear(4, 4), "c": shared, "d": nn.Sequential(shared)}
    )
    assert [name for name, _ in named_ternary(model)] == ["a", "c"]
    assert dict(named_ternary(model))["c"] is shared
    assert [name for name, _ in named_ternary(shared)] == [""]


def test_importing_initialises_no_cuda_and_neither_it_nor_a_forward_imports_triton_or_the_compiler():
    code = (
        "import sys, torch, arbitor.ternary\n"
        "assert not torch.cuda.is_initialized()\n"
        "arbitor.ternary.TernaryLinear(8, 8)(torch.ones(1, 8))\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'triton', 'torch._dynamo'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_floats_into_integer_weights_is_refused():
    layer = TernaryLinear(40, 3)
    before = layer.T_packed.clone()
    floats = {"T_packed": torch.full(layer.T_packed.shape, 128.0), "E": layer.E.clone()}
    with pytest.raises(RuntimeError, match=r"T_packed is torch\.float32, expected torch\.uint8"):
        layer.load_state_dict(floats)
    assert torch.equal(layer.T_packed, before)
