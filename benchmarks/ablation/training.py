"""One run: the steps of `arbitor train` on a variant, then its figure on the held-out text."""

import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arbitor.config import DataConfig, RunConfig, TrainConfig
from arbitor.data import ByteCorpus
from arbitor.data.stream import ByteStream
from arbitor.evaluate import bits_per_byte
from arbitor.ternary.audit import audit
from arbitor.train.device import deterministic, resolve_device
from arbitor.train.loop import Trainer
from benchmarks.ablation.variants import config_of, variants_of
from benchmarks.common import provenance
from benchmarks.counts import counts
from benchmarks.learning.sizes import Size

EVAL_BATCH = 256
LAST_SHARE = 10  # the metrics of the parts are means over the last tenth of the steps
PART_COLUMNS = {
    "mean_iterations": "mean_iterations",
    "max_load": "expert_load",
    "motif_perplexity": "motif_perplexity",
}
COLUMNS = (
    "variant",
    "seed",
    "lr",
    "trit_weights",
    "active_trit_weights",
    "bytes_per_weight",
    "state",
    "bytes_seen",
    "seconds",
    "held_out_bits_per_byte",
    *PART_COLUMNS,
    "commit",
    "text",
    "device",
    "torch",
    "date",
)
KEY = ("variant", "seed", "lr", "state", "bytes_seen")


@dataclass(frozen=True, slots=True)
class Run:
    """One training of one variant.

    Attributes:
        variant: its name.
        seed: of initialisation, data order and stochastic rounding.
        lr: peak learning rate, trits per step.
        state: what training keeps.
        bytes_seen: bytes trained on.
    """

    variant: str
    seed: int
    lr: float
    state: str
    bytes_seen: int

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed} lr {self.lr:g} {self.state}"

    def identify(self) -> dict[str, str]:
        """The columns that identify the run's row."""
        return {
            "variant": self.variant,
            "seed": str(self.seed),
            "lr": format(self.lr, "g"),
            "state": self.state,
            "bytes_seen": str(self.bytes_seen),
        }


@dataclass(frozen=True, slots=True)
class Job:
    """What all runs of a comparison share, small enough to be sent to a process.

    Attributes:
        size: architecture, steps, batch.
        train_path, held_out_path: uint8 .npy files.
        text: fingerprint of both.
        device: auto, cpu or cuda.
        threads: of a process on the CPU.
        commit: of the code.
    """

    size: Size
    train_path: str
    held_out_path: str
    text: str
    device: str
    threads: int
    commit: str


def measure_on(gpu: str | None, run: Run, job: Job) -> dict[str, str]:
    """`measure` in a fresh process that sees this GPU only (None: whatever there is)."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(job.threads)
    return measure(run, job)


def measure(run: Run, job: Job) -> dict[str, str]:
    """Train and evaluate one run.

    Returns:
        The row of the results. `seconds` is training alone, without evaluation.
    """
    size = job.size
    variant = variants_of(size.model)[run.variant]
    model_config = config_of(variant, size)
    device = resolve_device(job.device)
    config = RunConfig(
        preset=size.name,
        model=model_config,
        train=TrainConfig(
            steps=size.steps, batch=size.batch, lr=run.lr, state=run.state, seed=run.seed, save=False
        ),
        data=DataConfig(),
    )
    streams = (ByteStream([np.load(path, mmap_mode="r")]) for path in (job.train_path, job.held_out_path))
    corpus = ByteCorpus(train=next(streams), held_out=next(streams), description=job.text)
    with deterministic(run.seed, device.device):
        trainer = Trainer(config, corpus, device)
        parts = _Means(size.steps - max(1, size.steps // LAST_SHARE))
        device.synchronize()
        began = time.perf_counter()
        while not trainer.done:
            trainer.take_step()
            parts.add(trainer.step, trainer.readings)
        device.synchronize()
        seconds = time.perf_counter() - began
        trainer.model.eval()
        result = bits_per_byte(
            trainer.model,
            corpus.held_out.as_array(size.held_out_bytes),
            model_config.ctx,
            max_bytes=size.held_out_bytes,
            batch=EVAL_BATCH,
        )
    report = audit(trainer.model, trainer.optimizer)
    sizes = counts(model_config)
    assert report.trit_weights == sizes.total
    figures = parts.values()
    return {
        **run.identify(),
        "trit_weights": str(sizes.total),
        "active_trit_weights": str(sizes.active),
        "bytes_per_weight": format(report.bytes_per_weight, ".4f"),
        "seconds": format(seconds, ".1f"),
        "held_out_bits_per_byte": format(result.bits_per_byte, ".5f"),
        **{
            column: format(figures[name], ".3f") if name in figures else ""
            for column, name in PART_COLUMNS.items()
        },
        "text": job.text,
        **provenance(device.device, job.commit),
    }


class _Means:
    """Means of scalars on the device over the steps after `first`, without a synchronisation."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, step: int, readings: Mapping[str, Tensor]) -> None:
        if step <= self._first:
            return
        for name, value in readings.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    def values(self) -> dict[str, float]:
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}
