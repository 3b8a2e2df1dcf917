"""The metric against a naive computation, one byte at a time."""

import math

import numpy as np
import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.evaluate import Evaluation, bits_per_byte
from arbitor.model import ARBModel
from arbitor.model.arb import ARBOutput
from arbitor.model.vocab import PAD
from arbitor.ternary import VoteOptimizer


def make_model():
    torch.manual_seed(0)
    return ARBModel(
        config=ModelConfig(
            dim=40,
            num_prelude_layers=2,
            num_heads=2,
            head_dim=6,
            rope_dim=4,
            value_dim=10,
            kv_latent_dim=20,
            ffn_dim=40,
            ctx=16,
        )
    )


@pytest.fixture(scope="module")
def model():
    return make_model()


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def naive(model, data, ctx):
    """Walks over windows of the padded stream; a byte counts in the first window that can predict it."""
    bits = naive_windows(model, data, ctx)
    counted = [figure for window in bits for figure in window]
    return sum(counted) / len(counted), len(counted), len(bits)


def naive_windows(model, data, ctx):
    """Bits of the bytes that count in each window."""
    stream = [PAD] * 3 + data.tolist()
    counted, windows, start = set(), [], 0
    while len(counted) < len(data):
        bits = []
        window = stream[start : start + ctx]
        log_p = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for offset in range(3, len(window)):
            if start + offset not in counted:
                counted.add(start + offset)
                bits.append(-float(log_p[offset - 3, window[offset]]) / math.log(2))
        windows.append(bits)
        start += min(ctx // 2, ctx - 3)
    assert counted == set(range(3, 3 + len(counted)))
    return windows


@pytest.mark.parametrize("ctx", [4, 5, 6, 7, 8, 9, 15, 16])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 12, 13, 14, 20, 21, 22, 61])
def test_equals_the_naive_computation(model, length, ctx):
    data = text(length)
    bits, num_bytes, windows = naive(model, data, ctx)
    found = bits_per_byte(model, data, ctx)
    assert (found.num_bytes, found.windows) == (length, windows)
    assert num_bytes == length
    # The logits are the same; fp32 log-softmax over 288 of them, errors of either sign.
    assert found.bits_per_byte == pytest.approx(bits, rel=300 * 2**-24)


@pytest.mark.parametrize("max_windows", [1, 2, 5, 8, 9, 100])
def test_some_windows_are_spread_over_the_data(model, max_windows):
    data = text(61)
    windows = naive_windows(model, data, 16)
    places = {1: [0], 2: [0, 3], 5: [0, 1, 2, 4, 5]}.get(max_windows, range(7))
    assert len(windows) == 7
    bits = [figure for place in places for figure in windows[place]]
    found = bits_per_byte(model, data, 16, max_windows=max_windows)
    assert (found.num_bytes, found.windows) == (len(bits), len(places))
    assert found.bits_per_byte == pytest.approx(sum(bits) / len(bits), rel=300 * 2**-24)


def test_first_bytes_only(model):
    data = text(61)
    assert bits_per_byte(model, data, 16, max_bytes=30) == bits_per_byte(model, data[:30], 16)
    assert bits_per_byte(model, data, 16, max_bytes=None) == bits_per_byte(model, data, 16)


def test_the_default_measures_up_to_a_million_bytes():
    class Uniform:
        device = torch.device("cpu")

        def __call__(self, ids):
            return ARBOutput(torch.zeros(1, 1, 1).expand(ids.shape[0], ids.shape[1] - 2, 288), None)

    found = bits_per_byte(Uniform(), np.zeros(1_000_001, dtype=np.uint8), 4096, batch=4)
    assert found.num_bytes == 1_000_000
    # 1 + ceil((1,000,003 - 4096) / 2048) windows; a uniform guess costs log2 of the vocabulary.
    assert found.windows == 488
    assert found.bits_per_byte == pytest.approx(math.log2(288), rel=300 * 2**-24)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_batch_makes_no_difference(model, batch):
    data = text(100)
    assert bits_per_byte(model, data, 16, batch=batch) == bits_per_byte(model, data, 16, batch=16)


def test_a_memory_map_is_read_like_an_array(model, tmp_path):
    data = text(61)
    (tmp_path / "data").write_bytes(data.tobytes())
    mapped = np.memmap(tmp_path / "data", dtype=np.uint8, mode="r")
    assert bits_per_byte(model, mapped, 16) == bits_per_byte(model, data, 16)


def test_measuring_twice_is_equal_and_changes_nothing():
    model = make_model()
    optimizer = VoteOptimizer(model)
    ids = torch.from_numpy(text(64)).view(4, 16)
    model(ids, ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = {name: tensor.clone() for name, tensor in (model.state_dict() | optimizer.named_state()).items()}
    random_state = torch.get_rng_state()
    first = bits_per_byte(model, text(61), 16)
    assert first == bits_per_byte(model, text(61), 16)
    assert isinstance(first, Evaluation)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    # Nothing was captured for a vote: a step now moves nothing.
    optimizer.step()
    after = model.state_dict() | optimizer.named_state()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("data", "ctx", "settings", "message"),
    [
        (text(0), 16, {}, "holds no bytes"),
        (text(9), 3, {}, "ctx is 3; .* at least 4"),
        (text(9).astype(np.int64), 16, {}, "uint8 .* got int64"),
        (text(9).reshape(3, 3), 16, {}, r"got uint8 \(3, 3\)"),
        (b"abc", 16, {}, "got bytes"),
        (text(9), 16, {"batch": 0}, "batch is 0"),
        (text(9), 16, {"max_windows": 0}, "max_windows is 0"),
        (text(9), 16, {"max_bytes": 0}, "max_bytes is 0"),
    ],
)
def test_bad_arguments_are_named(model, data, ctx, settings, message):
    with pytest.raises(UserError, match=message):
        bits_per_byte(model, data, ctx, **settings)


def test_progress_is_told_and_changes_nothing(model):
    told = []
    data = text(300)
    result = bits_per_byte(model, data, 16, batch=7, progress=lambda done, total: told.append((done, total)))
    assert result == bits_per_byte(model, data, 16, batch=7)
    assert told == [(min(7 * (i + 1), result.windows), result.windows) for i in range(len(told))]
    assert told[-1] == (result.windows, result.windows)
