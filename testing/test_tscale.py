"""Every scale type through the whole path: shape, decoding, forward, checking, training."""

import math

import pytest
import torch

from arbitor.errors import UserError
from arbitor.ops.activations import CODE_SCALE
from arbitor.ternary import (
    TernaryEmbeddingTable,
    TernaryLinear,
    TernaryScaleTensor,
    TScaleType,
    VoteOptimizer,
)
from testing import oracles

GROUPS = {"T4": 4, "T6": 6, "T8": 8, "T16": 16, "T32": 32, "T64": 64, "T96": 96, "ROW": None}
SIZES = [1, 5, 33, 97, 160, 203]
each_type = pytest.mark.parametrize("name", GROUPS)


def tensor(name, rows=4, columns=203, seed=0, low=-62, high=31):
    """A TernaryScaleTensor with random trits and exponents in [low, high]."""
    torch.manual_seed(seed)
    w = TernaryScaleTensor(columns, rows, tscale=name)
    trits = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    w.set_trits(trits, torch.randint(low, high + 1, w.E.shape).to(torch.int8))
    return w


def exact(w):
    """The weights by integer arithmetic, from the stored bytes, as nested lists of floats."""
    group = w.tscale.value or w.in_features
    rows = []
    for packed, exponents in zip(
        w.T_packed.flatten(0, -2).tolist(), w.E.flatten(0, -2).tolist(), strict=True
    ):
        trits = oracles.unpack_row(packed, w.in_features)
        rows.append([float(oracles.weight(t, exponents[i // group])) for i, t in enumerate(trits)])
    return rows


def test_the_scale_types():
    assert list(TScaleType.__members__) == list(GROUPS)
    for name, group in GROUPS.items():
        assert TScaleType.of(name).group(203) == (group or 203)
    assert TScaleType.of(TScaleType.T32) is TScaleType.T32


def test_constructors_default_to_a_scale_for_each_row():
    for w in (TernaryScaleTensor(64, 3), TernaryLinear(64, 3), TernaryEmbeddingTable(3, 64)):
        assert w.tscale is TScaleType.ROW
        assert w.E.shape == (3, 1)


@pytest.mark.parametrize("name", ["T5", "row", "", 32])
def test_an_unknown_scale_type_is_named_with_the_choices(name):
    with pytest.raises(UserError, match=f"{name!r}; choose one of T4, T6, T8, T16, T32, T64, T96, ROW"):
        TernaryScaleTensor(64, 3, tscale=name)


@each_type
@pytest.mark.parametrize("size", SIZES)
def test_shapes(name, size):
    w = TernaryScaleTensor(size, 4, tscale=name, leading_shape=(2, 3))
    assert w.T_packed.shape == (2, 3, 4, 32 * math.ceil(size / 160))
    assert w.E.shape == (2, 3, 4, math.ceil(size / GROUPS[name]) if GROUPS[name] else 1)
    assert (w.T_packed.dtype, w.E.dtype) == (torch.uint8, torch.int8)
    w.check()


@each_type
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_decode_is_exact(name, size, dtype):
    w = tensor(name, columns=size, seed=size)
    decoded = w.decode(dtype)
    assert decoded.dtype == dtype
    assert decoded.to(torch.float64).tolist() == exact(w)


@each_type
def test_decode_to_int8_gives_the_trits(name):
    w = tensor(name)
    assert w.decode(torch.int8).tolist() == [oracles.unpack_row(row, 203) for row in w.T_packed.tolist()]
    assert torch.equal(w.trits(), w.decode(torch.int8))


@each_type
def test_leading_dimensions_decode_like_separate_matrices(name):
    torch.manual_seed(0)
    w = TernaryScaleTensor(97, 4, tscale=name, leading_shape=(2, 3))
    exponent = torch.randint(-62, 32, w.E.shape).to(torch.int8)
    w.set_trits(w.trits(), exponent)
    assert w.decode().shape == (2, 3, 4, 97)
    assert w.decode().to(torch.float64).flatten(0, 2).tolist() == exact(w)


@each_type
def test_every_legal_exponent_is_accepted_and_every_other_refused(name):
    w = tensor(name, rows=1)
    for exponent in range(-128, 128):
        w.E.fill_(exponent)
        if -62 <= exponent <= 31:
            w.check("layer")
            largest = w.decode(torch.float64).abs().max().item()
            assert largest == 2.0**exponent
        else:
            with pytest.raises(UserError, match=r"layer\.E holds an exponent outside -62\.\.\.31"):
                w.check("layer")
            with pytest.raises(UserError, match="E holds an exponent"):
                w.decode()


@each_type
def test_one_bad_exponent_anywhere_is_found(name):
    w = tensor(name)
    for position in {0, w.E.numel() // 2, w.E.numel() - 1}:
        kept = w.E.clone()
        w.E.view(-1)[position] = 32
        with pytest.raises(UserError, match="E holds an exponent"):
            w.check()
        w.E.copy_(kept)
    w.check()


@each_type
@pytest.mark.parametrize("size", SIZES)
def test_forward_uses_the_decoded_weights(name, size):
    # Exponents of a narrow range, so that the sums of codes times weights are exact in fp32.
    w = TernaryLinear(size, 7, tscale=name)
    w.set_trits(w.trits(), torch.randint(-6, -3, w.E.shape).to(torch.int8))
    x = torch.randn(5, size)
    absmax = x.abs().amax(-1, keepdim=True)
    codes = (x * (CODE_SCALE / absmax)).round()
    sums = codes.to(torch.float64) @ w.decode(torch.float64).T
    rstd = x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    # Four roundings to fp32 in the scale and one in the product, beside the norm's own sum over I.
    expected = sums * (absmax * rstd / CODE_SCALE)
    bound = torch.finfo(torch.float32).eps * (5 + size**0.5)
    assert ((w(x) - expected).abs() <= bound * expected.abs()).all()


def train(name, steps=6, state="full", scale_lr=0.0, columns=203):
    """A matrix after a few steps on a fixed target, and its optimizer."""
    torch.manual_seed(1)
    w = TernaryLinear(columns, 9, tscale=name)
    optimizer = VoteOptimizer(w, lr=0.3, state=state, scale_lr=scale_lr, seed=5)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(16, columns, generator=generator)
        (w(x) - x[:, :9]).square().mean().backward()
        optimizer.step()
    return w, optimizer


@each_type
@pytest.mark.parametrize("state", ["full", "compact", "lean"])
def test_every_type_trains(name, state):
    w, optimizer = train(name, state=state)
    torch.manual_seed(1)
    start = TernaryLinear(203, 9, tscale=name)
    assert (w.trits() != start.trits()).float().mean() > 0.01
    assert torch.equal(w.E, start.E), "scale votes are off"
    w.check()
    assert optimizer.state[w.T_packed]["E_accum"].shape == w.E.shape


@each_type
def test_equal_frozen_exponents_make_the_group_size_irrelevant(name):
    w, optimizer = train(name)
    reference, reference_optimizer = train("ROW")
    assert torch.equal(w.T_packed, reference.T_packed)
    for key in ("T_accum", "M", "M_exp"):
        assert torch.equal(
            optimizer.state[w.T_packed][key], reference_optimizer.state[reference.T_packed][key]
        )


@each_type
def test_scale_votes_move_the_exponents_of_every_type(name):
    w, optimizer = train(name, scale_lr=0.5)
    start = train(name, steps=0)[0]
    assert not torch.equal(w.E, start.E)
    assert optimizer.state[w.T_packed]["E_accum"].abs().max() < 32
    w.check()
    assert w.decode().isfinite().all()
