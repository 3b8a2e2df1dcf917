"""G9: bytes a second of one decoded stream, with trits and with the same network held in bf16."""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from arbitor.config import ModelConfig
from arbitor.config import preset as preset_config
from arbitor.model import ARBModel, KVLedger
from arbitor.model.arb import ARBOutput
from arbitor.train.device import Device
from benchmarks.counts import counts
from benchmarks.learning.twins import DenseLinear, make_twin
from benchmarks.speed.kernels import graphed_seconds

WEIGHTS = 1_200_000_000
CONTEXT = 256  # bytes that have been read before the one that is timed


def large_dense(weights: int = WEIGHTS) -> ModelConfig:
    """`base` widened to 2,560, with as many layers as make that many trits."""
    config = dataclasses.replace(
        preset_config("base").model, dim=2560, num_heads=32, kv_latent_dim=640, ffn_dim=10240
    )
    while counts(config).total < weights:
        config = dataclasses.replace(config, num_prelude_layers=config.num_prelude_layers + 1)
    return config


def decoding(device: Device, config: ModelConfig | None = None) -> Mapping[str, float]:
    """The rates of the step that reads one byte, and the ratio to the faster twin; each is a CUDA graph's."""
    config = large_dense() if config is None else config
    rates = {}
    for name in ("trits", "bf16", "bf16, compiled"):
        model = ARBModel(config=config, device=device.device).eval()
        if name != "trits":
            make_twin(model, DenseLinear)
            model.to(torch.bfloat16)
        read = torch.compile(model) if name == "bf16, compiled" and device.is_cuda else model
        rates[name] = 1 / _seconds_a_byte(model, read, device)
        del model, read
    twins = max(rates["bf16"], rates["bf16, compiled"])
    return {"speed over bf16 under CUDA graphs": rates["trits"] / twins, **rates}


@torch.no_grad()
def _seconds_a_byte(model: ARBModel, read: Callable[..., ARBOutput], device: Device) -> float:
    """Time in which `read` reads one byte after `CONTEXT` others, or after as many as the context holds.

    Args:
        model: that has read the others.
        read: the model, or what was compiled of it.
        device: where.
    """
    count = min(CONTEXT, model.config.ctx - 2)
    ledger = KVLedger(model.config)
    ids_BL = torch.randint(0, 256, (1, count), device=device.device)
    model(ids_BL, ledger=ledger)
    tail_B2, next_id = ledger._tail_B2, ids_BL[:, :1]

    def read_one_byte() -> object:
        # The same byte at the same place again: what it writes lies where it lay before.
        ledger.num_ids, ledger._tail_B2 = count, tail_B2
        for layer in ledger.layers:
            layer.num_positions = count - 2
        return read(next_id, ledger=ledger).logits

    return graphed_seconds(read_one_byte, device)
