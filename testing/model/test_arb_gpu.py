"""The model on a CUDA device: what must be equal there to the bit, and how near it is to the CPU."""

import math

import numpy as np
import pytest
import torch

from arbitor.evaluate import bits_per_byte
from arbitor.model import ARBModel, KVLedger
from arbitor.ternary import VoteOptimizer

pytestmark = pytest.mark.gpu

# Relative noise (root mean square) of two computations that round every activation of a linear to int8, or
# to bf16 in attention, independently of each other: a step of absmax / 127 gives step / sqrt(6), absmax is
# at most 8 times the root mean square for 480 inputs that are not degenerate, and the errors of the chain of
# linears (sequencer, head, 9 a layer as in test_ledger) add up in squares. bf16 (2^-9) is far below a step.
CHAIN = 2 + 2 * 9
NOISE = 8 / 127 / math.sqrt(6) * math.sqrt(CHAIN)


@pytest.fixture(params=[0, 20], ids=["whole", "window"])
def pair(request):
    """The same tiny model on the CPU and on CUDA."""
    torch.manual_seed(0)
    model = ARBModel("tiny", attention_window=request.param)
    other = ARBModel("tiny", attention_window=request.param, device="cuda")
    other.load_state_dict(model.state_dict())
    return model, other


def ids_of(batch, length, seed=0):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_rms(found, expected):
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_logits_are_near_those_of_the_cpu(pair):
    cpu, cuda = pair
    ids = ids_of(4, 128)
    on_cuda = cuda(ids)
    assert on_cuda.logits.is_cuda
    assert on_cuda.logits.dtype == torch.float32
    assert relative_rms(on_cuda.logits, cpu(ids).logits) < NOISE


@pytest.mark.parametrize("t", [2, 40, 127])
def test_causal(pair, t):
    _, model = pair
    ids = ids_of(2, 128)
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1) % 256
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, : t - 2], after[:, : t - 2])
    assert (before[:, t - 2] != after[:, t - 2]).any()


def test_decoding_stays_within_rounding(pair):
    _, model = pair
    ids = ids_of(2, 128)
    ledger = KVLedger(model.config)
    chunks = [5, *[1] * 40, 30, 2, 51]
    rows = [model(part, ledger=ledger).logits for part in ids.split(chunks, dim=1)]
    assert relative_rms(torch.cat(rows, dim=1), model(ids).logits) < NOISE


def test_metric_is_reproducible_and_near_that_of_the_cpu(pair):
    cpu, cuda = pair
    data = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8)
    found = bits_per_byte(cuda, data, 128)
    assert bits_per_byte(cuda, data, 128) == found
    assert (found.num_bytes, found.windows) == (2000, 31)
    # Noise in the logits (standard deviation below 1 at initialisation) moves each byte's nats by about
    # NOISE at either sign; the mean of 2000 by less than a twentieth of it, at two standard deviations.
    assert abs(found.bits_per_byte - bits_per_byte(cpu, data, 128).bits_per_byte) < NOISE / math.log(2) / 20


def test_equal_seeds_generate_equal_bytes(pair):
    _, model = pair
    assert model.generate(b"def ", 200, seed=1) == model.generate(b"def ", 200, seed=1)


@pytest.mark.filterwarnings("error")
def test_training_is_reproducible(pair, monkeypatch):
    """Two runs of five steps under PyTorch's deterministic algorithms end in equal integers."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        ends = []
        for _ in range(2):
            model = ARBModel(config=pair[1].config, device="cuda")
            model.load_state_dict(pair[0].state_dict())
            optimizer = VoteOptimizer(model)
            for step in range(5):
                ids = ids_of(8, 128, seed=step)
                model(ids, ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append(model.state_dict() | optimizer.named_state())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["embed.q"], pair[1].state_dict()["embed.q"])
