"""What the speed benchmark does on a GPU only: graphs, compiled twins, parity of the GPU's layers."""

import dataclasses
import time

import pytest
import torch

from arbitor.config import preset
from arbitor.train.device import resolve_device
from benchmarks.speed import decoding, kernels, parity, whole_model
from benchmarks.speed.clock import idle_seconds
from benchmarks.speed.contestants import Setting, measure

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    return resolve_device("cuda")


def test_the_layers_are_those_of_the_reference(gpu):
    parity.check(gpu.device)


def test_kernels_are_captured_as_graphs(gpu, capsys):
    figures = [
        kernels.few_rows(gpu, size=480),
        kernels.many_rows(gpu, rows=64, size=480),
        kernels.state_update(gpu, shape=(2, 64, 160)),
    ]
    assert all(value > 0 for group in figures for value in group.values())
    assert "not captured" not in capsys.readouterr().out


def test_decoding_is_captured_as_a_graph(gpu, capsys):
    figures = decoding.decoding(gpu, preset("tiny").model)
    assert figures["trits"] > 0
    assert "not captured" not in capsys.readouterr().out


@pytest.mark.parametrize("contestant", ["trits", "dense-autocast", "dense-bf16", "torchao"])
def test_steps_and_peaks(contestant):
    if contestant == "torchao":
        pytest.importorskip("torchao")
    sizes = {"batch": 4, "ctx": 32, "warmup": 2, "steps": 3, "profiled": 2}
    setting = Setting(preset="tiny", state="full", device="cuda", **sizes)
    timing = measure(contestant, setting)
    assert timing.ms_per_step > 0
    assert timing.peak_bytes > timing.kept_bytes
    assert 0 < timing.share_of_peak < 1
    assert 0 <= timing.idle_ms < 1000


def test_time_without_kernels_is_seen(gpu):
    x = torch.ones(1000, device=gpu.device)

    def work():
        x.add_(1)
        gpu.synchronize()
        time.sleep(0.02)

    assert 0.012 < idle_seconds(work, gpu, 5) < 0.2  # between five calls there are four waits


def test_few_tokens_touch_only_the_experts_in_use(gpu):
    config = dataclasses.replace(preset("arb-small").model, ctx=16)
    figures = whole_model.few_tokens(gpu, config, steps=2)
    assert figures["experts changed without tokens"] == 0
    assert figures["peak"] > 1.2
