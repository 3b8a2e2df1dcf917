import torch

from arbitor.config import ModelConfig
from arbitor.model.sequencer import TextSequencer

EPS64 = torch.finfo(torch.float64).eps


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def test_position_mixes_its_own_byte_and_the_two_before_it():
    torch.manual_seed(0)
    sequencer = TextSequencer(ModelConfig(dim=20))
    weight = sequencer.mix.decode(torch.float64)
    e = torch.randn(2, 7, 20, dtype=torch.float64)
    sequencer.mix.forward = lambda x: rms(x) @ weight.T
    h = sequencer(e)
    assert h.shape == (2, 5, 20)
    for t in range(2, 7):
        window = torch.cat([e[:, t - 2], e[:, t - 1], e[:, t]], dim=-1)
        expected = rms(e[:, t] + rms(window) @ weight.T)
        # Sums of 60 products, in another order at most.
        torch.testing.assert_close(h[:, t - 2], expected, rtol=60 * EPS64, atol=60 * EPS64)


def test_output_is_fp32_with_rms_one():
    torch.manual_seed(0)
    sequencer = TextSequencer(ModelConfig(dim=160))
    h = sequencer(torch.randn(3, 9, 160))
    assert h.dtype == torch.float32
    # 1 / sqrt(1 + eps / rms^2) differs from 1 by less than 1e-6; the rest is fp32 rounding.
    torch.testing.assert_close(h.square().mean(-1), torch.ones(3, 7), rtol=4e-6, atol=0)
