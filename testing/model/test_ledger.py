"""Decoding through the KV ledger against the whole forward."""

import math

import pytest
import torch

from arbitor.errors import UserError
from arbitor.model import KVLedger
from arbitor.ternary import VoteOptimizer

ONE_BY_ONE = [3] + [1] * 29
RAGGED = [4, 1, 7, 2, 1, 1, 10, 6]


def decode(model, ids, chunks, ledger):
    rows, first = [], 0
    for chunk in chunks:
        rows.append(model(ids[:, first : first + chunk], ledger=ledger).logits)
        first += chunk
    assert first == ids.shape[1]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize(
    "chunks", [ONE_BY_ONE, RAGGED, [32], [31, 1]], ids=["ones", "ragged", "whole", "last"]
)
@pytest.mark.parametrize("window", [0, 1, 5, 29, 100])
@pytest.mark.parametrize("value_dim", [10, 6])
def test_decoding_equals_the_forward(make_model, make_ids, without_rounding, chunks, window, value_dim):
    """Without activation rounding, in fp64: what is left is one rounding of each logit to fp32."""
    model = without_rounding(make_model(attention_window=window, value_dim=value_dim))
    ids = make_ids(2, 32)
    full = model(ids).logits
    found = decode(model, ids, chunks, KVLedger(model.config))
    assert found.shape == full.shape
    # fp64 errors are below 1e-12 and can turn one rounding to fp32 around.
    torch.testing.assert_close(found, full, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, RAGGED], ids=["ones", "ragged"])
@pytest.mark.parametrize("window", [0, 5])
def test_decoding_with_int8_activations_stays_within_their_rounding(make_model, make_ids, chunks, window):
    """fp32 differences can turn an int8 rounding around, and that spreads; it cannot exceed two independent
    roundings of every activation.

    Two independent roundings to steps of absmax / 127 differ by step / sqrt(6) in the root mean square,
    relative to activations of RMS 1. absmax <= sqrt(width), here of the widest input, 3 * 40. Each linear
    hands that relative noise on, and they add up in squares over the longest chain: the sequencer, the
    head, and in each block query or kv_down and kv_up, out, up, down. A squared ReLU doubles the relative
    noise (squares: 4 more per block).
    """
    model = make_model(attention_window=window)
    ids = make_ids(2, 32)
    full = model(ids).logits
    found = decode(model, ids, chunks, KVLedger(model.config))
    chain = 2 + 3 * (5 + 4)
    noise = math.sqrt(120) / 127 / math.sqrt(6) * math.sqrt(chain)
    difference_rms = (found - full).square().mean(-1).sqrt()
    assert (difference_rms <= noise * full.square().mean(-1).sqrt()).all()
    assert (difference_rms < 1e-5).float().mean() > 0.5


def test_a_single_chunk_is_bit_equal(make_model, make_ids):
    model = make_model()
    ids = make_ids(2, 32)
    assert torch.equal(model(ids, ledger=KVLedger(model.config)).logits, model(ids).logits)


def test_decoding_twice_gives_equal_bits(make_model, make_ids):
    model = make_model(attention_window=7)
    ids = make_ids(1, 32)
    ledger = KVLedger(model.config)
    first = decode(model, ids, RAGGED, ledger)
    ledger.clear()
    assert torch.equal(decode(model, ids, RAGGED, ledger), first)


def test_a_cleared_ledger_takes_another_batch(make_model, make_ids):
    model = make_model()
    ledger = KVLedger(model.config)
    model(make_ids(1, 9), ledger=ledger)
    assert (ledger.num_ids, ledger.num_positions) == (9, 7)
    ledger.clear()
    assert (ledger.num_ids, ledger.num_positions) == (0, 0)
    ids = make_ids(3, 9)
    assert torch.equal(model(ids, ledger=ledger).logits, model(ids).logits)


def test_what_is_kept_is_the_latent_and_the_rotary_key(make_model, make_ids):
    model = make_model()
    ledger = KVLedger(model.config)
    model(make_ids(2, 12), ledger=ledger)
    assert len(ledger.layers) == 3
    latent, shared_key = ledger.layers[0].append(torch.zeros(2, 1, 24), torch.zeros(2, 1, 4))
    assert latent.shape == (2, 11, 24)
    assert shared_key.shape == (2, 11, 4)


def test_nothing_is_recorded_for_a_backward(make_model, make_ids):
    model = make_model()
    VoteOptimizer(model)
    assert not model(make_ids(1, 8), ledger=KVLedger(model.config)).logits.requires_grad


def test_bad_use_is_named(make_model, make_ids):
    model = make_model()
    ledger = KVLedger(model.config)
    with pytest.raises(UserError, match="at least 3 ids, got 2"):
        model(make_ids(1, 2), ledger=ledger)
    with pytest.raises(UserError, match="targets and a ledger"):
        model(make_ids(1, 8), make_ids(1, 8), ledger=ledger)
    with pytest.raises(UserError, match="0 of 30 positions, 33 more ids do not fit"):
        model(make_ids(1, 33), ledger=ledger)
    assert ledger.num_ids == 0
    model(make_ids(1, 32), ledger=ledger)
    with pytest.raises(UserError, match="30 of 30 positions, 1 more ids do not fit"):
        model(make_ids(1, 1), ledger=ledger)
    ledger.clear()
    model(make_ids(2, 8), ledger=ledger)
    with pytest.raises(UserError, match="batch of 2, the ids one of 1"):
        model(make_ids(1, 1), ledger=ledger)
