"""The check ahead of all figures: it passes here, and every kind of wrong result stops it."""

import pytest
import torch

from arbitor.ternary import layers
from benchmarks.memory import __main__ as memory
from benchmarks.speed import __main__ as speed
from benchmarks.speed import parity

CPU = torch.device("cpu")


def test_the_cpu_is_right():
    before = torch.get_rng_state()
    parity.check(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def wrong_decode(monkeypatch):
    real = parity.trit_codec.ternary_decode
    monkeypatch.setattr(parity.trit_codec, "ternary_decode", lambda *a: real(*a).mul_(2))
    return "decoded"


def wrong_forward(monkeypatch):
    real = layers.ternary_linear

    def forward(*arguments):
        y, *rest = real(*arguments)
        return y.mul_(1 + 1e-4), *rest

    monkeypatch.setattr(layers, "ternary_linear", forward)
    return "forward"


def wrong_gradient(monkeypatch):
    real = layers.ternary_linear_backward
    monkeypatch.setattr(layers, "ternary_linear_backward", lambda *a: real(*a).mul_(1 - 1e-4))
    return "gradient of the input"


def not_a_number(monkeypatch):
    real = layers.ternary_linear_backward
    monkeypatch.setattr(layers, "ternary_linear_backward", lambda *a: real(*a).mul_(float("nan")))
    return "gradient of the input"


def wrong_votes(monkeypatch):
    real = parity.state_update_drawn

    def update(packed, accumulator, *rest):
        flips = real(packed, accumulator, *rest)
        accumulator[-1, -1, -1] += 1
        return flips

    monkeypatch.setattr(parity, "state_update_drawn", update)
    return "accumulators"


def wrong_momentum(monkeypatch):
    real = parity.momentum_fold_drawn

    def fold(gradient, codes, exponent, *rest):
        direction = real(gradient, codes, exponent, *rest)
        exponent[0, 0, 0] += 1
        return direction

    monkeypatch.setattr(parity, "momentum_fold_drawn", fold)
    return "8-bit momentum"


FAULTS = [wrong_decode, wrong_forward, wrong_gradient, not_a_number, wrong_votes, wrong_momentum]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_noticed(monkeypatch, fault):
    what = fault(monkeypatch)
    with pytest.raises(parity.ParityError, match=what):
        parity.check(CPU)


@pytest.mark.parametrize("command", [speed, memory], ids=["speed", "memory"])
def test_no_figure_is_printed_or_written_when_parity_is_broken(monkeypatch, tmp_path, capsys, command):
    wrong_forward(monkeypatch)
    assert command.main(["--device", "cpu", "--results", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the layers are wrong" in captured.err
    assert list(tmp_path.iterdir()) == []
