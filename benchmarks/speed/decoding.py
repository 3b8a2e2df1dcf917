"""G9: bytes a second of one decoded stream, with trits and with the same network held in bf16."""

import dataclasses
from collections.abc import Mapping

import torch

from arbitor.config import ModelConfig
from arbitor.config import preset as preset_config
from arbitor.model import ARBModel, KVLedger
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
    """The rates of the step that reads one byte, each replayed as a CUDA graph, and their ratio."""
    config = large_dense() if config is None else config
    rates = {}
    for name in ("trits", "bf16"):
        model = ARBModel(config=config, device=device.device).eval()
        if name == "bf16":
            make_twin(model, DenseLinear)
            model.to(torch.bfloat16)
        rates[name] = 1 / _seconds_a_byte(model, device)
        del model
    return {"speed over bf16 under CUDA graphs": rates["trits"] / rates["bf16"], **rates}


@torch.no_grad()
def _seconds_a_byte(model: ARBModel, device: Device) -> float:
    """Time of one byte after `CONTEXT` others, or after as many as the context holds."""
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
        return model(next_id, ledger=ledger).logits

    return graphed_seconds(read_one_byte, device)
